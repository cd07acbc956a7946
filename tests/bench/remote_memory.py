"""What a remote writer takes in memory by the number of its series: the peak of the resident set of a process that names, holds and writes them.

It meets EC2's metrics as `raw` has them, five minutes at a time: batches of 500 series of 100 instances, labels as YACE's with an ARN and two tags.
The receiver takes everything and keeps nothing. What is written must be every point, once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from os import getpid
from typing import cast

import numpy as np

from ingest import wire
from ingest.clock import ManualClock
from ingest.forwarded import Tally
from ingest.forwarding import Forwarder
from ingest.log import Outgoing
from ingest.model import Batch, RecordPosition, Series, SeriesKey, Target, series_ids
from ingest.ports import Record, SeriesSamples, Written
from ingest.resources import Resource, ResourceBook
from ingest.sinks.remote_requests import job_of, samples_in
from shard_config.model import Config
from tests.bench.pipeline import PEAKS_KNOWN, peak_mb
from tests.bench.processes import receive, running
from tests.bench.run import Report
from workers.remote_names import Names

ACCOUNT, REGION = "123456789012", "eu-west-1"
TARGET = Target("cloudwatch", ACCOUNT, REGION)
METRICS = ("CPUUtilization", "DiskReadOps", "DiskWriteOps", "NetworkIn", "NetworkOut")
PER_BATCH, POINTS, LOOKS = 500, 5, 4
SETTLING_S = 600
FEW, MANY = 100_000, 1_000_000
TIMEOUT_S = 1_200
START_S = 1_767_268_800


class _Book:
    """Resources of all instances, as they are named, made when they are asked for."""

    def known(self, target: Target, service: str) -> bool:
        return True

    def of(self, target: Target, service: str, dimensions: Sequence[tuple[str, str]]) -> Resource:
        (_, instance) = dimensions[0]
        arn = f"arn:aws:ec2:{REGION}:{ACCOUNT}:instance/{instance}"
        return Resource(
            arn, {"Team": f"team-{instance[-2:]}", "Environment": "production"}, tuple(dimensions)
        )


class _Taking:
    """A receiver that takes everything as it is sent, request by request, and keeps nothing."""

    def __init__(self) -> None:
        self.samples = 0

    async def write(self, series: Sequence[SeriesSamples]) -> Written:
        job = job_of(series, 2_000, one_each=False)
        while job.rounds:
            for chain in job.rounds.pop():
                for request in reversed(chain):
                    assert job.body(request)
                    job.taken += samples_in(request)
        self.samples += job.taken
        return job.written()

    async def close(self) -> None: ...


class _NoLetters:
    async def send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]:
        raise RuntimeError("the receiver refused something")


def _config() -> Config:
    return Config.model_validate(
        {
            "accounts": [{"id": ACCOUNT, "alias": "shop", "regions": [REGION], "services": ["ec2"]}],
            "services": [{"service": "ec2", "namespace": "AWS/EC2", "settling_s": SETTLING_S}],
            "remote_write": {
                "receivers": [{"name": "one", "url": "http://127.0.0.1:1/api/v1/write"}],
                "services": {"ec2": {"exported_tags": ["Team", "Environment"]}},
            },
        }
    )


def _batches(series: int, look: int) -> Iterator[bytes]:
    """Records of one look at so many series: the points of its five minutes."""
    random = np.random.default_rng(look)
    for first in range(0, series, PER_BATCH):
        some = tuple(
            Series(
                SeriesKey(
                    ACCOUNT,
                    REGION,
                    "AWS/EC2",
                    METRICS[n % len(METRICS)],
                    (("InstanceId", f"i-{n // len(METRICS):017x}"),),
                    "Average",
                    60,
                ),
                "Percent",
            )
            for n in range(first, first + PER_BATCH)
        )
        from_s = START_S + 300 * look
        batch = Batch(
            task_id="0" * 32,
            target=TARGET,
            service="ec2",
            observed_at_ms=(from_s + 300) * 1000,
            revision=0,
            grid_s=300,
            series=some,
            counts=np.full(PER_BATCH, POINTS, np.int32),
            timestamps_s=np.tile(from_s + 60 * np.arange(POINTS, dtype=np.int64), PER_BATCH),
            values=np.round(random.uniform(0, 100, PER_BATCH * POINTS), 2),
            ids=series_ids(some),
        )
        (payload,) = wire.encode_batch(batch)
        yield payload.value


def _write(pipe: Connection, window_s: int) -> None:
    """A process that takes records until it is sent None, sends what it wrote, and its peak."""
    pipe.send(asyncio.run(_written(pipe, window_s)))
    pipe.recv()


async def _written(pipe: Connection, window_s: int) -> tuple[int, float, float]:
    """Samples, the peak in MB, CPU seconds."""
    config, clock, taking = _config(), ManualClock(START_S), _Taking()
    forwarder = Forwarder(
        "bench",
        "one",
        window_s,
        {"ec2": SETTLING_S},
        Names(config, cast("ResourceBook", _Book())),
        taking,
        _NoLetters(),
        ("raw", "dead"),
        config.limits,
        clock,
        Tally(),
        bytes_max=config.remote_write.hold_bytes_max if config.remote_write else 0,
    )
    forwarder.open({0: (0, "")})
    offset = 0
    while (said := pipe.recv()) is not None:
        if isinstance(said, int):
            clock.advance(said - clock.now_s())
            forwarder.caught_up([0])
        else:
            at = RecordPosition("raw", 0, offset)
            await forwarder.take([Record(at, b"", said, int(clock.now_ms()))])
            offset += 1
        if forwarder.full or isinstance(said, int) or window_s:
            while await forwarder.send():
                pass
    return taking.samples, peak_mb(getpid()), time.process_time()


def run(report: Report) -> None:
    """Measure."""
    if not PEAKS_KNOWN:
        return
    for window_s, receiver in ((7_200, "with a window"), (0, "without a window")):
        peaks: dict[int, float] = {}
        for series in (FEW, MANY):
            with running(_write, window_s) as (_, pipe):
                for look in range(LOOKS):
                    pipe.send(START_S + 300 * (look + 1))
                    for value in _batches(series, look):
                        pipe.send(value)
                pipe.send(START_S + 300 * LOOKS + 2 * SETTLING_S)
                pipe.send(None)
                samples, peaks[series], cpu_s = receive(pipe, TIMEOUT_S)
            if samples != series * POINTS * LOOKS:
                raise RuntimeError(f"of {series * POINTS * LOOKS:,} points {samples:,} were written")
            report.add(f"{receiver}: {series:,} series, peak", peaks[series], "MB")
            report.add(f"{receiver}: {series:,} series", 1e6 * cpu_s / samples, "µs CPU/sample")
        more = (peaks[MANY] - peaks[FEW]) * 1e6 / (MANY - FEW)
        report.add(f"{receiver}: memory beyond that", more, "bytes/series")
