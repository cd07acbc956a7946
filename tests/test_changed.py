"""What is new or changed is published, what is not is held where it may be sealed, and the store ends at the truth whatever happens between."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import wire
from ingest.balance import Claim, imbalance, put_aside, signed, stored_counts
from ingest.batch import without_series
from ingest.changed import Changed
from ingest.clock import ManualClock
from ingest.collect import Collector, Topics
from ingest.errors import Transient
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
    digest_of,
    merge_counts,
    series_id,
    series_ids,
    task_id_of,
    version_of,
    window_counts,
)
from ingest.validate import validate
from shard_config.model import Limits
from tests.fake_log import FakeBroker, FakeSender
from tests.fakes import FakeArchive

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
NOON_S = 1_767_268_800
GRID_S = 300
SETTLING_S = 600
TOPICS = Topics("raw", "ledger")
NAN = float("nan")
LIMITS = Limits()

Points = Mapping[int, Mapping[int, float]]
"""Series number → seconds from noon → value."""


def series_of(number: int) -> Series:
    return Series(SeriesKey(TARGET.account, TARGET.region, "AWS/EC2", f"m{number}", (), "Average", 60))


def batch_of(points: Points, observed_s: float, task_id: str = "0" * 32) -> Batch:
    series = tuple(series_of(n) for n in points)
    return Batch(
        task_id=task_id,
        target=TARGET,
        service="ec2",
        observed_at_ms=int(1000 * (NOON_S + observed_s)),
        revision=0,
        grid_s=GRID_S,
        series=series,
        counts=np.array([len(p) for p in points.values()], np.int32),
        timestamps_s=np.array([NOON_S + t for p in points.values() for t in p], np.int64),
        values=np.array([v for p in points.values() for v in p.values()], np.float64),
        ids=series_ids(series),
    )


def task_of(start_s: int, end_s: int, *, kind: str = "live", attempt: int = 0, revision: int = 0) -> Task:
    items = (TaskItem("ec2", NOON_S + start_s, NOON_S + end_s, GRID_S),)
    task_id = task_id_of(TARGET, "rev", attempt, items, revision)
    return Task(task_id, TARGET, "rev", NOON_S + end_s, attempt, kind, 0, items, revision)


class Answers:
    """A source that answers each look with `batches` and an outcome."""

    def __init__(self) -> None:
        self.batches: list[tuple[Points, float]] = []
        self.status = LookStatus.COMPLETE
        self.raises = False

    async def look(
        self, task_id: str, target: Target, item: TaskItem, deadline_s: float
    ) -> AsyncIterator[Batch | Outcome]:
        for points, observed_s in self.batches:
            if points:
                yield batch_of(points, observed_s, task_id)
        if self.raises:
            raise RuntimeError("half way")
        observed_s = min(at for _, at in self.batches)
        yield Outcome(self.status, "", int(1000 * (NOON_S + observed_s)), 1, {"GetMetricData": 1}, 1)

    async def close(self) -> None: ...


class Shard:
    """One exporter's collector, with a memory of its own, on an archive and a log that it may share."""

    def __init__(self, other: Shard | None = None, **changed: Any) -> None:
        self.archive = other.archive if other else FakeArchive()
        self.broker = other.broker if other else FakeBroker(raw=1, ledger=1)
        self.sender = FakeSender(self.broker)
        self.changed = Changed({"ec2": SETTLING_S}, **changed)
        self.source = Answers()
        self.looks = 0
        self.collector = Collector(
            "exporter-1", {"cloudwatch": self.source}, self.archive, self.sender, TOPICS, ManualClock(NOON_S),
            changed=self.changed,
        )  # fmt: skip

    async def look(
        self,
        points: Points,
        window: tuple[int, int] = (0, 300),
        observed_s: float = 300,
        *,
        task: Task | None = None,
        status: LookStatus = LookStatus.COMPLETE,
    ) -> Receipt:
        self.source.batches = [(points, observed_s)]
        self.source.status = status
        self.looks += 1
        task = task or replace(task_of(*window), task_id=f"{self.looks:032x}")
        return await self.collector.collect(task, maybe_second_try=False)

    def raw(self) -> list[Batch]:
        return [wire.decode_batch(r.value, LIMITS) for r in self.broker.records("raw")]

    async def held(self, receipt: Receipt) -> list[Batch]:
        archived = await self.archive.get(receipt.archive_key)
        assert archived is not None
        ids = {b for item in receipt.items for b in item.held}
        return [wire.decode_batch(p.value, LIMITS) for p in archived.payloads if p.batch_id in ids]


