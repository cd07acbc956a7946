"""Dead letters: put aside by series and point, found once, landed after all; and a bad deploy stops before it buries."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import asyncpg
import numpy as np
import orjson
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import avro, letters, wire
from ingest.archive import open_archive
from ingest.aside import SHARE_RECORDS, SHARE_RECORDS_MIN
from ingest.balance import put_aside
from ingest.clock import ManualClock
from ingest.errors import Fatal
from ingest.landing import Landing
from ingest.letters import KEY_BYTES_MAX, PAYLOAD_BYTES_MAX
from ingest.log import Outgoing, Producer
from ingest.model import Batch, DeadLetter, Series, SeriesKey, Target, series_ids
from ingest.ports import Sink
from ingest.revive import plan
from ingest.sinks.connection import open_connection
from ingest.validate import DEAD_POINTS_MAX, series_problem
from ingest.wire import raw_key
from shard_config.load import loads
from shard_config.model import Config, Limits
from tests.conftest import eventually
from tests.fake_log import FakeBroker, FakeSender
from tests.test_landing import FakeSink
from tests.test_wire import LETTER, SAMPLE, changed_with_text
from workers.cli import main
from workers.consumer import serve
from workers.lifecycle import Lifecycle
from workers.setup import setup

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
KEY = raw_key(TARGET)
NOON_S = 1_767_268_800
NAN = float("nan")
NETZWERK = 5
"""The text of SAMPLE's table that only its last series uses."""


def series_of(metric: str, *dimensions: tuple[str, str], unit: str = "") -> Series:
    key = SeriesKey(TARGET.account, TARGET.region, "AWS/EC2", metric, dimensions, "Average", 60)
    return Series(key, unit)


def batch_of(*points_of_series: Sequence[float], series: Sequence[Series] = (), at_s: int = NOON_S) -> Batch:
    """A series for each argument, with a point a minute from five minutes before `at_s` on."""
    all_series = tuple(series) or tuple(series_of(f"m{i}") for i in range(len(points_of_series)))
    return Batch(
        task_id="0" * 32,
        target=TARGET,
        service="ec2",
        observed_at_ms=at_s * 1000,
        revision=3,
        grid_s=300,
        series=all_series,
        counts=np.array([len(p) for p in points_of_series], np.int32),
        timestamps_s=np.concatenate(
            [np.arange(len(p), dtype=np.int64) * 60 + at_s - 300 for p in points_of_series]
        ),
        values=np.concatenate([np.array(p, np.float64) for p in points_of_series]),
        ids=series_ids(all_series),
    )


def value_of(*points_of_series: Sequence[float], at_s: int = NOON_S) -> bytes:
    (payload,) = wire.encode_batch(batch_of(*points_of_series, at_s=at_s))
    return payload.value


class World:
    """A landing between a log and a sink, whose configuration knows one target."""

    def __init__(self, limits: Limits | None = None, of: World | None = None) -> None:
        """With `of`, another process on the log and the sink of that world."""
        self.broker: FakeBroker = of.broker if of else FakeBroker(raw=1, dead=1)
        self.sink: FakeSink = of.sink if of else FakeSink()
        as_port: Sink = self.sink
        self.landing = Landing(
            "raw",
            "dead",
            as_port,
            FakeSender(self.broker),
            limits or Limits(),
            ManualClock(NOON_S),
            targets={str(TARGET)},
        )

    def write(self, *values: bytes, key: bytes = KEY) -> None:
        for value in values:
            self.broker.append("raw", Outgoing(key, value, 0))

    async def run(self, records_a_landing: int = 10) -> None:
        """Open, and land what there is."""
        starts = await self.landing.open([0], {0: self.broker.bounds("raw", 0)}, cluster="c1")
        records = self.broker.records("raw", 0)[starts[0] :]
        for at in range(0, len(records), records_a_landing):
            await self.landing.land(records[at : at + records_a_landing])

    def dead(self) -> list[DeadLetter]:
        return [wire.decode_dead_letter(r.value) for r in self.broker.records("dead")]

    @property
    def position(self) -> int:
        return self.sink.stored[0].next


