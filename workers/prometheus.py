"""A real Prometheus as a process of this machine, for the local stack and the tests: it takes remote write, and answers PromQL."""

from __future__ import annotations

import json
import os
import shutil
import urllib.error
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ingest.errors import Fatal, Rejected
from workers.servers import LOOPBACK, Server, free_ports, get_local

REMEDY = "install it (apt-get install prometheus | brew install prometheus)"

Held = dict[tuple[tuple[str, str], ...], dict[int, float]]
"""By labels (sorted pairs) the samples as they are stored, timestamp in seconds → value."""


def prometheus_program() -> str | None:
    """The program that HEADGATE_PROMETHEUS names, or `prometheus` on the PATH; None where there is none."""
    return os.environ.get("HEADGATE_PROMETHEUS") or shutil.which("prometheus")


class PrometheusServer(Server):
    """Give each a home or a name of its own. Stopped and started again it has its data still."""

    name = "prometheus"

    def __init__(
        self,
        home: Path,
        log: Path | None = None,
        *,
        name: str = "prometheus",
        out_of_order_window: str = "",
        scrape_configs: Sequence[dict[str, Any]] = (),
        rule_files: Sequence[Path] = (),
        evaluation_interval: str = "1s",
        retention: str = "10y",
        config: dict[str, Any] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        """`out_of_order_window` as 2h; empty: none. `config` is added to prometheus.yml at its top."""
        self.name = name
        super().__init__(home, log)
        (self.port,) = free_ports(1)
        self._flags = (f"--storage.tsdb.retention.time={retention}", *flags)
        written: dict[str, Any] = {
            "global": {"scrape_interval": evaluation_interval, "evaluation_interval": evaluation_interval},
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
        if prometheus_program() is None:
            raise Fatal(self.name, "there is no prometheus on the PATH", REMEDY)
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "prometheus.yml").write_text(yaml.safe_dump(self._config))

    def command(self) -> Sequence[str]:
        return [
            prometheus_program() or "prometheus",
            f"--config.file={self.dir / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.dir / 'data'}",
            f"--web.listen-address={LOOPBACK}:{self.port}",
            "--web.enable-remote-write-receiver",
            *self._flags,
        ]

    def ready(self) -> bool:
        try:
            get_local(f"{self.url}/-/ready", timeout_s=1)
        except OSError:
            return False
        return True

    def api(self, path: str, **parameters: object) -> Any:
        """`data` of an answer of /api/v1/<path>. Raises OSError, Rejected."""
        return ask(self.url, path, **parameters)

    def query(self, expression: str, at_s: float | None = None) -> list[tuple[dict[str, str], float]]:
        """An instant query's vector: (labels, value) each."""
        at = {} if at_s is None else {"time": at_s}
        data = self.api("query", query=expression, **at)
        if data["resultType"] != "vector":
            raise Rejected(self.name, "bad_query", f"{expression} is a {data['resultType']}, not a vector")
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def samples(self, selector: str, from_s: int, to_s: int) -> Held:
        """The samples with timestamps in (from, to]."""
        return samples(self.url, selector, from_s, to_s)


def ask(url: str, path: str, **parameters: object) -> Any:
    """`data` of an answer of a Prometheus' /api/v1/<path>. Raises OSError, and Rejected with the server's own words."""
    query = urllib.parse.urlencode(parameters, doseq=True)
    try:
        body = get_local(f"{url}/api/v1/{path}?{query}", timeout_s=30)
    except urllib.error.HTTPError as error:
        body = error.read()
    answer = json.loads(body)
    if answer["status"] != "success":
        raise Rejected(f"{url}/api/v1/{path}", str(answer.get("errorType")), str(answer.get("error")))
    return answer["data"]


def samples(url: str, selector: str, from_s: int, to_s: int) -> Held:
    """The samples of a selector with timestamps in (from, to]. Raises OSError, Rejected."""
    data = ask(url, "query", query=f"{selector}[{to_s - from_s}s]", time=to_s)
    return {
        tuple(sorted(one["metric"].items())): {int(float(t)): float(v) for t, v in one["values"]}
        for one in data["result"]
    }
