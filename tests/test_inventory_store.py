"""The history of resources: what looks make of it, purely and in PostgreSQL, and what the reader gives the report."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import asyncpg
import pytest

from ingest.errors import Rejected
from ingest.inventory import store
from ingest.inventory.history import Open, changes
from ingest.inventory.model import Lived, Look, Resource, Role, Scope, State, decode, encode
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import migrate
from shard_config.model import Postgres

SCOPE = Scope("100000000001", "eu-west-1", "ec2")
H = 3600
T0 = 1_790_000_000 // H * H


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    await migrate(database)
    found = await open_connection(Postgres(dsn=database), "test")
    yield found
    found.terminate()


def instance(id_: str = "i-1", **attributes: object) -> Resource:
    given = {"type": "m7g.large", "vcpu": 2, "state": State.RUNNING, **attributes}
    return Resource(SCOPE.account, SCOPE.region, SCOPE.service, id_, **given)  # type: ignore[arg-type]


def look(at_s: int, *resources: Resource, **more: object) -> Look:
    return Look.whole(SCOPE, "describe", at_s, resources, **more)  # type: ignore[arg-type]


async def lived(
    connection: asyncpg.Connection,
    from_s: int = 0,
    to_s: int = T0 + 1000 * H,
    accounts: Sequence[str] | None = None,
) -> list[Lived]:
    return [one async for one in store.resources(connection, from_s, to_s, accounts)]


def spans(one: Lived) -> list[tuple[int, int, str, str]]:
    return [(s.from_s, s.to_s, s.resource.type, s.resource.state) for s in one.spans]


# --- history ------------------------------------------------------------------------------------------------------


async def test_a_resource_that_is_seen_again_unchanged_is_one_span(connection: asyncpg.Connection) -> None:
    for hour in range(3):
        await store.apply(connection, look(T0 + hour * H, instance(created_s=T0 - 5 * H)))
    [one] = await lived(connection)
    assert spans(one) == [(T0 - 5 * H, T0 + 1000 * H, "m7g.large", "running")]
    assert (one.born_s, one.gone_s, one.spans[0].seen_s) == (T0 - 5 * H, None, T0)


async def test_a_resize_ends_one_span_and_begins_another_where_it_was_seen(
    connection: asyncpg.Connection,
) -> None:
    await store.apply(connection, look(T0, instance(created_s=T0 - H)))
    done = await store.apply(connection, look(T0 + H, instance(created_s=T0 - H, type="m7g.xlarge", vcpu=4)))
    assert (done.new, done.changed, done.gone, done.same) == (0, 1, 0, 0)
    [one] = await lived(connection, T0, T0 + 2 * H)
    assert spans(one) == [(T0, T0 + H, "m7g.large", "running"), (T0 + H, T0 + 2 * H, "m7g.xlarge", "running")]
    assert one.at(T0 + H - 1) == one.spans[0].resource
    assert one.at(T0 + 2 * H) is None


async def test_a_stop_is_dated_by_aws_and_its_hours_are_known(connection: asyncpg.Connection) -> None:
    await store.apply(connection, look(T0, instance(created_s=T0 - 9 * H, state_since_s=T0 - 9 * H)))
    stopped = instance(created_s=T0 - 9 * H, state=State.STOPPED, state_since_s=T0 + 2 * H)
    await store.apply(connection, look(T0 + 6 * H, stopped))
    [one] = await lived(connection, T0, T0 + 10 * H)
    assert one.in_state_s(State.STOPPED) == 8 * H
    assert one.in_state_s(State.RUNNING) == 2 * H
    assert one.lived_s == 10 * H


async def test_what_a_whole_look_no_longer_has_is_gone_since_that_look(
    connection: asyncpg.Connection,
) -> None:
    await store.apply(connection, look(T0, instance("i-1"), instance("i-2")))
    done = await store.apply(connection, look(T0 + H, instance("i-2")))
    assert (done.gone, done.same) == (1, 1)
    first, second = await lived(connection, T0, T0 + 2 * H)
    assert (first.gone_s, first.lived_s, second.gone_s) == (T0 + H, H, None)
    assert [one.last.id for one in await lived(connection, T0 + H, T0 + 2 * H)] == ["i-2"]


async def test_a_terminated_instance_is_gone_since_aws_says_so_and_once(
    connection: asyncpg.Connection,
) -> None:
    await store.apply(connection, look(T0, instance()))
    dead = instance(state=State.TERMINATED, state_since_s=T0 + 20 * 60)
    for at_s in (T0 + H, T0 + 2 * H):
        await store.apply(connection, look(at_s, dead))
    [one] = await lived(connection)
    assert one.gone_s == T0 + 20 * 60
    assert one.last.state is State.RUNNING


async def test_what_comes_later_lives_since_it_was_created(connection: asyncpg.Connection) -> None:
    await store.apply(connection, look(T0))
    await store.apply(connection, look(T0 + 6 * H, instance(created_s=T0 + 2 * H)))
    [one] = await lived(connection, T0, T0 + 10 * H)
    assert (one.born_s, one.lived_s) == (T0 + 2 * H, 8 * H)


async def test_before_the_first_look_the_state_is_unknown_and_the_size_is_as_first_seen(
    connection: asyncpg.Connection,
) -> None:
    await store.apply(connection, look(T0, instance(created_s=T0 - 100 * H, state_since_s=T0 - 10 * H)))
    [one] = await lived(connection, T0 - 50 * H, T0)
    assert spans(one) == [
        (T0 - 50 * H, T0 - 10 * H, "m7g.large", ""),
        (T0 - 10 * H, T0, "m7g.large", "running"),
    ]
    assert {span.seen_s for span in one.spans} == {T0}


async def test_of_what_nobody_says_when_it_was_made_it_is_not_known(connection: asyncpg.Connection) -> None:
    await store.apply(connection, look(T0, instance("i-1")))
    await store.apply(connection, look(T0 + H, instance("i-1"), instance("i-2")))
    old, new = await lived(connection, T0 - H, T0 + 2 * H)
    assert (old.born_s, old.lived_s) == (None, 3 * H)
    assert (new.born_s, new.lived_s) == (T0 + H, H)


async def test_a_time_of_creation_that_moves_is_no_change(connection: asyncpg.Connection) -> None:
    await store.apply(connection, look(T0, instance(created_s=T0 - 9 * H)))
    done = await store.apply(connection, look(T0 + H, instance(created_s=T0 - H)))
    assert (done.same, done.changed) == (1, 0)


# --- what ends no span --------------------------------------------------------------------------------------------


async def test_a_failed_look_is_remembered_and_ends_nothing(connection: asyncpg.Connection) -> None:
    await store.apply(connection, look(T0, instance()))
    await store.apply(
        connection, Look.failed(SCOPE, "describe", T0 + H, "forbidden: grant ec2:DescribeInstances")
    )
    [one] = await lived(connection, T0, T0 + 2 * H)
    assert one.gone_s is None
    [known] = await store.known(connection)
    assert (known.whole_s, known.tried_s, known.resources) == (T0, T0 + H, 1)
    assert known.failure == "forbidden: grant ec2:DescribeInstances"
    await store.apply(connection, look(T0 + 2 * H, instance(), lacks=["tags: grant tag:GetResources"]))
    [known] = await store.known(connection)
    assert (known.failure, known.first_s, known.whole_s) == ("", T0, T0 + 2 * H)
    assert known.lacks == ("tags: grant tag:GetResources",)


async def test_looks_again_and_older_looks_change_nothing(connection: asyncpg.Connection) -> None:
    await store.apply(connection, look(T0 + H, instance()))
    before = await lived(connection)
    for late in (
        look(T0 + H),
        look(T0, instance(type="m7g.xlarge")),
        Look.failed(SCOPE, "describe", T0, "old"),
    ):
        done = await store.apply(connection, late)
        assert (done.new, done.changed, done.gone) == (0, 0, 0)
        assert bool(done.doubt) == (not late.failure)
    assert (await store.apply(connection, look(T0 + H, instance()))).doubt == ""
    assert await lived(connection) == before
    [known] = await store.known(connection)
    assert (known.failure, known.tried_s) == ("", T0 + H)


async def test_an_empty_list_that_is_doubtful_ends_nothing_where_something_is_known(
    connection: asyncpg.Connection,
) -> None:
    await store.apply(connection, look(T0, empty_is_doubtful=True))
    await store.apply(connection, look(T0 + H, instance(), empty_is_doubtful=True))
    done = await store.apply(connection, look(T0 + 2 * H, empty_is_doubtful=True))
    assert (done.gone, done.same) == (0, 1)
    assert done.doubt
    [known] = await store.known(connection)
    assert (known.whole_s, known.failure) == (T0 + H, done.doubt)


async def test_scopes_are_apart(connection: asyncpg.Connection) -> None:
    other = replace(instance(), account="100000000002")
    await store.apply(connection, look(T0, instance()))
    await store.apply(connection, Look.whole(other.scope, "csv", T0, [other]))
    await store.apply(connection, look(T0 + H))
    assert [one.gone_s for one in await lived(connection)] == [T0 + H, None]
    assert [one.last.account for one in await lived(connection, accounts=["100000000002"])] == [
        "100000000002"
    ]
    assert await lived(connection, accounts=[]) == []


async def test_looks_all_are_applied_or_none(connection: asyncpg.Connection) -> None:
    bad = replace(look(T0), scope=Scope("100000000001", "eu-west-1", "\0"))
    with pytest.raises(Exception, match="0x00"):
        await store.apply_all(connection, [look(T0, instance()), bad])
    assert await lived(connection) == []


async def test_spans_that_ended_long_ago_are_forgotten(connection: asyncpg.Connection) -> None:
    await store.apply(connection, look(T0, instance()))
    await store.apply(connection, look(T0 + H))
    assert await store.forget(connection, T0 + 2 * H) == 0
    assert await store.forget(connection, T0 + 801 * 24 * H) == 1


# --- whatever comes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 5, 11, 17])
async def test_spans_of_a_resource_never_overlap_and_say_what_was_seen(
    seed: int, connection: asyncpg.Connection
) -> None:
    rng = random.Random(seed)
    seen: list[tuple[int, dict[str, Resource]]] = []
    at_s = T0
    for _ in range(12):
        at_s += rng.choice([1, H, 6 * H])
        if rng.random() < 0.2:
            await store.apply(connection, Look.failed(SCOPE, "describe", at_s, "no"))
            continue
        there = [
            instance(
                f"i-{n}",
                type=rng.choice(["m7g.large", "m7g.xlarge"]),
                state=rng.choice([State.RUNNING, State.STOPPED]),
                state_since_s=rng.choice([None, at_s - rng.randrange(9 * H)]),
                created_s=T0 - 100 * H if n % 2 else None,
            )
            for n in range(5)
            if rng.random() < 0.7
        ]
        await store.apply(connection, look(at_s, *there))
        seen.append((at_s, {one.id: one for one in there}))
    found = {one.last.id: one for one in await lived(connection)}
    for one in found.values():
        pairs = list(zip(one.spans, one.spans[1:], strict=False))
        assert all(a.to_s <= b.from_s for a, b in pairs)
        assert all(a.resource != b.resource for a, b in pairs if a.to_s == b.from_s)
    for at_s, listed in seen:
        for n in range(5):
            known = found[f"i-{n}"].at(at_s) if f"i-{n}" in found else None
            assert known == listed.get(f"i-{n}"), (seed, at_s, n)


def test_a_failed_look_makes_no_changes() -> None:
    known = {"i-1": Open(T0, T0, T0, instance())}
    found = changes(known, Look.failed(SCOPE, "describe", T0 + H, "no"), T0)
    assert (found.ended, found.begun, found.same) == ((), (), 1)


# --- texts --------------------------------------------------------------------------------------------------------

HOSTILE = {
    "": "",
    "nul\0": "a\0b",
    "half \ud800": "\udfff",
    "</script><img src=x onerror=alert(1)>": "'; DROP TABLE inventory; --",
    "=cmd|'/c calc'!A1": "\r\n\t\x1b[31m",
    "long": "x" * 100_000,
    "{json}": '{"a": ["\\u0000"]}',
}


async def test_hostile_tags_are_kept_as_text_and_are_no_change_the_next_time(
    connection: asyncpg.Connection,
) -> None:
    hostile = instance(tags={**HOSTILE, **{f"key {n}": "v" for n in range(100)}}, group="asg:\0")
    await store.apply(connection, look(T0, hostile))
    done = await store.apply(connection, look(T0 + H, hostile))
    assert (done.same, done.changed) == (1, 0)
    [one] = await lived(connection)
    assert one.last == look(T0, hostile).resources[0]
    assert len(one.last.tags) == 64
    assert one.last.tags["</script><img src=x onerror=alert(1)>"] == "'; DROP TABLE inventory; --"
    assert one.last.group == "asg:"
    assert len(one.last.tags["long"]) == 2048 if "long" in one.last.tags else True


def test_attributes_are_read_back_as_they_were() -> None:
    full = instance(
        memory_bytes=8 * 1024**3, storage_bytes=1, state_since_s=5, group="asg:web", attached_to=("i-2", "i-1"),
        role=Role.READER, multi_az=False, tags={"team": "search"}, purchase="spot",
    )  # fmt: skip
    [full] = look(T0, full).resources
    assert decode(SCOPE, full.id, encode(full)) == full
    assert decode(SCOPE, "i-1", '{"vcpu": 4, "of a newer version": 1}') == Resource(*SCOPE_OF, "i-1", vcpu=4)


SCOPE_OF = (SCOPE.account, SCOPE.region, SCOPE.service)


@pytest.mark.parametrize("spoilt", ["", "[]", "null", '{"state": "on"}'])
def test_attributes_that_are_none_are_refused(spoilt: str) -> None:
    with pytest.raises(Rejected, match="spoilt"):
        decode(SCOPE, "i-1", spoilt)


def test_a_list_with_a_stranger_or_two_of_one_id_is_no_look() -> None:
    with pytest.raises(Rejected, match="is among them"):
        look(T0, replace(instance(), region="us-east-1"))
    with pytest.raises(Rejected, match="is there twice"):
        look(T0, instance(), instance(type="m7g.xlarge"))
    assert len(look(T0, instance(), instance()).resources) == 1
