"""`headgate restore`: after Kafka, PostgreSQL or both were lost, finds out what is missing and brings it back (`workers.restoring`).

Exit codes: 0 nothing is missing any more, 1 something could not be done now, or `--dry-run` found something to do, 3 the ledger is in use, or what was
found is not what it should be, 130 stopped: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import uvloop
from rich.console import Console

from ingest.clock import SystemClock, rfc3339
from shard_config.model import Config
from workers import local
from workers.arguments import parse_time
from workers.backfill import watching
from workers.lifecycle import configure_logs
from workers.restoring import Say, restoring


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "restore",
        help="after Kafka, PostgreSQL or both were lost: bring back what is missing",
        description="Finds out what is missing and brings it back, in order: schema and topics; the ledger, from its newest snapshot, into an empty PostgreSQL; "
        "what Kafka alone held, from the archive's receipts and the configuration; positions that Kafka's log does not fit any more; the samples, from the archive. "
        "Stop coordinator and consumers first, and all other workers where Kafka was lost. Ctrl-C stops it; the same command goes on where it was. docs/runbooks has a "
        "page for each loss.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what is missing; exit code 1 where anything is"
    )
    parser.add_argument(
        "--snapshot",
        type=parse_time,
        metavar="TIME",
        help="this one instead of the newest: `headgate snapshot --list`",
    )
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    configure_logs("restore")
    config = local.find_config(args.config)
    if not args.dry_run:
        os.nice(5)  # on a shared machine live workers go first
    try:
        return uvloop.run(_run(config, args.dry_run, None if args.snapshot is None else int(args.snapshot)))
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130


async def _run(config: Config, dry_run: bool, snapshot_s: int | None) -> int:
    clock = SystemClock(config.run.clock_offset_s)
    console = Console(width=None if sys.stdout.isatty() else 160)
    say: Say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    async with restoring(config, clock, say) as restore:
        found = await restore.look(snapshot_s)
        for step in found.steps or ["nothing is missing"]:
            say(step)
        if dry_run or not found.steps:
            return 1 if found.steps else 0
        say("")
        await restore.ledger(found)
        say("the ledger is restored: consumers and coordinator may start now")
        with watching(console) as tell:
            came = await restore.samples(tell)
        if came is None:
            say("the archive has nothing to land again")
            return 0
        (from_s, to_s), done = came
        say(
            f"{done.points:,} points in {done.batches:,} batches, {done.skipped_batches:,} of them known, in {done.seconds:,.1f} s"
        )
        for problem in done.problems:
            say(f"problem: {problem}")
        until_s = min(to_s, clock.now_s())
        say(
            f"prove it when consumers have sealed it: headgate audit --from {rfc3339(from_s)} --to {rfc3339(until_s)}"
        )
        return 1 if done.problems else 0
