"""Records of `raw` → one sink: decode, validate, put aside what is bad, land what is good.

Guarantees:

* *One bad record never stops the good ones*, nor one bad point its batch: what is bad goes to `dead` with its reason and origin,
  before the position moves past it.
* *Exactly the stored position decides*: on assignment the record before it is read again and must be the one that the sink
  remembers; a topic that was created again, or a retention that passed the position, is Fatal.
* *A zombie is refused*: the sink moves a position by compare-and-set, in the transaction that lands the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from ingest import wire
from ingest.clock import Clock
from ingest.errors import Rejected
from ingest.log import Outgoing, Sender
from ingest.model import DeadLetter
from ingest.ports import Landable, Landed, Record, Sink
from ingest.positions import Positions
from ingest.validate import validate
from shard_config.model import Limits

_log = structlog.get_logger()

DEAD_PAYLOAD_BYTES_MAX = 900_000
"""A dead record's bytes are kept up to here, so that its letter fits a Kafka record; the origin has the rest."""


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
        self._positions = Positions(topic)

    async def open(self, partitions: Sequence[int], bounds: Mapping[int, tuple[int, int]]) -> dict[int, int]:
        """Take partitions over: partition → offset to read from. Raises Fatal, as `Positions.open`, and Transient."""
        return self._positions.open(partitions, await self._sink.positions(self._topic, partitions), bounds)

    def close(self) -> None:
        """Forget all partitions: they went to somebody else."""
        self._positions.close()

    async def land(self, records: Sequence[Record]) -> Progress:
        """Land records, which are in order within each partition. Raises Transient (try the same again) and Fatal."""
        fresh = self._positions.fresh(records)
        if not fresh:
            return Progress(Landed(0, 0, 0, True), 0, 0, {})
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
        advances = self._positions.advances(fresh)
        landed = await self._sink.land(advances, landables)
        self._positions.advanced(advances)
        return Progress(
            landed, dead_records, len(dead) - dead_records, {a.partition: a.next for a in advances}
        )

    async def _bury(self, dead: Sequence[DeadLetter]) -> None:
        letters = [Outgoing(letter.identity.encode(), wire.encode_dead_letter(letter)) for letter in dead]
        await self._sender.send(self._dead_topic, letters)
        if dead:
            _log.warning("dead_letters_written", count=len(dead), first_reason=dead[0].reason)
