"""Snapshots of the ledger: the coordinator takes one a day, and `headgate snapshot` one now. `ingest.snapshot` says what is in them.

* *One coordinator at a time*, by an advisory lock; who does not get it looks again later. Of two that would take one in the same second one gives up.
* *It holds up nobody*: a connection of its own, which only reads, and PostgreSQL waits while the archive takes a part.
* *It is seen to be missing*: `headgate_snapshot_timestamp_seconds` is the time of the newest, as far as this process knows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import structlog
from prometheus_client import Gauge
from rich.console import Console
from rich.table import Table

from ingest import snapshot
from ingest.archive import open_archive
from ingest.clock import Clock, SystemClock, rfc3339
from ingest.errors import HeadgateError
from ingest.sinks.connection import open_connection, translated
from ingest.snapshot import Snapshot
from shard_config.model import Config
from workers import local
from workers.lifecycle import Lifecycle, configure_logs

_log = structlog.get_logger()

DAY_S = 86_400
TURN_S = 600.0
RETRY_S = 300.0
LOCK_ID = 0x534E4150  # SNAP

NEWEST = Gauge(
    "headgate_snapshot_timestamp_seconds",
    "Unix time of the newest snapshot of the ledger in the archive. Older than a day: a restore would go back to it.",
)


class Snapshots:
    """The coordinator's loop: a snapshot where the newest is a day old."""

    def __init__(self, config: Callable[[], Config], clock: Clock) -> None:
        self._config = config
        self._clock = clock

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop. What fails is said and tried again."""
        wait_s = 0.0
        while not await lifecycle.pause(wait_s):
            try:
                await self.step()
                wait_s = TURN_S
            except HeadgateError as error:
                _log.error("snapshot_failed", error=str(error))
                wait_s = RETRY_S

    async def step(self) -> Snapshot | None:
        """Take one where one is due and nobody else is at it. Raises Transient, Fatal."""
        config = self._config()
        async with open_archive(config.s3, self._clock) as archive:
            times = await snapshot.taken(archive)
        if times:
            NEWEST.set(times[-1])
        if times and self._clock.now_s() - times[-1] < DAY_S:
            return None
        taken = await take(config, self._clock, alone=True)
        if taken is not None:
            NEWEST.set(taken.taken_s)
        return taken


async def take(config: Config, clock: Clock, *, alone: bool = False, anyway: bool = False) -> Snapshot | None:
    """Take one now; None where it is to be `alone` and another coordinator is at it. Raises as `ingest.snapshot.take`."""
    connection = await open_connection(config.postgres, "headgate snapshot")
    try:
        if alone:
            with translated("snapshot"):
                if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_ID):
                    return None
        async with open_archive(config.s3, clock) as archive:
            return await snapshot.take(connection, archive, clock.now_s(), anyway=anyway)
    finally:
        connection.terminate()


async def before_upgrade(config: Config, clock: Clock) -> list[str]:
    """One where migrations are about to change a ledger that is in use; returns what came of it, in a line.

    Migrations are transactions of their own: one that cannot be secured is applied all the same, and that is said.
    """
    try:
        connection = await open_connection(config.postgres, "headgate snapshot")
        try:
            with translated("snapshot"):
                used = await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL")
                if not used or not await connection.fetchval("SELECT EXISTS (SELECT FROM windows)"):
                    return []
        finally:
            connection.terminate()
        return [f"{await take(config, clock)}, before the schema changes"]
    except HeadgateError as error:
        return [f"no snapshot before the schema changes: {error}"]


# --- the command ----------------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "snapshot",
        help="put what only PostgreSQL knows into the archive, now; or list what is there",
        description="Puts the ledger, the readers' positions, pauses, charges and the inventory into the S3 archive, as the coordinator does once a day. Samples "
        "are not in it: the archive has them. Take one before something risky. `headgate restore` loads the newest into an empty PostgreSQL.",
    )
    parser.add_argument("--list", action="store_true", help="only list the snapshots that are kept")
    parser.add_argument(
        "--anyway", action="store_true", help="even if this ledger has lost what the last snapshot has"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    configure_logs("snapshot")
    config = local.find_config(args.config)
    return asyncio.run(_run(config, args.list, args.anyway, args.format == "json"))


async def _run(config: Config, only_list: bool, anyway: bool, as_json: bool) -> int:
    clock = SystemClock(config.run.clock_offset_s)
    if not only_list:
        taken = await take(config, clock, anyway=anyway)
        assert taken is not None  # noqa: S101  # it did not ask to be alone
        print(json.dumps(snapshot.to_json(taken)) if as_json else taken)
        return 0
    found: list[Snapshot] = []
    problems: list[str] = []
    async with open_archive(config.s3, clock) as archive:
        for taken_s in await snapshot.taken(archive):
            try:
                found.append(await snapshot.read(archive, taken_s))
            except HeadgateError as error:
                problems.append(str(error))
    if as_json:
        print(json.dumps({"snapshots": [snapshot.to_json(s) for s in found], "problems": problems}))
    else:
        _show(found, problems)
    return 1 if problems or not found else 0


def _show(found: list[Snapshot], problems: list[str]) -> None:
    table = Table("taken", box=None)
    for name in ("rows", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("schema")
    for s in found:
        table.add_row(rfc3339(s.taken_s), f"{s.rows:,}", f"{s.size_bytes:,}", s.migration)
    console = Console(width=120)
    console.print(table if found else "no snapshot is there")
    for problem in problems:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)
