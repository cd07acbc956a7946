"""The partitions of `samples`, one a UTC day, and of the rollups, one a month: for any day that data has, until its retention has passed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from ingest.clock import utc
from ingest.errors import Fatal
from ingest.sinks.copy import SECONDS_A_DAY

DAYS_A_LANDING_MAX = 1_000

FILLFACTOR = 90
"""Room in each page for newer versions of its rows, which then need no new entry in the index. Measured at 85: a fifth of
100,000 rows is replaced in 67 ms instead of 135, and COPY is no slower."""

DETACH_WAIT_S = 5.0

_LOCK = 0x68656164676175  # beside the migrations' one
_DROP_LOCK = 0x6865616467617A


@dataclass(frozen=True, slots=True)
class Partitioned:
    """A table that is partitioned by a time, by UTC days or by months of them. Days are days since the epoch."""

    table: str
    by_month: bool = False

    def first_day(self, day: int) -> int:
        """The first day of the partition that a day belongs to."""
        if not self.by_month:
            return day
        return _day(utc(day * SECONDS_A_DAY).replace(day=1))

    def end_day(self, day: int) -> int:
        """The first day behind that partition."""
        return self.first_day(self.first_day(day) + 31) if self.by_month else day + 1


SAMPLES = Partitioned("samples")


def _day(time: datetime) -> int:
    return int(time.timestamp()) // SECONDS_A_DAY


def name_of(day: int, of: Partitioned = SAMPLES) -> str:
    """The partition of a day, given as days since the epoch: samples_20261124, or samples_day_N past the year 9999."""
    if not 0 <= day < 2_932_897:
        return f"{of.table}_day_{day}".replace("-", "minus_")
    return f"{of.table}_{utc(day * SECONDS_A_DAY):{'%Y%m' if of.by_month else '%Y%m%d'}}"


def day_of(name: str, of: Partitioned = SAMPLES) -> int | None:
    """The inverse of `name_of`, of a month its first day; None for another table's name."""
    digits = 6 if of.by_month else 8
    if found := re.fullmatch(rf"{of.table}_(\d{{{digits}}})", name):
        return _day(datetime.strptime(f"{found[1]}01"[:8] + "Z", "%Y%m%d%z"))
    if found := re.fullmatch(rf"{of.table}_day_(minus_)?(\d+)", name):
        return int(found[2]) * (-1 if found[1] else 1)
    return None


async def create_partitions(
    connection: asyncpg.Connection, days: Iterable[int], existing: Set[int], of: Partitioned = SAMPLES
) -> set[int]:
    """Create the partitions of those days that are not in `existing`; returns the days that were missing there, of months the first ones.

    Outside any transaction of the caller's. Safe with others who create the same ones, and in nobody's way: attaching a table
    locks the parent against other attaching only, where CREATE … PARTITION OF would wait for every landing, and
    make the next ones wait. Raises Fatal for more than `DAYS_A_LANDING_MAX` days at once.
    """
    missing = sorted({of.first_day(day) for day in days} - existing)
    if len(missing) > DAYS_A_LANDING_MAX:
        raise Fatal(
            of.table, f"a landing is over {len(missing)} days", "see limits.retention_s, limits.future_s_max"
        )
    for day in missing:
        await _create(connection, day, of)
    return set(missing)


_TABLES = """SELECT c.relname AS name, i.inhdetachpending AS pending FROM pg_class c
LEFT JOIN pg_inherits i ON i.inhrelid = c.oid AND i.inhparent = $1::text::regclass
WHERE c.relkind = 'r' AND starts_with(c.relname, $1 || '_')
    AND c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = $1::text::regclass)"""
"""`pending` is NULL of one that is detached already: whoever did that was stopped before he dropped it."""


async def drop_partitions(
    connection: asyncpg.Connection, before_day: int, of: Partitioned = SAMPLES
) -> list[int]:
    """Drop the partitions that end before that day, oldest first; returns their first days. One that is in use is left for the next call.

    In nobody's way: a partition is detached concurrently, so that those who read and write the table go on, and waits
    `DETACH_WAIT_S` at most for those who were there before. One process at a time does it. Outside any transaction of the caller's.
    """
    if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _DROP_LOCK):
        return []
    dropped: list[int] = []
    try:
        await connection.execute(f"SET lock_timeout = {int(DETACH_WAIT_S * 1000)}")
        rows = await connection.fetch(_TABLES, of.table)
        found = {day: row for row in rows if (day := day_of(row["name"], of)) is not None}
        for day in sorted(day for day in found if of.end_day(day) <= before_day):
            name, pending = found[day]
            if pending is not None:
                how = "FINALIZE" if pending else "CONCURRENTLY"
                await connection.execute(f"ALTER TABLE {of.table} DETACH PARTITION {name} {how}")
            await connection.execute(f"DROP TABLE {name}")
            dropped.append(day)
    except asyncpg.LockNotAvailableError:
        pass
    finally:
        await connection.execute("RESET lock_timeout")
        await connection.execute("SELECT pg_advisory_unlock($1)", _DROP_LOCK)
    return dropped


_OTHER_OWNER = "SELECT relowner::regrole::text FROM pg_class WHERE oid = $1::text::regclass AND relowner <> current_user::regrole"


async def _create(connection: asyncpg.Connection, day: int, of: Partitioned) -> None:
    name = name_of(day, of)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", name):
            return
        start, end = await connection.fetchrow(
            "SELECT to_timestamp($1::float8)::text, to_timestamp($2::float8)::text",
            float(day * SECONDS_A_DAY), float(of.end_day(day) * SECONDS_A_DAY),
        )  # fmt: skip
        await connection.execute(
            f"CREATE TABLE {name} (LIKE {of.table} INCLUDING ALL) WITH (fillfactor = {FILLFACTOR});"
            f"ALTER TABLE {of.table} ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')"
        )
        # Where users share a table by a role that owns it, what one of them has made is the others' to drop.
        owner = await connection.fetchval(_OTHER_OWNER, of.table)
        if owner is not None:
            await connection.execute(f"ALTER TABLE {name} OWNER TO {owner}")
