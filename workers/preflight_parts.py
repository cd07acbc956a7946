"""What Headgate needs of its own S3, Kafka and PostgreSQL, tried without leaving a trace that anybody reads.

* **S3** gets one small object beside the archive, `<prefix>preflight`, put if absent: so it is written once, however often this runs.
* **Kafka** gets nothing: a record above the topic's `max.message.bytes` is refused after the permission to write was looked at.
* **PostgreSQL** is only asked.

A check that fails is a finding; nothing is raised for it. Each part takes at most PART_TIMEOUT_S.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from botocore.exceptions import BotoCoreError, ClientError

from ingest.brokers import client_options
from ingest.errors import Fatal, HeadgateError
from ingest.preflight import Finding, State, statement
from ingest.sinks.connection import open_connection, server_of, translated
from ingest.sinks.migrate import load, pending
from ingest.sources.aws_errors import translate
from shard_config.model import S3, Config, Kafka, Postgres
from workers.names import exporter_group, landing_group, ledger_group
from workers.setup import COMPACTED, MESSAGE_BYTES_MAX, kafka_admin, partitions_of, retention_ms

PART_TIMEOUT_S: Final = 60.0
CALL_TIMEOUT_S: Final = 10.0
PROBE: Final = b"headgate preflight: this bucket can be written to\n"
PROBE_BYTES_MAX: Final = 8 * 1024 * 1024
"""A topic that takes longer records than this is not tried."""
POSTGRES_MIN: Final = 160_000
CONNECTIONS_MIN: Final = 10

_SETUP: Final = "headgate setup --config FILE creates it"


async def _bounded(part: str, subject: str, findings: Awaitable[list[Finding]]) -> list[Finding]:
    """What a part's checks found, or the one finding that they did not get through."""
    try:
        return await asyncio.wait_for(findings, PART_TIMEOUT_S)
    except TimeoutError:
        what = f"no answer within {PART_TIMEOUT_S:g} s"
        return [Finding(part, subject, "connect", State.WRONG, what, "is it reachable from here?")]
    except HeadgateError as error:
        return [
            Finding(
                part,
                subject,
                "connect",
                State.WRONG,
                error.what,
                error.remedy or "is it reachable from here?",
            )
        ]


# --- S3 -------------------------------------------------------------------------------------------------------


async def check_s3(config: Config) -> list[Finding]:
    """May we list, put if absent and get under the archive's prefix? Nothing is ever deleted, so that is not asked."""
    return await _bounded("s3", config.s3.bucket, _check_s3(config.s3))


async def _check_s3(s3: S3) -> list[Finding]:
    settings = AioConfig(
        retries={"mode": "standard", "total_max_attempts": 3},
        connect_timeout=5,
        read_timeout=CALL_TIMEOUT_S,
        s3={"addressing_style": "path"} if s3.endpoint_url else {},
    )
    subject, key = f"{s3.bucket}/{s3.prefix}", f"{s3.prefix}preflight"
    objects = f"arn:aws:s3:::{s3.bucket}/{s3.prefix}*"

    async def tried(check: str, remedy: str, ask: Callable[[], Awaitable[str]]) -> Finding:
        try:
            wrong = await ask()
        except (ClientError, BotoCoreError, OSError, TimeoutError) as error:
            failure = translate(error, f"s3 {subject}")
            if "NoSuchBucket" in failure.what:
                remedy = _SETUP
            return Finding("s3", subject, check, State.WRONG, failure.what, f"{remedy}")
        return Finding(
            "s3", subject, check, State.WRONG if wrong else State.OK, wrong, remedy if wrong else ""
        )

    async with AioSession().create_client(
        "s3", region_name=s3.region, endpoint_url=s3.endpoint_url or None, config=settings
    ) as client:

        async def put() -> bool:
            try:
                await client.put_object(Bucket=s3.bucket, Key=key, Body=PROBE, IfNoneMatch="*")
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 412:
                    return False
                raise
            return True

        async def listing() -> str:
            await client.list_objects_v2(Bucket=s3.bucket, Prefix=s3.prefix, MaxKeys=1)
            return ""

        async def first() -> str:
            await put()
            return ""

        async def again() -> str:
            return (
                "it was put twice: If-None-Match is ignored, and what is archived could be overwritten"
                if await put()
                else ""
            )

        async def get() -> str:
            answer = await client.get_object(Bucket=s3.bucket, Key=key)
            return "" if await answer["Body"].read() == PROBE else f"{key} is not what was put"

        write = f"allow {statement('s3:GetObject', 's3:PutObject', resource=objects)}"
        read = f"allow {statement('s3:ListBucket', resource=f'arn:aws:s3:::{s3.bucket}')}"
        found = [await tried("s3:ListBucket", read, listing), await tried("s3:PutObject", write, first)]
        if found[-1].state is State.OK:
            found.append(
                await tried("put if absent", "this S3 has to honour If-None-Match (AWS does)", again)
            )
            found.append(await tried("s3:GetObject", write, get))
        return found


