"""What the simulated AWS knows beside metrics: Organizations, tags, and accounts that monitor others; by AWS's own client."""

from __future__ import annotations

import re
from typing import Any

import aiohttp
import pytest
from botocore.exceptions import ClientError

from ingest.errors import Fatal
from shard_config.load import shipped_services
from tests.simulated_scene import (
    FIRST,
    NOW_S,
    REGION,
    SECOND,
    TRUTH,
    asked,
    assume,
    client,
    code_of,
    on_wire,
    query,
    running,
)
from workers.simulated.resources import resources_of
from workers.simulator import Simulator, links_of
from workers.world import World, account_ids

MANY = World(1, account_ids(120), (REGION,), 4, tuple(shipped_services().values())[:1])
EVERYTHING = World(
    1, account_ids(1), (REGION,), 40 * len(shipped_services()), tuple(shipped_services().values())
)


async def pages_of(client: Any, operation: str, key: str, **request: Any) -> list[list[Any]]:
    return [page[key] async for page in client.get_paginator(operation).paginate(**request)]


async def walk(organizations: Any, parent: str) -> dict[str, list[str]]:
    """Accounts by the unit or root that they stand in, down from `parent`."""
    accounts = await pages_of(organizations, "list_accounts_for_parent", "Accounts", ParentId=parent)
    found = {parent: [account["Id"] for page in accounts for account in page]}
    units = await pages_of(
        organizations, "list_organizational_units_for_parent", "OrganizationalUnits", ParentId=parent
    )
    for unit in (unit for page in units for unit in page):
        found |= await walk(organizations, unit["Id"])
    return found


# --- Organizations --------------------------------------------------------------------------------------------


async def test_an_organization_lists_its_accounts_twenty_a_page_and_the_suspended_ones_with_them() -> None:
    async with running(MANY) as sim, client(sim, "organizations") as organizations:
        pages = await pages_of(organizations, "list_accounts", "Accounts")
        described = (await organizations.describe_organization())["Organization"]
    accounts = [account for page in pages for account in page]

    assert [len(page) for page in pages] == [20] * 6 + [3]
    assert tuple(a["Id"] for a in accounts if a["State"] == "ACTIVE") == MANY.accounts
    assert [a["Id"] for a in accounts if a["Status"] == "SUSPENDED"] == [f"90000000000{n}" for n in (1, 2, 3)]
    assert described["MasterAccountId"] == MANY.accounts[0]


async def test_every_account_stands_in_one_place_of_a_tree_that_the_seed_gives() -> None:
    async with running(MANY) as sim, client(sim, "organizations") as organizations:
        [[root]] = await pages_of(organizations, "list_roots", "Roots")
        tree = await walk(organizations, root["Id"])
    async with running(MANY) as again:
        same = again.organization

    assert re.fullmatch(r"r-[0-9a-z]{4,32}", root["Id"])
    assert all(re.fullmatch(r"ou-[0-9a-z]{4,32}-[0-9a-z]{8,32}", unit) for unit in tree if unit != root["Id"])
    assert sorted(a for accounts in tree.values() for a in accounts) == sorted(sim.organization.members)
    assert tree[root["Id"]] == [MANY.accounts[0]]
    assert {u.name: len(tree[u.id]) > 10 for u in same.units} == {
        "Workloads": False,
        "Platform": True,
        "Sandbox": True,
        "Prod": True,
        "Dev": True,
    }


async def test_accounts_have_tags_and_some_have_none() -> None:
    async with running(MANY) as sim, client(sim, "organizations") as organizations:
        tags = [
            {t["Key"]: t["Value"] for t in (await organizations.list_tags_for_resource(ResourceId=a))["Tags"]}
            for a in MANY.accounts[:40]
        ]

    assert {t.get("env") for t in tags} == {"prod", "dev", None}
    assert {frozenset(t) for t in tags} == {frozenset(), frozenset({"env", "team"})}


async def test_only_the_managing_account_may_ask_and_what_does_not_exist_is_not_found() -> None:
    async with running() as sim:
        async with client(sim, "organizations", **await assume(sim)) as organizations:
            with pytest.raises(ClientError) as denied:
                await organizations.list_accounts()
        async with client(sim, "organizations") as organizations:
            with pytest.raises(ClientError) as nowhere:
                await organizations.list_accounts_for_parent(ParentId="ou-none-12345678")
            with pytest.raises(ClientError) as nobody:
                await organizations.list_tags_for_resource(ResourceId="999999999999")
            with pytest.raises(ClientError) as stale:
                await organizations.list_accounts(NextToken="20-0")
            with pytest.raises(ClientError) as wide:
                await organizations.list_accounts(MaxResults=21)

    assert [code_of(e)[1] for e in (denied, nowhere, nobody, stale, wide)] == [
        "AccessDeniedException",
        "ParentNotFoundException",
        "TargetNotFoundException",
        "InvalidInputException",
        "InvalidInputException",
    ]


