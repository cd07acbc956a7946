"""What a lost ledger is told again: from the archive's receipts and the configuration, without a snapshot, and after being stopped halfway."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from ingest import wire
from ingest.charges import BACKFILL_ATTEMPT
from ingest.clock import SystemClock
from ingest.errors import Transient
from ingest.ledger import Ledger
from ingest.model import Receipt, Target, Task, TaskKind, task_id_of
from ingest.restoring import ATTEMPT, planned_again, task_of
from ingest.schedule import Grid, due, grids_of
from shard_config.model import Config
from tests.replay_scene import ACCOUNTS, GRID_S, Past, config_of, table_of
from workers import restoring as module
from workers.restoring import restoring

TARGET = Target("cloudwatch", ACCOUNTS[0], "eu-west-1")
EC2 = Grid("ec2", 300, 60, 600)
NODES = Grid("nodes", 30, 30, 0, has_past=False)
REVISION = "c" * 16


def receipt_of(task: Task, late_s: int = 5) -> Receipt:
    one = Past(1, windows=1).tasks[0].receipt
    items = tuple(replace(one.items[0], item=item) for item in task.items)
    began_ms = (task.tick_s + late_s) * 1000
    return replace(
        one, task_id=task.task_id, target=task.target, tick_s=task.tick_s, started_at_ms=began_ms, items=items
    )


def test_a_receipt_gives_away_the_poll_that_it_answers() -> None:
    now_s = 1_764_000_000
    [live, *overdue] = due(TARGET, [EC2], {"ec2": now_s - 200_000}, now_s, REVISION, 0)
    assert task_of(receipt_of(live), REVISION) == live
    assert [task_of(receipt_of(t, now_s - t.tick_s), REVISION) for t in overdue[1:]] == overdue[1:]


def test_a_receipt_gives_away_the_attempt_of_healing() -> None:
    [live, *_] = due(TARGET, [EC2], {}, 1_764_000_000, REVISION, 0)
    heal = replace(live, attempt=7, kind="heal", task_id=task_id_of(TARGET, REVISION, 7, live.items))
    assert task_of(receipt_of(heal), REVISION) == heal


@pytest.mark.parametrize("attempt", [0, BACKFILL_ATTEMPT | 5])
def test_what_another_configuration_or_a_backfill_asked_can_be_replayed_but_nobody_knows_why_it_was_asked(
    attempt: int,
) -> None:
    [live, *_] = due(TARGET, [EC2], {}, 1_764_000_000, REVISION, 0)
    other = replace(live, task_id=task_id_of(TARGET, "another one", attempt, live.items))
    found = task_of(receipt_of(other), REVISION)
    assert (found.task_id, found.kind, found.items) == (other.task_id, TaskKind.AGAIN, other.items)


def test_every_window_since_the_last_planned_one_is_planned_again_and_nobody_is_asked() -> None:
    now_s, grids = 1_764_000_150, {TARGET: (EC2, NODES)}
    known = {str(TARGET): {"ec2": 1_764_000_000 - 90_000, "nodes": 1_764_000_000 - 60}}

    tasks = planned_again(grids, known, {}, now_s, REVISION)

    windows = [(i.service, w.start_s) for t in tasks for i in t.items for w in i.windows()]
    assert sorted(windows) == [
        *(("ec2", s) for s in range(1_764_000_000 - 90_000, 1_764_000_000, 300)),
        *(("nodes", s) for s in range(1_764_000_000 - 60, 1_764_000_150, 30)),
    ]
    assert {t.kind for t in tasks} == {"paused"}
    assert {t.attempt for t in tasks} == {ATTEMPT}
    assert [t.tick_s for t in tasks] == sorted(t.tick_s for t in tasks)
    assert {t.task_id for t in tasks}.isdisjoint(
        t.task_id for t in due(TARGET, [EC2], known[str(TARGET)], now_s, REVISION, 0)
    )


def test_what_was_never_planned_begins_with_the_archives_first_task_and_else_is_left_to_the_coordinator() -> (
    None
):
    tasks = planned_again({TARGET: (EC2,)}, {}, {TARGET: 1_764_000_000 - 650}, 1_764_000_000, REVISION)
    assert [(i.start_s, i.end_s) for t in tasks for i in t.items] == [(1_764_000_000 - 900, 1_764_000_000)]
    assert planned_again({TARGET: (EC2,)}, {}, {}, 1_764_000_000, REVISION) == []


# --- on real servers, without a snapshot ----------------------------------------------------------------------------


@pytest.fixture
def config(kafka_bootstrap: str, topic_prefix: str, database: str, s3_endpoint: str, bucket: str) -> Config:
    return config_of(kafka_bootstrap, topic_prefix, database, s3_endpoint, bucket)


async def archive_of(past: Past, config: Config) -> None:
    from ingest.archive import open_archive

    async with open_archive(config.s3, SystemClock()) as archive:
        for task in past.tasks:
            await archive.put(task)


async def test_without_a_snapshot_the_archives_receipts_are_the_ledger_and_what_nobody_collected_shows(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = Past(3)
    await archive_of(past, config)
    clock, said = SystemClock(), list[str]()

    async with restoring(config, clock, said.append) as restore:
        found = await restore.look(None)
        assert (found.is_new, found.snapshot) == (True, None)

        # It is stopped before it has folded anything, and typed again.
        with monkeypatch.context() as patch:
            patch.setattr(module, "setup", _stopped)
            with pytest.raises(Transient):
                await restore.ledger(found)
        await restore.ledger(await restore.look(None))
        until_s = clock.now_s() // GRID_S * GRID_S
        came = await restore.samples(lambda *_: None)
        assert came is not None
        assert (await restore.look(None)).steps == []

    table = await table_of(config.postgres.dsn)
    assert {key: row for key, row in table.items() if key[1] < past.to_s} == past.expected
    receipts = [t.receipt for t in past.tasks]
    connection = await asyncpg.connect(config.postgres.dsn)
    billed = await connection.fetchval("SELECT sum(metrics_billed) FROM charges")
    tasks = await connection.fetch("SELECT task_id, value FROM tasks WHERE kind <> 'paused'")
    collected = await connection.fetchval("SELECT count(*) FROM windows WHERE collected_as_of IS NOT NULL")
    open_since = await connection.fetchval(
        "SELECT extract(epoch FROM min(window_start))::bigint FROM windows WHERE collected_as_of IS NULL"
    )
    await connection.close()
    assert billed == sum(i.outcome.metrics_billed for r in receipts for i in r.items)
    assert {r["task_id"] for r in tasks} == {r.task_id for r in receipts}
    assert all(wire.decode_task(r["value"]).items for r in tasks)
    seen = {
        (r.target, i.item.service, s)
        for r in receipts
        for i in r.items
        for s in range(i.item.start_s, i.item.end_s, GRID_S)
    }
    assert (collected, open_since) == (len(seen), past.to_s)
    # A coordinator that starts now plans nothing of the past.
    memory = await Ledger(config.postgres, "test", {}).memory()
    assert {s for services in memory.planned_until_s.values() for s in services.values()} <= {
        until_s,
        until_s - GRID_S,
    }
    assert memory.unanswered == () or all(t.kind == "paused" for t in memory.unanswered)
    assert set(memory.planned_until_s) == {str(t) for t in grids_of(config)}


async def _stopped(_: Config) -> list[str]:
    raise Transient("kafka", "is away")


def test_the_papers_tests_are_there() -> None:
    import re

    root = Path(__file__).resolve().parent
    text = (root.parent / "docs" / "RELIABILITY.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 10
    assert [(f, t) for f, t in named if f"def {t}(" not in (root / f).read_text()] == []
