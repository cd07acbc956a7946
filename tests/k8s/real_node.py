"""A node with a real kubelet, containerd and runc as processes of this machine: containers that really start, crash and are killed.

* Kubelet, containerd and all containers live in a pid and a mount namespace of their own: when their first process ends, the kernel ends the
  rest, and their mounts and networks go with them. Nothing outlives the process that started them; cgroups and the address go at `stop`.
* It listens on the loopback interface and on a network of its own, asks no image registry but for images that are not there, and leaves iptables alone.
* It has one image, IMAGE: busybox and the script `headgate`, which does what the environment variable FAULT says.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.k8s.control_plane import ControlPlane, Object, tools
from workers.pods.seen import condition
from workers.servers import _die_with_parent, free_ports

IMAGE = "localhost/headgate:test"
NOT_OURS = "localhost/headgate:other"
"""Its command is not in it."""
NAME = "real"
_PAUSE = "localhost/pause:1"
_CNI = Path("/usr/lib/cni")
_CGROUPS = Path("/sys/fs/cgroup")
_NEEDED = ("containerd", "ctr", "runc", "busybox", "unshare", "setpriv", "ip")
_PACKAGES = "apt-get install containerd runc containernetworking-plugins busybox-static util-linux iproute2"


def missing() -> str:
    """Why there can be no real node here; empty where there can."""
    if os.geteuid() != 0:
        return "a real kubelet needs root"
    absent = [n for n in _NEEDED if shutil.which(n) is None]
    absent += [str(_CNI / n) for n in ("ptp", "host-local", "loopback") if not (_CNI / n).exists()]
    if absent:
        return f"not there: {', '.join(absent)}; {_PACKAGES}"
    if not os.access(_CGROUPS, os.W_OK) or not (
        _cgroup_roots() or (_CGROUPS / "cgroup.controllers").exists()
    ):
        return f"{_CGROUPS} cannot be written to"
    if _command("unshare", "--mount", "--pid", "--fork", "--mount-proc", "true").returncode:
        return "namespaces are not allowed here"
    if _command(tools() / "kubecp", "kubelet", "--version").returncode:
        return f"{tools() / 'kubecp'} is of before it had a kubelet; tests/k8s/build.sh builds it anew"
    return ""


class RealNode:
    """`start` after its control plane, `stop` before it. While it is there the scheduler knows it, by the name NAME."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.plane = plane
        self.folder = folder
        self._socket = folder / "run" / "containerd.sock"
        self._cgroup = f"headgate-{secrets.token_hex(4)}"
        number = secrets.randbelow(256)
        self._net = f"198.18.{number}.0/24"
        """Of the addresses kept for benchmarks: nobody else's."""
        self._address = f"198.19.{number}.1"
        """On the loopback interface. Not 127.0.0.1: there the API server does not ask for a node's metrics ("address not allowed")."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for root in _cgroup_roots():
            _make_cgroup(root / self._cgroup)
        _command("ip", "address", "add", f"{self._address}/32", "dev", "lo")
        command = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-ec",
            self._life(),
        ]
        with (self.folder / "node.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*_die_with_parent(signal.SIGKILL), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.plane.wait(lambda: self._ctr("version").returncode == 0, "containerd answers")
        images = {
            _PAUSE: ("/bin/busybox", "sleep", "infinity"),
            IMAGE: ("/bin/headgate",),
            NOT_OURS: ("/bin/absent",),
        }
        for name, entrypoint in images.items():
            tar = self.folder / "image.tar"
            tar.write_bytes(image(name, entrypoint))
            done = self._ctr("-n", "k8s.io", "images", "import", str(tar))
            assert done.returncode == 0, done.stderr
        self.plane.wait(self._is_registered, "the real node is registered")
        self._give_an_address()
        self.plane.wait(self._is_ready, "the real node is ready")

    def stop(self) -> None:
        """Ends everything that it started, and waits until it is gone."""
        if self._process is None:
            return
        self._process.kill()  # and the kernel all that is in its namespaces
        self._process.wait()
        _command("ip", "address", "delete", f"{self._address}/32", "dev", "lo")
        self.plane.kubectl("delete", "node", NAME, "--ignore-not-found", "--wait=false")
        for root in _cgroup_roots():
            for folder in sorted((root / self._cgroup).rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            with contextlib.suppress(OSError):
                (root / self._cgroup).rmdir()

    def _is_registered(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the node has ended: {self.folder / 'node.log'}"
        return bool(self._seen())

    def _is_ready(self) -> bool:
        return any(condition(node, "Ready").get("status") == "True" for node in self._seen())

    def _seen(self) -> list[Object]:
        return self.plane.get("nodes", "default", "--field-selector", f"metadata.name={NAME}")

    def _give_an_address(self) -> None:
        """The API server reaches the kubelet there: for logs, its metrics, and ports of pods."""
        status = {"status": {"addresses": [{"type": "InternalIP", "address": self._address}]}}
        self.plane.kubectl("patch", "node", NAME, "--subresource=status", "--patch", json.dumps(status))
        self.plane.kubectl("taint", "node", NAME, "node.cloudprovider.kubernetes.io/uninitialized-")

    def _ctr(self, *args: str) -> subprocess.CompletedProcess[str]:
        return _command("ctr", "--address", self._socket, *args)

    # --- configuration ------------------------------------------------------------------------------------------

    def _life(self) -> str:
        """The script of the first process in the namespaces. What the kubelet keeps at fixed places is hidden behind folders in memory."""
        containerd = shlex.join(["containerd", "--config", str(self._containerd())])
        kubelet = shlex.join(
            [
                str(tools() / "kubecp"), "kubelet", "--config", str(self._kubelet()), "--kubeconfig", str(self.plane.kubeconfig),
                "--root-dir", str(self.folder / "kubelet"), "--cert-dir", str(self.folder / "certs"),
                "--hostname-override", NAME, "--node-labels", "headgate/real=true",
                # It would look for an address by itself, and take the machine's: `_give_an_address` is its cloud.
                "--cloud-provider", "external",
            ]
        )  # fmt: skip
        hidden = [
            f"mkdir -p {f}; mount -t tmpfs none {f}"
            for f in ("/var/lib/kubelet", "/var/log/containers", "/opt/containerd")
        ]
        # cAdvisor looks for containerd there and nowhere else; without it, its metrics name no pods.
        hidden.append(
            f"mkdir -p /run/containerd; mount --bind {shlex.quote(str(self._socket.parent))} /run/containerd"
        )
        log = shlex.quote(str(self.folder / "containerd.log"))
        socket = shlex.quote(str(self._socket))
        return f"{'; '.join(hidden)}; {containerd} >{log} 2>&1 & until [ -S {socket} ]; do sleep 0.1; done; {kubelet}"

    def _containerd(self) -> Path:
        self._socket.parent.mkdir()
        cni = self.folder / "cni"
        cni.mkdir()
        ipam = {
            "type": "host-local", "subnet": self._net, "routes": [{"dst": "0.0.0.0/0"}], "dataDir": str(self.folder / "ipam"),
        }  # fmt: skip
        network = {"cniVersion": "1.0.0", "name": "headgate", "plugins": [{"type": "ptp", "ipam": ipam}]}
        (cni / "10.conflist").write_text(json.dumps(network))
        path = self.folder / "containerd.toml"
        path.write_text(
            f"""version = 2
