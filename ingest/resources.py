"""Tagged resources: what names a series' `name` and `tag_*`, as exporters share them and remote writers know them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Resource:
    """One tagged resource; tags in AWS's order. `dimensions` are those that its metrics have, sorted by name; none where no pattern fits."""

    arn: str
    tags: Mapping[str, str] = field(hash=False)
    dimensions: tuple[tuple[str, str], ...] = ()
