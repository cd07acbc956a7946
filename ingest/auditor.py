"""The audit itself: archive = ledger = store, day by day and place by place, from one snapshot of PostgreSQL a day.

* The snapshot is taken before the archive is listed, and S3 is written before anything else: what the snapshot has is in the listing. A look that
  ended less than `GRACE_S` ago and whose batches are not in the snapshot is under way, and no difference.
* Every target of the configuration, of the ledger and of the archive is audited, and every place of the store.
* Memory is bounded by one place and day, and by `audit.POINTS_MAX`: a slice with more is cut in two and read again.
* The dead-letter topic is read only where something is missing.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import asyncpg
import numpy as np
import structlog

from ingest.archive import S3Archive
from ingest.audit import (
    BUCKET_S,
    Comparison,
    Difference,
    Digests,
    Kind,
    Report,
    look_problem,
    seal_problem,
)
from ingest.batch import decode_by_series
from ingest.clock import Clock
from ingest.errors import Rejected
from ingest.evidence import (
    LedgerLook,
    Place,
    StoreRows,
    forgotten_days,
    landed_ids,
    ledger_keys,
    ledger_looks,
    ledger_seals,
    store_places,
    store_rows,
    store_series,
)
from ingest.expected import POINTS_MAX, Expected, Known, Letters, LookRead, Slice, TooMuchError, counted
from ingest.model import (
    DeadLetter,
    LookStatus,
    Receipt,
    ReceiptItem,
    Target,
    merge_counts,
    version_of,
)
from ingest.ports import ArchivedTask, Record
from ingest.scan import dead_letters, times_of
from ingest.schedule import Grid, grids_of
from ingest.sinks.connection import translated
from ingest.validate import Reason, describe
from shard_config.model import Config

log = structlog.get_logger()

GRACE_S = 300
"""So long a look may be on its way from the archive to the ledger and the store."""
GETS_AT_ONCE = 4
DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Scope:
    """What is audited: [from_s, to_s), and labels that must be equal (None: any)."""

    from_s: int
    to_s: int
    account: str | None = None
    region: str | None = None
    service: str | None = None

    def includes(self, place: Place) -> bool:
        return self.account in (None, place[0]) and self.region in (None, place[1])


def days(from_s: int, to_s: int) -> list[tuple[int, int]]:
    """[from_s, to_s) cut at UTC midnights."""
    cuts = [from_s, *range((from_s // DAY_S + 1) * DAY_S, to_s, DAY_S), to_s]
    return list(pairwise(cuts))


def reach_s(grids: Iterable[Grid]) -> int:
    """How long after a point's time the tick of a task that asked for it may be."""
    longest = [max(g.block_s, g.poll_interval_s + g.lookback_s) + g.poll_interval_s for g in grids]
    return max(longest, default=DAY_S) + max((g.poll_interval_s for g in grids), default=0)


