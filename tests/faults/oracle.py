"""What must hold, as complaints: an empty list where it does. The numbers are those of the invariants that every fault is held to.

* I1 landed (series, timestamp) → value equals the truth: nothing lost, nothing invented, nothing stale.
* I2 every bad record and point is in the dead-letter topic, once by identity, with its reason and its origin.
* I3 no committed position lies past data that has not landed. Of the store's positions and of Kafka's; at any time.
* I4 each point holds the greatest version that was ever published for it.
* I7 the ledger balances: every planned window is sealed or declared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from ingest import wire
from ingest.model import DeadLetter
from ingest.positions import value_id
from ingest.sinks.connection import open_connection
from shard_config.model import Config
from tests.faults.truth import Dead, Published, Table, Truth, greatest
from workers.names import landing_group

EXAMPLES_MAX = 3

Sent = dict[tuple[int, int], Published]
"""(partition, offset) → what stands there in `raw`."""


@dataclass
class Oracle:
    """Looks at the store and at Kafka directly, past every proxy and consumer."""

    config: Config
    truth: Truth
    sent: Sent = field(default_factory=dict)
    """Filled by whoever publishes."""

    @property
    def _raw(self) -> str:
        return self.config.kafka.topic("raw")

    async def at_the_end(self) -> list[str]:
        """All complaints but the ledger's, when everything that was sent should have landed."""
        table, letters = await self.table(), await self.dead_letters()
        return [
            *await self.positions(),
            *complaints_of_landed(self.sent.values(), table),
            *complaints_of_dead(letters, self.sent),
        ]

    async def table(self) -> Table:
        """What has landed."""
        connection = await open_connection(self.config.postgres, "oracle")
        try:
            rows = await connection.fetch(
                "SELECT series, extract(epoch FROM ts)::bigint, version, value FROM samples"
            )
        finally:
            await connection.close()
        return {(sid, at_s): (version, value) for sid, at_s, version, value in rows}

    async def next_offsets(self, topic: str, sink: str) -> dict[int, int]:
        """The store's positions."""
        connection = await open_connection(self.config.postgres, "oracle")
        try:
            rows = await connection.fetch(
                "SELECT partition, next FROM positions WHERE topic = $1 AND sink = $2", topic, sink
            )
        finally:
            await connection.close()
        return {row["partition"]: row["next"] for row in rows}

    async def positions(self) -> list[str]:
        """Complaints about I3. What is asked first is behind what is asked last, so this holds while everything is at work."""
        committed = await self._committed()
        connection = await open_connection(self.config.postgres, "oracle")
        try:
            stored = {
                row["partition"]: (row["next"], row["last_value_id"])
                for row in await connection.fetch(
                    "SELECT partition, next, last_value_id FROM positions WHERE topic = $1 AND sink = 'postgres'",
                    self._raw,
                )
            }
        finally:
            await connection.close()
        table, letters = await self.table(), await self.dead_letters()
        dead = {_dead_of(letter) for letter in letters}
        landed: dict[int, bool] = {}

        def has_landed(one: Published) -> bool:
            if id(one) not in landed:  # the same record may stand in many places
                points = (table.get((s, t), (-1, 0.0)) >= (v, x) for s, t, v, x in one.points)
                landed[id(one)] = one.dead <= dead and all(points)
            return landed[id(one)]

        found = [
            f"I3 partition {p}: Kafka's group is at {offset}, the store at {stored[p][0]}"
            for p, offset in sorted(committed.items())
            if offset > stored[p][0]
        ]
        for p, (next_, last_value_id) in sorted(stored.items()):
            last = self.sent.get((p, next_ - 1))
            # Empty where an operator moved it to the log's start: nothing before it was left to remember.
            if last is not None and last_value_id not in (b"", value_id(last.value)):
                found.append(f"I3 partition {p}: the store remembers another record before {next_}")
            behind = sorted(
                at for at, one in self.sent.items() if at[0] == p and at[1] < next_ and not has_landed(one)
            )
            if behind:
                found.append(
                    f"I3 partition {p}: the position {next_} is past {len(behind)} records that have not landed, "
                    f"as {behind[:EXAMPLES_MAX]}"
                )
        return found

    async def dead_letters(self) -> list[DeadLetter]:
        """Everything of the dead-letter topic, each identity once. Raises AssertionError where two letters share one."""
        by_key: dict[bytes, DeadLetter] = {}
        for key, value in await read_topic(self.config.kafka.bootstrap, self.config.kafka.topic("dead")):
            letter = wire.decode_dead_letter(value)
            first = by_key.setdefault(key, letter)
            assert key == letter.identity.encode()
            assert _dead_of(first) == _dead_of(letter), "two letters share an identity"
        return list(by_key.values())

    async def ledger(self) -> list[str]:
        """Complaints about I7."""
        planned = {
            (str(look.task.target), window.start_s)
            for look in self.truth.looks
            for item in look.task.items
            for window in item.windows()
        }
        connection = await open_connection(self.config.postgres, "oracle")
        try:
            rows = await connection.fetch(
                "SELECT target, extract(epoch FROM window_start)::bigint AS start_s, last_status, last_detail,"
                " sealed_at IS NOT NULL AS sealed, to_jsonb(w) ->> 'declared' IS NOT NULL AS declared"
                " FROM windows AS w"
            )
            folded = await connection.fetchval("SELECT coalesce(sum(windows), 0) FROM sealed_days")
        finally:
            await connection.close()
        open_ = [
            f"{r['target']} {r['start_s']} {r['last_status']} {r['last_detail']}"
            for r in rows
            if not (r["sealed"] or r["declared"])
        ]
        found = []
        if open_:
            found.append(f"I7 {len(open_)} windows are open, as {open_[:EXAMPLES_MAX]}")
        if len(rows) + folded != len(planned):
            found.append(
                f"I7 {len(planned)} windows were planned, the ledger has {len(rows)} + {folded} folded"
            )
        return found

    async def _committed(self) -> Mapping[int, int]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.config.kafka.bootstrap)
        await admin.start()
        try:
            found = await admin.list_consumer_group_offsets(landing_group(self.config.kafka))
        finally:
            await admin.close()
        return {
            tp.partition: at.offset for tp, at in found.items() if tp.topic == self._raw and at.offset >= 0
        }


