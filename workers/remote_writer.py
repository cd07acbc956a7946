"""A remote writer: samples from `raw` to receivers of Prometheus' remote write. A group per receiver, one process for all, and no PostgreSQL.

* A receiver that is down delays its own series only: each has its own group, reader, memory and retries.
* Where a receiver's group has committed nothing it starts with what the receiver still takes: its window, or the last hour.
* Where Kafka no longer has what a group would read next, that is said loudly and counted, and reading goes on with what there is: this sink is
  never audited, and the store has the samples.
* Receivers may come, go and change while it runs: theirs alone start, stop or begin again from what was committed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import REGISTRY

from ingest.archive import open_archive
from ingest.clock import Clock, SystemClock
from ingest.errors import Fatal, Transient
from ingest.forwarded import Tally
from ingest.forwarding import LABELS_MAX, Forwarder, start_ms
from ingest.group import Committable, Consumer
from ingest.log import Producer, cluster_id
from ingest.ports import Receiving, Record
from ingest.resources import ResourceBook
from ingest.sinks.remote_write import RemoteWrite
from ingest.sources.listing import Cache
from ingest.zeros import wait_s
from shard_config.load import load
from shard_config.model import Config
from shard_config.remote_write import Receiver
from workers import local
from workers.bounds import BOUNDS
from workers.lifecycle import Lifecycle, add_worker_arguments, run_worker
from workers.members import Members
from workers.names import remote_write_group
from workers.reading import DRAIN_S, Reader, cancelled_after
from workers.reload import Settings
from workers.remote_beside import Beside, follow_ledger, follow_listings, has_zeros
from workers.remote_metrics import REQUEST_SECONDS, Tallies
from workers.remote_names import Names

_log = structlog.get_logger()

REFRESH_S: Final = 5.0
"""Between two looks at which lists of resources are due."""


class Courier:
    """One receiver's way: its group's reader, its forwarder, its client."""

    def __init__(
        self,
        config: Config,
        receiver: Receiver,
        name: str,
        names: Names,
        producer: Producer,
        clock: Clock,
        tally: Tally,
        bytes_max: int,
    ) -> None:
        kafka, write = config.kafka, config.remote_write
        self._config = config
        self._clock = clock
        self._tally = tally
        self._stop = asyncio.Event()
        self._group = remote_write_group(kafka, receiver.name)
        self.beside = Beside(config, names, clock)
        self.receiver = receiver
        self.opened = False
        """All that the group has given this process is open."""
        self.receiving: Receiving = RemoteWrite(
            receiver,
            clock,
            write.samples_per_request if write else 2_000,
            REQUEST_SECONDS.labels(receiver=receiver.name).observe,
        )
        self.forwarder = Forwarder(
            name,
            receiver.name,
            receiver.out_of_order_window_s,
            settling_of(config, receiver),
            names,
            self.receiving,
            producer,
            (kafka.topic("raw"), kafka.topic("dead")),
            config.limits,
            clock,
            tally,
            bytes_max=bytes_max,
            log_ahead_s=config.run.clock_offset_s,
            heard=self.beside.heard,
        )
        self._reader = Reader(
            lambda reader: Consumer(
                kafka,
                kafka.topic("raw"),
                self._group,
                client_id=name,
                instance_id=name,
                clock=clock,
                session_timeout_s=kafka.session_timeout_s,
                assigned=reader.assigned,
                revoked=reader.revoked,
                skipped=self._skipped,
            ),
            self._take,
            self._open,
            self._close,
            polled=self._polled,
            ticks=True,
            full=lambda: self.forwarder.full,
        )

    async def run(self, lifecycle: Lifecycle) -> None:
        self._stop = lifecycle.stop
        try:
            await self._reader.run(lifecycle)
        finally:
            self.opened = False
            self.forwarder.close()
            await self.receiving.close()

    async def _open(self, consumer: Consumer, partitions: Sequence[int]) -> Mapping[int, int]:
        committed = await consumer.notes(partitions)
        bounds = await consumer.bounds(partitions)
        if virgin := [p for p in partitions if p not in committed]:
            window_s, ahead_s = self.receiver.out_of_order_window_s, self._config.run.clock_offset_s
            begin = await consumer.offsets_at(virgin, start_ms(window_s, self._clock.now_ms(), ahead_s))
            await consumer.commit(begin)
        for p, (offset, note) in list(committed.items()):
            first, end = bounds[p]
            if not first <= offset <= end:
                self._skipped(p, max(0, first - offset))
                committed[p] = first, note if offset < first else ""
        if virgin:
            committed |= {p: (offset, "") for p, offset in begin.items()}
        self.beside.forget()
        self.forwarder.open(committed, cluster=await cluster_id(self._config.kafka))
        self.opened = True
        return {p: offset for p, (offset, _) in committed.items()}

    async def _close(self) -> None:
        self.opened = False
        self.forwarder.close()

    async def _take(self, records: Sequence[Record]) -> Mapping[int, Committable]:
        await self.forwarder.take(records)
        if not records:
            self.forwarder.caught_up(self._reader.consumer.caught_up())
        for batch in self.beside.zeros():
            with contextlib.suppress(Transient):  # its series cannot be named just now
                self.forwarder.offer(batch)
        try:
            while not self._leaves() and await self._send():
                with contextlib.suppress(Transient):  # the next commit says the same, or more
                    await self._reader.consumer.commit(self.forwarder.commits())
                self._tally.failing = False
        except Transient:
            self._tally.failing = True
            raise
        if not self._leaves():
            await self.beside.send_info(self.receiving, self._refused)
        return self.forwarder.commits()

    def _refused(self, reason: str) -> None:
        self._tally.refused[reason] += 1

    def _leaves(self) -> bool:
        return self._stop.is_set() or self._reader.leaving.is_set()

    async def _send(self) -> bool:
        """Send what is due next, but where a rebalance waits, DRAIN_S at most."""
        sending = asyncio.create_task(self.forwarder.send())
        leaving = asyncio.create_task(self._reader.leaving.wait())
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            await cancelled_after([sending], DRAIN_S)
            return await sending
        except asyncio.CancelledError:
            if not sending.cancelled():
                raise
            return False
        finally:
            leaving.cancel()
            sending.cancel()

    def _polled(self, lifecycle: Lifecycle, consumer: Consumer) -> None:
        self._tally.lag_records = consumer.lag()

    def _skipped(self, partition: int, records: int) -> None:
        self._tally.skipped_records += records
        _log.error(
            "records_skipped",
            receiver=self.receiver.name,
            partition=partition,
            records=records,
            what="Kafka no longer has what is next; their samples are in the store, and not at the receiver",
        )


def settling_of(config: Config, receiver: Receiver) -> dict[str, int]:
    """By service, how long a point waits after its end at a receiver that takes each once."""
    late_s = 0 if receiver.out_of_order_window_s else 1
    services = {p.service: p.settling_s + late_s * wait_s(p, config) for p in config.services}
    return {job.name: 0 for job in config.exposition} | services


def _shape(config: Config, receiver: Receiver) -> object:
    """What a receiver's way is made of; another shape is another way."""
    write = config.remote_write
    accounts = tuple((a.id, a.alias, a.via) for a in config.accounts)
    return (
        receiver,
        write and write.model_copy(update={"receivers": tuple(r.name for r in write.receivers)}),
        config.services,
        config.exposition,
        accounts,
        config.limits,
    )


