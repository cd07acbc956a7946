"""`headgate setup`: topics, positions, the store's schema and the bucket. Safe to run at any time, any number of times.

A topic that is there keeps its partitions: their number never changes within a topic's name, for keys would move. Only `collect` grows, whose
records are put into their slot by the planner: with more `slots`, while no exporter runs. Slots never shrink: tasks may wait in those that
would be left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import structlog
from aiobotocore.session import get_session
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.errors import KafkaConnectionError, KafkaError, TopicAlreadyExistsError, for_code
from botocore.exceptions import BotoCoreError, ClientError

from ingest import ledger
from ingest.brokers import NOT_THERE, SEE_TO_IT, client_options, remedy_of, why_not
from ingest.clock import SystemClock
from ingest.errors import Fatal, Transient
from ingest.forwarding import start_ms
from ingest.log import commit_start
from ingest.membership import look_at_group
from ingest.sinks.migrate import is_behind, migrate
from ingest.sinks.postgres import PostgresSink
from ingest.sinks.roles import grant
from shard_config.model import S3, Config, Kafka
from workers import local
from workers.lifecycle import Lifecycle
from workers.names import exporter_group, landing_group, ledger_group, remote_write_group
from workers.snapshot import before_upgrade

_log = structlog.get_logger()

COMPACTED = frozenset({"shards"})
"""Of these Kafka keeps the last record of each key, for ever."""
MESSAGE_BYTES_MAX = 1_048_588
"""Of one record, in every topic."""
REPLICATION_SAFE = 3
"""Copies from which a broker may be away and two still have to have what is acknowledged."""


def retention_ms(kafka: Kafka) -> dict[str, int]:
    """How long Kafka keeps what, by topic without the prefix. The archive keeps raw data for ever."""
    return {
        "collect": 3 * 86_400_000,
        "raw": kafka.raw_retention_s * 1000,
        "ledger": 30 * 86_400_000,
        "dead": 30 * 86_400_000,
    }


def partitions_of(config: Config) -> dict[str, int]:
    """How many partitions each topic has, by its name without the prefix."""
    return {
        "collect": config.slots,
        "raw": config.kafka.raw_partitions,
        "ledger": config.kafka.ledger_partitions,
        "dead": 1,
        "shards": 1,
    }


async def setup(config: Config) -> list[str]:
    """Create what is missing; returns what was done, a line each. Raises Transient, Fatal."""
    clock = SystemClock(config.run.clock_offset_s)
    done = []
    if await is_behind(config.postgres):
        done += await before_upgrade(config, clock)
    done += [f"migration {name}" for name in await migrate(config.postgres)]
    if await grant(config.postgres):
        _log.info("roles_granted")
    done += await create_topics(config)
    kafka = config.kafka
    await commit_start(kafka, kafka.topic("collect"), exporter_group(kafka), config.slots)
    for sink_name, group, topic, count in (
        ("postgres", landing_group(kafka), kafka.topic("raw"), kafka.raw_partitions),
        (ledger.SINK, ledger_group(kafka), kafka.topic("ledger"), kafka.ledger_partitions),
    ):
        await commit_start(kafka, topic, group, count)
        sink = await PostgresSink.connect(config.postgres, sink_name=sink_name, clock=clock)
        try:
            await sink.init_positions(topic, range(count))
        finally:
            await sink.close()
    await commit_starts(config)
    if await _create_bucket(config.s3):
        done.append(f"bucket {config.s3.bucket}")
    return done


async def create_topics(config: Config) -> list[str]:
    """Create what is missing; returns what was done, a line each. Raises Transient, Fatal."""
    done = []
    async with kafka_admin(config.kafka) as admin:
        for name, count in partitions_of(config).items():
            topic = f"{config.kafka.prefix}.{name}"
            if name == "collect" and await _grow(admin, config):
                done.append(f"topic {topic} grown to {count} partitions")
            if await _create_topic(admin, topic, count, config.kafka.replication, _kept(config.kafka, name)):
                done.append(f"topic {topic} with {count} partitions")
    return done


async def commit_starts(config: Config) -> None:
    """Say where the groups of receivers start that never did: with what these still take."""
    kafka, now_ms = config.kafka, SystemClock(config.run.clock_offset_s).now_ms()
    for receiver in config.remote_write.receivers if config.remote_write else ():
        since_ms = start_ms(receiver.out_of_order_window_s, now_ms, config.run.clock_offset_s)
        group = remote_write_group(kafka, receiver.name)
        await commit_start(kafka, kafka.topic("raw"), group, kafka.raw_partitions, since_ms)


@contextlib.asynccontextmanager
async def kafka_admin(kafka: Kafka) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**client_options(kafka))
    try:
        await admin.start()
        yield admin
    except KafkaConnectionError as error:
        what = f"{type(error).__name__} {error}"
        raise Transient(f"kafka {kafka.bootstrap}", what, await why_not(kafka)) from error
    except (KafkaError, OSError) as error:
        what = f"{type(error).__name__} {error}"
        raise Transient(f"kafka {kafka.bootstrap}", what, remedy_of(error)) from error
    finally:
        await admin.close()


def _kept(kafka: Kafka, name: str) -> dict[str, str]:
    """A topic's settings that say how long it is kept."""
    if name in COMPACTED:
        return {"cleanup.policy": "compact"}
    return {"retention.ms": str(retention_ms(kafka)[name])}


