"""What a remote writer sends beside samples, on a real Prometheus: names of resources, their info series, and zeros for what is missing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ingest import resources, wire
from ingest.log import Outgoing
from ingest.model import (
    Batch,
    LookStatus,
    Outcome,
    Receipt,
    ReceiptItem,
    Series,
    SeriesKey,
    Target,
    TaskItem,
    series_ids,
)
from ingest.resources import ResourceList, cache_name
from ingest.sources import listing
from ingest.sources.listing import Listing, depends_on
from ingest.sources.packed import pack
from tests.conftest import eventually
from tests.prometheus_server import PrometheusServer, needs_prometheus
from tests.test_discovery import FakeCache
from tests.test_remote_writer import ACCOUNTS, REGION, Stage, metric, staged
from workers import remote_beside, remote_writer

pytestmark = needs_prometheus

TARGET = Target("cloudwatch", ACCOUNTS[0], REGION)
GRID_S = 2
NAME = "aws_ec2_cpuutilization_average"


def arn(instance: str) -> str:
    return f"arn:aws:ec2:{REGION}:{ACCOUNTS[0]}:instance/{instance}"


def series(instance: str) -> Series:
    dimensions = (("InstanceId", instance),)
    return Series(SeriesKey(ACCOUNTS[0], REGION, "AWS/EC2", "CPUUtilization", dimensions, "Average", 1))


def batch(points: dict[str, dict[int, float]]) -> Batch:
    members = tuple(map(series, points))
    return Batch(
        task_id="0" * 32,
        target=TARGET,
        service="ec2",
        observed_at_ms=time.time_ns() // 1_000_000,
        revision=0,
        grid_s=GRID_S,
        series=members,
        counts=np.array([len(of) for of in points.values()], np.int32),
        timestamps_s=np.array([t for of in points.values() for t in of], np.int64),
        values=np.array([v for of in points.values() for v in of.values()], np.float64),
        ids=series_ids(members),
    )


@asynccontextmanager
async def writing(
    home: Path, bootstrap: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Stage, FakeCache, PrometheusServer]]:
    """A service of windows of two seconds, zeros and tags, and what exporters have shared."""
    cache = FakeCache()

    @asynccontextmanager
    async def archive(*_: object) -> AsyncIterator[FakeCache]:
        yield cache

    monkeypatch.setattr(remote_writer, "open_archive", archive)
    monkeypatch.setattr(remote_writer, "REFRESH_S", 0.2)
    monkeypatch.setattr(remote_beside, "LISTINGS_S", 0.6)
    monkeypatch.setattr(remote_beside, "INFO_S", 1)
    async with staged(home, bootstrap, prefix, 1) as stage:
        stage.base["services"] = {"ec2": {"period_s": 1, "poll_interval_s": GRID_S, "settling_s": 0}}
        of_ec2 = {"nil_to_zero": ["CPU.*"], "exported_tags": ["Team"]}
        stage.write(resources=True, services={"ec2": of_ec2})
        share(stage, cache)
        yield stage, cache, stage.servers["shard-0"]


def share(stage: Stage, cache: FakeCache, **tags: str) -> None:
    """As an exporter does: both instances listed, the first tagged."""
    now_s = int(time.time())
    tagged = ((arn("i-1"), {"Team": "payments"} | tags),)
    listed = ResourceList(now_s, ("ec2:instance",), tagged)
    cache.objects[cache_name(TARGET, "ec2")] = resources.encode(listed, TARGET, "ec2")
    [profile] = stage.config.services
    limits = stage.config.limits
    tables = tuple(pack([series("i-1"), series("i-2")], limits))
    found = Listing(tables, now_s * 1000, depends_on(profile, limits))
    name = ("listings", TARGET.source, TARGET.account, TARGET.region, "ec2")
    cache.objects[name] = listing.encode(found, TARGET, "ec2")


async def tell(stage: Stage, start_s: int, *batches: Batch) -> None:
    """The receipt of a complete look at one window, after it has settled."""
    ids = tuple(payload.batch_id for one in batches for payload in wire.encode_batch(one))
    end_s = start_s + GRID_S
    item = TaskItem("ec2", start_s, end_s, GRID_S)
    done = ReceiptItem(item, Outcome(LookStatus.COMPLETE, "", end_s * 1000, 2, {}, 2), 1, (), ids)
    receipt = Receipt("0" * 32, TARGET, "shard-1", end_s, end_s * 1000, end_s * 1000, "", (done,))
    out = Outgoing(str(TARGET).encode(), wire.encode_receipt(receipt))
    await stage.producer.send(stage.config.kafka.topic("ledger"), [out])


async def until_held(server: PrometheusServer, instance: str, wanted: dict[int, float]) -> None:
    async def is_held() -> bool:
        now_s = int(time.time())
        found = await asyncio.to_thread(
            server.samples, f'{NAME}{{dimension_InstanceId="{instance}"}}', now_s - 600, now_s + 60
        )
        held = {t: v for points in found.values() for t, v in points.items()}
        return wanted.items() <= held.items()

    await eventually(is_held, timeout_s=20)


async def test_series_have_their_resources_names_and_info_and_what_is_missing_is_zero(
    tmp_path: Path, kafka_bootstrap: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        writing(tmp_path, kafka_bootstrap, topic_prefix, monkeypatch) as (stage, _, server),
        stage.running(),
    ):
        first_s = int(time.time()) - 1
        await stage.publish([batch({"i-1": {first_s: 7.0}})])
        await until_held(server, "i-1", {first_s: 7.0})
        [(labels, _)] = await asyncio.to_thread(server.query, NAME)
        assert (labels["name"], labels["tag_Team"]) == (arn("i-1"), "payments")

        async def has_info() -> bool:
            found = await asyncio.to_thread(server.query, "aws_ec2_info")
            return [(one["name"], one["tag_Team"], value) for one, value in found] == [
                (arn("i-1"), "payments", 0.0)
            ]

        await eventually(has_info, timeout_s=10)
        await asyncio.sleep(1)  # the listing is read, the ledger too
        start_s = (int(time.time()) // GRID_S + 1) * GRID_S
        await asyncio.sleep(start_s + GRID_S - time.time())
        late = batch({"i-1": {start_s: 5.0}})
        await tell(stage, start_s, late)
        await asyncio.sleep(0.5)
        await stage.publish([late])
        await until_held(server, "i-1", {start_s: 5.0, start_s + 1: 0.0})
        await until_held(server, "i-2", {start_s: 0.0, start_s + 1: 0.0})
        assert metric("headgate_remote_write_refused_total", "shard-0", reason="changed") == 0


async def test_when_tags_change_series_are_called_otherwise(
    tmp_path: Path, kafka_bootstrap: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writing(tmp_path, kafka_bootstrap, topic_prefix, monkeypatch) as (stage, cache, server):
        [profile] = stage.config.services
        share(stage, cache)
        name = cache_name(TARGET, "ec2")
        old = resources.decode(cache.objects[name], TARGET, "ec2")
        aged = replace(old, listed_at_s=old.listed_at_s - profile.discovery_interval_s)
        cache.objects[name] = resources.encode(aged, TARGET, "ec2")
        monkeypatch.setattr(resources, "RETRY_S", 0.2)
        async with stage.running():
            at_s = int(time.time()) - 2
            await stage.publish([batch({"i-1": {at_s: 1.0}})])
            await until_held(server, "i-1", {at_s: 1.0})
            share(stage, cache, Team="search")
            found: list[str] = []
            for n in range(200):
                at_s = int(time.time())
                await stage.publish([batch({"i-1": {at_s: 2.0 + n}})])
                answer = await asyncio.to_thread(server.query, NAME)
                found = sorted({one["tag_Team"] for one, _ in answer})
                if found == ["payments", "search"]:
                    break
                await asyncio.sleep(0.2)
            assert found == ["payments", "search"]
