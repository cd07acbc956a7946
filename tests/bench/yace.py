"""A whole exporter beside YACE (0.67, where `yace` is on PATH), at 20,000 metrics of one simulated AWS: CPU, memory, and the bill.

* Headgate: `headgate exporter` with Kafka and S3, from the task to the receipt: an hour of polls, twelve looks of 5 minutes at a resolution
  of 60 s, its one listing included.
* YACE: scrapes at its defaults, each listing included, the newest point of the last 5 minutes of each metric, and one GET of /metrics
  after each scrape, for nothing leaves it otherwise.

Both are processes, and their own CPU and their peak of memory are what counts; the simulated AWS has a third one. Of the bill, metrics requested and
ListMetrics are the simulated AWS's own count.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil
import yaml

from ingest import wire
from ingest.log import Outgoing, Producer
from ingest.model import Outcome, Target, Task, TaskItem, TaskKind, task_id_of
from ingest.ports import Record
from ingest.scan import scan
from shard_config.load import load
from shard_config.model import Config
from tests.bench.pipeline import PEAKS_KNOWN, peak_mb
from tests.bench.run import Report
from workers.servers import (
    LOOPBACK,
    KafkaServer,
    PostgresServer,
    S3Server,
    Server,
    free_ports,
    get_local,
    local_environment,
)
from workers.world import account_ids

METRICS, LOOKS, SCRAPES = 20_000, 12, 6
ACCOUNT = account_ids(1)[0]
TARGET = Target("cloudwatch", ACCOUNT, "eu-west-1")
ROLE = "arn:aws:iam::{account}:role/Headgate"
NAMES = tuple(f"Metric{n}" for n in range(10))
SERVICE = {
    "service": "ec2",
    "namespace": "AWS/EC2",
    "settling_s": 0,
    "metrics": [{"name": name, "statistics": ["Average"]} for name in NAMES],
}
TIMEOUT_S = 180.0
_PROGRAM = """import asyncio, sys
from shard_config.model import ServiceProfile
from workers import simulator
from workers.world import World, account_ids
import orjson
profile = ServiceProfile.model_validate(orjson.loads(sys.argv[1]))
async def serve():
    world = World(1, account_ids(1), ("eu-west-1",), int(sys.argv[2]), (profile,))
    await simulator.start(world, port=int(sys.argv[3]), calls_per_s=0)
    await asyncio.Event().wait()
asyncio.run(serve())
"""


class _Process(Server):
    """One of the processes: a command, and where on its port it answers when it is ready."""

    name = "process"

    def __init__(
        self, home: Path, name: str, command: Sequence[str], port: int, health: str, **environment: str
    ) -> None:
        super().__init__(home / name, home / f"{name}.log")
        whole = local_environment(os.environ) | environment
        self._command = ["/usr/bin/env", "-i", *(f"{key}={value}" for key, value in whole.items()), *command]
        self._port = port
        self._health = health

    def prepare(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)

    def command(self) -> Sequence[str]:
        return self._command

    def ready(self) -> bool:
        try:
            self.get(self._health, timeout_s=1)
        except OSError:
            return False
        return True

    def get(self, path: str, timeout_s: float = 30) -> bytes:
        return get_local(f"{self.url}{path}", timeout_s)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self._port}"

    @property
    def cpu_s(self) -> float:
        spent = psutil.Process(self.pid).cpu_times()
        return spent.user + spent.system

    @property
    def peak_mb(self) -> float:
        return peak_mb(self.pid) if self.pid and PEAKS_KNOWN else 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one exporter: CPU seconds a look or scrape, memory, and what AWS counted for all of them."""

    cpu_s: float
    peak_mb: float
    metrics: int
    lists: int


def _billing(aws: _Process) -> tuple[int, int]:
    """Metrics requested, and ListMetrics, of the account so far."""
    mine = orjson.loads(aws.get("/billing"))["accounts"].get(ACCOUNT, {})
    calls = mine.get("calls", {}).get(TARGET.region, {})
    return mine.get("metrics_requested", 0), calls.get("ListMetrics", 0)


