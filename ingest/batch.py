"""A batch as a record value: columns of little-endian numbers in Avro, behind zstd, and checked on the way in.

* What `encode_batch` writes, `decode_batch` reads under the same limits; what would not be read is not written.
* Encoding is a pure function of the batch (for one version of libzstd), so a second run of a task gives the same ids.
* Sizes are checked before anything is allocated: memory stays within a small multiple of limits.decoded_bytes_max.
* Nothing derived is believed: series ids are computed here, and the window digests inside a batch are for readers that do not
  decode its columns; whoever lands the points computes its own.

The labels are a nested value that repeats from look to look (`ingest.series_table`); why columns are bytes stands in
docs/decisions/0005-columns-as-bytes.md.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import zstandard

from ingest import avro, series_table
from ingest.errors import Rejected
from ingest.model import OBSERVED_AT_MS_MAX, REVISION_MAX, Batch, BatchId, Target, window_counts
from ingest.ports import Payload
from ingest.validate import TIMESTAMP_S_MAX, Reason, describe, text_problem
from shard_config.model import Limits

ZSTD_LEVEL = 3

_LIMITS = Limits()
_INT32_MAX = 2**31 - 1
_KINDS = (np.dtype(np.int32).str, np.dtype(np.int64).str, np.dtype(np.float64).str)
_UNNAMED = (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR)


class _Zstd(threading.local):
    """zstandard's contexts are expensive to make and must not be shared between threads."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


@dataclass(frozen=True, slots=True)
class Decoded:
    """A batch as it came. `bad`: by index in `batch.series`, why a series must not be let in; whoever lands the others takes it out."""

    batch: Batch
    bad: Mapping[int, Reason]


def batch_id_of(value: bytes) -> BatchId:
    """blake2b-128 of a batch's record value, as it travels."""
    return BatchId(blake2b(value, digest_size=16).digest())


def encode_batch(batch: Batch, limits: Limits = _LIMITS) -> list[Payload]:
    """A batch as record values, each within every cap of `limits`.

    What is too large is halved, by series and then by the points of one series, until it fits; the halves in order are the
    batch. What has no points makes no payload. Raises Rejected where a batch would not be read: bad labels,
    columns that do not fit each other, numbers that do not fit their column, one point above payload_bytes_max.
    """
    _check_columns(batch)
    return [Payload(batch_id_of(value), value) for value in _values(batch, limits)]


def _values(batch: Batch, limits: Limits) -> Iterator[bytes]:
    if not batch.points:
        return
    value = _value_within(batch, limits)
    if value is not None:
        yield value
        return
    # Depth is bounded: each level halves the series, then the points of one.
    for half in _halves(batch):
        yield from _values(half, limits)


def _value_within(batch: Batch, limits: Limits) -> bytes | None:
    """The batch as one value, or None where that is above a cap."""
    if len(batch.series) > limits.series_per_batch_max or batch.points > limits.points_per_batch_max:
        return None
    try:
        message = batch_message(batch, limits)
    except Rejected as error:
        if error.reason != Reason.DECODED_TOO_LARGE:
            raise
        return None
    if len(message) > limits.decoded_bytes_max:
        return None
    value = _zstd.compressor.compress(message)
    if len(value) > limits.payload_bytes_max:
        return None
    # Copied, for what zstandard 0.25 returns keeps the room of what it compressed.
    return bytes(memoryview(value))


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    n = len(batch.series)
    if n > 1:
        middle = n // 2
        cut = int(batch.counts[:middle].sum(dtype=np.int64))
        left, right = slice(None, middle), slice(middle, None)
        counts = batch.counts[left], batch.counts[right]
    elif batch.points > 1:
        cut = batch.points // 2
        left = right = slice(None)
        counts = np.array([cut], np.int32), np.array([batch.points - cut], np.int32)
    else:
        raise Rejected(_where(batch), Reason.PAYLOAD_TOO_LARGE, "one point does not fit a payload")
    first = replace(
        batch,
        series=batch.series[left],
        ids=batch.ids[left],
        counts=counts[0],
        timestamps_s=batch.timestamps_s[:cut],
        values=batch.values[:cut],
    )
    second = replace(
        batch,
        series=batch.series[right],
        ids=batch.ids[right],
        counts=counts[1],
        timestamps_s=batch.timestamps_s[cut:],
        values=batch.values[cut:],
    )
    return first, second


