"""Budgets' guarantees, each by its name in the module's docstring; days are simulated, tick by tick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ingest.budget import LADDER, ZERO, Limits, Poll, Polling, Situation, Spent, decide, ticks

DAY_S = 86_400
MIDNIGHT_S = 20_454 * DAY_S
USD = Decimal("0.01")
"""Of a look: at 288 a day, $2.88."""


def poll(
    service: str = "ec2",
    account: str = "a",
    *,
    usd: Decimal = USD,
    priority: int = 100,
    critical: bool = False,
    every_s: int = 300,
) -> Poll:
    return Poll(account, service, account, usd, every_s, MIDNIGHT_S - every_s, priority, critical)


def situation(polls: Sequence[Poll], limits: Limits, now_s: int = MIDNIGHT_S) -> Situation:
    """Nothing is spent yet, and all is asked until now."""
    return Situation(now_s, [replace(p, asked_until_s=now_s) for p in polls], {}, limits)


def limits(usd: str | None = None, *, of_all: str | None = None, most: int = 12, cap: bool = False) -> Limits:
    return Limits(
        {} if usd is None else {"a": Decimal(usd)}, None if of_all is None else Decimal(of_all), most, cap
    )


@dataclass
class World:
    """A day of polls that bill what they say, decided about each `every_s`; receipts come at once, or `late_s` after the tick."""

    polls: Sequence[Poll]
    limits: Limits
    every_s: int = 300
    late_s: int = 0
    spent: dict[str, Decimal] = field(default_factory=dict)
    polling: Polling = field(default_factory=Polling)
    history: list[Polling] = field(default_factory=list)
    looks: dict[str, list[int]] = field(default_factory=dict)
    stopped_at: dict[str, list[int]] = field(default_factory=dict)
    asked: list[tuple[int, int]] = field(default_factory=list)
    """Tick, and the index of its poll: not answered yet."""

    def run(self, days: int = 1) -> World:
        for now_s in range(MIDNIGHT_S, MIDNIGHT_S + days * DAY_S, self.every_s):
            if now_s % DAY_S == 0:
                self.spent = {}
            self.answer(now_s)
            spent = {payer: Spent(usd) for payer, usd in self.spent.items()}
            decision = decide(Situation(now_s, self.polls, spent, self.limits, self.polling))
            self.polling = decision.polling
            self.history.append(self.polling)
            for i, p in enumerate(self.polls):
                if now_s % (p.poll_interval_s * self.polling.of(*p.pair)):
                    continue
                if p.pair in self.polling.stopped:
                    self.stopped_at.setdefault(p.service, []).append(now_s)
                    self.polls = [*self.polls[:i], replace(p, asked_until_s=now_s), *self.polls[i + 1 :]]
                else:
                    self.looks.setdefault(p.service, []).append(now_s)
                    self.asked.append((now_s, i))
        return self

    def answer(self, now_s: int) -> None:
        waiting = []
        for tick_s, i in self.asked:
            if tick_s + self.late_s >= now_s:
                waiting.append((tick_s, i))
                continue
            p = self.polls[i]
            self.spent[p.payer] = self.spent.get(p.payer, ZERO) + p.usd_per_look
            self.polls = [
                *self.polls[:i],
                replace(p, asked_until_s=max(p.asked_until_s, tick_s)),
                *self.polls[i + 1 :],
            ]
        self.asked = waiting

    def bill(self, day: int = 0) -> Decimal:
        start_s = MIDNIGHT_S + day * DAY_S
        usd = {p.service: p.usd_per_look for p in self.polls}
        return sum(
            (usd[s] for s, at in self.looks.items() for t in at if start_s <= t < start_s + DAY_S), ZERO
        )


THREE = [
    poll("ec2", priority=10),
    poll("rds", priority=50),
    poll("sqs", critical=True, usd=Decimal("0.002")),
]
"""$2.88 + $2.88 + $0.576 a day."""


def test_without_a_budget_nothing_is_stretched() -> None:
    decision = decide(situation(THREE, limits()))
    assert (decision.polling, decision.passed) == (Polling(), False)


def test_a_budget_that_holds_stretches_nothing() -> None:
    decision = decide(situation(THREE, limits("6.336")))
    assert decision.polling == Polling()
    assert decision.days["a"].forecast_usd <= Decimal("6.336")


@pytest.mark.parametrize("late_s", [0, 700])
def test_a_day_stays_within_a_third_of_what_would_be_asked_for(late_s: int) -> None:
    world = World(THREE, limits("2.112"), late_s=late_s).run(days=2)
    for day in (0, 1):
        assert Decimal("1.7") < world.bill(day) <= Decimal("2.112")
    assert len(world.looks["sqs"]) == 2 * 288
    assert world.stopped_at == {}


def test_the_lowest_priority_is_stretched_first_and_critical_ones_never() -> None:
    stretch = decide(situation(THREE, limits("4.5"))).polling.stretch
    assert set(stretch) == {("a", "ec2")}
    stretch = decide(situation(THREE, limits("1.5"))).polling.stretch
    assert stretch[("a", "ec2")] == 12
    assert 1 < stretch[("a", "rds")] < 12
    assert ("a", "sqs") not in stretch


def test_other_accounts_are_left_alone_by_an_accounts_budget_and_not_by_that_of_all() -> None:
    polls = [poll(account="a"), poll(account="b")]
    assert set(decide(situation(polls, limits("1"))).polling.stretch) == {("a", "ec2")}
    assert set(decide(situation(polls, limits(of_all="1"))).polling.stretch) == {("a", "ec2"), ("b", "ec2")}


def test_a_monitoring_account_pays_for_the_polls_of_others() -> None:
    seen = replace(poll(account="b"), payer="a")
    assert set(decide(situation([seen], limits("1"))).polling.stretch) == {("b", "ec2")}


def test_what_is_spent_reserved_or_in_doubt_stretches_the_rest() -> None:
    base = situation([poll()], limits("3"))
    assert decide(base).polling == Polling()
    for spent in (Spent(billed_usd=USD * 100), Spent(in_doubt_usd=USD * 100), Spent(reserved_usd=USD * 100)):
        assert decide(replace(base, spent={"a": spent})).polling.of("a", "ec2") > 1


def test_polls_without_a_receipt_yet_are_reserved() -> None:
    noon_s = MIDNIGHT_S + DAY_S // 2
    asked = situation([poll()], limits("1.5"), noon_s)
    waiting = replace(asked, polls=[replace(poll(), asked_until_s=noon_s - 3600)])
    assert decide(asked).polling == Polling()
    assert decide(waiting).polling.of("a", "ec2") > 1


def test_a_service_without_a_price_is_polled() -> None:
    decision = decide(situation([poll(usd=ZERO)], limits("0.01", cap=True)))
    assert decision.polling == Polling()


@st.composite
def polls_of(draw: st.DrawFn) -> list[Poll]:
    count = draw(st.integers(1, 5))
    return [
        poll(
            f"s{i}",
            usd=Decimal(draw(st.integers(1, 500))) / 10_000,
            priority=draw(st.integers(0, 2)),
            critical=draw(st.booleans()),
            every_s=draw(st.sampled_from([60, 300, 900, 3600])),
        )
        for i in range(count)
    ]


def stretches_of(s: Situation) -> Mapping[str, float]:
    """By service, its stretch; without end where it is stopped."""
    polling = decide(s).polling
    return {p.service: float("inf") if p.pair in polling.stopped else polling.of(*p.pair) for p in s.polls}


@given(
    polls=polls_of(),
    budget=st.integers(1, 400),
    more=st.integers(0, 400),
    at=st.integers(0, 287),
    spent=st.integers(0, 300),
    cap=st.booleans(),
    of_all=st.booleans(),
    before=st.sampled_from(LADDER),
)
def test_more_budget_never_means_more_stretch(
    polls: list[Poll], budget: int, more: int, at: int, spent: int, cap: bool, of_all: bool, before: int
) -> None:
    def with_budget(usd: int) -> Situation:
        text = str(Decimal(usd) / 10)
        made = limits(of_all=text, cap=cap) if of_all else limits(text, cap=cap)
        s = situation(polls, made, MIDNIGHT_S + at * 300)
        now = Polling({p.pair: before for p in polls if not p.critical})
        return replace(s, spent={"a": Spent(Decimal(spent) / 10)}, polling=now)

    less, greater = stretches_of(with_budget(budget)), stretches_of(with_budget(budget + more))
    assert all(greater[service] <= less[service] for service in less)


@given(polls=polls_of(), budget=st.integers(1, 400), late_s=st.sampled_from([0, 400]))
def test_with_a_hard_cap_a_day_never_costs_more_than_its_budget_but_for_critical_services(
    polls: list[Poll], budget: int, late_s: int
) -> None:
    usd = Decimal(budget) / 10
    critical = sum((p.usd_per_look * (DAY_S // p.poll_interval_s) for p in polls if p.critical), ZERO)
    polls = [replace(p, poll_interval_s=max(300, p.poll_interval_s)) for p in polls]
    # What was asked for before midnight is answered after it.
    carried = sum((p.usd_per_look for p in polls), ZERO)
    assume(critical + carried <= usd)
    world = World(polls, limits(str(usd), cap=True), every_s=300, late_s=late_s).run()
    assert world.bill() <= usd


@given(polls=polls_of(), budget=st.integers(1, 400))
def test_two_that_know_the_same_decide_the_same(polls: list[Poll], budget: int) -> None:
    s = situation(polls, limits(str(Decimal(budget) / 10), cap=True), MIDNIGHT_S + 3600)
    shuffled = replace(s, polls=list(reversed(s.polls)))
    assert decide(s).polling == decide(shuffled).polling


def test_it_does_not_flap() -> None:
    world = World(THREE, limits("2.112"), every_s=60).run(days=3)
    changes = sum(a != b for a, b in pairwise(world.history))
    assert changes <= 3 * 12


def test_a_small_rise_and_fall_of_what_a_look_bills_stretches_once_and_stays() -> None:
    s = situation([poll()], limits("1.44"))
    seen = []
    for usd in ("0.0099", "0.0101", "0.0099", "0.0101", "0.0099"):
        s = replace(s, polls=[replace(s.polls[0], usd_per_look=Decimal(usd))])
        s = replace(s, polling=decide(s).polling)
        seen.append(s.polling.of("a", "ec2"))
    assert seen == [2, 3, 3, 3, 3]


def test_a_hard_cap_stops_the_lowest_priority_first_and_goes_on_after_midnight() -> None:
    polls = [
        poll("ec2", priority=10),
        poll("rds", priority=50),
        poll("sqs", critical=True, usd=Decimal("0.001")),
    ]
    world = World(polls, limits("0.5", cap=True, most=2)).run(days=2)
    assert world.bill(0) <= Decimal("0.5")
    assert world.bill(1) <= Decimal("0.5")
    assert len(world.looks["sqs"]) == 2 * 288
    assert min(world.stopped_at["ec2"]) <= min(world.stopped_at["rds"])
    assert {t // DAY_S for t in world.looks["rds"]} == {MIDNIGHT_S // DAY_S, MIDNIGHT_S // DAY_S + 1}


def test_without_a_hard_cap_polls_go_on_and_the_budget_is_passed_and_said_to_be() -> None:
    world = World([poll()], limits("0.1", most=2)).run()
    assert len(world.looks["ec2"]) == 144
    s = Situation(MIDNIGHT_S + DAY_S - 60, world.polls, {"a": Spent(Decimal("1.44"))}, world.limits)
    assert decide(s).passed


@given(
    every_s=st.sampled_from([60, 300, 3600, DAY_S]),
    k=st.integers(1, 288),
    from_s=st.integers(0, 2 * DAY_S),
    length_s=st.integers(0, DAY_S),
)
def test_polls_are_never_fewer_than_counted(every_s: int, k: int, from_s: int, length_s: int) -> None:
    step_s, to_s = every_s * k, from_s + length_s
    exact = len(range((from_s // step_s + 1) * step_s, to_s, step_s))
    assert exact <= ticks(every_s, k, from_s, to_s) <= ticks(every_s, 1, from_s, to_s)
