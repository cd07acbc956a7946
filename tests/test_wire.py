"""The wire: what is written is read, what is foreign is rejected with its reason, and bytes stay what they were."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import fastavro
import numpy as np
import pytest
import zstandard
from fastavro.schema import fingerprint, to_parsing_canonical_form
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import avro, series_table, wire
from ingest.assign import (
    Assignment,
    Incarnation,
    Member,
    decode_assignment,
    decode_incarnation,
    decode_member,
    encode_assignment,
    encode_incarnation,
    encode_member,
)
from ingest.batch import batch_message
from ingest.errors import Rejected
from ingest.model import (
    Batch,
    BatchId,
    DeadLetter,
    LookStatus,
    Outcome,
    Receipt,
    ReceiptItem,
    RecordPosition,
    Series,
    SeriesKey,
    Target,
    Task,
    TaskItem,
    TaskKind,
    WindowCount,
    digest_of,
    series_ids,
    window_counts,
)
from shard_config.model import Limits

GOLDEN = Path(__file__).parent / "golden"
LIMITS = Limits()
TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
T0_S = 1_767_225_600


def series_of(
    metric: str, *dimensions: tuple[str, str], account: str = TARGET.account, unit: str = ""
) -> Series:
    return Series(
        SeriesKey(account, TARGET.region, "AWS/EC2", metric, tuple(dimensions), "Average", 60), unit
    )


def batch_of(
    series: tuple[Series, ...], counts: list[int], timestamps_s: list[int], values: list[float]
) -> Batch:
    return Batch(
        task_id="00112233445566778899aabbccddeeff",
        target=TARGET,
        service="ec2",
        observed_at_ms=T0_S * 1000 + 600_123,
        revision=1,
        grid_s=300,
        series=series,
        counts=np.array(counts, np.int32),
        timestamps_s=np.array(timestamps_s, np.int64),
        values=np.array(values, np.float64),
        ids=series_ids(series) if series else np.empty((0, 2), np.uint64),
    )


SAMPLE = batch_of(
    (
        series_of("CPUUtilization", ("InstanceId", "i-0123456789abcdef0"), unit="Percent"),
        series_of("CPUUtilization", account="210987654321", unit="Percent"),
        series_of("NetzwerkÜ", ("AutoScalingGroupName", "web"), ("InstanceId", "i-1")),
    ),
    [3, 0, 2],
    [T0_S, T0_S + 60, T0_S + 300, T0_S + 60, T0_S + 60],
    [1.25, -0.0, 99.99, float("inf"), 1e-300],
)


def big_batch(series: int, points: int, seed: int = 0) -> Batch:
    """Values that do not compress, so that sizes are what they are said to be."""
    rng = np.random.default_rng(seed)
    total = series * points
    return batch_of(
        tuple(series_of("CPUUtilization", ("InstanceId", f"i-{n:017x}")) for n in range(series)),
        [points] * series,
        np.tile(T0_S + 60 * np.arange(points), series).tolist(),
        rng.random(total).tolist(),
    )


def assert_same(expected: Batch, actual: Batch) -> None:
    plain = ("task_id", "target", "service", "observed_at_ms", "revision", "grid_s", "series")
    assert [getattr(expected, name) for name in plain] == [getattr(actual, name) for name in plain]
    for name in ("counts", "timestamps_s", "values", "ids"):
        before, after = getattr(expected, name), getattr(actual, name)
        assert (before.dtype, before.shape, before.tobytes()) == (after.dtype, after.shape, after.tobytes())


def joined(parts: list[Batch]) -> Batch:
    return replace(
        parts[0],
        series=tuple(one for part in parts for one in part.series),
        counts=np.concatenate([part.counts for part in parts]),
        timestamps_s=np.concatenate([part.timestamps_s for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
    )


# --- batches --------------------------------------------------------------------------------------------------

label = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), max_size=12
)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    dimensions = st.dictionaries(label, label, max_size=4).map(lambda d: tuple(sorted(d.items())))
    keys = st.builds(SeriesKey, label, label, label, label, dimensions, label, st.integers(0, 2**31 - 1))
    series = draw(st.lists(st.builds(Series, keys, label), min_size=1, max_size=5).map(tuple))
    counts = draw(st.lists(st.integers(0, 4), min_size=len(series), max_size=len(series)))
    if not sum(counts):
        counts[0] = 1
    total = sum(counts)
    base_s = draw(st.integers(-(2**37), 2**37))
    offsets = draw(st.lists(st.integers(0, 2**31 - 1), min_size=total, max_size=total))
    values = draw(st.lists(st.floats(width=64), min_size=total, max_size=total))
    return replace(
        batch_of(series, counts, [base_s + offset for offset in offsets], values),
        task_id=draw(label),
        target=Target(draw(label), draw(label), draw(label)),
        service=draw(label),
        observed_at_ms=draw(st.integers(0, 2**56 - 1)),
        revision=draw(st.integers(0, 127)),
        grid_s=draw(st.integers(1, 2**31 - 1)),
    )


@given(batches())
@settings(max_examples=150, deadline=None)
def test_a_batch_comes_back_bit_for_bit(batch: Batch) -> None:
    (payload,) = wire.encode_batch(batch)

    assert_same(batch, wire.decode_batch(payload.value, LIMITS))
    assert payload.batch_id == wire.batch_id_of(payload.value)


def test_an_empty_batch_makes_no_payload() -> None:
    assert wire.encode_batch(batch_of((), [], [], [])) == []
    assert wire.encode_batch(batch_of(SAMPLE.series, [0, 0, 0], [], [])) == []


@pytest.mark.filterwarnings("error")
def test_a_signalling_nan_travels_without_a_warning() -> None:
    bits = np.array([0x7FF0000000000001] * 5, np.uint64)
    batch = replace(SAMPLE, values=bits.view(np.float64))

    assert_same(batch, wire.decode_batch(wire.encode_batch(batch)[0].value, LIMITS))


def test_a_batch_says_points_and_digests_of_its_windows() -> None:
    datum = datum_of(SAMPLE)

    windows = window_counts(SAMPLE.point_ids(), SAMPLE.timestamps_s, SAMPLE.values, SAMPLE.grid_s)
    assert np.frombuffer(datum["window_starts"], "<i8").tolist() == [T0_S, T0_S + 300]
    assert np.frombuffer(datum["window_points"], "<i4").tolist() == [3, 1]
    assert np.frombuffer(datum["window_digests"], "<u8").tolist() == [window.digest for window in windows]


def test_a_batch_above_the_payload_cap_is_split_and_the_parts_in_order_are_the_batch() -> None:
    batch = big_batch(series=7, points=1000)
    limits = LIMITS.model_copy(update={"payload_bytes_max": 30_000})

    payloads = wire.encode_batch(batch, limits)

    decoded = [wire.decode_batch(payload.value, limits) for payload in payloads]
    assert [part.counts.tolist() for part in decoded] == [[1000] * n for n in (3, 2, 2)]
    assert_same(batch, joined(decoded))


def test_one_series_above_the_payload_cap_is_split_by_points() -> None:
    batch = big_batch(series=1, points=10_000)
    limits = LIMITS.model_copy(update={"payload_bytes_max": 40_000})

    decoded = [wire.decode_batch(p.value, limits) for p in wire.encode_batch(batch, limits)]

    assert [part.counts.tolist() for part in decoded] == [[2500]] * 4
    whole = joined(decoded)
    assert {part.series for part in decoded} == {batch.series}
    assert whole.timestamps_s.tolist() == batch.timestamps_s.tolist()
    assert whole.values.tolist() == batch.values.tolist()
    assert (
        digest_of(batch.point_ids(), batch.timestamps_s, batch.values)
        == sum(digest_of(part.point_ids(), part.timestamps_s, part.values) for part in decoded) % 2**64
    )


@pytest.mark.parametrize(
    ("cap", "most"), [("series_per_batch_max", 3), ("points_per_batch_max", 30), ("decoded_bytes_max", 1500)]
)
def test_every_cap_that_would_reject_a_batch_splits_it_instead(cap: str, most: int) -> None:
    batch = big_batch(series=10, points=10)
    limits = LIMITS.model_copy(update={cap: most})

    decoded = [wire.decode_batch(p.value, limits) for p in wire.encode_batch(batch, limits)]

    assert len(decoded) > 1
    assert_same(batch, joined(decoded))


def test_labels_that_would_be_too_large_written_out_split_a_batch() -> None:
    shared = ("x", "y" * 4000)
    batch = with_series(*(series_of("m", ("n", f"{n}"), shared) for n in range(40)))
    limits = LIMITS.model_copy(update={"decoded_bytes_max": 100_000})

    decoded = [wire.decode_batch(p.value, limits) for p in wire.encode_batch(batch, limits)]

    assert [len(part.series) for part in decoded] == [20, 20]
    assert_same(batch, joined(decoded))


def test_encoding_again_gives_the_same_bytes_whatever_was_encoded_between() -> None:
    batch = big_batch(series=7, points=1000)
    limits = LIMITS.model_copy(update={"payload_bytes_max": 30_000})
    first = wire.encode_batch(batch, limits)

    wire.encode_batch(SAMPLE)
    again = replace(batch, series=tuple(replace(one) for one in batch.series))

    assert wire.encode_batch(again, limits) == first


def test_one_point_above_the_payload_cap_is_refused() -> None:
    with pytest.raises(Rejected) as refused:
        wire.encode_batch(big_batch(1, 1), LIMITS.model_copy(update={"payload_bytes_max": 10}))

    assert refused.value.reason == "payload_too_large"


def test_many_threads_encode_and_decode_the_same() -> None:
    many = [big_batch(series=20, points=5, seed=n) for n in range(16)]
    expected = [wire.encode_batch(batch) for batch in many]

    with ThreadPoolExecutor(4) as pool:
        encoded = list(pool.map(wire.encode_batch, many))
        decoded = list(pool.map(lambda ps: wire.decode_batch(ps[0].value, LIMITS), encoded))

    assert encoded == expected
    for before, after in zip(many, decoded, strict=True):
        assert_same(before, after)


# --- what is not written ---------------------------------------------------------------------------------------


def with_series(*series: Series) -> Batch:
    return batch_of(series, [1] * len(series), [T0_S] * len(series), [1.0] * len(series))


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (replace(SAMPLE, revision=128), "out_of_range"),
        (replace(SAMPLE, revision=-1), "out_of_range"),
        (replace(SAMPLE, revision=True), "bad_datum"),
        (replace(SAMPLE, observed_at_ms=2**56), "out_of_range"),
        (replace(SAMPLE, observed_at_ms=cast(int, 1.5)), "bad_datum"),
        (replace(SAMPLE, grid_s=0), "out_of_range"),
        (replace(SAMPLE, task_id="a\x00b"), "control_character"),
        (replace(SAMPLE, service="\ud800"), "control_character"),
        (replace(SAMPLE, counts=SAMPLE.counts.astype(np.int64)), "bad_datum"),
        (replace(SAMPLE, values=SAMPLE.values.astype(np.float32)), "bad_datum"),
        (replace(SAMPLE, counts=np.array([3, 0, 1], np.int32)), "columns_mismatch"),
        (replace(SAMPLE, counts=np.array([6, -3, 2], np.int32)), "columns_mismatch"),
        (replace(SAMPLE, timestamps_s=SAMPLE.timestamps_s[1:]), "columns_mismatch"),
        (replace(SAMPLE, ids=SAMPLE.ids[1:]), "columns_mismatch"),
        (
            replace(SAMPLE, timestamps_s=SAMPLE.timestamps_s + np.array([0, 0, 2**31, 0, 0])),
            "out_of_range",
        ),
        (
            replace(SAMPLE, timestamps_s=SAMPLE.timestamps_s + 2**40),
            "out_of_range",
        ),
        (with_series(series_of("a\nb")), "control_character"),
        (with_series(series_of("a", ("x", "y\u2028"))), "control_character"),
        (with_series(series_of("a" * 4097)), "label_too_long"),
        (with_series(series_of("ü" * 2049)), "label_too_long"),
        (with_series(series_of("a", ("x", "1"), ("x", "2"))), "duplicate_dimension"),
        (with_series(series_of("a", ("y", "1"), ("x", "2"))), "unsorted_dimensions"),
        (with_series(series_of("a", *((f"{n:03}", "") for n in range(65)))), "too_many_dimensions"),
    ],
)
def test_a_batch_that_would_not_be_read_is_not_written(batch: Batch, reason: str) -> None:
    with pytest.raises(Rejected) as refused:
        wire.encode_batch(batch)

    assert refused.value.reason == reason


# --- what is not read ------------------------------------------------------------------------------------------


def compressed(message: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(message)


def datum_of(batch: Batch) -> dict[str, Any]:
    return avro.read(batch_message(batch), ("batch",))[1]


def table_of(series: tuple[Series, ...] = SAMPLE.series) -> dict[str, Any]:
    return avro.read(series_table.encode(series, series_ids(series), LIMITS), ("series_table",))[1]


def changed(**fields: Any) -> bytes:
    """The sample's value, with other fields."""
    return compressed(avro.write("batch", datum_of(SAMPLE) | fields))