def batch_message(batch: Batch, limits: Limits = _LIMITS) -> bytes:
    """A batch in single-object encoding, before it is compressed. Raises Rejected."""
    _check_header(batch, limits)
    _check_columns(batch)
    base_s = int(batch.timestamps_s.min()) if batch.points else 0
    _check_base(base_s)
    if batch.points and int(batch.timestamps_s.max()) - base_s > _INT32_MAX:
        raise Rejected(_where(batch), Reason.OUT_OF_RANGE, "timestamps span more than 2**31 seconds")
    windows = window_counts(batch.point_ids(), batch.timestamps_s, batch.values, batch.grid_s)
    return avro.write(
        "batch",
        {
            "task_id": batch.task_id,
            "source": batch.target.source,
            "account": batch.target.account,
            "region": batch.target.region,
            "service": batch.service,
            "observed_at_ms": batch.observed_at_ms,
            "revision": batch.revision,
            "grid_s": batch.grid_s,
            "series_table": series_table.encode(batch.series, batch.ids, limits),
            "counts": batch.counts.astype("<i4").tobytes(),
            "base_s": base_s,
            "timestamps": (batch.timestamps_s - base_s).astype("<i4").tobytes(),
            "values": batch.values.astype("<f8").tobytes(),
            "window_starts": np.array([w.start_s for w in windows], dtype="<i8").tobytes(),
            "window_points": np.array([w.points for w in windows], dtype="<i4").tobytes(),
            "window_digests": np.array([w.digest for w in windows], dtype="<u8").tobytes(),
        },
    )


def decode_batch(value: bytes, limits: Limits) -> Batch:
    """The batch of a record value, its arrays read-only. Raises Rejected (see `ingest.validate.Reason`), for one bad series too."""
    decoded = decode_by_series(value, limits)
    for index, reason in decoded.bad.items():
        raise Rejected("batch", reason, describe(decoded.batch.series[index]))
    return decoded.batch


def decode_by_series(value: bytes, limits: Limits) -> Decoded:
    """As `decode_batch`, but a series with bad labels is named instead of refusing the batch. Raises Rejected where the batch is bad."""
    if len(value) > limits.payload_bytes_max:
        raise Rejected("batch", Reason.PAYLOAD_TOO_LARGE, f"{len(value)} bytes")
    _, datum = avro.read(_decompress(value, limits), ("batch",))
    points = _check_sizes(datum, limits)
    table = series_table.decode(datum["series_table"], limits)
    counts = np.frombuffer(datum["counts"], dtype="<i4")
    if len(counts) != len(table.series) or (len(counts) and int(counts.min()) < 0):
        raise Rejected("batch", Reason.COLUMNS_MISMATCH, f"{len(counts)} counts, {len(table.series)} series")
    if int(counts.sum(dtype=np.int64)) != points:
        raise Rejected("batch", Reason.COLUMNS_MISMATCH, f"counts do not add up to {points} points")
    offsets = np.frombuffer(datum["timestamps"], dtype="<i4")
    _check_base(datum["base_s"])
    timestamps_s = offsets.astype(np.int64) + datum["base_s"]
    timestamps_s.setflags(write=False)
    batch = Batch(
        task_id=datum["task_id"],
        target=Target(datum["source"], datum["account"], datum["region"]),
        service=datum["service"],
        observed_at_ms=datum["observed_at_ms"],
        revision=datum["revision"],
        grid_s=datum["grid_s"],
        series=table.series,
        counts=counts,
        timestamps_s=timestamps_s,
        values=np.frombuffer(datum["values"], dtype="<f8"),
        ids=table.ids,
    )
    _check_header(batch, limits)
    return Decoded(batch, dict(table.bad))


def without_series(batch: Batch, indices: Collection[int]) -> Batch:
    """The same without some of its series, and their points."""
    keep = np.ones(len(batch.series), np.bool_)
    keep[list(indices)] = False
    kept = np.repeat(keep, batch.counts)
    return replace(
        batch,
        series=tuple(one for one, stays in zip(batch.series, keep.tolist(), strict=True) if stays),
        ids=batch.ids[keep],
        counts=batch.counts[keep],
        timestamps_s=batch.timestamps_s[kept],
        values=batch.values[kept],
    )


