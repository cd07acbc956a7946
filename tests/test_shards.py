"""Living shards: who owns what, who has a name, and what a real group does about it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from hypothesis import given
from hypothesis import strategies as st

from ingest import reassign
from ingest.assign import (
    MEMBER_ASSIGNMENT_BYTES_MAX,
    Assignment,
    Incarnation,
    Member,
    assign,
    decode_assignment,
    decode_member,
    encode_assignment,
    encode_member,
    newest,
    owners_of,
)
from ingest.clock import ManualClock, SystemClock
from ingest.errors import Fatal, Rejected
from ingest.group import Consumer
from ingest.log import Producer, commit_start
from ingest.membership import GroupLook, ShardAssignor, look_at_group, remove_members
from ingest.reassign import History, Planned, next_assignment, slot_weights
from ingest.sources.limiter import Limiter
from shard_config.model import Kafka
from shard_config.units import UnitPlan
from tests.conftest import eventually
from workers.lifecycle import Lifecycle
from workers.names import exporter_group
from workers.preflight_parts import _topic_is_wrong
from workers.servers import free_ports, get_local
from workers.shards import (
    Board,
    Publisher,
    check_name,
    follow,
    take_name,
)

ROOT = Path(__file__).resolve().parents[1]

names = st.sampled_from([f"exporter-{i}" for i in range(1, 8)])
alive = st.frozensets(names, min_size=1)
loads = st.lists(st.floats(1, 1000), min_size=1, max_size=40)


def published(epoch: int, owners: Sequence[str], weights: Sequence[float] = ()) -> Assignment:
    return Assignment(
        epoch,
        epoch * 1000,
        "",
        tuple(sorted(set(owners))),
        tuple(owners),
        tuple(weights or [1.0] * len(owners)),
    )


def planned(weights: Sequence[float]) -> Planned:
    """A target a slot."""
    units = [f"cloudwatch/{slot:012}/eu-west-1" for slot in range(len(weights))]
    return Planned(
        UnitPlan({u: i for i, u in enumerate(units)}, dict(zip(units, weights, strict=True))), len(units)
    )


# --- the function ---------------------------------------------------------------------------------------------


@given(loads, alive, alive)
def test_coverage_every_slot_has_an_owner_that_is_alive(
    weights: list[float], before: frozenset[str], now: frozenset[str]
) -> None:
    first = published(1, assign(weights, before), weights)
    assert set(owners_of(first, now, len(weights))) <= now


@given(loads, st.lists(alive, min_size=2, max_size=6))
def test_one_function_what_the_coordinator_publishes_is_what_the_group_fell_back_to(
    weights: list[float], lives: list[frozenset[str]]
) -> None:
    current: Assignment | None = None
    now_s = 0.0
    for live in lives:
        slots = owners_of(current, live, len(weights))
        owned = {name: tuple(i for i, owner in enumerate(slots) if owner == name) for name in live}
        now_s += 10
        made = next_assignment(current, GroupLook(True, owned, {}), planned(weights), 0, now_s, History())
        if current is None:
            # Before anything was published the group knew no weights.
            assert made is not None
            assert made.shards == tuple(sorted(live))
        elif made is not None and live != set(current.shards):
            assert made.owners == slots
        current = made or current


@given(loads, alive)
def test_stability_a_shard_that_dies_and_comes_back_ends_with_what_it_had(
    weights: list[float], live: frozenset[str]
) -> None:
    first = published(1, assign(weights, live), weights)
    first = replace(first, shards=tuple(sorted(live)))
    for dead in live if len(live) > 1 else ():
        assert set(owners_of(first, live - {dead}, len(weights))) <= live - {dead}
    assert owners_of(first, live, len(weights)) == first.owners


def test_stability_of_equal_slots_a_dead_shard_loses_its_own_and_a_new_one_takes_the_least() -> None:
    before = assign([1.0] * 24, ["a", "b", "c", "d"])
    after = assign([1.0] * 24, ["a", "b", "c"], dict(enumerate(before)))
    assert [x for x, y in zip(before, after, strict=True) if x != y] == ["d"] * 6
    grown = assign([1.0] * 24, ["a", "b", "c", "d", "e"], dict(enumerate(before)))
    moved = [y for x, y in zip(before, grown, strict=True) if x != y]
    assert moved == ["e"] * 4


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 4), (4, 2), (6, 12), (12, 16), (16, 3), (24, 1)])
def test_balance_of_equal_slots_is_as_even_as_it_can_be_at_the_least_moves(before: int, after: int) -> None:
    then, now = ([f"s{i:02}" for i in range(count)] for count in (before, after))
    first = assign([1.0] * 24, then)
    second = assign([1.0] * 24, now, dict(enumerate(first)))
    counts = sorted((second.count(name) for name in now), reverse=True)
    assert counts == [24 // after + (i < 24 % after) for i in range(after)]
    held = sorted((first.count(name) for name in now), reverse=True)
    most_kept = sum(map(min, held, counts))
    assert sum(x == y for x, y in zip(first, second, strict=True)) == most_kept


def test_a_new_shard_takes_a_share_of_few_heavy_slots_and_of_light_ones() -> None:
    weights = [200.0] * 12 + [1.0] * 12
    six = assign(weights, [f"s{i:02}" for i in range(6)])
    twelve = assign(weights, [f"s{i:02}" for i in range(12)], dict(enumerate(six)))
    assert sorted(twelve[:12]) == [f"s{i:02}" for i in range(12)]
    assert set(assign([100.0, 1.0, 1.0], "abc", {0: "a", 1: "b", 2: "b"})) == {"a", "b", "c"}


@given(loads, alive, alive)
def test_stability_an_assignment_that_is_there_stays(
    weights: list[float], before: frozenset[str], live: frozenset[str]
) -> None:
    first = assign(weights, live, dict(enumerate(assign(weights, before))))
    assert assign(weights, live, dict(enumerate(first))) == first


def loads_by_shard(weights: Sequence[float], owners: Sequence[str]) -> list[float]:
    return [sum(w for w, x in zip(weights, owners, strict=True) if x == o) for o in sorted(set(owners))]


def test_company_slots_that_share_a_quota_go_to_one_shard_where_balance_allows() -> None:
    company = {4: "1/a", 11: "1/a", 17: "1/a", 19: "2/b", 5: "2/b"}
    # What is split is heavy, and so is placed first.
    weights = [4.0 if slot in company else 3.0 for slot in range(20)]

    def homes(owners: Sequence[str], quota: str) -> set[str]:
        return {owners[slot] for slot, name in company.items() if name == quota}

    apart, owners = assign(weights, "abcd"), assign(weights, "abcd", together=company)
    assert len(homes(apart, "1/a")) > 1
    assert len(homes(owners, "1/a")) == len(homes(owners, "2/b")) == 1
    assert max(loads_by_shard(weights, owners)) <= sum(weights) / 4 + max(weights)
    # To a new shard, for balance, others go first.
    grown = assign(weights, "abcde", dict(enumerate(owners)), company)
    assert "e" in grown
    assert (homes(grown, "1/a"), homes(grown, "2/b")) == (homes(owners, "1/a"), homes(owners, "2/b"))


@given(loads, alive, alive, st.dictionaries(st.integers(0, 50), st.sampled_from(["1/a", "2/b"])))
def test_company_costs_nothing_of_coverage_and_stability(
    weights: list[float], before: frozenset[str], live: frozenset[str], company: dict[int, str]
) -> None:
    first = assign(weights, before, together=company)
    moved = assign(weights, live, dict(enumerate(first)), company)
    assert len(moved) == len(weights)
    assert set(moved) <= live
    assert assign(weights, live, dict(enumerate(moved)), company) == moved


def test_the_groups_leader_keeps_company_as_the_coordinator_does() -> None:
    name = "cloudwatch/000000000001/eu-west-1"
    units = {f"{name}#{service}": slot for slot, service in enumerate(("ec2", "rds", "sqs", "s3"))}
    plan = Planned(UnitPlan(units, dict.fromkeys(units, 100.0)), 12)
    look = GroupLook(True, {"a": (), "b": (), "c": ()}, {})
    made = next_assignment(None, look, plan, 5_000, 1000.0, History())
    assert made is not None
    assert made.together == dict.fromkeys(range(4), "000000000001/eu-west-1")
    assert decode_assignment(encode_assignment(made)) == made
    owned = {n: tuple(made.slots_of(n)) for n in "ab"}
    after = next_assignment(made, GroupLook(True, owned, {}), plan, 9_000, 1100.0, History())
    assert after is not None
    assert after.owners == owners_of(made, {"a", "b"}, 12)
    assert after.together == made.together


@given(loads, alive, st.randoms())
def test_determinism_the_order_in_which_shards_are_named_decides_nothing(
    weights: list[float], live: frozenset[str], random: object
) -> None:
    shuffled = sorted(live, key=lambda name: hash((name, id(random))))
    assert assign(weights, shuffled) == assign(weights, sorted(live))


def test_slots_without_targets_are_spread_and_weigh_little() -> None:
    assert slot_weights({"t": 1, "u": 1, "v": 3}, {"t": 5.0, "u": 2.0}, 4) == (1.0, 7.0, 1.0, 1.0)
    assert set(assign(slot_weights({}, {}, 8), ["a", "b", "c", "d"])) == {"a", "b", "c", "d"}


def test_the_newest_assignment_that_anybody_brings_is_followed() -> None:
    old, new = published(3, "ab"), published(4, "ba")
    assert newest([Member("a", 3, old), Member("b", 4, new)], None) == new
    assert newest([Member("a", 3, old)], new) == new
    assert newest([Member("a")], None) is None


def test_more_slots_than_were_published_get_owners_too() -> None:
    first = published(1, ["a", "b"], [10.0, 10.0])
    assert owners_of(first, ["a", "b"], 4)[:2] == ("a", "b")
    assert len(owners_of(first, ["a", "b"], 4)) == 4


# --- on the wire ----------------------------------------------------------------------------------------------


def test_an_assignment_whose_owners_do_not_fit_is_rejected() -> None:
    value = encode_assignment(published(1, "ab"))
    assert decode_assignment(value).owners == ("a", "b")
    for bad in (b"", b"garbage", value[:-1], value + b"\0"):
        with pytest.raises(Rejected):
            decode_assignment(bad)
    from ingest import avro

    _, datum = avro.read(value, ("assignment",))
    for change in ({"owners": [0, 7]}, {"owners": [0]}, {"owners": [0, -1]}):
        with pytest.raises(Rejected, match="do not fit"):
            decode_assignment(avro.write("assignment", datum | change))


def test_a_large_assignment_does_not_travel_with_its_member_but_its_epoch_does() -> None:
    large = published(9, [f"exporter-{i % 64}" for i in range(10_000)])
    assert decode_member(encode_member(Member("a", 9, large))) == Member("a", 9, None)
    usual = published(9, [f"exporter-{i % 16}" for i in range(64)])
    assert decode_member(encode_member(Member("a", 9, usual))) == Member("a", 9, usual)
    assert len(encode_member(Member("a", 9, usual))) < MEMBER_ASSIGNMENT_BYTES_MAX


# --- when to publish ------------------------------------------------------------------------------------------

EVEN = published(1, ["a", "b", "a", "b"])
FOLLOWED = GroupLook(True, {"a": (0, 2), "b": (1, 3)}, {}, 1)


def decided(
    look: GroupLook,
    now_s: float = 1000.0,
    weights: Sequence[float] = EVEN.weights,
    history: History | None = None,
) -> Assignment | None:
    return next_assignment(EVEN, look, planned(weights), 5_000, now_s, history or History())


def test_where_all_is_as_published_nothing_is() -> None:
    assert decided(FOLLOWED) is None


def test_nothing_is_published_while_the_group_rebalances_or_is_empty() -> None:
    assert decided(replace(FOLLOWED, stable=False)) is None
    assert decided(GroupLook(True, {}, {}, 1)) is None


def test_a_shard_that_came_is_published_with_the_weights_the_group_knew() -> None:
    made = decided(GroupLook(True, {**FOLLOWED.members, "c": ()}, {}, 1), weights=(9.0, 9.0, 9.0, 9.0))
    assert made is not None
    assert (made.epoch, made.reason, made.weights) == (2, "c came", EVEN.weights)
    assert decided(GroupLook(True, {"a": (0, 1, 2, 3)}, {}, 1)).reason == "b went"  # type: ignore[union-attr]


def test_an_epoch_is_above_all_that_members_have_seen() -> None:
    # The topic was lost, and the members remember.
    made = next_assignment(None, replace(FOLLOWED, epoch=41), planned(EVEN.weights), 0, 100.0, History())
    assert made is not None
    assert (made.epoch, made.owners) == (42, EVEN.owners)


def test_publications_are_bounded_in_time() -> None:
    history = History()
    came = GroupLook(True, {**FOLLOWED.members, "c": ()}, {}, 1)
    assert decided(came, 1000.0, history=history) is not None
    assert decided(came, 1000.0 + reassign.PUBLISH_EVERY_S - 0.1, history=history) is None
    assert decided(came, 1000.0 + reassign.PUBLISH_EVERY_S, history=history) is not None


def test_weights_move_slots_only_where_balance_asks_and_seldom() -> None:
    history = History()
    light = decided(FOLLOWED, 1000.0, (1.1, 1.0, 1.0, 1.0), history)
    assert light is not None
    assert (light.owners, light.weights) == (EVEN.owners, (1.1, 1.0, 1.0, 1.0))
    heavy = (50.0, 1.0, 50.0, 1.0)
    assert decided(FOLLOWED, 1000.0 + reassign.WEIGHTS_EVERY_S - 1, heavy, history) is None
    made = decided(FOLLOWED, 1000.0 + reassign.WEIGHTS_EVERY_S, heavy, history)
    assert made is not None
    assert made.reason == "weights have changed"
    assert made.owners[0] != made.owners[2]


def test_a_group_that_stands_still_with_other_owners_is_told_again() -> None:
    history = History()
    astray = replace(FOLLOWED, members={"a": (0, 1), "b": (2, 3)})
    assert decided(astray, 1000.0, history=history) is None
    assert decided(astray, 1000.0 + reassign.FOLLOW_S - 1, history=history) is None
    made = decided(astray, 1000.0 + reassign.FOLLOW_S, history=history)
    assert made is not None
    assert (made.epoch, made.owners) == (2, EVEN.owners)


def test_a_quota_that_several_shards_take_from_is_divided_and_published_anew_when_it_changes() -> None:
    name = "cloudwatch/000000000001/eu-west-1"
    split = UnitPlan(
        {f"{name}#ec2": 0, f"{name}#rds": 1, f"{name}#sqs": 2},
        {f"{name}#ec2": 60.0, f"{name}#rds": 30.0, f"{name}#sqs": 10.0},
    )
    history = History(moved_for_weights_s=1000.0)
    made = next_assignment(EVEN, FOLLOWED, Planned(split, 4), 5_000, 1000.0, history)
    assert made is not None
    assert (made.epoch, made.owners, made.reason) == (2, EVEN.owners, "quotas are shared otherwise")
    assert made.shares_of("a") == {"000000000001/eu-west-1": pytest.approx(0.9 * 0.7 + 0.05)}
    assert made.shares_of("a")["000000000001/eu-west-1"] + made.shares_of("b")[
        "000000000001/eu-west-1"
    ] == pytest.approx(1)
    assert decode_assignment(encode_assignment(made)) == made
    assert next_assignment(made, FOLLOWED, Planned(split, 4), 9_000, 1100.0, history) is None
    whole = Planned(UnitPlan({name: 0}, {name: 100.0}), 4)
    alone = next_assignment(made, FOLLOWED, whole, 9_000, 1200.0, history)
    assert alone is not None
    assert alone.shares == {}


async def test_a_part_of_a_quota_spaces_requests_accordingly() -> None:
    clock = ManualClock(0)
    limiter = Limiter(clock)
    limiter.parts = {("1", "eu"): 0.25}
    for key in (("1", "eu", "GetMetricData"), ("2", "eu", "GetMetricData")):
        start_s = clock.monotonic_s()
        for _ in range(9):
            await limiter.acquire(key, 0.5, deadline_s=1000)
        took_s = clock.monotonic_s() - start_s
        assert took_s == pytest.approx(8 * 0.5 / limiter.parts.get(key[:2], 1.0), abs=2 * limiter.BURST_S)


# --- the assignor ---------------------------------------------------------------------------------------------


class Cluster:
    def partitions_for_topic(self, _: str) -> set[int]:
        return {0, 1, 2, 3}


def test_a_member_that_cannot_be_read_gets_slots_all_the_same() -> None:
    good = ShardAssignor("a", lambda: EVEN)
    known = good.metadata(["t"])
    foreign = replace_user_data(known, b"garbage")
    given = good.assign(Cluster(), {"id-1": known, "id-2": foreign})
    assert sorted(tp.partition for g in given.values() for tp in g.partitions()) == [0, 1, 2, 3]
    assert given["id-2"].partitions()


def replace_user_data(metadata: object, user_data: bytes) -> object:
    from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata

    return ConsumerProtocolMemberMetadata(0, metadata.subscription, user_data)  # type: ignore[attr-defined]


def test_a_shard_asks_only_where_a_newer_assignment_says_something_else_of_it() -> None:
    one = ShardAssignor("a", lambda: EVEN)
    members = {"id-1": one.metadata(["t"]), "id-2": ShardAssignor("b", lambda: EVEN).metadata(["t"])}
    assert not one.differs(published(2, "bbbb"))  # it is joining
    one.on_assignment(one.assign(Cluster(), members)["id-1"])
    assert (one.given, one.epoch) == ((0, 2), 1)
    assert not one.differs(EVEN)
    assert not one.differs(published(2, "abab"))
    assert one.differs(published(2, "bbab"))


def test_a_leader_that_was_behind_asks_again_once_it_has_read_the_rest() -> None:
    late = ShardAssignor("a", lambda: None)
    ahead = replace_user_data(late.metadata(["t"]), encode_member(Member("b", 5, None)))
    late.on_assignment(late.assign(Cluster(), {"id-1": late.metadata(["t"]), "id-2": ahead})["id-1"])
    mine = ["a" if slot in (late.given or ()) else "b" for slot in range(4)]
    assert late.differs(published(5, mine))


# --- on a real broker -----------------------------------------------------------------------------------------

SLOTS = 12
SESSION_S = 6


@dataclass
class Shard:
    """A member of a real group that follows a real topic, as an exporter does."""

    name: str
    board: Board
    consumer: Consumer
    assignor: ShardAssignor
    mine: Incarnation
    lifecycle: Lifecycle
    rebalances: int = 0
    running: asyncio.Task[None] | None = None

    async def run(self) -> None:
        async def poll() -> None:
            while not self.lifecycle.stop.is_set():
                await self.consumer.poll(10, 0.1)

        async with asyncio.TaskGroup() as group:
            group.create_task(self.board.run(self.lifecycle))
            group.create_task(follow(self.board, self.consumer, self.assignor, self.mine, self.lifecycle))
            group.create_task(poll())

    async def stop(self) -> None:
        self.lifecycle.stop.set()
        if self.running is not None:
            await asyncio.wait({self.running})
        await self.consumer.stop()
        await self.board.close()


def unit(slot: int) -> str:
    return f"cloudwatch/{slot:012}/eu-west-1"


class Fleet:
    """Shards and a coordinator's publisher on one topic."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        self.kafka = Kafka(bootstrap=bootstrap, prefix=prefix, session_timeout_s=SESSION_S)
        self.producer = Producer(bootstrap, "test")
        self.admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        self.shards: dict[str, Shard] = {}
        self.weights: dict[str, float] = {unit(i): 1.0 for i in range(SLOTS)}
        self.board = Board(self.kafka, "coordinator")
        slots = {unit(i): i for i in range(SLOTS)}
        self.publisher = Publisher(
            self.kafka,
            self.producer,
            self.board,
            SystemClock(),
            lambda: Planned(UnitPlan(slots, self.weights), SLOTS),
        )
        self.lifecycle = Lifecycle()

    async def add(self, *new: str) -> None:
        for name in new:
            board = Board(self.kafka, name)
            lifecycle = Lifecycle()
            mine = await take_name(board, self.producer, name, SystemClock(), lifecycle)
            assert mine is not None
            assignor = ShardAssignor(name, lambda board=board: board.assignment)  # type: ignore[misc]
            shard = Shard(name, board, self.consumer(name, assignor), assignor, mine, lifecycle)
            self.shards[name] = shard
            await shard.consumer.start()
            shard.running = asyncio.create_task(shard.run())

    def consumer(self, name: str, assignor: ShardAssignor) -> Consumer:
        async def assigned(partitions: Sequence[int]) -> dict[int, int]:
            self.shards[name].rebalances += 1
            return dict.fromkeys(partitions, 0)

        async def revoked(_: Sequence[int]) -> None:
            await asyncio.sleep(0)

        return Consumer(
            self.kafka.bootstrap, self.kafka.topic("collect"), exporter_group(self.kafka), client_id=name,
            instance_id=name, clock=SystemClock(), session_timeout_s=SESSION_S, assigned=assigned, revoked=revoked,
            assignor=assignor,
        )  # fmt: skip

    async def settles(self, *live: str) -> float:
        """Until these own all slots as published; returns seconds."""
        start_s = SystemClock().monotonic_s()

        async def settled() -> bool:
            page = self.publisher.page()
            return bool(page["settled"]) and {s["shard"] for s in page["shards"] if s["alive"]} == set(live)

        await eventually(settled, timeout_s=25)
        return SystemClock().monotonic_s() - start_s

    def rebalances(self) -> dict[str, int]:
        return {name: shard.rebalances for name, shard in self.shards.items()}

    def owned(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shard.consumer.assignment()) for name, shard in self.shards.items()}


