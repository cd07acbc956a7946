"""Sealing: the store's own rows, read back, held against the receipt of the look that closes a window.

A window may be sealed by its landed complete look of the greatest version, V, if that was observed at or after `settles_at`. It is sealed
when, of the rows that the store holds of the target's service in [start, end) *with a version of V or greater*,

* the number is the receipt's points less those put aside on the way, and
* the digest is the receipt's, less that of those put aside.

A look that left out what was published before (`in_part`) is proved by *all* rows of the window just as well, where they are exactly
what it saw. Where they are not (a point that vanished; an older answer that landed later), it is published whole, as all that does not
balance, and judged by the rows of its own version then.

Rows of an older version are points that the look no longer shows: absence never deletes, so they stay and contradict nothing. Rows
of a greater version that superseded the look's with the very same values prove the look all the same. With other values, or
further points, a newer look is the one to seal on, and until it has landed whole the window stays open.

* *Never sealed by what was sent*: neither `landed` nor a batch is asked, only `samples`, in a snapshot.
* *Whole spans at once*: the rows of all windows of a pass are read in one stream and summed up by numpy as they come, in bounded memory.
* *Not sealed says why*: `unbalanced` has the numbers; the window is read again when another look lands, and each RECHECK_S.
* *What is refuted is no longer claimed*: the batches of an unbalanced window's looks leave `landed`, so that a replay of them lands
  rows instead of being passed over as known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import numpy as np
import orjson
from numpy.typing import NDArray

from ingest.balance import Claim, imbalance, signed
from ingest.clock import utc
from ingest.model import SourceName, Target, point_hashes
from ingest.schedule import grid_of
from ingest.sinks.rows_back import RowsBack, seconds_of
from shard_config.model import Config, ServiceProfile

SINK = "postgres"
"""Whose rows these are, in `landed`."""

RECHECK_S = 120
WINDOWS_MAX = 20_000
SPAN_S = 900
"""A pass reads so much time, from its oldest window on; rows are streamed, so that this bounds its duration only."""

LONG_S = 3600
"""In windows longer than this, rows are looked up at the multiples of the period: a day's partition holds every service's minutes."""


_LOCK = 0x68656164676178  # beside those of the migrations and the partitions

_PENDING = """SELECT target, service, extract(epoch FROM window_start)::bigint AS start_s, extract(epoch FROM window_end)::bigint AS end_s,
    landed_version AS version, points, digest, dead_points, in_part FROM windows
WHERE sealed_at IS NULL AND declared IS NULL AND landed_as_of >= settles_at AND (checked_at IS NULL OR checked_at < $1)
    AND (split_part(target, '/', 1), service) IN (SELECT * FROM unnest($2::text[], $3::text[]))
ORDER BY window_start, target, service LIMIT $4"""

_ROWS = """SELECT of.n, s.ts, s.series, s.value, s.version FROM samples AS s JOIN (
    SELECT p.n, series.id FROM jsonb_to_recordset($1::jsonb)
        AS p (n integer, account text, region text, namespace text, periods_s integer[], asked text[])
    JOIN series ON series.account = p.account AND series.region = p.region AND series.namespace = p.namespace
        AND (p.periods_s IS NULL OR series.period_s = ANY(p.periods_s))
        AND (p.asked IS NULL OR series.metric || '/' || series.stat = ANY(p.asked) OR '*/' || series.stat = ANY(p.asked))
) AS of ON of.id = s.series WHERE """

_CHECKED = """WITH found AS (
    SELECT * FROM unnest($2::text[], $3::text[], $4::timestamptz[], $5::bigint[], $6::bigint[], $7::bigint[], $8::text[])
        AS f (target, service, start, version, points, digest, unbalanced)
), held AS (
    SELECT w.target, w.service, w.window_start, f.unbalanced FROM windows AS w JOIN found AS f
        ON (w.target, w.service, w.window_start) = (f.target, f.service, f.start)
    WHERE (w.landed_version, w.points, w.digest) = (f.version, f.points, f.digest)
        AND w.sealed_at IS NULL AND w.declared IS NULL
    ORDER BY w.target, w.service, w.window_start FOR UPDATE OF w
)
UPDATE windows AS w SET checked_at = $1, unbalanced = h.unbalanced,
    sealed_at = CASE WHEN h.unbalanced IS NULL THEN $1::timestamptz END
