"""The coordinator: what it announces in which order, and what survives a restart, an outage and a twin."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
import structlog
from prometheus_client import REGISTRY

from ingest import wire
from ingest.budget import Polling
from ingest.clock import ManualClock
from ingest.errors import Transient
from ingest.heal import Announced, Decision, Declaration, OpenWindow, Reason, Rules, Wait
from ingest.heal_store import Healed
from ingest.ledger import PlannersMemory
from ingest.log import Outgoing
from ingest.model import RecordPosition, Target, Task, TaskKind, Window
from ingest.pauses import Pause, Pauses
from ingest.schedule import due, grids_of
from shard_config.model import Account, Config, ExpositionJob, Kafka, Run, ServiceProfile
from tests.conftest import eventually
from tests.fake_log import FakeBroker, FakeSender
from workers.coordinator import Coordinator
from workers.healing import Healer, read_pauses
from workers.lifecycle import Lifecycle

NOON_S = 1_767_268_800
NOTHING = PlannersMemory({}, {}, {}, frozenset(), ())
ACCOUNTS = ("111111111111", "222222222222", "333333333333")


def config_of(*accounts: str, exposition: bool = False, horizon_s: tuple[int, int] | None = None) -> Config:
    return Config(
        accounts=tuple(Account(id=a, regions=("eu-west-1",), services=("ec2",)) for a in accounts),
        exposition=(
            ExpositionJob(name="node", account="lab", region="local", endpoints=("http://a:1/metrics",)),
        )
        * exposition,
        services=(ServiceProfile(service="ec2", namespace="AWS/EC2"),),
        kafka=Kafka(prefix="t", ledger_partitions=1),
        slots=4,
        run=Run(horizon_s=horizon_s),
    )


CONFIG = config_of(*ACCOUNTS)


class World:
    """A coordinator, its clock, and the log that it writes."""

    def __init__(
        self, config: Config = CONFIG, memory: PlannersMemory = NOTHING, broker: FakeBroker | None = None
    ) -> None:
        self.clock = ManualClock(NOON_S)
        if broker is None:
            broker = FakeBroker()
            broker.create("t.ledger", 1)
            broker.create("t.collect", config.slots)
        self.broker = broker
        self.sender = FakeSender(broker)
        self.coordinator = Coordinator(config, self.sender, self.clock, memory)

    def tasks(self, topic: str) -> list[Task]:
        """In the order in which they were announced."""
        return [
            wire.decode_task(r.value) for name, records in self.sender.sent if name == topic for r in records
        ]

    @property
    def planned(self) -> list[Task]:
        return self.tasks("t.ledger")

    @property
    def collect(self) -> list[Task]:
        return self.tasks("t.collect")


def ids(tasks: list[Task]) -> list[str]:
    return sorted(t.task_id for t in tasks)


async def test_a_task_is_on_the_ledger_before_it_is_on_collect() -> None:
    world = World()
    await world.coordinator.step()
    assert [topic for topic, _ in world.sender.sent] == ["t.ledger", "t.collect"]
    assert ids(world.planned) == ids(world.collect) != []


async def test_the_ledger_hears_of_the_oldest_first_and_collect_of_live_ones_first() -> None:
    world = World()
    await world.coordinator.step()
    ticks = [t.tick_s for t in world.planned]
    assert ticks == sorted(ticks)
    kinds = [t.kind for t in world.collect]
    assert kinds == sorted(kinds, key=lambda k: k != TaskKind.LIVE)
    assert set(kinds) == {"live", "backlog"}


async def test_a_task_goes_to_its_targets_slot_under_its_targets_key() -> None:
    world = World()
    await world.coordinator.step()
    for record in world.broker.records("t.collect"):
        target = str(wire.decode_task(record.value).target)
        assert (record.key, record.position.partition) == (
            target.encode(),
            world.coordinator.slots[target],
        )
    assert set(world.coordinator.slots) == {f"cloudwatch/{a}/eu-west-1" for a in ACCOUNTS}


async def test_nothing_is_announced_twice_and_the_next_interval_is_live_only() -> None:
    world = World()
    await world.coordinator.step()
    before = len(world.collect)
    await world.coordinator.step()
    assert len(world.collect) == before
    world.clock.advance(300)
    await world.coordinator.step()
    assert [t.kind for t in world.collect[before:]] == ["live"] * len(ACCOUNTS)


@pytest.mark.parametrize("sends_before", [0, 1], ids=["ledger", "collect"])
async def test_what_kafka_did_not_take_is_announced_later_and_nothing_is_lost(sends_before: int) -> None:
    world = World()
    world.sender.failures = [*[None] * sends_before, Transient("topic", "away")]
    with pytest.raises(Transient, match="away"):
        await world.coordinator.step()
    await world.coordinator.step()
    untroubled = World()
    await untroubled.coordinator.step()
    assert ids(world.planned) == ids(untroubled.planned)
    assert ids(world.collect) == ids(untroubled.collect)


async def test_a_long_outage_of_kafka_coalesces_and_does_not_pile_up() -> None:
    world = World()
    await world.coordinator.step()
    before = len(world.collect)
    world.broker.down = True
    for _ in range(12):
        world.clock.advance(300)
        with pytest.raises(Transient):
            await world.coordinator.step()
    world.broker.down = False
    await world.coordinator.step()
    await world.coordinator.step()
    new = world.collect[before:]
    # The poll that was planned when Kafka went, then the live one, and one block for what was missed.
    assert len(new) <= 4 * len(ACCOUNTS)
    windows = {(t.target, w.end_s) for t in new for i in t.items for w in i.windows()}
    assert {(t.target, NOON_S + 300 * n) for t in new for n in range(1, 13)} <= windows


async def test_a_restart_plans_only_what_is_missing() -> None:
    first = World()
    await first.coordinator.step()
    memory = PlannersMemory(
        {str(t.target): {"ec2": NOON_S} for t in first.planned},
        first.coordinator.slots,
        {},
        frozenset(t.task_id for t in first.planned),
        (),
    )
    second = World(memory=memory)
    await second.coordinator.step()
    assert second.collect == []
    second.clock.advance(900)
    await second.coordinator.step()
    ends = {(t.target, w.end_s) for t in second.collect for i in t.items for w in i.windows()}
    assert {(t.target, NOON_S + n) for t in first.planned for n in (300, 600, 900)} <= ends


async def test_tasks_without_a_receipt_are_announced_again_and_live_ones_go_first() -> None:
    target = Target("cloudwatch", ACCOUNTS[0], "eu-west-1")
    grids = grids_of(CONFIG)[target]
    unanswered = due(target, grids, {}, NOON_S, CONFIG.revision, 3600)
    assert {t.kind for t in unanswered} == {"live", "backlog"}
    memory = PlannersMemory(
        {str(target): {"ec2": NOON_S}}, {}, {}, frozenset(t.task_id for t in unanswered), tuple(unanswered)
    )
    world = World(memory=memory)
    await world.coordinator.step()
    assert set(ids(unanswered)) <= set(ids(world.collect))
    kinds = [t.kind for t in world.collect]
    assert kinds == sorted(kinds, key=lambda k: k != TaskKind.LIVE)
    # They are planned already: only what is new goes on the ledger.
    assert not set(ids(unanswered)) & set(ids(world.planned))


async def test_unanswered_tasks_of_targets_that_are_gone_are_left_alone() -> None:
    gone = Target("cloudwatch", "999999999999", "eu-west-1")
    grids = grids_of(config_of("999999999999"))[gone]
    memory = PlannersMemory({}, {}, {}, frozenset(), tuple(due(gone, grids, {}, NOON_S, "r", 0)))
    world = World(memory=memory)
    await world.coordinator.step()
    assert gone not in {t.target for t in world.collect}


async def test_two_at_once_write_the_same_tasks() -> None:
    one, two = World(), World()
    two.clock.advance(7)
    await one.coordinator.step()
    await two.coordinator.step()
    assert ids(one.collect) == ids(two.collect)


async def test_a_clock_that_was_an_hour_ahead_and_stepped_back_costs_no_poll() -> None:
    world = World()
    await world.coordinator.step()
    world.clock.step(3600)
    await world.coordinator.step()
    world.clock.advance(5)
    world.clock.step(-3600)
    await world.coordinator.step()
    before = len(world.planned)
    ticks = []
    for _ in range(24):  # until past what was planned ahead
        world.clock.advance(300)
        await world.coordinator.step()
        found = world.planned[before:]
        before += len(found)
        assert {t.kind for t in found} == {TaskKind.LIVE}
        ticks += sorted({t.tick_s for t in found})
        assert len(found) == len(ACCOUNTS)
    assert ticks == list(range(NOON_S + 300, NOON_S + 24 * 300 + 1, 300))


async def test_what_had_not_settled_when_the_clock_leapt_ahead_is_looked_at_when_it_has_stepped_back() -> (
    None
):
    world = World()
    await world.coordinator.step()
    world.clock.step(3600)
    await world.coordinator.step()
    for _ in range(6):
        world.clock.advance(300)
        await world.coordinator.step()
    before = len(world.planned)
    world.clock.step(-3600)
    world.clock.advance(5)
    await world.coordinator.step()
    found = world.planned[before:]
    assert {t.kind for t in found} == {TaskKind.LIVE}
    # What ended in the settling time before the leap, and all since.
    assert {(i.start_s, i.end_s) for t in found for i in t.items} == {(NOON_S - 600, NOON_S + 1800)}
    assert len(found) == len(ACCOUNTS)


async def test_a_clock_that_was_an_hour_behind_has_no_hour_planned_twice() -> None:
    world = World()
    await world.coordinator.step()
    for _ in range(12):
        world.clock.advance(300)
        await world.coordinator.step()
    known = set(ids(world.planned))
    world.clock.step(-3600)
    await world.coordinator.step()
    world.clock.step(3600)
    world.clock.advance(5)
    await world.coordinator.step()
    world.clock.advance(295)
    await world.coordinator.step()
    again = [t for t in world.planned[len(known) :] if t.tick_s <= NOON_S + 3600]
    # What was live then may be announced again, under its old id: the archive has its answer.
    assert set(ids(again)) <= known
    assert [t.tick_s for t in world.planned[-len(ACCOUNTS) :]] == [NOON_S + 3900] * len(ACCOUNTS)
    assert {t.kind for t in world.planned[len(known) :]} == {TaskKind.LIVE}


class FakeLedger:
    """`ingest.ledger.Ledger` as far as recalling needs it: one service's end for all targets, as long as that is before."""

    def __init__(self, until_s: int) -> None:
        self.until_s = until_s
        self.failures: list[Exception] = []
        self.asked: list[int | None] = []

    async def memory(self, before_s: int | None = None) -> PlannersMemory:
        self.asked.append(before_s)
        if self.failures:
            raise self.failures.pop(0)
        until = {f"cloudwatch/{a}/eu-west-1": {"ec2": self.until_s} for a in ACCOUNTS}
        return PlannersMemory(until, {}, {}, frozenset(), ())


