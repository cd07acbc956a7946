"""supervisord as the local stack's process manager: its configuration, its calls, and its tie to whoever started it.

* supervisord and all below it end when the process that started it does, however that ends: it holds the other end of a pipe.
* Each program is a group of its own, so adding or removing one never restarts another.
* Every call has a timeout, and every wait an end.

`python -m workers.supervise CONFIG FOLDER` is what `Supervisor.start` starts.
"""

from __future__ import annotations

import http.client
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import xmlrpc.client
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingest.errors import Fatal, Transient

if TYPE_CHECKING:
    import psutil

MARK = "HEADGATE_STACK"
"""In the environment of every process of a stack: its home."""

_SOCKET_FOLDER = "headgate-stack-"

CALL_TIMEOUT_S = 5.0
STARTED_STATES = frozenset({"STARTING", "RUNNING", "BACKOFF", "STOPPING"})


@dataclass(frozen=True, slots=True)
class Program:
    """One process that is kept running. Its output goes to `<name>.log`."""

    name: str
    command: tuple[str, ...]
    directory: str
    stop_signal: str = "TERM"
    restart: bool = True
    """False where a restart would hide a loss."""


@dataclass(frozen=True, slots=True)
class Process:
    """A program as it is now. `state` is supervisord's: RUNNING, STARTING, BACKOFF, STOPPING, STOPPED, EXITED, FATAL."""

    name: str
    state: str
    pid: int
    """0 where there is none."""
    uptime_s: int


