"""Rolling up against landing: points a second of hours and a day from samples that landed just now; and reading 30 days back.

Landing and rolling up run one after the other on one server with its durability on. The rate of rolling up counts a point twice as read, once for
its hour and once for its day, and once as done. What is read back is written as `roll` would have written it, since 30 days of 100,000
series of minutes would land for hours; an eighth of it, and eight times the seconds.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import numpy as np
import structlog
import uvloop

from ingest.clock import SystemClock, utc
from ingest.model import Batch, BatchId, Series, SeriesKey, Target, series_ids
from ingest.ports import Landable
from ingest.rollups import Rollups, percentiles_of, roll_up
from ingest.sinks import rollup_read, rollup_store
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import migrate
from ingest.sinks.partitions import create_partitions
from ingest.sinks.postgres import PostgresSink
from ingest.sinks.rollup_read import DAY_S, HOUR_S
from ingest.sinks.rollup_store import Kept, Roller
from shard_config.model import Postgres
from tests.bench.run import Report
from workers.servers import PostgresServer

SERIES, HOURS, POINTS_A_LOOK = 20_000, 2, 5
"""2,400,000 points."""
READ_SERIES, READ_DAYS = 100_000, 30
READ_BUCKETS = 32
"""Of 256: buckets are read one by one, so that all take eight times as long."""
TIMES = 256 // READ_BUCKETS
MIDNIGHT_S = 1_795_478_400

_TARGET = Target("cloudwatch", "123456789012", "eu-west-1")


def _batches(rng: np.random.Generator) -> list[list[Landable]]:
    """Looks 5 minutes apart, 40 batches of 500 series each."""
    groups = [
        tuple(
            Series(SeriesKey("123456789012", "eu-west-1", "AWS/EC2", "CPUUtilization", (("InstanceId", f"i-{b}-{i}"),), "Average", 60))
            for i in range(500)
        )
        for b in range(SERIES // 500)
    ]  # fmt: skip
    ids = [series_ids(group) for group in groups]
    looks = []
    for start_s in range(MIDNIGHT_S, MIDNIGHT_S + HOURS * HOUR_S, 60 * POINTS_A_LOOK):
        times_s = start_s + 60 * np.arange(POINTS_A_LOOK, dtype=np.int64)
        looks.append([
            Landable(
                BatchId(rng.bytes(16)),
                Batch(
                    "task", _TARGET, "ec2", (start_s + 600) * 1000, 0, 300, group, np.full(500, POINTS_A_LOOK, np.int32),
                    np.tile(times_s, 500), rng.gamma(2, 8, 500 * POINTS_A_LOOK), own,
                ),
                0,
            )
            for group, own in zip(groups, ids, strict=True)
        ])  # fmt: skip
    return looks


async def _write_rate(dsn: str, report: Report) -> None:
    postgres, clock = Postgres(dsn=dsn), SystemClock()
    connection = await open_connection(postgres, "bench")
    sink = await PostgresSink.connect(postgres, clock=clock)
    landed_s = points = 0.0
    for look in _batches(np.random.default_rng(1)):
        started_s = time.perf_counter()
        landed = await sink.land([], look)
        landed_s += time.perf_counter() - started_s
        points += landed.points
    roller, rolled_s = Roller(clock), {HOUR_S: 0.0, DAY_S: 0.0}
    now = utc(MIDNIGHT_S + 10 * DAY_S)
    while True:
        started_s = time.perf_counter()
        done = await roller.roll(connection, now, Kept(), patient=False)
        if done is None:
            break
        rolled_s[done.span_s] += time.perf_counter() - started_s
    await sink.close()
    await connection.close()
    landing, rolling = points / landed_s, points / sum(rolled_s.values())
    report.add("landing", landing, "points/s")
    report.add("hours alone", points / rolled_s[HOUR_S], "points/s", "landing", landed_s / rolled_s[HOUR_S])
    report.add("hours and days", rolling, "points/s", "landing", rolling / landing, ">= 0.5")


def _rows(rng: np.random.Generator, bucket: int, many: int, points: int) -> Rollups:
    """Rows of a bucket as samples would make them."""
    ids = rng.integers(0, 1 << 63, (many, 2)).astype(np.uint64)
    ids[:, 0] = ids[:, 0] >> np.uint64(7) | np.uint64(bucket << 56)
    return roll_up(np.repeat(ids, points, axis=0), rng.gamma(2, 8, many * points), bins=points > 60)


async def _fill(connection: asyncpg.Connection) -> None:
    """READ_DAYS of hours and days of READ_SERIES."""
    rng = np.random.default_rng(2)
    first = MIDNIGHT_S // DAY_S
    for of in (rollup_store.HOURS, rollup_store.DAYS):
        await create_partitions(connection, range(first, first + READ_DAYS), set(), of)
    many = READ_SERIES // rollup_read.BUCKETS
    for bucket in range(READ_BUCKETS):
        for span_s, points in ((HOUR_S, 60), (DAY_S, 1440)):
            rows = _rows(rng, bucket, many, points)
            await connection.executemany(
                rollup_store.UPSERTS[span_s],
                [
                    (bucket, utc(start_s), utc(start_s), *rollup_store.values_of_row(rows))
                    for start_s in range(MIDNIGHT_S, MIDNIGHT_S + READ_DAYS * DAY_S, span_s)
                ],
            )


async def _read_rate(dsn: str, report: Report) -> None:
    connection = await open_connection(Postgres(dsn=dsn), "bench")
    await _fill(connection)
    until_s = MIDNIGHT_S + READ_DAYS * DAY_S
    size = await connection.fetchrow(
        "SELECT sum(pg_total_relation_size(inhrelid)) FILTER (WHERE inhparent = 'rollup_hours'::regclass) AS hours,"
        " sum(pg_total_relation_size(inhrelid)) FILTER (WHERE inhparent = 'rollup_days'::regclass) AS days FROM pg_inherits"
    )
    many = READ_SERIES // rollup_read.BUCKETS * READ_BUCKETS * READ_DAYS
    report.add("an hour of a series takes", size["hours"] / many / 24, "bytes")
    report.add("a day of a series takes", size["days"] / many, "bytes")
    for name, columns in (("all columns", rollup_read.ALL), ("count, sum, max", ("count", "sum", "max"))):
        started_s, rows = time.perf_counter(), 0
        async for one in rollup_read.read(connection, HOUR_S, MIDNIGHT_S, until_s, columns):
            rows += len(one.index)
        took_s = (time.perf_counter() - started_s) * TIMES
        report.add(f"reading 30 days of hours of 100,000 series, {name}", took_s, "s", goal="<= 60")
        report.add(f"… rows, {name}", rows * TIMES / took_s, "rows/s")
    started_s = time.perf_counter()
    async for days in rollup_read.read_sketches(connection, MIDNIGHT_S, until_s):
        percentiles_of([day for _, day in days], (0.5, 0.95, 0.99))
    took_s = (time.perf_counter() - started_s) * TIMES
    report.add("30 days merged to percentiles of 100,000 series", took_s, "s", goal="<= 60")
    report.add("most memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MB", goal="<= 1000")
    await connection.close()


def run(report: Report) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    for measure in (_write_rate, _read_rate):
        with tempfile.TemporaryDirectory(prefix="headgate-bench-") as home:
            server = PostgresServer(Path(home))
            server.start()
            try:
                uvloop.run(_measured(server.dsn(), measure, report))
            finally:
                server.stop()


async def _measured(dsn: str, measure: Callable[[str, Report], Awaitable[None]], report: Report) -> None:
    await migrate(dsn)
    await measure(dsn, report)