def changed_table(**fields: Any) -> bytes:
    """The sample's value, with other columns of labels."""
    return changed(series_table=avro.write("series_table", table_of() | fields))


def changed_with_text(index: int, text: bytes) -> bytes:
    """The sample's value, with another text in its labels."""
    table = table_of()
    lengths = np.frombuffer(table["text_lengths"], "<i4").copy()
    start = int(lengths[:index].sum())
    texts = table["texts"][:start] + text + table["texts"][start + int(lengths[index]) :]
    lengths[index] = len(text)
    return changed_table(texts=texts, text_lengths=lengths.tobytes())


def i4(*numbers: int) -> bytes:
    return np.array(numbers, "<i4").tobytes()


def streamed(message: bytes, window_log: int = 0) -> bytes:
    """A frame as a streaming writer makes it: without the content's size."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=window_log, write_content_size=0
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(message)


def with_wide_window(message: bytes) -> bytes:
    """A frame that names a small content and a window of 32 MiB, as no compressor of ours does."""
    body = compressed(message)
    assert body[4] & 0b0010_0000, "a single segment, whose header names no window"
    size = len(message).to_bytes(8, "little")
    descriptor = 0b1100_0000  # eight bytes of content size, with a window
    size_bytes = {0: 1, 1: 2, 2: 4, 3: 8}[body[4] >> 6]
    return body[:4] + bytes([descriptor, (25 - 10) << 3]) + size + body[5 + size_bytes :]


MESSAGE = batch_message(SAMPLE)
TASK = Task(
    task_id="00112233445566778899aabbccddeeff",
    target=TARGET,
    config_revision="0123456789abcdef",
    tick_s=T0_S,
    attempt=2,
    kind=TaskKind.LIVE,
    expires_s=T0_S + 30,
    items=(TaskItem("ec2", T0_S - 900, T0_S, 300), TaskItem("rds", T0_S - 300, T0_S, 60)),
)

CORRECTION = replace(TASK, kind=TaskKind.BACKLOG, expires_s=0, revision=3)

COARSE = replace(TASK, kind=TaskKind.HEAL, expires_s=0, items=(replace(TASK.items[0], period_s=300),))

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "bad_frame"),
    "text": (lambda: b"hello, world", "bad_frame"),
    "above the payload cap": (lambda: bytes(LIMITS.payload_bytes_max + 1), "payload_too_large"),
    "not compressed": (lambda: MESSAGE, "bad_frame"),
    "a truncated frame": (lambda: compressed(MESSAGE)[:-1], "bad_frame"),
    "two frames": (lambda: compressed(MESSAGE) * 2, "bad_frame"),
    "a byte after the frame": (lambda: compressed(MESSAGE) + b"\0", "bad_frame"),
    "a skippable frame": (lambda: b"\x50\x2a\x4d\x18\x04\0\0\0abcd", "bad_frame"),
    "a frame with a dictionary": (
        lambda: compressed(
            MESSAGE, dict_data=zstandard.train_dictionary(256, [MESSAGE[n:] for n in range(50)])
        ),
        "bad_frame",
    ),
    "a frame that names no size": (lambda: streamed(MESSAGE), "size_unnamed"),
    "a frame with a wide window": (lambda: with_wide_window(MESSAGE), "decoded_too_large"),
    "a gigabyte of zeros": (lambda: compressed(bytes(1 << 30), level=1), "decoded_too_large"),
    "an empty frame": (lambda: compressed(b""), "bad_magic"),
    "another magic": (lambda: compressed(b"\xc3\x02" + MESSAGE[2:]), "bad_magic"),
    "a cut header": (lambda: compressed(MESSAGE[:7]), "unknown_schema"),
    "another schema": (lambda: compressed(MESSAGE[:2] + bytes(8) + MESSAGE[10:]), "unknown_schema"),
    "a task": (lambda: compressed(wire.encode_task(TASK)), "wrong_record"),
    "a cut datum": (lambda: compressed(MESSAGE[:-1]), "bad_datum"),
    "trailing bytes": (lambda: compressed(MESSAGE + b"\0"), "trailing_bytes"),
    "a revision of 128": (lambda: changed(revision=128), "out_of_range"),
    "a negative time": (lambda: changed(observed_at_ms=-1), "out_of_range"),
    "no grid": (lambda: changed(grid_s=0), "out_of_range"),
    "a base beyond all time": (lambda: changed(base_s=2**62), "out_of_range"),
    "NUL in a name": (lambda: changed(service="a\0b"), "control_character"),
    "a long name": (lambda: changed(task_id="x" * 5000), "label_too_long"),
    "a count too few": (lambda: changed(counts=i4(3, 2)), "columns_mismatch"),
    "a negative count": (lambda: changed(counts=i4(6, -3, 2)), "columns_mismatch"),
    "counts of more points": (lambda: changed(counts=i4(3, 1, 2)), "columns_mismatch"),
    "counts that overflow": (lambda: changed(counts=i4(2**31 - 1, 2**31 - 1, 7)), "columns_mismatch"),
    "half a count": (lambda: changed(counts=i4(3, 0, 2)[:-2]), "columns_mismatch"),
    "half a value": (lambda: changed(values=bytes(39)), "columns_mismatch"),
    "a timestamp too few": (lambda: changed(timestamps=bytes(16)), "columns_mismatch"),
    "a window too few": (lambda: changed(window_points=b""), "columns_mismatch"),
    "too many series": (lambda: changed(counts=bytes(4 * 5001)), "too_many_series"),
    "too many points": (lambda: changed(values=bytes(8 * 1_000_001)), "too_many_points"),
    "labels that are no table": (lambda: changed(series_table=b"no"), "bad_magic"),
    "labels that are a batch": (lambda: changed(series_table=MESSAGE), "wrong_record"),
    "more texts than are used": (
        lambda: changed_table(texts=b"x" * 25, text_lengths=i4(*[1] * 25)),
        "columns_mismatch",
    ),
    "texts of other lengths": (lambda: changed_table(texts=table_of()["texts"] + b"x"), "columns_mismatch"),
    "a text of negative length": (
        lambda: changed_table(texts=b"xx", text_lengths=i4(3, -1)),
        "columns_mismatch",
    ),
    "half a length": (
        lambda: changed_table(text_lengths=table_of()["text_lengths"][:-1]),
        "columns_mismatch",
    ),
    "a text that is not UTF-8": (lambda: changed_with_text(0, b"\xff\xfe"), "bad_datum"),
    "a text cut within a character": (
        lambda: changed_table(texts="üx".encode(), text_lengths=i4(1, 2)),
        "bad_datum",
    ),
    "millions of short texts": (
        lambda: changed_table(texts=b"ab" * 2_500_000, text_lengths=i4(2) * 2_500_000),
        "columns_mismatch",
    ),
    "an index beyond the texts": (lambda: changed_table(metric=i4(0, 1, 99)), "columns_mismatch"),
    "a negative index": (lambda: changed_table(metric=i4(0, 1, -1)), "columns_mismatch"),
    "a column too short": (lambda: changed_table(metric=i4(0, 1)), "columns_mismatch"),
    "a dimension too few": (lambda: changed_table(dimension_names=i4(0)), "columns_mismatch"),
    "a negative period": (lambda: changed_table(period_s=i4(60, 60, -60)), "out_of_range"),
    "a negative number of dimensions": (
        lambda: changed_table(dimension_counts=i4(4, -1, 0)),
        "too_many_dimensions",
    ),
    "a million dimensions": (
        lambda: changed_table(
            dimension_counts=i4(1_000_000, 0, 0),
            dimension_names=bytes(4_000_000),
            dimension_values=bytes(4_000_000),
        ),
        "too_many_dimensions",
    ),
    "a duplicate dimension": (
        lambda: changed_table(dimension_names=i4(1, 2, 2), dimension_values=i4(1, 1, 1)),
        "duplicate_dimension",
    ),
    "a control character in a label": (
        lambda: changed_with_text(0, b"a\x1b[2J"),
        "control_character",
    ),
    "a long label": (
        lambda: changed_with_text(0, "ü".encode() * 2049),
        "label_too_long",
    ),
    "labels that are gigabytes when written out": (
        lambda: changed(
            series_table=avro.write(
                "series_table",
                dict.fromkeys(("account", "region", "namespace", "metric", "stat", "unit"), bytes(20_000))
                | {"texts": b"x" * 4000, "text_lengths": i4(4000)}
                | {"period_s": bytes(20_000), "dimension_counts": bytes(20_000)}
                | {"dimension_names": b"", "dimension_values": b""},
            )
        ),
        "decoded_too_large",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_value_is_rejected_with_its_reason(name: str) -> None:
    make, reason = HOSTILE[name]

    with pytest.raises(Rejected) as refused:
        wire.decode_batch(make(), LIMITS)

    assert refused.value.reason == reason


@pytest.mark.parametrize(
    "name",
    [
        "a gigabyte of zeros",
        "labels that are gigabytes when written out",
        "a million dimensions",
        "millions of short texts",
    ],
)
def test_a_bomb_is_rejected_within_bounded_memory(name: str) -> None:
    value = HOSTILE[name][0]()

    assert peak_bytes(lambda: wire.decode_batch(value, LIMITS)) < 2 * LIMITS.decoded_bytes_max


def test_a_receipt_that_claims_billions_of_items_is_rejected_within_bounded_memory() -> None:
    value = wire.encode_receipt(replace(RECEIPT, items=()))
    claims = io.BytesIO()
    fastavro.schemaless_writer(claims, {"type": "long"}, 2**40)

    assert peak_bytes(lambda: wire.decode_receipt(value[:-1] + claims.getvalue() + bytes(100))) < 1_000_000


def peak_bytes(decode: Callable[[], object]) -> int:
    """Python's peak of memory while something is decoded, which is rejected."""
    tracemalloc.start()
    try:
        with pytest.raises(Rejected):
            decode()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def mutated(rng: random.Random, value: bytes) -> bytes:
    """One to four changes as accidents and attackers make them: bits, runs, cuts, repeats."""
    data = bytearray(value)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
            case 2:
                del data[at : at + rng.randrange(1, 40)]
            case 3:
                data[at:at] = b"\xff" * rng.randrange(1, 11)
            case _:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
    return bytes(data)


