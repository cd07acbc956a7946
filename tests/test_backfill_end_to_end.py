"""A backfill on the whole real stack: recorded traces out of S3 alone, and an operator's correction."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

import asyncpg
import pytest

from shard_config.model import Config
from tests.replay_scene import delete_records
from tests.test_end_to_end import DIRTY, SHARED_TRACES, headgate, left_behind, points_of
from workers.local import LocalStack, find_config
from workers.run import expected_windows, until_landed
from workers.scenes import traces_scene
from workers.stack import StackSpec

CORRECTED = """SELECT namespace, ts, value, version FROM samples JOIN series ON id = series
WHERE version >> 56 = 7 ORDER BY series, ts"""


@dataclass(frozen=True)
class Running:
    home: Path
    traces: Path
    config: Config

    async def backfill(self, *options: str, days: int | None = None) -> subprocess.CompletedProcess[str]:
        """The whole range, or its first days."""
        assert self.config.run.horizon_s is not None
        from_s, to_s = self.config.run.horizon_s
        to_s = to_s if days is None else from_s + days * 86_400
        words = ("backfill", "--from", str(from_s), "--to", str(to_s), "--yes", "--json", *options)
        return await asyncio.to_thread(headgate, self.home, *words)

    async def fetch(self, statement: str) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(self.config.postgres.dsn)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(statement)
        finally:
            await connection.close()
        return rows

    async def points(self) -> dict[str, dict[str, float]]:
        """What the store has, as `points_of` has the files."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for r in await self.fetch("SELECT * FROM samples JOIN series ON series.id = samples.series"):
            dims = " ".join(f"{k}={v}" for k, v in json.loads(r["dimensions"]).items())
            name = f"{r['namespace']} {r['metric']} {r['stat']} {dims}"
            at = r["ts"].astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            found[name][at] = r["value"]
        return found


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """A stack that has collected a folder of traces: dirty ones, and the real ones where they are."""
    folder, home = tmp_path_factory.mktemp("traces"), tmp_path_factory.mktemp("stack")
    for name, lines in DIRTY.items():
        (folder / f"{name}.csv").write_text("\n".join(["timestamp,value", *lines]) + "\n")
    for real in sorted(SHARED_TRACES.glob("*.csv")):
        shutil.copy(real, folder)
    scene = traces_scene(folder)
    stack = LocalStack(home)
    await stack.start(StackSpec(scene.config, shards=1, consumers=1, simulate_args=scene.simulate_args))
    try:
        config = find_config(stack.config_path)
        connection = await asyncpg.connect(config.postgres.dsn)
        try:
            landed, _ = await until_landed(connection, expected_windows(config), 0, lambda *_: None)
        finally:
            await connection.close()
        assert landed
        yield Running(home, folder, config)
    finally:
        await stack.stop()
    assert left_behind(home) == []


async def test_the_whole_range_of_the_traces_lands_out_of_s3_alone_as_the_files_say(running: Running) -> None:
    await delete_records(running.config.kafka.bootstrap, running.config.kafka.topic("raw"), 8)
    await running.fetch("TRUNCATE samples, series, landed")
    assert await running.points() == {}

    done = await running.backfill("--via", "s3")

    assert done.returncode == 0, done.stderr
    assert await running.points() == points_of(running.traces)


@pytest.mark.skipif(not SHARED_TRACES.exists(), reason="the recorded traces are not beside this checkout")
async def test_the_real_traces_are_among_them(running: Running) -> None:
    real = points_of(SHARED_TRACES)
    assert len(real) > 10
    found = await running.points()
    assert {name: found[name] for name in real} == real


async def test_an_operators_second_look_wins_is_paid_once_and_comes_back_from_the_archive(
    running: Running,
) -> None:
    before = await running.points()
    await running.fetch("UPDATE samples SET value = value + 1 WHERE ts < '2014-02-16'")
    wrong = await running.points()
    asked = ("--via", "cloudwatch", "--revision", "7", "--service", "traces-rds")

    first = await running.backfill(*asked, days=3)
    again = await running.backfill(*asked, days=3)

    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    paid, repeated = json.loads(first.stdout), json.loads(again.stdout)
    assert paid["done"]["metrics_billed"] > 0
    assert (repeated["done"], "not asked again" in repeated["notes"][0]) == (None, True)
    after = await running.points()
    assert {n for n in after if after[n] != before[n]} == {
        n for n in after if wrong[n] != before[n] and "AWS/RDS" not in n
    }
    corrected = await running.fetch(CORRECTED)
    assert {r["namespace"] for r in corrected} == {"AWS/RDS"}

    await running.fetch("TRUNCATE samples, series")
    rebuilt = await running.backfill()  # nothing is said of how: the store is empty, and that shows

    assert rebuilt.returncode == 0, rebuilt.stderr
    assert json.loads(rebuilt.stdout)["rebuild"]
    assert await running.points() == before
    assert await running.fetch(CORRECTED) == corrected
