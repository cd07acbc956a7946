"""Asks AWS, account by account and region by region, what an exporter will be allowed to: before anything is billed.

* The very path of the exporter: the same credentials, clients, limiter and retries (`ingest.sources.aws`), so that what passes here works.
* Free by default: ListMetrics of a namespace that nobody has (a request of the free million), tag:GetResources (free), and GetMetricData
  with a StartTime after its EndTime, which AWS refuses. Whether it is refused before or after the permission is looked at, AWS does
  not say: a denial is a denial, anything else is unproved. `paid` asks for one metric instead ($0.00001) and proves it.
* Where the inventory is had by Describe calls, each of them is tried for the services that are configured: one page, free as all of these are.
* An account's failure is a finding of that account; nothing is raised for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ingest.clock import Clock
from ingest.errors import HeadgateError, Rejected
from ingest.inventory.asking import Listing
from ingest.inventory.describe import asked_for
from ingest.preflight import Finding, State, remedy_of_action, remedy_of_identity
from ingest.sources.asking import Asking
from ingest.sources.aws import Access, Tally
from ingest.sources.aws_errors import Denied
from ingest.sources.selection import asks_tags
from shard_config.model import Account, Config, ServiceProfile

ACCOUNTS_AT_ONCE: Final = 16
ACCOUNT_DEADLINE_S: Final = 60.0
"""Of all that is asked of one account."""
CALLS_PER_S: Final = 25.0
"""Of each probe, in one account and region: ListMetrics' quota, the lowest of them."""
NAMESPACE: Final = "Headgate/Preflight"
"""Nobody publishes under it."""

NO_TABLE: Final = "headgate-preflight"
"""It need not be there."""

