"""Listings as values, as bytes, and where shards share them.

Guarantees:

* a listing that is read back is whole and is the one that was asked for (a checksum, its target, what it depends on), or it is none;
* the store is a cache: what goes wrong with it costs a listing, never data, and is bounded in time; after a failure it is left
  alone for `AWAY_S`.

Layout: magic, blake2b-128 of all that follows, u32 length of a JSON header, the header, the packed tables one after the other.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Protocol

import orjson
import structlog

from ingest.clock import Clock
from ingest.errors import HeadgateError, Rejected
from ingest.model import Target, TaskItem
from ingest.sources.metric_data import POINTS_PER_CALL_MAX
from ingest.sources.packed import PackedTable, load
from ingest.sources.selection import asks_tags
from ingest.validate import Reason
from shard_config.model import Limits, ServiceProfile, retention_s

log = structlog.get_logger()

READ_S = 5.0
WRITE_S = 10.0
AWAY_S = 60.0
LISTING_BYTES_MAX = 64 * 1024 * 1024
"""In the store; a million series have 10 to 20 MB. A larger one is not shared."""
FUTURE_S_MAX = 300.0
"""A listing from further ahead is of another clock, and not used."""

_MAGIC = b"HGLIST1\n"
_HEAD = struct.Struct(">16sI")


@dataclass(frozen=True, slots=True)
class Late:
    """Series that the listing before had not: a look that ends at or after `until_s` goes back for all to `from_s`."""

    from_s: int
    until_s: int

    def and_also(self, other: Late | None) -> Late:
        """One look back for both."""
        if other is None:
            return self
        return Late(min(self.from_s, other.from_s), max(self.until_s, other.until_s))


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """All series of one target and service, in packed tables of up to 500. Times are the source's clock, at the first page."""

    tables: tuple[PackedTable, ...]
    observed_at_ms: int
    depends: str
    """Hash of all of the profile that decides what is listed: see `depends_on`."""
    late: Late | None = None
    """Until a look that went back is published; whoever takes the target over goes back, too."""
    note: str = ""
    """Says so where this listing is older than it should be."""
    series: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "series", sum(map(len, self.tables)))

    @property
    def listed_at_s(self) -> float:
        return self.observed_at_ms / 1000


