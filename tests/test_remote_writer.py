"""A remote writer between a real Kafka and real Prometheus servers: what PromQL returns is what an oracle computes from the batches."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from prometheus_client import REGISTRY
from rich.console import Console

from ingest import wire
from ingest.clock import SystemClock
from ingest.log import Outgoing, Producer
from ingest.model import Batch, Series, SeriesKey, Target, series_ids
from ingest.ports import Record
from ingest.scan import scan
from ingest.series_labels import Labels
from shard_config.load import load
from shard_config.model import Config
from tests.conftest import eventually
from tests.prometheus_server import PrometheusServer, needs_prometheus
from workers import reload, remote_writer
from workers.lifecycle import Lifecycle
from workers.positions import receivers_places
from workers.servers import free_ports, get_local
from workers.setup import commit_starts, create_topics, kafka_admin
from workers.status import render, status

pytestmark = needs_prometheus

REGION = "eu-west-1"
ACCOUNTS = tuple(f"{n:012}" for n in range(1, 13))
SETTLING_S = 60

Oracle = dict[tuple[tuple[str, str], ...], dict[int, float]]
"""By labels, timestamp in seconds → value."""


def batch_of(account: str, values: dict[str, dict[int, float]], observed_at_ms: int | None = None) -> Batch:
    """By instance, timestamp in seconds → value."""
    series = tuple(
        Series(SeriesKey(account, REGION, "AWS/EC2", "CPUUtilization", (("InstanceId", i),), "Average", 60))
        for i in values
    )
    return Batch(
        task_id="0" * 32,
        target=Target("cloudwatch", account, REGION),
        service="ec2",
        observed_at_ms=observed_at_ms or time.time_ns() // 1_000_000,
        revision=0,
        grid_s=300,
        series=series,
        counts=np.array([len(points) for points in values.values()], np.int32),
        timestamps_s=np.array([t for points in values.values() for t in points], np.int64),
        values=np.array([v for points in values.values() for v in points.values()], np.float64),
        ids=series_ids(series),
    )


@dataclass
class Stage:
    """Kafka's topics, Prometheus servers by receiver's name, and the workers' file."""

    path: Path
    base: dict[str, object]
    servers: dict[str, PrometheusServer]
    producer: Producer
    window_s: int = 7200
    receivers: list[dict[str, object]] = field(default_factory=list)

    def write(self, **more: object) -> Config:
        remote_write = {"receivers": self.receivers, "resources": False}
        self.path.write_text(yaml.safe_dump({**self.base, "remote_write": {**remote_write, **more}}))
        return self.config

    @property
    def config(self) -> Config:
        return load(self.path, environ={})

    async def publish(self, batches: Iterable[Batch]) -> None:
        await self.producer.send(
            self.config.kafka.topic("raw"),
            [
                Outgoing(wire.raw_key(batch.target), payload.value)
                for batch in batches
                for payload in wire.encode_batch(batch)
            ],
        )

    def oracle(self, batches: Iterable[Batch]) -> dict[str, Oracle]:
        """By receiver, what it should hold where every point is sent once and never changes."""
        labels = Labels(self.config)
        wanted: dict[str, Oracle] = {name: {} for name in self.servers}
        for batch in batches:
            owners = np.repeat(np.arange(len(batch.series)), batch.counts).tolist()
            points = zip(owners, batch.timestamps_s.tolist(), batch.values.tolist(), strict=True)
            for owner, timestamp_s, value in points:
                series = batch.series[owner]
                name = labels.receiver_of(series, batch.service)
                said = labels.of(series, batch.service, batch.target, None)
                wanted[name].setdefault(said, {})[timestamp_s] = value
        return wanted

    def held(self) -> dict[str, Oracle]:
        """By receiver, what it holds. Of one that is down nothing."""
        now_s = int(time.time()) + 60
        found: dict[str, Oracle] = {}
        for name, server in self.servers.items():
            try:
                found[name] = server.samples('{__name__=~"aws_.+"}', now_s - 7200, now_s)
            except OSError:
                found[name] = {}
        return found

    async def holds(self, wanted: dict[str, Oracle], timeout_s: float = 30) -> None:
        """Until each server holds this, and nothing else."""
        deadline_s = time.monotonic() + timeout_s
        while (found := await asyncio.to_thread(self.held)) != wanted:
            assert time.monotonic() < deadline_s, _difference(found, wanted)
            await asyncio.sleep(0.1)

    @asynccontextmanager
    async def running(
        self, name: str = "remote-write-1", only: Sequence[str] = ()
    ) -> AsyncIterator[Lifecycle]:
        lifecycle = Lifecycle()
        async with asyncio.TaskGroup() as group:
            group.create_task(
                _as_coroutine(remote_writer.serve(self.config, name, lifecycle, self.path, only))
            )
            try:
                yield lifecycle
            finally:
                lifecycle.stop.set()


