"""The coordinator: plans targets onto slots, and puts the tasks that are due on `collect`.

* *Planned before work*: a task goes on `ledger` before it goes on `collect`.
* While it is down nothing is lost: on its return it plans what it missed, from the ledger. Two at once do no harm: a task's id is
  made from what it asks for.
* *A split target is planned once*: its tasks are divided by slot before they are announced, and whatever the split becomes later, a window
  that was planned stays planned.
* What is paused, or stopped for a budget (`workers.budgets`), is planned and asked of nobody. Gaps are healed (`workers.healing`).
* Its configuration may change under way (`workers.reload`), the organization's accounts with it: it is who lists them.
* While PostgreSQL is down it goes on from memory. At its start it waits for the ledger, for `MEMORY_WAIT_S`; then it plans as on a first
  start, and what an earlier life left unplanned when the ledger is there again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import structlog
from prometheus_client import Counter, Gauge

from ingest import wire
from ingest.budget import Polling
from ingest.clock import Clock, SystemClock
from ingest.errors import Transient
from ingest.heal_store import HealStore
from ingest.ledger import TASKS_MAX, Ledger, PlannersMemory
from ingest.log import Outgoing, Producer, Sender
from ingest.model import Target, Task, TaskKind
from ingest.pauses import Pauses, split
from ingest.reassign import Planned
from ingest.schedule import Grid, Progress, divide, due, grids_of, horizon
from ingest.spending import payers_of
from ingest.weights import weights_of
from shard_config.load import load
from shard_config.model import Config
from shard_config.units import Places, UnitPlan, plan_units
from workers import local
from workers.aside import Aside
from workers.bounds import BOUNDS
from workers.budgets import Budgeter
from workers.healing import Healer, keep_pauses, read_pauses
from workers.inventory import Refresher
from workers.lifecycle import Lifecycle, add_worker_arguments, run_worker
from workers.members import Lister
from workers.page import Page
from workers.reload import Settings
from workers.setup import until_slots_fit
from workers.shards import Board, Publisher
from workers.snapshot import Snapshots

_log = structlog.get_logger()

TICK_S = 1.0
MEMORY_WAIT_S = 60.0
RECALL_INTERVAL_S = 10.0
ANNOUNCED_AT_ONCE = 500
PLAN_KEPT_S = 3600.0
"""Targets are weighed anew and the plan is written down so often, and at each change of the configuration."""
LATELY = timedelta(hours=2)
"""Looks of the last so long say what a service weighs now; of one without, what was known holds."""

ASKED_OF_NOBODY = (TaskKind.PAUSED, TaskKind.BUDGET)

NO_MEMORY = PlannersMemory({}, {}, {}, frozenset(), ())

PLANNED = Counter("headgate_tasks_planned_total", "Tasks put on `collect`.", ["kind"])
TARGETS = Gauge("headgate_targets", "Targets in the configuration.")
LAST_PLAN = Gauge(
    "headgate_coordinator_last_plan_timestamp_seconds",
    "Unix time at which what was due was last planned and on Kafka. Standing still: nothing is collected.",
)


class Coordinator:
    """Plans for one configuration."""

    def __init__(self, config: Config, sender: Sender, clock: Clock, memory: PlannersMemory) -> None:
        self._sender = sender
        self._clock = clock
        self._stepping = asyncio.Lock()
        """Held by a step and by a change of the configuration, so that neither meets the other half done."""
        self._memory = memory
        self._progress: dict[Target, Progress] = {}
        self._ahead_s: float | None = None
        """Of the wall clock before the monotonic one, at the last plan: what changes it is a step."""
        self.weights: dict[str, float] = {}
        """Metrics asked a minute, by unit (`shard_config.units`), as far as the ledger has learned."""
        self.slots: dict[str, int] = dict(memory.slots)
        """By unit."""
        self._series = memory.series
        self._known = memory.task_ids
        self._behind = False
        self._recalled: list[Task] = []
        self._taken_over: list[Task] = []
        self._to_ledger: list[Task] = []
        self._to_collect: list[Task] = []
        self.configure(config)
        self.pauses = Pauses()
        """What is paused, as far as is known; whoever watches PostgreSQL sets it."""
        self.polling = Polling()
        """How polls are stretched, and which are stopped, for budgets; whoever watches what is spent sets it."""
        self._first_plan: _FirstPlan | None = None
        # What has no receipt waits on `collect`, or never got there. Twice there is harmless, and paid for once.
        self._to_collect = _live_first(
            t for t in memory.unanswered if t.target in self._grids and t.kind not in ASKED_OF_NOBODY
        )

    def configure(self, config: Config) -> None:
        """Plan for this configuration from now on; not in the middle of a step: see `reconfigure`.

        What was announced stays planned; what is new begins as on a first start. What waits to be announced for a target that is gone is
        dropped: nobody has heard of it. A target that comes back goes on where its plan ended, windows missed meanwhile included.
        """
        self._config = config
        # Not at each tick for each target: it is milliseconds with hundreds of accounts.
        self._revision = config.revision
        self._grids: Mapping[Target, tuple[Grid, ...]] = grids_of(config)
        once = config.run.horizon_s is not None
        for t in self._grids:
            before = {} if once else self._memory.planned_until_s.get(str(t), {})
            self._progress.setdefault(t, Progress(before))
        self._replan()
        for waiting in (self._to_ledger, self._to_collect, self._recalled, self._taken_over):
            waiting[:] = [task for task in waiting if task.target in self._grids]
        TARGETS.set(len(self._grids))

    @property
    def to_announce(self) -> int:
        """Tasks that Kafka has not taken yet."""
        return len(self._to_ledger) + len(self._to_collect)

    async def reconfigure(self, config: Config) -> None:
        """`configure` between two steps."""
        async with self._stepping:
            self.configure(config)

    async def reweigh(self, series: Mapping[str, Mapping[str, float]]) -> None:
        """Plan anew for what was learned lately (`Ledger.series`), between two steps."""
        async with self._stepping:
            known = self._series
            self._series = {**known, **{t: {**known.get(t, {}), **new} for t, new in series.items()}}
            self._replan()

    def _replan(self) -> None:
        config = self._config
        weights = weights_of(self._grids, self._series)
        found = plan_units(weights, config.slots, self.slots, via=payers_of(config))
        self.slots, self.weights = dict(found.slots), dict(found.weights)
        self._places = Places(self.slots)

    def plan_due(self) -> int:
        """Plan what is due now; returns how many tasks that are. They are announced by `announce`."""
        now_s, stepped_s = self._clock.now_s(), self._stepped_s()
        tasks: list[Task] = []
        first: list[Task] = []
        for target, grids in self._grids.items():
            until_s = self._progress[target].until_s
            if self._config.run.horizon_s is None:
                self._progress[target].go_on_from(grids, now_s, stepped_s)
            whole = self._found(target, grids, now_s)
            found = [part for task in whole for part in divide(task, self._places)]
            for item in (item for task in found for item in task.items):
                until_s[item.service] = max(until_s.get(item.service, 0), item.end_s)
            tasks += (t for t in found if t.task_id not in self._known)
            first += whole
        if self._first_plan is None and tasks:
            start_s = min(i.start_s for t in first for i in t.items)
            self._first_plan = _FirstPlan(now_s, start_s, frozenset(t.task_id for t in first))
        tasks += (part for task in self._recalled for part in divide(task, self._places))
        stopped = self.polling.stopped
        tasks = [part for task in tasks for part in split(task, self.pauses, stopped)]
        heals, self._recalled, self._taken_over = self._taken_over, [], []
        planned = [*tasks, *(t for t in heals if t.kind == TaskKind.HEAL)]
        self._to_ledger += sorted(planned, key=lambda t: t.tick_s)
        asked = (t for t in (*tasks, *heals) if t.kind not in ASKED_OF_NOBODY)
        self._to_collect = _live_first([*self._to_collect, *asked])
        return len(planned)

    def _stepped_s(self) -> float:
        """By how much the wall clock has stepped since the last call."""
        ahead_s = self._clock.now_ms() / 1000 - self._clock.monotonic_s()
        before_s, self._ahead_s = self._ahead_s, ahead_s
        return 0.0 if before_s is None else ahead_s - before_s

    @property
    def planned(self) -> Planned:
        """The plan as it is now, for shards."""
        return Planned(UnitPlan(self.slots, self.weights), self._config.slots, payers_of(self._config))

    @property
    def behind(self) -> bool:
        """Whether Kafka has not taken yet what was planned."""
        return self._behind

    def take_over(self, tasks: Iterable[Task]) -> None:
        """Announce these with what is due next: of healing, those that are new on `ledger` too."""
        self._taken_over += (t for t in tasks if t.target in self._grids)

    def _found(self, target: Target, grids: tuple[Grid, ...], now_s: int) -> list[Task]:
        config, until_s = self._config, self._progress[target].until_s
        if config.run.horizon_s is None:
            stretch = {g.service: self.polling.of(target.account, g.service) for g in grids if g.has_past}
            return due(
                target, grids, until_s, now_s, self._revision, config.startup_lookback_s,
                stretch, config.budget.stretch_max,
            )  # fmt: skip
        # What has no past is polled as ever while the run lasts; the rest is looked at once.
        live = [g for g in grids if not g.has_past]
        once = [g for g in grids if g.has_past and g.service not in until_s]
        return [
            *due(target, live, until_s, now_s, self._revision, 0),
            *horizon(target, once, *config.run.horizon_s, self._revision),
        ]

    async def recall(self, ledger: Ledger) -> bool:
        """For one that started without the ledger: plan what it would have planned with it, if the ledger is there by now.

        True where that is done. Raises Transient.
        """
        first = self._first_plan
        if first is None or self._config.run.horizon_s is not None:
            return first is not None
        memory = await ledger.memory(before_s=first.start_s)
        for target, grids in self._grids.items():
            # Services that nobody planned before need no more than a first start.
            before = {g.service: until for g in grids if (until := _until(memory, target, g)) is not None}
            known = [g for g in grids if g.service in before]
            # What was missed for a short time is in the live look, which then is another than this life's.
            self._recalled += due(target, known, before, first.now_s, self._revision, 0)
        self._recalled = [t for t in self._recalled if t.task_id not in first.task_ids]
        return True

    async def announce(self) -> None:
        """Put planned tasks on `ledger`, the oldest first, then on `collect`, live ones first. Raises Transient: call it again.

        The oldest first, so that whoever reads the ledger's newest planned window knows that all before it are planned.
        """
        kafka = self._config.kafka
        while self._to_ledger:
            some = self._to_ledger[:ANNOUNCED_AT_ONCE]
            await self._sender.send(kafka.topic("ledger"), [self._record(t) for t in some])
            del self._to_ledger[: len(some)]
        while self._to_collect:
            some = self._to_collect[:ANNOUNCED_AT_ONCE]
            # One that is waiting as a whole is one task still: it goes where its first service is.
            slots = (self._places.of(str(t.target), t.items[0].service) for t in some)
            records = [self._record(t, slot) for t, slot in zip(some, slots, strict=True)]
            await self._sender.send(kafka.topic("collect"), records)
            del self._to_collect[: len(some)]
            for task in some:
                PLANNED.labels(kind=task.kind).inc()

    def _record(self, task: Task, slot: int | None = None) -> Outgoing:
        return Outgoing(str(task.target).encode(), wire.encode_task(task), slot)

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop: plan what is due, each second."""
        while not lifecycle.stop.is_set():
            lifecycle.beat("planning")
            try:
                await self.step()
                lifecycle.ready = True
                LAST_PLAN.set(self._clock.now_s() - self._config.run.clock_offset_s)
            except Transient as error:
                _log.warning("planning_retries", error=str(error))
            await lifecycle.pause(TICK_S)

    async def step(self) -> None:
        """Plan what is due and announce it. Raises Transient.

        While Kafka does not take what was planned, nothing more is planned: an outage coalesces, and does not pile up here.
        """
        async with self._stepping:
            if not self._behind and (tasks := self.plan_due()):
                _log.info("tasks_planned", tasks=tasks)
            self._behind = True
            await self.announce()
            self._behind = False


