"""The schedule's guarantees, each by its name in the module's docstring."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.model import Target, Task, TaskItem, TaskKind
from ingest.schedule import BLOCK_POINTS_MAX, LEAPS_MAX, Grid, Progress, blocks, due, grids_of, horizon
from shard_config.load import loads
from shard_config.model import Account, Config, ExpositionJob, ServiceProfile

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
NODES = Target("exposition", "lab", "local")
REVISION = "0011223344556677"
NOON_S = 1_767_268_800  # 2026-01-01T12:00:00Z
LOOKBACK_S = 3600

EC2 = Grid("ec2", poll_interval_s=300, period_s=60, settling_s=600)
NODE = Grid("node", poll_interval_s=30, period_s=30, settling_s=0, has_past=False)


def plan(
    grids: list[Grid], until_s: dict[str, int], now_s: int, lookback_s: int = LOOKBACK_S, stretch: int = 1
) -> list[Task]:
    """What is due, remembered in `until_s` as the coordinator does."""
    tasks = due(TARGET, grids, until_s, now_s, REVISION, lookback_s, {g.service: stretch for g in grids})
    for item in (item for task in tasks for item in task.items):
        until_s[item.service] = max(until_s.get(item.service, 0), item.end_s)
    return tasks


def items_of(tasks: list[Task], service: str) -> list[TaskItem]:
    return [item for task in tasks for item in task.items if item.service == service]


@st.composite
def grids(draw: st.DrawFn, name: str = "service", has_past: bool = True) -> Grid:
    period_s = draw(st.sampled_from([1, 10, 60, 300]))
    poll_interval_s = period_s * draw(st.sampled_from([1, 2, 5, 60]))
    settling_s = draw(st.integers(0, 5 * poll_interval_s)) if has_past else 0
    return Grid(name, poll_interval_s, period_s, settling_s, has_past)


@st.composite
def calls(draw: st.DrawFn, poll_interval_s: int) -> list[int]:
    """Times at which a coordinator asks: mostly a second or a poll apart, now and then after an outage."""
    gaps = st.one_of(
        st.integers(1, 3),
        st.integers(1, 2 * poll_interval_s),
        st.integers(1, 500 * poll_interval_s),
    )
    times = [NOON_S + draw(st.integers(0, poll_interval_s))]
    for gap in draw(st.lists(gaps, min_size=0, max_size=12)):
        times.append(times[-1] + gap)
    return times


@given(data=st.data())
def test_every_window_that_closed_is_planned_over_any_sequence_of_calls(data: st.DataObject) -> None:
    grid = data.draw(grids())
    times = data.draw(calls(grid.poll_interval_s))
    until_s: dict[str, int] = {}
    planned: set[tuple[int, int]] = set()
    for now_s in times:
        for item in items_of(plan([grid], until_s, now_s), grid.service):
            assert item.end_s <= now_s
            planned |= {(w.start_s, w.end_s) for w in item.windows()}
    first_s = grid.floor(times[0] - LOOKBACK_S)
    closed = range(first_s, grid.floor(times[-1]), grid.poll_interval_s)
    assert {(t, t + grid.poll_interval_s) for t in closed} <= planned
    assert all(start_s % grid.poll_interval_s == 0 for start_s, _ in planned)


@given(data=st.data())
def test_every_window_of_a_source_without_a_past_is_planned_exactly_once(data: st.DataObject) -> None:
    grid = data.draw(grids(has_past=False))
    times = data.draw(calls(grid.poll_interval_s))
    until_s: dict[str, int] = {}
    planned = Counter(
        w.start_s
        for now_s in times
        for item in items_of(plan([grid], until_s, now_s), grid.service)
        for w in item.windows()
    )
    expected = range(grid.floor(times[0]), times[-1] + 1, grid.poll_interval_s)
    assert planned == Counter(expected)


@given(data=st.data())
def test_each_window_is_looked_at_once_more_after_it_has_settled_before_it_is_left(
    data: st.DataObject,
) -> None:
    grid = data.draw(grids())
    times = data.draw(calls(grid.poll_interval_s))
    until_s: dict[str, int] = {}
    newest_look_s: dict[int, int] = {}
    for now_s in times:
        for item in items_of(plan([grid], until_s, now_s), grid.service):
            newest_look_s.update((w.end_s, now_s) for w in item.windows())
    # What the live task of the last call still covers is not left yet.
    left = {e: s for e, s in newest_look_s.items() if e + grid.lookback_s < grid.floor(times[-1])}
    assert all(look_s >= end_s + grid.settling_s for end_s, look_s in left.items())


@given(data=st.data())
def test_stretched_polls_cover_every_window_of_the_same_grid_and_once_more_after_it_has_settled(
    data: st.DataObject,
) -> None:
    grid = data.draw(grids())
    times = data.draw(calls(grid.poll_interval_s))
    rungs = data.draw(st.lists(st.sampled_from([1, 2, 3, 12, 24]), min_size=len(times), max_size=len(times)))
    until_s: dict[str, int] = {}
    newest_look_s: dict[int, int] = {}
    for now_s, k in zip(times, rungs, strict=True):
        for item in items_of(plan([grid], until_s, now_s, stretch=k), grid.service):
            assert item.start_s % grid.poll_interval_s == item.end_s % grid.poll_interval_s == 0
            assert item.end_s <= now_s
            newest_look_s.update((w.end_s, now_s) for w in item.windows())
    planned = until_s[grid.service]
    step_s = grid.poll_interval_s * rungs[-1]
    assert planned >= times[-1] // step_s * step_s
    first_s = min(grid.floor(times[0] - LOOKBACK_S), min(newest_look_s) - grid.poll_interval_s)
    expected = range(first_s + grid.poll_interval_s, planned + 1, grid.poll_interval_s)
    assert set(newest_look_s) == set(expected)
    left = {
        e: s
        for e, s in newest_look_s.items()
        if e + grid.lookback_s < planned - max(rungs) * grid.poll_interval_s
    }
    assert all(look_s >= end_s + grid.settling_s for end_s, look_s in left.items())


class Planner:
    """One that plans by a clock which may be wrong, and what it looked at by real time."""

    def __init__(self, grid: Grid, real_s: int, off_s: int = 0, until_s: int | None = None) -> None:
        self.grid = grid
        self.real_s = real_s
        self.off_s = self.last_off_s = off_s
        self.progress = Progress({} if until_s is None else {grid.service: until_s})
        self.looks: dict[int, list[int]] = defaultdict(list)
        """By a window's end, when it was looked at."""

    def tick(self, seconds: int = 0) -> list[Task]:
        self.real_s += seconds
        now_s = self.real_s + self.off_s
        self.progress.go_on_from([self.grid], now_s, self.off_s - self.last_off_s)
        self.last_off_s = self.off_s
        tasks = plan([self.grid], self.progress.until_s, now_s)
        for item in items_of(tasks, self.grid.service):
            for window in item.windows():
                self.looks[window.end_s].append(self.real_s)
        return tasks

    def run(self, seconds: int, each_s: int) -> list[Task]:
        return [task for _ in range(0, seconds, each_s) for task in self.tick(each_s)]

    @property
    def asked(self) -> int:
        return sum(map(len, self.looks.values()))


