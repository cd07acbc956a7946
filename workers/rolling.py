"""Rolling up beside landing: a loop in each consumer that computes what landing marked, and says how far behind it is.

Consumers share the work by the hour and the day. Live hours come before old ones, and old ones rest as long as they take, so that a
store that is rolled up for the first time, or backfilled, takes half of one connection. A step that fails is tried again, and holds
up no landing.
"""

from __future__ import annotations

from datetime import datetime

import structlog
from prometheus_client import Counter, Gauge

from ingest.clock import Clock, utc
from ingest.errors import Transient
from ingest.ledger import Ledger
from ingest.sinks import rollup_store
from ingest.sinks.partitions import drop_partitions
from ingest.sinks.rollup_store import DAYS, HOURS, Kept, Rolled, Roller
from shard_config.model import Config
from workers.lifecycle import Lifecycle

_log = structlog.get_logger()

IDLE_S = 10.0
FOLD_INTERVAL_S = 60.0
DROP_INTERVAL_S = 600.0
OBSERVE_INTERVAL_S = 15.0
LIVE_S = 86_400
"""What ended longer ago is not urgent."""

POINTS = Counter("headgate_rollup_points_total", "Samples read to roll them up.")
ROWS = Counter(
    "headgate_rollup_rows_total",
    "Rows of hours and days that were computed and were others than before, their buckets' included.",
    ["level"],
)
for _level in ("hour", "day"):
    ROWS.labels(level=_level)
BEHIND = Gauge(
    "headgate_rollup_behind_seconds",
    "How long the oldest change has been due to be rolled up; rising: consumers cannot keep up, or rollups fail. 0: nothing is due, or rollups are off.",
)
DIRTY = Gauge(
    "headgate_rollup_dirty",
    "Hours and days whose rollups are due to be computed; many after a backfill or an update, and falling then.",
)


class Rolling:
    """The loop of one process, on a connection of its own (`Ledger.connected`)."""

    def __init__(self, store: Ledger, config: Config, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._roller = Roller(clock)
        self._due_s = {self._fold: 0.0, self._drop: 0.0, self._observe: 0.0}
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Go by this configuration from the next step on."""
        self._on = config.rollups.enabled
        self._hourly_days = config.rollups.hourly_retention_days
        self._daily_days = config.rollups.daily_retention_days

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop."""
        while not lifecycle.stop.is_set():
            try:
                pause_s = await self.turn()
            except Transient as error:
                _log.warning("rolling_up_retries", error=str(error))
                pause_s = IDLE_S
            await lifecycle.pause(pause_s)

    async def turn(self) -> float:
        """What is due, and one step; returns the seconds to rest. Raises Transient."""
        for work, due_s in self._due_s.items():
            if self._clock.monotonic_s() >= due_s:
                self._due_s[work] = self._clock.monotonic_s() + IDLE_S  # where it fails
                self._due_s[work] = self._clock.monotonic_s() + await work()
        if not self._on:
            return IDLE_S
        started_s = self._clock.monotonic_s()
        async with self._store.connected() as connection:
            done = await self._roller.roll(connection, self._now(), self._kept())
        if done is None:
            return IDLE_S
        _count(done)
        if done.start_s + done.span_s > self._clock.now_s() - LIVE_S:
            return 0.0
        return self._clock.monotonic_s() - started_s

    async def _fold(self) -> float:
        async with self._store.connected() as connection:
            await rollup_store.fold(connection)
        return FOLD_INTERVAL_S

    async def _drop(self) -> float:
        """Drop the months of rollups that are past their retention, whole."""
        kept = self._kept()
        async with self._store.connected() as connection:
            for of, from_s in ((HOURS, kept.hours_from_s), (DAYS, kept.days_from_s)):
                for day in await drop_partitions(connection, from_s // 86_400, of):
                    _log.info("rollups_dropped", table=of.table, month=f"{utc(day * 86_400):%Y-%m}")
        return DROP_INTERVAL_S

    async def _observe(self) -> float:
        async with self._store.connected() as connection:
            behind = await rollup_store.behind(connection, self._now())
        BEHIND.set(behind.behind_s if self._on else 0)
        DIRTY.set(behind.pieces)
        return OBSERVE_INTERVAL_S

    def _kept(self) -> Kept:
        """Whole days."""
        today = self._clock.now_s() // 86_400
        days = None if self._daily_days is None else max(0, today - self._daily_days)
        return Kept(max(0, today - self._hourly_days) * 86_400, (days or 0) * 86_400)

    def _now(self) -> datetime:
        return utc(self._clock.now_s())


def _count(done: Rolled) -> None:
    POINTS.inc(done.points)
    if done.buckets:
        ROWS.labels(level="hour" if done.span_s == 3_600 else "day").inc(done.rows)