def found(*batches: Batch) -> dict[tuple[str, int], float]:
    """Metric and seconds from noon → value."""
    points: dict[tuple[str, int], float] = {}
    for b in batches:
        owners = np.repeat(np.arange(len(b.series)), b.counts).tolist()
        for i, t, v in zip(owners, b.timestamps_s.tolist(), b.values.tolist(), strict=True):
            points[b.series[i].key.metric, t - NOON_S] = v
    return points


FIVE = {0: {t: float(t) for t in range(0, 300, 60)}, 1: {0: 1.0, 240: 2.0}}


# --- what is published ------------------------------------------------------------------------------------------


async def test_what_was_published_is_not_published_again_and_what_changed_is_by_series_and_window() -> None:
    shard = Shard()
    await shard.look(FIVE)
    later = {0: {**FIVE[0], 120: 7.0, 300: 1.0}, 1: FIVE[1]}
    receipt = await shard.look(later, (0, 600), 600)
    [done] = receipt.items
    assert found(shard.raw()[-1]) == {("m0", t): later[0][t] for t in (0, 60, 120, 180, 240, 300)}
    b = batch_of(later, 600)
    assert done.whole == window_counts(b.point_ids(), b.timestamps_s, b.values, GRID_S)
    assert [(w.start_s - NOON_S, w.points) for w in done.windows] == [(0, 5), (300, 1)]
    assert (done.points, done.held) == (6, ())


async def test_a_look_at_which_nothing_was_left_out_says_no_more_than_before() -> None:
    receipt = await Shard().look(FIVE)
    assert (receipt.items[0].whole, receipt.items[0].held) == ((), ())


async def test_of_a_window_that_may_be_sealed_the_unchanged_part_is_archived_and_not_published() -> None:
    shard = Shard()
    await shard.look(FIVE)
    published = len(shard.raw())
    receipt = await shard.look({**FIVE, 1: {0: 9.0}}, (0, 300), 900)
    [done] = receipt.items
    assert found(*shard.raw()[published:]) == {("m1", 0): 9.0}
    assert found(*await shard.held(receipt)) == {("m0", t): v for t, v in FIVE[0].items()}
    assert [w.points for w in done.whole] == [6]
    assert done.whole == merge_counts(
        [c for b in (shard.raw()[-1], *await shard.held(receipt))
         for c in window_counts(b.point_ids(), b.timestamps_s, b.values, GRID_S)]
    )  # fmt: skip


async def test_a_replay_publishes_what_was_held_and_a_second_try_does_not() -> None:
    shard = Shard()
    await shard.look(FIVE)
    await shard.look(FIVE, (0, 300), 900, task=task_of(0, 300, attempt=1))
    assert len(shard.raw()) == 1
    other = Shard(shard)
    await other.collector.collect(task_of(0, 300, attempt=1), maybe_second_try=True)
    assert len(shard.raw()) == 1
    await other.collector.collect(task_of(0, 300, attempt=1, kind="replay"), maybe_second_try=False)
    assert found(shard.raw()[-1]) == found(batch_of(FIVE, 900))
    assert shard.raw()[-1].observed_at_ms == 1000 * (NOON_S + 900)


async def test_a_look_that_failed_in_part_holds_nothing_and_claims_nothing() -> None:
    shard = Shard()
    await shard.look(FIVE)
    receipt = await shard.look({0: FIVE[0], 1: {0: 9.0}}, (0, 300), 900, status=LookStatus.PARTIAL)
    [done] = receipt.items
    assert (done.whole, done.held, done.points) == ((), (), 1)


@pytest.mark.parametrize(
    "task",
    [task_of(0, 300, kind="heal"), task_of(0, 300, kind="backlog"), task_of(0, 300, revision=1, attempt=1)],
    ids=["heal", "backlog", "revision"],
)
async def test_corrections_healing_and_backlogs_publish_everything_and_end_what_was_remembered(
    task: Task,
) -> None:
    shard = Shard()
    await shard.look(FIVE)
    receipt = await shard.look(FIVE, task=replace(task, task_id=f"{1:032x}"), observed_s=400)
    assert (receipt.items[0].points, receipt.items[0].whole) == (7, ())
    receipt = await shard.look(FIVE, observed_s=500, task=replace(task_of(0, 300), task_id=f"{2:032x}"))
    assert receipt.items[0].points == 7


