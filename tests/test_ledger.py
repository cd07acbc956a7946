"""The ledger on a real PostgreSQL: what a window's row says, whatever order its records came in."""

from __future__ import annotations

import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from ingest import wire
from ingest.balance import signed
from ingest.clock import ManualClock
from ingest.errors import Fatal, Transient
from ingest.landing import Landing
from ingest.ledger import SINK, Ledger
from ingest.log import Outgoing
from ingest.model import (
    BatchId,
    LookStatus,
    Outcome,
    Receipt,
    ReceiptItem,
    Target,
    Task,
    TaskItem,
    WindowCount,
    task_id_of,
)
from ingest.ports import Advance, StoredPosition
from ingest.sinks.migrate import migrate
from ingest.sinks.postgres import PostgresSink
from shard_config.model import Limits, Postgres
from tests.fake_log import FakeBroker, FakeSender
from tests.test_landing import NAN, value_of

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
OTHER = Target("cloudwatch", "123456789012", "us-east-1")
TOPIC = "t.ledger"
NOON_S = 1_767_268_800
SETTLING_S = {"ec2": 600, "rds": 0}


def task_of(start_s: int, end_s: int, *, service: str = "ec2", target: Target = TARGET) -> Task:
    items = (TaskItem(service, start_s, end_s, 300),)
    return Task(task_id_of(target, "rev", 0, items), target, "rev", end_s, 0, "live", 0, items)


def receipt_of(
    task: Task,
    *,
    observed_s: int = 0,
    status: LookStatus = LookStatus.COMPLETE,
    detail: str = "",
    counts: Sequence[tuple[int, int, int]] = (),
    batches: Sequence[bytes] = (),
    finished_s: float | None = None,
    series: int = 1,
) -> Receipt:
    """A receipt for the one item of a task. `counts` are (start_s, points, digest)."""
    (item,) = task.items
    observed_s = observed_s or item.end_s
    windows = tuple(WindowCount(s, s + item.grid_s, n, d) for s, n, d in counts)
    outcome = Outcome(status, detail, observed_s * 1000, series, {"GetMetricData": 2}, 5)
    done = ReceiptItem(
        item, outcome, sum(w.points for w in windows), windows, tuple(BatchId(b) for b in batches)
    )
    finished_ms = int((finished_s if finished_s is not None else observed_s + 1) * 1000)
    return Receipt(
        task.task_id, task.target, "exporter-1", task.tick_s, finished_ms - 500, finished_ms, "", (done,)
    )


STATE_SQL = """CASE
    WHEN sealed_at IS NOT NULL THEN 'sealed'
    WHEN declared IS NOT NULL THEN declared
    WHEN unbalanced IS NOT NULL THEN 'unbalanced'
    WHEN landed_as_of IS NOT NULL THEN 'landed'
    WHEN collected_as_of IS NOT NULL THEN 'collected'
    WHEN last_status IS NOT NULL THEN last_status
    ELSE 'planned' END"""


