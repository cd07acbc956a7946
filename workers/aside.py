"""What workers put aside, counted in one place: consumers of the store, exporters and the coordinator."""

from __future__ import annotations

from prometheus_client import Counter

DEAD = Counter(
    "headgate_dead_total",
    "Dead letters, whole records and single points. Rising: see the dead-letter topic.",
    ["kind"],
)
for _kind in ("record", "point"):
    DEAD.labels(kind=_kind)
