"""How many metrics there are, asked of AWS: ListMetrics over every account, region and service of a configuration. Billed, and so asked about first."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

from ingest.clock import Clock
from ingest.errors import HeadgateError
from ingest.model import SourceName, Target
from ingest.sources.asking import Asking
from ingest.sources.aws import Tally
from ingest.sources.discovery import Discovery
from ingest.sources.listing import Listing
from ingest.sources.packed import Unpacked
from shard_config.model import Account, Config, ServiceProfile
from shard_config.price import STATISTICS_IN_ONE, Prices
from shard_config.quote import PAGE_METRICS, Count, Key, alike

AT_ONCE = 8
DEADLINE_S = 120.0
"""Of one listing, with its retries."""


@dataclass(frozen=True, slots=True)
class Live:
    """What AWS said. `failed` has a line for each that could not be listed; `requests` were sent."""

    counts: dict[Key, Count]
    failed: tuple[str, ...]
    requests: int


def likely(config: Config) -> tuple[int, Decimal]:
    """About how many requests listing all of it takes, and the most that they may cost: as if the free ones were used up."""
    pages = sum(
        max(1, -(-count.listed // PAGE_METRICS)) for count in alike(config, config.accounts, {}).values()
    )
    prices = Prices.of(config.aws)
    return pages, prices.list_metrics_usd(pages, prices.requests_free_per_month)


async def ask(config: Config, clock: Clock) -> Live:
    """List all metrics, up to AT_ONCE listings at a time. What fails is in `failed`; nothing is raised for it."""
    asking, discovery = Asking(config, clock), Discovery(clock, config.limits)
    slots, unpacked, tally = asyncio.Semaphore(AT_ONCE), Unpacked(AT_ONCE), Tally()
    counts: dict[Key, Count] = {}
    failed: list[str] = []

    async def one(account: Account, region: str, profile: ServiceProfile) -> None:
        target = Target(SourceName.CLOUDWATCH.value, account.id, region)
        async with slots:
            sent = Tally()
            try:
                asked = asking.asked(account.id)
                if asked is None:
                    raise HeadgateError(str(target), "is not in the configuration")
                listing = await discovery.listing(
                    asked, target, profile, clock.monotonic_s() + DEADLINE_S, sent
                )
                counts[account.id, region, profile.service] = _count(
                    listing, profile, sent.requests["ListMetrics"], unpacked
                )
            except HeadgateError as error:
                failed.append(f"{target} {profile.service}: {error}")
            tally.requests.update(sent.requests)

    try:
        async with asyncio.TaskGroup() as group:
            for account in config.accounts:
                for region in account.regions:
                    for service in account.services:
                        group.create_task(one(account, region, config.service_by_name[service]))
    finally:
        await asking.close()
    return Live(counts, tuple(sorted(failed)), tally.requests["ListMetrics"])


def _count(listing: Listing, profile: ServiceProfile, pages: int, unpacked: Unpacked) -> Count:
    metrics = once = 0
    for packed in listing.tables:
        statistics = Counter(
            (s.key.metric, s.key.dimensions) for s in unpacked.table(packed, profile.period_s).series
        )
        metrics += len(statistics)
        once += sum(-(-n // STATISTICS_IN_ONE) for n in statistics.values())
    return Count(metrics, listing.series, once, pages * PAGE_METRICS)


def with_live(counts: dict[Key, Count], live: Live, given: frozenset[str]) -> dict[Key, Count]:
    """`counts` with what AWS said in place of what is assumed; accounts that were not asked get the mean of those that were.

    Services in `given` stay as they are.
    """
    mean: dict[str, Count] = {}
    for service in {service for _, _, service in live.counts}:
        some = [c for (_, _, s), c in live.counts.items() if s == service]
        n = len(some)
        mean[service] = Count(
            sum(c.metrics for c in some) // n,
            sum(c.queries for c in some) // n,
            sum(c.once for c in some) // n,
            sum(c.listed for c in some) // n,
        )
    return {
        key: count if key[2] in given else live.counts.get(key, mean.get(key[2], count))
        for key, count in counts.items()
    }
