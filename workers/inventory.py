"""`headgate inventory`: what resources there are, how large they are, and what became of them. And the coordinator's refresh of it.

The coordinator refreshes each `inventory.interval_s`, in a thread with an event loop of its own: reading 10,000 resources out of XML takes seconds, and planning
never waits for it. Two coordinators at once do no harm: looks take turns in the store, and one that is older changes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import asyncpg
import structlog
from prometheus_client import Gauge
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ingest.clock import Clock, SystemClock, rfc3339
from ingest.errors import HeadgateError
from ingest.inventory import csv_file, store
from ingest.inventory.model import Lived, Span
from ingest.inventory.refresh import Outcome, import_file, refresh
from ingest.report.tables import cell
from ingest.sinks.connection import open_connection
from shard_config.model import Config
from workers import local
from workers.arguments import parse_time
from workers.lifecycle import Lifecycle, configure_logs

_log = structlog.get_logger()

T = TypeVar("T")

TURN_S: Final = 30.0
RETRY_S: Final = 900.0
"""After a refresh that failed as a whole, and where nothing at all could be listed."""
REFRESH_S: Final = 7_200.0
"""The most that one refresh may take."""
STOP_S: Final = 5.0
"""For a refresh that is told to stop."""
ROWS_MAX: Final = 200
"""Lines of a table; csv and json have all."""

REFRESHED = Gauge(
    "headgate_inventory_refreshed_timestamp_seconds",
    "Unix time at which the inventory was last refreshed by this coordinator. Old where inventory.source is set: see its log.",
)
FAILED = Gauge(
    "headgate_inventory_scopes_failed",
    "Accounts, regions and services whose last listing failed or was denied: their sizes are as old as the last one. See headgate inventory list --looks.",
)


class Refresher:
    """The coordinator's. `config` gives the configuration as it is now."""

    def __init__(self, config: Callable[[], Config], clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._next_s: float | None = None

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop: refresh when it is due. What goes wrong is logged, and stops nothing else."""
        while not lifecycle.stop.is_set():
            step = asyncio.create_task(self.step())
            stopped = asyncio.create_task(lifecycle.stop.wait())
            try:
                await asyncio.wait({step, stopped}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (step, stopped):
                    task.cancel()
                await asyncio.gather(step, stopped, return_exceptions=True)
            if not step.cancelled() and (bug := step.exception()) is not None:
                self._next_s = self._clock.monotonic_s() + RETRY_S
                _log.error("inventory_bug", error=f"{type(bug).__name__}: {bug}", exc_info=bug)
            await lifecycle.pause(TURN_S)

    async def step(self) -> bool:
        """Refresh if it is due; True where that was done, whatever came of it."""
        config = self._config()
        if config.inventory.source == "none":
            return False
        try:
            if self._next_s is None:
                self._next_s = await self._due_s(config)
            if self._clock.monotonic_s() < self._next_s:
                return False
            async with asyncio.timeout(REFRESH_S):
                outcomes = await _apart(lambda: refresh(config, self._clock))
        except (HeadgateError, TimeoutError) as error:
            self._next_s = self._clock.monotonic_s() + RETRY_S
            _log.error("inventory_not_refreshed", error=f"{type(error).__name__}: {error}", retry_s=RETRY_S)
            return True
        failed = sum(bool(one.failure) for one in outcomes)
        FAILED.set(failed)
        all_failed = failed == len(outcomes) > 0
        self._next_s = self._clock.monotonic_s() + (RETRY_S if all_failed else config.inventory.interval_s)
        if not all_failed:
            REFRESHED.set(self._clock.now_s() - config.run.clock_offset_s)
        _log.info(
            "inventory_refreshed",
            scopes=len(outcomes),
            failed=failed,
            resources=sum(o.resources for o in outcomes),
        )
        return True

    async def _due_s(self, config: Config) -> float:
        """A restart does not ask again what was asked a short time ago."""
        connection = await open_connection(config.postgres, "headgate inventory")
        try:
            tried_s = max((one.tried_s for one in await store.known(connection)), default=0)
        finally:
            connection.terminate()
        left_s = tried_s + config.inventory.interval_s - self._clock.now_s()
        return self._clock.monotonic_s() + max(0, left_s)


async def _apart(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What `work` gives, done in a thread with an event loop of its own; cancelled there where it is cancelled here."""
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def inside() -> T:
        task = asyncio.create_task(work())
        begun.append((asyncio.get_running_loop(), task))
        return await task

    done = asyncio.get_running_loop().run_in_executor(None, lambda: asyncio.run(inside()))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        for loop, task in begun:
            with contextlib.suppress(RuntimeError):  # it is closed: what was to be cancelled is done
                loop.call_soon_threadsafe(task.cancel)
        await asyncio.wait({done}, timeout=STOP_S)
        raise


# --- the commands -----------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inventory",
        help="what resources there are, their sizes, states and owners, and what became of them",
        description="CloudWatch knows no sizes. The inventory does: it is asked for by read-only calls, an AWS Config aggregator or a CSV file (`inventory` in "
        "the configuration), and kept with its history in PostgreSQL, for the report.",
    )
    what = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    again = what.add_parser(
        "refresh",
        help="ask the configured source now",
        description="Asks the configured source for all accounts, regions and services, and says what is new, changed and gone in each. The coordinator does the same "
        "each inventory.interval_s. What is denied or fails is said with its remedy, and changes nothing that is known. Exit code 1 where something failed.",
    )
    show = what.add_parser(
        "list",
        help="what there is, or was",
        description="Lists resources as they are known now; with --from and --to what lived in between, a line for each span of time in which nothing of it "
        "changed; with --looks how each account, region and service stands. `--format csv` without times is what `import` reads.",
    )
    take = what.add_parser(
        "import",
        help="take a CSV file",
        description="Takes a CSV file of resources (docs/configuration.md has the columns): the whole of each account, region and service that it names, so what "
        "has left it is gone. A file with a bad line is refused, and all its bad lines are said.",
    )
    take.add_argument("file", type=Path, metavar="FILE.csv")
    for name in ("account", "region", "service"):
        show.add_argument(f"--{name}")
    show.add_argument(
        "--from", dest="from_s", type=parse_time, metavar="TIME", help="as 2026-11-24T05:00:00Z"
    )
    show.add_argument("--to", dest="to_s", type=parse_time, metavar="TIME", help="exclusive; default: now")
    show.add_argument("--looks", action="store_true", help="how each account, region and service stands")
    for sub, run in ((again, _refresh), (show, _list), (take, _import)):
        sub.add_argument("--format", choices=("table", "csv", "json"), default="table")
        sub.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
        sub.set_defaults(run=run)


