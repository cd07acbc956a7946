"""Accounts and services that are paused: their windows are planned and show, and nobody is asked until they are resumed.

A pause names an account and a service, either of which may be ALL. It holds from the next tick of the coordinator on; tasks that are on
`collect` by then are executed. A pause ends by the words that it was made with: a part of a wider one cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Self

import asyncpg

from ingest.model import Task, TaskItem, TaskKind

ALL = "*"


@dataclass(frozen=True, slots=True)
class Pause:
    """Of the account (for exposition: the account label) and the service (or job), since when, and why."""

    account: str
    service: str
    since: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class Pauses:
    """All pauses that hold."""

    _pairs: frozenset[tuple[str, str]] = field(default_factory=frozenset)

    @classmethod
    def of(cls, pauses: Iterable[Pause]) -> Self:
        return cls(frozenset((p.account, p.service) for p in pauses))

    def cover(self, account: str, service: str) -> bool:
        """Whether this account's service is paused."""
        if not self._pairs:
            return False
        asked = ((a, s) for a in (account, ALL) for s in (service, ALL))
        return any(pair in self._pairs for pair in asked)


def split(task: Task, pauses: Pauses, stopped: Collection[tuple[str, str]] = ()) -> list[Task]:
    """A task without what is paused or stopped, and either of it as a task of kind PAUSED or BUDGET. Each has an id of its own items.

    `stopped` are the accounts and services whose budget is spent.
    """
    account = task.target.account
    parts: dict[str, list[TaskItem]] = {task.kind: [], TaskKind.PAUSED: [], TaskKind.BUDGET: []}
    for item in task.items:
        if pauses.cover(account, item.service):
            parts[TaskKind.PAUSED].append(item)
        elif (account, item.service) in stopped:
            parts[TaskKind.BUDGET].append(item)
        else:
            parts[task.kind].append(item)
    if len(parts[task.kind]) == len(task.items):
        return [task]
    return [replace(task.part(items), kind=str(kind)) for kind, items in parts.items() if items]


# --- the table: whoever calls translates asyncpg's errors -------------------------------------------------------


async def read(connection: asyncpg.Connection) -> list[Pause]:
    """All pauses, by account and service."""
    rows = await connection.fetch(
        "SELECT account, service, since, reason FROM pauses ORDER BY account, service"
    )
    return [Pause(**row) for row in rows]


async def begin(connection: asyncpg.Connection, pause: Pause) -> bool:
    """False where it holds already; then its reason stays."""
    done = await connection.execute(
        "INSERT INTO pauses (account, service, since, reason) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
        pause.account, pause.service, pause.since, pause.reason,
    )  # fmt: skip
    return bool(done == "INSERT 0 1")


async def end(connection: asyncpg.Connection, account: str, service: str) -> bool:
    """False where there is none of these words."""
    done = await connection.execute(
        "DELETE FROM pauses WHERE account = $1 AND service = $2", account, service
    )
    return bool(done == "DELETE 1")
