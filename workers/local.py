"""The local stack: Kafka, PostgreSQL, S3, Prometheus, a simulated AWS and the workers, each a process of this machine, under supervisord.

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
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from ingest.errors import Fatal, HeadgateError, Transient
from shard_config.model import Config
from workers.servers import (
    LOOPBACK,
    KafkaServer,
    PostgresServer,
    S3Server,
    Server,
    free_ports,
    get_local,
    last_line,
    local_environment,
)
from workers.stack import CHECKOUT, Endpoints, StackSpec, State, prometheus_servers, server_program
from workers.supervise import MARK, Process, Program, Supervisor, is_of, kill_leftovers, write_atomically

__all__ = ["Endpoints", "LocalStack", "StackSpec", "find_config", "find_running", "register"]

READY_TIMEOUT_S = 120.0

STARTS_MAX = 3
"""A process that was started so often and is not ready will not be."""
SHARDS_MAX = 64

Progress = Callable[[str, str], None]
"""Called with a name and what has become of it, "starting" or "ready"."""

Checks = dict[str, Callable[[], bool]]


def _silent(name: str, what: str) -> None:
    pass


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
        self._mine = False
        """Whether `stop` is meant for the stack that runs: it was started or found by this object."""

    async def start(self, spec: StackSpec, progress: Progress = _silent) -> Endpoints:
        """Start everything and wait until it is ready. Raises Fatal, and leaves nothing then, nor where it is cancelled."""
        self._lock = self._acquire()
        self._mine = True
        try:
            return await self._start(spec, progress)
        except BaseException:
            await asyncio.shield(self.stop())
            raise

    async def _start(self, spec: StackSpec, progress: Progress) -> Endpoints:
        await asyncio.to_thread(self._stop)
        for folder in (self.run, self.logs):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        kafka, postgres, s3 = KafkaServer(self.run), PostgresServer(self.run), S3Server(self.run)
        workers_file = str(self.run / "workers.json")
        prometheus = prometheus_servers(self.run, spec.prometheus, workers_file)
        servers: tuple[Server, ...] = (postgres, kafka, s3, *prometheus)
        await asyncio.to_thread(_prepare, servers)
        names = spec.worker_names()
        simulator_port, *worker_ports = free_ports(1 + len(names))
        simulate = ("simulate", "--host", LOOPBACK, "--port", str(simulator_port), *spec.simulate_args)
        simulator = Program("simulator", (*spec.worker_command, *simulate), CHECKOUT)
        endpoints = Endpoints(
            kafka.bootstrap,
            postgres.dsn("headgate"),
            s3.endpoint_url,
            f"http://{LOOPBACK}:{simulator_port}",
            workers_file,
            tuple(server.url for server in prometheus),
        )

        supervisor = Supervisor(self.run / "supervisord.conf", Supervisor.new_socket(), self.logs)
        self._supervisor = supervisor
        state = State(
            supervisor_pid=await asyncio.to_thread(supervisor.start, self._environment()),
            socket=str(supervisor.socket_path),
            config_path=str(self.config_path),
            endpoints=endpoints,
            worker_command=spec.worker_command,
            programs=(*(server_program(server) for server in servers), simulator),
            metrics_ports={},
        )
        self._write(state)
        self._publish(state)
        await asyncio.to_thread(supervisor.apply, state.all_programs())
        checks: Checks = {server.name: server.ready for server in servers}
        await self._wait_ready(supervisor, checks | {"simulator": lambda: _accepts(simulator_port)}, progress)
        await asyncio.to_thread(postgres.create_database, "headgate")

        self.config_path.write_text(spec.config_text(endpoints))
        progress("setup", "starting")
        await asyncio.to_thread(self._setup, spec.worker_command)
        progress("setup", "ready")

        whole = state.with_workers(names, worker_ports)
        others = {n: p for n, p in whole.metrics_ports.items() if n != "coordinator"}
        ready: set[str] = set()
        # The coordinator last: what it plans to be scraped first is there by then.
        for state in (replace(whole, metrics_ports=others), whole):
            self._write(state)
            self._publish(state)
            await asyncio.to_thread(supervisor.apply, state.all_programs())
            started = {n: _readyz(p) for n, p in state.metrics_ports.items() if n not in ready}
            await self._wait_ready(supervisor, started, progress)
            ready |= started.keys()
        return endpoints

    async def stop(self) -> None:
        """Stop what this object has started or found, workers first. Bounded; returns when no process of it is left.

        It may be called at any time and again; a start that was refused leaves it nothing to stop.
        """
        if not self._mine:
            return
        try:
            await asyncio.to_thread(self._stop)
        finally:
            self._mine = False
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _stop(self) -> list[int]:
        state = self._read()
        supervisor = self._supervisor or (self._connect(state) if state else None)
        try:
            if supervisor is not None:
                with suppress(Transient):
                    workers = set(state.metrics_ports) if state else set()
                    supervisor.stop(workers)
                    supervisor.stop({p.name for p in supervisor.processes()})
                    supervisor.shutdown()
                supervisor.reap(timeout_s=10)
        finally:
            killed = kill_leftovers(self.home)
            if supervisor is not None:
                supervisor.remove_socket()
            self._supervisor = None
            self._state_path.unlink(missing_ok=True)
        return killed

    @property
    def endpoints(self) -> Endpoints:
        """Raises Fatal where the stack does not run."""
        return self._running().endpoints

    @property
    def metrics_ports(self) -> dict[str, int]:
        """The port of /metrics by worker. Raises Fatal where the stack does not run."""
        return dict(self._running().metrics_ports)

    async def processes(self) -> list[Process]:
        """The stack's processes. Raises Transient where supervisord does not answer, Fatal where the stack does not run."""
        return await asyncio.to_thread(self._connect(self._running()).processes)

    async def scale(self, shards: int, progress: Progress = _silent) -> tuple[list[str], list[str]]:
        """Have exporter-1 … exporter-<shards>; returns whom it added, ready, and removed, drained. Raises Fatal, Transient."""
        if not 1 <= shards <= SHARDS_MAX:
            raise Fatal("scale", f"{shards} shards are not in 1..{SHARDS_MAX}")
        before = self._running()
        with self._changing():
            after = before.with_shards(shards, free_ports)
            added = {n: p for n, p in after.metrics_ports.items() if n not in before.metrics_ports}
            # Nobody shall look for one that is gone, nor for one that is not there yet.
            kept = {n: p for n, p in after.metrics_ports.items() if n not in added}
            self._publish(replace(after, metrics_ports=kept))
            # Written first: where the change fails half-way, the next one goes on from what was meant.
            self._write(after)
            supervisor = self._connect(after)
            await asyncio.to_thread(supervisor.apply, after.all_programs())
            await self._wait_ready(supervisor, {n: _readyz(p) for n, p in added.items()}, progress)
            self._publish(after)
        return list(added), [n for n in before.metrics_ports if n not in after.metrics_ports]

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
                    cwd=CHECKOUT,
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

    async def _wait_ready(self, supervisor: Supervisor, checks: Checks, progress: Progress) -> None:
        """Wait until all answer. Raises Fatal where one has died too often, or where the time is up."""
        for name in checks:
            progress(name, "starting")
        waiting = dict(checks)
        pids: dict[str, set[int]] = {name: set() for name in checks}
        deadline_s = asyncio.get_running_loop().time() + READY_TIMEOUT_S
        while waiting:
            processes = {p.name: p for p in await asyncio.to_thread(supervisor.processes)}
            late = asyncio.get_running_loop().time() > deadline_s
            for name, ready in list(waiting.items()):
                process = processes.get(name)
                if process is None:
                    raise Fatal(name, "was taken away while it started", "start again")
                pids[name] |= {process.pid} - {0}
                if await asyncio.to_thread(ready):
                    del waiting[name]
                    progress(name, "ready")
                elif late or process.state in ("FATAL", "EXITED") or len(pids[name]) > STARTS_MAX:
                    log = self.logs / f"{name}.log"
                    raise Fatal(name, f"does not become ready; last line: {last_line(log)}", f"see {log}")
            await asyncio.sleep(0.1)

    def _connect(self, state: State) -> Supervisor:
        return Supervisor(self.run / "supervisord.conf", Path(state.socket), self.logs)

    def _publish(self, state: State) -> None:
        write_atomically(Path(state.endpoints.workers_file), state.file_sd())

    def _write(self, state: State) -> None:
        write_atomically(self._state_path, state.to_json())

    def _read(self) -> State | None:
        try:
            return State.from_json(self._state_path.read_text())
        except FileNotFoundError:
            return None

    def _running(self) -> State:
        state = self._read()
        if state is None or not is_of(state.supervisor_pid, self.home):
            raise Fatal(f"stack {self.home}", "does not run", "start it with `make run`")
        return state