def span_of(value: bytes, limits: Limits = _LIMITS) -> tuple[Target, str, int, int]:
    """Target, service and [start_s, end_s) of the windows that a batch has points in, without decoding its columns.

    Raises Rejected. For choosing among batches: whoever lands one decodes, and so checks, all of it.
    """
    if len(value) > limits.payload_bytes_max:
        raise Rejected("batch", Reason.PAYLOAD_TOO_LARGE, f"{len(value)} bytes")
    _, datum = avro.read(_decompress(value, limits), ("batch",))
    starts = datum["window_starts"]
    if not starts or len(starts) % 8:
        raise Rejected("batch", Reason.COLUMNS_MISMATCH, f"{len(starts)} bytes of windows")
    starts_s = np.frombuffer(starts, dtype="<i8")
    target = Target(datum["source"], datum["account"], datum["region"])
    return target, datum["service"], int(starts_s.min()), int(starts_s.max()) + datum["grid_s"]


def decoded_bytes(value: bytes) -> int:
    """What a value says that it holds once decompressed; 0 where it says nothing, and is refused unread."""
    try:
        size = zstandard.get_frame_parameters(value).content_size
    except zstandard.ZstdError:
        return 0
    return 0 if size in _UNNAMED else int(size)


def _decompress(value: bytes, limits: Limits) -> bytes:
    """The content of exactly one frame. python-zstandard 0.25 allocates what the frame names, so that is looked at first."""
    try:
        frame = zstandard.get_frame_parameters(value)
        if frame.content_size in _UNNAMED:
            raise Rejected("batch", Reason.SIZE_UNNAMED)
        if max(frame.content_size, frame.window_size) > limits.decoded_bytes_max:
            what = f"content {frame.content_size}, window {frame.window_size} bytes"
            raise Rejected("batch", Reason.DECODED_TOO_LARGE, what)
        return _zstd.decompressor.decompress(value, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Rejected("batch", Reason.BAD_FRAME, str(error)) from error


def _check_sizes(datum: avro.Datum, limits: Limits) -> int:
    """The number of points, where the columns' lengths fit each other and the caps."""
    series, odd_series = divmod(len(datum["counts"]), 4)
    points, odd_points = divmod(len(datum["values"]), 8)
    windows, odd_windows = divmod(len(datum["window_starts"]), 8)
    if series > limits.series_per_batch_max:
        raise Rejected("batch", Reason.TOO_MANY_SERIES, f"{series}")
    if points > limits.points_per_batch_max:
        raise Rejected("batch", Reason.TOO_MANY_POINTS, f"{points}")
    fits = len(datum["timestamps"]) == 4 * points
    fits &= len(datum["window_points"]) == 4 * windows and len(datum["window_digests"]) == 8 * windows
    if odd_series or odd_points or odd_windows or not fits:
        raise Rejected(
            "batch", Reason.COLUMNS_MISMATCH, f"{series} series, {points} points, {windows} windows"
        )
    return points


def _check_base(base_s: int) -> None:
    if abs(base_s) > TIMESTAMP_S_MAX:
        raise Rejected("batch", Reason.OUT_OF_RANGE, f"base_s {base_s}")


def _check_header(batch: Batch, limits: Limits) -> None:
    where = _where(batch)
    for text in (
        batch.task_id,
        batch.target.source,
        batch.target.account,
        batch.target.region,
        batch.service,
    ):
        if problem := text_problem(text, limits):
            raise Rejected(where, problem, repr(text[:80]))
    for name, number, least, most in (
        ("revision", batch.revision, 0, REVISION_MAX),
        ("observed_at_ms", batch.observed_at_ms, 0, OBSERVED_AT_MS_MAX),
        ("grid_s", batch.grid_s, 1, _INT32_MAX),
    ):
        if not least <= number <= most:
            raise Rejected(where, Reason.OUT_OF_RANGE, f"{name} {number} is not in {least}..{most}")


def _check_columns(batch: Batch) -> None:
    """What is about to be written: types exact, lengths fitting."""
    kinds = (batch.counts.dtype.str, batch.timestamps_s.dtype.str, batch.values.dtype.str)
    if kinds != _KINDS:
        raise Rejected(_where(batch), Reason.BAD_DATUM, f"columns of {kinds}")
    n = len(batch.series)
    fits = batch.counts.shape == (n,) and batch.ids.shape == (n, 2)
    fits &= batch.timestamps_s.shape == batch.values.shape == (int(batch.counts.sum(dtype=np.int64)),)
    if not fits or (n and int(batch.counts.min()) < 0):
        raise Rejected(_where(batch), Reason.COLUMNS_MISMATCH, f"{n} series, {batch.points} points")


def _where(batch: Batch) -> str:
    return f"batch of {batch.target} {batch.service}"
