"""What a backfill would do: which windows, out of which source, at which price. Pure.

Guarantees:

* *Nothing is paid for that is kept*: CloudWatch is asked for a window only where no look at it is complete and kept.
* *All looks of a window come from one source that has all of them*, or what lands would depend on which it was: Kafka where it holds every
  known look at the window, else the archive, which does.
* *Same question, same tasks*: their ids are made from what the backfill asks for, so that one that was stopped asks nobody twice.

* *As fine as it is kept*: CloudWatch is asked for each window at the finest period at which it still has it. A coarser one than the
  service's makes series of their own: the period is part of a series' identity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ingest.errors import Fatal
from ingest.model import Target, Task, TaskItem, TaskKind, Window, task_id_of
from ingest.replay import Scope
from ingest.schedule import Grid, blocks
from shard_config.model import retention_s
from shard_config.price import Prices

WINDOWS_MAX = 50_000_000
"""Of one plan: a byte each."""

DROPPED = "dropped by samples_retention_days: raise it, or land it --into another store"


class Means(StrEnum):
    """Where a window's data can be had, cheapest first."""

    THERE = "there"
    """It has landed: nothing is to be done."""
    KAFKA = "kafka"
    S3 = "s3"
    CLOUDWATCH = "cloudwatch"
    NOWHERE = "nowhere"


MEANS = tuple(Means)

