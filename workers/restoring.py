"""What a restore does, step by step. `workers.restore` is the command around it.

1. *The schema and the topics*, where they are missing.
2. *The ledger*: into an empty PostgreSQL the newest snapshot is loaded (`ingest.snapshot`), in one transaction.
3. *What Kafka alone held*: where its log does not fit a reader's position any more, receipts that the archive has and the ledger has not are announced again, and what the
   configuration says was due since is planned again (`ingest.restoring`).
4. *Positions* that do not fit are moved to the log's start: landing twice changes nothing.
5. *The topic `ledger`* is folded, beside whatever consumers run: only then may a coordinator start, or it would plan, and pay for, what is already there.
6. *Samples* land again from the archive, behind live data.

It can be stopped at any time; the same again goes on where it was. Marks among the positions (reader `restore`) say what is still to come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from ingest import snapshot
from ingest.archive import S3Archive, archive_key, open_archive
from ingest.backfill import reach_s
from ingest.clock import Clock
from ingest.errors import HeadgateError, Rejected, Transient
from ingest.ledger import Ledger
from ingest.log import Outgoing, Producer
from ingest.membership import look_at_group, remove_members
from ingest.model import Receipt, Target
from ingest.projection import Projection
from ingest.replay import Scope
from ingest.restoring import planned_again
from ingest.schedule import grids_of
from ingest.sinks.connection import open_connection, translated
from ingest.sinks.migrate import migrate
from ingest.snapshot import Snapshot
from ingest.wire import encode_task
from shard_config.model import Config
from workers.backfill_plan import LIVE, Ask, Tell, opened
from workers.backfilling import Done, LedgerAnnouncer
from workers.consumer import ledger_reader, settling_of
from workers.coordinator import ASKED_OF_NOBODY
from workers.lifecycle import Lifecycle
from workers.names import exporter_group, landing_group, ledger_group, remote_write_group
from workers.positions import GONE, Place, log_ends, move, places
from workers.setup import create_topics, kafka_admin, setup

DAY_S = 86_400
RECEIPTS_AT_ONCE = 16
KEYS_AT_ONCE = 1_000
PATIENCE_S = 120.0
POLL_S = 0.5
TOPICS_S = 30.0
MEMBER = "restore"

_MARK = """INSERT INTO positions (sink, topic, partition, next, last_value_id)
VALUES ('restore', 'archive', $1, $3, int8send($2)) ON CONFLICT DO NOTHING"""
_MARKED = "SELECT next, last_value_id FROM positions WHERE sink = 'restore' AND partition = $1"
_UNMARK = "DELETE FROM positions WHERE sink = 'restore' AND partition = $1"
_SAMPLES, _KAFKA = 0, 1
"""Marks: samples of a span are to land again; what Kafka alone held is to be told again."""
_OPEN = "SELECT extract(epoch FROM min(window_start))::bigint FROM windows WHERE sealed_at IS NULL AND declared IS NULL"
_UNKNOWN = """SELECT task_id FROM unnest($1::text[]) AS a (task_id)
WHERE NOT EXISTS (SELECT FROM looks l WHERE l.task_id = a.task_id)"""
_PROJECTED = "SELECT partition, next FROM positions WHERE sink = 'ledger' AND topic = $1"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Found:
    """What is there, before anything is done. `snapshot` is what an empty ledger would be loaded from; `wrong` are positions that do not fit."""

    is_new: bool
    snapshot: Snapshot | None
    wrong: tuple[Place, ...]
    marked: bool
    """One was begun before, and is not done."""

    @property
    def steps(self) -> list[str]:
        """What is to be done, a line each; none where nothing is missing."""
        steps = []
        if self.is_new:
            steps.append(
                f"the ledger is empty: load {self.snapshot}"
                if self.snapshot
                else "the ledger is empty, and no snapshot is there: rebuild it from the archive's receipts alone"
            )
        steps += [
            f"{p.reader} {p.topic}/{p.partition} stands at {p.stored.next}, and {p.wrong}: move it to the log's start"
            for p in self.wrong
        ]
        if self.wrong or (self.is_new and self.snapshot is None):
            steps.append(
                "announce again what the archive knows and the ledger does not; plan again what was due"
            )
        if self.is_new or self.wrong or self.marked:
            steps.append("land samples again from the archive, where they have not landed")
        return steps


class Restore:
    """One restore, on an archive and a connection of its own. Raises Transient and Fatal: the same again goes on where it was."""

    def __init__(
        self, config: Config, clock: Clock, archive: S3Archive, connection: asyncpg.Connection, say: Say
    ) -> None:
        self._config = config
        self._clock = clock
        self._archive = archive
        self._connection = connection
        self._say = say
        self._grids = grids_of(config)
        self._reach_s = reach_s(g for grids in self._grids.values() for g in grids)

    async def look(self, snapshot_s: int | None) -> Found:
        """What is there. `snapshot_s` names a snapshot that is to be loaded, instead of the newest."""
        with translated("ledger"):
            migrated = await self._connection.fetchval("SELECT to_regclass('positions') IS NOT NULL")
        is_new = await snapshot.is_new(self._connection)
        found = None
        if is_new:
            found = (
                await snapshot.newest(self._archive)
                if snapshot_s is None
                else await snapshot.read(self._archive, snapshot_s)
            )
        marked = migrated and any([await self._marked(m) is not None for m in (_SAMPLES, _KAFKA)])
        return Found(is_new, found, await self._wrong() if migrated else (), marked)

    async def _wrong(self) -> tuple[Place, ...]:
        return tuple(p for p in await places(self._config) if p.wrong)

    async def ledger(self, found: Found) -> None:
        """Steps 1 to 5: afterwards the ledger is what it was, and workers may run."""
        for name in await migrate(self._config.postgres):
            self._say(f"migration {name}")
        for line in (created := await create_topics(self._config)):
            self._say(line)
        begun_s = await self._begun()
        if found.is_new and begun_s:
            await self._load(found.snapshot, min(begun_s.values()) - self._reach_s)
        wrong = await self._wrong_in_new_topics()
        lost = bool(found.wrong or wrong) or (found.is_new and found.snapshot is None)
        if lost or await self._marked(_KAFKA) is not None:
            as_of_s = found.snapshot.taken_s if found.snapshot else self._clock.now_s()
            kept_from_s = as_of_s - self._config.ledger_retention_days * DAY_S
            await self._tell_again(begun_s, kept_from_s, emptied=found.is_new)
        for place in wrong:
            self._say(await move(self._config, place, "start"))
        if created:
            await self._until_alone()
        for line in await setup(self._config):
            self._say(line)
        await self._unmark(_KAFKA)
        await self._project()

    async def _wrong_in_new_topics(self) -> tuple[Place, ...]:
        """Positions that do not fit, as soon as a broker knows all topics: a new one takes its time after each."""
        deadline_s = self._clock.monotonic_s() + TOPICS_S
        while True:
            wrong = await self._wrong()
            if all(p.wrong != GONE for p in wrong):
                return wrong
            if self._clock.monotonic_s() > deadline_s:
                raise Transient("kafka", f"its topics are not there {TOPICS_S:g} s after they were created")
            await self._clock.sleep(POLL_S)

    async def _until_alone(self) -> None:
        """Wait for the end of sessions: nobody but a member can say where a group starts that has members."""
        kafka, write = self._config.kafka, self._config.remote_write
        groups = [exporter_group(kafka), landing_group(kafka), ledger_group(kafka)]
        groups += [remote_write_group(kafka, r.name) for r in (write.receivers if write else ())]
        deadline_s = self._clock.monotonic_s() + kafka.session_timeout_s + TOPICS_S
        async with kafka_admin(kafka) as admin:
            while busy := [g for g in groups if await _has_members(admin, g)]:
                if self._clock.monotonic_s() > deadline_s:
                    remedy = (
                        "stop all workers that read from Kafka; the same command goes on where this one was"
                    )
                    raise Transient(
                        f"groups {', '.join(busy)}", "have members, on topics that are new", remedy
                    )
                await self._clock.sleep(POLL_S)

    async def _begun(self) -> dict[Target, int]:
        """The oldest archived tick of each target that has one."""
        slots = asyncio.Semaphore(RECEIPTS_AT_ONCE)

        async def first(target: Target) -> tuple[Target, int | None]:
            async with slots:
                return target, await self._archive.first_tick_s(target)

        found = await asyncio.gather(*map(first, await self._archive.targets()))
        return {target: tick_s for target, tick_s in found if tick_s is not None}

    async def _load(self, found: Snapshot | None, from_s: int) -> None:
        until_s = (self._clock.now_s() // DAY_S + 1) * DAY_S
        mark = partial(_mark, kind=_SAMPLES, from_s=from_s, until_s=until_s)
        if found is None:
            with translated("ledger"):
                await mark(self._connection)
            self._say("no snapshot is there: pauses, rechecks' charges and the inventory's history are gone")
            return
        await snapshot.load(self._connection, self._archive, found, then=mark)
        self._say(f"loaded {found}")

    async def _marked(self, kind: int) -> tuple[int, int] | None:
        with translated("ledger"):
            row = await self._connection.fetchrow(_MARKED, kind)
        return None if row is None else (int.from_bytes(row["last_value_id"], signed=True), row["next"])

    async def _unmark(self, kind: int) -> None:
        with translated("ledger"):
            await self._connection.execute(_UNMARK, kind)

    async def _tell_again(self, begun_s: Mapping[Target, int], kept_from_s: int, *, emptied: bool) -> None:
        """Step 3. A mark first: once topics are there and positions have moved, nothing else says that anything may be missing."""
        config, now_s = self._config, self._clock.now_s()
        with translated("ledger"):
            await _mark(self._connection, _KAFKA, 0, 0)
            oldest_s = await self._connection.fetchval(_OPEN)
        ledger = Ledger(config.postgres, "headgate restore", {})
        try:
            memory = await ledger.memory()
        finally:
            await ledger.close()
        until_s = memory.planned_until_s
        since_s = {
            t: min(
                (until_s.get(str(t), {}).get(g.service, begun_s.get(t, now_s)) for g in grids), default=now_s
            )
            for t, grids in self._grids.items()
        }
        async with AsyncExitStack() as stack:
            producer = Producer(config.kafka, "headgate-restore")
            stack.push_async_callback(producer.close)
            topic = config.kafka.topic("ledger")
            announcer = LedgerAnnouncer(self._connection, producer, topic, config.revision, kept_from_s)
            told = _Told(announcer)
            # What was asked of the past (a backfill, healing) is archived where it was asked for, however long ago that is.
            asked = [
                archive_key(t, config.s3.prefix) for t in memory.unanswered if t.kind not in ASKED_OF_NOBODY
            ]
            for at in range(0, len(asked), KEYS_AT_ONCE):
                await told.tell(await self._unknown(asked[at : at + KEYS_AT_ONCE]))
            for target, since in since_s.items():
                await self._announce(told, target, since - self._reach_s, now_s + DAY_S)
            # A horizon is looked at once, and what is after it is nobody's.
            once = config.run.horizon_s is not None
            tasks = [] if once else planned_again(self._grids, until_s, begun_s, now_s, config.revision)
            for at in range(0, len(tasks), KEYS_AT_ONCE):
                some = tasks[at : at + KEYS_AT_ONCE]
                await producer.send(topic, [Outgoing(str(t.target).encode(), encode_task(t)) for t in some])
        self._say(
            f"{told.receipts:,} receipts of the archive announced again, {len(tasks):,} tasks planned again"
        )
        if not emptied:
            from_s = min(
                [*since_s.values(), *told.oldest_s, *([] if oldest_s is None else [oldest_s])], default=now_s
            )
            with translated("ledger"):
                await _mark(self._connection, _SAMPLES, from_s, (now_s // DAY_S + 1) * DAY_S)

    async def _announce(self, told: _Told, target: Target, from_s: int, to_s: int) -> None:
        """Receipts of a target that the ledger does not know; only those are read."""
        keys: list[str] = []
        async for key in self._archive.keys(target, max(0, from_s), to_s):
            keys.append(key)
            if len(keys) == KEYS_AT_ONCE:
                await told.tell(await self._unknown(keys))
                keys = []
        await told.tell(await self._unknown(keys))

    async def _unknown(self, keys: list[str]) -> list[Receipt]:
        of_task = {key.rpartition("-")[2]: key for key in keys}
        with translated("ledger"):
            rows = await self._connection.fetch(_UNKNOWN, list(of_task))
        slots = asyncio.Semaphore(RECEIPTS_AT_ONCE)

        async def read(key: str) -> Receipt | None:
            async with slots:
                try:
                    return await self._archive.receipt(key)
                except Rejected as error:
                    self._say(f"spoilt in the archive: {error}")
                    return None

        found = await asyncio.gather(*(read(of_task[row["task_id"]]) for row in rows))
        return sorted((r for r in found if r is not None), key=lambda r: (r.tick_s, r.task_id))

    async def _project(self) -> None:
        """Fold what is on `ledger` by now, beside whatever consumers there are. Raises Transient where nothing moves."""
        config, clock = self._config, self._clock
        topic = config.kafka.topic("ledger")
        ends = await log_ends(config.kafka, topic, config.kafka.ledger_partitions)
        ledger = Ledger(config.postgres, "headgate restore ledger", settling_of(config))
        producer = Producer(config.kafka, MEMBER)
        dead, targets = config.kafka.topic("dead"), {str(target) for target in self._grids}
        projection = Projection(
            topic, dead, ledger, producer, config.limits.dead_share_max, clock, targets=targets
        )
        lifecycle = Lifecycle()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(ledger_reader(config, MEMBER, projection, clock).run(lifecycle))
                try:
                    await self._until_projected(topic, ends)
                finally:
                    lifecycle.stop.set()
        except* HeadgateError as errors:
            raise errors.exceptions[0] from errors
        finally:
            await producer.close()
            await ledger.close()
        async with kafka_admin(config.kafka) as admin:
            # Else its partitions would wait for the end of its session.
            await remove_members(admin, ledger_group(config.kafka), [MEMBER])

    async def _until_projected(self, topic: str, ends: Mapping[int, int]) -> None:
        left, moved_s = -1, self._clock.monotonic_s()
        while True:
            with translated("ledger"):
                rows = await self._connection.fetch(_PROJECTED, topic)
            at = {r["partition"]: r["next"] for r in rows}
            behind = sum(max(0, end - at.get(p, 0)) for p, end in ends.items())
            if not behind:
                return
            now_s = self._clock.monotonic_s()
            if behind != left:
                left, moved_s = behind, now_s
            if now_s - moved_s > PATIENCE_S:
                what = f"{behind:,} records are not folded, and nothing has moved for {PATIENCE_S:g} s"
                raise Transient(f"topic {topic}", what, "see the logs of consumers; the same command goes on")
            await self._clock.sleep(POLL_S)

    async def samples(self, tell: Tell) -> tuple[tuple[int, int], Done] | None:
        """Step 6: the span, and what was done; None where nothing says that samples are missing."""
        span = await self._marked(_SAMPLES)
        if span is None:
            return None
        ask = Ask(Scope(*span), "s3", LIVE, False, 0, 0, (1, 1))
        async with opened(self._config, ask, self._clock) as backfill:
            plan, _ = await backfill.plan()
            done = await backfill.execute(plan, tell) if not plan.empty else Done()
        await self._unmark(_SAMPLES)
        return span, done


class _Told:
    """What was announced again: how many receipts, and the oldest window of them, in a list of at most one."""

    def __init__(self, announcer: LedgerAnnouncer) -> None:
        self._announcer = announcer
        self.receipts = 0
        self.oldest_s: list[int] = []

    async def tell(self, receipts: Sequence[Receipt]) -> None:
        self.receipts += await self._announcer.announce_all(receipts)
        starts = [i.item.start_s for r in receipts for i in r.items]
        if starts:
            self.oldest_s = [min(self.oldest_s + starts)]


async def _has_members(admin: AIOKafkaAdminClient, group: str) -> bool:
    """A broker that does not know yet, as a new one does not at first, says neither: then it may have some."""
    try:
        return bool((await look_at_group(admin, group)).members)
    except KafkaError as error:
        if error.retriable:
            return True
        raise


async def _mark(connection: asyncpg.Connection, kind: int, from_s: int, until_s: int) -> None:
    await connection.execute(_MARK, kind, from_s, until_s)


@asynccontextmanager
async def restoring(config: Config, clock: Clock, say: Say) -> AsyncIterator[Restore]:
    """A restore with what it needs. Raises Transient, Fatal."""
    connection = await open_connection(config.postgres, "headgate restore")
    try:
        async with open_archive(config.s3, clock) as archive:
            yield Restore(config, clock, archive, connection, say)
    finally:
        connection.terminate()
