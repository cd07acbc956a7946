"""`headgate pause` and `headgate resume`: accounts and services that are planned and shown, and neither asked nor healed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import asyncpg

from ingest import pauses
from ingest.clock import SystemClock, utc
from ingest.errors import HeadgateError
from ingest.pauses import ALL, Pause
from ingest.sinks.connection import open_connection, translated
from shard_config.document import did_you_mean
from shard_config.model import Config
from workers import local

TIMEOUT_S = 30.0


async def pause(config: Config, account: str, service: str, reason: str, now: datetime) -> bool:
    """False where it is paused already, in these words. Raises Transient."""
    async with _store(config) as connection:
        return await pauses.begin(connection, Pause(account, service, now, reason))


async def resume(config: Config, account: str, service: str) -> bool:
    """False where nothing is paused in these words. Raises Transient."""
    async with _store(config) as connection:
        return await pauses.end(connection, account, service)


async def paused(config: Config) -> list[Pause]:
    """All that is paused, by account and service. Raises Transient."""
    async with _store(config) as connection:
        return await pauses.read(connection)


@contextlib.asynccontextmanager
async def _store(config: Config) -> AsyncIterator[asyncpg.Connection]:
    connection = await open_connection(config.postgres, "headgate pause")
    try:
        with translated("pauses"):
            async with asyncio.timeout(TIMEOUT_S):
                yield connection
    finally:
        connection.terminate()


def known_names(config: Config) -> tuple[set[str], set[str]]:
    """Accounts and services (of exposition: account labels and jobs) that may be paused."""
    accounts = {a.id for a in config.accounts} | {j.account for j in config.exposition}
    services = {s for a in config.accounts for s in a.services} | {j.name for j in config.exposition}
    return accounts | {ALL}, services | {ALL}


def _check(config: Config, account: str, service: str) -> None:
    """Raises HeadgateError for a name that the configuration does not have: a pause that means nothing helps nobody."""
    for kind, name, known in zip(
        ("account", "service"), (account, service), known_names(config), strict=True
    ):
        if name not in known:
            raise HeadgateError(f"{kind} {name}", "is not in the configuration", did_you_mean(name, known))


def render(found: list[Pause]) -> str:
    """A line each; a sentence where there are none."""
    if not found:
        return "nothing is paused"
    rows = [("account", "service", "since", "reason")]
    rows += [(p.account, p.service, f"{p.since:%Y-%m-%dT%H:%M:%SZ}", p.reason) for p in found]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    )


# --- the commands -----------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    what = "Give an account, a service, or both; without either, what is paused is listed."
    begin = commands.add_parser(
        "pause",
        help="stop asking an account or a service; list what is paused",
        description="Stops asking for an account, a service, or a service of an account, until it is resumed. Their windows are planned and show as "
        f"paused gaps, and are not healed; nothing of them is paid for. {what}",
    )
    begin.add_argument("--reason", default="", help="why, for those who find it paused")
    end = commands.add_parser(
        "resume",
        help="ask again for what was paused",
        description="Ends a pause, by the words that it was made with. What was missed meanwhile is healed, within the attempts and the money that "
        f"heal allows, as far as the source still has it. {what}",
    )
    for parser in (begin, end):
        parser.add_argument("--account", help="its 12 digits, or an exposition job's account label")
        parser.add_argument("--service", help="its name in the configuration, or an exposition job's")
        parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    begin.set_defaults(run=run_pause)
    end.set_defaults(run=run_resume)


def run_pause(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    if args.account is None and args.service is None:
        return _list(config)
    account, service = args.account or ALL, args.service or ALL
    _check(config, account, service)
    clock = SystemClock(config.run.clock_offset_s)
    now = utc(clock.now_s())
    new = asyncio.run(pause(config, account, service, args.reason, now))
    print(f"account {account}, service {service}: {'paused' if new else 'is paused already'}")
    return 0


def run_resume(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    if args.account is None and args.service is None:
        return _list(config)
    # What the configuration no longer has may still be paused.
    account, service = args.account or ALL, args.service or ALL
    if not asyncio.run(resume(config, account, service)):
        print(
            f"account {account}, service {service}: is not paused in these words. There is:\n"
            + render(asyncio.run(paused(config))),
            file=sys.stderr,
        )
        return 1
    print(f"account {account}, service {service}: resumed")
    return 0


def _list(config: Config) -> int:
    print(render(asyncio.run(paused(config))))
    return 0
