"""Rules on late points in a real Prometheus: what was written for fresh points is silent, flaps or cries wolf; what was migrated says the same as on fresh ones."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from ingest.ports import LabelSet
from shard_config.known import shipped_services
from shard_config.late import LateNames
from shard_config.promql import Rewritten, rewrite
from shard_config.remote_write import Receiver
from tests.late_points import MINUTE_S, Feed, Points, labels, seen_s, sent_s
from tests.prometheus_server import PrometheusServer, needs_prometheus

pytestmark = needs_prometheus

HISTORY_MIN, LASTS_MIN = 45, 80
"""Points come from so long before the first evaluation on, and for so long after it."""
EVALUATED_AT_S = 7
"""Rules are not evaluated on the minute."""
MODES = {"settled": sent_s, "arrived": seen_s}
NAMES = {
    mode: LateNames(
        shipped_services().values(),
        [
            Receiver(
                name="one", url="http://one/write", out_of_order_window_s=7200 if mode == "arrived" else 0
            )
        ],
    )
    for mode in MODES
}

Value = Callable[[int], float | None]
"""Minute of the time line → value; None: no point."""


@dataclass(frozen=True)
class Scene:
    """One alert: its expression ($ is what selects its own series), for how many minutes it has to hold, its series, and whether it fires on fresh points.

    `original`: what becomes of it on late points as it is.
    """

    expr: str
    hold_min: int
    series: dict[str, Value]
    fires: bool
    original: dict[str, str]


def high(first: int, last: int, low: float = 50, top: float = 95) -> Value:
    """`top` in the minutes from `first` to before `last`, else `low`."""
    return lambda minute: top if first <= minute < last else low


def only(first: int, last: int, value: float = 20) -> Value:
    """Points in these minutes only."""
    return lambda minute: value if first <= minute < last else None


CPU, ERRORS, CALLS = "aws_ec2_cpuutilization_average", "aws_lambda_errors_sum", "aws_lambda_invocations_sum"
DB_CPU, SENT = "aws_rds_cpuutilization_average", "aws_sqs_number_of_messages_sent_sum"
FLAPS = {"settled": "silent", "arrived": "flaps"}
CRIES = {"settled": "cries wolf", "arrived": "flaps"}
SCENES = {
    "busy": Scene(f"{CPU}{{$}} > 90", 5, {CPU: high(20, 45)}, True, FLAPS),
    "busy for a minute": Scene(f"{CPU}{{$}} > 90", 4, {CPU: high(28, 29)}, False, {}),
    "busy at once": Scene(f"{CPU}{{$}} > 90", 0, {CPU: high(27, 28)}, True, {"settled": "silent", "arrived": "silent"}),
    "a share of errors": Scene(
        f"sum by (account_id) ({ERRORS}{{$}}) / sum by (account_id) ({CALLS}{{$}}) > 0.1", 5,
        {ERRORS: high(20, 40, 1, 30), CALLS: high(0, 0, 100)}, True, FLAPS),
    "one burst of errors": Scene(f"sum({ERRORS}{{$}}) > 10", 5, {ERRORS: only(24, 25)}, False, {}),
    "errors for long": Scene(f"sum({ERRORS}{{$}}) > 10", 10, {ERRORS: only(24, 40)}, True, FLAPS),
    "there": Scene(f"absent({DB_CPU}{{$}})", 10, {DB_CPU: high(0, 0)}, False, CRIES),
    "gone": Scene(f"absent({DB_CPU}{{$}})", 10, {DB_CPU: only(-99, 20)}, True, {"settled": "cries wolf"}),
    "gone in a range": Scene(f"absent_over_time({DB_CPU}{{$}}[10m])", 0, {DB_CPU: only(-99, 20)}, True, {"settled": "cries wolf"}),
    "busy on average": Scene(f"avg_over_time({DB_CPU}{{$}}[10m]) > 80", 0, {DB_CPU: high(20, 40)}, True, {"settled": "silent"}),
    "a step": Scene(f"{CPU}{{$}} - {CPU}{{$}} offset 10m > 20", 3, {CPU: high(20, 99)}, True, {"settled": "silent", "arrived": "silent"}),
    "the most of it": Scene(f"max_over_time(sum({CPU}{{$}})[20m:1m]) > 90", 15, {CPU: high(27, 29)}, True, {"settled": "silent"}),
    "nothing sent": Scene(f"(sum({SENT}{{$}}) or vector(0)) == 0", 5, {SENT: high(0, 0)}, False, CRIES),
    "none of them": Scene(f"count({CPU}{{$}}) < 1 or absent({CPU}{{$}})", 5, {CPU: high(0, 0)}, False, CRIES),
}  # fmt: skip


@dataclass
class Seen:
    """By minute, whether the expression had a result: on late points as it was, as it is now, and as it would be for settled points; on fresh points as it was."""

    scene: Scene
    migrated: Rewritten
    late: list[bool] = field(default_factory=list)
    now: list[bool] = field(default_factory=list)
    as_settled: list[bool] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)


@pytest.fixture(scope="module")
async def seen(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[tuple[str, str], Seen]]:
    """Every scene in both modes, on one time line in one server."""
    server = PrometheusServer(tmp_path_factory.mktemp("late"), out_of_order_window="6h")
    server.start()
    feed = Feed(server)
    try:
        yield await _played(feed)
    finally:
        await feed.close()
        server.stop()


def settling_s(metric: str) -> int:
    found = NAMES["settled"].of(metric)
    assert found is not None
    return next(p.settling_s for p in shipped_services().values() if p.service == found.delay.service)


async def _played(feed: Feed) -> dict[tuple[str, str], Seen]:
    began_s = (int(time.time()) // 300 - 48) * 300
    points: dict[tuple[str, int, LabelSet], Points] = {}
    found: dict[tuple[str, str], Seen] = {}
    asked: list[tuple[Seen, str, str]] = []
    for name, scene in SCENES.items():
        for mode in MODES:
            its = {"account_id": mode, "dimension_X": name}
            expr = scene.expr.replace("$", f'account_id="{mode}",dimension_X="{name}"')
            one = found[name, mode] = Seen(scene, rewrite(expr, NAMES[mode]))
            asked.append((one, expr, rewrite(expr, NAMES["settled"]).text))
            for metric, value in scene.series.items():
                minutes = range(-HISTORY_MIN, LASTS_MIN)
                points[mode, settling_s(metric), labels(metric, **its)] = {
                    began_s + m * MINUTE_S: v for m in minutes if (v := value(m)) is not None
                }
    came_s = began_s - HISTORY_MIN * MINUTE_S
    for minute in range(LASTS_MIN):
        now_s = began_s + minute * MINUTE_S + EVALUATED_AT_S
        await feed.write({
            one: {t: v for t, v in its.items() if came_s < MODES[mode](t, settling) <= now_s}
            for (mode, settling, one), its in points.items()
        })  # fmt: skip
        came_s = now_s
        answers = await feed.ask_all(
            [e for one, *others in asked for e in (one.migrated.text, *others)], now_s
        )
        for i, (one, *_) in enumerate(asked):
            for j, seen_by in enumerate((one.now, one.late, one.as_settled)):
                seen_by.append(bool(answers[3 * i + j]))
    await feed.write({
        one: {t: v for t, v in its.items() if MODES[mode](t, settling) > came_s}
        for (mode, settling, one), its in points.items()
    })  # fmt: skip
    for minute in range(LASTS_MIN):
        answers = await feed.ask_all(
            [expr for _, expr, _ in asked], began_s + minute * MINUTE_S + EVALUATED_AT_S
        )
        for (one, *_), answer in zip(asked, answers, strict=True):
            one.fresh.append(bool(answer))
    return found


def fired(active: list[bool], hold_min: int) -> list[int]:
    """The minutes at which an alert begins to fire that has to hold for so many minutes."""
    found, since = [], 0
    for minute, yes in enumerate(active):
        since = since + 1 if yes else 0
        if since == hold_min + 1:
            found.append(minute)
    return found


def runs(active: list[bool]) -> int:
    return sum(yes and not before for before, yes in zip([False, *active], active, strict=False))


def said_of(one: Seen) -> str:
    """What the original does on late points."""
    on_late, on_fresh = fired(one.late, one.scene.hold_min), fired(one.fresh, one.scene.hold_min)
    if on_late and (not on_fresh or on_late[0] < on_fresh[0]):
        return "cries wolf"
    if runs(one.late) > runs(one.fresh):
        return "flaps"
    return "silent" if on_fresh and not on_late else "says the same"


ALL = [(name, mode) for name in SCENES for mode in MODES]


@pytest.mark.parametrize(("name", "mode"), ALL)
async def test_a_migrated_alert_fires_on_late_points_where_the_original_fires_on_fresh_ones(
    seen: dict[tuple[str, str], Seen], name: str, mode: str
) -> None:
    one = seen[name, mode]
    expected = [m + _later_min(one) for m in fired(one.fresh, one.scene.hold_min)]

    assert bool(expected) == one.scene.fires
    assert fired(one.now, one.scene.hold_min) == expected


@pytest.mark.parametrize(("name", "mode"), ALL)
async def test_a_migrated_expression_says_on_late_points_what_the_original_said_on_fresh_ones_so_long_ago(
    seen: dict[tuple[str, str], Seen], name: str, mode: str
) -> None:
    one = seen[name, mode]
    later = _later_min(one)

    assert later * MINUTE_S <= one.migrated.by_s
    assert one.now[later:] == one.fresh[:-later]


def _later_min(one: Seen) -> int:
    """By so many minutes it is later than on fresh points."""
    if one.migrated.how == "shifted":
        return one.migrated.by_s // MINUTE_S
    # Settled points come one by one, and with them what they are asked for: a minute is begun by the time that the request takes.
    return one.migrated.earliest_s // MINUTE_S


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n, m in ALL if m in SCENES[n].original])
async def test_the_original_is_silent_on_late_points_or_flaps_or_cries_wolf(
    seen: dict[tuple[str, str], Seen], name: str, mode: str
) -> None:
    assert said_of(seen[name, mode]) == SCENES[name].original[mode]


async def test_where_points_come_a_poll_at_once_the_newest_alone_misses_some_and_holds_others_for_too_long(
    seen: dict[tuple[str, str], Seen],
) -> None:
    missed, held = seen["busy at once", "arrived"], seen["busy for a minute", "arrived"]

    assert fired(missed.fresh, 0)
    assert not fired(missed.as_settled, 0)
    assert not fired(held.fresh, 4)
    assert fired(held.as_settled, 4)
