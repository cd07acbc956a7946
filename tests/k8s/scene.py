"""A release on simulated nodes, and the doctor's look at it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.helm_chart import CHART
from tests.k8s.control_plane import ControlPlane, Object
from workers.pods.cluster import Cluster, look
from workers.pods.diagnosis import Report, diagnose
from workers.pods.seen import Seen, is_ready, is_unplaced, label, name_of

LATER = timedelta(minutes=10)
"""The doctor comes so long after: a pod of a test is always young."""
_NOISE = {
    "managedFields", "resourceVersion", "uid", "generation", "selfLink", "images", "nodeInfo", "daemonEndpoints",
    "addresses", "template", "strategy", "livenessProbe", "readinessProbe", "startupProbe", "securityContext",
    "volumeMounts", "env", "args", "ports", "hostIP", "hostIPs", "podIP", "podIPs", "topologySpreadConstraints",
    "source", "reportingComponent", "reportingInstance", "configMap", "projected", "checksum/config",
    "kubectl.kubernetes.io/last-applied-configuration", "deployment.kubernetes.io/revision",
}  # fmt: skip
"""What no verdict reads."""


class Scene:
    """`record`: where to keep what the doctor saw, as a case of tests/test_doctor.py."""

    def __init__(self, plane: ControlPlane, name: str, record: Path | None) -> None:
        self.plane = plane
        self.name = name
        self.record = record
        self.namespace = name.replace("_", "-")[:60].rstrip("-")
        plane.kubectl("create", "namespace", self.namespace)

    def clear(self) -> None:
        plane = self.plane
        plane.helm("uninstall", "headgate", "--namespace", self.namespace)
        plane.kubectl(
            "-n", self.namespace, "delete", "job,deployment,pod", "--all", "--force", "--wait=false"
        )
        plane.kubectl("delete", "namespace", self.namespace, "--wait=false")
        plane.kubectl("delete", "pv,storageclass", "--all")
        plane.kubectl("delete", "node", "--selector", "!headgate/real")

    def nodes(self, *nodes: Object) -> None:
        self.plane.apply(*nodes)

    def helm(self, verb: str, *options: str, wait: bool = False) -> str:
        """`helm install` or `upgrade` of the chart; its output. Fails where helm does."""
        done = self.plane.helm(
            verb, "headgate", str(CHART), "--namespace", self.namespace, "--values", str(CHART / "ci" / "minimal.yaml"),
            *(("--atomic", "--timeout", "30s") if wait else ()), *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pods(self) -> list[Object]:
        return self.plane.get("pods", self.namespace, "-l", "app.kubernetes.io/name=headgate")

    def shards(self) -> dict[str, str]:
        """The uid of each pod that is there to stay, by shard or part."""
        return {
            label(p, "headgate/shard") or name_of(p): str(p["metadata"]["uid"])
            for p in self.pods()
            if "deletionTimestamp" not in p["metadata"]
        }

    def wait_ready(self, count: int) -> None:
        self.plane.wait(
            lambda: sum(map(is_ready, self.pods())) == count == len(self.pods()), f"{count} ready pods", 60
        )

    def wait_unplaced(self, count: int) -> None:
        self.plane.wait(
            lambda: sum(map(is_unplaced, self.pods())) == count, f"{count} pods without a node", 60
        )

    def one(self, part: str) -> str:
        """The name of a pod of this part or shard."""
        wanted = ("app.kubernetes.io/component", "headgate/shard")
        return next(name_of(p) for p in self.pods() if part in [label(p, key) for key in wanted])

    def look(self, kubeconfig: Path | None = None) -> tuple[Seen, Report]:
        """As admin, or as another kubeconfig has it."""
        environment = {**self.plane.environment, "KUBECONFIG": str(kubeconfig or self.plane.kubeconfig)}
        with patch.dict(os.environ, environment), Cluster() as cluster:
            seen = look(cluster, self.namespace, "headgate")
        now = datetime.now(UTC) + LATER
        report = diagnose(seen, now)
        if self.record is not None and report.verdicts:
            case = {
                "now": now.isoformat(),
                "seen": _plain(seen),
                "verdicts": [dataclasses.asdict(v) for v in report.verdicts],
            }
            text = json.dumps(case, indent=1)
            assert str(self.plane.folder) not in text, "a path of this machine"
            (self.record / f"{self.name}.json").write_text(text + "\n")
        return seen, report


def _plain(seen: Seen) -> dict[str, Any]:
    """Without what no verdict reads."""
    events = [
        e
        for e in seen.events
        if e.get("type") == "Warning"
        or e.get("reason") == "Killing"
        or "Claim" in e["involvedObject"]["kind"]
    ]
    others = [{"metadata": {"name": name_of(p)}, "spec": p["spec"]} for p in seen.others]
    seen = dataclasses.replace(seen, events=events, others=others)
    plain = {f.name: _trimmed(getattr(seen, f.name)) for f in dataclasses.fields(Seen)}
    plain["usage"] = [[*key, dataclasses.asdict(usage)] for key, usage in seen.usage.items()]
    return plain


def _trimmed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _trimmed(v) for k, v in value.items() if k not in _NOISE}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_trimmed(v) for v in value]
    return value