# --- Kafka ----------------------------------------------------------------------------------------------------


async def check_kafka(config: Config) -> list[Finding]:
    """Are the topics as `headgate setup` makes them, and may we write, read and commit?"""
    return await _bounded("kafka", config.kafka.bootstrap, _check_kafka(config))


async def _check_kafka(config: Config) -> list[Finding]:
    kafka = config.kafka
    found: list[Finding] = []
    async with kafka_admin(kafka) as admin:
        # All topics are listed, for a broker may create one that is asked for by its name.
        there = set(await admin.list_topics())
        for name, partitions in partitions_of(config).items():
            topic = f"{kafka.prefix}.{name}"
            if topic not in there:
                found.append(Finding("kafka", topic, "topic", State.WRONG, "is not there", _SETUP))
                continue
            described = (await admin.describe_topics([topic]))[0]
            settings = await _settings(admin, topic)
            kept_ms = None if name in COMPACTED else retention_ms(kafka)[name]
            wrong = _topic_is_wrong(described, settings, partitions, kafka, kept_ms)
            state, remedy = (State.WRONG, wrong[1]) if wrong else (State.OK, "")
            found.append(Finding("kafka", topic, "topic", state, wrong[0] if wrong else "", remedy))
            found.append(
                await _may_write(kafka, topic, int(settings.get("max.message.bytes", PROBE_BYTES_MAX)))
            )
            found.append(await _may_read(kafka, topic))
        groups = exporter_group(kafka), landing_group(kafka), ledger_group(kafka)
        return found + [await _has_positions(admin, group) for group in groups]


async def _settings(admin: AIOKafkaAdminClient, topic: str) -> dict[str, str]:
    """A topic's settings by name; empty where we may not see them."""
    [answer] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    code, _, _, _, entries = answer.resources[0]
    return {} if code else {entry[0]: entry[1] for entry in entries}


def _topic_is_wrong(
    described: dict[str, Any],
    settings: dict[str, str],
    partitions: int,
    kafka: Kafka,
    kept_ms: int | None,
) -> tuple[str, str] | None:
    """(what, remedy) of the first thing that is not as `headgate setup` makes it. `kept_ms` is None of what is compacted."""
    topic, there = described["topic"], len(described["partitions"])
    if there != partitions:
        what = f"has {there} partitions, and the configuration says {partitions}"
        return what, "the number never changes within a name: set it back, or choose another kafka.prefix"
    copies = min(len(p["replicas"]) for p in described["partitions"])
    if copies < kafka.replication:
        return (
            f"has {copies} replicas, and kafka.replication is {kafka.replication}",
            "reassign its partitions",
        )
    alter = f"kafka-configs.sh --alter --entity-type topics --entity-name {topic} --add-config"
    if int(settings.get("max.message.bytes", MESSAGE_BYTES_MAX)) < MESSAGE_BYTES_MAX:
        what = f"takes records of {settings['max.message.bytes']} bytes only"
        return what, f"{alter} max.message.bytes={MESSAGE_BYTES_MAX}"
    compacted = "compact" in settings.get("cleanup.policy", "")
    if kept_ms is None:
        forgets = not compacted and bool(settings)
        return (
            ("is not compacted, which forgets records", f"{alter} cleanup.policy=compact")
            if forgets
            else None
        )
    if compacted:
        return "is compacted, which loses records", f"{alter} cleanup.policy=delete"
    if 0 <= int(settings.get("retention.ms", -1)) < kept_ms:
        return f"keeps records {settings['retention.ms']} ms only", f"{alter} retention.ms={kept_ms}"
    return None


async def _may_write(kafka: Kafka, topic: str, message_bytes_max: int) -> Finding:
    size = message_bytes_max + 65_536
    if size > PROBE_BYTES_MAX:
        what = (
            f"it takes records of {message_bytes_max} bytes, and one that it refuses would be too long to try"
        )
        return Finding("kafka", topic, "write", State.UNPROVED, what)
    producer = AIOKafkaProducer(
        **client_options(kafka),
        max_request_size=size + 65_536,
        request_timeout_ms=int(CALL_TIMEOUT_S * 1000),
    )
    try:
        await producer.start()
        await asyncio.wait_for(producer.send_and_wait(topic, b"\0" * size, partition=0), CALL_TIMEOUT_S)
    except MessageSizeTooLargeError:
        return Finding("kafka", topic, "write", State.OK)
    except (KafkaError, OSError, TimeoutError) as error:
        return _refused(topic, "write", error, f"--operation Write --topic {topic}")
    finally:
        await producer.stop()
    what = "took a record above its max.message.bytes; it is no record of ours, and consumers put it aside"
    return Finding("kafka", topic, "write", State.UNPROVED, what)


