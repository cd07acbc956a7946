"""What an SRE looks at first, by group of AWS services: the table that `workers.service_dashboards` makes panels of. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


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


@dataclass(frozen=True, slots=True)
class ServiceRow:
    service: str
    title: str
    shown: tuple[Shown, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """`span`: how far back its dashboard goes at first."""

    name: str
    span: str
    services: tuple[ServiceRow, ...]


_FULL: Final = ((80.0, "orange"), (90.0, "red"))
_ANY: Final = ((1.0, "red"),)

GROUPS: Final = (
    Group(
        "compute",
        "6h",
        (
            ServiceRow(
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
            ServiceRow(
                "ebs",
                "EBS",
                (
                    Shown("Read", "VolumeReadBytes", ("Sum",)),
                    Shown("Written", "VolumeWriteBytes", ("Sum",)),
                    Shown("Queue", "VolumeQueueLength", ("Maximum", "Average"), "highest"),
                    Shown("Burst balance", "BurstBalance", ("Minimum",), "lowest"),
                ),
            ),
            ServiceRow(
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
            ServiceRow(
                "ecs",
                "ECS",
                (
                    Shown("CPU", "CPUUtilization", ("Maximum", "Average"), "highest", steps=_FULL),
                    Shown("Memory", "MemoryUtilization", ("Maximum", "Average"), "highest", steps=_FULL),
                ),
            ),
            ServiceRow(
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
    Group(
        "data",
        "6h",
        (
            ServiceRow(
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
            ServiceRow(
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
            ServiceRow(
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
    Group(
        "network",
        "6h",
        (
            ServiceRow(
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
            ServiceRow(
                "nlb",
                "NLB",
                (
                    Shown("Flows", "ActiveFlowCount", ("Average",), as_sum=True),
                    Shown("Bytes", "ProcessedBytes", ("Sum",)),
                    Shown("Unhealthy targets", "UnHealthyHostCount", ("Maximum",), "highest", steps=_ANY),
                    Shown("Ports run out", "PortAllocationErrorCount", ("Sum",)),
                ),
            ),
            ServiceRow(
                "elb",
                "ELB (classic)",
                (
                    Shown("Requests", "RequestCount", ("Sum",), unit="reqps"),
                    Shown("5xx of backends", "HTTPCode_Backend_5XX", ("Sum",), "highest", unit="reqps"),
                    Shown("Latency", "Latency", ("p99", "Average"), "highest"),
                    Shown("Spilled over", "SpilloverCount", ("Sum",)),
                ),
            ),
            ServiceRow(
                "natgateway",
                "NAT gateways",
                (
                    Shown("Out to the internet", "BytesOutToDestination", ("Sum",), "highest"),
                    Shown("Ports run out", "ErrorPortAllocation", ("Sum",), "highest"),
                    Shown("Packets dropped", "PacketsDropCount", ("Sum",)),
                ),
            ),
            ServiceRow(
                "cloudfront",
                "CloudFront",
                (
                    Shown("Requests", "Requests", ("Sum",), "highest", unit="reqps"),
                    Shown("5xx", "5xxErrorRate", ("Average",), "highest"),
                    Shown("Cache hits", "CacheHitRate", ("Average",), "lowest"),
                    Shown("Origins' time", "OriginLatency", ("p99", "p50")),
                ),
            ),
            ServiceRow(
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
    Group(
        "messaging",
        "6h",
        (
            ServiceRow(
                "sqs",
                "SQS",
                (
                    Shown("Oldest message", "ApproximateAgeOfOldestMessage", ("Maximum",), "highest"),
                    Shown("Messages waiting", "ApproximateNumberOfMessagesVisible", ("Average",), "highest", as_sum=True),
                    Shown("Sent", "NumberOfMessagesSent", ("Sum",)),
                    Shown("Deleted", "NumberOfMessagesDeleted", ("Sum",)),
                ),
            ),
            ServiceRow(
                "sns",
                "SNS",
                (
                    Shown("Published", "NumberOfMessagesPublished", ("Sum",)),
                    Shown("Delivered", "NumberOfNotificationsDelivered", ("Sum",)),
                    Shown("Failed", "NumberOfNotificationsFailed", ("Sum",), "highest"),
                ),
            ),
            ServiceRow(
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
            ServiceRow(
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
    Group(
        "storage",
        "30d",
        (
            ServiceRow(
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
"""Every shipped service is in one."""
