"""What YACE exposes, held against what the store has: lines, identities and verdicts. Pure.

Guarantees:

* a line is read to the same float that YACE printed; one that is not of the format is Rejected, never passed over;
* a series is the same one on both sides where metric name, account, region and dimensions are (`key_of`): what else differs is a difference
  of labels, not a series that is missing;
* values are compared as floats, exactly. A difference is `revised` only where our value came after YACE's was exposed, `wrong` only where we had it
  before YACE can have read, and never saw it change; between the two it is `unclear`, until the archive is asked.

Without a timestamp of CloudWatch's YACE shows the newest point that its scrape found, and does not say which. It is looked for among ours: series
that fit one time only tell the time of their scrape and metric (`expected_s`), and that is the point that the others have to be.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from itertools import combinations
from typing import Final

from ingest.errors import Rejected
from shard_config.series_names import dimension_label, metric_name

_LINE: Final = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+(-?\d+))?\s*", re.ASCII)
_LABEL: Final = re.compile(r'\s*([a-zA-Z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)', re.ASCII)
_ESCAPED: Final = re.compile(r"\\(.)")
_UNESCAPED: Final = {"n": "\n"}
DIMENSION: Final = "dimension_"
INFO: Final = "_info"

Labels = dict[str, str]


@dataclass(frozen=True, slots=True)
class Line:
    """One sample. `labels` are those that say something; `timestamp_s` is CloudWatch's, None where YACE leaves it out."""

    name: str
    labels: Labels
    value: float
    timestamp_s: int | None

    @property
    def account(self) -> str:
        return self.labels.get("account_id", "")

    @property
    def region(self) -> str:
        return self.labels.get("region", "")

    @property
    def is_own(self) -> bool:
        """Whether it is about YACE itself."""
        return not self.name.startswith("aws")

    @property
    def is_info(self) -> bool:
        """Whether it is a resource's tags, and no metric."""
        return self.name.endswith(INFO) and not any(label.startswith(DIMENSION) for label in self.labels)


