"""Each verdict of the doctor against what a real scheduler and real controllers say: `make test-k8s`.

kwok runs no containers: what a kubelet says of them is in test_doctor_on_a_real_node.py.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helm_chart import ROOT
from tests.k8s.control_plane import node
from tests.k8s.scene import Scene
from workers.pods.diagnosis import Report
from workers.pods.seen import Verdict

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(300)]

NO_CONSUMERS = ("--set", "sinks.postgres.autoscaling.by=none", "--set", "sinks.postgres.replicas=1")
"""One consumer: without metrics an HPA would make two."""


def of(report: Report, part: str) -> list[Verdict]:
    return [v for v in report.verdicts if part in v.pod]


def install(scene: Scene, *sets: str, ready: bool = True, shards: int = 2) -> None:
    options = [w for s in (f"shards={shards}", *sets) for w in ("--set", s)]
    scene.helm("install", "--no-hooks", *NO_CONSUMERS, *options)
    if ready:
        scene.wait_ready(2 + shards)


def add_a_shard(scene: Scene) -> None:
    """One that finds no node: of a release that is started at once it is chance who does not."""
    scene.helm("upgrade", "--no-hooks", "--reuse-values", "--set", "shards=2")
    scene.wait_unplaced(1)


def test_a_release_that_is_well_is_fine(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi"))
    install(scene)
    report = scene.look()[1]
    assert report.verdicts == ()
    assert len(report.fine) == 4
    # The page is not there (kwok runs no coordinator), and neither is metrics-server: said, not passed over.
    assert [u.split(":")[0] for u in report.unseen] == [
        "memory in use (metrics.k8s.io)",
        "the coordinator's /shards",
    ]


def test_no_node_has_the_cpu(scene: Scene) -> None:
    scene.nodes(node("node-1", "500m", "8Gi"), node("node-2", "500m", "8Gi"))
    install(scene, "exporter.resources.requests.cpu=300m", ready=False)
    scene.wait_unplaced(1)
    (verdict,) = scene.look()[1].verdicts
    assert "Insufficient cpu" in verdict.evidence
    assert "scale the node group to 3 nodes of the same size (500m CPU and 8Gi for pods)" in verdict.remedy
    assert "no node has the cpu that it asks for" in verdict.what


def test_what_the_doctor_says_of_cpu_helps(scene: Scene) -> None:
    scene.nodes(node("node-1", "750m", "8Gi"))
    install(scene, shards=1)
    add_a_shard(scene)
    (verdict,) = scene.look()[1].verdicts
    assert "Most is free on node-1: 150m CPU" in verdict.evidence
    assert verdict.remedy.startswith(
        "lower exporter.resources.requests.cpu to 200m, and all 2 exporter pods fit"
    )
    scene.helm("upgrade", "--no-hooks", "--reuse-values", "--set", "exporter.resources.requests.cpu=200m")
    scene.wait_ready(4)
    assert scene.look()[1].verdicts == ()


def test_no_node_has_the_memory(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "1300Mi"))
    install(scene, shards=1)
    add_a_shard(scene)
    (verdict,) = scene.look()[1].verdicts
    assert "Insufficient memory" in verdict.evidence
    assert (
        "exporter.resources.requests.memory to 330Mi and exporter.resources.limits.memory to 330Mi"
        in verdict.remedy
    )
    assert "scale the node group to 2 nodes" in verdict.remedy


def test_a_pod_that_no_node_of_this_size_takes(scene: Scene) -> None:
    scene.nodes(node("node-1", "2", "8Gi"))
    install(scene, "exporter.resources.requests.cpu=3", ready=False)
    scene.wait_unplaced(2)
    verdicts = of(scene.look()[1], "exporter")
    assert len(verdicts) == 2
    assert all("a node has to have 3 CPU" in v.remedy for v in verdicts)


def test_a_taint(scene: Scene) -> None:
    scene.nodes(
        node("node-1", "8", "32Gi", taints=[{"key": "dedicated", "value": "db", "effect": "NoSchedule"}])
    )
    install(scene, ready=False)
    scene.wait_unplaced(4)
    report = scene.look()[1]
    assert {v.what for v in report.verdicts} == {
        "it does not tolerate the taint of node-1: dedicated=db:NoSchedule"
    }
    assert (
        "pod.tolerations: [{key: dedicated, operator: Equal, value: db, effect: NoSchedule}]"
        in report.verdicts[0].remedy
    )


def test_a_node_that_is_cordoned(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi", unschedulable=True))
    install(scene, ready=False)
    scene.wait_unplaced(4)
    assert {v.remedy for v in scene.look()[1].verdicts} == {"kubectl uncordon node-1, or add nodes"}


def test_a_selector_that_no_node_meets(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi", labels={"pool": "blue"}))
    install(scene, "pod.nodeSelector.pool=green", ready=False)
    scene.wait_unplaced(4)
    verdict = scene.look()[1].verdicts[0]
    assert verdict.what == "no node is what it asks for: pool=green"
    assert "nodes have pool blue" in verdict.evidence
    assert "kubectl label node node-1 pool=green" in verdict.remedy


def test_an_affinity_that_no_node_meets(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi", labels={"pool": "blue"}))
    path = "pod.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0]"
    install(scene, f"{path}.key=pool", f"{path}.operator=In", f"{path}.values[0]=green", ready=False)
    scene.wait_unplaced(4)
    assert {v.what for v in scene.look()[1].verdicts} == {"no node is what it asks for: pool In green"}


def test_a_spread_that_no_node_allows(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi"))  # without a zone
    install(scene, "pod.spread=DoNotSchedule", ready=False)
    scene.wait_unplaced(4)
    verdict = scene.look()[1].verdicts[0]
    assert "topology spread constraints" in verdict.what
    assert "set pod.spread to ScheduleAnyway" in verdict.remedy


def test_a_quota_that_is_used_up(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi"))
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"},
        "spec": {"hard": {"requests.memory": "1100Mi"}},
    }  # fmt: skip
    scene.plane.apply(quota, namespace=scene.namespace)
    install(scene, ready=False)

    def refused() -> bool:
        found = scene.plane.get("deployments", scene.namespace)
        return any(c["type"] == "ReplicaFailure" for d in found for c in d["status"].get("conditions", ()))

    scene.plane.wait(refused, "a pod that the quota refuses", 60)
    report = scene.look()[1]
    assert report.verdicts
    assert all("the quota team is used up" in v.what for v in report.verdicts)
    assert all(
        "raise requests.memory to " in v.remedy and "in the quota team" in v.remedy for v in report.verdicts
    )


def test_a_priority_class_that_is_not_there(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi"))
    install(scene, "pod.priorityClassName=urgent", ready=False)

    def refused() -> bool:
        return len(scene.look()[1].verdicts) == 4

    scene.plane.wait(refused, "four pods that are refused", 60)
    verdict = scene.look()[1].verdicts[0]
    assert verdict.what == "its pod is not made: there is no PriorityClass urgent"
    assert "kubectl create priorityclass urgent" in verdict.remedy


def claim_for_exporters(scene: Scene, storage: str, class_: str | None) -> None:
    """The chart has no claim; someone patched one in."""
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": storage}}}
    if class_ is not None:
        spec["storageClassName"] = class_
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "scratch"},
        "spec": spec,
    }
    scene.plane.apply(claim, namespace=scene.namespace)
    volume = {"name": "scratch", "persistentVolumeClaim": {"claimName": "scratch"}}
    patch = json.dumps({"spec": {"template": {"spec": {"volumes": [volume]}}}})
    deployment = "deployment/headgate-exporter-1"
    scene.plane.kubectl("-n", scene.namespace, "patch", deployment, "-p", patch)
    scene.wait_unplaced(1)


def storage_class(name: str, provisioner: str) -> dict[str, object]:
    return {
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name}, "provisioner": provisioner,
    }  # fmt: skip


def test_a_claim_of_a_class_that_is_not_there(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi"))
    install(scene)
    claim_for_exporters(scene, "10Gi", "fast")
    (verdict,) = scene.look()[1].verdicts
    assert (
        verdict.what == "its volume claim scratch is not bound: there is no StorageClass fast (there: none)"
    )
    assert "unbound immediate PersistentVolumeClaims" in verdict.evidence
    assert 'storageclass.storage.k8s.io "fast" not found' in verdict.evidence


def test_a_claim_without_a_class(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi"))
    install(scene)
    claim_for_exporters(scene, "10Gi", None)
    (verdict,) = scene.look()[1].verdicts
    assert "it names no StorageClass, and none is the default" in verdict.what


def test_a_claim_that_is_greater_than_any_volume(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi"))
    volume = {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "small"},
        "spec": {
            "capacity": {"storage": "5Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "local",
            "hostPath": {"path": "/data"},
        },
    }  # fmt: skip
    scene.plane.apply(storage_class("local", "kubernetes.io/no-provisioner"), volume)
    install(scene)
    claim_for_exporters(scene, "10Gi", "local")
    (verdict,) = scene.look()[1].verdicts
    assert (
        "it asks for 10Gi, and the greatest free volume of the class local is small with 5Gi" in verdict.what
    )
    assert "at most 5Gi" in verdict.remedy


def test_a_claim_whose_driver_does_not_run(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi"))
    scene.plane.apply(storage_class("gp3", "ebs.csi.aws.com"))
    install(scene)
    claim_for_exporters(scene, "10Gi", "gp3")
    (verdict,) = scene.look()[1].verdicts
    assert "ebs.csi.aws.com has not made a volume of 10Gi" in verdict.what
    assert "waiting" in verdict.evidence.lower()


def test_a_pod_that_something_holds_back_from_going(scene: Scene) -> None:
    scene.nodes(node("node-1", "8", "32Gi"))
    install(scene)
    pod = scene.one("exporter-1")
    hold = functools.partial(
        scene.plane.kubectl, "-n", scene.namespace, "patch", "pod", pod, "--type=merge", "-p"
    )
    hold('{"metadata": {"finalizers": ["example.com/held"]}}')
    try:
        scene.plane.kubectl("-n", scene.namespace, "delete", "pod", pod, "--wait=false", "--grace-period=1")
        scene.plane.wait(lambda: len(scene.pods()) == 5 and len(scene.shards()) == 4, "its replacement", 60)
        (verdict,) = of(scene.look()[1], pod)
        assert "held by example.com/held" in verdict.evidence
    finally:
        hold('{"metadata": {"finalizers": null}}')


def test_who_may_read_one_namespace_only_is_told_what_was_not_looked_at(scene: Scene, tmp_path: Path) -> None:
    scene.nodes(node("node-1", "750m", "8Gi"))
    install(scene, shards=1)
    add_a_shard(scene)
    kubectl = functools.partial(scene.plane.kubectl, "-n", scene.namespace)
    kubectl("create", "serviceaccount", "reader")
    kubectl("create", "role", "reader", "--verb=get,list", "--resource=pods,pods/log,events,deployments.apps")
    kubectl("create", "rolebinding", "reader", "--role=reader", f"--serviceaccount={scene.namespace}:reader")
    config = yaml.safe_load(scene.plane.kubeconfig.read_text())
    config["users"][0]["user"]["token"] = kubectl("create", "token", "reader").strip()
    (tmp_path / "reader.conf").write_text(yaml.safe_dump(config))
    report = scene.look(tmp_path / "reader.conf")[1]
    (verdict,) = report.verdicts
    assert verdict.what == "no node takes it; the nodes could not be looked at"
    assert "Insufficient cpu" in verdict.evidence
    assert "all pods of the cluster: HTTP 403" in "; ".join(report.unseen)


def test_the_command_says_it_and_its_exit_code_too(scene: Scene) -> None:
    scene.nodes(node("node-1", "750m", "8Gi"))
    install(scene, shards=1)
    add_a_shard(scene)
    done = subprocess.run(
        [ROOT / ".venv" / "bin" / "headgate", "doctor", "--release", "headgate", "--namespace", scene.namespace],
        env=scene.plane.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert "no node has the cpu that it asks for" in done.stdout
    assert "fine: headgate-" in done.stdout
    empty = subprocess.run(
        [ROOT / ".venv" / "bin" / "headgate", "doctor", "--namespace", "default"],
        env={**os.environ, "KUBECONFIG": str(scene.plane.kubeconfig)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert empty.returncode == 1
    assert "there is no release of Headgate" in empty.stderr
