"""What is said of a resource: idle, oversized, or why neither. Pure.

Guarantees, each with a test of its name, and each verdict with golden counterexamples:

* *no verdict on thin data*: idle and oversized need `Idle.days` of life and their share of its hours known;
* *idle is all activities together*, in every known hour, and an activity that is not collected is not a quiet one;
* *oversized needs p95 and peak*, the peak of the Maximum statistic, both on the smaller size, of a family that is known;
* *stopped, standby, reader and auto-scaled resources are known as such*, and what depends on one of these (its volumes) is not idle by itself;
* *one verdict a resource*: what is idle is not oversized as well, so a saving is counted once;
* *more use never makes a verdict of waste*, and sizes count by their ratio alone.

The rules are asked in a fixed order, and the first that applies decides: `Verdict.rule` is its sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ingest.inventory.model import Lived, Resource, State
from ingest.inventory.model import Role as Part
from ingest.report.model import Confidence, Evidence, Verdict, VerdictKind
from ingest.report.money import Pricing
from ingest.report.resources import DAY_H, HOUR_S, Axis, Observed
from ingest.report.sizing import SIZED, Catalog, load_of, smallest
from ingest.report.utilization import IdleHours, idle_hours, on_by_hour, reported
from shard_config.report import ROLES, Activity, Report

DAY_S: Final = DAY_H * HOUR_S
UNITS: Final = {
    Activity.CPU: "percent", Activity.NETWORK: "bytes/s", Activity.DISK: "1/s", Activity.CONNECTIONS: "count",
}  # fmt: skip
NO_INVENTORY: Final = "sizes are not known: set inventory.source"


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rules:
    """What verdicts go by. `inventory`: whether there is one at all."""

    report: Report
    pricing: Pricing
    catalog: Catalog
    inventory: bool

    @property
    def days(self) -> int:
        return self.report.idle.days


@dataclass(frozen=True, slots=True, eq=False)
class _Facts:
    """A resource in the days before a time, that rules are asked about."""

    seen: Observed
    axis: Axis
    at_s: int
    resource: Resource | None
    born_s: int | None
    """When it was created, or first had a sample; None: before the axis begins."""
    hours: slice
    on: NDArray[np.bool_]
    """Within `hours`."""
    reported: int
    """Hours with any sample, within `hours`."""
    idle: IdleHours | None

    @property
    def age_days(self) -> float:
        """As far as is known."""
        return (self.at_s - (self.born_s or self.axis.start_s)) / DAY_S

    @property
    def expected(self) -> int:
        return int(self.on.sum())

    @property
    def on_share(self) -> float:
        return self.expected / max(1, len(self.on))


@dataclass(frozen=True, slots=True, eq=False)
class ByHour:
    """What a verdict of any time goes by, worked out once: shape (hours,) each."""

    on: NDArray[np.bool_]
    reported: NDArray[np.bool_]
    idle: IdleHours | None

    @classmethod
    def of(cls, seen: Observed, axis: Axis, rules: Rules) -> ByHour:
        return cls(on_by_hour(seen, axis), reported(seen, axis), idle_hours(seen, axis, rules.report.idle))


def judge(seen: Observed, axis: Axis, at_s: int, rules: Rules, by_hour: ByHour | None = None) -> Verdict:
    """The verdict of the time `at_s`, by the `Idle.days` before it. The axis has to reach back so far, or else nothing is idle or oversized."""
    facts = _facts(seen, axis, at_s, rules, by_hour or ByHour.of(seen, axis, rules))
    for rule in (_of_state, _of_age, _of_service, _of_thin_data, _of_idle, _of_size):
        if (verdict := rule(facts, rules)) is not None:
            return verdict
    return Verdict(VerdictKind.IN_USE, "It is used", _told(facts))


def _facts(seen: Observed, axis: Axis, at_s: int, rules: Rules, by_hour: ByHour) -> _Facts:
    hours = axis.slice(at_s - rules.days * DAY_S, at_s)
    any_sample = by_hour.reported
    if seen.lived is not None:
        born_s = seen.lived.born_s
    else:
        # What reported in the axis' first hour may be older than it.
        born_s = (
            axis.start_s + int(any_sample.argmax()) * HOUR_S
            if any_sample.any() and not any_sample[0]
            else None
        )
    return _Facts(
        seen,
        axis,
        at_s,
        None if seen.lived is None else seen.lived.at(at_s - 1),
        born_s,
        hours,
        by_hour.on[hours],
        int(any_sample[hours].sum()),
        by_hour.idle,
    )


def _of_state(facts: _Facts, rules: Rules) -> Verdict | None:
    """What the inventory says that it is."""
    resource, lived = facts.resource, facts.seen.lived
    if lived is None:
        if rules.inventory:
            return Verdict(
                VerdictKind.NOT_JUDGED,
                "The inventory does not know it, so neither its state nor its size is known",
            )
        return None
    if resource is None:
        if all(span.from_s >= facts.at_s for span in lived.spans):
            return Verdict(VerdictKind.NEW, "It did not live yet")
        return Verdict(VerdictKind.GONE, "It is gone")
    if resource.state is State.STOPPED:
        return Verdict(VerdictKind.STOPPED, "It is stopped: it costs its storage, and no hours")
    if resource.state is State.STANDBY:
        return Verdict(VerdictKind.STANDBY, "A standby does nothing until it is needed")
    if resource.role in (Part.READER, Part.REPLICA):
        return Verdict(
            VerdictKind.READER, f"It is a {resource.role}: it is there to take over, or to read from"
        )
    if resource.scaled:
        return Verdict(
            VerdictKind.AUTO_SCALED,
            f"{resource.group} decides how many there are: what is too much is its limits' matter",
        )
    if resource.state is State.DETACHED:
        return _of_detached(facts, lived, resource, rules)
    return None


def _of_detached(facts: _Facts, lived: Lived, resource: Resource, rules: Rules) -> Verdict:
    """A volume that no instance has: the inventory's word, for there are no metrics."""
    since_s = facts.at_s
    for span in reversed(lived.spans):
        if span.from_s >= facts.at_s:
            continue
        if span.resource.state is not State.DETACHED:
            break
        since_s = span.from_s
    days = (facts.at_s - since_s) / DAY_S
    evidence = (Evidence("days without an instance", days, "days", rules.days),)
    if days < rules.days:
        return Verdict(
            VerdictKind.NOT_ENOUGH_DATA, f"It has had no instance for fewer than {rules.days} days", evidence
        )
    waste, unknown = rules.pricing.of(resource)
    return Verdict(
        VerdictKind.IDLE,
        f"No instance has had it for {rules.days} days",
        evidence,
        Confidence.HIGH,
        waste=waste,
        waste_unknown=unknown,
        since_s=since_s,
    )


