"""The inventory as a CSV file: written by `headgate inventory list --format csv`, read by `headgate inventory import`.

Guarantees:

* a file that is written is read back to the same resources;
* a file is the whole of each account, region and service that it names: what is not in it any more is gone, what it does not name is left alone;
* one bad line refuses the file: all errors are said at once (up to `ERRORS_MAX`), with line and column, and nothing is imported.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TextIO

import orjson

from ingest.clock import rfc3339
from ingest.errors import HeadgateError
from ingest.inventory.model import RESOURCES_MAX, Look, Resource, Role, State, by_scope
from ingest.validate import TIMESTAMP_S_MAX

SOURCE: Final = "csv"
FILE_BYTES_MAX: Final = 512 * 1024 * 1024
ERRORS_MAX: Final = 20

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_WORD: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")


class _Bad(ValueError):
    """What is wrong with a value, in words."""


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise _Bad("is no whole number ≥ 0")
    return int(text)


def _time(text: str) -> int:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise _Bad("is no time as 2026-11-24T05:00:00Z") from None
    if at.tzinfo is None:
        raise _Bad("has no time zone: write 2026-11-24T05:00:00Z")
    # Not by way of UTC: the first hours of year 1 are not in it, and the last of year 9999 neither.
    if not 0 <= (seconds := (at - _EPOCH) // timedelta(seconds=1)) <= TIMESTAMP_S_MAX:
        raise _Bad("is before 1970" if seconds < 0 else "is after 9999")
    return seconds


def _account(text: str) -> str:
    if not re.fullmatch("[0-9]{12}", text):
        raise _Bad("is no account: 12 digits, and no spreadsheet may take them for a number")
    return text


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise _Bad("is no name of small letters, digits, - and _")
    return text


def _state(text: str) -> State:
    if text not in set(State) - {State.TERMINATED}:
        raise _Bad(f"is none of {', '.join(s for s in State if s and s is not State.TERMINATED)}")
    return State(text)


def _role(text: str) -> Role:
    if text not in set(Role):
        raise _Bad(f"is none of {', '.join(r for r in Role if r)}")
    return Role(text)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise _Bad("is neither true nor false")
    return text == "true"


def _tags(text: str) -> Mapping[str, str]:
    try:
        found = orjson.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _Bad('is no JSON object of texts, as {"team": "search"}')
    return found


def _list(text: str) -> tuple[str, ...]:
    return tuple(sorted(text.split()))


_READ: Final[Mapping[str, Callable[[str], Any]]] = {
    "account": _account,
    "region": _word,
    "service": _word,
    "id": str,
    "arn": str,
    "type": str,
    "engine": str,
    "purchase": str,
    "vcpu": _number,
    "memory_bytes": _number,
    "nodes": _number,
    "storage_bytes": _number,
    "storage_max_bytes": _number,
    "iops": _number,
    "throughput_bytes_per_s": _number,
    "read_units": _number,
    "write_units": _number,
    "state": _state,
    "state_since": _time,
    "created": _time,
    "group": str,
    "attached_to": _list,
    "role": _role,
    "multi_az": _flag,
    "tags": _tags,
}
COLUMNS: Final = tuple(_READ)
"""The first four are required; an empty cell, or a column that is left out, is what is not known."""
REQUIRED: Final = COLUMNS[:4]
_FIELDS: Final = {"state_since": "state_since_s", "created": "created_s"}


def write(resources: Iterable[Resource], out: TextIO) -> None:
    """A header, and a line for each."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row(one).values() for one in resources)


def row(resource: Resource) -> dict[str, str]:
    """A resource's cells, by column."""
    return {name: _cell(name, getattr(resource, _FIELDS.get(name, name))) for name in COLUMNS}


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in _FIELDS:
        return rfc3339(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, Mapping):
        return orjson.dumps(dict(value)).decode() if value else ""
    return str(value)


def read(text: str, at_s: int, name: str = "the file") -> list[Look]:
    """The looks that a file is, one for each account, region and service in it. Raises HeadgateError with all that is wrong."""
    errors: list[str] = []
    found: dict[tuple[str, str, str, str], Resource] = {}
    lines: dict[tuple[str, str, str, str], int] = {}
    for line, one in _resources(text, errors):
        key = (one.account, one.region, one.service, one.id)
        if key in found:
            errors.append(f"line {line}: {one.id} stands in line {lines[key]} already")
        found[key], lines[key] = one, line
        if len(found) > RESOURCES_MAX:
            errors.append(f"line {line}: more than {RESOURCES_MAX:,} resources")
            break
    if not errors and not found:
        errors.append(
            "no resource is in it; to forget one, leave it out of a file that has others of its account, region and service"
        )
    if errors:
        raise HeadgateError(name, "nothing was imported:\n  " + "\n  ".join(errors))
    return [Look.whole(scope, SOURCE, at_s, some) for scope, some in by_scope(found.values())]


def _resources(text: str, errors: list[str]) -> Iterator[tuple[int, Resource]]:
    """(line, resource) of each good line; what is wrong goes to `errors`."""
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        header = next(reader, [])
        columns = [cell.strip() for cell in header]
        errors += [
            f"line 1: there is no column {c!r}: there are {', '.join(COLUMNS)}"
            for c in columns
            if c not in _READ
        ]
        errors += [f"line 1: the column {c!r} is missing" for c in REQUIRED if c not in columns]
        errors += [
            f"line 1: the column {c!r} is there twice"
            for c in sorted({c for c in columns if columns.count(c) > 1})
        ]
        if errors:
            return
        for cells in reader:
            if len(errors) >= ERRORS_MAX:
                errors.append("and perhaps more")
                return
            if not any(cells):
                continue
            if len(cells) != len(columns):
                errors.append(
                    f"line {reader.line_num}: {len(cells)} cells, and the header has {len(columns)}"
                )
                continue
            values = _values(dict(zip(columns, cells, strict=True)), reader.line_num, errors)
            if values is not None:
                yield reader.line_num, Resource(**values)
    except csv.Error as error:
        errors.append(f"line {reader.line_num}: {error}")


def _values(cells: Mapping[str, str], line: int, errors: list[str]) -> dict[str, Any] | None:
    values: dict[str, Any] = {}
    wrong = [f"line {line}: {name} is empty" for name in REQUIRED if not cells[name].strip()]
    for name, cell in cells.items():
        if not (cell := cell.strip()):
            continue
        try:
            values[_FIELDS.get(name, name)] = _READ[name](cell)
        except _Bad as bad:
            wrong.append(f"line {line}: {name} {cell[:60]!r} {bad}")
    errors += wrong
    return None if wrong else values
