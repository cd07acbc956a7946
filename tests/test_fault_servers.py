"""Servers that die, stand still or fill up, and networks that cut, slow down or lie: one directed fault each, and what must hold afterwards."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
import uvloop
from aiohttp import web
from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaConnectionError, KafkaError
from aiokafka.protocol.metadata import MetadataRequest
from botocore.retries.standard import ExponentialBackoff

from ingest import ledger, wire
from ingest.archive import READS, open_archive
from ingest.brokers import client_options
from ingest.clock import ManualClock, SystemClock
from ingest.errors import Fatal, Rejected, Transient
from ingest.log import Outgoing, Producer
from ingest.ports import Advance, Landable, Record
from ingest.scan import scan
from ingest.sinks.postgres import PostgresSink
from ingest.validate import validate
from shard_config.model import S3, Kafka
from shard_config.remote_write import Receiver, RemoteWrite
from tests.conftest import eventually
from tests.faults.cluster import Cluster, Quick
from tests.faults.oracle import read_topic
from tests.faults.proxy import Proxy, Way
from tests.faults.s3_proxy import S3Proxy
from tests.faults.small_disk import SmallDisk, small_disk, why_not
from tests.faults.stage import Stage, Wave, staged
from tests.faults.truth import START_S, Truth
from tests.log_contract import Owner, offsets, running, some
from tests.test_faults import memory_of, proxy_before, through
from tests.test_log import RealLog
from workers import remote_writer
from workers.lifecycle import Lifecycle
from workers.names import remote_write_group
from workers.servers import PostgresServer
from workers.setup import commit_starts, kafka_admin

needs_small_disk = pytest.mark.skipif(bool(why_not()), reason=f"no disk that can be full: {why_not()}")


@pytest.fixture
def truth(seed: int) -> Truth:
    return Truth(seed, corrections=0)


@pytest.fixture
async def stage(
    truth: Truth, kafka_bootstrap: str, topic_prefix: str, database: str, s3: S3, tmp_path: Path
) -> AsyncIterator[Stage]:
    async with staged(truth, kafka_bootstrap, topic_prefix, database, s3, tmp_path) as stage:
        yield stage


async def published(stage: Stage, wave: Wave, timeout_s: float = 60) -> float:
    """Publish it as exporters do: again and again until it is acknowledged. Returns after how many seconds it was."""
    wave, started_s = list(wave), time.monotonic()
    while True:
        with suppress(Transient):
            await stage.publish(wave)
            return time.monotonic() - started_s
        assert time.monotonic() - started_s < timeout_s, "Kafka takes nothing"


# --- brokers --------------------------------------------------------------------------------------------------


@pytest.mark.brokers
async def test_of_three_brokers_one_may_be_lost_and_with_two_or_all_gone_nothing_is_acknowledged(
    seed: int, rng: random.Random, topic_prefix: str, database: str, s3: S3, tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path)
    cluster.start()
    try:
        async with staged(
            Truth(seed), cluster.bootstrap, topic_prefix, database, s3, tmp_path, replication=3
        ) as stage:
            assert await setting_of(stage, "min.insync.replicas") == "2"
            stage.producer = Producer(stage.config.kafka, "stage", deadline_s=2)
            waves = iter(stage.truth.waves(4))
            with stage.victim("consumer-1"):
                await published(stage, next(waves))
                killed, paused, last = rng.sample(cluster.brokers, 3)
                killed.kill()
                print(f"one killed: published after {await published(stage, next(waves)):.1f} s")
                await stage.has_landed()

                paused.signal(signal.SIGSTOP)
                wave = list(next(waves))
                with pytest.raises(Transient):
                    await stage.publish(wave)
                paused.signal(signal.SIGCONT)
                print(f"one more paused, and resumed: published after {await published(stage, wave):.1f} s")

                for broker in (paused, last):
                    broker.kill()
                for broker in (paused, last):
                    broker.launch()
                for broker in (paused, last):
                    broker.wait_ready()
                print(
                    f"all killed, and two started: published after {await published(stage, next(waves)):.1f} s"
                )
                await stage.has_landed(60)
            await everything_acknowledged_is_there(stage)
            assert await stage.oracle.at_the_end() == []
    finally:
        cluster.stop()


async def everything_acknowledged_is_there(stage: Stage) -> None:
    """At its place. What was not acknowledged may be there all the same: the oracle is told."""
    known = {published.value: published for _, published in stage.truth.records}
    there: dict[tuple[int, int], bytes] = {}

    def met(record: Record) -> bool:
        there[record.position.partition, record.position.offset] = record.value
        return False

    await scan(stage.config.kafka, stage.raw, met)
    assert [at for at, one in stage.oracle.sent.items() if there.get(at) != one.value] == []
    stage.oracle.sent.update({at: known[value] for at, value in there.items()})


async def setting_of(stage: Stage, name: str) -> str:
    """Of the topic `raw`."""
    async with kafka_admin(stage.config.kafka) as admin:
        answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, stage.raw)])
    return str({entry[0]: entry[1] for entry in answers[0].resources[0][4]}[name])


# --- connections to brokers -----------------------------------------------------------------------------------


def test_what_is_sent_on_a_connection_that_broke_is_an_error_of_kafkas_under_uvloop_too(
    kafka_bootstrap: str,
) -> None:
    host, _, port = kafka_bootstrap.rpartition(":")

    async def broken() -> None:
        client_options(kafka_bootstrap)
        connection = await create_conn(host, int(port))
        connection._writer.transport.abort()
        # The transport is closed when this goes on, and aiokafka's reader has not been told.
        await asyncio.sleep(0)
        with pytest.raises(KafkaConnectionError, match="broken"):
            connection.send(MetadataRequest([]))
        assert not connection.connected()

    uvloop.run(broken())


@pytest.fixture
async def log(kafka_bootstrap: str, topic_prefix: str) -> AsyncIterator[RealLog]:
    async with RealLog(kafka_bootstrap, topic_prefix) as log:
        yield log


@pytest.mark.parametrize("part", ["fetcher", "coordination"])
async def test_a_member_whose_client_lost_a_part_of_itself_joins_anew_and_misses_nothing(
    log: RealLog, part: str
) -> None:
    topic = await log.create(1)
    owner = Owner(log, topic)  # type: ignore[arg-type]  # a real one
    member = log.member(topic, f"{topic}.g", assigned=owner._assigned, revoked=owner._revoked)
    owner.member = member
    async with running(owner):
        await log.sender.send(topic, some(1, 0))
        assert offsets(await owner.polled(1)) == [0]
        client = member._require()
        task = client._fetcher.error_future if part == "fetcher" else client._coordinator._coordination_task
        task.cancel()
        await asyncio.wait([task], timeout=5)
        # Nobody hears of these: the mark that was last heard of is where the member stands.
        await log.sender.send(topic, some(1, 0))
        with pytest.raises(Transient, match=f"lost its {part}"):
            await owner.polled(1)
        assert owner.events == [("assigned", [0]), ("revoked", [0])]
        assert 1 in offsets(await owner.polled(1))
        assert member._require() is not client


async def test_a_member_that_fails_each_time_at_once_is_rebuilt_though_its_worker_waits_in_between(
    log: RealLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await log.create(1)
    owner = Owner(log, topic)  # type: ignore[arg-type]  # a real one
    member = log.member(topic, f"{topic}.g", assigned=owner._assigned, revoked=owner._revoked, stall_s=0.5)
    owner.member = member
    async with running(owner):
        await owner.owns(0)
        client = member._require()

        async def fails(**_: object) -> None:
            raise KafkaError("of this test")

        monkeypatch.setattr(client, "getmany", fails)
        said: list[str] = []
        async with asyncio.timeout(10):
            while not said or "failed for" not in said[-1]:
                with pytest.raises(Transient) as failed:
                    await member.poll(1, 0.1)
                said.append(failed.value.what)
                await asyncio.sleep(0.2)
        assert len(said) > 1
        await log.sender.send(topic, some(1, 0))
        assert len(await owner.polled(1)) == 1


# --- networks -------------------------------------------------------------------------------------------------


@pytest.fixture
async def proxy(database: str) -> AsyncIterator[Proxy]:
    async with proxy_before(database) as proxy:
        yield proxy


async def test_a_network_before_postgresql_that_breaks_in_every_way_delays_and_loses_nothing(
    stage: Stage, proxy: Proxy, rng: random.Random
) -> None:
    config = stage.config.model_copy(update={"postgres": through(proxy, stage)})
    faults = ["reset", "down", "to server", "to client", "half-open"]
    waves = iter(stage.truth.waves(1 + len(faults)))
    with stage.victim("consumer-1", "impatient:2", config=config) as victim:
        await stage.publish(next(waves))
        await stage.has_landed()
        for fault in rng.sample(faults, len(faults)):
            publishing = asyncio.create_task(stage.publish(next(waves)))
            await asyncio.sleep(rng.uniform(0, 0.1))
            assert break_it(proxy, fault) > 0
            await publishing
            await asyncio.sleep(0.5)
            proxy.resume()
            started_s = time.monotonic()
            await stage.has_landed()
            print(f"{fault}: landed {time.monotonic() - started_s:.1f} s after it was mended")
            assert await stage.oracle.positions() == []
        assert await stage.oracle.at_the_end() == []
        assert not [e for e in victim.events() if e["event"] == "worker_stopped_for_safety"]


def break_it(proxy: Proxy, fault: str) -> int:
    """Returns how many connections it struck."""
    match fault:
        case "reset":
            return proxy.reset()
        case "down":
            return proxy.down()
        case "half-open":
            return proxy.half_open()
        case _:
            proxy.cut(Way(fault))
            return proxy.open


class SilentReceiver:
    """A server of remote write that takes everything and keeps nothing; `requests` counts."""

    async def __aenter__(self) -> SilentReceiver:
        self.requests = 0
        app = web.Application(client_max_size=64 * 1024**2)
        app.router.add_post("/api/v1/write", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        return int(self._runner.addresses[0][1])

    async def _take(self, request: web.Request) -> web.Response:
        await request.read()
        self.requests += 1
        return web.Response(status=204)


@asynccontextmanager
async def remote_writing(stage: Stage, port: int) -> AsyncIterator[Kafka]:
    """A remote writer beside the consumers, in this process, to a receiver on that port."""
    receiver = Receiver(
        name="prometheus-1", url=f"http://127.0.0.1:{port}/api/v1/write", out_of_order_window_s=86_400
    )
    write = RemoteWrite(receivers=(receiver,), resources=False)
    config = stage.config.model_copy(update={"remote_write": write})
    await commit_starts(config)
    lifecycle = Lifecycle()
    serving = asyncio.create_task(remote_writer.serve(config, "remote-write-1", lifecycle))
    try:
        yield config.kafka
    finally:
        lifecycle.stop.set()
        await asyncio.wait({serving}, timeout=20)
        assert serving.done()
        assert serving.exception() is None


async def lag_of(stage: Stage, group: str) -> int:
    """Records of `raw` past what the group has committed."""
    async with kafka_admin(stage.config.kafka) as admin:
        committed = await admin.list_consumer_group_offsets(group)
    at = {tp.partition: found.offset for tp, found in committed.items() if tp.topic == stage.raw}
    return sum(end - max(0, at.get(p, 0)) for p, end in stage.ends().items())


async def test_a_slow_store_leaves_remote_write_alone_and_a_half_open_receiver_leaves_the_store_alone(
    stage: Stage, proxy: Proxy
) -> None:
    group = remote_write_group(stage.config.kafka, "prometheus-1")
    config = stage.config.model_copy(update={"postgres": through(proxy, stage)})
    waves = iter(stage.truth.waves(3))

    async def written() -> bool:
        return await lag_of(stage, group) == 0

    async with SilentReceiver() as receiver, Proxy("127.0.0.1", receiver.port) as way:
        with stage.victim("consumer-1", config=config) as victim:
            async with remote_writing(stage, way.port), memory_of(victim) as used_bytes:
                await stage.publish(next(waves))
                await stage.has_landed()
                await eventually(written)
                assert receiver.requests > 0

                proxy.bytes_per_s, proxy.latency_s = 2_000, 0.1
                await stage.publish(next(waves))
                await eventually(written, 10)
                stored = await stage.oracle.next_offsets(stage.raw, "postgres")
                assert sum(stage.ends().values()) > sum(stored.values())
                proxy.resume()
                await stage.has_landed()

                way.stall()
                way.half_open()
                await stage.publish(next(waves))
                await stage.has_landed(10)
                assert not await written()
                way.resume()
                way.bury()
                await eventually(written)
                assert max(used_bytes) < 256 * 1024**2
        assert await stage.oracle.at_the_end() == []


# --- PostgreSQL -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A PostgreSQL of our own, on a disk of its own where one can be had."""

    server: PostgresServer
    disk: SmallDisk | None

    def again(self) -> None:
        """Start it, whatever became of it."""
        self.server.stop()
        self.server.launch()
        self.server.wait_ready()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    home = tmp_path_factory.mktemp("small")
    server = PostgresServer(home, durable=False)
    with ExitStack() as exits:
        disk = None if why_not() else exits.enter_context(small_disk(server.dir, POSTGRES_BYTES))
        exits.callback(server.stop)
        server.start()
        yield Small(server, disk)