def _of_age(facts: _Facts, rules: Rules) -> Verdict | None:
    if facts.age_days >= rules.days:
        return None
    evidence = (Evidence("age", facts.age_days, "days", rules.days),)
    if facts.born_s is None:
        return Verdict(
            VerdictKind.NOT_ENOUGH_DATA, f"The data go back fewer than {rules.days} days", evidence
        )
    return Verdict(VerdictKind.NEW, f"It is younger than {rules.days} days", evidence)


def _of_service(facts: _Facts, rules: Rules) -> Verdict | None:
    service = facts.seen.key.service
    if ROLES[service].idle or service in SIZED:
        return None
    return Verdict(VerdictKind.NOT_JUDGED, f"No rule says when {service} is idle or too large", _told(facts))


def _of_thin_data(facts: _Facts, rules: Rules) -> Verdict | None:
    needed = rules.report.hours_min
    if facts.reported >= needed:
        return None
    evidence = (Evidence(f"hours with samples in {rules.days} days", facts.reported, "hours", needed),)
    return Verdict(
        VerdictKind.NOT_ENOUGH_DATA,
        f"It reported in fewer than {needed} hours of the last {rules.days} days",
        evidence,
    )


# --- idle -------------------------------------------------------------------------------------------------------------


def _of_idle(facts: _Facts, rules: Rules) -> Verdict | None:
    idle, limits = facts.idle, rules.report.idle
    if idle is None or _busy_in(idle, facts.hours, rules):
        return None
    evidence = _evidence(idle, facts, rules)
    if idle.lacking:
        lacking = " and ".join(idle.lacking)
        return Verdict(
            VerdictKind.NOT_ENOUGH_DATA,
            f"What is collected is quiet, but idle means {lacking} as well, which is not collected",
            evidence,
        )
    known, expected = int((idle.known[facts.hours] & facts.on).sum()), facts.expected
    needed = int(np.ceil(limits.coverage_min * expected))
    evidence += (
        Evidence("hours known of those it was on", known, "hours", needed),
        Evidence("hours it was on", expected, "hours"),
    )
    if not known or known < needed or expected < rules.report.hours_min:
        return Verdict(
            VerdictKind.NOT_ENOUGH_DATA,
            f"It is quiet in every hour that is known, but fewer than {limits.coverage_min:.0%} of its hours are",
            evidence,
        )
    waste, unknown = (None, NO_INVENTORY)
    if facts.resource is not None:
        waste, unknown = rules.pricing.of(facts.resource, facts.on_share)
    return Verdict(
        VerdictKind.IDLE,
        f"For {rules.days} days {_words(idle)} below {'its limit' if len(idle.activity) == 1 else 'their limits, all together'}, in every hour",
        evidence,
        _idle_confidence(idle, facts, rules),
        waste=waste,
        waste_unknown=unknown,
        since_s=_quiet_since(idle, facts, rules),
    )


