"""Dead letters landed after all: through exactly the way that living data takes.

* *A whole record* is published on `raw` again, byte for byte: the consumers decode it with today's schemas, and the look that
  announced it closes at last.
* *Points* become a task whose source is their letters: archived, published, and in the ledger with a receipt, so that archive, ledger
  and store stay equal and a rebuilt store has them too. They keep the version of their look. Reviving the same letters again
  finds the task in the archive.
* *Nothing is sent to die again*: what would not be let in today is refused with its reason. (What only the sink can know, it says as always.)
* *A seal is not disturbed*: points wait until their window is closed, or a newer look has landed on it. What the ledger proves of
  a window is about one look; a point that comes back to just that look would make it one too many.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from ingest import letters, wire
from ingest.batch import without_series
from ingest.clock import Clock, utc
from ingest.collect import Collector, Topics
from ingest.errors import Rejected, Transient
from ingest.letters import Look, LostPoints, Point
from ingest.log import Outgoing, Sender
from ingest.model import (
    Batch,
    BatchId,
    DeadLetter,
    LookStatus,
    Outcome,
    Series,
    SeriesKey,
    SourceName,
    Target,
    Task,
    TaskItem,
    TaskKind,
    series_ids,
    task_id_of,
)
from ingest.ports import Archive
from ingest.sinks.connection import bounded, open_connection, translated
from ingest.validate import Reason, series_problem, task_problem, validate
from ingest.wire import raw_key
from shard_config.model import Limits, Postgres

SHARD = "dead-letters"
"""Stands for a shard in the receipts of revived points."""

DAY_S = 86_400
DEADLINE_S = 120.0
STATEMENT_TIMEOUT_S = 60.0

_OPEN = """SELECT w.target, w.service, extract(epoch FROM w.window_start)::bigint AS start_s
FROM windows AS w JOIN unnest($1::text[], $2::text[], $3::timestamptz[], $4::bigint[]) AS a (target, service, start, version)
    ON (w.target, w.service, w.window_start) = (a.target, a.service, a.start)
