"""Dead letters: what is in one, and how points are made of it again. Pure.

* A letter of points holds all that landing them later needs: labels, look and version. It depends on no topic's retention. A letter
  of a record holds its bytes.
* Whatever is put aside fits a letter: foreign texts are made printable, and what is too large is cut off. A letter that was cut
  is shown, and refused by a replay.
* Making a letter again gives the same identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from ingest.batch import batch_id_of
from ingest.errors import Rejected
from ingest.model import Batch, BatchId, DeadLetter, Series, SeriesKey, Target
from ingest.ports import Record
from ingest.validate import DeadPoint, Reason, describe, printable

PAYLOAD_BYTES_MAX = 700_000
"""A letter's bytes are kept up to here; the origin has the rest. Payload, context and description together fit a Kafka record."""

CONTEXT_BYTES_MAX = 128 * 1024
"""Labels above it were hostile: their series can be shown, and not replayed."""

KEY_BYTES_MAX = 512
DETAIL_CHARACTERS_MAX = 2_000

Point = tuple[int, float]
"""(timestamp in seconds, value)."""


@dataclass(frozen=True, slots=True)
class Look:
    """The batch that points were in, less its columns."""

    task_id: str
    target: Target
    service: str
    observed_at_ms: int
    revision: int
    grid_s: int


@dataclass(frozen=True, slots=True)
class LostPoints:
    """Points of one series, as a letter holds them."""

    look: Look
    series: Series
    points: tuple[Point, ...]


# --- making letters ---------------------------------------------------------------------------------------------


def of_record(record: Record, cluster: str, error: Rejected) -> DeadLetter:
    """The letter of a record that did not decode: its bytes."""
    return DeadLetter(
        str(error.reason),
        printable(error.what, DETAIL_CHARACTERS_MAX),
        record.position,
        batch_id_of(record.value),
        "",
        record.value[:PAYLOAD_BYTES_MAX],
        cluster,
        record.key[:KEY_BYTES_MAX],
    )


def of_points(
    points: Iterable[DeadPoint], batch: Batch, record: Record, cluster: str
) -> Iterator[DeadLetter]:
    """A letter a point that validation put aside."""
    batch_id = batch_id_of(record.value)
    for point in points:
        yield replace(
            point.letter(record.position, batch_id),
            cluster=cluster,
            key=record.key[:KEY_BYTES_MAX],
            context=_context(batch, point.series) if point.series else b"",
        )


def of_series(
    bad: Mapping[int, str], what: str, batch: Batch, batch_id: BatchId, record: Record, cluster: str
) -> Iterator[DeadLetter]:
    """A letter a series that is not let in: `bad` has reasons by index in the batch. All its points are one payload."""
    ends = np.cumsum(batch.counts, dtype=np.int64).tolist()
    for i, reason in sorted(bad.items()):
        own = slice(ends[i] - int(batch.counts[i]), ends[i])
        points = zip(batch.timestamps_s[own].tolist(), map(repr, batch.values[own].tolist()), strict=True)
        yield DeadLetter(
            str(reason),
            printable(what, DETAIL_CHARACTERS_MAX),
            record.position,
            batch_id,
            describe(batch.series[i]),
            orjson.dumps({"points": list(points)})[:PAYLOAD_BYTES_MAX],
            cluster,
            record.key[:KEY_BYTES_MAX],
            _context(batch, batch.series[i]),
        )


def _context(batch: Batch, series: Series) -> bytes:
    context = orjson.dumps(
        {
            "task_id": batch.task_id,
            "target": str(batch.target),
            "service": batch.service,
            "observed_at_ms": batch.observed_at_ms,
            "revision": batch.revision,
            "grid_s": batch.grid_s,
            "labels": labels_of(series),
        }
    )
    return context if len(context) <= CONTEXT_BYTES_MAX else b""


# --- reading letters --------------------------------------------------------------------------------------------


def holds_record(letter: DeadLetter) -> bool:
    """Whether the payload is a record's value; else it is points."""
    return not letter.series and letter.reason != Reason.MORE


def account_of(letter: DeadLetter) -> str:
    """The account: of the labels, else of the record's key, else of the description; empty where none names one."""
    if letter.context:
        try:
            return _text(_json(letter.context)["labels"]["account"])
        except (KeyError, TypeError, ValueError):
            return ""  # not ours: it is listed like any other, and refused by a replay
    pieces = letter.key.decode(errors="replace").split("/")
    if len(pieces) == 4:
        return pieces[1]
    head = letter.series.split(" ", 1)[0].split("/")
    return head[0] if len(head) == 2 else ""


