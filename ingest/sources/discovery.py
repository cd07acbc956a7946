"""Which metrics there are: ListMetrics, kept for the discovery interval.

Guarantees:

* a listing is whole or it is not used: every page was read, no page was cut off, no token came twice;
* what was listed is kept when a later listing fails, and whoever uses it is told how old it is;
* one listing in flight per (target, service).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import structlog

from ingest.clock import Clock
from ingest.errors import HeadgateError, Transient
from ingest.model import Series, SeriesKey, Target
from ingest.sources.aws import Access, Aws, Tally
from ingest.sources.columns import SeriesTable, tables_of
from ingest.sources.look import date_ms
from ingest.validate import series_problem
from shard_config.model import Account, Limits, ServiceProfile

log = structlog.get_logger()

CALLS_PER_S = 25.0
"""ListMetrics' quota per account and region."""
PAGES_MAX = 2_000
"""A million metrics of one namespace in one account and region. More is an error, not a shorter answer."""
LISTINGS_MAX = 4_096
"""Targets × services whose listings are kept; a process with more lists the longest unlisted again."""

Metric = tuple[str, tuple[tuple[str, str], ...]]
"""Name, and dimensions sorted by name."""


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """All series of one target and service, in tables of up to 500."""

    tables: tuple[SeriesTable, ...]
    listed_at_s: float
    """Monotonic."""
    observed_at_ms: int
    """The source's clock, at the first page."""
    note: str = ""
    """Says so where this listing is older than it should be."""

    @property
    def series(self) -> int:
        return sum(len(table) for table in self.tables)


def series_of(metrics: Iterable[Metric], target: Target, profile: ServiceProfile) -> list[Series]:
    """The (metric × statistic) that a profile asks for, in one order whatever the order of the listing."""
    wanted = None if profile.metrics == "all" else {metric.name: metric for metric in profile.metrics}
    found: list[Series] = []
    for name, dimensions in sorted(set(metrics)):
        metric = wanted.get(name) if wanted is not None else None
        if wanted is not None and metric is None:
            continue
        for stat in profile.statistics if metric is None else metric.statistics:
            key = SeriesKey(
                target.account, target.region, profile.namespace, name, dimensions, stat, profile.period_s
            )
            found.append(Series(key, metric.unit if metric is not None else ""))
    return found


def metrics_of(page: Any, namespace: str) -> list[Metric]:
    """The metrics on one page of ListMetrics. Raises Transient where the page is cut off."""
    # botocore 1.43 takes a body that does not parse for an empty answer.
    if not isinstance(page, dict) or not isinstance(page.get("Metrics"), list):
        raise Transient(f"aws ListMetrics {namespace}", "a page without a list of metrics")
    return [
        (one["MetricName"], tuple(sorted((d["Name"], d["Value"]) for d in one.get("Dimensions") or ())))
        for one in page["Metrics"]
    ]


class Discovery:
    """Listings of all targets of this process."""

    def __init__(self, aws: Aws, clock: Clock, limits: Limits) -> None:
        self._aws = aws
        self._clock = clock
        self._limits = limits
        self._listings: dict[tuple[Target, str], Listing] = {}
        self._locks: dict[tuple[Target, str], asyncio.Lock] = {}

    async def listing(
        self, account: Account, target: Target, profile: ServiceProfile, deadline_s: float, tally: Tally
    ) -> Listing:
        """A listing not older than the profile's discovery interval, or the last one with a note.

        Raises Transient, Denied or Rejected where there is none and none is to be had.
        """
        key = (target, profile.service)
        if known := self._recent(key, profile):
            return known
        async with self._locks.setdefault(key, asyncio.Lock()):
            if known := self._recent(key, profile):
                return known
            old = self._listings.get(key)
            try:
                fresh = await self._list(account, target, profile, deadline_s, tally)
            except HeadgateError as failure:
                if old is None:
                    raise
                age_s = int(self._clock.monotonic_s() - old.listed_at_s)
                log.warning(
                    "discovery_failed",
                    target=str(target),
                    service=profile.service,
                    age_s=age_s,
                    error=str(failure),
                )
                return Listing(
                    old.tables, old.listed_at_s, old.observed_at_ms, f"discovery is {age_s} s old: {failure}"
                )
            self._keep(key, fresh)
            return fresh

    def _recent(self, key: tuple[Target, str], profile: ServiceProfile) -> Listing | None:
        known = self._listings.get(key)
        if known is None or self._clock.monotonic_s() - known.listed_at_s >= profile.discovery_interval_s:
            return None
        return known

    def _keep(self, key: tuple[Target, str], listing: Listing) -> None:
        self._listings.pop(key, None)
        self._listings[key] = listing
        while len(self._listings) > LISTINGS_MAX:
            oldest = next(iter(self._listings))
            del self._listings[oldest]
            self._locks.pop(oldest, None)

    async def _list(
        self, account: Account, target: Target, profile: ServiceProfile, deadline_s: float, tally: Tally
    ) -> Listing:
        key = (target, profile.service)
        where = f"aws ListMetrics {target} {profile.namespace}"
        params: dict[str, Any] = {"Namespace": profile.namespace}
        if profile.recently_active:
            params["RecentlyActive"] = "PT3H"

        async def page_of(access: Access) -> tuple[list[Metric], str, int | None]:
            async with self._aws.client("cloudwatch", access) as client:
                answer = await client.list_metrics(**params)
            date = date_ms(answer["ResponseMetadata"]["HTTPHeaders"].get("date"))
            return metrics_of(answer, profile.namespace), answer.get("NextToken") or "", date

        metrics: list[Metric] = []
        tokens: set[str] = set()
        observed_at_ms: int | None = None
        for _ in range(PAGES_MAX):
            found, token, date = await self._aws.call(
                account,
                target.region,
                "ListMetrics",
                page_of,
                cost_s=1 / CALLS_PER_S,
                deadline_s=deadline_s,
                tally=tally,
            )
            observed_at_ms = observed_at_ms or date or self._clock.now_ms()
            metrics += found
            if not token:
                break
            if token in tokens:
                raise Transient(where, "the same NextToken came twice")
            tokens.add(token)
            params["NextToken"] = token
        else:
            raise Transient(where, f"more than {PAGES_MAX} pages", "split the service's profile")
        old = self._listings.get(key)
        known = old.tables if old is not None else ()

        def tabulate() -> tuple[tuple[SeriesTable, ...], int]:
            series = series_of(metrics, target, profile)
            travelling = [one for one in series if series_problem(one, self._limits) is None]
            return tables_of(travelling, known), len(series) - len(travelling)

        # In a thread, for 100,000 series take a second.
        tables, refused = await asyncio.to_thread(tabulate)
        log.info(
            "discovered", target=str(target), service=profile.service, metrics=len(metrics), refused=refused
        )
        return Listing(tables, self._clock.monotonic_s(), observed_at_ms or 0)
