"""Gaps: windows that are neither sealed nor declared past their deadline, why, and from where they could be healed.

The deadline is the window's end, its settling time, one poll interval and a grace. Neighbours with one story are one stretch.
Reads only; what is decided is decided by pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal

import asyncpg

from ingest.clock import utc
from ingest.model import Target
from ingest.overview import GRACE_S, OPEN_SQL, late_sql
from ingest.schedule import Grid, blocks
from ingest.sinks.connection import translated
from shard_config.model import retention_s
from shard_config.price import Prices

WINDOWS_MAX = 200_000
"""Windows read for one answer, the oldest first."""

NOT_POLLED_DAYS = 15
"""So long CloudWatch keeps points of a minute."""

LATE_SQL = late_sql("$1", "$2")

REASON_SQL = """CASE
    WHEN EXISTS (SELECT FROM pauses p WHERE p.account IN ('*', split_part(w.target, '/', 2)) AND p.service IN ('*', w.service))
        THEN 'paused'
    WHEN unbalanced IS NOT NULL THEN 'unbalanced'
    WHEN landed_as_of >= settles_at THEN 'not_checked'
    WHEN collected_as_of > landed_as_of OR (collected_as_of IS NOT NULL AND landed_as_of IS NULL) THEN 'not_landed'
    WHEN last_status IS NULL THEN 'no_receipt'
    WHEN last_status <> 'complete' THEN last_status
    ELSE 'not_settled' END"""
"""Why a window is open, first match. not_checked: its rows are not read back yet; not_settled: not looked at since it settled."""

_GAPS = f"""SELECT target, service, extract(epoch FROM window_start)::bigint AS start_s, extract(epoch FROM window_end)::bigint AS end_s,
    {REASON_SQL} AS reason, coalesce(unbalanced, last_detail, '') AS detail, attempts,
    extract(epoch FROM last_finished_at)::bigint AS last_finished_s
FROM windows AS w WHERE {OPEN_SQL} AND {LATE_SQL}
    AND window_end > coalesce($3, '-infinity'::timestamptz) AND window_start < coalesce($4, 'infinity'::timestamptz)
    AND ($5::text IS NULL OR split_part(target, '/', 2) = $5) AND ($6::text IS NULL OR split_part(target, '/', 3) = $6)
    AND ($7::text IS NULL OR service = $7)
ORDER BY window_start LIMIT {WINDOWS_MAX}"""  # noqa: S608  # only constants

_NOT_POLLED = """SELECT target, service, extract(epoch FROM start)::bigint AS start_s, extract(epoch FROM stop)::bigint AS end_s FROM (
    SELECT target, service, window_start AS start, window_end AS stop FROM windows WHERE declared = 'budget'
    UNION ALL SELECT target, service, lower(r), upper(r) FROM declared_days, unnest(covered) AS r
        WHERE reason = 'budget' AND day > ($1 AT TIME ZONE 'UTC')::date - 2
) AS w WHERE stop > $1 AND start < coalesce($2, 'infinity'::timestamptz)
    AND ($3::text IS NULL OR split_part(target, '/', 2) = $3) AND ($4::text IS NULL OR split_part(target, '/', 3) = $4)
    AND ($5::text IS NULL OR service = $5)
ORDER BY start LIMIT $6"""

_SERIES = """SELECT target, service, (SELECT series FROM looks AS l
    WHERE l.target = asked.target AND l.service = asked.service AND series > 0
    ORDER BY finished_at DESC LIMIT 1) AS series
FROM unnest($1::text[], $2::text[]) AS asked (target, service)"""

_OPEN = f"""SELECT CASE WHEN {LATE_SQL} THEN {REASON_SQL} ELSE 'in_time' END AS reason, count(*) AS windows,
    min(window_end) AS oldest FROM windows AS w WHERE {OPEN_SQL} AND window_end < $1
    AND ($3::text[] IS NULL OR target = ANY($3)) GROUP BY 1"""  # noqa: S608  # only constants


@dataclass(frozen=True, slots=True)
class Filter:
    """Which windows are asked about; None: all. Times are seconds since the epoch, [from_s, to_s)."""

    from_s: float | None = None
    to_s: float | None = None
    account: str | None = None
    region: str | None = None
    service: str | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch of open windows of one target and service with one story.

    `heal_from` is kafka, s3, cloudwatch or nowhere, and `how` says what of it; `usd` is what the source would bill, None where nobody knows.
    `last_finished_s` is of the newest receipt, None without one.
    """

    target: str
    service: str
    start_s: int
    end_s: int
    windows: int
    reason: str
    detail: str
    attempts: int
    last_finished_s: int | None
    heal_from: str = ""
    how: str = ""
    usd: Decimal | None = None


@dataclass(frozen=True, slots=True)
class OpenWindows:
    """What the metrics say: open windows by reason, and the end of the oldest; freshness in seconds by target, where anything landed."""

    by_reason: Mapping[str, int]
    oldest_end: datetime | None


def stretches(windows: Iterable[Gap]) -> list[Gap]:
    """Neighbours with one story as one line, by target, service and time; attempts are the most of any. Pure."""
    found: list[Gap] = []
    for w in sorted(windows, key=lambda g: (g.target, g.service, g.start_s)):
        last = found[-1] if found else None
        if last is not None and _story(last) == _story(w) and last.end_s == w.start_s:
            found[-1] = replace(
                last,
                end_s=w.end_s,
                windows=last.windows + w.windows,
                attempts=max(last.attempts, w.attempts),
                last_finished_s=max(
                    (t for t in (last.last_finished_s, w.last_finished_s) if t), default=None
                ),
            )
        else:
            found.append(w)
    return found


