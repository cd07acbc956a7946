"""What is collected, by whom, and with what: the configuration as validated, frozen models.

Pure: nothing here reads a file, a clock or the network (`load.py` reads files). Unknown keys are refused everywhere.
Durations are whole seconds (`*_s`), money is US dollars (`*_usd`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, SecretStr, StringConstraints, Tag, model_validator

from shard_config.fields import (
    AccountId,
    HttpUrl,
    Pattern,
    Slug,
    Statistic,
    Strict,
    is_a_dsn,
    is_a_period,
    repeated,
    wrong,
)
from shard_config.inventory import Inventory
from shard_config.price_list import PriceList
from shard_config.remote_write import RemoteWrite
from shard_config.report import Report

DATAPOINTS_PER_CALL_MAX: Final = 100_800
"""GetMetricData's limit; one series of one look has to fit."""

RETENTION_S: Final = ((3600, 455 * 86_400), (300, 63 * 86_400), (60, 15 * 86_400), (1, 3 * 3600))
"""How long CloudWatch keeps points: of the first entry whose seconds divide the period, that many seconds."""


def retention_s(period_s: int) -> int:
    """How long CloudWatch answers queries of this period, seconds. Past that it answers nothing, and no error."""
    return next(kept_s for unit_s, kept_s in RETENTION_S if period_s % unit_s == 0)


class MetricProfile(Strict):
    """One metric of a service, with the statistics that are asked for."""

    name: str
    statistics: tuple[Statistic, ...] = ("Average",)
    unit: str = ""
    min: float | None = None
    max: float | None = None
    """No statistic asked for is outside of [min, max]. The simulated AWS makes up values in it."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise wrong("max", f"max {self.max:g} is below min {self.min:g}")
        if twice := repeated(self.statistics):
            raise wrong("statistics", f"{twice} stands there twice")
        return self


class Selection(Strict):
    """Which of a namespace's metrics are meant. All that is given must hold; patterns are Python's, and match the whole text."""

    metrics: tuple[Pattern, ...] = ()
    """Patterns of metric names; empty: any."""
    dimensions: Mapping[str, Pattern] = {}
    """By dimension's name, a pattern of its value; the dimension must be there."""
    dimension_names: tuple[str, ...] | None = None
    """Exactly these dimensions, in any order; None: whatever there is."""
    tags: Mapping[str, Pattern] = {}
    """By tag's key, a pattern of its value; the metric must belong to a resource with these tags."""


class Resources(Strict):
    """How a service's tagged resources (tag:GetResources) are found among its metrics."""

    types: tuple[str, ...] = Field(min_length=1)
    """As ec2:instance, the ResourceTypeFilters of tag:GetResources."""
    arns: tuple[Pattern, ...] = Field(min_length=1)
    """Patterns that are searched in an ARN; their named groups are dimensions, as instance/(?P<InstanceId>[^/]+), an underscore for a space.

    A metric that belongs to two resources is named after that of the more dimensions, or of the earlier pattern."""
    unreached: str = ""
    """What of the service no tag selects, and why: `headgate check` says so where tags are asked for."""


