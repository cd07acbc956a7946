"""Dollars: what monitoring cost and who moved, what resources cost by the configured price list, and how much of its quotas Headgate asks for. Pure.

Guarantees:

* *no price is made up*: what the configuration has no price for has none here, and the reason names the key that would give one;
* *list and effective price stand together*, with the assumption that lies between them;
* *the month's ListMetrics requests are free until they are used up*, in the order of days, as they are billed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from decimal import Decimal
from typing import Final

from ingest.charges import Charge
from ingest.inventory.model import Resource
from ingest.report.model import MONTH_H, AccountSpend, Figure, Money, Mover, QuotaUse, Spend
from ingest.spending import cloudwatch, metrics_usd, payer_of, payers_of
from shard_config.model import Config
from shard_config.price import Prices
from shard_config.report import Discount, Price, Report

GIB: Final = 1024**3
LIST_PRICE: Final = "list price, no discount configured"
WEEK_DAYS: Final = 7
MOVERS_MAX: Final = 50

# --- what resources cost ----------------------------------------------------------------------------------------------


class Pricing:
    """The `report.prices` and `report.discounts` of a configuration."""

    def __init__(self, report: Report) -> None:
        self._prices: dict[tuple[str, str], list[Price]] = defaultdict(list)
        self._discounts = report.discounts
        for price in report.prices:
            self._prices[price.service, price.type].append(price)

    def of(self, resource: Resource, on_share: float = 1.0) -> tuple[Money | None, str]:
        """What a resource costs a month, or None and why that is not known. `on_share`, 0..1: how much of the time it is on; storage
        costs all the time.
        """
        if resource.purchase == "spot":
            return None, "it is a spot instance: its price moves"
        price = self._price(resource)
        if price is None:
            return None, f"report.prices has none for {_named(resource)}"
        usd = 0.0
        if price.usd_per_hour is not None:
            usd += price.usd_per_hour * MONTH_H * on_share * (resource.nodes or 1)
        if price.usd_per_gib_month is not None:
            if resource.storage_bytes is None:
                return None, "its storage is not known"
            usd += price.usd_per_gib_month * resource.storage_bytes / GIB
        return self._effective(usd, resource), ""

    def difference(self, resource: Resource, smaller: str, on_share: float = 1.0) -> tuple[Money | None, str]:
        """What the same resource of another type would cost less a month; at least 0."""
        now, unknown = self.of(resource, on_share)
        then, unknown_then = self.of(replace(resource, type=smaller), on_share)
        if now is None or then is None:
            return None, unknown or unknown_then
        usd = max(0.0, now.list_usd_per_month - then.list_usd_per_month)
        return self._effective(usd, resource), ""

    def sizes(self) -> dict[tuple[str, str], tuple[float, float | None]]:
        """vCPU and memory, bytes, of the types that prices name with their size, by service and type."""
        return {
            key: (p.vcpu, None if p.memory_gib is None else p.memory_gib * GIB)
            for key, prices in self._prices.items()
            for p in prices
            if p.vcpu is not None
        }

    def _price(self, resource: Resource) -> Price | None:
        fitting = [
            p
            for p in self._prices.get((resource.service, resource.type), ())
            if p.region in ("", resource.region)
            and p.engine in ("", resource.engine)
            and p.multi_az == bool(resource.multi_az)
        ]
        # The most particular one counts.
        return max(fitting, key=lambda p: (bool(p.region), bool(p.engine)), default=None)

    def _effective(self, usd: float, resource: Resource) -> Money:
        discount = next((d for d in self._discounts if _fits(d, resource)), None)
        if discount is None:
            return Money(usd, usd, LIST_PRICE)
        words = f"{discount.name}: {discount.share:.0%} off"
        return Money(usd, usd * (1 - discount.share), words)


def _fits(discount: Discount, resource: Resource) -> bool:
    return (not discount.accounts or resource.account in discount.accounts) and (
        not discount.services or resource.service in discount.services
    )


def _named(resource: Resource) -> str:
    words = (resource.service, resource.type, resource.engine, "Multi-AZ" if resource.multi_az else "")
    return f"{' '.join(w for w in words if w)} in {resource.region}"


# --- what monitoring costs --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Billed:
    """Dollars of one payer, or of one account's service, by day."""

    by_day: dict[date, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    in_doubt: Decimal = Decimal(0)

    def week(self, to_day: date) -> Decimal:
        days = (to_day - timedelta(n + 1) for n in range(WEEK_DAYS))
        return sum((self.by_day.get(day, Decimal(0)) for day in days), Decimal(0))

    def figure(self, to_day: date, first_day: date | None) -> Figure:
        """Of the 7 days before `to_day`. The week before is not known where the ledger begins within it."""
        before_day = to_day - timedelta(WEEK_DAYS)
        known = first_day is not None and first_day <= before_day - timedelta(WEEK_DAYS)
        before = float(self.week(before_day)) if known else None
        return Figure(float(self.week(to_day)), "usd", before, 1.0)


def spend_of(
    charges: Iterable[Charge],
    config: Config,
    from_day: date,
    to_day: date,
    accounts: Sequence[str] = (),
) -> tuple[Spend, tuple[Mover, ...]]:
    """Monitoring spend of the 7 days before `to_day`, against the budget, and what moved most since the week before.

    `charges` are the ledger's, from the first of the month of the earlier of `from_day` and 14 days before `to_day`, so that free requests are
    counted in their order; `daily_usd` is of [from_day, to_day). `accounts` are those whose money counts, empty: all.
    """
    by_payer: dict[str, _Billed] = defaultdict(_Billed)
    by_pair: dict[tuple[str, str], _Billed] = defaultdict(_Billed)
    first_day = None
    for day, payer, account, service, usd, in_doubt in _billed(charges, config):
        if accounts and account not in accounts:
            continue
        first_day = day if first_day is None else min(first_day, day)
        for one in (by_payer[payer], by_pair[account, service]):
            one.by_day[day] += usd
        if to_day - timedelta(WEEK_DAYS) <= day < to_day:
            by_payer[payer].in_doubt += in_doubt
    total = _Billed()
    for one in by_payer.values():
        total.in_doubt += one.in_doubt
        for day, usd in one.by_day.items():
            total.by_day[day] += usd
    of_all = config.budget.usd_per_day
    days = [from_day + timedelta(n) for n in range((to_day - from_day).days)]
    spend = Spend(
        total.figure(to_day, first_day),
        float(total.in_doubt),
        None if of_all is None or accounts else of_all * WEEK_DAYS,
        tuple(float(total.by_day.get(day, Decimal(0))) for day in days),
        _accounts(by_payer, config, to_day, first_day),
    )
    movers = [
        Mover(account, service, "monitoring", one.figure(to_day, first_day))
        for (account, service), one in by_pair.items()
    ]
    moved = [m for m in movers if m.figure.change]
    return spend, tuple(sorted(moved, key=lambda m: (-abs(m.figure.change or 0), m.account, m.service)))[
        :MOVERS_MAX
    ]


def _billed(
    charges: Iterable[Charge], config: Config
) -> Iterable[tuple[date, str, str, str, Decimal, Decimal]]:
    """(day, payer, account, service, usd, usd in doubt) of each charge of CloudWatch's API, in the order of days."""
    profiles, prices, payers = (
        config.service_by_name,
        Prices.of(config.aws, config.services),
        payers_of(config),
    )
    lists: dict[tuple[str, int, int], int] = defaultdict(int)
    for one in sorted(cloudwatch(charges), key=lambda c: c.day):
        payer = payer_of(payers, one.target.account)
        month = (payer, one.day.year, one.day.month)
        usd = metrics_usd(one.metrics_billed, profiles.get(one.service), prices)
        usd += prices.list_metrics_usd(one.list_metrics, lists[month])
        lists[month] += one.list_metrics
        doubt = metrics_usd(max(0, one.metrics_in_doubt), profiles.get(one.service), prices)
        yield one.day, payer, one.target.account, one.service, usd, doubt


def _accounts(
    by_payer: Mapping[str, _Billed], config: Config, to_day: date, first_day: date | None
) -> tuple[AccountSpend, ...]:
    budgets = {a.id: a.budget_usd_per_day for a in config.accounts if not a.via}
    found = []
    for payer, one in by_payer.items():
        budget = budgets.get(payer)
        week_usd = None if budget is None else budget * WEEK_DAYS
        found.append(AccountSpend(payer, one.figure(to_day, first_day), float(one.in_doubt), week_usd))
    return tuple(sorted(found, key=lambda a: (-(a.usd.value or 0), a.account)))


# --- quotas -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """What Headgate asked an account for in a region in its busiest hour of a week: GetMetricData calls and datapoints (range ÷ period a query)."""

    account: str
    region: str
    calls: int
    datapoints: int


def quotas_of(
    week: Iterable[Asked], before: Iterable[Asked], config: Config, coverage: float
) -> tuple[QuotaUse, ...]:
    """What is asked a second in the busiest hour, against each account's quota; nearest to it first. Accounts of no configuration have none.
    `coverage`, 0..1: of so much of the week its looks are known.

    What is asked by way of a monitoring account has to be that account's already, for it is its quota.
    """
    accounts = {a.id: a for a in config.accounts}
    earlier = {(a.account, a.region): a for a in before}
    found = []
    for one in week:
        account, was = accounts.get(one.account), earlier.get((one.account, one.region))
        if account is None:
            continue
        for what, now, then, quota in (
            ("GetMetricData calls", one.calls, None if was is None else was.calls, account.calls_per_s),
            ("datapoints", one.datapoints, None if was is None else was.datapoints, account.datapoints_per_s),
        ):
            figure = Figure(now / 3600, "1/s", None if then is None else then / 3600, coverage)
            found.append(QuotaUse(one.account, one.region, what, figure, quota))
    return tuple(sorted(found, key=lambda q: (-(q.share or 0), q.account, q.region, q.what)))
