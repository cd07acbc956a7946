"""Replays, from Kafka and from S3, as `headgate backfill` does them: a process each, as fast as it goes (`--rate 0`).

A round: two million points, one look at 20,000 series after the other, in 8 partitions of Kafka or in an archived task a look. Into
PostgreSQL it goes by turns with plain COPY of the same rows, as in `pipeline`, and a replay's rate is that of its landings after the first, by their
times in the store. Into the null sink nothing is kept: then the rate is of reading, decoding and validating, by the process's own time
from its first question on; four times the points, so that two processes are at work together for most of it. Out of S3 it is measured with objects
of an ordinary target's 5 batches and of a heavy one's 40, and beside each rate stands who spent how much CPU, which a busy machine blurs less.

Kafka, PostgreSQL (with its durability on), the S3 (versitygw over a folder where `make test` has built it, else moto: Python, a connection for each
request) and what is measured share the machine's cores.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg
import uvloop

from ingest import wire
from ingest.archive import archive_key, open_archive
from ingest.clock import SystemClock
from ingest.log import Outgoing, Producer
from ingest.model import Batch, LookStatus, Outcome, Receipt, ReceiptItem, TaskItem
from ingest.ports import ArchivedTask, Payload
from ingest.sinks.connection import open_connection
from ingest.sinks.copy import COLUMNS, SECONDS_A_DAY, copy_stream, rows_of
from ingest.sinks.partitions import FILLFACTOR, name_of
from shard_config.load import load
from shard_config.model import Config
from tests.bench.codec import POINTS, SERIES
from tests.bench.pipeline import BATCHES_A_LOOK, DAYS, LOOKS, PARTITIONS, Looks
from tests.bench.run import Report
from tests.replay_scene import delete_records
from workers.servers import (
    LOCAL_AWS_ENVIRONMENT,
    KafkaServer,
    PostgresServer,
    S3Server,
    Server,
    local_environment,
)

ROUNDS = 4
"""The first warms up."""
GRID_S = 300
POINTS_A_ROUND = LOOKS * BATCHES_A_LOOK * SERIES * POINTS
TIMEOUT_S = 120.0

_RATE = """SELECT sum(points)::bigint AS points,
    (sum(points) FILTER (WHERE landed_at > first) / extract(epoch FROM max(landed_at) - min(first)))::float8 AS rate