FROM held AS h WHERE (w.target, w.service, w.window_start) = (h.target, h.service, h.window_start)"""

_WITHDRAWN = """DELETE FROM landed WHERE sink = $1 AND batch_id = ANY(ARRAY(
    SELECT unnest(l.batch_ids || l.held_ids) FROM unnest($2::text[], $3::text[], $4::timestamptz[]) AS u (target, service, start)
    JOIN looks AS l ON l.target = u.target AND l.finished_at >= u.start AND l.service = u.service
        AND l.window_start <= u.start AND l.window_end > u.start
    WHERE l.status = 'complete' AND l.landed_at IS NOT NULL))"""


@dataclass(frozen=True, slots=True)
class Scope:
    """Which series are a service's. `periods_s` and `asked` are given only where services share the namespace.

    `asked` has metric/statistic; */statistic is all metrics'.
    """

    namespace: str
    grid_period_s: int
    periods_s: tuple[int, ...] | None = None
    asked: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Sealing:
    """What one pass did: windows read back, those of them that are sealed now, and rows read."""

    windows: int
    sealed: int
    rows: int


def scopes_of(config: Config) -> dict[tuple[str, str], Scope]:
    """By (source, service). Profiles of one namespace are told apart by their periods, metrics and statistics.

    The coarser periods at which old windows are asked for (`Grid.periods_s`) are a service's too, but for one at which another service
    polls the same metrics: the live rows of that one would be taken for its own.
    """
    found = {(SourceName.EXPOSITION.value, j.name): Scope(j.name, j.interval_s) for j in config.exposition}
    for p in config.services:
        others = [o for o in config.services if o.namespace == p.namespace and o.service != p.service]
        taken_s = {o.period_s for o in others if _overlap(p, o)}
        periods_s = tuple(s for s in grid_of(p).periods_s if s == p.period_s or s not in taken_s)
        found[SourceName.CLOUDWATCH.value, p.service] = (
            Scope(p.namespace, p.period_s, periods_s, _asked(p)) if others else Scope(p.namespace, p.period_s)
        )
    return found


def _asked(profile: ServiceProfile) -> tuple[str, ...]:
    if profile.metrics == "all":
        return tuple(f"*/{stat}" for stat in profile.statistics)
    return tuple(f"{m.name}/{stat}" for m in profile.metrics for stat in m.statistics)


def _overlap(one: ServiceProfile, other: ServiceProfile) -> bool:
    """Whether some series of one metric and statistic may be both's."""
    if "all" in (one.metrics, other.metrics):
        return not {a.rpartition("/")[2] for a in _asked(one)}.isdisjoint(
            a.rpartition("/")[2] for a in _asked(other)
        )
    return not set(_asked(one)).isdisjoint(_asked(other))


class Tally:
    """Rows summed up by window: how many of the claim's version or newer, how many older ones, and the digests of the former and of all."""

    def __init__(self, scopes: NDArray[np.int64], claims: Sequence[Claim]) -> None:
        """`scopes[i]` is the number by which rows name the target and service of `claims[i]`; claims do not overlap within one."""
        starts = np.array([c.start_s for c in claims], np.int64)
        self._base_s = int(starts.min()) if len(claims) else 0
        keys = self._keys(scopes, starts)
        self._order = np.argsort(keys)
        self._sorted = keys[self._order]
        self._scopes = scopes[self._order]
        self._ends = np.array([c.end_s for c in claims], np.int64)[self._order]
        self._versions = np.array([c.version for c in claims], np.int64)[self._order]
        self.points = np.zeros(len(claims), np.int64)
        self.older = np.zeros(len(claims), np.int64)
        self.digests = np.zeros(len(claims), np.uint64)
        self.of_all = np.zeros(len(claims), np.uint64)
        self.rows = 0

    def _keys(self, scopes: NDArray[np.int64], times_s: NDArray[np.int64]) -> NDArray[np.int64]:
        return (scopes << 40) + (times_s - self._base_s)

    def add(self, rows: NDArray[Any]) -> None:
        """Take in rows, of the dtype of the stream; those of no claim's window are left out."""
        self.rows += len(rows)
        times_s = seconds_of(rows)
        scopes, versions = rows["n"].astype(np.int64), rows["version"].astype(np.int64)
        at = np.searchsorted(self._sorted, self._keys(scopes, times_s), side="right") - 1
        within = (at >= 0) & (self._scopes[at] == scopes) & (times_s < self._ends[at])
        newer = within & (versions >= self._versions[at])
        claims = self._order[at]
        self.points += np.bincount(claims[newer], minlength=len(self.points))
        self.older += np.bincount(claims[within & ~newer], minlength=len(self.older))
        ids, values = rows["series"][within].astype(np.uint64), rows["value"][within].astype(np.float64)
        hashes = point_hashes(ids, times_s[within], values)
        np.add.at(self.of_all, claims[within], hashes)
        np.add.at(self.digests, claims[newer], hashes[newer[within]])


