"""Identity, version and digest: they are for ever, so they are pinned here, and they are what they are said to be."""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.model import (
    BatchId,
    DeadLetter,
    RecordPosition,
    Series,
    SeriesKey,
    Target,
    TaskItem,
    Window,
    WindowCount,
    add_digests,
    digest_of,
    series_id,
    series_ids,
    split_version,
    task_id_of,
    version_of,
    window_counts,
)

KEY = SeriesKey(
    "123456789012", "eu-west-1", "AWS/EC2", "CPUUtilization", (("InstanceId", "i-0abc"),), "Average", 60
)
UMLAUTS = SeriesKey("123456789012", "eu-west-1", "Größe", "m", (), "p99", 300)
IDS = series_ids((Series(KEY), Series(UMLAUTS)))
TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
T0_S = 1_767_225_600

U64 = st.integers(0, 2**64 - 1)
Point = tuple[int, int, int, float]
"""Both halves of a series id, timestamp, value."""
POINTS = st.lists(
    st.tuples(U64, U64, st.integers(T0_S, T0_S + 2000), st.floats(allow_nan=False)), max_size=30
)


def columns(points: list[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.array([[high, low] for high, low, _, _ in points], np.uint64).reshape(-1, 2)
    return ids, np.array([p[2] for p in points], np.int64), np.array([p[3] for p in points], np.float64)


# --- identity -------------------------------------------------------------------------------------------------


def test_series_ids_are_these_bytes_for_ever() -> None:
    assert series_id(KEY).hex() == "e9aedcda611fbb7b6cc12d00e4e6d086"
    assert series_id(UMLAUTS).hex() == "5f63ff262fbb37d5cf64dfe5ace57515"


def test_a_series_id_is_blake2b_over_length_prefixed_labels() -> None:
    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack(">I", len(raw)) + raw

    labels = b"".join(map(text, ("123456789012", "eu-west-1", "AWS/EC2", "CPUUtilization", "Average", "60")))
    canonical = labels + struct.pack(">I", 1) + text("InstanceId") + text("i-0abc")
    assert series_id(KEY) == blake2b(canonical, digest_size=16).digest()


def test_what_moves_between_neighbouring_labels_changes_the_id() -> None:
    moved = replace(KEY, namespace="AWS/EC2C", metric="PUUtilization")
    other_pair = replace(KEY, dimensions=(("InstanceIdi", "-0abc"),))
    assert len({series_id(k) for k in (KEY, moved, other_pair)}) == 3


def test_a_unit_is_no_part_of_the_identity() -> None:
    assert series_ids((Series(KEY, "Percent"),)).tolist() == series_ids((Series(KEY),)).tolist()


def test_series_ids_are_the_halves_of_the_bytes_big_endian() -> None:
    assert IDS.tolist() == [
        [0xE9AEDCDA611FBB7B, 0x6CC12D00E4E6D086],
        [0x5F63FF262FBB37D5, 0xCF64DFE5ACE57515],
    ]


def test_task_ids_are_these_digits_for_ever_and_do_not_depend_on_the_order_of_items() -> None:
    rds = TaskItem("rds", T0_S - 600, T0_S, 300)
    ec2 = TaskItem("ec2", T0_S - 900, T0_S, 300)
    assert task_id_of(TARGET, "0011223344556677", 0, (rds, ec2)) == "e734344460b62fd5d60448e421c84180"
    assert task_id_of(TARGET, "0011223344556677", 0, (ec2, rds)) == "e734344460b62fd5d60448e421c84180"
    assert task_id_of(TARGET, "0011223344556677", 1, (ec2, rds)) != "e734344460b62fd5d60448e421c84180"


def test_a_target_is_read_back_from_its_text() -> None:
    assert Target.parse(str(TARGET)) == TARGET
    with pytest.raises(ValueError, match="unpack"):
        Target.parse("cloudwatch/123456789012")


def test_a_dead_letters_identity_is_its_reason_batch_series_and_payload_and_not_its_origin() -> None:
    letter = DeadLetter("not_a_number", "", RecordPosition("raw", 1, 2), BatchId(bytes(16)), "s", b"p")
    assert letter.identity == "a5f7fa9aec2e9af1c288c5ef7fdf2582"
    assert replace(letter, origin=RecordPosition("raw", 7, 9), detail="x").identity == letter.identity
    others = (
        replace(letter, reason="infinite"),
        replace(letter, batch_id=BatchId(b"\1" * 16)),
        replace(letter, series="sp", payload=b""),
    )
    assert letter.identity not in {o.identity for o in others}


def test_a_task_items_windows_are_its_grid() -> None:
    assert TaskItem("ec2", 0, 900, 300).windows() == [Window(0, 300), Window(300, 600), Window(600, 900)]


# --- version --------------------------------------------------------------------------------------------------


def test_versions_are_these_numbers_for_ever() -> None:
    assert version_of(0, 1_767_225_600_000) == 1_767_225_600_000
    assert version_of(1, 1_767_225_600_000) == 72_059_361_263_527_936
    assert version_of(127, 2**56 - 1) == 2**63 - 1


@given(
    st.tuples(st.integers(0, 127), st.integers(0, 2**56 - 1)),
    st.tuples(st.integers(0, 127), st.integers(0, 2**56 - 1)),
)
def test_versions_order_by_revision_and_then_by_time_and_come_apart_again(
    a: tuple[int, int], b: tuple[int, int]
) -> None:
    assert (version_of(*a) < version_of(*b)) == (a < b)
    assert split_version(version_of(*a)) == a


@pytest.mark.parametrize(("revision", "at_ms"), [(-1, 0), (128, 0), (0, -1), (0, 2**56)])
def test_a_version_that_does_not_fit_is_refused(revision: int, at_ms: int) -> None:
    with pytest.raises(ValueError, match="is not in 0"):
        version_of(revision, at_ms)


# --- digest ---------------------------------------------------------------------------------------------------


def test_digests_are_these_numbers_for_ever() -> None:
    timestamps, values = np.array([T0_S, T0_S + 60], np.int64), np.array([1.5, 0.0])
    assert digest_of(IDS, timestamps, values) == 0x4F67699E36EF9D22
    assert digest_of(IDS[:0], timestamps[:0], values[:0]) == 0


def test_minus_zero_counts_as_zero() -> None:
    timestamps = np.array([T0_S, T0_S + 60], np.int64)
    assert digest_of(IDS, timestamps, np.array([1.5, -0.0])) == 0x4F67699E36EF9D22


@given(POINTS, st.randoms(use_true_random=False), st.integers(0, 30))
def test_a_digest_does_not_depend_on_order_or_splitting(
    points: list[Point], random: object, cut: int
) -> None:
    whole = digest_of(*columns(points))
    shuffled = list(points)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert digest_of(*columns(shuffled)) == whole
    parts = digest_of(*columns(shuffled[:cut])), digest_of(*columns(shuffled[cut:]))
    assert add_digests(*parts) == whole


@given(POINTS.filter(bool), st.sampled_from(["series", "timestamp", "value"]))
def test_a_digest_changes_with_any_part_of_a_point(points: list[Point], part: str) -> None:
    high, low, timestamp_s, value = points[0]
    changed = {
        "series": (high, low ^ 1, timestamp_s, value),
        "timestamp": (high, low, timestamp_s + 1, value),
        "value": (high, low, timestamp_s, 1.0 if value != 1.0 else 2.0),
    }[part]
    assert digest_of(*columns([changed, *points[1:]])) != digest_of(*columns(points))


@given(POINTS, st.sampled_from([1, 60, 300, 3600]))
def test_window_counts_are_what_counting_one_by_one_gives(points: list[Point], grid_s: int) -> None:
    points = sorted(points, key=lambda p: p[:2])
    greatest: dict[tuple[int, int, int], Point] = {}
    for point in points:
        seen = greatest.setdefault(point[:3], point)
        if point[3] > seen[3]:
            greatest[point[:3]] = point
    by_window: dict[int, list[Point]] = defaultdict(list)
    for point in greatest.values():
        by_window[point[2] - point[2] % grid_s].append(point)
    expected = tuple(
        WindowCount(start, start + grid_s, len(some), digest_of(*columns(some)))
        for start, some in sorted(by_window.items())
    )
    assert window_counts(*columns(points), grid_s) == expected


def test_of_a_repeated_timestamp_only_the_greatest_value_is_counted() -> None:
    repeated = columns([(1, 2, T0_S, 7.0), (1, 2, T0_S, 9.5), (1, 2, T0_S, -1.0), (3, 4, T0_S, 7.0)])
    kept = columns([(1, 2, T0_S, 9.5), (3, 4, T0_S, 7.0)])
    assert window_counts(*repeated, 300) == window_counts(*kept, 300)
    assert window_counts(*kept, 300)[0].points == 2
