"""Snapshots of the ledger: whole, of one moment, and refused where they are not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ingest import snapshot
from ingest.archive import S3Archive, open_archive, snapshot_key
from ingest.clock import ManualClock, SystemClock
from ingest.errors import Fatal, Rejected
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import load as migrations
from ingest.sinks.migrate import migrate
from ingest.snapshot import DERIVED, TABLES
from shard_config.model import S3, Config, Postgres
from tests.conftest import empty_database
from tests.replay_scene import config_of
from workers.cli import main
from workers.snapshot import Snapshots, take

NOW_S = 1_764_000_000

EVERYTHING = """
INSERT INTO pauses VALUES ('100000000001', '*', now(), E'tab\\there, \\\\backslash, Grüße, \\n line');
INSERT INTO positions (sink, topic, partition, next, last_value_id, backend_pid) VALUES
    ('postgres', 'raw', 0, 7, '\\x00ff', 42), ('ledger', 'ledger', 0, 5, '\\x01', 42), ('backfill:abc', 'archive', 1, 3, '', NULL);
INSERT INTO targets VALUES ('cloudwatch/100000000001/eu-west-1', 1, 2.5, now());
INSERT INTO tasks (task_id, target, config_revision, tick, kind, attempt, planned_at, value)
    SELECT md5(n::text), 'cloudwatch/100000000001/eu-west-1', 'c', now(), 'live', 0, now(), md5(n::text)::bytea FROM generate_series(1, 3000) AS n;
INSERT INTO looks (task_id, service, finished_at, target, shard, started_at, window_start, window_end, status, detail, series, points,
    metrics_billed, requests, archive_key, batch_ids, windows, landed_at)
    VALUES (md5('1'), 'ec2', now(), 't', 'e', now(), now(), now(), 'complete', '', 3, 9, 3, '{"GetMetricData": 1}', 'k', ARRAY['\\x01'::bytea], '[]', now());
INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at, landed_as_of, points, digest, sealed_at, collected_as_of)
    VALUES ('t', 'ec2', now(), now(), now(), now(), now(), 9, -5, now(), now());
INSERT INTO sealed_days VALUES ('t', 'ec2', '2026-01-01', 1, 0, 9, -9, now(), now(), now(), 5, NULL, '{[2026-01-01, 2026-01-02)}');
INSERT INTO charges (day, target, service, reason, looks, metrics_billed, metrics_in_doubt, list_metrics, puts)
    VALUES ('2026-01-01', 't', 'ec2', 'recheck', 1, 2, 3, 4, 5);
