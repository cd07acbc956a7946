"""What series are called at receivers: labels, and the resources that are in them."""

from __future__ import annotations

from collections.abc import Sequence

from ingest.model import Series, Target
from ingest.ports import EncodedLabels
from ingest.resources import Resource, ResourceBook
from ingest.series_labels import Labels
from ingest.sinks.prompb import encoded_labels
from shard_config.model import Config

WANTED_MAX = 200_000
"""Targets and services that are remembered as asked for: 20,000 accounts with ten."""


class Names:
    """What series are called, for all receivers of a process (`ingest.forwarding.Naming`)."""

    def __init__(self, config: Config, book: ResourceBook) -> None:
        self._labels = Labels(config)
        self._book = book
        self.wanted: dict[tuple[Target, str], int] = {}
        """Targets and services that were asked for, and the version of their resources that labels were made of."""
        self.waits = False
        """Somebody waits for resources: `refresh` soon."""

    def receiver_of(self, series: Series, service: str) -> str:
        return self._labels.receiver_of(series, service)

    def known(self, target: Target, service: str) -> bool:
        self.wanted.setdefault((target, service), 0)
        if (
            len(self.wanted) > WANTED_MAX
        ):  # whoever writes to `raw` names targets: these are asked for again where they are ours
            del self.wanted[next(iter(self.wanted))]
        known = self._book.known(target, service)
        self.waits = self.waits or not known
        return known

    def labels_of(self, series: Series, service: str, target: Target) -> EncodedLabels:
        resource = self._book.of(target, service, series.key.dimensions)
        return encoded_labels(self._labels.of(series, service, target, resource))

    def resources(self, target: Target, service: str) -> Sequence[Resource]:
        """Those that have info series."""
        return self._book.all(target, service)

    def info_of(self, target: Target, service: str, resource: Resource) -> EncodedLabels:
        """Raises Rejected where it can have none."""
        return encoded_labels(self._labels.info(target, service, resource))

    async def refresh(self, now_s: int) -> set[Target]:
        """Read the resources that are due; returns the targets whose series have other names now."""
        self.waits = False
        await self._book.refresh(list(self.wanted), now_s)
        others = set()
        for key, version in self.wanted.items():
            if (now := self._book.version(*key)) != version:
                self.wanted[key] = now
                others.add(key[0])
        return others
