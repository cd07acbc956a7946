"""When which fault strikes: a pure function of a seed, after Jepsen's harnesses.

* A fault every STRIKE_S, drawn from a mix of up to MIX_MAX kinds that rotates every MIX_S, and that may be empty: then the system has rest.
* Mixes are dealt from a shuffled deck of all kinds, HAND a seed: of seeds that follow each other each goes on where the one before ended, so that
  a campaign meets every kind about as often. What has not struck in a run goes before what has.
* Several at once where their needs do not overlap; kinds with a common need never do.
* One `alone` kind a run, at half-time, when nothing else strikes; seeds that follow each other take turns.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from tests.faults.kinds import Kind

STRIKE_S, MIX_S, MIX_MAX = 10.0, 30.0, 4
HAND = 8
SECOND_SHARE = 0.5
"""How often a second one of the mix strikes with the first, where it can."""
HEALING_S = 5.0
"""Kept free after each, for its injection and its heal take time."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A strike, `at_s` seconds after its half began; `number` makes its choices its own."""

    number: int
    at_s: float
    lasts_s: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class Schedule:
    """One run: the mix, then what strikes alone, then the mix again. `half_s` is the length of a half."""

    half_s: float
    first: tuple[Planned, ...]
    alone: Planned | None
    second: tuple[Planned, ...]

    @property
    def strikes(self) -> tuple[Planned, ...]:
        return (*self.first, *([self.alone] if self.alone else []), *self.second)

    def lines(self) -> list[str]:
        """For people: when, what, how long."""
        offsets = {id(p): 0.0 for p in self.first} | {id(p): self.half_s for p in self.second}
        return [
            f"{'alone' if p is self.alone else f'{offsets[id(p)] + p.at_s:5.0f}'} s  {p.kind.name} for {p.lasts_s:.0f} s"
            for p in self.strikes
        ]


def schedule(seed: int, minutes: float, kinds: Sequence[Kind]) -> Schedule:
    """The run of a seed. The order of `kinds` counts."""
    rng = random.Random(f"schedule {seed}")
    mixed, alone = [k for k in kinds if not k.alone], [k for k in kinds if k.alone]
    half_s = minutes * 60 / 2
    cards = _dealt(seed, mixed)
    first = _half(rng, half_s, cards, 0)
    second = _half(rng, half_s, cards, len(first))
    at_half_time = None
    if alone:
        kind = alone[seed % len(alone)]
        at_half_time = Planned(len(first) + len(second), 0.0, rng.uniform(*kind.lasts_s), kind)
    return Schedule(half_s, first, at_half_time, second)


def _dealt(seed: int, kinds: Sequence[Kind]) -> Iterator[Kind]:
    """The kinds that mixes get, one by one, without end."""
    at = seed * HAND
    while kinds:
        turn, card = divmod(at, len(kinds))
        deck = random.Random(f"deck {turn}").sample(kinds, len(kinds))
        yield from deck[card:]
        at += len(kinds) - card


def _half(rng: random.Random, length_s: float, cards: Iterator[Kind], number: int) -> tuple[Planned, ...]:
    found: list[Planned] = []
    mix: list[Kind] = []
    ticks = int(length_s // STRIKE_S)
    rotates = int(MIX_S // STRIKE_S)
    busy: list[tuple[float, frozenset[str]]] = []
    for tick in range(ticks):
        at_s = tick * STRIKE_S
        if tick % rotates == 0:
            # A system that is never left in peace would hide what only comes of peace.
            mix = list(islice(cards, rng.randint(0 if tick else 1, MIX_MAX)))
        for _ in range(1 + (rng.random() < SECOND_SHARE)):
            taken = frozenset[str]().union(*(needs for until_s, needs in busy if until_s > at_s))
            free = [
                k for k in mix if not k.needs & taken and (at_s, k) not in {(p.at_s, p.kind) for p in found}
            ]
            if not free:
                continue
            struck = {p.kind for p in found}
            kind = rng.choice([k for k in free if k not in struck] or free)
            lasts_s = min(rng.uniform(*kind.lasts_s), length_s - at_s)
            found.append(Planned(number + len(found), at_s, lasts_s, kind))
            busy.append((at_s + lasts_s + HEALING_S, kind.needs))
    return tuple(found)
