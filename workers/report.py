"""`headgate report`: what is used, what it costs, when it is full, as a page, CSV or JSON.

Reads rollups, inventory and ledger in one read-only snapshot. The file is there whole or not at all. Exit code 1 where there was
nothing to report on, 2 where the options do not fit.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ingest.clock import SystemClock, rfc3339, utc
from ingest.report import html, tables
from ingest.report.assemble import Wanted, assemble
from ingest.report.model import Report
from ingest.report.reading import Tell
from workers import local
from workers.arguments import parse_time

FORMATS: Final = ("html", "csv", "json")
TOLD_EACH_S: Final = 5.0
_HOUR_S, _DAY_S, _WEEK_S = 3600, 86_400, 7 * 86_400


def last_week(now_s: int) -> tuple[int, int]:
    """The last complete week, Monday to Monday, UTC: [from_s, to_s)."""
    midnight = utc(now_s).replace(hour=0, minute=0, second=0, microsecond=0)
    to_s = int((midnight - timedelta(midnight.weekday())).timestamp())
    return to_s - _WEEK_S, to_s


def range_of(from_s: float | None, to_s: float | None, now_s: int) -> tuple[int, int]:
    """What the options mean, in whole hours: the last complete week, or 7 days before `to_s`, or from `from_s` until the last full hour."""
    if from_s is None and to_s is None:
        return last_week(now_s)
    end_s = int((now_s if to_s is None else to_s) // _HOUR_S) * _HOUR_S
    start_s = end_s - _WEEK_S if from_s is None else int(from_s // _HOUR_S) * _HOUR_S
    return start_s, end_s


# --- making it ------------------------------------------------------------------------------------------------------


def put(report: Report, form: str, out: TextIO) -> None:
    """As html, csv or json: of the same document."""
    document = tables.document(report)
    if form == "json":
        out.writelines(part.decode() for part in tables.to_json(document))
    elif form == "csv":
        tables.write_csv(document, out)
    else:
        out.write(html.page(document))


def write(report: Report, form: str, file: Path) -> None:
    """To a file, which is there whole or as it was before. Raises OSError."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8", newline="") as out:
            put(report, form, out)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def progress(console: Console) -> Iterator[Tell]:
    """A bar on a terminal, else a line now and then."""
    if not console.is_terminal:
        told = [time.monotonic()]

        def line(what: str, done: int, of: int) -> None:
            if time.monotonic() - told[0] > TOLD_EACH_S:
                told[0] = time.monotonic()
                console.print(f"{what}: {done} of {of}" if of > 1 else what, highlight=False)

        yield line
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("reading", total=1)
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)


# --- the command ----------------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="what is used, what it costs, when it is full: a page, CSV or JSON",
        description="Utilization by account, region, service and resource, what is idle or oversized, what monitoring costs, when storage is full, and how complete "
        "the data behind each figure are, of a week against the week before. It reads rollups, inventory and ledger, and writes nothing but its file. Without "
        "an inventory (inventory.source) sizes are not known: then nothing is called oversized, and no day is named on which something is full. Without prices "
        "(report.prices) no waste is in dollars. CSV and JSON have the page's figures under the same names. Exit code 1 where there is nothing to report on.",
    )
    parser.add_argument(
        "--from",
        dest="from_s",
        type=parse_time,
        metavar="TIME",
        help="whole hours, UTC, from here; default: 7 days before --to",
    )
    parser.add_argument(
        "--to",
        dest="to_s",
        type=parse_time,
        metavar="TIME",
        help="and before this; default: the last Monday, 00:00 UTC",
    )
    parser.add_argument(
        "--account",
        action="append",
        dest="accounts",
        metavar="ID",
        help="only this account; may be repeated",
    )
    parser.add_argument("--format", choices=FORMATS, default="html", help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: headgate-report-DAY.html here; csv and json go to standard output, as does -",
    )
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def _wrong(words: str) -> int:
    print(f"headgate report: {words}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    now_s = SystemClock(config.run.clock_offset_s).now_s()
    from_s, to_s = range_of(args.from_s, args.to_s, now_s)
    if from_s >= to_s:
        return _wrong("--from is not an hour before --to")
    if from_s >= now_s:
        return _wrong(f"the range begins at {rfc3339(from_s)}, which is yet to come")
    out: Path | None = args.out
    if out is None and args.format == "html":
        out = Path(f"headgate-report-{utc(to_s):%Y-%m-%d}.html")
    if out == Path("-"):
        out = None
    if out is not None and not out.absolute().parent.is_dir():
        return _wrong(f"--out {out}: there is no folder {out.absolute().parent}")
    console = Console(stderr=True)
    wanted = Wanted(from_s, to_s, tuple(sorted(set(args.accounts))) if args.accounts else None)
    with progress(console) as tell:
        report = asyncio.run(assemble(config, wanted, now_s, tell))
    if out is None:
        put(report, args.format, sys.stdout)
    else:
        try:
            write(report, args.format, out)
        except OSError as error:
            return _wrong(f"--out {out}: {error.strerror or error}")
        console.print(f"{out}: {summary(report)}", highlight=False, soft_wrap=True, markup=False)
    if not report.resources and not report.coverage:
        print(f"headgate report: nothing was collected from {rfc3339(from_s)} to {rfc3339(to_s)}: see `headgate gaps` and `headgate status`", file=sys.stderr)  # fmt: skip
        return 1
    return 0


def summary(report: Report) -> str:
    """One line for people."""
    idle, oversized = len(report.idle.findings), len(report.oversized.findings)
    return (
        f"{rfc3339(report.from_s)} to {rfc3339(report.to_s)}, {len(report.accounts)} accounts, {len(report.resources):,} resources, "
        f"{idle:,} idle, {oversized:,} oversized"
    )