async def test_points_that_are_not_numbers_are_published_each_time() -> None:
    shard = Shard()
    points = {0: {0: NAN, 60: 1.0}, 1: {0: 1.0}}
    await shard.look(points)
    await shard.look(points, (0, 600), 600)
    assert [(m, t) for m, t in found(shard.raw()[-1])] == [("m0", 0), ("m0", 60)]


async def test_of_a_repeated_timestamp_the_greatest_value_counts_in_any_order() -> None:
    shard = Shard()
    b = batch_of({0: {0: 1.0, 1: 5.0, 60: 2.0}}, 300)
    times_s = np.array([NOON_S, NOON_S, NOON_S + 60])
    look = shard.changed.look(task_of(0, 300), task_of(0, 300).items[0])
    assert look is not None
    first = look.split(replace(b, timestamps_s=times_s))
    assert first.whole == window_counts(b.point_ids(), times_s, b.values, GRID_S)
    order = [2, 1, 0]
    look.finish(Outcome(LookStatus.COMPLETE, "", b.observed_at_ms, 1, {}, 1), GRID_S)
    shard.changed.keep([look])
    again = shard.changed.look(task_of(0, 300), task_of(0, 300).items[0])
    assert again is not None
    assert again.split(replace(b, timestamps_s=times_s[order], values=b.values[order])).left_out == 3


# --- what is remembered -----------------------------------------------------------------------------------------


async def test_memory_is_what_a_receipt_acknowledged() -> None:
    shard = Shard()
    shard.sender.failures = [Transient("kafka", "away")]
    shard.source.batches = [(FIVE, 300)]
    answer = await shard.collector.answer(task_of(0, 300), maybe_second_try=False)
    with pytest.raises(Transient):
        await shard.collector.publish(answer)
    assert shard.changed.entries == 2  # under way
    await shard.collector.publish(answer)
    del answer
    assert shard.changed.entries == 2
    shard.source.batches = [(FIVE, 600)]
    answer = await shard.collector.answer(task_of(0, 600), maybe_second_try=False)
    assert answer.archived.receipt.items[0].points == 0
    del answer  # never acknowledged
    assert shard.changed.entries == 0


async def test_a_look_that_raised_or_was_not_archived_is_not_remembered() -> None:
    shard = Shard()
    await shard.look(FIVE)
    shard.source.raises = True
    await shard.look(FIVE, (0, 600), 600)
    shard.source.raises = False
    assert (await shard.look(FIVE, (0, 900), 700)).items[0].points == 7
    shard.archive.failures = [Transient("archive", "away")]
    await shard.look(FIVE, (0, 1200), 750)
    assert (await shard.look(FIVE, (0, 1500), 800)).items[0].points == 7


async def test_of_two_looks_at_once_the_second_compares_with_nothing_and_alone_is_remembered() -> None:
    shard = Shard()
    shard.source.batches = [(FIVE, 300)]
    first = await shard.collector.answer(task_of(0, 300), maybe_second_try=False)
    shard.source.batches = [({0: {0: 9.0}}, 600)]
    second = await shard.collector.answer(task_of(0, 600), maybe_second_try=False)
    assert second.archived.receipt.items[0].points == 1
    await shard.collector.publish(second)
    await shard.collector.publish(first)
    assert (await shard.look(FIVE, (0, 900), 700)).items[0].points == 7


async def test_an_assignment_forgets_looks_under_way_too() -> None:
    shard = Shard()
    shard.source.batches = [(FIVE, 300)]
    answer = await shard.collector.answer(task_of(0, 300), maybe_second_try=False)
    shard.changed.forget()
    await shard.collector.publish(answer)
    assert (await shard.look(FIVE, (0, 600), 600)).items[0].points == 7


async def test_windows_that_were_looked_at_settled_or_left_behind_are_forgotten() -> None:
    shard = Shard()
    await shard.look({0: {0: 1.0, 300: 2.0, 600: 3.0}}, (0, 900), 900)
    assert shard.changed.entries == 2  # the first may be sealed
    await shard.look({0: {900: 4.0}}, (600, 1200), 1200)
    assert shard.changed.entries == 2


async def test_a_series_that_comes_in_two_parts_is_published_each_time() -> None:
    shard = Shard()
    for n in range(3):
        shard.source.batches = [({0: {0: 1.0}}, 300 + n), ({0: {60: 2.0}, 1: {0: 1.0}}, 300 + n)]
        task = replace(task_of(0, 300), task_id=f"{n:032x}")
        receipt = await shard.collector.collect(task, maybe_second_try=False)
        assert receipt.items[0].points == (3 if n == 0 else 2)


