"""Each fault of the landing, on real servers, by its seed (`HEADGATE_SEED`), and what must hold afterwards (`tests.faults.oracle`)."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ingest.log import Outgoing
from ingest.sinks import postgres
from ingest.sinks.connection import open_connection
from shard_config.model import S3, Postgres
from tests.conftest import empty_bucket, empty_database, seed_of_run
from tests.faults.mutants import (
    Mutant,
    Patch,
    commit_before_landing,
    drop_every_10000th_row,
    last_arrival_wins,
    position_outside_the_transaction,
)
from tests.faults.oracle import complaints_of_landed
from tests.faults.proxy import Proxy
from tests.faults.replay import archive_all, replay_archive, replay_kafka
from tests.faults.stage import Stage, Victim, staged
from tests.faults.truth import Published, Truth
from workers.consumer import serve
from workers.lifecycle import Lifecycle
from workers.servers import PostgresServer

SAFETY = "worker_stopped_for_safety"


@pytest.fixture
def truth(seed: int, request: pytest.FixtureRequest) -> Truth:
    return Truth(seed, **getattr(request, "param", {}))


@pytest.fixture
async def stage(
    truth: Truth, kafka_bootstrap: str, topic_prefix: str, database: str, s3: S3, tmp_path: Path
) -> AsyncIterator[Stage]:
    async with staged(truth, kafka_bootstrap, topic_prefix, database, s3, tmp_path) as stage:
        yield stage


# --- a standstill of the sink: it begins here, and ends with the module -----------------------------------------

STANDSTILL_S = 60
MEMORY_CAP_BYTES = 256 * 1024**2


@dataclass(frozen=True, repr=False)
class Standstill:
    """A consumer whose sink stands still, and what waits for it in Kafka. Of 114 MB a repr takes half a minute, and pytest asks for one."""

    stage: Stage
    proxy: Proxy
    since_s: float
    waiting: list[tuple[Outgoing, Published]]
    used_bytes: list[int]


@pytest.fixture(scope="module")
async def standstill(
    kafka_bootstrap: str, postgres_dsn: str, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Standstill]:
    """Begins when the first of this module's tests runs that asks for it, and lasts while others run."""
    seed = seed_of_run()
    async with empty_database(postgres_dsn) as dsn, proxy_before(dsn) as proxy:
        prefix, home = f"t-{uuid.uuid4().hex[:12]}", tmp_path_factory.mktemp("standstill")
        s3 = S3(bucket=empty_bucket(s3_endpoint), endpoint_url=s3_endpoint)
        async with staged(Truth(seed), kafka_bootstrap, prefix, dsn, s3, home) as stage:
            config = stage.config.model_copy(update={"postgres": through(proxy, stage)})
            heavy, waves = stage.truth.heavy(), stage.truth.waves(4)
            with stage.victim("consumer-1", config=config) as victim:
                await stage.publish([*waves[0], *heavy[:20]])
                await stage.has_landed()
                waiting = [*heavy[20:], *(record for wave in waves[1:] for record in wave)]
                random.Random(f"{seed} standstill").shuffle(waiting)
                async with memory_of(victim) as used_bytes:
                    proxy.stall()
                    await stage.publish(waiting)
                    yield Standstill(stage, proxy, time.monotonic(), waiting, used_bytes)


async def test_what_a_sink_at_a_standstill_does_not_take_waits_in_kafka(standstill: Standstill) -> None:
    stage = standstill.stage
    await asyncio.sleep(1)
    assert await stage.oracle.positions() == []
    landed = await stage.oracle.next_offsets(stage.raw, "postgres")
    assert sum(stage.ends().values()) - sum(landed.values()) >= len(standstill.waiting)


# --- consumers ------------------------------------------------------------------------------------------------


