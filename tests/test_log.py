"""The log: one contract for the fake and a real Kafka; and what only a real one can do wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.structs import TopicPartition

from ingest.clock import SystemClock
from ingest.errors import Fatal, Transient
from ingest.group import Assigned, Consumer, Revoked
from ingest.log import Outgoing, Producer, commit_start
from tests.fake_log import FakeBroker, FakeConsumer, FakeSender
from tests.log_contract import LogContract, Owner, offsets, running, some
from workers.servers import KafkaServer

SESSION_TIMEOUT_S = 6


class FakeLog:
    def __init__(self) -> None:
        self._broker = FakeBroker()
        self._names = count()
        self.sender = FakeSender(self._broker)

    async def create(self, partitions: int) -> str:
        topic = f"t{next(self._names)}"
        self._broker.create(topic, partitions)
        return topic

    def member(self, topic: str, group: str, *, assigned: Assigned, revoked: Revoked) -> FakeConsumer:
        return FakeConsumer(self._broker, topic, group, assigned=assigned, revoked=revoked)

    async def commit_start(self, topic: str, group: str, partitions: int) -> None:
        for p in range(partitions):
            self._broker.committed.setdefault((group, topic, p), self._broker.bounds(topic, p)[0])

    async def delete_before(self, topic: str, partition: int, offset: int) -> None:
        self._broker.delete_before(topic, partition, offset)


class RealLog:
    """Topics begin with `prefix`. Members are dynamic unless they are given a name."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        self.bootstrap = bootstrap
        self.sender = Producer(bootstrap, "test", deadline_s=15)
        self._names = (f"{prefix}.{i}" for i in count())
        self._admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)

    async def __aenter__(self) -> RealLog:
        await self._admin.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sender.close()
        await self._admin.close()

    async def create(self, partitions: int, **configs: str) -> str:
        topic = next(self._names)
        answer = await self._admin.create_topics([NewTopic(topic, partitions, 1, topic_configs=configs)])
        assert answer.topic_errors[0][1] == 0, answer
        return topic

    def member(
        self,
        topic: str,
        group: str,
        *,
        assigned: Assigned,
        revoked: Revoked,
        instance_id: str | None = None,
        stall_s: float = 60,
    ) -> Consumer:
        return Consumer(
            self.bootstrap,
            topic,
            group,
            client_id="test",
            clock=SystemClock(),
            assigned=assigned,
            revoked=revoked,
            instance_id=instance_id,
            session_timeout_s=SESSION_TIMEOUT_S,
            stall_s=stall_s,
        )

    async def commit_start(self, topic: str, group: str, partitions: int) -> None:
        await commit_start(self.bootstrap, topic, group, partitions)

    async def delete_before(self, topic: str, partition: int, offset: int) -> None:
        await self._admin.delete_records({TopicPartition(topic, partition): RecordsToDelete(offset)})


class TestFakeLog(LogContract):
    @pytest.fixture
    def log(self) -> FakeLog:
        return FakeLog()


class TestKafka(LogContract):
    @pytest.fixture
    async def log(self, kafka_bootstrap: str, topic_prefix: str) -> AsyncIterator[RealLog]:
        async with RealLog(kafka_bootstrap, topic_prefix) as log:
            yield log


@pytest.fixture
async def kafka(kafka_bootstrap: str, topic_prefix: str) -> AsyncIterator[RealLog]:
    async with RealLog(kafka_bootstrap, topic_prefix) as log:
        yield log


class StaticOwner(Owner):
    """An owner whose member has a name that it keeps over restarts."""

    def __init__(self, kafka: RealLog, topic: str, name: str) -> None:
        super().__init__(kafka, topic)
        self.member = kafka.member(
            topic, f"{topic}.g", assigned=self._assigned, revoked=self._revoked, instance_id=name
        )


async def test_a_static_member_that_restarts_keeps_its_own_and_disturbs_nobody(kafka: RealLog) -> None:
    topic = await kafka.create(2)
    one, two = StaticOwner(kafka, topic, "one"), StaticOwner(kafka, topic, "two")
    async with running(one):
        async with running(two):
            async with asyncio.timeout(20):
                while len(one.member.assignment()) != 1 or len(two.member.assignment()) != 1:
                    await asyncio.gather(one.member.poll(1, 0.05), two.member.poll(1, 0.05))
            had, before = two.member.assignment(), list(one.events)
        again = StaticOwner(kafka, topic, "two")
        async with running(again):
            await again.owns(*had)
            await one.member.poll(1, 0.2)
            assert one.events == before


async def test_a_group_that_never_committed_is_opened_however_long_its_owner_takes(kafka: RealLog) -> None:
    # Meanwhile aiokafka complains that it knows no offset: that must stop nobody.
    topic = await kafka.create(1)
    await kafka.sender.send(topic, some(3, 0))
    owner = Owner(kafka, topic, starts={0: 1})
    assigned = owner._assigned

    async def slowly(partitions):  # type: ignore[no-untyped-def]
        await asyncio.sleep(1)
        return await assigned(partitions)

    owner.member = kafka.member(topic, f"{topic}.g", assigned=slowly, revoked=owner._revoked)
    async with running(owner):
        assert offsets(await owner.polled(2)) == [1, 2]


