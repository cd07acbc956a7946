"""Which windows are due: configuration × time → tasks. Pure.

Guarantees, each with a test of its name:

* *Every window is planned*: over any sequence of calls, each window that closed since the first start is in a task.
* *Same question, same task*: a task's id is made from what it asks for, so two coordinators, or one that forgot, write the same
  ids. An overdue stretch is cut at fixed, epoch-aligned blocks for that reason.
* *Settled before left*: a live task looks back far enough that each window is looked at once more after it has settled.
* *An outage is not paid for tick by tick*: overdue windows coalesce into blocks of at most `BLOCK_POINTS_MAX` points a
  series, one call's worth, newest first; live tasks come before them. A short one is a part of the live look, for points are not billed.
* *A clock that steps costs no window*: once it is right again, every window is looked at after it has settled by real time, those too that were planned,
  or found overdue, while it was ahead; and what was planned is not planned again by one that was behind. See `Progress`.
* *A stretched poll covers whole windows of the same grid*: each k-th tick looks at all windows since the last one, so that the same points come, later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ingest.model import SourceName, Target, Task, TaskItem, TaskKind, task_id_of
from shard_config.model import Config, ServiceProfile, retention_s
from shard_config.units import Places

BLOCK_POINTS_MAX = 201
"""500 series of 201 points are within GetMetricData's 100,800 datapoints a call."""

KEPT_PERIODS_S = (60, 300, 3600)
"""CloudWatch gathers older points up to these: see `shard_config.model.RETENTION_S`."""

NO_STRETCH: Mapping[str, int] = {}