def depends_on(profile: ServiceProfile, limits: Limits) -> str:
    """32 hexadecimal digits over what decides which series a listing has, beside what AWS lists."""
    keys = {"namespace", "period_s", "recently_active", "statistics", "metrics", "only"}
    what = profile.model_dump(mode="json", include=keys | ({"resources"} if asks_tags(profile) else set()))
    what["limits"] = [limits.dimensions_max, limits.label_bytes_max]
    return blake2b(orjson.dumps(what, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()


def back_to_s(listing: Listing, item: TaskItem, period_s: int) -> int:
    """Where a look begins, for the sake of series that were found late: a window's start, not after the item's.

    Not before what CloudWatch keeps at this period, and not so early that a series would not fit into one call.
    """
    late = listing.late
    if late is None or item.end_s < late.until_s:
        return item.start_s
    reach_s = min(retention_s(period_s), POINTS_PER_CALL_MAX * period_s)
    earliest_s = -(-(item.end_s - reach_s) // item.grid_s) * item.grid_s
    return min(item.start_s, max(late.from_s // item.grid_s * item.grid_s, earliest_s))


# --- as bytes -------------------------------------------------------------------------------------------------


def encode(listing: Listing, target: Target, service: str) -> bytes:
    header = orjson.dumps(
        {
            "target": str(target),
            "service": service,
            "depends": listing.depends,
            "observed_at_ms": listing.observed_at_ms,
            "late": [listing.late.from_s, listing.late.until_s] if listing.late is not None else None,
            "tables": [len(table.blob) for table in listing.tables],
        }
    )
    rest = header + b"".join(table.blob for table in listing.tables)
    return _MAGIC + _HEAD.pack(_checksum(len(header), rest), len(header)) + rest


def decode(body: bytes, target: Target, service: str, depends: str, limits: Limits) -> Listing | None:
    """The listing; None where it is of another profile. Raises Rejected where it is not sound. Takes 5 µs a series."""
    start = len(_MAGIC) + _HEAD.size
    if len(body) < start or not body.startswith(_MAGIC):
        raise _spoilt("not a listing, or cut short")
    checksum, header_bytes = _HEAD.unpack_from(body, len(_MAGIC))
    if checksum != _checksum(header_bytes, body[start:]):
        raise _spoilt("checksum")
    try:
        header = orjson.loads(body[start : start + header_bytes])
        named = header["target"], header["service"]
        observed_at_ms, lengths = int(header["observed_at_ms"]), list(header["tables"])
        ends = list(accumulate(lengths, initial=start + header_bytes))
        late = Late(*map(int, header["late"])) if header.get("late") else None
        if named != (str(target), service) or ends[-1] != len(body):
            raise _spoilt(f"it is of {named}")
        if header["depends"] != depends:
            return None
    except (KeyError, TypeError, ValueError) as error:
        raise _spoilt(f"header: {error!r}") from error
    return Listing(tuple(load(body[a:b], limits) for a, b in pairwise(ends)), observed_at_ms, depends, late)


def _checksum(header_bytes: int, rest: bytes) -> bytes:
    return blake2b(header_bytes.to_bytes(4, "big") + rest, digest_size=16).digest()


def _spoilt(what: str) -> Rejected:
    return Rejected("listing", Reason.SPOILT, what)


# --- the store ------------------------------------------------------------------------------------------------


class Cache(Protocol):
    """Objects that may be overwritten: `ingest.archive.S3Archive` has them beside the archive."""

    async def cached(self, name: Sequence[str], bytes_max: int) -> bytes | None:
        """What is kept under a name, or None. Raises Transient or Rejected."""
        ...

    async def cache(self, name: Sequence[str], body: bytes) -> None:
        """Keep it, in place of what is there. Raises Transient or Rejected."""
        ...


class Shared:
    """The listings of all shards."""

    def __init__(self, cache: Cache, clock: Clock) -> None:
        self._cache = cache
        self._clock = clock
        self._away_until_s = float("-inf")

    async def get(
        self, target: Target, profile: ServiceProfile, depends: str, deadline_s: float, limits: Limits
    ) -> Listing | None:
        """The shared listing that was made with this profile, or None, for whatever reason. `deadline_s` is monotonic."""
        body: bytes | None = None
        listing: Listing | None = None
        if (left_s := self._left_s(READ_S, deadline_s)) <= 0:
            return None
        try:
            async with asyncio.timeout(left_s):
                body = await self._cache.cached(_name(target, profile.service), LISTING_BYTES_MAX)
            if body is not None:
                # In a thread, for a million series take five seconds.
                listing = await asyncio.to_thread(decode, body, target, profile.service, depends, limits)
        except (HeadgateError, TimeoutError) as error:
            self._failed("listing_not_read", target, profile.service, error)
            return None
        if listing is not None and listing.listed_at_s > self._clock.now_s() + FUTURE_S_MAX:
            return None
        return listing

    async def put(self, target: Target, service: str, listing: Listing, deadline_s: float) -> None:
        """Share a listing, if that can be done soon."""
        if (left_s := self._left_s(WRITE_S, deadline_s)) <= 0:
            return
        try:
            async with asyncio.timeout(left_s):
                body = await asyncio.to_thread(encode, listing, target, service)
                if len(body) <= LISTING_BYTES_MAX:
                    await self._cache.cache(_name(target, service), body)
        except (HeadgateError, TimeoutError) as error:
            self._failed("listing_not_shared", target, service, error)

    def _left_s(self, most_s: float, deadline_s: float) -> float:
        now_s = self._clock.monotonic_s()
        # A look has better things to do with its time: a quarter of it at most.
        return 0.0 if now_s < self._away_until_s else min(most_s, (deadline_s - now_s) / 4)

    def _failed(self, event: str, target: Target, service: str, error: Exception) -> None:
        if not isinstance(error, Rejected):
            self._away_until_s = self._clock.monotonic_s() + AWAY_S
        log.warning(event, target=str(target), service=service, error=f"{type(error).__name__}: {error}")


def _name(target: Target, service: str) -> tuple[str, ...]:
    return "listings", target.source, target.account, target.region, service