async def _create_topic(
    admin: AIOKafkaAdminClient, topic: str, partitions: int, replication: int, kept: dict[str, str]
) -> bool:
    """True where it was created. Raises Fatal where it is there with another number of partitions."""
    new = NewTopic(
        topic,
        partitions,
        replication,
        topic_configs=kept
        | {"max.message.bytes": str(MESSAGE_BYTES_MAX)}
        # Kafka's default is 1: what the last broker that is left acknowledges would go with it.
        | ({"min.insync.replicas": "2"} if replication >= REPLICATION_SAFE else {}),
    )
    try:
        answer = await admin.create_topics([new])
    except TopicAlreadyExistsError:
        created = False
    else:
        code = answer.topic_errors[0][1]
        created = code == 0
        if code not in (0, TopicAlreadyExistsError.errno):
            raise for_code(code)(f"topic {topic}: {answer.topic_errors[0]}")
    if not created:
        described = await admin.describe_topics([topic])
        there = len(described[0]["partitions"])
        if there != partitions:
            raise Fatal(
                f"topic {topic}",
                f"has {there} partitions, and the configuration says {partitions}",
                "the number never changes within a name: set it back, or choose another kafka.prefix",
            )
    return created


async def _grow(admin: AIOKafkaAdminClient, config: Config) -> bool:
    """Give `collect` the slots that are missing; False where none is. Raises Fatal where exporters run, or where there are more already."""
    if await _slots_there(admin, config) in (None, config.slots):
        return False
    group = exporter_group(config.kafka)
    if (await look_at_group(admin, group)).members:
        # A slot that an exporter meets before it has a position looks like one that was lost.
        raise Fatal(
            f"group {group}", "has members, and slots grow while no exporter runs", "stop the exporters, and run `headgate setup` again"
        )  # fmt: skip
    topic = config.kafka.topic("collect")
    await admin.create_partitions({topic: NewPartitions(config.slots)})
    return True


async def _slots_there(admin: AIOKafkaAdminClient, config: Config) -> int | None:
    """Partitions of `collect`; None where it is not there. Raises Fatal where they are more than the configuration's slots."""
    topic = config.kafka.topic("collect")
    # All topics are listed, for a broker may create one that is asked for by its name.
    if topic not in await admin.list_topics():
        return None
    there = len((await admin.describe_topics([topic]))[0]["partitions"])
    if there > config.slots:
        raise Fatal(
            f"topic {topic}",
            f"has {there} partitions, and the configuration says slots: {config.slots}",
            f"slots never shrink: set it to {there}, or choose another kafka.prefix",
        )
    return there


async def check_slots(config: Config) -> None:
    """Raise Fatal unless `collect` has a partition for each configured slot, and no more. Raises Transient."""
    async with kafka_admin(config.kafka) as admin:
        there = await _slots_there(admin, config)
    if there is None:
        raise Fatal(f"topic {config.kafka.topic('collect')}", NOT_THERE, SEE_TO_IT)
    if there != config.slots:
        what = f"has {there} partitions, and {config.slots} slots are configured"
        raise Fatal(f"topic {config.kafka.topic('collect')}", what, "run `headgate setup`")


async def until_slots_fit(config: Config, lifecycle: Lifecycle) -> None:
    """`check_slots`, again and again until Kafka answers, or until told to stop. Raises Fatal."""
    while not lifecycle.stop.is_set():
        try:
            await check_slots(config)
            return
        except Transient as error:
            _log.warning("slots_not_known", error=str(error))
            await lifecycle.pause(error.retry_after_s)


async def _create_bucket(s3: S3) -> bool:
    session = get_session()
    endpoint = s3.endpoint_url or None
    try:
        async with session.create_client("s3", region_name=s3.region, endpoint_url=endpoint) as client:
            try:
                await client.head_bucket(Bucket=s3.bucket)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
                await client.create_bucket(Bucket=s3.bucket)
                return True
    except (ClientError, BotoCoreError) as error:
        raise Transient(
            f"bucket {s3.bucket}", str(error), "check s3.* and the permissions on the bucket"
        ) from error
    return False


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "setup",
        help="create topics, positions, the store's schema and the bucket",
        description="Creates what is missing in Kafka, PostgreSQL and S3, and says what it did. Run it before the first start and at each "
        "upgrade (the Helm chart does); running it again changes nothing.",
    )
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    for line in asyncio.run(setup(config)) or ["everything is there"]:
        print(line)
    return 0
