"""The consumer end to end, Kafka to PostgreSQL, against a plain COPY of the same rows; and the memory of each worker under load.

A round: two million points are in Kafka, 500 series of 5 points a record, one look at all series after the other, in 8 partitions. Then
consumers start, each a process as in a deployment, and run until all of it has landed. Their rate is that of the landings after the
first, by the landings' own times in the store: what comes before is the start of a process, its assignment, and labels that it meets
for the first time. Plain COPY goes by turns with that, as in `landing`: into a day-partitioned table with the same key, a look of all
series at a time, sorted before the clock starts and encoded within.

Kafka, PostgreSQL (with its durability on) and the consumers share the machine's cores; while COPY runs, the others are idle.

Memory is the peak of the resident set, where the kernel tells it (Linux), of one process each in a local stack: an hour of
12 accounts × 2 regions × 500 metrics, as fast as it goes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import asyncpg
import numpy as np
import uvloop

from ingest import wire
from ingest.log import Outgoing, Producer
from ingest.model import Batch
from ingest.sinks.connection import open_connection
from ingest.sinks.copy import COLUMNS, SECONDS_A_DAY, copy_stream, rows_of
from ingest.sinks.partitions import FILLFACTOR, name_of
from shard_config.load import load
from shard_config.model import Config
from tests.bench.codec import POINTS, SERIES, batch_of
from tests.bench.run import Report
from workers.local import LocalStack, find_config
from workers.run import expected_windows, until_landed
from workers.scenes import made_up_scene
from workers.servers import (
    LOOPBACK,
    KafkaServer,
    PostgresServer,
    S3Server,
    Server,
    free_ports,
    last_line,
    local_environment,
)
from workers.stack import StackSpec

PARTITIONS = 8
BATCHES_A_LOOK = 40
LOOKS = 20
"""In a round, 5 minutes apart, at the same 20,000 series: 2 million points."""
DAYS = 7
"""That the looks of all rounds are in, at most."""
ROUNDS = 5
ROUNDS_OF_TWO = 3
LAND_TIMEOUT_S = 60.0
STACK_TIMEOUT_S = 120.0
RATIO_GOAL = ">= 0.6"
MEMORY_GOAL = "<= 300"

_LANDED = """SELECT coalesce(sum(points), 0)::bigint AS points,
    (sum(points) FILTER (WHERE landed_at > first) / extract(epoch FROM max(landed_at) - min(first)))::float8 AS rate
FROM landed, (SELECT min(landed_at) AS first FROM landed WHERE task_id = $1) AS f WHERE task_id = $1"""


class ConsumerProcess(Server):
    """One `headgate consumer`."""

    name = "consumer"

    def __init__(self, home: Path, config: Path, number: int) -> None:
        super().__init__(home / f"consumer-{number}")
        self._config = config
        self._number = number
        (self._port,) = free_ports(1)

    def prepare(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)

    def command(self) -> Sequence[str]:
        return [
            *(sys.executable, "-m", "workers.cli", "consumer", "--config", str(self._config)),
            *("--name", f"bench-{self._number}", "--metrics-port", str(self._port)),
        ]

    def ready(self) -> bool:
        try:
            with urlopen(f"http://{LOOPBACK}:{self._port}/readyz", timeout=1):
                return True
        except OSError:
            return False


class Looks:
    """Makes one look after the other at the same 20,000 series, 5 minutes apart, in the week before today."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(1)
        self._batches = [batch_of(seed) for seed in range(BATCHES_A_LOOK)]
        self.first_day = int(time.time()) // SECONDS_A_DAY - DAYS
        self._at_s = self.first_day * SECONDS_A_DAY

    def next(self, task_id: str) -> list[Batch]:
        at_s, self._at_s = self._at_s, self._at_s + 300
        return [
            replace(
                one,
                task_id=task_id,
                observed_at_ms=(at_s + 310) * 1000,
                timestamps_s=one.timestamps_s - one.timestamps_s.min() + at_s,
                values=np.round(one.values * self._rng.uniform(0.8, 1.2, one.points), 2),
            )
            for one in self._batches
        ]


