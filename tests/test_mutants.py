"""Each mutant by itself: that it does what its name says, and that what checks the system sees it. Those of the landing: tests/test_faults.py, on real servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from numpy.typing import NDArray

from ingest import wire
from ingest.archive import open_archive
from ingest.clock import SystemClock
from ingest.errors import Transient
from ingest.model import Batch, LookStatus, bytes_of
from ingest.sinks import postgres
from shard_config.model import S3, Config, Limits, Postgres
from tests.faults import mutants
from tests.faults import watch as watching
from tests.faults.truth import Truth
from tests.faults.watch import Positions, archive_complaints
from tests.simulated_modes import BAD
from tests.test_bad_input import check_whole, item_of, scene
from workers.simulated.faults import Faults


def test_there_is_a_mutant_of_each_mistake_and_a_name_that_is_none_is_an_error() -> None:
    assert set(mutants.MUTANTS) == {
        "commit_before_landing",
        "drop_every_10000th_row",
        "ignore_partial_data",
        "last_arrival_wins",
        "position_outside_the_transaction",
        "manifest_before_objects",
    }
    with pytest.raises(KeyError):
        mutants.plant("nobody")


# --- the source ---------------------------------------------------------------------------------------------------


async def test_who_ignores_partial_data_says_complete_of_half_the_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutants.ignore_partial_data(monkeypatch.setattr)
    async with scene() as found:
        found.sim.faults = Faults(seed=5, partial_share=0.5)
        receipt = await found.collect(BAD, item_of())
        assert receipt.items[0].outcome.status is LookStatus.COMPLETE, receipt.items[0].outcome.detail
        with pytest.raises(AssertionError):
            check_whole(found, receipt)


# --- the landing --------------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """As many rows as `numbers`; what is selected is kept."""

    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, kept: NDArray[np.bool_]) -> _Rows:
        return _Rows(self.numbers[kept])


async def test_the_one_that_drops_rows_drops_one_of_ten_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    landed: list[int] = []

    async def insert(_: object, rows: _Rows, suspect: NDArray[np.bool_]) -> None:
        assert len(rows) == len(suspect)
        landed.extend(rows.numbers.tolist())

    monkeypatch.setattr(postgres, "_insert_rows", insert)
    mutants.drop_every_10000th_row(monkeypatch.setattr)
    for first in range(0, 30_000, 1_000):
        rows: Any = _Rows(np.arange(first, first + 1_000))
        await postgres._insert_rows(None, rows, np.zeros(1_000, np.bool_))
    gone = sorted(set(range(30_000)) - set(landed))
    assert len(gone) == 3
    assert np.diff(gone).tolist() == [10_000, 10_000]


# --- the archive --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", [None, mutants.manifest_before_objects], ids=["control", "mutant"])
async def test_an_archive_whose_manifests_come_first_is_not_whole_where_a_put_was_cut_off(
    mutant: mutants.Mutant | None, s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = S3(bucket=bucket, endpoint_url=s3_endpoint)
    look = Truth(1, targets=1, windows=2).looks[0]
    if mutant:
        mutant(monkeypatch.setattr)
    puts = 0
    async with open_archive(s3, SystemClock()) as archive:
        put_object = archive._client.put_object

        async def once(**request: object) -> object:
            nonlocal puts
            puts += 1
            if puts > 1:
                raise ConnectionResetError("of this test")
            return await put_object(**request)

        monkeypatch.setattr(archive._client, "put_object", once)
        try:
            await archive.put(look.archived)
        except Transient:
            assert mutant
    tick_s = look.task.tick_s
    found = await archive_complaints(Config(s3=s3), tick_s - 86_400, tick_s + 86_400)
    assert [one.partition(":")[0] for one in found] == (["the archive is not whole"] if mutant else [])


# --- what is watched while all is at work -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("next_", "landed", "stored_rows", "complaints"),
    [
        (2, {b"0", b"1"}, True, []),
        (2, {b"0", b"1"}, False, ["I1 rows of what has landed are not there"]),
        (1, {b"0"}, False, []),
        (2, {b"0"}, True, []),
        (2, {b"0"}, False, ["I3 the store's position is past what has landed"]),
        (1, {b"0", b"1"}, True, ["I3 Kafka's group is past the store"]),
    ],
    ids=["all landed", "rows are gone", "behind", "taken back", "past the rows", "past the store"],
)
async def test_a_position_past_what_has_landed_is_said_once(
    next_: int, landed: set[bytes], stored_rows: bool, complaints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two records stand in `raw`, and Kafka's group is past both where both have landed."""
    batches = [
        wire.decode_batch(look.published.value, Limits()) for look in Truth(1, targets=1, windows=2).looks[:2]
    ]
    watch = Positions(Store(next_, landed, batches if stored_rows else batches[:1]))  # type: ignore[arg-type]  # what it asks of a field
    watch._raw = {(0, n): batch for n, batch in enumerate(batches)}
    watch._ids = {(0, n): b"%d" % n for n in range(2)}

    async def committed(_: object) -> dict[int, int]:
        return {0: len(landed)}

    async def nothing_new(_: object, __: object) -> None: ...

    monkeypatch.setattr(watching, "_committed", committed)
    monkeypatch.setattr(Positions, "_read", nothing_new)
    for _ in range(2):
        await watch.look()
    assert [one.partition(":")[0] for one in watch.complaints] == complaints


@dataclass
class Store:
    """What a field's store answers: a position, what has landed, and the rows of some batches."""

    next_: int
    landed: set[bytes]
    batches: list[Batch]
    config: Config = field(
        default_factory=lambda: Config(postgres=Postgres(dsn="postgresql://x@127.0.0.1/x"))
    )

    async def sql(self, query: str, *args: Any) -> list[dict[str, Any]]:
        if "FROM positions" in query:
            return [{"partition": 0, "next": self.next_}]
        if "FROM landed" in query:
            return [{"batch_id": one} for one in self.landed]
        _, version = args
        return [
            {"series": UUID(bytes=sid), "at_s": at_s}
            for batch in self.batches
            if batch.version >= version
            for sid, at_s in zip(bytes_of(batch.point_ids()), batch.timestamps_s.tolist(), strict=True)
        ]
