"""Things that cover a span of a target's service, found by a window of it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

from ingest.model import Target, Window


class _HasWindow(Protocol):
    @property
    def target(self) -> Target: ...
    @property
    def service(self) -> str: ...
    @property
    def window(self) -> Window: ...


T = TypeVar("T")


class Spans(Generic[T]):
    """Things that cover a span of a target's service, found by a window of it; `block_s` is a pair's usual length of them."""

    def __init__(self, block_s: Mapping[tuple[Target, str], int]) -> None:
        self._block_s = block_s
        self._by_block: dict[tuple[Target, str, int], list[tuple[int, int, T]]] = defaultdict(list)

    def add(self, target: Target, service: str, start_s: int, end_s: int, one: T) -> None:
        if (block_s := self._block_s.get((target, service))) is None:
            return
        for n in range(start_s // block_s, (end_s - 1) // block_s + 1):
            self._by_block[target, service, n].append((start_s, end_s, one))

    def covering(self, w: _HasWindow) -> list[T]:
        """In the order in which they were added."""
        n = w.window.start_s // self._block_s[w.target, w.service]
        found = self._by_block.get((w.target, w.service, n), ())
        return [
            one for start_s, end_s, one in found if start_s <= w.window.start_s and w.window.end_s <= end_s
        ]