INSERT INTO dead_handled VALUES ('i', 'discarded', now(), 'x');
INSERT INTO inventory (account, region, service, id, since, seen, born, attributes) VALUES ('a', 'r', 'ec2', 'i-1', now(), now(), now(), '{"a": [1, null]}');
"""


@dataclass(frozen=True)
class Scene:
    config: Config
    connection: asyncpg.Connection
    archive: S3Archive
    dsn: str

    async def rows(self, connection: asyncpg.Connection) -> dict[str, list[dict[str, Any]]]:
        return {t: sorted(map(dict, await connection.fetch(f"SELECT * FROM {t}")), key=str) for t in TABLES}


@pytest.fixture
async def scene(database: str, s3_endpoint: str, bucket: str) -> AsyncIterator[Scene]:
    config = config_of("127.0.0.1:1", "none", database, s3_endpoint, bucket)
    await migrate(database)
    connection = await open_connection(config.postgres, "test")
    try:
        async with open_archive(config.s3, SystemClock()) as archive:
            yield Scene(config, connection, archive, database)
    finally:
        connection.terminate()


async def test_every_table_is_in_a_snapshot_or_can_be_made_again(scene: Scene) -> None:
    rows = await scene.connection.fetch(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public' AND table_type = 'BASE TABLE'"
    )
    assert {r["table_name"] for r in rows} == {*TABLES, *DERIVED}


async def test_what_is_loaded_is_what_was_taken_but_nothing_is_claimed_of_samples(
    scene: Scene, postgres_dsn: str
) -> None:
    await scene.connection.execute(EVERYTHING)
    before = await scene.rows(scene.connection)

    taken = await snapshot.take(scene.connection, scene.archive, NOW_S)

    assert await snapshot.newest(scene.archive) == taken
    async with empty_database(postgres_dsn) as other:
        await migrate(other)
        into = await open_connection(Postgres(dsn=other), "test")
        assert await snapshot.is_new(into)
        await snapshot.load(into, scene.archive, taken)
        after = await scene.rows(into)
        next_look = await into.fetchval("SELECT nextval(pg_get_serial_sequence('looks', 'look_id'))")
        into.terminate()
    [look], [window] = before["looks"], before["windows"]
    assert after["looks"] == [look | {"landed_at": None}]
    open_again = dict.fromkeys(("sealed_at", "landed_as_of", "points", "digest"))
    assert after["windows"] == [window | open_again]
    assert window["collected_as_of"] is not None
    assert [(p["sink"], p["next"], p["last_value_id"]) for p in after["positions"]] == [
        ("ledger", 5, b"\x01"), ("postgres", 7, b"\x00\xff"),
    ]  # fmt: skip
    assert next_look == look["look_id"] + 1
    same = set(TABLES) - {"looks", "windows", "positions"}
    assert {t: after[t] for t in same} == {t: before[t] for t in same}
    assert taken.rows == sum(len(rows) for rows in after.values())


async def test_a_large_table_is_put_in_parts_and_comes_back_whole(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PART_BYTES", 20_000)
    await scene.connection.execute(EVERYTHING)
    before = await scene.rows(scene.connection)

    taken = await snapshot.take(scene.connection, scene.archive, NOW_S)
    assert len(taken.tables["tasks"].parts) > 2
    await scene.connection.execute(f"TRUNCATE {', '.join(TABLES)}")
    await snapshot.load(scene.connection, scene.archive, taken)

    assert (await scene.rows(scene.connection))["tasks"] == before["tasks"]


async def test_a_ledger_that_is_in_use_is_not_loaded_over(scene: Scene) -> None:
    await scene.connection.execute(EVERYTHING)
    taken = await snapshot.take(scene.connection, scene.archive, NOW_S)
    before = await scene.rows(scene.connection)

    with pytest.raises(Fatal, match="the ledger is in use"):
        await snapshot.load(scene.connection, scene.archive, taken)

    again = await open_connection(scene.config.postgres, "test")
    assert await scene.rows(again) == before
    again.terminate()


@pytest.mark.parametrize("spoil", ["other bytes", "a part is gone", "the manifest", "a column more"])
async def test_a_spoilt_snapshot_loads_nothing(scene: Scene, spoil: str) -> None:
    await scene.connection.execute(EVERYTHING)
    taken = await snapshot.take(scene.connection, scene.archive, NOW_S)
    await scene.connection.execute(f"TRUNCATE {', '.join(TABLES)}")
    names = {"the manifest": ("manifests", str(NOW_S))}
    key = snapshot_key(names.get(spoil, (str(NOW_S), "tasks-0")))
    client, bucket = scene.archive._client, scene.config.s3.bucket
    if spoil == "a part is gone":
        await client.delete_object(Bucket=bucket, Key=key)
    elif spoil == "a column more":
        charges = taken.tables["charges"]
        more = charges.model_copy(update={"columns": (*charges.columns, "yen")})
        taken = taken.model_copy(update={"tables": {**taken.tables, "charges": more}})
    else:
        body = await (await client.get_object(Bucket=bucket, Key=key))["Body"].read()
        await client.put_object(Bucket=bucket, Key=key, Body=body[:-1] + bytes([body[-1] ^ 1]))

    async def restore() -> None:
        found = await snapshot.read(scene.archive, NOW_S) if spoil == "the manifest" else taken
        await snapshot.load(scene.connection, scene.archive, found)

    with pytest.raises(Fatal, match=r"spoilt|not there|not what was put|newer schema"):
        await restore()

    again = await open_connection(scene.config.postgres, "test")
    assert await snapshot.is_new(again)
    again.terminate()


async def test_a_coordinator_takes_one_a_day_and_two_take_no_more(scene: Scene) -> None:
    clock = ManualClock(NOW_S)
    one, other = (Snapshots(lambda: scene.config, clock) for _ in range(2))

    taken = [await one.step(), await other.step()]
    clock.advance(86_399)
    taken += [await one.step(), await other.step()]
    clock.advance(1)
    taken += [await other.step(), await one.step()]

    assert [s and s.taken_s for s in taken] == [NOW_S, None, None, None, NOW_S + 86_400, None]
    assert await snapshot.taken(scene.archive) == [NOW_S, NOW_S + 86_400]


async def test_a_ledger_that_has_just_been_made_never_stands_for_the_one_before_it(scene: Scene) -> None:
    await scene.connection.execute(EVERYTHING)
    await take(scene.config, ManualClock(NOW_S))
    await scene.connection.execute("TRUNCATE charges, sealed_days")
    with pytest.raises(Fatal, match=r"charges has 0 rows here|sealed_days has 0 rows here"):
        await Snapshots(lambda: scene.config, ManualClock(NOW_S + 86_400)).step()
    assert await snapshot.taken(scene.archive) == [NOW_S]
    await take(scene.config, ManualClock(NOW_S + 86_400), anyway=True)
    assert await snapshot.taken(scene.archive) == [NOW_S, NOW_S + 86_400]


async def test_while_one_coordinator_is_at_it_another_takes_none(scene: Scene) -> None:
    await scene.connection.execute("SELECT pg_advisory_lock($1)", 0x534E4150)
    assert await take(scene.config, SystemClock(), alone=True) is None


async def test_setup_takes_one_before_it_changes_a_schema_in_use(
    postgres_dsn: str, s3_endpoint: str, bucket: str
) -> None:
    from workers.snapshot import before_upgrade

    async with empty_database(postgres_dsn) as dsn:
        config = config_of("127.0.0.1:1", "none", dsn, s3_endpoint, bucket)
        assert await before_upgrade(config, SystemClock()) == []
        await migrate(dsn, migrations()[:2])
        connection = await asyncpg.connect(dsn)
        assert await before_upgrade(config, SystemClock()) == []
        await connection.execute(
            "INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at)"
            " VALUES ('t', 'ec2', now(), now(), now(), now())"
        )
        [said] = await before_upgrade(config, SystemClock())
        assert "1 rows" in said
        await connection.execute("TRUNCATE windows")
        await migrate(dsn)
        async with open_archive(config.s3, SystemClock()) as archive:
            old = await snapshot.newest(archive)
            assert old is not None
            assert old.migration == "0002_ledger"
            await snapshot.load(connection, archive, old)
        assert await connection.fetchval("SELECT stretch FROM windows") == 1
        await connection.close()
        away = config.model_copy(update={"s3": S3(bucket=bucket, endpoint_url="http://127.0.0.1:9")})
        [said] = await before_upgrade(away, SystemClock())
        assert said.startswith("no snapshot before the schema changes: ")


def test_the_command_takes_one_and_lists_them(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_text(
        "accounts: [{id: '100000000001', regions: [eu-west-1], services: [ec2]}]\n"
        f"postgres: {{dsn: '{scene.dsn}'}}\n"
        f"s3: {{endpoint_url: '{scene.config.s3.endpoint_url}', bucket: {scene.config.s3.bucket}}}\n"
    )
    assert main(["snapshot", "--list", "--config", str(path)]) == 1
    assert main(["snapshot", "--config", str(path)]) == 0
    assert main(["snapshot", "--list", "--config", str(path)]) == 0
    assert capsys.readouterr().out.count("the snapshot of ") == 1


@pytest.mark.parametrize("name", [("..", "x"), ("a//b",), ("x y",)])
def test_a_name_climbs_nowhere(name: tuple[str, ...]) -> None:
    with pytest.raises(Rejected):
        snapshot_key(name)
