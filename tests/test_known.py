"""What is remembered by series and window: against a dictionary, and in bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import known
from ingest.known import Cells, Known

ROOMY = 1_000_000


def said(cells: dict[tuple[int, int], int], finite: bool = True) -> tuple[np.ndarray, Cells]:
    """Ids of the series, spread as hashes are, and (series, window) → digest as cells."""
    numbers = sorted({series for series, _ in cells})
    ids = np.array([(n + 1) * 0x9E3779B97F4A7C15 % 2**64 for n in numbers], np.uint64)
    return ids, Cells(
        np.array([numbers.index(series) for series, _ in cells], np.intp),
        np.array([window for _, window in cells], np.int64),
        np.array(list(cells.values()), np.uint64),
        np.full(len(cells), finite),
    )


CELLS = st.dictionaries(st.tuples(st.integers(0, 30), st.integers(0, 2)), st.integers(0, 3), min_size=1)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(CELLS, max_size=5), max_size=5))
def test_it_knows_what_was_said_last_unless_it_was_said_in_parts(
    looks: list[list[dict[tuple[int, int], int]]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "BLOCK", 5)
        memory, model = Known(), {}
        for batches in looks:
            met: dict[int, int] = {}
            for cells in batches:
                ids, of_batch = said(cells)
                unchanged, lost = memory.compare(ids, of_batch, lambda: ROOMY)
                assert not lost.any()
                expected = [model.get(at) == max(d, 1) and at[0] not in met for at, d in cells.items()]
                assert unchanged.tolist() == expected
                for series in {s for s, _ in cells}:
                    met[series] = met.get(series, 0) + 1
                model |= {at: max(digest, 1) for at, digest in cells.items()}
            model = {at: digest for at, digest in model.items() if met.get(at[0], 0) < 2}
            memory.settle()
            assert memory.entries <= len({s for s, _ in model}) * 3
            assert all(len(block.ids) > 0 for block in memory._blocks)


def test_what_is_no_number_is_not_known_and_not_added() -> None:
    memory = Known()
    for finite, entries in ((False, 0), (True, 1), (False, 0)):
        memory.compare(*said({(1, 0): 5}, finite), lambda: ROOMY)
        memory.settle()
        assert memory.entries == entries


def test_a_window_without_room_is_said_to_be_lost_and_the_others_stay() -> None:
    memory = Known()
    memory.compare(*said({(s, 0): 5 for s in range(10)}), lambda: ROOMY)
    memory.settle()
    unchanged, lost = memory.compare(*said({(s, w): 5 for s in range(10) for w in (0, 1)}), lambda: 9)
    assert (int(unchanged.sum()), int(lost.sum())) == (10, 10)


def test_windows_that_are_left_take_no_room() -> None:
    memory = Known()
    memory.compare(*said({(s, w): 5 for s in range(10) for w in (0, 300)}), lambda: ROOMY)
    memory.settle()
    memory.leave([0])
    assert (memory.entries, memory.nbytes) == (10, 10 * 12)


def test_series_of_three_windows_take_twenty_bytes_each_and_hardly_more_under_way() -> None:
    memory, rng, most = Known(), np.random.default_rng(1), 0
    for _ in range(100):
        ids = rng.integers(0, 2**64, 1_000, dtype=np.uint64)
        rows = np.repeat(np.arange(1_000), 3)
        digests = rng.integers(0, 2**64, 3_000, dtype=np.uint64)
        memory.compare(
            ids, Cells(rows, np.tile([0, 300, 600], 1_000), digests, np.ones(3_000, np.bool_)), lambda: ROOMY
        )
        most = max(most, memory.nbytes)
    memory.settle()
    assert memory.nbytes == 100_000 * 20
    assert most <= 100_000 * 21