@pytest.mark.parametrize("seed", range(2))
def test_random_changes_are_read_or_rejected_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    table = series_table.encode(SAMPLE.series, SAMPLE.ids, LIMITS)
    value = compressed(MESSAGE)
    receipt, letter, task = (
        wire.encode_receipt(RECEIPT),
        wire.encode_dead_letter(LETTER),
        wire.encode_task(TASK),
    )
    fates = set()
    tracemalloc.start()
    try:
        for _ in range(500):
            for decode in (
                lambda: wire.decode_batch(mutated(rng, value), LIMITS),
                lambda: wire.decode_batch(compressed(mutated(rng, MESSAGE)), LIMITS),
                lambda: wire.decode_batch(changed(series_table=mutated(rng, table)), LIMITS),
                lambda: wire.decode_ledger(mutated(rng, task)),
                lambda: wire.decode_ledger(mutated(rng, receipt)),
                lambda: wire.decode_dead_letter(mutated(rng, letter)),
            ):
                try:
                    decode()
                    fates.add("read")
                except Rejected as error:
                    fates.add(error.reason)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert {"read", "bad_frame", "bad_datum", "trailing_bytes", "unknown_schema", "columns_mismatch"} <= fates
    assert peak < 2 * LIMITS.decoded_bytes_max


