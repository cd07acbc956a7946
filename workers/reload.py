"""What a long-running worker goes by: its configuration file, with the organization's accounts, kept up to date under way.

Guarantees:

* *A valid change takes effect without a restart*: the file's content is looked at each `LOOK_S` (a ConfigMap is a link that is swapped, so times
  and inodes say nothing), and at once at SIGHUP, which also reads secrets' files and the organization's list again.
* *An invalid one changes nothing*: it is refused with every message, once a content, and what was before stays in use.
* What cannot change under way (`FIXED`) is refused too, and says so.
* What a worker does not know yet it waits for (`until`): the file or the list may reach one process later than another.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from hashlib import blake2b
from pathlib import Path

import structlog
from prometheus_client import Counter, Gauge, Info

from ingest.clock import Clock
from ingest.schedule import grids_of
from shard_config.document import SIZE_BYTES_MAX
from shard_config.load import ConfigError, ConfigErrors, load
from shard_config.model import Config
from shard_config.organization import with_accounts
from workers.lifecycle import Lifecycle
from workers.members import READ_INTERVAL_S, Members

_log = structlog.get_logger()

LOOK_S = 5.0
AT_ONCE_S = 1.0
"""Between two looks, however many wait for one."""
FIXED = ("kafka", "postgres", "s3", "slots", "run")

REVISION = Info("headgate_config_revision", "The revision of the configuration in use.")
RELOADS = Counter("headgate_config_reloads_total", "Changes of the configuration that were met.", ["result"])
INVALID = Gauge(
    "headgate_config_invalid",
    "1: the configuration file as it stands now is refused, and the one before is in use. See the log's config_refused.",
)

Apply = Callable[[Config], Awaitable[None]]
"""Go by this configuration from now on."""


class Settings:
    """One worker's configuration. `config` is what it goes by now, `file` the same without the organization's accounts."""

    def __init__(
        self,
        file: Config,
        members: Members,
        clock: Clock,
        path: Path | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """`file` is what stood in `path`; without a path only the organization's list can change."""
        self.file = file
        self.members = members
        self._clock = clock
        self._path = path
        self._environ = environ
        self._content = ""
        self._listing = members.listing
        self._wanted = asyncio.Event()
        self.config = with_accounts(file, members.listing)

    @property
    def whole(self) -> bool:
        """Whether all accounts are known: not before an organization was listed for the first time."""
        return self.file.organization is None or self._listing is not None

    async def start(self) -> Config:
        """Read the organization's list, where there is one; returns what to begin with."""
        if self.file.organization is not None:
            await self.members.read(older_than_s=0)
        self._listing = self.members.listing
        self.config = with_accounts(self.file, self._listing)
        REVISION.info({"revision": self.config.revision})
        INVALID.set(0)
        return self.config

    async def run(self, lifecycle: Lifecycle, apply: Apply) -> None:
        """Until told to stop: look, and apply what has changed."""
        while not lifecycle.stop.is_set():
            again = lifecycle.hangup.is_set()
            lifecycle.hangup.clear()
            await self.look(apply, again=again)
            if await lifecycle.pause(AT_ONCE_S):
                return
            await lifecycle.pause(LOOK_S - AT_ONCE_S, lifecycle.hangup, self._wanted)

    async def look(self, apply: Apply, *, again: bool = False) -> None:
        """Look once. `again`: even where the file's content is the same, as secrets' files may not be."""
        wanted = self._wanted.is_set()
        self._wanted.clear()
        file = await self._read_file(again)
        organization = file.organization
        if organization is not None:
            if again:
                self.members.hurry()
            usual_s = min(READ_INTERVAL_S, organization.refresh_s)
            await self.members.read(older_than_s=AT_ONCE_S if again or wanted else usual_s)
            self.members.observe()
        if file is self.file and self.members.listing is self._listing:
            return
        self.file, self._listing = file, self.members.listing
        config = with_accounts(file, self._listing)
        if config == self.config:
            return
        await apply(config)
        before, self.config = self.config, config
        REVISION.info({"revision": config.revision})
        RELOADS.labels(result="accepted").inc()
        old, new = set(grids_of(before)), set(grids_of(config))
        _log.info(
            "config_changed",
            revision=config.revision,
            targets=len(new),
            added=len(new - old),
            removed=len(old - new),
        )

    def look_now(self) -> None:
        """Let `run` look at once, within `AT_ONCE_S`."""
        self._wanted.set()

    async def until(self, condition: Callable[[Config], bool], timeout_s: float) -> bool:
        """Wait until the configuration is so, looking for it meanwhile. False where it is not within the time."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        while not condition(self.config):
            if self._clock.monotonic_s() >= deadline_s:
                return False
            self.look_now()
            await self._clock.sleep(min(AT_ONCE_S / 2, timeout_s))
        return True

    async def _read_file(self, again: bool) -> Config:
        """What stands in the file, or what is in use where that is refused, or nothing new."""
        if self._path is None:
            return self.file
        content = await asyncio.to_thread(_digest, self._path)
        if content == self._content and not again:
            return self.file
        self._content = content
        try:
            file = await asyncio.to_thread(load, self._path, environ=self._environ)
            refuse_fixed(self.file, file, str(self._path))
        except ConfigErrors as refused:
            INVALID.set(1)
            RELOADS.labels(result="refused").inc()
            _log.error(
                "config_refused",
                errors=str(refused).splitlines(),
                in_use=self.config.revision,
            )
            return self.file
        INVALID.set(0)
        return self.file if file == self.file else file


def refuse_fixed(old: Config, new: Config, name: str) -> None:
    """Raise ConfigErrors where `new` changes what cannot change under way; `name` is the file's."""
    changed = [key for key in FIXED if getattr(old, key) != getattr(new, key)]
    errors = [ConfigError(name, 0, key, "cannot change under way", "restart to change") for key in changed]
    if new.slots < old.slots:
        what = f"{new.slots} are less than the {old.slots} there are, and slots never shrink"
        errors = [e for e in errors if e.path != "slots"] + [
            ConfigError(name, 0, "slots", what, "set it back")
        ]
    if errors:
        raise ConfigErrors(errors)


def _digest(path: Path) -> str:
    """Of the content; of a file that cannot be read, why."""
    try:
        with path.open("rb") as file:
            return blake2b(file.read(SIZE_BYTES_MAX + 1), digest_size=16).hexdigest()
    except OSError as error:
        return f"{error.strerror}"
