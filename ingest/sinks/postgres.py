"""The PostgreSQL sink: samples, series, landed batches, positions and marks for the rollups, in one transaction a landing.

* *All or nothing.* A landing that fails, or whose process dies, leaves nothing behind; days' partitions excepted.
* *Landing is a maximum* of (version, value) per (series, timestamp): any order, splitting and duplication of the same looks
  ends in the same table. A batch whose id has landed is skipped without touching rows, unless the sink is `rebuilding`.
* *A zombie is refused*: the position is compared and set first, under its row's lock. A commit of our own whose answer was lost is no zombie's.
* *A stopped predecessor does not block*: `claim` terminates the backend that it left behind, and rows are sent from a
  finished buffer, so that no backend waits in mid-COPY for a client that thinks.
* *Keys are taken in one order*: positions, series, rows, landed, each sorted. What deadlocks all the same is tried
  again.

Rows whose key cannot exist yet, as far as `Seen` remembers, take COPY straight into `samples`; the others take a temporary
table and an upsert. Where that COPY meets a key after all, the transaction is begun again with all rows in the
temporary table: one sorted pass, and no savepoint for the many landings that need none.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self, TypeVar

import asyncpg
import numpy as np
import structlog
from numpy.typing import NDArray

from ingest.clock import Clock, utc
from ingest.errors import Fatal, HeadgateError
from ingest.model import BatchId, point_hashes
from ingest.ports import Advance, Landable, Landed, SeriesRejected, StoredPosition
from ingest.sinks import rollup_store, series, statements
from ingest.sinks.connection import bounded, open_connection, server_of, translated
from ingest.sinks.copy import COLUMNS, TIMESTAMP_MAX_S, TIMESTAMP_MIN_S, Rows, copy_stream, rows_of
from ingest.sinks.doubt import InDoubt
from ingest.sinks.partitions import create_partitions
from ingest.sinks.seen import Seen
from shard_config.model import Postgres

log = structlog.get_logger()

LAND_ATTEMPTS = 4
LAND_TIMEOUT_S = 60.0
"""For one call, all attempts together."""

SERIES_REMEMBERED_MAX = 2_000_000
"""64 MB."""

COPY_ROWS_MAX = 1_000_000
"""Rows in one COPY: 58 MB of buffer."""

_TERMINATE_WAIT_MS = 5_000

_RETRIED = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.LockNotAvailableError,
    asyncpg.CheckViolationError,  # a day's partition was dropped behind our back
    asyncpg.UniqueViolationError,  # a key that was not suspect is there
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Backend:
    """A server process, named so that a later one with the same pid is not mistaken for it."""

    pid: int
    start: datetime


class PostgresSink:
    """`ports.Sink` on one connection of its own, which is rebuilt after an error. Calls wait for each other."""

    def __init__(
        self,
        postgres: Postgres,
        sink_name: str,
        clock: Clock,
        timeout_s: float,
        reader: str,
        rebuilding: bool,
    ) -> None:
        self._postgres = postgres
        self._sink = sink_name
        self._reader = reader or sink_name
        self._rebuilding = rebuilding
        self._clock = clock
        self._timeout_s = timeout_s
        self._where = f"sink {sink_name} at {server_of(postgres)}"
        self._seen = Seen(SERIES_REMEMBERED_MAX)
        self._days: set[int] = set()
        self._claims: dict[str, tuple[int, ...]] = {}
        self._connection: asyncpg.Connection | None = None
        self._backend: _Backend | None = None
        self._lock = asyncio.Lock()
        self._in_doubt = InDoubt()

    @classmethod
    async def connect(
        cls,
        postgres: Postgres,
        *,
        clock: Clock,
        sink_name: str = "postgres",
        timeout_s: float = LAND_TIMEOUT_S,
        reader: str = "",
        rebuilding: bool = False,
    ) -> Self:
        """A connected sink. Raises Transient where the server cannot be reached, Fatal where it will not have us.

        `reader` is the name in `positions`: of whoever reads for this sink besides its live consumers. `rebuilding` writes the rows
        of batches that `landed` knows, too.
        """
        sink = cls(postgres, sink_name, clock, timeout_s, reader, rebuilding)
        async with sink._lock:
            await sink._connected()
        return sink

    @property
    def series_remembered(self) -> int:
        """SERIES_REMEMBERED_MAX at most."""
        return len(self._seen)

    async def close(self) -> None:
        """Close the connection; the sink reopens it when it is used again."""
        if self._connection is not None:
            self._connection.terminate()

    async def positions(self, topic: str, partitions: Sequence[int]) -> Mapping[int, StoredPosition]:
        async def read(connection: asyncpg.Connection) -> dict[int, StoredPosition]:
            rows = await connection.fetch(
                "SELECT partition, next, last_value_id FROM positions"
                " WHERE sink = $1 AND topic = $2 AND partition = ANY($3::int[])",
                self._reader, topic, list(partitions),
            )  # fmt: skip
            return {r["partition"]: StoredPosition(r["next"], r["last_value_id"]) for r in rows}

        return await self._run(read)

    async def init_positions(self, topic: str, partitions: Sequence[int]) -> None:
        await self.start_at(topic, dict.fromkeys(partitions, 0))

    async def start_at(self, topic: str, starts: Mapping[int, int]) -> None:
        """Store a position, partition → next, where there is none."""

        async def store(connection: asyncpg.Connection) -> None:
            await connection.execute(
                "INSERT INTO positions (sink, topic, partition, next, last_value_id)"
                " SELECT $1, $2, s.*, ''::bytea FROM unnest($3::int[], $4::bigint[]) AS s ORDER BY 3"
                " ON CONFLICT DO NOTHING",
                self._reader, topic, list(starts), list(starts.values()),
            )  # fmt: skip

        await self._run(store)

    async def forget(self, topic: str, partitions: Sequence[int]) -> None:
        """Remove positions: whoever read there is done."""

        async def remove(connection: asyncpg.Connection) -> None:
            await connection.execute(
                "DELETE FROM positions WHERE sink = $1 AND topic = $2 AND partition = ANY($3::int[])",
                self._reader, topic, list(partitions),
            )  # fmt: skip

        await self._run(remove)

    async def claim(self, topic: str, partitions: Sequence[int]) -> None:
        """Make this connection's backend the recorded writer of exactly these partitions of the topic; release the others.

        The backend that a previous owner left recorded is terminated first, and its transaction with it; so an owner
        that still lives should release what is revoked, by claiming none. After a rebuild of our connection the claim is
        renewed, unless another sink has claimed meanwhile: that is Fatal then.
        """
        released = set(self._claims.pop(topic, ())) - set(partitions)

        async def record(connection: asyncpg.Connection) -> None:
            ours = self._backend
            assert ours is not None  # noqa: S101  # there is a connection
            await connection.execute(
                statements.RELEASE, self._reader, topic, sorted(released), ours.pid, ours.start
            )
            await connection.fetch(
                statements.TERMINATE, self._reader, topic, list(partitions), _TERMINATE_WAIT_MS
            )
            await self._record(connection, ours, topic, partitions)

        await self._run(record)
        self._claims[topic] = tuple(partitions)

    async def land(self, advances: Sequence[Advance], batches: Sequence[Landable]) -> Landed:
        refused = [(b.batch_id, i) for b in batches for i in _unstorable(b)]
        if refused:
            raise SeriesRejected(self._where, "unstorable", "NaN, or no such time", refused)

        async def work(connection: asyncpg.Connection) -> Landed:
            known = set() if self._rebuilding else await self._known(connection, batches)
            new = {b.batch_id: b for b in batches if b.batch_id not in known}
            rows = rows_of([b.batch for b in new.values()])
            staged = await self._land(connection, advances, list(new.values()), rows)
            return Landed(
                batches=len(batches),
                points=sum(b.batch.points for b in batches),
                skipped_batches=len(batches) - len(new),
                copied=not staged,
                staged_points=staged,
            )

        with self._in_doubt.asking(advances):
            return await self._run(work)

    # --- one landing ------------------------------------------------------------------------------------------

    async def _known(self, connection: asyncpg.Connection, batches: Sequence[Landable]) -> set[bytes]:
        """Ids of the batches that have landed. Outside the transaction: what is in `landed` stays there."""
        rows = await connection.fetch(
            "SELECT batch_id FROM landed WHERE sink = $1 AND batch_id = ANY($2::bytea[])",
            self._sink, [b.batch_id for b in batches],
        )  # fmt: skip
        return {row["batch_id"] for row in rows}

    async def _land(
        self,
        connection: asyncpg.Connection,
        advances: Sequence[Advance],
        batches: Sequence[Landable],
        rows: Rows,
    ) -> int:
        """The transaction, tried again where that may help; the number of rows that went through staging."""
        met = series.first_met(self._where, batches, rows, self._seen)
        digests = _digests(batches)
        suspect = self._seen.may_conflict(rows)
        for attempt in range(1, LAND_ATTEMPTS + 1):
            try:
                self._days |= await create_partitions(connection, rows.days(), self._days)
                async with connection.transaction():
                    if not await self._advance(connection, advances):
                        return 0
                    await series.insert(connection, self._where, met, batches, self._now())
                    await _insert_rows(connection, rows, suspect)
                    await rollup_store.mark(connection, rows, self._now())
                    await self._insert_landed(connection, batches, digests)
            except _RETRIED as error:
                log.info("landing_retried", sink=self._sink, attempt=attempt, error=type(error).__name__)
                if attempt == LAND_ATTEMPTS:
                    raise
                if isinstance(error, asyncpg.CheckViolationError):
                    self._days.clear()
                elif not isinstance(error, asyncpg.UniqueViolationError):
                    await self._clock.sleep(0.05 * 2**attempt)
                suspect = np.ones(len(rows), np.bool_)
            else:
                self._seen.learn(rows)
                return int(suspect.sum())
        raise AssertionError("unreachable")

    async def _advance(self, connection: asyncpg.Connection, advances: Sequence[Advance]) -> bool:
        """False where all this has landed, and only its answer was lost."""
        if not advances:
            return True
        topics, numbers = [a.topic for a in advances], [a.partition for a in advances]
        rows = await connection.fetch(statements.LOCK_POSITIONS, self._reader, topics, numbers)
        found = {(r["topic"], r["partition"]): r["next"] for r in rows}
        for a in advances:
            at = found.pop((a.topic, a.partition), None)
            if at != a.expected_next:
                if await self._in_doubt.made(connection, self._reader, advances):
                    log.info("landing_was_done", sink=self._sink)
                    return False
                raise Fatal(
                    f"{self._where}, {a.topic}[{a.partition}]",
                    f"the position is {at}, expected {a.expected_next}",
                    "another consumer owns the partition: drop what is in memory and rejoin",
                )
        nexts, ids = [a.next for a in advances], [a.last_value_id for a in advances]
        await connection.execute(statements.MOVE_POSITIONS, self._reader, topics, numbers, nexts, ids)
        return True

    async def _insert_landed(
        self, connection: asyncpg.Connection, batches: Sequence[Landable], digests: Mapping[BatchId, int]
    ) -> None:
        if not batches:
            return
        ordered = sorted(batches, key=lambda one: one.batch_id)
        await connection.execute(
            statements.INSERT_LANDED,
            self._sink,
            self._now(),
            [one.batch_id for one in ordered],
            [one.batch.task_id for one in ordered],
            [str(one.batch.target) for one in ordered],
            [one.batch.service for one in ordered],
            [one.batch.version for one in ordered],
            [one.batch.points for one in ordered],
            [one.dead_points for one in ordered],
            [digests[one.batch_id] for one in ordered],
            [_dead_windows(one) for one in ordered],
        )

    def _now(self) -> datetime:
        return utc(self._clock.now_ms() / 1000)

    # --- the connection ---------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[asyncpg.Connection], Coroutine[Any, Any, T]]) -> T:
        async with self._lock:
            with translated(self._where):
                connection = await self._connected()
                try:
                    return await bounded(connection, work(connection), self._timeout_s)
                except HeadgateError:
                    raise
                except BaseException:
                    connection.terminate()
                    raise

    async def _connected(self) -> asyncpg.Connection:
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        connection = await open_connection(self._postgres, f"headgate sink {self._sink}")
        try:
            await bounded(connection, self._prepare(connection), self._timeout_s)
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection
        return connection

    async def _prepare(self, connection: asyncpg.Connection) -> None:
        """What a new connection needs, and our claims in its name."""
        await connection.execute(statements.STAGING)
        row = await connection.fetchrow(
            "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        )
        backend = _Backend(row["pid"], row["backend_start"])
        if self._backend is not None and self._claims:
            # It may not know yet that nobody is there any more, and hold what we need.
            await connection.fetch(
                statements.TERMINATE_ONE, self._backend.pid, self._backend.start, _TERMINATE_WAIT_MS
            )
        for topic, numbers in self._claims.items():
            await self._record(connection, backend, topic, numbers, instead_of=self._backend)
        self._backend = backend

    async def _record(
        self,
        connection: asyncpg.Connection,
        backend: _Backend,
        topic: str,
        numbers: Sequence[int],
        instead_of: _Backend | None = None,
    ) -> None:
        """Record a backend as the partitions' writer; where `instead_of` is given, that must be the recorded one."""
        async with connection.transaction():
            rows = await connection.fetch(
                statements.LOCK_POSITIONS, self._reader, [topic] * len(numbers), list(numbers)
            )
            owners = {(r["backend_pid"], r["backend_start"]) for r in rows}
            if instead_of is not None and owners - {(instead_of.pid, instead_of.start)}:
                self._claims.clear()
                raise Fatal(
                    f"{self._where}, {topic}{list(numbers)}",
                    "another consumer claimed a partition while our connection was down",
                    "drop what is in memory and rejoin",
                )
            await connection.execute(
                "UPDATE positions SET backend_pid = $4, backend_start = $5"
                " WHERE sink = $1 AND topic = $2 AND partition = ANY($3::int[])",
                self._reader, topic, list(numbers), backend.pid, backend.start,
            )  # fmt: skip


