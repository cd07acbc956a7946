"""What every worker process has: endpoints, signals and exit codes, of a real process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp.test_utils import TestClient, TestServer

from workers.lifecycle import STILL_S, Lifecycle, _application
from workers.servers import free_ports

ROOT = Path(__file__).resolve().parents[1]

PREAMBLE = """
import asyncio, sys
from ingest.errors import Fatal, Transient
from workers.lifecycle import run_worker
"""


def script(text: str) -> list[str]:
    return [sys.executable, "-c", PREAMBLE + textwrap.dedent(text)]


@contextmanager
def process(text: str) -> Iterator[subprocess.Popen[str]]:
    worker = subprocess.Popen(
        script(text), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        yield worker
    finally:
        worker.kill()
        worker.communicate()


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_for(port: int, timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline_s, "the worker does not listen"
            time.sleep(0.02)
        else:
            return


def test_a_worker_answers_on_its_endpoints_and_drains_on_sigterm() -> None:
    (port,) = free_ports(1)
    worker_of = f"""
        async def main(lifecycle):
            print("began", flush=True)
            await lifecycle.pause(1)
            lifecycle.ready = True
            await lifecycle.stop.wait()
            await asyncio.sleep(0.1)
            print("drained", flush=True)
        sys.exit(run_worker("w", main, metrics_port={port}))
        """
    with process(worker_of) as worker:
        wait_for(port)
        assert get(port, "/readyz") == (503, "not ready\n")
        assert get(port, "/healthz") == (200, "ok\n")
        status, metrics = get(port, "/metrics")
        assert (status, "process_cpu_seconds_total" in metrics) == (200, True)
        assert get(port, "/quit")[0] == 404
        deadline_s = time.monotonic() + 10
        while get(port, "/readyz") != (200, "ready\n"):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        worker.send_signal(signal.SIGTERM)
        out, err = worker.communicate(timeout=10)
    assert (worker.returncode, out) == (0, "began\ndrained\n")
    assert '"event": "worker_stopped"' in err
    assert '"worker": "w"' in err


async def test_healthz_names_a_loop_that_stands_still_and_no_other() -> None:
    lifecycle = Lifecycle()
    async with TestClient(TestServer(_application(lifecycle))) as client:
        lifecycle.beat("planning")
        lifecycle.beat("raw")
        assert (await client.get("/healthz")).status == 200
        # The event loop's clock cannot be set, so the beat is.
        lifecycle._beats["raw"] -= STILL_S + 1
        answer = await client.get("/healthz")
        assert (answer.status, await answer.text()) == (503, f"raw has stood still for {STILL_S + 1:.0f} s\n")
        lifecycle.beat("raw")
        assert (await client.get("/healthz")).status == 200


def test_a_second_signal_ends_a_worker_at_once() -> None:
    hangs = """
        async def main(lifecycle):
            print("began", flush=True)
            await lifecycle.stop.wait()
            print("draining", flush=True)
            await asyncio.Event().wait()
        sys.exit(run_worker("w", main))
        """
    with process(hangs) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "began\n"
        worker.send_signal(signal.SIGINT)
        assert worker.stdout.readline() == "draining\n"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=10) == 130


def test_the_exit_code_says_why_a_worker_ended() -> None:
    ends = """
        def raising(error, in_group=False):
            async def main(lifecycle):
                if not in_group:
                    raise error
                async with asyncio.TaskGroup() as outer:
                    async def inner():
                        async with asyncio.TaskGroup() as group:
                            group.create_task(asyncio.sleep(60))
                            raise error
                    outer.create_task(inner())
            return main

        async def both(lifecycle):
            raise ExceptionGroup("two at once", [Transient("a", "b"), Fatal("place", "thing", "remedy")])

        async def fine(lifecycle):
            return

        fatal, transient = Fatal("place", "thing", "remedy"), Transient("place", "thing")
        print([
            run_worker("w", main)
            for main in (
                fine, raising(fatal), raising(fatal, in_group=True), both,
                raising(transient), raising(transient, in_group=True), raising(ValueError("bug")),
            )
        ])
        """
    done = subprocess.run(script(ends), capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert done.stdout == "[0, 3, 3, 3, 1, 1, 1]\n"
    assert done.stderr.count('"event": "worker_stopped_for_safety"') == 3
    assert done.stderr.count('"remedy": "remedy"') == 3
    assert "ValueError: bug" in done.stderr


def test_a_hangup_is_told_to_the_worker_and_does_not_end_it() -> None:
    hears = """
        async def main(lifecycle):
            print("began", flush=True)
            stops = await lifecycle.pause(30, lifecycle.hangup)
            print(stops, lifecycle.hangup.is_set(), flush=True)
            await lifecycle.stop.wait()
        sys.exit(run_worker("w", main))
        """
    with process(hears) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "began\n"
        worker.send_signal(signal.SIGHUP)
        assert worker.stdout.readline() == "False True\n"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=10) == 0


def test_a_worker_has_pages_of_its_own_as_json_and_no_others() -> None:
    port = free_ports(1)[0]
    text = f"""
    async def main(lifecycle):
        lifecycle.pages["shards"] = lambda: {{"epoch": 7}}
        await lifecycle.stop.wait()
    sys.exit(run_worker("w", main, metrics_port={port}))
    """
    with process(text) as worker:
        wait_for(port)
        assert get(port, "/shards") == (200, '{"epoch": 7}')
        assert get(port, "/other")[0] == 404
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0
