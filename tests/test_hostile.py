"""What stands on a topic and is not ours: every reader survives it, within its memory, and it is found among the dead letters once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cramjam
import pytest
from aiokafka import TopicPartition, codec
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from ingest import avro, inflate, letters, projection, wire
from ingest.aside import SHARE_RECORDS_MIN
from ingest.assign import (
    Assignment,
    Incarnation,
    decode_assignment,
    decode_incarnation,
    encode_assignment,
    encode_incarnation,
)
from ingest.clock import ManualClock
from ingest.errors import Fatal, Rejected
from ingest.inflate import INFLATED_BYTES_MAX
from ingest.log import VALUE_BYTES_MAX, Outgoing
from ingest.model import (
    DeadLetter,
    LookStatus,
    Receipt,
    ReceiptItem,
    RecordPosition,
    Task,
    TaskItem,
    WindowCount,
)
from ingest.ports import Record
from ingest.projection import Projection
from shard_config.model import Kafka, Limits
from tests.fake_log import FakeBroker, FakeSender
from tests.faults import kinds_log
from tests.test_exporter import Cluster, becomes, targets
from tests.test_ledger import (  # noqa: F401  # fixtures
    NOON_S,
    TARGET,
    TOPIC,
    Store,
    ledger_database,
    receipt_of,
    store,
    task_of,
)
from workers.shards import KEY, Board

CODECS = {
    "gzip": DefaultRecordBatch.CODEC_GZIP,
    "snappy": DefaultRecordBatch.CODEC_SNAPPY,
    "lz4": DefaultRecordBatch.CODEC_LZ4,
    "zstd": DefaultRecordBatch.CODEC_ZSTD,
}


def batch_of(values: list[bytes], compression: int, at: int = 0) -> bytes:
    """A batch of records as a broker hands it out, the first record at an offset."""
    builder = DefaultRecordBatchBuilder(2, compression, 0, -1, -1, -1, 1 << 30)
    for i, value in enumerate(values):
        builder.append(i, 1_000 + i, b"key", value, [])
    return at.to_bytes(8, "big") + bytes(builder.build())[8:]


def read(data: bytes) -> list[tuple[int, bytes]]:
    """(offset, value) of all records, as a consumer of this process reads them."""
    inflate.bound()
    records = fetcher.MemoryRecords(data)
    found = []
    while records.has_next():
        batch = records.next_batch()
        assert batch.validate_crc()
        found += [(record.offset, record.value) for record in batch]
    return found


@pytest.mark.parametrize("name", CODECS)
def test_a_batch_that_kafka_compressed_is_read_as_ever(name: str) -> None:
    values = [b"one", b"", b"x" * 100_000]
    data = batch_of([b"plain"], 0) + batch_of(values, CODECS[name], at=1) + batch_of([b"last"], 0, at=4)

    assert read(data) == [(0, b"plain"), *enumerate(values, start=1), (4, b"last")]


@pytest.mark.parametrize("name", CODECS)
def test_a_batch_that_inflates_past_the_bound_is_one_bad_record_and_reading_goes_on_behind_it(
    name: str,
) -> None:
    bomb = batch_of([bytes(1 << 20)] * (2 + INFLATED_BYTES_MAX // (1 << 20)), CODECS[name], at=7)
    data = bomb + batch_of([b"good"], 0, at=13)

    assert read(data) == [(12, bomb), (13, b"good")]


def test_a_batch_that_is_no_compressed_data_at_all_is_one_bad_record() -> None:
    raw = bytearray(batch_of([b"a" * 1000, b"b" * 1000], CODECS["zstd"]))
    raw[-20:] = bytes(20)
    broken = bytes(raw)

    found = [(r.offset, r.value) for r in fetcher.MemoryRecords(broken).next_batch()]

    assert found == [(1, broken)]


def test_javas_stream_of_snappy_blocks_is_bounded_as_a_whole() -> None:
    small = codec.snappy_encode(b"abc" * 1000)
    large = codec.snappy_encode(bytes(2 * INFLATED_BYTES_MAX))
    cut = small[:-5]

    assert inflate._snappy(small) == b"abc" * 1000
    for hostile in (large, cut, small + b"\0\0", cramjam.snappy.compress_raw(bytes(2 * INFLATED_BYTES_MAX))):
        with pytest.raises(inflate._TooLargeError):
            inflate._snappy(hostile)


# --- ledger -----------------------------------------------------------------------------------------------------


class Projecting:
    """The projection of a real ledger, fed from a log in memory."""

    def __init__(self, store: Store) -> None:  # noqa: F811
        self.store = store
        self.broker = FakeBroker(**{TOPIC: 1, "dead": 1})
        self.projection = self.fresh()

    def fresh(self) -> Projection:
        """As a process that was started again has it."""
        sender, clock = FakeSender(self.broker), ManualClock(NOON_S)
        return Projection(TOPIC, "dead", self.store.ledger, sender, 0.5, clock, targets={str(TARGET)})

    def write(self, *values: bytes, key: bytes = b"k") -> None:
        for value in values:
            self.broker.append(TOPIC, Outgoing(key, value, 0))

    async def run(self) -> None:
        """Project what is new, as a reader would."""
        [start] = (await self.projection.open([0], {0: self.broker.bounds(TOPIC, 0)}, cluster="c")).values()
        await self.projection.take(self.broker.records(TOPIC)[start:])

    def dead(self) -> list[DeadLetter]:
        return [wire.decode_dead_letter(r.value) for r in self.broker.records("dead")]

    async def position(self) -> int:
        return (await self.store.ledger.positions(TOPIC, [0]))[0].next


def encoded(fact: Task | Receipt) -> bytes:
    return wire.encode_task(fact) if isinstance(fact, Task) else wire.encode_receipt(fact)


async def test_rubbish_on_ledger_is_put_aside_once_and_what_is_around_it_is_projected(
    store: Store,  # noqa: F811
) -> None:
    it = Projecting(store)
    rubbish = [b"", b"rubbish", avro.MAGIC + bytes(8), wire.encode_dead_letter(a_letter()), b"\xc3" * 900_000]
    it.write(encoded(task_of(NOON_S - 300, NOON_S)), *rubbish, encoded(task_of(NOON_S, NOON_S + 300)))

    await it.run()
    await it.run()

    assert await store.states() == {-300: "planned", 0: "planned"}
    assert await it.position() == 7
    found = it.dead()
    assert [letter.origin for letter in found] == [RecordPosition(TOPIC, 0, i) for i in range(1, 6)]
    assert [letter.payload for letter in found] == [r[:700_000] for r in rubbish]
    assert [letter.reason for letter in found] == [
        "bad_magic",
        "bad_magic",
        "unknown_schema",
        "wrong_record",
        "bad_magic",
    ]
    assert len({letter.identity for letter in found}) == 5


def a_letter() -> DeadLetter:
    record = Record(RecordPosition("t", 0, 0), b"k", b"v", 0)
    return letters.of_record(record, "c", Rejected("here", "bad_magic", "it is"))


def hostile_facts(rng: random.Random) -> dict[str, Task | Receipt]:
    """What decodes, and no table can hold, or only at a price."""
    task = task_of(NOON_S - 300, NOON_S)
    receipt = receipt_of(task, counts=[(NOON_S - 300, 1, 1)])
    [done] = receipt.items
    outcome, far = done.outcome, rng.choice([2**62, -(2**62), 2**53])
    items = {
        "before Christ": TaskItem("ec2", -62_200_000_000, -62_200_000_000 + 300, 300),
        "a service with a long name": TaskItem("x" * 100_000, NOON_S - 300, NOON_S, 300),
    }

    def of(**change: Any) -> Receipt:
        return replace(receipt, items=(replace(done, outcome=replace(outcome, **change)),))

    def windows(*some: WindowCount) -> Receipt:
        return replace(receipt, items=(replace(done, windows=some),))

    return {
        **{f"a task {name}": replace(task, items=(item,)) for name, item in items.items()},
        **{
            f"a receipt {name}": replace(receipt, items=(replace(done, item=item),))
            for name, item in items.items()
        },
        "many items that are too many windows together": replace(
            task, items=(TaskItem("ec2", 0, 40_000 * 300, 300),) * 3
        ),
        "expires after all days": replace(task, expires_s=2**62),
        "a configuration with a long revision": replace(task, config_revision="r" * 900_000),
        "finished after all days": replace(receipt, finished_at_ms=2**62),
        "started before all days": replace(receipt, started_at_ms=-(2**62)),
        "seen after all days": of(observed_at_ms=2**62),
        "series without end": of(series=far),
        "billed without end": of(metrics_billed=far),
        "in doubt without end": of(metrics_in_doubt=far),
        "looked from before all days": of(looked_from_s=-far if far > 0 else far),
        "requests without end": of(requests={"GetMetricData": far}),
        "requests of many kinds": of(requests={str(i): 1 for i in range(10_000)}),
        "points without end": replace(receipt, items=(replace(done, points=far),)),
        "a window of no time": windows(WindowCount(far, far, 1, 1)),
        "a window of no points": windows(WindowCount(NOON_S, NOON_S + 300, -far if far > 0 else far, 1)),
        "a shard with a long name": replace(receipt, shard="s" * 900_000),
        "an archive key that is long": replace(receipt, archive_key="k" * 900_000),
    }


async def test_what_decodes_and_no_table_can_hold_is_put_aside(store: Store) -> None:  # noqa: F811
    it = Projecting(store)
    facts = hostile_facts(random.Random(1))
    it.write(*map(encoded, facts.values()), encoded(task_of(NOON_S, NOON_S + 300)))

    await it.run()

    assert [letter.origin.offset for letter in it.dead()] == list(range(len(facts)))
    assert {letter.reason for letter in it.dead()} == {"out_of_range"}
    assert await store.states() == {0: "planned"}


async def test_random_receipts_are_projected_or_put_aside_and_nothing_else(store: Store) -> None:  # noqa: F811
    rng = random.Random(5)
    it = Projecting(store)
    edges = [
        0,
        1,
        -1,
        300,
        2**31 - 1,
        2**31,
        253_402_300_799,
        253_402_300_800,
        253_402_300_799_000,
        2**53,
        2**62,
        -(2**62),
        NOON_S,
        NOON_S * 1000,
    ]
    task = task_of(NOON_S - 600, NOON_S)
    receipt = receipt_of(task)
    [done] = receipt.items

    def some() -> int:
        """Mostly what might be, of which the dozen numbers of a receipt are seldom all."""
        return rng.choice(edges) if rng.random() < 0.15 else rng.choice(edges[:2])

    for _ in range(150):
        counts = tuple(
            WindowCount(some(), some(), some(), rng.getrandbits(64)) for _ in range(rng.randrange(3))
        )
        often: dict[str, Any] = {
            "observed_at_ms": some(),
            "series": some(),
            "metrics_billed": some(),
            "looked_from_s": some(),
        }
        changes = {k: v for k, v in often.items() if rng.random() < 0.4}
        status = rng.choice(list(LookStatus))
        outcome = replace(done.outcome, status=status, requests={"ListMetrics": some()}, **changes)
        start_s = rng.choice([NOON_S - 600, 0, some() // 300 * 300])
        item = TaskItem("ec2", start_s, start_s + 300 * rng.choice([1, 2, 500]), 300)
        one = ReceiptItem(item, outcome, some(), counts, (), whole=counts[:1])
        times: dict[str, Any] = (
            {"started_at_ms": some(), "finished_at_ms": some()} if rng.random() < 0.5 else {}
        )
        try:
            it.write(wire.encode_receipt(replace(receipt, items=(one,), **times)))
        except Rejected:
            continue
    written = len(it.broker.records(TOPIC))
    assert written > 50

    await it.run()

    assert await it.position() == written
    assert 0 < len(it.dead()) < written
    assert {letter.reason for letter in it.dead()} == {"out_of_range"}


async def test_a_source_whose_clock_is_mad_stops_nobody(store: Store) -> None:  # noqa: F811
    task = task_of(NOON_S - 300, NOON_S)
    mad = [
        receipt_of(task, observed_s=s, finished_s=NOON_S + i)
        for i, s in enumerate((NOON_S + 60, 253_402_300_799))
    ]
    it = Projecting(store)
    it.write(encoded(task), *map(encoded, mad))

    await it.run()

    assert (await it.position(), it.dead()) == (3, [])


async def test_many_large_plans_are_projected_in_transactions_that_are_not(store: Store) -> None:  # noqa: F811
    it = Projecting(store)
    plans = [
        replace(task_of(0, 300), items=(TaskItem("ec2", 0, 30_000 * 300, 300),), attempt=i) for i in range(7)
    ]
    taken = [
        projection.Taken(Record(RecordPosition(TOPIC, 0, i), b"", b"", 0), p, None)
        for i, p in enumerate(plans)
    ]

    assert [len(some) for some in projection.slices(taken)] == [3, 3, 1]
    it.write(*(encoded(p) for p in plans[:4]))
    await it.run()
    assert await store.sql.fetchval("SELECT count(*) FROM windows") == 30_000


async def test_writers_that_went_bad_stop_the_projection_before_it_has_buried_much(store: Store) -> None:  # noqa: F811
    it = Projecting(store)
    it.write(
        *(encoded(task_of(NOON_S + 300 * i, NOON_S + 300 * i + 300)) for i in range(60)),
        key=str(TARGET).encode(),
    )
    await it.run()
    it.write(*(b"of a later version %d" % i for i in range(100)), key=str(TARGET).encode())

    for _ in range(3):
        with pytest.raises(Fatal, match=r"would be dead letters.*roll it back"):
            await it.run()
        it.projection = it.fresh()

    assert (it.dead(), await it.position()) == ([], 60)


async def test_rubbish_under_foreign_keys_stops_no_projection(store: Store) -> None:  # noqa: F811
    it = Projecting(store)
    it.write(*(b"rubbish %d" % i for i in range(3 * SHARE_RECORDS_MIN)))
    await it.run()
    assert (len(it.dead()), await it.position()) == (3 * SHARE_RECORDS_MIN, 3 * SHARE_RECORDS_MIN)


# --- collect and shards -----------------------------------------------------------------------------------------


class FakeRecord:
    """As aiokafka's ConsumerRecord."""

    place = TopicPartition("headgate.shards", 0)

    def __init__(self, offset: int, key: bytes, value: bytes) -> None:
        self.topic, self.partition = self.place
        self.offset, self.key, self.value, self.timestamp = offset, key, value, 0


