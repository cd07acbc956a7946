"""Whether a smaller size of its family would do for a resource. Pure; `ingest.report.verdicts` asks.

Guarantees:

* *p95 and peak both*, the peak of the Maximum statistic; without that there is no answer;
* *only sizes that are known*: those that some resource has, and those that the price list names with their size;
* where the memory in use is not known, one step down and no further;
* what works its network or its disks is not told by its CPU: no inventory knows how much of these a size has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ingest.inventory.model import Resource
from ingest.report.model import Confidence, Evidence, Size
from ingest.report.money import Pricing
from ingest.report.resources import Observed
from ingest.report.utilization import together
from shard_config.report import Role, Sizing

SIZED: Final = frozenset({"ec2", "rds", "elasticache"})
"""Services whose instances come in sizes."""
BURSTABLE: Final = frozenset({"t1", "t2", "t3", "t3a", "t4g"})
"""Smaller sizes of these have smaller baselines, which percentages do not tell."""
ROOMY: Final = 0.75
"""Below so much of each limit there is room for what was not measured."""
WELL_COVERED: Final = 0.95


@dataclass(frozen=True, slots=True)
class Catalog:
    """The sizes that are known, of one node each, by service and family: ("ec2", "m7g")."""

    families: Mapping[tuple[str, str], tuple[Size, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, resources: Iterable[Resource], pricing: Pricing) -> Catalog:
        """`resources` may be all that the inventory has; of a type, the price list's size counts, else the first resource's."""
        sizes = pricing.sizes()
        for one in resources:
            if one.vcpu and one.type and one.service in SIZED and (one.service, one.type) not in sizes:
                nodes = one.nodes or 1
                memory = None if one.memory_bytes is None else one.memory_bytes / nodes
                sizes[one.service, one.type] = one.vcpu / nodes, memory
        families: dict[tuple[str, str], list[Size]] = {}
        for (service, type_), (vcpu, memory) in sizes.items():
            families.setdefault((service, _family(type_)), []).append(Size(type_, vcpu, memory))
        return cls(
            {
                family: tuple(sorted(found, key=lambda s: (s.vcpu or 0, s.type)))
                for family, found in families.items()
            }
        )

    def smaller(self, resource: Resource) -> tuple[Size, ...]:
        """Sizes of its family with fewer vCPUs, the largest first."""
        vcpu = (resource.vcpu or 0) / (resource.nodes or 1)
        family = self.families.get((resource.service, _family(resource.type)), ())
        return tuple(s for s in reversed(family) if s.vcpu is not None and s.vcpu < vcpu)


def _family(type_: str) -> str:
    return type_.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Load:
    """What a resource did over some hours. CPU in percent of its size; `memory_bytes` of one node, None: not known."""

    cpu_p95: float
    """95 % of the hours had a p95 of at most this: never less than the p95 of all samples by much, and mostly more."""
    cpu_peak: float
    memory_bytes: float | None
    coverage: float
    """Hours with both, of those in which it was on."""
    network_bytes_per_s: float | None = None
    """Of the busiest hour; None: not known."""
    disk_ops_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """A smaller size that would do."""

    size: Size
    evidence: tuple[Evidence, ...]
    confidence: Confidence


def load_of(seen: Observed, hours: slice, on: NDArray[np.bool_], resource: Resource) -> Load | None:
    """None where CPU or its Maximum is not known, of each node. `on` has the shape of `hours`."""
    if (resource.nodes or 1) > 1:
        # One node's series say nothing of the others.
        return None
    level, top = seen.level(Role.CPU), seen.maximum(Role.CPU)
    if level is None or top is None or top.maxs is None:
        return None
    known = level.known[hours] & top.known[hours] & on
    if not known.any():
        return None
    values = (level.averages if level.p95s is None else level.p95s)[hours]
    return Load(
        float(np.percentile(values[level.known[hours]], 95)),
        float(np.fmax.reduce(top.maxs[hours])),
        _memory(seen, hours, resource),
        float(known.sum() / on.sum()),
        _busiest(seen, hours, (Role.NETWORK_IN, Role.NETWORK_OUT)),
        _busiest(seen, hours, (Role.DISK_READ_OPS, Role.DISK_WRITE_OPS)),
    )


def _busiest(seen: Observed, hours: slice, roles: tuple[Role, ...]) -> float | None:
    values = together(seen, roles)
    greatest = np.nan if values is None else np.fmax.reduce(values[hours], initial=np.nan)
    return None if np.isnan(greatest) else float(greatest)


def _memory(seen: Observed, hours: slice, resource: Resource) -> float | None:
    """The most memory in use of one node, bytes."""
    if resource.memory_bytes is None:
        return None
    whole = float(resource.memory_bytes)
    share, free = seen.level(Role.MEMORY_SHARE), seen.series.get((Role.MEMORY_FREE, "Minimum"))
    if share is not None and share.counts[hours].any():
        values = share.averages if share.maxs is None else share.maxs
        return whole * float(np.fmax.reduce(values[hours])) / 100
    free = free or seen.level(Role.MEMORY_FREE)
    if free is not None and free.counts[hours].any():
        values = free.averages if free.mins is None else free.mins
        return max(0.0, whole - float(np.fmin.reduce(values[hours])))
    return None


def smallest(load: Load, resource: Resource, catalog: Catalog, limits: Sizing) -> Fit | None:
    """The smallest size that the load fits; None where the next smaller one is too small already, or none is known."""
    found: Fit | None = None
    for size in catalog.smaller(resource):
        fit = _fit(load, resource.vcpu or 0, size, limits)
        if fit is None:
            break
        found = fit
        if load.memory_bytes is None:
            break
    return found


def _fit(load: Load, vcpu: float, size: Size, limits: Sizing) -> Fit | None:
    if not size.vcpu:
        return None
    times = vcpu / size.vcpu
    evidence = [
        Evidence("cpu p95 now", load.cpu_p95, "percent"),
        Evidence("cpu peak now", load.cpu_peak, "percent"),
        Evidence(f"cpu p95 on {size.type}", load.cpu_p95 * times, "percent", limits.cpu_p95_percent),
        Evidence(f"cpu peak on {size.type}", load.cpu_peak * times, "percent", limits.cpu_peak_percent),
    ]
    if load.memory_bytes is not None:
        if size.memory_bytes is None:
            return None
        share = 100 * load.memory_bytes / size.memory_bytes
        evidence.append(Evidence(f"memory in use on {size.type}", share, "percent", limits.memory_percent))
    for name, value, unit, limit in (
        ("network, busiest hour", load.network_bytes_per_s, "bytes/s", limits.network_bytes_per_s),
        ("disk, busiest hour", load.disk_ops_per_s, "1/s", limits.disk_ops_per_s),
    ):
        if value is not None:
            evidence.append(Evidence(name, value, unit, limit))
    fullest = max(e.value / e.limit for e in evidence if e.limit)
    if fullest > 1:
        return None
    evidence.append(
        Evidence("hours known of those it was on", 100 * load.coverage, "percent", 100 * limits.coverage_min)
    )
    return Fit(size, tuple(evidence), _confidence(load, size, fullest))


def _confidence(load: Load, size: Size, fullest: float) -> Confidence:
    """High only where memory, network and disk are known, there is room, and hardly an hour is not known."""
    if size.type.removeprefix("db.").removeprefix("cache.").partition(".")[0] in BURSTABLE:
        return Confidence.LOW
    known = None not in (load.memory_bytes, load.network_bytes_per_s, load.disk_ops_per_s)
    good = known + (fullest <= ROOMY) + (load.coverage >= WELL_COVERED)
    return (Confidence.LOW, Confidence.LOW, Confidence.MEDIUM, Confidence.HIGH)[good]
