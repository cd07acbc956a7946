"""What the report goes by: which metrics say what about a resource, when one is idle or too large, and what it costs. Pure.

The tables of this module are facts about AWS's metrics; `Report` is the configuration, the `report` section of headgate.yaml. There are no prices in it
unless you write them: a price that is made up would make a saving that is made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self

from pydantic import Field, model_validator

from shard_config.fields import AccountId, Slug, Strict, wrong

# --- what metrics say -----------------------------------------------------------------------------------------------


class Role(StrEnum):
    """What a metric says about its resource, the same for all services."""

    CPU = "cpu"
    MEMORY_FREE = "memory_free"
    MEMORY_SHARE = "memory_share"
    NETWORK_IN = "network_in"
    NETWORK_OUT = "network_out"
    DISK_READ_OPS = "disk_read_ops"
    DISK_WRITE_OPS = "disk_write_ops"
    DISK_READ_BYTES = "disk_read_bytes"
    DISK_WRITE_BYTES = "disk_write_bytes"
    LOCAL_READ_OPS = "local_read_ops"
    """Of instance stores."""
    LOCAL_WRITE_OPS = "local_write_ops"
    LOCAL_READ_BYTES = "local_read_bytes"
    LOCAL_WRITE_BYTES = "local_write_bytes"
    CONNECTIONS = "connections"
    REQUESTS = "requests"
    ERRORS = "errors"
    STORAGE_FREE = "storage_free"
    STORAGE_SHARE = "storage_share"
    BACKLOG = "backlog"


class Activity(StrEnum):
    """What a resource can be busy with; `idle` of the configuration has a limit for each."""

    CPU = "cpu"
    NETWORK = "network"
    DISK = "disk"
    CONNECTIONS = "connections"


@dataclass(frozen=True, slots=True)
class RoleMetric:
    """A metric and what it says. A `rate` is a Sum, told a second; the others are Averages as they stand.

    Where only the Average of a `rate` is collected, that is told as it stands (`sample_unit`), and says nothing a second: nobody knows of how many samples
    it is.
    """

    role: Role
    name: str
    unit: str
    """As the report tells it."""
    rate: bool = False

    @property
    def sample_unit(self) -> str:
        """Of one sample: bytes of bytes/s, count of 1/s."""
        amount = self.unit.removesuffix("/s")
        return "count" if amount == "1" else amount


@dataclass(frozen=True, slots=True)
class ServiceRoles:
    """How the series of one service are those of resources.

    A series is a resource's where its dimensions are exactly `dimensions`, so that sums over a group of resources never count as one more. The id is
    their values, joined by a slash.
    """

    namespace: str
    dimensions: tuple[str, ...]
    metrics: tuple[RoleMetric, ...]
    idle: Mapping[Activity, tuple[Role, ...]] = field(default_factory=dict)
    """By activity, the roles whose sum says how busy: each has to be known. Idle means all activities together; none: nothing is said of idle ones."""
    beside: tuple[Role, ...] = ()
    """Roles that add to the disk's activity where they are known."""
    sparse: bool = False
    """Its metrics have datapoints only while there is something to count: that there are none says neither 0 nor gap."""

    def metric(self, name: str) -> RoleMetric | None:
        return next((m for m in self.metrics if m.name == name), None)


def _rates(unit: str, **roles: str) -> tuple[RoleMetric, ...]:
    return tuple(RoleMetric(Role(role), name, unit, rate=True) for role, name in roles.items())


def _levels(unit: str, **roles: str) -> tuple[RoleMetric, ...]:
    return tuple(RoleMetric(Role(role), name, unit) for role, name in roles.items())


_NETWORK: Final = (Role.NETWORK_IN, Role.NETWORK_OUT)
_DISK: Final = (Role.DISK_READ_OPS, Role.DISK_WRITE_OPS)

