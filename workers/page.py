"""The live page: what the coordinator knows, collected in the background and served at `/`, its data at `/page.json`.

* *Never in a request*: an answer is bytes that were made before, compressed already. There are no parameters, and nothing but GET.
* *Never in the planner's way*: what takes long is done in a thread, reading is bounded in time, the ledger is read over one connection,
  and the more rarely the longer that takes: a LEDGER_SHARE of the time at most. While nobody looks, only the history is kept.
* *Never silent about a part that is away*: what it said last stays, with the time since when it does not answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from ingest.brokers import client_options
from ingest.budget import Decision, Polling
from ingest.clock import Clock, utc
from ingest.errors import HeadgateError
from ingest.glance import Glance, glance
from ingest.ledger import Ledger
from ingest.log import quietly
from ingest.pauses import Pauses
from ingest.reassign import Planned
from ingest.schedule import Grid, grids_of
from ingest.sinks.connection import bounded
from shard_config.model import Config, Kafka
from workers.healing import WAITING
from workers.lifecycle import Lifecycle
from workers.members import AGE
from workers.names import exporter_group, landing_group, ledger_group, remote_write_group
from workers.page_document import Document, Packed
from workers.page_facts import (
    HISTORY_S,
    SAMPLE_S,
    Ends,
    GroupSeen,
    History,
    Json,
    KafkaSeen,
    Part,
    Seen,
    Unit,
)
from workers.page_verdict import page_of
from workers.reload import INVALID
from workers.status import GroupStatus, ends_of, look_at_groups

_log = structlog.get_logger()

EVERY_S = 3.0
"""While somebody looks; else each SAMPLE_S."""
KAFKA_TIMEOUT_S = 10.0
LEDGER_TIMEOUT_S = 20.0
LEDGER_SHARE = 0.05
LEDGER_EVERY_MAX_S = 120.0
STARTS_KEPT = 20


class Planner(Protocol):
    """What the page needs of the coordinator."""

    pauses: Pauses
    polling: Polling

    @property
    def planned(self) -> Planned: ...


class Money(Protocol):
    """What the page needs of the budgets' loop."""

    decision: Decision | None
    decided_at_ms: int | None
    error: str