async def test_one_that_started_without_the_ledger_plans_what_was_missed_when_it_is_back() -> None:
    gap_s = 2 * 86_400
    world = World()
    ledger = FakeLedger(NOON_S - gap_s)
    ledger.failures = [Transient("postgres", "away")]
    as_ledger: Any = ledger
    assert not await world.coordinator.recall(as_ledger)
    await world.coordinator.step()
    before = len(world.collect)
    world.clock.advance(1800)
    await world.coordinator.step()
    with pytest.raises(Transient, match="away"):
        await world.coordinator.recall(as_ledger)
    assert await world.coordinator.recall(as_ledger)
    # What this life planned itself tells nothing of the life before.
    assert ledger.asked == [NOON_S - 3600] * 2
    await world.coordinator.step()
    windows = {(t.target.account, w.start_s) for t in world.planned for i in t.items for w in i.windows()}
    expected = {(a, s) for a in ACCOUNTS for s in range(NOON_S - gap_s, NOON_S + 1800, 300)}
    assert expected <= windows
    assert len(ids(world.collect)) == len(set(ids(world.collect)))
    assert ids(world.collect) == ids(world.planned)
    # A target's two days are 14.4 blocks of 200 minutes, cut at both ends; and this life's live look has the half hour.
    assert len(world.collect) - before == (16 + 1) * len(ACCOUNTS)


