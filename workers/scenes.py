"""What a local run simulates, and the configuration that collects it: made-up accounts, or a folder of recorded traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shard_config.load import shipped_services
from workers.local import Endpoints
from workers.stack import OUT_OF_ORDER_WINDOW_S
from workers.traces import TraceWorld
from workers.world import Truth, World, account_ids

REGIONS = ("eu-west-1", "us-east-1")
SERVICES = ("ec2", "rds", "lambda", "sqs", "alb")
SETTLING_S = 600
WORKERS_JOB = "headgate"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is simulated, and the configuration's text that collects it."""

    truth: Truth
    simulate_args: tuple[str, ...]
    clock_offset_s: int
    horizon_s: tuple[int, int] | None
    config: Callable[[Endpoints], str]


def made_up_scene(accounts: int, metrics: int, seed: int, once: bool) -> Scene:
    """Simulated accounts × 2 regions, and Headgate's own workers as a second source."""
    ids = account_ids(accounts)
    profiles = [shipped_services()[name] for name in SERVICES]
    to_s = int(time.time()) // 300 * 300
    horizon_s = (to_s - 3600, to_s) if once else None
    regions = ",".join(REGIONS)
    args = ("--accounts", str(accounts), "--regions", regions, "--metrics", str(metrics), "--seed", str(seed))

    def config(endpoints: Endpoints) -> str:
        return _yaml(
            endpoints,
            {
                "accounts": [{"id": i, "regions": list(REGIONS), "services": list(SERVICES)} for i in ids],
                "exposition": [
                    {
                        "name": WORKERS_JOB,
                        "account": "local",
                        "region": "local",
                        "interval_s": 15,
                        "endpoints_file": endpoints.workers_file,
                    }
                ],
                "run": {"horizon_s": list(horizon_s)} if horizon_s else {},
            },
        )

    truth = World(seed, ids, REGIONS, metrics, profiles)
    return Scene(truth, (*args, "--services", ",".join(SERVICES)), 0, horizon_s, config)


def traces_scene(folder: Path) -> Scene:
    """A folder of traces as one account's CloudWatch, and the clock just after they have settled."""
    truth = TraceWorld(folder)
    from_s, to_s = truth.start_s // 300 * 300, -(-truth.end_s // 300) * 300
    offset_s = to_s + SETTLING_S - int(time.time())
    [account], [region] = truth.accounts, truth.regions
    services: dict[str, dict[str, Any]] = {}
    for metric in truth.metrics(account, region):
        name = "traces-" + metric.namespace.rpartition("/")[2].lower()
        services[name] = {
            "namespace": metric.namespace,
            "period_s": 300,
            "poll_interval_s": 300,
            "settling_s": SETTLING_S,
            "metrics": "all",
            "statistics": ["Sum" if metric.namespace == "AWS/ELB" else "Average"],
        }

    def config(endpoints: Endpoints) -> str:
        return _yaml(
            endpoints,
            {
                "accounts": [{"id": account, "regions": [region], "services": sorted(services)}],
                "services": services,
                "run": {"clock_offset_s": offset_s, "horizon_s": [from_s, to_s], "source_keeps_all": True},
            },
        )

    args = ("--traces", str(folder.resolve()), "--clock-offset-s", str(offset_s))
    return Scene(truth, args, offset_s, (from_s, to_s), config)


def _yaml(endpoints: Endpoints, what: dict[str, Any]) -> str:
    connections: dict[str, Any] = {
        "aws": {
            "endpoint_url": endpoints.aws_url,
            "role_template": "arn:aws:iam::{account}:role/HeadgateReader",
        },
        "kafka": {"bootstrap": endpoints.kafka_bootstrap},
        "postgres": {"dsn": endpoints.postgres_dsn},
        "s3": {"bucket": "headgate-archive", "endpoint_url": endpoints.s3_url},
        "inventory": {"source": "describe"},
    }
    if endpoints.prometheus_urls:
        connections["remote_write"] = {
            "receivers": [
                {
                    "name": f"prometheus-{number}",
                    "url": f"{url}/api/v1/write",
                    "out_of_order_window_s": OUT_OF_ORDER_WINDOW_S,
                }
                for number, url in enumerate(endpoints.prometheus_urls, 1)
            ],
            # The first of them scrapes the workers itself: twice there, sums over them would be double.
            "services": {WORKERS_JOB: {"sent": False}},
        }
    return "# Written by `headgate run` for this run.\n" + yaml.safe_dump(
        what | connections, sort_keys=False, width=110
    )
