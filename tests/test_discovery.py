"""Discovery against the simulated AWS: what is shared, what is selected, what is found late, and who is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ingest.clock import ManualClock
from ingest.errors import Transient
from ingest.model import Batch, LookStatus, Outcome, TaskItem
from ingest.sources import aws, discovery, listing
from ingest.sources.cloudwatch import CloudWatchSource
from shard_config.load import shipped_services
from shard_config.model import Config, Limits, Selection, ServiceProfile
from tests.cloudwatch_rig import (
    ACCOUNTS,
    EC2,
    NOW_S,
    REGION,
    SQS,
    config_of,
    item_of,
    landed,
    target_of,
    truth_of,
)
from workers import simulator
from workers.simulated import cloudwatch as simulated_cloudwatch
from workers.simulated.faults import Faults
from workers.simulated.resources import resources_of
from workers.simulator import Simulator
from workers.world import World

PROFILES = (EC2, SQS)


class FakeCache:
    """`ingest.sources.listing.Cache` over a dict."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, ...], bytes] = {}
        self.failure: Exception | None = None
        self.hangs = False
        self.asked = 0

    async def cached(self, name: Sequence[str], bytes_max: int) -> bytes | None:
        await self._answer()
        return self.objects.get(tuple(name))

    async def cache(self, name: Sequence[str], body: bytes) -> None:
        await self._answer()
        self.objects[tuple(name)] = body

    async def _answer(self) -> None:
        self.asked += 1
        await asyncio.sleep(60 if self.hangs else 0)
        if self.failure is not None:
            raise self.failure


class Scene:
    """A simulated AWS, a clock that it shares with all shards, and the cache between those."""

    def __init__(self, sim: Simulator, clock: ManualClock, config: Config) -> None:
        self.sim = sim
        self.clock = clock
        self.config = config
        self.cache = FakeCache()
        self.shards: list[CloudWatchSource] = []

    def shard(self, config: Config | None = None, shares: bool = True) -> CloudWatchSource:
        source = CloudWatchSource(config or self.config, self.clock)
        if shares:
            source.share_listings(self.cache)
        self.shards.append(source)
        return source

    def item(self, service: str = "ec2", ago_s: int = 900) -> TaskItem:
        """The windows of the last quarter of an hour."""
        end_s = (self.clock.now_s() - ago_s + 900) // 300 * 300
        return TaskItem(service, end_s - 900, end_s, 300)

    async def look(
        self,
        source: CloudWatchSource,
        item: TaskItem | None = None,
        account: str = ACCOUNTS[0],
        published: bool = True,
    ) -> tuple[list[Batch], Outcome]:
        item = item or self.item()
        answers = source.look("t", target_of(account), item, self.clock.monotonic_s() + 20)
        *batches, outcome = [answer async for answer in answers]
        assert isinstance(outcome, Outcome)
        if published:
            await source.published("t", item.service)
        return [b for b in batches if isinstance(b, Batch)], outcome

    def billed(self, account: str = ACCOUNTS[0]) -> Any:
        return self.sim.billing()["accounts"][account]


@asynccontextmanager
async def scene(
    profiles: Sequence[ServiceProfile] = PROFILES, world: World | None = None, **simulated: Any
) -> AsyncIterator[Scene]:
    clock = ManualClock(NOW_S)
    truth = world or World(7, ACCOUNTS, [REGION], 40, profiles)
    sim = await simulator.start(truth, clock=clock, calls_per_s=0, **simulated)
    made = Scene(sim, clock, config_of(sim, profiles))
    try:
        yield made
    finally:
        for source in made.shards:
            await source.close()
        await sim.close()


def with_account(config: Config, account: str, **changes: Any) -> Config:
    accounts = tuple(a.model_copy(update=changes) if a.id == account else a for a in config.accounts)
    return config.model_copy(update={"accounts": accounts})


# --- shared ---------------------------------------------------------------------------------------------------


