"""Exporters that come and go while 500 targets are collected, in one process: a real Kafka with real groups, the real coordinator and exporters, a
source that answers at once, and the archive's fake.

What is killed neither drains nor commits nor leaves its group; what is removed drains first, and leaves at once, as `headgate scale` has it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from ingest import wire
from ingest.assign import Assignment
from ingest.clock import SystemClock
from ingest.collect import Collector, Topics
from ingest.group import Consumer
from ingest.ledger import PlannersMemory
from ingest.log import Producer, commit_start
from ingest.membership import ShardAssignor, remove_members
from ingest.model import (
    Batch,
    LookStatus,
    Outcome,
    Receipt,
    Series,
    SeriesIds,
    SeriesKey,
    Target,
    Task,
    TaskItem,
    series_ids,
)
from shard_config.model import Account, Config, Kafka, ServiceProfile
from tests.conftest import eventually
from tests.fakes import FakeArchive
from workers.coordinator import Coordinator
from workers.exporter import DRAIN_S, Exporter
from workers.lifecycle import Lifecycle
from workers.names import exporter_group
from workers.shards import Board, Publisher, follow, take_name

TARGETS, SLOTS, POLL_S, SESSION_S = 500, 64, 5, 6
NOTHING = PlannersMemory({}, {}, {}, frozenset(), ())


class PaidSource:
    """A shard's: answers each look at once with a point, and counts what it was asked in `paid`, by task id, which all shards share."""

    def __init__(self, clock: SystemClock, paid: Counter[str]) -> None:
        self.paid = paid
        self.dead = False
        """Its process was killed: it asks no more. (Here, what was waiting for its turn may get it before it is cancelled.)"""
        self._clock = clock
        self._ids: dict[Target, tuple[tuple[Series, ...], SeriesIds]] = {}

    async def look(
        self, task_id: str, target: Target, item: TaskItem, deadline_s: float
    ) -> AsyncIterator[Batch | Outcome]:
        if self.dead:
            await asyncio.Event().wait()
        self.paid[task_id] += 1
        await asyncio.sleep(0.05)
        if target not in self._ids:
            key = SeriesKey(target.account, target.region, "AWS/EC2", "CPUUtilization", (), "Average", POLL_S)
            self._ids[target] = ((Series(key),), series_ids((Series(key),)))
        series, ids = self._ids[target]
        observed_at_ms = self._clock.now_ms()
        times = np.array([item.start_s], np.int64)
        one = np.array([1], np.int32)
        yield Batch(
            task_id, target, item.service, observed_at_ms, 0, item.grid_s, series, one, times, np.array([1.0]), ids
        )  # fmt: skip
        yield Outcome(LookStatus.COMPLETE, "", observed_at_ms, 1, {"GetMetricData": 1}, 1)


@dataclass(frozen=True, slots=True)
class Change:
    """What one change of the fleet took. `least` is the fewest slots that could have moved for shards this even."""

    before: int
    after: int
    seconds: float
    moved: int
    least: int
    in_flight_at_kill: int
    start_ms: int
    end_ms: int


@dataclass(slots=True)
class Shard:
    """One exporter, wired as `workers.exporter.serve` does it."""

    exporter: Exporter
    source: PaidSource
    board: Board
    producer: Producer
    lifecycle: Lifecycle
    running: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        return len(self.exporter._begun)

    async def close(self) -> None:
        if self.running is not None:
            await asyncio.wait({self.running})
        await asyncio.gather(self.exporter.consumer.stop(), self.board.close(), self.producer.close())


