"""One refresh: the configured source is asked, and each look goes into the store as it comes.

The store is not asked for anything while a source is; what was taken stays, whatever happens to the rest.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
import structlog

from ingest.clock import Clock
from ingest.errors import HeadgateError
from ingest.inventory import csv_file
from ingest.inventory.config_aggregator import aggregate
from ingest.inventory.describe import describe
from ingest.inventory.history import Changes
from ingest.inventory.model import Look, Scope
from ingest.inventory.store import apply, apply_all, forget
from ingest.sinks.connection import open_connection
from shard_config.model import Config, Postgres

_log = structlog.get_logger()

LISTED_MAX: Final = 100_000
"""Scopes whose outcome one refresh returns."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one look."""

    scope: Scope
    resources: int
    changes: Changes
    failure: str = ""
    lacks: tuple[str, ...] = ()


async def refresh(config: Config, clock: Clock) -> list[Outcome]:
    """Ask the configured source for everything, and write what it says; returns what came of each scope.

    Raises Transient and Fatal for what the store does, HeadgateError for a file that is not as it should be.
    """
    store = _Store(config.postgres)
    try:
        match config.inventory.source:
            case "describe":
                await describe(config, clock, store.take)
            case "config":
                await aggregate(config, clock, store.take)
            case "csv":
                await store.take_file(Path(config.inventory.file), clock)
            case "none":
                raise HeadgateError("inventory.source", "is none", "set it to describe, config or csv")
        await store.forget(clock.now_s())
    finally:
        store.close()
    return store.outcomes


async def import_file(path: Path, config: Config, clock: Clock) -> list[Outcome]:
    """Write what a CSV file says: all of it or, where a line is bad or the store fails, nothing. Raises as `refresh`."""
    store = _Store(config.postgres)
    try:
        await store.take_file(path, clock)
    finally:
        store.close()
    return store.outcomes


def looks_of(path: Path, at_s: int) -> list[Look]:
    """The looks of a file. Raises HeadgateError where it cannot be read, or is not as it should be."""
    try:
        if path.stat().st_size > csv_file.FILE_BYTES_MAX:
            raise HeadgateError(str(path), f"it has more than {csv_file.FILE_BYTES_MAX:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadgateError(str(path), f"it cannot be read: {error}") from error
    return csv_file.read(text, at_s, str(path))


class _Store:
    """The connection of one refresh, made when the first look comes, and made anew where it was lost meanwhile."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._connection: asyncpg.Connection | None = None
        self.outcomes: list[Outcome] = []

    async def take(self, look: Look) -> None:
        self._say(look, await apply(await self._open(), look))

    async def take_file(self, path: Path, clock: Clock) -> None:
        # In a thread, for 100,000 lines take a second.
        looks = await asyncio.to_thread(looks_of, path, clock.now_s())
        for look, found in zip(looks, await apply_all(await self._open(), looks), strict=True):
            self._say(look, found)

    def _say(self, look: Look, found: Changes) -> None:
        failure = look.failure or found.doubt
        if failure:
            _log.warning("inventory_not_listed", scope=str(look.scope), source=look.source, error=failure)
        if len(self.outcomes) < LISTED_MAX:
            resources = found.same if failure else len(look.resources)
            self.outcomes.append(Outcome(look.scope, resources, found, failure, look.lacks))

    async def forget(self, now_s: int) -> None:
        await forget(await self._open(), now_s)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()

    async def _open(self) -> asyncpg.Connection:
        if self._connection is None or self._connection.is_closed():
            self._connection = await open_connection(self._postgres, "headgate inventory")
        return self._connection
