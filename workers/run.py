"""`headgate run`: everything on this machine, against a simulated AWS: to watch, or (`--once`) to prove a stretch of time.

`--once` has a fixed horizon: the previous hour, or all of a folder of traces. It ends by itself, with exit code 0 where each window
has landed one complete look and what has landed equals the simulator's truth as of those looks. Without a terminal a run is always `--once`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import asyncpg
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ingest.clock import SystemClock
from ingest.schedule import grids_of, horizon
from ingest.sinks.connection import open_connection, translated
from shard_config.model import Config
from workers import run_report
from workers.arguments import whole_number
from workers.local import LocalStack, StackSpec, find_config
from workers.prometheus import prometheus_program
from workers.samples import export_csv
from workers.scenes import Scene, made_up_scene, traces_scene
from workers.servers import LOOPBACK, get_local
from workers.status import Status, status
from workers.verify import Verdict, verify
from workers.verify_prometheus import Holding, verify_prometheus
from workers.watch import watch as watch_status

TRY = "last_over_time(aws_ec2_cpuutilization_average[15m])"
"""Points come later than the five minutes that PromQL looks back by itself."""

NO_PROGRESS_S = 180.0
"""A run to the end gives up where nothing more lands for this long."""

_OPEN = """SELECT target, service, window_start, last_status, last_detail FROM windows
WHERE landed_as_of IS NULL AND target NOT LIKE 'exposition/%' ORDER BY target, service, window_start"""

_COUNTS = """SELECT count(*) AS planned, count(landed_as_of) AS landed,
    count(*) FILTER (WHERE landed_as_of IS NULL AND coalesce(last_status, 'complete') = 'complete') AS waiting,
    (SELECT coalesce(sum(points), 0) FROM landed WHERE sink = 'postgres')::bigint AS points,
    (SELECT count(DISTINCT (target, service)) FROM windows
        WHERE target LIKE 'exposition/%' AND landed_as_of IS NOT NULL) AS scraped
