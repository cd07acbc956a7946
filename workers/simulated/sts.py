"""Who calls, and as whom: credentials, AssumeRole and GetCallerIdentity of the simulated AWS. Pure.

An access key id says whose it is: AKIA or ASIA and the account's 12 digits. AssumeRole hands out such keys; its session token carries
the account, the role, the session's name, the time at which it expires and a number, unsigned, for nothing here is secret. A key that
AWS never made belongs to the first account, so that any environment's credentials do. Signatures are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from ingest.clock import rfc3339
from workers.simulated.requests import AwsError

_CREDENTIAL = re.compile(r"Credential=([A-Za-z0-9_-]+)/\d+/([a-z0-9-]+)/")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::(\d{12}):role/(?:[\w+=,.@/-]*/)?([\w+=,.@-]+)")
_SESSION_NAME = re.compile(r"[\w+=,.@-]{2,64}")
_KEY = re.compile(r"A[KS]IA(\d{12})[A-Z0-9]*")


@dataclass(frozen=True, slots=True)
class Caller:
    account: str
    region: str
    arn: str
    session: str = ""
    """The access key of an assumed role."""


def caller_of(headers: Mapping[str, str], accounts: Collection[str], ambient: str, now_s: int) -> Caller:
    """Who signed a request, and for which region; keys that AWS never made are the account `ambient`'s. Raises AwsError, 403, for nobody, for strangers and for expired keys."""
    found = _CREDENTIAL.search(headers.get("Authorization", ""))
    if not found:
        raise AwsError("MissingAuthenticationTokenException", "Request is missing Authentication Token", 403)
    key, region = found.groups()
    carried = _KEY.fullmatch(key)
    account = carried[1] if carried else ambient
    if account not in accounts:
        raise unrecognized()
    if not (carried and key.startswith("ASIA")):
        return Caller(account, region, f"arn:aws:iam::{account}:user/ambient")
    try:
        of, role, name, expires_s, _ = orjson.loads(bytes.fromhex(headers.get("X-Amz-Security-Token", "")))
    except ValueError as e:
        raise unrecognized() from e
    if of != account:
        raise unrecognized()
    if expires_s <= now_s:
        raise expired()
    return Caller(account, region, f"arn:aws:sts::{account}:assumed-role/{role}/{name}", key)


def expired() -> AwsError:
    """What AWS says of credentials that have expired."""
    message = "The security token included in the request is expired"
    return AwsError("ExpiredTokenException", message, 403, "ExpiredToken")


def unrecognized() -> AwsError:
    """What AWS says of credentials that it does not know, and of all in a region that the account has not enabled."""
    message = "The security token included in the request is invalid."
    return AwsError("UnrecognizedClientException", message, 403, "InvalidClientTokenId")


def answer(
    caller: Caller,
    form: Mapping[str, str],
    assumable: Collection[str],
    external_id: str,
    now_s: int,
    serial: int,
) -> dict[str, Any]:
    """What STS answers, as the content of its result element. `serial` makes sessions of one second differ. Raises AwsError."""
    action = form.get("Action", "")
    if action == "AssumeRole":
        return _assume_role(caller, form, assumable, external_id, now_s, serial)
    if action == "GetCallerIdentity":
        return {"Arn": caller.arn, "UserId": f"AROA{caller.account}", "Account": caller.account}
    raise AwsError("InvalidAction", f"{action or 'a request without Action'} is not simulated")


def _assume_role(
    caller: Caller,
    form: Mapping[str, str],
    assumable: Collection[str],
    external_id: str,
    now_s: int,
    serial: int,
) -> dict[str, Any]:
    arn, name = form.get("RoleArn", ""), form.get("RoleSessionName", "")
    role = _ROLE.fullmatch(arn)
    if not role or not _SESSION_NAME.fullmatch(name):
        raise AwsError("ValidationError", f"RoleArn {arn!r} or RoleSessionName {name!r} is not valid")
    duration = form.get("DurationSeconds", "3600")
    if not duration.isdecimal() or not 900 <= int(duration) <= 43_200:
        raise AwsError("ValidationError", f"DurationSeconds {duration} is not in 900..43200")
    account = role[1]
    if account not in assumable or (external_id and form.get("ExternalId") != external_id):
        message = f"User: {caller.arn} is not authorized to perform: sts:AssumeRole on resource: {arn}"
        raise AwsError("AccessDenied", message, 403)
    expires_s = now_s + int(duration)
    session = orjson.dumps([account, role[2], name, expires_s, serial])
    return {
        "Credentials": {
            "AccessKeyId": f"ASIA{account}{blake2b(session, digest_size=2).hexdigest().upper()}",
            "SecretAccessKey": blake2b(session, digest_size=20).hexdigest(),
            "SessionToken": session.hex(),
            "Expiration": rfc3339(expires_s),
        },
        "AssumedRoleUser": {
            "AssumedRoleId": f"AROA{account}:{name}",
            "Arn": f"arn:aws:sts::{account}:assumed-role/{role[2]}/{name}",
        },
    }
