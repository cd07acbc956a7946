"""Kafka's own compression, bounded: what a producer compressed for the broker inflates to INFLATED_BYTES_MAX a batch, and no further.

* aiokafka 0.14 inflates without a bound: 512 MB of zeros came as 50 kB of zstd, passed the broker's `max.message.bytes`, and took 540 MB of a
  reader whose Pod has 384. It would be read again after each restart.
* A batch that would be larger, or does not inflate, comes as one record in its last place, whose value is the batch's bytes as the broker has
  them. No decoder of ours takes that, so it is put aside like any other bad record, and reading goes on behind it.
* Headgate's producers leave this compression off. Mirrors and brokers that turn it on are read as ever.

aiokafka has no hook for it: `bound` changes what its fetcher and its decoders call, once in a process (docs/decisions/0031-bounds.md).
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final

import cramjam
import structlog
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.memory_records import MemoryRecords

_log = structlog.get_logger()

INFLATED_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of one batch of records: four times what the broker takes of one that is not compressed."""

_LENGTH = struct.Struct(">i")
_XERIAL = b"\x82SNAPPY\0"
_XERIAL_HEADER_BYTES = 16
_OF_LENGTH = slice(8, 12)
"""Where a batch says how long it is, behind that place."""


class _TooLargeError(Exception):
    """A batch inflates to more than INFLATED_BYTES_MAX, or not at all."""


def _into(decompress: Callable[[Any, Any], int], payload: Any, room: int = INFLATED_BYTES_MAX) -> bytes:
    output = bytearray(room)
    try:
        size = decompress(payload, output)
    except cramjam.DecompressionError as error:
        raise _TooLargeError(str(error)) from error
    return bytes(memoryview(output)[:size])


def _gzip(payload: Any) -> bytes:
    return _into(cramjam.gzip.decompress_into, payload)


def _lz4(payload: Any) -> bytes:
    return _into(cramjam.lz4.decompress_into, payload)


def _zstd(payload: Any) -> bytes:
    return _into(cramjam.zstd.decompress_into, payload)


def _snappy(payload: Any) -> bytes:
    """One block, or Java's stream of blocks, each behind its length."""
    raw = bytes(payload)
    if not raw.startswith(_XERIAL):
        return _into(cramjam.snappy.decompress_raw_into, raw)
    found, at = io.BytesIO(), _XERIAL_HEADER_BYTES
    while at < len(raw):
        try:
            (size,) = _LENGTH.unpack_from(raw, at)
        except struct.error as error:
            raise _TooLargeError(str(error)) from error
        if not 0 < size <= len(raw) - at - _LENGTH.size:
            raise _TooLargeError(f"a block of {size} bytes")
        at += _LENGTH.size
        block = raw[at : at + size]
        found.write(_into(cramjam.snappy.decompress_raw_into, block, INFLATED_BYTES_MAX - found.tell()))
        at += size
    return found.getvalue()


class _Record:
    """What a batch that is refused comes as."""

    key = None
    headers: tuple[()] = ()
    checksum = None

    def __init__(self, batch: Any, value: bytes) -> None:
        self.offset = batch.next_offset - 1
        self.timestamp = batch.max_timestamp
        self.timestamp_type = batch.timestamp_type
        self.value = value


class _Batch:
    """A batch of aiokafka's that is compressed."""

    def __init__(self, batch: Any, raw: bytes) -> None:
        self._batch = batch
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._batch
        except Exception as error:
            # Whatever its bytes make a decoder say, it will say again: nobody gets past them but by this.
            _log.warning("compressed_batch_refused", offset=self.next_offset - 1, error=repr(error))
            yield _Record(self._batch, self._raw)


class _Records:
    """aiokafka's MemoryRecords, with every batch that is compressed as a `_Batch`."""

    def __init__(self, data: Any) -> None:
        self._data = memoryview(data)
        self._records = MemoryRecords(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        (length,) = _LENGTH.unpack(self._data[_OF_LENGTH])
        size = _OF_LENGTH.stop + length
        raw, self._data = self._data[:size], self._data[size:]
        # The formats before Kafka 0.11 have no such field, and no broker that we run on (3.0 or later) hands them out.
        return _Batch(batch, bytes(raw)) if getattr(batch, "compression_type", 0) else batch


@cache
def bound() -> None:
    """From now on, every consumer of this process."""
    fetcher.MemoryRecords = _Records
    # The compiled module has names of its own; the class says which module its own is.
    decoders = importlib.import_module(DefaultRecordBatch.__module__)
    for codec, decoder in (("gzip", _gzip), ("lz4", _lz4), ("zstd", _zstd), ("snappy", _snappy)):
        setattr(decoders, f"{codec}_decode", decoder)
