"""A real Kubernetes control plane as processes, without containers: etcd, API server, controllers and scheduler decide; kwok plays the nodes.

* Everything listens on loopback, dies with the process that started it, and keeps its state in one folder.
* kwok's nodes let a pod that is scheduled "run": no container, no probe, no network policy. A pod with the label `fault` never gets ready;
  its log is the file `log`; its port 9100 is a port of this machine.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.helm_chart import tool as chart_tool
from workers.servers import _die_with_parent, free_ports, last_line

START_TIMEOUT_S = 90.0
_SIMULATED = "kwok.x-k8s.io/node"
"""The annotation of the nodes that kwok plays; a real one (real_node.py) it leaves alone."""
Object = dict[str, Any]


def tools() -> Path:
    """Where `kubecp`, `kwok` and `kwok.yaml` are: TOOLS, or the cache that tests/k8s/build.sh fills."""
    return Path(os.environ.get("TOOLS") or Path.home() / ".cache" / "headgate-tools")


def missing() -> str:
    """Why there can be no control plane here; empty where there can."""
    absent = [str(tools() / n) for n in ("kubecp", "kwok", "kwok.yaml") if not (tools() / n).exists()]
    absent += [n for n in ("helm", "kubectl", "openssl") if chart_tool(n) is None]
    return (
        f"not there: {', '.join(absent)}; tests/k8s/build.sh builds them in half an hour, once"
        if absent
        else ""
    )


class ControlPlane:
    """`start` before anything else, `stop` in the end; `kubeconfig` is the way in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "admin.conf"
        self.log = folder / "log"
        self._processes: list[subprocess.Popen[bytes]] = []
        etcd, peer, self._api, kubelet, self.page_port = free_ports(5)
        self._etcd, self._peer = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"
        self._kubelet = kubelet

    # --- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        (self.folder / "certs").mkdir()
        self.log.write_text("")
        key = self.folder / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        token = secrets.token_hex(16)
        (self.folder / "tokens.csv").write_text(f"{token},admin,1,system:masters\n")
        self._run(
            "etcd", "--data-dir", self.folder / "etcd", "--unsafe-no-fsync",
            "--listen-client-urls", self._etcd, "--advertise-client-urls", self._etcd,
            "--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer,
            "--initial-cluster", f"default={self._peer}",
        )  # fmt: skip
        self._run(
            "kube-apiserver", "--etcd-servers", self._etcd, "--bind-address", "127.0.0.1", "--secure-port", self._api,
            "--cert-dir", self.folder / "certs", "--advertise-address", "192.0.2.1", "--endpoint-reconciler-type", "none",
            "--service-cluster-ip-range", "10.96.0.0/16", "--authorization-mode", "RBAC",
            "--token-auth-file", self.folder / "tokens.csv", "--kubelet-preferred-address-types", "InternalIP",
            "--service-account-issuer", "https://kubernetes.default.svc",
            "--service-account-key-file", key, "--service-account-signing-key-file", key,
        )  # fmt: skip
        certificate = (
            self.folder / "certs" / "apiserver.crt"
        )  # made by the API server itself, with its issuer
        cluster = {"server": f"https://127.0.0.1:{self._api}", "certificate-authority": str(certificate)}
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "test", "cluster": cluster}],
                    "users": [{"name": "admin", "user": {"token": token}}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
                    "current-context": "test",
                }
            )
        )
        self.wait(lambda: self._kubectl("get", "--raw", "/readyz").returncode == 0, "the API server is ready")
        self._run(
            "kube-controller-manager", "--kubeconfig", self.kubeconfig, "--leader-elect=false", "--secure-port=0",
            "--service-account-private-key-file", key, "--root-ca-file", certificate,
        )  # fmt: skip
        self._run(
            "kube-scheduler", "--kubeconfig", self.kubeconfig, "--leader-elect=false", "--secure-port=0"
        )
        self._run(
            "kwok", "--config", self._kwok_config(), "--kubeconfig", self.kubeconfig,
            f"--manage-nodes-with-annotation-selector={_SIMULATED}=fake",
            "--node-ip=127.0.0.1", f"--node-port={self._kubelet}", "--node-lease-duration-seconds=40",
            f"--server-address=127.0.0.1:{self._kubelet}", "--cidr=192.0.2.0/24",
            "--tls-cert-file", certificate, "--tls-private-key-file", certificate.with_suffix(".key"),
        )  # fmt: skip
        self.wait(lambda: self._kubectl("get", "sa", "default").returncode == 0, "the controllers work")

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()

    def _run(self, name: str, *args: object) -> None:
        command = [tools() / "kwok"] if name == "kwok" else [tools() / "kubecp", name]
        line = [*_die_with_parent(signal.SIGKILL), *map(str, (*command, *args))]
        with (self.folder / f"{name}.log").open("wb") as out:
            self._processes.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=out))

    def _kwok_config(self) -> Path:
        """kwok's own stages, but that a pod with the label `fault` does not get ready."""
        stages = [d for d in yaml.safe_load_all((tools() / "kwok.yaml").read_text()) if d]
        ready = next(s for s in stages if s["metadata"]["name"] == "pod-ready")
        no_fault = {"key": '.metadata.labels["fault"]', "operator": "DoesNotExist"}
        ready["spec"]["selector"]["matchExpressions"].append(no_fault)
        log = {"logsFile": str(self.log), "previousLogsFile": str(self.log)}
        target = {"address": "127.0.0.1", "port": self.page_port}
        extras = {
            "ClusterLogs": {"logs": [log]},
            "ClusterPortForward": {"forwards": [{"ports": [9100], "target": target}]},
        }
        for kind, spec in extras.items():
            stages.append(
                {
                    "apiVersion": "kwok.x-k8s.io/v1alpha1",
                    "kind": kind,
                    "metadata": {"name": "all"},
                    "spec": spec,
                }
            )
        path = self.folder / "kwok.yaml"
        path.write_text(yaml.safe_dump_all(stages))
        return path

    # --- use --------------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        helm = chart_tool("helm") or "helm"
        path = f"{Path(helm).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "PATH": path}

    def _kubectl(self, *args: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["kubectl", *args], input=given, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )  # fmt: skip

    def kubectl(self, *args: str, given: str | None = None) -> str:
        done = self._kubectl(*args, given=given)
        assert done.returncode == 0, f"kubectl {' '.join(args)}: {done.stderr}"
        return done.stdout

    def apply(self, *objects: Mapping[str, Any], namespace: str = "default") -> None:
        together = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.kubectl("-n", namespace, "apply", "-f", "-", given=json.dumps(together))

    def get(self, kind: str, namespace: str, *selectors: str) -> list[Object]:
        found: list[Object] = json.loads(
            self.kubectl("-n", namespace, "get", kind, "-o", "json", *selectors)
        )["items"]
        return found

    def helm(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = [chart_tool("helm") or "helm", *args]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )

    def wait(self, until: Callable[[], object], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not until():
            for process in self._processes:
                name = str(process.args[-1]) if isinstance(process.args, list) else ""
                assert process.poll() is None, f"a part has ended ({name}): {self.folder}"
            assert time.monotonic() < deadline_s, f"not in {timeout_s:g} s: {what}; {self._last_words()}"
            time.sleep(0.2)

    def _last_words(self) -> str:
        return "; ".join(f"{log.stem}: {last_line(log)}" for log in sorted(self.folder.glob("*.log")))


def node(
    name: str, cpu: str, memory: str, *, labels: Mapping[str, str] | None = None, **spec: object
) -> Object:
    """A simulated node, all of it allocatable."""
    has = {"cpu": cpu, "memory": memory, "pods": "110"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/hostname": name, **(labels or {})},
            "annotations": {_SIMULATED: "fake"},
        },
        "spec": spec,
        "status": {"allocatable": has, "capacity": has},
    }
