"""What a remote writer sends beside samples: zeros for points that are certainly missing, and the info series of resources.

* Zeros need receipts: the `ledger` topic is read from its end, by every process and in no group. Where reading it breaks off, what was learned is
  forgotten, for a receipt that was missed may have announced points.
* Which series may get zeros the exporters' listings say, from the archive's cache, as often as those are made anew; without one, series that were seen.
* Info series are sent every `INFO_S`, between writes of samples, and not again where that fails: the next are on their way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final

import numpy as np
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from ingest import wire
from ingest.brokers import client_options
from ingest.clock import Clock
from ingest.errors import Rejected, Transient
from ingest.log import quietly
from ingest.model import Batch, Receipt, Series, Target
from ingest.ports import EncodedLabels, Receiving, SeriesSamples
from ingest.sources.listing import Cache, Shared, depends_on
from ingest.sources.packed import PackedTable, Unpacked
from ingest.zeros import Zeros
from shard_config.model import Config
from workers.lifecycle import Lifecycle
from workers.remote_names import Names

_log = structlog.get_logger()

INFO_S: Final = 120
"""Prometheus looks back five minutes: of two info samples one may be lost."""
INFO_SAMPLES_MAX: Final = 2_000
INFO_WRITE_S: Final = 8.0
LISTING_S: Final = 20.0
LISTINGS_S: Final = 60.0
_POLL_MS: Final = 1_000


class Beside:
    """What one receiver gets beside the samples of `raw`. `forget` where its partitions move."""

    def __init__(self, config: Config, names: Names, clock: Clock) -> None:
        self._names = names
        self._clock = clock
        self._zeros = Zeros(config)
        self._listed: dict[tuple[Target, str], float] = {}
        self._met: dict[tuple[Target, str], None] = {}
        self._info_s = 0.0
        self._lists_resources = config.lists_resources
        self._config = config

    def forget(self) -> None:
        self._zeros.forget()
        self._listed.clear()
        self._met.clear()

    def heard(self, batch: Batch, value: bytes) -> None:
        """A record with series of this receiver's was read; once each."""
        self._met[batch.target, batch.service] = None
        if self._zeros.wants(batch.service):
            self._zeros.seen(batch, wire.batch_id_of(value), int(self._clock.now_s()))

    def receipt(self, receipt: Receipt) -> None:
        """A receipt was read, whoever's."""
        self._zeros.receipt(receipt, int(self._clock.now_s()))

    def zeros(self) -> list[Batch]:
        """Zeros that are certain, once each."""
        return self._zeros.due(int(self._clock.now_s()))

    async def learn(self, shared: Shared) -> None:
        """Read the listings that are due of services with zeros. Takes LISTING_S for each at most; what goes wrong is said, never raised."""
        limits, profiles = self._config.limits, self._config.service_by_name
        for target, service in self._zeros.targets:
            now_s, profile = self._clock.monotonic_s(), profiles[service]
            if now_s < self._listed.get((target, service), float("-inf")):
                continue
            deadline_s = now_s + 4 * LISTING_S  # it takes a quarter
            listing = await shared.get(target, profile, depends_on(profile, limits), deadline_s, limits)
            self._listed[target, service] = now_s + (profile.discovery_interval_s if listing else LISTINGS_S)
            if listing is not None:
                series = await asyncio.to_thread(_series, listing.tables, profile.period_s)
                self._zeros.learn(target, service, series, int(self._clock.now_s()))

    async def send_info(self, receiving: Receiving, refused: Callable[[str], None]) -> None:
        """Send the info series of all targets whose samples were read, if it is time. Never raises for the receiver."""
        now_ms = int(self._clock.now_ms())
        if not self._lists_resources or now_ms < (self._info_s + INFO_S) * 1000:
            return
        self._info_s = now_ms / 1000
        at_ms, zero = np.array([now_ms], dtype=np.int64), np.zeros(1)
        try:
            rest = self._infos(refused)
            while some := list(islice(rest, INFO_SAMPLES_MAX)):
                async with asyncio.timeout(INFO_WRITE_S):
                    await receiving.write([SeriesSamples(labels, at_ms, zero) for labels in some])
        except (Transient, TimeoutError) as error:
            _log.warning("info_not_sent", error=f"{type(error).__name__}: {error}")

    def _infos(self, refused: Callable[[str], None]) -> Iterator[EncodedLabels]:
        for target, service in list(self._met):
            for resource in self._names.resources(target, service):
                try:
                    yield self._names.info_of(target, service, resource)
                except Rejected as rejected:
                    refused(rejected.reason)


def _series(tables: Sequence[PackedTable], period_s: int) -> list[Series]:
    unpacked = Unpacked()
    return [series for packed in tables for series in unpacked.table(packed, period_s).series]


async def follow_ledger(
    config: Config, besides: Callable[[], Sequence[Beside]], lifecycle: Lifecycle
) -> None:
    """Read receipts from the ledger's end on, until told to stop."""
    while not lifecycle.stop.is_set():
        client = AIOKafkaConsumer(
            **client_options(config.kafka), enable_auto_commit=False, auto_offset_reset="none"
        )
        try:
            async with asyncio.timeout(30):
                await client.start()
                topic = config.kafka.topic("ledger")
                partitions = [TopicPartition(topic, p) for p in range(config.kafka.ledger_partitions)]
                client.assign(partitions)
                await client.seek_to_end(*partitions)
                for partition in partitions:  # it seeks when it is asked
                    await client.position(partition)
            for beside in besides():
                beside.forget()
            while not lifecycle.stop.is_set():
                _tell(besides(), await client.getmany(timeout_ms=_POLL_MS))
        except (KafkaError, OSError, TimeoutError) as error:
            _log.warning("ledger_not_read", error=f"{type(error).__name__}: {error}")
            await lifecycle.pause(5.0)
        finally:
            await quietly(client.stop())


def _tell(besides: Sequence[Beside], got: Mapping[TopicPartition, Sequence[Any]]) -> None:
    for records in got.values():
        for record in records:
            with suppress(Rejected):  # the store's consumer puts it aside
                fact = wire.decode_ledger(record.value)
                if isinstance(fact, Receipt):
                    for beside in besides:
                        beside.receipt(fact)


async def follow_listings(
    cache: Cache, clock: Clock, besides: Callable[[], Sequence[Beside]], lifecycle: Lifecycle
) -> None:
    """Learn which series may get zeros, until told to stop."""
    shared = Shared(cache, clock)
    while not await lifecycle.pause(LISTINGS_S / 6):
        for beside in besides():
            await beside.learn(shared)


def has_zeros(config: Config) -> bool:
    """Whether any service's missing points are sent."""
    zeros = Zeros(config)
    return any(zeros.wants(profile.service) for profile in config.services)
