"""The nouns of the way of the data; identity, version and digest are defined here and nowhere else.

* **Identity** of a series is 128 bits of blake2b over its canonical labels (`series_id`).
* **Version** of a sample is one 64-bit integer, revision over observed_at (`version_of`). Landing keeps the maximum
  of (version, value): commutative, associative, idempotent, so duplication, reordering, replay and a second
  collection all end in the same table.
* **Digest** of a set of points is a sum modulo 2**64, so it does not depend on their order or how they were
  split into batches (`digest_of`).

Times: `*_s` are whole seconds, `*_ms` milliseconds, both since the epoch, UTC. Intervals are half-open.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import blake2b
from typing import NewType

import numpy as np
from numpy.typing import NDArray

BatchId = NewType("BatchId", bytes)
"""16 bytes: blake2b-128 of a batch's record value, as it stands in the archive and in Kafka."""

SeriesIds = NDArray[np.uint64]
"""Shape (n, 2): the high and the low half of each series id."""

REVISION_MAX = 127
"""128 would set the sign bit of a 64-bit version."""

OBSERVED_AT_MS_MAX = 2**56 - 1

_LENGTH = struct.Struct(">I")
_U64 = (1 << 64) - 1


# --- identity -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class SeriesKey:
    """What makes a series the one it is. `dimensions` is sorted by name; names are unique."""

    account: str
    region: str
    namespace: str
    metric: str
    dimensions: tuple[tuple[str, str], ...]
    stat: str
    period_s: int


@dataclass(frozen=True, slots=True)
class Series:
    """A series and what is known about it beyond its identity."""

    key: SeriesKey
    unit: str = ""


def series_id(key: SeriesKey) -> bytes:
    """128 bits that name a series, for ever and on every machine.

    Each field is written as UTF-8 behind its length (32 bits, big-endian), the dimensions behind their number, so that no two
    keys share a canonical form. A unit or an alias is not part of it: AWS may learn a unit later.
    """
    parts: list[bytes] = []
    for text in (key.account, key.region, key.namespace, key.metric, key.stat, str(key.period_s)):
        raw = text.encode()
        parts += (_LENGTH.pack(len(raw)), raw)
    parts.append(_LENGTH.pack(len(key.dimensions)))
    for pair in key.dimensions:
        for text in pair:
            raw = text.encode()
            parts += (_LENGTH.pack(len(raw)), raw)
    return blake2b(b"".join(parts), digest_size=16).digest()


def series_ids(series: tuple[Series, ...]) -> SeriesIds:
    """The ids of many series, as (n, 2) unsigned 64-bit halves."""
    return halves_of(series_id(one.key) for one in series)


def halves_of(ids: Iterable[bytes]) -> SeriesIds:
    """Ids of 16 bytes as (n, 2) unsigned 64-bit halves, in their order."""
    return np.frombuffer(b"".join(ids), dtype=">u8").reshape(-1, 2).astype(np.uint64)


def bytes_of(ids: SeriesIds) -> list[bytes]:
    """The inverse of `halves_of`."""
    raw = ids.astype(">u8").tobytes()
    return [raw[at : at + 16] for at in range(0, len(raw), 16)]


# --- version --------------------------------------------------------------------------------------------------


def version_of(revision: int, observed_at_ms: int) -> int:
    """One positive 64-bit integer that orders looks: a revision beats any time, then the later look wins.

    Raises ValueError outside 0 ≤ revision ≤ 127, 0 ≤ observed_at_ms < 2**56.
    """
    if not 0 <= revision <= REVISION_MAX:
        raise ValueError(f"revision {revision} is not in 0..{REVISION_MAX}")
    if not 0 <= observed_at_ms <= OBSERVED_AT_MS_MAX:
        raise ValueError(f"observed_at_ms {observed_at_ms} is not in 0..2**56-1")
    return revision << 56 | observed_at_ms


def split_version(version: int) -> tuple[int, int]:
    """(revision, observed_at_ms) of a version."""
    return version >> 56, version & OBSERVED_AT_MS_MAX


# --- digest ---------------------------------------------------------------------------------------------------


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014), on each element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def point_hashes(
    ids: SeriesIds, timestamps_s: NDArray[np.int64], values: NDArray[np.float64]
) -> NDArray[np.uint64]:
    """A 64-bit hash of each (series, timestamp, value); `ids` has one row a point. −0 counts as 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = (values + 0.0).view(np.uint64)
        h = _mix(ids[:, 0] + np.uint64(0x9E3779B97F4A7C15))
        h = _mix(h ^ ids[:, 1])
        h = _mix(h ^ timestamps_s.astype(np.uint64))
        return _mix(h ^ bits)


def digest_of(ids: SeriesIds, timestamps_s: NDArray[np.int64], values: NDArray[np.float64]) -> int:
    """The digest of a set of points: the sum of their hashes modulo 2**64. Order and splitting do not matter."""
    return int(np.add.reduce(point_hashes(ids, timestamps_s, values), dtype=np.uint64))


def add_digests(*digests: int) -> int:
    """The digest of a disjoint union."""
    return sum(digests) & _U64


# --- windows, tasks, looks ------------------------------------------------------------------------------------


class SourceName(StrEnum):
    CLOUDWATCH = "cloudwatch"
    EXPOSITION = "exposition"


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """The unit of sharding: one account and region of one source."""

    source: str
    account: str
    region: str

    def __str__(self) -> str:
        return f"{self.source}/{self.account}/{self.region}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """The inverse of `str`. Raises ValueError where the text is not source/account/region."""
        source, account, region = text.split("/")
        return cls(source, account, region)


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """[start_s, end_s) on the poll grid of a target's service: the unit of the ledger."""

    start_s: int
    end_s: int

    def __str__(self) -> str:
        return f"[{self.start_s}, {self.end_s})"


