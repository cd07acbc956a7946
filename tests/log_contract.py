"""What a log promises: the fake and a real Kafka pass the same suite (tests/test_log.py parametrizes it)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import pytest

from ingest.errors import Fatal, Transient
from ingest.group import Assigned, Revoked
from ingest.log import VALUE_BYTES_MAX, Outgoing, Sender
from ingest.model import RecordPosition
from ingest.ports import Record


class Member(Protocol):
    """`ingest.group.Consumer`, or the fake."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def poll(self, records_max: int, timeout_s: float) -> list[Record]: ...
    async def commit(self, next_offsets: Mapping[int, int]) -> None: ...
    async def committed(self, partitions: Sequence[int]) -> dict[int, int]: ...
    async def bounds(self, partitions: Sequence[int]) -> dict[int, tuple[int, int]]: ...
    def assignment(self) -> list[int]: ...
    def lag(self) -> int: ...


class Log(Protocol):
    """What the suite needs of a log to test it."""

    sender: Sender

    async def create(self, partitions: int) -> str:
        """A new topic; returns its name, which is also fit for a group."""
        ...

    def member(self, topic: str, group: str, *, assigned: Assigned, revoked: Revoked) -> Member: ...

    async def commit_start(self, topic: str, group: str, partitions: int) -> None: ...

    async def delete_before(self, topic: str, partition: int, offset: int) -> None: ...


class Owner:
    """What a process does with an assignment: starts at `starts` (0 where there is none), and notes what happened."""

    def __init__(
        self, log: Log, topic: str, group: str = "g", starts: Mapping[int, int] | None = None
    ) -> None:
        self.starts = dict(starts or {})
        self.events: list[tuple[str, list[int]]] = []
        self.failures: list[Exception] = []
        self.member = log.member(topic, f"{topic}.{group}", assigned=self._assigned, revoked=self._revoked)

    async def _assigned(self, partitions: Sequence[int]) -> dict[int, int]:
        if self.failures:
            raise self.failures.pop(0)
        self.events.append(("assigned", list(partitions)))
        return {p: self.starts.get(p, 0) for p in partitions}

    async def _revoked(self, partitions: Sequence[int]) -> None:
        # What a drain does takes a while, and nobody may go on before it has ended.
        await asyncio.sleep(0.05)
        if partitions:
            self.events.append(("revoked", list(partitions)))

    async def polled(self, count: int, records_max: int = 100, timeout_s: float = 20) -> list[Record]:
        """Records until there are that many, up to `records_max` at once."""
        records: list[Record] = []
        async with asyncio.timeout(timeout_s):
            while len(records) < count:
                records += await self.member.poll(records_max, 0.1)
        return records

    async def owns(self, *partitions: int, timeout_s: float = 20) -> None:
        async with asyncio.timeout(timeout_s):
            while self.member.assignment() != list(partitions):
                await self.member.poll(1, 0.05)


@asynccontextmanager
async def running(owner: Owner) -> AsyncIterator[Owner]:
    await owner.member.start()
    try:
        yield owner
    finally:
        await owner.member.stop()


def some(count: int, partition: int | None = None) -> list[Outgoing]:
    return [Outgoing(b"key", f"v{i}".encode(), partition) for i in range(count)]


def offsets(records: Sequence[Record]) -> list[int]:
    return [r.position.offset for r in records]


