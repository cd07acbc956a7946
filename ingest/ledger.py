"""The ledger: what was planned and what came of it, as a projection of the `ledger` topic onto PostgreSQL.

Guarantees:

* *Planned before work*: a window is in `windows` because a planned task said so, whether or not anybody collected it.
* *Order does not matter*: folding the same records in any order, any number of times, ends in the same windows; the
  complete look with the greatest version wins, the newest attempt by its `finished_at`; of equals the one with more points, and
  the last by status and detail, so that a tie has no order either.
* *Landed is the sink's own word*: a look has landed when each of its batches is in `landed`, and, where it left out what was published
  before, those of the looks before it; nothing else counts. Whether the rows are there is `ingest.seal`'s question.
* *Folded stays folded*: a window that `ingest.compact` has folded into its day is not planned again, and opens again only where
  a look of a greater version lands on it.
* *A position moves with its rows*, by compare-and-set in one transaction, as in the sink.

A window's state, first match: sealed, declared (as its reason), unbalanced, landed, collected, else open with the last look's status, else planned.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg
import orjson

from ingest import charges, settling, wire
from ingest.clock import utc
from ingest.errors import Fatal
from ingest.fold import fold_landed
from ingest.model import LookStatus, Receipt, ReceiptItem, SourceName, Task, TaskItem, TaskKind, WindowCount
from ingest.ports import Advance, StoredPosition
from ingest.sinks.connection import open_connection, translated
from ingest.sinks.doubt import InDoubt
from shard_config.model import Postgres
from shard_config.units import UnitPlan

SINK = "ledger"
"""The projection's name in `positions`."""

_TASK = """INSERT INTO tasks (task_id, target, config_revision, tick, kind, attempt, planned_at, expires_at,
    value)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING"""

_PLANNED = """INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at, stretch)
SELECT $1, $2, start, start + $5::interval, start + $5::interval + $6::interval, $7,
    CASE WHEN start < s.since THEN greatest(s.stretch, s.was) ELSE coalesce(s.stretch, 1) END
FROM generate_series($3::timestamptz, $4::timestamptz - interval '1 second', $5::interval) AS start
LEFT JOIN stretches AS s ON s.account = split_part($1, '/', 2) AND s.service = $2
WHERE NOT EXISTS (SELECT FROM sealed_days d WHERE d.target = $1 AND d.service = $2
    AND d.day = (start AT TIME ZONE 'UTC')::date AND d.covered @> start)
ORDER BY start
ON CONFLICT DO NOTHING"""

_LOOK = """INSERT INTO looks (task_id, service, finished_at, target, shard, started_at, window_start, window_end, status, detail,
    observed_at, series, points, metrics_billed, requests, archive_key, batch_ids, windows, grid_s, metrics_in_doubt, whole, held_ids)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22)
ON CONFLICT DO NOTHING"""

_TRIED = """UPDATE windows SET attempts = attempts + $8,
    last_finished_at = CASE WHEN coalesce((last_finished_at, last_status, last_detail) < ($7, $5, $6), true) THEN $7 ELSE last_finished_at END,
    last_status = CASE WHEN coalesce((last_finished_at, last_status, last_detail) < ($7, $5, $6), true) THEN $5 ELSE last_status END,
    last_detail = CASE WHEN coalesce((last_finished_at, last_status, last_detail) < ($7, $5, $6), true) THEN $6 ELSE last_detail END,
    collected_as_of = greatest(collected_as_of, $9),
    declared = CASE WHEN $10 AND declared IN ('expired', 'budget') THEN NULL ELSE declared END,
    declared_at = CASE WHEN $10 AND declared IN ('expired', 'budget') THEN NULL ELSE declared_at END
WHERE target = $1 AND service = $2 AND window_start >= $3 AND window_start < $4
    AND ($8 > 0 OR $10 OR coalesce((last_finished_at, last_status, last_detail) < ($7, $5, $6), true))"""
"""One statement for all that a receipt says: each would write every row of its span again."""

_EXPIRED = """UPDATE windows SET declared = 'expired', declared_at = $5
WHERE target = $1 AND service = $2 AND window_start >= $3 AND window_start < $4
    AND collected_as_of IS NULL AND declared IS NULL"""
"""What has no past cannot be looked at later: unless another run of its task was in time, this is its end."""

_NOT_POLLED = """UPDATE windows SET declared = 'budget', declared_at = $5
WHERE target = $1 AND service = $2 AND window_start >= $3 AND window_start < $4 AND sealed_at IS NULL AND declared IS NULL
    AND (collected_as_of IS NULL OR collected_as_of < settles_at)"""

