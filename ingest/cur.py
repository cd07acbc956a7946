"""What AWS billed for CloudWatch's API, out of a Cost and Usage Report: CSV, plain or gzip, with the columns of the old report or of CUR 2.0.

Guarantees:

* *Streamed*: a report has millions of lines; in memory are sums by account and day, and 8 bytes' worth of each CloudWatch line (`LINES_MAX` of them).
* *Nothing is guessed*: a column that is missing, a number that is none, another currency, a negative amount, a line that stands there twice (two versions of one
  report laid together) is an error with file, line and remedy.
* *Usage is usage*: credits, refunds, taxes and discounts carry the amounts of what they are about; only their dollars count.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from hashlib import blake2b
from pathlib import Path
from typing import Final, TextIO

from ingest.errors import HeadgateError

LINES_MAX: Final = 3_000_000
"""Of CloudWatch's API: 1,000 accounts × 4 regions for a month of hours."""
FIELD_CHARS_MAX: Final = 131_072

_GET_METRIC_DATA = re.compile(r"(?:[A-Z0-9]+-)?CW:GMD-Metrics")
_REQUESTS = re.compile(r"(?:[A-Z0-9]+-)?CW:Requests")
_AMOUNT = re.compile(r"-?\d{1,18}(\.\d{1,30})?([eE][+-]?\d{1,2})?")

_COLUMNS: Final = {
    "account": "line_item_usage_account_id",
    "usage_type": "line_item_usage_type",
    "operation": "line_item_operation",
    "amount": "line_item_usage_amount",
    "usd": "line_item_unblended_cost",
    "start": "line_item_usage_start_date",
}
_OPTIONAL: Final = {
    "end": "line_item_usage_end_date",
    "kind": "line_item_line_item_type",
    "currency": "line_item_currency_code",
    "rate": "line_item_unblended_rate",
    "description": "line_item_line_item_description",
    "resource": "line_item_resource_id",
    "invoice": "bill_invoice_id",
}


class BadReport(HeadgateError):
    """The report cannot be read, or is not to be trusted. Nothing of it was used."""


@dataclass(slots=True)
class Billed:
    """What an account was billed for on a UTC day."""

    metrics: Decimal = Decimal()
    metrics_usd: Decimal = Decimal()
    lists: Decimal = Decimal()
    lists_usd: Decimal = Decimal()
    other_requests: Decimal = Decimal()
    """Requests of other operations under the same usage type: none of ours."""


@dataclass(slots=True)
class Bill:
    """A report's sums. `lines` were read, `used` of them are of CloudWatch's API."""

    days: dict[tuple[str, date], Billed] = field(default_factory=dict)
    credits_usd: Decimal = Decimal()
    """Credits, refunds, taxes and discounts on those."""
    lines: int = 0
    used: int = 0
    start: datetime | None = None
    """Of the first usage of CloudWatch's API."""
    end: datetime | None = None
    """Of the last: the bill may say nothing of what came later."""
    _seen: set[int] = field(default_factory=set)


def read(paths: Sequence[Path], from_day: date | None = None, to_day: date | None = None) -> Bill:
    """The sums over all files of a report, of the days [from_day, to_day). Raises BadReport."""
    bill = Bill()
    for path in paths:
        with _opened(path) as file:
            _add(bill, file, str(path), from_day, to_day)
    return bill


def reads(text: Iterable[str], name: str = "report") -> Bill:
    """As `read`, of lines; `name` stands in errors."""
    bill = Bill()
    _add(bill, text, name, None, None)
    return bill


def _snake(column: str) -> str:
    """lineItem/UsageAccountId → line_item_usage_account_id."""
    return (
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", column.strip().lstrip("\ufeff").replace("/", "_"))
        .lower()
        .replace("__", "_")
    )


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open("rb") as raw:
            head = raw.read(4)
        if head == b"PAR1":
            raise BadReport(
                str(path), "is Parquet", "have the report delivered as CSV (text/csv, gzip), or convert it"
            )
        if head[:2] == b"PK":
            raise BadReport(str(path), "is a zip archive", "unpack it, and give the CSV files in it")
        with (
            gzip.open(path, "rt", encoding="utf-8", newline="")
            if head[:2] == b"\x1f\x8b"
            else path.open(encoding="utf-8", newline="") as file
        ):
            yield file
    except OSError as error:
        raise BadReport(str(path), f"cannot be read: {error.strerror or error}") from error