def render(programs: Iterable[Program], socket_path: Path, logs: Path, stop_wait_s: int) -> str:
    """supervisord's configuration. Raises ValueError where a command cannot be written in it."""
    # Root is named as the user only because supervisord warns of a missing one.
    lines = [
        "[supervisord]",
        "nodaemon=true",
        "silent=true",
        "logfile=/dev/stdout",
        "logfile_maxbytes=0",
        "nocleanup=true",
        f"pidfile={_escape(str(socket_path.with_suffix('.pid')))}",
        *(["user=root"] if os.geteuid() == 0 else []),
        "[unix_http_server]",
        f"file={_escape(str(socket_path))}",
        "chmod=0700",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for program in programs:
        lines += [
            f"[program:{program.name}]",
            f"command={_escape(shlex.join(program.command))}",
            f"directory={_escape(program.directory)}",
            f"stdout_logfile={_escape(str(logs / program.name))}.log",
            "stdout_logfile_maxbytes=50MB",
            "stdout_logfile_backups=1",
            "redirect_stderr=true",
            f"autorestart={str(program.restart).lower()}",
            # A process that ends within five seconds counts as not started, and is tried again ever more slowly.
            "startsecs=5",
            "startretries=10",
            f"stopsignal={program.stop_signal}",
            f"stopwaitsecs={stop_wait_s}",
            "stopasgroup=true",
            "killasgroup=true",
        ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    if "\n" in text or " ;" in text or " #" in text:
        raise ValueError(f"supervisord cannot be told of {text!r}: it takes ' ;' and ' #' for comments")
    return text.replace("%", "%%")


class Supervisor:
    """A supervisord: started here, or found by its socket. What it is to run is `programs`, and `apply` changes that."""

    def __init__(self, config: Path, socket_path: Path, logs: Path, stop_wait_s: int = 20) -> None:
        self.config = config
        self.socket_path = socket_path
        self.logs = logs
        self.stop_wait_s = stop_wait_s
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def new_socket() -> Path:
        """A path that is short enough for a socket, in a folder of its own that goes with supervisord."""
        return Path(tempfile.mkdtemp(prefix=_SOCKET_FOLDER)) / "supervisor.sock"

    def start(self, environment: Mapping[str, str], timeout_s: float = 20) -> int:
        """Start it without programs, in a session of its own; returns its pid. Raises Fatal."""
        self._write([])
        log = self.logs / "supervisord.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workers.supervise", str(self.config), str(self.socket_path.parent)],
                cwd=Path(__file__).resolve().parent.parent,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + timeout_s
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise Fatal("supervisord", "did not come up", f"see {log}")
            time.sleep(0.05)
        return self._process.pid

    def answers(self) -> bool:
        try:
            return bool(self._call("getState")["statename"])
        except Transient:
            return False

    def processes(self) -> list[Process]:
        """All programs, in the order of their names. Raises Transient where supervisord does not answer."""
        return [
            Process(i["name"], i["statename"], i["pid"], max(0, i["now"] - i["start"]) if i["pid"] else 0)
            for i in self._call("getAllProcessInfo")
        ]

    def apply(self, programs: Sequence[Program]) -> None:
        """Make these the programs: what is new starts, what is gone is stopped, what is unchanged is not touched.

        Returns when what is gone has ended. Raises Transient.
        """
        self._write(programs)
        added, changed, removed = self._call("reloadConfig")[0]
        self.stop([*removed, *changed])
        for name in (*removed, *changed):
            self._call("removeProcessGroup", name)
        for name in (*changed, *added):
            self._call("addProcessGroup", name)

    def stop(self, names: Iterable[str]) -> None:
        """Stop these side by side and wait for their end. Raises Transient."""
        waiting = {p.name for p in self.processes() if p.state in STARTED_STATES} & set(names)
        for name in waiting:
            self._call("stopProcessGroup", name, False)
        deadline_s = time.monotonic() + self.stop_wait_s + 10
        while waiting := {p.name for p in self.processes() if p.state in STARTED_STATES} & waiting:
            if time.monotonic() > deadline_s:
                raise Transient("supervisord", f"cannot stop {', '.join(sorted(waiting))}")
            time.sleep(0.1)

    def shutdown(self) -> None:
        """Tell it to end, with all that still runs. Raises Transient where it does not answer."""
        self._call("shutdown")

    def reap(self, timeout_s: float) -> None:
        """Where it was started here: close its pipe and wait for its end; after `timeout_s` it is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None  # noqa: S101 - Popen was given a pipe
        process.stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def remove_socket(self) -> None:
        """Remove the socket's folder, which a supervisord that was killed leaves."""
        if self.socket_path.parent.name.startswith(_SOCKET_FOLDER):
            shutil.rmtree(self.socket_path.parent, ignore_errors=True)

    def _write(self, programs: Sequence[Program]) -> None:
        text = render(programs, self.socket_path, self.logs, self.stop_wait_s)
        write_atomically(self.config, text)

    def _call(self, method: str, *args: object) -> Any:
        """One call of supervisord's. The answer is what its documentation says. Raises Transient."""
        transport = _UnixTransport(str(self.socket_path))
        try:
            with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as proxy:
                return getattr(proxy.supervisor, method)(*args)
        except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
            raise Transient("supervisord", f"{method}{args}: {error}") from error


class _UnixTransport(xmlrpc.client.Transport):
    """supervisor.xmlrpc has one too, without a timeout."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _UnixConnection(self._path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CALL_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def kill_leftovers(home: Path) -> list[int]:
    """End every process of the stack of this home, supervisord first; returns their pids. Bounded."""
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


def is_of(pid: int, home: Path) -> bool:
    """Whether this process is there and carries this home's mark: a pid alone may have been given to another."""
    import psutil

    try:
        return bool(psutil.Process(pid).environ().get(MARK) == str(home))
    except psutil.Error:
        return False


def write_atomically(path: Path, text: str) -> None:
    """Replace a file; a reader sees the old text or the new one, and a crash leaves no half."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(text)
    new.replace(path)


def main(config: str, folder: str) -> None:
    """Be supervisord until told to stop, or until nobody holds the other end of standard input; then remove its socket's folder."""
    from supervisor import supervisord

    def end_with_parent() -> None:
        # Nothing is ever written: this returns at the end of file, which comes with the end of the process that started us.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        supervisord.main(["-c", config])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
