"""Where a reader of one topic stands, as its store remembers it: the only truth about what has landed.

* A position outside the log is Fatal, never guessed at: the topic was created again, or its retention passed the position.
* On assignment the record before the position is read again and must be the one that the store remembers, for Kafka's clients
  read on silently in a topic that was created again and has grown past the old position. Nothing is taken up before that. Only where
  retention has taken exactly that record, there is nothing to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ingest.errors import Fatal
from ingest.ports import Advance, Record, StoredPosition


@dataclass(slots=True)
class _Place:
    next: int
    last_value_id: bytes
    verify: bool
    """True until the record before `next` was seen to be the one that the store remembers."""


class Positions:
    """The partitions of one topic that this process owns now."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._places: dict[int, _Place] = {}

    def open(
        self,
        partitions: Sequence[int],
        stored: Mapping[int, StoredPosition],
        bounds: Mapping[int, tuple[int, int]],
    ) -> dict[int, int]:
        """Take partitions over, in place of those before: partition → offset to read from.

        `bounds` are the log's (first, next to be written). Raises Fatal where a position is missing or outside them.
        """
        places: dict[int, _Place] = {}
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
                    "the topic was created again, or its retention passed the position: fill the gap from the archive, then "
                    "move the position (`headgate positions`)",
                )
            verify = here.next > first and bool(here.last_value_id)
            places[p] = _Place(here.next, here.last_value_id, verify)
            starts[p] = here.next - 1 if verify else here.next
        self._places = places
        return starts

    def close(self) -> None:
        """Forget all partitions: they went to somebody else."""
        self._places = {}

    def fresh(self, records: Sequence[Record]) -> list[Record]:
        """The records to take up, in order: not of other partitions, not before the position.

        Raises Fatal where the record before the position is not the remembered one, or was not there to be read.
        """
        return [r for r in records if self._is_fresh(r)]

    def advances(self, records: Sequence[Record]) -> list[Advance]:
        """How taking these records moves the positions, sorted by partition."""
        last = {r.position.partition: r for r in records}
        return [
            Advance(self._topic, p, self._places[p].next, r.position.offset + 1, value_id(r.value))
            for p, r in sorted(last.items())
        ]

    def advanced(self, advances: Sequence[Advance]) -> None:
        """The store has these now."""
        for a in advances:
            self._places[a.partition] = _Place(a.next, a.last_value_id, verify=False)

    def _is_fresh(self, record: Record) -> bool:
        at = record.position
        here = self._places.get(at.partition)
        if here is None:
            return False
        if here.verify and at.offset >= here.next - 1:
            self._compare(record, here)
            here.verify = False
        return at.offset >= here.next

    def _compare(self, record: Record, here: _Place) -> None:
        before = here.next - 1
        if record.position.offset != before:
            what = f"record {before} before the position did not come"
        elif value_id(record.value) != here.last_value_id:
            what = f"record {before} is not the one that landed before the position"
        else:
            return
        raise Fatal(
            f"topic {self._topic}/{record.position.partition}",
            what,
            "the topic was created again: fill the gap from the archive, then move the position (`headgate positions`)",
        )


def value_id(value: bytes) -> bytes:
    """16 bytes that know a record by its value: for a batch, its id."""
    return blake2b(value, digest_size=16).digest()
