"""A backfill's questions to CloudWatch: tasks for exporters, a few at a time, until what they bring has landed.

*It can be stopped at any time*: tasks have ids made from what was asked, and what any of a backfill's tasks has brought is not asked again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import asyncpg

from ingest import wire
from ingest.clock import Clock, utc
from ingest.errors import Transient
from ingest.log import Outgoing, Sender
from ingest.model import Task, TaskKind
from ingest.sinks.connection import translated
from shard_config.model import Config
from shard_config.units import Places
from workers.backfilling import Done, Tell

TASKS_IN_FLIGHT = 16
TASK_POLL_S = 0.5

_ANSWERED = """SELECT task_id, bool_and(landed_at IS NOT NULL) AS landed, bool_and(status = 'complete') AS complete,
    sum(points)::bigint AS points, sum(metrics_billed)::bigint AS metrics_billed, max(status || ': ' || detail) AS detail
FROM looks WHERE task_id = ANY($1) GROUP BY task_id"""

# By what was looked at, not by task: as retention moves on, the same windows come in other tasks, at a coarser period.
_UNANSWERED = """WITH done AS (
    SELECT l.target, l.service, range_agg(tstzrange(l.window_start, l.window_end)) AS spans
    FROM tasks AS t JOIN looks AS l USING (task_id)
    WHERE (t.attempt, t.config_revision) = ($1, $2) AND l.landed_at IS NOT NULL GROUP BY l.target, l.service
)
SELECT DISTINCT task_id FROM unnest($3::text[], $4::text[], $5::text[], $6::timestamptz[], $7::timestamptz[])
    AS i (task_id, target, service, start, until) LEFT JOIN done USING (target, service)
WHERE spans IS NULL OR NOT spans @> tstzrange(i.start, i.until)"""


async def ask(
    tasks: Sequence[Task],
    connection: asyncpg.Connection,
    sender: Sender,
    config: Config,
    clock: Clock,
    done: Done,
    tell: Tell,
) -> None:
    """Have exporters execute the tasks, a few at a time, and wait until what they bring has landed.

    A task that has a receipt already is not asked again. Raises Transient where nothing moves any more.
    """
    with translated("ledger"):
        rows = await connection.fetch("SELECT target, slot FROM targets")
        places = Places({row["target"]: row["slot"] for row in rows})
        planned = await connection.fetch(
            "SELECT task_id FROM tasks WHERE task_id = ANY($1)", [t.task_id for t in tasks]
        )
    before = {row["task_id"] for row in planned}
    waiting = {t.task_id: t for t in tasks}
    to_announce = list(tasks)
    in_flight: dict[str, Task] = {}
    patience_s = 3.0 * config.task_deadline_s + 60.0
    moved_s = clock.monotonic_s()
    while waiting:
        for row in await answers(connection, waiting):
            in_flight.pop(row["task_id"], None)
            if row["landed"]:
                _count(waiting.pop(row["task_id"]), row, done)
                moved_s = clock.monotonic_s()
        answered = {t.task_id for t in tasks} - waiting.keys()
        to_announce = [t for t in to_announce if t.task_id not in answered]
        some, to_announce = _next(to_announce, TASKS_IN_FLIGHT - len(in_flight))
        await _announce(some, before, places, sender, config)
        in_flight |= {t.task_id: t for t in some}
        tell(1 - len(waiting) / len(tasks), done)
        if clock.monotonic_s() - moved_s > patience_s:
            raise Transient(
                "collect",
                f"{len(waiting)} tasks have no landed answer after {patience_s:g} s without progress",
                "see that exporters and consumers run; the same command goes on where this one was",
            )
        if waiting:
            await clock.sleep(TASK_POLL_S)


async def unanswered(connection: asyncpg.Connection, tasks: Sequence[Task]) -> list[Task]:
    """Those of one backfill's tasks that ask for something that none of its tasks has brought yet. Raises Transient."""
    if not tasks:
        return []
    items = [
        (t.task_id, str(t.target), i.service, utc(i.start_s), utc(i.end_s)) for t in tasks for i in t.items
    ]
    with translated("ledger"):
        rows = await connection.fetch(
            _UNANSWERED, tasks[0].attempt, tasks[0].config_revision, *map(list, zip(*items, strict=True))
        )
    left = {row["task_id"] for row in rows}
    return [t for t in tasks if t.task_id in left]


def _next(tasks: list[Task], count: int) -> tuple[list[Task], list[Task]]:
    return tasks[: max(0, count)], tasks[max(0, count) :]


async def answers(connection: asyncpg.Connection, tasks: Iterable[str]) -> list[asyncpg.Record]:
    """Of those tasks that have a receipt: task_id, landed, complete, points, metrics_billed, detail. Raises Transient."""
    with translated("ledger"):
        rows: list[asyncpg.Record] = await connection.fetch(_ANSWERED, list(tasks))
    return rows


async def _announce(
    tasks: Sequence[Task], before: set[str], places: Places, sender: Sender, config: Config
) -> None:
    kafka = config.kafka
    if not tasks:
        return
    await sender.send(
        kafka.topic("ledger"), [Outgoing(str(t.target).encode(), wire.encode_task(t)) for t in tasks]
    )
    # One that was announced before we were stopped may be archived by now: then it is not paid for again.
    ready = [replace(t, kind=TaskKind.AGAIN.value) if t.task_id in before else t for t in tasks]
    await sender.send(
        kafka.topic("collect"),
        [
            Outgoing(
                str(t.target).encode(), wire.encode_task(t), places.of(str(t.target), t.items[0].service)
            )
            for t in ready
        ],
    )


def _count(task: Task, row: asyncpg.Record, done: Done) -> None:
    done.tasks += 1
    done.points += row["points"]
    done.metrics_billed += row["metrics_billed"]
    if not row["complete"]:
        done.problems.append(f"{task.target} until {utc(task.tick_s):%Y-%m-%dT%H:%MZ}: {row['detail']}")
