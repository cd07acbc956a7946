"""What `headgate backfill` does: surveys and replays. `workers.backfill` is the command around it.

* *Live data goes first*: no consumer group is joined; landings are paced (`Pace`), and wait while live consumers fall behind.
* *It can be stopped at any time*: positions are in the sink, moved with the rows that they stand for, under the backfill's own name
  (`backfill:<id>`), until it is done. What CloudWatch is asked for is in `workers.backfill_asking`.
* *A replay lands through `ingest.landing.Landing`*, exactly as live consumers do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import asyncpg
import structlog

from ingest import wire
from ingest.archive import S3Archive
from ingest.archive_replay import ArchiveReplay
from ingest.backfill import KnownLook, Survey
from ingest.clock import Clock, utc
from ingest.errors import Rejected, Transient
from ingest.landing import Landing
from ingest.log import Outgoing, Sender
from ingest.model import Receipt, Target
from ingest.ports import Record, Sink
from ingest.replay import Replay
from ingest.restoring import task_of
from ingest.sinks.connection import translated
from workers.pace import Pace
from workers.reading import slices

_log = structlog.get_logger()

RETRIES = 5
NEVER = datetime.max.replace(tzinfo=UTC)
MANIFESTS_AT_ONCE = 16
READS_TOGETHER = 32
"""Records that a replay has read before they are cut into landings."""

_LOOKS = """SELECT target, service, window_start, window_end, started_at, status = 'complete' AS complete,
    archive_key <> '' AS archived, cardinality(batch_ids) AS batches, points, metrics_billed,
    cardinality(held_ids) AS held, (SELECT sum((w->1)::bigint)::bigint FROM jsonb_array_elements(whole) AS w) AS seen
FROM looks WHERE window_start < $2 AND window_end > $1"""

_NEWEST = """SELECT DISTINCT ON (target, service) target, service, window_start, window_end, started_at, true AS complete,
    false AS archived, 0 AS batches, points, metrics_billed
FROM looks WHERE status = 'complete' AND metrics_billed > 0 ORDER BY target, service, finished_at DESC"""

_LANDED = """SELECT target, service, unnest(range_agg(tstzrange(window_start, window_end))) AS span
FROM windows WHERE landed_as_of IS NOT NULL AND window_start < $2 AND window_end > $1 GROUP BY target, service
UNION ALL
SELECT s.target, s.service, unnest(s.covered - coalesce(d.covered, '{}')) FROM sealed_days s LEFT JOIN (
    SELECT target, service, day, range_agg(covered) AS covered FROM declared_days GROUP BY target, service, day
) AS d USING (target, service, day) WHERE s.first_start < $2 AND s.last_end > $1"""

_EMPTIED = """SELECT (
    EXISTS (SELECT FROM windows WHERE landed_as_of IS NOT NULL AND points > dead_points AND window_start >= $1 AND window_end <= $2)
    OR EXISTS (SELECT FROM sealed_days WHERE points > 0 AND first_start >= $1 AND last_end <= $2)
) AND NOT EXISTS (SELECT FROM samples WHERE ts >= $1 AND ts < $2)
OR EXISTS (SELECT FROM landed WHERE sink = 'postgres' AND points > 0) AND NOT EXISTS (SELECT FROM samples)"""

# What is folded was sealed: its looks may have been let go since.
_UNHEARD = """SELECT DISTINCT task_id
FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::timestamptz[]) AS n (task_id, target, service, at, finished)
WHERE NOT EXISTS (SELECT FROM looks l WHERE l.task_id = n.task_id) AND (n.finished >= $6 OR NOT EXISTS (
    SELECT FROM sealed_days d WHERE d.target = n.target AND d.service = n.service AND d.covered @> n.at))"""


class ReplaySink(Sink, Protocol):
    """A sink that keeps positions of a reader that comes and goes."""

    async def start_at(self, topic: str, starts: Mapping[int, int]) -> None: ...

    async def forget(self, topic: str, partitions: Sequence[int]) -> None: ...


@dataclass(slots=True)
class Done:
    """What has been done so far. `skipped_batches` were known; `problems` are for people."""

    points: int = 0
    batches: int = 0
    skipped_batches: int = 0
    dead_points: int = 0
    dead_records: int = 0
    tasks: int = 0
    metrics_billed: int = 0
    receipts: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


Tell = Callable[[float, Done], None]
"""Called with the share that is done, 0 to 1."""


# --- what is known --------------------------------------------------------------------------------------------


async def read_ledger(connection: asyncpg.Connection, survey: Survey) -> None:
    """What the ledger knows of the survey's windows. Raises Transient, Fatal."""
    bounds = utc(survey.scope.from_s), utc(survey.scope.to_s)
    with translated("ledger"):
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            async for row in connection.cursor(_LOOKS, *bounds, prefetch=5000):
                survey.look(_look_of(row))
            for row in await connection.fetch(_NEWEST):
                survey.price(_look_of(row))
            for row in await connection.fetch(_LANDED, *bounds):
                span = row["span"]
                start_s, end_s = int(span.lower.timestamp()), int(span.upper.timestamp())
                survey.landed(Target.parse(row["target"]), row["service"], start_s, end_s)


