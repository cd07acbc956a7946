"""Faults of processes: killed at a point, paused, there twice, down for long, with a clock that is wrong, rolled."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from ingest import wire
from ingest.errors import Rejected
from ingest.model import TaskKind
from tests.faults.field import Field
from tests.faults.kinds import Kind, Strike, Struck
from tests.faults.log import ends_of, records_of
from tests.faults.setting import SESSION_S

REACHED_S = 15.0
"""A poll comes every ten seconds, and every worker has its part in each."""
HOUR_S = 3600.0
ENDS_S = 40.0
"""Of two processes with one name the older has seen the newer, and has ended, within that."""

KILLED = "exporter killed before/after S3 PUT, Kafka ack, receipt, commit"
POINTS_OF_EXPORTERS = {
    "before_put": "before S3 PUT",
    "after_object": "after one object of its S3 PUT",
    "after_put": "after S3 PUT",
    "before_raw_ack": "before Kafka's ack",
    "after_raw_ack": "after Kafka's ack",
    "before_receipt": "before its receipt",
    "after_receipt": "after its receipt",
    "before_commit": "before its commit",
    "after_commit": "after its commit",
}


def one_of(field: Field, rng: random.Random, kind: str) -> str:
    """A worker of a kind, as "exporter"."""
    return rng.choice([name for name in field.workers if name.startswith(kind)])


@asynccontextmanager
async def killed_at(kind: str, point: str, field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """At a failpoint, once."""
    struck = Struck(one_of(field, rng, kind))
    field.arm(struck.hit, point, signal.SIGKILL)
    struck.missed = not await field.reached(struck.hit, point, REACHED_S)
    yield struck


@asynccontextmanager
async def killed(kind: str, field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """Wherever it is."""
    struck = Struck(one_of(field, rng, kind))
    await field.kill(struck.hit)
    yield struck


@asynccontextmanager
async def paused(
    kind: str, points: tuple[str, ...], field: Field, rng: random.Random
) -> AsyncIterator[Struck]:
    """At one of the points, or wherever it is ("")."""
    point, struck = rng.choice(points), Struck(one_of(field, rng, kind))
    if not point:
        await field.stop(struck.hit)
    else:
        field.arm(struck.hit, point, signal.SIGSTOP)
        struck.missed = not await field.reached(struck.hit, point, REACHED_S)
    try:
        yield struck
    finally:
        await field.cont(struck.hit)


@asynccontextmanager
async def same_name_twice(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """A second process of an exporter's name. The first is started again where it has ended, and is the newer one then."""
    struck = Struck(one_of(field, rng, "exporter"))
    async with field.second(struck.hit) as second:
        yield struck
        if await second.exits(ENDS_S) != 3:
            struck.complaints.append(
                f"two processes were named {struck.hit}, and the second one ended with {second.code}"
            )
        elif "another process with the name" not in second.log.read_text():
            struck.complaints.append(f"the second {struck.hit} did not say why it ended")


