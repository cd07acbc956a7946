"""An in-memory Kafka for tests: topics, partitions and groups, a sender and a consumer. Passes tests/log_contract.py as the real one does.

What it leaves out: sessions that time out (a member is there until it stops), static membership, and retention by time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from aiokafka.partitioner import DefaultPartitioner

from ingest.errors import Fatal, Transient
from ingest.group import Assigned, Revoked
from ingest.log import VALUE_BYTES_MAX, Outgoing
from ingest.model import RecordPosition
from ingest.ports import Record

_partition_of: Callable[[bytes, list[int], list[int]], int] = DefaultPartitioner()


class FakeBroker:
    """Topics and what groups committed. While `down`, whoever asks gets a Transient."""

    def __init__(self, **topics: int) -> None:
        """`topics`: name → number of partitions; `create` takes names that are no identifiers."""
        self.down = False
        self.committed: dict[tuple[str, str, int], int] = {}
        self._logs: dict[tuple[str, int], list[Record]] = {}
        self._first: dict[tuple[str, int], int] = {}
        self._members: dict[tuple[str, str], list[FakeConsumer]] = {}
        for name, partitions in topics.items():
            self.create(name, partitions)

    def create(self, topic: str, partitions: int) -> None:
        """Create a topic, or create it again: empty."""
        for p in range(partitions):
            self._logs[topic, p] = []
            self._first[topic, p] = 0

    def partitions(self, topic: str) -> list[int]:
        self.check_up(topic)
        found = sorted(p for name, p in self._logs if name == topic)
        if not found:
            raise Transient(f"topic {topic}", "is not there")
        return found

    def append(self, topic: str, record: Outgoing) -> RecordPosition:
        partitions = self.partitions(topic)
        p = (
            record.partition
            if record.partition is not None
            else _partition_of(record.key, partitions, partitions)
        )
        log = self._logs[topic, p]
        at = RecordPosition(topic, p, self.bounds(topic, p)[1])
        log.append(Record(at, record.key, record.value, 0))
        return at

    def records(self, topic: str, partition: int | None = None) -> list[Record]:
        """What is in a topic, partition by partition."""
        return [
            r
            for (name, p), log in sorted(self._logs.items())
            if name == topic and partition in (None, p)
            for r in log
        ]

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """(First offset that is still there, next one to be written)."""
        first = self._first[topic, partition]
        return first, first + len(self._logs[topic, partition])

    def delete_before(self, topic: str, partition: int, offset: int) -> None:
        """As retention does."""
        first = self._first[topic, partition]
        del self._logs[topic, partition][: offset - first]
        self._first[topic, partition] = offset

    def check_up(self, where: str) -> None:
        if self.down:
            raise Transient(where, "the broker is down", retry_after_s=0.01)

    async def join(self, member: FakeConsumer) -> None:
        self.check_up(member.topic)
        await self._rebalance(member, lambda members: members.append(member))

    async def leave(self, member: FakeConsumer) -> None:
        await self._rebalance(member, lambda members: members.remove(member))

    async def _rebalance(self, of: FakeConsumer, change: Callable[[list[FakeConsumer]], None]) -> None:
        members = self._members.setdefault((of.group, of.topic), [])
        for member in list(members):
            if member.partitions:
                await member.let_go()
        change(members)
        partitions = self.partitions(of.topic) if members else []
        for i, member in enumerate(members):
            member.partitions = partitions[i :: len(members)]
            member.unopened = list(member.partitions)


class FakeSender:
    """`ingest.log.Sender`. `failures` are raised, one a call, before anything is written; `sent` are the calls that got through."""

    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.failures: list[Exception | None] = []
        self.sent: list[tuple[str, tuple[Outgoing, ...]]] = []

    async def send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]:
        for record in records:
            if len(record.value) > VALUE_BYTES_MAX:
                raise Fatal(
                    f"topic {topic}", f"a value of {len(record.value)} bytes is above {VALUE_BYTES_MAX}"
                )
        # Whoever calls must be ready to be interrupted here, as by a real one.
        await asyncio.sleep(0)
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        positions = [self.broker.append(topic, record) for record in records]
        self.sent.append((topic, tuple(records)))
        return positions


class FakeConsumer:
    """`ingest.log.Consumer` on a FakeBroker. `failures` are raised by polls, one each."""

    def __init__(
        self, broker: FakeBroker, topic: str, group: str, *, assigned: Assigned, revoked: Revoked
    ) -> None:
        self.topic = topic
        self.group = group
        self.partitions: list[int] = []
        self.unopened: list[int] = []
        self.in_doubt = False
        self.failures: list[Exception] = []
        self._broker = broker
        self._assigned = assigned
        self._revoked = revoked
        self._next: dict[int, int] = {}
        self._started = False

    async def start(self) -> None:
        await self._broker.join(self)
        self._started = True

    async def stop(self) -> None:
        if self._started:
            self._started = False
            self._next = {}
            self.partitions = []
            await self._broker.leave(self)

    async def let_go(self) -> None:
        """What a rebalance asks first."""
        partitions, self._next, self.unopened = self.partitions, {}, []
        await self._revoked(partitions)
        self.partitions = []

    async def poll(self, records_max: int, timeout_s: float) -> list[Record]:
        await asyncio.sleep(0)
        self._broker.check_up(self.topic)
        if self.failures:
            raise self.failures.pop(0)
        if self.unopened:
            self._next.update(await self._assigned(self.unopened))
            self.unopened = []
        records: list[Record] = []
        for p, offset in self._next.items():
            first, end = self._broker.bounds(self.topic, p)
            if not first <= offset <= end:
                raise Fatal(f"group {self.group} on {self.topic}/{p}", "its position is outside the log")
            log = self._broker.records(self.topic, p)[offset - first :][: records_max - len(records)]
            self._next[p] += len(log)
            records += log
        if not records:
            await asyncio.sleep(min(timeout_s, 0.01))
        return records

    async def commit(self, next_offsets: Mapping[int, int]) -> None:
        await asyncio.sleep(0)
        self._broker.check_up(self.topic)
        for p, offset in next_offsets.items():
            self._broker.committed[self.group, self.topic, p] = offset

    async def committed(self, partitions: Sequence[int]) -> dict[int, int]:
        await asyncio.sleep(0)
        self._broker.check_up(self.topic)
        found = {p: self._broker.committed.get((self.group, self.topic, p)) for p in partitions}
        missing = [p for p, offset in found.items() if offset is None]
        if missing:
            raise Fatal(f"group {self.group} on {self.topic}/{missing[0]}", "has no committed offset")
        return {p: offset for p, offset in found.items() if offset is not None}

    async def bounds(self, partitions: Sequence[int]) -> dict[int, tuple[int, int]]:
        await asyncio.sleep(0)
        self._broker.check_up(self.topic)
        return {p: self._broker.bounds(self.topic, p) for p in partitions}

    def assignment(self) -> list[int]:
        return sorted(self._next)

    def lag(self) -> int:
        return sum(max(0, self._broker.bounds(self.topic, p)[1] - n) for p, n in self._next.items())
