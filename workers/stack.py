"""What a local stack is made of: its addresses, its programs, and how they change. Pure; `local.py` acts on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from workers.prometheus import PrometheusServer
from workers.servers import LOOPBACK, S3Server, Server
from workers.supervise import Program

OUT_OF_ORDER_WINDOW_S = 7200
"""Of the local stack's Prometheus servers: points of CloudWatch come late, and those of a run's previous hour later still."""

CHECKOUT = str(Path(__file__).resolve().parent.parent)
"""Where processes run: `python -m workers.cli` finds its modules there, installed or not."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the parts of a stack are."""

    kafka_bootstrap: str
    postgres_dsn: str
    s3_url: str
    aws_url: str
    """The simulated AWS."""
    workers_file: str
    """The workers' metrics endpoints, in Prometheus' file_sd format; kept up to date."""
    prometheus_urls: tuple[str, ...] = ()
    """Of the servers that take remote write, prometheus-1 first; empty: none, and no remote writer either."""


@dataclass(frozen=True, slots=True)
class StackSpec:
    """What to start."""

    config_text: Callable[[Endpoints], str]
    """Gives the text of headgate.yaml, once the addresses are known."""
    shards: int = 3
    consumers: int = 2
    simulate_args: tuple[str, ...] = ()
    """Appended to `headgate simulate --host … --port …`."""
    worker_command: tuple[str, ...] = (sys.executable, "-m", "workers.cli")
    """What stands for `headgate` on a command line."""
    prometheus: int = 0
    """Servers that take remote write, each its share of the accounts."""

    def worker_names(self) -> list[str]:
        exporters = [exporter_name(i) for i in range(1, self.shards + 1)]
        consumers = [f"consumer-{i}" for i in range(1, self.consumers + 1)]
        return ["coordinator", *exporters, *consumers, *(["remote-writer-1"] if self.prometheus else [])]


@dataclass(frozen=True, slots=True)
class State:
    """What another process needs to find a stack and to change it: run/state.json."""

    supervisor_pid: int
    socket: str
    config_path: str
    endpoints: Endpoints
    worker_command: tuple[str, ...]
    programs: tuple[Program, ...]
    """Those that are not workers."""
    metrics_ports: Mapping[str, int]
    """By worker."""

    def all_programs(self) -> tuple[Program, ...]:
        return (*self.programs, *(self._worker(name, port) for name, port in self.metrics_ports.items()))

    def _worker(self, name: str, metrics_port: int) -> Program:
        kind = name.rpartition("-")[0] or name
        command, *who = {
            "coordinator": ("coordinator",),
            "exporter": ("exporter", "--shard", name),
            "consumer": ("consumer", "--name", name),
            "remote-writer": ("remote-write", "--name", name),
        }[kind]
        options = ("--config", self.config_path, *who, "--metrics-port", str(metrics_port))
        return Program(name, (*self.worker_command, command, *options), CHECKOUT)

    def with_workers(self, names: Sequence[str], ports: Sequence[int]) -> State:
        """With these workers, on these ports of 127.0.0.1."""
        return replace(self, metrics_ports=dict(zip(names, ports, strict=True)))

    def with_shards(self, shards: int, free: Callable[[int], Sequence[int]]) -> State:
        """With exporter-1 … exporter-<shards>; those that are there keep their ports, `free(n)` gives n others."""
        wanted = [exporter_name(i) for i in range(1, shards + 1)]
        added = [name for name in wanted if name not in self.metrics_ports]
        kept = {n: p for n, p in self.metrics_ports.items() if n in wanted or not n.startswith("exporter-")}
        return replace(self, metrics_ports=kept | dict(zip(added, free(len(added)), strict=True)))

    def file_sd(self) -> str:
        """The workers' endpoints in Prometheus' file_sd format."""
        return json.dumps([{"targets": [f"{LOOPBACK}:{p}" for p in self.metrics_ports.values()]}]) + "\n"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> State:
        """The inverse of `to_json`."""
        raw: dict[str, Any] = json.loads(text)
        programs = tuple(Program(**p | {"command": tuple(p["command"])}) for p in raw["programs"])
        parsed = {
            "endpoints": Endpoints(
                **raw["endpoints"] | {"prometheus_urls": tuple(raw["endpoints"]["prometheus_urls"])}
            ),
            "programs": programs,
            "worker_command": tuple(raw["worker_command"]),
        }
        return cls(**raw | parsed)


def prometheus_servers(home: Path, count: int, workers_file: str) -> tuple[PrometheusServer, ...]:
    """prometheus-1 to prometheus-<count>: all with the recording rules that are shipped; the first watches the workers, with the alerts."""
    rules = sorted((Path(CHECKOUT) / "helm" / "headgate" / "files" / "rules").glob("*.yml"))
    watching = {"job_name": "headgate", "file_sd_configs": [{"files": [workers_file]}]}
    return tuple(
        PrometheusServer(
            home,
            name=f"prometheus-{number}",
            out_of_order_window=f"{OUT_OF_ORDER_WINDOW_S}s",
            scrape_configs=[watching] if number == 1 else [],
            rule_files=[path for path in rules if number == 1 or path.name.startswith("recording")],
            evaluation_interval="15s",
            retention="1d",
        )
        for number in range(1, count + 1)
    )


def exporter_name(number: int) -> str:
    return f"exporter-{number}"


def server_program(server: Server) -> Program:
    stop_signal = server.stop_signal.name.removeprefix("SIG")
    restart = not isinstance(server, S3Server)
    return Program(server.name, tuple(server.command()), str(server.dir), stop_signal, restart)
