"""What the simulated AWS can do wrong, against the real source and collector: bounded, never half-published, said clearly, and healed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from ingest import collect, wire
from ingest.batch import decode_batch
from ingest.collect import Collector, Topics
from ingest.errors import HeadgateError, Transient
from ingest.model import (
    Batch,
    Receipt,
    ReceiptItem,
    SeriesKey,
    Target,
    Task,
    TaskItem,
    task_id_of,
    window_counts,
)
from ingest.sources import aws, cloudwatch, discovery, metric_data, organization, transport
from ingest.sources.cloudwatch import CloudWatchSource
from ingest.sources.organization import TagCache, list_organization
from shard_config.model import (
    Config,
    Limits,
    Organization,
    ServiceProfile,
)
from tests.cloudwatch_rig import NOW_S, ROLE, Ahead
from tests.fake_log import FakeBroker, FakeSender
from tests.fakes import FakeArchive
from tests.simulated_modes import (
    ATTEMPTS,
    BAD,
    COMPLETE,
    DEADLINE_S,
    FAILED,
    GOOD,
    METRICS,
    MODES,
    PAGES_MAX,
    READ_TIMEOUT_S,
    ROUNDS,
    SPARED,
    SQS,
    STRUCK,
    Mode,
)
from workers import simulator
from workers.simulated import cloudwatch as simulated_cloudwatch
from workers.simulated.faults import Faults
from workers.simulated.resources import resources_of
from workers.simulator import Simulator
from workers.world import SETTLED, Question, Truth, World

# --- the scene ------------------------------------------------------------------------------------------------


class Scene:
    """A simulated AWS, a source that looks at it, and a collector over an archive and a log in memory."""

    def __init__(self, sim: Simulator, source: CloudWatchSource, clock: Ahead, config: Config) -> None:
        self.sim = sim
        self.config = config
        self.source = source
        self.clock = clock
        self.archive = FakeArchive()
        self.broker = FakeBroker(raw=4, ledger=4)
        self.collector = Collector(
            "exporter-1",
            {"cloudwatch": source},
            self.archive,
            FakeSender(self.broker),
            Topics("raw", "ledger"),
            clock,
            deadline_s=DEADLINE_S,
        )

    async def collect(self, target: Target, item: TaskItem, attempt: int = 0) -> Receipt:
        items = (item,)
        task_id = task_id_of(target, "rev", attempt, items)
        task = Task(task_id, target, "rev", item.end_s, attempt, "live", 0, items)
        return await self.collector.collect(task, maybe_second_try=False)

    def requests(self, account: str = STRUCK) -> dict[str, int]:
        return {api: n for (of, api), n in self.sim.received.items() if of == account}

    def bill(self) -> int:
        """Metrics that the struck account has to pay for so far."""
        return int(self.sim.billing()["accounts"][STRUCK]["metrics_requested"])

    def published(self, receipt: Receipt) -> list[Batch]:
        """What is on `raw` of a receipt."""
        batches = [decode_batch(r.value, Limits()) for r in self.broker.records("raw")]
        return [b for b in batches if b.task_id == receipt.task_id]


@asynccontextmanager
async def scene(profile: ServiceProfile = SQS, world: World | None = None) -> AsyncIterator[Scene]:
    world = world or World(7, (STRUCK, SPARED), (BAD.region, GOOD.region), METRICS, (SQS,))
    clock = Ahead()
    sim = await simulator.start(world, clock=clock, calls_per_s=0, bill_pages=True)
    try:
        accounts = [
            {"id": t.account, "regions": [t.region], "services": ["sqs"], "calls_per_s": 5_000}
            for t in (BAD, GOOD)
        ]
        config = Config.model_validate(
            {
                "accounts": accounts,
                "services": [profile.model_dump()],
                "aws": {"endpoint_url": sim.url, "role_template": ROLE},
            }
        )
        source = CloudWatchSource(config, clock)
        try:
            yield Scene(sim, source, clock, config)
        finally:
            await source.close()
    finally:
        await sim.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer attempts, no long waits between them, and pages and calls of fifty."""
    monkeypatch.setattr(simulated_cloudwatch, "LIST_PAGE", 50)
    monkeypatch.setattr(metric_data, "QUERIES_PER_CALL_MAX", 50)
    monkeypatch.setattr(aws, "BACKOFF_S", (0.01,) * (ATTEMPTS - 1))
    monkeypatch.setattr(aws, "FAILURE_KEPT_S", 0.0)
    monkeypatch.setattr(cloudwatch, "ROUND_PAUSE_S", (0.01,) * (ROUNDS - 1))
    monkeypatch.setattr(discovery, "CALLS_PER_S", 5_000.0)
    monkeypatch.setattr(organization, "CALLS_PER_S", 5_000.0)
    monkeypatch.setattr(discovery, "PAGES_MAX", PAGES_MAX)


