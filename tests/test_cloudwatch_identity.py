"""Whose credentials the CloudWatch source uses, and what it does without."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest

from ingest.errors import Transient
from ingest.model import LookStatus
from ingest.sources import aws
from ingest.sources.cloudwatch import CloudWatchSource
from tests.cloudwatch_rig import (
    ACCOUNTS,
    CLOCK,
    EC2,
    REGION,
    SQS,
    Ahead,
    MovableWall,
    config_of,
    item_of,
    looked,
    looked_ahead,
    rig,
    target_of,
)
from workers import simulator
from workers.simulated.faults import Faults
from workers.world import World

# --- identity -------------------------------------------------------------------------------------------------


async def test_forbidden_accounts_and_roles_are_forbidden_and_others_are_not_touched() -> None:
    faults = Faults(forbidden_accounts=ACCOUNTS[:1], denied_roles=ACCOUNTS[1:2])
    async with rig(faults=faults) as (_, source):
        found = [(await looked(source, item_of(), target_of(a)))[1] for a in ACCOUNTS]
        assert [o.status for o in found] == [
            LookStatus.FORBIDDEN,
            LookStatus.FORBIDDEN,
            LookStatus.COMPLETE,
        ]
        assert "ListMetrics" in found[0].detail
        assert "AssumeRole" in found[1].detail


async def test_forbidden_series_leave_the_look_partial_and_all_of_them_forbidden() -> None:
    async with rig(faults=Faults(forbidden_share=0.5)) as (sim, source):
        _, some = await looked(source, item_of())
        sim.faults = Faults(forbidden_share=1.0)
        _, everything = await looked(source, item_of())
        assert some.status is LookStatus.PARTIAL
        assert "forbidden" in some.detail
        assert everything.status is LookStatus.FORBIDDEN


async def test_the_external_id_is_sent_and_a_wrong_one_is_refused() -> None:
    for ours, expected in (("s3cret", LookStatus.COMPLETE), ("wrong", LookStatus.FORBIDDEN)):
        async with rig(wanted_id="s3cret", external_id=ours) as (_, source):
            _, outcome = await looked(source, item_of())
            assert outcome.status is expected
            assert ours not in outcome.detail


async def test_credentials_of_another_account_label_no_data() -> None:
    async with rig(role="") as (sim, source):
        batches, outcome = await looked(source, item_of(), target_of(ACCOUNTS[1]))
        assert (batches, outcome.status) == ([], LookStatus.FORBIDDEN)
        assert f"belong to account {ACCOUNTS[0]}, not to {ACCOUNTS[1]}" in outcome.detail
        assert outcome.requests == {"GetCallerIdentity": 1}
        assert sim.billing()["accounts"][ACCOUNTS[0]]["metrics_requested"] == 0


async def test_without_a_role_the_ambient_credentials_are_used_once_verified() -> None:
    async with rig(role="") as (_, source):
        _, outcome = await looked(source, item_of())
        assert outcome.status is LookStatus.COMPLETE
        assert outcome.requests == {"GetCallerIdentity": 1, "ListMetrics": 1, "GetMetricData": 1}


async def test_fifty_looks_at_once_make_one_refresh_and_one_discovery() -> None:
    async with rig(faults=Faults(latency_ms=20)) as (_, source):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(looked(source, item_of())) for _ in range(50)]
        sent: Counter[str] = Counter()
        for task in tasks:
            sent.update(task.result()[1].requests)
            assert task.result()[1].status is LookStatus.COMPLETE
        assert (sent["AssumeRole"], sent["GetCallerIdentity"], sent["ListMetrics"]) == (1, 1, 1)


async def test_fifty_looks_at_a_denied_role_share_one_refusal() -> None:
    async with rig(faults=Faults(denied_roles=ACCOUNTS, latency_ms=20)) as (_, source):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(looked(source, item_of())) for _ in range(50)]
        assert {t.result()[1].status for t in tasks} == {LookStatus.FORBIDDEN}
        assert sum(t.result()[1].requests.get("AssumeRole", 0) for t in tasks) == 1


async def test_credentials_are_renewed_before_they_expire_and_kept_while_sts_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def away(*_: Any) -> Any:
        raise Transient("aws AssumeRole", "no answer")

    world = World(7, ACCOUNTS[:1], [REGION], 40, [EC2])
    clock = Ahead()
    sim = await simulator.start(world, clock=CLOCK, calls_per_s=0)
    source = CloudWatchSource(config_of(sim, [EC2]), clock)
    try:
        outcomes = [(await looked_ahead(source, clock))[1]]
        clock.ahead_s = aws.LIFETIME_S - aws.REFRESH_MARGIN_S + 1
        with monkeypatch.context() as patched:
            patched.setattr(source._asking.aws, "_obtain", away)
            outcomes.append((await looked_ahead(source, clock))[1])
        clock.ahead_s += aws.FAILURE_KEPT_S
        outcomes.append((await looked_ahead(source, clock))[1])
    finally:
        await source.close()
        await sim.close()
    assert [o.status for o in outcomes] == [LookStatus.COMPLETE] * 3
    assert [o.requests.get("AssumeRole", 0) for o in outcomes] == [1, 0, 1]


async def test_credentials_that_expire_are_renewed_once_and_the_look_goes_on() -> None:
    world = World(7, ACCOUNTS, [REGION], 1600, [SQS])
    clock = MovableWall()
    sim = await simulator.start(world, clock=CLOCK, calls_per_s=0, credential_clock=clock)
    source = CloudWatchSource(config_of(sim, [SQS]), CLOCK)
    try:
        await looked(source, item_of("sqs"))
        clock.offset_s = 7200  # for AWS two hours have passed, for us none
        _, outcome = await looked(source, item_of("sqs"))
    finally:
        await source.close()
        await sim.close()
    assert outcome.status is LookStatus.COMPLETE
    assert (outcome.requests["AssumeRole"], outcome.requests["GetCallerIdentity"]) == (1, 1)


async def test_clients_are_few_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        sim = await simulator.start(World(7, ACCOUNTS, [REGION], 4, [SQS]), clock=CLOCK, calls_per_s=0)
        stack.push_async_callback(sim.close)
        source = CloudWatchSource(config_of(sim, [SQS]), CLOCK)
        source._asking.aws._clients_max = 2
        for account in ACCOUNTS * 2:
            assert (await looked(source, item_of("sqs"), target_of(account)))[1].status is LookStatus.COMPLETE
            assert len(source._asking.aws._clients) <= 2
        await source.close()
        assert source._asking.aws._clients == {}
