"""Rows that a query reads back from `samples`, as arrays: the counterpart of `ingest.sinks.copy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.errors import Transient
from ingest.sinks.copy import POSTGRES_EPOCH_S

ROWS_AT_ONCE = 65_536
"""About 4 MiB."""

ROW = np.dtype(
    [
        ("fields", ">i2"),
        ("n_bytes", ">i4"),
        ("n", ">i4"),
        ("ts_bytes", ">i4"),
        ("ts_us", ">i8"),
        ("series_bytes", ">i4"),
        ("series", ">u8", (2,)),
        ("value_bytes", ">i4"),
        ("value", ">f8"),
        ("version_bytes", ">i4"),
        ("version", ">i8"),
    ]
)
"""A row of a query whose columns are (int n, timestamptz ts, uuid series, float8 value, bigint version), none NULL. `ts_us`
is turned into seconds by `seconds_of`."""


def seconds_of(rows: NDArray[Any]) -> NDArray[np.int64]:
    """The rows' timestamps, whole seconds since the epoch."""
    return rows["ts_us"].astype(np.int64) // 1_000_000 + POSTGRES_EPOCH_S


_HEADER_BYTES = 19
_TRAILER = b"\xff\xff"


class RowsBack:
    """Takes a binary COPY stream of rows and hands them on in chunks of about ROWS_AT_ONCE, in bounded memory.

    `row` lays out a row, with the number of its fields and the length before each. `feed` is the `output` of asyncpg's copy_from_query; `finish` comes after it.
    """

    def __init__(self, take: Callable[[NDArray[Any]], None], row: np.dtype[Any] = ROW) -> None:
        self._take = take
        self._row = row
        self._waiting = bytearray()
        self._header_bytes = _HEADER_BYTES

    async def feed(self, data: bytes) -> None:
        self._waiting.extend(data)
        if self._header_bytes and len(self._waiting) >= self._header_bytes:
            del self._waiting[: self._header_bytes]
            self._header_bytes = 0
        if not self._header_bytes and len(self._waiting) >= ROWS_AT_ONCE * self._row.itemsize:
            self._drain()

    def finish(self) -> None:
        """Hand on what is left. Raises Transient where the stream did not end as it should."""
        self._drain()
        if bytes(self._waiting) != _TRAILER:
            raise Transient("store", "the stream of rows was cut short")

    def _drain(self) -> None:
        """Take the whole rows off; what is left is half a row, or the two bytes behind the last one."""
        if whole := len(self._waiting) // self._row.itemsize:
            self._take(np.frombuffer(bytes(self._waiting[: whole * self._row.itemsize]), self._row))
            del self._waiting[: whole * self._row.itemsize]