@dataclass(frozen=True, slots=True)
class TaskItem:
    """One service's part of a task: look at all of [start_s, end_s), which is whole windows of `grid_s`.

    `period_s` is the resolution asked for where it is not the profile's but a multiple (old data is kept no finer); 0: the profile's.
    """

    service: str
    start_s: int
    end_s: int
    grid_s: int
    period_s: int = 0

    def windows(self) -> list[Window]:
        return [Window(t, t + self.grid_s) for t in range(self.start_s, self.end_s, self.grid_s)]


class TaskKind(StrEnum):
    LIVE = "live"
    BACKLOG = "backlog"
    HEAL = "heal"
    """Another attempt at windows that are past their deadline; see `ingest.heal`."""
    PAUSED = "paused"
    """Planned, and asked of nobody: its account or service is paused. On `ledger` only."""
    BUDGET = "budget"
    """Planned, and asked of nobody: its account's dollars of the day are spent. On `ledger` only."""
    AGAIN = "again"
    """A task without a receipt, announced once more: the archive is asked before the source. On `collect` only."""
    REPLAY = "replay"
    """A task that is archived and has not landed: published from the archive, never asked. On `collect` only."""


@dataclass(frozen=True, slots=True)
class Task:
    """One poll of one target. Its id is made from what it asks for, so planning it twice is one task.

    A task whose `expires_s` has passed is not executed but declared expired (an exposition endpoint has no past).
    0 means that it never expires. `revision` is that of all its looks: above 0 only in an operator's correction.
    """

    task_id: str
    target: Target
    config_revision: str
    tick_s: int
    attempt: int
    kind: str
    expires_s: int
    items: tuple[TaskItem, ...]
    revision: int = 0

    def part(self, items: Iterable[TaskItem]) -> Task:
        """The task that asks for these of its items, with the id that follows from them."""
        some = tuple(items)
        task_id = task_id_of(self.target, self.config_revision, self.attempt, some, self.revision)
        return replace(self, task_id=task_id, tick_s=max(i.end_s for i in some), items=some)


def task_id_of(
    target: Target, config_revision: str, attempt: int, items: tuple[TaskItem, ...], revision: int = 0
) -> str:
    """32 hexadecimal digits over what a task asks for."""
    text = "\n".join(
        [str(target), config_revision, str(attempt)]
        + [
            f"{i.service} {i.start_s} {i.end_s} {i.grid_s}" + (f" {i.period_s}" if i.period_s else "")
            for i in sorted(items, key=lambda i: i.service)
        ]
        + ([f"revision {revision}"] if revision else [])
    )
    return blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class WindowCount:
    """What one batch, or one look, holds of one window. `digest` is `digest_of` its points."""

    start_s: int
    end_s: int
    points: int
    digest: int


