"""Bytes on the wire and back: the values of all topics, and what the archive holds.

* What `encode_*` writes, `decode_*` reads; what would not be read is not written.
* Decoding foreign bytes raises `Rejected`, with a reason of `ingest.validate.Reason`, and nothing else. Sizes are capped
  before anything is decoded.

Every value is Avro in single-object encoding (`ingest.avro`); a Batch's is that, compressed (`ingest.batch`). In a receipt a
u64 digest is 8 bytes, little-endian, as numpy writes it.
"""

from __future__ import annotations

from typing import TypeVar

from ingest import avro
from ingest.batch import batch_id_of, decode_batch, decode_by_series, encode_batch
from ingest.errors import Rejected
from ingest.model import (
    REVISION_MAX,
    BatchId,
    DeadLetter,
    LookStatus,
    Outcome,
    Receipt,
    ReceiptItem,
    RecordPosition,
    Target,
    Task,
    TaskItem,
    TaskKind,
    WindowCount,
)
from ingest.validate import TIMESTAMP_S_MAX, Reason, task_problem

__all__ = [
    "batch_id_of",
    "decode_batch",
    "decode_by_series",
    "decode_dead_letter",
    "decode_ledger",
    "decode_receipt",
    "decode_task",
    "encode_batch",
    "encode_dead_letter",
    "encode_receipt",
    "encode_task",
]

MESSAGE_BYTES_MAX = 1_000_000
"""Of an uncompressed value: within Kafka's default message.max.bytes (1,048,588), with room for the record's key and headers."""

WINDOWS_PER_ITEM_MAX = 100_000
"""Of one task item, so that nobody loops over the windows of a foreign task for ever."""

_Word = TypeVar("_Word", TaskKind, LookStatus)


def raw_key(target: Target) -> bytes:
    """The key of a batch on `raw`: the target's labels and a spread, here 0, independent of any plan.

    A series keeps its partition when its target moves to another slot. The spread is hash(series) mod k with k = 1: one consumer lands
    more than 300,000 points/s, and a million series each five minutes need 17,000.
    """
    return f"{target}/0".encode()


def encode_task(task: Task) -> bytes:
    """A Task's record value. Raises Rejected."""
    _check_task(task)
    if not 0 <= task.revision <= REVISION_MAX:
        raise Rejected(f"task {task.task_id[:80]!r}", Reason.OUT_OF_RANGE, f"revision {task.revision}")
    fields = {
        "task_id": task.task_id,
        **_target_fields(task.target),
        "config_revision": task.config_revision,
        "tick_s": task.tick_s,
        "attempt": task.attempt,
        "kind": str(task.kind),
        "expires_s": task.expires_s,
        "items": [_item_fields(item) for item in task.items],
    }
    # In the oldest version that can say it: a worker of the version before knows no newer one.
    if any(item.period_s for item in task.items):
        return _write("task", fields | {"revision": task.revision})
    for item in fields["items"]:
        del item["period_s"]
    if task.revision:
        return _write("task", fields | {"revision": task.revision}, version=2)
    return _write("task", fields, version=1)


def decode_task(value: bytes) -> Task:
    """The inverse of `encode_task`. Raises Rejected."""
    return _task(_read(value, ("task",))[1])


def encode_receipt(receipt: Receipt) -> bytes:
    """A Receipt's record value. Raises Rejected."""
    _check_task(receipt)
    return _write(
        "receipt",
        {
            "task_id": receipt.task_id,
            **_target_fields(receipt.target),
            "shard": receipt.shard,
            "tick_s": receipt.tick_s,
            "started_at_ms": receipt.started_at_ms,
            "finished_at_ms": receipt.finished_at_ms,
            "archive_key": receipt.archive_key,
            "items": [_receipt_item_fields(item) for item in receipt.items],
        },
    )


def decode_receipt(value: bytes) -> Receipt:
    """The inverse of `encode_receipt`. Raises Rejected."""
    return _receipt(_read(value, ("receipt",))[1])


