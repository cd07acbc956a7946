"""Keeping the ledger small: closed windows fold into days, and what is past its retention goes.

* *Nothing is counted twice or lost*: windows are deleted in the transaction that adds them to their day, by one process at a time.
  A day knows exactly which windows it holds (`covered`), so a window that is folded a second time, after a newer look at it, adds nothing.
* *Open windows keep their evidence*: they are never folded, and their looks never deleted, however old.
* *What was paid stays attributed*: looks that go leave their counts in `look_days`.

Rows are deleted in bounded batches rather than by dropping partitions: which looks may go depends on their windows, not on the day
alone, and their counts have to be read anyway. At 1,000 targets of 10 services that is 33 looks a second.
Measured with those: a folded day takes 284 bytes, so 1.04 GB a year; a look, its batch and its share of a task 1.03 kB, so 3 GB a day.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import asyncpg

GRACE_S = 3600
"""A window is a row of its own for so long after it was closed."""

NEVER = datetime.min.replace(tzinfo=UTC)

ROWS_MAX = 5_000
"""Windows, tasks, looks and landed batches that one transaction deletes, each."""

_LOCK = 0x68656164676179  # beside those of the migrations, the partitions and the sealing

_CLOSED = """DELETE FROM windows AS w USING (
    SELECT target, service, window_start FROM windows
    WHERE (sealed_at IS NOT NULL OR declared IS NOT NULL) AND greatest(sealed_at, declared_at) < $1
    ORDER BY target, service, window_start LIMIT $2 FOR UPDATE SKIP LOCKED
) AS c WHERE (w.target, w.service, w.window_start) = (c.target, c.service, c.window_start)
RETURNING w.target, w.service, (w.window_start AT TIME ZONE 'UTC')::date AS day, w.window_start AS start, w.window_end AS end,
    greatest(w.sealed_at, w.declared_at) AS closed_at, CASE WHEN w.sealed_at IS NULL THEN w.declared END AS declared,
    w.points, w.digest, w.landed_version AS version,
    EXISTS (SELECT FROM sealed_days AS d WHERE d.target = w.target AND d.service = w.service
        AND d.day = (w.window_start AT TIME ZONE 'UTC')::date AND d.covered @> w.window_start) AS again,
    (SELECT min(d.reason) FROM declared_days AS d WHERE d.target = w.target AND d.service = w.service
        AND d.day = (w.window_start AT TIME ZONE 'UTC')::date AND d.covered @> w.window_start) AS declared_before"""

_GHOSTS = """DELETE FROM windows AS w WHERE sealed_at IS NULL AND declared IS NULL AND landed_as_of IS NULL
    AND EXISTS (SELECT FROM sealed_days AS d WHERE d.target = w.target AND d.service = w.service
        AND d.day = (w.window_start AT TIME ZONE 'UTC')::date AND d.covered @> w.window_start)"""
"""Windows that were planned once more in the moment in which they were folded."""

_DAY = """INSERT INTO sealed_days AS d (target, service, day, windows, declared_windows, points, digest, first_start, last_end, sealed_at,
    version, relooked_at, covered)
