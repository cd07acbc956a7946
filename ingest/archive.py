"""The raw archive in S3: an object a task, put if absent, never changed.

* **Put-if-absent may lose.** `put` returns what *is* archived, which is another run's where that came first.
* **An object is whole or it is rejected**: lengths, a checksum and every payload's digest are verified on reading, so neither
  truncation nor a changed byte passes.
* **What a manifest names exists.** A task of ordinary size is one PUT. Above `OBJECT_BYTES_MAX` its payloads go into parts named by
  their content's digest, which are put first; the manifest comes last, under the task's key. Parts of a run that lost stay
  behind, without harm.
* Keys are built from checked pieces only, so no label can climb out of its prefix.

Layout of an object (integers big-endian):

    magic            8 bytes    "HGTASK1\\n" or, of a part, "HGPART1\\n"
    frames           each: u32 length, payload
    -- a part ends here; a task goes on:
    parts            each: 16 bytes blake2b-128 of the part object, u32 its length
    receipt          Avro, as on the ledger topic; its batches are the payloads' digests, in order
    footer           u32 inline frames, u32 parts, u32 receipt's length, u64 length of everything before the footer,
                     16 bytes blake2b-128 of parts, receipt and the four numbers, magic again
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from itertools import chain
from typing import Any

import aiohttp
import structlog
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError

from ingest import wire
from ingest.clock import Clock
from ingest.errors import Rejected, Transient
from ingest.model import BatchId, Receipt, Target, Task
from ingest.ports import ArchivedTask, Payload
from ingest.validate import SLUG, Reason
from shard_config.model import S3

OBJECT_BYTES_MAX = 8 * 1024 * 1024
"""Of payloads in one object; above it a task goes into parts."""
PARTS_MAX = 64
"""Of one task: half a gigabyte of payloads, all of which whoever reads the task holds in memory."""
MANIFEST_BYTES_MAX = 2 * 1024 * 1024
"""Of everything in a task object beside its payloads."""
TAIL_BYTES = 64 * 1024
"""Of a task object, read where only its receipt is asked for: receipts of ordinary tasks have a few kB."""
DEADLINE_S = 60.0
"""Of one put or one get, with all their retries."""
ATTEMPTS = 4
"""Of one request, by botocore's standard mode; and of a put that lost to something that then was not there."""

_TASK, _PART = b"HGTASK1\n", b"HGPART1\n"
_FRAME = struct.Struct(">I")
_PART_ENTRY = struct.Struct(">16sI")
_COUNTS = struct.Struct(">IIIQ")
_FOOTER_BYTES = _COUNTS.size + 16 + len(_TASK)
_KEY = re.compile(
    rf"(?:[A-Za-z0-9][A-Za-z0-9._=-]*/)*v1/{SLUG}/{SLUG}/{SLUG}/\d{{4}}/\d\d/\d\d/(?P<tick>\d+)-[0-9a-f]{{32}}"
)


# --- keys -----------------------------------------------------------------------------------------------------


def archive_key(task: Task | Receipt, prefix: str = "") -> str:
    """`<prefix>v1/source/account/region/YYYY/MM/DD/tick-task`, the day being the tick's in UTC.

    Raises Rejected(bad_key) where a piece is not a slug, an account's 12 digits, or hexadecimal.
    """
    day = _day_prefix(task.target, _moment(task.tick_s), prefix)
    return checked_key(f"{day}{task.tick_s}-{task.task_id}")


def checked_key(key: str) -> str:
    """The key, where it is one that `archive_key` makes. Raises Rejected(bad_key)."""
    if not _KEY.fullmatch(key) or not key.isascii():
        raise Rejected("archive key", Reason.BAD_KEY, repr(key[:200]))
    return key


