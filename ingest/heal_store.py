"""What healing knows and keeps in PostgreSQL: reads a situation, allocates attempts, declares windows; by one coordinator at a time.

* One transaction a pass, under an advisory lock that ends with it; who does not get the lock does nothing.
* An attempt is allocated by a unique insert, before anybody hears of its task. One that was allocated and never announced is
  found as a task without a receipt.
* A window is declared once: what is sealed or declared meanwhile is left alone.
* Bounded: `WINDOWS_MAX` windows a pass, newest first; the next pass goes on where one ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg

from ingest import pauses, wire
from ingest.clock import utc
from ingest.heal import (
    Announced,
    Ask,
    Attempt,
    Decision,
    Declaration,
    OpenWindow,
    Pending,
    Rules,
    Situation,
    Unlanded,
    decide,
)
from ingest.ledger import Ledger
from ingest.model import Target, Task, Window
from ingest.overview import GRACE_S
from ingest.pauses import Pauses

LOCK_ID = 0x4845414C  # HEAL
WINDOWS_MAX = 20_000
UNLANDED_MAX = 5_000
UNBALANCED_MAX = 1_000
PENDING_MAX = 20_000
MEMORY_S = 4 * 86_400
"""Tasks and looks older than this tell healing nothing: `collect` keeps three days."""
ATTEMPTS_KEPT = timedelta(days=456)

_OVERDUE = """SELECT target, service, window_start, window_end, settles_at, landed_as_of,
    unbalanced IS NOT NULL AS unbalanced, last_status, last_detail,
    settles_at + (window_end - window_start) * stretch + $2::interval < $3 AS overdue
FROM windows
WHERE sealed_at IS NULL AND declared IS NULL AND window_end <= $1
    AND (settles_at + (window_end - window_start) * stretch + $2::interval < $3 OR unbalanced IS NOT NULL)
ORDER BY window_end DESC, target, service LIMIT $4"""

_ATTEMPTS = """SELECT target, service, block_start, window_start, window_end, attempt, allocated_at FROM attempts
WHERE target = ANY($1) AND block_start > $2"""

_PENDING = """SELECT value, planned_at FROM tasks t
WHERE target = ANY($1) AND kind NOT IN ('paused', 'budget') AND planned_at > $2
    AND NOT EXISTS (SELECT FROM looks l WHERE l.task_id = t.task_id)
UNION
SELECT value, allocated_at FROM attempts a
WHERE target = ANY($1) AND allocated_at > $2
    AND NOT EXISTS (SELECT FROM looks l WHERE l.task_id = a.task_id)
ORDER BY planned_at DESC LIMIT $3"""

_UNLANDED = """SELECT coalesce(t.value, a.value) AS value, l.target, l.service, l.window_start, l.window_end, l.finished_at
FROM looks l LEFT JOIN tasks t USING (task_id) LEFT JOIN attempts a USING (task_id)
WHERE l.landed_at IS NULL AND l.archive_key <> '' AND cardinality(l.batch_ids) > 0 AND l.target = ANY($1)
    AND coalesce(t.value, a.value) IS NOT NULL
ORDER BY l.finished_at DESC LIMIT $2"""

_UNBALANCED = """SELECT DISTINCT ON (w.target, w.service, w.start) coalesce(t.value, a.value) AS value, l.target, l.service,
    l.window_start, l.window_end, l.look_id
FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS w (target, service, start)
JOIN looks l ON l.target = w.target AND l.service = w.service AND l.window_start <= w.start AND l.window_end > w.start
LEFT JOIN tasks t USING (task_id) LEFT JOIN attempts a USING (task_id)
WHERE l.landed_at IS NOT NULL AND l.status = 'complete' AND l.archive_key <> ''
    AND cardinality(l.batch_ids || l.held_ids) > 0 AND coalesce(t.value, a.value) IS NOT NULL
ORDER BY w.target, w.service, w.start, l.observed_at DESC"""

_RELAND = """WITH gone AS (
    UPDATE looks SET landed_at = NULL, batch_ids = batch_ids || held_ids, held_ids = '{}' WHERE look_id = ANY($1) RETURNING batch_ids)
DELETE FROM landed l USING gone WHERE l.sink = 'postgres' AND l.batch_id = ANY(gone.batch_ids)"""
"""What was held is published by the replay, and has to land like the rest."""

_HEARD = """SELECT target, (SELECT max(finished_at) FROM looks l WHERE l.target = asked.target) AS heard,
    (SELECT finished_at FROM looks l WHERE l.target = asked.target AND finished_at > $2
        AND landed_at IS NOT NULL AND cardinality(batch_ids) > 0 ORDER BY finished_at DESC LIMIT 1) AS landed
