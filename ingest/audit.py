"""What an audit compares, and how: the archive's maximum against the store's rows, manifests against receipts. Pure.

* The store must hold, for each (series, timestamp), the value of the greatest (version, value) of all archived looks, and nothing else
  (`ingest.expected`). Its version may be that of any look since the last published one that said so: what a later look saw unchanged is
  archived, and lands only where it is replayed.
* Equality is by digest of (series, timestamp, value) and by the oldest and newest version, by place and bucket of `BUCKET_S`; only where those
  differ are points compared (`Comparison`), and every difference is counted and, up to `NAMED_MAX` of a kind, named.
* A look in the archive and its row in the ledger must say the same, and a seal must be of the newest complete look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ingest.clock import rfc3339
from ingest.evidence import LedgerLook, LedgerSeal, StoreRows
from ingest.expected import Expected, LookCount, Maximum
from ingest.model import (
    ReceiptItem,
    SeriesIds,
    add_digests,
    point_hashes,
    split_version,
)

BUCKET_S = 300
NAMED_MAX = 20
_NONE = np.iinfo(np.int64).max


class Kind(StrEnum):
    """What can differ."""

    MISSING = "missing in the store"
    EXTRA = "not in the archive"
    VALUE = "other value"
    VERSION = "other version"
    LOOK_NOT_IN_LEDGER = "look not in the ledger"
    LOOK_NOT_IN_ARCHIVE = "look not in the archive"
    LOOK_DIFFERS = "look differs from its receipt"
    SPOILT = "spoilt object"
    SEAL = "seal differs"
    SOURCE_MISSING = "source has it, the store has not"
    SOURCE_VALUE = "source has another value"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be. `what` is a series, an archive key or a window; `at_s` a point's timestamp."""

    kind: Kind
    target: str
    service: str
    what: str
    at_s: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        at = "" if self.at_s is None else f" at {rfc3339(self.at_s)}"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.kind}: {self.what}{at}{detail} ({self.target} {self.service})"


@dataclass(slots=True)
class Report:
    """What an audit found. `points` are of the archive's maximum; `dead_*` and `under_way` are accounted for, and no differences."""

    from_s: int
    to_s: int
    places: int = 0
    objects: int = 0
    looks: int = 0
    points: int = 0
    digests: int = 0
    dead_points: int = 0
    dead_batches: int = 0
    under_way: int = 0
    seals: int = 0
    counts: Counter[Kind] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.counts

    def add(self, one: Difference, count: int = 1) -> None:
        """Count a difference, and name it while its kind has few."""
        if self.counts[one.kind] < NAMED_MAX:
            self.differences.append(one)
        self.counts[one.kind] += count

    def verdict(self) -> str:
        """One line."""
        span = f"[{rfc3339(self.from_s)}, {rfc3339(self.to_s)})"
        what = f"{self.points:,} points of {self.looks:,} looks in {self.objects:,} objects, {self.places:,} places"
        aside = f"{self.dead_points:,} dead, {self.under_way:,} looks under way"
        if self.equal and not self.objects:
            return f"EQUAL: nothing is archived for {span}, and the store and the ledger have nothing either"
        if self.equal:
            return f"EQUAL: archive = ledger = store over {span}: {what}; {aside}"
        total = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))
        return f"DIFFERENT over {span}: {total}; compared {what}; {aside}"


# --- digests ------------------------------------------------------------------------------------------------------


