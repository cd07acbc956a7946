"""Requests → US dollars, as AWS's list prices say. Pure.

GetMetricData bills each *metric requested*, $0.01 per 1,000, however many points come back: so a poll each 5 minutes at a period of 60 s costs a fifth
of one each minute, and reading unsettled windows again in the same call costs nothing more. Two readings of the price list are disputed, and are
switches here; each defaults to the dearer, so that a bill surprises nobody:

* `statistics_count_once`: whether up to five statistics of one metric in one call count as one metric (YACE #1806 and PR #1919 read it so) or each
  counts (cloudwatch_exporter PR #482). Default: each counts.
* `pages_count_again`: whether the continuation page of a call (NextToken) bills its metrics again. Default: it does.

Receipts and the ledger count queries (metric × statistic), by neither reading of statistics: it is here that queries become dollars, by the share of a
service's profile (`statistics_share`). So the switch applies to the past too, and to whatever is quoted, reserved, shown or reconciled.

ListMetrics bills requests, $0.01 per 1,000, after a million free ones a month. What S3, Kafka and the store cost is in `price_list`.
Money is Decimal: a day's sum over millions of looks is exact, and so equal wherever it is summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, Self

from shard_config.model import Aws, ServiceProfile

DAY_S: Final = 86_400
STATISTICS_IN_ONE: Final = 5
"""So many statistics of a metric are one, where statistics count once."""


@dataclass(frozen=True, slots=True)
class Prices:
    """A price list and how it is read. Negotiated prices go in here."""

    usd_per_1000_metrics: Decimal = Decimal("0.01")
    usd_per_1000_requests: Decimal = Decimal("0.01")
    requests_free_per_month: int = 1_000_000
    statistics_count_once: bool = False
    pages_count_again: bool = True
    shares: Mapping[str, Decimal] = field(default_factory=dict, hash=False)
    """By service, `statistics_share` where statistics count once."""

    @classmethod
    def of(cls, aws: Aws, services: Iterable[ServiceProfile] = ()) -> Self:
        """The prices that a configuration states. What is of no service in `services` is priced by the dearer reading."""
        return cls(
            # By way of text: Decimal(0.01) is not 0.01.
            usd_per_1000_metrics=Decimal(str(aws.usd_per_1000_metrics)),
            usd_per_1000_requests=Decimal(str(aws.usd_per_1000_requests)),
            requests_free_per_month=aws.requests_free_per_month,
            statistics_count_once=aws.statistics_count_once,
            pages_count_again=aws.pages_count_again,
            shares={p.service: statistics_share(p) for p in services} if aws.statistics_count_once else {},
        )

    def metrics_billed(self, metrics: int, statistics: int, pages: int = 1) -> int:
        """What GetMetricData bills for `metrics` metrics with `statistics` statistics each, answered in `pages` pages."""
        counted = -(-statistics // STATISTICS_IN_ONE) if self.statistics_count_once else statistics
        return metrics * counted * (pages if self.pages_count_again else 1)

    def get_metric_data_usd(self, queries: int, service: str = "") -> Decimal:
        """What GetMetricData bills for so many queries of a service; without one, by the dearer reading of statistics."""
        return queries * self.shares.get(service, Decimal(1)) * self.usd_per_1000_metrics / 1000

    def list_metrics_usd(self, requests: int, before: int = 0) -> Decimal:
        """`requests` calls, where `before` of the same account and month came before them."""
        free = max(0, self.requests_free_per_month - before)
        return max(0, requests - free) * self.usd_per_1000_requests / 1000

    def look_usd(self, metrics_billed: int, requests: Mapping[str, int], service: str = "") -> Decimal:
        """The most that a look may cost, of the counts in its outcome: as if the free requests were used up."""
        lists = self.list_metrics_usd(requests.get("ListMetrics", 0), self.requests_free_per_month)
        return self.get_metric_data_usd(metrics_billed, service) + lists

    def day_usd(self, metrics_billed: int, poll_interval_s: int) -> Decimal:
        """A day of looks that bill so many metrics each."""
        return self.get_metric_data_usd(metrics_billed) * DAY_S / poll_interval_s


def statistics_share(profile: ServiceProfile | None) -> Decimal:
    """Metrics per query where up to five statistics of a metric count once: exact where all metrics have as many statistics."""
    if profile is None:
        return Decimal(1)
    per_metric = (
        [len(profile.statistics)]
        if profile.metrics == "all"
        else [len(m.statistics) for m in profile.metrics]
    )
    return Decimal(sum(-(-n // STATISTICS_IN_ONE) for n in per_metric)) / sum(per_metric)