async def test_a_consumer_killed_between_the_stores_commit_and_kafkas_loses_and_doubles_nothing(
    stage: Stage, rng: random.Random
) -> None:
    waves = iter(stage.truth.waves(8))
    with stage.victim("consumer-1", f"before_commit:{rng.randint(1, 4)}") as victim:
        await stage.publish_until_struck(victim, waves)
        assert await stage.oracle.positions() == []
        victim.signal(signal.SIGKILL)
        assert await victim.exit_code() == -signal.SIGKILL
    for wave in waves:
        await stage.publish(wave)
    with stage.victim("consumer-1"):
        await stage.has_landed()
        assert await stage.oracle.at_the_end() == []


@pytest.mark.parametrize("where", ["before_landing", "in_transaction"])
async def test_a_zombie_is_refused_and_its_successor_is_not_blocked(
    stage: Stage, rng: random.Random, where: str
) -> None:
    waves = iter(stage.truth.waves(8))
    with stage.victim("consumer-1", f"{where}:{rng.randint(1, 4)}") as zombie:
        await stage.publish_until_struck(zombie, waves)
        with stage.victim("consumer-2") as successor:
            await stage.has_landed()
            assert await stage.oracle.positions() == []
            # It wakes while its successor is at work, with records in hand that have landed since.
            zombie.signal(signal.SIGCONT)
            for wave in waves:
                await stage.publish(wave)
                await asyncio.sleep(0.1)
            refused = await zombie.logged("consumer_retries")
            assert refused["topic"] == stage.raw
            await stage.has_landed()
            assert await stage.oracle.at_the_end() == []
            assert not [e for e in successor.events() if e["event"] == "consumer_retries"]


# --- Kafka's log ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [{"rubbish": 0, "corrections": 0}], ids=["all archived"], indirect=True)
async def test_a_retention_that_passed_the_position_stops_the_consumer_until_it_is_filled_and_moved(
    stage: Stage, rng: random.Random
) -> None:
    await archive_all(stage)
    waves = stage.truth.waves(4)
    with stage.victim("consumer-1") as victim:
        await stage.publish(waves[0])
        await stage.has_landed()
        victim.signal(signal.SIGTERM)
        assert await victim.exit_code() == 0
    stored = await stage.oracle.next_offsets(stage.raw, "postgres")
    for wave in waves[1:]:
        await stage.publish(wave)
    # Of one partition at least a record goes that has not landed.
    grown = {p: end for p, end in stage.ends().items() if end > stored[p]}
    await stage.delete_before({p: rng.randint(stored[p] + 1, end) for p, end in grown.items()})

    with stage.victim("consumer-1") as victim:
        assert await victim.exit_code() == 3
        stopped = await victim.logged(SAFETY)
    assert "headgate positions" in stopped["remedy"]
    assert complaints_of_landed((p for _, p in waves[0]), await stage.oracle.table()) == []

    await replay_archive(stage)
    shown = stage.headgate("positions")
    assert (shown.returncode, shown.stdout.count("retention passed it")) == (1, len(grown)), shown
    moved = stage.headgate("positions", "--move", stage.raw, "--to", "start")
    assert (moved.returncode, moved.stdout.count("headgate backfill")) == (0, len(grown)), moved
    with stage.victim("consumer-1"):
        await stage.has_landed()
        assert await stage.oracle.at_the_end() == []


