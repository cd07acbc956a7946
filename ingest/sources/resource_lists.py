"""Lists of all tagged resources, for remote writers: made beside the looks, and shared as listings are.

Guarantees:

* a service's resources are listed once in its discovery interval, whichever shard has the target, and one listing of them is under way;
* a list is put again only where it changed, or after `SHARED_S`: of a thousand targets' lists, hourly, the puts would cost more than all else;
* no look waits for a list or fails by it, and where a look lists all resources for its own sake, that is the list;
* a list that cannot be made leaves the shared one as it is. Where there is none, and the role may not list, that is shared: so that
  nobody waits for it, and a remote writer can say whose permission is missing;
* lists under way, their time and what is remembered of them are bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import orjson
import structlog

from ingest.clock import Clock
from ingest.errors import HeadgateError, Rejected
from ingest.model import Target
from ingest.resources import LIST_BYTES_MAX, Key, ResourceList, cache_name, decode, encode
from ingest.sources.aws import Tally
from ingest.sources.aws_errors import Denied
from ingest.sources.listing import Cache
from ingest.sources.selection import Tagged
from ingest.sources.tags import tagged_resources
from shard_config.model import Resources, ServiceProfile

if TYPE_CHECKING:
    from ingest.sources.discovery import Asked

log = structlog.get_logger()

LISTING_S = 600.0
"""For one list: 200,000 resources take 400 s at the pages a second that we ask for."""
AT_ONCE = 4
WAITING_MAX = 1_024
"""Lists under way or waiting; the next look asks again for what is beyond."""
LISTS_MAX = 16_384
"""Targets × services whose last list is remembered; of one that is forgotten the cache knows."""
SHARED_S = 12 * 3_600.0
WAIT_S, WAIT_S_MAX = 60.0, 3_600.0
"""After a failure, and twice as long each time."""
REMEDY = "grant tag:GetResources to the role, or set remote_write.resources to false"


@dataclass(frozen=True, slots=True)
class _List:
    """One that is wanted, and where it goes."""

    cache: Cache
    target: Target
    service: str
    resources: Resources
    interval_s: int

    @property
    def key(self) -> Key:
        return self.target, self.service

    async def shared(self) -> ResourceList | None:
        """What is shared, if it is sound and of the same types. Raises Transient or Rejected."""
        body = await self.cache.cached(cache_name(*self.key), LIST_BYTES_MAX)
        if body is None:
            return None
        try:
            found = await asyncio.to_thread(decode, body, *self.key)
        except Rejected:
            return None
        return found if found.types == self.resources.types else None

    async def share(self, listed: ResourceList) -> None:
        """Put it in place of what is shared. Raises Transient or Rejected."""
        await self.cache.cache(cache_name(*self.key), await asyncio.to_thread(encode, listed, *self.key))
        log.info(
            "resources_listed",
            target=str(self.target),
            service=self.service,
            resources=len(listed.resources),
            denied=bool(listed.denied),
        )


class ResourceLists:
    """The lists of all targets of this process. `close` them before AWS."""

    def __init__(self, clock: Clock, *, wanted: bool) -> None:
        self._clock = clock
        self._cache: Cache | None = None
        self.wanted = wanted
        """Whether a remote writer reads them."""
        self._next: dict[Key, tuple[float, float]] = {}
        """When a list is due again, monotonic, and the seconds that were waited after its last failure."""
        self._put: dict[Key, tuple[float, bytes]] = {}
        """When a list was put, monotonic, and a hash of what it said."""
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)

    def share(self, cache: Cache) -> None:
        """Where to; without it nothing is listed."""
        self._cache = cache

    def wants(self, profile: ServiceProfile) -> bool:
        """Whether all resources of a service are listed."""
        return self.wanted and self._cache is not None and profile.resources is not None

    def due(self, asked: Asked, target: Target, profile: ServiceProfile) -> None:
        """Begin to list what was not for a discovery interval. Call it at each look; most calls do nothing."""
        # A monitoring account does not know the tags of those that it watches.
        wanted = None if asked.linked else self._wanted(target, profile)
        if wanted is None or len(self._tasks) >= WAITING_MAX:
            return
        due_s, _ = self._next.get(wanted.key, (float("-inf"), 0.0))
        if wanted.key not in self._tasks and self._clock.monotonic_s() >= due_s:
            self._spawn(wanted, self._refresh(asked, wanted))

    def listed(self, target: Target, profile: ServiceProfile, tagged: Sequence[Tagged]) -> None:
        """Somebody has just listed all of them: share that."""
        wanted = self._wanted(target, profile)
        if wanted is not None and wanted.key not in self._tasks:
            self._later(wanted.key, wanted.interval_s)
            self._spawn(wanted, self._share(wanted, tagged))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wanted(self, target: Target, profile: ServiceProfile) -> _List | None:
        if not self.wanted or self._cache is None or profile.resources is None:
            return None
        return _List(self._cache, target, profile.service, profile.resources, profile.discovery_interval_s)

    def _spawn(self, wanted: _List, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._within(wanted.key, work))
        self._tasks[wanted.key] = task
        task.add_done_callback(lambda _: self._tasks.pop(wanted.key, None))

    async def _within(self, key: Key, work: Coroutine[None, None, None]) -> None:
        try:
            async with self._slots, asyncio.timeout(LISTING_S):
                await work
        except (HeadgateError, TimeoutError) as error:
            _, before_s = self._next.get(key, (0.0, 0.0))
            wait_s = min(WAIT_S_MAX, 2 * before_s or WAIT_S)
            self._later(key, wait_s, wait_s)
            said = f"{type(error).__name__}: {error}"
            log.warning(
                "resources_not_listed", target=str(key[0]), service=key[1], next_try_s=int(wait_s), error=said
            )
        finally:
            work.close()  # where it was never begun

    async def _refresh(self, asked: Asked, wanted: _List) -> None:
        shared = None
        if wanted.key not in self._next:  # not listed by this process, but perhaps by one before it
            shared = await wanted.shared()
            age_s = self._clock.now_s() - shared.listed_at_s if shared is not None else wanted.interval_s
            if 0 <= age_s < wanted.interval_s:
                self._later(wanted.key, wanted.interval_s - age_s)
                return
        deadline_s = self._clock.monotonic_s() + LISTING_S
        try:
            tagged = await tagged_resources(
                asked.aws, asked.account, wanted.target, wanted.resources, (), deadline_s, Tally(), REMEDY
            )
        except Denied as denied:
            log.warning(
                "resources_denied", target=str(wanted.target), service=wanted.service, error=str(denied)
            )
            self._later(wanted.key, wanted.interval_s)
            shared = shared or await wanted.shared()
            if shared is None or shared.denied:
                await self._share(wanted, denied=str(denied))
            return
        self._later(wanted.key, wanted.interval_s)
        await self._share(wanted, tagged)

    async def _share(self, wanted: _List, tagged: Sequence[Tagged] = (), denied: str = "") -> None:
        now_s = self._clock.monotonic_s()
        listed = ResourceList(int(self._clock.now_s()), wanted.resources.types, tuple(tagged), denied)
        said = await asyncio.to_thread(_said, listed)
        put_s, before = self._put.get(wanted.key, (0.0, b""))
        if said == before and now_s < put_s + SHARED_S:
            return
        await wanted.share(listed)
        self._put.pop(wanted.key, None)
        self._put[wanted.key] = now_s, said
        while len(self._put) > LISTS_MAX:
            del self._put[next(iter(self._put))]

    def _later(self, key: Key, after_s: float, wait_s: float = 0.0) -> None:
        self._next.pop(key, None)
        self._next[key] = self._clock.monotonic_s() + after_s, wait_s
        while len(self._next) > LISTS_MAX:
            del self._next[next(iter(self._next))]


def _said(listed: ResourceList) -> bytes:
    """A hash of all but the time."""
    content = orjson.dumps(
        (listed.types, sorted(listed.resources, key=lambda one: one[0]), bool(listed.denied)),
        option=orjson.OPT_SORT_KEYS,
    )
    return blake2b(content, digest_size=16).digest()
