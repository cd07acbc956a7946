"""The local stack: Kafka, PostgreSQL, S3, a simulated AWS and the workers, each a process of this machine, under supervisord.

* Everything lies in `.headgate/` of the current folder (`HEADGATE_HOME` names another): `run/` is this run's configuration, state and
  data, `logs/` a log a process. Both are of one run: a start removes those of the last.
* One stack a folder. Servers answer before `headgate setup` runs, and that is done before the first worker starts.
* A process that dies is started again; the S3 alone is not, for it would come back empty.
* Nothing is left behind: the stack ends with the process that started it, even where that is killed, and what a killed supervisord left
  is found by its environment and killed at the next `down` or start.
* Nothing here can reach a real AWS: the environment's AWS settings are replaced.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ingest.errors import Fatal, HeadgateError, Transient
from shard_config.model import Config
from workers.servers import (
    LOOPBACK,
    KafkaServer,
    PostgresServer,
    S3Server,
    Server,
    free_ports,
    last_line,
    local_environment,
)
from workers.supervise import Process, Program, Supervisor, write_atomically

if TYPE_CHECKING:
    import psutil

MARK = "HEADGATE_STACK"
"""In the environment of every process of a stack: its home."""

READY_TIMEOUT_S = 90.0
SHARDS_MAX = 64

Progress = Callable[[str, str], None]
"""Called with a name and what has become of it: ("kafka", "ready")."""

_CHECKOUT = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the parts of a stack are."""

    kafka_bootstrap: str
    postgres_dsn: str
    s3_url: str
    aws_url: str
    """The simulated AWS."""
    workers_file: str
    """The workers' metrics endpoints, in Prometheus' file_sd format; kept up to date."""


@dataclass(frozen=True, slots=True)
class StackSpec:
    """What to start."""

    config_text: Callable[[Endpoints], str]
    """Gives the text of headgate.yaml, once the addresses are known."""
    shards: int = 3
    consumers: int = 2
    simulate_args: tuple[str, ...] = ()
    """Appended to `headgate simulate --host … --port …`."""
    worker_command: tuple[str, ...] = (sys.executable, "-m", "workers.cli")
    """What stands for `headgate` on a command line."""


@dataclass(frozen=True, slots=True)
class _State:
    """What another process needs to find and change the stack: run/state.json."""

    supervisor_pid: int
    socket: str
    endpoints: Endpoints
    worker_command: tuple[str, ...]
    programs: tuple[Program, ...]
    metrics_ports: dict[str, int]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> _State:
        raw: dict[str, Any] = json.loads(text)
        programs = tuple(Program(**{**p, "command": tuple(p["command"])}) for p in raw["programs"])
        return cls(
            raw["supervisor_pid"],
            raw["socket"],
            Endpoints(**raw["endpoints"]),
            tuple(raw["worker_command"]),
            programs,
            raw["metrics_ports"],
        )


def default_home() -> Path:
    return Path(os.environ.get("HEADGATE_HOME", ".headgate")).resolve()


