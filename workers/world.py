"""The truth behind the simulated AWS: which metrics there are, and what CloudWatch answers about them when.

* **Pure.** A value is a function of (seed, series, timestamp, query time) and of nothing else, the same bits on every
  machine (`workers.simulated.values`).
* **Late.** A point is visible from some delay after its period's end, mostly short and never beyond the service's
  `settling_s`; a few in a hundred change once after they appeared, within the same time. Afterwards nothing changes:
  `points(…, asked_at_s=SETTLED)` is the final truth.
* **Consistent.** Minimum ≤ Average ≤ Maximum and Sum ≈ Average × SampleCount, at any query time; a coarser period is
  the aggregate of the finer points that are visible by then (an unfinished bucket changes as it fills).
* **Holes.** A few series in a hundred have gaps that never fill.

Times are whole seconds since the epoch, UTC; a point's timestamp is the start of its period.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NamedTuple, Protocol

import numpy as np

from shard_config.model import MetricProfile, ServiceProfile
from workers.simulated.values import (
    SETTLED,
    UNBORN,
    Answer,
    Columns,
    Floats,
    Ints,
    Kinds,
    answers_of,
    columns,
)

__all__ = ["SETTLED", "Answer", "Metric", "Question", "Truth", "World", "account_ids"]

Dimensions = tuple[tuple[str, str], ...]


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


EMPTY: Final[Answer] = ([], [])


class Truth(Protocol):
    """What a simulated CloudWatch needs to know: made up (`World`) or recorded (`traces.TraceWorld`)."""

    seed: int = 0
    accounts: tuple[str, ...]
    regions: tuple[str, ...]
    ages: bool
    """Whether CloudWatch's retention by age applies."""

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
        question = Question(namespace, metric, dimensions, stat, period_s)
        [(times_s, values)] = self.answers(account, region, [question], start_s, end_s, asked_at_s)
        return np.array(times_s, dtype=np.int64), np.array(values, dtype=np.float64)


def account_ids(count: int) -> tuple[str, ...]:
    """Deterministic account ids: 100000000001, 100000000002, …"""
    return tuple(str(100_000_000_001 + n) for n in range(count))


# --- what the services look like ------------------------------------------------------------------------------

_RESOURCES: Final[Mapping[str, tuple[str, str, int]]] = {
    "AWS/ApiGateway": ("ApiName", "api-", 12),
    "AWS/ApplicationELB": ("LoadBalancer", "app/alb/", 16),
    "AWS/CloudFront": ("DistributionId", "E", 13),
    "AWS/DynamoDB": ("TableName", "table-", 12),
    "AWS/EBS": ("VolumeId", "vol-", 17),
    "AWS/EC2": ("InstanceId", "i-", 17),
    "AWS/ECS": ("ClusterName", "cluster-", 12),
    "AWS/ELB": ("LoadBalancerName", "elb-", 12),
    "AWS/ElastiCache": ("CacheClusterId", "cache-", 12),
    "AWS/Kafka": ("Cluster Name", "kafka-", 12),
    "AWS/Kinesis": ("StreamName", "stream-", 12),
    "AWS/Lambda": ("FunctionName", "function-", 12),
    "AWS/NATGateway": ("NatGatewayId", "nat-", 17),
    "AWS/NetworkELB": ("LoadBalancer", "net/nlb/", 16),
    "AWS/RDS": ("DBInstanceIdentifier", "db-", 12),
    "AWS/S3": ("BucketName", "bucket-", 12),
    "AWS/SNS": ("TopicName", "topic-", 12),
    "AWS/SQS": ("QueueName", "queue-", 12),
    "ContainerInsights": ("ClusterName", "eks-", 12),
}
"""By namespace: the dimension, and how its values look: a prefix and so many hexadecimal digits."""
_BESIDE: Final[Mapping[str, Dimensions]] = {"AWS/S3": (("StorageType", "StandardStorage"),)}
"""Dimensions that all metrics of a namespace have beside their resource's; they sort behind it."""
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

_SAMPLES: Final = 5.0
"""Samples of one point, as of a source that reports five times a period; they give Average its long tails of digits."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all targets have in common: a row for each metric. `instance` counts the resources of a service."""

    profiles: tuple[ServiceProfile, ...]
    names: tuple[MetricProfile, ...]
    instance: tuple[int, ...]
    kinds: Kinds


@dataclass(frozen=True, slots=True)
class _Target:
    """One account and region: a row for each metric."""

    metrics: tuple[Metric, ...]
    rows: dict[tuple[str, str, Dimensions], int]
    series: Columns


def _bounds(metric: MetricProfile) -> tuple[float, float]:
    span = _SPANS.get(metric.unit, 1000.0)
    if metric.min is not None:
        return metric.min, metric.max if metric.max is not None else metric.min + span
    if metric.max is not None:
        return (0.0 if metric.max > 0 else metric.max - span), metric.max
    return 0.0, span


