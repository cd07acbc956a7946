"""In-memory stand-ins for what is outside, for tests. Each passes the contract suite that the real one passes."""

from __future__ import annotations

import asyncio

from ingest.archive import BEGUN_MAX, begun_key, checked_key
from ingest.objects import pack, part_key, read_task
from ingest.ports import ArchivedTask


class FakeArchive:
    """`ingest.ports.Archive` over a dict, with the real one's objects as its values.

    `failures` are raised, one a call (None: that call gets through), before anything else happens; `puts` and `gets` count the calls that got through.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.failures: list[BaseException | None] = []
        self.puts = 0
        self.gets = 0

    async def put(self, task: ArchivedTask) -> ArchivedTask:
        await self._answer()
        self.puts += 1
        key = checked_key(task.receipt.archive_key)
        parts, body = pack(task)
        for part in parts:
            self.objects.setdefault(part_key(key, part.digest), part.body)
        if self.objects.setdefault(key, body) is body:
            return task
        archived = await read_task(key, self._read)
        assert archived is not None
        return archived

    async def get(self, archive_key: str) -> ArchivedTask | None:
        await self._answer()
        self.gets += 1
        return await read_task(checked_key(archive_key), self._read)

    async def mark_begun(self, archive_key: str) -> int:
        await self._answer()
        for before in range(1, BEGUN_MAX + 1):
            if (key := begun_key(archive_key, before)) not in self.objects:
                self.objects[key] = b""
                return before
        return BEGUN_MAX + 1

    async def _answer(self) -> None:
        # Whoever calls must be ready to be interrupted here, as by a real one.
        await asyncio.sleep(0)
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure

    async def _read(self, name: str, bytes_max: int) -> bytes | None:
        return self.objects.get(name)
