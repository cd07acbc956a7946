"""The resources behind made-up metrics: their names, their ARNs as AWS shapes them, and their tags. Pure.

A resource's tags are a function of the seed and its ARN. One in eight has never been tagged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Final, NamedTuple

from workers.world import Truth

__all__ = ["Resource", "resources_of", "tags_of"]

TEAMS: Final = ("payments", "search", "data", "web")


class Resource(NamedTuple):
    """A resource of one account and region. `tags` is empty where it was never tagged."""

    arn: str
    tags: Mapping[str, str]


_ARNS: Final[Mapping[str, tuple[str, str]]] = {
    "AWS/ApiGateway": ("ApiName", "arn:aws:apigateway:{region}::/restapis/{name}"),
    "AWS/ApplicationELB": (
        "LoadBalancer",
        "arn:aws:elasticloadbalancing:{region}:{account}:loadbalancer/{name}",
    ),
    "AWS/CloudFront": ("DistributionId", "arn:aws:cloudfront::{account}:distribution/{name}"),
    "AWS/DynamoDB": ("TableName", "arn:aws:dynamodb:{region}:{account}:table/{name}"),
    "AWS/EBS": ("VolumeId", "arn:aws:ec2:{region}:{account}:volume/{name}"),
    "AWS/EC2": ("InstanceId", "arn:aws:ec2:{region}:{account}:instance/{name}"),
    "AWS/ECS": ("ClusterName", "arn:aws:ecs:{region}:{account}:cluster/{name}"),
    "AWS/ELB": ("LoadBalancerName", "arn:aws:elasticloadbalancing:{region}:{account}:loadbalancer/{name}"),
    "AWS/ElastiCache": ("CacheClusterId", "arn:aws:elasticache:{region}:{account}:cluster:{name}"),
    "AWS/Kafka": ("Cluster Name", "arn:aws:kafka:{region}:{account}:cluster/{name}/{uuid}-1"),
    "AWS/Kinesis": ("StreamName", "arn:aws:kinesis:{region}:{account}:stream/{name}"),
    "AWS/Lambda": ("FunctionName", "arn:aws:lambda:{region}:{account}:function:{name}"),
    "AWS/NATGateway": ("NatGatewayId", "arn:aws:ec2:{region}:{account}:natgateway/{name}"),
    "AWS/NetworkELB": ("LoadBalancer", "arn:aws:elasticloadbalancing:{region}:{account}:loadbalancer/{name}"),
    "AWS/RDS": ("DBInstanceIdentifier", "arn:aws:rds:{region}:{account}:db:{name}"),
    "AWS/S3": ("BucketName", "arn:aws:s3:::{name}"),
    "AWS/SNS": ("TopicName", "arn:aws:sns:{region}:{account}:{name}"),
    "AWS/SQS": ("QueueName", "arn:aws:sqs:{region}:{account}:{name}"),
    "ContainerInsights": ("ClusterName", "arn:aws:eks:{region}:{account}:cluster/{name}"),
}
"""By namespace: the dimension that names the resource, and its ARN."""


def resources_of(truth: Truth, account: str, region: str) -> list[Resource]:
    """The resources that a target's metrics are of, each once, in the order of their ARNs."""
    named = {
        (m.namespace, name, value) for m in truth.metrics(account, region) for name, value in m.dimensions
    }
    arns: set[str] = set()
    for namespace, name, value in named:
        dimension, template = _ARNS.get(namespace, ("", ""))
        if name == dimension:
            arns.add(template.format(region=region, account=account, name=value, uuid=_hex(value, 16)))
    return [Resource(arn, dict(tags_of(truth.seed, arn))) for arn in sorted(arns)]


def tags_of(seed: int, arn: str) -> Iterator[tuple[str, str]]:
    """(key, value) of a resource's tags."""
    n = int(_hex(f"{seed} {arn}", 8), 16)
    if n % 8 == 0:
        return
    yield "env", "prod" if n >> 3 & 1 else "dev"
    yield "team", TEAMS[n >> 4 & 3]
    if n >> 6 & 1:
        yield "Name", arn.rpartition(":")[2].rpartition("/")[2]


def _hex(text: str, digits: int) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()[:digits]
