"""A simulated AWS over HTTP: CloudWatch and STS, for trying things out and for sizing before paying.

* It speaks CloudWatch's `json` and `smithy-rpc-v2-cbor`, and STS's `query` protocol, on one port.
* Answers are `workers.simulated`'s, computed as of the `Date` header's second (a page series: of its first page's).
* The account comes from the access key id (AssumeRole hands out keys that carry it), the region from the credential
  scope. Signatures are not checked. Keys that AWS never made belong to the world's first account.
* Quotas are token buckets per account, region and API, as AWS's.
* `GET /billing` counts what AWS would bill; `POST /faults` makes it misbehave (`workers.faults`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from hashlib import blake2b
from typing import Any, Final
from uuid import uuid4
from xml.sax.saxutils import escape

import cbor2
import orjson
import structlog
from aiohttp import web

from ingest.clock import Clock, SystemClock
from ingest.errors import Fatal
from workers.faults import Asked, Faults, happens, spoil_results
from workers.simulated import AwsError, Page, get_metric_data, list_metrics, parse_data_request
from workers.world import Truth

LIST_CALLS_PER_S: Final = 25.0
DATAPOINTS_PER_S: Final = 180_000.0
"""Where StartTime is within three hours; else the next."""
OLD_DATAPOINTS_PER_S: Final = 396_000.0

_BODY_BYTES_MAX: Final = 4 << 20
_PREFIX = "GraniteServiceVersion20100801"
_CREDENTIAL = re.compile(r"Credential=([A-Za-z0-9]+)/\d+/([a-z0-9-]+)/")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::(\d{12}):role/(?:[\w+=,.@/-]*/)?([\w+=,.@-]+)")
_KEY = re.compile(r"A[KS]IA(\d{12})[A-Z0-9]*")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Caller:
    account: str
    region: str
    arn: str


@dataclass(slots=True)
class Bucket:
    """A token bucket with one second's worth of burst."""

    level: float
    at_s: float

    def take(self, amount: float, per_s: float, now_s: float) -> bool:
        self.level = min(per_s, self.level + (now_s - self.at_s) * per_s)
        self.at_s = now_s
        if amount > self.level:
            return False
        self.level -= amount
        return True


@dataclass(slots=True)
class Bill:
    """What one account is charged for, and what it was refused. Calls and throttles by region, then by API."""

    metrics_requested: int = 0
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    throttled: dict[str, dict[str, int]] = field(default_factory=dict)

    @staticmethod
    def add(counts: dict[str, dict[str, int]], region: str, api: str) -> None:
        of_region = counts.setdefault(region, {})
        of_region[api] = of_region.get(api, 0) + 1


# --- protocols ------------------------------------------------------------------------------------------------


def _json_body(page: dict[str, Any]) -> bytes:
    return orjson.dumps(page)


def _cbor_body(page: dict[str, Any]) -> bytes:
    """Timestamps travel as tag 1, seconds since the epoch."""
    results = page.get("MetricDataResults")
    if results is not None:
        tagged = [r | {"Timestamps": [cbor2.CBORTag(1, t) for t in r["Timestamps"]]} for r in results]
        page = page | {"MetricDataResults": tagged}
    return cbor2.dumps(page)


@dataclass(frozen=True, slots=True)
class Protocol:
    loads: Callable[[bytes], Any]
    dumps: Callable[[dict[str, Any]], bytes]
    headers: dict[str, str]


_JSON = Protocol(orjson.loads, _json_body, {"Content-Type": "application/x-amz-json-1.0"})
_CBOR = Protocol(
    cbor2.loads, _cbor_body, {"Content-Type": "application/cbor", "smithy-protocol": "rpc-v2-cbor"}
)


