"""The report for machines: one document, as JSON, and the same as CSV.

Guarantees:

* *One flattening*: `document` makes the report plain; JSON, CSV and the page are all made of what it gives, so a figure has one value and one
  name everywhere, its path (`idle.total.value`, `resources[3].metrics[0].p95.value`).
* What is not known is null in JSON and empty in CSV, with its reason beside it; never 0. Neither NaN nor Infinity is written.
* CSV holds no formulas: text that a spreadsheet would run begins with an apostrophe there.

CSV is in long form, a row a figure (`COLUMNS`), so that it can be filtered and pivoted. A list of numbers is one cell, as JSON.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any, Final, TextIO, overload

import orjson

from ingest.report.model import Figure, Filling, QuotaUse, Report, ResourceKey, ResourceUse

Plain = Any
"""Mappings, lists, text, numbers, booleans, None: as JSON has them."""

_DERIVED: Final[Mapping[type, tuple[str, ...]]] = {
    Figure: ("change", "relative_change"),
    Filling: ("share",),
    QuotaUse: ("share",),
    Report: ("days",),
}
"""Properties that are figures too."""
_FIGURE: Final = (*(f.name for f in fields(Figure)), *_DERIVED[Figure])
_KEY: Final = tuple(f.name for f in fields(ResourceKey))
_LABELS: Final = ("role", "title", "what", "name")
"""What tells the items of a list apart, besides the resource."""

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")

COLUMNS: Final = ("name", "index", *_KEY, "of", *_FIGURE)
"""name: the path without indexes; index: those, by dots; account, region, service, id: whose it is; of: which one of several, as a metric's role;
then the figure."""


class Resources(Sequence[Plain]):
    """The report's resources, each made plain when it is asked for: all of them at once would take more memory than all the rest."""

    def __init__(self, resources: Sequence[ResourceUse]) -> None:
        self._resources = resources

    def __len__(self) -> int:
        return len(self._resources)

    @overload
    def __getitem__(self, index: int) -> Plain: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Plain]: ...
    def __getitem__(self, index: int | slice) -> Plain:
        if isinstance(index, slice):
            return Resources(self._resources[index])
        return _plain(self._resources[index])

    def keys(self) -> list[ResourceKey]:
        """Whose they are, in their order."""
        return [one.key for one in self._resources]


def document(report: Report) -> dict[str, Plain]:
    """The report as plain data: each dataclass a mapping by its fields' names and the figures derived from them; `resources` are `Resources`."""
    found: dict[str, Plain] = _plain(replace(report, resources=()))
    return found | {"resources": Resources(report.resources)}


def _plain(value: Any) -> Plain:
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else None
    if kind is str or kind is int or value is None:
        return value
    if kind is tuple:
        return [_plain(item) for item in value]
    if issubclass(kind, Enum):
        return value.value
    if names := _names(kind):
        return {name: _plain(getattr(value, name)) for name in names}
    return _plain(float(value)) if isinstance(value, float) else value  # numpy's


def _names(kind: type) -> tuple[str, ...]:
    """What a dataclass has of figures; nothing of what is none."""
    found = _NAMES.get(kind)
    if found is None:
        own = fields(kind) if is_dataclass(kind) else ()
        found = _NAMES[kind] = (*(f.name for f in own), *_DERIVED.get(kind, ()))
    return found


_NAMES: dict[type, tuple[str, ...]] = {}
"""Of each type that was met: asking takes longer than the rest."""


def to_json(of: Mapping[str, Plain]) -> Iterator[bytes]:
    """A document as JSON, in pieces: indented, a resource a line."""
    rest = {name: value for name, value in of.items() if name != "resources"}
    yield orjson.dumps(rest, option=orjson.OPT_INDENT_2).removesuffix(b"\n}") + b',\n  "resources": ['
    for index, resource in enumerate(of["resources"]):
        yield (b",\n    " if index else b"\n    ") + orjson.dumps(resource)
    yield b"\n  ]\n}\n"


def write_csv(of: Mapping[str, Plain], out: TextIO) -> None:
    """A document as CSV, COLUMNS first; row by row, so that it takes no memory besides."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([cell(row.get(column)) for column in COLUMNS] for row in rows(of))


def rows(of: Mapping[str, Plain]) -> Iterator[dict[str, Plain]]:
    """Each figure and each word of a document, with COLUMNS as keys (those that it has)."""
    yield from _rows(of, _Place("", "", {}))


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    index: str
    whose: Mapping[str, Plain]
    """Of _KEY and "of"."""

    def into(self, name: str) -> _Place:
        return _Place(f"{self.name}.{name}" if self.name else name, self.index, self.whose)

    def item(self, index: int, value: Plain) -> _Place:
        whose = dict(self.whose)
        if isinstance(value, Mapping):
            at = value.get("key") or value
            whose |= {name: at[name] for name in _KEY if isinstance(at.get(name), str)}
            of = next((value[label] for label in _LABELS if isinstance(value.get(label), str)), None)
            whose |= {"of": of} if of else {}
        return _Place(self.name, f"{self.index}.{index}" if self.index else str(index), whose)

    def row(self, **figure: Plain) -> dict[str, Plain]:
        return {"name": self.name, "index": self.index, **self.whose, **figure}


def _rows(value: Plain, at: _Place) -> Iterator[dict[str, Plain]]:
    if isinstance(value, Mapping):
        if "unit" in value and "value" in value:
            yield at.row(**{name: value[name] for name in _FIGURE if name in value})
            if value.get("limit") is not None:
                yield at.into("limit").row(value=value["limit"], unit=value["unit"])
            return
        for name, inner in value.items():
            yield from _rows(inner, at.into(name))
    elif isinstance(value, list | Resources) and value and isinstance(value[0], Mapping):
        for index, item in enumerate(value):
            yield from _rows(item, at.item(index, item))
    elif isinstance(value, list | Resources):
        yield at.row(value=orjson.dumps(list(value)).decode())
    else:
        yield at.row(value=value)


def cell(value: Plain) -> Plain:
    """A cell of a CSV for people: text from elsewhere is not a spreadsheet's formula (OWASP: CSV injection)."""
    return f"'{value}" if type(value) is str and value.startswith(_FORMULA) else value
