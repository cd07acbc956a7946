"""The truth behind the simulated AWS: which metrics there are, and what CloudWatch answers about them when.

* **Pure.** A value is a function of (seed, series, timestamp, query time) and of nothing else. It is computed with
  integer hashes and IEEE additions, multiplications, divisions and roundings only, never a library's sine or random numbers, so
  that every machine computes the same bits.
* **Late.** A point is visible from some delay after its period's end, mostly short and never beyond the service's
  `settling_s`; a few in a hundred change once after they appeared, within the same time. Afterwards nothing changes:
  `points(…, asked_at_s=SETTLED)` is the final truth.
* **Consistent.** Minimum ≤ Average ≤ Maximum and Sum ≈ Average × SampleCount, at any query time; a coarser period is
  the aggregate of the finer points that are visible by then (an unfinished bucket changes as it fills).
* **Holes.** A few series in a hundred have gaps that never fill.

Times are whole seconds since the epoch, UTC; a point's timestamp is the start of its period.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shard_config.model import MetricProfile, ServiceProfile

SETTLED: Final = 1 << 40
"""A query time (in the year 36812) by which everything has settled."""

Dimensions = tuple[tuple[str, str], ...]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Hashes = NDArray[np.uint64]


class Metric(NamedTuple):
    """What ListMetrics lists. `dimensions` is sorted by name; `unit` is CloudWatch's word for it."""

    namespace: str
    name: str
    dimensions: Dimensions
    unit: str


class Question(NamedTuple):
    """What one GetMetricData query asks. A tuple, because a call makes 500. An empty `unit` takes any."""

    namespace: str
    metric: str
    dimensions: Dimensions
    stat: str
    period_s: int
    unit: str = ""


Answer = tuple[list[int], list[float]]
"""Timestamps, ascending, and the values at them."""

EMPTY: Final[Answer] = ([], [])


class Truth(Protocol):
    """What a simulated CloudWatch needs to know: made up (`World`) or recorded (`traces.TraceWorld`)."""

    @property
    def accounts(self) -> tuple[str, ...]: ...

    @property
    def regions(self) -> tuple[str, ...]: ...

    @property
    def ages(self) -> bool:
        """Whether CloudWatch's retention by age applies."""
        ...

    def metrics(self, account: str, region: str) -> Sequence[Metric]:
        """All metrics of a target, in one fixed order; none where the target is unknown."""
        ...

    def listed(self, account: str, region: str, asked_at_s: int, recently_active: bool) -> Sequence[Metric]:
        """The metrics that ListMetrics knows of at a time, in the order of `metrics`."""
        ...

    def answers(
        self,
        account: str,
        region: str,
        questions: Sequence[Question],
        start_s: int,
        end_s: int,
        asked_at_s: int,
    ) -> list[Answer]:
        """What is visible at `asked_at_s` with a timestamp in [start_s, end_s), one answer a question."""
        ...

    def points(
        self,
        account: str,
        region: str,
        namespace: str,
        metric: str,
        dimensions: Dimensions,
        stat: str,
        period_s: int,
        start_s: int,
        end_s: int,
        asked_at_s: int,
    ) -> tuple[Ints, Floats]:
        """The same for one question, as arrays of shape (n,)."""
        ...


_STATISTIC = re.compile(
    r"Average|Sum|Minimum|Maximum|SampleCount|IQM|tm\d{1,2}|p(\d{1,2}(?:\.\d{1,10})?|100)"
)


def known_statistic(stat: str) -> bool:
    """Whether a truth can answer about it: the five simple statistics, pNN, tmNN and IQM."""
    return _STATISTIC.fullmatch(stat) is not None


def account_ids(count: int) -> tuple[str, ...]:
    """Deterministic account ids: 100000000001, 100000000002, …"""
    return tuple(str(100_000_000_001 + n) for n in range(count))


# --- what the services look like ------------------------------------------------------------------------------