async def test_nobody_can_assume_a_role_in_a_suspended_account() -> None:
    async with running() as sim:
        with pytest.raises(ClientError) as denied:
            await assume(sim, "900000000001")

    assert code_of(denied) == (403, "AccessDenied")


async def test_an_account_that_is_added_while_running_is_listed_and_has_metrics_and_a_role() -> None:
    world = World(1, account_ids(2), (REGION,), 4, tuple(shipped_services().values())[:1])
    async with running(world) as sim:
        async with aiohttp.ClientSession(sim.url) as http:
            wanted = {"count": 2, "unit": "Dev", "tags": {"env": "dev", "owner": "me"}}
            async with http.post("/accounts", json=wanted) as response:
                added = (await response.json())["accounts"]
            refused = []
            for bad in ({"unit": "Nowhere"}, {"counts": 1}, {"count": 0}, [1]):
                async with http.post("/accounts", json=bad) as response:
                    refused.append(response.status)
        async with client(sim, "organizations") as organizations:
            dev = next(u.id for u in sim.organization.units if u.name == "Dev")
            listed = await organizations.list_accounts_for_parent(ParentId=dev)
            tags = await organizations.list_tags_for_resource(ResourceId=added[1])
        async with client(sim, **await assume(sim, added[1])) as cloudwatch:
            metrics = (await cloudwatch.list_metrics())["Metrics"]

    assert added == ["100000000003", "100000000004"]
    assert refused == [400] * 4
    assert set(added) <= {a["Id"] for a in listed["Accounts"]}
    assert tags["Tags"] == [{"Key": "env", "Value": "dev"}, {"Key": "owner", "Value": "me"}]
    assert metrics == [on_wire(m) for m in world.metrics(added[1], REGION)]
    assert sim.billing()["accounts"][added[1]]["calls"] == {REGION: {"ListMetrics": 1}}


# --- tags -----------------------------------------------------------------------------------------------------


async def resources(sim: Simulator, **request: Any) -> dict[str, dict[str, str]]:
    async with client(sim, "resourcegroupstaggingapi") as tagging:
        pages = await pages_of(tagging, "get_resources", "ResourceTagMappingList", **request)
    return {r["ResourceARN"]: {t["Key"]: t["Value"] for t in r["Tags"]} for page in pages for r in page}


async def test_tagged_resources_are_given_and_untagged_ones_are_left_out() -> None:
    async with running(EVERYTHING) as sim:
        found = await resources(sim)
    there = {r.arn: dict(r.tags) for r in resources_of(EVERYTHING, FIRST, REGION)}

    assert found == {arn: tags for arn, tags in there.items() if tags}
    assert 0.05 < 1 - len(found) / len(there) < 0.25
    assert {tags["env"] for tags in found.values()} == {"prod", "dev"}


@pytest.mark.parametrize(
    ("kind", "arn"),
    [
        ("ec2:instance", r"arn:aws:ec2:eu-west-1:100000000001:instance/i-[0-9a-f]{17}"),
        ("ec2:volume", r"arn:aws:ec2:eu-west-1:100000000001:volume/vol-[0-9a-f]{17}"),
        ("rds:db", r"arn:aws:rds:eu-west-1:100000000001:db:db-[0-9a-f]{12}"),
        (
            "elasticloadbalancing:loadbalancer/app",
            r"arn:aws:elasticloadbalancing:eu-west-1:100000000001:loadbalancer/app/alb/[0-9a-f]{16}",
        ),
        (
            "elasticloadbalancing:loadbalancer/net",
            r"arn:aws:elasticloadbalancing:eu-west-1:100000000001:loadbalancer/net/nlb/[0-9a-f]{16}",
        ),
        ("lambda:function", r"arn:aws:lambda:eu-west-1:100000000001:function:function-[0-9a-f]{12}"),
        ("s3", r"arn:aws:s3:::bucket-[0-9a-f]{12}"),
        ("sqs", r"arn:aws:sqs:eu-west-1:100000000001:queue-[0-9a-f]{12}"),
        ("sns", r"arn:aws:sns:eu-west-1:100000000001:topic-[0-9a-f]{12}"),
        ("dynamodb:table", r"arn:aws:dynamodb:eu-west-1:100000000001:table/table-[0-9a-f]{12}"),
        ("kinesis:stream", r"arn:aws:kinesis:eu-west-1:100000000001:stream/stream-[0-9a-f]{12}"),
        ("kafka:cluster", r"arn:aws:kafka:eu-west-1:100000000001:cluster/kafka-[0-9a-f]{12}/[0-9a-f]{16}-1"),
    ],
)
async def test_resources_of_a_type_have_the_arns_of_aws(kind: str, arn: str) -> None:
    async with running(EVERYTHING) as sim:
        found = await resources(sim, ResourceTypeFilters=[kind])

    assert found
    assert all(re.fullmatch(arn, one) for one in found)