# --- labels ---------------------------------------------------------------------------------------------------


def test_two_looks_at_the_same_series_share_what_was_decoded() -> None:
    later = replace(SAMPLE, observed_at_ms=SAMPLE.observed_at_ms + 1000, values=SAMPLE.values + 1)

    first, second = (wire.decode_batch(wire.encode_batch(b)[0].value, LIMITS) for b in (SAMPLE, later))

    assert first.series is second.series
    assert first.ids is second.ids


def test_ids_are_computed_and_not_believed() -> None:
    lying = replace(SAMPLE, ids=SAMPLE.ids[::-1].copy())

    decoded = wire.decode_batch(wire.encode_batch(lying)[0].value, LIMITS)

    assert decoded.ids.tolist() == series_ids(SAMPLE.series).tolist()


def test_a_unit_that_changed_is_not_served_from_the_encoders_memory() -> None:
    other = replace(SAMPLE, series=tuple(replace(one, unit="Bytes") for one in SAMPLE.series))
    wire.encode_batch(SAMPLE)

    decoded = wire.decode_batch(wire.encode_batch(other)[0].value, LIMITS)

    assert [one.unit for one in decoded.series] == ["Bytes"] * 3


def test_a_cache_is_bounded_by_entries_and_forgets_the_least_recently_used() -> None:
    cache = series_table.TableCache(entries_max=2)
    table = series_table.decode(series_table.encode(SAMPLE.series, SAMPLE.ids, LIMITS), LIMITS)
    for key in ("a", "b"):
        cache.put(key, table)
    cache.get("a")

    cache.put("c", table)

    assert [cache.get(key) for key in "abc"] == [table, None, table]


