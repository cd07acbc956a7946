"""A commit whose answer was lost: done, and nobody was told. Whoever asks for the same again is told so, instead of that another has its partition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import asyncpg

from ingest.ports import Advance

_MADE = """
SELECT count(*) FROM positions AS p
JOIN unnest($2::text[], $3::int[], $4::bigint[], $5::bytea[]) AS a (topic, partition, next, last_value_id)
    ON p.topic = a.topic AND p.partition = a.partition AND p.next = a.next AND p.last_value_id = a.last_value_id
WHERE p.sink = $1
"""


class InDoubt:
    """What a sink asked last and got no answer to: it may have been done, or not."""

    def __init__(self) -> None:
        self._advances: tuple[Advance, ...] = ()

    @contextmanager
    def asking(self, advances: Sequence[Advance]) -> Iterator[None]:
        """Around the transaction: what it raises leaves it in doubt."""
        try:
            yield
        except BaseException:
            self._advances = tuple(advances)
            raise
        self._advances = ()

    async def made(self, connection: asyncpg.Connection, sink: str, advances: Sequence[Advance]) -> bool:
        """Whether these are what is in doubt, and each position is where they lead: then all of that transaction is there.

        Asked where a position is not the expected one. A position that another has moved on is not where ours would be, or what lies before it has
        landed all the same.
        """
        if not advances or tuple(advances) != self._advances:
            return False
        found = await connection.fetchval(
            _MADE,
            sink,
            [a.topic for a in advances],
            [a.partition for a in advances],
            [a.next for a in advances],
            [a.last_value_id for a in advances],
        )
        return bool(found == len(advances))
