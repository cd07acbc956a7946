"""What was collected, read again as records of one stream, for `ingest.landing`: from Kafka here, from S3 in `ingest.archive_replay`.

Guarantees:

* *Everything that is wanted comes*, whole batches as they were published: complete looks and partial ones, revisions, duplicates.
  Which of them wins is the landing's affair.
* *An end*: a replay reads what was there when it was opened. What is published later, live consumers read.
* *It goes on where it was*: each batch has a place in its partition that a later run finds again; in Kafka that is its offset.
* *Bounded memory*: a fetch of Kafka's.

Nothing here joins a group, commits an offset or writes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError

from ingest.batch import span_of
from ingest.brokers import client_options
from ingest.clock import Clock
from ingest.errors import Fatal, Rejected, Transient
from ingest.log import quietly
from ingest.model import RecordPosition, Target, Window
from ingest.ports import Record, StoredPosition
from shard_config.model import Kafka, Limits

POLL_RECORDS_MAX = 2048
"""All that a fetch brings, so that partitions stay in step: rows in order of time land faster."""
STALL_S = 60.0
SKEW_MS = 600_000
"""Clocks of exporters and brokers may be so far apart."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Which batches are wanted: those with a window that touches [from_s, to_s), of these accounts, regions, services.

    An empty set is all. With `stretches`, by target and service, only what touches one of those.
    """

    from_s: int
    to_s: int
    accounts: frozenset[str] = frozenset()
    regions: frozenset[str] = frozenset()
    services: frozenset[str] = frozenset()
    stretches: Mapping[tuple[Target, str], tuple[Window, ...]] | None = field(default=None, hash=False)

    def has(self, target: Target) -> bool:
        """Whether anything of a target can be wanted."""
        return self._labelled(target) and (
            self.stretches is None or any(t == target for t, _ in self.stretches)
        )

    def wants(self, target: Target, service: str, start_s: int, end_s: int) -> bool:
        """Whether a look at [start_s, end_s) of a service is wanted."""
        if not self._labelled(target) or (self.services and service not in self.services):
            return False
        if start_s >= self.to_s or end_s <= self.from_s:
            return False
        if self.stretches is None:
            return True
        return any(start_s < w.end_s and w.start_s < end_s for w in self.stretches.get((target, service), ()))

    def _labelled(self, target: Target) -> bool:
        return (not self.accounts or target.account in self.accounts) and (
            not self.regions or target.region in self.regions
        )


class Replay(Protocol):
    """A stream of records in `partitions` of `topic`, for `ingest.landing.Landing` of that topic."""

    topic: str
    partitions: tuple[int, ...]

    async def open(self) -> Mapping[int, int]:
        """Fix the end; partition → where a replay that was never run begins. Raises Transient."""
        ...

    def bounds(self, stored: Mapping[int, StoredPosition]) -> dict[int, tuple[int, int]]:
        """What `Landing.open` needs: partition → (first place, end)."""
        ...

    def records(
        self, starts: Mapping[int, int], stored: Mapping[int, StoredPosition]
    ) -> AsyncIterator[list[Record]]:
        """Wanted records from `starts` on, some at a time, and in any case the one before a stored position. Raises Transient, Fatal."""
        ...

    def done(self) -> float:
        """How much of it has been read, 0 to 1."""
        ...

    async def close(self) -> None: ...


# --- Kafka ----------------------------------------------------------------------------------------------------


class KafkaReplay:
    """`Replay` of a topic of batches, from the first record that can hold a wanted one to the end as it is now.

    `since_ms` is on Kafka's clock: nothing that is wanted was written before. Records that cannot be read are left to the live consumers, who
    have put them aside.
    """

    def __init__(
        self,
        kafka: Kafka | str,
        topic: str,
        partitions: Sequence[int],
        scope: Scope,
        since_ms: int,
        clock: Clock,
        limits: Limits,
    ) -> None:
        self.topic = topic
        self.partitions = tuple(partitions)
        self._scope = scope
        self._since_ms = max(0, since_ms - SKEW_MS)
        self._clock = clock
        self._limits = limits
        self._targets: dict[bytes, bool] = {}
        self._first: dict[int, int] = {}
        self._begin: dict[int, int] = {}
        self._end: dict[int, int] = {}
        self._read: dict[int, int] = {}
        self._client = AIOKafkaConsumer(
            **client_options(kafka),
            client_id="headgate-backfill",
            enable_auto_commit=False,
            auto_offset_reset="none",
            fetch_max_bytes=16 * 1024 * 1024,
            max_partition_fetch_bytes=1024 * 1024,
            fetch_max_wait_ms=100,
        )
        self._asked = [TopicPartition(topic, p) for p in self.partitions]

    async def open(self) -> Mapping[int, int]:
        try:
            await self._client.start()
            first = await self._client.beginning_offsets(self._asked)
            end = await self._client.end_offsets(self._asked)
            at = await self._client.offsets_for_times(dict.fromkeys(self._asked, self._since_ms))
        except (KafkaError, OSError) as error:
            raise Transient(f"topic {self.topic}", f"{type(error).__name__} {error}") from error
        self._first = {tp.partition: first[tp] for tp in self._asked}
        self._end = {tp.partition: end[tp] for tp in self._asked}
        self._begin = {
            tp.partition: found.offset if (found := at[tp]) is not None else end[tp] for tp in self._asked
        }
        return self._begin

    def bounds(self, stored: Mapping[int, StoredPosition]) -> dict[int, tuple[int, int]]:
        return {p: (self._first[p], self._end[p]) for p in self.partitions}

    async def records(
        self, starts: Mapping[int, int], stored: Mapping[int, StoredPosition]
    ) -> AsyncIterator[list[Record]]:
        self._read = dict(starts)
        left = {tp for tp in self._asked if starts[tp.partition] < self._end[tp.partition]}
        self._client.assign(self._asked)
        for tp in self._asked:
            self._client.seek(tp, starts[tp.partition])
        self._client.pause(*(tp for tp in self._asked if tp not in left))
        progress_s = self._clock.monotonic_s()
        while left:
            found = await self._poll()
            if found:
                progress_s = self._clock.monotonic_s()
            elif self._clock.monotonic_s() - progress_s > STALL_S:
                raise Transient(f"topic {self.topic}", f"nothing came for {STALL_S:g} s")
            records = [
                r for r in found if r.position.offset < stored[r.position.partition].next or self._wanted(r)
            ]
            if records:
                yield records
            for tp in list(left):
                self._read[tp.partition] = at = await self._client.position(tp)
                if at >= self._end[tp.partition]:
                    left.discard(tp)
                    self._client.pause(tp)

    async def _poll(self) -> list[Record]:
        try:
            got = await self._client.getmany(timeout_ms=250, max_records=POLL_RECORDS_MAX)
        except (OffsetOutOfRangeError, NoOffsetForPartitionError) as error:
            raise Fatal(
                f"topic {self.topic}",
                f"its retention has passed what was to be read: {error}",
                "go on with --via s3",
            ) from error
        except KafkaError as error:
            raise Transient(f"topic {self.topic}", f"{type(error).__name__} {error}") from error
        return [
            Record(RecordPosition(r.topic, r.partition, r.offset), r.key or b"", r.value or b"", r.timestamp)
            for batch in got.values()
            for r in batch
            if r.offset < self._end[r.partition]
        ]

    def _wanted(self, record: Record) -> bool:
        known = self._targets.get(record.key)
        if known is None:
            known = self._targets[record.key] = _has_key(self._scope, record.key)
        if not known:
            return False
        try:
            target, service, start_s, end_s = span_of(record.value, self._limits)
        except Rejected:
            return False
        return self._scope.wants(target, service, start_s, end_s)

    def done(self) -> float:
        total = sum(self._end[p] - self._begin[p] for p in self.partitions)
        read = sum(min(at, self._end[p]) - self._begin[p] for p, at in self._read.items())
        return min(1.0, max(0, read) / total) if total else 1.0

    async def close(self) -> None:
        await quietly(self._client.stop())


def _has_key(scope: Scope, key: bytes) -> bool:
    """Whether a record with this key (`ingest.wire.raw_key`) can be wanted; what has another key is looked into."""
    try:
        return scope.has(Target.parse(key.decode().rpartition("/")[0]))
    except ValueError:
        return True


async def kept_since_ms(kafka: Kafka | str, topic: str, partitions: int) -> int:
    """Everything that was written to a topic since then is still there, on Kafka's clock; 0 where nothing was ever deleted.

    Raises Transient.
    """
    client = AIOKafkaConsumer(
        **client_options(kafka), client_id="headgate-backfill", enable_auto_commit=False
    )
    asked = [TopicPartition(topic, p) for p in range(partitions)]
    try:
        await client.start()
        first = await client.beginning_offsets(asked)
        end = await client.end_offsets(asked)
        cut = [tp for tp in asked if first[tp]]
        oldest = await client.offsets_for_times(dict.fromkeys(cut, 0)) if cut else {}
    except (KafkaError, OSError) as error:
        raise Transient(f"topic {topic}", f"{type(error).__name__} {error}") from error
    finally:
        await quietly(client.stop())
    # A partition that retention has emptied says nothing of when that was.
    never = 1 << 62
    return max((o.timestamp if (o := oldest[tp]) and first[tp] < end[tp] else never for tp in cut), default=0)
