"""Objects of the archive: what one task's object holds, and how it is read back. Pure.

An object is whole or it is rejected: lengths, a checksum and every payload's digest are verified on reading, so neither truncation nor
a changed byte passes.

Layout of an object (integers big-endian):

    magic            8 bytes    "HGTASK1\\n" or, of a part, "HGPART1\\n"
    frames           each: u32 length, payload
    -- a part ends here; a task goes on:
    parts            each: 16 bytes blake2b-128 of the part object, u32 its length
    receipt          Avro, as on the ledger topic; its batches, and what it held, are the payloads' digests, item by item
    footer           u32 inline frames, u32 parts, u32 receipt's length, u64 length of everything before the footer,
                     16 bytes blake2b-128 of parts, receipt and the four numbers, magic again
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain

from ingest import wire
from ingest.errors import Rejected
from ingest.model import BatchId, Receipt
from ingest.ports import ArchivedTask, Payload
from ingest.validate import Reason

OBJECT_BYTES_MAX = 8 * 1024 * 1024
"""Of payloads in one object; above it a task goes into parts."""
PARTS_MAX = 64
"""Of one task: half a gigabyte of payloads, all of which whoever reads the task holds in memory."""
MANIFEST_BYTES_MAX = 2 * 1024 * 1024
"""Of everything in a task object beside its payloads."""
TAIL_BYTES = 64 * 1024
"""Of a task object, read where only its receipt is asked for: receipts of ordinary tasks have a few kB."""

_TASK, _PART = b"HGTASK1\n", b"HGPART1\n"
_FRAME = struct.Struct(">I")
_PART_ENTRY = struct.Struct(">16sI")
_COUNTS = struct.Struct(">IIIQ")
_FOOTER_BYTES = _COUNTS.size + 16 + len(_TASK)


@dataclass(frozen=True, slots=True)
class Part:
    """A part object of a heavy task. Its body is made when it is asked for: all parts are as large as the task, and one is put at a time."""

    digest: bytes
    """blake2b-128 of `body`."""
    length: int
    payloads: tuple[Payload, ...] = field(repr=False)

    @classmethod
    def of(cls, payloads: Sequence[Payload]) -> Part:
        digest = blake2b(_PART, digest_size=16)
        for payload in payloads:
            digest.update(_FRAME.pack(len(payload)))
            digest.update(payload.value)
        length = len(_PART) + sum(_FRAME.size + len(payload) for payload in payloads)
        return cls(digest.digest(), length, tuple(payloads))

    @property
    def body(self) -> bytes:
        return _PART + _frames(self.payloads)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A task object, taken apart. The payloads are the inline ones, then those of the parts (digest, length) in order."""

    receipt: Receipt
    inline: tuple[bytes, ...]
    parts: tuple[tuple[bytes, int], ...]


def pack(task: ArchivedTask, object_bytes_max: int = OBJECT_BYTES_MAX) -> tuple[tuple[Part, ...], bytes]:
    """The parts (none for a task of ordinary size) and the task object.

    Raises Rejected: spoilt where the payloads are not what the receipt lists, payload_too_large above PARTS_MAX.
    """
    inline = task.payloads
    _check_listed(task.receipt, (payload.value for payload in inline))
    parts: tuple[Part, ...] = ()
    if sum(map(len, inline)) > object_bytes_max:
        parts = tuple(Part.of(group) for group in _groups(inline, object_bytes_max))
        inline = ()
    if len(parts) > PARTS_MAX:
        raise Rejected(_where(task.receipt), Reason.PAYLOAD_TOO_LARGE, f"{len(parts)} parts")
    entries = b"".join(_PART_ENTRY.pack(part.digest, part.length) for part in parts)
    receipt = wire.encode_receipt(task.receipt)
    body = _TASK + _frames(inline)
    counts = _COUNTS.pack(len(inline), len(parts), len(receipt), len(body) + len(entries) + len(receipt))
    tail = entries + receipt + counts
    return parts, body + tail + _digest(tail) + _TASK


def unpack(body: bytes) -> Manifest:
    """The inverse of `pack`, of the task object. Raises Rejected(spoilt) unless it is whole and sound."""
    end = len(body) - _FOOTER_BYTES
    if end < len(_TASK) or not (body.startswith(_TASK) and body.endswith(_TASK)):
        raise spoilt("not a task object, or cut short")
    frames, parts, receipt_bytes, before_footer = _COUNTS.unpack_from(body, end)
    tail = end - receipt_bytes - parts * _PART_ENTRY.size
    if before_footer != end or tail < len(_TASK) or parts > PARTS_MAX:
        raise spoilt("lengths do not fit")
    if _digest(body[tail : end + _COUNTS.size]) != body[end + _COUNTS.size : -len(_TASK)]:
        raise spoilt("checksum of the manifest")
    inline = _read_frames(body[len(_TASK) : tail])
    if len(inline) != frames:
        raise spoilt(f"{len(inline)} of {frames} payloads")
    entries = tuple(_PART_ENTRY.iter_unpack(body[tail : end - receipt_bytes]))
    try:
        receipt = wire.decode_receipt(body[end - receipt_bytes : end])
    except Rejected as error:
        raise spoilt(f"receipt: {error.reason}") from error
    return Manifest(receipt, inline, entries)


