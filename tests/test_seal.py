"""Sealing and folding on a real PostgreSQL: looks land through the real sink, and whatever happens to the store's rows is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import asyncpg
import numpy as np
import pytest

from ingest.balance import Claim, imbalance, put_aside, signed, stored_counts
from ingest.clock import ManualClock
from ingest.model import (
    Batch,
    BatchId,
    LookStatus,
    Series,
    SeriesKey,
    Target,
    WindowCount,
    digest_of,
    merge_counts,
    series_ids,
    window_counts,
)
from ingest.ports import Landable
from ingest.seal import RECHECK_S, Scope, Sealing, Tally, scopes_of, seal
from ingest.sinks.postgres import PostgresSink
from ingest.sinks.rows_back import ROW
from shard_config.model import Account, Config, ExpositionJob, MetricProfile, Postgres, ServiceProfile
from tests.test_ledger import NOON_S, OTHER, TARGET, Store, ledger_database, receipt_of, store, task_of

__all__ = ["ledger_database", "store"]  # the fixtures

SCOPES = {("cloudwatch", "ec2"): Scope("AWS/EC2", 60), ("cloudwatch", "rds"): Scope("AWS/RDS", 60)}
SETTLED_S = NOON_S + 600
PERIOD_S = 60


def batch_of(
    points: dict[str, dict[int, float]],
    *,
    at_s: float = SETTLED_S,
    target: Target = TARGET,
    namespace: str = "AWS/EC2",
    revision: int = 0,
    grid_s: int = 300,
) -> Batch:
    """A batch of a look: metric → seconds from noon → value."""
    series = tuple(
        Series(SeriesKey(target.account, target.region, namespace, m, (), "Average", PERIOD_S))
        for m in points
    )
    return Batch(
        task_id="0" * 32,
        target=target,
        service={"AWS/EC2": "ec2", "AWS/RDS": "rds"}[namespace],
        observed_at_ms=int(at_s * 1000),
        revision=revision,
        grid_s=grid_s,
        series=series,
        counts=np.array([len(p) for p in points.values()], np.int32),
        timestamps_s=np.array([NOON_S + t for p in points.values() for t in p], np.int64),
        values=np.array([v for p in points.values() for v in p.values()], np.float64),
        ids=series_ids(series),
    )


def five(*values: float, from_s: int = -300) -> dict[int, float]:
    """A point a minute."""
    return {from_s + PERIOD_S * i: v for i, v in enumerate(values)}


def counts_of(*batches: Batch) -> list[WindowCount]:
    return list(
        merge_counts(
            [c for b in batches for c in window_counts(b.point_ids(), b.timestamps_s, b.values, b.grid_s)]
        )
    )


class Proof:
    """A store with its ledger and the real sink, at a time that the test moves."""

    def __init__(self, store: Store, sink: PostgresSink) -> None:
        self.store = store
        self.sink = sink
        self.sql = store.sql
        self.number = 0

    async def look(
        self,
        *batches: Batch,
        span: tuple[int, int] = (-300, 0),
        land: bool = True,
        observed_s: float | None = None,
        status: LookStatus = LookStatus.COMPLETE,
        target: Target = TARGET,
        service: str = "ec2",
    ) -> None:
        """A complete look at [span) whose batches are these: receipt, landing, marking."""
        self.number += 1
        ids = [self.number.to_bytes(8, "big") + bytes([i]) * 8 for i in range(len(batches))]
        task = replace(
            task_of(NOON_S + span[0], NOON_S + span[1], target=target, service=service),
            task_id=f"{self.number:032x}",
        )
        if observed_s is None:
            observed_s = min(b.observed_at_ms for b in batches) / 1000
        receipt = receipt_of(
            task,
            observed_s=int(observed_s),
            status=status,
            counts=[(c.start_s, c.points, c.digest) for c in counts_of(*batches)],
            batches=ids,
        )
        await self.store.project(receipt)
        if land:
            await self.land(*(Landable(BatchId(i), b, 0) for i, b in zip(ids, batches, strict=True)))

    async def land(self, *landables: Landable) -> None:
        await self.sink.land([], landables)
        await self.store.fold()

    async def seal(self, now_s: float = SETTLED_S + 60) -> Sealing:
        return await seal(self.sql, SCOPES, datetime.fromtimestamp(now_s, UTC))

    async def states(self) -> dict[int, str]:
        return await self.store.states()

    async def why(self, start: int = -300) -> str:
        return str((await self.store.windows())[start]["unbalanced"])

    async def days(self) -> list[dict[str, Any]]:
        return [
            dict(r) for r in await self.sql.fetch("SELECT * FROM sealed_days ORDER BY target, service, day")
        ]


@pytest.fixture
async def proof(store: Store) -> AsyncIterator[Proof]:
    sink = await PostgresSink.connect(Postgres(dsn=store.dsn), clock=ManualClock(NOON_S))
    try:
        yield Proof(store, sink)
    finally:
        await sink.close()


# --- the balance ----------------------------------------------------------------------------------------------


async def test_a_window_is_sealed_when_the_stores_rows_are_what_the_look_says(proof: Proof) -> None:
    await proof.look(batch_of({"cpu": five(1, 2, 3, 4, 5), "net": five(9)}))
    assert await proof.states() == {-300: "landed"}
    assert await proof.seal() == Sealing(windows=1, sealed=1, rows=6)
    assert await proof.states() == {-300: "sealed"}
    assert await proof.seal() == Sealing(0, 0, 0)


async def test_a_look_before_the_settling_time_seals_nothing_and_one_at_it_does(proof: Proof) -> None:
    await proof.look(batch_of({"cpu": five(1, 2)}, at_s=SETTLED_S - 1))
    assert await proof.seal() == Sealing(0, 0, 0)
    await proof.look(batch_of({"cpu": five(1, 2)}, at_s=SETTLED_S))
    assert (await proof.seal()).sealed == 1


async def test_an_empty_complete_look_seals_a_window_without_rows_and_none_with(proof: Proof) -> None:
    await proof.look(observed_s=SETTLED_S)
    assert (await proof.seal()).sealed == 1
    await proof.look(batch_of({"cpu": five(1, from_s=-600)}), span=(-600, -300), observed_s=SETTLED_S)
    await proof.sql.execute("UPDATE windows SET points = 0, digest = 0 WHERE sealed_at IS NULL")
    assert (await proof.seal()).sealed == 0


MUTANTS = {
    "a row is gone": "DELETE FROM samples WHERE ctid = (SELECT ctid FROM samples ORDER BY ts DESC LIMIT 1)",
    "all rows are gone": "DELETE FROM samples",
    "a value is changed by one bit": "UPDATE samples SET value = 1.0000000000000002 WHERE value = 1",
    "two series' values are exchanged": "UPDATE samples SET value = 5 - value WHERE ts = $1",
    "a timestamp moved within the window": "UPDATE samples SET ts = ts + interval '1 second' WHERE ts = $1",
    "a timestamp moved out of the window": "UPDATE samples SET ts = ts + interval '1 hour' WHERE ts = $1",
    "a version is from before the look": "UPDATE samples SET version = version - 1 WHERE ts = $1",
    "a row is another series'": "UPDATE samples SET series = (SELECT id FROM series WHERE metric = 'other') WHERE ts = $1"
    " AND series = (SELECT id FROM series WHERE metric = 'cpu')",
    "a row too many": "INSERT INTO samples SELECT ts + interval '7 seconds', series, value, version FROM samples WHERE value = 1",
}


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_whatever_is_done_to_the_rows_of_a_look_keeps_its_window_open(
    proof: Proof, mutant: str
) -> None:
    await proof.look(batch_of({"other": {-900: 0.0}}, at_s=NOON_S - 700), span=(-900, -600))
    await proof.look(batch_of({"cpu": five(1, 2, 3, 0, 0), "net": five(4, 3, 2, 0, 0)}))
    arguments = [datetime.fromtimestamp(NOON_S - 300, UTC)] if "$1" in MUTANTS[mutant] else []
    changed = await proof.sql.execute(MUTANTS[mutant], *arguments)
    assert int(changed.split()[-1]) > 0
    done = await proof.seal()
    assert (done.windows, done.sealed) == (1, 0)
    assert (await proof.states())[-300] == "unbalanced"
    assert (await proof.why()).startswith("collected 10, dead 0; the store has ")


async def test_every_single_row_counts(proof: Proof) -> None:
    await proof.look(batch_of({f"m{i}": five(*range(i, i + 5)) for i in range(4)}))
    rows = await proof.sql.fetch("DELETE FROM samples RETURNING *")
    insert = "INSERT INTO samples VALUES ($1, $2, $3, $4)"
    for left_out in range(len(rows)):
        await proof.sql.execute("TRUNCATE samples")
        await proof.sql.executemany(insert, [tuple(r) for i, r in enumerate(rows) if i != left_out])
        await proof.sql.execute("UPDATE windows SET checked_at = NULL")
        assert (await proof.seal()).sealed == 0
        assert (
            await proof.why()
            == "collected 20, dead 0; the store has 19 of that look or newer and 0 older: 1 too few"
        )
    await proof.sql.execute("INSERT INTO samples VALUES ($1, $2, $3, $4)", *rows[-1])
    await proof.sql.execute("UPDATE windows SET checked_at = NULL")
    assert (await proof.seal()).sealed == 1


async def test_rows_older_than_the_look_that_it_no_longer_shows_contradict_nothing(proof: Proof) -> None:
    await proof.look(batch_of({"cpu": five(1, 2, 3), "gone": five(7)}, at_s=NOON_S))
    await proof.look(batch_of({"cpu": five(1, 2, 4)}))
    assert (await proof.seal()).sealed == 1
    assert (await proof.store.windows())[-300]["points"] == 3


async def test_the_later_of_two_looks_is_the_one_to_seal_on(proof: Proof) -> None:
    await proof.look(batch_of({"cpu": five(1, 2, 3)}))
    await proof.look(batch_of({"cpu": five(1, 2, 4, 5)}, at_s=SETTLED_S + 300))
    assert (await proof.seal()).sealed == 1
    assert (await proof.store.windows())[-300]["points"] == 4


async def test_rows_of_a_newer_look_that_is_not_complete_keep_a_window_open_only_where_they_say_something_else(
    proof: Proof,
) -> None:
    await proof.look(batch_of({"cpu": five(1, 2), "net": five(3)}))
    await proof.look(batch_of({"cpu": five(1, 2)}, at_s=SETTLED_S + 300), status=LookStatus.PARTIAL)
    assert (await proof.seal()).sealed == 1
    assert (await proof.store.windows())[-300]["landed_as_of"] == datetime.fromtimestamp(SETTLED_S, UTC)

    first = {"span": (-600, -300)}
    await proof.look(batch_of({"cpu": five(1, 2, from_s=-600)}), **first)  # type: ignore[arg-type]
    other = batch_of({"cpu": five(1, 9, from_s=-600)}, at_s=SETTLED_S + 300)
    await proof.look(other, status=LookStatus.PARTIAL, **first)  # type: ignore[arg-type]
    assert (await proof.seal()).sealed == 0
    assert "as many, but not the same" in await proof.why(-600)
    again = batch_of({"cpu": five(1, 9, from_s=-600)}, at_s=SETTLED_S + 600)
    await proof.look(again, **first)  # type: ignore[arg-type]
    assert (await proof.seal()).sealed == 1


async def test_a_sealed_window_is_proved_anew_when_a_newer_look_lands_on_it(proof: Proof) -> None:
    await proof.look(batch_of({"cpu": five(1, 2)}))
    await proof.seal()
    await proof.look(batch_of({"cpu": five(1, 3)}, at_s=SETTLED_S + 300))
    assert await proof.states() == {-300: "landed"}
    await proof.seal()
    assert await proof.states() == {-300: "sealed"}


async def test_a_correction_wins_over_later_looks_and_the_window_is_sealed_on_it(proof: Proof) -> None:
    await proof.look(batch_of({"cpu": five(5, 6)}, revision=1))
    await proof.look(batch_of({"cpu": five(1, 2)}, at_s=SETTLED_S + 300))
    assert (await proof.seal()).sealed == 1
    corrected = batch_of({"cpu": five(5, 6)})
    expected = digest_of(corrected.point_ids(), corrected.timestamps_s, corrected.values)
    assert (await proof.store.windows())[-300]["digest"] == signed(expected)


async def test_batches_of_one_look_that_were_answered_at_different_times_are_one_look(proof: Proof) -> None:
    await proof.look(
        batch_of({"cpu": five(1, 2)}, at_s=SETTLED_S + 4), batch_of({"net": five(3)}, at_s=SETTLED_S + 1)
    )
    assert (await proof.seal()).sealed == 1


async def test_other_targets_and_services_rows_are_not_counted(proof: Proof) -> None:
    points = {"cpu": five(1, 2, 3)}
    await proof.look(batch_of(points))
    await proof.look(batch_of(points, target=OTHER), target=OTHER)
    await proof.look(batch_of(points, namespace="AWS/RDS"), service="rds")
    assert await proof.seal() == Sealing(windows=3, sealed=3, rows=9)


async def test_points_put_aside_on_the_way_are_taken_off_the_receipt_by_window(proof: Proof) -> None:
    whole = batch_of(
        {"cpu": {-600: 1.0, -540: float("inf"), -300: 2.0}, "net": {-600: float("nan"), -300: 3.0}}
    )
    left = batch_of({"cpu": {-600: 1.0, -300: 2.0}, "net": {-300: 3.0}})
    await proof.look(whole, span=(-600, 0), land=False)
    batch_id = BatchId((1).to_bytes(8, "big") + bytes(8))
    await proof.land(Landable(batch_id, left, 2, put_aside(whole, left)))
    assert (await proof.seal()).sealed == 2
    rows = await proof.store.windows()
    assert {s: (r["points"], r["dead_points"]) for s, r in rows.items()} == {-600: (1, 2), -300: (2, 0)}


async def test_an_unbalanced_window_is_read_again_after_a_while_and_when_another_look_lands(
    proof: Proof,
) -> None:
    await proof.look(batch_of({"cpu": five(1, 2)}))
    row = await proof.sql.fetchrow("DELETE FROM samples WHERE value = 2 RETURNING *")
    now_s = SETTLED_S + 60
    assert (await proof.seal(now_s)).windows == 1
    assert (await proof.seal(now_s + RECHECK_S)).windows == 0
    await proof.sql.execute("INSERT INTO samples VALUES ($1, $2, $3, $4)", *row)
    assert (await proof.seal(now_s + RECHECK_S + 1)).sealed == 1


async def test_a_replay_of_the_same_batch_brings_back_what_was_lost(proof: Proof) -> None:
    batch = batch_of({"cpu": five(1, 2, 3)})
    await proof.look(batch)
    landable = Landable(BatchId((1).to_bytes(8, "big") + bytes(8)), batch, 0)
    await proof.sql.execute("DELETE FROM samples WHERE value > 1")
    await proof.land(landable)
    assert (await proof.seal()).sealed == 0
    await proof.land(landable)
    assert (await proof.seal(SETTLED_S + 61 + RECHECK_S)).sealed == 1


async def test_days_long_windows_are_sealed_by_lookups_and_wide_spans_by_several_passes(proof: Proof) -> None:
    scopes = {("cloudwatch", "ec2"): Scope("AWS/EC2", 86_400)}
    day_s = NOON_S - 43_200
    batch = batch_of({"size": {-43_200: 5.0}}, at_s=NOON_S + 86_400 + 600, grid_s=86_400)
    task = task_of(day_s, day_s + 86_400)
    (item,) = task.items
    task = replace(task, items=(replace(item, grid_s=86_400),))
    await proof.store.project(
        receipt_of(
            task,
            observed_s=NOON_S + 86_400 + 600,
            counts=[(c.start_s, c.points, c.digest) for c in counts_of(batch)],
            batches=[b"d" * 16],
        )
    )
    await proof.look(batch_of({"other": five(1, 2, 3)}, at_s=NOON_S), observed_s=NOON_S)
    await proof.land(Landable(BatchId(b"d" * 16), batch, 0))
    done = await seal(proof.sql, scopes, datetime.fromtimestamp(NOON_S + 90_000, UTC))
    assert done == Sealing(windows=1, sealed=1, rows=1)


async def test_while_one_process_seals_another_has_nothing_to_do(proof: Proof) -> None:
    await proof.look(batch_of({"cpu": five(1)}))
    other = await asyncpg.connect(proof.store.dsn)
    try:
        async with other.transaction():
            await other.execute("SELECT pg_advisory_xact_lock($1)", 0x68656164676178)
            assert await proof.seal() == Sealing(0, 0, 0)
        assert (await proof.seal()).sealed == 1
    finally:
        await other.close()


async def test_a_window_that_a_newer_look_reached_while_its_rows_were_read_is_not_sealed_by_them(
    proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    await proof.look(batch_of({"cpu": five(1)}))

    def meanwhile(*arguments: Any) -> str | None:
        landing.append(asyncio.ensure_future(proof.look(batch_of({"cpu": five(2)}, at_s=SETTLED_S + 300))))
        return imbalance(*arguments)

    landing: list[asyncio.Future[None]] = []
    connection = await asyncpg.connect(proof.store.dsn)
    monkeypatch.setattr("ingest.seal.imbalance", meanwhile)
    try:
        # The UPDATE finds another look's version: whichever comes first, what is sealed is what was read.
        await seal(connection, SCOPES, datetime.fromtimestamp(SETTLED_S + 60, UTC))
        await asyncio.gather(*landing)
    finally:
        monkeypatch.undo()
        await connection.close()
    row = (await proof.store.windows())[-300]
    assert (row["sealed_at"], row["landed_as_of"]) == (None, datetime.fromtimestamp(SETTLED_S + 300, UTC))
    assert (await proof.seal()).sealed == 1


def test_the_imbalance_has_the_numbers() -> None:
    claim = Claim("t", "s", 0, 300, 1, points=3, digest=7, dead_points=2)
    assert imbalance(claim, 3, 7, 9) is None
    assert imbalance(claim, 3, 8, 0) == (
        "collected 5, dead 2; the store has 3 of that look or newer and 0 older: as many, but not the same"
    )
    assert imbalance(claim, 4, 7, 1) == (
        "collected 5, dead 2; the store has 4 of that look or newer and 1 older: 1 too many"
    )


def test_what_was_put_aside_of_several_batches_is_added_up() -> None:
    counts = stored_counts([(0, 5, 100), (300, 2, 2**64 - 1)], [(0, 1, 150), (0, 1, 10), (300, 2, 2**64 - 1)])
    assert counts == {0: (3, 2**64 - 60, 2), 300: (0, 0, 2)}


def test_a_tally_does_not_depend_on_how_the_rows_come() -> None:
    rng = np.random.default_rng(7)
    claims = [Claim("t", "s", s, s + 300, 50, 0, 0, 0) for s in range(0, 3000, 300)]
    scopes = np.array([i % 2 for i in range(len(claims))], np.int64)
    rows = np.zeros(4_000, ROW)
    rows["n"] = rng.integers(0, 3, len(rows))
    rows["ts_us"] = (rng.integers(-500, 3_500, len(rows)) - 946_684_800) * 1_000_000
    rows["series"] = rng.integers(0, 2**63, (len(rows), 2))
    rows["value"] = rng.normal(size=len(rows))
    rows["version"] = rng.integers(0, 100, len(rows))
    whole, pieces = Tally(scopes, claims), Tally(scopes, claims)
    whole.add(rows)
    for some in np.array_split(rng.permutation(rows), 17):
        pieces.add(some)
    times_s = rows["ts_us"].astype(np.int64) // 1_000_000 + 946_684_800
    for i, claim in enumerate(claims):
        mine = (rows["n"] == scopes[i]) & (times_s >= claim.start_s) & (times_s < claim.end_s)
        new = mine & (rows["version"] >= 50)
        assert (whole.points[i], whole.older[i]) == (new.sum(), mine.sum() - new.sum())
        ids, values = rows["series"][new].astype(np.uint64), rows["value"][new].astype(np.float64)
        assert whole.digests[i] == np.uint64(digest_of(ids, times_s[new], values))
    assert np.array_equal(whole.digests, pieces.digests)
    assert np.array_equal(whole.points, pieces.points)


def profile_of(
    name: str, namespace: str, period_s: int = 60, *metrics: str, stat: str = "Average"
) -> ServiceProfile:
    wanted = tuple(MetricProfile(name=m, statistics=(stat,)) for m in metrics) or "all"
    return ServiceProfile(
        service=name,
        namespace=namespace,
        period_s=period_s,
        poll_interval_s=max(300, period_s),
        metrics=wanted,
        statistics=(stat,),
    )


def test_services_that_share_a_namespace_are_told_apart_by_period_metrics_and_statistics() -> None:
    config = Config(
        accounts=(Account(id="1" * 12, regions=("eu-west-1",), services=("ec2", "rds")),),
        exposition=(ExpositionJob(name="node", account="a", region="b", endpoints=("http://x:1/m",)),),
        services=(
            profile_of("ec2", "N", 60, "cpu"),
            profile_of("ec2-slow", "N", 300),
            profile_of("rds", "R", 60, "x"),
        ),
    )
    assert scopes_of(config) == {
        ("exposition", "node"): Scope("node", 30),
        # At 300 s ec2-slow polls the same metric: those rows are its own.
        ("cloudwatch", "ec2"): Scope("N", 60, (60, 3600), ("cpu/Average",)),
        ("cloudwatch", "ec2-slow"): Scope("N", 300, (300, 3600), ("*/Average",)),
        ("cloudwatch", "rds"): Scope("R", 60),
    }


@pytest.mark.parametrize(
    ("other", "periods_s"),
    [
        (profile_of("slow", "N", 300, "mem"), (60, 300, 3600)),
        (profile_of("slow", "N", 300, "cpu", stat="Sum"), (60, 300, 3600)),
        (profile_of("slow", "N", 300, stat="Sum"), (60, 300, 3600)),
        (profile_of("slow", "N", 300, "mem", "cpu"), (60, 3600)),
        (profile_of("slow", "N", 3600), (60, 300)),
    ],
)
def test_coarser_periods_are_a_services_own_unless_another_polls_the_same_metrics_at_them(
    other: ServiceProfile, periods_s: tuple[int, ...]
) -> None:
    services = (profile_of("ec2", "N", 60, "cpu"), other)
    account = Account(id="1" * 12, regions=("eu-west-1",), services=("ec2", "slow"))
    scopes = scopes_of(Config(accounts=(account,), services=services))
    assert scopes["cloudwatch", "ec2"].periods_s == periods_s


async def test_two_services_of_one_namespace_both_backfilled_at_300_s_are_sealed_each_on_its_own_rows(
    proof: Proof,
) -> None:
    """After 20 days CloudWatch has both at 300 s only, and "ec2", which is polled at 60 s, was asked at that."""
    services = (
        profile_of("ec2", "AWS/EC2", 60, "cpu"),
        profile_of("rds", "AWS/EC2", 300, "disk", "cpu", stat="Sum"),
    )
    account = Account(id=TARGET.account, regions=(TARGET.region,), services=("ec2", "rds"))
    scopes = scopes_of(Config(accounts=(account,), services=services))

    def coarse(service: str, stat: str, points: dict[str, float]) -> Batch:
        batch = batch_of({metric: {-300: value} for metric, value in points.items()})
        series = tuple(replace(one, key=replace(one.key, stat=stat, period_s=300)) for one in batch.series)
        return replace(batch, service=service, series=series, ids=series_ids(series))

    await proof.look(coarse("ec2", "Average", {"cpu": 1.0}))
    await proof.look(coarse("rds", "Sum", {"disk": 2.0, "cpu": 5.0}), service="rds")
    done = await seal(proof.sql, scopes, datetime.fromtimestamp(SETTLED_S + 60, UTC))

    assert (done.windows, done.sealed, done.rows) == (2, 2, 3)
