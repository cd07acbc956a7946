"""The report as a page: one HTML file that needs nothing else.

Guarantees:

* *Every figure on the page is in the JSON*: the page is made of `tables.document` alone, and each figure stands in a `<data>` element with the
  path that the document has it under.
* *Text stays text*: jinja2 escapes all that is printed; the Content-Security-Policy lets the file's own script and style run, by their
  hashes, and nothing be loaded from anywhere.
* It is all there without its script, which sorts, filters and folds long tables.
* Its size is bounded: tables show `ROWS_MAX` rows and say how many more the JSON and CSV have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import cache
from typing import Final

import jinja2
from markupsafe import Markup, escape

from ingest.clock import rfc3339, utc
from ingest.inline import source_of
from ingest.report.tables import Plain

ROWS_MAX: Final = 1_000
"""Of a table on the page."""
_DAY_S: Final = 86_400
_AXIS_DAYS: Final = 365.0
"""The right end of the picture of days to full."""
_BINARY: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_HEAT_STEPS: Final = (5, 10, 20, 30, 45, 60, 75, 90)
"""Percent at which the heat map's next colour begins."""


class At:
    """A place in the document: its value, and its path. In templates `row.used.value` is such a place again; it prints its value."""

    __slots__ = ("path", "raw")

    def __init__(self, raw: Plain, path: str = "") -> None:
        self.raw, self.path = raw, path

    def __getitem__(self, name: str | int) -> At:
        if isinstance(name, int):
            return At(self.raw[name], f"{self.path}[{name}]")
        # A name that the document does not have is an error, not an empty cell.
        raw = None if self.raw is None else self.raw[name]
        return At(raw, f"{self.path}.{name}" if self.path else name)

    def __iter__(self) -> Iterator[At]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self.raw or ())

    def __bool__(self) -> bool:
        return bool(self.raw)

    def __str__(self) -> str:
        return "" if self.raw is None else str(self.raw)


# --- numbers for people ---------------------------------------------------------------------------------------------


def words(value: float, unit: str) -> str:
    """A number as people read it, with its unit and no more digits than they need: $1,234, 37.6 %, 431 GiB, 121,400/s."""
    base, _, per = unit.partition("/")
    tail = {"": "", "s": "/s", "min": "/min", "month": " a month", "day": " a day"}.get(per, f"/{per}")
    match base:
        case "usd":
            return f"{'−' if value < 0 else ''}${_digits(abs(value), money=True)}{tail}"
        case "share":
            return f"{_percent(100 * value)} %{tail}"
        case "percent":
            return f"{_percent(value)} %{tail}"
        case "bytes":
            step = min(int(math.log(max(abs(value), 1), 1024) + 1e-9), len(_BINARY) - 1)
            return f"{_digits(value / 1024**step)} {_BINARY[step]}{tail}"
        case "hours":
            return f"{_digits(value)} h{tail}"
        case "days":
            return f"{_digits(value)} day{'' if value == 1 else 's'}{tail}"
        case "count" | "1" | "":
            return f"{_digits(value)}{tail}"
    return f"{_digits(value)} {base}{tail}"


def _digits(value: float, *, money: bool = False) -> str:
    """Three digits or all of the whole ones; cents where they are money."""
    size = abs(value)
    if size >= 1000 or (value == int(value) and not money):
        return f"{value:,.0f}"
    if money:
        return f"{value:,.2f}" if size >= 0.01 or not size else f"{value:.4f}"
    places = 0 if size >= 100 else 1 if size >= 10 else 2
    text = f"{value:.{places}f}" if size >= 0.01 else f"{value:.2g}"
    return (text.rstrip("0").rstrip(".") or "0") if "." in text and "e" not in text else text


def _percent(value: float) -> str:
    """Nothing that is not all is rounded to 100."""
    if 99.95 <= value < 100:
        return "99.9"
    return f"{value:.1f}".removesuffix(".0") if abs(value) < 10 or 90 < value < 100 else f"{value:.0f}"


def number(at: At, unit: str = "") -> Markup:
    """A figure in the document, as a `<data>` element; a dash where it is not known."""
    if at.raw is None:
        return Markup('<span class="none">–</span>')
    return Markup('<data value="{}" data-f="{}">{}</data>').format(at.raw, at.path, words(at.raw, unit))


def figure(at: At) -> Markup:
    """A Figure's value by its own unit; where there is none, why."""
    value = at["value"]
    if value.raw is None:
        return Markup('<span class="none" title="{}">not known</span>').format(at["unknown"].raw or "")
    return number(value, at["unit"].raw)


def change(at: At, brief: bool = False) -> Markup:
    """What a Figure has changed by since the week before: a sign, the difference, and its share. Brief where a heading says what it is."""
    by, relative = at["change"], at["relative_change"]
    if by.raw is None:
        why = "–" if brief else "no week before to compare" if at["value"].raw is not None else ""
        return Markup('<span class="change none">{}</span>').format(why)
    if not by.raw:
        return Markup('<span class="change">= {}</span>').format("" if brief else "as the week before")
    unit = at["unit"].raw
    points = unit in ("share", "percent")
    text = (
        f"{_digits(abs(by.raw) * (100 if unit == 'share' else 1))} points"
        if points
        else words(abs(by.raw), unit)
    )
    share = "" if relative.raw is None or points else f" ({100 * relative.raw:+.0f} %)".replace("-", "−")
    return Markup('<span class="change">{} <data value="{}" data-f="{}">{}</data>{}</span>').format(
        "▲" if by.raw > 0 else "▼", by.raw, by.path, text, share
    )


