"""What a configuration will cost a month, before it is switched on, and what the same points cost by other ways. Pure.

* Every sum is made of `Line`s: a quantity, its unit, dollars, and the dollars by the other reading of the price list where that differs.
* Where the number of metrics is not known it is assumed, and the quote says so; nothing else is guessed but the measured figures below.
* Compared like with like: what CloudWatch bills. Headgate's own parts stand apart, since the others need a store of their own, which is not priced here;
  no way's computers are.

The pages of GetMetricData are not in it: each call is planned to fit into one, so the disputed switch `pages_count_again` changes nothing here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Final, NamedTuple

from shard_config.model import Account, Config, ServiceProfile
from shard_config.price import DAY_S, STATISTICS_IN_ONE, Prices

MONTH_DAYS: Final = Decimal("30.4")
GB: Final = Decimal(10**9)
PAGE_METRICS: Final = 500
"""Of ListMetrics."""

# Measured: docs/BENCHMARKS.md (values of two decimals), the store's rows with their index, a look in the ledger, a folded day in the ledger, and
# GetMetricData's JSON for EC2.
BYTES_PER_POINT: Final = Decimal("5.5")
BYTES_PER_ROW: Final = 110
BYTES_PER_LOOK: Final = 1030
BYTES_PER_FOLDED_DAY: Final = 284
BYTES_PER_QUERY: Final = 210 + 90
BYTES_PER_ANSWERED_POINT: Final = 28

ARCHIVED_PER_POINT: Final = 2
"""A point is archived when it is first seen, and once more in the look that may seal its window."""
BYTES_PER_UPDATE: Final = 400
"""Of Metric Streams' JSON, by the length of its example; assumed."""
FIREHOSE_OBJECT_BYTES: Final = 5 * 10**6
"""Firehose's default buffer."""

RESOURCES_ASSUMED: Final = {"ec2": 50, "ebs": 100, "lambda": 50, "dynamodb": 30, "sqs": 30, "s3": 30}
RESOURCES_ASSUMED_ELSE: Final = 10
"""Of a service in one account and region, where nobody says."""
NAMES_ASSUMED: Final = 10
"""Metric names of a resource, where a profile takes all."""
LISTED_PER_ASKED: Final = 2
"""So many times what a profile's list of names asks for is in its namespace; assumed."""
SERIES_PER_ENDPOINT_ASSUMED: Final = 500


Key = tuple[str, str, str]
"""Account, region, service."""


class Way(StrEnum):
    """How the same points could be had."""

    HEADGATE = "headgate"
    YACE_300 = "yace-300s"
    YACE_60 = "yace-60s"
    STREAMS = "metric-streams"


class Line(NamedTuple):
    """One item of one way. `own` is what is not billed by CloudWatch (or, of streams, by Firehose): Headgate's own parts."""

    way: Way
    service: str
    item: str
    quantity: Decimal
    unit: str
    usd: Decimal
    usd_other: Decimal
    """By the other reading of `statistics_count_once`; the same where it makes no difference."""
    own: bool = False


@dataclass(frozen=True, slots=True)
class Count:
    """Metrics (name × dimensions) of a service in one account and region.

    `queries` are metrics × statistics; `once` are those where up to five statistics of a metric count as one; `listed` is what ListMetrics names.
    """

    metrics: int
    queries: int
    once: int
    listed: int


@dataclass(frozen=True, slots=True)
class Basis:
    """For how long, and how long things are kept: the archive and the store so many days, Kafka's topics so many."""

    days: Decimal = MONTH_DAYS
    kept_days: int = 365
    raw_kept_days: int = 7
    ledger_kept_days: int = 30


@dataclass(frozen=True, slots=True)
class Quote:
    """`counts` are over all accounts and regions, by service."""

    days: Decimal
    targets: int
    counts: Mapping[str, Count]
    lines: tuple[Line, ...]

    def usd(
        self, way: Way, service: str | None = None, item: str | None = None, *, own: bool = False
    ) -> Decimal:
        """What a way costs: of a service, or of all; of an item, or of all; CloudWatch's part, or Headgate's own."""
        return sum((line.usd for line in self._of(way, service, item, own)), Decimal())

    def usd_other(self, way: Way, service: str | None = None) -> Decimal:
        """What CloudWatch bills by the other reading."""
        return sum((line.usd_other for line in self._of(way, service, None, False)), Decimal())

    def _of(self, way: Way, service: str | None, item: str | None, own: bool) -> Iterable[Line]:
        return (
            line
            for line in self.lines
            if line.way is way
            and line.own is own
            and service in (None, line.service)
            and item in (None, line.item)
        )


