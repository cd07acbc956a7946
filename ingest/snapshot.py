"""Snapshots: what the ledger knows and the archive cannot tell again, put into the archive once a day.

Guarantees, each with a test of its name:

* *One moment*: all tables, the readers' positions among them, are read in one snapshot of the database. So whoever loads it goes on in Kafka at
  exactly the record that is not in it, and no receipt is charged twice.
* *Whole or not at all*: parts are put first, the manifest last, each if absent; every part is named with its size and digest, and checked before a row
  of it is loaded. Loading is one transaction.
* *Old ones load into new schemas*: columns are named. One that was taken by a newer schema is refused.
* *Nothing is claimed of samples*: those are not in it. What had landed or was sealed, and is not folded into its day, is open again after loading, until
  the store's own rows prove it; folded days keep their digests, for `headgate audit` to hold the rows against.
* *Every table is somebody's*: one that is neither in TABLES nor in DERIVED fails a test.
* *A ledger that has just been made never stands for the one before it*: days that are sealed and charged only become more. Where the last snapshot has more of them,
  no other is taken, until the ledger is restored or somebody says that it is right.
* *Bounded memory*: a part of `PART_BYTES`, compressed.

Objects: `snapshots/v1/manifests/<taken_s>`, JSON and its digest, and `snapshots/v1/<taken_s>/<table>-<n>`, zstd frames of PostgreSQL's COPY text, which any newer
version of it reads. Nothing here deletes: a lifecycle rule of the bucket does (docs/iam).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from hashlib import blake2b
from typing import Any, Final, Literal

import asyncpg
import structlog
import zstandard
from pydantic import BaseModel, ConfigDict, ValidationError

from ingest.archive import S3Archive
from ingest.clock import rfc3339
from ingest.errors import Fatal, Transient
from ingest.sinks.connection import translated

_log = structlog.get_logger()

TABLES: Final = (
    "positions", "pauses", "stretches", "targets", "tasks", "attempts", "looks", "look_days", "windows", "sealed_days",
    "declared_days", "charges", "settling", "dead_handled", "inventory", "inventory_looks",
)  # fmt: skip
DERIVED: Final = frozenset(
    {"schema_migrations", "series", "samples", "landed", "rollup_hours", "rollup_days", "rollup_marks"}
)
"""Made again from the archive's batches, or by the migrations."""
GROWS: Final = ("sealed_days", "charges")
"""Rows of these are never deleted."""
LIVED: Final = ("tasks", "looks", "windows", "charges", "sealed_days", "attempts", "pauses", "dead_handled")
"""A ledger with a row in one of these is in use, and is not loaded over."""

_LEFT_OUT: Final[Mapping[str, frozenset[str]]] = {"positions": frozenset({"backend_pid", "backend_start"})}
_ONLY: Final[Mapping[str, str]] = {"positions": "sink NOT LIKE 'backfill:%'"}

PART_BYTES = 16 * 1024 * 1024
PARTS_MAX = 10_000
MANIFEST_BYTES_MAX = 8 * 1024 * 1024
COPY_DEADLINE_S = 3600.0
"""Of one table."""
LEVEL = 3
FRAME_BYTES_MAX = 1 << 20
"""What a decompressor hands on at once."""

ANOTHER = "load the one before it: `headgate restore --snapshot TIME`"

_COLUMNS = """SELECT table_name, column_name FROM information_schema.columns
WHERE table_schema = current_schema() AND table_name = ANY($1) AND is_generated = 'NEVER' ORDER BY table_name, ordinal_position"""

_UNPROVED = (
    "UPDATE looks SET landed_at = NULL",
    """UPDATE windows SET sealed_at = NULL, landed_as_of = NULL, landed_version = NULL, points = NULL, digest = NULL, dead_points = 0,
    in_part = false, checked_at = NULL, unbalanced = NULL""",
)
_NEXT_LOOK = "SELECT setval(pg_get_serial_sequence('looks', 'look_id'), (SELECT coalesce(max(look_id), 0) + 1 FROM looks), false)"


Then = Callable[[asyncpg.Connection], Awaitable[None]]


class Part(BaseModel):
    """One object. `digest` is blake2b-128 of its bytes, in hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int
    digest: str


class Table(BaseModel):
    """One table's rows, in the order of its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: tuple[str, ...]
    rows: int
    parts: tuple[Part, ...]


