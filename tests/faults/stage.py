"""One run: topics and tables of its own on shared servers, what is published there, and consumers to be hurt."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.errors import TopicAlreadyExistsError
from aiokafka.structs import TopicPartition

from ingest import wire
from ingest.log import Outgoing, Producer
from shard_config.model import S3, Config, Kafka, Postgres, Run
from tests.conftest import eventually
from tests.faults import victim
from tests.faults.oracle import Oracle
from tests.faults.truth import SERVICE, Published, Truth
from workers.setup import setup

FILE_KEYS = {"accounts", "kafka", "postgres", "s3"}
Wave = Iterable[tuple[Outgoing, Published]]
ROOT = Path(__file__).resolve().parent.parent.parent


# Each victim is forked from a process that has imported all a consumer needs: a second of CPU, paid once and not for each.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([victim.__name__])


class Victim:
    """A consumer process. What it logs is in `log`; leaving the context kills it, whatever state it is in."""

    def __init__(self, config: Config, name: str, home: Path, failpoint: str = "none") -> None:
        self.name = name
        self.log = home / f"{name}.{time.monotonic_ns()}.log"
        self.log.touch()
        args = (config.model_dump_json(), name, failpoint, self.log)
        self._process = _FORKS.Process(target=victim.run, args=args, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self._pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        if error is not None:
            print(f"--- {self.name}\n{self.log.read_text()[-4000:]}")

    def signal(self, number: signal.Signals) -> None:
        if self._process.is_alive():
            os.kill(self._pid, number)

    def events(self) -> list[dict[str, Any]]:
        """What it logged, as far as the lines are JSON and whole."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def struck(self) -> bool:
        """Whether it has reached its failpoint."""
        return any(e["event"] == "failpoint_reached" for e in self.events())

    async def logged(self, event: str, timeout_s: float = 30) -> dict[str, Any]:
        """The first such event, which is waited for."""
        found: list[dict[str, Any]] = []

        async def logged_it() -> bool:
            ended = not self._process.is_alive()
            found[:] = [e for e in self.events() if e["event"] == event]
            assert found or not ended, f"{self.name} ended without {event}"
            return bool(found)

        await eventually(logged_it, timeout_s)
        return found[0]

    async def exit_code(self, timeout_s: float = 30) -> int:
        """Wait until it ends by itself."""

        async def ended() -> bool:
            return not self._process.is_alive()

        await eventually(ended, timeout_s)
        assert self._process.exitcode is not None
        return self._process.exitcode

    def rss_bytes(self) -> int:
        return int(psutil.Process(self._pid).memory_info().rss)


