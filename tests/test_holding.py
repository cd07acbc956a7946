"""Points that wait: the greatest of each is due once and in order, room is counted and given back, and rows of series that went are used again."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.forwarded import Progress
from ingest.holding import BLOCK, REMEMBERED_S, STALE_S, Added, Due, Holding, Lane
from ingest.model import Series, SeriesKey, Target, series_ids

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
NOON_S = 1_767_268_800
LAG_S = 60 + 120


def rows_of(lane: Lane, *numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    series = [Series(SeriesKey("1", "r", "N", f"m{n}", (), "Average", 60)) for n in numbers]
    return lane.rows(series_ids(tuple(series)), series, TARGET)


def add(holding: Holding, lane: Lane, *points: tuple[int, int, float], version: int = 1) -> Added:
    """Points of (series, seconds from noon, value)."""
    numbers, seconds, values = zip(*points, strict=True)
    return holding.add(
        lane, rows_of(lane, *numbers), NOON_S + np.array(seconds), np.array(values, np.float64), version
    )


def drain(holding: Holding, now_s: int, points_max: int = 10**6) -> list[tuple[int, int, float]]:
    """What is due, sent: (row, seconds from noon, value), in the order in which it went."""
    went: list[tuple[int, int, float]] = []
    while (found := holding.due(now_s, points_max)) is not None:
        for due in found[1]:
            went += zip(
                due.rows.tolist(), (due.timestamps_s - NOON_S).tolist(), due.values.tolist(), strict=True
            )
            holding.sent(due)
    return went


def scene(window_s: int = 0, bytes_max: int = 2**30) -> tuple[Holding, Lane]:
    holding = Holding(window_s, bytes_max)
    return holding, holding.lane("ec2", 60, 120)


def test_the_greatest_version_wins_and_of_one_version_the_greatest_value() -> None:
    holding, lane = scene()
    add(holding, lane, (1, 0, 5.0), version=2)
    add(holding, lane, (1, 0, 9.0), version=1)
    add(holding, lane, (1, 0, 7.0), version=2)
    add(holding, lane, (1, 0, 6.0), version=2)
    assert holding.held == 1
    assert drain(holding, NOON_S + LAG_S) == [(0, 0, 7.0)]
    assert holding.held == 0


def test_a_timestamp_that_repeats_within_a_look_has_its_greatest_value() -> None:
    holding, lane = scene()
    add(holding, lane, (1, 0, 5.0), (2, 0, 1.0), (1, 0, 8.0), (1, 0, 6.0))
    assert drain(holding, NOON_S + LAG_S) == [(0, 0, 8.0), (1, 0, 1.0)]


def test_one_moment_at_a_time_is_due_over_all_lanes_the_earliest_first() -> None:
    holding, slow = scene()
    fast = holding.lane("s3", 60, 0)
    add(holding, slow, (1, 0, 1.0), (1, 60, 2.0))
    add(holding, fast, (1, 120, 3.0), (1, 60, 4.0))
    found = holding.due(NOON_S + 10_000, 100)
    assert found is not None
    due_s, dues = found
    assert due_s == NOON_S + 120
    assert [(due.lane.service, due.timestamps_s.tolist()) for due in dues] == [("s3", [NOON_S + 60])]
    assert holding.next_due_s == due_s
    holding.sent(dues[0])
    assert holding.next_due_s == NOON_S + 180
    both = holding.due(NOON_S + 10_000, 100)
    assert both is not None
    assert {due.lane.service for due in both[1]} == {"ec2", "s3"}


def test_more_series_than_a_block_has_are_due_in_pieces_and_none_is_lost() -> None:
    holding, lane = scene()
    numbers = range(3 * BLOCK + 7)
    add(holding, lane, *((n, 0, float(n)) for n in numbers))
    found = holding.due(NOON_S + LAG_S, 10)
    assert found is not None
    assert [len(due.rows) for due in found[1]] == [BLOCK]
    went = drain(holding, NOON_S + LAG_S, 10)
    assert went == [(n, 0, float(n)) for n in numbers]


def test_what_was_sent_makes_room_when_it_is_forgotten_or_needed() -> None:
    holding, lane = scene(bytes_max=16 * BLOCK)
    add(holding, lane, (1, 0, 1.0))
    assert not holding.full
    add(holding, lane, (1, 60, 1.0))
    assert holding.full
    drain(holding, NOON_S + LAG_S)
    assert not holding.full
    assert lane.blocks.keys() == {NOON_S + 60}
    drain(holding, NOON_S + 60 + LAG_S)
    holding.forget(NOON_S + 60 + LAG_S + REMEMBERED_S)
    assert lane.blocks.keys() == {NOON_S + 60}
    holding.forget(NOON_S + 60 + LAG_S + REMEMBERED_S + 1)
    assert lane.blocks == {}


def test_the_row_of_a_series_that_went_is_used_again_and_knows_nothing_of_it() -> None:
    holding, lane = scene(window_s=7200)
    add(holding, lane, (1, 0, 1.0), (2, 0, 2.0))
    lane.met(rows_of(lane, 1, 2), None, NOON_S)
    drain(holding, NOON_S)
    later_s = STALE_S + 1
    lane.met(rows_of(lane, 2), None, NOON_S + later_s)
    assert holding.forget(NOON_S + later_s) == 1
    assert rows_of(lane, 3).tolist() == [0]
    assert lane.members[0].series.key.metric == "m3"
    assert add(holding, lane, (3, 0, 5.0)).changed == 0
    assert drain(holding, NOON_S + later_s) == [(0, 0, 5.0)]


def test_a_series_with_points_that_wait_is_not_forgotten() -> None:
    holding, lane = scene()
    lane.met(rows_of(lane, 1), None, NOON_S)
    add(holding, lane, (1, 0, 1.0))
    assert holding.forget(NOON_S + 10 * STALE_S) == 0
    assert drain(holding, NOON_S + LAG_S) == [(0, 0, 1.0)]


def test_progress_stands_at_the_oldest_record_that_is_not_done_with() -> None:
    progress = Progress(5)
    for offset, due_s in ((5, None), (6, 200), (7, 100), (9, None)):
        progress.taken(offset, due_s)
    assert (progress.next, progress.commit) == (10, 6)
    progress.sent(150)
    assert progress.commit == 6
    progress.sent(200)
    assert progress.commit == 10


_POINT = st.tuples(
    st.integers(0, 1030), st.integers(0, 5).map(lambda n: 60 * n), st.integers(0, 3).map(float)
)


@settings(max_examples=60, deadline=None)
@given(looks=st.lists(st.tuples(st.lists(_POINT, min_size=1, max_size=8), st.integers(1, 3)), max_size=8))
def test_whatever_the_order_what_is_due_is_the_greatest_of_each_point_and_held_says_how_many(
    looks: list[tuple[list[tuple[int, int, float]], int]],
) -> None:
    holding, lane = scene()
    rows_of(lane, *range(1031))
    best: dict[tuple[int, int], tuple[int, float]] = {}
    for points, version in looks:
        add(holding, lane, *points, version=version)
        for n, second, value in points:
            best[n, second] = max(best.get((n, second), (0, 0.0)), (version, value))
    assert holding.held == len(best)
    went = drain(holding, NOON_S + 10_000, points_max=3)
    assert {(n, second): value for n, second, value in went} == {k: v for k, (_, v) in best.items()}
    assert len(went) == len(best)
    for n in {n for n, _, _ in went}:
        seconds = [second for row, second, _ in went if row == n]
        assert seconds == sorted(seconds)


def test_a_due_of_some_is_only_those() -> None:
    holding, lane = scene()
    add(holding, lane, (1, 0, 1.0), (2, 0, 2.0))
    found = holding.due(NOON_S + LAG_S, 10)
    assert found is not None
    [due] = found[1]
    some: Due = due.only(due.values > 1.5)
    assert (some.rows.tolist(), some.values.tolist()) == ([1], [2.0])
