"""A resource, what one look at an account's resources said, and how long a resource was what it was.

Guarantees:

* what is not known is None or empty, never a guess;
* a `Look` is the whole of its scope or none of it: one that failed says why and has no resources, so that nobody takes a part for the whole;
* texts are cleaned and bounded when a look is made (`Look.whole`), so that what is stored is what was compared.

Times (`*_s`) are whole seconds since the epoch, UTC; intervals are half-open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Final

import orjson

from ingest.errors import Rejected

RESOURCES_MAX: Final = 500_000
"""Of one scope: a list of more is refused as a whole."""
TEXT_MAX: Final = 2_048
"""Characters. AWS's longest, an ARN, has as many."""
TAGS_MAX: Final = 64
"""AWS allows 50."""
ATTACHED_MAX: Final = 64
"""A volume can be attached to 16 instances."""


class State(StrEnum):
    """What a resource is doing, in words that are the same for all services: AWS's own change with every backup."""

    RUNNING = "running"
    STARTING = "starting"
    STOPPED = "stopped"
    STANDBY = "standby"
    """Of an auto-scaling group, and out of service on purpose: standby, or in its warm pool."""
    DETACHED = "detached"
    """A volume that no instance has."""
    FAILED = "failed"
    TERMINATED = "terminated"
    """It is gone, and AWS lists it for a while yet. Never stored: the span before ends."""
    UNKNOWN = ""


class Role(StrEnum):
    """Its part in a database or cache of several instances."""

    WRITER = "writer"
    READER = "reader"
    """Of a cluster: it answers queries, and may become the writer."""
    REPLICA = "replica"
    """Of another instance."""
    NONE = ""


@dataclass(frozen=True, slots=True, order=True)
class Scope:
    """What one look is about: a service of an account and region."""

    account: str
    region: str
    service: str
    """Our slug, as in shard_config/services."""

    def __str__(self) -> str:
        return f"{self.account}/{self.region} {self.service}"


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource, as it was seen. Sizes are of all of its nodes together."""

    account: str
    region: str
    service: str
    id: str
    """The value of the dimension that its metrics have, as i-0123… of InstanceId."""
    arn: str = ""
    type: str = ""
    """As AWS calls it: m7g.large, db.m7g.large, cache.r7g.large, gp3, PAY_PER_REQUEST."""
    engine: str = ""
    """Of databases and caches: postgres, aurora-mysql, redis."""
    purchase: str = ""
    """"spot", "capacity-block" or "scheduled", where AWS says that it is none on demand."""
    vcpu: int | None = None
    memory_bytes: int | None = None
    """Of a Lambda function: of one execution."""
    nodes: int | None = None
    storage_bytes: int | None = None
    """Allocated. None where storage grows by itself, as Aurora's."""
    storage_max_bytes: int | None = None
    """To what storage autoscaling may take it; None: it is off."""
    iops: int | None = None
    throughput_bytes_per_s: int | None = None
    read_units: int | None = None
    write_units: int | None = None
    """Provisioned capacity a second, as DynamoDB's."""
    state: State = State.UNKNOWN
    state_since_s: int | None = None
    created_s: int | None = None
    group: str = ""
    """The auto-scaling group, fleet, cluster or replication group that it belongs to, as asg:web, fleet:fleet-1, cluster:orders."""
    attached_to: tuple[str, ...] = ()
    """Of a volume: its instances. Sorted."""
    role: Role = Role.NONE
    multi_az: bool | None = None
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def scope(self) -> Scope:
        return Scope(self.account, self.region, self.service)

    @property
    def scaled(self) -> bool:
        """Whether a group or fleet decides on how many of it there are."""
        return self.group.startswith(("asg:", "fleet:"))


