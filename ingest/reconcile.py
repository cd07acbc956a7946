"""The ledger against AWS's bill, by account and UTC day; and what the bill says of the disputed readings of the price list.

* *The bill can only be more*: it has other callers' requests too. What it has beyond ours and what is in doubt is `unattributed`; a ledger that has more than the
  bill is an error, and never passed over.
* *A reading is inferred only where the data can tell*: where it alone fits account-days exactly (those on which nobody else called), and does not make us ask for more than AWS
  billed on others. That a reading is too dear is no evidence for the other: the ledger may be wrong, and that must show.

What AWS counts on the other side of midnight than we do, and rounding, is within `SLACK`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

import asyncpg

from ingest.cur import Bill, Billed
from ingest.model import Target
from ingest.sinks.connection import translated
from shard_config.model import Config
from shard_config.price import STATISTICS_IN_ONE, Prices
from shard_config.quote import count_of

SLACK: Final = Decimal("0.005")
REFUTED_ONE_IN: Final = 50
"""A reading is refuted where it is more than the bill on one account-day in so many."""

_CHARGES = """SELECT day, target, service, sum(metrics_billed)::bigint AS billed, sum(metrics_in_doubt)::bigint AS in_doubt,
    sum(metrics_continued)::bigint AS continued, sum(list_metrics)::bigint AS lists
FROM charges WHERE day >= $1 AND day < $2 AND target LIKE 'cloudwatch/%' GROUP BY 1, 2, 3"""

_SHARES = f"""SELECT account, region, namespace, sum(n)::bigint AS queries, sum(-(-n / {STATISTICS_IN_ONE}))::bigint AS once FROM (
    SELECT account, region, namespace, count(*) AS n FROM series GROUP BY account, region, namespace, metric, dimensions, period_s
) AS metrics GROUP BY 1, 2, 3"""  # noqa: S608  # a number of ours
"""How many statistics the metrics have whose series have landed."""


class Reading(NamedTuple):
    """How the price list is read; the switches of `aws`."""

    once: bool
    again: bool


READINGS: Final = tuple(Reading(once, again) for once in (False, True) for again in (True, False))


@dataclass(frozen=True, slots=True)
class Asked:
    """What an account was asked for on a UTC day. Metrics are metric × statistic; `*_once` are the same where up to five statistics are one."""

    account: str
    day: date
    metrics: Decimal = Decimal()
    metrics_once: Decimal = Decimal()
    continued: Decimal = Decimal()
    """Asked for again by continuation pages."""
    continued_once: Decimal = Decimal()
    in_doubt: int = 0
    lists: int = 0
    """Requests that were answered."""

    def by(self, reading: Reading) -> Decimal:
        """The metrics that AWS bills by a reading."""
        first, more = (
            (self.metrics_once, self.continued_once) if reading.once else (self.metrics, self.continued)
        )
        return first + (more if reading.again else 0)


@dataclass(frozen=True, slots=True)
class Inferred:
    """What the bill says of the switches: None where it cannot tell. `reading` is what is reckoned with: inferred, else configured."""

    once: bool | None
    again: bool | None
    reading: Reading
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One account and day. Metrics are GetMetricData's; `excess` is what the ledger has and the bill has not."""

    account: str
    day: date
    billed: Decimal
    ledger: Decimal
    in_doubt: int
    unattributed: Decimal
    excess: Decimal
    billed_usd: Decimal
    ledger_usd: Decimal
    lists_billed: Decimal
    lists_ledger: int


@dataclass(frozen=True, slots=True)
class Reconciled:
    """All of it. `others` are accounts in the bill that the ledger never asked."""

    rows: tuple[Row, ...]
    inferred: Inferred
    others: int
    others_usd: Decimal
    usd_per_1000_metrics: Decimal | None
    """That was billed; None where nothing was."""

    def total(self, name: str) -> Decimal:
        return sum((Decimal(getattr(row, name)) for row in self.rows), Decimal())

    def error(self, alone: bool) -> Decimal:
        """A share of what was billed: the ledger's excess; where nobody else calls (`alone`), also what it lacks."""
        off = self.total("excess") + (self.total("unattributed") if alone else 0)
        return off / self.total("billed") if self.total("billed") else Decimal(bool(off))


# --- what the ledger says -----------------------------------------------------------------------------------------


async def read_ledger(
    connection: asyncpg.Connection, from_day: date, to_day: date, config: Config
) -> list[Asked]:
    """What was asked on [from_day, to_day), by the account that is billed for it. Raises Transient, Fatal.

    Charges count continuation pages as `aws.pages_count_again` says today: where that was changed in between, days before it are off by them.
    """
    with translated("ledger"):
        charges = await connection.fetch(_CHARGES, from_day, to_day)
        shares = await connection.fetch(_SHARES)
    known = {(r["account"], r["region"], r["namespace"]): Decimal(r["once"]) / r["queries"] for r in shares}
    return asked_of(charges, known, config)