class ServiceProfile(Strict):
    """What is known about one AWS service's metrics: one file in shard_config/services."""

    service: Slug
    namespace: str
    period_s: Annotated[int, AfterValidator(is_a_period)] = Field(60, ge=1)
    """Resolution asked for: 1, 5, 10, 30 or a multiple of 60. Divides the poll interval."""
    poll_interval_s: int = Field(300, ge=1)
    """Length of a window, and how often a look is taken."""
    settling_s: int = Field(600, ge=0)
    """How long after a window's end its points may still appear or change."""
    discovery_interval_s: int = Field(3600, ge=60)
    recently_active: bool = False
    """Discover only what reported in the last three hours: cheaper, and wrong for daily metrics."""
    statistics: tuple[Statistic, ...] = ("Average",)
    """Used where `metrics` is "all"."""
    metrics: Annotated[
        # Told apart by their kind, so that an error is about the one that was meant.
        Annotated[tuple[MetricProfile, ...], Field(min_length=1), Tag("list")]
        | Annotated[Literal["all"], Tag("all")],
        Discriminator(lambda value: "all" if isinstance(value, str) else "list"),
    ] = "all"
    only: tuple[Selection, ...] = ()
    """What one of these means is asked for; empty: everything."""
    resources: Resources | None = None
    """For `only` by tags, and for the tags of what is collected."""
    regions: tuple[str, ...] = ()
    """Asked for in these regions only; empty: in all of an account's."""
    critical: bool = False
    """Never stretched, and never stopped, for a budget."""
    priority: int = Field(100, ge=0)
    """Where a budget is short, the lowest is stretched first."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        """Windows are whole periods, and all that a look covers fits into a call and is still kept by CloudWatch."""
        if self.poll_interval_s % self.period_s:
            raise wrong(
                "period_s", f"period_s {self.period_s} does not divide poll_interval_s {self.poll_interval_s}"
            )
        covered_s = self.poll_interval_s + self.settling_s
        points = covered_s // self.period_s
        if points > DATAPOINTS_PER_CALL_MAX:
            raise wrong(
                "settling_s",
                f"poll_interval_s + settling_s is {points:,} points of {self.period_s} s; "
                f"one call answers at most {DATAPOINTS_PER_CALL_MAX:,}",
            )
        if covered_s > retention_s(self.period_s):
            raise wrong(
                "settling_s",
                f"poll_interval_s + settling_s is {covered_s:,} s; CloudWatch keeps points of {self.period_s} s "
                f"for {retention_s(self.period_s):,} s",
            )
        if twice := repeated(self.statistics):
            raise wrong("statistics", f"{twice} stands there twice")
        if self.metrics != "all" and (twice := repeated(tuple(m.name for m in self.metrics))):
            raise wrong("metrics", f"{twice} stands there twice")
        return self


class Account(Strict):
    """One AWS account to collect from."""

    id: AccountId
    alias: str = ""
    regions: tuple[str, ...] = Field(min_length=1)
    services: tuple[Slug, ...] = Field(min_length=1)
    role_arn: Annotated[str, StringConstraints(pattern=r"^(arn:[a-z-]+:iam::[0-9]{12}:role/.+)?$")] = ""
    """Role to assume; empty: the role template of `aws`, or the ambient credentials where that is empty too."""
    external_id: SecretStr | None = None
    via: AccountId | Literal[""] = ""
    """A monitoring account (cross-account observability) that is asked for this one's metrics: its role, quotas and bill."""
    budget_usd_per_day: float | None = Field(None, gt=0)
    calls_per_s: float = Field(50, gt=0)
    """This account's GetMetricData quota in one region."""
    datapoints_per_s: float = Field(180_000, gt=0)
    """The other half of that quota, counted as range ÷ period a query; 396,000 where only older than 3 h is asked for."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.role_arn and self.role_arn.split(":")[4] != self.id:
            # Its metrics would be labelled with the wrong account.
            raise wrong("role_arn", f"the role is of account {self.role_arn.split(':')[4]}, not {self.id}")
        for key, values in (("regions", self.regions), ("services", self.services)):
            if twice := repeated(values):
                raise wrong(key, f"{twice} stands there twice")
        return self


class ExpositionJob(Strict):
    """Endpoints in Prometheus' text format, scraped as one target."""

    name: Slug
    account: Slug
    """The account label of what is scraped: nothing but a label."""
    region: Slug
    interval_s: int = Field(30, ge=1)
    timeout_s: float = Field(5, gt=0)
    endpoints: tuple[HttpUrl, ...] = ()
    """URLs, as http://host:9100/metrics."""
    endpoints_file: str = ""
    """A file in Prometheus' file_sd JSON format, read anew at each scrape: [{"targets": ["host:port"]}]."""
    series_max: int = Field(50_000, ge=1)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if bool(self.endpoints) == bool(self.endpoints_file):
            raise wrong("endpoints", "give either endpoints or endpoints_file")
        if twice := repeated(self.endpoints):
            raise wrong("endpoints", f"{twice} stands there twice")
        if self.timeout_s > self.interval_s:
            raise wrong(
                "timeout_s", f"timeout_s {self.timeout_s:g} is longer than interval_s {self.interval_s}"
            )
        return self


