from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp
import cbor2
import orjson
import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import ClientError, ConnectionClosedError

from ingest.clock import Clock, ManualClock
from ingest.errors import Fatal
from shard_config.load import shipped_services
from shard_config.model import MetricProfile, ServiceProfile
from workers import simulator
from workers.simulated.cloudwatch import AwsError, get_metric_data, list_metrics, parse_data_request
from workers.simulated.faults import Faults
from workers.simulator import Simulator
from workers.world import Metric, Question, Truth, World, account_ids

ACCOUNTS = account_ids(2)
FIRST, SECOND = ACCOUNTS
REGION = "eu-west-1"
NOW_S = 1_800_000_000
DAY_S = 86_400
EC2 = ServiceProfile(
    service="ec2",
    namespace="AWS/EC2",
    metrics=(
        MetricProfile(name="CPUUtilization", unit="Percent", min=0, max=100),
        MetricProfile(name="NetworkIn", unit="Bytes", min=0),
    ),
)
SQS = ServiceProfile(service="sqs", namespace="AWS/SQS", metrics=(MetricProfile(name="Sent", unit="Count"),))
TRUTH = World(1, ACCOUNTS, (REGION, "us-east-1"), 1200, (EC2, SQS))
METRICS = TRUTH.metrics(FIRST, REGION)
SESSION = get_session()
STEADY = METRICS[2]
"""One that has no gaps."""


def on_wire(metric: Metric) -> dict[str, Any]:
    return {
        "Namespace": metric.namespace,
        "MetricName": metric.name,
        "Dimensions": [{"Name": k, "Value": v} for k, v in metric.dimensions],
    }


def query(n: int, metric: Metric, stat: str = "Average", period_s: int = 60, **more: Any) -> dict[str, Any]:
    return {"Id": f"q{n}", "MetricStat": {"Metric": on_wire(metric), "Period": period_s, "Stat": stat}} | more


def body_of(
    queries: Sequence[dict[str, Any]], start_s: int = NOW_S - 300, end_s: int = NOW_S, **more: Any
) -> dict[str, Any]:
    return {"MetricDataQueries": list(queries), "StartTime": start_s, "EndTime": end_s} | more


def ask(body: dict[str, Any], now_s: int = NOW_S, truth: Truth = TRUTH) -> tuple[list[dict[str, Any]], str]:
    page = get_metric_data(truth, FIRST, REGION, parse_data_request(body), now_s)
    return page.items, page.next_token


def all_pages(body: dict[str, Any], now_s: int = NOW_S) -> list[list[dict[str, Any]]]:
    pages, token = [], ""
    for _ in range(100):
        items, token = ask(body | ({"NextToken": token} if token else {}), now_s)
        pages.append(items)
        if not token:
            return pages
    raise AssertionError("the pages do not end")


