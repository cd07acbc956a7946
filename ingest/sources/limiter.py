"""Quotas of AWS's APIs, kept by all tasks of a process together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from ingest.clock import Clock
from ingest.errors import Transient
from shard_config.model import Account

log = structlog.get_logger()

Key = tuple[str, str, str]
"""Account, region, API."""


RECENT_S = 3 * 3600
"""Of datapoints, AWS has a quota for a StartTime within so long, and a larger one for an older."""
OLD_POINTS_PER_S = 396_000.0
OLD_TO_RECENT = 2.2


def points_per_s(account: Account, start_age_s: float) -> float:
    """An account's quota of datapoints for a StartTime of this age.

    The configured one is that of the last three hours. The other is 2.2 times that, and no more than AWS gives everybody:
    whoever has had one raised may not have the other.
    """
    recent = account.datapoints_per_s
    return recent if start_age_s <= RECENT_S else max(recent, min(OLD_POINTS_PER_S, OLD_TO_RECENT * recent))


@dataclass(slots=True)
class _Bucket:
    next_call_s: float
    next_points_s: float
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
        self.parts: Mapping[tuple[str, str], float] = {}
        """By account and region whose quota other processes take from, too: this one's part of it, in (0, 1)."""
        self.requests: Counter[Key] = Counter()
        """Requests that had their turn, retries included, since this process began; as many keys as buckets."""
        self.throttles: Counter[Key] = Counter()
        """Of these, the ones that AWS throttled."""

    def _bucket(self, key: Key) -> _Bucket:
        """The bucket as of now. There are as many as configured accounts × regions × three APIs."""
        now_s = self._clock.monotonic_s()
        bucket = self._buckets.setdefault(key, _Bucket(now_s, now_s, 1.0, now_s, now_s - 1))
        bucket.share = min(1.0, bucket.share + (now_s - bucket.share_since_s) * self.REGAIN_PER_S)
        bucket.share_since_s = now_s
        return bucket

    async def acquire(self, key: Key, cost_s: float, deadline_s: float, points_cost_s: float = 0.0) -> None:
        """Wait for this request's turn. Raises Transient where that is past the deadline.

        It takes `cost_s` seconds of the quota of calls (1 ÷ calls a second), and `points_cost_s` of that of datapoints.
        """
        bucket, now_s = self._bucket(key), self._clock.monotonic_s()
        turn_s = max(now_s, bucket.next_call_s, bucket.next_points_s if points_cost_s else 0.0)
        if turn_s > deadline_s:
            account, region, api = key
            raise Transient(f"aws {api} {account}/{region}", "the quota leaves no turn before the deadline")
        unused_s = turn_s - self.BURST_S
        share = bucket.share * self.parts.get(key[:2], 1.0)
        bucket.next_call_s = max(bucket.next_call_s, unused_s) + cost_s / share
        bucket.next_points_s = max(bucket.next_points_s, unused_s) + points_cost_s / share
        self.requests[key] += 1
        if turn_s > now_s:
            await self._clock.sleep(turn_s - now_s)

    def throttled(self, key: Key) -> None:
        self.throttles[key] += 1
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
