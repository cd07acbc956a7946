"""A month of one account, from landed samples and looks at the simulated AWS by way of rollups and the inventory's history to the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ingest.clock import ManualClock
from ingest.inventory import asking
from ingest.inventory.refresh import refresh
from ingest.model import Series, SeriesKey
from ingest.report import html, tables
from ingest.report.model import MONTH_H, Report, VerdictKind
from ingest.sources import aws, tags
from shard_config.load import loads, shipped_services
from shard_config.model import Config
from shard_config.report import Report as Rules
from tests.conftest import eventually
from tests.report_series import GIB, PRICES
from tests.report_store import DAY_S, MONDAY_S, TARGET, WEEK_S, Store, machine, opened
from workers import run_report, simulator
from workers.simulator import Simulator
from workers.world import World

DAYS = 22
"""A verdict of a week ago needs 21 days."""
FROM_S = MONDAY_S - DAYS * DAY_S
BORN_S = FROM_S - 300 * DAY_S
VCPU_USD = 0.0408225


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    async with opened(database) as made:
        yield made


@pytest.fixture
async def simulated(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Simulator]:
    for module in (asking, tags):
        monkeypatch.setattr(module, "CALLS_PER_S", 1000.0)
    monkeypatch.setattr(aws, "BACKOFF_S", (0.001, 0.001))
    shipped = shipped_services()
    profiles = [
        shipped[name].model_copy(update={"metrics": shipped[name].metrics[:1]}) for name in ("ec2", "rds")
    ]
    made = await simulator.start(World(7, [TARGET.account], [TARGET.region], 24, profiles), calls_per_s=0)
    yield made
    await made.close()


class Scene:
    """The account's owner: what is there, under names of its own, and what becomes of it."""

    def __init__(self, simulated: Simulator) -> None:
        self._owned = simulated.inventory.owned
        self._machines = [str(raw["InstanceId"]) for raw in self.all("ec2")]
        self._names: dict[str, str] = {}
        for id_ in self._machines:
            self._owned.edit(TARGET.account, "ec2", id_)
        self.database, *others = [str(raw["DBInstanceIdentifier"]) for raw in self.all("rds")]
        for id_ in others:
            self._owned.edit(TARGET.account, "rds", id_)
        self._owned.edit(
            TARGET.account, "rds", self.database, Engine="postgres", DBInstanceClass="db.m7g.large", MultiAZ=False,
            AllocatedStorage=100, MaxAllocatedStorage=None, DBClusterIdentifier=None, InstanceCreateTime=BORN_S,
        )  # fmt: skip

    def all(self, service: str) -> list[dict[str, Any]]:
        return self._owned.of(TARGET.account, TARGET.region, service)

    def machine(self, name: str, type_: str = "m7g.xlarge", owner: str = "shop", **more: Any) -> str:
        """There is one of this name from now on, or it is another now; its id."""
        id_ = self._names.setdefault(name, self._machines[len(self._names)])
        attributes = {
            "InstanceType": type_, "CpuOptions": None, "InstanceLifecycle": None, "State": {"Code": 16, "Name": "running"},
            "LaunchTime": BORN_S, "NetworkInterfaces": [], "Tags": [{"Key": "owner", "Value": owner}] if owner else [],
        }  # fmt: skip
        self._owned.edit(TARGET.account, "ec2", id_, **{**attributes, **more})
        return id_

    def gone(self, name: str) -> None:
        self._owned.edit(TARGET.account, "ec2", self._names[name])

    def name_of(self, id_: str) -> str:
        return next(name for name, one in self._names.items() if one == id_)


def config_of(store: Store, simulated: Simulator) -> Config:
    made = loads(
        f"aws: {{endpoint_url: {simulated.url}, role_template: 'arn:aws:iam::{{account}}:role/headgate'}}\n"
        f"postgres: {{dsn: {store.config.postgres.dsn}}}\n"
        f"accounts: [{{id: '{TARGET.account}', regions: [{TARGET.region}], services: [ec2, rds]}}]\n"
        "inventory: {source: describe}\n",
        "test",
        {},
    )
    return made.model_copy(update={"report": Rules(prices=PRICES)})


HOURS = np.arange(FROM_S, MONDAY_S, 3600, dtype=np.int64)


