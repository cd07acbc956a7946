"""Migrations keep what `sinks/migrate.py` promises, on a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from ingest.errors import Fatal, Transient
from ingest.sinks.migrate import Migration, load, migrate, pending

ONE = Migration("0001_one", "CREATE TABLE one (x int);")
TWO = Migration("0002_two", "CREATE TABLE two (x int); INSERT INTO two VALUES (1);")


async def test_the_shipped_migrations_apply_in_order_and_only_once(database: str) -> None:
    names = [m.name for m in load()]
    assert names[0] == "0001_store"
    assert await migrate(database) == names
    assert await migrate(database) == []


async def test_processes_that_start_at_once_apply_each_migration_once(database: str) -> None:
    applied = await asyncio.gather(*(migrate(database, (ONE, TWO)) for _ in range(4)))
    assert sorted(applied, key=len) == [[], [], [], ["0001_one", "0002_two"]]
    connection = await asyncpg.connect(database)
    assert await connection.fetchval("SELECT count(*) FROM two") == 1
    await connection.close()


async def test_a_connection_may_be_given_and_stays_open_and_unlocked(database: str) -> None:
    connection = await asyncpg.connect(database)
    assert await migrate(connection, (ONE,)) == ["0001_one"]
    assert await migrate(database, (ONE, TWO)) == ["0002_two"]
    assert await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    await connection.close()


async def test_a_migration_that_fails_leaves_nothing_of_itself(database: str) -> None:
    broken = Migration("0002_broken", "CREATE TABLE half (x int); SELECT 1 / 0;")
    with pytest.raises(Fatal, match=r"0002_broken.*division by zero"):
        await migrate(database, (ONE, broken))
    connection = await asyncpg.connect(database)
    assert await connection.fetchval("SELECT to_regclass('half')") is None
    assert await connection.fetchval("SELECT to_regclass('one')") == "one"
    await connection.close()
    assert await migrate(database, (ONE, TWO)) == ["0002_two"]


async def test_an_edited_migration_is_refused_before_anything_is_touched(database: str) -> None:
    await migrate(database, (ONE,))
    edited = Migration("0001_one", "CREATE TABLE other (x int);")
    with pytest.raises(Fatal, match="0001_one was edited after it was applied"):
        await migrate(database, (edited, TWO))
    connection = await asyncpg.connect(database)
    assert await connection.fetchval("SELECT to_regclass('two')") is None
    await connection.close()


def test_a_database_that_is_ahead_is_refused() -> None:
    with pytest.raises(Fatal, match="has 0002_two, which this version of Headgate does not know"):
        pending((ONE,), {m.name: m.checksum for m in (ONE, TWO)})


def test_a_migration_before_an_applied_one_is_refused() -> None:
    with pytest.raises(Fatal, match="0001_one would come before 0002_two"):
        pending((ONE, TWO), {TWO.name: TWO.checksum})


def test_files_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("0010_c.sql", "0002_b.sql", "0001_a.sql", "README.md"):
        (tmp_path / name).write_text("SELECT 1;")
    assert [m.name for m in load(tmp_path)] == ["0001_a", "0002_b", "0010_c"]


@pytest.mark.parametrize(
    ("names", "message"), [(["1_a.sql"], "NNNN_name"), (["0001_a.sql", "0001_b.sql"], "number")]
)
def test_files_that_have_no_place_in_the_order_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("SELECT 1;")
    with pytest.raises(Fatal, match=message):
        load(tmp_path)


async def test_a_server_that_does_not_answer_is_transient() -> None:
    with pytest.raises(Transient):
        await migrate("postgresql://headgate@127.0.0.1:1/headgate")