def complaints_of_tables(expected: Table, landed: Table) -> list[str]:
    """Complaints about I1 and I4: what is lost, invented, wrong, or of another version than the greatest."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in expected.keys() | landed.keys():
        name = f"({key[0].hex()}, {key[1]})"
        if key not in landed:
            kinds["I1 lost"].append(name)
        elif key not in expected:
            kinds["I1 invented"].append(name)
        elif expected[key] != landed[key]:
            of_version = expected[key][0] != landed[key][0]
            what = f"{name} is {landed[key]} instead of {expected[key]}"
            kinds["I4 another version" if of_version else "I1 wrong"].append(what)
    return [f"{kind}: {len(all_)}, as {sorted(all_)[:EXAMPLES_MAX]}" for kind, all_ in sorted(kinds.items())]


def complaints_of_landed(sent: Iterable[Published], landed: Table) -> list[str]:
    """Complaints about I1 and I4 of a table that should hold exactly what these records hold."""
    once = {id(one): one for one in sent}  # the same record may stand in many places
    return complaints_of_tables(greatest(once.values()), landed)


def complaints_of_dead(letters: Iterable[DeadLetter], sent: Sent, gone: Sent | None = None) -> list[str]:
    """Complaints about I2. A letter's origin must be a record that was sent, and that holds what the letter says.

    `gone` was deleted from its topic since: it may have been read before, or not.
    """
    gone = gone or {}
    letters, found = list(letters), []
    wanted = frozenset[Dead]().union(*(one.dead for one in sent.values()))
    have = [_dead_of(letter) for letter in letters]
    if missing := wanted - set(have):
        found.append(
            f"I2 not among the dead letters: {len(missing)}, as {sorted(map(str, missing))[0][:300]}"
        )
    if invented := set(have) - wanted.union(*(one.dead for one in gone.values())):
        found.append(f"I2 dead without a cause: {len(invented)}, as {sorted(map(str, invented))[0][:300]}")
    if len(have) != len(set(have)):
        found.append(f"I2 {len(have) - len(set(have))} are there under two identities")
    for letter, dead in zip(letters, have, strict=True):
        at = letter.origin.partition, letter.origin.offset
        origins = [one for one in (sent.get(at), gone.get(at)) if one is not None]
        of_archive = letter.origin.topic == "archive"  # a replay may have come first
        if not letter.reason or not (of_archive or any(dead in one.dead for one in origins)):
            found.append(f"I2 a letter is not of its origin: {letter.reason!r}, {letter.origin}")
    return found


def _dead_of(letter: DeadLetter) -> Dead:
    if not letter.series:
        return "", letter.batch_id, "", letter.payload
    return letter.reason, letter.batch_id, letter.series, int(orjson.loads(letter.payload)["timestamp_s"])


async def read_topic(bootstrap: str, topic: str, partitions: int = 1) -> list[tuple[bytes, bytes]]:
    """(key, value) of all records of a topic, partition after partition."""
    asked = [TopicPartition(topic, p) for p in range(partitions)]
    client = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    try:
        await client.start()
        client.assign(asked)
        await client.seek_to_beginning(*asked)
        ends = await client.end_offsets(asked)
        found: list[tuple[bytes, bytes]] = []
        for tp, end in ends.items():
            while await client.position(tp) < end:
                got = await client.getmany(tp, timeout_ms=1000)
                found += ((r.key or b"", r.value or b"") for batch in got.values() for r in batch)
        return found
    finally:
        await client.stop()
