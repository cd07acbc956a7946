from __future__ import annotations

from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_config.model import MetricProfile, ServiceProfile
from workers.simulated.values import Floats, Ints
from workers.world import SETTLED, Metric, Question, World, account_ids

ACCOUNT, OTHER = account_ids(2)
REGION = "eu-west-1"
T0 = 1_699_999_800
"""On the grid of five minutes."""
ALL_STATISTICS = ("Minimum", "p1", "p50", "Average", "p90", "p99.9", "Maximum")

EC2 = ServiceProfile(
    service="ec2",
    namespace="AWS/EC2",
    settling_s=600,
    metrics=(
        MetricProfile(
            name="CPUUtilization", unit="Percent", min=0, max=100, statistics=("Average", "Maximum")
        ),
        MetricProfile(name="NetworkIn", unit="Bytes", min=0),
    ),
)
LAMBDA = ServiceProfile(
    service="lambda",
    namespace="AWS/Lambda",
    settling_s=300,
    metrics=(MetricProfile(name="Invocations", unit="Count", min=0, statistics=("Sum",)),),
)
RDS = ServiceProfile(service="rds", namespace="AWS/RDS", period_s=300, metrics="all")


def world(
    metrics: int = 60,
    seed: int = 1,
    *,
    silent_share: float = 0.0,
    newborn_share: float = 0.0,
    newborn_at_s: int = 0,
) -> World:
    return World(
        seed,
        (ACCOUNT, OTHER),
        (REGION, "us-east-1"),
        metrics,
        (EC2, LAMBDA, RDS),
        silent_share=silent_share,
        newborn_share=newborn_share,
        newborn_at_s=newborn_at_s,
    )


def of(truth: World, namespace: str, name: str) -> list[Metric]:
    return [m for m in truth.metrics(ACCOUNT, REGION) if (m.namespace, m.name) == (namespace, name)]


def values(
    truth: World,
    metric: Metric,
    stat: str,
    period_s: int = 60,
    *,
    start_s: int = T0,
    end_s: int = T0 + 6 * 3600,
    asked_at_s: int = SETTLED,
) -> tuple[Ints, Floats]:
    return truth.points(ACCOUNT, REGION, *metric[:3], stat, period_s, start_s, end_s, asked_at_s)


def test_a_world_has_exactly_the_metrics_asked_for_spread_evenly_over_the_profiles() -> None:
    metrics = world(61).metrics(ACCOUNT, REGION)

    assert 61 == len(metrics) == len(set(metrics))
    assert [sum(m.namespace == n for m in metrics) for n in ("AWS/EC2", "AWS/Lambda", "AWS/RDS")] == [
        21,
        20,
        20,
    ]


def test_no_two_targets_share_a_resource() -> None:
    truth = world()
    seen = [m.dimensions for a in truth.accounts for r in truth.regions for m in set(truth.metrics(a, r))]

    assert len(set(seen)) == 4 * (10 + 20 + 5)


def test_resources_are_named_as_their_service_names_them() -> None:
    truth = world()

    [(name, value)] = of(truth, "AWS/EC2", "NetworkIn")[0].dimensions
    assert name == "InstanceId"
    assert value.startswith("i-")
    assert len(value) == 19


def test_account_ids_are_twelve_digits_and_always_the_same() -> None:
    assert account_ids(3) == ("100000000001", "100000000002", "100000000003")


def test_values_are_the_same_bits_on_every_machine() -> None:
    truth = world()
    digest = blake2b(digest_size=8)
    for metric in truth.metrics(ACCOUNT, REGION):
        for stat in ("Average", "Sum", "p95"):
            for asked_at_s in (T0 + 3600, SETTLED):
                times_s, numbers = values(truth, metric, stat, end_s=T0 + 3600, asked_at_s=asked_at_s)
                digest.update(times_s.astype("<i8").tobytes() + numbers.astype("<f8").tobytes())

    assert digest.hexdigest() == "6418e70a15fa67da"


def test_another_seed_is_another_world() -> None:
    assert not set(world(seed=1).metrics(ACCOUNT, REGION)) & set(world(seed=2).metrics(ACCOUNT, REGION))


def test_an_average_is_never_below_the_minimum_nor_above_the_maximum_at_any_query_time() -> None:
    truth = world()
    for asked_at_s in (T0 + 3600, T0 + 3700, SETTLED):
        for period_s in (60, 300):
            for metric in truth.metrics(ACCOUNT, REGION):
                by_stat = [
                    values(truth, metric, s, period_s, end_s=T0 + 3600, asked_at_s=asked_at_s)[1]
                    for s in ALL_STATISTICS
                ]
                assert len(by_stat[0]) > 0
                for lower, higher in pairwise(by_stat):
                    assert (lower <= higher).all()


def test_a_sum_is_the_average_times_the_sample_count() -> None:
    truth = world()
    for metric in truth.metrics(ACCOUNT, REGION):
        total, average, count = (values(truth, metric, s, 300)[1] for s in ("Sum", "Average", "SampleCount"))
        np.testing.assert_allclose(total, average * count, rtol=1e-12)


