"""Each mutant by itself: that it does what its name says, and that what checks the system sees it. Those of the landing: tests/test_faults.py, on real servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ingest.archive import open_archive
from ingest.clock import SystemClock
from ingest.errors import Transient
from ingest.model import LookStatus
from ingest.sinks import postgres
from shard_config.model import S3, Config, Postgres
from tests.faults import mutants
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


@dataclass
class _Watched:
    config: Config = field(
        default_factory=lambda: Config(postgres=Postgres(dsn="postgresql://x@127.0.0.1/x"))
    )


@pytest.mark.parametrize(
    ("committed", "stored", "landed", "complaints"),
    [
        ({0: 2}, {0: 2}, {b"a", b"b"}, []),
        ({0: 1}, {0: 2}, {b"a", b"b", b"c"}, []),
        ({0: 3}, {0: 2}, {b"a", b"b"}, ["I3 Kafka's group is past the store"]),
        ({0: 2}, {0: 2}, {b"a"}, ["I3 the store's position is past what has landed"]),
        ({}, {}, set(), []),
    ],
)
def test_a_position_past_what_has_landed_is_said_once(
    committed: dict[int, int], stored: dict[int, int], landed: set[bytes], complaints: list[str]
) -> None:
    watch = Positions(_Watched())  # type: ignore[arg-type]  # only its configuration is asked for
    watch._raw = {(0, 0): b"a", (0, 1): b"b", (0, 2): b"c"}
    for _ in range(2):
        watch._judge(committed, stored, landed)
    assert [one.partition(":")[0] for one in watch.complaints] == complaints
