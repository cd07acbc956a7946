"""The dead-letter topic, read; and what people decided about its letters.

* A letter is its identity: however often it was written, it is found once, with the number of writings.
* Reading ends where the topic ended when it began, and is bounded: in letters, in bytes kept, in time without an answer.
* What was decided (`dead_handled` in PostgreSQL) takes nothing out of Kafka: a handled letter is shown again when it is asked for.

`ingest.letters` says what is in a letter, `ingest.revive` lands one again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import asyncpg
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from ingest import letters, wire
from ingest.brokers import bootstrap_of, client_options
from ingest.errors import Fatal, Rejected, Transient
from ingest.log import quietly
from ingest.model import DeadLetter, RecordPosition
from ingest.sinks.connection import bounded, open_connection, translated
from shard_config.model import Kafka, Postgres

_log = structlog.get_logger()

LETTERS_MAX = 100_000
"""Letters that one command holds, without their bytes."""

LETTER_BYTES_MAX = 256 * 1024 * 1024
"""Of payloads that one command holds."""

STALL_S = 30.0
"""So long a read may bring nothing before it is given up."""

STATEMENT_TIMEOUT_S = 60.0
IDENTITY_DIGITS_MIN = 6

_MARK = """INSERT INTO dead_handled (identity, what, at, note)
SELECT identity, $2, $3, $4 FROM unnest($1::text[]) AS identity ORDER BY identity
ON CONFLICT (identity) DO UPDATE SET what = excluded.what, at = excluded.at, note = excluded.note"""

_LANDED = "SELECT count(*) FROM landed WHERE sink = 'postgres' AND batch_id = ANY($1::bytea[])"

_MARKED = "SELECT identity, what, at, note FROM dead_handled WHERE identity = ANY($1::text[])"


@dataclass(frozen=True, slots=True)
class Handled:
    """What somebody decided about a letter: `replayed` or `discarded`."""

    what: str
    at: datetime
    note: str


@dataclass(slots=True)
class Found:
    """A letter in the topic. `letter` is its newest writing."""

    letter: DeadLetter
    identity: str
    account: str
    first_written_ms: int
    last_written_ms: int
    times: int = 1
    handled: Handled | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters: all that is given must hold. `identities` are whole ones or their beginnings."""

    identities: tuple[str, ...] = ()
    reason: str | None = None
    account: str | None = None
    since_ms: int | None = None
    """Written at or after this, by Kafka's record timestamp."""
    handled: bool = False
    """Those that were replayed or discarded, too."""

    def holds(self, identity: str, account: str, letter: DeadLetter) -> bool:
        if self.identities and not any(identity.startswith(one) for one in self.identities):
            return False
        return self.reason in (None, letter.reason) and self.account in (None, account)


@dataclass(frozen=True, slots=True)
class Letters:
    """What was found, oldest first. `unreadable` counts records of the topic that are no letters."""

    found: tuple[Found, ...]
    unreadable: int

    def by_reason(self) -> dict[str, int]:
        """Letters by reason, the most first."""
        return dict(Counter(one.letter.reason for one in self.found).most_common())


@dataclass(slots=True)
class _Gathering:
    wanted: Filter
    payloads: bool
    found: dict[str, Found] = field(default_factory=dict)
    unreadable: int = 0
    bytes_held: int = 0

    def add(self, value: bytes, position: RecordPosition, written_ms: int) -> None:
        try:
            letter = wire.decode_dead_letter(value)
        except Rejected as error:
            self.unreadable += 1
            _log.warning("dead_letter_unreadable", position=str(position), error=str(error))
            return
        identity, account = letter.identity, letters.account_of(letter)
        if not self.wanted.holds(identity, account, letter):
            return
        if not self.payloads:
            letter = replace(letter, payload=b"", context=b"")
        known = self.found.get(identity)
        if known is not None:
            known.letter, known.last_written_ms, known.times = letter, written_ms, known.times + 1
            return
        self.found[identity] = Found(letter, identity, account, written_ms, written_ms)
        self.bytes_held += len(letter.payload) + len(letter.context)
        if len(self.found) > LETTERS_MAX or self.bytes_held > LETTER_BYTES_MAX:
            raise Fatal(
                f"topic {position.topic}",
                f"more than {LETTERS_MAX} letters, or {LETTER_BYTES_MAX >> 20} MB of them, were asked for",
                "narrow it down: --reason, --account, --since",
            )


