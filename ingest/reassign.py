"""When a new assignment of slots to shards is published, and which. Pure.

* Only where it is news: shards came or went, weights have changed, a quota is shared otherwise, or the group did
  not follow for FOLLOW_S. At most once in PUBLISH_EVERY_S.
* Who came or went comes first, by the weights that the group's leader knew: so it is what the leader has computed already, and nobody
  joins again for it. New weights come later, and seldom; they move only what balance asks for.
* Its epoch is above all that the topic or a member has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ingest.assign import SLOT_WEIGHT_MIN, Assignment, assign, owners_of
from ingest.membership import GroupLook
from shard_config.units import UnitPlan, quota_shares, slots_together

PUBLISH_EVERY_S = 3.0
WEIGHTS_EVERY_S = 600.0
"""A rebalance makes every shard drain, so drifting weights move slots seldom."""
FOLLOW_S = 30.0
"""A group that stands still with other owners for so long is told again."""
SHARE_MARGIN = 0.1
"""A quota's shares are published anew where one has changed by more. That moves nothing."""

Shares = Mapping[str, Mapping[str, float]]
"""By quota and shard."""

Together = Mapping[int, str]
"""By slot, the quota that it shares with other slots."""


def slot_weights(slots: Mapping[str, int], weights: Mapping[str, float], count: int) -> tuple[float, ...]:
    """By slot, the sum of its targets' weights, and at least SLOT_WEIGHT_MIN."""
    found = [0.0] * count
    for target, slot in slots.items():
        found[slot] += weights.get(target, 0.0)
    return tuple(max(SLOT_WEIGHT_MIN, weight) for weight in found)


@dataclass(frozen=True, slots=True)
class Planned:
    """The planner's units (targets, and services of split ones) in slots; `via` has the monitoring account of the accounts that have one."""

    units: UnitPlan
    slots: int
    via: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[float, ...]:
        return slot_weights(self.units.slots, self.units.weights, self.slots)

    @property
    def together(self) -> Together:
        return slots_together(self.units, self.via)

    def shares(self, owners: Sequence[str]) -> Shares:
        return quota_shares(self.units, dict(enumerate(owners)), self.via)


@dataclass(slots=True)
class History:
    """What the coordinator remembers between two looks, in seconds of a clock that never steps back."""

    published_s: float = -PUBLISH_EVERY_S
    moved_for_weights_s: float = -WEIGHTS_EVERY_S
    astray_since_s: float | None = None
    """Since when the group stands still with other owners than were published."""


def next_assignment(
    current: Assignment | None,
    look: GroupLook,
    planned: Planned,
    now_ms: int,
    now_s: float,
    history: History,
) -> Assignment | None:
    """What to publish now, or None; `history` is kept up to date.

    Whoever came or went first, by the weights that the group's leader knew, so that the result is the same; new weights later.
    """
    owned = {slot: shard for shard, slots in look.members.items() for slot in slots}
    if not look.stable or not look.members or now_s - history.published_s < PUBLISH_EVERY_S:
        return None
    live = tuple(sorted(look.members))
    found = _owners(current, live, owned, planned, now_s, history)
    if found is None and current is not None and _apart(current.shares, planned.shares(current.owners)):
        found = _as_before("quotas are shared otherwise", current, current.owners)
    if found is None:
        return None
    history.published_s, history.astray_since_s = now_s, None
    epoch = 1 + max(look.epoch, current.epoch if current else 0)
    shares = planned.shares(found.owners)
    return Assignment(epoch, now_ms, found.reason, live, found.owners, found.weights, shares, found.together)


@dataclass(frozen=True, slots=True)
class _Owners:
    reason: str
    owners: tuple[str, ...]
    weights: tuple[float, ...]
    together: Together


def _as_before(reason: str, current: Assignment, owners: tuple[str, ...]) -> _Owners:
    """By what the group's leader knows."""
    return _Owners(reason, owners, current.weights, current.together)


def _owners(
    current: Assignment | None,
    live: tuple[str, ...],
    owned: Mapping[int, str],
    planned: Planned,
    now_s: float,
    history: History,
) -> _Owners | None:
    """What is news, and why; None where nothing is."""
    weights = planned.weights
    if current is None or len(current.owners) != len(weights):
        before = owned if current is None else dict(enumerate(current.owners))
        together = planned.together
        return _Owners("the first assignment", assign(weights, live, before, together), weights, together)
    came, went = set(live) - set(current.shards), set(current.shards) - set(live)
    if came or went:
        news = [f"{', '.join(sorted(who))} {what}" for who, what in ((came, "came"), (went, "went")) if who]
        return _as_before("; ".join(news), current, owners_of(current, live, len(weights)))
    if current.weights != weights and now_s - history.moved_for_weights_s >= WEIGHTS_EVERY_S:
        history.moved_for_weights_s = now_s
        together = planned.together
        owners = assign(weights, live, dict(enumerate(current.owners)), together)
        # Published even where nothing moves: whoever comes next is given slots by these.
        return _Owners("weights have changed", owners, weights, together)
    if owned == dict(enumerate(current.owners)):
        history.astray_since_s = None
        return None
    history.astray_since_s = now_s if history.astray_since_s is None else history.astray_since_s
    if now_s - history.astray_since_s < FOLLOW_S:
        return None
    return _as_before("the group did not follow", current, current.owners)


def _apart(one: Shares, other: Shares) -> bool:
    pairs = {(quota, shard) for shares in (one, other) for quota in shares for shard in shares[quota]}
    return any(
        abs(one.get(quota, {}).get(shard, 0.0) - other.get(quota, {}).get(shard, 0.0)) > SHARE_MARGIN
        for quota, shard in pairs
    )