class Put:
    """Where records are put aside, as `workers.aside.Aside.put`."""

    def __init__(self) -> None:
        self.found: list[tuple[RecordPosition, str]] = []

    async def __call__(self, record: Record, error: Rejected) -> None:
        self.found.append((record.position, str(error.reason)))


async def test_rubbish_on_collect_is_put_aside_and_the_tasks_around_it_are_done() -> None:
    cluster, put = Cluster(), Put()
    first, last = targets(2)
    cluster.announce(first)
    rubbish: Sequence[bytes] = (
        b"",
        b"rubbish",
        avro.MAGIC * 400_000,
        wire.encode_receipt(receipt_of(task_of(0, 300))),
    )
    for value in rubbish:
        cluster.broker.append("collect", Outgoing(b"k", value, 0))
    cluster.announce(last)
    one, _ = cluster.shard()
    one._aside = put

    async with cluster.running(one):
        await becomes(lambda: cluster.committed() == 6)

    assert sorted(r.task_id for r in cluster.receipts()) == sorted([first.task_id, last.task_id])
    assert sorted((at.offset, why) for at, why in put.found) == [
        (1, "bad_magic"), (2, "bad_magic"), (3, "unknown_schema"), (4, "wrong_record"),
    ]  # fmt: skip


async def test_rubbish_on_shards_is_put_aside_and_what_was_known_holds() -> None:
    put = Put()
    board = Board(Kafka(), "t", put)
    last = Assignment(2**63 - 1, 0, "", ("a",), ("a",), (1.0,))  # no epoch could follow
    late = Incarnation("exporter-1", 2**63 - 1, 1, "h", 1)  # nor a later process
    rubbish = [
        (KEY, encode_assignment(last)),
        (b"shard:exporter-1", encode_incarnation(late)),
        (KEY, b""),
        (KEY, b"rubbish"),
        (b"shard:exporter-1", avro.MAGIC * 1000),
        (b"", b""),
        (b"\xff", b"x"),
    ]
    records = [FakeRecord(i, key, value) for i, (key, value) in enumerate(rubbish)]

    await board._take({FakeRecord.place: records})

    assert (board.assignment, board.incarnations) == (None, {})
    assert [at.offset for at, _ in put.found] == list(range(len(rubbish)))


def test_what_the_campaign_throws_at_the_readers_is_refused_by_all_of_them() -> None:
    limits = Limits()
    crowds = [kinds_log.crowded(5_001, 1), kinds_log.crowded(40_000, 1), kinds_log.crowded(1, 1_300_000)]
    reasons = set()
    for value in (*kinds_log.hostile_values(random.Random(5)), *crowds):
        assert len(value) < VALUE_BYTES_MAX
        for decode in (wire.decode_task, wire.decode_ledger, decode_assignment, decode_incarnation):
            with pytest.raises(Rejected):
                decode(value)
        with pytest.raises(Rejected) as refused:
            wire.decode_batch(value, limits)
        reasons.add(refused.value.reason)
    assert {
        "too_many_series",
        "too_many_points",
        "decoded_too_large",
        "size_unnamed",
        "payload_too_large",
    } <= reasons
