"""AWS's answers as resources. Pure: the same for Describe calls and for AWS Config, whose `configuration` is the Describe answer with small first letters.

Nothing is made up. vCPU and memory are what AWS says of the instance (`CpuOptions`, `ProcessorFeatures`) or of its type (DescribeInstanceTypes); a database's
or broker's class is looked up as the instance type that it names (db.m7g.large: m7g.large), and where that is none, they stay unknown. ElastiCache's
nodes have less memory than that: `cache_nodes` has what AWS documents.

What is missing in an answer raises KeyError, TypeError, ValueError or AttributeError: the caller makes a failed look of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from botocore.utils import parse_timestamp

from ingest.inventory.cache_nodes import NODES
from ingest.inventory.model import Resource, Role, Scope, State

Raw = Mapping[str, Any]

GIB: Final = 1024**3
MIB: Final = 1024**2


@dataclass(frozen=True, slots=True)
class Size:
    """Of an instance type, by DescribeInstanceTypes."""

    vcpu: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Beside:
    """What is known of a scope besides the list itself."""

    sizes: Mapping[str, Size] = field(default_factory=dict)
    """By instance type, as m7g.large."""
    tags: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By ARN, of services whose lists have none."""
    groups: Mapping[str, tuple[str, State]] = field(default_factory=dict)
    """By instance: its auto-scaling group, and STANDBY where it is out of service on purpose."""
    writers: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    """By database: its cluster, and whether it is the writer."""


Convert = Callable[[Scope, Raw, Beside], Resource]


def size_of(type_: str, sizes: Mapping[str, Size]) -> Size | None:
    """The size of an instance type, or of a class that is one by its name (db.m7g.large, kafka.m5.large); None: not known."""
    found = re.fullmatch(r"(?:(?:db|kafka)\.)?([a-z][a-z0-9-]*\.[a-z0-9-]+)", type_)
    return sizes.get(found[1]) if found else None


def instance_types(service: str, raws: Iterable[Raw]) -> set[str]:
    """The instance types whose sizes are to be looked up for a list."""
    names = {"ec2": "InstanceType", "rds": "DBInstanceClass"}
    if service == "msk":
        types = {
            str(_provisioned(raw).get("BrokerNodeGroupInfo", {}).get("InstanceType", "")) for raw in raws
        }
    elif service in names:
        types = {str(raw.get(names[service]) or "") for raw in raws}
    else:
        return set()
    return {t.removeprefix("db.").removeprefix("kafka.") for t in types} - {"", "serverless"}


# --- EC2 ----------------------------------------------------------------------------------------------------------

_INSTANCE_STATES: Final = {
    "pending": State.STARTING,
    "running": State.RUNNING,
    "stopping": State.STOPPED,
    "stopped": State.STOPPED,
    "shutting-down": State.TERMINATED,
    "terminated": State.TERMINATED,
}
_WHEN: Final = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) GMT\)")
"""In a StateTransitionReason, as: User initiated (2026-11-02 08:00:00 GMT)."""


def instance(scope: Scope, raw: Raw, beside: Beside) -> Resource:
    """Of DescribeInstances."""
    id_, type_, tags = str(raw["InstanceId"]), str(raw.get("InstanceType") or ""), tags_of(raw)
    state = _INSTANCE_STATES.get(str(raw["State"]["Name"]), State.UNKNOWN)
    launched_s = seconds(raw.get("LaunchTime"))
    said = _WHEN.search(str(raw.get("StateTransitionReason") or ""))
    left_s = seconds(f"{said[1].replace(' ', 'T')}Z") if said else None
    since_s = launched_s if state in (State.RUNNING, State.STARTING) else left_s
    group, standing = beside.groups.get(id_, ("", State.UNKNOWN))
    cpu, size = raw.get("CpuOptions") or {}, size_of(type_, beside.sizes)
    cores, threads = cpu.get("CoreCount"), cpu.get("ThreadsPerCore")
    return Resource(
        *_key(scope, id_),
        arn=_arn(scope, "ec2", f"instance/{id_}"),
        type=type_,
        purchase=str(raw.get("InstanceLifecycle") or ""),
        vcpu=int(cores) * int(threads) if cores and threads else size.vcpu if size else None,
        memory_bytes=size.memory_bytes if size else None,
        state=standing if standing and state is not State.TERMINATED else state,
        state_since_s=since_s,
        created_s=min(_born(raw, launched_s), default=None),
        group=f"asg:{group}" if group else _fleet(tags),
        tags=tags,
    )