class Stage:
    """Where one truth is published and lands. The oracle knows what was sent."""

    def __init__(self, config: Config, truth: Truth, home: Path) -> None:
        self.config = config
        self.truth = truth
        self.home = home
        self.oracle = Oracle(config, truth)
        self.producer = Producer(config.kafka.bootstrap, "stage")
        self._ends: dict[tuple[str, str], dict[int, int]] = {}
        """(topic, sink) → partition → where its position must come to."""

    @property
    def raw(self) -> str:
        return self.config.kafka.topic("raw")

    def ends(self) -> dict[int, int]:
        """Partition of `raw` → the next offset to be written, where anything was."""
        return dict(self._ends.get((self.raw, "postgres"), {}))

    def headgate(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run a command on this stage."""
        path = self.home / "headgate.yaml"
        # JSON is YAML.
        path.write_text(self.config.model_dump_json(include=FILE_KEYS, exclude_defaults=True))
        return subprocess.run(
            [sys.executable, "-m", "workers.cli", *args, "--config", str(path)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def victim(self, name: str, failpoint: str = "none", *, config: Config | None = None) -> Victim:
        return Victim(config or self.config, name, self.home, failpoint)

    async def publish(self, records: Wave) -> None:
        """Write records to `raw`, and tell the oracle."""
        records = list(records)
        positions = await self.producer.send(self.raw, [out for out, _ in records])
        for at, (_, published) in zip(positions, records, strict=True):
            self.oracle.sent[at.partition, at.offset] = published
            self._expect(self.raw, "postgres", at.partition, at.offset + 1)

    async def publish_all(self, waves: int, pause_s: float = 0.15) -> None:
        """Everything, in so many waves, so that it takes several transactions to land."""
        for wave in self.truth.waves(waves):
            await self.publish(wave)
            await asyncio.sleep(pause_s)

    async def publish_until_struck(self, victim: Victim, waves: Iterator[Wave]) -> None:
        """Wave after wave, each when the one before has landed, until the victim has reached its failpoint."""

        async def landed_or_struck() -> bool:
            return victim.struck() or await self._is_landed()

        for wave in waves:
            await self.publish(wave)
            await eventually(landed_or_struck, 30)
            if victim.struck():
                return
        raise AssertionError(f"{victim.name} has not reached its failpoint")

    async def announce(self) -> None:
        """Write all plans, then all receipts, to `ledger`."""
        looks = self.truth.looks
        values = [(str(k.task.target).encode(), wire.encode_task(k.task)) for k in looks]
        values += [
            (key, wire.encode_receipt(k.archived.receipt)) for (key, _), k in zip(values, looks, strict=True)
        ]
        topic = self.config.kafka.topic("ledger")
        for at in await self.producer.send(topic, [Outgoing(key, value) for key, value in values]):
            self._expect(topic, "ledger", at.partition, at.offset + 1)

    def _expect(self, topic: str, sink: str, partition: int, next_: int) -> None:
        ends = self._ends.setdefault((topic, sink), {})
        ends[partition] = max(next_, ends.get(partition, 0))

    async def recreate_raw(self) -> None:
        """Delete the topic and create it again: same name, same partitions, empty. What was sent there is forgotten."""
        topic, partitions = self.raw, self.config.kafka.raw_partitions
        admin = AIOKafkaAdminClient(bootstrap_servers=self.config.kafka.bootstrap)
        await admin.start()
        try:
            await admin.delete_topics([topic])

            async def created() -> bool:
                try:
                    answer = await admin.create_topics([NewTopic(topic, partitions, 1)])
                except TopicAlreadyExistsError:
                    return False
                return bool(answer.topic_errors[0][1] == 0)

            await eventually(created)
        finally:
            await admin.close()
        self.oracle.sent.clear()
        self._ends.pop((topic, "postgres"), None)

    async def delete_before(self, offsets: Mapping[int, int]) -> None:
        """As retention does: what lies before these offsets of `raw` goes."""
        topic = self.raw
        admin = AIOKafkaAdminClient(bootstrap_servers=self.config.kafka.bootstrap)
        await admin.start()
        try:
            await admin.delete_records(
                {TopicPartition(topic, p): RecordsToDelete(offset) for p, offset in offsets.items()}
            )
        finally:
            await admin.close()

    async def has_landed(self, timeout_s: float = 30) -> None:
        """Wait until the store's positions are at the end of what was sent."""
        await eventually(self._is_landed, timeout_s)

    async def _is_landed(self) -> bool:
        for (topic, sink), ends in self._ends.items():
            stored = await self.oracle.next_offsets(topic, sink)
            if any(stored[p] < end for p, end in ends.items()):
                return False
        return True

    async def ledger_balances(self, timeout_s: float = 15) -> None:
        """Wait until the ledger has folded and sealed everything."""
        found: list[str] = []

        async def balanced() -> bool:
            found[:] = await self.oracle.ledger()
            return not found

        try:
            await eventually(balanced, timeout_s)
        finally:
            assert found == []


@asynccontextmanager
async def staged(
    truth: Truth, kafka_bootstrap: str, prefix: str, dsn: str, s3: S3, home: Path, *, replication: int = 1
) -> AsyncIterator[Stage]:
    """A stage with its topics, tables and positions."""
    config = Config(
        accounts=truth.accounts(),
        services=(SERVICE,),
        slots=1,
        kafka=Kafka(
            bootstrap=kafka_bootstrap,
            prefix=prefix,
            raw_partitions=4,
            ledger_partitions=1,
            replication=replication,
        ),
        postgres=Postgres(dsn=dsn),
        s3=s3,
        # The clock stands where the data is, so that a seed gives the same run in any year.
        run=Run(clock_offset_s=truth.now_s - int(time.time())),
    )
    await setup(config)
    stage = Stage(config, truth, home)
    try:
        yield stage
    finally:
        await stage.producer.close()
