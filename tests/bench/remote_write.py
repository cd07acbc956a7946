"""How fast samples are encoded for remote write, and get into a real Prometheus, against a plain loop over protobuf objects.

The loop is what anybody would write first: a message a series, a message a label, a message a sample, one request after the other. It uses the
same protobuf, snappy and HTTP libraries, and sends the same requests where the receiver has a window.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import aiohttp
import cramjam
import numpy as np

from ingest.clock import SystemClock
from ingest.ports import SeriesSamples
from ingest.sinks.prompb import WriteRequest, encoded_labels
from ingest.sinks.remote_requests import job_of
from ingest.sinks.remote_write import RemoteWrite
from shard_config.remote_write import Receiver
from tests.bench.run import Report
from tests.written_labels import decoded_labels
from workers.prometheus import PrometheusServer, prometheus_program

SAMPLES_PER_REQUEST = 2_000
SHAPES = ((500, 5), (10_000, 1))
SERIES, SAMPLES, TURNS = 4_000, 5, 9
ENCODING_GOAL, SENDING_GOAL = ">= 1.5", ">= 1.2"


def series_of(name: str, series: int, samples: int, start_s: int) -> list[SeriesSamples]:
    """EC2 instances with a YACE-like name and eight labels, a sample a minute."""
    random = np.random.default_rng(1)
    times = (start_s + 60 * np.arange(samples, dtype=np.int64)) * 1000
    return [
        SeriesSamples(
            encoded_labels(
                (
                    ("__name__", name),
                    ("account_alias", "production"),
                    ("account_id", "123456789012"),
                    ("dimension_InstanceId", f"i-{n:017x}"),
                    ("name", f"arn:aws:ec2:eu-west-1:123456789012:instance/i-{n:017x}"),
                    ("region", "eu-west-1"),
                    ("tag_Environment", "prod"),
                    ("tag_Team", "platform"),
                )
            ),
            times,
            np.round(random.uniform(0, 100, samples), 2),
        )
        for n in range(series)
    ]


def plain_bodies(series: Sequence[SeriesSamples]) -> list[bytes]:
    """The same as requests of the same size, object by object."""
    bodies = []
    per_request = max(1, SAMPLES_PER_REQUEST // len(series[0].values))
    for at in range(0, len(series), per_request):
        request = WriteRequest()
        for one in series[at : at + per_request]:
            made = request.timeseries.add()
            for name, value in decoded_labels(one.labels):
                made.labels.add(name=name, value=value)
            for timestamp, value in zip(one.timestamps_ms.tolist(), one.values.tolist(), strict=True):
                made.samples.add(timestamp=timestamp, value=value)
        bodies.append(bytes(cramjam.snappy.compress_raw(request.SerializeToString())))
    return bodies


def our_bodies(series: Sequence[SeriesSamples], one_each: bool) -> list[bytes]:
    job = job_of(series, SAMPLES_PER_REQUEST, one_each)
    return [job.body(request) for chains in job.rounds for chain in chains for request in chain]


def _cpu_s(work: Callable[[], object]) -> float:
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


def _encoding(report: Report) -> None:
    for count, samples in SHAPES:
        series = series_of("encoded", count, samples, 1_767_225_600)
        total = count * samples
        turns = [
            (
                _cpu_s(lambda: our_bodies(series, one_each=False)),  # noqa: B023 -- called at once
                _cpu_s(lambda: our_bodies(series, one_each=True)),  # noqa: B023 -- called at once
                _cpu_s(lambda: plain_bodies(series)),  # noqa: B023 -- called at once
            )
            for _ in range(TURNS)
        ]
        shape = f"{count:,} series of {samples}"
        ours, each, plain = (min(column) for column in zip(*turns, strict=True))
        report.add(f"encode {shape}: objects", total / plain, "samples/s")
        ratio = statistics.median(theirs / mine for mine, _, theirs in turns)
        report.add(f"encode {shape}", total / ours, "samples/s", "objects", ratio, ENCODING_GOAL)
        ratio = statistics.median(theirs / mine for _, mine, theirs in turns)
        report.add(f"encode {shape}, one a request", total / each, "samples/s", "objects", ratio)


async def _plain(url: str, series: Sequence[SeriesSamples]) -> None:
    headers = {
        "Content-Encoding": "snappy",
        "Content-Type": "application/x-protobuf",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
    }
    async with aiohttp.ClientSession(headers=headers) as session:
        for body in plain_bodies(series):
            async with session.post(url, data=body) as answer:
                assert answer.status == 204, await answer.text()


async def _sending(report: Report, home: Path) -> None:
    server = PrometheusServer(home, out_of_order_window="2h")
    server.start()
    clients = {
        window_s: RemoteWrite(
            Receiver(name="bench", url=server.write_url, out_of_order_window_s=window_s), SystemClock()
        )
        for window_s in (7_200, 0)
    }

    async def ours(window_s: int, series: Sequence[SeriesSamples]) -> None:
        assert (await clients[window_s].write(series)).samples == SERIES * SAMPLES

    ways: dict[str, Callable[[Sequence[SeriesSamples]], Awaitable[None]]] = {
        "plain": lambda series: _plain(server.write_url, series),
        "window": lambda series: ours(7_200, series),
        "one_each": lambda series: ours(0, series),
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    try:
        start_s = int(time.time()) // 60 * 60 - 60 * SAMPLES * (TURNS + 1)
        for turn in range(TURNS + 1):
            for name, send in ways.items():
                series = series_of(f"bench_{name}", SERIES, SAMPLES, start_s + 60 * SAMPLES * turn)
                began_s, cpu_s = time.perf_counter(), time.process_time()
                await send(series)
                took[name].append((time.perf_counter() - began_s, time.process_time() - cpu_s))
        for name in ways:
            ((_, stored),) = server.query(f"sum(count_over_time(bench_{name}[2h]))")
            assert stored == SERIES * SAMPLES * (TURNS + 1), (name, stored)
    finally:
        for client in clients.values():
            await client.close()
        server.stop()
    _report_sending(report, took)


def _report_sending(report: Report, took: dict[str, list[tuple[float, float]]]) -> None:
    """The first turn makes the series, and does not count."""
    plain = took["plain"][1:]
    total = SERIES * SAMPLES
    report.add("into Prometheus: a plain loop", total / statistics.median(w for w, _ in plain), "samples/s")
    for name, label, goal in (
        ("window", "into Prometheus", SENDING_GOAL),
        ("one_each", "into Prometheus, one a request", None),
    ):
        mine = took[name][1:]
        wall_s = statistics.median(w for w, _ in mine)
        ratio = statistics.median(p / m for (p, _), (m, _) in zip(plain, mine, strict=True))
        report.add(label, total / wall_s, "samples/s", "a plain loop", ratio, goal)
        cpu_s = statistics.median(c for _, c in mine)
        ratio = statistics.median(m / p for (_, p), (_, m) in zip(plain, mine, strict=True))
        report.add(f"{label}: our CPU", 1e6 * cpu_s / total, "µs/sample", "a plain loop", ratio)
        report.add(f"{label}: of one core", cpu_s / wall_s, "")


def run(report: Report) -> None:
    """Measure; a ratio is ours over the loop's."""
    _encoding(report)
    if prometheus_program() is None:
        print("no prometheus on the PATH: nothing is sent", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as home:
        asyncio.run(_sending(report, Path(home)))
