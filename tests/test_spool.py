"""A task's payloads, in memory and in a file: the same bytes, whoever reads them, and nothing stays behind."""

from __future__ import annotations

import gc
import os
import tempfile
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from ingest.batch import batch_id_of
from ingest.objects import assemble, pack, unpack
from ingest.ports import ArchivedTask, Payload
from ingest.spool import MEMORY_BYTES, Span, Spool
from tests.test_archive import archived


def payload_of(size: int, fill: int = 0) -> Payload:
    value = bytes([fill % 256]) * size
    return Payload(batch_id_of(value), value)


def open_files() -> int:
    """Files without a name that this process has open."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += str(fd.readlink()).endswith("(deleted)")
    return found


def test_what_fits_in_memory_stays_there_and_the_rest_is_read_back_byte_for_byte() -> None:
    spool = Spool(memory_bytes=1000)
    before = [payload_of(300, i) for i in range(10)]
    kept = [spool.keep(payload) for payload in before]
    assert [isinstance(p.held, Span) for p in kept] == [False] * 3 + [True] * 7
    assert [p.value for p in kept] == [p.value for p in before]
    assert [len(p) for p in kept] == [300] * 10
    assert kept == before
    # In any order, and again.
    assert [p.value for p in reversed(kept)] == [p.value for p in reversed(before)]


def test_the_file_goes_with_its_last_payload() -> None:
    before = open_files()
    spool = Spool(memory_bytes=0)
    one, two = spool.keep(payload_of(10, 1)), spool.keep(payload_of(10, 2))
    del spool, one
    gc.collect()
    assert open_files() == before + 1
    assert two.value == bytes([2]) * 10
    del two
    gc.collect()
    assert open_files() == before


def test_where_no_file_can_be_written_payloads_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    spool = Spool(memory_bytes=0)
    kept = [spool.keep(payload_of(10, i)) for i in range(3)]
    assert [isinstance(p.held, bytes) for p in kept] == [True] * 3
    assert capsys.readouterr().out.count("payloads_stay_in_memory") == 1


def test_a_file_that_was_cut_short_is_an_error_and_no_shorter_payload() -> None:
    spool = Spool(memory_bytes=0)
    kept = spool.keep(payload_of(100))
    assert isinstance(kept.held, Span)
    os.ftruncate(kept.held.file.fileno(), 50)
    with pytest.raises(OSError, match="50 of 100 bytes"):
        _ = kept.value


def test_a_heavy_task_is_the_same_object_from_a_file_in_a_fraction_of_its_memory() -> None:
    values = tuple(os.urandom(512 * 1024) for _ in range(64))
    plain = archived(*values)
    spool = Spool()
    kept = ArchivedTask(plain.receipt, tuple(spool.keep(p) for p in plain.payloads))
    parts, body = pack(kept)
    expected_parts, expected = pack(plain)
    assert (body, [p.digest for p in parts]) == (expected, [p.digest for p in expected_parts])
    back = assemble(unpack(body), [part.body for part in parts]).payloads
    assert [p.value for p in back] == [p.value for p in plain.payloads]
    del plain, expected_parts, values, back
    gc.collect()
    tracemalloc.start()
    try:
        for part in pack(kept)[0]:
            assert len(part.body) == part.length
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A part, once as frames and once as a body, of 32 MB.
    assert peak_bytes < 3 * MEMORY_BYTES


def test_the_folder_for_files_is_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    kept = Spool(memory_bytes=0).keep(payload_of(10))
    assert isinstance(kept.held, bytes)
