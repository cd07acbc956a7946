"""GetMetricData as values: planning and merging."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from ingest.errors import Transient
from ingest.model import Series, SeriesKey, Target
from ingest.sources.columns import tables_of
from ingest.sources.discovery import metrics_of
from ingest.sources.look import date_ms
from ingest.sources.metric_data import (
    POINTS_PER_CALL_MAX,
    Answer,
    Call,
    Malformed,
    Page,
    Result,
    check,
    page_of,
    plan,
    request_body,
)
from ingest.sources.selection import series_of
from shard_config.model import MetricProfile, ServiceProfile

REGION = "eu-west-1"
TARGET = Target("cloudwatch", "100000000001", REGION)
EC2 = ServiceProfile(
    service="ec2",
    namespace="AWS/EC2",
    metrics=(
        MetricProfile(name="CPUUtilization", statistics=("Average", "Maximum"), unit="Percent"),
        MetricProfile(name="NetworkIn", statistics=("Sum",), unit="Bytes"),
    ),
)
SQS = ServiceProfile(service="sqs", namespace="AWS/SQS", statistics=("Sum",))


# --- planning -------------------------------------------------------------------------------------------------


def some_series(count: int) -> list[Series]:
    return [Series(SeriesKey("1", REGION, "N", "M", (("d", str(n)),), "Sum", 60)) for n in range(count)]


@pytest.mark.parametrize(
    ("series", "length_s", "queries"),
    [
        (0, 900, []),
        (499, 900, [499]),
        (501, 900, [500, 1]),
        (500, 201 * 60, [500]),  # 100,500 datapoints
        (500, 202 * 60, [499, 1]),  # 499 × 202 are 100,798
        (3, 50_400 * 60, [2, 1]),
        (2, 100_800 * 60, [1, 1]),
    ],
)
def test_a_call_has_at_most_500_queries_and_100800_datapoints(
    series: int, length_s: int, queries: list[int]
) -> None:
    calls = plan(tables_of(some_series(series)), 0, length_s, 60)
    assert [c.queries for c in calls] == queries
    assert all(c.points(60) <= POINTS_PER_CALL_MAX for c in calls)


def test_a_range_too_long_for_one_series_is_cut_without_gap_or_overlap() -> None:
    end_s = 250_000 * 60
    calls = plan(tables_of(some_series(1)), 0, end_s, 60)
    edges = [(c.start_s, c.end_s) for c in calls]
    assert edges == [(0, 6_048_000), (6_048_000, 12_096_000), (12_096_000, end_s)]


def test_start_and_end_are_widened_to_whole_periods() -> None:
    [call] = plan(tables_of(some_series(1)), 61, 3599, 60)
    assert (call.start_s, call.end_s) == (60, 3600)


def test_ids_are_unique_in_a_call_and_say_which_row_they_are() -> None:
    second = plan(tables_of(some_series(700)), 0, 300, 60)[1]
    queries = list(second.request([0, 199])["MetricDataQueries"])
    assert [q["Id"] for q in queries] == ["q0", "q199"]
    assert queries[1]["MetricStat"]["Metric"]["Dimensions"] == [{"Name": "d", "Value": "699"}]


@pytest.mark.parametrize("rows", [[0, 1, 2], range(3), [1], [2, 0], []], ids=str)
@pytest.mark.parametrize("more", [{}, {"NextToken": 'a"b', "MaxDatapoints": 50}], ids=["first", "next"])
def test_a_body_made_beforehand_is_the_request_as_json(rows: Sequence[int], more: dict[str, Any]) -> None:
    series = [Series(SeriesKey("1", REGION, "N", "Größe", (("d", 'a"\\'),), "p99.9", 60))] * 5
    for linked in (False, True, False):
        request = Call(tables_of(series)[0], 2, 5, 0, 300, linked).request(rows) | more
        queries = [
            {
                "Id": f"q{row}",
                "MetricStat": {
                    "Metric": {
                        "Namespace": "N",
                        "MetricName": "Größe",
                        "Dimensions": [{"Name": "d", "Value": 'a"\\'}],
                    },
                    "Period": 60,
                    "Stat": "p99.9",
                },
            }
            | ({"AccountId": "1"} if linked else {})
            for row in rows
        ]
        expected = {
            "MetricDataQueries": queries,
            "StartTime": 0,
            "EndTime": 300,
            "ScanBy": "TimestampAscending",
        }
        assert json.loads(request_body(request)) == expected | more


def test_a_profile_says_which_metrics_are_asked_for_with_which_statistics() -> None:
    listed = [("NetworkIn", (("a", "1"),)), ("CPUUtilization", (("a", "1"),)), ("Other", ()), ("Other", ())]
    chosen = series_of(listed, TARGET, EC2)
    assert [(s.key.metric, s.key.stat, s.unit) for s in chosen] == [
        ("CPUUtilization", "Average", "Percent"),
        ("CPUUtilization", "Maximum", "Percent"),
        ("NetworkIn", "Sum", "Bytes"),
    ]
    everything = series_of(listed, TARGET, SQS)
    assert [(s.key.metric, s.key.stat) for s in everything] == [
        ("CPUUtilization", "Sum"),
        ("NetworkIn", "Sum"),
        ("Other", "Sum"),
    ]


# --- merging --------------------------------------------------------------------------------------------------


def page(*results: Result, token: str = "") -> Page:
    return Page(results, (), token, 0)


def test_pages_are_merged_by_id_in_any_order() -> None:
    answer = Answer(frozenset({0, 1}))
    answer.add(page(Result("q1", "PartialData", [60], [1.0]), Result("q0", "Complete", [60], [5.0])))
    answer.add(page(Result("q1", "Complete", [120.0], [2.0])))
    assert answer.points == {1: ([60, 120], [1.0, 2.0]), 0: ([60], [5.0])}
    assert answer.rows("Complete") == [0, 1]


def test_an_id_that_is_absent_or_cut_off_is_not_complete() -> None:
    answer = Answer(frozenset({0, 1, 2, 3}))
    answer.add(page(Result("q0", "PartialData", [60], [1.0]), Result("q3", "Complete", [], [])))
    assert answer.rows("Complete") == [3]


def test_a_good_page_does_not_heal_a_failed_id() -> None:
    answer = Answer(frozenset({0}))
    answer.add(page(Result("q0", "InternalError", [], [])))
    answer.add(page(Result("q0", "Complete", [60], [1.0])))
    assert answer.rows("Complete") == []


def test_points_after_complete_are_a_contradiction_and_no_points() -> None:
    answer = Answer(frozenset({0, 1}))
    answer.add(page(Result("q0", "Complete", [60], [1.0]), Result("q1", "Complete", [60], [2.0]), token="a"))
    with pytest.raises(Malformed, match="q0 has more points after it was Complete"):
        answer.add(page(Result("q0", "Complete", [60], [1.0]), Result("q1", "Complete", [], [])))
    assert answer.points == {0: ([60], [1.0]), 1: ([60], [2.0])}
    assert answer.rows("Complete") == [1]


def test_an_id_that_is_complete_may_be_named_again_without_points() -> None:
    answer = Answer(frozenset({0}))
    answer.add(page(Result("q0", "Complete", [60], [1.0]), token="a"))
    answer.add(page(Result("q0", "Complete", [], [])))
    assert (answer.points, answer.rows("Complete")) == ({0: ([60], [1.0])}, [0])


def test_pages_have_no_more_points_than_the_request_can_have() -> None:
    answer = Answer(frozenset({0}), points_max=4)
    answer.add(page(Result("q0", "PartialData", [60, 60], [1.0, 1.0]), token="a"))
    answer.add(page(Result("q0", "PartialData", [120, 120], [1.0, 1.0]), token="b"))
    with pytest.raises(Malformed, match="more than 4 points"):
        answer.add(page(Result("q0", "Complete", [180], [1.0])))
    assert answer.points == {0: ([60, 60, 120, 120], [1.0] * 4)}
    assert answer.rows("Complete") == []


@pytest.mark.parametrize(
    "result",
    [
        Result("q7", "Complete", [], []),
        Result("", "Complete", [], []),
        Result("q-1", "Complete", [], []),
        Result("q0", "Complete", [60], []),
    ],
)
def test_a_page_that_contradicts_the_question_or_itself_is_refused_whole(result: Result) -> None:
    with pytest.raises(Malformed):
        check(page(Result("q1", "Complete", [60], [1.0]), result), frozenset({0, 1}))


@pytest.mark.parametrize("answer", [{}, {"message": b'{"MetricDataRes'}, {"MetricDataResults": None}])
def test_a_body_that_was_cut_off_is_not_an_empty_answer(answer: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        page_of(answer)
    with pytest.raises(Transient):
        metrics_of(answer, "AWS/EC2")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Tue, 24 Nov 2026 05:50:41 GMT", 1795499441_000),
        ("Tue, 24 Nov 2026 05:50:41 -0000", 1795499441_000),
        ("yesterday", None),
        ("", None),
        (None, None),
    ],
)
def test_the_date_header_is_read_or_known_to_be_unreadable(header: str | None, expected: int | None) -> None:
    assert date_ms(header) == expected
