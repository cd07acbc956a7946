"""Texts in order, each once, whatever lies compressed."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.sources import runs
from ingest.sources.runs import Runs

TEXTS = st.binary(max_size=3).filter(lambda text: b"\n" not in text)


@given(st.lists(TEXTS, max_size=60))
def test_what_was_added_comes_out_sorted_and_once(texts: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "WAITING_MAX", 7)
        patch.setattr(runs, "CHUNK", 3)
        gathered = Runs()
        for text in texts:
            gathered.add(text)
        assert list(gathered) == sorted(set(texts))
        assert len(gathered) >= len(set(texts))


def test_what_is_known_is_said_to_be() -> None:
    gathered = Runs()
    assert (gathered.add(b"a"), gathered.add(b"a"), len(gathered)) == (True, False, 1)


def test_names_take_a_tenth_of_what_they_take_in_a_set() -> None:
    gathered = Runs()
    tracemalloc.start()
    try:
        for n in range(4 * runs.WAITING_MAX):
            gathered.add(b'[[["InstanceId","i-%017x"]],"CPUUtilization"]' % n)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 10 * len(gathered)
