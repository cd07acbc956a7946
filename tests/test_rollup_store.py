"""Rollups on a real PostgreSQL, held against a plain recomputation of the samples that are there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count

import asyncpg
import numpy as np
import pytest
from numpy.typing import NDArray

from ingest.clock import ManualClock, utc
from ingest.model import Batch, BatchId, Series, SeriesKey, Target, series_ids
from ingest.ports import Landable
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import migrate
from ingest.sinks.postgres import PostgresSink
from ingest.sinks.rollup_read import DAY_S, HOUR_S
from ingest.sinks.rollup_store import Kept, Rolled, Roller
from shard_config.model import Postgres

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


@pytest.mark.parametrize("seed", range(4))
async def test_rollups_are_what_a_recomputation_says_after_landings_in_any_order_with_steps_between(
    store: Store, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # A few samples at once, so that ranges within a bucket and runs of buckets both occur.
    roller = Roller(store.clock, points_max=[400, 2_000, 20_000, 1_000_000][seed])
    for look in range(12):
        size = int(rng.integers(1, 400))
        await store.land(
            rng.integers(0, len(SERIES), size).tolist(),
            (MIDNIGHT_S + rng.integers(0, 2 * 1440, size) * 60).tolist(),
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
