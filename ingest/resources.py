"""Tagged resources: what gives series their `name` and `tag_*`. Exporters list and share them (`ingest.sources.resource_lists`), remote writers read them.

Guarantees:

* a list that is read is whole and is the one that was asked for (a checksum, its target and service), or it is none;
* a metric belongs to the resource that YACE would say: of an ARN the first pattern that fits counts, of a metric's resources the one
  with the most dimensions, and of those the earlier pattern's;
* what goes wrong with the store costs a refresh, never what is known: the list before stays in use;
* nobody waits longer than `WAIT_S` for lists that are not there, all targets together, and not again for `PATIENCE_S`; a list that nobody has
  written is asked for ever more rarely;
* time, requests in flight and resources in memory are bounded.

A list is magic, blake2b-128 of all that follows, and one zstd frame of JSON.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, Protocol

import orjson
import structlog
import zstandard

from ingest.errors import HeadgateError, Rejected
from ingest.model import SourceName, Target
from ingest.sources.selection import Dimensions, match
from ingest.validate import Reason
from shard_config.model import Config, Resources, ServiceProfile

log = structlog.get_logger()

LIST_BYTES_MAX: Final = 32 * 1024 * 1024
"""Of a list in the store: 200,000 resources with ten tags each have 5 to 15 MB."""
CONTENT_BYTES_MAX: Final = 256 * 1024 * 1024
RESOURCES_MAX: Final = 500_000
"""In memory, of all targets of a process; of what is beyond, series are named as if it had no tags."""
WAIT_S: Final = 60.0
"""So long series wait for a list that nobody has written yet; then they are named without it."""
PATIENCE_S: Final = 900.0
"""So rarely: who waits holds up all that is behind it, and one list that is missing seldom comes alone."""
READ_S: Final = 10.0
REFRESH_S: Final = 30.0
AT_ONCE: Final = 8
RETRY_S: Final = 15.0
"""Before a list that is not there is asked for again, and twice as long each time, up to the discovery interval."""

_MAGIC: Final = b"HGRSRC1\n"

Key = tuple[Target, str]
"""A target and a service."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One tagged resource; tags in AWS's order. `dimensions` are those that its metrics have, sorted by name; none where no pattern fits."""

    arn: str
    tags: Mapping[str, str] = field(hash=False)
    dimensions: Dimensions = ()


@dataclass(frozen=True, slots=True)
class ResourceList:
    """All tagged resources of a service in a target: (ARN, tags) each. `denied` says why there are none to be had."""

    listed_at_s: int
    types: tuple[str, ...]
    resources: tuple[tuple[str, Mapping[str, str]], ...] = ()
    denied: str = ""


class Cache(Protocol):
    """As `ingest.sources.listing.Cache`; the remote writer reads only."""

    async def cached(self, name: Sequence[str], bytes_max: int) -> bytes | None: ...


# --- as bytes -------------------------------------------------------------------------------------------------


def cache_name(target: Target, service: str) -> tuple[str, ...]:
    """Where a list is shared."""
    return "resources", target.source, target.account, target.region, service


def encode(listed: ResourceList, target: Target, service: str) -> bytes:
    """A list as it is shared. Raises Rejected where it is larger than anybody reads."""
    content = orjson.dumps(
        {
            "target": str(target),
            "service": service,
            "listed_at_s": listed.listed_at_s,
            "types": listed.types,
            "denied": listed.denied,
            "resources": listed.resources,
        }
    )
    frame = zstandard.ZstdCompressor(level=3, write_content_size=True).compress(content)
    body = _MAGIC + _checksum(frame) + frame
    if len(content) > CONTENT_BYTES_MAX or len(body) > LIST_BYTES_MAX:
        what = f"{len(listed.resources):,} resources take {len(body):,} bytes"
        raise Rejected(f"resources {target} {service}", Reason.PAYLOAD_TOO_LARGE, what)
    return body


