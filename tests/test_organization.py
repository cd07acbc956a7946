"""Accounts from AWS Organizations: how they join a configuration, how they are listed, and how the list is shared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from ingest.clock import SystemClock
from ingest.errors import Transient
from ingest.sources import aws as aws_module
from ingest.sources import organization as organization_module
from ingest.sources.aws_errors import Denied
from ingest.sources.organization import TagCache, list_organization
from shard_config.load import loads
from shard_config.model import Config, ServiceProfile
from shard_config.organization import Listing, Member, question_of, with_accounts
from workers import simulator
from workers.cli import main
from workers.simulator import Simulator
from workers.world import World, account_ids

TEXT = """
defaults: {regions: [eu-west-1, us-east-1], services: [ec2, sqs]}
accounts:
  - {id: "111111111111", alias: ours, services: [ec2]}
organization:
  role_template: arn:aws:iam::{account}:role/Reader
  external_id: a-secret
  exclude: ["333333333333"]
  services: [sqs]
  budget_usd_per_day: 5
"""
FOUND = Listing(
    question="q",
    listed_at_s=1,
    accounts=tuple(Member(id=str(n) * 12, name=f"name {n}") for n in (4, 3, 2, 1)),
)


def config_of(text: str = TEXT) -> Config:
    return loads(text, "headgate.yaml", {})


def test_members_join_as_the_section_says_and_accounts_of_the_file_stay_as_they_are() -> None:
    config = with_accounts(config_of(), FOUND)
    ours, *found = config.accounts
    assert (ours.id, ours.alias, ours.services) == ("111111111111", "ours", ("ec2",))
    assert [(a.id, a.alias) for a in found] == [("222222222222", "name 2"), ("444444444444", "name 4")]
    new = found[0]
    assert (new.regions, new.services) == (("eu-west-1", "us-east-1"), ("sqs",))
    assert (new.role_arn, new.budget_usd_per_day) == ("arn:aws:iam::222222222222:role/Reader", 5)
    assert new.external_id is not None
    assert new.external_id.get_secret_value() == "a-secret"


def test_what_members_are_asked_for_is_among_the_services_before_there_are_any() -> None:
    assert set(config_of().service_by_name) == {"ec2", "sqs"}


def test_a_new_member_is_another_revision_and_the_order_of_the_list_is_not() -> None:
    config = config_of()
    turned = FOUND.model_copy(update={"accounts": FOUND.accounts[::-1]})
    assert with_accounts(config, FOUND).revision == with_accounts(config, turned).revision
    assert with_accounts(config, FOUND).revision != config.revision


def test_without_an_organization_or_without_a_list_nothing_joins() -> None:
    config = config_of()
    assert with_accounts(config, None) is config
    alone = config.model_copy(update={"organization": None})
    assert with_accounts(alone, FOUND) is alone


@pytest.mark.parametrize(
    ("line", "another"),
    [("tags: {stage: prod}", True), ("units: [r-ab12]", True), ("regions: [eu-west-2]", False)],
)
def test_another_question_is_what_aws_would_answer_otherwise(line: str, another: bool) -> None:
    before, after = config_of().organization, config_of(TEXT + f"  {line}\n").organization
    assert before is not None
    assert after is not None
    assert (question_of(before) != question_of(after)) is another


# --- listing, from the simulated AWS --------------------------------------------------------------------------

ACCOUNTS = account_ids(45)
CLOCK = SystemClock()


def organization_of(sim: Simulator, **section: object) -> Config:
    return Config.model_validate(
        {
            "aws": {"endpoint_url": sim.url, "role_template": "arn:aws:iam::{account}:role/Headgate"},
            "organization": {
                "role_arn": f"arn:aws:iam::{ACCOUNTS[0]}:role/Headgate",
                "regions": ["eu-west-1"],
                "services": ["ec2"],
                **section,
            },
        }
    )


@asynccontextmanager
async def simulated(accounts: int = len(ACCOUNTS), external_id: str = "") -> AsyncIterator[Simulator]:
    world = World(
        7, ACCOUNTS[:accounts], ["eu-west-1"], 5, [ServiceProfile(service="ec2", namespace="AWS/EC2")]
    )
    sim = await simulator.start(world, external_id=external_id)
    try:
        yield sim
    finally:
        await sim.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pauses between requests."""
    monkeypatch.setattr(organization_module, "CALLS_PER_S", 1000.0)
    monkeypatch.setattr(aws_module, "BACKOFF_S", (0.01, 0.01))


