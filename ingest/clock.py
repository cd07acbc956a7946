"""The only place that reads the time.

Everything else is given a `Clock`. A run over old data (a replay of traces) moves the clock by an offset, and
every process of that run is given the same one; tests use `ManualClock`.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


def utc(seconds: float) -> datetime:
    """Seconds since the epoch as a datetime, in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def rfc3339(seconds: float) -> str:
    """The same in words, to the second: as 2026-11-24T05:00:00Z."""
    return utc(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


class Clock(Protocol):
    """Wall time for meaning, monotonic time for waiting."""

    def now_ms(self) -> int:
        """UTC now, milliseconds since the epoch."""
        ...

    def now_s(self) -> int:
        """UTC now, whole seconds since the epoch, rounded down."""
        ...

    def monotonic_s(self) -> float:
        """Seconds on a clock that never steps back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait that long."""
        ...


class SystemClock:
    """The machine's clock, moved by `offset_s` seconds (0 but in a replay of old data)."""

    def __init__(self, offset_s: int = 0) -> None:
        self.offset_s = offset_s

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.offset_s * 1000

    def now_s(self) -> int:
        return self.now_ms() // 1000

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class ManualClock:
    """A clock that moves only when told to, or when something sleeps on it."""

    def __init__(self, start_s: float) -> None:
        self._now_ms = int(start_s * 1000)
        self._monotonic_s = 0.0

    def now_ms(self) -> int:
        return self._now_ms

    def now_s(self) -> int:
        return self._now_ms // 1000

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def advance(self, seconds: float) -> None:
        """Move both clocks on."""
        self._now_ms += int(seconds * 1000)
        self._monotonic_s += seconds

    def step(self, seconds: float) -> None:
        """Move the wall clock alone, ahead or back."""
        self._now_ms += int(seconds * 1000)

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        await asyncio.sleep(0)
