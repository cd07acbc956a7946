"""Reads a release and its surroundings from the Kubernetes API. Reads only; every list, log and wait is bounded.

* The pods and Deployments have to be readable: without them it raises. What else the API refuses is named in `Seen.unseen`.
* What concerns the whole cluster (nodes, all pods, volumes, classes) is asked for only where a pod waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http.client import HTTPException
from typing import Any

import httpx2
from lightkube.config.client_adapter import Client, ConnectionParams
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.exceptions import ConfigError
from prometheus_client.parser import text_string_to_metric_families

from ingest.errors import HeadgateError, Rejected, Transient
from workers.pods.diagnosis import limits_cpu, wants_log
from workers.pods.seen import (
    Object,
    Seen,
    Usage,
    amount,
    condition,
    is_ready,
    is_unplaced,
    label,
    name_of,
    part_of,
)
from workers.scale import forwarded

TIMEOUT_S = 10.0
PAGE = 500
PAGES_MAX = 100
"""50,000 objects."""
LOGS_MAX = 10
LOG_LINES = 10
LOG_BYTES_MAX = 16_384
NODES_ASKED_MAX = 20
"""As many nodes' cAdvisors are asked about throttling."""


class Cluster:
    """The API, as kubeconfig or the pod's service account opens it. A context manager."""

    def __init__(self, context: str | None = None) -> None:
        """Raises Rejected where there is no usable kubeconfig."""
        try:
            config = KubeConfig.from_env().get(context)
            if config is None:
                raise Rejected(
                    "kubeconfig", "context", f"there is no context {context or '(none is current)'}"
                )
            self._http = Client(config, ConnectionParams(timeout=httpx2.Timeout(TIMEOUT_S)))
        except (ConfigError, OSError, KeyError) as error:
            raise Rejected("kubeconfig", "not usable", f"{error}; set KUBECONFIG") from error
        self.server = str(config.cluster.server)
        self.namespace = config.namespace

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, params: Mapping[str, str | int] | None = None) -> httpx2.Response:
        """The answer, if it is a 200. Raises Transient where the API is not reached or says 429 or 5xx, else Rejected."""
        where = f"Kubernetes {path}"
        try:
            answer = self._http.get(path, params=dict(params or {}))
        except httpx2.HTTPError as error:
            raise Transient(where, f"{self.server}: {error or type(error).__name__}") from error
        except (ConfigError, OSError) as error:
            raise Rejected(where, "login", str(error)) from error
        if answer.status_code == 200:
            return answer
        said = answer.text[:300].strip()
        if answer.headers.get("content-type", "").startswith("application/json"):
            said = str(answer.json().get("message", said))
        if answer.status_code == 429 or answer.status_code >= 500:
            raise Transient(where, f"HTTP {answer.status_code}: {said}")
        raise Rejected(where, f"HTTP {answer.status_code}", said)

    def items(self, path: str, **selectors: str) -> list[Object]:
        """All objects of a list. Raises as `get` does, and Rejected past PAGES_MAX pages."""
        found: list[Object] = []
        params: dict[str, str | int] = {**selectors, "limit": PAGE}
        for _ in range(PAGES_MAX):
            page = self.get(path, params).json()
            found += page.get("items", ())
            if not (more := page.get("metadata", {}).get("continue")):
                return found
            params["continue"] = more
        raise Rejected(f"Kubernetes {path}", "too many", f"more than {PAGE * PAGES_MAX} objects")


def look(cluster: Cluster, namespace: str, release: str | None) -> Seen:
    """The release, or the only one of the namespace. Raises Rejected where there is none, or more; and as `Cluster.get` does."""
    selector = "app.kubernetes.io/name=headgate" + (
        f",app.kubernetes.io/instance={release}" if release else ""
    )
    pods = cluster.items(f"/api/v1/namespaces/{namespace}/pods", labelSelector=selector)
    deployments = cluster.items(f"/apis/apps/v1/namespaces/{namespace}/deployments", labelSelector=selector)
    if not pods and not deployments:
        name = f"release {release}" if release else "release of Headgate"
        raise Rejected(
            f"namespace {namespace}", "empty", f"there is no {name}: helm list -A has all releases"
        )
    found = sorted({label(thing, "app.kubernetes.io/instance") for thing in (*pods, *deployments)})
    if len(found) > 1:
        raise Rejected(f"namespace {namespace}", "several releases", f"{', '.join(found)}: say --release")
    unseen = _Unseen()
    seen = Seen(
        pods=pods,
        deployments=deployments,
        events=unseen.items(cluster, "events", f"/api/v1/namespaces/{namespace}/events"),
        usage=_usage(cluster, namespace, selector, pods, unseen),
        logs=_logs(cluster, namespace, pods, unseen),
        shards=_shards(namespace, pods, unseen),
    )
    return replace(_around(cluster, namespace, seen, unseen), unseen=tuple(unseen.said))