async def _as_coroutine(work: object) -> None:
    await work  # type: ignore[misc]


def _difference(found: dict[str, Oracle], wanted: dict[str, Oracle]) -> str:
    """In few words: for each server how many samples are missing, wrong and too many, and one of each."""
    words = []
    for name in wanted:
        have = {(k, t): v for k, points in found[name].items() for t, v in points.items()}
        want = {(k, t): v for k, points in wanted[name].items() for t, v in points.items()}
        missing, more = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
        wrong = [(key, have[key], want[key]) for key in have.keys() & want.keys() if have[key] != want[key]]
        words.append(
            f"{name}: missing {len(missing)} {missing[:1]} more {len(more)} {more[:1]} wrong {wrong[:1]}"
        )
    return "\n".join(words)


def metric(name: str, receiver: str, **labels: str) -> float:
    """Of this process."""
    return REGISTRY.get_sample_value(name, {"receiver": receiver, **labels}) or 0.0


@asynccontextmanager
async def staged(
    home: Path, bootstrap: str, prefix: str, servers: int, *, window: str = "2h", window_s: int = 7200
) -> AsyncIterator[Stage]:
    started = {
        f"shard-{n}": PrometheusServer(home / f"prometheus-{n}", out_of_order_window=window)
        for n in range(servers)
    }
    for server in started.values():
        server.start()
    base: dict[str, object] = {
        "accounts": [{"id": a, "regions": [REGION], "services": ["ec2"]} for a in ACCOUNTS],
        "services": {"ec2": {"settling_s": SETTLING_S}},
        "kafka": {
            "bootstrap": bootstrap,
            "prefix": prefix,
            "raw_partitions": 2,
            "session_timeout_s": 6,
        },
        # Nobody answers there: a remote writer has no need of it.
        "postgres": {"dsn": "postgresql://nobody@127.0.0.1:9/none"},
        "s3": {"bucket": "none", "endpoint_url": "http://127.0.0.1:9"},
    }
    receivers: list[dict[str, object]] = [
        {"name": name, "url": server.write_url, "out_of_order_window_s": window_s}
        for name, server in started.items()
    ]
    producer = Producer(bootstrap, "test")
    stage = Stage(home / "headgate.yaml", base, started, producer, window_s, receivers)
    config = stage.write()
    await create_topics(config)
    await commit_starts(config)
    try:
        yield stage
    finally:
        await producer.close()
        for server in started.values():
            server.stop()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "AT_ONCE_S", 0.2)
    monkeypatch.setattr(reload, "LOOK_S", 60.0)  # signals are what wakes it


def minutes_ago(*minutes: int) -> list[int]:
    now_s = int(time.time()) // 60 * 60
    return [now_s - 60 * m for m in minutes]


