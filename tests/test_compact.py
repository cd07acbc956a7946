"""Closed windows fold into days, what is old goes, and everybody who asks still gets the same answers."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from ingest import compact
from ingest.balance import signed
from ingest.compact import days_of, fold_days, forget, multirange
from ingest.ledger import Ledger
from ingest.model import LookStatus
from ingest.overview import freshness, overview
from ingest.schedule import Grid, due
from shard_config.model import Postgres
from tests.test_ledger import NOON_S, SETTLING_S, TARGET, Store, ledger_database, receipt_of, store, task_of
from tests.test_seal import Proof, batch_of, five, proof

__all__ = ["ledger_database", "proof", "store"]  # the fixtures

DAY = date(2026, 1, 1)
LATER = datetime.fromtimestamp(NOON_S + 86_400, UTC)


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(NOON_S + seconds, UTC)


async def sealed(
    store: Store, *starts: int, points: int = 10, digest: int = 2**64 - 5, version: int = 1
) -> None:
    """Windows as sealing leaves them, closed at noon."""
    await store.sql.executemany(
        "INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at, collected_as_of, landed_as_of,"
        " landed_version, points, digest, sealed_at) VALUES ($1, 'ec2', $2, $3, $3, $3, $3, $3, $4, $5, $6, $7)",
        [(str(TARGET), at(s), at(s + 300), version, points, signed(digest), at(0)) for s in starts],
    )


async def days(store: Store) -> list[dict[str, Any]]:
    return [
        dict(r)
        for r in await store.sql.fetch("SELECT *, covered::text AS text FROM sealed_days ORDER BY day")
    ]


async def test_closed_windows_fold_into_one_row_a_day_with_the_sum_of_their_digests(store: Store) -> None:
    await sealed(store, -600, -300, -43_500)
    assert await fold_days(store.sql, at(1)) == 3
    before, today = await days(store)
    assert (before["day"], before["windows"], before["points"]) == (DAY - timedelta(days=1), 1, 10)
    assert (today["day"], today["windows"], today["points"], today["digest"]) == (DAY, 2, 20, -10)
    assert (today["first_start"], today["last_end"], today["sealed_at"]) == (at(-600), at(0), at(0))
    assert await store.windows() == {}


async def test_folding_in_any_pieces_ends_in_the_same_days(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(11)
    starts = [-300 * n for n in range(1, 60)]
    digests = [rng.randrange(2**64) for _ in starts]
    found = []
    for rows_max in (5_000, 7):
        monkeypatch.setattr(compact, "ROWS_MAX", rows_max)
        await store.empty()
        for start, digest in zip(starts, digests, strict=True):
            await sealed(store, start, digest=digest)
        while await fold_days(store.sql, at(1)):
            pass
        found.append(await days(store))
    assert found[0] == found[1]
    assert found[0][0]["digest"] == signed(sum(digests) % 2**64)
    assert found[0][0]["text"].count("[") == 1


async def test_a_window_stays_a_row_for_the_grace_and_an_open_one_for_ever(store: Store) -> None:
    await sealed(store, -300)
    await store.project(task_of(NOON_S - 900, NOON_S - 600))
    assert await fold_days(store.sql, at(0)) == 0
    assert await fold_days(store.sql, LATER) == 1
    assert await store.states() == {-900: "planned"}


async def test_two_processes_that_fold_at_once_count_every_window_once(store: Store) -> None:
    await sealed(store, *(-300 * n for n in range(1, 100)))
    other = await asyncpg.connect(store.dsn)
    try:
        done = await asyncio.gather(fold_days(store.sql, at(1)), fold_days(other, at(1)))
    finally:
        await other.close()
    assert sum(done) == 99
    (day,) = await days(store)
    assert day["windows"] == 99


async def test_declared_windows_count_apart_and_keep_their_reason(store: Store) -> None:
    await sealed(store, -300)
    await store.project(task_of(NOON_S - 900, NOON_S - 300))
    await store.sql.execute(
        "UPDATE windows SET declared = 'forbidden', declared_at = $1 WHERE sealed_at IS NULL", at(0)
    )
    await fold_days(store.sql, at(1))
    (day,) = await days(store)
    assert (day["windows"], day["declared_windows"], day["points"]) == (3, 2, 10)
    row = await store.sql.fetchrow(
        "SELECT reason, covered = $1::text::tstzmultirange AS same FROM declared_days",
        multirange([(at(-900), at(-300))]),
    )
    assert tuple(row) == ("forbidden", True)


async def test_a_folded_window_is_not_planned_again_by_a_record_that_comes_late(store: Store) -> None:
    await sealed(store, -600, -300)
    await fold_days(store.sql, at(1))
    await store.project(task_of(NOON_S - 900, NOON_S), receipt_of(task_of(NOON_S - 900, NOON_S)))
    assert await store.states() == {-900: "collected"}


async def test_a_coordinator_that_restarts_after_folding_plans_no_sealed_window_again(store: Store) -> None:
    grid = Grid("ec2", 300, 60, 600)
    first = due(TARGET, [grid], {}, NOON_S, "rev", 3600)
    await store.project(*first)
    await store.sql.execute(
        "UPDATE windows SET sealed_at = $1, landed_as_of = $1, points = 0, digest = 0", at(0)
    )
    await fold_days(store.sql, LATER)
    assert await store.windows() == {}
    restarted = Ledger(Postgres(dsn=store.dsn), "test restarted", SETTLING_S)
    memory = await restarted.memory()
    await restarted.close()
    until_s = memory.planned_until_s[str(TARGET)]
    assert until_s == {"ec2": NOON_S}
    assert due(TARGET, [grid], until_s, NOON_S + 299, "rev", 3600) == []
    (live,) = due(TARGET, [grid], until_s, NOON_S + 300, "rev", 3600)
    assert live.items[0].end_s == NOON_S + 300
    assert (await store.ledger.memory(before_s=NOON_S - 900)).planned_until_s == {
        str(TARGET): {"ec2": NOON_S - 900}
    }


async def test_a_newer_look_at_a_folded_window_opens_it_until_the_rows_prove_it_and_adds_nothing_to_its_day(
    proof: Proof,
) -> None:
    await proof.look(batch_of({"cpu": five(1, 2)}))
    await proof.seal()
    await fold_days(proof.sql, LATER)
    (before,) = await days(proof.store)
    await proof.look(batch_of({"cpu": five(1, 2)}, at_s=NOON_S + 1))  # older: nothing is asked of it
    assert await proof.states() == {}

    correction = batch_of({"cpu": five(1, 7)}, revision=1, at_s=NOON_S + 9_000)
    await proof.look(correction, land=True)
    assert await proof.states() == {-300: "landed"}
    assert (await proof.seal(NOON_S + 9_060)).sealed == 1
    await fold_days(proof.sql, LATER)
    (after,) = await days(proof.store)
    assert await proof.states() == {}
    unchanged = ("windows", "points", "digest", "declared_windows", "covered")
    assert {k: after[k] for k in unchanged} == {k: before[k] for k in unchanged}
    assert (before["relooked_at"], after["relooked_at"]) == (None, at(9_060))
    assert after["version"] > before["version"]


async def test_a_declared_window_that_gets_its_data_after_all_is_declared_no_more(proof: Proof) -> None:
    await proof.store.project(task_of(NOON_S - 600, NOON_S))
    await proof.sql.execute("UPDATE windows SET declared = 'abandoned', declared_at = $1", at(0))
    await fold_days(proof.sql, LATER)
    await proof.look(batch_of({"cpu": five(1, 2)}))
    assert (await proof.seal()).sealed == 1
    await fold_days(proof.sql, LATER)
    (day,) = await days(proof.store)
    assert (day["windows"], day["declared_windows"]) == (2, 1)
    left = await proof.sql.fetchval(
        "SELECT covered = $1::text::tstzmultirange FROM declared_days", multirange([(at(-600), at(-300))])
    )
    assert left is True


async def test_the_view_counts_folded_windows_as_before(store: Store) -> None:
    await sealed(store, *(-300 * n for n in range(1, 13)))
    await store.project(task_of(NOON_S, NOON_S + 600))
    await store.sql.execute(
        "UPDATE windows SET declared = 'expired', declared_at = $1 WHERE window_start = $2", at(0), at(300)
    )
    now = at(600)
    views = []
    for _ in range(2):
        for since in (at(-90_000), at(-1800)):
            (target,) = (await overview(store.sql, now, since)).targets
            views.append((target.windows, target.landed, target.sealed, target.gaps, target.fresh_until))
        views.append(await freshness(store.sql, now))  # type: ignore[arg-type]
        await fold_days(store.sql, LATER)
    assert views[:3] == views[3:]
    assert views[0] == (14, 12, 12, 0, at(0))
    assert views[1] == (8, 6, 6, 0, at(0))


# --- retention ------------------------------------------------------------------------------------------------


async def test_what_is_past_its_retention_goes_and_leaves_what_it_cost(store: Store) -> None:
    old, new = task_of(NOON_S - 86_400, NOON_S - 86_100), task_of(NOON_S - 300, NOON_S)
    await store.project(
        old,
        new,
        receipt_of(old, counts=[(NOON_S - 86_400, 7, 1)], batches=[b"a" * 16]),
        receipt_of(new, batches=[b"b" * 16]),
    )
    await store.sql.executemany(
        "INSERT INTO landed VALUES ('postgres', $1, $2, 't', 's', 1, 1, 0, 0, $3)",
        [(b"a" * 16, old.task_id, at(-86_000)), (b"b" * 16, new.task_id, at(0))],
    )
    await store.fold()
    await store.sql.execute("UPDATE tasks SET planned_at = tick")
    await store.sql.execute("UPDATE windows SET sealed_at = $1", at(0))
    before = await overview(store.sql, at(60), at(-200_000))
    assert await forget(store.sql, at(-3600)) == 3
    assert await forget(store.sql, at(-3600)) == 0
    for table in ("tasks", "looks", "landed"):
        assert await store.sql.fetchval(f"SELECT count(*) FROM {table}") == 1, table
    after = await overview(store.sql, at(60), at(-200_000))
    assert (after.looks, after.points_collected, after.metrics_billed) == (
        before.looks,
        before.points_collected,
        before.metrics_billed,
    )
    assert after.metrics_billed == 10


async def test_what_open_windows_and_unmarked_looks_need_stays_however_old(store: Store) -> None:
    task = task_of(NOON_S - 86_400, NOON_S - 86_100)
    await store.project(task, receipt_of(task, status=LookStatus.FAILED, batches=[b"a" * 16, b"b" * 16]))
    await store.sql.execute(
        "INSERT INTO landed VALUES ('postgres', $1, $2, 't', 's', 1, 1, 0, 0, $3)",
        b"a" * 16,
        task.task_id,
        at(-86_000),
    )
    await store.sql.execute("UPDATE tasks SET planned_at = tick")
    assert await forget(store.sql, at(0)) == 0
    assert await forget(store.sql, at(6 * 86_400)) == 1  # by then nobody waits for the task
    assert (
        await store.sql.fetchval("SELECT (SELECT count(*) FROM looks) + (SELECT count(*) FROM landed)") == 2
    )


async def test_a_task_whose_looks_go_is_not_announced_again(store: Store) -> None:
    task = task_of(NOON_S - 86_400, NOON_S - 86_100)
    await store.project(task, receipt_of(task))
    await store.fold()
    await store.sql.execute("UPDATE windows SET sealed_at = $1", at(0))
    await forget(store.sql, at(0))  # it was planned, by this process's clock, at noon
    assert await store.sql.fetchval("SELECT count(*) FROM looks") == 1
    assert (await store.ledger.memory()).unanswered == ()


async def test_a_year_of_a_thousand_targets_with_ten_services_stays_under_ten_gigabytes(store: Store) -> None:
    targets, services = 200, 10
    await store.sql.execute(
        "INSERT INTO sealed_days SELECT 'cloudwatch/' || (100000000000 + t) || '/eu-central-1', 'elasticache', d::date, 288, 0,"
        " 1440000, hashint8extended(t, 1), d, d + interval '1 day', d, 1, NULL,"
        " tstzmultirange(tstzrange(d, d + interval '1 day')) FROM generate_series(1, $1) AS t,"
        " generate_series('2026-01-01'::timestamptz, '2026-03-31', '1 day') AS d ORDER BY 3, 1",
        targets,
    )
    rows = await store.sql.fetchval("SELECT count(*) FROM sealed_days")
    size = await store.sql.fetchval("SELECT pg_total_relation_size('sealed_days')")
    assert rows == targets * 90
    a_year_bytes = size / rows * 365 * 1_000 * services
    assert a_year_bytes < 1.5e9


def test_days_take_any_order_of_windows() -> None:
    rng = random.Random(3)
    windows = [
        {
            "target": f"t{n % 2}", "service": "s", "day": DAY, "start": at(300 * n), "end": at(300 * n + 300), "closed_at": at(n),
            "declared": "expired" if n % 5 == 0 else None, "declared_before": None, "again": n % 7 == 0,
            "points": n, "digest": -n, "version": n,
        }
        for n in range(40)
    ]  # fmt: skip
    expected = days_of(windows)
    shuffled = rng.sample(windows, len(windows))
    for one, other in zip(days_of(shuffled), expected, strict=True):
        assert (one.target, one.windows, one.points, one.digest, one.version) == (
            other.target, other.windows, other.points, other.digest, other.version,
        )  # fmt: skip
        assert sorted(one.covered) == sorted(other.covered)
    assert sum(d.windows for d in expected) == sum(not w["again"] for w in windows)
