"""Series that a process meets for the first time: their labels land with their first samples, in the same transaction.

An id that is met with other labels is refused by series, for all samples of it would be of two things. Labels are
compared when a process first meets an id; after that the id stands for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import numpy as np

from ingest.model import BatchId, Series, bytes_of
from ingest.ports import Landable, SeriesRejected
from ingest.sinks import statements
from ingest.sinks.copy import Rows
from ingest.sinks.seen import Seen


def first_met(where: str, batches: Sequence[Landable], rows: Rows, seen: Seen) -> dict[bytes, Series]:
    """Series of the batches, whose rows these are, that are not in `seen`; by id.

    Raises SeriesRejected where labels have a NUL, for which PostgreSQL's text has no place, and where two series of these batches
    share an id.
    """
    if seen.knows(rows.ids).all():
        return {}
    met: dict[bytes, Series] = {}
    conflicts: list[tuple[BatchId, int]] = []
    for one in batches:
        new = np.flatnonzero(~seen.knows(one.batch.ids))
        ids = bytes_of(one.batch.ids) if len(new) else []
        for i in new.tolist():
            series = one.batch.series[i]
            if met.setdefault(ids[i], series).key != series.key:
                conflicts.append((one.batch_id, i))
    if conflicts:
        raise SeriesRejected(where, "label_conflict", "two series of a landing share an id", conflicts)
    with_nul = {id_ for id_, series in met.items() if "\0" in _text(series)}
    if with_nul:
        raise SeriesRejected(where, "unstorable", "a label has a NUL", _places(with_nul, batches))
    return met


async def insert(
    connection: asyncpg.Connection,
    where: str,
    met: Mapping[bytes, Series],
    batches: Sequence[Landable],
    now: datetime,
) -> None:
    """Store the series that are not there yet. Raises SeriesRejected where an id is there with other labels."""
    if not met:
        return
    keys = [one.key for one in met.values()]
    columns: list[list[Any]] = [
        list(met),
        [k.account for k in keys],
        [k.region for k in keys],
        [k.namespace for k in keys],
        [k.metric for k in keys],
        [json.dumps(dict(k.dimensions)) for k in keys],
        [k.stat for k in keys],
        [k.period_s for k in keys],
        [one.unit for one in met.values()],
    ]
    await connection.execute(statements.INSERT_SERIES, *columns, now)
    others = {row["id"] for row in await connection.fetch(statements.OTHER_LABELS, *columns)}
    if others:
        what = f"{len(others)} ids have landed with other labels"
        raise SeriesRejected(where, "label_conflict", what, _places(others, batches))


def _text(series: Series) -> str:
    k = series.key
    pairs = [text for pair in k.dimensions for text in pair]
    return "".join([k.account, k.region, k.namespace, k.metric, k.stat, series.unit, *pairs])


def _places(ids: set[bytes], batches: Sequence[Landable]) -> list[tuple[BatchId, int]]:
    return [
        (one.batch_id, i) for one in batches for i, id_ in enumerate(bytes_of(one.batch.ids)) if id_ in ids
    ]
