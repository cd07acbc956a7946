"""1 → 4 → 2 → 16 → 3 exporters while 500 targets are collected each 5 seconds: how long it takes, what moves, and how late windows become.

The exporters are objects of one process; Kafka is real, the last change is thirteen of them killed at once.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path

import structlog

from tests.bench.run import Report
from tests.scale_scene import Result, play, quantile
from workers.servers import KafkaServer


def run(report: Report) -> None:
    """Starts a Kafka of its own."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory() as folder:
        kafka = KafkaServer(Path(folder))
        try:
            kafka.start()
            result = asyncio.run(play(kafka.bootstrap, "bench"))
        finally:
            kafka.stop()
    _tell(report, result)


def _tell(report: Report, result: Result) -> None:
    for change in result.changes:
        what = f"{change.before} to {change.after} exporters" + (
            ", by killing them" if change.in_flight_at_kill else ""
        )
        report.add(f"{what}", change.seconds, "s")
        ratio = change.moved / change.least
        report.add(f"{what}: moved", change.moved, "of 64 slots", "the least", ratio, goal="<= 1.1")
    report.add("windows lost", result.lost, f"of {result.windows:,}", goal="<= 0")
    share = result.paid_twice / max(1, result.in_flight_at_kills)
    report.add("requests paid twice", result.paid_twice, "", "in flight at the kill", share, goal="<= 1.0")
    report.add("freshness before, p50", quantile(result.steady_s, 0.5), "s")
    report.add("freshness before, p99", quantile(result.steady_s, 0.99), "s")
    report.add("freshness during the changes, p50", quantile(result.changing_s, 0.5), "s")
    report.add("freshness during the changes, p99", quantile(result.changing_s, 0.99), "s")