_RESOURCES: Final[Mapping[str, tuple[str, str, int]]] = {
    "AWS/EC2": ("InstanceId", "i-", 17),
    "AWS/RDS": ("DBInstanceIdentifier", "db-", 12),
    "AWS/Lambda": ("FunctionName", "function-", 12),
    "AWS/SQS": ("QueueName", "queue-", 12),
    "AWS/ApplicationELB": ("LoadBalancer", "app/alb/", 16),
    "AWS/EBS": ("VolumeId", "vol-", 17),
    "AWS/DynamoDB": ("TableName", "table-", 12),
}
"""By namespace: the dimension, and how its values look: a prefix and so many hexadecimal digits."""
_ANY_RESOURCE: Final = ("ResourceId", "r-", 12)

_ALL_METRICS: Final = (
    MetricProfile(name="Requests", unit="Count", min=0),
    MetricProfile(name="Errors", unit="Count", min=0),
    MetricProfile(name="Latency", unit="Milliseconds", min=0),
    MetricProfile(name="Utilization", unit="Percent", min=0, max=100),
)
"""Metrics of a service whose profile says "all"."""

_SPANS: Final[Mapping[str, float]] = {
    "Percent": 100.0,
    "Bytes": 1e9,
    "Bytes/Second": 1e8,
    "Seconds": 10.0,
    "Milliseconds": 2000.0,
    "Microseconds": 500_000.0,
    "Count": 2000.0,
    "Count/Second": 500.0,
}
"""From the least to the greatest value, by unit, where the profile gives no bounds."""

_SAMPLES: Final = 5
"""Samples of one point, as of a source that reports five times a period; they give Average its long tails of digits."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What all targets have in common: a row for each metric."""

    profiles: tuple[ServiceProfile, ...]
    names: tuple[MetricProfile, ...]
    instance: tuple[int, ...]
    low: Floats
    high: Floats
    scale: Floats
    """Values are whole multiples of 1/scale."""
    samples: Floats
    grid_s: Ints
    settling_s: Ints


@dataclass(frozen=True, slots=True)
class _Target:
    """One account and region: a row for each metric."""

    metrics: tuple[Metric, ...]
    rows: dict[tuple[str, str, Dimensions], int]
    hashes: Hashes
    top: Floats
    daily: Floats
    noise: Floats
    phase: Floats
    sparse: NDArray[np.bool_]
    born_s: Ints


def _bounds(metric: MetricProfile) -> tuple[float, float]:
    span = _SPANS.get(metric.unit, 1000.0)
    if metric.min is not None:
        return metric.min, metric.max if metric.max is not None else metric.min + span
    if metric.max is not None:
        return (0.0 if metric.max > 0 else metric.max - span), metric.max
    return 0.0, span


