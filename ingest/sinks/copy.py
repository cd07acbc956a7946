"""Decoded batches as one sorted set of rows, and those rows as a binary COPY stream. Pure; laid out by numpy.

* `rows_of` keeps, of all points with one (timestamp, series), the one with the greatest (version, value): landing's
  maximum, applied within the landing. The order and the splitting of the batches do not matter.
* Rows are sorted by (timestamp, series), the order of the key in PostgreSQL, so that two transactions that
  meet take their keys in one order.
* Values compare as PostgreSQL's float8 does: IEEE total order with −0 normalised to 0. NaN has no place in it and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.model import Batch, SeriesIds

SECONDS_A_DAY = 86_400

TIMESTAMP_MIN_S = -210_866_803_200
"""PostgreSQL's oldest timestamptz, 4714-11-24 BC."""

TIMESTAMP_MAX_S = 9_224_318_016_000 - 1
"""PostgreSQL's newest timestamptz, the end of the year 294276."""

POSTGRES_EPOCH_S = 946_684_800  # 2000-01-01T00:00:00Z

_ROW = np.dtype(
    [
        ("fields", ">i2"),
        ("timestamp_bytes", ">i4"),
        ("timestamp_us", ">i8"),
        ("series_bytes", ">i4"),
        ("series", ">u8", (2,)),
        ("value_bytes", ">i4"),
        ("value", ">f8"),
        ("version_bytes", ">i4"),
        ("version", ">i8"),
    ]
)
_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)  # the signature, no flags, no header extension
_TRAILER = b"\xff\xff"

COLUMNS = ("ts", "series", "value", "version")
"""The columns of the stream, in its order."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Samples to land, sorted by (timestamp, series id), each such pair once.

    Row `i` belongs to the series `ids[series[i]]`; `ids`, shape (m, 2), is sorted and has no duplicates.
    """

    ids: SeriesIds
    series: NDArray[np.int64]
    timestamps_s: NDArray[np.int64]
    values: NDArray[np.float64]
    versions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.values)

    def select(self, which: slice | NDArray[np.bool_] | NDArray[np.intp]) -> Rows:
        """Some of the rows, by slice, mask or ascending index; `ids` stay as they are."""
        return Rows(
            self.ids,
            self.series[which],
            self.timestamps_s[which],
            self.values[which],
            self.versions[which],
        )

    def days(self) -> list[int]:
        """The UTC days that the rows are in, as days since the epoch, ascending."""
        days = self.timestamps_s // SECONDS_A_DAY
        if not len(days):
            return []
        return [int(days[0]), *(int(d) for d in days[1:][days[1:] != days[:-1]])]


def rows_of(batches: Sequence[Batch]) -> Rows:
    """All points of the batches as rows to land.

    Raises ValueError where a value is NaN or a timestamp is outside PostgreSQL's range.
    """
    if not batches:
        empty = np.empty(0, np.int64)
        return Rows(np.empty((0, 2), np.uint64), empty, empty, np.empty(0, np.float64), empty)
    timestamps_s = np.concatenate([b.timestamps_s for b in batches])
    values = np.concatenate([b.values for b in batches]) + 0.0  # −0 + 0 is 0
    versions = np.repeat(np.array([b.version for b in batches], np.int64), [b.points for b in batches])
    if np.isnan(values).any():
        raise ValueError("a value is NaN")
    if len(values) and not TIMESTAMP_MIN_S <= timestamps_s.min() <= timestamps_s.max() <= TIMESTAMP_MAX_S:
        raise ValueError("a timestamp is outside PostgreSQL's range")
    ids, of_series = unique_ids(np.concatenate([b.ids for b in batches]))
    series = np.repeat(of_series, np.concatenate([b.counts for b in batches]))
    order = _by_time_then_series(timestamps_s, series)
    rows = Rows(ids, series, timestamps_s, values, versions).select(order)
    return _greatest_of_each(rows)


def copy_stream(rows: Rows) -> memoryview:
    """The rows in PostgreSQL's binary COPY format, columns as in `COLUMNS`: 58 bytes a row and 21 around them."""
    stream = np.empty(len(_HEADER) + len(rows) * _ROW.itemsize + len(_TRAILER), np.uint8)
    stream[: len(_HEADER)] = np.frombuffer(_HEADER, np.uint8)
    stream[-len(_TRAILER) :] = np.frombuffer(_TRAILER, np.uint8)
    out = stream[len(_HEADER) : -len(_TRAILER)].view(_ROW)
    out["fields"] = len(COLUMNS)
    out["timestamp_bytes"] = out["value_bytes"] = out["version_bytes"] = 8
    out["series_bytes"] = 16
    out["timestamp_us"] = (rows.timestamps_s - POSTGRES_EPOCH_S) * 1_000_000
    out["series"] = rows.ids[rows.series]
    out["value"] = rows.values
    out["version"] = rows.versions
    return stream.data


def unique_ids(ids: SeriesIds) -> tuple[SeriesIds, NDArray[np.int64]]:
    """The ids, sorted and each once, and for each id given its index among those."""
    # One half of a hash decides nearly always, and sorting by one takes a third of the time.
    order = np.argsort(ids[:, 0])
    high, low = ids[order, 0], ids[order, 1]
    if ((high[1:] == high[:-1]) & (low[1:] != low[:-1])).any():
        order = np.lexsort((ids[:, 1], ids[:, 0]))
        high, low = ids[order, 0], ids[order, 1]
    is_first = np.ones(len(ids), np.bool_)
    is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    index = np.empty(len(ids), np.int64)
    index[order] = np.cumsum(is_first) - 1
    return ids[order[is_first]], index


def _by_time_then_series(timestamps_s: NDArray[np.int64], series: NDArray[np.int64]) -> NDArray[np.intp]:
    """The order of the rows."""
    if not len(series):
        return np.empty(0, np.intp)
    return np.lexsort((_narrow(series), _narrow(timestamps_s - timestamps_s.min())))


def _narrow(numbers: NDArray[np.int64]) -> NDArray[Any]:
    """Numbers ≥ 0 in the smallest type that holds them: numpy sorts up to 16 bits by radix, in a third of the time."""
    return numbers.astype(np.min_scalar_type(numbers.max()))


def _greatest_of_each(rows: Rows) -> Rows:
    """Of neighbours with one (timestamp, series) only the greatest (version, value)."""
    same = (rows.timestamps_s[1:] == rows.timestamps_s[:-1]) & (rows.series[1:] == rows.series[:-1])
    if not same.any():
        return rows
    rows = rows.select(np.lexsort((rows.values, rows.versions, rows.series, rows.timestamps_s)))
    return rows.select(np.append(~same, True))
