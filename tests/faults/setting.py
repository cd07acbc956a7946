"""What a field is made of: its size and times, the configuration that says so, and the links between workers and servers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit, urlunsplit

import yaml

from shard_config.load import shipped_services
from shard_config.model import ServiceProfile
from tests.faults.proxy import Proxy
from workers.servers import LOOPBACK
from workers.simulated.values import UNBORN
from workers.stack import Endpoints
from workers.world import World, account_ids

Part = Literal["kafka", "postgres", "s3", "aws"]
PARTS: tuple[Part, ...] = get_args(Part)

ACCOUNTS, REGIONS, METRICS = 4, ("eu-west-1", "us-east-1"), 60
UNBORN_SHARE = 0.2
"""Of the metrics: there only once a fault has them come to be."""
SERVICES = ("ec2", "sqs")
PERIOD_S, POLL_S, SETTLING_S, DISCOVERY_S = 10, 10, 20, 60
SESSION_S, DEADLINE_S, LOOKBACK_S = 6, 20, 60
EXPORTERS, CONSUMERS = 3, 2


def profiles() -> dict[str, ServiceProfile]:
    """The services as they are here: the shipped ones with short times. The simulated AWS has the same."""
    shipped = shipped_services()
    return {name: shipped[name].model_copy(update=_SHORT) for name in SERVICES}


_SHORT = {
    "period_s": PERIOD_S,
    "poll_interval_s": POLL_S,
    "settling_s": SETTLING_S,
    "discovery_interval_s": DISCOVERY_S,
}


def truth_of(seed: int) -> World:
    """What the simulated AWS knows; the simulator's process has another one that is equal."""
    of = seed, account_ids(ACCOUNTS), REGIONS, METRICS, list(profiles().values())
    return World(*of, newborn_share=UNBORN_SHARE, newborn_at_s=UNBORN)


class Link(Proxy):
    """Of one worker to one server."""

    def __init__(self) -> None:
        super().__init__(LOOPBACK, 0)

    def aim(self, host: str, port: int) -> None:
        """Where new connections lead."""
        self._upstream = host, port


def wire(links: Mapping[tuple[str, Part], Link], points: Path, endpoints: Endpoints) -> str:
    """Aim the links, and write the workers' files below `points`; returns the text of the configuration that commands get."""
    addresses: dict[Part, tuple[str, int]] = {
        "kafka": (LOOPBACK, int(endpoints.kafka_bootstrap.rpartition(":")[2])),
        "postgres": _address(endpoints.postgres_dsn),
        "s3": _address(endpoints.s3_url),
        "aws": _address(endpoints.aws_url),
    }
    for (worker, part), link in links.items():
        link.aim(*addresses[part])
        if part == "kafka":
            # Brokers tell clients where they are: it is the connection that is led elsewhere, not the name.
            (points / worker / "kafka.json").write_text(json.dumps([addresses["kafka"][1], link.port]))
    for worker in dict.fromkeys(worker for worker, _ in links):
        urls = {
            "postgres": _through(endpoints.postgres_dsn, links[worker, "postgres"]),
            "s3": _through(endpoints.s3_url, links[worker, "s3"]),
            "aws": _through(endpoints.aws_url, links[worker, "aws"]),
        }
        text = config_text(endpoints.kafka_bootstrap, urls["postgres"], urls["s3"], urls["aws"])
        (points / worker / "headgate.yaml").write_text(text)
    return config_text(endpoints.kafka_bootstrap, endpoints.postgres_dsn, endpoints.s3_url, endpoints.aws_url)


def config_text(kafka_bootstrap: str, postgres_dsn: str, s3_url: str, aws_url: str) -> str:
    """headgate.yaml of a field, with these addresses."""
    config: dict[str, Any] = {
        "accounts": [
            {"id": account, "regions": list(REGIONS), "services": list(SERVICES)}
            for account in account_ids(ACCOUNTS)
        ],
        "services": {name: dict(_SHORT) for name in SERVICES},
        "slots": 12,
        "task_deadline_s": DEADLINE_S,
        "startup_lookback_s": LOOKBACK_S,
        "heal": {"attempts_max": 100, "backoff_s": 1},
        "aws": {
            "endpoint_url": aws_url,
            "role_template": "arn:aws:iam::{account}:role/HeadgateReader",
            # As the simulated AWS bills. The default is the dearer reading, and bill and ledger would differ by the continuation pages.
            "pages_count_again": False,
        },
        "kafka": {"bootstrap": kafka_bootstrap, "session_timeout_s": SESSION_S},
        "postgres": {"dsn": postgres_dsn},
        "s3": {"bucket": "headgate-archive", "endpoint_url": s3_url},
    }
    return yaml.safe_dump(config, sort_keys=False)


def merged(faults: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Faults side by side: the greater number, both lists, either flag."""
    found: dict[str, Any] = {}
    for one in faults:
        for name, value in one.items():
            if name in found and isinstance(value, list | tuple):
                found[name] = sorted({*found[name], *value})
            else:
                found[name] = max(found.get(name, value), value)
    return found


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def _through(url: str, link: Link) -> str:
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}{at}{LOOPBACK}:{link.port}"))
