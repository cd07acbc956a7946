"""What the doctor says of containers that a real kubelet starts, probes and kills: `make test-k8s`, as root, with containerd and runc.

The release is the chart's; its image is busybox with a script in the place of `headgate`, whose exporter misbehaves as FAULT says.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.k8s.real_node import IMAGE, RealNode
from tests.k8s.scene import Scene
from workers.pods.seen import Verdict
from workers.servers import free_ports

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(300)]

_REPOSITORY, _, _TAG = IMAGE.rpartition(":")
_ONE_OF_EACH = ("shards=1", "sinks.postgres.autoscaling.by=none", "sinks.postgres.replicas=1")
_OURS = (f"image.repository={_REPOSITORY}", f"image.tag={_TAG}", "image.pullPolicy=Never")


@pytest.fixture
def release(real: RealNode, scene: Scene) -> Callable[..., None]:
    """Installs a release on the real node."""

    def install(fault: str, *sets: str) -> None:
        given = (*_ONE_OF_EACH, *_OURS, f"pod.env.FAULT={fault}", *sets)
        scene.helm("install", "--no-hooks", *(word for one in given for word in ("--set", one)))

    return install


def verdicts(
    scene: Scene, words: str, *, fine: int = 2, alone: bool = True, timeout_s: float = 60
) -> list[Verdict]:
    """What is said, as soon as so many of the three pods are fine, and of the others these words are said (`alone`: and nothing else)."""
    found: list[Verdict] = []

    def is_said() -> bool:
        report = scene.look()[1]
        found[:] = report.verdicts
        said = [words in f"{v.what}\n{v.evidence}" for v in found]
        return len(report.fine) >= fine and sum(said) >= 3 - fine and (all(said) or not alone)

    try:
        scene.plane.wait(is_said, f"the doctor to say: {words}", timeout_s)
    except AssertionError as late:
        raise AssertionError(f"{late}; it says {found}") from None
    return found


def patch(scene: Scene, container: Mapping[str, Any], **pod: object) -> None:
    """Of the exporter's Deployment, what the chart has no value for. The pod that was before is hurried: it may not listen yet."""
    spec = {"template": {"spec": {"containers": [{"name": "headgate", **container}], **pod}}}
    kubectl = functools.partial(scene.plane.kubectl, "-n", scene.namespace)
    kubectl("patch", "deployment", "headgate-exporter-1", "-p", json.dumps({"spec": spec}))
    kubectl("delete", "pod", "--selector", "headgate/shard=exporter-1", "--grace-period=1", "--wait=false")


