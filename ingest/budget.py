"""Budgets: what polls may cost in a UTC day, and how they stretch before that would be passed. Pure: a situation in, a decision out.

Guarantees, each with a test of its name:

* *Stretched before the budget breaks*: the day's forecast (billed, in doubt, reserved, and what the polls left in the day will bill) is kept within
  the budgets of the accounts and of all, by taking each k-th tick of the same grid, up to `stretch_max`.
* *Lowest priority first*: a service is stretched only when all of a lower priority are stretched as far as may be. Critical ones never are.
* *More budget never means more stretch.*
* *It does not flap*: what is stretched is relaxed only when the forecast would then leave `RELAXED_SHARE` of the budget; between, it stays.
* *A hard cap stops, lowest priority first*, what is not critical, as soon as what is left (less what the critical ones will bill until midnight) does
  not pay one more look at each: so the day's bill stays within the budget, given that a look bills no more than the last complete one did.
* Deterministic: two coordinators that know the same decide the same.

Money is reserved by the tick, not by the task: what was asked is known by the newest window with a receipt, and each tick after that, up to
now, counts as a look in full. So a receipt that is late, or not read yet, is money spent, and nothing has to be released.
A service that was never looked at has no price, and is polled: its first look sets one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from shard_config.price import DAY_S

LADDER: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 36, 48, 72, 96, 144, 288)
"""So many poll intervals become one; all divide a day of five-minute polls. `stretch_max` is the last rung."""
RELAXED_SHARE: Final = Decimal("0.05")

Pair = tuple[str, str]
"""Account and service."""
ZERO: Final = Decimal(0)


@dataclass(frozen=True, slots=True)
class Poll:
    """One service of one target, as it is polled. `payer` is the account that is billed for it; `asked_until_s` is the end of the newest
    window with a receipt, or that nobody is asked for, 0 without one.
    """

    account: str
    service: str
    payer: str
    usd_per_look: Decimal
    poll_interval_s: int
    asked_until_s: int
    priority: int = 100
    critical: bool = False
    region: str = ""

    @property
    def pair(self) -> Pair:
        return self.account, self.service


@dataclass(frozen=True, slots=True)
class Spent:
    """Of a payer and UTC day. `reserved_usd` is of tasks without a receipt that are no polls: backlog, healing, backfills."""

    billed_usd: Decimal = ZERO
    in_doubt_usd: Decimal = ZERO
    reserved_usd: Decimal = ZERO

    @property
    def usd(self) -> Decimal:
        return self.billed_usd + self.in_doubt_usd + self.reserved_usd


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be spent: by payer, where it has a budget, and by all together."""

    usd_of: Mapping[str, Decimal] = field(default_factory=dict)
    usd_of_all: Decimal | None = None
    stretch_max: int = 12
    hard_cap: bool = False


@dataclass(frozen=True, slots=True)
class Polling:
    """How polls are stretched (1 where a pair is missing), and which are stopped until midnight UTC."""

    stretch: Mapping[Pair, int] = field(default_factory=dict)
    stopped: frozenset[Pair] = frozenset()

    def of(self, account: str, service: str) -> int:
        return self.stretch.get((account, service), 1)


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known at a time."""

    now_s: int
    polls: Sequence[Poll]
    spent: Mapping[str, Spent]
    limits: Limits
    polling: Polling = field(default_factory=Polling)
    """As it is now."""

    @property
    def day_end_s(self) -> int:
        return (self.now_s // DAY_S + 1) * DAY_S


@dataclass(frozen=True, slots=True)
class Day:
    """A payer's UTC day. `forecast_usd` includes what is spent; `budget_usd` is None without one."""

    spent_usd: Decimal
    forecast_usd: Decimal
    budget_usd: Decimal | None

    @property
    def passed(self) -> bool:
        return self.budget_usd is not None and self.spent_usd > self.budget_usd


@dataclass(frozen=True, slots=True)
class Decision:
    """How to poll from now on, and what the day comes to then."""

    polling: Polling
    days: Mapping[str, Day]
    all: Day

    @property
    def passed(self) -> bool:
        return self.all.passed or any(day.passed for day in self.days.values())


