"""`headgate quote`: what a configuration will cost a month, and what the same points cost by other ways. Asks nobody but with `--live`."""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table

from ingest.clock import SystemClock
from ingest.errors import HeadgateError
from shard_config.load import load
from shard_config.model import Config
from shard_config.quote import (
    LISTED_PER_ASKED,
    MONTH_DAYS,
    SERIES_PER_ENDPOINT_ASSUMED,
    Basis,
    Count,
    Key,
    Quote,
    Way,
    accounts_of,
    alike,
    assumed,
    quote,
)
from workers import local, quote_live
from workers.setup import retention_ms

DAY_MS = 86_400_000
COLUMNS = ("way", "service", "item", "quantity", "unit", "usd", "usd_other_reading", "own_part")


def metrics_of(text: str) -> dict[str, int]:
    """`--metrics`, as ec2=5000,rds=800."""
    found: dict[str, int] = {}
    for part in text.split(","):
        service, _, number = part.partition("=")
        if not service or not number.isdecimal() or not number.isascii() or service in found:
            raise argparse.ArgumentTypeError(f"{part!r} is not such as ec2=5000")
        found[service] = int(number)
    return found


def _days(text: str) -> Decimal:
    try:
        days = Decimal(text)
    except InvalidOperation:
        days = Decimal()
    if not days.is_finite() or not 0 < days <= 3660:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days up to 3660")
    return days


def notes_of(
    config: Config,
    given: Mapping[str, int],
    basis: Basis,
    accounts: int | None,
    live: quote_live.Live | None = None,
) -> list[str]:
    """What the quote takes for granted."""
    notes = []
    listed = {service for _, _, service in live.counts} if live else set()
    guessed = {n: assumed(p) for n, p in config.service_by_name.items() if n not in {*given, *listed}}
    if live is not None:
        notes.append(
            f"counted by {live.requests:,} ListMetrics requests: {', '.join(sorted(listed)) or 'nothing'}"
        )
        notes += [f"NOT COUNTED: {line}" for line in live.failed]
    if guessed:
        some = ", ".join(f"{name} {metrics:,}" for name, metrics in guessed.items())
        notes.append(
            f"metrics of an account and region are ASSUMED: {some}; give --metrics service=n, or ask with --live"
        )
    if any((p.metrics != "all" or p.only) and p.service not in listed for p in config.services):
        notes.append(f"a namespace is assumed to list {LISTED_PER_ASKED} times what is asked for")
    if config.organization is not None and accounts is None:
        notes.append("the organization's accounts are not counted: give --accounts")
    if any(j.name not in given for j in config.exposition):
        notes.append(f"an endpoint of exposition is assumed to have {SERIES_PER_ENDPOINT_ASSUMED} series")
    notes += [
        f"{p.service}: Metric Streams cannot select by dimension or tag, and would bill more"
        for p in config.services
        if p.only
    ]
    notes.append(
        f"archive and store are as full as after {basis.kept_days} days; a metric is taken to report in every period"
    )
    return notes


# --- what it means --------------------------------------------------------------------------------------------


def verdict(of: Quote) -> list[str]:
    """Where Headgate is cheaper, and, as plainly, where it is not."""
    usd = {way: of.usd(way) for way in Way}
    said = []

    def differences(way: Way, item: str | None = None) -> dict[str, Decimal]:
        return {s: of.usd(way, s, item) - of.usd(Way.HEADGATE, s, item) for s in of.counts}

    same = [s for s, more in differences(Way.YACE_300, "GetMetricData").items() if not more]
    if same:
        said.append(
            f"YACE at 300 s, all datapoints exported, pays the same GetMetricData for {', '.join(same)}."
        )
    for sign, word in ((1, "dearer"), (-1, "CHEAPER")):
        some = {s: more for s, more in differences(Way.YACE_300).items() if more * sign > 0}
        if some:
            said.append(
                f"YACE at 300 s is ${abs(sum(some.values())):,.2f} {word} for {', '.join(some)}: it has one interval for all, and lists metrics at every scrape."
            )
    said.append(
        f"For a minute's freshness, polling each minute costs ${usd[Way.YACE_60]:,.2f} (YACE at 60 s; here poll_interval_s: 60), and Metric Streams "
        f"${usd[Way.STREAMS]:,.2f}"
        + (", which is the better way then." if usd[Way.STREAMS] < usd[Way.YACE_60] else ".")
    )
    cheaper = {s: -more for s, more in differences(Way.STREAMS).items() if more < 0}
    if cheaper:
        said.append(
            f"Metric Streams is ${sum(cheaper.values()):,.2f} CHEAPER for {', '.join(cheaper)}, and fresher, where nearly all metrics of these names are wanted: "
            "a stream cannot leave out resources, nor be asked for the past."
        )
    own = of.usd(Way.HEADGATE, own=True)
    said.append(
        f"Headgate's own parts are ${own:,.2f} besides. YACE and streams need a store of their own, which is not priced here; nor are anybody's computers."
    )
    if own > usd[Way.HEADGATE]:
        said.append(
            "For so few metrics these cost more than CloudWatch does: an exporter and a Prometheus that are there already are CHEAPER."
        )
    return said


