"""How much of a resource is used: averages, percentiles, peaks, idle hours. Pure.

Guarantees:

* *a peak is of the Maximum statistic, never of averages*; where that is not collected there is no peak, and the figure says so;
* *an hour is idle only where all activities are known and below their limits together*; what is not known is not idle;
* *sparse metrics without datapoints are not zero*, and no gap where the ledger looked at the hour in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ingest.inventory.model import State
from ingest.report.model import Figure, MetricUse
from ingest.report.resources import DAY_H, HOUR_S, WEEK_H, Axis, Floats, Observed, SeriesHours
from shard_config.report import ROLES, Activity, Idle, Role, RoleMetric

WEEK_S: Final = WEEK_H * HOUR_S
NO_MAXIMUM: Final = "the Maximum statistic is not collected"
SAMPLES: Final = "samples"
HOURLY: Final = "hourly averages"
_OFF: Final = frozenset({State.STOPPED, State.STANDBY, State.DETACHED})


@dataclass(frozen=True)
class Ranges:
    """The hours that figures are about, as slices of an axis: the report's range, its last 7 days and the 7 before these.

    Worked out once, for each series asks.
    """

    axis: Axis
    from_s: int
    to_s: int

    @cached_property
    def whole(self) -> slice:
        return self.axis.slice(self.from_s, self.to_s)

    @cached_property
    def week(self) -> slice:
        return self.axis.slice(self.to_s - WEEK_S, self.to_s)

    @cached_property
    def before(self) -> slice:
        return self.axis.slice(self.to_s - 2 * WEEK_S, self.to_s - WEEK_S)

    @cached_property
    def days(self) -> NDArray[np.intp]:
        """Where UTC days begin within the range."""
        return day_starts(self.axis, self.whole)


# --- one resource -----------------------------------------------------------------------------------------------------


def on_by_hour(seen: Observed, axis: Axis) -> NDArray[np.bool_]:
    """Shape (hours,): whether it lived and was on for the whole hour, so that it should have reported.

    Without an inventory: from its first sample on, for nobody knows of its end.
    """
    on = np.zeros(axis.hours, np.bool_)
    if seen.lived is None:
        on[_first(seen, axis) :] = True
        return on
    for span in seen.lived.spans:
        if span.resource.state not in _OFF:
            # Spans that follow each other share an hour; it counts where both are on.
            first, last = (span.from_s - axis.start_s) / HOUR_S, (span.to_s - axis.start_s) / HOUR_S
            on[max(0, -int(-first // 1)) : max(0, int(last))] = True
    return on


def _first(seen: Observed, axis: Axis) -> int:
    """The first hour with a sample of any of its series; `axis.hours` where there is none."""
    firsts = [int(s.counts.argmax()) for s in seen.series.values() if s.counts.any()]
    return min(firsts, default=axis.hours)


def reported(seen: Observed, axis: Axis) -> NDArray[np.bool_]:
    """Shape (hours,): whether any of its series has a sample."""
    found = np.zeros(axis.hours, np.bool_)
    for series in seen.series.values():
        found |= series.known
    return found


def coverage_of(seen: Observed, axis: Axis, hours: slice) -> float | None:
    """Known hours of those in which it should have reported, 0..1; None where it was not on.

    Sparse metrics have no datapoints while nothing happens: an hour that the ledger looked at in full is known without.
    """
    on = on_by_hour(seen, axis)[hours]
    if not on.any():
        return None
    known = reported(seen, axis)[hours]
    if ROLES[seen.key.service].sparse and seen.looked is not None:
        known = known | (seen.looked[hours] >= 1)
    return float((known & on).sum() / on.sum())


def metric_use(
    seen: Observed, metric: RoleMetric, ranges: Ranges, coverage: float | None
) -> MetricUse | None:
    """One role over the range; None where no series has a sample in the axis."""
    series, unit, rate = seen.level(metric.role), metric.unit, metric.rate
    top = seen.maximum(metric.role)
    if rate and (series is None or not series.counts.any()) and seen.a_sample(metric.role) is not None:
        series, unit, rate = seen.a_sample(metric.role), metric.sample_unit, False
    if (series is None or not series.counts.any()) and (top is None or not top.counts.any()):
        return None
    whole, week, before = ranges.whole, ranges.week, ranges.before
    scale = 1.0 if series is None or not rate else 1 / series.per_sample_s
    sums = None if series is None else np.where(series.known, series.sums, 0.0)
    averages = [
        None if series is None or sums is None else _average(sums[hours], series.counts[hours], scale)
        for hours in (whole, week, before)
    ]
    p95s, p95_of = _percentiles(series, (whole, week, before), scale)
    # A Maximum of a Sum's metric is of single samples (a packet, a message), and says nothing a second.
    peaks = [
        None if top is None or metric.rate else _greatest(top.maxs, hours) for hours in (whole, week, before)
    ]
    return MetricUse(
        metric.role,
        metric.name,
        figure_of(averages, unit, coverage, "there are no samples of the Average statistic"),
        figure_of(p95s, unit, coverage, "there are no samples of the Average statistic"),
        figure_of(peaks, metric.unit, coverage, "of a rate there is no peak" if metric.rate else NO_MAXIMUM),
        p95_of,
        0 if series is None else int(series.known[whole].sum()),
        () if series is None or sums is None else _daily(sums, series, ranges, scale),
    )


def figure_of(spans: list[float | None], unit: str, coverage: float | None, unknown: str) -> Figure:
    """Of its values over the range, its last 7 days and the 7 days before these."""
    value, week, before = spans
    return Figure(value, unit, before, coverage, unknown if value is None else "", week)


def _average(sums: Floats, counts: NDArray[np.integer], scale: float) -> float | None:
    count = int(counts.sum())
    return float(sums.sum(dtype=np.float64)) / count * scale if count else None


def _percentiles(
    series: SeriesHours | None, spans: tuple[slice, slice, slice], scale: float
) -> tuple[list[float | None], str]:
    """The 95th percentile over each span: merged from sketches where they were read, else of the hours' averages."""
    if series is None:
        return [None, None, None], SAMPLES
    merged = (series.p95.whole, series.p95.week, series.p95.before)
    if merged[0] is not None:
        return [None if one is None else one * scale for one in merged], SAMPLES
    averages = series.averages
    found: list[float | None] = []
    for hours in spans:
        known = averages[hours][series.known[hours]]
        found.append(float(np.percentile(known, 95)) * scale if len(known) else None)
    return found, HOURLY


