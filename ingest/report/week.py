"""What happened within the range's last week, by the inventory: what is new, gone or untagged, and which waste is no more. Pure.

Without an inventory nothing of it is known: a series that ends is not a resource that is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ingest.inventory.model import Lived, Resource, State
from ingest.report.model import (
    Changes,
    Figure,
    Money,
    Noted,
    Realisations,
    Realised,
    ResourceKey,
    Size,
    Verdict,
    VerdictKind,
)
from ingest.report.money import Pricing
from ingest.report.utilization import WEEK_S

NO_INVENTORY: Final = "resources are not known: set inventory.source"
NO_PRICE: Final = "report.prices has none of them"
_WASTES: Final = (VerdictKind.IDLE, VerdictKind.OVERSIZED)


def size_of(resource: Resource) -> Size:
    return Size(resource.type, resource.vcpu, resource.memory_bytes, resource.storage_bytes)


def owner_of(lived: Lived | None, tag: str) -> str:
    return "" if lived is None else lived.last.tags.get(tag, "")


@dataclass(frozen=True, slots=True)
class Lives:
    """What the inventory knows of each resource, and since when each scope is known: before that nobody saw what was new."""

    of: Mapping[ResourceKey, Lived]
    owner_tag: str
    first_s: int | None
    """Since when there is an inventory; None: there is none."""

    def changes(self, to_s: int) -> Changes:
        """New and vanished within the 7 days before `to_s`, without members of auto-scaling groups and fleets, and untagged at that time; counts with those
        of a week before.
        """
        if self.first_s is None:
            none = Figure(None, "count", unknown=NO_INVENTORY)
            return Changes((), (), (), none, none, none, self.owner_tag, NO_INVENTORY)
        new, vanished, untagged = self._of_week(to_s)
        earlier = self._of_week(to_s - WEEK_S)
        known = self.first_s <= to_s - 2 * WEEK_S
        counts = [
            Figure(float(len(now)), "count", float(len(was)) if known else None)
            for now, was in zip((new, vanished, untagged), earlier, strict=True)
        ]
        return Changes(new, vanished, untagged, counts[0], counts[1], counts[2], self.owner_tag)

    def _of_week(self, to_s: int) -> tuple[tuple[Noted, ...], tuple[Noted, ...], tuple[Noted, ...]]:
        new, vanished, untagged = [], [], []
        for key, lived in self.of.items():
            there = lived.at(to_s - 1)
            # Groups make and end their members all day long: that is no news.
            own = not lived.last.scaled
            if own and lived.born_s is not None and to_s - WEEK_S <= lived.born_s < to_s:
                new.append(self._noted(key, lived, lived.born_s))
            if own and lived.gone_s is not None and to_s - WEEK_S <= lived.gone_s < to_s:
                vanished.append(self._noted(key, lived, lived.gone_s))
            if there is not None and not there.tags.get(self.owner_tag):
                untagged.append(self._noted(key, lived, lived.born_s))
        return tuple(new), tuple(vanished), tuple(untagged)

    def _noted(self, key: ResourceKey, lived: Lived, at_s: int | None) -> Noted:
        return Noted(key, size_of(lived.last), owner_of(lived, self.owner_tag), at_s)


@dataclass(slots=True)
class Savings:
    """What was idle or oversized a week ago, and is gone, stopped or smaller now: `add` each resource once."""

    to_s: int
    owner_tag: str
    pricing: Pricing
    _found: list[Realised] = field(default_factory=list)

    def add(self, key: ResourceKey, lived: Lived | None, was: Verdict) -> None:
        """`was` is its verdict of a week before `to_s`."""
        before = None if lived is None else lived.at(self.to_s - WEEK_S - 1)
        if lived is None or before is None or was.kind not in _WASTES:
            return
        now = lived.at(self.to_s - 1)
        if now is None and lived.gone_s is not None:
            how, saved = "gone", self._cost(before)
        elif now is not None and now.state is State.STOPPED and before.state is not State.STOPPED:
            # What it stores costs on.
            how, saved = "stopped", self._less(before, replace(now, state=before.state), hours=False)
        elif now is not None and now.type != before.type:
            how, saved = f"{before.type} → {now.type}", self._less(before, now, hours=True)
            if saved is not None and saved.list_usd_per_month <= 0:
                return
        else:
            return
        self._found.append(Realised(key, owner_of(lived, self.owner_tag), was.kind, how, saved))

    def _cost(self, resource: Resource) -> Money | None:
        return self.pricing.of(resource)[0]

    def _less(self, before: Resource, now: Resource, *, hours: bool) -> Money | None:
        """What `now` costs less than `before`; without its hours where it is stopped."""
        was, still = self._cost(before), self.pricing.of(now, 1.0 if hours else 0.0)[0]
        if was is None or still is None:
            return None
        return Money(
            was.list_usd_per_month - still.list_usd_per_month,
            was.effective_usd_per_month - still.effective_usd_per_month,
            was.assumption if was.assumption == still.assumption else f"{was.assumption}; {still.assumption}",
        )

    def all(self, first_s: int | None) -> Realisations:
        """Greatest first. `first_s`: since when there is an inventory."""
        if first_s is None:
            return Realisations(Figure(None, "usd/month", unknown=NO_INVENTORY), (), NO_INVENTORY)
        found = sorted(
            self._found, key=lambda r: (-(r.saved.effective_usd_per_month if r.saved else 0), r.key)
        )
        saved = [r.saved.effective_usd_per_month for r in found if r.saved is not None]
        if found and not saved:
            return Realisations(Figure(None, "usd/month", unknown=NO_PRICE), tuple(found))
        return Realisations(Figure(sum(saved, 0.0), "usd/month"), tuple(found))
