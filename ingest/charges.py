"""Charges: every billed request, by day, target, service and reason; the money of receipts, and of what is asked outside of tasks.

Guarantees, each with a test of its name:

* *Each receipt counts once*: its charges are added in the transaction that inserts its look.
* *Ledger ≤ bill ≤ ledger + in doubt*: what was answered is counted as billed. In doubt is what was asked for in requests whose answer was lost, and
  what runs may have paid that ended without a receipt: the task's next run asks for the same, and counts it as in doubt once for each run that may have begun before it
  (`ingest.collect.begun_before`). Nobody knows how far such a run came, so a task that had only waited for its turn counts as well: the bound is from above.
  It holds one asking of each run that was cut off; what such a run had asked again for itself (answers that it lost, or could not read) is not in it: nobody knows that.
  Nor is what the next run does not ask itself: one that AWS refuses, or whose task is over by then.
* *Intents before requests*: what is asked outside of tasks (a recheck) is put down as in doubt before it is asked, and settled by its answer.

Counts are what the requests asked for: the price list is read later (`shard_config.price`), so that a switch of it applies to the past too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date, datetime
from enum import StrEnum

import asyncpg

from ingest.clock import utc
from ingest.model import (
    CONTINUED,
    LookStatus,
    Outcome,
    Receipt,
    ReceiptItem,
    Target,
    Task,
    TaskItem,
    TaskKind,
)
from ingest.sinks.connection import translated

BACKFILL_ATTEMPT = 1 << 30
"""Attempts from here on are a backfill's (`ingest.backfill.tasks_of`)."""
KNOWN_DAYS = 7
"""A service that was not looked at for so long has no price."""

_ADD = """INSERT INTO charges AS c (day, target, service, reason, looks, metrics_billed, metrics_in_doubt, list_metrics, puts,
    look_metrics, look_at, asked_until)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
ON CONFLICT (day, target, service, reason) DO UPDATE SET looks = c.looks + excluded.looks,
    metrics_billed = c.metrics_billed + excluded.metrics_billed, metrics_in_doubt = c.metrics_in_doubt + excluded.metrics_in_doubt,
    list_metrics = c.list_metrics + excluded.list_metrics, puts = c.puts + excluded.puts,
    look_metrics = CASE WHEN c.look_at IS NULL OR c.look_at <= excluded.look_at THEN excluded.look_metrics ELSE c.look_metrics END,
    look_at = greatest(c.look_at, excluded.look_at), asked_until = greatest(c.asked_until, excluded.asked_until)"""

_CONTINUED = """UPDATE charges SET metrics_continued = metrics_continued + $5
WHERE day = $1 AND target = $2 AND service = $3 AND reason = $4"""

_WHY = """SELECT coalesce((SELECT kind FROM tasks WHERE task_id = $1), (SELECT 'heal' FROM attempts WHERE task_id = $1 LIMIT 1)) AS kind,
    (SELECT attempt FROM tasks WHERE task_id = $1) AS attempt,
    EXISTS (SELECT FROM looks WHERE task_id = $1 AND service = $2 AND finished_at <> $3) AS again"""

_READ = """SELECT day, target, service, reason, sum(looks)::bigint AS looks, sum(metrics_billed)::bigint AS metrics_billed,
    sum(metrics_in_doubt)::bigint AS metrics_in_doubt, sum(list_metrics)::bigint AS list_metrics, sum(puts)::bigint AS puts,
    sum(metrics_continued)::bigint AS metrics_continued
FROM charges WHERE day >= $1 AND day < $2 GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"""

_KNOWN = """SELECT target, service, (array_agg(look_metrics ORDER BY look_at DESC) FILTER (WHERE look_at IS NOT NULL))[1] AS look_metrics,
    extract(epoch FROM max(asked_until))::bigint AS asked_until_s
FROM charges WHERE day > $1::date - $2::integer AND asked_until IS NOT NULL GROUP BY target, service ORDER BY target, service"""


class Reason(StrEnum):
    """Why AWS was asked."""

    LIVE = "live"
    BACKLOG = "backlog"
    HEAL = "heal"
    BACKFILL = "backfill"
    RECHECK = "recheck"
    DISCOVERY = "discovery"
    """ListMetrics, whatever the task that needed it."""
    SECOND_TRY = "second try"
    """A task that had a receipt already."""
    UNKNOWN = "unknown"
    """A receipt whose task the ledger does not have."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What one reason cost a target's service on a UTC day. Metrics are queries of GetMetricData."""

    day: date
    target: Target
    service: str
    reason: Reason
    looks: int = 0
    metrics_billed: int = 0
    metrics_in_doubt: int = 0
    list_metrics: int = 0
    puts: int = 0
    metrics_continued: int = 0
    """Asked for by continuation pages: among those billed where `pages_count_again`."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a target's service: the metrics that its newest complete look billed (None: none was), and until where it was asked,
    or nobody was.
    """

    target: Target
    service: str
    look_metrics: int | None
    asked_until_s: int