@asynccontextmanager
async def two_coordinators(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """Each announces what is due: a task twice at most, which is one task, asked for once."""
    struck = Struck("coordinator")
    since = await ends_of(field.config, "collect")
    async with field.second("coordinator"):
        yield struck
    times: Counter[str] = Counter()
    for value in (await records_of(field.config, "collect", since)).values():
        with suppress(Rejected):  # another kind of fault writes rubbish there
            task = wire.decode_task(value)
            times[task.task_id] += task.kind in (TaskKind.LIVE, TaskKind.BACKLOG)
    struck.notes = {"tasks": len(times), "announced_again": times.total() - len(times)}
    # A coordinator that starts announces what has no receipt once more; then each announces what is due.
    if most := [of for of, n in times.items() if n > 3]:
        struck.complaints.append(f"{len(most)} tasks were announced more than three times, as {most[:2]}")


@asynccontextmanager
async def down_for_an_hour(field: Field, _: random.Random) -> AsyncIterator[Struck]:
    """360 windows of each service: the coordinator is gone, everybody's time moves on by an hour, and it comes back."""
    async with field.down("coordinator"):
        await field.advance(HOUR_S)
    yield Struck("coordinator")


@asynccontextmanager
async def clock_off(kind: str, field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """An hour ahead or behind, and back again in one step."""
    struck = Struck(one_of(field, rng, kind))
    # Kafka's own clock does not move on with the field's, and a consumer goes by it where its own is behind.
    ways = (-HOUR_S, HOUR_S) if not field.advanced_s else (HOUR_S,)
    field.clock(struck.hit, rng.choice(ways))
    try:
        yield struck
    finally:
        field.clock(struck.hit, 0.0)


@asynccontextmanager
async def rolled(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """Every worker ends in order and is started again, one after the other of its kind, as a deployment does it."""
    yield Struck("all workers")
    async with asyncio.TaskGroup() as group:
        for names in (["coordinator"], field.exporters, field.consumers):
            group.create_task(_one_by_one(field, names))


async def _one_by_one(field: Field, names: list[str]) -> None:
    for name in names:
        await field.restart(name)


def _kind(
    name: str,
    row: str,
    strike: Strike,
    needs: str,
    lasts_s: tuple[float, float] = (0.0, 3.0),
    *,
    may_pay_twice: bool = False,
    alone: bool = False,
) -> Kind:
    return Kind(name, row, strike, lasts_s, frozenset(needs.split()), may_pay_twice, alone)


PAST_SESSION_S = (SESSION_S + 2.0, SESSION_S + 8.0)

KINDS: tuple[Kind, ...] = (
    *(
        _kind(
            f"exporter killed {words}",
            KILLED,
            partial(killed_at, "exporter", point),
            "exporter",
            may_pay_twice=True,
        )
        for point, words in POINTS_OF_EXPORTERS.items()
    ),
    _kind(
        "exporter paused past its session, then resumed",
        "exporter paused past its session, then resumed",
        partial(paused, "exporter", ("", "", "before_put", "after_put", "after_raw_ack")),
        "exporter",
        PAST_SESSION_S,
        may_pay_twice=True,
    ),
    _kind(
        "same shard identity twice",
        "same shard identity twice",
        same_name_twice,
        "exporter",
        (4.0, 8.0),
        may_pay_twice=True,
    ),
    _kind("two coordinators", "two coordinators", two_coordinators, "coordinator kafka", (8.0, 15.0)),
    _kind(
        "coordinator killed between ledger and collect",
        "two coordinators",
        partial(killed_at, "coordinator", "between_topics"),
        "coordinator",
    ),
    _kind(
        "coordinator down for an hour of windows",
        "coordinator down for an hour of windows",
        down_for_an_hour,
        "coordinator clock",
        (0.0, 0.0),
        alone=True,
    ),
    _kind(
        "consumer killed between the database's commit and Kafka's",
        "consumer killed between the database commit and the Kafka commit",
        partial(killed_at, "consumer", "between_commits"),
        "consumer",
    ),
    _kind(
        "consumer killed in its transaction",
        "consumer killed between the database commit and the Kafka commit",
        partial(killed_at, "consumer", "in_transaction"),
        "consumer",
    ),
    _kind(
        "zombie consumer resumes mid-batch",
        "zombie consumer resumes mid-batch",
        partial(paused, "consumer", ("in_hand", "in_transaction")),
        "consumer",
        PAST_SESSION_S,
    ),
    *(
        _kind(
            f"clock of {worker} an hour off, stepping back",
            "clock an hour off, stepping back",
            partial(clock_off, worker),
            f"{worker} clock",
            (4.0, 15.0),
        )
        for worker in ("coordinator", "exporter", "consumer")
    ),
    _kind("rolling restart", "rolling restart", rolled, "coordinator exporter consumer", may_pay_twice=True),
)
