"""Rows and their COPY stream keep what `sinks/copy.py` promises; what `Seen` remembers."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import asyncpg
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.errors import Transient
from ingest.model import Batch, Target, version_of
from ingest.sinks.connection import open_connection
from ingest.sinks.copy import COLUMNS, TIMESTAMP_MAX_S, Rows, copy_stream, rows_of
from ingest.sinks.rows_back import ROW, RowsBack
from ingest.sinks.seen import Seen
from shard_config.model import Postgres

Point = tuple[int, int, float]
"""(series id, timestamp in seconds, value)."""


def make_batch(points: Sequence[Point], version: int = 1) -> Batch:
    ids = sorted({p[0] for p in points})
    ordered = sorted(points, key=lambda p: p[0])
    return Batch(
        task_id="task",
        target=Target("cloudwatch", "1", "r"),
        service="ec2",
        observed_at_ms=version,
        revision=0,
        grid_s=300,
        series=(),
        counts=np.array([sum(p[0] == i for p in points) for i in ids], np.int32),
        timestamps_s=np.array([p[1] for p in ordered], np.int64),
        values=np.array([p[2] for p in ordered], np.float64),
        ids=np.array([(i >> 64, i & (2**64 - 1)) for i in ids], np.uint64).reshape(-1, 2),
    )


def listed(rows: Rows) -> list[tuple[int, int, float, int]]:
    """(timestamp, series id, value, version) of each row."""
    ids = [int(high) << 64 | int(low) for high, low in rows.ids]
    return [
        (int(t), ids[s], float(v), int(n))
        for t, s, v, n in zip(rows.timestamps_s, rows.series, rows.values, rows.versions, strict=True)
    ]


# Few ids and times, so that they meet; some ids share a half.
_ids = st.sampled_from([0, 1, 2**64, 2**64 + 1, 2**127, 2**128 - 1])
_times = st.sampled_from([-1, 0, 60, 86_400, 2**33, TIMESTAMP_MAX_S])
_values = st.floats(allow_nan=False)
_batches = st.lists(
    st.tuples(st.lists(st.tuples(_ids, _times, _values), max_size=12), st.integers(0, 3)), max_size=4
)


@given(_batches)
def test_rows_are_sorted_and_of_each_key_the_greatest(batches: list[tuple[list[Point], int]]) -> None:
    expected: dict[tuple[int, int], tuple[int, float]] = {}
    for points, version in batches:
        for series, ts, value in points:
            expected[ts, series] = max(expected.get((ts, series), (-1, 0.0)), (version, value))
    rows = rows_of([make_batch(points, version) for points, version in batches])
    assert listed(rows) == [(ts, series, v, n) for (ts, series), (n, v) in sorted(expected.items())]


def test_minus_zero_is_zero_and_below_no_other_zero() -> None:
    rows = rows_of([make_batch([(1, 0, -0.0), (2, 0, 0.0), (2, 0, -0.0)])])
    assert [str(v) for v in rows.values] == ["0.0", "0.0"]


@pytest.mark.parametrize(("ts", "value"), [(0, float("nan")), (TIMESTAMP_MAX_S + 1, 0.0), (-(2**62), 0.0)])
def test_what_postgresql_has_no_place_for_is_refused(ts: int, value: float) -> None:
    with pytest.raises(ValueError, match=r"NaN|range"):
        rows_of([make_batch([(1, ts, value)])])


def test_days_are_listed_once_and_ascending() -> None:
    rows = rows_of([make_batch([(1, 86_400, 0.0), (1, -1, 0.0), (2, 86_399, 0.0), (2, 86_401, 0.0)])])
    assert rows.days() == [-1, 0, 1]


def test_the_stream_is_postgresqls_binary_format() -> None:
    rows = rows_of([make_batch([(2**127 + 5, 946_684_801, 1.5)], version=7)])
    assert bytes(copy_stream(rows)) == (
        b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
        + struct.pack(">hiq", 4, 8, 1_000_000)
        + struct.pack(">i", 16) + (2**127 + 5).to_bytes(16, "big")
        + struct.pack(">id", 8, 1.5)
        + struct.pack(">iq", 8, 7)
        + struct.pack(">h", -1)
    )  # fmt: skip


async def test_postgresql_reads_back_what_was_streamed(database: str) -> None:
    points = [
        (2**128 - 1, TIMESTAMP_MAX_S, 5e-324),
        (1, -62_135_596_800, -1.7976931348623157e308),
        (3, 1, float("inf")),
    ]
    version = version_of(127, 2**56 - 1)
    batch = make_batch(points)
    rows = rows_of([batch])
    rows = Rows(rows.ids, rows.series, rows.timestamps_s, rows.values, np.full(3, version, np.int64))
    connection: asyncpg.Connection = await open_connection(Postgres(dsn=database), "test")
    await connection.execute("CREATE TABLE t (ts timestamptz, series uuid, value float8, version bigint)")
    await connection.copy_to_table("t", source=copy_stream(rows), columns=COLUMNS, format="binary")
    found = await connection.fetch("SELECT extract(epoch FROM ts)::bigint, series, value, version FROM t")
    await connection.close()
    assert sorted((r[1], r[0], r[2], r[3]) for r in found) == sorted(
        (i.to_bytes(16, "big"), ts, value, version) for i, ts, value in points
    )


# --- what one process remembers -------------------------------------------------------------------------------


def test_rows_may_conflict_only_within_the_span_that_landed_of_their_series() -> None:
    a, b, c = 1 << 64, 2 << 64, 3 << 64
    seen = Seen(series_max=10)
    seen.learn(rows_of([make_batch([(a, 100, 0.0), (a, 300, 0.0), (b, 200, 0.0)])]))
    rows = rows_of(
        [make_batch([*((a, t, 0.0) for t in (99, 100, 200, 300, 301)), (b, 200, 0.0), (c, 200, 0.0)])]
    )
    suspects = listed(rows.select(seen.may_conflict(rows)))
    assert [(ts, series) for ts, series, _, _ in suspects] == [(100, a), (200, a), (200, b), (300, a)]


def test_the_span_grows_both_ways() -> None:
    seen = Seen(series_max=10)
    for ts in (200, 100, 300):
        seen.learn(rows_of([make_batch([(1, ts, 0.0)])]))
    rows = rows_of([make_batch([(1, t, 0.0) for t in (99, 100, 300, 301)])])
    assert seen.may_conflict(rows).tolist() == [False, True, True, False]


def test_memory_is_bounded_by_forgetting_everything() -> None:
    seen = Seen(series_max=3)
    seen.learn(rows_of([make_batch([(i << 64, 0, 0.0) for i in range(3)])]))
    assert len(seen) == 3
    seen.learn(rows_of([make_batch([(7 << 64, 0, 0.0)])]))
    assert len(seen) == 0


@given(st.lists(st.lists(_ids, max_size=6), max_size=5))
def test_what_is_known_was_learned(learned: list[list[int]]) -> None:
    seen = Seen(series_max=100)
    for ids in learned:
        seen.learn(rows_of([make_batch([(i, 0, 0.0) for i in ids])]))
    everything = [0, 1, 2**64, 2**64 + 1, 2**127, 2**128 - 1]
    rows = rows_of([make_batch([(i, 0, 0.0) for i in everything])])
    known = {i for i, is_known in zip(everything, seen.knows(rows.ids), strict=True) if is_known}
    assert known <= {i for ids in learned for i in ids}
    halves = {i >> 64 for ids in learned for i in ids}
    assert {i >> 64 for i in known} == halves  # of ids that share a half, one is remembered


@pytest.mark.parametrize("cut_at", [1, 7, 66, 1000])
async def test_rows_that_are_read_back_come_whole_however_the_stream_is_cut(cut_at: int) -> None:
    rows = np.zeros(500, ROW)
    rows["n"], rows["value"] = np.arange(500), np.arange(500) / 7
    stream = bytes(19) + rows.tobytes() + b"\xff\xff"
    found: list[np.ndarray] = []
    back = RowsBack(found.append)
    for at in range(0, len(stream), cut_at):
        await back.feed(stream[at : at + cut_at])
    back.finish()
    assert np.array_equal(np.concatenate(found), rows)


async def test_a_stream_of_rows_without_its_end_is_transient() -> None:
    back = RowsBack(lambda _: None)
    await back.feed(bytes(19) + np.zeros(3, ROW).tobytes())
    with pytest.raises(Transient, match="cut short"):
        back.finish()