def merge_counts(counts: Iterable[WindowCount]) -> tuple[WindowCount, ...]:
    """Points and digests of the same window added up, oldest first."""
    merged: dict[int, WindowCount] = {}
    for c in counts:
        seen = merged.get(c.start_s)
        merged[c.start_s] = (
            c
            if seen is None
            else replace(seen, points=seen.points + c.points, digest=add_digests(seen.digest, c.digest))
        )
    return tuple(merged[s] for s in sorted(merged))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Up to about 500 series of one look at one service of one target, in columns. The unit of landing.

    `counts[i]` points belong to `series[i]`; `timestamps_s` and `values` hold them one series after the other.
    A timestamp may repeat within a series (AWS does that): landing keeps the greatest value.
    All series have the account, region and period of the batch... of OAM the owner's account stands in the key.
    """

    task_id: str
    target: Target
    service: str
    observed_at_ms: int
    revision: int
    grid_s: int
    series: tuple[Series, ...]
    counts: NDArray[np.int32]
    timestamps_s: NDArray[np.int64]
    values: NDArray[np.float64]
    ids: SeriesIds = field(repr=False)

    @property
    def version(self) -> int:
        return version_of(self.revision, self.observed_at_ms)

    @property
    def points(self) -> int:
        return len(self.values)

    def point_ids(self) -> SeriesIds:
        """The series id of each point, shape (points, 2)."""
        return np.repeat(self.ids, self.counts, axis=0)


def _greatest_of_repeated(
    ids: SeriesIds, timestamps_s: NDArray[np.int64], values: NDArray[np.float64]
) -> NDArray[np.intp] | None:
    """Indices of the points that stay; None where timestamps ascend within each series, so that none repeats."""
    same_series = (ids[1:] == ids[:-1]).all(axis=1)
    if not (same_series & (timestamps_s[1:] <= timestamps_s[:-1])).any():
        return None
    order = np.lexsort((values, timestamps_s, ids[:, 1], ids[:, 0]))
    ids, timestamps_s = ids[order], timestamps_s[order]
    last = np.ones(len(order), dtype=np.bool_)
    last[:-1] = (ids[1:] != ids[:-1]).any(axis=1) | (timestamps_s[1:] != timestamps_s[:-1])
    return order[last]


def window_counts(
    ids: SeriesIds, timestamps_s: NDArray[np.int64], values: NDArray[np.float64], grid_s: int
) -> tuple[WindowCount, ...]:
    """Points and digest by window of the epoch-aligned grid, oldest first; windows without points are left out.

    Of a timestamp that repeats within a series the greatest value counts, as in the store; the others do not. The points of a series
    must lie together.
    """
    if not len(values):
        return ()
    kept = _greatest_of_repeated(ids, timestamps_s, values)
    if kept is not None:
        ids, timestamps_s, values = ids[kept], timestamps_s[kept], values[kept]
    hashes = point_hashes(ids, timestamps_s, values)
    starts = timestamps_s // grid_s * grid_s
    order = np.argsort(starts, kind="stable")
    unique, first, counts = np.unique(starts[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(hashes[order], first)
    return tuple(
        WindowCount(int(s), int(s) + grid_s, int(c), int(d))
        for s, c, d in zip(unique, counts, sums, strict=True)
    )


class LookStatus(StrEnum):
    """How a look at one item ended. Only COMPLETE closes a window (COMPLETE without points: it was empty)."""

    COMPLETE = "complete"
    PARTIAL = "partial"
    """Some series did not answer within the attempts; what did is kept, the windows stay open."""
    FORBIDDEN = "forbidden"
    FAILED = "failed"
    EXPIRED = "expired"


CONTINUED = "GetMetricData, continued"
"""Beside the API names in `Outcome.requests`: the metrics that continuation pages asked for again. Whether AWS bills those is disputed, and a bill
can tell (`ingest.reconcile`)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a look at one item ended; yielded by a source last, and exactly once.

    `observed_at_ms` is the source's own clock at the earliest answer of the look (0 where there was none); `series` were asked about.
    `requests` counts requests by API name; `metrics_billed` is what GetMetricData bills (metrics requested), of requests that were
    answered. `metrics_in_doubt` were asked for in requests whose answer was lost: billed or not, only AWS knows. A look may go back
    further than it was asked to, for series that discovery found late: then to `looked_from_s`, else that is 0.
    """

    status: LookStatus
    detail: str
    observed_at_ms: int
    series: int
    requests: dict[str, int]
    metrics_billed: int
    metrics_in_doubt: int = 0
    looked_from_s: int = 0


@dataclass(frozen=True, slots=True)
class ReceiptItem:
    """What a task did for one item. `batches` are the ids of the record values that were archived and published.

    `points` and `windows` count what is in those. Points that were published before with the same value are not published again: of
    windows that this look may seal they are archived all the same, in the record values `held`. `whole` counts all that the look saw of
    every window, published or not; empty where nothing was left out, so that `windows` does.
    """

    item: TaskItem
    outcome: Outcome
    points: int
    windows: tuple[WindowCount, ...]
    batches: tuple[BatchId, ...]
    whole: tuple[WindowCount, ...] = ()
    held: tuple[BatchId, ...] = ()

    @property
    def seen(self) -> tuple[WindowCount, ...]:
        """All that the look saw, by window."""
        return self.whole or self.windows


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a task did: the last thing that a task writes, failures included. Also the archive's manifest."""

    task_id: str
    target: Target
    shard: str
    tick_s: int
    started_at_ms: int
    finished_at_ms: int
    archive_key: str
    items: tuple[ReceiptItem, ...]


@dataclass(frozen=True, slots=True)
class RecordPosition:
    """Where a record stands in Kafka. `offset` is the record's own, not the next one's."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What was put aside. Writing it twice gives the same letter: `identity` is made from reason and content.

    `payload` is the whole record value where it did not decode, else one point, or all points of a series, as JSON. Where the record
    stood is not part of the identity: a replay of it stands elsewhere, and a mirror numbers it otherwise. `ingest.letters` makes
    letters, and points of them again.
    """

    reason: str
    detail: str
    origin: RecordPosition
    batch_id: BatchId
    series: str
    payload: bytes
    cluster: str = ""
    """The id of the Kafka cluster that `origin` is of; empty in letters of version 1."""
    key: bytes = b""
    """The record's key: it names the target even where the value does not decode."""
    context: bytes = b""
    """JSON: look and labels of a point, without which it could not be landed later. Empty for a whole record."""

    @property
    def identity(self) -> str:
        h = blake2b(digest_size=16)
        for part in (self.reason.encode(), self.batch_id, self.series.encode(), self.payload):
            h.update(_LENGTH.pack(len(part)))
            h.update(part)
        return h.hexdigest()
