"""Points between Kafka and a receiver that takes each only once: which wait, which go now, which come too late. Pure.

Guarantees, with settling (`window_s` = 0):

* *Settled, once, in order*: of each (series, timestamp) the greatest (version, value) that came before it settled is due once; of a series, in
  order of time. What comes for a time that is not after the newest sent of its series is late, and never due.
* *A restart changes nothing*: `Progress` says up to where records are done with; whoever reads on from there, skipping what the note says was
  sent, ends with the same points. Only the slice that was under way is due again: one point a series, the newest that the receiver has.

With a window points are due as they come, older ones too: the first value of a point stays.

Points lie in blocks of `BLOCK` series at one timestamp, two numbers each: 16 bytes a point, and as much for a series of the block that has none.
A point that was sent is remembered for `REMEMBERED_S` after it has settled, to tell a repetition from a change; where room is short, not even so long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ingest.model import RecordPosition, Series, SeriesIds, Target, bytes_of
from ingest.ports import EncodedLabels

BLOCK = 1024
REMEMBERED_S = 900
"""A little more than exporters go on publishing what they have seen already, after a restart."""
STALE_S = 3 * 3600
"""A series that nothing is heard of for so long is forgotten, unless its period is long."""

_NONE, _SENT = -1, np.iinfo(np.int64).max
_NEVER = np.iinfo(np.int64).min

_Rows = NDArray[np.int64]
_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


class _Block:
    """At one timestamp, by row: the version of what waits, _SENT or _NONE, and its value."""

    __slots__ = ("values", "versions", "waiting")

    def __init__(self) -> None:
        self.versions = np.full(BLOCK, _NONE, np.int64)
        self.values = np.zeros(BLOCK, np.float64)
        self.waiting = 0

    NBYTES = 2 * 8 * BLOCK


@dataclass(slots=True, eq=False)
class Member:
    """What is known of a series beside its points. `labels` is whatever its owner makes of it, None until then."""

    series: Series
    target: Target
    labels: EncodedLabels | str | None = None


class Lane:
    """The series of one service and period, a row each: they settle together."""

    def __init__(self, service: str, period_s: int, settling_s: int) -> None:
        self.service = service
        self.period_s = period_s
        self.lag_s = period_s + settling_s
        """A point has settled so long after its timestamp."""
        self.members: list[Member] = []
        """By row. One that is free has still its last."""
        self.newest = np.full(BLOCK, _NEVER, np.int64)
        """By row, the timestamp of the newest point that was sent."""
        self.origins = np.zeros((BLOCK, 2), np.int64)
        """By row, partition and offset of the last record that had points of it."""
        self._seen_s = np.zeros(BLOCK, np.int64)
        self._rows: dict[bytes, int] = {}
        self._free: list[int] = []
        self.blocks: dict[int, dict[int, _Block]] = {}
        """By timestamp and number."""
        self.waiting: dict[int, int] = {}
        """By timestamp, how many points wait."""

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, ids: SeriesIds, series: Sequence[Series], target: Target) -> _Rows:
        """A row for each series, found or new."""
        return np.array(
            [
                row if (row := self._rows.get(key)) is not None else self._new(key, Member(one, target))
                for key, one in zip(bytes_of(ids), series, strict=True)
            ],
            np.int64,
        )

    def _new(self, key: bytes, member: Member) -> int:
        if self._free:
            row = self._free.pop()
            self.members[row] = member
        else:
            row = len(self.members)
            self.members.append(member)
            if row >= len(self.newest):
                more = len(self.newest)
                self.newest = np.concatenate((self.newest, np.full(more, _NEVER, np.int64)))
                self._seen_s = np.concatenate((self._seen_s, np.zeros(more, np.int64)))
                self.origins = np.concatenate((self.origins, np.zeros((more, 2), np.int64)))
        self._rows[key] = row
        return row

    def met(self, rows: _Rows, origin: RecordPosition | None, now_s: int) -> None:
        """Something came of these series."""
        self._seen_s[rows] = now_s
        if origin is not None:
            self.origins[rows] = (origin.partition, origin.offset)

    def forget_stale(self, now_s: int) -> int:
        """Forget series that nothing was heard of for long, and of which nothing waits; returns how many. Rows are used again."""
        before_s = now_s - max(STALE_S, 3 * self.period_s + self.lag_s)
        stale = [key for key, row in self._rows.items() if self._seen_s[row] < before_s]
        if not stale:
            return 0
        rows = np.array([self._rows[key] for key in stale], np.int64)
        found = [
            (block, rows[rows >> 10 == number] & (BLOCK - 1))
            for blocks in self.blocks.values()
            for number, block in blocks.items()
        ]
        if any(((b.versions[at] != _NONE) & (b.versions[at] != _SENT)).any() for b, at in found):
            return 0  # nothing waits for so long, unless its receiver is away
        for block, at in found:
            block.versions[at] = _NONE
        for key in stale:
            del self._rows[key]
        self._free += rows.tolist()
        self.newest[rows] = _NEVER
        return len(stale)


@dataclass(frozen=True, slots=True, eq=False)
class Due:
    """Points of one lane to be sent now, n of them: by series (rows that ascend in steps), of a series in order of time."""

    lane: Lane
    rows: _Rows
    timestamps_s: _Ints
    values: _Floats
    versions: _Ints

    def only(self, some: NDArray[np.bool_]) -> Due:
        return Due(
            self.lane, self.rows[some], self.timestamps_s[some], self.values[some], self.versions[some]
        )


@dataclass(slots=True)
class Added:
    """What became of points. `due_s`: when the last of those that wait has settled, None where none waits."""

    due_s: int | None = None
    repeated: int = 0
    changed: int = 0
    """Another value of a point that was sent."""
    late: int = 0
    """Not after the newest that was sent of its series; with a window: too far behind it."""

    def __iadd__(self, other: Added) -> Added:
        if other.due_s is not None:
            self.due_s = other.due_s if self.due_s is None else max(self.due_s, other.due_s)
        self.repeated += other.repeated
        self.changed += other.changed
        self.late += other.late
        return self


class Holding:
    """The points of one receiver's series. `bytes_max` is of their blocks."""

    def __init__(self, window_s: int, bytes_max: int) -> None:
        self.window_s = window_s
        self.newest_s = 0
        """The newest timestamp that was sent, of all series."""
        self.held = 0
        """How many points wait."""
        self._bytes = 0
        self._bytes_max = bytes_max
        self._lanes: dict[tuple[str, int], Lane] = {}

    def lane(self, service: str, period_s: int, settling_s: int) -> Lane:
        """The one that there is, or a new one."""
        key = service, period_s
        if (lane := self._lanes.get(key)) is None:
            lane = self._lanes[key] = Lane(service, period_s, settling_s)
        return lane

    @property
    def bytes_held(self) -> int:
        return self._bytes

    @property
    def series(self) -> int:
        return sum(map(len, self._lanes.values()))

    def members(self) -> Iterator[Member]:
        """All series, and some that were forgotten."""
        return (member for lane in self._lanes.values() for member in lane.members)

    @property
    def next_due_s(self) -> int:
        """When the earliest of what waits has settled; far away where nothing waits."""
        return min((t + lane.lag_s for lane in self._lanes.values() for t in lane.waiting), default=2**62)

    @property
    def full(self) -> bool:
        """Take nothing more until something was sent. What was sent is forgotten first."""
        if self._bytes > self._bytes_max:
            self._drop(lambda lane, timestamp_s: True)
        return self._bytes > self._bytes_max

    # --- in -----------------------------------------------------------------------------------------------------

    def add(self, lane: Lane, rows: _Rows, timestamps_s: _Ints, values: _Floats, version: int) -> Added:
        """Points of one look. Values are finite; a point may be there twice, the greatest value counts."""
        order = np.lexsort((values, rows, timestamps_s))
        rows, timestamps_s, values = rows[order], timestamps_s[order], values[order]
        last = np.ones(len(rows), np.bool_)
        last[:-1] = (rows[1:] != rows[:-1]) | (timestamps_s[1:] != timestamps_s[:-1])
        if not last.all():
            rows, timestamps_s, values = rows[last], timestamps_s[last], values[last]
        added = Added()
        # A run has one timestamp and one block.
        numbers = rows >> 10
        ends = np.flatnonzero((np.diff(timestamps_s) != 0) | (np.diff(numbers) != 0)) + 1
        start = 0
        for end in (*ends.tolist(), len(rows)):
            if end > start:
                some = slice(start, end)
                added += self._add(
                    lane, int(timestamps_s[start]), int(numbers[start]), rows[some], values[some], version
                )
            start = end
        return added

    def _add(
        self, lane: Lane, timestamp_s: int, number: int, rows: _Rows, values: _Floats, version: int
    ) -> Added:
        late = lane.newest[rows] >= timestamp_s
        if self.window_s and timestamp_s >= self.newest_s - self.window_s:
            late[:] = False
        block = lane.blocks.get(timestamp_s, {}).get(number)
        if block is None:
            if late.all():
                return Added(late=len(rows))
            block = lane.blocks.setdefault(timestamp_s, {})[number] = _Block()
            self._bytes += _Block.NBYTES
        at = rows & (BLOCK - 1)
        was, had = block.versions[at], block.values[at]
        sent = was == _SENT
        changed = int(np.count_nonzero(sent & (had != values)))
        repeated = int(np.count_nonzero(sent)) - changed
        late &= ~sent
        better = ~sent & ~late & ((was < version) | ((was == version) & (had < values)))
        if better.any():
            new = int(np.count_nonzero(better & (was == _NONE)))
            block.versions[at[better]] = version
            block.values[at[better]] = values[better]
            block.waiting += new
            self.held += new
            lane.waiting[timestamp_s] = lane.waiting.get(timestamp_s, 0) + new
            due_s = timestamp_s + lane.lag_s
        else:
            due_s = None
        return Added(due_s, repeated, changed, int(np.count_nonzero(late)))

    def was_sent(self, lane: Lane, rows: _Rows, timestamps_s: _Ints) -> None:
        """These points were sent before a restart: only what comes after them may go."""
        np.maximum.at(lane.newest, rows, timestamps_s)
        if len(timestamps_s):
            self.newest_s = max(self.newest_s, int(timestamps_s.max()))

    # --- out ----------------------------------------------------------------------------------------------------

    def due(self, now_s: int, points_max: int) -> tuple[int, list[Due]] | None:
        """What to send next, up to about so many points together, and when it was due; None where nothing is.

        With settling that is of one moment, the earliest: one point a series. Ask again when it was `sent`.
        """
        if self.window_s:
            found = list(
                self._some(((lane, sorted(lane.waiting)) for lane in self._lanes.values()), points_max)
            )
            return (now_s, found) if found else None
        at = [
            (timestamp_s + lane.lag_s, lane, timestamp_s)
            for lane in self._lanes.values()
            for timestamp_s in lane.waiting
        ]
        first_s = min((due_s for due_s, _, _ in at), default=2**62)
        if first_s > now_s:
            return None
        now = ((lane, [timestamp_s]) for due_s, lane, timestamp_s in at if due_s == first_s)
        return first_s, list(self._some(now, points_max))

    def _some(self, asked: Iterable[tuple[Lane, list[int]]], points_max: int) -> Iterator[Due]:
        left = points_max
        for lane, times in asked:
            for number in sorted({n for t in times for n, b in lane.blocks[t].items() if b.waiting}):
                if left <= 0:
                    return
                due = _waiting(lane, number, times)
                left -= len(due.rows)
                yield due

    def sent(self, due: Due) -> None:
        """The receiver has these, or will never have them."""
        lane = due.lane
        for timestamp_s in np.unique(due.timestamps_s).tolist():
            rows = due.rows[due.timestamps_s == timestamp_s]
            numbers = rows >> 10
            for number in np.unique(numbers).tolist():
                own = rows[numbers == number]
                block = lane.blocks[timestamp_s][number]
                block.versions[own & (BLOCK - 1)] = _SENT
                block.waiting -= len(own)
            self.held -= len(rows)
            lane.waiting[timestamp_s] -= len(rows)
            if not lane.waiting[timestamp_s]:
                del lane.waiting[timestamp_s]
            lane.newest[rows] = np.maximum(lane.newest[rows], timestamp_s)
            self.newest_s = max(self.newest_s, timestamp_s)

    def forget(self, now_s: int) -> int:
        """Forget what was sent long ago, and series that are gone; returns how many of those. Call it now and then."""
        self._drop(lambda lane, timestamp_s: timestamp_s + lane.lag_s + REMEMBERED_S < now_s)
        return sum(lane.forget_stale(now_s) for lane in self._lanes.values())

    def _drop(self, may_go: Callable[[Lane, int], bool]) -> None:
        for lane in self._lanes.values():
            for timestamp_s in [t for t in lane.blocks if may_go(lane, t)]:
                blocks = lane.blocks[timestamp_s]
                for number in [n for n, block in blocks.items() if not block.waiting]:
                    del blocks[number]
                    self._bytes -= _Block.NBYTES
                if not blocks:
                    del lane.blocks[timestamp_s]


def _waiting(lane: Lane, number: int, times: Sequence[int]) -> Due:
    """What waits in a block at these times, by row and time."""
    rows, stamps, values, versions = [], [], [], []
    for timestamp_s in times:
        block = lane.blocks[timestamp_s].get(number)
        if block is None or not block.waiting:
            continue
        at = np.flatnonzero((block.versions != _NONE) & (block.versions != _SENT))
        rows.append(at)
        stamps.append(np.full(len(at), timestamp_s, np.int64))
        values.append(block.values[at])
        versions.append(block.versions[at])
    row, stamp = np.concatenate(rows) + number * BLOCK, np.concatenate(stamps)
    value, version = np.concatenate(values), np.concatenate(versions)
    if len(rows) > 1:
        order = np.lexsort((stamp, row))
        row, stamp, value, version = row[order], stamp[order], value[order], version[order]
    return Due(lane, row, stamp, value, version)
