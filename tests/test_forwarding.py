"""Records of `raw` to a receiver of samples: each settled point once and in order, whatever happens on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import wire
from ingest.clock import ManualClock
from ingest.errors import Rejected, Transient
from ingest.forwarded import Note, Tally
from ingest.forwarding import Forwarder
from ingest.model import Batch, RecordPosition, Series, SeriesKey, Target, series_ids
from ingest.ports import EncodedLabels, LabelSet, Record, RefusedSamples, SeriesSamples, Written
from ingest.sinks.prompb import encoded_labels
from shard_config.model import Limits
from tests.fake_log import FakeBroker, FakeSender
from tests.written_labels import decoded_labels

NOON_S = 1_767_268_800
TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
SETTLING_S = 120
LAG_S = 60 + SETTLING_S
Point = tuple[int, int, float]
"""Series, minutes from noon, value."""


@dataclass
class FakeReceiver:
    """`ingest.ports.Receiving`, as a Prometheus without a window: an older sample than the newest is refused, and so is another value."""

    stored: dict[LabelSet, dict[int, float]] = field(default_factory=dict)
    failures: list[Exception | None] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    window: bool = False
    refusals: int = 0
    bad: set[float] = field(default_factory=set)
    """Values that it does not like."""

    async def write(self, series: Sequence[SeriesSamples]) -> Written:
        self.writes.append(sum(len(s.values) for s in series))
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None and "answer lost" not in str(failure):
            raise failure
        taken, refused = 0, []
        for i, one in enumerate(series):
            kept = self.stored.setdefault(decoded_labels(one.labels), {})
            for ms, value in zip(one.timestamps_ms.tolist(), one.values.tolist(), strict=True):
                newest = max(kept, default=0)
                reason = ""
                if value in self.bad:
                    reason = "refused"
                elif ms in kept and kept[ms] != value and (ms == newest or self.window):
                    reason = "" if self.window else "duplicate"
                elif ms < newest and not self.window:
                    reason = "out_of_order"
                if reason:
                    refused.append(RefusedSamples(i, reason, "no", np.array([ms], np.int64)))
                else:
                    kept.setdefault(ms, value)
                    taken += 1
        self.refusals += len(refused)
        if failure is not None:
            raise failure
        return Written(taken, tuple(refused))

    async def close(self) -> None: ...

    def points(self) -> dict[tuple[int, int], float]:
        """(series, minute) → value."""
        return {
            (int(dict(labels)["n"]), (ms // 1000 - NOON_S) // 60): value
            for labels, kept in self.stored.items()
            for ms, value in kept.items()
        }


class Names:
    """Everything goes to `mine` but what is named so; labels hold the series' number."""

    def receiver_of(self, series: Series, service: str) -> str:
        return "other" if series.key.metric == "theirs" else "mine"

    unknown: frozenset[Target] = frozenset()

    def known(self, target: Target, service: str) -> bool:
        return target not in self.unknown

    def labels_of(self, series: Series, service: str, target: Target) -> EncodedLabels:
        if series.key.metric == "nameless":
            raise Rejected("labels", "labels_taken")
        return encoded_labels((("__name__", "m"), ("n", dict(series.key.dimensions)["n"])))


def series_of(number: int, metric: str = "m") -> Series:
    return Series(
        SeriesKey(TARGET.account, TARGET.region, "AWS/EC2", metric, (("n", str(number)),), "Average", 60)
    )


def batch_of(points: Sequence[Point], observed_s: int, metric: str = "m", revision: int = 0) -> Batch:
    by_series: dict[int, list[tuple[int, float]]] = {}
    for number, minute, value in points:
        by_series.setdefault(number, []).append((NOON_S + 60 * minute, value))
    series = tuple(series_of(n, metric) for n in by_series)
    flat = [p for own in by_series.values() for p in own]
    return Batch(
        task_id="0" * 32,
        target=TARGET,
        service="ec2",
        observed_at_ms=observed_s * 1000,
        revision=revision,
        grid_s=300,
        series=series,
        counts=np.array([len(own) for own in by_series.values()], np.int32),
        timestamps_s=np.array([t for t, _ in flat], np.int64),
        values=np.array([v for _, v in flat], np.float64),
        ids=series_ids(series),
    )


