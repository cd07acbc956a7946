"""Which gaps are healed, in which order, by which means, at which price. Pure: a situation in, a decision out.

A window is looked at here when it is past its deadline and neither sealed nor declared; one that does not balance is replayed before that, too.
Guarantees, each with a test of its name:

* *The cheapest means first*: what is archived is replayed, a task that has no receipt is announced again, and the source is asked only for what
  is neither; of what the source is asked, the cheapest first, and of equals the newest.
* *Nothing is asked on stale knowledge*: the source is asked, and a window declared, only where a receipt of its target has come in
  since the deadline. Receipts of a target keep their order, so all earlier ones are known then.
* *Bounded*: in attempts a window, in dollars a day, in tasks at once; between attempts at a block the time doubles, up to an hour.
* *It ends*: sealed, or declared: unrecoverable where the source keeps it no longer at any period, forbidden or abandoned where the attempts are used up,
  removed where the configuration has not known it for a day past its deadline.
* *What is paused is left alone*.

An attempt asks for what lies in one epoch-aligned block of at most 201 points a series, which is one call's worth: so an outage is paid for by the
block, not by the poll.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import StrEnum

from ingest.model import LookStatus, Target, Task, TaskKind, Window, task_id_of
from ingest.pauses import Pauses
from ingest.schedule import Grid
from ingest.spans import Spans
from shard_config.model import Heal
from shard_config.price import Prices

REPLAYS_MAX = 3
"""Of one task; what landing passed over so often cannot land, and counts as not archived."""
RELANDING_S = 900
"""A look whose rows were not in the store is replayed once, and has so long to land and to be read back (each ten minutes)."""
ANNOUNCED_MAX = 200
"""Replays, and tasks announced again, in one decision."""
ASKED_MAX = 50
"""Attempts without a receipt at any time."""
REMOVED_S = 86_400
"""What is no longer configured is left alone so long past its deadline: it may have been a mistake."""
PATIENCE_S = 86_400
"""So long past what the source keeps a task without a receipt is still waited for."""
DOUBLINGS_MAX = 7
"""Back-offs grow to 128 times the first."""
REST_S_MAX = 3600
"""Between two attempts at a block, where the first back-off is not longer: what is mended is healed within the hour."""
UNKNOWN_SERIES = 1000
"""Of a service that never answered."""


class Reason(StrEnum):
    """How a window is closed without data."""

    FORBIDDEN = "forbidden"
    EXPIRED = "expired"
    ABANDONED = "abandoned"
    UNRECOVERABLE = "unrecoverable"
    REMOVED = "removed"
    """Its account, region or service is no longer configured."""


class Wait(StrEnum):
    """Why nothing is done about a window now."""

    PAUSED = "paused"
    UNKNOWN = "not configured"
    SEALING = "sealing"
    LANDING = "landing"
    ANSWER = "answer"
    NEWS = "news"
    BACKOFF = "backoff"
    BUDGET = "budget"
    TURN = "turn"


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """A window past its deadline, or one that does not balance. `landed_s` is the time of the newest complete look that has landed, 0 without.

    Where it is not `overdue`, only what costs nothing is done about it: a look that left out what was published before is published whole.
    """

    target: Target
    service: str
    window: Window
    settles_s: int
    landed_s: int = 0
    unbalanced: bool = False
    last_status: str = ""
    last_detail: str = ""
    overdue: bool = True


@dataclass(frozen=True, slots=True)
class Attempt:
    """The source was, or is to be, asked again for [start_s, end_s), which lies in a block."""

    target: Target
    service: str
    block_start_s: int
    start_s: int
    end_s: int
    attempt: int
    allocated_s: int


@dataclass(frozen=True, slots=True)
class Pending:
    """A task that has no receipt; `since_s` is when it was planned."""

    task: Task
    since_s: int


@dataclass(frozen=True, slots=True)
class Unlanded:
    """A look that is archived and has not landed. `passed`: what was published after it, under the same key, has.

    Or one that has landed, and whose rows are not in the store as it says (`look_id` is not 0): landed entries have to go before
    it is replayed, or the store would know its batches and pass them over.
    """

    task: Task
    service: str
    start_s: int
    end_s: int
    passed: bool
    look_id: int = 0


@dataclass(frozen=True, slots=True)
class Announced:
    """How often a task was announced again or replayed by this process, and when last."""

    times: int
    last_s: int


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known, in one snapshot. Pairs are (target, service)."""

    now_s: int
    windows: Sequence[OpenWindow]
    attempts: Sequence[Attempt] = ()
    pending: Sequence[Pending] = ()
    unlanded: Sequence[Unlanded] = ()
    announced: Mapping[str, Announced] = field(default_factory=dict)
    heard_s: Mapping[Target, int] = field(default_factory=dict)
    """By target, when its newest known receipt was finished."""
    series: Mapping[tuple[Target, str], int] = field(default_factory=dict)
    """Asked about at the last look that knew."""
    spent_usd: Decimal = Decimal(0)
    """Billed or reserved by attempts of this UTC day."""
    pending_asks: int = 0
    """Attempts without a receipt."""
    pauses: Pauses = field(default_factory=Pauses)
    stopped: frozenset[tuple[str, str]] = frozenset()
    """Accounts and services that nobody is asked about today, for want of money."""


