"""AWS at arm's length: credentials, clients, quotas and errors. Nothing above this module sees a botocore exception.

Guarantees:

* one aiobotocore session; clients are kept per (account, region) in a bounded LRU and closed when their last user is done;
* one credential refresh in flight per account, however many looks wait for it, and a failed one is shared for a while;
* nobody gets credentials for an account before `GetCallerIdentity` has named that account;
* a request goes out only when the quota of its (account, region, API) allows, for all tasks of this process together;
* a call ends within its attempts and its deadline, and raises `Transient` (`Throttled`, `Expired`) or `Denied`/`Rejected`.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import structlog
from aiobotocore.config import AioConfig
from botocore.utils import parse_timestamp

from ingest.aws_session import new_session
from ingest.clock import Clock
from ingest.errors import HeadgateError, Transient
from ingest.sources.aws_errors import Denied, Expired, Throttled, may_be_billed, translate
from ingest.sources.limiter import Limiter
from ingest.validate import without
from shard_config.model import Account, Config

log = structlog.get_logger()

T = TypeVar("T")

BACKOFF_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.0, 3.0)
"""Between the attempts of one request, so eight in all: with half of all requests throttled, one in 256 fails for good."""
CLIENTS_MAX = 256
CONNECTIONS_MAX = 8
"""Per client: a look has at most four calls in flight, and a live and a backlog look may meet."""
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
LIFETIME_S = 3600
"""Of assumed roles: asked for, and so known without comparing our wall clock with AWS's. Every role allows an hour."""
REFRESH_MARGIN_S = 300
"""Credentials are renewed this long before they expire."""
FAILURE_KEPT_S = 5.0
"""So long a failed refresh answers for those who waited: fifty looks make one request, not fifty."""
STS_CALLS_PER_S = 50.0
BILLED_BY_REQUEST = "ListMetrics"


@dataclass(slots=True)
class Tally:
    """What a look has sent so far: requests by API name, retries included, and the metrics that AWS bills for.

    Of `BILLED_BY_REQUEST`, those that were answered: AWS bills no others.
    `metrics_in_doubt` were asked for in requests whose answer was lost: billed or not, only AWS knows.
    """

    requests: Counter[str] = field(default_factory=Counter)
    metrics_billed: int = 0
    metrics_in_doubt: int = 0


@dataclass(frozen=True, slots=True)
class Credentials:
    account: str
    access_key: str
    secret_key: str = field(repr=False)
    token: str = field(repr=False)
    renew_s: float
    """Monotonic: from then on they are renewed before use."""


@dataclass(frozen=True, slots=True)
class Access:
    """A verified identity in a region: what a request is signed with."""

    region: str
    credentials: Credentials


@dataclass(frozen=True, slots=True)
class _Request:
    key: tuple[str, str, str]
    cost_s: float
    deadline_s: float
    tally: Tally
    points_cost_s: float = 0.0
    metrics: int = 0
    secret: str = field(default="", repr=False)
    """Sent beside the credentials, and quoted in no error."""

    @property
    def api(self) -> str:
        return self.key[2]

    @property
    def where(self) -> str:
        account, region, api = self.key
        return f"aws {api} {account}/{region}"


@dataclass(slots=True, eq=False)
class _Lease:
    client: Any
    access_key: str
    users: int = 0
    retired: bool = False


def epoch_s(value: Any) -> float:
    """botocore's timestamps as seconds: making 2,500 datetimes a call is a third of its parser's time, and we want none."""
    return value if isinstance(value, int | float) else float(parse_timestamp(value).timestamp())