def test_sums_of_counts_are_whole_numbers() -> None:
    truth = world()
    sums = np.concatenate([values(truth, m, "Sum")[1] for m in of(truth, "AWS/Lambda", "Invocations")])

    assert (sums == np.floor(sums)).all()
    assert sums.max() > 0


def test_values_stay_within_the_profiles_bounds() -> None:
    truth = world()
    for metric in of(truth, "AWS/EC2", "CPUUtilization"):
        for stat in ALL_STATISTICS:
            numbers = values(truth, metric, stat)[1]
            assert numbers.min() >= 0
            assert numbers.max() <= 100


def test_values_move_from_minute_to_minute_and_through_the_day() -> None:
    truth = world()
    for metric in of(truth, "AWS/EC2", "CPUUtilization"):
        times_s, numbers = values(truth, metric, "Average", end_s=T0 + 86_400)
        hours = [numbers[times_s // 3600 == h].mean() for h in np.unique(times_s // 3600)]
        assert len(np.unique(numbers)) > 1000
        assert max(hours) > 1.05 * min(hours)


def test_no_point_is_visible_before_its_period_ends() -> None:
    truth = world()
    for metric in truth.metrics(ACCOUNT, REGION):
        period_s = 300 if metric.namespace == "AWS/RDS" else 60
        times_s, _ = values(truth, metric, "Average", period_s, start_s=T0 - 86_400, asked_at_s=T0 + 1799)
        assert times_s.max() + period_s <= T0 + 1799


def test_nothing_changes_once_a_service_has_settled() -> None:
    truth = world()
    for metric in of(truth, "AWS/EC2", "CPUUtilization"):
        end_s = T0 + 3600
        settled = values(truth, metric, "Average", end_s=end_s, asked_at_s=end_s + EC2.settling_s)
        final = values(truth, metric, "Average", end_s=end_s)
        np.testing.assert_array_equal(settled, final)


def test_half_of_the_points_are_there_soon_but_some_only_when_the_service_settles() -> None:
    truth = world(6000)
    questions = [Question(*m[:3], "Average", 60) for m in of(truth, "AWS/EC2", "NetworkIn")]

    def visible(after_s: int) -> int:
        answers = truth.answers(ACCOUNT, REGION, questions, T0, T0 + 60, T0 + 60 + after_s)
        return sum(len(times_s) for times_s, _ in answers)

    share = [visible(after_s) / visible(EC2.settling_s) for after_s in (-1, 0, 12, 320, 590)]
    assert share == pytest.approx([0.0, 0.345, 0.52, 0.9, 0.997], abs=0.04)


def test_a_few_points_in_a_hundred_change_once_after_they_appeared_and_none_twice() -> None:
    truth = world(150)
    questions = [Question(*m[:3], "Average", 60) for m in of(truth, "AWS/EC2", "NetworkIn")]
    seen: dict[tuple[int, int], list[float]] = {}
    for asked_at_s in range(T0, T0 + 3600 + EC2.settling_s + 1, 10):
        answers = truth.answers(ACCOUNT, REGION, questions, T0, T0 + 3600, asked_at_s)
        for n, (times_s, numbers) in enumerate(answers):
            for t, v in zip(times_s, numbers, strict=True):
                known = seen.setdefault((n, t), [])
                if not known or known[-1] != v:
                    known.append(v)
    changes = [len(known) - 1 for known in seen.values()]

    assert {0, 1} == set(changes)
    assert 0.01 < sum(changes) / len(changes) < 0.06


def test_a_point_that_is_visible_stays_visible() -> None:
    truth = world()
    metric = of(truth, "AWS/EC2", "NetworkIn")[0]
    seen: set[int] = set()
    for asked_at_s in range(T0, T0 + 4500, 7):
        times_s = set(values(truth, metric, "Average", end_s=T0 + 3600, asked_at_s=asked_at_s)[0].tolist())
        assert seen <= times_s
        seen = times_s


def test_a_few_series_have_gaps_for_ever_and_the_others_none() -> None:
    truth = world(900)
    missing = [360 - len(values(truth, m, "Average")[0]) for m in truth.metrics(ACCOUNT, REGION)[:600]]
    gappy = [n for n in missing if n]

    assert 2 <= len(gappy) <= 40
    assert all(20 < n < 250 for n in gappy)


def test_a_coarser_period_is_the_aggregate_of_the_finer_points() -> None:
    truth = world()
    metric = of(truth, "AWS/EC2", "NetworkIn")[0]
    times_s, total = values(truth, metric, "Sum", 60)
    coarse_s, coarse = values(truth, metric, "Sum", 300)

    assert np.unique(times_s // 300 * 300).tolist() == coarse_s.tolist()
    assert [total[times_s // 300 * 300 == t].sum() for t in coarse_s] == coarse.tolist()
    for stat, reduce in (("Maximum", np.max), ("Minimum", np.min)):
        fine = values(truth, metric, stat, 60)[1]
        assert [reduce(fine[times_s // 300 * 300 == t]) for t in coarse_s] == values(
            truth, metric, stat, 300
        )[1].tolist()


def test_a_period_finer_than_the_services_own_gives_the_services_own_points() -> None:
    truth = world()
    metric = of(truth, "AWS/RDS", "Latency")[0]

    fine, own = values(truth, metric, "Average", 60), values(truth, metric, "Average", 300)
    np.testing.assert_array_equal(own, fine)
    assert (fine[0] % 300 == 0).all()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from([60, 120, 300, 3600]),
    st.integers(0, 9000),
)
def test_adjacent_ranges_join_into_one(a: int, b: int, c: int, period_s: int, asked_s: int) -> None:
    start_s, middle_s, end_s = (T0 // 3600 * 3600 + 97 * n for n in sorted((a, b, c)))
    truth, when = _SHARED, T0 + asked_s
    for metric in truth.metrics(ACCOUNT, REGION)[::13]:
        first = values(truth, metric, "p90", period_s, start_s=start_s, end_s=middle_s, asked_at_s=when)
        second = values(truth, metric, "p90", period_s, start_s=middle_s, end_s=end_s, asked_at_s=when)
        whole = values(truth, metric, "p90", period_s, start_s=start_s, end_s=end_s, asked_at_s=when)
        np.testing.assert_array_equal(np.concatenate([first, second], axis=1), whole)


_SHARED = world()


def test_many_questions_at_once_get_the_answers_of_each_alone() -> None:
    truth = world()
    questions = [
        Question(*m[:3], ALL_STATISTICS[n % len(ALL_STATISTICS)], (60, 300)[n % 2])
        for n, m in enumerate(truth.metrics(ACCOUNT, REGION))
    ]
    together = truth.answers(ACCOUNT, REGION, questions, T0, T0 + 1800, T0 + 1800)

    assert together == [truth.answers(ACCOUNT, REGION, [q], T0, T0 + 1800, T0 + 1800)[0] for q in questions]


def test_memory_of_a_call_is_bounded_without_changing_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = world()
    questions = [Question(*m[:3], "Average", 60) for m in truth.metrics(ACCOUNT, REGION)]
    whole = truth.answers(ACCOUNT, REGION, questions, T0, T0 + 3600, SETTLED)
    monkeypatch.setattr(World, "_CELLS_MAX", 200)

    assert whole == truth.answers(ACCOUNT, REGION, questions, T0, T0 + 3600, SETTLED)


def test_a_target_forgotten_to_save_memory_comes_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "_METRICS_KEPT_MAX", 60)
    truth = world()
    before = truth.metrics(ACCOUNT, REGION)
    truth.metrics(OTHER, REGION)

    assert before == truth.metrics(ACCOUNT, REGION)
    assert len(truth._targets) == 1


def test_what_the_world_does_not_know_has_no_points() -> None:
    truth = world()
    metric = of(truth, "AWS/EC2", "NetworkIn")[1]
    wrong_unit = Question(*metric[:3], "Average", 60, "Percent")
    right_unit = wrong_unit._replace(unit="Bytes")

    assert truth.metrics("100000000009", REGION) == ()
    assert truth.answers("100000000009", REGION, [right_unit], T0, T0 + 300, SETTLED) == [([], [])]
    assert truth.answers(ACCOUNT, "eu-north-1", [right_unit], T0, T0 + 300, SETTLED) == [([], [])]
    wrong, right = truth.answers(ACCOUNT, REGION, [wrong_unit, right_unit], T0, T0 + 300, SETTLED)
    assert wrong == ([], [])
    assert len(right[0]) == 5


def test_an_unknown_statistic_is_an_error_and_no_empty_answer() -> None:
    truth = world()
    with pytest.raises(ValueError, match="unknown statistic 'Median'"):
        values(truth, of(truth, "AWS/EC2", "NetworkIn")[0], "Median")


def test_silent_metrics_are_listed_but_have_no_points() -> None:
    truth = world(300, silent_share=0.2)
    listed = truth.listed(ACCOUNT, REGION, T0, recently_active=False)
    active = truth.listed(ACCOUNT, REGION, T0, recently_active=True)
    silent = set(listed) - set(active)

    assert len(listed) == 300
    assert 30 < len(silent) < 90
    assert not any(len(values(truth, m, "Average", 300)[0]) for m in silent)


def test_newborn_metrics_are_neither_listed_nor_have_points_before_their_time() -> None:
    truth = world(300, newborn_share=0.2, newborn_at_s=T0 + 900)
    newborn = set(truth.metrics(ACCOUNT, REGION)) - set(truth.listed(ACCOUNT, REGION, T0 + 899, False))

    assert 30 < len(newborn) < 90
    assert len(truth.listed(ACCOUNT, REGION, T0 + 900, False)) == 300
    assert {T0 + 900} == {
        int(values(truth, m, "Average", 300)[0][0]) for m in newborn if m.namespace != "AWS/EC2"
    }
