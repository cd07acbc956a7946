"""What stands on a topic, read past every proxy and group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from aiokafka import AIOKafkaConsumer, TopicPartition

from shard_config.model import Config

Topic = Literal["collect", "raw", "ledger", "dead", "shards"]


async def records_of(
    config: Config, topic: Topic, since: Mapping[int, int] | None = None
) -> dict[tuple[int, int], bytes]:
    """The values by (partition, offset), from the first record that is there, or from the offsets in `since`, to the end of now."""
    client = AIOKafkaConsumer(bootstrap_servers=config.kafka.bootstrap, enable_auto_commit=False)
    try:
        await client.start()
        asked, ends = await _ends(client, config.kafka.topic(topic))
        client.assign(asked)
        starts = await client.beginning_offsets(asked)
        found: dict[tuple[int, int], bytes] = {}
        for tp in asked:
            client.seek(tp, max(starts[tp], (since or {}).get(tp.partition, 0)))
            while await client.position(tp) < ends[tp]:
                got = await client.getmany(tp, timeout_ms=1000)
                found |= {(tp.partition, r.offset): r.value or b"" for some in got.values() for r in some}
        return found
    finally:
        await client.stop()


async def ends_of(config: Config, topic: Topic) -> dict[int, int]:
    """Partition → the offset that the next record will have."""
    client = AIOKafkaConsumer(bootstrap_servers=config.kafka.bootstrap, enable_auto_commit=False)
    try:
        await client.start()
        return {tp.partition: end for tp, end in (await _ends(client, config.kafka.topic(topic)))[1].items()}
    finally:
        await client.stop()


async def _ends(
    client: AIOKafkaConsumer, topic: str
) -> tuple[list[TopicPartition], dict[TopicPartition, int]]:
    # Asked of the cluster: what the client knows of a topic that it has not subscribed to comes a little later.
    metadata = await client._client.fetch_all_metadata()
    partitions = metadata.partitions_for_topic(topic)
    assert partitions, f"there is no topic {topic}"
    asked = [TopicPartition(topic, p) for p in sorted(partitions)]
    return asked, await client.end_offsets(asked)
