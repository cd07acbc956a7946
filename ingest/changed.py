"""What of a look is new or changed against what was published last. Pure.

Guarantees:

* *Lost memory costs, and loses nothing*: what is not remembered is published. Memory is used by one look at a time, which takes it out and
  gives it back once its receipt is acknowledged (`keep`); a look that fails, is cancelled, or is overtaken by another at the same target
  and service gives nothing back. At each assignment of slots all is forgotten: another shard may have published meanwhile.
* *A window is sealed on all that was seen*: of a window that the look may seal the unchanged part is held, to be archived, and every window's
  points are counted whole. So an older answer that landed later, and that memory knows nothing of, shows when the window is to be sealed.
* *Bounded*: at most 16 bytes per series and unsettled window, and `entries_max` of them in the process. What finds no room is published each time.
* Points that validation puts aside for their value are published each time, or the balance would not know of them.

Only live polls of sources with a past are compared: corrections, healing and backlogs publish all that they find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from ingest.known import Cells, Known
from ingest.model import (
    Batch,
    LookStatus,
    Outcome,
    SourceName,
    Task,
    TaskItem,
    TaskKind,
    WindowCount,
    point_hashes,
    window_counts,
)

ENTRIES_MAX = 8_000_000
"""Well below 128 MB: a million series with their unsettled windows need 3,000,000 at the usual settling time, 20 MB."""

Pair = tuple[str, str]
"""A target, written source/account/region, and a service."""

_Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A batch, parted. None where a part has no points; `windows` count what is published, `whole` all of the batch."""

    published: Batch | None
    held: Batch | None
    windows: tuple[WindowCount, ...]
    whole: tuple[WindowCount, ...]
    left_out: int
    """Points that are not published, held or not."""


class Changed:
    """What this process published last, by target and service. `settling_s` has the services that are compared."""

    def __init__(
        self,
        settling_s: Mapping[str, int],
        *,
        entries_max: int = ENTRIES_MAX,
        no_room: Callable[[int], Any] = lambda points: None,
    ) -> None:
        """`no_room` is told the points that could not be remembered, each time."""
        self.settling_s = settling_s
        self.no_room = no_room
        self._entries_max = entries_max
        self._kept: dict[Pair, Known] = {}
        self._kept_entries = 0
        self._looks: WeakSet[Look] = WeakSet()
        self._newest: WeakValueDictionary[Pair, Look] = WeakValueDictionary()

    @property
    def entries_max(self) -> int:
        return self._entries_max

    def look(self, task: Task, item: TaskItem) -> Look | None:
        """Begin a look; None where it is to publish everything. Either way nobody else compares with what was remembered for it."""
        pair = (str(task.target), item.service)
        known = self._kept.pop(pair, None) or Known()
        self._kept_entries -= known.entries
        self._newest.pop(pair, None)
        settling_s = self.settling_s.get(item.service)
        live = task.kind == TaskKind.LIVE and not task.revision and not item.period_s
        if not live or settling_s is None or task.target.source != SourceName.CLOUDWATCH:
            if all(item.end_s <= start_s for start_s in known.starts_s):
                self._put(pair, known)
            return None
        known.leave(start_s for start_s in known.starts_s if start_s < item.start_s)
        look = Look(self, pair, settling_s, known)
        self._looks.add(look)
        self._newest[pair] = look
        return look

    def keep(self, looks: Iterable[Look]) -> None:
        """What these looks found is published: compare with it from now on."""
        for look in looks:
            if self._newest.get(look.pair) is look:
                del self._newest[look.pair]
                self._put(look.pair, look.known)
            look.drop()

    def forget(self) -> None:
        """Forget everything, of looks under way too."""
        self._kept.clear()
        self._kept_entries = 0
        self._newest.clear()

    def _put(self, pair: Pair, known: Known) -> None:
        if known.entries:
            self._kept[pair] = known
            self._kept_entries += known.entries

    @property
    def entries(self) -> int:
        """Series and windows remembered, looks under way included."""
        return self._kept_entries + sum(look.known.entries for look in self._looks)

    @property
    def room(self) -> int:
        """For so many more."""
        return max(0, self._entries_max - self.entries)


