"""Pages of a list, with a token that belongs to one request. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def page_of(
    items: Sequence[T], size: int, token: str, request: str, refused: Callable[[str], Exception]
) -> tuple[Sequence[T], str]:
    """(one page, the next one's token or ""). Raises what `refused` makes for a token that is not of this request."""
    of = blake2b(request.encode(), digest_size=8).hexdigest()
    first, _, fingerprint = token.partition("-")
    if token and (fingerprint != of or not first.isdecimal()):
        raise refused("the token is not valid")
    begin = int(first or 0)
    end = begin + size
    return items[begin:end], f"{end}-{of}" if end < len(items) else ""
