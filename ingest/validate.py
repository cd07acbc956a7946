"""What is let in: points one by one, labels, and the vocabulary of reasons for what is not.

Pure: no clock, no I/O, and nothing it is given is changed.

* A bad point never takes a good one with it: `validate` puts each bad point aside with its reason, and the rest of the
  batch goes on.
* Nothing is lost from the balance: the points accepted and the counts of what is dead add up to the points of the batch.
* What is put aside is bounded: at most `DEAD_POINTS_MAX` single points a batch, and one entry that counts the rest.

Reasons are `Reason`, one closed vocabulary for all of `ingest`: they are fit for a metric's label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from urllib.parse import quote

import numpy as np
import orjson
from numpy.typing import NDArray

from ingest.model import Batch, BatchId, DeadLetter, Receipt, RecordPosition, Series, Task
from shard_config.model import Limits

DEAD_POINTS_MAX = 1_000
TIMESTAMP_S_MAX = 253_402_300_799
"""The last second of the year 9999: what PostgreSQL, Python and RFC 3339 can all write."""

# C0, DEL, C1 and the two line separators: PostgreSQL refuses NUL, and the others forge lines in whatever prints labels.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Reason(StrEnum):
    """Why something was put aside."""

    # A whole record value (ingest.wire).
    PAYLOAD_TOO_LARGE = "payload_too_large"
    """The value, as it travels, is above its cap."""
    BAD_FRAME = "bad_frame"
    """Not exactly one whole zstd frame without a dictionary."""
    SIZE_UNNAMED = "size_unnamed"
    """The zstd frame does not say how large its content is."""
    DECODED_TOO_LARGE = "decoded_too_large"
    """The zstd frame's content, its window, or its labels written out, are above the cap."""
    BAD_MAGIC = "bad_magic"
    """Not Avro in single-object encoding."""
    UNKNOWN_SCHEMA = "unknown_schema"
    """The fingerprint is not one of our schemas: written by a newer Headgate, or by something else."""
    WRONG_RECORD = "wrong_record"
    """One of our schemas, but not one that belongs here."""
    BAD_DATUM = "bad_datum"
    """The bytes are not a datum of the schema that they name."""
    TRAILING_BYTES = "trailing_bytes"
    """Bytes are left over after the datum."""
    COLUMNS_MISMATCH = "columns_mismatch"
    """The lengths of a batch's columns do not fit each other, or an index points outside its table."""
    TOO_MANY_SERIES = "too_many_series"
    TOO_MANY_POINTS = "too_many_points"
    TOO_MANY_DIMENSIONS = "too_many_dimensions"
    DUPLICATE_DIMENSION = "duplicate_dimension"
    UNSORTED_DIMENSIONS = "unsorted_dimensions"
    LABEL_TOO_LONG = "label_too_long"
    CONTROL_CHARACTER = "control_character"
    """A label, or another text, holds a control character or half of a surrogate pair."""
    OUT_OF_RANGE = "out_of_range"
    """A number, or a word out of a vocabulary, that means nothing here."""

    BAD_NAME = "bad_name"
    """A task's id, or a piece of its target, that could not be part of an archive key."""

    # An object of the archive, or its key (ingest.archive).
    SPOILT = "spoilt"
    """The object is not whole, or is not what its manifest says."""
    BAD_KEY = "bad_key"
    """An archive key that is not built as ours are."""

    # A point (`validate`).
    NOT_A_NUMBER = "not_a_number"
    INFINITE = "infinite"
    FUTURE = "future"
    """Further ahead of now than limits.future_s_max."""
    ANCIENT = "ancient"
    """Older than limits.retention_s."""
    BAD_TIMESTAMP = "bad_timestamp"
    """Before 1970 or after the year 9999."""
    MORE = "more"
    """Stands for further dead points of the batch, whose number was capped."""

    # A series, met again (the sinks).
    LABELS_DIFFER = "labels_differ"
    """A series id that is known with other labels."""
    LABELS_TAKEN = "labels_taken"
    """Another series has the labels that this one would have in Prometheus (ingest.series_labels)."""
    REFUSED_BY_RECEIVER = "refused_by_receiver"
    """Samples that a receiver of remote write would not take (ingest.forwarding)."""