class Page:
    """One coordinator's page. `shards` gives the Publisher's."""

    def __init__(
        self,
        config: Config,
        coordinator: Planner,
        shards: Callable[[], Json],
        money: Money,
        ledger: Ledger,
        clock: Clock,
    ) -> None:
        self._coordinator = coordinator
        self._shards = shards
        self._money = money
        self._ledger = ledger
        self._clock = clock
        self._started_ms = clock.now_ms()
        self._history = History()
        self._ends: Ends = {}
        self._kafka_part: Part[KafkaSeen] = Part()
        self._ledger_part: Part[Glance] = Part()
        self._presence = Presence()
        self._clients: _Clients | None = None
        self.document = Document(clock)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Show this configuration's targets from now on."""
        self._config = config
        self._grids: Mapping[str, tuple[Grid, ...]] = {str(t): g for t, g in grids_of(config).items()}

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop. What does not answer is on the page; whatever else goes wrong is in the log, and stops nothing."""
        try:
            async with asyncio.TaskGroup() as group:
                steps = (self._kafka_step, self._ledger_step, self._make_step)
                keeping = [group.create_task(self._keep(lifecycle, step)) for step in steps]
                await lifecycle.stop.wait()
                for one in keeping:
                    one.cancel()  # what hangs shall not hold up the stop: it only reads
        finally:
            await self._clients_away()

    async def _keep(self, lifecycle: Lifecycle, step: Callable[[], Awaitable[float]]) -> None:
        """`step` gives the least pause after it, in seconds; 0: none, and whoever comes to look wakes it."""
        while not lifecycle.stop.is_set():
            rest_s = 0.0
            try:
                rest_s = await step()
            except Exception:
                # A bug in the page must not stop the planning. The page says that nothing new is made.
                _log.exception("page_step_failed")
            every_s = EVERY_S if self.document.watched else SAMPLE_S
            await lifecycle.pause(max(every_s, rest_s), *([] if rest_s else [self.document.wanted]))

    async def _make_step(self) -> float:
        self.document.wanted.clear()
        await self.make()
        return 0

    async def make(self) -> None:
        """Make the page of what is known now."""
        seen, config, grids, planner = self._seen(), self._config, self._grids, self._coordinator
        planned, pauses, polling = planner.planned, planner.pauses, planner.polling

        def made() -> Packed:
            units = units_of(config, grids, planned, pauses, polling)
            return Packed.of(page_of(replace(seen, units=units), self._history, self._ends))

        self.document.data = await asyncio.to_thread(made)

    def _seen(self) -> Seen:
        now_ms, shards, money = self._clock.now_ms(), self._shards(), self._money
        horizon_s, read_ms = self._config.run.horizon_s, self._ledger_part.as_of_ms or now_ms
        self._presence.take(shards, now_ms)
        away_ms = money.decided_at_ms or self._started_ms
        return Seen(
            now_ms=now_ms,
            asked_until_ms=read_ms if horizon_s is None else min(read_ms, horizon_s[1] * 1000),
            started_ms=self._started_ms,
            revision=self._config.revision,
            shards=shards,
            units={},
            gone=self._presence.gone(now_ms),
            starts={name: tuple(starts) for name, starts in self._presence.starts.items()},
            kafka=self._kafka_part,
            ledger=self._ledger_part,
            money=Part(money.decision, money.decided_at_ms, away_ms if money.error else None, money.error),
            heal_waits={s.labels["why"]: int(s.value) for m in WAITING.collect() for s in m.samples},
            config_refused=_value(INVALID.collect()) == 1,
            organization_age_s=_value(AGE.collect()) if self._config.organization else None,
            unowned_since_ms=self._presence.unowned_since_ms,
            dead_before=self._history.first_dead(),
        )

    async def _ledger_step(self) -> float:
        began_s = self._clock.monotonic_s()
        try:
            await self.look_at_ledger()
        except HeadgateError as error:
            self._ledger_part = self._ledger_part.failed(str(error), self._clock.now_ms())
            return 0
        rest_s = (self._clock.monotonic_s() - began_s) / LEDGER_SHARE
        return min(rest_s, LEDGER_EVERY_MAX_S) if rest_s > EVERY_S else 0

    async def look_at_ledger(self) -> None:
        """One look. Raises HeadgateError."""
        now_ms = self._clock.now_ms()
        split = {name.partition("#")[0] for name in self._coordinator.planned.units.slots if "#" in name}
        async with self._ledger.connected() as connection:
            found = await bounded(connection, glance(connection, utc(now_ms / 1000), split), LEDGER_TIMEOUT_S)
        self._ledger_part = Part(found, now_ms)

    async def _kafka_step(self) -> float:
        try:
            async with asyncio.timeout(KAFKA_TIMEOUT_S):
                if self._clients is None:
                    self._clients = _Clients(self._config.kafka)
                    await self._clients.start()
                await self._take_kafka(self._clients)
        except (KafkaError, OSError, TimeoutError) as error:
            what = f"kafka {self._config.kafka.bootstrap}: {type(error).__name__} {error}".rstrip()
            self._kafka_part = self._kafka_part.failed(what, self._clock.now_ms())
            await self._clients_away()
        return 0

    async def _clients_away(self) -> None:
        clients, self._clients = self._clients, None
        if clients is not None:
            await clients.stop()

    async def _take_kafka(self, clients: _Clients) -> None:
        config, now_ms = self._config, self._clock.now_ms()
        kafka = config.kafka
        topics = {
            exporter_group(kafka): kafka.topic("collect"),
            landing_group(kafka): kafka.topic("raw"),
            ledger_group(kafka): kafka.topic("ledger"),
        }
        receivers = {r.name: remote_write_group(kafka, r.name) for r in receivers_of(config)}
        topics |= dict.fromkeys(receivers.values(), kafka.topic("raw"))
        groups, ends = await look_at_groups(clients.admin, clients.reader, topics)
        dead = sum((await ends_of(clients.reader, kafka.topic("dead"))).values())

        def seen(name: str) -> GroupSeen:
            one: GroupStatus = groups[name]
            waits_s = self._history.waits_s(one.topic, one.lag, ends, now_ms)
            return GroupSeen(one.lag, tuple(sorted(one.members)), waits_s)

        found = KafkaSeen(
            seen(exporter_group(kafka)),
            seen(landing_group(kafka)),
            seen(ledger_group(kafka)),
            {receiver: seen(group) for receiver, group in receivers.items()},
            dead,
        )
        self._ends = {topic: dict(partitions) for topic, partitions in ends.items()}
        self._kafka_part = Part(found, now_ms)


class Presence:
    """Which shards were seen, when they started, and since when slots are nobody's: what Kafka's group does not remember."""

    def __init__(self) -> None:
        self.starts: dict[str, deque[int]] = {}
        self.unowned_since_ms: int | None = None
        self._last_ms: dict[str, int] = {}

    def take(self, shards: Json, now_ms: int) -> None:
        """Note what the Publisher's page says."""
        owned = 0
        for one in shards["shards"]:
            if not one["alive"]:
                continue
            owned += len(one["slots"])
            name, since_ms = one["shard"], one["since_ms"]
            self._last_ms[name] = now_ms
            starts = self.starts.setdefault(name, deque(maxlen=STARTS_KEPT))
            if since_ms is not None and since_ms not in starts:
                starts.append(since_ms)
        if owned >= shards["slots"]:
            self.unowned_since_ms = None
        elif self.unowned_since_ms is None:
            self.unowned_since_ms = now_ms
        for name, last_ms in list(self._last_ms.items()):
            starts = self.starts[name]
            while starts and now_ms - starts[0] > HISTORY_S * 1000:
                starts.popleft()
            if now_ms - last_ms > HISTORY_S * 1000:
                del self._last_ms[name], self.starts[name]

    def gone(self, now_ms: int) -> dict[str, int]:
        """Shards that are not there any more, and when they were seen last."""
        return {name: last_ms for name, last_ms in self._last_ms.items() if last_ms < now_ms}