STEP_S = 2.0
"""A clock that moved by so much more, or less, than time went by has stepped."""
LEAPS_MAX = 8
"""Leaps ahead that are remembered one by one, of those not taken back; more are one with the oldest."""
LEAP_KEPT_S = 86_400
"""What was planned by a clock that was ahead for longer is left to healing: a step back plans a day again at most."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How one service of one target is polled.

    CloudWatch's windows are looked at when they have ended. An exposition endpoint has no past (`has_past` is False): its
    window is looked at while it lasts, its samples carry the window's start, and afterwards it has expired.
    """

    service: str
    poll_interval_s: int
    period_s: int
    settling_s: int
    has_past: bool = True

    @property
    def lookback_s(self) -> int:
        """The settling time, rounded up to whole windows."""
        return -(-self.settling_s // self.poll_interval_s) * self.poll_interval_s

    @property
    def block_s(self) -> int:
        """Length of a coalesced block: whole windows, at most BLOCK_POINTS_MAX points a series (one window at least)."""
        windows = BLOCK_POINTS_MAX * self.period_s // self.poll_interval_s
        return max(1, windows) * self.poll_interval_s

    @property
    def periods_s(self) -> tuple[int, ...]:
        """At which it can be asked, the finest first: its own, and multiples that CloudWatch gathers older points up to.

        A window is whole periods, or a period whole windows: only then do points belong to windows.
        """
        length_s = self.poll_interval_s
        coarser = [p for p in KEPT_PERIODS_S if p > self.period_s and p % self.period_s == 0]
        return (self.period_s, *(p for p in coarser if length_s % p == 0 or p % length_s == 0))

    def kept_period_s(self, start_s: int, now_s: int) -> int | None:
        """The finest period at which CloudWatch still keeps what begins then; None where there is none."""
        return next((p for p in self.periods_s if start_s >= now_s - retention_s(p)), None)

    def item(self, start_s: int, end_s: int, period_s: int) -> TaskItem:
        """What asks for [start_s, end_s) at a period, widened to whole ones."""
        whole_s = max(period_s, self.poll_interval_s)
        coarser_s = period_s if period_s != self.period_s else 0
        return TaskItem(
            self.service,
            start_s // whole_s * whole_s,
            -(-end_s // whole_s) * whole_s,
            self.poll_interval_s,
            coarser_s,
        )

    def floor(self, time_s: int) -> int:
        return time_s // self.poll_interval_s * self.poll_interval_s

    def ceil(self, time_s: int) -> int:
        return -(-time_s // self.poll_interval_s) * self.poll_interval_s

    def newest_s(self, now_s: int) -> int:
        """The end of the newest window that can be planned."""
        return self.floor(now_s) + (0 if self.has_past else self.poll_interval_s)


def grid_of(profile: ServiceProfile) -> Grid:
    """How a service of AWS's is polled."""
    return Grid(profile.service, profile.poll_interval_s, profile.period_s, profile.settling_s)


def grids_of(config: Config) -> dict[Target, tuple[Grid, ...]]:
    """Every target of a configuration with the grids of its services, both sorted."""
    found: dict[Target, list[Grid]] = defaultdict(list)
    for account in config.accounts:
        for region in account.regions:
            target = Target(SourceName.CLOUDWATCH.value, account.id, region)
            for p in config.services_in(account, region):
                found[target].append(grid_of(p))
    for job in config.exposition:
        target = Target(SourceName.EXPOSITION.value, job.account, job.region)
        found[target].append(Grid(job.name, job.interval_s, job.interval_s, 0, has_past=False))
    return {t: tuple(sorted(found[t], key=lambda g: g.service)) for t in sorted(found)}


@dataclass(frozen=True, slots=True)
class Leap:
    """The clock leapt ahead by `by_s` to `to_s`; before that, windows were planned until `until_s`, by service."""

    by_s: float
    to_s: int
    until_s: Mapping[str, int]


class Progress:
    """How far the windows of one target are planned, by the clock of one process, which may step. Not for two at once.

    `until_s` has, by service, the end of the newest window that is planned: what `due` is given. Whoever plans moves it on, and calls `go_on_from`
    before. Only a step of STEP_S or more is one: the rest is rounding, and what NTP does to a clock that is right.

    * A step back that takes back a leap: what was planned since was looked at before it had ended or settled, so all of it is planned again.
    * One that takes back more than ever leapt: the clock is behind now. Plans go on from now, tick by tick; when it leaps past
      what was planned before, that was looked at when it was due, and is not asked for again.
    * At the start nothing is known of steps before. Where the clock steps back to before the start, it was ahead then, and plans go on from the memory;
      where the memory itself is ahead, the newest block is looked at again: one call's worth, so no dearer than a poll. What that does not reach, and what
      a clock planned that was ahead since the start for longer than it was ahead by, is left to healing.
    """

    def __init__(self, until_s: Mapping[str, int]) -> None:
        self.until_s = dict(until_s)
        self._begun: Leap | None = None
        """The first call: it may have been a clock that was ahead."""
        self._leaps: list[Leap] = []
        """Of those not taken back yet, the oldest first."""
        self._behind_s = 0.0
        self._planned_s: dict[str, int] = {}
        """While the clock is behind: until when windows were planned, and looked at when they were due."""

    def go_on_from(self, grids: Sequence[Grid], now_s: int, stepped_s: float) -> None:
        """Have plans go on from `now_s`. `stepped_s`: by how much the clock moved more, or less, than time went by since the last call."""
        if self._begun is None:
            self._begin(grids, now_s)
        elif stepped_s >= STEP_S:
            self._leap(now_s, stepped_s)
        elif stepped_s <= -STEP_S:
            self._step_back(grids, now_s, -stepped_s, self._begun)
        self._leaps = [leap for leap in self._leaps if now_s - leap.to_s < LEAP_KEPT_S]
        self._planned_s = {
            service: until_s for service, until_s in self._planned_s.items() if until_s > now_s
        }
        if not self._planned_s:
            self._behind_s = 0.0  # it has caught up, or what is called behind was right

    def _begin(self, grids: Sequence[Grid], now_s: int) -> None:
        for grid in grids:
            self._cut(grid, _right_until_s(grid, self.until_s.get(grid.service), now_s))
        self._begun = Leap(0.0, now_s, dict(self.until_s))

    def _leap(self, now_s: int, by_s: float) -> None:
        before = dict(self.until_s)
        made_up_s = min(by_s, self._behind_s)
        self._behind_s -= made_up_s
        if by_s - made_up_s >= STEP_S:
            self._leaps.append(Leap(by_s - made_up_s, now_s, before))
            if len(self._leaps) > LEAPS_MAX:
                first, second, *others = self._leaps
                self._leaps = [replace(second, by_s=first.by_s + second.by_s, until_s=first.until_s), *others]
        for service, planned_s in self._planned_s.items():
            if planned_s <= now_s:
                self.until_s[service] = max(self.until_s.get(service, 0), planned_s)

    def _step_back(self, grids: Sequence[Grid], now_s: int, by_s: float, begun: Leap) -> None:
        since: Leap | None = None
        while self._leaps and by_s >= STEP_S:
            since = self._leaps.pop()
            if since.by_s - by_s >= STEP_S:
                self._leaps.append(replace(since, by_s=since.by_s - by_s))
            by_s -= since.by_s
        if by_s >= STEP_S and now_s < begun.to_s:
            since, by_s = begun, 0.0
        behind = by_s >= STEP_S
        self._behind_s += by_s if behind else 0.0
        for grid in grids:
            service, newest_s = grid.service, grid.newest_s(now_s)
            if since is not None and grid.has_past:
                # What had no plan then has a first start now.
                until_s = since.until_s.get(service)
                self._cut(grid, until_s if behind else _right_until_s(grid, until_s, now_s))
            if behind and self.until_s.get(service, 0) > newest_s:
                self._planned_s[service] = max(self.until_s[service], self._planned_s.get(service, 0))
            self._cut(grid, newest_s)

    def _cut(self, grid: Grid, at_s: int | None) -> None:
        """Nothing is planned past `at_s`; None: nothing at all."""
        if at_s is None:
            self.until_s.pop(grid.service, None)
        elif grid.service in self.until_s:
            self.until_s[grid.service] = min(self.until_s[grid.service], at_s)


def _right_until_s(grid: Grid, until_s: int | None, now_s: int) -> int | None:
    """Until when it may be taken for planned by a clock that was right, where windows are planned until `until_s`."""
    if until_s is None or until_s < now_s + STEP_S:
        return until_s
    return grid.newest_s(now_s) - (max(0, grid.block_s - grid.lookback_s) if grid.has_past else 0)


def due(
    target: Target,
    grids: Sequence[Grid],
    planned_until_s: Mapping[str, int],
    now_s: int,
    config_revision: str,
    startup_lookback_s: int,
    stretch: Mapping[str, int] = NO_STRETCH,
    stretch_max: int = 1,
) -> list[Task]:
    """The tasks that a target owes at `now_s`: the live one first, then overdue blocks, newest first.

    `planned_until_s` has, by service, the end of the newest window that is planned already; a service that is missing is planned for
    the first time, `startup_lookback_s` back. `stretch` has, by service, how many poll intervals are one, where that is not 1;
    `stretch_max` how many they may have been at the last poll: so many are one look, even where they are more than a call's worth.
    """
    live: list[TaskItem] = []
    others: dict[tuple[TaskKind, int, int], list[TaskItem]] = defaultdict(list)
    for grid in grids:
        until_s = planned_until_s.get(grid.service)
        if grid.has_past:
            k = stretch.get(grid.service, 1)
            here, overdue = _due_with_past(grid, until_s, now_s, startup_lookback_s, k, max(k, stretch_max))
            live += here
            for item in overdue:
                others[(TaskKind.BACKLOG, item.end_s, 0)].append(item)
        else:
            for item in _due_without_past(grid, until_s, now_s):
                kind = TaskKind.LIVE if item.end_s > now_s else TaskKind.BACKLOG
                others[(kind, item.end_s, item.end_s)].append(item)
    tasks = [_task(target, config_revision, TaskKind.LIVE, live, 0)] if live else []
    by_urgency = sorted(others, key=lambda k: (k[0] is TaskKind.BACKLOG, -k[1], k[2]))
    return tasks + [_task(target, config_revision, k[0], others[k], k[2]) for k in by_urgency]


def horizon(
    target: Target, grids: Sequence[Grid], from_s: int, to_s: int, config_revision: str
) -> list[Task]:
    """Tasks that look once at every window that touches [from_s, to_s), oldest first. All grids must have a past."""
    by_end: dict[int, list[TaskItem]] = defaultdict(list)
    for grid in grids:
        for item in blocks(grid, grid.floor(from_s), grid.ceil(to_s)):
            by_end[item.end_s].append(item)
    return [_task(target, config_revision, TaskKind.BACKLOG, by_end[end], 0) for end in sorted(by_end)]


def divide(task: Task, places: Places) -> list[Task]:
    """A task of a target whose services are in several slots, as one for each slot; any other as it is."""
    target = str(task.target)
    if not places.is_split(target):
        return [task]
    by_slot: dict[int | None, list[TaskItem]] = defaultdict(list)
    for item in task.items:
        by_slot[places.of(target, item.service)].append(item)
    if len(by_slot) == 1:
        return [task]
    return [task.part(items) for items in by_slot.values()]


def blocks(grid: Grid, from_s: int, to_s: int) -> list[TaskItem]:
    """[from_s, to_s) cut at the multiples of the grid's block length, newest first. Both must be on the grid."""
    items: list[TaskItem] = []
    end = to_s
    while end > from_s:
        start = max(from_s, (end - 1) // grid.block_s * grid.block_s)
        items.append(TaskItem(grid.service, start, end, grid.poll_interval_s))
        end = start
    return items


def _due_with_past(
    grid: Grid,
    planned_until_s: int | None,
    now_s: int,
    startup_lookback_s: int,
    stretch: int,
    stretch_max: int,
) -> tuple[list[TaskItem], list[TaskItem]]:
    """The live item, and overdue blocks before it."""
    poll_s = grid.poll_interval_s * stretch
    tick = now_s // poll_s * poll_s
    if planned_until_s is not None and planned_until_s >= tick:
        return [], []
    live_from = tick - poll_s - grid.lookback_s
    if planned_until_s is None:
        resume_s = grid.floor(now_s - startup_lookback_s)
    else:
        # What was planned last has not been looked at since it settled.
        resume_s = grid.floor(planned_until_s) - grid.lookback_s
        longest_s = max(grid.block_s, grid.poll_interval_s * stretch_max + grid.lookback_s)
        if resume_s >= tick - longest_s:
            # All since the last poll, however that was stretched, is one look.
            live_from = resume_s
    live = TaskItem(grid.service, live_from, tick, grid.poll_interval_s)
    return [live], blocks(grid, min(resume_s, live_from), live_from)


def _due_without_past(grid: Grid, planned_until_s: int | None, now_s: int) -> list[TaskItem]:
    """The window that lasts now, then those that were missed: planned all the same, for they must show as expired."""
    start = grid.floor(now_s)
    end = start + grid.poll_interval_s
    if planned_until_s is None:
        planned_until_s = start
    if planned_until_s >= end:
        return []
    now = TaskItem(grid.service, start, end, grid.poll_interval_s)
    return [now, *blocks(grid, grid.floor(planned_until_s), start)] if planned_until_s < start else [now]


def _task(
    target: Target, config_revision: str, kind: TaskKind, items: list[TaskItem], expires_s: int
) -> Task:
    ordered = tuple(sorted(items, key=lambda i: i.service))
    return Task(
        task_id=task_id_of(target, config_revision, 0, ordered),
        target=target,
        config_revision=config_revision,
        tick_s=max(i.end_s for i in ordered),
        attempt=0,
        kind=kind.value,
        expires_s=expires_s,
        items=ordered,
    )