class LocalStack:
    """The stack of one home. `start` makes this process its owner: it ends with it. `find_running` gives one to look at and change."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home.resolve() if home else default_home()
        self.run = self.home / "run"
        self.logs = self.home / "logs"
        self.config_path = self.run / "headgate.yaml"
        self._state_path = self.run / "state.json"
        self._supervisor: Supervisor | None = None
        self._lock: IO[str] | None = None

    # --- start and stop ---------------------------------------------------------------------------------------

    async def start(self, spec: StackSpec, progress: Progress = lambda name, what: None) -> Endpoints:
        """Start everything and wait until it is ready. Raises Fatal, and leaves nothing then, nor where it is cancelled."""
        self._lock = self._acquire()
        try:
            return await self._start(spec, progress)
        except BaseException:
            await asyncio.shield(self.stop())
            raise

    async def _start(self, spec: StackSpec, progress: Progress) -> Endpoints:
        await asyncio.to_thread(kill_leftovers, self.home)
        for folder in (self.run, self.logs):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        kafka, postgres, s3 = KafkaServer(self.run), PostgresServer(self.run), S3Server(self.run)
        servers: tuple[Server, ...] = (postgres, kafka, s3)
        await asyncio.to_thread(_prepare, servers)
        names = [
            "coordinator",
            *(f"exporter-{i}" for i in range(1, spec.shards + 1)),
            *(f"consumer-{i}" for i in range(1, spec.consumers + 1)),
        ]
        simulator_port, *worker_ports = free_ports(1 + len(names))
        endpoints = Endpoints(
            kafka.bootstrap,
            postgres.dsn("headgate"),
            s3.endpoint_url,
            f"http://{LOOPBACK}:{simulator_port}",
            str(self.run / "workers.json"),
        )
        base = [_server_program(server) for server in servers]
        simulate = ("simulate", "--host", LOOPBACK, "--port", str(simulator_port), *spec.simulate_args)
        base.append(Program("simulator", (*spec.worker_command, *simulate), _CHECKOUT))

        supervisor = Supervisor(self.run / "supervisord.conf", Supervisor.new_socket(), self.logs)
        self._supervisor = supervisor
        pid = await asyncio.to_thread(supervisor.start, self._environment())
        state = _State(pid, str(supervisor.socket_path), endpoints, spec.worker_command, tuple(base), {})
        self._write_state(state)
        await asyncio.to_thread(supervisor.apply, base)
        checks: dict[str, Callable[[], bool]] = {server.name: server.ready for server in servers}
        checks["simulator"] = lambda: _accepts(simulator_port)
        await self._wait_ready(checks, progress)
        await asyncio.to_thread(postgres.create_database, "headgate")

        self.config_path.write_text(spec.config_text(endpoints))
        progress("setup", "starting")
        await asyncio.to_thread(self._setup, spec.worker_command)
        progress("setup", "ready")

        metrics_ports = dict(zip(names, worker_ports, strict=True))
        workers = [self._worker(spec.worker_command, name, port) for name, port in metrics_ports.items()]
        state = replace(state, programs=(*base, *workers), metrics_ports=metrics_ports)
        self._write_state(state)
        await asyncio.to_thread(supervisor.apply, state.programs)
        await self._wait_ready({n: _readyz(p) for n, p in metrics_ports.items()}, progress)
        return endpoints

    async def stop(self) -> None:
        """Stop everything: workers first, then servers. Bounded; returns when no process of the stack is left."""
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        state = self._read_state()
        supervisor = self._supervisor or (self._connect(state) if state else None)
        try:
            if supervisor is not None:
                with suppress(Transient):
                    names = [p.name for p in supervisor.processes()]
                    workers = set(state.metrics_ports) if state else set()
                    supervisor.stop(workers)
                    supervisor.stop(set(names) - workers)
                    supervisor.shutdown()
                supervisor.reap(timeout_s=10)
        finally:
            kill_leftovers(self.home)
            if supervisor is not None:
                shutil.rmtree(supervisor.socket_path.parent, ignore_errors=True)
            self._supervisor = None
            self._state_path.unlink(missing_ok=True)
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    # --- look and change --------------------------------------------------------------------------------------

    @property
    def endpoints(self) -> Endpoints:
        """Raises Fatal where the stack does not run."""
        return self._running_state().endpoints

    @property
    def metrics_ports(self) -> dict[str, int]:
        """The port of /metrics by worker. Raises Fatal where the stack does not run."""
        return dict(self._running_state().metrics_ports)

    async def processes(self) -> list[Process]:
        """The stack's processes. Raises Transient where supervisord does not answer, Fatal where the stack does not run."""
        return await asyncio.to_thread(self._connect(self._running_state()).processes)

    async def scale(self, shards: int) -> tuple[list[str], list[str]]:
        """Have exporter-1 … exporter-<shards>; returns the names of those added and removed, the latter drained. Raises Fatal, Transient."""
        if not 1 <= shards <= SHARDS_MAX:
            raise Fatal("scale", f"{shards} shards are not in 1..{SHARDS_MAX}")
        return await asyncio.to_thread(self._scale, shards)

    def _scale(self, shards: int) -> tuple[list[str], list[str]]:
        with self._changing():
            state = self._running_state()
            wanted = [f"exporter-{i}" for i in range(1, shards + 1)]
            present = [name for name in state.metrics_ports if name.startswith("exporter-")]
            added = [name for name in wanted if name not in present]
            removed = [name for name in present if name not in wanted]
            ports = {n: p for n, p in state.metrics_ports.items() if n not in removed}
            ports |= dict(zip(added, free_ports(len(added)), strict=True))
            kept = [program for program in state.programs if program.name not in removed]
            programs = (*kept, *(self._worker(state.worker_command, n, ports[n]) for n in added))
            # Written first: where the change fails half-way, the next one goes on from what was meant.
            self._write_state(replace(state, programs=programs, metrics_ports=ports))
            self._connect(state).apply(programs)
            return added, removed

    # --- within -----------------------------------------------------------------------------------------------

    def _acquire(self) -> IO[str]:
        """Become the owner: a lock that the kernel gives back when this process ends, however it ends."""
        self.home.mkdir(parents=True, exist_ok=True)
        lock = (self.home / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise Fatal(f"stack {self.home}", "is running already", "stop it with `make down`") from None
        return lock

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with (self.run / "change.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Transient(f"stack {self.home}", "is being changed by somebody else") from None
            yield

    def _environment(self) -> dict[str, str]:
        return local_environment(os.environ) | {MARK: str(self.home), "PYTHONUNBUFFERED": "1"}

    def _setup(self, worker_command: Sequence[str]) -> None:
        command = [*worker_command, "setup", "--config", str(self.config_path)]
        log = self.logs / "setup.log"
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    command,
                    cwd=_CHECKOUT,
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=False,
                    timeout=READY_TIMEOUT_S,
                    start_new_session=True,
                )
            except subprocess.TimeoutExpired as error:
                raise Fatal("setup", f"was not done after {READY_TIMEOUT_S:.0f} s", f"see {log}") from error
        if done.returncode:
            raise Fatal("setup", f"exited with {done.returncode}; last line: {last_line(log)}", f"see {log}")

    def _worker(self, worker_command: Sequence[str], name: str, metrics_port: int) -> Program:
        kind = name.partition("-")[0]
        who = {"exporter": ("--shard", name), "consumer": ("--name", name)}.get(kind, ())
        options = ("--config", str(self.config_path), *who, "--metrics-port", str(metrics_port))
        return Program(name, (*worker_command, kind, *options), _CHECKOUT)

    async def _wait_ready(self, checks: dict[str, Callable[[], bool]], progress: Progress) -> None:
        """Wait until all answer. Raises Fatal where one was given up on, or where the time is up."""
        assert self._supervisor is not None  # noqa: S101 - called by start only
        for name in checks:
            progress(name, "starting")
        waiting = dict(checks)
        deadline_s = asyncio.get_running_loop().time() + READY_TIMEOUT_S
        while waiting:
            states = {p.name: p.state for p in await asyncio.to_thread(self._supervisor.processes)}
            late = asyncio.get_running_loop().time() > deadline_s
            for name, ready in list(waiting.items()):
                if await asyncio.to_thread(ready):
                    del waiting[name]
                    progress(name, "ready")
                elif late or states.get(name) in ("FATAL", "EXITED"):
                    log = self.logs / f"{name}.log"
                    what = f"is not ready ({states.get(name)}); last line: {last_line(log)}"
                    raise Fatal(name, what, f"see {log}")
            await asyncio.sleep(0.1)

    def _connect(self, state: _State) -> Supervisor:
        return Supervisor(self.run / "supervisord.conf", Path(state.socket), self.logs)

    def _write_state(self, state: _State) -> None:
        targets = [f"{LOOPBACK}:{port}" for port in state.metrics_ports.values()]
        write_atomically(Path(state.endpoints.workers_file), json.dumps([{"targets": targets}]) + "\n")
        write_atomically(self._state_path, state.to_json())

    def _read_state(self) -> _State | None:
        try:
            return _State.from_json(self._state_path.read_text())
        except FileNotFoundError:
            return None

    def _running_state(self) -> _State:
        state = self._read_state()
        if state is None or not _is_of(state.supervisor_pid, self.home):
            raise Fatal(f"stack {self.home}", "does not run", "start it with `make run`")
        return state


def find_running(home: Path | None = None) -> LocalStack | None:
    """The stack that runs in this home, started by whichever process; None where none does."""
    stack = LocalStack(home)
    try:
        stack._running_state()
    except Fatal:
        return None
    return stack


def find_config(path: Path | None) -> Config:
    """The configuration in `path`, or where that is None the one of the stack that runs here. Raises HeadgateError, ConfigErrors."""
    from shard_config.load import load

    if path is None:
        stack = find_running()
        if stack is None:
            raise HeadgateError(
                "configuration",
                "no local stack is running here",
                "start one with `make run`, or give --config FILE",
            )
        path = stack.config_path
    return load(path, environ=os.environ)


def kill_leftovers(home: Path) -> list[int]:
    """End every process of this home's stack, supervisord first; returns their pids. Bounded."""
    import psutil

    # supervisord first, or it would start again what is ended before it.
    found = sorted(_marked(home), key=lambda p: "workers.supervise" not in p.cmdline())
    families = list(dict.fromkeys(p for root in found for p in (root, *root.children(recursive=True))))
    for process in families:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(families, timeout=5)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    return [process.pid for process in families]


def _marked(home: Path) -> list[psutil.Process]:
    """The processes that carry this home's mark. PostgreSQL's children have overwritten theirs: they are their parent's."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == str(home):
                found.append(process)
    return found


def _is_of(pid: int, home: Path) -> bool:
    """Whether this process is there and carries this home's mark: a pid alone may have been given to another."""
    import psutil

    try:
        return bool(psutil.Process(pid).environ().get(MARK) == str(home))
    except psutil.Error:
        return False


def _prepare(servers: Sequence[Server]) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(lambda server: server.prepare(), servers))


