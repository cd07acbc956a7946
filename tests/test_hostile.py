"""What stands on a topic and is not ours: every reader survives it, within its memory, and it is found among the dead letters once."""

from __future__ import annotations

import cramjam
import pytest
from aiokafka import codec
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from ingest import inflate
from ingest.inflate import INFLATED_BYTES_MAX

CODECS = {
    "gzip": DefaultRecordBatch.CODEC_GZIP,
    "snappy": DefaultRecordBatch.CODEC_SNAPPY,
    "lz4": DefaultRecordBatch.CODEC_LZ4,
    "zstd": DefaultRecordBatch.CODEC_ZSTD,
}


def batch_of(values: list[bytes], compression: int, at: int = 0) -> bytes:
    """A batch of records as a broker hands it out, the first record at an offset."""
    builder = DefaultRecordBatchBuilder(2, compression, 0, -1, -1, -1, 1 << 30)
    for i, value in enumerate(values):
        builder.append(i, 1_000 + i, b"key", value, [])
    return at.to_bytes(8, "big") + bytes(builder.build())[8:]


def read(data: bytes) -> list[tuple[int, bytes]]:
    """(offset, value) of all records, as a consumer of this process reads them."""
    inflate.bound()
    records = fetcher.MemoryRecords(data)
    found = []
    while records.has_next():
        batch = records.next_batch()
        assert batch.validate_crc()
        found += [(record.offset, record.value) for record in batch]
    return found


@pytest.mark.parametrize("name", CODECS)
def test_a_batch_that_kafka_compressed_is_read_as_ever(name: str) -> None:
    values = [b"one", b"", b"x" * 100_000]
    data = batch_of([b"plain"], 0) + batch_of(values, CODECS[name], at=1) + batch_of([b"last"], 0, at=4)

    assert read(data) == [(0, b"plain"), *enumerate(values, start=1), (4, b"last")]


@pytest.mark.parametrize("name", CODECS)
def test_a_batch_that_inflates_past_the_bound_is_one_bad_record_and_reading_goes_on_behind_it(
    name: str,
) -> None:
    bomb = batch_of([bytes(1 << 20)] * (2 + INFLATED_BYTES_MAX // (1 << 20)), CODECS[name], at=7)
    data = bomb + batch_of([b"good"], 0, at=13)

    assert read(data) == [(12, bomb), (13, b"good")]


def test_a_batch_that_is_no_compressed_data_at_all_is_one_bad_record() -> None:
    raw = bytearray(batch_of([b"a" * 1000, b"b" * 1000], CODECS["zstd"]))
    raw[-20:] = bytes(20)
    broken = bytes(raw)

    found = [(r.offset, r.value) for r in fetcher.MemoryRecords(broken).next_batch()]

    assert found == [(1, broken)]


def test_javas_stream_of_snappy_blocks_is_bounded_as_a_whole() -> None:
    small = codec.snappy_encode(b"abc" * 1000)
    large = codec.snappy_encode(bytes(2 * INFLATED_BYTES_MAX))
    cut = small[:-5]

    assert inflate._snappy(small) == b"abc" * 1000
    for hostile in (large, cut, small + b"\0\0", cramjam.snappy.compress_raw(bytes(2 * INFLATED_BYTES_MAX))):
        with pytest.raises(inflate._TooLargeError):
            inflate._snappy(hostile)
