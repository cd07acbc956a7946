"""Reading back what an audit, or a question about one point, needs: the store's rows and the ledger's looks. Changes nothing.

Rows come in chunks (`ingest.sinks.rows_back`), however many there are. Kafka's side is `ingest.scan`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import numpy as np
import orjson
from numpy.typing import NDArray

from ingest.clock import utc
from ingest.model import BatchId, Series, SeriesIds, SeriesKey, Target
from ingest.sinks.connection import translated
from ingest.sinks.rows_back import RowsBack, seconds_of

Place = tuple[str, str]
"""Account and region, as they stand in the labels."""


# --- the store's rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class StoreRows:
    """Rows of `samples`, n of them. `places` are indices into the places asked for, −1 where a row is of none; `ids` is (n, 2)."""

    places: NDArray[np.int64]
    ids: SeriesIds
    timestamps_s: NDArray[np.int64]
    values: NDArray[np.float64]
    versions: NDArray[np.int64]


_ROWS = """SELECT coalesce(p.n, 0)::int, m.ts, m.series, m.value, m.version
FROM samples AS m {join} JOIN series AS s ON s.id = m.series
    {join} JOIN unnest($1::text[], $2::text[]) WITH ORDINALITY AS p (account, region, n)
    ON p.account = s.account AND p.region = s.region
WHERE m.ts >= $3 AND m.ts < $4"""


async def store_rows(
    connection: asyncpg.Connection,
    places: Sequence[Place],
    start_s: int,
    end_s: int,
    take: Callable[[StoreRows], None],
    *,
    others: bool = False,
) -> None:
    """Hand all rows of these places in [start_s, end_s) to `take`, in chunks; with `others` those of no such place too.

    Raises Transient.
    """
    rows = RowsBack(lambda raw: take(_as_store_rows(raw)))
    with translated("store"):
        await connection.copy_from_query(
            _ROWS.format(join="LEFT" if others else "INNER"),
            [account for account, _ in places],
            [region for _, region in places],
            utc(start_s),
            utc(end_s),
            output=rows.feed,
            format="binary",
        )
    rows.finish()


def _as_store_rows(raw: NDArray[Any]) -> StoreRows:
    return StoreRows(
        raw["n"].astype(np.int64) - 1,
        raw["series"].astype(np.uint64),
        # Our timestamps are whole seconds; one that is not shows as another row.
        seconds_of(raw),
        raw["value"].astype(np.float64),
        raw["version"].astype(np.int64),
    )


_PLACES = """WITH RECURSIVE found AS (
    (SELECT account, region FROM series ORDER BY account, region LIMIT 1)
    UNION ALL
    SELECT n.account, n.region FROM found f, LATERAL (
        SELECT s.account, s.region FROM series s WHERE (s.account, s.region) > (f.account, f.region)
        ORDER BY s.account, s.region LIMIT 1) AS n)
SELECT account, region FROM found"""


async def store_places(connection: asyncpg.Connection) -> list[Place]:
    """The places that any series of the store is of. Raises Transient."""
    with translated("store"):
        return [(row[0], row[1]) for row in await connection.fetch(_PLACES)]


_SERIES = """SELECT id, account, region, namespace, metric, dimensions, stat, period_s, unit FROM series
WHERE id = ANY($1::uuid[])"""


async def store_series(connection: asyncpg.Connection, ids: Collection[bytes]) -> dict[bytes, Series]:
    """Labels by series id, 16 bytes; an unknown id is left out. Raises Transient."""
    if not ids:
        return {}
    with translated("store"):
        rows = await connection.fetch(_SERIES, list(ids))
    found = {}
    for row in rows:
        dimensions = tuple(sorted(orjson.loads(row["dimensions"]).items()))
        account, region, namespace, metric = row[1:5]
        key = SeriesKey(account, region, namespace, metric, dimensions, row["stat"], row["period_s"])
        found[bytes(row["id"])] = Series(key, row["unit"])
    return found


# --- the ledger's looks -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LedgerLook:
    """One row of `looks`: one item of a receipt. `windows` and `whole` are (start_s, points, digest).

    What was held, and published by a replay since, is among the `batches` and no longer `held`.
    """

    task_id: str
    service: str
    target: str
    archive_key: str
    finished_at_ms: int
    start_s: int
    end_s: int
    status: str
    points: int
    batches: tuple[BatchId, ...]
    windows: tuple[tuple[int, int, int], ...]
    whole: tuple[tuple[int, int, int], ...] = ()
    held: tuple[BatchId, ...] = ()


_KEYS = """SELECT DISTINCT target, archive_key FROM looks
WHERE finished_at >= $1 AND window_start < $2 AND window_end > $1 AND archive_key <> ''"""

_LOOKS = """SELECT task_id, service, target, archive_key, finished_at, window_start, window_end, status, points, batch_ids, windows,
    whole, held_ids
