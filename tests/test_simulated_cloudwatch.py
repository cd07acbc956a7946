from __future__ import annotations

from typing import Any

import pytest

from tests.simulated_scene import (
    ACCOUNTS,
    DAY_S,
    EC2,
    FIRST,
    METRICS,
    NOW_S,
    REGION,
    SQS,
    STEADY,
    TRUTH,
    all_pages,
    ask,
    body_of,
    on_wire,
    query,
    refusal,
)
from workers.simulated.cloudwatch import list_metrics
from workers.simulated.requests import AwsError
from workers.world import Question, Truth, World

# --- GetMetricData --------------------------------------------------------------------------------------------


def test_answers_are_the_truths_newest_first_unless_asked_otherwise() -> None:
    [result], _ = ask(body_of([query(0, STEADY)]))
    [ascending], _ = ask(body_of([query(0, STEADY)], ScanBy="TimestampAscending"))
    times_s, values = TRUTH.points(FIRST, REGION, *STEADY[:3], "Average", 60, NOW_S - 300, NOW_S, NOW_S)

    assert len(values) > 1
    assert (ascending["Timestamps"], ascending["Values"]) == (times_s.tolist(), values.tolist())
    assert (result["Timestamps"], result["Values"]) == (times_s.tolist()[::-1], values.tolist()[::-1])
    assert (result["Id"], result["Label"], result["StatusCode"]) == ("q0", STEADY.name, "Complete")


def test_a_metric_that_does_not_exist_is_complete_and_empty() -> None:
    nothing = METRICS[0]._replace(name="Nothing")

    assert ask(body_of([query(0, nothing)])) == (
        [{"Id": "q0", "Label": "Nothing", "Timestamps": [], "Values": [], "StatusCode": "Complete"}],
        "",
    )


def test_a_label_is_given_back_and_data_not_wanted_is_left_out() -> None:
    queries = [query(0, METRICS[0], Label="mine"), query(1, STEADY, ReturnData=False)]

    assert [(r["Id"], r["Label"]) for r in ask(body_of(queries))[0]] == [("q0", "mine")]


def test_a_unit_that_is_not_the_metrics_gives_nothing() -> None:
    wanted = query(0, METRICS[0])
    wanted["MetricStat"]["Unit"] = "Bytes"

    assert ask(body_of([wanted]))[0][0]["Values"] == []


def test_a_page_ends_at_100800_points_and_all_pages_are_one_answer() -> None:
    queries = [query(n, m) for n, m in enumerate(METRICS[:500])]
    body = body_of(queries, NOW_S - 12 * 3600)
    pages = all_pages(body)
    points: dict[str, list[tuple[int, float]]] = {}
    for result in (r for page in pages for r in page):
        points.setdefault(result["Id"], []).extend(zip(result["Timestamps"], result["Values"], strict=True))
    answers = TRUTH.answers(
        FIRST,
        REGION,
        [Question(*m[:3], "Average", 60) for m in METRICS[:500]],
        NOW_S - 12 * 3600,
        NOW_S,
        NOW_S,
    )

    assert [sum(len(r["Values"]) for r in page) for page in pages[:-1]] == [100_800] * 3
    assert [list(zip(*a, strict=True))[::-1] for a in answers] == [points[q["Id"]] for q in queries]
    assert {page[-1]["StatusCode"] for page in pages[:-1]} == {"PartialData"}
    assert {r["StatusCode"] for page in pages for r in page[:-1]} == {"Complete"}
    assert pages[-1][-1]["StatusCode"] == "Complete"


@pytest.mark.parametrize("most", [1, 7, 10, 11])
def test_pages_of_any_size_join_to_the_same_answer(most: int) -> None:
    queries = [query(n, m) for n, m in enumerate(METRICS[1:6])]
    whole = {r["Id"]: r["Values"] for r in ask(body_of(queries))[0]}
    pages = all_pages(body_of(queries, MaxDatapoints=most))
    joined: dict[str, list[float]] = {}
    for result in (r for page in pages for r in page):
        joined.setdefault(result["Id"], []).extend(result["Values"])

    assert joined == whole
    assert max(sum(len(r["Values"]) for r in page) for page in pages) == most


def test_a_page_series_is_answered_as_of_its_first_page() -> None:
    body = body_of([query(n, m) for n, m in enumerate(METRICS[:50])], MaxDatapoints=100)
    first, token = ask(body)
    then, _ = ask(body | {"NextToken": token}, NOW_S)
    later, _ = ask(body | {"NextToken": token}, NOW_S + 3600)

    assert later == then
    assert ask(body, NOW_S + 3600)[0] != first


def test_a_token_of_another_request_or_of_nobody_is_refused() -> None:
    body = body_of([query(n, m) for n, m in enumerate(METRICS[:50])], MaxDatapoints=100)
    _, token = ask(body)

    assert refusal(body | {"NextToken": token, "ScanBy": "TimestampAscending"})[0] == "InvalidNextToken"
    assert refusal(body | {"NextToken": "bm9ib2R5"})[0] == "InvalidNextToken"
    assert refusal(body | {"NextToken": "%"})[0] == "InvalidNextToken"


@pytest.mark.parametrize(
    ("age_s", "kept_period_s", "too_fine_s"),
    [(3 * 3600 + 120, 60, 10), (15 * DAY_S + 3600, 300, 60), (63 * DAY_S + 3600, 3600, 300)],
)
def test_what_is_too_fine_for_its_age_is_complete_and_empty(
    age_s: int, kept_period_s: int, too_fine_s: int
) -> None:
    start_s = NOW_S - age_s
    kept, fine = (
        ask(body_of([query(0, STEADY, period_s=p)], start_s, start_s + 7200))[0][0]
        for p in (kept_period_s, too_fine_s)
    )

    assert len(kept["Values"]) >= 2
    assert (fine["StatusCode"], fine["Values"]) == ("Complete", [])


