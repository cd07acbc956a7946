"""The wire protocols that the simulated AWS speaks: `json` and `smithy-rpc-v2-cbor` for CloudWatch,
`query` for STS, `json` for Organizations and tagging. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from itertools import chain, repeat
from struct import Struct
from typing import Any, Final
from typing import Protocol as Protocol_
from uuid import uuid4
from xml.sax.saxutils import escape

import orjson

from workers.simulated.requests import AwsError


class Wire(Protocol_):
    """How requests become structures, and answers bytes."""

    @property
    def headers(self) -> Mapping[str, str]: ...

    def loads(self, raw: bytes) -> dict[str, Any]:
        """A request's structure. Raises AwsError where the body is none."""
        ...

    def dumps(self, answer: dict[str, Any], /) -> bytes: ...

    def error(self, e: AwsError) -> tuple[bytes, dict[str, str]]:
        """Body and headers of an error answer."""
        ...


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
    """Timestamps travel as tag 1, seconds since the epoch. Points are laid out by hand, which takes half the time."""
    import cbor2

    results = body.get("MetricDataResults")
    if results is None:
        return cbor2.dumps(body)
    parts = [_cbor_head(5, len(body))]
    for key, value in body.items():
        if key != "MetricDataResults":
            parts += (cbor2.dumps(key), cbor2.dumps(value))
    parts += (cbor2.dumps("MetricDataResults"), _cbor_head(4, len(results)))
    for result in results:
        times_s, values = result["Timestamps"], result["Values"]
        count = len(values)
        rest = [(k, v) for k, v in result.items() if k != "Timestamps" and k != "Values"]
        parts.append(_cbor_head(5, len(rest) + 2))
        for key, value in rest:
            parts += (_cbor_text(key), _cbor_text(value) if isinstance(value, str) else cbor2.dumps(value))
        parts += (
            _CBOR_TIMESTAMPS,
            _cbor_head(4, count),
            _points("HI", count).pack(*chain.from_iterable(zip(repeat(0xC11A), times_s))),
            _CBOR_VALUES,
            _cbor_head(4, count),
            _points("Bd", count).pack(*chain.from_iterable(zip(repeat(0xFB), values))),
        )
    return b"".join(parts)


_CBOR_TIMESTAMPS: Final = b"\x6aTimestamps"
_CBOR_VALUES: Final = b"\x66Values"


@lru_cache(maxsize=4096)
def _points(of_one: str, count: int) -> Struct:
    """So many points: each a byte or two that say what follows (tag 1 and 32 bits, or a double), and the number."""
    return Struct(">" + of_one * count)


@lru_cache(maxsize=4096)
def _cbor_text(text: str) -> bytes:
    raw = text.encode()
    return _cbor_head(3, len(raw)) + raw


def _cbor_head(major: int, length: int) -> bytes:
    """How a text (3), an array (4) or a map (5) of so many bytes, elements or entries begins."""
    if length < 24:
        return bytes([major << 5 | length])
    for byte, code in ((24, "B"), (25, "H")):
        if length < 1 << 8 * Struct(code).size:
            return Struct(">B" + code).pack(major << 5 | byte, length)
    return Struct(">BI").pack(major << 5 | 26, length)


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
