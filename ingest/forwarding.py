"""Records of `raw` → one receiver of samples: keep its own series, name them, hold what has to wait, send, count what was refused.

Guarantees:

* *At least once, and once*: a record is committed when the receiver has, or has refused, all of it. What is sent twice for a restart changes nothing.
* *One bad point stops nobody*: what is not fit is counted under its reason. What the receiver refuses goes to `dead` before it is done with; what we
  know to come too late is only counted (a backfill would drown the topic), and so are bad records, which the store's consumer puts aside.
* *Time is the log's*: where records wait to be read, a point has settled when a record of that time was read, not when the clock says so; else a
  backlog would be sent before its corrections are read. Only where memory is `full` does the clock decide.
* *Back-pressure is to Kafka*: what the receiver has not acknowledged is kept and tried again; past its bytes `full` says to take nothing more.

What a restart must know travels as a note beside the committed offset (`Note`). Why it is so: docs/decisions/0021-remote-write.md.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from ingest import wire
from ingest.batch import without_series
from ingest.clock import Clock
from ingest.delivery import DUPLICATE, Delivery, Write
from ingest.errors import Rejected, Transient
from ingest.forwarded import Note, Progress, Tally
from ingest.holding import Due, Holding, Lane
from ingest.log import Sender
from ingest.model import Batch, RecordPosition, Series, SeriesIds, Target
from ingest.ports import EncodedLabels, Receiving, Record, SeriesSamples
from ingest.validate import validate
from shard_config.model import Limits

_log = structlog.get_logger()

WRITE_SAMPLES_MAX: Final = 20_000
"""Of one write: some tenths of a second of work, in which the group's heartbeats wait."""
IN_ORDER_S: Final = 3600
"""Prometheus takes nothing older than an hour before its newest, whatever its window (half of the two hours of a block)."""
PLACES_MAX: Final = 4_096
"""Batches whose series' rows are remembered, 8 kB each."""
LABELS_MAX: Final = 500_000
"""Series whose labels are kept, a third of a kilobyte each; those of more are made anew for each write."""
FORGET_INTERVAL_S: Final = 60
SAID_MAX: Final = 1_000
"""Kinds of series without a name that the log is told of."""


class Naming(Protocol):
    """What forwarding needs to know of series."""

    def receiver_of(self, series: Series, service: str) -> str:
        """The name of the receiver that a series goes to."""
        ...

    def labels_of(self, series: Series, service: str, target: Target) -> EncodedLabels:
        """Raises Rejected where it can have none."""
        ...

    def known(self, target: Target, service: str) -> bool:
        """Whether what names a target's series is known yet; where not, they wait."""
        ...


