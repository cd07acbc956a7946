"""A sink in memory, for tests of what lands into one. It passes the suite that the PostgreSQL sink passes (`sink_contract.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ingest.errors import Fatal
from ingest.model import BatchId, SeriesKey, bytes_of
from ingest.ports import Advance, Landable, Landed, SeriesRejected, StoredPosition

Table = dict[tuple[bytes, int], tuple[int, float]]
"""(series id, timestamp in seconds) → (version, value)."""


class FakeSink:
    """`ports.Sink`; what has landed is in `table`, `landed` and `series`."""

    def __init__(self) -> None:
        self.table: Table = {}
        self.landed: dict[BatchId, Landable] = {}
        self.series: dict[bytes, SeriesKey] = {}
        self.claims: dict[str, tuple[int, ...]] = {}
        self._positions: dict[tuple[str, int], StoredPosition] = {}

    async def claim(self, topic: str, partitions: Sequence[int]) -> None:
        self.claims[topic] = tuple(partitions)

    async def positions(self, topic: str, partitions: Sequence[int]) -> Mapping[int, StoredPosition]:
        return {p: self._positions[topic, p] for p in partitions if (topic, p) in self._positions}

    async def init_positions(self, topic: str, partitions: Sequence[int]) -> None:
        for partition in partitions:
            self._positions.setdefault((topic, partition), StoredPosition(0, b""))

    async def land(self, advances: Sequence[Advance], batches: Sequence[Landable]) -> Landed:
        for a in advances:
            found = self._positions.get((a.topic, a.partition))
            if found is None or found.next != a.expected_next:
                raise Fatal(
                    f"fake {a.topic}[{a.partition}]", f"the position is {found}, expected {a.expected_next}"
                )
        new = {b.batch_id: b for b in batches if b.batch_id not in self.landed}
        refused = [(b.batch_id, i) for b in new.values() for i in self._refused(b)]
        if refused:
            raise SeriesRejected("fake", "label_conflict", "ids have landed with other labels", refused)
        for b in new.values():
            self._keep(b)
        self.landed |= new
        for a in advances:
            self._positions[a.topic, a.partition] = StoredPosition(a.next, a.last_value_id)
        return Landed(
            len(batches), sum(b.batch.points for b in batches), len(batches) - len(new), copied=True
        )

    async def close(self) -> None:
        pass

    def _refused(self, one: Landable) -> list[int]:
        b = one.batch
        owner = np.repeat(np.arange(len(b.series)), b.counts)
        unstorable = set(owner[np.isnan(b.values)].tolist())
        ids = _ids(one)
        return [
            i for i, s in enumerate(b.series) if i in unstorable or self.series.get(ids[i], s.key) != s.key
        ]

    def _keep(self, one: Landable) -> None:
        b = one.batch
        ids = _ids(one)
        self.series |= {i: s.key for i, s in zip(ids, b.series, strict=True)}
        owner = np.repeat(np.arange(len(b.series)), b.counts).tolist()
        for of, ts, value in zip(owner, b.timestamps_s.tolist(), b.values.tolist(), strict=True):
            key, sample = (ids[of], ts), (b.version, value + 0.0)
            self.table[key] = max(self.table.get(key, sample), sample)


def _ids(one: Landable) -> list[bytes]:
    return bytes_of(one.batch.ids)