class World:
    """A log of one partition, a forwarder that can be killed, and a receiver that outlives it."""

    def __init__(self, window_s: int = 0, settling_s: Mapping[str, int] | None = None) -> None:
        self.clock = ManualClock(NOON_S)
        self.window_s = window_s
        self.settling_s = {"ec2": SETTLING_S} if settling_s is None else settling_s
        self.receiver = FakeReceiver(window=window_s > 0)
        self.broker = FakeBroker(dead=1)
        self.sender = FakeSender(self.broker)
        self.log: list[Record] = []
        self.committed: tuple[int, str] = (0, "")
        self.tally = Tally()
        self.start()

    def start(self, bytes_max: int = 2**26) -> None:
        """A new process, from what is committed."""
        self.forwarder = Forwarder(
            "writer-1",
            "mine",
            self.window_s,
            self.settling_s,
            Names(),
            self.receiver,
            self.sender,
            ("raw", "dead"),
            Limits(),
            self.clock,
            self.tally,
            bytes_max=bytes_max,
        )
        self.forwarder.open({0: self.committed}, cluster="c")
        self.read = self.committed[0]

    def write(self, *points: Point, observed_s: int | None = None, metric: str = "m") -> None:
        batch = batch_of(points, self.clock.now_s() if observed_s is None else observed_s, metric)
        for payload in wire.encode_batch(batch):
            self.append(payload.value)

    def append(self, value: bytes) -> None:
        at = RecordPosition("raw", 0, len(self.log))
        self.log.append(Record(at, b"k", value, self.clock.now_ms()))

    async def go_on(self, records_max: int = 1_000) -> None:
        """Read what there is, at most so many records, and send what is due."""
        some = self.log[self.read : self.read + records_max]
        self.read += len(some)
        await self.forwarder.take(some)
        if self.read == len(self.log):
            self.forwarder.caught_up([0])
        while await self.forwarder.send():
            self.commit()
        self.commit()

    def commit(self) -> None:
        self.committed = self.forwarder.commits().get(0, self.committed)

    def dead(self) -> list[dict[str, object]]:
        letters = [wire.decode_dead_letter(r.value) for r in self.broker.records("dead")]
        return [{"reason": one.reason, "detail": one.detail, **orjson.loads(one.payload)} for one in letters]


async def test_without_a_window_a_point_is_sent_when_it_has_settled_and_not_before() -> None:
    world = World()
    world.write((1, -1, 5.0))
    await world.go_on()
    world.clock.advance(LAG_S - 61)
    await world.go_on()
    assert world.receiver.points() == {}
    assert world.committed[0] == 0
    world.clock.advance(1)
    await world.go_on()
    assert world.receiver.points() == {(1, -1): 5.0}
    assert world.committed[0] == 1
    assert world.tally.samples == 1


async def test_revisions_before_settling_win_and_later_ones_are_counted() -> None:
    world = World()
    world.write((1, 0, 5.0), (1, 1, 7.0))
    world.clock.advance(60)
    world.write((1, 0, 4.0))
    await world.go_on()
    world.clock.advance(LAG_S)
    await world.go_on()
    assert world.receiver.points() == {(1, 0): 4.0, (1, 1): 7.0}
    world.write((1, 0, 9.0), (1, 1, 7.0))
    await world.go_on()
    assert world.receiver.points() == {(1, 0): 4.0, (1, 1): 7.0}
    assert world.tally.refused["changed"] == 1


async def test_with_a_window_points_go_as_they_come_and_the_first_value_stays() -> None:
    world = World(window_s=7200)
    world.write((1, -1, 5.0))
    await world.go_on()
    world.write((1, -2, 3.0), (1, -1, 6.0))
    world.write((1, -1, 5.0))
    await world.go_on()
    assert world.receiver.points() == {(1, -1): 5.0, (1, -2): 3.0}
    assert +world.tally.refused == {"changed": 1}
    assert world.committed[0] == 3


async def test_what_is_behind_the_window_is_counted_and_never_sent() -> None:
    world = World(window_s=7200)
    world.write((1, -121, 1.0), (1, -119, 2.0), (1, -1, 3.0))
    await world.go_on()
    assert world.receiver.points() == {(1, -119): 2.0, (1, -1): 3.0}
    assert +world.tally.refused == {"too_old": 1}


async def test_behind_a_short_window_only_what_is_new_in_its_series_goes() -> None:
    world = World(window_s=600)
    world.write((1, -1, 3.0))
    await world.go_on()
    world.write((1, -20, 1.0), (2, -20, 2.0))
    await world.go_on()
    assert world.receiver.points() == {(1, -1): 3.0, (2, -20): 2.0}
    assert +world.tally.refused == {"too_old": 1}


