"""The ledger at a glance, over a ledger that was filled the way it is filled."""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg
import pytest

from ingest.errors import Fatal
from ingest.model import LookStatus
from ingest.overview import GRACE_S, Overview, ShardOverview, overview
from tests.test_ledger import NOON_S, OTHER, TARGET, Store, ledger_database, receipt_of, store, task_of

__all__ = ["ledger_database", "store"]  # the fixtures


def at(seconds: int) -> datetime:
    return datetime.fromtimestamp(NOON_S + seconds, UTC)


async def glance(store: Store, now_s: int = 0, since_s: int = -86_400) -> Overview:
    return await overview(store.sql, at(now_s), at(since_s))


async def test_an_empty_ledger_is_empty(store: Store) -> None:
    seen = await glance(store)
    assert (seen.targets, seen.shards, seen.windows, seen.landed, seen.gaps, seen.looks) == (
        (),
        (),
        0,
        0,
        0,
        0,
    )


async def test_a_window_is_a_gap_only_past_its_end_its_settling_one_interval_and_the_grace(
    store: Store,
) -> None:
    await store.project(task_of(NOON_S - 300, NOON_S))
    deadline_s = 600 + 300 + GRACE_S
    assert (await glance(store, deadline_s)).gaps == 0
    assert (await glance(store, deadline_s + 1)).gaps == 1


async def test_a_window_that_landed_freshens_its_target_and_is_a_gap_all_the_same_until_it_is_sealed(
    store: Store,
) -> None:
    await store.project(
        task_of(NOON_S - 900, NOON_S),
        receipt_of(task_of(NOON_S - 600, NOON_S - 300), counts=[(NOON_S - 600, 4, 1)]),
    )
    await store.fold()
    (target,) = (await glance(store, 86_000)).targets
    assert (target.target, target.slot) == (str(TARGET), None)
    assert (target.windows, target.landed, target.sealed, target.gaps) == (3, 1, 0, 3)
    assert (target.fresh_until, target.oldest_open) == (at(-300), at(-900))
    await store.sql.execute("UPDATE windows SET sealed_at = now() WHERE landed_as_of IS NOT NULL")
    assert (await glance(store, 86_000)).gaps == 2


async def test_targets_have_their_slots_and_stand_in_order(store: Store) -> None:
    await store.project(task_of(NOON_S - 300, NOON_S, target=OTHER), task_of(NOON_S - 300, NOON_S))
    await store.ledger.remember_plan({str(OTHER): 7}, {str(OTHER): 1.0}, NOON_S)
    assert [(t.target, t.slot) for t in (await glance(store)).targets] == [
        (str(TARGET), None),
        (str(OTHER), 7),
    ]


async def test_a_problem_is_what_the_newest_look_complained_of_and_goes_with_the_next_good_one(
    store: Store,
) -> None:
    ec2, rds = task_of(NOON_S - 300, NOON_S), task_of(NOON_S - 300, NOON_S, service="rds")
    await store.project(
        receipt_of(ec2, finished_s=NOON_S + 1),
        receipt_of(ec2, status=LookStatus.FAILED, detail="throttled", finished_s=NOON_S + 2),
        receipt_of(rds, status=LookStatus.FORBIDDEN, detail="AccessDenied", finished_s=NOON_S + 2),
    )
    (target,) = (await glance(store)).targets
    assert target.problem == "ec2 failed: throttled; rds forbidden: AccessDenied"
    await store.project(receipt_of(ec2, finished_s=NOON_S + 3))
    assert (await glance(store)).targets[0].problem == "rds forbidden: AccessDenied"


async def test_totals_and_rates_are_of_the_time_asked_about(store: Store) -> None:
    old, new = task_of(NOON_S - 900, NOON_S - 600), task_of(NOON_S - 300, NOON_S)
    await store.project(
        receipt_of(old, counts=[(NOON_S - 900, 120, 1)], finished_s=NOON_S - 590),
        receipt_of(new, counts=[(NOON_S - 300, 60, 1)], finished_s=NOON_S + 1),
    )
    await store.sql.execute(
        "INSERT INTO landed VALUES ('postgres', $1, 't', 't', 's', 1, 600, 2, 0, $3),"
        " ('postgres', $2, 't', 't', 's', 1, 30, 0, 0, $4)",
        b"a" * 16, b"b" * 16, at(-500), at(5),
    )  # fmt: skip
    seen = await glance(store, now_s=30)
    assert (seen.looks, seen.points_collected, seen.metrics_billed, seen.list_metrics) == (2, 180, 10, 0)
    assert (seen.points_landed, seen.points_dead, seen.points_per_s) == (630, 2, 0.5)
    assert seen.shards == (ShardOverview("exporter-1", 1, 1.0, 10, 0),)
    recent = await glance(store, now_s=30, since_s=-60)
    assert (recent.looks, recent.points_collected, recent.points_landed, recent.windows) == (1, 60, 30, 1)


async def test_a_database_without_the_schema_says_what_to_do(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        with pytest.raises(Fatal, match="run the migrations"):
            await overview(connection, at(0), at(-60))
    finally:
        await connection.close()
