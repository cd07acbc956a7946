"""The inventory by an AWS Config aggregator: one account is asked, with one query a service, for all accounts and regions.

Guarantees:

* what the aggregator has not copied whole from an account and region (`DescribeConfigurationAggregatorSourcesStatus`) is a failed look there: its absence says nothing;
* an account that records a kind of resource not at all looks like one that has none, so an empty list ends no span (`Look.empty_is_doubtful`);
* a configuration item is read by the same functions as a Describe answer, so both sources say the same of the same resource;
* an item that is not understood fails its own scope; pages and time are bounded, and a query that fails, fails for all scopes of its service.

Config is minutes behind AWS, and a list of accounts that it aggregates is its own: accounts of the configuration that it lacks are said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from ingest.clock import Clock
from ingest.errors import HeadgateError
from ingest.inventory.asking import Asker, Listing, Sizes
from ingest.inventory.describe import Take
from ingest.inventory.model import Look, Resource, Scope
from ingest.inventory.parse import CONVERT, Beside, Raw, capitalised, instance_types, members, standing
from ingest.sources.aws import Aws
from ingest.sources.aws_errors import Denied
from shard_config.model import Account, Config

SOURCE: Final = "config"
REFRESH_S: Final = 3_600.0
"""For all of it: 100,000 resources take 500 s at two pages of 100 a second."""

TYPES: Final = {
    "ec2": "AWS::EC2::Instance",
    "ebs": "AWS::EC2::Volume",
    "rds": "AWS::RDS::DBInstance",
    "lambda": "AWS::Lambda::Function",
    "dynamodb": "AWS::DynamoDB::Table",
}
"""By service: the resource types whose configuration is the Describe answer. ElastiCache's and MSK's are not."""
_GROUPS: Final = "AWS::AutoScaling::AutoScalingGroup"
_CLUSTERS: Final = "AWS::RDS::DBCluster"

_QUERY: Final = Listing(
    "config",
    "select_aggregate_resource_config",
    "config:SelectAggregateResourceConfig",
    "Results",
    asked={"Limit": 100},
)
_STATUS: Final = Listing(
    "config",
    "describe_configuration_aggregator_sources_status",
    "config:DescribeConfigurationAggregatorSourcesStatus",
    "AggregatedSourceStatusList",
    asked={"Limit": 100},
)
ACTIONS: Final = (_STATUS.action, _QUERY.action, "ec2:DescribeInstanceTypes")
"""What the role in the aggregator's account needs."""

_Items = dict[Scope, list[Raw]]


async def aggregate(config: Config, clock: Clock, take: Take) -> None:
    """As `describe.describe`, by the aggregator that the configuration names."""
    section = config.inventory
    region = section.aggregator_region
    known = {account.id: account for account in config.accounts}
    account = known.get(section.aggregator_account) or Account(
        id=section.aggregator_account, regions=(region,), services=("config",)
    )
    aws = Aws(config, clock)
    asker = Asker(aws, clock, account, region, clock.monotonic_s() + REFRESH_S)
    try:
        query = _Query(asker, section.aggregator)
        states: Mapping[tuple[str, str], str] | HeadgateError
        try:
            states = await query.states()
        except HeadgateError as error:
            states = error
        for service in TYPES:
            at_s = clock.now_s()
            scopes = _scopes(config, service)
            if not scopes:
                continue
            if isinstance(states, HeadgateError):
                looks = [Look.failed(scope, SOURCE, at_s, str(states)) for scope in scopes]
            else:
                looks = await query.looks(service, scopes, states, at_s)
            for look in looks:
                await take(look)
    finally:
        await aws.close()


def _scopes(config: Config, service: str) -> list[Scope]:
    return [
        Scope(account.id, region, service)
        for account in config.accounts
        for region in account.regions
        if service in {profile.service for profile in config.services_in(account, region)}
    ]