# --- how many -------------------------------------------------------------------------------------------------


def statistics_of(profile: ServiceProfile) -> list[tuple[str, ...]]:
    """By metric name that is asked for, its statistics; a profile that takes all counts as one name."""
    return [profile.statistics] if profile.metrics == "all" else [m.statistics for m in profile.metrics]


def count_of(profile: ServiceProfile, metrics: int, listed: int | None = None) -> Count:
    """So many metrics, in equal parts of the profile's names. `listed` None: assumed."""
    stats = statistics_of(profile)

    def share(of: Iterable[int]) -> int:
        return -(-metrics * sum(of) // len(stats))

    if listed is None:
        narrowed = profile.metrics != "all" or bool(profile.only)
        listed = metrics * LISTED_PER_ASKED if narrowed else metrics
    return Count(
        metrics, share(len(s) for s in stats), share(-(-len(s) // STATISTICS_IN_ONE) for s in stats), listed
    )


def assumed(profile: ServiceProfile) -> int:
    """Metrics in one account and region, where nobody says: resources × names."""
    names = NAMES_ASSUMED if profile.metrics == "all" else len(profile.metrics)
    return RESOURCES_ASSUMED.get(profile.service, RESOURCES_ASSUMED_ELSE) * names


def alike(config: Config, accounts: Sequence[Account], metrics: Mapping[str, int]) -> dict[Key, Count]:
    """Counts where each account and region has so many metrics of a service; of those that `metrics` leaves out, what is assumed."""
    count = {
        name: count_of(profile, metrics.get(name, assumed(profile)))
        for name, profile in config.service_by_name.items()
    }
    return {
        (a.id, region, service): count[service]
        for a in accounts
        for region in a.regions
        for service in a.services
    }


def accounts_of(config: Config, wanted: int | None) -> list[Account]:
    """The configured accounts, or so many: the first of them, and more like the organization's, else like the last.

    Raises ValueError where there is none to go by.
    """
    known = list(config.accounts)
    if wanted is None and not known and config.organization is not None:
        raise ValueError("how many accounts the organization has is not known: give --accounts")
    if wanted is None or wanted <= len(known):
        return known[:wanted]
    organization = config.organization
    if organization is not None and organization.regions and organization.services:
        like = Account(id="0" * 12, regions=organization.regions, services=organization.services)
    elif known:
        like = known[-1]
    else:
        raise ValueError(
            "no account says what an account has: give regions and services under `organization`"
        )
    more = range(wanted - len(known))
    return known + [like.model_copy(update={"id": f"{n:012d}", "budget_usd_per_day": None}) for n in more]


# --- what it costs --------------------------------------------------------------------------------------------


def quote(
    config: Config,
    accounts: Sequence[Account],
    counts: Mapping[Key, Count],
    jobs: Mapping[str, int],
    basis: Basis,
) -> Quote:
    """The quote. `counts` has every service of every account and region, `jobs` the series of each job of `exposition`. Raises KeyError."""
    profiles = config.service_by_name
    totals: dict[str, Count] = {}
    for (_, _, service), count in counts.items():
        t = totals.get(service, Count(0, 0, 0, 0))
        totals[service] = Count(
            t.metrics + count.metrics, t.queries + count.queries, t.once + count.once, t.listed + count.listed
        )
    targets = {key[:2] for key in counts}
    prices = Prices.of(config.aws)
    lines: list[Line] = []
    for service, total in sorted(totals.items()):
        profile = profiles[service]
        lines += _get_metric_data(Way.HEADGATE, profile, total, profile.poll_interval_s, prices, basis)
        lines += _get_metric_data(Way.YACE_300, profile, total, 300, prices, basis)
        lines += _get_metric_data(Way.YACE_60, profile, total, 60, prices, basis)
        lines += _streams(config, profile, total, basis)
    lines += _list_metrics(Way.HEADGATE, counts, profiles, prices, basis, None)
    lines += _list_metrics(Way.YACE_300, counts, profiles, prices, basis, 300)
    lines += _list_metrics(Way.YACE_60, counts, profiles, prices, basis, 60)
    lines += _own_parts(config, accounts, counts, jobs, basis)
    return Quote(basis.days, len(targets) + len(config.exposition), totals, tuple(lines))


def _get_metric_data(
    way: Way, profile: ServiceProfile, count: Count, poll_s: int, prices: Prices, basis: Basis
) -> list[Line]:
    polls = basis.days * DAY_S / poll_s
    each, once = (polls * n * prices.usd_per_1000_metrics / 1000 for n in (count.queries, count.once))
    usd, other = (once, each) if prices.statistics_count_once else (each, once)
    billed = polls * (count.once if prices.statistics_count_once else count.queries)
    return [Line(way, profile.service, "GetMetricData", billed, "metrics", usd, other)]


def _list_metrics(
    way: Way,
    counts: Mapping[Key, Count],
    profiles: Mapping[str, ServiceProfile],
    prices: Prices,
    basis: Basis,
    every_s: int | None,
) -> list[Line]:
    """Of Headgate (`every_s` None) each page of a namespace at its discovery interval; of YACE each page of each name at each scrape.

    What is free of an account is shared by its services as they list.
    """
    asked: dict[str, dict[str, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    for (account, _, service), count in counts.items():
        profile = profiles[service]
        if every_s is None:
            pages, interval_s = max(1, -(-count.listed // PAGE_METRICS)), profile.discovery_interval_s
        else:
            names = 1 if profile.metrics == "all" else len(profile.metrics)
            pages, interval_s = names * max(1, -(-count.metrics // (names * PAGE_METRICS))), every_s
        asked[account][service] += pages * basis.days * DAY_S / interval_s
    requests: dict[str, Decimal] = defaultdict(Decimal)
    usd: dict[str, Decimal] = defaultdict(Decimal)
    free = prices.requests_free_per_month * basis.days / MONTH_DAYS
    for by_service in asked.values():
        total = sum(by_service.values(), Decimal())
        paid = max(Decimal(), total - free) * prices.usd_per_1000_requests / 1000
        for service, n in by_service.items():
            requests[service] += n
            usd[service] += paid * n / total
    return [
        Line(way, service, "ListMetrics", requests[service], "requests", usd[service], usd[service])
        for service in sorted(requests)
    ]


def updates_per_metric(profile: ServiceProfile) -> Decimal:
    """What Metric Streams bills of one update: minimum, maximum, sum and count are one, each five further statistics one more."""
    plain = {"Average", "Sum", "Minimum", "Maximum", "SampleCount"}
    stats = statistics_of(profile)
    return Decimal(sum(1 - (len(set(s) - plain) // -STATISTICS_IN_ONE) for s in stats)) / len(stats)


def _streams(config: Config, profile: ServiceProfile, count: Count, basis: Basis) -> list[Line]:
    """Every metric of the names asked for, each period: a stream cannot leave out resources."""
    prices = config.prices
    times = basis.days * DAY_S / max(60, profile.period_s)
    updates = times * count.metrics * updates_per_metric(profile)
    volume = updates * BYTES_PER_UPDATE
    puts = volume / FIREHOSE_OBJECT_BYTES
    kept = volume / MONTH_DAYS * basis.kept_days
    return [
        _line(
            Way.STREAMS,
            profile.service,
            "metric updates",
            updates,
            "updates",
            _d(prices.stream_usd_per_1000_updates) / 1000,
        ),
        _line(Way.STREAMS, profile.service, "Firehose", volume / GB, "GB", _d(prices.firehose_usd_per_gb)),
        _line(
            Way.STREAMS, profile.service, "S3 PUT", puts, "requests", _d(prices.s3_usd_per_1000_puts) / 1000
        ),
        _line(
            Way.STREAMS, profile.service, "S3 storage", kept / GB, "GB-months", _d(prices.s3_usd_per_gb_month)
        ),
    ]


def _own_parts(
    config: Config,
    accounts: Sequence[Account],
    counts: Mapping[Key, Count],
    jobs: Mapping[str, int],
    basis: Basis,
) -> list[Line]:
    profiles, prices, kafka = config.service_by_name, config.prices, config.kafka
    points_day = traffic_day = looks_day = tasks_day = listings_day = Decimal()
    for (_, _, service), count in counts.items():
        p = profiles[service]
        points_day += Decimal(count.queries * DAY_S) / p.period_s
        lookback_s = -(-p.settling_s // p.poll_interval_s) * p.poll_interval_s
        answered = BYTES_PER_QUERY + BYTES_PER_ANSWERED_POINT * (p.poll_interval_s + lookback_s) // p.period_s
        looks_day += Decimal(DAY_S) / p.poll_interval_s
        traffic_day += Decimal(count.queries * DAY_S) / p.poll_interval_s * answered
        listings_day += Decimal(DAY_S) / p.discovery_interval_s
    for account in accounts:
        intervals = {profiles[s].poll_interval_s for s in account.services}
        # What falls due at one time is one task, and an object.
        apart = [i for i in intervals if not any(i != j and i % j == 0 for j in intervals)]
        tasks_day += len(account.regions) * sum(Decimal(DAY_S) / i for i in apart)
    for job in config.exposition:
        times = Decimal(DAY_S) / job.interval_s
        points_day += times * jobs[job.name]
        looks_day += times
        tasks_day += times
    series_days = len(counts) + len(config.exposition)
    hours, months = basis.days * 24, basis.days / MONTH_DAYS
    puts = (tasks_day + listings_day) * basis.days
    archived_gb = points_day * ARCHIVED_PER_POINT * BYTES_PER_POINT * basis.kept_days / GB
    # Receipts and tasks are in Kafka about as long as they are in the ledger.
    published_day = points_day * BYTES_PER_POINT + looks_day * BYTES_PER_LOOK
    raw_gb = points_day * BYTES_PER_POINT * basis.raw_kept_days / GB
    log_gb = (raw_gb + looks_day * BYTES_PER_LOOK * basis.ledger_kept_days / GB) * kafka.replication
    partitions = config.slots + kafka.raw_partitions + kafka.ledger_partitions + 1
    rows_gb = points_day * BYTES_PER_ROW * basis.kept_days / GB
    ledger_gb = (
        looks_day * BYTES_PER_LOOK * config.ledger_retention_days
        + series_days * BYTES_PER_FOLDED_DAY * basis.kept_days
    ) / GB
    parts: list[tuple[str, Decimal, str, float | Decimal]] = [
        ("S3 PUT", puts, "requests", _d(prices.s3_usd_per_1000_puts) / 1000),
        ("S3 storage", archived_gb * months, "GB-months", prices.s3_usd_per_gb_month),
        ("Kafka brokers", prices.kafka_brokers * hours, "hours", prices.kafka_usd_per_broker_hour),
        ("Kafka partitions", partitions * hours, "hours", prices.kafka_usd_per_partition_hour),
        ("Kafka written", published_day * basis.days / GB, "GB", prices.kafka_usd_per_gb_in),
        ("Kafka read", published_day * basis.days / GB, "GB", prices.kafka_usd_per_gb_out),
        ("Kafka storage", log_gb * months, "GB-months", prices.kafka_usd_per_gb_month),
        ("PostgreSQL", hours, "hours", prices.postgres_usd_per_hour),
        ("PostgreSQL samples", rows_gb * months, "GB-months", prices.postgres_usd_per_gb_month),
        ("PostgreSQL ledger", ledger_gb * months, "GB-months", prices.postgres_usd_per_gb_month),
        ("endpoints", prices.endpoints * hours, "hours", prices.endpoint_usd_per_hour),
        ("endpoint traffic", traffic_day * basis.days / GB, "GB", prices.endpoint_usd_per_gb),
    ]
    return [
        _line(Way.HEADGATE, "", item, quantity, unit, _d(price), own=True)
        for item, quantity, unit, price in parts
    ]


def _line(
    way: Way, service: str, item: str, quantity: Decimal, unit: str, price: Decimal, *, own: bool = False
) -> Line:
    return Line(way, service, item, quantity, unit, quantity * price, quantity * price, own)


def _d(price: float | Decimal) -> Decimal:
    # By way of text: Decimal(0.01) is not 0.01.
    return Decimal(str(price))


# --- what it means --------------------------------------------------------------------------------------------