async def test_three_servers_hold_what_the_oracle_says_though_one_was_killed_and_records_came_twice_and_out_of_order(
    tmp_path: Path, kafka_bootstrap: str, topic_prefix: str
) -> None:
    async with staged(tmp_path, kafka_bootstrap, topic_prefix, 3) as stage:
        looks = [
            [
                batch_of(
                    account,
                    {f"i-{n}": {t: float(n + t % 977) for t in minutes_ago(*minutes)} for n in range(5)},
                )
                for account in ACCOUNTS
            ]
            for minutes in ((30, 29, 28, 27, 26), (25, 24, 23, 22, 21), (20, 19, 18, 17, 16), (15, 14, 13))
        ]
        everything = [batch for look in looks for batch in look]
        wanted = stage.oracle(everything)
        assert all(wanted.values()), "each server has some accounts"
        async with stage.running() as lifecycle:
            await stage.publish(looks[0])
            await stage.holds(stage.oracle(looks[0]))

            async def is_ready() -> bool:
                return lifecycle.ready

            async def says_so() -> bool:
                return metric("headgate_remote_write_failing", "shard-1") == 1

            await eventually(is_ready)
            victim = stage.servers["shard-1"]
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            victim.stop()
            # An exporter's records come twice, and its older look after the newer one.
            await stage.publish([*looks[2], *looks[1], *looks[2]])
            so_far = stage.oracle([*looks[0], *looks[1], *looks[2]])
            await stage.holds(so_far | {"shard-1": {}})
            await eventually(says_so)
            assert [metric("headgate_remote_write_failing", f"shard-{n}") for n in (0, 2)] == [0, 0]
            began_s = time.monotonic()
            await stage.publish(looks[3])
            await stage.holds(wanted | {"shard-1": {}})
            assert time.monotonic() - began_s < 15, "one server's trouble delays no other"
            victim.start()
            await stage.holds(wanted)
        sent = {name: metric("headgate_remote_write_samples_total", name) for name in stage.servers}
        assert sent == dict.fromkeys(stage.servers, 0.0), "metrics go with their worker"


async def test_without_a_window_revisions_before_settling_win_and_later_ones_are_counted(
    tmp_path: Path, kafka_bootstrap: str, topic_prefix: str
) -> None:
    async with staged(tmp_path, kafka_bootstrap, topic_prefix, 1, window="", window_s=0) as stage:
        account = ACCOUNTS[0]
        [settled_s, soon_s] = [int(time.time()) - 60 - SETTLING_S + ahead_s for ahead_s in (-30, 6)]
        now_ms = time.time_ns() // 1_000_000
        async with stage.running():
            await stage.publish(
                [
                    batch_of(account, {"i-1": {settled_s: 1.0, soon_s: 2.0}}, now_ms - 2000),
                    batch_of(account, {"i-1": {soon_s: 3.0}}, now_ms - 1000),
                    batch_of(account, {"i-1": {soon_s: 4.0}}, now_ms - 3000),
                ]
            )
            final = batch_of(account, {"i-1": {settled_s: 1.0, soon_s: 3.0}})
            await stage.holds(stage.oracle([batch_of(account, {"i-1": {settled_s: 1.0}})]))
            assert metric("headgate_remote_write_held_samples", "shard-0") == 1
            assert metric("headgate_remote_write_series", "shard-0") >= 1
            await stage.holds(stage.oracle([final]))
            await stage.publish([batch_of(account, {"i-1": {settled_s: 8.0, soon_s: 9.0}})])

            async def counted() -> bool:
                return metric("headgate_remote_write_refused_total", "shard-0", reason="changed") == 2

            await eventually(counted)
            assert stage.held() == stage.oracle([final])