async def test_a_stretched_service_is_planned_at_each_kth_tick_and_a_stopped_one_is_asked_of_nobody() -> None:
    world = World()
    await world.coordinator.step()
    world.coordinator.polling = Polling({(ACCOUNTS[0], "ec2"): 3}, frozenset({(ACCOUNTS[1], "ec2")}))
    before = len(world.collect)
    for _ in range(3):
        world.clock.advance(300)
        await world.coordinator.step()
    new = world.collect[before:]
    spans = [(t.target.account, t.tick_s - NOON_S, t.tick_s - i.start_s) for t in new for i in t.items]
    expected = [(ACCOUNTS[0], 900, 900 + 600)] + [(ACCOUNTS[2], n, 300 + 600) for n in (300, 600, 900)]
    assert sorted(spans) == expected
    kinds = [
        (t.target.account, t.kind, t.tick_s - NOON_S) for t in world.planned if t.kind == TaskKind.BUDGET
    ]
    assert kinds == [(ACCOUNTS[1], "budget", n) for n in (300, 600, 900)]


async def test_targets_keep_the_slots_that_are_remembered() -> None:
    slots = {f"cloudwatch/{a}/eu-west-1": slot for a, slot in zip(ACCOUNTS, (3, 1, 0), strict=True)}
    assert World(memory=PlannersMemory({}, slots, {}, frozenset(), ())).coordinator.slots == slots