FROM unnest($1::text[]) AS asked (target)"""

_SERIES = """SELECT target, service, (SELECT series FROM looks l
    WHERE l.target = asked.target AND l.service = asked.service AND series > 0 AND finished_at > $3
    ORDER BY finished_at DESC LIMIT 1) AS series
FROM unnest($1::text[], $2::text[]) AS asked (target, service)"""

_SPENT = """SELECT a.service, coalesce(sum(a.reserved_usd) FILTER (WHERE l.task_id IS NULL), 0) AS reserved,
    coalesce(sum(l.billed), 0)::bigint AS billed
FROM attempts a LEFT JOIN LATERAL (
    SELECT task_id, sum(metrics_billed) AS billed FROM looks WHERE task_id = a.task_id GROUP BY task_id) l ON true
WHERE a.allocated_at >= $1 GROUP BY a.service"""

_ASKS = """SELECT count(*) FROM attempts a
WHERE allocated_at > $1 AND NOT EXISTS (SELECT FROM looks l WHERE l.task_id = a.task_id)"""

_STOPPED = "SELECT account, service FROM stretches WHERE stopped"

_ALLOCATE = """INSERT INTO attempts (target, service, block_start, attempt, task_id, window_start, window_end, allocated_at,
    reserved_usd, value)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT DO NOTHING RETURNING task_id"""

_DECLARE = """UPDATE windows w SET declared = asked.reason, declared_at = $5
FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::text[]) AS asked (target, service, window_start, reason)
WHERE w.target = asked.target AND w.service = asked.service AND w.window_start = asked.window_start
    AND w.sealed_at IS NULL AND w.declared IS NULL
RETURNING w.target, w.service, w.window_start"""


@dataclass(frozen=True, slots=True)
class Healed:
    """What a pass did. `asked` are the tasks of this pass's own attempts; `dollars` is today's total, reserved or billed."""

    decision: Decision
    asked: tuple[Task, ...]
    declared: tuple[Declaration, ...]
    dollars: Decimal


class HealStore:
    """Healing on a ledger's connection. Not for concurrent use; after an error the next call opens another."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._below: datetime | None = None
        """Where the last pass ended, if there was more."""

    async def pauses(self) -> Pauses:
        """What is paused now. Raises Transient."""
        async with self._ledger.connected() as connection:
            return Pauses.of(await pauses.read(connection))

    async def heal(self, now_s: int, rules: Rules, announced: Mapping[str, Announced]) -> Healed | None:
        """Read, decide, allocate and declare in one transaction; None where another coordinator is at it. Raises Transient."""
        async with (
            self._ledger.connected() as connection,
            connection.transaction(isolation="repeatable_read"),
        ):
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", LOCK_ID):
                return None
            situation = await self._read(connection, now_s, rules, announced)
            decision = decide(situation, rules)
            asked = [a for a in decision.asks if await self._allocate(connection, a, now_s)]
            declared = await _declare(connection, decision.declared, now_s)
            if decision.relanded:
                await connection.execute(_RELAND, list(decision.relanded))
            await connection.execute(
                "DELETE FROM attempts WHERE allocated_at < $1", utc(now_s) - ATTEMPTS_KEPT
            )
        dollars = situation.spent_usd + sum((a.usd for a in asked), Decimal(0))
        return Healed(decision, tuple(a.task for a in asked), declared, dollars)

    async def _read(
        self,
        connection: asyncpg.Connection,
        now_s: int,
        rules: Rules,
        announced: Mapping[str, Announced],
    ) -> Situation:
        now = utc(now_s)
        grace = timedelta(seconds=GRACE_S)
        rows = await connection.fetch(_OVERDUE, self._below or now, grace, now, WINDOWS_MAX)
        self._below = _next_below(rows, self._below)
        windows = [_window(r) for r in rows]
        recent = now - timedelta(seconds=MEMORY_S)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        spent = await connection.fetch(_SPENT, midnight)
        common: dict[str, Any] = {
            "now_s": now_s,
            "windows": windows,
            "announced": announced,
            "spent_usd": sum(
                (
                    s["reserved"] + rules.prices.get_metric_data_usd(int(s["billed"]), s["service"])
                    for s in spent
                ),
                Decimal(),
            ),
            "pending_asks": await connection.fetchval(_ASKS, recent),
        }
        if not windows:
            return Situation(**common)
        targets = sorted({str(w.target) for w in windows})
        oldest = utc(min(w.window.start_s for w in windows) - rules.block_s_max)
        pairs = sorted({(str(w.target), w.service) for w in windows})
        heard = {r["target"]: r for r in await connection.fetch(_HEARD, targets, recent)}
        series = await connection.fetch(_SERIES, [t for t, _ in pairs], [s for _, s in pairs], recent)
        return Situation(
            **common,
            attempts=[_attempt(r) for r in await connection.fetch(_ATTEMPTS, targets, oldest)],
            pending=[
                Pending(wire.decode_task(r["value"]), int(r["planned_at"].timestamp()))
                for r in await connection.fetch(_PENDING, targets, recent, PENDING_MAX)
            ],
            unlanded=[
                _unlanded(r, heard[r["target"]]["landed"], now - grace)
                for r in await connection.fetch(_UNLANDED, targets, UNLANDED_MAX)
            ]
            + await _unbalanced(connection, windows),
            heard_s={Target.parse(t): int(r["heard"].timestamp()) for t, r in heard.items() if r["heard"]},
            series={(Target.parse(r["target"]), r["service"]): r["series"] for r in series if r["series"]},
            pauses=Pauses.of(await pauses.read(connection)),
            stopped=frozenset((r["account"], r["service"]) for r in await connection.fetch(_STOPPED)),
        )

    async def _allocate(self, connection: asyncpg.Connection, ask: Ask, now_s: int) -> bool:
        task = ask.task
        [item] = task.items
        allocated = await connection.fetchval(
            _ALLOCATE, str(task.target), item.service, utc(ask.block_start_s), task.attempt, task.task_id,
            utc(item.start_s), utc(item.end_s), utc(now_s), ask.usd, wire.encode_task(task),
        )  # fmt: skip
        return allocated is not None


