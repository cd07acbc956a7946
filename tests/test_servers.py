"""Servers as processes: they answer, they restart with their data, and they leave nothing behind."""

from __future__ import annotations

import aiokafka
import asyncpg
import botocore.session
from aiokafka.admin import AIOKafkaAdminClient, NewTopic


async def test_a_topic_can_be_created_and_written_at_once(kafka_bootstrap: str, topic_prefix: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(f"{topic_prefix}.raw", num_partitions=2, replication_factor=1)])
    finally:
        await admin.close()
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, acks="all")
    await producer.start()
    try:
        written = await producer.send_and_wait(f"{topic_prefix}.raw", b"x", partition=1)
    finally:
        await producer.stop()
    assert (written.partition, written.offset) == (1, 0)


async def test_each_test_has_an_empty_database_of_its_own(database: str, postgres_dsn: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        assert (
            await connection.fetchval(
                "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
            )
            == 0
        )
        assert await connection.fetchval("SELECT current_database()") != postgres_dsn.rpartition("/")[2]
    finally:
        await connection.close()


def test_an_object_is_put_only_once_where_absent_is_asked_for(s3_endpoint: str, bucket: str) -> None:
    client = botocore.session.get_session().create_client("s3", endpoint_url=s3_endpoint)
    try:
        client.put_object(Bucket=bucket, Key="a", Body=b"first", IfNoneMatch="*")
        try:
            client.put_object(Bucket=bucket, Key="a", Body=b"second", IfNoneMatch="*")
            status = 200
        except client.exceptions.ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        assert (status, client.get_object(Bucket=bucket, Key="a")["Body"].read()) == (412, b"first")
    finally:
        client.close()
