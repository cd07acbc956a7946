"""Real servers as processes of this machine: Kafka, PostgreSQL and an S3 (moto), for the local stack and the tests.

* A server listens on loopback only, on ports that were free when it was made, and writes below its own folder only.
* `prepare` may be called again: data that is there stays there, so stop and start is a restart.
* `stop` is bounded: the server's own stop signal, a wait, then SIGKILL for its whole process group.
* What was started here directly dies with the thread that started it (Linux), even where that one is killed.

Kafka and PostgreSQL let in whoever reaches the port, without a password: other users of this machine can.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ingest.errors import Fatal

KAFKA_LIBS = Path(__file__).resolve().parent.parent / ".headgate" / "kafka-libs"
"""Where `make setup` puts the broker's jars (workers/kafka/pom.xml)."""

_KAFKA_FILES = Path(__file__).resolve().parent / "kafka"

LOOPBACK = "127.0.0.1"

PROXIES = frozenset({"http_proxy", "https_proxy", "all_proxy"})

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


def free_ports(count: int) -> list[int]:
    """Distinct ports that nothing listens on now, below the range that the kernel gives to outgoing connections.

    Below it, because a server that is restarted needs its port again, and no client must have been given it meanwhile.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_240, 32_768), 1_000):
        if len(ports) == count:
            break
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        ports.append(port)
    if len(ports) < count:
        raise Fatal("ports", f"fewer than {count} of 1000 tried on {LOOPBACK} are free", "stop other servers")
    return ports


class Server(ABC):
    """One server: what it is started with, and whether it answers. Everything of it lies below `home / name`."""

    name: str
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self, home: Path, log: Path | None = None) -> None:
        """`log` is where `start` writes what the process prints; `home / <name>.log` where it is not given."""
        self.dir = home.resolve() / self.name
        self.log = log or home.resolve() / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def prepare(self) -> None:
        """Make what the process needs before its first start. Raises Fatal."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """The command line, of absolute paths. The process stays in the foreground and logs to its standard output."""

    @abstractmethod
    def ready(self) -> bool:
        """True when the server answers its protocol now. Takes two seconds at most."""

    @property
    def pid(self) -> int | None:
        """The process that `launch` started, or None."""
        return self._process.pid if self._process else None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Prepare, launch and wait until it is ready. Raises Fatal."""
        self.prepare()
        self.launch()
        self.wait_ready(timeout_s)

    def launch(self) -> None:
        """Start the process and return at once."""
        if self._process is not None:
            raise Fatal(self.name, f"is running already, with pid {self._process.pid}", "stop it first")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_die_with_parent(self.stop_signal), *self.command()],
                cwd=self.dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the server answers. Raises Fatal where it exits or where the time is up; it is stopped then."""
        deadline_s = time.monotonic() + timeout_s
        while not self.ready():
            exited = self._process.poll() if self._process else None
            late = time.monotonic() > deadline_s
            if exited is not None or late:
                self.stop()
                what = f"did not answer within {timeout_s:.0f} s" if late else f"exited with {exited}"
                raise Fatal(self.name, f"{what}; last line: {last_line(self.log)}", f"see {self.log}")
            time.sleep(0.05)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop it; nothing happens where it does not run. Returns when no process of its group is left."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, self.stop_signal)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()


class KafkaServer(Server):
    """One Kafka broker that is its own controller (KRaft). Topics are never created by accident."""

    name = "kafka"

    def __init__(self, home: Path, log: Path | None = None) -> None:
        super().__init__(home, log)
        self.port, self._controller_port = free_ports(2)

    @property
    def bootstrap(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def prepare(self) -> None:
        if not (KAFKA_LIBS / ".complete").exists():
            raise Fatal(self.name, "the broker's jars are not there", "run `make setup`")
        if shutil.which("java") is None:
            raise Fatal(self.name, "there is no java on the PATH", "install a JRE of version 17 or newer")
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "server.properties").write_text(self._properties())
        if (self.dir / "data" / "meta.properties").exists():
            return
        # 16 bytes, the first of which keeps it from beginning with "-": `format` would read an option.
        cluster_id = base64.urlsafe_b64encode(b"\0" + os.urandom(15)).decode().rstrip("=")
        # C1 only: the tool lives for half a second.
        java = self._java("-XX:TieredStopAtLevel=1")
        format_ = ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", "server.properties"]
        _run(self.name, [*java, *format_, *self._format_options()], cwd=self.dir)

    def command(self) -> Sequence[str]:
        # C1 only, as for a tool: a third of the CPU of a start goes into compiling for a long life, which no broker here has.
        return [*self._java("-XX:TieredStopAtLevel=1"), "kafka.Kafka", str(self.dir / "server.properties")]

    def ready(self) -> bool:
        """An ApiVersions request is answered, without an error."""
        request = struct.pack(">hhih", 18, 0, 1, -1)
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=1) as connection:
                connection.settimeout(1)
                connection.sendall(struct.pack(">i", len(request)) + request)
                answer = connection.recv(10)
        except OSError:
            return False
        return len(answer) == 10 and answer[8:10] == b"\0\0"

    def _format_options(self) -> Sequence[str]:
        """More of the cluster's first state, as users."""
        return ()

    def _java(self, *options: str) -> list[str]:
        class_path = os.pathsep.join((str(_KAFKA_FILES), str(KAFKA_LIBS / "*")))
        return ["java", "-Xmx512m", "-XX:+UseSerialGC", *options, "-cp", class_path]

    def _properties(self) -> str:
        return (
            (_KAFKA_FILES / "broker.properties").read_text()
            + f"""
controller.quorum.voters=1@{LOOPBACK}:{self._controller_port}
listeners=PLAINTEXT://{LOOPBACK}:{self.port},CONTROLLER://{LOOPBACK}:{self._controller_port}
advertised.listeners=PLAINTEXT://{LOOPBACK}:{self.port}
log.dirs={self.dir / "data"}
"""
        )


