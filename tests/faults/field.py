"""`Field`: one whole system to be hurt, with every process, link, clock and answer of it in reach.

Kafka, PostgreSQL, S3, a simulated AWS, a coordinator, three exporters and two consumers, under supervisord, in a folder of their own. Services have
periods of ten seconds, so that minutes hold hundreds of windows. Each worker speaks to each server through a `Proxy` of its own (`link`), and runs as
`tests.faults.worker`, which obeys the files in `points/<worker>/`: failpoints, and the offset of its clock; and which writes down how much it has asked for
that has no receipt yet.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import psutil

from shard_config.load import load
from shard_config.model import Config
from tests.faults.setting import (
    ACCOUNTS,
    CONSUMERS,
    EXPORTERS,
    METRICS,
    PARTS,
    REGIONS,
    SERVICES,
    Link,
    Part,
    merged,
    truth_of,
    wire,
)
from tests.faults.worker import CLOCK_READ_S
from workers.local import LocalStack
from workers.servers import LOOPBACK
from workers.stack import CHECKOUT, Endpoints, StackSpec
from workers.supervise import Supervisor
from workers.world import World

__all__ = ["Field", "Interruption", "Link", "Part", "Second", "open_field"]

SAMPLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Interruption:
    """A worker was killed or paused with `in_flight` metrics asked for and without a receipt; `at_s` is Unix time."""

    worker: str
    how: str
    at_s: float
    in_flight: int


@dataclass(slots=True)
class Second:
    """A second process under the name of a worker. `code` is None while it runs."""

    process: asyncio.subprocess.Process
    log: Path

    @property
    def code(self) -> int | None:
        return self.process.returncode

    async def exits(self, timeout_s: float) -> int | None:
        """Wait for its end by itself; None where it is not over in time."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), timeout_s)
        return self.process.returncode


