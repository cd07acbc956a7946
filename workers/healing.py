"""The coordinator's healing loop: looks for gaps each minute, and hands the coordinator the tasks that close them.

* One coordinator at a time: whoever gets PostgreSQL's advisory lock. While PostgreSQL is away, healing waits, and planning goes on.
* A window that is given up is said once and loudly: an error in the log, `headgate_windows_declared_total`, and its row.
* What is paused is read each second; while PostgreSQL is away, what was paused last stays so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Protocol

import structlog
from prometheus_client import Counter, Gauge

from ingest.clock import Clock, rfc3339
from ingest.errors import HeadgateError, Transient
from ingest.heal import Announced, Declaration, OpenWindow, Reason, Rules, Wait
from ingest.heal_store import Healed, HealStore
from ingest.model import Target, Task
from ingest.pauses import Pauses
from ingest.schedule import grids_of
from shard_config.model import Config
from shard_config.price import Prices
from workers.lifecycle import Lifecycle

_log = structlog.get_logger()

HEAL_INTERVAL_S = 60
PAUSES_INTERVAL_S = 1.0
PAUSES_RETRY_S = 10.0
ANNOUNCED_KEPT_S = 86_400
"""A task that was not announced again for so long is forgotten."""

HEALS = Counter(
    "headgate_heals_total",
    "Tasks put on `collect` to close gaps; replay and again cost nothing, source is paid for.",
    ["means"],
)
RESERVED = Gauge(
    "headgate_heal_dollars_reserved",
    "Dollars of this UTC day that healing has spent or reserved; at heal.usd_per_day gaps wait for tomorrow.",
)
DECLARED = Counter(
    "headgate_windows_declared_total",
    "Windows that were closed without data. Each is lost: see the log's windows_declared for which and why.",
    ["reason"],
)
WAITING = Gauge(
    "headgate_heal_windows_waiting", "Windows past their deadline about which nothing is done now.", ["why"]
)


class Means(StrEnum):
    """How a gap is closed, the cheapest first."""

    REPLAY = "replay"
    AGAIN = "again"
    SOURCE = "source"


class Planner(Protocol):
    """What healing needs of the coordinator."""

    pauses: Pauses

    @property
    def behind(self) -> bool: ...

    def take_over(self, tasks: Iterable[Task]) -> None: ...


class Healer:
    """Heals for one coordinator."""

    def __init__(self, config: Config, coordinator: Planner, store: HealStore, clock: Clock) -> None:
        self.configure(config)
        self._coordinator = coordinator
        self._store = store
        self._clock = clock
        self._announced: dict[str, Announced] = {}
        for reason in Reason:
            DECLARED.labels(reason=reason)  # an alert on its increase needs it to be there before

    def configure(self, config: Config, *, whole: bool = True) -> None:
        """Heal by this configuration from the next pass on. `whole`: all accounts are known, an organization's too."""
        self._rules = rules_of(config, whole=whole)

    async def step(self) -> bool:
        """One pass; False where it was not this coordinator's. Raises Transient."""
        if self._coordinator.behind:
            return False  # Kafka is away: what was decided before is not announced yet
        now_s = self._clock.now_s()
        healed = await self._store.heal(now_s, self._rules, self._announced)
        if healed is None:
            return False
        decision = healed.decision
        self._remember((*decision.replays, *decision.again), now_s)
        self._coordinator.take_over([*decision.replays, *decision.again, *healed.asked])
        self._report(healed)
        return True

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop."""
        while not await lifecycle.pause(min(HEAL_INTERVAL_S, self._rules.heal.backoff_s)):
            try:
                await self.step()
            except Transient as error:
                _log.warning("healing_waits", error=str(error))
            except HeadgateError as error:
                # A store that will not have us, or a task that we cannot read, must not stop the planning.
                _log.error("healing_failed", error=str(error))

    def _remember(self, tasks: Iterable[Task], now_s: int) -> None:
        kept = {i: a for i, a in self._announced.items() if now_s - a.last_s < ANNOUNCED_KEPT_S}
        for task in tasks:
            before = kept.get(task.task_id)
            kept[task.task_id] = Announced(before.times + 1 if before else 1, now_s)
        self._announced = kept

    def _report(self, healed: Healed) -> None:
        decision = healed.decision
        done = {Means.REPLAY: decision.replays, Means.AGAIN: decision.again, Means.SOURCE: healed.asked}
        for means, tasks in done.items():
            HEALS.labels(means=means).inc(len(tasks))
        RESERVED.set(float(healed.dollars))
        for why in Wait:
            WAITING.labels(why=why).set(decision.waiting.get(why, 0))
        for one in stretches(healed.declared):
            DECLARED.labels(reason=one.reason).inc(one.windows)
            _log.error(
                "windows_declared",
                reason=one.reason.value,
                target=str(one.target),
                service=one.service,
                start=rfc3339(one.start_s),
                end=rfc3339(one.end_s),
                windows=one.windows,
                last_status=one.last_status,
                last_detail=one.last_detail,
            )
        counts = {means.value: len(tasks) for means, tasks in done.items() if tasks}
        if counts:
            _log.info("gaps_being_healed", dollars_today=float(healed.dollars), **counts)
        if short := decision.waiting.get(Wait.BUDGET):
            _log.warning("healing_waits_for_money", windows=short, usd_per_day=self._rules.heal.usd_per_day)


async def keep_pauses(coordinator: Planner, store: HealStore, lifecycle: Lifecycle) -> None:
    """Tell the coordinator what is paused, until told to stop."""
    known = True
    while not await lifecycle.pause(PAUSES_INTERVAL_S if known else PAUSES_RETRY_S):
        known = await read_pauses(coordinator, store)


async def read_pauses(coordinator: Planner, store: HealStore) -> bool:
    """Tell the coordinator what is paused now. False where the store does not say: what was paused last stays so."""
    try:
        coordinator.pauses = await store.pauses()
    except HeadgateError as error:
        _log.warning("pauses_as_last_known", error=str(error))
        return False
    return True


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring windows of one target and service that were declared for one reason."""

    target: Target
    service: str
    reason: Reason
    start_s: int
    end_s: int
    windows: int
    last_status: str
    last_detail: str


def stretches(declared: Iterable[Declaration]) -> list[Stretch]:
    """Declarations by stretch, so that a day's outage is one line and not 288."""
    by_story: dict[tuple[Target, str, Reason], list[OpenWindow]] = defaultdict(list)
    for one in declared:
        by_story[one.window.target, one.window.service, one.reason].append(one.window)
    found: list[Stretch] = []
    for (target, service, reason), windows in sorted(by_story.items()):
        ordered = sorted(windows, key=lambda w: w.window)
        cuts = [i for i, (a, b) in enumerate(pairwise(ordered), 1) if a.window.end_s != b.window.start_s]
        for at, to in pairwise([0, *cuts, len(ordered)]):
            first, last = ordered[at].window, ordered[to - 1]
            found.append(
                Stretch(
                    target, service, reason, first.start_s, last.window.end_s, to - at,
                    last.last_status, last.last_detail,
                )
            )  # fmt: skip
    return found


def rules_of(config: Config, *, whole: bool = True) -> Rules:
    """What a configuration says about healing."""
    return Rules(
        heal=config.heal,
        prices=Prices.of(config.aws, config.services),
        revision=config.revision,
        grids=grids_of(config),
        task_deadline_s=config.task_deadline_s,
        source_keeps_all=config.run.source_keeps_all,
        whole=whole,
    )
