"""How fast a backfill may go: never so fast that live data waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from ingest.brokers import client_options
from ingest.clock import Clock
from ingest.errors import Transient
from ingest.log import quietly
from shard_config.model import Config
from workers.names import landing_group

_log = structlog.get_logger()

LAG_CHECK_S = 2.0
LIVE_LAG_MAX = 256
"""Records that live consumers may be behind: two of their landings."""
FIRST_RECORDS = 8
"""Landed together before it is known what a record holds."""
YIELD_MAX_S = 20.0
"""So long a landing waits for consumers that do not move at all; then no more, until they move."""


class Pace:
    """How fast a backfill may go: `points_per_s` (0: no limit), and no further while live consumers fall behind.

    `live` gives (records that live consumers are behind, a number that moves as they land), or None where there are none, or nobody knows.
    """

    def __init__(
        self, points_per_s: int, live: Callable[[], Awaitable[tuple[int, int] | None]], clock: Clock
    ) -> None:
        self._points_per_s = points_per_s
        self._live = live
        self._clock = clock
        self._free_s = self._check_s = clock.monotonic_s()
        self._stands_at: int | None = None
        self._records = self._points = 0

    async def before_landing(self) -> None:
        """Wait for our turn."""
        if (wait_s := self._free_s - self._clock.monotonic_s()) > 0:
            await self._clock.sleep(wait_s)
        if self._clock.monotonic_s() < self._check_s:
            return
        await self._let_live_go_first()
        self._check_s = self._clock.monotonic_s() + LAG_CHECK_S

    async def _let_live_go_first(self) -> None:
        standing_s = 0.0
        at = None
        while (live := await self._live()) is not None and live[0] > LIVE_LAG_MAX:
            if live[1] == self._stands_at:
                return
            standing_s = standing_s + 1.0 if live[1] == at else 0.0
            if standing_s >= YIELD_MAX_S:
                _log.warning("live_consumers_stand_still", lag=live[0])
                self._stands_at = live[1]
                return
            if at is None:
                _log.info("yielding_to_live_data", lag=live[0])
            at = live[1]
            await self._clock.sleep(1.0)

    def records_at_once(self, records_max: int) -> int:
        """How many records to land together: about a second's worth of the rate, as far as records have shown what they hold."""
        if not self._points_per_s:
            return records_max
        if not self._records:
            return min(records_max, FIRST_RECORDS)
        return max(1, min(records_max, self._points_per_s * self._records // max(1, self._points)))

    def landed(self, records: int, points: int) -> None:
        """Account for what was landed."""
        self._records += records
        self._points += points
        if self._points_per_s:
            now_s = self._clock.monotonic_s()
            self._free_s = max(self._free_s, now_s - 1.0) + points / self._points_per_s


class LiveLag:
    """How far the live consumers of `raw` are behind, by what they committed."""

    def __init__(self, config: Config) -> None:
        kafka = config.kafka
        self._group = landing_group(kafka)
        self._asked = [TopicPartition(kafka.topic("raw"), p) for p in range(kafka.raw_partitions)]
        self._reader = AIOKafkaConsumer(**client_options(kafka), enable_auto_commit=False)
        self._admin = AIOKafkaAdminClient(**client_options(kafka))

    async def start(self) -> None:
        """Raises Transient."""
        try:
            await self._reader.start()
            await self._admin.start()
        except (KafkaError, OSError) as error:
            raise Transient("kafka", f"{type(error).__name__} {error}") from error

    async def __call__(self) -> tuple[int, int] | None:
        try:
            async with asyncio.timeout(10):
                if not await self._has_members():
                    return None
                ends = await self._reader.end_offsets(self._asked)
                committed = await self._admin.list_consumer_group_offsets(self._group)
        except (KafkaError, OSError, TimeoutError) as error:
            _log.warning("live_lag_unknown", error=str(error))
            return None
        at = sum(committed[tp].offset for tp in self._asked if tp in committed)
        behind = sum(ends[tp] - committed[tp].offset for tp in self._asked if tp in committed)
        return max(0, behind), at

    async def _has_members(self) -> bool:
        [answer] = await self._admin.describe_consumer_groups([self._group])
        return any(members for *_, members in (group[:6] for group in answer.groups))

    async def close(self) -> None:
        await quietly(self._reader.stop())
        await quietly(self._admin.close())
