"""Which resource a series belongs to, and what is known of a resource by hour: the input of all that the report works out. Pure.

Guarantees:

* *a series is one resource's or none's*: those of groups (an auto-scaling group, an instance type) are nobody's, so nothing is counted twice;
* *no samples are no samples*: an hour without any is NaN, never 0;
* *an hour in which samples are missing is not read as a quiet one*: sums are told at the rate of the samples that are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from ingest.inventory.model import Lived, Resource
from ingest.report.model import ResourceKey
from shard_config.report import ROLES, Role, RoleMetric

HOUR_S: Final = 3600
DAY_H: Final = 24
WEEK_H: Final = 7 * DAY_H

Floats = NDArray[np.floating]
"""Float64, or float32 where memory matters."""


# --- series to resources ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A series' place in its resource."""

    service: str
    id: str
    metric: RoleMetric
    statistic: str


_BY_NAMESPACE: Final = {(roles.namespace, roles.dimensions): service for service, roles in ROLES.items()}


def place_of(
    namespace: str, metric: str, dimensions: Sequence[tuple[str, str]], statistic: str
) -> Place | None:
    """The resource that a series says something about, and what; None where it is of no resource, or of no role.

    `dimensions` are sorted by name, as in `ingest.model.SeriesKey`.
    """
    service = _BY_NAMESPACE.get((namespace, tuple(name for name, _ in dimensions)))
    if service is None or (found := ROLES[service].metric(metric)) is None:
        return None
    if statistic not in _STATISTICS[found.rate]:
        return None
    said = A_SAMPLE if found.rate and statistic == "Average" else statistic
    return Place(service, id_of(service, dimensions), found, said)


def id_of(service: str, dimensions: Sequence[tuple[str, str]]) -> str:
    """A resource's id, as the inventory has it: the value of its dimension; of two, both with a slash between, the greater thing first."""
    values = [value for _, value in dimensions]
    if service == "elasticache":
        # The inventory lists clusters; all but Memcached's have one node.
        return values[0]
    return "/".join(reversed(values) if service == "msk" else values)


A_SAMPLE: Final = "Average a sample"
"""What the Average of a rate's metric is called here: no level, for it says nothing a second."""
_STATISTICS: Final = {True: ("Sum", "Maximum", "Average"), False: ("Average", "Maximum", "Minimum")}


def brokers_lives(
    lives: Mapping[ResourceKey, Lived], keys: Iterable[ResourceKey]
) -> dict[ResourceKey, Lived]:
    """`lives`, with each Kafka cluster that has brokers among `keys` replaced by these: metrics are a broker's, and the inventory lists clusters.

    A broker has its share of what its cluster has.
    """
    found, clusters = dict(lives), set()
    for key in keys:
        cluster = replace(key, id=key.id.rpartition("/")[0])
        if key.service == "msk" and (lived := lives.get(cluster)) is not None:
            spans = tuple(replace(span, resource=_broker(span.resource, key.id)) for span in lived.spans)
            found[key] = replace(lived, spans=spans)
            clusters.add(cluster)
    return {key: lived for key, lived in found.items() if key not in clusters}


def _broker(cluster: Resource, id_: str) -> Resource:
    nodes = cluster.nodes or 1

    def share(whole: int | None) -> int | None:
        return None if whole is None else whole // nodes

    return replace(
        cluster, id=id_, nodes=1, group=f"cluster:{cluster.id}", vcpu=share(cluster.vcpu),
        memory_bytes=share(cluster.memory_bytes), storage_bytes=share(cluster.storage_bytes),
    )  # fmt: skip


# --- by hour ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Axis:
    """The hours that were read: `hours` of them from `start_s`, a multiple of 3600. Indices count from there."""

    start_s: int
    hours: int

    @property
    def end_s(self) -> int:
        return self.start_s + self.hours * HOUR_S

    def index(self, time_s: int) -> int:
        """Of the hour that a time lies in, clipped to the axis."""
        return min(max((time_s - self.start_s) // HOUR_S, 0), self.hours)

    def slice(self, from_s: int, to_s: int) -> slice:
        """The whole hours of [from_s, to_s): one that began before `from_s` is not among them."""
        return slice(self.index(from_s + HOUR_S - 1), self.index(to_s))


@dataclass(frozen=True, slots=True)
class Merged:
    """The 95th percentile of a series' samples over a span, merged from sketches; None: not known."""

    whole: float | None = None
    """Over the report's range."""
    week: float | None = None
    before: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SeriesHours:
    """One statistic of a metric by hour of an axis, shape (hours,) each; where `counts` is 0 the others are NaN.

    `counts` is the number of samples; `sums`, `maxs`, `p95s` and `mins` are of their values. Columns that were not read are None.
    """

    counts: NDArray[np.integer]
    sums: Floats
    maxs: Floats | None = None
    p95s: Floats | None = None
    mins: Floats | None = None
    p95: Merged = Merged()

    @classmethod
    def of(
        cls,
        axis: Axis,
        starts_s: NDArray[np.int64],
        counts: NDArray[np.integer],
        sums: Floats,
        maxs: Floats | None = None,
        p95s: Floats | None = None,
        mins: Floats | None = None,
        p95: Merged = Merged(),
    ) -> Self:
        """From rows: one an hour that has samples, in any order; each column has shape (n,). Rows outside of the axis are left out."""
        at = (starts_s - axis.start_s) // HOUR_S
        inside = (at >= 0) & (at < axis.hours)

        def spread(column: Floats) -> Floats:
            whole = np.full(axis.hours, np.nan, column.dtype)
            whole[at[inside]] = column[inside]
            return whole

        counted = np.zeros(axis.hours, counts.dtype)
        counted[at[inside]] = counts[inside]
        return cls(
            counted,
            spread(sums),
            None if maxs is None else spread(maxs),
            None if p95s is None else spread(p95s),
            None if mins is None else spread(mins),
            p95,
        )

    @property
    def known(self) -> NDArray[np.bool_]:
        """The hours with samples."""
        return self.counts > 0

    @property
    def averages(self) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums / self.counts

    @property
    def per_sample_s(self) -> float:
        """Seconds between samples, by the fullest hour; 3600 where there is none."""
        return HOUR_S / max(1, int(self.counts.max(initial=0)))

    @property
    def rates(self) -> Floats:
        """Of a Sum: a second, at the rate of the samples that are there."""
        return self.averages / self.per_sample_s


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """All that is known of one resource: its series by role and statistic, its life by the inventory, what the ledger looked at.

    At least one of `series` and `lived` says something.
    """

    key: ResourceKey
    series: Mapping[tuple[Role, str], SeriesHours] = field(default_factory=dict)
    lived: Lived | None = None
    """Over the whole axis, where there is an inventory that knows it."""
    looked: NDArray[np.floating] | None = None
    """Shape (hours,), 0..1: the share of the hour's windows of its service that are complete in the ledger; None: not known."""

    def level(self, role: Role) -> SeriesHours | None:
        """The series that tells its level: Average, or Sum of a rate."""
        return self.series.get((role, "Average")) or self.series.get((role, "Sum"))

    def a_sample(self, role: Role) -> SeriesHours | None:
        """The Average of a rate's metric."""
        return self.series.get((role, A_SAMPLE))

    def maximum(self, role: Role) -> SeriesHours | None:
        return self.series.get((role, "Maximum"))

    def values(self, role: Role) -> Floats | None:
        """By hour: the average, or a second of what is a rate; None where nothing was read."""
        if (average := self.series.get((role, "Average"))) is not None:
            return average.averages
        total = self.series.get((role, "Sum"))
        return None if total is None else total.rates
