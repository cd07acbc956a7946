"""Everything that a worker writes to stands still for minutes, under load: memory stays under the chart's limits, and what waits, waits in Kafka.

    make faults STANDSTILL=10

On one field, at once: PostgreSQL takes nothing from the consumers; S3 nothing from one exporter; Kafka nothing from another; and a receiver of remote write
swallows what it is sent, and never answers. Besides, somebody publishes as much as a million series each five minutes would. Nothing is closed: both sides
believe in their connections. Then all of it goes on, and the consumers land what waited. Exit code 1 where a worker passed its limit, held what Kafka should, or
did not get through with it afterwards.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import yaml

from ingest import wire
from ingest.log import Outgoing, Producer
from ingest.model import Batch, Series, SeriesKey, Target, series_ids
from tests.faults.field import Field, open_field
from tests.faults.kinds_log import log_ends
from workers.servers import LOOPBACK
from workers.stack import CHECKOUT

RECORDS_PER_S, SERIES, POINTS = 7, 500, 5
"""17,500 points a second: a million series, a point a minute, asked for each five minutes, are 16,700."""
TABLES_A_TARGET = 12
SAMPLE_S = 1.0
DRAIN_S = 300.0
WRITER = "remote-write-1"
VALUES = Path(__file__).resolve().parents[2] / "helm" / "headgate" / "values.yaml"
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def limits_bytes() -> dict[str, int]:
    """The memory that the chart gives a worker, by its kind."""
    values = yaml.safe_load(VALUES.read_text())
    sinks = values["sinks"]
    parts = {
        "coordinator": values["coordinator"],
        "exporter": values["exporter"],
        "consumer": sinks["postgres"],
        "remote-write": sinks["remoteWrite"],
    }
    return {kind: _bytes(part["resources"]["limits"]["memory"]) for kind, part in parts.items()}


def _bytes(text: str) -> int:
    number, unit = text[:-2], text[-2:]
    return int(number) * UNITS[unit]


@dataclass(slots=True)
class Course:
    """One worker's memory: before, and the most while everything stood still and after it."""

    before_bytes: int = 0
    still_bytes: int = 0
    after_bytes: int = 0


@dataclass(slots=True)
class Found:
    """What came of it."""

    minutes: float
    published: int = 0
    waited: int = 0
    """Records of `raw` that had not landed when everything went on."""
    drained_s: float | None = None
    courses: dict[str, Course] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)


class Load:
    """Publishes to `raw` what exporters would."""

    def __init__(self, of: Field) -> None:
        config = of.config
        self._topic = config.kafka.topic("raw")
        self._producer = Producer(config.kafka, "load")
        self._targets = [Target("cloudwatch", a.id, region) for a in config.accounts for region in a.regions]
        self._tables = [
            tuple(
                Series(SeriesKey(of.account, of.region, "AWS/EC2", f"load{part}-{i}", (), "Average", 60))
                for i in range(SERIES)
            )
            for part in range(TABLES_A_TARGET)
            for of in self._targets
        ]
        self._ids = [series_ids(table) for table in self._tables]
        self.published = 0

    async def run(self) -> None:
        """Until cancelled."""
        started_s = time.monotonic()
        try:
            while True:
                due = int((time.monotonic() - started_s) * RECORDS_PER_S) - self.published
                for _ in range(min(due, 100)):
                    target = self._targets[self.published % len(self._targets)]
                    value = self._value(target)
                    await self._producer.send(self._topic, [Outgoing(wire.raw_key(target), value)])
                    self.published += 1
                await asyncio.sleep(0.1)
        finally:
            await self._producer.close()

    def _value(self, target: Target) -> bytes:
        at = self.published % len(self._tables)
        # Each round of the tables is five minutes further, from a day ago on.
        start_s = int(time.time()) // 300 * 300 - 86_400 + self.published // len(self._tables) * 300
        batch = Batch(
            task_id=f"{self.published:032x}",
            target=target,
            service="ec2",
            observed_at_ms=int(time.time() * 1000),
            revision=0,
            grid_s=300,
            series=self._tables[at],
            counts=np.full(SERIES, POINTS, np.int32),
            timestamps_s=np.tile(np.arange(POINTS, dtype=np.int64) * 60 + start_s, SERIES),
            values=np.random.default_rng(self.published).random(SERIES * POINTS),
            ids=self._ids[at],
        )
        [payload] = wire.encode_batch(batch)
        return payload.value


