"""Texts in order and each once, of which a million must not take 100 MB.

Guarantees:

* what was added comes out sorted, each text once, however often and in whatever order it was added;
* beside the `WAITING_MAX` newest they lie compressed, in sorted runs; reading unpacks `CHUNK` of each run at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

import zstandard

WAITING_MAX = 32_768
"""3 MB of names."""
CHUNK = 1_024
_END = b"\n"


class Runs:
    """Texts without a line end."""

    def __init__(self) -> None:
        self._waiting: set[bytes] = set()
        self._runs: list[list[bytes]] = []
        self._added = 0

    def __len__(self) -> int:
        """Of different texts, or more where one was added again long after."""
        return self._added + len(self._waiting)

    def add(self, text: bytes) -> bool:
        """False where the text is known; one that was added long ago may not be."""
        if text in self._waiting:
            return False
        self._waiting.add(text)
        if len(self._waiting) >= WAITING_MAX:
            self._runs.append(_packed(sorted(self._waiting)))
            self._added += len(self._waiting)
            self._waiting = set()
        return True

    def __iter__(self) -> Iterator[bytes]:
        """All of them, sorted."""
        last = None
        for text in merge(*map(_unpacked, self._runs), sorted(self._waiting)):
            if text != last:
                yield text
            last = text


def _packed(texts: list[bytes]) -> list[bytes]:
    compressor = zstandard.ZstdCompressor(level=1)
    chunks = [_END.join(texts[n : n + CHUNK]) for n in range(0, len(texts), CHUNK)]
    # Copied, for what zstandard 0.25 returns keeps the room of what it compressed.
    return [bytes(memoryview(compressor.compress(chunk))) for chunk in chunks]


def _unpacked(run: list[bytes]) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor()
    for chunk in run:
        yield from decompressor.decompress(chunk).split(_END)