Ask = Callable[[Access], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a preflight of accounts has sent, for the sentence about its price."""

    requests: dict[str, int]
    metrics_billed: int


class AwsPreflight:
    """One preflight; `asked` counts while `check` runs. `close` it."""

    def __init__(
        self, config: Config, clock: Clock, *, paid: bool, deadline_s: float = ACCOUNT_DEADLINE_S
    ) -> None:
        """`deadline_s` is of each account."""
        self._asking = Asking(config, clock)
        self._config = config
        self._clock = clock
        self._paid = paid
        self._deadline_s = deadline_s
        self._tally = Tally()
        self._metrics_billed = 0

    async def close(self) -> None:
        await self._asking.close()

    @property
    def asked(self) -> Asked:
        return Asked(dict(self._tally.requests), self._metrics_billed)

    async def check(self, accounts: Sequence[Account], done: Callable[[], None]) -> list[Finding]:
        """The findings of all accounts, ACCOUNTS_AT_ONCE at a time; `done` is called after each."""
        waiting = iter(accounts)
        found: list[Finding] = []

        async def work() -> None:
            for account in waiting:
                found.extend(await self.account(account))
                done()

        async with asyncio.TaskGroup() as group:
            for _ in range(min(ACCOUNTS_AT_ONCE, len(accounts))):
                group.create_task(work())
        return found

    async def account(self, account: Account) -> list[Finding]:
        """Who we are there, and what we may in each region; without an identity nothing else is asked."""
        asked = self._asking.asked(account.id)
        if asked is None:
            return [Finding("aws", account.id, "configuration", State.WRONG, "is not in the configuration")]
        caller = asked.account
        deadline_s = self._clock.monotonic_s() + self._deadline_s
        role = caller.role_arn or self._config.aws.role_template.replace("{account}", caller.id)
        identity = "AssumeRole" if role else "GetCallerIdentity"
        try:
            await self._asking.aws.credentials(caller, deadline_s, self._tally)
        except HeadgateError as error:
            check = next((api for api in ("AssumeRole", "GetCallerIdentity") if api in error.where), identity)
            remedy = remedy_of_identity(error, caller.id, role, caller.external_id is not None)
            return [Finding("aws", account.id, check, State.WRONG, error.what, remedy)]
        found = [
            Finding("aws", account.id, identity, State.OK, f"by {role}" if role else "ambient credentials")
        ]
        for region in account.regions:
            found += self._tags_are_wrong(account, region)
            for action, ask in self._questions(account, region, asked.linked):
                found.append(await self._probe(account, caller, region, action, ask, deadline_s))
            for listing in self._inventory(account, region):
                # A monitoring account describes nothing of others: it is the account's own role that is asked.
                ask = partial(self._describe, listing)
                found.append(await self._probe(account, account, region, listing.action, ask, deadline_s))
        return found

    def _inventory(self, account: Account, region: str) -> list[Listing]:
        if self._config.inventory.source != "describe":
            return []
        return asked_for({profile.service for profile in self._config.services_in(account, region)})

    def _questions(self, account: Account, region: str, linked: bool) -> list[tuple[str, Ask]]:
        owner = account.id if linked else ""
        questions: list[tuple[str, Ask]] = [
            ("cloudwatch:ListMetrics", partial(self._list_metrics, owner)),
            ("cloudwatch:GetMetricData", partial(self._get_metric_data, owner)),
        ]
        if any(self._needs_tags(profile, linked) for profile in self._config.services_in(account, region)):
            questions.append(("tag:GetResources", self._get_resources))
        return questions

    def _needs_tags(self, profile: ServiceProfile, linked: bool) -> bool:
        """For selections, or for the names of series in Prometheus, which a monitoring account does not give."""
        named = self._config.lists_resources and profile.resources is not None and not linked
        return named or asks_tags(profile)

    def _tags_are_wrong(self, account: Account, region: str) -> list[Finding]:
        """What discovery would refuse of services that are selected by tags."""
        found = []
        for profile in self._config.services_in(account, region):
            if not asks_tags(profile):
                continue
            where, check = f"{account.id}/{region}", f"tags of {profile.service}"
            if profile.resources is None:
                what, remedy = "`only` asks for tags, and nothing says whose", "give the service `resources`"
                found.append(Finding("aws", where, check, State.WRONG, what, remedy))
            elif account.via:
                what = f"`only` asks for tags, and monitoring account {account.via} does not know those of others"
                found.append(
                    Finding(
                        "aws", where, check, State.WRONG, what, "leave `via` out, or select by dimensions"
                    )
                )
        return found

    async def _probe(
        self, account: Account, caller: Account, region: str, action: str, ask: Ask, deadline_s: float
    ) -> Finding:
        subject, api = f"{account.id}/{region}", action.partition(":")[2]
        free = api == "GetMetricData" and not self._paid
        try:
            await self._asking.aws.call(
                caller, region, api, ask, cost_s=1 / CALLS_PER_S, deadline_s=deadline_s, tally=self._tally
            )
        except HeadgateError as error:
            if free and isinstance(error, Rejected) and not isinstance(error, Denied):
                what = "not denied; whether it is allowed only a billed metric proves (--paid)"
                return Finding("aws", subject, action, State.UNPROVED, what)
            remedy = remedy_of_action(error, action, caller.id, region)
            if caller.id != account.id and isinstance(error, Rejected):
                remedy = f"link {account.id} to monitoring account {caller.id} in {region}, sharing metrics; or: {remedy}"
            return Finding("aws", subject, action, State.WRONG, error.what, remedy)
        self._metrics_billed += api == "GetMetricData"
        return Finding("aws", subject, action, State.OK)

    # --- questions --------------------------------------------------------------------------------------------

    async def _list_metrics(self, owner: str, access: Access) -> object:
        linked = {"IncludeLinkedAccounts": True, "OwningAccount": owner} if owner else {}
        return await self._asking.calls.list_metrics(access, {"Namespace": NAMESPACE, **linked})

    async def _get_metric_data(self, owner: str, access: Access) -> object:
        now_s = self._clock.now_s() // 60 * 60
        start_s, end_s = (now_s - 300, now_s) if self._paid else (now_s, now_s - 300)
        request = {"MetricDataQueries": [_one_query(owner)], "StartTime": start_s, "EndTime": end_s}
        page = await self._asking.calls.get_metric_data(access, request)
        if any(status == "Forbidden" for _, status, *_ in page.results):
            raise Denied("aws GetMetricData", f"its answer for account {owner or 'ours'} is Forbidden")
        return page

    async def _describe(self, listing: Listing, access: Access) -> object:
        of_none = {"TableName": NO_TABLE} if listing.api == "DescribeTable" else {}
        async with self._asking.aws.client(listing.client, access) as client:
            try:
                return await getattr(client, listing.operation)(**listing.asked, **of_none)
            except client.exceptions.ClientError as error:
                if of_none and error.response["Error"]["Code"] == "ResourceNotFoundException":
                    return None  # who may not ask is not told that it is not there
                raise

    async def _get_resources(self, access: Access) -> object:
        async with self._asking.aws.client("resourcegroupstaggingapi", access) as client:
            return await client.get_resources(ResourcesPerPage=1)


def _one_query(owner: str) -> dict[str, Any]:
    metric = {"Namespace": NAMESPACE, "MetricName": "Probe"}
    query: dict[str, Any] = {"Id": "q0", "MetricStat": {"Metric": metric, "Period": 60, "Stat": "Sum"}}
    return query | ({"AccountId": owner} if owner else {})
