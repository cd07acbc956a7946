"""The whole way on real servers without processes: looks go through the collector, S3 and Kafka into PostgreSQL and the ledger, one call each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import asyncpg
import numpy as np

from ingest import wire
from ingest.archive import S3Archive, open_archive
from ingest.changed import Changed
from ingest.clock import ManualClock
from ingest.collect import Collector, Topics
from ingest.landing import Landing
from ingest.ledger import SINK, Ledger
from ingest.log import Outgoing, Producer
from ingest.model import (
    Batch,
    LookStatus,
    Outcome,
    Receipt,
    Series,
    SeriesKey,
    Target,
    Task,
    TaskItem,
    series_ids,
    task_id_of,
)
from ingest.ports import Advance, Record, Source
from ingest.positions import value_id
from ingest.scan import scan
from ingest.sinks.connection import open_connection
from ingest.sinks.postgres import PostgresSink
from shard_config.model import S3, Config, Kafka, Postgres
from workers.setup import setup

NOON_S = 1_767_268_800
TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
NAN = float("nan")

Points = Mapping[int, float]
"""Minutes from noon → value."""


def key_of(number: int, target: Target = TARGET) -> SeriesKey:
    return SeriesKey(
        target.account,
        target.region,
        "AWS/EC2",
        "CPUUtilization",
        (("InstanceId", f"i-{number}"),),
        "Average",
        60,
    )


@dataclass
class Answers:
    """A source that answers one look with what it is told. `revision` is that of its batches."""

    points: Sequence[Points] = ()
    observed_s: int = NOON_S
    status: LookStatus = LookStatus.COMPLETE
    detail: str = ""
    revision: int = 0

    async def look(
        self, task_id: str, target: Target, item: TaskItem, deadline_s: float
    ) -> AsyncIterator[Batch | Outcome]:
        if any(self.points):
            series = tuple(Series(key_of(n, target)) for n in range(len(self.points)))
            times = [NOON_S + 60 * minute for points in self.points for minute in points]
            yield Batch(
                task_id=task_id,
                target=target,
                service=item.service,
                observed_at_ms=self.observed_s * 1000,
                revision=self.revision,
                grid_s=item.grid_s,
                series=series,
                counts=np.array([len(points) for points in self.points], np.int32),
                timestamps_s=np.array(times, np.int64),
                values=np.array([v for points in self.points for v in points.values()], np.float64),
                ids=series_ids(series),
            )
        yield Outcome(
            self.status,
            self.detail,
            self.observed_s * 1000,
            len(self.points),
            {"GetMetricData": 1},
            len(self.points),
        )

    async def close(self) -> None: ...


@dataclass
class Way:
    """Everything, wired; the clock stands where a test puts it."""

    config: Config
    clock: ManualClock
    archive: S3Archive
    producer: Producer
    sink: PostgresSink
    ledger: Ledger
    landing: Landing
    sql: asyncpg.Connection
    projected: int = 0
    landed: int = 0
    changed: Changed | None = None
    """What the exporter remembers: nothing, so that it publishes everything."""

    def task(self, start_min: int, end_min: int, *, target: Target = TARGET, attempt: int = 0) -> Task:
        items = (TaskItem("ec2", NOON_S + 60 * start_min, NOON_S + 60 * end_min, 300),)
        task_id = task_id_of(target, "rev", attempt, items)
        return Task(task_id, target, "rev", items[0].end_s, attempt, "live", 0, items)

    async def plan(self, task: Task) -> None:
        """Announce a task on `ledger`."""
        await self.producer.send(self.config.kafka.topic("ledger"), [Outgoing(b"k", wire.encode_task(task))])

    async def look(
        self,
        *points: Points,
        window: tuple[int, int] = (0, 5),
        observed_min: int = 20,
        target: Target = TARGET,
        attempt: int = 0,
        status: LookStatus = LookStatus.COMPLETE,
        detail: str = "",
        revision: int = 0,
    ) -> Receipt:
        """Plan and collect: archived, published, and its receipt written; nothing has landed yet."""
        source = Answers(points, NOON_S + 60 * observed_min, status, detail, revision)
        return await self.collect(self.task(*window, target=target, attempt=attempt), source)

    async def collect(self, task: Task, source: Source) -> Receipt:
        """Plan and collect a task, with another source."""
        await self.plan(task)
        kafka = self.config.kafka
        collector = Collector(
            "exporter-1",
            {"cloudwatch": source},
            self.archive,
            self.producer,
            Topics(kafka.topic("raw"), kafka.topic("ledger")),
            self.clock,
            changed=self.changed,
        )
        return await collector.collect(task, maybe_second_try=False)

    async def land(self) -> None:
        """What consumers do: everything on `raw` into the store, everything on `ledger` into the ledger."""
        kafka = self.config.kafka
        raw = await self._new(kafka.topic("raw"), self.landed)
        if raw:
            if not self.landed:
                await self.landing.open([0], {0: (0, raw[-1].position.offset + 1)})
            await self.landing.land(raw)
        self.landed += len(raw)
        await self.project()
        await self.ledger.fold_landed("postgres", self.clock.now_s())

    async def project(self) -> None:
        topic = self.config.kafka.topic("ledger")
        new = await self._new(topic, self.projected)
        if new:
            end = new[-1].position.offset + 1
            advance = Advance(topic, 0, self.projected, end, value_id(new[-1].value))
            await self.ledger.project(
                [wire.decode_ledger(r.value) for r in new], [advance], self.clock.now_s()
            )
        self.projected += len(new)

    async def _new(self, topic: str, before: int) -> list[Record]:
        found: list[Record] = []

        def take(record: Record) -> bool:
            if record.position.offset >= before:
                # The log's clock is the test's too: landing asks it where ours may be behind.
                found.append(replace(record, timestamp_ms=self.clock.now_ms()))
            return False

        await scan(self.config.kafka, topic, take)
        return found


@asynccontextmanager
async def the_way(
    dsn: str, bootstrap: str, prefix: str, bucket: str, s3_endpoint: str, **config: object
) -> AsyncIterator[Way]:
    """A way over empty topics, an empty database and an empty bucket, an hour after noon. `config` replaces parts of the configuration."""
    made = Config.model_validate(
        {
            "accounts": [{"id": TARGET.account, "regions": [TARGET.region], "services": ["ec2"]}],
            "services": [{"service": "ec2", "namespace": "AWS/EC2", "metrics": [{"name": "CPUUtilization"}]}],
            "slots": 1,
            "kafka": Kafka(bootstrap=bootstrap, prefix=prefix, raw_partitions=1, ledger_partitions=1),
            "postgres": Postgres(dsn=dsn),
            "s3": S3(bucket=bucket, endpoint_url=s3_endpoint),
            **config,
        }
    )
    await setup(made)
    clock = ManualClock(NOON_S + 3600)  # also what a simulated AWS takes for now
    async with AsyncExitStack() as stack:
        archive = await stack.enter_async_context(open_archive(made.s3, clock))
        producer = Producer(bootstrap, "test")
        stack.push_async_callback(producer.close)
        sink = await PostgresSink.connect(made.postgres, clock=clock)
        stack.push_async_callback(sink.close)
        ledger = Ledger(made.postgres, "test", {"ec2": 600})
        stack.push_async_callback(ledger.close)
        sql = await open_connection(made.postgres, "test")
        stack.push_async_callback(sql.close)
        landing = Landing(
            made.kafka.topic("raw"), made.kafka.topic("dead"), sink, producer, made.limits, clock
        )
        yield Way(made, clock, archive, producer, sink, ledger, landing, sql)


__all__ = ["NAN", "NOON_S", "SINK", "TARGET", "Way", "key_of", "the_way"]
