"""The inventory's sources, on the simulated AWS: whole lists or failed looks, and the same words from Describe calls and from AWS Config."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ingest.clock import SystemClock
from ingest.inventory import asking
from ingest.inventory.cache_nodes import NODES
from ingest.inventory.config_aggregator import TYPES, aggregate
from ingest.inventory.describe import ACTIONS, describe
from ingest.inventory.model import Look, Resource, Role, Scope, State
from ingest.inventory.parse import CONVERT, Beside
from ingest.sources import aws as aws_module
from ingest.sources import tags
from shard_config.load import loads, shipped_services
from shard_config.model import Config
from workers import simulator
from workers.simulated.faults import Faults
from workers.simulated.inventory import AGGREGATOR
from workers.simulated.requests import AwsError
from workers.simulator import Simulator
from workers.world import World, account_ids

ACCOUNTS = account_ids(2)
REGION = "eu-west-1"
SERVICES = tuple(CONVERT)


def config_of(simulated: Simulator, services: tuple[str, ...] = SERVICES, inventory: str = "") -> Config:
    accounts = "".join(
        f'  - {{id: "{a}", regions: [{REGION}], services: [{", ".join(services)}]}}\n' for a in ACCOUNTS
    )
    text = (
        f"aws: {{endpoint_url: {simulated.url}, role_template: 'arn:aws:iam::{{account}}:role/headgate'}}\n"
    )
    return loads(f"{text}accounts:\n{accounts}{inventory}", "test", {})


def aggregator(
    simulated: Simulator, services: tuple[str, ...] = tuple(TYPES), name: str = AGGREGATOR
) -> Config:
    section = f"{{source: config, aggregator: {name}, aggregator_account: '{ACCOUNTS[0]}', aggregator_region: {REGION}}}"
    return config_of(simulated, services, f"inventory: {section}\n")


@asynccontextmanager
async def aws(
    resources: int = 24, services: tuple[str, ...] = SERVICES, seed: int = 7
) -> AsyncIterator[Simulator]:
    shipped = shipped_services()
    one = [shipped[name].model_copy(update={"metrics": shipped[name].metrics[:1]}) for name in services]
    simulated = await simulator.start(
        World(seed, ACCOUNTS, [REGION], resources * len(services), one), calls_per_s=0
    )
    try:
        yield simulated
    finally:
        await simulated.close()


async def looks(config: Config) -> dict[Scope, Look]:
    found: dict[Scope, Look] = {}

    async def take(look: Look) -> None:
        assert look.scope not in found
        found[look.scope] = look

    await (aggregate if config.inventory.source == "config" else describe)(config, SystemClock(), take)
    return found


def edited(simulated: Simulator, service: str, **changed: Any) -> str:
    """The id of the first resource of a service, which is changed."""
    owned = simulated.inventory.owned
    key = {"ec2": "InstanceId", "ebs": "VolumeId"}[service]
    id_ = str(owned.of(ACCOUNTS[0], REGION, service)[0][key])
    owned.edit(ACCOUNTS[0], service, id_, **changed)
    return id_


def of(found: dict[Scope, Look], service: str, account: str = ACCOUNTS[0]) -> dict[str, Resource]:
    look = found[Scope(account, REGION, service)]
    assert look.failure == ""
    return {one.id: one for one in look.resources}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "CALLS_PER_S", 1000.0)
    monkeypatch.setattr(tags, "CALLS_PER_S", 1000.0)
    monkeypatch.setattr(aws_module, "BACKOFF_S", (0.001, 0.001))


async def test_every_resource_that_has_metrics_is_listed_once_with_its_size() -> None:
    async with aws() as simulated:
        stopped = edited(
            simulated,
            "ec2",
            State={"Name": "stopped"},
            StateTransitionReason="User initiated (2026-11-02 08:00:00 GMT)",
        )
        found = await looks(config_of(simulated))
        assert {str(s) for s in found} == {f"{a}/{REGION} {s}" for a in ACCOUNTS for s in SERVICES}
        for service in SERVICES:
            metrics = simulated.truth.metrics(ACCOUNTS[0], REGION)
            ids = {
                m.dimensions[0][1] for m in metrics if m.namespace == shipped_services()[service].namespace
            }
            assert of(found, service).keys() == ids
            assert len(ids) == 24
        assert all(look.lacks == () for look in found.values())
    ec2 = of(found, "ec2")
    assert all(
        one.vcpu and one.memory_bytes and one.created_s and one.arn.endswith(one.id) for one in ec2.values()
    )
    assert (ec2[stopped].state, ec2[stopped].state_since_s) == (State.STOPPED, 1_793_606_400)
    assert {one.state for one in ec2.values()} >= {State.RUNNING, State.STOPPED}
    assert all(one.storage_bytes for one in of(found, "ebs").values())
    assert all(one.memory_bytes for one in of(found, "lambda").values())
    assert all(
        (one.nodes, one.vcpu, one.memory_bytes) == (3, 6, 3 * 8 * 1024**3)
        for one in of(found, "msk").values()
    )
    assert {one.read_units for one in of(found, "dynamodb").values()} == {5, None}
    assert {of(found, service)[next(iter(of(found, service)))].type for service in ("alb", "nlb", "elb")} == {
        "application",
        "network",
        "classic",
    }
    # Less memory than an r7g.large has, which is of its own instances.
    caches = {one.type: (one.vcpu, one.memory_bytes) for one in of(found, "elasticache").values()}
    assert caches == {"cache.t4g.micro": (2, 512 * 1024**2), "cache.r7g.large": (2, round(13.07 * 1024**3))}


def test_the_nodes_of_a_family_grow_with_their_names_and_one_that_nobody_documents_is_unknown() -> None:
    families: dict[str, list[tuple[int, int]]] = {}
    for name, size in NODES.items():
        families.setdefault(name.rpartition(".")[0], []).append(size)
    assert all(sizes == sorted(sizes) for sizes in families.values())
    raw = {"CacheClusterId": "c", "CacheNodeType": "cache.x9.huge", "NumCacheNodes": 1}
    one = CONVERT["elasticache"](Scope(ACCOUNTS[0], REGION, "elasticache"), raw, Beside())
    assert (one.vcpu, one.memory_bytes, one.nodes) == (None, None, 1)


async def test_what_belongs_together_says_so() -> None:
    async with aws(64, ("ec2", "ebs", "rds")) as simulated:
        lone = edited(simulated, "ebs", State="available", Attachments=[])
        found = await looks(config_of(simulated, ("ec2", "ebs", "rds")))
    ec2, ebs, rds = (of(found, name) for name in ("ec2", "ebs", "rds"))
    scaled = [one for one in ec2.values() if one.scaled]
    assert scaled
    assert any(one.state is State.STANDBY for one in scaled)
    attached = [one for one in ebs.values() if one.state is State.RUNNING]
    assert all(set(one.attached_to) <= ec2.keys() and one.attached_to for one in attached)
    assert (ebs[lone].state, ebs[lone].attached_to, ebs[lone].state_since_s) == (State.DETACHED, (), None)
    clusters = Counter(one.group for one in rds.values() if one.role is Role.WRITER)
    assert clusters
    assert set(clusters.values()) == {1}
    # Aurora says 1 GiB of every instance, which is nobody's size.
    assert {one.storage_bytes for one in rds.values() if one.engine.startswith("aurora")} == {None}
    assert all(one.storage_bytes for one in rds.values() if not one.engine.startswith("aurora"))
    assert all(one.vcpu and one.memory_bytes for one in rds.values())


async def test_an_aggregator_says_what_describe_calls_say() -> None:
    async with aws(60) as simulated:
        by_describe = await looks(config_of(simulated, tuple(TYPES)))
        by_config = await looks(aggregator(simulated))
    assert by_config.keys() == by_describe.keys()
    for scope, look in by_describe.items():
        assert {one.id: one for one in by_config[scope].resources} == {one.id: one for one in look.resources}
        assert (look.failure, by_config[scope].failure) == ("", "")
    assert sum(len(look.resources) for look in by_config.values()) == 2 * 5 * 60


async def test_tags_are_those_that_tag_get_resources_has() -> None:
    async with aws(services=("ebs", "lambda")) as simulated:
        found = await looks(config_of(simulated, ("ebs", "lambda")))
    for service in ("ebs", "lambda"):
        tags = [one.tags for one in of(found, service).values()]
        assert {} in tags
        assert {"payments", "search", "data", "web"} >= {t["team"] for t in tags if t}


async def test_a_list_that_is_denied_is_a_failed_look_that_names_the_permission() -> None:
    async with aws(4) as simulated:
        simulated.faults = Faults(denied_actions=("*:Describe*", "*:List*"))
        found = await looks(config_of(simulated))
    assert len(found) == 2 * len(SERVICES)
    for scope, look in found.items():
        balancers = dict.fromkeys(("alb", "nlb", "elb"), "elasticloadbalancing")
        policy = ({"msk": "kafka", "ebs": "ec2"} | balancers).get(scope.service, scope.service)
        assert look.resources == ()
        assert f"forbidden: grant {policy}:" in look.failure


@pytest.mark.parametrize(
    ("service", "action"),
    [("ec2", "ec2:DescribeInstanceTypes"), ("ec2", "autoscaling:DescribeAutoScalingInstances"), ("rds", "rds:DescribeDBClusters"), ("lambda", "tag:GetResources")],
)  # fmt: skip
async def test_what_stands_beside_a_list_may_be_denied_and_the_look_says_what_it_lacks(
    service: str, action: str
) -> None:
    async with aws(24, (service,)) as simulated:
        simulated.faults = Faults(denied_actions=(action,))
        found = await looks(config_of(simulated, (service,)))
    for look in found.values():
        assert (look.failure, len(look.resources)) == ("", 24)
        [lack] = look.lacks
        assert f"grant {action} to the role" in lack
    if action == "ec2:DescribeInstanceTypes":
        assert {one.memory_bytes for one in of(found, "ec2").values()} == {None}
        assert all(one.vcpu for one in of(found, "ec2").values())  # which AWS says of the instance itself


@pytest.mark.parametrize("fault", ["token_loop_share", "token_endless_share"])
async def test_pages_that_do_not_end_are_a_failed_look(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "PAGES_MAX", 5)
    async with aws(4) as simulated:
        simulated.faults = Faults(**{fault: 1.0})  # type: ignore[arg-type]
        found = await looks(config_of(simulated))
    assert len(found) == 2 * len(SERVICES)
    for look in found.values():
        assert look.resources == ()
        assert "came twice" in look.failure or "too_large" in look.failure


@pytest.mark.parametrize("fault", ["malformed_share", "truncated_share", "error_share", "unavailable_share"])
async def test_answers_that_are_cut_off_or_errors_are_failed_looks(fault: str) -> None:
    async with aws(8) as simulated:
        simulated.faults = Faults(**{fault: 1.0})  # type: ignore[arg-type]
        found = await looks(config_of(simulated))
    assert len(found) == 2 * len(SERVICES)
    assert all(look.failure and look.resources == () for look in found.values())


async def test_a_later_page_that_fails_fails_the_whole_list(monkeypatch: pytest.MonkeyPatch) -> None:
    async with aws(120, ("rds",)) as simulated:
        answer = simulated.inventory.answer

        def first_page_only(
            account: str, region: str, operation: str, body: Any, *rest: Any
        ) -> dict[str, Any]:
            if body.get("Marker") and account == ACCOUNTS[0]:
                raise AwsError("InternalFailure", "later", 500)
            return answer(account, region, operation, body, *rest)

        monkeypatch.setattr(simulated.inventory, "answer", first_page_only)
        found = await looks(config_of(simulated, ("rds",)))
    failed, whole = (found[Scope(account, REGION, "rds")] for account in ACCOUNTS)
    assert (failed.resources, whole.failure, len(whole.resources)) == ((), "", 120)
    assert "InternalFailure" in failed.failure


async def test_scopes_do_not_wait_for_each_others_failures() -> None:
    async with aws(8, ("ec2", "rds")) as simulated:
        simulated.faults = Faults(denied_roles=(ACCOUNTS[0],), denied_actions=("rds:*",))
        found = await looks(config_of(simulated, ("ec2", "rds")))
    whole = [scope for scope, look in found.items() if not look.failure]
    assert whole == [Scope(ACCOUNTS[1], REGION, "ec2")]


# --- AWS Config ---------------------------------------------------------------------------------------------------


async def test_what_the_aggregator_has_not_copied_whole_is_a_failed_look_there_alone() -> None:
    async with aws(8, ("ec2", "ebs")) as simulated:
        simulated.inventory.broken[ACCOUNTS[1], REGION] = "FAILED"
        found = await looks(aggregator(simulated, ("ec2", "ebs")))
    assert all(not look.failure for scope, look in found.items() if scope.account == ACCOUNTS[0])
    for look in (look for scope, look in found.items() if scope.account == ACCOUNTS[1]):
        assert "FAILED" in look.failure


async def test_an_aggregator_that_is_not_there_fails_every_scope() -> None:
    async with aws(8, ("ec2",)) as simulated:
        found = await looks(aggregator(simulated, ("ec2",), name="nobody"))
    assert len(found) == 2
    assert all("does not exist" in look.failure for look in found.values())


async def test_an_empty_list_of_an_aggregator_is_doubtful_and_of_describe_calls_it_is_not() -> None:
    async with aws(8, ("ec2",)) as simulated:
        [of_config, *_] = [
            v for s, v in (await looks(aggregator(simulated, ("ec2", "rds")))).items() if s.service == "rds"
        ]
        [of_calls, *_] = [
            v for s, v in (await looks(config_of(simulated, ("ec2", "rds")))).items() if s.service == "rds"
        ]
    assert (of_config.resources, of_config.failure, of_config.empty_is_doubtful) == ((), "", True)
    assert (of_calls.resources, of_calls.failure, of_calls.empty_is_doubtful) == ((), "", False)


# --- the least ----------------------------------------------------------------------------------------------------


async def test_a_refresh_calls_exactly_what_the_policy_grants() -> None:
    async with aws(8) as simulated:
        await looks(config_of(simulated))
        seen: set[Any] = {api for _, api in simulated.received} - {"AssumeRole", "GetCallerIdentity"}
    assert seen == {action.partition(":")[2] for action in (*ACTIONS, "tag:GetResources")}