# --- showing it -----------------------------------------------------------------------------------------------


def rows_of(of: Quote) -> list[dict[str, Any]]:
    """A mapping a line, with COLUMNS as its keys; dollars to a hundredth of a cent."""
    return [
        {
            "way": line.way.value,
            "service": line.service,
            "item": line.item,
            "quantity": f"{line.quantity:.3f}",
            "unit": line.unit,
            "usd": f"{line.usd:.4f}",
            "usd_other_reading": f"{line.usd_other:.4f}",
            "own_part": line.own,
        }
        for line in of.lines
    ]


def to_json(of: Quote, notes: Sequence[str]) -> str:
    raw = {
        "days": str(of.days),
        "targets": of.targets,
        "counts": {service: asdict(count) for service, count in of.counts.items()},
        "usd": {way.value: f"{of.usd(way):.4f}" for way in Way},
        "usd_own_parts": f"{of.usd(Way.HEADGATE, own=True):.4f}",
        "lines": rows_of(of),
        "verdict": verdict(of),
        "notes": list(notes),
    }
    return json.dumps(raw, indent=2)


def show(of: Quote, notes: Sequence[str], console: Console, once: bool) -> None:
    """For people."""
    table = Table(title=f"What CloudWatch bills in {of.days} days of {of.targets:,} targets, dollars")
    for name in ("service", "metrics", "queries a look", "GetMetricData", "other reading", "ListMetrics"):
        table.add_column(name, justify="left" if name == "service" else "right")
    for name in ("Headgate", "YACE 300 s", "YACE 60 s", "Metric Streams"):
        table.add_column(name, justify="right", style="bold" if name == "Headgate" else "")
    for service in of.counts:
        count = of.counts[service]
        table.add_row(
            service,
            f"{count.metrics:,}",
            f"{count.queries:,}",
            f"{of.usd(Way.HEADGATE, service, 'GetMetricData'):,.2f}",
            f"{of.usd_other(Way.HEADGATE, service) - of.usd(Way.HEADGATE, service, 'ListMetrics'):,.2f}",
            f"{of.usd(Way.HEADGATE, service, 'ListMetrics'):,.2f}",
            *(f"{of.usd(way, service):,.2f}" for way in Way),
        )
    table.add_section()
    table.add_row(
        "all",
        f"{sum(c.metrics for c in of.counts.values()):,}",
        f"{sum(c.queries for c in of.counts.values()):,}",
        f"{of.usd(Way.HEADGATE, item='GetMetricData'):,.2f}",
        f"{of.usd_other(Way.HEADGATE) - of.usd(Way.HEADGATE, item='ListMetrics'):,.2f}",
        f"{of.usd(Way.HEADGATE, item='ListMetrics'):,.2f}",
        *(f"{of.usd(way):,.2f}" for way in Way),
    )
    console.print(table)
    parts = Table(title="Headgate's own parts")
    for name in ("part", "quantity", "unit", "dollars"):
        parts.add_column(name, justify="right" if name in ("quantity", "dollars") else "left")
    for line in (line for line in of.lines if line.own):
        parts.add_row(line.item, f"{line.quantity:,.1f}", line.unit, f"{line.usd:,.2f}")
    parts.add_section()
    parts.add_row("all", "", "", f"{of.usd(Way.HEADGATE, own=True):,.2f}")
    console.print(parts)
    reading = "up to five statistics of a metric as one" if once else "each statistic of a metric"
    lines = [
        f'GetMetricData is billed here by {reading} (aws.statistics_count_once); "other reading" is the other. '
        "Continuation pages (aws.pages_count_again) change nothing: each call is planned to fit into one."
    ]
    for line_ in [*verdict(of), *(f"note: {note}" for note in notes), *lines]:
        console.print(line_, highlight=False, soft_wrap=True)