class Bench:
    """Kafka, PostgreSQL and what goes through them."""

    def __init__(self, config: Config, connection: asyncpg.Connection, producer: Producer) -> None:
        self._topic = config.kafka.topic("raw")
        self._connection = connection
        self._producer = producer
        self._looks = Looks()
        self._rounds = 0
        self.points = LOOKS * BATCHES_A_LOOK * SERIES * POINTS
        self.peaks_mb: list[float] = []
        """Of each consumer in each round."""

    async def prepare(self) -> None:
        await self._connection.execute(
            "CREATE TABLE plain (LIKE samples INCLUDING ALL) PARTITION BY RANGE (ts)"
        )
        for day in range(self._looks.first_day, self._looks.first_day + DAYS):
            start, end = (f"to_timestamp({d * SECONDS_A_DAY})" for d in (day, day + 1))
            await self._connection.execute(
                f"CREATE TABLE plain_{name_of(day)} PARTITION OF plain FOR VALUES FROM ({start}) TO ({end})"
                f" WITH (fillfactor = {FILLFACTOR})"
            )

    async def round(self, consumers: Sequence[ConsumerProcess]) -> tuple[float, float]:
        """Rows a second of the consumers, and of COPY."""
        self._rounds += 1
        looks = [self._looks.next(f"{self._rounds:032x}") for _ in range(LOOKS)]
        if self._rounds % 2:
            copied = await self._copy(looks)
            return await self._land(looks, consumers), copied
        return await self._land(looks, consumers), await self._copy(looks)

    async def _land(self, looks: Sequence[Sequence[Batch]], consumers: Sequence[ConsumerProcess]) -> float:
        """Rows a second from Kafka to PostgreSQL."""
        task_id = looks[0][0].task_id
        for look in looks:  # one after the other, so that Kafka's times tell them apart
            payloads = ((i, payload) for i, batch in enumerate(look) for payload in wire.encode_batch(batch))
            records = [Outgoing(b"bench", payload.value, i % PARTITIONS) for i, payload in payloads]
            await self._producer.send(self._topic, records)
        with ExitStack() as running:
            for one in consumers:
                running.callback(one.stop)
            for one in consumers:
                one.prepare()
                one.launch()
            await asyncio.gather(*(asyncio.to_thread(one.wait_ready) for one in consumers))
            deadline_s = time.monotonic() + LAND_TIMEOUT_S
            while True:
                landed = await self._connection.fetchrow(_LANDED, task_id)
                if landed["points"] == self.points:
                    break
                if time.monotonic() > deadline_s:
                    raise RuntimeError(
                        f"{landed['points']:,} of {self.points:,} points landed in {LAND_TIMEOUT_S:g} s; {last_line(consumers[0].log)}"
                    )
                await asyncio.sleep(0.2)
            self.peaks_mb += [peak_mb(one.pid) for one in consumers if one.pid and PEAKS_KNOWN]
        return float(landed["rate"])

    async def _copy(self, looks: Sequence[Sequence[Batch]]) -> float:
        """Rows a second by plain COPY."""
        took_s = 0.0
        rows = [rows_of(look) for look in looks]
        for one in rows:
            started_s = time.perf_counter()
            await self._connection.copy_to_table(
                "plain", source=copy_stream(one), columns=COLUMNS, format="binary"
            )
            took_s += time.perf_counter() - started_s
        return sum(map(len, rows)) / took_s