class Auditor:
    """One audit. `connection` is one of `open_connection`, in no transaction."""

    def __init__(
        self, connection: asyncpg.Connection, archive: S3Archive, config: Config, clock: Clock, scope: Scope
    ) -> None:
        self.connection = connection
        self.archive = archive
        self.config = config
        self.clock = clock
        self.scope = scope
        self.grids = grids_of(config)
        self._letters_read: Letters | None = None
        self.checked: set[str] = set()
        self.report = Report(scope.from_s, scope.to_s)

    async def run(self) -> Report:
        """Compare everything. Raises Transient, and Fatal where the schema is missing."""
        archived = await self.archive.targets()
        for start_s, end_s in days(self.scope.from_s, self.scope.to_s):
            with translated("audit"):
                async with self.connection.transaction(isolation="repeatable_read", readonly=True):
                    await self._day(archived, start_s, end_s)
            log.info("day_audited", start_s=start_s, differences=self.report.counts.total())
        return self.report

    async def _day(self, archived: Sequence[Target], start_s: int, end_s: int) -> None:
        told = await ledger_keys(self.connection, start_s, end_s)
        targets: dict[Place, list[Target]] = {p: [] for p in await store_places(self.connection)}
        for target in sorted({*archived, *told, *self.grids}):
            targets.setdefault((target.account, target.region), []).append(target)
        places = sorted(p for p in targets if self.scope.includes(p))
        stored = Digests(len(places), start_s, end_s)
        await self._read_store(stored, places, start_s, end_s)
        self.report.places = max(self.report.places, len(places))
        for number, place in enumerate(places):
            one = _PlaceDay(self, place, targets[place], stored, number, start_s, end_s)
            await one.audit(told)

    async def _read_store(self, stored: Digests, places: Sequence[Place], start_s: int, end_s: int) -> None:
        whole = self.scope.account is None and self.scope.region is None and self.scope.service is None

        def take(rows: StoreRows) -> None:
            nameless = rows.places < 0
            for i in np.flatnonzero(nameless).tolist():
                what = f"series {rows.ids[i, 0]:016x}{rows.ids[i, 1]:016x}"
                at_s = int(rows.timestamps_s[i])
                self.report.add(
                    Difference(Kind.EXTRA, "", "", what, at_s, "the store does not know the series")
                )
            keep = ~nameless
            stored.add(
                rows.places[keep],
                rows.ids[keep],
                rows.timestamps_s[keep],
                rows.values[keep],
                rows.versions[keep],
                rows.versions[keep],
            )

        await store_rows(self.connection, places, start_s, end_s, take, others=whole)

    async def letters(self) -> Letters:
        """What the dead-letter topic says, read once."""
        if self._letters_read is None:
            points: dict[tuple[bytes, str], set[int]] = defaultdict(set)
            more_at_s: dict[bytes, int] = {}

            def take(record: Record, letter: DeadLetter) -> None:
                if letter.reason == Reason.MORE:
                    at_s = record.timestamp_ms // 1000 + self.config.run.clock_offset_s
                    more_at_s.setdefault(letter.batch_id, at_s)
                points[(letter.batch_id, letter.series)] |= times_of(letter)

            await dead_letters(self.config.kafka, take)
            self._letters_read = Letters({k: frozenset(v) for k, v in points.items()}, more_at_s)
        return self._letters_read


