"""A consumer: lands `raw` in PostgreSQL, and projects `ledger` onto the ledger's tables. Two groups, one process.

* It goes on where the store says, not where Kafka's group does; Kafka's commit is for those who watch lag.
* While PostgreSQL is away it waits, holding at most what it polled last: back-pressure is to Kafka, not to memory.
* A refused position (another owner has the partition) ends the process: a fresh one rejoins with nothing in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
from prometheus_client import Counter, Gauge, Histogram

from ingest.clock import Clock, SystemClock
from ingest.errors import Fatal, Transient
from ingest.group import Consumer
from ingest.landing import Landing
from ingest.ledger import Ledger
from ingest.log import Producer, cluster_id
from ingest.ports import Record
from ingest.projection import Projection
from ingest.schedule import grids_of
from ingest.sinks.postgres import SERIES_REMEMBERED_MAX, PostgresSink
from shard_config.load import load
from shard_config.model import Config
from workers import local
from workers.aside import DEAD
from workers.bounds import BOUNDS
from workers.lifecycle import Lifecycle, add_worker_arguments, run_worker
from workers.members import Members
from workers.names import landing_group, ledger_group
from workers.reading import Reader, cut_short
from workers.reload import Settings
from workers.rolling import Rolling
from workers.upkeep import Upkeep

_log = structlog.get_logger()

LANDED = Counter("headgate_points_landed_total", "Points in landed batches, those known already included.")
BATCHES = Counter("headgate_batches_landed_total", "Landed batches; by the way they took.", ["way"])
for _way in ("known", "copied", "merged"):
    BATCHES.labels(way=_way)  # a share of them needs them to be there before
LAND_SECONDS = Histogram(
    "headgate_land_seconds", "One landing transaction.", buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
)
LAG = Gauge("headgate_consumer_lag_records", "Records not landed yet; high: add consumers.", ["topic"])


def _polled(lifecycle: Lifecycle, consumer: Consumer) -> None:
    lifecycle.ready = True
    LAG.labels(topic=consumer.topic).set(consumer.lag())


def landing_reader(config: Config, name: str, landing: Landing, sink: PostgresSink, clock: Clock) -> Reader:
    """The reader of `raw`."""
    topic = config.kafka.topic("raw")

    async def open_partitions(consumer: Consumer, partitions: Sequence[int]) -> dict[int, int]:
        await sink.claim(topic, partitions)
        cluster = await cluster_id(config.kafka)
        return await landing.open(partitions, await consumer.bounds(partitions), cluster=cluster)

    async def close_partitions() -> None:
        landing.close()
        await sink.claim(topic, [])

    async def take(records: Sequence[Record]) -> dict[int, int]:
        started_s = clock.monotonic_s()
        done = await landing.land(records)
        LAND_SECONDS.observe(clock.monotonic_s() - started_s)
        LANDED.inc(done.landed.points)
        BATCHES.labels(way="known").inc(done.landed.skipped_batches)
        way = "copied" if done.landed.copied else "merged"
        BATCHES.labels(way=way).inc(done.landed.batches - done.landed.skipped_batches)
        DEAD.labels(kind="record").inc(done.dead_records)
        DEAD.labels(kind="point").inc(done.dead_points)
        return done.next_offsets

    return Reader(
        lambda reader: _consumer(config, topic, landing_group(config.kafka), name, clock, reader),
        take,
        open_partitions,
        close_partitions,
        polled=_polled,
    )


def ledger_reader(config: Config, name: str, projection: Projection, clock: Clock) -> Reader:
    """The reader of `ledger`."""
    topic = config.kafka.topic("ledger")

    async def open_partitions(consumer: Consumer, partitions: Sequence[int]) -> dict[int, int]:
        cluster = await cluster_id(config.kafka)
        return await projection.open(partitions, await consumer.bounds(partitions), cluster=cluster)

    async def close_partitions() -> None:
        projection.close()

    async def take(records: Sequence[Record]) -> Mapping[int, int]:
        done = await projection.take(records)
        DEAD.labels(kind="record").inc(done.dead_records)
        return done.next_offsets

    return Reader(
        lambda reader: _consumer(config, topic, ledger_group(config.kafka), name, clock, reader),
        take,
        open_partitions,
        close_partitions,
        polled=_polled,
    )


def _consumer(config: Config, topic: str, group: str, name: str, clock: Clock, reader: Reader) -> Consumer:
    return Consumer(
        config.kafka,
        topic,
        group,
        client_id=name,
        instance_id=name,
        clock=clock,
        session_timeout_s=config.kafka.session_timeout_s,
        assigned=reader.assigned,
        revoked=reader.revoked,
    )


def settling_of(config: Config) -> dict[str, int]:
    """Settling times by service: of all services, whether or not an account of the organization is known to have them."""
    jobs = {job.name: 0 for job in config.exposition}
    return {**jobs, **{profile.service: profile.settling_s for profile in config.services}}


async def serve(config: Config, name: str, lifecycle: Lifecycle, path: Path | None = None) -> None:
    """Wire one consumer and run it until told to stop. `config` is what stands in the file `path`, which is watched."""
    clock = SystemClock(config.run.clock_offset_s)
    settings = Settings(config, Members(config.s3, clock), clock, path)
    config = await settings.start()
    settling_s = settling_of(config)
    producer = Producer(config.kafka, name)
    sink = await _connect(config, clock, lifecycle)
    projected = Ledger(config.postgres, f"headgate {name} ledger", settling_s)
    kept = Ledger(config.postgres, f"headgate {name} upkeep", settling_s)
    rolled = Ledger(config.postgres, f"headgate {name} rollups", settling_s)
    try:
        landing = Landing(
            config.kafka.topic("raw"),
            config.kafka.topic("dead"),
            sink,
            producer,
            config.landing_limits,
            clock,
            targets={str(target) for target in grids_of(config)},
        )
        projection = Projection(
            config.kafka.topic("ledger"),
            config.kafka.topic("dead"),
            projected,
            producer,
            config.limits.dead_share_max,
            clock,
            targets={str(target) for target in grids_of(config)},
        )
        upkeep = Upkeep(kept, config, clock)
        rolling = Rolling(rolled, config, clock)

        async def apply(changed: Config) -> None:
            targets = {str(target) for target in grids_of(changed)}
            landing.configure(changed.landing_limits, targets)
            projection.configure(changed.limits.dead_share_max, targets)
            # Receipts of what was removed may still come.
            projected.settling_s = kept.settling_s = {**kept.settling_s, **settling_of(changed)}
            upkeep.configure(changed, whole=settings.whole)
            rolling.configure(changed)

        await apply(config)
        BOUNDS.watch_tables()
        BOUNDS.watch("series_remembered", lambda: sink.series_remembered, lambda: SERIES_REMEMBERED_MAX)
        async with asyncio.TaskGroup() as group:
            works = [
                group.create_task(landing_reader(config, name, landing, sink, clock).run(lifecycle)),
                group.create_task(ledger_reader(config, name, projection, clock).run(lifecycle)),
                group.create_task(upkeep.run(lifecycle)),
                group.create_task(rolling.run(lifecycle)),
            ]
            group.create_task(settings.run(lifecycle, apply))
            group.create_task(cut_short(works, lifecycle))
    finally:
        await producer.close()
        await sink.close()
        await projected.close()
        await kept.close()
        await rolled.close()


async def _connect(config: Config, clock: Clock, lifecycle: Lifecycle) -> PostgresSink:
    while True:
        try:
            return await PostgresSink.connect(config.postgres, sink_name="postgres", clock=clock)
        except Transient as error:
            _log.warning("postgres_not_reachable", error=str(error))
            if await lifecycle.pause(error.retry_after_s):
                raise


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "consumer",
        help="run one consumer",
        description="Runs one consumer: it validates raw batches and lands them in PostgreSQL, puts aside what is bad, and folds plans and "
        "receipts into the ledger. Run as many as you like, up to the partitions of the raw topic.",
    )
    add_worker_arguments(parser)
    parser.add_argument(
        "--name", default=os.environ.get("HEADGATE_CONSUMER"), help="its stable name, as consumer-1"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.name:
        raise Fatal("consumer", "has no name", "give --name NAME or set HEADGATE_CONSUMER")
    path = local.config_path(args.config)
    config = load(path, environ=os.environ)
    return run_worker(
        args.name,
        lambda lifecycle: serve(config, args.name, lifecycle, path),
        host=args.host,
        metrics_port=args.metrics_port,
    )
