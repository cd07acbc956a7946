"""Series of a listing, packed: a million of them must not take a gigabyte.

Guarantees:

* a packed table is the series table that travels and is archived (`ingest.series_table`), compressed, with the ids that its series have;
* the same series give the same bytes and so the same digest, and an unpacked table is the same *object* as long as it is among those
  of `UNPACKED_MAX` series used last: the wire encoder keeps what it encoded by tuple;
* what comes from outside is never believed: `load` computes the ids from the labels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice

import numpy as np
import zstandard
from numpy.typing import NDArray

from ingest import series_table
from ingest.errors import Rejected
from ingest.model import Series, SeriesIds, series_ids
from ingest.sources.columns import SERIES_PER_BATCH, SeriesTable
from ingest.validate import Reason
from shard_config.model import Limits

UNPACKED_MAX = 100_000
"""Series of a process that are kept unpacked, about 36 MB. Unpacking one costs 4 µs, a third of what a look costs that finds it here."""
ENCODED_BYTES_MAX = 16 * 1024 * 1024
"""Of one table, decompressed. 500 series of EC2's have 18 kB."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedTable:
    """Up to 500 series: `blob` is their series table, compressed with zstd; `ids` has shape (n, 2)."""

    blob: bytes
    ids: SeriesIds = field(repr=False)
    digest: bytes
    """blake2b-128 of the series table."""

    def __len__(self) -> int:
        return len(self.ids)


_ANY = Limits(
    series_per_batch_max=SERIES_PER_BATCH,
    dimensions_max=1_000,
    label_bytes_max=ENCODED_BYTES_MAX,
    decoded_bytes_max=ENCODED_BYTES_MAX,
)
"""What is packed has been checked, by limits that may have been changed since."""


def _caps(limits: Limits) -> Limits:
    """Our own tables are never above the cap of series, whatever the configuration lets in from elsewhere."""
    return limits.model_copy(update={"series_per_batch_max": SERIES_PER_BATCH})


def pack(series: Iterable[Series], limits: Limits) -> Iterator[PackedTable]:
    """Tables of 500 over the series in their order. Raises Rejected where a series is not within the limits."""
    caps, rest = _caps(limits), iter(series)
    compressor = zstandard.ZstdCompressor(level=3)
    while part := tuple(islice(rest, SERIES_PER_BATCH)):
        encoded = series_table.write(part, caps)
        # Copied, for what zstandard 0.25 returns keeps the room of what it compressed.
        blob = bytes(memoryview(compressor.compress(encoded)))
        yield PackedTable(blob, series_ids(part), _digest(encoded))


def load(blob: bytes, limits: Limits) -> PackedTable:
    """A table that another process packed. Raises Rejected where it is not sound."""
    encoded = _decompress(blob)
    return PackedTable(blob, series_ids(series_table.read(encoded, _caps(limits))), _digest(encoded))


def added(before: Iterable[PackedTable], after: Iterable[PackedTable]) -> int:
    """How many series of `after` are not in `before`."""
    return int(np.isin(_marks(after), _marks(before), invert=True, assume_unique=True).sum())


def _marks(tables: Iterable[PackedTable]) -> NDArray[np.uint64]:
    parts = [table.ids[:, 1] for table in tables]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)


def _digest(encoded: bytes) -> bytes:
    return blake2b(encoded, digest_size=16).digest()


def _decompress(blob: bytes) -> bytes:
    try:
        size = zstandard.frame_content_size(blob)
        if not 0 <= size <= ENCODED_BYTES_MAX:
            raise Rejected("listing", Reason.DECODED_TOO_LARGE, f"a table of {size} bytes")
        return zstandard.ZstdDecompressor().decompress(blob)
    except zstandard.ZstdError as error:
        raise Rejected("listing", Reason.SPOILT, str(error)) from error


class Unpacked:
    """The tables of a process that are in use, the least recently used first out."""

    def __init__(self, series_max: int = UNPACKED_MAX) -> None:
        self._max = series_max
        self._tables: OrderedDict[tuple[bytes, int], SeriesTable] = OrderedDict()
        self._series = 0

    def __len__(self) -> int:
        return len(self._tables)

    def table(self, packed: PackedTable, period_s: int) -> SeriesTable:
        """The series of a table at a period, which may be coarser than the one that they were listed with."""
        key = (packed.digest, period_s)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = self._unpack(packed, period_s)
            self._series += len(table)
            while self._series > self._max and len(self._tables) > 1:
                _, dropped = self._tables.popitem(last=False)
                self._series -= len(dropped)
        self._tables.move_to_end(key)
        return table

    def _unpack(self, packed: PackedTable, period_s: int) -> SeriesTable:
        series = series_table.read(_decompress(packed.blob), _ANY)
        if all(one.key.period_s == period_s for one in series):
            return SeriesTable(series, packed.ids)
        coarser = tuple(replace(one, key=replace(one.key, period_s=period_s)) for one in series)
        return SeriesTable(coarser, series_ids(coarser))