async def test_resources_are_filtered_by_tags_and_come_in_pages() -> None:
    async with running(EVERYTHING) as sim:
        everything = await resources(sim)
        some = await resources(
            sim,
            TagFilters=[{"Key": "env", "Values": ["prod"]}, {"Key": "team", "Values": ["web", "data"]}],
        )
        named = await resources(sim, TagFilters=[{"Key": "Name"}])
        async with client(sim, "resourcegroupstaggingapi") as tagging:
            paged = await pages_of(tagging, "get_resources", "ResourceTagMappingList", ResourcesPerPage=7)
            with pytest.raises(ClientError) as stale:
                await tagging.get_resources(PaginationToken="7-0")
        free = sim.billing()["accounts"][FIRST]

    assert some == {
        arn: tags
        for arn, tags in everything.items()
        if tags["env"] == "prod" and tags["team"] in ("web", "data")
    }
    assert named == {arn: tags for arn, tags in everything.items() if "Name" in tags}
    assert 0 < len(some) < len(everything) > len(named) > 0
    assert max(map(len, paged)) == 7
    assert sum(map(len, paged)) == len(everything)
    assert code_of(stale) == (400, "InvalidParameterException")
    assert free["calls"][REGION]["GetResources"] > len(paged)
    assert free["metrics_requested"] == 0


# --- monitoring accounts --------------------------------------------------------------------------------------


async def test_a_monitoring_account_lists_the_metrics_of_linked_accounts_with_their_owners() -> None:
    async with running(links={FIRST: [SECOND]}) as sim, client(sim) as cloudwatch:
        pages = [
            p async for p in cloudwatch.get_paginator("list_metrics").paginate(IncludeLinkedAccounts=True)
        ]
        own = await cloudwatch.list_metrics()
        other = await cloudwatch.list_metrics(IncludeLinkedAccounts=True, OwningAccount=SECOND)
    both = [(a, on_wire(m)) for a in (FIRST, SECOND) for m in TRUTH.metrics(a, REGION)]

    assert [o for p in pages for o in p["OwningAccounts"]] == [a for a, _ in both]
    assert [m for p in pages for m in p["Metrics"]] == [m for _, m in both]
    assert {len(p["Metrics"]) for p in pages[:-1]} == {500}
    assert "OwningAccounts" not in own
    assert other["OwningAccounts"] == [SECOND] * 500
    assert other["Metrics"] == [on_wire(m) for m in TRUTH.metrics(SECOND, REGION)[:500]]


async def test_a_query_names_the_owner_and_the_monitoring_account_pays() -> None:
    metrics = TRUTH.metrics(SECOND, REGION)[1:4]
    queries = [query(n, m) | {"AccountId": SECOND} for n, m in enumerate(metrics)]
    request = asked() | {"MetricDataQueries": queries}
    async with running(links={FIRST: [SECOND]}) as sim, client(sim) as cloudwatch:
        results = (await cloudwatch.get_metric_data(**request))["MetricDataResults"]
        bill = sim.billing()["accounts"]

    for result, metric in zip(results, metrics, strict=True):
        _, values = TRUTH.points(SECOND, REGION, *metric[:3], "Average", 60, NOW_S - 300, NOW_S, NOW_S)
        assert result["Values"] == values.tolist()[::-1]
    assert bill[FIRST]["metrics_requested"] == 3
    assert bill[SECOND]["metrics_requested"] == 0


async def test_without_a_link_queries_are_forbidden_and_a_listing_is_refused() -> None:
    metrics = TRUTH.metrics(SECOND, REGION)[1:3]
    queries = [query(0, metrics[0]) | {"AccountId": SECOND}, query(1, TRUTH.metrics(FIRST, REGION)[2])]
    request = asked() | {"MetricDataQueries": queries}
    async with running() as sim, client(sim) as cloudwatch:
        results = (await cloudwatch.get_metric_data(**request))["MetricDataResults"]
        with pytest.raises(ClientError) as refused:
            await cloudwatch.list_metrics(IncludeLinkedAccounts=True, OwningAccount=SECOND)

    assert [(r["StatusCode"], bool(r["Values"])) for r in results] == [
        ("Forbidden", False),
        ("Complete", True),
    ]
    assert code_of(refused) == (400, "InvalidParameterValue")


def test_links_are_given_one_monitoring_account_each() -> None:
    accounts = account_ids(3)

    assert links_of([f"{FIRST}=*", f"{SECOND}={accounts[2]}"], accounts) == {
        FIRST: accounts[1:],
        SECOND: accounts[2:],
    }
    with pytest.raises(Fatal, match="there is no account '999999999999'"):
        links_of([f"{FIRST}=999999999999"], accounts)
