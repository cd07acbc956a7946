"""The values of made-up series, in columns: what a point is, when it appears, and how it changes.

Computed with integer hashes and single IEEE operations only (+, −, ×, ÷, floor, rint), never a library's sine or random
numbers, so that every machine computes the same bits. One row a series, one column a timestamp; sums are of whole numbers
below 2**53, so that their order does not matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

SETTLED: Final = 1 << 40
"""A query time (in the year 36812) by which everything has settled."""
UNBORN: Final = SETTLED - 1
"""When a series is born that is not born yet: see `workers.world.World.bear`."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Hashes = NDArray[np.uint64]

Answer = tuple[list[int], list[float]]
"""Timestamps, ascending, and the values at them."""

REVISED_SHARE: Final = 0.04
SPARSE_SHARE: Final = 0.03

_STATISTIC = re.compile(
    r"Average|Sum|Minimum|Maximum|SampleCount|IQM|tm\d{1,2}|p(\d{1,2}(?:\.\d{1,10})?|100)"
)
_DAY_S = 86_400.0


@lru_cache(maxsize=256)
def known_statistic(stat: str) -> bool:
    """Whether there are values for it: the five simple statistics, pNN, tmNN and IQM."""
    return _STATISTIC.fullmatch(stat) is not None


@dataclass(frozen=True, slots=True)
class Kinds:
    """What decides a series' range and timing; each of shape (series,)."""

    low: Floats
    high: Floats
    scale: Floats
    """Samples are whole multiples of 1/scale."""
    samples: Floats
    """Samples in a point of the series' own grid."""
    grid_s: Ints
    settling_s: Ints
    """A point appears and changes within this time after its period's end."""


@dataclass(frozen=True, slots=True)
class Columns(Kinds):
    """Series, by what makes one differ from another of its kind; each of shape (series,)."""

    hashes: Hashes
    top: Floats
    """How much of the range is used."""
    daily: Floats
    noise: Floats
    phase: Floats
    sparse: NDArray[np.bool_]
    born_s: Ints
    """No point before it."""

    def take(self, rows: Ints) -> Columns:
        """Some of the series, as columns of shape (series, 1) that meet timestamps of shape (times,)."""
        return Columns(*(getattr(self, f.name)[rows][:, None] for f in fields(self)))


def columns(
    kinds: Kinds, digests: bytes, *, silent_share: float, newborn_share: float, newborn_at_s: int
) -> Columns:
    """Series of these kinds from their digests, 8 bytes each; shares as in `workers.world.World`."""
    hashes = np.frombuffer(digests, dtype=">u8").astype(np.uint64)
    traits = _mix(hashes)
    born_s = np.where(_bits(traits, 40, 12) < newborn_share, newborn_at_s, 0)
    born_s = np.where(_bits(traits, 52, 12) < silent_share, SETTLED, born_s)
    return Columns(
        low=kinds.low,
        high=kinds.high,
        scale=kinds.scale,
        samples=kinds.samples,
        grid_s=kinds.grid_s,
        settling_s=kinds.settling_s,
        hashes=hashes,
        top=0.05 + 0.95 * _bits(traits, 0, 8),
        daily=0.05 + 0.25 * _bits(traits, 8, 8),
        noise=0.02 + 0.22 * _bits(traits, 16, 8),
        phase=_bits(traits, 24, 8),
        sparse=_bits(traits, 32, 8) < SPARSE_SHARE,
        born_s=born_s.astype(np.int64),
    )


def answers_of(
    series: Columns, rows: Ints, stat: str, period_s: int, times_s: Ints, asked_at_s: int
) -> list[Answer]:
    """What is visible of `rows` at `times_s` (on the rows' common grid, ascending), in buckets of `period_s`.

    A bucket holds what of it is visible. Raises ValueError where the statistic is unknown.
    """
    of = series.take(rows)
    visible, totals, minima, maxima = _evaluate(of, times_s, asked_at_s)
    row, column = np.nonzero(visible)
    timestamps_s = times_s[column] // period_s * period_s
    total, count = totals[row, column], of.samples[row, 0]
    minimum, maximum = minima[row, column], maxima[row, column]
    is_new = (np.diff(timestamps_s, prepend=-1) != 0) | (np.diff(row, prepend=-1) != 0)
    if not is_new.all():
        starts = np.flatnonzero(is_new)
        row, timestamps_s = row[starts], timestamps_s[starts]
        total, count = np.add.reduceat(total, starts), np.add.reduceat(count, starts)
        minimum, maximum = np.minimum.reduceat(minimum, starts), np.maximum.reduceat(maximum, starts)

    total = total / of.scale[row, 0]
    if stat == "Sum":
        values = total
    elif stat == "SampleCount":
        values = count
    else:
        low, high = of.low[row, 0], of.high[row, 0]
        average = np.clip(total / count, low, high)
        # Division rounds: the extremes are held to the average, not the other way round.
        minimum = np.clip(np.minimum(minimum, average), low, high)
        maximum = np.clip(np.maximum(maximum, average), low, high)
        values = _statistic(stat, average, minimum, maximum)
    times, numbers, start = timestamps_s.tolist(), values.tolist(), 0
    answers: list[Answer] = []
    for end in np.cumsum(np.bincount(row, minlength=len(rows))).tolist():
        answers.append((times[start:end], numbers[start:end]))
        start = end
    return answers


