"""The accounts of an AWS Organization: the list as it is shared, and how it joins a configuration. Pure."""

from __future__ import annotations

import json
from hashlib import blake2b

from pydantic import Field

from shard_config.fields import AccountId, Strict
from shard_config.model import Account, Config, Organization

ACCOUNTS_MAX = 20_000
"""AWS lets an organization have 10,000."""


class Member(Strict):
    """One active account of an organization."""

    id: AccountId
    name: str = ""


class Listing(Strict):
    """A whole listing, never a part of one; JSON in the archive."""

    question: str
    """`question_of` the organization that was asked about."""
    listed_at_s: int = Field(ge=0)
    accounts: tuple[Member, ...] = Field(max_length=ACCOUNTS_MAX)


def question_of(organization: Organization) -> str:
    """16 hexadecimal digits over what AWS is asked: another role, other units or tags make another list."""
    what = [
        organization.role_arn,
        sorted(organization.units),
        sorted(organization.tags.items()),
        sorted(organization.exclude),
    ]
    return blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()


def with_accounts(config: Config, found: Listing | None) -> Config:
    """The configuration with the organization's accounts behind its own.

    An account that stands in `accounts` is taken as it stands there, one in `exclude` is left out. Without an organization, or
    where nobody has listed it yet, the configuration as it is.
    """
    organization = config.organization
    if organization is None or found is None:
        return config
    known = {account.id for account in config.accounts} | set(organization.exclude)
    new = {member.id: member for member in found.accounts if member.id not in known}
    accounts = tuple(_account(organization, new[account]) for account in sorted(new))
    return config.model_copy(update={"accounts": config.accounts + accounts})


def _account(organization: Organization, member: Member) -> Account:
    return Account(
        id=member.id,
        alias=member.name,
        regions=organization.regions,
        services=organization.services,
        role_arn=organization.role_template.replace("{account}", member.id),
        external_id=organization.external_id,
        budget_usd_per_day=organization.budget_usd_per_day,
    )
