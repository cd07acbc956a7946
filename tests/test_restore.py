"""Restored from nothing: what the runbooks say is typed, on a real stack whose Kafka, PostgreSQL or both are gone."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from ingest.archive import open_archive
from ingest.clock import SystemClock
from shard_config.model import Config
from tests.conftest import eventually
from tests.test_documents import ROOT, commands
from tests.test_end_to_end import headgate, left_behind
from workers.cli import main
from workers.local import LocalStack, find_config
from workers.run import expected_windows, until_landed
from workers.scenes import traces_scene
from workers.servers import KafkaServer, get_local
from workers.stack import StackSpec

TRACES = {
    "ec2_cpu_utilization_0a": [
        "2014-02-14 14:27:00,51.846000000000004",
        "2014-02-14 14:32:00,44.508",
        "2014-02-14 15:13:00,0.1",
    ],
    "ec2_disk_write_bytes_0b": [
        "2014-02-14 14:30:00,7.0",
        "2014-02-14 14:30:00,9.5",
        "2014-02-14 14:30:00,-1.0",
    ],
    "elb_request_count_web": ["2014-02-14 15:04:00,94.0"],
    "rds_cpu_utilization_0c": ["2014-02-14 14:30:00,6.456", "2014-02-14 14:35:00,0.0"],
}
"""Of less than an hour: sealing reads a quarter of an hour at a time, and rests between."""
SAMPLES = "SELECT ts, series, value, version FROM samples ORDER BY ts, series"
SERIES = (
    "SELECT id, account, region, namespace, metric, dimensions, stat, period_s, unit FROM series ORDER BY id"
)
WINDOWS = """SELECT target, service, window_start, points, digest, sealed_at IS NOT NULL AS sealed, declared
FROM windows ORDER BY 1, 2, 3"""
CHARGES = """SELECT day, target, service, sum(looks) AS looks, sum(metrics_billed) AS metrics_billed, sum(metrics_in_doubt) AS in_doubt,
    sum(list_metrics) AS list_metrics, sum(puts) AS puts FROM charges GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"""
PAUSES = "SELECT * FROM pauses ORDER BY account, service"
REASONS = "SELECT reason, sum(metrics_billed) AS metrics FROM charges GROUP BY reason ORDER BY reason"
INVENTORY = "SELECT account, region, service, id, since, attributes FROM inventory ORDER BY 1, 2, 3, 4, 5"
SEALED = """SELECT (SELECT count(*) FROM windows WHERE sealed_at IS NOT NULL) AS sealed,
    (SELECT count(*) FROM windows WHERE sealed_at IS NULL) + (SELECT count(*) FROM looks WHERE landed_at IS NULL) AS open"""
STATE = (SAMPLES, SERIES, WINDOWS, CHARGES, PAUSES, INVENTORY)
WORKERS = {"headgate-coordinator": "coordinator", "headgate-consumer-postgres": "consumer-1"}


@dataclass(frozen=True)
class Typed:
    """What came of a command line."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Running:
    stack: LocalStack
    config: Config

    async def type(self, *words: str) -> Typed:
        """A command line of Headgate's. What makes itself nice to others is a process of its own; the others are quicker without."""
        if words == ("restore",):
            done = await asyncio.to_thread(headgate, self.stack.home, *words)
            return Typed(done.returncode, done.stdout, done.stderr)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = await asyncio.to_thread(main, [*words, "--config", str(self.stack.config_path)])
        return Typed(code, out.getvalue(), "")

    async def fetch(self, statement: str) -> list[dict[str, Any]]:
        connection = await asyncpg.connect(self.config.postgres.dsn)
        try:
            return [dict(row) for row in await connection.fetch(statement)]
        finally:
            await connection.close()

    async def state(self) -> dict[str, list[dict[str, Any]]]:
        return {statement: await self.fetch(statement) for statement in STATE}

    async def sealed(self) -> bool:
        # In one statement: a look that lands between two would open its windows again.
        [row] = await self.fetch(SEALED)
        return bool(row["sealed"] == expected_windows(self.config) and not row["open"])

    @property
    def span(self) -> list[str]:
        """All that is collected, as options."""
        assert self.config.run.horizon_s is not None
        from_s, to_s = self.config.run.horizon_s
        return ["--from", str(from_s), "--to", str(to_s)]

    async def archived(self) -> int:
        """How many tasks the archive has."""
        async with open_archive(self.config.s3, SystemClock()) as archive:
            [target] = await archive.targets()
            assert self.config.run.horizon_s is not None
            from_s, to_s = self.config.run.horizon_s
            return len([key async for key in archive.keys(target, from_s, to_s + 86_400)])

    async def paid(self) -> int:
        """Metrics that the simulated AWS has billed."""
        body = await asyncio.to_thread(get_local, f"{self.stack.endpoints.aws_url}/billing", 5)
        return sum(int(a["metrics_requested"]) for a in json.loads(body)["accounts"].values())

    # --- disasters --------------------------------------------------------------------------------------------

    def stop(self, *names: str) -> None:
        self._supervisor.stop(names)

    def start(self, *names: str) -> None:
        for name in names:
            self._supervisor._call("startProcessGroup", name, False)

    @property
    def _supervisor(self) -> Any:
        return self.stack._connect(self.stack._running())

    async def lose_postgres(self) -> None:
        """The database, whoever is connected; another, empty one is in its place."""
        server = self.config.postgres.dsn.rpartition("/")[0] + "/postgres"
        connection = await asyncpg.connect(server)
        await connection.execute("DROP DATABASE headgate WITH (FORCE)")
        await connection.execute("CREATE DATABASE headgate")
        await connection.close()

    async def lose_kafka(self) -> None:
        """The broker and all of its data; another, empty one is in its place, at its address."""
        self.stop("kafka")
        folder = self.stack.run / "kafka"
        shutil.rmtree(folder / "data")
        server = KafkaServer.__new__(KafkaServer)
        server.dir, server.log = folder, folder / "log"
        server.port = int(self.config.kafka.bootstrap.rpartition(":")[2])
        properties = (folder / "server.properties").read_text()
        found = re.search(r"CONTROLLER://127\.0\.0\.1:(\d+)", properties)
        assert found is not None
        server._controller_port = int(found[1])
        server.prepare()
        self.start("kafka")

        async def kafka_answers() -> bool:
            return await asyncio.to_thread(server.ready)

        await eventually(kafka_answers, 30)

    # --- runbooks ---------------------------------------------------------------------------------------------

    async def follow(self, runbook: str) -> str:
        """Type all that its section "Do" says, up to the audit; returns what `headgate restore` printed."""
        text = (ROOT / "docs" / "runbooks" / f"{runbook}.md").read_text()
        said = ""
        for words in commands(text.partition("## Do")[2]):
            if words[0] == "kubectl":
                await asyncio.to_thread(self._kubectl, words)
                continue
            if words[:2] == ["headgate", "audit"]:
                await eventually(self.sealed, 60)
                found = re.search(r"headgate (audit --from \S+ --to \S+)", said)
                assert found is not None
                words = ["headgate", *found[1].split()]
            done = await self.type(*words[1:])
            assert done.code == 0, (words, done)
            if words[1] == "restore":
                said = done.out
        return said

    def _kubectl(self, words: list[str]) -> None:
        names = [WORKERS[w.partition("/")[2]] for w in words if w.startswith("deploy/")]
        names = names or ["coordinator", "consumer-1", "exporter-1"]
        assert words[1] == "scale"
        if words[-1] == "--replicas=0":
            self.stop(*names)
        else:
            self.start(*names)


