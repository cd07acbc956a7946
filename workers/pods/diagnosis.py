"""What is wrong with a release's pods, and what to do. Pure: what the Kubernetes API said in, verdicts out.

* Each verdict names the pod, what is wrong in plain words, the evidence (the cluster's own words and numbers), and a remedy that can be pasted
  or counted: a request, a number of nodes, a toleration.
* What could not be looked at is not called fine: the report says what that was.
* A pod has the verdicts of the first stage that it does not pass: made, placed, started, kept alive, ready. What comes later follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from workers.pods.pending import unmade, unplaced
from workers.pods.seen import (
    MIB,
    Object,
    Seen,
    Usage,
    Verdict,
    amount,
    amount_text,
    is_ready,
    is_unplaced,
    label,
    last_event,
    name_of,
    part_of,
    values_key,
)

STARTING = timedelta(seconds=120)
"""So long a pod may take to be ready: the chart's startup probe allows as much."""
RECENTLY = timedelta(hours=24)
"""A container that was killed longer ago, and runs since, is no news."""
THROTTLED_SHARE = 0.05
"""Of a container's periods (100 ms). Below it, a limit is not what slows it down."""
ROOM_AFTER_OOM = 1.5
"""How much it wanted is not known: only that the limit was too little."""
_STEP_BYTES = 64 * MIB
_PULLS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_MISCONFIGURED = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_EXITS = {
    1: "it failed",
    2: "its command line or headgate.yaml is wrong",
    3: "it stopped for safety: going on could lose data",
    126: "its command cannot be run",
    127: "its command is not in the image",
    137: "it was killed, or took too long to stop",
}
_STOPPED = (0, 137, 143)
"""How it ends when the kubelet asks it to: in good order, killed after its grace period, or by the signal itself."""
_PROBED_REMEDY = (
    "its loop stood still, it could not reach Kafka to start, or its node has no CPU left: see the evidence"
)
_IMAGE_REMEDIES = (
    (
        ("not found", "manifest unknown", "notfound"),
        "push the image, or correct image.repository and image.tag",
    ),
    (
        ("unauthorized", "denied", "forbidden", "authorization"),
        "name a Secret for the registry in image.pullSecrets",
    ),
    (
        ("no such host", "timeout", "refused", "unreachable"),
        "let the nodes reach the registry, or mirror the image",
    ),
    (("invalid", "parse"), "correct image.repository, image.tag and image.digest"),
    (
        ("pull policy of never",),
        "set image.pullPolicy to IfNotPresent, or load the image on each node (ctr --namespace k8s.io images import)",
    ),
)
_UNMADE_REMEDIES = (
    (
        ("secret", "configmap"),
        "make the Secret or ConfigMap that the message names, with the key, or correct secretEnv and secretFiles",
    ),
    (("non-root", "runasnonroot"), "set pod.runAsUser to another number than 0: Headgate needs no root"),
    (
        ("no such file", "executable file not found", "exec format", "permission denied"),
        "the image is not Headgate's, or of another architecture than the node: see image.repository and image.tag",
    ),
)
_UNREADY = {
    "exporter": "it owns no slots",
    "coordinator": "it has announced no plan",
    "setup": "setup has not ended",
}


@dataclass(frozen=True, slots=True)
class Report:
    """What to tell."""

    verdicts: tuple[Verdict, ...]
    fine: tuple[str, ...]
    """Pods that are ready, or have done their work."""
    starting: tuple[str, ...]
    """Pods that are not ready, and younger than STARTING."""
    unseen: tuple[str, ...]
    """What could not be looked at, and why."""


def diagnose(seen: Seen, now: datetime) -> Report:
    """Everything that is wrong at `now` (with a time zone)."""
    verdicts = [v for deployment in seen.deployments for v in unmade(deployment, seen)]
    fine: list[str] = []
    starting: list[str] = []
    for pod in sorted(seen.pods, key=name_of):
        leaving = pod["metadata"].get("deletionTimestamp")
        found = list(_not_gone(pod, leaving, now)) if leaving else _of_pod(pod, seen, now)
        verdicts += found
        if leaving:
            continue  # neither fine nor starting: another one is made in its place
        if not found:
            done = is_ready(pod) or pod["status"].get("phase") == "Succeeded"
            (fine if done else starting).append(name_of(pod))
    return Report(tuple(verdicts), tuple(fine), tuple(starting), tuple(seen.unseen))


