from __future__ import annotations

from email.utils import parsedate_to_datetime

import aiohttp
import cbor2
import orjson
import pytest
from botocore.exceptions import ClientError

from ingest.clock import ManualClock
from tests.simulated_scene import (
    FIRST,
    GET_METRIC_DATA,
    METRICS,
    NOW_S,
    REGION,
    SECOND,
    SESSION,
    TRUTH,
    ask,
    asked,
    assume,
    body_of,
    client,
    code_of,
    headers,
    on_wire,
    query,
    running,
)
from workers import simulator
from workers.simulated.protocols import CBOR

# --- over HTTP, by AWS's own client ---------------------------------------------------------------------------


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


@pytest.mark.parametrize("points", [0, 1, 23, 24, 255, 256, 70_000])
def test_cbor_of_any_length_is_read_back(points: int) -> None:
    result = {
        "Id": "q1",
        "Label": "é" * 30,
        "Timestamps": [NOW_S + 60 * n for n in range(points)],
        "Values": [n / 3 for n in range(points)],
        "StatusCode": "Complete",
        "Messages": [{"Code": "a", "Value": "b"}],
    }
    body = {"MetricDataResults": [result] * (25 if points < 1000 else 1), "NextToken": "x", "Messages": []}
    back = cbor2.loads(CBOR.dumps(body))
    for one in back["MetricDataResults"]:
        one["Timestamps"] = [int(t.timestamp()) for t in one["Timestamps"]]

    assert back == body


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
