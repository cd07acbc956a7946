"""Which samples of a write go in which request, and what became of them. Pure: `ingest.sinks.remote_write` sends.

* Each sample is taken, refused, or still in a request to come: in one of the three, exactly once.
* Requests that share a series are in one chain, in order of time; chains share none, so that they may be sent side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingest.errors import Transient
from ingest.ports import RefusedSamples, SeriesSamples, Written
from ingest.sinks.prompb import (
    SAMPLE_BYTES,
    TIMESTAMP_MS_END,
    TIMESTAMP_MS_MIN,
    encoded_request,
    encoded_samples,
)
from ingest.sinks.remote_answers import Refusal

REQUEST_BYTES_MAX = 8 * 1024 * 1024
"""Before compression, of a request with more than one series. Receivers refuse more than 32 MiB (Prometheus), 20 MiB (Thanos)."""


class Piece(NamedTuple):
    """Samples [start, stop) of all samples of a write; they are one series'."""

    series: int
    start: int
    stop: int


Request = list[Piece]
Chain = list[Request]
"""Requests that follow each other, the next one last. Two chains share no series."""


def samples_in(request: Request) -> int:
    return sum(piece.stop - piece.start for piece in request)


def chains_of(
    pieces: Sequence[Piece], samples_max: int, one_each: bool, label_bytes: Sequence[int]
) -> list[Chain]:
    """Requests of at most `samples_max` samples and about REQUEST_BYTES_MAX; `one_each`: with one sample of a series each.

    `pieces` has each series once; `label_bytes` is by series.
    """
    chains: list[Chain] = []
    for group in _groups(pieces, samples_max, one_each, label_bytes):
        longest = max(piece.stop - piece.start for piece in group)
        step = 1 if one_each else samples_max
        if longest <= step:
            chains.append([group])
            continue
        requests = [
            [
                Piece(piece.series, start, min(start + step, piece.stop))
                for piece in group
                if (start := piece.start + at) < piece.stop
            ]
            for at in range(0, longest, step)
        ]
        chains.append(requests[::-1])
    return chains


def _groups(
    pieces: Sequence[Piece], samples_max: int, one_each: bool, label_bytes: Sequence[int]
) -> Iterator[list[Piece]]:
    """Pieces whose first requests are one."""
    group: list[Piece] = []
    samples = size_bytes = 0
    for piece in pieces:
        more = 1 if one_each else piece.stop - piece.start
        more_bytes = label_bytes[piece.series] + SAMPLE_BYTES * more
        if group and (samples + more > samples_max or size_bytes + more_bytes > REQUEST_BYTES_MAX):
            yield group
            group, samples, size_bytes = [], 0, 0
        group.append(piece)
        samples += more
        size_bytes += more_bytes
    if group:
        yield group


def halve(chain: Chain) -> Chain | None:
    """Make the next request smaller: by series, where it has several; then the chain keeps the first half of them, and the others are returned.

    Else the samples of its one series become two requests.
    """
    request = chain[-1]
    if len(request) > 1:
        first = {piece.series for piece in request[: len(request) // 2]}
        mine = [[p for p in each if p.series in first] for each in chain]
        others = [[p for p in each if p.series not in first] for each in chain]
        chain[:] = [each for each in mine if each]
        return [each for each in others if each]
    (piece,) = request
    middle = (piece.start + piece.stop) // 2
    chain[-1:] = [[Piece(piece.series, middle, piece.stop)], [Piece(piece.series, piece.start, middle)]]
    return None


# --- one write --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Job:
    """A write under way: what is still to be sent, and what became of the rest."""

    series: Sequence[SeriesSamples]
    timestamps_ms: NDArray[np.int64]
    encoded: bytes
    """Of all samples."""
    rounds: list[list[Chain]] = field(default_factory=list)
    """The next one last. More than one where two entries have the same labels."""
    taken: int = 0
    refused: dict[tuple[int, str], tuple[str, list[Piece]]] = field(default_factory=dict)
    """By series and reason: the words, and the pieces."""
    narrowing: int = 0
    """Requests beyond those that were planned."""
    takes_requests: bool | None = None
    """Whether the receiver takes a request without samples; None: it was not asked."""
    failure: Transient | None = None
    left: list[Chain] = field(default_factory=list)

    def body(self, request: Request) -> bytes:
        encoded, series = self.encoded, self.series
        return encoded_request(
            [
                series[p.series].labels + encoded[p.start * SAMPLE_BYTES : p.stop * SAMPLE_BYTES]
                for p in request
            ]
        )

    def refuse(self, piece: Piece, reason: str, said: str) -> None:
        self.refused.setdefault((piece.series, reason), (said, []))[1].append(piece)

    def fail(self, failure: Transient) -> None:
        if self.failure is None or failure.retry_after_s > self.failure.retry_after_s:
            self.failure = failure

    def written(self) -> Written:
        times = self.timestamps_ms
        return Written(
            self.taken,
            tuple(
                RefusedSamples(
                    series,
                    reason,
                    said,
                    np.concatenate([times[p.start : p.stop] for p in sorted(pieces, key=lambda p: p.start)]),
                )
                for (series, reason), (said, pieces) in sorted(self.refused.items(), key=lambda item: item[0])
            ),
        )


def job_of(series: Sequence[SeriesSamples], samples_max: int, one_each: bool) -> Job:
    """A write, with what is refused here. Raises ValueError where the times of a series do not ascend."""
    counts = [len(one.values) for one in series]
    times = np.concatenate([one.timestamps_ms for one in series])
    values = np.concatenate([one.values for one in series])
    starts = np.concatenate(([0], np.cumsum(counts))).tolist()
    rises = np.diff(times) > 0
    rises[[at - 1 for at in starts[1:-1] if 0 < at < len(times)]] = True
    if not rises.all():
        raise ValueError("the times of a series have to ascend")
    encoded = encoded_samples(np.clip(times, TIMESTAMP_MS_MIN, TIMESTAMP_MS_END - 1), values)
    job = Job(series, times, encoded)
    bad_times = bool(len(times)) and (times.min() < TIMESTAMP_MS_MIN or times.max() >= TIMESTAMP_MS_END)
    rounds: list[list[Piece]] = []
    seen: dict[bytes, int] = {}
    for index, one in enumerate(series):
        piece = Piece(index, starts[index], starts[index + 1])
        labels = one.labels
        if bad_times:
            piece = _within_time(job, piece)
        if piece.start == piece.stop:
            continue
        seen[labels] = turn = seen.get(labels, 0) + 1
        if turn > len(rounds):
            rounds.append([])
        rounds[turn - 1].append(piece)
    sizes = [len(one.labels) for one in series]
    job.rounds = [chains_of(pieces, samples_max, one_each, sizes) for pieces in reversed(rounds)]
    return job


def _within_time(job: Job, piece: Piece) -> Piece:
    """The samples whose times can be written; the others are refused."""
    times = job.timestamps_ms[piece.start : piece.stop]
    start, stop = (
        piece.start + int(np.searchsorted(times, end)) for end in (TIMESTAMP_MS_MIN, TIMESTAMP_MS_END)
    )
    for some, reason in (
        (Piece(piece.series, piece.start, start), Refusal.TOO_OLD),
        (Piece(piece.series, stop, piece.stop), Refusal.TOO_FAR_AHEAD),
    ):
        if some.start < some.stop:
            job.refuse(some, reason, "before 1971-02-02 or after 2109-05-15, and not sent")
    return Piece(piece.series, start, stop)
