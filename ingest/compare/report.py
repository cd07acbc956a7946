"""What a comparison has found: series that one side lacks, with the likely reason, labels that differ, verdicts on values, and both bills.

A reason is a guess from what both sides show, the configuration and the ledger, in this order: the first that fits. Only what nothing explains, or what the
ledger calls a gap, makes a comparison fail (`Report.ok`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

import orjson

from ingest.compare.lines import Verdict
from ingest.compare.state import State
from ingest.compare.store import OpenStretch, describe, key_said
from ingest.model import SourceName, Target
from shard_config.model import Config, ServiceProfile
from shard_config.price import STATISTICS_IN_ONE, Prices
from shard_config.series_names import metric_name
from shard_config.yace_facts import facts

EXAMPLES: Final = 3
"""Of a group."""
DAY_S: Final = 86_400
DAYS_A_MONTH: Final = 30
_UNKNOWN: Final = "?"
_STATS: Final = ("average", "sum", "minimum", "maximum", "sample_count")

Labels = dict[str, str]


@dataclass(frozen=True, slots=True)
class Group:
    """Series that one side lacks for one reason. `wrong`: nothing that is meant to be so."""

    account: str
    region: str
    service: str
    reason: str
    wrong: bool
    series: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelGroup:
    """A label that differs, of series that both sides have: with the values of one of them, empty where the label is not there."""

    label: str
    account: str
    service: str
    series: int
    theirs: str
    ours: str
    example: str


@dataclass(frozen=True, slots=True)
class Values:
    """How many values were judged how, of an account, region and service; `lag_s` is how old the equal ones were when they were scraped, on average."""

    account: str
    region: str
    service: str
    verdicts: Mapping[str, int]
    lag_s: int


@dataclass(frozen=True, slots=True)
class Example:
    """One value that is not equal."""

    verdict: str
    series: str
    scraped_s: int
    timestamp_s: int | None
    theirs: float | None
    ours: float | None
    ours_timestamp_s: int | None
    observed_s: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bill:
    """Of one side and its series, for the time compared. `once_usd` where up to five statistics of a metric count as one; both as if ListMetrics' free requests were used up."""

    series: int
    metrics: int
    lists: int
    each_usd: Decimal
    once_usd: Decimal

    def per_day(self, elapsed_s: float) -> tuple[Decimal, Decimal]:
        """(each, once) of a day at this rate."""
        scale = Decimal(DAY_S) / Decimal(str(elapsed_s))
        return self.each_usd * scale, self.once_usd * scale


@dataclass(frozen=True, slots=True)
class Report:
    """Everything. `theirs`, `ours` and `both` count series; `infos` YACE's aws_*_info; `unsettled` values that wait for their time."""

    from_s: int
    to_s: int
    scrapes: int
    failed: tuple[str, ...]
    theirs: int
    ours: int
    both: int
    infos: int
    missing: tuple[Group, ...]
    extra: tuple[Group, ...]
    labels: tuple[LabelGroup, ...]
    values: tuple[Values, ...]
    examples: tuple[Example, ...]
    unsettled: int
    bills: Mapping[str, Bill] = field(default_factory=dict)

    def verdict(self, which: Verdict) -> int:
        return sum(v.verdicts.get(which, 0) for v in self.values)

    @property
    def ok(self) -> bool:
        """Whether nothing is missing or wrong here: extra series, other labels and YACE's own gaps are no fault."""
        faults = sum(self.verdict(v) for v in (Verdict.WRONG, Verdict.GAP_HERE))
        return bool(self.scrapes) and not faults and not any(g.wrong for g in self.missing)


