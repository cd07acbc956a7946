"""Slots on a real Kafka: they grow while no exporter runs, and never shrink."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from ingest.errors import Fatal
from ingest.membership import GroupLook
from shard_config.model import S3, Config, Kafka, Postgres
from workers import coordinator, plan, setup
from workers.lifecycle import Lifecycle
from workers.names import exporter_group


@pytest.fixture
def config(kafka_bootstrap: str, topic_prefix: str, database: str, bucket: str, s3_endpoint: str) -> Config:
    return Config(
        slots=3,
        kafka=Kafka(bootstrap=kafka_bootstrap, prefix=topic_prefix, raw_partitions=1, ledger_partitions=1),
        postgres=Postgres(dsn=database),
        s3=S3(bucket=bucket, endpoint_url=s3_endpoint),
    )


def with_slots(config: Config, slots: int) -> Config:
    return config.model_copy(update={"slots": slots})


async def committed(config: Config, slots: int) -> list[int | None]:
    client = AIOKafkaConsumer(
        bootstrap_servers=config.kafka.bootstrap,
        group_id=exporter_group(config.kafka),
        enable_auto_commit=False,
    )
    await client.start()
    try:
        topic = config.kafka.topic("collect")
        return [await client.committed(TopicPartition(topic, slot)) for slot in range(slots)]
    finally:
        await client.stop()


async def test_slots_grow_with_positions_and_shrinking_stops_setup_and_coordinator(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    await setup.setup(config)
    doubts = (await plan.ask(config)).doubts
    assert doubts == ("no plan is kept yet: the one before is that of the configuration as it is",)
    more = with_slots(config, 5)
    with pytest.raises(Fatal, match=r"has 3 partitions, and 5 slots are configured \(run `headgate setup`\)"):
        await setup.check_slots(more)

    async def busy(*_: object) -> GroupLook:
        return GroupLook(True, {"exporter-1": (0, 1, 2)}, {})

    with monkeypatch.context() as patched:
        patched.setattr(setup, "look_at_group", busy)
        with pytest.raises(Fatal, match="slots grow while no exporter runs"):
            await setup.setup(more)
    grown = f"topic {config.kafka.topic('collect')} grown to 5 partitions"
    assert grown in await setup.setup(more)
    assert await setup.setup(more) == []
    assert await committed(config, 5) == [0] * 5
    await setup.check_slots(more)

    with pytest.raises(Fatal, match="slots never shrink: set it to 5"):
        await setup.setup(config)
    async with asyncio.timeout(30):
        with pytest.raises(Fatal, match="slots never shrink: set it to 5"):
            await coordinator.serve(config, Lifecycle())
