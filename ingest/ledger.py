"""The ledger: what was planned and what came of it, as a projection of the `ledger` topic onto PostgreSQL.

Guarantees:

* *Planned before work*: a window is in `windows` because a planned task said so, whether or not anybody collected it.
* *Order does not matter*: folding the same records in any order, any number of times, ends in the same windows; the
  newest complete look wins by its `observed_at`, the newest attempt by its `finished_at`.
* *Landed is the sink's own word*: a look has landed when each of its batches is in `landed`, nothing else counts.
* *A position moves with its rows*, by compare-and-set in one transaction, as in the sink.

A window's state, first match: sealed, landed, collected, else open with the last look's status, else planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import asyncpg
import orjson

from ingest import wire
from ingest.errors import Fatal, Rejected, Transient
from ingest.landing import value_id
from ingest.model import LookStatus, Receipt, ReceiptItem, Task
from ingest.ports import Record

SINK = "ledger"
"""The projection's name in `positions`."""

STATE_SQL = """CASE
    WHEN sealed_at IS NOT NULL THEN 'sealed'
    WHEN landed_as_of IS NOT NULL THEN 'landed'
    WHEN collected_as_of IS NOT NULL THEN 'collected'
    WHEN last_status IS NOT NULL THEN last_status
    ELSE 'planned' END"""

_TASK = """INSERT INTO tasks (task_id, target, config_revision, tick, kind, attempt, planned_at)
VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING"""

_PLANNED = """INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at)
SELECT $1, $2, start, start + $5::interval, start + $5::interval + $6::interval, $7
FROM generate_series($3::timestamptz, $4::timestamptz - interval '1 second', $5::interval) AS start
ORDER BY start
ON CONFLICT DO NOTHING"""

_LOOK = """INSERT INTO looks (task_id, service, finished_at, target, shard, started_at, window_start, window_end, status, detail,
    observed_at, series, points, metrics_billed, requests, archive_key, batch_ids, windows)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)
ON CONFLICT DO NOTHING"""

_ATTEMPTED = """UPDATE windows SET last_status = $5, last_detail = $6, last_finished_at = $7,
    collected_as_of = CASE WHEN $5 = 'complete' THEN greatest(collected_as_of, $8) ELSE collected_as_of END
WHERE target = $1 AND service = $2 AND window_start >= $3 AND window_start < $4
    AND (last_finished_at IS NULL OR last_finished_at <= $7)"""

_COLLECTED_EARLIER = """UPDATE windows SET collected_as_of = greatest(collected_as_of, $5)
WHERE target = $1 AND service = $2 AND window_start >= $3 AND window_start < $4"""

_NEWLY_LANDED = """UPDATE looks SET landed_at = $2
WHERE look_id IN (
    SELECT look_id FROM looks l
    WHERE landed_at IS NULL AND NOT EXISTS (
        SELECT FROM unnest(l.batch_ids) AS wanted
        WHERE NOT EXISTS (SELECT FROM landed WHERE sink = $1 AND batch_id = wanted))
    ORDER BY look_id LIMIT 500 FOR UPDATE SKIP LOCKED)
RETURNING target, service, window_start, window_end, status, observed_at, windows"""

_LANDED = """UPDATE windows w SET landed_as_of = $5, points = coalesce(c.points, 0), digest = coalesce(c.digest, 0),
    sealed_at = CASE WHEN sealed_at IS NULL AND $5 >= settles_at THEN $6 ELSE sealed_at END
FROM windows AS v LEFT JOIN unnest($7::timestamptz[], $8::bigint[], $9::bigint[]) AS c (start, points, digest)
    ON c.start = v.window_start
WHERE v.target = $1 AND v.service = $2 AND v.window_start >= $3 AND v.window_start < $4
    AND (v.landed_as_of IS NULL OR v.landed_as_of < $5)
    AND w.target = v.target AND w.service = v.service AND w.window_start = v.window_start"""

_ADVANCE = """UPDATE positions SET next = $4, last_value_id = $5
WHERE sink = $1 AND topic = $2 AND partition = $3 AND next = $6"""