async def letters_of(*values: bytes, key: bytes = KEY, limits: Limits | None = None) -> list[DeadLetter]:
    """The letters that landing these records writes."""
    world = World(limits)
    world.write(*values, key=key)
    await world.run()
    return world.dead()


# --- by series and point --------------------------------------------------------------------------------------


async def test_a_series_with_a_bad_label_takes_no_other_series_of_its_batch_with_it() -> None:
    world = World()
    value = changed_with_text(NETZWERK, b"Netz\n\0werk")
    world.write(value)

    await world.run()

    ((landable,),) = world.sink.landings
    assert landable.batch.series == SAMPLE.series[:2]
    assert landable.batch.values.tolist() == [1.25, 0.0, 99.99]
    assert landable.batch_id == wire.batch_id_of(value)
    (letter,) = world.dead()
    assert (letter.reason, letter.cluster, letter.key) == ("control_character", "c1", KEY)
    assert letter.series.startswith("123456789012/eu-west-1 AWS/EC2/Netz\\u000a\\u0000werk{")
    assert orjson.loads(letter.payload)["points"] == [
        [int(t), repr(float(v))] for t, v in zip(SAMPLE.timestamps_s[3:], SAMPLE.values[3:], strict=True)
    ]
    assert letters.points_of(letter).series.key.metric == "Netz\n\0werk"


async def test_what_a_bad_series_takes_out_is_said_by_window() -> None:
    world = World()
    world.write(changed_with_text(NETZWERK, b"a\nb"))

    await world.run()

    ((landable,),) = world.sink.landings
    whole = wire.decode_by_series(changed_with_text(NETZWERK, b"a\nb"), Limits()).batch
    assert (landable.dead_points, landable.dead_windows) == (2, put_aside(whole, landable.batch))
    assert [w.points for w in landable.dead_windows] == [1]  # of a timestamp that stands twice one counts


async def test_a_batch_of_bad_series_only_lands_empty_so_that_its_look_can_close() -> None:
    series = [series_of(metric, ("a", "1"), ("b", "2")) for metric in ("x", "y")]
    (payload,) = wire.encode_batch(batch_of([1.0], [2.0], series=series))
    world = World(Limits(dimensions_max=1))
    world.write(payload.value)

    await world.run()

    ((landable,),) = world.sink.landings
    assert (landable.batch_id, landable.batch.points, landable.dead_points) == (payload.batch_id, 0, 2)
    assert [letter.reason for letter in world.dead()] == ["too_many_dimensions"] * 2


label = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=60)


