"""Describe and List of the simulated AWS, and AWS Config's aggregator: what `owned` has, by page and in AWS's shapes. Pure.

AWS Config's configuration items are the Describe answers with small first letters, as in AWS's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from workers.simulated.faults import Fate
from workers.simulated.owned import INSTANCE_TYPES, Owned, Raw
from workers.simulated.paging import page_of
from workers.simulated.protocols import JSON, JSON_1_1, Protocol
from workers.simulated.requests import AwsError
from workers.simulated.resources import resources_of
from workers.simulated.shapes import RestJson, Shaped, iso
from workers.world import Truth

AGGREGATOR: Final = "everything"
"""The name of the one aggregator that there is; every account has it."""

QUERY: Final[Mapping[str, Shaped]] = {
    name: Shaped(name) for name in ("ec2", "rds", "elasticache", "autoscaling")
}
"""By the name that a request is signed for: services whose requests are forms, and their answers XML."""
TARGETS: Final[Mapping[str, tuple[str, Protocol]]] = {
    "DynamoDB_20120810": ("dynamodb", JSON),
    "StarlingDoveService": ("config", JSON_1_1),
}
"""By the target's prefix: as policies call the service, and its protocol."""
PATHS: Final[Mapping[str, tuple[str, str, RestJson]]] = {
    "/2015-03-31/functions": ("lambda", "ListFunctions", RestJson("lambda")),
    "/api/v2/clusters": ("kafka", "ListClustersV2", RestJson("kafka")),
}
"""By path: as policies call the service, the operation, and its protocol."""
SERVICES: Final = frozenset(
    {*QUERY, *(name for name, _ in TARGETS.values()), *(one[0] for one in PATHS.values())}
)
NAMED: Final = SERVICES - {name for name, _ in TARGETS.values()}
"""Those whose answers are laid out by the operation's shape."""

_ENDLESS: Final = "endless-"
_TYPES: Final = {
    "AWS::EC2::Instance": "ec2",
    "AWS::EC2::Volume": "ebs",
    "AWS::RDS::DBInstance": "rds",
    "AWS::Lambda::Function": "lambda",
    "AWS::DynamoDB::Table": "dynamodb",
}
_TAG_KEYS: Final = ("Tags", "TagList")


def signed_for(authorization: str) -> str:
    """The service that a request is signed for; empty where none is."""
    found = re.search(r"Credential=[^/]+/\d+/[^/]+/([^/]+)/aws4_request", authorization)
    return found[1] if found else ""


