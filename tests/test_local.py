"""The local stack: real servers, and stand-ins for the workers, which only say that they are ready."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from ingest.errors import Fatal
from tests.conftest import eventually
from tests.helm_chart import CHART
from tests.prometheus_server import needs_prometheus
from workers import local, supervise
from workers.local import Endpoints, LocalStack, StackSpec
from workers.prometheus import ask, prometheus_program
from workers.stack import State
from workers.supervise import Program

STAND_IN = """
import http.server, os, sys
command, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
if command == "setup":
    sys.exit(0 if os.path.exists(options["--config"]) else 1)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = options.get("--port") or options["--metrics-port"]
http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Ready).serve_forever()
"""


PROMETHEUS = 2 if prometheus_program() else 0


def _config_text(endpoints: Endpoints) -> str:
    return f"kafka:\n  bootstrap: {endpoints.kafka_bootstrap}\n"


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalStack]:
    # Deeper than a socket's path may be long, and with a space.
    home = tmp_path_factory.mktemp("stack") / ("deep " * 20).strip() / ".headgate"
    home.parent.mkdir()
    stand_in = home.parent / "stand_in.py"
    stand_in.write_text(STAND_IN)
    stack = LocalStack(home)
    spec = StackSpec(
        _config_text,
        shards=2,
        consumers=1,
        prometheus=PROMETHEUS,
        worker_command=(sys.executable, str(stand_in)),
    )
    await stack.start(spec)
    yield stack
    if local.find_running(home):
        await stack.stop()


async def _pids(stack: LocalStack) -> dict[str, int]:
    return {p.name: p.pid for p in await stack.processes() if p.state in ("STARTING", "RUNNING")}


def _targets(stack: LocalStack) -> set[str]:
    (group,) = json.loads(Path(stack.endpoints.workers_file).read_text())
    return set(group["targets"])


async def test_a_started_stack_has_every_process_and_answers(stack: LocalStack) -> None:
    assert set(await _pids(stack)) == {
        "postgres",
        "kafka",
        "s3",
        "simulator",
        "coordinator",
        "exporter-1",
        "exporter-2",
        "consumer-1",
        *(("remote-writer-1", "prometheus-1", "prometheus-2") if PROMETHEUS else ()),
    }
    assert stack.config_path.read_text() == _config_text(stack.endpoints)
    connection = await asyncpg.connect(stack.endpoints.postgres_dsn)
    try:
        assert await connection.fetchval("SHOW fsync") == "on"
    finally:
        await connection.close()


@needs_prometheus
async def test_the_first_prometheus_watches_the_workers_and_all_have_the_rules_that_are_shipped(
    stack: LocalStack,
) -> None:
    first, second = stack.endpoints.prometheus_urls

    async def finds_them() -> bool:
        found = ask(first, "targets")["activeTargets"]
        return {t["discoveredLabels"]["__address__"] for t in found} == _targets(stack)

    await eventually(finds_them)
    assert ask(second, "targets")["activeTargets"] == []
    files = {f"{path.name}": path for path in (CHART / "files" / "rules").glob("*.yml")}
    loaded = [{Path(g["file"]).name for g in ask(url, "rules")["groups"]} for url in (first, second)]
    assert loaded == [set(files), {name for name in files if name.startswith("recording")}]


async def test_a_second_stack_in_the_same_home_is_refused_and_the_first_goes_on(stack: LocalStack) -> None:
    second = LocalStack(stack.home)
    with pytest.raises(Fatal, match="is running already"):
        await second.start(StackSpec(_config_text))
    await second.stop()
    assert local.find_running(stack.home) is not None


async def test_a_killed_worker_is_started_again(stack: LocalStack) -> None:
    before = await _pids(stack)
    os.kill(before["exporter-1"], signal.SIGKILL)

    async def is_back() -> bool:
        return (await _pids(stack)).get("exporter-1", before["exporter-1"]) != before["exporter-1"]

    await eventually(is_back)
    assert {n: p for n, p in (await _pids(stack)).items() if n != "exporter-1"} == {
        n: p for n, p in before.items() if n != "exporter-1"
    }


async def test_scaling_adds_and_removes_exporters_and_touches_nothing_else(stack: LocalStack) -> None:
    before = await _pids(stack)
    other = local.find_running(stack.home)
    assert other is not None
    assert await other.scale(3) == (["exporter-3"], [])
    assert (await _pids(stack)).items() >= before.items()
    assert _targets(stack) == {f"127.0.0.1:{port}" for port in stack.metrics_ports.values()}
    assert "exporter-3" in stack.metrics_ports
    assert await stack.scale(1) == ([], ["exporter-2", "exporter-3"])
    after = await _pids(stack)
    assert after == {n: p for n, p in before.items() if n != "exporter-2"}
    assert len(_targets(stack)) == len(stack.metrics_ports) == (4 if PROMETHEUS else 3)


async def test_a_stopped_stack_leaves_no_process(stack: LocalStack) -> None:
    state = json.loads((stack.run / "state.json").read_text())
    family = psutil.Process(state["supervisor_pid"]).children(recursive=True)
    assert len(family) > 7
    await stack.stop()
    assert [p for p in family if p.is_running()] == []
    assert supervise.kill_leftovers(stack.home) == []
    assert local.find_running(stack.home) is None
    assert not Path(state["socket"]).parent.exists()


def test_supervisord_ends_with_its_owner_even_where_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, time
from workers.supervise import MARK, Program, Supervisor
home = pathlib.Path({str(tmp_path)!r})
supervisor = Supervisor(home / "conf", Supervisor.new_socket(), home)
supervisor.start({{**os.environ, MARK: str(home)}})
supervisor.apply([Program("sleeper", ("sleep", "60"), str(home))])
while not (pids := [p.pid for p in supervisor.processes() if p.pid]):
    time.sleep(0.05)
print(supervisor.socket_path, *pids, flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    try:
        socket_path, pid = owner.stdout.readline().split()
        sleeper = psutil.Process(int(pid))
        supervisord = sleeper.parent()
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    assert supervisord is not None
    _, alive = psutil.wait_procs([sleeper, supervisord], timeout=10)
    assert alive == []
    assert not Path(socket_path).parent.exists()


def test_what_a_killed_supervisord_left_is_found_by_its_mark_and_ended(tmp_path: Path) -> None:
    marked = subprocess.Popen(["sleep", "60"], env={supervise.MARK: str(tmp_path)}, start_new_session=True)
    other = subprocess.Popen(
        ["sleep", "60"], env={supervise.MARK: str(tmp_path / "other")}, start_new_session=True
    )
    try:
        assert supervise.kill_leftovers(tmp_path) == [marked.pid]
        assert (psutil.pid_exists(marked.pid), psutil.pid_exists(other.pid)) == (False, True)
    finally:
        for process in (marked, other):
            process.kill()
            process.wait()


def test_a_percent_sign_reaches_the_process_and_a_comment_is_refused() -> None:
    text = supervise.render([Program("a", ("echo", "100%", "a b"), "/")], Path("/s.sock"), Path("/logs"), 5)
    assert "command=echo 100%% 'a b'" in text.splitlines()
    with pytest.raises(ValueError, match="for comments"):
        supervise.render([Program("a", ("echo", "a ; b"), "/")], Path("/s.sock"), Path("/logs"), 5)


def test_scaling_keeps_the_ports_of_those_that_stay() -> None:
    endpoints = Endpoints("k:1", "postgresql://p", "http://s", "http://a", "/workers.json", ("http://m",))
    spec = StackSpec(_config_text, shards=2, consumers=1, prometheus=1)
    state = State(1, "/s.sock", "/headgate.yaml", endpoints, spec.worker_command, (), {})
    state = state.with_workers(spec.worker_names(), [1, 2, 3, 4, 5])
    assert state.metrics_ports == {
        "coordinator": 1,
        "exporter-1": 2,
        "exporter-2": 3,
        "consumer-1": 4,
        "remote-writer-1": 5,
    }
    grown = state.with_shards(3, lambda n: [9] * n)
    assert grown.metrics_ports == {**state.metrics_ports, "exporter-3": 9}
    assert grown.with_shards(2, lambda n: [8] * n) == state
    assert State.from_json(grown.to_json()) == grown