def ticks(poll_interval_s: int, stretch: int, from_s: int, to_s: int) -> int:
    """At most so many polls are in (from_s, to_s): never more for a greater stretch, and exact for none."""
    if to_s <= from_s:
        return 0
    exact = (to_s - 1) // poll_interval_s - from_s // poll_interval_s
    return min(exact, -(-(to_s - from_s) // (poll_interval_s * stretch)))


def decide(s: Situation) -> Decision:
    """Stretch and stop as far as the budgets ask for, and relax as far as they safely allow."""
    purses = _purses(s)
    needed, relaxed = _stretched(s, purses, Decimal(1)), _stretched(s, purses, 1 - RELAXED_SHARE)
    stretch: dict[Pair, int] = {}
    for pair, least in needed.items():
        k = max(least, min(s.polling.of(*pair), relaxed[pair]))
        if k > 1:
            stretch[pair] = k
    stopped: frozenset[Pair] = frozenset()
    if s.limits.hard_cap:
        kept = s.polling.stopped & _stopped(s, purses, 1 - RELAXED_SHARE)
        stopped = _stopped(s, purses, Decimal(1)) | kept
    polling = Polling(stretch, stopped)
    return Decision(polling, *_days(s, polling))


@dataclass(frozen=True, slots=True)
class _Purse:
    """A budget, the polls that it pays for, and what of it is spent or reserved."""

    usd: Decimal
    committed_usd: Decimal
    polls: Sequence[Poll]


def _purses(s: Situation) -> list[_Purse]:
    """Each payer's own budget, then that of all."""
    of_payer = _of_payer(s)
    found = [
        _Purse(usd, _committed_usd(s, payer, of_payer[payer]), of_payer[payer])
        for payer, usd in sorted(s.limits.usd_of.items())
    ]
    if s.limits.usd_of_all is not None:
        committed = sum((_committed_usd(s, payer, polls) for payer, polls in of_payer.items()), ZERO)
        found.append(_Purse(s.limits.usd_of_all, committed, s.polls))
    return found


def _of_payer(s: Situation) -> dict[str, list[Poll]]:
    """The polls of all payers that are known, polls or not."""
    found: dict[str, list[Poll]] = {payer: [] for payer in (*s.spent, *s.limits.usd_of)}
    for p in s.polls:
        found.setdefault(p.payer, []).append(p)
    return found


def _committed_usd(s: Situation, payer: str, polls: Iterable[Poll]) -> Decimal:
    """Spent today, and reserved: each tick up to now that has no receipt yet."""
    return s.spent.get(payer, Spent()).usd + sum((_waiting_usd(s, p) for p in polls), ZERO)


def _waiting_usd(s: Situation, p: Poll) -> Decimal:
    # An outage is not asked for tick by tick: what is older than today is not reserved.
    from_s = max(p.asked_until_s, s.day_end_s - DAY_S - p.poll_interval_s)
    return p.usd_per_look * ticks(p.poll_interval_s, s.polling.of(*p.pair), from_s, s.now_s + 1)


def _rest_usd(s: Situation, p: Poll, stretch: int) -> Decimal:
    """What a poll will bill until midnight."""
    return p.usd_per_look * ticks(p.poll_interval_s, stretch, s.now_s, s.day_end_s)


# --- stretching -------------------------------------------------------------------------------------------------


def _stretched(s: Situation, purses: Sequence[_Purse], share: Decimal) -> dict[Pair, int]:
    """The least stretch with which a share of the budgets holds."""
    found = {p.pair: 1 for p in s.polls}
    for purse in purses:
        _stretch(s, purse.polls, purse.usd * share - purse.committed_usd, found)
    return found


def _stretch(s: Situation, polls: Sequence[Poll], left_usd: Decimal, found: dict[Pair, int]) -> None:
    """Raise `found` until the polls fit into what is left, or cannot be stretched any further."""
    of_priority: dict[int, list[Poll]] = defaultdict(list)
    for p in polls:
        if not p.critical:
            of_priority[p.priority].append(p)
    total = sum((_rest_usd(s, p, found[p.pair]) for p in polls), ZERO)
    for priority in sorted(of_priority):
        some = of_priority[priority]
        for rung in _rungs(s.limits.stretch_max):
            if total <= left_usd:
                return
            before = sum((_rest_usd(s, p, found[p.pair]) for p in some), ZERO)
            found |= {p.pair: max(found[p.pair], rung) for p in some}
            total += sum((_rest_usd(s, p, found[p.pair]) for p in some), ZERO) - before


def _rungs(stretch_max: int) -> tuple[int, ...]:
    return (*(k for k in LADDER if 1 < k < stretch_max), stretch_max) if stretch_max > 1 else ()


# --- stopping ---------------------------------------------------------------------------------------------------


def _stopped(s: Situation, purses: Sequence[_Purse], share: Decimal) -> frozenset[Pair]:
    """The pairs whose next look a share of the budgets does not pay any more."""
    found: set[Pair] = set()
    for purse in purses:
        _stop(s, purse.polls, purse.usd * share - purse.committed_usd, found)
    return frozenset(found)


def _stop(s: Situation, polls: Sequence[Poll], left_usd: Decimal, found: set[Pair]) -> None:
    left_usd -= sum((_rest_usd(s, p, 1) for p in polls if p.critical), ZERO)
    others = [p for p in polls if not p.critical]
    for priority in sorted({p.priority for p in others}):
        if sum((_next_usd(s, p) for p in others if p.pair not in found), ZERO) <= left_usd:
            return
        found |= {p.pair for p in others if p.priority == priority}


def _next_usd(s: Situation, p: Poll) -> Decimal:
    """One more look, if one is left today."""
    return p.usd_per_look * min(1, ticks(p.poll_interval_s, 1, s.now_s, s.day_end_s))


# --- what the day comes to --------------------------------------------------------------------------------------


def _days(s: Situation, polling: Polling) -> tuple[dict[str, Day], Day]:
    days = {}
    for payer, polls in sorted(_of_payer(s).items()):
        spent = s.spent.get(payer, Spent())
        going_on = (p for p in polls if p.pair not in polling.stopped)
        rest = sum((_rest_usd(s, p, polling.of(*p.pair)) for p in going_on), ZERO)
        days[payer] = Day(
            spent.billed_usd + spent.in_doubt_usd,
            _committed_usd(s, payer, polls) + rest,
            s.limits.usd_of.get(payer),
        )
    spent_usd = sum((d.spent_usd for d in days.values()), ZERO)
    forecast_usd = sum((d.forecast_usd for d in days.values()), ZERO)
    return days, Day(spent_usd, forecast_usd, s.limits.usd_of_all)
