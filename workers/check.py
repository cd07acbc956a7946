"""`headgate check`: is a configuration right, and what would it collect? Touches nothing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ingest.schedule import grids_of
from shard_config.load import load


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="is a configuration right, and what would it collect?",
        description="Reads a configuration, prints all that is wrong with it at once (file, line, what, what was probably meant; exit code 2), "
        "or what it would collect. Connects to nothing.",
    )
    parser.add_argument("config", type=Path, help="headgate.yaml")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = load(args.config, environ=os.environ)
    grids = grids_of(config)
    print(f"{args.config} is right: {len(grids)} targets, configuration revision {config.revision}")
    for target, services in grids.items():
        print(f"  {target}: {', '.join(f'{g.service} each {g.poll_interval_s} s' for g in services)}")
    return 0