def _add(bill: Bill, text: Iterable[str], name: str, from_day: date | None, to_day: date | None) -> None:
    reader = csv.reader(text, strict=True)
    try:
        columns = _columns(next(reader, []), name)
        width = max(columns.values()) + 1
        for row in reader:
            if not row:
                continue
            if len(row) < width:
                raise BadReport(
                    f"{name}:{reader.line_num}",
                    f"has {len(row)} columns, and needs {width}",
                    "the file is cut off: fetch it again",
                )
            bill.lines += 1
            _line(bill, _Line(row, columns, f"{name}:{reader.line_num}"), from_day, to_day)
    except csv.Error as error:
        raise BadReport(
            f"{name}:{reader.line_num}",
            f"is not CSV: {error}",
            "the file is cut off or damaged: fetch it again",
        ) from error
    except UnicodeDecodeError as error:
        raise BadReport(
            f"{name}:{reader.line_num}", f"is not UTF-8: {error.reason}", "fetch the report again, untouched"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadReport(
            f"{name}:{reader.line_num}", f"gzip: {error}", "the file is cut off or damaged: fetch it again"
        ) from error


def _columns(header: Sequence[str], name: str) -> dict[str, int]:
    names = [_snake(column) for column in header]
    for column in (*_COLUMNS.values(), *_OPTIONAL.values()):
        if names.count(column) > 1:
            raise BadReport(
                f"{name}:1", f"the column {column} stands there twice", "give the report as AWS wrote it"
            )
    missing = [column for column in _COLUMNS.values() if column not in names]
    if missing:
        raise BadReport(
            f"{name}:1",
            f"is no Cost and Usage Report: it has no column {', '.join(missing)}",
            "the columns are those of the old report (lineItem/UsageAccountId …) or of CUR 2.0 (line_item_usage_account_id …)",
        )
    return {key: names.index(column) for key, column in (_COLUMNS | _OPTIONAL).items() if column in names}


@dataclass(slots=True)
class _Line:
    row: list[str]
    columns: dict[str, int]
    where: str

    def text(self, key: str) -> str:
        at = self.columns.get(key)
        return "" if at is None else self.row[at]

    def number(self, key: str) -> Decimal:
        text = self.text(key)
        if not _AMOUNT.fullmatch(text) or not text.isascii():
            raise BadReport(
                self.where,
                f"{text[:40]!r} in {(_COLUMNS | _OPTIONAL)[key]} is no number",
                "fetch the report again, untouched",
            )
        try:
            return Decimal(text)
        except InvalidOperation as error:  # pragma: no cover  # the pattern leaves none
            raise BadReport(self.where, f"{text[:40]!r} is no number") from error

    def time(self, key: str) -> datetime:
        text = self.text(key)
        try:
            found = datetime.fromisoformat(text)
            return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
        except (ValueError, OverflowError) as error:
            raise BadReport(
                self.where,
                f"{text[:40]!r} in {(_COLUMNS | _OPTIONAL)[key]} is no time",
                "times are as 2026-11-24T05:00:00Z",
            ) from error


def _line(bill: Bill, line: _Line, from_day: date | None, to_day: date | None) -> None:
    usage_type = line.text("usage_type")
    gets = usage_type.endswith("CW:GMD-Metrics") and _GET_METRIC_DATA.fullmatch(usage_type)
    if not gets and not (usage_type.endswith("CW:Requests") and _REQUESTS.fullmatch(usage_type)):
        return
    start = line.time("start")
    day = start.date()
    if (from_day is not None and day < from_day) or (to_day is not None and day >= to_day):
        return
    kind = line.text("kind") or "Usage"
    usd = line.number("usd")
    currency = line.text("currency") or "USD"
    if currency != "USD":
        raise BadReport(
            line.where, f"is in {currency[:10]}", "Headgate reckons in US dollars: give a report in USD"
        )
    if kind != "Usage":
        bill.credits_usd += usd
        return
    _once(bill, line, usage_type)
    amount = line.number("amount")
    if amount < 0 or usd < 0:
        raise BadReport(
            line.where,
            f"usage of {amount} for {usd} dollars",
            "usage is not negative: give the report as AWS finalized it, without corrections of your own",
        )
    account = line.text("account")
    if not (len(account) == 12 and account.isascii() and account.isdecimal()):
        raise BadReport(
            line.where,
            f"{account[:40]!r} is no account of 12 digits",
            "a spreadsheet may have eaten its leading zero: give the report as AWS wrote it",
        )
    bill.used += 1
    end = line.time("end") if line.text("end") else start
    bill.start = min(bill.start or start, start)
    bill.end = max(bill.end or end, end)
    billed = bill.days.setdefault((account, day), Billed())
    if gets:
        billed.metrics += amount
        billed.metrics_usd += usd
    elif line.text("operation") == "ListMetrics":
        billed.lists += amount
        billed.lists_usd += usd
    else:
        billed.other_requests += amount


def _once(bill: Bill, line: _Line, usage_type: str) -> None:
    """An hour of an account's usage at one rate is one line. Line item ids do not tell versions apart: AWS makes new ones."""
    what = [
        line.text(k)
        for k in ("account", "operation", "start", "end", "rate", "description", "resource", "invoice")
    ]
    key = int.from_bytes(blake2b("\0".join([usage_type, *what]).encode(), digest_size=8).digest())
    if key in bill._seen:
        raise BadReport(
            line.where,
            "the same usage stands here twice",
            "two versions of the report lie together: give the files of one",
        )
    if len(bill._seen) >= LINES_MAX:
        raise BadReport(
            line.where,
            f"more than {LINES_MAX:,} lines of CloudWatch",
            "narrow it with --from and --to, or take a report by day",
        )
    bill._seen.add(key)
