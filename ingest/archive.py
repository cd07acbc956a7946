"""The raw archive in S3: an object a task, put if absent, never changed.

* **Put-if-absent may lose.** `put` returns what *is* archived, which is another run's where that came first.
* **An object is whole or it is rejected** (`ingest.objects` has its layout).
* **What a manifest names exists.** A task of ordinary size is one PUT. Above `OBJECT_BYTES_MAX` its payloads go into parts named by
  their content's digest, which are put first; the manifest comes last, under the task's key. Parts of a run that lost stay
  behind, without harm.
* Keys are built from checked pieces only, so no label can climb out of its prefix.
* Marks of runs that begin (`mark_begun`) are empty objects under keys of their own, `begun/v1/…`: no listing of the archive meets them, and a
  lifecycle rule may expire them.
* What can be had again for money (listings) is cached beside the archive, under keys of its own; that alone is overwritten.
* What the archive cannot tell again (`ingest.snapshot`) is kept beside it, under keys of its own, put if absent too.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import aiohttp
import structlog
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError

from ingest.aws_session import new_session
from ingest.clock import Clock, utc
from ingest.errors import Rejected, Transient
from ingest.model import Receipt, Target, Task
from ingest.objects import TAIL_BYTES, pack, part_key, read_task, spoilt, unpack_tail
from ingest.ports import ArchivedTask
from ingest.validate import SLUG, TARGET, Reason, task_problem
from shard_config.model import S3

DEADLINE_S = 60.0
"""Of one put or one get, with all their retries."""
ATTEMPTS = 4
"""Of one request, by botocore's standard mode; and of a put that lost to something that then was not there."""
MARK_S = 10.0
"""Of a mark: a look waits for it."""
BEGUN_MAX = 8
"""Marks of one task. A run that finds all of them there counts one run more than that, and no further."""
READS = 3
"""Of a task that came cut short or changed. botocore's attempts end with an answer's first bytes, and to ask the source again costs money."""

_PREFIX = r"(?:[A-Za-z0-9][A-Za-z0-9._=-]*/)*"
_KEY = re.compile(rf"(?P<prefix>{_PREFIX})v1/{TARGET}/\d{{4}}/\d\d/\d\d/(?P<tick>\d+)-[0-9a-f]{{32}}")


# --- keys -----------------------------------------------------------------------------------------------------


def archive_key(task: Task | Receipt, prefix: str = "") -> str:
    """`<prefix>v1/source/account/region/YYYY/MM/DD/tick-task`, the day being the tick's in UTC.

    Raises Rejected(bad_key) where a piece is not a slug, an account's 12 digits, or hexadecimal.
    """
    # The pieces before the whole: one with a slash in it could look like a prefix.
    if task_problem(task):
        raise Rejected("archive key", Reason.BAD_KEY, repr(str(task.target)[:200]))
    day = _day_prefix(task.target, _moment(task.tick_s), prefix)
    return checked_key(f"{day}{task.tick_s}-{task.task_id}")


def checked_key(key: str) -> str:
    """The key, where it is one that `archive_key` makes. Raises Rejected(bad_key)."""
    if not _KEY.fullmatch(key) or not key.isascii():
        raise Rejected("archive key", Reason.BAD_KEY, repr(key[:200]))
    return key


def begun_key(archive_key: str, number: int) -> str:
    """`<prefix>begun/v1/…/tick-task.number`: a mark of the task whose key that is. Raises Rejected(bad_key)."""
    prefix = _KEY.sub(r"\g<prefix>", checked_key(archive_key))
    return f"{prefix}begun/{archive_key.removeprefix(prefix)}.{number}"


def cache_key(name: Sequence[str], prefix: str = "") -> str:
    """`<prefix>cache/v1/name/…`. Raises Rejected(bad_key) where a piece of the name is not a slug."""
    return _beside("cache", name, prefix)


def snapshot_key(name: Sequence[str], prefix: str = "") -> str:
    """`<prefix>snapshots/v1/name/…`. Raises as `cache_key`."""
    return _beside("snapshots", name, prefix)


