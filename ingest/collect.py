"""One task, from the question to the receipt: look → archive → publish → receipt.

Guarantees:

* *Announced exists*: S3, then Kafka `raw`, then the receipt; whoever commits the task's offset does so after `publish` returned.
* *Not paid twice*: a task that may be a second try asks the archive first, and what is archived is published from there. Publishing
  that fails is tried again with the answer in hand. (An archive that cannot be read costs a second look, not data.)
* *What runs that were cut off may have paid is in doubt*: one that may be a second try leaves a mark in the archive before it asks, which says how many
  may have begun before it, and its receipt counts what it asks that many times more. (Where the archive does not take the mark, once.)
* *Only what is new or changed is published*, where the collector is given a memory of what it published last (`ingest.changed`); what that
  leaves out of windows that the look may seal is archived all the same. A replay publishes that, too.
* Where two runs of one task race, put-if-absent picks one, and both publish that one. What the other paid for is in a receipt too.
* *Every task ends with a receipt*, failures included; a look that failed is in it as failed, never as empty. That holds for a
  source that raises or hangs as well, whose cost is in the receipt where the source can tell (`ingest.ports.Informed`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field, replace

import structlog

from ingest import wire
from ingest.archive import archive_key
from ingest.changed import Changed, Look, Split
from ingest.clock import Clock
from ingest.errors import Fatal, Rejected, Transient
from ingest.log import Outgoing, Sender
from ingest.model import (
    Batch,
    BatchId,
    LookStatus,
    Outcome,
    Receipt,
    ReceiptItem,
    Task,
    TaskItem,
    TaskKind,
    WindowCount,
    merge_counts,
    window_counts,
)
from ingest.ports import Archive, ArchivedTask, Informed, Payload, Source
from ingest.spool import Spool
from ingest.validate import printable

_log = structlog.get_logger()

DETAIL_CHARACTERS_MAX = 4_000
OVERTIME_S = 10.0
"""Past its deadline a source has this long to say so itself."""
PUBLISHED_AT_ONCE = 100
"""Batches in memory while a task is published; of a heavy one the others are not."""


@dataclass(frozen=True, slots=True)
class Topics:
    raw: str
    ledger: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What is to be published of a task.

    `own` is the receipt of what this run asked and paid for: None where all came from the archive. Where another run's answer is
    archived, it is that answer's receipt with this run's times and cost, and no points: the other's receipt counts them.
    """

    archived: ArchivedTask
    own: Receipt | None
    held_too: bool = False
    """Whether what was held back is published with the rest."""
    looks: tuple[Look, ...] = field(default=(), compare=False)
    """What is to be remembered once it is published."""
    ours: bool = False
    """Whether what is archived is what this run was answered."""
    refused: bool = field(default=False, compare=False)
    """Whether the archive did not take what this run was answered."""

    @property
    def published(self) -> list[Payload]:
        held: set[BatchId] = set()
        if not self.held_too:
            held = {batch_id for done in self.archived.receipt.items for batch_id in done.held}
        return [p for p in self.archived.payloads if p.batch_id not in held]