def constant(value: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A point an hour."""
    return HOURS, np.full(len(HOURS), value)


def load(id_: str, cpu: float, peak: float, a_second: float) -> dict[Series, Any]:
    """A machine that did so much in every hour."""
    rates = ("NetworkIn", "NetworkOut", "EBSReadOps", "EBSWriteOps")
    return {
        machine(id_): constant(cpu),
        machine(id_, stat="Maximum"): constant(peak),
        **{machine(id_, metric, "Sum"): constant(3600 * a_second) for metric in rates},
    }


def free_storage(id_: str) -> tuple[Series, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """100 GiB of which one a day is used, and 30 are left at the end."""
    key = SeriesKey(
        TARGET.account, TARGET.region, "AWS/RDS", "FreeStorageSpace", (("DBInstanceIdentifier", id_),), "Minimum", 60
    )  # fmt: skip
    return Series(key), (HOURS, 30 * GIB + (MONDAY_S - HOURS) / DAY_S * GIB)


async def a_month(store: Store, simulated: Simulator) -> tuple[Scene, Report]:
    """What the report says of it."""
    scene, config = Scene(simulated), config_of(store, simulated)
    store.config = config
    idle = [scene.machine(name) for name in ("gone", "stopped", "still idle")]
    large, busy = scene.machine("resized"), scene.machine("busy", owner="")
    await refresh(config, ManualClock(FROM_S))
    await refresh(config, ManualClock(MONDAY_S - 9 * DAY_S))
    scene.gone("gone")
    scene.machine("stopped", State={"Code": 80, "Name": "stopped"})
    scene.machine("resized", "m7g.large")
    scene.machine("new", LaunchTime=MONDAY_S - 2 * DAY_S)
    group = [{"Key": "aws:autoscaling:groupName", "Value": "web"}, {"Key": "owner", "Value": "shop"}]
    scene.machine("of a group", LaunchTime=MONDAY_S - 2 * DAY_S, Tags=group)
    await refresh(config, ManualClock(MONDAY_S - DAY_S))

    points: dict[Series, Any] = {}
    for id_ in idle:
        points |= load(id_, 1.0, 2.0, 0.1)
    points |= load(large, 10.0, 25.0, 1.0)
    points |= load(busy, 60.0, 95.0, 50.0)
    series, values = free_storage(scene.database)
    await store.land({**points, series: values}, TARGET)
    return scene, await store.report(MONDAY_S - WEEK_S, MONDAY_S)


async def test_what_became_of_waste_and_what_is_new_gone_or_full_stands_on_the_page(
    store: Store, simulated: Simulator
) -> None:
    scene, report = await a_month(store, simulated)
    xlarge_usd, large_usd = 4 * VCPU_USD * MONTH_H, 2 * VCPU_USD * MONTH_H

    realised = {scene.name_of(one.key.id): one for one in report.realised.realised}
    assert {name: (one.was, one.how) for name, one in realised.items()} == {
        "gone": (VerdictKind.IDLE, "gone"),
        "stopped": (VerdictKind.IDLE, "stopped"),
        "resized": (VerdictKind.OVERSIZED, "m7g.xlarge → m7g.large"),
    }
    saved = {name: one.saved and one.saved.effective_usd_per_month for name, one in realised.items()}
    assert saved == {
        "gone": pytest.approx(xlarge_usd),
        "stopped": pytest.approx(xlarge_usd),
        "resized": pytest.approx(xlarge_usd - large_usd),
    }
    assert report.realised.total.value == pytest.approx(2 * xlarge_usd + large_usd)

    [still] = report.idle.findings
    assert (scene.name_of(still.key.id), still.owner) == ("still idle", "shop")
    # Since its first sample, and not only for the days that a verdict needs.
    assert still.since_days == DAYS
    assert report.idle.total.value == pytest.approx(xlarge_usd)
    assert report.idle.total.before == pytest.approx(3 * xlarge_usd)
    assert (report.oversized.count.value, report.oversized.count.before) == (0, 1)

    # One of a group came as well, which is no news.
    assert [scene.name_of(one.key.id) for one in report.changes.new] == ["new"]
    assert [scene.name_of(one.key.id) for one in report.changes.vanished] == ["gone"]
    assert "busy" in [
        scene.name_of(one.key.id) for one in report.changes.untagged if one.key.service == "ec2"
    ]

    [filling] = report.filling.fillings
    assert filling.key.id == scene.database
    assert filling.per_day == pytest.approx(GIB, rel=0.01)
    assert filling.to_100.days == pytest.approx(30, abs=1.1)
    assert filling.to_80.days == pytest.approx(10, abs=1.1)

    document = tables.document(report)
    page = html.page(document)
    figures = json.loads(b"".join(tables.to_json(document)))
    assert figures["realised"]["total"]["value"] == report.realised.total.value
    for words in (
        *(one.key.id for one in report.realised.realised),
        "m7g.xlarge → m7g.large",
        scene.database,
    ):
        assert words in page


async def test_a_report_is_written_now_and_then_and_what_fails_is_tried_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_report, "FIRST_S", 0.01)
    monkeypatch.setattr(run_report, "EACH_S", 0.01)
    folder = tmp_path / "out"  # it is not there yet
    writing = asyncio.create_task(run_report.now_and_then(store.config, folder))
    try:
        await asyncio.sleep(0.2)
        assert not writing.done()
        folder.mkdir()
        page = folder / "report.html"
        await eventually(lambda: asyncio.to_thread(page.exists), 60)
        first = page.stat().st_ino
        await eventually(lambda: asyncio.to_thread(lambda: page.stat().st_ino != first), 60)
    finally:
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
    assert json.loads((folder / "report.json").read_text())["resources"] == []
