"""`headgate status`: targets, shards, lag, freshness, gaps and dollars, for people and (`--json`) for machines.

What cannot be reached is said and left out; the exit code is 1 then, and also where a window is past its deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ingest import budget, spending
from ingest.brokers import client_options
from ingest.budget import Decision
from ingest.clock import Clock, SystemClock, utc
from ingest.errors import HeadgateError, Transient
from ingest.forwarded import Note
from ingest.gaps import Filter, not_polled
from ingest.membership import look_at_group
from ingest.overview import Overview, overview
from ingest.schedule import grids_of
from ingest.sinks.connection import open_connection
from shard_config.model import Config, Kafka
from shard_config.price import Prices
from workers import local
from workers.budgets import spoken, to_plain, today
from workers.names import exporter_group, landing_group, ledger_group, remote_write_group

SINCE_S = 24 * 3600
KAFKA_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """A consumer group: by member, the partitions that it owns; `lag` is records behind the log's end, by partition."""

    group: str
    topic: str
    members: dict[str, list[int]]
    lag: dict[int, int]
    notes: tuple[Note, ...] = ()
    """Of a receiver's group: what its processes last said beside their offsets."""

    @property
    def lag_total(self) -> int:
        return sum(self.lag.values())


@dataclass(frozen=True, slots=True)
class Status:
    """One look at the whole system. `ledger` is None where PostgreSQL, `exporters` where Kafka does not answer: see `errors`."""

    now: datetime
    ledger: Overview | None
    exporters: GroupStatus | None
    landing: GroupStatus | None
    projection: GroupStatus | None
    dead_letters: int | None
    dollars: float | None
    """The most that what the receipts count may cost: by the dearer reading of statistics, ListMetrics as if the month's free million were used up."""
    prices: Prices
    budget: Decision | None
    """The UTC day's dollars against the budgets, and how polls are stretched for them now."""
    unpolled_windows: int | None
    """That nobody was asked for, for want of money: no gaps."""
    errors: tuple[str, ...]
    receivers: dict[str, GroupStatus] = field(default_factory=dict)
    """Of remote write, by name."""

    @property
    def healthy(self) -> bool:
        passed = self.budget is not None and self.budget.passed
        return not self.errors and not passed and (self.ledger is None or not self.ledger.gaps)


async def status(config: Config, clock: Clock, since_s: int = SINCE_S) -> Status:
    """Look. Never raises for a part that does not answer."""
    now = utc(clock.now_s())
    prices = Prices.of(config.aws)
    errors: list[str] = []
    ledger: Overview | None = None
    decision: Decision | None = None
    unpolled: int | None = None
    groups: dict[str, GroupStatus] = {}
    write = config.remote_write
    receivers = {r.name: remote_write_group(config.kafka, r.name) for r in write.receivers} if write else {}
    dead: int | None = None
    try:
        ledger, decision, unpolled = await _ledger(config, now, now - timedelta(seconds=since_s))
    except HeadgateError as error:
        errors.append(str(error))
    try:
        async with asyncio.timeout(KAFKA_TIMEOUT_S):
            groups, dead = await _kafka(config.kafka, receivers)
    except (KafkaError, OSError, TimeoutError) as error:
        errors.append(f"kafka {config.kafka.bootstrap}: {type(error).__name__} {error}".rstrip())
    return Status(
        now=now,
        ledger=ledger,
        exporters=groups.get(exporter_group(config.kafka)),
        landing=groups.get(landing_group(config.kafka)),
        projection=groups.get(ledger_group(config.kafka)),
        dead_letters=dead,
        prices=prices,
        budget=decision,
        unpolled_windows=unpolled,
        dollars=float(prices.look_usd(ledger.metrics_billed, {"ListMetrics": ledger.list_metrics}))
        if ledger
        else None,
        errors=tuple(errors),
        receivers={name: groups[group] for name, group in receivers.items() if group in groups},
    )


async def _ledger(config: Config, now: datetime, since: datetime) -> tuple[Overview, Decision, int]:
    connection = await open_connection(config.postgres, "headgate status")
    try:
        async with asyncio.timeout(30):
            seen = await overview(connection, now, since)
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                books = await spending.read(connection, config, int(now.timestamp()))
            decision = budget.decide(spending.situation_of(books, config))
            only = Filter(from_s=since.timestamp())
            unpolled = await not_polled(connection, now, grids_of(config), Prices.of(config.aws), only=only)
            # What holds now is what the coordinator has decided.
            decision = replace(decision, polling=books.polling)
            return seen, decision, sum(gap.windows for gap in unpolled)
    except TimeoutError as error:
        raise Transient("ledger", "no answer within 30 s") from error
    finally:
        connection.terminate()


