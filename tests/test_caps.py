"""Caps: what is at a limit passes, what is one beyond goes to the dead letters with its reason, is counted, and costs no memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import zstandard

from ingest import wire
from ingest.clock import ManualClock
from ingest.landing import Landing
from ingest.log import Outgoing
from ingest.model import Batch, Series, SeriesKey, series_ids
from ingest.validate import DEAD_POINTS_MAX, series_problem
from shard_config.model import Limits
from tests.fake_log import FakeBroker, FakeSender
from tests.test_landing import NOON_S, TARGET, FakeSink

WIDE = Limits()
LABELS = (("a", "1"), ("b", "2"))


def batch_of(
    series: int = 1, points: int = 1, dimensions: tuple[tuple[str, str], ...] = (), metric: str = "m"
) -> Batch:
    """So many series of so many points each."""
    keys = [
        SeriesKey(TARGET.account, TARGET.region, "AWS/EC2", f"{metric}{n or ''}", dimensions, "Average", 60)
        for n in range(series)
    ]
    found = tuple(Series(key) for key in keys)
    times = np.tile(np.arange(points, dtype=np.int64) * 60 + NOON_S - 3600, series)
    return Batch(
        "0" * 32, TARGET, "ec2", NOON_S * 1000, 0, 300, found, np.full(series, points, np.int32), times,
        np.arange(series * points, dtype=np.float64) * 1.1, series_ids(found),
    )  # fmt: skip


def value_of(batch: Batch) -> bytes:
    [payload] = wire.encode_batch(batch, WIDE)
    return payload.value


def decoded_bytes(value: bytes) -> int:
    return zstandard.frame_content_size(value)


TEN = value_of(batch_of(10, 10))
CAPS: dict[str, tuple[Limits, Callable[[], bytes], Callable[[], bytes], str]] = {
    "bytes of a value": (
        Limits(payload_bytes_max=len(TEN)), lambda: TEN, lambda: TEN + b"\0", "payload_too_large",
    ),
    "decoded bytes": (
        Limits(decoded_bytes_max=max(decoded_bytes(TEN), decoded_bytes(value_of(batch_of(10, 11))) - 1)),
        lambda: TEN, lambda: value_of(batch_of(10, 11)), "decoded_too_large",
    ),
    "series of a batch": (
        Limits(series_per_batch_max=5), lambda: value_of(batch_of(5)), lambda: value_of(batch_of(6)), "too_many_series",
    ),
    "points of a batch": (
        Limits(points_per_batch_max=20), lambda: value_of(batch_of(2, 10)), lambda: value_of(batch_of(3, 7)), "too_many_points",
    ),
    "labels of a series": (
        Limits(dimensions_max=2),
        lambda: value_of(batch_of(dimensions=LABELS)), lambda: value_of(batch_of(dimensions=(*LABELS, ("c", "3")))), "too_many_dimensions",
    ),
    "length of a value": (
        Limits(label_bytes_max=40),
        lambda: value_of(batch_of(dimensions=(("a", "x" * 40),))), lambda: value_of(batch_of(dimensions=(("a", "x" * 41),))), "label_too_long",
    ),
    "length of a label's name": (
        Limits(label_bytes_max=40),
        lambda: value_of(batch_of(dimensions=(("x" * 40, "1"),))), lambda: value_of(batch_of(dimensions=(("x" * 41, "1"),))), "label_too_long",
    ),
    "length of a name": (
        Limits(label_bytes_max=40),
        lambda: value_of(batch_of(metric="ü" * 20)), lambda: value_of(batch_of(metric="ü" * 20 + "x")), "label_too_long",
    ),
}  # fmt: skip
"""By cap: limits, a value at the limit, one beyond it, and the reason."""


class World:
    def __init__(self, limits: Limits) -> None:
        self.broker = FakeBroker(raw=1, dead=1)
        self.sink = FakeSink(1)
        self.landing = Landing("raw", "dead", self.sink, FakeSender(self.broker), limits, ManualClock(NOON_S))

    async def land(self, *values: bytes) -> tuple[int, int]:
        """(dead records, dead points), as the consumer counts them in headgate_dead_letters_total."""
        await self.landing.open([0], {0: self.broker.bounds("raw", 0)})
        for value in values:
            self.broker.append("raw", Outgoing(b"k", value, 0))
        done = await self.landing.land(self.broker.records("raw"))
        return done.dead_records, done.dead_points

    def reasons(self) -> list[str]:
        return [wire.decode_dead_letter(r.value).reason for r in self.broker.records("dead")]


@pytest.mark.parametrize("cap", CAPS)
async def test_what_is_at_a_cap_lands_whole(cap: str) -> None:
    limits, at, _, _ = CAPS[cap]
    world = World(limits)
    assert await world.land(at()) == (0, 0)
    assert world.reasons() == []
    assert len(world.sink.values()) == wire.decode_batch(at(), WIDE).points


@pytest.mark.parametrize("cap", CAPS)
async def test_what_is_one_beyond_a_cap_is_put_aside_with_its_reason_and_what_is_beside_it_lands(
    cap: str,
) -> None:
    limits, at, beyond, reason = CAPS[cap]
    world = World(limits)
    assert sum(await world.land(at(), beyond(), at())) == 1
    assert world.reasons() == [reason]
    assert len(world.sink.landings) == 1
    assert sum(b.batch.points for b in world.sink.landings[0]) >= 2 * wire.decode_batch(at(), WIDE).points


async def test_a_writer_keeps_within_the_caps_by_itself() -> None:
    limits = Limits(series_per_batch_max=3, points_per_batch_max=7, payload_bytes_max=600)
    values = [p.value for p in wire.encode_batch(batch_of(10, 10), limits)]
    world = World(limits)
    assert await world.land(*values) == (0, 0)
    assert len(world.sink.values()) == 100


async def test_a_million_bad_points_are_a_thousand_letters_and_a_number() -> None:
    batch = batch_of(5, 20_000)
    world = World(WIDE)
    values = [p.value for p in wire.encode_batch(replace(batch, values=np.full(batch.points, np.nan)), WIDE)]
    _, dead_points = await world.land(*values)
    assert dead_points == batch.points
    assert len(world.reasons()) == len(values) * (DEAD_POINTS_MAX + 1)


def with_labels(count: int) -> Batch:
    return batch_of(dimensions=tuple((f"k{i:07}", "v") for i in range(count)))


def test_a_million_labels_are_refused_without_looking_at_each() -> None:
    many = (("k", "v"),) * 1_000_000
    series = Series(SeriesKey(TARGET.account, TARGET.region, "AWS/EC2", "m", many, "Average", 60))
    tracemalloc.start()
    try:
        assert series_problem(series, WIDE) == "too_many_dimensions"
        assert tracemalloc.get_traced_memory()[1] < 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("labels", "reason"), [(40_000, "too_many_dimensions"), (250_000, "payload_too_large")]
)
async def test_a_series_of_very_many_labels_is_refused_within_bounded_memory(
    labels: int, reason: str
) -> None:
    # As somebody who keeps to no cap would write it.
    none = Limits(
        dimensions_max=2**30, decoded_bytes_max=2**31, payload_bytes_max=2**31, label_bytes_max=2**20
    )
    value = wire.encode_batch(with_labels(labels), none)[0].value
    world = World(WIDE)
    tracemalloc.start()
    try:
        assert sum(await world.land(TEN, value, TEN)) == 1
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert world.reasons() == [reason]
    assert len(world.sink.values()) >= 200