def _shape(profiles: Sequence[ServiceProfile], count: int) -> _Shape:
    """Deal `count` metrics out: profiles get equal parts, and a part is filled resource by resource."""
    services: list[ServiceProfile] = []
    names: list[MetricProfile] = []
    instance: list[int] = []
    for p, profile in enumerate(profiles):
        of_profile = _ALL_METRICS if profile.metrics == "all" else profile.metrics
        for n in range(count // len(profiles) + (p < count % len(profiles))):
            services.append(profile)
            names.append(of_profile[n % len(of_profile)])
            instance.append(n // len(of_profile))
    bounds = [_bounds(m) for m in names]
    return _Shape(
        profiles=tuple(services),
        names=tuple(names),
        instance=tuple(instance),
        low=np.array([b[0] for b in bounds]),
        high=np.array([b[1] for b in bounds]),
        scale=np.array([1.0 if m.unit in ("Count", "Bytes") else 1000.0 for m in names]),
        # A bounded metric that is asked for its Sum has one sample a point, so that the Sum keeps within the bounds too.
        samples=np.array([1.0 if m.max is not None and "Sum" in m.statistics else _SAMPLES for m in names]),
        grid_s=np.array([s.period_s for s in services], dtype=np.int64),
        settling_s=np.array([s.settling_s for s in services], dtype=np.int64),
    )


# --- arithmetic -----------------------------------------------------------------------------------------------


def _mix(x: Hashes) -> Hashes:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014), on each element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _field(x: Hashes, shift: int, bits: int) -> Floats:
    """Some bits of each hash as a number in [0, 1), exactly."""
    return ((x >> np.uint64(shift)) & np.uint64((1 << bits) - 1)).astype(np.float64) / float(1 << bits)


def _wave(times_s: Floats, length_s: float, phase: Floats) -> Floats:
    """A parabola's imitation of a sine, in [-1, 1]: the same bits everywhere, which a library's sine is not."""
    x = times_s / length_s + phase
    x = 2.0 * (x - np.floor(x)) - 1.0
    return 4.0 * x * (1.0 - np.abs(x))


@dataclass(frozen=True, slots=True)
class _Points:
    """Points of `rows` × `times_s`, before they are cut to what is visible; all of shape (rows, times)."""

    visible: NDArray[np.bool_]
    sum: Floats
    """In units of 1/scale."""
    minimum: Floats
    maximum: Floats


def _evaluate(shape: _Shape, target: _Target, rows: Ints, times_s: Ints, asked_at_s: int) -> _Points:
    """Each row at each time, as known at `asked_at_s`."""

    def column(values: NDArray[np.float64]) -> Floats:
        return values[rows][:, None]

    grid_s, settling_s = shape.grid_s[rows][:, None], shape.settling_s[rows][:, None]
    low, high, scale, samples = (
        column(shape.low),
        column(shape.high),
        column(shape.scale),
        column(shape.samples),
    )
    x = _mix(target.hashes[rows][:, None] + _mix(times_s.astype(np.uint64))[None, :])

    late = _field(x, 0, 16)
    late = late * late * late
    delay_s = (settling_s * (late * late)).astype(np.int64)
    age_s = asked_at_s - times_s[None, :] - grid_s
    visible = (age_s >= delay_s) & (times_s[None, :] >= target.born_s[rows][:, None])
    if target.sparse[rows].any():
        hour = _mix(
            target.hashes[rows][:, None] ^ _mix((times_s[None, :] // (12 * grid_s)).astype(np.uint64))
        )
        gap = (_field(hour, 0, 8) < 0.25) | (_field(x, 28, 4) == 0.0)
        visible &= ~(gap & target.sparse[rows][:, None])

    times = times_s.astype(np.float64)[None, :]
    load = 0.5 + column(target.daily) * _wave(times, 86_400.0, column(target.phase))
    load += 0.08 * _wave(times, 604_800.0, column(target.phase))
    load += column(target.noise) * (_field(x, 16, 12) - 0.5)
    value = low + (high - low) * column(target.top) * np.clip(load, 0.0, 1.0)

    revised_s = np.minimum(
        delay_s + 1 + ((settling_s - delay_s) * _field(x, 40, 12)).astype(np.int64), settling_s
    )
    provisional = (_field(x, 32, 8) < 0.04) & (age_s < revised_s)
    value = np.where(provisional, low + (value - low) * (0.5 + 0.4 * _field(x, 52, 8)), value)

    total = np.clip(np.rint(value * samples * scale), low * samples * scale, high * samples * scale)
    spread = 0.3 * _field(x, 52, 12)
    return _Points(
        visible,
        total,
        np.where(samples > 1, np.floor((value - (value - low) * spread) * scale) / scale, total / scale),
        np.where(samples > 1, np.ceil((value + (high - value) * spread) * scale) / scale, total / scale),
    )


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


class World:
    """Made-up metrics of accounts × regions; a `Truth`.

    Args:
        seed: Another seed is another world; the same one is the same on every machine.
        accounts: Account ids, 12 digits each (`account_ids`).
        regions: Every account has all of them.
        metrics_per_target: CloudWatch metrics of each account and region, dealt out evenly over the profiles.
        profiles: The services; `period_s` is the resolution at which a service reports.
        silent_share: This share of the metrics is listed but has no points, as if they had ceased long ago.
        newborn_share: This share of the metrics has points, and is listed, only from `newborn_at_s` on.
    """

    ages = True

    _METRICS_KEPT_MAX = 1_000_000
    """Tables of targets are kept up to so many metrics in all (about 1 GB), then the least recently used go."""

    _CELLS_MAX = 1 << 18
    """Series × times evaluated at once: bounds the memory of one call."""

    def __init__(
        self,
        seed: int,
        accounts: Sequence[str],
        regions: Sequence[str],
        metrics_per_target: int,
        profiles: Sequence[ServiceProfile],
        *,
        silent_share: float = 0.0,
        newborn_share: float = 0.0,
        newborn_at_s: int = 0,
    ) -> None:
        if not profiles:
            raise ValueError("a world needs at least one service profile")
        self.seed = seed
        self.accounts = tuple(accounts)
        self.regions = tuple(regions)
        self._silent_share = silent_share
        self._newborn_share = newborn_share
        self._newborn_at_s = newborn_at_s
        self._shape = _shape(profiles, metrics_per_target)
        self._targets: OrderedDict[tuple[str, str], _Target] = OrderedDict()
        self._known = {(a, r) for a in self.accounts for r in self.regions}

    def metrics(self, account: str, region: str) -> Sequence[Metric]:
        target = self._target(account, region)
        return target.metrics if target else ()

    def listed(self, account: str, region: str, asked_at_s: int, recently_active: bool) -> Sequence[Metric]:
        target = self._target(account, region)
        if target is None:
            return ()
        shown = target.born_s <= asked_at_s
        if not recently_active:
            shown |= target.born_s == SETTLED
        return target.metrics if shown.all() else [target.metrics[i] for i in np.flatnonzero(shown)]

    def answers(
        self,
        account: str,
        region: str,
        questions: Sequence[Question],
        start_s: int,
        end_s: int,
        asked_at_s: int,
    ) -> list[Answer]:
        """What is visible at `asked_at_s` with a timestamp in [start_s, end_s), one answer a question.

        Timestamps are multiples of the period; one finer than the service's own gives the service's own points.
        Raises ValueError where a statistic is unknown.
        """
        answers = [EMPTY] * len(questions)
        target = self._target(account, region)
        if target is None:
            return answers
        groups: dict[tuple[str, int, int], tuple[list[int], list[int]]] = {}
        for position, question in enumerate(questions):
            namespace, name, dimensions, stat, period_s, unit = question
            row = target.rows.get((namespace, name, dimensions))
            if row is None or (unit and unit != target.metrics[row].unit):
                continue
            key = (stat, period_s, int(self._shape.profiles[row].period_s))
            positions, rows = groups.setdefault(key, ([], []))
            positions.append(position)
            rows.append(row)
        for (stat, period_s, grid_s), (positions, rows) in groups.items():
            first_s = -(-start_s // period_s) * period_s
            last_s = min(-(-end_s // period_s) * period_s, asked_at_s - grid_s + 1)
            times_s = np.arange(-(-first_s // grid_s) * grid_s, last_s, grid_s, dtype=np.int64)
            step = max(1, self._CELLS_MAX // max(1, len(times_s)))
            for i in range(0, len(rows), step):
                some = np.array(rows[i : i + step], dtype=np.int64)
                found = self._answer(target, some, stat, period_s, times_s, asked_at_s)
                for position, answer in zip(positions[i : i + step], found, strict=True):
                    answers[position] = answer
        return answers

    def points(
        self,
        account: str,
        region: str,
        namespace: str,
        metric: str,
        dimensions: Dimensions,
        stat: str,
        period_s: int,
        start_s: int,
        end_s: int,
        asked_at_s: int,
    ) -> tuple[Ints, Floats]:
        question = Question(namespace, metric, dimensions, stat, period_s)
        [(times_s, values)] = self.answers(account, region, [question], start_s, end_s, asked_at_s)
        return np.array(times_s, dtype=np.int64), np.array(values, dtype=np.float64)

    def _answer(
        self, target: _Target, rows: Ints, stat: str, period_s: int, times_s: Ints, asked_at_s: int
    ) -> list[Answer]:
        """One answer a row, all of one grid, statistic and period."""
        shape = self._shape
        points = _evaluate(shape, target, rows, times_s, asked_at_s)
        row, column = np.nonzero(points.visible)
        timestamps_s = times_s[column] // period_s * period_s
        total, count = points.sum[row, column], shape.samples[rows][row]
        minimum, maximum = points.minimum[row, column], points.maximum[row, column]
        starts = np.flatnonzero(np.diff(timestamps_s, prepend=-1) | np.diff(row, prepend=-1))
        if 0 < len(starts) < len(row):
            total, count = np.add.reduceat(total, starts), np.add.reduceat(count, starts)
            minimum, maximum = np.minimum.reduceat(minimum, starts), np.maximum.reduceat(maximum, starts)
            row, timestamps_s = row[starts], timestamps_s[starts]

        of_row = rows[row]
        total = total / shape.scale[of_row]
        if stat == "Sum":
            values = total
        elif stat == "SampleCount":
            values = count
        else:
            low, high = shape.low[of_row], shape.high[of_row]
            average = np.clip(total / count, low, high)
            minimum = np.clip(np.minimum(minimum, average), low, high)
            maximum = np.clip(np.maximum(maximum, average), low, high)
            values = _statistic(stat, average, minimum, maximum)
        ends = np.cumsum(np.bincount(row, minlength=len(rows))).tolist()
        times, numbers, start = timestamps_s.tolist(), values.tolist(), 0
        answers: list[Answer] = []
        for end in ends:
            answers.append((times[start:end], numbers[start:end]))
            start = end
        return answers

    def _target(self, account: str, region: str) -> _Target | None:
        key = (account, region)
        if key not in self._known:
            return None
        target = self._targets.get(key)
        if target is None:
            kept_max = max(1, self._METRICS_KEPT_MAX // max(1, len(self._shape.names)))
            while len(self._targets) >= kept_max:
                self._targets.popitem(last=False)
            target = self._targets[key] = self._make(account, region)
        self._targets.move_to_end(key)
        return target

    def _make(self, account: str, region: str) -> _Target:
        metrics: list[Metric] = []
        digests: list[bytes] = []
        for profile, metric, instance in zip(
            self._shape.profiles, self._shape.names, self._shape.instance, strict=True
        ):
            of = f"{self.seed} {account} {region} {profile.namespace} {profile.service}"
            dimension, prefix, digits = _RESOURCES.get(profile.namespace, _ANY_RESOURCE)
            name = prefix + blake2b(f"{of} {instance}".encode(), digest_size=9).hexdigest()[:digits]
            metrics.append(
                Metric(profile.namespace, metric.name, ((dimension, name),), metric.unit or "None")
            )
            digests.append(blake2b(f"{of} {name} {metric.name}".encode(), digest_size=8).digest())
        hashes = np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)
        kind = _mix(hashes)
        born_s = np.where(_field(kind, 48, 16) < self._newborn_share, self._newborn_at_s, 0)
        return _Target(
            metrics=tuple(metrics),
            rows={m[:3]: row for row, m in enumerate(metrics)},
            hashes=hashes,
            top=0.05 + 0.95 * _field(kind, 0, 8),
            daily=0.05 + 0.25 * _field(kind, 8, 8),
            noise=0.02 + 0.22 * _field(kind, 16, 8),
            phase=_field(kind, 24, 8),
            sparse=_field(kind, 32, 8) < 0.03,
            born_s=np.where(_field(kind, 40, 8) < self._silent_share, SETTLED, born_s).astype(np.int64),
        )
