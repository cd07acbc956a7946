"""GetMetricData as values: what is asked (`plan`), and what was answered (`Page`, `Answer`). Pure.

Guarantees:

* all series are asked for over the whole range, in calls that AWS accepts;
* pages are merged by Id, in any order; only `Complete` counts as an answer in full, and an Id that is absent is not empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ingest.errors import HeadgateError, Transient
from ingest.sources.aws import Access
from ingest.sources.columns import SeriesTable
from ingest.sources.look import date_ms

QUERIES_PER_CALL_MAX = 500
POINTS_PER_CALL_MAX = 100_800
Points = tuple[list[int], list[float]]
"""Timestamps in s, values."""


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
            "MetricDataQueries": [_query(self.table, self.first, row, self.linked) for row in rows],
            "StartTime": self.start_s,
            "EndTime": self.end_s,
            "ScanBy": "TimestampAscending",
        }


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


@dataclass(frozen=True, slots=True)
class Result:
    """One element of MetricDataResults."""

    id: str
    status: str
    timestamps_s: Sequence[float]
    values: Sequence[float]


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
    """Sends one request and reads one page: the hot path, and the one thing to replace to make it faster."""

    async def __call__(self, access: Access, request: Mapping[str, Any]) -> Page: ...


def page_of(answer: Any) -> Page:
    """A page of aiobotocore's making. Raises Malformed where it is cut off."""
    # botocore 1.43 takes a body that does not parse for an empty answer.
    if not isinstance(answer, dict) or not isinstance(answer.get("MetricDataResults"), list):
        raise Malformed("aws GetMetricData", "an answer without a list of results")
    return Page(
        [
            Result(
                one.get("Id", ""),
                one.get("StatusCode", ""),
                one.get("Timestamps") or (),
                one.get("Values") or (),
            )
            for one in answer["MetricDataResults"]
        ],
        [f"{m.get('Code', '')}: {m.get('Value', '')}" for m in answer.get("Messages") or ()],
        answer.get("NextToken") or "",
        date_ms(answer["ResponseMetadata"]["HTTPHeaders"].get("date")),
    )


def _row_of(result: Result) -> int:
    return int(result.id[1:]) if result.id[:1] == "q" and result.id[1:].isdecimal() else -1


def check(page: Page, asked: Collection[int]) -> Page:
    """The page, whole. Raises Malformed where it contradicts itself or the question: none of it is used then."""
    for result in page.results:
        if _row_of(result) not in asked:
            raise Malformed("aws GetMetricData", f"an answer to Id {result.id!r}, which was not asked")
        if len(result.timestamps_s) != len(result.values):
            raise Malformed("aws GetMetricData", f"Id {result.id} has not as many values as timestamps")
    return page


@dataclass(slots=True)
class Answer:
    """The pages of one call, merged by Id in any order. `failure` says why pages may be missing."""

    asked: frozenset[int]
    observed_at_ms: int = 0
    points: dict[int, Points] = field(default_factory=dict)
    statuses: dict[int, str] = field(default_factory=dict)
    failure: HeadgateError | None = None

    def add(self, page: Page) -> None:
        """Merge one more page, which has been through `check`."""
        for result in page.results:
            row = _row_of(result)
            timestamps_s, values = self.points.setdefault(row, ([], []))
            timestamps_s.extend(map(int, result.timestamps_s))
            values.extend(result.values)
            if self.statuses.get(row) not in (
                "InternalError",
                "Forbidden",
            ):  # a good page does not heal a bad one
                self.statuses[row] = result.status

    def rows(self, status: str) -> list[int]:
        return [row for row in sorted(self.asked) if self.statuses.get(row) == status]