@given(
    st.lists(
        st.builds(
            lambda metric, dims: series_of(metric, *sorted(dims.items())),
            label,
            st.dictionaries(label, label, max_size=4),
        ),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
@settings(max_examples=100, deadline=None)
def test_exactly_the_series_that_break_a_limit_are_named(series: list[Series]) -> None:
    tight = Limits(label_bytes_max=40, dimensions_max=2)
    (payload,) = wire.encode_batch(batch_of(*([1.0] for _ in series), series=series))

    decoded = wire.decode_by_series(payload.value, tight)

    assert decoded.batch.series == tuple(series)
    wrong = {i: problem for i, one in enumerate(series) if (problem := series_problem(one, tight))}
    assert decoded.bad.keys() == wrong.keys()


async def test_a_label_of_any_size_fits_a_letter_that_is_shown_and_not_replayed() -> None:
    (letter,) = await letters_of(changed_with_text(NETZWERK, b"x" * 3_000_000))
    assert letter.reason == "label_too_long"
    assert len(wire.encode_dead_letter(letter)) < 1_000_000
    (why,) = plan([letter], Limits(), NOON_S).refused.values()
    assert "too long to keep" in why


# --- what a letter is -----------------------------------------------------------------------------------------


async def test_a_second_writing_is_the_same_letter_wherever_the_record_stands() -> None:
    value = value_of([1.0, NAN])
    first, second = await letters_of(value, value)
    assert first.origin != second.origin
    assert first.identity == second.identity
    assert replace(first, cluster="mirror").identity == first.identity


async def test_letters_of_points_and_of_records_name_their_account() -> None:
    found = await letters_of(value_of([NAN]), b"rubbish")
    assert [letters.account_of(one) for one in found] == [TARGET.account] * 2
    (foreign,) = await letters_of(b"rubbish", key=b"x" * 9999)
    assert (letters.account_of(foreign), len(foreign.key)) == ("", KEY_BYTES_MAX)


def test_a_letter_of_version_1_is_read_shown_and_refused() -> None:
    assert letters.account_of(LETTER) == ""
    assert (
        letters.account_of(replace(LETTER, series="123456789012/eu-west-1 AWS/EC2/m{} Sum 60s"))
        == TARGET.account
    )
    (why,) = plan([LETTER], Limits(), NOON_S).refused.values()
    assert "version 1" in why


@given(st.binary(max_size=60), st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_a_foreign_letter_is_refused_and_nothing_else(context: bytes, payload: bytes) -> None:
    letter = replace(LETTER, cluster="c", context=context, payload=payload)
    assert plan([letter], Limits(), NOON_S).refused.keys() == {letter.identity}


# --- what becomes of them again -------------------------------------------------------------------------------


async def test_a_point_that_is_still_bad_is_not_sent_to_die_again() -> None:
    (letter,) = await letters_of(value_of([1.0, NAN]))
    planned = plan([letter], Limits(), NOON_S)
    assert (planned.revivals, list(planned.refused)) == ((), [letter.identity])


async def test_an_edited_point_becomes_a_batch_of_its_own_with_the_version_of_its_look() -> None:
    original = batch_of([1.0, NAN], series=[series_of("m", ("InstanceId", "i-1"), unit="Percent")])
    (letter,) = await letters_of(wire.encode_batch(original)[0].value)

    (revival,) = plan([letter], Limits(), NOON_S, {"value": 7.5}).revivals

    batch = revival.batch
    assert (batch.version, batch.series, batch.values.tolist()) == (original.version, original.series, [7.5])
    assert batch.timestamps_s.tolist() == [NOON_S - 240]
    assert revival.task is not None
    assert batch.task_id == revival.task.task_id
    assert [w.start_s for w in revival.task.items[0].windows()] == [NOON_S - 300]


async def test_a_timestamp_and_labels_can_be_edited_too() -> None:
    (future,) = await letters_of(value_of([1.0], at_s=NOON_S + 10_000))
    (revival,) = plan([future], Limits(), NOON_S, {"timestamp_s": NOON_S}).revivals
    assert revival.batch.timestamps_s.tolist() == [NOON_S]

    (bad,) = await letters_of(changed_with_text(NETZWERK, b"a\nb"))
    assert plan([bad], Limits(), NOON_S).revivals == ()
    kept = replace(bad, payload=orjson.dumps({"points": [[NOON_S, "1.5"], [NOON_S + 60, "2.5"]]}))
    (revival,) = plan([kept], Limits(), NOON_S, {"labels": {"metric": "ab"}}).revivals
    assert [one.key.metric for one in revival.batch.series] == ["ab"]
    assert revival.batch.values.tolist() == [1.5, 2.5]


@pytest.mark.parametrize(
    "edit",
    [
        {},
        {"valeu": 1},
        {"value": True},
        {"value": "seven"},
        {"timestamp_s": 1.5},
        {"labels": {"colour": "red"}},
        {"labels": {"metric": 7}},
        {"labels": {"dimensions": [["a"]]}},
        {"labels": []},
    ],
)
async def test_an_edit_that_is_half_understood_is_none(edit: dict[str, object]) -> None:
    (letter,) = await letters_of(value_of([NAN]))
    assert plan([letter], Limits(), NOON_S, edit).refused.keys() == {letter.identity}


async def test_points_that_time_has_made_good_need_no_edit() -> None:
    found = await letters_of(value_of([1.0, 2.0], at_s=NOON_S + 10_000))
    (revival,) = plan(found, Limits(), NOON_S + 20_000).revivals
    assert (revival.batch.values.tolist(), len(revival.identities)) == ([1.0, 2.0], 2)


async def test_the_same_letters_are_the_same_task_in_any_order_and_another_edit_is_another() -> None:
    found = await letters_of(value_of([1.0, 2.0], [3.0], at_s=NOON_S + 10_000))
    tasks = [plan(some, Limits(), NOON_S + 20_000).revivals[0].task for some in (found, found[::-1])]
    assert tasks[0] == tasks[1]
    (letter,) = await letters_of(value_of([NAN]))
    ids = {plan([letter], Limits(), NOON_S, {"value": v}).revivals[0].batch.task_id for v in (1, 2)}
    assert len(ids) == 2


async def test_a_record_that_decodes_by_now_is_published_byte_for_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value = value_of([1.0, 2.0])
    (batch_schema,) = (s for s in avro.SCHEMAS if s.name == "batch")
    with monkeypatch.context() as older:
        older.delitem(avro._BY_FINGERPRINT, batch_schema.fingerprint)
        (letter,) = await letters_of(value)
        assert letter.reason == "unknown_schema"
        assert plan([letter], Limits(), NOON_S).revivals == ()

    (revival,) = plan([letter], Limits(), NOON_S).revivals

    assert (revival.value, revival.task, revival.batch.points) == (value, None, 2)


async def test_what_was_cut_off_or_only_counted_is_refused() -> None:
    found = await letters_of(
        b"x" * (PAYLOAD_BYTES_MAX + 1), value_of([NAN] * (DEAD_POINTS_MAX + 5), at_s=NOON_S - 90_000)
    )
    reasons = {letter.reason for letter in found}
    assert reasons == {"payload_too_large", "not_a_number", "more"}
    planned = plan(found, Limits(), NOON_S)
    assert (planned.revivals, len(planned.refused)) == ((), DEAD_POINTS_MAX + 2)


# --- the limit on the share -----------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process cannot read batches (any more)."""
    (schema,) = (s for s in avro.SCHEMAS if s.name == "batch")
    monkeypatch.delitem(avro._BY_FINGERPRINT, schema.fingerprint)


def values(n: int, start: int = 0) -> list[bytes]:
    return [value_of([float(i)]) for i in range(start, start + n)]


async def test_a_deploy_that_can_read_nothing_buries_nothing_and_after_the_rollback_all_lands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = World()
    before.write(*values(60))
    await before.run()
    before.write(*values(5, start=60))
    deployed = World(of=before)
    with monkeypatch.context() as deploy:
        broken(deploy)
        with pytest.raises(
            Fatal, match=r"65 of the last 6\d|of the last .* would be dead letters.*unknown_schema"
        ):
            await deployed.run()
    assert (before.dead(), before.position) == ([], 60)

    await World(of=before).run()

    assert (before.dead(), before.position) == ([], 65)
    assert before.sink.values() == [float(i) for i in range(65)]


async def test_writers_that_went_bad_stop_a_consumer_before_it_has_buried_much() -> None:
    world = World()
    world.write(*values(SHARE_RECORDS), *[b"not what it was %d" % i for i in range(1000)])
    with pytest.raises(Fatal, match="roll it back"):
        await world.run()
    assert len(world.dead()) <= SHARE_RECORDS // 2
    # Whoever starts it again does not bury the rest in small pieces.
    buried = len(world.dead())
    for _ in range(3):
        with pytest.raises(Fatal, match="would be dead letters"):
            await World(of=world).run(records_a_landing=1)
    assert len(world.dead()) == buried


async def test_points_that_all_die_count_as_well() -> None:
    world = World()
    world.write(
        *[value_of([NAN, float(i) * 0 + NAN], at_s=NOON_S - 300 * i) for i in range(SHARE_RECORDS_MIN)]
    )
    with pytest.raises(Fatal, match="not_a_number"):
        await world.run(records_a_landing=SHARE_RECORDS_MIN)
    assert world.position == 0


@pytest.mark.parametrize("key", [b"", b"k", b"cloudwatch/999999999999/eu-west-1/0", b"\xff" * 20])
async def test_rubbish_that_is_of_no_target_of_ours_never_stops_anybody(key: bytes) -> None:
    world = World()
    world.write(*[b"rubbish %d" % i for i in range(3 * SHARE_RECORDS)], key=key)
    await world.run(records_a_landing=128)
    assert (len(world.dead()), world.position) == (3 * SHARE_RECORDS, 3 * SHARE_RECORDS)


async def test_a_few_bad_records_on_an_idle_topic_stop_nobody() -> None:
    world = World()
    world.write(*[b"rubbish %d" % i for i in range(SHARE_RECORDS_MIN - 1)])
    await world.run()
    assert world.position == SHARE_RECORDS_MIN - 1


async def test_half_of_the_records_may_be_bad_and_no_more() -> None:
    world = World()
    for i in range(100):
        world.write(value_of([float(i)]), b"bad %d" % i)
    await world.run()
    assert (len(world.dead()), world.position) == (100, 200)
    world.write(b"one more", b"and another")
    with pytest.raises(Fatal):
        await World(of=world).run(records_a_landing=1)
    assert world.position <= 201


async def test_with_a_share_of_1_all_are_put_aside() -> None:
    world = World(Limits(dead_share_max=1))
    world.write(*[b"bad %d" % i for i in range(300)])
    await world.run()
    assert len(world.dead()) == 300


async def test_a_landing_that_is_tried_again_is_not_counted_twice() -> None:
    world = World()
    world.write(*values(60), *[b"bad %d" % i for i in range(20)])
    starts = await world.landing.open([0], {0: world.broker.bounds("raw", 0)})
    records = world.broker.records("raw", 0)[starts[0] :]
    await world.landing.land(records[:60])
    for _ in range(20):
        world.sink.failures = [Fatal("sink", "away")]
        with pytest.raises(Fatal, match="away"):
            await world.landing.land(records[60:])
    await world.landing.land(records[60:])
    assert world.position == 80


# --- on the real servers, from the command line -----------------------------------------------------------------

CONFIG = """
accounts:
  - id: "123456789012"
    regions: [eu-west-1]
    services: [ec2]
kafka: {{bootstrap: "{kafka}", prefix: {prefix}, raw_partitions: 1, ledger_partitions: 1}}
postgres: {{dsn: "{dsn}"}}
s3: {{bucket: {bucket}, endpoint_url: "{s3}"}}
slots: 1
run: {{clock_offset_s: {offset_s}}}
"""


@asynccontextmanager
async def consuming(config: Config) -> AsyncIterator[None]:
    lifecycle = Lifecycle()
    running = asyncio.create_task(serve(config, "consumer-1", lifecycle))
    try:
        yield
    finally:
        lifecycle.stop.set()
        async with asyncio.timeout(20):
            await running


@pytest.fixture
def quiet_stdout() -> Iterator[None]:
    """Logs of what runs in this process beside the command go elsewhere than the command's output."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("quiet_stdout")
async def test_letters_are_listed_shown_replayed_and_discarded_on_the_real_servers(
    kafka_bootstrap: str,
    database: str,
    s3_endpoint: str,
    bucket: str,
    topic_prefix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It is the process's, and would keep this test's stderr beyond its end.
    monkeypatch.setattr("workers.dead.configure_logs", lambda _: None)
    path = tmp_path / "headgate.yaml"
    path.write_text(
        CONFIG.format(
            kafka=kafka_bootstrap,
            prefix=topic_prefix,
            dsn=database,
            bucket=bucket,
            s3=s3_endpoint,
            offset_s=NOON_S - int(time.time()),
        )
    )
    config = loads(path.read_text(), str(path), environ={})
    await setup(config)
    producer = Producer(kafka_bootstrap, "test")
    topic = config.kafka.topic("raw")

    async def headgate(*args: str, expect: int = 0) -> str:
        capsys.readouterr()
        code = await asyncio.to_thread(main, ["dead", *args, "--config", str(path)])
        said = capsys.readouterr()
        assert code == expect, said.err + said.out
        return said.out

    async def listed(*args: str) -> list[dict[str, object]]:
        newest: list[dict[str, object]] = json.loads(await headgate("list", "--format", "json", *args))[
            "newest"
        ]
        return newest

    # A record that nobody reads, twice; one of a newer Headgate; and one with a point that no store should hold.
    from_the_future = value_of([4.0])
    (schema,) = (s for s in avro.SCHEMAS if s.name == "batch")
    try:
        del avro._BY_FINGERPRINT[schema.fingerprint]
        async with consuming(config):
            await producer.send(topic, [Outgoing(KEY, b"rubbish"), Outgoing(KEY, b"rubbish")])
            await producer.send(topic, [Outgoing(KEY, from_the_future)])

            async def buried() -> bool:
                return len(await listed()) == 2

            await eventually(buried, 30)
    finally:
        avro._BY_FINGERPRINT[schema.fingerprint] = schema

    sql = await open_connection(config.postgres, "test")
    try:
        async with consuming(config):
            await producer.send(topic, [Outgoing(KEY, value_of([1.0, NAN]))])

            async def all_there() -> bool:
                return len(await listed()) == 3

            await eventually(all_there, 30)
            by_reason = {str(one["reason"]): one for one in await listed("--account", TARGET.account)}
            assert {r: one["times_written"] for r, one in by_reason.items()} == {
                "bad_frame": 2,
                "unknown_schema": 1,
                "not_a_number": 1,
            }
            assert {len(str(one["cluster"])) for one in by_reason.values()} == {22}
            assert await listed("--account", "999999999999") == []
            assert await listed("--since", "2999-01-01") == []
            nan = str(by_reason["not_a_number"]["identity"])
            rubbish = str(by_reason["bad_frame"]["identity"])

            shown = json.loads(await headgate("show", rubbish[:8]))
            assert (shown["payload"], shown["today"]["decodes"]) == ({"bytes": 7, "text": "rubbish"}, False)
            shown = json.loads(await headgate("show", nan))
            assert (shown["today"]["points"], shown["today"]["look"]["revision"]) == (
                [[NOON_S - 240, "nan"]],
                3,
            )

            # What decodes by now goes the way of living data; what does not is refused and stays.
            assert "to replay: 1 records" in await headgate(
                "replay", "--reason", "unknown_schema", "--dry-run"
            )
            assert (await headgate("replay", "--reason", "unknown_schema")).endswith("landed\n")
            assert "refused" in await headgate("replay", rubbish, expect=1)
            assert {one["reason"] for one in await listed()} == {"bad_frame", "not_a_number"}

            # A point of a window that is open waits; then it lands, corrected, with its look's version.
            edit = tmp_path / "edit.json"
            edit.write_text('{"value": 2.5}')
            await sql.execute(OPEN_WINDOW)
            assert "still open" in await headgate("replay", nan, "--edit", str(edit), expect=1)
            await sql.execute("UPDATE windows SET sealed_at = now()")
            assert (await headgate("replay", nan, "--edit", str(edit))).endswith("landed\n")
            await assert_landed_everywhere(sql, config)

            # Again is the same again; and what nobody needs is out of the way, not out of Kafka.
            assert (await headgate("replay", nan, "--edit", str(edit))).endswith("landed\n")
            assert "discarded 1" in await headgate("discard", rubbish, "--yes", "--note", "a test")
            assert await listed() == []
            handled = {str(one["reason"]): one["handled"] for one in await listed("--all")}
            assert {r: h["what"] for r, h in handled.items() if isinstance(h, dict)} == {
                "bad_frame": "discarded",
                "unknown_schema": "replayed",
                "not_a_number": "replayed",
            }
            assert "no dead letters" in await headgate("list")
    finally:
        sql.terminate()
        await producer.close()


OPEN_WINDOW = f"""INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at)
SELECT '{TARGET}', 'ec2', to_timestamp({NOON_S - 300}), to_timestamp({NOON_S}), to_timestamp({NOON_S + 600}), now()"""


async def assert_landed_everywhere(sql: asyncpg.Connection, config: Config) -> None:
    """The corrected point is in the store with its look's version, and in the archive and the ledger as a task of its own."""
    row = await sql.fetchrow("SELECT version FROM samples WHERE value = 2.5")
    assert row["version"] == batch_of([1.0]).version

    async def receipt() -> bool:
        return bool(await sql.fetchval("SELECT count(*) FROM looks WHERE shard = 'dead-letters'"))

    await eventually(receipt, 30)
    look = await sql.fetchrow("SELECT status, points, archive_key, batch_ids FROM looks")
    assert (look["status"], look["points"]) == ("partial", 1)
    async with open_archive(config.s3, ManualClock(NOON_S)) as archive:
        archived = await archive.get(look["archive_key"])
    assert archived is not None
    assert [p.batch_id for p in archived.payloads] == look["batch_ids"]