def decode(body: bytes, target: Target, service: str) -> ResourceList:
    """The inverse of `encode`. Raises Rejected(spoilt) where it is not sound, or another's."""
    where = f"resources {target} {service}"
    frame = body[len(_MAGIC) + 16 :]
    if not body.startswith(_MAGIC) or body[len(_MAGIC) : len(_MAGIC) + 16] != _checksum(frame):
        raise Rejected(where, Reason.SPOILT, "not a list, or cut short")
    try:
        # What the frame names is allocated, so that is looked at first.
        if not 0 <= zstandard.get_frame_parameters(frame).content_size <= CONTENT_BYTES_MAX:
            raise Rejected(where, Reason.SPOILT, "its size is not named, or too large")
        found = orjson.loads(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False))
        if (found["target"], found["service"]) != (str(target), service):
            raise Rejected(where, Reason.SPOILT, f"it is of {found['target']} {found['service']}")
        return ResourceList(
            int(found["listed_at_s"]),
            tuple(found["types"]),
            tuple((str(arn), {sys.intern(key): str(value) for key, value in tags.items()}) for arn, tags in found["resources"]),
            str(found["denied"]),
        )  # fmt: skip
    except (zstandard.ZstdError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Rejected(where, Reason.SPOILT, repr(error)[:200]) from error


def _checksum(frame: bytes) -> bytes:
    return blake2b(frame, digest_size=16).digest()


# --- which resource a metric belongs to -----------------------------------------------------------------------


class ResourceIndex:
    """The resources of one list, by the dimensions of their metrics."""

    def __init__(self, profile: Resources, listed: Iterable[tuple[str, Mapping[str, str]]]) -> None:
        patterns = [re.compile(pattern) for pattern in profile.arns]
        by_pattern: list[dict[Dimensions, Resource]] = [{} for _ in patterns]
        self.all: list[Resource] = []
        for arn, tags in listed:
            which, dimensions = next(_found(patterns, arn), (-1, ()))
            resource = Resource(arn, tags, dimensions)
            self.all.append(resource)
            if dimensions:
                by_pattern[which][dimensions] = resource
        names = [tuple(sorted(group.replace("_", " ") for group in p.groupindex)) for p in patterns]
        found = [(n, index) for n, index in zip(names, by_pattern, strict=True) if index]
        self._by_names = sorted(found, key=lambda one: -len(one[0]))

    def of(self, dimensions: Dimensions) -> Resource | None:
        """The resource that a metric with these dimensions belongs to."""
        has = dict(dimensions)
        for names, index in self._by_names:
            if all(name in has for name in names):
                found = index.get(tuple((name, has[name]) for name in names))
                if found is not None:
                    return found
        return None


def _found(patterns: Sequence[re.Pattern[str]], arn: str) -> Iterator[tuple[int, Dimensions]]:
    """Which pattern fits, and the dimensions that it finds. A group's underscore stands for a space."""
    for i, pattern in enumerate(patterns):
        if found := pattern.search(arn):
            groups = found.groupdict(default="")
            yield i, tuple(sorted((name.replace("_", " "), value) for name, value in groups.items()))


# --- the remote writer's side ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Known:
    """What is known of one list. Times are those of `refresh`; `index` is None until it was read."""

    next_s: float
    wait_s: float
    tried: bool = False
    listed_at_s: int = 0
    index: ResourceIndex | None = None
    digest: bytes = b""
    version: int = 0


class ResourceBook:
    """The resources of the targets that a process writes for, as exporters last listed them."""

    def __init__(self, config: Config, cache: Cache) -> None:
        self._cache = cache
        self._profiles = config.service_by_name if config.lists_resources else {}
        # A monitoring account does not know the tags of those that it watches.
        self._services = {account.id: account.services for account in config.accounts if not account.via}
        self._known: dict[Key, _Known] = {}
        self._now_s = 0.0
        self._until_s = float("-inf")
        """Until then lists that are not there are waited for."""
        self._full = False

    async def refresh(self, wanted: Iterable[Key], now_s: float) -> None:
        """Read the lists of these targets that are due, of all of their services, and forget those of others.

        Takes REFRESH_S at most, and never raises for the store. Call it each few seconds: most calls read nothing. `now_s` is the clock's, since
        the epoch.
        """
        # All services of a target: who asks for one will soon ask for the others.
        targets = {target for target, _ in wanted}
        keys = {(t, s) for t in targets for s in self._services.get(t.account, ()) if self._profile((t, s))}
        self._known = {key: known for key, known in self._known.items() if key in keys}
        new = keys - self._known.keys()
        if new and now_s >= self._until_s + PATIENCE_S:
            self._until_s = now_s + WAIT_S
        for key in new:
            self._known[key] = _Known(now_s, RETRY_S)
        self._now_s = now_s
        due = iter([key for key, known in self._known.items() if known.next_s <= now_s])

        async def work() -> None:
            for key in due:
                await self._read(key, now_s)

        try:
            async with asyncio.timeout(REFRESH_S), asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(work())
        except TimeoutError:
            log.warning("resources_not_all_read", lists=len(keys))

    def known(self, target: Target, service: str) -> bool:
        """Whether series of these can be named: their list was read, or there is none to be had, or it was waited for long enough."""
        key = target, service
        if self._profile(key) is None:
            return True
        known = self._known.get(key)
        if known is None or not known.tried:
            return False
        return known.index is not None or self._now_s >= self._until_s

    def version(self, target: Target, service: str) -> int:
        """Another number whenever `of` may say otherwise than before: labels that were made of it are to be made anew."""
        known = self._known.get((target, service))
        return 0 if known is None else known.version

    def of(self, target: Target, service: str, dimensions: Dimensions) -> Resource | None:
        """The resource that a series with these dimensions belongs to."""
        known = self._known.get((target, service))
        return None if known is None or known.index is None else known.index.of(dimensions)

    def all(self, target: Target, service: str) -> Sequence[Resource]:
        """All tagged resources that the service's `only` means: for aws_*_info."""
        known, profile = self._known.get((target, service)), self._profile((target, service))
        if known is None or known.index is None or profile is None:
            return ()
        return [resource for resource in known.index.all if _is_meant(profile, resource.tags)]

    def _profile(self, key: Key) -> ServiceProfile | None:
        """The service's profile, where its resources are listed at all."""
        target, service = key
        profile = self._profiles.get(service)
        if target.source != SourceName.CLOUDWATCH or target.account not in self._services:
            return None
        return profile if profile is not None and profile.resources is not None else None

    async def _read(self, key: Key, now_s: float) -> None:
        target, service = key
        known, profile = self._known[key], self._profile(key)
        if profile is None or profile.resources is None:
            return
        interval_s = float(profile.discovery_interval_s)
        try:
            async with asyncio.timeout(READ_S):
                body = await self._cache.cached(cache_name(target, service), LIST_BYTES_MAX)
            if body is not None:
                await self._take(key, known, profile.resources, body)
            known.tried = True
        except (HeadgateError, TimeoutError) as error:
            known.tried = True
            log.warning("resources_not_read", target=str(target), service=service, error=f"{type(error).__name__}: {error}")  # fmt: skip
        if known.index is not None and (left_s := known.listed_at_s + interval_s - now_s) > 0:
            # Exporters list again when it is this old, and take a while.
            known.next_s, known.wait_s = now_s + min(left_s + RETRY_S, interval_s), RETRY_S
        else:
            known.next_s, known.wait_s = now_s + known.wait_s, min(2 * known.wait_s, interval_s)

    async def _take(self, key: Key, known: _Known, profile: Resources, body: bytes) -> None:
        target, service = key
        digest = blake2b(body, digest_size=16).digest()
        if digest == known.digest:
            return
        # In a thread, for 100,000 resources take a second.
        listed = await asyncio.to_thread(decode, body, target, service)
        if self._in_memory() - _size(known) + len(listed.resources) > RESOURCES_MAX:
            if not self._full:
                log.error("resources_too_many", most=RESOURCES_MAX, remedy="run more remote writers, so that each has fewer targets")  # fmt: skip
            self._full = True
            listed = ResourceList(listed.listed_at_s, listed.types)
        if listed.denied:
            log.warning("resources_denied", target=str(target), service=service, error=listed.denied)
        index = await asyncio.to_thread(ResourceIndex, profile, listed.resources)
        known.index, known.digest, known.listed_at_s = index, digest, listed.listed_at_s
        known.version += 1

    def _in_memory(self) -> int:
        return sum(map(_size, self._known.values()))


def _size(known: _Known) -> int:
    return 0 if known.index is None else len(known.index.all)


def _is_meant(profile: ServiceProfile, tags: Mapping[str, str]) -> bool:
    """Whether some selection takes a resource with these tags; one that asks for no tags takes all."""
    if not profile.only:
        return True
    return any(match(selection.tags, tags) for selection in profile.only)
