"""When a resource is full: a fitted trend of what is used, with its interval. Pure.

Guarantees:

* *no days to full without an inventory*, for it alone knows how much there is;
* *only where coverage allows*: two weeks of days since the last step, four fifths of them known, the last one fresh;
* *a step restarts the fit*: a resize, a cleanup, a bulk load. What is emptied again and again is a saw tooth, and its tops are fitted;
* *no trend that is flat or falling is drawn out*: the whole interval has to be above 0;
* *no further than twice the fitted range*: beyond that it says "more than".

A day's value is the most that was used in it, so that what is emptied each night is not read as a trend. The slope is the median of the slopes
between all pairs of days (Theil–Sen, `scipy.stats.theilslopes`), which up to 29 % of wild days do not move, with the interval of its ranks; days
follow each other, so the interval is widened by their autocorrelation. Weekdays are levelled where three weeks are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ingest.inventory.model import Resource
from ingest.report.model import Days, Figure, Filling
from ingest.report.resources import DAY_H, HOUR_S, Axis, Observed
from ingest.report.utilization import day_starts
from shard_config.report import Role

DAY_S: Final = DAY_H * HOUR_S
DAYS_MIN: Final = 14
COVERAGE_MIN: Final = 0.8
HOURS_MIN: Final = 12
"""A day with fewer is not known."""
STALE_DAYS: Final = 2
STEP_NOISES: Final = 6.0
STEP_SHARE: Final = 0.02
"""Of the capacity: a smaller jump is no step, however quiet the other days are."""
TEETH_MIN: Final = 4
STAIRS_MIN: Final = 3
"""So many steps upwards are how it grows."""
DRAWN_OUT: Final = 2.0
NORMAL_95: Final = 1.96
AUTOCORRELATION_MAX: Final = 0.8
MAD: Final = 1.4826
"""Median absolute deviation → standard deviation, of normal noise."""
PERCENT: Final = 100.0
_SHARES: Final = {"msk": Role.STORAGE_SHARE, "eks": Role.STORAGE_SHARE, "elasticache": Role.MEMORY_SHARE}


@dataclass(frozen=True, slots=True, eq=False)
class Used:
    """What is used by UTC day, NaN where it is not known, and how much there is. `restart` is the first day after the last resize."""

    role: Role
    days: NDArray[np.float64]
    first_day_s: int
    """The beginning of the first day; days follow each other."""
    capacity: float
    unit: str
    restart: int


@dataclass(frozen=True, slots=True)
class Trend:
    """Per day, with its interval of 95 %; `noise` is the standard deviation of the days around it."""

    slope: float
    low: float
    high: float
    noise: float
    from_day: int
    """Index of the first day that was fitted."""
    points: int
    method: str


# --- what is used -----------------------------------------------------------------------------------------------------


def used_of(seen: Observed, axis: Axis, to_s: int) -> Used | None:
    """What is used of a resource that can fill up, by day until `to_s`; None where it has no capacity that is known, or no samples."""
    resource = None if seen.lived is None else seen.lived.at(to_s - 1)
    if resource is None:
        return None
    hours = slice(0, axis.index(to_s))
    if (role := _SHARES.get(seen.key.service)) is not None:
        level = next(
            (s for s in (seen.maximum(role), seen.level(role)) if s is not None and s.counts[hours].any()),
            None,
        )
        if level is None:
            return None
        values = (level.averages if level.maxs is None else level.maxs)[hours]
        return Used(role, *_by_day(values, axis, hours), PERCENT, "percent", _restart(seen, axis, to_s))
    free = seen.series.get((Role.STORAGE_FREE, "Minimum")) or seen.level(Role.STORAGE_FREE)
    if free is None or not free.counts[hours].any() or not resource.storage_bytes:
        return None
    values = resource.storage_bytes - (free.averages if free.mins is None else free.mins)[hours]
    # Where storage grows by itself, it is full at its limit.
    capacity = float(resource.storage_max_bytes or resource.storage_bytes)
    return Used(
        Role.STORAGE_FREE, *_by_day(values, axis, hours), capacity, "bytes", _restart(seen, axis, to_s)
    )


def _by_day(values: NDArray[np.floating], axis: Axis, hours: slice) -> tuple[NDArray[np.float64], int]:
    """The greatest of each UTC day, and when the first day begins."""
    starts = day_starts(axis, hours)
    known = np.add.reduceat(~np.isnan(values), starts, dtype=np.int64)
    greatest = np.fmax.reduceat(values.astype(np.float64), starts)
    greatest[known < HOURS_MIN] = np.nan
    return greatest, axis.start_s // DAY_S * DAY_S


def _restart(seen: Observed, axis: Axis, to_s: int) -> int:
    """The day after the last change of size: on the day itself the inventory may have known of it later than the metrics."""
    day = 0
    if seen.lived is not None:
        spans = [span for span in seen.lived.spans if span.from_s < to_s]
        for before, after in pairwise(spans):
            if _size(before.resource) != _size(after.resource):
                day = max(0, after.from_s // DAY_S - axis.start_s // DAY_S + 1)
    return day


def _size(resource: Resource) -> tuple[object, ...]:
    return resource.type, resource.nodes, resource.memory_bytes, resource.storage_bytes


# --- the trend --------------------------------------------------------------------------------------------------------


def trend_of(used: Used) -> Trend | None:
    """The trend since the last step; None where there is none that may be drawn out."""
    at = used.restart + np.flatnonzero(~np.isnan(used.days[used.restart :]))
    if len(at) < DAYS_MIN or len(used.days) - 1 - at[-1] > STALE_DAYS:
        return None
    steps = _steps(at, used)
    down = [at[n] for n in steps if used.days[at[n + 1]] < used.days[at[n]]]
    if len(down) >= TEETH_MIN:
        return _fit(np.array(down), used, "Theil–Sen through the tops of a saw tooth")
    if len(down) >= 2:
        # Emptied now and then, too seldom to tell how its tops grow.
        return None
    if len(steps) and (down or len(steps) < STAIRS_MIN):
        at = at[steps[-1] + 1 :]
    if len(at) < DAYS_MIN or len(at) < COVERAGE_MIN * (at[-1] - at[0] + 1):
        return None
    return _fit(at, used, "Theil–Sen")


def _steps(at: NDArray[np.intp], used: Used) -> NDArray[np.intp]:
    """Indices into `at` of the days before a step."""
    rises = np.diff(used.days[at]) / np.diff(at)
    usual = np.median(rises)
    noise = MAD * float(np.median(np.abs(rises - usual)))
    limit = max(STEP_NOISES * noise, STEP_SHARE * used.capacity)
    return np.flatnonzero(np.abs(rises - usual) > limit)


def _fit(at: NDArray[np.intp], used: Used, method: str) -> Trend | None:
    # Half a second to import: only a report that fits pays for it.
    from scipy.special import ndtr
    from scipy.stats import theilslopes

    x, y = at.astype(np.float64), used.days[at]
    slope = float(theilslopes(y, x).slope)
    y, lost = _levelled(at, y, slope, used.first_day_s)
    residuals = y - slope * x
    residuals = residuals - np.median(residuals)
    alpha = 2 * float(ndtr(-NORMAL_95 * _widening(residuals, lost)))
    fit = theilslopes(y, x, alpha=alpha)
    if not float(fit.low_slope) > 0:
        return None
    noise = MAD * float(np.median(np.abs(residuals)))
    return Trend(
        float(fit.slope), float(fit.low_slope), float(fit.high_slope), noise, int(at[0]), len(at), method
    )


def _levelled(
    at: NDArray[np.intp], y: NDArray[np.float64], slope: float, first_day_s: int
) -> tuple[NDArray[np.float64], int]:
    """Without what is usual for each weekday, where each is known three times; and the degrees of freedom that this and a line take."""
    weekdays = (first_day_s // DAY_S + at) % 7
    if np.bincount(weekdays, minlength=7).min() < 3:
        return y, 2
    residuals = y - slope * at
    residuals -= np.median(residuals)
    usual = np.array([np.median(residuals[weekdays == day]) for day in range(7)])
    return np.asarray(y - (usual - usual.mean())[weekdays], np.float64), 8


def _widening(residuals: NDArray[np.float64], lost: int) -> float:
    """By how much the interval of independent days has to be wider: √((1 + r) / (1 − r)) of the autocorrelation r of neighbours, and by the degrees
    of freedom that were lost.
    """
    total = float(residuals @ residuals)
    if total == 0:
        return 1.0
    n = len(residuals)
    r = float(residuals[1:] @ residuals[:-1]) / total
    # Around a fitted line it comes out too small, by (1 + 4 r) / n (Kendall, 1954).
    r = min(max((n * r + 1) / (n - 4), 0.0), AUTOCORRELATION_MAX) if n > 4 else AUTOCORRELATION_MAX
    return float(np.sqrt((1 + r) / (1 - r) * n / max(1, n - lost)))


# --- days to full -----------------------------------------------------------------------------------------------------


def filling_of(used: Used, seen: Observed, owner: str) -> Filling | None:
    """When it is full; None where no trend may be drawn out."""
    trend = trend_of(used)
    if trend is None:
        return None
    known = np.flatnonzero(~np.isnan(used.days))
    last = int(known[-1])
    now = float(used.days[last])
    before = float(used.days[last - 7]) if last >= 7 and not np.isnan(used.days[last - 7]) else None
    span_days = last - trend.from_day + 1
    coverage = float((known >= trend.from_day).sum() / (len(used.days) - trend.from_day))
    # From the range's end, which is the end of the last day, or later by days that are not known yet.
    late_days = len(used.days) - 1 - last
    to_80, to_100 = (
        days_until(share * used.capacity - now, trend, DRAWN_OUT * span_days, late_days)
        for share in (0.8, 1.0)
    )
    return Filling(
        seen.key,
        owner,
        used.role,
        Figure(now, used.unit, before, coverage),
        used.capacity,
        trend.slope,
        trend.low,
        trend.high,
        to_80,
        to_100,
        trend.points,
        used.first_day_s + trend.from_day * DAY_S,
        trend.method,
        coverage,
        tuple(None if np.isnan(v) else float(v) for v in used.days.tolist()),
    )


def days_until(gap: float, trend: Trend, reach_days: float, late_days: int = 0) -> Days:
    """Days until `gap` more is used, from `late_days` after the last known day; no further than `reach_days`."""
    if gap <= 0:
        return Days(0.0, 0.0, 0.0)

    def left(days: float) -> float:
        return max(0.0, days - late_days)

    earliest = (gap - trend.noise) / trend.high
    latest = (gap + trend.noise) / trend.low
    if gap / trend.slope > reach_days:
        return Days(None, left(earliest) if earliest <= reach_days else None, None, reach_days)
    return Days(left(gap / trend.slope), left(earliest), left(latest) if latest <= reach_days else None)
