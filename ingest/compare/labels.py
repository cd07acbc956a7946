"""Labels of series that both sides have: what YACE exposes against what remote write sends (`ingest.series_labels`).

Resources come from the lists that exporters share in the archive; where a list is not there, `name` and tags are not compared, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import orjson

from ingest.compare.report import LabelGroup, Labels, said
from ingest.compare.state import State
from ingest.compare.store import key_said
from ingest.errors import Rejected
from ingest.model import Series, SourceName, Target
from ingest.resources import Cache, ResourceBook
from ingest.series_labels import Labels as OurLabels
from shard_config.model import Config


def differences(
    theirs: Mapping[str, str], ours: Mapping[str, str], resource_known: bool
) -> list[tuple[str, str, str]]:
    """(label, YACE's value, ours) of each that differs, "" where a label is not there. Without the resource `name` and tag_* say nothing."""
    names = sorted({*theirs, *ours} - {"__name__"})
    if not resource_known:
        names = [n for n in names if n != "name" and not n.startswith("tag_")]
    return [(n, theirs.get(n, ""), ours.get(n, "")) for n in names if theirs.get(n, "") != ours.get(n, "")]


class Differing:
    """Differences, gathered."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, str], LabelGroup] = {}

    def add(
        self, account: str, service: str, name: str, theirs: Labels, found: Iterable[tuple[str, str, str]]
    ) -> None:
        for label, their, our in found:
            key = label, account, service
            before = self._groups.get(key)
            if before is None:
                self._groups[key] = LabelGroup(*key, 1, their, our, said(name, theirs))
            else:
                self._groups[key] = LabelGroup(
                    *key, before.series + 1, before.theirs, before.ours, before.example
                )

    def groups(self) -> list[LabelGroup]:
        """The most first."""
        return sorted(self._groups.values(), key=lambda g: (-g.series, g.label, g.account, g.service))


async def label_groups(
    state: State, config: Config, cache: Cache, now_s: int
) -> tuple[list[LabelGroup], list[str]]:
    """(differences, what could not be compared). Raises nothing for the archive: what it does not give is said."""
    write = config.remote_write
    if write is None or write.names != "yace":
        return [], [
            "labels are not compared: the configuration has no remote_write with names: yace, which is what gives series YACE's"
        ]
    labels, book, found, unknown = OurLabels(config), ResourceBook(config, cache), Differing(), set()
    targets = list(
        state.rows(
            "SELECT DISTINCT account, region, service FROM ours JOIN theirs USING (key, account, region)"
        )
    )
    for account, region, service in targets:
        target = Target(SourceName.CLOUDWATCH, account, region)
        await book.refresh([(target, service)], now_s)
        known = book.known(target, service)
        if not known:
            unknown.add(service)
        for name, text, ours, period_s in state.rows(
            "SELECT t.name, t.labels, o.said, o.period_s FROM ours AS o JOIN theirs AS t USING (key) WHERE o.account = ? AND o.region = ? AND o.service = ?",
            account,
            region,
            service,
        ):
            theirs, series = orjson.loads(text), Series(key_said(account, region, ours, period_s))
            try:
                mine = dict(
                    labels.of(series, service, target, book.of(target, service, series.key.dimensions))
                )
            except Rejected as error:
                found.add(account, service, name, theirs, [("(all)", "", f"not sent: {error.reason}")])
                continue
            found.add(account, service, name, theirs, differences(theirs, mine, known))
    notes = (
        [
            f"name and tags of {', '.join(sorted(unknown))} are not compared: no list of tagged resources is in the archive yet"
        ]
        if unknown
        else []
    )
    return found.groups(), notes
