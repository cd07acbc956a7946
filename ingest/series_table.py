"""The labels of a batch's series as one block of bytes that repeats from look to look, cached both ways.

A table holds every distinct text once and columns of indices into the texts, so that a table met for the first time costs
little too. Decoding checks labels and dimensions and computes the series' ids; neither is believed. Where the structure is sound, a
series with bad labels is named and takes no other with it.

`TableCache` is safe to use from several threads, and bounded by entries and by the memory that they take.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, chain, islice, pairwise

import numpy as np
from numpy.typing import NDArray

from ingest import avro
from ingest.errors import Rejected
from ingest.model import Series, SeriesIds, SeriesKey, series_ids
from ingest.validate import Reason, dimensions_problem, text_problem
from shard_config.model import Limits

_INT32_MAX = 2**31 - 1
_TEXT_COLUMNS = ("account", "region", "namespace", "metric", "stat", "unit")
_WHERE = "series table"


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Series, their ids, and the bytes that say so."""

    encoded: bytes
    series: tuple[Series, ...]
    ids: SeriesIds
    bad: tuple[tuple[int, Reason], ...] = ()
    """Indices of series that must not be let in, ascending, each with the first reason found."""


class TableCache:
    """Least recently used first out. Bounds: `entries_max` tables, `bytes_max` of estimated memory."""

    SERIES_BYTES = 400
    """What a series takes in memory beside its texts; measured 260 for EC2's, with one dimension."""

    def __init__(self, entries_max: int = 4_096, bytes_max: int = 128 * 1024 * 1024) -> None:
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self._tables: OrderedDict[Hashable, Table] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tables)

    @property
    def bytes_used(self) -> int:
        """Estimated."""
        return self._bytes

    @property
    def bytes_max(self) -> int:
        return self._bytes_max

    def _cost(self, table: Table) -> int:
        # Labels can be longer than usual: their bytes count twice, as text and encoded.
        return 2 * len(table.encoded) + self.SERIES_BYTES * len(table.series)

    def get(self, key: Hashable) -> Table | None:
        with self._lock:
            table = self._tables.get(key)
            if table is not None:
                self._tables.move_to_end(key)
            return table

    def put(self, key: Hashable, table: Table) -> None:
        with self._lock:
            if (old := self._tables.pop(key, None)) is not None:
                self._bytes -= self._cost(old)
            self._tables[key] = table
            self._bytes += self._cost(table)
            while len(self._tables) > self._entries_max or self._bytes > self._bytes_max:
                _, dropped = self._tables.popitem(last=False)
                self._bytes -= self._cost(dropped)


WRITTEN = TableCache(bytes_max=48 * 1024 * 1024)
"""100,000 series, which whoever asks for them keeps as well (`ingest.sources.packed`)."""
READ = TableCache()


def encode(series: tuple[Series, ...], ids: SeriesIds, limits: Limits) -> bytes:
    """A SeriesTable in single-object encoding; the same bytes for equal series.

    `ids` only finds an earlier encoding, which is used where its series are equal. Raises Rejected where `decode` would.
    """
    key = (ids.tobytes(), _caps(limits))
    known = WRITTEN.get(key)
    if known is not None and (known.series is series or known.series == series):
        return known.encoded
    encoded = _encode(series, limits)
    WRITTEN.put(key, Table(encoded, series, ids))
    return encoded


def decode(encoded: bytes, limits: Limits) -> Table:
    """Series and ids of a SeriesTable, and which of its series are bad. Raises Rejected where the table itself is."""
    key = (blake2b(encoded, digest_size=16).digest(), _caps(limits))
    known = READ.get(key)
    if known is None:
        series, bad = _decode(encoded, limits)
        known = Table(encoded, series, series_ids(series), bad)
        known.ids.setflags(write=False)
        READ.put(key, known)
    return known


def write(series: tuple[Series, ...], limits: Limits) -> bytes:
    """What `encode` gives, not kept: for listings, which are many times what the caches hold."""
    return _encode(series, limits)


def read(encoded: bytes, limits: Limits) -> tuple[Series, ...]:
    """The series of what `write` gave, not kept. Raises Rejected where any of them is bad."""
    series, bad = _decode(encoded, limits)
    if bad:
        raise Rejected(_WHERE, bad[0][1], f"series {bad[0][0]}")
    return series


def _caps(limits: Limits) -> tuple[int, ...]:
    """What decides whether a table is let in."""
    return (
        limits.series_per_batch_max,
        limits.dimensions_max,
        limits.label_bytes_max,
        limits.decoded_bytes_max,
    )


def _numbers(datum: avro.Datum, name: str, length: int) -> NDArray[np.int32]:
    raw = datum[name]
    if len(raw) != 4 * length:
        raise Rejected(_WHERE, Reason.COLUMNS_MISMATCH, f"{name}: {len(raw)} bytes for {length} numbers")
    return np.frombuffer(raw, dtype="<i4")


def _check_texts(texts: list[str], limits: Limits) -> None:
    for text in texts:
        if problem := text_problem(text, limits):
            raise Rejected(_WHERE, problem, repr(text[:80]))


def _key_problem(key: SeriesKey, limits: Limits) -> Reason | None:
    """What is wrong with a key beside its texts."""
    if problem := dimensions_problem(key.dimensions, limits):
        return problem
    return None if 0 <= key.period_s <= _INT32_MAX else Reason.OUT_OF_RANGE


def _check_key(key: SeriesKey, limits: Limits) -> None:
    if problem := _key_problem(key, limits):
        what = f"{key.namespace[:80]!r} {key.metric[:80]!r} {key.dimensions[:4]} {key.period_s}s"
        raise Rejected(_WHERE, problem, what)


