"""Roles of PostgreSQL: what each part may do with the tables, where somebody has made the roles (docs/postgres-roles.sql).

Granting is idempotent, one process at a time, and in one transaction. Without the roles nothing happens: one user then does everything.
"""

from __future__ import annotations

from importlib.resources import files

from ingest.sinks.connection import open_connection, translated
from shard_config.model import Postgres

_LOCK = 0x68656164676176  # beside the partitions' one

_OURS = """SELECT count(*) FROM pg_roles
WHERE rolname = ANY($1) AND (rolname <> 'headgate_setup' OR pg_has_role(oid, 'USAGE'))"""
"""Roles are the server's, and another installation on it may be who has them."""

ROLES = (
    "headgate_setup",
    "headgate_partitions",
    "headgate_consumer",
    "headgate_coordinator",
    "headgate_operator",
    "headgate_viewer",
)


async def grant(postgres: Postgres) -> bool:
    """Grant what `grants.sql` says; False where the roles are not there, or we are not of `headgate_setup`. Raises Transient, and Fatal where we may not."""
    connection = await open_connection(postgres, "headgate setup")
    try:
        with translated("roles"):
            if await connection.fetchval(_OURS, list(ROLES)) != len(ROLES):
                return False
            async with connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
                await connection.execute((files("ingest.sinks") / "grants.sql").read_text(encoding="utf-8"))
            return True
    finally:
        connection.terminate()
