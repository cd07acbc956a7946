"""One task, from the question to the receipt: in which order, what is paid for, and what is said when something fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from ingest import collect, wire
from ingest.archive import archive_key
from ingest.clock import ManualClock
from ingest.collect import Answer, Collector, Topics
from ingest.errors import Fatal, Rejected, Transient
from ingest.model import (
    Batch,
    LookStatus,
    Outcome,
    Receipt,
    Series,
    SeriesKey,
    Target,
    Task,
    TaskItem,
    WindowCount,
    merge_counts,
    series_ids,
    task_id_of,
    window_counts,
)
from ingest.ports import ArchivedTask, Source
from ingest.wire import raw_key
from tests.fake_log import FakeBroker, FakeSender
from tests.fakes import FakeArchive

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
NOON_S = 1_767_268_800
TOPICS = Topics("raw", "ledger")


def task_of(*services: str, target: Target = TARGET, expires_s: int = 0) -> Task:
    items = tuple(TaskItem(name, NOON_S - 600, NOON_S, 300) for name in services)
    return Task(task_id_of(target, "rev", 0, items), target, "rev", NOON_S, 0, "live", expires_s, items)


TASK = task_of("ec2")


def batch(task: Task, item: TaskItem, values: list[float], observed_at_ms: int) -> Batch:
    """One series with a point a minute from the item's start."""
    key = SeriesKey(task.target.account, task.target.region, "AWS/EC2", "CPUUtilization", (), "Average", 60)
    series = (Series(key),)
    return Batch(
        task_id=task.task_id,
        target=task.target,
        service=item.service,
        observed_at_ms=observed_at_ms,
        revision=0,
        grid_s=item.grid_s,
        series=series,
        counts=np.array([len(values)], np.int32),
        timestamps_s=np.arange(len(values), dtype=np.int64) * 60 + item.start_s,
        values=np.array(values),
        ids=series_ids(series),
    )


class FakeSource:
    """Answers each look with one batch of `values` and a COMPLETE outcome, or with `answers`, or raises or hangs."""

    def __init__(self, task: Task = TASK, values: tuple[float, ...] = (1.0, 2.0)) -> None:
        self.task = task
        self.values = list(values)
        self.status = LookStatus.COMPLETE
        self.observed_at_ms = NOON_S * 1000
        self.error: Exception | None = None
        self.hangs = False
        self.silent = False
        self.looks = 0
        self.closed = 0

    async def look(
        self, task_id: str, target: Target, item: TaskItem, deadline_s: float
    ) -> AsyncIterator[Batch | Outcome]:
        self.looks += 1
        try:
            if self.values:
                yield batch(self.task, item, self.values, self.observed_at_ms)
            if self.error:
                raise self.error
            if self.hangs:
                await asyncio.Event().wait()
            if not self.silent:
                requests = {"GetMetricData": 1}
                yield Outcome(self.status, "why", self.observed_at_ms, 1, requests, 7)
        finally:
            self.closed += 1

    async def close(self) -> None: ...


class BilledSource(FakeSource):
    """One that is billed, and says what it has cost (`ingest.ports.Informed`)."""

    def broke(self, task_id: str, service: str) -> Outcome | None:
        return None

    async def published(self, task_id: str, service: str) -> None: ...