class _Query:
    """One aggregator, as asked in one refresh."""

    def __init__(self, asker: Asker, name: str) -> None:
        self._asker = asker
        self._name = name
        self._sizes = Sizes()

    async def states(self) -> dict[tuple[str, str], str]:
        """By account and region: what is wrong with the aggregator's copy; empty: nothing. Raises Transient and Rejected."""
        found = await self._asker.all(_STATUS, ConfigurationAggregatorName=self._name)
        return {
            (str(one.get("SourceId")), str(one.get("AwsRegion"))): ""
            if one.get("LastUpdateStatus") == "SUCCEEDED"
            else f"{one.get('LastUpdateStatus')}: {one.get('LastErrorMessage') or 'no reason given'}"
            for one in found
            if one.get("SourceType") == "ACCOUNT"
        }

    async def looks(
        self, service: str, scopes: Sequence[Scope], states: Mapping[tuple[str, str], str], at_s: int
    ) -> list[Look]:
        """A look for each scope. Never raises for what AWS did."""
        sound = {s for s in scopes if states.get((s.account, s.region)) == ""}
        try:
            resources, failures, lacks = await self._resources(service, sound) if sound else ({}, {}, [])
        except HeadgateError as error:
            return [Look.failed(scope, SOURCE, at_s, str(error)) for scope in scopes]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            said = f"an answer was not understood: {type(error).__name__}: {error}"
            return [Look.failed(scope, SOURCE, at_s, said) for scope in scopes]
        looks = []
        for scope in scopes:
            state = states.get((scope.account, scope.region))
            if state is None:
                failures[scope] = f"the aggregator {self._name} does not have this account and region"
            elif state:
                failures[scope] = f"the aggregator's copy is not whole: {state}"
            try:
                if scope in failures:
                    looks.append(Look.failed(scope, SOURCE, at_s, failures[scope]))
                else:
                    whole = resources.get(scope, [])
                    looks.append(Look.whole(scope, SOURCE, at_s, whole, lacks, empty_is_doubtful=True))
            except HeadgateError as error:
                looks.append(Look.failed(scope, SOURCE, at_s, str(error)))
        return looks

    async def _resources(
        self, service: str, scopes: set[Scope]
    ) -> tuple[dict[Scope, list[Resource]], dict[Scope, str], list[str]]:
        """(resources, what failed, what is lacking) by scope. Items become resources page by page: they are a tenth of the size."""
        resources: dict[Scope, list[Resource]] = {}
        failures: dict[Scope, str] = {}
        lacks: list[str] = []
        beside = await self._beside(service, scopes)
        async for page in self._pages(TYPES[service]):
            items = list(_parsed(page, service, scopes, failures))
            try:
                await self._sizes.learn(self._asker, instance_types(service, [raw for _, raw in items]))
            except Denied as denied:
                lacks.append(f"sizes of types: {denied.said}")
            for scope, raw in items:
                try:
                    around = Beside(
                        self._sizes.known, {}, *beside.get((scope.account, scope.region), ({}, {}))
                    )
                    resources.setdefault(scope, []).append(CONVERT[service](scope, raw, around))
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    failures[scope] = f"an item was not understood: {type(error).__name__}: {error}"
        return resources, failures, lacks

    async def _beside(self, service: str, scopes: set[Scope]) -> dict[tuple[str, str], tuple[Any, Any]]:
        """(standing, writers) by account and region."""
        found: dict[tuple[str, str], tuple[Any, Any]] = {}
        if service not in ("ec2", "rds"):
            return found
        items: _Items = {}
        async for page in self._pages(_GROUPS if service == "ec2" else _CLUSTERS):
            for scope, raw in _parsed(page, service, scopes, {}):
                items.setdefault(scope, []).append(raw)
        for scope, raws in items.items():
            key = scope.account, scope.region
            found[key] = (standing(_instances(raws)), {}) if service == "ec2" else ({}, members(raws))
        return found

    def _pages(self, type_: str) -> Any:
        expression = f"SELECT accountId, awsRegion, arn, configuration, tags WHERE resourceType = '{type_}'"
        return self._asker.pages(_QUERY, ConfigurationAggregatorName=self._name, Expression=expression)


def _instances(groups: Iterable[Raw]) -> list[Raw]:
    """The instances of groups, as DescribeAutoScalingInstances has them."""
    return [
        {**one, "AutoScalingGroupName": group["AutoScalingGroupName"]}
        for group in groups
        for one in group.get("Instances") or ()
    ]


def _parsed(
    page: Iterable[str], service: str, scopes: set[Scope], failures: dict[Scope, str]
) -> Iterable[tuple[Scope, Raw]]:
    """The items of a page that are of these scopes, as Describe answers. Raises ValueError, KeyError for what is no item at all."""
    for text in page:
        item = orjson.loads(text)
        scope = Scope(str(item["accountId"]), str(item["awsRegion"]), service)
        if scope not in scopes:
            continue
        raw = capitalised(item.get("configuration"))
        if not isinstance(raw, dict):
            failures[scope] = "an item has no configuration"
            continue
        names = {"FunctionArn": "lambda", "TableArn": "dynamodb"}
        arn = {name: item.get("arn") for name, of in names.items() if of == service and not raw.get(name)}
        yield scope, {**raw, **arn, "Tags": capitalised(item.get("tags") or [])}
