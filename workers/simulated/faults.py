"""What a simulated AWS does wrong, when asked to: decided from a seed, so that a failure is found again.

A decision is a hash of (seed, kind, what is asked, how often it was asked before): it does not depend on the order in
which concurrent calls arrive.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from hashlib import blake2b
from typing import Any, Final, NamedTuple, Self, overload

from workers.world import Metric


@dataclass(frozen=True, slots=True)
class Faults:
    """All off by default. A share is a probability in [0, 1]: of calls (STS's apart), where it does not say of what."""

    seed: int = 0
    only_accounts: tuple[str, ...] = ()
    """What does not say itself whom it is about befalls only calls of these accounts, STS's apart; empty: of all."""
    throttle_share: float = 0.0
    """ThrottlingException; not billed."""
    error_share: float = 0.0
    """HTTP 500, InternalServiceFault; not billed."""
    unavailable_share: float = 0.0
    """HTTP 503 with a page of HTML, as of something that stands before AWS; not billed."""
    slow_share: float = 0.0
    """Answered, and billed, after `slow_ms`."""
    slow_ms: int = 60_000
    reset_share: float = 0.0
    """The connection is reset after the work was done and billed: the answer is lost."""
    malformed_share: float = 0.0
    """The second half of the answer's body is missing, in a response that is otherwise well-formed; billed."""
    truncated_share: float = 0.0
    """The connection is closed after half of the body that Content-Length announces; billed."""
    token_loop_share: float = 0.0
    """A NextToken that leads back to the page that gave it."""
    token_endless_share: float = 0.0
    """Each page, the last too, has a NextToken, another one each time, and it leads to the first page again."""
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
    page_points_max: int = 0
    """Above 0: GetMetricData's pages end at so many points, as if 100,800 were many."""
    allowed_metrics_max: int = 0
    """Above 0: GetMetricData answers only so many queries of a call, and says in its Messages that more were asked; all are billed."""
    flood_metrics: int = 0
    """ListMetrics lists so many metrics more, of the names that there are, that nobody has heard of and that have no points."""
    wild_metrics: int = 0
    """ListMetrics lists so many metrics more that have 100 dimensions with values of 10,000 characters."""
    forbidden_accounts: tuple[str, ...] = ()
    """AccessDenied for every CloudWatch call of these accounts; their role can be assumed."""
    denied_roles: tuple[str, ...] = ()
    """AccessDenied for AssumeRole of these accounts."""
    denied_actions: tuple[str, ...] = ()
    """AccessDenied for what matches, as in a policy: cloudwatch:ListMetrics, tag:GetResources, organizations:*."""
    disabled_regions: tuple[str, ...] = ()
    """Regions that no account has enabled: STS says so, the others call the credentials invalid."""
    expired_accounts: tuple[str, ...] = ()
    """ExpiredToken for every call of these accounts, however new their credentials are."""
    expire_after_calls: int = 0
    """Above 0: credentials of AssumeRole hold for so many calls; then they have expired, and new ones hold as long."""
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

    def of(self, account: str) -> Faults:
        """What befalls an account's calls."""
        if not self.only_accounts or account in self.only_accounts:
            return self
        named = ("_accounts", "_roles")
        off: dict[str, Any] = {f.name: f.default for f in fields(self) if not f.name.endswith(named)}
        return replace(self, **off)

    @property
    def of_calls(self) -> bool:
        """Whether any fault is decided call by call."""
        return any(getattr(self, f"{kind}_share") for kind in Fate._fields)

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

    def denies(self, action: str) -> bool:
        """Whether an action, as `cloudwatch:ListMetrics`, is denied to everybody."""
        return any(fnmatchcase(action, pattern) for pattern in self.denied_actions)


class Fate(NamedTuple):
    """What befalls one call."""

    throttle: bool = False
    error: bool = False
    unavailable: bool = False
    slow: bool = False
    reset: bool = False
    malformed: bool = False
    truncated: bool = False
    token_loop: bool = False
    token_endless: bool = False


SPARED: Final = Fate()


def fate_of(faults: Faults, what: bytes, attempt: int) -> Fate:
    """What befalls the call `what` when it was made `attempt` times before. Where a token leads does not depend on that."""

    def befalls(kind: str) -> bool:
        again = 0 if kind.startswith("token_") else attempt
        return happens(getattr(faults, f"{kind}_share"), faults.seed, kind, what, again)

    return Fate(*map(befalls, Fate._fields))


class Flood(Sequence[Metric]):
    """Metrics that a ListMetrics lists beside the true ones, made when they are looked at. `of` are true ones of the namespace."""

    def __init__(self, faults: Faults, of: Sequence[Metric]) -> None:
        self._wild = faults.wild_metrics
        self._of = of
        self._count = faults.wild_metrics + faults.flood_metrics if of else 0

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Metric: ...
    @overload
    def __getitem__(self, at: slice) -> list[Metric]: ...
    def __getitem__(self, at: int | slice) -> Metric | list[Metric]:
        if isinstance(at, slice):
            return [self._made(n) for n in range(self._count)[at]]
        return self._made(range(self._count)[at])

    def _made(self, n: int) -> Metric:
        metric = self._of[n % len(self._of)]
        if n < self._wild:
            return metric._replace(
                dimensions=tuple((f"Wild{k:03}", f"{n}-" + "w" * 10_000) for k in range(100))
            )
        [(name, _), *_] = metric.dimensions
        return metric._replace(dimensions=((name, f"flood-{n}"),))


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
