"""What a remote writer says of itself on /metrics: its tallies, a line a receiver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ingest.forwarded import DELAY_BUCKETS_S, Tally

REQUEST_SECONDS = Histogram(
    "headgate_remote_write_request_seconds",
    "One request to a receiver. Slow: it has too much to do, or is far away.",
    ["receiver"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)

_LABELS = ["receiver"]


class Tallies(Collector):
    """By receiver's name. Counting is done in bulk by whoever writes, so it is read here and not counted again sample by sample."""

    def __init__(self) -> None:
        self.by_receiver: dict[str, Tally] = {}

    def collect(self) -> Iterator[Metric]:
        by_receiver: Mapping[str, Tally] = dict(self.by_receiver)
        samples = CounterMetricFamily(
            "headgate_remote_write_samples", "Samples that a receiver has acknowledged.", labels=_LABELS
        )
        refused = CounterMetricFamily(
            "headgate_remote_write_refused",
            "Samples that a receiver did not get, or did not take (under bad_record: records of raw). See docs/prometheus.md.",
            labels=["receiver", "reason"],
        )
        skipped = CounterMetricFamily(
            "headgate_remote_write_skipped_records",
            "Records that Kafka had dropped before they were read: their samples are in the store, and not at the receiver.",
            labels=_LABELS,
        )
        delay = HistogramMetricFamily(
            "headgate_remote_write_delay_seconds",
            "How old samples were when they were acknowledged. Above settling and a poll: the worker or the receiver does not keep up.",
            labels=_LABELS,
        )
        held = GaugeMetricFamily(
            "headgate_remote_write_held_samples", "Samples that wait until they have settled.", labels=_LABELS
        )
        series = GaugeMetricFamily(
            "headgate_remote_write_series",
            "Series that are known here. Each takes about a kilobyte of memory: more than fit need another remote writer.",
            labels=_LABELS,
        )
        lag = GaugeMetricFamily(
            "headgate_remote_write_lag_records",
            "Records not read yet; high: add remote writers.",
            labels=_LABELS,
        )
        failing = GaugeMetricFamily(
            "headgate_remote_write_failing",
            "1: the last attempt to send failed. The same is tried again until it works.",
            labels=_LABELS,
        )
        for name, tally in by_receiver.items():
            samples.add_metric([name], tally.samples)
            for reason, count in dict(tally.refused).items():
                refused.add_metric([name, reason], count)
            skipped.add_metric([name], tally.skipped_records)
            delay.add_metric([name], *_buckets(tally))
            held.add_metric([name], tally.held)
            series.add_metric([name], tally.series)
            lag.add_metric([name], tally.lag_records)
            failing.add_metric([name], tally.failing)
        yield from (samples, refused, skipped, delay, held, series, lag, failing)


def _buckets(tally: Tally) -> tuple[list[tuple[str, float]], float]:
    bounds = [*(f"{bound}" for bound in DELAY_BUCKETS_S), "+Inf"]
    counts = tally.delays.cumsum().tolist()
    return list(zip(bounds, counts, strict=True)), tally.delay_sum_s
