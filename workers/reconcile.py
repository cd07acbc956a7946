"""`headgate cost reconcile`: AWS's bill against the ledger, by account and day.

Exit codes: 0 the ledger agrees, 1 it does not within the tolerance, 2 the report or the options are not right.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ingest.cur import BadReport, Bill, read
from ingest.reconcile import Asked, Reading, Reconciled, Row, read_ledger, reconcile, whole_days
from ingest.sinks.connection import open_connection
from shard_config.load import load
from shard_config.model import Config
from shard_config.price import Prices
from workers import local

ROWS_MAX = 60
"""Lines of a table by account and day; more are summed by account. csv and json have all."""
COLUMNS = (
    "account", "day", "billed", "ledger", "in_doubt", "unattributed", "excess", "billed_usd", "ledger_usd", "lists_billed", "lists_ledger",
)  # fmt: skip


def rows_of(rows: Iterable[Row]) -> list[dict[str, str]]:
    """A mapping a row, with COLUMNS as its keys; numbers as plain text."""
    return [
        {
            name: f"{value:f}" if isinstance(value := getattr(row, name), Decimal) else str(value)
            for name in COLUMNS
        }
        for row in rows
    ]


def by_account(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.account].append(row)
    return sorted(found.items())


def says(found: Reconciled, bill: Bill, config: Config, alone: bool) -> list[str]:
    """What it comes to, the loudest first."""
    said = []
    if excess := found.total("excess"):
        days = sum(bool(row.excess) for row in found.rows)
        said.append(
            f"THE LEDGER HAS MORE THAN THE BILL: {excess:,.0f} metrics on {days} account-days. A few of midnight's are nothing; else the bill is not whole, or a "
            "switch of aws.* is not how AWS reads its list."
        )
    metrics, ledger, doubt = (found.total(name) for name in ("billed", "ledger", "in_doubt"))
    said.append(
        f"GetMetricData: {metrics:,.0f} metrics billed, {ledger:,.0f} in the ledger and {doubt:,.0f} in doubt, {found.total('unattributed'):,.0f} unattributed "
        "(other callers in these accounts)."
    )
    lists, sent = found.total("lists_billed"), found.total("lists_ledger")
    more = " More than the bill: it may not be whole." if sent > lists else ""
    said.append(f"ListMetrics: {lists:,.0f} requests billed, {sent:,.0f} in the ledger.{more}")
    price = found.usd_per_1000_metrics
    if price is not None and abs(price - Decimal(str(config.aws.usd_per_1000_metrics))) > Decimal("0.000001"):
        said.append(
            f"1,000 metrics were billed ${price:.6f}; aws.usd_per_1000_metrics is {config.aws.usd_per_1000_metrics}."
        )
    if found.others:
        said.append(
            f"{found.others} accounts that Headgate did not ask were billed ${found.others_usd:,.2f}, and are not counted."
        )
    if bill.credits_usd:
        said.append(
            f"Credits, refunds, taxes and discounts of ${bill.credits_usd:,.2f} are left aside: usage is compared."
        )
    said += found.inferred.evidence
    said.append(f"error {found.error(alone):.3%}" + (", other callers included" if alone else ""))
    return said


def show(found: Reconciled, console: Console) -> None:
    days = len(found.rows) <= ROWS_MAX
    table = Table(title="Metrics of GetMetricData" + ("" if days else ", by account"))
    for name in (
        "account",
        "day" if days else "days",
        "billed",
        "ledger",
        "in doubt",
        "unattributed",
        "TOO MUCH",
        "dollars",
    ):
        table.add_column(name, justify="left" if name in ("account", "day") else "right")
    for account, rows in by_account(found.rows):
        for some in [[row] for row in rows] if days else [rows]:
            sums = {
                n: sum((Decimal(getattr(r, n)) for r in some), Decimal()) for n in COLUMNS[2:7] + COLUMNS[7:8]
            }
            when = str(some[0].day) if days else f"{len(some):,}"
            *counts, usd = sums.values()
            table.add_row(account, when, *(f"{n:,.0f}" for n in counts), f"{usd:,.4f}")
    console.print(table)


def to_json(found: Reconciled, bill: Bill, alone: bool) -> str:
    raw: dict[str, Any] = {
        "lines": bill.lines,
        "used_lines": bill.used,
        "credits_usd": str(bill.credits_usd),
        "statistics_count_once": found.inferred.once,
        "pages_count_again": found.inferred.again,
        "evidence": found.inferred.evidence,
        "error_percent": f"{100 * found.error(alone):.4f}",
        "totals": {name: f"{found.total(name):f}" for name in COLUMNS[2:]},
        "other_accounts": found.others,
        "other_accounts_usd": f"{found.others_usd:f}",
        "rows": rows_of(found.rows),
    }
    return json.dumps(raw, indent=2)


# --- the command ----------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `reconcile` to the commands of `headgate cost`."""
    parser = commands.add_parser(
        "reconcile",
        help="AWS's bill against the ledger, by account and day",
        description="Reads a Cost and Usage Report (CSV or gzip, of the old columns or CUR 2.0's, all its files) and holds what it bills for GetMetricData and ListMetrics against "
        "the ledger. What the bill has beyond ours is other callers'; a ledger that has more than the bill is an error. Says which readings of the price list the "
        "bill allows, where it can tell. Days that the report has not whole are left out. Exit code 1 past the tolerance.",
    )
    add = parser.add_argument
    add(
        "--cur",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="every file of one version of the report",
    )
    add(
        "--from", dest="from_day", type=_day, metavar="DAY", help="as 2026-11-01; default: the report's first"
    )
    add(
        "--to",
        dest="to_day",
        type=_day,
        metavar="DAY",
        help="exclusive; default: after the report's last whole day",
    )
    add(
        "--tolerance",
        type=_percent,
        default=Decimal(1),
        metavar="PERCENT",
        help="of what was billed (%(default)s)",
    )
    add(
        "--alone",
        action="store_true",
        help="nobody else asks CloudWatch there: what is unattributed is an error",
    )
    add("--format", choices=("table", "csv", "json"), default="table")
    add("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day such as 2026-11-24") from None


