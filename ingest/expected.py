"""What the store must hold, as the archive says: the greatest (version, value) of each point, in bounded memory. Pure.

What a look held was archived and, as a rule, not published: its value counts, and the point's version in the store is anything from that of the
last published batch with the point to that of the last one at all.

The order, the number and the splitting of the looks do not matter. What validation refuses is left out by what a point is, and not by when it
is read: what was let in three years ago is not ancient here, and what was put aside in its day is known by its letter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ingest.balance import stored_counts
from ingest.batch import Decoded, without_series
from ingest.model import Batch, ReceiptItem, SeriesIds, WindowCount, halves_of, merge_counts, window_counts
from ingest.validate import describe, validate
from shard_config.model import Limits

POINTS_MAX = 4_000_000
"""Of one place and slice of time, in memory (about 100 MB); a slice with more than half of it is cut in two."""

_NEVER_S = 1 << 40


class TooMuchError(Exception):
    """A slice holds more than `POINTS_MAX` points: take a shorter one."""


@dataclass(frozen=True, slots=True)
class Letters:
    """What the dead-letter topic says of points: by batch id and series' description, timestamps; and when a batch with uncounted ones came."""

    points: Mapping[tuple[bytes, str], frozenset[int]] = field(default_factory=dict)
    more_at_s: Mapping[bytes, int] = field(default_factory=dict)
    """By batch id: the time at which it was validated, where some of its dead points have no letter of their own."""


def living(
    batch: Batch, limits: Limits, batch_id: bytes = b"", letters: Letters | None = None
) -> Batch | None:
    """The points of a batch that a store may hold; None where there are none.

    Rules of time count only as of when the batch came, where a letter says when: else they would kill today what landed in its day.
    """
    now_s = letters.more_at_s.get(batch_id) if letters is not None else None
    if now_s is None:
        limits, now_s = limits.model_copy(update={"future_s_max": _NEVER_S, "retention_s": _NEVER_S}), 0
    accepted = validate(batch, now_s, limits).accepted
    if accepted is None or letters is None or not letters.points:
        return accepted
    dead = np.zeros(accepted.points, np.bool_)
    ends = np.cumsum(accepted.counts, dtype=np.int64).tolist()
    for one, end, count in zip(accepted.series, ends, accepted.counts.tolist(), strict=True):
        if (times := letters.points.get((batch_id, describe(one)))) is not None:
            dead[end - count : end] = np.isin(accepted.timestamps_s[end - count : end], list(times))
    return _without_points(accepted, dead)


def _without_points(batch: Batch, dead: NDArray[np.bool_]) -> Batch | None:
    if not dead.any():
        return batch
    if dead.all():
        return None
    owner = np.repeat(np.arange(len(batch.series)), batch.counts)[~dead]
    return replace(
        batch,
        counts=np.bincount(owner, minlength=len(batch.series)).astype(np.int32),
        timestamps_s=batch.timestamps_s[~dead],
        values=batch.values[~dead],
    )


@dataclass(frozen=True, slots=True)
class Known:
    """A series as a difference names it."""

    text: str
    target: str
    service: str


@dataclass(frozen=True, slots=True, eq=False)
class Maximum:
    """The greatest (version, value) of each (series, timestamp), n of them, sorted by `keys`: index in `Expected.known` × span + second.

    `oldest` is the least version that the store may have for it.
    """

    keys: NDArray[np.int64]
    values: NDArray[np.float64]
    versions: NDArray[np.int64]
    oldest: NDArray[np.int64]