def wants_log(pod: Object) -> bool | None:
    """Whether the last lines of its log say more. None: no. True: those before its last restart. False: those of now."""
    for status in _statuses(pod):
        if _waiting(status) == "CrashLoopBackOff":
            return True
        if status.get("state", {}).get("terminated", {}).get("exitCode"):
            return False
    return False if pod["status"].get("phase") == "Running" and not is_ready(pod) else None


def limits_cpu(pod: Object) -> bool:
    return any("cpu" in c.get("resources", {}).get("limits", {}) for c in pod["spec"]["containers"])


def _of_pod(pod: Object, seen: Seen, now: datetime) -> list[Verdict]:
    if pod["status"].get("reason") == "Evicted":
        return [_evicted(pod)]
    if is_unplaced(pod):
        return unplaced(pod, seen)
    for found in (
        list(_not_started(pod, seen, now)),
        list(_killed(pod, seen, now)),
        list(_throttled(pod, seen)),
        list(_not_ready(pod, seen, now)),
    ):
        if found:
            return found
    return []


def _statuses(pod: Object) -> list[Object]:
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]


def _waiting(status: Object) -> str:
    return str(status.get("state", {}).get("waiting", {}).get("reason", ""))


def _limit(pod: Object, container: str, kind: str) -> str | None:
    for one in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
        if one["name"] == container:
            value = one.get("resources", {}).get("limits", {}).get(kind)
            return None if value is None else str(value)
    return None


def _young(pod: Object, now: datetime) -> bool:
    since = pod["status"].get("startTime") or pod["metadata"]["creationTimestamp"]
    return now - datetime.fromisoformat(since) < STARTING


def _not_gone(pod: Object, due: str, now: datetime) -> Iterable[Verdict]:
    """It should have ended at `due`; Recreate, as shards have it, makes no new version of a pod before the old one is gone."""
    late_s = (now - datetime.fromisoformat(due)).total_seconds()
    if late_s > STARTING.total_seconds():
        node = pod["spec"].get("nodeName", "?")
        held = ", ".join(pod["metadata"].get("finalizers", ()))
        yield Verdict(
            name_of(pod),
            "it does not go away, and an upgrade waits for it",
            f"due since {due}, {late_s:.0f} s ago, on {node}" + (f", held by {held}" if held else ""),
            f"whoever set {held} has to take it off"
            if held
            else f"where {node} is gone for good: kubectl delete node {node}, or kubectl delete pod {name_of(pod)} --force",
        )


def _evicted(pod: Object) -> Verdict:
    key, message = values_key(pod), str(pod["status"].get("message", "")).strip()
    if "exceed" in message and "low on resource" not in message:
        what = "it was thrown out for taking more disk than it may"
        remedy = (
            "what it spools is gone once it is published: does Kafka take what it sends? Else it is a fault of ours: headgate bundle"
            if "EmptyDir" in message
            else f"raise {key}.resources.limits.ephemeral-storage"
        )
    else:
        what = "its node threw it out, being short of memory or disk"
        remedy = f"{key}.resources.requests.memory as high as what it uses, and a PriorityClass (pod.priorityClassName), put it last in the queue"
    return Verdict(name_of(pod), what, message, remedy)


# --- started --------------------------------------------------------------------------------------------------


