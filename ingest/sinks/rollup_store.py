"""Rollups in PostgreSQL: landing marks what it changes, `roll` computes what is marked, a piece at a time.

* *Only what changed is recomputed*: landing appends, in its own transaction, a mark for each hour that it wrote to, a bit for each
  bucket of series. A piece that comes out as it was is not written, and its day is not marked.
* *Nothing is lost.* Marks are read before the samples, and go in the transaction that writes the rows. What lands meanwhile has marks of
  its own. A process that dies leaves its marks; several processes work on different hours and days.
* *The rows are those of a recomputation*, whatever the order of landing, late points and corrections included.
* *Rollups outlive their samples*: a row is never replaced by one of fewer samples, which means that some were dropped meanwhile.
* *Memory is bounded*: about `POINTS_MAX` samples are read at once, by ranges of series ids, which the key of `samples` serves.

A bucket is the first byte of a series' id, so buckets are of one size, and a bucket's rows of an hour or day are one row of the table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray

from ingest.clock import Clock, utc
from ingest.model import SeriesIds, bytes_of
from ingest.rollups import COLUMNS, Rollups, concatenated, empty, fullest, roll_up
from ingest.sinks.copy import Rows
from ingest.sinks.partitions import Partitioned, create_partitions
from ingest.sinks.rollup_read import BUCKETS, DAY_S, HOUR_S, hours_of_day, rows_of_buckets
from ingest.sinks.rows_back import RowsBack

HOURS = Partitioned("rollup_hours", by_month=True)
DAYS = Partitioned("rollup_days", by_month=True)

POINTS_MAX = 250_000
"""Samples read at once: about 40 MB while they are sorted. A consumer has 384 MiB in the chart."""

GAP_POINTS_MAX = 10_000
"""Samples of clean buckets that are read along where that saves a query."""

AFTER_S = {HOUR_S: 600, DAY_S: 3_600}
"""An hour and a day are rolled up so long after their end at the earliest: most late points have come by then."""

REST_S = {HOUR_S: 600, DAY_S: 6 * 3_600}
"""And again when their oldest change is that old, so that a trickle of late points is worth one pass."""

SERIES_ASKED_S = 600.0

_SLOTS = 1 << 16
"""Ranges of ids are cut at the first two bytes."""

_LONG_S = 1e9

_CANDIDATES_MAX = 64
_LOCK_CLASS = 0x68676174

_LAST_TIME_S = 253_402_300_800
"""The year 10000: what is later has no mark, for validation lets nothing such through."""

_ROW = np.dtype(
    [
        ("fields", ">i2"),
        ("series_bytes", ">i4"),
        ("series", ">u8", (2,)),
        ("value_bytes", ">i4"),
        ("value", ">f8"),
    ]
)

_MARK = """INSERT INTO rollup_marks (span_s, start, buckets, marked_at)
SELECT $1, m.start, m.buckets, $2 FROM unnest($3::timestamptz[], $4::bit(256)[]) AS m (start, buckets)"""

_FOLD = """WITH many AS (
    SELECT span_s, start FROM rollup_marks GROUP BY span_s, start HAVING count(*) > 1 LIMIT 1000
), gone AS (
    DELETE FROM rollup_marks AS m USING many WHERE (m.span_s, m.start) = (many.span_s, many.start) RETURNING m.*
)
INSERT INTO rollup_marks (span_s, start, buckets, marked_at)
SELECT span_s, start, bit_or(buckets), min(marked_at) FROM gone GROUP BY span_s, start"""

_DUE = """SELECT span_s, start, extract(epoch FROM start)::bigint AS start_s,
    greatest(min(marked_at) + make_interval(secs => CASE span_s WHEN 3600 THEN $2::float8 ELSE $3::float8 END),
             start + make_interval(secs => span_s + CASE span_s WHEN 3600 THEN $4::float8 ELSE $5::float8 END)) AS due_at,
    bit_or(buckets) AS buckets
