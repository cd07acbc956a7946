"""GetMetricData and ListMetrics without botocore's serializer and parser, which are nearly all that a call costs.

Guarantees:

* what is sent is what aiobotocore sends (CloudWatch's JSON 1.0 protocol, signed by botocore's SigV4); endpoint, region and name
  to sign for, and user agent are those of a request that botocore itself prepared, so that partitions, FIPS and `endpoint_url` hold;
* connections, TLS, proxies and timeouts are aiobotocore's own HTTP session; its errors and AWS's error codes come through
  as botocore's exceptions, for `aws_errors` to translate;
* an answer that is cut off or is not JSON is `Malformed`, never empty;
* connections are kept and bounded, `CONNECTIONS_MAX` a region for all accounts together.

`tests/test_transport.py` holds both paths against each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
from aiobotocore.httpsession import AIOHTTPSession
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import ClientError
from botocore.parsers import create_parser
from botocore.utils import get_environ_proxies

from ingest.sources.aws import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Access, Aws
from ingest.sources.look import date_ms
from ingest.sources.metric_data import Malformed, Page, page_of, request_body

CONNECTIONS_MAX: Final = 128
"""Per region: what waits for a free one waits within its deadline. Fifty calls a second of half a second each are 25."""
_TARGET: Final = "GraniteServiceVersion20100801"


@dataclass(frozen=True, slots=True)
class ListPage:
    """One answer to ListMetrics, as its JSON says; `date_ms` is None where the `Date` header is missing or unreadable."""

    answer: Any
    date_ms: int | None


@dataclass(frozen=True, slots=True)
class _Endpoint:
    url: str
    user_agent: str
    signing_name: str
    signing_region: str
    http: AIOHTTPSession


class _Prepared(Exception):
    """Carries a request out of botocore just before it is sent."""

    def __init__(self, request: AWSPreparedRequest) -> None:
        self.request = request


class Calls:
    """CloudWatch's two hot APIs for one process, on the clients and settings of `aws`. `close` it before `aws`."""

    def __init__(self, aws: Aws) -> None:
        self._aws = aws
        self._endpoints: dict[str, _Endpoint] = {}  # as many as regions are configured
        self._resolving = asyncio.Lock()
        self._parser = create_parser("json")

    async def close(self) -> None:
        endpoints, self._endpoints = list(self._endpoints.values()), {}
        for endpoint in endpoints:
            await endpoint.http.close()

    async def get_metric_data(self, access: Access, request: Mapping[str, Any]) -> Page:
        """`ingest.sources.metric_data.GetMetricData`. Raises Malformed, and what botocore would raise."""
        answer, date = await self._call(access, "GetMetricData", request_body(request))
        return page_of(answer, date)

    async def list_metrics(self, access: Access, params: Mapping[str, Any]) -> ListPage:
        """One page of ListMetrics. Raises Malformed where it is not JSON, and what botocore would raise."""
        answer, date = await self._call(access, "ListMetrics", orjson.dumps(params))
        return ListPage(answer, date_ms(date))

    async def _call(self, access: Access, api: str, body: bytes) -> tuple[Any, str | None]:
        """The answer's structure, and its `Date` header."""
        endpoint = self._endpoints.get(access.region) or await self._resolve(access)
        response = await endpoint.http.send(_signed(endpoint, access, api, body))
        content, headers = await response.content, response.headers
        if response.status_code >= 300:
            raw = {"status_code": response.status_code, "headers": headers, "body": content}
            raise ClientError(self._parser.parse(raw, None), api)
        try:
            return orjson.loads(content), headers.get("date")
        except orjson.JSONDecodeError as error:
            raise Malformed(f"aws {api}", f"an answer that is not JSON: {error}") from error

    async def _resolve(self, access: Access) -> _Endpoint:
        """Ask botocore what it would send to whom, once a region."""
        async with self._resolving:
            if known := self._endpoints.get(access.region):
                return known
            prepared = await self._prepare(access)
            scheme, _, rest = prepared.url.partition("://")
            url = f"{scheme}://{rest.partition('/')[0]}/"
            # Credential=<key>/<day>/<region>/<name>/aws4_request, SignedHeaders=…
            scope = _text(prepared.headers["Authorization"]).partition("Credential=")[2].partition(",")[0]
            _, _, region, name, _ = scope.rsplit("/", 4)
            http = AIOHTTPSession(
                verify=self._aws.verify,
                proxies=get_environ_proxies(url),
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                max_pool_connections=CONNECTIONS_MAX,
            )
            endpoint = _Endpoint(
                url, _text(prepared.headers["User-Agent"]), name, region, await http.__aenter__()
            )
            self._endpoints[access.region] = endpoint
            return endpoint

    async def _prepare(self, access: Access) -> AWSPreparedRequest:
        """What botocore is about to send for a ListMetrics in this region."""

        def stop(request: AWSPreparedRequest, **_: object) -> None:
            raise _Prepared(request)

        async with self._aws.client("cloudwatch", access) as client:
            event = "before-send.cloudwatch.ListMetrics"
            client.meta.events.register(event, stop)
            try:
                await client.list_metrics()
            except _Prepared as caught:
                return caught.request
            finally:
                client.meta.events.unregister(event, stop)
        raise AssertionError("botocore sent it all the same")


def _text(header: str | bytes) -> str:
    return header.decode() if isinstance(header, bytes) else header


def _signed(endpoint: _Endpoint, access: Access, api: str, body: bytes) -> AWSPreparedRequest:
    headers = {
        "X-Amz-Target": f"{_TARGET}.{api}",
        "Content-Type": "application/x-amz-json-1.0",
        "x-amzn-query-mode": "true",  # errors carry the codes of the query protocol, too
        "User-Agent": endpoint.user_agent,
    }
    request = AWSRequest("POST", endpoint.url, headers=headers, data=body)
    used = access.credentials
    keys = ReadOnlyCredentials(used.access_key, used.secret_key, used.token or None)
    SigV4Auth(keys, endpoint.signing_name, endpoint.signing_region).add_auth(request)
    return request.prepare()
