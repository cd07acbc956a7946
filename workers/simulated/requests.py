"""GetMetricData requests as values, and the errors with which AWS refuses them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from workers.simulated.values import known_statistic
from workers.world import Question

QUERIES_MAX: Final = 500
DATAPOINTS_MAX: Final = 100_800

_ID = re.compile(r"[a-z][A-Za-z0-9_]{0,254}")


class AwsError(Exception):
    """An error answer: AWS's code, the message, the HTTP status, and, for CloudWatch, the code of old query clients."""

    def __init__(self, code: str, message: str, status: int = 400, query_code: str = "") -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status
        self.query_code = query_code


def invalid(message: str) -> AwsError:
    return AwsError("ValidationError", message, query_code="ValidationError")


def unreadable(what: str) -> AwsError:
    return AwsError("SerializationException", what)


def fingerprint_of(request: object) -> str:
    """What tells one request from another: a token belongs to one."""
    return blake2b(repr(request).encode(), digest_size=8).hexdigest()


# --- requests -------------------------------------------------------------------------------------------------


class Query(NamedTuple):
    """One query of a GetMetricData call. A tuple, because a call makes 500."""

    id: str
    label: str
    question: Question
    return_data: bool
    owner: str = ""
    """The account whose metric it is, where that is not the caller's."""


@dataclass(frozen=True, slots=True)
class DataRequest:
    """A GetMetricData call as it was asked."""

    queries: tuple[Query, ...]
    start_s: int
    end_s: int
    descending: bool
    datapoints_max: int
    token: str

    def fingerprint(self) -> str:
        """Over everything but the token: a token belongs to one request."""
        return fingerprint_of(replace(self, token=""))

    def datapoints(self) -> int:
        """What is charged against the datapoints quota: range ÷ period, whatever there is, up to one page's worth."""
        span_s = self.end_s - self.start_s
        estimate = sum(max(1, span_s // q.question.period_s) for q in self.queries)
        return min(estimate, self.datapoints_max)


def parse_data_request(body: Mapping[str, Any]) -> DataRequest:
    """A GetMetricData request's body → what it asks. Raises AwsError, as AWS would refuse it."""
    for name in ("MetricDataQueries", "StartTime", "EndTime"):
        if body.get(name) is None:
            raise AwsError(
                "MissingRequiredParameterException",
                f"The parameter {name} is required.",
                query_code="MissingParameter",
            )
    raw = body["MetricDataQueries"]
    if not isinstance(raw, list):
        raise unreadable("MetricDataQueries is not a list")
    if len(raw) > QUERIES_MAX:
        raise invalid(f"The collection MetricDataQueries must not have a size greater than {QUERIES_MAX}.")
    start_s, end_s = _seconds(body["StartTime"], "StartTime"), _seconds(body["EndTime"], "EndTime")
    if start_s == end_s:
        raise invalid("The parameter StartTime must not equal parameter EndTime.")
    if start_s > end_s:
        raise invalid("The parameter StartTime must be less than the parameter EndTime.")
    try:
        queries = tuple(_query(n, q) for n, q in enumerate(raw, 1))
        datapoints_max = int(body.get("MaxDatapoints") or DATAPOINTS_MAX)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise unreadable(f"the body is not a GetMetricData request: {e!r}") from e
    if len({q.id for q in queries}) < len(queries):
        raise invalid("The values for parameter id in MetricDataQueries are not unique.")
    scan = body.get("ScanBy") or "TimestampDescending"
    if scan not in ("TimestampDescending", "TimestampAscending"):
        raise invalid(f"The value {scan} for parameter ScanBy is not supported.")
    if not 1 <= datapoints_max <= DATAPOINTS_MAX:
        raise invalid(f"The parameter MaxDatapoints must be between 1 and {DATAPOINTS_MAX}.")
    return DataRequest(
        queries=queries,
        start_s=start_s,
        end_s=end_s,
        descending=scan == "TimestampDescending",
        datapoints_max=datapoints_max,
        token=body.get("NextToken") or "",
    )


_PERIODS: Final = frozenset({1, 5, 10, 20, 30})


def _query(number: int, raw: Mapping[str, Any]) -> Query:
    """One of MetricDataQueries. The hottest loop of the simulator: a call has 500, and what is good is looked at once."""
    name, stat = raw.get("Id") or "", raw.get("MetricStat")
    if not isinstance(stat, dict) or "Expression" in raw or not _ID.fullmatch(name):
        raise _refused_query(number, raw)
    metric, period_s, statistic = stat.get("Metric") or {}, stat.get("Period"), stat.get("Stat") or ""
    namespace, metric_name = metric.get("Namespace"), metric.get("MetricName")
    if (
        not isinstance(period_s, int)
        or not (period_s in _PERIODS or (period_s > 0 and period_s % 60 == 0))
        or not known_statistic(statistic)
        or not namespace
        or not metric_name
    ):
        raise _refused_query(number, raw)
    dimensions = [(d["Name"], d["Value"]) for d in metric.get("Dimensions") or ()]
    if len(dimensions) > 1:
        dimensions.sort()
    return Query(
        name,
        raw.get("Label") or metric_name,
        Question(namespace, metric_name, tuple(dimensions), statistic, period_s, stat.get("Unit") or ""),
        raw.get("ReturnData") is not False,
        raw.get("AccountId") or "",
    )


def _refused_query(number: int, raw: Mapping[str, Any]) -> AwsError:
    """What AWS says of a query that `_query` does not take."""
    at = f"MetricDataQueries.member.{number}"
    name, stat = raw.get("Id") or "", raw.get("MetricStat")
    if not _ID.fullmatch(name):
        return invalid(
            f'The value "{name}" for parameter {at}.Id is not matching the expected pattern ^[a-z][a-zA-Z0-9_]*$.'
        )
    if not isinstance(stat, dict) or "Expression" in raw:
        return invalid(
            f"{at}: this simulation knows MetricStat only, no metric math and no Metrics Insights."
        )
    metric, period_s, statistic = stat.get("Metric") or {}, stat.get("Period"), stat.get("Stat") or ""
    if not known_statistic(statistic):
        return invalid(f"The value {statistic} for parameter {at}.MetricStat.Stat is not supported.")
    if not metric.get("Namespace") or not metric.get("MetricName"):
        return invalid(f"The parameters {at}.MetricStat.Metric.Namespace and MetricName are required.")
    return invalid(
        f"The value {period_s} for parameter {at}.MetricStat.Period is not 1, 5, 10, 20, 30 or a multiple of 60."
    )


def _seconds(value: Any, name: str) -> int:
    """A timestamp of any of the protocols (number, tagged number, ISO text) → seconds, rounded down."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float) and 0 <= value < 1 << 38:
            return int(value // 1)
    except ValueError:
        pass
    raise unreadable(f"{name} {value!r} is not a timestamp")