def item_of(ago_s: int = 7200) -> TaskItem:
    start_s = (NOW_S - ago_s) // 300 * 300
    return TaskItem("sqs", start_s, start_s + 900, 300)


def points_of(batches: Sequence[Batch]) -> dict[SeriesKey, dict[int, float]]:
    """By series, timestamp → value."""
    found: dict[SeriesKey, dict[int, float]] = {}
    for batch in batches:
        ends = np.cumsum(batch.counts)
        for series, end, count in zip(batch.series, ends, batch.counts, strict=True):
            of = slice(int(end - count), int(end))
            times_s, values = batch.timestamps_s[of].tolist(), batch.values[of].tolist()
            found.setdefault(series.key, {}).update(zip(times_s, values, strict=True))
    return found


def expected(
    world: Truth, target: Target, item: TaskItem, observed_at_ms: int, profile: ServiceProfile = SQS
) -> dict[SeriesKey, dict[int, float]]:
    """What a faultless look would have got, as of a time."""
    wanted = {tag for only in profile.only for tag in only.tags.items()}
    tagged = {
        r.arn.rpartition(":")[2]
        for r in resources_of(world, target.account, target.region)
        if wanted <= r.tags.items()
    }
    questions = [
        Question(*m[:3], "Sum", 60)
        for m in world.metrics(target.account, target.region)
        if not wanted or m.dimensions[0][1] in tagged
    ]
    found = world.answers(
        target.account, target.region, questions, item.start_s, item.end_s, observed_at_ms // 1000
    )
    return {
        SeriesKey(target.account, target.region, q.namespace, q.metric, q.dimensions, "Sum", 60): dict(
            zip(*answer, strict=True)
        )
        for q, answer in zip(questions, found, strict=True)
        if answer[0]
    }


async def check_nothing_is_half_published(found: Scene, receipt: Receipt) -> None:
    """What is archived is what is published, the receipt counts it, and each point of it is the truth as of its look."""
    [done] = receipt.items
    archived = await found.archive.get(receipt.archive_key)
    assert archived is not None
    assert archived.receipt == receipt
    raw = {r.value for r in found.broker.records("raw")}
    assert raw >= {p.value for p in archived.payloads}
    batches = found.published(receipt)
    receipts = [wire.decode_receipt(r.value) for r in found.broker.records("ledger")]
    assert [r for r in receipts if r.task_id == receipt.task_id] == [receipt]
    assert len(batches) == len(done.batches) == len(archived.payloads)
    assert sum(b.points for b in batches) == done.points
    assert _windows(batches) == {w.start_s: (w.points, w.digest) for w in done.windows}
    for batch in batches:
        truth = expected(found.sim.truth, receipt.target, done.item, batch.observed_at_ms)
        for key, points in points_of([batch]).items():
            assert points.items() <= truth[key].items()