async def test_a_bad_sample_is_a_dead_letter_and_the_others_of_its_batch_are_on_the_server(
    tmp_path: Path, kafka_bootstrap: str, topic_prefix: str
) -> None:
    # The server has no window, whatever the configuration says.
    async with staged(tmp_path, kafka_bootstrap, topic_prefix, 1, window="", window_s=7200) as stage:
        [early_s, late_s] = minutes_ago(20, 10)
        first = batch_of(ACCOUNTS[0], {"i-1": {late_s: 1.0}})
        second = batch_of(ACCOUNTS[0], {f"i-{n}": {early_s: 2.0, late_s + 60: 3.0} for n in range(1, 40)})
        async with stage.running():
            await stage.publish([first])
            await stage.holds(stage.oracle([first]))
            await stage.publish([second])
            wanted = stage.oracle([first, second])
            [bad] = [labels for labels in wanted["shard-0"] if ("dimension_InstanceId", "i-1") in labels]
            del wanted["shard-0"][bad][early_s]
            await stage.holds(wanted)
            found: list[Record] = []

            def take(record: Record) -> bool:
                found.append(record)
                return False

            await scan(stage.config.kafka, stage.config.kafka.topic("dead"), take)
            [letter] = [wire.decode_dead_letter(record.value) for record in found]
            assert letter.reason == "refused_by_receiver"
            assert "InstanceId=i-1" in letter.series
            assert json.loads(letter.payload) == {"points": [[early_s, "2.0"]]}
            assert "shard-0 says out_of_order" in letter.detail
            assert metric("headgate_remote_write_refused_total", "shard-0", reason="out_of_order") == 1
            await _is_shown(stage)


async def _is_shown(stage: Stage) -> None:
    """`headgate status` and `headgate positions` say how the receiver stands, the first one though PostgreSQL does not answer."""

    async def committed() -> bool:
        group = (await status(stage.config, SystemClock())).receivers["shard-0"]
        return group.lag_total == 0 and sum(note.refused for note in group.notes) == 1

    await eventually(committed)
    seen = await status(stage.config, SystemClock())
    text = "\n".join(str(line) for line in seen.errors)
    assert "postgres" in text
    assert "kafka" not in text
    [(name, group)] = seen.receivers.items()
    assert (name, list(group.members)) == ("shard-0", ["remote-write-1"])
    [note] = group.notes
    assert (note.by, note.samples) == ("remote-write-1", 1 + 2 * 39 - 1)
    console = Console(width=120, file=StringIO(), record=True)
    console.print(render(seen))
    [line] = [line for line in console.export_text().splitlines() if "shard-0" in line]
    assert "78" in line.split()
    places = await receivers_places(stage.config)
    assert {(place.reader, place.wrong) for place in places} == {("remote-write shard-0", "")}


async def test_where_kafka_dropped_what_was_next_it_goes_on_and_counts_what_was_lost(
    tmp_path: Path, kafka_bootstrap: str, topic_prefix: str
) -> None:
    async with staged(tmp_path, kafka_bootstrap, topic_prefix, 1) as stage:
        looks = [batch_of(ACCOUNTS[0], {"i-1": {t: 1.0}}) for t in minutes_ago(20, 19, 18, 17)]
        await stage.publish(looks)
        topic = stage.config.kafka.topic("raw")
        async with kafka_admin(stage.config.kafka) as admin:
            partitions = range(stage.config.kafka.raw_partitions)
            await admin.delete_records(
                {TopicPartition(topic, p): RecordsToDelete(3) for p in await _filled(stage, partitions)}
            )
        async with stage.running():
            await stage.holds(stage.oracle(looks[3:]))
            assert metric("headgate_remote_write_skipped_records_total", "shard-0") == 3


async def _filled(stage: Stage, partitions: Iterable[int]) -> list[int]:
    """Of these, those that hold records."""
    found = set()

    def take(record: Record) -> bool:
        found.add(record.position.partition)
        return False

    await scan(stage.config.kafka, stage.config.kafka.topic("raw"), take)
    return [p for p in partitions if p in found]


