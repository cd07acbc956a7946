"""The archive as a `Replay`: archived tasks in the order of their ticks over all targets.

* *It goes on where it was*: a batch's place is its task's tick and a number (`place_of`), in `LANES` partitions over the targets. An object that
  is put behind a place already passed is missed here, and was published live.
* *Bounded memory*: `BYTES_AHEAD` of archived tasks, or a single one that is larger, and the keys of one day: 150 bytes each, 80 MB for 2,000 targets
  at 5 minutes.
* What cannot be read back is left out and named (`spoilt`), and the rest goes on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b

import structlog

from ingest.archive import S3Archive
from ingest.errors import Fatal, HeadgateError, Rejected
from ingest.model import Receipt, RecordPosition, Target
from ingest.ports import ArchivedTask, Record, StoredPosition
from ingest.replay import Scope
from ingest.wire import raw_key

_log = structlog.get_logger()

DAY_S = 86_400
LANES = 8
"""Partitions, by target: how many processes can share a replay. It never changes: positions would not fit."""
GETS_AHEAD = 32
"""As many as the archive's connections: at 30 ms a GET, a thousand small objects a second."""
BYTES_AHEAD = 64 * 1024 * 1024
RECEIPTS_MAX = 256
"""Of those that are kept; about so many are handed on together where they come without records."""
LISTINGS_AT_ONCE = 16
_PLACES_A_TICK = 1 << 24


