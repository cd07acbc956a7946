"""A simulated AWS over HTTP: CloudWatch and STS, for trying things out and for sizing before paying.

* It speaks CloudWatch's `json` and `smithy-rpc-v2-cbor`, and STS's `query` protocol, on one port.
* Answers are `workers.simulated.cloudwatch`'s, computed as of the second that the `Date` header says (those of a page
  series: as of its first page's).
* The account comes from the credentials (`workers.simulated.sts`), the region from their scope.
* Quotas are token buckets with a second's burst per account and region: GetMetricData calls, its datapoints (range ÷
  period, whatever there is), ListMetrics calls.
* `GET /billing` counts what AWS would bill; `POST /faults` makes it misbehave (`workers.simulated.faults`).
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from dataclasses import replace
from email.utils import formatdate
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import orjson
import structlog
from aiohttp import web

from ingest.clock import Clock, SystemClock
from ingest.errors import Fatal
from shard_config.load import shipped_services
from workers.simulated import sts
from workers.simulated.cloudwatch import AwsError, Page, get_metric_data, list_metrics, parse_data_request
from workers.simulated.faults import Asked, Faults, happens, spoil_results
from workers.simulated.metering import Bill, Quotas
from workers.simulated.protocols import CBOR, JSON, Protocol, answer_headers, xml
from workers.simulated.sts import Caller
from workers.traces import TraceWorld
from workers.world import Truth, World, account_ids

CALLS_PER_S: Final = 50.0
"""GetMetricData's quota of AWS, unless it was raised."""
LIST_CALLS_PER_S: Final = 25.0
DATAPOINTS_PER_S: Final = 180_000.0
"""Where StartTime is within three hours; else the next."""
OLD_DATAPOINTS_PER_S: Final = 396_000.0

