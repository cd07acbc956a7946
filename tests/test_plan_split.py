"""A target that is heavier than a slot, from the coordinator to its slots: each window planned once, whatever the split becomes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest

from ingest import wire
from ingest.clock import ManualClock
from ingest.ledger import PlannersMemory
from ingest.model import Target, Task, TaskKind
from ingest.schedule import divide, due, grids_of
from ingest.weights import weights_of
from shard_config.model import Account, Config, Kafka, ServiceProfile
from shard_config.units import Places
from tests.fake_log import FakeBroker, FakeSender
from workers.coordinator import Coordinator

NOON_S = 1_767_268_800
SERVICES = ("alb", "ebs", "ec2", "rds", "sqs")
HEAVY = Target("cloudwatch", "111111111111", "eu-west-1")
ACCOUNTS = (HEAVY.account, *(f"22222222222{i}" for i in range(6)))


def config_of(slots: int = 4, settling_s: int = 0) -> Config:
    return Config(
        accounts=tuple(Account(id=a, regions=("eu-west-1",), services=SERVICES) for a in ACCOUNTS),
        services=tuple(
            ServiceProfile(service=s, namespace=f"AWS/{s}", settling_s=settling_s) for s in SERVICES
        ),
        kafka=Kafka(prefix="t", ledger_partitions=1),
        slots=slots,
    )


def series_of(heavy: float) -> dict[str, dict[str, float]]:
    """What each service has of the heavy target, and of the others."""
    return {
        f"cloudwatch/{a}/eu-west-1": dict.fromkeys(SERVICES, heavy if a == HEAVY.account else 2_000.0)
        for a in ACCOUNTS
    }


class World:
    """Coordinators, one after the other, that write one log."""

    def __init__(self, series: dict[str, dict[str, float]], config: Config | None = None) -> None:
        self.config = config or config_of()
        self.clock = ManualClock(NOON_S)
        self.broker = FakeBroker()
        self.broker.create("t.ledger", 1)
        self.broker.create("t.collect", self.config.slots)
        self.sender = FakeSender(self.broker)
        self.life(PlannersMemory({}, {}, series, frozenset(), ()))

    def life(self, memory: PlannersMemory) -> None:
        self.coordinator = Coordinator(self.config, self.sender, self.clock, memory)

    async def restart(self, series: dict[str, dict[str, float]]) -> None:
        """A new life that knows what the ledger does."""
        until: dict[str, dict[str, int]] = {}
        for task in self.planned:
            services = until.setdefault(str(task.target), {})
            for item in task.items:
                services[item.service] = max(services.get(item.service, 0), item.end_s)
        ids = frozenset(t.task_id for t in self.planned)
        self.life(PlannersMemory(until, self.coordinator.slots, series, ids, ()))

    @property
    def planned(self) -> list[Task]:
        return [wire.decode_task(r.value) for r in self.broker.records("t.ledger")]

    def heavy_slots(self) -> dict[str, int]:
        """By service, of the heavy target."""
        places = Places(self.coordinator.slots)
        found = {s: places.of(str(HEAVY), s) for s in SERVICES}
        return {s: slot for s, slot in found.items() if slot is not None}


def windows(tasks: Iterable[Task]) -> Counter[tuple[str, str, int]]:
    return Counter((str(t.target), i.service, w.start_s) for t in tasks for i in t.items for w in i.windows())


async def test_a_heavy_targets_tasks_go_to_the_slots_of_its_services_one_a_slot_and_tick() -> None:
    world = World(series_of(50_000.0))
    await world.coordinator.step()
    world.clock.advance(300)
    before = len(world.planned)
    await world.coordinator.step()
    slots = world.heavy_slots()
    assert len(set(slots.values())) > 1
    new = {t.task_id for t in world.planned[before:] if t.target == HEAVY}
    assert len(new) == len(set(slots.values()))
    records = [r for r in world.broker.records("t.collect") if wire.decode_task(r.value).task_id in new]
    assert len(records) == len(new)
    for record in records:
        task = wire.decode_task(record.value)
        assert record.key == str(HEAVY).encode()
        assert {slots[i.service] for i in task.items} == {record.position.partition}
    others = [t for t in world.planned[before:] if t.target != HEAVY]
    assert [len(t.items) for t in others] == [len(SERVICES)] * (len(ACCOUNTS) - 1)


@pytest.mark.parametrize("seed", range(5))
async def test_every_window_of_every_service_is_planned_exactly_once_while_the_split_changes(
    seed: int,
) -> None:
    """Without a settling time each window is in one live look; weights, restarts and outages come as they like."""
    rng = random.Random(seed)
    world = World(series_of(1_000.0))
    splits = set()
    await world.coordinator.step()
    for _ in range(30):
        world.clock.advance(300 * rng.choice((1, 1, 1, 3)))
        series = series_of(rng.choice((1_000.0, 30_000.0, 90_000.0)))
        series[str(HEAVY)] = {s: n * rng.uniform(0.5, 2) for s, n in series[str(HEAVY)].items()}
        match rng.choice(("reweigh", "restart", "nothing")):
            case "reweigh":
                await world.coordinator.reweigh(series)
            case "restart":
                await world.restart(series)
        await world.coordinator.step()
        splits.add(tuple(sorted(world.heavy_slots().items())))
    assert len(splits) > 3
    found = windows(world.planned)
    grid = range(NOON_S - 3600, world.clock.now_s(), 300)
    assert found == {(f"cloudwatch/{a}/eu-west-1", s, t): 1 for a in ACCOUNTS for s in SERVICES for t in grid}
    collected = [wire.decode_task(r.value).task_id for r in world.broker.records("t.collect")]
    assert sorted(collected) == sorted(t.task_id for t in world.planned)
    assert len(collected) == len(set(collected))


async def test_a_task_that_was_planned_before_the_split_stays_one_task() -> None:
    world = World(series_of(50_000.0))
    waiting = due(HEAVY, grids_of(world.config)[HEAVY], {}, NOON_S, world.config.revision, 0)
    ids = frozenset(t.task_id for t in waiting)
    until = {str(HEAVY): dict.fromkeys(SERVICES, NOON_S)}
    world.life(PlannersMemory(until, {}, series_of(50_000.0), ids, tuple(waiting)))
    await world.coordinator.step()
    on_collect = [wire.decode_task(r.value) for r in world.broker.records("t.collect")]
    assert [t for t in on_collect if t.target == HEAVY] == waiting
    assert len(set(world.heavy_slots().values())) > 1


async def test_the_split_of_the_life_before_is_kept() -> None:
    world = World(series_of(50_000.0))
    before = world.coordinator.slots
    # Neither band is left: what a first plan would do with these weights is not asked.
    await world.restart(series_of(45_000.0))
    assert world.coordinator.slots == before
    assert any("#" in unit for unit in before)


def test_what_divides_a_task_is_its_slots_and_its_ids_follow_from_its_items() -> None:
    [task] = due(HEAVY, grids_of(config_of())[HEAVY], {}, NOON_S, "r", 300)
    assert task.kind == TaskKind.LIVE
    places = Places({f"{HEAVY}#{s}": slot for s, slot in zip(SERVICES, (0, 1, 0, 1, 2), strict=True)})
    parts = divide(task, places)
    assert [[i.service for i in p.items] for p in parts] == [["alb", "ec2"], ["ebs", "rds"], ["sqs"]]
    assert len({p.task_id for p in (*parts, task)}) == 4
    assert divide(parts[0], places) == [parts[0]]
    together = Places({f"{HEAVY}#{s}": 3 for s in SERVICES})
    assert divide(task, together) == [task]


def test_weights_are_metrics_a_minute_and_what_is_not_known_is_the_mean() -> None:
    config = config_of()
    grids = grids_of(config)
    nothing = weights_of(grids, {})
    assert nothing[str(HEAVY)] == dict.fromkeys(SERVICES, 0.2)
    some = weights_of(grids, {str(HEAVY): {"ec2": 500.0, "rds": 0.0}})
    assert some[str(HEAVY)] == {"alb": 50.0, "ebs": 50.0, "ec2": 100.0, "rds": 0.2, "sqs": 50.0}
    assert some[f"cloudwatch/{ACCOUNTS[1]}/eu-west-1"]["ec2"] == 100.0
