"""Records of `ledger` → the ledger's tables: decode, let in or put aside, project.

Guarantees:

* *One bad record never stops the good ones*: what does not decode, or says what no table can hold, goes to `dead` with its reason and origin, before the
  position moves past it. What it would have said shows as what it is: a window that nobody planned, or one that stays open, and is healed.
* *A bad deploy stops before it buries*, as in landing (`ingest.aside`).
* *A transaction is bounded* in the windows that it touches, whatever the records claim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

from ingest import letters, wire
from ingest.aside import Intake, Judged
from ingest.clock import Clock
from ingest.errors import Rejected
from ingest.ledger import Ledger, item_of
from ingest.log import Sender
from ingest.model import DeadLetter, Outcome, Receipt, ReceiptItem, Task
from ingest.ports import Record
from ingest.validate import TIMESTAMP_S_MAX, Reason

WINDOWS_MAX: Final = 100_000
"""Of a record, all its items together, and of a transaction: PostgreSQL makes as many rows in a few seconds."""
TEXT_CHARACTERS_MAX: Final = 512
"""Of names: a row of an index has room for 2,704 bytes. An archive key may have twice as many: it stands in none."""
DETAIL_CHARACTERS_MAX: Final = 4_000
"""Of a look's detail, which each window of it gets: the rest is cut off."""
COUNT_MAX: Final = 2**31 - 1
REQUESTS_MAX: Final = 64
"""API names of one look."""

Fact = Task | Receipt


@dataclass(frozen=True, slots=True)
class Taken:
    """A record, and what it says, or why it says nothing."""

    record: Record
    fact: Fact | None
    letters: tuple[DeadLetter, ...] = ()

    @property
    def judged(self) -> Judged:
        return self.record, self.letters[0].reason if self.letters else ""


@dataclass(frozen=True, slots=True)
class Projected:
    """What one call of `take` did."""

    next_offsets: Mapping[int, int]
    dead_records: int


class Projection:
    """Projects the records of one topic, for the partitions that this process owns."""

    def __init__(
        self,
        topic: str,
        dead_topic: str,
        ledger: Ledger,
        sender: Sender,
        dead_share_max: float,
        clock: Clock,
        *,
        targets: Collection[str] = (),
    ) -> None:
        """`targets` (source/account/region) are those whose records count for `dead_share_max`."""
        self._ledger = ledger
        self._clock = clock
        self._intake = Intake(topic, dead_topic, sender, dead_share_max, targets)

    def configure(self, dead_share_max: float, targets: Collection[str]) -> None:
        """Go by these from the next record on."""
        self._intake.configure(dead_share_max, targets)

    async def open(
        self, partitions: Sequence[int], bounds: Mapping[int, tuple[int, int]], *, cluster: str = ""
    ) -> dict[int, int]:
        """Take partitions over: partition → offset to read from. Raises Fatal, as `Intake.open`, and Transient."""
        stored = await self._ledger.positions(self._intake.topic, partitions)
        return self._intake.open(partitions, stored, bounds, cluster)

    def close(self) -> None:
        """Forget all partitions: they went to somebody else."""
        self._intake.close()

    async def take(self, records: Sequence[Record]) -> Projected:
        """Project records, which are in order within each partition. Raises Transient (try the same again) and Fatal."""
        taken = await self._intake.take(records, self._take)
        next_offsets: dict[int, int] = {}
        for some in slices(taken):
            advances = self._intake.advances([t.record for t in some])
            facts = [t.fact for t in some if t.fact is not None]
            await self._ledger.project(facts, advances, self._clock.now_s())
            self._intake.done(advances, some)
            next_offsets |= {a.partition: a.next for a in advances}
        return Projected(next_offsets, sum(bool(t.letters) for t in taken))

    def _take(self, record: Record) -> Taken:
        try:
            return Taken(record, let_in(wire.decode_ledger(record.value)))
        except Rejected as error:
            return Taken(record, None, (letters.of_record(record, self._intake.cluster, error),))


def slices(taken: Sequence[Taken]) -> Iterator[Sequence[Taken]]:
    """What one transaction takes each: up to WINDOWS_MAX windows, in order."""
    some: list[Taken] = []
    windows = 0
    for one in taken:
        of_this = windows_of(one.fact) if one.fact else 0
        if some and windows + of_this > WINDOWS_MAX:
            yield some
            some, windows = [], 0
        some.append(one)
        windows += of_this
    if some:
        yield some


def windows_of(fact: Fact) -> int:
    """Windows that a fact is about."""
    return sum((i.end_s - i.start_s) // i.grid_s for i in map(item_of, fact.items))


def let_in(fact: Fact) -> Fact:
    """The fact as the tables can hold it. Raises Rejected(out_of_range) for what they cannot."""
    where = f"{type(fact).__name__.lower()} {fact.task_id}"
    if (windows := windows_of(fact)) > WINDOWS_MAX:
        raise Rejected(where, Reason.OUT_OF_RANGE, f"{windows} windows")
    for item in map(item_of, fact.items):
        _check(where, [item.service], [item.start_s, item.end_s])
    if isinstance(fact, Task):
        _check(where, [fact.config_revision], [fact.expires_s, fact.attempt])
        return fact
    _check(where, [fact.shard], [fact.started_at_ms // 1000, fact.finished_at_ms // 1000])
    if len(fact.archive_key) > 2 * TEXT_CHARACTERS_MAX:
        raise Rejected(where, Reason.OUT_OF_RANGE, f"an archive key of {len(fact.archive_key)} characters")
    return replace(fact, items=tuple(_receipt_item(where, done, fact) for done in fact.items))


def _receipt_item(where: str, done: ReceiptItem, receipt: Receipt) -> ReceiptItem:
    outcome = done.outcome
    _check_outcome(where, outcome, receipt)
    for window in chain(done.windows, done.whole):
        _check(where, [], [window.start_s, window.end_s])
        if not 0 <= window.points <= COUNT_MAX:
            raise Rejected(where, Reason.OUT_OF_RANGE, f"{window.points} points in a window")
    if not 0 <= done.points <= COUNT_MAX:
        raise Rejected(where, Reason.OUT_OF_RANGE, f"{done.points} points")
    if len(outcome.detail) <= DETAIL_CHARACTERS_MAX:
        return done
    return replace(done, outcome=replace(outcome, detail=outcome.detail[:DETAIL_CHARACTERS_MAX]))


def _check_outcome(where: str, outcome: Outcome, receipt: Receipt) -> None:
    _check(where, list(outcome.requests), [outcome.looked_from_s, outcome.observed_at_ms // 1000])
    counts = [outcome.series, outcome.metrics_billed, outcome.metrics_in_doubt, *outcome.requests.values()]
    if len(outcome.requests) > REQUESTS_MAX or any(not 0 <= n <= COUNT_MAX for n in counts):
        raise Rejected(where, Reason.OUT_OF_RANGE, f"series, metrics or requests of {counts[:8]}")


def _check(where: str, names: Sequence[str], times_s: Sequence[int]) -> None:
    for name in names:
        if len(name) > TEXT_CHARACTERS_MAX:
            raise Rejected(where, Reason.OUT_OF_RANGE, f"a name of {len(name)} characters: {name[:80]!r}")
    for time_s in times_s:
        if not 0 <= time_s <= TIMESTAMP_S_MAX:
            raise Rejected(where, Reason.OUT_OF_RANGE, f"the time {time_s}")
