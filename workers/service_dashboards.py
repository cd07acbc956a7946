"""A dashboard for each group of AWS services, of the recorded aggregates (`headgate rules`) and of the resources that stand out. Pure.

Guarantees:

* what is asked for is what shipped profiles collect and what is recorded of it: `KeyError` where a line below names anything else;
* *late points stand where they belong*: what is recorded is as of `Delay.latest_s` ago, so it is asked with that offset back, and the newest minutes of a
  graph are empty; the resources that stand out are asked as far back as their newest point may be;
* lines stay few, with hundreds of accounts too: they are by region, by account or by both, as chosen above, and averages are joined by their counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from shard_config.known import shipped_services
from shard_config.late import Delay, delay_of, spoken
from shard_config.model import MetricProfile, ServiceProfile
from shard_config.recording import LEVEL, grain_of, operations_of
from shard_config.series_names import dimension_label, metric_name
from workers.grafana import Dashboard, Panel, Query, Row, Variable

WORST: Final = 10
_UNITS: Final = {
    "Percent": "percent",
    "Bytes": "bytes",
    "Bytes/Second": "Bps",
    "Count/Second": "cps",
    "Seconds": "s",
    "Milliseconds": "ms",
    "Microseconds": "µs",
}
_PER_SECOND: Final = {"Bytes": "Bps", "Seconds": "percentunit"}
_CHOSEN: Final = 'account_id=~"$account_id",region=~"$region"'


@dataclass(frozen=True, slots=True)
class Shown:
    """One metric of a service, a statistic each line. `worst`: also the resources that stand out, by the first statistic."""

    title: str
    metric: str
    stats: tuple[str, ...]
    worst: Literal["", "highest", "lowest"] = ""
    as_sum: bool = False
    """An average that is added up over resources."""
    unit: str = ""
    """Grafana's, where the profile's says less."""
    steps: tuple[tuple[float, str], ...] = ()


_FULL: Final = ((80.0, "orange"), (90.0, "red"))
_ANY: Final = ((1.0, "red"),)

GROUPS: Final[Sequence[tuple[str, str, str, Sequence[tuple[str, str, Sequence[Shown]]]]]] = (
    (
        "compute",
        "EC2, EBS, Lambda, ECS, EKS",
        "6h",
        (
            (
                "ec2",
                "EC2",
                (
                    Shown("CPU", "CPUUtilization", ("Maximum", "Average"), "highest", steps=_FULL),
                    Shown("Network in", "NetworkIn", ("Sum",)),
                    Shown("Network out", "NetworkOut", ("Sum",)),
                    Shown("CPU credits left", "CPUCreditBalance", ("Average",), "lowest"),
                    Shown("Instance checks that fail", "StatusCheckFailed_Instance", ("Maximum",), steps=_ANY),
                ),
            ),
            (
                "ebs",
                "EBS",
                (
                    Shown("Read", "VolumeReadBytes", ("Sum",)),
                    Shown("Written", "VolumeWriteBytes", ("Sum",)),
                    Shown("Queue", "VolumeQueueLength", ("Maximum", "Average"), "highest"),
                    Shown("Burst balance", "BurstBalance", ("Minimum",), "lowest"),
                ),
            ),
            (
                "lambda",
                "Lambda",
                (
                    Shown("Invocations", "Invocations", ("Sum",), unit="reqps"),
                    Shown("Errors", "Errors", ("Sum",), "highest", unit="reqps"),
                    Shown("Throttles", "Throttles", ("Sum",), "highest", unit="reqps"),
                    Shown("Duration", "Duration", ("p95", "Average"), "highest"),
                    Shown("At once", "ConcurrentExecutions", ("Maximum",)),
                    Shown("Iterator age", "IteratorAge", ("Maximum",), "highest"),
                ),
            ),
            (
                "ecs",
                "ECS",
                (
                    Shown("CPU", "CPUUtilization", ("Maximum", "Average"), "highest", steps=_FULL),
                    Shown("Memory", "MemoryUtilization", ("Maximum", "Average"), "highest", steps=_FULL),
                ),
            ),
            (
                "eks",
                "EKS (Container Insights)",
                (
                    Shown("Nodes that fail", "cluster_failed_node_count", ("Maximum",), steps=_ANY),
                    Shown("Node CPU", "node_cpu_utilization", ("Maximum", "Average"), "highest", steps=_FULL),
                    Shown("Node memory", "node_memory_utilization", ("Maximum", "Average"), "highest", steps=_FULL),
                    Shown("Restarts", "pod_number_of_container_restarts", ("Sum",), "highest"),
                ),
            ),
        ),
    ),
    (
        "data",
        "RDS, DynamoDB, ElastiCache",
        "6h",
        (
            (
                "rds",
                "RDS",
                (
                    Shown("CPU", "CPUUtilization", ("Maximum", "Average"), "highest", steps=_FULL),
                    Shown("Free space", "FreeStorageSpace", ("Minimum",), "lowest"),
                    Shown("Free memory", "FreeableMemory", ("Minimum",), "lowest"),
                    Shown("Connections", "DatabaseConnections", ("Average",), as_sum=True),
                    Shown("Read latency", "ReadLatency", ("Maximum", "Average"), "highest"),
                    Shown("Write latency", "WriteLatency", ("Maximum", "Average"), "highest"),
                    Shown("Replicas behind", "ReplicaLag", ("Maximum",), "highest"),
                ),
            ),
            (
                "dynamodb",
                "DynamoDB",
                (
                    Shown("Read units", "ConsumedReadCapacityUnits", ("Sum",)),
                    Shown("Write units", "ConsumedWriteCapacityUnits", ("Sum",)),
                    Shown("Throttled reads", "ReadThrottleEvents", ("Sum",), "highest"),
                    Shown("Throttled writes", "WriteThrottleEvents", ("Sum",), "highest"),
                    Shown("Latency", "SuccessfulRequestLatency", ("Maximum", "Average")),
                    Shown("System errors", "SystemErrors", ("Sum",)),
                ),
            ),
            (
                "elasticache",
                "ElastiCache",
                (
                    Shown("Engine CPU", "EngineCPUUtilization", ("Maximum", "Average"), "highest", steps=_FULL),
                    Shown("Memory", "DatabaseMemoryUsagePercentage", ("Maximum", "Average"), "highest", steps=_FULL),
                    Shown("Evictions", "Evictions", ("Sum",), "highest"),
                    Shown("Hits", "CacheHits", ("Sum",)),
                    Shown("Misses", "CacheMisses", ("Sum",)),
                    Shown("Replicas behind", "ReplicationLag", ("Maximum",)),
                ),
            ),
        ),
    ),
    (
        "network",
        "ALB, NLB, ELB, NAT, CloudFront, API Gateway",
        "6h",
        (
            (
                "alb",
                "ALB",
                (
                    Shown("Requests", "RequestCount", ("Sum",), unit="reqps"),
                    Shown("5xx of targets", "HTTPCode_Target_5XX_Count", ("Sum",), "highest", unit="reqps"),
                    Shown("5xx of the balancer", "HTTPCode_ELB_5XX_Count", ("Sum",), "highest", unit="reqps"),
                    Shown("Targets' time", "TargetResponseTime", ("p99", "p50"), "highest"),
                    Shown("Unhealthy targets", "UnHealthyHostCount", ("Maximum",), "highest", steps=_ANY),
                    Shown("Connections rejected", "RejectedConnectionCount", ("Sum",)),
                ),
            ),
            (
                "nlb",
                "NLB",
                (
                    Shown("Flows", "ActiveFlowCount", ("Average",), as_sum=True),
                    Shown("Bytes", "ProcessedBytes", ("Sum",)),
                    Shown("Unhealthy targets", "UnHealthyHostCount", ("Maximum",), "highest", steps=_ANY),
                    Shown("Ports run out", "PortAllocationErrorCount", ("Sum",)),
                ),
            ),
            (
                "elb",
                "ELB (classic)",
                (
                    Shown("Requests", "RequestCount", ("Sum",), unit="reqps"),
                    Shown("5xx of backends", "HTTPCode_Backend_5XX", ("Sum",), "highest", unit="reqps"),
                    Shown("Latency", "Latency", ("p99", "Average"), "highest"),
                    Shown("Spilled over", "SpilloverCount", ("Sum",)),
                ),
            ),
            (
                "natgateway",
                "NAT gateways",
                (
                    Shown("Out to the internet", "BytesOutToDestination", ("Sum",), "highest"),
                    Shown("Ports run out", "ErrorPortAllocation", ("Sum",), "highest"),
                    Shown("Packets dropped", "PacketsDropCount", ("Sum",)),
                ),
            ),
            (
                "cloudfront",
                "CloudFront",
                (
                    Shown("Requests", "Requests", ("Sum",), "highest", unit="reqps"),
                    Shown("5xx", "5xxErrorRate", ("Average",), "highest"),
                    Shown("Cache hits", "CacheHitRate", ("Average",), "lowest"),
                    Shown("Origins' time", "OriginLatency", ("p99", "p50")),
                ),
            ),
            (
                "apigateway",
                "API Gateway",
                (
                    Shown("Requests", "Count", ("Sum",), unit="reqps"),
                    Shown("5xx (REST)", "5XXError", ("Sum",), unit="reqps"),
                    Shown("5xx (HTTP)", "5xx", ("Sum",), unit="reqps"),
                    Shown("Latency", "Latency", ("p99", "Average")),
                ),
            ),
        ),
    ),
    (
        "messaging",
        "SQS, SNS, Kinesis, MSK",
        "6h",
        (
            (
                "sqs",
                "SQS",
                (
                    Shown("Oldest message", "ApproximateAgeOfOldestMessage", ("Maximum",), "highest"),
                    Shown("Messages waiting", "ApproximateNumberOfMessagesVisible", ("Average",), "highest", as_sum=True),
                    Shown("Sent", "NumberOfMessagesSent", ("Sum",)),
                    Shown("Deleted", "NumberOfMessagesDeleted", ("Sum",)),
                ),
            ),
            (
                "sns",
                "SNS",
                (
                    Shown("Published", "NumberOfMessagesPublished", ("Sum",)),
                    Shown("Delivered", "NumberOfNotificationsDelivered", ("Sum",)),
                    Shown("Failed", "NumberOfNotificationsFailed", ("Sum",), "highest"),
                ),
            ),
            (
                "kinesis",
                "Kinesis",
                (
                    Shown("Iterator age", "GetRecords.IteratorAgeMilliseconds", ("Maximum",), "highest"),
                    Shown("In", "IncomingBytes", ("Sum",)),
                    Shown("Out", "GetRecords.Bytes", ("Sum",)),
                    Shown("Writes throttled", "WriteProvisionedThroughputExceeded", ("Sum",), "highest"),
                    Shown("Reads throttled", "ReadProvisionedThroughputExceeded", ("Sum",), "highest"),
                ),
            ),
            (
                "msk",
                "MSK",
                (
                    Shown("Partitions offline", "OfflinePartitionsCount", ("Maximum",), "highest", steps=_ANY),
                    Shown("Partitions under-replicated", "UnderReplicatedPartitions", ("Maximum",), "highest", steps=_ANY),
                    Shown("Disk used", "KafkaDataLogsDiskUsed", ("Maximum",), "highest", steps=_FULL),
                    Shown("CPU (user)", "CpuUser", ("Average",), "highest", steps=_FULL),
                    Shown("In", "BytesInPerSec", ("Average",), as_sum=True),
                    Shown("Groups behind", "MaxOffsetLag", ("Maximum",), "highest"),
                ),
            ),
        ),
    ),
    (
        "storage",
        "S3",
        "30d",
        (
            (
                "s3",
                "S3",
                (
                    Shown("Bytes", "BucketSizeBytes", ("Average",), "highest", as_sum=True),
                    Shown("Objects", "NumberOfObjects", ("Average",), "highest", as_sum=True),
                ),
            ),
        ),
    ),
)  # fmt: skip
"""Group, what it has, its span, and by service what is looked at first."""


def service_dashboards() -> list[Dashboard]:
    """One a group."""
    return [_dashboard(*group) for group in GROUPS]


def _dashboard(
    group: str, has: str, span: str, services: Sequence[tuple[str, str, Sequence[Shown]]]
) -> Dashboard:
    profiles = shipped_services()
    recorded = f'{{__name__=~"{LEVEL}:aws_.+"}}'
    return Dashboard(
        f"headgate-{group}",
        f"Headgate: {group}",
        f"{has}: what was collected, by the recording rules of `headgate rules`, and the resources that stand out. YACE's names.",
        tuple(_row(profiles[name], title, shown) for name, title, shown in services),
        (
            Variable("account_id", "Account", recorded),
            Variable("region", "Region", recorded),
            Variable("by", "A line each", choices=("region", "account_id", "account_id, region")),
        ),
        span,
        "5m",
    )


def _row(profile: ServiceProfile, title: str, shown: Sequence[Shown]) -> Row:
    metrics = {metric.name: metric for metric in profile.metrics if not isinstance(metric, str)}
    delay = delay_of(profile)
    panels: list[Panel] = []
    for one in shown:
        metric = metrics[one.metric]
        panels.append(_lines(profile, delay, metric, one))
        if one.worst:
            panels.append(_stand_out(profile, delay, metric, one))
    return Row(title, tuple(panels))


def _lines(profile: ServiceProfile, delay: Delay, metric: MetricProfile, one: Shown) -> Panel:
    queries = tuple(
        Query(_joined(profile, delay, metric, stat, one), f"{{{{account_id}}}} {{{{region}}}} {stat.lower()}")
        for stat in one.stats
    )
    summed = "Sum" in one.stats
    per = "a second" if summed else "over resources"
    what = f"{profile.namespace} {metric.name}, {' and '.join(one.stats).lower()} {per}. As of {spoken(delay.latest_s)} ago all is there."
    return Panel(one.title, what, queries, _unit(metric, one), steps=one.steps)


def _joined(profile: ServiceProfile, delay: Delay, metric: MetricProfile, stat: str, one: Shown) -> str:
    operations = operations_of(metric, stat)

    def recorded(operation: str) -> str:
        if operation not in operations:
            raise KeyError(f"{profile.service} {metric.name} {stat}: {operation} is not recorded")
        name = f"{LEVEL}:{metric_name('yace', profile.namespace, metric.name, stat)}:{operation}"
        return f"{name}{{{_CHOSEN}}} offset -{spoken(delay.latest_s)}"

    if stat not in metric.statistics:
        raise KeyError(f"{profile.service} {metric.name}: {stat} is not collected")
    if "avg" in operations and not one.as_sum:
        count = recorded("count")
        # Grafana puts `account_id, region` in for $by.
        return f"sum by ($by) ({recorded('avg')} * {count}) / sum by ($by) ({count})"
    operation = "sum" if one.as_sum else operations[0]
    joined = f"{operation} by ($by) ({recorded(operation)})"
    return f"{joined} / {profile.period_s}" if stat == "Sum" else joined


def _stand_out(profile: ServiceProfile, delay: Delay, metric: MetricProfile, one: Shown) -> Panel:
    stat = one.stats[0]
    grain = grain_of(profile, metric.name)
    if grain is None or not grain.has:
        raise KeyError(f"{profile.service} {metric.name}: what its resources are called is not known")
    labels = [dimension_label("yace", name, False) for name in grain.has]
    matchers = [f'{label}!=""' for label in labels]
    matchers += [f'{dimension_label("yace", name, False)}=""' for name in grain.has_not]
    name = metric_name("yace", profile.namespace, metric.name, stat)
    series = f"{name}{{{','.join([*matchers, _CHOSEN])}}}"
    if stat == "Sum":
        newest = f"last_over_time({series}[{spoken(profile.period_s)}] offset {spoken(delay.latest_s)}) / {profile.period_s}"
    else:
        newest = f"last_over_time({series}[{spoken(delay.newest_s)}])"
    pick, join = ("topk", "max") if one.worst == "highest" else ("bottomk", "min")
    by = ", ".join(["account_id", "region", *labels])
    legend = " ".join(f"{{{{{label}}}}}" for label in [*labels, "account_id", "region"])
    return Panel(
        f"{one.title}: {one.worst}",
        f"The {WORST} with the {one.worst} {metric.name} ({stat.lower()}), by their newest point.",
        (Query(f"{pick}({WORST}, {join} by ({by}) ({newest}))", legend),),
        _unit(metric, one),
        "bargauge",
        steps=one.steps,
        highest=100 if metric.unit == "Percent" else None,
    )


def _unit(metric: MetricProfile, one: Shown) -> str:
    if one.unit:
        return one.unit
    if one.stats[0] == "Sum":
        return _PER_SECOND.get(metric.unit, "cps")
    return _UNITS.get(metric.unit, "short")