@dataclass(frozen=True, slots=True)
class Ask:
    """An attempt to be allocated: its task, its block, and the dollars that are reserved for it."""

    task: Task
    block_start_s: int
    usd: Decimal


@dataclass(frozen=True, slots=True)
class Declaration:
    window: OpenWindow
    reason: Reason


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done now. `replays` and `again` are tasks for `collect` alone; `waiting` counts windows."""

    replays: tuple[Task, ...]
    again: tuple[Task, ...]
    asks: tuple[Ask, ...]
    declared: tuple[Declaration, ...]
    waiting: Mapping[Wait, int]
    relanded: tuple[int, ...] = ()
    """Ids of replayed looks whose landed entries have to go."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a configuration says about healing."""

    heal: Heal
    prices: Prices
    revision: str
    grids: Mapping[Target, Sequence[Grid]]
    task_deadline_s: int
    source_keeps_all: bool = False
    whole: bool = True
    """All accounts are known. Else what is not in `grids` may be an organization's that is not listed yet."""

    @property
    def block_s_max(self) -> int:
        """The longest block of all."""
        return max((g.block_s for grids in self.grids.values() for g in grids), default=0)


def decide(situation: Situation, rules: Rules) -> Decision:
    """What to do about each window."""
    judge = _Judge(situation, rules)
    wanted = [w for w in situation.windows if judge.verdict(w)]
    return Decision(
        replays=tuple(replace(t, kind=TaskKind.REPLAY.value) for t in judge.replays.values()),
        again=tuple(replace(t, kind=TaskKind.AGAIN.value) for t in judge.again.values()),
        asks=tuple(judge.asks(wanted)),
        declared=tuple(judge.declared),
        waiting=judge.waiting,
        relanded=tuple(judge.relanded),
    )