class Aws:
    """All of AWS for one process. `close` it; after that nothing works."""

    def __init__(self, config: Config, clock: Clock, clients_max: int = CLIENTS_MAX) -> None:
        self._config = config.aws
        self._clock = clock
        self.limiter = Limiter(clock)
        self._session = new_session()
        self._session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=epoch_s)
        # One attempt: botocore's own retries would go round the limiter, the deadline and the tally.
        self._client_config = AioConfig(
            max_pool_connections=CONNECTIONS_MAX,
            parameter_validation=False,
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
        )
        self._clients_max = clients_max
        self._clients: OrderedDict[tuple[str, str, str], _Lease] = OrderedDict()
        self._creating = asyncio.Lock()
        self._credentials: dict[str, Credentials] = {}
        self._verified: dict[str, str] = {}
        self.strangers: dict[str, float] = {}
        """Accounts whose credentials are another account's, and when that was seen last (monotonic)."""
        self._refreshing: dict[str, asyncio.Lock] = {}
        self._failures: dict[str, tuple[float, HeadgateError]] = {}

    @property
    def verify(self) -> bool | str:
        """How botocore would check certificates: a file of authorities, or those that come with it."""
        bundle = self._session.get_config_variable("ca_bundle")
        return str(bundle or os.environ.get("REQUESTS_CA_BUNDLE", "")) or True

    async def close(self) -> None:
        """Close all clients, those in use too."""
        leases = list(self._clients.values())
        self._clients.clear()
        for lease in leases:
            lease.retired = True
            await lease.client.close()

    # --- requests ---------------------------------------------------------------------------------------------

    async def call(
        self,
        account: Account,
        region: str,
        api: str,
        send: Callable[[Access], Awaitable[T]],
        *,
        cost_s: float,
        deadline_s: float,
        tally: Tally,
        points_cost_s: float = 0.0,
        metrics: int = 0,
    ) -> T:
        """One request with its retries: `send` makes it, what it raises is translated.

        `account` is the one that is asked: its role, its quota, its bill. `cost_s` and `points_cost_s` are what the request takes of
        the quotas of calls and of datapoints, in seconds. `metrics` are billed for it: each attempt that may have been is counted as in
        doubt (what was answered, `send` counts). Raises Transient, Denied or Rejected.
        """
        key = account.id, region, api
        request = _Request(key, cost_s, deadline_s, tally, points_cost_s, metrics)
        access = Access(region, await self.credentials(account, deadline_s, tally))
        try:
            return await self._attempts(request, access, send)
        except Expired:
            self._forget(access.credentials)
        access = Access(region, await self.credentials(account, deadline_s, tally))
        try:
            return await self._attempts(request, access, send)
        except Expired as expired:
            raise Denied(
                expired.where, f"new credentials are refused as expired: {expired.what}"
            ) from expired

    async def _attempts(self, request: _Request, access: Access, send: Callable[[Access], Awaitable[T]]) -> T:
        """Until it works, fails for good, or attempts or time run out. Expired credentials are for the caller."""
        for pause_s in (*BACKOFF_S, None):
            await self.limiter.acquire(request.key, request.cost_s, request.deadline_s, request.points_cost_s)
            by_request = request.api == BILLED_BY_REQUEST
            if not by_request:
                request.tally.requests[request.api] += 1
            try:
                async with asyncio.timeout(max(0.0, request.deadline_s - self._clock.monotonic_s())):
                    answer = await send(access)
                if by_request:
                    request.tally.requests[request.api] += 1
                return answer
            except BaseException as error:
                if by_request and isinstance(
                    error, HeadgateError
                ):  # whoever read the answer made nothing of it
                    request.tally.requests[request.api] += 1
                if may_be_billed(error):
                    request.tally.metrics_in_doubt += request.metrics
                if not isinstance(error, Exception):
                    raise
                secrets = access.credentials.secret_key, access.credentials.token, request.secret
                failure = translate(error, request.where, secrets)
                if isinstance(failure, Throttled):
                    self.limiter.throttled(request.key)
                futile = isinstance(failure, Expired) or not isinstance(failure, Transient) or pause_s is None
                if futile or self._clock.monotonic_s() + (pause_s or 0) >= request.deadline_s:
                    told = without(str(error), secrets) != str(error)
                    raise failure from (None if told else error)
            # No jitter: the limiter spaces what comes back at the same moment.
            await self._clock.sleep(pause_s or 0)
        raise AssertionError("the last attempt returns or raises")

    @asynccontextmanager
    async def client(self, service: str, access: Access) -> AsyncIterator[Any]:
        """An aiobotocore client for this access, made or found; it stays open until the last user is done."""
        key = (access.credentials.account, access.region, service)
        async with self._creating:  # making one is 1.5 ms of CPU, so that in parallel it would be no quicker
            lease = self._clients.get(key)
            if lease is None or lease.access_key != access.credentials.access_key:
                client = await self._session.create_client(service, **self._options(access)).__aenter__()
                await self._retire(key)
                lease = self._clients[key] = _Lease(client, access.credentials.access_key)
            self._clients.move_to_end(key)
            lease.users += 1
            while len(self._clients) > self._clients_max:
                await self._retire(next(iter(self._clients)))
        try:
            yield lease.client
        finally:
            lease.users -= 1
            if lease.retired and not lease.users:
                await lease.client.close()

    async def _retire(self, key: tuple[str, str, str]) -> None:
        lease = self._clients.pop(key, None)
        if lease is not None:
            lease.retired = True
            if not lease.users:
                await lease.client.close()

    def _options(self, access: Access) -> dict[str, Any]:
        return {
            "region_name": access.region,
            "endpoint_url": self._config.endpoint_url or None,
            "aws_access_key_id": access.credentials.access_key,
            "aws_secret_access_key": access.credentials.secret_key,
            "aws_session_token": access.credentials.token or None,
            "config": self._client_config,
        }

    # --- credentials ------------------------------------------------------------------------------------------

    async def credentials(self, account: Account, deadline_s: float, tally: Tally) -> Credentials:
        """Valid credentials whose identity is verified. Raises Denied or Transient."""
        if known := self._unexpired(account.id):
            return known
        async with self._refreshing.setdefault(account.id, asyncio.Lock()):
            if known := self._unexpired(account.id):
                return known
            failure = self._recent_failure(account.id)
            if failure is None:
                try:
                    fresh = self._credentials[account.id] = await self._obtain(account, deadline_s, tally)
                    return fresh
                except HeadgateError as error:
                    log.warning("aws_credentials_refused", account=account.id, error=str(error))
                    failure = error
                    # What only this caller's deadline cut short says nothing to the others.
                    if isinstance(error, Denied) or self._clock.monotonic_s() + max(BACKOFF_S) < deadline_s:
                        self._failures[account.id] = (self._clock.monotonic_s() + FAILURE_KEPT_S, error)
            old = self._credentials.get(account.id)
            if (
                old is not None
                and isinstance(failure, Transient)
                and self._clock.monotonic_s() < old.renew_s + REFRESH_MARGIN_S
            ):
                return old  # STS is away, and these still hold for some minutes
            raise failure.with_traceback(None)

    def _recent_failure(self, account: str) -> HeadgateError | None:
        until_s, failure = self._failures.get(account, (float("-inf"), None))
        return failure if self._clock.monotonic_s() < until_s else None

    def _unexpired(self, account: str) -> Credentials | None:
        """What is kept for an account, while it need not be renewed."""
        known = self._credentials.get(account)
        return known if known is not None and known.renew_s > self._clock.monotonic_s() else None

    def forget(self, account: str) -> None:
        """Another role is configured for an account: the next request obtains its credentials, and verifies them."""
        for kept in (self._credentials, self._verified, self._failures, self.strangers):
            kept.pop(account, None)

    def _forget(self, used: Credentials) -> None:
        """AWS says that these have expired; if others are in place already, they stay."""
        if self._credentials.get(used.account) is used:
            del self._credentials[used.account]

    async def _obtain(self, account: Account, deadline_s: float, tally: Tally) -> Credentials:
        region = account.regions[0]
        role = account.role_arn or self._config.role_template.replace("{account}", account.id)
        found = await self._ambient(account.id)
        if role:
            asked_s = self._clock.monotonic_s()
            request: dict[str, Any] = {
                "RoleArn": role,
                "RoleSessionName": "headgate",
                "DurationSeconds": LIFETIME_S,
            }
            secret = account.external_id.get_secret_value() if account.external_id is not None else ""
            if secret:
                request["ExternalId"] = secret
            access = Access(region, replace(found, account=""))

            async def assume(access: Access) -> Credentials:
                async with self.client("sts", access) as sts:
                    given = (await sts.assume_role(**request))["Credentials"]
                renew_s = asked_s + LIFETIME_S - REFRESH_MARGIN_S
                keys = given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"]
                return Credentials(account.id, *keys, renew_s)

            found = await self._attempts(
                _Request(
                    (account.id, region, "AssumeRole"),
                    1 / STS_CALLS_PER_S,
                    deadline_s,
                    tally,
                    secret=secret,
                ),
                access,
                assume,
            )
        await self._verify(account, Access(region, found), deadline_s, tally)
        return found

    async def _verify(self, account: Account, access: Access, deadline_s: float, tally: Tally) -> None:
        """Data must never be labelled with an account that it is not from. Asked once per credentials."""
        if self._verified.get(account.id) == access.credentials.access_key:
            return
        request = _Request(
            (account.id, access.region, "GetCallerIdentity"), 1 / STS_CALLS_PER_S, deadline_s, tally
        )
        actual = await self._attempts(request, access, self._identity)
        if actual != account.id:
            self.strangers[account.id] = self._clock.monotonic_s()
            raise Denied(request.where, f"the credentials belong to account {actual}, not to {account.id}")
        self._verified[account.id] = access.credentials.access_key
        self.strangers.pop(account.id, None)

    async def _identity(self, access: Access) -> str:
        async with self._session.create_client("sts", **self._options(access)) as sts:
            return str((await sts.get_caller_identity())["Account"])

    async def own_account(self, region: str, deadline_s: float, tally: Tally) -> str:
        """The account that this process's own credentials are of. Raises Denied or Transient."""
        request = _Request(("own", region, "GetCallerIdentity"), 1 / STS_CALLS_PER_S, deadline_s, tally)
        return await self._attempts(request, Access(region, await self._ambient("")), self._identity)

    async def _ambient(self, account: str) -> Credentials:
        """This process's own credentials, from botocore's chain, looked up anew every few minutes."""
        if self._config.endpoint_url:
            # A simulated AWS wants some signature, not a true one; nobody should wait for EC2's metadata service for it.
            self._session.get_component("credential_provider").remove("iam-role")
        try:
            chain = await self._session.get_credentials()
            frozen = await chain.get_frozen_credentials() if chain is not None else None
        except Exception as error:
            raise translate(error, "aws ambient credentials") from error
        renew_s = self._clock.monotonic_s() + REFRESH_MARGIN_S
        if frozen is not None:
            return Credentials(account, frozen.access_key, frozen.secret_key, frozen.token or "", renew_s)
        if self._config.endpoint_url:
            return Credentials(account, "AKIASIMULATED", "simulated", "", renew_s)
        raise Denied("aws ambient credentials", "there are none: give this process a role, a profile or keys")