FROM windows WHERE target NOT LIKE 'exposition/%'"""
"""What is scraped has no past and goes on while the run lasts: one landed window of each job is asked for."""


# --- to the end -------------------------------------------------------------------------------------------------


def expected_windows(config: Config) -> int:
    """How many windows with a past a run with a horizon plans."""
    if config.run.horizon_s is None:
        return 0
    return sum(
        len(item.windows())
        for target, grids in grids_of(config).items()
        for task in horizon(target, [g for g in grids if g.has_past], *config.run.horizon_s, config.revision)
        for item in task.items
    )


async def until_landed(
    connection: asyncpg.Connection, expected: int, jobs: int, tell: Callable[[int, int], None]
) -> tuple[bool, float | None]:
    """Wait until all expected windows, and one of each job, have landed; (whether they have, seconds until the first point).

    Gives up where nothing more lands for NO_PROGRESS_S.
    """
    started_s = last_s = time.monotonic()
    first_point_s: float | None = None
    before = (-1, -1)
    while True:
        with translated("ledger"):
            row = await connection.fetchrow(_COUNTS, timeout=30)
        if first_point_s is None and row["points"]:
            first_point_s = time.monotonic() - started_s
        now = (row["landed"], row["scraped"])
        if now != before:
            before, last_s = now, time.monotonic()
            tell(row["landed"], row["points"])
        if row["planned"] >= expected and not row["waiting"] and row["scraped"] >= jobs:
            return row["landed"] == row["planned"], first_point_s  # the others were looked at, in vain
        if time.monotonic() - last_s > NO_PROGRESS_S:
            return False, first_point_s
        await asyncio.sleep(0.5)


async def run_once(
    stack: LocalStack, scene: Scene, out: Path, console: Console, *, with_prometheus: bool = False
) -> int:
    """Wait, verify, write `summary.json` and `samples.csv`; returns the exit code.

    What Prometheus holds, where one runs, is in the summary; the exit code is about it only `with_prometheus`.
    """
    started_s = time.monotonic()
    config = find_config(stack.config_path)
    clock = SystemClock(scene.clock_offset_s)
    connection = await open_connection(config.postgres, "headgate run")
    try:
        expected, jobs = expected_windows(config), len(config.exposition)
        done, first_point_s = await _progress(connection, expected, jobs, console)
        from_s, to_s = scene.horizon_s or (0, 0)
        console.print("comparing what has landed with the simulator's truth …")
        verdict = await verify(connection, scene.truth, config, from_s, to_s)
        open_windows = [dict(r) for r in await connection.fetch(_OPEN)]
        holding = None
        if urls := stack.endpoints.prometheus_urls:
            console.print("comparing what Prometheus holds with what has landed …")
            holding = await verify_prometheus(connection, config, urls, from_s, to_s)
        held = holding is None or holding.good or not with_prometheus
        rows = await export_csv(connection, out / "samples.csv", None, None)
        found = await status(config, clock, clock.now_s())
        bill = await asyncio.to_thread(_simulators_bill, stack.endpoints.aws_url)
        console.print("writing the report …")
        page = await run_report.once(config, from_s, to_s, clock.now_s(), out)
        summary = {
            "ok": done and verdict.good and not open_windows and held,
            "windows": {"planned": expected, "landed": expected - len(open_windows)},
            "scraped": {"jobs": jobs, "windows_landed": _scraped(found)},
            "open_windows": [_open_window(w) for w in open_windows[:1000]],
            "points": asdict(verdict),
            "prometheus": None if holding is None else asdict(holding),
            "samples": rows,
            "dead_letters": found.dead_letters,
            "metrics_billed": {
                "ledger": found.ledger.metrics_billed if found.ledger else None,
                "simulator": bill,
            },
            "dollars": found.dollars,
            "seconds": {
                "first_point": None if first_point_s is None else round(first_point_s, 1),
                "all": round(time.monotonic() - started_s, 1),
            },
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
        _print_summary(console, summary, verdict, open_windows, out, holding)
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
        return 0 if summary["ok"] else 1
    finally:
        connection.terminate()


async def _progress(
    connection: asyncpg.Connection, expected: int, jobs: int, console: Console
) -> tuple[bool, float | None]:
    if not console.is_terminal:
        told = [0.0]

        def tell(landed: int, points: int) -> None:
            if time.monotonic() - told[0] > 5 or landed >= expected:
                told[0] = time.monotonic()
                console.print(f"{landed:,} of {expected:,} windows landed, {points:,} points")

        return await until_landed(connection, expected, jobs, tell)
    with Progress(
        SpinnerColumn(),
        TextColumn("windows landed"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}  {task.fields[points]:,} points"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("", total=expected, points=0)
        return await until_landed(
            connection,
            expected,
            jobs,
            lambda landed, points: bar.update(task, completed=landed, points=points),
        )


def _scraped(found: Status) -> int:
    targets = found.ledger.targets if found.ledger else ()
    return sum(t.landed for t in targets if t.target.startswith("exposition/"))


def _stretches(open_windows: list[dict[str, Any]]) -> list[str]:
    """Open windows for people: neighbours with one and the same story are one line."""
    lines: list[str] = []
    key = lambda w: (w["target"], w["service"], w["last_status"] or "no receipt", w["last_detail"] or "")  # noqa: E731
    for (target, service, outcome, detail), group in groupby(open_windows, key):
        windows = list(group)
        first = windows[0]["window_start"].strftime("%Y-%m-%dT%H:%M:%SZ")
        lines.append(f"{target} {service}, {len(windows)} windows from {first}: {outcome} {detail}".rstrip())
    return lines


def _open_window(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "target": row["target"],
        "service": row["service"],
        "start": row["window_start"].isoformat(),
        "status": row["last_status"] or "no receipt",
        "detail": row["last_detail"] or "",
    }


def _simulators_bill(url: str) -> int | None:
    """Metrics billed by the simulator, all accounts; None where it does not say."""
    try:
        bill = json.loads(get_local(f"{url}/billing", timeout_s=5))
    except (OSError, ValueError):
        return None
    return sum(int(account["metrics_requested"]) for account in bill["accounts"].values())


def _or_unknown(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _print_summary(
    console: Console,
    summary: dict[str, Any],
    verdict: Verdict,
    open_windows: list[dict[str, Any]],
    out: Path,
    holding: Holding | None,
) -> None:
    first = summary["seconds"]["first_point"]
    billed = summary["metrics_billed"]
    console.print(
        f"{summary['windows']['landed']:,} windows landed of {summary['windows']['planned']:,} planned\n"
        f"{verdict.equal:,} of {verdict.expected:,} points equal the truth; missing {verdict.missing:,}, wrong {verdict.wrong:,}, "
        f"invented {verdict.invented:,}\n"
        f"dead letters {summary['dead_letters']}, metrics billed {_or_unknown(billed['ledger'])} (the simulator says {_or_unknown(billed['simulator'])}), "
        f"${summary['dollars'] or 0:.4f}\n"
        f"first point after {first} s, all after {summary['seconds']['all']} s\n"
        f"{out / 'summary.json'}, {out / 'samples.csv'} ({summary['samples']:,} samples)",
        highlight=False,
        soft_wrap=True,
    )
    stretches = _stretches(open_windows)
    for line in stretches[:20]:
        console.print(f"open: {line}", soft_wrap=True, markup=False)
    if len(stretches) > 20:
        console.print(f"… and {len(stretches) - 20} more, all in summary.json")
    if holding is not None:
        console.print(
            f"in Prometheus {holding.samples:,} of them; missing {holding.missing:,}, wrong {holding.wrong:,}",
            highlight=False,
        )
    for example in (*verdict.examples, *(holding.examples if holding else ())):
        console.print(f"differs: {example}", soft_wrap=True, markup=False)
    if summary["ok"]:
        console.print("[bold green]ok[/]: nothing is missing, nothing is wrong")
    else:
        console.print("[bold red]not ok[/]: see above")


# --- to watch ---------------------------------------------------------------------------------------------------


async def watch(stack: LocalStack, out: Path, console: Console) -> None:
    """Show the status, and write the report now and then, until cancelled."""
    config = find_config(stack.config_path)
    reporting = asyncio.create_task(run_report.now_and_then(config, out))
    try:
        with suppress(asyncio.CancelledError):
            await watch_status(console, config, SystemClock(config.run.clock_offset_s), stack)
    finally:
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)


# --- the command ------------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "run",
        help="everything on this machine, against a simulated AWS",
        description="Starts Kafka, PostgreSQL, an S3, a simulated AWS, a coordinator, exporter shards and consumers on this machine, and shows what "
        "they do until Ctrl-C, which stops everything. With --once (and always without a terminal) it collects a fixed stretch of time, compares "
        "what has landed with the simulator's truth, and ends: exit code 0 where nothing is missing and nothing is wrong.",
    )
    parser.add_argument("--once", action="store_true", help="collect the previous hour, verify, end")
    parser.add_argument(
        "--traces", type=Path, metavar="DIR", help="collect a folder of CSV traces instead; implies --once"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".headgate/out"),
        metavar="DIR",
        help="for summary.json and samples.csv",
    )
    parser.add_argument(
        "--shards", type=whole_number, default=3, metavar="N", help="exporter shards (%(default)s)"
    )
    parser.add_argument(
        "--consumers", type=whole_number, default=2, metavar="N", help="consumers (%(default)s)"
    )
    parser.add_argument(
        "--accounts", type=whole_number, default=12, metavar="N", help="simulated accounts (%(default)s)"
    )
    parser.add_argument(
        "--metrics",
        type=whole_number,
        default=200,
        metavar="N",
        help="of each account and region (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of the simulated world (%(default)s)"
    )
    parser.add_argument(
        "--prometheus",
        type=_servers,
        metavar="auto|off|N",
        help="Prometheus servers that take remote write, each its share of the accounts; auto: one, where `prometheus` is on the PATH, or HEADGATE_PROMETHEUS names it. "
        "With a number and --once the exit code is also about what they hold",
    )
    parser.set_defaults(run=run)


def _servers(text: str) -> int | None:
    """A number of Prometheus servers; None: auto."""
    return {"auto": None, "off": 0}[text] if text in ("auto", "off") else whole_number(text)


def run(args: argparse.Namespace) -> int:
    console = Console(soft_wrap=not sys.stdout.isatty())
    once = args.once or args.traces is not None or not console.is_terminal
    scene = (
        traces_scene(args.traces)
        if args.traces is not None
        else made_up_scene(args.accounts, args.metrics, args.seed, once)
    )
    servers: int | None = args.prometheus
    if servers and args.traces is not None:
        print(
            "headgate run: --prometheus: a Prometheus takes no traces, they are of long ago", file=sys.stderr
        )
        return 2
    auto = int(args.traces is None and prometheus_program() is not None)
    prometheus = auto if servers is None else servers
    spec = StackSpec(scene.config, args.shards, args.consumers, scene.simulate_args, prometheus=prometheus)
    return asyncio.run(_run(spec, scene, args.out, once, bool(servers), console))


async def _run(
    spec: StackSpec, scene: Scene, out: Path, once: bool, with_prometheus: bool, console: Console
) -> int:
    out.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 - before anything runs
    stack = LocalStack()
    try:
        await _start(stack, spec, console)
        for url in stack.endpoints.prometheus_urls:
            console.print(f"Prometheus: {url}/ (try: {TRY})", soft_wrap=True, highlight=False)
        console.print(
            f"live page: http://{LOOPBACK}:{stack.metrics_ports['coordinator']}/",
            soft_wrap=True,
            highlight=False,
        )
        if once:
            return await run_once(stack, scene, out, console, with_prometheus=with_prometheus)
        console.print(f"report: {out / 'report.html'}, within a minute", soft_wrap=True, highlight=False)
        await watch(stack, out, console)
        return 0
    finally:
        console.print("stopping …")
        await asyncio.shield(stack.stop())


async def _start(stack: LocalStack, spec: StackSpec, console: Console) -> None:
    started_s = time.monotonic()
    if not console.is_terminal:
        await stack.start(
            spec, lambda name, what: console.print(f"{time.monotonic() - started_s:5.1f} s  {name} {what}")
        )
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[what]}"),
        console=console,
    ) as bar:
        tasks: dict[str, Any] = {}

        def tell(name: str, what: str) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=1, what=what)
            bar.update(tasks[name], completed=1 if what == "ready" else 0, what=what)

        await stack.start(spec, tell)