@dataclass(slots=True)
class Scene:
    config: Config
    admin: AIOKafkaAdminClient
    clock: SystemClock
    paid: Counter[str]
    archive: FakeArchive
    producer: Producer
    board: Board
    coordinator: Coordinator
    publisher: Publisher
    shards: dict[str, Shard] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    async def scale(self, count: int, *, kill: bool = False) -> Change:
        """Have so many exporters; returns when they own all slots as published."""
        start_ms, start_s = self.clock.now_ms(), self.clock.monotonic_s()
        current = self.board.assignment
        before = dict(enumerate(current.owners)) if current else {}
        wanted = [f"exporter-{i}" for i in range(1, count + 1)]
        going = [name for name in self.shards if name not in wanted]
        in_flight = await self._end(going, kill)
        was = len(self.shards) + len(going)
        await asyncio.gather(*(self._add(name) for name in wanted if name not in self.shards))
        await eventually(self._settled, timeout_s=40)
        after = dict(enumerate(self._published().owners))
        change = Change(
            was,
            count,
            self.clock.monotonic_s() - start_s,
            sum(before[slot] != after[slot] for slot in before),
            least_moves(list(before.values()), wanted),
            in_flight,
            start_ms,
            self.clock.now_ms(),
        )
        self.changes.append(change)
        return change

    async def is_busy(self) -> None:
        """Until every other shard has something in flight: work comes in bursts, with the grid."""

        async def busy() -> bool:
            return sum(shard.in_flight > 0 for shard in self.shards.values()) >= len(self.shards) / 2

        await eventually(busy, timeout_s=4 * POLL_S)

    def _published(self) -> Assignment:
        assert self.board.assignment is not None
        return self.board.assignment

    async def _settled(self) -> bool:
        page = self.publisher.page()
        return bool(page["settled"]) and {s["shard"] for s in page["shards"] if s["alive"]} == set(
            self.shards
        )

    async def _end(self, names: Sequence[str], kill: bool) -> int:
        gone = [self.shards.pop(name) for name in names]
        in_flight = sum(shard.in_flight for shard in gone) if kill else 0
        for shard in gone:
            assert shard.running is not None
            if kill:
                shard.source.dead = True
                shard.running.cancel()
            else:
                shard.lifecycle.stop.set()
        await asyncio.gather(*(shard.close() for shard in gone))
        if gone and not kill:
            await remove_members(self.admin, exporter_group(self.config.kafka), names)
        return in_flight

    async def _add(self, name: str) -> None:
        kafka, clock = self.config.kafka, self.clock
        producer, board, lifecycle = Producer(kafka.bootstrap, name), Board(kafka, name), Lifecycle()
        source = PaidSource(clock, self.paid)
        collector = Collector(
            name, {"cloudwatch": source}, self.archive, producer,
            Topics(kafka.topic("raw"), kafka.topic("ledger")), clock,
        )  # fmt: skip
        exporter = Exporter(collector, clock, self.config.tasks_in_flight)
        mine = await take_name(board, producer, name, clock, lifecycle)
        assert mine is not None
        assignor = ShardAssignor(name, lambda: board.assignment)
        exporter.consumer = Consumer(
            kafka.bootstrap, kafka.topic("collect"), exporter_group(kafka), client_id=name, instance_id=name,
            clock=clock, session_timeout_s=SESSION_S, drain_s=2 * DRAIN_S, assigned=exporter.assigned,
            revoked=exporter.revoked, assignor=assignor,
        )  # fmt: skip
        await exporter.consumer.start()

        async def run() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(board.run(lifecycle))
                group.create_task(follow(board, exporter.consumer, assignor, mine, lifecycle))
                group.create_task(exporter.run(lifecycle))

        self.shards[name] = Shard(exporter, source, board, producer, lifecycle, asyncio.create_task(run()))

    async def books(self) -> Books:
        """What the ledger topic says by now."""
        topic = self.config.kafka.topic("ledger")
        reader = AIOKafkaConsumer(bootstrap_servers=self.config.kafka.bootstrap, enable_auto_commit=False)
        await reader.start()
        try:
            partition = TopicPartition(topic, 0)
            reader.assign([partition])
            await reader.seek_to_beginning(partition)
            end = (await reader.end_offsets([partition]))[partition]
            books = Books()
            while await reader.position(partition) < end:
                for record in (await reader.getmany(timeout_ms=500)).get(partition, ()):
                    books.take(wire.decode_ledger(record.value))
            return books
        finally:
            await reader.stop()


@dataclass(slots=True)
class Books:
    """Windows planned, and when those with a complete look were first on the ledger, in ms after their end."""

    planned: dict[tuple[Target, int], int] = field(default_factory=dict)
    collected: dict[tuple[Target, int], int] = field(default_factory=dict)

    def take(self, entry: Task | Receipt) -> None:
        if isinstance(entry, Task):
            self.planned |= {(entry.target, w.end_s): 0 for item in entry.items for w in item.windows()}
            return
        for item in entry.items:
            if item.outcome.status is LookStatus.COMPLETE:
                for window in item.item.windows():
                    late_ms = entry.finished_at_ms - window.end_s * 1000
                    self.collected.setdefault((entry.target, window.end_s), late_ms)

    def open(self, before_s: int) -> list[tuple[Target, int]]:
        """Windows planned that ended before a time and that nobody has collected."""
        return [w for w in self.planned if w not in self.collected and w[1] < before_s]

    def freshness_s(self, from_ms: int, to_ms: int) -> list[float]:
        """Of windows that ended in between, sorted."""
        ended = (late for (_, end_s), late in self.collected.items() if from_ms <= end_s * 1000 < to_ms)
        return sorted(late / 1000 for late in ended)


