"""What a shard has trouble with, as Prometheus metrics: AWS's throttles, credentials of another account, an archive that refuses.

Labels are accounts, regions and APIs: as many as are configured, never a series.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter
from prometheus_client.core import REGISTRY, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ingest.clock import Clock
from ingest.collect import Answer
from ingest.sources.aws import Aws
from ingest.sources.cloudwatch import CloudWatchSource

STRANGER_S = 1800.0
"""So long a mismatch is shown that was not met again: the account may be another shard's by now, or polled once a day."""

PUTS = Counter("headgate_archive_puts_total", "Tasks given to the archive; by how that went.", ["result"])
for _result in ("kept", "refused"):
    PUTS.labels(result=_result)  # an alert on an increase needs it to be there before


class Troubles(Collector):
    """One process's. Whoever wires the shard says whom to `watch`; until then there is nothing to say."""

    def __init__(self) -> None:
        self._source: CloudWatchSource | None = None
        self._clock: Clock | None = None
        self._refused_since_s: float | None = None

    def watch(self, source: CloudWatchSource, clock: Clock) -> None:
        """Say from now on how this source fares."""
        self._source, self._clock = source, clock

    def put(self, answer: Answer) -> None:
        """Count what the archive said to one answer; what came from it, or asked nobody, says nothing."""
        if answer.refused:
            PUTS.labels(result="refused").inc()
            if self._refused_since_s is None and self._clock is not None:
                self._refused_since_s = self._clock.monotonic_s()
        elif answer.own is not None and answer.own.archive_key:
            PUTS.labels(result="kept").inc()
            self._refused_since_s = None

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        where = ["account", "region", "api"]
        asked = CounterMetricFamily(
            "headgate_aws_requests", "Requests sent to AWS, retries included.", labels=where
        )
        throttled = CounterMetricFamily(
            "headgate_aws_throttled",
            "Requests that AWS throttled. Rising: the quota is less than is configured, or others use it too.",
            labels=where,
        )
        mismatch = GaugeMetricFamily(
            "headgate_identity_mismatch",
            "1: the credentials for this account are another account's, so nothing of it is collected.",
            labels=["account"],
        )
        refusing = GaugeMetricFamily(
            "headgate_archive_refusing_seconds",
            "For how long the archive has taken nothing of this shard; 0: it took what it was given last.",
        )
        if self._source is not None and self._clock is not None:
            now_s = self._clock.monotonic_s()
            aws: Aws = self._source.aws
            for key, count in aws.limiter.requests.items():
                asked.add_metric(key, count)
                throttled.add_metric(key, aws.limiter.throttles[key])
            for account, seen_s in aws.strangers.items():
                if now_s - seen_s < STRANGER_S:
                    mismatch.add_metric([account], 1)
            since_s = self._refused_since_s
            refusing.add_metric([], 0.0 if since_s is None else now_s - since_s)
        return asked, throttled, mismatch, refusing


TROUBLES = Troubles()
REGISTRY.register(TROUBLES)
