"""A metric that discovery finds an hour after its first points: read back, landed, and its windows sealed anew. On real servers."""

from __future__ import annotations

from datetime import UTC, datetime

from ingest.clock import ManualClock
from ingest.model import Target, Task, TaskItem, task_id_of
from ingest.seal import scopes_of, seal
from ingest.sources.cloudwatch import CloudWatchSource
from shard_config.model import MetricProfile, ServiceProfile
from tests.cloudwatch_rig import truth_of
from tests.way import NOON_S, the_way
from workers import simulator
from workers.world import World, account_ids

BEGIN_S = NOON_S + 3600
PROFILE = ServiceProfile(
    service="ec2", namespace="AWS/EC2", metrics=(MetricProfile(name="CPUUtilization", unit="Percent"),)
)


def task_of(target: Target, start_s: int, end_s: int) -> Task:
    items = (TaskItem("ec2", start_s, end_s, 300),)
    return Task(task_id_of(target, "rev", 0, items), target, "rev", end_s, 0, "live", 0, items)


async def test_series_found_late_land_from_their_first_point_and_their_windows_seal_anew(
    database: str, kafka_bootstrap: str, topic_prefix: str, bucket: str, s3_endpoint: str
) -> None:
    [account] = account_ids(1)
    target = Target("cloudwatch", account, "eu-west-1")
    world = World(7, [account], ["eu-west-1"], 20, [PROFILE], newborn_share=0.4, newborn_at_s=BEGIN_S + 300)
    clock = ManualClock(BEGIN_S)
    sim = await simulator.start(world, clock=clock, calls_per_s=0)
    async with the_way(
        database,
        kafka_bootstrap,
        topic_prefix,
        bucket,
        s3_endpoint,
        accounts=[{"id": account, "regions": ["eu-west-1"], "services": ["ec2"]}],
        services=[PROFILE.model_dump()],
        aws={"endpoint_url": sim.url},
    ) as way:
        source = CloudWatchSource(way.config, clock)
        source.share_listings(way.archive)

        def later(seconds: float) -> None:
            clock.advance(seconds)
            way.clock.advance(seconds)

        async def sealed() -> dict[int, bool]:
            for _ in range(10):
                await seal(way.sql, scopes_of(way.config), datetime.fromtimestamp(clock.now_s(), UTC))
            rows = await way.sql.fetch("SELECT window_start, sealed_at FROM windows")
            return {int(r["window_start"].timestamp()): r["sealed_at"] is not None for r in rows}

        try:
            await way.collect(task_of(target, BEGIN_S - 900, BEGIN_S), source)
            later(2400)
            await way.collect(task_of(target, BEGIN_S, BEGIN_S + 1500), source)
            await way.land()
            before = await sealed()
            later(1201)
            receipt = await way.collect(task_of(target, BEGIN_S + 1500, BEGIN_S + 3600), source)
            await way.land()
            reopened = await way.sql.fetchval("SELECT count(*) FROM windows WHERE sealed_at IS NULL")
            after = await sealed()
        finally:
            await source.close()
            await sim.close()

        whole = TaskItem("ec2", BEGIN_S - 900, BEGIN_S + 3600, 300)
        expected = truth_of(world, whole, PROFILE, clock.now_s(), target)
        found = await way.sql.fetchval("SELECT count(*) FROM samples")
        # The newest windows may have rows that settle later than this look.
        settled_s = BEGIN_S + 3000
        assert [s for s, done in before.items() if not done] == [BEGIN_S - 600, BEGIN_S - 300]
        assert receipt.items[0].item.start_s == BEGIN_S - 900
        assert receipt.items[0].outcome.metrics_billed == receipt.items[0].outcome.series == 20
        assert reopened == 15
        assert {s: done for s, done in after.items() if s < settled_s} == dict.fromkeys(
            range(BEGIN_S - 900, settled_s, 300), True
        )
        assert found == sum(len(points) for points in expected.values())
