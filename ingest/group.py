"""Kafka: members of consumer groups that know where they stand.

Guarantees:

* A position is never guessed: `auto_offset_reset` is `none`, whoever is assigned partitions says where each starts, and a position
  outside the log is Fatal.
* Nothing is handed out before an assignment is opened, nor once it is being revoked.
* A member that stands still below the high-water mark, or fails for as long, is rebuilt by its watchdog (aiokafka #847, #974, #1039); one whose
  client has lost a part of itself, which hears of no mark any more, at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import CommitFailedError, KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError

from ingest.brokers import NOT_THERE, SEE_TO_IT, client_options, remedy_of
from ingest.clock import Clock
from ingest.errors import Fatal, HeadgateError, Transient
from ingest.log import quietly
from ingest.model import RecordPosition
from ingest.ports import Record
from shard_config.model import Kafka

_log = structlog.get_logger()

METADATA_MAX_AGE_S = 30
"""A topic that was created again under its members is noticed within this (aiokafka's default is five minutes, in which
they own nothing and say nothing)."""

Committable = int | tuple[int, str]
"""A next offset, or one with a note of up to 4,096 bytes beside it."""

Revoked = Callable[[Sequence[int]], Awaitable[None]]
Assigned = Callable[[Sequence[int]], Awaitable[Mapping[int, int]]]


class Consumer:
    """One member of one consumer group on one topic.

    `assigned` is awaited with the partitions of each new assignment and returns where each starts (partition → next offset).
    `revoked` is awaited before all of them go (rebalancing is eager): drain there, within `drain_s`. With `instance_id` the
    member is static: a restart within the session timeout keeps its partitions. `assignor` decides, where this member leads the group, who
    gets what; None: round robin. Where a position is outside the log, `skipped` is told the partition and how many records are lost, and reading goes on
    at the log's first; None: that is Fatal.
    """

    def __init__(
        self,
        kafka: Kafka | str,
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
        assignor: AbstractPartitionAssignor | None = None,
        skipped: Callable[[int, int], None] | None = None,
    ) -> None:
        self.topic = topic
        self.group = group
        self._clock = clock
        self._stall_s = stall_s
        self._revoked = revoked
        self._assigned = assigned
        self._skipped = skipped
        self._progress_s = self._polled_s = clock.monotonic_s()
        self._failing = False
        self._unopened: list[int] = []
        """Partitions that were assigned and whose start is not known yet."""
        self._next: dict[int, int] = {}
        """Partition → next offset to hand out, for the partitions that are open."""
        self._opening = asyncio.Lock()
        self._heard_s = clock.monotonic_s()
        self._silence_s_max = session_timeout_s / 2
        self._options: dict[str, Any] = {
            **client_options(kafka),
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
            # Little enough that one fetch brings something of every partition: a backlog is then read in step.
            "max_partition_fetch_bytes": 1024 * 1024,
            "fetch_max_wait_ms": 100,
            "metadata_max_age_ms": METADATA_MAX_AGE_S * 1000,
            # Exactly one: a group whose members know different ones does not agree.
            "partition_assignment_strategy": (assignor or RoundRobinPartitionAssignor,),
        }
        self._client: AIOKafkaConsumer | None = None
        self._started = False

    async def start(self) -> None:
        """Join the group. Raises Transient where no broker answers, and where there is no such topic or we may not read it."""
        client = AIOKafkaConsumer(**self._options)
        try:
            await client.start()
            # aiokafka would wait for ever in a group without partitions. All topics are asked for: see `ingest.scan`.
            if not (await client._client.fetch_all_metadata()).partitions_for_topic(self.topic):
                raise Transient(f"topic {self.topic}", NOT_THERE, SEE_TO_IT)
            client.subscribe([self.topic], listener=_Listener(self))
        except (KafkaError, OSError) as error:
            await _close_consumer(client)
            what = f"cannot join group {self.group}: {error}"
            raise Transient(f"topic {self.topic}", what, remedy_of(error)) from error
        except BaseException:
            await _close_consumer(client)
            raise
        self._client = client
        self._started = True
        self._listen(client)
        self._progress_s = self._polled_s = self._heard_s = self._clock.monotonic_s()

    async def stop(self) -> None:
        """Leave (a dynamic member) or just go (a static one), bounded. `revoked` is not called: who stops has drained."""
        self._started = False
        await self._leave()

    async def _leave(self) -> None:
        client, self._client = self._client, None
        self._forget()
        if client is not None:
            await _close_consumer(client)

    def _forget(self) -> None:
        self._unopened = []
        self._next.clear()

    async def poll(self, records_max: int, timeout_s: float) -> list[Record]:
        """Up to that many records; empty after `timeout_s` without one, or a second later in the middle of a rebalance.

        With `records_max` 0 nothing is read and nothing is fetched, and the member stays one. Raises Fatal for a position outside the log, Transient after a stall (the client was left; the next poll joins anew), and what
        `assigned` raises.
        """
        # Time in which nobody polled is not time in which nothing came. After a failure it is: whoever polls has waited for us.
        if not self._failing:
            self._progress_s += self._clock.monotonic_s() - self._polled_s
        self._failing = False
        try:
            return await self._poll(records_max, timeout_s)
        finally:
            self._polled_s = self._clock.monotonic_s()

    async def _poll(self, records_max: int, timeout_s: float) -> list[Record]:
        if self._client is None and self._started:
            await self.start()
        client = self._require()
        if (part := _ended(client)) is not None:
            await self._rebuild(client, f"lost its {part}")
        try:
            await self._open()
            if not records_max:
                client.pause(*client.assignment())
            async with asyncio.timeout(timeout_s + 1.0):
                got = await client.getmany(timeout_ms=int(timeout_s * 1000), max_records=records_max or None)
        except TimeoutError:
            return []  # aiokafka waits for a rebalance as long as it takes; nothing is lost by not waiting with it
        except (OffsetOutOfRangeError, NoOffsetForPartitionError) as error:
            await self._check_positions(error)
            return []
        except KafkaError as error:
            self._failing = True
            await self._watch(client, failed=True)
            raise Transient(
                f"group {self.group} on {self.topic}", f"{type(error).__name__} {error}", remedy_of(error)
            ) from error
        finally:
            if not records_max:
                client.resume(*client.paused())
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
        if records or not records_max or self.lag() == 0:
            self._progress_s = self._clock.monotonic_s()
        else:
            await self._watch(client, failed=False)
        return records

    async def _check_positions(self, error: KafkaError) -> None:
        """Raise Fatal where an open partition's position is outside the log, or go to its first.

        Before a partition is opened, aiokafka starts at the group's committed offset, and complains where that has expired or never was; `assigned`
        may know better, so such a complaint counts only where it is true of where we really stand.
        """
        for partition, (first, end) in (await self.bounds(list(self._next))).items():
            here = self._next.get(partition)
            if here is None:
                continue  # it was revoked meanwhile
            if not first <= here <= end and self._skipped is not None:
                self._skipped(partition, max(0, first - here))
                here = self._next[partition] = first
            if not first <= here <= end:
                raise Fatal(
                    f"group {self.group} on {self.topic}/{partition}",
                    f"its position {here} is outside the log's [{first}, {end}]: {error}",
                    "the topic was created again, or its retention passed the position; see `headgate positions`",
                ) from error
            self._require().seek(TopicPartition(self.topic, partition), here)

    async def commit(self, next_offsets: Mapping[int, Committable]) -> None:
        """Commit partition → next offset, with its note. A commit that a rebalance overtook is dropped: its new owner decides."""
        if not next_offsets:
            return
        client = self._require()
        try:
            await client.commit({TopicPartition(self.topic, p): o for p, o in next_offsets.items()})
        except CommitFailedError:
            _log.info("commit_overtaken_by_rebalance", topic=self.topic, group=self.group)
        except KafkaError as error:
            raise Transient(f"group {self.group} on {self.topic}", f"commit: {error}") from error

    @property
    def in_doubt(self) -> bool:
        """Whether the group has not answered for half a session: what we own others may own by now, and we would be the last to hear of it."""
        return self._clock.monotonic_s() - self._heard_s > self._silence_s_max

    def _listen(self, client: AIOKafkaConsumer) -> None:
        """Notice each heartbeat that the group answers. aiokafka keeps that to itself."""
        coordinator = client._coordinator
        if not isinstance(coordinator, GroupCoordinator):
            return
        beat = coordinator._do_heartbeat

        async def heard() -> bool:
            success = bool(await beat())
            if success:
                self._heard_s = self._clock.monotonic_s()
            return success

        coordinator._do_heartbeat = heard

    def assignment(self) -> list[int]:
        """The partitions that this member owns now, and has opened."""
        return sorted(self._next)

    def rejoin(self) -> None:
        """Ask for a rebalance, for what the assignor would decide now. Nothing happens where the client is not there: it joins anyway."""
        # aiokafka has no public way (tests/test_shards.py holds this one against a real broker).
        if self._client is not None and (coordinator := self._client._coordinator) is not None:
            coordinator.request_rejoin()

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

    async def notes(self, partitions: Sequence[int]) -> dict[int, tuple[int, str]]:
        """Partition → the group's committed next offset and the note beside it; one without is left out. Raises Transient."""
        # aiokafka's `committed` leaves the note out, and asks in this way, too.
        coordinator = self._require()._coordinator
        asked = [TopicPartition(self.topic, p) for p in partitions]
        try:
            found = await coordinator.fetch_committed_offsets(asked) if coordinator else {}
        except KafkaError as error:
            raise Transient(f"group {self.group} on {self.topic}", f"committed: {error}") from error
        return {tp.partition: (at.offset, at.metadata) for tp, at in found.items() if at.offset >= 0}

    async def offsets_at(self, partitions: Sequence[int], timestamp_ms: int) -> dict[int, int]:
        """Partition → its first offset with a timestamp of then or later; the log's end where there is none. Raises Transient."""
        client = self._require()
        asked = {TopicPartition(self.topic, p): max(0, timestamp_ms) for p in partitions}
        try:
            found = await client.offsets_for_times(asked)
            ends = await client.end_offsets(list(found))
        except KafkaError as error:
            raise Transient(f"topic {self.topic}", f"offsets at {timestamp_ms}: {error}") from error
        return {tp.partition: ends[tp] if at is None else at.offset for tp, at in found.items()}

    def caught_up(self) -> list[int]:
        """The open partitions of which everything was handed out that there is, as far as this member has heard."""
        if self._client is None:
            return []
        heard = {p: self._client.highwater(TopicPartition(self.topic, p)) for p in self._next}
        return [p for p, high in heard.items() if high is not None and self._next[p] >= high]

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
            self._heard_s = self._clock.monotonic_s()

    def _require(self) -> AIOKafkaConsumer:
        if self._client is None:
            raise Transient(f"group {self.group} on {self.topic}", "not started")
        return self._client

    async def _watch(self, client: AIOKafkaConsumer, *, failed: bool) -> None:
        """Called where there was no progress; leaves the group where that has lasted too long, and raises Transient."""
        if self._clock.monotonic_s() - self._progress_s <= self._stall_s or self._client is not client:
            return
        await self._rebuild(client, f"{'failed' if failed else 'stood still'} for {self._stall_s:g} s")

    async def _rebuild(self, client: AIOKafkaConsumer, what: str) -> None:
        """Drain, and leave the group: the next poll joins anew. Raises Transient."""
        _log.warning(
            "consumer_left_and_rebuilt", topic=self.topic, group=self.group, what=what, lag=self.lag()
        )
        partitions = self.assignment()
        self._forget()
        try:
            await self._revoked(partitions)
        finally:
            await self._leave()
        raise Transient(f"group {self.group} on {self.topic}", what)


def _ended(client: AIOKafkaConsumer) -> str | None:
    """Which of its own tasks has come to an end, for good. aiokafka starts none of them again, and tells of some only."""
    coordinator = client._coordinator
    tasks = {"fetcher": client._fetcher and client._fetcher.error_future}
    if isinstance(coordinator, GroupCoordinator):
        tasks["coordination"] = coordinator._coordination_task
    return next((part for part, task in tasks.items() if task is not None and task.done()), None)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Hands a rebalance on. An assignment that could not be opened is tried again by the next poll, which raises its error."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        # First, so that nothing is handed out any more while the owner drains.
        self._consumer._forget()
        await self._consumer._revoked(sorted(tp.partition for tp in revoked))

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        consumer = self._consumer
        consumer._unopened = sorted(tp.partition for tp in assigned)
        try:
            await consumer._open()
        except HeadgateError as error:
            _log.warning("assignment_not_opened", topic=consumer.topic, error=str(error))


async def _close_consumer(client: AIOKafkaConsumer) -> None:
    if not await quietly(client.stop()):
        if (fetcher := client._fetcher) is not None:
            await quietly(fetcher.close())
        await quietly(client._client.close())
