"""How many calls the simulated CloudWatch answers: it must not be the bottleneck of what is measured against it.

The server runs in a process of its own. Its CPU a call is what counts (calls a second from one core), for the machine is shared and the
client's work is not the simulator's.
"""

from __future__ import annotations

import asyncio
import resource
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import cbor2
import orjson

from shard_config.model import MetricProfile, ServiceProfile
from tests.bench.run import Report
from workers import simulator
from workers.world import World, account_ids

QUERIES, POINTS, CALLS = 500, 5, 150
CALLS_PER_S_GOAL = ">= 100"
REGION = "eu-west-1"
_NAMES = ("CPUUtilization", "NetworkIn", "NetworkOut", "DiskReadBytes", "DiskWriteBytes")


def _world() -> World:
    profile = ServiceProfile(
        service="ec2", namespace="AWS/EC2", metrics=tuple(MetricProfile(name=n) for n in _NAMES)
    )
    return World(1, account_ids(1), (REGION,), QUERIES, (profile,))


def _serve(pipe: Connection) -> None:
    """The server's process: sends its URL, then its CPU seconds each time it is asked, until it is sent None."""

    async def serve() -> None:
        simulator.collect_garbage_rarely()
        running = await simulator.start(_world(), calls_per_s=0)
        pipe.send(running.url)
        try:
            while await asyncio.to_thread(pipe.recv):
                usage = resource.getrusage(resource.RUSAGE_SELF)
                pipe.send(usage.ru_utime + usage.ru_stime)
        finally:
            await running.close()

    asyncio.run(serve())


def _request(points: int) -> dict[str, Any]:
    end_s = int(time.time()) // 60 * 60 - 3600
    queries = [
        {
            "Id": f"m{n}",
            "MetricStat": {
                "Metric": {
                    "Namespace": m.namespace,
                    "MetricName": m.name,
                    "Dimensions": [{"Name": k, "Value": v} for k, v in m.dimensions],
                },
                "Period": 60,
                "Stat": "Average",
            },
        }
        for n, m in enumerate(_world().metrics(account_ids(1)[0], REGION))
    ]
    return {"MetricDataQueries": queries, "StartTime": end_s - points * 60, "EndTime": end_s}


async def _calls(url: str, path: str, headers: dict[str, str], raw: bytes, count: int) -> float:
    """Wall seconds of `count` calls, one after the other."""
    scope = f"AKIA{account_ids(1)[0]}/20260101/{REGION}/monitoring/aws4_request"
    headers = headers | {
        "Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"
    }
    async with aiohttp.ClientSession(url, headers=headers) as http:
        began = time.perf_counter()
        for _ in range(count):
            async with http.post(path, data=raw) as response:
                answer = await response.read()
                if response.status != 200:
                    raise RuntimeError(answer.decode(errors="replace"))
        return time.perf_counter() - began


def run(report: Report) -> None:
    """Measure GetMetricData of 500 queries in json (5 and 201 points a series) and CBOR (5)."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        if not pipe.poll(60):
            raise RuntimeError("the simulator did not start within a minute")
        url = pipe.recv()
        json = {"X-Amz-Target": "GraniteServiceVersion20100801.GetMetricData"}
        path = "/service/GraniteServiceVersion20100801/operation/GetMetricData"
        short, long = _request(POINTS), _request(201)
        for name, where, headers, raw, points, count, goal in (
            ("json", "/", json, orjson.dumps(short), POINTS, CALLS, CALLS_PER_S_GOAL),
            ("cbor", path, {}, cbor2.dumps(short), POINTS, CALLS // 3, None),
            ("json", "/", json, orjson.dumps(long), 201, CALLS // 10, None),
        ):
            asyncio.run(_calls(url, where, headers, raw, 3))
            pipe.send(True)
            before_s = pipe.recv()
            wall_s = asyncio.run(_calls(url, where, headers, raw, count))
            pipe.send(True)
            cpu_s = pipe.recv() - before_s
            what = f"simulator, {name}, {QUERIES} queries of {points} points"
            report.add(f"{what}, one core", count / cpu_s, "calls/s", goal=goal)
            report.add(f"{what}, wall", count / wall_s, "calls/s")
    finally:
        pipe.send(None)
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
