"""Rollups on a real PostgreSQL, held against a plain recomputation of the samples that are there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import count

import asyncpg
import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import REGISTRY

from ingest.clock import ManualClock, utc
from ingest.errors import Fatal
from ingest.ledger import Ledger
from ingest.model import Batch, BatchId, Series, SeriesKey, Target, series_ids
from ingest.ports import Landable
from ingest.rollups import percentiles_of
from ingest.sinks import rollup_read, rollup_store
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import load, migrate
from ingest.sinks.partitions import create_partitions, drop_partitions, name_of
from ingest.sinks.postgres import PostgresSink
from ingest.sinks.rollup_read import DAY_S, HOUR_S
from ingest.sinks.rollup_store import Kept, Rolled, Roller
from shard_config.model import Config, Postgres, Rollups
from workers.rolling import IDLE_S, Rolling

MIDNIGHT_S = 1_795_478_400  # 2026-11-24
DAY = MIDNIGHT_S // DAY_S
NOW_S = MIDNIGHT_S + 3 * DAY_S

SERIES = tuple(
    Series(
        SeriesKey("123456789012", "eu-west-1", "AWS/EC2", metric, (("InstanceId", f"i-{i}"),), "Average", 60)
    )
    for metric in ("CPUUtilization", "NetworkIn")
    for i in range(20)
)

Row = tuple[float, ...]
_batches = count()


@dataclass
class Store:
    """A store with the schema; its clock stands three days behind the samples' midnight."""

    dsn: str
    connection: asyncpg.Connection
    sink: PostgresSink
    clock: ManualClock

    async def land(
        self, series: list[int], times_s: list[int], values: list[float], *, seen_s: int = NOW_S
    ) -> None:
        """Points of the SERIES with these numbers, one batch."""
        wanted = sorted(set(series))
        of_each = [
            [(t, v) for s, t, v in zip(series, times_s, values, strict=True) if s == one] for one in wanted
        ]
        some = tuple(SERIES[one] for one in wanted)
        batch = Batch(
            "task", Target("cloudwatch", "123456789012", "eu-west-1"), "ec2", seen_s * 1000, 0, 300, some,
            np.array([len(points) for points in of_each], np.int32),
            np.array([t for points in of_each for t, _ in points], np.int64),
            np.array([v for points in of_each for _, v in points], np.float64),
            series_ids(some),
        )  # fmt: skip
        await self.sink.land([], [Landable(BatchId(next(_batches).to_bytes(16)), batch, 0)])

    async def roll(self, roller: Roller | None = None, kept: Kept | None = None) -> list[Rolled]:
        """Until nothing is left that has ended."""
        roller, done = roller or Roller(self.clock), []
        while one := await roller.roll(
            self.connection, utc(self.clock.now_s()), kept or Kept(), patient=False
        ):
            done.append(one)
            assert len(done) < 10_000
        return done

    async def rows(self, span_s: int) -> dict[tuple[bytes, int], Row]:
        """(series, start) → count, sum, min, max, p50, p95, p99, by SQL."""
        view = "rollups_hourly" if span_s == HOUR_S else "rollups_daily"
        found = await self.connection.fetch(
            f"SELECT *, extract(epoch FROM ts)::bigint AS start_s FROM {view}"
        )
        keys = ("count", "sum", "min", "max", "p50", "p95", "p99")
        return {(r["series"], r["start_s"]): tuple(r[key] for key in keys) for r in found}

    async def recomputed(self, span_s: int) -> dict[tuple[bytes, int], Row]:
        """The same, from the samples, one series at a time."""
        values: dict[tuple[bytes, int], list[float]] = {}
        for r in await self.connection.fetch(
            "SELECT extract(epoch FROM ts)::bigint AS ts, series, value FROM samples"
        ):
            values.setdefault((r["series"], r["ts"] // span_s * span_s), []).append(r["value"])
        return {key: _row(np.array(v)) for key, v in values.items()}

    async def marks(self) -> int:
        found: int = await self.connection.fetchval("SELECT count(*) FROM rollup_marks")
        return found


def _row(v: NDArray[np.float64]) -> Row:
    percentiles = np.quantile(v, [0.5, 0.95, 0.99])
    return (len(v), float(np.sort(v).sum()), float(v.min()), float(v.max()), *(float(p) for p in percentiles))


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    await migrate(database)
    clock = ManualClock(NOW_S)
    sink = await PostgresSink.connect(Postgres(dsn=database), clock=clock)
    connection = await open_connection(Postgres(dsn=database), "test")
    yield Store(database, connection, sink, clock)
    await sink.close()
    await connection.close()


def assert_same(found: dict[tuple[bytes, int], Row], expected: dict[tuple[bytes, int], Row]) -> None:
    """Sums to 1e-12, for numpy adds a few numbers in another order than many; all else to the bit."""
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert (row[0], *row[2:]) == (expected[key][0], *expected[key][2:])
        assert row[1] == pytest.approx(expected[key][1], rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
async def test_rollups_are_what_a_recomputation_says_after_landings_in_any_order_with_steps_between(
    store: Store, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # A few samples at once, so that ranges within a bucket and runs of buckets both occur.
    roller = Roller(store.clock, points_max=[2_500, 20_000, 1_000_000][seed])
    for look in range(9):
        size = int(rng.integers(1, 400))
        await store.land(
            rng.integers(0, len(SERIES), size).tolist(),
            (MIDNIGHT_S + rng.integers(0, 30 * 60, size) * 60).tolist(),
            np.round(rng.normal(50, 30, size), int(rng.integers(0, 3))).tolist(),
            seen_s=NOW_S + int(rng.integers(0, 3)),
        )
        if look % 3 == 2:
            for _ in range(int(rng.integers(0, 60))):
                await roller.roll(store.connection, utc(NOW_S), Kept(), patient=False)
    await store.roll(roller)
    assert_same(await store.rows(HOUR_S), await store.recomputed(HOUR_S))
    assert_same(await store.rows(DAY_S), await store.recomputed(DAY_S))
    assert await store.marks() == 0


async def _hours(store: Store, many: int = 24) -> None:
    """A value each ten minutes in the first hours of the day, of all SERIES."""
    times_s = list(range(MIDNIGHT_S, MIDNIGHT_S + many * HOUR_S, 600))
    series = [one for one in range(len(SERIES)) for _ in times_s]
    await store.land(series, times_s * len(SERIES), [float(i % 97) for i in range(len(series))])


async def test_a_late_point_and_a_correction_change_their_hour_and_their_day_and_nothing_else(
    store: Store,
) -> None:
    await _hours(store)
    await store.roll()
    before_h, before_d = await store.rows(HOUR_S), await store.rows(DAY_S)
    await store.land([3, 3], [MIDNIGHT_S + 60, MIDNIGHT_S + 600], [1e6, -5.0], seen_s=NOW_S + 60)
    done = await store.roll()
    assert [(one.span_s, one.start_s, one.buckets) for one in done] == [
        (HOUR_S, MIDNIGHT_S, 1),
        (DAY_S, MIDNIGHT_S, 1),
    ]
    hours, days = await store.rows(HOUR_S), await store.rows(DAY_S)
    assert_same(hours, await store.recomputed(HOUR_S))
    assert_same(days, await store.recomputed(DAY_S))
    (id_,) = {bytes(b) for b in [series_ids(SERIES[3:4]).astype(">u8").tobytes()]}
    assert {key for key in hours if hours[key] != before_h[key]} == {(id_, MIDNIGHT_S)}
    assert {key for key in days if days[key] != before_d[key]} == {(id_, MIDNIGHT_S)}


async def test_landing_the_same_values_again_recomputes_and_writes_nothing_new(store: Store) -> None:
    await _hours(store, many=2)
    await store.roll()
    computed = await store.connection.fetch("SELECT bucket, start, computed_at FROM rollup_hours")
    store.clock.advance(100)
    times_s = [MIDNIGHT_S + t for t in (0, 600, 3_600)]
    values = [r["value"] for r in await store.connection.fetch(
        "SELECT value FROM samples WHERE series = $1 AND ts = ANY($2) ORDER BY ts",
        series_ids(SERIES[:1]).astype(">u8").tobytes(), [utc(t) for t in times_s],
    )]  # fmt: skip
    await store.land([0, 0, 0], times_s, values, seen_s=NOW_S + 60)
    done = await store.roll()
    assert [(one.span_s, one.buckets) for one in done] == [(HOUR_S, 0), (HOUR_S, 0)]
    assert await store.connection.fetch("SELECT bucket, start, computed_at FROM rollup_hours") == computed


async def test_a_rollup_outlives_its_samples_and_is_not_made_smaller_by_a_backfill_of_some(
    store: Store,
) -> None:
    await _hours(store)
    await store.roll()
    hours, days = await store.rows(HOUR_S), await store.rows(DAY_S)
    await drop_partitions(store.connection, DAY + 1)
    await store.land([0, 1], [MIDNIGHT_S + 600] * 2, [1e9, 1e9], seen_s=NOW_S + 60)
    await store.roll()
    assert await store.rows(HOUR_S) == hours
    assert await store.rows(DAY_S) == days
    assert await store.marks() == 0


async def test_samples_that_come_back_whole_after_they_were_dropped_are_rolled_up_with_what_is_new(
    store: Store,
) -> None:
    await _hours(store, many=3)
    await store.roll()
    await drop_partitions(store.connection, DAY + 1)
    await _hours(store, many=3)
    await store.land([0], [MIDNIGHT_S + 601], [1e9], seen_s=NOW_S + 60)
    await store.roll()
    assert_same(await store.rows(HOUR_S), await store.recomputed(HOUR_S))
    assert_same(await store.rows(DAY_S), await store.recomputed(DAY_S))


async def test_a_day_whose_samples_are_gone_is_made_of_its_hours_without_percentiles(store: Store) -> None:
    await _hours(store)
    expected = await store.recomputed(DAY_S)
    # As if no process had come to the day before its samples went.
    while (
        one := await Roller(store.clock).roll(store.connection, utc(NOW_S), Kept(), patient=False)
    ) and one.start_s:
        if one.start_s == MIDNIGHT_S and one.span_s == HOUR_S:
            break
    await drop_partitions(store.connection, DAY + 1)
    await store.roll()
    days = await store.rows(DAY_S)
    assert days.keys() == expected.keys()
    for key, row in days.items():
        assert row[:4] == pytest.approx(expected[key][:4], rel=1e-12)
        assert np.isnan(row[4:]).all()


async def test_two_processes_share_the_hours_and_end_at_the_same_rows(store: Store) -> None:
    await _hours(store)
    other = await open_connection(Postgres(dsn=store.dsn), "test other")
    done: list[list[Rolled]] = [[], []]

    async def work(number: int, connection: asyncpg.Connection) -> None:
        roller = Roller(store.clock, points_max=500)
        while one := await roller.roll(connection, utc(NOW_S), Kept(), patient=False):
            done[number].append(one)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(work(0, store.connection))
            group.create_task(work(1, other))
    finally:
        await other.close()
    await store.roll()
    assert min(len(one) for one in done) > 1
    assert_same(await store.rows(HOUR_S), await store.recomputed(HOUR_S))
    assert_same(await store.rows(DAY_S), await store.recomputed(DAY_S))
    # Nothing was done twice: every hour's samples were read once.
    read = sum(one.points for half in done for one in half if one.span_s == HOUR_S)
    assert read == await store.connection.fetchval("SELECT count(*) FROM samples")


async def test_a_step_that_is_killed_leaves_its_marks_and_another_process_does_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _hours(store, many=2)
    victim = await open_connection(Postgres(dsn=store.dsn), "test victim")
    marks = await store.marks()
    real = rollup_store.write

    async def killed(connection: asyncpg.Connection, *arguments: object) -> object:
        done = await real(connection, *arguments)  # type: ignore[arg-type]
        pid = await connection.fetchval("SELECT pg_backend_pid()")
        await store.connection.execute("SELECT pg_terminate_backend($1, 5000)", pid)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(rollup_store, "write", killed)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await Roller(store.clock).roll(victim, utc(NOW_S), Kept(), patient=False)
    assert await store.marks() == marks
    assert await store.rows(HOUR_S) == {}
    await store.roll()
    assert_same(await store.rows(HOUR_S), await store.recomputed(HOUR_S))


async def test_what_lands_while_a_step_runs_keeps_its_mark(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _hours(store, many=1)
    real = rollup_store.write

    async def later(connection: asyncpg.Connection, *arguments: object) -> object:
        await store.land([0], [MIDNIGHT_S + 61], [1e9], seen_s=NOW_S + 60)
        return await real(connection, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(rollup_store, "write", later)
        await Roller(store.clock).roll(store.connection, utc(NOW_S), Kept(), patient=False)
    assert (await store.rows(HOUR_S)).keys() == (await store.recomputed(HOUR_S)).keys()
    assert await store.rows(HOUR_S) != await store.recomputed(HOUR_S)
    await store.roll()
    assert_same(await store.rows(HOUR_S), await store.recomputed(HOUR_S))


async def test_an_hour_waits_for_its_end_and_a_while_and_a_change_for_others(store: Store) -> None:
    store.clock = ManualClock(MIDNIGHT_S + 1_800)
    store.sink = await PostgresSink.connect(Postgres(dsn=store.dsn), clock=store.clock)
    roller = Roller(store.clock)

    async def due(at_s: int) -> int:
        return (await rollup_store.behind(store.connection, utc(at_s))).pieces

    await store.land([0], [MIDNIGHT_S], [1.0], seen_s=MIDNIGHT_S + 300)
    assert await due(MIDNIGHT_S + HOUR_S + 599) == 0
    assert await roller.roll(store.connection, utc(MIDNIGHT_S + HOUR_S + 599), Kept()) is None
    assert await due(MIDNIGHT_S + HOUR_S + 650) == 1
    behind = await rollup_store.behind(store.connection, utc(MIDNIGHT_S + HOUR_S + 650))
    assert (behind.buckets, behind.behind_s) == (1, 50.0)
    assert await roller.roll(store.connection, utc(MIDNIGHT_S + HOUR_S + 650), Kept()) is not None
    store.clock.advance(2 * HOUR_S)
    await store.land([0], [MIDNIGHT_S + 60], [1.0], seen_s=MIDNIGHT_S + 600)
    now_s = store.clock.now_s()
    assert [await due(now_s + s) for s in (0, 599, 600)] == [0, 0, 1]
    await store.sink.close()


async def test_folding_makes_one_mark_of_many_and_loses_no_bucket(store: Store) -> None:
    for one in range(10):
        await store.land([one], [MIDNIGHT_S + 60 * one], [1.0])
    assert await store.marks() == 10
    await rollup_store.fold(store.connection)
    assert await store.marks() == 1
    await store.roll()
    assert_same(await store.rows(HOUR_S), await store.recomputed(HOUR_S))


async def test_months_past_their_retention_are_dropped_whole_and_are_not_made_again(store: Store) -> None:
    await _hours(store, many=2)
    await store.roll()
    in_january = 1_798_761_600 // DAY_S
    assert await drop_partitions(store.connection, in_january - 32, rollup_store.HOURS) == []
    assert await drop_partitions(store.connection, in_january - 31, rollup_store.HOURS) == [
        1_793_491_200 // DAY_S
    ]
    assert await store.rows(HOUR_S) == {}
    days = await store.rows(DAY_S)
    await store.land([0], [MIDNIGHT_S + 60], [5.0], seen_s=NOW_S + 60)
    kept = Kept(hours_from_s=in_january * DAY_S)
    await store.roll(kept=kept)
    assert (
        await store.connection.fetchval(
            "SELECT count(*) FROM pg_inherits WHERE inhparent = 'rollup_hours'::regclass"
        )
        == 0
    )
    assert_same(await store.rows(DAY_S), await store.recomputed(DAY_S))
    assert await store.rows(DAY_S) != days
    assert name_of(in_january, rollup_store.HOURS) == "rollup_hours_202701"


async def test_a_store_that_has_samples_already_is_rolled_up_after_its_migration_newest_first(
    database: str,
) -> None:
    before = tuple(m for m in load() if m.name < "0011")
    await migrate(database, before)
    connection = await open_connection(Postgres(dsn=database), "test")
    await create_partitions(connection, [DAY, DAY + 1], set())
    await connection.execute(
        "INSERT INTO samples SELECT to_timestamp($1::float8 + 1800 * n), md5((n % 5)::text)::uuid, n, 1 FROM generate_series(0, 95) AS n",
        float(MIDNIGHT_S),
    )
    await migrate(connection)
    clock = ManualClock(NOW_S)
    store = Store(
        database, connection, await PostgresSink.connect(Postgres(dsn=database), clock=clock), clock
    )
    done = await store.roll()
    starts = [one.start_s for one in done]
    assert starts == sorted(starts, reverse=True)
    assert len(starts) == 50
    assert_same(await store.rows(HOUR_S), await store.recomputed(HOUR_S))
    assert_same(await store.rows(DAY_S), await store.recomputed(DAY_S))
    await store.sink.close()
    await connection.close()


async def test_readers_get_the_rows_of_some_series_in_the_order_of_series_and_time(store: Store) -> None:
    await _hours(store, many=26)
    await store.roll()
    wanted = await rollup_read.series_where(
        store.connection, accounts=["123456789012"], metrics=["NetworkIn"]
    )
    assert len(wanted) == 20
    found: dict[tuple[bytes, int], Row] = {}
    order: list[tuple[bytes, int]] = []
    async for part in rollup_read.read(
        store.connection, HOUR_S, MIDNIGHT_S + HOUR_S, MIDNIGHT_S + 25 * HOUR_S, series=wanted
    ):
        for row in range(len(part.index)):
            key = part.ids[part.index[row]].astype(">u8").tobytes(), int(part.starts_s[row])
            order.append(key)
            found[key] = tuple(float(part.columns[name][row]) for name in rollup_read.ALL)
    ids = {raw.tobytes() for raw in wanted.astype(">u8")}
    all_rows = await store.rows(HOUR_S)
    assert order == sorted(order)
    assert found == {
        k: v
        for k, v in all_rows.items()
        if k[0] in ids and MIDNIGHT_S + HOUR_S <= k[1] < MIDNIGHT_S + 25 * HOUR_S
    }


async def test_percentiles_over_days_are_merged_from_sketches(store: Store) -> None:
    rng = np.random.default_rng(3)
    values = rng.lognormal(3, 1, 3 * 1440)
    await store.land(
        [7] * len(values), [MIDNIGHT_S - DAY_S + 60 * i for i in range(len(values))], values.tolist()
    )
    await store.roll()
    read = rollup_read.read_sketches(store.connection, MIDNIGHT_S - DAY_S, NOW_S, series_ids(SERIES[7:8]))
    [days] = [days async for days in read]
    assert [start_s for start_s, _ in days] == [MIDNIGHT_S - DAY_S, MIDNIGHT_S, MIDNIGHT_S + DAY_S]
    ids, found = percentiles_of([day for _, day in days], (0.5, 0.95, 0.99))
    assert (ids == series_ids(SERIES[7:8])).all()
    expected = np.quantile(values, [0.5, 0.95, 0.99], method="lower")
    assert found[0] == pytest.approx(expected, rel=0.0101)


def _config(dsn: str, **rollups: object) -> Config:
    return Config(postgres=Postgres(dsn=dsn), rollups=Rollups.model_validate(rollups))


def _gauge(name: str) -> float:
    value = REGISTRY.get_sample_value(name)
    assert value is not None
    return value


@pytest.fixture
async def loop_of(store: Store) -> AsyncIterator[Callable[..., Rolling]]:
    """Makes the loop of a consumer, of the store's clock."""
    ledgers: list[Ledger] = []

    def make(**rollups: object) -> Rolling:
        ledgers.append(Ledger(Postgres(dsn=store.dsn), "test rolling", {}))
        return Rolling(ledgers[-1], _config(store.dsn, **rollups), store.clock)

    yield make
    for ledger in ledgers:
        await ledger.close()


async def test_a_consumers_loop_rolls_up_what_is_due_and_says_how_far_behind_it_is(
    store: Store, loop_of: Callable[..., Rolling]
) -> None:
    await _hours(store, many=2)
    store.clock.advance(900)
    rolling = loop_of()
    await rolling.turn()
    assert _gauge("headgate_rollup_dirty") == 2
    assert _gauge("headgate_rollup_behind_seconds") == 900 - 600
    while await rolling.turn() != IDLE_S:
        pass
    assert_same(await store.rows(HOUR_S), await store.recomputed(HOUR_S))
    assert await store.rows(DAY_S) == {}
    store.clock.advance(6 * HOUR_S)
    while await rolling.turn() != IDLE_S:
        pass
    assert_same(await store.rows(DAY_S), await store.recomputed(DAY_S))
    store.clock.advance(60)
    await rolling.turn()
    assert (_gauge("headgate_rollup_dirty"), _gauge("headgate_rollup_behind_seconds")) == (0, 0)


async def test_a_loop_that_is_off_remembers_what_changed_and_catches_up_when_it_is_on(
    store: Store, loop_of: Callable[..., Rolling]
) -> None:
    await store.land([0], [MIDNIGHT_S], [1.0])
    await store.land([1], [MIDNIGHT_S], [1.0])
    store.clock.advance(HOUR_S)
    rolling = loop_of(enabled=False)
    assert await rolling.turn() == IDLE_S
    assert await store.rows(HOUR_S) == {}
    assert await store.marks() == 1
    assert (_gauge("headgate_rollup_dirty"), _gauge("headgate_rollup_behind_seconds")) == (1, 0)
    rolling.configure(_config(store.dsn))
    await rolling.turn()
    assert_same(await store.rows(HOUR_S), await store.recomputed(HOUR_S))


async def test_the_loop_drops_months_past_their_retention(
    store: Store, loop_of: Callable[..., Rolling]
) -> None:
    await _hours(store, many=2)
    await store.roll()
    store.clock.advance(36 * DAY_S)
    await loop_of(hourly_retention_days=30).turn()
    assert await store.rows(HOUR_S) == {}
    assert_same(await store.rows(DAY_S), await store.recomputed(DAY_S))
    await loop_of(daily_retention_days=30).turn()
    assert await store.rows(DAY_S) == {}


async def test_a_broken_sketch_is_named_with_its_row(store: Store) -> None:
    await _hours(store, many=1)
    await store.roll()
    await store.connection.execute("UPDATE rollup_days SET sketches = '\\x00'")
    bucket = await store.connection.fetchval("SELECT min(bucket) FROM rollup_days")
    with pytest.raises(Fatal, match=f"bucket {bucket} of 2026-11-24T00:00:00Z: a sketch is cut short"):
        await rollup_read.rows_of_buckets(store.connection, DAY_S, MIDNIGHT_S, [bucket])