class _Clients:
    """Kafka's, kept open between looks."""

    def __init__(self, kafka: Kafka) -> None:
        self.admin = AIOKafkaAdminClient(**client_options(kafka))
        self.reader = AIOKafkaConsumer(**client_options(kafka), enable_auto_commit=False)

    async def start(self) -> None:
        await self.admin.start()
        await self.reader.start()

    async def stop(self) -> None:
        await quietly(self.reader.stop())
        await quietly(self.admin.close())


# --- pure -------------------------------------------------------------------------------------------------------


def units_of(
    config: Config,
    grids: Mapping[str, tuple[Grid, ...]],
    planned: Planned,
    pauses: Pauses,
    polling: Polling,
) -> dict[str, Unit]:
    """What is expected of every unit of the plan. One whose services are all paused, or stopped for a budget, is paused."""
    aliases = {account.id: account.alias for account in config.accounts}
    found = {}
    for name, slot in planned.units.slots.items():
        target, _, service = name.partition("#")
        account = target.split("/")[1]
        every_s = [
            grid.poll_interval_s * polling.of(account, grid.service)
            for grid in grids.get(target, ())
            if service in ("", grid.service)
            and not pauses.cover(account, grid.service)
            and (account, grid.service) not in polling.stopped
        ]
        found[name] = Unit(slot, min(every_s, default=0), aliases.get(account, ""), not every_s)
    return found


def receivers_of(config: Config) -> tuple[Any, ...]:
    return config.remote_write.receivers if config.remote_write else ()


def _value(metrics: Any) -> float:
    """Of a gauge without labels."""
    return float(next(iter(metrics)).samples[0].value)