class Ledger:
    """Folds the ledger topic into PostgreSQL. One per process; `settling_s` has, by service, its settling time."""

    def __init__(self, connection: asyncpg.Connection, settling_s: Mapping[str, int]) -> None:
        self._connection = connection
        self._settling_s = settling_s

    async def project(self, records: Sequence[Record], expected: Mapping[int, int], now_s: int) -> None:
        """Fold records and move the positions, in one transaction.

        `expected` is, by partition, the stored position. A record that does not decode is Rejected by name: only we write this topic, so
        it is a bug or an attack and worth stopping for. Raises Fatal where a position is not the expected one, Transient.
        """
        facts = [self._decode(r) for r in records]
        last = {r.position.partition: r for r in records}
        try:
            async with self._connection.transaction():
                for partition, record in sorted(last.items()):
                    await self._advance(record, expected[partition])
                for fact in facts:
                    if isinstance(fact, Task):
                        await self._planned(fact, _at(now_s))
                for fact in facts:
                    if isinstance(fact, Receipt):
                        for item in fact.items:
                            await self._receipt(fact, item)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise Transient("ledger", f"not projected: {error}") from error

    async def fold_landed(self, sink: str, now_s: int) -> int:
        """Mark the looks whose batches have all landed in `sink`, and their windows. Returns how many looks. Raises Transient."""
        try:
            async with self._connection.transaction():
                rows = await self._connection.fetch(_NEWLY_LANDED, sink, _at(now_s))
                # One order for all processes, so that two of them never wait for each other.
                for row in sorted(rows, key=lambda r: (r["target"], r["service"], r["window_start"])):
                    if row["status"] == LookStatus.COMPLETE:
                        await self._landed(row, _at(now_s))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise Transient("ledger", f"landed looks not folded: {error}") from error
        return len(rows)

    def _decode(self, record: Record) -> Task | Receipt:
        try:
            return wire.decode_ledger(record.value)
        except Rejected as error:
            raise Fatal(
                f"record {record.position.topic}/{record.position.partition}@{record.position.offset}",
                f"is no ledger record: {error.what}",
                "only Headgate may write this topic: check its ACLs, and that consumers were rolled before exporters",
            ) from error

    async def _advance(self, record: Record, expected: int) -> None:
        at = record.position
        done = await self._connection.execute(
            _ADVANCE, SINK, at.topic, at.partition, at.offset + 1, value_id(record.value), expected
        )
        if done != "UPDATE 1":
            raise Fatal(
                f"ledger {at.topic}/{at.partition}",
                f"its position is not {expected}: another process projects this partition",
                "this process rejoins the group",
            )

    async def _planned(self, task: Task, now: datetime) -> None:
        target = str(task.target)
        await self._connection.execute(
            _TASK,
            task.task_id,
            target,
            task.config_revision,
            _at(task.tick_s),
            task.kind,
            task.attempt,
            now,
        )
        for item in task.items:
            await self._connection.execute(
                _PLANNED,
                target,
                item.service,
                _at(item.start_s),
                _at(item.end_s),
                _seconds(item.grid_s),
                _seconds(self._settling_s.get(item.service, 0)),
                now,
            )

    async def _receipt(self, receipt: Receipt, done: ReceiptItem) -> None:
        target, item, outcome = str(receipt.target), done.item, done.outcome
        span = (target, item.service, _at(item.start_s), _at(item.end_s))
        finished_at = _at(receipt.finished_at_ms / 1000)
        observed_at = _at(outcome.observed_at_ms / 1000) if outcome.observed_at_ms else None
        await self._connection.execute(
            _LOOK,
            receipt.task_id,
            item.service,
            finished_at,
            target,
            receipt.shard,
            _at(receipt.started_at_ms / 1000),
            *span[2:],
            outcome.status,
            outcome.detail,
            observed_at,
            outcome.series,
            done.points,
            outcome.metrics_billed,
            orjson.dumps(outcome.requests).decode(),
            receipt.archive_key,
            list(done.batches),
            orjson.dumps([[w.start_s, w.points, w.digest] for w in done.windows]).decode(),
        )
        await self._connection.execute(
            _ATTEMPTED, *span, outcome.status, outcome.detail, finished_at, observed_at
        )
        if outcome.status is LookStatus.COMPLETE:
            await self._connection.execute(_COLLECTED_EARLIER, *span, observed_at)

    async def _landed(self, look: asyncpg.Record, now: datetime) -> None:
        counts = orjson.loads(look["windows"])
        await self._connection.execute(
            _LANDED,
            look["target"],
            look["service"],
            look["window_start"],
            look["window_end"],
            look["observed_at"],
            now,
            [_at(c[0]) for c in counts],
            [c[1] for c in counts],
            [signed(c[2]) for c in counts],
        )


def signed(digest: int) -> int:
    """A 64-bit digest as PostgreSQL's bigint holds it."""
    return digest - (1 << 64) if digest >= 1 << 63 else digest


def _at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _seconds(seconds: int) -> timedelta:
    return timedelta(seconds=seconds)