def _plan(profiles: Sequence[ServiceProfile], count: int) -> _Plan:
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
    kinds = Kinds(
        low=np.array([b[0] for b in bounds]),
        high=np.array([b[1] for b in bounds]),
        scale=np.array([1.0 if m.unit in ("Count", "Bytes") else 1000.0 for m in names]),
        # A bounded metric that is asked for its Sum has one sample a point, so that the Sum keeps within the bounds too.
        samples=np.array([1.0 if m.max is not None and "Sum" in m.statistics else _SAMPLES for m in names]),
        grid_s=np.array([s.period_s for s in services], dtype=np.int64),
        settling_s=np.array([s.settling_s for s in services], dtype=np.int64),
    )
    return _Plan(tuple(services), tuple(names), tuple(instance), kinds)


class World(Truth):
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
        self._plan = _plan(profiles, metrics_per_target)
        self._targets: OrderedDict[tuple[str, str], _Target] = OrderedDict()
        self._births: list[int] = []
        self._silences: list[tuple[str, int, int]] = []
        self._known = {(a, r) for a in self.accounts for r in self.regions}

    def add_account(self, account: str) -> None:
        """One more account, in all regions, as if it had been there from the beginning."""
        if account not in self.accounts:
            self.accounts = (*self.accounts, account)
            self._known |= {(account, region) for region in self.regions}

    def bear(self, at_s: int) -> None:
        """Have a quarter of the metrics that are not born yet (`newborn_at_s=UNBORN`) come to be: the next one at each call."""
        self._births.append(at_s)
        self._targets.clear()

    def silence(self, account: str, from_s: int, until_s: int) -> None:
        """No metric of an account has a point in [from_s, until_s). Pure only where nothing of that time was seen yet."""
        self._silences.append((account, from_s, until_s))

    def metrics(self, account: str, region: str) -> Sequence[Metric]:
        target = self._target(account, region)
        return target.metrics if target else ()

    def listed(self, account: str, region: str, asked_at_s: int, recently_active: bool) -> Sequence[Metric]:
        target = self._target(account, region)
        if target is None:
            return ()
        shown = target.series.born_s <= asked_at_s
        if not recently_active:
            shown |= target.series.born_s == SETTLED
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
            key = (stat, period_s, int(self._plan.profiles[row].period_s))
            positions, rows = groups.setdefault(key, ([], []))
            positions.append(position)
            rows.append(row)
        for (stat, period_s, grid_s), (positions, rows) in groups.items():
            first_s = -(-start_s // period_s) * period_s
            last_s = min(-(-end_s // period_s) * period_s, asked_at_s - grid_s + 1)
            times_s = np.arange(-(-first_s // grid_s) * grid_s, last_s, grid_s, dtype=np.int64)
            for silent, from_s, until_s in self._silences:
                if silent == account:
                    times_s = times_s[(times_s < from_s) | (times_s >= until_s)]
            step = max(1, self._CELLS_MAX // max(1, len(times_s)))
            for i in range(0, len(rows), step):
                some = np.array(rows[i : i + step], dtype=np.int64)
                found = answers_of(target.series, some, stat, period_s, times_s, asked_at_s)
                for position, answer in zip(positions[i : i + step], found, strict=True):
                    answers[position] = answer
        return answers

    def _target(self, account: str, region: str) -> _Target | None:
        key = (account, region)
        if key not in self._known:
            return None
        target = self._targets.get(key)
        if target is None:
            kept_max = max(1, self._METRICS_KEPT_MAX // max(1, len(self._plan.names)))
            while len(self._targets) >= kept_max:
                self._targets.popitem(last=False)
            target = self._targets[key] = self._make(account, region)
        self._targets.move_to_end(key)
        return target

    def _make(self, account: str, region: str) -> _Target:
        metrics: list[Metric] = []
        digests: list[bytes] = []
        for profile, metric, instance in zip(
            self._plan.profiles, self._plan.names, self._plan.instance, strict=True
        ):
            of = f"{self.seed} {account} {region} {profile.namespace} {profile.service}"
            dimension, prefix, digits = _RESOURCES.get(profile.namespace, _ANY_RESOURCE)
            name = prefix + blake2b(f"{of} {instance}".encode(), digest_size=9).hexdigest()[:digits]
            dimensions = ((dimension, name), *_BESIDE.get(profile.namespace, ()))
            metrics.append(Metric(profile.namespace, metric.name, dimensions, metric.unit or "None"))
            digests.append(blake2b(f"{of} {name} {metric.name}".encode(), digest_size=8).digest())
        series = columns(
            self._plan.kinds,
            b"".join(digests),
            silent_share=self._silent_share,
            newborn_share=self._newborn_share,
            newborn_at_s=self._newborn_at_s,
        )
        for n, at_s in enumerate(self._births):
            series.born_s[(series.born_s == UNBORN) & (series.hashes % 4 == n % 4)] = at_s
        return _Target(tuple(metrics), {m[:3]: row for row, m in enumerate(metrics)}, series)
