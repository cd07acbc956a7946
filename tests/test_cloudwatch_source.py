"""The CloudWatch source against the simulated AWS, on loopback."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from ingest.clock import ManualClock, SystemClock
from ingest.errors import HeadgateError, Rejected, Transient
from ingest.model import Batch, LookStatus, Outcome, Series, SeriesKey, Target, TaskItem
from ingest.sources import aws, cloudwatch
from ingest.sources.aws_errors import Denied, Expired, Throttled, translate
from ingest.sources.cloudwatch import CloudWatchSource
from ingest.sources.columns import tables_of
from ingest.sources.discovery import metrics_of, series_of
from ingest.sources.limiter import Limiter
from ingest.sources.look import date_ms
from ingest.sources.metric_data import (
    POINTS_PER_CALL_MAX,
    Answer,
    Malformed,
    Page,
    Result,
    check,
    page_of,
    plan,
    retention_s,
)
from shard_config.model import Config, MetricProfile, ServiceProfile
from workers import simulator
from workers.simulated.faults import Faults
from workers.simulator import Simulator
from workers.traces import TraceWorld
from workers.world import Truth, World, account_ids

ACCOUNTS = account_ids(3)
REGION = "eu-west-1"
TRACES = Path(__file__).parent.parent.parent / "shared" / "data" / "cloudwatch-traces"
EC2 = ServiceProfile(
    service="ec2",
    namespace="AWS/EC2",
    metrics=(
        MetricProfile(name="CPUUtilization", statistics=("Average", "Maximum"), unit="Percent"),
        MetricProfile(name="NetworkIn", statistics=("Sum",), unit="Bytes"),
    ),
)
SQS = ServiceProfile(service="sqs", namespace="AWS/SQS", statistics=("Sum",))


NOW_S = 1_795_500_000
"""When the tests begin, on their clock: requests are the same bytes in each run, so a fault's seed strikes the same ones."""
CLOCK = SystemClock(NOW_S - int(time.time()))
ROLE = "arn:aws:iam::{account}:role/Headgate"


def config_of(
    sim: Simulator, profiles: Sequence[ServiceProfile] = (EC2, SQS), role: str = ROLE, **account: Any
) -> Config:
    accounts = [
        {
            "id": a,
            "regions": [REGION],
            "services": [p.service for p in profiles],
            "calls_per_s": 5000,
            **account,
        }
        for a in sim.truth.accounts
    ]
    return Config.model_validate(
        {
            "accounts": accounts,
            "services": [p.model_dump() for p in profiles],
            "aws": {"endpoint_url": sim.url, "role_template": role},
        }
    )


@asynccontextmanager
async def rig(
    truth: Truth | None = None,
    faults: Faults | None = None,
    profiles: Sequence[ServiceProfile] = (EC2, SQS),
    wanted_id: str = "",
    **config: Any,
) -> AsyncIterator[tuple[Simulator, CloudWatchSource]]:
    """A simulated AWS without quotas, and a source that looks at it."""
    world = truth or World(7, ACCOUNTS, [REGION], 40, profiles)
    sim = await simulator.start(world, clock=CLOCK, faults=faults, external_id=wanted_id, calls_per_s=0)
    try:
        source = CloudWatchSource(config_of(sim, profiles, **config), CLOCK)
        try:
            yield sim, source
        finally:
            await source.close()
    finally:
        await sim.close()


def target_of(account: str = ACCOUNTS[0]) -> Target:
    return Target("cloudwatch", account, REGION)


def item_of(service: str = "ec2", ago_s: int = 900, length_s: int = 900, grid_s: int = 300) -> TaskItem:
    start_s = (NOW_S - ago_s) // grid_s * grid_s
    return TaskItem(service, start_s, start_s + length_s, grid_s)


async def looked(
    source: CloudWatchSource, item: TaskItem, target: Target | None = None, wait_s: float = 20
) -> tuple[list[Batch], Outcome]:
    deadline_s = CLOCK.monotonic_s() + wait_s
    got = [answer async for answer in source.look("t1", target or target_of(), item, deadline_s)]
    *batches, outcome = got
    assert isinstance(outcome, Outcome)
    return [b for b in batches if isinstance(b, Batch)], outcome


Landed = dict[SeriesKey, list[tuple[int, float]]]


