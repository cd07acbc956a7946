"""What is remembered and counted of forwarding to a receiver: how far records are done with, and how much was sent and refused. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

import numpy as np
import orjson
from numpy.typing import NDArray

NOTE_BYTES_MAX: Final = 3_500
"""Kafka keeps 4,096 bytes beside an offset."""
DELAY_BUCKETS_S: Final = (15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0)


@dataclass(slots=True)
class Progress:
    """How far one partition's records are done with. Records are taken in order of their offsets.

    `next` is the record to be taken next, `commit` the oldest one that still has points waiting.
    """

    next: int
    _open: deque[tuple[int, int]] = field(default_factory=deque)
    """Offset of a record, and up to when everything must have been sent for it to be done with."""

    def taken(self, offset: int, done_s: int | None) -> None:
        """A record was taken; None: nothing of it waits."""
        self.next = offset + 1
        if done_s is not None:
            self._open.append((offset, done_s))

    def sent(self, until_s: int) -> None:
        """Everything that was due up to then was sent."""
        while self._open and self._open[0][1] <= until_s:
            self._open.popleft()

    @property
    def commit(self) -> int:
        return self._open[0][0] if self._open else self.next


@dataclass(frozen=True, slots=True)
class Note:
    """What stands beside a committed offset: of records before `next`, all points that had settled by `sent_s` were sent."""

    sent_s: int
    next: int
    settling_s: Mapping[str, int] = field(default_factory=dict)
    """By service, as it was then; nothing where points do not wait."""
    by: str = ""
    """Whose note it is; for those who watch, also what that process did for the receiver:"""
    newest_s: int = 0
    """The newest timestamp that was sent."""
    samples: int = 0
    refused: int = 0

    def write(self) -> str:
        """Services that leave no room are left out: their points are sent again, which the receiver refuses."""
        kept: dict[str, int] = {}
        size = 256
        for service, seconds in self.settling_s.items():
            size += len(service) + 16
            if size > NOTE_BYTES_MAX:
                break
            kept[service] = seconds
        return orjson.dumps(asdict(self) | {"settling_s": kept}).decode()

    @classmethod
    def read(cls, text: str) -> Note | None:
        """The inverse of `write`; None of anything else."""
        try:
            found = orjson.loads(text)
            settling_s = {str(k): int(v) for k, v in found["settling_s"].items()}
            sent_s, next_, newest_s, samples, refused = (
                int(found[key]) for key in ("sent_s", "next", "newest_s", "samples", "refused")
            )
            return cls(sent_s, next_, settling_s, str(found["by"]), newest_s, samples, refused)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


@dataclass(slots=True)
class Tally:
    """What was done for one receiver since the process began."""

    samples: int = 0
    refused: Counter[str] = field(
        default_factory=lambda: Counter(dict.fromkeys(("changed", "out_of_order", "too_old"), 0))
    )
    """Samples by reason; under bad_record whole records. The usual reasons are there from the start, so that their increase shows."""
    skipped_records: int = 0
    """That Kafka had dropped before they were read."""
    delays: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(DELAY_BUCKETS_S) + 1, np.int64), repr=False
    )
    """Acknowledged samples by age, a bucket each of DELAY_BUCKETS_S, and one for what is older."""
    delay_sum_s: float = 0.0
    series: int = 0
    """That are known, whether points of theirs wait or not."""
    held: int = 0
    lag_records: int = 0
    failing: bool = False
    """The last write failed."""

    def acknowledged(self, timestamps_s: NDArray[np.int64], now_s: float, sign: int = 1) -> None:
        """Count samples; with −1 take them off again."""
        times, counts = np.unique(timestamps_s, return_counts=True)
        ages, counts = now_s - times, counts * sign
        np.add.at(self.delays, np.searchsorted(DELAY_BUCKETS_S, ages), counts)
        self.delay_sum_s += float((ages * counts).sum())
        self.samples += int(counts.sum())
