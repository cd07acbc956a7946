"""GetMetricData as values: what is asked (`plan`), and what was answered (`Page`, `Answer`). Pure.

Guarantees:

* all series are asked for over the whole range, in calls that AWS accepts;
* pages are merged by Id, in any order; only `Complete` counts as an answer in full, and an Id that is absent is not empty;
* an answer has no more points than the request can have, twice over, and a page adds nothing to an Id that was `Complete` before;
* what is asked of a table is written as JSON once, as long as it is among the `BODIES_MAX` most recent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, overload

import orjson

from ingest.errors import HeadgateError, Transient
from ingest.sources.aws import Access, epoch_s
from ingest.sources.columns import SeriesTable
from ingest.sources.look import date_ms

QUERIES_PER_CALL_MAX = 500
POINTS_PER_CALL_MAX = 100_800
BODIES_MAX = 64
"""Bodies of whole calls that are kept, 94 kB each for EC2's metrics: 32,000 series. Making one takes about 1 ms."""
Points = tuple[Sequence[float], Sequence[float]]
"""Timestamps in s, values."""

_ROWS = {f"q{row}": row for row in range(QUERIES_PER_CALL_MAX)}
_MEMBERS = itemgetter("Id", "StatusCode", "Timestamps", "Values")
_ID, _STATUS, _TIMESTAMPS, _VALUES, _POINTS = map(itemgetter, (0, 1, 2, 3, slice(2, 4)))