class Store:
    """A ledger on a database of its own, fed with records at the next offset."""

    def __init__(self, dsn: str, connection: asyncpg.Connection) -> None:
        self.dsn = dsn
        self.sql = connection
        self.ledger = Ledger(Postgres(dsn=dsn), "test", SETTLING_S)
        self.next = 0

    async def project(self, *facts: Task | Receipt) -> None:
        advance = Advance(TOPIC, 0, self.next, self.next + len(facts), bytes(16))
        await self.ledger.project(facts, [advance], NOON_S)
        self.next += len(facts)

    async def land(self, *batch_ids: bytes) -> None:
        """What a sink writes when a batch has landed."""
        await self.sql.executemany(
            "INSERT INTO landed VALUES ('postgres', $1, 't', 't', 's', $2, 1, 0, 0, now()) ON CONFLICT DO NOTHING",
            [(b, 1 + b[0]) for b in batch_ids],
        )

    async def fold(self) -> int:
        return await self.ledger.fold_landed("postgres", NOON_S)

    async def windows(self) -> dict[int, dict[str, Any]]:
        """Of TARGET's ec2: seconds from noon of a window's start → its row, with its state."""
        rows = await self.sql.fetch(
            f"SELECT *, {STATE_SQL} AS state FROM windows WHERE target = $1 AND service = 'ec2'"
            " ORDER BY window_start",
            str(TARGET),
        )
        return {int(r["window_start"].timestamp()) - NOON_S: dict(r) for r in rows}

    async def states(self) -> dict[int, str]:
        return {start: row["state"] for start, row in (await self.windows()).items()}

    async def everything(self) -> list[tuple[Any, ...]]:
        """All windows without the times at which this process did something."""
        return [
            tuple(r)
            for r in await self.sql.fetch(
                "SELECT target, service, window_start, window_end, settles_at, last_status, last_detail,"
                " last_finished_at, collected_as_of, landed_as_of, landed_version, points, digest, attempts, declared"
                " FROM windows ORDER BY 1, 2, 3"
            )
        ]

    async def empty(self) -> None:
        await self.sql.execute(
            "TRUNCATE tasks, looks, windows, landed, targets, sealed_days, declared_days, look_days"
        )
        await self.sql.execute("UPDATE positions SET next = 0")
        self.next = 0


@pytest.fixture(scope="session")
async def ledger_database(postgres_dsn: str) -> AsyncIterator[str]:
    """DSN of a database with the schema, for all tests of the ledger one after the other."""
    server = await asyncpg.connect(postgres_dsn)
    name = f"t_ledger_{uuid.uuid4().hex[:12]}"
    dsn = postgres_dsn.rpartition("/")[0] + "/" + name
    try:
        await server.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        await migrate(Postgres(dsn=dsn))
        yield dsn
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await server.close()


@pytest.fixture
async def store(ledger_database: str) -> AsyncIterator[Store]:
    connection = await asyncpg.connect(ledger_database)
    tables = await connection.fetch(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'schema_migrations'"
    )
    await connection.execute("TRUNCATE " + ", ".join(t["tablename"] for t in tables))
    await connection.execute("INSERT INTO positions VALUES ($1, $2, 0, 0, '')", SINK, TOPIC)
    store = Store(ledger_database, connection)
    try:
        yield store
    finally:
        await store.ledger.close()
        await connection.close()


async def test_a_window_is_planned_before_anybody_worked(store: Store) -> None:
    await store.project(task_of(NOON_S - 600, NOON_S))
    assert await store.states() == {-600: "planned", -300: "planned"}
    row = (await store.windows())[-300]
    assert row["window_end"] == datetime.fromtimestamp(NOON_S, UTC)
    assert row["settles_at"] - row["window_end"] == timedelta(seconds=600)


async def test_a_window_goes_from_planned_to_collected_to_landed(store: Store) -> None:
    early, late = task_of(NOON_S - 300, NOON_S), task_of(NOON_S - 300, NOON_S + 600)
    await store.project(early)
    await store.project(receipt_of(early, counts=[(NOON_S - 300, 3, 2**63 + 7)], batches=[b"a" * 16]))
    assert await store.fold() == 0
    assert await store.states() == {-300: "collected"}
    await store.land(b"a" * 16)
    assert await store.fold() == 1
    assert await store.states() == {-300: "landed"}
    row = (await store.windows())[-300]
    assert (row["points"], row["digest"]) == (3, signed(2**63 + 7))
    assert row["landed_as_of"] == datetime.fromtimestamp(NOON_S, UTC)

    await store.project(late, receipt_of(late, counts=[(NOON_S - 300, 4, 9)], batches=[b"b" * 16]))
    await store.land(b"b" * 16)
    await store.fold()
    row = (await store.windows())[-300]
    assert (row["state"], row["points"], row["attempts"]) == ("landed", 4, 2)


async def test_a_look_has_landed_only_when_all_its_batches_have_in_the_same_sink(store: Store) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    await store.project(receipt_of(task, batches=[b"a" * 16, b"b" * 16]))
    await store.land(b"a" * 16)
    assert await store.fold() == 0
    await store.land(b"b" * 16)
    assert await store.ledger.fold_landed("another", NOON_S) == 0
    assert await store.fold() == 1
    assert await store.fold() == 0
    assert await store.states() == {-300: "landed"}


