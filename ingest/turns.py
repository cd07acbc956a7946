"""A limit on how many run at once, where some go first."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """At most `limit` hold a turn; of those who wait, the lowest rank is next, and of one rank who came first.

    *No turn is lost*: one that is handed to a waiter who is cancelled at that moment goes to the next.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = limit
        self._arrivals = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def turn(self, rank: int) -> AsyncIterator[None]:
        """Wait for a turn, and hold it inside."""
        await self._take(rank)
        try:
            yield
        finally:
            self._give()

    def resize(self, limit: int) -> None:
        """Another limit: more begin at once, fewer as those that hold a turn end."""
        more, self._limit = limit - self._limit, limit
        for _ in range(more):
            self._give()
        self._free += min(0, more)

    async def _take(self, rank: int) -> None:
        if self._free > 0:
            self._free -= 1
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        heapq.heappush(self._waiting, (rank, self._arrivals, mine))
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._give()
            raise

    def _give(self) -> None:
        while self._waiting and self._free >= 0:
            _, _, next_one = heapq.heappop(self._waiting)
            if not next_one.done():
                next_one.set_result(None)
                return
        self._free += 1