class _Judge:
    """One decision in the making."""

    def __init__(self, situation: Situation, rules: Rules) -> None:
        self._now_s = situation.now_s
        self._s = situation
        self._rules = rules
        self._grids = {(t, g.service): g for t, grids in rules.grids.items() for g in grids}
        block_s = {pair: grid.block_s for pair, grid in self._grids.items()}
        self._attempts: Spans[Attempt] = Spans(block_s)
        self._pending: Spans[Pending] = Spans(block_s)
        self._unlanded: Spans[Unlanded] = Spans(block_s)
        self._of_block: dict[tuple[Target, str, int], list[Attempt]] = defaultdict(list)
        """By target, service and start of a block."""
        for a in situation.attempts:
            self._attempts.add(a.target, a.service, a.start_s, a.end_s, a)
            self._of_block[a.target, a.service, a.block_start_s].append(a)
        for p in situation.pending:
            for i in p.task.items:
                self._pending.add(p.task.target, i.service, i.start_s, i.end_s, p)
        for u in situation.unlanded:
            self._unlanded.add(u.task.target, u.service, u.start_s, u.end_s, u)
        self.replays: dict[str, Task] = {}
        self.relanded: list[int] = []
        self.again: dict[str, Task] = {}
        self.declared: list[Declaration] = []
        self.waiting: Counter[Wait] = Counter()

    def verdict(self, w: OpenWindow) -> bool:
        """True where the source is to be asked; else what is done instead is noted."""
        grid = self._grids.get((w.target, w.service))
        if grid is None:
            return self._not_configured(w)
        if self._s.pauses.cover(w.target.account, w.service):
            return self._wait(Wait.PAUSED)
        if w.landed_s >= w.settles_s and not w.unbalanced:
            return self._wait(Wait.SEALING)
        if (look := self._landable(w)) is not None:
            return self._replay(look)
        if not w.overdue:
            return self._wait(Wait.SEALING)
        gone = self._gone(w, grid)
        pending = self._pending.covering(w)
        if pending and not (gone and all(self._now_s - p.since_s > PATIENCE_S for p in pending)):
            return self._announce_again(pending)
        if self._s.heard_s.get(w.target, 0) <= w.settles_s + w.window.end_s - w.window.start_s:
            return self._wait(Wait.NEWS)
        if gone:
            return self._declare(w, Reason.UNRECOVERABLE)
        return self._may_ask(w)

    def _not_configured(self, w: OpenWindow) -> bool:
        deadline_s = w.settles_s + w.window.end_s - w.window.start_s
        if self._rules.whole and self._now_s > deadline_s + REMOVED_S:
            return self._declare(w, Reason.REMOVED)
        return self._wait(Wait.UNKNOWN)

    def _landable(self, w: OpenWindow) -> Unlanded | None:
        """The first look at the window that may yet land: it is on its way, or can be replayed."""
        for look in self._unlanded.covering(w):
            if look.look_id and not w.unbalanced:
                continue
            before = self._s.announced.get(look.task.task_id, Announced(0, 0))
            # One replayed by a clock that was ahead is not over: it is replayed once more, which costs nothing.
            over = self._now_s >= before.last_s + RELANDING_S if look.look_id else look.passed
            if before.times < (1 if look.look_id else REPLAYS_MAX) or not over:
                return look
        return None

    def _replay(self, look: Unlanded) -> bool:
        before = self._s.announced.get(look.task.task_id, Announced(0, 0))
        rest_s = RELANDING_S if look.look_id else self._rules.heal.backoff_s << max(0, before.times - 1)
        if not look.passed or (before.times and not self._rested(before.last_s, rest_s)):
            return self._wait(Wait.LANDING)
        if len(self.replays) >= ANNOUNCED_MAX and look.task.task_id not in self.replays:
            return self._wait(Wait.TURN)
        if look.look_id and look.look_id not in self.relanded:
            self.relanded.append(look.look_id)
        self.replays[look.task.task_id] = look.task
        return False

    def _announce_again(self, pending: Sequence[Pending]) -> bool:
        """The newest task is enough: it covers the window, as the others do."""
        newest = max(pending, key=lambda p: (p.since_s, p.task.task_id))
        before = self._s.announced.get(newest.task.task_id, Announced(0, newest.since_s))
        rest_s = self._rules.task_deadline_s + (
            self._rules.heal.backoff_s << min(before.times, DOUBLINGS_MAX)
        )
        if not self._rested(before.last_s, rest_s):
            return self._wait(Wait.ANSWER)
        if len(self.again) >= ANNOUNCED_MAX and newest.task.task_id not in self.again:
            return self._wait(Wait.TURN)
        self.again[newest.task.task_id] = newest.task
        return False

    def _gone(self, w: OpenWindow, grid: Grid) -> bool:
        """Whether the source keeps it no longer, not even at a coarser period."""
        return not grid.has_past or self._period_s(grid, w.window) is None

    def _period_s(self, grid: Grid, window: Window) -> int | None:
        if self._rules.source_keeps_all:
            return grid.period_s
        grid = replace(grid, poll_interval_s=window.end_s - window.start_s)
        return grid.kept_period_s(window.start_s, self._now_s)

    def _may_ask(self, w: OpenWindow) -> bool:
        if (w.target.account, w.service) in self._s.stopped:
            return self._wait(Wait.BUDGET)
        if len(self._attempts.covering(w)) >= self._rules.heal.attempts_max:
            forbidden = w.last_status == LookStatus.FORBIDDEN
            return self._declare(w, Reason.FORBIDDEN if forbidden else Reason.ABANDONED)
        return True

    def _wait(self, why: Wait) -> bool:
        self.waiting[why] += 1
        return False

    def _declare(self, w: OpenWindow, reason: Reason) -> bool:
        self.declared.append(Declaration(w, reason))
        return False

    def asks(self, wanted: Iterable[OpenWindow]) -> list[Ask]:
        """One a block that has rested, the cheapest first, as far as money and turns go."""
        blocks: dict[tuple[Target, str, int, int], list[Window]] = defaultdict(list)
        for w in wanted:
            length_s = w.window.end_s - w.window.start_s
            grid = replace(self._grids[w.target, w.service], poll_interval_s=length_s)
            start_s = w.window.start_s // grid.block_s * grid.block_s
            blocks[w.target, w.service, length_s, start_s].append(w.window)
        resting = [k for k in blocks if self._rests(self._of_block[k[0], k[1], k[3]])]
        for key in resting:
            self.waiting[Wait.BACKOFF] += len(blocks.pop(key))
        priced = sorted(
            ((self._ask(key, windows), windows) for key, windows in blocks.items()),
            key=lambda one: (one[0].usd, -one[0].task.tick_s, one[0].task.task_id),
        )
        left_usd = Decimal(str(self._rules.heal.usd_per_day)) - self._s.spent_usd
        turns = ASKED_MAX - self._s.pending_asks
        taken: list[Ask] = []
        for ask, windows in priced:
            if ask.usd > left_usd:
                self.waiting[Wait.BUDGET] += len(windows)
            elif len(taken) >= turns:
                self.waiting[Wait.TURN] += len(windows)
            else:
                taken.append(ask)
                left_usd -= ask.usd
        return taken

    def _rests(self, made: Sequence[Attempt]) -> bool:
        """Whether a block was asked too lately. A window that came into it since waits too, or an outage would be asked for by the window."""
        if not made:
            return False
        first_s = self._rules.heal.backoff_s
        rest_s = min(first_s << min(len(made) - 1, DOUBLINGS_MAX), max(first_s, REST_S_MAX))
        return not all(self._rested(a.allocated_s, rest_s) for a in made)

    def _rested(self, since_s: int, rest_s: int) -> bool:
        """Whether so long has passed. What a clock that was ahead wrote lies after now, and is no reason to wait until then."""
        return not since_s <= self._now_s < since_s + rest_s

    def _ask(self, key: tuple[Target, str, int, int], windows: Sequence[Window]) -> Ask:
        """From the first window to the last: what lies between costs nothing, for points are not billed.

        At the finest period that is still kept: what it brings then are series of their own.
        """
        target, service, length_s, block_start_s = key
        start_s, end_s = min(w.start_s for w in windows), max(w.end_s for w in windows)
        grid = replace(self._grids[target, service], poll_interval_s=length_s)
        # Of the oldest window, which has the coarsest: a block is asked at one period.
        period_s = self._period_s(grid, Window(start_s, start_s + length_s)) or grid.period_s
        items = (grid.item(start_s, end_s, period_s),)
        made = (a.attempt for a in self._of_block[target, service, block_start_s])
        attempt = 1 + max(made, default=0)
        revision = self._rules.revision
        task = Task(
            task_id=task_id_of(target, revision, attempt, items),
            target=target,
            config_revision=revision,
            tick_s=end_s,
            attempt=attempt,
            kind=TaskKind.HEAL.value,
            expires_s=0,
            items=items,
        )
        series = self._s.series.get((target, service), UNKNOWN_SERIES)
        return Ask(task, block_start_s, self._rules.prices.get_metric_data_usd(series, service))