class Reasons:
    """Why one side has a series that the other has not."""

    def __init__(
        self,
        config: Config,
        open_: Mapping[tuple[str, str], list[OpenStretch]],
        looked: set[tuple[str, str]],
        now_s: int,
    ) -> None:
        self._config = config
        self._open = open_
        self._looked = looked
        self._now_s = now_s
        self._targets: dict[tuple[str, str], list[ServiceProfile]] = {
            (account.id, region): config.services_in(account, region)
            for account in config.accounts
            for region in account.regions
        }
        namespaces = {p.namespace for p in config.services} | set(facts().aliases)
        # The longest first: aws_applicationelb before aws.
        self._spaces = sorted(
            ((metric_name("yace", n, "x", "")[:-1], n) for n in namespaces), key=lambda pair: -len(pair[0])
        )
        self._names = {
            metric_name("yace", p.namespace, m.name, stat): p.service
            for p in config.services
            if p.metrics != "all"
            for m in p.metrics
            for stat in m.statistics
        }

    def service_of(self, name: str) -> tuple[str, str]:
        """(namespace, service) that a name of YACE's is of: empty where unknown; the service is that of the configuration, or YACE's alias."""
        namespace = next((n for prefix, n in self._spaces if name.startswith(prefix)), "")
        known = self._names.get(name) or next(
            (p.service for p in self._config.services if p.namespace == namespace), ""
        )
        return namespace, known or facts().aliases.get(namespace, "")

    def why_missing(
        self, name: str, account: str, region: str, valued: int, nonzero: int, first_s: int
    ) -> tuple[str, bool]:
        """(why we have no such series, whether that is wrong)."""
        namespace = self.service_of(name)[0]
        if (account, region) not in self._targets:
            known = any(a == account for a, _ in self._targets)
            return (f"region {region} is not configured" if known else "the account is not configured"), True
        profiles = [p for p in self._targets[account, region] if p.namespace == namespace]
        if not profiles:
            return "the service is not configured for this account and region", True
        if not any(self._asks(p, name) for p in profiles):
            return "the service's metrics have no such metric or statistic", True
        if not valued:
            return "YACE never had a value either: NaN, and CloudWatch has no point", False
        target, of = (
            str(Target(SourceName.CLOUDWATCH, account, region)),
            next(p for p in profiles if self._asks(p, name)),
        )
        if (target, of.service) not in self._looked:
            reasons = sorted({s.reason for s in self._open.get((target, of.service), ())})
            return f"no look was complete yet: {', '.join(reasons) or 'nothing is planned'}", True
        if not nonzero:
            return "always 0 at YACE: its nilToZero, most likely", False
        if self._now_s - first_s < of.discovery_interval_s + 900:
            return f"new: ListMetrics is asked each {of.discovery_interval_s} s", False
        if of.only:
            return "left out by the service's `only`: dimensions, or tags of its resource", True
        return "not listed by ListMetrics, or refused: see headgate why and headgate dead list", True

    def _asks(self, profile: ServiceProfile, name: str) -> bool:
        """Whether a service asks for this metric and statistic."""
        if profile.metrics != "all":
            return any(
                metric_name("yace", profile.namespace, m.name, s) == name
                for m in profile.metrics
                for s in m.statistics
            )
        return any(
            name.endswith(metric_name("yace", "a", "", s).removeprefix("aws_a_")) for s in profile.statistics
        )

    def why_extra(self, service: str, name: str, of_service: int, of_name: int, arns: bool) -> str:
        """Why YACE has not a series of ours: it has so many of the service and of the metric in this target, `arns` where they belong to resources."""
        if not of_service:
            return "YACE has nothing of the service here: it does not ask, or no resource is tagged"
        if not of_name:
            return "YACE asks for no such metric or statistic"
        if arns:
            return "a resource that was never tagged, or has not the tags of searchTags"
        return "left out by dimensionNameRequirements, or no point within YACE's length"


# --- series ---------------------------------------------------------------------------------------------------


def missing_groups(state: State, reasons: Reasons) -> list[Group]:
    """Series of YACE's that we have not, by account, region, service and reason, the most first."""
    groups: dict[tuple[str, str, str, str, bool], list[str]] = {}
    counts: dict[tuple[str, str, str, str, bool], int] = defaultdict(int)
    for name, account, region, labels, valued, nonzero, first_s in state.rows(
        "SELECT name, account, region, labels, valued, nonzero, first_s FROM theirs WHERE NOT EXISTS (SELECT 1 FROM ours WHERE ours.key = theirs.key)"
    ):
        reason, wrong = reasons.why_missing(name, account, region, valued, nonzero, first_s)
        key = (account, region, reasons.service_of(name)[1] or _UNKNOWN, reason, wrong)
        counts[key] += 1
        some = groups.setdefault(key, [])
        if len(some) < EXAMPLES:
            some.append(said(name, orjson.loads(labels)))
    return _sorted(Group(*key, counts[key], tuple(some)) for key, some in groups.items())


def extra_groups(state: State, reasons: Reasons) -> list[Group]:
    """Series of ours with points in the time compared that YACE has not, in the same way."""
    of_service: dict[tuple[str, str, str], int] = defaultdict(int)
    of_name: dict[tuple[str, str, str], tuple[int, bool]] = {}
    for account, region, name, n, arns in state.rows(
        """SELECT account, region, name, count(*), max(labels LIKE '%"name":"arn:%') FROM theirs GROUP BY 1, 2, 3"""
    ):
        of_name[account, region, name] = n, bool(arns)
        of_service[account, region, reasons.service_of(name)[1]] += n
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    counts: dict[tuple[str, str, str, str], int] = defaultdict(int)
    for account, region, service, name, text, period_s in state.rows(
        "SELECT account, region, service, name, said, period_s FROM ours WHERE live = 1 AND NOT EXISTS (SELECT 1 FROM theirs WHERE theirs.key = ours.key)"
    ):
        n, arns = of_name.get((account, region, name), (0, False))
        why = reasons.why_extra(service, name, of_service[account, region, service], n, arns)
        key = (account, region, service, why)
        counts[key] += 1
        some = groups.setdefault(key, [])
        if len(some) < EXAMPLES:
            some.append(describe(key_said(account, region, text, period_s)))
    return _sorted(Group(*key, False, counts[key], tuple(some)) for key, some in groups.items())