# --- the command ----------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "quote",
        help="what a configuration will cost a month, and what the same points cost by other ways",
        description="Quotes a configuration before it is switched on, by service: what CloudWatch bills by either reading of its price list, and what Headgate's own "
        "S3, Kafka, PostgreSQL and endpoints cost (prices are configuration). Beside it stand the same points by YACE at 300 s with all datapoints exported, "
        "by YACE at 60 s, and by Metric Streams with Firehose; it says where Headgate is not the cheapest. Connects to nothing but with --live.",
    )
    add = parser.add_argument
    add("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    add(
        "--accounts",
        type=int,
        metavar="N",
        help="so many accounts: the configured ones, and more like the organization's or the last",
    )
    add(
        "--metrics",
        type=metrics_of,
        default={},
        metavar="SERVICE=N,…",
        help="metrics (name x resource) that are asked for of a service in each account and region; of an exposition job its series; "
        "what is not given is assumed, and the quote says so",
    )
    add("--days", type=_days, default=MONTH_DAYS, metavar="D", help="of the quote (%(default)s)")
    add(
        "--keep-days",
        type=int,
        default=365,
        metavar="N",
        help="archive and store as full as after so many days (%(default)s)",
    )
    add(
        "--live",
        action="store_true",
        help="ask ListMetrics how many there are, for what --metrics leaves out; says what that costs first, and asks",
    )
    add("--yes", action="store_true", help="with --live: do not ask")
    add("--format", choices=("table", "csv", "json"), default="table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = load(local.config_path(args.config), environ=os.environ)
    known = {*config.service_by_name, *(job.name for job in config.exposition)}
    if unknown := sorted(set(args.metrics) - known):
        print(
            f"headgate: --metrics: {', '.join(unknown)} is not in the configuration, which has {', '.join(sorted(known))}",
            file=sys.stderr,
        )
        return 2
    if args.keep_days < 1 or (args.accounts is not None and args.accounts < 1):
        print("headgate: --accounts and --keep-days are at least 1", file=sys.stderr)
        return 2
    kept_ms = retention_ms(config.kafka)
    basis = Basis(args.days, args.keep_days, kept_ms["raw"] // DAY_MS, kept_ms["ledger"] // DAY_MS)
    try:
        accounts = accounts_of(config, args.accounts)
    except ValueError as error:
        raise HeadgateError("quote", str(error)) from error
    counts: dict[Key, Count] = alike(config, accounts, args.metrics)
    given = dict(args.metrics)
    live = None
    if args.live:
        if not _confirmed(config, args.yes):
            return 2
        live = asyncio.run(quote_live.ask(config, SystemClock(config.run.clock_offset_s)))
        counts = quote_live.with_live(counts, live, frozenset(given))
    jobs = {
        j.name: given.get(j.name, SERIES_PER_ENDPOINT_ASSUMED * max(1, len(j.endpoints)))
        for j in config.exposition
    }
    found = quote(config, accounts, counts, jobs, basis)
    write(found, notes_of(config, given, basis, args.accounts, live), args.format, config)
    return 1 if live is not None and live.failed else 0


def _confirmed(config: Config, yes: bool) -> bool:
    """Says what ListMetrics will cost, and asks whether to go on."""
    requests, usd = quote_live.likely(config)
    print(
        f"about {requests:,} ListMetrics requests, at most ${usd:,.4f} (nothing within an account's free ones of the month)",
        file=sys.stderr,
    )
    if yes:
        return True
    if not sys.stdin.isatty():
        print("headgate: nobody is here to be asked; --yes does it without", file=sys.stderr)
        return False
    return Confirm.ask("go on?", console=Console(stderr=True), default=False)


def write(found: Quote, notes: Sequence[str], form: str, config: Config) -> None:
    """To standard output, as table, csv or json."""
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows_of(found))
    elif form == "json":
        sys.stdout.write(to_json(found, notes) + "\n")
    else:
        width = None if sys.stdout.isatty() else 160
        show(found, notes, Console(width=width), config.aws.statistics_count_once)
