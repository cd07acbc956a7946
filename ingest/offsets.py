"""Which offset of a partition may be committed when its records are finished out of order."""

from __future__ import annotations


class OffsetTracker:
    """The lowest offset that is not finished is where a successor must go on.

    *Never past unfinished work*: `next` is at most the lowest offset that was begun and is not done.
    """

    def __init__(self, next_offset: int) -> None:
        self._next = next_offset
        self._open: set[int] = set()
        self._begun = next_offset
        self.committed = next_offset
        """What its owner has committed."""

    def begin(self, offset: int) -> None:
        """A record was taken up. Offsets begin in ascending order (Kafka's), with gaps allowed."""
        self._open.add(offset)
        self._begun = offset + 1

    def done(self, offset: int) -> None:
        """A record is finished: what it stands for is safe elsewhere."""
        self._open.discard(offset)
        self._next = min(self._open, default=self._begun)

    @property
    def next(self) -> int:
        """What may be committed."""
        return self._next

    @property
    def open(self) -> int:
        """How many records are in the works."""
        return len(self._open)
