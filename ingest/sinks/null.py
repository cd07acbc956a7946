"""A sink that keeps nothing: what is landed here was read, decoded and validated, and is counted. For measuring, and for trying a replay out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ingest.errors import Fatal
from ingest.ports import Advance, Landable, Landed, StoredPosition


class NullSink:
    """`ingest.ports.Sink` whose positions last as long as it does."""

    def __init__(self) -> None:
        self._positions: dict[tuple[str, int], StoredPosition] = {}

    async def claim(self, topic: str, partitions: Sequence[int]) -> None:
        """Nobody else can have it."""

    async def positions(self, topic: str, partitions: Sequence[int]) -> Mapping[int, StoredPosition]:
        return {p: self._positions[topic, p] for p in partitions if (topic, p) in self._positions}

    async def init_positions(self, topic: str, partitions: Sequence[int]) -> None:
        await self.start_at(topic, dict.fromkeys(partitions, 0))

    async def start_at(self, topic: str, starts: Mapping[int, int]) -> None:
        """Keep a position, partition → next, where there is none."""
        for partition, place in starts.items():
            self._positions.setdefault((topic, partition), StoredPosition(place, b""))

    async def forget(self, topic: str, partitions: Sequence[int]) -> None:
        """Remove positions."""
        for partition in partitions:
            self._positions.pop((topic, partition), None)

    async def land(self, advances: Sequence[Advance], batches: Sequence[Landable]) -> Landed:
        for a in advances:
            here = self._positions.get((a.topic, a.partition))
            if here is None or here.next != a.expected_next:
                raise Fatal(
                    f"null {a.topic}[{a.partition}]", f"the position is {here}, expected {a.expected_next}"
                )
            self._positions[a.topic, a.partition] = StoredPosition(a.next, a.last_value_id)
        return Landed(len(batches), sum(b.batch.points for b in batches), 0, copied=False)

    async def close(self) -> None:
        """Nothing is open."""
