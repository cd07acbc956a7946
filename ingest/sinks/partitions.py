"""The partitions of `samples`: one a UTC day, for any day that data has."""

from __future__ import annotations

from collections.abc import Iterable, Set
from datetime import UTC, datetime

import asyncpg

from ingest.errors import Fatal
from ingest.sinks.copy import SECONDS_A_DAY

DAYS_A_LANDING_MAX = 1_000

FILLFACTOR = 90
"""Room in each page for newer versions of its rows, which then need no new entry in the index. Measured at 85: a fifth of
100,000 rows is replaced in 67 ms instead of 135, and COPY is no slower."""

_LOCK = 0x68656164676175  # beside the migrations' one


def name_of(day: int) -> str:
    """The partition of a day, given as days since the epoch: samples_20261124, or samples_day_N past the year 9999."""
    if not 0 <= day < 2_932_897:
        return f"samples_day_{day}".replace("-", "minus_")
    return f"samples_{datetime.fromtimestamp(day * SECONDS_A_DAY, UTC):%Y%m%d}"


async def create_partitions(
    connection: asyncpg.Connection, days: Iterable[int], existing: Set[int]
) -> set[int]:
    """Create the partitions of those days that are not in `existing`; returns the days that were missing there.

    Outside any transaction of the caller's. Safe with others who create the same ones, and in nobody's way: attaching a table
    locks `samples` against other attaching only, where CREATE … PARTITION OF would wait for every landing, and
    make the next ones wait. Raises Fatal for more than `DAYS_A_LANDING_MAX` days at once.
    """
    missing = sorted(set(days) - existing)
    if len(missing) > DAYS_A_LANDING_MAX:
        raise Fatal(
            "samples", f"a landing is over {len(missing)} days", "see limits.retention_s, limits.future_s_max"
        )
    for day in missing:
        await _create(connection, day)
    return set(missing)


async def _create(connection: asyncpg.Connection, day: int) -> None:
    name = name_of(day)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", name):
            return
        start, end = await connection.fetchrow(
            "SELECT to_timestamp($1::float8)::text, to_timestamp($2::float8)::text",
            float(day * SECONDS_A_DAY), float((day + 1) * SECONDS_A_DAY),
        )  # fmt: skip
        await connection.execute(
            f"CREATE TABLE {name} (LIKE samples INCLUDING ALL) WITH (fillfactor = {FILLFACTOR});"
            f"ALTER TABLE samples ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')"
        )