def _percent(text: str) -> Decimal:
    try:
        percent = Decimal(text.removesuffix("%"))
    except ArithmeticError:
        percent = Decimal(-1)
    if not percent.is_finite() or not 0 <= percent <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 1 or 0.5%")
    return percent


def span_of(bill: Bill, from_day: date | None, to_day: date | None) -> tuple[date, date]:
    """The days to compare. Raises BadReport where the report has none of them."""
    whole = whole_days(bill)
    first = from_day or (whole[0] if whole else None)
    last = to_day or (whole[1] if whole else None)
    if first is None or last is None or first >= last or not bill.used:
        raise BadReport(
            "report",
            "has no whole day of CloudWatch's API in it",
            "give all files of a report that covers the days",
        )
    return first, last


def run(args: argparse.Namespace) -> int:
    config = load(local.config_path(args.config), environ=os.environ)
    try:
        bill = read(args.cur, args.from_day, args.to_day)
        span = span_of(bill, args.from_day, args.to_day)
    except BadReport as error:
        print(f"headgate: {error}", file=sys.stderr)
        return 2
    asked = asyncio.run(_asked(config, span))
    aws = config.aws
    found = reconcile(
        bill, asked, Reading(aws.statistics_count_once, aws.pages_count_again), Prices.of(aws), span
    )
    if args.format == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows_of(found.rows))
    elif args.format == "json":
        print(to_json(found, bill, args.alone))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        show(found, console)
        last = span[1] - timedelta(days=1)
        console.print(
            f"{bill.lines:,} lines read, {bill.used:,} of CloudWatch's API; {span[0]} to {last}",
            highlight=False,
        )
        for line in says(found, bill, config, args.alone):
            console.print(
                line,
                highlight=False,
                soft_wrap=True,
                style="bold red" if line.startswith("THE LEDGER") else "",
            )
    return 1 if 100 * found.error(args.alone) > args.tolerance else 0


async def _asked(config: Config, span: tuple[date, date]) -> list[Asked]:
    connection = await open_connection(config.postgres, "headgate reconcile")
    try:
        return await read_ledger(connection, *span, config)
    finally:
        connection.terminate()
