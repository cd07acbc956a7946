"""What a backfill plans, what it costs, and when it does not begin."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from ingest.backfill import DROPPED, KnownLook, Means, Stretch, Survey, reach_s, tasks_of, windows_by_service
from ingest.clock import ManualClock
from ingest.errors import HeadgateError
from ingest.model import Target, Task, TaskItem, TaskKind, Window
from ingest.pauses import Pause, Pauses
from ingest.replay import Scope
from ingest.replay_cost import PAUSED, replay_cost, without_paused
from ingest.schedule import Grid
from shard_config.load import loads
from shard_config.model import retention_s
from shard_config.price import Prices
from shard_config.price_list import PriceList
from tests.replay_scene import config_text
from tests.test_ledger import Store, ledger_database, receipt_of, store
from workers.backfill import asked_of, register
from workers.backfill_asking import unanswered
from workers.backfill_plan import Ask
from workers.pace import LIVE_LAG_MAX, YIELD_MAX_S, Pace
from workers.setup import setup

__all__ = ["ledger_database", "store"]  # the fixtures

ROOT = Path(__file__).resolve().parent.parent
TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
EC2 = Grid("ec2", 300, 60, 600)
NOW_S = 1_795_478_400
DAY_S = 86_400
FROM_S = NOW_S - 3600


def look(start_s: int, end_s: int, **changes: object) -> KnownLook:
    """A complete look, archived, with 10 points a window and 40 metrics billed."""
    whole = KnownLook(TARGET, "ec2", start_s, end_s, end_s * 1000, True, True, 1, (end_s - start_s) // 30, 40)
    return replace(whole, **changes)  # type: ignore[arg-type]


def plan(
    *looks: KnownLook,
    landed: tuple[int, int] | None = None,
    kept_since_ms: int | None = 0,
    from_s: int = FROM_S,
    to_s: int = NOW_S,
    grid: Grid = EC2,
    via: Means | None = None,
) -> list[tuple[Means, int, int]]:
    return [(s.means, s.start_s, s.end_s) for s in stretches(*looks, landed=landed, kept_since_ms=kept_since_ms, from_s=from_s, to_s=to_s, grid=grid, via=via)]  # fmt: skip


def stretches(
    *looks: KnownLook,
    landed: tuple[int, int] | None,
    kept_since_ms: int | None,
    from_s: int,
    to_s: int,
    grid: Grid,
    via: Means | None,
) -> tuple[Stretch, ...]:
    survey = Survey(Scope(from_s, to_s), kept_since_ms)
    survey.expect({TARGET: (grid,)}, NOW_S)
    for one in looks:
        survey.look(one)
    if landed:
        survey.landed(TARGET, "ec2", *landed)
    return survey.plan(via, NOW_S, Prices())


# --- which source -------------------------------------------------------------------------------------------------


def test_a_window_that_landed_is_left_alone() -> None:
    assert plan(look(FROM_S, NOW_S), landed=(FROM_S, NOW_S)) == [(Means.THERE, FROM_S, NOW_S)]


def test_kafka_comes_before_the_archive_and_both_before_money() -> None:
    middle_s = NOW_S - 1800
    assert plan(
        look(FROM_S, FROM_S + 900),
        look(middle_s, NOW_S),
        kept_since_ms=middle_s * 1000,
    ) == [
        (Means.S3, FROM_S, FROM_S + 900),
        (Means.CLOUDWATCH, FROM_S + 900, middle_s),
        (Means.KAFKA, middle_s, NOW_S),
    ]


def test_a_window_of_which_kafka_holds_some_looks_only_comes_whole_from_the_archive() -> None:
    early = look(FROM_S, NOW_S, started_at_ms=0)
    assert plan(early, look(FROM_S, NOW_S), kept_since_ms=1) == [(Means.S3, FROM_S, NOW_S)]


def test_an_empty_window_needs_nothing() -> None:
    assert plan(look(FROM_S, NOW_S, batches=0, points=0)) == [(Means.THERE, FROM_S, NOW_S)]


def test_a_look_that_left_out_all_is_not_empty_and_stands_on_the_looks_before_it() -> None:
    whole = look(FROM_S, NOW_S, batches=0, points=0, seen=120)
    assert plan(whole) == [(Means.CLOUDWATCH, FROM_S, NOW_S)]  # nobody knows where what it left out is
    assert plan(replace(whole, held=1), kept_since_ms=None) == [(Means.S3, FROM_S, NOW_S)]
    before = look(FROM_S, NOW_S)
    kept_since_ms = FROM_S * 1000
    assert plan(before, replace(whole, held=1), kept_since_ms=kept_since_ms) == [(Means.KAFKA, FROM_S, NOW_S)]
    assert plan(before, whole, kept_since_ms=kept_since_ms + 1) == [(Means.S3, FROM_S, NOW_S)]


def test_what_failed_in_part_is_asked_again_while_the_source_has_it_and_else_taken_as_it_is() -> None:
    partial = look(FROM_S, NOW_S, complete=False)
    assert plan(partial) == [(Means.CLOUDWATCH, FROM_S, NOW_S)]
    old_s = NOW_S - 20 * DAY_S
    assert plan(replace(partial, start_s=old_s, end_s=old_s + 300), from_s=old_s, to_s=old_s + 300) == [
        (Means.KAFKA, old_s, old_s + 300)
    ]


def test_each_window_is_asked_at_the_finest_period_that_cloudwatch_still_keeps() -> None:
    minutes_s, fives_s, hours_s = (NOW_S - days * DAY_S for days in (15, 63, 455))
    found = stretches(
        look(minutes_s + 600, minutes_s + 900),
        landed=None, kept_since_ms=0, from_s=hours_s - 600, to_s=minutes_s + 900, grid=EC2, via=None,
    )  # fmt: skip
    assert [(s.means, s.start_s, s.end_s, s.period_s) for s in found] == [
        (Means.NOWHERE, hours_s - 600, hours_s, 0),
        (Means.CLOUDWATCH, hours_s, fives_s, 3600),
        (Means.CLOUDWATCH, fives_s, minutes_s, 300),
        (Means.CLOUDWATCH, minutes_s, minutes_s + 600, 60),
        (Means.KAFKA, minutes_s + 600, minutes_s + 900, 0),
    ]
    assert "CloudWatch keeps 3600 s for 455 days" in found[0].detail
    assert "at 300 s, as series of their own" in found[2].detail
    # Ten points a window of 300 s at 60 s, two at 300 s, and a sixth of one at 3600 s; a call brings 201 points a series.
    assert [s.points for s in found] == [0, 392 * DAY_S // 300 * 10 // 60, 48 * DAY_S // 300 * 2, 20, 10]
    calls = [-(-48 * DAY_S // (201 * 300)), 1]
    assert found[2].usd in {Decimal(40 * (calls[0] + more)) / 100_000 for more in (0, 1)}
    assert found[3].usd == Decimal(40) / 100_000


def test_the_tasks_of_a_coarser_period_say_so_and_are_whole_periods() -> None:
    from_s = NOW_S - 100 * DAY_S + 600
    found = stretches(
        landed=None, kept_since_ms=0, from_s=from_s, to_s=from_s + 2 * DAY_S, grid=EC2, via=None
    )
    tasks = tasks_of(found, {TARGET: (EC2,)}, "r", "0" * 32, 0)
    items = [i for task in tasks for i in task.items]
    assert {i.period_s for i in items} == {3600}
    assert all(i.start_s % 3600 == 0 and i.end_s % 3600 == 0 and i.grid_s == 300 for i in items)
    assert (items[0].start_s, items[-1].end_s) == (from_s - 600, from_s + 2 * DAY_S + 3000)
    assert all(a.end_s == b.start_s for a, b in pairwise(items))


def test_a_window_that_no_coarser_period_fits_is_not_asked_past_its_own() -> None:
    odd = Grid("odd", 420, 60, 0)
    assert odd.periods_s == (60,)
    assert odd.kept_period_s(NOW_S - 16 * DAY_S, NOW_S) is None
    assert Grid("s3", DAY_S, DAY_S, 4 * DAY_S).periods_s == (DAY_S,)
    assert Grid("fine", 60, 1, 0).periods_s == (1, 60, 300, 3600)


def test_windows_of_days_that_the_store_has_dropped_are_neither_read_nor_asked_for() -> None:
    days_s = NOW_S - 2 * DAY_S
    survey = Survey(Scope(days_s - 600, days_s + 600), 0, dropped_before_s=days_s)
    survey.expect({TARGET: (EC2,)}, NOW_S)
    survey.landed(TARGET, "ec2", days_s - 600, days_s - 300)
    survey.look(look(days_s - 300, days_s))
    for via in (None, Means.CLOUDWATCH):
        found = survey.plan(via, NOW_S, Prices())
        assert [(s.means, s.start_s, s.end_s, s.detail) for s in found] == [
            (Means.NOWHERE, days_s - 600, days_s, DROPPED),
            (Means.CLOUDWATCH, days_s, days_s + 600, "at 60 s"),
        ]
        assert (found[0].points, found[0].usd) == (0, Decimal())
    assert "samples_retention_days" in DROPPED
    assert survey.unknown() == {TARGET: Window(days_s, days_s + 600)}


def test_recorded_data_never_grows_too_old() -> None:
    survey = Survey(Scope(0, 600), 0, keeps_all=True)
    survey.expect({TARGET: (EC2,)}, NOW_S)
    assert [s.means for s in survey.plan(None, NOW_S, Prices())] == [Means.CLOUDWATCH]


def test_an_endpoint_without_a_past_is_replayed_and_never_asked() -> None:
    node = Grid("ec2", 30, 30, 0, has_past=False)
    assert plan(look(FROM_S, FROM_S + 60), grid=node) == [(Means.KAFKA, FROM_S, FROM_S + 60)]


def test_what_has_not_ended_is_not_planned() -> None:
    assert plan(to_s=NOW_S + DAY_S) == [(Means.CLOUDWATCH, FROM_S, NOW_S)]


def test_via_cloudwatch_asks_for_everything_again() -> None:
    assert plan(look(FROM_S, NOW_S), landed=(FROM_S, NOW_S), via=Means.CLOUDWATCH) == [
        (Means.CLOUDWATCH, FROM_S, NOW_S)
    ]


def test_dollars_are_what_the_newest_look_was_billed_for_each_block() -> None:
    found = stretches(
        look(FROM_S, FROM_S + 300), look(FROM_S + 300, FROM_S + 600, metrics_billed=50),
        landed=None, kept_since_ms=0, from_s=NOW_S - DAY_S, to_s=NOW_S, grid=EC2, via=Means.CLOUDWATCH,
    )  # fmt: skip
    blocks = -(-DAY_S // EC2.block_s)
    assert found[0].usd is not None
    assert blocks <= found[0].usd / (50 * Decimal("0.01") / 1000) <= blocks + 1
    assert found[0].points == 10 * DAY_S // 300


def test_where_nobody_was_asked_before_neither_points_nor_dollars_are_made_up() -> None:
    (only,) = stretches(landed=None, kept_since_ms=0, from_s=FROM_S, to_s=NOW_S, grid=EC2, via=None)
    assert (only.points, only.usd) == (None, None)


# --- tasks --------------------------------------------------------------------------------------------------------


def gap() -> tuple[Stretch, ...]:
    return stretches(landed=None, kept_since_ms=0, from_s=FROM_S, to_s=NOW_S, grid=EC2, via=None)


def test_the_same_backfill_makes_the_same_tasks_and_another_revision_others() -> None:
    def ids(backfill_id: str, revision: int) -> list[str]:
        return [t.task_id for t in tasks_of(gap(), {TARGET: (EC2,)}, "c" * 16, backfill_id, revision)]

    assert ids("0" * 16, 0) == ids("0" * 16, 0)
    assert len({*ids("0" * 16, 0), *ids("1" + "0" * 15, 0), *ids("0" * 16, 1)}) == 3 * len(ids("0" * 16, 0))


def test_tasks_are_backlog_cover_exactly_the_gap_and_never_expire() -> None:
    tasks = tasks_of(gap(), {TARGET: (EC2,)}, "c" * 16, "f" * 16, 5)
    asked = sorted(w for t in tasks for i in t.items for w in i.windows())
    assert asked == [Window(s, s + 300) for s in range(FROM_S, NOW_S, 300)]
    assert {(t.kind, t.expires_s, t.revision) for t in tasks} == {(TaskKind.BACKLOG, 0, 5)}
    assert all(1 << 30 <= t.attempt < 1 << 31 for t in tasks)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_backfill_that_was_stopped_asks_for_what_is_left_also_at_different_periods(share: float) -> None:
    """Some tasks have landed; a quarter of an hour later the same command plans again."""
    scope, grids = Scope(NOW_S - 70 * DAY_S, NOW_S), {TARGET: (EC2,)}

    def plan_at(now_s: int, landed: Sequence[TaskItem]) -> list[Task]:
        survey = Survey(scope, 0)
        survey.expect(grids, now_s)
        for item in landed:
            survey.landed(TARGET, item.service, item.start_s, item.end_s)
        return tasks_of(survey.plan(None, now_s, Prices()), grids, "c" * 16, "f" * 16, 0)

    first = plan_at(NOW_S, ())
    items = [item for task in first for item in task.items]
    assert [p for p, _ in groupby(item.period_s or 60 for item in items)] == [3600, 300, 60]
    done = items[: int(len(items) * share)]

    left = plan_at(NOW_S + 900, done)

    known = {task.task_id for task in first[: len(done)]}
    assert not known & {task.task_id for task in left}
    asked = [(w, item.period_s or 60) for task in left for item in task.items for w in item.windows()]
    covered = {w for item in done for w in item.windows()} | {w for w, _ in asked}
    assert covered >= {Window(s, s + 300) for s in range(scope.from_s, scope.to_s, 300)}
    again = {w for item in done for w in item.windows()} & {w for w, _ in asked}
    assert len(again) <= 3600 // 300, "but for the rest of an hour that is asked for whole"
    for window, period_s in asked:
        assert window.start_s >= NOW_S + 900 - retention_s(period_s) - period_s
    # What has not been asked at all is asked by the very same tasks, so that one under way is met, not doubled.
    same = {task.task_id for task in left} & {task.task_id for task in first}
    assert len(first) - len(done) - len(same) <= 4, (
        "two edges of retention have moved on, each between two tasks"
    )


async def test_what_was_asked_at_one_period_is_not_asked_again_at_another(store: Store) -> None:
    """With --via cloudwatch all windows are asked for; the edges of retention have moved on since it was stopped."""
    scope, grids = Scope(NOW_S - 15 * DAY_S - 70_000, NOW_S - 15 * DAY_S + 30_000), {TARGET: (EC2,)}

    def plan_at(now_s: int, backfill_id: str = "f" * 16) -> list[Task]:
        survey = Survey(scope, 0)
        survey.expect(grids, now_s)
        found = survey.plan(Means.CLOUDWATCH, now_s, Prices())
        return tasks_of(found, grids, "c" * 16, backfill_id, 0)

    first = plan_at(NOW_S)
    assert [i.period_s for t in first for i in t.items] == [300, 300, 0, 0, 0]
    answered = first[:3]
    await store.project(*first)
    await store.project(*(receipt_of(t, observed_s=NOW_S, counts=[], batches=[]) for t in answered))
    await store.fold()

    left = await unanswered(store.sql, plan_at(NOW_S + 900))

    assert left == first[3:]
    other = plan_at(NOW_S, "0" * 16)
    assert await unanswered(store.sql, other) == other


def test_stretches_of_one_means_are_what_a_scope_takes() -> None:
    found = windows_by_service(gap(), Means.CLOUDWATCH)
    assert found == {(TARGET, "ec2"): (Window(FROM_S, NOW_S),)}
    assert windows_by_service(gap(), Means.S3) == {}


def test_a_task_that_looked_at_a_window_is_within_reach_of_it() -> None:
    assert reach_s([EC2]) >= EC2.block_s + EC2.poll_interval_s
    assert reach_s([]) > 0


# --- pace ---------------------------------------------------------------------------------------------------------


class Live:
    """Live consumers: how far they are behind at each look, and whether they move."""

    def __init__(self, *lags: int, moving: bool = True) -> None:
        self._lags = list(lags)
        self._moving = moving
        self.looks = 0

    async def __call__(self) -> tuple[int, int]:
        self.looks += 1
        lag = self._lags.pop(0) if len(self._lags) > 1 else self._lags[0]
        return lag, self.looks if self._moving else 0


async def test_a_rate_is_kept() -> None:
    clock = ManualClock(NOW_S)
    pace = Pace(1000, Live(0), clock)
    for _ in range(11):
        await pace.before_landing()
        pace.landed(1, 500)
    assert clock.monotonic_s() == pytest.approx(4.0, abs=1.01)


def test_a_landing_is_about_a_second_of_the_rate() -> None:
    pace = Pace(1000, Live(0), ManualClock(NOW_S))
    assert pace.records_at_once(128) == 8  # nothing is known of records yet
    pace.landed(8, 4000)
    assert pace.records_at_once(128) == 2
    pace.landed(1, 10**6)
    assert pace.records_at_once(128) == 1
    assert Pace(0, Live(0), ManualClock(NOW_S)).records_at_once(128) == 128


async def test_it_waits_while_live_consumers_are_behind() -> None:
    clock = ManualClock(NOW_S)
    pace = Pace(0, Live(*[LIVE_LAG_MAX + 1] * 7, 0), clock)
    await pace.before_landing()
    assert clock.monotonic_s() == 7.0


async def test_it_does_not_wait_for_ever_for_consumers_that_are_not_there() -> None:
    clock = ManualClock(NOW_S)
    pace = Pace(0, Live(10**6, moving=False), clock)
    await pace.before_landing()
    waited_s = clock.monotonic_s()
    assert waited_s == pytest.approx(YIELD_MAX_S, abs=2)
    clock.advance(60)
    await pace.before_landing()
    assert clock.monotonic_s() == waited_s + 60


# --- the command line ---------------------------------------------------------------------------------------------


def ask_for(*options: str) -> Ask:
    """What the options ask for, by way of the parser."""
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    return asked_of(parser.parse_args(["backfill", "--from", str(FROM_S), *options]), NOW_S)


def test_the_id_is_of_what_is_asked_for_not_of_how_fast() -> None:
    assert ask_for("--rate", "5").backfill_id == ask_for("--rate", "7", "--to", str(NOW_S)).backfill_id
    others = [
        (),
        ("--via", "s3"),
        ("--account", "1"),
        ("--service", "ec2"),
        ("--rebuild",),
        ("--into", "null"),
    ]
    assert len({ask_for(*o).backfill_id for o in others}) == len(others)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "0"), "not before"),
        (("--into", "elsewhere"), "no sink is called"),
        (("--revision", "3"), "--via cloudwatch"),
        (("--via", "cloudwatch", "--revision", "128"), "0..127"),
        (("--via", "cloudwatch", "--into", "null"), "live store"),
        (("--part", "1/2"), "--via kafka"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_what_to_do(options: tuple[str, ...], said: str) -> None:
    with pytest.raises(HeadgateError, match=said):
        ask_for(*options)


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
async def command(
    tmp_path: Path, kafka_bootstrap: str, topic_prefix: str, database: str, s3_endpoint: str, bucket: str
) -> Command:
    """`headgate backfill` on an installation that has never collected anything, with nobody at the terminal."""
    text = config_text(kafka_bootstrap, topic_prefix, database, s3_endpoint, bucket)
    await setup(loads(text, "test.yaml", environ={}))
    path = tmp_path / "headgate.yaml"
    path.write_text(text)

    def headgate(*options: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "workers.cli", "backfill", "--config", str(path), *options]
        return subprocess.run(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )

    return headgate


def test_nothing_is_paid_for_where_nobody_can_be_asked(command: Command) -> None:
    now_s = int(time.time())
    refused = command("--from", str(now_s - 3600))
    assert refused.returncode == 2, refused.stderr
    assert "cloudwatch at 60 s" in refused.stdout
    assert "--yes" in refused.stderr

    shown = command("--from", "3600", "--to", "7200", "--dry-run", "--json")
    assert shown.returncode == 0, shown.stderr
    printed = json.loads(shown.stdout)
    assert {s["means"] for s in printed["stretches"]} == {"nowhere"}
    assert printed["done"] is None


# --- what reading costs, and pauses -------------------------------------------------------------------------------


def test_a_replay_of_s3_is_a_get_for_each_poll_and_a_list_for_each_day() -> None:
    """30 days of 300 s are 8,640 objects a target, a day of them one page; of 60 s 43,200 and two pages a day."""
    grids = {
        TARGET: (EC2, replace(EC2, service="s3", poll_interval_s=DAY_S)),
        Target("cloudwatch", "1" * 12, "r"): (replace(EC2, poll_interval_s=60),),
    }
    cost = replay_cost(grids, NOW_S - 30 * DAY_S, NOW_S, 0, PriceList())
    assert NOW_S % DAY_S == 0
    assert (cost.gets, cost.lists) == (8_640 + 43_200, 30 + 60)
    assert cost.usd == Decimal(51_840) * Decimal("0.0000004") + 90 * Decimal("0.000005")
    assert str(cost) == "about 51,840 GET and 90 LIST at S3: $0.0212"


def test_what_kafka_sends_costs_where_it_has_a_price() -> None:
    serverless = PriceList(kafka_usd_per_gb_out=0.05)
    assert replay_cost({}, FROM_S, NOW_S, 2 * 10**9, serverless).usd == Decimal("0.55")
    assert replay_cost({}, FROM_S, NOW_S, 2 * 10**9, PriceList()).usd == 0
    unknown = replay_cost({}, FROM_S, NOW_S, None, serverless)
    assert (unknown.kafka_bytes, unknown.usd, str(unknown)) == (None, Decimal(), "")


def test_windows_of_what_is_paused_are_replayed_where_they_are_kept_and_never_asked_for() -> None:
    middle_s = NOW_S - 1800
    found = stretches(
        look(FROM_S, middle_s), landed=None, kept_since_ms=None, from_s=FROM_S, to_s=NOW_S, grid=EC2, via=None
    )
    assert [s.means for s in found] == [Means.S3, Means.CLOUDWATCH]
    for account, service, paused in (
        (TARGET.account, "*", True),
        ("*", "ec2", True),
        (TARGET.account, "rds", False),
    ):
        pauses = Pauses.of([Pause(account, service, datetime.now(UTC), "")])
        kept, asked = without_paused(found, pauses)
        assert kept == found[0]
        assert (asked.means is Means.NOWHERE, asked.detail == PAUSED) == (paused, paused)
        grids = {TARGET: (EC2,)}
        assert bool(tasks_of((kept, asked), grids, "rev", "0" * 16, 0)) is not paused
