"""Where a reader goes on, and when it refuses to."""

from __future__ import annotations

import pytest

from ingest.errors import Fatal
from ingest.model import RecordPosition
from ingest.ports import Advance, Record, StoredPosition
from ingest.positions import Positions, value_id

TOPIC = "t.raw"


def record(offset: int, partition: int = 0, value: bytes | None = None) -> Record:
    return Record(
        RecordPosition(TOPIC, partition, offset), b"k", f"v{offset}".encode() if value is None else value, 0
    )


def stored(next_offset: int) -> StoredPosition:
    """A position behind record(next_offset - 1)."""
    return StoredPosition(next_offset, value_id(f"v{next_offset - 1}".encode()) if next_offset else b"")


def opened(next_offset: int, first: int = 0, end: int = 100) -> Positions:
    positions = Positions(TOPIC)
    positions.open([0], {0: stored(next_offset)}, {0: (first, end)})
    return positions


def offsets(records: list[Record]) -> list[int]:
    return [r.position.offset for r in records]


def test_reading_starts_at_the_record_before_the_position_so_that_it_can_be_compared() -> None:
    starts = Positions(TOPIC).open(
        [0, 1, 2],
        {0: stored(0), 1: stored(5), 2: stored(5)},
        {0: (0, 9), 1: (0, 9), 2: (5, 9)},
    )
    # Partition 2: retention took the record before.
    assert starts == {0: 0, 1: 4, 2: 5}


def test_the_compared_record_is_not_taken_up_again_and_those_after_it_are() -> None:
    positions = opened(5)
    assert offsets(positions.fresh([record(4), record(5), record(6)])) == [5, 6]
    assert offsets(positions.fresh([record(7)])) == [7]


def test_another_record_before_the_position_is_a_topic_created_again() -> None:
    positions = opened(5)
    with pytest.raises(Fatal, match=r"record 4 is not the one that landed.*created again"):
        positions.fresh([record(4, value=b"another")])


def test_nothing_is_taken_up_before_the_record_before_the_position_was_seen() -> None:
    positions = opened(5)
    with pytest.raises(Fatal, match="record 4 before the position did not come"):
        positions.fresh([record(5)])


@pytest.mark.parametrize(("next_offset", "first", "end"), [(5, 6, 9), (5, 0, 4), (1, 0, 0)])
def test_a_position_outside_the_log_is_refused_with_the_remedy(
    next_offset: int, first: int, end: int
) -> None:
    with pytest.raises(
        Fatal, match=rf"position {next_offset} is outside the log's \[{first}, {end}\].*fill the gap"
    ):
        opened(next_offset, first, end)


@pytest.mark.parametrize(("next_offset", "first", "end"), [(0, 0, 0), (5, 5, 5), (5, 0, 5)])
def test_a_position_at_either_end_of_the_log_is_inside(next_offset: int, first: int, end: int) -> None:
    assert offsets(opened(next_offset, first, end).fresh([record(next_offset - 1)])) == []


def test_a_partition_without_a_position_is_refused_with_the_remedy() -> None:
    with pytest.raises(Fatal, match=r"t\.raw/1: the store has no position.*headgate setup"):
        Positions(TOPIC).open([0, 1], {0: stored(0)}, {0: (0, 9), 1: (0, 9)})


def test_records_of_partitions_that_are_not_ours_or_no_longer_are_dropped() -> None:
    positions = opened(0)
    assert offsets(positions.fresh([record(0, partition=1), record(0)])) == [0]
    positions.close()
    assert positions.fresh([record(1)]) == []


def test_a_refused_opening_leaves_what_was_open_before() -> None:
    positions = opened(3)
    with pytest.raises(Fatal):
        positions.open([0], {}, {0: (0, 9)})
    assert offsets(positions.fresh([record(2), record(3)])) == [3]


def test_advances_move_each_partition_behind_its_last_record_in_order_of_partitions() -> None:
    positions = Positions(TOPIC)
    positions.open([0, 1], {0: stored(0), 1: stored(0)}, {0: (0, 9), 1: (0, 9)})
    records = [record(0, partition=1), record(0), record(1, partition=1)]
    assert positions.advances(records) == [
        Advance(TOPIC, 0, 0, 1, value_id(b"v0")),
        Advance(TOPIC, 1, 0, 2, value_id(b"v1")),
    ]


def test_what_has_landed_is_not_taken_up_again_and_what_has_not_is() -> None:
    positions = opened(0)
    records = positions.fresh([record(0), record(1)])
    assert offsets(positions.fresh(records)) == [0, 1]
    positions.advanced(positions.advances(records))
    assert positions.fresh(records) == []
    assert positions.advances([record(2)]) == [Advance(TOPIC, 0, 2, 3, value_id(b"v2"))]