_LANDED, _COMPLETE, _KEPT, _NOT_IN_KAFKA = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class KnownLook:
    """A look at one service that the ledger or the archive knows. `started_at_ms` is on the exporter's clock.

    `batches` and `points` were published. Where it left out what was published before, `seen` are all points that it saw, else None; `held`
    are the batches that are in the archive alone.
    """

    target: Target
    service: str
    start_s: int
    end_s: int
    started_at_ms: int
    complete: bool
    archived: bool
    batches: int
    points: int
    metrics_billed: int
    held: int = 0
    seen: int | None = None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Windows of one service of one target that lie together and take the same way.

    `points` are estimated from other windows of the service; None where none is known. `usd` is the most that it may cost. `period_s` is that
    at which CloudWatch is asked, 0 where it is not.
    """

    target: Target
    service: str
    means: Means
    start_s: int
    end_s: int
    windows: int
    points: int | None
    usd: Decimal | None
    detail: str = ""
    period_s: int = 0


@dataclass(slots=True)
class _Known:
    grid: Grid
    start_s: int
    flags: NDArray[np.uint8]
    points: int = 0
    points_windows: int = 0
    billed: int | None = None
    billed_at_ms: int = 0

    @property
    def starts_s(self) -> NDArray[np.int64]:
        return self.start_s + np.arange(len(self.flags)) * self.grid.poll_interval_s


@dataclass(slots=True)
class Survey:
    """What is known about the windows of a scope, gathered look by look.

    `kept_since_ms`: looks that started since, on the exporters' clock, are in Kafka; None where Kafka is not to be used.
    `dropped_before_s`: windows that begin before are those of days that the store has dropped, and would drop again.
    """

    scope: Scope
    kept_since_ms: int | None
    keeps_all: bool = False
    """Whether the source has recorded data, which no retention ends."""
    dropped_before_s: int = 0
    collected: int | None = None
    """Points of all looks that touch the scope; None where no look is known."""
    _known: dict[tuple[Target, str], _Known] = field(default_factory=dict)

    def expect(self, grids: Mapping[Target, Sequence[Grid]], now_s: int) -> None:
        """The windows that configuration and time say there are: those that have ended. Raises Fatal where they are too many."""
        total = 0
        for target, of_target in grids.items():
            for grid in of_target:
                if not self.scope.wants(target, grid.service, self.scope.from_s, self.scope.to_s):
                    continue
                start_s = grid.floor(self.scope.from_s)
                end_s = min(grid.ceil(self.scope.to_s), grid.floor(now_s))
                windows = max(0, (end_s - start_s) // grid.poll_interval_s)
                total += windows
                if total > WINDOWS_MAX:
                    raise Fatal("backfill", f"more than {WINDOWS_MAX:,} windows", "ask for a shorter time")
                if windows:
                    self._known[target, grid.service] = _Known(grid, start_s, np.zeros(windows, np.uint8))

    def landed(self, target: Target, service: str, start_s: int, end_s: int) -> None:
        """These windows are in the store."""
        if (known := self._known.get((target, service))) is not None:
            known.flags[_within(known, start_s, end_s)] |= _LANDED

    def look(self, look: KnownLook) -> None:
        """There was this look."""
        if not self.scope.wants(look.target, look.service, look.start_s, look.end_s):
            return
        self.collected = (self.collected or 0) + look.points
        known = self._known.get((look.target, look.service))
        if known is None:
            return
        at = _within(known, look.start_s, look.end_s)
        windows = -(-(look.end_s - look.start_s) // known.grid.poll_interval_s)
        if look.complete:
            known.flags[at] |= _COMPLETE
            known.points += look.points if look.seen is None else look.seen
            known.points_windows += windows
            self.price(look)
        if look.complete and not look.batches and look.seen is None:
            known.flags[at] |= _LANDED  # it was empty: there is nothing to land
        if (look.batches or look.held) and look.archived:
            known.flags[at] |= _KEPT
        if look.batches and look.archived and self._not_in_kafka(look.started_at_ms):
            known.flags[at] |= _NOT_IN_KAFKA
        if look.seen is not None and self._not_in_kafka(1000 * look.start_s):
            # What it left out was published since a window's end, by looks that the ledger may have forgotten.
            known.flags[at] |= _NOT_IN_KAFKA

    def _not_in_kafka(self, since_ms: int) -> bool:
        return self.kept_since_ms is None or since_ms < self.kept_since_ms

    def price(self, look: KnownLook) -> None:
        """What a complete look at a service was billed, wherever it looked: the newest says what the next will be."""
        known = self._known.get((look.target, look.service))
        if known is not None and look.metrics_billed and look.started_at_ms >= known.billed_at_ms:
            known.billed, known.billed_at_ms = look.metrics_billed, look.started_at_ms

    def unknown(self) -> dict[Target, Window]:
        """By target, the span of windows without a complete look: the archive may know of one."""
        spans: dict[Target, Window] = {}
        for (target, _), known in self._known.items():
            dropped = known.starts_s < self.dropped_before_s
            (found,) = np.nonzero((known.flags & (_COMPLETE | _LANDED) == 0) & ~dropped)
            if len(found):
                step = known.grid.poll_interval_s
                start_s, end_s = (
                    known.start_s + int(found[0]) * step,
                    known.start_s + (int(found[-1]) + 1) * step,
                )
                before = spans.get(target, Window(start_s, end_s))
                spans[target] = Window(min(before.start_s, start_s), max(before.end_s, end_s))
        return spans

    def plan(self, via: Means | None, now_s: int, prices: Prices) -> tuple[Stretch, ...]:
        """Stretches by target, service and time. `via` asks CloudWatch for every window; None takes the cheapest means for each."""
        stretches: list[Stretch] = []
        for (target, service), known in sorted(self._known.items(), key=lambda one: one[0]):
            periods_s = _periods_s(known, 0 if self.keeps_all else now_s)
            means = _means(known, via, periods_s)
            dropped = known.starts_s < self.dropped_before_s
            means[dropped] = MEANS.index(Means.NOWHERE)
            periods_s[means != MEANS.index(Means.CLOUDWATCH)] = 0
            changes = (np.diff(means) != 0) | (np.diff(periods_s) != 0) | np.diff(dropped)
            edges = [0, *(np.nonzero(changes)[0] + 1).tolist(), len(means)]
            for first, end in pairwise(edges):
                how, period_s = MEANS[int(means[first])], int(periods_s[first])
                if dropped[first]:
                    gone = _stretch(target, service, known, how, first, end, 0, prices)
                    stretches.append(replace(gone, detail=DROPPED))
                    continue
                if how is Means.NOWHERE and not known.grid.has_past:
                    continue  # nobody can help, and only the ledger knows whether it was ever planned
                stretches.append(_stretch(target, service, known, how, first, end, period_s, prices))
        return tuple(stretches)


def _within(known: _Known, start_s: int, end_s: int) -> slice:
    """The windows that [start_s, end_s) has whole, or touches."""
    step = known.grid.poll_interval_s
    first = max(0, (start_s - known.start_s) // step)
    return slice(first, max(first, -(-(end_s - known.start_s) // step)))


def _periods_s(known: _Known, now_s: int) -> NDArray[np.int32]:
    """By window, the finest period that the source keeps of it; 0: none."""
    periods_s = np.zeros(len(known.flags), np.int32)
    for period_s in reversed(known.grid.periods_s if known.grid.has_past else ()):
        periods_s[known.starts_s >= now_s - retention_s(period_s)] = period_s
    return periods_s


def _means(known: _Known, via: Means | None, periods_s: NDArray[np.int32]) -> NDArray[np.int8]:
    """By window, its index in MEANS."""
    flags = known.flags
    means = np.full(len(flags), MEANS.index(Means.NOWHERE), np.int8)
    means[periods_s > 0] = MEANS.index(Means.CLOUDWATCH)
    if via is Means.CLOUDWATCH:
        return means
    kept = flags & _KEPT != 0
    # Where only a look that failed in part is kept, and the source can be asked as finely, that brings more.
    kept &= (flags & _COMPLETE != 0) | (periods_s != known.grid.period_s)
    means[kept] = MEANS.index(Means.S3)
    means[kept & (flags & _NOT_IN_KAFKA == 0)] = MEANS.index(Means.KAFKA)
    means[flags & _LANDED != 0] = MEANS.index(Means.THERE)
    return means


def _stretch(
    target: Target,
    service: str,
    known: _Known,
    means: Means,
    first: int,
    end: int,
    period_s: int,
    prices: Prices,
) -> Stretch:
    grid = known.grid
    step = grid.poll_interval_s
    start_s, end_s = known.start_s + first * step, known.start_s + end * step
    usd: Decimal | None = Decimal(0)
    detail = ""
    points = _points(known, end - first) if means is not Means.NOWHERE else 0
    if means is Means.CLOUDWATCH:
        calls = len(_items(grid, start_s, end_s, period_s))
        usd = None if known.billed is None else prices.get_metric_data_usd(calls * known.billed, service)
        detail = f"at {period_s} s"
        if period_s != grid.period_s:
            detail += ", as series of their own: it no longer keeps a finer period"
            points = None if points is None else points * grid.period_s // period_s
    elif means is Means.NOWHERE:
        coarsest_s = grid.periods_s[-1]
        detail = f"CloudWatch keeps {coarsest_s} s for {retention_s(coarsest_s) // 86_400} days"
    return Stretch(target, service, means, start_s, end_s, end - first, points, usd, detail, period_s)


def _items(grid: Grid, start_s: int, end_s: int, period_s: int) -> list[TaskItem]:
    """[start_s, end_s) at a period, a call's worth each."""
    whole = grid.item(start_s, end_s, period_s)
    at = replace(grid, period_s=period_s)
    return [replace(item, period_s=whole.period_s) for item in blocks(at, whole.start_s, whole.end_s)]


