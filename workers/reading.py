"""One group's membership, and what is done with its records: what all workers have that read `raw` or `ledger` for a store or a receiver.

* What fails is tried again with the same records, as long as their partitions are ours: back-pressure is to Kafka, not to memory.
* A rebalance waits for what is under way, and nothing of before is done after it.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import structlog

from ingest.batch import decoded_bytes
from ingest.errors import Transient
from ingest.group import Committable, Consumer
from ingest.ports import Record
from workers.lifecycle import Lifecycle

_log = structlog.get_logger()

POLL_RECORDS_MAX = 2048
"""As many as one fetch (16 MiB) usually brings, so that no partition lags behind the others of a backlog."""
RECORDS_MAX = 128
BYTES_MAX = 4 * 1024 * 1024
DECODED_BYTES_MAX = 32 * 1024 * 1024
"""Of one transaction's batches together, decompressed: 33 kB of zstd may hold 16 MiB. Rows take four times as much."""
DRAIN_S = 8.0
"""For what is in the works when told to stop. With Kafka's own goodbyes it is well within the 30 s of a Pod."""

Take = Callable[[Sequence[Record]], Awaitable[Mapping[int, Committable]]]


def ready(lifecycle: Lifecycle, _: Consumer) -> None:
    """A worker with one reader, or where any is enough, is ready when that one polls."""
    lifecycle.ready = True


class Reader:
    """One group's membership, and what is done with its records. `take` lands them and returns what to commit.

    `polled` is called after each poll. With `ticks`, `take` is called with no record as well, after each poll. While `full` says so, nothing is read.
    """

    def __init__(
        self,
        consumer: Callable[[Reader], Consumer],
        take: Take,
        open_partitions: Callable[[Consumer, Sequence[int]], Awaitable[Mapping[int, int]]],
        close_partitions: Callable[[], Awaitable[None]],
        *,
        polled: Callable[[Lifecycle, Consumer], None] = ready,
        ticks: bool = False,
        full: Callable[[], bool] = lambda: False,
    ) -> None:
        self._take = take
        self._open = open_partitions
        self._close = close_partitions
        self._polled = polled
        self._ticks = ticks
        self._full = full
        self._taking = asyncio.Lock()
        self._revocations = 0
        self.leaving = asyncio.Event()
        """A rebalance waits for `take`: one that may take long should look."""
        self.consumer = consumer(self)

    async def assigned(self, partitions: Sequence[int]) -> Mapping[int, int]:
        starts = await self._open(self.consumer, partitions)
        _log.info(
            "partitions_assigned",
            topic=self.consumer.topic,
            group=self.consumer.group,
            partitions=list(partitions),
        )
        return starts

    async def revoked(self, partitions: Sequence[int]) -> None:
        self.leaving.set()
        async with self._taking:
            self.leaving.clear()
            self._revocations += 1
            try:
                await self._close()
            except Transient as error:
                # Its next owner takes them all the same: by force.
                _log.warning("partitions_not_released", topic=self.consumer.topic, error=str(error))
        _log.info(
            "partitions_revoked",
            topic=self.consumer.topic,
            group=self.consumer.group,
            partitions=list(partitions),
        )

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop. What fails is tried again with the same records, as long as they are ours."""
        await self._until_it_works(lifecycle, self.consumer.start)
        try:
            while not lifecycle.stop.is_set():
                lifecycle.beat(self.consumer.group)
                try:
                    records = await self.consumer.poll(0 if self._full() else POLL_RECORDS_MAX, 0.25)
                except Transient as error:
                    self._retries("poll_retries", error)
                    await lifecycle.pause(error.retry_after_s)
                    continue
                self._polled(lifecycle, self.consumer)
                revocations = self._revocations
                for some in slices(records):
                    await self._until_it_works(lifecycle, partial(self._once, some, revocations))
                if self._ticks:
                    await self._until_it_works(lifecycle, partial(self._once, [], revocations))
        finally:
            await self.consumer.stop()

    async def _once(self, records: Sequence[Record], revocations: int) -> None:
        async with self._taking:
            if revocations != self._revocations:
                return  # they may be ours again by now: then they are read again, from the store's position
            next_offsets = await self._take(records)
        try:
            await self.consumer.commit(next_offsets)
        except Transient as error:
            self._retries("commit_skipped", error)

    async def _until_it_works(self, lifecycle: Lifecycle, work: Callable[[], Awaitable[None]]) -> None:
        while not lifecycle.stop.is_set():
            lifecycle.beat(self.consumer.group)
            try:
                await work()
            except Transient as error:
                self._retries("consumer_retries", error)
                await lifecycle.pause(error.retry_after_s)
            else:
                return

    def _retries(self, event: str, error: Transient) -> None:
        _log.warning(event, topic=self.consumer.topic, group=self.consumer.group, error=str(error))


def slices(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """What one transaction takes each: up to RECORDS_MAX records of up to BYTES_MAX together, DECODED_BYTES_MAX decompressed, the
    oldest of all partitions first.

    A partition's records stay in order. Oldest first because rows in order of time go to the end of the store's index; partition after
    partition PostgreSQL's COPY took 1.6 times as long (0.6 M rows/s instead of 0.95 M).
    """
    partitions: dict[int, list[Record]] = {}
    for record in records:
        partitions.setdefault(record.position.partition, []).append(record)
    some: list[Record] = []
    size = decoded = 0
    for record in heapq.merge(*partitions.values(), key=lambda r: r.timestamp_ms):
        size += len(record.value)
        decoded += (of_this := decoded_bytes(record.value))
        if some and (len(some) == RECORDS_MAX or size > BYTES_MAX or decoded > DECODED_BYTES_MAX):
            yield some
            some, size, decoded = [], len(record.value), of_this
        some.append(record)
    if some:
        yield some


async def cut_short(works: Sequence[asyncio.Task[None]], lifecycle: Lifecycle) -> None:
    """Cancel what goes on DRAIN_S after the signal to stop.

    Whatever is in hand lands again from the store's position; a network that swallows everything may keep a landing for a minute.
    """
    await lifecycle.stop.wait()
    await cancelled_after(works, DRAIN_S)


async def cancelled_after(works: Sequence[asyncio.Task[Any]], seconds: float) -> None:
    """Wait for these, that long at most."""
    if not works:
        return
    _, late = await asyncio.wait(works, timeout=seconds)
    for work in late:
        _log.warning("drain_cut_short", after_s=seconds)
        work.cancel()
