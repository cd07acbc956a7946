"""What a look changes in the history of a scope: which spans end when, and which begin. Pure.

* A look that failed changes nothing; a look that says what is known already changes nothing.
* What a whole look no longer has is gone since that look, unless AWS lists it as terminated and says since when.
* A change was made between two looks; it is dated by AWS's own word (created, stopped since) where that lies between them, else by the look
  that saw it first.
* What was there before the first look of all has the size that it was first seen with, since it was created; its state before AWS's last
  "since" is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ingest.inventory.model import Look, Resource, State

UNKNOWN_S = 0
"""When something was born of which nobody says when."""


@dataclass(frozen=True, slots=True)
class Open:
    """A span that has not ended."""

    since_s: int
    seen_s: int
    born_s: int
    resource: Resource


@dataclass(frozen=True, slots=True)
class Ended:
    id: str
    since_s: int
    until_s: int


@dataclass(frozen=True, slots=True)
class Begun:
    """A span that a look begins; one with `until_s` lies before another that it begins of the same resource."""

    since_s: int
    seen_s: int
    born_s: int
    resource: Resource
    until_s: int | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """What to write. `new`, `changed`, `gone` and `same` count resources."""

    ended: tuple[Ended, ...] = ()
    begun: tuple[Begun, ...] = ()
    new: int = 0
    changed: int = 0
    gone: int = 0
    same: int = 0
    doubt: str = ""
    """Why nothing was changed by a look that seemed whole."""


def changes(known: Mapping[str, Open], look: Look, before_s: int | None) -> Changes:
    """What `look` makes of the open spans `known`, by id; `before_s` is when the last whole look of the scope was taken, None: there was none."""
    if look.failure:
        return Changes(same=len(known))
    ended: list[Ended] = []
    begun: list[Begun] = []
    new = changed = 0
    seen: set[str] = set()
    for one in look.resources:
        was = known.get(one.id)
        if one.state is State.TERMINATED:
            if was is not None:
                seen.add(one.id)
                ended.append(
                    Ended(one.id, was.since_s, _between(one.state_since_s, was, before_s, look.at_s))
                )
            continue
        seen.add(one.id)
        if was is None:
            begun += _first(one, look.at_s, before_s)
            new += 1
            continue
        now = replace(one, created_s=_earlier(was.resource.created_s, one.created_s))
        if now == was.resource:
            continue
        changed += 1
        moved = (now.state, now.state_since_s) != (was.resource.state, was.resource.state_since_s)
        at_s = _between(now.state_since_s if moved else None, was, before_s, look.at_s)
        ended.append(Ended(one.id, was.since_s, at_s))
        begun.append(Begun(at_s, look.at_s, was.born_s, now))
    missing = [Ended(id_, was.since_s, look.at_s) for id_, was in known.items() if id_ not in seen]
    gone = len(missing) + len(ended) - changed
    return Changes((*ended, *missing), tuple(begun), new, changed, gone, len(known) - changed - gone)


def _between(said_s: int | None, was: Open, before_s: int | None, at_s: int) -> int:
    """The time that AWS names, where it lies after the look that last saw it as it was; else that of the look."""
    known_s = max(was.since_s, before_s or 0)
    return said_s if said_s is not None and known_s < said_s <= at_s else at_s


def _earlier(one: int | None, other: int | None) -> int | None:
    """AWS derives some times of creation from what can change (a network interface): the earliest holds."""
    return min((s for s in (one, other) if s is not None), default=None)


def _first(one: Resource, at_s: int, before_s: int | None) -> Iterator[Begun]:
    """The spans of a resource that was not known: one, or two where its state is known to be younger than itself."""
    since_s = at_s
    if before_s is None:
        since_s = min(at_s, UNKNOWN_S if one.created_s is None else one.created_s)
    elif one.created_s is not None and before_s < one.created_s <= at_s:
        since_s = one.created_s
    state_s = one.state_since_s
    if state_s is not None and since_s < state_s <= at_s:
        before = replace(one, state=State.UNKNOWN, state_since_s=None)
        yield Begun(since_s, at_s, since_s, before, state_s)
        yield Begun(state_s, at_s, since_s, one)
    else:
        yield Begun(since_s, at_s, since_s, one)