def _server_program(server: Server) -> Program:
    stop_signal = server.stop_signal.name.removeprefix("SIG")
    restart = not isinstance(server, S3Server)
    return Program(server.name, tuple(server.command()), str(server.dir), stop_signal, restart)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def _readyz(port: int) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/readyz", timeout=1):
                return True
        except (OSError, http.client.HTTPException):
            return False

    return ready


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    scale = commands.add_parser(
        "scale",
        help="change the number of exporters of the local stack",
        description="Adds or removes exporters of the stack that runs here. The others are not restarted; those that go drain first, and "
        "their slots move to the others when their sessions have timed out (15 s).",
    )
    scale.add_argument("shards", type=int, help=f"how many there shall be, 1 to {SHARDS_MAX}")
    scale.set_defaults(run=_run_scale)
    down = commands.add_parser(
        "down",
        help="stop the local stack",
        description="Stops the stack that runs here, and ends what a stack that was killed has left. Logs and data stay until the next start.",
    )
    down.set_defaults(run=_run_down)


def _run_scale(args: argparse.Namespace) -> int:
    added, removed = asyncio.run(LocalStack().scale(args.shards))
    changes = [f"added {name}" for name in added] + [f"removed {name}" for name in removed]
    print(", ".join(changes) or f"there are {args.shards} exporters already")
    return 0


def _run_down(_: argparse.Namespace) -> int:
    stack = find_running()
    if stack is not None:
        asyncio.run(stack.stop())
        print(f"stopped the stack in {stack.home}")
        return 0
    ended = kill_leftovers(default_home())
    print(f"ended {len(ended)} processes that a stack had left" if ended else "nothing runs here")
    return 0