async def test_a_complete_look_without_points_closes_its_windows_as_empty(store: Store) -> None:
    await store.project(receipt_of(task_of(NOON_S - 600, NOON_S), counts=[(NOON_S - 300, 2, 5)]))
    await store.fold()
    rows = await store.windows()
    assert {s: (r["state"], r["points"], r["digest"]) for s, r in rows.items()} == {
        -600: ("landed", 0, 0),
        -300: ("landed", 2, 5),
    }


@pytest.mark.parametrize("status", [s for s in LookStatus if s is not LookStatus.COMPLETE])
async def test_a_look_that_is_not_complete_leaves_its_window_open_with_its_reason(
    store: Store, status: LookStatus
) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    await store.project(task, receipt_of(task, status=status, detail="why", batches=[b"a" * 16]))
    await store.land(b"a" * 16)
    await store.fold()
    row = (await store.windows())[-300]
    assert (row["state"], row["last_detail"]) == (status.value, "why")
    assert (row["collected_as_of"], row["landed_as_of"], row["sealed_at"]) == (None, None, None)


async def test_a_failure_after_a_complete_look_opens_nothing_again_and_shows(store: Store) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    await store.project(receipt_of(task))
    await store.fold()
    failed = receipt_of(task, status=LookStatus.FAILED, detail="later", finished_s=NOON_S + 60)
    await store.project(failed)
    row = (await store.windows())[-300]
    assert (row["state"], row["last_status"], row["last_detail"]) == ("landed", "failed", "later")


def _history(rng: random.Random) -> tuple[list[Task | Receipt], list[bytes]]:
    """Overlapping looks of all statuses at few windows, with ties of every kind; and the batches that landed."""
    facts: list[Task | Receipt] = []
    landed: list[bytes] = []
    for n in range(14):
        start_s = NOON_S - 300 * rng.randint(1, 4)
        task = task_of(
            start_s,
            start_s + 300 * rng.randint(1, 3),
            service=rng.choice(["ec2", "ec2", "rds"]),
            target=rng.choice([TARGET, TARGET, OTHER]),
        )
        task = replace(task, task_id=f"{n:032x}")
        batches = [bytes([n, i]) * 8 for i in range(rng.randint(0, 2))]
        facts.append(task)
        facts.append(
            receipt_of(
                task,
                observed_s=NOON_S + rng.choice([0, 300, 600]),
                status=rng.choice([LookStatus.COMPLETE, LookStatus.COMPLETE, LookStatus.FAILED]),
                detail=rng.choice(["a", "b"]),
                counts=[(start_s, rng.randint(1, 3), rng.choice([1, 2**64 - 1]))],
                batches=batches,
                finished_s=NOON_S + rng.choice([1, 2]),
            )
        )
        landed += batches if rng.random() < 0.8 else []
    return facts, landed