async def _may_read(kafka: Kafka, topic: str) -> Finding:
    consumer = AIOKafkaConsumer(**client_options(kafka), enable_auto_commit=False)
    partition = TopicPartition(topic, 0)
    try:
        await consumer.start()
        consumer.assign([partition])
        await consumer.seek_to_end(partition)
        await asyncio.wait_for(consumer.getmany(partition, timeout_ms=300), CALL_TIMEOUT_S)
    except (KafkaError, OSError, TimeoutError) as error:
        return _refused(topic, "read", error, f"--operation Read --topic {topic}")
    finally:
        await consumer.stop()
    return Finding("kafka", topic, "read", State.OK)


async def _has_positions(admin: AIOKafkaAdminClient, group: str) -> Finding:
    try:
        offsets = await asyncio.wait_for(admin.list_consumer_group_offsets(group), CALL_TIMEOUT_S)
    except (KafkaError, OSError, TimeoutError) as error:
        return _refused(group, "group", error, f"--operation Read --group {group}")
    if not offsets:
        return Finding("kafka", group, "group", State.WRONG, "has no positions", _SETUP)
    return Finding("kafka", group, "group", State.OK)


def _refused(subject: str, check: str, error: Exception, acl: str) -> Finding:
    remedy = f"kafka-acls.sh --add --allow-principal User:<ours> {acl}"
    denied = "Authorization" in type(error).__name__
    return Finding(
        "kafka",
        subject,
        check,
        State.WRONG,
        f"{type(error).__name__}: {error}"[:300],
        remedy if denied else "is the broker well?",
    )


# --- PostgreSQL -----------------------------------------------------------------------------------------------


async def check_postgres(config: Config) -> list[Finding]:
    """Is it new enough, may we create what the schema needs, is the schema this version's, and is there room for our connections?"""
    return await _bounded("postgres", server_of(config.postgres), _check_postgres(config.postgres))


_STATE: Final = """SELECT current_setting('server_version_num')::int AS version, pg_is_in_recovery() AS standby, current_user AS me,
    current_database() AS db, has_schema_privilege(current_schema(), 'CREATE') AS may_create,
    to_regclass('schema_migrations') IS NOT NULL AS migrated,
    (SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class c WHERE c.oid = to_regclass('samples')) AS owns,
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connections_free"""


@asynccontextmanager
async def _connected(postgres: Postgres) -> AsyncIterator[asyncpg.Connection]:
    connection = await open_connection(postgres, "headgate preflight")
    try:
        with translated(f"postgres {server_of(postgres)}"):
            yield connection
    finally:
        connection.terminate()


async def _check_postgres(postgres: Postgres) -> list[Finding]:
    subject = server_of(postgres)
    async with _connected(postgres) as connection:
        is_ = await connection.fetchrow(_STATE)
        applied = (
            await connection.fetch("SELECT name, checksum FROM schema_migrations") if is_["migrated"] else []
        )

    def finding(check: str, wrong: str, remedy: str, right: str = "") -> Finding:
        return Finding(
            "postgres",
            subject,
            check,
            State.WRONG if wrong else State.OK,
            wrong or right,
            remedy if wrong else "",
        )

    old = f"is version {is_['version'] // 10_000}" if is_["version"] < POSTGRES_MIN else ""
    standby = "is a standby, and takes no writes" if is_["standby"] else ""
    rights = "" if is_["may_create"] else f"{is_['me']} may not create tables"
    if is_["owns"] is False:
        rights = f"{is_['me']} does not own the tables, and cannot create their partitions"
    free = is_["connections_free"]
    few = f"{free} connections are free" if free < CONNECTIONS_MIN else ""
    return [
        finding("version", old or standby, "PostgreSQL 16 or newer, the primary", "no extension is needed; its disk cannot be seen from here"),
        finding("rights", rights, f"GRANT CREATE ON SCHEMA public TO {is_['me']}; and let it run headgate setup, so that it owns the tables"),
        finding("schema", _schema_is_wrong({r["name"]: r["checksum"] for r in applied}), "headgate setup --config FILE applies the migrations"),
        finding("connections", few, "raise max_connections: each consumer takes three, the coordinator and each command one or two"),
    ]  # fmt: skip


def _schema_is_wrong(applied: dict[str, str]) -> str:
    try:
        todo = pending(load(), applied)
    except Fatal as error:
        return f"{error.what} ({error.remedy})"
    return f"{len(todo)} migrations are to be applied" if todo else ""
