"""What has landed, folded into the ledger's windows.

A look has landed when each of its batches is in `landed`. Its windows then hold what the store must hold of it: the receipt's points
and digest without what was put aside on the way, from the look's least version on. Whether the store does is asked by `ingest.seal`.
A look that left out what was published before stands on the looks before it: it has landed when those of the last hour have, too.
A newer look that lands opens a sealed, declared or folded window again, for what was proved of it was about another look.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import asyncpg
import orjson

from ingest.balance import signed, stored_counts
from ingest.clock import utc
from ingest.model import LookStatus, version_of

_NEWLY_LANDED = """UPDATE looks l SET landed_at = $2
WHERE look_id = ANY(ARRAY(
    SELECT look_id FROM looks l
    WHERE landed_at IS NULL AND NOT EXISTS (
        SELECT FROM unnest(l.batch_ids) AS wanted
        WHERE NOT EXISTS (SELECT FROM landed WHERE sink = $1 AND batch_id = wanted))
    AND (whole IS NULL OR NOT EXISTS (
        SELECT FROM looks AS b WHERE b.target = l.target AND b.service = l.service AND b.window_end > l.window_start
            AND b.look_id < l.look_id AND b.finished_at > l.finished_at - interval '1 hour'
            AND b.landed_at IS NULL AND cardinality(b.batch_ids) > 0))
    ORDER BY look_id LIMIT 500 FOR UPDATE SKIP LOCKED))
RETURNING target, service, window_start, window_end, status, observed_at, coalesce(whole, windows) AS windows, whole IS NOT NULL AS in_part,
    grid_s, (SELECT min(version) FROM landed WHERE sink = $1 AND batch_id = ANY(l.batch_ids || l.held_ids)) AS version,
    (SELECT jsonb_agg(w) FROM landed, jsonb_array_elements(dead_windows) AS w
        WHERE sink = $1 AND batch_id = ANY(l.batch_ids || l.held_ids)) AS dead"""
"""With a bound on how long a look waits for those before it: what never lands holds up nobody for ever."""

_FOLDED_AGAIN = """INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at, collected_as_of)
SELECT $1, $2, start, start + $5::interval, start + $5::interval + $6::interval, $7, $8
FROM generate_series($3::timestamptz, $4::timestamptz - interval '1 second', $5::interval) AS start
WHERE EXISTS (SELECT FROM sealed_days d WHERE d.target = $1 AND d.service = $2
    AND d.day = (start AT TIME ZONE 'UTC')::date AND d.covered @> start AND d.version < $9)
ORDER BY start
ON CONFLICT DO NOTHING"""
"""Folded windows that a newer look has landed on: they are to be sealed again."""

_LANDED = """UPDATE windows w SET landed_as_of = $5, landed_version = $6, points = coalesce(c.points, 0), digest = coalesce(c.digest, 0),
    dead_points = coalesce(c.dead, 0), in_part = $11, checked_at = NULL, unbalanced = NULL, sealed_at = NULL, declared = NULL, declared_at = NULL
FROM windows AS v LEFT JOIN unnest($7::timestamptz[], $8::bigint[], $9::bigint[], $10::bigint[]) AS c (start, points, digest, dead)
    ON c.start = v.window_start
WHERE v.target = $1 AND v.service = $2 AND v.window_start >= $3 AND v.window_start < $4
    AND (v.landed_version IS NULL
        OR (v.landed_version, v.landed_as_of, v.points, v.digest) < ($6, $5, coalesce(c.points, 0), coalesce(c.digest, 0))
        -- Published whole, a look may have points put aside that were not known to be dead.
        OR v.unbalanced IS NOT NULL AND (v.landed_version, v.landed_as_of) = ($6, $5))
    AND w.target = v.target AND w.service = v.service AND w.window_start = v.window_start
    AND w.window_start >= $3 AND w.window_start < $4"""
"""The span stands twice: of an equality the planner carries constants over, not ranges, and without it a table that was not analyzed yet
(a first run, a backfill) is walked per window: 3.8 s for 200 of 78,804."""


async def fold_landed(
    connection: asyncpg.Connection, sink: str, settling: Callable[[str, str, int], timedelta], now: datetime
) -> int:
    """Mark up to 500 looks whose batches have all landed in `sink`, and their windows; returns how many.

    Inside a transaction of the caller's. `settling` has the settling time of a target's service with windows of so many seconds.
    """
    rows = await connection.fetch(_NEWLY_LANDED, sink, now)
    # One order for all processes, so that no two wait for each other.
    for row in sorted(rows, key=lambda r: (r["target"], r["service"], r["window_start"])):
        if row["status"] == LookStatus.COMPLETE:
            await _landed(connection, row, settling, now)
    return len(rows)


async def _landed(
    connection: asyncpg.Connection,
    look: asyncpg.Record,
    settling: Callable[[str, str, int], timedelta],
    now: datetime,
) -> None:
    span = (look["target"], look["service"], look["window_start"], look["window_end"])
    # A look without batches found nothing, or nothing new: its version is its own clock's. So is that of one in part, which may be
    # published whole later: what it left out has a version of its own.
    version = look["version"]
    if version is None or look["in_part"]:
        version = version_of(0, round(look["observed_at"].timestamp() * 1000))
    if look["grid_s"]:
        grid = timedelta(seconds=look["grid_s"])
        await connection.execute(
            _FOLDED_AGAIN,
            *span,
            grid,
            settling(look["target"], look["service"], look["grid_s"]),
            now,
            look["observed_at"],
            version,
        )
    counts = stored_counts(orjson.loads(look["windows"]), orjson.loads(look["dead"] or "[]"))
    await connection.execute(
        _LANDED,
        *span,
        look["observed_at"],
        version,
        [utc(start_s) for start_s in counts],
        [points for points, _, _ in counts.values()],
        [signed(digest) for _, digest, _ in counts.values()],
        [dead for _, _, dead in counts.values()],
        look["in_part"],
    )
