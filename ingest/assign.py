"""Slots × shards → who owns what. Pure: the group's leader and the coordinator compute the same, each by itself.

* **Coverage**: every slot has exactly one owner, and that one is alive.
* **One function**: an assignment that was published and the shards that are alive now decide, and nothing else. So what the group's leader falls
  back to when a shard dies or comes is what the coordinator publishes next, and nothing moves twice.
* **Balance, Stability, Determinism** are those of `shard_config.plan`, with slots as its targets and equal shards as its slots: a shard that is
  gone loses its slots, a new one takes the least that balances. A shard has few slots, so the plan's bound (the mean and the heaviest slot)
  would leave a new one with next to nothing: slots also move as long as one move makes the heavier of two shards lighter by 0.05 of
  the mean, or gives a shard its first. Nothing moves where no such move is left.
* **Company**: slots whose targets take from one quota (`shard_config.units.slots_together`) prefer one shard, as `shard_config.plan` says of
  targets; of slots that could move for balance, those go last that would leave their company behind.

While nothing was ever published, slots weigh the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ingest import avro
from ingest.errors import Rejected
from ingest.model import OBSERVED_AT_MS_MAX
from ingest.validate import Reason
from shard_config.plan import MARGIN, WEIGHT_MAX, WEIGHT_MIN, plan

SLOT_WEIGHT_MIN = 1.0
"""Of a slot without targets, so that those are spread, too: a new shard finds some, and is ready."""

MEMBER_ASSIGNMENT_BYTES_MAX = 4096
"""A larger assignment does not travel with each member (Kafka keeps all members' metadata in one record): the leader reads its own copy."""

EPOCH_MAX = 2**62
"""A greater one leaves no next one: who reads it could never publish again."""

_SLOT = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which shard owns which slot, as of an epoch. `owners[slot]` is a shard's name, `weights[slot]` in the planner's unit."""

    epoch: int
    published_at_ms: int
    reason: str
    shards: tuple[str, ...]
    """Those that were alive, with or without slots."""
    owners: tuple[str, ...]
    weights: tuple[float, ...]
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By quota (`account/region`) that several shards take from, and shard: its part of the quota, in (0, 1)."""
    together: Mapping[int, str] = field(default_factory=dict)
    """By slot, the quota that it shares with other slots."""

    @property
    def order(self) -> tuple[int, int]:
        """The greater is the newer: two coordinators may have published one epoch."""
        return self.epoch, self.published_at_ms

    def slots_of(self, shard: str) -> list[int]:
        return [slot for slot, owner in enumerate(self.owners) if owner == shard]

    def shares_of(self, shard: str) -> dict[str, float]:
        """By quota that this shard does not have alone, its part."""
        return {quota: shards[shard] for quota, shards in self.shares.items() if shard in shards}


@dataclass(frozen=True, slots=True)
class Incarnation:
    """A process that took a shard's name."""

    shard: str
    started_at_ms: int
    nonce: int
    host: str
    pid: int

    @property
    def order(self) -> tuple[int, int]:
        """Of two with one name the greater has it."""
        return self.started_at_ms, self.nonce


@dataclass(frozen=True, slots=True)
class Member:
    """What a shard says of itself when it joins. `epoch` is that of the newest assignment it has seen, 0 for none."""

    shard: str
    epoch: int = 0
    assignment: Assignment | None = None
    """That assignment without its shares, where it is small."""


@dataclass(frozen=True, slots=True)
class Move:
    """A slot that changed its owner; `before` is empty where it had none."""

    slot: int
    before: str
    after: str


def assign(
    weights: Sequence[float],
    shards: Collection[str],
    previous: Mapping[int, str] | None = None,
    together: Mapping[int, str] | None = None,
) -> tuple[str, ...]:
    """The owner of each slot. `previous` may name shards and slots that are no more, `together` slots.

    Raises ValueError where no shard is alive, or for a weight that is none.
    """
    names = sorted(set(shards))
    index = {name: i for i, name in enumerate(names)}
    held = {_key(slot): index[shard] for slot, shard in (previous or {}).items() if shard in index}
    company = together or {}
    prefer = {_key(slot): quota for slot, quota in company.items()}
    by_key = {_key(slot): weight for slot, weight in enumerate(weights)}
    found = plan(by_key, len(names), held, together=prefer)
    owners = [found[_key(slot)] for slot in range(len(weights))]
    _even_out(owners, weights, len(names), company)
    return tuple(names[owner] for owner in owners)


def _even_out(owners: list[int], weights: Sequence[float], shards: int, together: Mapping[int, str]) -> None:
    """Move slots to the lightest shard, from the heaviest that has one whose move is worth it. Each move makes the two more even, so it ends."""
    slots: list[set[int]] = [set() for _ in range(shards)]
    for slot, owner in enumerate(owners):
        slots[owner].add(slot)
    loads = [math.fsum(weights[slot] for slot in theirs) for theirs in slots]
    margin = MARGIN * math.fsum(weights) / shards
    for _ in range(len(owners)):
        to = min(range(shards), key=lambda i: (loads[i], len(slots[i]), i))
        worth = margin if slots[to] else 0.0
        for giver in sorted(range(shards), key=lambda i: (-loads[i], i)):
            apart = loads[giver] - loads[to]
            able = [slot for slot in slots[giver] if worth < weights[slot] < apart - worth]
            if able:
                break
        else:
            return
        stays = Counter(together[slot] for slot in slots[giver] if slot in together)
        slot = min(able, key=lambda s: (stays[together.get(s, "")] > 1, abs(apart / 2 - weights[s]), s))
        owners[slot] = to
        slots[giver].remove(slot)
        slots[to].add(slot)
        for i in (giver, to):
            loads[i] = math.fsum(weights[slot] for slot in slots[i])


def _key(slot: int) -> str:
    return f"{slot:05}"


def owners_of(published: Assignment | None, shards: Collection[str], slots: int) -> tuple[str, ...]:
    """Who owns the slots while these shards are alive: what was published, but for those that died or came since."""
    if published is None:
        return assign([SLOT_WEIGHT_MIN] * slots, shards)
    if set(shards) == set(published.shards) and len(published.owners) == slots:
        return published.owners
    missing = max(0, slots - len(published.weights))
    weights = [*published.weights[:slots], *[SLOT_WEIGHT_MIN] * missing]
    return assign(weights, shards, dict(enumerate(published.owners)), published.together)


def newest(members: Collection[Member], own: Assignment | None) -> Assignment | None:
    """The newest assignment that any of them has brought."""
    seen = [a for a in (own, *(m.assignment for m in members)) if a is not None]
    return max(seen, key=lambda a: a.order, default=None)


def moves(before: Mapping[int, str], after: Mapping[int, str]) -> list[Move]:
    """What changes its owner, by slot."""
    return [
        Move(slot, before.get(slot, ""), shard)
        for slot, shard in sorted(after.items())
        if before.get(slot) != shard
    ]


# --- on the wire ----------------------------------------------------------------------------------------------


def encode_assignment(assignment: Assignment) -> bytes:
    """The record value of key `assignment`. Raises Rejected."""
    index = {name: i for i, name in enumerate(assignment.shards)}
    fields = {
        "epoch": assignment.epoch,
        "published_at_ms": assignment.published_at_ms,
        "reason": assignment.reason,
        "shards": list(assignment.shards),
        "owners": [index[owner] for owner in assignment.owners],
        "weights": list(assignment.weights),
        "shares": {quota: dict(shards) for quota, shards in assignment.shares.items()},
    }
    if not assignment.together:
        # As most are; shards of an older version read it.
        return avro.write("assignment", fields, version=1)
    together = {str(slot): quota for slot, quota in assignment.together.items()}
    return avro.write("assignment", fields | {"together": together})


def decode_assignment(value: bytes) -> Assignment:
    """The inverse of `encode_assignment`. Raises Rejected."""
    _, datum = avro.read(value, ("assignment",))
    shards, owners, weights = datum["shards"], datum["owners"], datum["weights"]
    together = datum["together"]
    if len(owners) != len(weights) or not all(0 <= i < len(shards) for i in owners):
        raise Rejected("read assignment", Reason.BAD_DATUM, "owners do not fit shards and weights")
    if not all(_SLOT.fullmatch(slot) for slot in together):
        raise Rejected("read assignment", Reason.BAD_DATUM, "together is not by slot")
    # Whoever leads the group plans with the weights, and an exporter divides by its share: neither may end a process.
    if not all(weight == 0 or WEIGHT_MIN <= weight <= WEIGHT_MAX for weight in weights):
        raise Rejected("read assignment", Reason.OUT_OF_RANGE, "a weight is none")
    if not all(0 < share <= 1 for shards in datum["shares"].values() for share in shards.values()):
        raise Rejected("read assignment", Reason.OUT_OF_RANGE, "a share is not in (0, 1]")
    if not 0 <= datum["epoch"] <= EPOCH_MAX:
        raise Rejected("read assignment", Reason.OUT_OF_RANGE, f"epoch {datum['epoch']}")
    return Assignment(
        datum["epoch"],
        datum["published_at_ms"],
        datum["reason"],
        tuple(shards),
        tuple(shards[i] for i in owners),
        tuple(weights),
        datum["shares"],
        {int(slot): quota for slot, quota in together.items()},
    )


def encode_incarnation(incarnation: Incarnation) -> bytes:
    """The record value of key `shard:<name>`. Raises Rejected."""
    fields = {name: getattr(incarnation, name) for name in Incarnation.__slots__}
    return avro.write("incarnation", fields)


def decode_incarnation(value: bytes) -> Incarnation:
    """The inverse of `encode_incarnation`. Raises Rejected."""
    found = Incarnation(**avro.read(value, ("incarnation",))[1])
    if not 0 <= found.started_at_ms <= OBSERVED_AT_MS_MAX:
        raise Rejected("read incarnation", Reason.OUT_OF_RANGE, f"started_at_ms {found.started_at_ms}")
    return found


def encode_member(member: Member) -> bytes:
    """A member's user data. Raises Rejected."""
    # Shares are not the leader's business, and may be many.
    value = b"" if member.assignment is None else encode_assignment(replace(member.assignment, shares={}))
    if len(value) > MEMBER_ASSIGNMENT_BYTES_MAX:
        value = b""
    return avro.write("member", {"shard": member.shard, "epoch": member.epoch, "assignment": value})


def decode_member(value: bytes) -> Member:
    """The inverse of `encode_member`. Raises Rejected."""
    _, datum = avro.read(value, ("member",))
    assignment = decode_assignment(datum["assignment"]) if datum["assignment"] else None
    return Member(datum["shard"], datum["epoch"], assignment)