async def _kafka(kafka: Kafka, receivers: Mapping[str, str]) -> tuple[dict[str, GroupStatus], int]:
    topics = {
        exporter_group(kafka): kafka.topic("collect"),
        landing_group(kafka): kafka.topic("raw"),
        ledger_group(kafka): kafka.topic("ledger"),
        **dict.fromkeys(receivers.values(), kafka.topic("raw")),
    }
    admin = AIOKafkaAdminClient(**client_options(kafka))
    reader = AIOKafkaConsumer(**client_options(kafka), enable_auto_commit=False)
    try:
        await admin.start()
        await reader.start()
        groups, _ = await look_at_groups(admin, reader, topics)
        dead = sum((await ends_of(reader, kafka.topic("dead"))).values())
    finally:
        await reader.stop()
        await admin.close()
    return groups, dead


async def look_at_groups(
    admin: AIOKafkaAdminClient, reader: AIOKafkaConsumer, topics: Mapping[str, str]
) -> tuple[dict[str, GroupStatus], dict[str, dict[int, int]]]:
    """By group, which has the topic that it reads: how it stands; and by topic and partition, where the log ends. Raises KafkaError, OSError."""
    groups: dict[str, GroupStatus] = {}
    ends: dict[str, dict[int, int]] = {}
    for group, topic in topics.items():
        if topic not in ends:
            ends[topic] = await ends_of(reader, topic)
        committed = await admin.list_consumer_group_offsets(group)
        notes = {tp.partition: Note.read(at.metadata) for tp, at in committed.items() if tp.topic == topic}
        # What waits at a remote writer until it settles is read, and not committed: its note says so.
        done = {
            tp.partition: max(at.offset, note.next if (note := notes[tp.partition]) else 0)
            for tp, at in committed.items()
            if tp.topic == topic
        }
        lag = {partition: max(0, end - done.get(partition, 0)) for partition, end in ends[topic].items()}
        found = await look_at_group(admin, group)
        members = {name: list(partitions) for name, partitions in found.members.items()}
        newest = {note.by: note for note in notes.values() if note is not None}
        groups[group] = GroupStatus(group, topic, members, lag, tuple(newest.values()))
    return groups, ends


async def ends_of(reader: AIOKafkaConsumer, topic: str) -> dict[int, int]:
    """By partition, where the log ends. Raises KafkaError, OSError."""
    partitions = await reader._client.fetch_all_metadata()
    found = partitions.partitions_for_topic(topic) or set()
    ends: dict[TopicPartition, int] = await reader.end_offsets(
        [TopicPartition(topic, p) for p in sorted(found)]
    )
    return {tp.partition: end for tp, end in ends.items()}


# --- for people -------------------------------------------------------------------------------------------------


def render(
    status: Status, targets_max: int | None = None, shards: Callable[[], RenderableType] | None = None
) -> RenderableType:
    """Tables for a terminal. With `targets_max`, only the targets that need attention most; `shards` makes another table of them."""
    parts: list[RenderableType] = [Text(f"error: {e}", style="bold red") for e in status.errors]
    if status.ledger is not None:
        parts += [_summary(status, status.ledger), shards() if shards else _shards(status, status.ledger)]
        parts.append(_targets(status.ledger, targets_max))
    if status.receivers:
        parts.append(_receivers(status))
    return Group(*parts)


def _receivers(status: Status) -> Table:
    """By receiver: who sends, what was not read yet, how old the newest sample is, and what was refused since its processes began."""
    table = Table(title="receivers", title_justify="left", expand=False)
    for name in ("receiver", "writers", "lag", "newest sample", "sent", "refused"):
        table.add_column(name, justify="left" if name == "receiver" else "right")
    for name, group in sorted(status.receivers.items()):
        newest_s = max((note.newest_s for note in group.notes), default=0)
        refused = sum(note.refused for note in group.notes)
        table.add_row(
            name,
            str(len(group.members)) if group.members else Text("none", style="bold red"),
            f"{group.lag_total:,}",
            age(status.now, utc(newest_s) if newest_s else None),
            f"{sum(note.samples for note in group.notes):,}",
            Text(f"{refused:,}", style="yellow" if refused else ""),
        )
    return table


def _summary(status: Status, ledger: Overview) -> Table:
    table = Table.grid(padding=(0, 2))
    lag = status.landing.lag_total if status.landing else None
    gaps = Text(str(ledger.gaps), style="bold red" if ledger.gaps else "green")
    rows: list[tuple[str, Any, str, Any]] = [
        ("windows landed", f"{ledger.landed:,} of {ledger.windows:,}", "gaps", gaps),
        ("points landed", f"{ledger.points_landed:,}", "points/s", f"{ledger.points_per_s:,.0f}"),
        ("dead letters", _or_unknown(status.dead_letters), "batches waiting", _or_unknown(lag)),
        (
            "metrics billed",
            f"{ledger.metrics_billed:,}",
            "dollars",
            f"${status.dollars:,.4f}" if status.dollars is not None else "?",
        ),
    ]
    if status.budget is not None:
        polls = spoken(status.budget.polling)
        if status.unpolled_windows:
            polls += f"; {status.unpolled_windows:,} windows not polled"
        rows.append(("dollars today", today(status.budget), "polls", polls))
    for row in rows:
        table.add_row(*(c if isinstance(c, Text) else str(c) for c in row))
    return table