_POLLED_AFTER_ALL = """UPDATE windows SET declared = NULL, declared_at = NULL
WHERE target = $1 AND service = $2 AND window_start >= $3 AND window_start < $4 AND declared = 'budget'"""
"""A later poll looks back over what was not polled for its account's budget."""

_POSITIONS = """SELECT partition, next, last_value_id FROM positions
WHERE sink = $1 AND topic = $2 AND partition = ANY($3)"""

_ADVANCE = """UPDATE positions SET next = $4, last_value_id = $5
WHERE sink = $1 AND topic = $2 AND partition = $3 AND next = $6"""

# One probe of the index a target and service, however many windows they have: PostgreSQL has no skip scan.
_PAIRS = """WITH RECURSIVE pairs AS (
    (SELECT target, service FROM {table} ORDER BY target, service LIMIT 1)
    UNION ALL
    SELECT found.target, found.service FROM pairs p, LATERAL (
        SELECT t.target, t.service FROM {table} t WHERE (t.target, t.service) > (p.target, p.service)
        ORDER BY t.target, t.service LIMIT 1) AS found)
SELECT target, service, (SELECT extract(epoch FROM max({end}))::bigint FROM {table} t
    WHERE t.target = p.target AND t.service = p.service AND {before}) AS until_s FROM pairs p"""

_PLANNED_UNTIL = (
    _PAIRS.format(
        table="windows", end="window_end", before="window_end <= coalesce($1, 'infinity'::timestamptz)"
    ),
    _PAIRS.format(
        table="sealed_days",
        end="least(last_end, $1::timestamptz)",
        before="first_start < coalesce($1, 'infinity'::timestamptz)",
    ),
)
"""Of the windows that are rows, and of those that are folded."""

_SERIES = """SELECT DISTINCT ON (target, service) target, service, series FROM looks
WHERE status = 'complete' AND finished_at > (SELECT max(finished_at) - $1::interval FROM looks)
ORDER BY target, service, finished_at DESC"""

_REMEMBER = """INSERT INTO targets (target, slot, weight, planned_at) VALUES ($1, $2, $3, $4)
ON CONFLICT (target) DO UPDATE SET slot = excluded.slot, weight = excluded.weight, planned_at = excluded.planned_at"""

_UNANSWERED = """SELECT value FROM tasks t
WHERE NOT EXISTS (SELECT FROM looks l WHERE l.task_id = t.task_id)
ORDER BY planned_at LIMIT $1"""

TASKS_MAX = 100_000
"""Tasks that a coordinator which starts takes over, the oldest without a receipt first; and ids that it knows."""

UNKNOWN_SETTLING_S = 4 * 86_400
"""Of a service that this process's configuration does not know (yet): the longest of all, so that nothing seals too early."""

STATEMENTS_TIMEOUT_S = 60.0

LEARNED_FROM = timedelta(days=2)
"""Looks of the last so long say what a service weighs."""


@dataclass(frozen=True, slots=True)
class PlannersMemory:
    """What the ledger knows of earlier planning. Targets are written source/account/region.

    `slots` are those of the last plan, by unit (`shard_config.units`); `series` are those asked about at the newest complete look, by
    target and service. `task_ids` are the newest 100,000. `unanswered` tasks have no receipt: they wait in `collect`, or never got there.
    """

    planned_until_s: Mapping[str, Mapping[str, int]]
    slots: Mapping[str, int]
    series: Mapping[str, Mapping[str, float]]
    task_ids: frozenset[str]
    unanswered: tuple[Task, ...]