class Expected:
    """The maximum over all archived batches of one place within [start_s, end_s): what the store must hold."""

    def __init__(self, start_s: int, end_s: int, points_max: int = POINTS_MAX) -> None:
        self.start_s = start_s
        self.span_s = end_s - start_s
        self.known: list[Known] = []
        self._ids: list[bytes] = []
        self._index: dict[bytes, int] = {}
        self._points_max = points_max
        self._parts: list[Maximum] = []
        self._waiting = 0

    def index_of(self, raw_id: bytes) -> int | None:
        """Where a series stands in `known`."""
        return self._index.get(raw_id)

    def learn(self, raw_id: bytes, known: Known) -> int:
        """Give a series an index, or the one that it has."""
        index = self._index.setdefault(raw_id, len(self.known))
        if index == len(self.known):
            self.known.append(known)
            self._ids.append(raw_id)
        return index

    def ids(self, keys: NDArray[np.int64]) -> SeriesIds:
        """The series id of each key, shape (n, 2)."""
        return halves_of(self._ids)[keys // self.span_s]

    def within(self, batch: Batch) -> int:
        """How many points of a batch are in the slice."""
        return int(np.count_nonzero(self._inside(batch)))

    def _inside(self, batch: Batch) -> NDArray[np.bool_]:
        return (batch.timestamps_s >= self.start_s) & (batch.timestamps_s < self.start_s + self.span_s)

    def add(self, batch: Batch, *, held: bool = False) -> None:
        """Take in a batch; points outside the slice are left out. `held` ones need not have landed. Raises TooMuchError."""
        inside = self._inside(batch)
        if not inside.any():
            return
        owners = np.repeat(np.arange(len(batch.series)), batch.counts)[inside]
        indices = np.zeros(len(batch.series), np.int64)
        raws = batch.ids.astype(">u8").tobytes()
        for i in np.unique(owners).tolist():
            raw = raws[16 * i : 16 * i + 16]
            index = self._index.get(raw)
            if index is None:
                index = self.learn(raw, Known(describe(batch.series[i]), str(batch.target), batch.service))
            indices[i] = index
        keys = indices[owners] * self.span_s + (batch.timestamps_s[inside] - self.start_s)
        versions = np.full(len(keys), batch.version, np.int64)
        oldest = np.zeros(len(keys), np.int64) if held else versions
        self._parts.append(Maximum(keys, batch.values[inside], versions, oldest))
        self._waiting += len(keys)
        if self._waiting > self._points_max:
            self._fold()

    def maximum(self) -> Maximum:
        """What the batches so far come to. Raises TooMuchError."""
        self._fold()
        return self._parts[0]

    def _fold(self) -> None:
        none = np.empty(0, np.int64)
        parts = self._parts or [Maximum(none, np.empty(0, np.float64), none, none)]
        keys = np.concatenate([p.keys for p in parts])
        values = np.concatenate([p.values for p in parts])
        versions = np.concatenate([p.versions for p in parts])
        oldest = np.concatenate([p.oldest for p in parts])
        order = np.lexsort((values, versions, keys))
        keys = keys[order]
        last = np.ones(len(keys), np.bool_)
        last[:-1] = keys[1:] != keys[:-1]
        if int(last.sum()) > self._points_max // 2:
            raise TooMuchError
        (first,) = np.nonzero(np.concatenate(([True], last[:-1]))) if len(keys) else (none,)
        oldest = np.maximum.reduceat(oldest[order], first) if len(keys) else oldest
        self._parts = [Maximum(keys[last], values[order][last], versions[order][last], oldest)]
        self._waiting = int(last.sum())


def counted(batch: Batch) -> tuple[WindowCount, ...]:
    """Points and digests of a batch by window, as its receipt must say."""
    return window_counts(batch.point_ids(), batch.timestamps_s, batch.values, batch.grid_s)


@dataclass(slots=True)
class LookRead:
    """One archived look as it is read back: points and digests by window, and the versions of its batches."""

    published: list[WindowCount] = field(default_factory=list)
    held: list[WindowCount] = field(default_factory=list)
    taken: list[WindowCount] = field(default_factory=list)
    """Of those, what the store must hold by now."""
    alive: list[WindowCount] = field(default_factory=list)
    """Of what was taken, all but the dead."""
    versions: list[int] = field(default_factory=list)

    @property
    def archived(self) -> tuple[WindowCount, ...]:
        return merge_counts(self.published + self.held)

    def is_what(self, done: ReceiptItem) -> bool:
        """Whether it is what its receipt says. A window of which anything was held is archived whole."""
        whole = {w.start_s for w in self.held}
        return merge_counts(self.published) == done.windows and all(
            w in done.whole for w in self.archived if w.start_s in whole
        )


class LookCount(NamedTuple):
    """What a complete archived look saw of a window, less what is dead. The greatest is the newest."""

    version: int
    observed_at_ms: int
    points: int
    digest: int


class Slice:
    """What the archive holds of one place in a slice of time."""

    def __init__(self, expected: Expected, letters: Letters) -> None:
        self.expected = expected
        self.maximum = expected.maximum()
        self.dead_points = 0
        self.batches: set[bytes] = set()
        self.newest: dict[tuple[str, str], dict[int, LookCount]] = defaultdict(dict)
        """By target and service: of each window the newest complete look."""
        self._letters = letters

    def add(
        self, decoded: Decoded, batch_id: bytes, limits: Limits, *, held: bool = False
    ) -> tuple[WindowCount, ...]:
        """Take in a batch without what is dead in it; what is left, by window. Raises TooMuchError."""
        batch = without_series(decoded.batch, decoded.bad) if decoded.bad else decoded.batch
        alive = living(batch, limits, batch_id, self._letters)
        self.batches.add(batch_id)
        self.dead_points += self.expected.within(decoded.batch)
        if alive is None:
            return ()
        self.dead_points -= self.expected.within(alive)
        self.expected.add(alive, held=held)
        return counted(alive)

    def remember(
        self,
        target: str,
        done: ReceiptItem,
        version: int,
        taken: Iterable[WindowCount],
        alive: Iterable[WindowCount],
    ) -> None:
        """What a complete look saw of each of its windows, less what is dead: that of `taken` which is not in `alive`."""
        with_dead = [(c.start_s, c.points, c.digest) for c in taken]
        seen = [(c.start_s, c.points, c.digest) for c in done.whole] or with_dead
        found = stored_counts(seen, with_dead + [(c.start_s, -c.points, -c.digest) for c in alive])
        newest = self.newest[(target, done.item.service)]
        for window in done.item.windows():
            count = LookCount(version, done.outcome.observed_at_ms, *found.get(window.start_s, (0, 0))[:2])
            newest[window.start_s] = max(count, newest.get(window.start_s, count))
