"""Living shards: the topic `shards`, who has a shard's name, and what the coordinator publishes.

* **Followed**: every exporter and the coordinator read the topic from its start to its end before they act, and go on reading. A shard whose
  group gave it other slots than a newer published assignment says asks for a rebalance: once an epoch.
* **Identity**: whoever starts with a name writes down its incarnation, greater than any that was written. An older one that sees it ends, with
  exit code 3, and does not join again.
* **Published** is what the group's leader would compute, where that is news (`ingest.reassign`).
* Two coordinators do no harm: they compute the same.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from prometheus_client import Counter, Gauge

from ingest.assign import (
    Assignment,
    Incarnation,
    decode_assignment,
    decode_incarnation,
    encode_assignment,
    encode_incarnation,
    moves,
)
from ingest.brokers import NOT_THERE, SEE_TO_IT, client_options
from ingest.clock import Clock, rfc3339
from ingest.errors import Fatal, Rejected, Transient
from ingest.group import Consumer
from ingest.log import Outgoing, Sender, quietly
from ingest.membership import GroupLook, ShardAssignor, look_at_group
from ingest.model import RecordPosition
from ingest.ports import Record
from ingest.reassign import History, Planned, next_assignment
from ingest.validate import Reason
from shard_config.model import Kafka
from workers.lifecycle import Lifecycle
from workers.names import exporter_group

_log = structlog.get_logger()

KEY = b"assignment"
SHARD_KEY = b"shard:"
READ_TIMEOUT_S = 30.0
"""For reading the topic to its end; it is compacted, and small."""
LOOK_EVERY_S = 1.0
MOVES_KEPT = 200
SHARDS_MAX = 10_000
"""Names of shards that are remembered: as many as there may be slots."""
REST_S = 10.0

EPOCH = Gauge("headgate_assignment_epoch", "Epoch of the newest assignment of slots to shards that was read.")
MOVED = Counter("headgate_slots_moved_total", "Slots that a newer assignment gave to another shard.")
REJOINS = Counter(
    "headgate_rejoins_total", "Rebalances that this shard asked for, to follow a newer assignment."
)
SHARD_SLOTS = Gauge("headgate_shard_slots", "Slots that a live shard owns; 0: it does nothing.", ["shard"])
SHARD_WEIGHT = Gauge(
    "headgate_shard_weight", "Metrics asked a minute, of all that is in a live shard's slots.", ["shard"]
)
UNOWNED = Gauge("headgate_slots_unowned", "Slots that no live shard owns: what is in them is not collected.")


class Board:
    """What stands on the topic `shards`: the newest assignment, and by shard its newest incarnation."""

    def __init__(
        self,
        kafka: Kafka,
        client_id: str,
        aside: Callable[[Record, Rejected], Awaitable[None]] | None = None,
    ) -> None:
        """`aside` is given what cannot be read; of all readers the coordinator has one."""
        self.assignment: Assignment | None = None
        self.incarnations: dict[str, Incarnation] = {}
        self.read = False
        """Whether the topic was read to its end, at least once."""
        self.changed = asyncio.Event()
        """Set at each record; whoever waits for it clears it."""
        self._kafka = kafka
        self.topic = kafka.topic("shards")
        self._client_id = client_id
        self._aside = aside
        self._client: AIOKafkaConsumer | None = None

    async def open(self) -> None:
        """Read the topic to its end. Raises Transient."""
        partition = TopicPartition(self.topic, 0)
        client = AIOKafkaConsumer(
            **client_options(self._kafka),
            client_id=self._client_id,
            enable_auto_commit=False,
            # What is compacted has no position that could be lost.
            auto_offset_reset="earliest",
            fetch_max_wait_ms=500,
        )
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                await client.start()
                if self.topic not in await client.topics():
                    raise Transient(f"topic {self.topic}", NOT_THERE, SEE_TO_IT)
                client.assign([partition])
                await client.seek_to_beginning(partition)
                end = (await client.end_offsets([partition]))[partition]
                while await client.position(partition) < end:
                    await self._take(await client.getmany(timeout_ms=500))
        except (KafkaError, OSError, TimeoutError) as error:
            await quietly(client.stop())
            what = f"not read to its end: {type(error).__name__} {error}".rstrip()
            raise Transient(f"topic {self.topic}", what) from error
        except BaseException:
            await quietly(client.stop())
            raise
        self._client = client
        self.read = True

    async def run(self, lifecycle: Lifecycle) -> None:
        """Go on reading until told to stop. A client that fails is built anew."""
        while not lifecycle.stop.is_set():
            try:
                if self._client is None:
                    await self.open()
                    continue
                await self._take(await self._client.getmany(timeout_ms=500))
            except (Transient, KafkaError, OSError) as error:
                _log.warning("shards_not_read", error=str(error))
                await self.close()
                await lifecycle.pause(1.0)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await quietly(client.stop())

    async def _take(self, got: Mapping[TopicPartition, Sequence[Any]]) -> None:
        for records in got.values():
            for record in records:
                try:
                    self._put(record.key or b"", record.value)
                except Rejected as error:
                    # Of a newer version, perhaps: what was known before holds.
                    _log.error("shards_record_not_readable", offset=record.offset, error=str(error))
                    if self._aside is not None:
                        at = RecordPosition(record.topic, record.partition, record.offset)
                        value = Record(at, record.key or b"", record.value or b"", record.timestamp)
                        await self._aside(value, error)
        if got:
            self.changed.set()

    def _put(self, key: bytes, value: bytes | None) -> None:
        if value is None:
            return
        if key == KEY:
            found = decode_assignment(value)
            if self.assignment is None or found.order > self.assignment.order:
                self.assignment = found
                EPOCH.set(found.epoch)
        elif key.startswith(SHARD_KEY):
            one = decode_incarnation(value)
            known = self.incarnations.get(one.shard)
            if known is None and len(self.incarnations) >= SHARDS_MAX:
                raise Rejected(f"topic {self.topic}", Reason.OUT_OF_RANGE, f"more than {SHARDS_MAX} shards")
            if known is None or one.order > known.order:
                self.incarnations[one.shard] = one
        else:
            raise Rejected(f"topic {self.topic}", Reason.BAD_KEY, repr(key[:80]))


# --- a shard --------------------------------------------------------------------------------------------------


async def take_name(
    board: Board, sender: Sender, shard: str, clock: Clock, lifecycle: Lifecycle
) -> Incarnation | None:
    """Read the topic, then write down that this process has the name now; None where it is time to stop before that could be done."""
    while True:
        try:
            if not board.read:
                await board.open()
            before = board.incarnations.get(shard)
            # Later than the last one, whatever its clock said.
            started_at_ms = max(clock.now_ms(), before.started_at_ms + 1 if before else 0)
            mine = Incarnation(shard, started_at_ms, secrets.randbits(62), socket.gethostname(), os.getpid())
            await sender.send(
                board.topic, [Outgoing(SHARD_KEY + shard.encode(), encode_incarnation(mine), 0)]
            )
        except Transient as error:
            _log.warning("name_not_taken", error=str(error))
            if await lifecycle.pause(error.retry_after_s):
                return None
        else:
            return mine


def check_name(board: Board, mine: Incarnation) -> None:
    """Raise Fatal where a newer process has taken the name."""
    other = board.incarnations.get(mine.shard)
    if other is not None and other.order > mine.order:
        raise Fatal(
            f"shard {mine.shard}",
            f"another process with the name {mine.shard} started at {rfc3339(other.started_at_ms / 1000)} (pid {other.pid} on {other.host})",
            "give each its own name",
        )


async def follow(
    board: Board,
    consumer: Consumer,
    assignor: ShardAssignor,
    mine: Incarnation,
    lifecycle: Lifecycle,
    shared: Callable[[Mapping[str, float]], None] = lambda _: None,
) -> None:
    """Until told to stop: keep the name, or raise Fatal; and ask for a rebalance where a newer assignment gives other slots.

    `shared` is told, by quota that others take from, this shard's part.
    """
    asked = 0
    while not lifecycle.stop.is_set():
        board.changed.clear()
        check_name(board, mine)
        published = board.assignment
        if published is not None:
            shared(published.shares_of(mine.shard))
        if published is not None and published.epoch > asked and assignor.differs(published):
            asked = published.epoch
            REJOINS.inc()
            _log.info("rejoining_for_assignment", epoch=asked, reason=published.reason)
            consumer.rejoin()
        # Woken by news; by time because an assignment may have been read while the group was rebalancing.
        await lifecycle.pause(0.5, board.changed)


# --- the coordinator ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Noted:
    """A move that was published, for people."""

    at_ms: int
    slot: int
    before: str
    after: str
    reason: str


@dataclass(slots=True)
class Publisher:
    """The coordinator's hand: looks at the group, publishes, and tells (`page`)."""

    kafka: Kafka
    sender: Sender
    board: Board
    clock: Clock
    plan: Callable[[], Planned]
    look: GroupLook = field(default_factory=lambda: GroupLook(False, {}, {}))
    looked: bool = False
    history: History = field(default_factory=History)
    noted: deque[Noted] = field(default_factory=lambda: deque(maxlen=MOVES_KEPT))

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop. Kafka's failures are logged, and tried again."""
        admin: AIOKafkaAdminClient | None = None
        try:
            while not lifecycle.stop.is_set():
                try:
                    if admin is None:
                        admin = AIOKafkaAdminClient(**client_options(self.kafka))
                        await admin.start()
                    self.look = await look_at_group(admin, exporter_group(self.kafka))
                    self.looked = True
                    self.observe()
                    await self.step()
                except (Transient, KafkaError, OSError) as error:
                    _log.warning("shards_not_published", error=str(error))
                    if admin is not None:
                        await quietly(admin.close())
                    admin = None
                await lifecycle.pause(LOOK_EVERY_S)
        finally:
            if admin is not None:
                await quietly(admin.close())

    async def step(self) -> None:
        """Publish what follows from the last look, if anything does. Raises Transient."""
        if not self.board.read:
            return
        current = self.board.assignment
        now_ms, now_s = self.clock.now_ms(), self.clock.monotonic_s()
        made = next_assignment(current, self.look, self.plan(), now_ms, now_s, self.history)
        if made is None:
            return
        await self.sender.send(self.kafka.topic("shards"), [Outgoing(KEY, encode_assignment(made), 0)])
        before = dict(enumerate(current.owners)) if current else {}
        moved = moves(before, dict(enumerate(made.owners))) if current else []
        MOVED.inc(len(moved))
        self.noted += (Noted(made.published_at_ms, m.slot, m.before, m.after, made.reason) for m in moved)
        _log.info("assignment_published", epoch=made.epoch, reason=made.reason, moves=len(moved))

    def observe(self) -> None:
        """Set the metrics to what the last look saw. While the group rebalances nobody owns anything, for seconds."""
        planned = self.plan()
        weights = planned.weights
        SHARD_SLOTS.clear()
        SHARD_WEIGHT.clear()
        for shard, slots in self.look.members.items():
            SHARD_SLOTS.labels(shard=shard).set(len(slots))
            SHARD_WEIGHT.labels(shard=shard).set(sum(weights[s] for s in slots if s < planned.slots))
        owned = {slot for slots in self.look.members.values() for slot in slots}
        UNOWNED.set(len(set(range(planned.slots)) - owned))

    @property
    def settled(self) -> bool:
        """Whether every slot is owned as published, by the last look."""
        owned = {slot: shard for shard, theirs in self.look.members.items() for slot in theirs}
        wanted = dict(enumerate(self.board.assignment.owners)) if self.board.assignment else {}
        return self.look.stable and bool(wanted) and owned == wanted and len(owned) == self.plan().slots

    async def rest(self, lifecycle: Lifecycle) -> None:
        """Wait until the shards that are there own their slots, for `REST_S` at most; not at all where there is none.

        A task that is announced before that waits through a rebalance, and whoever takes it then must count as in doubt what its former
        owner may have paid for it.
        """
        deadline_s = self.clock.monotonic_s() + REST_S
        while not self.settled and self.clock.monotonic_s() < deadline_s:
            if self.looked and not self.look.members:
                return
            if await lifecycle.pause(0.2):
                return

    def page(self) -> dict[str, Any]:
        """`/shards`: who owns what now, by the group and as published. JSON-able; times are milliseconds since the epoch, UTC."""
        planned = self.plan()
        count, by_slot = planned.slots, planned.weights
        assignment = self.board.assignment
        targets: dict[int, list[str]] = {}
        for target, slot in sorted(planned.units.slots.items()):
            targets.setdefault(slot, []).append(target)

        def shard(name: str) -> dict[str, Any]:
            incarnation = self.board.incarnations.get(name)
            mine = self.look.members.get(name, ())
            return {
                "shard": name,
                "alive": name in self.look.members,
                "since_ms": incarnation.started_at_ms if incarnation else None,
                "host": incarnation.host if incarnation else None,
                "pid": incarnation.pid if incarnation else None,
                "slots": list(mine),
                "assigned": assignment.slots_of(name) if assignment else [],
                "targets": [t for s in mine for t in targets.get(s, ())],
                "weight": sum(by_slot[s] for s in mine if s < count),
                "quotas": assignment.shares_of(name) if assignment else {},
            }

        names = self.look.members.keys() | (set(assignment.shards) if assignment else set())
        return {
            "epoch": assignment.epoch if assignment else 0,
            "published_at_ms": assignment.published_at_ms if assignment else None,
            "reason": assignment.reason if assignment else "",
            "slots": count,
            "settled": self.settled,
            "shards": [shard(name) for name in sorted(names)],
            "moves": [
                {"at_ms": n.at_ms, "slot": n.slot, "from": n.before, "to": n.after, "reason": n.reason}
                for n in self.noted
            ],
        }
