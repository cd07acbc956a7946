"""`headgate preflight`: would everything be allowed? Asked before the first billed call. Exit code 1 where something is wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ingest.clock import Clock, SystemClock
from ingest.errors import HeadgateError
from ingest.preflight import Finding, State, is_right, remedy_of_organization
from ingest.sources.aws_preflight import Asked, AwsPreflight
from ingest.sources.organization import TagCache, list_organization
from shard_config.document import did_you_mean
from shard_config.model import Account, Config
from shard_config.organization import with_accounts
from shard_config.price import Prices
from workers import local
from workers.lifecycle import configure_logs
from workers.preflight_parts import check_kafka, check_postgres, check_s3

PARTS = ("aws", "s3", "kafka", "postgres")


def chosen(config: Config, only: Sequence[str], limit: int | None) -> list[Account]:
    """The accounts to check, in the configuration's order. Raises HeadgateError for one that it does not have."""
    known = {account.id for account in config.accounts}
    for name in only:
        if name not in known:
            raise HeadgateError(f"account {name}", "is not in the configuration", did_you_mean(name, known))
    return [account for account in config.accounts if not only or account.id in only][:limit]


async def with_members(config: Config, clock: Clock) -> tuple[Config, list[Finding]]:
    """The configuration with its organization's accounts, and how listing them went."""
    organization = config.organization
    if organization is None:
        return config, []
    subject, check = organization.role_arn or "ambient credentials", "organizations:ListAccounts"
    try:
        listing = await list_organization(config, clock, TagCache())
    except HeadgateError as error:
        remedy = remedy_of_organization(error, organization.role_arn)
        return config, [Finding("aws", subject, check, State.WRONG, error.what, remedy)]
    what = f"{len(listing.accounts):,} accounts"
    return with_accounts(config, listing), [Finding("aws", subject, check, State.OK, what)]


async def preflight(
    config: Config,
    only: Sequence[str],
    limit: int | None,
    parts: Sequence[str],
    *,
    paid: bool,
    progress: Progress,
) -> tuple[list[Finding], Asked]:
    """All findings, sorted, and what was asked of AWS for them. What is wrong with a part is a finding, never raised.

    Raises HeadgateError for an account in `only` that is not configured.
    """
    clock = SystemClock(config.run.clock_offset_s)
    found: list[Finding] = []
    asked = Asked({}, 0)
    if "aws" in parts:
        whole, found = await with_members(config, clock)
        accounts = chosen(whole, only, limit)
        asking = AwsPreflight(whole, clock, paid=paid)
        bar = progress.add_task("accounts", total=len(accounts))
        try:
            found += await asking.check(accounts, lambda: progress.advance(bar))
        finally:
            await asking.close()
        asked = asking.asked
    own = {"s3": check_s3, "kafka": check_kafka, "postgres": check_postgres}
    for of_part in await asyncio.gather(*(check(config) for name, check in own.items() if name in parts)):
        found += of_part
    return sorted(found), asked


# --- for people -------------------------------------------------------------------------------------------------


def render(found: Sequence[Finding]) -> list[str]:
    """A line for each thing that is right, a line for each check that is not, and each remedy once, below."""
    by_subject: dict[tuple[str, str], list[Finding]] = {}
    for finding in found:
        by_subject.setdefault((finding.part, finding.subject), []).append(finding)
    remedies: dict[str, int] = {}
    used: Counter[str] = Counter()
    lines = []
    for (part, subject), of_subject in by_subject.items():
        right = [f for f in of_subject if f.state is not State.WRONG]
        if right:
            checks = ", ".join(f.check + (" (unproved)" if f.state is State.UNPROVED else "") for f in right)
            lines.append(f"ok     {part} {subject}: {checks}")
        for f in of_subject:
            if f.state is State.WRONG:
                number = remedies.setdefault(f.remedy, len(remedies) + 1)
                used[f.remedy] += 1
                lines.append(f"WRONG  {part} {subject}: {f.check}: {f.what} -> [{number}]")
    lines += [f"[{number}] {text} ({used[text]} of the lines above)" for text, number in remedies.items()]
    return [*lines, *_unproved(found), _verdict(found)]


def _unproved(found: Sequence[Finding]) -> list[str]:
    texts = Counter(f"{f.check}: {f.what}" for f in found if f.state is State.UNPROVED)
    return [f"unproved, {count} times: {text}" for text, count in texts.items()]


def _verdict(found: Sequence[Finding]) -> str:
    count = Counter(f.state for f in found)
    return f"{count[State.OK]:,} checks are right, {count[State.WRONG]:,} are wrong, {count[State.UNPROVED]:,} are unproved"


def price_of(config: Config, asked: Asked) -> str:
    """One sentence about what AWS bills for this preflight."""
    prices = Prices.of(config.aws)
    lists = asked.requests.get("ListMetrics", 0)
    usd = prices.get_metric_data_usd(asked.metrics_billed)
    return (
        f"Asked of AWS: {lists:,} ListMetrics (free within the account's {prices.requests_free_per_month:,} requests a month, "
        f"else ${prices.list_metrics_usd(lists, prices.requests_free_per_month):f}), {asked.metrics_billed:,} metrics (${usd:f})."
    )


# --- the command ------------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "preflight",
        help="would everything be allowed? Asked before the first billed call",
        description="Tries, for every account and region of a configuration, what an exporter will need (role, ExternalId, identity, region, each "
        "permission), and what Headgate needs of S3, Kafka and PostgreSQL. Prints a line each, and below them what to do about what is wrong. "
        "Free unless --paid is given. Exit code 1 where something is wrong.",
    )
    parser.add_argument(
        "--account", action="append", default=[], metavar="ID", help="only this one; may be repeated"
    )
    parser.add_argument(
        "--limit-accounts", type=_count, metavar="N", help="only the first N accounts: start small"
    )
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="only this part; may be repeated (default: all)"
    )
    parser.add_argument(
        "--paid",
        action="store_true",
        help="prove GetMetricData too, by one metric for each account and region: $0.01 for a thousand of them",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of accounts")
    return int(text)


def run(args: argparse.Namespace) -> int:
    configure_logs("preflight")
    config = local.find_config(args.config)
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        found, asked = asyncio.run(
            preflight(
                config,
                args.account,
                args.limit_accounts,
                args.only or PARTS,
                paid=args.paid,
                progress=progress,
            )
        )
    if args.format == "json":
        print(json.dumps([asdict(f) for f in found], indent=2))
    else:
        print("\n".join([*render(found), price_of(config, asked)]))
    return 0 if is_right(found) else 1
