"""A comparison for people (tables) and for machines (JSON, CSV files)."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console
from rich.table import Table

from ingest.clock import rfc3339
from ingest.compare.lines import Verdict
from ingest.compare.report import DAYS_A_MONTH, Bill, Report
from ingest.compare.state import State
from ingest.report.tables import cell

FORMS: Final = ("table", "json", "csv")
ROWS_MAX: Final = 30
"""Lines of each table; JSON and CSV have all."""
EXAMPLES_SHOWN: Final = 10

SERIES_COLUMNS: Final = ("side", "account", "region", "service", "name", "series")

_SIDES: Final = """SELECT 'missing', account, region, '', name, labels FROM theirs WHERE NOT EXISTS (SELECT 1 FROM ours WHERE ours.key = theirs.key)
UNION ALL SELECT 'extra', account, region, service, name, said FROM ours
    WHERE live = 1 AND NOT EXISTS (SELECT 1 FROM theirs WHERE theirs.key = ours.key)"""


def summary(state: State, until_s: int, now_s: int) -> str:
    """One line, while it runs."""
    verdicts = dict(state.rows("SELECT verdict, sum(n) FROM verdicts GROUP BY verdict"))
    waiting = state.one("SELECT count(*) FROM pending")
    theirs, both = (
        state.one("SELECT count(*) FROM theirs"),
        state.one("SELECT count(*) FROM theirs JOIN ours USING (key)"),
    )
    said = (
        ", ".join(f"{n:,} {verdict.replace('_', ' ')}" for verdict, n in sorted(verdicts.items()))
        or "none judged yet"
    )
    return f"{rfc3339(now_s)} until {rfc3339(until_s)}: {theirs:,} series at YACE, {both:,} of them here; values: {said}; {waiting:,} waiting"


# --- for people -----------------------------------------------------------------------------------------------


def write(report: Report, state: State, form: str, console: Console) -> None:
    """To standard output."""
    if form == "json":
        sys.stdout.write(to_json(report) + "\n")
    elif form == "csv":
        _series(state, sys.stdout)
    else:
        for part in render(report):
            console.print(part, highlight=False)


def render(report: Report) -> Iterator[Any]:
    """Tables and sentences, in the order in which they are shown."""
    yield (
        f"{rfc3339(report.from_s)} to {rfc3339(report.to_s)}: {report.scrapes:,} scrapes; {report.theirs:,} series at YACE, {report.ours:,} here, "
        f"{report.both:,} on both sides"
        + (f"; {report.infos:,} aws_*_info, which remote write makes itself" if report.infos else "")
    )
    for problem in report.failed:
        yield f"failed: {problem}"
    for title, groups in (
        ("series that YACE has and we have not", report.missing),
        ("series that we have and YACE has not", report.extra),
    ):
        if groups:
            yield _table(
                f"{sum(g.series for g in groups):,} {title}",
                ("account", "region", "service", "series", "likely reason", "such as"),
                [(g.account, g.region, g.service, f"{g.series:,}", g.reason, g.examples[0]) for g in groups],
            )
    if report.labels:
        yield _table(
            "labels that differ",
            ("label", "account", "service", "series", "at YACE", "here", "such as"),
            [
                (g.label, g.account, g.service, f"{g.series:,}", g.theirs, g.ours, g.example)
                for g in report.labels
            ],
        )
    yield from _values(report)
    yield from bills(report)
    yield "nothing is missing or wrong here" if report.ok else "something is missing or wrong here: see above"


def _values(report: Report) -> Iterator[Any]:
    shown = [v for v in Verdict if report.verdict(v)]
    if shown:
        yield _table(
            "values",
            ("account", "region", "service", *(v.replace("_", " ") for v in shown), "age when scraped"),
            [
                (
                    v.account,
                    v.region,
                    v.service,
                    *(f"{v.verdicts.get(w, 0):,}" for w in shown),
                    f"{v.lag_s:,} s",
                )
                for v in report.values
            ],
        )
    if report.unsettled:
        yield f"{report.unsettled:,} values have not settled yet: the same command judges them later"
    if report.examples:
        yield _table(
            "values that are not equal",
            ("verdict", "series", "scraped", "point", "at YACE", "here", "here as of", ""),
            [
                (
                    e.verdict.replace("_", " "),
                    e.series,
                    rfc3339(e.scraped_s),
                    _time(e.timestamp_s or e.ours_timestamp_s),
                    _number(e.theirs),
                    _number(e.ours),
                    _time(e.observed_s),
                    e.note,
                )
                for e in report.examples[:EXAMPLES_SHOWN]
            ],
            len(report.examples),
        )


def bills(report: Report) -> Iterator[Any]:
    """What CloudWatch billed both, and who is the cheaper."""
    elapsed_s = report.to_s - report.from_s
    if not report.bills or not elapsed_s:
        yield "bills: one look has none; --for compares them over a time"
        return
    rows = []
    for side, bill in report.bills.items():
        each, once = bill.per_day(elapsed_s)
        month = (each * DAYS_A_MONTH, once * DAYS_A_MONTH)
        by_series = [usd * 1000 / bill.series for usd in month] if bill.series else ()
        usd = (
            " / ".join(map(_usd, pair))
            for pair in ((bill.each_usd, bill.once_usd), (each, once), month, by_series)
        )
        rows.append((side, f"{bill.series:,}", f"{bill.metrics:,}", f"{bill.lists:,}", *usd))
    yield _table(
        "CloudWatch's bill: each statistic counted / up to five of a metric counted once; no request free",
        (
            "",
            "series",
            "metrics requested",
            "requests",
            "in this time",
            "a day",
            "a month",
            "a month and 1,000 series",
        ),
        rows,
    )
    yield verdict_on_bills(report.bills["yace"], report.bills["headgate"], elapsed_s)


def verdict_on_bills(yace: Bill, ours: Bill, elapsed_s: float) -> str:
    """Who is cheaper, by either reading, in a sentence."""
    said = []
    for reading, theirs, mine in zip(
        ("each statistic counted", "statistics counted once"),
        yace.per_day(elapsed_s),
        ours.per_day(elapsed_s),
        strict=True,
    ):
        cheaper, by = ("Headgate", theirs - mine) if mine <= theirs else ("YACE", mine - theirs)
        share = f" ({by / max(theirs, mine):.0%})" if by else ""
        said.append(
            f"{reading}, {cheaper} is cheaper by {_usd(by * DAYS_A_MONTH)} a month{share}"
            if by
            else f"{reading}, both cost the same"
        )
    if yace.series and ours.series and yace.series != ours.series:
        cheaper = "Headgate" if ours.each_usd * yace.series <= yace.each_usd * ours.series else "YACE"
        said.append(f"a series costs less with {cheaper}")
    rough = "" if elapsed_s >= 6 * 3600 else "; from less than six hours, so roughly"
    return f"{'; '.join(said)}{rough}. Kafka, PostgreSQL and S3 are not in it: headgate quote has them"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], of: int = 0) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows[:ROWS_MAX]:
        table.add_row(*row)
    if (whole := max(of, len(rows))) > min(len(rows), ROWS_MAX):
        table.caption = f"and {whole - min(len(rows), ROWS_MAX):,} more: see --format json and --csv-dir"
    return table


def _time(seconds: float | None) -> str:
    return "" if seconds is None else rfc3339(seconds)


def _number(value: float | None) -> str:
    return "none" if value is None else repr(value)


def _usd(usd: Decimal) -> str:
    return f"${usd:,.2f}" if usd >= 100 else f"${usd:,.4f}"


# --- for machines ---------------------------------------------------------------------------------------------


def to_json(report: Report) -> str:
    """Everything; times in seconds since the epoch, dollars as text, so that they stay exact."""
    elapsed_s = max(1, report.to_s - report.from_s)
    days = {side: [f"{usd:f}" for usd in bill.per_day(elapsed_s)] for side, bill in report.bills.items()}
    raw = asdict(report) | {"ok": report.ok, "usd_per_day_each_and_once": days}
    return json.dumps(raw, indent=2, default=lambda v: f"{v:f}" if isinstance(v, Decimal) else str(v))


def write_lists(state: State, report: Report, folder: Path) -> None:
    """series.csv, labels.csv, values.csv and examples.csv. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "series.csv").open("w", newline="") as file:
        _series(state, file)
    for name, rows in (("labels", report.labels), ("examples", report.examples)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            _rows(file, [asdict(row) for row in rows])
    with (folder / "values.csv").open("w", newline="") as file:
        columns = [str(v) for v in Verdict]
        values = [
            {"account": v.account, "region": v.region, "service": v.service}
            | {c: v.verdicts.get(c, 0) for c in columns}
            for v in report.values
        ]
        _rows(file, values)


def _series(state: State, file: IO[str]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(SERIES_COLUMNS)
    writer.writerows([cell(value) for value in row] for row in state.rows(_SIDES))


def _rows(file: IO[str], rows: Iterable[dict[str, Any]]) -> None:
    some = list(rows)
    if some:
        writer = csv.DictWriter(file, list(some[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in some)