_BODY_BYTES_MAX: Final = 4 << 20
_PREFIX = "GraniteServiceVersion20100801"

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
        self._bill = Bill(truth.accounts)
        self._quotas = Quotas()
        self._runner: web.AppRunner | None = None

    def billing(self) -> dict[str, Any]:
        """What `GET /billing` gives.

        {"accounts": {account: {"metrics_requested": n, "calls": {region: {API: n}}, "throttled": {region: {API: n}}}}}.
        Metrics requested are GetMetricData's queries, in calls that were answered (the answer may have been lost on its way); a
        continuation page counts anew only where `start` was told so. Refused and failed calls are not billed.
        """
        return self._bill.as_json()

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
        app.router.add_post("/", self._serve_root)
        app.router.add_post(f"/service/{_PREFIX}/operation/{{operation}}", self._serve_cbor)
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

    # --- AWS ---

    async def _serve_root(self, request: web.Request) -> web.Response:
        target = request.headers.get("X-Amz-Target", "")
        if not target:
            return await self._serve_sts(request)
        return await self._serve_cloudwatch(request, target.removeprefix(f"{_PREFIX}."), JSON)

    async def _serve_cbor(self, request: web.Request) -> web.Response:
        return await self._serve_cloudwatch(request, request.match_info["operation"], CBOR)

    async def _serve_cloudwatch(
        self, request: web.Request, operation: str, protocol: Protocol
    ) -> web.Response:
        raw = await request.read()
        await self._lag()
        faults, now_s = self.faults, self._clock.now_s()
        headers = answer_headers(now_s)
        try:
            caller = self._caller(request)
            what, attempt = b"", 0
            if faults.of_calls:
                of = f"{caller.account} {caller.region} {operation} "
                what = blake2b(of.encode() + raw).digest()
                attempt = self._asked.count(what)
            self._refuse(caller, operation, what, attempt)
            page = self._answer(caller, operation, protocol.loads(raw), now_s)
        except AwsError as e:
            body, error_headers = protocol.error(e)
            return web.Response(status=e.status, body=body, headers=headers | error_headers)
        token = page.next_token
        if happens(faults.token_loop_share, faults.seed, "loop", what, 0):
            token = page.this_token
        name = "Metrics" if operation == "ListMetrics" else "MetricDataResults"
        body = protocol.dumps({name: page.items} | ({"NextToken": token} if token else {}))
        if happens(faults.malformed_share, faults.seed, "malformed", what, attempt):
            body = body[: len(body) // 2]
        if request.transport and happens(faults.reset_share, faults.seed, "reset", what, attempt):
            request.transport.abort()
        return web.Response(body=body, headers=headers | dict(protocol.headers))

    def _refuse(self, caller: Caller, operation: str, what: bytes, attempt: int) -> None:
        """Raise AwsError for what is refused before the request is looked at."""
        faults = self.faults
        if operation not in ("GetMetricData", "ListMetrics"):
            raise AwsError("UnknownOperationException", f"{operation} is not simulated")
        if caller.account in faults.forbidden_accounts:
            message = f"User: {caller.arn} is not authorized to perform: cloudwatch:{operation}"
            raise AwsError("AccessDeniedException", message, 403, "AccessDenied")
        per_s = LIST_CALLS_PER_S if operation == "ListMetrics" else self._calls_per_s
        self._take(caller, operation, operation, 1.0, per_s)
        if happens(faults.throttle_share, faults.seed, "throttle", what, attempt):
            raise self._throttled(caller, operation)
        if happens(faults.error_share, faults.seed, "error", what, attempt):
            raise AwsError("InternalServiceFault", "an internal error", 500, "InternalServiceError")

    def _answer(self, caller: Caller, operation: str, body: dict[str, Any], now_s: int) -> Page:
        region, faults = self._region(caller), self.faults
        if operation == "ListMetrics":
            page = list_metrics(self.truth, caller.account, caller.region, body, now_s)
            self._bill.call(caller.account, region, operation)
            return page
        asked = parse_data_request(body)
        recent = now_s - asked.start_s <= 3 * 3600
        per_s = DATAPOINTS_PER_S if recent else OLD_DATAPOINTS_PER_S
        self._take(caller, operation, "datapoints", asked.datapoints(), per_s)
        page = get_metric_data(self.truth, caller.account, caller.region, asked, now_s)
        billed = len(asked.queries) if self._bill_pages or not asked.token else 0
        self._bill.call(caller.account, region, operation, billed)
        if faults.of_results and not asked.token:
            scope = f"{caller.account}/{caller.region} {asked.start_s} {asked.end_s}"
            questions = {q.id: q.question for q in asked.queries}
            page = replace(page, items=spoil_results(faults, self._asked, scope, page.items, questions))
        return page

    async def _serve_sts(self, request: web.Request) -> web.Response:
        form = {k: str(v) for k, v in (await request.post()).items()}
        await self._lag()
        headers = {"Content-Type": "text/xml"} | answer_headers(self._clock.now_s())
        action = form.get("Action", "")
        # SDKs judge credentials by the machine's time, others by the run's: neither may see fresh ones as expired.
        issued_at_s = max(self._clock.now_s(), self._credential_clock.now_s())
        try:
            caller = self._caller(request)
            assumable = set(self.truth.accounts) - set(self.faults.denied_roles)
            result = sts.answer(caller, form, assumable, self._external_id, issued_at_s)
        except AwsError as e:
            error = {"Error": {"Type": "Sender", "Code": e.code, "Message": e.message}}
            return web.Response(status=e.status, text=xml("ErrorResponse", error), headers=headers)
        self._bill.call(caller.account, self._region(caller), action)
        body = xml(f"{action}Response", {f"{action}Result": result})
        return web.Response(text=body, headers=headers)

    # --- what they share ---

    async def _lag(self) -> None:
        if self.faults.latency_ms:
            await self._clock.sleep(self.faults.latency_ms / 1000)

    def _caller(self, request: web.Request) -> Caller:
        return sts.caller_of(request.headers, self.truth.accounts, self._credential_clock.now_s())

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


async def start(
    truth: Truth,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    clock: Clock | None = None,
    faults: Faults | None = None,
    external_id: str = "",
    calls_per_s: float = CALLS_PER_S,
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
        credential_clock: What credentials expire by: the machine's own time, as SDKs see it, even where
            `clock` replays the past.

    Raises Fatal where the address cannot be had.
    """
    simulator = Simulator(
        truth,
        clock=clock or SystemClock(),
        credential_clock=credential_clock or SystemClock(),
        faults=faults or Faults(),
        external_id=external_id,
        calls_per_s=calls_per_s,
        bill_pages=bill_pages,
    )
    try:
        await simulator._listen(host, port)
    except OSError as e:
        await simulator.close()
        raise Fatal(f"simulator {host}:{port}", f"cannot listen: {e}", "choose another --port") from e
    return simulator


# --- headgate simulate ----------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `headgate simulate`."""
    parser = commands.add_parser(
        "simulate",
        help="serve a simulated AWS: CloudWatch and STS with made-up or recorded metrics",
        description="Serve CloudWatch and STS as AWS does, quotas and bill included, for trying Headgate out and for sizing it "
        "before paying. Point `aws.endpoint_url` at the URL that it prints (or AWS_ENDPOINT_URL, for other clients). "
        "GET /billing says what AWS would have billed; POST /faults makes it misbehave.",
    )
    add = parser.add_argument
    add(
        "--accounts",
        type=int,
        default=1,
        metavar="N",
        help="how many: 100000000001 and on (default %(default)s)",
    )
    add(
        "--regions",
        default="us-east-1",
        metavar="R,R",
        help="each account has them all (default %(default)s)",
    )
    add(
        "--services",
        default="",
        metavar="S,S",
        help="of the shipped profiles, whose metrics they have in equal parts (default all)",
    )
    add(
        "--metrics",
        type=int,
        default=200,
        metavar="N",
        help="of each account and region (default %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="another seed, other metrics and values (default %(default)s)",
    )
    add("--traces", type=Path, metavar="DIR", help="serve a folder of CSV files `timestamp,value` instead")
    add("--clock-offset-s", type=int, default=0, metavar="S", help="seconds to add to the machine's time")
    add("--external-id", default="", metavar="X", help="AssumeRole wants this ExternalId")
    add(
        "--calls-per-s",
        type=float,
        default=CALLS_PER_S,
        metavar="N",
        help="GetMetricData's quota per account and region; 0 lifts every quota (default %(default)s)",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Prints the URL, one line, once it answers. Raises Fatal where it cannot."""
    asyncio.run(_serve(truth_of(args), args))
    return 0


def truth_of(args: argparse.Namespace) -> Truth:
    """The truth that the command's words describe. Raises Fatal where they describe none."""
    if args.traces is not None:
        return TraceWorld(args.traces)
    regions, services = _words(args.regions), _words(args.services)
    shipped = shipped_services()
    unknown = [name for name in services if name not in shipped]
    if unknown:
        raise Fatal("simulate", f"no profile for {', '.join(unknown)}", f"there are {', '.join(shipped)}")
    if args.accounts < 1 or args.metrics < 0 or not regions:
        raise Fatal("simulate", "a world needs an account and a region", "see headgate simulate --help")
    profiles = [shipped[name] for name in services or shipped]
    return World(args.seed, account_ids(args.accounts), regions, args.metrics, profiles)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


async def _serve(truth: Truth, args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for which in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(which, stop.set)
    simulator = await start(
        truth,
        host=args.host,
        port=args.port,
        clock=SystemClock(args.clock_offset_s),
        external_id=args.external_id,
        calls_per_s=args.calls_per_s,
    )
    try:
        print(simulator.url, flush=True)
        await stop.wait()
    finally:
        await simulator.close()
