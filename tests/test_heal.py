"""The decision's guarantees, each by its name in `ingest.heal`'s docstring, then the store's on a real PostgreSQL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.heal import (
    ASKED_MAX,
    REMOVED_S,
    REPLAYS_MAX,
    Announced,
    Ask,
    Attempt,
    Decision,
    Declaration,
    OpenWindow,
    Pending,
    Reason,
    Rules,
    Situation,
    Unlanded,
    Wait,
    decide,
)
from ingest.model import Target, Task, TaskItem, TaskKind, Window, task_id_of
from ingest.pauses import ALL, Pause, Pauses, split
from ingest.schedule import BLOCK_POINTS_MAX, Grid
from shard_config.model import Heal
from shard_config.price import Prices
from workers.healing import stretches

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
OTHER = Target("cloudwatch", "210987654321", "eu-west-1")
NODES = Target("exposition", "lab", "local")
EC2 = Grid("ec2", poll_interval_s=300, period_s=60, settling_s=600)
RDS = Grid("rds", poll_interval_s=300, period_s=60, settling_s=600)
NODE = Grid("node", poll_interval_s=30, period_s=30, settling_s=0, has_past=False)
ZERO_S = 1_767_264_000
BLOCK_S = EC2.block_s
"""12,000 s, of which ZERO_S is a multiple."""
RULES = Rules(
    Heal(attempts_max=3, backoff_s=100, usd_per_day=1.0),
    Prices(),
    "rev",
    {TARGET: (EC2, RDS), OTHER: (EC2,), NODES: (NODE,)},
    task_deadline_s=120,
)
LATER_S = ZERO_S + 10 * BLOCK_S
HEARD = {TARGET: LATER_S, OTHER: LATER_S, NODES: LATER_S}


def window(
    start_s: int = 0,
    *,
    target: Target = TARGET,
    service: str = "ec2",
    grid: Grid = EC2,
    landed_s: int = 0,
    status: str = "failed",
    unbalanced: bool = False,
) -> OpenWindow:
    """A window that starts so many seconds past ZERO_S."""
    start_s += ZERO_S
    end_s = start_s + grid.poll_interval_s
    return OpenWindow(
        target,
        service,
        Window(start_s, end_s),
        end_s + grid.settling_s,
        landed_s,
        unbalanced,
        status,
        "HTTP 500",
    )


def task_of(*windows: OpenWindow) -> Task:
    """One that looks at all from the first to the last."""
    start_s, end_s = min(w.window.start_s for w in windows), max(w.window.end_s for w in windows)
    one = windows[0]
    items = (TaskItem(one.service, start_s, end_s, one.window.end_s - one.window.start_s),)
    return Task(task_id_of(one.target, "rev", 0, items), one.target, "rev", end_s, 0, "live", 0, items)


def unlanded(*windows: OpenWindow, passed: bool = True) -> Unlanded:
    task = task_of(*windows)
    return Unlanded(task, task.items[0].service, task.items[0].start_s, task.items[0].end_s, passed)


def attempt(w: OpenWindow, number: int, allocated_s: int) -> Attempt:
    block_s = w.window.start_s // BLOCK_S * BLOCK_S
    return Attempt(
        w.target, w.service, block_s, w.window.start_s, w.window.end_s, number, ZERO_S + allocated_s
    )


def situation(*windows: OpenWindow, **known: object) -> Situation:
    return replace(Situation(LATER_S, windows, heard_s=HEARD), **known)  # type: ignore[arg-type]


def windows_of(tasks: Sequence[Task]) -> list[tuple[Target, str, int]]:
    return [(t.target, i.service, w.start_s - ZERO_S) for t in tasks for i in t.items for w in i.windows()]


def asked(decision: Decision) -> list[Task]:
    return [a.task for a in decision.asks]


# --- the cheapest means first -----------------------------------------------------------------------------------


def test_what_is_archived_and_was_passed_over_is_replayed_and_never_asked() -> None:
    w = window(landed_s=0, status="complete")
    decision = decide(situation(w, unlanded=[unlanded(w)]), RULES)
    assert [t.kind for t in decision.replays] == ["replay"]
    assert [t.task_id for t in decision.replays] == [task_of(w).task_id]
    assert not decision.asks
    assert not decision.again


def test_what_is_on_its_way_into_the_store_is_waited_for() -> None:
    w = window(status="complete")
    decision = decide(situation(w, unlanded=[unlanded(w, passed=False)]), RULES)
    assert decision == Decision((), (), (), (), {Wait.LANDING: 1})


def test_what_was_replayed_in_vain_counts_as_not_archived() -> None:
    w = window(status="complete")
    look = unlanded(w)
    for times in range(1, REPLAYS_MAX + 2):
        known = {look.task.task_id: Announced(times, LATER_S - 10_000)}
        decision = decide(situation(w, unlanded=[look], announced=known), RULES)
        assert (len(decision.replays), len(decision.asks)) == ((1, 0) if times < REPLAYS_MAX else (0, 1))


def test_a_replay_is_given_time_and_twice_as_much_the_next_time() -> None:
    w = window(status="complete")
    look = unlanded(w)
    for times, rest_s in ((1, 100), (2, 200)):
        for since_s, replays in ((rest_s - 1, 0), (rest_s, 1)):
            known = {look.task.task_id: Announced(times, LATER_S - since_s)}
            decision = decide(situation(w, unlanded=[look], announced=known), RULES)
            assert len(decision.replays) == replays


def test_a_task_without_a_receipt_is_announced_again_after_its_deadline_and_the_source_is_not_asked_beside_it() -> (
    None
):
    w = window(status="")
    task = task_of(w)
    # The task's 120 s, and a first back-off of 100 s.
    for since_s, again in ((219, 0), (220, 1)):
        decision = decide(situation(w, pending=[Pending(task, LATER_S - since_s)]), RULES)
        assert [t.task_id for t in decision.again] == [task.task_id] * again
        assert {t.kind for t in decision.again} <= {"again"}
        assert not decision.asks


def test_a_task_that_covers_many_windows_is_announced_once() -> None:
    some = [window(300 * i, status="") for i in range(10)]
    decision = decide(situation(*some, pending=[Pending(task_of(*some), ZERO_S)]), RULES)
    assert len(decision.again) == 1


def test_a_window_that_has_landed_settled_waits_for_its_seal_and_one_that_does_not_balance_is_asked_again() -> (
    None
):
    w = window()
    settled = replace(w, landed_s=w.settles_s, last_status="complete")
    early = replace(settled, landed_s=w.settles_s - 1)
    assert decide(situation(settled), RULES).waiting == {Wait.SEALING: 1}
    assert len(decide(situation(early), RULES).asks) == 1
    assert len(decide(situation(replace(settled, unbalanced=True)), RULES).asks) == 1


def test_rows_that_are_not_in_the_store_are_landed_once_more_from_the_archive_before_the_source_is_asked() -> (
    None
):
    w = window(unbalanced=True, landed_s=window().settles_s, status="complete")
    look = replace(unlanded(w), look_id=7)
    first = decide(situation(w, unlanded=[look]), RULES)
    assert ([t.kind for t in first.replays], first.relanded, first.asks) == (["replay"], (7,), ())
    for since_s, asks in ((899, 0), (900, 1)):
        known = {look.task.task_id: Announced(1, LATER_S - since_s)}
        decision = decide(situation(w, unlanded=[look], announced=known), RULES)
        assert (len(decision.asks), decision.replays, decision.relanded) == (asks, (), ())
        assert decision.waiting == ({} if asks else {Wait.LANDING: 1})
    # A balanced window needs nothing of it.
    assert decide(situation(replace(w, unbalanced=False), unlanded=[look]), RULES).relanded == ()


def test_of_what_is_asked_the_cheapest_comes_first_and_of_equals_the_newest() -> None:
    some = [
        window(0),
        window(BLOCK_S),
        window(0, service="rds", grid=RDS),
        window(0, target=OTHER),
    ]
    series = {(TARGET, "ec2"): 100, (TARGET, "rds"): 10, (OTHER, "ec2"): 1000}
    decision = decide(situation(*some, series=series), RULES)
    assert windows_of(asked(decision)) == [
        (TARGET, "rds", 0),
        (TARGET, "ec2", BLOCK_S),
        (TARGET, "ec2", 0),
        (OTHER, "ec2", 0),
    ]
    assert [a.usd for a in decision.asks] == [
        Decimal("0.0001"),
        Decimal("0.001"),
        Decimal("0.001"),
        Decimal("0.01"),
    ]


# --- nothing on stale knowledge ---------------------------------------------------------------------------------


def test_the_source_is_not_asked_and_nothing_declared_before_a_receipt_came_in_since_the_deadline() -> None:
    w = window()
    deadline_s = w.settles_s + 300
    gone = replace(RULES, heal=Heal(attempts_max=1, backoff_s=1))
    used_up = [attempt(w, 1, 0)]
    for heard_s, known in ((deadline_s, False), (deadline_s + 1, True)):
        heard = {TARGET: heard_s}
        assert len(decide(situation(w, heard_s=heard), RULES).asks) == int(known)
        assert len(decide(situation(w, heard_s=heard, attempts=used_up), gone).declared) == int(known)
    assert decide(situation(w, heard_s={}), RULES).waiting == {Wait.NEWS: 1}


# --- bounded ----------------------------------------------------------------------------------------------------


def test_attempts_are_numbered_on_and_the_time_between_them_doubles() -> None:
    w = window()
    one, two = attempt(w, 1, 0), attempt(w, 2, 100)
    for made, now_s, number in (
        ([], 0, 1),
        ([one], 99, None),
        ([one], 100, 2),
        ([one, two], 299, None),
        ([one, two], 300, 3),
    ):
        decision = decide(replace(situation(w, attempts=made), now_s=ZERO_S + now_s), RULES)
        assert [t.attempt for t in asked(decision)] == ([number] if number else [])
        assert decision.waiting == ({} if number else {Wait.BACKOFF: 1})


def test_the_rest_grows_to_an_hour_and_no_longer() -> None:
    patient = replace(RULES, heal=Heal(attempts_max=100, backoff_s=300))
    w = window()
    for count, rest_s in ((1, 300), (4, 2400), (5, 3600), (50, 3600)):
        made = [attempt(w, n, 0) for n in range(1, count + 1)]
        for now_s, asks in ((rest_s - 1, 0), (rest_s, 1)):
            known = replace(situation(w, attempts=made), now_s=ZERO_S + now_s)
            assert len(decide(known, patient).asks) == asks


def test_what_a_clock_that_was_ahead_wrote_is_no_reason_to_rest_and_counts_as_an_attempt() -> None:
    ahead_s = LATER_S + 3600
    w = window()
    block = [attempt(w, 1, ahead_s - ZERO_S)]
    [task] = asked(decide(situation(w, attempts=block), RULES))
    assert task.attempt == 2
    # One that was made just now rests all the same.
    block.append(attempt(w, 2, LATER_S - ZERO_S))
    assert decide(situation(w, attempts=block), RULES).waiting == {Wait.BACKOFF: 1}
    block.append(attempt(w, 3, ahead_s - ZERO_S))
    assert [d.reason for d in decide(situation(w, attempts=block), RULES).declared] == [Reason.ABANDONED]

    task = task_of(w)
    waits = situation(w, pending=[Pending(task, ahead_s)])
    assert [t.task_id for t in decide(waits, RULES).again] == [task.task_id]
    told = replace(waits, announced={task.task_id: Announced(1, ahead_s)})
    assert [t.task_id for t in decide(told, RULES).again] == [task.task_id]

    archived = situation(w, unlanded=[unlanded(w)], announced={task.task_id: Announced(1, ahead_s)})
    assert [t.task_id for t in decide(archived, RULES).replays] == [task.task_id]
    used_up = replace(archived, announced={task.task_id: Announced(REPLAYS_MAX, ahead_s)})
    assert decide(used_up, RULES).replays == ()


def test_rows_that_a_clock_that_was_ahead_landed_once_more_are_landed_again_before_the_source_is_asked() -> (
    None
):
    w = window(landed_s=LATER_S, unbalanced=True)
    look = replace(unlanded(w), look_id=7)
    known = situation(w, unlanded=[look], announced={look.task.task_id: Announced(1, LATER_S + 3600)})
    decision = decide(known, RULES)
    assert (decision.relanded, len(decision.replays), decision.asks) == ((7,), 1, ())


def test_a_window_that_comes_into_a_block_that_was_just_asked_rests_with_it_and_both_are_asked_for_at_once() -> (
    None
):
    old, new = window(0), window(600)
    made = [attempt(old, 1, 0)]
    for now_s, tasks in ((99, 0), (100, 1)):
        decision = decide(replace(situation(old, new, attempts=made), now_s=ZERO_S + now_s), RULES)
        assert [windows_of([t]) for t in asked(decision)] == [
            [(TARGET, "ec2", 0), (TARGET, "ec2", 300), (TARGET, "ec2", 600)]
        ] * tasks
        assert decision.waiting == ({} if tasks else {Wait.BACKOFF: 2})


def test_an_attempt_has_an_id_of_its_own() -> None:
    w = window()
    [first] = asked(decide(situation(w), RULES))
    [second] = asked(decide(situation(w, attempts=[attempt(w, 1, 0)]), RULES))
    assert first.task_id != second.task_id
    assert first.task_id == task_id_of(TARGET, "rev", 1, first.items)


def test_the_number_of_an_attempt_is_above_all_of_its_block() -> None:
    # The other window's attempts do not count against this one, but their numbers are taken.
    decision = decide(situation(window(0), attempts=[attempt(window(600), 4, 0)]), RULES)
    assert [t.attempt for t in asked(decision)] == [5]


def test_a_day_costs_no_more_than_is_allowed_and_what_waits_for_money_is_counted() -> None:
    some = [window(BLOCK_S * i) for i in range(4)]
    series = {(TARGET, "ec2"): 30_000}  # 0.30 dollars a look
    for spent, asks in (("0", 3), ("0.1", 3), ("0.11", 2), ("0.99", 0), ("7", 0)):
        decision = decide(situation(*some, series=series, spent_usd=Decimal(spent)), RULES)
        assert len(decision.asks) == asks
        assert decision.waiting.get(Wait.BUDGET, 0) == 4 - asks


def test_tasks_at_once_are_limited() -> None:
    some = [window(BLOCK_S * i) for i in range(ASKED_MAX + 10)]
    free = replace(RULES, heal=Heal(usd_per_day=1000))
    now_s = ZERO_S + 100 * BLOCK_S
    known = situation(*some, pending_asks=ASKED_MAX - 5, heard_s={TARGET: now_s})
    decision = decide(replace(known, now_s=now_s), free)
    assert len(decision.asks) == 5
    assert decision.waiting == {Wait.TURN: ASKED_MAX + 5}


def test_a_long_outage_is_asked_for_by_the_block_and_not_by_the_window() -> None:
    day = [window(300 * i) for i in range(288)]
    now_s = ZERO_S + 86_400 + 3600
    decision = decide(replace(situation(*day, heard_s={TARGET: now_s}), now_s=now_s), RULES)
    assert len(decision.asks) == -(-86_400 // BLOCK_S)
    assert windows_of(asked(decision)) != []
    assert sorted(windows_of(asked(decision))) == [(TARGET, "ec2", 300 * i) for i in range(288)]


def test_windows_of_another_grid_than_todays_are_asked_for_on_their_own() -> None:
    old = replace(window(0), window=Window(ZERO_S, ZERO_S + 60))
    [task] = asked(decide(situation(old), RULES))
    assert task.items == (TaskItem("ec2", ZERO_S, ZERO_S + 60, 60),)


# --- it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("forbidden", Reason.FORBIDDEN),
        ("failed", Reason.ABANDONED),
        ("partial", Reason.ABANDONED),
        ("complete", Reason.ABANDONED),
    ],
)
def test_used_up_attempts_end_by_what_was_answered_last(status: str, reason: Reason) -> None:
    w = window(status=status)
    made = [attempt(w, n, 0) for n in (1, 2, 3)]
    decision = decide(situation(w, attempts=made), RULES)
    assert [(d.window, d.reason) for d in decision.declared] == [(w, reason)]
    assert not decision.asks


def test_what_the_source_keeps_no_longer_is_unrecoverable() -> None:
    w = window()
    for age_s, gone in ((455 * 86_400, False), (455 * 86_400 + 1, True)):
        now_s = w.window.start_s + age_s
        decision = decide(replace(situation(w, heard_s={TARGET: now_s}), now_s=now_s), RULES)
        assert [d.reason for d in decision.declared] == [Reason.UNRECOVERABLE] * gone
        assert len(decision.asks) == int(not gone)


@pytest.mark.parametrize(("days", "period_s"), [(15, 0), (16, 300), (63, 300), (64, 3600)])
def test_what_is_old_is_asked_at_the_finest_period_that_is_kept(days: int, period_s: int) -> None:
    w = window()
    now_s = w.window.start_s + days * 86_400
    (ask,) = decide(replace(situation(w, heard_s={TARGET: now_s}), now_s=now_s), RULES).asks
    (item,) = ask.task.items
    assert item.period_s == period_s
    assert item.start_s <= w.window.start_s
    assert w.window.end_s <= item.end_s
    assert item.start_s % max(period_s, item.grid_s) == item.end_s % max(period_s, item.grid_s) == 0


def test_recorded_data_is_never_too_old() -> None:
    now_s = ZERO_S + 900 * 86_400
    known = replace(situation(window(), heard_s={TARGET: now_s}), now_s=now_s)
    assert len(decide(known, replace(RULES, source_keeps_all=True)).asks) == 1


def test_what_has_no_past_is_unrecoverable_at_once_unless_its_task_may_yet_be_answered() -> None:
    w = window(target=NODES, service="node", grid=NODE)
    assert [d.reason for d in decide(situation(w), RULES).declared] == [Reason.UNRECOVERABLE]
    for since_s, declared in ((LATER_S - 1000, 0), (LATER_S - 86_401, 1)):
        decision = decide(situation(w, pending=[Pending(task_of(w), since_s)]), RULES)
        assert (len(decision.declared), len(decision.again)) == (declared, 1 - declared)


def test_what_is_archived_is_replayed_however_old_it_is() -> None:
    w = window(target=NODES, service="node", grid=NODE, status="complete")
    decision = decide(situation(w, unlanded=[unlanded(w)]), RULES)
    assert len(decision.replays) == 1
    assert not decision.declared


# --- what is left alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("account", "service"), [(TARGET.account, "ec2"), (TARGET.account, ALL), (ALL, "ec2"), (ALL, ALL)]
)
def test_what_is_paused_is_neither_asked_nor_replayed_nor_declared(account: str, service: str) -> None:
    w = window()
    used_up = [attempt(w, n, 0) for n in (1, 2, 3)]
    now = datetime.fromtimestamp(ZERO_S, UTC)
    pauses = Pauses.of([Pause(account, service, now, "")])
    decision = decide(situation(w, attempts=used_up, unlanded=[unlanded(w)], pauses=pauses), RULES)
    assert decision == Decision((), (), (), (), {Wait.PAUSED: 1})


def test_where_a_budget_is_spent_nobody_is_asked_and_what_costs_nothing_goes_on() -> None:
    w = window()
    stopped = frozenset({(TARGET.account, "ec2")})
    decision = decide(situation(w, stopped=stopped), RULES)
    assert (decision.asks, decision.waiting) == ((), {Wait.BUDGET: 1})
    assert decide(situation(w, unlanded=[unlanded(w)], stopped=stopped), RULES).replays != ()


def removed() -> list[OpenWindow]:
    return [window(target=Target("cloudwatch", "999999999999", "eu-west-1")), window(service="sqs")]


def test_what_the_configuration_no_longer_has_stays_open_for_a_day() -> None:
    gone = removed()
    day_later_s = min(w.settles_s for w in gone) + 300 + REMOVED_S
    decision = decide(replace(situation(*gone), now_s=day_later_s), RULES)
    assert decision == Decision((), (), (), (), {Wait.UNKNOWN: 2})


def test_what_the_configuration_no_longer_has_is_declared_removed_after_a_day_and_once() -> None:
    gone = removed()
    later_s = max(w.settles_s for w in gone) + 300 + REMOVED_S + 1
    decision = decide(replace(situation(*gone), now_s=later_s), RULES)
    assert decision.declared == tuple(Declaration(w, Reason.REMOVED) for w in gone)
    assert decision.waiting == {}


def test_nothing_is_declared_removed_while_an_organization_is_not_listed() -> None:
    gone = removed()
    later_s = max(w.settles_s for w in gone) + 10 * REMOVED_S
    decision = decide(replace(situation(*gone), now_s=later_s), replace(RULES, whole=False))
    assert (decision.declared, decision.waiting) == ((), {Wait.UNKNOWN: 2})


def test_a_task_is_split_into_what_is_asked_and_what_is_paused() -> None:
    items = (TaskItem("ec2", ZERO_S, ZERO_S + 300, 300), TaskItem("rds", ZERO_S, ZERO_S + 600, 300))
    task = Task(task_id_of(TARGET, "rev", 0, items), TARGET, "rev", ZERO_S + 600, 0, "live", 0, items)
    now = datetime.fromtimestamp(ZERO_S, UTC)

    def parts(account: str, service: str) -> list[tuple[str, tuple[TaskItem, ...], int]]:
        found = split(task, Pauses.of([Pause(account, service, now, "")]))
        assert all(t.task_id == task_id_of(TARGET, "rev", 0, t.items) for t in found)
        return [(t.kind, t.items, t.tick_s) for t in found]

    stopped = split(
        task, Pauses.of([Pause(ALL, "rds", now, "")]), {(TARGET.account, "ec2"), ("other", "rds")}
    )
    assert [(t.kind, t.items) for t in stopped] == [("paused", items[1:]), ("budget", items[:1])]
    assert parts("other", ALL) == [("live", items, ZERO_S + 600)]
    assert parts(ALL, "rds") == [("live", items[:1], ZERO_S + 300), ("paused", items[1:], ZERO_S + 600)]
    assert parts(TARGET.account, ALL) == [("paused", items, ZERO_S + 600)]


# --- over any situation -----------------------------------------------------------------------------------------


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    numbers = draw(st.sets(st.integers(0, 120), min_size=1, max_size=12))
    where = [(TARGET, "ec2", EC2), (TARGET, "rds", RDS), (OTHER, "ec2", EC2), (NODES, "node", NODE)]
    some = []
    for n in numbers:
        target, service, grid = draw(st.sampled_from(where))
        status = draw(st.sampled_from(["", "failed", "forbidden", "partial", "complete"]))
        landed_s = draw(st.sampled_from([0, ZERO_S, LATER_S]))
        start_s = n * 300 // grid.poll_interval_s * grid.poll_interval_s
        some.append(
            window(start_s, target=target, service=service, grid=grid, landed_s=landed_s, status=status)
        )
    subset = st.lists(st.sampled_from(some), max_size=6)
    attempts = [attempt(w, n, draw(st.integers(0, BLOCK_S))) for n, w in enumerate(draw(subset), 1)]
    return Situation(
        now_s=LATER_S + draw(st.sampled_from([0, 3600, 16 * 86_400])),
        windows=some,
        attempts=attempts,
        pending=[Pending(task_of(w), draw(st.integers(ZERO_S, LATER_S))) for w in draw(subset)],
        unlanded=[unlanded(w, passed=draw(st.booleans())) for w in draw(subset)],
        heard_s=HEARD if draw(st.booleans()) else {TARGET: LATER_S},
        series={(TARGET, "ec2"): draw(st.integers(1, 60_000))},
        spent_usd=Decimal(draw(st.integers(0, 120))) / 100,
        pending_asks=draw(st.integers(0, ASKED_MAX + 1)),
    )


@given(known=situations())
def test_every_window_has_exactly_one_fate(known: Situation) -> None:
    decision = decide(known, RULES)
    tasks = (*decision.replays, *decision.again, *asked(decision))
    by_task = [
        any(
            t.target == w.target
            and any(
                i.service == w.service and i.start_s <= w.window.start_s and w.window.end_s <= i.end_s
                for i in t.items
            )
            for t in tasks
        )
        for w in known.windows
    ]
    # A task may span a window that waits for something else; none is in no task, not declared and not waiting.
    assert sum(by_task) + len(decision.declared) + sum(decision.waiting.values()) >= len(known.windows)
    assert sum(decision.waiting.values()) + len(decision.declared) <= len(known.windows)


@given(known=situations())
def test_no_decision_passes_a_bound(known: Situation) -> None:
    decision = decide(known, RULES)
    allowed = Decimal(str(RULES.heal.usd_per_day))
    assert sum((a.usd for a in decision.asks), known.spent_usd) <= max(allowed, known.spent_usd)
    assert len(decision.asks) + known.pending_asks <= max(ASKED_MAX, known.pending_asks)
    for ask in decision.asks:
        [item] = ask.task.items
        assert item.end_s - ask.block_start_s <= BLOCK_S
        assert (item.end_s - item.start_s) // EC2.period_s <= BLOCK_POINTS_MAX
        assert ask.task.kind == TaskKind.HEAL
        assert ask.task.target.source == "cloudwatch"


@given(numbers=st.sets(st.integers(0, 200), min_size=1, max_size=20), attempts_max=st.integers(1, 5))
def test_where_nothing_helps_it_ends_within_the_attempts_and_the_money(
    numbers: set[int], attempts_max: int
) -> None:
    rules = replace(RULES, heal=Heal(attempts_max=attempts_max, backoff_s=100, usd_per_day=0.05))
    left = {n: window(300 * n) for n in numbers}
    made: list[Attempt] = []
    spent: Counter[int] = Counter()
    # The blocks, their attempts with their rests, and days that wait for money: more than that it never takes.
    now_s = LATER_S + BLOCK_S * 7
    for _ in range(7 * attempts_max * 8):
        spent_usd = Decimal(spent[now_s // 86_400]) / 100
        known = Situation(now_s, list(left.values()), made, heard_s={TARGET: now_s}, spent_usd=spent_usd)
        decision = decide(known, rules)
        made += (made_by(a, now_s) for a in decision.asks)
        spent[now_s // 86_400] += len(decision.asks)  # a cent each: UNKNOWN_SERIES
        for one in decision.declared:
            del left[(one.window.window.start_s - ZERO_S) // 300]
        now_s += 6 * 3600
    assert not left
    assert max(spent.values()) <= 5
    for n in numbers:
        w = window(300 * n).window
        own = [a for a in made if a.start_s <= w.start_s and w.end_s <= a.end_s]
        assert len(own) == attempts_max
    assert len({(a.block_start_s, a.attempt) for a in made}) == len(made)


def made_by(ask: Ask, now_s: int) -> Attempt:
    [item] = ask.task.items
    target, number = ask.task.target, ask.task.attempt
    return Attempt(target, item.service, ask.block_start_s, item.start_s, item.end_s, number, now_s)


def test_declarations_are_told_by_stretch() -> None:
    some = [window(300 * i) for i in (0, 1, 2, 5)] + [window(0, service="rds", grid=RDS)]
    used_up = [attempt(w, n, 0) for w in some for n in (1, 2, 3)]
    told = stretches(decide(situation(*some, attempts=used_up), RULES).declared)
    assert [(s.service, s.start_s - ZERO_S, s.end_s - ZERO_S, s.windows) for s in told] == [
        ("ec2", 0, 900, 3),
        ("ec2", 1500, 1800, 1),
        ("rds", 0, 300, 1),
    ]