def landed(batches: Sequence[Batch]) -> Landed:
    """Points by series, as served; a series is in one batch only, unless its range was cut."""
    found: Landed = {}
    for batch in batches:
        ends = np.cumsum(batch.counts).tolist()
        for series, end, count in zip(batch.series, ends, batch.counts.tolist(), strict=True):
            points = zip(
                batch.timestamps_s[end - count : end].tolist(),
                batch.values[end - count : end].tolist(),
                strict=True,
            )
            found.setdefault(series.key, []).extend(points)
    return found


def truth_of(
    truth: Truth, item: TaskItem, profile: ServiceProfile, asked_at_s: int, target: Target | None = None
) -> Landed:
    """What a faultless look would have got, as of a time."""
    target = target or target_of()
    found: Landed = {}
    metrics = [
        (m.name, m.dimensions)
        for m in truth.metrics(target.account, target.region)
        if m.namespace == profile.namespace
    ]
    for series in series_of(metrics, target, profile):
        k = series.key
        times_s, values = truth.points(
            k.account,
            k.region,
            k.namespace,
            k.metric,
            k.dimensions,
            k.stat,
            k.period_s,
            item.start_s,
            item.end_s,
            asked_at_s,
        )
        if len(times_s):
            found[k] = list(zip(times_s.tolist(), values.tolist(), strict=True))
    return found


def true_as_observed(truth: Truth, batches: Sequence[Batch], item: TaskItem, profile: ServiceProfile) -> bool:
    """Whether each batch is what the world says as of that batch's own observed_at."""
    by_time = {b.observed_at_ms: truth_of(truth, item, profile, b.observed_at_ms // 1000) for b in batches}
    return all(
        points == by_time[batch.observed_at_ms][key]
        for batch in batches
        for key, points in landed([batch]).items()
    )


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
    queries = second.request([0, 199])["MetricDataQueries"]
    assert [q["Id"] for q in queries] == ["q0", "q199"]
    assert queries[1]["MetricStat"]["Metric"]["Dimensions"] == [{"Name": "d", "Value": "699"}]


@pytest.mark.parametrize(
    ("period_s", "days"), [(1, 0.125), (30, 0.125), (60, 15), (300, 63), (3600, 455), (86400, 455)]
)
def test_retention_is_by_period(period_s: int, days: float) -> None:
    assert retention_s(period_s) == days * 86_400


def test_a_profile_says_which_metrics_are_asked_for_with_which_statistics() -> None:
    listed = [("NetworkIn", (("a", "1"),)), ("CPUUtilization", (("a", "1"),)), ("Other", ()), ("Other", ())]
    chosen = series_of(listed, target_of(), EC2)
    assert [(s.key.metric, s.key.stat, s.unit) for s in chosen] == [
        ("CPUUtilization", "Average", "Percent"),
        ("CPUUtilization", "Maximum", "Percent"),
        ("NetworkIn", "Sum", "Bytes"),
    ]
    everything = series_of(listed, target_of(), SQS)
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


# --- errors and quotas ----------------------------------------------------------------------------------------


def refused(code: str, status: int = 400) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "X"
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (refused("Throttling"), Throttled),
        (refused("ThrottlingException"), Throttled),
        (refused("RequestLimitExceeded", 503), Throttled),
        (refused("AccessDenied", 403), Denied),
        (refused("AccessDeniedException"), Denied),
        (refused("ExpiredToken", 403), Expired),
        (refused("InternalServiceError", 500), Transient),
        (refused("ValidationError"), Rejected),
        (EndpointConnectionError(endpoint_url="x"), Transient),
        (aiohttp.ClientPayloadError("x"), Transient),
        (ConnectionResetError(), Transient),
        (KeyError("x"), Transient),
    ],
)
def test_an_error_says_what_the_caller_does(error: Exception, kind: type[HeadgateError]) -> None:
    assert type(translate(error, "here")) is kind


KEY = (ACCOUNTS[0], REGION, "GetMetricData")


async def test_all_tasks_together_keep_the_quota() -> None:
    clock = ManualClock(0)
    limiter = Limiter(clock)
    for _ in range(100):
        await limiter.acquire(KEY, 1 / 50, deadline_s=1e9)
    assert clock.monotonic_s() == pytest.approx(99 / 50)


