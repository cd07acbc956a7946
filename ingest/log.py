"""Kafka: a producer with deadlines. Consumers are in `ingest.group`.

Guarantees:

* `Producer.send` returns when every in-sync replica has the record, or raises Transient within its deadline (of each 200 records). It
  may be there all the same: whoever sends again sends the same bytes, and readers converge.
* A client that failed is thrown away and built anew by the next send.

No transactions and no idempotent producer: one non-retriable error bricks the latter (aiokafka #1017), and landing
is a maximum, so duplicates change nothing. See docs/decisions/0004.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
)

from ingest.brokers import NOT_THERE, SEE_TO_IT, bootstrap_of, client_options, remedy_of
from ingest.errors import Fatal, Transient
from ingest.model import RecordPosition
from shard_config.model import Kafka

_log = structlog.get_logger()

VALUE_BYTES_MAX = 1_000_000
"""Kafka's default for a record batch, less the overhead of one."""


IN_FLIGHT_MAX = 200

ANSWER_S = 30.0
"""So long a broker has to say which cluster it is of."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be sent; without a partition, its key decides."""

    key: bytes
    value: bytes
    partition: int | None = None


class Sender(Protocol):
    """What publishing needs of the log: `Producer`, or a fake."""

    async def send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]: ...


class Producer:
    """Sends records with a deadline each; after a failure the client is thrown away and built anew."""

    def __init__(self, kafka: Kafka | str, client_id: str, *, deadline_s: float = 30.0) -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._deadline_s = deadline_s
        self._client: AIOKafkaProducer | None = None
        self._building = asyncio.Lock()
        self._dropped: set[asyncio.Task[None]] = set()
        """Clients that are being closed: sends do not wait for that, `close` does."""

    async def send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]:
        """Send records and wait until all in-sync replicas have all of them; returns where they stand, in order.

        Raises Transient where that is not known of every one (send all again then), Fatal for a value that is too large.
        """
        for record in records:
            if len(record.value) > VALUE_BYTES_MAX:
                raise Fatal(
                    f"topic {topic}", f"a value of {len(record.value)} bytes is above {VALUE_BYTES_MAX}"
                )
        positions: list[RecordPosition] = []
        for at in range(0, len(records), IN_FLIGHT_MAX):
            positions += await self._send(topic, records[at : at + IN_FLIGHT_MAX])
        return positions

    async def _send(self, topic: str, records: Sequence[Outgoing]) -> list[RecordPosition]:
        client: AIOKafkaProducer | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                client = await self._ready()
                waiting = [
                    await client.send(topic, value=r.value, key=r.key, partition=r.partition) for r in records
                ]
                sent = await asyncio.gather(*waiting)
        except MessageSizeTooLargeError as error:
            raise Fatal(
                f"topic {topic}",
                "the broker refuses a value as too large",
                f"set the topic's max.message.bytes to 1048588: values have up to {VALUE_BYTES_MAX}",
            ) from error
        except (KafkaError, TimeoutError, OSError) as error:
            if client is not None:
                self._drop(client)
            what = f"not acknowledged in {self._deadline_s:g} s: {type(error).__name__} {error}".rstrip()
            unknown = client is not None and topic not in client.client.cluster.topics()
            remedy = remedy_of(error) or (f"it {NOT_THERE}: {SEE_TO_IT}" if unknown else "")
            raise Transient(f"topic {topic} on {bootstrap_of(self._kafka)}", what, remedy) from error
        return [RecordPosition(topic, s.partition, s.offset) for s in sent]

    async def _ready(self) -> AIOKafkaProducer:
        async with self._building:
            if self._client is None:
                client = AIOKafkaProducer(
                    **client_options(self._kafka),
                    client_id=self._client_id,
                    acks="all",
                    linger_ms=5,
                    max_batch_size=256 * 1024,
                    max_request_size=VALUE_BYTES_MAX + 4096,
                    request_timeout_ms=int(self._deadline_s * 1000),
                    compression_type=None,  # values come compressed, with a size that is checked before inflating
                )
                try:
                    await client.start()
                except BaseException:
                    self._close_later(client)
                    raise
                self._client = client
            return self._client

    def _drop(self, client: AIOKafkaProducer) -> None:
        """The next send builds another; sends that still wait for this one may yet be acknowledged."""
        if self._client is client:
            self._client = None
            self._close_later(client)

    def _close_later(self, client: AIOKafkaProducer) -> None:
        closing = asyncio.ensure_future(_close_producer(client))
        self._dropped.add(closing)
        closing.add_done_callback(self._dropped.discard)

    async def close(self) -> None:
        """Send what is buffered and close, bounded."""
        client, self._client = self._client, None
        if client is not None:
            self._close_later(client)
        if self._dropped:
            await asyncio.wait(self._dropped)


async def commit_start(
    kafka: Kafka | str, topic: str, group: str, partitions: int, since_ms: int = 0
) -> None:
    """Commit where a group starts in each partition where it has committed nothing: a virgin install is not a lost offset.

    That is the first record of `since_ms` or later (milliseconds since the epoch), the log's end where there is none; 0: the log's start.
    Raises Transient.
    """
    client = AIOKafkaConsumer(**client_options(kafka), group_id=group, enable_auto_commit=False)
    try:
        await client.start()
        asked = [TopicPartition(topic, p) for p in range(partitions)]
        client.assign(asked)
        first = await client.beginning_offsets(asked)
        if since_ms:
            ends = await client.end_offsets(asked)
            found = await client.offsets_for_times(dict.fromkeys(asked, since_ms))
            first = {tp: ends[tp] if found[tp] is None else found[tp].offset for tp in asked}
        missing = {tp: first[tp] for tp in asked if await client.committed(tp) is None}
        if missing:
            await client.commit(missing)
    except (KafkaError, OSError) as error:
        what = f"no start committed: {type(error).__name__} {error}".rstrip()
        raise Transient(f"group {group} on {topic}", what, remedy_of(error)) from error
    finally:
        await quietly(client.stop())


async def cluster_id(kafka: Kafka | str) -> str:
    """The Kafka cluster's id: offsets mean something within one cluster only. Raises Transient."""
    admin = AIOKafkaAdminClient(**client_options(kafka))
    try:
        async with asyncio.timeout(ANSWER_S):
            await admin.start()
            described = await admin.describe_cluster()
    except (KafkaError, OSError, TimeoutError) as error:
        raise Transient(f"kafka {bootstrap_of(kafka)}", f"{type(error).__name__} {error}".rstrip()) from error
    finally:
        await quietly(admin.close())
    return str(described["cluster_id"] or "")


async def _close_producer(client: AIOKafkaProducer) -> None:
    """Flush, bounded. aiokafka's own stop would wait without end, and leaves its task running where it is cancelled."""
    if not await quietly(client.stop()):
        if (sender := client._sender) is not None:
            await quietly(sender.close())
        await quietly(client.client.close())


async def quietly(stopping: Awaitable[None], timeout_s: float = 10.0) -> bool:
    """Stopping is best effort and bounded: what it was holding is safe without it. True where it ended by itself."""
    try:
        async with asyncio.timeout(timeout_s):
            await stopping
    except (KafkaError, TimeoutError, OSError) as error:
        _log.warning("kafka_client_did_not_stop_cleanly", error=str(error))
        return False
    return True