def _windows(batches: Sequence[Batch]) -> dict[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    for b in batches:
        for w in window_counts(b.point_ids(), b.timestamps_s, b.values, b.grid_s):
            points, digest = found.get(w.start_s, (0, 0))
            found[w.start_s] = points + w.points, (digest + w.digest) % 2**64
    return found


def check_whole(found: Scene, receipt: Receipt, profile: ServiceProfile = SQS) -> ReceiptItem:
    [done] = receipt.items
    assert done.outcome.status is COMPLETE, done.outcome.detail
    truth = expected(found.sim.truth, receipt.target, done.item, done.outcome.observed_at_ms, profile)
    assert points_of(found.published(receipt)) == truth
    assert truth
    return done


# --- the modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
async def test_bad_input_is_bounded_said_clearly_never_half_published_and_healed(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "slow_ms" in mode.faults:
        monkeypatch.setattr(transport, "READ_TIMEOUT_S", READ_TIMEOUT_S)
    async with scene(mode.profile) as found:
        if mode.listed_before:
            await found.collect(BAD, item_of(10_800))
        if mode.listing_due:
            found.clock.ahead_s += SQS.discovery_interval_s
        before, paid = found.requests(), found.bill()
        found.sim.faults = mode.all_faults
        begun_s, others_s = found.clock.monotonic_s(), 0.0

        async def others() -> Receipt:
            nonlocal others_s
            receipt = await found.collect(GOOD, item_of())
            others_s = found.clock.monotonic_s() - begun_s
            return receipt

        struck, spared = await asyncio.gather(found.collect(BAD, item_of()), others())
        took_s = found.clock.monotonic_s() - begun_s
        bill = found.bill() - paid
        calls = {api: n - before.get(api, 0) for api, n in found.requests().items()}
        [done] = struck.items

        assert done.outcome.status is mode.status, done.outcome.detail
        for words in mode.words:
            assert words in done.outcome.detail
        most = {"ListMetrics": 0 if mode.listed_before else 2, "GetMetricData": 2} | mode.calls_max
        assert all(calls.get(api, 0) <= n for api, n in most.items()), calls
        assert took_s < DEADLINE_S + 0.5
        outcome = done.outcome
        assert outcome.metrics_billed <= bill <= outcome.metrics_billed + outcome.metrics_in_doubt
        assert others_s < DEADLINE_S / 2
        check_whole(found, spared, mode.profile)
        await check_nothing_is_half_published(found, struck)

        found.sim.faults = Faults()
        # A listing that was paid for in vain is not tried again at once.
        found.clock.ahead_s += SQS.discovery_interval_s
        healed = await found.collect(BAD, item_of(), attempt=1)
        check_whole(found, healed, mode.profile)
        await check_nothing_is_half_published(found, healed)


@pytest.mark.parametrize("how", ["cut off", "raises"])
async def test_what_a_look_without_an_end_has_asked_for_is_in_its_receipt(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene() as found:
        await found.collect(BAD, item_of(10_800))
        paid = found.bill()
        with monkeypatch.context() as broken:
            if how == "cut off":
                found.sim.faults = Faults(latency_ms=700, only_accounts=(STRUCK,))
                broken.setattr(collect, "OVERTIME_S", 0.3 - DEADLINE_S)
            else:
                broken.setattr(CloudWatchSource, "_outcome", lambda *_: 1 / 0)
            receipt = await found.collect(BAD, item_of())
        await asyncio.sleep(0.8 if how == "cut off" else 0)  # until AWS is done with what was asked
        outcome, bill = receipt.items[0].outcome, found.bill() - paid
        found.sim.faults = Faults()
        check_whole(found, await found.collect(BAD, item_of(), attempt=1))

    assert (outcome.status, found.published(receipt)) == (FAILED, [])
    assert "the source raised" in outcome.detail
    assert (outcome.metrics_billed, outcome.metrics_in_doubt) == ((0, 60) if how == "cut off" else (60, 0))
    assert outcome.metrics_billed <= bill <= outcome.metrics_billed + outcome.metrics_in_doubt
    assert outcome.requests["GetMetricData"] == 2


async def test_a_look_back_is_taken_again_until_its_receipt_is_out() -> None:
    born_s = NOW_S // 300 * 300 + 600
    targets, regions = (STRUCK, SPARED), (BAD.region, GOOD.region)
    world = World(7, targets, regions, METRICS, (SQS,), newborn_share=0.3, newborn_at_s=born_s)
    async with scene(world=world) as found:
        await found.collect(BAD, item_of())
        found.clock.offset_s += SQS.discovery_interval_s + 1200
        found.clock.ahead_s += SQS.discovery_interval_s + 1200
        end_s = found.clock.now_s() // 300 * 300
        item = TaskItem("sqs", end_s - 900, end_s, 300)
        found.archive.failures.append(Transient("archive", "away"))
        lost = await found.collect(BAD, item)
        back = await found.collect(BAD, item, attempt=1)
        after = await found.collect(BAD, item, attempt=2)

    assert "not archived" in lost.items[0].outcome.detail
    assert [r.items[0].outcome.looked_from_s for r in (lost, back, after)] == [
        back.items[0].item.start_s
    ] * 2 + [0]
    assert back.items[0].item.start_s <= born_s


async def test_late_and_revised_points_land_with_the_value_that_they_have_in_the_end() -> None:
    item = TaskItem("sqs", NOW_S // 300 * 300 - 900, NOW_S // 300 * 300, 300)
    async with scene() as found:
        early = points_of(found.published(await found.collect(BAD, item)))
        found.clock.offset_s += 3600
        late = points_of(found.published(await found.collect(BAD, item, attempt=1)))
        final = expected(found.sim.truth, BAD, item, SETTLED * 1000)

    both = [
        (early[k][t], v) for k, points in final.items() for t, v in points.items() if t in early.get(k, {})
    ]
    assert late == final
    assert len(both) < sum(map(len, final.values()))
    assert any(before != after for before, after in both)


async def test_series_that_are_new_after_discovery_are_read_back_to_their_first_point() -> None:
    born_s = NOW_S // 300 * 300 + 600
    world = World(
        7,
        (STRUCK, SPARED),
        (BAD.region, GOOD.region),
        METRICS,
        (SQS,),
        newborn_share=0.3,
        newborn_at_s=born_s,
    )
    async with scene(world=world) as found:
        [first] = (await found.collect(BAD, item_of())).items
        found.clock.offset_s += SQS.discovery_interval_s + 1200
        found.clock.ahead_s += SQS.discovery_interval_s + 1200
        end_s = found.clock.now_s() // 300 * 300
        receipt = await found.collect(BAD, TaskItem("sqs", end_s - 900, end_s, 300))
        [second] = receipt.items
        got = points_of(found.published(receipt))
        check_whole(found, receipt)

    assert first.outcome.series < METRICS == second.outcome.series
    assert second.item.start_s <= born_s
    assert min(min(points) for points in got.values()) <= born_s


async def test_an_organization_that_may_not_be_listed_is_an_error_and_no_empty_list() -> None:
    async with scene() as found:
        config = found.config.model_copy(update={"organization": Organization(regions=("eu-west-1",))})
        listing = await list_organization(config, found.clock, TagCache())
        failures = []
        for faults in (
            Faults(denied_actions=("organizations:ListAccounts*",)),
            Faults(throttle_share=1.0),
            Faults(malformed_share=1.0),
        ):
            found.sim.faults = faults
            before = sum(found.requests().values())
            with pytest.raises(HeadgateError) as failure:
                await list_organization(config, found.clock, TagCache())
            failures.append((str(failure.value), sum(found.requests().values()) - before))

    assert {m.id for m in listing.accounts} == {STRUCK, SPARED}
    assert "organizations:ListAccounts" in failures[0][0]
    assert "Rate exceeded" in failures[1][0]
    assert all(0 < calls <= 2 + ATTEMPTS for _, calls in failures)
