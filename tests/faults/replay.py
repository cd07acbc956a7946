"""What was published, landed again beside the live consumers: from Kafka and from the archive, as `headgate backfill --rebuild` does."""

from __future__ import annotations

from ingest.archive import open_archive
from ingest.archive_replay import LANES, ArchiveReplay
from ingest.clock import SystemClock
from ingest.landing import Landing
from ingest.replay import KafkaReplay, Replay, Scope
from ingest.sinks.postgres import PostgresSink
from tests.faults.stage import Stage
from tests.faults.truth import LOOKBACK_S, START_S
from workers.backfilling import Done, replay
from workers.pace import Pace


async def archive_all(stage: Stage) -> None:
    """Put every look where an exporter puts it."""
    async with open_archive(stage.config.s3, SystemClock()) as archive:
        for look in stage.truth.looks:
            await archive.put(look.archived)


async def replay_archive(stage: Stage) -> Done:
    """Land every look that the archive holds, whether or not it has landed."""
    async with open_archive(stage.config.s3, SystemClock()) as archive:
        until_s = stage.truth.end_s + LOOKBACK_S + 1
        return await _land(stage, ArchiveReplay(archive, range(LANES), _scope(stage), until_s))


async def replay_kafka(stage: Stage) -> Done:
    """Land every batch that `raw` holds now, whether or not it has landed."""
    kafka = stage.config.kafka
    partitions = range(kafka.raw_partitions)
    source = KafkaReplay(
        kafka.bootstrap, stage.raw, partitions, _scope(stage), 0, SystemClock(), stage.config.limits
    )
    return await _land(stage, source)


def _scope(stage: Stage) -> Scope:
    return Scope(START_S, stage.truth.end_s)


async def _land(stage: Stage, source: Replay) -> Done:
    kafka, clock = stage.config.kafka, SystemClock(stage.config.run.clock_offset_s)
    sink = await PostgresSink.connect(
        stage.config.postgres, clock=clock, reader=f"replay of {source.topic}", rebuilding=True
    )
    done = Done()
    try:
        landing = Landing(source.topic, kafka.topic("dead"), sink, stage.producer, stage.config.limits, clock)
        await replay(source, sink, landing, Pace(0, _nobody, clock), clock, done, lambda *_: None)
    finally:
        await source.close()
        await sink.close()
    return done


async def _nobody() -> None:
    """Whom a replay lets go first: it shall meet the live consumers."""