CORRECTION = ("--yes", "--via", "cloudwatch", "--revision", "7")


@contextlib.contextmanager
def headgate_process(running: Running, *words: str) -> Iterator[None]:
    """A command that is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.cli", *words, "--config", str(running.stack.config_path)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """A stack that has collected and sealed a folder of traces, with a pause, rechecks and an inventory, and a snapshot of all that."""
    folder, home = tmp_path_factory.mktemp("traces"), tmp_path_factory.mktemp("stack")
    for name, lines in TRACES.items():
        (folder / f"{name}.csv").write_text("\n".join(["timestamp,value", *lines]) + "\n")
    scene = traces_scene(folder)
    stack = LocalStack(home)
    await stack.start(StackSpec(scene.config, shards=1, consumers=1, simulate_args=scene.simulate_args))
    try:
        found = Running(stack, find_config(stack.config_path))
        connection = await asyncpg.connect(found.config.postgres.dsn)
        try:
            landed, _ = await until_landed(connection, expected_windows(found.config), 0, lambda *_: None)
        finally:
            await connection.close()
        assert landed
        await eventually(found.sealed, 60)
        yield found
    finally:
        await stack.stop()
    assert left_behind(home) == []


async def test_a_new_postgresql_is_what_the_old_one_was(running: Running) -> None:
    account = running.config.accounts[0].id
    for words in (
        ["pause", "--account", account, "--service", "traces-elb", "--reason", "x"],
        ["audit", *running.span, "--recheck", "20%", "--seed", "1"],
        ["snapshot"],
    ):
        assert (await running.type(*words)).code == 0, words
    before, reasons = await running.state(), await running.fetch(REASONS)
    assert {"recheck", "backlog"} <= {r["reason"] for r in reasons}
    assert before[PAUSES]
    assert before[SAMPLES]

    await running.lose_postgres()
    said = await running.follow("RestorePostgreSQL")

    assert "loaded the snapshot of" in said
    assert await running.state() == before
    assert await running.fetch(REASONS) == reasons


async def test_what_only_kafka_held_comes_back_from_the_archive(running: Running) -> None:
    # A correction that is collected while nobody lands it is in Kafka and in the archive, and nowhere else.
    before = await running.state()
    archived = await running.archived()
    running.stop("consumer-1")
    with headgate_process(running, "backfill", *running.span, *CORRECTION):

        async def all_is_archived() -> bool:
            earlier = await running.archived()
            await asyncio.sleep(1)
            return archived < earlier == await running.archived()

        await eventually(all_is_archived, 40)
    assert (await running.state())[SAMPLES] == before[SAMPLES]

    await running.lose_kafka()
    assert (await running.type("positions")).code == 1
    await running.follow("RestoreKafka")

    after = await running.state()
    assert {r["version"] >> 56 for r in after[SAMPLES]} == {0, 7}
    values = [[(r["ts"], r["series"], r["value"]) for r in state[SAMPLES]] for state in (before, after)]
    assert values[0] == values[1]
    assert await running.paid() == sum(r["metrics"] for r in await running.fetch(REASONS))
    assert (await running.type("restore", "--dry-run")).out == "nothing is missing\n"


async def test_only_the_archive_is_left_and_everything_is_there_again(running: Running) -> None:
    """Loaded from a snapshot that is older than the correction: that is in receipts alone."""
    before = await running.state()

    await running.lose_postgres()
    await running.lose_kafka()
    missing = await running.type("restore", "--dry-run")
    said = await running.follow("RestoreFromArchive")

    assert (missing.code, "load the snapshot of" in missing.out) == (1, True)
    assert re.search(r"[1-9]\d* receipts of the archive announced again", said)
    assert await running.state() == before
    assert await running.paid() == sum(r["metrics"] for r in await running.fetch(REASONS))