class LogContract:
    """Tests; a subclass gives the fixture `log`."""

    async def test_records_keep_their_order_within_a_partition(self, log: Log) -> None:
        topic = await log.create(2)
        positions = await log.sender.send(topic, some(450, 1))
        assert positions == [RecordPosition(topic, 1, i) for i in range(450)]
        async with running(Owner(log, topic)) as owner:
            records = await owner.polled(450)
        assert [r.value for r in records] == [r.value for r in some(450)]
        assert [r.position for r in records] == positions
        assert {r.key for r in records} == {b"key"}

    async def test_a_key_decides_the_partition_as_kafkas_own_clients_do(self, log: Log) -> None:
        topic = await log.create(8)
        # murmur2, as Kafka's own UtilsTest has it: a series must keep its partition whoever sends it.
        murmur2 = {b"21": -973932308, b"foobar": -790332482, b"abc": 479470107}
        keys = {key: (h & 0x7FFFFFFF) % 8 for key, h in murmur2.items()}
        sent = await log.sender.send(topic, [Outgoing(key, b"v") for key in keys])
        again = await log.sender.send(topic, [Outgoing(key, b"w") for key in keys])
        assert [p.partition for p in sent] == [p.partition for p in again] == list(keys.values())

    async def test_nothing_to_send_is_sent(self, log: Log) -> None:
        assert await log.sender.send(await log.create(1), []) == []

    async def test_a_value_that_is_too_large_is_fatal_and_nothing_is_sent(self, log: Log) -> None:
        topic = await log.create(1)
        large = [Outgoing(b"k", b"v", 0), Outgoing(b"k", bytes(VALUE_BYTES_MAX + 1), 0)]
        with pytest.raises(Fatal, match="is above 1000000"):
            await log.sender.send(topic, large)
        assert await log.sender.send(topic, [Outgoing(b"k", bytes(VALUE_BYTES_MAX), 0)]) == [
            RecordPosition(topic, 0, 0)
        ]

    async def test_reading_starts_where_assigned_says_whatever_the_group_has_committed(
        self, log: Log
    ) -> None:
        topic = await log.create(2)
        await log.sender.send(topic, some(5, 0) + some(5, 1))
        async with running(Owner(log, topic, starts={0: 3, 1: 4})) as owner:
            records = await owner.polled(3)
        assert sorted((r.position.partition, r.position.offset) for r in records) == [(0, 3), (0, 4), (1, 4)]

    async def test_no_more_records_come_than_asked_for_and_none_is_left_out(self, log: Log) -> None:
        topic = await log.create(1)
        await log.sender.send(topic, some(5, 0))
        async with running(Owner(log, topic)) as owner:
            got = offsets(await owner.polled(1, records_max=2))
            while len(got) < 5:
                batch = await owner.member.poll(2, 0.1)
                assert len(batch) <= 2
                got += offsets(batch)
        assert got == list(range(5))

    async def test_an_assignment_that_cannot_be_opened_is_opened_later_and_no_record_is_lost(
        self, log: Log
    ) -> None:
        topic = await log.create(1)
        await log.sender.send(topic, some(3, 0))
        owner = Owner(log, topic)
        owner.failures = [Transient("store", "away") for _ in range(3)]
        async with running(owner):
            records: list[Record] = []
            refused = 0
            async with asyncio.timeout(20):
                while len(records) < 3:
                    try:
                        records += await owner.member.poll(10, 0.1)
                    except Transient:
                        refused += 1
        assert refused >= 1
        assert offsets(records) == [0, 1, 2]

    async def test_commits_are_the_groups_and_a_start_is_committed_only_where_nothing_is(
        self, log: Log
    ) -> None:
        topic = await log.create(2)
        await log.sender.send(topic, some(3, 0))
        async with running(Owner(log, topic)) as owner:
            await owner.owns(0, 1)
            with pytest.raises(Fatal, match="has no committed offset"):
                await owner.member.committed([0, 1])
            await owner.member.commit({0: 2})
        await log.commit_start(topic, f"{topic}.g", 2)
        async with running(Owner(log, topic)) as owner:
            assert await owner.member.committed([0, 1]) == {0: 2, 1: 0}

    async def test_bounds_and_lag_are_those_of_the_log(self, log: Log) -> None:
        topic = await log.create(2)
        await log.sender.send(topic, some(5, 0))
        await log.delete_before(topic, 0, 2)
        async with running(Owner(log, topic, starts={0: 2})) as owner:
            assert offsets(await owner.polled(1, records_max=1)) == [2]
            assert await owner.member.bounds([0, 1]) == {0: (2, 5), 1: (0, 0)}
            assert owner.member.lag() == 2
            await owner.polled(2)
            assert owner.member.lag() == 0

    @pytest.mark.parametrize("start", [1, 9], ids=["before", "beyond"])
    async def test_a_position_outside_the_log_is_fatal(self, log: Log, start: int) -> None:
        topic = await log.create(1)
        await log.sender.send(topic, some(5, 0))
        await log.delete_before(topic, 0, 3)
        async with running(Owner(log, topic, starts={0: start})) as owner:
            with pytest.raises(Fatal, match=r"position.* is outside the log"):
                await owner.polled(1)

    async def test_members_share_the_partitions_and_revoked_is_awaited_before_they_move(
        self, log: Log
    ) -> None:
        topic = await log.create(2)
        one, two = Owner(log, topic), Owner(log, topic)
        async with running(one):
            await one.owns(0, 1)
            async with running(two):
                async with asyncio.timeout(20):
                    while len(one.member.assignment()) != 1 or len(two.member.assignment()) != 1:
                        await asyncio.gather(one.member.poll(1, 0.05), two.member.poll(1, 0.05))
                assert one.events[:2] == [("assigned", [0, 1]), ("revoked", [0, 1])]
                assert sorted(one.member.assignment() + two.member.assignment()) == [0, 1]
            await one.owns(0, 1)