root = "{self.folder / "images"}"
state = "{self.folder / "state"}"
[grpc]
  address = "{self._socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{_PAUSE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{_CNI}"
    conf_dir = "{cni}"
"""
        )
        return path

    def _kubelet(self) -> Path:
        port, health = free_ports(2)
        path = self.folder / "kubelet.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kubelet.config.k8s.io/v1beta1",
                    "kind": "KubeletConfiguration",
                    "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
                    "authorization": {"mode": "AlwaysAllow"},
                    "address": self._address,
                    "port": port,
                    "healthzPort": health,
                    "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
                    "podLogsDir": str(self.folder / "logs"),
                    "cgroupDriver": "cgroupfs",
                    "cgroupRoot": f"/{self._cgroup}",
                    "failCgroupV1": False,
                    "failSwapOn": False,
                    "enforceNodeAllocatable": [],
                    "makeIPTablesUtilChains": False,
                    # A test's machine may be short of disk: that is not what is tested.
                    "evictionHard": {
                        "memory.available": "1Mi", "nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%",
                    },
                    "imageMinimumGCAge": "24h",
                    # As in a cluster, only that nobody waits five minutes for the next start.
                    "featureGates": {"KubeletCrashLoopBackOffMax": True},
                    "crashLoopBackOff": {"maxContainerRestartPeriod": "5s"},
                    "syncFrequency": "2s",
                    # By default what volumes take is looked at once a minute, which is how long a test waits.
                    "volumeStatsAggPeriod": "2s",
                    "nodeStatusUpdateFrequency": "5s",
                }
            )
        )  # fmt: skip
        return path


SCRIPT = """#!/bin/busybox sh
# headgate PART …: the exporter does what FAULT says, everything else is well.
b=/bin/busybox
serve() { exec $b httpd -f -p 9100 -h "$1"; }
case "$1:$FAULT" in
  exporter:memory) exec $b tail /dev/zero ;;
  exporter:crash)
    echo starting
    echo "headgate.yaml:3: accounts: unknown region" >&2
    exit 2 ;;
  exporter:cpu) while :; do :; done & serve /well ;;
  exporter:unready) serve /unready ;;
  coordinator:unready) serve /lonely ;;
  exporter:still) trap 'echo drained; exit 0' TERM; echo waiting; while :; do $b sleep 0.2; done ;;
  exporter:disk) $b dd if=/dev/zero of=/tmp/spool bs=1M count=8; serve /well ;;
  *) serve /well ;;