def date(at: At) -> Markup:
    """A time in seconds as its UTC date."""
    if at.raw is None:
        return Markup('<span class="none">–</span>')
    return Markup('<data value="{}" data-f="{}">{}</data>').format(at.raw, at.path, f"{utc(at.raw):%Y-%m-%d}")


def lasts(at: At) -> Markup:
    """A length in seconds: 40 s, 12 min, 5 h, 3 days."""
    if at.raw is None:
        return Markup('<span class="none">–</span>')
    size, name = next(
        ((s, n) for s, n in ((2 * _DAY_S, "days"), (7200, "h"), (120, "min")) if at.raw >= s), (1, "s")
    )
    step = {"days": _DAY_S, "h": 3600, "min": 60, "s": 1}[name] if size else 1
    return Markup('<data value="{}" data-f="{}">{}</data>').format(
        at.raw, at.path, f"{at.raw / step:,.0f} {name}"
    )


def spoken(text: At | str) -> Markup:
    """A sentence; what stands in backquotes is a command."""
    parts = str(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part)
        for index, part in enumerate(parts)
    )


# --- pictures ---------------------------------------------------------------------------------------------------------


def spark(values: Sequence[float | None], width: float = 100, height: float = 24) -> list[str]:
    """The lines of a sparkline from 0 to its greatest value: `points` of polylines, broken where there are no samples."""
    known = [v for v in values if v is not None]
    top = max(known, default=0.0) or 1.0
    step = width / max(len(values) - 1, 1)
    lines: list[list[str]] = [[]]
    for index, value in enumerate(values):
        if value is None:
            lines.append([])
        else:
            y = height - 1 - (height - 2) * max(value, 0) / top
            lines[-1].append(f"{index * step:.1f},{y:.1f}")
    # A point alone is drawn as a short stroke.
    return [" ".join(line if len(line) > 1 else [line[0], line[0]]) for line in lines if line]


def heat_step(percent: float | None) -> int:
    """Which of the heat map's colours: 0 the least; −1 for no samples."""
    return -1 if percent is None else sum(percent >= step for step in _HEAT_STEPS)


def on_axis(days: float | None, width: float = 100) -> float:
    """Where so many days lie on the picture's axis: logarithmic, so that next week is as wide as next year. None is beyond its end."""
    if days is None:
        return width
    return width * min(math.log1p(max(days, 0)) / math.log1p(_AXIS_DAYS), 1.0)


def top(at: At, most: int = ROWS_MAX) -> list[At]:
    """The first so many of a list."""
    return [at[index] for index in range(min(len(at), most))]


# --- the page ---------------------------------------------------------------------------------------------------------


def anchors(of: Mapping[str, Plain]) -> dict[tuple[str, ...], int]:
    """Which resources the page shows, and under which number: first those that something is said of, then as the report has them."""
    said = [r["key"] for part in ("idle", "oversized") for r in of[part]["findings"][:ROWS_MAX]]
    said += [r["key"] for r in of["filling"]["fillings"][:20]]
    there = {astuple(key): index for index, key in enumerate(of["resources"].keys())}
    order = dict.fromkeys([*(_id(key) for key in said if _id(key) in there), *there])
    return {key: there[key] for key in list(order)[:ROWS_MAX]}


def _id(key: Mapping[str, str]) -> tuple[str, ...]:
    return key["account"], key["region"], key["service"], key["id"]


def page(of: Mapping[str, Plain]) -> str:
    """The page of a document (`tables.document`)."""
    shown = anchors(of)

    def anchor(key: At) -> int | None:
        return shown.get(_id(key.raw))

    doc = At(of)
    resources = [(index, doc["resources"][index]) for index in shown.values()]
    return _environment().get_template("page.html").render(
        doc=doc, anchor=anchor, resources=resources, rows_max=ROWS_MAX,
        aliases={a["account"]: a["alias"] for a in of["coverage"] if a["alias"]},
    )  # fmt: skip


@cache
def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("ingest.report", "."),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    source, _, _ = found.loader.get_source(found, "page.html") if found.loader else ("", None, None)
    found.globals |= {
        "policy": policy(source),
        "rfc3339": rfc3339,
        "utc": utc,
        "top": top,
        "at_days": on_axis,
    }
    found.filters |= {
        "number": number, "figure": figure, "change": change, "date": date, "lasts": lasts, "words": spoken,
        "spark": lambda at: spark(at.raw), "heat": lambda at: heat_step(at.raw), "axis": lambda at: on_axis(at.raw),
    }  # fmt: skip
    return found


def policy(source: str) -> str:
    """The Content-Security-Policy of a file whose one script and one style nothing is put into."""
    script, style = (source_of(source, tag) for tag in ("script", "style"))
    return f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none'"