def _sorted(groups: Iterable[Group]) -> list[Group]:
    return sorted(groups, key=lambda g: (not g.wrong, -g.series, g.account, g.region, g.service, g.reason))


def said(name: str, labels: Mapping[str, str]) -> str:
    """A series as Prometheus writes it."""
    inside = ",".join(f"{k}={orjson.dumps(v).decode()}" for k, v in labels.items())
    return f"{name}{{{inside}}}"


# --- values ---------------------------------------------------------------------------------------------------


def values_of(state: State) -> list[Values]:
    """Verdicts by account, region and service, those with the most faults first."""
    found: dict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)
    lags: dict[tuple[str, str, str], int] = {}
    for account, region, service, verdict, n, lag_s in state.rows("SELECT * FROM verdicts"):
        key = (account, region, service)
        found[key][verdict] = n
        if verdict == Verdict.EQUAL:
            lags[key] = round(lag_s / n)
    bad = (Verdict.WRONG, Verdict.GAP_HERE, Verdict.UNCLEAR)
    return sorted(
        (Values(*key, verdicts, lags.get(key, 0)) for key, verdicts in found.items()),
        key=lambda v: (-sum(v.verdicts.get(b, 0) for b in bad), v.account, v.region, v.service),
    )


def examples_of(
    state: State, at_most: int, open_: Mapping[tuple[str, str], Sequence[OpenStretch]]
) -> list[Example]:
    """Values that are not equal, the gravest first; of what is missing here with the ledger's word on its window."""
    order = (
        Verdict.WRONG,
        Verdict.GAP_HERE,
        Verdict.UNCLEAR,
        Verdict.REVISED,
        Verdict.GAP_THERE,
        Verdict.ZERO,
    )
    found: list[Example] = []
    for verdict in order:
        rows = state.rows(
            """SELECT o.account, o.region, o.service, o.said, o.period_s, e.at_s, e.ts, e.theirs, e.ours, e.ours_ts, e.observed_s, e.note FROM examples AS e JOIN ours AS o USING (key)
            WHERE verdict = ? ORDER BY e.at_s, e.key LIMIT ?""",
            verdict,
            at_most,
        )
        for (
            account,
            region,
            service,
            text,
            period_s,
            at_s,
            ts,
            theirs,
            ours,
            ours_ts,
            observed_s,
            note,
        ) in rows:
            series = describe(key_said(account, region, text, period_s))
            if verdict is Verdict.GAP_HERE:
                stretches = open_.get((str(Target(SourceName.CLOUDWATCH, account, region)), service), ())
                note = _window(stretches, ts or at_s)
            found.append(Example(verdict, series, at_s, ts or None, theirs, ours, ours_ts, observed_s, note))
    return found[:at_most]


def _window(stretches: Iterable[OpenStretch], at_s: int) -> str:
    reasons = sorted({s.reason for s in stretches if s.start_s <= at_s < s.end_s})
    if reasons:
        return f"its window is open: {', '.join(r.replace('_', ' ') for r in reasons)}"
    return "its window is sealed, declared or was never planned: headgate why"


# --- money ----------------------------------------------------------------------------------------------------


def share_once(names: Mapping[str, int]) -> Decimal:
    """Metrics per query where up to five statistics of a metric count once; `names` are YACE's, with their numbers of series."""
    statistics: dict[str, list[int]] = defaultdict(list)
    for name, series in names.items():
        statistics[_without_stat(name)].append(series)
    queries = sum(names.values())
    once = sum(max(each) * -(-len(each) // STATISTICS_IN_ONE) for each in statistics.values())
    return Decimal(once) / queries if queries else Decimal(1)


def _without_stat(name: str) -> str:
    for stat in _STATS:
        if name.endswith(f"_{stat}"):
            return name[: -len(stat) - 1]
    base, _, last = name.rpartition("_")
    return base if last[:1] in ("p", "t", "i") else base.rpartition("_")[0] or name


def yace_bill(state: State, prices: Prices) -> Bill:
    """What YACE's own counters say of the time compared."""
    spent = dict(state.rows("SELECT name, sum(spent) FROM counters GROUP BY name"))
    metrics = round(spent.get("yace_cloudwatch_getmetricdata_metrics_requested_total", 0))
    lists = round(spent.get("yace_cloudwatch_requests_total:ListMetrics", 0))
    statistics = round(spent.get("yace_cloudwatch_requests_total:GetMetricStatistics", 0))
    names = dict(state.rows("SELECT name, count(*) FROM theirs GROUP BY name"))
    usd = metrics * prices.usd_per_1000_metrics / 1000
    requests = prices.list_metrics_usd(lists + statistics, prices.requests_free_per_month)
    return Bill(
        sum(names.values()), metrics, lists + statistics, usd + requests, usd * share_once(names) + requests
    )