async def test_series_of_other_receivers_are_passed_over() -> None:
    world = World(window_s=7200)
    world.write((1, 0, 1.0), metric="theirs")
    world.write((2, 0, 2.0))
    await world.go_on()
    assert world.receiver.points() == {(2, 0): 2.0}
    assert world.committed[0] == 2


async def test_bad_records_bad_points_and_series_without_a_name_are_counted_and_stop_nobody() -> None:
    world = World(window_s=7200)
    world.append(b"rubbish")
    world.write((1, 0, float("nan")), (1, 1, 2.0))
    world.write((1, 0, 1.0), metric="nameless")
    await world.go_on()
    assert world.receiver.points() == {(1, 1): 2.0}
    assert +world.tally.refused == {"bad_record": 1, "not_a_number": 1, "labels_taken": 1}
    assert world.committed[0] == 3
    assert world.dead() == []


async def test_what_the_receiver_refuses_is_a_dead_letter_before_its_record_is_committed() -> None:
    world = World(window_s=7200)
    world.receiver.bad = {2.0}
    world.write((1, 0, 1.0), (1, 1, 2.0))
    world.sender.failures = [Transient("dead", "away")]
    with pytest.raises(Transient):
        await world.go_on()
    assert world.committed[0] == 0
    await world.go_on()
    assert world.committed[0] == 1
    assert world.receiver.points() == {(1, 0): 1.0}
    assert +world.tally.refused == {"refused": 1}
    assert (world.tally.samples, int(world.tally.delays.sum())) == (1, 1)
    assert world.dead() == [
        {
            "reason": "refused_by_receiver",
            "detail": "mine says refused: no",
            "points": [[NOON_S + 60, "2.0"]],
        }
    ]


async def test_a_receiver_that_is_away_gets_the_same_samples_when_it_is_back() -> None:
    world = World(window_s=7200)
    world.write((1, 0, 1.0))
    world.receiver.failures = [Transient("receiver", "away"), Transient("receiver", "away")]
    for _ in range(2):
        with pytest.raises(Transient):
            await world.go_on()
    assert world.committed[0] == 0
    await world.go_on()
    assert world.receiver.points() == {(1, 0): 1.0}
    assert world.receiver.writes == [1, 1, 1]


async def test_a_backlog_is_read_before_what_settled_long_ago_is_sent() -> None:
    world = World()
    world.write((1, 0, 1.0))
    world.clock.advance(60)
    world.write((1, 0, 2.0), (1, 1, 3.0))
    world.clock.advance(1800)
    await world.go_on(records_max=1)
    assert world.receiver.points() == {}
    await world.go_on()
    assert world.receiver.points() == {(1, 0): 2.0, (1, 1): 3.0}


async def test_past_its_bytes_it_is_full_and_what_has_settled_makes_room() -> None:
    world = World()
    world.start(bytes_max=2**20)
    for minute in range(-60, 10):
        world.write((1, minute, float(minute)))
    await world.forwarder.take(world.log)
    assert world.forwarder.full
    world.read = len(world.log)
    await world.go_on()
    assert not world.forwarder.full
    assert len(world.receiver.points()) == 60 - 3 + 1


async def looked(world: World, minutes: int) -> None:
    """Live: a look each minute, which has the last five again."""
    for minute in range(minutes):
        world.write(*((n, minute - ago, float(minute - ago)) for n in (1, 2) for ago in range(5)))
        world.clock.advance(60)
        await world.go_on()


async def test_a_restart_sends_nothing_twice_that_the_note_says_was_sent() -> None:
    world = World()
    await looked(world, 10)
    before = dict(world.receiver.points())
    assert len(before) == 2 * (4 + 10 - 2)
    assert world.committed[0] < len(world.log)
    world.start()
    world.receiver.writes.clear()
    await world.go_on()
    assert (world.receiver.points(), world.receiver.writes) == (before, [])
    world.clock.advance(LAG_S)
    await world.go_on()
    assert len(world.receiver.points()) == 2 * (4 + 10)
    assert (world.receiver.refusals, +world.tally.refused) == (0, {})


async def test_what_comes_late_and_is_cut_short_does_not_weaken_the_note_of_before() -> None:
    world = World()
    await looked(world, 10)
    world.write((3, -10, 1.0), (3, -9, 2.0))
    world.receiver.failures = [None, Transient("receiver", "away")]
    with pytest.raises(Transient):
        await world.go_on()
    assert (3, -10) in world.receiver.points()
    world.start()
    await world.go_on()
    assert world.receiver.points()[3, -9] == 2.0
    # Only the late point that it has goes to it again: what the committed note knows nothing of.
    assert world.receiver.refusals == 0


