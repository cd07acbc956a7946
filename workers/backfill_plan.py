"""One backfill: what it is asked, what it plans, and how its parts are put together. `workers.backfilling` has the parts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from hashlib import blake2b

import asyncpg

from ingest import pauses
from ingest.archive import S3Archive, open_archive
from ingest.archive_replay import LANES, ArchiveReplay
from ingest.backfill import DROPPED, Means, Stretch, Survey, reach_s, tasks_of, windows_by_service
from ingest.clock import Clock, utc
from ingest.errors import Transient
from ingest.landing import Landing
from ingest.log import Producer
from ingest.model import Receipt, Target, Task
from ingest.pauses import Pauses
from ingest.replay import KafkaReplay, Replay, Scope, kept_since_ms
from ingest.replay_cost import PAUSED, ReplayCost, replay_cost, without_paused
from ingest.schedule import grids_of
from ingest.sinks.connection import open_connection, server_of, translated
from ingest.sinks.migrate import migrate
from ingest.sinks.null import NullSink
from ingest.sinks.postgres import PostgresSink
from shard_config.model import Config, Postgres
from shard_config.price import Prices
from workers.audit import samples_kept_from_s
from workers.backfill_asking import ask, unanswered
from workers.backfilling import (
    Done,
    LedgerAnnouncer,
    ReplaySink,
    has_positions,
    is_emptied,
    read_ledger,
    read_manifests,
    replay,
)
from workers.pace import LiveLag, Pace

LIVE, NULL = "postgres", "null"

Tell = Callable[[str, float, Done], None]
"""Called with a source, the share of it that is done, and what has been done so far."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What the command line asks for. `part` is (which, of how many) processes that share the work."""

    scope: Scope
    via: str
    into: str
    rebuild: bool
    revision: int
    rate_points_per_s: int
    part: tuple[int, int]
    even_paused: bool = False
    """Ask CloudWatch for windows of paused accounts and services, too."""

    @property
    def backfill_id(self) -> str:
        """16 hexadecimal digits over what is asked for: not over how fast, nor by how many, nor whether pauses hold."""
        s = self.scope
        into = server_of(Postgres(dsn=self.into)) if "://" in self.into else self.into
        what = [s.from_s, s.to_s, sorted(s.accounts), sorted(s.regions), sorted(s.services)]
        what += [self.via, into, self.rebuild, self.revision]
        return blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()

    @property
    def everything(self) -> bool:
        """Whether all that was collected is landed again, whatever the ledger says has landed."""
        return self.rebuild or self.into != LIVE or self.via in (Means.KAFKA, Means.S3)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is going to be done. Where `whole` is set, it is all that one source has of the scope, and stretches are none."""

    stretches: tuple[Stretch, ...]
    whole: Means | None
    whole_points: int | None
    kept_since_ms: int
    receipts: tuple[Receipt, ...]
    notes: tuple[str, ...]
    tasks: tuple[Task, ...] = ()
    """For CloudWatch, without those that were answered when this backfill was run before."""
    replay: ReplayCost = field(default_factory=ReplayCost)
    """What reading Kafka and S3 costs."""

    def has(self, means: Means) -> bool:
        if means is Means.CLOUDWATCH:
            return bool(self.tasks)
        return self.whole is means or any(s.means is means for s in self.stretches)

    @property
    def empty(self) -> bool:
        return not any(self.has(m) for m in (Means.KAFKA, Means.S3, Means.CLOUDWATCH))

    @property
    def points(self) -> int | None:
        if self.whole is not None:
            return self.whole_points
        return total_points([s for s in self.stretches if s.means is not Means.THERE])

    @property
    def usd(self) -> Decimal | None:
        """The most that it may cost: CloudWatch, S3's requests and what Kafka sends."""
        asked = total_usd(self.stretches)
        return None if asked is None else asked + self.replay.usd


def total_points(stretches: Iterable[Stretch]) -> int | None:
    """Of all of them; None where one does not know."""
    some = [s.points for s in stretches]
    return None if None in some else sum(p for p in some if p is not None)


def total_usd(stretches: Iterable[Stretch]) -> Decimal | None:
    """Of all of them; None where one does not know."""
    some = [s.usd for s in stretches]
    return None if None in some else sum((u for u in some if u is not None), Decimal(0))


