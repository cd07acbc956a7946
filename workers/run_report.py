"""The report of a run on this machine: once at its end, or now and then while one watches."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import asyncpg

from ingest.clock import SystemClock, utc
from ingest.errors import HeadgateError
from ingest.report.assemble import Wanted, assemble
from ingest.sinks.connection import open_connection
from ingest.sinks.rollup_store import Kept, Roller
from shard_config.model import Config
from workers.report import FORMATS, write

FIRST_S: Final = 60
EACH_S: Final = 600
_DAY_S: Final = 86_400


async def once(config: Config, from_s: int, to_s: int, now_s: int, folder: Path) -> Path:
    """The report of the UTC days that hold [from_s, to_s), as report.html, report.json and report.csv; returns the page's path.

    What has landed is rolled up first, whether its day has ended or not, so that nothing of it is missing. Raises Transient, Fatal and OSError.
    """
    from_s, to_s = from_s // _DAY_S * _DAY_S, -(-to_s // _DAY_S) * _DAY_S
    connection: asyncpg.Connection = await open_connection(config.postgres, "headgate report")
    try:
        roller = Roller(SystemClock())
        while await roller.roll(connection, utc(to_s + _DAY_S), Kept(), patient=False):
            pass
    finally:
        connection.terminate()
    report = await assemble(config, Wanted(from_s, to_s), now_s, lambda what, done, of: None)
    for form in FORMATS:
        await asyncio.to_thread(write, report, form, folder / f"report.{form}")
    return folder / "report.html"


async def now_and_then(config: Config, folder: Path) -> None:
    """Write the report of the last 7 days until cancelled, first when something may have landed. What fails is tried again."""
    clock, pause_s = SystemClock(config.run.clock_offset_s), FIRST_S
    while True:
        await asyncio.sleep(pause_s)
        try:
            to_s = clock.now_s()
            await once(config, to_s - 6 * _DAY_S, to_s, to_s, folder)
            pause_s = EACH_S
        except (HeadgateError, OSError):
            pause_s = FIRST_S
