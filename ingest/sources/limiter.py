"""Quotas of AWS's APIs, kept by all tasks of a process together."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from ingest.clock import Clock
from ingest.errors import Transient

log = structlog.get_logger()

Key = tuple[str, str, str]
"""Account, region, API."""


@dataclass(slots=True)
class _Bucket:
    next_s: float
    share: float
    """Of the configured rate: 1 when nothing is throttled."""
    share_since_s: float
    halved_s: float


class Limiter:
    """Spaces the requests of each key so that all tasks of the process together keep its quota.

    A throttled answer halves the key's rate, at most once a second and down to 1/32; each quiet second gives a tenth of
    the quota back.
    """

    BURST_S = 0.1
    SHARE_MIN = 1 / 32
    REGAIN_PER_S = 0.1

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[Key, _Bucket] = {}

    def _bucket(self, key: Key) -> _Bucket:
        """The bucket as of now. There are as many as configured accounts × regions × three APIs."""
        now_s = self._clock.monotonic_s()
        bucket = self._buckets.setdefault(key, _Bucket(now_s, 1.0, now_s, now_s - 1))
        bucket.share = min(1.0, bucket.share + (now_s - bucket.share_since_s) * self.REGAIN_PER_S)
        bucket.share_since_s = now_s
        return bucket

    async def acquire(self, key: Key, cost_s: float, deadline_s: float) -> None:
        """Wait for this request's turn; it takes `cost_s` seconds of the quota. Raises Transient where that is past the deadline."""
        bucket, now_s = self._bucket(key), self._clock.monotonic_s()
        turn_s = max(bucket.next_s, now_s - self.BURST_S)
        if turn_s > deadline_s:
            raise Transient("aws limiter " + "/".join(key), "the quota leaves no turn before the deadline")
        bucket.next_s = turn_s + cost_s / bucket.share
        if turn_s > now_s:
            await self._clock.sleep(turn_s - now_s)

    def throttled(self, key: Key) -> None:
        bucket, now_s = self._bucket(key), self._clock.monotonic_s()
        if now_s - bucket.halved_s >= 1:
            bucket.share = max(self.SHARE_MIN, bucket.share / 2)
            bucket.halved_s = now_s
            log.warning(
                "aws_throttled", account=key[0], region=key[1], api=key[2], share=round(bucket.share, 3)
            )

    def share(self, key: Key) -> float:
        """The present share of the configured rate, 1/32 to 1."""
        return self._bucket(key).share