@dataclass
class Field:
    """Made by `open_field`. Methods that wait are bounded, and raise AssertionError where the time is up."""

    home: Path
    seed: int
    truth: World
    stack: LocalStack
    interruptions: list[Interruption] = field(default_factory=list)
    """Kills and pauses so far: what was in flight then may be paid twice."""
    group_was_hurt: bool = False
    """Whether Kafka, or the way to it, was struck: exporters may have been out of their group without knowing it."""
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """The most resident memory that each worker was seen with."""
    advanced_s: float = 0.0
    """How far the field's time is ahead of the machine's."""
    _links: dict[tuple[str, Part], Link] = field(default_factory=dict)
    _faults: list[Mapping[str, Any]] = field(default_factory=list)
    _seconds: int = 0

    # --- who is there -------------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """As it stands in the file that commands get: past every link."""
        return load(self.stack.config_path, environ={})

    @property
    def endpoints(self) -> Endpoints:
        return self.stack.endpoints

    @property
    def points(self) -> Path:
        return self.home / "points"

    @property
    def workers(self) -> list[str]:
        """All of them by name, the coordinator first."""
        return list(self.stack.metrics_ports)

    @property
    def exporters(self) -> list[str]:
        return [name for name in self.workers if name.startswith("exporter-")]

    @property
    def consumers(self) -> list[str]:
        return [name for name in self.workers if name.startswith("consumer-")]

    async def pid(self, program: str, timeout_s: float = 30.0) -> int:
        """Of a worker or a server ("kafka", "postgres", "s3", "simulator"); waits for one that is being started again."""
        found = 0

        async def runs() -> bool:
            nonlocal found
            found = {p.name: p.pid for p in await self.stack.processes()}[program]
            return bool(found)

        await self.until(runs, f"{program} runs", timeout_s)
        return found

    async def ready(self, worker: str, timeout_s: float = 90.0) -> None:
        """Wait until a worker says that it is ready."""
        url = f"http://{LOOPBACK}:{self.stack.metrics_ports[worker]}/readyz"
        await self.until(lambda: _answers(url), f"{worker} is ready", timeout_s)

    # --- processes ----------------------------------------------------------------------------------------------

    async def kill(self, program: str) -> int:
        """SIGKILL; supervisord starts it again within a second or so. Returns the metrics in flight (0 for what is no exporter)."""
        return await self._signal(program, signal.SIGKILL, "killed")

    async def stop(self, program: str) -> int:
        """SIGSTOP: it stands still until `cont`. Returns the metrics in flight."""
        return await self._signal(program, signal.SIGSTOP, "paused")

    async def cont(self, program: str) -> None:
        """SIGCONT; nothing happens where it is not stopped, or is gone."""
        with suppress(ProcessLookupError):
            os.kill(await self.pid(program), signal.SIGCONT)

    async def restart(self, worker: str) -> None:
        """As a deployment does: SIGTERM, drain, start; returns when another process is ready."""
        old = await self.pid(worker)
        os.kill(old, signal.SIGTERM)

        async def another() -> bool:
            return await self.pid(worker) != old

        await self.until(another, f"{worker} is started again", 60.0)
        await self.ready(worker)

    @asynccontextmanager
    async def down(self, program: str) -> AsyncIterator[None]:
        """Stopped in order (SIGTERM, or the server's own signal), and started again at the end; returns then without waiting for readiness."""
        supervisor = self._supervisor()
        await asyncio.to_thread(supervisor.stop, [program])
        try:
            yield
        finally:
            await asyncio.to_thread(supervisor._call, "startProcessGroup", program, False)

    @asynccontextmanager
    async def second(self, worker: str) -> AsyncIterator[Second]:
        """A second process with the name of a worker, on the same links; killed at the end where it still runs."""
        self._seconds += 1
        log = self.stack.logs / f"{worker}-second-{self._seconds}.log"
        state = self.stack._running()
        program = state._worker(worker, 0)
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *program.command,
                cwd=CHECKOUT,
                env=self.stack._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Second(process, log)
        finally:
            if process.returncode is None:
                self.interruptions.append(
                    Interruption(worker, "killed", time.time(), self._in_flight(worker, process.pid))
                )
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _signal(self, program: str, number: signal.Signals, how: str) -> int:
        pid = await self.pid(program)
        os.kill(pid, number)
        in_flight = self._in_flight(program, pid)
        self.interruptions.append(Interruption(program, how, time.time(), in_flight))
        return in_flight

    def _in_flight(self, worker: str, pid: int) -> int:
        """What it has asked for without a receipt; also of one that is dead."""
        try:
            asked: int = struct.unpack_from("q", (self.points / worker / f"{pid}.asked").read_bytes())[0]
            return asked
        except (OSError, struct.error):
            return 0

    def _supervisor(self) -> Supervisor:
        return self.stack._connect(self.stack._running())

    # --- failpoints and clocks ----------------------------------------------------------------------------------

    def arm(self, worker: str, point: str, number: signal.Signals) -> None:
        """Have the worker send itself SIGKILL or SIGSTOP when it next reaches a point (`tests.faults.worker.POINTS`)."""
        (self.points / worker / f"{point}.hit").unlink(missing_ok=True)
        (self.points / worker / point).write_text(str(int(number)))

    def disarm(self, worker: str, point: str) -> None:
        """What was not reached is not armed any more."""
        (self.points / worker / point).unlink(missing_ok=True)

    async def reached(self, worker: str, point: str, timeout_s: float) -> bool:
        """Wait for a point that was armed; False, and disarmed, where it is not reached in time."""
        hit = self.points / worker / f"{point}.hit"

        async def is_there() -> bool:
            return hit.exists()

        try:
            await self.until(is_there, point, timeout_s)
        except AssertionError:
            self.disarm(worker, point)
            if not hit.exists():
                return False
        said = json.loads(hit.read_text())
        how = "killed" if said["signal"] == signal.SIGKILL else "paused"
        self.interruptions.append(Interruption(worker, how, time.time(), said["in_flight"]))
        hit.unlink()
        return True

    def now_s(self) -> int:
        """By the clocks of the field, those apart that are wrong."""
        return int(time.time() + self.advanced_s)

    def clock(self, worker: str, offset_s: float) -> None:
        """Have a worker's wall clock wrong by so much, within a quarter of a second and across restarts; 0: as it should be."""
        self._write_clock(worker, offset_s + self.advanced_s)

    async def advance(self, seconds: float) -> None:
        """Move everybody's time on, the simulated AWS's too; returns when all have noticed."""
        self.advanced_s += seconds
        for name in ("simulator", *self.workers):
            self._write_clock(name, self.advanced_s)
        await asyncio.sleep(2 * CLOCK_READ_S)

    def _write_clock(self, program: str, offset_s: float) -> None:
        path = self.points / program / "clock"
        path.with_suffix(".new").write_text(repr(offset_s))
        path.with_suffix(".new").replace(path)

    # --- network and source -------------------------------------------------------------------------------------

    def link(self, worker: str, part: Part) -> Link:
        """The connection of one worker to one server."""
        return self._links[worker, part]

    def links(self, part: Part) -> list[Link]:
        """Of all workers to one server."""
        return [link for (_, to), link in self._links.items() if to == part]

    def every_link(self) -> list[tuple[tuple[str, Part], Link]]:
        """All of them, by worker and part."""
        return list(self._links.items())

    @asynccontextmanager
    async def simulator_faults(self, **faults: Any) -> AsyncIterator[None]:
        """Have the simulated AWS misbehave (`workers.simulated.faults.Faults`), beside what else is active: of two numbers the
        greater holds, and lists are joined."""
        self._faults.append(faults)
        try:
            await self.aws("/faults", merged(self._faults) | {"seed": self.seed})
            yield
        finally:
            self._faults.remove(faults)
            await self.aws("/faults", merged(self._faults) | {"seed": self.seed})

    async def aws(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """GET (or POST, with a body) of the simulated AWS, past every link: /billing, /faults, /accounts."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as http:
            url = self.endpoints.aws_url + path
            async with http.get(url) if body is None else http.post(url, json=body) as response:
                assert response.status == 200, await response.text()
                return await response.json()

    async def sql(self, query: str, *args: Any) -> list[asyncpg.Record]:
        """Rows of the store, past every link. Raises what asyncpg raises, and OSError."""
        connection = await asyncpg.connect(self.endpoints.postgres_dsn, timeout=10, command_timeout=60)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(query, *args)
            return rows
        finally:
            await connection.close(timeout=5)

    # --- helpers ------------------------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
        """Ask a condition until it is true; what it raises counts as no. AssertionError after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        last: BaseException | None = None
        while True:
            try:
                if await condition():
                    return
            except Exception as error:
                last = error
            assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what} ({last})"
            await asyncio.sleep(0.1)

    async def watch_memory(self) -> None:
        """Until cancelled: keep the most that each worker was seen with."""
        while True:
            with suppress(Exception):  # supervisord may be busy
                for process in await self.stack.processes():
                    if process.pid:
                        with suppress(psutil.Error):
                            rss = psutil.Process(process.pid).memory_info().rss
                            self.memory_bytes[process.name] = max(rss, self.memory_bytes.get(process.name, 0))
            await asyncio.sleep(SAMPLE_S)