# --- names ----------------------------------------------------------------------------------------------------

SLUG = r"[a-z0-9][a-z0-9-]{0,62}"
TARGET = rf"(?:cloudwatch/[0-9]{{12}}|(?!cloudwatch/){SLUG}/{SLUG})/{SLUG}"
"""A target as text: slugs all, and of CloudWatch the account is one of AWS's."""
_TARGET = re.compile(TARGET)
_TASK_ID = re.compile("[0-9a-f]{32}")


def task_problem(task: Task | Receipt) -> Reason | None:
    """Why a task, or its receipt, could have no archive key (or None): its id, its target or its tick."""
    if not _TASK_ID.fullmatch(task.task_id) or not _TARGET.fullmatch(str(task.target)):
        return Reason.BAD_NAME
    return None if 0 <= task.tick_s <= TIMESTAMP_S_MAX else Reason.OUT_OF_RANGE


# --- labels ---------------------------------------------------------------------------------------------------


def text_problem(text: str, limits: Limits) -> Reason | None:
    """Why a text cannot be a label (or None): more than limits.label_bytes_max bytes of UTF-8, or control characters."""
    if not text.isascii():
        try:
            size_bytes = len(text.encode())
        except UnicodeEncodeError:
            return Reason.CONTROL_CHARACTER
    else:
        size_bytes = len(text)
    if size_bytes > limits.label_bytes_max:
        return Reason.LABEL_TOO_LONG
    return Reason.CONTROL_CHARACTER if _CONTROL.search(text) else None


def dimensions_problem(dimensions: tuple[tuple[str, str], ...], limits: Limits) -> Reason | None:
    """Why dimensions cannot be a key's (or None): too many, not sorted by name, or a name twice."""
    if len(dimensions) > limits.dimensions_max:
        return Reason.TOO_MANY_DIMENSIONS
    for before, after in pairwise(dimensions):
        if before[0] >= after[0]:
            return (
                Reason.DUPLICATE_DIMENSION
                if len({name for name, _ in dimensions}) < len(dimensions)
                else Reason.UNSORTED_DIMENSIONS
            )
    return None


def texts_of(series: Series) -> Iterable[str]:
    """Every text of a series: labels, unit, and the dimensions' names and values."""
    key = series.key
    yield from (key.account, key.region, key.namespace, key.metric, key.stat, series.unit)
    for pair in key.dimensions:
        yield from pair


def series_problem(series: Series, limits: Limits) -> Reason | None:
    """Why a series cannot travel (or None). It is not written, and put aside where it is read: a source asks before."""
    if problem := dimensions_problem(series.key.dimensions, limits):
        return problem
    if not 0 <= series.key.period_s < 2**31:
        return Reason.OUT_OF_RANGE
    return next((p for text in texts_of(series) if (p := text_problem(text, limits))), None)


DESCRIPTION_CHARACTERS_MAX = 64 * 1024


def printable(text: str, characters_max: int) -> str:
    """A foreign text that forges no lines, fits PostgreSQL's text and UTF-8, and is cut where it is too long."""
    cut = text if len(text) <= characters_max else text[:characters_max] + "…"
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", cut)


def without(text: str, secrets: Iterable[str]) -> str:
    """A foreign text in which none of these stands, neither plain nor percent-encoded: servers quote what they were sent."""
    for secret in secrets:
        for form in (secret, quote(secret, safe="")) if secret else ():
            text = text.replace(form, "***")
    return text


def describe(series: Series) -> str:
    """A series as people read it: `account/region namespace/metric{name=value,…} stat 60s`. Bad labels are made printable."""
    key = series.key
    dimensions = ",".join(f"{name}={value}" for name, value in key.dimensions)
    return printable(
        f"{key.account}/{key.region} {key.namespace}/{key.metric}{{{dimensions}}} {key.stat} {key.period_s}s",
        DESCRIPTION_CHARACTERS_MAX,
    )


