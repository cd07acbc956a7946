"""What is collected, by whom, and with what: the configuration as validated, frozen models.

Pure: nothing here reads a file, a clock or the network (`load.py` reads files). Unknown keys are refused everywhere.
Durations are whole seconds (`*_s`), money is US dollars (`*_usd`).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator

AccountId = Annotated[str, StringConstraints(pattern=r"^\d{12}$")]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Statistic = Annotated[
    str,
    StringConstraints(pattern=r"^(Average|Sum|Minimum|Maximum|SampleCount|p\d{1,2}(\.\d{1,2})?|IQM|tm\d{1,2})$"),
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MetricProfile(Strict):
    """One metric of a service, with the statistics that are asked for."""

    name: str
    statistics: tuple[Statistic, ...] = ("Average",)
    unit: str = ""
    min: float | None = None
    max: float | None = None


class ServiceProfile(Strict):
    """What is known about one AWS service's metrics: one file in shard_config/services."""

    service: Slug
    namespace: str
    period_s: int = Field(60, ge=1)
    """Resolution asked for. Divides the poll interval."""
    poll_interval_s: int = Field(300, ge=1)
    """Length of a window, and how often a look is taken."""
    settling_s: int = Field(600, ge=0)
    """How long after a window's end its points may still appear or change."""
    discovery_interval_s: int = Field(3600, ge=60)
    recently_active: bool = False
    """Discover only what reported in the last three hours: cheaper, and wrong for daily metrics."""
    statistics: tuple[Statistic, ...] = ("Average",)
    """Used where `metrics` is "all"."""
    metrics: tuple[MetricProfile, ...] | Literal["all"] = "all"
    critical: bool = False
    priority: int = Field(100, ge=0)

    @model_validator(mode="after")
    def _period_divides_poll_interval(self) -> Self:
        if self.poll_interval_s % self.period_s:
            raise ValueError(
                f"period_s {self.period_s} does not divide poll_interval_s {self.poll_interval_s}"
            )
        return self


class Account(Strict):
    """One AWS account to collect from."""

    id: AccountId
    alias: str = ""
    regions: tuple[str, ...] = Field(min_length=1)
    services: tuple[Slug, ...] = Field(min_length=1)
    role_arn: str = ""
    """Role to assume; empty: the role template of `aws`, or the ambient credentials where that is empty too."""
    external_id: SecretStr | None = None
    budget_usd_per_day: float | None = Field(None, gt=0)
    calls_per_s: float = Field(50, gt=0)
    """This account's GetMetricData quota in one region."""
    datapoints_per_s: float = Field(180_000, gt=0)
    """The other half of that quota, counted as range ÷ period a query; 396,000 where only older than 3 h is asked for."""


class ExpositionJob(Strict):
    """Endpoints in Prometheus' text format, scraped as one target."""

    name: Slug
    account: Slug
    """The account label of what is scraped: nothing but a label."""
    region: Slug
    interval_s: int = Field(30, ge=1)
    timeout_s: float = Field(5, gt=0)
    endpoints: tuple[str, ...] = ()
    """URLs, as http://host:9100/metrics."""
    endpoints_file: str = ""
    """A file in Prometheus' file_sd JSON format, read anew at each scrape: [{"targets": ["host:port"]}]."""
    series_max: int = Field(50_000, ge=1)

    @model_validator(mode="after")
    def _has_endpoints(self) -> Self:
        if bool(self.endpoints) == bool(self.endpoints_file):
            raise ValueError("give either endpoints or endpoints_file")
        return self


class Aws(Strict):
    endpoint_url: str = ""
    """A simulated AWS; empty for the real one."""
    role_template: str = ""
    """As arn:aws:iam::{account}:role/Headgate, for accounts without a role_arn of their own."""
    usd_per_1000_metrics: float = Field(0.01, ge=0)


class Kafka(Strict):
    bootstrap: str = "127.0.0.1:9092"
    prefix: Slug = "headgate"
    """Topics are <prefix>.collect, <prefix>.raw, <prefix>.ledger, <prefix>.dead."""
    raw_partitions: int = Field(8, ge=1)
    ledger_partitions: int = Field(4, ge=1)
    replication: int = Field(1, ge=1)
    session_timeout_s: int = Field(15, ge=6)

    def topic(self, name: Literal["collect", "raw", "ledger", "dead"]) -> str:
        return f"{self.prefix}.{name}"


class Postgres(Strict):
    dsn: str = "postgresql://headgate@127.0.0.1:5432/headgate"
    password: SecretStr | None = None


class S3(Strict):
    bucket: str = "headgate-archive"
    endpoint_url: str = ""
    prefix: str = ""
    region: str = "us-east-1"


class Limits(Strict):
    """Caps of what is let in; the excess goes to the dead-letter topic and is counted."""

    payload_bytes_max: int = 512 * 1024
    decoded_bytes_max: int = 16 * 1024 * 1024
    series_per_batch_max: int = 5_000
    points_per_batch_max: int = 1_000_000
    dimensions_max: int = 64
    label_bytes_max: int = 4096
    future_s_max: int = 600
    retention_s: int = 455 * 86_400
    """A timestamp older than this is ancient, and so dead."""


class Run(Strict):
    """Set by `make run`; a deployment leaves it alone."""

    clock_offset_s: int = 0
    horizon_s: tuple[int, int] | None = None
    """Plan the windows of [from, to) once, and nothing else."""


class Config(Strict):
    """Everything. One file, `headgate.yaml`."""

    accounts: tuple[Account, ...] = ()
    exposition: tuple[ExpositionJob, ...] = ()
    services: tuple[ServiceProfile, ...] = ()
    """After loading: the shipped profiles that are in use, with the file's overrides and additions applied."""
    slots: int = Field(24, ge=1)
    """Partitions of the collect topic. The upper bound on shards; never shrinks."""
    tasks_in_flight: int = Field(4, ge=1)
    task_deadline_s: int = Field(120, ge=1)
    startup_lookback_s: int = Field(3600, ge=0)
    """How far back a first start plans: the last hour."""
    aws: Aws = Aws()
    kafka: Kafka = Kafka()
    postgres: Postgres = Postgres()
    s3: S3 = S3()
    limits: Limits = Limits()
    run: Run = Run()

    @property
    def service_by_name(self) -> Mapping[str, ServiceProfile]:
        return {s.service: s for s in self.services}

    @property
    def revision(self) -> str:
        """16 hexadecimal digits over what decides which windows there are; connections and secrets are no part of it."""
        what = self.model_dump_json(include={"accounts", "exposition", "services"})
        return blake2b(what.encode(), digest_size=8).hexdigest()
