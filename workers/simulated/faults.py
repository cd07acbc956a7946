"""What a simulated AWS does wrong, when asked to: decided from a seed, so that a failure is found again.

A decision is a hash of (seed, kind, what is asked, how often it was asked before): it does not depend on the order in
which concurrent calls arrive.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Faults:
    """All off by default. A share is a probability in [0, 1]: of CloudWatch calls, where it does not say of what."""

    seed: int = 0
    throttle_share: float = 0.0
    """ThrottlingException; not billed."""
    error_share: float = 0.0
    """HTTP 500, InternalServiceFault; not billed."""
    reset_share: float = 0.0
    """The connection is reset after the work was done and billed: the answer is lost."""
    malformed_share: float = 0.0
    """The second half of the answer's body is missing, in a response that is otherwise well-formed; billed."""
    token_loop_share: float = 0.0
    """A NextToken of GetMetricData that leads back to the page that gave it."""
    partial_share: float = 0.0
    """Of results: PartialData with half of the points and no NextToken; the next ask of the same is complete."""
    internal_error_share: float = 0.0
    """Of results: StatusCode InternalError without points; each ask is decided anew."""
    missing_id_share: float = 0.0
    """Of results: the Id is absent; each ask is decided anew."""
    forbidden_share: float = 0.0
    """Of metrics: StatusCode Forbidden, however often it is asked."""
    repeat_share: float = 0.0
    """Of results: the first point is there twice."""
    shuffle_ids: bool = False
    """Results come in an order of their own."""
    forbidden_accounts: tuple[str, ...] = ()
    """AccessDenied for every CloudWatch call of these accounts; their role can be assumed."""
    denied_roles: tuple[str, ...] = ()
    """AccessDenied for AssumeRole of these accounts."""
    latency_ms: int = 0
    """Added to every call."""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Self:
        """From JSON. Raises ValueError for a name that does not exist, a wrong type or a share outside [0, 1]."""
        if not isinstance(body, Mapping):
            raise ValueError("faults are an object of names and values")
        types = {f.name: type(f.default) for f in fields(cls)}
        unknown = sorted(body.keys() - types.keys())
        if unknown:
            raise ValueError(f"unknown faults {', '.join(unknown)}; there are {', '.join(types)}")
        values: dict[str, Any] = {}
        for name, value in body.items():
            values[name] = tuple(value) if isinstance(value, list) else value
            accepted = (int, float) if types[name] is float else types[name]
            if not isinstance(values[name], accepted) or (name.endswith("_share") and not 0 <= value <= 1):
                raise ValueError(
                    f"fault {name} = {value!r}: a {types[name].__name__} is wanted, a share in [0, 1]"
                )
        return cls(**values)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def of_calls(self) -> bool:
        """Whether any fault is decided call by call."""
        return bool(
            self.throttle_share
            or self.error_share
            or self.reset_share
            or self.malformed_share
            or self.token_loop_share
        )

    @property
    def of_results(self) -> bool:
        """Whether any fault concerns single results."""
        return bool(
            self.partial_share
            or self.internal_error_share
            or self.missing_id_share
            or self.forbidden_share
            or self.repeat_share
            or self.shuffle_ids
        )


class Asked:
    """How often something was asked before; the least recently asked are forgotten."""

    _KEPT_MAX = 200_000

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    def count(self, what: bytes) -> int:
        """Times that `what` was asked before this one."""
        before = self._counts.pop(what, 0)
        self._counts[what] = before + 1
        if len(self._counts) > self._KEPT_MAX:
            self._counts.popitem(last=False)
        return before


def happens(share: float, seed: int, kind: str, what: bytes, attempt: int) -> bool:
    """Whether a fault of that share befalls this attempt."""
    if share <= 0.0:
        return False
    digest = blake2b(what, key=f"{seed} {kind} {attempt}".encode()[:64], digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def spoil_results(
    faults: Faults, asked: Asked, scope: str, items: list[dict[str, Any]], questions: Mapping[str, object]
) -> list[dict[str, Any]]:
    """MetricDataResults with their faults. `questions` gives by Id what was asked; `scope` the target and the range."""
    spoilt: list[tuple[bytes, dict[str, Any]]] = []
    for item in items:
        metric = blake2b(
            f"{scope.partition(' ')[0]} {questions[item['Id']]}".encode(), digest_size=8
        ).digest()
        what = blake2b(f"{scope} {questions[item['Id']]}".encode(), digest_size=8).digest()
        attempt = asked.count(what)

        def befalls(share: float, kind: str, what: bytes = what, attempt: int = attempt) -> bool:
            return happens(share, faults.seed, kind, what, attempt)

        if befalls(faults.missing_id_share, "missing"):
            continue
        if happens(faults.forbidden_share, faults.seed, "forbidden", metric, 0):
            item = item | {"Timestamps": [], "Values": [], "StatusCode": "Forbidden"}
        elif befalls(faults.internal_error_share, "internal"):
            item = item | {"Timestamps": [], "Values": [], "StatusCode": "InternalError"}
        elif attempt == 0 and befalls(faults.partial_share, "partial"):
            half = len(item["Values"]) // 2
            item = item | {
                "Timestamps": item["Timestamps"][:half],
                "Values": item["Values"][:half],
                "StatusCode": "PartialData",
            }
        elif befalls(faults.repeat_share, "repeat"):
            item = item | {
                "Timestamps": item["Timestamps"][:1] + item["Timestamps"],
                "Values": item["Values"][:1] + item["Values"],
            }
        spoilt.append((what, item))
    if faults.shuffle_ids:
        spoilt.sort(key=lambda pair: pair[0])
    return [item for _, item in spoilt]