class _Part(Lifecycle):
    """A courier's part of the process's life: it may be told to stop alone."""

    def __init__(self, whole: Lifecycle) -> None:
        super().__init__()
        self._whole = whole

    def beat(self, loop: str) -> None:
        self._whole.beat(loop)


class RemoteWriter:
    """The couriers of one process, as the configuration says."""

    def __init__(
        self,
        name: str,
        only: Sequence[str],
        producer: Producer,
        clock: Clock,
        tallies: Tallies,
        cache: Cache,
        lifecycle: Lifecycle,
        group: asyncio.TaskGroup,
    ) -> None:
        self._name = name
        self._only = frozenset(only)
        self._producer = producer
        self._clock = clock
        self._tallies = tallies
        self._cache = cache
        self._lifecycle = lifecycle
        self._group = group
        self._names: Names | None = None
        self._follows = False
        self._running: dict[str, tuple[object, Courier, _Part, asyncio.Task[None]]] = {}

    async def apply(self, config: Config) -> None:
        """Start, stop and begin again what has changed."""
        receivers = {r.name: r for r in served(config, self._only)}
        shapes = {name: _shape(config, receiver) for name, receiver in receivers.items()}
        for name, (shape, *_) in list(self._running.items()):
            if shapes.get(name) != shape:
                await self._stop(config, name)
        if has_zeros(config) and not self._follows:
            self._follows = True
            self._group.create_task(follow_ledger(config, self.besides, self._lifecycle))
            self._group.create_task(follow_listings(self._cache, self._clock, self.besides, self._lifecycle))
        new = receivers.keys() - self._running.keys()
        if not new:
            return
        if new == receivers.keys():  # else it is shared with those that go on
            self._names = None
        if self._names is None:
            self._names = Names(config, ResourceBook(config, self._cache))
        for name in sorted(new):
            self._start(config, receivers[name], self._names, len(receivers))

    @property
    def couriers(self) -> int:
        """Receivers that this process writes to."""
        return len(self._running)

    @property
    def held_bytes(self) -> int:
        """Of points that wait until they have settled, or were sent lately, for all receivers."""
        return sum(courier.forwarder.held_bytes for _, courier, _, _ in self._running.values())

    @property
    def labelled(self) -> int:
        """Series whose labels are kept, of all receivers."""
        return sum(courier.forwarder.labelled for _, courier, _, _ in self._running.values())

    def besides(self) -> list[Beside]:
        """Of all receivers."""
        return [courier.beside for _, courier, _, _ in self._running.values()]

    def _start(self, config: Config, receiver: Receiver, names: Names, of: int) -> None:
        write = config.remote_write
        tally = self._tallies.by_receiver.setdefault(receiver.name, Tally())
        room = write.hold_bytes_max // of if write else 0
        courier = Courier(config, receiver, self._name, names, self._producer, self._clock, tally, room)
        part = _Part(self._lifecycle)
        task = self._group.create_task(courier.run(part))
        self._running[receiver.name] = _shape(config, receiver), courier, part, task
        _log.info("receiver_started", receiver=receiver.name)

    async def _stop(self, config: Config, name: str) -> None:
        _, _, part, task = self._running.pop(name)
        part.stop.set()
        await cancelled_after([task], DRAIN_S)
        await asyncio.wait([task])
        self._lifecycle.ended(remote_write_group(config.kafka, name))
        if name not in {r.name for r in served(config, self._only)}:
            del self._tallies.by_receiver[name]
        _log.info("receiver_stopped", receiver=name)

    @property
    def _waits(self) -> bool:
        return self._names is not None and self._names.waits

    async def run(self) -> None:
        """Until told to stop: read resources, and say whether all is open. Then stop all couriers, bounded."""
        while not await self._lifecycle.pause(
            REFRESH_S if self._lifecycle.ready and not self._waits else 0.2
        ):
            couriers = [courier for _, courier, _, _ in self._running.values()]
            self._lifecycle.ready = all(courier.opened for courier in couriers)
            if self._names is None:
                continue
            for target in await self._names.refresh(self._clock.now_s()):
                for courier in couriers:
                    courier.forwarder.forget_labels(target)
        for *_, part, _task in self._running.values():
            part.stop.set()
        await cancelled_after([task for *_, task in self._running.values()], DRAIN_S)


