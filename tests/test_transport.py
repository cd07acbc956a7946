"""Both paths to CloudWatch, botocore's own and ours, say the same of every answer; and what may have been billed is counted."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from ingest.clock import ManualClock, SystemClock
from ingest.errors import HeadgateError, Transient
from ingest.sources import aws, transport
from ingest.sources.aws import Access, Aws, Credentials, Tally
from ingest.sources.aws_errors import may_be_billed, translate
from ingest.sources.metric_data import Malformed, Page, page_of
from ingest.sources.transport import Calls
from shard_config.model import Account, Config, ServiceProfile
from tests.simulated_scene import FIRST, METRICS, NOW_S, REGION, TRUTH, body_of, query
from workers import simulator
from workers.simulated.faults import Faults
from workers.simulator import Simulator

ACCESS = Access(REGION, Credentials(FIRST, f"AKIA{FIRST}", "secret", "token", 1e18))
DATE = "Fri, 15 Jan 2027 08:00:00 GMT"
REQUEST = body_of([query(n, m) for n, m in enumerate(METRICS[:40])], ScanBy="TimestampAscending")


def config_of(url: str) -> Config:
    return Config.model_validate(
        {
            "accounts": [{"id": FIRST, "regions": [REGION], "services": ["ec2"], "calls_per_s": 5000}],
            "services": [ServiceProfile(service="ec2", namespace="AWS/EC2").model_dump()],
            "aws": {"endpoint_url": url, "role_template": "arn:aws:iam::{account}:role/Headgate"},
        }
    )


@dataclass
class Paths:
    """The two ways to ask."""

    aws: Aws
    calls: Calls
    account: Account

    async def botocore_data(self, request: Mapping[str, Any]) -> Page:
        async with self.aws.client("cloudwatch", ACCESS) as client:
            answer = await client.get_metric_data(**request)
        return page_of(answer, answer["ResponseMetadata"]["HTTPHeaders"].get("date"))

    async def our_data(self, request: Mapping[str, Any]) -> Page:
        return await self.calls.get_metric_data(ACCESS, request)

    async def botocore_list(self, params: Mapping[str, Any]) -> object:
        async with self.aws.client("cloudwatch", ACCESS) as client:
            answer = await client.list_metrics(**params)
        return answer.get("Metrics"), answer.get("OwningAccounts"), answer.get("NextToken")

    async def our_list(self, params: Mapping[str, Any]) -> object:
        answer = (await self.calls.list_metrics(ACCESS, params)).answer
        return answer.get("Metrics"), answer.get("OwningAccounts"), answer.get("NextToken")


@asynccontextmanager
async def paths(url: str) -> AsyncIterator[Paths]:
    config = config_of(url)
    whole = Aws(config, SystemClock())
    calls = Calls(whole)
    try:
        yield Paths(whole, calls, config.accounts[0])
    finally:
        await calls.close()
        await whole.close()


async def said(ask: Callable[[Mapping[str, Any]], Awaitable[object]], request: Mapping[str, Any]) -> object:
    """What an answer means to the caller: the page, or the kind of error, its text, and whether it may be billed."""
    try:
        answer = await ask(request)
    except Exception as error:
        failure = translate(error, "here")
        kind = Transient if isinstance(failure, Malformed) else type(failure)
        what = "" if kind is Transient else failure.what
        return kind, what, isinstance(error, Malformed) or may_be_billed(error)
    if isinstance(answer, Page):
        results = [
            (r.id, r.status, [*map(float, r.timestamps_s)], [float(v).hex() for v in r.values])
            for r in answer.results
        ]
        return results, list(answer.messages), answer.next_token, answer.date_ms
    return answer


# --- a server that says what it is told -----------------------------------------------------------------------


@dataclass
class Script:
    """The bytes of an answer; `reset`: then the connection is reset, `hang`: then nothing comes."""

    raw: bytes = b""
    reset: bool = False
    hang: bool = False
    url: str = ""
    heads: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
                self.heads.append({k.lower(): v for k, v in (line.split(": ", 1) for line in head)})
                self.bodies.append(await reader.readexactly(int(self.heads[-1]["content-length"])))
                writer.write(self.raw)
                await writer.drain()
                if self.reset:
                    writer.transport.abort()
                    return
                if self.hang:
                    await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[Script]:
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    async with server:
        script.url = "http://{}:{}".format(*server.sockets[0].getsockname()[:2])
        yield script


def http(body: bytes, status: str = "200 OK", length: int | None = None, **headers: str) -> bytes:
    sent = {"Content-Type": "application/x-amz-json-1.0", "Date": DATE, "x-amzn-RequestId": "r"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    sent["Content-Length"] = str(len(body) if length is None else length)
    lines = [f"HTTP/1.1 {status}", *(f"{k}: {v}" for k, v in sent.items() if v)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def data(*results: object, **more: object) -> bytes:
    return json.dumps({"MetricDataResults": results, **more}).encode()


def result(values: object, **more: object) -> dict[str, object]:
    times = [NOW_S + 60 * n for n in range(len(values) if isinstance(values, list) else 0)]
    return {"Id": "q0", "Label": "x", "Timestamps": times, "Values": values, "StatusCode": "Complete"} | more


WHOLE = data(result([1.0]))
ANSWERS = {
    "points": WHOLE,
    "nothing": data(),
    "complete and empty": data(result([])),
    "more pages": data(result([1.0], StatusCode="PartialData"), NextToken="dG9rZW4="),
    "messages": data(result([1.0]), Messages=[{"Code": "MaximumExceeded", "Value": "Maximum of metrics"}]),
    "names of all the world": data(result([1.0], Label="Größe 温度 🜚")),
    "edges of floats": data(result([5e-324, 1e-300, 1.7976931348623157e308, -0.0, 0.1, 1 / 3, 2**53 + 1])),
    "integers, small and big": data(result([0, -7, 2**63 - 1, 2**64, 10**30])),
    "not a number": data(result(["NaN", 1.0, "Infinity", "-Infinity"])),
    "times with a fraction": b'{"MetricDataResults":[{"Id":"q0","Timestamps":[1.8E9,1800000060.5],"Values":[1,2]}]}',
    "times as text": b'{"MetricDataResults":[{"Id":"q0","Timestamps":["2027-01-15T08:00:00Z"],"Values":[1]}]}',
    "nulls": b'{"MetricDataResults":[{"Id":"q0","Timestamps":null,"Values":null,"StatusCode":null}],"NextToken":null}',
    "members that we do not know": data(result([1.0], Novelty={"a": [1]}), Novelty=[1]),
    "no results": b"{}",
    "no object": b'{"MetricDataResults": null}',
    "cut in the middle": WHOLE[: len(WHOLE) // 2],
    "no body": b"",
    "HTML": b"<html>login</html>",
}
SCRIPTS = {name: Script(http(body)) for name, body in ANSWERS.items()} | {
    "no Date": Script(http(WHOLE, Date="")),
    "an unreadable Date": Script(http(WHOLE, Date="yesterday")),
    "gzip that nobody asked for": Script(http(gzip.compress(WHOLE), Content_Encoding="gzip")),
    "a length longer than the body": Script(http(WHOLE, length=len(WHOLE) + 10), reset=True),
    "a reset in the head": Script(b"HTTP/1.1 200 OK\r\nContent-", reset=True),
    "a reset before the head": Script(reset=True),
    "no HTTP": Script(b"220 smtp.example.com ESMTP\r\n\r\n", reset=True),
    "silence": Script(hang=True),
    "a body that stops": Script(http(WHOLE, length=len(WHOLE) + 10), hang=True),
}


def error(code: str, message: str = "because", **more: str) -> bytes:
    return json.dumps({"__type": code, "message": message} | more).encode()


SCRIPTS |= {
    "throttled": Script(http(error("ThrottlingException"), "400 Bad Request")),
    "throttled as a query": Script(
        http(error("LimitExceeded"), "400 Bad Request", x_amzn_query_error="Throttling;Sender")
    ),
    "throttled by 503": Script(http(error("SlowDown"), "503 Slow Down")),
    "429": Script(http(b"", "429 Too Many Requests")),
    "denied": Script(http(error("com.amazon.coral#AccessDeniedException:http://x"), "403 Forbidden")),
    "denied without a word": Script(http(b"", "403 Forbidden")),
    "expired": Script(http(error("ExpiredTokenException"), "403 Forbidden")),
    "refused": Script(
        http(
            error("InvalidParameterValueException", "Größe"), "400 Bad Request", x_amzn_query_error="X;Sender"
        )
    ),
    "refused with a capital": Script(http(b'{"__type":"Y","Message":"capital"}', "400 Bad Request")),
    "500": Script(http(error("InternalServiceFault"), "500 Internal Server Error")),
    "502 of a proxy": Script(http(b"<html>bad gateway</html>", "502 Bad Gateway")),
    "503 without a body": Script(http(b"", "503 Service Unavailable")),
    "an error that is no object": Script(http(b"[1]", "400 Bad Request")),
    "an error that is not JSON": Script(http(b"nope", "400 Bad Request")),
}


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(transport, "READ_TIMEOUT_S", 0.2)


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.parametrize("name", SCRIPTS)
async def test_get_metric_data_says_the_same_on_both_paths(name: str) -> None:
    async with scripted(SCRIPTS[name]) as script, paths(script.url) as both:
        assert await said(both.our_data, REQUEST) == await said(both.botocore_data, REQUEST)


LISTED = {
    "a page": {
        "Metrics": [{"Namespace": "N", "MetricName": "Größe", "Dimensions": [{"Name": "a", "Value": "温"}]}]
    },
    "owners": {"Metrics": [{"Namespace": "N", "MetricName": "M"}], "OwningAccounts": ["1"], "NextToken": "t"},
    "nothing": {"Metrics": []},
}


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.parametrize(
    "script",
    [Script(http(json.dumps(answer).encode())) for answer in LISTED.values()]
    + [
        SCRIPTS[name] for name in SCRIPTS if name not in ANSWERS and "Date" not in name and "gzip" not in name
    ],
    ids=[
        *LISTED,
        *(name for name in SCRIPTS if name not in ANSWERS and "Date" not in name and "gzip" not in name),
    ],
)
async def test_list_metrics_says_the_same_on_both_paths(script: Script) -> None:
    params = {"Namespace": "AWS/EC2", "Dimensions": [{"Name": "InstanceId"}]}
    if b"MetricDataResults" in script.raw:
        script = Script(
            script.raw.replace(b"MetricDataResults", b"Metrics_but_longer"), script.reset, script.hang
        )
    async with scripted(script), paths(script.url) as both:
        assert await said(both.our_list, params) == await said(both.botocore_list, params)


async def test_no_connection_is_the_same_on_both_paths_and_not_billed() -> None:
    async with scripted(Script()) as script:
        url = script.url
    async with paths(url) as both:
        ours = await said(both.our_data, REQUEST)
        assert ours == await said(both.botocore_data, REQUEST) == (Transient, "", False)


async def test_what_is_sent_is_what_botocore_sends() -> None:
    async with scripted(Script(http(WHOLE))) as script, paths(script.url) as both:
        await both.botocore_data(REQUEST)
        await both.our_data(REQUEST)
        await both.botocore_list({"Namespace": "AWS/EC2"})
        await both.our_list({"Namespace": "AWS/EC2"})
    for theirs, ours in ((0, 1), (2, 3)):
        assert json.loads(script.bodies[ours]) == json.loads(script.bodies[theirs])
        expected, sent = script.heads[theirs], script.heads[ours]
        varies = {"content-length", "x-amz-date", "authorization", "amz-sdk-invocation-id", "amz-sdk-request"}
        assert {k: v for k, v in sent.items() if k not in varies} == {
            k: v for k, v in expected.items() if k not in varies
        }
        signed = expected["authorization"].partition("Signature=")[0]
        assert sent["authorization"].partition("Signature=")[0] == signed


@pytest.mark.parametrize(
    ("region", "url"),
    [
        ("eu-west-1", "https://monitoring.eu-west-1.amazonaws.com/"),
        ("cn-north-1", "https://monitoring.cn-north-1.amazonaws.com.cn/"),
        ("us-gov-west-1", "https://monitoring.us-gov-west-1.amazonaws.com/"),
    ],
)
async def test_endpoints_are_those_that_botocore_knows(region: str, url: str) -> None:
    async with paths("") as both:
        endpoint = await both.calls._resolve(Access(region, ACCESS.credentials))
    assert (endpoint.url, endpoint.signing_region, endpoint.signing_name) == (url, region, "monitoring")


async def test_a_proxy_and_authorities_of_the_environment_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted(Script(http(WHOLE))) as script:
        monkeypatch.setenv("http_proxy", script.url)
        async with paths("http://monitoring.example.invalid") as both:
            assert [one.id for one in (await both.our_data(REQUEST)).results] == ["q0"]
    assert script.heads[0]["host"] == "monitoring.example.invalid"
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/authorities.pem")
    async with paths("") as both:
        assert both.aws.verify == "/etc/authorities.pem"


# --- the simulated AWS ----------------------------------------------------------------------------------------


@asynccontextmanager
async def simulated(faults: Faults | None = None, **more: Any) -> AsyncIterator[tuple[Simulator, Paths]]:
    clock = more.pop("clock", None) or ManualClock(NOW_S)
    sim = await simulator.start(TRUTH, clock=clock, faults=faults, calls_per_s=0, **more)
    try:
        async with paths(sim.url) as both:
            yield sim, both
    finally:
        await sim.close()


def modes() -> list[Faults]:
    """Each fault of the simulated AWS alone: always where it strikes calls, often where it strikes results."""
    plain = Faults()
    always = {
        name: 1.0
        for name, value in plain.as_json().items()
        if name.endswith("_share") and isinstance(value, float)
    }
    often = dict.fromkeys(
        ("partial_share", "internal_error_share", "missing_id_share", "forbidden_share"), 0.4
    )
    shares = [Faults.parse({"seed": 3, name: share}) for name, share in (always | often).items()]
    return [plain, *shares, Faults(shuffle_ids=True, seed=5), Faults(forbidden_accounts=(FIRST,))]


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.parametrize("faults", modes(), ids=lambda f: str({k: v for k, v in f.as_json().items() if v}))
async def test_both_paths_say_the_same_of_each_fault_of_the_simulator(faults: Faults) -> None:
    answers: list[list[object]] = []
    for ask in ("our_data", "botocore_data"):
        async with simulated(faults) as (_, both):  # one each, for a fault may strike the first ask only
            request = {**REQUEST, "MaxDatapoints": 60}
            answers.append([await said(getattr(both, ask), request) for _ in range(2)])
    assert answers[0] == answers[1]


async def test_both_paths_read_all_pages_alike() -> None:
    pages: dict[str, list[object]] = {"our_data": [], "botocore_data": []}
    lists: dict[str, list[Any]] = {"our_list": [], "botocore_list": []}
    async with simulated() as (_, both):
        for ask, found in pages.items():
            request: dict[str, Any] = {**REQUEST, "MaxDatapoints": 30}
            while True:
                page: Page = await getattr(both, ask)(request)
                found.append((page.results, page.date_ms))
                if not page.next_token:
                    break
                request = {**request, "NextToken": page.next_token}
        for ask, listed in lists.items():
            params: dict[str, Any] = {"Namespace": "AWS/EC2"}
            while True:
                answer = await getattr(both, ask)(params)
                listed.append(answer[0])
                if not answer[2]:
                    break
                params = {**params, "NextToken": answer[2]}
    assert len(pages["our_data"]) > 3
    assert pages["our_data"] == pages["botocore_data"]
    assert sum(map(len, lists["our_list"])) == 600
    assert lists["our_list"] == lists["botocore_list"]


# --- what may be billed ---------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", (0.0, 0.0))


async def ask(both: Paths, tally: Tally, wait_s: float = 60.0) -> None:
    """One call for 40 metrics, three attempts at most.

    A deadline that cuts off the last attempt on a busy machine would rightly leave it in doubt, throttled or not: so it is far away.
    """

    async def send(access: Access) -> Page:
        page = await both.calls.get_metric_data(access, REQUEST)
        tally.metrics_billed += 40
        return page

    with suppress(HeadgateError):
        await both.aws.call(
            both.account,
            REGION,
            "GetMetricData",
            send,
            cost_s=1 / 5000,
            deadline_s=SystemClock().monotonic_s() + wait_s,
            tally=tally,
            metrics=40,
        )


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("faults", "billed", "in_doubt"),
    [
        (Faults(), 40, 0),
        (Faults(reset_share=1), 0, 120),
        (Faults(error_share=1), 0, 120),
        (Faults(throttle_share=1), 0, 0),
        (Faults(forbidden_accounts=(FIRST,)), 0, 0),
        (Faults(malformed_share=1), 0, 0),  # it was answered, so that whoever reads it counts it
    ],
    ids=str,
)
async def test_metrics_are_in_doubt_where_an_answer_was_lost_and_not_where_it_was_refused(
    faults: Faults, billed: int, in_doubt: int
) -> None:
    tally = Tally()
    async with simulated(faults) as (sim, both):
        await ask(both, tally)
        bill = sim.billing()["accounts"].get(FIRST, {}).get("metrics_requested", 0)
    assert (tally.metrics_billed, tally.metrics_in_doubt) == (billed, in_doubt)
    if not faults.malformed_share:
        assert tally.metrics_billed <= bill <= tally.metrics_billed + tally.metrics_in_doubt


async def test_what_a_deadline_or_a_cancellation_cuts_off_is_in_doubt() -> None:
    tally = Tally()
    clock = SystemClock(NOW_S - int(time.time()))
    async with simulated(clock=clock) as (sim, both):
        await ask(both, tally)
        assert tally.metrics_in_doubt == 0
        sim.faults = Faults(latency_ms=1500)
        await ask(both, tally, wait_s=0.2)
        assert tally.metrics_in_doubt == 40
        before = sim.received[FIRST, "GetMetricData"]
        task = asyncio.create_task(ask(both, tally))
        async with asyncio.timeout(20):
            while sim.received[FIRST, "GetMetricData"] == before:  # noqa: ASYNC110 -- the simulator announces nothing
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (tally.metrics_billed, tally.metrics_in_doubt) == (40, 80)