@given(data=st.data())
def test_a_clock_that_steps_costs_no_window_and_what_is_asked_again_is_bounded(data: st.DataObject) -> None:
    poll_s = data.draw(st.sampled_from([10, 60, 300]))
    grid = Grid("s", poll_s, 10, data.draw(st.integers(0, 4 * poll_s)))
    off_s = st.sampled_from([0, 0, 3, poll_s, 3600, 3601, 7200, 10_000, -60, -3600])
    each_s = poll_s // 2
    ahead_s = data.draw(st.sampled_from([0, 3600]))
    planner = Planner(grid, NOON_S, ahead_s)
    planner.tick()
    planner.run(data.draw(st.integers(0, 10)) * poll_s, each_s)
    steps, worst_s = 0, abs(ahead_s)
    # One that started ahead is right again before the time at which it started.
    planner.off_s = 0
    planner.tick(1)
    for planner.off_s in [*data.draw(st.lists(off_s, max_size=8)), 0]:
        steps += planner.off_s != planner.last_off_s
        worst_s = max(worst_s, abs(planner.off_s))
        # Now and then it does not plan for a while, because Kafka is away: no step.
        planner.tick(data.draw(st.sampled_from([0, 1, poll_s, 4000])))
        planner.run(data.draw(st.integers(0, 10)) * poll_s, each_s)
    planner.run(grid.lookback_s + 4 * poll_s, each_s)
    ended = range(grid.floor(NOON_S), planner.real_s - grid.lookback_s - 2 * poll_s, poll_s)
    assert [e for e in ended if max(planner.looks[e], default=0) < e + grid.settling_s] == []
    run_s = planner.real_s - NOON_S + LOOKBACK_S
    polled = (run_s // poll_s + 1) * (grid.lookback_s // poll_s + 2)
    again = (run_s + 2 * worst_s + grid.block_s) // poll_s + grid.lookback_s // poll_s + 2
    assert planner.asked <= polled + steps * 2 * again


def after_an_hour_ahead(for_s: int, each_s: int) -> Planner:
    """Its clock was right for an hour, then an hour ahead for so long, and is right again."""
    planner = Planner(EC2, NOON_S)
    planner.run(3600, 60)
    planner.off_s = 3600
    planner.run(for_s, each_s)
    planner.off_s = 0
    return planner


def test_what_was_planned_by_a_clock_that_was_an_hour_ahead_for_three_is_in_the_next_look() -> None:
    planner = after_an_hour_ahead(3 * 3600, 60)
    [live] = planner.tick(300)
    assert live.kind == TaskKind.LIVE
    assert live.items[0].start_s == NOON_S + 3600 - EC2.lookback_s
    assert live.items[0].end_s == NOON_S + 4 * 3600 + 300
    assert [t.kind for t in planner.run(3600, 60)] == [TaskKind.LIVE] * 12


@pytest.mark.parametrize("back_s", [1, 30, 600])
def test_after_an_outage_a_step_back_plans_no_hours_again(back_s: int) -> None:
    planner = Planner(EC2, NOON_S)
    planner.tick()
    planner.run(3600, 60)
    planner.tick(6 * 3600)  # Kafka was away
    before = planner.asked
    planner.off_s = -back_s
    planner.run(900, 60)
    assert planner.asked - before <= 5 * (EC2.lookback_s // EC2.poll_interval_s + 1)


def test_a_restart_whose_memory_is_of_a_clock_that_was_ahead_looks_at_one_block_again_at_the_price_of_a_poll() -> (
    None
):
    planner = Planner(EC2, NOON_S + 10, until_s=NOON_S + 3600)
    [live] = planner.tick()
    assert (live.kind, live.items[0].start_s, live.items[0].end_s) == (
        TaskKind.LIVE,
        NOON_S - EC2.block_s,
        NOON_S,
    )
    assert [t.kind for t in planner.run(7200, 60)] == [TaskKind.LIVE] * 24


def test_a_restart_amid_an_hour_that_the_clock_is_ahead_costs_no_window_either() -> None:
    before = Planner(EC2, NOON_S)
    before.run(3600, 60)
    before.off_s = 3600
    before.run(900, 60)
    planner = Planner(EC2, before.real_s, off_s=3600, until_s=before.progress.until_s["ec2"])
    planner.run(900, 60)
    planner.off_s = 0
    [live] = planner.tick(60)
    assert live.items[0].start_s == EC2.floor(planner.real_s) - EC2.block_s < NOON_S + 3600 - EC2.lookback_s
    assert [t.kind for t in planner.run(3600, 60)] == [TaskKind.LIVE] * 12


def test_one_that_started_while_its_clock_was_ahead_goes_on_from_its_memory_when_it_steps_back() -> None:
    planner = Planner(EC2, NOON_S, off_s=3600, until_s=NOON_S - 1800)
    planner.run(600, 60)
    planner.off_s = 0
    [live] = planner.tick(300)
    assert live.items[0].start_s == NOON_S - 1800 - EC2.lookback_s
    assert live.items[0].end_s == NOON_S + 900


def test_leaps_that_are_not_taken_back_are_bounded_and_the_oldest_is_kept() -> None:
    planner = Planner(EC2, NOON_S)
    planner.tick()
    for n in range(1, 3 * LEAPS_MAX):
        planner.off_s = n * 60
        planner.tick(300)
    planner.off_s = 0
    [live, *_] = tasks = planner.tick(300)
    assert min(i.start_s for t in tasks for i in t.items) <= NOON_S
    assert live.items[0].end_s == EC2.floor(planner.real_s)


def test_a_clock_that_is_behind_now_and_then_has_no_hour_planned_twice() -> None:
    planner = Planner(EC2, NOON_S)
    planner.run(3600, 60)
    for back_s in (3600, 3600, 1800):
        for planner.off_s in (-back_s // 2, -back_s, 0):
            tasks = planner.run(60, 60)
        planned_s = EC2.floor(planner.real_s - 180)
        assert all(i.start_s >= planned_s - EC2.lookback_s for t in tasks for i in t.items)
        [live] = planner.tick(300)
        assert live.items[0].start_s >= planned_s - EC2.lookback_s


def test_one_that_was_ahead_since_its_start_remembers_the_next_leap_all_the_same() -> None:
    planner = Planner(EC2, NOON_S, off_s=3600)
    planner.run(7200, 60)
    planner.off_s = 0  # of that it knows nothing: healing does the rest
    planner.run(7200, 60)
    right_s = planner.real_s
    for planner.off_s in (3600, 0):
        tasks = planner.run(900, 60)
    assert min(i.start_s for t in tasks for i in t.items) == right_s - EC2.lookback_s


def test_a_leap_that_was_not_taken_back_for_a_day_was_none() -> None:
    planner = after_an_hour_ahead(25 * 3600, 300)
    before_s = planner.real_s
    tasks = planner.run(3600, 60)
    assert min(i.start_s for t in tasks for i in t.items) >= before_s - EC2.lookback_s


def test_relaxing_a_stretch_is_one_look_though_it_is_more_than_a_calls_worth() -> None:
    grid = Grid("ec2", poll_interval_s=1800, period_s=60, settling_s=600)
    until_s = {"ec2": NOON_S - 11 * 1800}
    [live] = due(TARGET, [grid], until_s, NOON_S, REVISION, LOOKBACK_S, {}, 12)
    assert (live.kind, live.items[0].start_s) == (TaskKind.LIVE, NOON_S - 12 * 1800)
    assert len(due(TARGET, [grid], until_s, NOON_S, REVISION, LOOKBACK_S, {}, 1)) > 1


def test_a_stretched_poll_is_one_look_at_all_since_the_last_one() -> None:
    until_s = {"ec2": NOON_S}
    looks = [
        (now_s - NOON_S, i.start_s - NOON_S, i.end_s - NOON_S)
        for now_s in range(NOON_S + 1, NOON_S + 7200, 60)
        for i in items_of(plan([EC2], until_s, now_s, stretch=12 if now_s < NOON_S + 5000 else 1), "ec2")
    ]
    assert looks[:2] == [(3601, -600, 3600), (5041, 3000, 4800)]
    assert {end - start for _, start, end in looks[2:]} == {900}


@given(data=st.data())
def test_the_same_question_is_the_same_task_for_whoever_asks(data: st.DataObject) -> None:
    grid = data.draw(grids())
    now_s = NOON_S + data.draw(st.integers(0, 10**6))
    until_s = data.draw(st.none() | st.integers(0, 900).map(lambda n: grid.floor(now_s - n * 60)))
    memory = {} if until_s is None else {grid.service: until_s}
    later_s = data.draw(st.integers(now_s, grid.floor(now_s) + grid.poll_interval_s - 1))
    mine = due(TARGET, [grid], memory, now_s, REVISION, 0)
    theirs = due(TARGET, [grid], memory, later_s, REVISION, 0)
    assert [t.task_id for t in mine] == [t.task_id for t in theirs]


def test_one_that_forgot_plans_the_same_whole_blocks_as_one_that_remembers() -> None:
    remembers = due(TARGET, [EC2], {"ec2": NOON_S - 5 * 86_400}, NOON_S, REVISION, LOOKBACK_S)
    forgot = due(TARGET, [EC2], {}, NOON_S, REVISION, 5 * 86_400)
    # They differ at most in the oldest block, which begins where each resumes.
    assert {t.task_id for t in remembers[:-1]} <= {t.task_id for t in forgot}


def test_a_task_that_asks_for_something_else_has_another_id() -> None:
    base = due(TARGET, [EC2], {}, NOON_S, REVISION, 0)[0].task_id
    assert base != due(TARGET, [EC2], {}, NOON_S, "ffffffffffffffff", 0)[0].task_id
    assert base != due(TARGET, [EC2], {}, NOON_S + 300, REVISION, 0)[0].task_id
    assert base != due(NODES, [EC2], {}, NOON_S, REVISION, 0)[0].task_id


@given(data=st.data())
def test_an_outage_is_paid_for_in_blocks_of_one_calls_worth(data: st.DataObject) -> None:
    grid = data.draw(grids())
    windows = data.draw(st.integers(2, 3000))
    until_s = {grid.service: NOON_S - windows * grid.poll_interval_s}
    live, *overdue = plan([grid], until_s, NOON_S)
    assert live.kind == TaskKind.LIVE
    assert live.items[0].end_s == grid.floor(NOON_S)
    lengths = [i.end_s - i.start_s for task in overdue for i in task.items]
    for length_s in lengths:
        assert length_s <= grid.block_s
        assert length_s // grid.period_s <= max(BLOCK_POINTS_MAX, grid.poll_interval_s // grid.period_s)
    # Only the oldest and the newest block may be partial.
    assert all(length_s == grid.block_s for length_s in lengths[1:-1])
    assert [t.tick_s for t in overdue] == sorted((t.tick_s for t in overdue), reverse=True)
    assert {t.kind for t in overdue} <= {TaskKind.BACKLOG}


def test_inner_cuts_of_blocks_are_multiples_of_the_block_length() -> None:
    cuts = blocks(EC2, NOON_S - 2 * 86_400, NOON_S)
    assert [c.start_s % EC2.block_s for c in cuts[:-1]] == [0] * (len(cuts) - 1)
    assert (cuts[0].end_s, cuts[-1].start_s) == (NOON_S, NOON_S - 2 * 86_400)


def test_a_first_start_plans_the_lookback_and_nothing_before() -> None:
    tasks = due(TARGET, [EC2], {}, NOON_S, REVISION, LOOKBACK_S)
    assert [(t.kind, t.items[0].start_s - NOON_S, t.items[0].end_s - NOON_S) for t in tasks] == [
        (TaskKind.LIVE, -900, 0),
        (TaskKind.BACKLOG, -3600, -900),
    ]


def test_nothing_is_due_twice_within_one_interval() -> None:
    until_s: dict[str, int] = {}
    assert plan([EC2, NODE], until_s, NOON_S) != []
    assert plan([EC2, NODE], until_s, NOON_S + 29) == []


def test_services_that_are_due_at_one_time_share_one_live_task() -> None:
    rds = Grid("rds", poll_interval_s=60, period_s=60, settling_s=120)
    live = due(TARGET, [EC2, rds], {}, NOON_S + 61, REVISION, 0)[0]
    assert [(i.service, i.start_s - NOON_S, i.end_s - NOON_S) for i in live.items] == [
        ("ec2", -900, 0),
        ("rds", -120, 60),
    ]
    assert live.tick_s == NOON_S + 60


def test_a_memory_that_is_off_the_grid_is_resumed_on_the_grid() -> None:
    # The poll interval was 60 s and is 300 s now; then the coordinator was away.
    tasks = due(TARGET, [EC2], {"ec2": NOON_S - 7200 + 60}, NOON_S, REVISION, LOOKBACK_S)
    assert min(i.start_s for i in items_of(tasks, "ec2")) <= NOON_S - 7200
    assert all(i.start_s % 300 == i.end_s % 300 == 0 for i in items_of(tasks, "ec2"))
    tasks = due(NODES, [NODE], {"node": NOON_S - 310}, NOON_S, REVISION, LOOKBACK_S)
    assert [i.start_s - NOON_S for i in items_of(tasks, "node")] == [0, -330]


def test_a_window_without_a_past_expires_at_its_end_and_a_missed_one_has_expired() -> None:
    now, missed = due(NODES, [NODE], {"node": NOON_S - 90}, NOON_S + 7, REVISION, 0)
    assert (now.kind, now.items[0].start_s, now.expires_s) == (TaskKind.LIVE, NOON_S, NOON_S + 30)
    assert (missed.kind, missed.items[0].start_s, missed.expires_s) == (
        TaskKind.BACKLOG,
        NOON_S - 90,
        NOON_S,
    )


def test_a_cloudwatch_task_never_expires() -> None:
    assert {t.expires_s for t in due(TARGET, [EC2], {}, NOON_S, REVISION, LOOKBACK_S)} == {0}


@given(data=st.data())
def test_a_horizon_looks_once_at_every_window_that_it_touches_oldest_first(data: st.DataObject) -> None:
    grid = data.draw(grids())
    from_s = NOON_S + data.draw(st.integers(0, 10**5))
    to_s = from_s + data.draw(st.integers(1, 10**5))
    tasks = horizon(TARGET, [grid], from_s, to_s, REVISION)
    starts = [w.start_s for t in tasks for i in t.items for w in i.windows()]
    assert starts == list(range(grid.floor(from_s), grid.ceil(to_s), grid.poll_interval_s))


@pytest.mark.parametrize(("settling_s", "lookback_s"), [(0, 0), (1, 300), (299, 300), (300, 300), (301, 600)])
def test_the_lookback_is_the_settling_time_rounded_up_to_windows(settling_s: int, lookback_s: int) -> None:
    assert Grid("s", 300, 60, settling_s).lookback_s == lookback_s


def test_a_configuration_has_every_account_and_region_with_its_services_and_jobs() -> None:
    config = Config(
        accounts=(Account(id="123456789012", regions=("us-east-1", "eu-west-1"), services=("sqs", "ec2")),),
        exposition=(
            ExpositionJob(name="node", account="lab", region="local", endpoints=("http://a:1/metrics",)),
            ExpositionJob(
                name="gpu", account="lab", region="local", interval_s=15, endpoints=("http://a:2/m",)
            ),
        ),
        services=(
            ServiceProfile(service="ec2", namespace="AWS/EC2", poll_interval_s=300, settling_s=600),
            ServiceProfile(service="sqs", namespace="AWS/SQS", poll_interval_s=60, settling_s=0),
        ),
    )
    sqs = Grid("sqs", 60, 60, 0)
    assert grids_of(config) == {
        Target("cloudwatch", "123456789012", "eu-west-1"): (EC2, sqs),
        Target("cloudwatch", "123456789012", "us-east-1"): (EC2, sqs),
        NODES: (Grid("gpu", 15, 15, 0, has_past=False), NODE),
    }


def test_a_service_of_some_regions_is_planned_in_those_alone() -> None:
    config = loads(
        """
        accounts: [{id: "123456789012", regions: [eu-west-1, us-east-1], services: [ec2, cloudfront]}]
        services: {cloudfront: {regions: [us-east-1]}}
        """,
        "test",
        environ={},
    )
    assert {t.region: [g.service for g in grids] for t, grids in grids_of(config).items()} == {
        "eu-west-1": ["ec2"],
        "us-east-1": ["cloudfront", "ec2"],
    }
