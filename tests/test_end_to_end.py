"""The main job on the whole real stack: what a user starts, what lands, and what is left afterwards."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import aiokafka
import asyncpg
import psutil
import pytest
from rich.console import Console

from shard_config.model import Config
from tests.conftest import eventually
from workers.local import LocalStack, find_config
from workers.prometheus import prometheus_program
from workers.run import run_once
from workers.scenes import Scene, made_up_scene
from workers.stack import StackSpec
from workers.supervise import MARK

ROOT = Path(__file__).resolve().parent.parent
SHARED_TRACES = ROOT.parent / "shared" / "data" / "cloudwatch-traces"

DIRTY = {
    "ec2_cpu_utilization_0a": [
        "2014-02-14 14:27:00,51.846000000000004",
        "2014-02-14 14:32:00,44.508",
        "2014-02-14 15:33:00,0.1",
    ],
    "ec2_disk_write_bytes_0b": [
        "2014-02-14 14:30:00,7.0",
        "2014-02-14 14:30:00,9.5",
        "2014-02-14 14:30:00,-1.0",
    ],
    "elb_request_count_web": ["2014-02-15 00:04:00,94.0"],
    "rds_cpu_utilization_0c": ["2014-02-14 14:30:00,6.456", "2014-02-14 14:35:00,0.0"],
    "anything else": ["2014-02-14 14:30:01,1e-300", "2014-02-14 14:30:02,1.7976931348623157e308"],
}


def headgate(home: Path, *args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workers.cli", *args],
        cwd=ROOT,
        env=os.environ | {"HEADGATE_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def left_behind(home: Path) -> list[str]:
    """Command lines of processes that belong to the stack of this home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(home):
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


# --- recorded traces, from the command line ----------------------------------------------------------------------


