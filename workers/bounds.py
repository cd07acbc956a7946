"""How full what is bounded is: two gauges, with the same names for all of it, read when somebody scrapes.

`headgate_bound_used / headgate_bound_limit` is how near a queue, memory or cache is to its bound; docs/bounds.md says of each what happens there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ingest import series_table


@dataclass(slots=True, eq=False)
class Bounds(Collector):
    """What is bounded in this process, by name. A name is watched once; watching it again replaces it."""

    _watched: dict[str, tuple[Callable[[], float], Callable[[], float]]] = field(default_factory=dict)

    def watch(self, name: str, used: Callable[[], float], limit: Callable[[], float]) -> None:
        """From now on, while the process lives. Both are called at a scrape: quick, and without I/O."""
        self._watched[name] = used, limit

    def watch_tables(self) -> None:
        """The caches of series' labels, which every worker has that reads or writes batches."""
        for name, cache in (("tables_written", series_table.WRITTEN), ("tables_read", series_table.READ)):
            self.watch(name, lambda c=cache: c.bytes_used, lambda c=cache: c.bytes_max)  # type: ignore[misc]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        used = GaugeMetricFamily(
            "headgate_bound_used",
            "How much is in a queue, memory or cache that is bounded; docs/bounds.md says of what, and what happens at headgate_bound_limit.",
            labels=["bound"],
        )
        limit = GaugeMetricFamily(
            "headgate_bound_limit",
            "What it may hold, in the same unit as headgate_bound_used.",
            labels=["bound"],
        )
        for name, (now, most) in self._watched.items():
            used.add_metric([name], now())
            limit.add_metric([name], most())
        yield used
        yield limit


BOUNDS = Bounds()
REGISTRY.register(BOUNDS)
