"""What is checked before the first billed call, and what to do about what is wrong. Pure.

* A finding is about one thing, and says so in one line; its remedy can be pasted.
* What could not be proved is said to be unproved: never taken for right, and no failure either.
* No secret in a finding: an ExternalId is spoken of, not quoted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ingest.errors import HeadgateError, Transient

ROLE: Final = "headgate"
"""As the shipped templates name the role in a target account."""


class State(StrEnum):
    OK = "ok"
    WRONG = "wrong"
    UNPROVED = "unproved"


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One check of one thing. `remedy` may have several lines."""

    part: str
    """aws, organization, s3, kafka or postgres."""
    subject: str
    """As 123456789012/eu-west-1, or a topic's name."""
    check: str
    """What was tried: an AWS action, or a few words."""
    state: State
    what: str = ""
    remedy: str = ""


def is_right(findings: Iterable[Finding]) -> bool:
    """False where anything is wrong. What is unproved is not."""
    return all(f.state is not State.WRONG for f in findings)


# --- policies to paste ----------------------------------------------------------------------------------------


def statement(*actions: str, resource: str | Sequence[str] = "*") -> str:
    """A policy's statement, as JSON on one line."""
    what = {"Effect": "Allow", "Action": sorted(actions), "Resource": resource}
    return json.dumps(what)


TARGET_ACTIONS: Final = ("cloudwatch:GetMetricData", "cloudwatch:ListMetrics")
TAG_ACTIONS: Final = ("tag:GetResources",)
ORGANIZATION_ACTIONS: Final = (
    "organizations:ListAccounts",
    "organizations:ListAccountsForParent",
    "organizations:ListOrganizationalUnitsForParent",
    "organizations:ListTagsForResource",
)

_OWNERS: Final = (
    ("service control policy", "a service control policy (SCP) denies it; it is changed in AWS Organizations, not in the account"),
    ("resource control policy", "a resource control policy (RCP) denies it; it is changed in AWS Organizations, not in the account"),
    ("permissions boundary", "the role's permissions boundary does not allow it; the boundary has to, besides the role's policies"),
    ("session policy", "the session's policy does not allow it; the role is assumed by something that narrows it"),
    ("VPC endpoint policy", "the policy of the VPC endpoint on the way does not allow it"),
    ("with an explicit deny", "a policy denies it explicitly; no further allow helps, that deny has to go"),
)  # fmt: skip
"""What AWS says of a denial, and who may change it; the first that is found."""

_CALLER: Final = re.compile(r"User: (arn:\S+)")
_ASSUMED: Final = re.compile(r"arn:(aws[a-z-]*):sts::(\d{12}):assumed-role/([^/]+)/.*")


def caller_of(text: str) -> str:
    """The principal to trust, of AWS's words of a denial; empty where they name none."""
    found = _CALLER.search(text)
    if found is None:
        return ""
    # A session's role is what a trust policy names; its path is not in the session's name.
    return _ASSUMED.sub(r"arn:\1:iam::\2:role/\3", found[1])


def _owner(text: str) -> str:
    return next((said for words, said in _OWNERS if words in text), "")


def trust_policy(principal: str, external_id: bool) -> str:
    """The trust policy of a target's role, as JSON on one line."""
    allow: dict[str, object] = {
        "Effect": "Allow",
        "Principal": {"AWS": principal or "<the exporter's role>"},
        "Action": "sts:AssumeRole",
    }
    if external_id:
        allow["Condition"] = {"StringEquals": {"sts:ExternalId": "<external_id of this account>"}}
    return json.dumps({"Version": "2012-10-17", "Statement": [allow]})


# --- remedies -------------------------------------------------------------------------------------------------

_REGION_OFF: Final = (
    "RegionDisabledException",
    "UnrecognizedClientException",
    "InvalidClientTokenId",
    "OptInRequired",
    "AuthFailure",
)


def remedy_of_identity(error: HeadgateError, account: str, role: str, external_id: bool) -> str:
    """What to do where no verified credentials of an account are to be had."""
    text = error.what
    if "RegionDisabledException" in text:
        return (
            "STS is not active in the account's first region: put an enabled region first, or enable this one"
        )
    if "belong to account" in text:
        return f"give the account a role_arn of its own, as arn:aws:iam::{account}:role/{ROLE}, or set aws.role_template"
    if "there are none" in text or "credentials" in error.where:
        return "give this process an identity: a role of its pod or instance, AWS_PROFILE, or keys in the environment"
    if "AssumeRole" not in error.where:
        return _remedy_of_weather(error)
    if owner := _owner(text):
        return owner
    if isinstance(error, Transient):
        return _remedy_of_weather(error)
    if "no identity-based policy allows" in text:
        return f"allow the exporter's own role: {statement('sts:AssumeRole', resource=role)}"
    sent = (
        "the ExternalId that was sent has to be the one of the trust policy (sts:ExternalId)"
        if external_id
        else "no ExternalId was sent: where the trust policy asks for one, set external_id"
    )
    return (
        f"AWS does not tell a missing role from an untrusting one. Is {role} there? Then {sent}; its trust policy: "
        f"{trust_policy(caller_of(text), external_id)} and the exporter's own role needs {statement('sts:AssumeRole', resource=role)}"
    )


def remedy_of_action(error: HeadgateError, action: str, account: str, region: str) -> str:
    """What to do where an account's role may not do something in a region, or could not be asked."""
    text = error.what
    if any(code in text for code in _REGION_OFF):
        return (
            f"{region} is not enabled for the account: aws account enable-region --account-id {account} "
            f"--region-name {region}, or take it out of the account's regions"
        )
    if owner := _owner(text):
        return owner
    if isinstance(error, Transient):
        return _remedy_of_weather(error)
    actions = TARGET_ACTIONS if action in TARGET_ACTIONS else (action,)
    return f"add to the role's policy: {statement(*actions)}"


def remedy_of_organization(error: HeadgateError, role: str) -> str:
    """What to do where the organization's accounts cannot be listed."""
    if isinstance(error, Transient):
        return _remedy_of_weather(error)
    who = role or "the coordinator's own role"
    return (
        "only the organization's management account or a delegated administrator may list accounts: "
        f"{who} has to be of one, trust the coordinator, and have {statement(*ORGANIZATION_ACTIONS)}"
    )


def _remedy_of_weather(error: HeadgateError) -> str:
    if "hrottl" in error.what or "Rate exceeded" in error.what:
        return "somebody else uses up the account's quota: try again, or give calls_per_s its true number"
    return "the network or AWS: is the endpoint reachable from here (egress, proxy, VPC endpoint)? Then try again"
