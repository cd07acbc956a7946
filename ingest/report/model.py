"""The report as data: the one source of its page, its CSV and its JSON, so that these carry the same figures under the same names.

Guarantees:

* a figure that is not known is None and says why; it is never 0 instead;
* every figure has the coverage of the data behind it, and where it can have one, the same figure of the week before;
* a resource has one verdict, so that its saving is counted once.

Times (`*_s`) are whole seconds since the epoch, UTC; ranges are half-open. Shares and coverages are 0..1. A month is `MONTH_H` hours. Utilization
in percent is 0..100, as CloudWatch gives it. Money (`*_usd…`) is US dollars.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

MONTH_H: Final = 30.4 * 24
"""Hours, as in the price list (`shard_config.price_list`)."""


@dataclass(frozen=True, slots=True, order=True)
class ResourceKey:
    """A resource: the dimension's value within account, region and service (our slug). The page links by it."""

    account: str
    region: str
    service: str
    id: str

    def __str__(self) -> str:
        return f"{self.account}/{self.region}/{self.service}/{self.id}"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, or why there is none.

    `week` is the same figure over the range's last 7 days, `before` over the 7 days before these (None: not known); where `week` is None, `value`
    itself is the week's, or of its end. `coverage` says how complete the data behind `value` is, 0..1 (None: it does not rest on samples, as a
    list of prices).
    """

    value: float | None
    unit: str = ""
    """usd, usd/month, percent, bytes, count, hours, 1/s … : as it is to be read."""
    before: float | None = None
    coverage: float | None = None
    unknown: str = ""
    """Why `value` is None, and what would fill it; empty where it is known."""
    week: float | None = None

    @property
    def change(self) -> float | None:
        """Week on week, in `unit`: `week`, or else `value`, less `before`."""
        now = self.value if self.week is None else self.week
        return None if now is None or self.before is None else now - self.before

    @property
    def relative_change(self) -> float | None:
        """`change` as a share of `before`; None where that is 0 or not known."""
        change = self.change
        return None if change is None or not self.before else change / abs(self.before)


# --- a resource ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MetricUse:
    """One role (`shard_config.report.Role`) of a resource over the range.

    `average` and `p95` are of the Average statistic, or of a Sum, told a second; where of such a metric only the Average is collected, of that, as it stands
    (their unit says so). `peak` is of the Maximum statistic and of nothing else.
    """

    role: str
    metric: str
    average: Figure
    p95: Figure
    peak: Figure
    p95_of: str
    """What the 95th percentile is of: "samples" (merged sketches) or "hourly averages"."""
    hours: int
    """Hours with samples."""
    daily: tuple[float | None, ...] = ()
    """The average of each UTC day of the range, oldest first: for a sparkline."""


@dataclass(frozen=True, slots=True)
class Size:
    """What the inventory knows of a resource's size; None: not known, or the service has none."""

    type: str = ""
    vcpu: float | None = None
    memory_bytes: float | None = None
    storage_bytes: float | None = None

    def __str__(self) -> str:
        storage = "" if self.storage_bytes is None else f"{self.storage_bytes / 1024**3:,.0f} GiB"
        return " ".join(part for part in (self.type, storage) if part)


class VerdictKind(StrEnum):
    """What is said of a resource. Only IDLE and OVERSIZED waste; the others say why neither is said."""

    IDLE = "idle"
    OVERSIZED = "oversized"
    IN_USE = "in use"
    NOT_ENOUGH_DATA = "not enough data"
    NEW = "new"
    STOPPED = "stopped"
    STANDBY = "standby"
    READER = "reader"
    AUTO_SCALED = "auto-scaled"
    GONE = "gone"
    """It lived within the range, and no longer."""
    NOT_JUDGED = "not judged"
    """No rule knows this service, or no inventory knows this resource."""


