"""Which metrics there are: ListMetrics, kept for the discovery interval and shared between the shards.

Guarantees:

* a listing is whole or it is not used: every page was read, no page was cut off, no token came twice, and where selections ask for
  tags, all tagged resources are known;
* what was listed is kept when a later listing fails, and whoever uses it is told how old it is;
* pages that were paid for and came to nothing are paid for again ever more rarely, down to once in the discovery interval;
* a shard that takes a target over uses the listing of the one before, as long as that is not older than the interval;
* series that a listing has and the one before had not are looked for back to when they may have begun (`Listing.late`), until such a
  look is published, whichever shard takes it;
* one listing in flight per (target, service); of a million metrics the names alone are in memory, compressed, until they are packed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog

from ingest.clock import Clock
from ingest.errors import HeadgateError, Rejected, Transient
from ingest.model import Target
from ingest.sources.aws import Access, Aws, Tally
from ingest.sources.aws_errors import Denied
from ingest.sources.listing import Cache, Late, Listing, Shared, depends_on
from ingest.sources.look import said_of
from ingest.sources.packed import added, pack
from ingest.sources.resource_lists import ResourceLists
from ingest.sources.selection import (
    Metric,
    Names,
    Selector,
    TagIndex,
    asks_tags,
    dimensions_of_all,
    tag_keys,
)
from ingest.sources.tags import tagged_resources
from ingest.sources.transport import ListPage
from shard_config.model import Account, Limits, ServiceProfile

log = structlog.get_logger()

CALLS_PER_S = 25.0
"""ListMetrics' quota per account and region."""
PAGES_MAX = 2_000
"""A million metrics of one namespace in one account and region. More is an error, not a shorter answer."""
LISTINGS_MAX = 4_096
"""Targets × services whose listings are kept; a process with more asks for the longest unlisted again."""
APPEARS_S = 900
"""So long a metric that reports may be missing in ListMetrics."""
LATE_S_MAX = 86_400
"""So old a look back is no longer passed on to the next listing: by then each series would take a day of points."""
FIRST_WAIT_SHARE = 1 / 12
"""Of the discovery interval, after a first failure: five minutes of an hour; then twice as long each time."""

Key = tuple[Target, str]


class ListMetrics(Protocol):
    """Sends one request and reads one page."""

    async def __call__(self, access: Access, params: Mapping[str, Any]) -> ListPage: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is asked for a target's metrics, and how: its own account, or a monitoring account (then `linked`)."""

    account: Account
    linked: bool
    aws: Aws
    list_metrics: ListMetrics


@dataclass(frozen=True, slots=True)
class _Failure:
    """Of a listing whose pages were paid for. `until_s` is monotonic: before that it is not tried again."""

    error: HeadgateError
    depends: str
    wait_s: float
    until_s: float


@dataclass(frozen=True, slots=True)
class _Page:
    """`owners` has one account a metric where a monitoring account was asked for them, else none."""

    metrics: list[Metric]
    owners: list[str]
    next_token: str
    date_ms: int | None


def metrics_of(page: Any, namespace: str) -> list[Metric]:
    """The metrics on one page of ListMetrics. Raises Transient where the page is cut off."""
    # A body that does not parse is `{"message": …}`, and no empty answer.
    if not isinstance(page, dict) or not isinstance(page.get("Metrics"), list):
        raise Transient(f"aws ListMetrics {namespace}", "a page without a list of metrics")
    return [
        (one["MetricName"], tuple(sorted((d["Name"], d["Value"]) for d in one.get("Dimensions") or ())))
        for one in page["Metrics"]
    ]


def request_of(profile: ServiceProfile, owner: str = "") -> dict[str, Any]:
    """The first request for a profile's metrics. AWS leaves out what no selection could take, which saves pages."""
    params: dict[str, Any] = {"Namespace": profile.namespace}
    if profile.recently_active:
        params["RecentlyActive"] = "PT3H"
    if profile.metrics != "all" and len(profile.metrics) == 1:
        params["MetricName"] = profile.metrics[0].name
    if names := dimensions_of_all(profile.only):
        params["Dimensions"] = [{"Name": name} for name in names]
    if owner:
        params |= {"IncludeLinkedAccounts": True, "OwningAccount": owner}
    return params