async def test_a_target_weighs_the_metrics_a_minute_that_the_ledger_learned_and_before_that_the_mean() -> (
    None
):
    learned = f"cloudwatch/{ACCOUNTS[0]}/eu-west-1"
    series = {learned: {"ec2": 1000.0}, "cloudwatch/gone/x": {"ec2": 3000.0}}
    world = World(memory=PlannersMemory({}, {}, series, frozenset(), ()))
    others = {f"cloudwatch/{a}/eu-west-1": 400.0 for a in ACCOUNTS[1:]}
    assert world.coordinator.weights == {learned: 200.0} | others
    await world.coordinator.reweigh({learned: {"ec2": 5000.0}})
    assert world.coordinator.weights == {learned: 1000.0} | dict.fromkeys(others, 800.0)


async def test_a_horizon_is_planned_once_in_a_life_and_what_has_no_past_goes_on() -> None:
    config = config_of(*ACCOUNTS, exposition=True, horizon_s=(NOON_S - 3600, NOON_S))
    # What another run planned before is no reason to leave it out.
    world = World(
        config,
        PlannersMemory({f"cloudwatch/{ACCOUNTS[0]}/eu-west-1": {"ec2": NOON_S}}, {}, {}, frozenset(), ()),
    )
    await world.coordinator.step()
    world.clock.advance(600)
    await world.coordinator.step()
    windows = {(t.target.account, w.start_s) for t in world.collect for i in t.items for w in i.windows()}
    expected = {(a, s) for a in ACCOUNTS for s in range(NOON_S - 3600, NOON_S, 300)}
    assert {w for w in windows if w[0] != "lab"} == expected
    assert {s for a, s in windows if a == "lab"} == set(range(NOON_S, NOON_S + 601, 30))


async def test_it_is_ready_when_kafka_has_taken_the_plan_and_stops_when_told() -> None:
    world = World()
    lifecycle = Lifecycle()
    world.broker.down = True
    running = asyncio.create_task(world.coordinator.run(lifecycle))
    await asyncio.sleep(0.05)
    assert not lifecycle.ready
    world.broker.down = False

    async def ready() -> bool:
        return lifecycle.ready

    await eventually(ready)
    lifecycle.stop.set()
    async with asyncio.timeout(10):
        await running
    assert len(world.collect) == len(world.planned) > 0


async def test_more_tasks_than_fit_one_send_are_all_announced() -> None:
    class Counting(FakeSender):
        sizes: list[int] = []  # noqa: RUF012

        async def send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]:
            self.sizes.append(len(records))
            return await super().send(topic, records)

    config = config_of(*(f"{i:012}" for i in range(300)))
    world = World(config)
    counting = Counting(world.broker)
    coordinator = Coordinator(config, counting, world.clock, NOTHING)
    await coordinator.step()
    assert counting.sizes == [500, 100, 500, 100]


# --- pauses and healing -------------------------------------------------------------------------------------------


def paused(account: str, service: str = "*") -> Pauses:
    return Pauses.of([Pause(account, service, datetime.fromtimestamp(NOON_S, UTC), "")])


async def test_what_is_paused_is_on_the_ledger_and_not_on_collect() -> None:
    world = World()
    world.coordinator.pauses = paused(ACCOUNTS[1])
    await world.coordinator.step()
    untroubled = World()
    await untroubled.coordinator.step()
    assert ids(world.planned) == ids(untroubled.planned)
    assert {t.target.account for t in world.collect} == {ACCOUNTS[0], ACCOUNTS[2]}
    assert {t.kind for t in world.planned if t.target.account == ACCOUNTS[1]} == {"paused"}


async def test_of_a_paused_service_the_others_are_asked() -> None:
    account = Account(id=ACCOUNTS[0], regions=("eu-west-1",), services=("ec2", "rds"))
    profiles = tuple(ServiceProfile(service=s, namespace=s) for s in ("ec2", "rds"))
    world = World(CONFIG.model_copy(update={"accounts": (account,), "services": profiles}))
    world.coordinator.pauses = paused("*", "rds")
    await world.coordinator.step()
    assert {i.service for t in world.collect for i in t.items} == {"ec2"}
    assert {(t.kind == "paused", i.service) for t in world.planned for i in t.items} == {
        (False, "ec2"),
        (True, "rds"),
    }