def _not_started(pod: Object, seen: Seen, now: datetime) -> Iterable[Verdict]:
    for status in _statuses(pod):
        waiting, message = (
            _waiting(status),
            str(status.get("state", {}).get("waiting", {}).get("message", "")),
        )
        before = status.get("lastState", {}) if waiting == "CrashLoopBackOff" else status.get("state", {})
        if before.get("terminated", {}).get("reason") == "StartError":  # between two tries
            waiting, message = "RunContainerError", str(before["terminated"].get("message", ""))
        if waiting in _PULLS:
            heard = last_event(seen.events, "Pod", name_of(pod), {"Failed"}) if "Back-off" in message else ""
            evidence = f"{waiting}: {heard or message}"
            yield Verdict(
                name_of(pod),
                f"its image cannot be pulled: {status.get('image', '?')}",
                evidence,
                _remedy(_IMAGE_REMEDIES, evidence) or "try the image on a node: crictl pull",
            )
        elif waiting in _MISCONFIGURED:
            yield Verdict(
                name_of(pod),
                "its container cannot be started",
                f"{waiting}: {message}",
                _remedy(_UNMADE_REMEDIES, message)
                or f"the node's kubelet has more: kubectl describe pod {name_of(pod)}",
            )
    unmounted = last_event(seen.events, "Pod", name_of(pod), {"FailedMount", "FailedAttachVolume"})
    if unmounted and pod["status"].get("phase") == "Pending" and not _young(pod, now):
        yield Verdict(
            name_of(pod),
            "a volume of it cannot be mounted",
            unmounted,
            "make the Secret or ConfigMap that the message names (secretFiles), or see whether its volume is used elsewhere",
        )


def _remedy(remedies: Iterable[tuple[tuple[str, ...], str]], message: str) -> str:
    """The first with a word of the message; empty where none has."""
    told = message.lower()
    return next((remedy for words, remedy in remedies if any(w in told for w in words)), "")


# --- kept alive -----------------------------------------------------------------------------------------------


def _killed(pod: Object, seen: Seen, now: datetime) -> Iterable[Verdict]:
    for status in _statuses(pod):
        container, restarts = status["name"], status.get("restartCount", 0)
        ended = (
            status.get("state", {}).get("terminated") or status.get("lastState", {}).get("terminated") or {}
        )
        if ended.get("reason") == "OOMKilled" and not _long_ago(ended, now):
            yield _out_of_memory(pod, container, restarts, seen)
        elif _waiting(status) == "CrashLoopBackOff" or status.get("state", {}).get("terminated", {}).get(
            "exitCode"
        ):
            code = ended.get("exitCode")
            stopped = code in _STOPPED and "probe" in last_event(
                seen.events, "Pod", name_of(pod), {"Killing"}
            )
            why = "a probe ended it" if stopped else _EXITS.get(code, "") if isinstance(code, int) else ""
            lines = seen.logs.get(name_of(pod), ())
            heard = last_event(seen.events, "Pod", name_of(pod), {"Unhealthy"}) if stopped else ""
            said = "\n".join(lines) if lines else "its log has nothing, or could not be read"
            yield Verdict(
                name_of(pod),
                f"it does not stay up: ended with {code}, {_times(restarts)}" + (f" ({why})" if why else ""),
                "\n".join(filter(None, (heard, said))),
                _PROBED_REMEDY if stopped else _crash_remedy(code, pod),
            )


def _crash_remedy(code: object, pod: Object) -> str:
    match code:
        case 2:
            return "correct `config` in the values: headgate check says all that is wrong with it at once"
        case 3:
            return "do what its last line says; headgate positions shows where readers stand"
        case 126 | 127:
            return (
                "the image is not Headgate's, or of another architecture than the node: see image.repository"
            )
        case 137:
            return "the node's kubelet says who killed it: kubectl describe pod " + name_of(pod)
        case _:
            return f"its last lines say why; all of them: kubectl logs {name_of(pod)} --previous"


def _times(restarts: int) -> str:
    return f"{restarts} restart{'s' * (restarts != 1)}"


def _long_ago(ended: Object, now: datetime) -> bool:
    finished = str(ended.get("finishedAt") or "")
    return bool(finished) and now - datetime.fromisoformat(finished) > RECENTLY


