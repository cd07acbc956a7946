"""What every sink promises. `FakeSink` and `PostgresSink` both pass it; a file with a `store` fixture inherits `SinkContract`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pytest

from ingest.errors import Fatal
from ingest.model import Batch, BatchId, Series, SeriesKey, Target, digest_of, series_ids
from ingest.ports import Advance, Landable, Landed, SeriesRejected, Sink, StoredPosition
from tests.fake_sink import Table

MIDNIGHT_S = 1_795_478_400  # 2026-11-24T00:00:00Z
OBSERVED_MS = 1_795_500_000_000


@dataclass(frozen=True)
class LandedEntry:
    """One row of `landed`, as far as the balance needs it."""

    task_id: str
    points: int
    dead_points: int
    digest: int


class Store(Protocol):
    """A sink, and a way to look behind it."""

    sink: Sink

    async def table(self, account: str) -> Table:
        """All samples of an account."""
        ...

    async def restart(self) -> None:
        """Give `sink` the memory of a new process."""
        ...

    async def landed(self, task_id: str) -> list[LandedEntry]:
        """Entries of a task, in the order of their batch ids."""
        ...


Point = tuple[int, int, float]
"""(number of the series, minute of the day, value)."""


def make_landable(
    account: str,
    points: Sequence[Point],
    *,
    observed_ms: int = OBSERVED_MS,
    revision: int = 0,
    dead_points: int = 0,
    task_id: str = "task",
) -> Landable:
    """A batch of these points, which may come in any order and repeat."""
    names = sorted({p[0] for p in points})
    series = tuple(
        Series(SeriesKey(account, "eu-west-1", "AWS/EC2", "Load", (("Id", f"i-{n}"),), "Average", 60))
        for n in names
    )
    ordered = sorted(points, key=lambda p: p[0])
    batch = Batch(
        task_id=task_id,
        target=Target("cloudwatch", account, "eu-west-1"),
        service="ec2",
        observed_at_ms=observed_ms,
        revision=revision,
        grid_s=300,
        series=series,
        counts=np.array([sum(p[0] == n for p in points) for n in names], np.int32),
        timestamps_s=np.array([MIDNIGHT_S + 60 * p[1] for p in ordered], np.int64),
        values=np.array([p[2] for p in ordered], np.float64),
        ids=series_ids(series).reshape(-1, 2),
    )
    return Landable(BatchId(uuid.uuid4().bytes), batch, dead_points)


def values_of(table: Table) -> list[float]:
    """The values, by series and time."""
    return [value for _, (_, value) in sorted(table.items())]


@pytest.fixture
def account() -> str:
    """One that no other test has."""
    return str(uuid.uuid4().int)[:12]


@pytest.fixture
def topic() -> str:
    return f"raw-{uuid.uuid4().hex[:8]}"


class SinkContract:
    """Each test has a topic and an account of its own, so that one store serves them all."""

    async def test_a_new_topic_begins_at_position_zero(self, store: Store, topic: str) -> None:
        await store.sink.init_positions(topic, [0, 1])
        assert await store.sink.positions(topic, [0, 1, 2]) == {
            0: StoredPosition(0, b""),
            1: StoredPosition(0, b""),
        }

    async def test_initialising_again_leaves_positions_alone(self, store: Store, topic: str) -> None:
        await store.sink.init_positions(topic, [0])
        await store.sink.land([Advance(topic, 0, 0, 7, b"v" * 16)], [])
        await store.sink.init_positions(topic, [0])
        assert await store.sink.positions(topic, [0]) == {0: StoredPosition(7, b"v" * 16)}

    async def test_points_land_with_their_version(self, store: Store, account: str) -> None:
        one = make_landable(account, [(0, 0, 1.5), (0, 1, 2.5), (1, 0, -3.5)])
        assert await store.sink.land([], [one]) == Landed(1, 3, 0, copied=True)
        table = await store.table(account)
        assert len(table) == 3
        assert {version for version, _ in table.values()} == {one.batch.version}
        assert sorted(values_of(table)) == [-3.5, 1.5, 2.5]

    async def test_a_landing_moves_all_its_positions(self, store: Store, topic: str) -> None:
        await store.sink.init_positions(topic, [0, 1, 2])
        await store.sink.land([Advance(topic, 2, 0, 5, b"b" * 16), Advance(topic, 0, 0, 3, b"a" * 16)], [])
        assert await store.sink.positions(topic, [0, 1, 2]) == {
            0: StoredPosition(3, b"a" * 16),
            1: StoredPosition(0, b""),
            2: StoredPosition(5, b"b" * 16),
        }

    async def test_a_zombie_is_refused_and_changes_nothing(
        self, store: Store, topic: str, account: str
    ) -> None:
        await store.sink.init_positions(topic, [0, 1])
        await store.sink.land([Advance(topic, 1, 0, 4, b"n" * 16)], [])
        late = [Advance(topic, 0, 0, 2, b"z" * 16), Advance(topic, 1, 0, 2, b"z" * 16)]
        with pytest.raises(Fatal, match=r"4.*expected 0"):
            await store.sink.land(late, [make_landable(account, [(0, 0, 1.0)])])
        assert await store.sink.positions(topic, [0, 1]) == {
            0: StoredPosition(0, b""),
            1: StoredPosition(4, b"n" * 16),
        }
        assert await store.table(account) == {}

    async def test_a_position_that_was_never_stored_is_refused(self, store: Store, topic: str) -> None:
        with pytest.raises(Fatal):
            await store.sink.land([Advance(topic, 0, 0, 1, b"v" * 16)], [])

    async def test_a_replayed_batch_is_known_by_its_id_and_skipped(self, store: Store, account: str) -> None:
        one, two = make_landable(account, [(0, 0, 1.0)]), make_landable(account, [(0, 1, 2.0)])
        await store.sink.land([], [one])
        landed = await store.sink.land([], [one, two, two])
        assert (landed.batches, landed.points, landed.skipped_batches) == (3, 3, 2)
        assert values_of(await store.table(account)) == [1.0, 2.0]

    @pytest.mark.parametrize("first", [0, 1])
    async def test_the_later_look_wins_in_whichever_order_they_land(
        self, store: Store, account: str, first: int
    ) -> None:
        looks = [
            make_landable(account, [(0, 0, 9.0)], observed_ms=OBSERVED_MS),
            make_landable(account, [(0, 0, 1.0)], observed_ms=OBSERVED_MS + 1000),
        ]
        await store.sink.land([], [looks[first]])
        await store.sink.land([], [looks[1 - first]])
        assert values_of(await store.table(account)) == [1.0]

    async def test_a_correction_beats_any_later_look(self, store: Store, account: str) -> None:
        await store.sink.land([], [make_landable(account, [(0, 0, 1.0)], revision=127, observed_ms=0)])
        await store.sink.land([], [make_landable(account, [(0, 0, 2.0)], revision=126)])
        assert values_of(await store.table(account)) == [1.0]

    @pytest.mark.parametrize(
        ("smaller", "greater"), [(-1.0, 5.0), (-5.0, -1.0), (-0.5, 0.0), (1.0, float("inf"))]
    )
    async def test_of_one_version_the_greater_value_stays(
        self, store: Store, account: str, smaller: float, greater: float
    ) -> None:
        await store.sink.land(
            [], [make_landable(account, [(0, 0, smaller), (1, 0, greater), (2, 0, greater), (2, 0, smaller)])]
        )
        await store.sink.land([], [make_landable(account, [(0, 0, greater), (1, 0, smaller)])])
        assert values_of(await store.table(account)) == [greater, greater, greater]

    async def test_minus_zero_lands_as_zero(self, store: Store, account: str) -> None:
        await store.sink.land([], [make_landable(account, [(0, 0, -0.0)])])
        await store.sink.land([], [make_landable(account, [(0, 0, 0.0), (0, 1, -0.0)])])
        assert [str(v) for v in values_of(await store.table(account))] == ["0.0", "0.0"]

    async def test_the_entries_say_what_landed(self, store: Store, account: str) -> None:
        task_id = f"task-{account}"
        batches = [
            make_landable(account, [(0, 0, 1.0), (3, 0, 2.0)], dead_points=4, task_id=task_id),
            make_landable(account, [], dead_points=1, task_id=task_id),
            make_landable(account, [(0, 1, -0.0)], task_id=task_id),
        ]
        await store.sink.land([], batches)
        assert await store.landed(task_id) == [
            LandedEntry(
                task_id,
                one.batch.points,
                one.dead_points,
                digest_of(one.batch.point_ids(), one.batch.timestamps_s, one.batch.values),
            )
            for one in sorted(batches, key=lambda one: one.batch_id)
        ]

    async def test_an_id_met_with_other_labels_is_refused_and_nothing_lands(
        self, store: Store, topic: str, account: str
    ) -> None:
        await store.sink.init_positions(topic, [0])
        await store.sink.land([], [make_landable(account, [(0, 0, 1.0)])])
        await store.restart()
        good = make_landable(account, [(7, 0, 7.0), (8, 0, 8.0)])
        forged = replace(good, batch=replace(good.batch, ids=_swap_second(good.batch, account)))
        with pytest.raises(SeriesRejected) as refused:
            await store.sink.land([Advance(topic, 0, 0, 1, b"v" * 16)], [forged])
        assert refused.value.series == ((forged.batch_id, 1),)
        assert values_of(await store.table(account)) == [1.0]
        assert await store.sink.positions(topic, [0]) == {0: StoredPosition(0, b"")}

    async def test_nan_is_refused_by_series(self, store: Store, account: str) -> None:
        one = make_landable(account, [(0, 0, 1.0), (1, 0, float("nan"))])
        with pytest.raises(SeriesRejected) as refused:
            await store.sink.land([], [one])
        assert refused.value.series == ((one.batch_id, 1),)
        assert await store.table(account) == {}


def _swap_second(batch: Batch, account: str) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """The batch's ids, where the second is that of the account's series 0."""
    ids = batch.ids.copy()
    ids[1] = make_landable(account, [(0, 0, 0.0)]).batch.ids[0]
    return ids
