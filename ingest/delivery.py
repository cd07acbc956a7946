"""One write to a receiver, to its end: what it would not say is asked again, and what it refused is a dead letter before anybody forgets the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import structlog
from numpy.typing import NDArray

from ingest import letters, wire
from ingest.holding import Due, Lane, Member
from ingest.log import Outgoing, Sender
from ingest.model import Batch, BatchId, DeadLetter, RecordPosition, series_ids, split_version
from ingest.ports import Receiving, Record, RefusedSamples, SeriesSamples
from ingest.validate import Reason

_log = structlog.get_logger()

LETTERS_MAX: Final = 100
"""Of one write; what more the receiver refused is only counted."""
UNRESOLVED_ROUNDS_MAX: Final = 16
UNRESOLVED: Final = "unresolved"
DUPLICATE: Final = "duplicate"
"""Reasons of `ingest.sinks.remote_answers.Refusal`, which forwarding treats apart."""

_NO_BATCH = BatchId(bytes(16))
"""Points that were held are of several batches."""


@dataclass(slots=True, eq=False)
class Write:
    """What is under way. After a failure the same goes out again, so that the receiver's client knows it."""

    due_s: int
    dues: Sequence[Due]
    samples: list[SeriesSamples]
    of: list[tuple[Lane, int, int]]
    """By index in `samples`: lane, row, version of the first."""


class Delivery:
    """Writes to one receiver. `topics` are those of raw batches and of dead letters."""

    def __init__(self, receiver: str, receiving: Receiving, sender: Sender, topics: tuple[str, str]) -> None:
        self._receiver = receiver
        self._receiving = receiving
        self._sender = sender
        self._topic, self._dead_topic = topics
        self.cluster = ""
        """The Kafka cluster's id, for letters."""

    async def deliver(self, write: Write) -> list[RefusedSamples]:
        """What the receiver refused in the end, put aside. Raises Transient: then the same write has to be delivered again."""
        refused = await self._deliver(write.samples) if write.samples else []
        await self._bury(refused, write)
        return refused

    async def _deliver(self, samples: Sequence[SeriesSamples]) -> list[RefusedSamples]:
        """What the receiver refused in the end. What it did not say of every sample is asked again, by itself."""
        written = await self._receiving.write(samples)
        refused = [r for r in written.refused if r.reason != UNRESOLVED]
        unresolved = [r for r in written.refused if r.reason == UNRESOLVED]
        for _ in range(UNRESOLVED_ROUNDS_MAX):
            if not unresolved:
                break
            indices = [r.series for r in unresolved]
            written = await self._receiving.write(
                [_only(samples[r.series], r.timestamps_ms) for r in unresolved]
            )
            again = [
                RefusedSamples(indices[r.series], r.reason, r.said, r.timestamps_ms) for r in written.refused
            ]
            refused += [r for r in again if r.reason != UNRESOLVED]
            unresolved = [r for r in again if r.reason == UNRESOLVED]
        return refused + unresolved

    async def _bury(
        self,
        refused: Sequence[RefusedSamples],
        write: Write,
    ) -> None:
        """Letters for what the receiver refused; of a point that it has with another value there is none, for that is no surprise."""
        surprising = [one for one in refused if one.reason != DUPLICATE]
        dead = [
            self._letter(one, _only(write.samples[one.series], one.timestamps_ms), *write.of[one.series])
            for one in surprising[:LETTERS_MAX]
        ]
        if not dead:
            return
        sent = [Outgoing(letter.identity.encode(), wire.encode_dead_letter(letter)) for letter in dead]
        await self._sender.send(self._dead_topic, sent)
        _log.warning(
            "receiver_refused_samples",
            receiver=self._receiver,
            series=len(surprising),
            letters=len(dead),
            first_reason=surprising[0].reason,
            said=surprising[0].said,
        )

    def _letter(
        self, one: RefusedSamples, samples: SeriesSamples, lane: Lane, row: int, version: int
    ) -> DeadLetter:
        member = lane.members[row]
        partition, offset = lane.origins[row].tolist()
        batch = _batch_of(member, lane, samples, version)
        at = RecordPosition(self._topic, partition, offset)
        record = Record(at, wire.raw_key(member.target), b"", 0)
        bad = {0: Reason.REFUSED_BY_RECEIVER}
        what = f"{self._receiver} says {one.reason}: {one.said}"
        [letter] = letters.of_series(bad, what, batch, _NO_BATCH, record, self.cluster)
        return letter


def _only(samples: SeriesSamples, timestamps_ms: NDArray[np.int64]) -> SeriesSamples:
    some = np.isin(samples.timestamps_ms, timestamps_ms)
    return SeriesSamples(samples.labels, samples.timestamps_ms[some], samples.values[some])


def _batch_of(member: Member, lane: Lane, samples: SeriesSamples, version: int) -> Batch:
    """Refused samples as a letter can hold them."""
    revision, observed_at_ms = split_version(version)
    series = (member.series,)
    return Batch(
        task_id="0" * 32,
        target=member.target,
        service=lane.service,
        observed_at_ms=observed_at_ms,
        revision=revision,
        grid_s=max(1, lane.period_s),
        series=series,
        counts=np.array([len(samples.values)], np.int32),
        timestamps_s=samples.timestamps_ms // 1000,
        values=samples.values,
        ids=series_ids(series),
    )
