"""The accounts of an organization, as this process knows them: the coordinator asks AWS, everybody else reads what it has shared.

* The list is shared through the archive (`cache/v1/organization`) before anything is planned with it: whoever gets a task can find out
  whom it is about, without a permission of its own, and a restart while Organizations is away goes on with the last list.
* *What is known is kept* where a refresh fails, however old it is; a metric and the log say how old.
* Organizations is asked again after `refresh_s`, at once for another question and at SIGHUP, and after a failure with a back-off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from prometheus_client import Counter, Gauge
from pydantic import ValidationError

from ingest.archive import open_archive
from ingest.aws_session import new_session
from ingest.clock import Clock, SystemClock
from ingest.errors import HeadgateError, Rejected
from ingest.sources.organization import TagCache, list_organization
from shard_config.model import S3, Config, Organization
from shard_config.organization import Listing, question_of, with_accounts
from workers.lifecycle import Lifecycle, configure_logs

_log = structlog.get_logger()

KEY = ("organization",)
BYTES_MAX = 8 * 1024 * 1024
"""Of 20,000 accounts, 400 bytes each."""
READ_INTERVAL_S = 60.0
DEADLINE_S = 15.0
"""Of one reading or writing: the configuration file waits for it."""
RETRY_S = 30.0
"""After the first failure; twice as long each time, up to refresh_s."""
TURN_S = 5.0

ACCOUNTS = Gauge("headgate_organization_accounts", "Accounts in the organization's list, as last known.")
AGE = Gauge(
    "headgate_organization_list_age_seconds",
    "Age of the organization's list that is in use. Above a few refresh_s: it cannot be listed, and new accounts are not collected.",
)
LISTINGS = Counter(
    "headgate_organization_listings_total", "Times that Organizations was asked for all accounts.", ["result"]
)


class Members:
    """The list as it was shared last. `read` never raises: what is known stays."""

    def __init__(self, s3: S3, clock: Clock) -> None:
        self._s3 = s3
        self._clock = clock
        self._session = new_session()
        self._begun_s = clock.now_s()
        self.listing: Listing | None = None
        self._read_s = float("-inf")

    async def read(self, *, older_than_s: float = READ_INTERVAL_S) -> None:
        """Read what is shared, unless that was done less than so many seconds ago."""
        if self._clock.monotonic_s() - self._read_s < older_than_s:
            return
        self._read_s = self._clock.monotonic_s()
        try:
            async with open_archive(self._s3, self._clock, self._session, DEADLINE_S) as archive:
                body = await archive.cached(KEY, BYTES_MAX)
            if body is not None:
                self.take(decode(body))
        except HeadgateError as error:
            _log.warning("organization_as_last_known", error=str(error), **self.known())

    def hurry(self) -> None:
        """Somebody wants the newest list: where this process asks AWS, it does so at once."""

    def take(self, listing: Listing) -> None:
        """Use this list, unless a newer one is known."""
        if self.listing is None or listing.listed_at_s >= self.listing.listed_at_s:
            self.listing = listing
            ACCOUNTS.set(len(listing.accounts))

    def observe(self) -> None:
        """Set the metric of its age; before there is a list, of this process's."""
        since_s = self.listing.listed_at_s if self.listing is not None else self._begun_s
        AGE.set(self._clock.now_s() - since_s)

    def known(self) -> dict[str, int | None]:
        """For the log: how many accounts are known, and how old that is."""
        if self.listing is None:
            return {"known_accounts": None, "age_s": None}
        age_s = self._clock.now_s() - self.listing.listed_at_s
        return {"known_accounts": len(self.listing.accounts), "age_s": age_s}


class Lister(Members):
    """The coordinator's: lists, and shares."""

    def __init__(self, s3: S3, clock: Clock) -> None:
        super().__init__(s3, clock)
        self._tags = TagCache()
        self._failures = 0
        self._question = ""
        self._next_s = float("-inf")
        self._hurried = asyncio.Event()

    def hurry(self) -> None:
        self._hurried.set()

    async def run(self, lifecycle: Lifecycle, file: Callable[[], Config], told: Callable[[], None]) -> None:
        """Until told to stop: refresh for the configuration that `file` gives, and call `told` when there is a new list."""
        while not lifecycle.stop.is_set():
            if await self.refresh(file()):
                told()
            await lifecycle.pause(TURN_S, self._hurried)

    async def refresh(self, config: Config) -> bool:
        """Ask AWS if it is time to; True where there is a new list. Never raises for what AWS or the archive did."""
        organization = config.organization
        if organization is None or not self._due(organization):
            return False
        self._hurried.clear()
        try:
            listing = await list_organization(config, self._clock, self._tags)
            async with open_archive(self._s3, self._clock, self._session, DEADLINE_S) as archive:
                # Before anybody hears of its accounts: an exporter that gets a task of theirs finds them here.
                await archive.cache(KEY, encode(listing))
        except HeadgateError as error:
            self._failures += 1
            wait_s = min(RETRY_S * 2 ** min(self._failures - 1, 10), organization.refresh_s)
            self._next_s = self._clock.monotonic_s() + wait_s
            LISTINGS.labels(result="failed").inc()
            _log.error("organization_not_listed", error=str(error), retry_s=wait_s, **self.known())
            return False
        self._failures = 0
        self._next_s = float("-inf")
        LISTINGS.labels(result="whole").inc()
        self.take(listing)
        return True

    def _due(self, organization: Organization) -> bool:
        question = question_of(organization)
        if question != self._question:
            # What failed before says nothing of another question.
            self._question, self._next_s, self._failures = question, float("-inf"), 0
        if self._hurried.is_set():
            return True
        if self._clock.monotonic_s() < self._next_s:
            return False
        if self.listing is None or self.listing.question != question:
            return True
        return self._clock.now_s() - self.listing.listed_at_s >= organization.refresh_s


def known(config: Config) -> Config:
    """The configuration with the accounts that were listed last, as far as anybody knows: for commands, which may not list."""
    if not structlog.is_configured():
        configure_logs("headgate")  # on stderr: stdout is the command's own
    return asyncio.run(with_known(config))


async def with_known(config: Config) -> Config:
    """`known`, in an event loop."""
    members = Members(config.s3, SystemClock(config.run.clock_offset_s))
    await members.read()
    return with_accounts(config, members.listing)


def encode(listing: Listing) -> bytes:
    return listing.model_dump_json().encode()


def decode(body: bytes) -> Listing:
    """Raises Rejected where it is no list."""
    try:
        return Listing.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Rejected("organization's list", "spoilt", f"{first['loc']}: {first['msg']}") from error