@dataclass(frozen=True, slots=True)
class _FirstPlan:
    """What a life planned first: when, from where on, and which tasks, before they were divided."""

    now_s: int
    start_s: int
    task_ids: frozenset[str]


def _until(memory: PlannersMemory, target: Target, grid: Grid) -> int | None:
    return memory.planned_until_s.get(str(target), {}).get(grid.service)


def _live_first(tasks: Iterable[Task]) -> list[Task]:
    return sorted(tasks, key=lambda t: t.kind != TaskKind.LIVE)


async def serve(config: Config, lifecycle: Lifecycle, path: Path | None = None) -> None:
    """Wire the coordinator and run it until told to stop. `config` is what stands in the file `path`, which is watched."""
    clock = SystemClock(config.run.clock_offset_s)
    lister = Lister(config.s3, clock)
    settings = Settings(config, lister, clock, path)
    config = await settings.start()
    async with contextlib.AsyncExitStack() as stack:

        def connection(name: str) -> Ledger:
            """One for each loop: they are not for concurrent use."""
            made = Ledger(config.postgres, f"headgate {name}", {})
            stack.push_async_callback(made.close)
            return made

        producer = Producer(config.kafka, "coordinator")
        stack.push_async_callback(producer.close)
        ledger = connection("coordinator")
        board = Board(config.kafka, "coordinator", Aside(config.kafka, producer).put)
        stack.push_async_callback(board.close)
        await until_slots_fit(config, lifecycle)
        memory = await _remember(ledger, clock, lifecycle)
        if lifecycle.stop.is_set():
            return
        coordinator = Coordinator(config, producer, clock, memory or NO_MEMORY)
        BOUNDS.watch("tasks_to_announce", lambda: coordinator.to_announce, lambda: TASKS_MAX)
        # Before the first plan: what is paused is not asked for even once.
        pauses = HealStore(connection("coordinator's pauses"))
        await read_pauses(coordinator, pauses)
        healer = Healer(config, coordinator, HealStore(connection("healing")), clock)
        healer.configure(config, whole=settings.whole)
        budgeter = Budgeter(config, coordinator, connection("budgets"), clock)
        await budgeter.try_step()
        publisher = Publisher(config.kafka, producer, board, clock, lambda: coordinator.planned)
        lifecycle.pages["shards"] = publisher.page
        page = Page(config, coordinator, publisher.page, budgeter, connection("page"), clock)
        page.document.serve(lifecycle)
        replanned = asyncio.Event()

        async def apply(changed: Config) -> None:
            await coordinator.reconfigure(changed)
            healer.configure(changed, whole=settings.whole)
            budgeter.configure(changed)
            page.configure(changed)
            replanned.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(board.run(lifecycle))
            group.create_task(publisher.run(lifecycle))
            group.create_task(page.run(lifecycle))
            await publisher.rest(lifecycle)
            group.create_task(coordinator.run(lifecycle))
            group.create_task(keep_pauses(coordinator, pauses, lifecycle))
            group.create_task(settings.run(lifecycle, apply))
            group.create_task(lister.run(lifecycle, lambda: settings.file, settings.look_now))
            if config.run.horizon_s is None:
                # A horizon is looked at once, and nothing else is done.
                group.create_task(healer.run(lifecycle))
                group.create_task(budgeter.run(lifecycle))
                group.create_task(Refresher(lambda: settings.config, clock).run(lifecycle))
                group.create_task(Snapshots(lambda: settings.config, clock).run(lifecycle))
            if memory is None:
                await _recall(coordinator, ledger, lifecycle)
            while not lifecycle.stop.is_set():
                replanned.clear()
                await _keep_plan(coordinator, ledger, clock)
                await lifecycle.pause(PLAN_KEPT_S, replanned)