class Snapshot(BaseModel):
    """The manifest. `migration` is the last that the schema had."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    taken_s: int
    migration: str
    tables: Mapping[str, Table]

    @property
    def rows(self) -> int:
        return sum(t.rows for t in self.tables.values())

    @property
    def size_bytes(self) -> int:
        return sum(p.size_bytes for t in self.tables.values() for p in t.parts)

    def __str__(self) -> str:
        return f"the snapshot of {rfc3339(self.taken_s)} ({self.rows:,} rows, {self.size_bytes:,} bytes)"


# --- taking one -----------------------------------------------------------------------------------------------------


async def take(
    connection: asyncpg.Connection, archive: S3Archive, now_s: int, *, anyway: bool = False
) -> Snapshot:
    """Put a snapshot of the ledger into the archive.

    Raises Transient; Fatal where the last one has more sealed or charged days, unless it is wanted `anyway`. The connection is not to be used again then.
    """
    before = None if anyway else await newest(archive)
    try:
        with translated("snapshot"):
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                if before is not None:
                    await _check_grown(connection, before)
                columns = await _columns(connection)
                migration = await connection.fetchval("SELECT max(name) FROM schema_migrations")
                tables = {t: await _Putting(archive, now_s, t).run(connection, columns[t]) for t in columns}
    except BaseException:
        # Cancelling a query would make asyncpg open further connections (its #1326).
        connection.terminate()
        raise
    taken = Snapshot(taken_s=now_s, migration=migration, tables=tables)
    body = taken.model_dump_json().encode()
    if not await archive.keep(("manifests", str(now_s)), body + b"\n" + _digest(body).encode()):
        raise Transient(f"snapshot {now_s}", "another one was taken in the same second")
    _log.info("snapshot_taken", taken=rfc3339(now_s), rows=taken.rows, bytes=taken.size_bytes)
    return taken


async def _check_grown(connection: asyncpg.Connection, before: Snapshot) -> None:
    for table in GROWS:
        there = before.tables[table].rows if table in before.tables else 0
        rows = await connection.fetchval(f"SELECT count(*) FROM {table}") if there else 0  # noqa: S608  # a constant
        if rows < there:
            raise Fatal(
                "snapshot",
                f"{table} has {rows:,} rows here, and {there:,} in {before}: this ledger is not the one that it was",
                "restore it (`headgate restore`), or take one all the same: `headgate snapshot --anyway`",
            )


async def _columns(connection: asyncpg.Connection) -> dict[str, tuple[str, ...]]:
    """Of those tables of a snapshot that there are: before an upgrade some may be missing."""
    found: dict[str, list[str]] = {}
    for row in await connection.fetch(_COLUMNS, list(TABLES)):
        if row["column_name"] not in _LEFT_OUT.get(row["table_name"], ()):
            found.setdefault(row["table_name"], []).append(row["column_name"])
    return {t: tuple(found[t]) for t in TABLES if t in found}


class _Putting:
    """One table on its way into the archive, a part at a time: PostgreSQL waits while one is put."""

    def __init__(self, archive: S3Archive, taken_s: int, table: str) -> None:
        self._archive = archive
        self._taken_s = taken_s
        self._table = table
        self._parts: list[Part] = []
        self._begin()

    def _begin(self) -> None:
        self._frame = zstandard.ZstdCompressor(level=LEVEL).compressobj()
        self._body = bytearray()
        self._empty = True

    async def run(self, connection: asyncpg.Connection, columns: tuple[str, ...]) -> Table:
        only = _ONLY.get(self._table, "true")
        query = f"SELECT {', '.join(columns)} FROM {self._table} WHERE {only}"  # noqa: S608  # all of them constants, or the catalogue's
        said = await connection.copy_from_query(
            query, output=self._write, format="text", timeout=COPY_DEADLINE_S
        )
        await self._end()
        return Table(columns=columns, rows=int(said.removeprefix("COPY ")), parts=tuple(self._parts))

    async def _write(self, data: bytes) -> None:
        self._body += self._frame.compress(data)
        self._empty = False
        if len(self._body) >= PART_BYTES:
            await self._end()

    async def _end(self) -> None:
        if self._empty:
            return
        body = bytes(self._body + self._frame.flush())
        if len(self._parts) == PARTS_MAX:
            raise Fatal(f"snapshot of {self._table}", f"has more than {PARTS_MAX:,} parts")
        await self._archive.keep(_part_name(self._taken_s, self._table, len(self._parts)), body)
        self._parts.append(Part(size_bytes=len(body), digest=_digest(body)))
        self._begin()


def _part_name(taken_s: int, table: str, number: int) -> tuple[str, str]:
    return str(taken_s), f"{table.replace('_', '-')}-{number}"


def _digest(body: bytes) -> str:
    return blake2b(body, digest_size=16).hexdigest()


# --- finding and loading one ------------------------------------------------------------------------------------------


async def taken(archive: S3Archive) -> list[int]:
    """When the snapshots that are kept were taken, oldest first. Raises Transient."""
    return sorted(int(name) for name in await archive.kept_names("manifests") if name.isdecimal())


async def read(archive: S3Archive, taken_s: int) -> Snapshot:
    """The manifest of one. Raises Transient; Fatal where it is not there, spoilt, or of a newer Headgate."""
    where = f"snapshot {taken_s}"
    body = await archive.kept(("manifests", str(taken_s)), MANIFEST_BYTES_MAX)
    if body is None:
        raise Fatal(where, "is not there", "see `headgate snapshot --list`")
    text, _, digest = body.rpartition(b"\n")
    if _digest(text).encode() != digest:
        raise Fatal(where, "its manifest is spoilt", ANOTHER)
    try:
        return Snapshot.model_validate_json(text)
    except ValidationError as error:
        what = f"its manifest is a newer Headgate's: {error.errors()[0]['msg']}"
        raise Fatal(where, what, "restore with the version that took it") from error


async def newest(archive: S3Archive) -> Snapshot | None:
    """The last one that was taken; None without one. Raises as `read`."""
    times = await taken(archive)
    return await read(archive, times[-1]) if times else None


async def is_new(connection: asyncpg.Connection) -> bool:
    """Whether a ledger has never been used; it need not be migrated. Raises Transient, Fatal."""
    with translated("ledger"):
        there = await connection.fetch(
            "SELECT t FROM unnest($1::text[]) AS t WHERE to_regclass(t) IS NOT NULL", list(LIVED)
        )
        rows = " OR ".join(f"EXISTS (SELECT FROM {row['t']})" for row in there)
        return not there or not await connection.fetchval(f"SELECT {rows}")


async def load(
    connection: asyncpg.Connection, archive: S3Archive, snapshot: Snapshot, then: Then | None = None
) -> None:
    """Load a snapshot into a new ledger, in one transaction, at the end of which `then` is called.

    Raises Fatal where the ledger is in use, where the snapshot is spoilt or of a newer schema; Transient. Nothing is loaded then, and the connection
    is not to be used again.
    """
    where = f"snapshot {snapshot.taken_s}"
    try:
        with translated(where):
            async with connection.transaction():
                await _lock(connection, where)
                here = await _columns(connection)
                for name, table in snapshot.tables.items():
                    if unknown := set(table.columns) - set(here.get(name, ())):
                        what = f"was taken by a newer schema ({snapshot.migration}): {name} has no {', '.join(sorted(unknown))} here"
                        raise Fatal(where, what, "restore with the version of Headgate that took it")
                    await _load_table(connection, archive, snapshot, name)
                for statement in (*_UNPROVED, _NEXT_LOOK):
                    await connection.execute(statement)
                if then is not None:
                    await then(connection)
    except BaseException:
        connection.terminate()
        raise
    _log.info("snapshot_loaded", taken=rfc3339(snapshot.taken_s), rows=snapshot.rows)


async def _lock(connection: asyncpg.Connection, where: str) -> None:
    """From here on nobody else writes. What a worker may have written before it knew better (a plan's slots) is left to the snapshot."""
    await connection.execute(f"LOCK TABLE {', '.join(TABLES)} IN ACCESS EXCLUSIVE MODE")
    if not await is_new(connection):
        raise Fatal(
            where,
            "the ledger is in use: a snapshot is loaded into an empty one only",
            "stop consumers and coordinator, and let postgres.dsn name an empty database",
        )
    await connection.execute(f"TRUNCATE {', '.join(TABLES)}")


async def _load_table(
    connection: asyncpg.Connection, archive: S3Archive, snapshot: Snapshot, name: str
) -> None:
    table = snapshot.tables[name]
    said = await connection.copy_to_table(
        name,
        source=_rows(archive, snapshot.taken_s, name, table),
        columns=table.columns,
        format="text",
        timeout=COPY_DEADLINE_S,
    )
    if (rows := int(said.removeprefix("COPY "))) != table.rows:
        raise Fatal(
            f"snapshot {snapshot.taken_s}", f"{name} has {rows} rows, and the manifest says {table.rows}"
        )


async def _rows(archive: S3Archive, taken_s: int, name: str, table: Table) -> AsyncIterator[bytes]:
    for number, part in enumerate(table.parts):
        body = await archive.kept(_part_name(taken_s, name, number), part.size_bytes)
        if body is None or len(body) != part.size_bytes or _digest(body) != part.digest:
            what = f"part {number} of {name} is {'not there' if body is None else 'not what was put'}"
            raise Fatal(
                f"snapshot {taken_s}", what, "take the one before it: `headgate restore --snapshot TIME`"
            )
        for chunk in zstandard.ZstdDecompressor().read_to_iter(body, write_size=FRAME_BYTES_MAX):
            yield chunk
            await asyncio.sleep(0)


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    """For machines: when, how much, and rows by table."""
    rows = {name: table.rows for name, table in snapshot.tables.items()}
    return {
        "taken": rfc3339(snapshot.taken_s),
        "bytes": snapshot.size_bytes,
        "migration": snapshot.migration,
        "rows": rows,
    }