def _points(known: _Known, windows: int) -> int | None:
    return known.points * windows // known.points_windows if known.points_windows else None


def windows_by_service(
    stretches: Iterable[Stretch], means: Means
) -> dict[tuple[Target, str], tuple[Window, ...]]:
    """The stretches of one means, as a scope takes them."""
    found: dict[tuple[Target, str], list[Window]] = defaultdict(list)
    for one in stretches:
        if one.means is means:
            found[one.target, one.service].append(Window(one.start_s, one.end_s))
    return {key: tuple(windows) for key, windows in found.items()}


def tasks_of(
    stretches: Iterable[Stretch],
    grids: Mapping[Target, Sequence[Grid]],
    config_revision: str,
    backfill_id: str,
    revision: int,
) -> list[Task]:
    """The tasks that ask CloudWatch for the stretches that only it has, oldest first: one a target and block's end.

    Their attempt is made from the backfill's id, in the upper half of 31 bits, where those of healing, which count from 1, never come.
    """
    attempt = int(backfill_id[:8], 16) & 0x3FFFFFFF | 0x40000000
    grid_of = {(target, grid.service): grid for target, some in grids.items() for grid in some}
    items: dict[tuple[int, Target], list[TaskItem]] = defaultdict(list)
    for one in stretches:
        if one.means is Means.CLOUDWATCH:
            grid = grid_of[one.target, one.service]
            for item in _items(grid, one.start_s, one.end_s, one.period_s):
                items[item.end_s, one.target].append(item)
    tasks = []
    for (end_s, target), some in sorted(items.items()):
        ordered = tuple(sorted(some, key=lambda i: i.service))
        task_id = task_id_of(target, config_revision, attempt, ordered, revision)
        tasks.append(
            Task(
                task_id, target, config_revision, end_s, attempt, TaskKind.BACKLOG.value, 0, ordered, revision
            )
        )
    return tasks


def reach_s(grids: Iterable[Grid]) -> int:
    """A task that looked at a window has its tick at most so long after the window's start."""
    longest = [
        max(g.block_s, 2 * g.poll_interval_s + g.lookback_s) + g.poll_interval_s for g in grids if g.has_past
    ]
    return max(longest, default=0) + 86_400