@dataclass(frozen=True, slots=True)
class Look:
    """What a source said of a scope at `at_s`: all of its resources, or why they are not known."""

    scope: Scope
    source: str
    at_s: int
    resources: tuple[Resource, ...] = ()
    failure: str = ""
    """Empty: the list is whole."""
    lacks: tuple[str, ...] = ()
    """What the list does without, as permissions that are missing: each a sentence."""
    empty_is_doubtful: bool = False
    """An empty list may as well mean that the source does not see the scope: where something is known, it counts as failed."""

    @classmethod
    def whole(
        cls,
        scope: Scope,
        source: str,
        at_s: int,
        resources: Iterable[Resource],
        lacks: Iterable[str] = (),
        *,
        empty_is_doubtful: bool = False,
    ) -> Look:
        """A complete list. Raises Rejected where it is too long, is of another scope, or has an id twice with different words."""
        found: dict[str, Resource] = {}
        for one in map(cleaned, resources):
            if one.scope != scope or not one.id:
                raise Rejected(f"inventory {scope}", "malformed", f"{one.scope} {one.id!r} is among them")
            if found.setdefault(one.id, one) != one:
                raise Rejected(f"inventory {scope}", "malformed", f"{one.id} is there twice")
        if len(found) > RESOURCES_MAX:
            raise Rejected(f"inventory {scope}", "too_large", f"more than {RESOURCES_MAX:,} resources")
        said = tuple(sorted(set(map(_text, lacks))))
        return cls(scope, source, at_s, tuple(found.values()), "", said, empty_is_doubtful)

    @classmethod
    def failed(cls, scope: Scope, source: str, at_s: int, failure: str) -> Look:
        return cls(scope, source, at_s, failure=_text(failure) or "it failed")


# --- history ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """[from_s, to_s), in which nothing about a resource changed.

    `seen_s` is when it was first seen so; what lies before is inferred from the times that AWS gave (created, stopped since …) and the size that it had
    when it was first seen.
    """

    from_s: int
    to_s: int
    seen_s: int
    resource: Resource


@dataclass(frozen=True, slots=True)
class Lived:
    """A resource over a range: at least one span, in order, clipped to the range."""

    spans: tuple[Span, ...]
    born_s: int | None
    """When it was created, else when it was first seen; None: before the first look, nobody knows when."""
    gone_s: int | None
    """When it went, if it did before the range's end: the look that missed it first, or AWS's own word."""

    @property
    def last(self) -> Resource:
        """As it was at the end of the range, or of its life."""
        return self.spans[-1].resource

    @property
    def lived_s(self) -> int:
        """Seconds that it lived within the range."""
        return sum(span.to_s - span.from_s for span in self.spans)

    def in_state_s(self, *states: State) -> int:
        """Seconds that it was in one of these states."""
        return sum(span.to_s - span.from_s for span in self.spans if span.resource.state in states)

    def at(self, at_s: int) -> Resource | None:
        """What it was at a time; None where it did not live then, or the time is out of the range."""
        return next((span.resource for span in self.spans if span.from_s <= at_s < span.to_s), None)


# --- texts --------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """A text that PostgreSQL's jsonb takes: no NUL, no half of a surrogate pair, of a bounded length."""
    text = str(value)[:TEXT_MAX]
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def cleaned(resource: Resource) -> Resource:
    """The same resource with texts, tags and attachments as they are stored."""
    texts: dict[str, Any] = {name: _text(getattr(resource, name)).strip() for name in _TEXTS}
    tags = {_text(key): _text(value) for key, value in sorted(resource.tags.items())[:TAGS_MAX]}
    attached = tuple(sorted({_text(one) for one in resource.attached_to})[:ATTACHED_MAX])
    return replace(resource, **texts, tags=tags, attached_to=attached)


_KEYS: Final = ("account", "region", "service", "id")
_TEXTS: Final = (*_KEYS, "arn", "type", "engine", "purchase", "group")
_DEFAULTS: Final[Mapping[str, Any]] = {
    f.name: f.default if f.default is not MISSING else {} for f in fields(Resource) if f.name not in _KEYS
}


def encode(resource: Resource) -> str:
    """All but the identity, as JSON; what is not known is left out."""
    known = {
        name: value for name, default in _DEFAULTS.items() if (value := getattr(resource, name)) != default
    }
    return orjson.dumps(known).decode()


def decode(scope: Scope, id_: str, attributes: str) -> Resource:
    """The inverse of `encode`; what a newer version wrote beside is left out. Raises Rejected where it is none."""
    try:
        found = {name: value for name, value in orjson.loads(attributes).items() if name in _DEFAULTS}
        for name, made in (("state", State), ("role", Role), ("attached_to", tuple)):
            if name in found:
                found[name] = made(found[name])
        return Resource(scope.account, scope.region, scope.service, id_, **found)
    except (ValueError, TypeError, AttributeError) as error:
        raise Rejected(f"inventory {scope} {id_}", "spoilt", f"{error}") from error


def by_scope(resources: Iterable[Resource]) -> Iterator[tuple[Scope, list[Resource]]]:
    """Resources of each scope, in the scopes' order."""
    found: dict[Scope, list[Resource]] = {}
    for one in resources:
        found.setdefault(one.scope, []).append(one)
    yield from sorted(found.items())