class Collector:
    """Executes tasks of one shard."""

    def __init__(
        self,
        shard: str,
        sources: Mapping[str, Source],
        archive: Archive,
        sender: Sender,
        topics: Topics,
        clock: Clock,
        *,
        archive_prefix: str = "",
        deadline_s: float = 120.0,
        changed: Changed | None = None,
    ) -> None:
        """Without `changed` everything is published."""
        self._shard = shard
        self._sources = sources
        self._archive = archive
        self._sender = sender
        self._topics = topics
        self._clock = clock
        self._prefix = archive_prefix
        self.changed = changed or Changed({})
        self.deadline_s = deadline_s

    async def collect(self, task: Task, *, maybe_second_try: bool) -> Receipt:
        """Execute one task and return its receipt, which is on the ledger topic by then. Raises Transient where it is not."""
        answer = await self.answer(task, maybe_second_try=maybe_second_try)
        await self.publish(answer)
        return answer.archived.receipt

    async def answer(self, task: Task, *, maybe_second_try: bool) -> Answer:
        """Look and archive, or take from the archive what is there already. Raises Fatal only.

        A task that is announced again is a second try whatever the caller knows, and one that is to be replayed is never asked.
        """
        maybe_second_try |= task.kind in (TaskKind.AGAIN, TaskKind.REPLAY)
        try:
            kept_under = archive_key(task, self._prefix)
        except Rejected as error:
            failed = tuple(_failed(i, LookStatus.FAILED, f"not asked: {error}") for i in task.items)
            receipt = self._receipt(task, "", self._clock.now_ms(), failed)
            return Answer(ArchivedTask(receipt, ()), receipt)
        done = await self._archived(kept_under) if maybe_second_try else None
        if done is None and task.kind == TaskKind.REPLAY:
            why = "not replayed: the archive does not give it"
            failed = tuple(_failed(i, LookStatus.FAILED, why) for i in task.items)
            receipt = self._receipt(task, "", self._clock.now_ms(), failed)
            return Answer(ArchivedTask(receipt, ()), receipt)
        if done is None:
            before = await self._begun_before(task, kept_under) if maybe_second_try else 0
            return await self._look_and_archive(task, kept_under, before)
        _log.info("task_published_from_archive", task=task.task_id, target=str(task.target))
        return Answer(done, None, held_too=task.kind == TaskKind.REPLAY)

    async def publish(self, answer: Answer) -> None:
        """Batches, then receipts. Raises Transient: publish the same again."""
        done = answer.archived
        target = done.receipt.target
        key = wire.raw_key(target)
        published = answer.published
        for start in range(0, len(published), PUBLISHED_AT_ONCE):
            some = published[start : start + PUBLISHED_AT_ONCE]
            await self._sender.send(self._topics.raw, [Outgoing(key, p.value) for p in some])
        receipts = [done.receipt]
        if answer.own not in (None, done.receipt):
            receipts.append(answer.own)
        await self._sender.send(
            self._topics.ledger, [Outgoing(str(target).encode(), wire.encode_receipt(r)) for r in receipts]
        )
        self.changed.keep(answer.looks)
        source = self._sources.get(target.source)
        if answer.ours and isinstance(source, Informed):
            for item in done.receipt.items:
                await source.published(done.receipt.task_id, item.item.service)

    async def _archived(self, key: str) -> ArchivedTask | None:
        try:
            return await self._archive.get(key)
        except (Transient, Rejected) as error:
            # Asking the source again costs money, not data; put-if-absent still decides who is published.
            _log.warning("archive_not_readable", key=key, error=str(error))
            return None

    async def _begun_before(self, task: Task, key: str) -> int:
        """How many runs of a task may have begun before this one, at least one. Not asked where nobody bills the source."""
        if not isinstance(self._sources.get(task.target.source), Informed):
            return 1
        try:
            return await self._archive.mark_begun(key)
        except (Transient, Rejected) as error:
            # The windows would wait for the sake of an estimate: what is asked now is counted as in doubt once.
            _log.warning("run_not_marked", task=task.task_id, target=str(task.target), error=str(error))
            return 1

    async def _look_and_archive(self, task: Task, key: str, before: int) -> Answer:
        started_at_ms = self._clock.now_ms()
        deadline_s = self._clock.monotonic_s() + self.deadline_s
        items: list[ReceiptItem] = []
        payloads: list[Payload] = []
        looks: list[Look] = []
        spool = Spool()
        for item in task.items:
            found = _Found(self.changed.look(task, item), spool)
            items.append(await self._look(task, item, deadline_s, found))
            payloads += found.payloads
            if found.look is not None and found.over:
                looks.append(found.look)
        receipt = self._receipt(task, key, started_at_ms, begun_before(items, before))
        try:
            archived = await self._archive.put(ArchivedTask(receipt, tuple(payloads)))
        except (Transient, Rejected) as error:
            _log.error("task_not_archived", task=task.task_id, target=str(task.target), error=str(error))
            receipt = _not_archived(receipt, str(error))
            return Answer(ArchivedTask(receipt, ()), receipt, refused=True)
        if archived.receipt == receipt:
            return Answer(archived, receipt, looks=tuple(looks), ours=True)
        return Answer(archived, _lost(receipt, archived.receipt))

    def _receipt(self, task: Task, key: str, started_at_ms: int, items: tuple[ReceiptItem, ...]) -> Receipt:
        return Receipt(
            task_id=task.task_id,
            target=task.target,
            shard=self._shard,
            tick_s=task.tick_s,
            started_at_ms=started_at_ms,
            finished_at_ms=self._clock.now_ms(),
            archive_key=key,
            items=items,
        )

    async def _look(self, task: Task, item: TaskItem, deadline_s: float, found: _Found) -> ReceiptItem:
        if task.expires_s and self._clock.now_s() >= task.expires_s:
            return _failed(item, LookStatus.EXPIRED, "taken up after its window; such a source has no past")
        source = self._sources.get(task.target.source)
        if source is None:
            return _failed(item, LookStatus.FAILED, f"no source {task.target.source!r} in this shard")
        try:
            outcome = await self._ask(source, task, item, deadline_s, found)
        except Fatal:
            raise
        except Exception as error:
            # Sources promise not to raise. One that does, or hangs, must not stop the other targets of its shard.
            _log.exception("source_raised", target=str(task.target), service=item.service)
            outcome = None
            why = f"the source raised {type(error).__name__}: {error}"
        else:
            why = "the source ended without an outcome"
        if outcome is not None:
            return found.done(item, outcome)
        return found.nothing(
            item, why, source.broke(task.task_id, item.service) if isinstance(source, Informed) else None
        )

    async def _ask(
        self, source: Source, task: Task, item: TaskItem, deadline_s: float, found: _Found
    ) -> Outcome | None:
        outcome: Outcome | None = None
        answers = source.look(task.task_id, task.target, item, deadline_s)
        try:
            async with asyncio.timeout(max(0.0, deadline_s - self._clock.monotonic_s()) + OVERTIME_S):
                async for answer in answers:
                    if isinstance(answer, Outcome):
                        outcome = replace(answer, detail=_fit(answer.detail))
                    else:
                        # Sources know nothing of corrections: whose look it is decides which one wins.
                        found.add(replace(answer, revision=task.revision) if task.revision else answer)
        finally:
            if isinstance(answers, AsyncGenerator):
                await answers.aclose()
        if outcome is not None and outcome.status is LookStatus.COMPLETE and not outcome.observed_at_ms:
            # Nothing to ask about, so no answer carries a date: our own clock says when we knew that.
            outcome = replace(outcome, observed_at_ms=self._clock.now_ms())
        return outcome