FROM landed, (SELECT min(landed_at) AS first FROM landed WHERE task_id = $1) AS f WHERE task_id = $1"""


@dataclass(frozen=True, slots=True)
class Reading:
    """One replay into nothing: points a second, and nanoseconds of CPU a point, of the processes that replay and of the server."""

    rate: float
    own_ns: float
    server_ns: float


class VersityServer(S3Server):
    """An S3 over a folder, written in Go: it keeps connections, and spends a third of the CPU of moto."""

    binary = Path(__file__).resolve().parents[2] / ".headgate" / "bin" / "versitygw"

    def prepare(self) -> None:
        for name in ("data", "meta"):
            (self.dir / name).mkdir(parents=True, exist_ok=True)

    def command(self) -> Sequence[str]:
        keys = [LOCAL_AWS_ENVIRONMENT[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")]
        options = ["--port", f"127.0.0.1:{self.port}", "--access", keys[0], "--secret", keys[1]]
        return [
            str(self.binary),
            *options,
            "posix",
            "--sidecar",
            str(self.dir / "meta"),
            str(self.dir / "data"),
        ]


class Bench:
    """Kafka, S3 and PostgreSQL, and the looks that go through them."""

    def __init__(
        self, config: Config, path: Path, connection: asyncpg.Connection, servers: Mapping[str, Server]
    ) -> None:
        """`servers` by the means that reads from them."""
        self._servers = servers
        self._config = config
        self._path = path
        self._connection = connection
        self._looks = Looks()
        self._rounds = 0

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

    def next(self, rounds: int = 1) -> list[list[Batch]]:
        """Looks that nobody has seen, for so many rounds."""
        self._rounds += 1
        return [self._looks.next(f"{self._rounds:032x}") for _ in range(LOOKS * rounds)]

    async def into_kafka(self, looks: Sequence[Sequence[Batch]]) -> None:
        """All that Kafka has, afterwards."""
        kafka = self._config.kafka
        await delete_records(kafka.bootstrap, kafka.topic("raw"), PARTITIONS)
        producer = Producer(kafka.bootstrap, "bench")
        records = [
            Outgoing(wire.raw_key(batch.target), payload.value, i % PARTITIONS)
            for look in looks
            for i, batch in enumerate(look)
            for payload in wire.encode_batch(batch)
        ]
        try:
            await producer.send(kafka.topic("raw"), records)
        finally:
            await producer.close()

    async def into_s3(self, looks: Sequence[Sequence[Batch]], targets: int = 1) -> None:
        """A task a look and target: an account's part of its batches each."""
        async with open_archive(self._config.s3, SystemClock()) as archive:
            for number, look in enumerate(looks):
                for i in range(targets):
                    await archive.put(_task(look[i::targets], f"{self._rounds:08x}{number:012x}{i:012x}", i))

    async def replay(self, via: str, looks: Sequence[Sequence[Batch]]) -> float:
        """Points a second into PostgreSQL."""
        [said] = await self._processes(via, "postgres", looks, 1)
        found = await self._connection.fetchrow(_RATE, looks[0][0].task_id)
        if found["points"] != POINTS_A_ROUND:
            raise RuntimeError(f"{found['points']:,} of {POINTS_A_ROUND:,} points landed: {said}")
        return float(found["rate"])

    async def read(self, via: str, looks: Sequence[Sequence[Batch]], processes: int = 1) -> Reading:
        """Replay into nothing."""
        before_s = _cpu_s(self._servers[via])
        said = await self._processes(via, "null", looks, processes)
        points = sum(one["done"]["points"] for one in said)
        if points != sum(batch.points for look in looks for batch in look):
            raise RuntimeError(f"{points:,} points came: {said}")
        served_s = _cpu_s(self._servers[via]) - before_s
        return Reading(
            points / max(one["done"]["seconds"] for one in said),
            1e9 * sum(one["done"]["cpu_seconds"] for one in said) / points,
            1e9 * served_s / points,
        )

    async def _processes(
        self, via: str, into: str, looks: Sequence[Sequence[Batch]], processes: int
    ) -> list[dict[str, dict[str, float]]]:
        from_s = int(looks[0][0].timestamps_s.min()) // GRID_S * GRID_S
        to_s = int(looks[-1][0].timestamps_s.max()) // GRID_S * GRID_S + GRID_S
        command = [
            *(
                sys.executable,
                "-m",
                "workers.cli",
                "backfill",
                "--config",
                str(self._path),
                "--yes",
                "--json",
            ),
            *("--from", str(from_s), "--to", str(to_s), "--via", via, "--into", into, "--rate", "0"),
        ]
        return await asyncio.gather(
            *(
                asyncio.to_thread(_said, [*command, "--part", f"{i}/{processes}"])
                for i in range(1, processes + 1)
            )
        )

    async def copy(self, looks: Sequence[Sequence[Batch]]) -> float:
        """Rows a second by plain COPY."""
        took_s = 0.0
        rows = [rows_of(look) for look in looks]
        for one in rows:
            started_s = asyncio.get_running_loop().time()
            await self._connection.copy_to_table(
                "plain", source=copy_stream(one), columns=COLUMNS, format="binary"
            )
            took_s += asyncio.get_running_loop().time() - started_s
        return sum(map(len, rows)) / took_s


