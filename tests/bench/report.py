"""The report of 100,000 series over 30 days, read from rollups: seconds and memory.

Rollups are written as `roll` would have written them, since 30 days of 100,000 series of minutes would land for hours. For the time an eighth of the buckets, as
full as all would be, and eight times the seconds; for the memory all series, with an hour a day, for hours without samples take as much.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import asyncpg
import numpy as np
import structlog
import uvloop

from ingest.clock import utc
from ingest.model import SeriesIds, SeriesKey, series_id
from ingest.report import html, tables
from ingest.report.assemble import Wanted, assemble
from ingest.rollups import roll_up
from ingest.sinks import rollup_store
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import migrate
from ingest.sinks.partitions import create_partitions
from ingest.sinks.rollup_read import DAY_S, HOUR_S
from shard_config.load import shipped_services
from shard_config.model import Config, Postgres
from tests.bench.run import Report
from workers.servers import PostgresServer

SERIES, DAYS, SHARE = 100_000, 30, 8
MONDAY_S = 1_795_392_000
FROM_S = MONDAY_S - DAYS * DAY_S
METRICS = (
    ("CPUUtilization", "Average"), ("CPUUtilization", "Maximum"), ("NetworkIn", "Sum"), ("NetworkOut", "Sum"),
    ("EBSReadOps", "Sum"), ("EBSWriteOps", "Sum"), ("EBSReadBytes", "Sum"), ("EBSWriteBytes", "Sum"),
)  # fmt: skip
"""Of a machine: those of the shipped profile that the report uses, but for instance stores."""


def _keys(many: int) -> list[SeriesKey]:
    """Machines of 40 accounts."""
    return [
        SeriesKey(str(100_000_000_000 + n // len(METRICS) % 40), "eu-west-1", "AWS/EC2", name, (("InstanceId", f"i-{n // len(METRICS):017x}"),), stat, 60)
        for n, (name, stat) in ((n, METRICS[n % len(METRICS)]) for n in range(many))
    ]  # fmt: skip


async def _fill(connection: asyncpg.Connection, share: int, hours_a_day: int) -> None:
    """The n-th part of all series, in the n-th part of the buckets, so many hours of each day."""
    # Ids that fill the first buckets as all series would fill all.
    ids = ((series_id(key), key) for key in _keys(SERIES // share))
    by_id = sorted((bytes([id_[0] // share]) + id_[1:], key) for id_, key in ids)
    await connection.copy_records_to_table(
        "series",
        records=[
            (id_, k.account, k.region, k.namespace, k.metric, f'{{"InstanceId": "{k.dimensions[0][1]}"}}', k.stat, 60, "", utc(FROM_S))
            for id_, k in by_id
        ],
    )  # fmt: skip
    first = FROM_S // DAY_S
    for of in (rollup_store.HOURS, rollup_store.DAYS):
        await create_partitions(connection, range(first, first + DAYS), set(), of)
    rng = np.random.default_rng(3)
    for bucket in range(256 // share):
        own = np.frombuffer(b"".join(id_ for id_, _ in by_id if id_[0] == bucket), ">u8")
        series: SeriesIds = own.reshape(-1, 2).astype(np.uint64)
        for span_s, points, step_s in ((HOUR_S, 60, DAY_S // hours_a_day), (DAY_S, 1440, DAY_S)):
            values = np.minimum(rng.gamma(2, 8, len(series) * points), 100)
            ids_of_points = series[np.arange(len(series)).repeat(points)]
            rows = rollup_store.values_of_row(roll_up(ids_of_points, values, bins=span_s == DAY_S))
            await connection.executemany(
                rollup_store.UPSERTS[span_s],
                [(bucket, utc(start_s), utc(start_s), *rows) for start_s in range(FROM_S, MONDAY_S, step_s)],
            )


async def _make(dsn: str) -> tuple[float, float, float, float]:
    """Seconds for the report, and of them those of this process's CPU; for its page, JSON and CSV; the greatest memory in MB."""
    config = Config(services=tuple(shipped_services().values()), postgres=Postgres(dsn=dsn))
    started_s, before_s = time.perf_counter(), time.process_time()
    found = await assemble(config, Wanted(FROM_S, MONDAY_S), MONDAY_S, lambda *_: None)
    made_s, cpu_s = time.perf_counter(), time.process_time() - before_s
    document = tables.document(found)
    html.page(document)
    for _ in tables.to_json(document):
        pass
    with tempfile.TemporaryFile("w") as file:
        tables.write_csv(document, file)
    written_s = time.perf_counter()
    most_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return made_s - started_s, cpu_s, written_s - made_s, most_mb


def _child(dsn: str) -> tuple[float, float, float, float]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    return asyncio.run(_make(dsn))


async def _measure(dsn: str, share: int, hours_a_day: int) -> tuple[float, float, float, float]:
    await migrate(dsn)
    connection = await open_connection(Postgres(dsn=dsn), "bench")
    await _fill(connection, share, hours_a_day)
    await connection.close()
    # In a process of its own: its memory is the report's alone.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return await asyncio.to_thread(pool.apply, _child, (dsn,))


def _measured(share: int, hours_a_day: int) -> tuple[float, float, float, float]:
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as home:
        server = PostgresServer(Path(home))
        server.start()
        try:
            return uvloop.run(_measure(server.dsn(), share, hours_a_day))
        finally:
            server.stop()


def run(report: Report) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    made_s, cpu_s, written_s, _ = _measured(SHARE, 24)
    report.add("30 days of 100,000 series", made_s * SHARE, "s", goal="<= 60")
    report.add("… of it CPU of this process", cpu_s * SHARE, "s")
    report.add("… as a page, JSON and CSV", written_s * SHARE, "s")
    *_, most_mb = _measured(1, 1)
    report.add("most memory", most_mb, "MB", goal="<= 1000")