def test_nothing_is_kept_for_more_than_455_days() -> None:
    body = body_of([query(0, STEADY, period_s=3600)], NOW_S - 500 * DAY_S, NOW_S, ScanBy="TimestampAscending")
    [result], _ = ask(body)

    assert NOW_S - 455 * DAY_S <= result["Timestamps"][0] < NOW_S - 454 * DAY_S


@pytest.mark.parametrize(("age_s", "unit_s"), [(3600, 60), (16 * DAY_S, 300), (64 * DAY_S, 3600)])
def test_the_start_is_rounded_down_by_its_age(age_s: int, unit_s: int) -> None:
    start_s = NOW_S - age_s
    assert start_s % 3600 == 0
    rest_s = unit_s - 1
    [result], _ = ask(
        body_of(
            [query(0, STEADY, period_s=unit_s)],
            start_s + rest_s,
            start_s + 7200,
            ScanBy="TimestampAscending",
        )
    )

    assert result["Timestamps"][0] == start_s


def test_501_queries_are_refused() -> None:
    queries = [query(n, METRICS[n]) for n in range(501)]

    assert refusal(body_of(queries)) == (
        "ValidationError",
        "The collection MetricDataQueries must not have a size greater than 500.",
    )


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (body_of([query(1, METRICS[0]), query(1, METRICS[1])]), "ValidationError", "not unique"),
        (body_of([query(1, METRICS[0], Id="Upper")]), "ValidationError", "expected pattern"),
        (body_of([{"Id": "e1", "Expression": "m1*2"}]), "ValidationError", "no metric math"),
        (body_of([query(1, METRICS[0], period_s=61)]), "ValidationError", "multiple of 60"),
        (body_of([query(1, METRICS[0], period_s=0)]), "ValidationError", "multiple of 60"),
        (body_of([query(1, METRICS[0], stat="Median")]), "ValidationError", "Stat is not supported"),
        (body_of([query(1, METRICS[0])], NOW_S, NOW_S), "ValidationError", "must not equal"),
        (body_of([query(1, METRICS[0])], NOW_S + 1, NOW_S), "ValidationError", "must be less than"),
        (body_of([query(1, METRICS[0])], ScanBy="Down"), "ValidationError", "ScanBy"),
        (body_of([query(1, METRICS[0])], MaxDatapoints=100_801), "ValidationError", "MaxDatapoints"),
        (
            body_of([{"Id": "q1", "MetricStat": {"Metric": [], "Period": 60, "Stat": "Sum"}}]),
            "ValidationError",
            "required",
        ),
        (body_of([query(1, METRICS[0])], MaxDatapoints="many"), "", "not a GetMetricData request"),
        (body_of([1]), "", "not a GetMetricData request"),  # type: ignore[list-item]
        (body_of([query(1, METRICS[0])], start_s="yesterday"), "", "not a timestamp"),  # type: ignore[arg-type]
        ({"StartTime": 1, "EndTime": 2}, "MissingParameter", "MetricDataQueries is required"),
    ],
)
def test_a_bad_request_is_refused_with_awss_code(body: dict[str, Any], code: str, message: str) -> None:
    refused = refusal(body)

    assert refused[0] == code
    assert message in refused[1]


# --- ListMetrics ----------------------------------------------------------------------------------------------


def listed(truth: Truth = TRUTH, account: str = FIRST, **body: Any) -> list[dict[str, Any]]:
    items, token = [], ""
    for _ in range(20):
        page = list_metrics(truth, account, REGION, body | ({"NextToken": token} if token else {}), NOW_S)
        assert len(page.items) <= 500
        items += page.items
        token = page.next_token
        if not token:
            return items
    raise AssertionError("the pages do not end")


def test_all_metrics_are_listed_five_hundred_a_page() -> None:
    assert listed() == [on_wire(m) for m in METRICS]


def test_metrics_are_filtered_by_namespace_name_and_dimensions() -> None:
    [(name, value)] = METRICS[0].dimensions

    assert {m["Namespace"] for m in listed(Namespace="AWS/SQS")} == {"AWS/SQS"}
    assert len(listed(Namespace="AWS/SQS")) == 600
    assert len(listed(MetricName="NetworkIn")) == 300
    assert listed(MetricName="NetworkIn", Dimensions=[{"Name": name, "Value": value}]) == [
        on_wire(METRICS[1])
    ]
    assert len(listed(Dimensions=[{"Name": name}])) == 600
    assert listed(Namespace="AWS") == []


def test_recently_active_leaves_out_the_silent_and_takes_no_other_value() -> None:
    truth = World(1, ACCOUNTS, (REGION,), 1200, (EC2, SQS), silent_share=0.1)

    assert len(listed(truth)) == 1200
    assert 1000 < len(listed(truth, RecentlyActive="PT3H")) < 1150
    with pytest.raises(AwsError, match="RecentlyActive"):
        list_metrics(truth, FIRST, REGION, {"RecentlyActive": "PT1H"}, NOW_S)


def test_a_token_of_another_listing_is_refused() -> None:
    token = list_metrics(TRUTH, FIRST, REGION, {}, NOW_S).next_token

    with pytest.raises(AwsError, match="InvalidNextToken"):
        list_metrics(TRUTH, FIRST, REGION, {"NextToken": token, "Namespace": "AWS/SQS"}, NOW_S)