class Simulator:
    """A running simulated AWS; `start` makes one. `faults` may be replaced at any time."""

    def __init__(
        self,
        truth: Truth,
        clock: Clock,
        faults: Faults,
        external_id: str,
        calls_per_s: float,
        bill_pages: bool,
        credential_clock: Clock,
    ) -> None:
        self.truth = truth
        self.faults = faults
        self.url = ""
        self._clock = clock
        self._credential_clock = credential_clock
        self._external_id = external_id
        self._calls_per_s = calls_per_s
        self._bill_pages = bill_pages
        self._asked = Asked()
        self._bills = {account: Bill() for account in truth.accounts}
        self._buckets: dict[tuple[str, str, str], Bucket] = {}
        self._runner: web.AppRunner | None = None

    def billing(self) -> dict[str, Any]:
        """What `GET /billing` gives: by account metrics requested of GetMetricData, calls and throttles by region and API."""
        return {
            "accounts": {
                account: {
                    "metrics_requested": bill.metrics_requested,
                    "calls": bill.calls,
                    "throttled": bill.throttled,
                }
                for account, bill in self._bills.items()
            }
        }

    async def close(self) -> None:
        """Stop listening, and drop the connections after two seconds at the latest."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _listen(self, host: str, port: int) -> None:
        app = web.Application(client_max_size=_BODY_BYTES_MAX)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/billing", self._billing)
        app.router.add_get("/faults", self._faults)
        app.router.add_post("/faults", self._faults)
        app.router.add_post("/", self._root)
        app.router.add_post(f"/service/{_PREFIX}/operation/{{operation}}", self._cbor)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        address = self._runner.addresses[0]
        self.url = f"http://{address[0]}:{address[1]}"

    # --- what is not AWS ---

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _billing(self, _: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(self.billing()), content_type="application/json")

    async def _faults(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            try:
                self.faults = Faults.parse(orjson.loads(await request.read() or b"{}"))
            except (ValueError, AttributeError) as e:
                return web.Response(status=400, text=f"{e}\n")
            log.info("simulator_faults_set", **self.faults.as_json())
        return web.Response(body=orjson.dumps(self.faults.as_json()), content_type="application/json")

    # --- CloudWatch ---

    async def _root(self, request: web.Request) -> web.Response:
        target = request.headers.get("X-Amz-Target", "")
        if target:
            service, _, operation = target.partition(".")
            return await self._cloudwatch(request, operation if service == _PREFIX else target, _JSON)
        return await self._sts(request)

    async def _cbor(self, request: web.Request) -> web.Response:
        return await self._cloudwatch(request, request.match_info["operation"], _CBOR)

    async def _cloudwatch(self, request: web.Request, operation: str, protocol: Protocol) -> web.Response:
        raw = await request.read()
        faults = self.faults
        if faults.latency_ms:
            await self._clock.sleep(faults.latency_ms / 1000)
        now_s = self._clock.now_s()
        headers = protocol.headers | _headers(now_s)
        try:
            caller = self._caller(request)
            what = blake2b(raw, key=f"{caller.account} {caller.region} {operation}".encode()[:64]).digest()
            attempt = self._asked.count(what)
            self._refuse(caller, operation, what, attempt)
            try:
                body = protocol.loads(raw or b"{}")
            except ValueError as e:
                raise AwsError("SerializationException", f"the body is not readable: {e}") from e
            answer = self._answer(caller, operation, body, now_s, what, attempt)
            encoded = protocol.dumps(answer)
        except AwsError as e:
            if e.query_code:
                headers["x-amzn-query-error"] = f"{e.query_code};{'Sender' if e.status < 500 else 'Receiver'}"
            encoded = protocol.dumps({"__type": e.code, "message": e.message})
            return web.Response(status=e.status, body=encoded, headers=headers)
        if happens(faults.malformed_share, faults.seed, "malformed", what, attempt):
            encoded = encoded[: len(encoded) // 2]
        if happens(faults.reset_share, faults.seed, "reset", what, attempt) and request.transport:
            request.transport.abort()
        return web.Response(body=encoded, headers=headers)

    def _refuse(self, caller: Caller, operation: str, what: bytes, attempt: int) -> None:
        """Raise what is refused before the request is looked at."""
        faults = self.faults
        if operation not in ("GetMetricData", "ListMetrics"):
            raise AwsError("UnknownOperationException", f"{operation} is not simulated", 404)
        if caller.account in faults.forbidden_accounts:
            raise AwsError(
                "AccessDeniedException",
                f"User: {caller.arn} is not authorized to perform: cloudwatch:{operation}",
                403,
                "AccessDenied",
            )
        calls_per_s = LIST_CALLS_PER_S if operation == "ListMetrics" else self._calls_per_s
        within = not self._calls_per_s or self._take(caller, operation, 1.0, calls_per_s)
        if not within or happens(faults.throttle_share, faults.seed, "throttle", what, attempt):
            raise self._throttled(caller, operation)
        if happens(faults.error_share, faults.seed, "error", what, attempt):
            raise AwsError("InternalServiceFault", "an internal error", 500, "InternalServiceError")

    def _answer(
        self, caller: Caller, operation: str, body: Any, now_s: int, what: bytes, attempt: int
    ) -> dict[str, Any]:
        if not isinstance(body, dict):
            raise AwsError("SerializationException", "the body is not a structure")
        bill = self._bills[caller.account]
        if operation == "ListMetrics":
            page = list_metrics(self.truth, caller.account, caller.region, body, now_s)
            Bill.add(bill.calls, self._region(caller), operation)
            return _output("Metrics", page)
        asked = parse_data_request(body)
        recent = now_s - asked.start_s <= 3 * 3600
        datapoints_per_s = DATAPOINTS_PER_S if recent else OLD_DATAPOINTS_PER_S
        if self._calls_per_s and not self._take(caller, "datapoints", asked.datapoints(), datapoints_per_s):
            raise self._throttled(caller, operation)
        page = get_metric_data(self.truth, caller.account, caller.region, asked, now_s)
        Bill.add(bill.calls, self._region(caller), operation)
        if self._bill_pages or not asked.token:
            bill.metrics_requested += len(asked.queries)
        faults = self.faults
        if faults.of_results and not asked.token:
            scope = f"{caller.account}/{caller.region} {asked.start_s} {asked.end_s}"
            questions = {q.id: q.question for q in asked.queries}
            page = Page(spoil_results(faults, self._asked, scope, page.items, questions), page.next_token)
        if page.next_token and happens(faults.token_loop_share, faults.seed, "loop", what, attempt):
            page = Page(page.items, asked.token or page.next_token)
        return _output("MetricDataResults", page)

    def _caller(self, request: web.Request) -> Caller:
        """Who calls, from the Authorization header. Raises AwsError, 403, for nobody, strangers and expired keys."""
        found = _CREDENTIAL.search(request.headers.get("Authorization", ""))
        if not found:
            raise AwsError(
                "MissingAuthenticationTokenException", "Request is missing Authentication Token", 403
            )
        key, region = found.groups()
        carried = _KEY.fullmatch(key)
        account = carried[1] if carried else self.truth.accounts[0]
        if account not in self._bills:
            raise AwsError(
                "UnrecognizedClientException", "The security token included in the request is invalid.", 403
            )
        if not key.startswith("ASIA"):
            return Caller(account, region, f"arn:aws:iam::{account}:user/ambient")
        try:
            of, role, name, expires_s = orjson.loads(
                bytes.fromhex(request.headers.get("X-Amz-Security-Token", ""))
            )
        except ValueError:
            of = ""
        if of != account:
            raise AwsError(
                "UnrecognizedClientException", "The security token included in the request is invalid.", 403
            )
        if expires_s <= self._credential_clock.now_s():
            raise AwsError(
                "ExpiredTokenException",
                "The security token included in the request is expired",
                403,
                "ExpiredToken",
            )
        return Caller(account, region, f"arn:aws:sts::{account}:assumed-role/{role}/{name}")

    def _take(self, caller: Caller, what: str, amount: float, per_s: float) -> bool:
        now_s = self._clock.monotonic_s()
        bucket = self._buckets.setdefault(
            (caller.account, self._region(caller), what), Bucket(max(1.0, per_s), now_s)
        )
        return bucket.take(amount, max(1.0, per_s), now_s)

    def _throttled(self, caller: Caller, operation: str) -> AwsError:
        Bill.add(self._bills[caller.account].throttled, self._region(caller), operation)
        return AwsError("ThrottlingException", "Rate exceeded")

    def _region(self, caller: Caller) -> str:
        """The region for counting: those that the world does not know are one, so that the counts stay few."""
        return caller.region if caller.region in self.truth.regions else "other"

    # --- STS ---

    async def _sts(self, request: web.Request) -> web.Response:
        form = await request.post()
        action = str(form.get("Action", ""))
        if self.faults.latency_ms:
            await self._clock.sleep(self.faults.latency_ms / 1000)
        headers = {"Content-Type": "text/xml"} | _headers(self._clock.now_s())
        try:
            caller = self._caller(request)
            if action == "AssumeRole":
                result = self._assume_role(caller, {k: str(v) for k, v in form.items()})
            elif action == "GetCallerIdentity":
                user = f"AROA{caller.account}"
                result = {"Arn": caller.arn, "UserId": user, "Account": caller.account}
            else:
                raise AwsError("InvalidAction", f"{action or 'a request without Action'} is not simulated")
        except AwsError as e:
            error = {"Error": {"Type": "Sender", "Code": e.code, "Message": e.message}}
            return web.Response(status=e.status, text=_xml("ErrorResponse", error), headers=headers)
        Bill.add(self._bills[caller.account].calls, self._region(caller), action)
        return web.Response(text=_xml(f"{action}Response", {f"{action}Result": result}), headers=headers)

    def _assume_role(self, caller: Caller, form: dict[str, str]) -> dict[str, Any]:
        arn, name = form.get("RoleArn", ""), form.get("RoleSessionName", "")
        role = _ROLE.fullmatch(arn)
        if not role or not re.fullmatch(r"[\w+=,.@-]{2,64}", name):
            raise AwsError("ValidationError", f"RoleArn {arn!r} or RoleSessionName {name!r} is not valid")
        account = role[1]
        if (
            account not in self._bills
            or account in self.faults.denied_roles
            or (self._external_id and form.get("ExternalId") != self._external_id)
        ):
            raise AwsError(
                "AccessDenied",
                f"User: {caller.arn} is not authorized to perform: sts:AssumeRole on resource: {arn}",
                403,
            )
        duration = form.get("DurationSeconds", "3600")
        if not duration.isdecimal() or not 900 <= int(duration) <= 43_200:
            raise AwsError("ValidationError", f"DurationSeconds {duration} is not in 900..43200")
        expires_s = self._credential_clock.now_s() + int(duration)
        session = orjson.dumps([account, role[2], name, expires_s])
        return {
            "Credentials": {
                "AccessKeyId": f"ASIA{account}{blake2b(session, digest_size=2).hexdigest().upper()}",
                "SecretAccessKey": blake2b(session, digest_size=20).hexdigest(),
                "SessionToken": session.hex(),
                "Expiration": datetime.fromtimestamp(expires_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            },
            "AssumedRoleUser": {
                "AssumedRoleId": f"AROA{account}:{name}",
                "Arn": f"arn:aws:sts::{account}:assumed-role/{role[2]}/{name}",
            },
        }


def _headers(now_s: int) -> dict[str, str]:
    return {"Date": formatdate(now_s, usegmt=True), "x-amzn-RequestId": str(uuid4())}


def _output(name: str, page: Page) -> dict[str, Any]:
    return {name: page.items} | ({"NextToken": page.next_token} if page.next_token else {})


def _xml(root: str, content: dict[str, Any]) -> str:
    def element(name: str, value: Any) -> str:
        inner = "".join(element(k, v) for k, v in value.items()) if isinstance(value, dict) else escape(value)
        return f"<{name}>{inner}</{name}>"

    inner = "".join(element(k, v) for k, v in content.items())
    inner += element("ResponseMetadata", {"RequestId": str(uuid4())})
    return f'<{root} xmlns="https://sts.amazonaws.com/doc/2011-06-15/">{inner}</{root}>'


async def start(
    truth: Truth,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    clock: Clock | None = None,
    faults: Faults | None = None,
    external_id: str = "",
    calls_per_s: float = 50.0,
    bill_pages: bool = False,
    credential_clock: Clock | None = None,
) -> Simulator:
    """Start a simulated AWS in this event loop.

    Args:
        port: 0 takes a free one; see `Simulator.url`.
        clock: Query time, the `Date` header, quotas and latency.
        external_id: Where given, AssumeRole wants it.
        calls_per_s: GetMetricData's quota per account and region; 0 lifts every quota.
        bill_pages: Whether continuation pages are billed again (AWS does not say; the default is once).
        credential_clock: What credentials expire by: the machine's own time, as the SDKs see it, even
            where `clock` replays the past.

    Raises Fatal where the address cannot be had.
    """
    simulator = Simulator(
        truth,
        clock or SystemClock(),
        faults or Faults(),
        external_id,
        calls_per_s,
        bill_pages,
        credential_clock or SystemClock(),
    )
    try:
        await simulator._listen(host, port)
    except OSError as e:
        await simulator.close()
        raise Fatal(f"simulator {host}:{port}", f"cannot listen: {e}", "choose another --port") from e
    return simulator
