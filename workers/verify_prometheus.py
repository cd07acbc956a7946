"""Do the local stack's Prometheus servers hold what has landed? By asking them, in PromQL, under YACE's names.

What is compared are the points of CloudWatch in the store: name, account, region and dimensions say which series they are. Labels that depend
on when tags were read (`name`, tag_*) are left aside.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import asyncpg

from ingest.clock import rfc3339
from ingest.errors import Transient
from ingest.sinks.connection import translated
from shard_config.model import Config
from shard_config.series_names import dimension_label, metric_name
from workers.prometheus import samples
from workers.verify import SeriesName, landed_points

EXAMPLES_MAX = 20
LOOK_S = 1.0
NO_PROGRESS_S = 75.0
"""Above the minute that series wait for the list of their resources."""

Named = frozenset[tuple[str, str]]
"""The labels that say which series it is."""
Points = Mapping[Named, Mapping[int, float]]


@dataclass(slots=True)
class Holding:
    """`samples` of what has landed are held, and equal but for those that are `wrong`; `missing` are not held."""

    samples: int = 0
    missing: int = 0
    wrong: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing held is nothing proved."""
        return self.samples > 0 and self.missing == self.wrong == 0

    def complain(self, what: str) -> None:
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(what)


async def verify_prometheus(
    connection: asyncpg.Connection, config: Config, urls: Sequence[str], from_s: int, to_s: int
) -> Holding:
    """Hold the servers' samples in [from_s, to_s) against the store's, until they agree or no more come for NO_PROGRESS_S. Raises Transient."""
    landed: dict[Named, dict[int, float]] = {}
    targets = [(account.id, region) for account in config.accounts for region in account.regions]
    with translated("verification"):
        for account, region in targets:
            for series, points in (await landed_points(connection, account, region, from_s, to_s)).items():
                landed[named(account, region, series)] = {t: value for t, (value, _) in points.items()}
    accounts = sorted({account for account, _ in targets})
    best, deadline_s = -1, time.monotonic() + NO_PROGRESS_S
    while True:
        held = await asyncio.to_thread(_held, urls, accounts, from_s, to_s)
        holding = compare(landed, held)
        if holding.samples > best:
            best, deadline_s = holding.samples, time.monotonic() + NO_PROGRESS_S
        if not holding.missing or time.monotonic() > deadline_s:
            return holding
        await asyncio.sleep(LOOK_S)


def compare(landed: Points, held: Points) -> Holding:
    """What is held of what has landed."""
    holding = Holding()
    for series, points in landed.items():
        there = held.get(series, {})
        for t, value in points.items():
            if t not in there:
                holding.missing += 1
                holding.complain(f"{_said(series)} at {rfc3339(t)}: not in Prometheus")
                continue
            holding.samples += 1
            if there[t] != value:
                holding.wrong += 1
                holding.complain(
                    f"{_said(series)} at {rfc3339(t)}: {there[t]!r} in Prometheus, landed {value!r}"
                )
    return holding


def named(account: str, region: str, series: SeriesName) -> Named:
    """What a series of CloudWatch is called in Prometheus."""
    namespace, metric, dimensions, stat = series
    labels = {dimension_label("yace", name, False): value for name, value in dimensions}
    labels |= {
        "__name__": metric_name("yace", namespace, metric, stat),
        "account_id": account,
        "region": region,
    }
    return frozenset((name, value) for name, value in labels.items() if name)


def identifying(labels: Iterable[tuple[str, str]]) -> Named:
    """Of a series' labels in Prometheus those that `named` has."""
    return frozenset(
        (name, value)
        for name, value in labels
        if name in ("__name__", "account_id", "region") or name.startswith("dimension_")
    )


def _held(urls: Sequence[str], accounts: Sequence[str], from_s: int, to_s: int) -> Points:
    found: dict[Named, dict[int, float]] = defaultdict(dict)
    try:
        for url in urls:
            for account in accounts:
                # A range is open to the left or not, by version.
                for labels, points in samples(url, f'{{account_id="{account}"}}', from_s - 1, to_s).items():
                    found[identifying(labels)].update(points)
    except OSError as error:
        raise Transient("prometheus", str(error), "see its log below .headgate/logs") from error
    return found


def _said(series: Named) -> str:
    labels = dict(series)
    name = labels.pop("__name__")
    return f"{name}{{{', '.join(f'{k}={v}' for k, v in sorted(labels.items()))}}}"
