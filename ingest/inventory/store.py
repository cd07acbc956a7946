"""The inventory in PostgreSQL: looks go in, the history of resources comes out.

Guarantees:

* a look is applied in one transaction, under the lock of its scope's row, so that two refreshes at once take turns;
* applying is idempotent, and a look that is no newer than the last whole one changes nothing;
* a failed look is remembered with its reason, and ends no span;
* the reader streams: its memory is bounded by a page of rows and one resource's spans, whatever the range holds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import asyncpg

from ingest.clock import utc
from ingest.inventory.history import UNKNOWN_S, Changes, Open, changes
from ingest.inventory.model import Lived, Look, Scope, Span, decode, encode
from ingest.sinks.connection import bounded, translated

APPLY_S: Final = 120.0
"""For one look; 100,000 new resources take 5 s."""
PREFETCH: Final = 2_000
DOUBT: Final = (
    "it lists none any more, which may as well mean that they are not recorded there: nothing was ended by it"
)
LATE: Final = "a look that is as new or newer is known already: nothing was changed by this one; try again"
KEPT: Final = timedelta(days=800)
"""Spans that ended longer ago are forgotten: CloudWatch itself keeps 455 days."""

_TRIED = """INSERT INTO inventory_looks AS l (account, region, service, source, tried_at, failure)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (account, region, service) DO UPDATE SET
    tried_at = greatest(l.tried_at, excluded.tried_at),
    source = CASE WHEN excluded.tried_at >= l.tried_at THEN excluded.source ELSE l.source END,
    failure = CASE WHEN excluded.tried_at >= l.tried_at THEN excluded.failure ELSE l.failure END
RETURNING whole_at"""

_WHOLE = """UPDATE inventory_looks SET whole_at = $4, first_at = coalesce(first_at, $4), lacks = $5
WHERE account = $1 AND region = $2 AND service = $3"""

_DOUBTED = """UPDATE inventory_looks SET failure = $5
WHERE account = $1 AND region = $2 AND service = $3 AND tried_at = $4"""

_OPEN = """SELECT id, since, seen, born, attributes FROM inventory
WHERE account = $1 AND region = $2 AND service = $3 AND until IS NULL"""

_END = """UPDATE inventory SET until = ended.until
FROM unnest($4::text[], $5::timestamptz[], $6::timestamptz[]) AS ended (id, since, until)
WHERE inventory.account = $1 AND inventory.region = $2 AND inventory.service = $3
    AND inventory.id = ended.id AND inventory.since = ended.since AND inventory.until IS NULL"""

_COLUMNS = ("account", "region", "service", "id", "since", "until", "seen", "born", "attributes")

_RANGE = """SELECT account, region, service, id, since, until, seen, born, attributes FROM inventory
WHERE since < $2 AND (until IS NULL OR until > $1) AND ($3::text[] IS NULL OR account = ANY ($3))
ORDER BY account, region, service, id, since"""

_KNOWN = """SELECT l.*, (SELECT count(*) FROM inventory i WHERE i.account = l.account AND i.region = l.region
    AND i.service = l.service AND i.until IS NULL) AS resources
