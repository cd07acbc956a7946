"""Reading Kafka's topics from outside of any group: commits nothing, moves nobody, bounded in records and in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner

from ingest import wire
from ingest.brokers import NOT_THERE, SEE_TO_IT, client_options, remedy_of
from ingest.errors import Rejected, Transient
from ingest.log import quietly
from ingest.model import BatchId, DeadLetter, RecordPosition, Target
from ingest.ports import Record
from ingest.wire import raw_key
from shard_config.model import Kafka

RECORDS_READ_MAX = 1_000_000
"""Of one topic, in one reading."""
KAFKA_DEADLINE_S = 300.0
_FETCH_MS = 2_000


async def scan(
    kafka: Kafka,
    topic: str,
    take: Callable[[Record], bool],
    *,
    from_ms: int = 0,
    to_ms: int | None = None,
    key: bytes | None = None,
) -> None:
    """Hand the records of a topic to `take`, up to where it ends now, partition by partition, until `take` returns True.

    Records before `from_ms` are passed over, and a partition is left at its first record past `to_ms`; with `key` only the partition of
    that key is read. Belongs to no group: commits nothing and moves nobody. Raises Transient, also past `RECORDS_READ_MAX`, and where there is no
    such topic.
    """
    client = AIOKafkaConsumer(**client_options(kafka), enable_auto_commit=False, auto_offset_reset="none")
    try:
        async with asyncio.timeout(KAFKA_DEADLINE_S):
            await client.start()
            # `topics()` of aiokafka 0.14 leaves out what nobody subscribed to.
            metadata = await client._client.fetch_all_metadata()
            numbers = sorted(metadata.partitions_for_topic(topic) or ())
            if not numbers:
                raise Transient(f"topic {topic}", NOT_THERE, SEE_TO_IT)
            if key is not None:
                numbers = [DefaultPartitioner()(key, numbers, numbers)]
            left = RECORDS_READ_MAX
            for number in numbers:
                left = await _scan(client, TopicPartition(topic, number), take, from_ms, to_ms, left)
                if not left:
                    return
    except (KafkaError, OSError, TimeoutError) as error:
        what = f"{type(error).__name__} {error}".rstrip()
        raise Transient(f"kafka {kafka.bootstrap}", what, remedy_of(error)) from error
    finally:
        await quietly(client.stop())


async def _scan(
    client: AIOKafkaConsumer,
    tp: TopicPartition,
    take: Callable[[Record], bool],
    from_ms: int,
    to_ms: int | None,
    left: int,
) -> int:
    """How many more records may be read; 0 where `take` has enough."""
    client.assign([tp])
    end = (await client.end_offsets([tp]))[tp]
    here = (await client.beginning_offsets([tp]))[tp]
    if from_ms > 0:
        found = (await client.offsets_for_times({tp: from_ms}))[tp]
        here = found.offset if found is not None else end
    client.seek(tp, here)
    while here < end:
        for r in (await client.getmany(tp, timeout_ms=_FETCH_MS)).get(tp, ()):
            here = r.offset + 1
            if to_ms is not None and r.timestamp > to_ms:
                return left
            if not left:
                raise Transient(f"topic {tp.topic}", f"more than {RECORDS_READ_MAX:,} records to read")
            left -= 1
            at_ = RecordPosition(tp.topic, tp.partition, r.offset)
            if take(Record(at_, r.key or b"", r.value or b"", r.timestamp)):
                return 0
    return left


async def dead_letters(kafka: Kafka, take: Callable[[Record, DeadLetter], None]) -> None:
    """Hand over all dead letters that Kafka still has; those of a newer Headgate, which do not decode, are passed over. Raises Transient."""

    def one(record: Record) -> bool:
        with suppress(Rejected):
            take(record, wire.decode_dead_letter(record.value))
        return False

    await scan(kafka, kafka.topic("dead"), one)


async def positions_in_raw(
    kafka: Kafka, target: Target, batches: Collection[BatchId], from_ms: int, to_ms: int
) -> Mapping[BatchId, RecordPosition]:
    """Where batches of a target stand in `raw`, of those that were published in [from_ms, to_ms] and that it still has. Raises Transient."""
    wanted = set(batches)
    found: dict[BatchId, RecordPosition] = {}

    def one(record: Record) -> bool:
        batch_id = wire.batch_id_of(record.value)
        if batch_id in wanted:
            found.setdefault(batch_id, record.position)
        return len(found) == len(wanted)

    await scan(kafka, kafka.topic("raw"), one, from_ms=from_ms, to_ms=to_ms, key=raw_key(target))
    return found


def times_of(letter: DeadLetter) -> set[int]:
    """Timestamps of the points that a letter holds; none where it was cut off."""
    try:
        payload = orjson.loads(letter.payload)
        points = payload["points"] if "points" in payload else [(payload["timestamp_s"], "")]
        return {int(timestamp_s) for timestamp_s, _ in points}
    except (ValueError, KeyError, TypeError):
        return set()
