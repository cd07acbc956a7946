"""`headgate plan`: which slot has which targets, and what a change would move and why, before it is made. Changes nothing.

The plan before is the one that the coordinator kept in the ledger, the weights are those that the ledger has learned. Where PostgreSQL cannot
be reached, or has nothing yet, both are assumed, and that is said.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ingest.errors import HeadgateError
from ingest.ledger import LEARNED_FROM, Ledger
from shard_config.model import Config
from shard_config.units import UnitPlan
from workers import local
from workers.plan_change import (
    Change,
    Known,
    Proposal,
    changed,
    loads_of,
    propose,
    refused,
    with_a_plan_before,
)
from workers.shards import Board

MOVES_MAX = 40
"""Rows of a table; JSON has all."""
NAMES_MAX = 3
KAFKA_PATIENCE_S = 5.0

# --- asking -----------------------------------------------------------------------------------------------------


async def ask(config: Config) -> Known:
    """What is known, as far as it can be asked; never raises for what is away."""
    doubts: list[str] = []
    series: dict[str, dict[str, float]] = {}
    kept, published = UnitPlan({}, {}), None
    ledger = Ledger(config.postgres, "headgate plan", {})
    board = Board(config.kafka, "headgate plan")
    try:
        series, kept = await ledger.series(LEARNED_FROM), await ledger.kept_plan()
        if not kept.slots:
            doubts.append("no plan is kept yet: the one before is that of the configuration as it is")
    except HeadgateError as error:
        doubts.append(
            f"the ledger is not reachable, so the plan before is that of the configuration as it is: {error}"
        )
    finally:
        await ledger.close()
    try:
        async with asyncio.timeout(KAFKA_PATIENCE_S):
            await board.open()
        published = board.assignment
    except (HeadgateError, TimeoutError) as error:
        doubts.append(f"which shards there are is not known: {error or 'no answer'}")
    finally:
        await board.close()
    return Known(series, kept, published, tuple(doubts))


# --- showing ----------------------------------------------------------------------------------------------------


def page_of(proposal: Proposal) -> dict[str, Any]:
    """For JSON. Weights are metrics asked a minute."""
    by_slot: dict[int, list[str]] = defaultdict(list)
    for unit, slot in proposal.plan.slots.items():
        by_slot[slot].append(unit)
    loads = loads_of(proposal.plan)
    mean = math.fsum(loads.values()) / proposal.slots
    total = mean * proposal.slots
    return {
        "slots": [
            {
                "slot": slot,
                "shard": proposal.owners[slot] if proposal.owners else None,
                "weight": loads.get(slot, 0.0),
                "of_mean": loads.get(slot, 0.0) / mean if mean else 0.0,
                "units": {u: proposal.plan.weights[u] for u in by_slot[slot]},
            }
            for slot in range(proposal.slots)
        ],
        "changes": [asdict(change) for change in proposal.changes],
        "weight": total,
        "moved_weight": proposal.moved,
        "least_moved_weight": proposal.least,
        "slots_moved": list(proposal.slots_moved),
        "doubts": list(proposal.doubts),
    }


def show(proposal: Proposal, console: Console) -> None:
    """For people."""
    page = page_of(proposal)
    console.print(_slots_table(page["slots"]))
    if proposal.owners:
        console.print(_shards_table(page["slots"]))
    if proposal.changes:
        console.print(_changes_table(proposal.changes))
    total = page["weight"] or 1.0
    moved = sum(c.before is not None and c.after is not None for c in proposal.changes)
    console.print(
        f"{moved:,} moves, {proposal.moved / total:.2%} of the weight; no plan in balance moves less than {proposal.least / total:.2%}"
    )
    if proposal.owners:
        console.print(f"{len(proposal.slots_moved):,} of {proposal.slots:,} slots change their shard")
    for doubt in proposal.doubts:
        console.print(f"note: {doubt}")


def _weight(weight: float) -> str:
    return f"{weight:,.0f}" if weight >= 100 else f"{weight:.3g}"


def _slots_table(slots: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="slots; weights are metrics asked a minute", title_justify="left")
    for name in ("slot", "shard", "units", "weight", "of the mean", "heaviest"):
        table.add_column(name, justify="left" if name in ("shard", "heaviest") else "right", overflow="fold")
    for row in slots:
        units: Mapping[str, float] = row["units"]
        names = sorted(units, key=lambda u: (-units[u], u))
        more = f", … {len(names) - NAMES_MAX:,} more" if len(names) > NAMES_MAX else ""
        table.add_row(
            str(row["slot"]),
            row["shard"] or "?",
            f"{len(names):,}",
            _weight(row["weight"]),
            f"{row['of_mean']:.0%}",
            ", ".join(names[:NAMES_MAX]) + more,
        )
    return table


def _shards_table(slots: Sequence[Mapping[str, Any]]) -> Table:
    held: dict[str, list[float]] = defaultdict(list)
    for row in slots:
        held[row["shard"]].append(row["weight"])
    mean = math.fsum(row["weight"] for row in slots) / len(held)
    table = Table(title="shards", title_justify="left")
    for name in ("shard", "slots", "weight", "of the mean"):
        table.add_column(name, justify="left" if name == "shard" else "right")
    for shard, weights in sorted(held.items()):
        weight = math.fsum(weights)
        table.add_row(shard, str(len(weights)), _weight(weight), f"{weight / mean:.0%}" if mean else "")
    return table


def _changes_table(changes: Sequence[Change]) -> Table:
    table = Table(title="changes", title_justify="left")
    for name in ("why", "target", "services", "weight", "from", "to"):
        table.add_column(
            name, justify="right" if name in ("weight", "from", "to") else "left", overflow="fold"
        )
    for c in changes[:MOVES_MAX]:
        before, after = ("" if s is None else str(s) for s in (c.before, c.after))
        table.add_row(c.why, c.target, ", ".join(c.services) or "all", _weight(c.weight), before, after)
    if len(changes) > MOVES_MAX:
        table.caption = f"and {len(changes) - MOVES_MAX:,} more: see --format json"
    return table


# --- the command ------------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="which slot has which targets, and what a change would move and why",
        description="Prints the plan that the coordinator would make now: each slot, its targets (a heavy one by service), its weight against the "
        "mean, and its shard; then what changes against the plan in use, and why: new, gone, split or joined, heavier (its slot has grown), balance. "
        "With --add, --remove, --shards or --slots, what such a change would move, before it is made. Changes nothing.",
    )
    parser.add_argument("--shards", type=_positive, metavar="N", help="as if there were so many exporters")
    parser.add_argument("--slots", type=_positive, metavar="N", help="as if there were so many slots")
    parser.add_argument(
        "--add", action="append", default=[], metavar="ACCOUNT[:REGION,…]",
        help="as if this account were collected: with the first account's services, and its regions unless given; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--remove",
        action="append",
        default=[],
        metavar="ACCOUNT",
        help="as if this one were not; may be repeated",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 10,000")
    return int(text)


def run(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    wanted = changed(config, args.add, args.remove, args.slots)
    if args.shards is not None and args.shards > wanted.slots:
        raise refused(
            "--shards", f"{args.shards} shards share {wanted.slots} slots", f"at most {wanted.slots}"
        )
    proposal = propose(wanted, with_a_plan_before(config, asyncio.run(ask(config))), args.shards)
    if args.format == "json":
        sys.stdout.write(json.dumps(page_of(proposal), indent=2) + "\n")
    else:
        show(proposal, Console(soft_wrap=not sys.stdout.isatty()))
    return 0