FROM inventory_looks l ORDER BY account, region, service"""


@dataclass(frozen=True, slots=True)
class Known:
    """How a scope stands. Where `failure` is not empty, the list is as old as `whole_s`; None: nobody has ever had one."""

    scope: Scope
    source: str
    first_s: int | None
    whole_s: int | None
    tried_s: int
    failure: str
    lacks: tuple[str, ...]
    resources: int


async def apply(connection: asyncpg.Connection, look: Look) -> Changes:
    """Write what a look changes, all of it or nothing; returns that. Raises Transient and Fatal."""
    with translated(f"inventory {look.scope}"):
        return await bounded(connection, _apply(connection, look), APPLY_S)


async def apply_all(connection: asyncpg.Connection, looks: Sequence[Look]) -> list[Changes]:
    """`apply` of all, or of none. Raises Transient and Fatal."""
    with translated("inventory"):
        async with connection.transaction():
            return [await apply(connection, look) for look in looks]


async def _apply(connection: asyncpg.Connection, look: Look) -> Changes:
    scope = (look.scope.account, look.scope.region, look.scope.service)
    async with connection.transaction():
        # The row is locked by this until the end.
        before = await connection.fetchval(_TRIED, *scope, look.source, utc(look.at_s), look.failure)
        rows = await connection.fetch(_OPEN, *scope)
        if look.failure:
            return Changes(same=len(rows))
        if look.empty_is_doubtful and not look.resources and rows:
            await connection.execute(_DOUBTED, *scope, utc(look.at_s), DOUBT)
            return Changes(same=len(rows), doubt=DOUBT)
        known = {row["id"]: _open(look.scope, row) for row in rows}
        found = changes(known, look, _seconds(before))
        if before is not None and utc(look.at_s) <= before:
            says_more = found.new or found.changed or found.gone
            return Changes(same=len(rows), doubt=LATE if says_more else "")
        if found.ended:
            ended = [(one.id, utc(one.since_s), utc(one.until_s)) for one in found.ended]
            await connection.execute(_END, *scope, *map(list, zip(*ended, strict=True)))
        records = [
            (*scope, one.resource.id, utc(one.since_s), None if one.until_s is None else utc(one.until_s),
             utc(one.seen_s), utc(one.born_s), encode(one.resource))
            for one in found.begun
        ]  # fmt: skip
        if records:
            await connection.copy_records_to_table("inventory", records=records, columns=_COLUMNS)
        await connection.execute(_WHOLE, *scope, utc(look.at_s), list(look.lacks))
        return found


async def resources(
    connection: asyncpg.Connection, from_s: int, to_s: int, accounts: Sequence[str] | None = None
) -> AsyncIterator[Lived]:
    """What lived in [from_s, to_s), ordered by account, region, service and id, as of one moment. None: of all accounts.

    The connection is in a transaction until the iterator is done or closed. Raises Transient, Fatal, and Rejected for a row that is spoilt.
    """
    wanted = None if accounts is None else list(accounts)
    with translated("inventory"):
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            rows: list[asyncpg.Record] = []
            cursor = connection.cursor(_RANGE, utc(from_s), utc(to_s), wanted, prefetch=PREFETCH)
            async for row in cursor:
                if rows and rows[0][:4] != row[:4]:
                    yield _lived(rows, from_s, to_s)
                    rows = []
                rows.append(row)
            if rows:
                yield _lived(rows, from_s, to_s)


async def known(connection: asyncpg.Connection) -> list[Known]:
    """All scopes that somebody has looked at. Raises Transient and Fatal."""
    with translated("inventory"):
        rows = await connection.fetch(_KNOWN)
    return [
        Known(
            _scope(row), row["source"], _seconds(row["first_at"]), _seconds(row["whole_at"]),
            int(row["tried_at"].timestamp()), row["failure"], tuple(row["lacks"]), row["resources"],
        )
        for row in rows
    ]  # fmt: skip


async def forget(connection: asyncpg.Connection, now_s: int) -> int:
    """Drop spans that ended long ago; returns how many. Raises Transient and Fatal."""
    with translated("inventory"):
        done: str = await connection.execute("DELETE FROM inventory WHERE until < $1", utc(now_s) - KEPT)
    return int(done.rpartition(" ")[2])


def _lived(rows: Sequence[asyncpg.Record], from_s: int, to_s: int) -> Lived:
    scope = _scope(rows[0])
    spans = tuple(
        Span(
            max(from_s, int(row["since"].timestamp())),
            min(to_s, _seconds(row["until"]) or to_s),
            int(row["seen"].timestamp()),
            decode(scope, row["id"], row["attributes"]),
        )
        for row in rows
    )
    born_s, until_s = int(rows[0]["born"].timestamp()), _seconds(rows[-1]["until"])
    created_s = spans[-1].resource.created_s
    gone_s = until_s if until_s is not None and until_s < to_s else None
    return Lived(
        spans, created_s if created_s is not None else born_s if born_s != UNKNOWN_S else None, gone_s
    )


def _open(scope: Scope, row: Any) -> Open:
    since_s, seen_s, born_s = (int(row[name].timestamp()) for name in ("since", "seen", "born"))
    return Open(since_s, seen_s, born_s, decode(scope, row["id"], row["attributes"]))


def _scope(row: Any) -> Scope:
    return Scope(row["account"], row["region"], row["service"])


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())
