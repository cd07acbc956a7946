"""`headgate positions`: where each reader stands, whether Kafka's log still fits that, and how an operator moves a position.

A reader (a sink, the ledger) whose position lies outside the log, or behind another record than the one it remembers, stops rather than
guess. This command shows which and why, and what the choices are; `--move` makes one. A position moves by compare-and-set, so a reader
that is at work on the partition is refused at its next landing, and goes on from the new position.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.table import Table

from ingest.brokers import client_options
from ingest.errors import Fatal, Transient
from ingest.log import quietly
from ingest.ports import StoredPosition
from ingest.positions import value_id
from ingest.sinks.connection import open_connection, translated
from shard_config.model import Config, Kafka
from workers import local
from workers.names import remote_write_group
from workers.setup import kafka_admin

KAFKA_TIMEOUT_S = 10.0

GONE = "the topic is not there"
PASSED = "retention passed it"
BEYOND = "beyond the log's end: the topic was created again"
ANOTHER = "another record stands before it: the topic was created again"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one reader stands in one partition. `bounds` are the log's (first, next to be written), None without a topic."""

    reader: str
    topic: str
    partition: int
    stored: StoredPosition
    bounds: tuple[int, int] | None
    before: bytes | None
    """`value_id` of the record before the position, None where there is none to be read."""

    @property
    def wrong(self) -> str:
        """Why the reader will not go on from here; empty where it will."""
        if self.bounds is None:
            return GONE
        first, end = self.bounds
        if self.stored.next < first:
            return PASSED
        if self.stored.next > end:
            return BEYOND
        if self.before is not None and self.stored.last_value_id not in (b"", self.before):
            return ANOTHER
        return ""


async def places(config: Config) -> list[Place]:
    """Every stored position, compared with the log. Raises Transient."""
    connection = await open_connection(config.postgres, "headgate positions")
    try:
        with translated("positions"):
            rows = await connection.fetch(
                # Who reads the archive has a position as well, which is no offset of Kafka's.
                "SELECT sink, topic, partition, next, last_value_id FROM positions WHERE topic <> 'archive' ORDER BY topic, sink, partition"
            )
    finally:
        connection.terminate()
    async with _Log(config.kafka) as log:
        found = []
        for row in rows:
            tp = TopicPartition(row["topic"], row["partition"])
            bounds = await log.bounds(tp)
            stored = StoredPosition(row["next"], row["last_value_id"])
            before = await log.value_id(tp, stored.next - 1, bounds) if bounds else None
            found.append(Place(row["sink"], tp.topic, tp.partition, stored, bounds, before))
    return found


async def receivers_places(config: Config) -> list[Place]:
    """Where the groups of remote write's receivers stand: Kafka itself remembers that. None of them stops for a position. Raises Transient."""
    write, topic = config.remote_write, config.kafka.topic("raw")
    found = []
    async with kafka_admin(config.kafka) as admin, _Log(config.kafka) as log:
        for receiver in write.receivers if write else ():
            committed = await admin.list_consumer_group_offsets(
                remote_write_group(config.kafka, receiver.name)
            )
            for tp, at in sorted(committed.items()):
                if tp.topic == topic:
                    stored = StoredPosition(at.offset, b"")
                    name = f"remote-write {receiver.name}"
                    found.append(Place(name, topic, tp.partition, stored, await log.bounds(tp), None))
    return found


async def log_ends(kafka: Kafka, topic: str, partitions: int) -> dict[int, int]:
    """Partition → the next offset to be written, of those that there are. Raises Transient."""
    async with _Log(kafka) as log:
        found = {p: await log.bounds(TopicPartition(topic, p)) for p in range(partitions)}
    return {p: bounds[1] for p, bounds in found.items() if bounds is not None}


async def move(config: Config, place: Place, to: str) -> str:
    """Move a position to `start` or `end` of the log or to an offset; returns what that means, in a sentence.

    Raises Fatal where there is no such offset, or where the position has moved meanwhile; Transient.
    """
    where = f"{place.topic}/{place.partition}"
    if place.bounds is None:
        raise Fatal(where, GONE, "run `headgate setup`")
    first, end = place.bounds
    next_ = {"start": first, "end": end}.get(to, int(to) if to.isdecimal() else -1)
    if not first <= next_ <= end:
        raise Fatal(where, f"{to} is no offset of the log's [{first}, {end}]", "say start, end or an offset")
    async with _Log(config.kafka) as log:
        tp = TopicPartition(place.topic, place.partition)
        before = await log.value_id(tp, next_ - 1, place.bounds) or b""
    connection = await open_connection(config.postgres, "headgate positions")
    try:
        with translated("positions"):
            done = await connection.execute(
                "UPDATE positions SET next = $5, last_value_id = $6"
                " WHERE sink = $1 AND topic = $2 AND partition = $3 AND next = $4",
                place.reader, place.topic, place.partition, place.stored.next, next_, before,
            )  # fmt: skip
    finally:
        connection.terminate()
    if done != "UPDATE 1":
        raise Fatal(where, "the position has moved meanwhile: somebody is at work there", "look again")
    return f"{place.reader} {where}: {place.stored.next} -> {next_}; {_meaning(place, next_)}"


