"""Validation: bad points go, good points stay, and the balance holds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import wire
from ingest.errors import Rejected
from ingest.model import Batch, BatchId, RecordPosition, Series, SeriesKey, Target, series_ids, window_counts
from ingest.validate import (
    DEAD_POINTS_MAX,
    DeadPoint,
    Reason,
    describe,
    series_problem,
    text_problem,
    validate,
)
from shard_config.model import Limits

LIMITS = Limits(future_s_max=600, retention_s=86_400)
NOW_S = 1_767_225_600


def series_of(name: str, *dimensions: tuple[str, str], period_s: int = 60) -> Series:
    return Series(
        SeriesKey("123456789012", "eu-west-1", "AWS/EC2", name, tuple(dimensions), "Average", period_s)
    )


def batch_of(*points_of_series: list[tuple[int, float]]) -> Batch:
    series = tuple(series_of(f"m{n}") for n in range(len(points_of_series)))
    points = [point for points in points_of_series for point in points]
    return Batch(
        task_id="00112233445566778899aabbccddeeff",
        target=Target("cloudwatch", "123456789012", "eu-west-1"),
        service="ec2",
        observed_at_ms=NOW_S * 1000,
        revision=0,
        grid_s=300,
        series=series,
        counts=np.array([len(points) for points in points_of_series], np.int32),
        timestamps_s=np.array([timestamp_s for timestamp_s, _ in points], np.int64),
        values=np.array([value for _, value in points], np.float64),
        ids=series_ids(series),
    )


def points_of(batch: Batch | None) -> list[tuple[str, int, float]]:
    if batch is None:
        return []
    owners = np.repeat(np.arange(len(batch.series)), batch.counts)
    return [
        (batch.series[owner].key.metric, timestamp_s, value)
        for owner, timestamp_s, value in zip(
            owners.tolist(), batch.timestamps_s.tolist(), batch.values.tolist(), strict=True
        )
    ]


def test_a_good_batch_goes_on_as_it_is() -> None:
    batch = batch_of([(NOW_S, 1.0), (NOW_S - 60, 2.0)], [(NOW_S, 3.0)])

    validated = validate(batch, NOW_S, LIMITS)

    assert validated.accepted is batch
    assert validated.dead == ()


@pytest.mark.parametrize(
    ("timestamp_s", "value", "reason"),
    [
        (NOW_S, math.nan, Reason.NOT_A_NUMBER),
        (NOW_S, math.inf, Reason.INFINITE),
        (NOW_S, -math.inf, Reason.INFINITE),
        (NOW_S + 601, 1.0, Reason.FUTURE),
        (NOW_S - 86_401, 1.0, Reason.ANCIENT),
        (-1, 1.0, Reason.BAD_TIMESTAMP),
        (253_402_300_800, 1.0, Reason.BAD_TIMESTAMP),
        (-1, math.nan, Reason.BAD_TIMESTAMP),
        (NOW_S + 601, math.nan, Reason.FUTURE),
    ],
)
def test_a_bad_point_is_put_aside_with_its_reason_and_the_rest_goes_on(
    timestamp_s: int, value: float, reason: Reason
) -> None:
    batch = batch_of([(NOW_S, 1.0)], [(NOW_S, 2.0), (timestamp_s, value), (NOW_S, 3.0)])

    validated = validate(batch, NOW_S, LIMITS)

    (dead,) = validated.dead
    assert (dead.reason, dead.series, dead.timestamp_s, dead.count) == (
        reason,
        batch.series[1],
        timestamp_s,
        1,
    )
    assert repr(dead.value) == repr(value)
    assert points_of(validated.accepted) == [("m0", NOW_S, 1.0), ("m1", NOW_S, 2.0), ("m1", NOW_S, 3.0)]


@pytest.mark.parametrize("timestamp_s", [NOW_S + 600, NOW_S - 86_400])
def test_the_bounds_themselves_are_let_in(timestamp_s: int) -> None:
    assert validate(batch_of([(timestamp_s, 1.0)]), NOW_S, LIMITS).dead == ()


@pytest.mark.parametrize("value", [5e-324, -5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 0.0])
def test_every_finite_value_is_let_in_unchanged(value: float) -> None:
    accepted = validate(batch_of([(NOW_S, value)]), NOW_S, LIMITS).accepted

    assert accepted is not None
    assert accepted.values.tolist() == [value]


def test_a_series_that_is_left_without_points_stays_with_a_count_of_zero() -> None:
    batch = batch_of([(NOW_S, 1.0)], [(NOW_S, math.nan)], [(NOW_S, 2.0)])

    accepted = validate(batch, NOW_S, LIMITS).accepted

    assert accepted is not None
    assert accepted.series is batch.series
    assert accepted.ids is batch.ids
    assert accepted.counts.tolist() == [1, 0, 1]
    assert accepted.counts.dtype == np.int32


def test_series_without_points_before_and_between_do_not_shift_whose_a_dead_point_is() -> None:
    batch = batch_of([], [(NOW_S, 1.0)], [], [], [(NOW_S, math.nan)], [])

    (dead,) = validate(batch, NOW_S, LIMITS).dead

    assert dead.series is batch.series[4]


def test_nothing_is_accepted_of_a_batch_without_good_points() -> None:
    assert validate(batch_of([(NOW_S, math.nan)]), NOW_S, LIMITS).accepted is None
    assert validate(batch_of([], []), NOW_S, LIMITS).accepted is None
    assert validate(batch_of([], []), NOW_S, LIMITS).dead == ()


def test_minus_zero_becomes_zero_and_the_given_batch_is_not_changed() -> None:
    batch = batch_of([(NOW_S, -0.0), (NOW_S, math.nan), (NOW_S, -1.0)])

    accepted = validate(batch, NOW_S, LIMITS).accepted

    assert accepted is not None
    assert [math.copysign(1, value) for value in accepted.values] == [1.0, -1.0]
    assert math.copysign(1, batch.values[0]) == -1.0


def test_normalising_does_not_change_a_windows_digest() -> None:
    batch = batch_of([(NOW_S, -0.0), (NOW_S, 1.0)])

    accepted = validate(batch, NOW_S, LIMITS).accepted

    assert accepted is not None
    before, after = (
        window_counts(b.point_ids(), b.timestamps_s, b.values, b.grid_s) for b in (batch, accepted)
    )
    assert before == after


def test_a_batch_fresh_from_the_wire_whose_arrays_are_read_only_is_validated() -> None:
    batch = batch_of([(NOW_S, -0.0), (NOW_S, math.nan)])
    decoded = wire.decode_batch(wire.encode_batch(batch)[0].value, Limits())

    validated = validate(decoded, NOW_S, LIMITS)

    assert points_of(validated.accepted) == [("m0", NOW_S, 0.0)]
    assert validated.dead_points == 1


def test_dead_points_beyond_the_cap_are_counted_in_one_more_entry() -> None:
    batch = batch_of([(NOW_S, math.nan)] * (DEAD_POINTS_MAX + 7) + [(NOW_S, 1.0)])

    validated = validate(batch, NOW_S, LIMITS)

    assert len(validated.dead) == DEAD_POINTS_MAX + 1
    assert validated.dead[-1] == DeadPoint(Reason.MORE, None, 0, 0.0, 7)
    assert validated.dead_points == DEAD_POINTS_MAX + 7


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([-1, 0, NOW_S, NOW_S - 86_401, NOW_S + 601]),
                st.floats(width=64) | st.just(-0.0),
            ),
            max_size=5,
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=150, deadline=None)
def test_every_point_is_either_accepted_or_dead_and_what_is_accepted_stays_accepted(
    points: list[list[tuple[int, float]]],
) -> None:
    batch = batch_of(*points)

    validated = validate(batch, NOW_S, LIMITS)

    dead = [
        (d.series.key.metric, d.timestamp_s, repr(d.value)) for d in validated.dead if d.series is not None
    ]
    accepted = [(metric, at, repr(value)) for metric, at, value in points_of(validated.accepted)]
    given_points = [
        (metric, at, repr(value + 0.0 if at == NOW_S else value)) for metric, at, value in points_of(batch)
    ]
    # A dead point keeps the value it had; an accepted one has no −0.
    assert sorted(dead + accepted) == sorted(given_points)
    if validated.accepted is not None:
        assert validate(validated.accepted, NOW_S, LIMITS).accepted is validated.accepted


# --- dead letters ---------------------------------------------------------------------------------------------

ORIGIN = RecordPosition("headgate.raw", 3, 42)
BATCH_ID = BatchId(bytes(16))


def test_a_dead_point_says_in_json_what_it_was() -> None:
    letter = DeadPoint(Reason.NOT_A_NUMBER, series_of("m", ("InstanceId", "i-1")), NOW_S, math.nan).letter(
        ORIGIN, BATCH_ID
    )

    assert letter.reason == "not_a_number"
    assert letter.series == "123456789012/eu-west-1 AWS/EC2/m{InstanceId=i-1} Average 60s"
    assert orjson.loads(letter.payload) == {"timestamp_s": NOW_S, "value": "nan"}
    assert wire.decode_dead_letter(wire.encode_dead_letter(letter)) == letter


def test_the_entry_for_the_rest_says_how_many() -> None:
    letter = DeadPoint(Reason.MORE, None, 0, 0.0, 7).letter(ORIGIN, BATCH_ID)

    assert (letter.reason, letter.series, orjson.loads(letter.payload)) == ("more", "", {"count": 7})


def test_validating_the_same_batch_twice_gives_letters_of_the_same_identities() -> None:
    batch = batch_of([(NOW_S, math.nan), (NOW_S + 601, 1.0)])

    first, second = (
        [dead.letter(ORIGIN, BATCH_ID).identity for dead in validate(batch, NOW_S, LIMITS).dead]
        for _ in range(2)
    )

    assert first == second
    assert len(set(first)) == 2


# --- labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("series", "problem"),
    [
        (series_of("CPUUtilization", ("InstanceId", "i-1")), None),
        (series_of("Größe ✓ 🙂"), None),
        (series_of("a\x00b"), Reason.CONTROL_CHARACTER),
        (series_of("a", ("b", "c\n")), Reason.CONTROL_CHARACTER),
        (series_of("a", ("b\x85", "c")), Reason.CONTROL_CHARACTER),
        (series_of("\udfff"), Reason.CONTROL_CHARACTER),
        (replace(series_of("a"), unit="\x7f"), Reason.CONTROL_CHARACTER),
        (series_of("a", ("b", "x" * 4097)), Reason.LABEL_TOO_LONG),
        (series_of("a", ("x", "1"), ("x", "1")), Reason.DUPLICATE_DIMENSION),
        (series_of("a", ("y", "1"), ("x", "1"), ("y", "2")), Reason.DUPLICATE_DIMENSION),
        (series_of("a", ("y", "1"), ("x", "1")), Reason.UNSORTED_DIMENSIONS),
        (series_of("a", *((f"{n:02}", "") for n in range(65))), Reason.TOO_MANY_DIMENSIONS),
        (series_of("a", period_s=-1), Reason.OUT_OF_RANGE),
        (series_of("a", period_s=2**31), Reason.OUT_OF_RANGE),
    ],
)
def test_a_series_that_cannot_travel_is_known_before_it_is_sent(
    series: Series, problem: Reason | None
) -> None:
    batch = replace(batch_of([(NOW_S, 1.0)]), series=(series,))

    assert series_problem(series, Limits()) == problem
    if problem is None:
        assert wire.decode_batch(wire.encode_batch(batch)[0].value, Limits()).series == (series,)
    else:
        with pytest.raises(Rejected) as refused:
            wire.encode_batch(batch)
        assert refused.value.reason == problem


@pytest.mark.parametrize(("text", "problem"), [("ü" * 2048, None), ("ü" * 2049, Reason.LABEL_TOO_LONG)])
def test_a_labels_cap_counts_bytes(text: str, problem: Reason | None) -> None:
    assert text_problem(text, Limits(label_bytes_max=4096)) == problem


def test_a_series_is_described_without_dimensions_too() -> None:
    assert describe(series_of("m", period_s=300)) == "123456789012/eu-west-1 AWS/EC2/m{} Average 300s"
