"""Records of `raw` → one sink: decode, validate, put aside what is bad, land what is good.

Guarantees:

* *One bad record never stops the good ones*, nor one bad point its batch: what is bad goes to `dead` with its reason and origin,
  before the position moves past it. A series that the sink refuses is such a point, of all its points.
* *Exactly the stored position decides*: on assignment the record before it is read again and must be the one that the sink
  remembers; a topic that was created again, or a retention that passed the position, is Fatal.
* *A zombie is refused*: the sink moves a position by compare-and-set, in the transaction that lands the rows.
* *A bad deploy stops before it buries*: where more than limits.dead_share_max of the last records of known targets would be dead
  letters, landing is Fatal instead of putting one more aside. See docs/decisions/0009-dead-letters.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ingest import letters, wire
from ingest.aside import Intake, Judged
from ingest.balance import put_aside
from ingest.batch import without_series
from ingest.clock import Clock
from ingest.errors import Fatal, Rejected
from ingest.log import Sender
from ingest.model import BatchId, DeadLetter
from ingest.ports import Advance, Landable, Landed, Record, SeriesRejected, Sink
from ingest.validate import validate
from shard_config.model import Limits

REFUSALS_MAX = 16
"""Times that a sink may refuse series of one landing; each takes at least one series out."""
CLOCK_BEHIND_S_MAX = 7200
"""So far our clock may be behind the log's and nothing good is taken for future. Brokers refuse records an hour ahead of their own clock."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one call of `land` did. `dead_records` did not decode; `dead_points` are single points of good batches."""

    landed: Landed
    dead_records: int
    dead_points: int
    next_offsets: dict[int, int]


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a record. `dead` is the reason where it did not decode, or where no point of it was good."""

    record: Record
    landable: Landable | None
    letters: tuple[DeadLetter, ...]
    dead: str

    @property
    def judged(self) -> Judged:
        return self.record, self.dead


class Landing:
    """Lands the records of one topic into one sink, for the partitions that this process owns."""

    def __init__(
        self,
        topic: str,
        dead_topic: str,
        sink: Sink,
        sender: Sender,
        limits: Limits,
        clock: Clock,
        *,
        targets: Collection[str] = (),
    ) -> None:
        """`targets` (source/account/region) are those whose records count for limits.dead_share_max."""
        self._sink = sink
        self._limits = limits
        self._clock = clock
        self._intake = Intake(topic, dead_topic, sender, limits.dead_share_max, targets)

    def configure(self, limits: Limits, targets: Collection[str]) -> None:
        """Go by these from the next record on."""
        self._limits = limits
        self._intake.configure(limits.dead_share_max, targets)

    async def open(
        self, partitions: Sequence[int], bounds: Mapping[int, tuple[int, int]], *, cluster: str = ""
    ) -> dict[int, int]:
        """Take partitions over: partition → offset to read from. Raises Fatal, as `Intake.open`, and Transient.

        `cluster` is the Kafka cluster's id, for dead letters.
        """
        stored = await self._sink.positions(self._intake.topic, partitions)
        return self._intake.open(partitions, stored, bounds, cluster)

    def close(self) -> None:
        """Forget all partitions: they went to somebody else."""
        self._intake.close()

    async def land(self, records: Sequence[Record]) -> Progress:
        """Land records, which are in order within each partition. Raises Transient (try the same again) and Fatal."""
        taken = await self._intake.take(records, self._take)
        if not taken:
            return Progress(Landed(0, 0, 0, True), 0, 0, {})
        advances = self._intake.advances([t.record for t in taken])
        landed, landables = await self._land(advances, taken)
        self._intake.done(advances, taken)
        return Progress(
            landed,
            dead_records=sum(t.landable is None for t in taken),
            dead_points=sum(landable.dead_points for landable in landables),
            next_offsets={a.partition: a.next for a in advances},
        )

    def _take(self, record: Record) -> Taken:
        """Decode and validate one record."""
        try:
            decoded = wire.decode_by_series(record.value, self._limits)
        except Rejected as error:
            letter = letters.of_record(record, self._intake.cluster, error)
            return Taken(record, None, (letter,), letter.reason)
        batch_id = wire.batch_id_of(record.value)
        batch, bad = decoded.batch, decoded.bad
        dead = list(letters.of_series(bad, "", batch, batch_id, record, self._intake.cluster)) if bad else []
        good = without_series(batch, bad) if bad else batch
        checked = validate(good, self._now_s(record), self._limits)
        dead += letters.of_points(checked.dead, good, record, self._intake.cluster)
        # Without a good point it lands all the same, empty: else its look would stay open for ever.
        accepted = checked.accepted or without_series(good, range(len(good.series)))
        gone = put_aside(batch, accepted) if dead else ()
        landable = Landable(batch_id, accepted, batch.points - accepted.points, gone)
        return Taken(record, landable, tuple(dead), dead[0].reason if dead and not accepted.points else "")

    def _now_s(self, record: Record) -> int:
        """By our clock, or the log's where ours is behind: else all that is new would be put aside as future."""
        now_s = self._clock.now_s()
        return max(now_s, min(record.timestamp_ms // 1000, now_s + CLOCK_BEHIND_S_MAX))

    async def _land(
        self, advances: Sequence[Advance], taken: Sequence[Taken]
    ) -> tuple[Landed, list[Landable]]:
        """What landed, and as what: points of series that the sink refused are buried, then the others land."""
        found = [(t.record, t.landable) for t in taken if t.landable is not None]
        for _ in range(REFUSALS_MAX):
            try:
                landables = [landable for _, landable in found]
                return await self._sink.land(advances, landables), landables
            except SeriesRejected as error:
                refused: dict[BatchId, dict[int, str]] = {}
                for batch_id, index in error.series:
                    refused.setdefault(batch_id, {})[index] = error.reason
                buried: list[DeadLetter] = []
                for i, (record, landable) in enumerate(found):
                    if bad := refused.get(landable.batch_id):
                        batch = landable.batch
                        buried += letters.of_series(
                            bad, error.what, batch, landable.batch_id, record, self._intake.cluster
                        )
                        left = without_series(batch, bad)
                        left_landable = Landable(
                            landable.batch_id,
                            left,
                            landable.dead_points + batch.points - left.points,
                            landable.dead_windows + put_aside(batch, left),
                        )
                        found[i] = record, left_landable
                await self._intake.bury(buried)
        raise Fatal(
            f"topic {self._intake.topic}",
            f"the sink still refuses series after {REFUSALS_MAX} times",
            "see the dead-letter topic for which",
        )