def find_running(home: Path | None = None) -> LocalStack | None:
    """The stack that runs in this home, started by whichever process; None where none does."""
    stack = LocalStack(home)
    try:
        stack._running()
    except Fatal:
        return None
    stack._mine = True
    return stack


async def down(home: Path | None = None) -> list[int]:
    """Stop the stack of this home, and end what one that was killed has left.

    Returns the pids of what did not end when its supervisord was asked to, itself included where another process had started it.
    """
    return await asyncio.to_thread(LocalStack(home)._stop)


def config_path(path: Path | None) -> Path:
    """`path`, or where that is None the configuration of the stack that runs here. Raises HeadgateError."""
    if path is None:
        stack = find_running()
        if stack is None:
            raise HeadgateError(
                "configuration",
                "no local stack is running here",
                "start one with `make run`, or give --config FILE",
            )
        path = stack.config_path
    return path


def find_config(path: Path | None) -> Config:
    """The configuration in `config_path`, with the organization's accounts as they are known. Raises HeadgateError, ConfigErrors."""
    from shard_config.load import load

    if path is None:
        # The local stack's S3 wants some credentials, and no real ones shall reach it.
        os.environ.update(local_environment(os.environ))
    config = load(config_path(path), environ=os.environ)
    if config.organization is not None:
        from workers.members import known

        config = known(config)
    return config


def _prepare(servers: Sequence[Server]) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(lambda server: server.prepare(), servers))


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def _readyz(port: int) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            get_local(f"http://{LOOPBACK}:{port}/readyz", timeout_s=1)
        except (OSError, http.client.HTTPException):
            return False
        return True

    return ready


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    down = commands.add_parser(
        "down",
        help="stop the local stack",
        description="Stops the stack that runs here, and ends what a stack that was killed has left. Logs and data stay until the next start.",
    )
    down.set_defaults(run=_run_down)


def _run_down(_: argparse.Namespace) -> int:
    running = find_running()
    ended = asyncio.run(down())
    if running is not None:
        print(f"stopped the stack in {running.home}")
    else:
        print(f"ended {len(ended)} processes that a stack had left" if ended else "nothing runs here")
    return 0