async def read_manifests(archive: S3Archive, survey: Survey, reach_s: int) -> list[Receipt]:
    """What the archive knows of windows that have no complete look as yet: its receipts. Raises Transient."""
    slots = asyncio.Semaphore(MANIFESTS_AT_ONCE)
    receipts: list[Receipt] = []

    async def read(key: str) -> Receipt | None:
        async with slots:
            try:
                return await archive.receipt(key)
            except Rejected as error:
                _log.error("archived_task_spoilt", key=key, error=str(error))
                return None

    for target, span in survey.unknown().items():
        keys = [key async for key in archive.keys(target, span.start_s, span.end_s + reach_s)]
        found = await asyncio.gather(*map(read, keys))
        receipts += [r for r in found if r is not None]
    for receipt in receipts:
        for done in receipt.items:
            survey.look(
                KnownLook(
                    receipt.target,
                    done.item.service,
                    done.item.start_s,
                    done.item.end_s,
                    receipt.started_at_ms,
                    done.outcome.status == "complete",
                    True,
                    len(done.batches),
                    done.points,
                    done.outcome.metrics_billed,
                    len(done.held),
                    sum(w.points for w in done.whole) if done.whole else None,
                )
            )
    return receipts


async def is_emptied(connection: asyncpg.Connection, from_s: int, to_s: int) -> bool:
    """Whether the ledger says that points of that time have landed and the store has none, or `landed` knows any and it has none at all.

    Raises Transient.
    """
    with translated("store"):
        return bool(await connection.fetchval(_EMPTIED, utc(from_s), utc(to_s)))


async def has_positions(connection: asyncpg.Connection, reader: str) -> bool:
    """Whether a reader has begun and is not done. Raises Transient."""
    with translated("store"):
        return bool(
            await connection.fetchval("SELECT EXISTS (SELECT FROM positions WHERE sink = $1)", reader)
        )


# --- replaying ------------------------------------------------------------------------------------------------


async def replay(
    source: Replay, sink: ReplaySink, landing: Landing, pace: Pace, clock: Clock, done: Done, tell: Tell,
    ledger: LedgerAnnouncer | None = None,
) -> None:  # fmt: skip
    """Land all that a replay has, and forget where it stood: then it is done.

    What fails for now is tried again from the stored position, `RETRIES` times without progress between. Raises Transient then, and Fatal.
    """
    begin = await source.open()
    await sink.start_at(source.topic, begin)
    failures = 0
    while True:
        points = done.points
        try:
            await _replay_once(source, sink, landing, pace, done, tell, ledger)
            break
        except Transient as error:
            failures = 1 if done.points > points else failures + 1
            if failures > RETRIES:
                raise
            _log.warning("replay_retries", topic=source.topic, error=str(error))
            await clock.sleep(error.retry_after_s * 2**failures)
    await sink.forget(source.topic, source.partitions)