class Discovery:
    """Listings of all targets of this process."""

    def __init__(self, clock: Clock, limits: Limits, *, resources: bool = False) -> None:
        """`resources`: whether remote writers want lists of tagged resources."""
        self._clock = clock
        self._limits = limits
        self.resources = ResourceLists(clock, wanted=resources)
        self._shared: Shared | None = None
        self._listings: dict[Key, tuple[Listing, float]] = {}
        """Each with the monotonic time of its listing, however old it was when it was found."""
        self._locks: dict[Key, asyncio.Lock] = {}
        self._failures: dict[Key, _Failure] = {}

    def share(self, cache: Cache) -> None:
        self._shared = Shared(cache, self._clock)
        self.resources.share(cache)

    @property
    def listings(self) -> int:
        """Kept in memory, LISTINGS_MAX at most."""
        return len(self._listings)

    def configure(self, limits: Limits, *, resources: bool = False) -> None:
        """Other limits from the next listing on. Listings are kept: each knows what of its profile it depends on."""
        if limits != self._limits:
            self._failures.clear()
        self._limits = limits
        self.resources.wanted = resources

    async def listing(
        self, asked: Asked, target: Target, profile: ServiceProfile, deadline_s: float, tally: Tally
    ) -> Listing:
        """A listing not older than the profile's discovery interval, or the last one with a note.

        Raises Transient, Denied or Rejected where there is none and none is to be had.
        """
        key, depends = (target, profile.service), depends_on(profile, self._limits)
        if known := self._recent(key, profile, depends):
            return known
        async with self._locks.setdefault(key, asyncio.Lock()):
            if known := self._recent(key, profile, depends):
                return known
            if self._shared is not None and self._known(key, depends) is None:
                found = await self._shared.get(target, profile, depends, deadline_s, self._limits)
                if found is not None and found.series <= self._limits.series_per_target_max:
                    self._keep(key, found, max(0.0, self._clock.now_s() - found.listed_at_s))
                    if known := self._recent(key, profile, depends):
                        return known
            failure, now_s = self._failures.get(key), self._clock.monotonic_s()
            if failure is not None and failure.depends == depends and now_s < failure.until_s:
                return self._last(key, profile, depends, failure.error, waits=True)
            return await self._refresh(asked, key, profile, depends, deadline_s, tally)

    def age_s(self, target: Target, service: str) -> float:
        """Of the listing that is in use."""
        return self._clock.monotonic_s() - self._listings[target, service][1]

    async def looked_back(self, target: Target, service: str, late: Late, deadline_s: float) -> None:
        """A whole look that went back for these series is published."""
        known, at_s = self._listings.get((target, service), (None, 0.0))
        if known is None or known.late != late:
            return
        done = replace(known, late=None)
        self._listings[target, service] = done, at_s
        if self._shared is not None:
            await self._shared.put(target, service, done, deadline_s)

    async def _refresh(
        self,
        asked: Asked,
        key: Key,
        profile: ServiceProfile,
        depends: str,
        deadline_s: float,
        tally: Tally,
    ) -> Listing:
        target, service = key
        old = self._known(key, depends)
        paid_before = tally.requests["ListMetrics"]
        try:
            fresh = await self._list(asked, target, profile, depends, deadline_s, tally)
        except BaseException as error:
            cut_off = Transient(_where(target, profile), "cut off before its last page")
            failure = error if isinstance(error, HeadgateError) else cut_off
            wait_s = 0.0
            if tally.requests["ListMetrics"] > paid_before:
                wait_s = self._back_off(key, profile, depends, failure)
            log.warning(
                "discovery_failed",
                target=str(target),
                service=service,
                known=old is not None,
                next_try_s=int(wait_s),
                error=str(failure),
            )
            if not isinstance(error, HeadgateError):
                raise
            return self._last(key, profile, depends, failure, waits=wait_s > 0)
        self._failures.pop(key, None)
        if old is not None:
            fresh = replace(fresh, late=await self._late(key, old, fresh, profile))
        self._keep(key, fresh)
        if self._shared is not None:
            await self._shared.put(target, service, fresh, deadline_s)
        return fresh

    def _back_off(self, key: Key, profile: ServiceProfile, depends: str, failure: HeadgateError) -> float:
        """Not again for so many seconds."""
        before, interval_s = self._failures.get(key), profile.discovery_interval_s
        again = before is not None and before.depends == depends
        wait_s = min(interval_s, 2 * before.wait_s if before and again else interval_s * FIRST_WAIT_SHARE)
        kept = failure.with_traceback(None)
        self._failures.pop(key, None)
        self._failures[key] = _Failure(kept, depends, wait_s, self._clock.monotonic_s() + wait_s)
        while len(self._failures) > LISTINGS_MAX:
            del self._failures[next(iter(self._failures))]
        return wait_s

    def _last(
        self, key: Key, profile: ServiceProfile, depends: str, failure: HeadgateError, *, waits: bool
    ) -> Listing:
        """The last listing, for want of a newer one. Raises what befell that where there is none."""
        # No seconds that are left: a gap's windows with one and the same reason are one line.
        again = f"; tried again within {profile.discovery_interval_s} s" if waits else ""
        old = self._known(key, depends)
        if old is None and isinstance(failure, Denied):
            raise failure
        if old is None:
            raise Transient(failure.where, f"{failure.what}{again}", failure.remedy) from failure
        age_s = int(self._clock.monotonic_s() - self._listings[key][1])
        said = said_of(failure, key[0].account)
        return replace(old, note=f"discovery is {age_s} s old{again}: {said}")

    async def _late(self, key: Key, old: Listing, fresh: Listing, profile: ServiceProfile) -> Late | None:
        """What the next look goes back for: series that are new, and those that none was published for yet."""
        target, service = key
        pending = old.late
        if pending is not None and pending.from_s < fresh.listed_at_s - LATE_S_MAX:
            log.warning("series_not_read_back", target=str(target), service=service, from_s=pending.from_s)
            pending = None
        if new := await asyncio.to_thread(added, old.tables, fresh.tables):
            log.info("series_found_late", target=str(target), service=service, series=new)
            return _late(old, fresh, profile).and_also(pending)
        return pending

    def _known(self, key: Key, depends: str) -> Listing | None:
        known, _ = self._listings.get(key, (None, 0.0))
        return known if known is not None and known.depends == depends else None

    def _recent(self, key: Key, profile: ServiceProfile, depends: str) -> Listing | None:
        known = self._known(key, depends)
        if known is None:
            return None
        age_s = self._clock.monotonic_s() - self._listings[key][1]
        return known if age_s < profile.discovery_interval_s else None

    def _keep(self, key: Key, listing: Listing, age_s: float = 0.0) -> None:
        self._listings.pop(key, None)
        self._listings[key] = listing, self._clock.monotonic_s() - age_s
        while len(self._listings) > LISTINGS_MAX:
            oldest = next(iter(self._listings))
            del self._listings[oldest]
            self._locks.pop(oldest, None)

    # --- asking -----------------------------------------------------------------------------------------------

    async def _list(
        self,
        asked: Asked,
        target: Target,
        profile: ServiceProfile,
        depends: str,
        deadline_s: float,
        tally: Tally,
    ) -> Listing:
        index: TagIndex | None = None
        if asks_tags(profile):
            index = await self._tags(asked, target, profile, deadline_s, tally)
        names = Names(Selector(profile, index), self._limits)
        observed_at_ms = 0
        request = request_of(profile, target.account if asked.linked else "")
        tokens: set[str] = set()
        for _ in range(PAGES_MAX):
            page = await self._page(asked, target, request, deadline_s, tally)
            observed_at_ms = observed_at_ms or page.date_ms or self._clock.now_ms()
            if asked.linked and page.owners != [target.account] * len(page.metrics):
                # Data must never be labelled with an account that it is not from.
                what = f"account {asked.account.id} lists metrics that are not said to be of {target.account}"
                raise Rejected(_where(target, profile), "refused", what)
            names.add(page.metrics)
            if not page.next_token:
                break
            if page.next_token in tokens:
                raise Transient(_where(target, profile), "the same NextToken came twice")
            tokens.add(page.next_token)
            request = {**request, "NextToken": page.next_token}
        else:
            remedy = "split the service's profile: one with a single metric lists nothing else"
            raise Transient(_where(target, profile), f"more than {PAGES_MAX:,} pages", remedy)
        # In a thread, for 100,000 series take a second.
        tables = await asyncio.to_thread(lambda: tuple(pack(names.series(target), self._limits)))
        log.info(
            "discovered",
            target=str(target),
            service=profile.service,
            metrics=len(names),
            series=sum(map(len, tables)),
            refused=names.refused,
        )
        return Listing(tables, observed_at_ms, depends)

    async def _page(
        self, asked: Asked, target: Target, request: dict[str, Any], deadline_s: float, tally: Tally
    ) -> _Page:
        async def send(access: Access) -> _Page:
            found = await asked.list_metrics(access, request)
            return _Page(
                metrics_of(found.answer, request["Namespace"]),
                list(found.answer.get("OwningAccounts") or ()),
                str(found.answer.get("NextToken") or ""),
                found.date_ms,
            )

        return await asked.aws.call(
            asked.account,
            target.region,
            "ListMetrics",
            send,
            cost_s=1 / CALLS_PER_S,
            deadline_s=deadline_s,
            tally=tally,
        )

    async def _tags(
        self, asked: Asked, target: Target, profile: ServiceProfile, deadline_s: float, tally: Tally
    ) -> TagIndex:
        where = f"configuration services.{profile.service}"
        if profile.resources is None:
            raise Rejected(
                where, "no_resources", "`only` asks for tags; say in `resources` how they belong to metrics"
            )
        if asked.linked:
            raise Rejected(
                where,
                "no_tags",
                f"`only` asks for tags, and a monitoring account does not know those of {target.account}: "
                "leave `via` out, or select by dimensions",
            )
        keys = tag_keys(profile)
        if shares := self.resources.wants(profile):  # those want all of them: one listing does for both
            keys = ()
        tagged = await tagged_resources(
            asked.aws, asked.account, target, profile.resources, keys, deadline_s, tally
        )
        if shares:
            self.resources.listed(target, profile, tagged)
        return TagIndex(profile.resources, tagged)


def _where(target: Target, profile: ServiceProfile) -> str:
    return f"aws ListMetrics {target} {profile.namespace}"


def _late(old: Listing, fresh: Listing, profile: ServiceProfile) -> Late:
    """What is new may have begun right after the last listing, and that one may have missed its first 15 minutes.

    Only a look at the present goes back: what ends so much before the listing is backlog, or heals.
    """
    listed_s = int(fresh.listed_at_s)
    from_s = min(int(old.listed_at_s), listed_s - profile.discovery_interval_s) - APPEARS_S
    return Late(from_s, listed_s - APPEARS_S - 2 * profile.poll_interval_s)
