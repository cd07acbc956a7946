"""What was published last of one target's service: of every series and window, a digest. Pure.

Guarantees:

* *Small, also while it grows*: 8 bytes a series and 4 a window, and 1 a series while a look is under way. Series lie in blocks of about
  `BLOCK`, as they came, each in order of its ids: nothing is sorted or copied as a whole, and a batch finds its series in a block or two.
* *Never half known*: a series that a look meets twice, or whose value has no digest that means anything (NaN), is not known after it.

A digest has 32 bits. One change in four thousand million passes for none, until the window is sealed: that goes by 64 bits
of all points, and publishes what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32_768

_Ids = NDArray[np.uint64]
_Digests = NDArray[np.uint32]
_Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """What a batch says, n cells: the series (an index into the batch's), the window, a digest of the points, and whether all are finite."""

    rows: NDArray[np.intp]
    starts_s: NDArray[np.int64]
    digests: NDArray[np.uint64]
    finite: _Mask


@dataclass(slots=True, eq=False)
class _Block:
    """Series in order of their ids. `digests` has a column a window, 0 where nothing is known; `met`: in the look under way."""

    ids: _Ids
    digests: dict[int, _Digests]
    met: _Mask | None = None

    def column(self, start_s: int) -> _Digests:
        column = self.digests.get(start_s)
        if column is None:
            column = self.digests[start_s] = np.zeros(len(self.ids), np.uint32)
        return column

    def take(self, some: _Mask) -> _Block:
        """Some of its series, of no look."""
        return _Block(self.ids[some], {s: c[some] for s, c in self.digests.items()})


class Known:
    """The lower halves of series ids, and 32 bits of each one's points by window."""

    def __init__(self) -> None:
        self.starts_s: list[int] = []
        self._blocks: list[_Block] = []
        self._added: list[_Block] = []
        self._series = 0
        self._waiting = 0
        self._last = 0
        """The block that had series of the last batch: the next one's are there, or in the one after."""

    @property
    def entries(self) -> int:
        """Series × windows: each takes at most 16 bytes."""
        return (self._series + self._waiting) * len(self.starts_s)

    @property
    def nbytes(self) -> int:
        """Of all columns."""
        return sum(
            b.ids.nbytes + sum(c.nbytes for c in b.digests.values()) + (0 if b.met is None else b.met.nbytes)
            for b in (*self._blocks, *self._added)
        )

    def leave(self, starts_s: Iterable[int]) -> None:
        """Forget these windows."""
        for start_s in list(starts_s):
            self.starts_s.remove(start_s)
            for block in (*self._blocks, *self._added):
                block.digests.pop(start_s, None)

    def compare(self, ids: _Ids, cells: Cells, room: Callable[[], int]) -> tuple[_Mask, _Mask]:
        """Which cells are unchanged, and which could not be remembered for want of `room()` entries. The ids must differ.

        What they say is remembered from here on. A series that is met twice in a look (a source that parts its points) is published both
        times, and forgotten.
        """
        unchanged, lost = np.zeros(len(cells.rows), np.bool_), np.zeros(len(cells.rows), np.bool_)
        windows = {}
        for start_s in np.unique(cells.starts_s).tolist():
            (here,) = np.nonzero(cells.starts_s == start_s)
            if self._window(start_s, room):
                windows[start_s] = here
            else:
                lost[here] = cells.finite[here]
        short = np.maximum(cells.digests.astype(np.uint32), np.uint32(1))
        at, last = np.full(len(ids), -1, np.int64), self._last
        said = np.zeros(len(ids), np.bool_)
        said[cells.rows] = True
        (rest,) = np.nonzero(said)
        for n in range(len(self._blocks)):
            if not len(rest):
                break
            number = (self._last + n) % len(self._blocks)
            block = self._blocks[number]
            found = np.minimum(np.searchsorted(block.ids, ids[rest]), len(block.ids) - 1)
            there = block.ids[found] == ids[rest]
            if not there.any():
                continue
            last = number
            mine, found, rest = rest[there], found[there], rest[~there]
            at[mine] = found
            block.met = np.zeros(len(block.ids), np.bool_) if block.met is None else block.met
            of_block = np.zeros(len(ids), np.bool_)
            of_block[mine] = True
            for start_s, here in windows.items():
                some = here[of_block[cells.rows[here]]]
                place = at[cells.rows[some]]
                column, once = block.column(start_s), ~block.met[place]
                unchanged[some] = once & (column[place] == short[some])
                column[place] = np.where(once & cells.finite[some], short[some], 0)
            again = found[block.met[found]]
            for column in block.digests.values():
                column[again] = 0
            block.met[found] = True
        self._last = last
        self._add(ids, at < 0, windows, short, cells, room, lost)
        return unchanged, lost

    def _window(self, start_s: int, room: Callable[[], int]) -> bool:
        """Make room for a window; False where there is none."""
        if start_s not in self.starts_s:
            if self._series + self._waiting > room():
                return False
            self.starts_s.append(start_s)
        return True

    def _add(
        self,
        ids: _Ids,
        new: _Mask,
        windows: dict[int, NDArray[np.intp]],
        short: _Digests,
        cells: Cells,
        room: Callable[[], int],
        lost: _Mask,
    ) -> None:
        """Remember series that are not known yet."""
        wanted = np.zeros(len(ids), np.bool_)
        for here in windows.values():
            wanted[cells.rows[here][cells.finite[here]]] = True
        wanted &= new
        (rows,) = np.nonzero(wanted)
        rows_max = room() // max(1, len(self.starts_s))
        if len(rows) > rows_max:
            left = np.zeros(len(ids), np.bool_)
            left[rows[rows_max:]] = True
            lost |= left[cells.rows] & cells.finite
            rows = rows[:rows_max]
        if not len(rows):
            return
        digests = {}
        for start_s, here in windows.items():
            column = np.zeros(len(ids), np.uint32)
            column[cells.rows[here]] = np.where(cells.finite[here], short[here], 0)
            digests[start_s] = column[rows]
        self._added.append(_Block(ids[rows], digests, np.ones(len(rows), np.bool_)))
        self._waiting += len(rows)
        if self._waiting >= BLOCK:
            self._sort()

    def _sort(self) -> None:
        """Make a block of what was added."""
        if self._added:
            self._blocks.append(_joined(self._added, self.starts_s))
            self._added, self._waiting = [], 0
            self._series = sum(len(block.ids) for block in self._blocks)

    def settle(self) -> None:
        """A look is over: put what it found in order, and forget what nothing is known of."""
        self._sort()
        kept: list[_Block] = []
        for block in self._blocks:
            block.met = None
            has = np.zeros(len(block.ids), np.bool_)
            for column in block.digests.values():
                has |= column != 0
            if not has.any():
                continue
            if not has.all():
                block = block.take(has)
            if kept and len(kept[-1].ids) + len(block.ids) <= BLOCK:
                block = _joined([kept.pop(), block], self.starts_s)
                block.met = None
            kept.append(block)
        self._blocks, self._last = kept, 0
        self._series = sum(len(block.ids) for block in kept)
        if not kept:
            self.starts_s = []


def _joined(blocks: list[_Block], starts_s: list[int]) -> _Block:
    """One block of several. Of a series that is in two nothing is known any more, but that it was met."""
    ids = np.concatenate([b.ids for b in blocks])
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    twice = np.zeros(len(ids), np.bool_)
    twice[1:] = ids[1:] == ids[:-1]
    first = ~twice
    twice[:-1] |= twice[1:]
    met = np.concatenate([np.zeros(len(b.ids), np.bool_) if b.met is None else b.met for b in blocks])[order]
    digests = {}
    for start_s in starts_s:
        nothing = [b.digests.get(start_s) for b in blocks]
        column = np.concatenate(
            [
                np.zeros(len(b.ids), np.uint32) if c is None else c
                for b, c in zip(blocks, nothing, strict=True)
            ]
        )[order]
        column[twice] = 0
        digests[start_s] = column
    if first.all():
        return _Block(ids, digests, met)
    return _Block(ids[first], {s: c[first] for s, c in digests.items()}, met[first])