POSTGRES_BYTES = 256 * 1024**2
"""Half of it is what an empty PostgreSQL 16 has, with its log."""


async def test_a_postgresql_that_is_restarted_gracefully_and_at_once_has_everything_in_the_end(
    small: Small,
    truth: Truth,
    rng: random.Random,
    kafka_bootstrap: str,
    topic_prefix: str,
    s3: S3,
    tmp_path: Path,
) -> None:
    dsn = small.server.create_database("restarted")
    async with staged(truth, kafka_bootstrap, topic_prefix, dsn, s3, tmp_path) as stage:
        waves = iter(truth.waves(3))
        with stage.victim("consumer-1"):
            await stage.publish(next(waves))
            await stage.has_landed()
            for number in (signal.SIGINT, signal.SIGQUIT):
                publishing = asyncio.create_task(stage.publish(next(waves)))
                await asyncio.sleep(rng.uniform(0, 0.3))
                assert small.server.pid is not None
                os.killpg(small.server.pid, number)
                await asyncio.sleep(0.3)
                small.again()
                await publishing
                await stage.has_landed()
                assert await stage.oracle.positions() == []
            assert await stage.oracle.at_the_end() == []


@needs_small_disk
async def test_a_postgresql_whose_disk_is_full_says_so_and_goes_on_with_room(
    small: Small, truth: Truth, kafka_bootstrap: str, topic_prefix: str, s3: S3, tmp_path: Path
) -> None:
    assert small.disk is not None
    dsn = small.server.create_database("full")
    async with staged(truth, kafka_bootstrap, topic_prefix, dsn, s3, tmp_path) as stage:
        waves = iter(truth.waves(2))
        with stage.victim("consumer-1", "impatient:2") as victim:
            await stage.publish(next(waves))
            await stage.has_landed()
            small.disk.fill()
            try:
                await stage.publish(stage.truth.heavy(1))
                await stage.publish(next(waves))
                said = await victim.logged("consumer_retries")
                assert "disk is full" in said["error"], said
                assert await stage.oracle.positions() == []
            finally:
                small.disk.make_room()
            await stage.has_landed()
            assert await stage.oracle.at_the_end() == []


