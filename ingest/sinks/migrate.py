"""Migrations of the store: `migrations/NNNN_name.sql`, applied in order, each in a transaction of its own.

* Applying is idempotent, and safe when several processes start at once: an advisory lock lets one in, the others
  then find nothing to do.
* What was applied is recorded with a checksum. A migration that was edited after it was applied, that is missing here, or that
  would come before one already applied, is refused before anything is touched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable

import asyncpg
import structlog

from ingest.errors import Fatal
from ingest.sinks.connection import open_connection, translated
from shard_config.model import Postgres

log = structlog.get_logger()

_LOCK = 0x68656164676174  # "headgat": any number would do, as long as it never changes
_LOCK_TIMEOUT_S = 120
_FILE = re.compile(r"(?P<number>\d{4})_[a-z0-9_]+\.sql")
_WHERE = "migrations"


@dataclass(frozen=True, slots=True)
class Migration:
    """One file. `name` is the file's, without `.sql`."""

    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return sha256(self.sql.encode()).hexdigest()


def load(directory: Traversable | None = None) -> tuple[Migration, ...]:
    """The migrations of a directory (those shipped, unless told otherwise), in order.

    Raises Fatal where a file is not called NNNN_name.sql, or two have one number.
    """
    directory = directory or files("ingest.sinks") / "migrations"
    found: dict[str, Migration] = {}
    for file in sorted(directory.iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".sql"):
            continue
        match = _FILE.fullmatch(file.name)
        if match is None:
            raise Fatal(_WHERE, f"{file.name} is not called NNNN_name.sql", "rename it")
        if match["number"] in found:
            raise Fatal(
                _WHERE, f"{file.name} has the number of {found[match['number']].name}", "renumber one"
            )
        found[match["number"]] = Migration(file.name.removesuffix(".sql"), file.read_text(encoding="utf-8"))
    return tuple(found.values())


def pending(migrations: tuple[Migration, ...], applied: dict[str, str]) -> tuple[Migration, ...]:
    """Those still to apply; `applied` maps names to checksums. Raises Fatal where the two do not fit together."""
    known = {m.name: m for m in migrations}
    for name, checksum in sorted(applied.items()):
        if name not in known:
            raise Fatal(
                _WHERE,
                f"the database has {name}, which this version of Headgate does not know",
                "run the version that applied it, or a newer one",
            )
        if known[name].checksum != checksum:
            raise Fatal(
                _WHERE,
                f"{name} was edited after it was applied",
                "restore the file as it was applied, and put the change into a new migration",
            )
    todo = tuple(m for m in migrations if m.name not in applied)
    if todo and applied and todo[0].name < max(applied):
        raise Fatal(
            _WHERE,
            f"{todo[0].name} would come before {max(applied)}, which is applied",
            "renumber it, to be last",
        )
    return todo


async def is_behind(postgres: Postgres) -> bool:
    """Whether there is a migration to apply. Raises Transient, and Fatal as `pending`."""
    connection = await open_connection(postgres, "headgate migrate")
    try:
        with translated(_WHERE):
            if await connection.fetchval("SELECT to_regclass('schema_migrations') IS NULL"):
                return True
            applied = await connection.fetch("SELECT name, checksum FROM schema_migrations")
        return bool(pending(load(), {row["name"]: row["checksum"] for row in applied}))
    finally:
        connection.terminate()


async def migrate(
    database: str | Postgres | asyncpg.Connection, migrations: tuple[Migration, ...] | None = None
) -> list[str]:
    """Bring the schema of a database (a DSN, or a connection) up to date; returns the names of what was applied now, in order.

    Raises Transient where the server cannot be reached or another process holds the lock for too long, Fatal where a
    migration fails or the recorded ones do not fit (see `pending`).
    """
    if migrations is None:
        migrations = load()
    if isinstance(database, str):
        database = Postgres(dsn=database)
    if not isinstance(database, Postgres):
        return await _migrate(database, migrations)
    connection = await open_connection(database, "headgate migrate")
    try:
        return await _migrate(connection, migrations)
    finally:
        connection.terminate()


async def _migrate(connection: asyncpg.Connection, migrations: tuple[Migration, ...]) -> list[str]:
    with translated(_WHERE):
        await connection.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT_S}s'")
        await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
        try:
            return await _apply(connection, migrations)
        finally:
            if not connection.is_closed():
                await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
                await connection.execute("RESET lock_timeout")


async def _apply(connection: asyncpg.Connection, migrations: tuple[Migration, ...]) -> list[str]:
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations ("
        "name text PRIMARY KEY, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    applied = await connection.fetch("SELECT name, checksum FROM schema_migrations")
    todo = pending(migrations, {row["name"]: row["checksum"] for row in applied})
    for migration in todo:
        with translated(f"{_WHERE} {migration.name}"):
            async with connection.transaction():
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO schema_migrations (name, checksum) VALUES ($1, $2)",
                    migration.name,
                    migration.checksum,
                )
        log.info("migration_applied", name=migration.name)
    return [m.name for m in todo]