def _beside(folder: str, name: Sequence[str], prefix: str) -> str:
    key = f"{prefix}{folder}/v1/{'/'.join(name)}"
    if not re.fullmatch(rf"{_PREFIX}{folder}/v1(/{SLUG})+", key) or not key.isascii():
        raise Rejected(f"key in {folder}", Reason.BAD_KEY, repr(key[:200]))
    return key


def _moment(at_s: int) -> datetime:
    try:
        return utc(at_s)
    except (ValueError, OverflowError, OSError) as error:
        raise Rejected("archive key", Reason.BAD_KEY, f"tick_s {at_s}") from error


def _day_prefix(target: Target, day: datetime, prefix: str) -> str:
    return f"{prefix}v1/{target}/{day:%Y/%m/%d}/"


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
                if (archived := await self._read_task(key)) is not None:
                    self._log.info("archive_put_lost", key=key, task_id=archived.receipt.task_id)
                    return archived
                # 409: the other put is under way, or has failed since.
                await self._clock.sleep(0.2 * 2**attempt)
        raise Transient(self._name(key), "put lost to another one that is not there yet")

    async def get(self, archive_key: str) -> ArchivedTask | None:
        """What is archived, or None. Raises Transient; Rejected where it is spoilt or the key is bad."""
        checked_key(archive_key)
        async with self._translated(archive_key):
            return await self._read_task(archive_key)

    async def mark_begun(self, archive_key: str) -> int:
        """Put the next mark of a task; how many runs of it may have begun before. Raises Transient after MARK_S, Rejected where the key is bad.

        One PUT for a second run, two for a third: 0.0005 cent each, and what is in doubt is a look. Counted from above: a mark whose answer was
        lost counts as another run's.
        """
        async with self._translated(archive_key, MARK_S):
            for before in range(1, BEGUN_MAX + 1):
                if await self._mark(begun_key(archive_key, before)):
                    return before
        self._log.warning("more_runs_than_marks", key=archive_key, runs_at_least=BEGUN_MAX + 1)
        return BEGUN_MAX + 1

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
        return None if whole is None else whole.receipt

    async def keys(self, target: Target, start_s: int, end_s: int) -> AsyncIterator[str]:
        """Keys of a target's tasks with a tick in [start_s, end_s), day by day, in no certain order within one.

        Raises Transient.
        """
        async for key, _ in self.sized_keys(target, start_s, end_s):
            yield key

    async def sized_keys(self, target: Target, start_s: int, end_s: int) -> AsyncIterator[tuple[str, int]]:
        """As `keys`, each with the bytes of its task, parts included."""
        day = _moment(start_s).replace(hour=0, minute=0, second=0)
        while day.timestamp() < end_s:
            prefix = _day_prefix(target, day, self._prefix)
            async with self._translated(prefix):
                pages = self._client.get_paginator("list_objects_v2").paginate(
                    Bucket=self._bucket, Prefix=prefix
                )
                found = [
                    (one["Key"], one["Size"]) async for page in pages for one in page.get("Contents", ())
                ]
            sizes: dict[str, int] = {}
            for name, size in found:
                # A part's name is its task's key, and more.
                match = _KEY.match(name)
                if match and start_s <= int(match["tick"]) < end_s:
                    sizes[match[0]] = sizes.get(match[0], 0) + size
            names = {name for name, _ in found}
            for key, size in sizes.items():
                if key in names:
                    yield key, size
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

    async def cached(self, name: Sequence[str], bytes_max: int) -> bytes | None:
        """What is cached under a name, or None. Raises Transient; Rejected where it is larger or the name is bad."""
        key = cache_key(name, self._prefix)
        async with self._translated(key):
            return await self._read(key, bytes_max)

    async def cache(self, name: Sequence[str], body: bytes) -> None:
        """Cache it, in place of what is there. Raises Transient; Rejected where the name is bad."""
        key = cache_key(name, self._prefix)
        async with self._translated(key):
            await self._client.put_object(Bucket=self._bucket, Key=key, Body=body)

    async def keep(self, name: Sequence[str], body: bytes) -> bool:
        """Put a part of a snapshot if it is absent; False where it is there. Raises Transient; Rejected where the name is bad."""
        key = snapshot_key(name, self._prefix)
        async with self._translated(key):
            return await self._put(key, body)

    async def kept(self, name: Sequence[str], bytes_max: int) -> bytes | None:
        """A part of a snapshot, or None. Raises as `cached`."""
        key = snapshot_key(name, self._prefix)
        async with self._translated(key):
            return await self._read(key, bytes_max)

    async def kept_names(self, folder: str) -> list[str]:
        """The names in one folder of the snapshots, sorted. Raises Transient; Rejected where the folder's name is bad."""
        prefix = snapshot_key((folder,), self._prefix) + "/"
        async with self._translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            found = [one["Key"] async for page in pages for one in page.get("Contents", ())]
        return sorted(key.removeprefix(prefix) for key in found)

    async def first_tick_s(self, target: Target) -> int | None:
        """The tick of the oldest task that is archived of a target; None without one. Raises Transient."""
        folder = f"{self._prefix}v1/{target}/"
        for _ in ("year", "month", "day"):
            inner = await self._folders(folder)
            if not inner:
                return None
            folder = min(inner)
        async with self._translated(folder):
            answer = await self._client.list_objects_v2(Bucket=self._bucket, Prefix=folder, MaxKeys=1)
        [first] = answer.get("Contents", ()) or [None]
        match = _KEY.match(first["Key"]) if first else None
        return int(match["tick"]) if match else None

    async def _put(self, key: str, body: bytes) -> bool:
        """Whether the object was put; False where there is one, or another put of it is under way."""
        try:
            await self._client.put_object(Bucket=self._bucket, Key=key, Body=body, IfNoneMatch="*")
        except ClientError as error:
            if _status(error) in (409, 412):
                return False
            raise
        return True

    async def _mark(self, key: str) -> bool:
        """Whether the mark was put; False where there is one. Raises Transient where it is neither put nor there."""
        for attempt in range(1, ATTEMPTS + 1):
            if await self._put(key, b""):
                return True
            if await self._read(key, 0) is not None:
                return False
            await self._clock.sleep(0.2 * 2**attempt)  # 409, as in `put`
        raise Transient(self._name(key), "put lost to another one that is not there yet")

    async def _read_task(self, key: str) -> ArchivedTask | None:
        """What is archived. What broke on its way is read again; what is spoilt where it lies stays Rejected."""
        for attempt in range(1, READS):
            try:
                return await read_task(key, self._read)
            except (aiohttp.ClientPayloadError, FlexibleChecksumError, Rejected) as error:
                self._log.warning("archive_read_again", key=key, attempt=attempt, error=str(error))
                await self._clock.sleep(0.2 * 2**attempt)
        return await read_task(key, self._read)

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
                raise spoilt(f"{key} has {response['ContentLength']} bytes")
            return bytes(await stream.read())

    def _name(self, key: str) -> str:
        return f"archive s3://{self._bucket}/{key}"

    @asynccontextmanager
    async def _translated(self, key: str, deadline_s: float = math.inf) -> AsyncIterator[None]:
        """Within the archive's deadline and this one, with the vendor's errors as Transient: what the archive refuses today may be mended."""
        where = self._name(key)
        deadline_s = min(deadline_s, self._deadline_s)
        try:
            async with asyncio.timeout(deadline_s):
                yield
        except ClientError as error:
            what = f"{error.operation_name}: {error.response['Error'].get('Code')} ({_status(error)})"
            # Without its cause, whose text is the server's and may repeat what signed the request.
            raise Transient(where, what, _REMEDIES.get(_status(error), ""), retry_after_s=5.0) from None
        except TimeoutError as error:
            raise Transient(where, f"no answer within {deadline_s} s") from error
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
    async with (session or new_session()).create_client(
        "s3", region_name=s3.region, endpoint_url=s3.endpoint_url or None, config=config
    ) as client:
        yield S3Archive(client, s3, clock, deadline_s)