async def _replay_once(
    source: Replay, sink: ReplaySink, landing: Landing, pace: Pace, done: Done, tell: Tell,
    ledger: LedgerAnnouncer | None,
) -> None:  # fmt: skip
    await sink.claim(source.topic, source.partitions)
    stored = await sink.positions(source.topic, source.partitions)
    starts = await landing.open(source.partitions, source.bounds(stored))
    waiting: list[Record] = []
    sliced = 0

    async def announce() -> None:
        # Before the position moves past them: a replay that goes on does not meet them again.
        if ledger is not None and isinstance(source, ArchiveReplay):
            done.receipts += await ledger.announce(source)

    async for records in source.records(starts, stored):
        waiting += records
        if not records:
            await announce()
        # Small reads land together: a transaction each would cost more than they do, and cutting them anew with each read, too.
        if len(waiting) - sliced < READS_TOGETHER:
            continue
        *full, last = slices(waiting)
        if full:
            await announce()
        for some in full:
            await _land(some, landing, pace, done)
        waiting, sliced = list(last), len(last)
        tell(source.done(), done)
    await announce()
    for some in slices(waiting):
        await _land(some, landing, pace, done)
    tell(1.0, done)


async def _land(records: Sequence[Record], landing: Landing, pace: Pace, done: Done) -> None:
    at = 0
    while at < len(records):
        await pace.before_landing()
        some = records[at : at + pace.records_at_once(len(records))]
        progress = await landing.land(some)
        pace.landed(len(some), progress.landed.points)
        done.points += progress.landed.points
        done.batches += progress.landed.batches
        done.skipped_batches += progress.landed.skipped_batches
        done.dead_points += progress.dead_points
        done.dead_records += progress.dead_records
        at += len(some)


class LedgerAnnouncer:
    """Puts receipts that the ledger does not know on its topic, each behind its task: a ledger that was lost, too, is rebuilt from the archive.

    `config_revision` is what tasks are recognized by (`ingest.restoring.task_of`). From `kept_from_s` on the ledger has let go of no look; of what was
    finished before, those of folded windows count as known.
    """

    def __init__(
        self,
        connection: asyncpg.Connection,
        sender: Sender,
        topic: str,
        config_revision: str,
        kept_from_s: int | None = None,
    ) -> None:
        self._kept_from = NEVER if kept_from_s is None else utc(kept_from_s)
        self._connection = connection
        self._sender = sender
        self._topic = topic
        self._config_revision = config_revision

    async def announce(self, source: ArchiveReplay) -> int:
        """Announce what the replay has met since; returns how many that were. Raises Transient."""
        found, source.receipts = source.receipts, []
        return await self.announce_all(found)

    async def announce_all(self, receipts: Iterable[Receipt]) -> int:
        found = list(receipts)
        items = [(r, i) for r in found for i in r.items]
        if not items:
            return 0
        with translated("ledger"):
            rows = await self._connection.fetch(
                _UNHEARD,
                [r.task_id for r, _ in items],
                [str(r.target) for r, _ in items],
                [i.item.service for _, i in items],
                [utc(i.item.start_s) for _, i in items],
                [utc(r.finished_at_ms / 1000) for r, _ in items],
                self._kept_from,
            )
        unheard = {row["task_id"] for row in rows}
        new = [r for r in found if r.task_id in unheard]
        values = [
            (r.target, value)
            for r in new
            for value in (wire.encode_task(task_of(r, self._config_revision)), wire.encode_receipt(r))
        ]
        await self._sender.send(self._topic, [Outgoing(str(t).encode(), value) for t, value in values])
        return len(new)


def _look_of(row: asyncpg.Record) -> KnownLook:
    return KnownLook(
        Target.parse(row["target"]),
        row["service"],
        int(row["window_start"].timestamp()),
        int(row["window_end"].timestamp()),
        int(row["started_at"].timestamp() * 1000),
        row["complete"],
        row["archived"],
        row["batches"],
        row["points"],
        row["metrics_billed"],
        row.get("held", 0),
        row.get("seen"),
    )