async def find(
    kafka: Kafka | str, topic: str, postgres: Postgres, wanted: Filter, *, payloads: bool
) -> Letters:
    """The letters that a filter holds for, oldest first. Without `payloads` the letters' payloads and contexts are left out.

    Raises Transient where Kafka or PostgreSQL does not answer; Fatal where there are too many, and for a beginning of an identity that is
    too short, fits several or none.
    """
    for one in wanted.identities:
        if len(one) < IDENTITY_DIGITS_MIN:
            raise Fatal(f"identity {one!r}", f"give at least {IDENTITY_DIGITS_MIN} digits of it")
    gathering = _Gathering(wanted, payloads)
    async with contextlib.aclosing(_records(kafka, topic, wanted.since_ms)) as records:
        async for position, value, written_ms in records:
            gathering.add(value, position, written_ms)
    found = list(gathering.found.values())
    for one in wanted.identities:
        fitting = [f.identity for f in found if f.identity.startswith(one)]
        if len(fitting) != 1:
            raise Fatal(
                f"identity {one!r}", f"fits {len(fitting)} letters", "`headgate dead list --all` has them"
            )
    marks = await handled(postgres, [f.identity for f in found])
    for f in found:
        f.handled = marks.get(f.identity)
    if not wanted.handled:
        found = [f for f in found if f.handled is None]
    return Letters(tuple(sorted(found, key=lambda f: f.first_written_ms)), gathering.unreadable)


async def _records(
    kafka: Kafka | str, topic: str, since_ms: int | None
) -> AsyncGenerator[tuple[RecordPosition, bytes, int], None]:
    """Records of a topic up to its end now, each with its position and timestamp in ms. Raises Transient."""
    client = AIOKafkaConsumer(**client_options(kafka), enable_auto_commit=False, auto_offset_reset="earliest")
    try:
        await client.start()
        metadata = await client._client.fetch_all_metadata()
        partitions = [TopicPartition(topic, p) for p in sorted(metadata.partitions_for_topic(topic) or ())]
        if not partitions:
            raise Fatal(f"topic {topic}", "is not there", "run `headgate setup`")
        left = await _bounds(client, partitions, since_ms)
        client.assign(list(left))
        for tp, (start, _) in left.items():
            client.seek(tp, start)
        clock = asyncio.get_running_loop().time
        quiet_since_s = clock()
        while left:
            got = await client.getmany(timeout_ms=500, max_records=1000)
            for tp, records in got.items():
                for r in records:
                    if tp in left and r.offset < left[tp][1]:
                        yield RecordPosition(topic, tp.partition, r.offset), r.value or b"", r.timestamp
            if got:
                quiet_since_s = clock()
            elif clock() - quiet_since_s > STALL_S:
                raise TimeoutError(f"nothing came in {STALL_S:g} s")
            for tp in [tp for tp, (_, end) in left.items() if await client.position(tp) >= end]:
                del left[tp]
    except (KafkaError, OSError, TimeoutError) as error:
        raise Transient(
            f"topic {topic} on {bootstrap_of(kafka)}", f"{type(error).__name__} {error}".rstrip()
        ) from error
    finally:
        await quietly(client.stop())


async def _bounds(
    client: AIOKafkaConsumer, partitions: Sequence[TopicPartition], since_ms: int | None
) -> dict[TopicPartition, tuple[int, int]]:
    """By partition [first, end), those without a record left out."""
    first: dict[TopicPartition, int] = await client.beginning_offsets(partitions)
    end: dict[TopicPartition, int] = await client.end_offsets(partitions)
    if since_ms is not None:
        later = await client.offsets_for_times(dict.fromkeys(partitions, since_ms))
        first = {tp: at.offset if (at := later.get(tp)) else end[tp] for tp in partitions}
    return {tp: (first[tp], end[tp]) for tp in partitions if first[tp] < end[tp]}


# --- what was decided -------------------------------------------------------------------------------------------


async def handled(postgres: Postgres, identities: Sequence[str]) -> dict[str, Handled]:
    """What was decided about these letters, by identity. Raises Transient."""
    async with _connection(postgres) as connection:
        rows = await bounded(connection, connection.fetch(_MARKED, list(identities)), STATEMENT_TIMEOUT_S)
    return {r["identity"]: Handled(r["what"], r["at"], r["note"]) for r in rows}


async def mark(postgres: Postgres, identities: Iterable[str], what: Handled) -> None:
    """Record what was decided about these letters; the last decision counts. Raises Transient."""
    async with _connection(postgres) as connection:
        work = connection.execute(_MARK, sorted(set(identities)), what.what, what.at, what.note)
        await bounded(connection, work, STATEMENT_TIMEOUT_S)


async def landed(postgres: Postgres, batches: Collection[bytes]) -> int:
    """How many of these batches the store has. Raises Transient."""
    async with _connection(postgres) as connection:
        work = connection.fetchval(_LANDED, list(batches))
        return int(await bounded(connection, work, STATEMENT_TIMEOUT_S))


@contextlib.asynccontextmanager
async def _connection(postgres: Postgres) -> AsyncIterator[asyncpg.Connection]:
    connection = await open_connection(postgres, "headgate dead")
    try:
        with translated("dead letters"):
            yield connection
    finally:
        connection.terminate()
