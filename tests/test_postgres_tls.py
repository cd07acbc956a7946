"""PostgreSQL over TLS, and with a role a part: each works with its own, and may do no more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import yaml
from structlog.testing import capture_logs

from ingest.clock import SystemClock
from ingest.errors import Fatal, HeadgateError, Transient
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import migrate
from ingest.sinks.partitions import SAMPLES, Partitioned, create_partitions, drop_partitions
from ingest.sinks.postgres import PostgresSink
from ingest.sinks.roles import grant
from shard_config.load import load
from shard_config.model import Config, Postgres, ServiceProfile
from tests.conftest import eventually
from tests.secure_servers import Authority, SecurePostgres, tls_programs
from workers import consumer, coordinator, exporter, simulator
from workers.lifecycle import Lifecycle
from workers.setup import setup
from workers.status import status
from workers.world import World, account_ids

ROLES_SQL = Path(__file__).resolve().parent.parent / "docs" / "postgres-roles.sql"
PARTS = ("setup", "consumer", "coordinator", "operator", "viewer")
PASSWORD = "of-a-test-4711"
[ACCOUNT] = account_ids(1)
REGION = "eu-west-1"
FAST = {"namespace": "Fast", "period_s": 1, "poll_interval_s": 2, "settling_s": 2}

needs_tls = pytest.mark.skipif(
    tls_programs() is None,
    reason="there is no PostgreSQL with TLS in /usr/lib/postgresql: apt-get install postgresql",
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecurePostgres]:
    made = SecurePostgres(tmp_path_factory.mktemp("secure"), authority)
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
async def store(server: SecurePostgres) -> str:
    """The name of a database with roles, users, and the schema as the setup user has made it."""
    admin = await asyncpg.connect(server.dsn())
    await admin.execute("CREATE DATABASE store TEMPLATE template0")
    await admin.close()
    there = await asyncpg.connect(server.dsn("store"))
    for _ in range(2):  # again changes nothing
        await there.execute(ROLES_SQL.read_text())
    for part in PARTS:
        await there.execute(f"CREATE ROLE {part}_user LOGIN PASSWORD '{PASSWORD}' IN ROLE headgate_{part}")
    await there.close()
    return "store"


def as_(server: SecurePostgres, part: str, database: str = "store") -> Postgres:
    return Postgres.model_validate({"dsn": server.dsn(database, f"{part}_user"), "password": PASSWORD})


# --- TLS --------------------------------------------------------------------------------------------------------


@needs_tls
async def test_a_connection_is_encrypted_and_the_server_is_who_it_should_be(server: SecurePostgres) -> None:
    connection = await open_connection(Postgres(dsn=server.dsn()), "test")
    try:
        assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True
        assert (
            await connection.fetchval("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            == "TLSv1.3"
        )
    finally:
        connection.terminate()


@needs_tls
@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        ({"host": "localhost.localdomain"}, Transient, "CERTIFICATE_VERIFY_FAILED.*localhost.localdomain"),
        ({"ca": "another"}, Transient, "CERTIFICATE_VERIFY_FAILED.*unable to get local issuer"),
        ({"sslmode": "disable"}, Fatal, "no encryption"),
        ({"password": "wrong"}, Fatal, "password authentication failed.*check postgres.dsn and its password"),
    ],
    ids=["another-name", "unknown-ca", "in-the-clear", "password"],
)
@pytest.mark.usefixtures("store")
async def test_what_is_not_right_is_refused_with_the_reason(
    server: SecurePostgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    kind: type[HeadgateError],
    what: str,
) -> None:
    options = {"sslmode": change["sslmode"]} if "sslmode" in change else {}
    if "ca" in change:
        options["sslrootcert"] = str(Authority(tmp_path).ca_file)
    dsn = server.dsn("store", "viewer_user", **options)
    if host := change.get("host"):
        dsn = dsn.replace("127.0.0.1", host)
        loop = asyncio.get_running_loop()
        resolve = loop.getaddrinfo

        async def here(name: str, *args: Any, **more: Any) -> Any:
            return await resolve("127.0.0.1" if name == host else name, *args, **more)

        monkeypatch.setattr(loop, "getaddrinfo", here)
    postgres = Postgres.model_validate({"dsn": dsn, "password": change.get("password", PASSWORD)})
    with pytest.raises(kind, match=what) as refused:
        await open_connection(postgres, "test")
    assert PASSWORD not in str(refused.value)
    assert "wrong" not in str(refused.value)


@needs_tls
async def test_a_server_without_tls_is_not_spoken_to_in_the_clear(
    postgres_dsn: str, authority: Authority
) -> None:
    dsn = f"{postgres_dsn}?sslmode=verify-full&sslrootcert={authority.ca_file}"
    with pytest.raises(Transient, match="rejected SSL upgrade"):
        await open_connection(Postgres(dsn=dsn), "test")


# --- roles ------------------------------------------------------------------------------------------------------


async def test_every_part_works_with_its_role(
    server: SecurePostgres,
    store: str,
    tmp_path: Path,
    kafka_bootstrap: str,
    topic_prefix: str,
    s3_endpoint: str,
    bucket: str,
) -> None:
    """Partitions of a new day and month included: the store has none when the consumer starts."""
    world = World(7, [ACCOUNT], [REGION], 4, [ServiceProfile.model_validate({"service": "fast", **FAST})])
    sim = await simulator.start(world)
    kafka = {
        "bootstrap": kafka_bootstrap,
        "prefix": topic_prefix,
        "raw_partitions": 1,
        "ledger_partitions": 1,
    }
    document = {
        "accounts": [{"id": ACCOUNT, "regions": [REGION], "services": ["fast"]}],
        "services": {"fast": FAST},
        "startup_lookback_s": 0,
        "slots": 2,
        "aws": {"endpoint_url": sim.url, "role_template": "arn:aws:iam::{account}:role/Headgate"},
        "kafka": {**kafka, "session_timeout_s": 6},
        "s3": {"bucket": bucket, "endpoint_url": s3_endpoint},
        "budget": {"usd_per_day": 1000},
    }

    def config(part: str) -> Config:
        postgres = {"dsn": server.dsn(store, f"{part}_user"), "password": PASSWORD}
        path = tmp_path / f"{part}.yaml"
        path.write_text(yaml.safe_dump({**document, "postgres": postgres}))
        return load(path, environ={})

    await setup(config("setup"))
    await setup(config("setup"))
    sql = await open_connection(as_(server, "viewer"), "test")
    lifecycles = [Lifecycle() for _ in range(3)]

    async def worked() -> bool:
        sealed = await sql.fetchval("SELECT count(*) FROM windows WHERE sealed_at IS NOT NULL")
        planned = await sql.fetchval("SELECT count(*) FROM targets")
        return bool(sealed and planned)

    with capture_logs() as logs:
        async with asyncio.TaskGroup() as group:
            works = [
                exporter.serve(config("viewer"), "exporter-1", lifecycles[0]),  # it never looks at PostgreSQL
                consumer.serve(config("consumer"), "consumer-1", lifecycles[1]),
                coordinator.serve(config("coordinator"), lifecycles[2]),
            ]
            for work in works:
                group.create_task(work)
            try:
                await eventually(worked, timeout_s=40)
                seen = await status(config("viewer"), SystemClock())
            finally:
                for lifecycle in lifecycles:
                    lifecycle.stop.set()
    assert [entry for entry in logs if "nsufficientPrivilege" in str(entry)] == []
    assert seen.errors == ()
    # What one consumer has made another drops: of all tables that have partitions.
    theirs = await open_connection(as_(server, "consumer"), "test")
    for of in (
        SAMPLES,
        Partitioned("rollup_hours", by_month=True),
        Partitioned("rollup_days", by_month=True),
    ):
        await create_partitions(theirs, [20_000], set(), of)
        owners = "SELECT tableowner, count(*) FROM pg_tables WHERE starts_with(tablename, $1) GROUP BY 1"
        [(owner, tables)] = await sql.fetch(owners, of.table)
        assert owner == "headgate_partitions"
        assert len(await drop_partitions(theirs, 2**20, of)) == tables - 1
    theirs.terminate()
    sql.terminate()
    await sim.close()


WRITES = (
    "samples", "series", "positions", "landed", "tasks", "looks", "windows", "charges", "attempts", "targets", "stretches", "pauses",
    "dead_handled", "inventory", "schema_migrations",
)  # fmt: skip
MAY_WRITE = {
    "setup": set(WRITES),
    "consumer": {"samples", "positions", "landed", "tasks", "looks", "windows", "charges"},
    "coordinator": {"looks", "windows", "attempts", "targets", "stretches", "inventory"},
    "operator": {
        "samples", "positions", "landed", "tasks", "looks", "windows", "charges", "pauses", "dead_handled", "inventory",
    },
    "viewer": set(),
}  # fmt: skip


async def refused(connection: asyncpg.Connection, statement: str) -> bool:
    """Whether the role may not do this. What it may is rolled back."""
    change = connection.transaction()
    await change.start()
    try:
        await connection.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return True
    finally:
        await change.rollback()
    return False


@pytest.mark.parametrize("part", PARTS)
async def test_a_role_is_refused_what_is_anothers(server: SecurePostgres, schema: str, part: str) -> None:
    """Rows are changed by an UPDATE that touches none: the right is asked for all the same."""
    connection = await open_connection(as_(server, part, schema), "test")
    try:
        columns = {
            row["relname"]: row["attname"]
            for row in await connection.fetch(
                "SELECT DISTINCT ON (c.oid) c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid"
                " WHERE c.relname = ANY($1) AND a.attnum > 0 AND a.attidentity = ''",
                list(WRITES),
            )
        }
        assert columns.keys() == set(WRITES)
        writes = {
            table
            for table, column in columns.items()
            if not await refused(connection, f"UPDATE {table} SET {column} = {column} WHERE false")
        }
        reads = [t for t in WRITES if await refused(connection, f"SELECT FROM {t} LIMIT 0")]
        changes = [
            t for t in WRITES if not await refused(connection, f"ALTER TABLE {t} ADD COLUMN more integer")
        ]
        drops = [t for t in WRITES if not await refused(connection, f"DROP TABLE {t} CASCADE")]
        role = await refused(connection, "CREATE ROLE another")
        program = await refused(connection, "COPY series TO PROGRAM 'cat'")
        file = await refused(connection, "SELECT pg_read_file('postgresql.conf')")
        table = await refused(connection, "CREATE TABLE mine ()")
    finally:
        connection.terminate()
    assert writes == MAY_WRITE[part]
    assert reads == []
    owned = {"setup": list(WRITES), "consumer": ["samples"], "operator": ["samples"]}.get(part, [])
    assert (changes, drops) == (owned, owned)
    assert (role, program, file) == (True, True, True)
    assert table is (part in ("coordinator", "viewer"))


async def test_what_setup_has_not_granted_is_fatal_and_says_how_it_is(
    server: SecurePostgres, schema: str
) -> None:
    sink = await PostgresSink.connect(
        as_(server, "viewer", schema), sink_name="postgres", clock=SystemClock()
    )
    with pytest.raises(Fatal, match=r"permission denied for table positions.*postgres-roles\.sql"):
        await sink.init_positions("raw", [0])
    await sink.close()


async def test_without_roles_of_ours_setup_grants_nothing(server: SecurePostgres) -> None:
    """The roles are the server's: an installation of one user beside goes on as it is."""
    admin = await asyncpg.connect(server.dsn())
    await admin.execute(f"CREATE ROLE alone LOGIN PASSWORD '{PASSWORD}'")
    await admin.execute("CREATE DATABASE beside TEMPLATE template0 OWNER alone")
    await admin.close()
    postgres = Postgres.model_validate({"dsn": server.dsn("beside", "alone"), "password": PASSWORD})
    await migrate(postgres)
    assert await grant(postgres) is False


@pytest.fixture(scope="module")
async def schema(server: SecurePostgres, store: str) -> str:
    """The store, migrated and granted."""
    await migrate(as_(server, "setup"))
    assert await grant(as_(server, "setup")) is True
    return store
