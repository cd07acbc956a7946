"""The report of 100,000 series over 30 days, read from rollups: seconds and memory.

Rollups are written as `roll` would have written them, since 30 days of 100,000 series of minutes would land for hours: an eighth of the buckets, as full as
all would be, and eight times the seconds. What of the memory grows with resources is told by two sizes, and drawn out to all.
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
from ingest.model import SeriesKey, series_id
from ingest.report import html, reading, tables
from ingest.report.assemble import Wanted, assemble
from ingest.report.reading import CELLS_MAX
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
CELLS = CELLS_MAX // SHARE
"""Hours of series in memory: as many blocks as all series make. What grows with resources does so between the two sizes, and the rest of `CELLS_MAX` is added."""
CELL_BYTES = 8
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


async def _fill(connection: asyncpg.Connection, many: int) -> None:
    keys = _keys(many)
    # Ids that fill the first buckets as all series would fill all.
    ids = ((series_id(key), key) for key in keys)
    by_id = sorted((bytes([id_[0] // SHARE]) + id_[1:], key) for id_, key in ids)
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
    for bucket in range(256 // SHARE):
        own = [id_ for id_, _ in by_id if id_[0] == bucket]
        ids = np.frombuffer(b"".join(own), ">u8").reshape(-1, 2).astype(np.uint64)
        for span_s, points in ((HOUR_S, 60), (DAY_S, 1440)):
            values = np.minimum(rng.gamma(2, 8, len(own) * points), 100)
            rows = rollup_store.values_of_row(
                roll_up(np.repeat(ids, points, axis=0), values, bins=span_s == DAY_S)
            )
            await connection.executemany(
                rollup_store.UPSERTS[span_s],
                [(bucket, utc(start_s), utc(start_s), *rows) for start_s in range(FROM_S, MONDAY_S, span_s)],
            )


async def _make(dsn: str, accounts: int) -> tuple[float, float, float, int]:
    """Seconds for the report, and for its page, JSON and CSV; the greatest memory in MB; resources."""
    reading.CELLS_MAX = CELLS  # type: ignore[misc]
    config = Config(services=tuple(shipped_services().values()), postgres=Postgres(dsn=dsn))
    connection = await open_connection(config.postgres, "bench")
    chosen = tuple(str(100_000_000_000 + n) for n in range(accounts))
    started_s = time.perf_counter()
    found = await assemble(connection, config, Wanted(FROM_S, MONDAY_S, chosen), MONDAY_S, lambda *_: None)
    made_s = time.perf_counter()
    document = tables.document(found)
    html.page(document)
    for _ in tables.to_json(document):
        pass
    with tempfile.TemporaryFile("w") as file:
        tables.write_csv(document, file)
    await connection.close()
    most_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return made_s - started_s, time.perf_counter() - made_s, most_mb, len(found.resources)


def _child(dsn: str, accounts: int) -> tuple[float, float, float, int]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    return asyncio.run(_make(dsn, accounts))


async def _measure(dsn: str, report: Report) -> None:
    await migrate(dsn)
    connection = await open_connection(Postgres(dsn=dsn), "bench")
    await _fill(connection, SERIES // SHARE)
    await connection.close()
    # Each in a process of its own: its memory is the report's alone.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        _, _, half_mb, few = await asyncio.to_thread(pool.apply, _child, (dsn, 20))
        made_s, written_s, most_mb, many = await asyncio.to_thread(pool.apply, _child, (dsn, 40))
    report.add("30 days of 100,000 series", made_s * SHARE, "s", goal="<= 60")
    report.add("… as a page, JSON and CSV", written_s * SHARE, "s")
    whole_mb = most_mb + (most_mb - half_mb) / (many - few) * many * (SHARE - 1)
    whole_mb += (CELLS_MAX - CELLS) * CELL_BYTES / 2**20
    report.add(f"most memory, {SERIES // SHARE:,} series", most_mb, "MB")
    report.add("most memory, drawn out to 100,000 series", whole_mb, "MB", goal="<= 1000")


def run(report: Report) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as home:
        server = PostgresServer(Path(home))
        server.start()
        try:
            uvloop.run(_measure(server.dsn(), report))
        finally:
            server.stop()
