"""Targets × slots → an assignment. Pure, and made for being made again.

Let W be the weight of all targets and k the slots in use. A target is *heavy* where it weighs more than a mean slot of what is left once
every heavier one has a slot to itself: that is decided heaviest first, and ends at the first that is not. The others are *light*; their
mean slot is the *level*, L = W_light / (k − heavy), and the *cap* is L + max(0.05 · L, heaviest light target).

* **Coverage**: every target has exactly one slot, and a retired slot has none.
* **Balance**: a heavy target has its slot to itself; no other slot exceeds the cap. So the heaviest slot is at most 1.05 of the
  mean where no target exceeds 0.05 of it, and otherwise at most the mean plus the heaviest target.
* **Determinism**: the result depends on the arguments' content alone: not on the order of a mapping, nor on machine, process or Python.
* **Stability**: against `previous` it moves at most 1.1 of the least weight that any plan with this Balance has to move, whatever changed
  (targets, weights, slots, retirements). A target that is new moves nothing.
* **Company**: a light target that has to be placed goes where its company is (`together`), if that slot stays within 1.025 · L. This costs
  nothing of the others: it moves nothing, exceeds no cap, and leaves half of the margin to weights that drift.

Why Stability holds. Whatever a plan does, the targets of a slot that is gone move. A slot that is not to hold a heavy target keeps light
ones up to the cap: it loses all heavy ones and the lightest set of light ones that reaches its excess. A slot that holds a heavy target
keeps that at best. As many slots as there are heavy targets become slots of the second kind, and the least sum over all choices is had by
taking those where the second kind is cheapest against the first. That is a lower bound; and it is reached, since everything that was moved
or is new finds a place without moving more: each heavy target an empty slot, and each light one the lightest slot, which is below the
level, and so stays below the cap. The factor 1.1 is the lightest set's: finding that is a subset sum, which `_shed` approximates
from above. A margin of 0.05 · L before anything moves keeps small changes of weights from moving anything. `least_moved` computes the bound
with sets that could be cut anywhere, but for their lightest target, and so never more than it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Final

MARGIN: Final = 0.05
"""How far beyond the level a slot of small targets may go."""

MOVED_SLACK: Final = 0.1
"""How much more than the least weight may move."""

ROUNDING: Final = 1e-9
"""Floats that differ by less than this part are equal: what was put up to the cap is not beyond it."""


WEIGHT_MIN: Final = 1e-100
WEIGHT_MAX: Final = 1e100
"""Beyond these floats would under- or overflow on the way."""


@dataclass(frozen=True, slots=True)
class Move:
    """A target that changes its slot."""

    target: str
    weight: float
    before: int
    after: int


def plan(
    weights: Mapping[str, float],
    slots: int,
    previous: Mapping[str, int] | None = None,
    retired: Collection[int] = frozenset(),
    together: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Slot by target, in the targets' order by name.

    `weights` may be in any unit; each is 0, or WEIGHT_MIN to WEIGHT_MAX. Targets that weigh nothing go where there is least.
    Slots are numbered from 0; those in `retired` get nothing. `previous` may name targets and slots that are no more. `together` has, by
    target, the name of the company that it prefers; one that is not there has none.
    Raises ValueError for a weight that is none, and where no slot is in use.
    """
    usable = _usable(slots, retired)
    for target, weight in weights.items():
        if weight != 0 and not WEIGHT_MIN <= weight <= WEIGHT_MAX:
            raise ValueError(f"the weight of {target} is {weight}, not 0 or {WEIGHT_MIN} to {WEIGHT_MAX}")
    order = _heaviest_first(weights)
    heavy, level, cap = _heavy_level_cap([weights[target] for target in order], len(usable))
    giants = frozenset(order[:heavy])
    found = _keep(_held(order, usable, previous or {}), weights, giants, cap)
    rest = [t for t in order if t not in found]
    _place(rest, found, weights, giants, usable, together or {}, level * (1 + MARGIN / 2))
    return {target: found[target] for target in sorted(found)}


