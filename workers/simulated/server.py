"""The simulated AWS as an HTTP server: who calls, what they may, what it costs them, and what goes wrong.

`workers.simulator.start` makes one. The answers themselves are the pure modules' beside this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from email.utils import formatdate
from hashlib import blake2b
from itertools import count
from typing import Any, Final

import orjson
import structlog
from aiohttp import web

from ingest.clock import Clock
from workers.simulated import inventory, organizations, sts, tagging
from workers.simulated.cloudwatch import Page, get_metric_data, list_metrics
from workers.simulated.faults import SPARED, Asked, Fate, Faults, Flood, fate_of, spoil_results
from workers.simulated.metering import Bill, Quotas
from workers.simulated.organizations import Organization
from workers.simulated.protocols import CBOR, JSON, JSON_1_1, Wire, answer_headers, xml
from workers.simulated.requests import AwsError, parse_data_request
from workers.simulated.resources import resources_of
from workers.simulated.sts import Caller
from workers.world import Metric, Truth, World

CALLS_PER_S: Final = 50.0
"""GetMetricData's quota of AWS, unless it was raised."""
LIST_CALLS_PER_S: Final = 25.0
DATAPOINTS_PER_S: Final = 180_000.0
"""Where StartTime is within three hours; else the next."""
OLD_DATAPOINTS_PER_S: Final = 396_000.0

_BODY_BYTES_MAX: Final = 4 << 20
_CLOUDWATCH: Final = "GraniteServiceVersion20100801"
_SERVICES: Final = {_CLOUDWATCH: "cloudwatch", organizations.TARGET: "organizations", tagging.TARGET: "tag"}
"""How policies call what the targets call otherwise."""
_ASKED: Final = {*_SERVICES.values(), *inventory.SERVICES}
_UNAVAILABLE: Final = "<html><body><h1>503 Service Unavailable</h1></body></html>"
_ENDLESS: Final = "endless-"
"""NextTokens that AWS would never give: `Faults.token_endless_share`."""

log = structlog.get_logger()