class ArchiveReplay:
    """`Replay` of archived tasks with a tick in [scope.from_s, until_s), in the order of ticks over all targets."""

    def __init__(
        self, archive: S3Archive, lanes: Sequence[int], scope: Scope, until_s: int, *, receipts: bool = False
    ) -> None:
        """`receipts`: keep them, for whoever takes them out of `self.receipts` at each step."""
        self.topic = "archive"
        self.partitions = tuple(lanes)
        self.spoilt: list[str] = []
        """Keys of objects that cannot be read back, as far as they were met."""
        self.receipts: list[Receipt] = []
        """Of the wanted tasks that were met, those without points too, before their records come."""
        self._keeps_receipts = receipts
        self._archive = archive
        self._scope = scope
        self._until_s = max(until_s, scope.from_s)
        self._targets: list[Target] = []
        self._at_s = scope.from_s

    async def open(self) -> Mapping[int, int]:
        found = await self._archive.targets()
        self._targets = [t for t in found if self._scope.has(t) and lane_of(t) in self.partitions]
        return dict.fromkeys(self.partitions, place_of(self._scope.from_s, 0))

    def bounds(self, stored: Mapping[int, StoredPosition]) -> dict[int, tuple[int, int]]:
        # The record before a position is not compared: an object never changes, and whoever reads it checks its digests.
        return {p: (stored[p].next, 1 << 62) for p in self.partitions}

    async def records(
        self, starts: Mapping[int, int], stored: Mapping[int, StoredPosition]
    ) -> AsyncIterator[list[Record]]:
        places: dict[int, tuple[int, int]] = {}
        async with aclosing(self._tasks(starts)) as tasks:
            async for tick_s, target, task in tasks:
                lane = lane_of(target)
                last_s, used = places.get(lane, (tick_s, 0))
                first = used if last_s == tick_s else 0
                places[lane] = tick_s, first + len(task.payloads)
                records = self._records(lane, tick_s, first, target, task)
                self._at_s = tick_s
                if records or len(self.receipts) >= RECEIPTS_MAX:
                    yield records

    def _records(
        self, lane: int, tick_s: int, first: int, target: Target, task: ArchivedTask
    ) -> list[Record]:
        wanted: set[int] = set()
        at = 0
        met = False
        for done in task.receipt.items:
            if self._scope.wants(target, done.item.service, done.item.start_s, done.item.end_s):
                met = True
                wanted.update(range(at, at + len(done.batches) + len(done.held)))
            at += len(done.batches) + len(done.held)
        if met and self._keeps_receipts:
            self.receipts.append(task.receipt)
        key = raw_key(target)
        return [
            Record(RecordPosition(self.topic, lane, place_of(tick_s, first + i)), key, p.value, tick_s * 1000)
            for i, p in enumerate(task.payloads)
            if i in wanted
        ]

    async def _tasks(
        self, starts: Mapping[int, int]
    ) -> AsyncGenerator[tuple[int, Target, ArchivedTask], None]:
        """Archived tasks in the order of ticks, fetched ahead of whoever lands them."""
        ahead: deque[_Getting] = deque()
        bytes_ahead = 0
        try:
            async with aclosing(self._keys(starts)) as keys:
                async for tick_s, target, key, size in keys:
                    while ahead and (len(ahead) == GETS_AHEAD or bytes_ahead + size > BYTES_AHEAD):
                        first = ahead.popleft()
                        if (task := await first.task) is not None:
                            yield first.tick_s, first.target, task
                        bytes_ahead -= first.size
                    ahead.append(_Getting(tick_s, target, size, asyncio.create_task(self._get(key))))
                    bytes_ahead += size
            while ahead:
                first = ahead.popleft()
                if (task := await first.task) is not None:
                    yield first.tick_s, first.target, task
        finally:
            for one in ahead:
                one.task.cancel()
            await asyncio.gather(*(one.task for one in ahead), return_exceptions=True)

    async def _get(self, key: str) -> ArchivedTask | None:
        try:
            return await self._archive.get(key)
        except Rejected as error:
            _log.error("archived_task_spoilt", key=key, error=str(error))
            self.spoilt.append(key)
            return None

    async def _keys(self, starts: Mapping[int, int]) -> AsyncGenerator[tuple[int, Target, str, int], None]:
        """(tick, target, key, bytes), a day after the other, from where each lane stands."""
        from_s = {lane: place // _PLACES_A_TICK for lane, place in starts.items()}
        day_s = min(from_s.values(), default=self._until_s) // DAY_S * DAY_S
        slots = asyncio.Semaphore(LISTINGS_AT_ONCE)
        while day_s < self._until_s:

            async def listed(target: Target, day_s: int = day_s) -> list[tuple[int, str, int, Target]]:
                start_s = max(day_s, from_s[lane_of(target)])
                async with slots:
                    keys = self._archive.sized_keys(target, start_s, min(day_s + DAY_S, self._until_s))
                    return [(_tick_of(key), key, size, target) async for key, size in keys]

            try:
                async with asyncio.TaskGroup() as group:
                    listings = [group.create_task(listed(t)) for t in self._targets]
            except ExceptionGroup as errors:
                # Several fail for one reason.
                raise next((e for e in errors.exceptions if isinstance(e, HeadgateError)), errors) from errors
            for tick_s, key, size, target in sorted(one for done in listings for one in done.result()):
                yield tick_s, target, key, size
            day_s += DAY_S
            self._at_s = max(self._at_s, min(day_s, self._until_s))

    def done(self) -> float:
        span_s = self._until_s - self._scope.from_s
        return min(1.0, (self._at_s - self._scope.from_s) / span_s) if span_s else 1.0

    async def close(self) -> None:
        """Nothing is its own: the archive is whoever opened it's."""


@dataclass(frozen=True, slots=True)
class _Getting:
    tick_s: int
    target: Target
    size: int
    task: asyncio.Task[ArchivedTask | None]


def lane_of(target: Target) -> int:
    """Which of the `LANES` a target is in, on every machine."""
    return blake2b(str(target).encode(), digest_size=1).digest()[0] % LANES


def place_of(tick_s: int, index: int) -> int:
    """The place of the index-th batch of a lane's tick, as a position: they ascend with the tick. Raises Fatal at 16 million."""
    if index >= _PLACES_A_TICK:
        raise Fatal(
            f"archive, tick {tick_s}",
            f"has more than {_PLACES_A_TICK} batches",
            "narrow the accounts or regions",
        )
    return tick_s * _PLACES_A_TICK + index


def _tick_of(key: str) -> int:
    return int(key.rpartition("/")[2].partition("-")[0])
