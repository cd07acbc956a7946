"""`headgate samples`: what has landed, read back. And `export_csv`, everything in one file.

* Values are written by `repr`, so that reading them gives the same float; timestamps are RFC 3339 in UTC.
* CSV of one series is `timestamp,value`; filters that leave several series are refused, since the file would not say which is which.
* Memory is bounded: rows come through a server-side cursor, in the order of time, and labels through a cache.
"""

# ruff: noqa: S608
# What is put into statements are names out of `_FIELDS`, bounds of our own and numbered parameters, never a value.

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import json
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import asyncpg

from ingest.sinks.connection import open_connection, translated
from workers import local
from workers.arguments import parse_time

SERIES_LISTED_MAX = 1_000
VALUES_LISTED_MAX = 10
LABELS_CACHED_MAX = 100_000
ROWS_A_FETCH = 10_000

EXPORT_COLUMNS = ("account", "region", "namespace", "metric", "dims", "stat", "timestamp", "value")

_FIELDS = ("account", "region", "namespace", "metric", "dimensions", "stat")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which samples: labels that must be equal (None: any), dimensions that must be there, [from_s, to_s)."""

    account: str | None = None
    region: str | None = None
    namespace: str | None = None
    metric: str | None = None
    dimensions: tuple[tuple[str, str], ...] = ()
    stat: str | None = None
    from_s: float | None = None
    to_s: float | None = None

    def given(self) -> list[tuple[str, Any]]:
        """The labels that are asked for, from the widest to the narrowest."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return [(name, value) for name, value in values.items() if value]


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """What names a series, as it is shown. Hashed by identity: that is asked for each row."""

    account: str
    region: str
    namespace: str
    metric: str
    dimensions: str
    """Compact JSON, sorted by name."""
    stat: str
    period_s: int

    def __str__(self) -> str:
        dimensions = ", ".join(f"{k}={v}" for k, v in json.loads(self.dimensions).items())
        return f"{self.account} {self.region} {self.namespace} {self.metric}{{{dimensions}}} {self.stat} {self.period_s}s"


def rfc3339(at: datetime) -> str:
    """As 2026-11-24T05:00:00Z, with a fraction only where there is one."""
    return at.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