# --- what is asked --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One GetMetricData call: rows [first, stop) of a table, over [start_s, end_s). Row i of it has the Id `q<i>`.

    `linked`: it is a monitoring account that is asked, and every query names the account that owns the metric.
    """

    table: SeriesTable
    first: int
    stop: int
    start_s: int
    end_s: int
    linked: bool = False

    @property
    def queries(self) -> int:
        return self.stop - self.first

    def points(self, period_s: int) -> int:
        return self.queries * ((self.end_s - self.start_s) // period_s)

    def request(self, rows: Sequence[int]) -> dict[str, Any]:
        """The request for some of its rows, counted from `first`."""
        return {
            "MetricDataQueries": Queries(self.table, self.first, rows, self.linked),
            "StartTime": self.start_s,
            "EndTime": self.end_s,
            "ScanBy": "TimestampAscending",
        }


class Queries(Sequence[dict[str, Any]]):
    """MetricDataQueries of some rows of a table. Each is made when it is looked at, for what is sent is the `body`."""

    __slots__ = ("_first", "_linked", "_rows", "_table")

    def __init__(self, table: SeriesTable, first: int, rows: Sequence[int], linked: bool = False) -> None:
        self._table = table
        self._first = first
        self._rows = rows
        self._linked = linked

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [_query(self._table, self._first, row, self._linked) for row in self._rows[index]]
        return _query(self._table, self._first, self._rows[index], self._linked)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (_query(self._table, self._first, row, self._linked) for row in self._rows)

    def body(self) -> bytes:
        """All of them as a JSON array. That of consecutive rows from 0 on is kept: it is what the next look asks for, too."""
        count = len(self._rows)
        if isinstance(self._rows, range) or list(self._rows) == list(range(count)):
            return _body(self._table, self._first, count, self._linked)
        return orjson.dumps(list(self))


@lru_cache(maxsize=BODIES_MAX)
def _body(table: SeriesTable, first: int, count: int, linked: bool) -> bytes:
    body = orjson.dumps([_query(table, first, row, linked) for row in range(count)])
    return bytes(memoryview(body))  # copied, for what orjson 3.13 returns keeps up to twice its size


def _query(table: SeriesTable, first: int, row: int, linked: bool) -> dict[str, Any]:
    key = table.series[first + row].key
    query: dict[str, Any] = {
        "Id": f"q{row}",
        "MetricStat": {
            "Metric": {
                "Namespace": key.namespace,
                "MetricName": key.metric,
                "Dimensions": [{"Name": name, "Value": value} for name, value in key.dimensions],
            },
            "Period": key.period_s,
            "Stat": key.stat,
        },
    }
    if linked:
        query["AccountId"] = key.account
    return query


def request_body(request: Mapping[str, Any]) -> bytes:
    """A request as JSON."""
    return orjson.dumps(request, default=_prepared)


def _prepared(value: Any) -> orjson.Fragment:
    if isinstance(value, Queries):
        return orjson.Fragment(value.body())
    raise TypeError(f"{type(value).__name__} is not JSON")


def plan(
    tables: Sequence[SeriesTable], start_s: int, end_s: int, period_s: int, linked: bool = False
) -> list[Call]:
    """The calls that ask for all series over [start_s, end_s), widened to whole periods.

    Each has at most 500 queries and 100,800 datapoints (counted as range ÷ period, as AWS does); a range that is too long for
    one series is cut into several.
    """
    start_s, end_s = start_s // period_s * period_s, -(-end_s // period_s) * period_s
    span_s = min(end_s - start_s, POINTS_PER_CALL_MAX * period_s)
    if span_s <= 0:
        return []
    width = min(QUERIES_PER_CALL_MAX, POINTS_PER_CALL_MAX // (span_s // period_s))
    return [
        Call(table, first, min(first + width, len(table)), from_s, min(from_s + span_s, end_s), linked)
        for from_s in range(start_s, end_s, span_s)
        for table in tables
        for first in range(0, len(table), width)
    ]


# --- what is answered -----------------------------------------------------------------------------------------


class Result(NamedTuple):
    """One element of MetricDataResults. A tuple, because a page has 500."""

    id: str
    status: str
    timestamps_s: Sequence[float]
    values: Sequence[float]


_RESULT: Callable[[Iterable[Any]], Result] = partial(tuple.__new__, Result)
"""What `Result._make` does, without a function in Python for each."""


@dataclass(frozen=True, slots=True)
class Page:
    """One answer to GetMetricData. `date_ms` is None where the `Date` header is missing or unreadable."""

    results: Sequence[Result]
    messages: Sequence[str]
    next_token: str
    date_ms: int | None


class Malformed(Transient):
    """AWS answered, and billed, but what came is cut off or contradicts the question: again."""


class GetMetricData(Protocol):
    """Sends one request and reads one page: see `ingest.sources.transport`."""

    async def __call__(self, access: Access, request: Mapping[str, Any]) -> Page: ...


def page_of(answer: Any, date: str | None = None) -> Page:
    """A page of an answer's structure; `date` is the `Date` header. Raises Malformed where the answer is cut off."""
    # A body that does not parse is `{"message": …}`, and one that is no list would be read as an empty answer.
    if not isinstance(answer, dict) or not isinstance(answer.get("MetricDataResults"), list):
        raise Malformed("aws GetMetricData", "an answer without a list of results")
    try:
        results = _results_of(answer["MetricDataResults"])
        messages = [f"{m.get('Code', '')}: {m.get('Value', '')}" for m in answer.get("Messages") or ()]
        _require_numbers(results)
    except (AttributeError, TypeError, ValueError) as error:
        raise Malformed("aws GetMetricData", f"a result that is none: {error}"[:300]) from error
    return Page(results, messages, str(answer.get("NextToken") or ""), date_ms(date))


# Below, loops that run in C: a page has 500 results, and each of these steps in Python costs as much as the network.


def _results_of(raw: list[Any]) -> list[Result]:
    try:
        results = [*map(_RESULT, map(_MEMBERS, raw))]
    except KeyError:
        results = []
    texts = {*map(type, map(_ID, results)), *map(type, map(_STATUS, results))}
    lists = {*map(type, map(_TIMESTAMPS, results)), *map(type, map(_VALUES, results))}
    if len(results) == len(raw) and texts <= {str} and lists <= {list}:
        return results
    return [
        Result(
            str(one.get("Id") or ""),
            str(one.get("StatusCode") or ""),
            one.get("Timestamps") or (),
            one.get("Values") or (),
        )
        for one in raw
    ]