def _born(raw: Raw, launched_s: int | None) -> Iterator[int]:
    """EC2 says when an instance was started last, and not when it was made: its first network interface is as old, and is never changed."""
    if launched_s is not None:
        yield launched_s
    for interface in raw.get("NetworkInterfaces") or ():
        attachment = interface.get("Attachment") or {}
        if attachment.get("DeviceIndex") == 0 and (at_s := seconds(attachment.get("AttachTime"))) is not None:
            yield at_s


def _fleet(tags: Mapping[str, str]) -> str:
    """By the tags that AWS itself puts, and nobody else may."""
    for key, kind in (
        ("aws:autoscaling:groupName", "asg"),
        ("aws:ec2:fleet-id", "fleet"),
        ("aws:ec2spot:fleet-request-id", "fleet"),
    ):
        if tags.get(key):
            return f"{kind}:{tags[key]}"
    return ""


def standing(raws: Iterable[Raw]) -> dict[str, tuple[str, State]]:
    """`Beside.groups`, of DescribeAutoScalingInstances, or of the instances in a group's configuration."""
    found = {}
    for raw in raws:
        life = str(raw.get("LifecycleState") or "")
        out = life.lower().startswith(("standby", "enteringstandby", "warmed"))
        found[str(raw["InstanceId"])] = (
            str(raw["AutoScalingGroupName"]),
            State.STANDBY if out else State.UNKNOWN,
        )
    return found


# --- EBS ----------------------------------------------------------------------------------------------------------

_VOLUME_STATES: Final = {
    "creating": State.STARTING,
    "available": State.DETACHED,
    "in-use": State.RUNNING,
    "deleting": State.TERMINATED,
    "deleted": State.TERMINATED,
    "error": State.FAILED,
}


def volume(scope: Scope, raw: Raw, _: Beside) -> Resource:
    """Of DescribeVolumes. Since when it is detached AWS does not say; since when it is attached it does."""
    id_ = str(raw["VolumeId"])
    state = _VOLUME_STATES.get(_name(raw["State"]), State.UNKNOWN)
    attached = [one for one in raw.get("Attachments") or () if one.get("InstanceId")]
    times = [at_s for one in attached if (at_s := seconds(one.get("AttachTime"))) is not None]
    return Resource(
        *_key(scope, id_),
        arn=_arn(scope, "ec2", f"volume/{id_}"),
        type=str(raw.get("VolumeType") or ""),
        storage_bytes=int(raw["Size"]) * GIB,
        iops=_number(raw.get("Iops")),
        throughput_bytes_per_s=_number(raw.get("Throughput"), MIB),
        state=state,
        state_since_s=min(times, default=None) if state is State.RUNNING else None,
        created_s=seconds(raw.get("CreateTime")),
        attached_to=tuple(sorted(str(one["InstanceId"]) for one in attached)),
        tags=tags_of(raw),
    )


# --- RDS ----------------------------------------------------------------------------------------------------------


def database(scope: Scope, raw: Raw, beside: Beside) -> Resource:
    """Of DescribeDBInstances. Aurora's storage grows by itself, and is not of an instance: what AWS says there is 1 GiB, and means nothing."""
    id_, type_, engine = str(raw["DBInstanceIdentifier"]), str(raw["DBInstanceClass"]), str(raw["Engine"])
    aurora = engine.startswith(("aurora", "docdb", "neptune"))
    size = size_of(type_, beside.sizes)
    features = {str(one["Name"]): int(one["Value"]) for one in raw.get("ProcessorFeatures") or ()}
    cores, threads = features.get("coreCount"), features.get("threadsPerCore")
    cluster, writes = beside.writers.get(id_, (str(raw.get("DBClusterIdentifier") or ""), None))
    role = Role.NONE if writes is None else Role.WRITER if writes else Role.READER
    if raw.get("ReadReplicaSourceDBInstanceIdentifier"):
        role = Role.REPLICA
    ceiling = _number(raw.get("MaxAllocatedStorage"), GIB)
    return Resource(
        *_key(scope, id_),
        arn=str(raw.get("DBInstanceArn") or _arn(scope, "rds", f"db:{id_}")),
        type=type_,
        engine=engine,
        vcpu=cores * threads if cores and threads else size.vcpu if size else None,
        memory_bytes=size.memory_bytes if size else None,
        storage_bytes=None if aurora else _number(raw.get("AllocatedStorage"), GIB),
        storage_max_bytes=None if aurora else ceiling,
        iops=None if aurora else _number(raw.get("Iops")),
        throughput_bytes_per_s=None if aurora else _number(raw.get("StorageThroughput"), MIB),
        state=_status(str(raw.get("DBInstanceStatus") or "")),
        created_s=seconds(raw.get("InstanceCreateTime")),
        group=f"cluster:{cluster}" if cluster else "",
        role=role,
        multi_az=_flag(raw.get("MultiAZ")),
        tags=tags_of(raw),
    )