async def test_past_its_room_it_publishes_again_and_says_so() -> None:
    lost: list[int] = []
    shard = Shard(entries_max=3, no_room=lost.append)
    many = {n: {0: 1.0, 60: 2.0} for n in range(5)}
    await shard.look(many)
    assert (shard.changed.entries, lost) == (3, [4])
    assert (await shard.look(many, (0, 600), 600)).items[0].points == 4
    assert shard.changed.entries == 3


async def test_it_takes_at_most_sixteen_bytes_a_series_and_window() -> None:
    changed = Changed({"ec2": SETTLING_S})
    rng = np.random.default_rng(1)
    n = 20_000
    series = tuple(replace(series_of(0)) for _ in range(n))
    ids = rng.integers(0, 2**63, (n, 2)).astype(np.uint64)
    b = replace(
        batch_of({0: {0: 1.0}}, 300), series=series, ids=ids, counts=np.ones(n, np.int32),
        timestamps_s=np.full(n, NOON_S), values=rng.normal(size=n),
    )  # fmt: skip
    look = changed.look(task_of(0, 300), task_of(0, 300).items[0])
    assert look is not None
    look.split(b)
    look.finish(Outcome(LookStatus.COMPLETE, "", b.observed_at_ms, n, {}, n), GRID_S)
    assert look.known.entries == n
    assert look.known.nbytes == 12 * n


# --- the store ends at the truth ----------------------------------------------------------------------------------