class _PlaceDay:
    """One place on one day."""

    def __init__(
        self,
        auditor: Auditor,
        place: Place,
        targets: Sequence[Target],
        stored: Digests,
        number: int,
        start_s: int,
        end_s: int,
    ) -> None:
        self._a = auditor
        self._report = auditor.report
        self._place = place
        self._targets = targets
        self._stored = stored
        self._number = number
        self._start_s = start_s
        self._end_s = end_s
        self._keys: dict[str, Target] = {}
        self._looks: Mapping[str, list[LedgerLook]] = {}
        self._forgotten: set[tuple[str, str, int]] = set()

    async def audit(self, told: Mapping[Target, set[str]]) -> None:
        await self._find_keys(told)
        slices = [(self._start_s, self._end_s)]
        while slices:
            start_s, end_s = slices.pop()
            try:
                await self._audit_slice(start_s, end_s)
            except TooMuchError:
                half_s = (end_s - start_s) // 2 // BUCKET_S * BUCKET_S
                if not half_s:
                    raise
                slices += [(start_s + half_s, end_s), (start_s, start_s + half_s)]

    async def _find_keys(self, told: Mapping[Target, set[str]]) -> None:
        for target in self._targets:
            reach = reach_s(self._a.grids.get(target) or [g for some in self._a.grids.values() for g in some])
            until_s = min(self._end_s + reach, self._a.clock.now_s() + DAY_S)
            async for key in self._a.archive.keys(target, self._start_s, until_s):
                self._keys[key] = target
            self._keys |= dict.fromkeys(told.get(target, ()), target)
        self._looks = await ledger_looks(self._a.connection, {key[-32:] for key in self._keys})
        self._forgotten = await forgotten_days(self._a.connection, self._targets)
        for key, rows in self._looks.items():
            if key in self._keys and not any(
                r.start_s < self._end_s and r.end_s > self._start_s for r in rows
            ):
                del self._keys[key]  # of another day

    async def _audit_slice(self, start_s: int, end_s: int) -> None:
        found = await self._read(start_s, end_s, Letters())
        differing = self._differing(found, start_s, end_s)
        seals = await self._seals(found, start_s, end_s)
        if differing or seals:
            letters = await self._a.letters()
            concerned = {batch for batch, _ in letters.points} | letters.more_at_s.keys()
            if concerned & found.batches:
                found = await self._read(start_s, end_s, letters)
                differing = self._differing(found, start_s, end_s)
                seals = await self._seals(found, start_s, end_s)
        self._report.points += len(found.maximum.keys)
        self._report.dead_points += found.dead_points
        for one in seals:
            self._report.add(one)
        for stretch in differing:
            await self._name(found, *stretch)

    def _differing(self, found: Slice, start_s: int, end_s: int) -> list[tuple[int, int]]:
        own = Digests(1, start_s, end_s)
        m = found.maximum
        if len(m.keys):
            seconds = m.keys % found.expected.span_s + start_s
            own.add(0, found.expected.ids(m.keys), seconds, m.values, m.oldest, m.versions)
        self._report.digests += int(np.count_nonzero(own.rows))
        stretches = self._stored.differing(self._number, own)
        return [(a, min(b, end_s)) for a, b in stretches]

    async def _seals(self, found: Slice, start_s: int, end_s: int) -> list[Difference]:
        seals = await ledger_seals(self._a.connection, self._targets, start_s, end_s)
        self._report.seals += sum(seal.windows for seal in seals)
        return [
            Difference(Kind.SEAL, seal.target, seal.service, seal.name, None, problem)
            for seal in seals
            if self._a.scope.service in (None, seal.service)
            and (problem := seal_problem(seal, found.newest[(seal.target, seal.service)])) is not None
        ]

    # --- reading the archive --------------------------------------------------------------------------------------

    async def _read(self, start_s: int, end_s: int, letters: Letters) -> Slice:
        found = Slice(Expected(start_s, end_s, POINTS_MAX), letters)
        async for key, task in self._archived():
            if task is None:
                self._not_archived(key)
            else:
                await self._take_in(found, key, task)
            self._a.checked.add(key)
        found.maximum = found.expected.maximum()
        return found

    async def _take_in(self, found: Slice, key: str, task: ArchivedTask) -> None:
        under_way = await self._under_way(task)
        payloads = iter(task.payloads)
        for done in task.receipt.items:
            look = LookRead()
            for number, payload in enumerate(islice(payloads, len(done.batches) + len(done.held))):
                held = number >= len(done.batches)
                try:
                    decoded = decode_by_series(payload.value, self._a.config.limits)
                except Rejected:
                    self._report.dead_batches += key not in self._a.checked
                    continue
                counts = counted(decoded.batch)
                (look.held if held else look.published).extend(counts)
                # What a fresh look held may stand on another that is under way.
                if not under_way and not (held and self._fresh(task.receipt)):
                    look.versions.append(decoded.batch.version)
                    look.taken.extend(counts)
                    look.alive += found.add(decoded, payload.batch_id, self._a.config.limits, held=held)
            if key not in self._a.checked:
                self._check(key, task.receipt, done, look, under_way)
            if not under_way and done.outcome.status is LookStatus.COMPLETE:
                version = version_of(0, done.outcome.observed_at_ms)
                if look.versions and not done.whole:
                    version = min(look.versions)
                found.remember(
                    str(task.receipt.target),
                    done,
                    version,
                    merge_counts(look.taken),
                    merge_counts(look.alive),
                )

    async def _archived(self) -> AsyncIterator[tuple[str, ArchivedTask | None]]:
        keys = sorted(self._keys)
        for i in range(0, len(keys), GETS_AT_ONCE):
            some = keys[i : i + GETS_AT_ONCE]
            for key, task in zip(some, await asyncio.gather(*map(self._get, some)), strict=True):
                if not isinstance(task, Rejected):
                    yield key, task
                elif key not in self._a.checked:
                    self._a.checked.add(key)
                    self._say(Kind.SPOILT, str(self._keys[key]), "", key, str(task))

    async def _get(self, key: str) -> ArchivedTask | Rejected | None:
        try:
            return await self._a.archive.get(key)
        except Rejected as error:
            return error

    async def _under_way(self, task: ArchivedTask) -> bool:
        if not self._fresh(task.receipt):
            return False
        ids = {batch_id for done in task.receipt.items for batch_id in done.batches}
        return bool(ids - await landed_ids(self._a.connection, ids))

    def _fresh(self, receipt: Receipt) -> bool:
        return receipt.finished_at_ms > self._a.clock.now_ms() - GRACE_S * 1000

    # --- looks ----------------------------------------------------------------------------------------------------

    def _not_archived(self, key: str) -> None:
        if key in self._a.checked:
            return
        for row in self._looks.get(key, ()):
            detail = f"the ledger says {row.status}, {row.points:,} points"
            self._say(Kind.LOOK_NOT_IN_ARCHIVE, str(self._keys[key]), row.service, key, detail)

    def _check(self, key: str, receipt: Receipt, done: ReceiptItem, look: LookRead, under_way: bool) -> None:
        """Hold a look against its own points and against the ledger."""
        target, service = str(receipt.target), done.item.service
        self._report.looks += 1
        self._report.objects += done is receipt.items[0]
        self._report.under_way += under_way
        if not look.is_what(done):
            self._say(Kind.LOOK_DIFFERS, target, service, key, "its points are not those that it counts")
        rows = [row for row in self._looks.get(key, ()) if row.service == service]
        problem = look_problem(done, receipt.finished_at_ms, rows)
        if problem is None:
            return
        kind, detail = problem
        day = receipt.finished_at_ms // 1000 // DAY_S
        if kind is Kind.LOOK_NOT_IN_LEDGER and (
            self._fresh(receipt) or (target, service, day) in self._forgotten
        ):
            return
        self._say(kind, target, service, key, detail)

    def _say(self, kind: Kind, target: str, service: str, what: str, detail: str) -> None:
        if self._a.scope.service in (None, service) or not service:
            self._report.add(Difference(kind, target, service, what, None, detail))

    # --- naming points ----------------------------------------------------------------------------------------------

    async def _name(self, found: Slice, start_s: int, end_s: int) -> None:
        """Compare the points of a stretch whose digests differ."""
        for a, b in self._stored.pieces(self._number, start_s, end_s, POINTS_MAX // 4):
            comparison = Comparison(self._report, found.expected, found.maximum, a, b, self._a.scope.service)
            chunks: list[StoreRows] = []
            await store_rows(self._a.connection, [self._place], a, b, chunks.append)
            for rows in chunks:
                await self._learn(found.expected, rows)
                comparison.take(rows)
            comparison.finish()

    async def _learn(self, expected: Expected, rows: StoreRows) -> None:
        """Name the series that only the store knows."""
        raws = {one.tobytes() for one in np.unique(rows.ids, axis=0).astype(">u8")}
        unknown = [raw for raw in raws if expected.index_of(raw) is None]
        for raw, series in (await store_series(self._a.connection, unknown)).items():
            target, service = self._asks_for(series.key.namespace)
            expected.learn(raw, Known(describe(series), target, service))

    def _asks_for(self, namespace: str) -> tuple[str, str]:
        """The target and service of this place that ask for a namespace; empty where none does."""
        profiles = self._a.config.service_by_name
        for target in self._targets:
            for grid in self._a.grids.get(target, ()):
                profile = profiles.get(grid.service) if grid.has_past else None
                if namespace == (profile.namespace if profile else grid.service):
                    return str(target), grid.service
        return "", ""