@pytest.mark.parametrize("running", [False, True], ids=["while it was stopped", "under it"])
async def test_a_topic_that_was_created_again_and_grew_past_the_position_is_refused(
    stage: Stage, running: bool
) -> None:
    first = stage.truth.records[: len(stage.truth.records) // 3]
    with stage.victim("consumer-1", "impatient:2") as victim:
        await stage.publish(first)
        await stage.has_landed()
        if not running:
            victim.signal(signal.SIGTERM)
            assert await victim.exit_code() == 0
        await stage.recreate_raw()
        await stage.publish(reversed(stage.truth.records))
        if running:
            assert await victim.exit_code() == 3
            stopped = await victim.logged(SAFETY)
    if not running:
        with stage.victim("consumer-1") as victim:
            assert await victim.exit_code() == 3
            stopped = await victim.logged(SAFETY)
    assert "created again" in stopped["remedy"], stopped
    assert complaints_of_landed((p for _, p in first), await stage.oracle.table()) == []


async def test_replays_of_kafka_and_of_the_archive_beside_the_live_consumer_change_nothing(
    stage: Stage,
) -> None:
    await archive_all(stage)
    waves = stage.truth.waves(8)
    for wave in waves[:4]:
        await stage.publish(wave)

    async def live() -> None:
        for wave in waves[4:]:
            await stage.publish(wave)
            await asyncio.sleep(0.2)

    with stage.victim("consumer-1") as victim:
        await victim.logged("partitions_assigned")
        async with asyncio.TaskGroup() as group:
            group.create_task(live())
            replays = [group.create_task(replay_kafka(stage)), group.create_task(replay_archive(stage))]
        assert all(done.result().batches - done.result().skipped_batches > 10 for done in replays)
        await stage.has_landed()
        assert await stage.oracle.at_the_end() == []


# --- PostgreSQL -----------------------------------------------------------------------------------------------


async def test_a_postgresql_that_is_killed_and_started_again_has_everything_and_the_ledger_balances(
    seed: int, rng: random.Random, kafka_bootstrap: str, topic_prefix: str, s3: S3, tmp_path: Path
) -> None:
    server = PostgresServer(tmp_path, durable=False)
    server.prepare()
    server.launch()
    try:
        server.wait_ready()
        truth = Truth(seed, corrections=0)
        async with staged(truth, kafka_bootstrap, topic_prefix, server.dsn(), s3, tmp_path) as stage:
            with stage.victim("consumer-1") as victim:
                await victim.logged("partitions_assigned")
                await stage.announce()
                publishing = asyncio.create_task(stage.publish_all(waves=12))
                await asyncio.sleep(rng.uniform(0.3, 1.5))
                assert server.pid is not None
                os.killpg(server.pid, signal.SIGKILL)
                server.stop()
                await asyncio.sleep(0.5)
                server.launch()
                server.wait_ready()
                await publishing
                await stage.has_landed()
                assert await stage.oracle.at_the_end() == []
                await stage.ledger_balances()
    finally:
        server.stop()


def through(proxy: Proxy, stage: Stage) -> Postgres:
    """The stage's PostgreSQL, by way of the proxy."""
    parts = urlsplit(stage.config.postgres.dsn)
    user = parts.netloc.rpartition("@")[0]
    return Postgres(dsn=parts._replace(netloc=f"{user}@127.0.0.1:{proxy.port}").geturl())


def proxy_before(dsn: str) -> Proxy:
    parts = urlsplit(dsn)
    assert parts.hostname
    return Proxy(parts.hostname, parts.port or 5432)


@pytest.fixture
async def proxy(database: str) -> AsyncIterator[Proxy]:
    async with proxy_before(database) as proxy:
        yield proxy


@asynccontextmanager
async def memory_of(victim: Victim) -> AsyncIterator[list[int]]:
    """Its resident bytes from now on, a few times a second."""
    samples = [victim.rss_bytes()]

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.05)
            samples.append(victim.rss_bytes())

    watching = asyncio.create_task(watch())
    try:
        yield samples
    finally:
        watching.cancel()


async def test_a_network_that_swallows_a_copy_halfway_delays_and_loses_nothing(
    stage: Stage, proxy: Proxy, rng: random.Random
) -> None:
    config = stage.config.model_copy(update={"postgres": through(proxy, stage)})
    with stage.victim("consumer-1", "impatient:2", config=config) as victim:
        await victim.logged("partitions_assigned")
        proxy.blackhole_in_copy(rng.randint(1, 3))
        publishing = asyncio.create_task(stage.publish_all(waves=8))
        async with asyncio.timeout(20):
            await proxy.fell_silent.wait()
        assert await backends_in_copy(stage) == 1
        assert await stage.oracle.positions() == []
        await asyncio.sleep(1)
        proxy.resume()
        await publishing
        await stage.has_landed()
        assert await stage.oracle.at_the_end() == []