class PostgresServer(Server):
    """PostgreSQL 16, as pgserver brings it. The superuser is `headgate`; only TCP on loopback is let in."""

    name = "postgres"
    stop_signal = signal.SIGINT
    """Fast shutdown; SIGTERM would wait for the clients."""

    def __init__(self, home: Path, log: Path | None = None, *, durable: bool = True) -> None:
        """Not `durable`: without fsync, for tests. What is committed is then lost with the machine, not with a process."""
        super().__init__(home, log)
        (self.port,) = free_ports(1)
        self.durable = durable

    def dsn(self, database: str = "postgres") -> str:
        return f"postgresql://headgate@{LOOPBACK}:{self.port}/{database}"

    def prepare(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        data = self.dir / "data"
        if (data / "PG_VERSION").exists():
            return
        data.mkdir(mode=0o700, exist_ok=True)
        remedy = ""
        if "setpriv" in _as_ordinary_user():
            shutil.chown(data, _FALLBACK_USER)
            remedy = f"run as an ordinary user, or where the user {_FALLBACK_USER} can go"
        options = ["-U", "headgate", "-E", "UTF8", "--locale=C", "-A", "trust", "--auth-local=reject", "-N"]
        _run(
            self.name,
            [*_as_ordinary_user(), str(self._programs() / "initdb"), "-D", str(data), *options],
            cwd=self.dir,
            remedy=remedy,
        )

    def command(self) -> Sequence[str]:
        options = [word for name, value in self._settings().items() for word in ("-c", f"{name}={value}")]
        return [
            *_as_ordinary_user(),
            str(self._programs() / "postgres"),
            "-D",
            str(self.dir / "data"),
            *options,
        ]

    def _programs(self) -> Path:
        return _pg_bin()

    def _settings(self) -> dict[str, str]:
        settings = {
            "listen_addresses": LOOPBACK,
            "port": str(self.port),
            # A socket's path has 108 bytes, and a checkout may lie deeper.
            "unix_socket_directories": "",
            "shared_buffers": "128MB",
            "max_wal_size": "2GB",
            "log_checkpoints": "off",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if not self.durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        return settings

    def ready(self) -> bool:
        """pg_isready says that connections are accepted."""
        check = [str(self._programs() / "pg_isready"), "-q", "-t", "1", "-d", self.dsn()]
        return subprocess.run(check, check=False, stdin=subprocess.DEVNULL).returncode == 0

    def create_database(self, database: str) -> str:
        """Create an empty database in the running server and return its DSN. Raises Fatal."""
        where = ["-h", LOOPBACK, "-p", str(self.port), "-U", "headgate"]
        _run(self.name, [str(self._programs() / "createdb"), *where, database], cwd=self.dir)
        return self.dsn(database)


class S3Server(Server):
    """An S3 that forgets: moto keeps the objects in its memory, so a restart loses them. Any credentials are let in."""

    name = "s3"

    def __init__(self, home: Path, log: Path | None = None) -> None:
        super().__init__(home, log)
        (self.port,) = free_ports(1)

    @property
    def endpoint_url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def prepare(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)

    def command(self) -> Sequence[str]:
        return [sys.executable, "-c", _MOTO, "-H", LOOPBACK, "-p", str(self.port)]

    def ready(self) -> bool:
        try:
            get_local(f"{self.endpoint_url}/moto-api/", timeout_s=1)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


# Without the second statement it logs a line a request. One line: supervisord's configuration knows no others.
_MOTO = "import logging, moto.server as m; logging.getLogger('werkzeug').setLevel(30); m.main()"

LOCAL_AWS_ENVIRONMENT: Mapping[str, str] = {
    "AWS_ACCESS_KEY_ID": "headgate-local",
    "AWS_SECRET_ACCESS_KEY": "headgate-local",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
"""What a process gets that speaks to simulated services only."""


def local_environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` without anything of a real AWS: what runs on this machine must never reach an account, nor be billed.

    Without proxies too: what runs here talks to loopback only.
    """
    kept = {k: v for k, v in base.items() if not k.startswith("AWS_") and k.lower() not in PROXIES}
    return kept | dict(LOCAL_AWS_ENVIRONMENT)


def get_local(url: str, timeout_s: float) -> bytes:
    """The body at a URL of one of our own servers, whatever proxies the environment names. Raises OSError, HTTPException."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=timeout_s) as answer:
        body: bytes = answer.read()
    return body


def last_line(log: Path) -> str:
    """The last line of a log that says something, shortened to 300 characters."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return "(no log)"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "(the log is empty)")


_FALLBACK_USER = "pgserver"


@functools.cache
def _pg_bin() -> Path:
    """The folder of PostgreSQL's programs. Found without importing pgserver, which looks for running servers."""
    found = importlib.util.find_spec("pgserver")
    if found is None or found.origin is None:
        raise Fatal("postgres", "the package pgserver is not installed", "run `make setup`")
    return Path(found.origin).parent / "pginstall" / "bin"


@functools.cache
def _as_ordinary_user() -> tuple[str, ...]:
    """What goes before a PostgreSQL command: nothing, but for root, whom PostgreSQL refuses.

    A user namespace in which root is called 1000 needs no user of its own and no other file modes, since outside it is still root
    who opens the files. Where namespaces are refused (a container without the right) pgserver's own user is created.
    """
    if os.geteuid() != 0:
        return ()
    namespace = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
    if (
        shutil.which("unshare")
        and subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode == 0
    ):
        return namespace
    try:
        from pgserver.utils import ensure_user_exists

        ensure_user_exists(_FALLBACK_USER)
    except (OSError, subprocess.CalledProcessError) as error:
        remedy = "run as an ordinary user, or allow user namespaces"
        raise Fatal(
            "postgres", f"does not run as root, and no other user could be made: {error}", remedy
        ) from error
    return ("setpriv", f"--reuid={_FALLBACK_USER}", f"--regid={_FALLBACK_USER}", "--clear-groups", "--")


def _die_with_parent(stop_signal: signal.Signals) -> tuple[str, ...]:
    """What goes before a command so that the kernel sends it `stop_signal` when the thread that started it is gone."""
    if sys.platform != "linux" or shutil.which("setpriv") is None:
        return ()
    return ("setpriv", f"--pdeathsig={stop_signal.name.removeprefix('SIG')}", "--")


def _signal_group(pid: int, number: signal.Signals) -> None:
    # macOS says PermissionError of a group whose processes are all zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _run(where: str, command: Sequence[str], cwd: Path, remedy: str = "") -> None:
    """Run a command that takes seconds. Raises Fatal with the last line that it printed."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Fatal(where, str(error)) from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing was printed").splitlines()[-1]
        raise Fatal(where, f"{Path(command[0]).name} … exited with {done.returncode}: {said}", remedy)
