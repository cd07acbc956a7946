"""The wire protocols that the simulated AWS speaks: `json` and `smithy-rpc-v2-cbor` for CloudWatch,
`query` for STS, `json` for Organizations and tagging. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Final
from uuid import uuid4
from xml.sax.saxutils import escape

import orjson

from workers.simulated.cloudwatch import AwsError


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a structure becomes a body and back. `dumps` knows MetricDataResults' Timestamps as such."""

    _loads: Callable[[bytes], Any]
    dumps: Callable[[dict[str, Any]], bytes]
    headers: Mapping[str, str]
    names_query_errors: bool = True
    """Whether errors carry the code of the query protocol too, as CloudWatch's do for old clients."""

    def loads(self, raw: bytes) -> dict[str, Any]:
        """A request's structure. Raises AwsError where the body is none."""
        try:
            body = self._loads(raw)
        except ValueError as e:
            raise AwsError("SerializationException", f"the body is not readable: {e}") from e
        if not isinstance(body, dict):
            raise AwsError("SerializationException", "the body is not a structure")
        return body

    def error(self, e: AwsError) -> tuple[bytes, dict[str, str]]:
        """Body and headers of an error answer."""
        headers = dict(self.headers)
        if e.query_code and self.names_query_errors:
            headers["x-amzn-query-error"] = f"{e.query_code};{'Sender' if e.status < 500 else 'Receiver'}"
        return self.dumps({"__type": e.code, "message": e.message}), headers


# cbor2 comes with the extra `local` only, and `headgate` registers the simulator's command without it: imported when used.


def _from_cbor(raw: bytes) -> Any:
    import cbor2

    return cbor2.loads(raw)


def _to_cbor(body: dict[str, Any]) -> bytes:
    """Timestamps travel as tag 1, seconds since the epoch."""
    import cbor2

    results = body.get("MetricDataResults")
    if results is not None:
        tagged = [r | {"Timestamps": [cbor2.CBORTag(1, t) for t in r["Timestamps"]]} for r in results]
        body = body | {"MetricDataResults": tagged}
    return cbor2.dumps(body)


JSON: Final = Protocol(orjson.loads, orjson.dumps, {"Content-Type": "application/x-amz-json-1.0"})
JSON_1_1: Final = Protocol(orjson.loads, orjson.dumps, {"Content-Type": "application/x-amz-json-1.1"}, False)
CBOR: Final = Protocol(
    _from_cbor, _to_cbor, {"Content-Type": "application/cbor", "smithy-protocol": "rpc-v2-cbor"}
)


def xml(root: str, content: Mapping[str, Any]) -> str:
    """A response of the query protocol: nested elements, and a request id behind them."""

    def element(name: str, value: Any) -> str:
        inner = "".join(element(k, v) for k, v in value.items()) if isinstance(value, dict) else escape(value)
        return f"<{name}>{inner}</{name}>"

    inner = "".join(element(k, v) for k, v in content.items())
    inner += element("ResponseMetadata", {"RequestId": str(uuid4())})
    return f'<{root} xmlns="https://sts.amazonaws.com/doc/2011-06-15/">{inner}</{root}>'


def answer_headers(now_s: int) -> dict[str, str]:
    """The answer's own time, in whole seconds as HTTP has it, and a request id."""
    return {"Date": formatdate(now_s, usegmt=True), "x-amzn-RequestId": str(uuid4())}
