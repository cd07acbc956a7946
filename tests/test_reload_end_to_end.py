"""Coordinator, exporter and consumer on real servers and a simulated organization, while their one file is edited under them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest
import yaml

from ingest.sources import organization as organization_module
from shard_config.load import load
from shard_config.model import Config, ServiceProfile
from tests.conftest import eventually
from workers import consumer, coordinator, exporter, reload, simulator
from workers.lifecycle import Lifecycle
from workers.setup import setup
from workers.simulator import Simulator
from workers.world import World, account_ids

MANAGER, FIRST, SECOND = account_ids(3)
REGION = "eu-west-1"
FAST = {"namespace": "Fast", "period_s": 1, "poll_interval_s": 2, "settling_s": 2}


@dataclass
class Stage:
    """The workers, their file, and the store."""

    path: Path
    base: dict[str, object]
    sim: Simulator
    sql: asyncpg.Connection
    lifecycles: list[Lifecycle] = field(default_factory=list)

    def write(self, *accounts: str, **more: object) -> None:
        self.path.write_text(
            yaml.safe_dump({**self.base, "accounts": [{"id": account} for account in accounts], **more})
        )

    def hang_up(self) -> None:
        for lifecycle in self.lifecycles:
            lifecycle.hangup.set()

    def lands(self, *accounts: str) -> Awaitable[None]:
        """Until a complete look at each of these, and at nobody else's, has landed."""

        async def landed() -> bool:
            rows = await self.sql.fetch(
                "SELECT DISTINCT target FROM looks WHERE status = 'complete' AND landed_at IS NOT NULL"
            )
            return {row["target"].split("/")[1] for row in rows} == set(accounts)

        return eventually(landed, timeout_s=30)

    async def planned(self, account: str) -> int:
        found = await self.sql.fetchval(
            "SELECT count(*) FROM tasks WHERE split_part(target, '/', 2) = $1", account
        )
        return int(found)

    async def goes_on(self, account: str) -> None:
        """Until another poll of it is planned."""
        before = await self.planned(account)

        async def more() -> bool:
            return await self.planned(account) > before

        await eventually(more, timeout_s=30)


Serve = Callable[[Config, Lifecycle, Path], Awaitable[None]]


@pytest.fixture
async def stage(
    tmp_path: Path,
    kafka_bootstrap: str,
    topic_prefix: str,
    database: str,
    s3_endpoint: str,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Stage]:
    monkeypatch.setattr(organization_module, "CALLS_PER_S", 1000.0)
    monkeypatch.setattr(reload, "AT_ONCE_S", 0.2)
    monkeypatch.setattr(reload, "LOOK_S", 60.0)  # signals, and tasks, are what wakes them
    world = World(
        7, [MANAGER, FIRST, SECOND], [REGION], 4, [ServiceProfile.model_validate({"service": "fast", **FAST})]
    )
    sim = await simulator.start(world)
    base = {
        "defaults": {"regions": [REGION], "services": ["fast"]},
        "services": {"fast": FAST},
        "startup_lookback_s": 0,
        "slots": 2,
        "aws": {"endpoint_url": sim.url, "role_template": "arn:aws:iam::{account}:role/Headgate"},
        "kafka": {
            "bootstrap": kafka_bootstrap,
            "prefix": topic_prefix,
            "raw_partitions": 1,
            "ledger_partitions": 1,
            "session_timeout_s": 6,
        },
        "postgres": {"dsn": database},
        "s3": {"bucket": bucket, "endpoint_url": s3_endpoint},
    }
    sql = await asyncpg.connect(database)
    try:
        yield Stage(tmp_path / "headgate.yaml", base, sim, sql)
    finally:
        await sql.close()
        await sim.close()


@asynccontextmanager
async def running(stage: Stage) -> AsyncIterator[None]:
    """All three workers on the stage's file."""
    config = load(stage.path, environ={})
    await setup(config)
    workers: list[Serve] = [
        coordinator.serve,
        lambda c, life, path: exporter.serve(c, "exporter-1", life, path),
        lambda c, life, path: consumer.serve(c, "consumer-1", life, path),
    ]
    stage.lifecycles = [Lifecycle() for _ in workers]
    async with asyncio.TaskGroup() as group:
        for serve, lifecycle in zip(workers, stage.lifecycles, strict=True):
            group.create_task(_as_coroutine(serve(config, lifecycle, stage.path)))
        try:
            yield
        finally:
            for lifecycle in stage.lifecycles:
                lifecycle.stop.set()


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work


async def test_accounts_come_and_go_by_the_file_and_by_the_organization_without_a_restart(
    stage: Stage,
) -> None:
    stage.write(FIRST)
    async with running(stage):
        await stage.lands(FIRST)

        # A broken file changes nothing.
        stage.path.write_text("accounts: [")
        stage.hang_up()
        await stage.goes_on(FIRST)

        # An account in the file is collected; the exporter finds it out by itself, for only the coordinator is told.
        stage.write(FIRST, SECOND)
        stage.lifecycles[0].hangup.set()
        await stage.lands(FIRST, SECOND)

        # One that appears in the organization needs no edit at all. The manager has no role for us, and is left out.
        organization = {"role_arn": f"arn:aws:iam::{MANAGER}:role/Headgate", "exclude": [MANAGER]}
        stage.write(FIRST, SECOND, organization=organization)
        stage.lifecycles[0].hangup.set()
        third = stage.sim.add_account()
        stage.lifecycles[0].hangup.set()
        await stage.lands(FIRST, SECOND, third)

        # What is removed is planned no more, and the others go on.
        stage.write(SECOND, organization={**organization, "exclude": [MANAGER, FIRST]})
        stage.hang_up()
        await stage.goes_on(SECOND)
        gone = await stage.planned(FIRST)
        await stage.goes_on(SECOND)
        assert await stage.planned(FIRST) == gone
