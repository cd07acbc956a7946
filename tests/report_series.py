"""Resources with their hours for tests of the report: made of runs of hours, as the golden files have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ingest.inventory.model import Lived, Resource, Role, Span, State
from ingest.report.model import ResourceKey
from ingest.report.money import Pricing
from ingest.report.resources import Axis, Observed, SeriesHours
from ingest.report.sizing import Catalog
from ingest.report.utilization import Ranges
from ingest.report.verdicts import Rules
from shard_config.report import ROLES, Price, Report
from shard_config.report import Role as Says

TO_S: Final = 1_795_392_000
"""2026-11-23 00:00 UTC, a Monday."""
DAY_S: Final = 86_400
DAYS: Final = 28
AXIS: Final = Axis(TO_S - DAYS * DAY_S, DAYS * 24)
RANGES: Final = Ranges(AXIS, TO_S - 7 * DAY_S, TO_S)
ACCOUNT, REGION = "111122223333", "eu-west-1"
GIB: Final = 1024**3
SAMPLES: Final = 12
"""An hour, of five minutes each."""

M7G: Final = {"medium": 1, "large": 2, "xlarge": 4, "2xlarge": 8}
PRICES: Final = (
    *(
        Price(service="ec2", type=f"m7g.{size}", usd_per_hour=0.0408225 * vcpu, vcpu=vcpu, memory_gib=4 * vcpu)
        for size, vcpu in M7G.items()
    ),
    *(
        Price(service="ec2", type=f"t3.{size}", usd_per_hour=0.0416 * vcpu, vcpu=vcpu, memory_gib=4 * vcpu)
        for size, vcpu in M7G.items()
        if vcpu > 1
    ),
    *(
        Price(service="rds", type=f"db.m7g.{size}", usd_per_hour=0.084 * vcpu, usd_per_gib_month=0.115, vcpu=vcpu, memory_gib=4 * vcpu)
        for size, vcpu in M7G.items()
        if vcpu > 1
    ),
    Price(service="ebs", type="gp3", usd_per_gib_month=0.08),
)  # fmt: skip


def rules_of(report: Report | None = None, *, inventory: bool = True) -> Rules:
    report = Report(prices=PRICES) if report is None else report
    pricing = Pricing(report)
    return Rules(report, pricing, Catalog.of((), pricing), inventory)


def run_length(
    runs: Sequence[Sequence[Any]], repeat: int = 1, hours: int = AXIS.hours
) -> NDArray[np.float64]:
    """By hour: runs of (hours, value), None where nothing is known, [from, to] a straight line from the first hour's value to past the last's."""
    parts: list[NDArray[np.float64]] = []
    for length, value in runs:
        if isinstance(value, (list, tuple)):
            parts.append(np.linspace(value[0], value[1], length, endpoint=False))
        else:
            parts.append(np.full(length, np.nan if value is None else value))
    values = np.tile(np.concatenate(parts), repeat)
    assert len(values) == hours, f"{len(values)} hours are not {hours}"
    return values


def series_of(
    values: NDArray[np.float64], *, rate: bool = False, samples: NDArray[np.float64] | int = SAMPLES
) -> SeriesHours:
    """A series whose samples are all equal within an hour; `values` of a rate are a second."""
    known = ~np.isnan(values)
    counts = np.where(known, samples, 0).astype(np.int64)
    each = values * (3600 / max(1, int(counts.max(initial=0)))) if rate else values
    sums = np.where(known, each * counts, np.nan)
    each = np.where(known, each, np.nan)
    return SeriesHours(counts, sums, each, each, each)


def resource(service: str = "ec2", **attributes: Any) -> Resource:
    kinds = {"state": State, "role": Role, "attached_to": tuple}
    made = {name: kinds[name](value) if name in kinds else value for name, value in attributes.items()}
    return Resource(ACCOUNT, REGION, service, made.pop("id", "r-1"), **made)


def lived_of(
    service: str,
    spans: Sequence[Mapping[str, Any]],
    born_day: float | None = None,
    gone_day: float | None = None,
) -> Lived:
    """Spans with `days` [from, to] of the axis and the resource's attributes."""
    made = []
    for span in spans:
        attributes = dict(span)
        first, last = attributes.pop("days")
        from_s, to_s = (AXIS.start_s + round((day or 0) * DAY_S) for day in (first, last))
        made.append(Span(from_s, to_s, from_s, resource(service, **attributes)))

    def at(day: float | None) -> int | None:
        return None if day is None else AXIS.start_s + round(day * DAY_S)

    return Lived(tuple(made), at(born_day), at(gone_day))


def observed(golden: Mapping[str, Any]) -> Observed:
    """The resource of a golden file."""
    service = golden["service"]
    rates = {metric.role: metric.rate for metric in ROLES[service].metrics}
    series = {}
    for role, statistics in golden["series"].items():
        for statistic, spec in statistics.items():
            values = run_length(spec["runs"], spec.get("repeat", 1))
            samples = run_length(spec["samples"]) if "samples" in spec else SAMPLES
            series[Says(role), statistic] = series_of(
                values, rate=statistic == "Sum" and rates[Says(role)], samples=samples
            )
    spans = golden.get("spans")
    lived = (
        None if spans is None else lived_of(service, spans, golden.get("born_day"), golden.get("gone_day"))
    )
    looked = golden.get("looked")
    return Observed(
        ResourceKey(ACCOUNT, REGION, service, golden.get("id", "r-1")),
        series,
        lived,
        None if looked is None else np.full(AXIS.hours, looked),
    )