def _evaluate(
    of: Columns, times_s: Ints, asked_at_s: int
) -> tuple[NDArray[np.bool_], Floats, Floats, Floats]:
    """(visible, sum in units of 1/scale, minimum, maximum) of each series at each time, as known at `asked_at_s`."""
    x = _mix(of.hashes + _mix(times_s.astype(np.uint64)))
    delay_s, revised_s = _timing(of, x)
    age_s = asked_at_s - times_s - of.grid_s
    visible = (age_s >= delay_s) & (times_s >= of.born_s)
    if of.sparse.any():
        dozen = _mix(of.hashes ^ _mix((times_s // (12 * of.grid_s)).astype(np.uint64)))
        visible &= ~(of.sparse & ((_bits(dozen, 0, 8) < 0.25) | (_bits(x, 28, 4) == 0.0)))

    times = times_s.astype(np.float64)
    load = 0.5 + of.daily * _wave(times, _DAY_S, of.phase) + 0.08 * _wave(times, 7 * _DAY_S, of.phase)
    load += of.noise * (_bits(x, 16, 12) - 0.5)
    value = of.low + (of.high - of.low) * of.top * np.clip(load, 0.0, 1.0)
    provisional = (_bits(x, 32, 8) < REVISED_SHARE) & (age_s < revised_s)
    value = np.where(provisional, of.low + (value - of.low) * (0.5 + 0.4 * _bits(x, 52, 8)), value)

    per_point = of.samples * of.scale
    total = np.clip(np.rint(value * per_point), of.low * per_point, of.high * per_point)
    spread = 0.3 * _bits(x, 52, 12)
    only = total / of.scale
    least = np.floor((value - (value - of.low) * spread) * of.scale) / of.scale
    greatest = np.ceil((value + (of.high - value) * spread) * of.scale) / of.scale
    return (
        visible,
        total,
        np.where(of.samples > 1, least, only),
        np.where(of.samples > 1, greatest, only),
    )


def _timing(of: Columns, x: Hashes) -> tuple[Ints, Ints]:
    """When a point appears, and when one that is revised gets its final value: seconds after its period's end.

    The delay is settling × r⁶, r even in [0, 1): half of the points come within 2 % of the settling time, nine in ten
    within 53 %, none beyond it.
    """
    cube = _bits(x, 0, 16)
    cube = cube * cube * cube
    delay_s = (of.settling_s * (cube * cube)).astype(np.int64)
    later_s = 1 + ((of.settling_s - delay_s) * _bits(x, 40, 12)).astype(np.int64)
    return delay_s, np.minimum(delay_s + later_s, of.settling_s)


def _statistic(stat: str, average: Floats, minimum: Floats, maximum: Floats) -> Floats:
    """Average, Minimum, Maximum, or what lies between: percentiles are interpolated, with the average as p50."""
    match = _STATISTIC.fullmatch(stat)
    if match is None:
        raise ValueError(f"unknown statistic {stat!r}")
    if stat == "Minimum":
        return minimum
    if stat == "Maximum":
        return maximum
    if match[1] is None:
        return average
    share = float(match[1]) / 100.0
    if share <= 0.5:
        return np.minimum(minimum + (average - minimum) * (share * 2.0), average)
    return np.clip(average + (maximum - average) * (share * 2.0 - 1.0), average, maximum)


def _mix(x: Hashes) -> Hashes:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014), on each element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bits(x: Hashes, shift: int, bits: int) -> Floats:
    """Some bits of each hash as a number in [0, 1), exactly."""
    return ((x >> np.uint64(shift)) & np.uint64((1 << bits) - 1)).astype(np.float64) / float(1 << bits)


def _wave(times_s: Floats, length_s: float, phase: Floats) -> Floats:
    """A parabola's imitation of a sine, in [-1, 1]."""
    x = times_s / length_s + phase
    x = 2.0 * (x - np.floor(x)) - 1.0
    return 4.0 * x * (1.0 - np.abs(x))
