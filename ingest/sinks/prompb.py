"""Remote write 1.0 on the wire: prometheus.WriteRequest in protobuf, in snappy's block format. Pure.

* What `encoded_labels` encodes is taken by every receiver. Other labels vanish with a 204 (Prometheus 3.x), are stored under
  a name that no query can write (2.42), or fail the whole request with a 500 that says to try again.
* Labels are encoded once a series, by whoever keeps them. The samples of a whole write are laid out by numpy in one go: times from
  1971-02-02 to 2109-05-15 take six bytes as a varint, so that a sample is always SAMPLE_BYTES long.
* The protobuf library writes labels and frames; a test reads all of it back with the message that the specification has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import cramjam
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.typing import NDArray

from ingest.errors import Rejected
from ingest.ports import EncodedLabels, LabelSet
from ingest.sinks.remote_answers import SAID_CHARACTERS_MAX, Refusal
from ingest.validate import printable

LABELS_MAX = 256
"""Of one series. AWS has at most 50 tags and 30 dimensions; receivers may have smaller limits of their own."""
LABEL_NAME_BYTES_MAX = 1_024
LABEL_VALUE_BYTES_MAX = 16 * 1024
KEPT_NAMES_MAX = 4_096
"""Sets of label names that were looked at and are not looked at again."""

TIMESTAMP_MS_MIN: Final = 1 << 35
TIMESTAMP_MS_END: Final = 1 << 42
"""Times that a sample may have: TIMESTAMP_MS_MIN <= ms < TIMESTAMP_MS_END."""

SAMPLE_BYTES: Final = 18
"""Of a sample in its series, tags and length included."""

_NAME = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")
_METRIC = re.compile("[a-zA-Z_:][a-zA-Z0-9_:]*")


# --- labels -----------------------------------------------------------------------------------------------------


def labels_problem(labels: LabelSet) -> str | None:
    """Why no receiver should be given a series of these labels, in words; None where there is no reason."""
    if len(labels) > LABELS_MAX:
        return f"{len(labels)} labels are more than {LABELS_MAX}"
    if problem := _names_problem(tuple([name for name, _ in labels])):
        return problem
    return next((problem for name, value in labels if (problem := _value_problem(name, value))), None)


@lru_cache(maxsize=KEPT_NAMES_MAX)
def _names_problem(names: tuple[str, ...]) -> str | None:
    """The same of their names: thousands of series share them."""
    for name in names:
        if not _NAME.fullmatch(name) or len(name) > LABEL_NAME_BYTES_MAX:
            return f"{name[:100]!r} is no name of a label"
    for before, after in pairwise(names):
        if before >= after:
            return f"label {after} stands there twice" if before == after else "labels are not sorted by name"
    return None if "__name__" in names else "there is no __name__"


def _value_problem(name: str, value: str) -> str | None:
    if not value:
        return f"label {name} is empty"
    try:
        size_bytes = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        return f"label {name} is no text: half of a surrogate pair"
    if size_bytes > LABEL_VALUE_BYTES_MAX:
        return f"label {name} has {size_bytes} bytes, more than {LABEL_VALUE_BYTES_MAX}"
    if name == "__name__" and not _METRIC.fullmatch(value):
        return f"{value[:100]!r} is no name of a metric"
    return None


def encoded_labels(labels: LabelSet) -> EncodedLabels:
    """The labels as they begin a TimeSeries. Raises Rejected (invalid_labels) where a receiver should not be given them."""
    problem = labels_problem(labels)
    if problem is not None:
        raise Rejected("labels", Refusal.INVALID_LABELS, printable(problem, SAID_CHARACTERS_MAX))
    series = TimeSeries(labels=[{"name": name, "value": value} for name, value in labels])
    encoded: bytes = series.SerializeToString()
    return encoded


# --- samples and requests -----------------------------------------------------------------------------------------

_SAMPLE = np.dtype(
    [
        ("field", "u1"),
        ("length", "u1"),
        ("value_tag", "u1"),
        ("value", "<f8"),
        ("time_tag", "u1"),
        ("time", "u1", 6),
    ]
)


def encoded_samples(timestamps_ms: NDArray[np.int64], values: NDArray[np.float64]) -> bytes:
    """Samples as they stand in their TimeSeries, SAMPLE_BYTES each, in the given order.

    Raises ValueError for times outside TIMESTAMP_MS_MIN <= ms < TIMESTAMP_MS_END.
    """
    if len(timestamps_ms) and not (
        int(timestamps_ms.min()) >= TIMESTAMP_MS_MIN and int(timestamps_ms.max()) < TIMESTAMP_MS_END
    ):
        raise ValueError("a time before 1971-02-02 or after 2109-05-15")
    samples = np.empty(len(timestamps_ms), _SAMPLE)
    samples["field"] = 2 << 3 | 2
    samples["length"] = SAMPLE_BYTES - 2
    samples["value_tag"] = 1 << 3 | 1
    samples["value"] = values
    samples["time_tag"] = 2 << 3
    for place in range(6):
        more = 0x80 if place < 5 else 0
        samples["time"][:, place] = timestamps_ms >> 7 * place & 0x7F | more
    return samples.tobytes()


def encoded_request(series: Sequence[bytes]) -> bytes:
    """A request's body: each series is its encoded labels, then its encoded samples. Compressed."""
    raw: bytes = _Frames(timeseries=series).SerializeToString()
    return bytes(cramjam.snappy.compress_raw(raw))


# --- messages -----------------------------------------------------------------------------------------------------


def _messages() -> dict[str, Any]:
    """Message classes, made from the field numbers of prometheus/prompb."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="remote.proto", package="prometheus", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, Any, str]) -> None:
        """Fields are (name, type, label, message type), numbered from 1."""
        made = file.message_type.add(name=name)
        for number, (field, type_, label, of) in enumerate(fields, start=1):
            made.field.add(
                name=field,
                number=number,
                type=type_,
                label=label,
                type_name=f".prometheus.{of}" if of else None,
            )

    one, many = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED
    message("Label", ("name", kind.TYPE_STRING, one, ""), ("value", kind.TYPE_STRING, one, ""))
    message("Sample", ("value", kind.TYPE_DOUBLE, one, ""), ("timestamp", kind.TYPE_INT64, one, ""))
    message(
        "TimeSeries",
        ("labels", kind.TYPE_MESSAGE, many, "Label"),
        ("samples", kind.TYPE_MESSAGE, many, "Sample"),
    )
    message("WriteRequest", ("timeseries", kind.TYPE_MESSAGE, many, "TimeSeries"))
    # The same bytes as a WriteRequest: a message inside another, and bytes, are both a length and what it says.
    message("Frames", ("timeseries", kind.TYPE_BYTES, many, ""))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        made.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"prometheus.{made.name}"))
        for made in file.message_type
    }


_CLASSES = _messages()
TimeSeries, WriteRequest = _CLASSES["TimeSeries"], _CLASSES["WriteRequest"]
_Frames = _CLASSES["Frames"]
