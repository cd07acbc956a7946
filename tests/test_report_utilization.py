"""Utilization against numpy: averages, percentiles, peaks, coverage, weights, hours of the week."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from ingest.report.model import Figure, Level, ResourceKey, ResourceUse, Size, Verdict, VerdictKind
from ingest.report.resources import A_SAMPLE, Axis, Merged, Observed, SeriesHours, place_of
from ingest.report.sums import Sums
from ingest.report.utilization import (
    HOURLY,
    NO_MAXIMUM,
    SAMPLES,
    Ranges,
    coverage_of,
    day_starts,
    idle_hours,
    metric_use,
    on_by_hour,
)
from shard_config.known import shipped_services
from shard_config.report import ROLES, Idle, Role
from tests.report_series import ACCOUNT, AXIS, DAY_S, RANGES, REGION, TO_S, lived_of, run_length, series_of

CPU = ROLES["ec2"].metrics[0]
NETWORK = ROLES["ec2"].metric("NetworkIn")
IN_USE = Verdict(VerdictKind.IN_USE, "It is used")


def seen_of(
    series: dict[tuple[Role, str], SeriesHours], lived: Any = None, service: str = "ec2", name: str = "r-1"
) -> Observed:
    return Observed(ResourceKey(ACCOUNT, REGION, service, name), series, lived)


def random_samples(seed: int, hours: int = AXIS.hours) -> list[np.ndarray[Any, Any]]:
    """By hour, 0 to 12 samples."""
    rng = np.random.default_rng(seed)
    return [rng.gamma(2, 10, int(rng.integers(0, 13))) for _ in range(hours)]


def rolled(samples: list[np.ndarray[Any, Any]], p95: Merged | None = None) -> SeriesHours:
    """Rows in a random order, as a store may give them."""
    at = np.array([i for i, one in enumerate(samples) if len(one)])
    np.random.default_rng(0).shuffle(at)
    ones = [samples[i] for i in at]
    return SeriesHours.of(
        AXIS,
        AXIS.start_s + at * 3600,
        np.array([len(one) for one in ones]),
        np.array([one.sum() for one in ones]),
        np.array([one.max() for one in ones]),
        np.array([np.percentile(one, 95) for one in ones]),
        np.array([one.min() for one in ones]),
        p95=p95 or Merged(),
    )


# --- one resource -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_averages_and_peaks_are_those_of_all_samples(seed: int) -> None:
    averages, maxima = random_samples(seed), random_samples(seed + 100)
    use = metric_use(
        seen_of({(Role.CPU, "Average"): rolled(averages), (Role.CPU, "Maximum"): rolled(maxima)}),
        CPU,
        RANGES,
        0.9,
    )
    assert use is not None
    week, before = slice(-168, None), slice(-336, -168)
    assert use.average.value == use.average.week == pytest.approx(np.concatenate(averages[week]).mean())
    assert use.average.before == pytest.approx(np.concatenate(averages[before]).mean())
    assert use.peak.value == np.concatenate(maxima[week]).max()
    assert use.peak.before == np.concatenate(maxima[before]).max()
    assert use.hours == sum(len(one) > 0 for one in averages[week])
    days = [np.concatenate(averages[a : a + 24]) for a in range(AXIS.hours - 168, AXIS.hours, 24)]
    assert list(use.daily) == pytest.approx([day.mean() for day in days])
    assert use.average.change == pytest.approx(use.average.value - use.average.before)  # type: ignore[operator]


def test_a_peak_is_of_the_maximum_statistic_and_never_of_averages() -> None:
    use = metric_use(seen_of({(Role.CPU, "Average"): rolled(random_samples(1))}), CPU, RANGES, 1.0)
    assert use is not None
    assert use.peak == Figure(None, "percent", None, 1.0, NO_MAXIMUM)


def test_the_95th_percentile_is_the_merged_one_and_else_of_hourly_averages_and_says_which() -> None:
    samples = random_samples(2)
    merged = metric_use(
        seen_of({(Role.CPU, "Average"): rolled(samples, Merged(41.0, 42.0, 43.0))}), CPU, RANGES, 1.0
    )
    assert merged is not None
    assert (merged.p95.value, merged.p95.week, merged.p95.before, merged.p95_of) == (
        41.0,
        42.0,
        43.0,
        SAMPLES,
    )
    hourly = metric_use(seen_of({(Role.CPU, "Average"): rolled(samples)}), CPU, RANGES, 1.0)
    assert hourly is not None
    assert hourly.p95_of == HOURLY
    means = [one.mean() for one in samples[-168:] if len(one)]
    assert hourly.p95.value == pytest.approx(np.percentile(means, 95))


def test_a_rate_is_told_a_second_whatever_samples_are_missing() -> None:
    values = np.full(AXIS.hours, 500.0)
    samples = np.full(AXIS.hours, 12.0)
    samples[-100:] = 5
    assert NETWORK is not None
    use = metric_use(
        seen_of({(Role.NETWORK_IN, "Sum"): series_of(values, rate=True, samples=samples)}),
        NETWORK,
        RANGES,
        1.0,
    )
    assert use is not None
    assert use.average.value == pytest.approx(500.0)
    assert use.p95.value == pytest.approx(500.0)
    assert use.peak.value is None
    assert use.average.unit == "bytes/s"


def test_of_a_rate_there_is_no_peak_for_its_maximum_is_of_single_samples() -> None:
    rate = series_of(np.full(AXIS.hours, 500.0), rate=True)
    assert NETWORK is not None
    use = metric_use(
        seen_of({(Role.NETWORK_IN, "Sum"): rate, (Role.NETWORK_IN, "Maximum"): rate}), NETWORK, RANGES, 1.0
    )
    assert use is not None
    assert use.peak == Figure(None, "bytes/s", None, 1.0, "of a rate there is no peak")


def test_no_samples_are_no_figure_and_never_zero() -> None:
    assert (
        metric_use(
            seen_of({(Role.CPU, "Average"): series_of(np.full(AXIS.hours, np.nan))}), CPU, RANGES, None
        )
        is None
    )
    before = np.where(np.arange(AXIS.hours) < 400, 5.0, np.nan)
    use = metric_use(seen_of({(Role.CPU, "Average"): series_of(before)}), CPU, RANGES, 0.0)
    assert use is not None
    assert (use.average.value, use.p95.value, use.average.change) == (None, None, None)
    assert use.average.unknown == "there are no samples of the Average statistic"
    assert use.daily == (None,) * 7


def test_coverage_counts_over_the_life_within_the_range() -> None:
    values = run_length([[624, None], [24, 5.0], [24, None]])
    lived = lived_of("ec2", [{"days": [26, 28], "state": "running"}])
    seen = seen_of({(Role.CPU, "Average"): series_of(values)}, lived)
    assert coverage_of(seen, AXIS, RANGES.whole) == 0.5
    assert coverage_of(seen_of({(Role.CPU, "Average"): series_of(values)}), AXIS, RANGES.whole) == 0.5
    stopped = lived_of("ec2", [{"days": [None, 28], "state": "stopped"}])
    assert coverage_of(seen_of({}, stopped), AXIS, RANGES.whole) is None


def test_sparse_metrics_without_datapoints_are_no_gap_where_the_ledger_looked_in_full() -> None:
    lived = lived_of("lambda", [{"days": [None, 28], "state": "running"}])
    looked = np.ones(AXIS.hours)
    looked[-42:] = 0.5
    seen = Observed(ResourceKey(ACCOUNT, REGION, "lambda", "f"), {}, lived, looked)
    assert coverage_of(seen, AXIS, RANGES.whole) == pytest.approx(0.75)
    unlooked = Observed(seen.key, {}, lived)
    assert coverage_of(unlooked, AXIS, RANGES.whole) == 0.0
    ec2 = Observed(ResourceKey(ACCOUNT, REGION, "ec2", "i"), {}, lived, looked)
    assert coverage_of(ec2, AXIS, RANGES.whole) == 0.0


def test_an_hour_counts_as_on_where_it_was_on_from_its_beginning_to_its_end() -> None:
    spans = [
        {"days": [1.5 / 24, 3 / 24], "state": "running"},
        {"days": [3 / 24, 5.5 / 24], "state": "running"},
    ]
    on = on_by_hour(seen_of({}, lived_of("ec2", spans)), AXIS)
    assert np.flatnonzero(on).tolist() == [2, 3, 4]


def test_idle_hours_are_those_in_which_all_activities_are_known_and_below_their_limits() -> None:
    hours = np.arange(AXIS.hours)
    series = {
        (Role.CPU, "Average"): series_of(np.full(AXIS.hours, 1.0)),
        (Role.CPU, "Maximum"): series_of(np.where(hours == 3, 50.0, 1.0)),
        (Role.NETWORK_IN, "Sum"): series_of(np.where(hours == 5, 999.0, 1.0), rate=True),
        (Role.NETWORK_OUT, "Sum"): series_of(np.where(hours == 7, np.nan, 1.0), rate=True),
        (Role.DISK_READ_OPS, "Sum"): series_of(np.full(AXIS.hours, 0.1), rate=True),
        (Role.DISK_WRITE_OPS, "Sum"): series_of(np.full(AXIS.hours, 0.1), rate=True),
        (Role.LOCAL_WRITE_OPS, "Sum"): series_of(np.where(hours == 9, 100.0, 0.0), rate=True),
    }
    found = idle_hours(seen_of(series), AXIS, Idle())
    assert found is not None
    assert np.flatnonzero(~found.known).tolist() == [7]
    assert np.flatnonzero(~found.idle).tolist() == [3, 5, 7, 9]
    assert idle_hours(seen_of({}, service="lambda"), AXIS, Idle()) is None


# --- many resources ---------------------------------------------------------------------------------------------------


def use_of(name: str, vcpu: float | None, cpu: Observed, service: str = "ec2") -> ResourceUse:
    use = metric_use(cpu, CPU, RANGES, 1.0)
    metrics = () if use is None else (use,)
    size = Size("m7g", vcpu)
    key = ResourceKey(ACCOUNT, REGION, service, name)
    return ResourceUse(key, size, "", "running", 7 * DAY_S, 1.0, metrics, 0, IN_USE)


def summed(ones: list[tuple[float | None, float]]) -> Sums:
    sums = Sums(RANGES)
    for n, (vcpu, cpu) in enumerate(ones):
        seen = seen_of({(Role.CPU, "Average"): series_of(np.full(AXIS.hours, cpu))}, name=f"r-{n}")
        sums.add(seen, use_of(f"r-{n}", vcpu, seen))
    return sums


def test_an_account_whose_biggest_machine_is_idle_is_not_busy_for_its_small_ones() -> None:
    everything, account, *_ = summed([(64, 1.0), (1, 90.0), (1, 90.0), (1, 90.0)]).groups()
    assert (everything.level, account.level, account.name) == (Level.ALL, Level.ACCOUNT, ACCOUNT)
    for group in (everything, account):
        assert group.cpu_average.value == pytest.approx((64 + 270) / 67)
        assert group.cpu_p95.value == pytest.approx((64 + 270) / 67)
        assert (group.weighted_by, group.unsized, group.resources) == ("vcpu", 0, 4)


def test_without_sizes_each_resource_counts_the_same_and_it_says_so() -> None:
    group = summed([(None, 1.0), (None, 90.0)]).groups()[0]
    assert group.cpu_average.value == pytest.approx(45.5)
    assert group.weighted_by == "resource"


def test_what_has_no_size_is_left_out_of_weighted_sums_and_counted() -> None:
    sums = summed([(4, 10.0), (None, 90.0)])
    group, heat = sums.groups()[0], sums.heat_maps()[0]
    assert group.cpu_average.value == pytest.approx(10.0)
    assert (group.unsized, group.resources) == (1, 2)
    assert heat.percent[0][0] == pytest.approx(10.0)
    assert heat.resources == 1


def test_what_lived_half_of_the_range_counts_half() -> None:
    sums = Sums(RANGES)
    half = run_length([[588, None], [84, 80.0]])
    for name, values in (("a", half), ("b", np.full(AXIS.hours, 20.0))):
        seen = seen_of({(Role.CPU, "Average"): series_of(values)}, name=name)
        sums.add(seen, use_of(name, 2, seen))
    assert sums.groups()[0].cpu_average.value == pytest.approx((80 * 84 + 20 * 168) / 252)


def test_the_heat_map_has_each_hour_of_the_week_at_its_place() -> None:
    hours = [datetime.fromtimestamp(AXIS.start_s + n * 3600, UTC) for n in range(AXIS.hours)]
    values = np.array([100.0 * h.weekday() + h.hour for h in hours])
    seen = seen_of({(Role.CPU, "Average"): series_of(values)})
    for from_s in (TO_S - 7 * DAY_S, TO_S - 20 * DAY_S, TO_S - 28 * DAY_S):
        ranges = Ranges(AXIS, from_s, TO_S)
        sums = Sums(ranges)
        sums.add(seen, use_of("r-1", 2, seen))
        percent = sums.heat_maps()[0].percent
        assert [[-1 if v is None else round(v) for v in row] for row in percent] == [
            [100 * d + h for h in range(24)] for d in range(7)
        ]


def test_an_hour_without_samples_is_none_in_the_heat_map() -> None:
    values = np.full(AXIS.hours, 5.0)
    values[-1] = np.nan
    seen = seen_of({(Role.CPU, "Average"): series_of(values)})
    sums = Sums(RANGES)
    sums.add(seen, use_of("r-1", 2, seen))
    every, account = sums.heat_maps()
    assert (every.percent[6][23], every.percent[6][22]) == (None, 5.0)
    assert (every.title, account.title) == ("all accounts", ACCOUNT)
    assert every.coverage == pytest.approx(167 / 168)


# --- series and axes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("namespace", "metric", "dimensions", "statistic", "expected"),
    [
        ("AWS/EC2", "CPUUtilization", [("InstanceId", "i-1")], "Average", ("ec2", "i-1", "cpu")),
        ("AWS/EC2", "CPUUtilization", [("AutoScalingGroupName", "web")], "Average", None),
        ("AWS/EC2", "CPUUtilization", [("InstanceId", "i-1")], "p99", None),
        ("AWS/EC2", "NetworkIn", [("InstanceId", "i-1")], "Average", ("ec2", "i-1", "network_in")),
        ("AWS/EC2", "NetworkIn", [("InstanceId", "i-1")], "SampleCount", None),
        ("AWS/EC2", "CPUCreditBalance", [("InstanceId", "i-1")], "Average", None),
        ("AWS/RDS", "FreeStorageSpace", [("DBInstanceIdentifier", "d")], "Minimum", ("rds", "d", "storage_free")),
        ("AWS/RDS", "CPUUtilization", [("DBClusterIdentifier", "c"), ("Role", "WRITER")], "Average", None),
        ("AWS/ElastiCache", "CPUUtilization", [("CacheClusterId", "c"), ("CacheNodeId", "0001")], "Average", ("elasticache", "c", "cpu")),
        ("AWS/Kafka", "CpuUser", [("Broker ID", "1"), ("Cluster Name", "k")], "Average", ("msk", "k/1", "cpu")),
        ("Custom", "CPUUtilization", [("InstanceId", "i-1")], "Average", None),
    ],
)  # fmt: skip
def test_a_series_is_one_resources_or_nones(
    namespace: str,
    metric: str,
    dimensions: list[tuple[str, str]],
    statistic: str,
    expected: tuple[str, ...] | None,
) -> None:
    place = place_of(namespace, metric, dimensions, statistic)
    assert (None if place is None else (place.service, place.id, place.metric.role)) == expected


def test_the_average_of_a_rate_is_told_a_sample_and_says_nothing_of_how_busy_a_resource_is() -> None:
    values = run_length([(AXIS.hours, 50.0)])
    assert NETWORK is not None
    alone = seen_of({(Role.NETWORK_IN, A_SAMPLE): series_of(values)})
    use = metric_use(alone, NETWORK, RANGES, 1.0)
    assert use is not None
    assert (use.average.value, use.average.unit, use.p95.value) == (50.0, "bytes", 50.0)
    assert alone.values(Role.NETWORK_IN) is None
    # A Sum says more, and counts where both are there.
    both = seen_of({**alone.series, (Role.NETWORK_IN, "Sum"): series_of(values, rate=True)})
    use = metric_use(both, NETWORK, RANGES, 1.0)
    assert use is not None
    assert (use.average.value, use.average.unit) == (pytest.approx(50.0), "bytes/s")


def test_roles_name_metrics_of_the_shipped_profiles_where_there_is_one() -> None:
    profiles = shipped_services()
    for service, roles in ROLES.items():
        assert list(roles.dimensions) == sorted(roles.dimensions)
        assert len({m.role for m in roles.metrics}) == len(roles.metrics), service
        if (profile := profiles.get(service)) is not None:
            assert profile.namespace == roles.namespace
            assert profile.metrics != "all"
            assert {m.name for m in roles.metrics} <= {m.name for m in profile.metrics}, service


def test_days_begin_at_midnight_wherever_the_axis_begins() -> None:
    axis = Axis(TO_S - 30 * 3600, 30)
    assert day_starts(axis, slice(0, 30)).tolist() == [0, 6]
    assert day_starts(axis, slice(6, 30)).tolist() == [0]
    assert day_starts(axis, slice(3, 3)).tolist() == []


def test_a_slice_has_whole_hours_alone() -> None:
    assert AXIS.slice(TO_S - 5400, TO_S) == slice(AXIS.hours - 1, AXIS.hours)
    assert AXIS.slice(TO_S - 7200, TO_S - 1) == slice(AXIS.hours - 2, AXIS.hours - 1)
    assert AXIS.slice(0, 2**40) == slice(0, AXIS.hours)


def test_a_figure_changes_week_on_week_and_not_range_on_week() -> None:
    assert Figure(50.0, "percent", 40.0, week=44.0).change == 4.0
    assert Figure(50.0, "percent", 40.0).relative_change == 0.25
    assert Figure(50.0, "percent", 0.0).relative_change is None
    assert Figure(None, unknown="there are no samples").change is None
