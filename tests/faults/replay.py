"""What was published, landed again beside the live consumers: from Kafka and from the archive, by the live path's own code."""

from __future__ import annotations

from collections.abc import Sequence

from aiokafka import AIOKafkaConsumer, TopicPartition

from ingest.archive import open_archive
from ingest.clock import SystemClock
from ingest.landing import Landing
from ingest.model import RecordPosition
from ingest.ports import Record
from ingest.sinks.postgres import PostgresSink
from tests.faults.stage import Stage

RECORDS_A_LANDING = 10


async def archive_all(stage: Stage) -> None:
    """Put every look where an exporter puts it."""
    async with open_archive(stage.config.s3, SystemClock()) as archive:
        for look in stage.truth.looks:
            await archive.put(look.archived)


async def replay_archive(stage: Stage) -> None:
    """Land every look that the archive holds."""
    values: list[bytes] = []
    async with open_archive(stage.config.s3, SystemClock()) as archive:
        for look in stage.truth.looks:
            archived = await archive.get(look.archived.receipt.archive_key)
            assert archived is not None
            values += [payload.value for payload in archived.payloads]
    records = [Record(RecordPosition("archive", 0, i), b"", value, 0) for i, value in enumerate(values)]
    await _land(stage, "archive", "replay of the archive", records)


async def replay_kafka(stage: Stage) -> None:
    """Land everything that `raw` holds now."""
    topic = stage.config.kafka.topic("raw")
    asked = [TopicPartition(topic, p) for p in range(stage.config.kafka.raw_partitions)]
    client = AIOKafkaConsumer(bootstrap_servers=stage.config.kafka.bootstrap, enable_auto_commit=False)
    await client.start()
    records: list[Record] = []
    try:
        client.assign(asked)
        await client.seek_to_beginning(*asked)
        for tp, end in (await client.end_offsets(asked)).items():
            while await client.position(tp) < end:
                for r in (await client.getmany(tp, timeout_ms=1000)).get(tp, ()):
                    at = RecordPosition(topic, r.partition, r.offset)
                    records.append(Record(at, r.key or b"", r.value or b"", r.timestamp))
    finally:
        await client.stop()
    await _land(stage, topic, "replay of kafka", records)


async def _land(stage: Stage, topic: str, sink_name: str, records: Sequence[Record]) -> None:
    kafka, clock = stage.config.kafka, SystemClock(stage.config.run.clock_offset_s)
    sink = await PostgresSink.connect(stage.config.postgres, sink_name=sink_name, clock=clock)
    try:
        partitions = sorted({r.position.partition for r in records})
        await sink.init_positions(topic, partitions)
        landing = Landing(topic, kafka.topic("dead"), sink, stage.producer, stage.config.limits, clock)
        await landing.open(partitions, {p: (0, len(records)) for p in partitions})
        for at in range(0, len(records), RECORDS_A_LANDING):
            await landing.land(records[at : at + RECORDS_A_LANDING])
    finally:
        await sink.close()