async def test_receivers_come_and_go_and_change_under_way(
    tmp_path: Path, kafka_bootstrap: str, topic_prefix: str
) -> None:
    async with staged(tmp_path, kafka_bootstrap, topic_prefix, 2) as stage:
        both = stage.receivers
        stage.receivers = both[:1]
        stage.write()
        [t0_s, t1_s] = minutes_ago(20, 10)
        first = [batch_of(a, {"i-1": {t0_s: 1.0}}) for a in ACCOUNTS]
        second = [batch_of(a, {"i-1": {t1_s: 2.0}}) for a in ACCOUNTS]
        async with stage.running() as lifecycle:
            await stage.publish(first)
            before = stage.oracle(first)
            await stage.holds(before)
            stage.receivers = both
            stage.write()
            after = stage.oracle(first)
            lifecycle.hangup.set()
            # The new one starts with what is in its window; the old one keeps what it has.
            await stage.holds({"shard-0": before["shard-0"], "shard-1": after["shard-1"]})
            await stage.publish(second)
            both_looks = stage.oracle(second)
            wanted = {
                name: {
                    labels: held.get(labels, {}) | both_looks[name].get(labels, {})
                    for labels in held.keys() | both_looks[name].keys()
                }
                for name, held in {"shard-0": before["shard-0"], "shard-1": after["shard-1"]}.items()
            }
            await stage.holds(wanted)
            stage.receivers = both[:1]
            stage.write(custom_tags=[{"tags": {"team": "core"}}])
            lifecycle.hangup.set()

            async def gone() -> bool:
                return REGISTRY.get_sample_value(
                    "headgate_remote_write_lag_records", {"receiver": "shard-1"}
                ) is None and bool(lifecycle.ready)

            await eventually(gone)
            await stage.publish([batch_of(ACCOUNTS[0], {"i-9": {t1_s: 5.0}})])

            async def renamed() -> bool:
                return bool(stage.servers["shard-0"].query(f'{{custom_tag_team="core"}} @ {t1_s}'))

            await eventually(renamed)


@contextmanager
def process(stage: Stage, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A remote writer as a process of its own."""
    command = [sys.executable, "-m", "workers.cli", "remote-write", "--name", "remote-write-1"]
    command += ["--config", str(stage.path), "--metrics-port", str(port)]
    root = Path(__file__).resolve().parent.parent
    with (stage.path.parent / "log").open("ab") as log:
        started = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, env={**os.environ})
        try:
            yield started
        finally:
            started.kill()
            started.wait(10)


async def test_a_worker_that_is_killed_again_and_again_loses_nothing_and_makes_nothing_wrong(
    tmp_path: Path, kafka_bootstrap: str, topic_prefix: str
) -> None:
    async with staged(tmp_path, kafka_bootstrap, topic_prefix, 1, window="", window_s=0) as stage:
        start_s = int(time.time()) - 60 - SETTLING_S - 40
        looks = [
            batch_of(
                ACCOUNTS[0],
                {f"i-{n}": {start_s + 2 * k + s: float(n + k) for s in (0, 1)} for n in range(300)},
            )
            for k in range(25)
        ]
        [port] = free_ports(1)

        async def some() -> bool:
            return len(stage.held()["shard-0"]) == 300

        for third in (looks[:8], looks[8:16]):
            with process(stage, port) as worker:
                await stage.publish(third)
                await eventually(some)
                worker.send_signal(signal.SIGKILL)
        with process(stage, port) as worker:
            await stage.publish(looks[16:])
            await stage.holds(stage.oracle(looks))
            metrics = get_local(f"http://127.0.0.1:{port}/metrics", timeout_s=5).decode()
            assert 'headgate_remote_write_samples_total{receiver="shard-0"}' in metrics
            refused = [
                line
                for line in metrics.splitlines()
                if line.startswith("headgate_remote_write_refused_total{")
            ]
            assert refused
            assert all(line.endswith(" 0.0") for line in refused), refused
            assert get_local(f"http://127.0.0.1:{port}/readyz", timeout_s=5) == b"ready\n"
            worker.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(worker.wait, 20) == 0
