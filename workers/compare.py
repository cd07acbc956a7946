"""`headgate compare yace`: YACE and Headgate side by side, before the switch: series, labels, values and both bills.

* Reads only: YACE's /metrics, our store and ledger, each once an interval.
* Goes on where it was stopped: what it remembers is in one file (`ingest.compare.state`).
* A scrape that fails, or a store that does not answer, is said and tried again at the next interval.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
import asyncpg
import structlog
from rich.console import Console

from ingest.archive import open_archive
from ingest.clock import Clock, SystemClock, utc
from ingest.compare import steps
from ingest.compare.labels import label_groups
from ingest.compare.lines import Line, read_line
from ingest.compare.proof import prove
from ingest.compare.report import (
    LabelGroup,
    Reasons,
    Report,
    examples_of,
    extra_groups,
    missing_groups,
    values_of,
    yace_bill,
)
from ingest.compare.state import State
from ingest.compare.store import connected, looked_at, open_stretches
from ingest.errors import Rejected, Transient
from shard_config.document import ConfigError, ConfigErrors
from shard_config.model import Config
from shard_config.price import Prices
from workers import local
from workers.compare_view import FORMS, summary, write, write_lists
from workers.lifecycle import configure_logs

log = structlog.get_logger()

INTERVAL_S = 300
FOR_S = 86_400
BODY_BYTES_MAX = 1 << 30
"""Of one answer, decompressed: four million series."""
SCRAPE_TIMEOUT_S = 120
OURS_EACH_S = 3600
EXAMPLES_LISTED = 200
ARCHIVE_S = 15.0
"""For one object: without the archive there is a report, too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for. `for_s` 0: one look."""

    urls: tuple[str, ...]
    for_s: int
    interval_s: int


# --- one scrape -----------------------------------------------------------------------------------------------


async def scrape(http: aiohttp.ClientSession, url: str, body: IO[bytes]) -> int:
    """Copy an exposition to a file; returns its lines. Raises Transient, and Rejected (too_large)."""
    where, lines, last = f"yace {url}", 0, b"\n"
    try:
        async with http.get(url) as answer:
            if answer.status != 200:
                raise Transient(where, f"HTTP status {answer.status}", "give the address of YACE's /metrics")
            async for chunk in answer.content.iter_chunked(1 << 16):
                lines += chunk.count(b"\n")
                last = chunk
                if body.tell() + len(chunk) > BODY_BYTES_MAX:
                    raise Rejected(where, "too_large", f"more than {BODY_BYTES_MAX:,} bytes")
                body.write(chunk)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise Transient(
            where, f"{type(error).__name__}: {error}", "is it running, and reachable from here?"
        ) from error
    if not last.endswith(b"\n"):
        raise Transient(where, "the body was cut off")
    return lines


def lines_of(body: IO[bytes]) -> Iterator[Line]:
    """Its samples. Raises Rejected."""
    body.seek(0)
    for raw in body:
        try:
            line = read_line(raw.decode())
        except UnicodeDecodeError as error:
            raise Rejected("exposition", "bad_exposition", f"not UTF-8: {error}") from error
        if line is not None:
            yield line


# --- the comparison -------------------------------------------------------------------------------------------


class Comparison:
    """One comparison, from the first scrape to the report."""

    def __init__(self, config: Config, plan: Plan, state: State, clock: Clock) -> None:
        self._config = config
        self._plan = plan
        self._state = state
        self._clock = clock
        self._problems: list[str] = []

    async def run(self, stop: asyncio.Event, progress: Callable[[str], None]) -> Report:
        """Scrape until the time is over or `stop` is set, and report. Raises Transient where even the report cannot be made, Fatal."""
        state, plan = self._state, self._plan
        async with connected(self._config.postgres) as connection:
            until_s = await self._begin(connection)
        timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, headers={"User-Agent": "headgate"}) as http:
            while not plan.for_s or self._clock.now_s() < until_s:
                began_s = self._clock.monotonic_s()
                for number, url in enumerate(plan.urls):
                    await self._take(http, number, url)
                try:
                    await self._hold(all_of_them=not plan.for_s)
                except Transient as error:
                    log.warning("store_not_read", error=str(error))
                    self._problems.append(str(error))
                progress(summary(state, until_s, self._clock.now_s()))
                left_s = min(
                    plan.interval_s - (self._clock.monotonic_s() - began_s), until_s - self._clock.now_s()
                )
                if not plan.for_s or stop.is_set() or await _stopped(stop, self._clock, left_s):
                    break
        return await self.report()

    async def _begin(self, connection: asyncpg.Connection) -> int:
        """Write down what is compared, or go on with it; returns until when."""
        state, now_s = self._state, self._clock.now_s()
        if state.get("urls") is None:
            state.set("urls", list(self._plan.urls))
            state.set("began_s", now_s)
            state.set("charged", await steps.charged(connection, now_s, now_s))
        elif state.get("urls") != list(self._plan.urls):
            known = ", ".join(state.get("urls"))
            raise ConfigErrors(
                [ConfigError("--state", 0, "", f"it compares {known}", "give another file, or remove it")]
            )
        began_s: int = state.get("began_s")
        return began_s + self._plan.for_s

    async def _take(self, http: aiohttp.ClientSession, number: int, url: str) -> None:
        at_s = self._clock.now_s()
        with tempfile.TemporaryFile() as body:
            try:
                expected = await scrape(http, url, body)
                count = await asyncio.to_thread(self._state.take, number, at_s, lines_of(body), expected)
            except (Transient, Rejected) as error:
                log.warning("scrape_failed", url=url, error=str(error))
                self._state.failed(number, at_s, str(error))
            else:
                log.info("scraped", url=url, samples=count)

    async def _hold(self, all_of_them: bool) -> None:
        """Hold what has settled against the store."""
        state, now_s = self._state, self._clock.now_s()
        async with connected(self._config.postgres) as connection:
            if (state.get("ours_read_s") or 0) <= now_s - OURS_EACH_S:
                await steps.read_ours(connection, self._config, state, now_s)
                state.set("ours_read_s", now_s)
            await steps.judge_ripe(connection, self._config, state, now_s, all_of_them)

    async def report(self) -> Report:
        """What is known now. Raises Transient."""
        state, config, now_s = self._state, self._config, self._clock.now_s()
        from_s: int = state.get("began_s")
        async with connected(config.postgres) as connection:
            await steps.read_ours(connection, config, state, now_s)
            await steps.judge_ripe(connection, config, state, now_s, all_of_them=not self._plan.for_s)
            await steps.find_living(connection, config, state, from_s, now_s)
            open_ = await open_stretches(connection, from_s - 3600, now_s)
            looked = await looked_at(connection, utc(from_s - 86_400))
            charged = await steps.charged(connection, from_s, now_s)
            labels, notes = await self._of_the_archive(connection)
        reasons = Reasons(config, open_, looked, now_s)
        alive = state.one(
            "SELECT count(*) FROM ours WHERE live = 1 OR EXISTS (SELECT 1 FROM theirs WHERE theirs.key = ours.key)"
        )
        bills = {}
        if self._plan.for_s:
            bills = {
                "yace": yace_bill(state, Prices.of(config.aws)),
                "headgate": steps.our_bill(state.get("charged"), charged, config, alive),
            }
        failed = [
            row[0] for row in state.rows("SELECT DISTINCT problem FROM scrapes WHERE problem <> '' LIMIT 20")
        ]
        return Report(
            from_s=from_s,
            to_s=now_s,
            scrapes=state.one("SELECT count(*) FROM scrapes WHERE problem = ''"),
            failed=(*failed, *dict.fromkeys((*self._problems, *notes))),
            theirs=state.one("SELECT count(*) FROM theirs"),
            ours=alive,
            both=state.one("SELECT count(*) FROM theirs JOIN ours USING (key)"),
            infos=state.one("SELECT count(*) FROM infos"),
            missing=tuple(missing_groups(state, reasons)),
            extra=tuple(extra_groups(state, reasons)),
            labels=tuple(labels),
            values=tuple(values_of(state)),
            examples=tuple(examples_of(state, EXAMPLES_LISTED, open_)),
            unsettled=state.one("SELECT count(*) FROM pending JOIN ours USING (key)"),
            bills=bills,
        )

    async def _of_the_archive(self, connection: asyncpg.Connection) -> tuple[list[LabelGroup], list[str]]:
        """(labels that differ, what could not be known): without the archive differences of values stay unclear, and no more."""
        config, state, now_s = self._config, self._state, self._clock.now_s()
        try:
            async with open_archive(config.s3, self._clock, deadline_s=ARCHIVE_S) as archive:
                labels, notes = await label_groups(state, config, archive, now_s)
                await prove(connection, archive, config, self._clock, state)
        except Transient as error:
            return [], [str(error)]
        return labels, notes


async def _stopped(stop: asyncio.Event, clock: Clock, seconds: float) -> bool:
    """Wait so long, or until it is set; whether it is."""
    waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(clock.sleep(max(0.0, seconds)))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return stop.is_set()


# --- the command ----------------------------------------------------------------------------------------------


def duration(text: str) -> int:
    """Seconds of a number with s, m, h or d behind it, as 24h; without one seconds."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 24h, 30m or 300s")
    return int(number) * unit


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compare",
        help="another exporter beside Headgate: what differs, and both bills",
        description="Holds another exporter that runs beside Headgate against what Headgate has landed.",
    )
    others = parser.add_subparsers(title="exporters", metavar="EXPORTER", required=True)
    yace = others.add_parser(
        "yace",
        help="yet-another-cloudwatch-exporter, by its /metrics",
        description="Scrapes YACE's /metrics each interval and holds it against our store: series that one side lacks, with the likely reason; labels and "
        "values that differ, once they have settled; gaps on either side; and what CloudWatch billed both. Ctrl-C reports what is known; the same "
        "command goes on from there. Reads only. Exit code 1 where something is missing or wrong here.",
    )
    add: Any = yace.add_argument
    add("--url", action="append", required=True, help="as http://yace:5000/metrics; repeatable")
    add(
        "--for",
        dest="for_s",
        type=duration,
        default=FOR_S,
        metavar="TIME",
        help="as 24h (default) or 30m; 0 looks once",
    )
    add("--once", action="store_true", help="the same as --for 0")
    add(
        "--interval",
        dest="interval_s",
        type=duration,
        default=INTERVAL_S,
        metavar="TIME",
        help="between scrapes (default 300s, which is YACE's own)",
    )
    add(
        "--state",
        type=Path,
        metavar="FILE",
        help="what is remembered between scrapes (default compare-yace.sqlite in .headgate; --once has none)",
    )
    add("--format", choices=FORMS, default="table", help="csv has every missing and extra series")
    add("--csv-dir", type=Path, metavar="DIR", help="write the lists there as well, a file each")
    add("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    yace.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    configure_logs("compare")
    config = local.find_config(args.config)
    plan = Plan(tuple(args.url), 0 if args.once else args.for_s, max(1, args.interval_s))
    path = args.state or (local.default_home() / "compare-yace.sqlite" if plan.for_s else None)
    with ExitStack() as resources:
        state = State(path)
        resources.callback(state.close)
        comparison = Comparison(config, plan, state, SystemClock(config.run.clock_offset_s))
        report = asyncio.run(_until_stopped(comparison))
        write(report, state, args.format, Console(width=None if sys.stdout.isatty() else 200))
        if args.csv_dir is not None:
            write_lists(state, report, args.csv_dir)
    return 0 if report.ok else 1


async def _until_stopped(comparison: Comparison) -> Report:
    stop = asyncio.Event()
    for which in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(which, stop.set)
    return await comparison.run(stop, lambda text: print(text, file=sys.stderr))
