"""`headgate backfill`: plans, asks, and does what `workers.backfilling` can, with a bar to watch.

Exit codes: 0 all of it is done, 1 something of it could not be, 2 it was not begun: not confirmed, or options that do not fit, 130 stopped:
the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import uvloop
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.prompt import Confirm
from rich.table import Table

from ingest.archive_replay import LANES
from ingest.backfill import MEANS, Means, Stretch
from ingest.clock import Clock, SystemClock
from ingest.errors import HeadgateError
from ingest.model import REVISION_MAX, Target
from ingest.replay import Scope
from ingest.sinks.connection import server_of
from shard_config.model import Config, Postgres
from workers import local
from workers.arguments import parse_time
from workers.backfill_plan import LIVE, NULL, Ask, Plan, Tell, opened, time_of, total_points, total_usd
from workers.backfilling import Done
from workers.lifecycle import configure_logs

RATE_POINTS_PER_S = 100_000
LIKELY_POINTS_PER_S = 300_000
"""What one process lands where nothing limits it, for the estimate of time."""
STRETCHES_SHOWN_MAX = 20
LINE_EVERY_S = 10.0


# --- for people -----------------------------------------------------------------------------------------------


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _money(value: Decimal | None) -> str:
    return "?" if value is None else f"${value:,.4f}"


def show(console: Console, asked: Ask, plan: Plan) -> None:
    """The plan as a table, and what it takes together."""
    scope = asked.scope
    into = (
        "the live store"
        if asked.into == LIVE
        else server_of(Postgres(dsn=asked.into))
        if "://" in asked.into
        else asked.into
    )
    console.print(
        f"backfill {asked.backfill_id}: {time_of(scope.from_s)} to {time_of(scope.to_s)} into {into}",
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if plan.whole is not None:
        known = (
            "batches that have landed are skipped"
            if not asked.rebuild
            else "batches that have landed are written again"
        )
        console.print(
            f"all that {plan.whole} has of it, {_number(plan.whole_points)} points; {known}", highlight=False
        )
    else:
        console.print(_table(plan.stretches))
    seconds = (
        None
        if plan.points is None
        else plan.points / min(asked.rate_points_per_s or LIKELY_POINTS_PER_S, LIKELY_POINTS_PER_S)
    )
    about = "?" if seconds is None else f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
    console.print(
        f"points {_number(plan.points)}, about {about}, at most {_money(plan.usd)}", highlight=False
    )


def _table(stretches: Sequence[Stretch]) -> Table:
    """What costs or cannot be had first; what is there is only counted. Services that go together are one line."""
    groups: dict[tuple[int, Target, int, int, str], list[Stretch]] = defaultdict(list)
    windows = Counter[str]()
    for s in stretches:
        windows[s.means] += s.windows
        if s.means is not Means.THERE:
            way = f"{s.means} {s.detail}".rstrip()
            groups[-MEANS.index(s.means), s.target, s.start_s, s.end_s, way].append(s)
    table = Table("target", "services", "from", "to", caption_justify="left")
    for name in ("windows", "points", "dollars"):
        table.add_column(name, justify="right")
    table.add_column("via")
    for (_, target, start_s, end_s, way), some in sorted(groups.items())[:STRETCHES_SHOWN_MAX]:
        paid = some[0].means is Means.CLOUDWATCH
        table.add_row(
            str(target),
            ", ".join(s.service for s in some),
            time_of(start_s),
            time_of(end_s),
            f"{sum(s.windows for s in some):,}",
            _number(total_points(some)),
            _money(total_usd(some)) if paid else "",
            way,
        )
    left_out = len(groups) - STRETCHES_SHOWN_MAX
    counted = ", ".join(f"{n:,} {m}" for m, n in sorted(windows.items())) or "none"
    table.caption = (f"and {left_out} more lines; " if left_out > 0 else "") + f"windows: {counted}"
    return table


@contextmanager
def watching(console: Console) -> Iterator[Tell]:
    """A bar by source where somebody watches, else a line now and then."""
    if not console.is_terminal:
        last_s = time.monotonic()

        def line(source: str, share: float, done: Done) -> None:
            nonlocal last_s
            if time.monotonic() - last_s > LINE_EVERY_S:
                last_s = time.monotonic()
                console.print(f"{source} {share:.0%}, {done.points:,} points", highlight=False)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[points]} points"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def bar(source: str, share: float, done: Done) -> None:
            if source not in tasks:
                tasks[source] = bars.add_task(source, total=1.0, points="0")
            bars.update(tasks[source], completed=share, points=f"{done.points:,}")

        yield bar


def to_json(asked: Ask, plan: Plan, done: Done | None) -> str:
    """Plan and outcome for machines."""
    stretches = [
        asdict(s) | {"target": str(s.target), "from": time_of(s.start_s), "to": time_of(s.end_s)}
        for s in plan.stretches
    ]
    raw = {
        "backfill": asked.backfill_id,
        "rebuild": asked.rebuild,
        "whole": plan.whole,
        "points": plan.points,
        "usd": plan.usd,
        "notes": plan.notes,
        "stretches": stretches,
        "done": None if done is None else asdict(done),
    }
    return json.dumps(raw, default=str, indent=2)


# --- the command ----------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "backfill",
        help="land what is missing, or everything again, from the cheapest source that has it",
        description="Plans, window by window, where what is missing can still be had: in Kafka, in the S3 archive, or, for money, at CloudWatch. Shows "
        "the plan with points, time and dollars, asks, and does it behind live data. Ctrl-C stops it; the same command goes on where it was. "
        "With --via kafka or --via s3, --rebuild or another sink, all that was collected in that time lands again: what is there stays as it is, "
        "since of two looks the newer wins.",
    )
    add = parser.add_argument
    add("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    add(
        "--from",
        dest="from_s",
        type=parse_time,
        required=True,
        metavar="TIME",
        help="windows from here, as 2026-11-24T05:00:00Z or seconds",
    )
    add("--to", dest="to_s", type=parse_time, metavar="TIME", help="and before this; default: now")
    add("--account", action="append", default=[], metavar="ID", help="only this account; may be repeated")
    add("--region", action="append", default=[], metavar="NAME", help="only this region; may be repeated")
    add("--service", action="append", default=[], metavar="NAME", help="only this service; may be repeated")
    add(
        "--via",
        choices=("auto", "kafka", "s3", "cloudwatch"),
        default="auto",
        help="one source only; cloudwatch asks for all windows again (%(default)s)",
    )
    add(
        "--into",
        default=LIVE,
        metavar="SINK",
        help="postgres (the live store), a DSN postgresql://… of another store (its password in PGPASSWORD: others can read a command line), "
        "or null, which keeps nothing (%(default)s)",
    )
    add(
        "--rebuild",
        action="store_true",
        help="write batches that have landed again, too: for a store whose samples were lost",
    )
    add(
        "--revision",
        type=int,
        default=0,
        metavar="N",
        help=f"with --via cloudwatch: 1 to {REVISION_MAX}, so that these looks win over all with a lower one, whenever taken",
    )
    add(
        "--rate",
        type=int,
        default=RATE_POINTS_PER_S,
        metavar="POINTS_PER_S",
        help="no faster than this; 0: as fast as live data allows (%(default)s)",
    )
    add(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="the I-th of N processes that share a replay",
    )
    add(
        "--even-paused",
        action="store_true",
        help="ask CloudWatch for windows of paused accounts and services, too",
    )
    add("--dry-run", action="store_true", help="only show the plan")
    add("--yes", action="store_true", help="do not ask")
    add("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def _part(text: str) -> tuple[int, int]:
    try:
        part, parts = (int(n) for n in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not such as 1/2") from None
    if not 1 <= part <= parts <= LANES:
        raise argparse.ArgumentTypeError(f"{text!r} is not within 1/1 and {LANES}/{LANES}")
    return part, parts


def _check_dsn(where: str, into: str) -> None:
    """A DSN of another store. Raises HeadgateError, which quotes nothing that may hold a password."""
    if "://" not in into:
        raise HeadgateError(
            where, f"no sink is called {into!r}", "give postgres, null, or a DSN postgresql://…"
        )
    try:
        Postgres(dsn=into)
    except ValidationError as error:
        what = error.errors(include_input=False, include_url=False)[0]["msg"]
        raise HeadgateError(where, f"--into is no DSN: {what}") from None


def asked_of(args: argparse.Namespace, now_s: int) -> Ask:
    """What the options ask for. Raises HeadgateError where they do not fit each other."""
    scope = Scope(
        int(args.from_s), now_s if args.to_s is None else int(args.to_s),
        frozenset(args.account), frozenset(args.region), frozenset(args.service),
    )  # fmt: skip
    asked = Ask(
        scope,
        args.via,
        args.into,
        args.rebuild,
        args.revision,
        max(0, args.rate),
        args.part,
        args.even_paused,
    )
    where = "backfill"
    if scope.from_s >= scope.to_s:
        raise HeadgateError(where, "--from is not before --to")
    if asked.into not in (LIVE, NULL):
        _check_dsn(where, asked.into)
    if not 0 <= asked.revision <= REVISION_MAX:
        raise HeadgateError(where, f"--revision {asked.revision} is not in 0..{REVISION_MAX}")
    asks = asked.via == Means.CLOUDWATCH
    if asked.revision and not asks:
        raise HeadgateError(where, "a revision is that of a new look", "add --via cloudwatch")
    if asks and (asked.rebuild or asked.into != LIVE):
        raise HeadgateError(
            where,
            "what CloudWatch is asked for lands in the live store",
            "replay it from s3 into another sink afterwards",
        )
    if asked.part[1] > 1 and not asked.everything:
        raise HeadgateError(where, "--part shares a replay", "add --via kafka or --via s3")
    return asked


def run(args: argparse.Namespace) -> int:
    configure_logs("backfill")
    config = local.find_config(args.config)
    clock = SystemClock(config.run.clock_offset_s)
    try:
        asked = asked_of(args, clock.now_s())
    except HeadgateError as error:
        print(f"headgate: {error}", file=sys.stderr)
        return 2
    os.nice(5)  # on a shared machine live workers go first, too
    try:
        return uvloop.run(_run(config, asked, clock, args))
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130


async def _run(config: Config, asked: Ask, clock: Clock, args: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else 160, stderr=args.json)
    async with opened(config, asked, clock) as backfill:
        plan, asked = await backfill.plan()
        show(console, asked, plan)
        if args.dry_run or plan.empty:
            if not args.dry_run:
                console.print("nothing is to be done")
            if args.json:
                print(to_json(asked, plan, None))
            return 1 if plan.has(Means.NOWHERE) and not args.dry_run else 0
        if not args.yes and not _confirmed(console):
            return 2
        with watching(console) as tell:
            before_s = time.process_time()
            done = await backfill.execute(plan, tell)
            done.cpu_seconds = time.process_time() - before_s
    return _report(console, asked, plan, done, args.json)


def _confirmed(console: Console) -> bool:
    if not (sys.stdin.isatty() and console.is_terminal):
        print("headgate: nobody is here to be asked; --yes does it without", file=sys.stderr)
        return False
    return Confirm.ask("go on?", console=console, default=False)


def _report(console: Console, asked: Ask, plan: Plan, done: Done, as_json: bool) -> int:
    console.print(
        f"{done.points:,} points in {done.batches:,} batches, {done.skipped_batches:,} of them known, in {done.seconds:,.1f} s; "
        f"{done.tasks:,} tasks asked CloudWatch, {done.metrics_billed:,} metrics billed",
        highlight=False,
        soft_wrap=True,
    )
    for problem in done.problems[:STRETCHES_SHOWN_MAX]:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)
    if as_json:
        print(to_json(asked, plan, done))
    return 1 if done.problems or plan.has(Means.NOWHERE) else 0
