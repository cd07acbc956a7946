"""What a shard, the coordinator and the store have trouble with shows in metrics, and goes when the trouble does."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY

from ingest.clock import ManualClock
from ingest.collect import Collector
from ingest.errors import Transient
from ingest.ledger import Ledger
from ingest.membership import GroupLook
from ingest.reassign import Planned
from ingest.sources.cloudwatch import CloudWatchSource
from shard_config.model import Config, Kafka, Postgres
from shard_config.units import UnitPlan
from tests.cloudwatch_rig import ACCOUNTS, CLOCK, REGION, item_of, looked, rig, target_of
from tests.conftest import eventually
from tests.fake_log import FakeBroker, FakeSender
from tests.fakes import FakeArchive
from tests.test_collect import NOON_S, TOPICS, FakeSource, task_of
from tests.test_coordinator import World
from tests.test_ledger import Store, ledger_database, store
from workers.coordinator import LAST_PLAN
from workers.lifecycle import Lifecycle
from workers.shards import Board, Publisher
from workers.simulated.faults import Faults
from workers.troubles import STRANGER_S, Troubles
from workers.upkeep import Upkeep

__all__ = ["ledger_database", "store"]  # the fixtures

Samples = dict[tuple[str, ...], float]


def of(troubles: Troubles, name: str) -> Samples:
    """By label values, the samples of one metric."""
    return {
        tuple(s.labels.values()): s.value for m in troubles.collect() for s in m.samples if s.name == name
    }


async def test_throttles_show_beside_requests_by_account_region_and_api() -> None:
    troubles = Troubles()
    assert of(troubles, "headgate_aws_requests_total") == {}
    async with rig() as (sim, source):
        troubles.watch(source, CLOCK)
        await looked(source, item_of())
        calm = of(troubles, "headgate_aws_requests_total")
        key = (ACCOUNTS[0], REGION, "GetMetricData")
        assert calm[key] > 0
        assert set(of(troubles, "headgate_aws_throttled_total").values()) == {0}
        sim.faults = Faults(throttle_share=1)
        await looked(source, item_of(), wait_s=0.5)
        sent, throttled = (of(troubles, f"headgate_aws_{what}_total") for what in ("requests", "throttled"))
        assert throttled[key] == sent[key] - calm[key] > 0


async def test_credentials_of_another_account_show_until_they_are_right_or_half_an_hour_old() -> None:
    troubles, clock = Troubles(), ManualClock(0)
    async with rig(role="") as (_, source):
        troubles.watch(source, CLOCK)
        await looked(source, item_of())
        assert of(troubles, "headgate_identity_mismatch") == {}
        await looked(source, item_of(), target_of(ACCOUNTS[1]))
        assert of(troubles, "headgate_identity_mismatch") == {(ACCOUNTS[1],): 1}
        source.aws.forget(ACCOUNTS[1])
        assert of(troubles, "headgate_identity_mismatch") == {}
        troubles.watch(source, clock)
        source.aws.strangers[ACCOUNTS[1]] = clock.monotonic_s()
        clock.advance(int(STRANGER_S) - 1)
        assert of(troubles, "headgate_identity_mismatch") == {(ACCOUNTS[1],): 1}
        clock.advance(1)
        assert of(troubles, "headgate_identity_mismatch") == {}


async def test_an_archive_that_refuses_shows_since_when_until_it_takes_something() -> None:
    troubles, clock = Troubles(), ManualClock(NOON_S)
    archive = FakeArchive()
    sender = FakeSender(FakeBroker(raw=1, ledger=1))
    collector = Collector("exporter-1", {"cloudwatch": FakeSource()}, archive, sender, TOPICS, clock)
    source = CloudWatchSource(Config(), clock)
    troubles.watch(source, clock)

    async def put(second_try: bool = False, failure: Exception | None = None) -> tuple[float, ...]:
        archive.failures[:] = [failure] if failure else []
        answer = await collector.answer(task_of("ec2"), maybe_second_try=second_try)
        troubles.put(answer)
        clock.advance(60)
        return tuple(of(troubles, "headgate_archive_refusing_seconds").values())

    kept, refused = (metric("headgate_archive_puts_total", result=r) for r in ("kept", "refused"))
    try:
        assert of(troubles, "headgate_archive_refusing_seconds") == {(): 0}
        assert await put(failure=Transient("s3", "503")) == (60,)
        assert await put(failure=Transient("s3", "503")) == (120,)
        assert await put() == (0,)
        assert await put(second_try=True) == (0,)  # from the archive: it says nothing of putting
    finally:
        await source.close()
    assert metric("headgate_archive_puts_total", result="kept") == kept + 1
    assert metric("headgate_archive_puts_total", result="refused") == refused + 2


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_when_the_coordinator_planned_last_stands_still_while_kafka_is_away() -> None:
    world, lifecycle = World(), Lifecycle()
    LAST_PLAN.set(0)
    world.broker.down = True
    running = asyncio.create_task(world.coordinator.run(lifecycle))
    await asyncio.sleep(0.05)
    assert metric("headgate_coordinator_last_plan_timestamp_seconds") == 0
    world.broker.down = False

    async def planned() -> bool:
        return metric("headgate_coordinator_last_plan_timestamp_seconds") == world.clock.now_s()

    await eventually(planned)
    lifecycle.stop.set()
    async with asyncio.timeout(10):
        await running


def test_the_coordinator_says_which_live_shard_has_how_many_slots_and_how_many_nobody_has() -> None:
    units = UnitPlan(
        {"cloudwatch/a/r": 0, "cloudwatch/b/r": 3}, {"cloudwatch/a/r": 5.0, "cloudwatch/b/r": 7.0}
    )
    kafka = Kafka()
    publisher = Publisher(kafka, None, Board(kafka, "t"), ManualClock(0), lambda: Planned(units, 4))  # type: ignore[arg-type]
    publisher.look = GroupLook(True, {"exporter-1": (0, 1), "exporter-2": (), "exporter-3": (3,)}, {})
    publisher.observe()
    assert metric("headgate_slots_unowned") == 1
    assert [metric("headgate_shard_slots", shard=f"exporter-{n}") for n in (1, 2, 3)] == [2, 0, 1]
    assert metric("headgate_shard_weight", shard="exporter-3") == 7
    publisher.look = GroupLook(True, {}, {})
    publisher.observe()
    assert metric("headgate_slots_unowned") == 4
    assert REGISTRY.get_sample_value("headgate_shard_slots", {"shard": "exporter-1"}) is None


async def test_the_stores_size_shows_beside_what_it_may_grow_to(store: Store) -> None:
    known = Config.model_validate({"postgres": {"capacity_bytes": 10_000_000_000}})
    upkeep = Upkeep(store.ledger, known, ManualClock(NOON_S))
    await upkeep.measure()
    size = await store.sql.fetchval("SELECT pg_database_size(current_database())")
    assert metric("headgate_store_bytes", sink="postgres") == pytest.approx(size, rel=0.1)
    assert metric("headgate_store_capacity_bytes", sink="postgres") == 10_000_000_000
    upkeep.configure(Config())
    assert REGISTRY.get_sample_value("headgate_store_capacity_bytes", {"sink": "postgres"}) is None


async def test_when_the_ledger_was_read_last_is_in_prometheus_own_time_and_stands_still_while_it_is_away(
    store: Store,
) -> None:
    shifted = Config.model_validate({"run": {"clock_offset_s": -86_400}})
    clock = ManualClock(NOON_S)
    await Upkeep(store.ledger, shifted, clock).observe()
    assert metric("headgate_ledger_observed_timestamp_seconds") == NOON_S + 86_400
    clock.advance(60)
    away = Ledger(Postgres(dsn="postgresql://127.0.0.1:1/nothing"), "test", {})
    with pytest.raises(Transient):
        await Upkeep(away, shifted, clock).observe()
    assert metric("headgate_ledger_observed_timestamp_seconds") == NOON_S + 86_400