class Registry(BaseHTTPRequestHandler):
    """An image registry that has nothing, and what is `private` it shows nobody."""

    def do_GET(self) -> None:
        status, code = (403, "DENIED") if "/private/" in self.path else (404, "MANIFEST_UNKNOWN")
        body = json.dumps({"errors": [{"code": code, "message": code.lower().replace("_", " ")}]}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815  # the name that http.server looks for

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[str]:
    """Where it listens: loopback, where containerd speaks HTTP."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


Install = Callable[..., None]


def test_a_release_that_is_well_on_a_real_kubelet(release: Install, scene: Scene) -> None:
    release("none")
    scene.wait_ready(3)
    seen, report = scene.look()
    assert report.verdicts == ()
    assert [u.split(":")[0] for u in report.unseen] == ["memory in use (metrics.k8s.io)"]
    assert seen.shards is not None  # by a real port-forward


def test_out_of_memory(release: Install, scene: Scene) -> None:
    release("memory", "exporter.resources.limits.memory=96Mi", "exporter.resources.requests.memory=96Mi")
    (said,) = verdicts(scene, "OOMKilled")
    assert said.what == "it was killed for using more memory than its limit, 96Mi"
    assert "exporter.resources.limits.memory to 192Mi" in said.remedy


def test_a_crash_loop_with_the_last_lines_of_its_log(release: Install, scene: Scene) -> None:
    release("crash")
    (said,) = verdicts(scene, "unknown region")
    assert "ended with 2" in said.what
    assert "headgate.yaml:3: accounts: unknown region" in said.evidence
    assert "headgate check" in said.remedy


def test_an_image_that_is_not_there(release: Install, scene: Scene, registry: str) -> None:
    release("none", f"image.repository={registry}/team/headgate", "image.pullPolicy=IfNotPresent")
    said = verdicts(scene, "not found", fine=0)
    assert "push the image" in said[0].remedy


def test_an_image_that_the_registry_keeps_to_itself(release: Install, scene: Scene, registry: str) -> None:
    release("none", f"image.repository={registry}/private/headgate", "image.pullPolicy=IfNotPresent")
    said = verdicts(scene, "403", fine=0)
    assert "image.pullSecrets" in said[0].remedy


def test_a_registry_that_is_not_reached(release: Install, scene: Scene) -> None:
    (port,) = free_ports(1)
    release("none", f"image.repository=127.0.0.1:{port}/headgate", "image.pullPolicy=IfNotPresent")
    said = verdicts(scene, "refused", fine=0)
    assert "mirror the image" in said[0].remedy


def test_an_image_that_may_not_be_pulled(release: Install, scene: Scene) -> None:
    release("none", "image.tag=absent")
    said = verdicts(scene, "ErrImageNeverPull", fine=0)
    assert "image.pullPolicy" in said[0].remedy


def test_an_image_whose_name_is_none(release: Install, scene: Scene) -> None:
    release("none", "image.repository=HEADGATE")
    said = verdicts(scene, "InvalidImageName", fine=0)
    assert "correct image.repository" in said[0].remedy


def test_an_image_without_the_command(release: Install, scene: Scene) -> None:
    release("none", "image.tag=other")
    said = verdicts(scene, "/bin/absent", fine=0)
    assert "image.repository" in said[0].remedy


def test_a_cpu_limit_that_throttles(release: Install, scene: Scene) -> None:
    release("cpu", "exporter.resources.limits.cpu=200m", "exporter.resources.requests.cpu=100m")
    (said,) = verdicts(scene, "throttled")
    assert said.what == "its CPU limit, 200m, slows it down"
    assert "raise it to 400m" in said.remedy


def test_a_secret_that_is_not_there(release: Install, scene: Scene) -> None:
    release(
        "none",
        "exporter.secretEnv.HEADGATE_KAFKA_PASSWORD.secret=kafka",
        "exporter.secretEnv.HEADGATE_KAFKA_PASSWORD.key=password",
    )
    (said,) = verdicts(scene, "CreateContainerConfigError")
    assert 'secret "kafka" not found' in said.evidence
    assert "make the Secret" in said.remedy


def test_a_secret_without_the_key(release: Install, scene: Scene) -> None:
    scene.plane.kubectl(
        "-n", scene.namespace, "create", "secret", "generic", "kafka", "--from-literal=user=me"
    )
    release(
        "none",
        "exporter.secretEnv.HEADGATE_KAFKA_PASSWORD.secret=kafka",
        "exporter.secretEnv.HEADGATE_KAFKA_PASSWORD.key=password",
    )
    (said,) = verdicts(scene, "CreateContainerConfigError")
    assert "couldn't find key password in Secret" in said.evidence
    assert "with the key" in said.remedy


def test_a_user_that_is_root(release: Install, scene: Scene) -> None:
    release("none")
    patch(scene, {}, securityContext={"runAsUser": 0})
    (said,) = verdicts(scene, "CreateContainerConfigError")
    assert "pod.runAsUser" in said.remedy


def test_secret_files_that_are_not_there(release: Install, scene: Scene) -> None:
    release("none", "secretFiles=absent")
    said = verdicts(scene, "MountVolume", fine=0)
    assert len(said) == 3
    assert 'secret "absent" not found' in said[0].evidence


def test_a_shard_without_slots(release: Install, scene: Scene) -> None:
    release("unready")
    (said,) = verdicts(scene, "Readiness probe failed")
    assert said.what == "it owns no slots"
    assert "alive False" in said.evidence
    assert "Kafka's group" in said.remedy


def test_a_probe_that_ends_a_worker_which_then_drains_in_good_order(release: Install, scene: Scene) -> None:
    release("still")
    patch(scene, {"startupProbe": {"periodSeconds": 1, "failureThreshold": 2}})
    (said,) = verdicts(scene, "ended with 0")
    assert "(a probe ended it)" in said.what
    assert "Startup probe failed" in said.evidence
    assert "connection refused" in said.evidence
    assert "drained" in said.evidence


def test_a_spool_that_outgrows_its_limit(release: Install, scene: Scene) -> None:
    release("disk")
    patch(scene, {}, volumes=[{"name": "spool", "emptyDir": {"sizeLimit": "1Mi"}}])
    said = verdicts(scene, "EmptyDir", alone=False)
    assert {v.what for v in said if "EmptyDir" in v.evidence} == {
        "it was thrown out for taking more disk than it may"
    }
