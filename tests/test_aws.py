"""Errors of AWS and its quotas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
)

from ingest.clock import ManualClock
from ingest.errors import HeadgateError, Rejected, Transient
from ingest.sources.aws import Access, Aws, Credentials, Tally
from ingest.sources.aws_errors import Denied, Expired, Throttled, may_be_billed, translate
from ingest.sources.limiter import Key, Limiter, points_per_s
from shard_config.model import Account, Config


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


@pytest.mark.parametrize(
    ("error", "billed"),
    [
        (refused("InternalServiceError", 500), True),
        (refused("SlowDown", 503), False),
        (refused("ThrottlingException"), False),
        (refused("AccessDenied", 403), False),
        (refused("ValidationError"), False),
        (ReadTimeoutError(endpoint_url="x"), True),
        (ConnectTimeoutError(endpoint_url="x"), False),
        (EndpointConnectionError(endpoint_url="x", error=ConnectionResetError()), True),
        (aiohttp.ClientPayloadError("x"), True),
        (TimeoutError(), True),
        (asyncio.CancelledError(), True),
        (Transient("here", "an answer that was read"), False),
    ],
    ids=repr,
)
def test_what_was_refused_or_never_left_is_not_in_doubt(error: BaseException, billed: bool) -> None:
    assert may_be_billed(error) is billed


KEY = ("100000000001", "eu-west-1", "GetMetricData")


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


# --- quotas, as AWS counts them -------------------------------------------------------------------------------


def turns(quota: Limiter, clock: ManualClock) -> Callable[..., Awaitable[float]]:
    async def take(
        key: Key = KEY, calls: float = 50, points: float = 0, points_per_s: float = 180_000
    ) -> float:
        await quota.acquire(key, 1 / calls, 1e9, points / points_per_s)
        return clock.monotonic_s()

    return take


async def test_datapoints_have_a_quota_of_their_own_beside_that_of_calls() -> None:
    clock = ManualClock(0)
    take = turns(Limiter(clock), clock)
    for _ in range(20):
        small_s = await take(points=500)
    assert small_s == pytest.approx(19 / 50)  # a call of 500 points waits for calls
    for _ in range(20):
        big_s = await take(points=90_000)
    assert big_s - small_s == pytest.approx(0.02 + 19 * 0.5, abs=Limiter.BURST_S)  # one of 90,000 for points


@pytest.mark.parametrize("seed", range(5))
async def test_neither_quota_is_exceeded_whatever_the_mix_of_calls(seed: int) -> None:
    clock, random = ManualClock(0), Random(seed)
    take = turns(Limiter(clock), clock)
    went: list[tuple[float, int]] = []
    for _ in range(400):
        if random.random() < 0.1:
            clock.advance(random.random())
        points = random.choice((1, 2500, 2500, 20_000, 100_800))
        went.append((await take(points=points), points))
    for first in range(0, len(went), 7):
        for last in range(first, len(went), 13):
            span_s = went[last][0] - went[first][0] + Limiter.BURST_S
            assert last - first <= span_s * 50 + 1e-6
            assert sum(points for _, points in went[first:last]) <= span_s * 180_000 + 1e-6


async def test_accounts_regions_and_apis_have_quotas_of_their_own() -> None:
    clock = ManualClock(0)
    take = turns(Limiter(clock), clock)
    account, region, api = KEY
    for key in (
        KEY,
        ("100000000002", region, api),
        (account, "us-east-1", api),
        (account, region, "ListMetrics"),
    ):
        assert await take(key, calls=0.1) == 0
    assert await take(calls=0.1) == pytest.approx(10)


async def test_all_tasks_of_a_shard_share_a_quota() -> None:
    clock = ManualClock(0)
    take = turns(Limiter(clock), clock)

    async def task() -> None:
        for _ in range(25):
            await take()

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(task())
    assert clock.monotonic_s() == pytest.approx(99 / 50)


async def test_throttling_slows_calls_and_datapoints_alike() -> None:
    clock = ManualClock(0)
    limiter = Limiter(clock)
    take = turns(limiter, clock)
    await take(points=18_000)
    limiter.throttled(KEY)
    before_s = await take(points=18_000)
    assert await take(points=18_000) - before_s > 0.19  # 0.1 s at the full rate
    other = "100000000002", *KEY[1:]
    assert limiter.share(other) == 1


@pytest.mark.parametrize(
    ("configured", "age_s", "expected"),
    [
        (180_000, 3 * 3600, 180_000),
        (180_000, 3 * 3600 + 1, 396_000),
        (100_000, 86_400, 220_000),  # lowered, to leave some to others
        (300_000, 86_400, 396_000),  # raised, which may be that of recent points only
        (1_000_000, 86_400, 1_000_000),
    ],
)
def test_the_quota_of_old_datapoints_is_larger(configured: float, age_s: float, expected: float) -> None:
    account = Account(id=KEY[0], regions=(KEY[1],), services=("ec2",), datapoints_per_s=configured)
    assert points_per_s(account, age_s) == pytest.approx(expected)


async def test_the_quota_is_that_of_the_account_that_is_asked() -> None:
    """A monitoring account answers for those that it is linked to, and all of that is its load."""
    clock = ManualClock(0)
    config = Config.model_validate({"accounts": [{"id": KEY[0], "regions": [KEY[1]], "services": ["ec2"]}]})
    whole = Aws(config, clock)
    whole._credentials[KEY[0]] = Credentials(KEY[0], "key", "secret", "", 1e9)

    async def send(access: Access) -> str:
        return access.credentials.account

    for _ in range(3):
        asked = await whole.call(
            config.accounts[0], KEY[1], KEY[2], send, cost_s=10, deadline_s=1e6, tally=Tally()
        )
        assert asked == KEY[0]
    assert clock.monotonic_s() == pytest.approx(20)
    await whole.close()
