"""Remote write into real Prometheus servers, and into a scripted receiver for what a real one does not do on demand."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import pytest

from ingest.clock import SystemClock
from ingest.ports import LabelSet, Receiving, SeriesSamples, Written
from ingest.sinks.remote_write import RemoteWrite
from shard_config.remote_write import Receiver
from tests.prometheus_server import PrometheusServer, needs_prometheus

NOW_S = int(time.time()) // 60 * 60
M = 60
"""A minute, in seconds."""


def labels_of(name: str, **labels: str) -> LabelSet:
    return tuple(sorted({"__name__": name, **labels}.items()))


def some(labels: LabelSet | str, *samples: tuple[float, float]) -> SeriesSamples:
    """A series with samples of (minutes from now, value)."""
    named = labels_of(labels) if isinstance(labels, str) else labels
    times = np.array([(NOW_S + round(minutes * M)) * 1000 for minutes, _ in samples], np.int64)
    return SeriesSamples(named, times, np.array([value for _, value in samples], np.float64))


def outcome(written: Written) -> tuple[int, list[tuple[int, str, list[int]]]]:
    """How many were taken, and the refused as (series, reason, minutes from now)."""
    return written.samples, [
        (one.series, one.reason, [int(t // 1000 - NOW_S) // M for t in one.timestamps_ms])
        for one in written.refused
    ]


@asynccontextmanager
async def writer(url: str, **options: Any) -> AsyncIterator[RemoteWrite]:
    fields = {key: options.pop(key) for key in list(options) if key in Receiver.model_fields}
    receiver = Receiver.model_validate({"name": "prometheus-1", "url": url, **fields})
    one: Receiving = RemoteWrite(receiver, SystemClock(), **options)
    assert isinstance(one, RemoteWrite)
    try:
        yield one
    finally:
        await one.close()


@contextmanager
def running(server: PrometheusServer) -> Iterator[PrometheusServer]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A Prometheus without an out-of-order window."""
    with running(PrometheusServer(tmp_path_factory.mktemp("strict"))) as server:
        yield server


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A Prometheus with an out-of-order window of two hours."""
    with running(PrometheusServer(tmp_path_factory.mktemp("lenient"), out_of_order_window="2h")) as server:
        yield server


def stored(server: PrometheusServer, selector: str) -> dict[str, dict[int, float]]:
    """What PromQL returns: by metric name, minutes from now → value."""
    found = server.samples(selector, NOW_S - 40 * 86_400, NOW_S + 3_600)
    return {
        dict(labels)["__name__"]: {(t - NOW_S) // M: value for t, value in samples.items()}
        for labels, samples in found.items()
    }


@needs_prometheus
async def test_what_is_written_is_what_promql_returns(strict: PrometheusServer) -> None:
    series = [
        some(
            labels_of("whole", instance=f"i-{n}", text='ünï \U0001f600 "\\\n'),
            *((m, n + m / 8) for m in range(-5, 0)),
        )
        for n in range(50)
    ]
    async with writer(strict.write_url) as one:
        assert outcome(await one.write(series)) == (250, [])
    found = strict.samples("whole", NOW_S - 600, NOW_S)
    assert found == {
        one.labels: dict(zip((one.timestamps_ms // 1000).tolist(), one.values.tolist(), strict=True))
        for one in series
    }