class _Unseen:
    """Reads what may be refused, and keeps what was."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, what: str, error: HeadgateError) -> None:
        self.said.append(f"{what}: {error.what}")

    def items(self, cluster: Cluster, what: str, path: str, **selectors: str) -> list[Object]:
        """Empty where it is refused, and `what` is noted."""
        try:
            return cluster.items(path, **selectors)
        except (Transient, Rejected) as error:
            self.note(what, error)
            return []


def _around(cluster: Cluster, namespace: str, seen: Seen, unseen: _Unseen) -> Seen:
    waiting = [p for p in seen.pods if is_unplaced(p)]
    if waiting:
        alive = "status.phase!=Succeeded,status.phase!=Failed"
        others = unseen.items(cluster, "all pods of the cluster", "/api/v1/pods", fieldSelector=alive)
        # Without what runs on them, nodes would look empty, and every number be wrong.
        nodes = unseen.items(cluster, "nodes", "/api/v1/nodes") if others else ()
        seen = replace(seen, nodes=nodes, others=others)
    if any("persistentVolumeClaim" in v for p in waiting for v in p["spec"].get("volumes", ())):
        seen = replace(
            seen,
            claims=unseen.items(
                cluster, "volume claims", f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
            ),
            volumes=unseen.items(cluster, "volumes", "/api/v1/persistentvolumes"),
            classes=unseen.items(cluster, "storage classes", "/apis/storage.k8s.io/v1/storageclasses"),
        )
    if any(condition(d, "ReplicaFailure") for d in seen.deployments):
        seen = replace(
            seen,
            priorities=unseen.items(
                cluster, "priority classes", "/apis/scheduling.k8s.io/v1/priorityclasses"
            ),
        )
    return seen


def _usage(
    cluster: Cluster, namespace: str, selector: str, pods: Sequence[Object], unseen: _Unseen
) -> dict[tuple[str, str], Usage]:
    path = f"/apis/metrics.k8s.io/v1beta1/namespaces/{namespace}/pods"
    usage = {
        (name_of(pod), c["name"]): Usage(amount("memory", c.get("usage", {}).get("memory", 0)))
        for pod in unseen.items(cluster, "memory in use (metrics.k8s.io)", path, labelSelector=selector)
        for c in pod.get("containers", ())
    }
    limited = sorted({p["spec"]["nodeName"] for p in pods if limits_cpu(p) and p["spec"].get("nodeName")})
    for node in limited[:NODES_ASKED_MAX]:
        try:
            text = cluster.get(f"/api/v1/nodes/{node}/proxy/metrics/cadvisor").text
        except (Transient, Rejected) as error:
            unseen.note(f"CPU throttling on {node}", error)
            continue
        for key, share in throttled(text, namespace).items():
            usage[key] = replace(usage.get(key, Usage()), throttled_share=share)
    return usage


def throttled(cadvisor: str, namespace: str) -> dict[tuple[str, str], float]:
    """By pod and container, the share of CPU periods in which it was stopped, of cAdvisor's metrics as text."""
    counted: dict[tuple[str, str], dict[str, float]] = {}
    wanted = "container_cpu_cfs_periods", "container_cpu_cfs_throttled_periods"
    lines = (line for line in cadvisor.splitlines(keepends=True) if any(name in line for name in wanted))
    for family in text_string_to_metric_families("".join(lines)):
        for sample in family.samples:
            if sample.labels.get("namespace") == namespace and sample.labels.get("container"):
                key = sample.labels["pod"], sample.labels["container"]
                counted.setdefault(key, {})[sample.name.removesuffix("_total")] = sample.value
    return {k: c.get(wanted[1], 0.0) / c[wanted[0]] for k, c in counted.items() if c.get(wanted[0])}


def _logs(cluster: Cluster, namespace: str, pods: Sequence[Object], unseen: _Unseen) -> dict[str, list[str]]:
    wanted = [(p, before) for p in pods if (before := wants_log(p)) is not None]
    logs = {}
    for pod, before in wanted[:LOGS_MAX]:
        params = {
            "tailLines": LOG_LINES,
            "limitBytes": LOG_BYTES_MAX,
            "previous": str(before).lower(),
            "container": pod["spec"]["containers"][0]["name"],
        }
        path = f"/api/v1/namespaces/{namespace}/pods/{name_of(pod)}/log"
        try:
            logs[name_of(pod)] = cluster.get(path, params).text.splitlines()
        except (Transient, Rejected) as error:
            unseen.note(f"the log of {name_of(pod)}", error)
    return logs


def _shards(namespace: str, pods: Sequence[Object], unseen: _Unseen) -> Mapping[str, Any] | None:
    """/shards of the coordinator, by kubectl's port-forward: the API server's own proxy is what the chart's NetworkPolicy keeps out."""
    coordinator = next((p for p in pods if part_of(p) == "coordinator" and is_ready(p)), None)
    if coordinator is None:
        return None  # it has its own verdict, and nothing to tell

    async def page() -> Mapping[str, Any]:
        async with forwarded(label(coordinator, "app.kubernetes.io/instance"), namespace) as ask:
            return await asyncio.to_thread(ask, "shards")

    try:
        return asyncio.run(page())
    except (HeadgateError, OSError, ValueError, HTTPException) as error:
        said = error.what if isinstance(error, HeadgateError) else str(error)
        unseen.said.append(f"the coordinator's /shards: {said}")
        return None