def test_a_cache_is_bounded_by_bytes_even_for_one_table_too_large() -> None:
    table = series_table.decode(series_table.encode(SAMPLE.series, SAMPLE.ids, LIMITS), LIMITS)
    cost = 2 * len(table.encoded) + 3 * series_table.TableCache.SERIES_BYTES
    fitting, small = (series_table.TableCache(bytes_max=most) for most in (2 * cost, cost - 1))

    for key in range(5):
        fitting.put(key, table)
        small.put(key, table)

    assert (len(fitting), len(small)) == (2, 0)


# --- the ledger and the dead ------------------------------------------------------------------------------------

RECEIPT = Receipt(
    task_id=TASK.task_id,
    target=TARGET,
    shard="shard-0",
    tick_s=T0_S,
    started_at_ms=T0_S * 1000 + 1,
    finished_at_ms=T0_S * 1000 + 2345,
    archive_key=f"v1/cloudwatch/123456789012/eu-west-1/2026/01/01/{T0_S}-{TASK.task_id}",
    items=(
        ReceiptItem(
            TASK.items[0],
            Outcome(
                LookStatus.PARTIAL, "2 of 3 series", T0_S * 1000, 3, {"ListMetrics": 1, "GetMetricData": 2}, 3
            ),
            points=5,
            windows=(
                WindowCount(T0_S - 300, T0_S, 4, 2**64 - 1),
                WindowCount(T0_S - 600, T0_S - 300, 1, 0x0102030405060708),
            ),
            batches=(BatchId(bytes(range(16))), BatchId(bytes(16))),
        ),
        ReceiptItem(TASK.items[1], Outcome(LookStatus.FORBIDDEN, "AccessDenied", 0, 0, {}, 0), 0, (), ()),
    ),
)
RECEIPT_V2 = replace(
    RECEIPT,
    items=(
        replace(
            RECEIPT.items[0],
            outcome=replace(RECEIPT.items[0].outcome, metrics_in_doubt=500, looked_from_s=T0_S - 5400),
            whole=(WindowCount(T0_S - 600, T0_S - 300, 9, 2**63),),
            held=(BatchId(bytes(range(16, 32))),),
        ),
        RECEIPT.items[1],
    ),
)
LETTER = DeadLetter(
    "not_a_number",
    "détail",
    RecordPosition("headgate.raw", 3, 2**40),
    BatchId(bytes(range(16))),
    "AWS/EC2/x",
    b'{"value":"nan"}',
)
LETTER_V2 = replace(
    LETTER, cluster="c1", key=b"cloudwatch/123456789012/eu-west-1/0", context=b'{"grid_s":300}'
)

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
long = st.integers(-(2**63), 2**63 - 1)
item = st.builds(
    lambda service, start, windows, grid: TaskItem(service, start, start + windows * grid, grid),
    text,
    st.integers(-(2**37), 2**37),
    st.integers(1, wire.WINDOWS_PER_ITEM_MAX),
    st.integers(1, 2**31 - 1),
)
name = st.from_regex("[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
targets = st.builds(Target, name, name, name)
task_ids = st.from_regex("[0-9a-f]{32}", fullmatch=True)
ticks = st.integers(0, 253_402_300_799)
outcomes = st.builds(
    Outcome, st.sampled_from(LookStatus), text, long, long, st.dictionaries(text, long, max_size=3), long
)
counts = st.builds(WindowCount, long, long, long, st.integers(0, 2**64 - 1))
ids = st.binary(min_size=16, max_size=16).map(BatchId)


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(of, max_size=3).map(tuple)


tasks = st.builds(
    Task,
    task_ids,
    targets,
    text,
    ticks,
    st.integers(0, 2**31 - 1),
    st.sampled_from(TaskKind),
    long,
    tuples(item),
)
receipts = st.builds(
    Receipt,
    task_ids,
    targets,
    text,
    ticks,
    long,
    long,
    text,
    tuples(st.builds(ReceiptItem, item, outcomes, long, tuples(counts), tuples(ids))),
)


@given(st.one_of(tasks, receipts))
@settings(max_examples=100, deadline=None)
def test_a_ledger_entry_comes_back(entry: Task | Receipt) -> None:
    if isinstance(entry, Task):
        value = wire.encode_task(entry)
        assert wire.decode_task(value) == entry
    else:
        value = wire.encode_receipt(entry)
        assert wire.decode_receipt(value) == entry
    assert wire.decode_ledger(value) == entry


@given(
    st.builds(
        DeadLetter,
        text,
        text,
        st.builds(RecordPosition, text, st.integers(0, 99), long),
        ids,
        text,
        st.binary(),
        text,
        st.binary(),
        st.binary(),
    )
)
@settings(max_examples=50, deadline=None)
def test_a_dead_letter_comes_back(letter: DeadLetter) -> None:
    assert wire.decode_dead_letter(wire.encode_dead_letter(letter)) == letter


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (replace(TASK, items=(TaskItem("ec2", 0, 2**50, 1),)), "out_of_range"),
        (replace(TASK, items=(TaskItem("ec2", 0, 301, 300),)), "out_of_range"),
        (replace(TASK, items=(TaskItem("ec2", 300, 0, 300),)), "out_of_range"),
        (replace(TASK, items=(TaskItem("ec2", 0, 300, 0),)), "out_of_range"),
        (replace(TASK, attempt=cast(int, "1")), "bad_datum"),
        (replace(TASK, attempt=True), "bad_datum"),
        (replace(TASK, tick_s=2**63), "out_of_range"),
        (replace(TASK, tick_s=-1), "out_of_range"),
        (replace(TASK, expires_s=2**63), "bad_datum"),
        (replace(TASK, task_id="../" * 10 + "00"), "bad_name"),
        (replace(TASK, revision=128), "out_of_range"),
        (replace(TASK, revision=-1), "out_of_range"),
        (replace(TASK, target=Target("cloudwatch", "..", "eu-west-1")), "bad_name"),
        (replace(TASK, target=Target("cloudwatch", "a/b", "eu-west-1")), "bad_name"),
        (replace(TASK, tick_s=cast(int, 1.0)), "bad_datum"),
        (replace(TASK, config_revision="a\0b"), "control_character"),
        (replace(TASK, config_revision="\ud800"), "bad_datum"),
        (replace(TASK, config_revision="x" * wire.MESSAGE_BYTES_MAX), "payload_too_large"),
    ],
)
def test_a_task_that_would_not_be_read_is_not_written(task: Task, reason: str) -> None:
    with pytest.raises(Rejected) as refused:
        wire.encode_task(task)

    assert refused.value.reason == reason