async def test_a_point_that_comes_after_a_restart_is_not_taken_for_one_that_was_sent_before() -> None:
    world = World()
    await looked(world, 10)
    world.start()
    world.write((3, 0, 7.0))
    await world.go_on()
    assert world.receiver.points()[3, 0] == 7.0


def test_a_note_says_what_it_was_told_and_fits_beside_an_offset() -> None:
    note = Note(NOON_S, 17, {"ec2": 600, "s3": 345_600}, "writer-1", NOON_S - 60, 5, 6)
    assert Note.read(note.write()) == note
    many = Note(NOON_S, 17, {f"service-{i:056}": i for i in range(200)})
    assert len(many.write()) < 4096
    assert Note.read("") is Note.read("[]") is Note.read('{"sent_s": 1}') is None


Steps = list[tuple[str, object]]

_POINT = st.tuples(st.integers(0, 2), st.integers(-3, 6), st.integers(0, 3).map(float))
_STEP = st.one_of(
    st.tuples(st.just("record"), st.lists(_POINT, min_size=1, max_size=5)),
    st.tuples(st.just("again"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.integers(1, 200)),
    st.tuples(st.just("read"), st.integers(1, 4)),
    st.tuples(st.just("kill"), st.none()),
    st.tuples(st.just("away"), st.none()),
    st.tuples(st.just("answer lost"), st.none()),
)


async def follow(world: World, steps: Steps) -> None:
    for what, argument in steps:
        if isinstance(argument, list):
            world.write(*argument)
        elif what == "again" and isinstance(argument, int) and world.log:
            world.append(world.log[argument % len(world.log)].value)
        elif what == "wait" and isinstance(argument, int):
            world.clock.advance(argument)
        elif what == "read" and isinstance(argument, int):
            with contextlib.suppress(Transient):
                await world.go_on(argument)
        elif what == "kill":
            world.start()
        elif what in ("away", "answer lost"):
            world.receiver.failures = [Transient("receiver", what)]
    world.receiver.failures = []
    world.clock.advance(LAG_S + 600)
    await world.go_on()
    world.clock.advance(1)
    await world.go_on()


def known(log: Sequence[Record]) -> dict[tuple[int, int], list[float]]:
    """By point that came before it settled: the greatest value that was known when it settled, and those known after later records."""
    greatest: dict[tuple[int, int], tuple[int, float]] = {}
    values: dict[tuple[int, int], list[float]] = {}
    for record in log:
        batch = wire.decode_batch(record.value, Limits())
        owners = np.repeat(np.arange(len(batch.series)), batch.counts).tolist()
        for owner, t, value in zip(owners, batch.timestamps_s.tolist(), batch.values.tolist(), strict=True):
            point = int(dict(batch.series[owner].key.dimensions)["n"]), (t - NOON_S) // 60
            greatest[point] = max(greatest.get(point, (0, 0.0)), (batch.version, value))
            if record.timestamp_ms < 1000 * (t + LAG_S):
                values[point] = [greatest[point][1]]
            elif point in values:
                values[point].append(greatest[point][1])
    return values


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(_STEP, max_size=40))
async def test_each_settled_point_is_sent_once_and_is_the_greatest_known_when_it_settled(
    steps: Steps,
) -> None:
    world = World()
    await follow(world, steps)
    sent = world.receiver.points()
    wrong = {
        point: (sent.get(point), values)
        for point, values in known(world.log).items()
        if sent.get(point) not in values
    }
    assert wrong == {}
    assert world.committed[0] == len(world.log)
    if ("answer lost", None) not in steps:
        # In order, and none twice: whatever way it went, this receiver was never asked to take what it has to refuse.
        assert world.receiver.refusals == 0


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(_STEP, max_size=40))
async def test_with_a_window_every_point_is_there_with_the_first_value_that_was_sent(steps: Steps) -> None:
    world = World(window_s=7200)
    await follow(world, steps)
    values: dict[tuple[int, int], set[float]] = {}
    for record in world.log:
        batch = wire.decode_batch(record.value, Limits())
        owners = np.repeat(np.arange(len(batch.series)), batch.counts).tolist()
        for owner, t, value in zip(owners, batch.timestamps_s.tolist(), batch.values.tolist(), strict=True):
            point = int(dict(batch.series[owner].key.dimensions)["n"]), (t - NOON_S) // 60
            values.setdefault(point, set()).add(value)
    sent = world.receiver.points()
    assert sent.keys() == values.keys()
    assert all(value in values[point] for point, value in sent.items())
    assert world.committed[0] == len(world.log)
