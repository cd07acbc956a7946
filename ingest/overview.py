"""What the ledger says at a glance: targets, their freshness and gaps, shards' work, dollars' raw material. Reads only.

A *gap* is a window without a landed complete look that is past its deadline: its end, one poll interval and `GRACE_S`.
*Freshness* of a target is the age of the end of its newest landed window.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from ingest.sinks.connection import translated

GRACE_S = 120

_TARGETS = """SELECT w.target, t.slot, count(*) AS windows,
    count(*) FILTER (WHERE landed_as_of IS NOT NULL) AS landed,
    count(*) FILTER (WHERE sealed_at IS NOT NULL) AS sealed,
    count(*) FILTER (WHERE landed_as_of IS NULL
        AND window_end + (window_end - window_start) + $3::interval < $1) AS gaps,
    max(window_end) FILTER (WHERE landed_as_of IS NOT NULL) AS fresh_until,
    min(window_start) FILTER (WHERE landed_as_of IS NULL) AS oldest_open
FROM windows w LEFT JOIN targets t USING (target)
WHERE window_end > $2
GROUP BY w.target, t.slot ORDER BY w.target"""

_PROBLEMS = """SELECT DISTINCT ON (target, service) target, service, status, detail, finished_at
FROM looks WHERE finished_at > $1 ORDER BY target, service, finished_at DESC"""

_SHARDS = """SELECT shard, count(DISTINCT target) AS targets,
    coalesce(sum(points) FILTER (WHERE finished_at > $2), 0)::bigint AS recent_points,
    coalesce(sum(metrics_billed), 0)::bigint AS metrics_billed,
    coalesce(sum((requests->>'ListMetrics')::bigint), 0)::bigint AS list_metrics
FROM looks WHERE finished_at > $1 GROUP BY shard ORDER BY shard"""

_TOTALS = """SELECT coalesce(sum(points), 0)::bigint AS points_collected,
    coalesce(sum(metrics_billed), 0)::bigint AS metrics_billed,
    coalesce(sum((requests->>'ListMetrics')::bigint), 0)::bigint AS list_metrics,
    count(*) AS looks
FROM looks WHERE finished_at > $1"""

_LANDED = """SELECT coalesce(sum(points), 0)::bigint AS points, coalesce(sum(dead_points), 0)::bigint AS dead_points,
    coalesce(sum(points) FILTER (WHERE landed_at > $2), 0)::bigint AS recent_points
FROM landed WHERE sink = 'postgres' AND landed_at > $1"""


@dataclass(frozen=True, slots=True)
class TargetOverview:
    """One target's windows since `Overview.since`. `problem` is what its newest looks complained of, or empty."""

    target: str
    slot: int | None
    windows: int
    landed: int
    sealed: int
    gaps: int
    fresh_until: datetime | None
    oldest_open: datetime | None
    problem: str


@dataclass(frozen=True, slots=True)
class ShardOverview:
    """What a shard's receipts say. `points_per_s` is over the last minute."""

    shard: str
    targets: int
    points_per_s: float
    metrics_billed: int
    list_metrics: int


@dataclass(frozen=True, slots=True)
class Overview:
    """The ledger since a time. `points_per_s` (landed) is over the last minute."""

    now: datetime
    since: datetime
    targets: tuple[TargetOverview, ...]
    shards: tuple[ShardOverview, ...]
    points_collected: int
    points_landed: int
    points_dead: int
    points_per_s: float
    metrics_billed: int
    list_metrics: int
    looks: int

    @property
    def windows(self) -> int:
        return sum(t.windows for t in self.targets)

    @property
    def landed(self) -> int:
        return sum(t.landed for t in self.targets)

    @property
    def gaps(self) -> int:
        return sum(t.gaps for t in self.targets)


async def overview(connection: asyncpg.Connection, now: datetime, since: datetime) -> Overview:
    """Read it in one snapshot. Raises Transient."""
    minute_ago = now - timedelta(seconds=60)
    with translated("ledger"):
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            targets = await connection.fetch(_TARGETS, now, since, timedelta(seconds=GRACE_S))
            newest = await connection.fetch(_PROBLEMS, since)
            shards = await connection.fetch(_SHARDS, since, minute_ago)
            totals = await connection.fetchrow(_TOTALS, since)
            landed = await connection.fetchrow(_LANDED, since, minute_ago)
    problems: dict[str, list[str]] = {}
    for row in newest:
        if row["status"] != "complete":
            text = f"{row['service']} {row['status']}: {row['detail']}"
            problems.setdefault(row["target"], []).append(text)
    return Overview(
        now=now,
        since=since,
        targets=tuple(TargetOverview(**t, problem="; ".join(problems.get(t["target"], []))) for t in targets),
        shards=tuple(
            ShardOverview(
                s["shard"], s["targets"], s["recent_points"] / 60, s["metrics_billed"], s["list_metrics"]
            )
            for s in shards
        ),
        points_collected=totals["points_collected"],
        points_landed=landed["points"],
        points_dead=landed["dead_points"],
        points_per_s=landed["recent_points"] / 60,
        metrics_billed=totals["metrics_billed"],
        list_metrics=totals["list_metrics"],
        looks=totals["looks"],
    )
