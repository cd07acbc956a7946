"""Recording rules, made from service profiles: the aggregates over resources that dashboards ask for, by account and region. Pure.

Guarantees:

* *Nothing counts twice*: CloudWatch has one metric by several sets of dimensions (a load balancer's requests, the same by zone, by target group); one
  set is taken. Where it is not known which, nothing is recorded, and a comment says so.
* *What is recorded is true*: it is as of `Delay.latest_s` ago, when all points are there, the same for all metrics of a service. So a sample of time t is
  about t - latest_s; in a graph, `offset -16m` puts it where it belongs.
* *An average stays what it is*: avg is the mean over resources, each counting once, whatever it had to do. With `count` beside it averages of
  accounts can be joined rightly: sum(avg * count) / sum(count).

Names are level:metric:operation, as account_region:aws_ec2_networkin_sum:sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from shard_config.known import shipped_services
from shard_config.late import LOOKBACK_S, Delay, delay_of, spoken
from shard_config.model import Config, MetricProfile, ServiceProfile
from shard_config.series_names import Style, dimension_label, metric_name

LEVEL: Final = "account_region"
_BY: Final[Mapping[Style, tuple[str, ...]]] = {
    "yace": ("account_id", "account_alias", "region"),
    "headgate": ("account", "account_alias", "region", "stat"),
}
_ADDITIVE: Final = frozenset(("Bytes", "Count", "Bytes/Second", "Count/Second"))
_OF_ONE_EVENT: Final = frozenset(("PublishSize", "SentMessageSize"))
"""In bytes, but of a message: their sum over resources is nothing."""


@dataclass(frozen=True, slots=True)
class Grain:
    """The set of dimensions that is taken: those that must be there, and those that must not."""

    has: tuple[str, ...] = ()
    has_not: tuple[str, ...] = ()


_BALANCER: Final = Grain(("LoadBalancer",), ("TargetGroup", "AvailabilityZone"))
_TARGETS: Final = Grain(("LoadBalancer",), ("AvailabilityZone",))
_BROKER: Final = Grain(("Broker ID",), ("Topic",))
_GRAINS: Final[Mapping[str, Grain]] = {
    "AWS/ApiGateway": Grain((), ("Stage",)),
    "AWS/ApplicationELB": _BALANCER,
    "AWS/CloudFront": Grain(("DistributionId",)),
    "AWS/DynamoDB": Grain(("TableName",)),
    "AWS/EBS": Grain(("VolumeId",)),
    "AWS/EC2": Grain(("InstanceId",)),
    "AWS/ECS": Grain(("ServiceName",)),
    "AWS/ELB": Grain(("LoadBalancerName",), ("AvailabilityZone",)),
    "AWS/ElastiCache": Grain(("CacheClusterId",), ("CacheNodeId",)),
    "AWS/Kafka": _BROKER,
    "AWS/Kinesis": Grain(("StreamName",), ("ShardId",)),
    "AWS/Lambda": Grain(("FunctionName",), ("Resource",)),
    "AWS/NATGateway": Grain(("NatGatewayId",)),
    "AWS/NetworkELB": _BALANCER,
    "AWS/RDS": Grain(("DBInstanceIdentifier",)),
    "AWS/S3": Grain(("BucketName",)),
    "AWS/SNS": Grain(("TopicName",)),
    "AWS/SQS": Grain(("QueueName",)),
}
"""By namespace, what its metrics are of as a rule (AWS's page of each service, 2026-11)."""
_CLUSTER: Final = Grain(("Cluster Name",), ("Broker ID",))
_METRICS: Final[Mapping[tuple[str, str], Grain]] = {
    ("AWS/ApplicationELB", "HealthyHostCount"): _TARGETS,
    ("AWS/ApplicationELB", "UnHealthyHostCount"): _TARGETS,
    ("AWS/NetworkELB", "HealthyHostCount"): _TARGETS,
    ("AWS/NetworkELB", "UnHealthyHostCount"): _TARGETS,
    ("AWS/DynamoDB", "UserErrors"): Grain((), ("TableName",)),
    ("AWS/ECS", "CPUReservation"): Grain(("ClusterName",), ("ServiceName",)),
    ("AWS/ECS", "MemoryReservation"): Grain(("ClusterName",), ("ServiceName",)),
    ("AWS/Lambda", "UnreservedConcurrentExecutions"): Grain(),
    ("AWS/Kafka", "ActiveControllerCount"): _CLUSTER,
    ("AWS/Kafka", "OfflinePartitionsCount"): _CLUSTER,
    ("AWS/Kafka", "GlobalPartitionCount"): _CLUSTER,
    ("AWS/Kafka", "GlobalTopicCount"): _CLUSTER,
    ("AWS/Kafka", "MaxOffsetLag"): Grain(("Consumer Group",)),
    ("AWS/Kafka", "EstimatedMaxTimeLag"): Grain(("Consumer Group",)),
}
_KUBERNETES: Final[Mapping[str, Grain]] = {
    "cluster": Grain(("ClusterName",), ("NodeName", "Namespace")),
    "namespace": Grain(("Namespace",), ("Service", "PodName")),
    "service": Grain(("Service",), ("PodName",)),
    "node": Grain(("NodeName",)),
    "pod": Grain(("PodName",), ("FullPodName",)),
}
"""Container Insights, by the first word of a metric's name."""


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    expr: str


@dataclass(frozen=True, slots=True)
class Recording:
    """The rules of one service, evaluated together. `left_out`: metrics that are not recorded, and why."""

    service: str
    delay: Delay
    interval_s: int
    records: tuple[Record, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def grain_of(profile: ServiceProfile, metric: str) -> Grain | None:
    """The set of dimensions that is added up; None where that is not known."""
    if (profile.namespace, metric) in _METRICS:
        return _METRICS[profile.namespace, metric]
    if profile.namespace == "ContainerInsights":
        return _KUBERNETES.get(metric.split("_", 1)[0])
    if profile.namespace in _GRAINS:
        return _GRAINS[profile.namespace]
    # Where one set of dimensions alone is asked for nothing can count twice.
    sets = {only.dimension_names for only in profile.only}
    return Grain() if len(sets) == 1 and None not in sets and () not in sets else None


def operations_of(metric: MetricProfile, stat: str) -> tuple[str, ...]:
    """How a statistic's values are joined over resources: the operations that say something."""
    if stat in ("Sum", "SampleCount"):
        return ("sum",)
    if stat == "Minimum":
        return ("min",)
    if stat == "Maximum" or stat.startswith("p"):
        return ("max",)
    added = metric.unit in _ADDITIVE and metric.name not in _OF_ONE_EVENT
    return ("avg", "count", "sum") if added else ("avg", "count")


def recordings_of(config: Config | None) -> list[Recording]:
    """For what a configuration collects, as its receivers have it; for all shipped services where there is none."""
    if config is None:
        return [_recording(p, "yace", False, delay_of(p)) for p in shipped_services().values()]
    collected = {name for account in config.accounts for name in account.services}
    if config.organization is not None:
        collected |= set(config.organization.services)
    sink = config.remote_write
    return [
        _recording(
            p,
            sink.names if sink else "yace",
            sink.snake_case if sink else False,
            delay_of(p, sink.receivers if sink else ()),
        )
        for p in sorted(config.services, key=lambda p: p.service)
        if p.service in collected
    ]


def _recording(profile: ServiceProfile, style: Style, snake_case: bool, delay: Delay) -> Recording:
    records: list[Record] = []
    left_out: list[tuple[str, str]] = []
    metrics: tuple[MetricProfile, ...] = ()
    if profile.metrics == "all":
        left_out.append(("all", "list its metrics, so that their names are known"))
    else:
        metrics = profile.metrics
    for metric in metrics:
        grain = grain_of(profile, metric.name)
        if grain is None:
            left_out.append(
                (
                    metric.name,
                    "which dimensions to add up is not known: ask for one set (only: dimension_names)",
                )
            )
            continue
        for stat in metric.statistics:
            records += _records(profile, style, snake_case, delay, metric, stat, grain)
    # Not less often than Prometheus looks back, or there would be holes in what was recorded.
    return Recording(
        profile.service, delay, min(profile.period_s, LOOKBACK_S), tuple(records), tuple(left_out)
    )


def _records(
    profile: ServiceProfile,
    style: Style,
    snake_case: bool,
    delay: Delay,
    metric: MetricProfile,
    stat: str,
    grain: Grain,
) -> Iterator[Record]:
    name = metric_name(style, profile.namespace, metric.name, stat)
    matchers = [f'{dimension_label(style, d, snake_case)}!=""' for d in grain.has]
    matchers += [f'{dimension_label(style, d, snake_case)}=""' for d in grain.has_not]
    if style == "headgate":
        matchers += [f'period="{profile.period_s}"', f'stat="{stat}"']
    selector = name + (f"{{{','.join(matchers)}}}" if matchers else "")
    # A sum is of its period alone, or what came once would count for as long as Prometheus looks back.
    alone = stat in ("Sum", "SampleCount") or profile.period_s >= LOOKBACK_S
    span = f"[{spoken(profile.period_s)}]" if alone else ""
    asked = f"{selector}{span} offset {spoken(delay.latest_s)}"
    for operation in operations_of(metric, stat):
        value = f"last_over_time({asked})" if alone else asked
        yield Record(f"{LEVEL}:{name}:{operation}", f"{operation} by ({', '.join(_BY[style])}) ({value})")


# --- text -----------------------------------------------------------------------------------------------------

_HEAD: Final = """\
# Recording rules for Prometheus: `headgate rules` makes this file.
# Each is as of so long ago, when all points are there: docs/decisions/0023-late-data-in-prometheus.md. Load it with `rule_files`.
"""
_RESOURCE: Final = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: headgate-recording
spec:
"""


def render(recordings: list[Recording], form: str) -> str:
    """A rule file, or (`form` prometheusrule) a resource of the operator."""
    indent = "  " if form == "prometheusrule" else ""
    lines = [indent + line if line else line for line in _lines(recordings)]
    return _HEAD + (_RESOURCE if indent else "") + "\n".join(lines) + "\n"


def _lines(recordings: list[Recording]) -> Iterator[str]:
    found = [r for r in recordings if r.records]
    yield "groups:" if found else "groups: []"
    for one in recordings:
        for metric, why in one.left_out:
            yield f"  # not recorded: {one.service} {metric}; {why}"
        if not one.records:
            continue
        if one.delay.refused:
            yield f"  # {one.service}: {one.delay.refused}"
        yield f"  - name: headgate-recording-{one.service}"
        yield f"    interval: {spoken(one.interval_s)}"
        yield "    rules:"
        for record in one.records:
            yield f"      - record: {record.name}"
            yield f"        expr: {record.expr}"
