"""What is published, and what must have landed afterwards: both a pure function of a seed.

The looks are those of a few targets' polls: each covers three windows again, some values change until they have settled, some points
are missing, and some are NaN or infinite. They are published out of order, some twice, with rubbish in between, and a few with a greater
revision and an earlier time. What must land (`greatest`) is computed from the generated numbers alone, by no code of `ingest` but the
version's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ingest import wire
from ingest.archive import archive_key
from ingest.log import Outgoing
from ingest.model import (
    Batch,
    LookStatus,
    Outcome,
    Receipt,
    ReceiptItem,
    Series,
    SeriesKey,
    Target,
    Task,
    TaskItem,
    TaskKind,
    series_id,
    series_ids,
    task_id_of,
    version_of,
    window_counts,
)
from ingest.ports import ArchivedTask, Payload
from ingest.validate import describe
from shard_config.model import Account, ServiceProfile

START_S = 1_795_478_400  # 2026-11-24T00:00:00Z
GRID_S = 300
PERIOD_S = 60
LOOKBACK_S = 2 * GRID_S
SERVICE = ServiceProfile(service="ec2", namespace="AWS/EC2", settling_s=LOOKBACK_S)
REGION = "eu-west-1"

Sample = tuple[int, float]
"""(version, value), which is also their order."""

Table = dict[tuple[bytes, int], Sample]
"""(series id, timestamp in seconds) → sample."""

Dead = tuple[str, bytes, str, bytes | int]
"""A dead letter by (reason, batch id, series, timestamp); of a whole record by ("", batch id, "", its value)."""


@dataclass(frozen=True, slots=True)
class Published:
    """What one raw record's value holds: its good points, and what of it is dead."""

    value: bytes
    points: tuple[tuple[bytes, int, int, float], ...] = ()
    """(series id, timestamp, version, value)."""
    dead: frozenset[Dead] = frozenset()


@dataclass(frozen=True, slots=True)
class Look:
    """One task, what it answered, and its receipt."""

    task: Task
    archived: ArchivedTask
    published: Published