WHERE w.sealed_at IS NULL AND w.declared IS NULL AND coalesce(w.landed_version, 0) <= a.version"""


@dataclass(frozen=True, slots=True, eq=False)
class Revival:
    """One thing to publish: a record's `value`, or else a `batch` of points with the task that it is the answer of."""

    identities: tuple[str, ...]
    batch: Batch
    value: bytes = b""
    task: Task | None = None

    @property
    def windows(self) -> frozenset[int]:
        """Starts of the windows with points."""
        grid_s = self.batch.grid_s
        return frozenset((np.unique(self.batch.timestamps_s // grid_s) * grid_s).tolist())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a replay of letters would do. `refused`: identity → why."""

    revivals: tuple[Revival, ...]
    refused: Mapping[str, str]

    @property
    def points(self) -> int:
        return sum(r.batch.points for r in self.revivals)


# --- deciding ---------------------------------------------------------------------------------------------------


def plan(
    found: Iterable[DeadLetter], limits: Limits, now_s: int, edit: Mapping[str, Any] | None = None
) -> Plan:
    """What can be revived today, and why the others cannot. An `edit` (see `letters.edited`) is for exactly one letter of points."""
    revivals: list[Revival] = []
    refused: dict[str, str] = {}
    points: dict[tuple[Look, int], list[tuple[str, LostPoints]]] = defaultdict(list)
    for letter in found:
        try:
            if letters.holds_record(letter):
                revivals.append(_record(letter, limits, now_s, edit))
            else:
                lost = _let_in(letter, limits, now_s, edit)
                # A day at a time, so that a task's windows stay few.
                days = {timestamp_s // DAY_S for timestamp_s, _ in lost.points}
                for day in sorted(days):
                    own = tuple(p for p in lost.points if p[0] // DAY_S == day)
                    points[lost.look, day].append((letter.identity, replace(lost, points=own)))
        except Rejected as error:
            refused[letter.identity] = error.what
    for (look, _), some in points.items():
        try:
            revivals.append(_task(look, some, limits))
        except Rejected as error:
            refused |= dict.fromkeys((identity for identity, _ in some), error.what)
    return Plan(tuple(r for r in revivals if not refused.keys() & set(r.identities)), refused)


def _record(letter: DeadLetter, limits: Limits, now_s: int, edit: Mapping[str, Any] | None) -> Revival:
    where = f"letter {letter.identity}"
    if edit is not None:
        raise Rejected(where, Reason.BAD_DATUM, "holds a whole record: only points can be edited")
    if wire.batch_id_of(letter.payload) != letter.batch_id:
        what = f"its bytes were cut off; the whole record is, or was, at {letter.origin}"
        raise Rejected(where, Reason.PAYLOAD_TOO_LARGE, what)
    decoded = wire.decode_by_series(letter.payload, limits)
    good = without_series(decoded.batch, decoded.bad)
    accepted = validate(good, now_s, limits).accepted
    if accepted is None and decoded.batch.points:
        raise Rejected(where, Reason.BAD_DATUM, "decodes now, but no point of it is good")
    return Revival((letter.identity,), decoded.batch if accepted is None else accepted, letter.payload)


def _let_in(letter: DeadLetter, limits: Limits, now_s: int, edit: Mapping[str, Any] | None) -> LostPoints:
    """The letter's points, corrected, all of them good. Raises Rejected where one is not."""
    where = f"letter {letter.identity}"
    lost = letters.points_of(letter)
    if edit is not None:
        lost = letters.edited(lost, edit)
    if problem := series_problem(lost.series, limits):
        raise Rejected(where, problem, "its labels are not let in: edit labels, or change limits")
    if dead := validate(_batch(lost.look, "", [(lost.series, lost.points)]), now_s, limits).dead:
        raise Rejected(where, dead[0].reason, "is not let in: edit value or timestamp_s, or change limits")
    return lost


def _batch(look: Look, task_id: str, some: Iterable[tuple[Series, Collection[Point]]]) -> Batch:
    """The same for the same points, in whatever order they come."""
    units: dict[SeriesKey, str] = {}
    points: dict[SeriesKey, set[Point]] = defaultdict(set)
    for one, own in some:
        units[one.key] = max(one.unit, units.get(one.key, ""))
        points[one.key] |= set(own)
    keys = sorted(points)
    series = tuple(Series(key, units[key]) for key in keys)
    columns = [sorted(points[key]) for key in keys]
    try:
        timestamps_s = np.array([t for column in columns for t, _ in column], np.int64)
    except OverflowError as error:
        raise Rejected("points", Reason.OUT_OF_RANGE, str(error)) from error
    return Batch(
        task_id=task_id,
        target=look.target,
        service=look.service,
        observed_at_ms=look.observed_at_ms,
        revision=look.revision,
        grid_s=look.grid_s,
        series=series,
        counts=np.array([len(column) for column in columns], np.int32),
        timestamps_s=timestamps_s,
        values=np.array([v for column in columns for _, v in column], np.float64),
        ids=series_ids(series),
    )


def _task(look: Look, some: Sequence[tuple[str, LostPoints]], limits: Limits) -> Revival:
    """The points of one look and day as a task. Raises Rejected where it could not be archived, or would not be read."""
    batch = _batch(look, "", [(lost.series, lost.points) for _, lost in some])
    payloads = wire.encode_batch(batch, limits)
    start_s = int(batch.timestamps_s.min()) // look.grid_s * look.grid_s
    end_s = (int(batch.timestamps_s.max()) // look.grid_s + 1) * look.grid_s
    items = (TaskItem(look.service, start_s, end_s, look.grid_s),)
    # What is revived is what is asked for: other letters, or another correction, are another task.
    content = blake2b(b"".join(p.batch_id for p in payloads), digest_size=8).hexdigest()
    asked = f"{SHARD} {content}"
    task = Task(
        task_id=task_id_of(look.target, asked, 0, items),
        target=look.target,
        config_revision=asked,
        tick_s=end_s,
        attempt=0,
        kind=TaskKind.BACKLOG,
        expires_s=0,
        items=items,
    )
    if problem := task_problem(task):
        raise Rejected(f"task of {look.target}", problem, "no such target could be archived")
    identities = tuple(sorted({identity for identity, _ in some}))
    return Revival(identities, replace(batch, task_id=task.task_id), task=task)


async def without_open_windows(found: Plan, postgres: Postgres) -> Plan:
    """The plan without points of windows that are neither closed nor looked at anew. Raises Transient."""
    waiting = [(r, start_s) for r in found.revivals if r.task for start_s in sorted(r.windows)]
    connection = await open_connection(postgres, "headgate dead")
    try:
        with translated("ledger"):
            work = connection.fetch(
                _OPEN,
                [str(r.batch.target) for r, _ in waiting],
                [r.batch.service for r, _ in waiting],
                [utc(start_s) for _, start_s in waiting],
                [r.batch.version for r, _ in waiting],
            )
            rows = await bounded(connection, work, STATEMENT_TIMEOUT_S)
    finally:
        connection.terminate()
    is_open = {(row["target"], row["service"], row["start_s"]) for row in rows}
    why = "its window is still open: replay it when a newer look has landed, or the window is sealed or declared"
    refused = {
        identity: why
        for r, start_s in waiting
        if (str(r.batch.target), r.batch.service, start_s) in is_open
        for identity in r.identities
    }
    left = tuple(r for r in found.revivals if not refused.keys() & set(r.identities))
    return Plan(left, {**found.refused, **refused})


# --- doing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Revived:
    """What is published: these letters' points, in these batches."""

    identities: tuple[str, ...]
    batches: tuple[BatchId, ...]
    note: str


class Reviver:
    """Publishes what a plan says."""

    def __init__(
        self, sender: Sender, archive: Archive, topics: Topics, clock: Clock, *, archive_prefix: str = ""
    ) -> None:
        self._sender = sender
        self._topics = topics
        self._source = _Letters()
        sources = {source.value: self._source for source in SourceName}
        self._collector = Collector(
            SHARD,
            sources,
            archive,
            sender,
            topics,
            clock,
            archive_prefix=archive_prefix,
            deadline_s=DEADLINE_S,
        )

    async def revive(self, revivals: Sequence[Revival]) -> AsyncIterator[Revived]:
        """Publish, one after the other; each is out when it is yielded. Raises Transient: do the same again."""
        for revival in revivals:
            if revival.task is None:
                key = raw_key(revival.batch.target)
                await self._sender.send(self._topics.raw, [Outgoing(key, revival.value)])
                yield Revived(revival.identities, (wire.batch_id_of(revival.value),), "record")
                continue
            self._source.batch = revival.batch
            receipt = await self._collector.collect(revival.task, maybe_second_try=True)
            [done] = receipt.items
            if done.outcome.status is not LookStatus.PARTIAL:
                raise Transient(f"task {receipt.task_id}", done.outcome.detail, "do the same again")
            yield Revived(revival.identities, done.batches, f"task {receipt.task_id}")


class _Letters:
    """`ports.Source` of the points that are being revived."""

    batch: Batch

    async def look(
        self, task_id: str, target: Target, item: TaskItem, deadline_s: float
    ) -> AsyncIterator[Batch | Outcome]:
        yield self.batch
        # Partial, for it closes no window: it is a part of what a look said.
        detail = f"{self.batch.points} points out of dead letters"
        yield Outcome(LookStatus.PARTIAL, detail, self.batch.observed_at_ms, len(self.batch.series), {}, 0)

    async def close(self) -> None: ...
