"""`headgate` as a field runs it: `python -m tests.faults.worker COMMAND …` is the same command line, after something was planted from outside.

What is planted lies in the stack's home (`points/<worker>/`, see `tests.faults.field`), and is looked at when it matters:

* a file named after one of POINTS holds a signal's number: whoever reaches the point takes the file, notes `<point>.hit`, and sends itself that;
* `clock` is the offset of the wall clock, in seconds;
* `kafka.json` is the broker's port and the one to connect to instead; `headgate.yaml` stands for the configuration of the command line;
* `<pid>.asked`, which is written here, is five numbers: how many metrics were asked for by tasks that have no receipt yet, by tasks that ended
  without one, and in requests whose answer was lost; of tasks that neither archived nor told what they cost, how many were asked for again,
  beyond the first time that the run asked for the same metric and time; and how many were asked for by runs whose task another had archived meanwhile.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import mmap
import os
import struct
import sys
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

POINTS = {
    "exporter": (
        *(
            "before_put",
            "after_object",
            "after_put",
            "before_raw_ack",
            "after_raw_ack",
            "before_receipt",
            "after_receipt",
        ),
        *("before_commit", "after_commit"),
    ),
    "consumer": ("in_hand", "in_transaction", "between_commits"),
    "coordinator": ("before_ledger", "between_topics", "after_collect"),
}
"""By kind of worker: where it can be struck."""

CLOCK_READ_S = 0.2
QUERIES_MAX = 500
"""Of a call (`ingest.sources.metric_data.QUERIES_PER_CALL_MAX`)."""
ASKED = struct.Struct("5q")
"""Of `<pid>.asked`."""

Async = Callable[..., Awaitable[Any]]


class Repeats:
    """How often one run of a task has asked for each metric and time. Continuation pages are not billed in a field, and not counted."""

    def __init__(self) -> None:
        self.again = 0
        """Metrics beyond the first time that each was asked for."""
        self._times: dict[object, array[int]] = {}

    def add(self, request: Mapping[str, Any]) -> None:
        for times, row in self._rows(request):
            self.again += times[row] > 0
            times[row] += 1

    def take_back(self, request: Mapping[str, Any]) -> None:
        """One asking of these was not billed."""
        for times, row in self._rows(request):
            times[row] -= 1
            self.again -= times[row] > 0

    def _rows(self, request: Mapping[str, Any]) -> Iterator[tuple[array[int], int]]:
        """(times by row, row) of each metric. What is asked again may be some of a call's rows: those are what is counted, not requests."""
        if request.get("NextToken"):
            return
        queries = request["MetricDataQueries"]
        call = (queries._table.series[queries._first].key, request["StartTime"], request["EndTime"])
        times = self._times.setdefault(
            call, array("H", bytes(2 * QUERIES_MAX))
        )  # a Counter has 40 times that
        for row in queries._rows:
            yield times, row