async def test_a_member_that_stands_still_drains_leaves_and_joins_anew(kafka: RealLog) -> None:
    topic = await kafka.create(1)
    owner = Owner(kafka, topic)
    member = kafka.member(topic, f"{topic}.g", assigned=owner._assigned, revoked=owner._revoked, stall_s=0.2)
    owner.member = member
    async with running(owner):
        await kafka.sender.send(topic, some(1, 0))
        await owner.polled(1)
        # As aiokafka's fetcher does when it is stuck: the mark is known, and nothing comes.
        client = member._require()
        member._next[0] = 0
        with pytest.raises(Transient, match=r"stood still for 0\.2 s"):
            await owner.polled(1)
        assert owner.events == [("assigned", [0]), ("revoked", [0])]
        assert offsets(await owner.polled(1)) == [0]
        assert member._require() is not client


async def test_time_in_which_nobody_polls_is_no_standing_still(kafka: RealLog) -> None:
    topic = await kafka.create(1)
    owner = Owner(kafka, topic)
    owner.member = kafka.member(
        topic, f"{topic}.g", assigned=owner._assigned, revoked=owner._revoked, stall_s=0.3
    )
    async with running(owner):
        await owner.owns(0)
        await asyncio.sleep(0.5)
        await kafka.sender.send(topic, some(1, 0))
        assert len(await owner.polled(1)) == 1


async def test_a_broker_that_takes_smaller_values_than_ours_is_fatal_with_the_remedy(kafka: RealLog) -> None:
    topic = await kafka.create(1, **{"max.message.bytes": "2000"})
    with pytest.raises(Fatal, match=r"max\.message\.bytes"):
        await kafka.sender.send(topic, [Outgoing(b"k", bytes(3000), 0)])
    assert await kafka.sender.send(topic, [Outgoing(b"k", b"v", 0)])


# --- a broker that goes away ----------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[str]:
    """host:port where a connection is refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


async def test_an_unreachable_broker_is_transient_within_the_deadline(nobody: str) -> None:
    producer = Producer(nobody, "test", deadline_s=1)
    started_s = time.monotonic()
    with pytest.raises(Transient, match=rf"topic t on {nobody}"):
        await producer.send("t", some(1))
    assert time.monotonic() - started_s < 3
    await producer.close()


async def test_joining_without_a_broker_is_transient(nobody: str) -> None:
    member = Consumer(nobody, "t", "g", client_id="test", clock=SystemClock(), assigned=_none, revoked=_none)
    with pytest.raises(Transient, match="cannot join group g"):
        await member.start()
    with pytest.raises(Transient, match="not started"):
        await member.poll(1, 0.1)


async def _none(_: object) -> dict[int, int]:
    return {}


async def test_after_a_broker_that_hung_the_same_producer_and_consumer_go_on(tmp_path: Path) -> None:
    server = KafkaServer(tmp_path)
    try:
        server.prepare()
    except Fatal as error:
        pytest.skip(str(error))
    server.launch()
    try:
        server.wait_ready()
        pid = server.pid
        assert pid is not None
        async with RealLog(server.bootstrap, "t") as kafka:
            topic = await kafka.create(1)
            producer = Producer(server.bootstrap, "test", deadline_s=1.5)
            async with running(Owner(kafka, topic)) as owner:
                await producer.send(topic, [Outgoing(b"k", b"before", 0)])
                assert len(await owner.polled(1)) == 1
                assert isinstance(owner.member, Consumer)
                assert not owner.member.in_doubt
                os.killpg(pid, signal.SIGSTOP)
                started_s = time.monotonic()
                with pytest.raises(Transient, match=r"not acknowledged in 1\.5 s"):
                    await producer.send(topic, [Outgoing(b"k", b"meanwhile", 0)])
                assert time.monotonic() - started_s < 3
                while not owner.member.in_doubt:  # nothing tells it but that nobody answers
                    assert time.monotonic() - started_s < SESSION_TIMEOUT_S
                    await asyncio.sleep(0.1)
                os.killpg(pid, signal.SIGCONT)
                await producer.send(topic, [Outgoing(b"k", b"after", 0)])
                values: list[bytes] = []
                async with asyncio.timeout(30):
                    while b"after" not in values:
                        try:
                            values += [r.value for r in await owner.member.poll(10, 0.1)]
                        except Transient:
                            await asyncio.sleep(0.1)
                assert not owner.member.in_doubt
                # What was not acknowledged may be there all the same, and then it is there whole.
                assert set(values) <= {b"meanwhile", b"after"}
            await producer.close()
            assert producer._dropped == set()
    finally:
        server.stop()
