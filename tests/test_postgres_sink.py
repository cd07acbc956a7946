"""The PostgreSQL sink keeps what `sinks/postgres.py` promises, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from itertools import count, pairwise

import asyncpg
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingest.clock import SystemClock
from ingest.errors import Fatal, Transient
from ingest.model import BatchId, digest_of
from ingest.ports import Advance, Landable, SeriesRejected, Sink
from ingest.sinks import partitions
from ingest.sinks.connection import open_connection
from ingest.sinks.copy import COLUMNS, copy_stream, rows_of
from ingest.sinks.migrate import migrate
from ingest.sinks.partitions import create_partitions, day_of, drop_partitions, name_of
from ingest.sinks.postgres import PostgresSink
from shard_config.model import Postgres
from tests.fake_sink import FakeSink, Table
from tests.sink_contract import (
    MIDNIGHT_S,
    OBSERVED_MS,
    LandedEntry,
    Point,
    SinkContract,
    account,
    make_landable,
    topic,
    values_of,
)

__all__ = ["account", "topic"]  # fixtures

CLOCK = SystemClock()


@dataclass
class FakeStore:
    sink: FakeSink

    async def table(self, account: str) -> Table:
        return {k: v for k, v in self.sink.table.items() if self.sink.series[k[0]].account == account}

    async def restart(self) -> None:
        pass

    async def landed(self, task_id: str) -> list[LandedEntry]:
        return [
            LandedEntry(
                task_id, one.batch.points, one.dead_points,
                digest_of(one.batch.point_ids(), one.batch.timestamps_s, one.batch.values),
            )
            for _, one in sorted(self.sink.landed.items()) if one.batch.task_id == task_id
        ]  # fmt: skip


@dataclass
class PostgresStore:
    sink: PostgresSink
    postgres: Postgres
    connection: asyncpg.Connection

    async def table(self, account: str) -> Table:
        rows = await self.connection.fetch(
            "SELECT p.series, extract(epoch FROM p.ts)::bigint, p.version, p.value"
            " FROM samples AS p JOIN series AS s ON s.id = p.series WHERE s.account = $1",
            account,
        )
        return {(r[0], r[1]): (r[2], r[3]) for r in rows}

    async def restart(self) -> None:
        await self.sink.close()
        self.sink = await PostgresSink.connect(self.postgres, clock=CLOCK, timeout_s=20)

    async def landed(self, task_id: str) -> list[LandedEntry]:
        rows = await self.connection.fetch(
            "SELECT task_id, points, dead_points, digest FROM landed WHERE task_id = $1 ORDER BY batch_id",
            task_id,
        )
        return [LandedEntry(r[0], r[1], r[2], r[3] % (1 << 64)) for r in rows]


@pytest.fixture(scope="session")
async def store_dsn(postgres_dsn: str) -> str:
    """A database with the schema, for all tests of this file."""
    server = await asyncpg.connect(postgres_dsn)
    await server.execute("CREATE DATABASE postgres_sink TEMPLATE template0")
    await server.close()
    dsn = postgres_dsn.rpartition("/")[0] + "/postgres_sink"
    await migrate(dsn)
    return dsn


@pytest.fixture
async def postgres_store(store_dsn: str) -> AsyncIterator[PostgresStore]:
    postgres = Postgres(dsn=store_dsn)
    sink = await PostgresSink.connect(postgres, clock=CLOCK, timeout_s=20)
    connection = await open_connection(postgres, "test")
    store = PostgresStore(sink, postgres, connection)
    yield store
    await store.sink.close()
    await connection.close()


class TestFakeSink(SinkContract):
    @pytest.fixture
    def store(self) -> FakeStore:
        return FakeStore(FakeSink())


class TestPostgresSink(SinkContract):
    @pytest.fixture
    def store(self, postgres_store: PostgresStore) -> PostgresStore:
        return postgres_store


# --- landing is a maximum -------------------------------------------------------------------------------------

_points = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 1439, 1440]), st.sampled_from([-1.0, -0.0, 0.0, 1.0, 5.0])),
    min_size=1,
    max_size=8,
)  # fmt: skip
_examples = count()
_looks = st.lists(
    st.tuples(_points, st.sampled_from([0, 1000, 2000]), st.sampled_from([0, 1])), min_size=1, max_size=5
)


@settings(
    max_examples=100,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(looks=_looks, data=st.data())
async def test_any_permutation_duplication_and_splitting_of_the_same_looks_lands_the_same_table(
    postgres_store: PostgresStore, looks: list[tuple[list[Point], int, int]], data: st.DataObject
) -> None:
    account = f"example-{next(_examples)}"  # each example, shrunk ones too, has series of its own
    fake = FakeSink()

    def landable(points: list[Point], later_ms: int, revision: int) -> Landable:
        return make_landable(account, points, observed_ms=OBSERVED_MS + later_ms, revision=revision)

    await fake.land([], [landable(*look) for look in looks])
    pieces = []
    for points, later_ms, revision in looks:
        cuts = sorted({0, len(points), *data.draw(st.sets(st.integers(0, len(points)), max_size=2))})
        pieces += [landable(points[a:b], later_ms, revision) for a, b in pairwise(cuts)]
    repeated = data.draw(st.lists(st.sampled_from(pieces), max_size=3))
    order = data.draw(
        st.permutations([*pieces, *(replace(r, batch_id=BatchId(r.batch_id[::-1])) for r in repeated)])
    )
    landings = sorted({0, len(order), *data.draw(st.sets(st.integers(0, len(order)), max_size=3))})
    for a, b in pairwise(landings):
        await postgres_store.sink.land([], order[a:b])
    assert await postgres_store.table(account) == fake.table


async def test_rows_go_by_staging_only_where_their_key_may_exist(
    postgres_store: PostgresStore, account: str
) -> None:
    sink = postgres_store.sink
    first = await sink.land([], [make_landable(account, [(0, 5, 1.0), (1, 5, 1.0)])])
    after = await sink.land([], [make_landable(account, [(0, 6, 1.0), (1, 7, 1.0)])])
    mixed = await sink.land(
        [], [make_landable(account, [(0, 6, 2.0), (0, 7, 2.0), (1, 7, 2.0), (2, 0, 2.0)])]
    )
    older = await sink.land([], [make_landable(account, [(0, 4, 3.0), (1, 4, 3.0)])])
    assert [x.staged_points for x in (first, after, mixed, older)] == [0, 0, 2, 0]
    assert values_of(await postgres_store.table(account)).count(2.0) == 4


async def test_a_key_that_this_process_did_not_land_sends_the_rows_through_staging(
    postgres_store: PostgresStore, account: str
) -> None:
    other = await PostgresSink.connect(postgres_store.postgres, clock=CLOCK)
    await other.land([], [make_landable(account, [(0, 0, 1.0)])])
    await other.close()
    landed = await postgres_store.sink.land(
        [], [make_landable(account, [(0, 0, 2.0), (0, 1, 2.0), (1, 0, 2.0)])]
    )
    assert (landed.copied, landed.staged_points) == (False, 3)
    assert values_of(await postgres_store.table(account)) == [2.0, 2.0, 2.0]


async def test_days_get_their_partitions_whenever_their_data_comes(
    postgres_store: PostgresStore, account: str
) -> None:
    minutes = [-1440 * 400, -1, 0, 1439, 1440]
    await postgres_store.sink.land([], [make_landable(account, [(0, m, float(m)) for m in minutes])])
    assert values_of(await postgres_store.table(account)) == [float(m) for m in minutes]
    tables = await postgres_store.connection.fetch(
        "SELECT DISTINCT p.tableoid::regclass::text AS day FROM samples AS p JOIN series AS s ON s.id = p.series"
        " WHERE s.account = $1 ORDER BY day",
        account,
    )
    assert [t[0] for t in tables] == [
        f"samples_{d}" for d in ("20251020", "20261123", "20261124", "20261125")
    ]


async def test_a_partition_that_was_dropped_comes_back(postgres_store: PostgresStore, account: str) -> None:
    await postgres_store.sink.land([], [make_landable(account, [(0, 1440 * 90, 1.0)])])
    await postgres_store.connection.execute("DROP TABLE samples_20270222")
    await postgres_store.sink.land([], [make_landable(account, [(1, 1440 * 90, 2.0)])])
    assert values_of(await postgres_store.table(account)) == [2.0]


async def test_partitions_are_created_by_several_at_once_and_beside_an_open_landing(
    postgres_store: PostgresStore,
) -> None:
    days = [MIDNIGHT_S // 86_400 + 40 + i for i in range(3)]
    creators = [await open_connection(postgres_store.postgres, "test") for _ in range(3)]
    try:
        async with postgres_store.connection.transaction():
            await postgres_store.connection.execute("LOCK TABLE samples IN ROW EXCLUSIVE MODE")
            async with asyncio.timeout(10):
                created = await asyncio.gather(*(create_partitions(c, days, set()) for c in creators))
        assert created == [set(days)] * 3
    finally:
        for c in creators:
            await c.close()


@pytest.mark.parametrize("day", [0, 20_781, 2_932_896, 2_932_897, 4_000_000, -3])
def test_a_partitions_name_says_its_day(day: int) -> None:
    assert day_of(name_of(day)) == day


@pytest.mark.parametrize("name", ["samples", "samples_hourly", "samples_2026112", "series_20261124"])
def test_another_tables_name_says_none(name: str) -> None:
    assert day_of(name) is None


async def days_there(store: PostgresStore) -> set[int]:
    rows = await store.connection.fetch(
        "SELECT relname FROM pg_class WHERE relname LIKE 'samples%' AND relkind = 'r'"
    )
    return {day for row in rows if (day := day_of(row["relname"])) is not None}


async def test_days_past_their_retention_are_dropped_whole_beside_an_open_landing(
    postgres_store: PostgresStore, account: str
) -> None:
    midnight = MIDNIGHT_S // 86_400
    await create_partitions(postgres_store.connection, [midnight - 400, midnight - 399, midnight], set())
    other = await open_connection(postgres_store.postgres, "test")
    try:
        async with asyncio.timeout(20):
            landing = other.transaction()
            await landing.start()
            await other.execute(f"SELECT FROM {name_of(midnight)} FOR UPDATE")
            dropping = asyncio.create_task(drop_partitions(postgres_store.connection, midnight - 398))
            await landing.commit()
            assert await dropping == [midnight - 400, midnight - 399]
    finally:
        await other.close()
    left = await days_there(postgres_store)
    assert midnight in left
    assert left.isdisjoint({midnight - 400, midnight - 399})
    await postgres_store.sink.land([], [make_landable(account, [(0, 0, 1.0)])])
    assert values_of(await postgres_store.table(account)) == [1.0]


async def test_a_day_in_use_is_left_for_the_next_call_and_one_left_detached_goes_with_it(
    postgres_store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "DETACH_WAIT_S", 0.2)
    day = MIDNIGHT_S // 86_400 - 500
    await create_partitions(postgres_store.connection, [day, day + 1], set())
    await postgres_store.connection.execute(f"ALTER TABLE samples DETACH PARTITION {name_of(day + 1)}")
    other = await open_connection(postgres_store.postgres, "test")
    try:
        async with asyncio.timeout(20):
            async with other.transaction():
                await other.execute(f"LOCK TABLE {name_of(day)} IN ROW EXCLUSIVE MODE")
                assert await drop_partitions(postgres_store.connection, day + 2) == []
            assert await drop_partitions(postgres_store.connection, day + 2) == [day, day + 1]
    finally:
        await other.close()


async def _at_the_second_try(sink: Sink, advances: list[Advance], batches: list[Landable]) -> None:
    """Land; once more where the loss of the connection only shows at the first try."""
    try:
        await sink.land(advances, batches)
    except Transient:
        await sink.land(advances, batches)


# --- failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["positions", "series", "samples", "landed"])
async def test_a_crash_between_any_two_statements_leaves_nothing(
    postgres_store: PostgresStore, account: str, topic: str, table: str
) -> None:
    """The backend dies at the statement that writes to `table`; the same landing then succeeds."""
    await postgres_store.sink.init_positions(topic, [0])
    await postgres_store.sink.claim(topic, [0])
    admin, one = postgres_store.connection, make_landable(account, [(0, 0, 1.0)], task_id=f"crash-{account}")
    await create_partitions(admin, [MIDNIGHT_S // 86_400], set())
    on = "samples_20261124" if table == "samples" else table
    await admin.execute(f"""
        CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$;
        CREATE TRIGGER die BEFORE INSERT OR UPDATE ON {on} FOR EACH ROW EXECUTE FUNCTION die();
    """)
    advance = Advance(topic, 0, 0, 1, b"v" * 16)
    try:
        with pytest.raises(Transient):
            await postgres_store.sink.land([advance], [one])
    finally:
        await admin.execute(f"DROP TRIGGER die ON {on}; DROP FUNCTION die()")
    assert await postgres_store.table(account) == {}
    assert await admin.fetchval("SELECT count(*) FROM series WHERE account = $1", account) == 0
    assert await postgres_store.landed(f"crash-{account}") == []
    assert (await postgres_store.sink.positions(topic, [0]))[0].next == 0
    await postgres_store.sink.land([advance], [one])
    assert values_of(await postgres_store.table(account)) == [1.0]


async def test_two_sinks_with_overlapping_keys_converge(postgres_store: PostgresStore, account: str) -> None:
    rng = np.random.default_rng(7)
    looks = [
        make_landable(
            account,
            [(int(s), int(m), float(v)) for s, m, v in rng.integers(0, 6, (20, 3))],
            observed_ms=OBSERVED_MS + 1000 * int(rng.integers(0, 3)),
        )
        for _ in range(16)
    ]
    fake = FakeSink()
    await fake.land([], looks)
    other = await PostgresSink.connect(postgres_store.postgres, clock=CLOCK, sink_name="other")

    async def land(sink: Sink, order: list[Landable]) -> None:
        for i in range(0, len(order), 2):
            await sink.land([], order[i : i + 2])

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(land(postgres_store.sink, looks))
        group.create_task(land(other, looks[::-1]))
    await other.close()
    assert await postgres_store.table(account) == fake.table


async def test_a_deadlock_is_tried_again(postgres_store: PostgresStore, account: str, topic: str) -> None:
    """Another transaction takes a later key and then waits for a position that the landing holds."""
    await postgres_store.sink.init_positions(topic, [0])
    await postgres_store.sink.land([], [make_landable(account, [(0, 0, 1.0)])])
    admin = postgres_store.connection
    await admin.execute(
        "SET deadlock_timeout = '5s'; SET lock_timeout = '8s'"
    )  # the landing is to be the victim
    async with asyncio.timeout(20):
        transaction = admin.transaction()
        await transaction.start()
        await admin.execute(
            "UPDATE samples SET value = 0 WHERE series IN (SELECT id FROM series WHERE account = $1)", account
        )
        landing = asyncio.ensure_future(
            postgres_store.sink.land(
                [Advance(topic, 0, 0, 1, b"v" * 16)],
                [make_landable(account, [(0, 0, 2.0)], observed_ms=OBSERVED_MS + 1)],
            )
        )
        await asyncio.sleep(0.2)
        await admin.execute("UPDATE positions SET backend_pid = 0 WHERE topic = $1", topic)
        await transaction.commit()
        await landing
    assert values_of(await postgres_store.table(account)) == [2.0]


async def test_a_new_owner_ends_what_a_stopped_one_left_open(
    postgres_store: PostgresStore, account: str, topic: str
) -> None:
    """The stopped one is in mid-COPY, where no timeout of the server's would free its keys."""
    await postgres_store.sink.init_positions(topic, [0])
    one = make_landable(account, [(0, m, 1.0) for m in range(1440)])  # COPY holds a thousand rows back
    await create_partitions(postgres_store.connection, [MIDNIGHT_S // 86_400], set())
    stopped = await PostgresSink.connect(postgres_store.postgres, clock=CLOCK)
    await stopped.claim(topic, [0])
    left, sent = stopped._connection, asyncio.Event()
    assert left is not None

    async def stalling() -> AsyncIterator[bytes]:
        yield bytes(copy_stream(rows_of([one.batch])))[:-2]
        sent.set()
        await asyncio.Event().wait()

    await left.execute("BEGIN")
    copying = asyncio.ensure_future(
        left.copy_to_table("samples", source=stalling(), columns=COLUMNS, format="binary")
    )
    await sent.wait()
    await asyncio.sleep(0.1)
    async with asyncio.timeout(5):
        await postgres_store.sink.claim(topic, [0])
        await postgres_store.sink.land([Advance(topic, 0, 0, 1, b"v" * 16)], [one])
    copying.cancel()
    await asyncio.wait({copying})
    with pytest.raises(Fatal, match="another consumer claimed"):
        await _at_the_second_try(stopped, [], [make_landable(account, [(0, 0, 2.0)])])
    assert set(values_of(await postgres_store.table(account))) == {1.0}
    await stopped.claim(topic, [0])  # after a rejoin it may own the partition again
    await stopped.close()


async def test_partitions_that_are_released_move_without_ending_anything(
    postgres_store: PostgresStore, topic: str
) -> None:
    first, admin = postgres_store.sink, postgres_store.connection
    second = await PostgresSink.connect(postgres_store.postgres, clock=CLOCK)
    await first.init_positions(topic, [0, 1])
    await first.claim(topic, [0, 1])
    backends = "SELECT backend_pid FROM positions WHERE topic = $1 ORDER BY partition"
    (before, _) = [r[0] for r in await admin.fetch(backends, topic)]
    await first.claim(topic, [])
    assert [r[0] for r in await admin.fetch(backends, topic)] == [None, None]
    await second.claim(topic, [1])
    await first.claim(topic, [0])
    assert (await admin.fetch(backends, topic))[0][0] == before
    await first.land([Advance(topic, 0, 0, 1, b"v" * 16)], [])
    await second.close()


async def test_a_living_owner_whose_partition_was_taken_claims_what_it_still_has(
    postgres_store: PostgresStore, topic: str
) -> None:
    first = postgres_store.sink
    second = await PostgresSink.connect(postgres_store.postgres, clock=CLOCK)
    await first.init_positions(topic, [0, 1])
    await first.claim(topic, [0, 1])
    await second.claim(topic, [1])  # before the first one is told of its revocation: this ends its connection
    await first.claim(topic, [0])
    await first.land([Advance(topic, 0, 0, 1, b"v" * 16)], [])
    await second.land([Advance(topic, 1, 0, 1, b"v" * 16)], [])
    await second.close()


async def test_a_lost_connection_is_rebuilt_and_the_claim_renewed(
    postgres_store: PostgresStore, topic: str
) -> None:
    sink, admin = postgres_store.sink, postgres_store.connection
    await sink.init_positions(topic, [0])
    await sink.claim(topic, [0])
    recorded = "SELECT backend_pid FROM positions WHERE topic = $1"
    before = await admin.fetchval(recorded, topic)
    await admin.execute("SELECT pg_terminate_backend($1, 5000)", before)
    await _at_the_second_try(sink, [Advance(topic, 0, 0, 1, b"v" * 16)], [])
    after = await admin.fetchval(recorded, topic)
    assert after != before
    assert await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", after) == 1


async def test_a_landing_that_takes_too_long_ends_its_connection_and_is_transient(
    store_dsn: str, postgres_store: PostgresStore, topic: str
) -> None:
    await postgres_store.sink.init_positions(topic, [0])
    sink = await PostgresSink.connect(Postgres(dsn=store_dsn), clock=CLOCK, timeout_s=0.3)
    async with postgres_store.connection.transaction():
        await postgres_store.connection.execute("SELECT FROM positions WHERE topic = $1 FOR UPDATE", topic)
        with pytest.raises(Transient, match="no answer within"):
            await sink.land([Advance(topic, 0, 0, 1, b"v" * 16)], [])
    await sink.land([Advance(topic, 0, 0, 1, b"v" * 16)], [])
    await sink.close()


async def test_a_cancelled_landing_leaves_nothing_and_the_sink_usable(
    postgres_store: PostgresStore, account: str, topic: str
) -> None:
    sink, admin = postgres_store.sink, postgres_store.connection
    await sink.init_positions(topic, [0])
    one, advance = make_landable(account, [(0, 0, 1.0)]), Advance(topic, 0, 0, 1, b"v" * 16)
    async with admin.transaction():
        await admin.execute("SELECT FROM positions WHERE topic = $1 FOR UPDATE", topic)
        landing = asyncio.ensure_future(sink.land([advance], [one]))
        await asyncio.sleep(0.2)
        landing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await landing
    assert await postgres_store.table(account) == {}
    await sink.land([advance], [one])
    assert values_of(await postgres_store.table(account)) == [1.0]


async def test_labels_with_nul_are_refused_by_series(postgres_store: PostgresStore, account: str) -> None:
    one = make_landable(account, [(0, 0, 1.0), (1, 0, 1.0)])
    good, bad = one.batch.series
    spoilt = replace(bad, key=replace(bad.key, dimensions=(("Id", "a\0b"),)))
    one = replace(one, batch=replace(one.batch, series=(good, spoilt)))
    with pytest.raises(SeriesRejected) as refused:
        await postgres_store.sink.land([], [one])
    assert refused.value.series == ((one.batch_id, 1),)


async def test_a_database_without_the_schema_is_fatal_and_says_what_to_do(database: str) -> None:
    sink = await PostgresSink.connect(Postgres(dsn=database), clock=CLOCK)
    with pytest.raises(Fatal, match="run the migrations"):
        await sink.positions("raw", [0])
    await sink.close()


async def test_a_server_that_does_not_answer_is_transient() -> None:
    with pytest.raises(Transient):
        await PostgresSink.connect(Postgres(dsn="postgresql://headgate@127.0.0.1:1/headgate"), clock=CLOCK)