@asynccontextmanager
async def fleet(bootstrap: str, prefix: str) -> AsyncIterator[Fleet]:
    made = Fleet(bootstrap, prefix)
    kafka = made.kafka
    await made.admin.start()
    await made.admin.create_topics(
        [
            NewTopic(kafka.topic("collect"), SLOTS, 1),
            NewTopic(kafka.topic("shards"), 1, 1, topic_configs={"cleanup.policy": "compact"}),
        ]
    )
    await commit_start(bootstrap, kafka.topic("collect"), exporter_group(kafka), SLOTS)
    coordinator = asyncio.gather(made.board.run(made.lifecycle), made.publisher.run(made.lifecycle))
    try:
        yield made
    finally:
        made.lifecycle.stop.set()
        await asyncio.gather(*(shard.stop() for shard in made.shards.values()), coordinator)
        await made.board.close()
        await made.producer.close()
        await made.admin.close()


async def test_a_group_follows_what_is_published_and_nothing_moves_twice(
    kafka_bootstrap: str, topic_prefix: str
) -> None:
    async with fleet(kafka_bootstrap, topic_prefix) as all_of:
        await all_of.add("s-1", "s-2")
        await all_of.settles("s-1", "s-2")
        before = all_of.owned()
        assert {len(slots) for slots in before.values()} == {6}

        rebalances = all_of.rebalances()
        await all_of.add("s-3")
        await all_of.settles("s-1", "s-2", "s-3")
        after = all_of.owned()
        # The leader had computed it already: the publication made nobody join again.
        assert {n: all_of.rebalances()[n] - rebalances[n] for n in rebalances} == {"s-1": 1, "s-2": 1}
        assert all(set(after[n]) <= set(before[n]) for n in before)

        # Weights that ask for moves: those, and no more, in one rebalance.
        all_of.weights |= {unit(slot): 40.0 for slot in after["s-1"]}
        all_of.publisher.history.moved_for_weights_s = -reassign.WEIGHTS_EVERY_S
        rebalances = all_of.rebalances()
        epoch = all_of.board.assignment.epoch  # type: ignore[union-attr]

        async def moved() -> bool:
            found = all_of.board.assignment
            return found is not None and found.epoch > epoch

        await eventually(moved)
        await all_of.settles("s-1", "s-2", "s-3")
        assert set(all_of.owned()["s-1"]) < set(after["s-1"])
        assert all_of.rebalances() == {name: count + 1 for name, count in rebalances.items()}

        # One that is removed on purpose leaves at once, without its session's timeout.
        await all_of.shards["s-3"].stop()
        await remove_members(all_of.admin, exporter_group(all_of.kafka), ["s-3", "never-there"])
        assert await all_of.settles("s-1", "s-2") < 6


