"""Tagged resources: listed beside the looks and shared; read, associated as YACE does, and never waited for too long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.archive import cache_key
from ingest.errors import Rejected, Transient
from ingest.model import LookStatus, Target
from ingest.resources import (
    PATIENCE_S,
    RETRY_S,
    WAIT_S,
    ResourceBook,
    ResourceIndex,
    ResourceList,
    cache_name,
    decode,
    encode,
)
from ingest.sources.cloudwatch import CloudWatchSource
from shard_config.known import shipped_services
from shard_config.model import Config, Selection, ServiceProfile
from shard_config.remote_write import RemoteWrite
from tests import yace_names
from tests.cloudwatch_rig import ACCOUNTS, REGION, target_of
from tests.conftest import eventually
from tests.test_discovery import FakeCache, Scene, scene
from tests.yace_names import Case
from workers.simulated.faults import Faults
from workers.simulated.resources import resources_of
from workers.world import World

EC2 = shipped_services()["ec2"]
WRITE = RemoteWrite.model_validate({"receivers": [{"name": "one", "url": "http://127.0.0.1:1/api/v1/write"}]})
TARGET = target_of()
NAME = cache_name(TARGET, "ec2")
NOW_S = 1_000_000.0


def writing(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"remote_write": WRITE.model_copy(update=changes)})


def shard(s: Scene, **changes: Any) -> CloudWatchSource:
    return s.shard(writing(s.config, **changes))


async def listed(s: Scene, cond: Callable[[ResourceList], bool] = lambda _: True) -> ResourceList:
    async def is_there() -> bool:
        return NAME in s.cache.objects and cond(decode(s.cache.objects[NAME], TARGET, "ec2"))

    await eventually(is_there, timeout_s=10)
    return decode(s.cache.objects[NAME], TARGET, "ec2")


def asked(s: Scene) -> int:
    found = s.billed()["calls"].get(REGION, {}).get("GetResources", 0)
    assert isinstance(found, int)
    return found


# --- the exporter's side --------------------------------------------------------------------------------------


async def test_a_look_has_the_resources_of_its_service_listed_and_shared() -> None:
    async with scene((EC2,)) as s:
        _, outcome = await s.look(shard(s))
        found = await listed(s)
        tagged = [r for r in resources_of(s.sim.truth, ACCOUNTS[0], REGION) if r.tags]
        assert outcome.status == LookStatus.COMPLETE
        assert outcome.requests.get("GetResources", 0) == 0
        assert [(arn, dict(tags)) for arn, tags in found.resources] == [(r.arn, dict(r.tags)) for r in tagged]
        assert found.listed_at_s == s.clock.now_s()


@pytest.mark.parametrize("why", ["no remote write", "our own names", "switched off", "no cache"])
async def test_where_nobody_asks_for_resources_none_are_listed(why: str) -> None:
    async with scene((EC2,)) as s:
        if why == "no remote write":
            source = s.shard()
        elif why == "no cache":
            source = s.shard(writing(s.config), shares=False)
        else:
            source = shard(s, **({"names": "headgate"} if why == "our own names" else {"resources": False}))
        await s.look(source)
        await asyncio.sleep(0.05)
        assert asked(s) == 0


async def test_resources_are_listed_once_in_a_discovery_interval_whoever_looks() -> None:
    async with scene((EC2,)) as s:
        first, second = shard(s), shard(s)
        await s.look(first)
        before = await listed(s)
        for source in (first, second, first, second):
            await s.look(source)
            await asyncio.sleep(0.05)
        assert asked(s) == 1
        s.clock.advance(EC2.discovery_interval_s + 1)
        await s.look(second)

        async def is_asked() -> bool:
            return asked(s) == 2

        await eventually(is_asked, timeout_s=10)
        assert (await listed(s)).resources == before.resources


async def test_a_list_that_did_not_change_is_put_again_after_half_a_day() -> None:
    async with scene((EC2,)) as s:
        source = shard(s)
        await s.look(source)
        before, puts = await listed(s), 0
        for _ in range(14):
            s.clock.advance(EC2.discovery_interval_s + 1)
            await s.look(source)
            await asyncio.gather(*source._discovery.resources._tasks.values())
            found = await listed(s)
            puts += found.listed_at_s != before.listed_at_s
            before = found
        assert asked(s) == 15
        assert puts == 1


async def test_a_look_whose_selection_asks_for_tags_lists_all_resources_once_for_both() -> None:
    prod = EC2.model_copy(update={"only": (Selection(tags={"env": "prod"}),)})
    async with scene((prod,), world=World(7, ACCOUNTS, [REGION], 180, (prod,))) as s:
        _, outcome = await s.look(shard(s))
        found = await listed(s)
        assert outcome.requests["GetResources"] == 1
        await asyncio.sleep(0.05)
        assert asked(s) == 1
        assert {tags["env"] for _, tags in found.resources} == {"prod", "dev"}


async def test_where_listing_is_denied_no_look_suffers_and_readers_are_told_once() -> None:
    async with scene((EC2,), faults=Faults(denied_actions=("tag:*",))) as s:
        _, outcome = await s.look(shard(s))
        found = await listed(s)
        assert (outcome.status, outcome.detail) == (LookStatus.COMPLETE, "")
        assert "grant tag:GetResources" in found.denied
        assert found.resources == ()
        await s.look(s.shards[0])
        await asyncio.sleep(0.05)
        assert asked(s) <= 1


async def test_a_refresh_that_is_denied_or_fails_keeps_the_list_before() -> None:
    async with scene((EC2,)) as s:
        await s.look(shard(s))
        before = await listed(s)
        for faults in (Faults(denied_actions=("tag:*",)), Faults(error_share=1.0)):
            s.sim.faults = faults
            s.clock.advance(EC2.discovery_interval_s + 1)
            s.shards[0]._discovery.resources.due(
                s.shards[0]._asking.asked(ACCOUNTS[0]),  # type: ignore[arg-type]
                TARGET,
                EC2,
            )

            async def is_idle() -> bool:
                return not s.shards[0]._discovery.resources._tasks

            await eventually(is_idle, timeout_s=20)
            assert (await listed(s)) == before


async def test_a_cache_that_hangs_delays_no_look() -> None:
    async with scene((EC2,)) as s:
        source = shard(s)
        await s.look(source)
        s.clock.advance(EC2.discovery_interval_s + 1)
        await listed(s)
        s.cache.hangs = True
        source._discovery._shared = None
        began_s = asyncio.get_running_loop().time()
        _, outcome = await s.look(source)
        assert asyncio.get_running_loop().time() - began_s < 3
        assert outcome.status == LookStatus.COMPLETE


async def test_a_linked_account_has_no_list() -> None:
    monitoring, owner = ACCOUNTS[0], ACCOUNTS[1]
    async with scene((EC2,), links={monitoring: (owner,)}) as s:
        accounts = tuple(
            a.model_copy(update={"via": monitoring}) if a.id == owner else a for a in s.config.accounts
        )
        config = writing(s.config.model_copy(update={"accounts": accounts}))
        _, outcome = await s.look(s.shard(config), account=owner)
        assert outcome.status == LookStatus.COMPLETE
        await asyncio.sleep(0.05)
        assert cache_name(target_of(owner), "ec2") not in s.cache.objects
        book = ResourceBook(config, s.cache)
        await book.refresh([(target_of(owner), "ec2")], NOW_S)
        assert book.known(target_of(owner), "ec2")
        assert book.of(target_of(owner), "ec2", (("InstanceId", "i-1"),)) is None


# --- as bytes -------------------------------------------------------------------------------------------------

ONE = ResourceList(1_000_000, ("ec2:instance",), (("arn:aws:ec2:::instance/i-1", {"Team": "a", "é": ""}),))


def test_a_list_is_read_back_as_it_was() -> None:
    assert decode(encode(ONE, TARGET, "ec2"), TARGET, "ec2") == ONE


@pytest.mark.parametrize("target", [target_of(ACCOUNTS[1]), TARGET])
def test_a_list_of_another_target_or_service_is_none(target: Target) -> None:
    with pytest.raises(Rejected):
        decode(encode(ONE, target, "rds"), TARGET, "ec2")


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 400))
def test_a_list_with_a_changed_byte_or_cut_short_is_refused(at: int, byte: int, cut: int) -> None:
    body = encode(ONE, TARGET, "ec2")
    spoilt = bytearray(body)
    spoilt[at % len(body)] = byte
    for one in (bytes(spoilt), body[: cut % len(body)]):
        if one != body:
            with pytest.raises(Rejected):
                decode(one, TARGET, "ec2")


# --- which resource -------------------------------------------------------------------------------------------


def profile_of(namespace: str) -> ServiceProfile:
    return next(p for p in shipped_services().values() if p.namespace == namespace)


def test_each_metric_belongs_to_the_resource_that_yace_names() -> None:
    known = json.loads(yace_names.GOLDEN.read_text())["series"]
    indices = {}
    for profile in shipped_services().values():
        assert profile.resources is not None
        mine = [r for r in yace_names.resources() if yace_names.is_of(profile.namespace, r.arn)]
        indices[profile.namespace] = ResourceIndex(profile.resources, [(r.arn, r.tags) for r in mine])
    cases = [Case(**one) for one in known if one["kind"] == "discovery"]
    wrong = []
    for case in cases:
        if case.yace is None:
            continue
        found = indices[case.namespace].of(tuple((n, v) for n, v in case.dimensions))
        if (found.arn if found else "global") != case.yace["name"]:
            wrong.append((case.key, found.arn if found else "global", case.yace["name"]))
    assert len(cases) > 250
    assert wrong == []


# --- the remote writer's side ---------------------------------------------------------------------------------


class Reading:
    """A book over a cache, and lists in it."""

    def __init__(self, **profile: Any) -> None:
        ec2 = EC2.model_copy(update=profile)
        account = {"id": ACCOUNTS[0], "regions": [REGION], "services": ["ec2"]}
        config = Config.model_validate({"accounts": [account], "services": [ec2.model_dump()]})
        self.cache = FakeCache()
        self.book = ResourceBook(writing(config), self.cache)

    def share(self, *resources: tuple[str, dict[str, str]], at_s: float = NOW_S, denied: str = "") -> None:
        listed = ResourceList(int(at_s), ("ec2:instance",), resources, denied)
        self.cache.objects[NAME] = encode(listed, TARGET, "ec2")

    async def refresh(self, at_s: float = NOW_S) -> None:
        await self.book.refresh([(TARGET, "ec2")], at_s)

    def name(self, instance: str = "i-1") -> str:
        found = self.book.of(TARGET, "ec2", (("InstanceId", instance),))
        return "" if found is None else found.arn


def instance(name: str, **tags: str) -> tuple[str, dict[str, str]]:
    return f"arn:aws:ec2:{REGION}:{ACCOUNTS[0]}:instance/{name}", tags


async def test_a_list_names_the_series_of_its_resources() -> None:
    r = Reading()
    assert not r.book.known(TARGET, "ec2")
    r.share(instance("i-1", Team="a"))
    await r.refresh()
    assert r.book.known(TARGET, "ec2")
    assert r.name() == instance("i-1")[0]
    assert r.name("i-2") == ""


async def test_series_wait_a_minute_for_a_list_that_nobody_has_written() -> None:
    r = Reading()
    await r.refresh()
    assert not r.book.known(TARGET, "ec2")
    await r.refresh(NOW_S + WAIT_S - 1)
    assert not r.book.known(TARGET, "ec2")
    await r.refresh(NOW_S + WAIT_S)
    assert r.book.known(TARGET, "ec2")
    r.share(instance("i-1"))
    version = r.book.version(TARGET, "ec2")
    await r.refresh(NOW_S + WAIT_S + 10 * RETRY_S)
    assert r.name() == instance("i-1")[0]
    assert r.book.version(TARGET, "ec2") != version


async def test_lists_that_are_missing_are_waited_for_together_and_not_each_by_itself() -> None:
    accounts = [{"id": a, "regions": [REGION], "services": ["ec2", "rds"]} for a in ACCOUNTS]
    services = [EC2.model_dump(), shipped_services()["rds"].model_dump()]
    config = writing(Config.model_validate({"accounts": accounts, "services": services}))
    book = ResourceBook(config, FakeCache())
    first, second = target_of(ACCOUNTS[0]), target_of(ACCOUNTS[1])
    await book.refresh([(first, "ec2")], NOW_S)
    await book.refresh([(first, "ec2")], NOW_S + WAIT_S)
    assert book.known(first, "rds")  # a target's services are asked for together
    assert not book.known(second, "ec2")  # not even tried
    await book.refresh([(first, "ec2"), (second, "ec2")], NOW_S + WAIT_S + 1)
    assert book.known(second, "ec2")
    later_s = NOW_S + WAIT_S + PATIENCE_S + 1
    third = target_of(ACCOUNTS[2])
    await book.refresh([(third, "ec2")], later_s)
    assert not book.known(third, "ec2")


async def test_a_denied_list_is_not_waited_for() -> None:
    r = Reading()
    r.share(denied="grant it")
    await r.refresh()
    assert r.book.known(TARGET, "ec2")
    assert r.name() == ""


async def test_a_list_is_read_again_when_it_is_older_than_the_interval_and_not_before() -> None:
    r = Reading()
    r.share(instance("i-1"))
    await r.refresh()
    r.share(instance("i-2"), at_s=NOW_S + 3600)
    reads = r.cache.asked
    await r.refresh(NOW_S + 3000)
    assert (r.cache.asked, r.name("i-2")) == (reads, "")
    await r.refresh(NOW_S + 3700)
    assert r.name("i-2") == instance("i-2")[0]


async def test_labels_are_made_anew_only_where_a_list_changed() -> None:
    r = Reading()
    r.share(instance("i-1"))
    await r.refresh()
    before = r.book.version(TARGET, "ec2")
    await r.refresh(NOW_S + 4000)
    assert r.book.version(TARGET, "ec2") == before


@pytest.mark.parametrize("how", ["spoilt", "away"])
async def test_what_goes_wrong_with_the_store_keeps_what_is_known(how: str) -> None:
    r = Reading()
    r.share(instance("i-1"))
    await r.refresh()
    if how == "spoilt":
        r.cache.objects[NAME] = b"HGRSRC1\nspoilt"
    else:
        r.cache.failure = Transient("archive", "away")
    reads = r.cache.asked
    for at_s in range(4000, 5000, 5):
        await r.refresh(NOW_S + at_s)
    assert r.name() == instance("i-1")[0]
    assert 3 <= r.cache.asked - reads <= 8  # ever more rarely


async def test_resources_beyond_the_bound_are_not_kept_and_their_series_are_named_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ingest.resources.RESOURCES_MAX", 2)
    r = Reading()
    r.share(*(instance(f"i-{n}") for n in range(3)))
    await r.refresh()
    assert r.book.known(TARGET, "ec2")
    assert r.name() == ""
    assert list(r.book.all(TARGET, "ec2")) == []


async def test_info_is_of_the_resources_that_a_selection_by_tags_means() -> None:
    r = Reading(only=(Selection(tags={"env": "pr.*"}),))
    r.share(instance("i-1", env="prod"), instance("i-2", env="dev"), instance("i-3"))
    await r.refresh()
    assert [one.arn for one in r.book.all(TARGET, "ec2")] == [instance("i-1")[0]]


async def test_targets_that_are_wanted_no_more_are_forgotten() -> None:
    r = Reading()
    r.share(instance("i-1"))
    await r.refresh()
    await r.book.refresh([], NOW_S)
    assert r.name() == ""
    assert not r.book.known(TARGET, "ec2")


def test_a_list_has_a_name_that_the_archive_takes() -> None:
    assert cache_key(NAME) == f"cache/v1/resources/cloudwatch/{ACCOUNTS[0]}/{REGION}/ec2"
