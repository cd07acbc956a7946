"""A fixed past for tests of replays: looks that supersede, correct, repeat and spoil each other, in Kafka and in the archive alike."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import asyncpg
import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from ingest import wire
from ingest.archive import archive_key, open_archive
from ingest.clock import SystemClock
from ingest.log import Outgoing, Producer
from ingest.model import (
    Batch,
    LookStatus,
    Outcome,
    Receipt,
    ReceiptItem,
    Series,
    SeriesKey,
    Target,
    Task,
    TaskItem,
    TaskKind,
    merge_counts,
    series_id,
    series_ids,
    task_id_of,
    window_counts,
)
from ingest.ports import ArchivedTask
from ingest.wire import raw_key
from shard_config.load import loads
from shard_config.model import Config

GRID_S = 300
ACCOUNTS = ("100000000001", "100000000002", "100000000003")
Table = dict[tuple[bytes, int], tuple[int, float]]
"""(series id, timestamp) → (version, value)."""


def config_of(kafka: str, prefix: str, dsn: str, s3: str, bucket: str) -> Config:
    return loads(config_text(kafka, prefix, dsn, s3, bucket), "test.yaml", environ={})


def config_text(kafka: str, prefix: str, dsn: str, s3: str, bucket: str) -> str:
    """A headgate.yaml of three accounts with two services each."""
    accounts = ", ".join(f'{{id: "{a}", regions: [eu-west-1], services: [ec2, sqs]}}' for a in ACCOUNTS)
    return (
        f"accounts: [{accounts}]\nslots: 2\n"
        f"kafka: {{bootstrap: '{kafka}', prefix: {prefix}, raw_partitions: 3, ledger_partitions: 1}}\n"
        f"postgres: {{dsn: '{dsn}'}}\ns3: {{endpoint_url: '{s3}', bucket: {bucket}}}\n"
    )


class Past:
    """Looks at `windows` windows that ended some hours ago, made from a seed. `expected` is what must land of them."""

    def __init__(self, seed: int, windows: int = 6) -> None:
        self.rng = random.Random(seed)
        self.to_s = int(time.time()) // 3600 * 3600 - 7200
        self.from_s = self.to_s - windows * GRID_S
        self.tasks: list[ArchivedTask] = []
        self.expected: Table = {}
        for account in ACCOUNTS:
            target = Target("cloudwatch", account, "eu-west-1")
            for end_s in range(self.from_s + GRID_S, self.to_s + 1, GRID_S):
                # A look, a later one that reaches back two windows and saw other values, and now and then a correction that was taken before both.
                self._look(target, end_s - GRID_S, end_s, end_s + 5, 0)
                self._look(target, max(self.from_s, end_s - 2 * GRID_S), end_s, end_s + 305, 0)
                if self.rng.random() < 0.3:
                    self._look(target, end_s - GRID_S, end_s, end_s + 1, 1 + self.rng.randrange(127))
        self._look(
            Target("cloudwatch", ACCOUNTS[0], "eu-west-1"),
            self.to_s,
            self.to_s + GRID_S,
            self.to_s + 310,
            0,
            wanted=False,
        )

    def _look(
        self, target: Target, start_s: int, end_s: int, at_s: int, revision: int, *, wanted: bool = True
    ) -> None:
        items = tuple(TaskItem(service, start_s, end_s, GRID_S) for service in ("ec2", "sqs"))
        task_id = task_id_of(target, "c" * 16, at_s % 1000, items, revision)
        task = Task(task_id, target, "c" * 16, end_s, at_s % 1000, TaskKind.LIVE.value, 0, items, revision)
        done: list[ReceiptItem] = []
        payloads = []
        for item in items:
            batches = [self._batch(task, item, at_s * 1000, part) for part in range(2)]
            if wanted:
                for batch in batches:
                    self._expect(batch)
            some = [p for b in batches for p in wire.encode_batch(b)]
            payloads += some
            counts = merge_counts(
                [c for b in batches for c in window_counts(b.point_ids(), b.timestamps_s, b.values, GRID_S)]
            )
            outcome = Outcome(LookStatus.COMPLETE, "", at_s * 1000, 40, {"GetMetricData": 1}, 40)
            done.append(
                ReceiptItem(
                    item, outcome, sum(b.points for b in batches), counts, tuple(p.batch_id for p in some)
                )
            )
        receipt = Receipt(
            task_id,
            target,
            "exporter-1",
            end_s,
            at_s * 1000 - 500,
            at_s * 1000 + 500,
            archive_key(task),
            tuple(done),
        )
        self.tasks.append(ArchivedTask(receipt, tuple(payloads)))

    def _batch(self, task: Task, item: TaskItem, at_ms: int, part: int) -> Batch:
        series = tuple(
            Series(
                SeriesKey(
                    task.target.account,
                    task.target.region,
                    f"AWS/{item.service.upper()}",
                    f"m{part}-{i}",
                    (),
                    "Average",
                    60,
                )
            )
            for i in range(20)
        )
        counts, times_s, values = [], [], []
        for _ in series:
            # A later look may not show what an earlier one did, and show twice what AWS repeats.
            shown = [t for t in range(item.start_s, item.end_s, 60) if self.rng.random() < 0.8] or [
                item.start_s
            ]
            if self.rng.random() < 0.1:
                shown.append(shown[-1])
            counts.append(len(shown))
            times_s += shown
            values += [
                float("nan") if self.rng.random() < 0.01 else self.rng.choice([-1.0, 0.0, 1.5, 2.5])
                for _ in shown
            ]
        return Batch(
            task_id=task.task_id, target=task.target, service=item.service, observed_at_ms=at_ms, revision=task.revision, grid_s=GRID_S,
            series=series, counts=np.array(counts, np.int32), timestamps_s=np.array(times_s, np.int64), values=np.array(values, np.float64),
            ids=series_ids(series),
        )  # fmt: skip

    def _expect(self, batch: Batch) -> None:
        owners = np.repeat(np.arange(len(batch.series)), batch.counts).tolist()
        for of, t, value in zip(owners, batch.timestamps_s.tolist(), batch.values.tolist(), strict=True):
            if value == value:  # not NaN
                key, sample = (series_id(batch.series[of].key), t), (batch.version, value)
                self.expected[key] = max(self.expected.get(key, sample), sample)

    def within(self, accounts: Sequence[str], services: Sequence[str]) -> int:
        """Batches of these accounts and services."""
        return sum(
            len(i.batches) for t in self.tasks for i in t.receipt.items
            if t.receipt.target.account in accounts and i.item.service in services and i.item.start_s < self.to_s
        )  # fmt: skip

    async def publish(self, config: Config) -> None:
        """Everything into the archive and into Kafka, in any order, some of it twice."""
        producer = Producer(config.kafka.bootstrap, "test")
        shuffled = [*self.tasks, *self.rng.sample(self.tasks, len(self.tasks) // 3)]
        self.rng.shuffle(shuffled)
        try:
            async with open_archive(config.s3, SystemClock()) as archive:
                for task in self.tasks:
                    await archive.put(task)
            for task in shuffled:
                key = raw_key(task.receipt.target)
                await producer.send(
                    config.kafka.topic("raw"), [Outgoing(key, p.value) for p in task.payloads]
                )
        finally:
            await producer.close()


async def table_of(dsn: str) -> Table:
    """All samples of a store."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT uuid_send(series) AS id, extract(epoch FROM ts)::bigint AS t, version, value FROM samples"
        )
    finally:
        await connection.close()
    return {(r["id"], r["t"]): (r["version"], r["value"]) for r in rows}


async def delete_records(bootstrap: str, topic: str, partitions: int) -> None:
    """As retention does."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await admin.start()
    await consumer.start()
    try:
        ends = await consumer.end_offsets([TopicPartition(topic, p) for p in range(partitions)])
        await admin.delete_records({tp: RecordsToDelete(before_offset=end) for tp, end in ends.items()})
    finally:
        await consumer.stop()
        await admin.close()
