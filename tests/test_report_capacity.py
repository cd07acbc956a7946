"""Days to full: trends are found, and their intervals hold what they promise; what is no trend is not drawn out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.report.capacity import DRAWN_OUT, Used, days_until, filling_of, trend_of, used_of
from ingest.report.model import Days, ResourceKey
from ingest.report.resources import Axis, Observed, brokers_lives
from shard_config.report import Role
from tests.report_series import ACCOUNT, AXIS, DAY_S, GIB, REGION, TO_S, lived_of, run_length, series_of

FIRST_DAY_S = TO_S - 28 * DAY_S


def used(days: np.ndarray[Any, Any], capacity: float = 1000.0, restart: int = 0) -> Used:
    return Used(Role.STORAGE_FREE, days.astype(np.float64), FIRST_DAY_S, capacity, "bytes", restart)


def growth(seed: int, days: int = 28, slope: float = 5.0, noise: float = 4.0, memory: float = 0.5) -> Used:
    """A line with a weekend effect and noise that remembers the day before."""
    rng = np.random.default_rng(seed)
    errors = np.zeros(days)
    for day in range(1, days):
        errors[day] = memory * errors[day - 1] + rng.normal(0, noise)
    at = np.arange(days)
    weekend = np.where((at + 4) % 7 < 2, -8.0, 0.0)
    return used(300 + slope * at + weekend + errors)


def test_a_trend_is_found_through_noise_and_weekdays() -> None:
    slopes = [trend.slope for seed in range(40) if (trend := trend_of(growth(seed))) is not None]
    assert len(slopes) == 40
    assert np.median(slopes) == pytest.approx(5.0, abs=0.15)
    assert np.std(slopes) < 0.5


def test_the_interval_holds_the_true_slope_as_often_as_it_promises() -> None:
    trends = [trend_of(growth(seed, days=42)) for seed in range(200)]
    inside = [t is not None and t.low <= 5.0 <= t.high for t in trends]
    # 95 % are promised; noise that remembers is harder than independent noise, and a quarter of 200 would show at once.
    assert np.mean(inside) >= 0.9


def test_noise_around_a_level_is_hardly_ever_a_trend() -> None:
    false = [trend_of(growth(seed, slope=0.0)) is not None for seed in range(200)]
    assert np.mean(false) <= 0.05


def test_wild_days_do_not_move_it() -> None:
    wild = growth(1).days.copy()
    wild[[3, 11, 19, 24]] += [30, -40, 25, -35]
    trend, calm = trend_of(used(wild, 5000.0)), trend_of(used(growth(1).days, 5000.0))
    assert trend is not None
    assert calm is not None
    assert trend.slope == pytest.approx(calm.slope, rel=0.12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-3, 7.0, 1e9]), st.floats(-3, 8))
def test_units_make_no_difference(seed: int, times: float, slope: float) -> None:
    one = growth(seed, slope=slope)
    other = used(one.days * times, one.capacity * times)
    a, b = trend_of(one), trend_of(other)
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        assert [b.slope, b.low, b.high, b.noise] == pytest.approx(
            [a.slope * times, a.low * times, a.high * times, a.noise * times], rel=1e-6
        )


def test_a_step_restarts_the_fit() -> None:
    days = 300 + 2.0 * np.arange(28)
    days[10:] -= 150
    trend = trend_of(used(days))
    assert trend is not None
    assert (trend.from_day, trend.points) == (10, 18)
    assert trend.slope == pytest.approx(2.0)
    assert trend_of(used(days[:20])) is None


def test_stairs_are_how_it_grows_and_no_steps() -> None:
    days = 100 + 60.0 * (np.arange(28) // 5)
    trend = trend_of(used(days))
    assert trend is not None
    assert trend.from_day == 0
    assert 9 < trend.slope < 15


def test_the_tops_of_a_saw_tooth_are_fitted_where_it_has_enough() -> None:
    at = np.arange(36)
    rising = trend_of(used(200 + 3.0 * at + 25.0 * (at % 4)))
    assert rising is not None
    assert rising.slope == pytest.approx(3.0)
    assert "saw tooth" in rising.method
    assert trend_of(used(200 + 25.0 * (at % 4))) is None


@pytest.mark.parametrize("days", [Days(8.0, 7.0, 10.0), Days(None, None, None, 10.0)])
def test_nothing_is_drawn_out_further_than_twice_the_fitted_range(days: Days) -> None:
    at = np.arange(28)
    trend = trend_of(used(100 + 10.0 * at, 5000.0))
    assert trend is not None
    gap = 80.0 if days.days else 101.0
    found = days_until(gap, trend, 10.0)
    assert (found.days is None, found.more_than) == (days.days is None, days.more_than)
    assert DRAWN_OUT == 2.0


def test_an_interval_lies_around_the_days_and_ends_where_it_may_not_be_drawn_out() -> None:
    trend = trend_of(growth(3))
    assert trend is not None
    found = days_until(150.0, trend, 56.0)
    assert found.days is not None
    assert found.earliest is not None
    assert found.earliest < found.days
    assert found.latest is not None
    assert found.latest > found.days
    assert days_until(150.0, trend, found.days + 0.1).latest is None
    assert days_until(0.0, trend, 56.0) == Days(0.0, 0.0, 0.0)


def test_a_week_later_there_are_seven_days_less() -> None:
    free = run_length([[AXIS.hours, (300.0 * GIB, 132.0 * GIB)]])
    span = {"days": [None, 28], "type": "db.m7g.large", "storage_bytes": 500 * GIB, "state": "running"}
    seen = Observed(
        ResourceKey(ACCOUNT, REGION, "rds", "r-1"),
        {(Role.STORAGE_FREE, "Average"): series_of(free)},
        lived_of("rds", [span]),
    )

    def full(at_s: int) -> Days:
        one = used_of(seen, AXIS, at_s)
        assert one is not None
        filling = filling_of(one, seen, "me")
        assert filling is not None
        assert (filling.owner, filling.capacity, filling.what) == ("me", 500 * GIB, "storage_free")
        return filling.to_100

    now, before = full(TO_S).days, full(TO_S - 7 * DAY_S).days
    assert now == pytest.approx(22, abs=0.1)
    assert before == pytest.approx(29, abs=0.1)


def test_shares_fill_up_to_a_hundred_per_cent() -> None:
    span = {"days": [None, 28], "type": "kafka.m7g.large", "state": "running"}
    seen = Observed(
        ResourceKey(ACCOUNT, REGION, "msk", "k/1"),
        {(Role.STORAGE_SHARE, "Average"): series_of(run_length([[AXIS.hours, (20.0, 76.0)]]))},
        lived_of("msk", [span]),
    )
    one = used_of(seen, AXIS, TO_S)
    assert one is not None
    filling = filling_of(one, seen, "")
    assert filling is not None
    assert (filling.used.unit, filling.capacity) == ("percent", 100.0)
    assert filling.to_100.days == pytest.approx(12, abs=0.1)
    assert filling.to_80.days == pytest.approx(2, abs=0.1)


def test_storage_that_grows_by_itself_is_full_at_its_limit() -> None:
    span = {
        "days": [None, 28],
        "storage_bytes": 500 * GIB,
        "storage_max_bytes": 1000 * GIB,
        "state": "running",
    }
    series = {
        (Role.STORAGE_FREE, "Average"): series_of(run_length([[AXIS.hours, (300.0 * GIB, 20.0 * GIB)]]))
    }
    seen = Observed(ResourceKey(ACCOUNT, REGION, "rds", "r-1"), series, lived_of("rds", [span]))
    one = used_of(seen, AXIS, TO_S)
    assert one is not None
    assert one.capacity == 1000 * GIB
    assert one.days[-1] == pytest.approx(480 * GIB, rel=0.01)


def test_days_are_utc_days_wherever_the_axis_begins() -> None:
    axis = Axis(TO_S - 20 * DAY_S - 7 * 3600, 20 * 24 + 7)
    series = {(Role.STORAGE_SHARE, "Average"): series_of(np.arange(axis.hours, dtype=float))}
    span = {"days": [None, 28], "state": "running"}
    seen = Observed(ResourceKey(ACCOUNT, REGION, "msk", "k/1"), series, lived_of("msk", [span]))
    one = used_of(seen, axis, TO_S)
    assert one is not None
    assert one.first_day_s % DAY_S == 0
    # The first day has seven hours only, which are too few.
    assert np.isnan(one.days[0])
    assert one.days[1:].tolist() == [7 + 24 * n + 23 for n in range(20)]


def test_a_report_without_a_trend_does_not_import_the_statistics_library() -> None:
    code = "import sys, ingest.report.capacity, ingest.report.verdicts; print('scipy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_a_kafka_brokers_disk_fills_by_its_own_with_its_share_of_what_the_inventory_says_of_the_cluster() -> (
    None
):
    cluster = {
        "id": "k",
        "days": [None, 28],
        "type": "kafka.m5.large",
        "nodes": 3,
        "vcpu": 6,
        "storage_bytes": 300 * GIB,
        "state": "running",
    }
    of_cluster, lone = (ResourceKey(ACCOUNT, REGION, "msk", name) for name in ("k", "without brokers"))
    brokers = [ResourceKey(ACCOUNT, REGION, "msk", f"k/{n}") for n in (1, 2)]
    lived = lived_of("msk", [cluster])
    each = brokers_lives(
        {of_cluster: lived, lone: lived}, [*brokers, ResourceKey(ACCOUNT, REGION, "msk", "other/1")]
    )
    assert each.keys() == {*brokers, lone}
    one = each[brokers[0]].last
    assert (one.id, one.nodes, one.vcpu, one.storage_bytes, one.group) == (
        "k/1",
        1,
        2,
        100 * GIB,
        "cluster:k",
    )
    days = {}
    for key, last in zip(brokers, (79.0, 40.0), strict=True):
        used = run_length([[AXIS.hours, [last - 28, last]]])
        seen = Observed(key, {(Role.STORAGE_SHARE, "Maximum"): series_of(used)}, each[key])
        filled = used_of(seen, AXIS, TO_S)
        assert filled is not None
        filling = filling_of(filled, seen, "")
        assert filling is not None
        days[key.id] = filling.to_100.days
    assert days == {"k/1": pytest.approx(21, abs=1), "k/2": None}
