"""The inventory by read-only calls in every account and region: Describe and List, nothing else.

Guarantees:

* a look is the whole list of its scope; where one page of it fails, all of it has;
* a call that is denied says which permission is missing. Of the list itself: its look has failed. Of what stands beside it (sizes of types, auto-scaling
  groups, writers, tags): the look is whole and says what it lacks;
* scopes do not wait for each other's failures; time, requests in flight and pages are bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ingest.clock import Clock
from ingest.errors import HeadgateError
from ingest.inventory.asking import INSTANCE_TYPES, Asker, Listing, Sizes
from ingest.inventory.model import Look, Resource, Scope
from ingest.inventory.parse import CONVERT, Beside, Raw, instance_types, members, standing
from ingest.model import SourceName, Target
from ingest.sources.aws import Aws
from ingest.sources.aws_errors import Denied
from ingest.sources.tags import tagged_resources
from shard_config.model import Config, Resources

SOURCE: Final = "describe"
AT_ONCE: Final = 4
"""Targets."""
TARGET_S: Final = 600.0
"""For all services of an account and region: 100,000 volumes take 100 s at two pages a second."""

Take = Callable[[Look], Awaitable[None]]

# Pages of 200 instances: botocore's XML parser takes 0.6 ms for one with ten tags, and nothing else of the thread moves meanwhile.
_BALANCERS: Final = Listing(
    "elbv2", "describe_load_balancers", "elasticloadbalancing:DescribeLoadBalancers", "LoadBalancers", "Marker", "NextMarker", {"PageSize": 400}
)  # fmt: skip
_LISTINGS: Final = {
    "ec2": Listing("ec2", "describe_instances", "ec2:DescribeInstances", "Reservations", asked={"MaxResults": 200}),
    "ebs": Listing("ec2", "describe_volumes", "ec2:DescribeVolumes", "Volumes", asked={"MaxResults": 500}),
    "rds": Listing("rds", "describe_db_instances", "rds:DescribeDBInstances", "DBInstances", "Marker", asked={"MaxRecords": 100}),
    "elasticache": Listing(
        "elasticache", "describe_cache_clusters", "elasticache:DescribeCacheClusters", "CacheClusters", "Marker", asked={"MaxRecords": 100}
    ),
    "lambda": Listing("lambda", "list_functions", "lambda:ListFunctions", "Functions", "Marker", "NextMarker", {"MaxItems": 50}),
    "dynamodb": Listing(
        "dynamodb", "list_tables", "dynamodb:ListTables", "TableNames", "ExclusiveStartTableName", "LastEvaluatedTableName", {"Limit": 100}
    ),
    "msk": Listing("kafka", "list_clusters_v2", "kafka:ListClustersV2", "ClusterInfoList", asked={"MaxResults": 100}),
    "alb": _BALANCERS,
    "nlb": _BALANCERS,
    "elb": replace(_BALANCERS, client="elb", items="LoadBalancerDescriptions"),
}  # fmt: skip
_KINDS: Final = {"alb": "application", "nlb": "network"}
"""What of one list is whose."""
_TABLE: Final = Listing("dynamodb", "describe_table", "dynamodb:DescribeTable", "Table")
_GROUPS: Final = Listing(
    "autoscaling", "describe_auto_scaling_instances", "autoscaling:DescribeAutoScalingInstances",
    "AutoScalingInstances", asked={"MaxRecords": 50},
)  # fmt: skip
_CLUSTERS: Final = Listing("rds", "describe_db_clusters", "rds:DescribeDBClusters", "DBClusters", "Marker", asked={"MaxRecords": 100})  # fmt: skip
_TAGGED: Final = {
    "elasticache": "elasticache:cluster",
    "lambda": "lambda:function",
    "dynamodb": "dynamodb:table",
    "alb": "elasticloadbalancing:loadbalancer/app",
    "nlb": "elasticloadbalancing:loadbalancer/net",
    "elb": "elasticloadbalancing:loadbalancer",
}
"""Services whose lists have no tags, and what tag:GetResources calls their resources."""

ACTIONS: Final = tuple(
    sorted(
        {listing.action for listing in (*_LISTINGS.values(), _TABLE, _GROUPS, _CLUSTERS)}
        | {"ec2:DescribeInstanceTypes"}
    )
)
"""What the role needs for all of it, beside tag:GetResources."""


def asked_for(services: Collection[str]) -> list[Listing]:
    """The calls that a look at these services makes, each once, in order of their actions: for a preflight. Only DescribeTable wants a name besides."""
    found = {listing.action: listing for service, listing in _LISTINGS.items() if service in services}
    beside = {"ec2": (_GROUPS, INSTANCE_TYPES), "rds": (_CLUSTERS, INSTANCE_TYPES), "msk": (INSTANCE_TYPES,), "dynamodb": (_TABLE,)}  # fmt: skip
    found |= {one.action: one for service in services for one in beside.get(service, ())}
    return [listing for _, listing in sorted(found.items())]


async def describe(config: Config, clock: Clock, take: Take) -> None:
    """Look at every scope of the configuration of which there can be an inventory, and give each look to `take`, one at a time.

    What fails is a failed look; only what `take` raises is raised.
    """
    aws = Aws(config, clock)
    sizes, taking = Sizes(), asyncio.Lock()
    targets = iter([(account, region) for account in config.accounts for region in account.regions])

    async def work() -> None:
        for account, region in targets:
            services = [p.service for p in config.services_in(account, region) if p.service in CONVERT]
            asker = Asker(aws, clock, account, region, clock.monotonic_s() + TARGET_S)
            for service in services:
                look = await look_at(asker, service, sizes)
                async with taking:
                    await take(look)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(work())
    except* HeadgateError as errors:
        raise errors.exceptions[0] from None
    finally:
        await aws.close()


async def look_at(asker: Asker, service: str, sizes: Sizes) -> Look:
    """One look. Never raises for what AWS did."""
    scope, at_s = Scope(asker.account.id, asker.region, service), asker.clock.now_s()
    try:
        async with asyncio.timeout(max(0.0, asker.deadline_s - asker.clock.monotonic_s())):
            around = _Around(asker, sizes)
            beside = await around.of(service)
            found: list[Resource] = []
            async for raws in _pages(asker, service):
                # Page by page, for a resource takes a tenth of the memory of its answer.
                await around.learn(instance_types(service, raws))
                found += (CONVERT[service](scope, raw, beside) for raw in raws)
            return Look.whole(scope, SOURCE, at_s, found, around.lacks)
    except TimeoutError:
        return Look.failed(scope, SOURCE, at_s, f"not done within {TARGET_S:.0f} s")
    except HeadgateError as error:
        return Look.failed(scope, SOURCE, at_s, str(error))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return Look.failed(
            scope, SOURCE, at_s, f"an answer was not understood: {type(error).__name__}: {error}"
        )


async def _pages(asker: Asker, service: str) -> AsyncIterator[list[Raw]]:
    async for page in asker.pages(_LISTINGS[service]):
        match service:
            case "ec2":
                yield [raw for reservation in page for raw in reservation["Instances"]]
            case "dynamodb":
                yield [(await asker.call(_TABLE, {"TableName": name}))["Table"] for name in page]
            case "alb" | "nlb":
                yield [raw for raw in page if raw["Type"] == _KINDS[service]]
            case _:
                yield page


@dataclass(slots=True)
class _Around:
    """What is known of a scope besides its list, and what is not, for a permission that is missing."""

    asker: Asker
    sizes: Sizes
    lacks: list[str] = field(default_factory=list)

    async def of(self, service: str) -> Beside:
        """Raises Transient and Rejected, for a list that is whole now and half the next time would be a change each time."""
        groups = await self._optional(_GROUPS, "auto-scaling groups' standby") if service == "ec2" else []
        clusters = await self._optional(_CLUSTERS, "writers and readers") if service == "rds" else []
        tags = await self._tags(service) if service in _TAGGED else {}
        return Beside(self.sizes.known, tags, standing(groups), members(clusters))

    async def learn(self, types: set[str]) -> None:
        """Sizes of types, which `Beside` has then."""
        try:
            await self.sizes.learn(self.asker, types)
        except Denied as denied:
            self._lack("sizes of types", denied)

    async def _optional(self, listing: Listing, what: str) -> list[Any]:
        try:
            return await self.asker.all(listing)
        except Denied as denied:
            self._lack(what, denied)
            return []

    async def _tags(self, service: str) -> dict[str, Any]:
        asker, wanted = self.asker, Resources(types=(_TAGGED[service],), arns=(":",))
        target = Target(SourceName.CLOUDWATCH, asker.account.id, asker.region)
        try:
            return dict(
                await tagged_resources(
                    asker.aws, asker.account, target, wanted, (), asker.deadline_s, asker.tally, "grant tag:GetResources to the role"
                )
            )  # fmt: skip
        except Denied as denied:
            self._lack("tags", denied)
            return {}

    def _lack(self, what: str, denied: Denied) -> None:
        self.lacks.append(f"{what}: {denied.said}")