@pytest.mark.parametrize("seed", range(4))
async def test_any_order_and_duplication_of_the_same_records_ends_in_the_same_windows(
    store: Store, seed: int
) -> None:
    rng = random.Random(seed)
    facts, landed = _history(rng)
    await store.project(*facts)
    await store.land(*landed)
    while await store.fold():
        pass
    expected = await store.everything()
    assert {row[5] for row in expected} >= {"complete"}
    for _ in range(4):
        await store.empty()
        shuffled = facts + rng.sample(facts, len(facts) // 2)
        rng.shuffle(shuffled)
        waiting = rng.sample(landed, len(landed))
        while shuffled:
            cut = rng.randint(1, 6)
            await store.project(*shuffled[:cut])
            await store.land(*waiting[:cut])
            shuffled, waiting = shuffled[cut:], waiting[cut:]
            if rng.random() < 0.5:
                await store.fold()
        await store.land(*waiting)
        while await store.fold():
            pass
        assert await store.everything() == expected


async def test_a_task_that_ran_twice_is_two_looks_and_a_receipt_that_came_twice_is_one(store: Store) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    first, second = receipt_of(task), receipt_of(task, finished_s=NOON_S + 9)
    await store.project(first, first, second)
    assert await store.sql.fetchval("SELECT count(*) FROM looks") == 2
    assert await store.sql.fetchval("SELECT sum(metrics_billed) FROM looks") == 10


async def test_a_position_moves_with_its_rows_or_neither_does(store: Store) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    await store.project(task)
    assert await store.ledger.positions(TOPIC, [0, 1]) == {0: StoredPosition(1, bytes(16))}
    store.next = 0
    with pytest.raises(Fatal, match="its position is not 0: another process"):
        await store.project(task_of(NOON_S, NOON_S + 300))
    assert await store.states() == {-300: "planned"}
    assert await store.ledger.positions(TOPIC, [0]) == {0: StoredPosition(1, bytes(16))}


async def test_of_two_processes_at_one_position_one_is_refused(store: Store) -> None:
    zombie = Store(store.dsn, store.sql)
    await store.project(task_of(NOON_S - 300, NOON_S))
    with pytest.raises(Fatal, match="another process projects"):
        await zombie.project(task_of(NOON_S, NOON_S + 300))
    await zombie.ledger.close()


async def test_after_a_lost_connection_the_next_call_opens_another(store: Store) -> None:
    await store.project(task_of(NOON_S - 300, NOON_S))
    await store.sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'test'"
    )
    with contextlib.suppress(Transient):  # not raised where the client has heard of it by now
        await store.project(task_of(NOON_S, NOON_S + 300))
    if (await store.states()).keys() == {-300}:
        await store.project(task_of(NOON_S, NOON_S + 300))
    assert await store.states() == {-300: "planned", 0: "planned"}


async def test_a_batch_whose_points_are_all_dead_lands_and_closes_its_look(store: Store) -> None:
    value = value_of([NAN, NAN])
    broker = FakeBroker(raw=1, dead=1)
    broker.append("raw", Outgoing(b"k", value, 0))
    sink = await PostgresSink.connect(Postgres(dsn=store.dsn), clock=ManualClock(NOON_S))
    try:
        await sink.init_positions("raw", [0])
        landing = Landing("raw", "dead", sink, FakeSender(broker), Limits(), ManualClock(NOON_S))
        await landing.open([0], {0: (0, 1)})
        await landing.land(broker.records("raw"))
    finally:
        await sink.close()
    await store.project(receipt_of(task_of(NOON_S - 300, NOON_S), batches=[wire.batch_id_of(value)]))
    await store.fold()
    assert await store.states() == {-300: "landed"}
    assert await store.sql.fetchrow("SELECT points, dead_points FROM landed") == (0, 2)


# --- the planner's memory -------------------------------------------------------------------------------------


async def test_a_new_ledger_remembers_nothing(store: Store) -> None:
    memory = await store.ledger.memory()
    assert (memory.planned_until_s, memory.slots, memory.series) == ({}, {}, {})
    assert (memory.task_ids, memory.unanswered) == (frozenset(), ())


async def test_the_memory_has_the_end_of_the_newest_window_by_target_and_service(store: Store) -> None:
    await store.project(
        task_of(NOON_S, NOON_S + 600),
        task_of(NOON_S - 900, NOON_S),
        task_of(NOON_S - 300, NOON_S, service="rds"),
        task_of(NOON_S - 300, NOON_S + 900, target=OTHER),
    )
    memory = await store.ledger.memory()
    assert memory.planned_until_s == {
        str(TARGET): {"ec2": NOON_S + 600, "rds": NOON_S},
        str(OTHER): {"ec2": NOON_S + 900},
    }
    earlier = await store.ledger.memory(before_s=NOON_S - 300)
    assert earlier.planned_until_s == {str(TARGET): {"ec2": NOON_S - 300}}


