"""Rollups read back: rows of hours or days as numpy columns, in the order of series, bucket by bucket and so in bounded memory.

Columns travel as PostgreSQL's binary arrays, which is what takes the time (30 ns a number), and are taken out of the stream by numpy.
The ids of a bucket's series are sent again only where they are others than an hour or day before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray

from ingest.clock import rfc3339, utc
from ingest.errors import Fatal, Transient
from ingest.model import SeriesIds, halves_of
from ingest.rollups import COLUMNS, Bins, Rollups, Sketches, of_hours
from ingest.sinks.copy import POSTGRES_EPOCH_S, unique_ids

BUCKETS = 256

HOUR_S, DAY_S = 3_600, 86_400

_TABLES = {HOUR_S: "rollup_hours", DAY_S: "rollup_days"}

_SERIES_SENT = (
    "CASE WHEN bucket = lag(bucket) OVER w AND series = lag(series) OVER w THEN NULL ELSE series END"
)

_HEADER_BYTES = 19
_ARRAY_HEAD_BYTES = 20
"""Dimensions, whether there are NULLs, the type; length and lower bound of the only dimension."""

_SERIES = np.dtype([("bytes", ">i4"), ("v", ">u8", (2,))])
_COUNT = np.dtype([("bytes", ">i4"), ("v", ">i4")])
_FLOAT = np.dtype([("bytes", ">i4"), ("v", ">f8")])
ALL = ("count", "sum", "min", "max", "p50", "p95", "p99")
_ARRAYS = dict.fromkeys(ALL, _FLOAT) | {"count": _COUNT}
COLUMN_OF = dict(zip(ALL, COLUMNS[1:], strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One row of the table: a bucket's series in one hour or day. `columns` by name, each of shape (n,).

    `ids` are the same object as those of the row before it where they are the same.
    """

    bucket: int
    start_s: int
    ids: SeriesIds
    columns: Mapping[str, NDArray[Any]]
    sketches: bytes | None = None

    def rollups(self) -> Rollups:
        """With all columns. Raises Fatal where its sketches are broken."""
        columns = {COLUMN_OF[name]: self.columns[name] for name in ALL}
        return Rollups(self.ids, **columns, bins=None if self.sketches is None else self.bins())

    def bins(self) -> Bins:
        """Its sketches, which were read. Raises Fatal where they are broken."""
        try:
            return Bins.unpack(self.sketches or b"")
        except ValueError as error:
            raise Fatal(
                f"rollup_days, bucket {self.bucket} of {rfc3339(self.start_s)}",
                str(error),
                "delete the row and mark its day in rollup_marks: it is computed again from what is there",
            ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Rows of some series, sorted by (series, time): row i is of the series `ids[index[i]]`, begins at `starts_s[i]`, and has in
    `columns` what was asked for. `ids`, shape (m, 2), is sorted and has each series once."""

    ids: SeriesIds
    index: NDArray[np.int64]
    starts_s: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]]


async def rows_of_buckets(
    connection: asyncpg.Connection, span_s: int, start_s: int, buckets: Sequence[int]
) -> dict[int, Rollups]:
    """What is stored of one hour or day, by bucket."""
    found = await _stored(connection, span_s, start_s, start_s + 1, buckets, ALL, sketches=span_s == DAY_S)
    return {one.bucket: one.rollups() for one in found}


async def hours_of_day(
    connection: asyncpg.Connection, start_s: int, buckets: Sequence[int]
) -> dict[int, Rollups]:
    """The day that the stored hours make (`ingest.rollups.of_hours`), by bucket."""
    hours: dict[int, list[Rollups]] = {}
    for one in await _stored(connection, HOUR_S, start_s, start_s + DAY_S, buckets, ALL):
        hours.setdefault(one.bucket, []).append(one.rollups())
    return {bucket: of_hours(parts) for bucket, parts in hours.items()}


async def series_where(
    connection: asyncpg.Connection,
    *,
    accounts: Collection[str] | None = None,
    namespaces: Collection[str] | None = None,
    metrics: Collection[str] | None = None,
    stats: Collection[str] | None = None,
) -> SeriesIds:
    """The ids of the series with these labels, sorted, shape (n, 2). None: any."""
    rows = await connection.fetch(
        "SELECT id FROM series WHERE ($1::text[] IS NULL OR account = ANY($1)) AND ($2::text[] IS NULL OR namespace = ANY($2))"
        " AND ($3::text[] IS NULL OR metric = ANY($3)) AND ($4::text[] IS NULL OR stat = ANY($4)) ORDER BY id",
        *(None if one is None else list(one) for one in (accounts, namespaces, metrics, stats)),
    )
    return halves_of(r["id"] for r in rows)


async def read(
    connection: asyncpg.Connection,
    span_s: int,
    from_s: int,
    to_s: int,
    columns: Sequence[str] = ALL,
    series: SeriesIds | None = None,
) -> AsyncIterator[Slice]:
    """Rows of the hours or days that begin in [from_s, to_s), a bucket a slice, ascending; only `series` (sorted) where they are given.

    `columns` are some of `ALL`: fewer take less time. A slice is the 256th part of all series, however few are asked for; buckets
    without any of `series` are not read.
    """
    for bucket in _buckets_of(series):
        stored = await _stored(connection, span_s, from_s, to_s, [bucket], columns)
        wanted = None if series is None else _of_bucket(series, bucket)
        if found := _slice(stored, columns, wanted):
            yield found


async def read_sketches(
    connection: asyncpg.Connection, from_s: int, to_s: int, series: SeriesIds | None = None
) -> AsyncIterator[list[tuple[int, Sketches]]]:
    """The sketches of the days that begin in [from_s, to_s), each with its beginning, a bucket at a time: what `ingest.rollups.percentiles_of`
    merges. Raises Fatal where one is broken."""
    for bucket in _buckets_of(series):
        stored = await _stored(connection, DAY_S, from_s, to_s, [bucket], (), sketches=True)
        days = [(one.start_s, Sketches(one.ids, one.bins())) for one in stored]
        if series is not None:
            wanted = _of_bucket(series, bucket)
            days = [(start_s, _of_series(day, wanted)) for start_s, day in days]
        if days:
            yield days


def _of_series(day: Sketches, wanted: SeriesIds) -> Sketches:
    rows = np.flatnonzero(_is_in(day.ids, wanted))
    return day if len(rows) == len(day.ids) else Sketches(day.ids[rows], day.bins.take(rows))


def _buckets_of(series: SeriesIds | None) -> list[int]:
    if series is None:
        return list(range(BUCKETS))
    return [int(bucket) for bucket in np.unique(series[:, 0] >> np.uint64(56))]


def _of_bucket(series: SeriesIds, bucket: int) -> SeriesIds:
    first, end = np.searchsorted(series[:, 0] >> np.uint64(56), [bucket, bucket + 1])
    return series[first:end]


def _is_in(ids: SeriesIds, wanted: SeriesIds) -> NDArray[np.bool_]:
    """Which of the ids are among the wanted ones."""
    unique, index = unique_ids(np.concatenate([wanted, ids]))
    among = np.zeros(len(unique), np.bool_)
    among[index[: len(wanted)]] = True
    return among[index[len(wanted) :]]


def _slice(stored: Sequence[Stored], columns: Sequence[str], wanted: SeriesIds | None) -> Slice | None:
    if not stored:
        return None
    sets = {id(one.ids): one.ids for one in stored}
    ids, index_of_sets = unique_ids(np.concatenate(list(sets.values())))
    cuts = np.cumsum([len(one) for one in sets.values()])[:-1]
    of_set = dict(zip(sets, np.split(index_of_sets, cuts), strict=True))
    index = np.concatenate([of_set[id(one.ids)] for one in stored])
    starts_s = np.repeat([one.start_s for one in stored], [len(one.ids) for one in stored])
    order = np.argsort(index.astype(np.min_scalar_type(len(ids))), kind="stable")
    if wanted is not None:
        keep = _is_in(ids, wanted)
        order = order[keep[index[order]]]
        ids, index = ids[keep], (np.cumsum(keep) - 1)[index]
    if not len(order):
        return None
    taken = {name: np.concatenate([one.columns[name] for one in stored])[order] for name in columns}
    return Slice(ids, index[order], starts_s[order], taken)


async def _stored(
    connection: asyncpg.Connection,
    span_s: int,
    from_s: int,
    to_s: int,
    buckets: Sequence[int],
    columns: Sequence[str],
    *,
    sketches: bool = False,
) -> list[Stored]:
    """Rows of the table, by bucket and time."""
    raw: list[bytes] = []
    more = ["sketches"] if sketches else []

    async def take(data: bytes) -> None:
        raw.append(data)

    await connection.copy_from_query(
        f"SELECT bucket, start, {_SERIES_SENT}, {', '.join([*columns, *more])} FROM {_TABLES[span_s]}"  # noqa: S608  # constants
        " WHERE bucket = ANY($1::smallint[]) AND start >= $2 AND start < $3"
        " WINDOW w AS (ORDER BY bucket, start) ORDER BY bucket, start",
        list(buckets), utc(from_s), utc(to_s), output=take, format="binary",
    )  # fmt: skip
    return list(_parsed(b"".join(raw), columns, sketches))


def _parsed(raw: bytes, columns: Sequence[str], sketches: bool) -> Iterator[Stored]:
    at = _HEADER_BYTES
    ids = np.empty((0, 2), np.uint64)
    while (fields := int.from_bytes(raw[at : at + 2], signed=True)) > 0:
        at += 2
        cells = []
        for _ in range(fields):
            size = int.from_bytes(raw[at : at + 4], signed=True)
            cells.append((at + 4, size))
            at += 4 + max(0, size)
        bucket = int.from_bytes(raw[cells[0][0] : cells[0][0] + 2])
        start_us = int.from_bytes(raw[cells[1][0] : cells[1][0] + 8], signed=True)
        if cells[2][1] >= 0:
            ids = _array(raw, _SERIES, *cells[2])
        arrays = {name: _array(raw, _ARRAYS[name], *cells[3 + i]) for i, name in enumerate(columns)}
        offset, size = cells[-1]
        packed = raw[offset : offset + size] if sketches else None
        yield Stored(bucket, start_us // 1_000_000 + POSTGRES_EPOCH_S, ids, arrays, packed)
    if fields != -1:
        raise Transient("store", "the stream of rollups was cut short")


def _array(raw: bytes, row: np.dtype[Any], offset: int, size: int) -> NDArray[Any]:
    """A one-dimensional array without NULLs, in this machine's byte order, counts as 64 bits."""
    cell = np.frombuffer(raw, row, (size - _ARRAY_HEAD_BYTES) // row.itemsize, offset + _ARRAY_HEAD_BYTES)[
        "v"
    ]
    return cell.astype(np.int64 if row is _COUNT else cell.dtype.newbyteorder("="))
