"""What a simulated AWS counts: quotas, calls, and what it would bill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Bucket:
    level: float
    at_s: float


class Quotas:
    """Token buckets by key, each with one second's worth of burst."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str, str], _Bucket] = {}

    def take(self, key: tuple[str, str, str], amount: float, per_s: float, now_s: float) -> bool:
        """Take `amount` of what flows in at `per_s`, if it is there. `now_s` is monotonic."""
        burst = max(1.0, per_s)
        bucket = self._buckets.setdefault(key, _Bucket(burst, now_s))
        bucket.level = min(burst, bucket.level + (now_s - bucket.at_s) * per_s)
        bucket.at_s = now_s
        if amount > bucket.level:
            return False
        bucket.level -= amount
        return True


Counts = dict[str, dict[str, int]]
"""By region, then by API."""


@dataclass(slots=True)
class _Account:
    metrics_requested: int = 0
    calls: Counts = field(default_factory=dict)
    throttled: Counts = field(default_factory=dict)


class Bill:
    """What each account is charged for, and what it was refused."""

    def __init__(self, accounts: Sequence[str]) -> None:
        self._accounts = {account: _Account() for account in accounts}

    def add_account(self, account: str) -> None:
        self._accounts.setdefault(account, _Account())

    def call(self, account: str, region: str, api: str, metrics_requested: int = 0) -> None:
        """A call that was answered. `metrics_requested` is what GetMetricData bills of it."""
        of = self._accounts[account]
        of.metrics_requested += metrics_requested
        _add(of.calls, region, api)

    def throttled(self, account: str, region: str, api: str) -> None:
        """A call that was refused for a quota: not billed."""
        _add(self._accounts[account].throttled, region, api)

    def as_json(self) -> dict[str, Any]:
        """{"accounts": {account: {"metrics_requested": n, "calls": Counts, "throttled": Counts}}}."""
        return {
            "accounts": {
                account: {
                    "metrics_requested": of.metrics_requested,
                    "calls": of.calls,
                    "throttled": of.throttled,
                }
                for account, of in self._accounts.items()
            }
        }


def _add(counts: Counts, region: str, api: str) -> None:
    of_region = counts.setdefault(region, {})
    of_region[api] = of_region.get(api, 0) + 1