async def test_a_shard_that_takes_over_pays_for_no_listing_again() -> None:
    async with scene() as s:
        first, before = await s.look(s.shard())
        s.clock.advance(1800)
        item = s.item(ago_s=2700)
        second, after = await s.look(s.shard(), item)
        assert (before.requests["ListMetrics"], after.requests.get("ListMetrics")) == (1, None)
        assert after.status is LookStatus.COMPLETE
        assert after.looked_from_s == 0
        assert landed(second) == truth_of(s.sim.truth, item, EC2, after.observed_at_ms // 1000)
        assert len(first) == 1


async def test_a_shared_listing_is_refreshed_on_its_own_interval_whoever_took_it() -> None:
    async with scene() as s:
        await s.look(s.shard())
        s.clock.advance(1800)
        taking_over = s.shard()
        await s.look(taking_over)
        s.clock.advance(1799)
        _, before = await s.look(taking_over)
        s.clock.advance(2)
        _, after = await s.look(taking_over)
        assert (before.requests.get("ListMetrics"), after.requests.get("ListMetrics")) == (None, 1)


async def test_a_listing_of_another_profile_is_not_used() -> None:
    async with scene() as s:
        await s.look(s.shard())
        fewer = EC2.model_copy(update={"only": (Selection(metrics=("NetworkIn",)),)})
        config = s.config.model_copy(update={"services": (fewer, SQS)})
        batches, outcome = await s.look(s.shard(config))
        assert outcome.requests["ListMetrics"] == 1
        assert {key.metric for key in landed(batches)} == {"NetworkIn"}


async def test_a_listing_from_the_future_is_not_used() -> None:
    async with scene() as s:
        s.clock.advance(3000)
        await s.look(s.shard())
        behind = ManualClock(NOW_S)
        source = CloudWatchSource(s.config, behind)
        source.share_listings(s.cache)
        s.shards.append(source)
        _, outcome = await s.look(source)
        assert outcome.requests["ListMetrics"] == 1


@pytest.mark.parametrize("way", ["refuses", "hangs", "spoilt"])
async def test_a_cache_that_is_away_costs_a_listing_and_no_data(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "READ_S", 0.05)
    monkeypatch.setattr(listing, "WRITE_S", 0.05)
    async with scene() as s:
        await s.look(s.shard())
        if way == "spoilt":
            s.cache.objects = {name: body[:-1] for name, body in s.cache.objects.items()}
        s.cache.failure = Transient("s3", "away") if way == "refuses" else None
        s.cache.hangs = way == "hangs"
        source = s.shard()
        batches, outcome = await s.look(source)
        assert outcome.status is LookStatus.COMPLETE
        assert outcome.requests["ListMetrics"] == 1
        assert landed(batches) == truth_of(s.sim.truth, s.item(), EC2, outcome.observed_at_ms // 1000)
        asked = s.cache.asked
        await s.look(source, s.item("sqs"))
        # It is left alone for a while, unless it is there and only held rubbish.
        assert s.cache.asked == asked + (2 if way == "spoilt" else 0)


async def test_a_listing_that_cannot_be_refreshed_is_kept_over_a_change_of_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", ())
    async with scene() as s:
        await s.look(s.shard())
        s.clock.advance(3700)
        s.sim.faults = Faults(denied_actions=("cloudwatch:ListMetrics",))
        item = s.item()
        batches, outcome = await s.look(s.shard(), item)
        assert outcome.status is LookStatus.COMPLETE
        assert "discovery is 3700 s old" in outcome.detail
        assert landed(batches) == truth_of(s.sim.truth, item, EC2, outcome.observed_at_ms // 1000)


# --- late -----------------------------------------------------------------------------------------------------


def newborns() -> World:
    """A third of the metrics begins twenty minutes after NOW_S."""
    return World(7, ACCOUNTS[:1], [REGION], 40, PROFILES, newborn_share=0.3, newborn_at_s=NOW_S + 1200)


async def test_series_found_late_are_read_back_once_at_no_more_cost() -> None:
    async with scene(world=newborns()) as s:
        source = s.shard()
        _, before = await s.look(source)
        s.clock.advance(3601)
        item = s.item()
        batches, outcome = await s.look(source, item)
        from_s = (NOW_S - 900) // 300 * 300
        whole = TaskItem(item.service, from_s, item.end_s, item.grid_s)
        assert outcome.status is LookStatus.COMPLETE
        assert outcome.looked_from_s == from_s
        assert outcome.series > before.series
        assert outcome.metrics_billed == outcome.series
        assert landed(batches) == truth_of(s.sim.truth, whole, EC2, outcome.observed_at_ms // 1000)
        first_s = min(points[0][0] for points in landed(batches).values())
        assert from_s <= first_s < NOW_S
        s.clock.advance(300)
        _, after = await s.look(source)
        assert (after.looked_from_s, after.series) == (0, outcome.series)


async def test_series_are_found_late_after_a_change_of_shards_too() -> None:
    async with scene(world=newborns()) as s:
        await s.look(s.shard())
        s.clock.advance(3601)
        _, outcome = await s.look(s.shard())
        assert outcome.looked_from_s == (NOW_S - 900) // 300 * 300


async def test_a_look_at_the_past_does_not_take_the_place_of_the_one_that_goes_back() -> None:
    async with scene(world=newborns()) as s:
        source = s.shard()
        await s.look(source)
        s.clock.advance(3601)
        _, backlog = await s.look(source, s.item(ago_s=7200))
        _, live = await s.look(source)
        assert (backlog.looked_from_s, live.looked_from_s > 0) == (0, True)


async def test_a_look_back_that_failed_in_part_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.sources.cloudwatch.ROUND_PAUSE_S", ())
    async with scene(world=newborns()) as s:
        source = s.shard()
        await s.look(source)
        s.clock.advance(3601)
        s.sim.faults = Faults(missing_id_share=0.5)
        _, partly = await s.look(source)
        s.sim.faults = Faults()
        _, whole = await s.look(source)
        assert (partly.status, whole.status) == (LookStatus.PARTIAL, LookStatus.COMPLETE)
        assert partly.looked_from_s == whole.looked_from_s > 0


async def test_what_was_always_there_sends_no_look_back() -> None:
    async with scene() as s:
        source = s.shard()
        await s.look(source)
        s.clock.advance(3601)
        _, outcome = await s.look(source)
        assert (outcome.requests["ListMetrics"], outcome.looked_from_s) == (1, 0)


async def test_a_look_back_that_was_not_published_is_taken_again_by_whoever_takes_over() -> None:
    async with scene(world=newborns()) as s:
        await s.look(s.shard())
        s.clock.advance(3601)
        _, lost = await s.look(s.shard(), published=False)
        s.clock.advance(300)
        _, again = await s.look(s.shard())
        s.clock.advance(300)
        _, over = await s.look(s.shard())
    assert [o.requests.get("ListMetrics") for o in (lost, again, over)] == [1, None, None]
    assert lost.looked_from_s == again.looked_from_s > 0
    assert over.looked_from_s == 0


async def test_a_look_back_outlives_a_listing_without_news_but_not_a_day() -> None:
    async with scene(world=newborns()) as s:
        source = s.shard()
        await s.look(source)
        s.clock.advance(3601)
        _, first = await s.look(source, published=False)
        s.clock.advance(3601)
        _, second = await s.look(source, published=False)
        s.clock.advance(86_400)
        _, given_up = await s.look(source, published=False)
    assert (first.looked_from_s > 0, second.looked_from_s, given_up.looked_from_s) == (
        True,
        first.looked_from_s,
        0,
    )


async def test_metrics_that_are_forbidden_do_not_keep_the_others_looking_back() -> None:
    async with scene(world=newborns(), faults=Faults(forbidden_share=0.3)) as s:
        source = s.shard()
        await s.look(source)
        s.clock.advance(3601)
        _, back = await s.look(source)
        s.clock.advance(300)
        _, after = await s.look(source)
    assert (back.status, after.status) == (LookStatus.PARTIAL, LookStatus.PARTIAL)
    assert (back.looked_from_s > 0, after.looked_from_s) == (True, 0)


# --- what a listing may cost, and how large it may be ---------------------------------------------------------


async def test_a_listing_that_comes_to_nothing_is_paid_for_ever_more_rarely_and_the_last_one_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery, "PAGES_MAX", 3)
    async with scene() as s:
        source = s.shard(shares=False)
        await s.look(source)
        s.clock.advance(3600)
        monkeypatch.setattr(simulated_cloudwatch, "LIST_PAGE", 2)
        tried_s, begun_s = [], s.clock.now_s()
        for _ in range(12 * 5):
            _, outcome = await s.look(source)
            assert outcome.status is LookStatus.COMPLETE
            assert "more than 3 pages" in outcome.detail
            if outcome.requests.get("ListMetrics"):
                assert outcome.requests["ListMetrics"] == 3
                tried_s.append(s.clock.now_s() - begun_s)
            else:
                assert "tried again within 3600 s" in outcome.detail
            s.clock.advance(300)
        monkeypatch.setattr(simulated_cloudwatch, "LIST_PAGE", 500)
        s.clock.advance(3600)
        _, healed = await s.look(source)
    assert tried_s == [0, 300, 900, 2100, 4500, 8100, 11700, 15300]
    assert (healed.detail, healed.requests["ListMetrics"]) == ("", 1)


async def test_a_first_listing_that_comes_to_nothing_is_no_look_and_not_paid_for_at_each_poll(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery, "PAGES_MAX", 3)
    async with scene(faults=Faults(token_endless_share=1)) as s:
        source = s.shard()
        outcomes = []
        for _ in range(3):
            outcomes.append((await s.look(source))[1])
            s.clock.advance(200)
    assert [o.requests.get("ListMetrics") for o in outcomes] == [3, None, 3]
    assert {o.status for o in outcomes} == {LookStatus.FAILED}
    assert "more than 3 pages; tried again within 3600 s" in outcomes[1].detail
    assert "split the service's profile" in outcomes[1].detail
    assert outcomes[0].detail == outcomes[1].detail


async def test_a_listing_that_cost_nothing_is_tried_again_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", ())
    async with scene(faults=Faults(throttle_share=1)) as s:
        source = s.shard()
        _, throttled = await s.look(source)
        s.sim.faults = Faults()
        s.clock.advance(60)
        _, outcome = await s.look(source)
    assert (throttled.status, throttled.requests.get("ListMetrics")) == (LookStatus.FAILED, None)
    assert outcome.status is LookStatus.COMPLETE


async def test_pages_that_were_read_are_not_paid_for_again_where_a_later_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", (0.0, 0.0))
    monkeypatch.setattr(simulated_cloudwatch, "LIST_PAGE", 5)
    world = World(7, ACCOUNTS[:1], [REGION], 40, [SQS])
    async with scene([SQS], world) as s:
        source = s.shard()
        calls = source._asking.calls
        sent: list[bool] = []

        async def fourth_page_fails(access: aws.Access, params: Mapping[str, Any]) -> Any:
            sent.append("NextToken" in params)
            if len(sent) > 3:
                raise ConnectionResetError("cut")
            return await calls.list_metrics(access, params)

        source._asking.calls.list_metrics = fourth_page_fails  # type: ignore[method-assign]
        calls = type(calls)(source._asking.aws)
        looks = await asyncio.gather(s.look(source, s.item("sqs")), s.look(source, s.item("sqs", ago_s=3600)))
        billed = s.billed()["calls"][REGION]["ListMetrics"]
        await calls.close()
    assert sent == [False, True, True, True, True, True]  # the fourth three times, and the other look none
    assert {o.status for _, o in looks} == {LookStatus.FAILED}
    assert sum(o.requests.get("ListMetrics", 0) for _, o in looks) == billed == 3


async def test_more_series_than_are_let_in_are_refused_with_what_to_do_and_others_go_on() -> None:
    async with scene() as s:
        fewer = s.config.model_copy(update={"limits": Limits(series_per_target_max=20)})
        sizes = {p.service: (await s.look(s.shard(), s.item(p.service)))[1].series for p in PROFILES}
        source = s.shard(fewer)
        _, refused = await s.look(source)
        _, other = await s.look(source, s.item("sqs"))
        source.configure(s.config)
        _, raised = await s.look(source)
    assert sizes["sqs"] <= 20 < sizes["ec2"]
    assert (refused.status, other.status) == (LookStatus.FAILED, LookStatus.COMPLETE)
    assert (
        "more than 20 series: select fewer with `only`, or raise limits.series_per_target_max"
        in refused.detail
    )
    assert (raised.status, raised.series) == (LookStatus.COMPLETE, sizes["ec2"])


async def test_only_answered_requests_of_list_metrics_are_counted() -> None:
    async with scene(faults=Faults(throttle_share=0.6, seed=1)) as s:
        looks = [await s.look(s.shard(shares=False), s.item(p.service)) for p in PROFILES for _ in range(3)]
        billed = s.billed()
    counted = sum(o.requests.get("ListMetrics", 0) for _, o in looks)
    assert billed["throttled"][REGION]["ListMetrics"] > 0
    assert counted == billed["calls"][REGION]["ListMetrics"]


# --- tags -----------------------------------------------------------------------------------------------------

TAGGED = shipped_services()["ec2"].model_copy(
    update={"only": (Selection(tags={"env": "prod"}), Selection(metrics=("NetworkIn",)))}
)


async def test_metrics_are_selected_by_the_tags_of_their_resources() -> None:
    world = World(7, ACCOUNTS[:1], [REGION], 400, [TAGGED])
    async with scene([TAGGED], world) as s:
        batches, outcome = await s.look(s.shard())
        resources = resources_of(world, ACCOUNTS[0], REGION)
        prod = {r.arn.rpartition("/")[2] for r in resources if r.tags.get("env") == "prod"}
        untagged = {r.arn.rpartition("/")[2] for r in resources if not r.tags}
        asked = {(key.metric, key.dimensions[0][1]) for key in landed(batches)}
        assert outcome.status is LookStatus.COMPLETE
        assert {i for metric, i in asked if metric != "NetworkIn"} == prod
        assert untagged & {i for metric, i in asked if metric == "NetworkIn"}
        assert outcome.requests["GetResources"] == 1


async def test_where_tags_are_denied_a_listing_that_needs_them_says_what_to_grant_and_others_go_on() -> None:
    profiles = (TAGGED, SQS)
    async with scene(profiles, faults=Faults(denied_actions=("tag:GetResources",))) as s:
        source = s.shard()
        _, tagged = await s.look(source)
        _, other = await s.look(source, s.item("sqs"))
        assert (tagged.status, other.status) == (LookStatus.FORBIDDEN, LookStatus.COMPLETE)
        assert "grant tag:GetResources to the role" in tagged.detail
        assert "ListMetrics" not in tagged.requests


async def test_all_pages_of_tags_are_read() -> None:
    profile = TAGGED.model_copy(update={"metrics": TAGGED.metrics[:1], "only": TAGGED.only[:1]})
    world = World(7, ACCOUNTS[:1], [REGION], 300, [profile])
    async with scene([profile], world) as s:
        _, outcome = await s.look(s.shard())
        tagged = [r for r in resources_of(world, ACCOUNTS[0], REGION) if "env" in r.tags]
        assert len(tagged) > 200
        assert outcome.requests["GetResources"] == 3
        prod = sum(r.tags["env"] == "prod" for r in tagged)
        assert outcome.series == prod * len(TAGGED.metrics[0].statistics)  # type: ignore[union-attr]


# --- a monitoring account -------------------------------------------------------------------------------------

MONITORING, LINKED, ALONE = ACCOUNTS


async def test_a_linked_account_is_asked_by_its_monitoring_account_and_labelled_as_itself() -> None:
    faults = Faults(denied_roles=(LINKED,))
    async with scene(links={MONITORING: [LINKED]}, faults=faults) as s:
        source = s.shard(with_account(s.config, LINKED, via=MONITORING))
        item = s.item()
        batches, outcome = await s.look(source, item, LINKED)
        observed_s = outcome.observed_at_ms // 1000
        assert outcome.status is LookStatus.COMPLETE
        assert landed(batches) == truth_of(s.sim.truth, item, EC2, observed_s, target_of(LINKED))
        assert {key.account for key in landed(batches)} == {LINKED}
        assert {b.target.account for b in batches} == {LINKED}
        # Role, quota and bill are the monitoring account's.
        assert s.billed(MONITORING)["metrics_requested"] == outcome.metrics_billed > 0
        assert s.billed(LINKED)["metrics_requested"] == 0
        assert {key[0] for key in source._asking.aws.limiter._buckets} == {MONITORING}


async def test_a_monitoring_account_that_stands_nowhere_else_has_the_role_of_the_template() -> None:
    async with scene(links={MONITORING: [LINKED]}) as s:
        linked = with_account(s.config, LINKED, via=MONITORING)
        alone = linked.model_copy(update={"accounts": tuple(a for a in linked.accounts if a.id == LINKED)})
        _, outcome = await s.look(s.shard(alone), account=LINKED)
        assert (outcome.status, outcome.series > 0) == (LookStatus.COMPLETE, True)


async def test_an_account_that_is_not_linked_is_never_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "BACKOFF_S", ())
    async with scene(links={MONITORING: [LINKED]}) as s:
        source = s.shard(with_account(s.config, ALONE, via=MONITORING))
        batches, outcome = await s.look(source, account=ALONE)
        assert batches == []
        assert outcome.status in (LookStatus.FAILED, LookStatus.FORBIDDEN)


# --- resolution, bill -----------------------------------------------------------------------------------------


async def test_old_data_is_asked_for_at_the_coarser_period_of_the_item() -> None:
    async with scene() as s:
        old = item_of(ago_s=20 * 86_400)
        coarse = TaskItem(old.service, old.start_s, old.end_s, old.grid_s, period_s=300)
        source = s.shard()
        _, gone = await s.look(source, old)
        batches, outcome = await s.look(source, coarse)
        expected = truth_of(
            s.sim.truth, coarse, EC2.model_copy(update={"period_s": 300}), outcome.observed_at_ms // 1000
        )
        assert gone.status is LookStatus.EXPIRED
        assert outcome.status is LookStatus.COMPLETE
        assert landed(batches) == expected
        assert {key.period_s for key in landed(batches)} == {300}


@pytest.mark.parametrize("again", [True, False])
async def test_continuation_pages_are_billed_as_the_configuration_reads_the_price_list(again: bool) -> None:
    async with scene(bill_pages=again) as s:
        config = s.config.model_copy(
            update={"aws": s.config.aws.model_copy(update={"pages_count_again": again})}
        )
        source = s.shard(config)
        calls = source._asking.calls

        async def small_pages(access: aws.Access, request: Mapping[str, Any]) -> Any:
            return await calls.get_metric_data(access, {**request, "MaxDatapoints": 50})

        source._get = small_pages
        _, outcome = await s.look(source)
        assert outcome.requests["GetMetricData"] > 2
        assert s.billed()["metrics_requested"] == outcome.metrics_billed
        assert (outcome.metrics_billed > outcome.series) == again


# --- another configuration ------------------------------------------------------------------------------------


async def test_another_configuration_is_taken_and_listings_that_depend_on_nothing_else_are_kept() -> None:
    async with scene() as s:
        only_first = s.config.model_copy(update={"accounts": s.config.accounts[:1]})
        source = s.shard(only_first, shares=False)
        await s.look(source)
        _, unknown = await s.look(source, account=ACCOUNTS[1])
        source.configure(s.config)
        _, known = await s.look(source, account=ACCOUNTS[1])
        _, kept = await s.look(source)
        fewer = EC2.model_copy(update={"only": (Selection(metrics=("NetworkIn",)),)})
        source.configure(s.config.model_copy(update={"services": (fewer, SQS)}))
        batches, listed = await s.look(source)
        assert (unknown.status, known.status) == (LookStatus.FAILED, LookStatus.COMPLETE)
        assert (kept.requests.get("ListMetrics"), listed.requests.get("ListMetrics")) == (None, 1)
        assert {key.metric for key in landed(batches)} == {"NetworkIn"}


async def test_another_role_is_assumed_at_the_next_look() -> None:
    async with scene() as s:
        source = s.shard()
        await s.look(source)
        other = f"arn:aws:iam::{ACCOUNTS[0]}:role/Other"
        source.configure(with_account(s.config, ACCOUNTS[0], role_arn=other))
        _, outcome = await s.look(source)
        _, again = await s.look(source)
        assert (outcome.requests.get("AssumeRole"), again.requests.get("AssumeRole")) == (1, None)
        assert outcome.status is LookStatus.COMPLETE


async def test_a_look_in_flight_ends_with_the_configuration_that_it_began_with() -> None:
    async with scene() as s, scene() as elsewhere:
        source = s.shard(shares=False)
        await s.look(source)
        answers = source.look("t", target_of(), s.item(), s.clock.monotonic_s() + 20)
        looking = asyncio.create_task(anext(answers))
        async with asyncio.timeout(5):
            while not source._asking._connection.users:  # noqa: ASYNC110 -- nothing announces that a look has begun
                await asyncio.sleep(0)
        old = source._asking.aws
        source.configure(s.config.model_copy(update={"accounts": (), "aws": elsewhere.config.aws}))
        assert isinstance(await looking, Batch)
        [outcome] = [answer async for answer in answers]
        assert isinstance(outcome, Outcome)
        assert outcome.status is LookStatus.COMPLETE
        source.configure(elsewhere.config)
        _, there = await s.look(source)
        assert there.status is LookStatus.COMPLETE
        assert elsewhere.billed()["metrics_requested"] == there.metrics_billed > 0
        assert old._clients == {}  # closed, for nobody uses it any more