def start_ms(window_s: int, now_ms: int, log_ahead_s: int = 0) -> int:
    """From what time of Kafka's records a receiver's new group reads: what is older the receiver would not take."""
    return now_ms - 1000 * (max(window_s, IN_ORDER_S) + log_ahead_s)


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where a batch's series lie: by index in the batch its row in the lane, −1 where it is another's."""

    lane: Lane
    rows: NDArray[np.int64]
    own: NDArray[np.int64]
    whole: bool


class Forwarder:
    """Sends one receiver's series of the partitions that this process owns. Not safe for several tasks at once."""

    def __init__(
        self,
        name: str,
        receiver: str,
        window_s: int,
        settling_s: Mapping[str, int],
        naming: Naming,
        receiving: Receiving,
        sender: Sender,
        topics: tuple[str, str],
        limits: Limits,
        clock: Clock,
        tally: Tally,
        *,
        bytes_max: int,
        log_ahead_s: int = 0,
        heard: Callable[[Batch, bytes], None] = lambda batch, value: None,
    ) -> None:
        """`name` is this process's. `topics` are those of raw batches and of dead letters; `settling_s` by service, 0 where it says nothing.

        `log_ahead_s`: how far the clock is ahead of the time that Kafka's records have (only in a replay of old data). `heard` is told each record
        with series of ours, once: its batch, and its value.
        """
        self._name = name
        self._receiver = receiver
        self._window_s = window_s
        self._oldest_s = max(window_s, IN_ORDER_S)
        self._settling_s = settling_s
        self._naming = naming
        self._delivery = Delivery(receiver, receiving, sender, topics)
        self._limits = limits
        self._clock = clock
        self._tally = tally
        self._bytes_max = bytes_max
        self._said: set[tuple[str, str]] = set()
        """Services, and reasons why series of theirs have no name, that the log knows."""
        self._log_ahead_s = log_ahead_s
        self._heard = heard
        self.close()

    # --- partitions ---------------------------------------------------------------------------------------------

    def open(self, starts: Mapping[int, tuple[int, str]], *, cluster: str = "") -> None:
        """Take partitions over, in place of those before: partition → (offset to read from, the note that was committed with it)."""
        self.close()
        self._delivery.cluster = cluster
        self._progress.update({p: Progress(offset) for p, (offset, _) in starts.items()})
        self._committed.update({p: offset for p, (offset, _) in starts.items()})
        self._read_s.update(dict.fromkeys(starts, 0))
        self._notes.update({p: note for p, (_, text) in starts.items() if (note := Note.read(text))})

    def close(self) -> None:
        """Forget all partitions, and what waits: they went to somebody else."""
        self._holding = Holding(self._window_s, self._bytes_max)
        self._places: OrderedDict[tuple[int, str, Target], tuple[SeriesIds, tuple[_Place, ...]]] = (
            OrderedDict()
        )
        self._labelled = 0
        self._progress: dict[int, Progress] = {}
        self._committed: dict[int, int] = {}
        self._notes: dict[int, Note] = {}
        self._read_s: dict[int, int] = {}
        """By partition that is behind, the time of the last record that was taken."""
        self._sent_s = 0
        self._news = False
        """Something was sent that no mark speaks of yet."""
        self._marks: dict[int, tuple[int, str]] = {}
        self._under_way: Write | None = None
        self._forgot_s = self._clock.now_s()

    @property
    def full(self) -> bool:
        """Take nothing more until something was sent."""
        return self._holding.full

    @property
    def held_bytes(self) -> int:
        """Of points that wait, or were sent lately; `full` above `bytes_max`."""
        return self._holding.bytes_held

    @property
    def labelled(self) -> int:
        """Series whose labels are kept, LABELS_MAX at most."""
        return self._labelled

    def commits(self) -> dict[int, tuple[int, str]]:
        """What may be committed now and was not yet: partition → (offset, note). Said once."""
        marks, self._marks = self._marks, {}
        return marks

    # --- in -----------------------------------------------------------------------------------------------------

    async def take(self, records: Sequence[Record]) -> None:
        """Records, in order within each partition. Nothing is sent: that is what `send` does.

        Raises Transient where series cannot be named yet: then take the same again, what was taken is passed over.
        """
        for record in records:
            await asyncio.sleep(
                0
            )  # a record met for the first time takes 20 ms, and heartbeats wait meanwhile
            progress = self._progress.get(record.position.partition)
            if progress is None or record.position.offset < progress.next:
                continue
            try:
                decoded = wire.decode_by_series(record.value, self._limits)
            except Rejected:
                self._tally.refused["bad_record"] += 1
                due_s = None
            else:
                batch = without_series(decoded.batch, decoded.bad) if decoded.bad else decoded.batch
                due_s = self._hold(batch, record.position)
                if self._places_of(batch):
                    self._heard(batch, record.value)
            progress.taken(record.position.offset, due_s)
            self._read_s[record.position.partition] = record.timestamp_ms // 1000 + self._log_ahead_s
        self._tally.held, self._tally.series = self._holding.held, self._holding.series

    def caught_up(self, partitions: Iterable[int]) -> None:
        """All records of these were taken that there are: until the next one their time is the clock's."""
        for partition in partitions:
            self._read_s.pop(partition, None)

    def offer(self, batch: Batch) -> None:
        """Points of no record: what is made up (zeros) loses against anything real, and is lost in a restart."""
        self._hold(batch, None)

    def _hold(self, batch: Batch, origin: RecordPosition | None) -> int | None:
        """When the last of a batch's points has settled; None where nothing of it waits."""
        places = self._places_of(batch)
        if not places:
            return None
        if not self._naming.known(batch.target, batch.service):
            raise Transient(f"names of {batch.target} {batch.service}", "are not known yet")
        now_s = self._clock.now_s()
        checked = validate(batch, now_s, self._limits)
        for point in checked.dead:
            self._tally.refused[str(point.reason)] += point.count
        good = checked.accepted
        if good is None:
            return None
        due_s: int | None = None
        for place in places:
            rows, stamps, values = np.repeat(place.rows, good.counts), good.timestamps_s, good.values
            fit = stamps >= now_s - self._oldest_s
            if not place.whole:
                fit = (rows >= 0) & fit
                self._tally.refused["too_old"] += int(np.count_nonzero((rows >= 0) & ~fit))
            elif not fit.all():
                self._tally.refused["too_old"] += int(np.count_nonzero(~fit))
            if not fit.all():
                rows, stamps, values = rows[fit], stamps[fit], values[fit]
            place.lane.met(place.own, origin, now_s)
            if origin is not None and (note := self._notes.get(origin.partition)) is not None:
                rows, stamps, values = self._unsent(note, origin, place.lane, (rows, stamps, values))
            added = self._holding.add(place.lane, rows, stamps, values, batch.version)
            self._tally.refused["changed"] += added.changed
            self._tally.refused["too_old" if self._window_s else "out_of_order"] += added.late
            if added.due_s is not None:
                due_s = max(added.due_s, due_s or 0)
        return due_s

    def _unsent(
        self,
        note: Note,
        origin: RecordPosition,
        lane: Lane,
        points: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Without what was sent before this process took the partition over."""
        if origin.offset >= note.next:
            del self._notes[origin.partition]
            return points
        if self._window_s or (settling_s := note.settling_s.get(lane.service)) is None:
            return points
        rows, stamps, values = points
        waits = stamps + lane.period_s + settling_s > note.sent_s
        self._holding.was_sent(lane, rows[~waits], stamps[~waits])
        return rows[waits], stamps[waits], values[waits]

    def _places_of(self, batch: Batch) -> tuple[_Place, ...]:
        """By lane, of which a batch has one, where its series are ours."""
        # Tables of series are the same objects from look to look (ingest.series_table); holding on to one keeps its id.
        key = id(batch.ids), batch.service, batch.target
        found = self._places.get(key)
        if found is not None:
            self._places.move_to_end(key)
            return found[1]
        places = tuple(self._place(batch))
        self._places[key] = batch.ids, places
        if len(self._places) > PLACES_MAX:
            self._places.popitem(last=False)
        return places

    def _place(self, batch: Batch) -> list[_Place]:
        periods: dict[int, list[int]] = {}
        for i, one in enumerate(batch.series):
            if self._naming.receiver_of(one, batch.service) == self._receiver:
                periods.setdefault(one.key.period_s, []).append(i)
        places = []
        for period_s, own in periods.items():
            lane = self._holding.lane(batch.service, period_s, self._settling_s.get(batch.service, 0))
            rows = np.full(len(batch.series), -1, np.int64)
            rows[own] = lane.rows(batch.ids[own], [batch.series[i] for i in own], batch.target)
            places.append(_Place(lane, rows, rows[own], len(own) == len(batch.series)))
        return places

    # --- out ----------------------------------------------------------------------------------------------------

    async def send(self) -> bool:
        """Send what is due next, bounded; False where nothing is. Raises Transient: then all of that is still due."""
        if self._under_way is None:
            now_s = self._clock.now_s()
            until_s = now_s if self._window_s or self.full else min((now_s, *self._read_s.values()))
            found = self._holding.due(until_s, WRITE_SAMPLES_MAX)
            if found is None:
                self._done(until_s)
                self._forget(now_s)
                return False
            due_s, dues = found
            self._under_way = self._write_of(due_s, [self._in_time(due, now_s) for due in dues])
        await self._finish(self._under_way)
        due_s, self._under_way = self._under_way.due_s, None
        self._news = True
        self._tally.held = self._holding.held
        if not self._window_s and due_s < self._holding.next_due_s:
            self._done(due_s)
        return True

    def _forget(self, now_s: int) -> None:
        if now_s < self._forgot_s + FORGET_INTERVAL_S:
            return
        self._forgot_s = now_s
        if self._holding.forget(now_s):
            self._places.clear()  # their rows may be others' soon
        self._labelled = sum(member.labels is not None for member in self._holding.members())

    def _done(self, until_s: int) -> None:
        """Everything that was due up to then was sent."""
        for progress in self._progress.values():
            progress.sent(2**62 if self._window_s else until_s)
        if until_s < self._sent_s:
            return  # what came late: the note of before must not be weakened, nor promise that all of it was sent
        self._sent_s = until_s
        for p, progress in self._progress.items():
            offset = progress.commit
            if offset != self._committed[p] or self._news:
                self._marks[p] = offset, self._note(until_s, progress.next).write()
                self._committed[p] = offset
        self._news = False

    def _note(self, until_s: int, next_: int) -> Note:
        return Note(
            until_s,
            next_,
            {} if self._window_s else self._settling_s,
            self._name,
            self._holding.newest_s,
            self._tally.samples,
            self._tally.refused.total(),
        )

    def _in_time(self, due: Due, now_s: int) -> Due:
        """Without what has become too old for any receiver while it waited."""
        old = due.timestamps_s < now_s - self._oldest_s
        if not old.any():
            return due
        self._tally.refused["too_old"] += int(np.count_nonzero(old))
        self._holding.sent(due.only(old))
        return due.only(~old)

    def _write_of(self, due_s: int, dues: Sequence[Due]) -> Write:
        write = Write(due_s, dues, [], [])
        for due in dues:
            starts = np.flatnonzero(np.diff(due.rows, prepend=-1))
            ends = [*starts[1:].tolist(), len(due.rows)]
            stamps_ms = due.timestamps_s * 1000
            rows, versions = due.rows[starts].tolist(), due.versions[starts].tolist()
            for start, end, row, version in zip(starts.tolist(), ends, rows, versions, strict=True):
                labels = self._labels(due.lane, row)
                if isinstance(labels, str):
                    self._tally.refused[labels] += end - start
                    continue
                write.samples.append(SeriesSamples(labels, stamps_ms[start:end], due.values[start:end]))
                write.of.append((due.lane, row, version))
        return write

    async def _finish(self, write: Write) -> None:
        samples = write.samples
        refused = await self._delivery.deliver(write)
        now_s = self._clock.now_ms() / 1000
        for due in write.dues:
            self._holding.sent(due)
        if samples:
            self._tally.acknowledged(np.concatenate([s.timestamps_ms for s in samples]) // 1000, now_s)
        for one in refused:
            self._tally.acknowledged(one.timestamps_ms // 1000, now_s, -1)
            self._tally.refused["changed" if one.reason == DUPLICATE else one.reason] += len(
                one.timestamps_ms
            )

    def _labels(self, lane: Lane, row: int) -> EncodedLabels | str:
        """The labels of a series, or the reason why it has none."""
        member = lane.members[row]
        if member.labels is not None:
            return member.labels
        labels: EncodedLabels | str
        try:
            labels = self._naming.labels_of(member.series, lane.service, member.target)
        except Rejected as error:
            labels = str(error.reason)
            said = lane.service, labels
            if said not in self._said and len(self._said) < SAID_MAX:  # there may be thousands of one kind
                self._said.add(said)
                _log.warning("series_not_nameable", receiver=self._receiver, error=str(error))
        if self._labelled < LABELS_MAX:
            member.labels = labels
            self._labelled += 1
        return labels

    def forget_labels(self, target: Target) -> None:
        """Make a target's labels anew, for what names them has changed."""
        for member in self._holding.members():
            if member.target == target and member.labels is not None:
                member.labels = None
                self._labelled -= 1
