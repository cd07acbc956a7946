"""A store with rollups for tests of the report: points are landed and rolled up as they are in production."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray

from ingest.clock import ManualClock, utc
from ingest.model import Batch, BatchId, Series, SeriesKey, Target, series_ids
from ingest.ports import Landable
from ingest.report.assemble import Wanted, assemble
from ingest.report.model import Report
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import migrate
from ingest.sinks.postgres import PostgresSink
from ingest.sinks.rollup_store import Kept, Roller
from shard_config.load import shipped_services
from shard_config.model import Account, Budget, Config, Postgres
from workers.traces import ACCOUNT, REGION

DAY_S = 86_400
WEEK_S = 7 * DAY_S
MONDAY_S = 1_795_392_000  # 2026-11-23, 00:00 UTC
TARGET = Target("cloudwatch", "111122223333", "eu-west-1")
_batches = count()


@dataclass
class Store:
    """A store with the schema, and a configuration that knows it."""

    config: Config
    connection: asyncpg.Connection
    sink: PostgresSink

    async def land(
        self, points: Mapping[Series, tuple[NDArray[np.int64], NDArray[np.float64]]], target: Target
    ) -> None:
        """Points of each series, a batch a series and 10,000 points; then everything is rolled up."""
        for series, (times_s, values) in points.items():
            for at in range(0, len(times_s), 10_000):
                part = slice(at, at + 10_000)
                batch = Batch(
                    "task", target, "ec2", (int(times_s.max()) + 600) * 1000, 0, 300, (series,),
                    np.array([len(times_s[part])], np.int32), times_s[part], values[part], series_ids((series,)),
                )  # fmt: skip
                await self.sink.land([], [Landable(BatchId(next(_batches).to_bytes(16)), batch, 0)])
        roller = Roller(ManualClock(0))
        end = utc(max(int(times_s.max()) for times_s, _ in points.values()) + 2 * DAY_S)
        while await roller.roll(self.connection, end, Kept(), patient=False):
            pass

    async def windows(
        self, from_s: int, number: int, *, target: Target = TARGET, service: str = "ec2", **more: Any
    ) -> None:
        """So many windows of five minutes; complete, where `more` says nothing else."""
        given = {"landed_as_of": utc(from_s), "last_status": "complete", "declared": None} | more
        await self.connection.executemany(
            "INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at, landed_as_of, last_status, declared)"
            " VALUES ($1, $2, $3, $4, $4, $3, $5, $6, $7)",
            [
                (str(target), service, utc(start_s), utc(start_s + 300), *given.values())
                for start_s in range(from_s, from_s + 300 * number, 300)
            ],
        )

    async def report(self, from_s: int, to_s: int, accounts: Sequence[str] | None = None) -> Report:
        wanted = Wanted(from_s, to_s, None if accounts is None else tuple(accounts))
        return await assemble(self.config, wanted, to_s + DAY_S, lambda what, done, of: None)


@asynccontextmanager
async def opened(database: str) -> AsyncIterator[Store]:
    """The store of an empty database."""
    await migrate(database)
    config = Config(
        accounts=(
            Account(id=ACCOUNT, regions=(REGION,), services=("ec2",)),
            Account(id=TARGET.account, alias="shop", regions=(TARGET.region,), services=("ec2",), budget_usd_per_day=2),
        ),
        services=tuple(shipped_services().values()),
        postgres=Postgres(dsn=database),
        budget=Budget(usd_per_day=5),
    )  # fmt: skip
    sink = await PostgresSink.connect(config.postgres, clock=ManualClock(MONDAY_S))
    connection = await open_connection(config.postgres, "test")
    yield Store(config, connection, sink)
    await connection.close()
    await sink.close()


def machine(name: str, metric: str = "CPUUtilization", stat: str = "Average") -> Series:
    return Series(
        SeriesKey(TARGET.account, TARGET.region, "AWS/EC2", metric, (("InstanceId", name),), stat, 60)
    )


def minutes(days: int, value: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A point each five minutes of the days before MONDAY_S."""
    times = np.arange(MONDAY_S - days * DAY_S, MONDAY_S, 300, dtype=np.int64)
    return times, np.full(len(times), value)