async def test_a_throttle_halves_the_rate_at_most_once_a_second_and_it_comes_back_slowly() -> None:
    clock = ManualClock(0)
    limiter = Limiter(clock)
    for _ in range(5):
        limiter.throttled(KEY)
    assert limiter.share(KEY) == 0.5
    clock.advance(2)
    assert limiter.share(KEY) == pytest.approx(0.7)
    clock.advance(60)
    assert limiter.share(KEY) == 1
    for _ in range(20):
        clock.advance(1)
        limiter.throttled(KEY)
    assert Limiter.SHARE_MIN <= limiter.share(KEY) < 0.2


async def test_a_turn_past_the_deadline_is_refused_at_once_and_takes_nothing() -> None:
    clock = ManualClock(0)
    limiter = Limiter(clock)
    await limiter.acquire(KEY, 10, deadline_s=5)
    with pytest.raises(Transient, match="before the deadline"):
        await limiter.acquire(KEY, 10, deadline_s=5)
    assert clock.monotonic_s() == 0
    await limiter.acquire(KEY, 10, deadline_s=20)
    assert clock.monotonic_s() == pytest.approx(10, abs=0.2)


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
        Faults(malformed_share=0.4, seed=2),
        Faults(reset_share=0.4, seed=2),
        Faults(error_share=0.4, seed=2),
        Faults(throttle_share=0.5, seed=2),
    ],
    ids=lambda f: next(k for k, v in f.as_json().items() if v and k != "seed"),
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
        assert outcome.requests["ListMetrics"] + outcome.requests["GetMetricData"] > 2  # something did fail
        assert set(landed(batches)) == set(truth_of(sim.truth, item, EC2, outcome.observed_at_ms // 1000))
        assert true_as_observed(sim.truth, batches, item, EC2)
        assert sum(len(b.series) for b in batches) == len(landed(batches))  # each series once
        assert outcome.metrics_billed <= sim.billing()["accounts"][ACCOUNTS[0]]["metrics_requested"]


@pytest.mark.parametrize("fault", ["internal_error_share", "missing_id_share"])
async def test_a_series_without_a_whole_answer_leaves_the_look_partial_never_complete(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloudwatch, "ROUND_PAUSE_S", (0.01, 0.01))
    async with rig(faults=Faults(**{fault: 0.8})) as (sim, source):
        item = item_of()
        batches, outcome = await looked(source, item)
        assert outcome.status is LookStatus.PARTIAL
        assert "without a whole answer" in outcome.detail
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
    clock = _Ahead()
    source = CloudWatchSource(config_of(sim, [EC2]), clock)
    try:
        await _all(source, clock)
        clock.ahead_s = EC2.discovery_interval_s + 1

        def broken(*_: Any) -> Any:
            raise RuntimeError("no listing")

        monkeypatch.setattr(world, "listed", broken)
        batches, outcome = await _all(source, clock)
    finally:
        await source.close()
        await sim.close()
    assert outcome.status is LookStatus.COMPLETE
    assert "discovery is" in outcome.detail
    assert len(batches) == 1


class _Ahead(SystemClock):
    """A clock whose monotonic time can be put forward."""

    ahead_s = 0.0

    def __init__(self) -> None:
        super().__init__(CLOCK.offset_s)

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


async def _all(source: CloudWatchSource, clock: SystemClock) -> tuple[list[Batch], Outcome]:
    got = [a async for a in source.look("t", target_of(), item_of(ago_s=7200), clock.monotonic_s() + 20)]
    assert isinstance(got[-1], Outcome)
    return [b for b in got if isinstance(b, Batch)], got[-1]


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


# --- identity -------------------------------------------------------------------------------------------------


async def test_forbidden_accounts_and_roles_are_forbidden_and_others_are_not_touched() -> None:
    faults = Faults(forbidden_accounts=ACCOUNTS[:1], denied_roles=ACCOUNTS[1:2])
    async with rig(faults=faults) as (_, source):
        found = [(await looked(source, item_of(), target_of(a)))[1] for a in ACCOUNTS]
        assert [o.status for o in found] == [
            LookStatus.FORBIDDEN,
            LookStatus.FORBIDDEN,
            LookStatus.COMPLETE,
        ]
        assert "ListMetrics" in found[0].detail
        assert "AssumeRole" in found[1].detail


async def test_forbidden_series_leave_the_look_partial_and_all_of_them_forbidden() -> None:
    async with rig(faults=Faults(forbidden_share=0.5)) as (sim, source):
        _, some = await looked(source, item_of())
        sim.faults = Faults(forbidden_share=1.0)
        _, everything = await looked(source, item_of())
        assert some.status is LookStatus.PARTIAL
        assert "forbidden" in some.detail
        assert everything.status is LookStatus.FORBIDDEN


async def test_the_external_id_is_sent_and_a_wrong_one_is_refused() -> None:
    for ours, expected in (("s3cret", LookStatus.COMPLETE), ("wrong", LookStatus.FORBIDDEN)):
        async with rig(wanted_id="s3cret", external_id=ours) as (_, source):
            _, outcome = await looked(source, item_of())
            assert outcome.status is expected
            assert ours not in outcome.detail


async def test_credentials_of_another_account_label_no_data() -> None:
    async with rig(role="") as (sim, source):
        batches, outcome = await looked(source, item_of(), target_of(ACCOUNTS[1]))
        assert (batches, outcome.status) == ([], LookStatus.FORBIDDEN)
        assert f"belong to account {ACCOUNTS[0]}, not to {ACCOUNTS[1]}" in outcome.detail
        assert outcome.requests == {"GetCallerIdentity": 1}
        assert sim.billing()["accounts"][ACCOUNTS[0]]["metrics_requested"] == 0


async def test_without_a_role_the_ambient_credentials_are_used_once_verified() -> None:
    async with rig(role="") as (_, source):
        _, outcome = await looked(source, item_of())
        assert outcome.status is LookStatus.COMPLETE
        assert outcome.requests == {"GetCallerIdentity": 1, "ListMetrics": 1, "GetMetricData": 1}


async def test_fifty_looks_at_once_make_one_refresh_and_one_discovery() -> None:
    async with rig(faults=Faults(latency_ms=20)) as (_, source):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(looked(source, item_of())) for _ in range(50)]
        sent: Counter[str] = Counter()
        for task in tasks:
            sent.update(task.result()[1].requests)
            assert task.result()[1].status is LookStatus.COMPLETE
        assert (sent["AssumeRole"], sent["GetCallerIdentity"], sent["ListMetrics"]) == (1, 1, 1)


async def test_fifty_looks_at_a_denied_role_share_one_refusal() -> None:
    async with rig(faults=Faults(denied_roles=ACCOUNTS, latency_ms=20)) as (_, source):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(looked(source, item_of())) for _ in range(50)]
        assert {t.result()[1].status for t in tasks} == {LookStatus.FORBIDDEN}
        assert sum(t.result()[1].requests.get("AssumeRole", 0) for t in tasks) == 1


