"""The resources behind the simulated metrics as Describe calls know them: types, sizes, states, times, tags. Pure, but for what a test edits.

Whatever has metrics is there, under the ids and tags that it has elsewhere (`resources`), and nothing else; the rest is a function of the seed and the ARN. All of it runs and is
attached, for all of it has points; and it is older than its metrics, the recorded ones too. Shapes are the Describe answers' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, Final

from workers.simulated.resources import resources_of
from workers.world import Truth

Raw = dict[str, Any]

INSTANCE_TYPES: Final = {
    "t3.micro": (2, 1024), "t4g.medium": (2, 4096), "m7g.large": (2, 8192), "m7g.xlarge": (4, 16_384),
    "c7g.2xlarge": (8, 16_384), "r7g.large": (2, 16_384), "r7g.2xlarge": (8, 65_536), "m5.large": (2, 8192),
}  # fmt: skip
"""vCPU and MiB, of the types that there are: AWS's own figures."""

_EC2: Final = ("t3.micro", "m7g.large", "m7g.xlarge", "c7g.2xlarge")
_RDS: Final = ("db.t4g.medium", "db.m7g.large", "db.r7g.large", "db.r7g.2xlarge")
_CACHE: Final = ("cache.t4g.micro", "cache.r7g.large")
_BORN_S: Final = 1_700_000_000
_RECORDED_BORN_S: Final = 1_300_000_000
"""Of what recorded metrics are of: the oldest known are of 2014."""
DAY_S: Final = 86_400


class Owned:
    """What every account has. `edit` changes it, as its owner would."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self._edits: dict[tuple[str, str, str], Raw | None] = {}

    def edit(self, account: str, service: str, id_: str, **changed: Any) -> None:
        """Other attributes of a resource, by the names of its Describe answer; without any it is gone."""
        self._edits[account, service, id_] = changed or None

    def of(self, account: str, region: str, service: str) -> list[Raw]:
        """The Describe answer's items of a service, in the order of their ids."""
        make, id_key, part = _MAKERS[service]
        found = []
        for resource in resources_of(self._truth, account, region):
            if (known := re.search(part, resource.arn)) is None:
                continue
            name = known[1]
            n = int.from_bytes(blake2b(f"{self._truth.seed} {resource.arn}".encode(), digest_size=8).digest())
            born_s = (_BORN_S if self._truth.ages else _RECORDED_BORN_S) + n % (300 * DAY_S)
            raw = make(name, resource.arn, n, born_s)
            tags = [{"Key": key, "Value": value} for key, value in resource.tags.items()]
            if service == "ec2" and n % 8 == 1:
                tags.append({"Key": "aws:autoscaling:groupName", "Value": f"asg-{n % 3}"})
            if service in _TAGS:
                raw[_TAGS[service]] = tags if service != "msk" else dict(resource.tags)
            edit = self._edits.get((account, service, name), {})
            if edit is not None:
                found.append({**raw, **edit})
        found.sort(key=lambda raw: str(raw[id_key]))
        return self._related(account, region, service, found)

    def _related(self, account: str, region: str, service: str, found: list[Raw]) -> list[Raw]:
        """Volumes get their instances, and Aurora's instances their clusters: two each."""
        if service == "ebs":
            instances = [
                raw["InstanceId"]
                for raw in self.of(account, region, "ec2")
                if raw["State"]["Name"] != "terminated"
            ]
            for i, raw in enumerate(found):
                if instances and raw["State"] == "in-use":
                    attached = {
                        "InstanceId": instances[i % len(instances)],
                        "VolumeId": raw["VolumeId"],
                        "State": "attached",
                    }
                    raw["Attachments"] = [{**attached, "AttachTime": raw["CreateTime"] + 60}]
                else:
                    raw["State"] = "available"
        if service == "rds":
            for i, raw in enumerate(raw for raw in found if raw["Engine"].startswith("aurora")):
                raw["DBClusterIdentifier"] = f"aurora-{i // 2}"
        return found

    def clusters(self, account: str, region: str) -> list[Raw]:
        """DescribeDBClusters' items."""
        found: dict[str, list[Raw]] = {}
        for raw in self.of(account, region, "rds"):
            if name := raw.get("DBClusterIdentifier"):
                members = found.setdefault(name, [])
                members.append(
                    {"DBInstanceIdentifier": raw["DBInstanceIdentifier"], "IsClusterWriter": not members}
                )
        return [{"DBClusterIdentifier": name, "DBClusterMembers": members} for name, members in found.items()]

    def scaled(self, account: str, region: str) -> list[Raw]:
        """DescribeAutoScalingInstances' items; every fourth is on standby."""
        found: list[Raw] = []
        for raw in self.of(account, region, "ec2"):
            groups = [tag["Value"] for tag in raw["Tags"] if tag["Key"] == "aws:autoscaling:groupName"]
            if groups:
                state = "Standby" if len(found) % 4 == 3 else "InService"
                found.append(
                    {
                        "InstanceId": raw["InstanceId"],
                        "AutoScalingGroupName": groups[0],
                        "LifecycleState": state,
                    }
                )
        return found


# --- how each looks -----------------------------------------------------------------------------------------------


