"""Targets and services → units → slots: a target that is heavier than a slot is split by service. Pure.

A *unit* is what `shard_config.plan` packs: a whole target, written as its name, or one of its services, written `target#service`.
Weights are metrics asked a minute, by target and service. The *ceiling* is the level of a plan whose targets are the single services, or
`whole_below` where that is more: a lighter target is no shard's burden, and stays whole.

* **Coverage**: every service of every target is in exactly one unit, and so in exactly one slot.
* **Balance**: no target of several services that weighs more than 1.25 · ceiling is whole; one that is new, none above the ceiling. Units
  are packed with plan's Balance: no slot exceeds 1.05 of the mean where no unit exceeds 0.05 of it, else the mean plus the heaviest unit.
* **Determinism**: as plan's.
* **Stability**: against its units as they are now, a plan moves at most 1.1 of the least weight. A split moves nothing by itself: each
  service begins where its target was. What is whole is split above 1.25 · ceiling, what is split is joined again up to 0.75, in the slot that
  had most of it; so weights that drift do neither, again and again.
* **Company**: units that share a quota go to one slot where that costs nothing (`together_of`), the services of a split target among them:
  quotas are per account asked and region, and one process keeps a quota with one limiter. Where they are on several shards all the
  same, each takes its share (`quota_shares`), and the shares of a quota add up to 1.

A service that is heavier than a slot by itself stays one unit, alone in its slot (decision 19).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from shard_config.plan import ROUNDING, plan

WHOLE_BELOW: Final = 10_000.0
"""Metrics a minute: 50,000 each five minutes take 100 calls and three seconds of one exporter."""

SPLIT_ABOVE: Final = 1.25
JOIN_UP_TO: Final = 0.75
"""Of the ceiling: between them what is whole stays whole, and what is split stays split."""

EVEN_SHARE: Final = 0.1
"""Of a quota, divided evenly over its shards, so that what was weighed wrongly still moves."""

Weights = Mapping[str, Mapping[str, float]]
"""By target and service."""


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """Slot and weight by unit, both in the units' order by name."""

    slots: Mapping[str, int]
    weights: Mapping[str, float]


def plan_units(
    weights: Weights,
    slots: int,
    previous: Mapping[str, int] | None = None,
    retired: Collection[int] = frozenset(),
    via: Mapping[str, str] | None = None,
    whole_below: float = WHOLE_BELOW,
) -> UnitPlan:
    """Split, and pack into slots. `previous` is the slots of the plan before; `via` as of `quota_of`. Raises ValueError as `plan` does."""
    before = previous or {}
    units = units_of(weights, slots - len({s for s in retired if 0 <= s < slots}), before, whole_below)
    found = plan(units, slots, inherit(units, weights, before), retired, together_of(units, via or {}))
    return UnitPlan(found, {unit: units[unit] for unit in found})


# --- names ------------------------------------------------------------------------------------------------------


def unit_name(target: str, service: str = "") -> str:
    """Of a whole target, or of one of its services."""
    return f"{target}#{service}" if service else target


def parse_unit(unit: str) -> tuple[str, str]:
    """(target, service); the service is empty where the unit is the whole target."""
    target, _, service = unit.partition("#")
    return target, service


