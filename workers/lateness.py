"""How late points come and change, as Prometheus histograms out of the ledger's `settling`: of the last days, the same from every consumer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import REGISTRY, GaugeHistogramMetricFamily
from prometheus_client.registry import Collector

from ingest.settling import Late

DAYS = 7

_LATE = "Points by the age, from their window's end, at which a look first saw them. Many beyond the service's settling time: raise it (headgate settle)."
_REVISED = "Points of series that a look found changed in a window, by its age. Many beyond the service's settling time: raise it (headgate settle)."


class Lateness(Collector):
    """`seen` is by service and age; whoever reads the ledger sets it."""

    def __init__(self) -> None:
        self.seen: Mapping[str, Mapping[int, Late]] = {}

    def describe(self) -> Iterable[GaugeHistogramMetricFamily]:
        return []

    def collect(self) -> Iterable[GaugeHistogramMetricFamily]:
        late = GaugeHistogramMetricFamily("headgate_points_late_seconds", _LATE, labels=["service"])
        revised = GaugeHistogramMetricFamily("headgate_points_revised_seconds", _REVISED, labels=["service"])
        for service, ages in self.seen.items():
            for family, counts in (
                (late, {age_s: one.appeared for age_s, one in ages.items()}),
                (revised, {age_s: one.changed for age_s, one in ages.items()}),
            ):
                total, buckets = 0, []
                for age_s in sorted(counts):
                    total += counts[age_s]
                    buckets.append((str(float(age_s)), float(total)))
                buckets.append(("+Inf", float(total)))
                family.add_metric([service], buckets, float(sum(a * n for a, n in counts.items())))
        return late, revised


LATENESS = Lateness()
REGISTRY.register(LATENESS)
