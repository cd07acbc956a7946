"""Real Prometheus servers as processes of this machine, and what promtool says of a file.

HEADGATE_TEST_PROMETHEUS names another binary than the `prometheus` on the PATH, to hold the same tests against another version.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from workers.servers import LOOPBACK, Server, free_ports, get_local

BINARY = os.environ.get("HEADGATE_TEST_PROMETHEUS") or shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")

needs_prometheus = pytest.mark.skipif(
    BINARY is None, reason="there is no prometheus on the PATH: apt-get install prometheus"
)
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="there is no promtool on the PATH: apt-get install prometheus"
)


class PrometheusServer(Server):
    """A server that takes remote write. Give each a home of its own; stopped and started again it has its data still."""

    name = "prometheus"

    def __init__(
        self,
        home: Path,
        *,
        out_of_order_window: str = "",
        scrape_configs: Sequence[dict[str, Any]] = (),
        rule_files: Sequence[Path] = (),
        evaluation_interval: str = "1s",
        config: dict[str, Any] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        """`out_of_order_window` as 2h; empty: none. `config` is added to prometheus.yml at its top."""
        super().__init__(home)
        (self.port,) = free_ports(1)
        self._flags = tuple(flags)
        written: dict[str, Any] = {
            "global": {"scrape_interval": "1s", "evaluation_interval": evaluation_interval},
            "scrape_configs": list(scrape_configs),
            "rule_files": [str(path) for path in rule_files],
        }
        if out_of_order_window:
            written["storage"] = {"tsdb": {"out_of_order_time_window": out_of_order_window}}
        self._config = written | (config or {})

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def write_url(self) -> str:
        return f"{self.url}/api/v1/write"

    def prepare(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "prometheus.yml").write_text(yaml.safe_dump(self._config))

    def command(self) -> Sequence[str]:
        assert BINARY is not None
        return [
            BINARY,
            f"--config.file={self.dir / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.dir / 'data'}",
            f"--web.listen-address={LOOPBACK}:{self.port}",
            "--web.enable-remote-write-receiver",
            "--storage.tsdb.retention.time=10y",
            *self._flags,
        ]

    def ready(self) -> bool:
        try:
            get_local(f"{self.url}/-/ready", timeout_s=1)
        except OSError:
            return False
        return True

    def api(self, path: str, **parameters: object) -> Any:
        """`data` of an answer of /api/v1/<path>. Fails where it is none."""
        query = urllib.parse.urlencode(parameters, doseq=True)
        try:
            body = get_local(f"{self.url}/api/v1/{path}?{query}", timeout_s=30)
        except urllib.error.HTTPError as error:
            body = error.read()
        answer = json.loads(body)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str, at_s: float | None = None) -> list[tuple[dict[str, str], float]]:
        """An instant query's vector: (labels, value) each."""
        at = {} if at_s is None else {"time": at_s}
        data = self.api("query", query=expression, **at)
        assert data["resultType"] == "vector", data
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def samples(
        self, selector: str, from_s: int, to_s: int
    ) -> dict[tuple[tuple[str, str], ...], dict[int, float]]:
        """By labels (sorted pairs), the samples as they are stored, timestamp in seconds → value, in (from, to]."""
        data = self.api("query", query=f"{selector}[{to_s - from_s}s]", time=to_s)
        return {
            tuple(sorted(one["metric"].items())): {int(float(t)): float(v) for t, v in one["values"]}
            for one in data["result"]
        }


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool; 30 s at most."""
    assert PROMTOOL is not None
    command = [PROMTOOL, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
