"""Dashboards' queries over hours with and without what recording rules have recorded, in a real Prometheus: samples read and time, for the same answers.

5 accounts in 4 regions with 500 instances each, 6 hours at 60 s. What is recorded is what the server itself answers to the shipped rules' expressions at each
evaluation, written back under their names. Every answer is also computed by numpy from what was written.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.clock import SystemClock
from ingest.ports import SeriesSamples
from ingest.sinks.prompb import encoded_labels
from ingest.sinks.remote_write import RemoteWrite
from shard_config.recording import recordings_of
from shard_config.remote_write import Receiver
from tests.bench.run import Report
from tests.late_points import labels
from tests.prometheus_server import PrometheusServer
from workers.prometheus import prometheus_program
from workers.servers import get_local

ACCOUNTS, REGIONS, INSTANCES = 5, 4, 500
STEP_S, HOURS = 60, 6
POINTS = HOURS * 3600 // STEP_S
LATE_S = 960
"""Of ec2's: the offset of its rules."""
WINDOW_H = HOURS + 2
SLICE = 30
"""Points of each series in one write: the server gets them about in order."""
ROUNDS = 3
BYTES, CPU = "aws_ec2_network_in_sum", "aws_ec2_cpuutilization_average"
GOAL = ">= 10"

Values = NDArray[np.float64]
"""Shape (accounts, regions, instances, points)."""


@dataclass(frozen=True)
class Panel:
    """What a dashboard asks for, without and with what is recorded."""

    name: str
    raw: str
    recorded: str


PANELS = (
    Panel(
        "bytes by account",
        f'sum by (account_id) (last_over_time({BYTES}{{dimension_InstanceId!=""}}[1m] offset 16m))',
        f"sum by (account_id) (account_region:{BYTES}:sum)",
    ),
    Panel(
        "bytes of one account by region",
        f'sum by (region) (last_over_time({BYTES}{{account_id="account-1",dimension_InstanceId!=""}}[1m] offset 16m))',
        f'sum by (region) (account_region:{BYTES}:sum{{account_id="account-1"}})',
    ),
    Panel(
        "mean CPU by region",
        f'avg by (region) ({CPU}{{dimension_InstanceId!=""}} offset 16m)',
        f"sum by (region) (account_region:{CPU}:avg * account_region:{CPU}:count) / sum by (region) (account_region:{CPU}:count)",
    ),
)


def expected(panel: str, made: dict[str, Values]) -> dict[str, NDArray[np.float64]]:
    """What a panel shows, by its label's value, computed from what was written."""
    if panel == "bytes by account":
        return {f"account-{a}": made[BYTES][a].sum(axis=(0, 1)) for a in range(ACCOUNTS)}
    if panel == "bytes of one account by region":
        return {f"region-{r}": made[BYTES][1, r].sum(axis=0) for r in range(REGIONS)}
    return {f"region-{r}": made[CPU][:, r].mean(axis=(0, 1)) for r in range(REGIONS)}


class Server:
    """A Prometheus, and the time line in it: points end at `end_s`."""

    def __init__(self, prometheus: PrometheusServer) -> None:
        self._prometheus = prometheus
        self.end_s = int(time.time()) // STEP_S * STEP_S
        self.begin_s = self.end_s - POINTS * STEP_S
        self._sink = RemoteWrite(
            Receiver(name="bench", url=prometheus.write_url, out_of_order_window_s=WINDOW_H * 3600),
            SystemClock(),
            samples_per_request=10_000,
        )

    async def close(self) -> None:
        await self._sink.close()

    async def write(self, series: list[SeriesSamples]) -> None:
        written = await self._sink.write(series)
        if written.refused:
            raise RuntimeError(f"refused: {written.refused[0].said}")

    def ask(self, expression: str, **more: object) -> tuple[dict[str, Any], float]:
        """A range query over all that the rules can see; (data, seconds)."""
        asked = {
            "query": expression,
            "start": self.begin_s + LATE_S,
            "end": self.end_s,
            "step": STEP_S,
        } | more
        began_s = time.perf_counter()
        body = get_local(
            f"{self._prometheus.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}", timeout_s=120
        )
        took_s = time.perf_counter() - began_s
        return json.loads(body)["data"], took_s


