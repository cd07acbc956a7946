"""Putting aside: letters are written, and where they become too many, a reader rather stops (docs/decisions/0009-dead-letters.md).

* Only records whose key names one of the configured targets count. So rubbish from elsewhere, however much of it, stops nobody; and who may
  write under the keys of real targets could do worse.
* The share is the log's and not the process's: at each assignment the records before the positions are read again, and judged.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol, TypeVar

import structlog

from ingest import wire
from ingest.errors import Fatal
from ingest.log import Outgoing, Sender
from ingest.model import DeadLetter
from ingest.ports import Advance, Record, StoredPosition
from ingest.positions import Positions

_log = structlog.get_logger()

SHARE_RECORDS = 200
"""The share of dead records is taken over so many of the last records of known targets."""

SHARE_RECORDS_MIN = 50
"""Over fewer it says nothing."""

Judged = tuple[Record, str]
"""A record, and the reason why it would be a dead letter; empty of a good one."""


async def bury(sender: Sender, topic: str, dead: Sequence[DeadLetter]) -> None:
    """Write letters to the dead-letter topic. Raises Transient: do the same again."""
    sent = [Outgoing(letter.identity.encode(), wire.encode_dead_letter(letter)) for letter in dead]
    await sender.send(topic, sent)
    if dead:
        _log.warning("dead_letters_written", count=len(dead), first_reason=dead[0].reason)


class DeadShare:
    """How many of the last records would be dead letters, and which are read again to know."""

    def __init__(self, share_max: float, targets: Collection[str]) -> None:
        self.configure(share_max, targets)
        self._last: deque[str] = deque(maxlen=SHARE_RECORDS)
        """Reasons; empty of a good record."""
        self._reread: dict[int, tuple[int, int]] = {}
        """By partition, the offsets before the position that are read again for the share alone."""

    def configure(self, share_max: float, targets: Collection[str]) -> None:
        """What was learned of the targets before stays learned."""
        self._share_max = share_max
        self._targets = frozenset(target.encode() for target in targets)

    def open(self, positions: Mapping[int, int], bounds: Mapping[int, tuple[int, int]]) -> dict[int, int]:
        """Take these partitions over: partition → where to begin to read, a little before its position."""
        self._last.clear()
        before = SHARE_RECORDS // max(1, len(positions))
        self._reread = {p: (max(bounds[p][0], next_ - before), next_) for p, next_ in positions.items()}
        return {p: first for p, (first, _) in self._reread.items()}

    def close(self) -> None:
        """Forget all partitions."""
        self._reread = {}

    def earlier(self, record: Record) -> bool:
        """Whether a record is from before its partition's position, and is to be judged and learned; once each."""
        at = record.position
        first, end = self._reread.get(at.partition, (0, 0))
        if not first <= at.offset < end:
            return False
        self._reread[at.partition] = at.offset + 1, end
        return True

    def learn(self, judged: Sequence[Judged]) -> None:
        """What was done with these is known now."""
        self._last += self._counted(judged)

    def check(self, where: str, judged: Sequence[Judged]) -> None:
        """Raise Fatal where these are too many dead ones, on top of what was learned. What is not dead never stops."""
        counted = self._counted(judged)
        last = [*self._last, *counted][-SHARE_RECORDS:]
        reasons = Counter(reason for reason in last if reason)
        if any(counted) and len(last) >= SHARE_RECORDS_MIN and reasons.total() > self._share_max * len(last):
            [(reason, times)] = reasons.most_common(1)
            raise Fatal(
                where,
                f"{reasons.total()} of the last {len(last)} records would be dead letters, {times} of them {reason}",
                "a change broke writing or reading: roll it back and start again, nothing is lost; or, where they are to be put aside, set "
                "limits.dead_share_max to 1",
            )

    def _counted(self, judged: Sequence[Judged]) -> list[str]:
        """Reasons of those that count. A key is its target, or the target and a spread (`ingest.wire.raw_key`)."""
        known = self._targets
        return [
            reason
            for record, reason in judged
            if record.key in known or record.key.rpartition(b"/")[0] in known
        ]


class Taken(Protocol):
    """What became of a record, as landing and projecting have it."""

    @property
    def judged(self) -> Judged: ...

    @property
    def letters(self) -> tuple[DeadLetter, ...]: ...


T = TypeVar("T", bound=Taken)


class Intake:
    """One topic's partitions that this process owns: where each stands, and whether too much of it would be dead.

    `take` first, then the transaction that moves the positions by `advances`, then `done`.
    """

    def __init__(
        self, topic: str, dead_topic: str, sender: Sender, dead_share_max: float, targets: Collection[str]
    ) -> None:
        """`targets` (source/account/region) are those whose records count for `dead_share_max`."""
        self.topic = topic
        self.cluster = ""
        """The Kafka cluster's id, for dead letters."""
        self._dead_topic = dead_topic
        self._sender = sender
        self._positions = Positions(topic)
        self._share = DeadShare(dead_share_max, targets)

    def configure(self, dead_share_max: float, targets: Collection[str]) -> None:
        """Go by these from the next record on."""
        self._share.configure(dead_share_max, targets)

    def open(
        self,
        partitions: Sequence[int],
        stored: Mapping[int, StoredPosition],
        bounds: Mapping[int, tuple[int, int]],
        cluster: str,
    ) -> dict[int, int]:
        """Take partitions over: partition → offset to read from. Raises Fatal, as `Positions.open`.

        Reading begins a little before the positions: what was done before shows at once whether this process can read what others could,
        before it puts anything aside.
        """
        starts = self._positions.open(partitions, stored, bounds)
        self.cluster = cluster
        begin = self._share.open({p: stored[p].next for p in starts}, bounds)
        return {p: min(start, begin[p]) for p, start in starts.items()}

    def close(self) -> None:
        """Forget all partitions: they went to somebody else."""
        self._positions.close()
        self._share.close()

    async def take(self, records: Sequence[Record], judge: Callable[[Record], T]) -> list[T]:
        """What is new of records, which are in order within each partition; what of it is dead is buried. Raises Transient and Fatal."""
        fresh = self._positions.fresh(records)
        self._share.learn([judge(record).judged for record in records if self._share.earlier(record)])
        if not fresh:
            return []
        taken = [judge(record) for record in fresh]
        self._share.check(f"topic {self.topic}", [t.judged for t in taken])
        await self.bury([letter for t in taken for letter in t.letters])
        return taken

    async def bury(self, dead: Sequence[DeadLetter]) -> None:
        """Write letters of this topic's records. Raises Transient: do the same again."""
        await bury(self._sender, self._dead_topic, dead)

    def advances(self, records: Sequence[Record]) -> list[Advance]:
        """How the positions move where these are done."""
        return self._positions.advances(records)

    def done(self, advances: Sequence[Advance], taken: Sequence[Taken]) -> None:
        """The positions have moved, in the store too."""
        self._positions.advanced(advances)
        self._share.learn([t.judged for t in taken])