async def test_a_look_at_the_group_names_shards_slots_and_the_newest_epoch(
    kafka_bootstrap: str, topic_prefix: str
) -> None:
    async with fleet(kafka_bootstrap, topic_prefix) as all_of:
        await all_of.add("s-1")
        await all_of.settles("s-1")
        look = await look_at_group(all_of.admin, exporter_group(all_of.kafka))
        assert (look.stable, look.members) == (True, {"s-1": tuple(range(SLOTS))})
        page = all_of.publisher.page()
        assert page["epoch"] == 1
        [shard] = page["shards"]
        assert (shard["pid"], shard["weight"], shard["slots"]) == (os.getpid(), SLOTS, list(range(SLOTS)))
        assert shard["targets"] == [unit(i) for i in range(SLOTS)]


async def test_of_two_with_one_name_the_older_ends_and_the_newer_goes_on(
    kafka_bootstrap: str, topic_prefix: str
) -> None:
    async with fleet(kafka_bootstrap, topic_prefix) as all_of:
        await all_of.add("s-1")
        await all_of.settles("s-1")
        older = all_of.shards.pop("s-1")
        await all_of.add("s-1")
        assert older.running is not None
        async with asyncio.timeout(6):
            with pytest.raises(ExceptionGroup) as ended:
                await older.running
        assert ended.group_contains(
            Fatal, match="another process with the name s-1 started at .*its own name"
        )
        await older.stop()
        await all_of.settles("s-1")


