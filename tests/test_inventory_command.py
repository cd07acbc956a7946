"""`headgate inventory`, and the coordinator's refresh, with the simulated AWS and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import threading
import time
from pathlib import Path

import pytest
import yaml

from ingest.clock import ManualClock, SystemClock
from ingest.inventory import refresh as refresh_module
from ingest.inventory import store
from ingest.inventory.model import Lived
from ingest.inventory.refresh import Outcome, refresh
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import migrate
from shard_config.load import ConfigErrors, loads, shipped_services
from shard_config.model import Config, Postgres
from workers import inventory, simulator
from workers.cli import main
from workers.inventory import RETRY_S, Refresher
from workers.lifecycle import Lifecycle
from workers.simulated.faults import Faults
from workers.world import World, account_ids

[ACCOUNT] = account_ids(1)
REGION = "eu-west-1"


def document(dsn: str, url: str = "http://127.0.0.1:9", **section: object) -> str:
    return yaml.safe_dump(
        {
            "aws": {"endpoint_url": url, "role_template": "arn:aws:iam::{account}:role/headgate"},
            "postgres": {"dsn": dsn},
            "accounts": [{"id": ACCOUNT, "regions": [REGION], "services": ["ec2", "ebs"]}],
            "inventory": section,
        }
    )


def config_of(dsn: str, url: str = "http://127.0.0.1:9", **section: object) -> Config:
    return loads(document(dsn, url, **section), "test", {})


def world() -> World:
    shipped = shipped_services()
    profiles = [
        shipped[name].model_copy(update={"metrics": shipped[name].metrics[:1]}) for name in ("ec2", "ebs")
    ]
    return World(7, [ACCOUNT], [REGION], 24, profiles)


async def lived(dsn: str) -> list[Lived]:
    connection = await open_connection(Postgres(dsn=dsn), "test")
    try:
        return [one async for one in store.resources(connection, 0, 4_000_000_000)]
    finally:
        connection.terminate()


async def run(*words: str) -> int:
    """A command, in a thread: it has an event loop of its own."""
    return await asyncio.to_thread(main, ["inventory", *words])


# --- by hand ------------------------------------------------------------------------------------------------------


async def test_what_changes_in_aws_between_two_refreshes_is_history(database: str) -> None:
    await migrate(database)
    simulated = await simulator.start(world(), calls_per_s=0)
    config = config_of(database, simulated.url, source="describe")
    clock = ManualClock(1_790_000_000)
    try:
        assert [o.changes.new for o in await refresh(config, clock)] == [12, 12]
        clock.advance(3600)
        assert [(o.changes.new, o.changes.changed, o.changes.gone, o.changes.same) for o in await refresh(config, clock)] == [(0, 0, 0, 12)] * 2  # fmt: skip
        owned = simulated.inventory.owned
        resized, gone, *_ = [
            raw["InstanceId"]
            for raw in owned.of(ACCOUNT, REGION, "ec2")
            if raw["InstanceType"] != "m7g.large"
        ]
        owned.edit(
            ACCOUNT,
            "ec2",
            resized,
            InstanceType="r7g.2xlarge",
            CpuOptions={"CoreCount": 8, "ThreadsPerCore": 1},
        )
        owned.edit(ACCOUNT, "ec2", gone)
        clock.advance(3600)
        ec2 = {o.scope.service: o for o in await refresh(config, clock)}["ec2"]
        assert (ec2.changes.new, ec2.changes.changed, ec2.changes.gone, ec2.changes.same) == (0, 1, 1, 10)
        simulated.faults = Faults(denied_actions=("ec2:*",))
        clock.advance(3600)
        failed = await refresh(config, clock)
        assert all("grant ec2:Describe" in o.failure for o in failed)
        assert [o.resources for o in sorted(failed, key=lambda o: o.scope)] == [12, 11]
    finally:
        await simulated.close()
    found = {one.last.id: one for one in await lived(database)}
    assert (found[resized].last.type, found[resized].last.vcpu, found[resized].last.memory_bytes) == (
        "r7g.2xlarge",
        8,
        64 * 1024**3,
    )
    assert found[gone].gone_s == 1_790_000_000 + 7200
    assert sum(one.gone_s is not None for one in found.values()) == 1


async def test_the_commands_refresh_list_and_import_what_they_listed(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await migrate(database)
    simulated = await simulator.start(world(), calls_per_s=0)
    path, file = tmp_path / "headgate.yaml", tmp_path / "resources.csv"
    path.write_text(document(database, simulated.url, source="describe"))
    capsys.readouterr()
    try:
        assert await run("refresh", "--config", str(path), "--format", "json") == 0
        assert [row["resources"] for row in json.loads(capsys.readouterr().out)] == [12, 12]
        simulated.faults = Faults(denied_actions=("ec2:DescribeVolumes",))
        assert await run("refresh", "--config", str(path)) == 1
        assert "1 failed, and are as they were known" in capsys.readouterr().out
    finally:
        await simulated.close()
    assert await run("list", "--config", str(path), "--looks", "--format", "csv") == 0
    looks = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["service"], "grant ec2:DescribeVolumes" in row["failure"]) for row in looks] == [
        ("ebs", True),
        ("ec2", False),
    ]
    before = await lived(database)
    assert await run("list", "--config", str(path), "--format", "csv") == 0
    file.write_text(capsys.readouterr().out)
    assert await run("import", str(file), "--config", str(path)) == 0
    assert await lived(database) == before
    capsys.readouterr()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    await asyncio.sleep(1.1)  # a look's time is in whole seconds, and one that is no newer changes nothing
    assert await run("import", str(file), "--config", str(path), "--format", "json") == 0
    assert sum(row["gone"] for row in json.loads(capsys.readouterr().out)) == 1
    file.write_text("".join([*lines[:-1], lines[-1].replace(ACCOUNT, "nobody")]))
    assert await run("import", str(file), "--config", str(path)) == 1
    assert "line 25: account 'nobody' is no account" in capsys.readouterr().err
    assert (
        await run(
            "list", "--config", str(path), "--service", "ec2", "--from", "2026-01-01", "--format", "json"
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert {row["service"] for row in rows} == {"ec2"}
    assert all(row["from"] >= "2026-01-01" and row["to"] > row["from"] for row in rows)
    assert await run("list", "--config", str(path)) == 0
    assert "23 resources" in capsys.readouterr().out


async def test_without_a_source_the_commands_say_what_to_set(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await migrate(database)
    path = tmp_path / "headgate.yaml"
    path.write_text(document(database))
    assert await run("refresh", "--config", str(path)) == 1
    assert "inventory.source: is none (set it to describe, config or csv)" in capsys.readouterr().err
    assert await run("list", "--config", str(path)) == 0
    assert "nothing is known" in capsys.readouterr().out
    assert await run("list", "--config", str(path), "--from", "2026-01-02", "--to", "2026-01-01") == 2


async def test_a_file_is_a_source_as_well(database: str, tmp_path: Path) -> None:
    await migrate(database)
    file = tmp_path / "resources.csv"
    file.write_text(f"account,region,service,id,storage_bytes\n{ACCOUNT},{REGION},ebs,vol-1,8\n")
    config = config_of(database, source="csv", file=str(file))
    assert [o.changes.new for o in await refresh(config, SystemClock())] == [1]
    [one] = await lived(database)
    assert one.last.storage_bytes == 8


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"source": "config"}, "source: config needs aggregator"),
        ({"source": "csv"}, "source: csv needs a file"),
        ({"source": "describe", "file": "x.csv"}, "source: csv needs a file"),
        ({"source": "describe", "interval_s": 60}, "interval_s"),
        ({"source": "terraform"}, "source"),
    ],
)
def test_a_section_that_does_not_fit_together_is_refused(section: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigErrors, match=said):
        config_of("postgresql://x", **section)  # type: ignore[arg-type]


# --- the coordinator's --------------------------------------------------------------------------------------------


async def test_the_coordinator_refreshes_each_interval_and_not_at_each_restart(database: str) -> None:
    await migrate(database)
    simulated = await simulator.start(world(), calls_per_s=0)
    config = config_of(database, simulated.url, source="describe", interval_s=3600)
    clock = ManualClock(1_790_000_000)
    try:
        first = Refresher(lambda: config, clock)
        assert [await first.step(), await first.step()] == [True, False]
        again = Refresher(lambda: config, clock)
        assert not await again.step()
        clock.advance(3600)
        assert [await again.step(), await first.step()] == [True, True]
        simulated.faults = Faults(denied_actions=("ec2:*",))
        clock.advance(3600)
        assert await first.step()
        clock.advance(RETRY_S)
        assert await first.step()  # where nothing at all could be listed it does not wait for the interval
    finally:
        await simulated.close()
    assert len(await lived(database)) == 24


async def test_a_store_that_is_away_is_tried_again_later() -> None:
    config = config_of("postgresql://headgate@127.0.0.1:9/none", source="describe")
    clock = ManualClock(0)
    refresher = Refresher(lambda: config, clock)
    assert [await refresher.step(), await refresher.step()] == [True, False]
    clock.advance(RETRY_S)
    assert await refresher.step()


async def test_a_refresh_under_way_ends_when_it_is_time_to_stop_and_a_bug_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of("postgresql://headgate@127.0.0.1:9/none", source="describe")
    monkeypatch.setattr(inventory, "TURN_S", 0.01)
    begun, ended = asyncio.Event(), asyncio.Event()
    calls = 0

    async def step(_: Refresher) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return True

    monkeypatch.setattr(Refresher, "step", step)
    lifecycle = Lifecycle()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(Refresher(lambda: config, ManualClock(0)).run(lifecycle))
        await begun.wait()
        lifecycle.stop.set()
    assert ended.is_set()


async def test_a_refresh_under_way_is_cancelled_in_its_thread_and_holds_up_nothing_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def endless(*_: object) -> list[Outcome]:
        begun.set()
        try:
            time.sleep(0.3)  # noqa: ASYNC251  # as a large answer that is read
            await asyncio.sleep(60)
        finally:
            ended.set()
        return []

    async def due_s(*_: object) -> float:
        return 0.0

    monkeypatch.setattr(inventory, "refresh", endless)
    monkeypatch.setattr(Refresher, "_due_s", due_s)
    refresher = Refresher(lambda: config_of("postgresql://x", source="describe"), SystemClock())
    step = asyncio.create_task(refresher.step())
    longest_s, before_s = 0.0, time.monotonic()
    while time.monotonic() < before_s + 0.5:
        at_s = time.monotonic()
        await asyncio.sleep(0.01)
        longest_s = max(longest_s, time.monotonic() - at_s)
    assert begun.is_set()
    assert longest_s < 0.25
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert ended.is_set()


async def test_without_a_source_nobody_asks_and_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh_module, "open_connection", None)
    monkeypatch.setattr(inventory, "open_connection", None)
    assert not await Refresher(lambda: config_of("postgresql://x"), ManualClock(0)).step()
