"""`headgate check`: is a configuration right, and what would it collect? Touches nothing; `--live` asks AWS for the organization's accounts."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

from ingest.clock import SystemClock
from ingest.schedule import grids_of
from ingest.zeros import wait_s
from shard_config.load import load
from shard_config.model import Config, Organization
from shard_config.organization import with_accounts

IN_ORDER_S = 3600
"""Without an out-of-order window Prometheus takes nothing older than an hour before its newest."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="is a configuration right, and what would it collect?",
        description="Reads a configuration, prints all that is wrong with it at once (file, line, what, what was probably meant; exit code 2), "
        "or what it would collect. Connects to nothing, unless --live asks AWS Organizations which accounts there are.",
    )
    parser.add_argument("config", type=Path, help="headgate.yaml")
    parser.add_argument("--live", action="store_true", help="list the organization's accounts, from AWS")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = load(args.config, environ=os.environ)
    added: list[str] = []
    if config.organization is not None:
        config, added = _with_organization(config, config.organization, live=args.live)
    grids = grids_of(config)
    print(f"{args.config} is right: {len(grids)} targets, configuration revision {config.revision}")
    for target, services in grids.items():
        print(f"  {target}: {', '.join(f'{g.service} each {g.poll_interval_s} s' for g in services)}")
    for line in [*_unreached(config), *_too_late(config), *added]:
        print(line)
    return 0


def _unreached(config: Config) -> list[str]:
    """What selections by tags leave out without anybody's having meant it."""
    return [
        f"{p.service} is selected by tags, which do not reach {p.resources.unreached}"
        for p in config.services
        if p.resources is not None and p.resources.unreached and any(only.tags for only in p.only)
    ]


def _too_late(config: Config) -> list[str]:
    """What comes later than a receiver of remote write takes it."""
    lines = []
    for receiver in config.remote_write.receivers if config.remote_write is not None else ():
        takes_s = receiver.out_of_order_window_s or IN_ORDER_S
        late = {p.service: p.settling_s + p.period_s + wait_s(p, config) for p in config.services}
        services = {name: late_s for name, late_s in late.items() if late_s > takes_s}
        if services:
            named = ", ".join(f"{name} up to {late_s:,} s" for name, late_s in services.items())
            hours = -(-max(services.values()) // 3600)
            lines.append(
                f"receiver {receiver.name} takes nothing older than {takes_s:,} s, and points come later: {named}; for those to arrive set Prometheus' "
                f"storage.tsdb.out_of_order_time_window to {hours}h and remote_write's out_of_order_window_s to {hours * 3600}"
            )
    return lines


def _with_organization(config: Config, organization: Organization, *, live: bool) -> tuple[Config, list[str]]:
    """The configuration with what AWS lists, and what to say of that."""
    asked = ", ".join(organization.units) or "the whole organization"
    tagged = "".join(f", tagged {key}={pattern}" for key, pattern in organization.tags.items())
    each = f"{', '.join(organization.services)} in {', '.join(organization.regions)}"
    if not live:
        return config, [f"the accounts of {asked}{tagged} are not asked for: --live does; each gets {each}"]
    # botocore takes a third of a second, which a check without it need not wait for.
    from ingest.sources.organization import TagCache, list_organization

    found = asyncio.run(list_organization(config, SystemClock(), TagCache()))
    joined = with_accounts(config, found)
    new = joined.accounts[len(config.accounts) :]
    lines = [f"{asked}{tagged} has {len(found.accounts)} accounts and adds {len(new)}, each with {each}"]
    return joined, lines + [f"  {account.id} {account.alias}".rstrip() for account in new]