class Look:
    """One look under way: its batches in, their parts out."""

    def __init__(self, changed: Changed, pair: Pair, settling_s: int, known: Known) -> None:
        self.pair = pair
        self.known = known
        self._changed = changed
        self._settling_s = settling_s
        self._comparable = True

    def split(self, batch: Batch) -> Split:
        """Part a batch of this look, and remember what of it is going to be published."""
        if not self._comparable or len(np.unique(batch.ids[:, 1])) < len(batch.series):
            # Series that cannot be told apart by half of their ids: from here on nothing is left out, and nothing remembered.
            self._comparable = False
            self.drop()
            counts = window_counts(batch.point_ids(), batch.timestamps_s, batch.values, batch.grid_s)
            return Split(batch, None, counts, counts, 0)
        if not batch.points:
            return Split(None, None, (), (), 0)
        groups = _Groups.of(batch)
        unchanged, lost = self.known.compare(
            batch.ids[:, 1],
            Cells(groups.rows, groups.starts_s, groups.digests, groups.finite),
            lambda: self._changed.room,
        )
        if lost.any():
            self._changed.no_room(int(groups.points[lost].sum()))
        settled = (groups.starts_s + batch.grid_s + self._settling_s) * 1000 <= batch.observed_at_ms
        whole = groups.counts(batch.grid_s)
        if not unchanged.any():
            return Split(batch, None, whole, whole, 0)
        left_out = groups.of_points(unchanged)
        return Split(
            _only(batch, ~left_out),
            _only(batch, groups.of_points(unchanged & settled)),
            groups.counts(batch.grid_s, ~unchanged),
            whole,
            int(left_out.sum()),
        )

    def finish(self, outcome: Outcome, grid_s: int) -> None:
        """The look is over: put what it found in order. Windows that it may seal are not looked at again."""
        if outcome.status is LookStatus.COMPLETE:
            after_s = grid_s + self._settling_s
            self.known.leave(s for s in self.known.starts_s if (s + after_s) * 1000 <= outcome.observed_at_ms)
        self.known.settle()

    def drop(self) -> None:
        """Forget what it knows."""
        self.known = Known()


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """The points of a batch by series and window, n groups. Of a timestamp that repeats the greatest value counts, as in the store."""

    rows: NDArray[np.intp]
    """The series of each, by its index in the batch."""
    starts_s: NDArray[np.int64]
    points: NDArray[np.int64]
    digests: NDArray[np.uint64]
    finite: _Mask
    sizes: NDArray[np.int64]
    order: NDArray[np.intp] | None

    @classmethod
    def of(cls, batch: Batch) -> _Groups:
        owner = np.repeat(np.arange(len(batch.series)), batch.counts)
        times_s, values = batch.timestamps_s, batch.values
        order = None
        counts = np.ones(len(owner), np.int64)
        if ((owner[1:] == owner[:-1]) & (times_s[1:] <= times_s[:-1])).any():
            order = np.lexsort((values, times_s, owner))
            owner, times_s, values = owner[order], times_s[order], values[order]
            counts[:-1] = (owner[1:] != owner[:-1]) | (times_s[1:] != times_s[:-1])
        starts_s = times_s - times_s % batch.grid_s
        begins = np.ones(len(owner), np.bool_)
        begins[1:] = (owner[1:] != owner[:-1]) | (starts_s[1:] != starts_s[:-1])
        (first,) = np.nonzero(begins)
        hashes = point_hashes(batch.ids[owner], times_s, values)
        if order is not None:
            hashes[counts == 0] = 0
        return cls(
            rows=owner[first],
            starts_s=starts_s[first],
            points=np.add.reduceat(counts, first),
            digests=np.add.reduceat(hashes, first),
            finite=np.logical_and.reduceat(np.isfinite(values), first),
            sizes=np.diff(first, append=len(owner)),
            order=order,
        )

    def of_points(self, groups: _Mask) -> _Mask:
        """The points of some groups, in the order of the batch."""
        points = np.repeat(groups, self.sizes)
        if self.order is None:
            return points
        back = np.empty_like(points)
        back[self.order] = points
        return back

    def counts(self, grid_s: int, only: _Mask | None = None) -> tuple[WindowCount, ...]:
        """Points and digests by window, as `window_counts` of the batch."""
        starts_s = self.starts_s if only is None else self.starts_s[only]
        points = self.points if only is None else self.points[only]
        digests = self.digests if only is None else self.digests[only]
        found = []
        for start_s in np.unique(starts_s).tolist():
            here = starts_s == start_s
            digest = int(np.add.reduce(digests[here], dtype=np.uint64))
            found.append(WindowCount(start_s, start_s + grid_s, int(points[here].sum()), digest))
        return tuple(found)


def _only(batch: Batch, points: _Mask) -> Batch | None:
    """Some points of a batch; None where there are none.

    Series without points stay while they are the fewer: a table of labels that repeats from look to look is encoded once.
    """
    if not points.any():
        return None
    if points.all():
        return batch
    owner = np.repeat(np.arange(len(batch.series)), batch.counts)[points]
    counts = np.bincount(owner, minlength=len(batch.series)).astype(np.int32)
    series, ids = batch.series, batch.ids
    has = counts > 0
    if 2 * int(has.sum()) < len(series):
        series = tuple(one for one, stays in zip(series, has.tolist(), strict=True) if stays)
        ids, counts = ids[has], counts[has]
    return replace(
        batch,
        series=series,
        ids=ids,
        counts=counts,
        timestamps_s=batch.timestamps_s[points],
        values=batch.values[points],
    )