FROM rollup_marks WHERE start < $1::timestamptz GROUP BY span_s, start"""

_CANDIDATES = f"""SELECT span_s, start_s FROM ({_DUE}) AS due WHERE due_at <= $1
ORDER BY start DESC, span_s LIMIT {_CANDIDATES_MAX}"""  # noqa: S608  # only constants

_BEHIND = f"""SELECT count(*) AS pieces, coalesce(sum(bit_count(buckets)), 0)::bigint AS buckets,
    coalesce(extract(epoch FROM $1 - min(due_at)), 0)::float8 AS behind_s FROM ({_DUE}) AS due WHERE due_at <= $1"""  # noqa: S608

_TAKEN = """SELECT array_agg(id) AS ids, bit_or(buckets) AS buckets, min(marked_at) AS marked_at
FROM rollup_marks WHERE span_s = $1 AND start = $2"""

# One probe of the key a distinct time: PostgreSQL has no skip scan.
_TIMES = """WITH RECURSIVE t (ts) AS (
    (SELECT ts FROM samples WHERE ts >= $1 AND ts < $2 ORDER BY ts LIMIT 1)
    UNION ALL
    SELECT (SELECT s.ts FROM samples AS s WHERE s.ts > t.ts AND s.ts >= $1 AND s.ts < $2 ORDER BY s.ts LIMIT 1) FROM t
    WHERE t.ts IS NOT NULL
) SELECT ts FROM t WHERE ts IS NOT NULL"""

_SAMPLES = "SELECT series, value FROM samples WHERE ts = ANY($1::timestamptz[]) AND series BETWEEN $2 AND $3"
_ALL_SAMPLES = "SELECT series, value FROM samples WHERE ts >= $1 AND ts < $2"

_UPSERT = """INSERT INTO {table} (bucket, start, computed_at, series, count, sum, min, max, p50, p95, p99{more})
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11{value})
ON CONFLICT (bucket, start) DO UPDATE SET (computed_at, series, count, sum, min, max, p50, p95, p99{more}) =
    (excluded.computed_at, excluded.series, excluded.count, excluded.sum, excluded.min, excluded.max,
     excluded.p50, excluded.p95, excluded.p99{excluded})"""
UPSERTS = {
    HOUR_S: _UPSERT.format(table="rollup_hours", more="", value="", excluded=""),
    DAY_S: _UPSERT.format(
        table="rollup_days", more=", sketches", value=", $12", excluded=", excluded.sketches"
    ),
}


@dataclass(frozen=True, slots=True)
class Kept:
    """Hours and days that begin before these times, seconds since the epoch, are past their retention: they are not computed."""

    hours_from_s: int = 0
    days_from_s: int = 0


@dataclass(frozen=True, slots=True)
class Rolled:
    """What one step did: of the hour or day at `start_s`, so many samples read, rows in the buckets that were written."""

    span_s: int
    start_s: int
    points: int
    rows: int
    buckets: int


@dataclass(frozen=True, slots=True)
class Behind:
    """What is due and not done: hours and days, buckets of them, and since when the oldest is due."""

    pieces: int
    buckets: int
    behind_s: float


async def mark(connection: asyncpg.Connection, rows: Rows, now: datetime) -> None:
    """Mark the hours and buckets of the rows. In the transaction that writes them."""
    starts_s, masks = _hours_of(rows)
    if starts_s:
        await _mark(connection, HOUR_S, starts_s, masks, now)


def _hours_of(rows: Rows) -> tuple[list[int], list[NDArray[np.bool_]]]:
    """The hours that rows are in, ascending, and the buckets in each."""
    if not len(rows):
        return [], []
    hours = rows.timestamps_s // HOUR_S
    cuts = [0, *(np.flatnonzero(hours[1:] != hours[:-1]) + 1).tolist(), len(hours)]
    of_series = (rows.ids[:, 0] >> np.uint64(56)).astype(np.uint8)
    starts_s, masks = [], []
    for begin, end in pairwise(cuts):
        start_s = int(hours[begin]) * HOUR_S
        if 0 <= start_s < _LAST_TIME_S:
            buckets = np.zeros(BUCKETS, np.bool_)
            buckets[of_series[rows.series[begin:end]]] = True
            starts_s.append(start_s)
            masks.append(buckets)
    return starts_s, masks


async def _mark(
    connection: asyncpg.Connection,
    span_s: int,
    starts_s: Sequence[int],
    masks: Sequence[NDArray[np.bool_]],
    marked_at: datetime,
) -> None:
    bits = [asyncpg.BitString.frombytes(np.packbits(m).tobytes(), bitlength=BUCKETS) for m in masks]
    await connection.execute(_MARK, span_s, marked_at, [utc(s) for s in starts_s], bits)


async def fold(connection: asyncpg.Connection) -> None:
    """Make one mark of the many of an hour or day."""
    await connection.execute(_FOLD)


async def behind(connection: asyncpg.Connection, now: datetime) -> Behind:
    """What is due by now."""
    return Behind(**await connection.fetchrow(_BEHIND, *_due_arguments(now, patient=True)))


def _due_arguments(now: datetime, *, patient: bool) -> list[Any]:
    if not patient:
        return [now, -_LONG_S, -_LONG_S, 0.0, 0.0]
    waits = (REST_S[HOUR_S], REST_S[DAY_S], AFTER_S[HOUR_S], AFTER_S[DAY_S])
    return [now, *map(float, waits)]


class Roller:
    """Computes what is marked, newest first. One at a time a connection; any number of processes."""

    def __init__(self, clock: Clock, points_max: int = POINTS_MAX) -> None:
        self._clock = clock
        self._points_max = points_max
        self._series = 0
        self._series_until_s = 0.0
        self._parts: dict[int, set[int]] = {HOUR_S: set(), DAY_S: set()}

    async def roll(
        self, connection: asyncpg.Connection, now: datetime, kept: Kept, *, patient: bool = True
    ) -> Rolled | None:
        """One step, in one transaction; None where nothing is due that nobody else works on.

        Not `patient`: whatever has a mark and has ended, now. Outside any transaction of the caller's.
        """
        for row in await connection.fetch(_CANDIDATES, *_due_arguments(now, patient=patient)):
            span_s, start_s = row["span_s"], row["start_s"]
            if start_s >= (kept.hours_from_s if span_s == HOUR_S else kept.days_from_s):
                of = HOURS if span_s == HOUR_S else DAYS
                self._parts[span_s] |= await create_partitions(
                    connection, [start_s // DAY_S], self._parts[span_s], of
                )
            async with connection.transaction():
                if done := await self._step(connection, span_s, start_s, now, kept):
                    return done
        return None

    async def _step(
        self, connection: asyncpg.Connection, span_s: int, start_s: int, now: datetime, kept: Kept
    ) -> Rolled | None:
        key = start_s // HOUR_S * 2 + (span_s == DAY_S)
        if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1, $2)", _LOCK_CLASS, key):
            return None
        start = utc(start_s)
        taken = await connection.fetchrow(_TAKEN, span_s, start)
        if taken["ids"] is None:
            return None
        dirty = np.unpackbits(np.frombuffer(taken["buckets"].bytes, np.uint8)).astype(np.bool_)
        if start_s < (kept.hours_from_s if span_s == HOUR_S else kept.days_from_s):
            done, found, changed = dirty, empty(bins=False), dirty
        else:
            done, found = await self._read(connection, span_s, start_s, dirty)
            changed = await write(connection, span_s, start_s, done, found, now)
        await connection.execute(
            "DELETE FROM rollup_marks WHERE span_s = $1 AND start = $2 AND id = ANY($3)",
            span_s, start, taken["ids"],
        )  # fmt: skip
        if (left := dirty & ~done).any():
            await _mark(connection, span_s, [start_s], [left], taken["marked_at"])
        if span_s == HOUR_S and changed.any():
            await _mark(connection, DAY_S, [start_s // DAY_S * DAY_S], [changed], now)
        return Rolled(span_s, start_s, int(found.counts.sum()), len(found), int(changed.sum()))

    async def _read(
        self, connection: asyncpg.Connection, span_s: int, start_s: int, dirty: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_], Rollups]:
        """Which of the dirty buckets were read now, and the rows of their samples."""
        times = [r["ts"] for r in await connection.fetch(_TIMES, utc(start_s), utc(start_s + span_s))]
        points = max(1, await self._series_of_a_bucket(connection) * len(times))
        done = np.zeros(BUCKETS, np.bool_)
        parts = []
        for first, end in _runs(dirty, max(1, self._points_max // points), GAP_POINTS_MAX // points):
            done[first:end] = dirty[first:end]
            for low, high in _ranges(first, end, -(-points * (end - first) // self._points_max)):
                ids, values = await _samples(connection, times, low, high)
                # Elsewhere, so that a consumer goes on landing meanwhile.
                parts.append(await asyncio.to_thread(roll_up, ids, values, bins=span_s == DAY_S))
        return done, concatenated(parts)

    async def _series_of_a_bucket(self, connection: asyncpg.Connection) -> int:
        """About how many there are, dead ones included; asked each SERIES_ASKED_S."""
        if self._clock.monotonic_s() >= self._series_until_s:
            self._series = await connection.fetchval("SELECT count(*) FROM series")
            self._series_until_s = self._clock.monotonic_s() + SERIES_ASKED_S
        return -(-self._series // BUCKETS)


def _runs(dirty: NDArray[np.bool_], buckets_max: int, gap_max: int) -> Iterator[tuple[int, int]]:
    """The first dirty buckets, so many at most, as ranges [first, end) with no more than `gap_max` clean ones between two dirty ones."""
    numbers = np.flatnonzero(dirty)[:buckets_max]
    cuts = np.flatnonzero(np.diff(numbers) > gap_max + 1) + 1
    for run in np.split(numbers, cuts):
        yield int(run[0]), int(run[-1]) + 1


def _ranges(first: int, end: int, parts: int) -> Iterator[tuple[int, int]]:
    """The slots of the buckets [first, end), in about so many ranges [low, high)."""
    slots = _SLOTS // BUCKETS
    step = max(1, -(-(end - first) * slots // max(1, parts)))
    for low in range(first * slots, end * slots, step):
        yield low, min(low + step, end * slots)


async def _samples(
    connection: asyncpg.Connection, times: Sequence[datetime], low: int, high: int
) -> tuple[SeriesIds, NDArray[np.float64]]:
    """The samples at these times of the series whose ids begin with [low, high): ids, shape (n, 2), and values."""
    arguments: list[Any]
    chunks: list[NDArray[Any]] = []
    rows = RowsBack(chunks.append, _ROW)
    query, arguments = _SAMPLES, [times, low.to_bytes(2) + bytes(14), (high - 1).to_bytes(2) + b"\xff" * 14]
    if times and (low, high) == (0, _SLOTS):
        query, arguments = _ALL_SAMPLES, [times[0], times[-1] + timedelta(microseconds=1)]
    await connection.copy_from_query(query, *arguments, output=rows.feed, format="binary")
    rows.finish()
    if not chunks:
        return np.empty((0, 2), np.uint64), np.empty(0)
    ids = np.concatenate([c["series"] for c in chunks]).astype(np.uint64)
    return ids, np.concatenate([c["value"] for c in chunks]).astype(np.float64)


async def write(
    connection: asyncpg.Connection,
    span_s: int,
    start_s: int,
    done: NDArray[np.bool_],
    found: Rollups,
    now: datetime,
) -> NDArray[np.bool_]:
    """Store what was found of the buckets that are done; returns those whose rows are others now."""
    numbers = np.flatnonzero(done).tolist()
    stored = await rows_of_buckets(connection, span_s, start_s, numbers)
    hours = await hours_of_day(connection, start_s, numbers) if span_s == DAY_S else {}
    changed = np.zeros(BUCKETS, np.bool_)
    updates = []
    cuts = np.searchsorted(found.ids[:, 0] >> np.uint64(56), np.arange(BUCKETS + 1))
    for bucket in numbers:
        fresh = found.take(np.arange(cuts[bucket], cuts[bucket + 1]))
        before = stored.get(bucket)
        candidates = [fresh, *([before] if before else []), *([hours[bucket]] if bucket in hours else [])]
        rows = fullest(candidates) if len(candidates) > 1 else fresh
        if not len(rows) or (before is not None and rows.same_as(before)):
            continue
        changed[bucket] = True
        updates.append((bucket, utc(start_s), now, *values_of_row(rows)))
    await connection.executemany(UPSERTS[span_s], updates)
    return changed


def values_of_row(rows: Rollups) -> list[Any]:
    columns = [getattr(rows, name).tolist() for name in COLUMNS[1:]]
    return [bytes_of(rows.ids), *columns] + ([rows.bins.pack()] if rows.bins is not None else [])
