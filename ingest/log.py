"""Kafka: a producer with deadlines, and consumers that know where they stand.

Guarantees:

* `Producer.send` returns when every in-sync replica has the record, or raises Transient within its deadline. It may be there
  all the same: whoever sends again sends the same bytes, and readers converge.
* `Consumer` never guesses a position: `auto_offset_reset` is `none`. A position outside the log is Fatal.
* A consumer that stands still below the high-water mark is rebuilt by its watchdog (aiokafka #847, #974, #1039).

No transactions and no idempotent producer: one non-retriable error bricks the latter (aiokafka #1017), and landing
is a maximum, so duplicates change nothing. See docs/decisions/0004.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

from ingest.clock import Clock
from ingest.errors import Fatal, HeadgateError, Transient
from ingest.model import RecordPosition
from ingest.ports import Record

_log = structlog.get_logger()

VALUE_BYTES_MAX = 1_000_000
"""Kafka's default for a record batch, less the overhead of one."""


IN_FLIGHT_MAX = 200


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be sent; without a partition, its key decides."""

    key: bytes
    value: bytes
    partition: int | None = None


class Sender(Protocol):
    """What publishing needs of the log: `Producer`, or a fake."""

    async def send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]: ...


class Producer:
    """Sends records with a deadline each; after a failure the client is thrown away and built anew."""

    def __init__(self, bootstrap: str, client_id: str, *, deadline_s: float = 30.0) -> None:
        self._bootstrap = bootstrap
        self._client_id = client_id
        self._deadline_s = deadline_s
        self._client: AIOKafkaProducer | None = None
        self._building = asyncio.Lock()

    async def send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]:
        """Send records and wait until all in-sync replicas have all of them; returns where they stand, in order.

        Raises Transient where that is not known of every one (send all again then), Fatal for a value that is too large.
        """
        for record in records:
            if len(record.value) > VALUE_BYTES_MAX:
                raise Fatal(
                    f"topic {topic}", f"a value of {len(record.value)} bytes is above {VALUE_BYTES_MAX}"
                )
        positions: list[RecordPosition] = []
        for at in range(0, len(records), IN_FLIGHT_MAX):
            positions += await self._send(topic, records[at : at + IN_FLIGHT_MAX])
        return positions

    async def _send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]:
        client: AIOKafkaProducer | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                client = await self._ready()
                waiting = [
                    await client.send(topic, value=r.value, key=r.key, partition=r.partition) for r in records
                ]
                sent = await asyncio.gather(*waiting)
        except (KafkaError, TimeoutError, OSError) as error:
            if client is not None:
                await self._drop(client)
            what = f"not acknowledged in {self._deadline_s:g} s: {type(error).__name__} {error}".rstrip()
            raise Transient(f"topic {topic} on {self._bootstrap}", what) from error
        return [RecordPosition(topic, s.partition, s.offset) for s in sent]

    async def _ready(self) -> AIOKafkaProducer:
        async with self._building:
            if self._client is None:
                client = AIOKafkaProducer(
                    bootstrap_servers=self._bootstrap,
                    client_id=self._client_id,
                    acks="all",
                    linger_ms=5,
                    max_batch_size=256 * 1024,
                    max_request_size=VALUE_BYTES_MAX + 4096,
                    request_timeout_ms=int(self._deadline_s * 1000),
                    compression_type=None,  # values come compressed, with a size that is checked before inflating
                )
                try:
                    await client.start()
                except BaseException:
                    await _quietly(client.stop())
                    raise
                self._client = client
            return self._client

    async def _drop(self, client: AIOKafkaProducer) -> None:
        async with self._building:
            first_to_notice = self._client is client
            if first_to_notice:
                self._client = None
        if not first_to_notice:
            return
        await _quietly(client.stop())

    async def close(self) -> None:
        """Send what is buffered and close, bounded."""
        client, self._client = self._client, None
        if client is not None:
            await _quietly(client.stop())


Revoked = Callable[[Sequence[int]], Awaitable[None]]
Assigned = Callable[[Sequence[int]], Awaitable[Mapping[int, int]]]


class Consumer:
    """One member of one consumer group on one topic.

    `assigned` is awaited with the partitions of each new assignment and returns where each starts (partition → next offset).
    `revoked` is awaited before all of them go (rebalancing is eager): drain there, within `drain_s`. With `instance_id` the
    member is static: a restart within the session timeout keeps its partitions.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        group: str,
        *,
        client_id: str,
        clock: Clock,
        assigned: Assigned,
        revoked: Revoked,
        instance_id: str | None = None,
        session_timeout_s: int = 15,
        drain_s: int = 20,
        stall_s: float = 60.0,
    ) -> None:
        self.topic = topic
        self.group = group
        self._clock = clock
        self._stall_s = stall_s
        self._revoked = revoked
        self._assigned = assigned
        self._progress_s = clock.monotonic_s()
        self._unopened: list[int] = []
        """Partitions that were assigned and whose start is not known yet."""
        self._next: dict[int, int] = {}
        """Partition → next offset to hand out, for the partitions that are open."""
        self._opening = asyncio.Lock()
        self._options: dict[str, Any] = {
            "bootstrap_servers": bootstrap,
            "group_id": group,
            "client_id": client_id,
            "group_instance_id": instance_id,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "session_timeout_ms": session_timeout_s * 1000,
            "heartbeat_interval_ms": max(1000, session_timeout_s * 1000 // 5),
            # Defaults to the session timeout, which a drain may outlast.
            "rebalance_timeout_ms": (drain_s + 10) * 1000,
            "max_poll_interval_ms": 600_000,
            "fetch_max_bytes": 16 * 1024 * 1024,
            "max_partition_fetch_bytes": 4 * 1024 * 1024,
            "fetch_max_wait_ms": 100,
            "partition_assignment_strategy": (RoundRobinPartitionAssignor,),
        }
        self._client: AIOKafkaConsumer | None = None

    async def start(self) -> None:
        """Join the group. Raises Transient where no broker answers."""
        client = AIOKafkaConsumer(**self._options)
        try:
            await client.start()
            self._client = client
            client.subscribe([self.topic], listener=_Listener(self))
        except (KafkaError, OSError) as error:
            self._client = None
            await _quietly(client.stop())
            raise Transient(f"topic {self.topic}", f"cannot join group {self.group}: {error}") from error
        self._progress_s = self._clock.monotonic_s()

    async def stop(self) -> None:
        """Leave (a dynamic member) or just go (a static one), bounded."""
        if self._client is not None:
            await _quietly(self._client.stop())
            self._client = None
            self._next.clear()

    async def poll(self, records_max: int, timeout_s: float) -> list[Record]:
        """Up to that many records; empty after `timeout_s` without one.

        Raises Fatal for a position outside the log, Transient after a stall (the client was rebuilt).
        """
        client = self._require()
        await self._open()
        try:
            got = await client.getmany(timeout_ms=int(timeout_s * 1000), max_records=records_max)
        except (OffsetOutOfRangeError, NoOffsetForPartitionError) as error:
            await self._check_positions(error)
            return []
        except KafkaError as error:
            raise Transient(
                f"group {self.group} on {self.topic}", f"{type(error).__name__} {error}"
            ) from error
        records: list[Record] = []
        for tp, batch in got.items():
            # What was fetched before an assignment was opened comes again from where it starts.
            if tp.partition in self._next:
                records += (
                    Record(
                        RecordPosition(r.topic, r.partition, r.offset),
                        r.key or b"",
                        r.value or b"",
                        r.timestamp,
                    )
                    for r in batch
                )
                self._next[tp.partition] = batch[-1].offset + 1
        await self._watch(client, bool(records))
        return records

    async def _check_positions(self, error: KafkaError) -> None:
        """Raise Fatal where an open partition's position is outside the log.

        Before a partition is opened, aiokafka starts at the group's committed offset, and complains where that has expired or never was; `assigned`
        may know better, so such a complaint counts only where it is true of where we really stand.
        """
        for partition, (first, end) in (await self.bounds(list(self._next))).items():
            here = self._next[partition]
            if not first <= here <= end:
                raise Fatal(
                    f"group {self.group} on {self.topic}/{partition}",
                    f"its position {here} is outside the log's [{first}, {end}]: {error}",
                    "the topic was created again, or its retention passed the position; see `headgate status`",
                ) from error
            self._require().seek(TopicPartition(self.topic, partition), here)

    async def commit(self, next_offsets: Mapping[int, int]) -> None:
        """Commit partition → next offset. A commit that a rebalance overtook is dropped: its new owner decides."""
        if not next_offsets:
            return
        client = self._require()
        try:
            await client.commit({TopicPartition(self.topic, p): o for p, o in next_offsets.items()})
        except CommitFailedError:
            _log.info("commit_overtaken_by_rebalance", topic=self.topic, group=self.group)
        except KafkaError as error:
            raise Transient(f"group {self.group} on {self.topic}", f"commit: {error}") from error

    def assignment(self) -> list[int]:
        """The partitions that this member owns now, and has opened."""
        return sorted(self._next)

    async def bounds(self, partitions: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Partition → (first offset that is still there, next offset to be written). Raises Transient."""
        client = self._require()
        asked = [TopicPartition(self.topic, p) for p in partitions]
        try:
            first = await client.beginning_offsets(asked)
            end = await client.end_offsets(asked)
        except KafkaError as error:
            raise Transient(f"topic {self.topic}", f"offsets: {error}") from error
        return {tp.partition: (first[tp], end[tp]) for tp in asked}

    async def committed(self, partitions: Sequence[int]) -> dict[int, int]:
        """Partition → the group's committed next offset. Raises Fatal where there is none, Transient."""
        client = self._require()
        found: dict[int, int] = {}
        try:
            for p in partitions:
                offset = await client.committed(TopicPartition(self.topic, p))
                if offset is None:
                    raise Fatal(
                        f"group {self.group} on {self.topic}/{p}",
                        "has no committed offset, so where to go on is not known",
                        "run `headgate setup` on a new installation; otherwise the group's offsets have expired",
                    )
                found[p] = offset
        except KafkaError as error:
            raise Transient(f"group {self.group} on {self.topic}", f"committed: {error}") from error
        return found

    def lag(self) -> int:
        """Records between where this member stands and the high-water marks that it last heard of."""
        if self._client is None:
            return 0
        heard = ((n, self._client.highwater(TopicPartition(self.topic, p))) for p, n in self._next.items())
        return sum(max(0, high - n) for n, high in heard if high is not None)

    async def _open(self) -> None:
        """Ask where newly assigned partitions start, and go there."""
        async with self._opening:
            if not self._unopened:
                return
            asked = self._unopened
            starts = await self._assigned(asked)
            if self._client is None or self._unopened is not asked:
                return  # they were revoked meanwhile
            for partition, offset in starts.items():
                self._client.seek(TopicPartition(self.topic, partition), offset)
                self._next[partition] = offset
            self._unopened = []

    def _require(self) -> AIOKafkaConsumer:
        if self._client is None:
            raise Transient(f"group {self.group} on {self.topic}", "not started")
        return self._client

    async def _watch(self, client: AIOKafkaConsumer, progressed: bool) -> None:
        now_s = self._clock.monotonic_s()
        if progressed or not client.assignment() or self.lag() == 0:
            self._progress_s = now_s
        elif now_s - self._progress_s > self._stall_s:
            _log.warning("consumer_stalled_and_rebuilt", topic=self.topic, group=self.group, lag=self.lag())
            await self.stop()
            await self.start()
            raise Transient(f"group {self.group} on {self.topic}", f"stood still for {self._stall_s:g} s")


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Hands a rebalance on. An assignment that could not be opened is tried again by the next poll, which raises its error."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        try:
            await self._consumer._revoked(sorted(tp.partition for tp in revoked))
        finally:
            self._consumer._unopened = []
            self._consumer._next.clear()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        consumer = self._consumer
        consumer._unopened = sorted(tp.partition for tp in assigned)
        try:
            await consumer._open()
        except HeadgateError as error:
            _log.warning("assignment_not_opened", topic=consumer.topic, error=str(error))


async def commit_start(bootstrap: str, topic: str, group: str, partitions: int) -> None:
    """Commit the log's start for a group in each partition where it has committed nothing: a virgin install is not a lost offset."""
    client = AIOKafkaConsumer(bootstrap_servers=bootstrap, group_id=group, enable_auto_commit=False)
    await client.start()
    try:
        asked = [TopicPartition(topic, p) for p in range(partitions)]
        client.assign(asked)
        first = await client.beginning_offsets(asked)
        missing = {tp: first[tp] for tp in asked if await client.committed(tp) is None}
        if missing:
            await client.commit(missing)
    finally:
        await _quietly(client.stop())


@contextlib.asynccontextmanager
async def running(consumer: Consumer) -> AsyncIterator[Consumer]:
    """A consumer that is started, and stopped at the end whatever happens."""
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def _quietly(stopping: Awaitable[None], timeout_s: float = 10.0) -> None:
    """Stopping is best effort and bounded: what it was holding is safe without it."""
    try:
        async with asyncio.timeout(timeout_s):
            await stopping
    except (KafkaError, TimeoutError, OSError) as error:
        _log.warning("kafka_client_did_not_stop_cleanly", error=str(error))