async def test_a_consumer_is_gone_soon_after_its_signal_though_the_network_swallows_its_copy(
    stage: Stage, proxy: Proxy
) -> None:
    config = stage.config.model_copy(update={"postgres": through(proxy, stage)})
    with stage.victim("consumer-1", "short_drain:2", config=config) as victim:
        await victim.logged("partitions_assigned")
        proxy.blackhole_in_copy(1)
        await stage.publish(stage.truth.records)
        async with asyncio.timeout(20):
            await proxy.fell_silent.wait()
        victim.signal(signal.SIGTERM)
        started_s = time.monotonic()
        assert await victim.exit_code(15) == 0
        await victim.logged("drain_cut_short")
        print(f"gone after {time.monotonic() - started_s:.1f} s")
    with stage.victim("consumer-1"):
        await stage.has_landed()
        assert await stage.oracle.at_the_end() == []


async def backends_in_copy(stage: Stage) -> int:
    """Server processes that wait for the rest of a COPY into `samples` or its staging table."""
    connection = await open_connection(stage.config.postgres, "test")
    try:
        return int(
            await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
                " AND pid <> pg_backend_pid() AND query LIKE 'COPY %'"
            )
        )
    finally:
        await connection.close()


# --- the oracle itself ----------------------------------------------------------------------------------------


def nothing(_: Patch) -> None:
    """The control: what the oracle has to say of the same fault without a mutant."""


def drop_a_row_of_a_hundred(patch: Patch) -> None:
    drop_every_10000th_row(patch, 100)


@pytest.mark.parametrize("truth", [{"targets": 2, "windows": 6}], ids=["small"], indirect=True)
@pytest.mark.parametrize(
    ("mutant", "complaint"),
    [
        (nothing, None),
        (commit_before_landing, "I3 partition .: Kafka's group is at"),
        (drop_a_row_of_a_hundred, "I1 lost|I4 another version"),
        (last_arrival_wins, "I4 another version"),
        (position_outside_the_transaction, "I3 partition .: the position"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_the_oracle_catches_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, mutant: Mutant, complaint: str | None
) -> None:
    mutant(monkeypatch.setattr)
    waves = stage.truth.waves(4)
    struck = asyncio.Event()
    with monkeypatch.context() as fault:

        async def refuse(*_: object) -> None:
            struck.set()
            raise ConnectionResetError("of this test")

        fault.setattr(postgres, "_insert_rows", refuse)
        async with at_work(stage):
            await stage.publish(waves[0])
            await asyncio.wait_for(struck.wait(), 20)
            found = await stage.oracle.positions()
    if not found:
        async with at_work(stage):
            for wave in waves[1:]:
                await stage.publish(wave)
                await stage.has_landed()
            found = await stage.oracle.at_the_end()
    if complaint is None:
        assert found == []
    else:
        assert any(re.match(complaint, one) for one in found), found


@asynccontextmanager
async def at_work(stage: Stage) -> AsyncIterator[None]:
    """A consumer in this process, where it can be patched. A mutant may make it fail."""
    lifecycle = Lifecycle()
    serving = asyncio.create_task(serve(stage.config, "consumer-1", lifecycle))
    try:
        yield
    finally:
        lifecycle.stop.set()
        await asyncio.wait({serving}, timeout=20)
        assert serving.done()
        serving.exception()


# --- the end of the standstill -----------------------------------------------------------


async def test_a_sink_at_a_standstill_for_a_minute_fills_kafka_and_not_the_consumers_memory(
    standstill: Standstill,
) -> None:
    stage, used_bytes = standstill.stage, standstill.used_bytes
    await asyncio.sleep(max(0, standstill.since_s + STANDSTILL_S - time.monotonic()))
    assert await stage.oracle.positions() == []
    standstill.proxy.resume()
    await stage.has_landed(60)
    assert await stage.oracle.at_the_end() == []
    waiting_bytes = sum(len(out.value) for out, _ in standstill.waiting)
    before, most = used_bytes[0], max(used_bytes)
    print(f"waiting {waiting_bytes >> 20} MB, consumer {before >> 20} -> {most >> 20} MB")
    assert most < MEMORY_CAP_BYTES
    assert most - before < waiting_bytes / 2
