"""What budgets go by, and what was decided: reads charges, tasks without a receipt and the newest looks; keeps the stretched polls.

One reading for all who ask (the coordinator's loop, `headgate status`, `headgate cost`), so that they say the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import asyncpg

from ingest import charges, pauses, wire
from ingest.budget import ZERO, Limits, Pair, Poll, Polling, Situation, Spent
from ingest.charges import Charge, Known
from ingest.clock import utc
from ingest.model import SourceName, Task
from ingest.pauses import Pauses
from ingest.schedule import grids_of
from ingest.sinks.connection import translated
from shard_config.model import Config, ServiceProfile
from shard_config.price import Prices, statistics_share

LOCK_ID = 0x42554447  # BUDG
WAITING_MAX = 20_000

_POLLING = "SELECT account, service, stretch, stopped FROM stretches ORDER BY account, service"

_WAITING = """SELECT value FROM tasks t WHERE kind NOT IN ('live', 'paused', 'budget') AND planned_at >= $1
    AND NOT EXISTS (SELECT FROM looks l WHERE l.task_id = t.task_id) ORDER BY planned_at LIMIT $2"""

_KEEP = """INSERT INTO stretches AS s (account, service, stretch, was, stopped, since) VALUES ($1, $2, $3, 1, $4, $5)
ON CONFLICT (account, service) DO UPDATE SET stretch = excluded.stretch, was = s.stretch, stopped = excluded.stopped, since = excluded.since
WHERE (s.stretch, s.stopped) <> (excluded.stretch, excluded.stopped)"""

_ALLOW = """UPDATE windows SET stretch = $3 WHERE sealed_at IS NULL AND declared IS NULL AND stretch < $3
    AND split_part(target, '/', 2) = $1 AND service = $2 AND window_end > $4"""
"""Deadlines of windows that are open: the next look at them comes as late as that."""
ALLOW_BACK = timedelta(days=2)


@dataclass(frozen=True, slots=True)
class Books:
    """What was read, in one snapshot. `before` are this month's ListMetrics requests by payer, up to yesterday."""

    now_s: int
    known: Sequence[Known]
    today: Sequence[Charge]
    lists_before: Mapping[str, int]
    waiting: Sequence[Task]
    polling: Polling
    pauses: Pauses


async def read(connection: asyncpg.Connection, config: Config, now_s: int) -> Books:
    """The books of today. Inside a transaction of the caller's. Raises Transient."""
    today = charges.day_of(now_s)
    payers = payers_of(config)
    with translated("charges"):
        polling = await connection.fetch(_POLLING)
        paused = await pauses.read(connection)
        rows = await connection.fetch(_WAITING, _midnight(today), WAITING_MAX)
    lists: dict[str, int] = defaultdict(int)
    month: list[Charge] = []
    if today.day > 1:
        month = await charges.read(connection, today.replace(day=1), today)
    for one in month:
        lists[payer_of(payers, one.target.account)] += one.list_metrics
    return Books(
        now_s,
        await charges.known(connection, today),
        await charges.read(connection, today, today + timedelta(days=1)),
        lists,
        [wire.decode_task(row["value"]) for row in rows],
        Polling(
            {(r["account"], r["service"]): r["stretch"] for r in polling if r["stretch"] > 1},
            frozenset((r["account"], r["service"]) for r in polling if r["stopped"]),
        ),
        Pauses.of(paused),
    )


async def keep(connection: asyncpg.Connection, polling: Polling, before: Polling, now_s: int) -> None:
    """Keep what was decided, and allow for it in the deadlines of open windows. Inside a transaction of the caller's. Raises Transient."""
    with translated("stretches"):
        for account, service in sorted(_pairs(polling) | _pairs(before)):
            k, stopped = polling.of(account, service), (account, service) in polling.stopped
            if (k, stopped) == (before.of(account, service), (account, service) in before.stopped):
                continue
            await connection.execute(_KEEP, account, service, k, stopped, utc(now_s))
            if k > before.of(account, service):
                await connection.execute(_ALLOW, account, service, k, utc(now_s) - ALLOW_BACK)


