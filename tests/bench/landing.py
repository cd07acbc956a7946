"""Landing 100,000 rows of 20,000 series into PostgreSQL, against a plain COPY of the same rows.

Both go in turns into day-partitioned tables with the same key, on one server with its durability on. The plain COPY is the best we know:
its rows are sorted before the clock starts, and encoded in binary by numpy within. Landing starts from decoded batches, and
includes the positions, the landed entries, the question after new series, sorting, encoding and digests.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import asyncpg
import numpy as np
import structlog
import uvloop

from ingest.clock import SystemClock
from ingest.model import Batch, BatchId, Series, SeriesKey, Target, series_ids
from ingest.ports import Advance, Landable
from ingest.sinks.connection import open_connection
from ingest.sinks.copy import COLUMNS, copy_stream, rows_of
from ingest.sinks.migrate import migrate
from ingest.sinks.partitions import FILLFACTOR
from ingest.sinks.postgres import PostgresSink
from shard_config.model import Postgres
from tests.bench import pipeline
from tests.bench.run import Report
from workers.servers import PostgresServer

BATCHES, SERIES_A_BATCH, POINTS_A_SERIES = 40, 500, 5
ROWS = BATCHES * SERIES_A_BATCH * POINTS_A_SERIES
ROUNDS = 41
CONFLICT_ROUNDS = 5
START_S = 1_795_478_400
OBSERVED_MS = 1_795_500_000_000

_TARGET = Target("cloudwatch", "123456789012", "eu-west-1")


class Looks:
    """Makes the batches of one look after the other, 5 minutes apart, all over the same series."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._windows = 0
        self._series = [self._batch_series(b) for b in range(BATCHES)]
        self._ids = [series_ids(series) for series in self._series]

    @staticmethod
    def _batch_series(batch: int) -> tuple[Series, ...]:
        return tuple(
            Series(SeriesKey("123456789012", "eu-west-1", "AWS/EC2", "CPUUtilization", (("InstanceId", f"i-{batch}-{i}"),), "Average", 60))
            for i in range(SERIES_A_BATCH)
        )  # fmt: skip

    def next(self) -> list[Landable]:
        """The next 5 minutes, all rows fresh."""
        self._windows += 1
        times_s = START_S + 300 * self._windows + 60 * np.arange(POINTS_A_SERIES, dtype=np.int64)
        return [
            self._landable(
                Batch(
                    "task", _TARGET, "ec2", OBSERVED_MS + self._windows, 0, 300, series,
                    np.full(SERIES_A_BATCH, POINTS_A_SERIES, np.int32), np.tile(times_s, SERIES_A_BATCH),
                    self._rng.random(SERIES_A_BATCH * POINTS_A_SERIES), ids,
                )
            )
            for series, ids in zip(self._series, self._ids, strict=True)
        ]  # fmt: skip

    def again(self, batches: Sequence[Landable], later_ms: int = 0, earlier_s: int = 0) -> list[Landable]:
        """The same points in batches of other ids, looked at later by so much, moved back by so much in their first fifth."""
        moved = [b.batch.timestamps_s.copy() for b in batches]
        if earlier_s:
            for times_s in moved:
                times_s[::POINTS_A_SERIES] -= earlier_s
        return [
            self._landable(
                replace(b.batch, observed_at_ms=b.batch.observed_at_ms + later_ms, timestamps_s=times_s)
            )
            for b, times_s in zip(batches, moved, strict=True)
        ]

    def _landable(self, batch: Batch) -> Landable:
        return Landable(BatchId(self._rng.bytes(16)), batch, 0)


class Bench:
    def __init__(self, sink: PostgresSink, plain: asyncpg.Connection) -> None:
        self.looks = Looks(np.random.default_rng(1))
        self._sink = sink
        self._plain = plain
        self._next = 0

    async def land(self, batches: Sequence[Landable]) -> float:
        """Seconds."""
        advance = Advance("raw", 0, self._next, self._next + len(batches), bytes(16))
        self._next = advance.next
        return await _timed(lambda: self._sink.land([advance], batches))

    async def copy(self, batches: Sequence[Landable]) -> float:
        """Seconds, for encoding and COPY."""
        rows = rows_of([b.batch for b in batches])
        return await _timed(
            lambda: self._plain.copy_to_table(
                "plain", source=copy_stream(rows), columns=COLUMNS, format="binary"
            )
        )


async def _timed(work: Callable[[], Awaitable[object]]) -> float:
    gc.collect()
    started_s = time.perf_counter()
    await work()
    return time.perf_counter() - started_s


async def _measure(dsn: str, report: Report) -> None:
    postgres = Postgres(dsn=dsn)
    plain = await open_connection(postgres, "bench")
    await migrate(plain)
    await plain.execute(
        "CREATE TABLE plain (LIKE samples INCLUDING ALL) PARTITION BY RANGE (ts);"
        "CREATE TABLE plain_20261124 PARTITION OF plain FOR VALUES FROM ('2026-11-24') TO ('2026-11-25')"
        f" WITH (fillfactor = {FILLFACTOR})"
    )
    sink = await PostgresSink.connect(postgres, clock=SystemClock())
    await sink.init_positions("raw", [0])
    await sink.claim("raw", [0])
    bench = Bench(sink, plain)
    looks = bench.looks

    first = looks.next()
    first_ratio = await bench.copy(first) / await bench.land(first)
    await bench.copy(looks.next())
    ratios: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}

    def note(name: str, took_s: float, copy_s: float) -> None:
        seconds.setdefault(name, []).append(took_s)
        ratios.setdefault(name, []).append(copy_s / took_s)

    for turn in range(ROUNDS):
        batches = looks.next()
        pair = [bench.copy, bench.land] if turn % 2 else [bench.land, bench.copy]
        took = {work.__name__: await work(batches) for work in pair}
        note("copy", took["copy"], took["copy"])
        note("fresh", took["land"], took["copy"])
        note("replay", await bench.land(batches), took["copy"])
    for _ in range(CONFLICT_ROUNDS):
        batches = looks.next()
        copy_s = await bench.copy(batches)
        await bench.land(batches)
        note("same rows in other batches", await bench.land(looks.again(batches)), copy_s)
        note("all rows newer", await bench.land(looks.again(batches, later_ms=1)), copy_s)
        mixed = looks.again(looks.next(), later_ms=1, earlier_s=300)
        note("live: a fifth of the rows newer", await bench.land(mixed), copy_s)
    await sink.close()
    await plain.close()

    goals = {"fresh": ">= 0.9", "replay": ">= 0.8"}
    for name, times in seconds.items():
        rate = ROWS / statistics.median(times)
        if name == "copy":
            report.add("plain COPY", rate, "rows/s")
        else:
            report.add(name, rate, "rows/s", "plain COPY", statistics.median(ratios[name]), goals.get(name))
    report.add("first landing, all 20,000 series new", first_ratio, "ratio", "plain COPY")


def run(report: Report) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as home:
        server = PostgresServer(Path(home))
        server.start()
        try:
            uvloop.run(_measure(server.dsn(), report))
        finally:
            server.stop()
    pipeline.run(report)