ROLES: Final[Mapping[str, ServiceRoles]] = {
    "ec2": ServiceRoles(
        "AWS/EC2",
        ("InstanceId",),
        (
            *_levels("percent", cpu="CPUUtilization"),
            *_rates("bytes/s", network_in="NetworkIn", network_out="NetworkOut"),
            *_rates("1/s", disk_read_ops="EBSReadOps", disk_write_ops="EBSWriteOps"),
            *_rates("1/s", local_read_ops="DiskReadOps", local_write_ops="DiskWriteOps"),
            *_rates("bytes/s", disk_read_bytes="EBSReadBytes", disk_write_bytes="EBSWriteBytes"),
            *_rates("bytes/s", local_read_bytes="DiskReadBytes", local_write_bytes="DiskWriteBytes"),
        ),
        {Activity.CPU: (Role.CPU,), Activity.NETWORK: _NETWORK, Activity.DISK: _DISK},
        beside=(Role.LOCAL_READ_OPS, Role.LOCAL_WRITE_OPS),
    ),
    "ebs": ServiceRoles(
        "AWS/EBS",
        ("VolumeId",),
        (
            *_rates("1/s", disk_read_ops="VolumeReadOps", disk_write_ops="VolumeWriteOps"),
            *_rates("bytes/s", disk_read_bytes="VolumeReadBytes", disk_write_bytes="VolumeWriteBytes"),
        ),
        # A volume has neither processors nor a network.
        {Activity.DISK: _DISK},
        sparse=True,
    ),
    "rds": ServiceRoles(
        "AWS/RDS",
        ("DBInstanceIdentifier",),
        (
            *_levels("percent", cpu="CPUUtilization"),
            *_levels("count", connections="DatabaseConnections"),
            *_levels("bytes", memory_free="FreeableMemory", storage_free="FreeStorageSpace"),
            *_levels("1/s", disk_read_ops="ReadIOPS", disk_write_ops="WriteIOPS"),
            *_levels("bytes/s", disk_read_bytes="ReadThroughput", disk_write_bytes="WriteThroughput"),
            *_levels(
                "bytes/s", network_in="NetworkReceiveThroughput", network_out="NetworkTransmitThroughput"
            ),
        ),
        # AWS's own monitoring and backups speak to a database over its network all the time: connections tell more.
        {Activity.CPU: (Role.CPU,), Activity.CONNECTIONS: (Role.CONNECTIONS,), Activity.DISK: _DISK},
    ),
    "elasticache": ServiceRoles(
        "AWS/ElastiCache",
        ("CacheClusterId", "CacheNodeId"),
        (
            *_levels("percent", cpu="CPUUtilization", memory_share="DatabaseMemoryUsagePercentage"),
            *_levels("bytes", memory_free="FreeableMemory"),
            *_levels("count", connections="CurrConnections"),
            *_rates("bytes/s", network_in="NetworkBytesIn", network_out="NetworkBytesOut"),
            *_rates("1/s", requests="CacheHits"),
        ),
    ),
    "natgateway": ServiceRoles(
        "AWS/NATGateway",
        ("NatGatewayId",),
        (
            *_levels("count", connections="ActiveConnectionCount"),
            *_rates("bytes/s", network_in="BytesInFromSource", network_out="BytesOutToSource"),
        ),
        {Activity.CONNECTIONS: (Role.CONNECTIONS,), Activity.NETWORK: _NETWORK},
    ),
    "msk": ServiceRoles(
        "AWS/Kafka",
        ("Broker ID", "Cluster Name"),
        (
            *_levels("percent", cpu="CpuUser", storage_share="KafkaDataLogsDiskUsed"),
            *_levels("bytes/s", network_in="BytesInPerSec", network_out="BytesOutPerSec"),
        ),
    ),
    "ecs": ServiceRoles(
        "AWS/ECS",
        ("ClusterName", "ServiceName"),
        _levels("percent", cpu="CPUUtilization", memory_share="MemoryUtilization"),
    ),
    "eks": ServiceRoles(
        "ContainerInsights",
        ("ClusterName",),
        _levels(
            "percent",
            cpu="node_cpu_utilization",
            memory_share="node_memory_utilization",
            storage_share="node_filesystem_utilization",
        ),
    ),
    "lambda": ServiceRoles(
        "AWS/Lambda", ("FunctionName",), _rates("1/s", requests="Invocations", errors="Errors"), sparse=True
    ),
    "alb": ServiceRoles(
        "AWS/ApplicationELB",
        ("LoadBalancer",),
        (
            *_rates("1/s", requests="RequestCount", errors="HTTPCode_Target_5XX_Count"),
            *_rates("bytes/s", network_in="ProcessedBytes"),
        ),
        sparse=True,
    ),
    "nlb": ServiceRoles(
        "AWS/NetworkELB",
        ("LoadBalancer",),
        (*_levels("count", connections="ActiveFlowCount"), *_rates("bytes/s", network_in="ProcessedBytes")),
        sparse=True,
    ),
    "elb": ServiceRoles(
        "AWS/ELB",
        ("LoadBalancerName",),
        _rates("1/s", requests="RequestCount", errors="HTTPCode_Backend_5XX"),
        sparse=True,
    ),
    "dynamodb": ServiceRoles(
        "AWS/DynamoDB",
        ("TableName",),
        _rates("1/s", disk_read_ops="ConsumedReadCapacityUnits", disk_write_ops="ConsumedWriteCapacityUnits"),
        sparse=True,
    ),
    "kinesis": ServiceRoles(
        "AWS/Kinesis",
        ("StreamName",),
        _rates("bytes/s", network_in="IncomingBytes", network_out="GetRecords.Bytes")
        + _rates("1/s", requests="IncomingRecords"),
        sparse=True,
    ),
    "sqs": ServiceRoles(
        "AWS/SQS",
        ("QueueName",),
        _rates("1/s", requests="NumberOfMessagesSent")
        + _levels("count", backlog="ApproximateNumberOfMessagesVisible"),
        sparse=True,
    ),
    "sns": ServiceRoles(
        "AWS/SNS", ("TopicName",), _rates("1/s", requests="NumberOfMessagesPublished"), sparse=True
    ),
    "apigateway": ServiceRoles(
        "AWS/ApiGateway", ("ApiName",), _rates("1/s", requests="Count", errors="5XXError"), sparse=True
    ),
    "efs": ServiceRoles(
        "AWS/EFS",
        ("FileSystemId",),
        _rates("bytes/s", disk_read_bytes="DataReadIOBytes", disk_write_bytes="DataWriteIOBytes")
        + _rates("1/s", connections="ClientConnections"),
        sparse=True,
    ),
}
"""By service, our slug. Dimensions are sorted by name."""