class Ordered(FakeArchive):
    """An archive that notes when something got into it."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self._order = order

    async def put(self, task: ArchivedTask) -> ArchivedTask:
        done = await super().put(task)
        self._order.append("archive")
        return done


class OrderedSender(FakeSender):
    """A sender that notes what went where."""

    def __init__(self, broker: FakeBroker, order: list[str]) -> None:
        super().__init__(broker)
        self._order = order

    async def send(self, topic: str, records):  # type: ignore[no-untyped-def]
        done = await super().send(topic, records)
        self._order.append(topic)
        return done


class World:
    """A collector between fakes."""

    def __init__(
        self, source: Source | None = None, shard: str = "exporter-1", archive: FakeArchive | None = None
    ):
        self.order: list[str] = []
        self.source = source or FakeSource()
        self.archive = archive or Ordered(self.order)
        self.broker = FakeBroker(raw=4, ledger=4)
        self.sender = OrderedSender(self.broker, self.order)
        self.clock = ManualClock(NOON_S + 1)
        self.collector = Collector(
            shard, {"cloudwatch": self.source}, self.archive, self.sender, TOPICS, self.clock
        )

    def receipts(self) -> list[Receipt]:
        return [wire.decode_receipt(r.value) for r in self.broker.records("ledger")]

    def raw(self) -> list[bytes]:
        return [r.value for r in self.broker.records("raw")]


async def test_s3_comes_before_raw_and_raw_before_the_receipt() -> None:
    world = World()
    await world.collector.collect(TASK, maybe_second_try=False)
    assert world.order == ["archive", "raw", "ledger"]


async def test_what_is_published_is_what_is_archived_byte_for_byte() -> None:
    world = World()
    receipt = await world.collector.collect(TASK, maybe_second_try=False)
    archived = await world.archive.get(archive_key(TASK))
    assert archived is not None
    assert world.raw() == [p.value for p in archived.payloads]
    assert world.receipts() == [archived.receipt] == [receipt]
    assert receipt.items[0].batches == tuple(p.batch_id for p in archived.payloads)


async def test_the_receipt_says_who_did_what_when() -> None:
    world = World()
    receipt = await world.collector.collect(TASK, maybe_second_try=False)
    expected = batch(TASK, TASK.items[0], [1.0, 2.0], NOON_S * 1000)
    assert receipt == Receipt(
        task_id=TASK.task_id,
        target=TARGET,
        shard="exporter-1",
        tick_s=NOON_S,
        started_at_ms=(NOON_S + 1) * 1000,
        finished_at_ms=(NOON_S + 1) * 1000,
        archive_key=archive_key(TASK),
        items=receipt.items,
    )
    (item,) = receipt.items
    assert (item.item, item.points) == (TASK.items[0], 2)
    assert item.outcome == Outcome(LookStatus.COMPLETE, "why", NOON_S * 1000, 1, {"GetMetricData": 1}, 7)
    assert item.windows == window_counts(expected.point_ids(), expected.timestamps_s, expected.values, 300)


async def test_batches_are_keyed_by_target_and_receipts_too() -> None:
    world = World()
    await world.collector.collect(TASK, maybe_second_try=False)
    assert {r.key for r in world.broker.records("raw")} == {raw_key(TARGET)} == {f"{TARGET}/0".encode()}
    assert {r.key for r in world.broker.records("ledger")} == {str(TARGET).encode()}


async def test_a_second_try_publishes_from_the_archive_and_asks_nobody() -> None:
    first = World()
    await first.collector.collect(TASK, maybe_second_try=False)
    second = World(archive=first.archive, shard="exporter-2")
    await second.collector.collect(TASK, maybe_second_try=True)
    assert second.source.looks == 0
    assert (second.raw(), second.receipts()) == (first.raw(), first.receipts())


async def test_a_second_try_of_what_nobody_archived_asks_the_source() -> None:
    world = World()
    await world.collector.collect(TASK, maybe_second_try=True)
    assert (world.source.looks, len(world.raw())) == (1, 1)


async def cut_off(world: World, *, maybe_second_try: bool) -> None:
    """A run that is killed when it has asked, before it archives."""
    world.archive.failures = [*[None] * (2 if maybe_second_try else 0), KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        await world.collector.answer(TASK, maybe_second_try=maybe_second_try)


async def test_of_three_runs_of_which_two_were_cut_off_the_last_counts_two_askings_as_in_doubt() -> None:
    runs = [World(BilledSource())]
    runs += [World(BilledSource(), archive=runs[0].archive) for _ in range(2)]
    await cut_off(runs[0], maybe_second_try=False)
    await cut_off(runs[1], maybe_second_try=True)
    receipt = await runs[2].collector.collect(TASK, maybe_second_try=True)
    bill = sum(run.source.looks for run in runs) * 7
    outcome = receipt.items[0].outcome
    assert (outcome.metrics_billed, outcome.metrics_in_doubt) == (7, 14)
    assert bill == outcome.metrics_billed + outcome.metrics_in_doubt


async def test_a_first_run_leaves_no_mark_and_nothing_of_it_is_in_doubt() -> None:
    world = World(BilledSource())
    receipt = await world.collector.collect(TASK, maybe_second_try=False)
    assert receipt.items[0].outcome.metrics_in_doubt == 0
    assert list(world.archive.objects) == [archive_key(TASK)]


async def test_a_second_try_that_the_archive_answers_leaves_no_mark() -> None:
    first = World(BilledSource())
    await first.collector.collect(TASK, maybe_second_try=False)
    second = World(BilledSource(), archive=first.archive)
    await second.collector.collect(TASK, maybe_second_try=True)
    assert list(first.archive.objects) == [archive_key(TASK)]


async def test_a_second_try_at_what_nobody_bills_leaves_no_mark() -> None:
    world = World()
    await world.collector.collect(TASK, maybe_second_try=True)
    assert list(world.archive.objects) == [archive_key(TASK)]


@pytest.mark.parametrize("error", [Transient("archive", "away"), Rejected("archive", "bad_key")], ids=str)
async def test_where_the_archive_does_not_take_the_mark_one_asking_is_in_doubt_and_no_data_is_lost(
    error: Exception,
) -> None:
    world = World(BilledSource())
    world.archive.failures = [None, error]
    receipt = await world.collector.collect(TASK, maybe_second_try=True)
    outcome = receipt.items[0].outcome
    assert (outcome.status, outcome.metrics_in_doubt, world.source.looks) == (LookStatus.COMPLETE, 7, 1)


async def test_an_archive_that_cannot_be_read_costs_a_second_look_and_no_data() -> None:
    world = World()
    world.archive.failures = [Transient("archive", "away")]
    receipt = await world.collector.collect(TASK, maybe_second_try=True)
    assert (world.source.looks, receipt.items[0].outcome.status) == (1, LookStatus.COMPLETE)


async def test_of_two_runs_that_race_both_publish_the_archived_one_and_both_are_paid_for() -> None:
    first = World(FakeSource(values=(1.0,)))
    second = World(FakeSource(values=(3.0, 4.0)), shard="exporter-2", archive=first.archive)
    second.clock.advance(5)
    winner = await first.collector.answer(TASK, maybe_second_try=False)
    loser = await second.collector.answer(TASK, maybe_second_try=False)
    await second.collector.publish(loser)
    await first.collector.publish(winner)
    assert first.raw() == second.raw()
    assert first.receipts() == [winner.archived.receipt]
    theirs, own = second.receipts()
    assert theirs == winner.archived.receipt
    assert (own.shard, own.finished_at_ms) == ("exporter-2", (NOON_S + 6) * 1000)
    assert own.items[0].outcome.metrics_billed == 7
    # The points of the archived answer are counted once, and its windows can be closed by either receipt.
    assert (own.items[0].points, own.items[0].windows) == (0, theirs.items[0].windows)
    assert own.items[0].batches == theirs.items[0].batches


async def test_with_the_archive_down_nothing_is_published_and_the_receipt_says_failed() -> None:
    world = World()
    world.archive.failures = [Transient("archive s3://b/k", "no answer")]
    receipt = await world.collector.collect(TASK, maybe_second_try=False)
    assert world.raw() == []
    assert world.receipts() == [receipt]
    (item,) = receipt.items
    assert (receipt.archive_key, item.points, item.windows, item.batches) == ("", 0, (), ())
    assert item.outcome.status == LookStatus.FAILED
    assert "not archived: archive s3://b/k: no answer" in item.outcome.detail
    # What it cost stays.
    assert item.outcome.metrics_billed == 7


async def test_a_spoilt_archive_object_fails_the_task_and_stops_nobody() -> None:
    world = World()
    world.archive.objects[archive_key(TASK)] = b"HGTASK1\nspoilt"
    receipt = await world.collector.collect(TASK, maybe_second_try=True)
    assert receipt.items[0].outcome.status == LookStatus.FAILED
    assert world.raw() == []


@pytest.mark.parametrize("status", [LookStatus.FAILED, LookStatus.FORBIDDEN, LookStatus.PARTIAL])
async def test_a_look_that_failed_is_in_the_receipt_as_failed_and_what_it_found_is_kept(
    status: LookStatus,
) -> None:
    source = FakeSource()
    source.status = status
    world = World(source)
    receipt = await world.collector.collect(TASK, maybe_second_try=False)
    assert (receipt.items[0].outcome.status, receipt.items[0].outcome.detail) == (status, "why")
    assert (receipt.items[0].points, len(world.raw())) == (2, 1)


async def test_a_source_that_raises_fails_its_item_and_not_the_task() -> None:
    source = FakeSource()
    source.error = ValueError("bug")
    receipt = await World(source).collector.collect(TASK, maybe_second_try=False)
    assert receipt.items[0].outcome.status == LookStatus.FAILED
    assert receipt.items[0].outcome.detail == "the source raised ValueError: bug"
    assert (receipt.items[0].points, receipt.items[0].batches, source.closed) == (0, (), 1)


async def test_a_fatal_of_a_source_passes() -> None:
    source = FakeSource()
    source.error = Fatal("source", "stop")
    with pytest.raises(Fatal, match="stop"):
        await World(source).collector.collect(TASK, maybe_second_try=False)


async def test_a_source_that_hangs_is_left_soon_after_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "OVERTIME_S", 0.02)
    source = FakeSource()
    source.hangs = True
    world = World(source)
    world.collector = Collector(
        "exporter-1",
        {"cloudwatch": source},
        world.archive,
        world.sender,
        TOPICS,
        world.clock,
        deadline_s=0.01,
    )
    async with asyncio.timeout(5):
        receipt = await world.collector.collect(TASK, maybe_second_try=False)
    assert receipt.items[0].outcome.status == LookStatus.FAILED
    assert "TimeoutError" in receipt.items[0].outcome.detail
    assert source.closed == 1


async def test_a_source_without_an_outcome_is_never_an_empty_success() -> None:
    source = FakeSource(values=())
    source.silent = True
    receipt = await World(source).collector.collect(TASK, maybe_second_try=False)
    assert receipt.items[0].outcome.status == LookStatus.FAILED
    assert "without an outcome" in receipt.items[0].outcome.detail


async def test_a_target_of_a_source_that_this_shard_has_not_fails_and_asks_nobody() -> None:
    world = World()
    task = task_of("node", target=Target("exposition", "lab", "local"))
    receipt = await world.collector.collect(task, maybe_second_try=False)
    assert (receipt.items[0].outcome.status, world.source.looks) == (LookStatus.FAILED, 0)


async def test_a_task_that_has_expired_is_declared_expired_and_asks_nobody() -> None:
    world = World()
    receipt = await world.collector.collect(task_of("node", expires_s=NOON_S + 1), maybe_second_try=False)
    assert (receipt.items[0].outcome.status, world.source.looks) == (LookStatus.EXPIRED, 0)
    in_time = World()
    receipt = await in_time.collector.collect(task_of("node", expires_s=NOON_S + 2), maybe_second_try=False)
    assert receipt.items[0].outcome.status == LookStatus.COMPLETE


async def test_a_complete_look_that_asked_nothing_is_dated_by_our_own_clock() -> None:
    source = FakeSource(values=())
    source.observed_at_ms = 0
    receipt = await World(source).collector.collect(TASK, maybe_second_try=False)
    assert receipt.items[0].outcome.observed_at_ms == (NOON_S + 1) * 1000


async def test_each_item_has_its_own_outcome_and_payloads() -> None:
    task = task_of("ec2", "rds")
    world = World(FakeSource(task))
    receipt = await world.collector.collect(task, maybe_second_try=False)
    assert [i.item.service for i in receipt.items] == ["ec2", "rds"]
    assert [len(i.batches) for i in receipt.items] == [1, 1]
    assert [wire.batch_id_of(v) for v in world.raw()] == [b for i in receipt.items for b in i.batches]


async def test_a_target_that_can_have_no_archive_key_fails_before_it_is_asked() -> None:
    world = World()
    task = task_of("ec2", target=Target("cloudwatch", "..", "eu-west-1"))
    answer = await world.collector.answer(task, maybe_second_try=False)
    assert answer.archived.receipt.items[0].outcome.status == LookStatus.FAILED
    assert "bad_key" in answer.archived.receipt.items[0].outcome.detail
    assert world.source.looks == 0


@pytest.mark.parametrize("sends_before", [0, 1], ids=["raw", "ledger"])
async def test_a_receipt_that_cannot_be_written_is_transient_and_publishing_again_asks_nobody(
    sends_before: int,
) -> None:
    world = World()
    world.sender.failures = [*[None] * sends_before, Transient("topic", "away")]
    answer = await world.collector.answer(TASK, maybe_second_try=False)
    with pytest.raises(Transient, match="away"):
        await world.collector.publish(answer)
    assert world.receipts() == []
    await world.collector.publish(answer)
    assert world.receipts() == [answer.archived.receipt]
    assert world.source.looks == 1


async def test_a_failed_receipt_is_published_once() -> None:
    world = World()
    world.archive.failures = [Rejected("archive", "spoilt")]
    answer = await world.collector.answer(TASK, maybe_second_try=False)
    assert answer == Answer(answer.archived, answer.archived.receipt)
    await world.collector.publish(answer)
    assert len(world.receipts()) == 1


def test_counts_of_one_window_add_up() -> None:
    assert merge_counts(
        [WindowCount(300, 600, 1, 2**64 - 1), WindowCount(0, 300, 1, 5), WindowCount(300, 600, 2, 3)]
    ) == (WindowCount(0, 300, 1, 5), WindowCount(300, 600, 3, 2))


@pytest.mark.parametrize("kind", ["again", "replay"])
async def test_a_task_that_is_announced_again_is_published_from_the_archive_by_whoever_gets_it(
    kind: str,
) -> None:
    first = World()
    await first.collector.collect(TASK, maybe_second_try=False)
    second = World(archive=first.archive, shard="exporter-2")
    await second.collector.collect(replace(TASK, kind=kind), maybe_second_try=False)
    assert second.source.looks == 0
    assert (second.raw(), second.receipts()) == (first.raw(), first.receipts())


@pytest.mark.parametrize("failures", [[], [Transient("archive", "away")]], ids=["not there", "not readable"])
async def test_a_replay_that_the_archive_does_not_give_asks_nobody_and_says_so(
    failures: list[Exception],
) -> None:
    world = World()
    world.archive.failures = [*failures]
    receipt = await world.collector.collect(replace(TASK, kind="replay"), maybe_second_try=False)
    assert (world.source.looks, world.raw(), receipt.archive_key) == (0, [], "")
    assert receipt.items[0].outcome.status == LookStatus.FAILED
    assert "not replayed" in receipt.items[0].outcome.detail
    assert world.receipts() == [receipt]
