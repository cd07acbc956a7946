"""A day under a budget, on the simulated AWS: planned, asked, charged and decided by the real parts, on a clock that leaps from tick to tick.

And its bill against the ledger's charges, where answers are lost and runs are killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal

import pytest

from ingest import wire
from ingest.audit import Report
from ingest.batch import decode_batch
from ingest.clock import ManualClock
from ingest.collect import Collector, Topics
from ingest.ledger import Ledger, PlannersMemory
from ingest.model import Batch, SeriesKey, Target, TaskItem, TaskKind
from ingest.ports import Advance
from ingest.positions import value_id
from ingest.recheck import recheck
from ingest.schedule import grids_of
from ingest.sources.cloudwatch import CloudWatchSource
from shard_config.model import Config, Limits
from tests.fake_log import FakeBroker, FakeSender
from tests.fakes import FakeArchive
from tests.test_ledger import Store, ledger_database, store
from workers import simulator
from workers.budgets import Budgeter
from workers.coordinator import Coordinator
from workers.simulated.faults import Faults
from workers.simulator import Simulator
from workers.world import World

__all__ = ["ledger_database", "store"]  # the fixtures

DAY_S = 86_400
MIDNIGHT_S = 1_795_478_400
TICK_S = 1800
ACCOUNT = "100000000001"
REGION = "eu-west-1"
TARGET = Target("cloudwatch", ACCOUNT, REGION)
SERVICES = [
    {"service": "ec2", "namespace": "AWS/EC2", "priority": 10},
    {"service": "rds", "namespace": "AWS/RDS", "priority": 50},
    {"service": "lambda", "namespace": "AWS/Lambda", "priority": 50},
    {"service": "sns", "namespace": "AWS/SNS", "priority": 50},
    {"service": "sqs", "namespace": "AWS/SQS", "critical": True},
]

Points = dict[tuple[SeriesKey, int], tuple[int, float]]
"""By series and time, the greatest (version, value)."""


def config_of(url: str, **budget: object) -> Config:
    common = {"poll_interval_s": TICK_S, "settling_s": 600, "discovery_interval_s": 7 * DAY_S}
    return Config.model_validate(
        {
            "accounts": [
                {
                    "id": ACCOUNT,
                    "regions": [REGION],
                    "services": [s["service"] for s in SERVICES],
                    "calls_per_s": 5000,
                    "datapoints_per_s": 1e9,
                }
            ],
            "services": [common | s for s in SERVICES],
            "aws": {"endpoint_url": url, "role_template": "arn:aws:iam::{account}:role/Headgate"},
            "kafka": {"prefix": "t", "ledger_partitions": 1},
            "slots": 1,
            "startup_lookback_s": 0,
            "budget": budget,
        }
    )


@dataclass
class Days:
    """Everything that runs, and what came of it."""

    config: Config
    clock: ManualClock
    sim: Simulator
    source: CloudWatchSource
    broker: FakeBroker
    coordinator: Coordinator
    budgeter: Budgeter
    collector: Collector
    archive: FakeArchive
    store: Store
    killed: int = 0
    """So many tasks are yet to be begun, asked in full, and killed before their answer is archived; another run takes them again."""
    done: dict[str, int] = field(default_factory=dict)

    async def tick(self) -> None:
        """Decide, plan, collect all that is planned, and project all that is said. Then on to the next tick."""
        await self.budgeter.step()
        await self.coordinator.step()
        for record in self._new("t.collect"):
            task, again = wire.decode_task(record.value), self.killed > 0
            if again:
                self.killed -= 1
                self.archive.failures = [asyncio.CancelledError()]  # type: ignore[list-item]  # what a killed run never sees
                with pytest.raises(asyncio.CancelledError):
                    await self.collector.collect(task, maybe_second_try=False)
            await self.collector.collect(task, maybe_second_try=again)
        if new := self._new("t.ledger"):
            end = new[-1].position.offset + 1
            advance = Advance("t.ledger", 0, self.store.next, end, value_id(new[-1].value))
            await self.store.ledger.project(
                [wire.decode_ledger(r.value) for r in new], [advance], self.clock.now_s()
            )
            self.store.next = end
        self.clock.advance(TICK_S - self.clock.now_s() % TICK_S)

    def _new(self, topic: str) -> list:  # type: ignore[type-arg]  # records
        found = self.broker.records(topic)[self.done.get(topic, 0) :]
        self.done[topic] = self.done.get(topic, 0) + len(found)
        return found

    def billed(self) -> int:
        count: int = self.sim.billing()["accounts"][ACCOUNT]["metrics_requested"]
        return count

    def points(self) -> Points:
        found: Points = {}
        for record in self.broker.records("t.raw"):
            _gather(decode_batch(record.value, Limits()), found)
        return found

    def tasks(self, kind: TaskKind) -> dict[str, list[int]]:
        """By service, the seconds from midnight at which it was planned so."""
        found: dict[str, list[int]] = {}
        for record in self.broker.records("t.ledger"):
            task = wire.decode_ledger(record.value)
            if getattr(task, "kind", None) == kind:
                for item in task.items:
                    assert isinstance(item, TaskItem)
                    found.setdefault(item.service, []).append(item.end_s - MIDNIGHT_S)
        return found


def _gather(batch: Batch, found: Points) -> None:
    owners = [s.key for s, n in zip(batch.series, batch.counts.tolist(), strict=True) for _ in range(n)]
    for key, t, value in zip(owners, batch.timestamps_s.tolist(), batch.values.tolist(), strict=True):
        found[key, t] = max(found.get((key, t), (0, value)), (batch.version, value))


@asynccontextmanager
async def days(store: Store, **budget: object) -> AsyncIterator[Days]:
    """A world of 30 metrics, at midnight."""
    clock = ManualClock(MIDNIGHT_S)
    async with AsyncExitStack() as stack:
        profiles = config_of("http://localhost").services
        world = World(7, [ACCOUNT], [REGION], 30, profiles)
        sim = await simulator.start(world, clock=clock, calls_per_s=0)
        stack.push_async_callback(sim.close)
        config = config_of(sim.url, **budget)
        source = CloudWatchSource(config, clock)
        stack.push_async_callback(source.close)
        broker = FakeBroker(**{"t.ledger": 1, "t.raw": 1, "t.collect": 1})
        sender = FakeSender(broker)
        coordinator = Coordinator(config, sender, clock, PlannersMemory({}, {}, {}, frozenset(), ()))
        archive = FakeArchive()
        collector = Collector(
            "exporter-1", {"cloudwatch": source}, archive, sender, Topics("t.raw", "t.ledger"), clock
        )
        ledger = Ledger(store.ledger._postgres, "test", {})
        stack.push_async_callback(ledger.close)
        await store.sql.execute("UPDATE positions SET topic = 't.ledger'")
        store.ledger.settling_s = {str(s["service"]): 600 for s in SERVICES}
        budgeter = Budgeter(config, coordinator, ledger, clock)
        yield Days(config, clock, sim, source, broker, coordinator, budgeter, collector, archive, store)


async def truth(all_days: Days, from_s: int, to_s: int) -> Points:
    """What one look at all of it brings, afterwards."""
    found: Points = {}
    for grid in grids_of(all_days.config)[TARGET]:
        for start_s in range(from_s, to_s, 10 * TICK_S):
            item = TaskItem(grid.service, start_s, min(start_s + 10 * TICK_S, to_s), TICK_S)
            async for answer in all_days.source.look(
                "0" * 32, TARGET, item, all_days.clock.monotonic_s() + 60
            ):
                if isinstance(answer, Batch):
                    _gather(answer, found)
    return found


async def test_with_a_third_of_the_money_all_points_come_later_and_critical_ones_on_time(
    store: Store,
) -> None:
    async with days(store) as untroubled:
        await untroubled.tick()
        await untroubled.tick()
        usd_per_tick = Decimal(untroubled.billed()) / 2 / 100_000
    await store.empty()
    await store.sql.execute("TRUNCATE charges")
    third = usd_per_tick * (DAY_S // TICK_S) / 3
    async with days(store, usd_per_day=float(third)) as day:
        while day.clock.now_s() < MIDNIGHT_S + DAY_S:
            await day.tick()
        bill = Decimal(day.billed()) / 100_000
        assert Decimal("0.5") * third < bill <= third
        live = day.tasks(TaskKind.LIVE)
        assert live["sqs"] == list(range(0, DAY_S, TICK_S))
        assert len(live["ec2"]) < len(live["rds"]) < len(live["sqs"])
        ledger = await store.sql.fetchval(
            "SELECT sum(metrics_billed) FROM charges WHERE metrics_in_doubt = 0"
        )
        assert ledger == day.billed()
        assert day.tasks(TaskKind.BUDGET) == {}
        # What came late is what there was, point for point: up to the last look of the rarest, and settled.
        to_s = MIDNIGHT_S + live["ec2"][-1] - 2 * TICK_S
        came = {k: v for k, (_, v) in day.points().items() if MIDNIGHT_S <= k[1] < to_s}
        there = {k: v for k, (_, v) in (await truth(day, MIDNIGHT_S, to_s)).items() if k[1] < to_s}
        assert len(there) > 10_000
        assert came == there


async def test_a_hard_cap_stops_the_rest_shows_it_and_goes_on_after_midnight(store: Store) -> None:
    async with days(store, usd_per_day=0.006, hard_cap=True, stretch_max=2) as two:
        while two.clock.now_s() < MIDNIGHT_S + DAY_S:
            await two.tick()
        first = two.billed()
        while two.clock.now_s() < MIDNIGHT_S + DAY_S + 2 * 3600:
            await two.tick()
        stopped, live = two.tasks(TaskKind.BUDGET), two.tasks(TaskKind.LIVE)
        assert Decimal(first) / 100_000 <= Decimal("0.006")
        assert set(stopped) == {"ec2", "lambda", "rds", "sns"}
        assert stopped["ec2"][0] <= stopped["rds"][0]
        assert max(live["ec2"]) > DAY_S > max(t for t in live["ec2"] if t < DAY_S)
        assert live["sqs"] == list(range(0, DAY_S + 2 * 3600, TICK_S))
        rows = await store.sql.fetch(
            "SELECT service, count(*) AS windows, min(window_start) AS start FROM windows WHERE declared = 'budget' GROUP BY 1 ORDER BY 1"
        )
        assert [r["service"] for r in rows] == ["ec2", "lambda", "rds", "sns"]


async def of_ledger(store: Store) -> tuple[int, int]:
    """Metrics billed, and in doubt."""
    row = await store.sql.fetchrow("SELECT sum(metrics_billed)::int, sum(metrics_in_doubt)::int FROM charges")
    return tuple(row)


async def test_the_bill_is_the_ledgers_exactly_where_nothing_was_killed_or_lost(store: Store) -> None:
    async with days(store) as day:
        for _ in range(6):
            await day.tick()
        assert await of_ledger(store) == (day.billed(), 0)
        lists = await store.sql.fetchval(
            "SELECT sum(list_metrics)::int FROM charges WHERE reason = 'discovery'"
        )
        assert lists == day.sim.billing()["accounts"][ACCOUNT]["calls"][REGION]["ListMetrics"]
        puts = await store.sql.fetchval("SELECT sum(puts)::int FROM charges")
        assert puts == len(day.archive.objects)


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_where_answers_are_lost_the_bill_is_within_what_is_in_doubt(store: Store, seed: int) -> None:
    async with days(store) as day:
        day.sim.faults = Faults(seed=seed, reset_share=0.4)
        for _ in range(6):
            await day.tick()
        billed, in_doubt = await of_ledger(store)
        assert billed <= day.billed() <= billed + in_doubt
        assert in_doubt > 0


async def test_what_a_killed_run_paid_is_in_doubt_and_no_more_than_what_was_in_flight(store: Store) -> None:
    async with days(store) as day:
        await day.tick()
        before = await of_ledger(store)
        day.killed = 2
        for _ in range(4):
            await day.tick()
        billed, in_doubt = await of_ledger(store)
        assert day.killed == 0
        assert billed < day.billed() == billed + in_doubt
        assert in_doubt == 2 * before[0]


async def test_a_recheck_is_in_the_ledger(store: Store) -> None:
    async with days(store) as day:
        for _ in range(4):
            await day.tick()
        await store.sql.execute(
            "UPDATE windows SET sealed_at = now(), points = 0, digest = 0 WHERE window_start < to_timestamp($1)",
            MIDNIGHT_S + TICK_S,
        )
        before = await of_ledger(store)
        report = Report(MIDNIGHT_S - 7200, MIDNIGHT_S + TICK_S)
        done = await recheck(store.sql, day.config, day.clock, report, [TARGET], 1.0, 1)
        assert done.metrics_billed > 0
        assert await of_ledger(store) == (day.billed(), 0) == (before[0] + done.metrics_billed, 0)
        rows = await store.sql.fetch(
            "SELECT sum(metrics_billed)::int AS n FROM charges WHERE reason = 'recheck'"
        )
        assert rows[0]["n"] == done.metrics_billed