def asked_of(
    charges: Iterable[Mapping[str, Any]], shares: Mapping[tuple[str, str, str], Decimal], config: Config
) -> list[Asked]:
    """Charges by target and service, as `read_ledger` reads them, by account and day. `shares` are of queries where statistics count once. Pure."""
    payer = {a.id: a.via or a.id for a in config.accounts}
    profiles = config.service_by_name
    sums: dict[tuple[str, date], list[Decimal]] = defaultdict(lambda: [Decimal()] * 6)
    for charge in charges:
        target = Target.parse(charge["target"])
        billed, in_doubt, continued, lists = (
            Decimal(charge[name]) for name in ("billed", "in_doubt", "continued", "lists")
        )
        first = billed - continued if config.aws.pages_count_again else billed
        share = Decimal(1)
        if profile := profiles.get(charge["service"]):
            likely = count_of(profile, 10**6)
            share = shares.get(
                (target.account, target.region, profile.namespace), Decimal(likely.once) / likely.queries
            )
        key = (payer.get(target.account, target.account), charge["day"])
        more = (first, first * share, continued, continued * share, in_doubt, lists)
        sums[key] = [a + b for a, b in zip(sums[key], more, strict=True)]
    return [
        Asked(account, day, m, once, more, more_once, int(in_doubt), int(lists))
        for (account, day), (m, once, more, more_once, in_doubt, lists) in sorted(sums.items())
    ]


# --- what the bill says of the readings ---------------------------------------------------------------------------


def infer(bill: Bill, asked: Sequence[Asked], configured: Reading) -> Inferred:
    """Which readings the bill allows. Account-days on which we asked for nothing say nothing."""
    days = [(a, bill.days.get((a.account, a.day), Billed()).metrics) for a in asked if a.metrics]
    matches = {r: sum(_matches(a, billed, r) for a, billed in days) for r in READINGS}
    over = {r: sum(a.by(r) > billed * (1 + SLACK) for a, billed in days) for r in READINGS}
    left = [r for r in READINGS if matches[r] and over[r] * REFUTED_ONE_IN < max(len(days), REFUTED_ONE_IN)]
    best = max((matches[r] for r in left), default=0)
    left = [r for r in left if matches[r] == best]
    evidence: list[str] = []

    def switch(name: str, which: str, none: str) -> bool | None:
        differs = [
            (a, billed)
            for a, billed in days
            if abs(a.by(configured._replace(**{which: True})) - a.by(configured._replace(**{which: False})))
            > SLACK * a.metrics
        ]
        if not differs:
            evidence.append(f"aws.{name}: the data cannot tell: {none}")
            return None
        found = {getattr(r, which) for r in left}
        if len(found) != 1:
            configured_over = (
                f", and by the configured reading the ledger has more than the bill on {over[configured]}"
                * bool(over[configured])
            )
            evidence.append(
                f"aws.{name}: the data cannot tell: of {len(differs)} account-days none fits by one reading alone (other callers?){configured_over}"
            )
            return None
        (value,) = found
        yes = next(r for r in left)
        no = yes._replace(**{which: not value})
        right = getattr(configured, which) == value
        evidence.append(
            f"aws.{name}: {str(value).lower()}, {'as' if right else 'and NOT as'} configured: {matches[yes]} of {len(days)} account-days fit the bill, "
            f"{matches[no]} by the other reading, which has more than the bill on {over[no]}"
        )
        return bool(value)

    once = switch("statistics_count_once", "once", "no metric was asked for with several statistics")
    again = switch("pages_count_again", "again", "no continuation page was answered")
    reading = Reading(configured.once if once is None else once, configured.again if again is None else again)
    return Inferred(once, again, reading, tuple(evidence))


def _matches(asked: Asked, billed: Decimal, reading: Reading) -> bool:
    ours = asked.by(reading)
    return ours <= billed * (1 + SLACK) and billed <= (ours + asked.in_doubt) * (1 + SLACK)


# --- the comparison -----------------------------------------------------------------------------------------------


def whole_days(bill: Bill) -> tuple[date, date] | None:
    """[from, to) of the days that a bill has whole: its last one may have been written before it was over. None where it has none."""
    if bill.start is None or bill.end is None:
        return None
    last = bill.end.astimezone(UTC)
    # Hours end on the hour; what ends at midnight, or a second before, closes its day.
    to_day = (last + timedelta(seconds=1)).date()
    return (bill.start.date(), to_day) if to_day > bill.start.date() else None


def reconcile(
    bill: Bill, asked: Sequence[Asked], configured: Reading, prices: Prices, span: tuple[date, date]
) -> Reconciled:
    """Bill and ledger over the days [from, to) of `span`."""
    from_day, to_day = span
    asked = [a for a in asked if from_day <= a.day < to_day]
    inferred = infer(bill, asked, configured)
    ours = {(a.account, a.day): a for a in asked}
    accounts = {a.account for a in asked}
    rows, others, others_usd = [], set[str](), Decimal()
    metrics = usd = Decimal()
    for (account, day), billed in bill.days.items():
        if not from_day <= day < to_day:
            continue
        metrics, usd = metrics + billed.metrics, usd + billed.metrics_usd
        if account in accounts:
            ours.setdefault((account, day), Asked(account, day))
        else:
            others.add(account)
            others_usd += billed.metrics_usd + billed.lists_usd
    price = usd * 1000 / metrics if metrics else None
    for (account, day), a in sorted(ours.items()):
        billed = bill.days.get((account, day), Billed())
        ledger = a.by(inferred.reading)
        rows.append(
            Row(
                account,
                day,
                billed.metrics,
                ledger,
                a.in_doubt,
                max(Decimal(), billed.metrics - ledger - a.in_doubt),
                max(Decimal(), ledger - billed.metrics),
                billed.metrics_usd + billed.lists_usd,
                ledger * prices.usd_per_1000_metrics / 1000,
                billed.lists,
                a.lists,
            )
        )
    return Reconciled(tuple(rows), inferred, len(others), others_usd, price)
