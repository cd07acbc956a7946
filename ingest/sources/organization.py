"""The accounts of an AWS Organization, by unit and tag: a whole list, or an error.

Guarantees:

* *A part is never taken for the whole*: all pages of all units, and of all tags where tags are asked for, or nothing is returned;
* suspended and closed accounts are left out;
* Organizations' quotas are low and all of an organization's callers share them: requests are spaced, tags are read only where they are
  asked for, and kept for `TAGS_KEPT_S`;
* pages, units and accounts are bounded; what is beyond is an error, not cut off.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ingest.clock import Clock
from ingest.errors import Rejected, Transient
from ingest.sources.aws import Access, Aws, Tally
from shard_config.model import Account, Config, Organization
from shard_config.organization import ACCOUNTS_MAX, Listing, Member, question_of

CALLS_PER_S = 4.0
UNITS_MAX = 2_000
"""As many as AWS lets an organization have."""
PAGES_MAX = 2_000
"""Of one list; AWS gives 20 a page."""
TAGS_KEPT_S = 3600.0
LISTING_S = 900.0
"""The most that a whole listing may take: the tags of 3,000 accounts."""
_WHERE = "aws organizations"
_REGION = "us-east-1"


@dataclass(slots=True)
class TagCache:
    """Tags by account, with the monotonic time from which on they are read again."""

    known: dict[str, tuple[float, Mapping[str, str]]] = field(default_factory=dict)


async def list_organization(config: Config, clock: Clock, tags: TagCache) -> Listing:
    """The organization's active accounts that its section asks for. Raises Transient, or Rejected (Denied)."""
    organization = config.organization
    if organization is None:
        raise Rejected(_WHERE, "not_configured", "there is no section organization")
    deadline_s = clock.monotonic_s() + LISTING_S
    # The template is that of the accounts which are listed, not of who lists them.
    ambient = config.model_copy(update={"aws": config.aws.model_copy(update={"role_template": ""})})
    aws = Aws(ambient, clock)
    try:
        asking = await _Asking.of(aws, organization, deadline_s)
        found = await _accounts(asking, organization)
        for account in organization.exclude:
            found.pop(account, None)
        if organization.tags:
            found = await _tagged(asking, organization, found, tags, clock.monotonic_s())
        if len(found) > ACCOUNTS_MAX:
            raise Rejected(_WHERE, "too_large", f"more than {ACCOUNTS_MAX} accounts")
        accounts = tuple(Member(id=account, name=found[account]) for account in sorted(found))
        return Listing(question=question_of(organization), listed_at_s=clock.now_s(), accounts=accounts)
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise Transient(_WHERE, f"an answer was not understood: {type(error).__name__}: {error}") from error
    finally:
        await aws.close()


@dataclass(frozen=True, slots=True)
class _Asking:
    """Organizations, as asked by one account until a deadline."""

    aws: Aws
    caller: Account
    region: str
    deadline_s: float
    tally: Tally

    @classmethod
    async def of(cls, aws: Aws, organization: Organization, deadline_s: float) -> _Asking:
        # botocore finds the one endpoint of a partition from any of its regions.
        region = organization.regions[0] if organization.regions else _REGION
        tally = Tally()
        if role := organization.role_arn:
            account, external_id = role.split(":")[4], organization.external_id
        else:
            account, external_id = await aws.own_account(region, deadline_s, tally), None
        caller = Account(
            id=account,
            regions=(region,),
            services=("organizations",),
            role_arn=role,
            external_id=external_id,
        )
        return cls(aws, caller, region, deadline_s, tally)

    async def pages(self, api: str, operation: str, key: str, **asked: str) -> AsyncIterator[dict[str, Any]]:
        """What is listed under `key`, page by page. Raises Transient or Rejected where not all of it comes."""
        token = ""
        seen: set[str] = set()
        for _ in range(PAGES_MAX):
            request = {**asked, **({"NextToken": token} if token else {})}

            async def send(access: Access, request: dict[str, str] = request) -> dict[str, Any]:
                async with self.aws.client("organizations", access) as client:
                    page: dict[str, Any] = await getattr(client, operation)(**request)
                    return page

            page = await self.aws.call(
                self.caller, self.region, api, send,
                cost_s=1 / CALLS_PER_S, deadline_s=self.deadline_s, tally=self.tally,
            )  # fmt: skip
            for one in page[key]:
                yield one
            token = page.get("NextToken") or ""
            if not token:
                return
            if token in seen:
                break
            seen.add(token)
        raise Transient(f"{_WHERE} {api}", "its pages do not end")


async def _accounts(asking: _Asking, organization: Organization) -> dict[str, str]:
    """Names of active accounts, by id."""
    if not organization.units:
        return {
            one["Id"]: str(one.get("Name", ""))
            async for one in asking.pages("ListAccounts", "list_accounts", "Accounts")
            if _is_active(one)
        }
    found: dict[str, str] = {}
    open_units, known = list(organization.units), set(organization.units)
    while open_units:
        unit = open_units.pop()
        async for one in asking.pages(
            "ListAccountsForParent", "list_accounts_for_parent", "Accounts", ParentId=unit
        ):
            if _is_active(one):
                found[one["Id"]] = str(one.get("Name", ""))
        async for below in asking.pages(
            "ListOrganizationalUnitsForParent",
            "list_organizational_units_for_parent",
            "OrganizationalUnits",
            ParentId=unit,
        ):
            if below["Id"] not in known:
                known.add(below["Id"])
                open_units.append(below["Id"])
        if len(known) > UNITS_MAX:
            raise Rejected(_WHERE, "too_large", f"more than {UNITS_MAX} units")
    return found


async def _tagged(
    asking: _Asking, organization: Organization, found: Mapping[str, str], cache: TagCache, now_s: float
) -> dict[str, str]:
    """Those whose tags match all of the section's patterns."""
    cache.known = {
        account: (until_s, tags)
        for account, (until_s, tags) in cache.known.items()
        if account in found and until_s > now_s
    }
    for account in found:
        if account not in cache.known:
            listed = asking.pages("ListTagsForResource", "list_tags_for_resource", "Tags", ResourceId=account)
            tags = {tag["Key"]: tag["Value"] async for tag in listed}
            # What is known already is kept where a later account fails: the next try asks for the rest.
            cache.known[account] = now_s + TAGS_KEPT_S, tags
    patterns = {key: re.compile(pattern) for key, pattern in organization.tags.items()}
    return {
        account: name
        for account, name in found.items()
        if all(
            (value := cache.known[account][1].get(key)) is not None and pattern.fullmatch(value)
            for key, pattern in patterns.items()
        )
    }


def _is_active(account: Mapping[str, Any]) -> bool:
    """By `State`; `Status` is its predecessor, which AWS no longer answers since September 2026."""
    return (account.get("State") or account.get("Status")) == "ACTIVE"
