"""Verdicts about pods that do not exist, and pods that no node takes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from workers.pods.placing import (
    NOTHING,
    Place,
    Room,
    lower,
    nodes_more,
    passing,
    places,
    reasons,
    requests,
    toleration_of,
)
from workers.pods.seen import (
    MIB,
    Object,
    Seen,
    Verdict,
    amount,
    amount_text,
    condition,
    is_unplaced,
    last_event,
    name_of,
    part_of,
    values_key,
)

_SHORT = {"Insufficient cpu": "cpu", "Insufficient memory": "memory"}
_FIELDS = {"cpu": "cpu_m", "memory": "memory_bytes"}
_COMPUTED = re.compile(
    r"Insufficient (cpu|memory)|Too many pods|.*taint|.*(node affinity|node selector)|.*unschedulable|.*[Pp]ersistent[Vv]olume[Cc]laim|.*persistent volume"
)
"""Reasons of the scheduler that have verdicts of their own, with numbers."""
_RESERVED = "node-role.kubernetes.io/"
"""Taints of nodes that run the control plane: nobody wants Headgate there."""


def unmade(deployment: Object, seen: Seen) -> Iterable[Verdict]:
    """Of a Deployment whose pods the API refuses: quota, priority class, or another rule. And of one that somebody has stopped."""
    failure = condition(deployment, "ReplicaFailure")
    if deployment.get("spec", {}).get("replicas") == 0:
        stopped, again = name_of(deployment), "kubectl scale --replicas=1 deployment"
        yield Verdict(stopped, "somebody has stopped it", "spec.replicas is 0", f"{again} {stopped}")
    if failure.get("status") != "True":
        return
    message = str(failure.get("message", ""))
    name, key = name_of(deployment), values_key(deployment)
    if quota := re.search(r"exceeded quota: ([^,]+), requested: (.+), used: (.+), limited: (.+)$", message):
        what = f"its pod is not made: the quota {quota[1]} is used up"
        missing = max(1, int(deployment["status"].get("unavailableReplicas", 1)))
        remedy = _quota_remedy(
            quota[1], _amounts(quota[2]), _amounts(quota[3]), _amounts(quota[4]), missing, key
        )
    elif must := re.search(r"failed quota: ([^:]+): must specify (\S+)", message):
        what = f"its pod is not made: the quota {must[1]} takes only pods that say {must[2]}"
        settings = ", ".join(f"{key}.resources.{resource}" for resource in must[2].split(","))
        remedy = f"set {settings} in the values, or give the namespace a LimitRange with defaults"
    elif priority := re.search(r"no PriorityClass with name (\S+) was found", message):
        what = f"its pod is not made: there is no PriorityClass {priority[1]}"
        others = [name_of(p) for p in seen.priorities if not name_of(p).startswith("system-")]
        instead = f", or set pod.priorityClassName to {' or '.join(others) or 'none'}"
        remedy = f"kubectl create priorityclass {priority[1]} --value=1000{instead}"
    else:
        what = "its pod is not made: the API refuses it"
        remedy = "the message names the rule that refuses it: change the values, or the rule"
    yield Verdict(name, what, message, remedy)


def _amounts(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def _quota_remedy(
    quota: str, asked: dict[str, str], used: dict[str, str], hard: dict[str, str], missing: int, key: str
) -> str:
    raises, lowers = [], []
    for resource in asked.keys() & hard.keys():
        one, now, most = (amount(resource, a[resource]) for a in (asked, used, hard))
        raises.append(f"{resource} to {amount_text(resource, _up(resource, now + missing * one))}")
        kind = resource.rsplit(".", 1)[-1]
        step = MIB if kind == "memory" else 10
        left = max(0, most - now) // missing // step * step
        if kind in ("cpu", "memory") and left:
            which = "limits" if resource.startswith("limits.") else "requests"
            lowers.append(f"{key}.resources.{which}.{kind} to {amount_text(kind, left)}")
    remedy = f"raise {', '.join(sorted(raises))} in the quota {quota}"
    return f"{remedy}, or lower {', '.join(sorted(lowers))}" if lowers else remedy


def _up(resource: str, value: int) -> int:
    return -(-value // MIB) * MIB if resource.endswith("memory") else value


def unplaced(pod: Object, seen: Seen) -> list[Verdict]:
    """Of a pod that the scheduler has looked at: every obstacle with its remedy, one verdict each."""
    name, placed = name_of(pod), condition(pod, "PodScheduled")
    message = _of_nodes(str(placed.get("message", "")))
    if placed.get("reason") == "SchedulingGated":
        gates = ", ".join(g["name"] for g in pod["spec"].get("schedulingGates", ()))
        return [
            Verdict(
                name, "it is held back by a gate", message, f"whoever set {gates or 'the gate'} takes it away"
            )
        ]
    said = reasons(message)
    found = list(_claims(pod, seen, message))
    if seen.nodes:
        around = places(pod, seen.nodes, seen.others)
        found += _selectors(name, around, message)
        found += _cordoned(name, around, message)
        found += _shortages(pod, around, said, seen, message)
        found += _taints(pod, around, message, alone=not found)
    found += [
        Verdict(name, f"no node takes it: {r}", message, _other(r)) for r in said if not _COMPUTED.match(r)
    ]
    if not found:
        looked = "" if seen.nodes else "; the nodes could not be looked at"
        remedy = (
            f"kubectl describe pod {name} has what the scheduler tried"
            if seen.nodes
            else "let the doctor list nodes, and the pods of all namespaces: then it says how much is missing"
        )
        found = [
            Verdict(name, f"no node takes it{looked}", message or "the scheduler has said nothing", remedy)
        ]
    return found


def _of_nodes(message: str) -> str:
    """Without what the scheduler says of preemption, which is `not found` where it did not try."""
    return re.sub(r" (preemption: .*|not found)$", "", message)


def _other(reason: str) -> str:
    if "topology spread" in reason:
        label = "give the nodes the labels topology.kubernetes.io/zone and kubernetes.io/hostname"
        add = label if "missing required label" in reason else "add a node where none of these pods is"
        return f"set pod.spread to ScheduleAnyway, or {add}"
    if "affinity" in reason:
        return "change pod.affinity, or add a node that it allows"
    if "free ports" in reason:
        return "another pod has this port of the node: the chart asks for none, so who changed the pod has to change it back"
    if "volume" in reason:
        return "the volume is in another zone than the nodes with room: add a node in its zone, or delete the claim"
    return "the scheduler's words name what is missing: kubectl describe node has what there is"


# --- nodes ----------------------------------------------------------------------------------------------------


def _taints(pod: Object, around: Sequence[Place], message: str, *, alone: bool) -> Iterable[Verdict]:
    """`alone`: nothing else is known to be wrong, so that what does not help much is said as well."""
    name, ask = name_of(pod), requests(pod)
    tainted = [p for p in around if p.taints and not p.unmet and not p.cordoned]
    unwell = [p for p in tainted if any(passing(t) for t in p.taints)]
    for key in dict.fromkeys(str(t["key"]) for p in unwell for t in p.taints if passing(t)):
        ill = [p for p in unwell if any(t["key"] == key for t in p.taints)]
        remedy = f"heal the node rather than tolerate it: kubectl describe node {ill[0].name}"
        yield Verdict(name, f"a node is not well: {_names(ill)} has {key}", message, remedy)
    groups: dict[str, list[Place]] = {}
    for p in tainted:
        if not any(passing(t) for t in p.taints):
            groups.setdefault(", ".join(sorted(toleration_of(t) for t in p.taints)), []).append(p)
    for tolerations, group in groups.items():
        room = sum(p.free.holds(ask) for p in group)
        reserved = all(str(t["key"]).startswith(_RESERVED) for t in group[0].taints)
        if not alone and (reserved or not room):
            continue
        nodes = _names(group)
        marks = ", ".join(sorted({f"{t['key']}={t.get('value', '')}:{t['effect']}" for t in group[0].taints}))
        yield Verdict(
            name,
            f"it does not tolerate the taint of {nodes}: {marks}",
            message,
            f"pod.tolerations: [{tolerations}], where {nodes} may run Headgate (there is room for {room} such pods); "
            "or add nodes without the taint",
        )


def _selectors(name: str, around: Sequence[Place], message: str) -> Iterable[Verdict]:
    if not around or not all(p.unmet for p in around):
        return  # some node is what is asked for, and has another obstacle
    for asked in dict.fromkeys(u for p in around for u in p.unmet):
        key = re.split(r"[= ]", asked, maxsplit=1)[0]
        have = sorted({v for p in around if (v := p.node["metadata"].get("labels", {}).get(key))})
        there = f"nodes have {key} {', '.join(have)}" if have else f"no node has a label {key}"
        first = around[0].name
        fix = f"kubectl label node {first} {asked}" if "=" in asked else f"label a node so ({first}?)"
        yield Verdict(
            name,
            f"no node is what it asks for: {asked}",
            f"{message} ({there})",
            f"{fix}, or change pod.nodeSelector or pod.affinity",
        )


def _cordoned(name: str, around: Sequence[Place], message: str) -> Iterable[Verdict]:
    shut = [p for p in around if p.cordoned and not p.taints and not p.unmet]
    if shut and not any(p.open for p in around):
        nodes = _names(shut)
        yield Verdict(
            name,
            f"{nodes}: closed for new pods (cordoned)",
            message,
            f"kubectl uncordon {shut[0].name}, or add nodes",
        )


def _shortages(
    pod: Object, around: Sequence[Place], said: dict[str, int], seen: Seen, message: str
) -> Iterable[Verdict]:
    usable = [p for p in around if p.open]
    short = [r for reason, r in _SHORT.items() if reason in said]
    if not usable or not (short or "Too many pods" in said):
        return
    ask, key = requests(pod), values_key(pod)
    best = max(usable, key=lambda p: (p.size.holds(ask), p.size.cpu_m, p.size.memory_bytes))
    free = max(usable, key=lambda p: min(_ratio(p.free, ask)))
    waiting = [requests(p) for p in seen.pods if is_unplaced(p)]
    more = nodes_more(waiting, [p.free for p in usable], best.size)
    scale = (
        f"a node has to have {ask} for pods: these have {best.size} even when empty"
        if more is None
        else f"scale the node group to {len(usable) + more} nodes of the same size ({best.size} for pods)"
    )
    family = [
        p for p in seen.pods if part_of(p) == part_of(pod) and not p["metadata"].get("deletionTimestamp")
    ]
    theirs: dict[str, Room] = {}
    for one in family:
        if node := one["spec"].get("nodeName"):
            theirs[node] = theirs.get(node, NOTHING) + requests(one)
    rooms = [p.free + theirs.get(p.name, NOTHING) for p in usable]
    less = lower(ask, len(family), rooms, [_FIELDS[r] for r in short]) if short else None
    down = (
        f"lower {_settings(key, less, short)}, and all {len(family)} {part_of(pod)} pods fit" if less else ""
    )
    down += _warning(less, family, seen) if less and "memory" in short else ""
    yield Verdict(
        name_of(pod),
        f"no node has the {' and '.join(short) or 'room for another pod'} that it asks for: {ask}",
        f"{message} Most is free on {free.name}: {free.free}, of {free.size}.",
        "; or ".join(filter(None, (down, scale))),
    )


def _ratio(room: Room, ask: Room) -> tuple[float, float]:
    return room.cpu_m / max(1, ask.cpu_m), room.memory_bytes / max(1, ask.memory_bytes)


def _settings(key: str, less: Room, short: Sequence[str]) -> str:
    parts = []
    for resource in short:
        text = amount_text(resource, getattr(less, _FIELDS[resource]))
        parts.append(f"{key}.resources.requests.{resource} to {text}")
        if resource == "memory":  # the chart's request and limit are one number: what is above it is killed
            parts.append(f"{key}.resources.limits.memory to {text}")
    return " and ".join(parts)


def _warning(less: Room, family: Sequence[Object], seen: Seen) -> str:
    names = {name_of(p) for p in family}
    used = [u.working_set_bytes for (pod, _), u in seen.usage.items() if pod in names and u.working_set_bytes]
    if used and max(used) > less.memory_bytes * 0.8:
        return f" (too little, though: one of them uses {amount_text('memory', max(used))})"
    return ""


def _names(around: Iterable[Place]) -> str:
    names = [p.name for p in around]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- claims ---------------------------------------------------------------------------------------------------


def _claims(pod: Object, seen: Seen, message: str) -> Iterable[Verdict]:
    claims = {name_of(c): c for c in seen.claims}
    for volume in pod["spec"].get("volumes", ()):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is None:
            continue
        if claim not in claims:
            if "claim" in message.lower():
                yield Verdict(
                    name_of(pod), f"its volume claim {claim} is not there", message, f"make the claim {claim}"
                )
        elif claims[claim].get("status", {}).get("phase") != "Bound":
            why, remedy = _unbound(claims[claim], seen)
            heard = last_event(
                seen.events,
                "PersistentVolumeClaim",
                claim,
                {"ProvisioningFailed", "FailedBinding", "ExternalProvisioning", "WaitForFirstConsumer"},
            )
            evidence = f"{message} {claim}: {heard}" if heard else message
            yield Verdict(name_of(pod), f"its volume claim {claim} is not bound: {why}", evidence, remedy)


def _unbound(claim: Object, seen: Seen) -> tuple[str, str]:
    """Why, and the remedy."""
    spec = claim["spec"]
    ask = spec["resources"]["requests"]["storage"]
    default = "storageclass.kubernetes.io/is-default-class"
    classes = {name_of(c): c for c in seen.classes}
    defaults = [n for n, c in classes.items() if c["metadata"].get("annotations", {}).get(default) == "true"]
    named = spec.get("storageClassName")
    there = ", ".join(sorted(classes)) or "none"
    if named is None and not defaults:
        return (
            f"it names no StorageClass, and none is the default (there: {there})",
            f"name one in the claim, or annotate one: kubectl annotate storageclass NAME {default}=true",
        )
    if (
        named
        and named not in classes
        and not any(v["spec"].get("storageClassName") == named for v in seen.volumes)
    ):
        return (
            f"there is no StorageClass {named} (there: {there})",
            f"make {named}, or the claim anew with a class that is there: a claim's class cannot be changed",
        )
    provisioner = str(classes.get(named or "", {}).get("provisioner", "kubernetes.io/no-provisioner"))
    if provisioner != "kubernetes.io/no-provisioner":
        return (
            f"{provisioner} has not made a volume of {ask}",
            f"see whether the driver {provisioner} runs (kubectl get csidrivers, pods of kube-system) and may make volumes",
        )
    free = [
        v
        for v in seen.volumes
        if v.get("status", {}).get("phase") == "Available"
        and v["spec"].get("storageClassName", "") == (named or "")
    ]
    modes = set(spec.get("accessModes", ()))
    fitting = [v for v in free if modes <= set(v["spec"].get("accessModes", ()))]
    if not fitting:
        ways = f" with {', '.join(sorted(modes))}" if free else ""
        return (
            f"no volume of the class {named or '(none)'} is free{ways}, and none is made by itself",
            f"make a PersistentVolume of {ask}, or use a class with a provisioner",
        )
    most = max(fitting, key=lambda v: amount("storage", v["spec"]["capacity"]["storage"]))
    size = most["spec"]["capacity"]["storage"]
    return (
        f"it asks for {ask}, and the greatest free volume of the class {named or '(none)'} is {name_of(most)} with {size}",
        f"make a PersistentVolume of {ask}, or the claim anew with at most {size}",
    )