async def test_credentials_that_expire_are_renewed_once_and_the_look_goes_on() -> None:
    world = World(7, ACCOUNTS, [REGION], 1600, [SQS])
    clock = _MovableWall()
    sim = await simulator.start(world, clock=CLOCK, calls_per_s=0, credential_clock=clock)
    source = CloudWatchSource(config_of(sim, [SQS]), CLOCK)
    try:
        await looked(source, item_of("sqs"))
        clock.offset_s = 7200  # for AWS two hours have passed, for us none
        _, outcome = await looked(source, item_of("sqs"))
    finally:
        await source.close()
        await sim.close()
    assert outcome.status is LookStatus.COMPLETE
    assert (outcome.requests["AssumeRole"], outcome.requests["GetCallerIdentity"]) == (1, 1)


class _MovableWall(SystemClock):
    """A wall clock that a test puts forward."""


async def test_clients_are_few_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        sim = await simulator.start(World(7, ACCOUNTS, [REGION], 4, [SQS]), clock=CLOCK, calls_per_s=0)
        stack.push_async_callback(sim.close)
        source = CloudWatchSource(config_of(sim, [SQS]), CLOCK)
        source._aws._clients_max = 2
        for account in ACCOUNTS * 2:
            assert (await looked(source, item_of("sqs"), target_of(account)))[1].status is LookStatus.COMPLETE
            assert len(source._aws._clients) <= 2
        await source.close()
        assert source._aws._clients == {}


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
