"""Records of `raw` → one sink: decode, validate, put aside what is bad, land what is good.

Guarantees:

* *One bad record never stops the good ones*, nor one bad point its batch: what is bad goes to `dead` with its reason and origin,
  before the position moves past it. A series that the sink refuses is such a point, of all its points.
* *Exactly the stored position decides*: on assignment the record before it is read again and must be the one that the sink
  remembers; a topic that was created again, or a retention that passed the position, is Fatal.
* *A zombie is refused*: the sink moves a position by compare-and-set, in the transaction that lands the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import orjson
import structlog

from ingest import wire
from ingest.clock import Clock
from ingest.errors import Fatal, Rejected
from ingest.log import Outgoing, Sender
from ingest.model import BatchId, DeadLetter, RecordPosition
from ingest.ports import Advance, Landable, Landed, Record, SeriesRejected, Sink
from ingest.positions import Positions
from ingest.validate import describe, validate
from shard_config.model import Limits

_log = structlog.get_logger()

DEAD_PAYLOAD_BYTES_MAX = 900_000
"""A dead record's bytes are kept up to here, so that its letter fits a Kafka record; the origin has the rest."""


REFUSALS_MAX = 16
"""Times that a sink may refuse series of one landing; each takes at least one series out."""


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
        found: list[tuple[RecordPosition, Landable]] = []
        dead_records = dead_points = 0
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
            dead_points += checked.dead_points
            if checked.accepted is None:
                # It has landed all the same, without points: else its look would stay open for ever.
                none_left = without_series(Landable(batch_id, batch, 0), set(range(len(batch.series))))
                found.append((record.position, none_left))
            else:
                found.append((record.position, Landable(batch_id, checked.accepted, checked.dead_points)))
        await self._bury(dead)
        advances = self._positions.advances(fresh)
        landed, refused_points = await self._land(advances, found)
        self._positions.advanced(advances)
        return Progress(
            landed, dead_records, dead_points + refused_points, {a.partition: a.next for a in advances}
        )

    async def _land(
        self, advances: Sequence[Advance], found: list[tuple[RecordPosition, Landable]]
    ) -> tuple[Landed, int]:
        """What landed, and the points of series that the sink refused: those are buried, then the others land."""
        refused_points = 0
        for _ in range(REFUSALS_MAX):
            try:
                return await self._sink.land(advances, [landable for _, landable in found]), refused_points
            except SeriesRejected as error:
                refused: dict[BatchId, set[int]] = {}
                for batch_id, index in error.series:
                    refused.setdefault(batch_id, set()).add(index)
                letters: list[DeadLetter] = []
                for i, (origin, landable) in enumerate(found):
                    if indices := refused.get(landable.batch_id):
                        letters += _refusals(origin, landable, indices, error)
                        left = without_series(landable, indices)
                        refused_points += left.dead_points - landable.dead_points
                        found[i] = origin, left
                await self._bury(letters)
        raise Fatal(
            f"topic {self._topic}",
            f"the sink still refuses series after {REFUSALS_MAX} times",
            "see the dead-letter topic for which",
        )

    async def _bury(self, dead: Sequence[DeadLetter]) -> None:
        letters = [Outgoing(letter.identity.encode(), wire.encode_dead_letter(letter)) for letter in dead]
        await self._sender.send(self._dead_topic, letters)
        if dead:
            _log.warning("dead_letters_written", count=len(dead), first_reason=dead[0].reason)


def without_series(landable: Landable, indices: set[int]) -> Landable:
    """The same without the points of some series; the series stay, with a count of 0, and the points count as dead."""
    batch = landable.batch
    keep = ~np.isin(np.arange(len(batch.series)), list(indices))
    kept = np.repeat(keep, batch.counts)
    left = replace(
        batch,
        counts=np.where(keep, batch.counts, 0).astype(np.int32),
        timestamps_s=batch.timestamps_s[kept],
        values=batch.values[kept],
    )
    return Landable(landable.batch_id, left, landable.dead_points + batch.points - left.points)


def _refusals(
    origin: RecordPosition, landable: Landable, indices: set[int], error: SeriesRejected
) -> list[DeadLetter]:
    """A letter a series: its points, as they stand in the batch, are one payload."""
    batch = landable.batch
    ends = np.cumsum(batch.counts, dtype=np.int64).tolist()
    letters = []
    for i in sorted(indices):
        own = slice(ends[i] - int(batch.counts[i]), ends[i])
        points = zip(batch.timestamps_s[own].tolist(), map(repr, batch.values[own].tolist()), strict=True)
        payload = orjson.dumps({"points": list(points)})[:DEAD_PAYLOAD_BYTES_MAX]
        letters.append(
            DeadLetter(
                error.reason, error.what, origin, landable.batch_id, describe(batch.series[i]), payload
            )
        )
    return letters