def _until(aws: _Process, metrics: int) -> None:
    """Wait until so many metrics were requested."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while _billing(aws)[0] < metrics:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"a scrape of YACE took more than {TIMEOUT_S:g} s")
        time.sleep(0.3)


# --- YACE -----------------------------------------------------------------------------------------------------


def _yace(home: Path, program: str, aws: _Process) -> Measured:
    job = {
        "name": "ec2",
        "namespace": "AWS/EC2",
        "regions": [TARGET.region],
        "roles": [{"roleArn": ROLE.format(account=ACCOUNT)}],
        "metrics": [
            {
                "name": name,
                "statistics": ["Average"],
                "period": 60,
                "length": 300,
                "addCloudwatchTimestamp": True,
            }
            for name in NAMES
        ],
    }
    path = home / "yace.yml"
    path.write_text(
        yaml.safe_dump({"apiVersion": "v1alpha1", "sts-region": TARGET.region, "customNamespace": [job]})
    )
    (port,) = free_ports(1)
    environment = {
        "AWS_ENDPOINT_URL": aws.url,
        "AWS_ACCESS_KEY_ID": "AKIASIMULATED",
        "AWS_SECRET_ACCESS_KEY": "simulated",
        "AWS_REGION": TARGET.region,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [
        program,
        *("--config.file", str(path), "--listen-address", f"{LOOPBACK}:{port}", "--scraping-interval", "4"),
    ]
    began = _billing(aws)
    yace = _Process(home, "yace", command, port, "/healthz", **environment)
    try:
        yace.start()
        for scrape in range(1, SCRAPES + 1):
            wanted = began[0] + scrape * METRICS
            _until(aws, wanted)
            time.sleep(1)
            exported = yace.get("/metrics").count(b"\naws_ec2_metric")
        if exported < 0.95 * METRICS:  # some have no point just then
            raise RuntimeError(f"YACE exports {exported:,} metrics of {METRICS:,}; see {yace.log}")
        cpu_s, peak, ended = yace.cpu_s, yace.peak_mb, _billing(aws)
        scrapes = (ended[0] - began[0]) / METRICS
        return Measured(
            cpu_s / scrapes,
            peak,
            round((ended[0] - began[0]) / scrapes),
            round((ended[1] - began[1]) / scrapes),
        )
    finally:
        yace.stop()


# --- Headgate -------------------------------------------------------------------------------------------------


def _headgate(home: Path, aws: _Process, resources: ExitStack) -> tuple[Measured, list[Outcome]]:
    kafka, postgres, s3 = KafkaServer(home), PostgresServer(home), S3Server(home)
    for server in (kafka, postgres, s3):
        resources.callback(server.stop)
        server.start()
    account = {"id": ACCOUNT, "regions": [TARGET.region], "services": ["ec2"]}
    path = home / "headgate.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "accounts": [account | {"calls_per_s": 1000.0, "datapoints_per_s": 1e8}],
                "services": {"ec2": {k: v for k, v in SERVICE.items() if k != "service"}},
                "slots": 1,
                "tasks_in_flight": 1,
                "aws": {"endpoint_url": aws.url, "role_template": ROLE},
                "kafka": {"bootstrap": kafka.bootstrap},
                "postgres": {"dsn": postgres.dsn()},
                "s3": {"endpoint_url": s3.endpoint_url},
            }
        )
    )
    headgate = [sys.executable, "-m", "workers.cli"]
    subprocess.run(
        [*headgate, "setup", "--config", str(path)],
        env=local_environment(os.environ),
        check=True,
        capture_output=True,
        timeout=60,
    )
    postgres.stop()  # an exporter needs none
    (port,) = free_ports(1)
    options = ["--config", str(path), "--shard", "bench", "--metrics-port", str(port)]
    exporter = _Process(home, "exporter", [*headgate, "exporter", *options], port, "/readyz")
    resources.callback(exporter.stop)
    exporter.start()
    config, began = load(path, environ={}), _billing(aws)
    started_s = exporter.cpu_s
    outcomes = asyncio.run(_hour(config))
    cpu_s, ended = (exporter.cpu_s - started_s) / LOOKS, _billing(aws)
    return Measured(cpu_s, exporter.peak_mb, ended[0] - began[0], ended[1] - began[1]), outcomes


async def _hour(config: Config) -> list[Outcome]:
    """Twelve polls, and how their looks ended, by the receipts on Kafka."""
    end_s = int(time.time()) // 300 * 300 - 600
    tasks = []
    for start_s in range(end_s - LOOKS * 300, end_s, 300):
        items = (TaskItem("ec2", start_s, start_s + 300, 300),)
        task_id = task_id_of(TARGET, config.revision, 0, items)
        tasks.append(Task(task_id, TARGET, config.revision, start_s + 300, 0, TaskKind.LIVE, 0, items))
    producer = Producer(config.kafka.bootstrap, "bench")
    try:
        records = [Outgoing(str(TARGET).encode(), wire.encode_task(task), 0) for task in tasks]
        await producer.send(config.kafka.topic("collect"), records)
    finally:
        await producer.close()
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        outcomes: list[Outcome] = []

        def take(record: Record, into: list[Outcome] = outcomes) -> bool:
            into += [item.outcome for item in wire.decode_receipt(record.value).items]
            return False

        await scan(config.kafka, config.kafka.topic("ledger"), take)
        if len(outcomes) >= LOOKS:
            return outcomes
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{len(outcomes)} of {LOOKS} looks were over in {TIMEOUT_S:g} s")
        await asyncio.sleep(0.5)


# --- both -----------------------------------------------------------------------------------------------------


def run(report: Report) -> None:
    """Measure one after the other on the same simulated AWS, which answers both from memory by then."""
    program = shutil.which("yace")
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as folder, ExitStack() as resources:
        home = Path(folder)
        (port,) = free_ports(1)
        words = [orjson.dumps(SERVICE).decode(), str(METRICS), str(port)]
        aws = _Process(home, "simulator", [sys.executable, "-c", _PROGRAM, *words], port, "/healthz")
        resources.callback(aws.stop)
        aws.start()
        theirs = _yace(home, program, aws) if program else None
        ours, outcomes = _headgate(home, aws, resources)
    _report(report, ours, theirs, outcomes)


def _report(report: Report, ours: Measured, theirs: Measured | None, outcomes: Sequence[Outcome]) -> None:
    if unlike := [o.detail for o in outcomes if o.status != "complete" or o.series != METRICS]:
        raise RuntimeError(f"a look was not complete: {unlike[0]}")
    us_ours = ours.cpu_s / METRICS * 1e6
    if theirs is None:
        print("cloudwatch: no yace on PATH, so nothing is held against it", file=sys.stderr)
        report.add("whole exporter, 5 points of a metric", us_ours, "µs CPU/metric")
        report.add("whole exporter, memory", ours.peak_mb, "MB")
    else:
        report.add("YACE, 1 point of a metric", theirs.cpu_s / METRICS * 1e6, "µs CPU/metric")
        report.add(
            "whole exporter, 5 points of a metric",
            us_ours,
            "µs CPU/metric",
            "YACE",
            ours.cpu_s / theirs.cpu_s,
            "<= 1.0",
        )
        report.add("YACE, memory", theirs.peak_mb, "MB")
        if PEAKS_KNOWN:
            report.add(
                "whole exporter, memory", ours.peak_mb, "MB", "YACE", ours.peak_mb / theirs.peak_mb, "<= 1.5"
            )
    minutes = LOOKS * 5 * METRICS
    report.add(
        "metrics billed in an hour",
        ours.metrics,
        "metrics",
        "a scrape a minute",
        ours.metrics / minutes,
        "<= 0.2",
    )
    if theirs is not None:
        hour = LOOKS * (theirs.metrics + theirs.lists)
        ratio = (ours.metrics + ours.lists) / hour
        report.add(
            "billed in an hour with ListMetrics",
            ours.metrics + ours.lists,
            "",
            "YACE each 300 s",
            ratio,
            "<= 1.0",
        )
    receipts = sum(o.metrics_billed for o in outcomes)
    report.add(
        "metrics billed by the receipts", receipts, "metrics", "AWS's bill", receipts / ours.metrics, "<= 1.0"
    )
    report.add("the same, from below", receipts, "metrics", "AWS's bill", receipts / ours.metrics, ">= 1.0")