esac
"""


def _shards(*slots: int) -> bytes:
    """The coordinator's page about the exporter."""
    shard = {"shard": "exporter-1", "alive": bool(slots), "slots": slots, "assigned": slots}
    return json.dumps({"slots": 64, "shards": [shard]}).encode()


_FILES: Mapping[str, bytes] = {
    "bin/headgate": SCRIPT.encode(),
    "well/healthz": b"ok\n",
    "well/readyz": b"ok\n",
    "well/shards": _shards(1),
    "unready/healthz": b"ok\n",
    "lonely/healthz": b"ok\n",
    "lonely/readyz": b"ok\n",
    "lonely/shards": _shards(),
}


def image(name: str, entrypoint: tuple[str, ...]) -> bytes:
    """An image with busybox and the script, as a tar file that `ctr images import` takes."""
    busybox = Path(shutil.which("busybox") or "").read_bytes()
    layer = _tar({"bin/busybox": busybox, **_FILES})
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps(
        {
            "architecture": os.uname().machine.replace("x86_64", "amd64").replace("aarch64", "arm64"),
            "os": "linux",
            "config": {"Entrypoint": entrypoint, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    return _tar({"config.json": config, "layer.tar": layer, "manifest.json": json.dumps(manifest).encode()})


def _tar(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _command(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)


def _cgroup_roots() -> list[Path]:
    """Where each controller's tree begins (version 1), or the one tree of version 2."""
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return sorted(p.parent for p in _CGROUPS.glob("*/cgroup.procs"))


def _make_cgroup(folder: Path) -> None:
    folder.mkdir()
    for name in ("cpuset.cpus", "cpuset.mems"):  # version 1: an empty set takes no process
        if (folder / name).exists():
            (folder / name).write_text((folder.parent / name).read_text())