async def written(server: Server) -> dict[str, Values]:
    """Points of all instances."""
    random = np.random.default_rng(7)
    shape = (ACCOUNTS, REGIONS, INSTANCES, POINTS)
    made: dict[str, Values] = {
        BYTES: random.integers(0, 10_000, shape).astype(np.float64),
        CPU: np.round(random.uniform(0, 100, shape), 2),
    }
    times = (server.begin_s + STEP_S * np.arange(POINTS, dtype=np.int64)) * 1000
    names = {
        (metric, a, r, i): labels(
            metric, account_id=f"account-{a}", region=f"region-{r}", dimension_InstanceId=f"i-{a}-{r}-{i}"
        )
        for metric in made
        for a in range(ACCOUNTS)
        for r in range(REGIONS)
        for i in range(INSTANCES)
    }
    for at in range(0, POINTS, SLICE):
        part = slice(at, at + SLICE)
        await server.write(
            [
                SeriesSamples(encoded_labels(one), times[part], made[metric][a, r, i, part])
                for (metric, a, r, i), one in names.items()
            ]
        )
    return made


async def record(server: Server) -> None:
    """What the shipped rules would have recorded at each minute."""
    (ec2,) = [one for one in recordings_of(None) if one.service == "ec2"]
    series: list[SeriesSamples] = []
    for rule in ec2.records:
        if rule.name.split(":")[1] not in (BYTES, CPU):
            continue
        data, _ = server.ask(rule.expr)
        for one in data["result"]:
            times, values = zip(*one["values"], strict=True)
            series.append(
                SeriesSamples(
                    encoded_labels(labels(rule.name, **one["metric"])),
                    np.array(times, dtype=np.int64) * 1000,
                    np.array(values, dtype=np.float64),
                )
            )
    await server.write(series)


def right(data: dict[str, Any], panel: str, made: dict[str, Values]) -> bool:
    """Whether an answer is what was written, within a rounding of sums."""
    shown = {
        next(iter(one["metric"].values())): np.array([float(v) for _, v in one["values"]])
        for one in data["result"]
    }
    wanted = expected(panel, made)
    if shown.keys() != wanted.keys():
        return False
    points = (POINTS * STEP_S - LATE_S) // STEP_S + 1
    return all(
        len(shown[k]) == points and np.allclose(shown[k], wanted[k][:points], rtol=1e-12) for k in shown
    )


def run(report: Report) -> None:
    if prometheus_program() is None:
        raise SystemExit("there is no prometheus on the PATH: apt-get install prometheus")
    with tempfile.TemporaryDirectory() as home:
        prometheus = PrometheusServer(Path(home), out_of_order_window=f"{WINDOW_H}h")
        prometheus.start()
        try:
            asyncio.run(_run(report, prometheus))
        finally:
            prometheus.stop()


async def _run(report: Report, prometheus: PrometheusServer) -> None:
    server = Server(prometheus)
    try:
        made = await written(server)
        await record(server)
    finally:
        await server.close()
    for panel in PANELS:
        samples: dict[str, int] = {}
        seconds: dict[str, float] = {}
        for form, expression in (("raw", panel.raw), ("recorded", panel.recorded)):
            data, _ = server.ask(expression, stats="all")
            if not right(data, panel.name, made):
                raise RuntimeError(f"{panel.name}, {form}: not what was written")
            samples[form] = data["stats"]["samples"]["totalQueryableSamples"]
            seconds[form] = median(server.ask(expression)[1] for _ in range(ROUNDS))
        report.add(
            f"{panel.name}: samples read, recorded", samples["recorded"], "samples",
            f"{samples['raw']:,} of the series themselves", samples["raw"] / samples["recorded"], GOAL,
        )  # fmt: skip
        report.add(
            f"{panel.name}: time, recorded", seconds["recorded"] * 1000, "ms",
            f"{seconds['raw'] * 1000:,.0f} ms of the series themselves", seconds["raw"] / seconds["recorded"], GOAL,
        )  # fmt: skip