@asynccontextmanager
async def swallowing() -> AsyncIterator[int]:
    """A receiver that takes everything and answers nothing; its port."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while await reader.read(65_536):
                pass
        writer.transport.abort()

    server = await asyncio.start_server(swallow, LOOPBACK, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def remote_writer(of: Field, port: int) -> AsyncIterator[int]:
    """A remote writer for a receiver at this port; its pid."""
    config = yaml.safe_load(of.stack.config_path.read_text())
    url = f"http://{LOOPBACK}:{port}/api/v1/write"
    config["remote_write"] = {
        "resources": False,  # names of resources are a matter of their own, and come late
        "receivers": [{"name": "swallows", "url": url, "out_of_order_window_s": 7 * 86_400}],
    }
    path = of.home / "remote-write.yaml"
    path.write_text(yaml.safe_dump(config))
    with (of.stack.logs / f"{WRITER}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "workers.cli", "remote-write", "--config", str(path), "--name", WRITER),
            cwd=CHECKOUT,
            env=of.stack._environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process.pid
        if process.returncode is not None:
            raise AssertionError(f"{WRITER} ended with {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def watch(of: Field, writer_pid: int, courses: dict[str, Course], phase: list[str]) -> None:
    """Until cancelled: keep the most of each worker and phase."""
    while True:
        with suppress(Exception):  # supervisord may be busy
            pids = {p.name: p.pid for p in await of.stack.processes() if p.name in of.workers and p.pid}
            for name, pid in (pids | {WRITER: writer_pid}).items():
                with suppress(psutil.Error):
                    rss = int(psutil.Process(pid).memory_info().rss)
                    course = courses.setdefault(name, Course())
                    attribute = f"{phase[0]}_bytes"
                    setattr(course, attribute, max(rss, getattr(course, attribute)))
        await asyncio.sleep(SAMPLE_S)


async def waiting(of: Field) -> int:
    """Records of `raw` that have not landed."""
    config = of.config
    topic = config.kafka.topic("raw")
    ends = await log_ends(config, topic)
    rows = await of.sql("SELECT partition, next FROM positions WHERE topic = $1 AND sink = 'postgres'", topic)
    return sum(ends[r["partition"]] - r["next"] for r in rows)


async def standstill(home: Path, minutes: float, seed: int = 1) -> Found:
    """Run it all. Everything is ended at its end."""
    found = Found(minutes)
    phase = ["before"]
    async with open_field(home, seed) as of, swallowing() as port, remote_writer(of, port) as writer_pid:
        still = [
            *(of.link(consumer, "postgres") for consumer in of.consumers),
            of.link(of.exporters[0], "s3"),
            of.link(of.exporters[1], "kafka"),
        ]
        load = Load(of)
        tasks = [
            asyncio.create_task(load.run()),
            asyncio.create_task(watch(of, writer_pid, found.courses, phase)),
        ]
        try:
            await asyncio.sleep(min(30.0, 60 * minutes))
            phase[0] = "still"
            for link in still:
                link.stall()
            await asyncio.sleep(60 * minutes)
            tasks[0].cancel()
            found.published, found.waited = load.published, await waiting(of)
            phase[0] = "after"
            for link in still:
                link.resume()
            began_s = time.monotonic()
            while time.monotonic() - began_s < DRAIN_S:
                if await waiting(of) < RECORDS_PER_S:
                    found.drained_s = time.monotonic() - began_s
                    break
                await asyncio.sleep(1.0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    found.complaints = complaints(found, limits_bytes())
    return found


def complaints(found: Found, limits: dict[str, int]) -> list[str]:
    """What broke."""
    said = []
    for name, course in sorted(found.courses.items()):
        most, limit = max(course.still_bytes, course.after_bytes), limits[kind_of(name)]
        if most >= limit:
            said.append(f"I5 {name} had {most >> 20} MiB of {limit >> 20}")
    if found.waited < 0.8 * RECORDS_PER_S * 60 * found.minutes:
        said.append(f"only {found.waited} records waited in Kafka: nothing stood still")
    if found.drained_s is None:
        said.append(f"I6 what waited had not landed {DRAIN_S:.0f} s later")
    return said


def kind_of(worker: str) -> str:
    """As "exporter" of exporter-1."""
    return worker if worker == "coordinator" else worker.rpartition("-")[0]


def table(found: Found) -> str:
    """For people, in Markdown."""
    limits = limits_bytes()
    lines = [
        f"{found.minutes:g} minutes, {found.published:,} records of {SERIES * POINTS:,} points published; {found.waited:,} records waited in Kafka"
        + (f", and had landed {found.drained_s:.0f} s later" if found.drained_s is not None else ""),
        "",
        "| worker | what stood still | before | during | after | limit |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    what = {"consumer": "PostgreSQL", WRITER: "its receiver", "exporter-1": "S3", "exporter-2": "Kafka"}
    for name, course in sorted(found.courses.items()):
        of = what.get(name) or what.get(kind_of(name)) or "nothing of its own"
        cells = [course.before_bytes, course.still_bytes, course.after_bytes, limits[kind_of(name)]]
        lines.append(f"| {name} | {of} | " + " | ".join(f"{b >> 20} MiB" for b in cells) + " |")
    return "\n".join(lines)


def main(minutes: float, home: Path, seed: int) -> int:
    """`make faults STANDSTILL=minutes`."""
    found = asyncio.run(standstill(home, minutes, seed))
    print(table(found), flush=True)
    for complaint in found.complaints:
        print(f"BROKEN {complaint}", flush=True)
    return int(bool(found.complaints))


if __name__ == "__main__":
    home = Path(os.environ.get("HEADGATE_HOME", ".headgate/standstill")).resolve()
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0, home, seed=1))