class Ledger:
    """One process's connection to the ledger's tables. `settling_s` has, by service, its settling time.

    Not for concurrent use. After an error the connection is closed; the next call opens another.
    """

    def __init__(self, postgres: Postgres, application_name: str, settling_s: Mapping[str, int]) -> None:
        self._postgres = postgres
        self._application_name = application_name
        self.settling_s = settling_s
        self._connection: asyncpg.Connection | None = None
        self._in_doubt = InDoubt()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[asyncpg.Connection]:
        """The connection, for at most STATEMENTS_TIMEOUT_S; an error or a cancellation inside closes it. Raises Transient and Fatal."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await open_connection(self._postgres, self._application_name)
        connection = self._connection
        try:
            with translated("ledger"):
                async with asyncio.timeout(STATEMENTS_TIMEOUT_S):
                    yield connection
        except BaseException:
            # Cancelling a query would make asyncpg open further connections (its #1326).
            connection.terminate()
            raise

    async def close(self) -> None:
        """Close the connection, bounded."""
        if self._connection is not None:
            self._connection.terminate()

    async def positions(self, topic: str, partitions: Sequence[int]) -> dict[int, StoredPosition]:
        """Stored positions of the projection, by partition. Raises Transient."""
        async with self.connected() as connection:
            rows = await connection.fetch(_POSITIONS, SINK, topic, list(partitions))
        return {r["partition"]: StoredPosition(r["next"], r["last_value_id"]) for r in rows}

    async def project(self, facts: Sequence[Task | Receipt], advances: Sequence[Advance], now_s: int) -> None:
        """Fold what records say and move the positions, in one transaction. `ingest.projection` has let the facts in.

        Raises Fatal where a position is not the expected one (another process projects the partition now). Raises Transient.
        """
        with self._in_doubt.asking(advances):
            async with self.connected() as connection, connection.transaction():
                await self._project(connection, facts, advances, now_s)

    async def _project(
        self,
        connection: asyncpg.Connection,
        facts: Sequence[Task | Receipt],
        advances: Sequence[Advance],
        now_s: int,
    ) -> None:
        for advance in advances:
            if not await _advanced(connection, advance):
                if await self._in_doubt.made(connection, SINK, advances):
                    return
                raise Fatal(
                    f"ledger {advance.topic}/{advance.partition}",
                    f"its position is not {advance.expected_next}: another process projects this partition",
                    "this process rejoins the group",
                )
        for fact in facts:
            if isinstance(fact, Task):
                await _planned(connection, fact, utc(now_s))
        # Windows in one order for all processes, as `fold_landed` takes them, so that no two wait for each other.
        for fact, item in sorted(((f, i) for f in facts for i in f.items), key=_window_order):
            await self._windows(connection, str(fact.target), item_of(item), utc(now_s))
            if isinstance(fact, Receipt) and isinstance(item, ReceiptItem):
                await _receipt(connection, fact, item)
            elif isinstance(fact, Task):
                await _asked(connection, fact, item_of(item), utc(now_s))

    async def fold_landed(self, sink: str, now_s: int) -> int:
        """Mark up to 500 looks whose batches have all landed in `sink`, and their windows; returns how many. Raises Transient."""
        async with self.connected() as connection, connection.transaction():
            return await fold_landed(connection, sink, self._settling, utc(now_s))

    async def memory(self, before_s: int | None = None) -> PlannersMemory:
        """What a coordinator that starts needs to know of what was planned before. Raises Transient.

        With `before_s`, `planned_until_s` is of windows that ended by then.
        """
        before = None if before_s is None else utc(before_s)
        async with self.connected() as connection, connection.transaction(readonly=True):
            planned = [row for query in _PLANNED_UNTIL for row in await connection.fetch(query, before)]
            kept = await _kept_plan(connection)
            series = await _series(connection, LEARNED_FROM)
            known = await connection.fetch(
                "SELECT task_id FROM tasks ORDER BY planned_at DESC LIMIT $1", TASKS_MAX
            )
            unanswered = await connection.fetch(_UNANSWERED, TASKS_MAX)
        until: dict[str, dict[str, int]] = defaultdict(dict)
        for row in (row for row in planned if row["until_s"] is not None):
            services = until[row["target"]]
            services[row["service"]] = max(services.get(row["service"], row["until_s"]), row["until_s"])
        return PlannersMemory(
            planned_until_s=until,
            slots=kept.slots,
            series=series,
            task_ids=frozenset(row["task_id"] for row in known),
            unanswered=tuple(wire.decode_task(row["value"]) for row in unanswered),
        )

    async def series(self, within: timedelta) -> dict[str, dict[str, float]]:
        """Series asked about at the newest complete look, by target and service: of those that had one within this time. Raises Transient."""
        async with self.connected() as connection:
            return await _series(connection, within)

    async def kept_plan(self) -> UnitPlan:
        """The last plan that was kept: see `remember_plan`. Raises Transient."""
        async with self.connected() as connection:
            return await _kept_plan(connection)

    async def remember_plan(self, slots: Mapping[str, int], weights: Mapping[str, float], now_s: int) -> None:
        """Keep the plan, by unit, so that the next one moves little. Raises Transient."""
        rows = [(t, s, weights[t], utc(now_s)) for t, s in sorted(slots.items())]
        async with self.connected() as connection, connection.transaction():
            await connection.executemany(_REMEMBER, rows)
            await connection.execute("DELETE FROM targets WHERE NOT target = ANY($1)", list(slots))

    async def _windows(
        self, connection: asyncpg.Connection, target: str, item: TaskItem, now: datetime
    ) -> None:
        await connection.execute(
            _PLANNED,
            target,
            item.service,
            utc(item.start_s),
            utc(item.end_s),
            timedelta(seconds=item.grid_s),
            self._settling(target, item.service, item.grid_s),
            now,
        )

    def _settling(self, target: str, service: str, grid_s: int) -> timedelta:
        """From a window's end to the time from which on a look at it is final. What has no past is looked at while its window lasts."""
        if target.startswith(f"{SourceName.EXPOSITION}/"):
            return timedelta(seconds=-grid_s)
        return timedelta(seconds=self.settling_s.get(service, UNKNOWN_SETTLING_S))


