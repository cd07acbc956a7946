"""What must hold while everything is at work, and not only in the end: what heals itself would hide that it was broken (I1, I3, and an archive that is whole)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import numpy as np
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from ingest import wire
from ingest.archive import open_archive
from ingest.aws_session import new_session
from ingest.batch import without_series
from ingest.clock import SystemClock
from ingest.errors import Rejected
from ingest.model import Batch, bytes_of
from shard_config.model import Config
from tests.faults.field import Field
from tests.faults.log import records_of
from workers.names import landing_group
from workers.servers import LOCAL_AWS_ENVIRONMENT

WATCH_S = 2.0
ASKED_S = 20.0
"""Longer nobody waits for an answer: servers are down now and then."""
ROWS_CHECKED_MAX = 200
"""Records whose rows are looked for in one look."""

_POSITIONS = "SELECT partition, next FROM positions WHERE sink = 'postgres' AND topic = $1"
_LANDED = "SELECT batch_id FROM landed WHERE sink = 'postgres'"
_ROWS = "SELECT series, extract(epoch FROM ts)::bigint AS at_s FROM samples WHERE series = ANY($1::uuid[]) AND version >= $2"


@dataclass
class Positions:
    """No committed position, the store's or Kafka's, lies past data that has not landed (I3), and what has landed is there (I1)."""

    watched: Field
    complaints: list[str] = field(default_factory=list)
    """The first of each sort."""
    looks: int = 0
    held: bool = False
    """While true nothing is looked at, and what was read is forgotten: an operator is at work on topic or positions."""
    _raw: dict[tuple[int, int], Batch] = field(default_factory=dict)
    """(partition, offset) → what stands there, where it is not known to have landed."""
    _ids: dict[tuple[int, int], bytes] = field(default_factory=dict)
    _next: dict[int, int] = field(default_factory=dict)

    async def run(self) -> None:
        """Until cancelled. What cannot be asked is asked again."""
        while True:
            if self.held:
                self._raw.clear()
                self._ids.clear()
                self._next.clear()
            else:
                try:
                    async with asyncio.timeout(ASKED_S):
                        await self.look()
                except (
                    KafkaError,
                    OSError,
                    TimeoutError,
                    AssertionError,
                    asyncpg.PostgresError,
                    asyncpg.InterfaceError,
                ):
                    pass
            await asyncio.sleep(WATCH_S)

    async def look(self) -> None:
        """Once. What is asked first is behind what is asked last, so this holds while all is at work."""
        config = self.watched.config
        committed = await _committed(config)
        topic = config.kafka.topic("raw")
        stored = {row["partition"]: row["next"] for row in await self.watched.sql(_POSITIONS, topic)}
        landed = {bytes(row["batch_id"]) for row in await self.watched.sql(_LANDED)}
        await self._read(config)
        if self.held:
            return
        self._past_the_store(committed, stored)
        await self._landed_rows(landed)
        past = [at for at in self._raw if at[1] < stored.get(at[0], 0) and self._ids[at] not in landed]
        # Healing takes back what a batch's entry says, and not its rows.
        if missing := [at for at in past if not await self._has_rows(self._raw[at])]:
            self._say(
                f"I3 the store's position is past what has landed: {len(missing)} records, as {min(missing)}"
            )
        self.looks += 1

    async def _landed_rows(self, landed: Collection[bytes]) -> None:
        """What the store says has landed is there, from the first moment on: sealing would find what is not, and healing bring it."""
        done = [at for at, batch_id in self._ids.items() if batch_id in landed]
        for at in done[:ROWS_CHECKED_MAX]:
            if not await self._has_rows(self._raw[at]):
                self._say(f"I1 rows of what has landed are not there: of the record at {at}")
            del self._raw[at], self._ids[at]

    async def _read(self, config: Config) -> None:
        for at, value in (await records_of(config, "raw", self._next)).items():
            self._next[at[0]] = max(at[1] + 1, self._next.get(at[0], 0))
            try:
                decoded = wire.decode_by_series(value, config.limits)
            except Rejected:
                continue  # it is dead, and lands nowhere
            self._raw[at] = without_series(decoded.batch, decoded.bad)
            self._ids[at] = wire.batch_id_of(value)

    def _past_the_store(self, committed: Mapping[int, int], stored: Mapping[int, int]) -> None:
        for partition, next_ in sorted(committed.items()):
            if next_ > (at := stored.get(partition, 0)):
                self._say(f"I3 Kafka's group is past the store: partition {partition} at {next_}, {at}")

    async def _has_rows(self, batch: Batch) -> bool:
        """Whether each finite point of a batch is in the store, in its version or a later one."""
        ids = [UUID(bytes=one) for one in bytes_of(batch.ids)]
        owners = np.repeat(np.arange(len(ids)), batch.counts).tolist()
        points = zip(owners, batch.timestamps_s.tolist(), batch.values.tolist(), strict=True)
        wanted = {(ids[owner].bytes, at_s) for owner, at_s, value in points if math.isfinite(value)}
        rows = await self.watched.sql(_ROWS, ids, batch.version)
        return wanted <= {(row["series"].bytes, row["at_s"]) for row in rows}

    def _say(self, complaint: str) -> None:
        if not any(one.partition(":")[0] == complaint.partition(":")[0] for one in self.complaints):
            self.complaints.append(complaint)


async def _committed(config: Config) -> dict[int, int]:
    admin = AIOKafkaAdminClient(bootstrap_servers=config.kafka.bootstrap)
    await admin.start()
    try:
        found = await admin.list_consumer_group_offsets(landing_group(config.kafka))
    finally:
        await admin.close()
    topic = config.kafka.topic("raw")
    return {tp.partition: at.offset for tp, at in found.items() if tp.topic == topic and at.offset >= 0}


async def archive_complaints(config: Config, from_s: int, until_s: int) -> list[str]:
    """Every task that is in the archive can be read, with all that it lists: what is announced exists. For an idle field."""
    session = new_session()
    session.set_credentials(
        *(LOCAL_AWS_ENVIRONMENT[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
    )
    session.set_config_variable("region", "us-east-1")
    spoilt: list[str] = []
    async with open_archive(config.s3, SystemClock(), session) as archive:
        for target in await archive.targets():
            async for key in archive.keys(target, from_s, until_s):
                try:
                    await archive.get(key)
                except Rejected as error:
                    spoilt.append(str(error))
    return [f"the archive is not whole: {len(spoilt)} tasks, as {min(spoilt)}"] if spoilt else []