async def _insert_rows(connection: asyncpg.Connection, rows: Rows, suspect: NDArray[np.bool_]) -> None:
    """Suspects by staging and upsert, the others by plain COPY, which a key that is there after all makes fail."""
    if suspect.any():
        await _copy(connection, "staging", rows.select(suspect))
        await connection.execute(statements.UPSERT)
        rows = rows.select(~suspect)
    await _copy(connection, "samples", rows)


async def _copy(connection: asyncpg.Connection, table: str, rows: Rows) -> None:
    """COPY from finished buffers, which asyncpg sends without asking anything of us in between."""
    for start in range(0, len(rows), COPY_ROWS_MAX):
        stream = copy_stream(rows.select(slice(start, start + COPY_ROWS_MAX)))
        await connection.copy_to_table(table, source=stream, columns=COLUMNS, format="binary")


def _digests(batches: Sequence[Landable]) -> dict[BatchId, int]:
    """`model.digest_of` the points of each batch, in two's complement; all at once, in half the time of one by one."""
    some = [one for one in batches if one.batch.points]
    if not some:
        return dict.fromkeys((one.batch_id for one in batches), 0)
    hashes = point_hashes(
        np.concatenate([one.batch.point_ids() for one in some]),
        np.concatenate([one.batch.timestamps_s for one in some]),
        np.concatenate([one.batch.values for one in some]),
    )
    starts = np.cumsum([0, *(one.batch.points for one in some[:-1])])
    sums = np.add.reduceat(hashes, starts).view(np.int64).tolist()
    digests = dict.fromkeys((one.batch_id for one in batches), 0)
    digests |= {one.batch_id: digest for one, digest in zip(some, sums, strict=True)}
    return digests


def _dead_windows(one: Landable) -> str | None:
    """For the ledger's balance, as JSON; None where nothing was put aside."""
    gone = [[w.start_s, w.points, w.digest] for w in one.dead_windows]
    return json.dumps(gone) if gone else None


def _unstorable(one: Landable) -> list[int]:
    """Indices of series with what PostgreSQL, or our order of values, has no place for. Validation lets none through."""
    b = one.batch
    bad = np.isnan(b.values) | (b.timestamps_s < TIMESTAMP_MIN_S) | (b.timestamps_s > TIMESTAMP_MAX_S)
    if not bad.any():
        return []
    return [int(i) for i in np.unique(np.repeat(np.arange(len(b.series)), b.counts)[bad])]