class Confidence(StrEnum):
    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class Evidence:
    """One number that a verdict rests on, and the limit that it was held against (None: it is told, not judged)."""

    name: str
    value: float
    unit: str
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Money:
    """What is wasted, or saved. The effective price is the list price less the discount that `assumption` names."""

    list_usd_per_month: float
    effective_usd_per_month: float
    assumption: str
    """As "on demand, no discount configured" or "Savings Plan 2026: 28 % off"."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of a resource, by which rule, on what evidence."""

    kind: VerdictKind
    rule: str
    """One sentence, for people."""
    evidence: tuple[Evidence, ...] = ()
    confidence: Confidence | None = None
    """Of IDLE and OVERSIZED."""
    smaller: Size | None = None
    """Of OVERSIZED: the size that would do."""
    waste: Money | None = None
    """Of IDLE and OVERSIZED, where its price is configured."""
    waste_unknown: str = ""
    """Why there is no `waste`, and which key would give one."""
    since_s: int | None = None
    """Of IDLE and OVERSIZED: since when, as far as is known, what it says has been so. IDLE: since no activity reached its limit."""


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """A resource within the range."""

    key: ResourceKey
    size: Size
    owner: str
    """The owner tag's value; empty: untagged, or tags are not known."""
    state: str
    """The inventory's word at the end of the range; empty: not known."""
    lived_s: int
    """How long it lived within the range; the whole range where the inventory does not know it."""
    coverage: float | None
    """Hours with samples / hours in which it should have reported; None where nothing says that it should have."""
    metrics: tuple[MetricUse, ...]
    idle_hours: int | None
    """Hours in which every activity that its idle rule asks for was below its limit; None where no rule knows the service."""
    verdict: Verdict
    group: str = ""
    """The auto-scaling group, cluster or fleet that it belongs to."""

    def use(self, role: str) -> MetricUse | None:
        return next((m for m in self.metrics if m.role == role), None)


# --- sums -----------------------------------------------------------------------------------------------------------


class Level(StrEnum):
    ALL = "all"
    ACCOUNT = "account"
    REGION = "region"
    SERVICE = "service"


@dataclass(frozen=True, slots=True)
class GroupUse:
    """An account, a region of it, a service in it (across its regions), or everything.

    CPU is weighted by vCPU (`weighted_by` "vcpu"); where no size at all is known, each resource counts the same ("resource"): the page has to
    say so.
    """

    level: Level
    account: str
    """Empty for ALL."""
    name: str
    """The account, region or service; empty for ALL."""
    resources: int
    cpu_average: Figure
    cpu_p95: Figure
    """Percent, the weighted mean of the resources' p95."""
    cpu_peak: Figure
    """Percent, the greatest of the resources' peaks."""
    weighted_by: str
    idle: int
    oversized: int
    waste: Money | None
    coverage: float | None
    unsized: int = 0
    """Resources with CPU that are not in the weighted figures, for their size is not known."""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """CPU by hour of the week, UTC: the weighted mean over resources of the hour's p95; over several weeks the mean of these."""

    title: str
    """"all accounts", or an account."""
    percent: tuple[tuple[float | None, ...], ...]
    """7 rows, Monday first, of 24 hours; None: no samples."""
    weighted_by: str
    resources: int
    coverage: float | None
    change_percent: float | None = None
    """Of the whole map's mean against the week before, in points of per cent."""


# --- the ten things ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AccountSpend:
    """What monitoring an account cost in the week (CloudWatch's API), against its budget."""

    account: str
    usd: Figure
    in_doubt_usd: float
    """Asked for in requests whose answer was lost: billed or not, only AWS knows."""
    budget_usd: float | None
    """Of 7 days; None: it has none of its own."""


@dataclass(frozen=True, slots=True)
class Spend:
    """1: monitoring spend of the last 7 days against the budget."""

    usd: Figure
    in_doubt_usd: float
    budget_usd: float | None
    """Of 7 days, of all accounts together; None: none is configured."""
    daily_usd: tuple[float, ...]
    """By UTC day of the range, oldest first."""
    accounts: tuple[AccountSpend, ...]
    """Greatest first."""


@dataclass(frozen=True, slots=True)
class Mover:
    """2: what changed most, by account and service: what monitoring cost (`what` "monitoring", usd a week)."""

    account: str
    service: str
    what: str
    figure: Figure


@dataclass(frozen=True, slots=True)
class Finding:
    """3 and 4: a resource with its verdict IDLE or OVERSIZED."""

    key: ResourceKey
    size: Size
    owner: str
    verdict: Verdict
    coverage: float | None
    since_days: float
    """For so many days before the range's end it has been so, as far as is known: `Verdict.since_s`."""


@dataclass(frozen=True, slots=True)
class Findings:
    """3 or 4, summed: `total` is the effective waste, usd/month, of those whose price is known; `unpriced` are the others."""

    total: Figure
    list_usd_per_month: float | None
    count: Figure
    unpriced: int
    findings: tuple[Finding, ...]
    """Greatest effective waste first."""
    empty: str = ""
    """Why there are none, and what would fill it."""


@dataclass(frozen=True, slots=True)
class Realised:
    """5: what was idle or oversized a week ago, and is gone or smaller now."""

    key: ResourceKey
    owner: str
    was: VerdictKind
    how: str
    """As "gone", "stopped", "m7g.2xlarge → m7g.large"."""
    saved: Money | None


