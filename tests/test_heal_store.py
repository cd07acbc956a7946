"""Healing on a real PostgreSQL: what it knows, what it allocates and declares, and that two never do both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import asyncpg
import pytest

from ingest import heal_store, pauses
from ingest.errors import Transient
from ingest.heal import Announced, Reason, Rules, Wait
from ingest.heal_store import LOCK_ID, Healed, HealStore
from ingest.ledger import SINK, Ledger
from ingest.model import (
    BatchId,
    LookStatus,
    Outcome,
    Receipt,
    ReceiptItem,
    Target,
    Task,
    TaskItem,
    task_id_of,
)
from ingest.pauses import Pause
from ingest.ports import Advance
from ingest.schedule import Grid
from ingest.sinks.migrate import migrate
from shard_config.model import Heal, Postgres
from shard_config.price import Prices

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
EC2 = Grid("ec2", poll_interval_s=300, period_s=60, settling_s=600)
START_S = 1_767_264_000
TOPIC = "t.ledger"
RULES = Rules(Heal(attempts_max=2, backoff_s=100), Prices(), "rev", {TARGET: (EC2,)}, task_deadline_s=120)
OVERDUE_S = START_S + 6000
"""Then all windows of the tests are past their deadline."""


def task_of(windows: int, first: int = 0) -> Task:
    items = (TaskItem("ec2", START_S + 300 * first, START_S + 300 * (first + windows), 300),)
    return Task(task_id_of(TARGET, "rev", 0, items), TARGET, "rev", items[0].end_s, 0, "live", 0, items)


def receipt_of(
    task: Task, status: LookStatus, finished_s: int, batches: tuple[bytes, ...] = (), series: int = 500
) -> Receipt:
    [item] = task.items
    outcome = Outcome(status, "HTTP 500", finished_s * 1000, series, {}, series)
    done = ReceiptItem(item, outcome, 0, (), tuple(BatchId(b.ljust(16)) for b in batches))
    return Receipt(
        task.task_id, TARGET, "exporter-1", task.tick_s, finished_s * 1000, finished_s * 1000,
        "v1/a/key" if batches else "", (done,),
    )  # fmt: skip


class World:
    """A ledger that is fed with records, and two coordinators that heal from it."""

    def __init__(self, dsn: str, sql: asyncpg.Connection) -> None:
        self.sql = sql
        self.ledgers = [Ledger(Postgres(dsn=dsn), "test", {"ec2": 600}) for _ in range(3)]
        self.one, self.two = (HealStore(ledger) for ledger in self.ledgers[1:])
        self.next = 0

    async def project(self, *facts: Task | Receipt) -> None:
        advance = Advance(TOPIC, 0, self.next, self.next + len(facts), bytes(16))
        await self.ledgers[0].project(facts, [advance], START_S)
        self.next += len(facts)

    async def failed(self, *tasks: Task) -> None:
        """Planned, asked, failed; and the target was heard of since."""
        for task in tasks:
            await self.project(task, receipt_of(task, LookStatus.FAILED, task.tick_s + 1))
        await self.heard()

    async def heard(self) -> None:
        """By a later window of the target, which has no troubles of its own."""
        last = task_of(1, 15)
        await self.project(last, receipt_of(last, LookStatus.COMPLETE, OVERDUE_S - 1))
        await self.sql.execute(
            "UPDATE windows SET sealed_at = now() WHERE window_start = to_timestamp($1)",
            last.items[0].start_s,
        )

    async def land(self, *batches: bytes) -> None:
        await self.sql.executemany(
            "INSERT INTO landed VALUES ('postgres', $1, 't', 't', 's', 1, 1, 0, 0, now())",
            [(b.ljust(16),) for b in batches],
        )
        await self.ledgers[0].fold_landed("postgres", OVERDUE_S)

    async def heal(
        self, now_s: int = OVERDUE_S, rules: Rules = RULES, announced: Mapping[str, Announced] | None = None
    ) -> Healed:
        healed = await self.one.heal(now_s, rules, announced or {})
        assert healed is not None
        return healed


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    await migrate(Postgres(dsn=database))
    sql = await asyncpg.connect(database)
    await sql.execute("INSERT INTO positions VALUES ($1, $2, 0, 0, '')", SINK, TOPIC)
    world = World(database, sql)
    try:
        yield world
    finally:
        for ledger in world.ledgers:
            await ledger.close()
        await sql.close()


async def test_a_window_is_healed_past_its_deadline_and_not_before(world: World) -> None:
    await world.failed(task_of(1))
    deadline_s = START_S + 300 + 600 + 300 + 120
    assert (await world.heal(deadline_s)).asked == ()
    [task] = (await world.heal(deadline_s + 1)).asked
    assert task.items == (TaskItem("ec2", START_S, START_S + 300, 300),)


async def test_an_attempt_is_allocated_with_its_money_and_is_pending_until_its_receipt(world: World) -> None:
    await world.failed(task_of(2))
    healed = await world.heal()
    [task] = healed.asked
    assert (task.kind, task.attempt, healed.dollars) == ("heal", 1, Decimal("0.005"))
    # Its task may never have got to Kafka: after its deadline and a back-off it is announced again, not made anew.
    assert (await world.heal(OVERDUE_S + 219)).decision.waiting == {Wait.ANSWER: 2}
    again = await world.heal(OVERDUE_S + 220)
    assert [t.task_id for t in again.decision.again] == [task.task_id]
    assert again.asked == ()
    assert again.dollars == healed.dollars
    # A receipt that bills more than was reserved counts as it is, and the next attempt has the next number.
    await world.project(task, receipt_of(task, LookStatus.FAILED, OVERDUE_S + 221, series=800))
    second = await world.heal(OVERDUE_S + 222)
    assert [(t.attempt, t.items) for t in second.asked] == [(2, task.items)]
    assert second.dollars == Decimal("0.016")
    # Tomorrow is another day.
    assert (await world.heal(OVERDUE_S + 86_400)).dollars == 0


async def test_of_two_coordinators_one_allocates(world: World) -> None:
    await world.failed(task_of(2))
    both = await asyncio.gather(
        world.one.heal(OVERDUE_S, RULES, {}), world.two.heal(OVERDUE_S, RULES, {}), return_exceptions=True
    )
    assert not [e for e in both if isinstance(e, BaseException) and not isinstance(e, Transient)]
    assert sum(len(h.asked) for h in both if isinstance(h, Healed)) == 1
    assert await world.sql.fetchval("SELECT count(*) FROM attempts") == 1


async def test_who_does_not_get_the_lock_does_nothing_and_does_not_wait(world: World) -> None:
    await world.failed(task_of(2))
    async with world.sql.transaction():
        await world.sql.execute("SELECT pg_advisory_xact_lock($1)", LOCK_ID)
        assert await world.one.heal(OVERDUE_S, RULES, {}) is None
    assert len((await world.heal()).asked) == 1


async def test_an_archived_look_is_replayed_only_where_a_later_one_has_landed(world: World) -> None:
    early, late = task_of(1), task_of(1, 10)
    await world.project(early, receipt_of(early, LookStatus.COMPLETE, START_S + 1000, (b"a",)))
    await world.project(late, receipt_of(late, LookStatus.COMPLETE, START_S + 4000, (b"b",)))
    await world.heard()
    behind = await world.heal()
    assert (behind.decision.replays, behind.decision.waiting[Wait.LANDING]) == ((), 2)
    await world.land(b"b")
    healed = await world.heal()
    assert [(t.task_id, t.kind) for t in healed.decision.replays] == [(early.task_id, "replay")]
    assert healed.asked == ()
    await world.land(b"a")
    assert (await world.heal()).decision.replays == ()


async def test_a_look_whose_rows_are_not_in_the_store_is_made_to_land_again(world: World) -> None:
    task = task_of(3)
    await world.project(task, receipt_of(task, LookStatus.COMPLETE, START_S + 2000, (b"a", b"b")))
    await world.land(b"a", b"b")
    await world.heard()
    assert (await world.heal()).decision.waiting == {Wait.SEALING: 3}
    await world.sql.execute(
        "UPDATE windows SET unbalanced = 'a row is missing' WHERE window_start = to_timestamp($1)", START_S
    )
    healed = await world.heal()
    assert [(t.task_id, t.kind) for t in healed.decision.replays] == [(task.task_id, "replay")]
    assert await world.sql.fetchval("SELECT count(*) FROM landed") == 0
    assert healed.asked == ()
    known = {task.task_id: Announced(1, OVERDUE_S)}
    await world.land(b"a", b"b")
    assert set((await world.heal(OVERDUE_S + 60, announced=known)).decision.waiting) == {Wait.SEALING}
    await world.sql.execute(
        "UPDATE windows SET unbalanced = 'as ever' WHERE window_start = to_timestamp($1)", START_S
    )
    again = await world.heal(OVERDUE_S + 60, announced=known)
    assert (again.asked, again.decision.replays, again.decision.waiting[Wait.LANDING]) == ((), (), 1)
    assert await world.sql.fetchval("SELECT count(*) FROM landed") == 2


async def test_a_task_that_nobody_answered_is_announced_again_and_a_paused_one_is_not(world: World) -> None:
    lost, paused = task_of(1), replace(task_of(1, 2), kind="paused")
    await world.project(lost, paused)
    await world.heard()
    healed = await world.heal()
    assert [t.task_id for t in healed.decision.again] == [lost.task_id]
    assert [t.items for t in healed.asked] == [paused.items]


async def test_a_window_is_declared_once_and_a_sealed_one_never(world: World) -> None:
    await world.failed(task_of(3))
    gone_s = START_S + 456 * 86_400
    await world.sql.execute("UPDATE looks SET finished_at = to_timestamp($1)", gone_s)
    await world.sql.execute(
        "UPDATE windows SET sealed_at = now() WHERE window_start = to_timestamp($1)", START_S + 300
    )
    declared = (await world.heal(gone_s)).declared
    assert [(d.window.window.start_s - START_S, d.reason) for d in declared] == [
        (0, Reason.UNRECOVERABLE),
        (600, Reason.UNRECOVERABLE),
    ]
    rows = await world.sql.fetch(
        "SELECT declared, declared_at FROM windows WHERE window_start < to_timestamp($1) ORDER BY window_start",
        START_S + 900,
    )
    at = datetime.fromtimestamp(gone_s, UTC)
    assert [tuple(r) for r in rows] == [("unrecoverable", at), (None, None), ("unrecoverable", at)]
    assert (await world.heal(gone_s)).declared == ()


async def test_more_gaps_than_one_pass_reads_are_read_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal_store, "WINDOWS_MAX", 4)
    await world.failed(task_of(10))
    # They lie in one block, which rests in between.
    seen = [await world.heal(OVERDUE_S + 300 * n) for n in range(3)]
    windows = [w.start_s for h in seen for t in h.asked for i in t.items for w in i.windows()]
    assert set(windows) == {START_S + 300 * n for n in range(10)}


async def test_pauses_hold_by_their_words_and_healing_heeds_them(world: World) -> None:
    now = datetime.fromtimestamp(START_S, UTC)
    await world.failed(task_of(1))
    assert await pauses.begin(world.sql, Pause(TARGET.account, "*", now, "moving"))
    assert not await pauses.begin(world.sql, Pause(TARGET.account, "*", now, "again"))
    assert [(p.account, p.service, p.reason) for p in await pauses.read(world.sql)] == [
        (TARGET.account, "*", "moving")
    ]
    assert (await world.one.pauses()).cover(TARGET.account, "ec2")
    assert (await world.heal()).decision.waiting == {Wait.PAUSED: 1}
    assert not await pauses.end(world.sql, TARGET.account, "ec2")
    assert await pauses.end(world.sql, TARGET.account, "*")
    assert len((await world.heal()).asked) == 1