async def _remember(ledger: Ledger, clock: Clock, lifecycle: Lifecycle) -> PlannersMemory | None:
    """What the ledger knows; None where it cannot be reached for MEMORY_WAIT_S, or where it is time to stop."""
    deadline_s = clock.monotonic_s() + MEMORY_WAIT_S
    while True:
        try:
            return await ledger.memory()
        except Transient as error:
            if clock.monotonic_s() > deadline_s:
                _log.error("planning_without_the_ledger", error=str(error))
                return None
            _log.warning("ledger_not_reachable", error=str(error))
            if await lifecycle.pause(error.retry_after_s):
                return None


async def _keep_plan(coordinator: Coordinator, ledger: Ledger, clock: Clock) -> None:
    """Weigh anew by what was learned, and keep the plan, so that the next life's moves little. Both may as well not be."""
    try:
        await coordinator.reweigh(await ledger.series(LATELY))
        await ledger.remember_plan(coordinator.slots, coordinator.weights, clock.now_s())
    except Transient as error:
        _log.warning("plan_not_remembered", error=str(error))


async def _recall(coordinator: Coordinator, ledger: Ledger, lifecycle: Lifecycle) -> None:
    """Until the ledger is there, or until told to stop."""
    while not await lifecycle.pause(RECALL_INTERVAL_S):
        try:
            if await coordinator.recall(ledger):
                _log.info("ledger_recalled")
                return
        except Transient as error:
            _log.warning("ledger_not_reachable", error=str(error))


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "coordinator",
        help="run the coordinator",
        description="Runs the coordinator: it packs targets into slots, writes what is due to the ledger, then to the exporters' queue. "
        "Two at once do no harm.",
    )
    add_worker_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    path = local.config_path(args.config)
    config = load(path, environ=os.environ)
    return run_worker(
        "coordinator",
        lambda lifecycle: serve(config, lifecycle, path),
        host=args.host,
        metrics_port=args.metrics_port,
    )