def _refresh(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    return _outcomes(args.format, asyncio.run(refresh(config, _clock(config))))


def _import(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    return _outcomes(args.format, asyncio.run(import_file(args.file, config, _clock(config))))


def _clock(config: Config) -> SystemClock:
    if not structlog.is_configured():
        configure_logs("headgate")  # on stderr: stdout is the command's own
    return SystemClock(config.run.clock_offset_s)


def _outcomes(form: str, outcomes: Sequence[Outcome]) -> int:
    rows = [
        {
            "account": one.scope.account, "region": one.scope.region, "service": one.scope.service,
            "resources": one.resources, "new": one.changes.new, "changed": one.changes.changed, "gone": one.changes.gone,
            "failure": one.failure, "lacks": "; ".join(one.lacks),
        }
        for one in sorted(outcomes, key=lambda one: one.scope)
    ]  # fmt: skip
    resources, failed = sum(one.resources for one in outcomes), sum(bool(one.failure) for one in outcomes)
    title = f"{resources:,} resources of {len(rows):,} accounts, regions and services"
    _write(form, rows, title + (f"; {failed:,} failed, and are as they were known" if failed else ""))
    return 1 if failed else 0


def _list(args: argparse.Namespace) -> int:
    config = local.find_config(args.config)
    clock = _clock(config)
    now_s = clock.now_s()
    to_s = now_s + 1 if args.to_s is None else int(args.to_s)
    from_s = to_s - 1 if args.from_s is None else int(args.from_s)
    if from_s >= to_s:
        print("headgate inventory list: --from is not before --to", file=sys.stderr)
        return 2
    rows, title = asyncio.run(_known(config) if args.looks else _lived(config, args, from_s, to_s))
    kept = [
        row for row in rows
        if all(getattr(args, key) in (None, row[key]) for key in ("account", "region", "service"))
    ]  # fmt: skip
    _write(args.format, kept, title.format(len(kept)))
    return 0


async def _connected(config: Config) -> asyncpg.Connection:
    return await open_connection(config.postgres, "headgate inventory list")


async def _known(config: Config) -> tuple[list[dict[str, Any]], str]:
    connection = await _connected(config)
    try:
        found = await store.known(connection)
    finally:
        connection.terminate()
    rows = [
        {
            "account": one.scope.account, "region": one.scope.region, "service": one.scope.service, "source": one.source,
            "resources": one.resources, "first": _time(one.first_s), "whole": _time(one.whole_s), "tried": _time(one.tried_s),
            "failure": one.failure, "lacks": "; ".join(one.lacks),
        }
        for one in found
    ]  # fmt: skip
    return rows, "{:,} accounts, regions and services"


async def _lived(
    config: Config, args: argparse.Namespace, from_s: int, to_s: int
) -> tuple[list[dict[str, Any]], str]:
    connection = await _connected(config)
    accounts = None if args.account is None else [args.account]
    spans = args.from_s is not None
    rows = []
    try:
        async for one in store.resources(connection, from_s, to_s, accounts):
            rows += [_row(one, span, spans) for span in (one.spans if spans else one.spans[-1:])]
    finally:
        connection.terminate()
    return rows, "{:,} spans" if spans else "{:,} resources"


def _row(one: Lived, span: Span, times: bool) -> dict[str, Any]:
    cells: dict[str, Any] = dict(csv_file.row(span.resource))
    if times:
        cells |= {
            "from": rfc3339(span.from_s),
            "to": rfc3339(span.to_s),
            "seen": rfc3339(span.seen_s),
            "gone": _time(one.gone_s),
        }
    return cells


def _time(at_s: int | None) -> str:
    return "" if at_s is None else rfc3339(at_s)


_WIDE: Final = {"account", "region", "service", "arn", "engine", "purchase", "nodes", "storage_max_bytes", "iops", "throughput_bytes_per_s", "read_units",
                "write_units", "attached_to", "role", "multi_az", "state_since", "created", "first", "tried", "seen", "tags"}  # fmt: skip
"""Columns that a table has no room for, or says in the first."""
_GIB: Final = {"memory_bytes": "memory GiB", "storage_bytes": "storage GiB"}


def _is_number(name: str, value: Any) -> bool:
    return isinstance(value, int) or name == "vcpu" or name in _GIB


def _cell(name: str, value: Any) -> str:
    if name in _GIB and value:
        return f"{int(value) / 1024**3:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)[:300]


def _write(form: str, rows: Sequence[dict[str, Any]], title: str) -> None:
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else csv_file.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    elif form == "json":
        sys.stdout.write(json.dumps(list(rows), indent=2) + "\n")
    elif not rows:
        print("nothing is known: see `inventory` in the configuration, and headgate inventory refresh")
    else:
        table = Table(title=title)
        shown = [name for name in rows[0] if name not in _WIDE and any(row[name] != "" for row in rows)]
        table.add_column("of", no_wrap=True)
        for name in shown:
            table.add_column(
                _GIB.get(name, name), justify="right" if _is_number(name, rows[0][name]) else "left"
            )
        for row in rows[:ROWS_MAX]:
            where = f"{row['account']}/{row['region']} {row['service']}"
            table.add_row(Text(where), *(Text(_cell(name, row[name])) for name in shown))
        if len(rows) > ROWS_MAX:
            table.caption = f"and {len(rows) - ROWS_MAX:,} more: see --format csv"
        Console(soft_wrap=not sys.stdout.isatty()).print(table)