FROM looks WHERE task_id = ANY($1) AND archive_key <> '' ORDER BY finished_at, service"""


async def ledger_keys(connection: asyncpg.Connection, start_s: int, end_s: int) -> dict[Target, set[str]]:
    """Archive keys of the receipts about anything in [start_s, end_s), by target. Raises Transient."""
    with translated("ledger"):
        rows = await connection.fetch(_KEYS, utc(start_s), utc(end_s))
    found: dict[Target, set[str]] = defaultdict(set)
    for row in rows:
        found[Target.parse(row["target"])].add(row["archive_key"])
    return found


async def ledger_looks(
    connection: asyncpg.Connection, task_ids: Collection[str]
) -> dict[str, list[LedgerLook]]:
    """The archived looks of these tasks, by archive key, oldest first. Raises Transient."""
    with translated("ledger"):
        rows = await connection.fetch(_LOOKS, list(task_ids))
    found: dict[str, list[LedgerLook]] = defaultdict(list)
    for row in rows:
        found[row["archive_key"]].append(
            LedgerLook(
                task_id=row["task_id"],
                service=row["service"],
                target=row["target"],
                archive_key=row["archive_key"],
                finished_at_ms=round(row["finished_at"].timestamp() * 1000),
                start_s=int(row["window_start"].timestamp()),
                end_s=int(row["window_end"].timestamp()),
                status=row["status"],
                points=row["points"],
                batches=tuple(BatchId(b) for b in row["batch_ids"]),
                windows=_counts(row["windows"]),
                whole=_counts(row["whole"] or "[]"),
                held=tuple(BatchId(b) for b in row["held_ids"]),
            )
        )
    return found


def _counts(text: str) -> tuple[tuple[int, int, int], ...]:
    return tuple((w[0], w[1], w[2]) for w in orjson.loads(text))


async def landed_ids(connection: asyncpg.Connection, batches: Collection[BatchId]) -> set[BatchId]:
    """Which of these batches any sink says have landed. Raises Transient."""
    with translated("ledger"):
        rows = await connection.fetch("SELECT batch_id FROM landed WHERE batch_id = ANY($1)", list(batches))
    return {BatchId(row["batch_id"]) for row in rows}


@dataclass(frozen=True, slots=True)
class LedgerSeal:
    """What the ledger says that the store holds of sealed windows: of one, or of a folded day's. `spans` are [start_s, end_s)."""

    target: str
    service: str
    spans: tuple[tuple[int, int], ...]
    windows: int
    points: int
    digest: int

    @property
    def name(self) -> str:
        return f"[{utc(self.spans[0][0]):%Y-%m-%dT%H:%M:%SZ}, {utc(self.spans[-1][1]):%Y-%m-%dT%H:%M:%SZ})"

    def covers(self, start_s: int) -> bool:
        return any(a <= start_s < b for a, b in self.spans)


_SEALED = """SELECT target, service, points, digest, 1 AS windows,
    ARRAY[extract(epoch FROM window_start)::bigint] AS starts, ARRAY[extract(epoch FROM window_end)::bigint] AS ends
FROM windows WHERE target = ANY($1) AND sealed_at IS NOT NULL AND window_start >= $2 AND window_end <= $3
UNION ALL
SELECT d.target, d.service, d.points, d.digest, d.windows - d.declared_windows,
    (SELECT array_agg(extract(epoch FROM lower(r))::bigint) FROM unnest(own.covered) AS r),
    (SELECT array_agg(extract(epoch FROM upper(r))::bigint) FROM unnest(own.covered) AS r)
FROM sealed_days AS d, LATERAL (SELECT d.covered - coalesce((
    SELECT range_agg(r) FROM declared_days AS c, unnest(c.covered) AS r
    WHERE c.target = d.target AND c.service = d.service AND c.day = d.day), '{}') AS covered) AS own
WHERE d.target = ANY($1) AND d.first_start >= $2 AND d.last_end <= $3 AND d.relooked_at IS NULL AND NOT isempty(own.covered)"""


async def ledger_seals(
    connection: asyncpg.Connection, targets: Sequence[Target], start_s: int, end_s: int
) -> list[LedgerSeal]:
    """Seals of windows, and of folded days, that lie within [start_s, end_s). Raises Transient."""
    with translated("ledger"):
        rows = await connection.fetch(_SEALED, [str(t) for t in targets], utc(start_s), utc(end_s))
    return [
        LedgerSeal(
            row["target"],
            row["service"],
            tuple(zip(row["starts"], row["ends"], strict=True)),
            row["windows"],
            row["points"],
            row["digest"] % 2**64,
        )
        for row in rows
    ]


async def forgotten_days(
    connection: asyncpg.Connection, targets: Sequence[Target]
) -> set[tuple[str, str, int]]:
    """Target, service and day (since the epoch) of whose looks the ledger keeps only sums. Raises Transient."""
    with translated("ledger"):
        rows = await connection.fetch(
            "SELECT target, service, day - '1970-01-01'::date AS number FROM look_days WHERE target = ANY($1)",
            [str(t) for t in targets],
        )
    return {(row["target"], row["service"], row["number"]) for row in rows}