def end_to_end(report: Report) -> None:
    """Measure one consumer, and two, against COPY."""
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as folder, ExitStack() as running:
        home = Path(folder)
        kafka, postgres, s3 = KafkaServer(home), PostgresServer(home), S3Server(home)
        for server in (kafka, postgres, s3):
            running.callback(server.stop)
            server.start()
        path = home / "headgate.yaml"
        # A consumer that is started again within its session keeps its partitions: no round begins with a rebalance.
        path.write_text(
            'accounts: [{id: "123456789012", regions: [us-east-1], services: [ec2]}]\n'
            f"kafka: {{bootstrap: '{kafka.bootstrap}', raw_partitions: {PARTITIONS}, session_timeout_s: 60}}\n"
            f"postgres: {{dsn: '{postgres.dsn()}'}}\ns3: {{endpoint_url: '{s3.endpoint_url}'}}\n"
        )
        command = [sys.executable, "-m", "workers.cli", "setup", "--config", str(path)]
        subprocess.run(
            command, env=local_environment(os.environ), check=True, capture_output=True, timeout=60
        )
        s3.stop()
        uvloop.run(
            _end_to_end(load(path, environ={}), [ConsumerProcess(home, path, n) for n in (1, 2)], report)
        )


async def _end_to_end(config: Config, consumers: Sequence[ConsumerProcess], report: Report) -> None:
    connection = await open_connection(config.postgres, "bench")
    producer = Producer(config.kafka.bootstrap, "bench")
    bench = Bench(config, connection, producer)
    try:
        await bench.prepare()
        for count, rounds in ((1, ROUNDS), (2, ROUNDS_OF_TWO)):
            # The first warms the servers up, and lets the second consumer join.
            _, *measured = [await bench.round(consumers[:count]) for _ in range(1 + rounds)]
            rates, copies = zip(*measured, strict=True)
            ratio = statistics.median(rate / copied for rate, copied in measured)
            if count == 1:
                report.add("plain COPY, by turns with a consumer", statistics.median(copies), "rows/s")
            report.add(
                "consumer end to end, Kafka to PostgreSQL" if count == 1 else "two consumers end to end",
                statistics.median(rates),
                "points/s",
                "plain COPY",
                ratio,
                RATIO_GOAL if count == 1 else None,
            )
        if bench.peaks_mb:
            report.add("consumer, memory in a backlog", max(bench.peaks_mb), "MB", goal=MEMORY_GOAL)
    finally:
        await producer.close()
        await connection.close(timeout=5)


def memory(report: Report) -> None:
    """Measure the peak of a coordinator, an exporter and a consumer in a local stack."""
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as folder:
        peaks_mb = asyncio.run(_stack_peaks_mb(Path(folder)))
    for name in ("coordinator", "exporter-1", "consumer-1"):
        report.add(f"{name.partition('-')[0]}, memory under load", peaks_mb[name], "MB", goal=MEMORY_GOAL)


async def _stack_peaks_mb(home: Path) -> Mapping[str, float]:
    """By process, when all has landed."""
    scene = made_up_scene(accounts=12, metrics=500, seed=1, once=True)
    stack = LocalStack(home)
    try:
        await stack.start(StackSpec(scene.config, 1, 1, scene.simulate_args))
        config = find_config(stack.config_path)
        connection = await open_connection(config.postgres, "bench")
        try:
            async with asyncio.timeout(STACK_TIMEOUT_S):
                expected, jobs = expected_windows(config), len(config.exposition)
                landed, _ = await until_landed(connection, expected, jobs, lambda windows, points: None)
        finally:
            connection.terminate()
        if not landed:
            raise RuntimeError(
                "not all windows of the local stack landed: what its workers take says nothing"
            )
        return {process.name: peak_mb(process.pid) for process in await stack.processes()}
    finally:
        await asyncio.shield(stack.stop())


PEAKS_KNOWN = sys.platform == "linux"


def peak_mb(pid: int) -> float:
    """The peak of a process's resident set, in millions of bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024 / 1e6


def run(report: Report) -> None:
    logging.getLogger("aiokafka").setLevel(
        logging.CRITICAL
    )  # it complains while a new broker makes its topics
    end_to_end(report)
    if PEAKS_KNOWN:
        memory(report)