def _encode(series: tuple[Series, ...], limits: Limits) -> bytes:
    index: dict[str, int] = {}

    def at(text: str) -> int:
        return index.setdefault(text, len(index))

    for one in series:
        _check_key(one.key, limits)
    keys = [one.key for one in series]
    pairs = list(chain.from_iterable(key.dimensions for key in keys))
    texts_at = {
        "account": [at(key.account) for key in keys],
        "region": [at(key.region) for key in keys],
        "namespace": [at(key.namespace) for key in keys],
        "metric": [at(key.metric) for key in keys],
        "stat": [at(key.stat) for key in keys],
        "unit": [at(one.unit) for one in series],
        "dimension_names": [at(name) for name, _ in pairs],
        "dimension_values": [at(value) for _, value in pairs],
    }
    texts = list(index)
    indices = {name: np.array(column, dtype="<i4") for name, column in texts_at.items()}
    _check_texts(texts, limits)
    _check_indices(texts, list(indices.values()), limits)
    raw = [text.encode() for text in texts]
    return avro.write(
        "series_table",
        {
            "texts": b"".join(raw),
            "text_lengths": np.array([len(text) for text in raw], dtype="<i4").tobytes(),
            "period_s": np.array([key.period_s for key in keys], dtype="<i4").tobytes(),
            "dimension_counts": np.array([len(key.dimensions) for key in keys], dtype="<i4").tobytes(),
            **{name: column.tobytes() for name, column in indices.items()},
        },
    )


def _decode(encoded: bytes, limits: Limits) -> tuple[tuple[Series, ...], tuple[tuple[int, Reason], ...]]:
    _, datum = avro.read(encoded, ("series_table",))
    number, spare = divmod(len(datum["period_s"]), 4)
    if spare or number > limits.series_per_batch_max:
        raise Rejected(_WHERE, Reason.TOO_MANY_SERIES, f"{len(datum['period_s'])} bytes of periods")
    periods = _numbers(datum, "period_s", number).tolist()
    per_series = _numbers(datum, "dimension_counts", number)
    pairs = int(per_series.sum(dtype=np.int64))
    # One series above its cap is one bad series; more than all together may have is not worth the memory.
    if number and (int(per_series.min()) < 0 or pairs > limits.series_per_batch_max * limits.dimensions_max):
        raise Rejected(
            _WHERE, Reason.TOO_MANY_DIMENSIONS, f"{per_series.max()} in one series, {pairs} in all"
        )
    columns = [_numbers(datum, name, number) for name in _TEXT_COLUMNS]
    columns += [_numbers(datum, name, pairs) for name in ("dimension_names", "dimension_values")]
    texts = _texts(datum, sum(map(len, columns)))
    _check_indices(texts, columns, limits)
    fields = [[texts[i] for i in column.tolist()] for column in columns]
    dimensions = zip(fields[-2], fields[-1], strict=True)
    same: dict[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]] = {}

    def once(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        # A resource has many metrics, and its dimensions are half of what a series takes.
        return same.setdefault(pairs, pairs)

    series = tuple(
        Series(
            SeriesKey(account, region, namespace, metric, once(tuple(islice(dimensions, n))), stat, period),
            unit,
        )
        for account, region, namespace, metric, stat, unit, n, period in zip(
            *fields[:6], per_series.tolist(), periods, strict=True
        )
    )
    bad = {i: problem for i, one in enumerate(series) if (problem := _key_problem(one.key, limits))}
    bad_texts = {i: problem for i, text in enumerate(texts) if (problem := text_problem(text, limits))}
    if bad_texts:
        owner = np.repeat(np.arange(number), per_series)
        for column, of in [
            *((c, np.arange(number)) for c in columns[:6]),
            *((c, owner) for c in columns[6:]),
        ]:
            for at in np.flatnonzero(np.isin(column, list(bad_texts))).tolist():
                bad.setdefault(int(of[at]), bad_texts[int(column[at])])
    return series, tuple(sorted(bad.items()))


def _texts(datum: avro.Datum, used: int) -> list[str]:
    """The texts, of which there are no more than are `used`: a short text takes many times its bytes in memory."""
    raw: bytes = datum["texts"]
    lengths = _numbers(datum, "text_lengths", len(datum["text_lengths"]) // 4)
    fits = len(lengths) <= used and int(lengths.sum(dtype=np.int64)) == len(raw)
    if not fits or (len(lengths) and int(lengths.min()) < 0):
        raise Rejected(_WHERE, Reason.COLUMNS_MISMATCH, f"{len(lengths)} texts, {len(raw)} bytes of them")
    ends = accumulate(lengths.tolist(), initial=0)
    try:
        # Slices of one str cost half as much as decoding each; they need as many characters as bytes.
        whole = raw.decode()
        if len(whole) == len(raw):
            return [whole[start:end] for start, end in pairwise(ends)]
        return [raw[start:end].decode() for start, end in pairwise(ends)]
    except UnicodeDecodeError as error:
        raise Rejected(_WHERE, Reason.BAD_DATUM, str(error)) from error


def _check_indices(texts: list[str], columns: list[NDArray[np.int32]], limits: Limits) -> None:
    """Every index names a text, and the labels written out stay within limits.decoded_bytes_max.

    Without the second, 16 MB of indices to one long text would be gigabytes to hash into ids.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    written_bytes = 0
    for column in columns:
        if not len(column):
            continue
        if not 0 <= int(column.min()) <= int(column.max()) < len(texts):
            raise Rejected(_WHERE, Reason.COLUMNS_MISMATCH, f"an index outside {len(texts)} texts")
        written_bytes += int(lengths[column].sum())
    if written_bytes > limits.decoded_bytes_max:
        raise Rejected(_WHERE, Reason.DECODED_TOO_LARGE, f"{written_bytes} characters of labels")
