"""Why no node takes a pod, and what would change that. Pure: Kubernetes' objects in, as its API gives them in JSON.

* The scheduler says *that* a pod does not fit, and how many nodes have which obstacle. The numbers are computed here, by the scheduler's own
  arithmetic: requests against what is allocatable, less the requests of the pods that are there.
* A remedy is computed for the nodes that nothing else keeps from taking the pod, and counts all pods of its part: they share the request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workers.pods.seen import MIB, Object, amount, amount_text

ROOMS_MAX = 100
"""As many nodes are looked at for a lower request, the emptiest first."""
_PASSING_TAINTS = "node.kubernetes.io/"
"""Kubernetes sets these itself while a node is not well; nobody should tolerate them to be scheduled."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a pod asks for, or a node has: CPU in thousandths of a core, memory, and pods."""

    cpu_m: int
    memory_bytes: int
    pods: int = 1

    def __add__(self, other: Room) -> Room:
        return Room(self.cpu_m + other.cpu_m, self.memory_bytes + other.memory_bytes, self.pods + other.pods)

    def __sub__(self, other: Room) -> Room:
        return Room(self.cpu_m - other.cpu_m, self.memory_bytes - other.memory_bytes, self.pods - other.pods)

    def holds(self, one: Room) -> int:
        """How many of `one` fit."""
        pairs = ((self.cpu_m, one.cpu_m), (self.memory_bytes, one.memory_bytes), (self.pods, one.pods))
        return max(0, min(have // ask if ask else self.pods for have, ask in pairs))

    def __str__(self) -> str:
        return f"{amount_text('cpu', self.cpu_m)} CPU and {amount_text('memory', self.memory_bytes)}"


NOTHING = Room(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Place:
    """A node, as one pod sees it."""

    name: str
    node: Object
    size: Room
    """Of an empty one: allocatable, less what DaemonSets ask for."""
    free: Room
    taints: tuple[Object, ...]
    """That the pod does not bear."""
    unmet: tuple[str, ...]
    """What of the pod's selector and affinity it does not meet, as text."""
    cordoned: bool

    @property
    def open(self) -> bool:
        """Only room can be missing here."""
        return not (self.taints or self.unmet or self.cordoned)


def room_of(resources: Mapping[str, Any], pods: int = 1) -> Room:
    return Room(
        amount("cpu", resources.get("cpu", 0)),
        amount("memory", resources.get("memory", 0)),
        int(resources.get("pods", pods)),
    )


def requests(pod: Object) -> Room:
    """What the scheduler counts for this pod: its containers together, or its greatest init container, and its overhead."""
    spec = pod["spec"]

    def asked(containers: Iterable[Object]) -> list[Room]:
        return [room_of(c.get("resources", {}).get("requests", {}), pods=0) for c in containers]

    inits = spec.get("initContainers", ())
    together = sum(
        asked([*spec["containers"], *(c for c in inits if c.get("restartPolicy") == "Always")]), NOTHING
    )
    alone = asked(c for c in inits if c.get("restartPolicy") != "Always")
    most = Room(max(r.cpu_m for r in (together, *alone)), max(r.memory_bytes for r in (together, *alone)), 1)
    return most + room_of(spec.get("overhead", {}), pods=0)


def places(pod: Object, nodes: Iterable[Object], pods: Iterable[Object]) -> list[Place]:
    """Every node as `pod` sees it; `pods` are all pods of the cluster that have not ended."""
    used: dict[str, Room] = {}
    always: dict[str, Room] = {}
    for other in pods:
        if node := other["spec"].get("nodeName"):
            ask = requests(other)
            used[node] = used.get(node, NOTHING) + ask
            if any(o.get("kind") == "DaemonSet" for o in other["metadata"].get("ownerReferences", ())):
                always[node] = always.get(node, NOTHING) + ask
    found = []
    for node in nodes:
        name = node["metadata"]["name"]
        allocatable = room_of(node.get("status", {}).get("allocatable", {}), pods=110)
        cordoned = bool(node["spec"].get("unschedulable"))
        tolerations = pod["spec"].get("tolerations", ())
        taints = tuple(
            t
            for t in node["spec"].get("taints", ())
            if t["effect"] != "PreferNoSchedule"
            and not any(_tolerates(toleration, t) for toleration in tolerations)
            and not (cordoned and t["key"] == "node.kubernetes.io/unschedulable")
        )
        size = allocatable - always.get(name, NOTHING)
        free = allocatable - used.get(name, NOTHING)
        found.append(Place(name, node, size, free, taints, tuple(_unmet(pod, node)), cordoned))
    return found


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("key") not in (None, "", taint["key"]):
        return False
    exists = toleration.get("operator", "Equal") == "Exists"
    return exists or bool(toleration.get("value", "") == taint.get("value", "") and toleration.get("key"))


def toleration_of(taint: Object) -> str:
    """To paste into `pod.tolerations`."""
    if value := taint.get("value"):
        return f"{{key: {taint['key']}, operator: Equal, value: {value}, effect: {taint['effect']}}}"
    return f"{{key: {taint['key']}, operator: Exists, effect: {taint['effect']}}}"


def passing(taint: Object) -> bool:
    """Kubernetes' own mark of a node that is not well."""
    return str(taint["key"]).startswith(_PASSING_TAINTS)


def _unmet(pod: Object, node: Object) -> Iterable[str]:
    labels = node["metadata"].get("labels", {})
    for key, value in pod["spec"].get("nodeSelector", {}).items():
        if labels.get(key) != value:
            yield f"{key}={value}"
    affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", ())
    misses = [_misses(term, labels, node["metadata"]["name"]) for term in terms]
    if misses and all(misses):
        yield " or ".join(dict.fromkeys(" and ".join(m) for m in misses))


def _misses(term: Object, labels: Mapping[str, str], name: str) -> list[str]:
    asked = [(e, labels) for e in term.get("matchExpressions", ())]
    asked += [(e, {"metadata.name": name}) for e in term.get("matchFields", ())]
    return [
        f"{e['key']} {e['operator']} {', '.join(e.get('values', ()))}".rstrip()
        for e, have in asked
        if not _matches(e, have)
    ]


def _matches(expression: Object, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values", ())
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case _:
            return value is not None and int(value) < int(values[0])


def reasons(message: str) -> dict[str, int]:
    """What the scheduler found, and on how many nodes; 0 where it gives no number. What it says of preemption is left out."""
    said = message.split(" preemption: ")[0].split(" are available: ", 1)[-1].rstrip(". ")
    found: dict[str, int] = {}
    for part in re.split(r", (?=\d+ )", said):
        counted = re.fullmatch(r"(\d+) (.+)", part)
        found[counted[2] if counted else part] = int(counted[1]) if counted else 0
    return found


def lower(request: Room, total: int, rooms: Sequence[Room], short: Sequence[str]) -> Room | None:
    """The greatest request, lower in `short` (fields of Room), with which `total` pods fit into `rooms`; None where none is worth it.

    `rooms` are what these pods may share: what is free, and what they have now. Rounded down to 10 thousandths of a core and a MiB.
    """
    steps = {"cpu_m": 10, "memory_bytes": MIB}
    candidates = set()
    rooms = sorted(rooms, key=lambda r: (r.cpu_m, r.memory_bytes), reverse=True)[:ROOMS_MAX]
    for room in rooms:
        for each in range(1, total + 1):
            parts = {r: getattr(room, r) // each // steps[r] * steps[r] for r in short}
            candidates.add(replace(request, **{r: min(v, getattr(request, r)) for r, v in parts.items()}))
    for one in sorted(candidates, key=lambda c: (c.cpu_m, c.memory_bytes), reverse=True):
        if one == request or any(getattr(one, r) < steps[r] for r in short):
            continue
        if sum(room.holds(one) for room in rooms) >= total:
            return one
    return None


def nodes_more(waiting: Sequence[Room], free: Sequence[Room], size: Room) -> int | None:
    """So many nodes more of `size` take all that waits; None where one of it does not fit even an empty one. First fit, the greatest first."""
    left, more = list(free), 0
    for ask in sorted(waiting, key=lambda a: (a.cpu_m, a.memory_bytes), reverse=True):
        if not size.holds(ask):
            return None
        for index, room in enumerate(left):
            if room.holds(ask):
                left[index] = room - ask
                break
        else:
            left.append(size - ask)
            more += 1
    return more
