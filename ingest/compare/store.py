"""What a comparison reads of the store and the ledger: little at a time, by keys, read only.

One connection, transactions that can only read, and a limit on each statement's time; what is asked for is named by series and timestamp, which is
the key of `samples`, so that no question reads more than it returns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg
import orjson

from ingest.clock import utc
from ingest.compare.lines import Point
from ingest.gaps import REASON_SQL
from ingest.model import SeriesKey, split_version
from ingest.overview import OPEN_SQL
from ingest.sinks.connection import open_connection, translated
from shard_config.model import Postgres

STATEMENT_TIMEOUT_S = 60
SERIES_A_FETCH = 5_000
PROBES_A_STATEMENT = 20_000
WINDOWS_MAX = 50_000

_SERIES = """SELECT id, namespace, metric, dimensions::text, stat, period_s FROM series
WHERE account = $1 AND region = $2 AND namespace = ANY($3)"""

_POINTS = """SELECT s.series, extract(epoch FROM s.ts)::bigint, s.value, s.version
FROM unnest($1::uuid[], $2::timestamptz[]) AS asked (series, ts) JOIN samples AS s ON s.ts = asked.ts AND s.series = asked.series
WHERE s.ts >= $3 AND s.ts <= $4"""

_OPEN = f"""SELECT target, service, extract(epoch FROM min(window_start))::bigint, extract(epoch FROM max(window_end))::bigint, {REASON_SQL} AS reason
FROM windows AS w WHERE {OPEN_SQL} AND window_end > $1 AND window_start < $2 GROUP BY target, service, reason LIMIT {WINDOWS_MAX}"""  # noqa: S608  # only constants

_LOOKED = """SELECT DISTINCT target, service FROM looks WHERE status = 'complete' AND finished_at > $1"""


@dataclass(frozen=True, slots=True)
class OurSeries:
    """A series as the store names it; `id` has 16 bytes, `dimensions` is a JSON object."""

    id: bytes
    namespace: str
    metric: str
    dimensions: str
    stat: str
    period_s: int

    @property
    def said(self) -> str:
        """All of its key but account, region and period, as JSON: the state's word for a series."""
        dimensions = sorted(orjson.loads(self.dimensions).items())
        return orjson.dumps([self.namespace, self.metric, dimensions, self.stat]).decode()


def key_said(account: str, region: str, said: str, period_s: int) -> SeriesKey:
    """The inverse of `OurSeries.said`."""
    namespace, metric, dimensions, stat = orjson.loads(said)
    pairs = tuple((name, value) for name, value in dimensions)
    return SeriesKey(account, region, namespace, metric, pairs, stat, period_s)


def describe(key: SeriesKey) -> str:
    """A series for people."""
    inside = ", ".join(f"{name}={value}" for name, value in key.dimensions)
    return f"{key.account} {key.region} {key.namespace} {key.metric}{{{inside}}} {key.stat} {key.period_s}s"


@dataclass(frozen=True, slots=True)
class OpenStretch:
    """Windows of a target's service that are open: from the first to the last, and the ledger's reason (`ingest.gaps.REASON_SQL`)."""

    start_s: int
    end_s: int
    reason: str


@asynccontextmanager
async def connected(postgres: Postgres) -> AsyncIterator[asyncpg.Connection]:
    """A connection that cannot write and waits for no statement longer than `STATEMENT_TIMEOUT_S`. Raises Transient, Fatal."""
    connection = await open_connection(postgres, "headgate compare")
    try:
        with translated("store"):
            await connection.execute("SET default_transaction_read_only = on")
            await connection.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_S * 1000}")
        yield connection
    finally:
        connection.terminate()


async def series_of(
    connection: asyncpg.Connection, account: str, region: str, namespaces: Sequence[str]
) -> AsyncGenerator[list[OurSeries]]:
    """The series of an account and region that are of these namespaces, in lists of bounded length. Raises Transient."""
    with translated("store"):
        async with connection.transaction(readonly=True):
            cursor = await connection.cursor(_SERIES, account, region, list(namespaces))
            while rows := await cursor.fetch(SERIES_A_FETCH):
                yield [OurSeries(*row) for row in rows]


async def points(
    connection: asyncpg.Connection, asked: Sequence[tuple[bytes, int]]
) -> dict[bytes, list[Point]]:
    """Of (series, timestamp in seconds) those points that there are, by series, oldest first. Raises Transient."""
    found: dict[bytes, list[Point]] = defaultdict(list)
    ordered = sorted(asked, key=lambda pair: (pair[1], pair[0]))  # as the table's key
    for at in range(0, len(ordered), PROBES_A_STATEMENT):
        some = ordered[at : at + PROBES_A_STATEMENT]
        times = [utc(t) for _, t in some]
        with translated("store"):
            rows = await connection.fetch(_POINTS, [i for i, _ in some], times, times[0], times[-1])
        for series, ts, value, version in sorted(rows, key=lambda row: row[1]):
            found[series].append(Point(ts, value, split_version(version)[1] / 1000))
    return found


async def open_stretches(
    connection: asyncpg.Connection, from_s: float, to_s: float
) -> Mapping[tuple[str, str], list[OpenStretch]]:
    """By target and service, what is open of a time, a stretch a reason. Raises Transient."""
    found: dict[tuple[str, str], list[OpenStretch]] = defaultdict(list)
    with translated("ledger"):
        rows = await connection.fetch(_OPEN, utc(from_s), utc(to_s))
    for target, service, start_s, end_s, reason in rows:
        found[target, service].append(OpenStretch(start_s, end_s, reason))
    return found


async def looked_at(connection: asyncpg.Connection, since: datetime) -> set[tuple[str, str]]:
    """Targets and services of which a look was complete since then. Raises Transient."""
    with translated("ledger"):
        rows = await connection.fetch(_LOOKED, since.astimezone(UTC))
    return {(row[0], row[1]) for row in rows}
