"""GetMetricData's own path against aiobotocore's, a whole exporter against YACE (`yace`), and the memory of a million series.

A call is 500 queries of 5 points, asked as a look asks it, with credentials, limiter, retries and checks, up to numpy columns; against it
stands aiobotocore's client as it comes, up to the dicts that it returns. Both ask a server that says the same bytes to everybody, in a
process of its own, so that the client's CPU is all that is measured: in turns, in one process.

Memory is the peak of the resident set of a process that looks at one target of a million metrics (2,000 pages of ListMetrics, 2,000 calls),
and takes what the look yields batch by batch; against the same with 250,000 metrics, with which its caches are full.
"""

from __future__ import annotations

import asyncio
import gc
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from os import getpid

import orjson
import structlog
import uvloop
from aiobotocore.session import AioSession

from ingest.changed import Changed
from ingest.clock import SystemClock
from ingest.collect import Collector, Topics
from ingest.log import Outgoing
from ingest.model import LookStatus, RecordPosition, Series, SeriesKey, Target, Task, TaskItem, TaskKind
from ingest.objects import pack
from ingest.ports import ArchivedTask
from ingest.sources.aws import Access, Aws, Tally
from ingest.sources.cloudwatch import CloudWatchSource
from ingest.sources.columns import SeriesTable, columns_of
from ingest.sources.limiter import points_per_s
from ingest.sources.metric_data import Answer, Page, check, plan
from ingest.sources.transport import Calls
from shard_config.model import Config
from tests.bench import yace
from tests.bench.pipeline import PEAKS_KNOWN, peak_mb
from tests.bench.processes import receive, running
from tests.bench.run import Report
from workers.world import account_ids

QUERIES, POINTS, PERIOD_S = 500, 5, 60
ACCOUNT = account_ids(1)[0]
REGION = "eu-west-1"
ROUNDS, CALLS, BOTOCORE_CALLS = 7, 40, 6
CPU_GOAL = ">= 15"
FEW, MANY = 250_000, 1_000_000
BYTES_A_WINDOW = 16
"""Of memory that a series may take for each unsettled window, beyond what the process takes with a few."""
UNSETTLED = 3
"""Windows that a look covers: its own, and two for a settling time of 600 s."""
MEMORY_TIMEOUT_S = 600.0


# --- a server that says the same to everybody -----------------------------------------------------------------


def _said(points: int, end_s: int) -> bytes:
    start_s = end_s - points * PERIOD_S
    results = [
        {
            "Id": f"q{row}",
            "Label": "CPUUtilization",
            "Timestamps": [start_s + PERIOD_S * n for n in range(points)],
            "Values": [round(1.37 * row + 0.1234 * n, 4) for n in range(points)],
            "StatusCode": "Complete",
        }
        for row in range(QUERIES)
    ]
    return orjson.dumps({"MetricDataResults": results, "Messages": []})


def _listed(number: int, pages: int) -> bytes:
    metrics = [
        {
            "Namespace": "AWS/EC2",
            "MetricName": "CPUUtilization",
            "Dimensions": [{"Name": "InstanceId", "Value": f"i-{number * QUERIES + n:017x}"}],
        }
        for n in range(QUERIES)
    ]
    return orjson.dumps({"Metrics": metrics} | ({"NextToken": str(number + 1)} if number + 1 < pages else {}))


_IDENTITY = (
    '<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>'
    f"<Account>{ACCOUNT}</Account></GetCallerIdentityResult></GetCallerIdentityResponse>"
).encode()


class _Said(asyncio.Protocol):
    """One connection to it. Requests come one after the other, each with its length."""

    pages = 1
    data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._read = bytearray()

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, found, body = bytes(self._read).partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head.lower()) if found else None
        if length is None or len(body) < int(length[1]):
            return
        self._read.clear()
        if b"GetMetricData" in head:
            answer = self.data
        elif b"ListMetrics" in head:
            answer = _listed(int(orjson.loads(body).get("NextToken", 0)), self.pages)
        else:
            answer = _IDENTITY
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\nDate: %s\r\nContent-Length: %d\r\n\r\n"
        assert isinstance(self._transport, asyncio.WriteTransport)
        self._transport.write(head % (date, len(answer)) + answer)