# --- pure -------------------------------------------------------------------------------------------------------


def settled(intent: Charge, outcome: Outcome) -> Charge:
    """What an answer adds to its intent, so that both together are the answer's."""
    return replace(
        intent,
        looks=1,
        metrics_billed=outcome.metrics_billed,
        metrics_in_doubt=outcome.metrics_in_doubt - intent.metrics_in_doubt,
        list_metrics=outcome.requests.get("ListMetrics", 0),
    )


def reason_of(kind: str | None, attempt: int | None, again: bool) -> Reason:
    """Why a receipt's task asked; `again` where it is not the task's first. `kind` is None where the task is not known."""
    if again:
        return Reason.SECOND_TRY
    if kind == TaskKind.HEAL:
        return Reason.HEAL
    if (attempt or 0) >= BACKFILL_ATTEMPT:
        return Reason.BACKFILL
    return Reason(kind) if kind in (TaskKind.LIVE, TaskKind.BACKLOG) else Reason.UNKNOWN


# --- the table: whoever calls translates asyncpg's errors ---------------------------------------------------------


async def add(connection: asyncpg.Connection, receipt: Receipt, done: ReceiptItem) -> None:
    """Charge one item of a receipt whose look was inserted just now, in the same transaction."""
    outcome, finished_at = done.outcome, utc(receipt.finished_at_ms / 1000)
    row = await connection.fetchrow(_WHY, receipt.task_id, done.item.service, finished_at)
    reason = reason_of(row["kind"], row["attempt"], row["again"])
    of = (finished_at.date(), str(receipt.target), done.item.service)
    # An object is a task's, and a task's services share it.
    puts = int(bool(receipt.archive_key) and done.item is receipt.items[0].item)
    complete = outcome.status is LookStatus.COMPLETE and reason is not Reason.SECOND_TRY
    known = (outcome.metrics_billed, finished_at) if complete else (None, None)
    counts = (1, outcome.metrics_billed, outcome.metrics_in_doubt, 0, puts)
    await connection.execute(_ADD, *of, reason, *counts, *known, utc(done.item.end_s))
    if continued := outcome.requests.get(CONTINUED, 0):
        await connection.execute(_CONTINUED, *of, reason, continued)
    if lists := outcome.requests.get("ListMetrics", 0):
        await connection.execute(_ADD, *of, Reason.DISCOVERY, 0, 0, 0, lists, 0, None, None, None)


async def none(connection: asyncpg.Connection, task: Task, item: TaskItem, now: datetime) -> None:
    """Nobody is asked for this: so no money is reserved for it."""
    nothing = (0, 0, 0, 0, 0, None, None)
    await connection.execute(
        _ADD, now.date(), str(task.target), item.service, Reason.LIVE, *nothing, utc(item.end_s)
    )


async def put_down(connection: asyncpg.Connection, charge: Charge) -> None:
    """Add what is about to be asked outside of tasks (an intent), or what came of it (`settled`). Raises Transient."""
    with translated("charges"):
        await connection.execute(
            _ADD, charge.day, str(charge.target), charge.service, charge.reason, charge.looks, charge.metrics_billed,
            charge.metrics_in_doubt, charge.list_metrics, charge.puts, None, None, None,
        )  # fmt: skip


async def read(connection: asyncpg.Connection, from_day: date, to_day: date) -> list[Charge]:
    """The charges of [from_day, to_day), by day, target, service and reason. Raises Transient."""
    with translated("charges"):
        rows = await connection.fetch(_READ, from_day, to_day)
    return [
        Charge(**{**row, "target": Target.parse(row["target"]), "reason": Reason(row["reason"])})
        for row in rows
    ]


async def known(connection: asyncpg.Connection, today: date) -> list[Known]:
    """What is known of every target's service that was asked within `KNOWN_DAYS`. Raises Transient."""
    with translated("charges"):
        rows = await connection.fetch(_KNOWN, today, KNOWN_DAYS)
    return [
        Known(Target.parse(r["target"]), r["service"], r["look_metrics"], r["asked_until_s"]) for r in rows
    ]


def day_of(time_s: float) -> date:
    """The UTC day of a time."""
    return utc(time_s).date()
