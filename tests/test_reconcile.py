"""AWS's bill against the ledger: the arithmetic, what is inferred, and end to end on the simulated AWS and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import asyncpg
import pytest

from ingest import charges
from ingest.cur import Bill, reads
from ingest.model import CONTINUED, LookStatus, Outcome, Receipt, ReceiptItem, TaskItem
from ingest.reconcile import READINGS, Asked, Reading, Reconciled, asked_of, infer, reconcile, whole_days
from ingest.sinks.migrate import migrate
from ingest.sources.cloudwatch import CloudWatchSource
from shard_config.load import loads
from shard_config.model import MetricProfile, Postgres, ServiceProfile
from shard_config.price import Prices
from tests.cloudwatch_rig import CLOCK, REGION, config_of, item_of, looked, target_of
from tests.cur_scene import Line, at, metrics, report, requests
from workers import simulator
from workers.cli import main
from workers.simulated.faults import Faults
from workers.world import World, account_ids

A, B = "012345678901", "123456789012"
DAYS = [date(2026, 11, n) for n in (1, 2, 3)]
CONFIGURED = Reading(once=False, again=True)


def bill_of(*lines: Line) -> Bill:
    return reads(report(lines).splitlines(keepends=True))


def asked(account: str = A, day: int = 1, n: int = 1000, **more: int) -> Asked:
    """Two statistics of every metric."""
    continued = Decimal(more.pop("continued", 0))
    return Asked(account, date(2026, 11, day), Decimal(n), Decimal(n) / 2, continued, continued / 2, **more)


def reconciled(bill: Bill, *ours: Asked) -> Reconciled:
    return reconcile(bill, ours, CONFIGURED, Prices(), (DAYS[0], DAYS[-1] + timedelta(days=1)))


# --- the comparison -----------------------------------------------------------------------------------------------


def test_what_the_bill_has_beyond_ours_and_what_is_in_doubt_is_unattributed() -> None:
    found = reconciled(bill_of(metrics(A, at(1), 1500), requests(A, at(1), 9)), asked(in_doubt=100, lists=7))
    (row,) = found.rows
    assert (row.billed, row.ledger, row.unattributed, row.excess) == (1500, 1000, 400, 0)
    assert (row.lists_billed, row.lists_ledger) == (9, 7)
    assert (row.billed_usd, row.ledger_usd) == (Decimal("0.015"), Decimal("0.01"))
    assert found.usd_per_1000_metrics == Decimal("0.01")
    assert found.error(alone=False) == 0
    assert found.error(alone=True) == Decimal(400) / 1500


def test_a_ledger_that_has_more_than_the_bill_is_an_error() -> None:
    found = reconciled(bill_of(metrics(A, at(1), 900)), asked())
    assert found.total("excess") == 100
    assert found.error(alone=False) == Decimal(100) / 900


def test_a_day_that_the_bill_lacks_is_all_excess_and_one_that_the_ledger_lacks_all_unattributed() -> None:
    found = reconciled(bill_of(metrics(A, at(2), 70)), asked())
    assert [(r.day.day, r.excess, r.unattributed) for r in found.rows] == [(1, 1000, 0), (2, 0, 70)]
    assert reconciled(bill_of(), asked()).error(alone=False) == 1


def test_accounts_that_headgate_never_asked_are_counted_apart() -> None:
    found = reconciled(bill_of(metrics(A, at(1), 1000), metrics(B, at(1), 5000)), asked())
    assert [r.account for r in found.rows] == [A]
    assert (found.others, found.others_usd) == (1, Decimal("0.05"))


@pytest.mark.parametrize(("last", "to_day"), [(at(2, 23), 3), (at(2, 22), 2)])
def test_a_day_that_is_not_over_in_the_bill_is_left_out(last: object, to_day: int) -> None:
    lines = [metrics(A, at(1), 1), replace(metrics(A, at(1), 1), start=last)]
    assert whole_days(bill_of(*lines)) == (date(2026, 11, 1), date(2026, 11, to_day))
    assert whole_days(bill_of(lines[0])) is None


# --- the readings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", READINGS)
def test_both_switches_are_inferred_from_a_bill_by_any_reading(truth: Reading) -> None:
    ours = [asked(A, day, 1000 * day, continued=100) for day in (1, 2, 3)]
    bill = bill_of(*(metrics(A, at(a.day.day), int(a.by(truth))) for a in ours))
    found = infer(bill, ours, CONFIGURED)
    assert (found.once, found.again, found.reading) == (*truth, truth)


@pytest.mark.parametrize("truth", READINGS)
def test_other_callers_on_some_days_do_not_hide_the_reading(truth: Reading) -> None:
    ours = [asked(A, day, 1000, continued=100) for day in (1, 2)] + [asked(B, 1, 500, continued=60)]
    others = {(A, 1): 77, (B, 1): 0, (A, 2): 0}
    bill = bill_of(
        *(metrics(a.account, at(a.day.day), int(a.by(truth)) + others[a.account, a.day.day]) for a in ours)
    )
    assert infer(bill, ours, CONFIGURED).reading == truth


def test_where_others_call_every_day_the_data_cannot_tell_and_the_configured_reading_stays() -> None:
    ours = [asked(A, day) for day in (1, 2, 3)]
    found = infer(bill_of(*(metrics(A, at(day), 5000 + 100 * day) for day in (1, 2, 3))), ours, CONFIGURED)
    assert (found.once, found.reading) == (None, CONFIGURED)
    assert "none fits by one reading alone" in found.evidence[0]


def test_a_reading_that_is_too_dear_is_no_evidence_for_the_other() -> None:
    """Else a ledger that counts too much would be explained away."""
    ours = [asked(A, day) for day in (1, 2, 3)]
    found = infer(bill_of(*(metrics(A, at(day), 700 + day) for day in (1, 2, 3))), ours, CONFIGURED)
    assert (found.once, found.reading) == (None, CONFIGURED)
    assert "by the configured reading the ledger has more than the bill on 3" in found.evidence[0]


def test_a_reading_that_fits_one_day_and_is_too_dear_on_others_is_not_believed() -> None:
    bill = bill_of(metrics(A, at(1), 1000), metrics(A, at(2), 600), metrics(A, at(3), 600))
    assert infer(bill, [asked(A, day) for day in (1, 2, 3)], CONFIGURED).once is None


def test_one_statistic_a_metric_and_no_continuation_pages_tell_nothing() -> None:
    ours = [Asked(A, DAYS[0], Decimal(1000), Decimal(1000))]
    found = infer(bill_of(metrics(A, at(1), 1000)), ours, CONFIGURED)
    assert (found.once, found.again) == (None, None)
    assert ["no metric was asked" in found.evidence[0], "no continuation page" in found.evidence[1]] == [
        True,
        True,
    ]


def test_midnight_does_not_refute_a_reading() -> None:
    """A poll of 288 is counted on the other side of midnight by AWS."""
    ours = [asked(A, 1, 288_000), asked(A, 2, 288_000)]
    bill = bill_of(metrics(A, at(1), 287_000), metrics(A, at(2), 289_000))
    assert infer(bill, ours, CONFIGURED).once is False


# --- what the ledger says -----------------------------------------------------------------------------------------


def test_charges_are_of_the_account_that_is_billed_and_shares_of_the_series_that_landed() -> None:
    config = loads(
        f"""
