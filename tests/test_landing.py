"""Records into a sink: what is bad is put aside first, what is good lands, and a position moves only with its rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import orjson
import pytest
import zstandard

from ingest import wire
from ingest.clock import ManualClock
from ingest.errors import Fatal, Transient
from ingest.landing import REFUSALS_MAX, Landing, Progress
from ingest.letters import PAYLOAD_BYTES_MAX
from ingest.log import Outgoing
from ingest.model import Batch, DeadLetter, RecordPosition, Series, SeriesKey, Target, series_ids
from ingest.ports import Advance, Landable, Landed, Record, SeriesRejected, Sink, StoredPosition
from ingest.positions import value_id
from shard_config.model import Limits
from tests.conftest import eventually
from tests.fake_log import FakeBroker, FakeConsumer, FakeSender
from workers.lifecycle import Lifecycle
from workers.reading import BYTES_MAX, RECORDS_MAX, Reader, slices

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
NOON_S = 1_767_268_800
NAN = float("nan")


def value_of(
    *points_of_series: Sequence[float], at_ms: int = NOON_S * 1000, from_s: int = NOON_S - 300
) -> bytes:
    """A record value: a series for each argument, with a point a minute."""
    series = tuple(
        Series(SeriesKey(TARGET.account, TARGET.region, "AWS/EC2", f"m{i}", (), "Average", 60))
        for i in range(len(points_of_series))
    )
    batch = Batch(
        task_id="0" * 32,
        target=TARGET,
        service="ec2",
        observed_at_ms=at_ms,
        revision=0,
        grid_s=300,
        series=series,
        counts=np.array([len(p) for p in points_of_series], np.int32),
        timestamps_s=np.concatenate(
            [np.arange(len(p), dtype=np.int64) * 60 + from_s for p in points_of_series]
        ),
        values=np.concatenate([np.array(p, np.float64) for p in points_of_series]),
        ids=series_ids(series),
    )
    (payload,) = wire.encode_batch(batch)
    return payload.value


class FakeSink:
    """`ingest.ports.Sink` as far as landing needs it. `failures` are raised, one a landing, before anything happens."""

    def __init__(self, partitions: int = 1) -> None:
        self.stored = {p: StoredPosition(0, b"") for p in range(partitions)}
        self.landings: list[list[Landable]] = []
        self.failures: list[Exception] = []

    async def claim(self, topic: str, partitions: Sequence[int]) -> None: ...

    async def init_positions(self, topic: str, partitions: Sequence[int]) -> None: ...

    async def close(self) -> None: ...

    async def positions(self, topic: str, partitions: Sequence[int]) -> Mapping[int, StoredPosition]:
        return {p: self.stored[p] for p in partitions if p in self.stored}

    async def land(self, advances: Sequence[Advance], batches: Sequence[Landable]) -> Landed:
        if self.failures:
            raise self.failures.pop(0)
        for a in advances:
            if self.stored[a.partition].next != a.expected_next:
                raise Fatal(f"{a.topic}/{a.partition}", "another consumer owns the partition")
        self.stored |= {a.partition: StoredPosition(a.next, a.last_value_id) for a in advances}
        self.landings.append(list(batches))
        return Landed(len(batches), sum(b.batch.points for b in batches), 0, True)

    def values(self) -> list[float]:
        """All values that landed, in order."""
        return [v for landing in self.landings for b in landing for v in b.batch.values.tolist()]


class World:
    """A landing between a log and a sink."""

    def __init__(self, partitions: int = 1, sink: FakeSink | None = None) -> None:
        self.broker = FakeBroker(raw=partitions, dead=1)
        self.sender = FakeSender(self.broker)
        self.sink = sink or FakeSink(partitions)
        as_port: Sink = self.sink
        self.landing = Landing("raw", "dead", as_port, self.sender, Limits(), ManualClock(NOON_S))

    def write(self, *values: bytes, partition: int = 0) -> list[Record]:
        before = self.broker.bounds("raw", partition)[1]
        for value in values:
            self.broker.append("raw", Outgoing(b"k", value, partition))
        return self.broker.records("raw", partition)[before:]

    async def open(self, *partitions: int) -> dict[int, int]:
        bounds = {p: self.broker.bounds("raw", p) for p in partitions}
        return await self.landing.open(partitions, bounds)

    def dead(self) -> list[DeadLetter]:
        return [wire.decode_dead_letter(r.value) for r in self.broker.records("dead")]


async def test_good_records_land_and_the_position_moves_behind_them() -> None:
    world = World()
    assert await world.open(0) == {0: 0}
    records = world.write(value_of([1.0, 2.0]), value_of([3.0]))
    progress = await world.landing.land(records)
    assert progress == Progress(Landed(2, 3, 0, True), 0, 0, {0: 2})
    assert world.sink.values() == [1.0, 2.0, 3.0]
    assert world.sink.stored == {0: StoredPosition(2, value_id(records[1].value))}


@pytest.mark.parametrize(("ahead_s", "dead"), [(0, 0), (3600, 0), (10 * 86_400, 1)])
async def test_with_our_clock_an_hour_behind_what_is_new_is_not_taken_for_future(
    ahead_s: int, dead: int
) -> None:
    world = World()
    await world.open(0)
    (record,) = world.write(value_of([1.0], at_ms=(NOON_S + ahead_s) * 1000, from_s=NOON_S + ahead_s - 300))
    progress = await world.landing.land([replace(record, timestamp_ms=(NOON_S + ahead_s) * 1000)])
    assert progress.dead_points == dead


async def test_what_the_log_too_takes_for_future_is_put_aside() -> None:
    world = World()
    await world.open(0)
    (record,) = world.write(value_of([1.0], from_s=NOON_S + 3600))
    progress = await world.landing.land([replace(record, timestamp_ms=NOON_S * 1000)])
    assert (progress.dead_points, world.dead()[0].reason) == (1, "future")


async def test_a_bad_record_never_stops_the_good_ones_around_it() -> None:
    world = World()
    await world.open(0)
    progress = await world.landing.land(world.write(value_of([1.0]), b"garbage", value_of([2.0])))
    assert (progress.dead_records, progress.dead_points, progress.next_offsets) == (1, 0, {0: 3})
    assert world.sink.values() == [1.0, 2.0]
    (letter,) = world.dead()
    assert (letter.reason, letter.origin.offset, letter.payload) == ("bad_frame", 1, b"garbage")
    assert letter.batch_id == wire.batch_id_of(b"garbage")


async def test_a_bad_point_never_stops_the_good_ones_of_its_batch() -> None:
    world = World()
    await world.open(0)
    progress = await world.landing.land(world.write(value_of([1.0, NAN], [2.0])))
    assert (progress.dead_records, progress.dead_points) == (0, 1)
    assert world.sink.values() == [1.0, 2.0]
    assert [b.dead_points for b in world.sink.landings[0]] == [1]
    (letter,) = world.dead()
    assert (letter.reason, orjson.loads(letter.payload)["value"]) == ("not_a_number", "nan")


async def test_a_batch_without_a_good_point_lands_empty_so_that_its_look_can_close() -> None:
    world = World()
    await world.open(0)
    value = value_of([NAN, NAN])
    progress = await world.landing.land(world.write(value))
    ((landable,),) = world.sink.landings
    assert (landable.batch_id, landable.batch.points, landable.dead_points) == (
        wire.batch_id_of(value),
        0,
        2,
    )
    assert (progress.dead_points, len(world.dead())) == (2, 2)


async def test_dead_letters_are_written_before_the_position_moves() -> None:
    world = World()
    await world.open(0)
    records = world.write(b"garbage", value_of([1.0]))
    world.sender.failures = [Transient("topic dead", "away")]
    with pytest.raises(Transient, match="away"):
        await world.landing.land(records)
    assert (world.sink.landings, world.sink.stored[0].next) == ([], 0)
    await world.landing.land(records)
    assert (len(world.dead()), world.sink.stored[0].next) == (1, 2)


async def test_a_landing_that_is_tried_again_writes_the_same_letters_and_lands_once() -> None:
    world = World()
    await world.open(0)
    records = world.write(b"garbage", value_of([1.0]))
    world.sink.failures = [Transient("postgres", "away")]
    with pytest.raises(Transient, match="away"):
        await world.landing.land(records)
    await world.landing.land(records)
    assert len({letter.identity for letter in world.dead()}) == 1
    assert world.sink.values() == [1.0]


async def test_what_has_landed_is_skipped_when_it_comes_again() -> None:
    world = World()
    await world.open(0)
    records = world.write(value_of([1.0]), value_of([2.0]))
    await world.landing.land(records[:1])
    again = await world.landing.land(records)
    assert (again.landed.points, again.next_offsets) == (1, {0: 2})
    nothing = await world.landing.land(records)
    assert (nothing.landed.points, nothing.next_offsets) == (0, {})
    assert world.sink.values() == [1.0, 2.0]


async def test_after_a_restart_the_record_before_the_position_is_compared_and_not_landed_again() -> None:
    before = World()
    await before.open(0)
    await before.landing.land(before.write(value_of([1.0])))
    after = World(sink=before.sink)
    after.broker = before.broker
    assert await after.open(0) == {0: 0}
    records = [*before.broker.records("raw"), *after.write(value_of([2.0]))]
    await after.landing.land(records)
    assert after.sink.values() == [1.0, 2.0]


async def test_a_topic_that_was_created_again_and_grew_past_the_position_is_fatal() -> None:
    world = World()
    await world.open(0)
    await world.landing.land(world.write(value_of([1.0])))
    world.broker.create("raw", 1)
    records = world.write(value_of([8.0]), value_of([9.0]))
    await world.open(0)
    with pytest.raises(Fatal, match="created again"):
        await world.landing.land(records)
    assert world.sink.values() == [1.0]


async def test_a_topic_that_was_created_again_and_is_shorter_is_fatal_at_once() -> None:
    world = World()
    await world.open(0)
    await world.landing.land(world.write(value_of([1.0])))
    world.broker.create("raw", 1)
    with pytest.raises(Fatal, match="outside the log"):
        await world.open(0)


async def test_a_zombie_is_refused_and_its_rows_do_not_land() -> None:
    owner = World()
    await owner.open(0)
    zombie = World(sink=owner.sink)
    await zombie.open(0)
    await owner.landing.land(owner.write(value_of([1.0])))
    with pytest.raises(Fatal, match="another consumer owns"):
        await zombie.landing.land(zombie.write(value_of([2.0])))
    assert owner.sink.values() == [1.0]


async def test_after_a_revocation_nothing_lands() -> None:
    world = World()
    await world.open(0)
    records = world.write(value_of([1.0]))
    world.landing.close()
    assert (await world.landing.land(records)).next_offsets == {}
    assert world.sink.landings == []


async def test_partitions_advance_each_on_their_own() -> None:
    world = World(partitions=2)
    await world.open(0, 1)
    records = world.write(value_of([1.0]), partition=1) + world.write(value_of([2.0]), value_of([3.0]))
    assert (await world.landing.land(records)).next_offsets == {0: 2, 1: 1}


async def test_a_series_that_the_sink_refuses_is_buried_and_the_others_land() -> None:
    world = World()
    await world.open(0)
    value = value_of([1.0, 2.0], [3.0])
    batch_id = wire.batch_id_of(value)
    world.sink.failures = [SeriesRejected("sink", "labels_differ", "known with others", [(batch_id, 0)])]
    progress = await world.landing.land(world.write(value, value_of([4.0])))
    assert world.sink.values() == [3.0, 4.0]
    assert [(b.batch_id == batch_id, b.dead_points) for b in world.sink.landings[0]] == [
        (True, 2),
        (False, 0),
    ]
    assert world.sink.landings[0][0].batch.counts.tolist() == [1]
    assert progress.dead_points == 2
    (letter,) = world.dead()
    assert (letter.reason, letter.series) == (
        "labels_differ",
        "123456789012/eu-west-1 AWS/EC2/m0{} Average 60s",
    )
    assert orjson.loads(letter.payload) == {"points": [[NOON_S - 300, "1.0"], [NOON_S - 240, "2.0"]]}


async def test_a_sink_that_never_stops_refusing_is_fatal() -> None:
    world = World()
    await world.open(0)
    value = value_of(*([1.0] for _ in range(REFUSALS_MAX)))
    refusal = SeriesRejected("sink", "labels_differ", "x", [(wire.batch_id_of(value), 0)])
    world.sink.failures = [refusal] * 100
    with pytest.raises(Fatal, match="still refuses"):
        await world.landing.land(world.write(value))
    assert world.sink.stored[0].next == 0


async def test_a_dead_record_of_any_size_fits_its_letter() -> None:
    world = World()
    await world.open(0)
    await world.landing.land(world.write(b"\0" * (PAYLOAD_BYTES_MAX + 99_000)))
    (letter,) = world.dead()
    assert len(letter.payload) == PAYLOAD_BYTES_MAX


# --- the reader that feeds a landing --------------------------------------------------------------------------


class Reading:
    """A Reader on a fake log, and what it took. `failures` are raised, one a take; all fail while the store is `down`."""

    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.taken: list[list[int]] = []
        self.failures: list[Exception] = []
        self.down = False
        self.tries = 0
        self.closed = 0
        self.reader = Reader(
            lambda reader: FakeConsumer(  # type: ignore[arg-type, return-value]
                broker, "raw", "g", assigned=reader.assigned, revoked=reader.revoked
            ),
            self._take,
            self._open,
            self._close,
        )

    async def _open(self, _: object, partitions: Sequence[int]) -> dict[int, int]:
        return dict.fromkeys(partitions, 0)

    async def _close(self) -> None:
        self.closed += 1

    async def _take(self, records: Sequence[Record]) -> dict[int, int]:
        self.tries += 1
        if self.down:
            raise Transient("postgres", "away", retry_after_s=0.01)
        if self.failures:
            raise self.failures.pop(0)
        self.taken.append([r.position.offset for r in records])
        return {records[-1].position.partition: records[-1].position.offset + 1}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Lifecycle]:
        lifecycle = Lifecycle()
        running = asyncio.create_task(self.reader.run(lifecycle))
        try:
            yield lifecycle
        finally:
            lifecycle.stop.set()
            async with asyncio.timeout(10):
                await running


async def test_a_take_that_fails_is_tried_again_with_the_same_records_and_then_committed() -> None:
    world = World()
    world.write(b"a", b"b")
    reading = Reading(world.broker)
    reading.failures = [Transient("postgres", "away", retry_after_s=0.01) for _ in range(2)]

    async def committed() -> bool:
        return world.broker.committed.get(("g", "raw", 0)) == 2

    async with reading.running() as lifecycle:
        await eventually(committed)
        assert lifecycle.ready
    assert reading.taken == [[0, 1]]


async def test_records_in_hand_are_dropped_at_a_revocation_and_read_again_from_the_position() -> None:
    world = World()
    world.write(b"a")
    reading = Reading(world.broker)
    reading.down = True

    async def tried() -> bool:
        return reading.tries > 0

    async with reading.running():
        await eventually(tried)
        # Another member comes and goes: the partition leaves, and is ours again.
        other = Reading(world.broker)
        await other.reader.consumer.start()
        await other.reader.consumer.stop()
        assert reading.closed == 2
        world.write(b"b")
        reading.down = False

        async def taken() -> bool:
            return bool(reading.taken)

        await eventually(taken)
    # Had the retry gone on with what it held, 0 would have been taken alone, and then once more.
    assert reading.taken == [[0, 1]]


def test_a_transaction_is_bounded_by_what_its_batches_hold_decompressed_too() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(15 * 1024 * 1024))
    assert len(bomb) < 10_000
    records = [Record(RecordPosition("raw", 0, i), b"", bomb, 0) for i in range(5)]
    assert [len(some) for some in slices(records)] == [2, 2, 1]


def test_a_transaction_takes_consecutive_records_up_to_its_bytes() -> None:
    sizes = [BYTES_MAX, 1, BYTES_MAX - 1, 1, BYTES_MAX + 1, 1]
    records = [Record(RecordPosition("raw", 0, i), b"", b"x" * size, 0) for i, size in enumerate(sizes)]
    assert [[r.position.offset for r in some] for some in slices(records)] == [[0], [1, 2], [3], [4], [5]]
    assert list(slices([])) == []


def test_a_transaction_takes_the_oldest_of_all_partitions_and_each_partition_in_order() -> None:
    times_ms = {0: [10, 40, 20], 1: [5, 30], 2: [15]}
    records = [
        Record(RecordPosition("raw", p, i), b"", b"x", at_ms)
        for p, all_ms in times_ms.items()
        for i, at_ms in enumerate(all_ms)
    ]
    (some,) = slices(records)
    taken = [(r.position.partition, r.position.offset) for r in some]
    assert taken == [(1, 0), (0, 0), (2, 0), (1, 1), (0, 1), (0, 2)]


def test_a_transaction_takes_no_more_than_its_records() -> None:
    records = [Record(RecordPosition("raw", 0, i), b"", b"", 0) for i in range(2 * RECORDS_MAX + 1)]
    assert [len(some) for some in slices(records)] == [RECORDS_MAX, RECORDS_MAX, 1]