class Points:
    """The files of one worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._asked = (folder / f"{os.getpid()}.asked").open("w+b")
        self._asked.truncate(ASKED.size)
        self._map = mmap.mmap(self._asked.fileno(), ASKED.size)  # outlives a SIGKILL
        self._by_task: Counter[str] = Counter()
        self._repeats: dict[str, Repeats] = {}
        self._abandoned = 0
        self._abandoned_again = 0
        self._lost = 0
        self._raced = 0
        self._offset_ms = 0
        self._read_s = 0.0

    def reach(self, point: str) -> None:
        """Strike this process where the point is armed."""
        armed = self.folder / point
        if not armed.exists():
            return
        number = int(armed.read_text())
        try:
            armed.unlink()
        except FileNotFoundError:
            return  # another one of this name was quicker
        said = {"signal": number, "in_flight": ASKED.unpack_from(self._map)[0]}
        new = self.folder / f"{point}.new"
        new.write_text(json.dumps(said))
        new.replace(self.folder / f"{point}.hit")
        os.kill(os.getpid(), number)

    def asked(self, task_id: str, request: Mapping[str, Any]) -> None:
        self._by_task[task_id] += len(request["MetricDataQueries"])
        self._repeats.setdefault(task_id, Repeats()).add(request)
        self._write()

    def refused(self, task_id: str, request: Mapping[str, Any]) -> None:
        """AWS said no: it bills nothing."""
        self._by_task[task_id] -= len(request["MetricDataQueries"])
        if (repeats := self._repeats.get(task_id)) is not None:
            repeats.take_back(request)
        self._write()

    def told(self, task_id: str) -> None:
        """What the task has cost is archived, or in its receipt, and so is what it asked again."""
        self._repeats.pop(task_id, None)
        self._write()

    def ended(self, task_id: str, billed: int | None, *, raced: bool = False) -> None:
        """The task is over; `billed` is what its receipt says was answered, None where it has none. `raced`: another was the first to archive it."""
        asked, repeats = self._by_task.pop(task_id, 0), self._repeats.pop(task_id, None)
        if billed is None:
            self._abandoned += asked
            self._abandoned_again += repeats.again if repeats else 0
        else:
            self._lost += max(0, asked - billed)
            self._raced += billed if raced else 0
        self._write()

    def offset_ms(self) -> int:
        """Of the clock; read anew now and then."""
        now_s = time.monotonic()
        if now_s - self._read_s > CLOCK_READ_S:
            self._read_s = now_s
            try:
                self._offset_ms = int(float((self.folder / "clock").read_text()) * 1000)
            except (FileNotFoundError, ValueError):
                self._offset_ms = 0
        return self._offset_ms

    def _write(self) -> None:
        again = self._abandoned_again + sum(repeats.again for repeats in self._repeats.values())
        self._map[:] = ASKED.pack(self._by_task.total(), self._abandoned, self._lost, again, self._raced)


def around(
    owner: Any, name: str, before: Callable[..., str], after: Callable[..., str], points: Points
) -> None:
    """Reach points before and after a method; what `before` and `after` make of its arguments, "" for none."""
    method: Async = getattr(owner, name)

    async def patched(*args: Any, **kwargs: Any) -> Any:
        if point := before(*args):
            points.reach(point)
        result = await method(*args, **kwargs)
        if point := after(*args):
            points.reach(point)
        return result

    setattr(owner, name, patched)


def nowhere(*_: Any) -> str:
    return ""


def always(point: str) -> Callable[..., str]:
    return lambda *_: point


def of_topic(points: Mapping[str, str]) -> Callable[..., str]:
    """Of a producer's sends: by the end of the topic's name."""
    return lambda _, topic, __: points.get(topic.rpartition(".")[2], "")


def of_object(_: Any, key: str, *__: Any) -> str:
    """Of the archive's puts: of a task's objects, not of the marks of its runs."""
    return "" if "begun/v1/" in key else "after_object"


def of_commit(topic: str, point: str) -> Callable[..., str]:
    """Of a consumer's commits that move something."""

    def found(consumer: Any, next_offsets: Mapping[int, Any]) -> str:
        return point if next_offsets and consumer.topic.endswith("." + topic) else ""

    return found


def plant_exporter(points: Points) -> None:
    from botocore.exceptions import ClientError

    from ingest.archive import S3Archive
    from ingest.collect import Answer, Collector
    from ingest.group import Consumer
    from ingest.log import Outgoing, Producer
    from ingest.model import Task
    from ingest.ports import ArchivedTask
    from ingest.sources.transport import Calls

    # Whose task this is; and by when what it costs is told: before the points that come after that.
    now: ContextVar[str] = ContextVar("task")
    put, send = S3Archive.put, Producer.send

    async def archived(self: S3Archive, task: ArchivedTask) -> ArchivedTask:
        there = await put(self, task)
        if there.receipt == task.receipt:
            points.told(task.receipt.task_id)
        return there

    async def sent_off(self: Producer, topic: str, records: Sequence[Outgoing]) -> None:
        await send(self, topic, records)
        if topic.endswith(".ledger"):
            points.told(now.get(""))

    setattr(S3Archive, "put", archived)  # noqa: B010
    setattr(Producer, "send", sent_off)  # noqa: B010
    around(S3Archive, "put", always("before_put"), always("after_put"), points)
    around(S3Archive, "_put", nowhere, of_object, points)
    sent = {"raw": "before_raw_ack", "ledger": "before_receipt"}
    acked = {"raw": "after_raw_ack", "ledger": "after_receipt"}
    around(Producer, "send", of_topic(sent), of_topic(acked), points)
    around(
        Consumer,
        "commit",
        of_commit("collect", "before_commit"),
        of_commit("collect", "after_commit"),
        points,
    )

    # How much was asked without a receipt.
    answer, publish, ask = Collector.answer, Collector.publish, Calls.get_metric_data

    async def answered(self: Collector, task: Task, *, maybe_second_try: bool) -> Answer:
        now.set(task.task_id)
        try:
            return await answer(self, task, maybe_second_try=maybe_second_try)
        except BaseException:
            points.ended(task.task_id, None)
            raise

    async def published(self: Collector, one: Answer) -> None:
        task_id = one.archived.receipt.task_id
        now.set(task_id)
        try:
            await publish(self, one)
        except asyncio.CancelledError:
            points.ended(task_id, None)
            raise
        billed = sum(item.outcome.metrics_billed for item in one.own.items) if one.own else 0
        points.ended(task_id, billed, raced=one.own is not None and not (one.ours or one.refused))

    async def asking(self: Calls, access: Any, request: Mapping[str, Any]) -> Any:
        task_id = now.get("")
        points.asked(task_id, request)
        try:
            return await ask(self, access, request)
        except ClientError:
            points.refused(task_id, request)
            raise

    setattr(Collector, "answer", answered)  # noqa: B010
    setattr(Collector, "publish", published)  # noqa: B010
    setattr(Calls, "get_metric_data", asking)  # noqa: B010


