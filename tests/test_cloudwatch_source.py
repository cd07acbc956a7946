"""Looks of the CloudWatch source at the simulated AWS, on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ingest.clock import SystemClock
from ingest.model import Batch, LookStatus, Outcome, Target, TaskItem
from ingest.sources import aws, cloudwatch
from ingest.sources.aws import Access
from ingest.sources.cloudwatch import CloudWatchSource
from ingest.sources.metric_data import (
    Malformed,
    Page,
    Result,
)
from shard_config.model import ServiceProfile
from tests.cloudwatch_rig import (
    ACCOUNTS,
    CLOCK,
    EC2,
    REGION,
    SQS,
    Ahead,
    config_of,
    item_of,
    landed,
    looked,
    looked_ahead,
    rig,
    target_of,
    true_as_observed,
    truth_of,
)
from workers import simulator
from workers.simulated.faults import Faults
from workers.simulator import Simulator
from workers.traces import TraceWorld
from workers.world import World

TRACES = Path(__file__).parent.parent.parent / "shared" / "data" / "cloudwatch-traces"


# --- looks ----------------------------------------------------------------------------------------------------


async def test_a_look_is_the_truth_as_of_its_observed_at() -> None:
    async with rig() as (sim, source):
        for service, profile in (("ec2", EC2), ("sqs", SQS)):
            item = item_of(service)
            batches, outcome = await looked(source, item)
            assert outcome.status is LookStatus.COMPLETE
            assert outcome.detail == ""
            assert landed(batches) == truth_of(sim.truth, item, profile, outcome.observed_at_ms // 1000)
            assert abs(outcome.observed_at_ms / 1000 - CLOCK.now_s()) < 10
        assert outcome.requests == {"GetMetricData": 1, "ListMetrics": 1}
        assert sum(len(b.series) for b in batches) <= outcome.series == outcome.metrics_billed


async def test_500_queries_a_call_and_500_metrics_a_page_are_all_asked_for() -> None:
    world = World(7, ACCOUNTS[:1], [REGION], 1201, [SQS])
    async with rig(world, profiles=[SQS]) as (sim, source):
        item = item_of("sqs")
        batches, outcome = await looked(source, item)
        assert outcome.status is LookStatus.COMPLETE
        assert outcome.requests == {
            "AssumeRole": 1,
            "GetCallerIdentity": 1,
            "ListMetrics": 3,
            "GetMetricData": 3,
        }
        assert (outcome.series, outcome.metrics_billed) == (1201, 1201)
        assert all(len(b.series) <= 500 for b in batches)
        assert true_as_observed(world, batches, item, SQS)
        assert sim.billing()["accounts"][ACCOUNTS[0]]["metrics_requested"] == 1201


async def test_discovery_is_kept_for_its_interval_and_the_series_tuples_with_it() -> None:
    async with rig() as (_, source):
        first, _ = await looked(source, item_of(ago_s=7200))
        second, outcome = await looked(source, item_of(ago_s=7200))
        assert outcome.requests == {"GetMetricData": 1}
        assert [b.series for b in first] == [b.series for b in second]
        assert all(a.series is b.series for a, b in zip(first, second, strict=True))


async def test_results_in_any_order_with_repeated_points_are_as_served() -> None:
    async with rig(faults=Faults(shuffle_ids=True, repeat_share=0.5)) as (sim, source):
        item = item_of()
        batches, outcome = await looked(source, item)
        expected = truth_of(sim.truth, item, EC2, outcome.observed_at_ms // 1000)
        got = landed(batches)
        assert outcome.status is LookStatus.COMPLETE
        assert {key: sorted(set(points)) for key, points in got.items()} == expected
        assert sum(map(len, got.values())) > sum(map(len, expected.values()))


@pytest.mark.parametrize(
    "faults",
    [
        Faults(partial_share=0.5),
        Faults(internal_error_share=0.3, seed=3),
        Faults(missing_id_share=0.3, seed=3),
        Faults(malformed_share=0.6, seed=2),
        Faults(reset_share=0.6, seed=2),
        Faults(error_share=0.6, seed=2),
        Faults(throttle_share=0.5, seed=2),
    ],
    ids=lambda f: next(k for k, v in f.as_json().items() if v and k.endswith("_share")),
)
async def test_what_fails_for_a_while_is_asked_again_until_it_is_whole(
    faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloudwatch, "ROUND_PAUSE_S", (0.01,) * 9)
    monkeypatch.setattr(aws, "BACKOFF_S", (0.01,) * 9)
    async with rig(faults=faults) as (sim, source):
        item = item_of()
        batches, outcome = await looked(source, item)
        assert outcome.status is LookStatus.COMPLETE, outcome.detail
        sent = sum(sim.received[ACCOUNTS[0], api] for api in ("ListMetrics", "GetMetricData"))
        assert sent > 2  # something did fail
        assert outcome.requests["ListMetrics"] == 1  # what AWS bills
        assert set(landed(batches)) == set(truth_of(sim.truth, item, EC2, outcome.observed_at_ms // 1000))
        assert true_as_observed(sim.truth, batches, item, EC2)
        assert sum(len(b.series) for b in batches) == len(landed(batches))  # each series once
        assert outcome.metrics_billed <= sim.billing()["accounts"][ACCOUNTS[0]]["metrics_requested"]


@pytest.mark.parametrize("fault", ["internal_error_share", "missing_id_share"])
async def test_a_series_without_a_whole_answer_leaves_the_look_partial_never_complete(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloudwatch, "ROUND_PAUSE_S", (0.01, 0.01))
    async with rig(faults=Faults.parse({fault: 0.8})) as (sim, source):
        item = item_of()
        batches, outcome = await looked(source, item)
        assert outcome.status is LookStatus.PARTIAL
        assert "have no whole answer" in outcome.detail
        assert 0 < sum(len(b.series) for b in batches) < outcome.series
        assert outcome.requests["GetMetricData"] == 3
        assert true_as_observed(sim.truth, batches, item, EC2)
        assert outcome.metrics_billed == sim.billing()["accounts"][ACCOUNTS[0]]["metrics_requested"]


@pytest.mark.parametrize(
    "faults",
    [Faults(throttle_share=1), Faults(error_share=1), Faults(reset_share=1), Faults(malformed_share=1)],
)
async def test_an_outage_ends_failed_after_bounded_attempts(
    faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", (0.01,) * 4)
    async with rig() as (sim, source):
        await looked(source, item_of())
        sim.faults = faults
        batches, outcome = await looked(source, item_of())
        assert batches == []
        assert outcome.status is LookStatus.FAILED
        assert outcome.detail
        assert outcome.requests == {"GetMetricData": 5}


async def test_a_series_is_emitted_once_and_as_of_its_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloudwatch, "ROUND_PAUSE_S", (0.01,))
    rounds = 0

    async def answering(access: Any, request: Mapping[str, Any]) -> Page:
        """q0 is whole at the second ask, q1 never, q2 never at all."""
        nonlocal rounds
        rounds += 1
        at_s = request["StartTime"]
        results = {
            "q0": Result("q0", "PartialData" if rounds == 1 else "Complete", [at_s], [float(rounds)]),
            "q1": Result("q1", "PartialData", [at_s], [float(rounds)]),
        }
        asked = [query["Id"] for query in request["MetricDataQueries"]]
        return Page([results[i] for i in asked if i in results], (), "", rounds * 1000)

    async with rig(World(7, ACCOUNTS[:1], [REGION], 3, [SQS]), profiles=[SQS]) as (sim, _):
        source = CloudWatchSource(config_of(sim, [SQS]), CLOCK, answering)
        batches, outcome = await looked(source, item_of("sqs"))
        await source.close()
    points = [[value for _, value in values] for values in landed(batches).values()]
    assert points == [[2.0], [2.0]]
    assert [b.observed_at_ms for b in batches] == [2000, 2000]
    assert (outcome.status, outcome.observed_at_ms) == (LookStatus.PARTIAL, 1000)
    assert (outcome.metrics_billed, rounds) == (6, 2)


async def test_an_answer_that_is_cut_off_is_counted_as_billed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", (0.01,) * 2)
    async with rig(World(7, ACCOUNTS[:1], [REGION], 4, [SQS]), profiles=[SQS]) as (sim, source):
        await looked(source, item_of("sqs"))
        sim.faults = Faults(malformed_share=1)
        _, outcome = await looked(source, item_of("sqs"))
        assert (outcome.status, outcome.metrics_billed) == (LookStatus.FAILED, 12)
        assert sim.billing()["accounts"][ACCOUNTS[0]]["metrics_requested"] == 4 + 12


async def test_a_first_discovery_that_fails_is_a_failure_and_not_an_empty_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", (0.01,) * 2)
    async with rig(faults=Faults(error_share=1)) as (_, source):
        batches, outcome = await looked(source, item_of())
        assert (batches, outcome.status, outcome.series) == ([], LookStatus.FAILED, 0)
        assert "ListMetrics" in outcome.detail


async def test_a_discovery_that_fails_later_leaves_the_last_one_in_use_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", (0.01,) * 2)
    world = World(7, ACCOUNTS[:1], [REGION], 40, [EC2])
    sim = await simulator.start(world, clock=CLOCK, calls_per_s=0)
    clock = Ahead()
    source = CloudWatchSource(config_of(sim, [EC2]), clock)
    try:
        await looked_ahead(source, clock)
        clock.ahead_s = EC2.discovery_interval_s + 1

        def broken(*_: Any) -> Any:
            raise RuntimeError("no listing")

        monkeypatch.setattr(world, "listed", broken)
        batches, outcome = await looked_ahead(source, clock)
    finally:
        await source.close()
        await sim.close()
    assert outcome.status is LookStatus.COMPLETE
    assert "discovery is" in outcome.detail
    assert len(batches) == 1


async def test_a_target_without_metrics_is_complete_and_empty_and_observed_now() -> None:
    empty = ServiceProfile(service="rds", namespace="AWS/RDS")
    async with rig(World(7, ACCOUNTS, [REGION], 10, [SQS]), profiles=[SQS, empty]) as (_, source):
        for _ in range(2):
            batches, outcome = await looked(source, item_of("rds"))
            assert (batches, outcome.status, outcome.series) == ([], LookStatus.COMPLETE, 0)
            assert abs(outcome.observed_at_ms / 1000 - CLOCK.now_s()) < 10


async def test_points_past_retention_are_expired_and_not_empty() -> None:
    async with rig() as (_, source):
        batches, outcome = await looked(source, item_of(ago_s=20 * 86_400))
        assert (batches, outcome.status) == ([], LookStatus.EXPIRED)
        assert "kept for 360 h" in outcome.detail


@asynccontextmanager
async def small_pages(sim: Simulator) -> AsyncIterator[CloudWatchSource]:
    """A source whose calls are answered in pages of 50 datapoints."""

    async def get(access: Access, request: Mapping[str, Any]) -> Page:
        return await source._asking.calls.get_metric_data(access, {**request, "MaxDatapoints": 50})

    source = CloudWatchSource(config_of(sim), CLOCK, get)
    try:
        yield source
    finally:
        await source.close()


async def test_all_pages_are_read_and_merged_and_are_as_of_the_first() -> None:
    async with rig() as (sim, _), small_pages(sim) as source:
        item = item_of()
        batches, outcome = await looked(source, item)
        points = landed(batches)
        assert outcome.status is LookStatus.COMPLETE
        assert outcome.requests["GetMetricData"] > 5
        assert (
            outcome.metrics_billed == outcome.series * outcome.requests["GetMetricData"]
        )  # the dearer reading
        assert points == truth_of(sim.truth, item, EC2, outcome.observed_at_ms // 1000)


async def test_a_token_that_leads_back_ends_the_call_and_leaves_the_look_partial() -> None:
    async with rig() as (sim, _), small_pages(sim) as source:
        item = item_of()
        await looked(source, item)
        sim.faults = Faults(token_loop_share=1)
        batches, outcome = await looked(source, item)
        assert outcome.status is LookStatus.PARTIAL
        assert "the same NextToken came twice" in outcome.detail
        assert outcome.requests["GetMetricData"] == 2
        everything = truth_of(sim.truth, item, EC2, outcome.observed_at_ms // 1000)
        assert all(set(points) <= set(everything[key]) for key, points in landed(batches).items())


async def test_pages_that_go_round_in_a_circle_end_the_look() -> None:
    async with rig(World(7, ACCOUNTS[:1], [REGION], 40, [SQS]), profiles=[SQS]) as (sim, source):
        await looked(source, item_of("sqs"))
        calls: list[str] = []

        async def circling(access: Any, request: Mapping[str, Any]) -> Page:
            calls.append(str(request.get("NextToken")))
            return Page([Result("q0", "Complete", [request["StartTime"]], [1.0])], (), "again", 1_000)

        loop = CloudWatchSource(config_of(sim, [SQS]), CLOCK, circling)
        batches, outcome = await looked(loop, item_of("sqs"))
        await loop.close()
    assert calls == ["None", "again"]
    assert outcome.status is LookStatus.PARTIAL
    assert "NextToken" in outcome.detail
    assert [len(b.series) for b in batches] == [1]


async def test_pages_without_end_are_published_once_and_stop_where_they_contradict_themselves() -> None:
    async with rig(World(7, ACCOUNTS[:1], [REGION], 40, [SQS]), profiles=[SQS]) as (sim, source):
        await looked(source, item_of("sqs"))
        sim.faults = Faults(token_endless_share=1)
        batches, outcome = await looked(source, item_of("sqs"))
        everything = truth_of(sim.truth, item_of("sqs"), SQS, outcome.observed_at_ms // 1000)
    assert outcome.status is LookStatus.PARTIAL
    assert outcome.requests["GetMetricData"] == 2
    assert landed(batches) == everything


@pytest.mark.parametrize(
    ("status", "points", "pages", "says"),
    [("PartialData", 20, 3, "more than"), ("PartialData", 0, 10, "pages without end")],
)
async def test_pages_are_bounded_by_the_points_of_the_request(
    status: str, points: int, pages: int, says: str
) -> None:
    calls = 0

    async def endless(access: Any, request: Mapping[str, Any]) -> Page:
        nonlocal calls
        calls += 1
        times_s = [request["StartTime"] + 60 * n for n in range(points)]
        results = [
            Result(f"q{n}", status, times_s, [1.0] * points) for n in range(len(request["MetricDataQueries"]))
        ]
        return Page(results, (), f"token {calls}", 1_000)

    async with rig(World(7, ACCOUNTS[:1], [REGION], 40, [SQS]), profiles=[SQS]) as (sim, _):
        source = CloudWatchSource(config_of(sim, [SQS]), CLOCK, endless)
        batches, outcome = await looked(source, item_of("sqs"))
        await source.close()
    # 15 points were asked for.
    assert calls == pages - bool(points)
    assert says in outcome.detail
    assert sum(b.points for b in batches) <= 2 * 16 * outcome.series


async def test_a_detail_names_its_target_once_says_a_failure_once_and_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", (0.01,) * 2)

    async def cut_off(access: Any, request: Mapping[str, Any]) -> Page:
        at = len(request["MetricDataQueries"])
        raise Malformed("aws GetMetricData", f"an answer that is not JSON: line 1 column {at} " + "x" * 300)

    async with rig(World(7, ACCOUNTS[:1], [REGION], 1100, [SQS]), profiles=[SQS]) as (sim, _):
        source = CloudWatchSource(config_of(sim, [SQS]), CLOCK, cut_off)
        _, outcome = await looked(source, item_of("sqs"), wait_s=3)
        await source.close()
    assert outcome.detail.startswith(
        f"{target_of()} sqs: 1100 of 1100 queries have no whole answer; aws GetMetricData: "
    )
    assert len(outcome.detail) == 300
    assert (outcome.detail.count(ACCOUNTS[0]), outcome.detail.count("not JSON")) == (1, 1)


async def test_messages_of_cloudwatch_are_in_the_detail_and_missing_ids_stay_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cloudwatch, "ROUND_PAUSE_S", ())

    async def limited(access: Any, request: Mapping[str, Any]) -> Page:
        message = "MaxMetricsExceeded: Maximum number of allowed metrics exceeded"
        return Page([Result("q0", "Complete", [], [])], (message,), "", None)

    async with rig(World(7, ACCOUNTS[:1], [REGION], 4, [SQS]), profiles=[SQS]) as (sim, _):
        source = CloudWatchSource(config_of(sim, [SQS]), CLOCK, limited)
        _, outcome = await looked(source, item_of("sqs"))
        await source.close()
    assert outcome.status is LookStatus.PARTIAL
    assert "Maximum number of allowed metrics exceeded" in outcome.detail
    assert abs(outcome.observed_at_ms / 1000 - CLOCK.now_s()) < 10  # no Date header: our clock


async def test_the_deadline_is_kept_and_what_was_answered_before_it_gets_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cloudwatch, "CALLS_IN_FLIGHT", 1)
    world = World(7, ACCOUNTS[:1], [REGION], 1000, [SQS])
    async with rig(world, profiles=[SQS]) as (sim, source):
        await looked(source, item_of("sqs"))
        sim.faults = Faults(latency_ms=700)
        begun_s = time.monotonic()
        batches, outcome = await looked(source, item_of("sqs"), wait_s=1.2)
        assert time.monotonic() - begun_s < 2.5
        assert outcome.status is LookStatus.PARTIAL
        assert 0 < sum(len(b.series) for b in batches) <= 500


async def test_an_account_or_a_service_that_is_not_configured_is_a_failure() -> None:
    async with rig() as (_, source):
        for target, item in (
            (target_of("999999999999"), item_of()),
            (target_of(), item_of("nothing")),
        ):
            batches, outcome = await looked(source, item, target)
            assert (batches, outcome.status) == ([], LookStatus.FAILED)
            assert "not in the configuration" in outcome.detail


async def test_a_consumer_that_stops_early_leaves_no_task_behind() -> None:
    world = World(7, ACCOUNTS[:1], [REGION], 3000, [SQS])
    async with rig(world, profiles=[SQS]) as (_, source):
        deadline_s = CLOCK.monotonic_s() + 20
        async with aclosing(source.look("t", target_of(), item_of("sqs", ago_s=7200), deadline_s)) as answers:
            assert isinstance(await anext(answers), Batch)
            during = _tasks()
        assert (len(during) > 0, _tasks()) == (True, [])


async def test_a_consumer_that_is_cancelled_leaves_no_task_behind() -> None:
    async with rig(faults=Faults(latency_ms=5000)) as (_, source):
        task = asyncio.create_task(looked(source, item_of()))
        await asyncio.sleep(0.05)
        during = _tasks()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (len(during) > 0, _tasks()) == (True, [])


def _tasks() -> list[str]:
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("CloudWatchSource")]


# --- recorded traces ------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not TRACES.is_dir(), reason="needs ../shared/data/cloudwatch-traces beside the repository"
)
async def test_recorded_traces_come_back_point_for_point() -> None:
    """Gaps, repeated timestamps and timestamps off the grid included."""
    world = TraceWorld(TRACES)
    [account], [region] = world.accounts, world.regions
    target = Target("cloudwatch", account, region)
    for namespace in sorted({m.namespace for m in world.metrics(account, region)}):
        profile = ServiceProfile(
            service="traced",
            namespace=namespace,
            period_s=300,
            statistics=("Sum",) if namespace == "AWS/ELB" else ("Average",),
        )
        item = TaskItem("traced", world.start_s // 300 * 300, -(-world.end_s // 300) * 300, 300)
        clock = SystemClock(world.end_s - int(time.time()) + 3600)
        sim = await simulator.start(world, clock=clock, calls_per_s=0)
        config = config_of(sim, [profile])
        config = config.model_copy(
            update={"accounts": tuple(a.model_copy(update={"regions": (region,)}) for a in config.accounts)}
        )
        source = CloudWatchSource(config, clock)
        try:
            got = [a async for a in source.look("t", target, item, clock.monotonic_s() + 30)]
        finally:
            await source.close()
            await sim.close()
        outcome = got.pop()
        assert isinstance(outcome, Outcome)
        assert outcome.status is LookStatus.COMPLETE, outcome.detail
        expected = truth_of(world, item, profile, world.end_s, target)
        assert landed([b for b in got if isinstance(b, Batch)]) == expected
        assert expected