def test_a_folder_of_traces_lands_as_its_files_say(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    for name, lines in DIRTY.items():
        (folder / f"{name}.csv").write_text("\n".join(["timestamp,value", *lines]) + "\n")
    for real in sorted(SHARED_TRACES.glob("*.csv")):  # where they are there, the real ones too
        (folder / real.name).symlink_to(real)
    home, out = tmp_path / "home", tmp_path / "out"

    done = headgate(home, "run", "--once", "--traces", str(folder), "--out", str(out))

    assert done.returncode == 0, done.stdout + done.stderr
    assert landed_in(out / "samples.csv") == points_of(folder)
    assert "live page: http://127.0.0.1:" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ok"]
    assert summary["metrics_billed"]["ledger"] == summary["metrics_billed"]["simulator"]
    assert f"report: {out / 'report.html'}" in done.stdout
    assert averages_in(out / "report.json") == pytest.approx(cpu_averages_of(folder))
    assert left_behind(home) == []


def averages_in(report: Path) -> dict[str, float]:
    """Resource → the average of its CPU, as the report has it."""
    return {
        resource["key"]["id"]: metric["average"]["value"]
        for resource in json.loads(report.read_text())["resources"]
        for metric in resource["metrics"]
        if metric["role"] == "cpu"
    }


def cpu_averages_of(folder: Path) -> dict[str, float]:
    """The same, read from the files alone."""
    return {
        name.rpartition("=")[2]: sum(points.values()) / len(points)
        for name, points in points_of(folder).items()
        if " CPUUtilization " in name
    }


def points_of(folder: Path) -> dict[str, dict[str, float]]:
    """Series → RFC 3339 timestamp → the greatest value, read from the files alone."""
    prefixes = {
        "ec2_cpu_utilization_": "AWS/EC2 CPUUtilization Average InstanceId=i-",
        "ec2_disk_write_bytes_": "AWS/EC2 DiskWriteBytes Average InstanceId=i-",
        "ec2_network_in_": "AWS/EC2 NetworkIn Average InstanceId=i-",
        "rds_cpu_utilization_": "AWS/RDS CPUUtilization Average DBInstanceIdentifier=",
        "elb_request_count_": "AWS/ELB RequestCount Sum LoadBalancerName=",
    }
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for path in folder.glob("*.csv"):
        series = f"Traces {path.stem} Average "
        for prefix, name in prefixes.items():
            if path.stem.startswith(prefix):
                series = name + path.stem.removeprefix(prefix)
        with path.open() as file:
            for row in csv.DictReader(file):
                at = row["timestamp"].replace(" ", "T") + "Z"
                value = float(row["value"])
                found[series][at] = max(value, found[series].get(at, value))
    return found


def landed_in(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            dims = " ".join(f"{k}={v}" for k, v in json.loads(row["dims"]).items())
            series = f"{row['namespace']} {row['metric']} {row['stat']} {dims}"
            assert row["timestamp"] not in found[series], "a key stands once"
            found[series][row["timestamp"]] = float(row["value"])
    return found


PROMETHEUS = 2 if prometheus_program() else 0

# --- a running stack ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    stack: LocalStack
    scene: Scene
    config: Config

    def headgate(self, *args: str) -> subprocess.CompletedProcess[str]:
        return headgate(self.stack.home, *args)

    async def pids(self) -> dict[str, int]:
        return {p.name: p.pid for p in await self.stack.processes()}


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """Three shards and two consumers at work on the last hour, throttled, so that they are at work for a while."""
    home = tmp_path_factory.mktemp("stack")
    scene = made_up_scene(accounts=4, metrics=120, seed=7, once=True)
    stack = LocalStack(home)
    await stack.start(
        StackSpec(
            scene.config,
            shards=3,
            consumers=2,
            simulate_args=(*scene.simulate_args, "--calls-per-s", "3"),
            prometheus=PROMETHEUS,
        )
    )
    try:
        yield Running(stack, scene, find_config(stack.config_path))
    finally:
        await stack.stop()
    assert left_behind(home) == []


async def test_killing_any_worker_loses_nothing(running: Running, tmp_path: Path) -> None:
    before = await running.pids()
    victims = {"exporter-1", "exporter-2", "consumer-1", "coordinator"}
    if PROMETHEUS:
        victims |= {"remote-writer-1", "prometheus-1"}
    for victim in victims:
        os.kill(before[victim], signal.SIGKILL)
    said = io.StringIO()

    code = await run_once(
        running.stack, running.scene, tmp_path, Console(file=said, width=200), with_prometheus=True
    )

    assert code == 0, said.getvalue()
    after = await running.pids()
    assert {name for name in before if before[name] != after[name]} == victims
    # All that has landed is in Prometheus, too, whoever was killed; where there is none the summary says so.
    summary = json.loads((tmp_path / "summary.json").read_text())
    held = summary["prometheus"]
    assert (held is not None) == bool(PROMETHEUS)
    assert held is None or held["samples"] == summary["points"]["equal"] > 0


async def test_samples_prints_values_that_read_back_to_the_same_floats(running: Running) -> None:
    connection = await asyncpg.connect(running.config.postgres.dsn)
    try:
        series = await connection.fetchrow(
            "SELECT * FROM series WHERE namespace = 'AWS/EC2' AND stat = 'Average' ORDER BY id LIMIT 1"
        )
        rows = await connection.fetch(
            "SELECT ts, value FROM samples WHERE series = $1 ORDER BY ts", series["id"]
        )
    finally:
        await connection.close()
    dims = [f"--dim={k}={v}" for k, v in json.loads(series["dimensions"]).items()]

    done = running.headgate(
        "samples",
        *("--account", series["account"], "--region", series["region"], "--namespace", series["namespace"]),
        *("--metric", series["metric"], *dims, "--stat", series["stat"], "--format", "csv"),
    )

    assert done.returncode == 0, done.stderr
    printed = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(datetime.fromisoformat(r["timestamp"]), float(r["value"])) for r in printed] == [
        (r["ts"].astimezone(UTC), r["value"]) for r in rows
    ]
    assert printed


async def test_what_does_not_decode_goes_to_the_dead_letters_and_stops_nobody(running: Running) -> None:
    kafka = running.config.kafka
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=kafka.bootstrap)
    await producer.start()
    try:
        for rubbish in (b"", b"\xc3\x01rubbish", b"\x28\xb5\x2f\xfd" + b"\xff" * 40):
            for partition in range(kafka.raw_partitions):
                await producer.send_and_wait(kafka.topic("raw"), rubbish, partition=partition)
    finally:
        await producer.stop()

    async with asyncpg.create_pool(running.config.postgres.dsn, min_size=1, max_size=1) as pool:
        await eventually_at_the_end(pool, running.config)
    status = json.loads(running.headgate("status", "--json").stdout)

    assert status["dead_letters"] == 3 * kafka.raw_partitions
    assert sum(status["landing"]["lag"].values()) == 0
    assert status["ledger"]["gaps"] == 0


async def eventually_at_the_end(pool: asyncpg.Pool, config: Config) -> None:
    """Wait until the store's positions are at the end of `raw`."""
    topic = config.kafka.topic("raw")
    consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=config.kafka.bootstrap)
    await consumer.start()
    try:
        ends = await consumer.end_offsets(
            [aiokafka.TopicPartition(topic, p) for p in range(config.kafka.raw_partitions)]
        )
    finally:
        await consumer.stop()

    async def there() -> bool:
        at = await pool.fetch(
            "SELECT partition, next FROM positions WHERE sink = 'postgres' AND topic = $1", topic
        )
        return {r["partition"]: r["next"] for r in at} == {tp.partition: end for tp, end in ends.items()}

    await eventually(there)


async def test_scaling_restarts_no_other_shard(running: Running) -> None:
    before = await running.pids()

    grown = running.headgate("scale", "4")
    between = await running.pids()
    shrunk = running.headgate("scale", "2")
    after = await running.pids()

    assert grown.returncode == shrunk.returncode == 0, grown.stderr + shrunk.stderr
    assert between.keys() - before.keys() == {"exporter-4"}
    assert between.keys() - after.keys() == {"exporter-3", "exporter-4"}
    assert all(before[name] == after[name] for name in after if name in before)


async def test_a_second_stack_in_one_folder_is_refused(running: Running) -> None:
    done = running.headgate("run", "--once")

    assert done.returncode == 3
    assert "is running already" in done.stderr