def unpack_tail(tail: bytes) -> Receipt | None:
    """The receipt out of a task object's last bytes; None where it begins before them. Raises Rejected(spoilt)."""
    end = len(tail) - _FOOTER_BYTES
    if end < 0 or not tail.endswith(_TASK):
        raise spoilt("not a task object, or cut short")
    _, parts, receipt_bytes, _ = _COUNTS.unpack_from(tail, end)
    first = end - receipt_bytes - parts * _PART_ENTRY.size
    if first < 0:
        return None
    if _digest(tail[first : end + _COUNTS.size]) != tail[end + _COUNTS.size : -len(_TASK)]:
        raise spoilt("checksum of the manifest")
    try:
        return wire.decode_receipt(tail[end - receipt_bytes : end])
    except Rejected as error:
        raise spoilt(f"receipt: {error.reason}") from error


def assemble(manifest: Manifest, bodies: Sequence[bytes]) -> ArchivedTask:
    """The task, from its manifest and its parts' objects. Raises Rejected(spoilt) unless every digest fits."""
    values = list(manifest.inline)
    for (digest, length), body in zip(manifest.parts, bodies, strict=True):
        if len(body) != length or _digest(body) != digest or not body.startswith(_PART):
            raise spoilt(f"part {digest.hex()}")
        values += _read_frames(body[len(_PART) :])
    ids = _check_listed(manifest.receipt, values)
    payloads = tuple(Payload(batch_id, value) for batch_id, value in zip(ids, values, strict=True))
    return ArchivedTask(manifest.receipt, payloads)


async def read_task(key: str, read: Callable[[str, int], Awaitable[bytes | None]]) -> ArchivedTask | None:
    """What is archived under a key, or None; `read(name, bytes_max)` gives an object's bytes, or None where there is none.

    Raises Rejected(spoilt), and what `read` raises.
    """
    body = await read(key, OBJECT_BYTES_MAX + MANIFEST_BYTES_MAX)
    if body is None:
        return None
    manifest = unpack(body)
    if manifest.receipt.archive_key != key:
        raise spoilt(f"{key} holds {manifest.receipt.archive_key}")
    bodies = []
    for digest, length in manifest.parts:
        part = await read(part_key(key, digest), length)
        if part is None:
            raise spoilt(f"part {digest.hex()} of {key} is missing")
        bodies.append(part)
    return assemble(manifest, bodies)


def part_key(key: str, digest: bytes) -> str:
    """Where a part of the task under `key` is."""
    return f"{key}.{digest.hex()}"


def _check_listed(receipt: Receipt, values: Iterable[bytes]) -> list[BatchId]:
    ids = [wire.batch_id_of(value) for value in values]
    if ids != list(chain.from_iterable(item.batches + item.held for item in receipt.items)):
        raise Rejected(_where(receipt), Reason.SPOILT, "the payloads are not those of the receipt")
    return ids


def _groups(payloads: Iterable[Payload], bytes_max: int) -> list[list[Payload]]:
    groups: list[list[Payload]] = []
    size = bytes_max
    for payload in payloads:
        if size + len(payload) > bytes_max:
            groups.append([])
            size = 0
        groups[-1].append(payload)
        size += len(payload)
    return groups


def _frames(payloads: Iterable[Payload]) -> bytes:
    return b"".join(chain.from_iterable((_FRAME.pack(len(one)), one.value) for one in payloads))


def _read_frames(data: bytes) -> tuple[bytes, ...]:
    frames = []
    at = 0
    while at < len(data):
        if at + _FRAME.size > len(data):
            raise spoilt("a payload's length is cut short")
        (length,) = _FRAME.unpack_from(data, at)
        at += _FRAME.size + length
        if at > len(data):
            raise spoilt("a payload is cut short")
        frames.append(data[at - length : at])
    return tuple(frames)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def spoilt(what: str) -> Rejected:
    """What is raised for an object that is not whole and sound."""
    return Rejected("archive object", Reason.SPOILT, what)


def _where(receipt: Receipt) -> str:
    return f"archive {receipt.archive_key or receipt.task_id}"
