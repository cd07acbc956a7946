"""A permission that is missing for a while, on the whole real stack: gaps appear, and heal without a hand when it is granted."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
import yaml

from shard_config.model import Config
from tests.conftest import eventually
from tests.test_end_to_end import headgate, left_behind
from workers.local import LocalStack, find_config
from workers.scenes import made_up_scene
from workers.stack import Endpoints, StackSpec
from workers.world import SETTLED, Question

SCENE = made_up_scene(accounts=2, metrics=40, seed=11, once=False)
DENIED, GRANTED = SCENE.truth.accounts
HEAL = {"attempts_max": 8, "backoff_s": 2, "usd_per_day": 1.0}


@dataclass(frozen=True)
class Running:
    stack: LocalStack
    config: Config
    sql: asyncpg.Connection
    started_at: datetime


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(url, data, timeout=10) as response:  # noqa: S310  # loopback
        return str(response.read().decode())


def config_text(endpoints: Endpoints) -> str:
    """The scene's, with the account's permission missing before the first worker starts."""
    ask(f"{endpoints.aws_url}/faults", {"forbidden_accounts": [DENIED]})
    config = yaml.safe_load(SCENE.config(endpoints))
    del config["exposition"]  # it has no past, and nothing to heal
    return yaml.safe_dump(config | {"heal": HEAL})


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    home = tmp_path_factory.mktemp("healing")
    stack = LocalStack(home)
    started_at = datetime.now(UTC)
    await stack.start(StackSpec(config_text, shards=2, consumers=1, simulate_args=SCENE.simulate_args))
    try:
        config = find_config(stack.config_path)
        sql = await asyncpg.connect(config.postgres.dsn)
        try:
            yield Running(stack, config, sql, started_at)
        finally:
            await sql.close()
    finally:
        await stack.stop()
    assert left_behind(home) == []


def gaps(running: Running) -> list[dict[str, Any]]:
    done = headgate(running.stack.home, "gaps", "--format", "json")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert done.returncode == int(bool(found)), done.stderr
    return found


def coordinators(running: Running, line: str) -> float:
    """The value of a line of the coordinator's /metrics."""
    port = running.stack.metrics_ports["coordinator"]
    for found in ask(f"http://127.0.0.1:{port}/metrics").splitlines():
        if found.startswith(line + " "):
            return float(found.rpartition(" ")[2])
    return 0.0


async def test_a_gap_appears_is_asked_again_with_rests_and_is_sealed_when_the_source_answers(
    running: Running,
) -> None:
    async def asked_again_in_vain() -> bool:
        most = await running.sql.fetchval("SELECT max(attempt) FROM attempts")
        return (most or 0) >= 2

    await eventually(asked_again_in_vain, timeout_s=30)
    open_ones = []

    async def only_what_is_denied_is_open() -> bool:
        # The hour before the start is past its deadline from the beginning, until it has landed and is sealed.
        nonlocal open_ones
        open_ones = await asyncio.to_thread(gaps, running)
        return {g["target"].split("/")[1] for g in open_ones} == {DENIED}

    await eventually(only_what_is_denied_is_open, timeout_s=60)
    assert {g["reason"] for g in open_ones} == {"forbidden"}
    assert all("AccessDenied" in g["detail"] for g in open_ones)

    ask(f"{running.stack.endpoints.aws_url}/faults", {})

    async def healed() -> bool:
        return not await running.sql.fetchval(
            "SELECT count(*) FROM windows WHERE sealed_at IS NULL AND declared IS NULL"
            " AND settles_at + interval '420 s' < $1",
            running.started_at,
        )

    await eventually(healed, timeout_s=60)

    async def without_gaps() -> bool:
        # A window that was denied too may pass its deadline meanwhile; then it is healed as well.
        return not await asyncio.to_thread(gaps, running)

    await eventually(without_gaps, timeout_s=60)
    # Every window is sealed; none was given up.
    assert await running.sql.fetchval("SELECT count(*) FROM windows WHERE declared IS NOT NULL") == 0
    # Only what was denied was asked again, by the block and not by the window, and within the money.
    targets = {r["target"] for r in await running.sql.fetch("SELECT DISTINCT target FROM attempts")}
    assert {t.split("/")[1] for t in targets} == {DENIED}
    assert coordinators(running, 'headgate_heals_total{means="source"}') >= 2 * len(targets)
    assert 0 < coordinators(running, "headgate_heal_dollars_reserved") <= HEAL["usd_per_day"]

    # What AWS billed is in the ledger, to the metric.
    bill = json.loads(ask(f"{running.stack.endpoints.aws_url}/billing"))["accounts"]
    billed = await running.sql.fetchval("SELECT sum(metrics_billed)::bigint FROM looks")
    assert billed == sum(account["metrics_requested"] for account in bill.values())


async def test_backfills_of_old_windows_land_the_finest_period_that_cloudwatch_still_keeps(
    running: Running,
) -> None:
    stretches = {300: four_hours(days_ago=20), 3600: four_hours(days_ago=70)}
    where = ("--account", GRANTED, "--region", SCENE.truth.regions[0])

    done = await both(running, "backfill", stretches.values(), *where, "--yes", "--json")

    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    for period_s, stretch in stretches.items():
        await landed_as_the_source_says(running, period_s, *stretch)

    async def sealed() -> bool:
        return not await running.sql.fetchval(
            "SELECT count(*) FROM windows WHERE window_start < to_timestamp($1) AND sealed_at IS NULL",
            max(to_s for _, to_s in stretches.values()),
        )

    await eventually(sealed, timeout_s=30)
    audits = await both(running, "audit", stretches.values())
    assert [one.returncode for one in audits] == [0, 0], [one.stdout for one in audits]


def four_hours(days_ago: int) -> tuple[int, int]:
    from_s = (int(time.time()) - days_ago * 86_400) // 3600 * 3600
    return from_s, from_s + 4 * 3600


async def both(
    running: Running, command: str, stretches: Iterable[tuple[int, int]], *options: str
) -> list[subprocess.CompletedProcess[str]]:
    """A command over each of two stretches, at the same time."""
    return await asyncio.gather(
        *(
            asyncio.to_thread(
                headgate, running.stack.home, command, "--from", str(from_s), "--to", str(to_s), *options
            )
            for from_s, to_s in stretches
        )
    )


async def landed_as_the_source_says(running: Running, period_s: int, from_s: int, to_s: int) -> None:
    rows = await running.sql.fetch(
        "SELECT s.*, extract(epoch FROM ts)::bigint AS ts_s, value FROM samples JOIN series s ON s.id = series"
        " WHERE ts >= to_timestamp($1) AND ts < to_timestamp($2)", from_s, to_s,
    )  # fmt: skip
    assert {r["period_s"] for r in rows} == {period_s}
    found: dict[Question, dict[int, float]] = defaultdict(dict)
    for r in rows:
        dimensions = tuple(sorted(json.loads(r["dimensions"]).items()))
        asked = Question(r["namespace"], r["metric"], dimensions, r["stat"], r["period_s"])
        found[asked][r["ts_s"]] = r["value"]
    region = SCENE.truth.regions[0]
    truth = SCENE.truth.answers(GRANTED, region, list(found), from_s, to_s, SETTLED)
    assert found == {q: dict(zip(*answer, strict=True)) for q, answer in zip(found, truth, strict=True)}
    assert len(found) > 10
