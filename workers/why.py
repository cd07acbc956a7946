"""`headgate why`: one point's whole way, from the plan to the store, and one sentence that says where it stops and who it is up to.

Reads only. Exit code 0 where the store has the point as the archive does, 1 where not, 2 where the question is about several series.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import asyncpg
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ingest.archive import open_archive
from ingest.clock import Clock, SystemClock, utc
from ingest.errors import HeadgateError
from ingest.model import Series, SeriesKey, split_version
from ingest.sinks.connection import open_connection, translated
from ingest.story import Fault, Story
from ingest.trail import follow
from ingest.validate import describe
from shard_config.model import Config
from workers import local
from workers.arguments import parse_time
from workers.lifecycle import configure_logs
from workers.samples import (
    Filter,
    Labels,
    add_series_filters,
    differences,
    find_series,
    rfc3339,
)

SERIES_MAX = 100
ROWS_SHOWN_MAX = 20
"""Of each stage, the newest."""


class AmbiguousError(HeadgateError):
    """The question is about several series, or about none that can be told."""


# --- which series -------------------------------------------------------------------------------------------------


async def series_asked(connection: asyncpg.Connection, config: Config, wanted: Filter) -> SeriesKey:
    """The one series that is asked about: of the store, else, where nothing of it ever landed, of the configuration.

    Raises AmbiguousError.
    """
    with translated("why"):
        found = await find_series(connection, wanted, SERIES_MAX)
    exact = [one for one in found if _dimensions(one) == tuple(sorted(wanted.dimensions))]
    found = exact if len(exact) == 1 else found
    if len(found) > 1:
        what = "\n".join(differences(found).splitlines()[1:-1])
        raise AmbiguousError("why", f"several series match. They differ in:\n{what}", "narrow the filters")
    if found:
        one = found[0]
        return SeriesKey(
            one.account, one.region, one.namespace, one.metric, _dimensions(one), one.stat, one.period_s
        )
    return _from_configuration(config, wanted)


def _dimensions(labels: Labels) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(json.loads(labels.dimensions).items()))


def _from_configuration(config: Config, wanted: Filter) -> SeriesKey:
    if not (wanted.account and wanted.region and wanted.namespace and wanted.metric):
        remedy = "give --account, --region, --namespace, --metric and each --dim"
        raise AmbiguousError("why", "no series of the store matches", remedy)
    profiles = [p for p in config.services if p.namespace == wanted.namespace]
    jobs = [j for j in config.exposition if j.name == wanted.namespace]
    stats = {
        stat
        for p in profiles
        for stat in (
            p.statistics
            if p.metrics == "all"
            else [s for m in p.metrics if m.name == wanted.metric for s in m.statistics]
        )
    }
    stat = wanted.stat or (min(stats) if len(stats) == 1 else "")
    if not stat and not jobs:
        raise AmbiguousError(
            "why", "no series of the store matches", f"give --stat: {', '.join(sorted(stats))}"
        )
    return SeriesKey(
        wanted.account,
        wanted.region,
        wanted.namespace,
        wanted.metric,
        tuple(sorted(wanted.dimensions)),
        stat or "Average",
        jobs[0].interval_s if jobs else profiles[0].period_s if profiles else 60,
    )


# --- for people and machines --------------------------------------------------------------------------------------


def render(story: Story) -> RenderableType:
    """A table of the stages, and the verdict."""
    table = Table(
        title=f"{describe(Series(story.key))} at {_time(story.at_s)}", title_justify="left", show_lines=False
    )
    table.add_column("stage", style="bold")
    table.add_column("", overflow="fold")
    for stage, lines in _stages(story):
        more = len(lines) - ROWS_SHOWN_MAX
        shown = ([f"… {more} earlier"] if more > 0 else []) + lines[-ROWS_SHOWN_MAX:]
        table.add_row(stage, Text("\n".join(shown) or "—"))
    verdict = story.verdict
    style = "green" if verdict.fault is Fault.NOBODY else "bold red"
    return Group(table, Text(f"{verdict.stage}, {verdict.fault}: {verdict.sentence}", style=style))


def _stages(story: Story) -> Iterable[tuple[str, list[str]]]:
    yield (
        "asks for it",
        [f"{story.target} {story.service}" if story.configured else "nothing in the configuration"],
    )
    if story.paused:
        yield "paused", [story.paused]
    yield (
        "planned",
        [
            f"{p.task_id[:8]} {p.kind} attempt {p.attempt}, tick {_time(p.tick_s)}, planned {rfc3339(p.planned_at)}"
            for p in story.planned
        ],
    )
    window = story.window
    yield (
        "window",
        [
            f"[{_time(window.start_s)}, {_time(window.end_s)}) {window.state}, looks: {window.attempts}"
            + (f": {window.detail}" if window.detail else "")
        ]
        if window
        else [],
    )
    yield (
        "asked",
        [
            f"{a.task_id[:8]} {a.shard} {a.status}, as of {rfc3339(a.observed_at) if a.observed_at else 'never'}, {a.series} series, "
            f"{', '.join(f'{n} {api}' for api, n in a.requests.items()) or 'no requests'}, ${a.usd}"
            + (f": {a.detail}" if a.detail else "")
            for a in story.asked
        ],
    )
    yield (
        "answered",
        [
            f"{a.value!r} as of {_version(a.version)}, batch {a.batch_id[:8]}"
            + (", as published before" if a.held else "")
            for a in story.answered
        ],
    )
    yield "archived", [*dict.fromkeys(a.archive_key for a in story.answered), *story.spoilt]
    yield (
        "offset",
        [
            f"batch {a.batch_id[:8]}: {a.position.topic}/{a.position.partition}@{a.position.offset}"
            if a.position
            else f"batch {a.batch_id[:8]}: not in Kafka (any more)"
            for a in story.answered
        ],
    )
    yield (
        "landed",
        [
            *(
                f"batch {a.batch_id[:8]}: {sink} {rfc3339(t)}"
                for a in story.answered
                for sink, t in a.landed.items()
            ),
            f"the store has {story.stored.value!r} as of {_version(story.stored.version)}"
            if story.stored
            else "the store has no such row",
        ],
    )
    yield (
        "refused",
        [f"batch {a.batch_id[:8]}: {a.value!r}, {a.refused}" for a in story.answered if a.refused],
    )
    yield "revised", [f"{a.value!r} as of {_version(a.version)}, superseded" for a in story.revised]


def _time(at_s: int) -> str:
    return rfc3339(utc(at_s))


def _version(version: int) -> str:
    revision, observed_at_ms = split_version(version)
    return rfc3339(utc(observed_at_ms / 1000)) + (f", revision {revision}" if revision else "")


def to_json(story: Story) -> str:
    """The same for machines; times of points in seconds since the epoch, others in RFC 3339."""
    raw = asdict(story) | {"verdict": asdict(story.verdict)}
    return json.dumps(raw, indent=2, default=lambda v: rfc3339(v) if isinstance(v, datetime) else str(v))


# --- the command --------------------------------------------------------------------------------------------------


async def why(config: Config, clock: Clock, wanted: Filter, at_s: int) -> Story:
    """Find the series and follow its point. Raises AmbiguousError, Transient, Fatal."""
    connection = await open_connection(config.postgres, "headgate why")
    try:
        key = await series_asked(connection, config, wanted)
        async with open_archive(config.s3, clock) as archive:
            return await follow(connection, archive, config, clock, key, at_s)
    finally:
        connection.terminate()


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "why",
        help="one point's whole way, and where it stops",
        description="Follows one point of one series: planned, asked, answered, archived, published, landed, refused, revised; and says in one sentence "
        "where it stops and who it is up to. A series that never landed needs all its labels. Exit code 0 where the store has the point, 1 "
        "where not, 2 where several series match.",
    )
    add_series_filters(parser)
    parser.add_argument(
        "--at",
        dest="at_s",
        type=parse_time,
        required=True,
        metavar="TIME",
        help="as 2026-11-24T05:00:00Z; rounded down to the period",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    configure_logs("why")
    config = local.find_config(args.config)
    wanted = Filter(args.account, args.region, args.namespace, args.metric, tuple(args.dim), args.stat)
    clock = SystemClock(config.run.clock_offset_s)
    try:
        story = asyncio.run(why(config, clock, wanted, int(args.at_s)))
    except AmbiguousError as error:
        print(f"headgate {error}", file=sys.stderr)
        return 2
    if args.json:
        print(to_json(story))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(render(story))
    return 0 if story.verdict.fault is Fault.NOBODY and story.stored is not None else 1