class Digests:
    """Rows, their digest, and their oldest and newest version, by place and bucket of `BUCKET_S` over [start_s, end_s), which lies on the buckets."""

    def __init__(self, places: int, start_s: int, end_s: int) -> None:
        self.start_s = start_s
        buckets = -(-(end_s - start_s) // BUCKET_S)
        self.rows = np.zeros((places, buckets), np.int64)
        self.sums = np.zeros((places, buckets), np.uint64)
        self.oldest = np.full((places, buckets), _NONE, np.int64)
        self.newest = np.zeros((places, buckets), np.int64)

    def add(
        self,
        places: NDArray[np.int64] | int,
        ids: SeriesIds,
        timestamps_s: NDArray[np.int64],
        values: NDArray[np.float64],
        oldest: NDArray[np.int64],
        newest: NDArray[np.int64],
    ) -> None:
        """Add rows, one place for all or one each. Versions may be from `oldest` to `newest`; of rows of a store both are their own."""
        cells = places * self.rows.shape[1] + (timestamps_s - self.start_s) // BUCKET_S
        np.add.at(self.rows.reshape(-1), cells, 1)
        np.add.at(self.sums.reshape(-1), cells, point_hashes(ids, timestamps_s, values))
        np.minimum.at(self.oldest.reshape(-1), cells, oldest)
        np.maximum.at(self.newest.reshape(-1), cells, newest)

    def differing(self, place: int, other: Digests) -> list[tuple[int, int]]:
        """Stretches [start_s, end_s) in which ours of `place` is not as `other`, of one place and a part of our time, says it must be."""
        first = (other.start_s - self.start_s) // BUCKET_S
        own = slice(first, first + other.rows.shape[1])
        differ = (self.rows[place, own] != other.rows[0]) | (self.sums[place, own] != other.sums[0])
        differ |= (self.oldest[place, own] < other.oldest[0]) | (self.newest[place, own] > other.newest[0])
        edges = np.flatnonzero(np.diff(np.concatenate(([False], differ, [False])).astype(np.int8)))
        return [
            (other.start_s + int(a) * BUCKET_S, other.start_s + int(b) * BUCKET_S)
            for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]

    def pieces(self, place: int, start_s: int, end_s: int, rows_max: int) -> list[tuple[int, int]]:
        """A stretch cut so that each piece has at most so many rows of `place`, or is one bucket."""
        cuts, rows = [start_s], 0
        for here_s in range(start_s, end_s, BUCKET_S):
            more = int(self.rows[place, (here_s - self.start_s) // BUCKET_S])
            if rows and rows + more > rows_max:
                cuts.append(here_s)
                rows = 0
            rows += more
        return list(pairwise([*cuts, end_s]))


# --- points -------------------------------------------------------------------------------------------------------


class Comparison:
    """Rows of the store, of one place and a stretch of time, against the maximum. Take all rows, then `finish`."""

    def __init__(
        self,
        report: Report,
        expected: Expected,
        maximum: Maximum,
        start_s: int,
        end_s: int,
        service: str | None,
    ) -> None:
        self._report = report
        self._expected = expected
        self._service = service
        seconds = maximum.keys % expected.span_s + expected.start_s
        here = (seconds >= start_s) & (seconds < end_s)
        self._keys, self._values = maximum.keys[here], maximum.values[here]
        self._versions, self._oldest = maximum.versions[here], maximum.oldest[here]
        self._seen = np.zeros(len(self._keys), np.bool_)

    def take(self, rows: StoreRows) -> None:
        """Compare some rows. Their series must be known to `expected`."""
        expected = self._expected
        unique, inverse = np.unique(rows.ids, axis=0, return_inverse=True)
        indices = np.array([expected.index_of(one.astype(">u8").tobytes()) for one in unique], np.int64)
        keys = indices[inverse.reshape(-1)] * expected.span_s + (rows.timestamps_s - expected.start_s)
        at = np.minimum(np.searchsorted(self._keys, keys), max(0, len(self._keys) - 1))
        found = self._keys[at] == keys if len(self._keys) else np.zeros(len(keys), np.bool_)
        self._seen[at[found]] = True
        for i in np.flatnonzero(~found).tolist():
            self._say(Kind.EXTRA, int(keys[i]), f"the store has {_sample(rows.values[i], rows.versions[i])}")
        pairs = np.flatnonzero(found)
        own = rows.versions[pairs]
        other_version = (own < self._oldest[at[pairs]]) | (own > self._versions[at[pairs]])
        other_value = rows.values[pairs] != self._values[at[pairs]]
        for j in np.flatnonzero(other_version | other_value).tolist():
            i, e = int(pairs[j]), int(at[pairs[j]])
            kind = Kind.VALUE if other_value[j] else Kind.VERSION
            archived = _sample(self._values[e], self._versions[e])
            stored = _sample(rows.values[i], rows.versions[i])
            self._say(kind, int(keys[i]), f"the archive has {archived}, the store {stored}")

    def finish(self) -> None:
        """What was not met is missing."""
        for e in np.flatnonzero(~self._seen).tolist():
            archived = _sample(self._values[e], self._versions[e])
            self._say(Kind.MISSING, int(self._keys[e]), f"the archive has {archived}")

    def _say(self, kind: Kind, key: int, detail: str) -> None:
        known = self._expected.known[key // self._expected.span_s]
        if self._service in (None, known.service):
            at_s = key % self._expected.span_s + self._expected.start_s
            self._report.add(Difference(kind, known.target, known.service, known.text, at_s, detail))


def _sample(value: float, version: int) -> str:
    revision, observed_at_ms = split_version(int(version))
    again = f", revision {revision}" if revision else ""
    return f"{float(value)!r} as of {rfc3339(observed_at_ms / 1000)}{again}"


# --- looks --------------------------------------------------------------------------------------------------------


def look_problem(
    done: ReceiptItem, finished_at_ms: int, rows: Sequence[LedgerLook]
) -> tuple[Kind, str] | None:
    """How the ledger's rows about one archived look differ from it; `rows` are those of its task and service."""
    own = [row for row in rows if row.finished_at_ms == finished_at_ms]
    if not own:
        return Kind.LOOK_NOT_IN_LEDGER, f"{done.outcome.status}, {done.points:,} points"
    (row,) = own
    windows, whole = (
        tuple((w.start_s, w.points, w.digest) for w in some) for some in (done.windows, done.whole)
    )
    pairs = (
        ("status", str(done.outcome.status), row.status),
        ("points", done.points, row.points),
        ("batches", len(done.batches) + len(done.held), len(row.batches) + len(row.held)),
        ("span", (done.item.start_s, done.item.end_s), (row.start_s, row.end_s)),
    )
    for name, archived, said in pairs:
        if archived != said:
            return Kind.LOOK_DIFFERS, f"{name} {archived} in the archive, {said} in the ledger"
    batches = {*done.batches, *done.held} == {*row.batches, *row.held} and {*row.held} <= {*done.held}
    if not batches or (windows, whole) != (row.windows, row.whole):
        return Kind.LOOK_DIFFERS, "batches or window digests are not those of the manifest"
    return None


# --- seals --------------------------------------------------------------------------------------------------------


def seal_problem(seal: LedgerSeal, newest: Mapping[int, LookCount]) -> str | None:
    """How a seal of the ledger, of a window or of a folded day, differs from the newest complete archived look, by window's start."""
    own = [count for start_s, count in newest.items() if seal.covers(start_s)]
    if len(own) != seal.windows:
        return f"of {seal.windows} sealed windows {len(own)} have a complete look in the archive"
    points, digest = sum(c.points for c in own), add_digests(*(c.digest for c in own))
    if (points, digest) == (seal.points, seal.digest):
        return None
    return f"{seal.points:,} points in the ledger, {points:,} in the archive" + (
        "" if points != seal.points else ", with another digest"
    )
