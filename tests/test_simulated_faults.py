from __future__ import annotations

from typing import Any

import aiohttp
import orjson
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError

from ingest.clock import ManualClock
from tests.simulated_scene import (
    FIRST,
    GET_METRIC_DATA,
    NOW_S,
    REGION,
    SECOND,
    STEADY,
    asked,
    assume,
    body_of,
    client,
    code_of,
    headers,
    query,
    running,
)
from workers.simulated.faults import Faults
from workers.simulator import Simulator


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
    assert bad[0][1].startswith("unknown faults throtle_share; there are seed, only_accounts, throttle_share")
    assert sim.faults == Faults()


# --- what happens to single accounts, credentials, actions and regions -----------------------------------------


async def test_faults_of_some_accounts_spare_the_others() -> None:
    async with running(faults=Faults(only_accounts=(SECOND,), error_share=1.0)) as sim:
        async with client(sim, **await assume(sim)) as second:
            with pytest.raises(ClientError) as failed:
                await second.list_metrics()
        async with client(sim) as first:
            assert (await first.list_metrics())["Metrics"]

    assert code_of(failed) == (500, "InternalServiceError")


async def test_denied_actions_are_denied_by_pattern_in_every_service() -> None:
    async with running(faults=Faults(denied_actions=("cloudwatch:List*", "tag:*", "organizations:*"))) as sim:
        codes = []
        for service, operation in (
            ("cloudwatch", "list_metrics"),
            ("resourcegroupstaggingapi", "get_resources"),
            ("organizations", "list_roots"),
        ):
            async with client(sim, service) as aws:
                with pytest.raises(ClientError) as denied:
                    await getattr(aws, operation)()
            codes.append(code_of(denied)[1])
        [results] = await answers(sim, asked(), 1)
        sim.faults = Faults(denied_actions=("sts:AssumeRole",))
        with pytest.raises(ClientError) as no_role:
            await assume(sim)

    assert codes == ["AccessDenied", "AccessDeniedException", "AccessDeniedException"]
    assert code_of(no_role)[1] == "AccessDenied"
    assert len(results) == 3


async def test_credentials_hold_for_so_many_calls_and_new_ones_as_long() -> None:
    async with running(faults=Faults(expire_after_calls=2)) as sim:
        codes: list[tuple[int, str]] = []
        for _ in range(2):
            async with client(sim, **await assume(sim, DurationSeconds=900 + len(codes))) as cloudwatch:
                for _ in range(2):
                    await cloudwatch.list_metrics()
                with pytest.raises(ClientError) as expired:
                    await cloudwatch.list_metrics()
            codes.append(code_of(expired))
        sim.faults = Faults(expired_accounts=(SECOND,))
        async with client(sim, **await assume(sim)) as cloudwatch:
            with pytest.raises(ClientError) as for_good:
                await cloudwatch.list_metrics()

    assert codes == [(403, "ExpiredToken")] * 2
    assert code_of(for_good) == (403, "ExpiredToken")


async def test_a_region_that_is_not_enabled_knows_nobody() -> None:
    async with running(faults=Faults(disabled_regions=(REGION,))) as sim:
        async with client(sim) as cloudwatch:
            with pytest.raises(ClientError) as unknown:
                await cloudwatch.list_metrics()
        with pytest.raises(ClientError) as no_sts:
            await assume(sim)

    assert code_of(unknown) == (403, "InvalidClientTokenId")
    assert code_of(no_sts) == (403, "RegionDisabledException")


# --- bodies and pages that nobody expects ----------------------------------------------------------------------


async def raw_answer(sim: Simulator) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession(sim.url, headers=headers() | GET_METRIC_DATA) as http,
        http.post("/", data=orjson.dumps(body_of([query(0, STEADY)]))) as response,
    ):
        return response.status, await response.read()


async def test_a_truncated_answer_announces_more_than_it_brings_and_is_billed() -> None:
    async with running(faults=Faults(truncated_share=1.0)) as sim:
        with pytest.raises(aiohttp.ClientPayloadError):
            await raw_answer(sim)
        billed = sim.billing()["accounts"][FIRST]["metrics_requested"]

    assert billed == 1


async def test_what_stands_before_aws_answers_503_in_html_and_bills_nothing() -> None:
    async with running(faults=Faults(unavailable_share=1.0)) as sim:
        status, body = await raw_answer(sim)
        billed = sim.billing()["accounts"][FIRST]["metrics_requested"]

    assert (status, billed) == (503, 0)
    assert body.startswith(b"<html>")


async def test_a_slow_answer_is_the_right_one_and_late() -> None:
    clock = ManualClock(NOW_S)
    async with running(clock=clock) as sim:
        prompt = await raw_answer(sim)
        sim.faults = Faults(slow_share=1.0, slow_ms=40_000)
        late = await raw_answer(sim)

    assert late == prompt
    assert clock.monotonic_s() == 40


@pytest.mark.parametrize("operation", ["list_metrics", "get_metric_data"])
async def test_endless_pages_have_a_new_token_each(operation: str) -> None:
    request = asked() if operation == "get_metric_data" else {"Namespace": "AWS/Nothing"}
    async with running(faults=Faults(token_endless_share=1.0)) as sim, client(sim) as cloudwatch:
        tokens = [(await getattr(cloudwatch, operation)(**request))["NextToken"]]
        for _ in range(5):
            tokens.append(
                (await getattr(cloudwatch, operation)(**request, NextToken=tokens[-1]))["NextToken"]
            )
        billed = sim.billing()["accounts"][FIRST]["metrics_requested"]

    assert len(set(tokens)) == 6
    assert billed == (3 if operation == "get_metric_data" else 0)


async def test_a_listings_token_may_lead_back_too() -> None:
    async with running(faults=Faults(token_loop_share=1.0)) as sim, client(sim) as cloudwatch:
        first = await cloudwatch.list_metrics()
        again = await cloudwatch.list_metrics(NextToken=first["NextToken"])

    assert again["Metrics"] == first["Metrics"]
    assert again["NextToken"] == first["NextToken"]


async def test_more_metrics_than_are_allowed_are_left_out_with_a_message() -> None:
    async with running(faults=Faults(allowed_metrics_max=2)) as sim, client(sim) as cloudwatch:
        answer = await cloudwatch.get_metric_data(**asked(5))
        few = await cloudwatch.get_metric_data(**asked(2))

    assert [r["Id"] for r in answer["MetricDataResults"]] == ["q0", "q1"]
    assert answer["Messages"] == [
        {"Code": "MaxMetricsExceeded", "Value": "Maximum number of allowed metrics exceeded"}
    ]
    assert "Messages" not in few


async def test_a_flood_of_a_million_metrics_is_listed_in_pages_of_500() -> None:
    async with (
        running(faults=Faults(flood_metrics=1_000_000, wild_metrics=1)) as sim,
        client(sim) as cloudwatch,
    ):
        pages, request = [], {"Namespace": "AWS/SQS"}
        for _ in range(3):
            pages.append(await cloudwatch.list_metrics(**request))
            request["NextToken"] = pages[-1]["NextToken"]
    metrics = [m for page in pages for m in page["Metrics"]]
    wild, flood = metrics[600], metrics[601:]

    assert len(metrics) == 1500
    assert (len(wild["Dimensions"]), {len(d["Value"]) for d in wild["Dimensions"]}) == (100, {10_002})
    assert {m["MetricName"] for m in flood} == {"Sent"}
    assert len({m["Dimensions"][0]["Value"] for m in flood}) == len(flood) == 899
