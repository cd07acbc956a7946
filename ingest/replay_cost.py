"""What a replay costs at S3 and Kafka, and which windows a backfill leaves alone because they are paused. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from ingest.backfill import Means, Stretch
from ingest.model import Target
from ingest.pauses import Pauses
from ingest.schedule import Grid
from shard_config.price import DAY_S
from shard_config.price_list import PriceList
from shard_config.quote import BYTES_PER_POINT, GB

KEYS_PER_PAGE = 1000
"""Of a LIST."""


@dataclass(frozen=True, slots=True)
class ReplayCost:
    """Requests to S3, and bytes out of Kafka (None: not known). `usd` is without what is not known."""

    gets: int = 0
    lists: int = 0
    kafka_bytes: int | None = 0
    usd: Decimal = Decimal()

    def __str__(self) -> str:
        parts = [f"{self.gets:,} GET and {self.lists:,} LIST at S3"] if self.gets else []
        if self.kafka_bytes:
            parts.append(f"{Decimal(self.kafka_bytes) / GB:,.3f} GB out of Kafka")
        return f"about {' and '.join(parts)}: ${self.usd:,.4f}" if parts else ""


def replay_cost(
    grids: Mapping[Target, Sequence[Grid]],
    from_s: int,
    until_s: int,
    kafka_points: int | None,
    prices: PriceList,
) -> ReplayCost:
    """Of replaying S3 over [from_s, until_s) of the targets in `grids` (none: not S3), and so many points from Kafka.

    A replay of S3 reads every object of a target: one a task, so one whenever its quickest service is polled.
    """
    gets = lists = 0
    for some in grids.values():
        tick_s = min(grid.poll_interval_s for grid in some)
        gets += max(0, -(-(until_s - from_s) // tick_s))
        days = max(0, -(-until_s // DAY_S) - from_s // DAY_S)
        lists += days * -(-DAY_S // (tick_s * KEYS_PER_PAGE))
    read = None if kafka_points is None else int(kafka_points * BYTES_PER_POINT)
    usd = (
        gets * Decimal(str(prices.s3_usd_per_1000_gets)) / 1000
        + lists * Decimal(str(prices.s3_usd_per_1000_puts)) / 1000
        + (read or 0) / GB * Decimal(str(prices.kafka_usd_per_gb_out))
    )
    return ReplayCost(gets, lists, read, usd)


def without_paused(stretches: Iterable[Stretch], pauses: Pauses) -> tuple[Stretch, ...]:
    """The stretches, those of paused accounts and services not asked from CloudWatch: what is kept is replayed all the same."""
    return tuple(
        replace(s, means=Means.NOWHERE, points=0, usd=Decimal(), period_s=0, detail=PAUSED)
        if s.means is Means.CLOUDWATCH and pauses.cover(s.target.account, s.service)
        else s
        for s in stretches
    )


PAUSED = "paused; --even-paused asks CloudWatch"
