"""What each stage needs of the outside, as Protocols. The real ones and the fakes of the tests pass one contract suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ingest.errors import Rejected
from ingest.model import (
    Batch,
    BatchId,
    Outcome,
    Receipt,
    RecordPosition,
    Target,
    TaskItem,
    WindowCount,
)


class Source(Protocol):
    """Something that answers looks: CloudWatch, or endpoints in Prometheus' text format."""

    def look(
        self, task_id: str, target: Target, item: TaskItem, deadline_s: float
    ) -> AsyncIterator[Batch | Outcome]:
        """Look at one item, until `deadline_s` on the clock's monotonic time at the latest.

        Yields batches as they are ready and, last and exactly once, an Outcome: never an empty success where there was an
        error, and never an exception for what the source or the network did (that is an Outcome).
        """
        ...

    async def close(self) -> None: ...


@runtime_checkable
class Informed(Protocol):
    """A source that is told what became of its looks, and tells what those have cost that had no end."""

    def broke(self, task_id: str, service: str) -> Outcome | None:
        """What a look has asked for that was cut off, or raised, before its Outcome: said once. None where nothing is known."""
        ...

    async def published(self, task_id: str, service: str) -> None:
        """All that a look has brought is archived and published, and its receipt is out."""
        ...


class Stored(Protocol):
    """Bytes that are somewhere else than in memory."""

    def read(self) -> bytes: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Payload:
    """A batch as it travels: one Kafka record value, and the same bytes in the archive. Its id is that of its bytes."""

    batch_id: BatchId
    held: bytes | Stored = field(repr=False, compare=False)

    @property
    def value(self) -> bytes:
        """The bytes; read anew each time where they are not in memory."""
        return self.held if isinstance(self.held, bytes) else self.held.read()

    def __len__(self) -> int:
        return len(self.held)


@dataclass(frozen=True, slots=True)
class ArchivedTask:
    """What the archive holds of one task: its receipt, and the payloads in the receipt's order, of each item the published ones first."""

    receipt: Receipt
    payloads: tuple[Payload, ...]


class Archive(Protocol):
    """The raw archive. What is in it is never changed."""

    async def put(self, task: ArchivedTask) -> ArchivedTask:
        """Put if absent under `task.receipt.archive_key`; returns what *is* archived.

        That is `task`, or, where another run of the same task came first, what that one wrote: publish that, not yours.
        Raises Transient.
        """
        ...

    async def get(self, archive_key: str) -> ArchivedTask | None:
        """What is archived under a key, or None. Raises Transient; Rejected where the object is spoilt."""
        ...

    async def mark_begun(self, archive_key: str) -> int:
        """Leave a mark that another run of a task begins; returns how many may have begun before it, 1 where this is the first mark.

        For a run that may be a second try, before it asks. Raises Transient, soon.
        """
        ...


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record, as consumers see it."""

    position: RecordPosition
    key: bytes
    value: bytes
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Advance:
    """A partition's position moving on: compare-and-set from `expected_next` to `next`.

    `last_value_id` is blake2b-128 of the value of record `next - 1`; on assignment that record is read again and must match, for
    Kafka's clients do not notice that a topic was created again.
    """

    topic: str
    partition: int
    expected_next: int
    next: int
    last_value_id: bytes


@dataclass(frozen=True, slots=True)
class StoredPosition:
    """Where a sink goes on in a partition. `last_value_id` is empty at position 0."""

    next: int
    last_value_id: bytes


@dataclass(frozen=True, slots=True)
class Landable:
    """An accepted batch on its way into a sink."""

    batch_id: BatchId
    batch: Batch
    dead_points: int
    """Points of this batch that validation put aside: the balance needs them."""
    dead_windows: tuple[WindowCount, ...] = ()
    """The same by window (`ingest.balance.put_aside`): what the receipt says of a window less this must be in the store."""


@dataclass(frozen=True, slots=True)
class Landed:
    """What one landing did. `points` were in the batches; `skipped` of them were known by batch id and not touched."""

    batches: int
    points: int
    skipped_batches: int
    copied: bool
    """True where plain COPY did; False where rows went through staging, for fear of a conflict or because of one."""
    staged_points: int = 0


class SeriesRejected(Rejected):
    """A sink refuses some series of a landing, and has landed nothing.

    Write their points to the dead-letter topic, take them out of their batches (as dead points), and land again: in this
    order a crash loses no dead letter.
    """

    def __init__(self, where: str, reason: str, what: str, series: Sequence[tuple[BatchId, int]]) -> None:
        super().__init__(where, reason, what)
        self.series = tuple(series)
        """Batch id, and index in that batch's `series`."""


class Sink(Protocol):
    """Where samples land. One consumer group per sink."""

    async def claim(self, topic: str, partitions: Sequence[int]) -> None:
        """Record that exactly these partitions of the topic are ours: at each assignment, before `positions`; none at a revocation.

        Ends what a previous owner still has open in the sink for them, so that a consumer that was stopped halfway
        does not block its successor. Raises Transient.
        """
        ...

    async def positions(self, topic: str, partitions: Sequence[int]) -> Mapping[int, StoredPosition]:
        """Stored positions; a partition without one is left out (and that is an error of whoever created the topic)."""
        ...

    async def init_positions(self, topic: str, partitions: Sequence[int]) -> None:
        """Store position 0 where there is none. Called by whoever created the topic, right after."""
        ...

    async def land(self, advances: Sequence[Advance], batches: Sequence[Landable]) -> Landed:
        """Land the batches and move the positions in one transaction, keeping the maximum of (version, value).

        Raises Transient (try the same again), Fatal where a position is not the expected one (another consumer owns the
        partition now: drop everything in memory and rejoin), SeriesRejected where an id has landed with other labels.
        """
        ...

    async def close(self) -> None: ...


# --- Prometheus -------------------------------------------------------------------------------------------------

LabelSet = tuple[tuple[str, str], ...]
"""A series' labels as Prometheus has them, `__name__` among them: sorted by name, no name twice, no value empty."""


EncodedLabels = bytes
"""A LabelSet as remote write has it (`ingest.sinks.prompb.encoded_labels`): a third of its memory, and ready to be sent."""


@dataclass(frozen=True, slots=True, eq=False)
class SeriesSamples:
    """Samples of one series on their way to a receiver; times ascend, none is there twice."""

    labels: EncodedLabels
    timestamps_ms: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RefusedSamples:
    """What a receiver would not take of one series. `series` is its index in what was written; `said` are the receiver's words, shortened."""

    series: int
    reason: str
    said: str
    timestamps_ms: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """What one write did: samples that the receiver has, and those that it refused."""

    samples: int
    refused: tuple[RefusedSamples, ...] = ()


class Receiving(Protocol):
    """One receiver of samples that can be neither corrected nor audited: the first value that it took stays."""

    async def write(self, series: Sequence[SeriesSamples]) -> Written:
        """Write all samples; returns when the receiver has each, or has refused it.

        Raises Transient where that is not known of every one (write all again then, which changes nothing), and where the receiver refuses
        us altogether (no such URL, not allowed): with the remedy.
        """
        ...

    async def close(self) -> None: ...
