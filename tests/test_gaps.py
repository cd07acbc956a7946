"""Gaps: what is open past its deadline, why, and from where it could be healed; and what the consumers' metrics say of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from prometheus_client import REGISTRY
from rich.console import Console

from ingest.clock import ManualClock
from ingest.gaps import Filter, Gap, gaps, healable, open_windows, stretches
from ingest.model import LookStatus
from ingest.overview import GRACE_S
from ingest.schedule import Grid
from shard_config.model import Account, Config, ServiceProfile
from shard_config.price import Prices
from tests.test_ledger import NOON_S, OTHER, TARGET, Store, ledger_database, receipt_of, store, task_of
from tests.test_seal import Proof, batch_of, five, proof
from workers.gaps import COLUMNS, write
from workers.lifecycle import Lifecycle
from workers.upkeep import Upkeep

__all__ = ["ledger_database", "proof", "store"]  # the fixtures

EC2 = Grid("ec2", 300, 60, 600)
GRIDS = {TARGET: (EC2,), OTHER: (EC2,)}
DEADLINE_S = NOON_S + 600 + 300 + GRACE_S
"""Of the window that ends at noon."""
DAY_S = 86_400
A_GAP = Gap(str(TARGET), "ec2", NOON_S - 300, NOON_S, 1, "failed", "", 1, NOON_S)


async def found(store: Store, now_s: float = DEADLINE_S + 1, only: Filter | None = None) -> list[Gap]:
    now = datetime.fromtimestamp(now_s, UTC)
    return await gaps(store.sql, now, GRIDS, Prices(), kafka_keeps_s=7 * DAY_S, only=only or Filter())


async def test_a_window_is_a_gap_from_its_deadline_on_and_not_before(store: Store) -> None:
    await store.project(task_of(NOON_S - 300, NOON_S))
    assert await found(store, DEADLINE_S) == []
    (gap,) = await found(store, DEADLINE_S + 1)
    assert (gap.target, gap.service, gap.start_s, gap.end_s) == (str(TARGET), "ec2", NOON_S - 300, NOON_S)
    assert (gap.reason, gap.attempts, gap.heal_from) == ("no_receipt", 0, "cloudwatch")


async def test_sealed_and_declared_windows_are_no_gaps(proof: Proof) -> None:
    await proof.look(batch_of({"cpu": five(1)}))
    await proof.seal()
    await proof.store.project(task_of(NOON_S - 600, NOON_S - 300))
    await proof.sql.execute("UPDATE windows SET declared = 'abandoned' WHERE sealed_at IS NULL")
    assert await found(proof.store) == []


@pytest.mark.parametrize(
    "status", [LookStatus.FAILED, LookStatus.PARTIAL, LookStatus.FORBIDDEN, LookStatus.EXPIRED]
)
async def test_a_failed_look_is_the_reason_with_its_detail(store: Store, status: LookStatus) -> None:
    await store.project(receipt_of(task_of(NOON_S - 300, NOON_S), status=status, detail="because"))
    (gap,) = await found(store)
    assert (gap.reason, gap.detail, gap.attempts) == (status.value, "because", 1)


async def test_what_is_collected_and_has_not_landed_is_healed_from_kafka_and_later_from_s3(
    store: Store,
) -> None:
    await store.project(
        receipt_of(task_of(NOON_S - 300, NOON_S), observed_s=NOON_S + 600, batches=[b"a" * 16])
    )
    (gap,) = await found(store)
    assert (gap.reason, gap.heal_from, gap.usd) == ("not_landed", "kafka", 0)
    (gap,) = await found(store, NOON_S + 8 * DAY_S)
    assert (gap.reason, gap.heal_from, gap.usd) == ("not_landed", "s3", 0)


async def test_a_landed_window_that_nobody_looked_at_since_it_settled_says_so(store: Store) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    await store.project(receipt_of(task, observed_s=NOON_S + 1))
    await store.fold()
    assert (await found(store))[0].reason == "not_settled"
    await store.project(
        receipt_of(task, status=LookStatus.FAILED, detail="throttled", finished_s=NOON_S + 700)
    )
    assert [(g.reason, g.detail) for g in await found(store)] == [("failed", "throttled")]


async def test_an_unbalanced_window_has_its_numbers_and_is_healed_from_s3(proof: Proof) -> None:
    await proof.look(batch_of({"cpu": five(1, 2)}))
    (gap,) = await found(proof.store)
    assert (gap.reason, gap.heal_from) == ("not_checked", "nowhere")
    await proof.sql.execute("DELETE FROM samples WHERE value = 2")
    await proof.seal()
    (gap,) = await found(proof.store)
    assert (gap.reason, gap.heal_from) == ("unbalanced", "s3")
    assert gap.detail == "collected 2, dead 0; the store has 1 of that look or newer and 0 older: 1 too few"


@pytest.mark.parametrize("pause", [(TARGET.account, "ec2"), ("*", "ec2"), (TARGET.account, "*"), ("*", "*")])
async def test_a_pause_is_the_reason_before_all_others(store: Store, pause: tuple[str, str]) -> None:
    await store.project(task_of(NOON_S - 300, NOON_S))
    await store.sql.execute("INSERT INTO pauses VALUES ($1, $2, now(), 'why')", *pause)
    assert (await found(store))[0].reason == "paused"


async def test_neighbours_with_one_story_are_one_stretch_and_the_filters_choose(store: Store) -> None:
    await store.project(
        task_of(NOON_S - 1500, NOON_S),
        receipt_of(task_of(NOON_S - 900, NOON_S - 600), status=LookStatus.FAILED, detail="x"),
        task_of(NOON_S - 300, NOON_S, target=OTHER),
    )
    everything = await found(store)
    assert [(g.target, g.start_s - NOON_S, g.windows, g.reason) for g in everything] == [
        (str(TARGET), -1500, 2, "no_receipt"),
        (str(TARGET), -900, 1, "failed"),
        (str(TARGET), -600, 2, "no_receipt"),
        (str(OTHER), -300, 1, "no_receipt"),
    ]
    assert await found(store, only=Filter(region=OTHER.region)) == everything[3:]
    assert [
        g.windows for g in await found(store, only=Filter(NOON_S - 900, NOON_S - 300, region=TARGET.region))
    ] == [1, 1]
    assert await found(store, only=Filter(service="rds")) == []
    assert await found(store, only=Filter(account="000000000000")) == []


def test_stretches_do_not_depend_on_the_order_and_keep_the_most_attempts() -> None:
    windows = [
        replace(A_GAP, start_s=s, end_s=s + 300, attempts=s // 300, last_finished_s=s or None)
        for s in range(0, 1500, 300)
    ]
    (one,) = stretches(reversed(windows))
    assert (one.start_s, one.end_s, one.windows, one.attempts, one.last_finished_s) == (0, 1500, 5, 4, 1200)
    assert len(stretches([windows[0], windows[2]])) == 2


def heal(gap: Gap, grid: Grid | None = EC2, series: int | None = 500, now_s: int = DEADLINE_S) -> Gap:
    return healable(gap, grid, series, Prices(), now_s, 7 * DAY_S)


def test_the_source_is_priced_by_the_block_and_unknown_where_it_never_answered() -> None:
    assert heal(A_GAP).usd == Decimal("0.005")
    day = replace(A_GAP, start_s=NOON_S - DAY_S, windows=288)
    blocks = -(-DAY_S // EC2.block_s)
    assert Decimal("0.005") * blocks <= heal(day).usd <= Decimal("0.005") * (blocks + 1)  # type: ignore[operator]
    assert heal(A_GAP, series=None).usd is None


def test_what_the_source_keeps_no_longer_or_has_no_past_is_healed_from_nowhere() -> None:
    assert heal(A_GAP, now_s=NOON_S + 14 * DAY_S).heal_from == "cloudwatch"
    older = heal(A_GAP, now_s=NOON_S + 16 * DAY_S)
    assert (older.heal_from, older.how) == ("cloudwatch", "at 300 s")
    gone = heal(A_GAP, now_s=NOON_S + 456 * DAY_S)
    assert (gone.heal_from, gone.how) == ("nowhere", "CloudWatch keeps periods of 3600 s for 455 days")
    assert heal(A_GAP, Grid("node", 30, 30, 0, has_past=False)).how == "an endpoint has no past"
    assert heal(A_GAP, None).how == "not in the configuration"


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_each_format_has_every_stretch(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    some = [heal(A_GAP), heal(replace(A_GAP, start_s=0, end_s=300, detail="a,b"), None)]
    out = io.StringIO()
    write(some, form, Console(file=out, width=200))
    text = capsys.readouterr().out + out.getvalue()
    if form == "csv":
        rows: Sequence[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
    elif form == "json":
        rows = json.loads(text)
    else:
        assert "2 windows in 2 stretches" in text
        assert "$0.0050" in text
        return
    assert [tuple(r) for r in rows] == [COLUMNS, COLUMNS]
    assert (rows[0]["from"], rows[0]["to"], rows[0]["usd"]) == (
        "2026-01-01T11:55:00Z",
        "2026-01-01T12:00:00Z",
        "0.005",
    )
    assert (rows[1]["detail"], rows[1]["usd"]) == ("a,b", "")


# --- the consumers' loop --------------------------------------------------------------------------------------


async def test_open_windows_are_counted_by_reason_once_they_have_ended(store: Store) -> None:
    await store.project(task_of(NOON_S - 900, NOON_S + 600))
    seen = await open_windows(store.sql, datetime.fromtimestamp(DEADLINE_S - 299, UTC))
    assert seen.by_reason == {"no_receipt": 2, "in_time": 3}
    assert seen.oldest_end == datetime.fromtimestamp(NOON_S - 600, UTC)


def _sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


async def test_a_turn_of_the_loop_marks_seals_folds_and_says_how_the_ledger_stands(proof: Proof) -> None:
    profile = ServiceProfile(service="ec2", namespace="AWS/EC2")
    account = Account(id=TARGET.account, regions=(TARGET.region,), services=("ec2",))
    config = Config(accounts=(account,), services=(profile,))
    clock = ManualClock(DEADLINE_S)
    upkeep = Upkeep(proof.store.ledger, config, clock)
    await proof.store.project(task_of(NOON_S - 900, NOON_S - 600))
    await proof.look(batch_of({"cpu": five(1, 2)}))
    await upkeep.turn(Lifecycle())
    assert await proof.states() == {-900: "planned", -300: "sealed"}
    assert _sample("headgate_open_windows", reason="no_receipt") == 1
    assert _sample("headgate_oldest_open_window_seconds") == DEADLINE_S - (NOON_S - 600)
    assert _sample("headgate_target_freshness_seconds", target=str(TARGET)) == DEADLINE_S - NOON_S
    await proof.sql.execute("UPDATE windows SET sealed_at = sealed_at - interval '2 hours'")
    clock.advance(61)
    await upkeep.turn(Lifecycle())
    assert await proof.states() == {-900: "planned"}
    assert len(await proof.days()) == 1
    await proof.sql.execute("DELETE FROM windows")
    clock.advance(61)
    await upkeep.turn(Lifecycle())
    assert _sample("headgate_oldest_open_window_seconds") == 0
    assert _sample("headgate_open_windows", reason="no_receipt") is None