class Answers:
    """What there is to ask, and how it is answered."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self.owned = Owned(truth)
        self.broken: dict[tuple[str, str], str] = {}
        """Accounts and regions of which the aggregator has no whole copy: the status, as FAILED."""

    def answer(
        self, account: str, region: str, operation: str, body: Mapping[str, Any], fate: Fate, serial: int
    ) -> dict[str, Any]:
        """The output of an operation. Raises AwsError for what AWS would refuse, and for what is not simulated."""
        owned = self.owned

        def page(
            items: Sequence[Any], size: int, token_in: str, token_out: str
        ) -> tuple[Sequence[Any], dict[str, str]]:
            token = str(body.get(token_in) or "")
            first = "" if token.startswith(_ENDLESS) else token
            some, after = page_of(items, size, first, operation, _refused)
            if fate.token_loop:
                after = first or page_of([0, 0], 0, "", operation, _refused)[1]
            if fate.token_endless:
                after = f"{_ENDLESS}{serial}"
            return some, {token_out: after} if after else {}

        def size(name: str, most: int) -> int:
            return min(int(body.get(name) or most), most)

        match operation:
            case "DescribeInstances":
                some, after = page(
                    owned.of(account, region, "ec2"), size("MaxResults", 1000), "NextToken", "NextToken"
                )
                return {"Reservations": [{"OwnerId": account, "Instances": [raw]} for raw in some], **after}
            case "DescribeVolumes":
                some, after = page(
                    owned.of(account, region, "ebs"), size("MaxResults", 500), "NextToken", "NextToken"
                )
                return {"Volumes": some, **after}
            case "DescribeInstanceTypes":
                return {"InstanceTypes": _types(body)}
            case "DescribeAutoScalingInstances":
                some, after = page(
                    owned.scaled(account, region), size("MaxRecords", 50), "NextToken", "NextToken"
                )
                return {"AutoScalingInstances": some, **after}
            case "DescribeDBInstances":
                some, after = page(
                    owned.of(account, region, "rds"), size("MaxRecords", 100), "Marker", "Marker"
                )
                return {"DBInstances": some, **after}
            case "DescribeDBClusters":
                some, after = page(
                    owned.clusters(account, region), size("MaxRecords", 100), "Marker", "Marker"
                )
                return {"DBClusters": some, **after}
            case "DescribeCacheClusters":
                some, after = page(
                    owned.of(account, region, "elasticache"), size("MaxRecords", 100), "Marker", "Marker"
                )
                return {"CacheClusters": some, **after}
            case "ListFunctions":
                some, after = page(
                    owned.of(account, region, "lambda"), size("MaxItems", 50), "Marker", "NextMarker"
                )
                return {"Functions": some, **after}
            case "ListClustersV2":
                some, after = page(
                    owned.of(account, region, "msk"), size("maxResults", 100), "nextToken", "NextToken"
                )
                return {"ClusterInfoList": some, **after}
            case "ListTables":
                names = [raw["TableName"] for raw in owned.of(account, region, "dynamodb")]
                some, after = page(
                    names, size("Limit", 100), "ExclusiveStartTableName", "LastEvaluatedTableName"
                )
                return {"TableNames": some, **after}
            case "DescribeTable":
                found = [
                    raw
                    for raw in owned.of(account, region, "dynamodb")
                    if raw["TableName"] == body.get("TableName")
                ]
                if not found:
                    raise AwsError(
                        "ResourceNotFoundException", f"Requested resource not found: {body.get('TableName')}"
                    )
                return {"Table": {key: value for key, value in found[0].items() if value is not None}}
            case "DescribeConfigurationAggregatorSourcesStatus":
                self._check(body)
                some, after = page(self._sources(), size("Limit", 100), "NextToken", "NextToken")
                return {"AggregatedSourceStatusList": some, **after}
            case "SelectAggregateResourceConfig":
                self._check(body)
                some, after = page(
                    self._selected(str(body.get("Expression"))), size("Limit", 100), "NextToken", "NextToken"
                )
                return {"Results": [orjson.dumps(item).decode() for item in some], **after}
        raise AwsError("UnknownOperationException", f"{operation} is not simulated")

    # --- AWS Config ---

    def _check(self, body: Mapping[str, Any]) -> None:
        if body.get("ConfigurationAggregatorName") != AGGREGATOR:
            raise AwsError(
                "NoSuchConfigurationAggregatorException", "The configuration aggregator does not exist."
            )

    def _sources(self) -> list[Raw]:
        return [
            {
                "SourceId": account,
                "SourceType": "ACCOUNT",
                "AwsRegion": region,
                "LastUpdateStatus": self.broken.get((account, region), "SUCCEEDED"),
            }
            for account in self._truth.accounts
            for region in self._truth.regions
        ]

    def _selected(self, expression: str) -> list[Raw]:
        wanted = re.fullmatch(r"SELECT [\w, ]+ WHERE resourceType = '([\w:]+)'", expression)
        if wanted is None:
            raise AwsError("InvalidExpressionException", f"{expression!r} is not simulated")
        return [
            item
            for account in self._truth.accounts
            for region in self._truth.regions
            if (account, region) not in self.broken
            for item in self._items(account, region, wanted[1])
        ]

    def _items(self, account: str, region: str, type_: str) -> list[Raw]:
        if type_ == "AWS::RDS::DBCluster":
            raws = self.owned.clusters(account, region)
        elif type_ == "AWS::AutoScaling::AutoScalingGroup":
            raws = _groups(self.owned.scaled(account, region))
        else:
            raws = self.owned.of(account, region, _TYPES[type_]) if type_ in _TYPES else []
        tags = self._tags_of(account, region)
        return [
            {
                "accountId": account,
                "awsRegion": region,
                "arn": _arn_of(raw),
                "configuration": _small(
                    {k: v for k, v in raw.items() if k not in _TAG_KEYS and v is not None}
                ),
                "tags": _small(next((raw[k] for k in _TAG_KEYS if k in raw), tags.get(_arn_of(raw), []))),
            }
            for raw in raws
        ]

    def _tags_of(self, account: str, region: str) -> dict[str, list[Raw]]:
        return {
            r.arn: [{"Key": k, "Value": v} for k, v in r.tags.items()]
            for r in resources_of(self._truth, account, region)
        }


def _arn_of(raw: Raw) -> str:
    return str(next((raw[key] for key in ("DBInstanceArn", "FunctionArn", "TableArn") if key in raw), ""))


def _groups(scaled: Sequence[Raw]) -> list[Raw]:
    found: dict[str, list[Raw]] = {}
    for one in scaled:
        instance = {"InstanceId": one["InstanceId"], "LifecycleState": one["LifecycleState"]}
        found.setdefault(one["AutoScalingGroupName"], []).append(instance)
    return [{"AutoScalingGroupName": name, "Instances": instances} for name, instances in found.items()]


def _small(value: Any) -> Any:
    """Small first letters, and times as AWS Config writes them."""
    if isinstance(value, Mapping):
        return {
            key[:1].lower() + key[1:]: iso(inner)
            if key.endswith("Time") and isinstance(inner, int)
            else _small(inner)
            for key, inner in value.items()
        }
    return [_small(one) for one in value] if isinstance(value, list) else value


def _types(body: Mapping[str, Any]) -> list[Raw]:
    """Filters are few: instance-type, by names."""
    wanted = {value for key, value in body.items() if key.startswith("Filter.1.Value.")}
    return [
        {"InstanceType": name, "VCpuInfo": {"DefaultVCpus": vcpu}, "MemoryInfo": {"SizeInMiB": memory}}
        for name, (vcpu, memory) in INSTANCE_TYPES.items()
        if not wanted or name in wanted
    ]


def _refused(message: str) -> AwsError:
    return AwsError("InvalidParameterValue", message)
