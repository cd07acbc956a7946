"""Several connections to PostgreSQL that see one moment: what they read together is as if one had read it alone.

One sends and does little else (30 ns a number), and so does who reads it; on several both have something to do all the time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import asyncpg

from ingest.sinks.connection import open_connection, translated
from shard_config.model import Postgres

NAME: Final = "headgate report"


@asynccontextmanager
async def snapshot(
    postgres: Postgres, many: int, statement_s: int
) -> AsyncIterator[Sequence[asyncpg.Connection]]:
    """So many connections, each within a read-only transaction of the same snapshot; a statement is given up after `statement_s`.

    They are closed at the end, whatever they do then. Raises Transient and Fatal.
    """
    async with AsyncExitStack() as stack:
        connections: list[asyncpg.Connection] = []
        seen = ""
        for _ in range(many):
            connection = await open_connection(postgres, NAME)
            stack.callback(connection.terminate)
            connections.append(connection)
            with translated("report"):
                await connection.execute(f"SET statement_timeout = '{statement_s}s'")
                await connection.transaction(isolation="repeatable_read", readonly=True).start()
                if seen:
                    await connection.execute(f"SET TRANSACTION SNAPSHOT '{seen}'")
                elif many > 1:
                    seen = await connection.fetchval("SELECT pg_export_snapshot()")
        yield connections