class Simulator:
    """A running simulated AWS; `start` makes one. `faults` may be replaced at any time."""

    def __init__(
        self,
        truth: Truth,
        *,
        clock: Clock,
        credential_clock: Clock,
        faults: Faults,
        external_id: str,
        calls_per_s: float,
        bill_pages: bool,
        links: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.truth = truth
        self.organization = Organization(truth.seed, truth.accounts)
        self.faults = faults
        self.inventory = inventory.Answers(truth)
        """What Describe calls and AWS Config say; `owned.edit` changes it."""
        self.url = ""
        self.received: Counter[tuple[str, str]] = Counter()
        """By account and API: requests that came in, refused and failed ones too (STS's: those that were answered)."""
        self._clock = clock
        self._credential_clock = credential_clock
        self._external_id = external_id
        self._calls_per_s = calls_per_s
        self._bill_pages = bill_pages
        self._links = links
        self._known = frozenset(truth.accounts)
        self._asked = Asked()
        self._bill = Bill(truth.accounts)
        self._quotas = Quotas()
        self._numbers = count()
        self._runner: web.AppRunner | None = None

    def billing(self) -> dict[str, Any]:
        """What `GET /billing` gives.

        {"accounts": {account: {"metrics_requested": n, "calls": {region: {API: n}}, "throttled": {region: {API: n}}}}}.
        Metrics requested are GetMetricData's queries, in calls that were answered (the answer may have been lost on its way); a
        continuation page counts anew only where `start` was told so. Refused and failed calls are not billed.
        """
        return self._bill.as_json()

    def add_account(self, unit: str = "", tags: Mapping[str, str] | None = None) -> str:
        """A new account of the organization, with metrics and a role to assume like the others'; returns its id.

        `unit` is an organizational unit's id or name. Raises ValueError where there is none, and where the metrics are recorded ones.
        """
        if not isinstance(self.truth, World):
            raise ValueError("recorded metrics are of one account")
        account = str(max(map(int, self.truth.accounts)) + 1)
        self.organization.add(account, unit, tags)
        self.truth.add_account(account)
        self._known = frozenset(self.truth.accounts)
        self._bill.add_account(account)
        return account

    async def close(self) -> None:
        """Stop listening, and drop what is unanswered after two seconds."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _listen(self, host: str, port: int) -> None:
        app = web.Application(client_max_size=_BODY_BYTES_MAX)
        app.on_response_prepare.append(self._stamp)
        app.router.add_get("/healthz", self._serve_healthz)
        app.router.add_get("/billing", self._serve_billing)
        app.router.add_get("/faults", self._serve_faults)
        app.router.add_post("/faults", self._serve_faults)
        app.router.add_post("/accounts", self._serve_accounts)
        app.router.add_post("/world", self._serve_world)
        app.router.add_get("/received", self._serve_received)
        app.router.add_post("/", self._serve_root)
        for path in inventory.PATHS:
            app.router.add_get(path, self._serve_path)
        app.router.add_post(f"/service/{_CLOUDWATCH}/operation/{{operation}}", self._serve_cbor)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        address = self._runner.addresses[0]
        self.url = f"http://{address[0]}:{address[1]}"

    async def _stamp(self, _: web.Request, response: web.StreamResponse) -> None:
        """What is not AWS has the simulated time too: aiohttp has put the machine's. AWS's answers have their query time."""
        if "x-amzn-RequestId" not in response.headers:
            response.headers["Date"] = formatdate(self._clock.now_s(), usegmt=True)

    # --- what is not AWS ---

    async def _serve_healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _serve_billing(self, _: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(self.billing()), content_type="application/json")

    async def _serve_faults(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            try:
                self.faults = Faults.parse(orjson.loads(await request.read() or b"{}"))
            except ValueError as e:
                return web.Response(status=400, text=f"{e}\n")
            log.info("simulator_faults_set", **self.faults.as_json())
        return web.Response(body=orjson.dumps(self.faults.as_json()), content_type="application/json")

    async def _serve_accounts(self, request: web.Request) -> web.Response:
        """{"count": 1, "unit": "Prod", "tags": {"env": "prod"}}, each optional → {"accounts": [id]}."""
        try:
            wanted = orjson.loads(await request.read() or b"{}")
            count, unit, tags = wanted.pop("count", 1), wanted.pop("unit", ""), wanted.pop("tags", None)
            if wanted or not 1 <= count <= 1000:
                raise ValueError("count (up to 1000), unit and tags are known")
            added = [self.add_account(unit, tags) for _ in range(count)]
        except (AttributeError, TypeError, ValueError) as e:
            return web.Response(status=400, text=f"{e}\n")
        log.info("simulator_accounts_added", accounts=added)
        return web.Response(body=orjson.dumps({"accounts": added}), content_type="application/json")

    async def _serve_world(self, request: web.Request) -> web.Response:
        """{"born_at_s": t} and {"silent": [account, from_s, until_s]}: `World.bear` and `World.silence`."""
        try:
            wanted = orjson.loads(await request.read())
            born_at_s, silent = wanted.pop("born_at_s", None), wanted.pop("silent", None)
            if wanted or not isinstance(self.truth, World):
                raise ValueError("born_at_s and silent are known, of made-up metrics")
            if silent is not None:
                account, from_s, until_s = silent
                self.truth.silence(str(account), int(from_s), int(until_s))
            if born_at_s is not None:
                self.truth.bear(int(born_at_s))
        except (AttributeError, TypeError, ValueError) as e:
            return web.Response(status=400, text=f"{e}\n")
        log.info("simulator_world_changed", born_at_s=born_at_s, silent=silent)
        return web.Response(body=b"{}", content_type="application/json")

    async def _serve_received(self, _: web.Request) -> web.Response:
        """Calls that came in, whatever became of them: {account: {API: n}}."""
        counts: dict[str, dict[str, int]] = {}
        for (account, operation), n in self.received.items():
            counts.setdefault(account, {})[operation] = n
        return web.Response(body=orjson.dumps(counts), content_type="application/json")

    # --- AWS ---

    async def _serve_root(self, request: web.Request) -> web.StreamResponse:
        service, _, operation = request.headers.get("X-Amz-Target", "").partition(".")
        if not service:
            signed = inventory.signed_for(request.headers.get("Authorization", ""))
            if form := inventory.QUERY.get(signed):
                fields = form.loads(await request.read())
                form = inventory.BALANCERS.get(fields.get("Version", ""), form)
                return await self._serve_call(request, signed, fields.get("Action", ""), form)
            return await self._serve_sts(request)
        if service in inventory.TARGETS:
            return await self._serve_call(
                request, inventory.TARGETS[service][0], operation, inventory.TARGETS[service][1]
            )
        return await self._serve_call(
            request, service, operation, JSON if service == _CLOUDWATCH else JSON_1_1
        )

    async def _serve_cbor(self, request: web.Request) -> web.StreamResponse:
        return await self._serve_call(request, _CLOUDWATCH, request.match_info["operation"], CBOR)

    async def _serve_path(self, request: web.Request) -> web.StreamResponse:
        return await self._serve_call(request, *inventory.PATHS[request.path])

    async def _serve_call(
        self, request: web.Request, service: str, operation: str, protocol: Wire
    ) -> web.StreamResponse:
        raw = await request.read() or request.query_string.encode()
        now_s, fate, faults = self._clock.now_s(), SPARED, self.faults
        try:
            caller = self._caller(request)
            faults = self.faults.of(caller.account)
            await self._lag(faults.latency_ms)
            now_s = self._clock.now_s()
            if faults.of_calls:
                what = blake2b(f"{caller.account} {caller.region} {operation} ".encode() + raw).digest()
                fate = fate_of(faults, what, self._asked.count(what))
            self._refuse(caller, faults, _SERVICES.get(service, service), operation, fate)
            if fate.unavailable:
                return web.Response(status=503, text=_UNAVAILABLE, content_type="text/html")
            if service == _CLOUDWATCH:
                answer = self._metrics(caller, faults, operation, protocol.loads(raw), now_s, fate)
            else:
                answer = self._free(caller, service, operation, protocol.loads(raw), fate)
        except AwsError as e:
            error, error_headers = protocol.error(e)
            return web.Response(status=e.status, body=error, headers=answer_headers(now_s) | error_headers)
        headers = answer_headers(now_s) | dict(protocol.headers)
        return await self._send(request, protocol.dumps(answer), headers, fate, faults)

    async def _send(
        self, request: web.Request, body: bytes, headers: Mapping[str, str], fate: Fate, faults: Faults
    ) -> web.StreamResponse:
        """An answer, if need be late, cut off, or lost on its way."""
        if fate.slow:
            await self._lag(faults.slow_ms)
        if fate.malformed:
            body = body[: len(body) // 2]
        if fate.truncated:
            response = web.StreamResponse(headers=headers)
            response.content_length = len(body)
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            if request.transport:
                request.transport.close()
            return response
        if fate.reset and request.transport:
            request.transport.abort()
        return web.Response(body=body, headers=headers)

    def _refuse(self, caller: Caller, faults: Faults, service: str, operation: str, fate: Fate) -> None:
        """Raise AwsError for what is refused before the request is looked at."""
        if service not in _ASKED or (
            service == "cloudwatch" and operation not in ("GetMetricData", "ListMetrics")
        ):
            raise AwsError("UnknownOperationException", f"{operation} is not simulated")
        self.received[caller.account, operation] += 1
        if caller.region in faults.disabled_regions:
            raise sts.unrecognized()
        spent = faults.expire_after_calls and self._calls_with(caller) >= faults.expire_after_calls
        if spent or caller.account in faults.expired_accounts:
            raise sts.expired()
        action = f"{service}:{operation}"
        if faults.denies(action) or (service == "cloudwatch" and caller.account in faults.forbidden_accounts):
            message = f"User: {caller.arn} is not authorized to perform: {action}"
            raise AwsError("AccessDeniedException", message, 403, "AccessDenied")
        if service == "cloudwatch":
            per_s = LIST_CALLS_PER_S if operation == "ListMetrics" else self._calls_per_s
            self._take(caller, operation, operation, 1.0, per_s)
        if fate.throttle:
            raise self._throttled(caller, operation)
        if fate.error:
            raise AwsError("InternalServiceFault", "an internal error", 500, "InternalServiceError")

    def _calls_with(self, caller: Caller) -> int:
        """Calls that were made before with the caller's session; other credentials are not counted."""
        return self._asked.count(f"session {caller.session}".encode()) if caller.session else 0

    def _metrics(
        self, caller: Caller, faults: Faults, operation: str, body: dict[str, Any], now_s: int, fate: Fate
    ) -> dict[str, Any]:
        """CloudWatch's answer, in the shape of the wire; counted and billed."""
        continued = bool(body.get("NextToken"))
        if continued and body["NextToken"].startswith(_ENDLESS):
            body = body | {"NextToken": None}
        if operation == "ListMetrics":
            page = self._listing(caller, faults, body, now_s)
        else:
            page = self._data(caller, faults, body, now_s, continued)
        token = page.this_token if fate.token_loop else page.next_token
        if fate.token_endless:
            token = f"{_ENDLESS}{next(self._numbers)}"
        answer: dict[str, Any] = {
            "Metrics" if operation == "ListMetrics" else "MetricDataResults": page.items
        }
        if page.owners is not None:
            answer["OwningAccounts"] = page.owners
        if page.messages:
            answer["Messages"] = page.messages
        return answer | ({"NextToken": token} if token else {})

    def _listing(self, caller: Caller, faults: Faults, body: dict[str, Any], now_s: int) -> Page:
        beside: Sequence[Metric] = ()
        if faults.flood_metrics or faults.wild_metrics:
            namespace, there = body.get("Namespace"), self.truth.metrics(caller.account, caller.region)
            beside = Flood(faults, [m for m in there if namespace in (None, m.namespace)])
        linked = self._links.get(caller.account, ())
        page = list_metrics(self.truth, caller.account, caller.region, body, now_s, linked, beside)
        self._bill.call(caller.account, self._region(caller), "ListMetrics")
        return page

    def _data(
        self, caller: Caller, faults: Faults, body: dict[str, Any], now_s: int, continued: bool
    ) -> Page:
        account, region = caller.account, caller.region
        asked = parse_data_request(body)
        recent = now_s - asked.start_s <= 3 * 3600
        per_s = DATAPOINTS_PER_S if recent else OLD_DATAPOINTS_PER_S
        self._take(caller, "GetMetricData", "datapoints", asked.datapoints(), per_s)
        billed = len(asked.queries) if self._bill_pages or not continued else 0
        if faults.page_points_max:
            asked = replace(asked, datapoints_max=min(asked.datapoints_max, faults.page_points_max))
        messages: list[dict[str, str]] = []
        if 0 < faults.allowed_metrics_max < len(asked.queries):
            asked = replace(asked, queries=asked.queries[: faults.allowed_metrics_max])
            messages = [{"Code": "MaxMetricsExceeded", "Value": "Maximum number of allowed metrics exceeded"}]
        page = get_metric_data(self.truth, account, region, asked, now_s, self._links.get(account, ()))
        self._bill.call(account, self._region(caller), "GetMetricData", billed)
        if faults.of_results and not asked.token:
            scope = f"{account}/{region} {asked.start_s} {asked.end_s}"
            questions = {q.id: q.question for q in asked.queries}
            page = replace(page, items=spoil_results(faults, self._asked, scope, page.items, questions))
        return replace(page, messages=messages) if messages else page

    def _free(
        self, caller: Caller, service: str, operation: str, body: dict[str, Any], fate: Fate
    ) -> dict[str, Any]:
        """Organizations, tagging and the inventory: counted, and billed with nothing."""
        if service == organizations.TARGET:
            answer = self.organization.answer(caller.account, operation, body)
        elif service in inventory.SERVICES:
            answer = self.inventory.answer(
                caller.account, caller.region, operation, body, fate, next(self._numbers)
            )
            if service in inventory.NAMED:
                answer = {operation: answer}  # the layout is the operation's
        elif operation == "GetResources":
            answer = tagging.get_resources(resources_of(self.truth, caller.account, caller.region), body)
        else:
            raise AwsError("UnknownOperationException", f"{operation} is not simulated")
        self._bill.call(caller.account, self._region(caller), operation)
        return answer

    async def _serve_sts(self, request: web.Request) -> web.Response:
        form = {k: str(v) for k, v in (await request.post()).items()}
        await self._lag(self.faults.latency_ms)
        headers = {"Content-Type": "text/xml"} | answer_headers(self._clock.now_s())
        action = form.get("Action", "")
        # SDKs judge credentials by the machine's time, others by the run's: neither may see fresh ones as expired.
        issued_at_s = max(self._clock.now_s(), self._credential_clock.now_s())
        try:
            caller = self._caller(request)
            if caller.region in self.faults.disabled_regions:
                raise AwsError("RegionDisabledException", f"STS is not activated in {caller.region}", 403)
            if self.faults.denies(f"sts:{action}"):
                raise AwsError(
                    "AccessDenied", f"{caller.arn} is not authorized to perform: sts:{action}", 403
                )
            assumable = self._known - set(self.faults.denied_roles)
            result = sts.answer(caller, form, assumable, self._external_id, issued_at_s, next(self._numbers))
        except AwsError as e:
            error = {"Error": {"Type": "Sender", "Code": e.code, "Message": e.message}}
            return web.Response(status=e.status, text=xml("ErrorResponse", error), headers=headers)
        self._bill.call(caller.account, self._region(caller), action)
        self.received[caller.account, action] += 1
        body = xml(f"{action}Response", {f"{action}Result": result})
        return web.Response(text=body, headers=headers)

    # --- what they share ---

    async def _lag(self, lag_ms: int) -> None:
        if lag_ms:
            await self._clock.sleep(lag_ms / 1000)

    def _caller(self, request: web.Request) -> Caller:
        return sts.caller_of(
            request.headers, self._known, self.truth.accounts[0], self._credential_clock.now_s()
        )

    def _region(self, caller: Caller) -> str:
        """The region to count under: those that the truth does not know are one, so that the counts stay few."""
        return caller.region if caller.region in self.truth.regions else "other"

    def _take(self, caller: Caller, operation: str, what: str, amount: float, per_s: float) -> None:
        """Take from a quota. Raises AwsError where it is used up."""
        if not self._calls_per_s:
            return
        key = (caller.account, self._region(caller), what)
        if not self._quotas.take(key, amount, per_s, self._clock.monotonic_s()):
            raise self._throttled(caller, operation)

    def _throttled(self, caller: Caller, operation: str) -> AwsError:
        self._bill.throttled(caller.account, self._region(caller), operation)
        return AwsError("ThrottlingException", "Rate exceeded")
