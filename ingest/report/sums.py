"""Resources summed up: by account, region, service and all together, and by hour of the week. Pure.

Guarantees:

* *sums are weighted by size*: many small busy machines do not hide a big idle one. Without any size each resource counts the same, and
  `weighted_by` says so; with sizes, what has none is left out and counted (`unsized`);
* one resource is in memory at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ingest.report.model import GroupUse, HeatMap, Level, Money, ResourceUse, VerdictKind
from ingest.report.resources import DAY_H, HOUR_S, WEEK_H, Floats, Observed, SeriesHours
from ingest.report.utilization import NO_MAXIMUM, Ranges, figure_of
from shard_config.report import Role


@dataclass(slots=True)
class _Sum:
    """Weighted sums over resources. Twice: by vCPU, and each the same, for whether any size is known is known last."""

    resources: int = 0
    sized: int = 0
    unsized: int = 0
    of: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 2, 3)))
    """By weighting, by average and p95, by range, week and before."""
    weight_of: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 2, 3)))
    peaks: list[float | None] = field(default_factory=lambda: [None, None, None])
    covered: float = 0.0
    expected: float = 0.0
    idle: int = 0
    oversized: int = 0
    wastes: list[Money] = field(default_factory=list)


@dataclass(slots=True)
class _Heat:
    """Sums by hour of the axis, by both weightings: shape (2, hours)."""

    sums: NDArray[np.float64]
    weights: NDArray[np.float64]
    resources: int = 0
    sized: int = 0


@dataclass(slots=True)
class Sums:
    """Resources summed up by account, region, service and all: `add` each once, then ask for `groups` and `heat_maps`."""

    ranges: Ranges
    _sums: dict[tuple[Level, str, str], _Sum] = field(default_factory=lambda: defaultdict(_Sum))
    _heat: dict[str, _Heat] = field(default_factory=dict)

    def add(self, seen: Observed, use: ResourceUse) -> None:
        key = use.key
        for level, account, name in (
            (Level.ALL, "", ""),
            (Level.ACCOUNT, key.account, key.account),
            (Level.REGION, key.account, key.region),
            (Level.SERVICE, key.account, key.service),
        ):
            _add(self._sums[level, account, name], use)
        if (cpu := seen.level(Role.CPU)) is not None and cpu.counts.any():
            for account in ("", key.account):
                self._warm(account, cpu, use.size.vcpu)

    def _warm(self, account: str, cpu: SeriesHours, vcpu: float | None) -> None:
        heat = self._heat.get(account)
        if heat is None:
            shape = (2, self.ranges.axis.hours)
            heat = self._heat[account] = _Heat(np.zeros(shape), np.zeros(shape))
        values = cpu.averages if cpu.p95s is None else cpu.p95s
        known = cpu.known & ~np.isnan(values)
        filled = np.where(known, values, 0.0)
        heat.resources += 1
        heat.sized += vcpu is not None
        for weighting, weight in enumerate((vcpu or 0.0, 1.0)):
            heat.sums[weighting] += filled * weight
            heat.weights[weighting] += known * weight

    def groups(self) -> tuple[GroupUse, ...]:
        """Everything first, then accounts, regions and services by name."""
        order = list(Level)
        return tuple(
            _group(level, account, name, one)
            for (level, account, name), one in sorted(
                self._sums.items(), key=lambda item: (order.index(item[0][0]), *item[0][1:])
            )
        )

    def heat_maps(self) -> tuple[HeatMap, ...]:
        """All accounts, then each, where any CPU is known."""
        return tuple(
            _heat_map(account or "all accounts", heat, self.ranges)
            for account, heat in sorted(self._heat.items())
        )


def _add(total: _Sum, use: ResourceUse) -> None:
    total.resources += 1
    total.idle += use.verdict.kind is VerdictKind.IDLE
    total.oversized += use.verdict.kind is VerdictKind.OVERSIZED
    if use.verdict.waste is not None:
        total.wastes.append(use.verdict.waste)
    if use.coverage is not None:
        total.covered += use.coverage * use.lived_s
        total.expected += use.lived_s
    cpu = use.use(Role.CPU)
    if cpu is None:
        return
    total.sized += use.size.vcpu is not None
    total.unsized += use.size.vcpu is None
    for weighting, size in enumerate((use.size.vcpu or 0.0, 1.0)):
        for kind, figure in enumerate((cpu.average, cpu.p95)):
            for span, value in enumerate((figure.value, figure.week, figure.before)):
                if value is not None:
                    # What lived half of the range counts half.
                    total.of[weighting, kind, span] += value * size * cpu.hours
                    total.weight_of[weighting, kind, span] += size * cpu.hours
    for span, peak in enumerate((cpu.peak.value, cpu.peak.week, cpu.peak.before)):
        if peak is not None:
            total.peaks[span] = max(peak, total.peaks[span] or 0.0)


def _group(level: Level, account: str, name: str, total: _Sum) -> GroupUse:
    weighting = 0 if total.sized else 1
    coverage = total.covered / total.expected if total.expected else None
    with np.errstate(invalid="ignore"):
        means = total.of[weighting] / total.weight_of[weighting]
    average, p95 = ([None if np.isnan(v) else float(v) for v in row] for row in means)
    return GroupUse(
        level,
        account,
        name,
        total.resources,
        figure_of(average, "percent", coverage, "no CPU is measured"),
        figure_of(p95, "percent", coverage, "no CPU is measured"),
        figure_of(total.peaks, "percent", coverage, NO_MAXIMUM),
        ("vcpu", "resource")[weighting],
        total.idle,
        total.oversized,
        money_sum(total.wastes),
        coverage,
        total.unsized if total.sized else 0,
    )


def money_sum(wastes: Sequence[Money]) -> Money | None:
    """None of none. The assumption is that of all, or says that there are several."""
    if not wastes:
        return None
    assumptions = sorted({w.assumption for w in wastes})
    return Money(
        float(np.sum([w.list_usd_per_month for w in wastes])),
        float(np.sum([w.effective_usd_per_month for w in wastes])),
        "; ".join(assumptions[:3]) + (" and others" if len(assumptions) > 3 else ""),
    )


def _heat_map(title: str, heat: _Heat, ranges: Ranges) -> HeatMap:
    weighting = 0 if heat.sized else 1
    with np.errstate(invalid="ignore"):
        percent = heat.sums[weighting] / heat.weights[weighting]
    values = percent[ranges.whole]
    known = ~np.isnan(values)
    week, before = (_mean(percent[hours]) for hours in (ranges.week, ranges.before))
    return HeatMap(
        title,
        tuple(_rows(values, known, ranges)),
        ("vcpu", "resource")[weighting],
        heat.sized or heat.resources,
        float(known.mean()) if len(known) else None,
        None if week is None or before is None else week - before,
    )


def _rows(values: Floats, known: NDArray[np.bool_], ranges: Ranges) -> Iterator[tuple[float | None, ...]]:
    # 1970-01-01 was a Thursday.
    first = ranges.axis.start_s // HOUR_S + ranges.whole.start + 3 * DAY_H
    at = (first + np.arange(len(values))) % WEEK_H
    sums = np.bincount(at[known], weights=values[known], minlength=WEEK_H)
    counts = np.bincount(at[known], minlength=WEEK_H)
    for day in range(7):
        hours = range(day * DAY_H, (day + 1) * DAY_H)
        yield tuple(float(sums[h] / counts[h]) if counts[h] else None for h in hours)


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