def _cpu_s(server: Server) -> float:
    """What a server's process has spent."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _said(command: Sequence[str]) -> dict[str, dict[str, float]]:
    done = subprocess.run(
        command,
        env=local_environment(os.environ),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    said: dict[str, dict[str, float]] = json.loads(done.stdout)
    return said


def _task(look: Sequence[Batch], task_id: str, account: int) -> ArchivedTask:
    """One look, archived."""
    first = look[0]
    target = replace(first.target, account=f"{account + 1:012}")
    start_s = int(first.timestamps_s.min()) // GRID_S * GRID_S
    item = TaskItem(first.service, start_s, start_s + GRID_S, GRID_S)
    payloads = [p for b in look for p in wire.encode_batch(replace(b, target=target))]
    outcome = Outcome(LookStatus.COMPLETE, "", first.observed_at_ms, len(look) * SERIES, {}, 0)
    done = ReceiptItem(item, outcome, sum(b.points for b in look), (), tuple(p.batch_id for p in payloads))
    at_ms = first.observed_at_ms
    receipt = Receipt(task_id, target, "bench", item.end_s, at_ms, at_ms, "", (done,))
    return ArchivedTask(
        replace(receipt, archive_key=archive_key(receipt)),
        tuple(Payload(p.batch_id, p.value) for p in payloads),
    )


async def _measure(config: Config, path: Path, servers: Mapping[str, Server], report: Report) -> None:
    connection = await open_connection(config.postgres, "bench")
    bench = Bench(config, path, connection, servers)
    try:
        await bench.prepare()
        await _into_postgres(bench, report)
        await _into_nothing(bench, report)
    finally:
        await connection.close(timeout=5)


async def _into_postgres(bench: Bench, report: Report) -> None:
    copied: list[float] = []
    kafka: list[float] = []
    s3: list[float] = []
    for number in range(ROUNDS):
        of_kafka, of_s3 = bench.next(), bench.next()
        await bench.into_kafka(of_kafka)
        await bench.into_s3(of_s3)
        turns = [(kafka, "kafka", of_kafka), (s3, "s3", of_s3)]
        for rates, via, looks in turns if number % 2 else reversed(turns):
            rates.append(await bench.replay(via, looks))
        copied.append(await bench.copy(of_kafka))
    against = [statistics.median(k / c for k, c in zip(kafka[1:], copied[1:], strict=True))]
    against += [statistics.median(s / c for s, c in zip(s3[1:], copied[1:], strict=True))]
    of_kafkas = statistics.median(s / k for s, k in zip(s3[1:], kafka[1:], strict=True))
    copy, postgres = "plain COPY", "into PostgreSQL"
    report.add("plain COPY, by turns with replays", statistics.median(copied[1:]), "rows/s")
    report.add(
        f"replay from Kafka {postgres}", statistics.median(kafka[1:]), "points/s", copy, against[0], ">= 0.6"
    )
    report.add(f"replay from S3 {postgres}", statistics.median(s3[1:]), "points/s", copy, against[1])
    report.add(f"replay from S3 {postgres}, to Kafka's", of_kafkas, "ratio", goal=">= 0.8")


async def _into_nothing(bench: Bench, report: Report) -> None:
    one: list[Reading] = []
    two: list[Reading] = []
    kafka: list[Reading] = []
    large: list[Reading] = []
    small: list[Reading] = []
    small_two: list[Reading] = []
    looks = bench.next(4)
    await bench.into_kafka(looks)
    await bench.into_s3(looks)
    for _ in range(ROUNDS):
        kafka.append(await bench.read("kafka", looks))
        large.append(await bench.read("s3", looks))
    # Others, later ones: a replay reads a day past its end, too.
    looks = bench.next(4)
    await bench.into_kafka(looks)
    await bench.into_s3(looks, targets=8)
    for _ in range(ROUNDS):
        one.append(await bench.read("kafka", looks))
        two.append(await bench.read("kafka", looks, 2))
        small.append(await bench.read("s3", looks))
        small_two.append(await bench.read("s3", looks, 2))
    _report(report, "replay from Kafka into nothing", one)
    _report(report, "two processes of it", two, one, "one", ">= 1.4")
    _report(report, "replay from S3 into nothing, 40 batches an object", large, kafka, "Kafka's", ">= 0.8")
    _report(report, "replay from S3 into nothing, 5 batches an object", small, one, "Kafka's")
    _report(report, "two processes of it", small_two, small, "one")


def _report(
    report: Report,
    name: str,
    found: Sequence[Reading],
    against: Sequence[Reading] = (),
    called: str | None = None,
    goal: str | None = None,
) -> None:
    pairs = list(zip(found[1:], against[1:], strict=False))
    ratio = _median(a.rate / b.rate for a, b in pairs) if pairs else None
    report.add(name, _median(r.rate for r in found[1:]), "points/s", called, ratio, goal)
    ratio = _median(a.own_ns / b.own_ns for a, b in pairs) if pairs else None
    report.add("— CPU of it", _median(r.own_ns for r in found[1:]), "ns/point", called, ratio)
    report.add("— CPU of the server", _median(r.server_ns for r in found[1:]), "ns/point")


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def run(report: Report) -> None:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="headgate-bench-") as folder, ExitStack() as running:
        home = Path(folder)
        kafka, postgres = KafkaServer(home), PostgresServer(home)
        s3 = VersityServer(home) if VersityServer.binary.exists() else S3Server(home)
        for server in (kafka, postgres, s3):
            running.callback(server.stop)
            server.start()
        path = home / "headgate.yaml"
        path.write_text(
            'accounts: [{id: "123456789012", regions: [us-east-1], services: [ec2]}]\n'
            f"kafka: {{bootstrap: '{kafka.bootstrap}', raw_partitions: {PARTITIONS}}}\n"
            f"postgres: {{dsn: '{postgres.dsn()}'}}\ns3: {{endpoint_url: '{s3.endpoint_url}'}}\n"
        )
        environment = local_environment(os.environ)
        command = [sys.executable, "-m", "workers.cli", "setup", "--config", str(path)]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
        os.environ.update(environment)
        uvloop.run(_measure(load(path, environ={}), path, {"kafka": kafka, "s3": s3}, report))