accounts:
  - {{id: "{A}", regions: [eu-west-1], services: [shop, rest]}}
  - {{id: "{B}", regions: [eu-west-1], services: [shop], via: "{A}"}}
services:
  shop: {{namespace: Shop, statistics: [Average, Maximum]}}
  rest: {{namespace: Rest, statistics: [Average, Maximum]}}
""",
        "headgate.yaml",
        {},
    )  # fmt: skip
    rows = [
        {"target": f"cloudwatch/{account}/eu-west-1", "day": DAYS[0], "service": service, "billed": 110, "in_doubt": 1, "continued": 10, "lists": 2}
        for account, service in ((A, "shop"), (A, "rest"), (B, "shop"))
    ]  # fmt: skip
    shares = {(A, "eu-west-1", "Shop"): Decimal("0.6"), (B, "eu-west-1", "Shop"): Decimal(1)}
    assert asked_of(rows, shares, config) == [
        Asked(A, DAYS[0], Decimal(300), Decimal(60 + 50 + 100), Decimal(30), Decimal(6 + 5 + 10), 3, 6)
    ]


# --- end to end ---------------------------------------------------------------------------------------------------

SHOP = ServiceProfile(
    service="ec2",
    namespace="AWS/EC2",
    metrics=(MetricProfile(name="CPUUtilization", statistics=("Average", "Maximum")),),
)
ACCOUNTS = account_ids(2)


def receipt_of(outcome: Outcome, item: TaskItem, account: str, day: int) -> Receipt:
    done = ReceiptItem(item, outcome, 0, (), ())
    at_ms = int(at(day, 12).timestamp() * 1000)
    return Receipt(f"{account}-{day}", target_of(account), "e", item.end_s, at_ms, at_ms, "", (done,))


async def two_days(dsn: str, bill_pages: bool) -> list[Line]:
    """Two days of looks with continuation pages into the ledger, beside another caller in the second account; the bill of them."""
    world = World(7, ACCOUNTS, [REGION], 30, [SHOP])
    faults = Faults(page_points_max=100)
    sim = await simulator.start(world, clock=CLOCK, faults=faults, calls_per_s=0, bill_pages=bill_pages)
    config = config_of(sim, [SHOP])
    ours, theirs = (CloudWatchSource(config, CLOCK) for _ in range(2))
    connection = await asyncpg.connect(dsn)
    lines: list[Line] = []
    before: dict[str, dict[str, int]] = {}
    try:
        for day in (1, 2):
            for account in ACCOUNTS:
                item = item_of(ago_s=900 * day)
                _, outcome = await looked(ours, item, target_of(account))
                assert outcome.status is LookStatus.COMPLETE
                assert outcome.requests[CONTINUED] > 0
                receipt = receipt_of(outcome, item, account, day)
                await charges.add(connection, receipt, receipt.items[0])
            await looked(theirs, item_of(ago_s=9000), target_of(ACCOUNTS[1]))
            now = {a: billed(sim, a) for a in ACCOUNTS}
            for account, counts in now.items():
                new = {k: n - before.get(account, {}).get(k, 0) for k, n in counts.items()}
                lines += [
                    metrics(account, at(day), new["metrics"]),
                    requests(account, at(day, 23), new["ListMetrics"]),
                ]
            before = now
    finally:
        await connection.close()
        await ours.close()
        await theirs.close()
        await sim.close()
    return lines


def billed(sim: simulator.Simulator, account: str) -> dict[str, int]:
    of = sim.billing()["accounts"][account]
    return {
        "metrics": of["metrics_requested"],
        "ListMetrics": of["calls"].get(REGION, {}).get("ListMetrics", 0),
    }


def as_one(lines: Iterable[Line]) -> list[Line]:
    """The bill where the two statistics of each metric count as one."""
    return [
        metrics(line.account, line.start, int(line.amount) // 2) if line.usd != "0" else line
        for line in lines
    ]


@pytest.mark.parametrize("truth", READINGS)
async def test_the_bill_of_the_simulated_aws_is_reconciled_and_both_switches_are_inferred(
    truth: Reading, database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await migrate(Postgres(dsn=database))
    lines = await two_days(database, bill_pages=truth.again)
    cur = tmp_path / "report.csv"
    cur.write_text(report(as_one(lines) if truth.once else lines))
    config = tmp_path / "headgate.yaml"
    config.write_text(
        f"""