@pytest.mark.parametrize("who", ["landing", "ledger"])
async def test_a_commit_whose_answer_was_lost_is_known_as_our_own_and_another_position_is_refused(
    stage: Stage, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setattr(ledger, "STATEMENTS_TIMEOUT_S", 1)
    postgres, clock, topic = through(proxy, stage), SystemClock(), stage.config.kafka.topic("raw")
    look = stage.truth.looks[0]
    sink = await PostgresSink.connect(postgres, clock=clock, timeout_s=1)
    projected = ledger.Ledger(postgres, "test", {})
    if who == "ledger":
        topic = stage.config.kafka.topic("ledger")

    async def asked(advance: Advance) -> None:
        if who == "ledger":
            await projected.project([look.task], [advance], stage.truth.now_s)
        else:
            [payload] = look.archived.payloads
            batch = wire.decode_batch(payload.value, stage.config.limits)
            finite = validate(batch, stage.truth.now_s, stage.config.limits).accepted
            assert finite is not None
            await sink.land([advance], [Landable(payload.batch_id, finite, 0)])

    first = Advance(topic, 0, 0, 1, b"a" * 16)
    try:
        proxy.lose_answer_to(b"COMMIT;")
        with pytest.raises(Transient):
            await asked(first)
        assert proxy.fell_silent.is_set()
        proxy.resume()
        await asked(first)
        assert (await stage.oracle.next_offsets(topic, "postgres" if who == "landing" else "ledger"))[0] == 1
        for other in (first, Advance(topic, 0, 0, 1, b"b" * 16), Advance(topic, 0, 2, 3, b"c" * 16)):
            with pytest.raises(Fatal, match="position is"):
                await asked(other)
    finally:
        await sink.close()
        await projected.close()


async def test_transactions_that_take_what_a_landing_takes_in_the_other_order_delay_it_only(
    stage: Stage,
) -> None:
    connection = await asyncpg.connect(stage.config.postgres.dsn)
    try:
        # The landing is to be the victim: it looks for a deadlock after a second.
        await connection.execute("SET deadlock_timeout = '5s'; SET lock_timeout = '8s'")
        with stage.victim("consumer-1") as victim:
            first, second = stage.truth.waves(2)
            await stage.publish(first)
            await stage.has_landed()
            async with connection.transaction():
                await connection.execute("LOCK TABLE samples IN SHARE MODE")
                await stage.publish(second)
                await asyncio.sleep(0.5)
                await connection.execute("UPDATE positions SET backend_pid = backend_pid")
            retried = await victim.logged("landing_retried")
            assert retried["error"] == "DeadlockDetectedError"
            await stage.has_landed()
            assert await stage.oracle.at_the_end() == []
    finally:
        connection.terminate()


# --- a broker whose disk is full ------------------------------------------------------------------------------


@pytest.mark.brokers
@needs_small_disk
async def test_a_broker_whose_disk_is_full_acknowledges_nothing_that_is_not_there_and_goes_on_with_room(
    tmp_path: Path, rng: random.Random
) -> None:
    server = Quick(tmp_path)
    with small_disk(server.dir) as disk, ExitStack() as exits:
        exits.callback(server.kill)
        server.start()
        kafka = Kafka(bootstrap=server.bootstrap)
        async with kafka_admin(kafka) as admin:
            await admin.create_topics([NewTopic("t", 1, 1)])
        producer = Producer(kafka, "test", deadline_s=2)
        values = [rng.randbytes(100_000) for _ in range(30)]
        acknowledged: dict[int, bytes] = {}

        async def send(value: bytes) -> None:
            [at] = await producer.send("t", [Outgoing(b"k", value, 0)])
            acknowledged[at.offset] = value

        await send(values[0])
        disk.fill(leave_bytes=1_000_000)
        refused = 0
        for value in values[1:]:
            try:
                await send(value)
            except Transient:
                refused += 1
                break
        assert refused == 1
        assert 1 < len(acknowledged) < 20
        disk.make_room()
        # It gives up where its only disk has failed; whoever watches it starts it again.
        server.kill()
        server.launch()
        server.wait_ready()
        for value in values[-3:]:
            await send(value)
        await producer.close()
        there = dict(enumerate(value for _, value in await read_topic(server.bootstrap, "t")))
        assert [at for at, value in acknowledged.items() if there.get(at) != value] == []


# --- S3 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore tries as often as ever, but at once."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)


@pytest.fixture
async def before_s3(s3: S3, seed: int) -> AsyncIterator[tuple[S3Proxy, S3]]:
    async with S3Proxy(str(s3.endpoint_url), seed=seed) as proxy:
        yield proxy, s3.model_copy(update={"endpoint_url": proxy.url})


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("fault", ["409", "503", "lost, then 412"])
async def test_a_put_that_is_refused_or_not_answered_ends_under_the_same_key_and_once(
    before_s3: tuple[S3Proxy, S3], truth: Truth, fault: str
) -> None:
    proxy, s3 = before_s3
    task = truth.looks[0].archived
    key = task.receipt.archive_key
    match fault:
        case "409":
            proxy.refuse(409, "ConditionalRequestConflict", "PUT", times=2)
        case "503":
            proxy.refuse(503, "SlowDown", "PUT", times=2)
        case _:
            proxy.lose_answers(times=1)
    async with open_archive(s3, ManualClock(START_S)) as archive:
        assert await archive.put(task) == task
        assert await archive.get(key) == task
        keys = [k async for k in archive.keys(task.receipt.target, START_S, truth.now_s)]
    assert keys == [key]
    assert {path for _, path in proxy.asked if "list-type" not in path} >= {f"/{s3.bucket}/{key}"}
    assert sum(proxy.struck.values()) == (1 if fault.startswith("lost") else 2)


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("fault", ["truncated", "changed", "changed, and S3 sends no checksum"])
async def test_a_read_that_comes_broken_is_read_again_and_never_believed(
    before_s3: tuple[S3Proxy, S3], truth: Truth, fault: str
) -> None:
    proxy, s3 = before_s3
    task = truth.looks[0].archived
    key = task.receipt.archive_key
    checksums = "no checksum" not in fault

    def strike(times: int) -> None:
        if fault == "truncated":
            proxy.truncate(times=times)
        else:
            proxy.flip(times=times, checksums=checksums)

    async with open_archive(s3, ManualClock(START_S)) as archive:
        await archive.put(task)
        strike(READS - 1)
        assert await archive.get(key) == task
        strike(READS)
        with pytest.raises(Transient if checksums else Rejected):
            await archive.get(key)
    assert sum(proxy.struck.values()) == 2 * READS - 1
