"""Mistakes that somebody could make, planted in a worker: whatever checks the system must find each of them.

`plant(name)` is what a campaign's worker does (`tests.faults.worker`); a test gives a `Patch` that is undone. A mutant keeps to what its name says: all else
is the product's own code.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest import archive, objects
from ingest.archive import S3Archive
from ingest.objects import Part, part_key
from ingest.ports import Advance, ArchivedTask, Record
from ingest.sinks import postgres, statements
from ingest.sinks.connection import open_connection
from ingest.sinks.copy import Rows
from ingest.sinks.postgres import PostgresSink
from ingest.sources.metric_data import Answer, Page
from workers.reading import Reader

Patch = Callable[[Any, str, Any], None]
"""As `setattr`, or `pytest.MonkeyPatch.setattr`."""

Mutant = Callable[[Patch], None]

DROPPED_EVERY = 10_000
GAP_S = 0.3
"""Between a manifest and its parts, as if those were heavy: so that a fault finds it."""


def commit_before_landing(patch: Patch) -> None:
    """Kafka's offsets are committed before the records have landed."""
    once = Reader._once

    async def patched(self: Reader, records: Sequence[Record], revocations: int) -> None:
        await self.consumer.commit({r.position.partition: r.position.offset + 1 for r in records})
        await once(self, records, revocations)

    patch(Reader, "_once", patched)


def drop_every_10000th_row(patch: Patch, every: int = DROPPED_EVERY) -> None:
    """Of the rows of a landing one is left out now and then; the first one early, for a run may have fewer."""
    insert = postgres._insert_rows
    seen = every - random.randrange(1, 1 + every // 10)

    async def patched(connection: Any, rows: Rows, suspect: NDArray[np.bool_]) -> None:
        nonlocal seen
        kept = (np.arange(seen, seen + len(rows)) + 1) % every != 0
        seen += len(rows)
        await insert(connection, rows.select(kept), suspect[kept])

    patch(postgres, "_insert_rows", patched)


def ignore_partial_data(patch: Patch) -> None:
    """What AWS calls PartialData counts as Complete."""
    add = Answer.add

    def patched(self: Answer, page: Page) -> None:
        add(self, page)
        for row, status in self.statuses.items():
            if status == "PartialData":
                self.statuses[row] = "Complete"

    patch(Answer, "add", patched)


def last_arrival_wins(patch: Patch) -> None:
    """Landing takes what comes last, instead of the greatest version."""
    patch(statements, "UPSERT", statements.UPSERT.partition("WHERE")[0])


def position_outside_the_transaction(patch: Patch) -> None:
    """The position moves by itself, before the rows are there."""
    advance = PostgresSink._advance

    async def patched(self: PostgresSink, _: object, advances: Sequence[Advance]) -> bool:
        connection = await open_connection(self._postgres, "mutant")
        try:
            return await advance(self, connection, advances)
        finally:
            await connection.close()

    patch(PostgresSink, "_advance", patched)


def manifest_before_objects(patch: Patch) -> None:
    """A task's object is put before the parts that it lists. Everything goes into parts, for a small run has no heavy task."""
    pack, put = objects.pack, S3Archive._put
    held: dict[str, tuple[Part, ...]] = {}

    def packed(task: ArchivedTask) -> tuple[tuple[Part, ...], bytes]:
        parts, body = pack(task, 1)
        held[task.receipt.archive_key] = parts
        return (), body

    async def patched(self: S3Archive, key: str, body: bytes) -> bool:
        done = await put(self, key, body)
        parts = held.pop(key, ())
        if parts:
            await asyncio.sleep(GAP_S)
        for part in parts:
            await put(self, part_key(key, part.digest), part.body)
        return done

    patch(archive, "pack", packed)
    patch(S3Archive, "_put", patched)


MUTANTS: dict[str, Mutant] = {
    mutant.__name__: mutant
    for mutant in (
        commit_before_landing,
        drop_every_10000th_row,
        ignore_partial_data,
        last_arrival_wins,
        position_outside_the_transaction,
        manifest_before_objects,
    )
}


def plant(name: str) -> None:
    """In this process, for good. Raises KeyError where there is none of that name."""
    MUTANTS[name](setattr)