async def test_after_a_pause_polls_go_on_and_a_restart_does_not_ask_what_was_paused() -> None:
    world = World()
    world.coordinator.pauses = paused("*")
    await world.coordinator.step()
    assert world.collect == []
    memory = PlannersMemory(
        {str(t.target): {"ec2": NOON_S} for t in world.planned}, {}, {}, frozenset(), tuple(world.planned)
    )
    restarted = World(memory=memory)
    await restarted.coordinator.step()
    assert restarted.collect == []
    world.coordinator.pauses = Pauses()
    world.clock.advance(300)
    await world.coordinator.step()
    assert [t.kind for t in world.collect] == ["live"] * len(ACCOUNTS)


async def test_heals_are_new_on_the_ledger_and_what_is_announced_again_is_not() -> None:
    world = World()
    await world.coordinator.step()
    [known, *_] = world.planned
    new = replace(known, task_id="0" * 32, attempt=1, kind="heal")
    again, replay = replace(known, kind="again"), replace(known, task_id="1" * 32, kind="replay")
    gone = replace(new, target=Target("cloudwatch", "999999999999", "eu-west-1"))
    before = len(world.planned), len(world.collect)
    world.coordinator.take_over([new, again, replay, gone])
    await world.coordinator.step()
    assert world.planned[before[0] :] == [new]
    assert world.collect[before[1] :] == [new, again, replay]
    await world.coordinator.step()
    assert len(world.collect) == before[1] + 3


async def test_while_kafka_is_away_the_coordinator_says_that_it_is_behind() -> None:
    world = World()
    world.broker.down = True
    with pytest.raises(Transient):
        await world.coordinator.step()
    assert world.coordinator.behind
    world.broker.down = False
    await world.coordinator.step()
    assert not world.coordinator.behind


class FakeHealStore:
    """`ingest.heal_store.HealStore` that knows one decision, or fails, and remembers what it was told."""

    def __init__(self, *healed: Healed | Exception | None) -> None:
        self.answers = list(healed)
        self.announced: list[Mapping[str, Announced]] = []
        self.paused: Pauses | Exception = Pauses()

    async def heal(self, now_s: int, rules: Rules, announced: Mapping[str, Announced]) -> Healed | None:
        self.announced.append(dict(announced))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def pauses(self) -> Pauses:
        if isinstance(self.paused, Exception):
            raise self.paused
        return self.paused


def healer_of(world: World, store: FakeHealStore) -> Healer:
    as_store: Any = store
    return Healer(CONFIG, world.coordinator, as_store, world.clock)


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_a_pass_hands_its_tasks_over_counts_them_and_remembers_what_was_announced_again() -> None:
    world = World()
    await world.coordinator.step()
    one = replace(world.planned[0], kind="replay")
    new = replace(world.planned[1], task_id="2" * 32, kind="heal")
    first = Healed(Decision((one,), (), (), (), {Wait.BUDGET: 7}), (new,), (), Decimal("0.25"))
    store = FakeHealStore(first, first, None)
    healer = healer_of(world, store)
    before = [metric("headgate_heals_total", means=m) for m in ("replay", "again", "source")]
    for _ in range(2):
        assert await healer.step()
        world.clock.advance(60)
    assert not await healer.step()
    after = [metric("headgate_heals_total", means=m) for m in ("replay", "again", "source")]
    assert [a - b for a, b in zip(after, before, strict=True)] == [2, 0, 2]
    assert metric("headgate_heal_dollars_reserved") == 0.25
    assert metric("headgate_heal_windows_waiting", why="budget") == 7
    assert [a.get(one.task_id) for a in store.announced] == [
        None,
        Announced(1, NOON_S),
        Announced(2, NOON_S + 60),
    ]


async def test_what_is_declared_is_an_error_in_the_log_and_counted_by_window() -> None:
    world = World()
    [target, *_] = grids_of(CONFIG)
    windows = [
        OpenWindow(
            target, "ec2", Window(s, s + 300), s + 900, last_status="forbidden", last_detail="AccessDenied"
        )
        for s in (NOON_S, NOON_S + 300)
    ]
    declared = tuple(Declaration(w, Reason.FORBIDDEN) for w in windows)
    store = FakeHealStore(Healed(Decision((), (), (), declared, {}), (), declared, Decimal(0)))
    before = metric("headgate_windows_declared_total", reason="forbidden")
    with structlog.testing.capture_logs() as logs:
        await healer_of(world, store).step()
    assert metric("headgate_windows_declared_total", reason="forbidden") - before == 2
    assert [
        (e["log_level"], e["event"], e["start"], e["end"], e["windows"], e["last_detail"]) for e in logs
    ] == [("error", "windows_declared", "2026-01-01T12:00:00Z", "2026-01-01T12:10:00Z", 2, "AccessDenied")]