def _instance(name: str, _: str, n: int, born_s: int) -> Raw:
    type_ = _EC2[n >> 3 & 3]
    vcpu, _memory = INSTANCE_TYPES[type_]
    launched_s = born_s + n % (20 * DAY_S)
    return {
        "InstanceId": name,
        "InstanceType": type_,
        "State": {"Code": 16, "Name": "running"},
        "StateTransitionReason": "",
        "LaunchTime": launched_s,
        "CpuOptions": {"CoreCount": max(1, vcpu // 2), "ThreadsPerCore": 2 if vcpu > 1 else 1},
        "InstanceLifecycle": "spot" if n % 16 == 5 else None,
        "NetworkInterfaces": [{"Attachment": {"DeviceIndex": 0, "AttachTime": born_s}}],
    }


def _volume(name: str, _: str, n: int, born_s: int) -> Raw:
    gp3 = n % 4 != 0
    return {
        "VolumeId": name,
        "VolumeType": "gp3" if gp3 else "gp2",
        "Size": 8 << (n >> 2 & 7),
        "Iops": 3000 if gp3 else 100 + (n >> 5 & 1023),
        "Throughput": 125 if gp3 else None,
        "State": "in-use",
        "CreateTime": born_s,
        "Attachments": [],
    }


def _database(name: str, arn: str, n: int, born_s: int) -> Raw:
    aurora = n % 4 == 1
    return {
        "DBInstanceIdentifier": name,
        "DBInstanceArn": arn,
        "DBInstanceClass": _RDS[n >> 3 & 3],
        "Engine": "aurora-postgresql" if aurora else ("postgres", "mysql")[n >> 5 & 1],
        "DBInstanceStatus": "available",
        "AllocatedStorage": 1 if aurora else 20 << (n >> 6 & 3),
        "MaxAllocatedStorage": 1000 if not aurora and n >> 8 & 1 else None,
        "Iops": None if aurora else 3000,
        "StorageThroughput": None if aurora else 125,
        "MultiAZ": not aurora and bool(n >> 9 & 1),
        "InstanceCreateTime": born_s,
    }


def _cache(name: str, arn: str, n: int, born_s: int) -> Raw:
    return {
        "CacheClusterId": name,
        "ARN": arn,
        "CacheNodeType": _CACHE[n >> 3 & 1],
        "Engine": "redis",
        "NumCacheNodes": 1,
        "CacheClusterStatus": "available",
        "CacheClusterCreateTime": born_s,
        "ReplicationGroupId": f"replicas-{n >> 4 & 1}" if n % 2 else None,
    }


def _function(name: str, arn: str, n: int, _: int) -> Raw:
    return {
        "FunctionName": name,
        "FunctionArn": arn,
        "MemorySize": 128 << (n & 3),
        "LastModified": "2026-01-05T08:00:00.000+0000",
    }


def _table(name: str, arn: str, n: int, born_s: int) -> Raw:
    provisioned = n % 2
    return {
        "TableName": name,
        "TableArn": arn,
        "TableStatus": "ACTIVE",
        "CreationDateTime": float(born_s),
        "BillingModeSummary": None if provisioned else {"BillingMode": "PAY_PER_REQUEST"},
        "ProvisionedThroughput": {
            "ReadCapacityUnits": 5 * provisioned,
            "WriteCapacityUnits": 5 * provisioned,
        },
    }


def _brokers(name: str, arn: str, n: int, born_s: int) -> Raw:
    group = {
        "InstanceType": "kafka.m5.large",
        "ClientSubnets": [],
        "StorageInfo": {"EbsStorageInfo": {"VolumeSize": 100 + (n & 127)}},
    }
    return {
        "ClusterName": name,
        "ClusterArn": arn,
        "ClusterType": "PROVISIONED",
        "State": "ACTIVE",
        "CreationTime": born_s,
        "Provisioned": {"BrokerNodeGroupInfo": group, "NumberOfBrokerNodes": 3},
    }


def _balancer(name: str, arn: str, _: int, born_s: int) -> Raw:
    return {
        "LoadBalancerArn": arn,
        "LoadBalancerName": name.split("/")[1],
        "Type": "network" if name.startswith("net/") else "application",
        "State": {"Code": "active"},
        "CreatedTime": born_s,
    }


def _classic(name: str, _: str, __: int, born_s: int) -> Raw:
    return {"LoadBalancerName": name, "CreatedTime": born_s}


_MAKERS: Final[Mapping[str, tuple[Callable[[str, str, int, int], Raw], str, str]]] = {
    "ec2": (_instance, "InstanceId", r":instance/([^/]+)$"),
    "ebs": (_volume, "VolumeId", r":volume/([^/]+)$"),
    "rds": (_database, "DBInstanceIdentifier", r":db:([^:]+)$"),
    "elasticache": (_cache, "CacheClusterId", r":elasticache:.*:cluster:([^:]+)$"),
    "lambda": (_function, "FunctionName", r":function:([^:]+)$"),
    "dynamodb": (_table, "TableName", r":table/([^/]+)$"),
    "msk": (_brokers, "ClusterName", r":kafka:.*:cluster/([^/]+)/"),
    "alb": (_balancer, "LoadBalancerArn", r":loadbalancer/(app/[^/]+/[^/]+)$"),
    "nlb": (_balancer, "LoadBalancerArn", r":loadbalancer/(net/[^/]+/[^/]+)$"),
    "elb": (_classic, "LoadBalancerName", r":loadbalancer/([^/]+)$"),
}
"""By our slug: what makes one, the key of its id, and the pattern that finds the id in its ARN."""
_TAGS: Final = {"ec2": "Tags", "ebs": "Tags", "rds": "TagList", "msk": "Tags"}
"""Where the tags stand; the others' are tag:GetResources' alone."""
