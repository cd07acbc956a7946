"""What is open at a worker: its one port, read only, bounded against who holds connections, and nothing else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest
import yaml
from aiohttp import web

from ingest.clock import SystemClock
from shard_config.load import load
from tests.conftest import empty_database
from workers.lifecycle import _LIMITS, CONNECTIONS_MAX, Lifecycle, _application, listen
from workers.page_document import Document, Packed
from workers.servers import LOOPBACK, free_ports, local_environment
from workers.setup import setup

ROOT = Path(__file__).resolve().parent.parent
WORKERS = {
    "coordinator": ["coordinator"],
    "exporter": ["exporter", "--shard", "exporter-1"],
    "consumer": ["consumer", "--name", "consumer-1"],
    "remote-write": ["remote-write", "--name", "remote-write-1"],
}
EVERYWHERE = {"/metrics", "/healthz", "/readyz"}
PAGES = {"coordinator": {"/", "/page.json", "/shards"}}
"""Documented in decisions 17 and 25."""

GUESSES = ("/", "/page.json", "/shards", "/config", "/debug", "/pause", "/-/reload", "/-/quit", "/admin", "/api/v1/write", "/../etc/passwd", "/%2e%2e/x")  # fmt: skip
CHANGING = ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND")


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    port: int

    def ask(self, method: str, path: str, body: bytes | None = None) -> int:
        """The status of an answer; 0 where the connection was closed without one."""
        connection = HTTPConnection(LOOPBACK, self.port, timeout=10)
        try:
            connection.request(method, path, body)
            return connection.getresponse().status
        except ConnectionError:
            return 0
        finally:
            connection.close()


@pytest.fixture(scope="module")
async def workers(
    kafka_bootstrap: str, postgres_dsn: str, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, Running]]:
    """One process of each kind, ready."""
    home = tmp_path_factory.mktemp("surface")
    path, (*ports, nobody) = home / "headgate.yaml", free_ports(len(WORKERS) + 1)
    async with empty_database(postgres_dsn) as dsn:
        receiver = {"name": "away", "url": f"http://{LOOPBACK}:{nobody}/write"}
        document = {
            "accounts": [{"id": "123456789012", "regions": ["eu-west-1"], "services": ["ec2"]}],
            "slots": 1,
            "aws": {"endpoint_url": f"http://{LOOPBACK}:{nobody}"},
            "kafka": {"bootstrap": kafka_bootstrap, "prefix": "surface", "raw_partitions": 1, "ledger_partitions": 1},
            "postgres": {"dsn": dsn},
            "s3": {"bucket": "surface", "endpoint_url": s3_endpoint},
            "remote_write": {"receivers": [receiver], "resources": False},
        }  # fmt: skip
        path.write_text(yaml.safe_dump(document))
        await setup(load(path, environ={}))
        started = dict(zip(WORKERS, _started(path, ports, home), strict=True))
        try:
            await asyncio.to_thread(_until_ready, started)
            yield started
        finally:
            for one in started.values():
                one.process.terminate()
            for one in started.values():
                with suppress(subprocess.TimeoutExpired):
                    one.process.wait(20)
                one.process.kill()


def _started(path: Path, ports: list[int], home: Path) -> Iterator[Running]:
    for (name, arguments), port in zip(WORKERS.items(), ports, strict=True):
        command = [sys.executable, "-m", "workers.cli", *arguments]
        command += ["--config", str(path), "--metrics-port", str(port)]
        with (home / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=local_environment({}), stdin=subprocess.DEVNULL, stderr=log
            )
        yield Running(process, port)


def _until_ready(started: dict[str, Running]) -> None:
    deadline_s = time.monotonic() + 90
    for name, one in started.items():
        while True:
            with suppress(OSError):
                if one.ask("GET", "/readyz") == 200:
                    break
            assert one.process.poll() is None, f"{name} ended"
            assert time.monotonic() < deadline_s, f"{name} is not ready"
            time.sleep(0.1)


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_listens_at_its_metrics_port_and_nowhere_else(
    workers: dict[str, Running], name: str
) -> None:
    process = psutil.Process(workers[name].process.pid)
    listening = {
        tuple(c.laddr)
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN or not c.raddr
    }
    assert listening == {(LOOPBACK, workers[name].port)}
    assert [c.laddr for c in process.net_connections("unix") if c.laddr] == []
    assert process.children() == []


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_answers_what_is_documented_and_nothing_else(workers: dict[str, Running], name: str) -> None:
    documented = EVERYWHERE | PAGES.get(name, set())
    asked = {path: workers[name].ask("GET", path) for path in documented | set(GUESSES)}
    assert {path for path, status in asked.items() if status != 404} == documented
    assert {asked[path] for path in documented} == {200}


@pytest.mark.parametrize("name", WORKERS)
def test_nothing_at_a_worker_changes_state(workers: dict[str, Running], name: str) -> None:
    """There is no such thing, and so no token; whoever adds one finds this test."""
    worker = workers[name]
    found = {
        (method, path): worker.ask(method, path, b"{}")
        for method in CHANGING
        for path in (*sorted(EVERYWHERE), *GUESSES)
    }
    assert {k: s for k, s in found.items() if s not in (400, 404, 405)} == {}
    assert {found["POST", path] for path in EVERYWHERE} == {405}
    assert worker.ask("GET", "/healthz") == 200


# --- who means harm ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def served() -> AsyncIterator[int]:
    """A worker's pages, the coordinator's among them, in this process: their port."""
    lifecycle = Lifecycle()
    document = Document(SystemClock())
    document.data = Packed.of({"a": 1})
    document.serve(lifecycle)
    runner = web.AppRunner(_application(lifecycle), access_log=None, **_LIMITS)
    await runner.setup()
    (port,) = free_ports(1)
    listening = await listen(runner, LOOPBACK, port)
    try:
        yield port
    finally:
        listening.close()
        await runner.cleanup()


async def answer(port: int, request: bytes, *chunks: bytes) -> bytes:
    """All that comes back until the connection is closed, at most 64 KB, in at most 10 s."""
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        try:
            with suppress(ConnectionError):
                writer.write(request)
                for chunk in chunks:
                    await writer.drain()
                    writer.write(chunk)
            found = b""
            with suppress(ConnectionError):
                while got := await reader.read(65_536 - len(found)):
                    found += got
            return found
        finally:
            writer.close()


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


async def test_connections_that_are_held_open_keep_no_probe_out() -> None:
    """A slowloris: headers that never end, on many more connections than there may be."""
    async with served() as port:
        held = [await asyncio.open_connection(LOOPBACK, port) for _ in range(3 * CONNECTIONS_MAX)]
        for _, writer in held:
            with suppress(ConnectionError):
                writer.write(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        for _ in range(5):
            assert (await answer(port, HEALTH)).startswith(b"HTTP/1.1 200")
        here = psutil.Process().net_connections("tcp")
        mine = [c for c in here if c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port]
        assert len(mine) <= CONNECTIONS_MAX
        for _, writer in held:
            writer.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["a-long-header", "many-headers", "a-long-path", "tls", "two-lengths"],
)
async def test_a_request_that_is_none_is_refused_and_the_worker_goes_on(head: bytes) -> None:
    async with served() as port:
        assert (await answer(port, head)).startswith(b"HTTP/1.0 400") or (
            await answer(port, head)
        ).startswith(b"HTTP/1.1 400")
        assert (await answer(port, HEALTH)).startswith(b"HTTP/1.1 200")


async def test_a_body_of_any_size_is_not_kept() -> None:
    async with served() as port:
        before = psutil.Process().memory_info().rss
        head = b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"
        began_s = time.monotonic()
        found = await answer(port, head, *[bytes(1 << 20)] * 64)
        assert time.monotonic() - began_s < 5
        assert found == b"" or found.startswith(b"HTTP/1.1 405")
        assert psutil.Process().memory_info().rss - before < 32 << 20
        assert (await answer(port, HEALTH)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/", "/page.json"])
async def test_the_page_cannot_be_framed_sniffed_or_made_to_run_what_is_not_its_own(path: str) -> None:
    async with served() as port:
        request = f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
        head = (await answer(port, request)).partition(b"\r\n\r\n")[0].decode()
    headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers
    if path == "/":
        policy = headers["Content-Security-Policy"]
        for rule in ("default-src 'none'", "frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'"):
            assert rule in policy
        assert "unsafe" not in policy
