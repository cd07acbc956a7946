"""An exporter shard: takes tasks from its slots, executes them, commits what has a receipt.

* At most `tasks_in_flight` tasks run at once, those that expire aside: what has no past does not wait behind slow looks. Live tasks go
  before backlog, as far ahead as `WAITING_MAX` sees. A partition's committed offset never passes a task without a receipt.
* At a rebalance it drains for up to `DRAIN_S`, commits, and cancels the rest: its next owner takes those again, from the archive
  where they are there already.
* A receipt that cannot be written (Kafka is away) is written again until it can be, or until the slot goes away; nobody is asked
  again for that.
* Its slots are what the group's leader makes of the assignment that the coordinator published (`workers.shards`). Its name is its own:
  where a newer process takes it, this one ends with exit code 3.
* Its configuration may change under way (`workers.reload`). A task that names what it does not know waits for it, for UNKNOWN_WAIT_S.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import structlog
from prometheus_client import Counter, Gauge, Histogram

from ingest import wire
from ingest.archive import open_archive
from ingest.changed import Changed
from ingest.clock import Clock, SystemClock
from ingest.collect import Answer, Collector, Topics
from ingest.errors import Fatal, Rejected, Transient
from ingest.group import Consumer
from ingest.log import Producer
from ingest.membership import ShardAssignor
from ingest.model import LookStatus, RecordPosition, SourceName, Target, Task, TaskKind
from ingest.offsets import OffsetTracker
from ingest.ports import Record
from ingest.sources.cloudwatch import CloudWatchSource
from ingest.sources.discovery import LISTINGS_MAX
from ingest.sources.exposition import ExpositionSource
from ingest.turns import Turns
from shard_config.load import load
from shard_config.model import Config
from workers import local
from workers.aside import Aside
from workers.bounds import BOUNDS
from workers.lifecycle import Lifecycle, add_worker_arguments, run_worker
from workers.members import Members
from workers.names import exporter_group
from workers.reload import Settings
from workers.shards import Board, follow, take_name
from workers.troubles import TROUBLES

_log = structlog.get_logger()

DRAIN_S = 10
RECENT_TASKS_MAX = 10_000
UNKNOWN_WAIT_S = 20.0
"""For the configuration to name what a task names. Kubernetes brings a ConfigMap to its Pods within a minute or so of each other;
what comes later is looked at by the next poll.
"""
STANDSTILL_S = 3.0
"""A turn of the loop takes half a second. After a longer one this process was stopped, or starved, and others may own its slots by now."""
DOUBT_S = 15.0
"""For Kafka to say so, after a standstill."""
WAITING_MAX = 256
"""Tasks taken up that wait for their turn: how far ahead of the slow ones a live task is found. What waits has cost nothing."""

TASKS = Counter(
    "headgate_tasks_total", "Tasks that ended with a receipt; by how their looks went.", ["status"]
)
POINTS = Counter("headgate_points_collected_total", "Points in archived and published batches.")
BILLED = Counter(
    "headgate_metrics_billed_total", "Metrics requested, as GetMetricData bills them.", ["account"]
)
REQUESTS = Counter("headgate_requests_total", "Requests sent to a source, retries included.", ["api"])
LEFT_OUT = Counter(
    "headgate_points_unchanged_total",
    "Points seen again as they had been published, and not published again.",
)
NO_ROOM = Counter(
    "headgate_points_not_remembered_total",
    "Points for which the memory of what was published has no room: they are published at each look. Rising: add shards.",
)
TASK_SECONDS = Histogram(
    "headgate_task_seconds",
    "From taking a task to its receipt. Above the poll interval, this shard falls behind: add shards.",
    buckets=(0.1, 0.3, 1, 3, 10, 30, 60, 120, 300),
)
IN_FLIGHT = Gauge("headgate_tasks_in_flight", "Tasks being executed now.")
SLOTS = Gauge("headgate_slots_owned", "Slots (partitions of `collect`) that this shard owns now.")
LAG = Gauge(
    "headgate_tasks_waiting", "Tasks in this shard's slots that wait for their turn. High: add shards."
)


class Exporter:
    """Executes the tasks of one shard. `consumer` is set by whoever wires it."""

    consumer: Consumer

    def __init__(
        self,
        collector: Collector,
        clock: Clock,
        tasks_in_flight: int,
        settings: Settings | None = None,
        aside: Callable[[Record, Rejected], Awaitable[None]] | None = None,
    ) -> None:
        """`settings` are asked for accounts and services that a task names and that are not known yet. `aside` is given what is no task;
        None: that is logged."""
        self._collector = collector
        self._clock = clock
        self._settings = settings
        self._aside = aside
        self._waited_for: set[Target] = set()
        """Targets that this configuration did not come to know in time."""
        self.taken_max = tasks_in_flight + WAITING_MAX
        """Tasks that are taken up at most."""
        self._turns = Turns(tasks_in_flight)
        self._begun: set[asyncio.Task[None]] = set()
        """Of those running, the ones that have had their turn: the others have asked nobody yet."""
        self._trackers: dict[int, OffsetTracker] = {}
        self._second_try_below: dict[int, int] = {}
        self._turned_s = clock.monotonic_s()
        self._doubtful_until_s = self._turned_s
        self._running: dict[asyncio.Task[None], int] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._executing: dict[str, asyncio.Task[None]] = {}

    @property
    def taken(self) -> int:
        """Tasks taken up: those that run, and those that wait for their turn."""
        return len(self._running)

    def configure(self, config: Config) -> None:
        """Go by this configuration from now on; tasks that have begun end as they began."""
        self._waited_for.clear()
        self.taken_max = config.tasks_in_flight + WAITING_MAX
        self._turns.resize(config.tasks_in_flight)
        self._collector.deadline_s = config.task_deadline_s
        self._collector.changed.settling_s = settling_of(config)

    async def assigned(self, partitions: Sequence[int]) -> dict[int, int]:
        """Open partitions where the group's committed offsets say."""
        starts = await self.consumer.committed(partitions)
        bounds = await self.consumer.bounds(partitions)
        for p, start in starts.items():
            first = bounds[p][0]
            if start < first:
                # Tasks that nobody executed in the retention of `collect`: the ledger shows their windows open.
                _log.error("tasks_expired_unexecuted", partition=p, committed=start, first=first)
                starts[p] = first
        self._trackers = {p: OffsetTracker(s) for p, s in starts.items()}
        # Whoever owned these slots may have executed what is written by now, and published other values.
        self._collector.changed.forget()
        self._second_try_below = {p: bounds[p][1] for p in starts}
        SLOTS.set(len(starts))
        _log.info("slots_assigned", slots=sorted(starts))
        return starts

    async def revoked(self, partitions: Sequence[int]) -> None:
        """Drain, commit, and let go. What waits for its turn is not begun any more."""
        for task in self._running.keys() - self._begun:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=DRAIN_S)
        cancelled = [t for t in self._running if not t.done()]
        for task in cancelled:
            task.cancel()
        if cancelled:
            await asyncio.wait(cancelled, timeout=DRAIN_S)
        try:
            await self._commit()
        except Transient as error:
            # The next owner takes what was not committed again, from the archive.
            _log.warning("commit_skipped", error=str(error))
        self._trackers = {}
        SLOTS.set(0)
        _log.info("slots_revoked", slots=list(partitions), handed_back=len(cancelled))

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop: poll, execute, commit."""
        async with asyncio.TaskGroup() as group:
            while not lifecycle.stop.is_set():
                try:
                    await self._step(group, lifecycle)
                except Transient as error:
                    _log.warning("exporter_retries", error=str(error))
                    await lifecycle.pause(error.retry_after_s)
            if self._trackers:
                await self.revoked(sorted(self._trackers))

    async def _step(self, group: asyncio.TaskGroup, lifecycle: Lifecycle) -> None:
        lifecycle.beat("tasks")
        self._may_be_a_zombie()
        self._turned_s = self._clock.monotonic_s()
        room = self.taken_max - len(self._running)
        if room <= 0:
            await asyncio.wait(self._running, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        else:
            for record in await self.consumer.poll(room, 0.25):
                self._begin(group, record)
        lifecycle.ready = bool(self._trackers)
        LAG.set(self.consumer.lag() + len(self._running) - len(self._begun))
        await self._commit()

    def _begin(self, group: asyncio.TaskGroup, record: Record) -> None:
        tracker = self._trackers.get(record.position.partition)
        if tracker is None:
            return
        tracker.begin(record.position.offset)
        running = group.create_task(self._execute(record, tracker))
        self._running[running] = record.position.partition
        running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Task[None]) -> None:
        self._running.pop(running, None)
        self._begun.discard(running)
        IN_FLIGHT.set(len(self._begun))

    async def _execute(self, record: Record, tracker: OffsetTracker) -> None:
        at = record.position
        try:
            task = wire.decode_task(record.value)
        except Rejected as error:
            # Only the coordinator writes here. Whatever this is, its windows are not planned by it.
            _log.error("task_not_readable", partition=at.partition, offset=at.offset, error=str(error))
            if self._aside is not None:
                await self._until_written(partial(self._aside, record, error), partition=at.partition)
            tracker.done(at.offset)
            return
        started_s = self._clock.monotonic_s()
        await self._get_to_know(task)
        while (same := self._executing.get(task.task_id)) is not None:
            # Announced twice. When that one has ended, its answer is in the archive.
            await asyncio.wait({same})
        me = asyncio.current_task()
        assert me is not None  # noqa: S101  # only a task runs this
        self._executing[task.task_id] = me
        try:
            async with contextlib.nullcontext() if task.expires_s else self._turns.turn(rank_of(task)):
                self._begun.add(me)
                IN_FLIGHT.set(len(self._begun))
                answer = await self._answer(task, at)
                receipt = answer.archived.receipt
                await self._until_written(
                    partial(self._collector.publish, answer),
                    task=receipt.task_id,
                    target=str(receipt.target),
                )
        finally:
            del self._executing[task.task_id]
        tracker.done(at.offset)
        TASK_SECONDS.observe(self._clock.monotonic_s() - started_s)
        self._count(answer)

    async def _get_to_know(self, task: Task) -> None:
        """The coordinator may have read a newer file, or list. Without a turn: others do not wait for this."""
        if self._settings is None or task.kind == TaskKind.REPLAY or task.target in self._waited_for:
            return
        if not await self._settings.until(partial(knows, task), UNKNOWN_WAIT_S):
            # Once a target: a backlog of one that was removed goes by quickly.
            if len(self._waited_for) < RECENT_TASKS_MAX:
                self._waited_for.add(task.target)
            _log.warning("task_of_unknown_target", task=task.task_id, target=str(task.target))

    def _may_be_a_zombie(self) -> bool:
        """Whether this process stood still, or was cut off from its group, a moment ago: what it has in hand then, others may have executed meanwhile."""
        now_s = self._clock.monotonic_s()
        if now_s - self._turned_s > STANDSTILL_S or self.consumer.in_doubt:
            self._doubtful_until_s = now_s + DOUBT_S
        return now_s < self._doubtful_until_s

    async def _answer(self, task: Task, at: RecordPosition) -> Answer:
        second = at.offset < self._second_try_below.get(at.partition, 0) or task.task_id in self._recent
        second |= self._may_be_a_zombie()
        self._remember(task.task_id)
        return await self._collector.answer(task, maybe_second_try=second)

    async def _until_written(self, write: Callable[[], Awaitable[None]], **what: object) -> None:
        """However long it takes: until then the task is not finished, and its offset not committed."""
        while True:
            try:
                return await write()
            except Transient as error:
                _log.warning("receipt_not_written", **what, error=str(error))
                await self._clock.sleep(error.retry_after_s)

    def _remember(self, task_id: str) -> None:
        self._recent[task_id] = None
        if len(self._recent) > RECENT_TASKS_MAX:
            self._recent.popitem(last=False)

    def _count(self, answer: Answer) -> None:
        receipt = answer.archived.receipt
        failed = {i.outcome.status for i in receipt.items} - {LookStatus.COMPLETE}
        TASKS.labels(status=min(failed, default=LookStatus.COMPLETE)).inc()
        TROUBLES.put(answer)
        # What came from the archive was asked for, and counted, by another run.
        for item in answer.own.items if answer.own else ():
            POINTS.inc(item.points)
            LEFT_OUT.inc(sum(w.points for w in item.seen) - sum(w.points for w in item.windows))
            BILLED.labels(account=receipt.target.account).inc(item.outcome.metrics_billed)
            for api, count in item.outcome.requests.items():
                REQUESTS.labels(api=api).inc(count)
        for item in receipt.items:
            if item.outcome.status is not LookStatus.COMPLETE:
                _log.warning(
                    "look_not_complete",
                    target=str(receipt.target),
                    service=item.item.service,
                    status=item.outcome.status,
                    detail=item.outcome.detail,
                )

    async def _commit(self) -> None:
        # A rebalance may put other trackers in place meanwhile.
        moved = {p: (t, t.next) for p, t in self._trackers.items() if t.next > t.committed}
        await self.consumer.commit({p: offset for p, (_, offset) in moved.items()})
        for tracker, offset in moved.values():
            tracker.committed = offset


def knows(task: Task, config: Config) -> bool:
    """Whether a configuration has all that a task asks for."""
    target, wanted = task.target, {item.service for item in task.items}
    if target.source == SourceName.EXPOSITION:
        place = target.account, target.region
        return wanted <= {job.name for job in config.exposition if (job.account, job.region) == place}
    return wanted <= config.service_by_name.keys() and any(a.id == target.account for a in config.accounts)


def rank_of(task: Task) -> int:
    """Live tasks go first."""
    return 0 if task.kind == TaskKind.LIVE else 1


def settling_of(config: Config) -> dict[str, int]:
    """By service: what is published before that is not published again unchanged."""
    return {p.service: p.settling_s for p in config.services}


async def serve(config: Config, shard: str, lifecycle: Lifecycle, path: Path | None = None) -> None:
    """Wire one shard and run it until told to stop. `config` is what stands in the file `path`, which is watched."""
    clock = SystemClock(config.run.clock_offset_s)
    settings = Settings(config, Members(config.s3, clock), clock, path)
    config = await settings.start()
    kafka = config.kafka
    producer = Producer(kafka, shard)
    cloudwatch = CloudWatchSource(config, clock)
    TROUBLES.watch(cloudwatch, clock)
    exposition = ExpositionSource(config, clock)
    board = Board(kafka, shard)
    try:
        mine = await take_name(board, producer, shard, clock, lifecycle)
        if mine is None:
            return
        assignor = ShardAssignor(shard, lambda: board.assignment)
        async with open_archive(config.s3, clock) as archive:
            cloudwatch.share_listings(archive)
            collector = Collector(
                shard,
                {SourceName.CLOUDWATCH: cloudwatch, SourceName.EXPOSITION: exposition},
                archive,
                producer,
                Topics(kafka.topic("raw"), kafka.topic("ledger")),
                clock,
                archive_prefix=config.s3.prefix,
                deadline_s=config.task_deadline_s,
                changed=Changed(settling_of(config), no_room=NO_ROOM.inc),
            )
            aside = Aside(kafka, producer).put
            exporter = Exporter(collector, clock, config.tasks_in_flight, settings, aside)
            BOUNDS.watch_tables()
            BOUNDS.watch("tasks_taken", lambda: exporter.taken, lambda: exporter.taken_max)
            BOUNDS.watch(
                "points_remembered", lambda: collector.changed.entries, lambda: collector.changed.entries_max
            )
            BOUNDS.watch("listings", lambda: cloudwatch.listings, lambda: LISTINGS_MAX)

            async def apply(changed: Config) -> None:
                cloudwatch.configure(changed)
                exposition.configure(changed)
                exporter.configure(changed)

            exporter.consumer = Consumer(
                kafka,
                kafka.topic("collect"),
                exporter_group(kafka),
                client_id=shard,
                instance_id=shard,
                clock=clock,
                session_timeout_s=kafka.session_timeout_s,
                drain_s=2 * DRAIN_S,
                assigned=exporter.assigned,
                revoked=exporter.revoked,
                assignor=assignor,
            )
            await exporter.consumer.start()
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(board.run(lifecycle))
                    group.create_task(
                        follow(board, exporter.consumer, assignor, mine, lifecycle, cloudwatch.share_quotas)
                    )
                    group.create_task(exporter.run(lifecycle))
                    group.create_task(settings.run(lifecycle, apply))
            finally:
                await exporter.consumer.stop()
    finally:
        await producer.close()
        await cloudwatch.close()
        await exposition.close()
        await board.close()


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "exporter",
        help="run one exporter shard",
        description="Runs one exporter shard: it takes tasks from its slots, queries CloudWatch and exposition endpoints, writes S3, then Kafka, "
        "then the receipt. Its name is its identity in the consumer group: never run two with one name.",
    )
    add_worker_arguments(parser)
    parser.add_argument(
        "--shard", default=os.environ.get("HEADGATE_SHARD"), help="its stable name, as exporter-1"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.shard:
        raise Fatal("exporter", "has no name", "give --shard NAME or set HEADGATE_SHARD")
    path = local.config_path(args.config)
    config = load(path, environ=os.environ)
    return run_worker(
        args.shard,
        lambda lifecycle: serve(config, args.shard, lifecycle, path),
        host=args.host,
        metrics_port=args.metrics_port,
    )
