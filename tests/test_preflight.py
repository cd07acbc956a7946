"""Preflight: what is wrong is found before it costs anything, and the remedy is said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
import yaml
from aiokafka import AIOKafkaConsumer, TopicPartition

from ingest.clock import SystemClock
from ingest.errors import HeadgateError, Rejected, Transient
from ingest.preflight import Finding, State, caller_of, is_right, remedy_of_action, remedy_of_identity
from ingest.sources.aws_preflight import AwsPreflight
from shard_config.load import loads, shipped_services
from shard_config.model import Config
from workers import cli
from workers.preflight import chosen, render, with_members
from workers.preflight_parts import check_kafka, check_postgres, check_s3
from workers.setup import setup
from workers.simulated.faults import Faults
from workers.simulator import Simulator, start
from workers.world import World, account_ids

ACCOUNTS = account_ids(6)
REGIONS = ("eu-west-1", "us-east-1")


@pytest.fixture
async def aws_world() -> AsyncIterator[Simulator]:
    world = World(1, ACCOUNTS, REGIONS, 10, [shipped_services()["ec2"]])
    simulator = await start(world, external_id="right", calls_per_s=0, links={ACCOUNTS[0]: ACCOUNTS[1:2]})
    yield simulator
    await simulator.close()


def config_of(simulator: Simulator, accounts: int = len(ACCOUNTS), external_id: str = "right") -> Config:
    document = {
        "aws": {"endpoint_url": simulator.url, "role_template": "arn:aws:iam::{account}:role/headgate"},
        "defaults": {"regions": list(REGIONS), "services": ["ec2"]},
        "accounts": [{"id": a, "external_id": external_id} for a in ACCOUNTS[:accounts]],
    }
    return loads(yaml.safe_dump(document), "test", environ={})


async def asked(
    config: Config, *, paid: bool = False, deadline_s: float = 30
) -> tuple[list[Finding], AwsPreflight]:
    preflight = AwsPreflight(config, SystemClock(), paid=paid, deadline_s=deadline_s)
    try:
        return sorted(await preflight.check(config.accounts, lambda: None)), preflight
    finally:
        await preflight.close()


def states(found: list[Finding], check: str) -> dict[str, State]:
    return {f.subject: f.state for f in found if f.check == check}


# --- AWS ------------------------------------------------------------------------------------------------------


async def test_a_preflight_of_everything_costs_nothing_and_says_what_it_could_not_prove(
    aws_world: Simulator,
) -> None:
    found, preflight = await asked(config_of(aws_world))
    targets = {f"{a}/{r}" for a in ACCOUNTS for r in REGIONS}
    assert states(found, "AssumeRole") == dict.fromkeys(ACCOUNTS, State.OK)
    assert states(found, "cloudwatch:ListMetrics") == dict.fromkeys(targets, State.OK)
    assert states(found, "cloudwatch:GetMetricData") == dict.fromkeys(targets, State.UNPROVED)
    assert is_right(found)
    assert preflight.asked.metrics_billed == 0
    assert all(a["metrics_requested"] == 0 for a in aws_world.billing()["accounts"].values())


async def test_what_the_inventory_needs_is_asked_and_what_is_denied_has_its_statement_to_paste() -> None:
    services = ("ec2", "rds", "dynamodb", "lambda")
    world = World(1, ACCOUNTS[:1], REGIONS[:1], 10, [shipped_services()[name] for name in services])
    simulator = await start(world, calls_per_s=0)
    document = {
        "aws": {"endpoint_url": simulator.url, "role_template": "arn:aws:iam::{account}:role/headgate"},
        "accounts": [{"id": ACCOUNTS[0], "regions": [REGIONS[0]], "services": list(services)}],
        "inventory": {"source": "describe"},
    }
    config = loads(yaml.safe_dump(document), "test", environ={})
    needed = {
        "autoscaling:DescribeAutoScalingInstances", "dynamodb:DescribeTable", "dynamodb:ListTables", "ec2:DescribeInstanceTypes",
        "ec2:DescribeInstances", "lambda:ListFunctions", "rds:DescribeDBClusters", "rds:DescribeDBInstances",
    }  # fmt: skip
    try:
        found, _ = await asked(config)
        assert {f.check for f in found if f.state is State.OK} == needed | {
            "AssumeRole",
            "cloudwatch:ListMetrics",
        }
        simulator.faults = Faults(denied_actions=("dynamodb:DescribeTable", "rds:*"))
        found, _ = await asked(config)
        none = config.inventory.model_copy(update={"source": "none"})
        without, _ = await asked(config.model_copy(update={"inventory": none}))
    finally:
        await simulator.close()
    wrong = {f.check: f.remedy for f in found if f.state is State.WRONG}
    assert wrong.keys() == {"dynamodb:DescribeTable", "rds:DescribeDBInstances", "rds:DescribeDBClusters"}
    assert all(f'"Action": ["{action}"]' in remedy for action, remedy in wrong.items())
    assert {f.check for f in without} & needed == set()


async def test_paid_proves_get_metric_data_and_the_bill_is_what_it_says(aws_world: Simulator) -> None:
    found, preflight = await asked(config_of(aws_world), paid=True)
    assert set(states(found, "cloudwatch:GetMetricData").values()) == {State.OK}
    bill = sum(a["metrics_requested"] for a in aws_world.billing()["accounts"].values())
    assert preflight.asked.metrics_billed == bill == len(ACCOUNTS) * len(REGIONS)


async def test_a_wrong_external_id_is_one_line_an_account_and_is_not_quoted(aws_world: Simulator) -> None:
    found, _ = await asked(config_of(aws_world, external_id="wr0ng-1d"))
    assert states(found, "AssumeRole") == dict.fromkeys(ACCOUNTS, State.WRONG)
    assert len(found) == len(ACCOUNTS)
    assert '"sts:ExternalId"' in found[0].remedy
    assert "wr0ng-1d" not in str(found)


async def test_one_account_that_denies_spoils_no_other(aws_world: Simulator) -> None:
    aws_world.faults = replace(Faults(), denied_roles=(ACCOUNTS[0],), forbidden_accounts=(ACCOUNTS[1],))
    found, _ = await asked(config_of(aws_world))
    wrong = [f for f in found if f.state is State.WRONG]
    assert {f.subject.partition("/")[0] for f in wrong} == set(ACCOUNTS[:2])
    denied = next(f for f in wrong if f.check == "cloudwatch:GetMetricData")
    assert "cloudwatch:GetMetricData" in denied.remedy
    assert json.loads(denied.remedy.partition(": ")[2])["Effect"] == "Allow"


async def test_tags_are_asked_for_where_a_service_is_selected_by_them_and_a_monitoring_account_has_none(
    aws_world: Simulator,
) -> None:
    document = {
        "aws": {"endpoint_url": aws_world.url, "role_template": "arn:aws:iam::{account}:role/headgate"},
        "defaults": {"regions": ["eu-west-1"], "services": ["ec2"]},
        "accounts": [
            {"id": ACCOUNTS[0], "external_id": "right"},
            {"id": ACCOUNTS[1], "external_id": "right", "via": ACCOUNTS[0]},
        ],
        "services": {"ec2": {"only": [{"tags": {"env": "prod"}}]}},
    }
    found, _ = await asked(loads(yaml.safe_dump(document), "test", environ={}))
    assert states(found, "tag:GetResources")[f"{ACCOUNTS[0]}/eu-west-1"] is State.OK
    [wrong] = [f for f in found if f.state is State.WRONG]
    assert (wrong.subject, wrong.check) == (f"{ACCOUNTS[1]}/eu-west-1", "tags of ec2")


async def test_tags_are_asked_for_where_series_are_named_after_resources(aws_world: Simulator) -> None:
    def document(**write: object) -> str:
        return yaml.safe_dump(
            {
                "aws": {
                    "endpoint_url": aws_world.url,
                    "role_template": "arn:aws:iam::{account}:role/headgate",
                },
                "defaults": {"regions": ["eu-west-1"], "services": ["ec2"]},
                "accounts": [
                    {"id": ACCOUNTS[0], "external_id": "right"},
                    {"id": ACCOUNTS[1], "external_id": "right", "via": ACCOUNTS[0]},
                ],
                "remote_write": {"receivers": [{"name": "p", "url": "http://127.0.0.1:1/w"}], **write},
            }
        )

    found, _ = await asked(loads(document(), "test", environ={}))
    assert states(found, "tag:GetResources") == {f"{ACCOUNTS[0]}/eu-west-1": State.OK}
    for without in ({"resources": False}, {"names": "headgate"}):
        found, _ = await asked(loads(document(**without), "test", environ={}))
        assert states(found, "tag:GetResources") == {}


async def test_an_account_that_is_not_linked_to_its_monitoring_account_is_found_out(
    aws_world: Simulator,
) -> None:
    config = config_of(aws_world, accounts=3)
    accounts = tuple(a.model_copy(update={"via": ACCOUNTS[0]}) for a in config.accounts[1:])
    config = config.model_copy(update={"accounts": (config.accounts[0], *accounts)})
    found, preflight = await asked(config, paid=True)
    wrong = [f for f in found if f.state is State.WRONG]
    assert {f.subject for f in wrong} == {f"{ACCOUNTS[2]}/{region}" for region in REGIONS}
    assert {f.check for f in wrong} == {"cloudwatch:ListMetrics", "cloudwatch:GetMetricData"}
    assert all(f"link {ACCOUNTS[2]} to monitoring account {ACCOUNTS[0]}" in f.remedy for f in wrong)
    assert set(preflight.asked.requests) == {
        "AssumeRole",
        "GetCallerIdentity",
        "ListMetrics",
        "GetMetricData",
    }


async def test_the_accounts_of_an_organization_are_checked_with_those_of_the_file(
    aws_world: Simulator,
) -> None:
    document = {
        "aws": {"endpoint_url": aws_world.url, "role_template": "arn:aws:iam::{account}:role/headgate"},
        "defaults": {"regions": ["eu-west-1"], "services": ["ec2"]},
        "organization": {"external_id": "right"},
    }
    config = loads(yaml.safe_dump(document), "test", environ={})
    whole, [finding] = await with_members(config, SystemClock())
    assert finding.state is State.OK
    assert [a.id for a in whole.accounts] == list(ACCOUNTS)
    role = f"arn:aws:iam::{ACCOUNTS[1]}:role/headgate"  # of no management account
    other = config.model_copy(update={"organization": config.organization.model_copy(update={"role_arn": role})})  # type: ignore[union-attr]  # fmt: skip
    _, [finding] = await with_members(other, SystemClock())
    assert finding.state is State.WRONG
    assert "organizations:ListAccounts" in finding.remedy


async def test_an_endpoint_that_is_away_is_a_finding_and_no_exception(aws_world: Simulator) -> None:
    config = config_of(aws_world, accounts=1)
    await aws_world.close()
    [finding], _ = await asked(config, deadline_s=0.5)
    assert finding.state is State.WRONG
    assert "reachable" in finding.remedy


# --- remedies -------------------------------------------------------------------------------------------------

CALLER = "arn:aws:sts::999999999999:assumed-role/headgate-exporter/pod-1"
DENIED = f"AccessDenied: User: {CALLER} is not authorized to perform: sts:AssumeRole on resource: arn:aws:iam::1:role/x"


def test_the_principal_to_trust_is_the_role_behind_the_callers_session() -> None:
    assert caller_of(DENIED) == "arn:aws:iam::999999999999:role/headgate-exporter"


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("", "trust policy"),
        (" with an explicit deny in a service control policy", "SCP"),
        (" because no permissions boundary allows the sts:AssumeRole action", "boundary"),
        (" because no identity-based policy allows the sts:AssumeRole action", "the exporter's own role"),
        (" with an explicit deny in an identity-based policy", "that deny has to go"),
    ],
)
def test_a_denial_says_who_may_change_it(said: str, remedy: str) -> None:
    error = Rejected("aws AssumeRole 123456789012/eu-west-1", "forbidden", DENIED + said)
    assert remedy in remedy_of_identity(
        error, "123456789012", "arn:aws:iam::123456789012:role/headgate", True
    )


@pytest.mark.parametrize(
    "code",
    ["UnrecognizedClientException", "InvalidClientTokenId", "RegionDisabledException", "OptInRequired"],
)
def test_a_region_that_is_not_enabled_is_known_by_its_error(code: str) -> None:
    error = Rejected(
        "aws ListMetrics 123456789012/af-south-1", "forbidden", f"{code}: the security token is invalid"
    )
    remedy = remedy_of_action(error, "cloudwatch:ListMetrics", "123456789012", "af-south-1")
    assert "aws account enable-region --account-id 123456789012 --region-name af-south-1" in remedy


def test_another_accounts_identity_and_a_missing_one_have_remedies_of_their_own() -> None:
    where = "aws GetCallerIdentity 123456789012/eu-west-1"
    other = Rejected(where, "forbidden", "the credentials belong to account 1, not to 123456789012")
    assert "role_arn" in remedy_of_identity(other, "123456789012", "", False)
    none = Rejected("aws ambient credentials", "forbidden", "there are none")
    assert "identity" in remedy_of_identity(none, "123456789012", "", False)
    away = Transient(where, "EndpointConnectionError: no")
    assert "reachable" in remedy_of_identity(away, "123456789012", "", False)


def test_a_remedy_stands_once_however_many_need_it() -> None:
    found = [Finding("aws", f"{n:012}", "AssumeRole", State.WRONG, "no", "do this") for n in range(5)]
    lines = render(found)
    assert sum("do this" in line for line in lines) == 1
    assert sum("-> [1]" in line for line in lines) == 5


# --- our own parts --------------------------------------------------------------------------------------------


@pytest.fixture
def parts(kafka_bootstrap: str, database: str, s3_endpoint: str, bucket: str, topic_prefix: str) -> Config:
    document = {
        "exposition": [{"name": "n", "account": "a", "region": "r", "endpoints": ["http://127.0.0.1:1/m"]}],
        "slots": 2,
        "kafka": {
            "bootstrap": kafka_bootstrap,
            "prefix": topic_prefix,
            "raw_partitions": 2,
            "ledger_partitions": 2,
        },
        "postgres": {"dsn": database},
        "s3": {"bucket": bucket, "endpoint_url": s3_endpoint, "prefix": "some/where/"},
    }
    return loads(yaml.safe_dump(document), "test", environ={})


async def test_what_setup_made_is_right_and_trying_to_write_writes_nothing(parts: Config) -> None:
    await setup(parts)
    for _ in range(2):  # the second time the probe's object is there
        found = await check_s3(parts) + await check_kafka(parts) + await check_postgres(parts)
        assert [f for f in found if f.state is not State.OK] == []
    assert {f.check for f in found} >= {
        "put if absent",
        "write",
        "read",
        "group",
        "schema",
        "rights",
        "version",
    }
    consumer = AIOKafkaConsumer(bootstrap_servers=parts.kafka.bootstrap)
    await consumer.start()
    try:
        topics = [parts.kafka.topic(name) for name in ("collect", "raw", "ledger", "dead")]
        ends = await consumer.end_offsets([TopicPartition(topic, 0) for topic in topics])
        assert set(ends.values()) == {0}
    finally:
        await consumer.stop()


async def test_what_setup_would_make_is_wrong_before_it_ran(parts: Config) -> None:
    found = await check_kafka(parts) + await check_postgres(parts)
    wrong = {(f.part, f.check) for f in found if f.state is State.WRONG}
    assert wrong == {("kafka", "topic"), ("kafka", "group"), ("postgres", "schema")}
    assert all("headgate setup" in f.remedy for f in found if f.state is State.WRONG)


async def test_a_topic_with_other_partitions_and_a_bucket_that_is_not_there_are_named(parts: Config) -> None:
    await setup(parts)
    other = parts.model_copy(
        update={
            "slots": 3,
            "s3": parts.s3.model_copy(update={"bucket": "nobody-s-bucket"}),
        }
    )
    [topic] = [f for f in await check_kafka(other) if f.state is State.WRONG]
    assert topic.what == "has 2 partitions, and the configuration says 3"
    assert {f.state for f in await check_s3(other)} == {State.WRONG}


async def test_a_role_without_rights_is_told_what_to_grant(parts: Config, database: str) -> None:
    await setup(parts)
    connection = await asyncpg.connect(database)
    name = database.rpartition("/")[2]
    try:
        await connection.execute(f"CREATE ROLE reader_{name} LOGIN PASSWORD 'x'")
        await connection.execute(f"GRANT SELECT ON schema_migrations TO reader_{name}")
        scheme, _, rest = database.partition("://")
        dsn = f"{scheme}://reader_{name}:x@{rest.rpartition('@')[2]}"
        poor = parts.model_copy(
            update={"postgres": parts.postgres.model_copy(update={"dsn": dsn, "password": None})}
        )
        [wrong] = [f for f in await check_postgres(poor) if f.state is State.WRONG]
        assert wrong.check == "rights"
        assert "GRANT CREATE ON SCHEMA public" in wrong.remedy
    finally:
        await connection.execute(f"DROP OWNED BY reader_{name}; DROP ROLE reader_{name}")
        await connection.close()


async def test_parts_that_are_away_are_findings() -> None:
    config = loads(
        yaml.safe_dump(
            {
                "exposition": [
                    {"name": "n", "account": "a", "region": "r", "endpoints": ["http://127.0.0.1:1/m"]}
                ],
                "kafka": {"bootstrap": "127.0.0.1:1"},
                "postgres": {"dsn": "postgresql://x@127.0.0.1:1/x"},
                "s3": {"endpoint_url": "http://127.0.0.1:1"},
            }
        ),
        "test",
        environ={},
    )
    for check in (check_kafka, check_postgres, check_s3):
        found = await check(config)
        assert {f.state for f in found} == {State.WRONG}


# --- the command ----------------------------------------------------------------------------------------------


def test_an_account_that_is_not_configured_is_refused_with_a_suggestion() -> None:
    config = loads(
        'accounts: [{id: "123456789012", regions: [eu-west-1], services: [ec2]}]', "test", environ={}
    )
    with pytest.raises(HeadgateError, match="123456789012"):
        chosen(config, ["123456789013"], None)


async def test_the_command_starts_small_and_ends_with_one_where_something_is_wrong(
    aws_world: Simulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_text(
        f"aws: {{endpoint_url: '{aws_world.url}', role_template: 'arn:aws:iam::{{account}}:role/headgate'}}\n"
        "defaults: {regions: [eu-west-1], services: [ec2]}\n"
        "accounts:\n" + "".join(f"  - {{id: '{a}', external_id: right}}\n" for a in ACCOUNTS)
    )
    words = ["preflight", "--config", str(path), "--only", "aws"]
    assert await asyncio.to_thread(cli.main, [*words, "--limit-accounts", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("ok     aws") == 4  # two accounts, a region each
    assert "2 ListMetrics" in out
    aws_world.faults = replace(Faults(), denied_roles=(ACCOUNTS[0],))
    assert await asyncio.to_thread(cli.main, [*words, "--account", ACCOUNTS[0], "--format", "json"]) == 1
    [finding] = json.loads(capsys.readouterr().out)
    assert (finding["state"], finding["subject"]) == ("wrong", ACCOUNTS[0])