class Backfill:
    """One backfill: its connections, its plan, its doing."""

    def __init__(self, config: Config, asked: Ask, clock: Clock, archive: S3Archive) -> None:
        self._config = config
        self._asked = asked
        self._clock = clock
        self._archive = archive
        self._grids = grids_of(config)
        self._reach_s = reach_s(g for grids in self._grids.values() for g in grids)
        # What the live store has dropped would be dropped again; another one has its own retention.
        kept_from_s = samples_kept_from_s(config, clock.now_s()) if asked.into == LIVE else 0
        self._dropped_before_s = kept_from_s
        self._scope = replace(asked.scope, from_s=max(asked.scope.from_s, kept_from_s))
        """That can be landed: the question's, without what is dropped."""

    def _on_kafkas_clock_ms(self, time_s: int) -> int:
        """In a run over old data the workers' clock is moved; the brokers' is not."""
        return (time_s - self._config.run.clock_offset_s) * 1000

    async def plan(self) -> tuple[Plan, Ask]:
        """What is to be done, and the question itself, which an emptied store makes one for rebuilding. Raises Transient, Fatal."""
        asked, scope, config = self._asked, self._asked.scope, self._config
        kept_ms = (
            await kept_since_ms(config.kafka, config.kafka.topic("raw"), config.kafka.raw_partitions)
            if asked.via != Means.S3
            else 0
        )
        offset_ms = config.run.clock_offset_s * 1000
        in_kafka_since_ms = kept_ms + offset_ms if asked.via != Means.S3 else None
        survey = Survey(scope, in_kafka_since_ms, config.run.source_keeps_all, self._dropped_before_s)
        survey.expect(self._grids, self._clock.now_s())
        notes: list[str] = []
        paused = Pauses()
        try:
            connection = await open_connection(config.postgres, "headgate backfill plan")
            try:
                await read_ledger(connection, survey)
                if not asked.even_paused:
                    with translated("pauses"):
                        paused = Pauses.of(await pauses.read(connection))
                if await self._is_for_rebuilding(connection):
                    asked = self._asked = _rebuilding(asked)
                    notes.append(
                        "the store has no sample of this time, though the ledger says that some landed: all of it is written again"
                    )
            finally:
                connection.terminate()
        except Transient as error:
            if asked.into == LIVE:
                raise
            notes.append(f"the ledger does not answer, so points are not known: {error}")
        if asked.everything and self._scope.from_s < self._scope.to_s:
            return self._plan_of_everything(survey, kept_ms, notes), asked
        receipts: list[Receipt] = []
        if asked.via != Means.CLOUDWATCH:
            receipts = await read_manifests(self._archive, survey, self._reach_s)
        via = Means.CLOUDWATCH if asked.via == Means.CLOUDWATCH else None
        stretches = survey.plan(via, self._clock.now_s(), Prices.of(config.aws, config.services))
        stretches = without_paused(stretches, paused)
        tasks = tasks_of(stretches, self._grids, config.revision, asked.backfill_id, asked.revision)
        if tasks:
            again = await self._unanswered(tasks)
            if len(again) < len(tasks):
                notes.append(
                    f"{len(tasks) - len(again)} of {len(tasks)} tasks have their answer from before and are not asked again; "
                    "a higher --revision asks anew"
                )
            tasks = again
        left = sum(s.windows for s in stretches if s.detail == PAUSED)
        if left:
            notes.append(
                f"{left:,} windows of paused accounts and services are not asked from CloudWatch; --even-paused does"
            )
        cost = self._replay_cost(
            {s.target for s in stretches if s.means is Means.S3},
            total_points(s for s in stretches if s.means is Means.KAFKA),
            notes,
        )
        plan = Plan(stretches, None, None, kept_ms, tuple(receipts), tuple(notes), tuple(tasks), cost)
        return plan, asked

    def _replay_cost(
        self, from_s3: Collection[Target], kafka_points: int | None, notes: list[str]
    ) -> ReplayCost:
        scope = self._scope
        until_s = min(scope.to_s + self._reach_s, self._clock.now_s())
        grids = {target: self._grids[target] for target in from_s3}
        cost = replay_cost(grids, scope.from_s, until_s, kafka_points, self._config.prices)
        if str(cost):
            notes.append(f"reading what is kept takes {cost}")
        return cost

    async def _unanswered(self, tasks: Sequence[Task]) -> list[Task]:
        connection = await open_connection(self._config.postgres, "headgate backfill plan")
        try:
            return await unanswered(connection, tasks)
        finally:
            connection.terminate()

    async def _is_for_rebuilding(self, connection: asyncpg.Connection) -> bool:
        """Whether the store was emptied, or was when this backfill was begun."""
        asked = self._asked
        if asked.rebuild or asked.into != LIVE or asked.via == Means.CLOUDWATCH:
            return False
        begun = await has_positions(connection, reader_of(_rebuilding(asked)))
        return begun or await is_emptied(connection, self._scope.from_s, self._scope.to_s)

    def _plan_of_everything(self, survey: Survey, kept_ms: int, notes: list[str]) -> Plan:
        if self._scope != self._asked.scope:
            notes.append(f"what is before {time_of(self._scope.from_s)} is {DROPPED}")
        since_ms = self._on_kafkas_clock_ms(self._scope.from_s)
        in_kafka = kept_ms <= since_ms
        if self._asked.via == Means.KAFKA and not in_kafka:
            notes.append(
                f"raw holds what was published since {time_of(kept_ms // 1000)}; --via s3 has all of it"
            )
        whole = (
            Means.KAFKA
            if self._asked.via == Means.KAFKA or (self._asked.via == "auto" and in_kafka)
            else Means.S3
        )
        scope = self._scope
        cost = self._replay_cost(
            [t for t in self._grids if whole is Means.S3 and scope.has(t)],
            survey.collected if whole is Means.KAFKA else 0,
            notes,
        )
        return Plan((), whole, survey.collected, kept_ms, (), tuple(notes), replay=cost)

    async def execute(self, plan: Plan, tell: Tell) -> Done:
        """Do it. Raises Transient and Fatal: the same command goes on where it was."""
        done = Done()
        started_s = self._clock.monotonic_s()
        async with AsyncExitStack() as open_things:
            producer = Producer(self._config.kafka, "headgate-backfill")
            open_things.push_async_callback(producer.close)
            if plan.has(Means.KAFKA) or plan.has(Means.S3):
                await self._replay(plan, producer, open_things, done, tell)
            if plan.has(Means.CLOUDWATCH):
                connection = await self._connect(open_things)
                await ask(
                    plan.tasks, connection, producer, self._config, self._clock, done,
                    partial(tell, Means.CLOUDWATCH),
                )  # fmt: skip
        done.seconds = self._clock.monotonic_s() - started_s
        return done

    async def _replay(
        self, plan: Plan, producer: Producer, open_things: AsyncExitStack, done: Done,
        tell: Tell,
    ) -> None:  # fmt: skip
        config, asked, clock = self._config, self._asked, self._clock
        sink = await self._sink()
        open_things.push_async_callback(sink.close)
        lag = LiveLag(config)
        open_things.push_async_callback(lag.close)
        await lag.start()
        pace = Pace(asked.rate_points_per_s, lag, clock)
        announcer = None
        if asked.into == LIVE:
            connection = await self._connect(open_things)
            announcer = LedgerAnnouncer(connection, producer, config.kafka.topic("ledger"), config.revision)
            if asked.part[0] == 1:
                done.receipts += await announcer.announce_all(plan.receipts)
        for means in (Means.KAFKA, Means.S3):
            if not plan.has(means):
                continue
            source = self._source(means, plan)
            landing = Landing(source.topic, config.kafka.topic("dead"), sink, producer, config.limits, clock)
            try:
                await replay(
                    source, sink, landing, pace, clock, done,
                    partial(tell, means), announcer,
                )  # fmt: skip
            finally:
                await source.close()
            if isinstance(source, ArchiveReplay):
                done.problems += [f"spoilt in the archive: {key}" for key in source.spoilt]

    async def _connect(self, open_things: AsyncExitStack) -> asyncpg.Connection:
        connection = await open_connection(self._config.postgres, "headgate backfill")
        open_things.callback(connection.terminate)
        return connection

    async def _sink(self) -> ReplaySink:
        asked = self._asked
        if asked.into == NULL:
            return NullSink()
        postgres = self._config.postgres
        if asked.into != LIVE:
            postgres = Postgres(dsn=asked.into)
            await migrate(postgres)
        return await PostgresSink.connect(
            postgres, clock=self._clock, reader=reader_of(asked), rebuilding=asked.rebuild
        )

    def _source(self, means: Means, plan: Plan) -> Replay:
        kafka, scope, (part, parts) = self._config.kafka, self._scope, self._asked.part
        if plan.whole is None:
            scope = Scope(scope.from_s, scope.to_s, stretches=windows_by_service(plan.stretches, means))
        if means is Means.S3:
            lanes = [lane for lane in range(LANES) if lane % parts == part - 1]
            until_s = scope.to_s + self._reach_s
            return ArchiveReplay(self._archive, lanes, scope, until_s, receipts=self._asked.into == LIVE)
        partitions = [p for p in range(kafka.raw_partitions) if p % parts == part - 1]
        since_ms = self._on_kafkas_clock_ms(scope.from_s)
        return KafkaReplay(
            kafka, kafka.topic("raw"), partitions, scope, since_ms, self._clock, self._config.limits
        )


def reader_of(asked: Ask) -> str:
    """The name in `positions` of who reads for this backfill."""
    return f"backfill:{asked.backfill_id}"


def _rebuilding(asked: Ask) -> Ask:
    return replace(asked, rebuild=True)


@asynccontextmanager
async def opened(config: Config, asked: Ask, clock: Clock) -> AsyncIterator[Backfill]:
    """A backfill on an archive of its own."""
    async with open_archive(config.s3, clock) as archive:
        yield Backfill(config, asked, clock, archive)


def time_of(at_s: float) -> str:
    """As 2026-11-24T05:00Z."""
    return utc(at_s).strftime("%Y-%m-%dT%H:%MZ")
