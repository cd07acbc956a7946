"""A task's payloads while it lasts: in memory, and past a few megabytes in a file without a name.

* Of a heavy target a task's payloads are larger than all that the look itself needs. In a file they are the kernel's page cache, which it
  takes back when it needs to, and no part of the process.
* A file cannot outlive its payloads, nor the process: it has no name.
* Where no file can be written (no room, a file system that is read-only) payloads stay in memory, and the log says so.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import IO

import structlog

from ingest.ports import Payload

_log = structlog.get_logger()

MEMORY_BYTES = 8 * 1024 * 1024
"""Of one task: what fits one object of the archive never sees a file."""


@dataclass(frozen=True, slots=True)
class Span:
    """Some bytes of a file: `ingest.ports.Stored`."""

    file: IO[bytes]
    offset: int
    length: int

    def read(self) -> bytes:
        """Raises OSError where they are not there."""
        value = os.pread(self.file.fileno(), self.length, self.offset)
        if len(value) != self.length:
            raise OSError(f"{len(value)} of {self.length} bytes at {self.offset} of a temporary file")
        return value

    def __len__(self) -> int:
        return self.length


class Spool:
    """The payloads of one task. Those that are kept first stay in memory; a payload lasts as long as somebody holds it."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._room = memory_bytes
        self._file: IO[bytes] | None = None
        self._size = 0
        self._failed = False

    def keep(self, payload: Payload) -> Payload:
        """The same payload, wherever its bytes are now. Call it with what `encode_batch` gave."""
        self._room -= len(payload)
        if self._room >= 0 or self._failed:
            return payload
        try:
            if self._file is None:
                # Without a buffer, so that what was written can be read by its offset.
                self._file = tempfile.TemporaryFile(buffering=0, prefix="headgate-")  # noqa: SIM115  # it goes with its last payload
            value = payload.value
            written = os.pwrite(self._file.fileno(), value, self._size)
            if written != len(value):
                raise OSError(f"{written} of {len(value)} bytes written")
        except OSError as error:
            self._failed = True
            _log.warning("payloads_stay_in_memory", error=str(error))
            return payload
        self._size += written
        return Payload(payload.batch_id, Span(self._file, self._size - written, written))