async def test_healing_decides_nothing_while_kafka_has_not_taken_what_was_decided_before() -> None:
    world = World()
    world.broker.down = True
    with pytest.raises(Transient):
        await world.coordinator.step()
    store = FakeHealStore()
    assert not await healer_of(world, store).step()
    assert store.announced == []


async def test_what_was_paused_last_stays_so_while_postgres_is_away() -> None:
    world = World()
    store = FakeHealStore()
    as_store: Any = store
    store.paused = paused("*")
    assert await read_pauses(world.coordinator, as_store)
    store.paused = Transient("postgres", "away")
    assert not await read_pauses(world.coordinator, as_store)
    assert world.coordinator.pauses.cover(ACCOUNTS[0], "ec2")


# --- another configuration under way --------------------------------------------------------------------------


async def test_a_new_account_is_planned_at_the_next_tick_as_on_a_first_start_and_the_others_go_on() -> None:
    world = World(config_of(*ACCOUNTS[:2]))
    await world.coordinator.step()
    before = len(world.planned)
    await world.coordinator.reconfigure(CONFIG)
    await world.coordinator.step()
    new = world.planned[before:]
    assert {t.target.account for t in new} == {ACCOUNTS[2]}
    assert {t.kind for t in new} == {TaskKind.LIVE, TaskKind.BACKLOG}
    assert {t.config_revision for t in new} == {CONFIG.revision}
    world.clock.advance(300)
    await world.coordinator.step()
    assert {t.target.account for t in world.planned[before + len(new) :]} == set(ACCOUNTS)


async def test_what_waits_for_a_target_that_is_gone_is_dropped_and_nothing_breaks() -> None:
    world = World()
    world.sender.failures = [None, Transient("topic", "away")]
    with pytest.raises(Transient):
        await world.coordinator.step()
    gone = Target("cloudwatch", ACCOUNTS[2], "eu-west-1")
    world.coordinator.take_over([Task("1" * 32, gone, "r", NOON_S, 1, TaskKind.HEAL, 0, ())])
    await world.coordinator.reconfigure(config_of(*ACCOUNTS[:2]))
    await world.coordinator.step()
    world.clock.advance(300)
    await world.coordinator.step()
    assert {t.target.account for t in world.collect} == set(ACCOUNTS[:2])
    assert "1" * 32 not in ids(world.planned)
    # What was announced before it went stays planned.
    assert {t.target.account for t in world.planned} == set(ACCOUNTS)


async def test_a_target_that_comes_back_goes_on_where_its_plan_ended() -> None:
    world = World()
    await world.coordinator.step()
    before = len(world.planned)
    await world.coordinator.reconfigure(config_of(*ACCOUNTS[:2]))
    world.clock.advance(1800)
    await world.coordinator.step()
    await world.coordinator.reconfigure(CONFIG)
    await world.coordinator.step()
    new = [t for t in world.planned[before:] if t.target.account == ACCOUNTS[2]]
    starts = {w.start_s for t in new for i in t.items for w in i.windows()}
    assert set(range(NOON_S, NOON_S + 1800, 300)) <= starts


async def test_a_change_waits_for_the_step_that_is_being_announced() -> None:
    world = World()
    sending, go_on = asyncio.Event(), asyncio.Event()
    send = world.sender.send

    async def slow(topic: str, records: Sequence[Outgoing]) -> object:
        sending.set()
        await go_on.wait()
        return await send(topic, records)

    world.sender.send = slow  # type: ignore[method-assign, assignment]
    stepping = asyncio.create_task(world.coordinator.step())
    await sending.wait()
    changing = asyncio.create_task(world.coordinator.reconfigure(config_of(ACCOUNTS[0])))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(stepping, changing)
    assert {t.target.account for t in world.collect} == set(ACCOUNTS)
    world.clock.advance(300)
    before = len(world.collect)
    await world.coordinator.step()
    assert {t.target.account for t in world.collect[before:]} == {ACCOUNTS[0]}