def decode_ledger(value: bytes) -> Task | Receipt:
    """A value of the ledger topic: a planned task or a receipt. Raises Rejected."""
    name, datum = _read(value, ("task", "receipt"))
    return _task(datum) if name == "task" else _receipt(datum)


def encode_dead_letter(letter: DeadLetter) -> bytes:
    """A DeadLetter's record value. Raises Rejected(payload_too_large) where its payload leaves no room."""
    return _write(
        "dead_letter",
        {
            "reason": str(letter.reason),
            "detail": letter.detail,
            "topic": letter.origin.topic,
            "partition": letter.origin.partition,
            "offset": letter.origin.offset,
            "batch_id": letter.batch_id,
            "series": letter.series,
            "payload": letter.payload,
            "cluster": letter.cluster,
            "key": letter.key,
            "context": letter.context,
        },
    )


def decode_dead_letter(value: bytes) -> DeadLetter:
    """The inverse of `encode_dead_letter`. Raises Rejected."""
    _, datum = _read(value, ("dead_letter",))
    origin = RecordPosition(datum["topic"], datum["partition"], datum["offset"])
    return DeadLetter(
        datum["reason"],
        datum["detail"],
        origin,
        BatchId(datum["batch_id"]),
        datum["series"],
        datum["payload"],
        datum["cluster"],
        # Where version 1 is resolved, fastavro 1.13 gives the default of a bytes field as str.
        datum["key"] or b"",
        datum["context"] or b"",
    )


def _write(name: str, datum: avro.Datum, version: int | None = None) -> bytes:
    _check_texts(f"write {name}", datum)
    value = avro.write(name, datum, version)
    if len(value) > MESSAGE_BYTES_MAX:
        raise Rejected(f"write {name}", Reason.PAYLOAD_TOO_LARGE, f"{len(value)} bytes")
    return value


def _read(value: bytes, names: tuple[str, ...]) -> tuple[str, avro.Datum]:
    if len(value) > MESSAGE_BYTES_MAX:
        raise Rejected(f"read {'|'.join(names)}", Reason.PAYLOAD_TOO_LARGE, f"{len(value)} bytes")
    name, datum = avro.read(value, names)
    _check_texts(f"read {name}", datum)
    return name, datum


def _check_texts(where: str, thing: object) -> None:
    """No NUL anywhere: PostgreSQL's text cannot hold it, so one in a receipt would stop the ledger's consumer."""
    if isinstance(thing, str):
        if "\0" in thing:
            raise Rejected(where, Reason.CONTROL_CHARACTER, repr(thing[:80]))
    elif isinstance(thing, dict):
        for key, value in thing.items():
            _check_texts(where, key)
            _check_texts(where, value)
    elif isinstance(thing, list):
        for value in thing:
            _check_texts(where, value)


def _target_fields(target: Target) -> avro.Datum:
    return {"source": target.source, "account": target.account, "region": target.region}


def _target(datum: avro.Datum) -> Target:
    return Target(datum["source"], datum["account"], datum["region"])


def _item_fields(item: TaskItem) -> avro.Datum:
    return {
        "service": item.service,
        "start_s": item.start_s,
        "end_s": item.end_s,
        "grid_s": item.grid_s,
        "period_s": item.period_s,
    }


def _check_task(task: Task | Receipt) -> None:
    if problem := task_problem(task):
        raise Rejected(
            "task", problem, f"{task.task_id[:80]!r} of {str(task.target)[:80]!r}, tick {task.tick_s}"
        )
    for one in task.items:
        _check_item(one.item if isinstance(one, ReceiptItem) else one)


