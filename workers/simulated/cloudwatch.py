"""What a CloudWatch answers about a truth: the rules of ListMetrics and GetMetricData, pure.

The rules are AWS's, as far as they are known: at most 500 queries and 100,800 points a call, paging by NextToken,
retention by age, the errors' codes. A page series is answered as of the time of its first page, which the token
carries, so that its pages are one look.

No network, no clock, no faults: those are `simulator`'s.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from workers.simulated.requests import (
    AwsError,
    DataRequest,
    fingerprint_of,
    invalid,
    unreadable,
)
from workers.simulated.values import Answer
from workers.world import EMPTY, Metric, Truth

LIST_PAGE: Final = 500
DAY_S: Final = 86_400
KEPT_S: Final = 455 * DAY_S
"""Points older than this are gone at any resolution."""

# --- tokens ---------------------------------------------------------------------------------------------------


def _invalid_token() -> AwsError:
    return AwsError("InvalidNextToken", "Request token is invalid", query_code="InvalidNextToken")


def _token(as_of_s: int, index: int, skip: int, fingerprint: str) -> str:
    """Where a page series goes on: item `index`, after `skip` of its points; all as of `as_of_s`."""
    return base64.urlsafe_b64encode(orjson.dumps([as_of_s, index, skip, fingerprint])).decode()


def _resume(token: str, fingerprint: str) -> tuple[int, int, int]:
    try:
        as_of_s, index, skip, of = orjson.loads(base64.urlsafe_b64decode(token))
        if of != fingerprint:
            raise _invalid_token()
        return int(as_of_s), int(index), int(skip)
    except (ValueError, TypeError) as e:
        raise _invalid_token() from e


# --- answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Page:
    """One page of an answer: MetricDataResults or Metrics, in the shape of the wire.

    `next_token` leads to the next page and `this_token` back to this one; both are empty where no page follows. `owners` stand beside
    Metrics where linked accounts were asked for.
    """

    items: list[dict[str, Any]]
    next_token: str = ""
    this_token: str = ""
    owners: list[str] | None = None
    messages: list[dict[str, str]] | None = None


def get_metric_data(
    truth: Truth, account: str, region: str, request: DataRequest, now_s: int, linked: Collection[str] = ()
) -> Page:
    """One page of GetMetricData, as a CloudWatch would give it at `now_s`; `linked` are accounts that `account` monitors.

    A query for an account that is not linked is Forbidden. Points fill a page query by query; a query that does not fit is PartialData and goes on in the next page, and the queries after it
    are absent from this one. Raises AwsError where the token is none of this request's.
    """
    as_of_s, first, skip = now_s, 0, 0
    if request.token:
        as_of_s, first, skip = _resume(request.token, request.fingerprint())
    items: list[dict[str, Any]] = []
    room = request.datapoints_max
    for index, (times_s, values) in _answered(truth, account, region, request, first, as_of_s):
        query = request.queries[index]
        if query.owner not in ("", account) and query.owner not in linked:
            items.append(
                {
                    "Id": query.id,
                    "Label": query.label,
                    "Timestamps": [],
                    "Values": [],
                    "StatusCode": "Forbidden",
                }
            )
            continue
        if request.descending:
            times_s, values = times_s[::-1], values[::-1]
        if index == first and skip:
            times_s, values = times_s[skip:], values[skip:]
        fits = len(times_s) <= room
        if fits or room:
            items.append(
                {
                    "Id": query.id,
                    "Label": query.label,
                    "Timestamps": times_s if fits else times_s[:room],
                    "Values": values if fits else values[:room],
                    "StatusCode": "Complete" if fits else "PartialData",
                }
            )
        if not fits:
            done = room + (skip if index == first else 0)
            of = request.fingerprint()
            return Page(items, _token(as_of_s, index, done, of), _token(as_of_s, first, skip, of))
        room -= len(times_s)
    return Page(items)


def _answered(
    truth: Truth, account: str, region: str, request: DataRequest, first: int, as_of_s: int
) -> Iterator[tuple[int, Answer]]:
    """(index, answer) of the queries from `first` on, computed a page's worth at a time."""
    finest_s = min(q.question.period_s for q in request.queries) if request.queries else 60
    start_s, end_s = request.start_s, request.end_s
    if truth.ages:
        start_s = max(start_s, as_of_s - KEPT_S)
    age_s = as_of_s - start_s if truth.ages else 0
    unit_s = _start_unit_s(age_s, finest_s)
    start_s = start_s // unit_s * unit_s
    step = 1 + request.datapoints_max // max(1, (end_s - start_s) // finest_s)
    for i in range(first, len(request.queries), step):
        indices = [n for n in range(i, min(i + step, len(request.queries))) if request.queries[n].return_data]
        by_owner: dict[str, list[int]] = {}
        for n in indices:
            query = request.queries[n]
            if _is_kept(query.question.period_s, age_s):
                by_owner.setdefault(query.owner or account, []).append(n)
        found: dict[int, Answer] = {}
        for owner, of_owner in by_owner.items():
            questions = [request.queries[n].question for n in of_owner]
            answers = truth.answers(owner, region, questions, start_s, end_s, as_of_s)
            found.update(zip(of_owner, answers, strict=True))
        for n in indices:
            yield n, found.get(n, EMPTY)