def test_a_task_whose_target_could_leave_its_archive_key_is_rejected() -> None:
    foreign = wire.encode_task(TASK).replace(b"eu-west-1", b"eu_west/1")

    with pytest.raises(Rejected) as refused:
        wire.decode_task(foreign)

    assert refused.value.reason == "bad_name"


def test_a_task_of_an_unknown_kind_is_rejected() -> None:
    value = wire.encode_task(TASK).replace(b"\x08live", b"\x08dead")

    with pytest.raises(Rejected) as refused:
        wire.decode_task(value)

    assert refused.value.reason == "out_of_range"


def test_a_dead_letter_is_no_ledger_entry() -> None:
    with pytest.raises(Rejected) as refused:
        wire.decode_ledger(wire.encode_dead_letter(LETTER))

    assert refused.value.reason == "wrong_record"


def test_a_value_above_kafkas_cap_is_rejected_undecoded() -> None:
    with pytest.raises(Rejected) as refused:
        wire.decode_ledger(bytes(wire.MESSAGE_BYTES_MAX + 1))

    assert refused.value.reason == "payload_too_large"


# --- schemas and golden bytes -----------------------------------------------------------------------------------


def rabin(data: bytes) -> int:
    """CRC-64-AVRO, as the Avro specification gives it ("Schema Fingerprints")."""
    empty = 0xC15D213AA4D7A795
    table = []
    for byte in range(256):
        entry = byte
        for _ in range(8):
            entry = (entry >> 1) ^ (empty if entry & 1 else 0)
        table.append(entry)
    crc = empty
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc


