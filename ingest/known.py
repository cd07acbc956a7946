"""What was published last of one target's service: of every series and window, a digest. Pure.

Guarantees:

* *Small, also while it grows*: 8 bytes a series and 4 a window, and 1 a series while a look is under way. Series lie in blocks of at most
  `BLOCK_MAX`, in order of their ids, so that nothing is ever sorted or copied as a whole.
* *Never half known*: a series that a look meets twice, or whose value has no digest that means anything (NaN), is not known after it.

A digest has 32 bits. One change in four thousand million passes for none, until the window is sealed: that goes by 64 bits
of all points, and publishes what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_MAX = 32_768
ADDED_MAX = 16_384
"""Series found new that wait, unsorted, to be brought into the blocks."""

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

    def take(self, order: NDArray[np.intp] | _Mask | slice) -> _Block:
        """Some of its series, copied."""
        met = None if self.met is None else self.met[order].copy()
        return _Block(self.ids[order].copy(), {s: c[order].copy() for s, c in self.digests.items()}, met)


class Known:
    """The lower halves of series ids, and 32 bits of each one's points by window."""

    def __init__(self) -> None:
        self.starts_s: list[int] = []
        self._blocks: list[_Block] = []
        self._added: list[_Block] = []
        self._series = 0
        self._waiting = 0

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
        at = np.full(len(ids), -1, np.int64)
        said = np.zeros(len(ids), np.bool_)
        said[cells.rows] = True
        for block, mine in self._places(ids):
            found = np.minimum(np.searchsorted(block.ids, ids[mine]), len(block.ids) - 1)
            there = (block.ids[found] == ids[mine]) & said[mine]
            if not there.any():
                continue
            at[mine[there]] = found[there]
            block.met = np.zeros(len(block.ids), np.bool_) if block.met is None else block.met
            of_block = np.zeros(len(ids), np.bool_)
            of_block[mine[there]] = True
            for start_s, here in windows.items():
                some = here[of_block[cells.rows[here]]]
                place = at[cells.rows[some]]
                column, once = block.column(start_s), ~block.met[place]
                unchanged[some] = once & (column[place] == short[some])
                column[place] = np.where(once & cells.finite[some], short[some], 0)
            again = found[there][block.met[found[there]]]
            for column in block.digests.values():
                column[again] = 0
            block.met[found[there]] = True
        self._add(ids, at < 0, windows, short, cells, room, lost)
        return unchanged, lost

    def _window(self, start_s: int, room: Callable[[], int]) -> bool:
        """Make room for a window; False where there is none."""
        if start_s not in self.starts_s:
            if self._series + self._waiting > room():
                return False
            self.starts_s.append(start_s)
        return True

    def _places(self, ids: _Ids) -> Iterable[tuple[_Block, NDArray[np.intp]]]:
        """The blocks that may have some of these ids, and which."""
        if len(self._blocks) < 2:
            return [(block, np.arange(len(ids))) for block in self._blocks]
        firsts = np.array([block.ids[0] for block in self._blocks[1:]])
        which = np.searchsorted(firsts, ids, side="right")
        order = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which[order], np.arange(len(self._blocks) + 1)).tolist()
        return [
            (b, order[bounds[n] : bounds[n + 1]])
            for n, b in enumerate(self._blocks)
            if bounds[n] < bounds[n + 1]
        ]

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
        if self._waiting >= ADDED_MAX:
            self._sort_in()

    def _sort_in(self) -> None:
        """Bring what was added into the blocks."""
        if not self._added:
            return
        added, self._added = _joined(self._added, self.starts_s), []
        blocks = self._blocks or [added.take(slice(0, 0))]
        firsts = np.array([block.ids[0] for block in blocks[1:]], np.uint64)
        bounds = [0, *np.searchsorted(added.ids, firsts).tolist(), len(added.ids)]
        self._blocks = []
        for n, block in enumerate(blocks):
            part = added.take(slice(bounds[n], bounds[n + 1]))
            self._blocks += _parted(_joined([block, part], self.starts_s) if len(part.ids) else block)
        self._series = sum(len(block.ids) for block in self._blocks)
        self._waiting = 0

    def settle(self) -> None:
        """A look is over: put what it found in order, and forget what nothing is known of."""
        self._sort_in()
        kept = []
        for block in self._blocks:
            block.met = None
            has = np.zeros(len(block.ids), np.bool_)
            for column in block.digests.values():
                has |= column != 0
            if has.any():
                kept.append(block if has.all() else block.take(has))
        self._blocks = kept
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


def _parted(block: _Block) -> list[_Block]:
    """A block, in halves where it is too large. Recursion is bounded: what is joined is at most BLOCK_MAX and what was added."""
    if len(block.ids) <= BLOCK_MAX:
        return [block]
    middle = len(block.ids) // 2
    return [*_parted(block.take(slice(None, middle))), *_parted(block.take(slice(middle, None)))]