def _say(pipe: Connection, points: int, end_s: int, pages: int) -> None:
    """The server's process: sends its URL, and ends when it is sent anything."""

    async def serve() -> None:
        _Said.data, _Said.pages = _said(points, end_s), pages
        server = await asyncio.get_running_loop().create_server(_Said, "127.0.0.1", 0)
        pipe.send("http://{}:{}".format(*server.sockets[0].getsockname()[:2]))
        await asyncio.to_thread(pipe.recv)
        server.close()

    asyncio.run(serve())


def _now_s() -> int:
    """The end of the last whole window."""
    return int(time.time()) // 300 * 300


def _config(url: str) -> Config:
    return Config.model_validate(
        {
            "accounts": [
                {
                    "id": ACCOUNT,
                    "regions": [REGION],
                    "services": ["ec2"],
                    "calls_per_s": 1e6,
                    "datapoints_per_s": 1e12,
                }
            ],
            "services": [{"service": "ec2", "namespace": "AWS/EC2", "settling_s": (UNSETTLED - 1) * 300}],
            "aws": {"endpoint_url": url},
        }
    )


# --- a call ---------------------------------------------------------------------------------------------------


async def _cpu_ms(ask: Callable[[], Awaitable[object]], count: int) -> float:
    gc.collect()
    began_s = time.process_time()
    for _ in range(count):
        await ask()
    return (time.process_time() - began_s) / count * 1000


async def _calls(url: str, report: Report) -> None:
    clock, config = SystemClock(), _config(url)
    account = config.accounts[0]
    aws = Aws(config, clock)
    calls = Calls(aws)
    series = [
        Series(
            SeriesKey(
                ACCOUNT, REGION, "AWS/EC2", "CPUUtilization", (("InstanceId", f"i-{n:017x}"),), "Average", 60
            )
        )
        for n in range(QUERIES)
    ]
    end_s = clock.now_s() // 300 * 300
    [call] = plan([SeriesTable(tuple(series))], end_s - POINTS * PERIOD_S, end_s, PERIOD_S)
    rows, tally = range(QUERIES), Tally()
    from_botocore = {**call.request(rows), "MetricDataQueries": list(call.request(rows)["MetricDataQueries"])}

    async def ours() -> object:
        answer = Answer(frozenset(rows))
        request = call.request(rows)

        async def send(access: Access) -> Page:
            return check(await calls.get_metric_data(access, request), answer.asked)

        page = await aws.call(
            account,
            REGION,
            "GetMetricData",
            send,
            cost_s=1 / account.calls_per_s,
            points_cost_s=QUERIES * POINTS / points_per_s(account, clock.now_s() - call.start_s),
            deadline_s=clock.monotonic_s() + 30,
            tally=tally,
            metrics=QUERIES,
        )
        answer.add(page)
        return columns_of([answer.points[row] for row in answer.rows("Complete")])

    try:
        options = {"aws_access_key_id": "AKIASIMULATED", "aws_secret_access_key": "simulated"}
        async with AioSession().create_client("cloudwatch", REGION, endpoint_url=url, **options) as client:

            async def botocores() -> object:
                return await client.get_metric_data(**from_botocore)

            await _cpu_ms(ours, 5), await _cpu_ms(botocores, 2)
            turns = [
                (await _cpu_ms(ours, CALLS), await _cpu_ms(botocores, BOTOCORE_CALLS)) for _ in range(ROUNDS)
            ]
    finally:
        await calls.close()
        await aws.close()
    our_ms, botocore_ms = (statistics.median(turn) for turn in zip(*turns, strict=True))
    ratio = statistics.median(theirs / our for our, theirs in turns)
    report.add("aiobotocore, a call of 500 × 5", botocore_ms, "ms CPU")
    report.add(
        "a call of 500 × 5 up to columns", our_ms, "ms CPU", "aiobotocore, times less", ratio, CPU_GOAL
    )
    report.add("queries a second of one core", QUERIES / our_ms * 1000, "queries/s")