def _out_of_memory(pod: Object, container: str, restarts: int, seen: Seen) -> Verdict:
    limit = _limit(pod, container, "memory")
    used = seen.usage.get((name_of(pod), container), Usage()).working_set_bytes
    now = f"working set now: {amount_text('memory', used)}" if used else "its working set is not known"
    key = values_key(pod)
    if limit is None:
        what, remedy = (
            "the node had no memory left, and the kernel chose it",
            f"set {key}.resources.requests.memory to what it uses, so that the node is not overbooked",
        )
    else:
        bytes_ = amount("memory", limit)
        wanted = -(-int(max(bytes_, used or 0) * ROOM_AFTER_OOM) // _STEP_BYTES) * _STEP_BYTES
        text = amount_text("memory", wanted)
        what = f"it was killed for using more memory than its limit, {limit}"
        remedy = (
            f"set {key}.resources.requests.memory and {key}.resources.limits.memory to {text}; "
            "where that does not hold either, it is a fault of ours: headgate bundle"
        )
    return Verdict(
        name_of(pod), what, f"OOMKilled, {_times(restarts)}, limit {limit or 'none'}, {now}", remedy
    )


def _throttled(pod: Object, seen: Seen) -> Iterable[Verdict]:
    for container in pod["spec"]["containers"]:
        share = seen.usage.get((name_of(pod), container["name"]), Usage()).throttled_share
        limit = _limit(pod, container["name"], "cpu")
        if share is not None and limit is not None and share >= THROTTLED_SHARE:
            key = values_key(pod)
            yield Verdict(
                name_of(pod),
                f"its CPU limit, {limit}, slows it down",
                f"throttled in {share:.0%} of the periods since it started",
                f"remove {key}.resources.limits.cpu (its request is what secures its share), "
                f"or raise it to {amount_text('cpu', 2 * amount('cpu', limit))} and look again",
            )


# --- ready ----------------------------------------------------------------------------------------------------


def _not_ready(pod: Object, seen: Seen, now: datetime) -> Iterable[Verdict]:
    part, name = part_of(pod), name_of(pod)
    page = _of_shards(pod, seen)
    if is_ready(pod) and not (part == "exporter" and page is not None and not page.get("slots")):
        return
    if _young(pod, now) or pod["status"].get("phase") == "Succeeded":
        return
    what = _UNREADY.get(part, "it has read nothing from Kafka")
    heard = last_event(seen.events, "Pod", name, {"Unhealthy"})
    told = [heard, *seen.logs.get(name, ())]
    if part == "exporter" and page is not None:
        told.insert(0, f"the coordinator: alive {page.get('alive')}, assigned slots {page.get('assigned')}")
    yield Verdict(
        name, what, "\n".join(filter(None, told)) or "not ready, and silent", _unready_remedy(pod, page, seen)
    )


def _of_shards(pod: Object, seen: Seen) -> Object | None:
    """What the coordinator says of this exporter; an empty one where it does not know it, None where nobody was asked."""
    if seen.shards is None:
        return None
    shard = label(pod, "headgate/shard")
    return next(
        (s for s in seen.shards.get("shards", ()) if s["shard"] == shard), {"alive": False, "assigned": []}
    )


def _unready_remedy(pod: Object, page: Object | None, seen: Seen) -> str:
    part, logs = part_of(pod), f"kubectl logs {name_of(pod)}"
    coordinators = [p for p in seen.pods if part_of(p) == "coordinator"]
    if part == "exporter":
        if coordinators and not any(is_ready(p) for p in coordinators):
            return "first the coordinator, which is not ready either: it assigns slots"
        exporters = sum(part_of(p) == "exporter" for p in seen.pods)
        if seen.shards is not None and exporters > int(seen.shards.get("slots", exporters)):
            return f"there are more shards than slots: shards to {seen.shards['slots']}, or config.slots to {exporters}"
        if page is not None and page.get("alive"):
            return f"it is in the group and slots are on their way: look again in a minute, then {logs}"
        return f"it has not joined Kafka's group: can it reach config.kafka.bootstrap (networkPolicy.kafka)? {logs}"
    return f"can it reach Kafka and PostgreSQL (networkPolicy.kafka, networkPolicy.postgres)? {logs}"
