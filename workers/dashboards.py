"""`headgate dashboards`: Grafana's dashboards as JSON, of Headgate itself and of what it collects.

The files in helm/headgate/files/dashboards are what this makes; a test holds them equal, each metric to what running workers have, and each
expression to a real Prometheus.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

from shard_config.document import ConfigError, ConfigErrors
from shard_config.load import load
from shard_config.model import Config
from workers.grafana import Dashboard, made
from workers.own_dashboards import OWN
from workers.service_dashboards import service_dashboards


def dashboards(config: Config | None = None) -> list[Dashboard]:
    """Those of Headgate itself, and those of what a configuration collects; without one, all that are shipped."""
    return [*OWN, *service_dashboards(config)]


def files(config: Config | None = None) -> Mapping[str, str]:
    """By file name (pipeline.json), its content."""
    return {
        f"{board.uid.removeprefix('headgate-')}.json": json.dumps(made(board), indent=1, ensure_ascii=False)
        + "\n"
        for board in dashboards(config)
    }


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "dashboards",
        help="Grafana's dashboards, of Headgate itself and of what it collects",
        description="Writes Grafana dashboards as JSON files, one each: pipeline, shards, cost, completeness, remote write, and one for each group of AWS "
        "services, of the recording rules (`headgate rules`) in YACE's names. Without --config those of all shipped services, as the chart has them. "
        "Without --out their names are listed.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="headgate.yaml: its services, settling times and receivers",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write them there, over what has their names")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = None if args.config is None else load(args.config, environ=os.environ)
    if config is not None and config.remote_write is not None and config.remote_write.names != "yace":
        what = f"is {config.remote_write.names}: dashboards know YACE's names only"
        raise ConfigErrors([ConfigError(str(args.config), 0, "remote_write.names", what, "names: yace")])
    if args.out is None:
        for board in dashboards(config):
            print(f"{board.uid.removeprefix('headgate-')}.json  {board.title}: {board.what}")
        return 0
    made_of = files(config)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in made_of.items():
        (args.out / name).write_text(content)
    print(f"{len(made_of)} dashboards are in {args.out}")
    return 0