def _moment(at_s: int) -> datetime:
    try:
        return datetime.fromtimestamp(at_s, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise Rejected("archive key", Reason.BAD_KEY, f"tick_s {at_s}") from error


def _day_prefix(target: Target, day: datetime, prefix: str) -> str:
    return f"{prefix}v1/{target}/{day:%Y/%m/%d}/"


# --- objects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """A part object of a heavy task. `digest` is blake2b-128 of `body`."""

    digest: bytes
    body: bytes


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
    values = [payload.value for payload in task.payloads]
    _check_listed(task.receipt, values)
    parts: tuple[Part, ...] = ()
    if sum(map(len, values)) > object_bytes_max:
        bodies = [_PART + _frames(group) for group in _groups(values, object_bytes_max)]
        parts = tuple(Part(_digest(body), body) for body in bodies)
        values = []
    if len(parts) > PARTS_MAX:
        raise Rejected(_where(task.receipt), Reason.PAYLOAD_TOO_LARGE, f"{len(parts)} parts")
    entries = b"".join(_PART_ENTRY.pack(part.digest, len(part.body)) for part in parts)
    receipt = wire.encode_receipt(task.receipt)
    body = _TASK + _frames(values)
    counts = _COUNTS.pack(len(values), len(parts), len(receipt), len(body) + len(entries) + len(receipt))
    tail = entries + receipt + counts
    return parts, body + tail + _digest(tail) + _TASK


def unpack(body: bytes) -> Manifest:
    """The inverse of `pack`, of the task object. Raises Rejected(spoilt) unless it is whole and sound."""
    end = len(body) - _FOOTER_BYTES
    if end < len(_TASK) or not (body.startswith(_TASK) and body.endswith(_TASK)):
        raise _spoilt("not a task object, or cut short")
    frames, parts, receipt_bytes, before_footer = _COUNTS.unpack_from(body, end)
    tail = end - receipt_bytes - parts * _PART_ENTRY.size
    if before_footer != end or tail < len(_TASK) or parts > PARTS_MAX:
        raise _spoilt("lengths do not fit")
    if _digest(body[tail : end + _COUNTS.size]) != body[end + _COUNTS.size : -len(_TASK)]:
        raise _spoilt("checksum of the manifest")
    inline = _read_frames(body[len(_TASK) : tail])
    if len(inline) != frames:
        raise _spoilt(f"{len(inline)} of {frames} payloads")
    entries = tuple(_PART_ENTRY.iter_unpack(body[tail : end - receipt_bytes]))
    try:
        receipt = wire.decode_receipt(body[end - receipt_bytes : end])
    except Rejected as error:
        raise _spoilt(f"receipt: {error.reason}") from error
    return Manifest(receipt, inline, entries)


def unpack_tail(tail: bytes) -> Receipt | None:
    """The receipt out of a task object's last bytes; None where it begins before them. Raises Rejected(spoilt)."""
    end = len(tail) - _FOOTER_BYTES
    if end < 0 or not tail.endswith(_TASK):
        raise _spoilt("not a task object, or cut short")
    _, parts, receipt_bytes, _ = _COUNTS.unpack_from(tail, end)
    first = end - receipt_bytes - parts * _PART_ENTRY.size
    if first < 0:
        return None
    if _digest(tail[first : end + _COUNTS.size]) != tail[end + _COUNTS.size : -len(_TASK)]:
        raise _spoilt("checksum of the manifest")
    try:
        return wire.decode_receipt(tail[end - receipt_bytes : end])
    except Rejected as error:
        raise _spoilt(f"receipt: {error.reason}") from error


def assemble(manifest: Manifest, bodies: Sequence[bytes]) -> ArchivedTask:
    """The task, from its manifest and its parts' objects. Raises Rejected(spoilt) unless every digest fits."""
    values = list(manifest.inline)
    for (digest, length), body in zip(manifest.parts, bodies, strict=True):
        if len(body) != length or _digest(body) != digest or not body.startswith(_PART):
            raise _spoilt(f"part {digest.hex()}")
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
        raise _spoilt(f"{key} holds {manifest.receipt.archive_key}")
    bodies = []
    for digest, length in manifest.parts:
        part = await read(part_key(key, digest), length)
        if part is None:
            raise _spoilt(f"part {digest.hex()} of {key} is missing")
        bodies.append(part)
    return assemble(manifest, bodies)


def part_key(key: str, digest: bytes) -> str:
    """Where a part of the task under `key` is."""
    return f"{key}.{digest.hex()}"


def _check_listed(receipt: Receipt, values: Sequence[bytes]) -> list[BatchId]:
    ids = [wire.batch_id_of(value) for value in values]
    if ids != list(chain.from_iterable(item.batches for item in receipt.items)):
        raise Rejected(_where(receipt), Reason.SPOILT, "the payloads are not those of the receipt")
    return ids


def _groups(values: Iterable[bytes], bytes_max: int) -> list[list[bytes]]:
    groups: list[list[bytes]] = []
    size = bytes_max
    for value in values:
        if size + len(value) > bytes_max:
            groups.append([])
            size = 0
        groups[-1].append(value)
        size += len(value)
    return groups


def _frames(values: Iterable[bytes]) -> bytes:
    return b"".join(chain.from_iterable((_FRAME.pack(len(value)), value) for value in values))


def _read_frames(data: bytes) -> tuple[bytes, ...]:
    frames = []
    at = 0
    while at < len(data):
        if at + _FRAME.size > len(data):
            raise _spoilt("a payload's length is cut short")
        (length,) = _FRAME.unpack_from(data, at)
        at += _FRAME.size + length
        if at > len(data):
            raise _spoilt("a payload is cut short")
        frames.append(data[at - length : at])
    return tuple(frames)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _spoilt(what: str) -> Rejected:
    return Rejected("archive object", Reason.SPOILT, what)


def _where(receipt: Receipt) -> str:
    return f"archive {receipt.archive_key or receipt.task_id}"


# --- S3 -------------------------------------------------------------------------------------------------------


class S3Archive:
    """`ingest.ports.Archive` on a client of aiobotocore's, which whoever made it closes (`open_archive`)."""

    def __init__(self, client: Any, s3: S3, clock: Clock, deadline_s: float = DEADLINE_S) -> None:
        self._client = client
        self._bucket = s3.bucket
        self._prefix = s3.prefix
        self._clock = clock
        self._deadline_s = deadline_s
        self._log = structlog.get_logger().bind(bucket=s3.bucket)

    async def put(self, task: ArchivedTask) -> ArchivedTask:
        """Put if absent; what *is* archived. Raises Transient, and Rejected where that is spoilt or has a bad key."""
        key = checked_key(task.receipt.archive_key)
        parts, body = pack(task)
        async with self._translated(key):
            for part in parts:
                # A part that is there has this content: its name says so, and S3 puts whole objects.
                await self._put(part_key(key, part.digest), part.body)
            for attempt in range(1, ATTEMPTS + 1):
                if await self._put(key, body):
                    return task
                if (archived := await read_task(key, self._read)) is not None:
                    self._log.info("archive_put_lost", key=key, task_id=archived.receipt.task_id)
                    return archived
                # 409: the other put is under way, or has failed since.
                await self._clock.sleep(0.2 * 2**attempt)
        raise Transient(self._name(key), "put lost to another one that is not there yet")

    async def get(self, archive_key: str) -> ArchivedTask | None:
        """What is archived, or None. Raises Transient; Rejected where it is spoilt or the key is bad."""
        checked_key(archive_key)
        async with self._translated(archive_key):
            return await read_task(archive_key, self._read)

    async def receipt(self, archive_key: str) -> Receipt | None:
        """The receipt of what is archived, without its payloads where it fits TAIL_BYTES; None where there is nothing.

        Raises as `get`.
        """
        checked_key(archive_key)
        async with self._translated(archive_key):
            tail = await self._read(archive_key, TAIL_BYTES, f"bytes=-{TAIL_BYTES}")
        if tail is None:
            return None
        if (found := unpack_tail(tail)) is not None:
            return found
        whole = await self.get(archive_key)
        return whole and whole.receipt

    async def keys(self, target: Target, start_s: int, end_s: int) -> AsyncIterator[str]:
        """Keys of a target's tasks with a tick in [start_s, end_s), day by day, in no certain order within one.

        Raises Transient.
        """
        day = _moment(start_s).replace(hour=0, minute=0, second=0)
        while day.timestamp() < end_s:
            prefix = _day_prefix(target, day, self._prefix)
            async with self._translated(prefix):
                pages = self._client.get_paginator("list_objects_v2").paginate(
                    Bucket=self._bucket, Prefix=prefix
                )
                keys = [found["Key"] async for page in pages for found in page.get("Contents", ())]
            for key in keys:
                match = _KEY.fullmatch(key)
                if match and start_s <= int(match["tick"]) < end_s:
                    yield key
            day += timedelta(days=1)

    async def targets(self) -> list[Target]:
        """Every target that something is archived of, sorted. Raises Transient."""
        folders = [f"{self._prefix}v1/"]
        for _ in ("source", "account", "region"):
            folders = [inner for folder in folders for inner in await self._folders(folder)]
        return sorted(Target(*folder.rstrip("/").split("/")[-3:]) for folder in folders)

    async def _folders(self, prefix: str) -> list[str]:
        async with self._translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=prefix, Delimiter="/"
            )
            return [found["Prefix"] async for page in pages for found in page.get("CommonPrefixes", ())]

    async def _put(self, key: str, body: bytes) -> bool:
        """Whether the object was put; False where there is one, or another put of it is under way."""
        try:
            await self._client.put_object(Bucket=self._bucket, Key=key, Body=body, IfNoneMatch="*")
        except ClientError as error:
            if _status(error) in (409, 412):
                return False
            raise
        return True

    async def _read(self, key: str, bytes_max: int, part: str = "") -> bytes | None:
        ranged = {"Range": part} if part else {}
        try:
            response = await self._client.get_object(Bucket=self._bucket, Key=key, **ranged)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                return None
            raise
        async with response["Body"] as stream:
            if response["ContentLength"] > bytes_max:
                raise _spoilt(f"{key} has {response['ContentLength']} bytes")
            return bytes(await stream.read())

    def _name(self, key: str) -> str:
        return f"archive s3://{self._bucket}/{key}"

    @asynccontextmanager
    async def _translated(self, key: str) -> AsyncIterator[None]:
        """Within the deadline, with the vendor's errors as Transient: what the archive refuses today may be mended."""
        where = self._name(key)
        try:
            async with asyncio.timeout(self._deadline_s):
                yield
        except ClientError as error:
            what = f"{error.operation_name}: {error.response['Error'].get('Code')} ({_status(error)})"
            raise Transient(where, what, _REMEDIES.get(_status(error), ""), retry_after_s=5.0) from error
        except TimeoutError as error:
            raise Transient(where, f"no answer within {self._deadline_s} s") from error
        except (BotoCoreError, aiohttp.ClientError, OSError) as error:
            raise Transient(where, f"{type(error).__name__}: {error}") from error


_REMEDIES = {
    403: "grant s3:GetObject, s3:PutObject and s3:ListBucket: without the last, S3 says 403 of a key that is not there",
    404: "create the bucket, or correct s3.bucket",
}


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@asynccontextmanager
async def open_archive(
    s3: S3, clock: Clock, session: AioSession | None = None, deadline_s: float = DEADLINE_S
) -> AsyncIterator[S3Archive]:
    """An archive on a client of its own, credentials from the environment. Pass the process's session: they are heavy."""
    config = AioConfig(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=5,
        read_timeout=20,
        max_pool_connections=32,
        # Other servers than AWS's are rarely reached by a host name for each bucket.
        s3={"addressing_style": "path"} if s3.endpoint_url else {},
    )
    async with (session or AioSession()).create_client(
        "s3", region_name=s3.region, endpoint_url=s3.endpoint_url or None, config=config
    ) as client:
        yield S3Archive(client, s3, clock, deadline_s)