def plant_consumer(points: Points) -> None:
    from ingest import seal
    from ingest.group import Consumer
    from ingest.sinks import postgres
    from ingest.sinks.postgres import PostgresSink

    around(PostgresSink, "land", always("in_hand"), nowhere, points)
    around(postgres, "_insert_rows", always("in_transaction"), nowhere, points)
    around(Consumer, "commit", of_commit("raw", "between_commits"), nowhere, points)
    setattr(seal, "RECHECK_S", 10)  # noqa: B010


def plant_coordinator(points: Points) -> None:
    from ingest import heal, heal_store
    from ingest.log import Producer
    from workers import coordinator

    planned = {"ledger": "before_ledger", "collect": "between_topics"}
    around(Producer, "send", of_topic(planned), of_topic({"collect": "after_collect"}), points)
    # Minutes hold what elsewhere takes hours: what waits here waits accordingly.
    for owner, name, value in (
        (heal_store, "GRACE_S", 10),
        (heal, "RELANDING_S", 30),
        (heal, "DOUBLINGS_MAX", 3),
        (coordinator, "MEMORY_WAIT_S", 10.0),
    ):
        assert hasattr(owner, name)
        setattr(owner, name, value)


def plant_clock(points: Points) -> None:
    """One that can be moved."""
    from ingest.clock import SystemClock

    now_ms = SystemClock.now_ms
    setattr(SystemClock, "now_ms", lambda self: now_ms(self) + points.offset_ms())  # noqa: B010


def plant_kafka(points: Points) -> None:
    """By its link: brokers tell clients where they are."""
    from aiokafka.conn import AIOKafkaConnection

    broker, link = json.loads((points.folder / "kafka.json").read_text())
    init = AIOKafkaConnection.__init__

    def linked(self: Any, host: str, port: int, **options: Any) -> None:
        init(self, host, link if port == broker else port, **options)

    AIOKafkaConnection.__init__ = linked


def plant_simulator() -> None:
    """The simulated AWS has the field's services, and metrics that can come to be."""
    from tests.faults.setting import UNBORN_SHARE, profiles
    from workers import simulator
    from workers.simulated.values import UNBORN
    from workers.world import World

    setattr(simulator, "shipped_services", profiles)  # noqa: B010
    setattr(simulator, "World", partial(World, newborn_share=UNBORN_SHARE, newborn_at_s=UNBORN))  # noqa: B010


PLANT = {"exporter": plant_exporter, "consumer": plant_consumer, "coordinator": plant_coordinator}
NAMED = {"exporter": "--shard", "consumer": "--name"}


def main(argv: Sequence[str]) -> int:
    from workers.cli import main as headgate
    from workers.supervise import MARK

    command, *rest = argv
    home = Path(os.environ[MARK]) / "points"
    if command == "simulate":
        plant_clock(Points(home / "simulator"))
        plant_simulator()
    elif command in PLANT:
        name = rest[rest.index(NAMED[command]) + 1] if command in NAMED else command
        points = Points(home / name)
        plant_clock(points)
        plant_kafka(points)
        PLANT[command](points)
        if (mutant := home / "mutant").exists():
            importlib.import_module("tests.faults.mutants").plant(mutant.read_text())
        rest[rest.index("--config") + 1] = str(points.folder / "headgate.yaml")
    return headgate([command, *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
