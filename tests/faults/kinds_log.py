"""Faults of the log: what stands on a topic and should not, what does not stand there any more, replays beside living data, and shards that come and go."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import zstandard
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete

from ingest import avro, inflate, wire
from ingest.letters import PAYLOAD_BYTES_MAX
from ingest.model import Batch, DeadLetter, Series, SeriesKey, Target, series_ids
from shard_config.model import Config, Limits
from tests.faults.field import Field
from tests.faults.kinds import Kind, Strike, Struck
from tests.faults.oracle import read_topic
from tests.faults.truth import Dead
from workers.stack import CHECKOUT

BOMB = "hostile Avro, a bomb"
LABELS = "a million labels or series"
RETENTION = "retention passed the committed offset"
REPLAYS = "Kafka replay ∥ S3 replay ∥ live"
SCALE = "rolling restart; scale 1 → 4 → 2 → 3 repeatedly"

Topic = Literal["raw", "ledger", "collect", "shards"]

COMMAND_S = 120.0
PUT_ASIDE_S = 30.0
BACK_S = 3600
MIB = 1 << 20
FOREIGN = Target("cloudwatch", "999999999999", "eu-west-1")
"""Rubbish has its keys: of what names a target of ours a consumer stops before it buries much, and rightly."""


# --- what is hostile ------------------------------------------------------------------------------------------


def hostile_values(rng: random.Random) -> list[bytes]:
    """Values that are not ours on any topic: no magic, no schema, cut off, nested without end, billions of items, bombs."""
    schemas = {schema.name: schema.fingerprint for schema in avro.SCHEMAS}
    endless = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
    return [
        b"",
        rng.randbytes(rng.randint(1, 4096)),
        avro.MAGIC,
        avro.MAGIC + rng.randbytes(8) + b"\0" * 100,
        # A length, and a number of items, that no memory has.
        *(avro.MAGIC + mark + endless * 3 for mark in schemas.values()),
        *(avro.MAGIC + mark + bytes([rng.randrange(256)]) * 5_000 for mark in schemas.values()),
        zstandard.ZstdCompressor().compress(bytes(300 * MIB)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(30 * MIB)),
        zstandard.ZstdCompressor().compress(avro.MAGIC + schemas["batch"] + endless * 2),
        b"Obj\x01" + rng.randbytes(200),  # a container, which brings a schema of its own
        rng.randbytes(900_000),
    ]


def crowded(series: int, points: int) -> bytes:
    """A batch of so many series with so many points each, as nobody of ours would write it."""
    wide = Limits(
        payload_bytes_max=MIB, series_per_batch_max=10**7, points_per_batch_max=10**8, decoded_bytes_max=2**30
    )
    keys = tuple(
        Series(SeriesKey(FOREIGN.account, FOREIGN.region, "AWS/EC2", f"m{i}", (), "Average", 60))
        for i in range(series)
    )
    batch = Batch(
        task_id="f" * 32,
        target=FOREIGN,
        service="ec2",
        observed_at_ms=int(time.time()) * 1000,
        revision=0,
        grid_s=300,
        series=keys,
        counts=np.full(series, points, np.int32),
        timestamps_s=np.full(series * points, 1_700_000_000),
        values=np.zeros(series * points),
        ids=series_ids(keys),
    )  # fmt: skip
    [payload] = wire.encode_batch(batch, wide)
    return payload.value


# --- rubbish on a topic ---------------------------------------------------------------------------------------


def dead_of(value: bytes) -> Dead:
    """The letter that a whole record must become."""
    return "", wire.batch_id_of(value), "", value[:PAYLOAD_BYTES_MAX]


async def _publish(
    config: Config, topic: str, records: Sequence[tuple[bytes, bytes]], compression: str | None = None
) -> list[tuple[int, int]]:
    """Past every link; (partition, offset) of each."""
    producer = AIOKafkaProducer(
        bootstrap_servers=config.kafka.bootstrap,
        compression_type=compression,
        max_request_size=2**30,
        max_batch_size=2**28 if compression else 16_384,
        linger_ms=200 if compression else 0,
    )
    await producer.start()
    try:
        async with asyncio.timeout(30):
            waiting = [await producer.send(topic, value=value, key=key) for key, value in records]
            sent = await asyncio.gather(*waiting)
    finally:
        await producer.stop()
    return [(s.partition, s.offset) for s in sent]


async def _read(config: Config, topic: str, partition: int, first: int, last: int) -> dict[int, bytes]:
    """By offset, what a reader of ours gets from the first of these to the last."""
    inflate.bound()
    at = TopicPartition(topic, partition)
    client = AIOKafkaConsumer(bootstrap_servers=config.kafka.bootstrap, enable_auto_commit=False)
    found: dict[int, bytes] = {}
    try:
        await client.start()
        client.assign([at])
        client.seek(at, first)
        async with asyncio.timeout(20):
            while last not in found:
                record = await client.getone(at)
                found[record.offset] = record.value or b""
    finally:
        await client.stop()
    return found


@asynccontextmanager
async def _rubbish(field: Field, rng: random.Random, topic: Topic) -> AsyncIterator[Struck]:
    """Some of each kind, under foreign keys. On `raw` the campaign judges what came of it, elsewhere the kind itself."""
    config = field.config
    name = config.kafka.topic(topic)
    values = hostile_values(rng)
    if topic == "shards":
        # Records of this topic are told apart by their keys; each of ours may be forged.
        keys = [b"assignment", b"shard:exporter-1", b"shard:nobody", b"", b"\xff"]
    else:
        keys = [b"", b"rubbish", f"{FOREIGN}/0".encode(), str(FOREIGN).encode()]
    records = [(rng.choice(keys), value) for value in values]
    places = await _publish(config, name, records)
    struck = Struck(topic, notes={"records": len(records)})
    wanted = dict(zip(places, values, strict=True))
    _owned_up(struck, topic, name, wanted)
    try:
        yield struck
    finally:
        if topic != "raw":
            struck.complaints += await put_aside(config, name, wanted)


def _owned_up(struck: Struck, topic: Topic, name: str, wanted: Mapping[tuple[int, int], bytes]) -> None:
    if topic == "raw":
        struck.bad.update({at: frozenset([dead_of(value)]) for at, value in wanted.items()})
    else:
        struck.elsewhere.update({(name, *at): dead_of(value) for at, value in wanted.items()})


async def put_aside(config: Config, topic: str, wanted: Mapping[tuple[int, int], bytes]) -> list[str]:
    """Complaints about I2 of one topic, when its readers have had PUT_ASIDE_S to put these aside."""
    deadline_s = time.monotonic() + PUT_ASIDE_S
    while True:
        found = [one for one in await _letters(config) if one.origin.topic == topic]
        have = {letter.batch_id for letter in found}
        missing = [at for at, value in wanted.items() if wire.batch_id_of(value) not in have]
        if not missing or time.monotonic() > deadline_s:
            break
        await asyncio.sleep(1.0)
    complaints = [f"I2 {topic} {at}: not among the dead letters" for at in missing[:3]]
    complaints += [f"I2 {topic}: a letter without a reason, {one.origin}" for one in found if not one.reason]
    return complaints


async def _letters(config: Config) -> list[DeadLetter]:
    records = await read_topic(config.kafka.bootstrap, config.kafka.topic("dead"))
    return [wire.decode_dead_letter(value) for _, value in records]


@asynccontextmanager
async def _broker_bomb(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """Half a gigabyte of zeros that Kafka itself compresses, in a batch that the broker takes for a small one."""
    config = field.config
    name = config.kafka.topic("raw")
    struck = Struck("raw", notes={"bytes": 8 * 64 * MIB})
    key = str(rng.random()).encode()
    places = await _publish(config, name, [(key, bytes(64 * MIB))] * 8, "zstd")
    # Each batch that the producer made of them comes as one record, in its last place.
    for partition, group in itertools.groupby(sorted(places), key=lambda at: at[0]):
        offsets = [offset for _, offset in group]
        for offset, value in (await _read(config, name, partition, offsets[0], offsets[-1])).items():
            if offset in offsets:
                struck.bad[partition, offset] = frozenset([dead_of(value)])
    yield struck


@asynccontextmanager
async def _crowd(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """Batches with more series, or more points, than a batch may have."""
    config = field.config
    name = config.kafka.topic("raw")
    values = [crowded(rng.randint(5_001, 40_000), 1), crowded(1, rng.randint(1_000_001, 1_300_000))]
    places = await _publish(config, name, [(f"{FOREIGN}/0".encode(), value) for value in values])
    struck = Struck("raw", notes={"records": len(values)})
    _owned_up(struck, "raw", name, dict(zip(places, values, strict=True)))
    yield struck


# --- commands -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


async def headgate(field: Field, *args: str, timeout_s: float = COMMAND_S) -> Said:
    """Run a command on this field's stack, past every link."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workers.cli", *args),
        cwd=CHECKOUT,
        env=field.stack._environment() | {"HEADGATE_HOME": str(field.home)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Said(process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace"))


def _failed(what: str, said: Said, *codes: int) -> list[str]:
    """A complaint where it did not end as it should."""
    return [] if said.code in codes else [f"{what}: exit code {said.code}: {(said.out + said.err)[-600:]}"]


def _since() -> str:
    return str((int(time.time()) - BACK_S) // 10 * 10)


async def _backfill(field: Field, via: str) -> list[str]:
    """Everything again. One source after the other may say that it does not have all: then the other one has."""
    said = await headgate(field, "backfill", "--from", _since(), "--via", via, "--rebuild", "--yes", "--json")
    return _failed(f"backfill --via {via}", said, 0)


# --- retention, a topic made again ----------------------------------------------------------------------------


@asynccontextmanager
async def _consumers_down(field: Field) -> AsyncIterator[None]:
    async with AsyncExitStack() as exits:
        for consumer in field.consumers:
            await exits.enter_async_context(field.down(consumer))
        yield


async def _stops_loudly(field: Field) -> list[str]:
    """A consumer that starts now ends with exit code 3, and says what to do."""
    async with field.second(field.consumers[0]) as second:
        code = await second.exits(60.0)
    log = second.log.read_text(errors="replace")
    if code != 3 or "headgate positions" not in log:
        return [f"a consumer whose log is gone ended with {code}, and said {log[-400:]!r}"]
    return []


async def _operators_way(field: Field, topic: str) -> list[str]:
    """What docs and the error say: fill from the archive, then move the position."""
    complaints = await _backfill(field, "s3")
    moved = await headgate(field, "positions", "--move", topic, "--to", "start", "--reader", "postgres")
    return complaints + _failed("positions --move", moved, 0)


async def _grown(field: Field, topic: str) -> dict[int, int]:
    """Partition → its end, where there is something that has not landed; waits for it."""
    grown: dict[int, int] = {}

    async def there_is() -> bool:
        rows = await field.sql(
            "SELECT partition, next FROM positions WHERE topic = $1 AND sink = 'postgres'", topic
        )
        ends = await log_ends(field.config, topic)
        grown.clear()
        grown.update({r["partition"]: ends[r["partition"]] for r in rows if ends[r["partition"]] > r["next"]})
        return bool(grown)

    await field.until(there_is, "something is on raw that has not landed", 60.0)
    return grown


async def log_ends(config: Config, topic: str) -> dict[int, int]:
    asked = [TopicPartition(topic, p) for p in range(config.kafka.raw_partitions)]
    client = AIOKafkaConsumer(bootstrap_servers=config.kafka.bootstrap, enable_auto_commit=False)
    try:
        await client.start()
        return {tp.partition: end for tp, end in (await client.end_offsets(asked)).items()}
    finally:
        await client.stop()


@asynccontextmanager
async def _admin(config: Config) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=config.kafka.bootstrap)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


@asynccontextmanager
async def _retention(field: Field, _: random.Random) -> AsyncIterator[Struck]:
    """Consumers are away until what they would read next is gone."""
    config = field.config
    topic = config.kafka.topic("raw")
    struck = Struck("raw")
    async with _consumers_down(field):
        grown = await _grown(field, topic)
        async with _admin(config) as admin:
            await admin.delete_records(
                {TopicPartition(topic, p): RecordsToDelete(end) for p, end in grown.items()}
            )
        struck.complaints += await _stops_loudly(field)
        struck.complaints += await _operators_way(field, topic)
    for consumer in field.consumers:
        await field.ready(consumer)
    yield struck


@asynccontextmanager
async def _made_again(field: Field, _: random.Random) -> AsyncIterator[Struck]:
    """The topic `raw` is deleted and made again while exporters go on; some of what was on it had not landed."""
    config = field.config
    topic = config.kafka.topic("raw")
    struck = Struck("raw")
    async with _consumers_down(field):
        await _grown(field, topic)
        async with _admin(config) as admin:
            await admin.delete_topics([topic])

            async def made() -> bool:
                new = NewTopic(
                    topic, config.kafka.raw_partitions, 1, topic_configs={"max.message.bytes": "1048588"}
                )
                return bool((await admin.create_topics([new])).topic_errors[0][1] == 0)

            await field.until(made, f"{topic} is made again", 30.0)
        await field.until(partial(_written, config, topic), "exporters write to it", 60.0)
        struck.complaints += await _stops_loudly(field)
        struck.complaints += await _operators_way(field, topic)
    for consumer in field.consumers:
        await field.ready(consumer)
    yield struck


async def _written(config: Config, topic: str) -> bool:
    return any((await log_ends(config, topic)).values())


# --- replays, shards ------------------------------------------------------------------------------------------


@asynccontextmanager
async def _replays(field: Field, _: random.Random) -> AsyncIterator[Struck]:
    """All that there is lands again from Kafka and from the archive at once, beside what lives."""
    struck = Struck("postgres")
    both = await asyncio.gather(_backfill(field, "kafka"), _backfill(field, "s3"))
    struck.complaints += itertools.chain.from_iterable(both)
    yield struck


@asynccontextmanager
async def _scaled(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """1 → 4 → 2 → 3 shards, and back to what it was; each move is held against the least that must move."""
    struck = Struck("exporters", notes={"slots_moved": 0})
    before = len(field.exporters)
    new = [f"exporter-{n}" for n in range(before + 1, 5)]
    for name in new:
        folder = field.points / name
        folder.mkdir(exist_ok=True)
        (folder / "headgate.yaml").write_text(field.stack.config_path.read_text())
        port = int(field.endpoints.kafka_bootstrap.rpartition(":")[2])
        (folder / "kafka.json").write_text(json.dumps([port, port]))  # no link of its own
    shards = before
    try:
        for wanted in (1, 4, 2, 3, *([rng.randint(1, 4)] if rng.random() < 0.5 else [])):
            said = await headgate(field, "scale", str(wanted), "--json")
            struck.complaints += _failed(f"scale {wanted}", said, 0)
            if said.code:
                break
            scaled = json.loads(said.out)
            moved, slots = len(scaled["moves"]), scaled["slots"]
            struck.notes["slots_moved"] += moved
            struck.complaints += moved_complaints(shards, wanted, moved, slots)
            shards = wanted
    finally:
        struck.complaints += _failed(
            f"scale {before}", await headgate(field, "scale", str(before), "--json"), 0
        )
    yield struck


def moved_complaints(before: int, after: int, moved: int, slots: int) -> list[str]:
    """A complaint where more moved than the share that must: those of who goes, or what who comes is due; two slots are let pass,
    since weights are not even."""
    most = -(-slots * abs(after - before) // max(after, before)) + 2
    return (
        [f"I6 {before} to {after} shards: {moved} of {slots} slots moved, {most} had to"]
        if moved > most
        else []
    )


def _on(topic: Topic) -> Strike:
    return partial(_rubbish, topic=topic)


KINDS: tuple[Kind, ...] = (
    Kind("rubbish and bombs on raw", BOMB, _on("raw"), (0.5, 2.0), frozenset({"kafka"})),
    Kind("rubbish and bombs on ledger", BOMB, _on("ledger"), (0.5, 2.0), frozenset({"kafka"})),
    Kind("rubbish and bombs on collect", BOMB, _on("collect"), (0.5, 2.0), frozenset({"kafka"})),
    Kind("rubbish and bombs on shards", BOMB, _on("shards"), (0.5, 2.0), frozenset({"kafka"})),
    Kind("a bomb that Kafka compressed", BOMB, _broker_bomb, (0.5, 2.0), frozenset({"kafka"})),
    Kind("a batch with too many series or points", LABELS, _crowd, (0.5, 2.0), frozenset({"kafka"})),
    Kind("retention passed the position", RETENTION, _retention, (0.0, 0.0), alone=True),
    Kind("raw deleted and made again", RETENTION, _made_again, (0.0, 0.0), alone=True),
    Kind("replays of Kafka and S3 beside living data", REPLAYS, _replays, (0.0, 0.0), alone=True),
    Kind("shards from 1 to 4 to 2 to 3", SCALE, _scaled, (0.0, 0.0), alone=True, may_pay_twice=True),
)