class Places:
    """In which slot each service of each target is, of a plan over units."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._whole: dict[str, int] = {}
        self._split: dict[str, dict[str, int]] = defaultdict(dict)
        for unit in sorted(slots):
            target, service = parse_unit(unit)
            if service:
                self._split[target][service] = slots[unit]
            else:
                self._whole[target] = slots[unit]

    def of(self, target: str, service: str) -> int | None:
        """Of a service that is not planned, a slot of its target; None where there is none."""
        if target not in self._split:
            return self._whole.get(target)
        services = self._split[target]
        return services.get(service, next(iter(services.values())))

    def is_split(self, target: str) -> bool:
        return target in self._split


# --- splitting --------------------------------------------------------------------------------------------------


def units_of(
    weights: Weights, slots: int, previous: Collection[str] = (), whole_below: float = WHOLE_BELOW
) -> dict[str, float]:
    """Weight by unit. `slots` are those in use; `previous` are the units of the plan before, in any order."""
    totals = {target: math.fsum(services.values()) for target, services in weights.items()}
    ceiling = max(whole_below, _level(weights, math.fsum(totals.values()), slots))
    split_before = {parse_unit(unit)[0] for unit in previous if "#" in unit}
    before = frozenset(previous)
    units = dict(totals)
    for target in [t for t, total in totals.items() if total > JOIN_UP_TO * ceiling * (1 + ROUNDING)]:
        bound = JOIN_UP_TO if target in split_before else SPLIT_ABOVE if target in before else 1.0
        if len(weights[target]) > 1 and totals[target] > bound * ceiling * (1 + ROUNDING):
            del units[target]
            units |= {unit_name(target, service): weight for service, weight in weights[target].items()}
    return units


def _level(weights: Weights, total: float, slots: int) -> float:
    """Weight of a mean slot of what is left once each service that is heavier than that has a slot to itself."""
    heavy = 0
    pairs = [weight for services in weights.values() for weight in services.values()]
    level = total / max(1, slots)
    while slots > heavy + 1:
        light = [weight for weight in pairs if weight <= level * (1 + ROUNDING)]
        if len(light) == len(pairs):
            break
        heavy += len(pairs) - len(light)
        pairs = light
        level = math.fsum(pairs) / (slots - heavy)
    return level


def inherit(units: Collection[str], weights: Weights, previous: Mapping[str, int]) -> dict[str, int]:
    """Where each unit was: in the slot that held most of its weight; of equals in the first. What is new is left out."""
    found = {unit: previous[unit] for unit in units if unit in previous}
    if len(found) == len(units):
        return found
    places = Places(previous)
    for unit in units:
        if unit in found:
            continue
        target, service = parse_unit(unit)
        held: dict[int, list[float]] = defaultdict(list)
        for name in [service] if service else weights[target]:
            if (slot := places.of(target, name)) is not None:
                held[slot].append(weights[target][name])
        if held:
            found[unit] = min(held, key=lambda slot: (-math.fsum(held[slot]), slot))
    return found


# --- quotas -----------------------------------------------------------------------------------------------------


def quota_of(unit: str, via: Mapping[str, str]) -> str | None:
    """`account/region` of the quotas that a unit takes from; `via` has the monitoring account of those that have one. None: of none."""
    source, account, region = parse_unit(unit)[0].split("/")
    return f"{via.get(account, account)}/{region}" if source == "cloudwatch" else None


def together_of(units: Iterable[str], via: Mapping[str, str]) -> dict[str, str]:
    """Quota by unit, of the units that share one with another."""
    by_quota: dict[str, list[str]] = defaultdict(list)
    asked_for_others = set(via.values())
    for unit in units:
        # All others are alone: one account and region is one target.
        account = unit.split("/", 2)[1]
        shares = "#" in unit or account in via or account in asked_for_others
        if shares and (quota := quota_of(unit, via)) is not None:
            by_quota[quota].append(unit)
    return {unit: quota for quota, sharers in by_quota.items() if len(sharers) > 1 for unit in sharers}


def slots_together(found: UnitPlan, via: Mapping[str, str]) -> dict[int, str]:
    """By slot, the quota that it shares with other slots and asks most of: for a plan of slots onto shards that prefers company."""
    asked: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for unit, quota in together_of(found.slots, via).items():
        asked[quota][found.slots[unit]] += found.weights[unit]
    best: dict[int, tuple[float, str]] = {}
    for quota in sorted(asked):
        if len(asked[quota]) > 1:
            for slot, weight in asked[quota].items():
                best[slot] = max(best.get(slot, (-1.0, "")), (weight, quota))
    return {slot: quota for slot, (_, quota) in sorted(best.items())}


def quota_shares(
    found: UnitPlan, shard_of: Mapping[int, str], via: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """By quota (`account/region`) and shard, the part of the quota that the shard may take: of quotas that several shards take from.

    A share is in (0, 1), and a quota's add up to 1. What is left out is one shard's alone. A slot without a shard asks for nothing.
    """
    asked: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for unit, quota in together_of(found.slots, via).items():
        if (shard := shard_of.get(found.slots[unit])) is not None:
            asked[quota][shard] += found.weights[unit]
    return {quota: _shares(shards) for quota, shards in sorted(asked.items()) if len(shards) > 1}


def _shares(asked: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(asked.values())
    even = 1 / len(asked)
    by_weight = {s: asked[s] / total if total > 0 else even for s in sorted(asked)}
    return {s: (1 - EVEN_SHARE) * share + EVEN_SHARE * even for s, share in by_weight.items()}