@asynccontextmanager
async def open_field(home: Path, seed: int, mutant: str = "") -> AsyncIterator[Field]:
    """Start a whole system, ready, and end it. `mutant` is planted in all workers (`tests.faults.mutants`)."""
    made = Field(home, seed, truth_of(seed), LocalStack(home))
    spec = StackSpec(
        lambda endpoints: wire(made._links, made.points, endpoints),
        shards=EXPORTERS,
        consumers=CONSUMERS,
        simulate_args=(
            *("--accounts", str(ACCOUNTS), "--regions", ",".join(REGIONS), "--services", ",".join(SERVICES)),
            *("--metrics", str(METRICS), "--seed", str(seed)),
        ),
        worker_command=(sys.executable, "-m", "tests.faults.worker"),
    )
    async with AsyncExitStack() as exits:
        for worker in spec.worker_names():
            (made.points / worker).mkdir(parents=True, exist_ok=True)
            for part in PARTS:
                made._links[worker, part] = await exits.enter_async_context(Link())
        (made.points / "simulator").mkdir(exist_ok=True)
        if mutant:
            (made.points / "mutant").write_text(mutant)
        exits.push_async_callback(made.stack.stop)
        await made.stack.start(spec)
        memory = asyncio.create_task(made.watch_memory())
        try:
            yield made
        finally:
            memory.cancel()
            await asyncio.wait([memory])


async def _answers(url: str) -> bool:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(2)) as http,
        http.get(url) as response,
    ):
        return response.status == 200