async def _series(connection: asyncpg.Connection, within: timedelta) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in await connection.fetch(_SERIES, within):
        found.setdefault(row["target"], {})[row["service"]] = float(row["series"])
    return found


async def _kept_plan(connection: asyncpg.Connection) -> UnitPlan:
    rows = await connection.fetch("SELECT target, slot, weight FROM targets")
    return UnitPlan({r["target"]: r["slot"] for r in rows}, {r["target"]: r["weight"] for r in rows})


def item_of(item: TaskItem | ReceiptItem) -> TaskItem:
    """What was asked for."""
    return item.item if isinstance(item, ReceiptItem) else item


def _window_order(work: tuple[Task | Receipt, TaskItem | ReceiptItem]) -> tuple[str, str, int]:
    item = item_of(work[1])
    return str(work[0].target), item.service, item.start_s


async def _planned(connection: asyncpg.Connection, task: Task, now: datetime) -> None:
    await connection.execute(
        _TASK,
        task.task_id,
        str(task.target),
        task.config_revision,
        utc(task.tick_s),
        task.kind,
        task.attempt,
        now,
        utc(task.expires_s) if task.expires_s else None,
        wire.encode_task(task),
    )


async def _asked(connection: asyncpg.Connection, task: Task, item: TaskItem, now: datetime) -> None:
    """Windows that nobody is asked for, for want of money, are closed; those that are asked for after all open again."""
    span = (str(task.target), item.service, utc(item.start_s), utc(item.end_s))
    if task.kind in (TaskKind.BUDGET, TaskKind.PAUSED):
        await charges.none(connection, task, item, now)
    if task.kind == TaskKind.BUDGET:
        await connection.execute(_NOT_POLLED, *span, now)
    elif task.kind != TaskKind.PAUSED:
        await connection.execute(_POLLED_AFTER_ALL, *span)


async def _receipt(connection: asyncpg.Connection, receipt: Receipt, done: ReceiptItem) -> None:
    target, item, outcome = str(receipt.target), done.item, done.outcome
    span = (target, item.service, utc(item.start_s), utc(item.end_s))
    finished_at = utc(receipt.finished_at_ms / 1000)
    observed_at_ms = outcome.observed_at_ms
    if observed_at_ms and receipt.target.source == SourceName.EXPOSITION:
        # It was taken while its window lasted; an endpoint whose clock is behind must not make it look unsettled.
        observed_at_ms = max(observed_at_ms, item.start_s * 1000)
    observed_at = utc(observed_at_ms / 1000) if observed_at_ms else None
    written = await connection.execute(
        _LOOK,
        receipt.task_id,
        item.service,
        finished_at,
        target,
        receipt.shard,
        utc(receipt.started_at_ms / 1000),
        *span[2:],
        outcome.status,
        outcome.detail,
        observed_at,
        outcome.series,
        done.points,
        outcome.metrics_billed,
        orjson.dumps(outcome.requests).decode(),
        receipt.archive_key,
        list(done.batches),
        _counts(done.windows),
        item.grid_s,
        outcome.metrics_in_doubt,
        _counts(done.whole) if done.whole else None,
        list(done.held),
    )
    counted = written == "INSERT 0 1"
    if counted:
        await charges.add(connection, receipt, done)
        await settling.learn(connection, receipt, done)
    complete = outcome.status is LookStatus.COMPLETE
    said = (outcome.status, outcome.detail, finished_at)
    collected_as_of = observed_at if complete else None
    await connection.execute(_TRIED, *span, *said, int(counted), collected_as_of, complete)
    if outcome.status is LookStatus.EXPIRED and receipt.target.source == SourceName.EXPOSITION:
        await connection.execute(_EXPIRED, *span, finished_at)


def _counts(windows: Sequence[WindowCount]) -> str:
    return orjson.dumps([[w.start_s, w.points, w.digest] for w in windows]).decode()


async def _advanced(connection: asyncpg.Connection, to: Advance) -> bool:
    """False where the position is not the expected one."""
    done = await connection.execute(
        _ADVANCE, SINK, to.topic, to.partition, to.next, to.last_value_id, to.expected_next
    )
    return bool(done == "UPDATE 1")