class Aws(Strict):
    endpoint_url: HttpUrl | Literal[""] = ""
    """A simulated AWS; empty for the real one."""
    role_template: Annotated[str, StringConstraints(pattern=r"^(arn:[a-z-]+:iam::\{account\}:role/.+)?$")] = (
        ""
    )
    """As arn:aws:iam::{account}:role/Headgate, for accounts without a role_arn of their own."""
    usd_per_1000_metrics: float = Field(0.01, ge=0)
    """GetMetricData; AWS's list price in all its commercial regions, as of 2026."""
    usd_per_1000_requests: float = Field(0.01, ge=0)
    """ListMetrics; the same."""
    requests_free_per_month: int = Field(1_000_000, ge=0)
    """Of each account."""
    statistics_count_once: bool = False
    """Read the price list so that up to five statistics of one metric are billed as one: see `price`."""
    pages_count_again: bool = True
    """Read the price list so that a continuation page is billed again: see `price`."""


class KafkaSecurity(Strict):
    """As whom, and over what, Kafka is spoken to."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = None
    """Of SASL. OAUTHBEARER is MSK's IAM: the process's own AWS credentials."""
    username: SecretStr | None = None
    password: SecretStr | None = None
    ca_file: str = ""
    """PEM certificates that brokers are checked against; empty: the system's."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        sasl = self.protocol.startswith("SASL")
        if sasl and self.mechanism is None:
            raise wrong("protocol", f"{self.protocol} needs a mechanism")
        if not sasl and self.mechanism is not None:
            raise wrong("mechanism", f"a mechanism is part of SASL, and the protocol is {self.protocol}")
        named = self.username is not None, self.password is not None
        if self.mechanism == "OAUTHBEARER":
            if self.protocol != "SASL_SSL":
                raise wrong("protocol", "OAUTHBEARER wants SASL_SSL: without TLS its token can be read")
            if any(named):
                raise wrong("mechanism", "OAUTHBEARER takes AWS credentials, and no username or password")
        elif self.mechanism is not None and not all(named):
            raise wrong("mechanism", f"{self.mechanism} needs a username and a password")
        if self.ca_file and not self.protocol.endswith("SSL"):
            raise wrong("ca_file", f"certificates are part of SSL, and the protocol is {self.protocol}")
        return self


_MSK_BROKER: Final = re.compile(r"\.kafka(?:-serverless)?\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?:")


class Kafka(Strict):
    bootstrap: Annotated[str, StringConstraints(pattern=r"^[^\s,/@]+:\d{1,5}(,[^\s,/@]+:\d{1,5})*$")] = (
        "127.0.0.1:9092"
    )
    prefix: Slug = "headgate"
    """Topics are <prefix>.collect, <prefix>.raw, <prefix>.ledger, <prefix>.dead, <prefix>.shards."""
    raw_partitions: int = Field(8, ge=1)
    ledger_partitions: int = Field(4, ge=1)
    replication: int = Field(1, ge=1)
    session_timeout_s: int = Field(15, ge=6)
    raw_retention_s: int = Field(7 * 86_400, ge=86_400)
    """Of `raw`; the other topics are small."""
    security: KafkaSecurity = KafkaSecurity()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.security.mechanism == "OAUTHBEARER" and not self.msk_region:
            raise wrong(
                "bootstrap", "OAUTHBEARER is MSK's, and this is no MSK broker: its name has the region"
            )
        return self

    @property
    def msk_region(self) -> str:
        """The AWS region in an MSK broker's name; empty where it has none."""
        found = _MSK_BROKER.search(self.bootstrap)
        return found.group(1) if found else ""

    def topic(self, name: Literal["collect", "raw", "ledger", "dead", "shards"]) -> str:
        return f"{self.prefix}.{name}"