# --- the configuration ------------------------------------------------------------------------------------------------


class Idle(Strict):
    """A resource is idle where each of its activities was below its limit in every hour of `days`, all together."""

    days: int = Field(14, ge=14, le=90)
    """Less than two weeks do not hold a fortnightly job."""
    cpu_percent: float = Field(5, gt=0, le=100)
    """Of the Maximum statistic. AWS's Compute Optimizer calls an instance idle below the same peak."""
    network_bytes_per_s: float = Field(1_000, gt=0)
    """In and out together. AWS's own limit, 5 MB a day, is 58 bytes a second, which an agent that reports each minute passes alone."""
    disk_ops_per_s: float = Field(2, gt=0)
    """Read and written together. Journals and logs of an unused system write about one a second."""
    connections: float = Field(1, gt=0)
    """Of the Maximum statistic: below 1 is none."""
    coverage_min: float = Field(0.95, gt=0, le=1)
    """Of the hours, so many have to be known."""

    def limit(self, activity: Activity) -> float:
        return {
            Activity.CPU: self.cpu_percent,
            Activity.NETWORK: self.network_bytes_per_s,
            Activity.DISK: self.disk_ops_per_s,
            Activity.CONNECTIONS: self.connections,
        }[activity]


class Sizing(Strict):
    """A resource is oversized where what it did in the last `Idle.days` would fit a smaller size of its family."""

    cpu_p95_percent: float = Field(60, gt=0, le=100)
    """On the smaller size. Above about 60 % queues grow faster than the load."""
    cpu_peak_percent: float = Field(90, gt=0, le=100)
    """On the smaller size, of the Maximum statistic: what was at 100 % may have wanted more."""
    memory_percent: float = Field(80, gt=0, le=100)
    """Of the smaller size's memory, where the memory in use is known."""
    network_bytes_per_s: float = Field(10_000_000, gt=0)
    """In the busiest hour, in and out together. No inventory knows a size's network; the smallest of current families have some 50 MB a second."""
    disk_ops_per_s: float = Field(500, gt=0)
    """In the busiest hour, read and written together. The smallest of current families have some thousands to EBS."""
    coverage_min: float = Field(0.8, gt=0, le=1)


class Price(Strict):
    """What one type of resource costs, as your bill or AWS's price list says."""

    service: Slug
    type: str = Field(min_length=1)
    """As the inventory calls it: m7g.large, db.m7g.large, gp3."""
    region: str = ""
    """Empty: in every region that has no price of its own."""
    usd_per_hour: float | None = Field(None, ge=0)
    engine: str = ""
    """Of databases, as postgres; empty: any that has no price of its own."""
    multi_az: bool = False
    """The price of two availability zones."""
    usd_per_gib_month: float | None = Field(None, ge=0)
    """Of allocated storage; a GiB is 2**30 bytes."""
    vcpu: float | None = Field(None, gt=0)
    memory_gib: float | None = Field(None, gt=0)
    """Sizes make a type a candidate although no account runs one yet."""

    @model_validator(mode="after")
    def _has_a_price(self) -> Self:
        if self.usd_per_hour is None and self.usd_per_gib_month is None:
            raise wrong("type", "give usd_per_hour, usd_per_gib_month, or both")
        return self


class Discount(Strict):
    """What is paid less than the list price, and why: the assumption behind every effective price."""

    name: str = Field(min_length=1)
    """As "Savings Plan 2026": printed beside each figure that rests on it."""
    share: float = Field(gt=0, lt=1)
    """0.28: a price of 100 is 72."""
    accounts: tuple[AccountId, ...] = ()
    """Empty: all."""
    services: tuple[Slug, ...] = ()
    """Empty: all."""


class Report(Strict):
    """The report: limits of its verdicts, prices, and who owns what."""

    idle: Idle = Idle()
    sizing: Sizing = Sizing()
    hours_min: int = Field(30, ge=1)
    """Of the last 14 days: a resource that reported in fewer hours is "not enough data"."""
    owner_tag: str = Field("owner", min_length=1)
    """The key of the tag that says whom a resource belongs to."""
    prices: tuple[Price, ...] = ()
    discounts: tuple[Discount, ...] = ()
    """Of those that fit, the first counts."""
