"""AWS answers on the wire, laid out by botocore's own service models: names of elements, lists, wrappers and times are AWS's, and none are typed here. Pure.

For the `query` and `ec2` protocols (XML) and `rest-json`; what is not in an answer's shape is an error of the simulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final
from urllib.parse import parse_qsl
from uuid import uuid4
from xml.sax.saxutils import escape

import orjson
from botocore.model import ServiceModel

from ingest.aws_session import new_session
from ingest.clock import utc
from workers.simulated.requests import AwsError

_CODES: Final = {
    "ec2": {"AccessDenied": "UnauthorizedOperation", "ThrottlingException": "RequestLimitExceeded"},
    "query": {"ThrottlingException": "Throttling"},
}
"""What these protocols call errors that newer ones call otherwise."""


@cache
def _model(client: str) -> ServiceModel:
    loader = new_session().get_component("data_loader")
    return ServiceModel(loader.load_service_model(client, "service-2"), client)


class Shaped:
    """A protocol as `protocols.Protocol` is one, of one botocore client."""

    def __init__(self, client: str) -> None:
        self._client = client
        self.headers: Mapping[str, str] = {"Content-Type": "text/xml"}

    @property
    def _protocol(self) -> str:
        return str(_model(self._client).metadata["protocol"])

    def loads(self, raw: bytes) -> dict[str, Any]:
        """The form's fields, as Filter.1.Name."""
        return dict(parse_qsl(raw.decode(), keep_blank_values=True))

    def dumps(self, answer: dict[str, Any]) -> bytes:
        """`answer` has one key, the operation, and its output below."""
        [(operation, output)] = answer.items()
        shape = _model(self._client).operation_model(operation).output_shape
        inner = _members(shape, output)
        if wrapper := shape.serialization.get("resultWrapper"):
            inner = f"<{wrapper}>{inner}</{wrapper}><ResponseMetadata><RequestId>{uuid4()}</RequestId></ResponseMetadata>"
        return f"<{operation}Response>{inner}</{operation}Response>".encode()

    def error(self, e: AwsError) -> tuple[bytes, dict[str, str]]:
        """Body and headers of an error answer."""
        code = e.query_code or e.code
        code = _CODES[self._protocol].get(code, code)
        inner = f"<Code>{escape(code)}</Code><Message>{escape(e.message)}</Message>"
        if self._protocol == "ec2":
            body = f"<Response><Errors><Error>{inner}</Error></Errors><RequestID>{uuid4()}</RequestID></Response>"
        else:
            body = f"<ErrorResponse><Error><Type>Sender</Type>{inner}</Error><RequestId>{uuid4()}</RequestId></ErrorResponse>"
        return body.encode(), dict(self.headers)


def _members(shape: Any, value: Mapping[str, Any]) -> str:
    if unknown := value.keys() - shape.members.keys():
        raise AssertionError(f"{shape.name} has no {sorted(unknown)}")
    return "".join(
        _element(shape.members[name], name, inner) for name, inner in value.items() if inner is not None
    )


def _element(shape: Any, name: str, value: Any) -> str:
    name = shape.serialization.get("name", name)
    if shape.type_name == "structure":
        inner = _members(shape, value)
    elif shape.type_name == "list":
        item = shape.member.serialization.get("name", "member")
        parts = [
            _element(shape.member, name if shape.serialization.get("flattened") else item, one)
            for one in value
        ]
        if shape.serialization.get("flattened"):
            return "".join(parts)
        inner = "".join(parts)
    elif shape.type_name == "timestamp":
        inner = iso(value)
    elif shape.type_name == "boolean":
        inner = str(value).lower()
    else:
        inner = escape(str(value))
    return f"<{name}>{inner}</{name}>"


class RestJson:
    """The same for `rest-json`: JSON, with the model's names."""

    headers: Mapping[str, str] = {"Content-Type": "application/json"}

    def __init__(self, client: str) -> None:
        self._client = client

    def loads(self, raw: bytes) -> dict[str, Any]:
        """What stands in the query string; these requests have no body."""
        return dict(parse_qsl(raw.decode()))

    def dumps(self, answer: dict[str, Any]) -> bytes:
        [(operation, output)] = answer.items()
        return orjson.dumps(_plain(_model(self._client).operation_model(operation).output_shape, output))

    def error(self, e: AwsError) -> tuple[bytes, dict[str, str]]:
        return orjson.dumps({"message": e.message}), {**self.headers, "x-amzn-ErrorType": e.code}


def _plain(shape: Any, value: Any) -> Any:
    if shape.type_name == "structure":
        return {
            shape.members[name].serialization.get("name", name): _plain(shape.members[name], inner)
            for name, inner in value.items()
            if inner is not None
        }
    if shape.type_name == "list":
        return [_plain(shape.member, one) for one in value]
    return iso(value) if shape.type_name == "timestamp" else value


def iso(at_s: int) -> str:
    return utc(at_s).strftime("%Y-%m-%dT%H:%M:%S.000Z")