def hold_bytes_max(config: Config) -> int:
    """Of all receivers together."""
    return config.remote_write.hold_bytes_max if config.remote_write else 0


def served(config: Config, only: frozenset[str]) -> list[Receiver]:
    """The receivers that a process is for: all, or those that are named."""
    write = config.remote_write
    return [r for r in write.receivers if not only or r.name in only] if write else []


async def serve(
    config: Config, name: str, lifecycle: Lifecycle, path: Path | None = None, only: Sequence[str] = ()
) -> None:
    """Wire one remote writer and run it until told to stop. `config` is what stands in the file `path`, which is watched."""
    clock = SystemClock(config.run.clock_offset_s)
    settings = Settings(config, Members(config.s3, clock), clock, path)
    config = await settings.start()
    producer = Producer(config.kafka, name)
    tallies = Tallies()
    REGISTRY.register(tallies)
    try:
        async with open_archive(config.s3, clock) as archive, asyncio.TaskGroup() as group:
            writer = RemoteWriter(name, only, producer, clock, tallies, archive, lifecycle, group)
            BOUNDS.watch_tables()
            BOUNDS.watch(
                "points_held_bytes", lambda: writer.held_bytes, lambda: hold_bytes_max(settings.config)
            )
            BOUNDS.watch("labels_kept", lambda: writer.labelled, lambda: writer.couriers * LABELS_MAX)
            await writer.apply(config)
            group.create_task(settings.run(lifecycle, writer.apply))
            group.create_task(writer.run())
    finally:
        REGISTRY.unregister(tallies)
        await producer.close()


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "remote-write",
        help="run one remote writer: samples to Prometheus",
        description="Runs one remote writer: it reads raw batches and sends each receiver of remote_write its series, by remote write. Receivers do not wait "
        "for each other. Run as many as you like, up to the partitions of the raw topic. It needs Kafka and the receivers, and not PostgreSQL.",
    )
    add_worker_arguments(parser)
    parser.add_argument(
        "--name",
        default=os.environ.get("HEADGATE_REMOTE_WRITER"),
        help="its stable name, as remote-write-1",
    )
    parser.add_argument(
        "--receiver", action="append", default=[], metavar="NAME", help="serve only this one; may be repeated"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.name:
        raise Fatal("remote writer", "has no name", "give --name NAME or set HEADGATE_REMOTE_WRITER")
    path = local.config_path(args.config)
    config = load(path, environ=os.environ)
    if config.remote_write is None:
        raise Fatal(f"configuration {path}", "has no remote_write", "name receivers there")
    names = {receiver.name for receiver in config.remote_write.receivers}
    if unknown := sorted(set(args.receiver) - names):
        what = f"remote_write has no receiver {', '.join(unknown)}"
        raise Fatal(f"configuration {path}", what, f"there are {', '.join(sorted(names))}")
    return run_worker(
        args.name,
        partial(_main, config, args.name, path, tuple(args.receiver)),
        host=args.host,
        metrics_port=args.metrics_port,
    )


async def _main(config: Config, name: str, path: Path, only: tuple[str, ...], lifecycle: Lifecycle) -> None:
    await serve(config, name, lifecycle, path, only)
