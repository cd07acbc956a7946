"""`headgate cost`: what AWS was asked for, in dollars: today, this month and what it will come to, by account, service and reason.

Exit code 1 where today has passed a budget, 2 where the options do not fit.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from ingest import budget, charges, costs, spending
from ingest.budget import Decision
from ingest.charges import Reason
from ingest.clock import SystemClock, utc
from ingest.costs import BY, Line, Only
from ingest.errors import Transient
from ingest.sinks.connection import open_connection
from shard_config.model import Config
from workers import local, reconcile
from workers.arguments import parse_time

TIMEOUT_S = 60.0
ROWS_MAX = 200
"""Lines of a table; csv and json have all."""
BY_DEFAULT: Final = ("account", "service", "reason")

COLUMNS = (
    "metrics_today", "usd_today", "metrics", "usd", "usd_in_doubt", "list_metrics", "usd_forecast", "puts", "usd_puts",
    "usd_statistics_other", "usd_pages_other",
)  # fmt: skip
"""After those that lines are by. Of the period but for the first two; usd is GetMetricData and ListMetrics, usd_puts S3's."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What was found. `to_day` is exclusive; `whole_month` where the period is this month, and so has a forecast."""

    from_day: date
    to_day: date
    whole_month: bool
    lines: tuple[Line, ...]
    parts: dict[str, Decimal]
    """Dollars of the period by reason."""
    decision: Decision


async def find(
    config: Config, now_s: int, period: tuple[date, date] | None, by: Sequence[str], only: Only
) -> Costs:
    """Read and add up. `period` is [from, to), None for this month. Raises Transient."""
    today = charges.day_of(now_s)
    from_day, to_day = period or (today.replace(day=1), today + timedelta(days=1))
    connection = await open_connection(config.postgres, "headgate cost")
    try:
        async with (
            asyncio.timeout(TIMEOUT_S),
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            books = await spending.read(connection, config, now_s)
            found = await charges.read(connection, from_day.replace(day=1), to_day)
            month = await charges.read(connection, today.replace(day=1), today + timedelta(days=1))
    except TimeoutError as error:
        raise Transient("charges", f"no answer within {TIMEOUT_S:g} s") from error
    finally:
        connection.terminate()
    situation = spending.situation_of(books, config)
    decision = budget.decide(situation)
    rest = costs.rest_of_month(situation.polls, books.polling, month, config, now_s) if period is None else {}
    priced = costs.amounts(found, config, from_day)
    parts: dict[str, Decimal] = {}
    for charge, amount in priced:
        if only.has(charge.target.account, charge.target.region, charge.service):
            parts[charge.reason] = parts.get(charge.reason, Decimal(0)) + amount.usd
    lines = costs.lines(priced, today, by, only, rest)
    return Costs(from_day, to_day, period is None, tuple(lines), parts, decision)


# --- for people and machines --------------------------------------------------------------------------------------


def row_of(line: Line) -> dict[str, Any]:
    """COLUMNS of a line: counts, and dollars as text."""
    p = line.period
    values = (
        line.today.metrics, line.today.usd, p.metrics, p.usd, p.in_doubt_usd, p.list_metrics, line.forecast_usd, p.puts,
        p.puts_usd, p.once_usd, p.pages_usd,
    )  # fmt: skip
    return {n: f"{v:f}" if isinstance(v, Decimal) else v for n, v in zip(COLUMNS, values, strict=True)}


def rows_of(found: Costs, by: Sequence[str]) -> list[dict[str, Any]]:
    """A mapping a line, with what it is by and COLUMNS as keys."""
    return [dict(zip(by, line.key, strict=True)) | row_of(line) for line in found.lines]


def render(found: Costs, by: Sequence[str]) -> Table:
    """For a terminal."""
    days = f"{found.from_day} to {found.to_day - timedelta(days=1)}, UTC"
    table = Table(title=f"dollars, {days}", title_justify="left", show_footer=True)
    all_of_it = costs.total(found.lines)
    for name in by:
        table.add_column(name, footer="all" if name == by[0] else "")
    shown = [("today", all_of_it.today.usd), ("period", all_of_it.period.usd)]
    shown += [("in doubt", all_of_it.period.in_doubt_usd)]
    shown += [("month's forecast", all_of_it.forecast_usd)] if found.whole_month else []
    table.add_column("metrics", f"{all_of_it.period.metrics:,}", justify="right")
    for name, usd in shown:
        table.add_column(name, dollars(usd), justify="right")
    for line in found.lines[:ROWS_MAX]:
        values = [line.today.usd, line.period.usd, line.period.in_doubt_usd]
        values += [line.forecast_usd] if found.whole_month else []
        table.add_row(*line.key, f"{line.period.metrics:,}", *map(dollars, values))
    if len(found.lines) > ROWS_MAX:
        table.caption = f"and {len(found.lines) - ROWS_MAX:,} lines more: see --format csv"
    return table


def sentences(found: Costs, config: Config) -> list[str]:
    """What stands below the table: of which healing and rechecks, S3, the other readings of the price list, budgets."""
    amount = costs.total(found.lines).period
    listed = f"{amount.list_metrics:,} ListMetrics requests"
    said = [
        f"of it healing {dollars(found.parts.get(Reason.HEAL, Decimal(0)))}, "
        f"rechecks {dollars(found.parts.get(Reason.RECHECK, Decimal(0)))}, {listed}",
        f"S3, not in it: {amount.puts:,} objects put, {dollars(amount.puts_usd)}",
    ]
    aws = config.aws
    once = (
        "each statistic counted"
        if aws.statistics_count_once
        else "up to five statistics of a metric counted once"
    )
    pages = "continuation pages were not billed again" if aws.pages_count_again else "they were billed again"
    said.append(
        f"if {once}, GetMetricData: {dollars(amount.once_usd)}; if {pages}: {dollars(amount.pages_usd)}"
    )
    for name, day in [*found.decision.days.items(), ("all accounts", found.decision.all)]:
        if day.budget_usd is not None:
            state = "PASSED" if day.passed else "not kept" if day.forecast_usd > day.budget_usd else "kept"
            said.append(
                f"budget of {name}: today {dollars(day.spent_usd)} of {dollars(day.budget_usd)}, "
                f"{dollars(day.forecast_usd)} by midnight UTC: {state}"
            )
    return said


def dollars(usd: Decimal) -> str:
    """As $1,234.56; small ones with four digits."""
    return f"${usd:,.2f}" if usd >= 100 else f"${usd:,.4f}"


def to_json(found: Costs, by: Sequence[str], config: Config) -> str:
    """For machines: the lines, all together, and budgets; dollars are text, so that they stay exact."""
    days = {**found.decision.days, "all": found.decision.all}
    return json.dumps(
        {
            "from": found.from_day.isoformat(),
            "to": found.to_day.isoformat(),
            "statistics_count_once": config.aws.statistics_count_once,
            "pages_count_again": config.aws.pages_count_again,
            "lines": rows_of(found, by),
            "all": row_of(costs.total(found.lines)),
            "by_reason": {reason: f"{usd:f}" for reason, usd in sorted(found.parts.items())},
            "budgets": {
                name: {
                    "spent_usd": f"{day.spent_usd:f}",
                    "forecast_usd": f"{day.forecast_usd:f}",
                    "budget_usd": f"{day.budget_usd:f}",
                    "passed": day.passed,
                }
                for name, day in days.items()
                if day.budget_usd is not None
            },
        },
        indent=2,
    )


def write(found: Costs, by: Sequence[str], form: str, config: Config) -> None:
    """To standard output, as table, csv or json."""
    if form == "json":
        sys.stdout.write(to_json(found, by, config) + "\n")
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, (*by, *COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows_of(found, by))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=not sys.stdout.isatty())
        console.print(render(found, by))
        for sentence in sentences(found, config):
            console.print(sentence, highlight=False)