def members(raws: Iterable[Raw]) -> dict[str, tuple[str, bool]]:
    """`Beside.writers`, of DescribeDBClusters."""
    return {
        str(one["DBInstanceIdentifier"]): (
            str(raw["DBClusterIdentifier"]),
            _flag(one.get("IsClusterWriter")) is True,
        )
        for raw in raws
        for one in raw.get("DBClusterMembers") or ()
    }


def _status(said: str) -> State:
    """Of databases, caches, tables and functions, whose words are many: what is not stopped, made or broken, works on while it is backed up or modified."""
    word = said.lower()
    if word in ("stopped", "stopping", "inactive"):
        return State.STOPPED
    if word in ("creating", "starting", "pending"):
        return State.STARTING
    if word in ("deleting", "deleted"):
        return State.TERMINATED
    if word.startswith(
        (
            "failed",
            "incompatible",
            "inaccessible",
            "restore-error",
            "storage-full",
            "create-failed",
            "insufficient",
        )
    ):
        return State.FAILED
    return State.RUNNING if word else State.UNKNOWN


# --- others -------------------------------------------------------------------------------------------------------


def cache(scope: Scope, raw: Raw, beside: Beside) -> Resource:
    """Of DescribeCacheClusters."""
    id_ = str(raw["CacheClusterId"])
    arn = str(raw.get("ARN") or _arn(scope, "elasticache", f"cluster:{id_}"))
    group = str(raw.get("ReplicationGroupId") or "")
    nodes, of_node = _number(raw.get("NumCacheNodes")), NODES.get(str(raw["CacheNodeType"]))
    return Resource(
        *_key(scope, id_),
        arn=arn,
        type=str(raw["CacheNodeType"]),
        engine=str(raw.get("Engine") or ""),
        vcpu=of_node[0] * nodes if of_node and nodes else None,
        memory_bytes=of_node[1] * nodes if of_node and nodes else None,
        nodes=nodes,
        state=_status(str(raw.get("CacheClusterStatus") or "")),
        created_s=seconds(raw.get("CacheClusterCreateTime")),
        group=f"replication:{group}" if group else "",
        tags=beside.tags.get(arn, {}),
    )


def function(scope: Scope, raw: Raw, beside: Beside) -> Resource:
    """Of ListFunctions. It says when a function was modified, and not when it was made."""
    arn = str(raw["FunctionArn"])
    return Resource(
        *_key(scope, str(raw["FunctionName"])),
        arn=arn,
        memory_bytes=_number(raw.get("MemorySize"), MIB),
        tags=beside.tags.get(arn) or tags_of(raw),
    )


def table(scope: Scope, raw: Raw, beside: Beside) -> Resource:
    """Of DescribeTable. How much it stores AWS says too, but that is no allocation, and changes all the time."""
    arn = str(raw["TableArn"])
    mode = str((raw.get("BillingModeSummary") or {}).get("BillingMode") or "PROVISIONED")
    capacity: Raw = (raw.get("ProvisionedThroughput") or {}) if mode == "PROVISIONED" else {}
    return Resource(
        *_key(scope, str(raw["TableName"])),
        arn=arn,
        type=mode,
        read_units=_number(capacity.get("ReadCapacityUnits")),
        write_units=_number(capacity.get("WriteCapacityUnits")),
        state=_status(str(raw.get("TableStatus") or "")),
        created_s=seconds(raw.get("CreationDateTime")),
        tags=beside.tags.get(arn) or tags_of(raw),
    )


