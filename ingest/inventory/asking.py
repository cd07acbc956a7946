"""Lists of AWS, all pages or an error, by the way that exporters go: the same roles, limiter, attempts and errors.

Pages, items and time are bounded; a token that comes twice, an answer without its list and a call that is denied are errors, and never an empty list.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ingest.clock import Clock
from ingest.errors import Rejected, Transient
from ingest.inventory.model import RESOURCES_MAX
from ingest.inventory.parse import Raw, Size
from ingest.sources.aws import Access, Aws, Tally
from ingest.sources.aws_errors import Denied
from shard_config.model import Account

CALLS_PER_S: Final = 2.0
"""Of one API in an account and region: a tenth of what AWS gives the lowest of these, for other programs of the account ask too."""
PAGES_MAX: Final = 10_000
TYPES_AT_ONCE: Final = 100
"""Values of DescribeInstanceTypes' filter; AWS takes 200."""


@dataclass(frozen=True, slots=True)
class Listing:
    """One API that lists. `client` and `operation` are botocore's; `action` is what a policy grants."""

    client: str
    operation: str
    action: str
    items: str
    page_key: str = "NextToken"
    """In the request; in the answer it is called `next_key`, or the same."""
    next_key: str = ""
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def api(self) -> str:
        return self.action.partition(":")[2]


INSTANCE_TYPES: Final = Listing(
    "ec2", "describe_instance_types", "ec2:DescribeInstanceTypes", "InstanceTypes", asked={"MaxResults": 100}
)


@dataclass(frozen=True, slots=True)
class Asker:
    """Who is asked where, until when (monotonic)."""

    aws: Aws
    clock: Clock
    account: Account
    region: str
    deadline_s: float
    tally: Tally = field(default_factory=Tally)

    async def call(self, listing: Listing, asked: Mapping[str, Any]) -> Raw:
        """One answer. Raises Transient, Rejected, or Denied with the permission to grant."""

        async def send(access: Access) -> Raw:
            async with self.aws.client(listing.client, access) as client:
                answer: Raw = await getattr(client, listing.operation)(**asked)
                return answer

        try:
            return await self.aws.call(
                self.account, self.region, listing.api, send,
                cost_s=1 / CALLS_PER_S, deadline_s=self.deadline_s, tally=self.tally,
            )  # fmt: skip
        except Denied as denied:
            raise Denied(denied.where, f"grant {listing.action} to the role: {denied.said}") from denied

    async def pages(self, listing: Listing, **asked: Any) -> AsyncIterator[list[Any]]:
        """The items of each page. Raises as `call`, and where the pages do not end."""
        where = f"aws {listing.api} {self.account.id}/{self.region}"
        request = {**listing.asked, **asked}
        seen: set[str] = set()
        found = 0
        for _ in range(PAGES_MAX):
            answer = await self.call(listing, request)
            items = answer.get(listing.items)
            if not isinstance(items, list):
                raise Transient(where, f"an answer without {listing.items}")
            yield items
            found += len(items)
            token = answer.get(listing.next_key or listing.page_key) or ""
            if not token:
                return
            if token in seen:
                raise Transient(where, f"the same {listing.page_key} came twice: its pages do not end")
            if found > RESOURCES_MAX:
                break
            seen.add(token)
            request = {**request, listing.page_key: token}
        raise Rejected(where, "too_large", f"more than {PAGES_MAX:,} pages or {RESOURCES_MAX:,} items")

    async def all(self, listing: Listing, **asked: Any) -> list[Any]:
        """The items of all pages."""
        return [item async for page in self.pages(listing, **asked) for item in page]


class Sizes:
    """What instance types have, as AWS says it: asked once for each type and region. A type has the same size in all regions."""

    def __init__(self) -> None:
        self.known: dict[str, Size] = {}
        self._asked: set[tuple[str, str]] = set()

    async def learn(self, asker: Asker, types: set[str]) -> None:
        """Look up those that are not known. What the region does not have stays unknown. Raises as `Asker.call`."""
        missing = sorted(t for t in types if t not in self.known and (asker.region, t) not in self._asked)
        for i in range(0, len(missing), TYPES_AT_ONCE):
            some = missing[i : i + TYPES_AT_ONCE]
            # A filter, for a type that the region does not have would make the whole request by names fail.
            for raw in await asker.all(INSTANCE_TYPES, Filters=[{"Name": "instance-type", "Values": some}]):
                cpus, memory = raw["VCpuInfo"]["DefaultVCpus"], raw["MemoryInfo"]["SizeInMiB"]
                self.known[raw["InstanceType"]] = Size(int(cpus), int(memory) * 1024**2)
            self._asked |= {(asker.region, t) for t in some}
