"""`headgate audit`: proves archive = ledger = store over a stretch of time, or names what differs. Changes nothing.

`--recheck` asks the source itself again for a sample of sealed windows, which costs dollars (`headgate cost` has them); what it answers is compared and
dropped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import secrets
import sys
from dataclasses import asdict, replace
from pathlib import Path

from ingest.archive import open_archive
from ingest.audit import Kind, Report
from ingest.auditor import Auditor, Scope
from ingest.clock import Clock, SystemClock, rfc3339
from ingest.recheck import Recheck, recheck
from ingest.schedule import grids_of
from ingest.sinks.connection import open_connection
from shard_config.model import Config
from workers import local
from workers.arguments import parse_time
from workers.lifecycle import configure_logs


async def audit(
    config: Config, scope: Scope, clock: Clock, recheck_share: float = 0.0, seed: int = 0
) -> tuple[Report, Recheck | None]:
    """One audit over everything that the configuration's connections reach. Raises Transient, Fatal."""
    connection = await open_connection(config.postgres, "headgate audit")
    try:
        async with open_archive(config.s3, clock) as archive:
            report = await Auditor(connection, archive, config, clock, scope).run()
        if not recheck_share:
            return report, None
        targets = [t for t in grids_of(config) if scope.includes((t.account, t.region))]
        return report, await recheck(
            connection, config, clock, report, targets, recheck_share, seed, scope.service
        )
    finally:
        connection.terminate()


def samples_kept_from_s(config: Config, now_s: int) -> int:
    """The first second of which all samples are still in the store, by their retention; long ago where they have none."""
    days = config.samples_retention_days
    return 0 if days is None else -(-(now_s - days * 86_400) // 86_400) * 86_400


def to_json(report: Report, again: Recheck | None = None) -> str:
    """For machines: what was compared, the counts by kind, and the differences that are named."""
    raw = asdict(report) | {"counts": {str(k): n for k, n in report.counts.items()}}
    raw |= {"equal": report.equal, "verdict": report.verdict(), "recheck": asdict(again) if again else None}
    return json.dumps(raw, indent=2, default=str)


def render(report: Report, again: Recheck | None = None) -> str:
    """For people: each named difference, how many more there are, what a recheck cost, and the verdict."""
    lines = [str(one) for one in report.differences]
    unnamed = report.counts.total() - len(lines)
    if unnamed:
        lines.append(f"… and {unnamed:,} more; a shorter stretch or --service names others")
    if again is not None:
        lines.append(again.sentence(sum(report.counts[k] for k in (Kind.SOURCE_MISSING, Kind.SOURCE_VALUE))))
    return "\n".join([*lines, report.verdict()])


def parse_share(text: str) -> float:
    """0.01 of 1% or 0.01."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 1%")
    return share


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "audit",
        help="prove archive = ledger = store, or name what differs",
        description="Reads the archive, the ledger and the store, and compares them: the store must hold, of every point, the greatest version that is "
        "archived, and nothing else; every archived look must be in the ledger, and the other way round; every seal must be that of its look. "
        "Exit code 0 where all is equal, 1 where something differs.",
    )
    parser.add_argument(
        "--from",
        dest="from_s",
        type=parse_time,
        required=True,
        metavar="TIME",
        help="as 2026-11-24T05:00:00Z",
    )
    parser.add_argument("--to", dest="to_s", type=parse_time, required=True, metavar="TIME", help="exclusive")
    for name in ("account", "region", "service"):
        parser.add_argument(f"--{name}")
    parser.add_argument(
        "--recheck",
        type=parse_share,
        default=0.0,
        metavar="SHARE",
        help="ask the source again for so many of the sealed windows, as 1%%; it costs dollars, and lands nothing",
    )
    parser.add_argument("--seed", type=int, help="of the sample; default: another each time")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    configure_logs("audit")
    if not args.from_s < args.to_s:
        print("headgate audit: --from is not before --to", file=sys.stderr)
        return 2
    config = local.find_config(args.config)
    scope = Scope(math.floor(args.from_s), math.ceil(args.to_s), args.account, args.region, args.service)
    seed = args.seed if args.seed is not None else secrets.randbelow(2**32)
    clock = SystemClock(config.run.clock_offset_s)
    kept_from_s = samples_kept_from_s(config, clock.now_s())
    if scope.from_s < kept_from_s:
        print(
            f"samples before {rfc3339(kept_from_s)} are dropped by their retention: not compared",
            file=sys.stderr,
        )
        scope = replace(scope, from_s=kept_from_s)
        if scope.from_s >= scope.to_s:
            return 1
    report, again = asyncio.run(audit(config, scope, clock, args.recheck, seed))
    sys.stdout.write((to_json if args.format == "json" else render)(report, again) + "\n")
    return 0 if report.equal else 1