async def seal(
    connection: asyncpg.Connection, scopes: Mapping[tuple[str, str], Scope], now: datetime
) -> Sealing:
    """One pass over the oldest windows that may be sealed; call it until `windows` is 0.

    At one time one process does it; the others find nothing to do.
    """
    async with connection.transaction(isolation="repeatable_read"):
        if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK):
            return Sealing(0, 0, 0)
        sources, services = zip(*scopes, strict=True) if scopes else ((), ())
        before = now - timedelta(seconds=RECHECK_S)
        rows = await connection.fetch(_PENDING, before, sources, services, WINDOWS_MAX)
        claims = _of_one_pass([Claim(**row) for row in rows])
        if not claims:
            return Sealing(0, 0, 0)
        tally = await _read(connection, scopes, claims)
    sums = zip(claims, tally.points, tally.digests, tally.older, tally.of_all, strict=True)
    verdicts = [
        imbalance(claim, int(points), signed(int(digest)), int(older), signed(int(of_all)))
        for claim, points, digest, older, of_all in sums
    ]
    await connection.execute(
        _CHECKED,
        now,
        [c.target for c in claims],
        [c.service for c in claims],
        [utc(c.start_s) for c in claims],
        [c.version for c in claims],
        [c.points for c in claims],
        [c.digest for c in claims],
        verdicts,
    )
    refuted = [c for c, verdict in zip(claims, verdicts, strict=True) if verdict is not None]
    if refuted:
        places = (
            [c.target for c in refuted],
            [c.service for c in refuted],
            [utc(c.start_s) for c in refuted],
        )
        await connection.execute(_WITHDRAWN, SINK, *places)
    return Sealing(len(claims), verdicts.count(None), tally.rows)


def _of_one_pass(claims: Sequence[Claim]) -> list[Claim]:
    """Those that are read together with the first: begun within SPAN_S of it, and long if it is long."""
    return [
        c for c in claims if c.start_s < claims[0].start_s + SPAN_S and _is_long(c) == _is_long(claims[0])
    ]


def _is_long(claim: Claim) -> bool:
    return claim.end_s - claim.start_s > LONG_S


async def _read(
    connection: asyncpg.Connection, scopes: Mapping[tuple[str, str], Scope], claims: Sequence[Claim]
) -> Tally:
    numbers: dict[tuple[str, str], int] = {}
    of_claims = [numbers.setdefault((c.target, c.service), len(numbers)) for c in claims]
    tally = Tally(np.array(of_claims, np.int64), claims)
    asked, periods_s = [], set()
    for (name, service), n in numbers.items():
        target = Target.parse(name)
        scope = scopes[target.source, service]
        periods_s.add(scope.grid_period_s)
        asked.append(
            {
                "n": n,
                "account": target.account,
                "region": target.region,
                "namespace": scope.namespace,
                "periods_s": scope.periods_s,
                "asked": scope.asked,
            }
        )
    start_s, end_s = min(c.start_s for c in claims), max(c.end_s for c in claims)
    when = "s.ts >= $2 AND s.ts < $3"
    arguments: list[Any] = [utc(start_s), utc(end_s)]
    if _is_long(claims[0]):
        times_s = {t for p in periods_s for c in claims for t in range(-(-c.start_s // p) * p, c.end_s, p)}
        when, arguments = "s.ts = ANY($2)", [[utc(t) for t in sorted(times_s)]]
    # A nested loop would look each series up in the key, which has time first: that is a scan a series.
    await connection.execute("SET LOCAL enable_nestloop = off")
    rows = RowsBack(tally.add)
    await connection.copy_from_query(
        _ROWS + when, orjson.dumps(asked).decode(), *arguments, output=rows.feed, format="binary"
    )
    rows.finish()
    return tally