def test_the_fingerprint_of_null_is_the_one_that_the_specification_gives() -> None:
    assert rabin(b'"null"') == 0x63DD24E7CC258F8A
    assert bytes.fromhex(fingerprint('"null"', "CRC-64-AVRO")) == rabin(b'"null"').to_bytes(8, "little")


def test_the_fingerprint_in_a_header_is_the_schemas_little_endian() -> None:
    for schema in avro.SCHEMAS:
        canonical = to_parsing_canonical_form(schema.parsed)
        assert schema.fingerprint == rabin(canonical.encode()).to_bytes(8, "little")


# A golden file is written when its schema is, once: from then on bytes like these are in archives.
def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


ASSIGNMENT = Assignment(
    7,
    1_767_268_800_123,
    "exporter-2 came",
    ("exporter-1", "exporter-2", "exporter-3"),
    ("exporter-2", "exporter-1", "exporter-2"),
    (1.0, 2.5, 1.0),
    {"123456789012/eu-west-1": {"exporter-1": 0.25, "exporter-2": 0.75}},
)
ASSIGNMENT_V2 = replace(ASSIGNMENT, together={0: "123456789012/eu-west-1", 2: "123456789012/eu-west-1"})
INCARNATION = Incarnation("exporter-1", 1_767_268_800_123, 0x1234_5678_9ABC, "host.example", 4242)
MEMBER = Member("exporter-1", 7, replace(ASSIGNMENT, shares={}))

