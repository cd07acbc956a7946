"""Connections to PostgreSQL, and its errors in our terms. Nothing above `ingest.sinks` imports asyncpg's exceptions.

A connection notices a dead peer (TCP keepalives on the server's side, an outer timeout on ours), waits for no lock longer
than `LOCK_TIMEOUT_S`, and speaks UTC. uuids travel as their 16 bytes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg

from ingest.errors import Fatal, HeadgateError, Transient
from shard_config.model import Postgres

CONNECT_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 5.0

_ABANDON_S = 1.0
"""How long work on a terminated connection may take to notice."""

_SETTINGS = {
    "timezone": "UTC",
    "lock_timeout": f"{LOCK_TIMEOUT_S:.0f}s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30s",
    # Partition pruning costs the planner's estimate more than it costs, which would start the compiler for nothing.
    "jit": "off",
    # A generic plan prunes no partition by the bounds that the statements give.
    "plan_cache_mode": "force_custom_plan",
}

T = TypeVar("T")


def server_of(postgres: Postgres) -> str:
    """host:port/database, fit for messages: no user, no password."""
    parts = urlsplit(postgres.dsn)
    hosts = parts.netloc.rpartition("@")[2] or "localhost"
    return hosts + ("" if re.search(r":\d+$", hosts) else ":5432") + parts.path


async def open_connection(postgres: Postgres, application_name: str) -> asyncpg.Connection:
    """A new connection. Raises Transient where the server cannot be reached, Fatal where it will not have us."""
    with translated(f"postgres {server_of(postgres)}"):
        connection = await asyncpg.connect(
            postgres.dsn,
            password=postgres.password.get_secret_value() if postgres.password else None,
            timeout=CONNECT_TIMEOUT_S,
            server_settings={**_SETTINGS, "application_name": application_name},
        )
        await connection.set_type_codec(
            "uuid", schema="pg_catalog", encoder=bytes, decoder=bytes, format="binary"
        )
        return connection


async def bounded(connection: asyncpg.Connection, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The result of `work`, which uses `connection`; when it takes too long, or the caller is cancelled, the connection is
    terminated and with it the transaction. Raises Transient on the timeout.

    Cancelling `work` itself would make asyncpg open a further connection, without bound, to ask for the cancellation
    (MagicStack/asyncpg#1326); so the connection is closed under it instead.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if task.done():
            return task.result()
    finally:
        if not task.done():
            connection.terminate()
            await asyncio.wait({task}, timeout=_ABANDON_S)
            if not task.cancel() and not task.cancelled():
                task.exception()  # it is what the termination caused; asked for, so that asyncio does not log it
    raise Transient("postgres", f"no answer within {timeout_s:g} s; the connection was terminated")


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Raise what asyncpg raises as Transient or Fatal; HeadgateErrors and cancellation pass."""
    try:
        yield
    except (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,  # a connection that was terminated in mid-answer
        OSError,
        TimeoutError,
    ) as error:
        raise translate(where, error) from error


def translate(where: str, error: Exception) -> HeadgateError:
    """Our error for one of asyncpg's. What we do not know is Fatal: repeating it unread could go on for ever."""
    what = f"{type(error).__name__}: {error}"
    match error:
        case asyncpg.UndefinedTableError() | asyncpg.UndefinedColumnError():
            return Fatal(where, what, "the schema is missing or old: run the migrations")
        case asyncpg.InvalidAuthorizationSpecificationError() | asyncpg.InvalidCatalogNameError():
            return Fatal(where, what, "check postgres.dsn and its password")
        case asyncpg.InsufficientPrivilegeError():
            return Fatal(where, what, "`headgate setup` grants what each role needs: docs/postgres-roles.sql")
        case asyncpg.DiskFullError():
            return Transient(where, what, "the server's disk is full", retry_after_s=10.0)
        case (
            asyncpg.PostgresConnectionError()
            | asyncpg.TransactionRollbackError()
            | asyncpg.LockNotAvailableError()
            | asyncpg.InsufficientResourcesError()
            | asyncpg.OperatorInterventionError()
            | asyncpg.IdleInTransactionSessionTimeoutError()
            | asyncpg.ReadOnlySQLTransactionError()  # a standby, until the failover is through
            | asyncpg.InternalClientError()
            | OSError()
            | TimeoutError()
        ):
            return Transient(where, what)
        case asyncpg.InterfaceError() if not isinstance(error, ValueError):
            return Transient(where, what)  # the connection is closed, or closing
    return Fatal(where, what)
