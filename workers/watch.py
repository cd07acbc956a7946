"""The page that refreshes: `headgate status --watch`, and what `headgate run` shows.

By shard: since when its process has its name, slots, targets, load against the mean, lag, tasks in flight, freshness, gaps and dollars; below it
each slot that changes its owner, as it happens. It reads Kafka and the ledger, so it works wherever those answer; tasks in flight are known
of the local stack's shards only.
"""

from __future__ import annotations

import asyncio
import http.client
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ingest.assign import Assignment, Incarnation, Move, moves
from ingest.clock import Clock, utc
from ingest.errors import HeadgateError
from shard_config.model import Config
from workers.lifecycle import Lifecycle
from workers.local import LocalStack
from workers.servers import LOOPBACK, get_local
from workers.shards import Board
from workers.status import SINCE_S, Status, age, natural, render, status

LOOK_EVERY_S = 2.0
MOVES_SHOWN = 8
TARGETS_SHOWN = 12

_IN_FLIGHT = re.compile(rb"^headgate_tasks_in_flight (\S+)$", re.MULTILINE)


@dataclass(slots=True)
class Fleet:
    """The shards beside what `status` says of them."""

    assignment: Assignment | None = None
    incarnations: Mapping[str, Incarnation] = field(default_factory=dict)
    in_flight: Mapping[str, int] = field(default_factory=dict)
    """By shard; those are left out that do not say."""
    owned: dict[int, str] = field(default_factory=dict)
    """As the group said last."""
    moved: deque[tuple[datetime, Move]] = field(default_factory=lambda: deque(maxlen=MOVES_SHOWN))

    def take(self, found: Status) -> None:
        """Note what has moved since the last look. In the middle of a rebalance slots have no owner: they keep the one they had."""
        if found.exporters is None:
            return
        owned = {slot: shard for shard, slots in found.exporters.members.items() for slot in slots}
        if self.owned:
            self.moved += ((found.now, move) for move in moves(self.owned, owned))
        self.owned |= owned


def page(found: Status, fleet: Fleet, targets_max: int | None = TARGETS_SHOWN) -> RenderableType:
    """One look. Pure."""
    parts: list[RenderableType] = [render(found, targets_max, shards=lambda: fleet_table(found, fleet))]
    return Group(*parts, *_moves(fleet))


def fleet_table(found: Status, fleet: Fleet) -> Table:
    """The shards, by name."""
    members = found.exporters.members if found.exporters else {}
    lag = found.exporters.lag if found.exporters else {}
    assignment, ledger = fleet.assignment, found.ledger
    weights = dict(enumerate(assignment.weights)) if assignment else {}
    mean = sum(weights.values()) / max(1, len(members))
    work = {s.shard: s for s in ledger.shards} if ledger else {}
    table = Table(title=f"shards: {_state(found, fleet)}", title_justify="left", expand=False)
    for name in ("shard", "since", "slots", "targets", "load", "lag", "in flight", "points/s"):
        table.add_column(name, justify="left" if name == "shard" else "right")
    for name in ("freshness", "gaps", "dollars"):
        table.add_column(name, justify="right")
    for shard in sorted(members.keys() | work.keys(), key=natural):
        slots, done = members.get(shard, []), work.get(shard)
        incarnation = fleet.incarnations.get(shard)
        owned = [t for t in ledger.targets if t.slot in slots] if ledger else []
        stalest = min((t.fresh_until or found.now for t in owned), default=None)
        gaps = sum(t.gaps for t in owned)
        bill = found.prices.look_usd(done.metrics_billed, {"ListMetrics": done.list_metrics}) if done else 0
        since = utc(incarnation.started_at_ms / 1000) if incarnation else None
        alive = shard in members
        load = sum(weights.get(slot, 0.0) for slot in slots) / mean if alive and mean else 0.0
        table.add_row(
            shard,
            age(found.now, since) if alive and since else "",
            _slots(shard, slots, assignment) if alive else "gone",
            str(len(owned)),
            f"{load:.2f}" if alive else "",
            str(sum(lag.get(slot, 0) for slot in slots)),
            str(fleet.in_flight.get(shard, "")),
            f"{done.points_per_s:,.0f}" if done else "0",
            age(found.now, stalest) if owned else "",
            Text(str(gaps), style="bold red" if gaps else ""),
            f"${bill:,.4f}",
        )
    return table


def _slots(shard: str, slots: list[int], assignment: Assignment | None) -> Text:
    """As 6, or 4 → 6 where the assignment gives another number."""
    assigned = assignment.slots_of(shard) if assignment else slots
    if sorted(slots) == assigned:
        return Text(str(len(slots)))
    return Text(f"{len(slots)} → {len(assigned)}", style="yellow")


def _state(found: Status, fleet: Fleet) -> str:
    assignment = fleet.assignment
    if assignment is None:
        return "nothing was assigned yet"
    published = utc(assignment.published_at_ms / 1000)
    said = f"epoch {assignment.epoch}, {assignment.reason}, {age(found.now, published)} ago"
    members = found.exporters.members if found.exporters else {}
    owned = {slot: shard for shard, slots in members.items() for slot in slots}
    astray = sum(owned.get(slot) != shard for slot, shard in enumerate(assignment.owners))
    return f"{said}; {astray} slots on their way" if astray else said


def _moves(fleet: Fleet) -> list[Text]:
    return [
        Text(f"{at:%H:%M:%S} slot {move.slot}: {move.before or 'nobody'} → {move.after}", style="cyan")
        for at, move in reversed(fleet.moved)
    ]


# --- looking --------------------------------------------------------------------------------------------------


def in_flight(stack: LocalStack | None) -> dict[str, int]:
    """Tasks in flight by shard of a local stack; without one, and of a shard that does not answer, nothing."""
    try:
        ports = stack.metrics_ports if stack else {}
    except HeadgateError:
        return {}
    found: dict[str, int] = {}
    for name, port in ports.items():
        if name.startswith("exporter-"):
            try:
                said = _IN_FLIGHT.search(get_local(f"http://{LOOPBACK}:{port}/metrics", timeout_s=1))
            except (OSError, http.client.HTTPException):
                continue
            if said:
                found[name] = int(float(said[1]))
    return found


async def looks(
    config: Config, clock: Clock, stack: LocalStack | None, since_s: int = SINCE_S
) -> AsyncIterator[tuple[Status, Fleet]]:
    """A look each LOOK_EVERY_S, without end. What does not answer is said on the page."""
    fleet, board, lifecycle = Fleet(), Board(config.kafka, "headgate status"), Lifecycle()
    reading = asyncio.create_task(board.run(lifecycle))
    try:
        while True:
            found = await status(config, clock, since_s)
            fleet.assignment, fleet.incarnations = board.assignment, board.incarnations
            fleet.in_flight = await asyncio.to_thread(in_flight, stack)
            fleet.take(found)
            yield found, fleet
            await asyncio.sleep(LOOK_EVERY_S)
    finally:
        lifecycle.stop.set()
        await asyncio.wait({reading}, timeout=5)
        await board.close()


async def watch(
    console: Console, config: Config, clock: Clock, stack: LocalStack | None, since_s: int = SINCE_S
) -> None:
    """Show the page until cancelled; without a terminal, one page after the other."""
    if not console.is_terminal:
        async for found, fleet in looks(config, clock, stack, since_s):
            console.print(page(found, fleet))
    with Live(console=console, refresh_per_second=2, screen=False) as live:
        async for found, fleet in looks(config, clock, stack, since_s):
            live.update(page(found, fleet))
