"""Records of `raw` → one sink: decode, validate, put aside what is bad, land what is good.

Guarantees:

* *One bad record never stops the good ones*, nor one bad point its batch: what is bad goes to `dead` with its reason and origin,
  before the position moves past it.
* *Exactly the stored position decides*: on assignment the record before it is read again and must be the one that the sink
  remembers; a topic that was created again, or a retention that passed the position, is Fatal.
* *A zombie is refused*: the sink moves a position by compare-and-set, in the transaction that lands the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import structlog

from ingest import wire
from ingest.clock import Clock
from ingest.errors import Fatal, Rejected
from ingest.log import Outgoing, Sender
from ingest.model import DeadLetter
from ingest.ports import Advance, Landable, Landed, Record, Sink
from ingest.validate import validate
from shard_config.model import Limits

_log = structlog.get_logger()

DEAD_PAYLOAD_BYTES_MAX = 900_000
"""A dead record's bytes are kept up to here, so that its letter fits a Kafka record; the origin has the rest."""


@dataclass(slots=True)
class _Partition:
    """Where this process stands in a partition that it owns."""

    next: int
    last_value_id: bytes
    verify: bool
    """True until the record before `next` was seen to be the one that the sink remembers."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one call of `land` did. `dead_records` did not decode; `dead_points` are single points of good batches."""

    landed: Landed
    dead_records: int
    dead_points: int
    next_offsets: dict[int, int]


class Landing:
    """Lands the records of one topic into one sink, for the partitions that this process owns."""

    def __init__(
        self, topic: str, dead_topic: str, sink: Sink, sender: Sender, limits: Limits, clock: Clock
    ) -> None:
        self._topic = topic
        self._dead_topic = dead_topic
        self._sink = sink
        self._sender = sender
        self._limits = limits
        self._clock = clock
        self._partitions: dict[int, _Partition] = {}

    async def open(self, partitions: Sequence[int], bounds: dict[int, tuple[int, int]]) -> dict[int, int]:
        """Take partitions over: partition → offset to read from. `bounds` are the log's (first, next-to-be-written).

        Raises Fatal where a stored position is missing or outside the log.
        """
        stored = await self._sink.positions(self._topic, partitions)
        opened: dict[int, _Partition] = {}
        starts: dict[int, int] = {}
        for p in partitions:
            where = f"topic {self._topic}/{p}"
            if p not in stored:
                raise Fatal(where, "the store has no position for it", "run `headgate setup`")
            first, end = bounds[p]
            here = stored[p]
            if not first <= here.next <= end:
                raise Fatal(
                    where,
                    f"the store's position {here.next} is outside the log's [{first}, {end}]",
                    "the topic was created again, or its retention passed the position: "
                    "fill the gap from the archive, then move the position",
                )
            verify = here.next > first and bool(here.last_value_id)
            opened[p] = _Partition(here.next, here.last_value_id, verify)
            starts[p] = here.next - 1 if verify else here.next
        self._partitions = opened
        return starts

    def close(self) -> None:
        """Forget all partitions: they went to somebody else."""
        self._partitions = {}

    async def land(self, records: Sequence[Record]) -> Progress:
        """Land records, which are in order within each partition. Raises Transient (try the same again) and Fatal."""
        fresh = [r for r in records if self._is_next(r)]
        dead: list[DeadLetter] = []
        landables: list[Landable] = []
        dead_records = 0
        for record in fresh:
            batch_id = wire.batch_id_of(record.value)
            try:
                batch = wire.decode_batch(record.value, self._limits)
            except Rejected as error:
                dead_records += 1
                kept = record.value[:DEAD_PAYLOAD_BYTES_MAX]
                dead.append(DeadLetter(error.reason, error.what, record.position, batch_id, "", kept))
                continue
            checked = validate(batch, self._clock.now_s(), self._limits)
            dead += (point.letter(record.position, batch_id) for point in checked.dead)
            if checked.accepted is not None:
                landables.append(Landable(batch_id, checked.accepted, batch.points - checked.accepted.points))
        await self._bury(dead)
        advances = self._advances(fresh)
        landed = await self._sink.land(advances, landables)
        for a in advances:
            self._partitions[a.partition] = _Partition(a.next, a.last_value_id, verify=False)
        return Progress(
            landed, dead_records, len(dead) - dead_records, {a.partition: a.next for a in advances}
        )

    def _is_next(self, record: Record) -> bool:
        """True for a record to land; checks and drops the one that was read again to know the topic by."""
        here = self._partitions.get(record.position.partition)
        if here is None:
            return False
        if here.verify and record.position.offset == here.next - 1:
            if value_id(record.value) != here.last_value_id:
                raise Fatal(
                    f"topic {self._topic}/{record.position.partition}",
                    f"record {record.position.offset} is not the one that landed before the position",
                    "the topic was created again: fill the gap from the archive, then move the position",
                )
            here.verify = False
            return False
        return record.position.offset >= here.next

    def _advances(self, records: Sequence[Record]) -> list[Advance]:
        last: dict[int, Record] = {r.position.partition: r for r in records}
        return [
            Advance(self._topic, p, self._partitions[p].next, r.position.offset + 1, value_id(r.value))
            for p, r in sorted(last.items())
        ]

    async def _bury(self, dead: Sequence[DeadLetter]) -> None:
        letters = [Outgoing(letter.identity.encode(), wire.encode_dead_letter(letter)) for letter in dead]
        await self._sender.send(self._dead_topic, letters)
        if dead:
            _log.warning("dead_letters_written", count=len(dead), first_reason=dead[0].reason)


def value_id(value: bytes) -> bytes:
    """16 bytes that know a record by its value: for a batch, its id."""
    return blake2b(value, digest_size=16).digest()