class Model:
    """A store that keeps the maximum, and sealing as the ledger does it, over what shards published."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.read = 0
        self.rows: dict[tuple[bytes, int], tuple[int, float]] = {}
        self.dead: dict[bytes, tuple[tuple[int, int, int], ...]] = {}
        self.versions: dict[bytes, int] = {}
        self.receipts: list[Receipt] = []

    def land(self) -> None:
        for record in self.shards[0].broker.records("raw")[self.read :]:
            self.read += 1
            b = wire.decode_batch(record.value, LIMITS)
            good = validate(b, NOON_S + 3600, LIMITS).accepted or without_series(b, range(len(b.series)))
            batch_id = wire.batch_id_of(record.value)
            self.dead[batch_id] = tuple((w.start_s, w.points, w.digest) for w in put_aside(b, good))
            self.versions[batch_id] = b.version
            raws = good.ids.astype(">u8").tobytes()
            owners = np.repeat(np.arange(len(good.series)), good.counts).tolist()
            for i, t, v in zip(owners, good.timestamps_s.tolist(), good.values.tolist(), strict=True):
                key = (raws[16 * i : 16 * i + 16], t)
                self.rows[key] = max((b.version, v), self.rows.get(key, (0, 0.0)))

    def sealing(self, start_s: int) -> Receipt:
        """The newest complete look at a window."""
        return max(
            (r for r in self.receipts if r.items[0].item.start_s <= start_s < r.items[0].item.end_s),
            key=lambda r: r.items[0].outcome.observed_at_ms,
        )

    def why_open(self, start_s: int) -> str | None:
        receipt = self.sealing(start_s)
        [done] = receipt.items
        landed = [b for b in (*done.batches, *done.held) if b in self.versions]
        version = version_of(0, done.outcome.observed_at_ms)
        if landed and not done.whole:
            version = min(self.versions[b] for b in landed)
        seen = [(w.start_s, w.points, w.digest) for w in done.seen]
        counts = stored_counts(seen, [d for b in landed for d in self.dead[b]])
        points, digest, dead = counts.get(start_s, (0, 0, 0))
        claim = Claim(
            "t", "ec2", start_s, start_s + GRID_S, version, points, signed(digest), dead, bool(done.whole)
        )
        here = {k: r for k, r in self.rows.items() if start_s <= k[1] < start_s + GRID_S}
        newer = {k: r for k, r in here.items() if r[0] >= version}
        sums = [_digest(some) for some in (newer, here)]
        return imbalance(claim, len(newer), signed(sums[0]), len(here) - len(newer), signed(sums[1]))

    async def seal(self, start_s: int) -> None:
        """Seal a window, by publishing its look whole where that is what it takes."""
        self.land()
        if self.why_open(start_s) is not None:
            receipt = self.sealing(start_s)
            [done] = receipt.items
            task = Task(receipt.task_id, TARGET, "rev", receipt.tick_s, 0, "replay", 0, (done.item,))
            await self.shards[0].collector.collect(task, maybe_second_try=False)
            self.land()
        assert self.why_open(start_s) is None


def _digest(rows: Mapping[tuple[bytes, int], tuple[int, float]]) -> int:
    ids = np.frombuffer(b"".join(raw for raw, _ in rows), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    times_s = np.array([t for _, t in rows], np.int64)
    return digest_of(ids, times_s, np.array([v for _, v in rows.values()], np.float64))


VALUES = st.sampled_from([None, 1.0, 2.0, 3.0, NAN])
"""None: not shown."""
STEP = st.tuples(
    st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 7)), VALUES, max_size=4),
    st.sampled_from(
        ["look", "other shard", "forgets", "not acknowledged", "partial", "heals", "two at once"]
    ),
    st.booleans(),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(steps=st.lists(STEP, min_size=4, max_size=9))
async def test_the_store_ends_at_the_truth_and_every_window_seals(
    steps: list[tuple[dict[tuple[int, int], float | None], str, bool]],
) -> None:
    """Points are revised, appear and vanish between looks; shards share the target, lose their memory, and are cut off half way."""
    one = Shard()
    shards = [one, Shard(one)]
    model = Model(shards)
    truth: dict[tuple[int, int], float | None] = {(n, t): 1.0 for n in range(3) for t in range(8)}
    for number, (changes, what, batches_apart) in enumerate([*steps, ({}, "look", False)]):
        truth.update(changes)
        end_s, observed_s = 600, 600 + 100 * number
        shard = shards[what == "other shard"]
        last = number == len(steps)
        if last:
            observed_s = 2000  # all windows have settled
        if what == "forgets":
            shard.changed.forget()
        points: dict[int, dict[int, float]] = defaultdict(dict)
        for (n, t), v in truth.items():
            if v is not None:
                points[n][75 * t] = v
        halves: list[tuple[Points, float]] = [({n: points[n]}, observed_s + n) for n in sorted(points)]
        shard.source.batches = halves if batches_apart and halves else [(points, observed_s)]
        shard.source.status = LookStatus.PARTIAL if what == "partial" else LookStatus.COMPLETE
        kind = "heal" if what == "heals" else "live"
        task = replace(task_of(0, end_s, kind=kind), task_id=f"{number:032x}")
        answer = await shard.collector.answer(task, maybe_second_try=False)
        if what == "two at once":
            await shard.collector.answer(
                replace(task, task_id=f"{100 + number:032x}"), maybe_second_try=False
            )
        if what == "not acknowledged" and not last:
            continue  # killed: its batches may be out or not, its receipt is not
        await shard.collector.publish(answer)
        receipt = answer.archived.receipt
        if receipt.items[0].outcome.status is LookStatus.COMPLETE:
            model.receipts.append(receipt)
    for start_s in (NOON_S, NOON_S + 300):
        await model.seal(start_s)
    for (n, t), v in truth.items():
        if v is not None and v == v:
            assert model.rows[series_id(series_of(n).key), NOON_S + 75 * t][1] == v


async def test_an_older_answer_that_lands_later_is_put_right_when_the_window_is_sealed() -> None:
    one = Shard()
    other = Shard(one)
    model = Model([one, other])
    model.receipts.append(await one.look({0: {0: 1.0}}, observed_s=300))
    stale = await other.look(
        {0: {0: 2.0}}, observed_s=400, task=replace(task_of(0, 300), task_id=f"{101:032x}")
    )
    last = await one.look({0: {0: 1.0}}, observed_s=900, task=replace(task_of(0, 300), task_id=f"{102:032x}"))
    assert last.items[0].batches == ()  # memory says unchanged
    model.receipts += [stale, last]
    model.land()
    assert list(model.rows.values()) == [(version_of(0, 1000 * (NOON_S + 400)), 2.0)]
    assert model.why_open(NOON_S) == (
        "collected 1, dead 0; the store has 0 of that look or newer and 1 older: as many, but not the same"
    )
    await model.seal(NOON_S)
    assert list(model.rows.values()) == [(version_of(0, 1000 * (NOON_S + 900)), 1.0)]


def test_nothing_waits() -> None:
    """The module does no I/O: a look in a thread without a loop."""
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    assert Changed({}).look(task_of(0, 300), task_of(0, 300).items[0]) is None