@dataclass(frozen=True)
class Truth:
    """Everything that a run publishes, and what it must end in."""

    seed: int
    targets: int = 4
    series: int = 20
    windows: int = 8
    rubbish: int = 6
    corrections: int = 3

    @property
    def now_s(self) -> int:
        """When all this is looked back at: everything has settled."""
        return self.end_s + LOOKBACK_S + 2 * GRID_S

    @property
    def end_s(self) -> int:
        return START_S + self.windows * GRID_S

    def accounts(self) -> tuple[Account, ...]:
        """What a configuration must list, so that it plans these targets."""
        ids = (str(100_000_000_000 + i) for i in range(self.targets))
        return tuple(Account(id=i, regions=(REGION,), services=(SERVICE.service,)) for i in ids)

    @cached_property
    def looks(self) -> tuple[Look, ...]:
        """In the order of time, the targets after each other."""
        return tuple(
            self._look(Target("cloudwatch", account.id, REGION), tick_s)
            for account in self.accounts()
            for tick_s in range(START_S + GRID_S, self.end_s + LOOKBACK_S + 1, GRID_S)
        )

    @cached_property
    def records(self) -> tuple[tuple[Outgoing, Published], ...]:
        """Everything of `raw`, in the order in which it is published."""
        rng = random.Random(f"{self.seed} order")
        looks = [(look.task.target, look.published) for look in self.looks]
        looks += [
            self._correction(look, rng) for look in rng.sample(self.looks, min(self.corrections, len(looks)))
        ]
        looks += rng.sample(looks, len(looks) // 8)
        rng.shuffle(looks)
        records = [(Outgoing(wire.raw_key(target), p.value), p) for target, p in looks]
        for i in range(self.rubbish):
            value = [b"", b"\xc3\x01" + rng.randbytes(20), b"\x28\xb5\x2f\xfd" + rng.randbytes(40)][i % 3]
            dead: Dead = ("", wire.batch_id_of(value), "", value)
            at = rng.randrange(len(records))
            records.insert(at, (Outgoing(str(i).encode(), value), Published(value, (), frozenset([dead]))))
        return tuple(records)

    def waves(self, count: int) -> list[tuple[tuple[Outgoing, Published], ...]]:
        """The records, cut into about equal parts."""
        size = math.ceil(len(self.records) / count)
        return [self.records[at : at + size] for at in range(0, len(self.records), size)]

    def heavy(self, copies: int = 300) -> tuple[tuple[Outgoing, Published], ...]:
        """Half a megabyte each, on all partitions, cheap to take apart: what a sink that has the first ones skips by batch id."""
        rng = np.random.default_rng(self.seed)
        account = self.accounts()[0].id
        target = Target("cloudwatch", account, REGION)
        key = SeriesKey(account, REGION, "Heavy", "Load", (), "Average", 1)
        values = rng.random(40_000)
        series = (Series(key),)
        times_s = np.arange(START_S - len(values), START_S, dtype=np.int64)
        batch = Batch(
            "0" * 32, target, "heavy", START_S * 1000, 0, GRID_S, series,
            np.array([len(values)], np.int32), times_s, values, series_ids(series),
        )  # fmt: skip
        published = _published(batch)
        return tuple((Outgoing(str(i).encode(), published.value, i % 4), published) for i in range(copies))

    # --- one look ---------------------------------------------------------------------------------------------

    def _look(self, target: Target, tick_s: int) -> Look:
        item = TaskItem(
            SERVICE.service,
            max(START_S, tick_s - GRID_S - LOOKBACK_S),
            min(self.end_s, tick_s),
            GRID_S,
        )
        task = Task(
            task_id=task_id_of(target, "r", 0, (item,)),
            target=target,
            config_revision="r",
            tick_s=tick_s,
            attempt=0,
            kind=TaskKind.LIVE,
            expires_s=0,
            items=(item,),
        )
        batch = self._batch(task, 0, (tick_s + 30) * 1000, random.Random(f"{self.seed} {target} {tick_s}"))
        published = _published(batch)
        payload = Payload(wire.batch_id_of(published.value), published.value)
        counts = window_counts(batch.point_ids(), batch.timestamps_s, batch.values, GRID_S)
        billed = len(batch.series)
        outcome = Outcome(LookStatus.COMPLETE, "", batch.observed_at_ms, billed, {"GetMetricData": 1}, billed)
        receipt = Receipt(
            task_id=task.task_id,
            target=target,
            shard="exporter-1",
            tick_s=tick_s,
            started_at_ms=batch.observed_at_ms - 1000,
            finished_at_ms=batch.observed_at_ms + 1000,
            archive_key=archive_key(task),
            items=(ReceiptItem(item, outcome, batch.points, counts, (payload.batch_id,)),),
        )
        return Look(task, ArchivedTask(receipt, (payload,)), published)

    def _correction(self, look: Look, rng: random.Random) -> tuple[Target, Published]:
        """Of an operator, who looked before, and is right all the same."""
        observed_ms = (look.task.tick_s - GRID_S) * 1000
        return look.task.target, _published(self._batch(look.task, 1, observed_ms, rng))

    def _batch(self, task: Task, revision: int, observed_at_ms: int, rng: random.Random) -> Batch:
        (item,) = task.items
        keys = [
            SeriesKey(
                task.target.account,
                REGION,
                SERVICE.namespace,
                "CPUUtilization",
                (("InstanceId", f"i-{n:04}"),),
                "Average",
                PERIOD_S,
            )
            for n in range(self.series)
        ]
        series = tuple(Series(key, "Percent") for key in keys)
        counts, times, values = [], [], []
        for n in range(self.series):
            own = [t for t in range(item.start_s, item.end_s, PERIOD_S) if rng.random() > 0.04]
            counts.append(len(own))
            times += own
            values += [self._value(n, t, rng) for t in own]
        return Batch(
            task_id=task.task_id,
            target=task.target,
            service=item.service,
            observed_at_ms=observed_at_ms,
            revision=revision,
            grid_s=GRID_S,
            series=series,
            counts=np.array(counts, np.int32),
            timestamps_s=np.array(times, np.int64),
            values=np.array(values, np.float64),
            ids=series_ids(series),
        )

    def _value(self, series: int, timestamp_s: int, rng: random.Random) -> float:
        """Mostly what any look sees; now and then another number, −0, or none at all."""
        kind = rng.random()
        if kind < 0.004:
            return rng.choice([math.nan, math.inf, -math.inf])
        if kind < 0.01:
            return -0.0
        stable = random.Random(f"{self.seed} {series} {timestamp_s}").uniform(0, 100)
        return stable if kind < 0.7 else rng.uniform(0, 100)


def greatest(published: Iterable[Published]) -> Table:
    """Of each key the greatest (version, value) among the good points of records."""
    table: Table = {}
    for one in published:
        for sid, timestamp_s, version, value in one.points:
            key = sid, timestamp_s
            table[key] = max(table.get(key, (-1, 0.0)), (version, value))
    return table


def _published(batch: Batch) -> Published:
    (payload,) = wire.encode_batch(batch)
    version = version_of(batch.revision, batch.observed_at_ms)
    owners = np.repeat(np.arange(len(batch.series)), batch.counts).tolist()
    points: list[tuple[bytes, int, int, float]] = []
    dead: set[Dead] = set()
    names = [series_id(one.key) for one in batch.series]
    for owner, at_s, value in zip(owners, batch.timestamps_s.tolist(), batch.values.tolist(), strict=True):
        if math.isfinite(value):
            points.append((names[owner], at_s, version, value + 0.0))
        else:
            reason = "not_a_number" if math.isnan(value) else "infinite"
            dead.add((reason, payload.batch_id, describe(batch.series[owner]), at_s))
    return Published(payload.value, tuple(points), frozenset(dead))
