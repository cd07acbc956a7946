"""The policies that are shipped: the least, the same in every form, and exactly what a run uses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ingest.clock import SystemClock
from ingest.inventory import config_aggregator, describe
from ingest.preflight import ORGANIZATION_ACTIONS, TAG_ACTIONS, TARGET_ACTIONS
from ingest.schedule import grids_of
from ingest.sources.cloudwatch import CloudWatchSource
from ingest.sources.organization import TagCache, list_organization
from shard_config.load import loads, shipped_services
from tests.cloudwatch_rig import everything_is_answered
from workers.simulator import start
from workers.world import World, account_ids

IAM = Path(__file__).resolve().parent.parent / "docs" / "iam"
POLICIES = sorted(IAM.glob("policies/*.json"))


class _Template(yaml.SafeLoader):
    """CloudFormation's short forms, as {"Ref": …} and {"Fn::X": …}."""


def _short_form(loader: _Template, name: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.SequenceNode):
        value: Any = loader.construct_sequence(node)
    else:
        assert isinstance(node, yaml.ScalarNode)
        value = loader.construct_scalar(node)
    return {name if name == "Ref" else f"Fn::{name}": value}


_Template.add_multi_constructor("!", _short_form)


def statements(name: str) -> list[dict[str, Any]]:
    policy: dict[str, Any] = json.loads((IAM / "policies" / f"{name}.json").read_text())
    found: list[dict[str, Any]] = policy["Statement"]
    return found


def actions(found: list[dict[str, Any]]) -> set[str]:
    return {action for s in found for action in s["Action"]}


def template() -> dict[str, Any]:
    document: dict[str, Any] = yaml.load((IAM / "target-role.yaml").read_text(), _Template)  # noqa: S506  # it is a SafeLoader
    return document


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.stem)
def test_no_policy_deletes_or_says_anything_wholesale(path: Path) -> None:
    found = json.loads(path.read_text())["Statement"]
    assert all(s["Effect"] == "Allow" and set(s) <= {"Sid", "Effect", "Action", "Resource"} for s in found)
    for action in actions(found):
        service, _, verb = action.partition(":")
        assert re.fullmatch(r"(Get|List|Describe|Select|Put|Assume)[A-Za-z0-9]+", verb), action
        assert not verb.startswith("Put") or service == "s3"
    assert all(s["Resource"] != "*" for s in found if any(a.startswith(("s3:", "sts:")) for a in s["Action"]))


def test_the_template_grants_what_the_policy_says_to_one_principal_with_an_external_id() -> None:
    resources = template()["Resources"]
    exporter = {"Ref": "ExporterRoleArn"}
    [trust] = resources["Role"]["Properties"]["AssumeRolePolicyDocument"]["Statement"]
    assert trust == {
        "Effect": "Allow",
        "Principal": {
            "AWS": {"Fn::If": ["WithCoordinator", [exporter, {"Ref": "CoordinatorRoleArn"}], exporter]}
        },
        "Action": "sts:AssumeRole",
        "Condition": {"StringEquals": {"sts:ExternalId": {"Ref": "ExternalId"}}},
    }
    policies = [r for r in resources.values() if r["Type"] == "AWS::IAM::RolePolicy"]
    granted = [s for r in policies for s in r["Properties"]["PolicyDocument"]["Statement"]]
    assert granted == statements("target")
    assert {r["Type"] for r in resources.values()} == {"AWS::IAM::Role", "AWS::IAM::RolePolicy"}
    assert template()["Parameters"]["ExternalId"]["MinLength"] >= 8
    assert resources["ReadsTags"]["Condition"] == "WithTags"
    assert resources["ReadsInventory"]["Condition"] == "WithInventory"
    assert template()["Parameters"]["ReadInventory"]["Default"] == "false"


def test_cloudformation_takes_the_template() -> None:
    command = [str(Path(sys.executable).with_name("cfn-lint")), str(IAM / "target-role.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_terraform_module_takes_the_same_policy_and_wants_the_external_id() -> None:
    text = (IAM / "terraform" / "main.tf").read_text()
    [path] = re.findall(r'file\("\$\{path\.module\}/([^"]+)"\)', text)
    assert (IAM / "terraform" / path).resolve() == (IAM / "policies" / "target.json")
    assert '"sts:ExternalId" = var.external_id' in text
    assert set(re.findall(r'^resource "(\w+)"', text, re.MULTILINE)) == {
        "aws_iam_role",
        "aws_iam_role_policy",
    }
    assert all(s["Sid"] in text or s["Sid"] == "HeadgateReadsMetrics" for s in statements("target"))


def test_the_terraform_module_is_formatted() -> None:
    program = shutil.which("terraform")
    if program is None:
        pytest.skip("there is no terraform on the PATH")
    done = subprocess.run(
        [program, "fmt", "-check", "-diff", str(IAM / "terraform")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_preflight_tells_to_paste_is_what_is_shipped() -> None:
    assert {*TARGET_ACTIONS, *TAG_ACTIONS, *describe.ACTIONS} == actions(statements("target"))
    assert set(config_aggregator.ACTIONS) == actions(statements("aggregator"))
    assert set(ORGANIZATION_ACTIONS) < actions(statements("coordinator"))


async def test_a_run_uses_exactly_what_the_policies_allow() -> None:
    accounts = account_ids(3)
    world = World(1, accounts, ["eu-west-1"], 20, [shipped_services()["ec2"]])
    simulator = await start(world, calls_per_s=0)
    document = {
        "aws": {"endpoint_url": simulator.url, "role_template": "arn:aws:iam::{account}:role/headgate"},
        "accounts": [{"id": a, "regions": ["eu-west-1"], "services": ["ec2"]} for a in accounts],
        "organization": {
            "regions": ["eu-west-1"],
            "services": ["ec2"],
            "units": [simulator.organization.root],
            "tags": {"env": "prod"},
        },
        "services": {"ec2": {"only": [{"tags": {"env": "prod"}}]}},
    }
    config = loads(yaml.safe_dump(document), "test", environ={})
    everything = config.model_copy(update={"organization": config.organization.model_copy(update={"units": (), "tags": {}})})  # type: ignore[union-attr]  # fmt: skip
    clock = SystemClock()
    source = CloudWatchSource(config, clock)
    try:
        assert (await list_organization(config, clock, TagCache())).accounts
        assert (await list_organization(everything, clock, TagCache())).accounts
        for target, [grid] in grids_of(config).items():
            await everything_is_answered(source, target, grid, clock)
    finally:
        await source.close()
        await simulator.close()
    calls = simulator.billing()["accounts"].values()
    seen = {api for of in calls for by_api in of["calls"].values() for api in by_api}
    allowed = actions(statements("target")) | actions(statements("coordinator")) | {"sts:AssumeRole"}
    # Nobody needs a permission to ask who he is.
    # What the inventory asks beside is held to its policy in test_inventory_sources.
    used = {a for a in allowed if not a.startswith("s3:")} - set(describe.ACTIONS)
    assert {a.partition(":")[2] for a in used} == seen - {"GetCallerIdentity"}