def _require_numbers(results: list[Result]) -> None:
    """Make numbers of `"NaN"`, `"Infinity"` and dates, as botocore does. Raises TypeError or ValueError for what is none."""
    if not _are_numbers(map(_TIMESTAMPS, results)):
        for at, one in enumerate(results):
            results[at] = one._replace(timestamps_s=[*map(epoch_s, one.timestamps_s)])
    if not _are_numbers(map(_VALUES, results)):
        for at, one in enumerate(results):
            results[at] = one._replace(values=[float(value) for value in one.values])


def _are_numbers(columns: Iterable[Iterable[Any]]) -> bool:
    try:
        sum(chain.from_iterable(columns))
    except TypeError:
        return False
    return True


def check(page: Page, asked: frozenset[int]) -> Page:
    """The page, whole. Raises Malformed where it contradicts itself or the question: none of it is used then."""
    results = page.results
    if not asked.issuperset(map(_ROWS.get, map(_ID, results))):
        id_ = next(one.id for one in results if _ROWS.get(one.id) not in asked)
        raise Malformed("aws GetMetricData", f"an answer to Id {id_!r}, which was not asked")
    counts = [*map(len, map(_TIMESTAMPS, results))], [*map(len, map(_VALUES, results))]
    if counts[0] != counts[1]:
        id_ = next(one.id for one in results if len(one.timestamps_s) != len(one.values))
        raise Malformed("aws GetMetricData", f"Id {id_} has not as many values as timestamps")
    return page


@dataclass(slots=True)
class Answer:
    """The pages of one call, merged by Id in any order. `failure` says why pages may be missing.

    `points_max` is what all pages together may have; `size` is what they have.
    """

    asked: frozenset[int]
    points_max: int = 2 * POINTS_PER_CALL_MAX
    size: int = 0
    observed_at_ms: int = 0
    points: dict[int, Points] = field(default_factory=dict)
    statuses: dict[int, str] = field(default_factory=dict)
    failure: HeadgateError | None = None

    def add(self, page: Page) -> None:
        """Merge one more page, which has been through `check`.

        Raises Malformed for a page of points that the pages before, or the request, leave no room for: none of it is used, and what
        of those before it contradicts is no longer Complete.
        """
        points, statuses = self.points, self.statuses
        self.size += sum(map(len, map(_VALUES, page.results)))
        if self.size > self.points_max:
            raise Malformed(
                "aws GetMetricData", f"more than {self.points_max} points, twice what was asked for"
            )
        if not statuses:  # the first page, which is most often the only one
            rows = [*map(_ROWS.__getitem__, map(_ID, page.results))]
            if len({*rows}) == len(rows):
                points.update(zip(rows, map(_POINTS, page.results), strict=True))
                statuses.update(zip(rows, map(_STATUS, page.results), strict=True))
                return
        again = {_ROWS[r.id] for r in page.results if r.values and statuses.get(_ROWS[r.id]) == "Complete"}
        if again:
            statuses.update(dict.fromkeys(again, "Contradicted"))
            raise Malformed("aws GetMetricData", f"Id q{min(again)} has more points after it was Complete")
        for id_, status, timestamps_s, values in page.results:
            row = _ROWS[id_]
            if row in points:
                before_s, before = points[row]
                timestamps_s, values = [*before_s, *timestamps_s], [*before, *values]
            points[row] = timestamps_s, values
            # A good page does not heal a bad one.
            if statuses.get(row) not in ("InternalError", "Forbidden"):
                statuses[row] = status

    def rows(self, status: str) -> list[int]:
        return [row for row in sorted(self.asked) if self.statuses.get(row) == status]
