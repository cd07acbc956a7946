"""The metrics that running workers have: of real processes, each asked for its /metrics. Their servers are away, which they outlive."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from workers.servers import LOOPBACK, free_ports, get_local

CONFIG = """
accounts: [{id: "100000000001", regions: [eu-west-1], services: [ec2]}]
kafka: {bootstrap: "127.0.0.1:1"}
postgres: {dsn: "postgresql://127.0.0.1:1/none", capacity_bytes: 1}
s3: {endpoint_url: "http://127.0.0.1:1"}
remote_write: {receivers: [{name: p1, url: "http://127.0.0.1:1/api/v1/write"}]}
"""
WORKERS = {
    "coordinator": (),
    "exporter": ("--shard", "exporter-1"),
    "consumer": ("--name", "consumer-1"),
    "remote-write": ("--name", "remote-write-1"),
}
TIMEOUT_S = 60.0


@cache
def metrics_of_workers() -> frozenset[str]:
    """Names as PromQL knows them (…_bucket of histograms), of all workers together. Asked once a test process."""
    with TemporaryDirectory() as home:
        return frozenset(_asked(Path(home)))


def _asked(home: Path) -> set[str]:
    config = home / "headgate.yaml"
    config.write_text(CONFIG)
    started: list[tuple[subprocess.Popen[bytes], int]] = []
    try:
        for worker in WORKERS:
            (port,) = free_ports(1)
            options = ["--config", str(config), *WORKERS[worker], "--metrics-port", str(port)]
            command = [sys.executable, "-m", "workers.cli", worker, *options]
            with (home / f"{worker}.log").open("wb") as log:
                process = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ)
            started.append((process, port))
        return {name for process, port in started for name in names_of(_read(process, port))}
    finally:
        for process, _ in started:
            process.kill()
            process.wait()


def names_of(exposed: str) -> set[str]:
    """From text in Prometheus' format, of metrics without a sample, too."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", exposed, re.MULTILINE):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if "histogram" in kind else {name}
    return found


def _read(process: subprocess.Popen[bytes], port: int) -> str:
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return get_local(f"http://{LOOPBACK}:{port}/metrics", timeout_s=5).decode()
        except OSError:
            assert process.poll() is None, f"{process.args!r} ended"
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