def _greatest(values: Floats | None, hours: slice) -> float | None:
    if values is None:
        return None
    greatest = np.fmax.reduce(values[hours], initial=np.nan)
    return None if np.isnan(greatest) else float(greatest)


def _daily(sums: Floats, series: SeriesHours, ranges: Ranges, scale: float) -> tuple[float | None, ...]:
    """The average of each UTC day of the range; None where there are no samples."""
    if not len(ranges.days):
        return ()
    of_days = np.add.reduceat(sums[ranges.whole], ranges.days, dtype=np.float64)
    counts = np.add.reduceat(series.counts[ranges.whole], ranges.days, dtype=np.int64)
    return tuple(s / c * scale if c else None for s, c in zip(of_days.tolist(), counts.tolist(), strict=True))


def day_starts(axis: Axis, hours: slice) -> NDArray[np.intp]:
    """Where UTC days begin within a slice of an axis, its own beginning among them: for reduceat."""
    count = max(0, hours.stop - hours.start)
    to_midnight = -(axis.start_s // HOUR_S + hours.start) % DAY_H
    return np.unique(np.append(np.arange(to_midnight, count, DAY_H), 0)) if count else np.zeros(0, np.intp)


# --- idle -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class IdleHours:
    """By hour of an axis, shape (hours,): whether all activities are known, and whether all are below their limits too.

    `activity` has each activity's value by hour, NaN where it is not known; an activity that is not collected is not among them but in `lacking`.
    """

    known: NDArray[np.bool_]
    idle: NDArray[np.bool_]
    activity: Mapping[Activity, Floats]
    lacking: tuple[Activity, ...]
    by_maximum: bool
    """CPU and connections are of the Maximum statistic; else of the greatest average in the hour."""


def idle_hours(seen: Observed, axis: Axis, limits: Idle) -> IdleHours | None:
    """Hours in which it did nothing; None where no rule knows its service."""
    rules = ROLES[seen.key.service]
    if not rules.idle:
        return None
    found: dict[Activity, Floats] = {}
    by_maximum = True
    for activity, roles in rules.idle.items():
        if activity in (Activity.CPU, Activity.CONNECTIONS):
            values, of_maximum = _worst(seen, roles[0])
            by_maximum &= of_maximum
        else:
            values = together(seen, roles, rules.beside if activity is Activity.DISK else ())
        if values is not None:
            found[activity] = values
    known = np.full(axis.hours, bool(found))
    idle = known.copy()
    for activity, values in found.items():
        known &= ~np.isnan(values)
        idle &= values < limits.limit(activity)
    lacking = tuple(activity for activity in rules.idle if activity not in found)
    if lacking:
        known[:] = False
    return IdleHours(known, idle & known, found, lacking, by_maximum)


def _worst(seen: Observed, role: Role) -> tuple[Floats | None, bool]:
    """The greatest of each hour, and whether it is of the Maximum statistic."""
    top = seen.maximum(role)
    if top is not None and top.maxs is not None and top.counts.any():
        return top.maxs, True
    level = seen.level(role)
    if level is None or not level.counts.any():
        return None, False
    return (level.averages if level.maxs is None else level.maxs), False


def together(seen: Observed, roles: tuple[Role, ...], beside: tuple[Role, ...] = ()) -> Floats | None:
    """The sum of several rates by hour; NaN where one of those that are collected is not known, None where one of `roles` is not collected."""
    total: Floats | None = None
    for role in (*roles, *beside):
        level, values = seen.level(role), seen.values(role)
        if level is None or values is None or not level.counts.any():
            if role in roles:
                return None
            continue
        total = values if total is None else total + values
    return total