@dataclass(frozen=True, slots=True)
class Realisations:
    total: Figure
    """Effective, usd/month."""
    realised: tuple[Realised, ...]
    empty: str = ""


@dataclass(frozen=True, slots=True)
class Days:
    """Days from the range's end until a level is reached, with the interval of the trend's.

    None in `days`: not within reach, see `more_than`. A level that is reached has 0. `latest` None: further than the fit may be drawn out.
    """

    days: float | None
    earliest: float | None = None
    latest: float | None = None
    more_than: float | None = None
    """Days: as far as the fit may be drawn out (twice its length) the level is not reached."""


@dataclass(frozen=True, slots=True)
class Filling:
    """7: when a resource is full."""

    key: ResourceKey
    owner: str
    what: str
    """The role: storage_used, memory …"""
    used: Figure
    """In `used.unit`, now, with the week before's."""
    capacity: float
    per_day: float
    """The trend; in `used.unit` a day. Greater than 0."""
    per_day_low: float
    per_day_high: float
    to_80: Days
    to_100: Days
    fitted_days: int
    """The days since the last step, as many as have samples."""
    fitted_from_s: int
    method: str
    coverage: float
    daily: tuple[float | None, ...] = ()
    """Used, by UTC day of the range."""

    @property
    def share(self) -> float:
        return (self.used.value or 0.0) / self.capacity


@dataclass(frozen=True, slots=True)
class Fillings:
    fillings: tuple[Filling, ...]
    """Soonest full first; all of them, not the top 20 only."""
    looked_at: int
    """Resources with a capacity and enough data: of the others nothing is said."""
    within_30_days: Figure
    """How many reach 100 % within 30 days."""
    empty: str = ""


@dataclass(frozen=True, slots=True)
class QuotaUse:
    """8: what Headgate asks of an account's quota in a region: its busiest hour of the week, a second."""

    account: str
    region: str
    what: str
    """"GetMetricData calls" or "datapoints"."""
    asked_per_s: Figure
    quota_per_s: float

    @property
    def share(self) -> float | None:
        return None if self.asked_per_s.value is None else self.asked_per_s.value / self.quota_per_s


@dataclass(frozen=True, slots=True)
class AccountCoverage:
    """9: how complete and how fresh an account's data are, by the ledger."""

    account: str
    alias: str
    coverage: Figure
    """Share of windows of the week that are complete."""
    newest_s: int | None
    """The end of its newest complete window; None: there is none."""
    age_s: int | None
    """From there to the range's end, or to now where that is earlier."""
    windows: int
    missing: int
    reasons: tuple[tuple[str, int], ...] = ()
    """Why windows are missing, by the ledger's states: most first."""


@dataclass(frozen=True, slots=True)
class Noted:
    """10: a resource that is new, gone or untagged."""

    key: ResourceKey
    size: Size
    owner: str
    at_s: int | None
    """When it was created, or last seen."""


@dataclass(frozen=True, slots=True)
class Changes:
    """10: within the week, without members of auto-scaling groups and fleets, which come and go by themselves; untagged: at its end, with them."""

    new: tuple[Noted, ...]
    vanished: tuple[Noted, ...]
    untagged: tuple[Noted, ...]
    new_count: Figure
    vanished_count: Figure
    untagged_count: Figure
    owner_tag: str
    empty: str = ""


@dataclass(frozen=True, slots=True)
class InventoryNote:
    """Where sizes come from."""

    source: str
    """none, describe, config, csv."""
    as_of_s: int | None
    resources: int
    remedy: str = ""
    """What to do where sizes are not known; empty where they are."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the report says. A week is the 7 days before `to_s`, the week before the 7 before these."""

    from_s: int
    to_s: int
    made_at_s: int
    accounts: tuple[str, ...]
    inventory: InventoryNote
    spend: Spend
    movers: tuple[Mover, ...]
    idle: Findings
    oversized: Findings
    realised: Realisations
    heat: tuple[HeatMap, ...]
    """The first is of all accounts."""
    filling: Fillings
    quotas: tuple[QuotaUse, ...]
    """Nearest to its quota first."""
    coverage: tuple[AccountCoverage, ...]
    """Least first."""
    coverage_all: Figure
    changes: Changes
    groups: tuple[GroupUse, ...]
    resources: tuple[ResourceUse, ...]
    assumptions: tuple[str, ...] = field(default=())
    """What the figures assume, a sentence each: prices, discounts, thresholds."""

    @property
    def days(self) -> int:
        return math.ceil((self.to_s - self.from_s) / 86_400)