async def test_the_memory_has_every_task_and_those_without_a_receipt_whole(store: Store) -> None:
    answered, unanswered = task_of(NOON_S - 300, NOON_S), task_of(NOON_S, NOON_S + 300)
    failed = task_of(NOON_S, NOON_S + 300, target=OTHER)
    await store.project(answered, unanswered, failed)
    await store.project(receipt_of(answered), receipt_of(failed, status=LookStatus.FAILED))
    memory = await store.ledger.memory()
    assert memory.task_ids == {answered.task_id, unanswered.task_id, failed.task_id}
    assert memory.unanswered == (unanswered,)


async def test_a_service_weighs_the_series_of_its_newest_complete_looks(store: Store) -> None:
    ec2, rds = task_of(NOON_S - 300, NOON_S), task_of(NOON_S - 300, NOON_S, service="rds")
    await store.project(
        receipt_of(ec2, series=10, finished_s=NOON_S + 9),
        receipt_of(ec2, series=99, finished_s=NOON_S + 1),
        receipt_of(ec2, series=1, finished_s=NOON_S + 20, status=LookStatus.FAILED),
        receipt_of(rds, series=5),
    )
    learned = {str(TARGET): {"ec2": 10.0, "rds": 5.0}}
    assert (await store.ledger.memory()).series == await store.ledger.series(timedelta(hours=2)) == learned


async def test_the_plan_that_is_remembered_replaces_the_one_before(store: Store) -> None:
    await store.ledger.remember_plan({"a": 1, "b": 2}, {"a": 1.0, "b": 2.0}, NOON_S)
    after = {"b": 3, "c#ec2": 4, "c#rds": 5}
    await store.ledger.remember_plan(after, dict.fromkeys(after, 1.0), NOON_S)
    assert (await store.ledger.memory()).slots == (await store.ledger.kept_plan()).slots == after


# --- what has no past, and what is folded -----------------------------------------------------------------------

SCRAPED = Target("exposition", "lab", "rack-1")


async def test_a_window_without_a_past_settles_as_it_begins_whatever_the_endpoints_clock_says(
    store: Store,
) -> None:
    task = task_of(NOON_S, NOON_S + 300, target=SCRAPED)
    await store.project(receipt_of(task, observed_s=NOON_S - 5))
    await store.fold()
    row = await store.sql.fetchrow("SELECT settles_at, window_start, landed_as_of FROM windows")
    assert row["settles_at"] == row["window_start"] == row["landed_as_of"]


async def test_an_expired_look_declares_its_window_where_there_is_no_past_and_only_there(
    store: Store,
) -> None:
    for target in (TARGET, SCRAPED):
        await store.project(
            receipt_of(task_of(NOON_S - 300, NOON_S, target=target), status=LookStatus.EXPIRED)
        )
    rows = await store.sql.fetch("SELECT target, declared, attempts FROM windows ORDER BY target")
    assert [tuple(r) for r in rows] == [(str(TARGET), None, 1), (str(SCRAPED), "expired", 1)]


@pytest.mark.parametrize("late_first", [True, False])
async def test_a_window_that_another_run_of_its_task_was_in_time_for_has_not_expired(
    store: Store, late_first: bool
) -> None:
    task = task_of(NOON_S - 300, NOON_S, target=SCRAPED)
    late = receipt_of(task, status=LookStatus.EXPIRED, finished_s=NOON_S + 9)
    facts = [late, receipt_of(task)] if late_first else [receipt_of(task), late]
    await store.project(*facts)
    await store.fold()
    assert await store.sql.fetchval(f"SELECT {STATE_SQL} FROM windows") == "landed"


async def test_attempts_count_looks_with_a_receipt_once_each(store: Store) -> None:
    task = task_of(NOON_S - 600, NOON_S)
    failed = receipt_of(task, status=LookStatus.FAILED, finished_s=NOON_S + 1)
    await store.project(task)
    assert {r["attempts"] for r in (await store.windows()).values()} == {0}
    await store.project(failed, failed, receipt_of(task, finished_s=NOON_S + 2))
    assert {r["attempts"] for r in (await store.windows()).values()} == {2}