async def listed(config: Config, tags: TagCache | None = None) -> set[str]:
    listing = await list_organization(config, CLOCK, tags or TagCache())
    return {member.id for member in listing.accounts}


@pytest.mark.usefixtures("hasty")
async def test_all_pages_of_the_whole_organization_are_listed_without_suspended_accounts() -> None:
    async with simulated() as sim:
        assert any(member.suspended for member in sim.organization.members.values())
        assert await listed(organization_of(sim)) == set(ACCOUNTS)


@pytest.mark.usefixtures("hasty")
async def test_units_are_listed_with_all_that_is_below_them() -> None:
    async with simulated() as sim:
        units = {unit.name: unit for unit in sim.organization.units}
        below = {units[name].id for name in ("Workloads", "Prod", "Dev")}
        expected = {m.id for m in sim.organization.members.values() if m.parent in below}
        found = await listed(organization_of(sim, units=[units["Workloads"].id, units["Prod"].id]))
        assert found == expected
        assert len(found) > 20
        assert await listed(organization_of(sim, units=[sim.organization.root])) == set(ACCOUNTS)


@pytest.mark.usefixtures("hasty")
async def test_tags_select_by_pattern_and_are_read_once_an_hour() -> None:
    async with simulated(20) as sim:
        config = organization_of(sim, tags={"env": "pr.d"}, exclude=[ACCOUNTS[1]])
        cache = TagCache()
        found = await listed(config, cache)
        active = [m for m in sim.organization.members.values() if not m.suspended]
        expected = {m.id for m in active if m.tags.get("env") == "prod"} - {ACCOUNTS[1]}
        assert found == expected != {m.id for m in active}
        asked = requests(sim, "ListTagsForResource")
        assert asked == len(active) - 1
        new = sim.add_account(tags={"env": "prod"})
        assert await listed(config, cache) == expected | {new}
        assert requests(sim, "ListTagsForResource") == asked + 1


def requests(sim: Simulator, api: str) -> int:
    return sum(of[api] for of in sim.billing()["accounts"][ACCOUNTS[0]]["calls"].values() if api in of)


@pytest.mark.usefixtures("hasty")
async def test_the_ambient_credentials_list_where_there_is_no_role() -> None:
    async with simulated(3) as sim:
        assert await listed(organization_of(sim, role_arn="")) == set(ACCOUNTS[:3])


@pytest.mark.usefixtures("hasty")
async def test_the_external_id_of_the_role_that_lists_is_sent() -> None:
    async with simulated(3, external_id="wanted") as sim:
        assert await listed(organization_of(sim, external_id="wanted")) == set(ACCOUNTS[:3])
        with pytest.raises(Denied, match="AssumeRole"):
            await listed(organization_of(sim))


@pytest.mark.usefixtures("hasty")
async def test_who_may_not_list_is_denied() -> None:
    async with simulated(3) as sim:
        with pytest.raises(Denied, match="AccessDenied"):
            await listed(organization_of(sim, role_arn=f"arn:aws:iam::{ACCOUNTS[1]}:role/Headgate"))


# --- answers that a real organization gives only in its worst hours ----------------------------------------------