def _start_unit_s(age_s: int, finest_s: int) -> int:
    """StartTime is rounded down to this, by its age."""
    if age_s > 63 * DAY_S:
        return 3600
    return 300 if age_s > 15 * DAY_S else min(60, finest_s)


def _is_kept(period_s: int, age_s: int) -> bool:
    """Whether points of a period are still there for a StartTime of that age."""
    if age_s > 63 * DAY_S:
        return period_s % 3600 == 0
    if age_s > 15 * DAY_S:
        return period_s % 300 == 0
    return period_s >= 60 or age_s <= 3 * 3600


def list_metrics(
    truth: Truth,
    account: str,
    region: str,
    body: Mapping[str, Any],
    now_s: int,
    linked: Sequence[str] = (),
    beside: Sequence[Metric] = (),
) -> Page:
    """One page of ListMetrics at `now_s`; `linked` are accounts that `account` monitors, `beside` is listed after what there is.

    Raises AwsError for a filter or a token that AWS would refuse, and for an owner that is not linked.
    """
    active = body.get("RecentlyActive")
    if active not in (None, "PT3H"):
        raise invalid("The parameter RecentlyActive must be PT3H.")
    namespace, name = body.get("Namespace"), body.get("MetricName")
    try:
        wanted = [(d["Name"], d.get("Value")) for d in body.get("Dimensions") or ()]
    except (AttributeError, KeyError, TypeError) as e:
        raise unreadable(f"Dimensions are not filters: {e!r}") from e
    owners = _owners(body, account, linked)
    fingerprint = fingerprint_of((namespace, name, wanted, active, owners))
    as_of_s, first = now_s, 0
    if body.get("NextToken"):
        as_of_s, first, _ = _resume(body["NextToken"], fingerprint)
    last, before = first + LIST_PAGE, 0
    found: list[tuple[str, Metric]] = []
    for owner, metrics in _listed(truth, owners, region, as_of_s, active is not None, beside):
        if metrics is not beside and (namespace or name or wanted):
            metrics = [m for m in metrics if _matches(m, namespace, name, wanted)]
        found += [(owner, m) for m in metrics[max(0, first - before) : max(0, last - before)]]
        before += len(metrics)
    return Page(
        [
            {
                "Namespace": m.namespace,
                "MetricName": m.name,
                "Dimensions": [{"Name": k, "Value": v} for k, v in m.dimensions],
            }
            for _, m in found
        ],
        _token(as_of_s, last, 0, fingerprint) if last < before else "",
        _token(as_of_s, first, 0, fingerprint),
        [owner for owner, _ in found] if body.get("IncludeLinkedAccounts") else None,
    )


def _listed(
    truth: Truth, owners: Sequence[str], region: str, as_of_s: int, active: bool, beside: Sequence[Metric]
) -> Iterator[tuple[str, Sequence[Metric]]]:
    """(owner, metrics), one after the other."""
    for owner in owners:
        yield owner, truth.listed(owner, region, as_of_s, active)
    yield owners[0], beside


def _owners(body: Mapping[str, Any], account: str, linked: Sequence[str]) -> tuple[str, ...]:
    """Whose metrics a listing is of."""
    if not body.get("IncludeLinkedAccounts"):
        return (account,)
    owner = body.get("OwningAccount")
    if not owner:
        return (account, *linked)
    if owner != account and owner not in linked:
        message = f"The account {owner} is not linked to the monitoring account {account}."
        raise AwsError("InvalidParameterValueException", message, query_code="InvalidParameterValue")
    return (owner,)


def _matches(
    metric: Metric, namespace: str | None, name: str | None, wanted: Sequence[tuple[str, str | None]]
) -> bool:
    if (namespace and metric.namespace != namespace) or (name and metric.name != name):
        return False
    has = dict(metric.dimensions)
    return all(k in has and (v is None or has[k] == v) for k, v in wanted)
