"""Samples of an hour or a day, rolled up: count, sum, least, greatest and percentiles of each series. Pure, and vectorised by numpy.

* *The same samples make the same rows*, in any order: values are sorted before anything is computed from them.
* *Percentiles are exact* where a row was made from samples: numpy's default, linear between the two nearest values.
* *Sketches merge without loss.* A sketch counts the values in DDSketch's bins (Masson, Rim and Lee, 2019), so that adding the counts of
  two is the sketch of both; a percentile from it is within `RELATIVE_ACCURACY` of a value at its rank. docs/decisions/0027-rollups.md
  says why this sketch.
* Nothing is invented: a count is the number of samples, and a series without samples has no row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from ingest.model import SeriesIds
from ingest.sinks.copy import unique_ids

RELATIVE_ACCURACY = 0.01

PERCENTILES = (0.5, 0.95, 0.99)

_LOG_GAMMA = math.log1p(2 * RELATIVE_ACCURACY / (1 - RELATIVE_ACCURACY))
_ZERO_KEY = 40_000
"""Below the keys of all floats, denormal ones included, turned into codes that keep the order of the values: see `codes_of`."""
_INFINITE = 80_000

_HEAD_BYTES = 8

DENSE_MAX = 8_000_000
"""Bins that are added up at once: 64 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class Bins:
    """Sketches of many rows, one after the other: `per_row[i]` bins of row i, ascending by code."""

    per_row: NDArray[np.int64]
    codes: NDArray[np.int64]
    counts: NDArray[np.int64]

    def take(self, rows: NDArray[np.intp]) -> Bins:
        """Those of some rows, in that order."""
        starts = np.cumsum(self.per_row) - self.per_row
        per_row = self.per_row[rows]
        ends = np.cumsum(per_row)
        at = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts[rows] - ends + per_row, per_row)
        return Bins(per_row, self.codes[at], self.counts[at])

    def pack(self) -> bytes:
        """As bytes, compressed; `unpack` is the inverse."""
        numbers = np.concatenate([self.per_row, np.diff(self.codes, prepend=0), self.counts]).astype("<i4")
        # The four bytes of all numbers apart: most planes are zeros, which takes a third off.
        planes = np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, 4).T).tobytes()
        head = np.array([len(self.per_row), len(self.codes)], "<u4").tobytes()
        return head + zstandard.ZstdCompressor(level=3).compress(planes)

    @classmethod
    def unpack(cls, raw: bytes) -> Bins:
        """Raises ValueError where the bytes are not what `pack` makes."""
        if len(raw) < _HEAD_BYTES:
            raise ValueError("a sketch is cut short")
        rows, bins = (int(n) for n in np.frombuffer(raw[:_HEAD_BYTES], "<u4"))
        size = 4 * (rows + 2 * bins)
        try:
            planes = zstandard.ZstdDecompressor().decompress(raw[_HEAD_BYTES:], max_output_size=size)
        except zstandard.ZstdError as error:
            raise ValueError(f"a sketch is broken: {error}") from error
        if len(planes) != size:
            raise ValueError(f"a sketch has {len(planes)} bytes instead of {size}")
        lowest, *higher = np.frombuffer(planes, np.uint8).reshape(4, -1)
        words = lowest.astype(np.uint32)
        for number, plane in enumerate(higher, 1):
            words |= plane.astype(np.uint32) << np.uint32(8 * number)
        per_row, steps, counts = np.split(words.view(np.int32), [rows, rows + bins])
        return cls(per_row.astype(np.int64), np.cumsum(steps, dtype=np.int64), counts.astype(np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class Rollups:
    """Rows of one hour or day, in columns, sorted by series id, each once. Shape of `ids`: (n, 2), of the others: (n,).

    Percentiles are NaN where samples were gone before a day was rolled up from them. `bins` are a day's; of a row without percentiles
    there are none.
    """

    ids: SeriesIds
    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    mins: NDArray[np.float64]
    maxs: NDArray[np.float64]
    p50s: NDArray[np.float64]
    p95s: NDArray[np.float64]
    p99s: NDArray[np.float64]
    bins: Bins | None = None

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def averages(self) -> NDArray[np.float64]:
        return self.sums / self.counts

    def take(self, rows: NDArray[np.intp]) -> Rollups:
        """Some rows, in that order."""
        columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in COLUMNS}
        return Rollups(**columns, bins=None if self.bins is None else self.bins.take(rows))

    def same_as(self, other: Rollups) -> bool:
        """Whether all rows are the same, to the bit but for NaNs."""
        mine, others = self, other
        if len(mine) != len(others) or (mine.bins is None) != (others.bins is None):
            return False
        pairs = [(getattr(mine, name), getattr(others, name)) for name in COLUMNS]
        if mine.bins is not None and others.bins is not None:
            pairs += [(getattr(mine.bins, f.name), getattr(others.bins, f.name)) for f in fields(Bins)]
        return all(np.array_equal(a, b, equal_nan=a.dtype == np.float64) for a, b in pairs)


class Sketched(Protocol):
    """What has sketches of series, each series once: `Rollups` of a day, or less of it, `Sketches`."""

    @property
    def ids(self) -> SeriesIds: ...
    @property
    def bins(self) -> Bins | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Sketches:
    """A day's sketches, without its other columns."""

    ids: SeriesIds
    bins: Bins


COLUMNS = tuple(f.name for f in fields(Rollups) if f.name != "bins")


def empty(*, bins: bool) -> Rollups:
    """No rows."""
    return roll_up(np.empty((0, 2), np.uint64), np.empty(0), bins=bins)


def roll_up(ids: SeriesIds, values: NDArray[np.float64], *, bins: bool) -> Rollups:
    """The rows of samples, in any order: `ids`, shape (m, 2), and `values`, shape (m,), none NaN."""
    unique, index = unique_ids(ids)
    order = np.lexsort((values, index.astype(np.min_scalar_type(len(unique)))))
    values, index = values[order], index[order]
    counts = np.bincount(index, minlength=len(unique))
    ends = np.cumsum(counts)
    starts = ends - counts
    if len(values):
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.add.reduceat(values, starts)
    else:
        sums = values
    p50s, p95s, p99s = (_percentile(values, starts, counts, p) for p in PERCENTILES)
    sketch = _bins(values, index, len(unique)) if bins else None
    return Rollups(unique, counts, sums, values[starts], values[ends - 1], p50s, p95s, p99s, sketch)


def _percentile(
    values: NDArray[np.float64], starts: NDArray[np.int64], counts: NDArray[np.int64], p: float
) -> NDArray[np.float64]:
    """Of each segment of sorted values, computed as numpy's own does, so that it is equal to the bit."""
    at = p * (counts - 1)
    below = np.floor(at).astype(np.int64)
    t = at - below
    a, b = values[starts + below], values[starts + np.minimum(below + 1, counts - 1)]
    with np.errstate(invalid="ignore", over="ignore"):
        between = np.where(t >= 0.5, b - (b - a) * (1 - t), a + (b - a) * t)
    return np.asarray(np.where(a == b, a, between), np.float64)


def _bins(values: NDArray[np.float64], index: NDArray[np.int64], rows: int) -> Bins:
    """The sketch of each row of sorted values; `index` says to which row a value belongs."""
    codes = codes_of(values)
    first = np.ones(len(codes), np.bool_)
    first[1:] = (codes[1:] != codes[:-1]) | (index[1:] != index[:-1])
    at = np.flatnonzero(first)
    return Bins(np.bincount(index[at], minlength=rows), codes[at], np.diff(at, append=len(codes)))


def codes_of(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """DDSketch's bin of each value, as one number that grows with the value: 0 of zero, negative of a negative one."""
    with np.errstate(divide="ignore"):
        keys = np.ceil(np.log(np.abs(values)) / _LOG_GAMMA) + _ZERO_KEY
    codes: NDArray[np.int64] = (np.sign(values) * np.clip(keys, 0, _INFINITE)).astype(np.int64)
    return codes


def values_of(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The value that stands for each bin: no value of the bin is further away than RELATIVE_ACCURACY of itself."""
    magnitude = np.abs(codes)
    with np.errstate(over="ignore"):
        value = np.exp((magnitude - _ZERO_KEY) * _LOG_GAMMA) * 2 / (1 + math.exp(_LOG_GAMMA))
    value = np.where(magnitude == 0, 0.0, np.where(magnitude == _INFINITE, np.inf, value))
    return np.asarray(np.sign(codes) * value, np.float64)


def fullest(candidates: Sequence[Rollups]) -> Rollups:
    """Of each series the row that counts most samples; of rows that count the same, the first candidate's.

    A landing never takes a sample away, so that a row with fewer samples than another of the same time was made when some had been
    dropped. All candidates have sketches, or none has.
    """
    together = concatenated(candidates)
    _, index = unique_ids(together.ids)
    order = np.lexsort((-together.counts, index))  # stable: of equal counts the first candidate's comes first
    index = index[order]
    first = np.ones(len(index), np.bool_)
    first[1:] = index[1:] != index[:-1]
    return together.take(order[first])


def of_hours(hours: Sequence[Rollups]) -> Rollups:
    """The rows of a day made of its hours, oldest first: without percentiles, which hours do not have between them."""
    together = concatenated(hours) if hours else empty(bins=False)
    ids, index = unique_ids(together.ids)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(len(ids)))
    if not len(ids):
        return empty(bins=True)
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.add.reduceat(together.sums[order], starts)
    unknown = np.full(len(ids), np.nan)
    none = np.zeros(0, np.int64)
    return Rollups(
        ids,
        np.add.reduceat(together.counts[order], starts),
        sums,
        np.minimum.reduceat(together.mins[order], starts),
        np.maximum.reduceat(together.maxs[order], starts),
        unknown,
        unknown,
        unknown,
        Bins(np.zeros(len(ids), np.int64), none, none),
    )


def percentiles_of(days: Sequence[Sketched], ps: Sequence[float]) -> tuple[SeriesIds, NDArray[np.float64]]:
    """Percentiles over several days, merged from their sketches: (ids, shape (n, 2); values, shape (n, len(ps))).

    Each is within RELATIVE_ACCURACY of the value at its rank, as ddsketch counts ranks. NaN where a day of the series has no sketch.
    """
    ids, found = percentiles_of_spans(days, [range(len(days))], ps)
    return ids, found[:, 0]


def percentiles_of_spans(
    days: Sequence[Sketched], spans: Sequence[Collection[int]], ps: Sequence[float]
) -> tuple[SeriesIds, NDArray[np.float64]]:
    """As `percentiles_of`, over several spans at once, which may overlap: (ids of all days, shape (n, 2); values, shape (n, len(spans), len(ps))).

    A span says which of `days` it has, by index. NaN where a day of the span has no sketch of the series, and where no day has the series.
    """
    bins = [day.bins for day in days]
    if None in bins:
        raise ValueError("hours have no sketches: give days")
    if not days:
        return np.empty((0, 2), np.uint64), np.empty((0, len(spans), len(ps)))
    ids, index = unique_ids(np.concatenate([day.ids for day in days]))
    rows = np.split(index, np.cumsum([len(day.ids) for day in days])[:-1])
    sketches = [(of, one) for of, one in zip(rows, bins, strict=True) if one is not None]
    return ids, _merged(sketches, len(ids), spans, ps)


_Sketches = Sequence[tuple[NDArray[np.int64], Bins]]
"""Of each day: for each of its sketches the series' index, and the sketches."""


def _merged(
    sketches: _Sketches, many: int, spans: Sequence[Collection[int]], ps: Sequence[float]
) -> NDArray[np.float64]:
    """Shape (many, len(spans), len(ps))."""
    if not many:
        return np.empty((0, len(spans), len(ps)))
    dense = _Dense.of(sketches, many)
    if dense.size > DENSE_MAX and many > 1:
        half = many // 2
        low = [(of[of < half], bins.take(np.flatnonzero(of < half))) for of, bins in sketches]
        high = [(of[of >= half] - half, bins.take(np.flatnonzero(of >= half))) for of, bins in sketches]
        return np.concatenate([_merged(low, half, spans, ps), _merged(high, many - half, spans, ps)])
    counted: dict[frozenset[int], NDArray[np.float64]] = {}
    found = np.empty((many, len(spans), len(ps)))
    # What two spans have in common is added up once.
    for days in _cells(len(sketches), spans):
        counted[days] = dense.counts([sketches[day] for day in sorted(days)])
    for number, span in enumerate(spans):
        total = np.zeros(dense.size)
        known = np.zeros(many, np.bool_)
        for days, counts in counted.items():
            if days <= frozenset(span):
                total += counts
        lacking = np.zeros(many, np.bool_)
        for day in span:
            of, bins = sketches[day]
            known[of] = True
            lacking[of[bins.per_row == 0]] = True
        found[:, number] = np.where((known & ~lacking)[:, None], dense.percentiles(total, ps), np.nan)
    return found


def _cells(days: int, spans: Sequence[Collection[int]]) -> list[frozenset[int]]:
    """The days in groups, so that each span is some of the groups."""
    of: dict[tuple[bool, ...], list[int]] = {}
    for day in range(days):
        of.setdefault(tuple(day in span for span in spans), []).append(day)
    return [frozenset(group) for within, group in of.items() if any(within)]


@dataclass(frozen=True, slots=True, eq=False)
class _Dense:
    """Where the bins of merged sketches lie in one long array, in which each series has the bins between its first and its last one.

    Adding counts up there takes a twentieth of the time of sorting them. Codes that occur nowhere take no place.
    """

    ranks: NDArray[np.int32]
    """By code, from -_INFINITE on."""
    known: NDArray[np.int64]
    """The codes that occur, by rank."""
    lowest: NDArray[np.int64]
    starts: NDArray[np.int64]
    size: int

    @classmethod
    def of(cls, sketches: _Sketches, many: int) -> _Dense:
        occurs = np.zeros(2 * _INFINITE + 1, np.bool_)
        for _, bins in sketches:
            occurs[bins.codes + _INFINITE] = True
        ranks = np.cumsum(occurs, dtype=np.int32) - 1
        lowest, highest = np.full(many, len(occurs)), np.full(many, -1)
        for of, bins in sketches:
            # A day has a series once.
            some = bins.per_row > 0
            ends = np.cumsum(bins.per_row)[some]
            rows = of[some]
            first = ranks[bins.codes[ends - bins.per_row[some]] + _INFINITE]
            lowest[rows] = np.minimum(lowest[rows], first)
            highest[rows] = np.maximum(highest[rows], ranks[bins.codes[ends - 1] + _INFINITE])
        width = np.maximum(highest - lowest + 1, 0)
        return cls(
            ranks,
            np.flatnonzero(occurs) - _INFINITE,
            lowest,
            np.cumsum(width) - width,
            int(width.sum()),
        )

    def counts(self, sketches: _Sketches) -> NDArray[np.float64]:
        """All their bins, added up. As weights, counts are floats: exact up to 2**53."""
        total = np.zeros(self.size)
        for of, bins in sketches:
            at = np.repeat((self.starts - self.lowest)[of], bins.per_row)
            at += self.ranks[bins.codes + _INFINITE]
            # Each place is met once: a day has a series once, a series a bin once.
            total[at] += bins.counts
        return total

    def percentiles(self, counts: NDArray[np.float64], ps: Sequence[float]) -> NDArray[np.float64]:
        """Shape (series, len(ps)); of series without bins anything."""
        many = len(self.starts)
        if not self.size:
            return np.full((many, len(ps)), np.nan)
        cumulative = np.cumsum(counts)
        upto = np.append(0.0, cumulative)
        before = upto[self.starts]
        totals = np.append(before[1:], cumulative[-1]) - before
        found = np.empty((many, len(ps)))
        for column, p in enumerate(ps):
            place = np.searchsorted(cumulative, before + np.floor(p * (totals - 1)), side="right")
            rank = np.clip(place - self.starts + self.lowest, 0, len(self.known) - 1)
            found[:, column] = values_of(self.known[rank])
        return found


def concatenated(parts: Sequence[Rollups]) -> Rollups:
    """All rows of the parts, of which there is one at least, one part after the other."""
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS
    }
    bins = [part.bins for part in parts if part.bins is not None]
    names = [f.name for f in fields(Bins)]
    sketch = Bins(*(np.concatenate([getattr(b, name) for b in bins]) for name in names)) if bins else None
    return Rollups(**columns, bins=sketch)
