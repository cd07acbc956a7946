"""What the ledger says at a glance: targets, their freshness and gaps, shards' work, dollars' raw material. Reads only.

Windows that are folded into days count as those that are rows; of a day that the time asked about cuts, by their share of its windows' time.
A *gap* is a window that is neither sealed nor declared past its deadline: its end, its settling time, one poll interval (as stretched for a
budget) and `GRACE_S` (as in `ingest.gaps`). *Freshness* of a target is the age of the end of its newest landed window.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from ingest.sinks.connection import translated

GRACE_S = 120

OPEN_SQL = "sealed_at IS NULL AND declared IS NULL"


def late_sql(now: str, grace: str) -> str:
    """True of a window past its deadline, where the parameters are a time and an interval."""
    return f"settles_at + (window_end - window_start) * stretch + {grace}::interval < {now}"


FRESHNESS_DAYS = 7

_FOLDED = """SELECT d.target, windows, declared_windows, share,
    (SELECT max(upper(r)) FROM unnest(covered - coalesce((SELECT range_agg(r) FROM declared_days AS x, unnest(x.covered) AS r
        WHERE x.target = d.target AND x.service = d.service AND x.day = d.day), '{}')) AS r) AS fresh_until
FROM sealed_days AS d, LATERAL (
    SELECT (SELECT sum(extract(epoch FROM upper(r) - lower(r))) FROM unnest(covered * tstzmultirange(tstzrange($1, NULL))) AS r)
        / (SELECT sum(extract(epoch FROM upper(r) - lower(r))) FROM unnest(covered) AS r) AS share) AS cut
WHERE last_end > $1 AND day >= ($1 AT TIME ZONE 'UTC')::date - 1"""
"""Days with windows after a time, and which share of their time that is."""

_TARGETS = f"""WITH open AS (
    SELECT target, count(*) AS windows, count(*) FILTER (WHERE landed_as_of IS NOT NULL) AS landed,
        count(*) FILTER (WHERE sealed_at IS NOT NULL) AS sealed,
        count(*) FILTER (WHERE {OPEN_SQL} AND {late_sql("$2", "$3")}) AS gaps,
        max(window_end) FILTER (WHERE landed_as_of IS NOT NULL) AS fresh_until,
        min(window_start) FILTER (WHERE landed_as_of IS NULL AND declared IS NULL) AS oldest_open
    FROM windows WHERE window_end > $1 GROUP BY target
), folded AS (
    SELECT target, sum(round(share * windows))::bigint AS windows,
        sum(round(share * (windows - declared_windows)))::bigint AS sealed, max(fresh_until) AS fresh_until
    FROM ({_FOLDED}) AS days GROUP BY target
)
SELECT target, t.slot, coalesce(o.windows, 0) + coalesce(f.windows, 0) AS windows,
    coalesce(o.landed, 0) + coalesce(f.sealed, 0) AS landed, coalesce(o.sealed, 0) + coalesce(f.sealed, 0) AS sealed,
    coalesce(o.gaps, 0) AS gaps, greatest(o.fresh_until, f.fresh_until) AS fresh_until, o.oldest_open
FROM open AS o FULL JOIN folded AS f USING (target) LEFT JOIN targets AS t USING (target) ORDER BY target"""  # noqa: S608  # only constants

_FRESH = f"""SELECT target, coalesce(landed_until, (SELECT max(fresh_until) FROM ({_FOLDED} AND d.target = o.target) AS days),
    waiting_since) AS fresh_until
FROM (
    SELECT target, max(window_end) FILTER (WHERE landed_as_of IS NOT NULL) AS landed_until,
        min(window_start) FILTER (WHERE sealed_at IS NULL AND declared IS NULL AND window_end < $2) AS waiting_since
    FROM windows GROUP BY target
) AS o"""  # noqa: S608  # only constants

_PROBLEMS = """SELECT DISTINCT ON (target, service) target, service, status, detail, finished_at
FROM looks WHERE finished_at > $1 ORDER BY target, service, finished_at DESC"""

_SHARDS = """SELECT shard, count(DISTINCT target) AS targets,
    coalesce(sum(points) FILTER (WHERE finished_at > $2), 0)::bigint AS recent_points,
    coalesce(sum(metrics_billed), 0)::bigint AS metrics_billed,
    coalesce(sum((requests->>'ListMetrics')::bigint), 0)::bigint AS list_metrics
FROM looks WHERE finished_at > $1 GROUP BY shard ORDER BY shard"""

_TOTALS = """SELECT coalesce(sum(points), 0)::bigint AS points_collected,
    coalesce(sum(metrics_billed), 0)::bigint AS metrics_billed,
    coalesce(sum(list_metrics), 0)::bigint AS list_metrics, coalesce(sum(looks), 0)::bigint AS looks
FROM (
    SELECT points, metrics_billed, coalesce((requests->>'ListMetrics')::bigint, 0) AS list_metrics, 1 AS looks
    FROM looks WHERE finished_at > $1
    UNION ALL SELECT points, metrics_billed, list_metrics, looks FROM look_days WHERE day >= ($1 AT TIME ZONE 'UTC')::date
) AS found"""

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
    def sealed(self) -> int:
        return sum(t.sealed for t in self.targets)

    @property
    def gaps(self) -> int:
        return sum(t.gaps for t in self.targets)


async def freshness(connection: asyncpg.Connection, now: datetime) -> dict[str, datetime]:
    """By target that has windows, the end of its newest landed window; where nothing landed for FRESHNESS_DAYS, the start of its oldest
    open one. Raises Transient.
    """
    with translated("ledger"):
        rows = await connection.fetch(_FRESH, now - timedelta(days=FRESHNESS_DAYS), now)
    return {row["target"]: row["fresh_until"] for row in rows if row["fresh_until"] is not None}


async def overview(connection: asyncpg.Connection, now: datetime, since: datetime) -> Overview:
    """Read it in one snapshot. Raises Transient."""
    minute_ago = now - timedelta(seconds=60)
    with translated("ledger"):
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            targets = await connection.fetch(_TARGETS, since, now, timedelta(seconds=GRACE_S))
            newest = await connection.fetch(_PROBLEMS, since)
            shards = await connection.fetch(_SHARDS, since, minute_ago)
            totals = await connection.fetchrow(_TOTALS, since)
            landed = await connection.fetchrow(_LANDED, since, minute_ago)
    problems: dict[str, list[str]] = {}
    for row in newest:
        if row["status"] != "complete":
            said = row["detail"].removeprefix(f"{row['target']} {row['service']}: ")
            text = f"{row['service']} {row['status']}: {said}"
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
