"""The chart on a real control plane: installed, scaled, and rolled back where an upgrade does not come up: `make test-k8s`.

kwok runs no containers, so the coordinator's page is played here; it knows the shards by the pods that the real controllers made.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.helm_chart import CHART, ROOT
from tests.k8s.control_plane import Object, node
from tests.k8s.scene import Scene
from workers.pods.seen import is_ready, label

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(300)]

SLOTS = 64


def page_of(scene: Scene) -> dict[str, object]:
    """/shards, with the slots dealt out to the exporters that are ready."""
    shards = sorted({label(p, "headgate/shard") for p in scene.pods() if is_ready(p)} - {""})
    return {
        "slots": SLOTS,
        "settled": True,
        "shards": [
            {
                "shard": s,
                "alive": True,
                "slots": (mine := list(range(i, SLOTS, len(shards)))),
                "assigned": mine,
            }
            for i, s in enumerate(shards)
        ],
        "moves": [],
    }


@contextmanager
def coordinator(scene: Scene) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            now_ms = int(time.time() * 1000)
            ledger = {
                "parts": [{"name": "PostgreSQL", "as_of_ms": now_ms}],
                "cells": [{"unit": "t", "gaps": 2}],
            }
            body = json.dumps(ledger if self.path == "/page.json" else page_of(scene)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", scene.plane.page_port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def make_scale(scene: Scene, shards: int) -> str:
    done = subprocess.run(
        ["make", "scale", f"SHARDS={shards}", "RELEASE=headgate", f"NAMESPACE={scene.namespace}", "ARGS=--json"],
        cwd=ROOT, env=scene.plane.environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_installed_by_the_readmes_command_and_scaled_by_make_only_shards_come_and_go(scene: Scene) -> None:
    scene.nodes(*(node(f"node-{i}", "8", "32Gi") for i in (1, 2)))
    scene.helm("install", wait=True)
    three = scene.shards()
    assert {f"exporter-{i}" for i in (1, 2, 3)} < set(three)
    with coordinator(scene):
        scaled = json.loads(make_scale(scene, 5))
        assert (scaled["added"], scaled["removed"]) == (["exporter-4", "exporter-5"], [])
        assert scaled["windows_lost"] == 0
        five = scene.shards()
        assert set(five) - set(three) == {"exporter-4", "exporter-5"}
        assert {shard: five[shard] for shard in three} == three
        scaled = json.loads(make_scale(scene, 2))
        assert (scaled["added"], scaled["removed"]) == ([], ["exporter-3", "exporter-4", "exporter-5"])
        two = scene.shards()
        assert two == {shard: uid for shard, uid in three.items() if shard != "exporter-3"}
        seen, report = scene.look()
        assert report.verdicts == ()
        assert seen.shards == page_of(scene)


def test_an_upgrade_that_does_not_come_up_is_rolled_back(scene: Scene) -> None:
    scene.nodes(node("node-1", "16", "64Gi"))
    scene.helm("install", "--set", "shards=2", wait=True)
    values = scene.plane.helm(
        "get", "values", "headgate", "--namespace", scene.namespace, "-o", "json"
    ).stdout
    # Without the hook: its pod would not get ready either, and no worker be touched.
    with pytest.raises(AssertionError, match="rolled back"):
        scene.helm(
            "upgrade",
            "--no-hooks",
            "--reuse-values",
            "--timeout",
            "15s",
            "--set",
            "pod.labels.fault=yes",
            wait=True,
        )
    scene.plane.wait(lambda: all(map(is_ready, scene.pods())), "the old version is back", 60)
    assert not any(label(p, "fault") for p in scene.pods())
    after = scene.plane.helm("get", "values", "headgate", "--namespace", scene.namespace, "-o", "json").stdout
    assert json.loads(after) == json.loads(values)


def any_shape(kind: str, group: str, version: str) -> Object:
    """Another project's kind, with whatever in it: that its objects are taken, not that they are understood."""
    plural = f"{kind.lower()}s"
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [
                {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}
            ],
        },
    }


def test_with_remote_write_rules_and_dashboards_it_installs_and_a_receiver_more_restarts_no_pod(
    scene: Scene, tmp_path: Path
) -> None:
    monitoring = "monitoring.coreos.com"
    scene.plane.apply(
        any_shape("PodMonitor", monitoring, "v1"),
        any_shape("PrometheusRule", monitoring, "v1"),
        any_shape("ScaledObject", "keda.sh", "v1alpha1"),
    )
    scene.plane.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    scene.nodes(node("node-1", "16", "64Gi"))
    values = CHART / "ci" / "prometheus.yaml"
    scene.helm("install", "--values", str(values), wait=True)
    before = scene.shards()
    assert [name for name in before if "remote-writer" in name] != []
    rules = scene.plane.get("prometheusrules", scene.namespace)
    assert {r["metadata"]["name"] for r in rules} == {
        f"headgate-{path.stem}" for path in CHART.glob("files/rules/*.yml")
    }
    dashboards = scene.plane.get("configmaps", scene.namespace, "-l", "grafana_dashboard=1")
    assert len(dashboards) == len(list(CHART.glob("files/dashboards/*.json")))

    given = yaml.safe_load(values.read_text())
    given["config"]["remote_write"]["receivers"] += [
        {"name": "fourth", "url": "http://fourth:9090/api/v1/write"}
    ]
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(given))
    scene.helm("upgrade", "--values", str(tmp_path / "values.yaml"), wait=True)
    assert scene.shards() == before
    [scaled] = [
        s
        for s in scene.plane.get("scaledobjects", scene.namespace)
        if s["metadata"]["name"] == "headgate-remote-writer"
    ]
    groups = [t["metadata"]["consumerGroup"] for t in scaled["spec"]["triggers"]]
    assert groups[-1] == "headgate.remote-write.fourth"
    assert len(groups) == 4