# --- points ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeadPoint:
    """A point that was put aside. Under Reason.MORE it stands for `count` others and names no series."""

    reason: Reason
    series: Series | None
    timestamp_s: int
    value: float
    count: int = 1

    def letter(self, origin: RecordPosition, batch_id: BatchId) -> DeadLetter:
        """What goes to the dead-letter topic. The value is a string in the JSON, which has no word for NaN."""
        if self.series is None:
            detail, payload = f"{self.count} further points of this batch", {"count": self.count}
            return DeadLetter(self.reason, detail, origin, batch_id, "", orjson.dumps(payload))
        point = orjson.dumps({"timestamp_s": self.timestamp_s, "value": repr(self.value)})
        return DeadLetter(self.reason, "", origin, batch_id, describe(self.series), point)


@dataclass(frozen=True, slots=True)
class Validated:
    """What became of a batch. `accepted` is None where no point is left."""

    accepted: Batch | None
    dead: tuple[DeadPoint, ...]

    @property
    def dead_points(self) -> int:
        """How many points were put aside, the capped ones included."""
        return sum(point.count for point in self.dead)


def validate(batch: Batch, now_s: int, limits: Limits) -> Validated:
    """Put aside the points that no store should hold: NaN, ±inf, and times that are out of range, ancient or future.

    The accepted batch has all the series of `batch`, those that are left without points too (with a count of 0), so that
    it shares series and ids with it. −0.0 becomes 0.0, as `ingest.model.point_hashes` counts it. Where every
    point is good, nothing is copied.
    """
    timestamps, values = batch.timestamps_s, batch.values
    checks = (
        (Reason.BAD_TIMESTAMP, (timestamps < 0) | (timestamps > TIMESTAMP_S_MAX)),
        (Reason.FUTURE, timestamps > now_s + limits.future_s_max),
        (Reason.ANCIENT, timestamps < now_s - limits.retention_s),
        (Reason.NOT_A_NUMBER, np.isnan(values)),
        (Reason.INFINITE, np.isinf(values)),
    )
    bad = np.logical_or.reduce([mask for _, mask in checks])
    if not bad.any():
        return Validated(_without_minus_zero(batch) if batch.points else None, ())
    dead = _dead(batch, bad, checks)
    if bad.all():
        return Validated(None, dead)
    good = ~bad
    owner = np.repeat(np.arange(len(batch.series)), batch.counts)
    accepted = replace(
        batch,
        counts=np.bincount(owner[good], minlength=len(batch.series)).astype(np.int32),
        timestamps_s=timestamps[good],
        values=values[good],
    )
    return Validated(_without_minus_zero(accepted), dead)


def _without_minus_zero(batch: Batch) -> Batch:
    if not (np.signbit(batch.values) & (batch.values == 0)).any():
        return batch
    return replace(batch, values=batch.values + 0.0)


def _dead(
    batch: Batch, bad: NDArray[np.bool_], checks: tuple[tuple[Reason, NDArray[np.bool_]], ...]
) -> tuple[DeadPoint, ...]:
    """The dead points in the batch's order, each under the first check that it fails."""
    total = int(np.count_nonzero(bad))
    where = np.flatnonzero(bad)[:DEAD_POINTS_MAX]
    ends = np.cumsum(batch.counts, dtype=np.int64)
    owners = np.searchsorted(ends, where, side="right")
    firsts = np.argmax([mask[where] for _, mask in checks], axis=0)
    dead = [
        DeadPoint(
            checks[first][0],
            batch.series[owner],
            int(batch.timestamps_s[i]),
            float(batch.values[i]),
        )
        for i, owner, first in zip(where.tolist(), owners.tolist(), firsts.tolist(), strict=True)
    ]
    if total > len(dead):
        dead.append(DeadPoint(Reason.MORE, None, 0, 0.0, total - len(dead)))
    return tuple(dead)
