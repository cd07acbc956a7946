"""What was collected lands again, from Kafka and from S3 alone, as the same table; a replay that was stopped goes on where it was."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import asyncpg
import pytest
from aiobotocore.session import get_session

from ingest.archive_replay import BYTES_AHEAD, GETS_AHEAD, LANES, ArchiveReplay, lane_of, place_of
from ingest.backfill import DROPPED, Means
from ingest.clock import SystemClock
from ingest.errors import Fatal
from ingest.model import Target, Window
from ingest.ports import Advance, ArchivedTask, Landable, Landed
from ingest.replay import Scope
from ingest.sinks.migrate import migrate
from ingest.sinks.postgres import PostgresSink
from shard_config.model import Config, Postgres
from tests.replay_scene import ACCOUNTS, Past, config_of, delete_records, table_of
from workers.backfill_plan import Ask, Plan, opened, reader_of
from workers.backfilling import Done
from workers.setup import setup

SEED = int(os.environ.get("HEADGATE_SEED", "11"))


@dataclass(frozen=True)
class Scene:
    config: Config
    past: Past
    dsn: str

    def ask(self, via: str, **changes: object) -> Ask:
        scope = Scope(self.past.from_s, self.past.to_s)
        return replace(Ask(scope, via, "postgres", False, 0, 0, (1, 1)), **changes)  # type: ignore[arg-type]

    async def run(self, asked: Ask, later_s: int = 0) -> tuple[Plan, Done]:
        async with opened(self.config, asked, SystemClock(later_s)) as backfill:
            plan, _ = await backfill.plan()
            return plan, await backfill.execute(plan, lambda source, share, done: None)

    async def execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@pytest.fixture(scope="module")
async def published(kafka_bootstrap: str, postgres_dsn: str, s3_endpoint: str) -> AsyncIterator[Scene]:
    """A past in Kafka and in the archive, for all tests: they only read it."""
    name = f"replay_{uuid.uuid4().hex[:12]}"
    server = await asyncpg.connect(postgres_dsn)
    try:
        await server.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        dsn = postgres_dsn.rpartition("/")[0] + "/" + name
        config = config_of(kafka_bootstrap, name.replace("_", "-"), dsn, s3_endpoint, name.replace("_", "-"))
        await setup(config)
        past = Past(SEED)
        await past.publish(config)
        yield Scene(config, past, dsn)
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await server.close()


@pytest.fixture
async def scene(published: Scene, database: str) -> Scene:
    """The past, and an empty store."""
    postgres = Postgres(dsn=database)
    await migrate(postgres)
    return Scene(published.config.model_copy(update={"postgres": postgres}), published.past, database)


@pytest.mark.parametrize("via", ["kafka", "s3"])
async def test_an_empty_store_is_rebuilt_as_the_looks_say(scene: Scene, via: str) -> None:
    plan, done = await scene.run(scene.ask(via))

    assert plan.whole == via
    assert await table_of(scene.dsn) == scene.past.expected, f"seed {SEED}"
    assert done.batches - done.skipped_batches == scene.past.within(ACCOUNTS, ("ec2", "sqs"))
    assert done.problems == []


async def test_both_sources_together_change_nothing(scene: Scene) -> None:
    await scene.run(scene.ask("s3"))
    _, done = await scene.run(scene.ask("kafka"))

    assert done.batches == done.skipped_batches > 0
    assert await table_of(scene.dsn) == scene.past.expected


async def test_a_store_whose_samples_were_lost_is_rebuilt_though_landed_knows_its_batches(
    scene: Scene,
) -> None:
    await scene.run(scene.ask("s3"))
    await scene.execute("TRUNCATE samples, series")

    plan, done = await scene.run(scene.ask("auto"))

    assert plan.whole is Means.KAFKA  # which has all of it, for nothing
    assert "written again" in plan.notes[0]
    assert done.batches - done.skipped_batches >= scene.past.within(ACCOUNTS, ("ec2", "sqs"))
    assert await table_of(scene.dsn) == scene.past.expected


async def test_what_a_lost_ledger_does_not_know_is_planned_from_the_archives_receipts(scene: Scene) -> None:
    plan, done = await scene.run(scene.ask("auto"))

    assert {(s.means, s.windows) for s in plan.stretches} == {(Means.KAFKA, 6)}
    assert len(plan.stretches) == 2 * len(ACCOUNTS)
    assert done.receipts == len(scene.past.tasks), "the ledger is told of every look"
    assert done.tasks == 0
    assert await table_of(scene.dsn) == scene.past.expected


async def test_filters_are_kept(scene: Scene) -> None:
    scope = Scope(
        scene.past.from_s, scene.past.to_s, frozenset(ACCOUNTS[:1]), frozenset(), frozenset({"sqs"})
    )
    for via in ("kafka", "s3"):
        await scene.execute("TRUNCATE samples, series, landed")
        _, done = await scene.run(scene.ask(via, scope=scope))
        assert done.batches - done.skipped_batches == scene.past.within(ACCOUNTS[:1], ("sqs",))


async def test_parts_share_a_replay(scene: Scene) -> None:
    for via in ("kafka", "s3"):
        await scene.execute("TRUNCATE samples, series, landed")
        halves = [(await scene.run(scene.ask(via, part=(i, 2))))[1] for i in (1, 2)]
        assert all(half.batches for half in halves)
        assert await table_of(scene.dsn) == scene.past.expected


class _StopsAfter:
    """Patches landings: after so many, whoever lands is interrupted, as by Ctrl-C."""

    def __init__(self, landings: int) -> None:
        self._left = landings
        self._land = PostgresSink.land

    async def __call__(
        self, sink: PostgresSink, advances: Sequence[Advance], batches: Sequence[Landable]
    ) -> Landed:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return await self._land(sink, advances, batches)


@pytest.mark.parametrize("via", ["kafka", "s3"])
async def test_a_stopped_replay_goes_on_where_it_was(
    scene: Scene, via: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scene.ask(via)
    stopper = _StopsAfter(1)
    with monkeypatch.context() as patched:
        patched.setattr(PostgresSink, "land", lambda *a: stopper(*a))
        with pytest.raises(KeyboardInterrupt):
            await scene.run(asked)
    before = await _position_sum(scene, asked)

    _, done = await scene.run(asked)

    assert before > 0
    assert done.skipped_batches < done.batches
    assert await table_of(scene.dsn) == scene.past.expected
    assert await _position_sum(scene, asked) == 0, "what is done is forgotten, so that it can be done again"


async def _position_sum(scene: Scene, asked: Ask) -> int:
    connection = await asyncpg.connect(scene.dsn)
    try:
        found = await connection.fetchval(
            "SELECT coalesce(sum(next), 0)::numeric FROM positions WHERE sink = $1", reader_of(asked)
        )
    finally:
        await connection.close()
    return int(found)


async def test_a_new_store_gets_its_schema_and_the_same_table(published: Scene, database: str) -> None:
    await published.run(published.ask("auto", into=database))

    assert await table_of(database) == published.past.expected
    assert await table_of(published.dsn) == {}


@pytest.mark.parametrize("via", ["auto", "s3"])
async def test_days_that_the_live_store_has_dropped_land_in_another_store_only(
    published: Scene, database: str, via: str
) -> None:
    kept = replace(published, config=published.config.model_copy(update={"samples_retention_days": 7}))
    month_s = 30 * 86_400

    plan, done = await kept.run(kept.ask(via), month_s)

    assert plan.empty
    assert {(s.means, s.detail) for s in plan.stretches} == {(Means.NOWHERE, DROPPED)}
    assert done.points == 0
    assert await table_of(kept.dsn) == {}

    await kept.run(kept.ask(via, into=database), month_s)

    assert await table_of(database) == kept.past.expected


async def test_days_that_are_kept_land_and_the_plan_names_those_that_are_not(scene: Scene) -> None:
    kept = replace(scene, config=scene.config.model_copy(update={"samples_retention_days": 7}))
    scope = Scope(kept.past.from_s - 9 * 86_400, kept.past.to_s)

    plan, _ = await kept.run(kept.ask("s3", scope=scope))

    assert plan.whole is Means.S3
    assert any("samples_retention_days" in note for note in plan.notes)
    assert await table_of(kept.dsn) == kept.past.expected


async def test_what_is_lost_is_named_and_all_the_rest_lands(
    scene: Scene, topic_prefix: str, bucket: str
) -> None:
    """A past of its own, whose Kafka has let go of everything, and whose archive has a spoilt object."""
    kafka = scene.config.kafka.model_copy(update={"prefix": topic_prefix})
    s3 = scene.config.s3.model_copy(update={"bucket": bucket})
    lossy = replace(
        scene, config=scene.config.model_copy(update={"kafka": kafka, "s3": s3}), past=Past(SEED, 2)
    )
    await setup(lossy.config)
    await lossy.past.publish(lossy.config)
    await delete_records(kafka.bootstrap, kafka.topic("raw"), kafka.raw_partitions)
    spoilt = lossy.past.tasks[0].receipt.archive_key
    async with get_session().create_client("s3", endpoint_url=s3.endpoint_url) as client:
        await client.put_object(Bucket=bucket, Key=spoilt, Body=b"HGTASK1\nrubbish")

    plan, done = await lossy.run(lossy.ask("auto", rebuild=True))

    assert plan.whole is Means.S3
    assert done.problems == [f"spoilt in the archive: {spoilt}"]
    whole = [t for t in lossy.past.tasks[1:] if t.receipt.items[0].item.start_s < lossy.past.to_s]
    assert done.batches == sum(len(t.payloads) for t in whole)


# --- in bounded memory ---------------------------------------------------------------------------------------------


class CountedArchive:
    """An archive of one target whose tasks are as large as they say. `most` is what was fetched and not yet taken, at its peak."""

    def __init__(self, tasks: Sequence[ArchivedTask], bytes_each: int) -> None:
        self._tasks = {t.receipt.archive_key: t for t in tasks}
        self._bytes_each = bytes_each
        self.begun = self.taken = self.most = 0

    async def targets(self) -> list[Target]:
        return sorted({t.receipt.target for t in self._tasks.values()})

    async def sized_keys(self, target: Target, start_s: int, end_s: int) -> AsyncIterator[tuple[str, int]]:
        for key, task in self._tasks.items():
            if task.receipt.target == target and start_s <= task.receipt.tick_s < end_s:
                yield key, self._bytes_each

    async def get(self, key: str) -> ArchivedTask:
        self.begun += 1
        self.most = max(self.most, self.begun - self.taken)
        return self._tasks[key]


@pytest.mark.parametrize(
    ("bytes_each", "most"),
    [(1_000, GETS_AHEAD), (BYTES_AHEAD // 4, 4), (BYTES_AHEAD * 2, 1)],
)
async def test_a_replay_of_the_archive_fetches_ahead_no_more_than_its_bound(
    bytes_each: int, most: int
) -> None:
    past = Past(SEED)
    archive = CountedArchive(past.tasks, bytes_each)
    scope = Scope(past.from_s, past.to_s)
    source = ArchiveReplay(archive, range(LANES), scope, past.to_s + 3600)  # type: ignore[arg-type]

    records = 0
    async for some in source.records(await source.open(), {}):
        await asyncio.sleep(0.001)  # whoever lands is slower than whoever fetches
        archive.taken += 1
        records += len(some)

    assert records == past.within(ACCOUNTS, ("ec2", "sqs"))
    # What was handed on is not counted as taken before it has landed.
    assert most <= archive.most <= most + 1
    assert source.receipts == [], "nobody would take them out"


# --- what is wanted -----------------------------------------------------------------------------------------------

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")


def test_a_look_is_wanted_where_it_touches_the_time() -> None:
    scope = Scope(300, 600)
    assert scope.wants(TARGET, "ec2", 0, 301)
    assert scope.wants(TARGET, "ec2", 599, 900)
    assert not scope.wants(TARGET, "ec2", 0, 300)
    assert not scope.wants(TARGET, "ec2", 600, 900)


def test_stretches_narrow_what_is_wanted() -> None:
    scope = Scope(0, 900, stretches={(TARGET, "ec2"): (Window(300, 600),)})
    assert scope.wants(TARGET, "ec2", 0, 900)
    assert not scope.wants(TARGET, "ec2", 600, 900)
    assert not scope.wants(TARGET, "sqs", 0, 900)
    assert not scope.has(Target("cloudwatch", "123456789012", "us-east-1"))


def test_places_ascend_with_ticks_and_lanes_never_change() -> None:
    assert place_of(10, 5) < place_of(10, 6) < place_of(11, 0)
    with pytest.raises(Fatal):
        place_of(10, 1 << 24)
    assert [lane_of(Target("cloudwatch", a, "eu-west-1")) for a in ACCOUNTS] == [7, 2, 0]
    assert LANES == 8