class Postgres(Strict):
    dsn: Annotated[
        str, StringConstraints(pattern=r"^postgres(ql)?://"), AfterValidator(is_a_dsn), Field(repr=False)
    ] = "postgresql://headgate@127.0.0.1:5432/headgate"
    password: SecretStr | None = None
    capacity_bytes: int | None = Field(None, ge=1)
    """What the database may grow to: metrics and an alert tell how near it is. None: not known."""


class S3(Strict):
    bucket: str = "headgate-archive"
    endpoint_url: HttpUrl | Literal[""] = ""
    prefix: str = ""
    region: str = "us-east-1"


class Limits(Strict):
    """Caps of what is let in; the excess goes to the dead-letter topic and is counted."""

    payload_bytes_max: int = 512 * 1024
    decoded_bytes_max: int = 16 * 1024 * 1024
    series_per_batch_max: int = 5_000
    points_per_batch_max: int = 1_000_000
    series_per_target_max: int = Field(2_000_000, ge=1)
    """Of one service of a target: a listing of more is refused as a whole, and said to be."""
    dimensions_max: int = 64
    label_bytes_max: int = 4096
    future_s_max: int = 600
    retention_s: int = 455 * 86_400
    """A timestamp older than this is ancient, and so dead."""
    dead_share_max: float = Field(0.5, gt=0, le=1)
    """A consumer stops where more than this of the last 200 records of configured targets would be dead letters; 1: never."""


class Rollups(Strict):
    """Hours and days of samples, rolled up in the store: see docs/decisions/0027-rollups.md."""

    enabled: bool = True
    """Off: what lands is marked all the same, and is rolled up when it is on again, if its samples are still there."""
    hourly_retention_days: int = Field(400, ge=7)
    """Hours older than this are dropped, a month at a time: 13 months."""
    daily_retention_days: int | None = Field(None, ge=7)
    """The same of days; None: kept for ever."""


class Heal(Strict):
    """How windows that are past their deadline are healed: see `ingest.heal`."""

    attempts_max: int = Field(24, ge=1, le=100)
    """The source is asked again so often; then the window is declared forbidden or abandoned."""
    backoff_s: int = Field(300, ge=1)
    """Between the first two attempts, and twice as long each time after, up to an hour: with 24 attempts 20 hours in all."""
    usd_per_day: float = Field(10.0, ge=0)
    """The most that attempts may cost in a UTC day, over all accounts; 0: replays only."""


class Budget(Strict):
    """What CloudWatch may cost in a UTC day, over all accounts: see `ingest.budget`. Accounts have budgets of their own besides."""

    usd_per_day: float | None = Field(None, gt=0)
    hard_cap: bool = False
    """Stop services that are not critical where stretching their polls is not enough. Off: they are stretched, and an alert says so."""
    stretch_max: int = Field(12, ge=1, le=288)
    """The most poll intervals that become one."""


class Organization(Strict):
    """Accounts that AWS Organizations knows: each is collected as if it stood in `accounts`, unless it does."""

    role_arn: Annotated[str, StringConstraints(pattern=r"^(arn:[a-z-]+:iam::[0-9]{12}:role/.+)?$")] = ""
    """Of the management account or a delegated administrator, to list accounts; empty: the ambient credentials."""
    external_id: SecretStr | None = None
    """For that role, and for those of the accounts."""
    role_template: Annotated[str, StringConstraints(pattern=r"^(arn:[a-z-]+:iam::\{account\}:role/.+)?$")] = (
        ""
    )
    """Of the accounts; empty: `aws.role_template`."""
    units: tuple[
        Annotated[str, StringConstraints(pattern=r"^(r-[0-9a-z]{4,32}|ou-[0-9a-z]{4,32}-[0-9a-z]{8,32})$")],
        ...,
    ] = ()
    """Roots and organizational units, with all that is below them; empty: the whole organization."""
    tags: Mapping[str, Pattern] = {}
    """By tag's key, a pattern that the account's value matches as a whole."""
    exclude: tuple[AccountId, ...] = ()
    regions: tuple[str, ...] = ()
    """Of these accounts; empty: of `defaults`."""
    services: tuple[Slug, ...] = ()
    """Of these accounts; empty: of `defaults`."""
    budget_usd_per_day: float | None = Field(None, gt=0)
    """Of each of these accounts."""
    refresh_s: int = Field(900, ge=60)