def refusal(body: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(AwsError) as refused:
        ask(body)
    return refused.value.query_code, refused.value.message


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


# --- over HTTP, by AWS's own client ---------------------------------------------------------------------------


@asynccontextmanager
async def running(truth: Truth = TRUTH, clock: Clock | None = None, **more: Any) -> AsyncIterator[Simulator]:
    running = await simulator.start(truth, clock=clock or ManualClock(NOW_S), **more)
    try:
        yield running
    finally:
        await running.close()


@asynccontextmanager
async def client(sim: Simulator, service: str = "cloudwatch", **credentials: str) -> AsyncIterator[Any]:
    credentials = credentials or {"aws_access_key_id": f"AKIA{FIRST}", "aws_secret_access_key": "secret"}
    async with SESSION.create_client(
        service,
        endpoint_url=sim.url,
        region_name=REGION,
        config=AioConfig(retries={"total_max_attempts": 1}),
        **credentials,
    ) as made:
        yield made


async def assume(sim: Simulator, account: str = SECOND, **more: Any) -> dict[str, str]:
    async with client(sim, "sts") as sts:
        answer = await sts.assume_role(
            RoleArn=f"arn:aws:iam::{account}:role/path/Headgate", RoleSessionName="headgate", **more
        )
    given = answer["Credentials"]
    return {
        "aws_access_key_id": given["AccessKeyId"],
        "aws_secret_access_key": given["SecretAccessKey"],
        "aws_session_token": given["SessionToken"],
    }


def asked(count: int = 3) -> dict[str, Any]:
    body = body_of([query(n, m) for n, m in enumerate(METRICS[1 : count + 1])])
    return body | {k: datetime.fromtimestamp(body[k], UTC) for k in ("StartTime", "EndTime")}


def code_of(error: pytest.ExceptionInfo[ClientError]) -> tuple[int, str]:
    answer = error.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


async def test_aiobotocore_lists_and_reads_what_the_truth_says() -> None:
    async with running() as sim, client(sim) as cloudwatch:
        pages = [p async for p in cloudwatch.get_paginator("list_metrics").paginate()]
        answer = await cloudwatch.get_metric_data(**asked())

    assert [m for p in pages for m in p["Metrics"]] == [on_wire(m) for m in METRICS]
    for result, metric in zip(answer["MetricDataResults"], METRICS[1:4], strict=True):
        times_s, values = TRUTH.points(FIRST, REGION, *metric[:3], "Average", 60, NOW_S - 300, NOW_S, NOW_S)
        assert [int(t.timestamp()) for t in result["Timestamps"]] == times_s.tolist()[::-1]
        assert result["Values"] == values.tolist()[::-1]


async def test_the_date_header_is_the_query_time() -> None:
    clock = ManualClock(NOW_S)
    async with running(clock=clock) as sim, client(sim) as cloudwatch:
        clock.advance(61.9)
        answer = await cloudwatch.get_metric_data(**asked())

    date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
    assert int(parsedate_to_datetime(date).timestamp()) == NOW_S + 61


async def test_later_pages_have_a_date_of_their_own_and_the_first_pages_values() -> None:
    clock = ManualClock(NOW_S)
    async with running(clock=clock) as sim, client(sim) as cloudwatch:
        request = asked(50) | {"MaxDatapoints": 100}
        first = await cloudwatch.get_metric_data(**request)
        clock.advance(900)
        second = await cloudwatch.get_metric_data(**request, NextToken=first["NextToken"])

    page, _ = ask(
        body_of(
            [query(n, m) for n, m in enumerate(METRICS[1:51])],
            MaxDatapoints=100,
            NextToken=first["NextToken"],
        )
    )
    assert [r["Values"] for r in second["MetricDataResults"]] == [r["Values"] for r in page]
    date = second["ResponseMetadata"]["HTTPHeaders"]["date"]
    assert int(parsedate_to_datetime(date).timestamp()) == NOW_S + 900


async def test_an_assumed_role_sees_its_own_account_only() -> None:
    async with running() as sim:
        credentials = await assume(sim)
        async with client(sim, "sts", **credentials) as sts:
            identity = await sts.get_caller_identity()
        async with client(sim, **credentials) as cloudwatch:
            listing = await cloudwatch.list_metrics()

    assert identity["Account"] == SECOND
    assert identity["Arn"] == f"arn:aws:sts::{SECOND}:assumed-role/Headgate/headgate"
    assert listing["Metrics"] == [on_wire(m) for m in TRUTH.metrics(SECOND, REGION)[:500]]


async def test_the_region_is_that_of_the_signature() -> None:
    async with (
        running() as sim,
        SESSION.create_client(
            "cloudwatch",
            endpoint_url=sim.url,
            region_name="us-east-1",
            aws_access_key_id="ANYKEY",
            aws_secret_access_key="secret",
        ) as cloudwatch,
    ):
        listing = await cloudwatch.list_metrics()

    assert listing["Metrics"] == [on_wire(m) for m in TRUTH.metrics(FIRST, "us-east-1")[:500]]


async def test_a_role_of_an_unknown_account_is_denied() -> None:
    async with running() as sim:
        with pytest.raises(ClientError) as denied:
            await assume(sim, "100000000003")

    assert code_of(denied) == (403, "AccessDenied")


async def test_a_role_wants_its_external_id() -> None:
    async with running(external_id="opensesame") as sim:
        with pytest.raises(ClientError) as denied:
            await assume(sim)
        with pytest.raises(ClientError):
            await assume(sim, ExternalId="sesame")
        credentials = await assume(sim, ExternalId="opensesame")

    assert code_of(denied) == (403, "AccessDenied")
    assert credentials["aws_access_key_id"].startswith(f"ASIA{SECOND}")


async def test_credentials_expire() -> None:
    clock = ManualClock(NOW_S)
    async with running(credential_clock=clock) as sim:
        credentials = await assume(sim, DurationSeconds=900)
        async with client(sim, **credentials) as cloudwatch:
            clock.advance(899)
            await cloudwatch.get_metric_data(**asked())
            clock.advance(1)
            with pytest.raises(ClientError) as expired:
                await cloudwatch.get_metric_data(**asked())

    assert code_of(expired) == (403, "ExpiredToken")


@pytest.mark.parametrize(
    "credentials",
    [
        {"aws_access_key_id": "AKIA999999999999", "aws_secret_access_key": "x"},
        {"aws_access_key_id": f"ASIA{SECOND}", "aws_secret_access_key": "x", "aws_session_token": "5b5d"},
        {"aws_access_key_id": f"ASIA{SECOND}", "aws_secret_access_key": "x"},
    ],
)
async def test_credentials_that_were_never_given_out_are_refused(credentials: dict[str, str]) -> None:
    async with running() as sim, client(sim, **credentials) as cloudwatch:
        with pytest.raises(ClientError) as refused:
            await cloudwatch.list_metrics()

    assert code_of(refused) == (403, "InvalidClientTokenId")


async def test_errors_carry_the_code_that_query_clients_know() -> None:
    async with running() as sim, client(sim) as cloudwatch:
        with pytest.raises(ClientError) as refused:
            await cloudwatch.get_metric_data(**asked(501))

    assert code_of(refused) == (400, "ValidationError")


# --- other protocols ------------------------------------------------------------------------------------------


def headers(account: str = FIRST) -> dict[str, str]:
    scope = f"AKIA{account}/20270115/{REGION}/monitoring/aws4_request"
    return {"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"}


GET_METRIC_DATA = {"X-Amz-Target": "GraniteServiceVersion20100801.GetMetricData"}


async def test_cbor_answers_as_json_does_with_tagged_timestamps() -> None:
    body = body_of([query(n, m) for n, m in enumerate(METRICS[1:4])])
    tagged = body | {k: cbor2.CBORTag(1, float(body[k])) for k in ("StartTime", "EndTime")}
    async with running() as sim, aiohttp.ClientSession(sim.url, headers=headers()) as http:
        path = "/service/GraniteServiceVersion20100801/operation/GetMetricData"
        async with http.post(path, data=cbor2.dumps(tagged)) as response:
            answer = cbor2.loads(await response.read())
            content = response.headers["Content-Type"], response.headers["smithy-protocol"]

    for result in answer["MetricDataResults"]:
        result["Timestamps"] = [int(t.timestamp()) for t in result["Timestamps"]]
    assert content == ("application/cbor", "rpc-v2-cbor")
    assert answer == {"MetricDataResults": ask(body)[0]}


async def test_an_error_in_cbor_has_its_code_in_body_and_header() -> None:
    async with running() as sim, aiohttp.ClientSession(sim.url, headers=headers()) as http:
        path = "/service/GraniteServiceVersion20100801/operation/ListMetrics"
        async with http.post(path, data=cbor2.dumps({"RecentlyActive": "PT1H"})) as response:
            answer = cbor2.loads(await response.read())
            status, code = response.status, response.headers["x-amzn-query-error"]

    assert (status, code, answer["__type"]) == (400, "ValidationError;Sender", "ValidationError")


@pytest.mark.parametrize(
    ("target", "raw", "code"),
    [
        ("GraniteServiceVersion20100801.GetMetricData", b"{", "SerializationException"),
        ("GraniteServiceVersion20100801.GetMetricData", b"[]", "SerializationException"),
        ("GraniteServiceVersion20100801.PutMetricData", b"{}", "UnknownOperationException"),
    ],
)
async def test_what_is_not_a_request_is_refused(target: str, raw: bytes, code: str) -> None:
    async with (
        running() as sim,
        aiohttp.ClientSession(sim.url, headers=headers() | {"X-Amz-Target": target}) as http,
        http.post("/", data=raw) as response,
    ):
        answer = orjson.loads(await response.read())

    assert (response.status, answer["__type"]) == (400, code)


async def test_a_request_without_credentials_is_refused() -> None:
    async with (
        running() as sim,
        aiohttp.ClientSession(sim.url) as http,
        http.post(
            "/", data=b"{}", headers={"X-Amz-Target": "GraniteServiceVersion20100801.ListMetrics"}
        ) as r,
    ):
        answer = orjson.loads(await r.read())

    assert (r.status, answer["__type"]) == (403, "MissingAuthenticationTokenException")


# --- quotas and the bill --------------------------------------------------------------------------------------


async def test_calls_beyond_the_quota_are_throttled_and_not_billed() -> None:
    clock = ManualClock(NOW_S)
    async with running(clock=clock, calls_per_s=2) as sim, client(sim) as cloudwatch:
        for _ in range(2):
            await cloudwatch.get_metric_data(**asked())
        with pytest.raises(ClientError) as throttled:
            await cloudwatch.get_metric_data(**asked())
        clock.advance(0.5)
        await cloudwatch.get_metric_data(**asked())
        of_first = sim.billing()["accounts"][FIRST]

    assert code_of(throttled) == (400, "ThrottlingException")
    assert of_first == {
        "metrics_requested": 9,
        "calls": {REGION: {"GetMetricData": 3}},
        "throttled": {REGION: {"GetMetricData": 1}},
    }


async def test_listing_has_a_quota_of_25_calls_a_second_of_its_own() -> None:
    async with running(calls_per_s=1) as sim, client(sim) as cloudwatch:
        for _ in range(25):
            await cloudwatch.list_metrics()
        with pytest.raises(ClientError) as throttled:
            await cloudwatch.list_metrics()
        await cloudwatch.get_metric_data(**asked())

    assert code_of(throttled) == (400, "ThrottlingException")


async def test_datapoints_have_a_quota_by_range_whatever_there_is() -> None:
    nothing = [query(n, METRICS[0]._replace(name=f"Nothing{n}")) for n in range(500)]
    raw = orjson.dumps(body_of(nothing, NOW_S - 3 * 3600))
    async with running() as sim, aiohttp.ClientSession(sim.url, headers=headers() | GET_METRIC_DATA) as http:
        found = []
        for _ in range(3):
            async with http.post("/", data=raw) as response:
                found.append((response.status, orjson.loads(await response.read()).get("__type")))

    assert simulator.DATAPOINTS_PER_S == 2 * 500 * 180
    assert found == [(200, None), (200, None), (400, "ThrottlingException")]


async def test_quotas_are_each_accounts_own_and_zero_lifts_them() -> None:
    async with running(calls_per_s=1) as sim:
        credentials = await assume(sim)
        async with client(sim) as first, client(sim, **credentials) as second:
            await first.get_metric_data(**asked())
            await second.get_metric_data(**asked())
    async with running(calls_per_s=0) as sim, client(sim) as cloudwatch:
        for _ in range(60):
            await cloudwatch.list_metrics()
        calls = sim.billing()["accounts"][FIRST]["calls"]

    assert calls == {REGION: {"ListMetrics": 60}}


@pytest.mark.parametrize(("bill_pages", "billed"), [(False, 50), (True, 150)])
async def test_continuation_pages_are_billed_once_unless_told_otherwise(
    bill_pages: bool, billed: int
) -> None:
    async with running(bill_pages=bill_pages) as sim, client(sim) as cloudwatch:
        request = asked(50) | {"MaxDatapoints": 60}
        pages = [p async for p in cloudwatch.get_paginator("get_metric_data").paginate(**request)]
        async with aiohttp.ClientSession(sim.url) as http, http.get("/billing") as response:
            bill = await response.json()

    assert len(pages) == 3
    assert bill["accounts"][FIRST]["metrics_requested"] == billed
    assert bill["accounts"][SECOND]["metrics_requested"] == 0


# --- faults ---------------------------------------------------------------------------------------------------


async def answers(sim: Simulator, request: dict[str, Any], times: int) -> list[Any]:
    """Results, or the HTTP status and the error's code."""
    found: list[Any] = []
    async with client(sim) as cloudwatch:
        for _ in range(times):
            try:
                found.append((await cloudwatch.get_metric_data(**request))["MetricDataResults"])
            except ClientError as e:
                found.append((e.response["ResponseMetadata"]["HTTPStatusCode"], e.response["Error"]["Code"]))
    return found


@pytest.mark.parametrize(
    ("fault", "refused"),
    [("throttle_share", (400, "ThrottlingException")), ("error_share", (500, "InternalServiceError"))],
)
async def test_a_share_of_the_calls_fails_the_same_ones_for_one_seed(
    fault: str, refused: tuple[int, str]
) -> None:
    runs = []
    for seed in (7, 7, 8):
        async with running(faults=Faults(seed=seed, **{fault: 0.5})) as sim:  # type: ignore[arg-type]
            runs.append([a == refused for a in await answers(sim, asked(), 40)])
            billed = sim.billing()["accounts"][FIRST]["metrics_requested"]
            assert billed == 3 * runs[-1].count(False)

    assert runs[0] == runs[1] != runs[2]
    assert 8 < sum(runs[0]) < 32


async def test_partial_data_clears_on_the_next_ask() -> None:
    async with running(faults=Faults(partial_share=1.0)) as sim:
        first, second = await answers(sim, asked(20), 2)

    assert {r["StatusCode"] for r in first} == {"PartialData"}
    assert {r["StatusCode"] for r in second} == {"Complete"}
    for half, whole in zip(first, second, strict=True):
        assert half["Values"] == whole["Values"][: len(whole["Values"]) // 2]


async def test_results_fail_internally_or_are_missing_in_their_share() -> None:
    async with running(faults=Faults(internal_error_share=0.3)) as sim:
        failing = await answers(sim, asked(200), 2)
        sim.faults = Faults(missing_id_share=0.3)
        [missing] = await answers(sim, asked(200), 1)

    for results in failing:
        failed = {r["Id"] for r in results if r["StatusCode"] == "InternalError"}
        assert 30 < len(failed) < 90
        assert not any(r["Values"] for r in results if r["Id"] in failed)
    assert failing[0] != failing[1]
    assert 110 < len(missing) < 170


async def test_forbidden_metrics_stay_forbidden() -> None:
    async with running(faults=Faults(forbidden_share=0.3)) as sim:
        first, second = await answers(sim, asked(200), 2)

    forbidden = [r["Id"] for r in first if r["StatusCode"] == "Forbidden"]
    assert 30 < len(forbidden) < 90
    assert forbidden == [r["Id"] for r in second if r["StatusCode"] == "Forbidden"]


async def test_a_forbidden_account_may_assume_but_not_read() -> None:
    async with running(faults=Faults(forbidden_accounts=(SECOND,))) as sim:
        credentials = await assume(sim)
        async with client(sim, **credentials) as cloudwatch:
            with pytest.raises(ClientError) as forbidden:
                await cloudwatch.list_metrics()
        sim.faults = Faults(denied_roles=(SECOND,))
        with pytest.raises(ClientError) as denied:
            await assume(sim)

    assert code_of(forbidden) == code_of(denied) == (403, "AccessDenied")


async def test_ids_are_shuffled_and_points_repeated() -> None:
    async with running() as sim:
        [plain] = await answers(sim, asked(50), 1)
        sim.faults = Faults(shuffle_ids=True, repeat_share=1.0)
        [spoilt] = await answers(sim, asked(50), 1)

    assert [r["Id"] for r in plain] != [r["Id"] for r in spoilt]
    by_id = {r["Id"]: r for r in spoilt}
    assert {k: r["Values"] for k, r in by_id.items()} == {
        r["Id"]: r["Values"][:1] + r["Values"] for r in plain
    }


async def test_a_reset_connection_loses_an_answer_that_is_billed() -> None:
    async with running(faults=Faults(reset_share=1.0)) as sim, client(sim) as cloudwatch:
        with pytest.raises(ConnectionClosedError):
            await cloudwatch.get_metric_data(**asked())
        billed = sim.billing()["accounts"][FIRST]["metrics_requested"]

    assert billed == 3


async def test_a_malformed_answer_ends_in_its_middle() -> None:
    body = orjson.dumps(body_of([query(0, STEADY)]))
    async with (
        running(faults=Faults(malformed_share=1.0)) as sim,
        aiohttp.ClientSession(sim.url, headers=headers() | GET_METRIC_DATA) as http,
        http.post("/", data=body) as response,
    ):
        raw = await response.read()

    assert response.status == 200
    assert raw.startswith(b'{"MetricDataResults"')
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(raw)


async def test_a_looping_token_leads_back_to_its_own_page() -> None:
    request = asked(50) | {"MaxDatapoints": 100}
    async with running(faults=Faults(token_loop_share=1.0)) as sim, client(sim) as cloudwatch:
        first = await cloudwatch.get_metric_data(**request)
        again = await cloudwatch.get_metric_data(**request, NextToken=first["NextToken"])

    assert again["MetricDataResults"] == first["MetricDataResults"]
    assert again["NextToken"] == first["NextToken"]


async def test_latency_is_waited_on_the_clock_that_was_passed_in() -> None:
    clock = ManualClock(NOW_S)
    async with running(clock=clock, faults=Faults(latency_ms=1500)) as sim, client(sim) as cloudwatch:
        await cloudwatch.list_metrics()

    assert clock.monotonic_s() == 1.5


async def test_faults_are_set_over_http_and_nonsense_is_refused() -> None:
    async with running() as sim, aiohttp.ClientSession(sim.url) as http:
        async with http.post("/faults", json={"throttle_share": 0.5, "forbidden_accounts": [SECOND]}) as good:
            given = await good.json()
        bad = []
        for body in ({"throtle_share": 0.5}, {"throttle_share": 2}, {"latency_ms": "1"}, [1]):
            async with http.post("/faults", json=body) as response:
                bad.append((response.status, await response.text()))
        unchanged = sim.faults
        async with http.post("/faults", json={}) as response:
            assert response.status == 200

    assert given["throttle_share"] == 0.5
    assert unchanged == Faults(throttle_share=0.5, forbidden_accounts=(SECOND,))
    assert [status for status, _ in bad] == [400] * 4
    assert bad[0][1].startswith("unknown faults throtle_share; there are seed, throttle_share")
    assert sim.faults == Faults()


# --- the command ----------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_a_clear_error() -> None:
    async with running() as sim:
        with pytest.raises(Fatal, match=r"cannot listen: .*choose another --port"):
            await simulator.start(TRUTH, port=int(sim.url.rpartition(":")[2]))


async def test_a_closed_simulator_listens_no_more_and_closes_twice() -> None:
    async with running() as sim:
        pass
    await sim.close()
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(sim.url + "/healthz")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    simulator.register(parser.add_subparsers())
    return parser.parse_args(["simulate", *words])


def test_a_folder_that_is_none_is_refused_before_anything_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parsed("--traces", str(tmp_path))

    with pytest.raises(Fatal, match=r"there is no \*.csv in it"):
        args.run(args)
    assert capsys.readouterr().out == ""


def test_a_service_without_a_profile_is_refused() -> None:
    args = parsed("--services", "ec2, nothing")

    with pytest.raises(Fatal, match=r"no profile for nothing \(there are .*ec2"):
        args.run(args)


def test_the_commands_world_is_the_one_that_its_words_describe() -> None:
    args = parsed(
        "--accounts", "2", "--regions", f"{REGION}, us-east-1", "--services", "ec2", "--metrics", "30"
    )
    truth = simulator.truth_of(args)
    same = World(1, account_ids(2), (REGION, "us-east-1"), 30, [shipped_services()["ec2"]])

    assert (truth.accounts, truth.regions) == (ACCOUNTS, (REGION, "us-east-1"))
    assert truth.metrics(SECOND, "us-east-1") == same.metrics(SECOND, "us-east-1")
    assert len(truth.metrics(SECOND, "us-east-1")) == 30


async def test_the_command_prints_its_url_serves_traces_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    (tmp_path / "speed.csv").write_text("timestamp,value\n2014-02-14 12:00:27,1.5\n")
    program = (
        "import argparse, sys; from workers import simulator; p = argparse.ArgumentParser();"
        "simulator.register(p.add_subparsers()); a = p.parse_args(); sys.exit(a.run(a))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, "simulate", "--traces", str(tmp_path), "--clock-offset-s", "-3600"),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout
        async with asyncio.timeout(30):
            url = (await process.stdout.readline()).decode().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
            async with aiohttp.ClientSession(url) as http, http.get("/healthz") as response:
                assert await response.text() == "ok\n"
                seen_s = parsedate_to_datetime(response.headers["Date"]).timestamp()
            process.send_signal(signal.SIGTERM)
            rest = await process.stdout.read()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert rest == b""
    assert abs(time.time() - 3600 - seen_s) < 60
