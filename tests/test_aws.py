"""Errors of AWS and its quotas."""

from __future__ import annotations

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from ingest.clock import ManualClock
from ingest.errors import HeadgateError, Rejected, Transient
from ingest.sources.aws_errors import Denied, Expired, Throttled, translate
from ingest.sources.limiter import Limiter


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
