"""What may be committed when records are finished out of order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingest.offsets import OffsetTracker


@given(st.data())
def test_it_never_goes_past_unfinished_work_and_never_goes_back(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 100))
    steps = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=20))
    offsets = [start + sum(steps[: i + 1]) - 1 for i in range(len(steps))]
    tracker = OffsetTracker(start)
    begun: list[int] = []
    unfinished: set[int] = set()
    newest = start
    for _ in range(2 * len(offsets)):
        if len(begun) < len(offsets) and (not unfinished or data.draw(st.booleans())):
            begun.append(offsets[len(begun)])
            tracker.begin(begun[-1])
            unfinished.add(begun[-1])
        else:
            done = data.draw(st.sampled_from(sorted(unfinished)))
            tracker.done(done)
            unfinished.remove(done)
        assert tracker.next <= min(unfinished, default=begun[-1] + 1)
        assert tracker.next >= newest
        assert tracker.open == len(unfinished)
        newest = tracker.next
    assert tracker.next == offsets[-1] + 1


def test_nothing_begun_leaves_it_where_it_started() -> None:
    tracker = OffsetTracker(7)
    assert (tracker.next, tracker.committed, tracker.open) == (7, 7, 0)


def test_an_offset_done_behind_an_unfinished_one_waits_for_it() -> None:
    tracker = OffsetTracker(0)
    for offset in (0, 1, 2):
        tracker.begin(offset)
    tracker.done(1)
    tracker.done(2)
    assert tracker.next == 0
    tracker.done(0)
    assert tracker.next == 3


def test_a_gap_in_the_log_is_passed_when_what_follows_is_done() -> None:
    tracker = OffsetTracker(3)
    tracker.begin(5)
    tracker.begin(9)
    tracker.done(5)
    assert tracker.next == 9
    tracker.done(9)
    assert tracker.next == 10