def read_line(text: str) -> Line | None:
    """A line of the text format; None for a comment or an empty one. Raises Rejected (bad_exposition).

    Five times as fast as prometheus_client's parser, which is what half a million lines each few minutes need.
    """
    if not text or text[0] == "#" or text.isspace():
        return None
    found = _LINE.fullmatch(text)
    if found is None:
        raise Rejected("exposition", "bad_exposition", f"not a sample: {text[:100]!r}")
    name, inside, value, timestamp = found.groups()
    labels = _labels(inside) if inside else {}
    try:
        number = float(value)
    except ValueError:
        raise Rejected("exposition", "bad_exposition", f"not a number: {value[:100]!r}") from None
    return Line(name, labels, number, int(timestamp) // 1000 if timestamp else None)


def _labels(inside: str) -> Labels:
    pairs = _LABEL.findall(inside)
    # What the pattern passed over between pairs would be lost in silence: so lengths have to add up, spaces and commas aside.
    if sum(len(k) + len(v) + 3 for k, v in pairs) + max(0, len(pairs) - 1) != len(inside):
        _check(inside)
    # YACE pads the series of a name to the same labels: those say nothing.
    if "\\" in inside:
        return {k: _ESCAPED.sub(_unescape, v) for k, v in pairs if v}
    return {k: v for k, v in pairs if v}


def _check(inside: str) -> None:
    at = 0
    while at < len(inside):
        pair = _LABEL.match(inside, at)
        if pair is None:
            raise Rejected("exposition", "bad_exposition", f"not labels: {inside[at : at + 100]!r}")
        at = pair.end()


def _unescape(found: re.Match[str]) -> str:
    return _UNESCAPED.get(found[1], found[1])


# --- identity -------------------------------------------------------------------------------------------------


def key_of(name: str, account: str, region: str, dimensions: Iterable[tuple[str, str]]) -> int:
    """64 bits, signed, that name a series on both sides. `dimensions` are labels as exposed, in any order."""
    said = "\0".join((name, account, region, *(f"{k}\0{v}" for k, v in sorted(dimensions))))
    return int.from_bytes(
        blake2b(said.encode("utf-8", "replace"), digest_size=8).digest(), "big", signed=True
    )


def key_of_line(line: Line) -> int:
    """The identity of YACE's series."""
    dimensions = [(k, v) for k, v in line.labels.items() if k.startswith(DIMENSION)]
    return key_of(line.name, line.account, line.region, dimensions)


def key_of_series(
    account: str,
    region: str,
    namespace: str,
    metric: str,
    dimensions: Iterable[tuple[str, str]],
    stat: str,
    snake_case: bool,
) -> tuple[int, str]:
    """The identity of a series of ours, and the name that YACE has for its metric."""
    name = metric_name("yace", namespace, metric, stat)
    named = ((dimension_label("yace", k, snake_case), v) for k, v in dimensions)
    return key_of(name, account, region, ((k, v) for k, v in named if k and v)), name


# --- values ---------------------------------------------------------------------------------------------------


class Verdict(StrEnum):
    """What became of one value of YACE's, or of one that it has not."""

    EQUAL = "equal"
    REVISED = "revised"
    """Ours is another, and is newer: YACE's was not finished when it was read, or CloudWatch revised it."""
    UNCLEAR = "unclear"
    """Ours is another, and came while YACE's was exposed: before it was read, or after."""
    WRONG = "wrong"
    """Ours is another, was there before YACE read, and was not seen to change since."""
    GAP_HERE = "gap_here"
    """YACE has a point that the store has not."""
    GAP_THERE = "gap_there"
    """The store has the point that YACE's scrape ought to show, and YACE has none: late, throttled or lost."""
    ZERO = "zero"
    """YACE shows 0 where the store has no point: its nilToZero."""
    UNSETTLED = "unsettled"
    """Not the same yet, and its time to settle is not over."""
    OTHER_PERIOD = "other_period"
    """YACE asks for a longer period: its value is what ours add up to, or its metric is known to be so."""
    NEITHER = "neither"
    """No point on either side."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a scrape at `at_s` showed of a series; `value` is NaN where it showed none, `timestamp_s` None where it does not say of when."""

    key: int
    at_s: int
    timestamp_s: int | None
    value: float


@dataclass(frozen=True, slots=True)
class Point:
    """One of ours. `observed_s`: CloudWatch's clock at the look that first saw this value."""

    timestamp_s: int
    value: float
    observed_s: float


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict, and the point of ours that it is about, where there is one."""

    shown: Shown
    verdict: Verdict
    ours: Point | None


def expected_s(group: Sequence[Shown], ours: Mapping[int, Sequence[Point]]) -> int | None:
    """The time of the point that the series of one scrape and metric show, where they do not say: the one that fits most of those that fit but one.

    Of two the newer; None where nothing fits once only.
    """
    votes: Counter[int] = Counter()
    for shown in group:
        fits = {p.timestamp_s for p in ours.get(shown.key, ()) if p.value == shown.value}
        if len(fits) == 1:
            votes[fits.pop()] += 1
    return max(votes, key=lambda t: (votes[t], t)) if votes else None


def judge(group: Sequence[Shown], ours: Mapping[int, Sequence[Point]], period_s: int) -> list[Judged]:
    """The verdicts of what one scrape showed of one metric of a target, in order. `ours` are the points that may be meant, by series, oldest first."""
    times = [s.timestamp_s for s in group if s.timestamp_s is not None and not math.isnan(s.value)]
    newest_s = max(times) if times else expected_s(group, ours)
    # YACE cannot have read before the end of the newest point that it shows.
    read_s = -math.inf if newest_s is None else newest_s + period_s
    return [_judged(shown, ours.get(shown.key, ()), newest_s, read_s) for shown in group]


def _judged(shown: Shown, ours: Sequence[Point], newest_s: int | None, read_s: float) -> Judged:
    at_s = newest_s if shown.timestamp_s is None else shown.timestamp_s
    there = next((p for p in ours if p.timestamp_s == at_s), None)
    if math.isnan(shown.value):
        return Judged(shown, Verdict.NEITHER if there is None else Verdict.GAP_THERE, there)
    if shown.timestamp_s is None:
        if same := [p for p in ours if p.value == shown.value]:
            near_s = shown.at_s if at_s is None else at_s
            return Judged(shown, Verdict.EQUAL, min(same, key=lambda p: abs(p.timestamp_s - near_s)))
        if shown.value == 0 and there is None:
            return Judged(shown, Verdict.ZERO, None)
        if at_s is None:
            there = ours[-1] if ours else None
    if there is None:
        return Judged(shown, Verdict.GAP_HERE, None)
    if there.value == shown.value:
        return Judged(shown, Verdict.EQUAL, there)
    if there.observed_s > shown.at_s:
        return Judged(shown, Verdict.REVISED, there)
    return Judged(shown, Verdict.WRONG if there.observed_s <= read_s else Verdict.UNCLEAR, there)


# --- another period -------------------------------------------------------------------------------------------

PERIODS_S: Final = (300, 900, 3600)
"""Longer periods that YACE may ask for: 300 s is its default."""


def longer_periods(period_s: int) -> tuple[int, ...]:
    """Those that points of ours add up to."""
    return tuple(p for p in PERIODS_S if p > period_s and p % period_s == 0)


SUBSETS_OF: Final = 6
"""Of so many points every combination is tried, of more only the first ones."""


def adds_up(value: float, stat: str, points: Sequence[Point]) -> bool:
    """Whether the points of a longer period come to this value, or some of them do: YACE reads before the late ones are there.

    Two at least; of an average only where each had as many samples.
    """
    values = [p.value for p in points]
    numbers = range(2, len(values) + 1)
    if len(values) <= SUBSETS_OF:
        return any(_folds(value, stat, some) for n in numbers for some in combinations(values, n))
    return any(_folds(value, stat, values[:n]) for n in numbers)


def _folds(value: float, stat: str, values: Sequence[float]) -> bool:
    match stat:
        case "Maximum":
            return value == max(values)
        case "Minimum":
            return value == min(values)
        case "Sum" | "SampleCount":
            return math.isclose(value, math.fsum(values), rel_tol=1e-12)
        case "Average":
            return math.isclose(value, math.fsum(values) / len(values), rel_tol=1e-12)
    return False


def may_be_chance(value: float, stat: str) -> bool:
    """Whether one value that adds up proves little: a maximum is some point's anyway, and small whole numbers often add up."""
    return stat in ("Maximum", "Minimum") or (value.is_integer() and abs(value) < 1e6)