def points_of(letter: DeadLetter) -> LostPoints:
    """The points of a letter, with their labels and look. Raises Rejected(bad_datum) where it does not hold them (any more)."""
    where = f"letter {letter.identity}"
    if letter.reason == Reason.MORE:
        what = "stands for points that were only counted: read their batch again with `headgate backfill`"
        raise Rejected(where, Reason.BAD_DATUM, what)
    if not letter.context:
        why = "version 1 has none" if not letter.cluster else "they were too long to keep"
        raise Rejected(where, Reason.BAD_DATUM, f"holds no labels ({why}): its record is at {letter.origin}")
    try:
        return LostPoints(*_look_and_series(_json(letter.context)), _points(_json(letter.payload)))
    except (KeyError, TypeError, ValueError) as error:
        raise Rejected(where, Reason.BAD_DATUM, f"was cut off, or is not ours: {error!r}") from error


def edited(lost: LostPoints, edit: Mapping[str, Any]) -> LostPoints:
    """With corrections: `value` and `timestamp_s` (of a letter of one point), `labels` (those that change).

    Raises Rejected(bad_datum) for anything else: an edit that is half understood is none.
    """
    unknown = set(edit) - {"value", "timestamp_s", "labels"}
    labels = edit.get("labels", {})
    if unknown or not edit or not isinstance(labels, dict) or set(labels) - _LABELS:
        names = sorted(unknown) or sorted(set(labels) - _LABELS if isinstance(labels, dict) else [])
        raise Rejected("edit", Reason.BAD_DATUM, f"give value, timestamp_s or labels, and not {names}")
    points = lost.points
    if edit.keys() & {"value", "timestamp_s"}:
        if len(points) != 1:
            raise Rejected(
                "edit", Reason.BAD_DATUM, f"the letter holds {len(points)} points: only labels can change"
            )
        [(timestamp_s, value)] = points
        corrected = {"timestamp_s": edit.get("timestamp_s", timestamp_s), "value": edit.get("value", value)}
    else:
        corrected = {"points": points}
    try:
        return LostPoints(lost.look, _series(labels_of(lost.series) | labels), _points(corrected))
    except (KeyError, TypeError, ValueError) as error:
        raise Rejected("edit", Reason.BAD_DATUM, f"{error!r}") from error


def _json(raw: bytes) -> dict[str, Any]:
    found = orjson.loads(raw)
    if not isinstance(found, dict):
        raise TypeError(f"{type(found).__name__} where an object should be")
    return found


def labels_of(series: Series) -> dict[str, Any]:
    """A series' labels as a letter has them, and as an edit may change them."""
    key = series.key
    return {
        "account": key.account,
        "region": key.region,
        "namespace": key.namespace,
        "metric": key.metric,
        "dimensions": [list(pair) for pair in key.dimensions],
        "stat": key.stat,
        "period_s": key.period_s,
        "unit": series.unit,
    }


_LABELS = frozenset(labels_of(Series(SeriesKey("", "", "", "", (), "", 0))))


def _look_and_series(context: Mapping[str, Any]) -> tuple[Look, Series]:
    look = Look(
        _text(context["task_id"]),
        Target.parse(_text(context["target"])),
        _text(context["service"]),
        _whole(context["observed_at_ms"]),
        _whole(context["revision"]),
        _whole(context["grid_s"]),
    )
    return look, _series(context["labels"])


def _series(labels: Mapping[str, Any]) -> Series:
    dimensions = tuple((_text(name), _text(value)) for name, value in labels["dimensions"])
    account, region, namespace, metric, stat = (
        _text(labels[name]) for name in ("account", "region", "namespace", "metric", "stat")
    )
    key = SeriesKey(account, region, namespace, metric, dimensions, stat, _whole(labels["period_s"]))
    return Series(key, _text(labels["unit"]))


def _points(payload: Mapping[str, Any]) -> tuple[Point, ...]:
    many = payload["points"] if "points" in payload else [(payload["timestamp_s"], payload["value"])]
    return tuple((_whole(timestamp_s), _float(value)) for timestamp_s, value in many)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _float(value: object) -> float:
    """A number, or a text that `repr` made of one: JSON has no word for NaN."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no number")
    return float(value)