def _check_item(item: TaskItem) -> None:
    """Whole windows, at least one, and not more than anybody should loop over."""
    if item.grid_s >= 1 and item.period_s >= 0 and abs(item.start_s) <= TIMESTAMP_S_MAX:
        windows, rest = divmod(item.end_s - item.start_s, item.grid_s)
        if not rest and 1 <= windows <= WINDOWS_PER_ITEM_MAX:
            return
    raise Rejected(f"task item {item.service}", Reason.OUT_OF_RANGE, f"{item}")


def _item(datum: avro.Datum) -> TaskItem:
    return TaskItem(datum["service"], datum["start_s"], datum["end_s"], datum["grid_s"], datum["period_s"])


def _task(datum: avro.Datum) -> Task:
    task = Task(
        task_id=datum["task_id"],
        target=_target(datum),
        config_revision=datum["config_revision"],
        tick_s=datum["tick_s"],
        attempt=datum["attempt"],
        kind=_word(TaskKind, datum["kind"]),
        expires_s=datum["expires_s"],
        items=tuple(_item(item) for item in datum["items"]),
        revision=datum["revision"],
    )
    _check_task(task)
    if not 0 <= task.revision <= REVISION_MAX:
        raise Rejected(f"task {task.task_id!r}", Reason.OUT_OF_RANGE, f"revision {task.revision}")
    return task


def _receipt_item_fields(done: ReceiptItem) -> avro.Datum:
    outcome = done.outcome
    return {
        "item": _item_fields(done.item),
        "outcome": {
            "status": str(outcome.status),
            "detail": outcome.detail,
            "observed_at_ms": outcome.observed_at_ms,
            "series": outcome.series,
            "requests": dict(sorted(outcome.requests.items())),
            "metrics_billed": outcome.metrics_billed,
            "metrics_in_doubt": outcome.metrics_in_doubt,
            "looked_from_s": outcome.looked_from_s,
        },
        "points": done.points,
        "windows": [_window_fields(window) for window in done.windows],
        "batches": list(done.batches),
        "whole": [_window_fields(window) for window in done.whole],
        "held": list(done.held),
    }


def _window_fields(window: WindowCount) -> avro.Datum:
    return {
        "start_s": window.start_s,
        "end_s": window.end_s,
        "points": window.points,
        "digest": window.digest.to_bytes(8, "little"),
    }


def _windows(data: list[avro.Datum]) -> tuple[WindowCount, ...]:
    return tuple(
        WindowCount(w["start_s"], w["end_s"], w["points"], int.from_bytes(w["digest"], "little"))
        for w in data
    )


def _receipt_item(datum: avro.Datum) -> ReceiptItem:
    outcome = datum["outcome"]
    return ReceiptItem(
        item=_item(datum["item"]),
        outcome=Outcome(
            status=_word(LookStatus, outcome["status"]),
            detail=outcome["detail"],
            observed_at_ms=outcome["observed_at_ms"],
            series=outcome["series"],
            requests=outcome["requests"],
            metrics_billed=outcome["metrics_billed"],
            metrics_in_doubt=outcome["metrics_in_doubt"],
            looked_from_s=outcome["looked_from_s"],
        ),
        points=datum["points"],
        windows=_windows(datum["windows"]),
        batches=tuple(BatchId(one) for one in datum["batches"]),
        whole=_windows(datum["whole"]),
        held=tuple(BatchId(one) for one in datum["held"]),
    )


def _receipt(datum: avro.Datum) -> Receipt:
    receipt = Receipt(
        task_id=datum["task_id"],
        target=_target(datum),
        shard=datum["shard"],
        tick_s=datum["tick_s"],
        started_at_ms=datum["started_at_ms"],
        finished_at_ms=datum["finished_at_ms"],
        archive_key=datum["archive_key"],
        items=tuple(_receipt_item(item) for item in datum["items"]),
    )
    _check_task(receipt)
    return receipt


def _word(vocabulary: type[_Word], word: str) -> _Word:
    try:
        return vocabulary(word)
    except ValueError as error:
        raise Rejected(vocabulary.__name__, Reason.OUT_OF_RANGE, repr(word[:80])) from error
