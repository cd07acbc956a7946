"""Credentials of `ingest.sources.aws` against the simulated STS; how the source uses them is in test_cloudwatch_identity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from ingest.clock import ManualClock, SystemClock
from ingest.sources import aws as aws_module
from ingest.sources.aws import Access, Aws, Tally
from ingest.sources.aws_errors import Denied
from shard_config.model import Account, Config, ServiceProfile
from workers import simulator
from workers.simulated.faults import Faults
from workers.simulator import Simulator
from workers.world import World, account_ids

OURS, THEIRS = account_ids(2)
REGION = "eu-west-1"
RENEWAL_S = aws_module.LIFETIME_S - aws_module.REFRESH_MARGIN_S + 1


class Ahead(SystemClock):
    """The machine's clock, moved on."""

    ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


class Identity:
    """An `Aws` on a simulated one."""

    def __init__(self, sim: Simulator, at_aws: ManualClock) -> None:
        self.sim = sim
        self.at_aws = at_aws
        self.clock = Ahead()
        self.account = Account(id=OURS, regions=(REGION,), services=("ec2",))
        template = "arn:aws:iam::{account}:role/Headgate"
        config = Config.model_validate({"aws": {"endpoint_url": sim.url, "role_template": template}})
        self.aws = Aws(config, self.clock)
        self.tally = Tally()

    async def key(self, account: Account | None = None) -> str:
        deadline_s = self.clock.monotonic_s() + 10
        found = await self.aws.credentials(account or self.account, deadline_s, self.tally)
        return found.access_key


@pytest.fixture
async def identity() -> AsyncIterator[Identity]:
    world = World(7, [OURS, THEIRS], [REGION], 1, [ServiceProfile(service="ec2", namespace="AWS/EC2")])
    at_aws = ManualClock(1_795_500_000)
    sim = await simulator.start(world, credential_clock=at_aws)
    made = Identity(sim, at_aws)
    try:
        yield made
    finally:
        await made.aws.close()
        await sim.close()


async def test_every_new_credentials_are_verified_and_kept_ones_are_not_asked_about(
    identity: Identity,
) -> None:
    await identity.key()
    await identity.key()
    assert identity.tally.requests == {"AssumeRole": 1, "GetCallerIdentity": 1}
    identity.clock.ahead_s = RENEWAL_S
    identity.at_aws.advance(1)  # within a second the simulated STS makes the same keys again
    await identity.key()
    assert identity.tally.requests == {"AssumeRole": 2, "GetCallerIdentity": 2}


async def test_credentials_that_turn_out_to_be_another_accounts_are_given_to_nobody(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def theirs(_: Access) -> str:
        return THEIRS

    await identity.key()
    identity.clock.ahead_s = RENEWAL_S
    identity.at_aws.advance(1)
    monkeypatch.setattr(identity.aws, "_identity", theirs)
    for _ in range(2):
        with pytest.raises(Denied, match=f"belong to account {THEIRS}, not to {OURS}"):
            await identity.key()


async def test_an_account_that_is_refused_spoils_no_other(identity: Identity) -> None:
    identity.sim.faults = Faults(denied_roles=(THEIRS,))
    theirs = identity.account.model_copy(update={"id": THEIRS})
    ours, refused = await asyncio.gather(identity.key(), identity.key(theirs), return_exceptions=True)
    assert isinstance(ours, str)
    assert isinstance(refused, Denied)


async def test_the_account_of_the_ambient_credentials_is_asked_for(identity: Identity) -> None:
    deadline_s = identity.clock.monotonic_s() + 10
    assert await identity.aws.own_account(REGION, deadline_s, identity.tally) == OURS
    assert identity.tally.requests == {"GetCallerIdentity": 1}