def test_a_clock_that_is_behind_does_not_lose_a_name_to_an_older_process() -> None:
    board = Board(Kafka(), "t")
    board.incarnations["a"] = Incarnation("a", 9_000, 1, "h", 1)
    with pytest.raises(Fatal, match="1970-01-01T00:00:09Z"):
        check_name(board, Incarnation("a", 8_000, 2, "h", 2))
    check_name(board, Incarnation("a", 9_001, 0, "h", 2))
    check_name(board, Incarnation("b", 1, 0, "h", 2))


def exporter_process(config: Path, port: int) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "workers.cli",
        "exporter",
        "--config",
        str(config),
        "--shard",
        "exporter-1",
    ]
    return subprocess.Popen(
        [*command, "--metrics-port", str(port)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


async def test_of_two_processes_with_one_name_the_older_exits_with_3_within_a_session_timeout(
    kafka_bootstrap: str, topic_prefix: str, tmp_path: Path
) -> None:
    async with fleet(kafka_bootstrap, topic_prefix) as all_of:
        config = tmp_path / "headgate.yaml"
        config.write_text(
            f"kafka: {{bootstrap: '{kafka_bootstrap}', prefix: {topic_prefix}, session_timeout_s: {SESSION_S}}}\n"
            f"slots: {SLOTS}\naccounts: [{{id: '123456789012', regions: [eu-west-1], services: [ec2]}}]\n"
        )
        ports = free_ports(2)

        async def ready(port: int) -> bool:
            try:
                return bool(await asyncio.to_thread(get_local, f"http://127.0.0.1:{port}/readyz", 1.0))
            except OSError:
                return False

        older = exporter_process(config, ports[0])
        newer = None
        try:
            await eventually(lambda: ready(ports[0]), timeout_s=30)
            newer = exporter_process(config, ports[1])
            await eventually(lambda: ready(ports[1]), timeout_s=30)
            taken_ms = all_of.board.incarnations["exporter-1"].started_at_ms
            _, log = await asyncio.to_thread(older.communicate, timeout=SESSION_S)
            assert older.returncode == 3
            [stopped] = [
                line
                for line in map(json.loads, log.splitlines())
                if line["event"] == "worker_stopped_for_safety"
            ]
            assert stopped["remedy"] == "give each its own name"
            assert f"(pid {newer.pid} on " in stopped["what"]
            ended_ms = datetime.fromisoformat(stopped["timestamp"]).timestamp() * 1000
            assert ended_ms - taken_ms < SESSION_S * 1000
            # Whoever took the name has the slots, and goes when it is told to.
            await all_of.settles("exporter-1")
            newer.send_signal(signal.SIGTERM)
            await asyncio.to_thread(newer.communicate, timeout=20)
            assert newer.returncode == 0
        finally:
            for process in (older, newer):
                if process is not None:
                    process.kill()
                    process.communicate()


def test_a_topic_of_shards_has_to_be_compacted_and_all_others_must_not() -> None:
    described = {"topic": "t.shards", "partitions": [{"replicas": [1]}]}

    def wrong(policy: str, retention_ms: int | None) -> str | None:
        found = _topic_is_wrong(
            described, {"cleanup.policy": policy, "retention.ms": "9"}, 1, Kafka(), retention_ms
        )
        return found[0] if found else None

    assert wrong("compact", None) is None
    assert wrong("delete", None) == "is not compacted, which forgets records"
    assert wrong("delete", 9) is None
    assert wrong("compact", 9) == "is compacted, which loses records"