# --- a million series -----------------------------------------------------------------------------------------


def _look(pipe: Connection, url: str, end_s: int) -> None:
    """A process that looks once at all that there is, and sends its points and its peak."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    pipe.send(uvloop.run(_look_once(url, end_s)))
    pipe.recv()


class _Nowhere:
    """An archive and a log that take everything, as they take it: a part, and some batches, at a time."""

    def __init__(self) -> None:
        self.points = 0

    async def put(self, task: ArchivedTask) -> ArchivedTask:
        parts, body = pack(task)
        stored = len(body) + sum(len(part.body) for part in parts)
        if stored < sum(map(len, task.payloads)):
            raise RuntimeError(f"{stored} bytes were archived")
        self.points = sum(item.points for item in task.receipt.items)
        return task

    async def get(self, archive_key: str) -> ArchivedTask | None:
        return None

    async def send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]:
        return [RecordPosition(topic, 0, i) for i, _ in enumerate(records)]


async def _look_once(url: str, end_s: int) -> tuple[int, float, float]:
    """A whole task: looked at, archived, published. Points, the peak in MB, CPU seconds."""
    clock, config = SystemClock(), _config(url)
    source, nowhere = CloudWatchSource(config, clock), _Nowhere()
    item = TaskItem("ec2", end_s - UNSETTLED * 300, end_s, 300)
    task = Task("0" * 32, Target("cloudwatch", ACCOUNT, REGION), "r", end_s, 0, TaskKind.LIVE, 0, (item,))
    collector = Collector(
        "bench",
        {"cloudwatch": source},
        nowhere,
        nowhere,
        Topics("raw", "ledger"),
        clock,
        deadline_s=MEMORY_TIMEOUT_S,
        changed=Changed({"ec2": (UNSETTLED - 1) * 300}),
    )
    receipt = await collector.collect(task, maybe_second_try=False)
    await source.close()
    outcome = receipt.items[0].outcome
    if outcome.status != LookStatus.COMPLETE:
        raise RuntimeError(f"the look was not complete: {outcome}")
    return nowhere.points, peak_mb(getpid()), time.process_time()


def _memory(report: Report) -> None:
    peaks: dict[int, float] = {}
    for series in (FEW, MANY):
        end_s = _now_s()
        with running(_say, POINTS * UNSETTLED, end_s, series // QUERIES) as (_, server):
            url = receive(server, 60)
            with running(_look, url, end_s) as (_, pipe):
                points, peaks[series], cpu_s = receive(pipe, MEMORY_TIMEOUT_S)
        if points < series * POINTS:
            raise RuntimeError(f"the look at {series:,} series brought {points:,} points")
    beyond = (peaks[MANY] - peaks[FEW]) * 1e6 / (MANY - FEW)
    report.add(f"a task of {FEW:,} series, peak", peaks[FEW], "MB")
    report.add(f"a task of {MANY:,} series, peak", peaks[MANY], "MB")
    report.add(f"a task of {MANY:,} series of {POINTS * UNSETTLED} points", cpu_s, "s CPU")
    goal = f"<= {BYTES_A_WINDOW * UNSETTLED}"
    report.add("memory of a task beyond that, a series of 3 unsettled windows", beyond, "bytes", goal=goal)


def run(report: Report) -> None:
    """Measure a call, a whole exporter beside YACE, and memory."""
    with running(_say, POINTS, _now_s(), 1) as (_, pipe):
        asyncio.run(_calls(receive(pipe, 60), report))
    yace.run(report)
    if PEAKS_KNOWN:
        _memory(report)
