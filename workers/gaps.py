"""`headgate gaps`: what is not sealed by its deadline, why, and from where it could be healed. Exit code 1 where there are gaps."""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ingest.clock import SystemClock, utc
from ingest.gaps import Filter, Gap, gaps, not_polled
from ingest.report.tables import cell
from ingest.schedule import grids_of
from ingest.sinks.connection import open_connection
from shard_config.model import Config
from shard_config.price import Prices
from workers import local
from workers.arguments import parse_time
from workers.samples import rfc3339

ROWS_MAX = 500
"""Lines of a table; csv and json have all."""

COLUMNS = (
    "target", "service", "from", "to", "windows", "reason", "detail", "attempts", "heal_from", "how", "usd",
)  # fmt: skip


async def find(config: Config, only: Filter) -> tuple[list[Gap], list[Gap]]:
    """The gaps now, and what was not polled for a budget. Raises Transient."""
    now = utc(SystemClock(config.run.clock_offset_s).now_s())
    connection = await open_connection(config.postgres, "headgate gaps")
    try:
        keeps_s = config.kafka.raw_retention_s
        grids, prices = grids_of(config), Prices.of(config.aws, config.services)
        found = await gaps(connection, now, grids, prices, kafka_keeps_s=keeps_s, only=only)
        return found, await not_polled(connection, now, grids, prices, only=only)
    finally:
        connection.terminate()


def rows_of(found: Sequence[Gap]) -> list[dict[str, Any]]:
    """A mapping a stretch, with COLUMNS as its keys; times in RFC 3339, dollars as text, empty where unknown."""
    rows = []
    for gap in found:
        row = asdict(gap)
        row |= {
            "from": rfc3339(utc(gap.start_s)),
            "to": rfc3339(utc(gap.end_s)),
            "usd": "" if gap.usd is None else f"{gap.usd:f}",
        }
        rows.append({name: row[name] for name in COLUMNS})
    return rows


def render(found: Sequence[Gap]) -> Table:
    """For a terminal."""
    unpolled = sum(g.windows for g in found if g.reason == "budget")
    stretches = sum(g.reason != "budget" for g in found)
    windows = sum(g.windows for g in found) - unpolled
    title = f"{windows:,} windows in {stretches:,} stretches are open past their deadline"
    if unpolled:
        title += f"; {unpolled:,} were not polled for a budget: no gaps, `headgate backfill` asks for them"
    table = Table(title=title)
    for name in ("target", "service", "from", "to", "windows", "why", "attempts", "heal from", "dollars"):
        table.add_column(name, justify="right" if name in ("windows", "attempts", "dollars") else "left")
    for gap, row in list(zip(found, rows_of(found), strict=True))[:ROWS_MAX]:
        said = gap.detail.removeprefix(f"{gap.target} {gap.service}: ")
        why = f"{gap.reason.replace('_', ' ')}: {said}" if said else gap.reason.replace("_", " ")
        table.add_row(
            gap.target,
            gap.service,
            row["from"],
            row["to"],
            f"{gap.windows:,}",
            Text(why[:300], style="yellow"),
            str(gap.attempts),
            f"{gap.heal_from}: {gap.how}" if gap.how else gap.heal_from,
            "" if gap.heal_from == "nowhere" else _dollars(gap.usd),
        )
    if len(found) > ROWS_MAX:
        table.caption = f"and {len(found) - ROWS_MAX:,} stretches more: see --format csv"
    return table


def _dollars(usd: Decimal | None) -> str:
    return "?" if usd is None else f"${usd:,.4f}"


def write(found: Sequence[Gap], form: str, console: Console) -> None:
    """To standard output, as table, csv or json."""
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows_of(found))
    elif form == "json":
        sys.stdout.write(json.dumps(rows_of(found), indent=2) + "\n")
    elif found:
        console.print(render(found))
    else:
        console.print("no gaps: every window past its deadline is sealed, or declared")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "gaps",
        help="windows that are not sealed by their deadline, why, and from where they could be healed",
        description="Lists windows that are neither sealed nor declared past their deadline (end, settling time, one poll interval, two minutes), "
        "neighbours with one story as a line: why, and the cheapest place that still has the data, with what CloudWatch would bill. "
        "Windows that were not polled for a budget are listed too, as budget, and are no gaps. Exit code 1 where there are gaps.",
    )
    parser.add_argument(
        "--from", dest="from_s", type=parse_time, metavar="TIME", help="as 2026-11-24T05:00:00Z"
    )
    parser.add_argument("--to", dest="to_s", type=parse_time, metavar="TIME", help="exclusive")
    for name in ("account", "region", "service"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    only = Filter(args.from_s, args.to_s, args.account, args.region, args.service)
    found, unpolled = asyncio.run(find(config, only))
    write([*found, *unpolled], args.format, Console(soft_wrap=not sys.stdout.isatty()))
    return 1 if found else 0
