"""Charges in dollars, by account, service and reason: what was spent, and what the month will come to. Pure.

* A million ListMetrics requests of an account and month are free; they are used up in the order of the days.
* The forecast is the grid's: each look that is left in the month, as polls are stretched now, at what the newest complete look billed. Healing,
  rechecks and backfills are no part of it, for nobody knows; discovery goes on as it did in this month.
* Both readings of each disputed switch are shown, the configured one as the cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date, timedelta
from decimal import Decimal
from typing import Final

from ingest.budget import ZERO, Poll, Polling, ticks
from ingest.charges import Charge, Reason, day_of
from ingest.model import SourceName
from ingest.spending import metrics_usd, payer_of, payers_of
from shard_config.model import Config
from shard_config.price import DAY_S, Prices, statistics_share

BY: Final = ("account", "region", "service", "reason", "day")


@dataclass(frozen=True, slots=True)
class Amount:
    """What some charges come to. `usd` is of GetMetricData and ListMetrics; `once_usd` and `pages_usd` are GetMetricData by the other reading of
    `statistics_count_once` and `pages_count_again`.
    """

    metrics: int = 0
    list_metrics: int = 0
    puts: int = 0
    usd: Decimal = ZERO
    in_doubt_usd: Decimal = ZERO
    puts_usd: Decimal = ZERO
    once_usd: Decimal = ZERO
    pages_usd: Decimal = ZERO

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Line:
    """Of one combination of what is asked by. `rest_usd` is what the rest of the month will add."""

    key: tuple[str, ...]
    today: Amount = field(default_factory=Amount)
    period: Amount = field(default_factory=Amount)
    rest_usd: Decimal = ZERO

    @property
    def forecast_usd(self) -> Decimal:
        return self.period.usd + self.rest_usd


@dataclass(frozen=True, slots=True)
class Only:
    """Which charges are meant; None: all."""

    account: str | None = None
    region: str | None = None
    service: str | None = None

    def has(self, account: str, region: str | None, service: str) -> bool:
        wanted = ((self.account, account), (self.region, region), (self.service, service))
        return all(asked in (None, there) for asked, there in wanted)


def amounts(charges: Iterable[Charge], config: Config, from_day: date) -> list[tuple[Charge, Amount]]:
    """Each charge from a day on with what it comes to. `charges` begin with that day's month, for the free requests of it."""
    prices, payers, profiles = Prices.of(config.aws), payers_of(config), config.service_by_name
    put_usd = Decimal(str(config.prices.s3_usd_per_1000_puts)) / 1000
    lists: dict[tuple[str, int, int], int] = defaultdict(int)
    found = []
    for c in sorted(charges, key=lambda c: (c.day, c.target, c.service, c.reason)):
        month = (payer_of(payers, c.target.account), c.day.year, c.day.month)
        list_usd = prices.list_metrics_usd(c.list_metrics, lists[month])
        lists[month] += c.list_metrics
        if c.day < from_day:
            continue
        profile = profiles.get(c.service)
        share = statistics_share(profile)
        usd = metrics_usd(c.metrics_billed, profile, prices)
        sign = -1 if prices.pages_count_again else 1
        found.append(
            (
                c,
                Amount(
                    metrics=c.metrics_billed,
                    list_metrics=c.list_metrics,
                    puts=c.puts,
                    usd=usd + list_usd,
                    in_doubt_usd=metrics_usd(max(0, c.metrics_in_doubt), profile, prices)
                    if c.target.source == SourceName.CLOUDWATCH
                    else ZERO,
                    puts_usd=c.puts * put_usd,
                    once_usd=prices.get_metric_data_usd(c.metrics_billed)
                    * (1 if prices.statistics_count_once else share),
                    pages_usd=metrics_usd(c.metrics_billed + sign * c.metrics_continued, profile, prices),
                ),
            )
        )
    return found


def lines(
    priced: Sequence[tuple[Charge, Amount]],
    today: date,
    by: Sequence[str],
    only: Only,
    rest: Mapping[tuple[str, str, str, str], Decimal],
) -> list[Line]:
    """What was spent, by what is asked for, the dearest first. `rest` is by account, region, service and reason."""
    periods: dict[tuple[str, ...], Amount] = defaultdict(Amount)
    todays: dict[tuple[str, ...], Amount] = defaultdict(Amount)
    rests: dict[tuple[str, ...], Decimal] = defaultdict(Decimal)
    for c, amount in priced:
        if not only.has(c.target.account, c.target.region, c.service):
            continue
        names = {"account": c.target.account, "region": c.target.region, "service": c.service}
        names |= {"reason": str(c.reason), "day": c.day.isoformat()}
        key = tuple(names[b] for b in by)
        periods[key] += amount
        if c.day == today:
            todays[key] += amount
    for (account, region, service, reason), usd in rest.items():
        if "day" in by or not only.has(account, region, service):
            continue
        names = {"account": account, "region": region, "service": service, "reason": reason}
        rests[tuple(names[b] for b in by)] += usd
    found = [
        Line(key, todays.get(key, Amount()), periods.get(key, Amount()), rests.get(key, ZERO))
        for key in {*periods, *rests}
    ]
    shown = [one for one in found if one.period != Amount() or one.rest_usd]
    return sorted(shown, key=lambda one: one.key if "day" in by else (-one.forecast_usd, one.key))


def total(some: Iterable[Line]) -> Line:
    """All lines together."""
    today, period, rest = Amount(), Amount(), ZERO
    for one in some:
        today, period, rest = today + one.today, period + one.period, rest + one.rest_usd
    return Line(("all",), today, period, rest)


def rest_of_month(
    polls: Iterable[Poll],
    polling: Polling,
    month: Sequence[Charge],
    config: Config,
    now_s: int,
) -> dict[tuple[str, str, str, str], Decimal]:
    """What the rest of the month will bill, by account, region, service and reason. `month` has its charges so far.

    What a hard cap has stopped goes on at midnight.
    """
    found: dict[tuple[str, str, str, str], Decimal] = defaultdict(Decimal)
    end_s = month_end_s(now_s)
    for p in polls:
        from_s = (now_s // DAY_S + 1) * DAY_S if p.pair in polling.stopped else now_s
        looks = ticks(p.poll_interval_s, polling.of(*p.pair), from_s, end_s)
        found[p.account, p.region, p.service, Reason.LIVE] += p.usd_per_look * looks
    gone_s = now_s - _start_s(day_of(now_s).replace(day=1))
    prices, payers = Prices.of(config.aws), payers_of(config)
    lists: dict[str, int] = defaultdict(int)
    for c in month:
        lists[payer_of(payers, c.target.account)] += c.list_metrics
    for c in month:
        payer = payer_of(payers, c.target.account)
        coming = lists[payer] * (end_s - now_s) // max(DAY_S, gone_s)
        usd = prices.list_metrics_usd(coming, lists[payer])
        if usd and c.list_metrics:
            share = Decimal(c.list_metrics) / lists[payer]
            found[c.target.account, c.target.region, c.service, Reason.DISCOVERY] += usd * share
    return dict(found)


def month_end_s(now_s: int) -> int:
    """The first second of the next month, UTC."""
    first = day_of(now_s).replace(day=1)
    return _start_s((first + timedelta(days=32)).replace(day=1))


def _start_s(day: date) -> int:
    return (day - date(1970, 1, 1)).days * DAY_S