class _Found:
    """What a look has brought so far. Without `look` everything is published."""

    def __init__(self, look: Look | None, spool: Spool) -> None:
        self.look = look
        self._spool = spool
        self.over = False
        """Whether it ended as looks do, so that it may be remembered."""
        self._published: list[Payload] = []
        self._held: list[Payload] = []
        self._windows: list[WindowCount] = []
        self._whole: list[WindowCount] = []
        self._points = 0
        self._left_out = 0

    @property
    def payloads(self) -> list[Payload]:
        """In the order of the receipt."""
        return [*self._published, *self._held]

    def add(self, batch: Batch) -> None:
        if self.look is None:
            counts = window_counts(batch.point_ids(), batch.timestamps_s, batch.values, batch.grid_s)
            split = Split(batch, None, counts, counts, 0)
        else:
            split = self.look.split(batch)
        if split.published is not None:
            self._published += map(self._spool.keep, wire.encode_batch(split.published))
            self._points += split.published.points
        if split.held is not None:
            self._held += map(self._spool.keep, wire.encode_batch(split.held))
        self._windows += split.windows
        self._whole += split.whole
        self._left_out += split.left_out

    def done(self, item: TaskItem, outcome: Outcome) -> ReceiptItem:
        """The look is over. Only one that is complete may seal: of others nothing is held."""
        if outcome.status is not LookStatus.COMPLETE:
            self._held = []
        if self.look is not None:
            self.look.finish(outcome, item.grid_s)
        self.over = True
        in_part = self._left_out and outcome.status is LookStatus.COMPLETE
        return ReceiptItem(
            replace(item, start_s=outcome.looked_from_s) if outcome.looked_from_s else item,
            outcome,
            self._points,
            merge_counts(self._windows),
            tuple(p.batch_id for p in self._published),
            merge_counts(self._whole) if in_part else (),
            tuple(p.batch_id for p in self._held),
        )

    def nothing(self, item: TaskItem, why: str, cost: Outcome | None) -> ReceiptItem:
        """There was no end to it: what came is not published, what it has cost by then is in the receipt."""
        self._published, self._held = [], []
        failed = _failed(item, LookStatus.FAILED, why)
        return failed if cost is None else replace(failed, outcome=replace(cost, detail=_fit(why)))


def begun_before(items: Iterable[ReceiptItem], runs: int) -> tuple[ReceiptItem, ...]:
    """Where other runs may have begun the same task and not finished it: what is asked now may have been paid that many times before."""
    return tuple(
        replace(i, outcome=replace(o, metrics_in_doubt=o.metrics_in_doubt + runs * _asked(o)))
        if "GetMetricData" in (o := i.outcome).requests
        else i
        for i in items
    )


def _asked(outcome: Outcome) -> int:
    """The most that one run bills that is answered at once."""
    return max(outcome.metrics_billed, outcome.series)


def _failed(item: TaskItem, status: LookStatus, detail: str) -> ReceiptItem:
    return ReceiptItem(item, Outcome(status, _fit(detail), 0, 0, {}, 0), 0, (), ())


def _fit(detail: str) -> str:
    """A source quotes what others said: without this a NUL of theirs would keep the receipt from being written, and the task from ever ending."""
    return printable(detail, DETAIL_CHARACTERS_MAX)


def _not_archived(receipt: Receipt, why: str) -> Receipt:
    """The receipt of a task whose answers could not be archived: nothing of it is published, what it cost stays."""
    items = tuple(
        ReceiptItem(
            i.item,
            replace(i.outcome, status=LookStatus.FAILED, detail=_fit(f"not archived: {why}")),
            0,
            (),
            (),
        )
        for i in receipt.items
    )
    return replace(receipt, archive_key="", items=items)


def _lost(own: Receipt, archived: Receipt) -> Receipt:
    """The receipt of a run that came second: another's answer, at its own cost."""
    cost = {i.item.service: i.outcome for i in own.items}
    items = tuple(
        replace(
            i,
            points=0,
            outcome=replace(
                i.outcome,
                requests=cost[i.item.service].requests,
                metrics_billed=cost[i.item.service].metrics_billed,
                metrics_in_doubt=cost[i.item.service].metrics_in_doubt,
            ),
        )
        for i in archived.items
    )
    return replace(
        archived,
        shard=own.shard,
        started_at_ms=own.started_at_ms,
        finished_at_ms=own.finished_at_ms,
        items=items,
    )
