"""Each fault of the landing, on real servers, by its seed (`HEADGATE_SEED`), and what must hold afterwards (`tests.faults.oracle`)."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shard_config.model import S3
from tests.faults.stage import Stage, seed_of_run, staged
from tests.faults.truth import Truth


@pytest.fixture
def seed() -> int:
    return seed_of_run()


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Decides when a fault strikes."""
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture
def s3(s3_endpoint: str, bucket: str) -> S3:
    return S3(bucket=bucket, endpoint_url=s3_endpoint)


@pytest.fixture
async def stage(
    seed: int, kafka_bootstrap: str, topic_prefix: str, database: str, s3: S3, tmp_path: Path
) -> AsyncIterator[Stage]:
    async with staged(Truth(seed), kafka_bootstrap, topic_prefix, database, s3, tmp_path) as stage:
        yield stage


async def test_a_consumer_killed_between_the_stores_commit_and_kafkas_loses_and_doubles_nothing(
    stage: Stage, rng: random.Random
) -> None:
    with stage.victim("consumer-1", f"before_commit:{rng.randint(1, 4)}") as victim:
        publishing = asyncio.create_task(stage.publish_all(waves=8))
        await victim.logged("failpoint_reached")
        assert await stage.oracle.positions() == []
        victim.signal(signal.SIGKILL)
        assert await victim.exit_code() == -signal.SIGKILL
        await publishing
    with stage.victim("consumer-1"):
        await stage.has_landed()
        assert await stage.oracle.at_the_end() == []