async def _declare(
    connection: asyncpg.Connection, declared: tuple[Declaration, ...], now_s: int
) -> tuple[Declaration, ...]:
    """Those that were open still."""
    by_key = {(str(d.window.target), d.window.service, d.window.window.start_s): d for d in declared}
    keys = sorted(by_key)
    rows = await connection.fetch(
        _DECLARE, [k[0] for k in keys], [k[1] for k in keys], [utc(k[2]) for k in keys],
        [by_key[k].reason.value for k in keys], utc(now_s),
    )  # fmt: skip
    done = ((r["target"], r["service"], int(r["window_start"].timestamp())) for r in rows)
    return tuple(by_key[key] for key in sorted(done))


async def _unbalanced(connection: asyncpg.Connection, windows: list[OpenWindow]) -> list[Unlanded]:
    """The newest looks at windows whose rows are not what those looks say."""
    some = [w for w in windows if w.unbalanced][:UNBALANCED_MAX]
    if not some:
        return []
    rows = await connection.fetch(
        _UNBALANCED, [str(w.target) for w in some], [w.service for w in some], [utc(w.window.start_s) for w in some],
    )  # fmt: skip
    looks = {r["look_id"]: r for r in rows}
    return [
        Unlanded(
            wire.decode_task(r["value"]),
            r["service"],
            int(r["window_start"].timestamp()),
            int(r["window_end"].timestamp()),
            passed=True,
            look_id=look_id,
        )
        for look_id, r in looks.items()
    ]


def _next_below(rows: list[asyncpg.Record], before: datetime | None) -> datetime | None:
    """Where the next pass goes on; None to begin with the newest again."""
    if len(rows) < WINDOWS_MAX:
        return None
    last: datetime = rows[-1]["window_end"]
    return last if last != before else last - timedelta(microseconds=1)


def _window(row: asyncpg.Record) -> OpenWindow:
    return OpenWindow(
        target=Target.parse(row["target"]),
        service=row["service"],
        window=Window(int(row["window_start"].timestamp()), int(row["window_end"].timestamp())),
        settles_s=int(row["settles_at"].timestamp()),
        landed_s=int(row["landed_as_of"].timestamp()) if row["landed_as_of"] else 0,
        unbalanced=row["unbalanced"],
        last_status=row["last_status"] or "",
        last_detail=row["last_detail"] or "",
        overdue=row["overdue"],
    )


def _attempt(row: asyncpg.Record) -> Attempt:
    return Attempt(
        Target.parse(row["target"]),
        row["service"],
        int(row["block_start"].timestamp()),
        int(row["window_start"].timestamp()),
        int(row["window_end"].timestamp()),
        row["attempt"],
        int(row["allocated_at"].timestamp()),
    )


def _unlanded(row: asyncpg.Record, landed: datetime | None, before: datetime) -> Unlanded:
    """One that ended after `before` is on its way."""
    return Unlanded(
        wire.decode_task(row["value"]),
        row["service"],
        int(row["window_start"].timestamp()),
        int(row["window_end"].timestamp()),
        passed=landed is not None and landed > row["finished_at"] and row["finished_at"] < before,
    )
