"""What of a release was seen, what is said of it, and how Kubernetes' objects are read. Pure; objects are as the API gives them in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightkube.utils.quantity import parse_quantity

Object = Mapping[str, Any]
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that is wrong with one pod; `pod` is a Deployment's name where it has none."""

    pod: str
    what: str
    evidence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a container: memory that it cannot give back (working set), and the share of its periods in which its CPU limit stopped it."""

    working_set_bytes: int | None = None
    throttled_share: float | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """The release and what surrounds it. What no verdict needs may be left out."""

    pods: Sequence[Object] = ()
    deployments: Sequence[Object] = ()
    events: Sequence[Object] = ()
    """Of the namespace."""
    nodes: Sequence[Object] = ()
    others: Sequence[Object] = ()
    """All pods of the cluster that have not ended, these included."""
    claims: Sequence[Object] = ()
    volumes: Sequence[Object] = ()
    classes: Sequence[Object] = ()
    """StorageClasses."""
    priorities: Sequence[Object] = ()
    """PriorityClasses."""
    usage: Mapping[tuple[str, str], Usage] = field(default_factory=dict)
    """By pod and container."""
    logs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The last lines of a pod's log, by pod."""
    shards: Mapping[str, Any] | None = None
    """The coordinator's /shards."""
    unseen: Sequence[str] = ()
    """What could not be looked at, and why."""


def name_of(thing: Object) -> str:
    return str(thing["metadata"]["name"])


def label(thing: Object, key: str) -> str:
    """Empty where it has none."""
    return str(thing["metadata"].get("labels", {}).get(key, ""))


def part_of(thing: Object) -> str:
    """coordinator, exporter, consumer-<sink>, remote-writer, setup."""
    return label(thing, "app.kubernetes.io/component")


def values_key(thing: Object) -> str:
    """Where values.yaml has this part: `exporter`, `sinks.postgres`."""
    part = part_of(thing)
    if part == "remote-writer":
        return "sinks.remoteWrite"
    return "sinks." + part.removeprefix("consumer-") if part.startswith("consumer-") else part


def condition(thing: Object, kind: str) -> Object:
    """Of `status.conditions`; empty where there is none of that type."""
    return next((c for c in thing.get("status", {}).get("conditions", ()) if c["type"] == kind), {})


def is_ready(pod: Object) -> bool:
    return condition(pod, "Ready").get("status") == "True"


def is_unplaced(pod: Object) -> bool:
    """The scheduler has looked at it and found no node."""
    return pod["status"].get("phase") == "Pending" and condition(pod, "PodScheduled").get("status") == "False"


def last_event(events: Sequence[Object], kind: str, name: str, reasons: set[str]) -> str:
    """The newest message of these reasons about one object; empty where there is none."""
    found = [
        e
        for e in events
        if e.get("reason") in reasons
        and (e["involvedObject"].get("kind"), e["involvedObject"].get("name")) == (kind, name)
    ]
    return str(max(found, key=_when).get("message", "")) if found else ""


def _when(event: Object) -> str:
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp", "")
    )


def amount(resource: str, text: object) -> int:
    """A quantity, rounded up: bytes of memory and storage; thousandths of everything else (`250m` CPU is 250, 3 pods are 3000)."""
    thousandths = -int(-(parse_quantity(str(text)) or 0) * 1000 // 1)
    return -(-thousandths // 1000) if _in_bytes(resource) else thousandths


def amount_text(resource: str, value: int) -> str:
    """As a manifest has it: `2`, `250m`, `2Gi`, `384Mi`. Memory and storage are rounded down to MiB."""
    if not _in_bytes(resource):
        return f"{value}m" if value % 1000 else str(value // 1000)
    mib = value // MIB
    return f"{mib // 1024}Gi" if mib and mib % 1024 == 0 else f"{mib}Mi"


def _in_bytes(resource: str) -> bool:
    return resource.endswith(("memory", "storage"))