def least_moves(owners: Sequence[str], shards: Sequence[str]) -> int:
    """Of slots of one weight: the fewest that have to move for shards that differ by one slot at most."""
    held = sorted((owners.count(shard) for shard in shards), reverse=True)
    quotas = [len(owners) // len(shards) + (i < len(owners) % len(shards)) for i in range(len(shards))]
    return len(owners) - sum(map(min, held, quotas))


def quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def config_of(bootstrap: str, prefix: str) -> Config:
    accounts = (
        Account(id=f"{i:012}", regions=("eu-west-1",), services=("ec2",)) for i in range(1, TARGETS + 1)
    )
    profile = ServiceProfile(
        service="ec2", namespace="AWS/EC2", period_s=POLL_S, poll_interval_s=POLL_S, settling_s=0
    )
    return Config(
        accounts=tuple(accounts),
        services=(profile,),
        kafka=Kafka(bootstrap=bootstrap, prefix=prefix, session_timeout_s=SESSION_S),
        slots=SLOTS,
        tasks_in_flight=16,
        startup_lookback_s=0,
    )


@asynccontextmanager
async def scene(bootstrap: str, prefix: str) -> AsyncIterator[Scene]:
    """Without exporters; the coordinator plans and publishes."""
    config, clock, lifecycle = config_of(bootstrap, prefix), SystemClock(), Lifecycle()
    kafka = config.kafka
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics(
        [
            NewTopic(kafka.topic("collect"), SLOTS, 1),
            NewTopic(kafka.topic("raw"), 1, 1),
            NewTopic(kafka.topic("ledger"), 1, 1),
            NewTopic(kafka.topic("shards"), 1, 1, topic_configs={"cleanup.policy": "compact"}),
        ]
    )
    await commit_start(bootstrap, kafka.topic("collect"), exporter_group(kafka), SLOTS)
    producer, board = Producer(bootstrap, "coordinator"), Board(kafka, "coordinator")
    coordinator = Coordinator(config, producer, clock, NOTHING)
    publisher = Publisher(kafka, producer, board, clock, lambda: coordinator.planned)
    made = Scene(config, admin, clock, Counter(), FakeArchive(), producer, board, coordinator, publisher)
    running = asyncio.gather(coordinator.run(lifecycle), board.run(lifecycle), publisher.run(lifecycle))
    try:
        yield made
    finally:
        lifecycle.stop.set()
        for shard in made.shards.values():
            shard.lifecycle.stop.set()
        await asyncio.gather(running, *(shard.close() for shard in made.shards.values()))
        await board.close()
        await producer.close()
        await admin.close()


@dataclass(frozen=True, slots=True)
class Result:
    changes: tuple[Change, ...]
    windows: int
    lost: int
    paid_twice: int
    in_flight_at_kills: int
    steady_s: tuple[float, ...]
    changing_s: tuple[float, ...]


async def play(bootstrap: str, prefix: str) -> Result:
    """1 → 4 → 2 → 16 → 3, the last by killing thirteen at once; then wait until all that was planned by then is collected."""
    async with scene(bootstrap, prefix) as all_of:
        await all_of.scale(1)
        all_of.changes.clear()
        steady_from_ms = all_of.clock.now_ms()
        await asyncio.sleep(POLL_S)
        steady_to_ms = all_of.clock.now_ms()
        for count in (4, 2, 16):
            await all_of.scale(count)
        await all_of.is_busy()
        await all_of.scale(3, kill=True)
        until_s = all_of.clock.now_s()

        books = Books()

        async def collected() -> bool:
            nonlocal books
            books = await all_of.books()
            return not books.open(until_s)

        with contextlib.suppress(AssertionError):  # the result says how many are lost
            await eventually(collected, timeout_s=20)
        first_ms, last_ms = all_of.changes[0].start_ms, all_of.changes[-1].end_ms
        return Result(
            tuple(all_of.changes),
            len([w for w in books.planned if w[1] < until_s]),
            len(books.open(until_s)),
            sum(count - 1 for count in all_of.paid.values()),
            sum(change.in_flight_at_kill for change in all_of.changes),
            tuple(books.freshness_s(steady_from_ms, steady_to_ms)),
            tuple(books.freshness_s(first_ms, last_ms)),
        )