@asynccontextmanager
async def answering(*answers: tuple[int, Mapping[str, object]]) -> AsyncIterator[Config]:
    """STS as simulated, and Organizations that gives these answers one after the other."""
    rest = list(answers)
    async with simulated(1) as sim:

        async def answer(request: web.Request) -> web.Response:
            if "X-Amz-Target" not in request.headers:
                async with (
                    aiohttp.ClientSession() as http,
                    http.post(sim.url, data=await request.read(), headers=request.headers) as passed,
                ):
                    return web.Response(
                        body=await passed.read(), status=passed.status, content_type="text/xml"
                    )
            status, body = rest.pop(0)
            return web.json_response(body, status=status, content_type="application/x-amz-json-1.1")

        app = web.Application()
        app.router.add_post("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            [address] = runner.addresses
            config = organization_of(sim)
            yield config.model_copy(
                update={
                    "aws": config.aws.model_copy(update={"endpoint_url": f"http://127.0.0.1:{address[1]}"})
                }
            )
        finally:
            await runner.cleanup()


def page(*numbers: int, token: str = "", status: str = "ACTIVE") -> tuple[int, dict[str, object]]:
    accounts = [{"Id": str(n) * 12, "Name": f"n{n}", "Status": status} for n in numbers]
    return 200, {"Accounts": accounts, **({"NextToken": token} if token else {})}


THROTTLED = (400, {"__type": "TooManyRequestsException", "message": "slower"})


@pytest.mark.usefixtures("hasty")
async def test_throttled_pages_are_asked_for_again() -> None:
    async with answering(page(1, token="a"), THROTTLED, page(2)) as config:
        assert await listed(config) == {"1" * 12, "2" * 12}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "rest",
    [
        [THROTTLED] * 3,
        [(500, {"__type": "ServiceException"})] * 3,
        [page(2, token="b"), page(3, token="a")],
        [(200, {})],
        [(200, {"Accounts": [{"Id": "12", "State": "ACTIVE"}]})],
        [(200, {"Accounts": ["?"]})],
    ],
    ids=["throttled", "failing", "looping", "without accounts", "no account's id", "no account"],
)
async def test_a_part_is_never_taken_for_the_whole(rest: list[tuple[int, dict[str, object]]]) -> None:
    async with answering(page(1, token="a"), *rest) as config:
        with pytest.raises(Transient):
            await listed(config)


@pytest.mark.usefixtures("hasty")
async def test_an_account_is_active_by_state_or_where_there_is_none_by_status() -> None:
    states: list[dict[str, str]] = [
        {"Id": "1" * 12, "State": "ACTIVE"},
        {"Id": "2" * 12, "State": "PENDING_CLOSURE", "Status": "ACTIVE"},
        {"Id": "3" * 12, "Status": "SUSPENDED"},
        {"Id": "4" * 12, "Status": "ACTIVE"},
    ]
    async with answering((200, {"Accounts": states})) as config:
        assert await listed(config) == {"1" * 12, "4" * 12}


# --- headgate check -------------------------------------------------------------------------------------------


def test_check_says_what_it_did_not_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_text(TEXT)
    assert main(["check", str(path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "the accounts of the whole organization are not asked for: --live does; each gets sqs in eu-west-1, us-east-1"
    )


async def test_check_lists_what_the_organization_would_add(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "headgate.yaml"
    async with simulated(3) as sim:
        text = TEXT.replace("333333333333", ACCOUNTS[2]) + f"aws: {{endpoint_url: '{sim.url}'}}\n"
        await asyncio.to_thread(path.write_text, text)
        assert await asyncio.to_thread(main, ["check", str(path), "--live"]) == 0
    out = capsys.readouterr().out
    assert f"cloudwatch/{ACCOUNTS[0]}/eu-west-1: sqs each 300 s" in out
    assert out.splitlines()[-3:] == [
        "the whole organization has 2 accounts and adds 2, each with sqs in eu-west-1, us-east-1",
        f"  {ACCOUNTS[0]} account-{ACCOUNTS[0]}",
        f"  {ACCOUNTS[1]} account-{ACCOUNTS[1]}",
    ]