# --- the command ------------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "cost",
        help="what AWS bills: today, this month, its forecast; by account, service and reason",
        description="Adds up every billed request of the ledger, by account, service and reason (live, backlog, heal, backfill, recheck, discovery, second "
        "try), in dollars by the prices of the configuration. In doubt is what was asked for in requests whose answer was lost: billed or not, only AWS "
        "knows. The forecast is what the polls left in this month will bill, as they are stretched now. Exit code 1 where today has passed a budget.",
    )
    for name in ("account", "region", "service"):
        parser.add_argument(f"--{name}", help=f"only this {name}")
    parser.add_argument(
        "--from",
        dest="from_s",
        type=parse_time,
        metavar="TIME",
        help="whole UTC days from here; default: this month",
    )
    parser.add_argument(
        "--to", dest="to_s", type=parse_time, metavar="TIME", help="and before this; default: now"
    )
    parser.add_argument(
        "--by",
        type=_by,
        default=BY_DEFAULT,
        metavar="X,Y",
        help=f"of {', '.join(BY)} (default {','.join(BY_DEFAULT)})",
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)
    reconcile.register(parser.add_subparsers(title="AWS's own bill"))


def _by(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if not set(words) <= set(BY) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {', '.join(BY)}")
    return words


def _period(args: argparse.Namespace, now_s: int) -> tuple[date, date] | None:
    """The days that the options mean; None for this month."""
    if args.from_s is None and args.to_s is None:
        return None
    to_s = now_s + 1 if args.to_s is None else args.to_s
    last = utc(to_s) - timedelta(microseconds=1)
    from_day = last.date().replace(day=1) if args.from_s is None else charges.day_of(args.from_s)
    return from_day, last.date() + timedelta(days=1)


def run(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    now_s = SystemClock(config.run.clock_offset_s).now_s()
    period = _period(args, now_s)
    if period is not None and period[0] >= period[1]:
        print("headgate cost: --from is not before --to", file=sys.stderr)
        return 2
    found = asyncio.run(find(config, now_s, period, args.by, Only(args.account, args.region, args.service)))
    write(found, args.by, args.format, config)
    return 1 if found.decision.passed else 0