class Run(Strict):
    """Set by `make run`; a deployment leaves it alone."""

    clock_offset_s: int = 0
    horizon_s: tuple[int, int] | None = None
    """Plan the windows of [from, to) once, and nothing else."""
    source_keeps_all: bool = False
    """Recorded data: what is old and comes back empty was empty, and has not expired."""


class Defaults(Strict):
    """For accounts that leave these out. In the file only: `load` fills the accounts."""

    regions: tuple[str, ...] = ()
    services: tuple[Slug, ...] = ()


class Config(Strict):
    """Everything. One file, `headgate.yaml`."""

    accounts: tuple[Account, ...] = ()
    organization: Organization | None = None
    exposition: tuple[ExpositionJob, ...] = ()
    services: tuple[ServiceProfile, ...] = ()
    """After loading: the shipped profiles that are in use, with the file's overrides and additions applied."""
    slots: int = Field(24, ge=1, le=10_000)
    """Partitions of the collect topic. The upper bound on shards; never shrinks."""
    tasks_in_flight: int = Field(4, ge=1)
    task_deadline_s: int = Field(120, ge=1)
    startup_lookback_s: int = Field(3600, ge=0)
    """How far back a first start plans: the last hour."""
    ledger_retention_days: int = Field(2, ge=2)
    """Tasks, looks and landed batches older than this go; windows stay, folded into days."""
    samples_retention_days: int | None = Field(None, ge=7)
    """Days of `samples` older than this are dropped, and what is older is dead on arrival; None: kept for ever."""
    rollups: Rollups = Rollups()
    aws: Aws = Aws()
    kafka: Kafka = Kafka()
    postgres: Postgres = Postgres()
    s3: S3 = S3()
    limits: Limits = Limits()
    heal: Heal = Heal()
    budget: Budget = Budget()
    prices: PriceList = PriceList()
    inventory: Inventory = Inventory()
    report: Report = Report()
    remote_write: RemoteWrite | None = None
    run: Run = Run()

    @property
    def service_by_name(self) -> Mapping[str, ServiceProfile]:
        return {s.service: s for s in self.services}

    def services_in(self, account: Account, region: str) -> list[ServiceProfile]:
        """What an account is asked for in one of its regions, in its order."""
        profiles = [self.service_by_name[name] for name in account.services]
        return [p for p in profiles if not p.regions or region in p.regions]

    @property
    def lists_resources(self) -> bool:
        """Whether exporters list tagged resources, for the labels of remote write."""
        write = self.remote_write
        return write is not None and write.resources and write.names == "yace"

    @property
    def landing_limits(self) -> Limits:
        """`limits`, with what the store no longer keeps as ancient."""
        if self.samples_retention_days is None:
            return self.limits
        kept_s = min(self.limits.retention_s, self.samples_retention_days * 86_400)
        return self.limits.model_copy(update={"retention_s": kept_s})

    @property
    def revision(self) -> str:
        """16 hexadecimal digits over what is asked for: of which accounts, jobs and services, at which grid and resolution.

        The order in which they stand in the file, connections (endpoints among them), credentials, quotas, budgets and
        priorities are no part of it: changing those asks for nothing else.
        """
        aside = {"discovery_interval_s", "resources", "critical", "priority"}
        # What came later is part of it only where it says something: a new version alone asks for nothing else.
        services = [
            s.model_dump(
                mode="json", exclude=aside | {key for key in ("only", "regions") if not getattr(s, key)}
            )
            for s in self.services
        ]
        what = {
            "accounts": sorted([a.id, sorted(a.regions), sorted(a.services)] for a in self.accounts),
            "exposition": sorted([j.account, j.region, j.name, j.interval_s] for j in self.exposition),
            "services": sorted(services, key=lambda s: str(s["service"])),
        }
        return blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()