def _quiet_since(idle: IdleHours, facts: _Facts, rules: Rules) -> int:
    """The first hour that is known after the last one in which any activity reached its limit, of the whole axis before `at_s`."""
    busy = np.zeros(facts.hours.stop, np.bool_)
    for activity, values in idle.activity.items():
        busy |= values[: facts.hours.stop] >= rules.report.idle.limit(activity)
    after = int(np.flatnonzero(busy)[-1]) + 1 if busy.any() else 0
    first = after + int(idle.known[after : facts.hours.stop].argmax())
    return facts.axis.start_s + first * HOUR_S


def _busy_in(idle: IdleHours, hours: slice, rules: Rules) -> bool:
    """Whether any activity that is known reached its limit in any hour."""
    return any(
        bool((values[hours] >= rules.report.idle.limit(activity)).any())
        for activity, values in idle.activity.items()
    )


def _idle_confidence(idle: IdleHours, facts: _Facts, rules: Rules) -> Confidence:
    if facts.seen.lived is None:
        # It may be a standby, or one of a group: only an inventory knows.
        return Confidence.LOW
    earlier = slice(0, facts.hours.start)
    if not idle.by_maximum or _busy_in(idle, earlier, rules):
        return Confidence.MEDIUM
    return Confidence.HIGH


def _evidence(idle: IdleHours, facts: _Facts, rules: Rules) -> tuple[Evidence, ...]:
    found = []
    for activity, values in idle.activity.items():
        greatest = np.fmax.reduce(values[facts.hours], initial=np.nan)
        if not np.isnan(greatest):
            which = activity in (Activity.CPU, Activity.CONNECTIONS)
            statistic = ("maximum" if idle.by_maximum else "greatest average") if which else "mean"
            name = f"{activity}, {statistic} of the busiest hour"
            found.append(Evidence(name, float(greatest), UNITS[activity], rules.report.idle.limit(activity)))
    return tuple(found)


def _words(idle: IdleHours) -> str:
    *most, last = (("CPU" if a is Activity.CPU else str(a)) for a in idle.activity)
    return f"{', '.join(most)} and {last} were" if most else f"{last} was"


# --- oversized --------------------------------------------------------------------------------------------------------


def _of_size(facts: _Facts, rules: Rules) -> Verdict | None:
    resource, lived = facts.resource, facts.seen.lived
    if resource is None or lived is None or resource.service not in SIZED:
        return None
    from_s = facts.at_s - rules.days * DAY_S
    if any(
        s.resource.type != resource.type for s in lived.spans if s.to_s > from_s and s.from_s < facts.at_s
    ):
        return Verdict(
            VerdictKind.IN_USE,
            f"It was resized within {rules.days} days: what it did before was on another size",
            _told(facts),
        )
    load = load_of(facts.seen, facts.hours, facts.on, resource)
    if load is None or load.coverage < rules.report.sizing.coverage_min:
        return None
    fit = smallest(load, resource, rules.catalog, rules.report.sizing)
    if fit is None:
        return None
    waste, unknown = rules.pricing.difference(resource, fit.size.type, facts.on_share)
    return Verdict(
        VerdictKind.OVERSIZED,
        f"What it did in {rules.days} days would fit {fit.size.type}, its p95 and its peak",
        fit.evidence,
        fit.confidence,
        fit.size,
        waste,
        unknown,
        # So far back was looked; a bigger load before that would have needed its size.
        facts.axis.start_s + (facts.hours.start + int(facts.on.argmax())) * HOUR_S,
    )


def _told(facts: _Facts) -> tuple[Evidence, ...]:
    return (
        Evidence("hours with samples", facts.reported, "hours"),
        Evidence("hours it was on", facts.expected, "hours"),
    )


def dependent(verdict: Verdict, on: VerdictKind) -> Verdict:
    """The verdict of a volume that is idle, where what it is attached to is `on`: it belongs to that, and is not idle by itself."""
    if verdict.kind is VerdictKind.IDLE and on in (
        VerdictKind.STANDBY,
        VerdictKind.READER,
        VerdictKind.AUTO_SCALED,
    ):
        return Verdict(on, f"It belongs to an instance that is {on}", verdict.evidence)
    return verdict