def _pairs(polling: Polling) -> set[Pair]:
    return set(polling.stretch) | polling.stopped


# --- pure -------------------------------------------------------------------------------------------------------


def situation_of(books: Books, config: Config) -> Situation:
    """What the books mean for budgets."""
    prices, payers = Prices.of(config.aws), payers_of(config)
    return Situation(
        books.now_s, polls_of(books, config, prices), spent_of(books, config, prices, payers), limits_of(config), books.polling
    )  # fmt: skip


def polls_of(books: Books, config: Config, prices: Prices) -> list[Poll]:
    """Every service of every CloudWatch target that is not paused, priced by its newest complete look."""
    known = {(k.target, k.service): k for k in books.known}
    payers, profiles = payers_of(config), config.service_by_name
    polls = []
    for target, grids in grids_of(config).items():
        if target.source != SourceName.CLOUDWATCH:
            continue
        for grid in grids:
            if books.pauses.cover(target.account, grid.service):
                continue
            one, profile = known.get((target, grid.service)), profiles[grid.service]
            usd = metrics_usd(one.look_metrics or 0, profile, prices) if one else ZERO
            polls.append(
                Poll(
                    target.account, grid.service, payer_of(payers, target.account), usd, grid.poll_interval_s,
                    one.asked_until_s if one else 0, profile.priority, profile.critical, target.region,
                )
            )  # fmt: skip
    return polls


def spent_of(books: Books, config: Config, prices: Prices, payers: Mapping[str, str]) -> dict[str, Spent]:
    """By payer, what today has cost and what is reserved besides the polls."""
    profiles = config.service_by_name
    billed: dict[str, Decimal] = defaultdict(Decimal)
    doubt: dict[str, Decimal] = defaultdict(Decimal)
    reserved: dict[str, Decimal] = defaultdict(Decimal)
    lists: dict[str, int] = defaultdict(int)
    for one in cloudwatch(books.today):
        payer, profile = payer_of(payers, one.target.account), profiles.get(one.service)
        billed[payer] += metrics_usd(one.metrics_billed, profile, prices)
        doubt[payer] += metrics_usd(max(0, one.metrics_in_doubt), profile, prices)
        lists[payer] += one.list_metrics
    for payer, requests in lists.items():
        billed[payer] += prices.list_metrics_usd(requests, books.lists_before.get(payer, 0))
    per_look = {(k.target, k.service): k.look_metrics or 0 for k in books.known}
    for task in books.waiting:
        for item in task.items:
            metrics = per_look.get((task.target, item.service), 0)
            reserved[payer_of(payers, task.target.account)] += metrics_usd(
                metrics, profiles.get(item.service), prices
            )
    return {p: Spent(billed[p], doubt[p], reserved[p]) for p in {*billed, *doubt, *reserved}}


def limits_of(config: Config) -> Limits:
    """What a configuration says about budgets. An account that another pays for has none of its own."""
    usd = {
        a.id: Decimal(str(a.budget_usd_per_day))
        for a in config.accounts
        if a.budget_usd_per_day is not None and not a.via
    }
    of_all = config.budget.usd_per_day
    return Limits(
        usd,
        None if of_all is None else Decimal(str(of_all)),
        config.budget.stretch_max,
        config.budget.hard_cap,
    )


def metrics_usd(metrics: int, profile: ServiceProfile | None, prices: Prices) -> Decimal:
    """What GetMetricData bills for so many queries of a service, as the prices read the price list."""
    share = statistics_share(profile) if prices.statistics_count_once else Decimal(1)
    return prices.get_metric_data_usd(metrics) * share


def cloudwatch(some: Iterable[Charge]) -> list[Charge]:
    """Those that AWS bills for its API: an endpoint's scrapes cost nothing but their objects."""
    return [c for c in some if c.target.source == SourceName.CLOUDWATCH]


def payers_of(config: Config) -> dict[str, str]:
    """By account, who is billed for it, where that is another."""
    return {a.id: a.via for a in config.accounts if a.via}


def payer_of(payers: Mapping[str, str], account: str) -> str:
    return payers.get(account, account)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