accounts:
  - {{id: "{ACCOUNTS[0]}", regions: [{REGION}], services: [ec2]}}
  - {{id: "{ACCOUNTS[1]}", regions: [{REGION}], services: [ec2]}}
services: {{ec2: {{metrics: [{{name: CPUUtilization, statistics: [Average, Maximum]}}]}}}}
postgres: {{dsn: "{database}"}}
"""
    )
    words = ["cost", "reconcile", "--cur", str(cur), "--config", str(config)]
    capsys.readouterr()
    code = await in_thread([*words, "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["statistics_count_once"], found["pages_count_again"]) == truth
    assert (code, found["totals"]["excess"]) == (0, "0")
    rows = found["rows"]
    mine = [r for r in rows if r["account"] == ACCOUNTS[0]]
    assert [(Decimal(r["billed"]), r["unattributed"]) for r in mine] == [
        (Decimal(r["ledger"]), "0") for r in mine
    ]
    assert {r["lists_billed"] for r in mine} == {r["lists_ledger"] for r in mine}
    assert all(Decimal(r["unattributed"]) > 0 for r in rows if r["account"] == ACCOUNTS[1])
    assert await in_thread([*words, "--alone"]) == 1
    shown = capsys.readouterr().out
    assert "unattributed" in shown
    assert "THE LEDGER HAS MORE" not in shown
    assert (
        f"aws.pages_count_again: {str(truth.again).lower()}, {'as' if truth.again else 'and NOT as'} configured"
        in shown
    )


async def in_thread(words: list[str]) -> int:
    return await asyncio.to_thread(main, words)


def test_a_report_that_is_none_is_refused_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, cur = tmp_path / "headgate.yaml", tmp_path / "report.csv"
    config.write_text(f'accounts: [{{id: "{A}", regions: [eu-west-1], services: [ec2]}}]')
    for text, error in (
        ("a,b\n", "is no Cost and Usage Report"),
        (report([]), "has no whole day of CloudWatch"),
    ):
        cur.write_text(text)
        assert main(["cost", "reconcile", "--cur", str(cur), "--config", str(config)]) == 2
        assert error in capsys.readouterr().err
