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
    name: Shaped(client)
    for name, client in (
        ("ec2", "ec2"), ("rds", "rds"), ("elasticache", "elasticache"), ("autoscaling", "autoscaling"), ("elasticloadbalancing", "elbv2"),
    )
}  # fmt: skip
"""By the name that a request is signed for: services whose requests are forms, and their answers XML."""
BALANCERS: Final = {"2012-06-01": Shaped("elb"), "2015-12-01": Shaped("elbv2")}
"""By the version in the form: two services that are signed for and called the same."""
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

_LISTS: Final[Mapping[str, tuple[str, str, str, int, str, str]]] = {
    "DescribeInstances": ("ec2", "Reservations", "MaxResults", 1000, "NextToken", "NextToken"),
    "DescribeVolumes": ("ebs", "Volumes", "MaxResults", 500, "NextToken", "NextToken"),
    "DescribeAutoScalingInstances": ("scaled", "AutoScalingInstances", "MaxRecords", 50, "NextToken", "NextToken"),
    "DescribeDBInstances": ("rds", "DBInstances", "MaxRecords", 100, "Marker", "Marker"),
    "DescribeDBClusters": ("clusters", "DBClusters", "MaxRecords", 100, "Marker", "Marker"),
    "DescribeCacheClusters": ("elasticache", "CacheClusters", "MaxRecords", 100, "Marker", "Marker"),
    "DescribeLoadBalancers 2015-12-01": ("balancers", "LoadBalancers", "PageSize", 400, "Marker", "NextMarker"),
    "DescribeLoadBalancers 2012-06-01": ("elb", "LoadBalancerDescriptions", "PageSize", 400, "Marker", "NextMarker"),
    "ListFunctions": ("lambda", "Functions", "MaxItems", 50, "Marker", "NextMarker"),
    "ListClustersV2": ("msk", "ClusterInfoList", "maxResults", 100, "nextToken", "NextToken"),
    "ListTables": ("dynamodb", "TableNames", "Limit", 100, "ExclusiveStartTableName", "LastEvaluatedTableName"),
    "DescribeConfigurationAggregatorSourcesStatus": ("sources", "AggregatedSourceStatusList", "Limit", 100, "NextToken", "NextToken"),
    "SelectAggregateResourceConfig": ("items", "Results", "Limit", 100, "NextToken", "NextToken"),
}  # fmt: skip
"""By operation: what is listed, under which key, the page's size and its most, and the token's names in the request and the answer."""
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

        listed = f"{operation} {body.get('Version')}" if operation == "DescribeLoadBalancers" else operation
        if listed in _LISTS:
            kind, key, size_key, most, token_in, token_out = _LISTS[listed]
            items = self._of(account, region, kind, body)
            some, after = page(items, min(int(body.get(size_key) or most), most), token_in, token_out)
            return {key: some, **after}
        match operation:
            case "DescribeInstanceTypes":
                return {"InstanceTypes": _types(body)}
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
        raise AwsError("UnknownOperationException", f"{operation} is not simulated")

    def _of(self, account: str, region: str, kind: str, body: Mapping[str, Any]) -> Sequence[Any]:
        """All items of a list."""
        match kind:
            case "ec2":
                return [
                    {"OwnerId": account, "Instances": [raw]} for raw in self.owned.of(account, region, kind)
                ]
            case "dynamodb":
                return [raw["TableName"] for raw in self.owned.of(account, region, kind)]
            case "scaled":
                return self.owned.scaled(account, region)
            case "balancers":
                return [raw for of in ("alb", "nlb") for raw in self.owned.of(account, region, of)]
            case "clusters":
                return self.owned.clusters(account, region)
            case "sources":
                self._check(body)
                return self._sources()
            case "items":
                self._check(body)
                found = self._selected(str(body.get("Expression")))
                return [orjson.dumps(item).decode() for item in found]
        return self.owned.of(account, region, kind)

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
