"""A shard: what it commits, what it hands back, and what a successor does with that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from ingest import wire
from ingest.clock import ManualClock
from ingest.collect import Collector, Topics
from ingest.errors import Fatal, Transient
from ingest.log import Outgoing
from ingest.model import LookStatus, Receipt, Target, Task, TaskKind
from shard_config.model import Account, Config, ExpositionJob, ServiceProfile
from tests.conftest import eventually
from tests.fake_log import FakeBroker, FakeConsumer, FakeSender
from tests.fakes import FakeArchive
from tests.test_collect import NOON_S, FakeSource, task_of
from workers import exporter
from workers.exporter import Exporter, knows
from workers.lifecycle import Lifecycle
from workers.members import Members
from workers.reload import Settings

GROUP = "t.exporters"


def targets(count: int) -> list[Task]:
    return [task_of("ec2", target=Target("cloudwatch", f"{i:012}", "eu-west-1")) for i in range(count)]


class SlowSource(FakeSource):
    """Answers a target when its gate is open; all gates are open unless closed."""

    def __init__(self) -> None:
        super().__init__(values=())
        self.gates: dict[str, asyncio.Event] = {}
        self.asked: list[str] = []

    def close_gate(self, task: Task) -> asyncio.Event:
        return self.gates.setdefault(task.target.account, asyncio.Event())

    async def look(self, task_id, target, item, deadline_s):  # type: ignore[no-untyped-def]
        self.asked.append(target.account)
        if gate := self.gates.get(target.account):
            await gate.wait()
        async for answer in super().look(task_id, target, item, deadline_s):
            yield answer


class Cluster:
    """A broker and an archive, and shards on them."""

    def __init__(self, slots: int = 1) -> None:
        self.broker = FakeBroker(collect=slots, raw=1, ledger=1)
        self.archive = FakeArchive()
        self.source = SlowSource()
        self.slots = slots
        for slot in range(slots):
            self.broker.committed[GROUP, "collect", slot] = 0

    def announce(self, *tasks: Task, slot: int = 0) -> None:
        for task in tasks:
            self.broker.append("collect", Outgoing(b"k", wire.encode_task(task), slot))

    def shard(
        self, name: str = "exporter-1", in_flight: int = 4, settings: Settings | None = None
    ) -> tuple[Exporter, FakeSender]:
        sender = FakeSender(self.broker)
        clock = ManualClock(NOON_S)
        collector = Collector(
            name, {"cloudwatch": self.source}, self.archive, sender, Topics("raw", "ledger"), clock
        )
        one = Exporter(collector, clock, in_flight, settings)
        one.consumer = FakeConsumer(  # type: ignore[assignment]
            self.broker, "collect", GROUP, assigned=one.assigned, revoked=one.revoked
        )
        return one, sender

    @asynccontextmanager
    async def running(self, one: Exporter) -> AsyncIterator[Lifecycle]:
        lifecycle = Lifecycle()
        await one.consumer.start()
        running = asyncio.create_task(one.run(lifecycle))
        try:
            yield lifecycle
        finally:
            lifecycle.stop.set()
            try:
                async with asyncio.timeout(10):
                    await running
            finally:
                await one.consumer.stop()

    def committed(self, slot: int = 0) -> int:
        return self.broker.committed[GROUP, "collect", slot]

    def receipts(self) -> list[Receipt]:
        return [wire.decode_receipt(r.value) for r in self.broker.records("ledger")]


def becomes(condition: Callable[[], bool]) -> Awaitable[None]:
    async def so() -> bool:
        return condition()

    return eventually(so, timeout_s=10)


async def test_every_task_gets_a_receipt_and_then_its_offset_is_committed() -> None:
    cluster = Cluster()
    tasks = targets(6)
    cluster.announce(*tasks)
    one, _ = cluster.shard()
    async with cluster.running(one) as lifecycle:
        await becomes(lambda: cluster.committed() == 6)
        assert lifecycle.ready
    assert sorted(r.task_id for r in cluster.receipts()) == sorted(t.task_id for t in tasks)
    assert {i.outcome.status for r in cluster.receipts() for i in r.items} == {LookStatus.COMPLETE}


async def test_the_committed_offset_never_passes_a_task_without_a_receipt() -> None:
    cluster = Cluster()
    tasks = targets(4)
    gate = cluster.source.close_gate(tasks[1])
    cluster.announce(*tasks)
    one, _ = cluster.shard()
    async with cluster.running(one):
        await becomes(lambda: len(cluster.receipts()) == 3 and cluster.committed() == 1)
        gate.set()
        await becomes(lambda: cluster.committed() == 4)


async def test_no_more_tasks_run_at_once_than_allowed() -> None:
    cluster = Cluster()
    tasks = targets(5)
    gates = [cluster.source.close_gate(task) for task in tasks]
    cluster.announce(*tasks)
    one, _ = cluster.shard(in_flight=2)
    async with cluster.running(one):
        await becomes(lambda: len(cluster.source.asked) == 2)
        gates[0].set()
        await becomes(lambda: len(cluster.source.asked) == 3)
        await asyncio.sleep(0.05)
        assert len(cluster.source.asked) == 3
        for gate in gates:
            gate.set()


async def test_a_task_that_expires_does_not_wait_behind_slow_ones() -> None:
    cluster = Cluster()
    slow = targets(3)
    for task in slow:
        cluster.source.close_gate(task)
    soon = task_of("node", target=Target("cloudwatch", "999999999999", "eu-west-1"), expires_s=NOON_S + 15)
    cluster.announce(*slow, soon)
    one, _ = cluster.shard(in_flight=2)
    async with cluster.running(one):
        await becomes(lambda: [r.task_id for r in cluster.receipts()] == [soon.task_id])
        assert cluster.source.asked == [slow[0].target.account, slow[1].target.account, "999999999999"]
        assert cluster.committed() == 0
        for task in slow:
            cluster.source.close_gate(task).set()
        await becomes(lambda: cluster.committed() == 4)


async def test_live_tasks_go_before_a_backlog_that_was_there_first() -> None:
    cluster = Cluster()
    first, *backlog, live = targets(4)
    gate = cluster.source.close_gate(first)
    backlog = [replace(task, kind=TaskKind.BACKLOG) for task in backlog]
    cluster.announce(first, *backlog, replace(live, kind=TaskKind.LIVE))
    one, _ = cluster.shard(in_flight=1)
    async with cluster.running(one):
        await becomes(lambda: len(cluster.source.asked) == 1)
        await asyncio.sleep(0.05)  # all are taken up by now, and wait
        gate.set()
        await becomes(lambda: cluster.committed() == 4)
    in_turn = [task.target.account for task in (first, live, *backlog)]
    assert cluster.source.asked == in_turn


async def test_what_waits_for_its_turn_is_not_begun_while_draining() -> None:
    cluster = Cluster()
    tasks = targets(3)
    gates = [cluster.source.close_gate(task) for task in tasks]
    cluster.announce(*tasks)
    one, _ = cluster.shard(in_flight=1)
    async with cluster.running(one) as lifecycle:
        await becomes(lambda: len(cluster.source.asked) == 1)
        lifecycle.stop.set()
        asyncio.get_running_loop().call_later(0.1, gates[0].set)
    assert cluster.source.asked == [tasks[0].target.account]
    assert cluster.committed() == 1


async def test_what_died_between_archive_and_receipt_is_published_from_the_archive_by_the_next() -> None:
    cluster = Cluster()
    (task,) = targets(1)
    cluster.announce(task)
    first, sender = cluster.shard("exporter-1")
    sender.failures = [RuntimeError("killed here")]
    with pytest.raises(ExceptionGroup) as died:
        async with cluster.running(first):
            await becomes(lambda: not sender.failures)
    assert died.group_contains(RuntimeError, match="killed here")
    assert (cluster.receipts(), cluster.committed(), cluster.archive.puts) == ([], 0, 1)

    second, _ = cluster.shard("exporter-2")
    async with cluster.running(second):
        await becomes(lambda: cluster.committed() == 1)
    assert [r.shard for r in cluster.receipts()] == ["exporter-1"]
    assert cluster.source.asked == ["000000000000"]


async def test_a_process_that_stood_still_asks_the_archive_before_it_pays_for_what_its_successor_did() -> (
    None
):
    cluster = Cluster()
    (task,) = targets(1)
    successor, _ = cluster.shard("exporter-2")
    await successor._collector.publish(await successor._collector.answer(task, maybe_second_try=False))
    assert cluster.source.looks == 1

    zombie, _ = cluster.shard("exporter-1")
    async with cluster.running(zombie) as lifecycle:
        await becomes(lambda: lifecycle.ready)
        clock = zombie._clock
        assert isinstance(clock, ManualClock)
        clock.advance(exporter.STANDSTILL_S + 1)
        cluster.announce(task)  # it had this in hand when it was stopped
        await becomes(lambda: cluster.committed() == 1)
    assert cluster.source.looks == 1
    assert {r.shard for r in cluster.receipts()} == {"exporter-2"}


async def test_a_process_that_its_group_has_not_answered_asks_the_archive_before_it_pays() -> None:
    cluster = Cluster()
    (task,) = targets(1)
    successor, _ = cluster.shard("exporter-2")
    await successor._collector.publish(await successor._collector.answer(task, maybe_second_try=False))

    cut_off, _ = cluster.shard("exporter-1")
    vars(cut_off.consumer)["in_doubt"] = True
    async with cluster.running(cut_off) as lifecycle:
        await becomes(lambda: lifecycle.ready)
        cluster.announce(
            task
        )  # its connection is back, and the group has not told it yet that it is no member
        await becomes(lambda: cluster.committed() == 1)
    assert cluster.source.looks == 1


async def test_a_receipt_that_cannot_be_written_is_written_later_and_nobody_is_asked_again() -> None:
    cluster = Cluster()
    cluster.announce(*targets(1))
    one, sender = cluster.shard()
    # Neither S3 nor Kafka: what was learned is in this process only, and must not be asked for again.
    cluster.archive.failures = [Transient("archive", "away"), Transient("archive", "away")]
    sender.failures = [Transient("topic", "away"), None, Transient("topic", "away")]
    async with cluster.running(one):
        await becomes(lambda: cluster.committed() == 1)
    assert [r.items[0].outcome.status for r in cluster.receipts()] == [LookStatus.FAILED]
    assert cluster.source.looks == 1


async def test_a_task_that_is_announced_twice_is_paid_for_once() -> None:
    cluster = Cluster()
    (task,) = targets(1)
    gate = cluster.source.close_gate(task)
    one, _ = cluster.shard()
    async with cluster.running(one) as lifecycle:
        await becomes(lambda: lifecycle.ready)
        cluster.announce(task, task)
        await becomes(lambda: one.consumer.lag() == 0 and len(cluster.source.asked) == 1)
        gate.set()
        await becomes(lambda: cluster.committed() == 2)
        cluster.announce(task)
        await becomes(lambda: cluster.committed() == 3)
    assert cluster.source.looks == 1
    assert len(cluster.receipts()) == 3
    assert len({wire.encode_receipt(r) for r in cluster.receipts()}) == 1


async def test_draining_waits_for_tasks_that_end_in_time_and_commits_them() -> None:
    cluster = Cluster()
    (task,) = targets(1)
    gate = cluster.source.close_gate(task)
    cluster.announce(task)
    one, _ = cluster.shard()
    async with cluster.running(one) as lifecycle:
        await becomes(lambda: len(cluster.source.asked) == 1)
        lifecycle.stop.set()
        asyncio.get_running_loop().call_later(0.05, gate.set)
    assert (cluster.committed(), len(cluster.receipts())) == (1, 1)


async def test_draining_hands_back_what_does_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "DRAIN_S", 0.05)
    cluster = Cluster()
    tasks = targets(2)
    gate = cluster.source.close_gate(tasks[1])
    cluster.announce(*tasks)
    one, _ = cluster.shard("exporter-1")
    async with cluster.running(one):
        await becomes(lambda: cluster.committed() == 1)
    assert (cluster.committed(), len(cluster.receipts())) == (1, 1)

    gate.set()
    two, _ = cluster.shard("exporter-2")
    async with cluster.running(two):
        await becomes(lambda: cluster.committed() == 2)
    assert [r.shard for r in cluster.receipts()] == ["exporter-1", "exporter-2"]


async def test_slots_that_move_are_executed_by_their_new_owner() -> None:
    cluster = Cluster(slots=2)
    one, _ = cluster.shard("exporter-1")
    two, _ = cluster.shard("exporter-2")
    first, second = targets(2)
    async with cluster.running(one) as lifecycle:
        await becomes(lambda: lifecycle.ready)
        async with cluster.running(two):
            await becomes(lambda: one.consumer.assignment() == [0] and two.consumer.assignment() == [1])
            cluster.announce(first, slot=0)
            cluster.announce(second, slot=1)
            await becomes(lambda: (cluster.committed(0), cluster.committed(1)) == (1, 1))
    assert {r.target: r.shard for r in cluster.receipts()} == {
        first.target: "exporter-1",
        second.target: "exporter-2",
    }


async def test_a_rebalance_in_the_middle_of_a_commit_stops_nobody() -> None:
    cluster = Cluster()
    one, _ = cluster.shard()
    commit = one.consumer.commit
    overtaken: list[int] = []

    async def overtaken_commit(next_offsets: dict[int, int]) -> None:
        await commit(next_offsets)
        if next_offsets and not overtaken:
            overtaken.append(1)
            await one.revoked([0])

    one.consumer.commit = overtaken_commit  # type: ignore[method-assign, assignment]
    async with cluster.running(one) as lifecycle:
        await becomes(lambda: lifecycle.ready)
        cluster.announce(*targets(1))
        await becomes(lambda: cluster.committed() == 1 and not lifecycle.ready)
        await one.assigned([0])
        cluster.announce(*targets(2))
        await becomes(lambda: cluster.committed() == 3)


async def test_a_record_that_is_no_task_is_passed_over() -> None:
    cluster = Cluster()
    cluster.broker.append("collect", Outgoing(b"k", b"garbage", 0))
    cluster.announce(*targets(1))
    one, _ = cluster.shard()
    async with cluster.running(one):
        await becomes(lambda: cluster.committed() == 2)
    assert len(cluster.receipts()) == 1


async def test_tasks_that_expired_unexecuted_are_passed_over_to_the_logs_start() -> None:
    cluster = Cluster()
    cluster.announce(*targets(3))
    cluster.broker.delete_before("collect", 0, 2)
    one, _ = cluster.shard()
    async with cluster.running(one):
        await becomes(lambda: cluster.committed() == 3)
    assert cluster.source.asked == ["000000000002"]


async def test_a_broker_that_is_away_is_waited_for() -> None:
    cluster = Cluster()
    one, _ = cluster.shard()
    async with cluster.running(one) as lifecycle:
        await becomes(lambda: lifecycle.ready)
        cluster.broker.down = True
        await asyncio.sleep(0.05)
        cluster.broker.down = False
        cluster.announce(*targets(1))
        await becomes(lambda: cluster.committed() == 1)


async def test_a_position_outside_the_log_stops_the_shard() -> None:
    cluster = Cluster()
    cluster.broker.committed[GROUP, "collect", 0] = 7
    one, _ = cluster.shard()
    await one.consumer.start()
    async with asyncio.timeout(10):
        with pytest.raises(ExceptionGroup) as stopped:
            await one.run(Lifecycle())
    assert stopped.group_contains(Fatal, match="outside the log")
    await one.consumer.stop()


# --- what a task names and the configuration does not yet ----------------------------------------------------


def config_of(*tasks: Task, jobs: tuple[str, ...] = (), **settings: int) -> Config:
    return Config(
        accounts=tuple(
            Account(id=t.target.account, regions=("eu-west-1",), services=("ec2",)) for t in tasks
        ),
        exposition=tuple(
            ExpositionJob(name=job, account="lab", region="one", endpoints=("http://a/metrics",))
            for job in jobs
        ),
        services=(ServiceProfile(service="ec2", namespace="AWS/EC2"),),
        **settings,
    )


class Waited(Settings):
    """Settings whose `until` waits for the test."""

    def __init__(self, config: Config) -> None:
        clock = ManualClock(NOON_S)
        super().__init__(config, Members(config.s3, clock), clock)
        self.news = asyncio.Event()
        self.waiting = 0

    async def until(self, condition: Callable[[Config], bool], timeout_s: float) -> bool:
        if not condition(self.config):
            self.waiting += 1
            await self.news.wait()
        return condition(self.config)


async def test_a_task_of_an_unknown_account_waits_for_news_and_holds_up_nobody() -> None:
    cluster = Cluster()
    tasks = targets(4)
    settings = Waited(config_of(*tasks[2:]))
    cluster.announce(*tasks)
    one, _ = cluster.shard(in_flight=1, settings=settings)
    async with cluster.running(one):
        await becomes(lambda: len(cluster.receipts()) == 2)
        assert settings.waiting == 2
        assert cluster.source.asked == [t.target.account for t in tasks[2:]]
        settings.config = config_of(*tasks)
        settings.news.set()
        await becomes(lambda: cluster.committed() == 4)


async def test_a_task_that_stays_unknown_is_looked_at_all_the_same_and_says_what_is_missing() -> None:
    cluster = Cluster()
    [task] = targets(1)
    settings = Waited(config_of())
    settings.news.set()
    cluster.announce(task)
    one, _ = cluster.shard(settings=settings)
    async with cluster.running(one):
        await becomes(lambda: cluster.committed() == 1)
    assert settings.waiting == 1
    assert len(cluster.receipts()) == 1


async def test_an_unknown_target_is_waited_for_once_and_again_under_another_configuration() -> None:
    cluster = Cluster()
    [task] = targets(1)
    later = [task_of(*services, target=task.target) for services in (("sqs",), ("ec2", "sqs"))]
    settings = Waited(config_of())
    settings.news.set()
    one, _ = cluster.shard(settings=settings)
    async with cluster.running(one):
        cluster.announce(task)
        await becomes(lambda: cluster.committed() == 1)
        cluster.announce(later[0])
        await becomes(lambda: cluster.committed() == 2)
        assert settings.waiting == 1
        one.configure(config_of())
        cluster.announce(later[1])
        await becomes(lambda: cluster.committed() == 3)
    assert settings.waiting == 2


async def test_a_replay_waits_for_no_configuration() -> None:
    cluster = Cluster()
    [task] = targets(1)
    settings = Waited(config_of())
    cluster.announce(replace(task, kind=TaskKind.REPLAY))
    one, _ = cluster.shard(settings=settings)
    async with cluster.running(one):
        await becomes(lambda: cluster.committed() == 1)
    assert settings.waiting == 0


def test_a_task_is_known_by_account_and_services_or_by_its_jobs() -> None:
    [task, other] = targets(2)
    assert knows(task, config_of(task))
    assert not knows(other, config_of(task))
    assert not knows(replace(task, items=(replace(task.items[0], service="sqs"),)), config_of(task))
    scrape = replace(
        task, target=Target("exposition", "lab", "one"), items=(replace(task.items[0], service="node"),)
    )
    assert knows(scrape, config_of(jobs=("node",)))
    assert not knows(scrape, config_of(jobs=("blackbox",)))


async def test_more_tasks_run_at_once_as_soon_as_the_configuration_says_so() -> None:
    cluster = Cluster()
    tasks = targets(5)
    gates = [cluster.source.close_gate(task) for task in tasks]
    cluster.announce(*tasks)
    one, _ = cluster.shard(in_flight=1)
    async with cluster.running(one):
        await becomes(lambda: len(cluster.source.asked) == 1)
        one.configure(config_of(*tasks, tasks_in_flight=4))
        await becomes(lambda: len(cluster.source.asked) == 4)
        for gate in gates:
            gate.set()
        await becomes(lambda: cluster.committed() == 5)
