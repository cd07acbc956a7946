from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

import aiohttp
import pytest

from ingest.errors import Fatal
from shard_config.load import shipped_services
from tests.simulated_scene import (
    ACCOUNTS,
    REGION,
    SECOND,
    TRUTH,
    running,
)
from workers import simulator
from workers.world import World, account_ids


async def test_a_port_in_use_is_a_clear_error() -> None:
    async with running() as sim:
        with pytest.raises(Fatal, match=r"cannot listen: .*choose another --port"):
            await simulator.start(TRUTH, port=int(sim.url.rpartition(":")[2]))


async def test_a_closed_simulator_listens_no_more_and_closes_twice() -> None:
    async with running() as sim:
        pass
    await sim.close()
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(sim.url + "/healthz")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    simulator.register(parser.add_subparsers())
    return parser.parse_args(["simulate", *words])


def test_a_folder_that_is_none_is_refused_before_anything_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parsed("--traces", str(tmp_path))

    with pytest.raises(Fatal, match=r"there is no \*.csv in it"):
        args.run(args)
    assert capsys.readouterr().out == ""


def test_a_service_without_a_profile_is_refused() -> None:
    args = parsed("--services", "ec2, nothing")

    with pytest.raises(Fatal, match=r"no profile for nothing \(there are .*ec2"):
        args.run(args)


def test_the_commands_world_is_the_one_that_its_words_describe() -> None:
    args = parsed(
        "--accounts", "2", "--regions", f"{REGION}, us-east-1", "--services", "ec2", "--metrics", "30"
    )
    truth = simulator.truth_of(args)
    same = World(1, account_ids(2), (REGION, "us-east-1"), 30, [shipped_services()["ec2"]])

    assert (truth.accounts, truth.regions) == (ACCOUNTS, (REGION, "us-east-1"))
    assert truth.metrics(SECOND, "us-east-1") == same.metrics(SECOND, "us-east-1")
    assert len(truth.metrics(SECOND, "us-east-1")) == 30


async def test_the_command_prints_its_url_serves_traces_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    (tmp_path / "speed.csv").write_text("timestamp,value\n2014-02-14 12:00:27,1.5\n")
    program = (
        "import argparse, sys; from workers import simulator; p = argparse.ArgumentParser();"
        "simulator.register(p.add_subparsers()); a = p.parse_args(); sys.exit(a.run(a))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, "simulate", "--traces", str(tmp_path), "--clock-offset-s", "-3600"),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout
        async with asyncio.timeout(30):
            url = (await process.stdout.readline()).decode().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
            async with aiohttp.ClientSession(url) as http, http.get("/healthz") as response:
                assert await response.text() == "ok\n"
                seen_s = parsedate_to_datetime(response.headers["Date"]).timestamp()
            process.send_signal(signal.SIGTERM)
            rest = await process.stdout.read()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert rest == b""
    assert abs(time.time() - 3600 - seen_s) < 60
