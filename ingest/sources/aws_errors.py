"""What an error of AWS, botocore, aiohttp or the network means here: the one place that knows their names."""

from __future__ import annotations

import json
from collections.abc import Iterable

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProxyConnectionError,
    SSLError,
)

from ingest.errors import HeadgateError, Rejected, Transient
from ingest.validate import without

_THROTTLES = frozenset(
    {
        "LimitExceeded",
        "LimitExceededException",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
_DENIALS = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "AuthFailure",
        "MissingAuthenticationToken",
        "NotAuthorized",
        "OptInRequired",
        "RegionDisabledException",
        "UnauthorizedOperation",
    }
)
_STRANGERS = frozenset({"InvalidClientTokenId", "UnrecognizedClientException"})
_EXPIRIES = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})


class Throttled(Transient):
    """The quota is used up: slower, then again."""


class Expired(Transient):
    """The credentials have expired: once more with new ones."""


class Denied(Rejected):
    """Not allowed, and asking again will not change it."""

    def __init__(self, where: str, what: str) -> None:
        self.said = what
        super().__init__(where, "forbidden", what)


def translate(error: Exception, where: str, secrets: Iterable[str] = ()) -> HeadgateError:
    """What a failure of botocore, aiohttp or the network means here.

    `secrets` were sent, and are in no error: AWS quotes the session token where a signature is wrong, and an ExternalId that it does not like.
    """
    if isinstance(error, HeadgateError):
        return error
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        message = without(str(error.response.get("Error", {}).get("Message", "")), secrets)[:300]
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        what = f"{code}: {message}" if message else code
        if code in _THROTTLES or status == 429:
            return Throttled(where, what)
        if code in _EXPIRIES:
            return Expired(where, what)
        if code in _STRANGERS:
            # AWS says the same of good credentials in a region that the account has not enabled.
            return Denied(where, f"{what} Or the region is not enabled in this account.")
        if code in _DENIALS or status in (401, 403):
            return Denied(where, what)
        if status >= 500 or not status:
            return Transient(where, what)
        return Rejected(where, "refused", what)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return Denied(where, f"{error}")
    # Connections refused, reset or timed out; answers that were cut off or do not parse. botocore wraps most of these, but
    # aiobotocore 3.10 reads the body outside the wrapper, so that aiohttp's own errors come through too.
    if isinstance(error, BotoCoreError | aiohttp.ClientError | OSError | TimeoutError | json.JSONDecodeError):
        return Transient(where, without(f"{type(error).__name__}: {error}", secrets)[:300].rstrip(": "))
    what = without(f"the answer was not understood: {type(error).__name__}: {error}", secrets)
    return Transient(where, what[:300])


def may_be_billed(error: BaseException) -> bool:
    """Whether a request that ended so may have been worked on, and so billed, although its answer was lost.

    Not what AWS refused (throttled, denied, invalid), nor what never left. Errors of ours are raised by whoever has read the answer.
    """
    if isinstance(error, HeadgateError):
        return False
    if isinstance(error, ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status >= 500 and not isinstance(translate(error, ""), Throttled)
    if isinstance(error, EndpointConnectionError):
        # aiobotocore says so of a connection that was never made, and of one that broke while it was used.
        return not isinstance(error.kwargs.get("error"), aiohttp.ClientConnectorError)
    if isinstance(error, ConnectTimeoutError | ProxyConnectionError | SSLError):
        return False
    return isinstance(error, HTTPClientError) or not isinstance(error, BotoCoreError)