GOLDEN_WRITERS: dict[str, Callable[[], bytes]] = {
    "assignment.v1": lambda: encode_assignment(ASSIGNMENT),
    "assignment.v2": lambda: encode_assignment(ASSIGNMENT_V2),
    "incarnation.v1": lambda: encode_incarnation(INCARNATION),
    "member.v1": lambda: encode_member(MEMBER),
    "batch.v1": lambda: batch_message(SAMPLE),
    "series_table.v1": lambda: series_table.encode(SAMPLE.series, SAMPLE.ids, LIMITS),
    "task.v1": lambda: wire.encode_task(TASK),
    "task.v2": lambda: wire.encode_task(CORRECTION),
    "task.v3": lambda: wire.encode_task(COARSE),
    "receipt.v2": lambda: wire.encode_receipt(RECEIPT_V2),
    "dead_letter.v2": lambda: wire.encode_dead_letter(LETTER_V2),
}


def test_every_schema_ever_has_golden_bytes() -> None:
    assert {f"{schema.name}.v{schema.version}" for schema in avro.SCHEMAS} == {
        path.stem for path in GOLDEN.glob("*.v*.hex")
    }


@pytest.mark.parametrize("name", GOLDEN_WRITERS)
def test_todays_encoder_writes_the_golden_bytes(name: str) -> None:
    assert GOLDEN_WRITERS[name]().hex() == golden(name).hex()


def test_todays_decoder_reads_the_golden_bytes() -> None:
    # The compressed value stands for what an archive holds: another libzstd may compress otherwise, all must read it.
    assert_same(SAMPLE, wire.decode_batch(golden("batch-as-it-travels"), LIMITS))
    assert_same(SAMPLE, wire.decode_batch(compressed(golden("batch.v1")), LIMITS))
    assert series_table.decode(golden("series_table.v1"), LIMITS).series == SAMPLE.series
    assert wire.decode_task(golden("task.v1")) == TASK
    assert wire.decode_task(golden("task.v2")) == CORRECTION
    assert wire.decode_task(golden("task.v3")) == COARSE
    assert wire.decode_receipt(golden("receipt.v1")) == RECEIPT
    assert wire.decode_receipt(golden("receipt.v2")) == RECEIPT_V2
    assert wire.decode_dead_letter(golden("dead_letter.v1")) == LETTER
    assert wire.decode_dead_letter(golden("dead_letter.v2")) == LETTER_V2
    assert decode_assignment(golden("assignment.v1")) == ASSIGNMENT
    assert decode_assignment(golden("assignment.v2")) == ASSIGNMENT_V2
    assert decode_incarnation(golden("incarnation.v1")) == INCARNATION
    assert decode_member(golden("member.v1")) == MEMBER


def test_a_foreign_reader_needs_the_schemas_docs_and_nothing_of_ours() -> None:
    def read(message: bytes, schema: str) -> Any:
        path = Path(avro.__file__).parent / "schemas" / schema
        return fastavro.schemaless_reader(io.BytesIO(message[10:]), json.loads(path.read_text()), None)

    value = golden("batch-as-it-travels")
    batch = read(zstandard.ZstdDecompressor().decompress(value), "batch.v1.avsc")
    table = read(batch["series_table"], "series_table.v1.avsc")
    ends = np.cumsum(np.frombuffer(table["text_lengths"], "<i4")).tolist()
    texts = [table["texts"][start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]

    metrics = [texts[i] for i in np.frombuffer(table["metric"], "<i4")]
    timestamps_s = batch["base_s"] + np.frombuffer(batch["timestamps"], "<i4")
    assert np.repeat(metrics, np.frombuffer(batch["counts"], "<i4")).tolist() == [
        *["CPUUtilization"] * 3,
        *["NetzwerkÜ"] * 2,
    ]
    assert timestamps_s.tolist() == SAMPLE.timestamps_s.tolist()
    assert np.frombuffer(batch["values"], "<f8").tolist() == SAMPLE.values.tolist()


def test_a_value_in_an_older_schema_is_resolved_to_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    v1 = next(schema for schema in avro.SCHEMAS if schema.name == "task" and schema.version == 1)
    raw = json.loads((Path(avro.__file__).parent / "schemas" / "task.v1.avsc").read_text())
    fields = [*raw["fields"], {"name": "priority", "type": "int", "default": 7}]
    parsed = fastavro.parse_schema(raw | {"fields": fields})
    monkeypatch.setitem(avro._NEWEST, "task", replace(v1, version=9, parsed=parsed))

    _, datum = avro.read(golden("task.v1"), ("task",))

    assert (datum["priority"], datum["attempt"]) == (7, TASK.attempt)