def brokers(scope: Scope, raw: Raw, beside: Beside) -> Resource:
    """Of ListClustersV2: all brokers of a cluster. A serverless one has no sizes."""
    provisioned = _provisioned(raw)
    group: Raw = provisioned.get("BrokerNodeGroupInfo") or {}
    nodes, type_ = _number(provisioned.get("NumberOfBrokerNodes")), str(group.get("InstanceType") or "")
    size = size_of(type_, beside.sizes)
    ebs: Raw = (group.get("StorageInfo") or {}).get("EbsStorageInfo") or {}
    volume_bytes = _number(ebs.get("VolumeSize"), GIB)
    return Resource(
        *_key(scope, str(raw["ClusterName"])),
        arn=str(raw["ClusterArn"]),
        type=type_ or str(raw.get("ClusterType") or ""),
        engine="kafka",
        vcpu=size.vcpu * nodes if size and nodes else None,
        memory_bytes=size.memory_bytes * nodes if size and nodes else None,
        nodes=nodes,
        storage_bytes=volume_bytes * nodes if volume_bytes and nodes else None,
        state=_status(str(raw.get("State") or "")),
        created_s=seconds(raw.get("CreationTime")),
        tags=tags_of(raw),
    )


_BALANCER_STATES: Final = {"provisioning": State.STARTING, "failed": State.FAILED}


def balancer(scope: Scope, raw: Raw, beside: Beside) -> Resource:
    """Of the newer DescribeLoadBalancers (application, network) or, where there is no ARN, of the classic one. Metrics know the former by the ARN's end."""
    arn = str(raw.get("LoadBalancerArn") or "")
    id_ = arn.partition(":loadbalancer/")[2] if arn else str(raw["LoadBalancerName"])
    arn = arn or _arn(scope, "elasticloadbalancing", f"loadbalancer/{id_}")
    return Resource(
        *_key(scope, id_),
        arn=arn,
        type=str(raw.get("Type") or "classic"),
        state=_BALANCER_STATES.get(str((raw.get("State") or {}).get("Code") or ""), State.RUNNING),
        created_s=seconds(raw.get("CreatedTime")),
        tags=beside.tags.get(arn, {}),
    )


def _provisioned(raw: Raw) -> Raw:
    found: Raw = raw.get("Provisioned") or {}
    return found


CONVERT: Final[Mapping[str, Convert]] = {
    "ec2": instance,
    "ebs": volume,
    "rds": database,
    "elasticache": cache,
    "lambda": function,
    "dynamodb": table,
    "msk": brokers,
    "alb": balancer,
    "nlb": balancer,
    "elb": balancer,
}
"""By service: the services of which an inventory can be had."""


# --- what they share ----------------------------------------------------------------------------------------------


def tags_of(raw: Raw) -> Mapping[str, str]:
    """From any of the three shapes that AWS has for them."""
    listed = raw.get("Tags") or raw.get("TagList") or ()
    if isinstance(listed, Mapping):
        return {str(key): str(value) for key, value in listed.items()}
    return {str(tag["Key"]): str(tag.get("Value") or "") for tag in listed}


def seconds(value: Any) -> int | None:
    """A time as AWS writes it, a number of seconds or ISO 8601; None for none."""
    if value is None or value == "":
        return None
    if isinstance(value, int | float):
        # AWS Config has some in milliseconds.
        return int(value / 1000 if value > 1e11 else value)
    return int(parse_timestamp(value).timestamp())


def _key(scope: Scope, id_: str) -> tuple[str, str, str, str]:
    return scope.account, scope.region, scope.service, id_


def _arn(scope: Scope, service: str, rest: str) -> str:
    region = scope.region
    partition = (
        "aws-cn" if region.startswith("cn-") else "aws-us-gov" if region.startswith("us-gov-") else "aws"
    )
    return f"arn:{partition}:{service}:{region}:{scope.account}:{rest}"


def _name(value: Any) -> str:
    """A state is a word in most answers, and {"Name": word} or {"Value": word} in some of AWS Config's."""
    return str(value.get("Name") or value.get("Value") or "") if isinstance(value, Mapping) else str(value)


def _number(value: Any, unit: int = 1) -> int | None:
    return None if value is None or value == "" else int(value) * unit


def _flag(value: Any) -> bool | None:
    return None if value is None else value is True or str(value).lower() == "true"


def capitalised(value: Any) -> Any:
    """The same with the first letter of every key as in the Describe answers: AWS Config's are small."""
    if isinstance(value, Mapping):
        return {key[:1].upper() + key[1:]: capitalised(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [capitalised(inner) for inner in value]
    return value