def _shards(status: Status, ledger: Overview) -> Table:
    """By shard, with what its targets have of lag (tasks not taken up), freshness (of the stalest) and gaps."""
    prices = status.prices
    table = Table(title="shards", title_justify="left", expand=False)
    for name, justify in (
        ("shard", "left"),
        ("slots", "right"),
        ("targets", "right"),
        ("points/s", "right"),
        ("lag", "right"),
        ("freshness", "right"),
        ("gaps", "right"),
        ("dollars", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    work = {s.shard: s for s in ledger.shards}
    members = status.exporters.members if status.exporters else {}
    lag = status.exporters.lag if status.exporters else {}
    for shard in sorted(members.keys() | work.keys(), key=natural):
        slots = members.get(shard, [])
        done = work.get(shard)
        owned = [t for t in ledger.targets if t.slot in slots]
        stalest = min((t.fresh_until or ledger.since for t in owned), default=None)
        gaps = sum(t.gaps for t in owned)
        bill = prices.look_usd(done.metrics_billed, {"ListMetrics": done.list_metrics}) if done else 0
        table.add_row(
            shard,
            str(len(slots)) if shard in members else "gone",
            str(len(owned)),
            f"{done.points_per_s:,.0f}" if done else "0",
            str(sum(lag.get(s, 0) for s in slots)),
            age(ledger.now, stalest) if owned else "",
            Text(str(gaps), style="bold red" if gaps else ""),
            f"${bill:,.4f}",
        )
    return table


def _targets(ledger: Overview, targets_max: int | None) -> Table:
    worst_first = sorted(
        ledger.targets, key=lambda t: (-t.gaps, not t.problem, t.fresh_until or ledger.since, t.target)
    )
    shown = worst_first[:targets_max] if targets_max else sorted(ledger.targets, key=lambda t: t.target)
    left_out = len(ledger.targets) - len(shown)
    table = Table(title=f"targets ({len(ledger.targets)})", title_justify="left")
    for name in ("target", "slot", "windows", "landed", "sealed", "gaps", "freshness", "problem"):
        table.add_column(name, justify="left" if name in ("target", "problem") else "right")
    for t in shown:
        table.add_row(
            t.target,
            "" if t.slot is None else str(t.slot),
            str(t.windows),
            str(t.landed),
            str(t.sealed),
            Text(str(t.gaps), style="bold red" if t.gaps else ""),
            age(ledger.now, t.fresh_until),
            Text(t.problem[:200], style="yellow"),
        )
    if left_out:
        table.caption = f"and {left_out} more, with fewer problems"
    return table


def age(now: datetime, then: datetime | None) -> str:
    """As 4m 05s; "never" for None."""
    if then is None:
        return "never"
    seconds = max(0, int((now - then).total_seconds()))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}h {rest // 60:02}m" if hours else f"{rest // 60}m {rest % 60:02}s"


def natural(name: str) -> tuple[str, int]:
    """exporter-2 before exporter-10."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (name, 0)


def _or_unknown(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def to_json(status: Status) -> str:
    """The same for machines. Times are RFC 3339."""
    raw = asdict(status)
    del raw["prices"]
    raw["budget"] = None if status.budget is None else to_plain(status.budget)
    raw["healthy"] = status.healthy
    if status.ledger is not None:
        raw["ledger"] |= {
            "windows": status.ledger.windows,
            "landed": status.ledger.landed,
            "gaps": status.ledger.gaps,
        }
    return json.dumps(raw, default=_json_default, indent=2)


def _json_default(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    raise TypeError(f"{type(value)} is not for JSON")


# --- the command ------------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "status",
        help="targets, shards, lag, freshness, gaps, dollars",
        description="Shows what the ledger and Kafka say now. Exit code 1 where something does not answer or a window is past its deadline.",
    )
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="refresh until Ctrl-C; by shard also since when, load, tasks in flight, and slots that move, as they do",
    )
    parser.add_argument(
        "--hours", type=float, default=SINCE_S / 3600, help="windows of the last so many hours (%(default)g)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    clock = SystemClock(config.run.clock_offset_s)
    since_s = int(args.hours * 3600)
    if config.run.horizon_s is not None:
        since_s = max(since_s, clock.now_s() - config.run.horizon_s[0] + 1)
    if args.watch:
        from workers.watch import watch

        stack = local.find_running() if args.config is None else None
        asyncio.run(watch(Console(), config, clock, stack, since_s))
        return 0
    found = asyncio.run(status(config, clock, since_s))
    if args.json:
        sys.stdout.write(to_json(found) + "\n")
    else:
        # In a file or a pipe nothing is cut off for want of width.
        Console(width=None if sys.stdout.isatty() else 200).print(render(found))
    return 0 if found.healthy else 1