def least_moved(
    weights: Mapping[str, float],
    slots: int,
    previous: Mapping[str, int],
    retired: Collection[int] = frozenset(),
) -> float:
    """A lower bound on the weight that any plan in Balance moves, in the weights' unit."""
    usable = _usable(slots, retired)
    order = _heaviest_first(weights)
    heavy, _, cap = _heavy_level_cap([weights[target] for target in order], len(usable))
    giants = frozenset(order[:heavy])
    shared: list[float] = []
    lost: list[float] = []
    for targets in _held(order, usable, previous).values():
        light = [weights[t] for t in targets if t not in giants and weights[t] > 0]
        excess = math.fsum(light) - cap
        too_much = max(excess, light[-1]) if excess > ROUNDING * cap else 0.0
        shared.append(math.fsum(light) - too_much)
        lost.append(shared[-1] - (weights[targets[0]] if targets and targets[0] in giants else 0.0))
    kept = math.fsum(shared) - math.fsum(heapq.nsmallest(heavy, lost))
    return max(0.0, _sum((t for t in order if t in previous), weights) - kept)


def moves(before: Mapping[str, int], after: Mapping[str, int], weights: Mapping[str, float]) -> list[Move]:
    """What changes its slot from one plan to another, heaviest first. Targets that are new or gone do not move."""
    changed = {t: weights[t] for t, slot in after.items() if before.get(t, slot) != slot}
    return [Move(t, changed[t], before[t], after[t]) for t in _heaviest_first(changed)]


def _usable(slots: int, retired: Collection[int]) -> list[int]:
    gone = frozenset(retired)
    if usable := [slot for slot in range(slots) if slot not in gone]:
        return usable
    raise ValueError(f"none of {slots} slots is in use")


def _held(order: Sequence[str], usable: Sequence[int], previous: Mapping[str, int]) -> dict[int, list[str]]:
    """What each usable slot held, in this order."""
    held: dict[int, list[str]] = {slot: [] for slot in usable}
    for target in order if previous else ():
        if (slot := previous.get(target, -1)) in held:
            held[slot].append(target)
    return held


def _heaviest_first(weights: Mapping[str, float]) -> list[str]:
    """Equal weights by a digest of the name: by name, the regions of one account would stand together."""

    def place(target: str) -> tuple[float, bytes, str]:
        return -weights[target], blake2b(target.encode(), digest_size=8).digest(), target

    return sorted(weights, key=place)


def _heavy_level_cap(descending: Sequence[float], slots: int) -> tuple[int, float, float]:
    """(number of heavy targets, level and cap of the other slots), of weights from the heaviest down."""
    left = [*reversed(list(accumulate(reversed(descending)))), 0.0]
    heavy = 0
    for weight in descending[: slots - 1]:
        if weight * (slots - heavy) <= left[heavy] * (1 + ROUNDING):
            break
        heavy += 1
    level = left[heavy] / (slots - heavy)
    heaviest_light = descending[heavy] if heavy < len(descending) else 0.0
    return heavy, level, level + max(MARGIN * level, heaviest_light)


def _keep(
    held: Mapping[int, Sequence[str]], weights: Mapping[str, float], heavy: Collection[str], cap: float
) -> dict[str, int]:
    """What stays where it is: the most weight, but for MOVED_SLACK, that leaves room for a plan in balance.

    `held` has what each usable slot held, heaviest first.
    """
    shared: dict[int, Sequence[str]] = {}
    alone: dict[int, Sequence[str]] = {}
    for slot, targets in held.items():
        light = [t for t in targets if t not in heavy]
        gone = _shed([weights[t] for t in light], cap)
        shared[slot] = [t for i, t in enumerate(light) if i not in gone]
        alone[slot] = targets[:1] if len(light) < len(targets) else ()

    def loss(slot: int) -> tuple[float, float, int]:
        """What it costs to give a slot to a heavy target."""
        kept = _sum(shared[slot], weights)
        return kept - _sum(alone[slot], weights), kept, slot

    reserved = frozenset(heapq.nsmallest(len(heavy), held, key=loss)) if heavy else frozenset()
    return {t: slot for slot in held for t in (alone if slot in reserved else shared)[slot]}


