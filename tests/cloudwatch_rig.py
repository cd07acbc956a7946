"""A CloudWatch source and the simulated AWS that it looks at, on loopback, and what the look should have brought."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from ingest.clock import Clock, SystemClock
from ingest.model import Batch, Outcome, SeriesKey, Target, TaskItem
from ingest.schedule import Grid
from ingest.sources.cloudwatch import CloudWatchSource
from ingest.sources.selection import series_of
from shard_config.model import Config, MetricProfile, ServiceProfile
from workers import simulator
from workers.simulated.faults import Faults
from workers.simulator import Simulator
from workers.world import Truth, World, account_ids

ACCOUNTS = account_ids(3)
REGION = "eu-west-1"
EC2 = ServiceProfile(
    service="ec2",
    namespace="AWS/EC2",
    metrics=(
        MetricProfile(name="CPUUtilization", statistics=("Average", "Maximum"), unit="Percent"),
        MetricProfile(name="NetworkIn", statistics=("Sum",), unit="Bytes"),
    ),
)
SQS = ServiceProfile(service="sqs", namespace="AWS/SQS", statistics=("Sum",))


NOW_S = 1_795_500_000
"""When the tests begin, on their clock: requests are the same bytes in each run, so a fault's seed strikes the same ones."""
CLOCK = SystemClock(NOW_S - int(time.time()))
ROLE = "arn:aws:iam::{account}:role/Headgate"


def config_of(
    sim: Simulator, profiles: Sequence[ServiceProfile] = (EC2, SQS), role: str = ROLE, **account: Any
) -> Config:
    accounts = [
        {
            "id": a,
            "regions": [REGION],
            "services": [p.service for p in profiles],
            "calls_per_s": 5000,
            **account,
        }
        for a in sim.truth.accounts
    ]
    return Config.model_validate(
        {
            "accounts": accounts,
            "services": [p.model_dump() for p in profiles],
            "aws": {"endpoint_url": sim.url, "role_template": role},
        }
    )


@asynccontextmanager
async def rig(
    truth: Truth | None = None,
    faults: Faults | None = None,
    profiles: Sequence[ServiceProfile] = (EC2, SQS),
    wanted_id: str = "",
    **config: Any,
) -> AsyncIterator[tuple[Simulator, CloudWatchSource]]:
    """A simulated AWS without quotas, and a source that looks at it."""
    world = truth or World(7, ACCOUNTS, [REGION], 40, profiles)
    sim = await simulator.start(world, clock=CLOCK, faults=faults, external_id=wanted_id, calls_per_s=0)
    try:
        source = CloudWatchSource(config_of(sim, profiles, **config), CLOCK)
        try:
            yield sim, source
        finally:
            await source.close()
    finally:
        await sim.close()


def target_of(account: str = ACCOUNTS[0]) -> Target:
    return Target("cloudwatch", account, REGION)


def item_of(service: str = "ec2", ago_s: int = 900, length_s: int = 900, grid_s: int = 300) -> TaskItem:
    start_s = (NOW_S - ago_s) // grid_s * grid_s
    return TaskItem(service, start_s, start_s + length_s, grid_s)


async def looked(
    source: CloudWatchSource, item: TaskItem, target: Target | None = None, wait_s: float = 20
) -> tuple[list[Batch], Outcome]:
    deadline_s = CLOCK.monotonic_s() + wait_s
    got = [answer async for answer in source.look("t1", target or target_of(), item, deadline_s)]
    *batches, outcome = got
    assert isinstance(outcome, Outcome)
    return [b for b in batches if isinstance(b, Batch)], outcome


Landed = dict[SeriesKey, list[tuple[int, float]]]


def landed(batches: Sequence[Batch]) -> Landed:
    """Points by series, as served; a series is in one batch only, unless its range was cut."""
    found: Landed = {}
    for batch in batches:
        ends = np.cumsum(batch.counts).tolist()
        for series, end, count in zip(batch.series, ends, batch.counts.tolist(), strict=True):
            points = zip(
                batch.timestamps_s[end - count : end].tolist(),
                batch.values[end - count : end].tolist(),
                strict=True,
            )
            found.setdefault(series.key, []).extend(points)
    return found


def truth_of(
    truth: Truth, item: TaskItem, profile: ServiceProfile, asked_at_s: int, target: Target | None = None
) -> Landed:
    """What a faultless look would have got, as of a time."""
    target = target or target_of()
    found: Landed = {}
    metrics = [
        (m.name, m.dimensions)
        for m in truth.metrics(target.account, target.region)
        if m.namespace == profile.namespace
    ]
    for series in series_of(metrics, target, profile):
        k = series.key
        times_s, values = truth.points(
            k.account,
            k.region,
            k.namespace,
            k.metric,
            k.dimensions,
            k.stat,
            k.period_s,
            item.start_s,
            item.end_s,
            asked_at_s,
        )
        if len(times_s):
            found[k] = list(zip(times_s.tolist(), values.tolist(), strict=True))
    return found


def true_as_observed(truth: Truth, batches: Sequence[Batch], item: TaskItem, profile: ServiceProfile) -> bool:
    """Whether each batch is what the world says as of that batch's own observed_at."""
    by_time = {b.observed_at_ms: truth_of(truth, item, profile, b.observed_at_ms // 1000) for b in batches}
    return all(
        points == by_time[batch.observed_at_ms][key]
        for batch in batches
        for key, points in landed([batch]).items()
    )


class Ahead(SystemClock):
    """A clock whose monotonic time can be put forward."""

    ahead_s = 0.0

    def __init__(self) -> None:
        super().__init__(CLOCK.offset_s)

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


async def looked_ahead(source: CloudWatchSource, clock: SystemClock) -> tuple[list[Batch], Outcome]:
    got = [a async for a in source.look("t", target_of(), item_of(ago_s=7200), clock.monotonic_s() + 20)]
    assert isinstance(got[-1], Outcome)
    return [b for b in got if isinstance(b, Batch)], got[-1]


class MovableWall(SystemClock):
    """A wall clock that a test puts forward."""


async def everything_is_answered(source: CloudWatchSource, target: Target, grid: Grid, clock: Clock) -> None:
    """One look at a service's last window, in full."""
    end_s = grid.floor(clock.now_s())
    item = TaskItem(grid.service, end_s - grid.poll_interval_s, end_s, grid.poll_interval_s)
    async for out in source.look("0" * 32, target, item, clock.monotonic_s() + 30):
        assert not isinstance(out, Outcome) or out.status == "complete", out