def _story(gap: Gap) -> tuple[str, str, str, str]:
    return gap.target, gap.service, gap.reason, gap.detail


def healable(
    gap: Gap, grid: Grid | None, series: int | None, prices: Prices, now_s: int, kafka_keeps_s: int
) -> Gap:
    """The same with the cheapest source that still has it. Pure. `grid` is None where the configuration has no such service."""
    if gap.reason == "not_checked":
        known = "" if grid else "; the configuration no longer has the service, so nobody does"
        return replace(
            gap,
            heal_from="nowhere",
            how=f"it has landed: the next reading back decides{known}",
            usd=Decimal(0),
        )
    if gap.reason == "not_landed" and gap.last_finished_s and now_s - gap.last_finished_s < kafka_keeps_s:
        return replace(gap, heal_from="kafka", how="published, on its way or to be replayed", usd=Decimal(0))
    if gap.reason in ("not_landed", "unbalanced"):
        return replace(gap, heal_from="s3", how="archived, to be replayed", usd=Decimal(0))
    if grid is None:
        return replace(gap, heal_from="nowhere", how="not in the configuration")
    if not grid.has_past:
        return replace(gap, heal_from="nowhere", how="an endpoint has no past")
    period_s = grid.kept_period_s(gap.start_s, now_s)
    if period_s is None:
        coarsest_s = grid.periods_s[-1]
        kept_days = retention_s(coarsest_s) // 86_400
        return replace(
            gap,
            heal_from="nowhere",
            how=f"CloudWatch keeps periods of {coarsest_s} s for {kept_days} days",
        )
    looks = len(blocks(grid, grid.floor(gap.start_s), grid.ceil(gap.end_s)))
    usd = None if series is None else prices.get_metric_data_usd(looks * series, gap.service)
    return replace(gap, heal_from="cloudwatch", how=f"at {period_s} s", usd=usd)


async def gaps(
    connection: asyncpg.Connection,
    now: datetime,
    grids: Mapping[Target, Sequence[Grid]],
    prices: Prices,
    *,
    kafka_keeps_s: int,
    only: Filter = Filter(),
) -> list[Gap]:
    """All stretches that are open past their deadline, by target, service and time. Raises Transient."""
    with translated("ledger"):
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            rows = await connection.fetch(
                _GAPS,
                now,
                timedelta(seconds=GRACE_S),
                _time(only.from_s),
                _time(only.to_s),
                only.account,
                only.region,
                only.service,
            )
            found = stretches(Gap(windows=1, **row) for row in rows)
            pairs = sorted({(g.target, g.service) for g in found})
            answer = await connection.fetch(_SERIES, [t for t, _ in pairs], [s for _, s in pairs])
    series = {(row["target"], row["service"]): row["series"] for row in answer}
    by_name = {(str(t), g.service): g for t, some in grids.items() for g in some}
    now_s = int(now.timestamp())
    return [
        healable(
            g, by_name.get((g.target, g.service)), series[g.target, g.service], prices, now_s, kafka_keeps_s
        )
        for g in found
    ]


async def not_polled(
    connection: asyncpg.Connection,
    now: datetime,
    grids: Mapping[Target, Sequence[Grid]],
    prices: Prices,
    *,
    only: Filter = Filter(),
) -> list[Gap]:
    """Stretches that nobody was asked for, for want of money, by target, service and time: no gaps, and not healed. Raises Transient.

    Without a time from which on, those of the last `NOT_POLLED_DAYS`.
    """
    since = _time(only.from_s) or now - timedelta(days=NOT_POLLED_DAYS)
    which = (_time(only.to_s), only.account, only.region, only.service, WINDOWS_MAX)
    with translated("ledger"):
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            rows = await connection.fetch(_NOT_POLLED, since, *which)
            pairs = sorted({(r["target"], r["service"]) for r in rows})
            answer = await connection.fetch(_SERIES, [t for t, _ in pairs], [s for _, s in pairs])
    series = {(row["target"], row["service"]): row["series"] for row in answer}
    by_name = {(str(t), g.service): g for t, some in grids.items() for g in some}
    found = []
    for row in rows:
        grid = by_name.get((row["target"], row["service"]))
        windows = (row["end_s"] - row["start_s"]) // grid.poll_interval_s if grid else 1
        found.append(
            Gap(**row, windows=windows, reason="budget", detail="", attempts=0, last_finished_s=None)
        )
    now_s = int(now.timestamp())
    return [
        healable(g, by_name.get((g.target, g.service)), series[g.target, g.service], prices, now_s, 0)
        for g in stretches(found)
    ]


async def open_windows(
    connection: asyncpg.Connection, now: datetime, targets: Sequence[str] | None = None
) -> OpenWindows:
    """Windows that have ended and are open, for the metrics; those within their deadline are `in_time`. Raises Transient.

    Of these targets; None: of all.
    """
    with translated("ledger"):
        rows = await connection.fetch(_OPEN, now, timedelta(seconds=GRACE_S), targets)
    ends = [row["oldest"] for row in rows]
    return OpenWindows({row["reason"]: row["windows"] for row in rows}, min(ends, default=None))


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else utc(seconds)