def parse_dimension(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


# --- reading --------------------------------------------------------------------------------------------------


def _where(given: Iterable[tuple[str, Any]], parameters: list[Any]) -> str:
    """A condition on `series`, whose values are appended to `parameters`."""
    terms = ["true"]
    for name, value in given:
        parameters.append(json.dumps(dict(value)) if name == "dimensions" else value)
        terms.append(
            f"dimensions @> ${len(parameters)}::jsonb"
            if name == "dimensions"
            else f"{name} = ${len(parameters)}"
        )
    return " AND ".join(terms)


_LABELS = "SELECT id, account, region, namespace, metric, dimensions, stat, period_s FROM series"


def _labels(row: asyncpg.Record) -> Labels:
    dimensions = json.dumps(
        json.loads(row["dimensions"]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    account, region, namespace, metric = row[1:5]
    return Labels(account, region, namespace, metric, dimensions, row["stat"], row["period_s"])


async def find_series(connection: asyncpg.Connection, wanted: Filter, at_most: int) -> list[Labels]:
    """Series that match, sorted by their labels."""
    parameters: list[Any] = []
    where = _where(wanted.given(), parameters)
    order = "account, region, namespace, metric, stat, dimensions::text, period_s"
    rows = await connection.fetch(f"{_LABELS} WHERE {where} ORDER BY {order} LIMIT {at_most}", *parameters)
    return [_labels(row) for row in rows]


async def stream(
    connection: asyncpg.Connection, wanted: Filter
) -> AsyncGenerator[list[tuple[Labels, str, float]]]:
    """(labels, timestamp, value) of the samples that match, by time and then by series, in lists of bounded length."""
    parameters: list[Any] = []
    terms = []
    if wanted.given():
        terms.append(f"series IN (SELECT id FROM series WHERE {_where(wanted.given(), parameters)})")
    for bound, operator in ((wanted.from_s, ">="), (wanted.to_s, "<")):
        if bound is not None:
            parameters.append(float(bound))
            terms.append(f"ts {operator} to_timestamp(${len(parameters)}::float8)")
    where = f"WHERE {' AND '.join(terms)}" if terms else ""
    cache: dict[bytes, Labels] = {}
    with translated("samples"):
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            query = f"SELECT series, ts, value FROM samples {where} ORDER BY ts, series"
            cursor = await connection.cursor(query, *parameters)
            while rows := await cursor.fetch(ROWS_A_FETCH):
                missing = list({row[0] for row in rows} - cache.keys())
                if missing:
                    if len(cache) + len(missing) > LABELS_CACHED_MAX:
                        cache.clear()
                        missing = list({row[0] for row in rows})
                    found = await connection.fetch(f"{_LABELS} WHERE id = ANY($1::uuid[])", missing)
                    cache.update((row["id"], _labels(row)) for row in found)
                texts = {ts: rfc3339(ts) for ts in {row[1] for row in rows}}
                yield [(cache[series], texts[ts], value) for series, ts, value in rows]


# --- writing --------------------------------------------------------------------------------------------------


async def export_csv(
    connection: asyncpg.Connection, out_path: Path, from_s: int | None = None, to_s: int | None = None
) -> int:
    """Write all samples in [from_s, to_s) with their labels, columns `EXPORT_COLUMNS`; returns their number.

    The connection is one of `ingest.sinks.connection.open_connection`. Raises Transient where it breaks.
    """
    prefixes: dict[Labels, str] = {}
    count = 0
    batches = stream(connection, Filter(from_s=from_s, to_s=to_s))
    async with aclosing(batches):
        with out_path.open("w", encoding="utf-8", newline="") as file:
            file.write(",".join(EXPORT_COLUMNS) + "\n")
            async for rows in batches:
                if len(prefixes) > LABELS_CACHED_MAX:
                    prefixes.clear()
                lines = []
                for labels, timestamp, value in rows:
                    prefix = prefixes.get(labels)
                    if prefix is None:
                        prefix = prefixes[labels] = _csv_prefix(labels)
                    lines.append(f"{prefix}{timestamp},{value!r}\n")
                file.write("".join(lines))
                count += len(rows)
    return count


def _csv_prefix(labels: Labels) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator=",").writerow([getattr(labels, name) for name in _FIELDS])
    return line.getvalue()


async def show(
    connection: asyncpg.Connection, wanted: Filter, format_: str, out: IO[str], err: IO[str]
) -> int:
    """Write the samples that match to `out`; returns the exit code: 1 where there are none, 2 where CSV would be ambiguous."""
    with translated("samples"):
        series = await find_series(connection, wanted, SERIES_LISTED_MAX)
    if not series:
        err.write(await _nothing_matches(connection, wanted))
        return 1
    if format_ == "csv" and len(series) > 1:
        err.write(differences(series))
        return 2
    begin, one, between, end = _FORMATS[format_]
    count = 0
    async with aclosing(stream(connection, wanted)) as batches:
        async for rows in batches:
            out.write(between if count else begin)
            out.write(between.join(one(*row) for row in rows))
            count += len(rows)
    if not count:
        err.write(await _nothing_then(connection, len(series)))
        return 1
    out.write(end)
    return 0


def _as_json(labels: Labels, timestamp: str, value: float) -> str:
    shown = {name: getattr(labels, name) for name in (*_FIELDS, "period_s")}
    shown["dimensions"] = json.loads(labels.dimensions)
    return json.dumps({**shown, "timestamp": timestamp, "value": value}, ensure_ascii=False)


_FORMATS: dict[str, tuple[str, Callable[[Labels, str, float], str], str, str]] = {
    "csv": ("timestamp,value\n", lambda _, timestamp, value: f"{timestamp},{value!r}", "\n", "\n"),
    "json": ("[\n", _as_json, ",\n", "\n]\n"),
    "table": (
        f"{'timestamp':<20}  {'value':>24}  series\n",
        lambda labels, timestamp, value: f"{timestamp:<20}  {value!r:>24}  {labels}",
        "\n",
        "\n",
    ),
}


def differences(series: Sequence[Labels]) -> str:
    """Which labels tell the series apart, to choose by."""
    number = f"{len(series)} or more" if len(series) >= SERIES_LISTED_MAX else str(len(series))
    lines = [f"{number} series match; CSV holds one. They differ in:"]
    for name in (*_FIELDS, "period_s"):
        values = sorted({str(getattr(one, name)) for one in series})
        if len(values) > 1:
            lines.append(f"  {name}: {_some(values)}")
    return "\n".join([*lines, "Narrow the filters, or take --format json, which shows the labels.", ""])


async def _nothing_matches(connection: asyncpg.Connection, wanted: Filter) -> str:
    """The first label, from the widest, that no series has beside the wider ones; and what there is instead."""
    given = wanted.given()
    for i, (name, value) in enumerate(given):
        parameters: list[Any] = []
        if await connection.fetchval(
            f"SELECT EXISTS (SELECT FROM series WHERE {_where(given[: i + 1], parameters)})", *parameters
        ):
            continue
        parameters = []
        rows = await connection.fetch(
            f"SELECT DISTINCT {name}::text FROM series WHERE {_where(given[:i], parameters)}"
            f" ORDER BY 1 LIMIT {VALUES_LISTED_MAX + 1}",
            *parameters,
        )
        if not rows:
            break
        asked = json.dumps(dict(value)) if name == "dimensions" else value
        beside = "".join(f", {n} {v}" for n, v in given[:i])
        return f"No series has {name} {asked}{beside}. There is: {_some([row[0] for row in rows])}\n"
    return "No series has landed yet. `headgate status` shows how far the collection is.\n"


async def _nothing_then(connection: asyncpg.Connection, series: int) -> str:
    oldest, newest = await connection.fetchrow("SELECT min(ts), max(ts) FROM samples")
    what = f"from {rfc3339(oldest)} to {rfc3339(newest)}" if oldest else "none at all"
    return f"{series} series match, with no sample in that time. The store has samples {what}.\n"


def _some(values: Sequence[str]) -> str:
    more = " …" if len(values) > VALUES_LISTED_MAX else ""
    return ", ".join(values[:VALUES_LISTED_MAX]) + more


# --- the command ----------------------------------------------------------------------------------------------


def add_series_filters(parser: argparse.ArgumentParser) -> None:
    """The options that name series by their labels."""
    for name in ("account", "region", "namespace", "metric", "stat"):
        parser.add_argument(f"--{name}")
    parser.add_argument(
        "--dim", action="append", default=[], type=parse_dimension, metavar="NAME=VALUE", help="repeatable"
    )


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "samples",
        help="read back what has landed",
        description="Writes the samples that have landed, oldest first. Filters are exact and narrow each other; a dimension given"
        " must be there, others may be. CSV is timestamp,value of exactly one series. Exit code 1 where nothing matches, 2 where"
        " CSV would mix several series.",
    )
    add_series_filters(parser)
    parser.add_argument(
        "--from", dest="from_s", type=parse_time, metavar="TIME", help="as 2026-11-24T05:00:00Z"
    )
    parser.add_argument("--to", dest="to_s", type=parse_time, metavar="TIME", help="exclusive")
    parser.add_argument("--format", choices=sorted(_FORMATS), default="table")
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    wanted = Filter(
        args.account,
        args.region,
        args.namespace,
        args.metric,
        tuple(args.dim),
        args.stat,
        args.from_s,
        args.to_s,
    )
    return asyncio.run(_run(args, wanted))


async def _run(args: argparse.Namespace, wanted: Filter) -> int:
    connection = await open_connection(local.find_config(args.config).postgres, "headgate samples")
    try:
        return await show(connection, wanted, args.format, sys.stdout, sys.stderr)
    finally:
        connection.terminate()