VALUES ($1, $2, $3, $4, $5, $6, digest_sum($7::text::numeric), $8, $9, $10, $11, $12, $13::text::tstzmultirange)
ON CONFLICT (target, service, day) DO UPDATE SET
    windows = d.windows + excluded.windows, declared_windows = d.declared_windows + excluded.declared_windows,
    points = d.points + excluded.points, digest = digest_sum(d.digest::numeric + excluded.digest),
    first_start = least(d.first_start, excluded.first_start), last_end = greatest(d.last_end, excluded.last_end),
    sealed_at = greatest(d.sealed_at, excluded.sealed_at), version = greatest(d.version, excluded.version),
    relooked_at = greatest(d.relooked_at, excluded.relooked_at), covered = d.covered + excluded.covered"""

_DECLARED = """INSERT INTO declared_days AS d (target, service, day, reason, covered)
VALUES ($1, $2, $3, $4, $5::text::tstzmultirange)
ON CONFLICT (target, service, day, reason) DO UPDATE SET covered = d.covered + excluded.covered"""

_NO_MORE_DECLARED = """UPDATE declared_days SET covered = covered - $5::text::tstzmultirange
WHERE target = $1 AND service = $2 AND day = $3 AND reason = $4"""

_OLD_TASKS = """DELETE FROM tasks WHERE task_id = ANY(ARRAY(
    SELECT task_id FROM tasks AS t WHERE planned_at < $1 AND (planned_at < $1 - interval '5 days'
        -- What has no receipt, or has not landed, may be announced again.
        OR EXISTS (SELECT FROM looks AS l WHERE l.task_id = t.task_id)
        AND NOT EXISTS (SELECT FROM looks AS l WHERE l.task_id = t.task_id AND l.landed_at IS NULL))
    ORDER BY planned_at LIMIT $2))"""
"""Five days later nobody waits for a task any more: `collect` keeps three."""

_OLD_LOOKS = """WITH gone AS (
    DELETE FROM looks WHERE look_id = ANY(ARRAY(
        SELECT look_id FROM looks AS l WHERE finished_at < $1
            -- A task without a look would be announced again.
            AND NOT EXISTS (SELECT FROM tasks AS t WHERE t.task_id = l.task_id)
            AND NOT EXISTS (SELECT FROM windows AS w WHERE w.target = l.target AND w.service = l.service
                AND w.window_start >= l.window_start AND w.window_start < l.window_end
                AND w.sealed_at IS NULL AND w.declared IS NULL)
        ORDER BY finished_at LIMIT $2))
    RETURNING target, service, (finished_at AT TIME ZONE 'UTC')::date AS day, status, points, metrics_billed, metrics_in_doubt, requests
), days AS (
    INSERT INTO look_days AS d (target, service, day, looks, complete, points, metrics_billed, metrics_in_doubt, list_metrics)
    SELECT target, service, day, count(*), count(*) FILTER (WHERE status = 'complete'), sum(points), sum(metrics_billed),
        sum(metrics_in_doubt), coalesce(sum((requests->>'ListMetrics')::bigint), 0)
    FROM gone GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
    ON CONFLICT (target, service, day) DO UPDATE SET looks = d.looks + excluded.looks, complete = d.complete + excluded.complete,
        points = d.points + excluded.points, metrics_billed = d.metrics_billed + excluded.metrics_billed,
        metrics_in_doubt = d.metrics_in_doubt + excluded.metrics_in_doubt, list_metrics = d.list_metrics + excluded.list_metrics
)
SELECT count(*) FROM gone"""

_OLD_LANDED = """DELETE FROM landed WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM landed AS b WHERE landed_at < $1
        -- A look that is not yet marked needs them.
        AND NOT EXISTS (SELECT FROM looks AS l WHERE l.task_id = b.task_id AND l.landed_at IS NULL)
    LIMIT $2))"""


@dataclass(slots=True)
class Day:
    """What windows add to the day of their target and service."""

    target: str
    service: str
    day: date
    windows: int = 0
    declared_windows: int = 0
    points: int = 0
    digest: int = 0
    """A plain sum: PostgreSQL takes it modulo 2**64."""
    version: int = 0
    relooked_at: datetime | None = None
    closed_at: datetime = NEVER
    covered: list[tuple[datetime, datetime]] = field(default_factory=list)
    declared: dict[str, list[tuple[datetime, datetime]]] = field(default_factory=lambda: defaultdict(list))
    no_more_declared: dict[str, list[tuple[datetime, datetime]]] = field(
        default_factory=lambda: defaultdict(list)
    )


def days_of(windows: Iterable[Any]) -> list[Day]:
    """Closed windows, mappings as `_CLOSED` returns them, by day, sorted. Pure."""
    days: dict[tuple[str, str, date], Day] = {}
    for w in windows:
        key = (w["target"], w["service"], w["day"])
        day = days.setdefault(key, Day(*key))
        span = (w["start"], w["end"])
        day.covered.append(span)
        day.closed_at = max(day.closed_at, w["closed_at"])
        day.version = max(day.version, w["version"] or 0)
        if w["again"]:
            day.relooked_at = day.closed_at
        else:
            day.windows += 1
            if w["declared"] is None:
                day.points += w["points"]
                day.digest += w["digest"]
        if w["declared"] != w["declared_before"]:
            day.declared_windows += (w["declared"] is not None) - (w["declared_before"] is not None)
            if w["declared"] is not None:
                day.declared[w["declared"]].append(span)
            if w["declared_before"] is not None:
                day.no_more_declared[w["declared_before"]].append(span)
    return [days[key] for key in sorted(days)]


def multirange(spans: Sequence[tuple[datetime, datetime]]) -> str:
    """Half-open spans in PostgreSQL's notation."""
    return "{" + ",".join(f"[{start.isoformat()},{end.isoformat()})" for start, end in spans) + "}"


async def fold_days(connection: asyncpg.Connection, closed_before: datetime) -> int:
    """Fold up to ROWS_MAX windows that were sealed or declared before a time into their days; returns how many.

    0 where there are none, and where another process is at it.
    """
    async with connection.transaction():
        if not await _alone(connection):
            return 0
        closed = await connection.fetch(_CLOSED, closed_before, ROWS_MAX)
        for d in days_of(closed):
            key = (d.target, d.service, d.day)
            first, last = min(start for start, _ in d.covered), max(end for _, end in d.covered)
            counts = (d.windows, d.declared_windows, d.points, str(d.digest))
            await connection.execute(
                _DAY, *key, *counts, first, last, d.closed_at, d.version, d.relooked_at, multirange(d.covered)
            )
            for reason, spans in d.no_more_declared.items():
                await connection.execute(_NO_MORE_DECLARED, *key, reason, multirange(spans))
            for reason, spans in d.declared.items():
                await connection.execute(_DECLARED, *key, reason, multirange(spans))
        await connection.execute(_GHOSTS)
    return len(closed)


async def forget(connection: asyncpg.Connection, before: datetime) -> int:
    """Delete up to ROWS_MAX each of the tasks, looks and landed batches from before a time; returns how many in all.

    Looks of open windows stay, and so does what is landed of looks that are not yet marked as landed.
    0 where there are none, and where another process is at it.
    """
    async with connection.transaction():
        if not await _alone(connection):
            return 0
        tasks = await connection.execute(_OLD_TASKS, before, ROWS_MAX)
        looks: int = await connection.fetchval(_OLD_LOOKS, before, ROWS_MAX)
        landed = await connection.execute(_OLD_LANDED, before, ROWS_MAX)
    return int(tasks.split()[-1]) + looks + int(landed.split()[-1])


async def _alone(connection: asyncpg.Connection) -> bool:
    alone: bool = await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK)
    return alone
