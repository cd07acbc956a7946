"""Looks that left out what was published before, on the real servers: sealed, put right, audited, followed, and rebuilt from Kafka and S3 alone.

Each test has an account of its own.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest

from ingest.auditor import Auditor, Scope
from ingest.changed import Changed
from ingest.heal_store import HealStore
from ingest.model import Receipt, Target
from ingest.replay import Scope as ReplayScope
from ingest.seal import scopes_of, seal
from ingest.settling import Proposal
from ingest.story import Story
from ingest.trail import follow
from tests.replay_scene import table_of
from tests.way import NAN, NOON_S, TARGET, Answers, Points, Way, key_of, the_way
from workers.backfill_plan import Ask, opened
from workers.healing import rules_of
from workers.settle import find

SETTLING_S = {"ec2": 600}


@pytest.fixture(scope="module")
async def databases(postgres_dsn: str) -> AsyncIterator[list[str]]:
    """Three empty databases."""
    names = [f"held_{uuid.uuid4().hex[:12]}" for _ in range(3)]
    server = await asyncpg.connect(postgres_dsn)
    for name in names:
        await server.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    yield [f"{postgres_dsn.rpartition('/')[0]}/{name}" for name in names]
    for name in names:
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await server.close()


@pytest.fixture(scope="module")
async def way(databases: list[str], kafka_bootstrap: str, s3_endpoint: str) -> AsyncIterator[Way]:
    name = f"held-{uuid.uuid4().hex[:12]}"
    async with the_way(databases[0], kafka_bootstrap, name, name, s3_endpoint) as way:
        way.changed = Changed(SETTLING_S)
        yield way


class Place:
    """One account of the way."""

    def __init__(self, way: Way, target: Target) -> None:
        self.way = way
        self.target = target
        self.looks = 0

    async def look(self, *points: Points, observed_min: int, land: bool = True) -> Receipt:
        """A live look at noon's window."""
        self.way.clock.advance(1)
        receipt = await self.way.look(
            *points, observed_min=observed_min, target=self.target, attempt=self.looks
        )
        self.looks += 1
        if land:
            await self.way.land()
            await self.way.ledger.fold_landed("postgres", self.way.clock.now_s())
        return receipt

    async def seal(self) -> str:
        """How the window is then: sealed, or why not; empty where it was not read."""
        now = datetime.fromtimestamp(self.way.clock.now_s(), UTC)
        await seal(self.way.sql, scopes_of(self.way.config), now)
        how: str = await self.way.sql.fetchval(
            "SELECT CASE WHEN sealed_at IS NULL THEN coalesce(unbalanced, '') ELSE 'sealed' END FROM windows"
            " WHERE target = $1",
            str(self.target),
        )
        return how

    async def differences(self, after_s: int = 600) -> list[str]:
        """What an audit says, at once or when nothing is fresh any more."""
        self.way.clock.advance(after_s)
        scope = Scope(NOON_S - 3600, NOON_S + 7200, self.target.account)
        report = await Auditor(self.way.sql, self.way.archive, self.way.config, self.way.clock, scope).run()
        assert (report.looks, report.seals) == (self.looks, 1)
        return [str(d) for d in report.differences]

    async def rows(self) -> dict[int, tuple[float, int]]:
        """Minutes from noon → value and minute of its look."""
        found = await self.way.sql.fetch(
            "SELECT extract(epoch FROM ts)::bigint AS t, value, version FROM samples JOIN series ON id = series"
            " WHERE account = $1 ORDER BY ts",
            self.target.account,
        )
        return {(r["t"] - NOON_S) // 60: (r["value"], (r["version"] // 1000 - NOON_S) // 60) for r in found}

    async def story(self) -> Story:
        """Of the first series' second point."""
        way = self.way
        key = key_of(0, self.target)
        return await follow(way.sql, way.archive, way.config, way.clock, key, NOON_S + 60)


def place(way: Way, number: int) -> Place:
    return Place(way, Target("cloudwatch", f"{number:012}", TARGET.region))


async def test_a_look_that_left_out_everything_seals_its_window_on_the_rows_of_looks_before(way: Way) -> None:
    here = place(way, 1)
    await here.look({0: 1.0, 1: 2.0}, {0: 5.0}, observed_min=6)
    last = await here.look({0: 1.0, 1: 2.0}, {0: 5.0}, observed_min=20)
    assert (last.items[0].points, len(last.items[0].held)) == (0, 1)
    assert await here.seal() == "sealed"
    assert {minute for _, minute in (await here.rows()).values()} == {6}
    assert await here.differences(after_s=0) == []
    assert await here.differences() == []
    story = await here.story()
    assert [(a.value, a.held) for a in story.answered] == [(2.0, False), (2.0, True)]
    assert "saw the same, so it was not published again" in story.verdict.sentence


async def test_what_is_dead_is_known_to_the_look_that_seals(way: Way) -> None:
    here = place(way, 2)
    await here.look({0: 1.0, 2: NAN}, {0: 5.0}, observed_min=6)
    last = await here.look({0: 1.0, 2: NAN}, {0: 5.0}, observed_min=20)
    assert last.items[0].points == 2  # the series with what is not a number
    assert await here.seal() == "sealed"
    assert await here.differences(after_s=0) == []
    assert await here.differences() == []


async def test_a_look_waits_for_those_before_it_to_land(way: Way) -> None:
    here = place(way, 3)
    await here.look({0: 1.0}, observed_min=6, land=False)
    last = await here.look({0: 1.0}, observed_min=20, land=False)
    assert (last.items[0].batches, len(last.items[0].held)) == ((), 1)
    await way.project()
    await way.ledger.fold_landed("postgres", way.clock.now_s())
    assert await here.seal() == ""
    await way.land()
    await way.ledger.fold_landed("postgres", way.clock.now_s())
    assert await here.seal() == "sealed"


async def published_whole(here: Place) -> None:
    """What the coordinator does about a window that does not balance, before it is late."""
    way = here.way
    account = way.config.accounts[0].model_copy(update={"id": here.target.account})
    rules = rules_of(way.config.model_copy(update={"accounts": (account,)}))
    healed = await HealStore(way.ledger).heal(NOON_S + 1260, rules, {})
    assert healed is not None
    [task] = healed.decision.replays
    assert (healed.asked, task.kind, task.target) == ((), "replay", here.target)
    await way.collect(task, Answers())
    await way.land()


async def test_an_older_answer_that_landed_later_is_put_right_for_nothing(way: Way) -> None:
    here = place(way, 4)
    await here.look({0: 1.0, 1: 2.0}, observed_min=6)
    own, way.changed = way.changed, Changed(SETTLING_S)
    await here.look({0: 1.0, 1: 7.0}, observed_min=8)  # another exporter's
    way.changed = own
    await here.look({0: 1.0, 1: 2.0}, observed_min=20)
    assert await here.rows() == {0: (1.0, 8), 1: (7.0, 8)}
    assert "as many, but not the same" in await here.seal()
    assert "taken for known" in (await here.story()).verdict.sentence
    await published_whole(here)
    assert await here.seal() == "sealed"
    assert await here.rows() == {0: (1.0, 20), 1: (2.0, 20)}
    assert await here.differences() == []
    assert (await here.story()).verdict.sentence.startswith("It is in the store: 2.0")


async def test_where_points_vanished_the_look_is_published_whole_and_they_stay(way: Way) -> None:
    here = place(way, 7)
    await here.look({0: 1.0}, {1: 5.0}, observed_min=6)
    await here.look({0: 1.0}, {}, observed_min=20)
    assert "1 too many" in await here.seal()
    await published_whole(here)
    assert await here.seal() == "sealed"
    assert await here.rows() == {0: (1.0, 20), 1: (5.0, 6)}
    assert await here.differences() == []


@pytest.mark.parametrize("via", ["kafka", "s3"])
async def test_another_store_is_rebuilt_from_one_source_alone(
    way: Way, databases: list[str], via: str
) -> None:
    here = place(way, 5 + (via == "s3"))
    await here.look({0: 1.0, 1: 2.0}, {0: 3.0}, observed_min=6)
    await here.look({0: 1.0, 1: 2.5}, {0: 3.0}, observed_min=8)
    await here.look({0: 1.0, 1: 2.5}, {0: 3.0}, observed_min=20)
    assert await here.seal() == "sealed"
    series = await way.sql.fetch(
        "SELECT uuid_send(id) AS id FROM series WHERE account = $1", here.target.account
    )
    ids = {r["id"] for r in series}
    live = {k: v for k, v in (await table_of(databases[0])).items() if k[0] in ids}

    dsn = databases[1 + (via == "s3")]
    scope = ReplayScope(NOON_S, NOON_S + 300, accounts=frozenset({here.target.account}))
    async with opened(way.config, Ask(scope, via, dsn, True, 0, 0, (1, 1)), way.clock) as backfill:
        plan, _ = await backfill.plan()
        assert (await backfill.execute(plan, lambda *_: None)).problems == []

    table = await table_of(dsn)
    assert {k: value for k, (_, value) in table.items()} == {k: value for k, (_, value) in live.items()}
    newer = {(version - live[k][0]) // 60_000 for k, (version, _) in table.items()}
    assert newer == ({0} if via == "kafka" else {14, 12})  # as of the last look, which held them
    assert await here.differences() == []


async def test_settling_times_are_not_guessed_of_what_was_collected_long_ago(way: Way) -> None:
    found = await find(way.config, None, 7, 0.999)
    assert found == [Proposal("ec2", 600, 0, None, None, "too little data")]
