"""`headgate settle`: settling times that follow from what was observed, beside the configured ones. Changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ingest.clock import SystemClock, utc
from ingest.settling import DAYS_KEPT, Proposal, observed, propose
from ingest.sinks.connection import open_connection
from shard_config.model import Config
from workers import local


async def find(config: Config, service: str | None, days: int, share: float) -> list[Proposal]:
    """A proposal for each configured service that is collected from CloudWatch. Raises Transient."""
    now = utc(SystemClock(config.run.clock_offset_s).now_s())
    connection = await open_connection(config.postgres, "headgate settle")
    try:
        found = await observed(connection, now, days, service)
    finally:
        connection.terminate()
    collected = {name for account in config.accounts for name in account.services} | found.keys()
    return [
        propose(p.service, found.get(p.service, {}), p.settling_s, share)
        for p in sorted(config.services, key=lambda p: p.service)
        if p.service in collected and service in (None, p.service)
    ]


def yaml_of(proposals: Sequence[Proposal]) -> str:
    """What to paste into headgate.yaml: the proposals that differ from what is configured; empty where none does."""
    lines = [
        f"  {p.service}:\n    settling_s: {p.settling_s}"
        for p in proposals
        if p.settling_s not in (None, p.configured_s)
    ]
    return "\n".join(["services:", *lines]) if lines else ""


def render(proposals: Sequence[Proposal], share: float) -> Table:
    """For a terminal."""
    table = Table(title=f"by when {share:.2%} of points had come and stopped changing")
    for name in ("service", "configured", "proposed", "points", "after the configured time", "why not"):
        table.add_column(name, justify="left" if name in ("service", "why not") else "right")
    for p in proposals:
        late = "?" if p.unsettled is None else f"{p.unsettled:.3%}"
        proposed = "-" if p.settling_s is None else f"{p.settling_s} s"
        table.add_row(p.service, f"{p.configured_s} s", proposed, f"{p.points:,}", late, p.detail)
    return table


def _share(text: str) -> float:
    percent = float(text.rstrip("%"))
    if not 50 <= percent < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 50% to less than 100%")
    return percent / 100


def _days(text: str) -> int:
    days = int(text)
    if not 1 <= days <= DAYS_KEPT:
        raise argparse.ArgumentTypeError(f"{days} is not from 1 to {DAYS_KEPT}")
    return days


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "settle",
        help="settling times that follow from what was observed",
        description="Proposes settling times: the age, counted from a window's end, by which nearly all points had come and stopped changing, as the "
        "looks saw it. Ages are known to a poll interval, and only up to the last look: where points still came then, or with few points, nothing "
        "is proposed. Prints what to paste, and changes nothing. A shorter time seals sooner; a longer one loses no late points; both cost the same.",
    )
    parser.add_argument("--service")
    parser.add_argument(
        "--days", type=_days, default=7, help=f"look so many days back (7; at most {DAYS_KEPT})"
    )
    parser.add_argument(
        "--share", type=_share, default=0.999, metavar="PERCENT", help="of all points (99.9%%)"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    found = asyncio.run(find(config, args.service, args.days, args.share))
    if args.format == "json":
        print(json.dumps([asdict(p) for p in found], indent=2))
        return 0
    Console().print(render(found, args.share))
    if paste := yaml_of(found):
        print(f"\nTo take it over, in headgate.yaml:\n\n{paste}")
    return 0