def _shed(descending: Sequence[float], cap: float) -> frozenset[int]:
    """Indices of a set whose loss brings the sum down to `cap`, at most 1 + MOVED_SLACK times as heavy as the lightest such set.

    Sums of the weights between slack and excess are collected in buckets, the largest of each; what is found in a bucket is off by less
    than a bucket for each weight in it and one more, and below the excess there are less than 1 / MOVED_SLACK of those. Weights up to
    the slack fill what is left, and miss by less than the slack. A weight from the excess up is a set by itself.
    """
    excess = math.fsum(descending) - cap
    if excess <= ROUNDING * cap:
        return frozenset()
    slack = MOVED_SLACK * excess
    middle = [i for i, weight in enumerate(descending) if slack < weight < excess]
    single = [i for i, weight in enumerate(descending) if weight >= excess][-1:]
    small = [i for i, weight in enumerate(descending) if weight <= slack]
    small_sum = math.fsum(descending[i] for i in small)
    best = (descending[single[0]], tuple(single)) if single else (math.inf, ())
    bucket = slack * MOVED_SLACK
    sums: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    total: float = 0.0
    chosen: tuple[int, ...] = ()
    for i in middle:
        if best[0] <= excess + slack or total + small_sum >= excess:
            break
        for below, indices in list(sums.values()):
            grown = (below + descending[i], (*indices, i))
            if grown[0] >= excess:
                best = min(best, grown)
            elif grown > sums.get(place := int(grown[0] / bucket), (0.0, ())):
                sums[place] = grown
                total, chosen = max((total, chosen), grown)
    if total + small_sum < excess:
        return frozenset(best[1])
    filled = list(chosen)
    for i in small:
        if total >= excess:
            break
        total += descending[i]
        filled.append(i)
    return frozenset(min(best, (total, tuple(filled)))[1])


def _place(
    unplaced: Sequence[str],
    found: dict[str, int],
    weights: Mapping[str, float],
    heavy: Collection[str],
    usable: Sequence[int],
    together: Mapping[str, str],
    full: float,
) -> None:
    """Give a slot to each target of `unplaced`, which is ordered heaviest first, and move nothing else.

    A slot takes more for the sake of company as long as it is not `full`.
    """
    held: dict[int, list[float]] = {slot: [] for slot in usable}
    for target, slot in found.items():
        held[slot].append(weights[target])
    taken = {found[target] for target in heavy if target in found}
    loads = {slot: (math.fsum(load), len(load)) for slot, load in held.items() if slot not in taken}
    # By number of targets where loads are equal, so that targets that weigh nothing are spread too.
    queue = [(load, count, slot) for slot, (load, count) in loads.items()]
    heapq.heapify(queue)
    homes = _homes(found, weights, together, loads) if together and unplaced else {}
    for target in unplaced:
        company, weight = together.get(target), weights[target]
        home = homes.get(company, -1) if company is not None and target not in heavy else -1
        if home in loads and loads[home][0] + weight <= full:
            slot = home
        else:
            # Entries of before a slot took company.
            while loads.get(slot := queue[0][2]) != queue[0][:2]:
                heapq.heappop(queue)
            heapq.heappop(queue)
        found[target] = slot
        if target in heavy:
            del loads[slot]
            continue
        loads[slot] = (loads[slot][0] + weight, loads[slot][1] + 1)
        heapq.heappush(queue, (*loads[slot], slot))
        if company is not None:
            homes[company] = slot


def _homes(
    found: Mapping[str, int],
    weights: Mapping[str, float],
    together: Mapping[str, str],
    among: Collection[int],
) -> dict[str, int]:
    """By company, the slot of `among` that holds the most of its weight; of equals the first."""
    holds: dict[tuple[str, int], list[float]] = {}
    for target, slot in found.items():
        if (company := together.get(target)) is not None and slot in among:
            holds.setdefault((company, slot), []).append(weights[target])
    lightest_first = sorted((math.fsum(held), -slot, company) for (company, slot), held in holds.items())
    return {company: -slot for _, slot, company in lightest_first}


def _sum(targets: Iterable[str], weights: Mapping[str, float]) -> float:
    return math.fsum(weights[t] for t in targets)