def _meaning(place: Place, next_: int) -> str:
    was = place.stored.next
    if place.wrong in (BEYOND, ANOTHER):
        return "what the topic held before it was created again, and had not landed, comes from the archive: headgate backfill"
    if next_ > was:
        return (
            f"{next_ - was} records do not land from Kafka: fill them from the archive with headgate backfill"
        )
    return f"{was - next_} records land again, which changes nothing"


class _Log:
    """Looks at Kafka's partitions without being in any group."""

    def __init__(self, kafka: Kafka) -> None:
        self._bootstrap = kafka.bootstrap
        self._client = AIOKafkaConsumer(
            **client_options(kafka), enable_auto_commit=False, auto_offset_reset="none"
        )
        self._topics: set[str] = set()

    async def __aenter__(self) -> _Log:
        try:
            async with asyncio.timeout(KAFKA_TIMEOUT_S):
                await self._client.start()
                self._topics = await self._client.topics()
        except (KafkaError, OSError, TimeoutError) as error:
            await quietly(self._client.stop())
            raise self._transient(error) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await quietly(self._client.stop())

    async def bounds(self, tp: TopicPartition) -> tuple[int, int] | None:
        """(first offset that is there, next to be written), or None where there is no such partition."""
        if tp.topic not in self._topics:
            return None
        try:
            async with asyncio.timeout(KAFKA_TIMEOUT_S):
                first = await self._client.beginning_offsets([tp])
                end = await self._client.end_offsets([tp])
        except (KafkaError, OSError, TimeoutError) as error:
            raise self._transient(error) from error
        return first[tp], end[tp]

    async def value_id(self, tp: TopicPartition, offset: int, bounds: tuple[int, int]) -> bytes | None:
        """Of the record at an offset, or None where there is none."""
        if not bounds[0] <= offset < bounds[1]:
            return None
        self._client.assign([tp])
        self._client.seek(tp, offset)
        with suppress(TimeoutError):
            try:
                async with asyncio.timeout(KAFKA_TIMEOUT_S):
                    record = await self._client.getone(tp)
            except (KafkaError, OSError) as error:
                raise self._transient(error) from error
            return value_id(record.value or b"") if record.offset == offset else None
        return None

    def _transient(self, error: Exception) -> Transient:
        return Transient(f"kafka {self._bootstrap}", f"{type(error).__name__} {error}".rstrip())


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "positions",
        help="where each reader stands in Kafka, and move it where it stopped",
        description="Shows where each reader stands in Kafka's log. One that stopped because retention passed its position, or because the "
        "topic was created again, is marked (exit code 1): fill what is missing from the archive (headgate backfill), then --move its "
        "position, and start it again. Landing the same records twice changes nothing, so --to start is always safe. Receivers of remote_write are shown "
        "too: they go on at the log's start by themselves.",
    )
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.add_argument(
        "--move", metavar="TOPIC[/PARTITION]", help="move the position there; of a topic, all that are marked"
    )
    parser.add_argument("--to", default="start", metavar="start|end|OFFSET", help="where to (%(default)s)")
    parser.add_argument("--reader", help="whose position; needed where several readers have one there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_run(local.find_config(args.config), args.move, args.to, args.reader))


async def _run(config: Config, moved: str | None, to: str, reader: str | None) -> int:
    found = await places(config)
    if moved is None:
        # A pipe has no width: what is wrong must not be cut off there.
        table = _table([*found, *await receivers_places(config)])
        Console(width=None if sys.stdout.isatty() else 200).print(table)
        return 1 if any(place.wrong for place in found) else 0
    named = _named(found, moved, reader)
    if len({place.reader for place in named}) != 1:
        readers = sorted({place.reader for place in named})
        what = f"readers with such a position: {', '.join(readers) or 'none'}"
        raise Fatal(moved, what, "run `headgate positions` for what there is; --reader says whose is meant")
    for place in named:
        print(await move(config, place, to))
    return 0


def _named(found: Sequence[Place], moved: str, reader: str | None) -> list[Place]:
    """The places that `--move` means: one partition, or of a topic those whose reader will not go on."""
    return [
        place
        for place in found
        if reader in (None, place.reader)
        and (f"{place.topic}/{place.partition}" == moved or (place.topic == moved and place.wrong))
    ]


def _table(found: Sequence[Place]) -> Table:
    table = Table(box=None)
    for name in ("reader", "partition"):
        table.add_column(name, no_wrap=True)
    for name in ("position", "first", "end", "behind"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for p in found:
        first, end = map(str, p.bounds or ("-", "-"))
        behind = str(p.bounds[1] - p.stored.next) if p.bounds and not p.wrong else "-"
        table.add_row(p.reader, f"{p.topic}/{p.partition}", str(p.stored.next), first, end, behind, p.wrong)
    return table
