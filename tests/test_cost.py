"""`headgate cost`, and the budget in `headgate status` and `headgate gaps`: what they say, on a ledger that was filled the way it is filled."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import asyncpg
import pytest
import yaml
from prometheus_client import REGISTRY
from rich.console import Console

from ingest.budget import Day, Decision, Polling
from ingest.charges import Charge, Reason, put_down
from ingest.clock import ManualClock, SystemClock
from ingest.gaps import Filter, not_polled
from ingest.ledger import Ledger
from ingest.model import Target, TaskKind
from ingest.schedule import Grid
from ingest.sinks.migrate import migrate
from shard_config.load import load, loads
from shard_config.model import Postgres
from shard_config.price import Prices
from tests.test_charges import CONFIG, billed
from tests.test_gaps import found
from tests.test_ledger import NOON_S, TARGET, Store, ledger_database, receipt_of, store, task_of
from workers.budgets import BUDGET, FORECAST, SPEND, STRETCH, Budgeter, spoken, to_plain, today
from workers.cli import main
from workers.gaps import render, rows_of
from workers.status import render as status_text
from workers.status import status, to_json

__all__ = ["ledger_database", "store"]  # the fixtures

ROOT = Path(__file__).resolve().parent.parent
ACCOUNT = "123456789012"
FILE = """
accounts:
  - {{id: "123456789012", regions: [eu-west-1], services: [ec2, rds], budget_usd_per_day: {budget}}}
postgres: {{dsn: "{dsn}"}}
kafka: {{bootstrap: "127.0.0.1:1"}}
"""
EC2 = Target("cloudwatch", ACCOUNT, "eu-west-1")


class Headgate:
    def __init__(self, path: Path, dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self.dsn = dsn
        self.capsys = capsys

    def budget(self, usd: float) -> None:
        self.path.write_text(FILE.format(dsn=self.dsn, budget=usd))

    async def __call__(self, *words: str) -> tuple[int, str]:
        """Exit code, and what was printed."""
        code = await asyncio.to_thread(main, ["cost", *words, "--config", str(self.path)])
        said = self.capsys.readouterr()
        return code, said.out + said.err


@pytest.fixture
async def headgate(database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Headgate:
    """Two days of charges: a dollar today by polls, ten cents by healing; two dollars yesterday."""
    await migrate(Postgres(dsn=database))
    day = datetime.now(UTC).date()
    connection = await asyncpg.connect(database)
    try:
        live = Charge(day, EC2, "ec2", Reason.LIVE, 10, 100_000, 5_000, 0, 10)
        await put_down(connection, live)
        await put_down(
            connection, replace(live, service="rds", reason=Reason.HEAL, metrics_billed=10_000, puts=0)
        )
        await put_down(
            connection, replace(live, reason=Reason.DISCOVERY, metrics_billed=0, list_metrics=30, puts=0)
        )
        await put_down(connection, replace(live, day=day - timedelta(days=1), metrics_billed=200_000))
    finally:
        await connection.close()
    made = Headgate(tmp_path / "headgate.yaml", database, capsys)
    made.budget(5)
    capsys.readouterr()
    return made


def yesterday() -> str:
    return (datetime.now(UTC) - timedelta(days=1)).strftime("%Y-%m-%dT00:00:00Z")


async def test_a_table_says_what_was_spent_by_whom_and_why(headgate: Headgate) -> None:
    code, said = await headgate("--from", yesterday())
    assert code == 0
    lines = [line.replace("│", " ").split() for line in said.splitlines()]
    assert [ACCOUNT, "ec2", "live", "300,000", "$1.0000", "$3.0000", "$0.1000"] in lines
    assert [ACCOUNT, "rds", "heal", "10,000", "$0.1000", "$0.1000", "$0.0500"] in lines
    assert "of it healing $0.1000, rechecks $0.0000, 30 ListMetrics requests" in said
    assert "S3, not in it: 20 objects put, $0.0001" in said
    assert f"budget of {ACCOUNT}: today $1.2500 of $5.0000" in said


async def test_a_passed_budget_is_exit_code_1(headgate: Headgate) -> None:
    headgate.budget(1)
    code, said = await headgate()
    assert (code, "PASSED" in said) == (1, True)


async def test_csv_and_json_have_the_same_exactly_and_by_what_is_asked_for(headgate: Headgate) -> None:
    _, said = await headgate("--from", yesterday(), "--by", "day,service", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(said)))
    assert [(r["service"], Decimal(r["usd"])) for r in rows] == [
        ("ec2", Decimal(2)),
        ("ec2", Decimal(1)),
        ("rds", Decimal("0.1")),
    ]
    _, said = await headgate("--from", yesterday(), "--by", "day,service", "--format", "json")
    whole = json.loads(said)
    assert [{k: str(v) for k, v in line.items()} for line in whole["lines"]] == rows
    assert Decimal(whole["all"]["usd"]) == Decimal("3.1")
    assert {k: Decimal(v) for k, v in whole["by_reason"].items()} == {
        "discovery": 0,
        "heal": Decimal("0.1"),
        "live": Decimal(3),
    }


async def test_this_month_is_the_default_and_has_a_forecast_and_filters_hold(headgate: Headgate) -> None:
    code, said = await headgate("--service", "rds")
    assert code == 0
    assert "forecast" in said
    assert "ec2" not in said


@pytest.mark.parametrize("words", [("--by", "account,colour"), ("--by", "day,day")])
async def test_what_lines_cannot_be_by_is_refused(headgate: Headgate, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        await headgate(*words)
    assert ended.value.code == 2


async def test_a_period_that_is_none_is_refused(headgate: Headgate) -> None:
    code, said = await headgate("--from", "2026-01-02T00:00:00Z", "--to", "2026-01-01T00:00:00Z")
    assert (code, said) == (2, "headgate cost: --from is not before --to\n")


# --- status, gaps, metrics ----------------------------------------------------------------------------------------


DAY = Day(Decimal("1.5"), Decimal(4), Decimal(3))


def test_a_line_says_what_is_spent_and_which_budgets_do_not_hold() -> None:
    decision = Decision(Polling(), {"1": DAY}, replace(DAY, budget_usd=None))
    assert today(decision) == "$1.5000, $4.0000 by midnight UTC; budget too small: 1"
    passed = Decision(Polling(), {"1": replace(DAY, spent_usd=Decimal("3.1"))}, DAY)
    assert today(passed) == "$1.5000 of $3.00, $4.0000 by midnight UTC; budget passed: 1"


def test_a_line_says_which_polls_are_stretched_or_stopped() -> None:
    assert spoken(Polling()) == "as configured"
    stretch = {(a, "ec2"): 12 for a in "12345"} | {("1", "rds"): 2}
    polling = Polling(stretch, frozenset({("9", "sns")}))
    assert spoken(polling) == "ec2 ×12 (1, 2, 3 and 2 more); rds ×2 (1); sns stopped (9)"
    plain = to_plain(Decision(polling, {"1": DAY}, DAY))
    assert plain["stopped"] == ["9/sns"]
    assert json.loads(json.dumps(plain))["accounts"]["1"]["budget_usd"] == 3


async def test_what_was_not_polled_for_a_budget_is_listed_and_is_no_gap(store: Store) -> None:
    await store.project(replace(task_of(NOON_S - 600, NOON_S), kind=TaskKind.BUDGET.value))
    assert await found(store, NOON_S + 7200) == []
    now = datetime.fromtimestamp(NOON_S + 7200, UTC)
    grids = {TARGET: (Grid("ec2", 300, 60, 600),)}
    [gap] = await not_polled(store.sql, now, grids, Prices())
    assert (gap.start_s, gap.end_s, gap.windows) == (NOON_S - 600, NOON_S, 2)
    assert (gap.reason, gap.heal_from) == ("budget", "cloudwatch")
    assert await not_polled(store.sql, now, grids, Prices(), only=Filter(service="rds")) == []
    console = Console(width=200, file=io.StringIO())
    console.print(render([gap]))
    assert isinstance(console.file, io.StringIO)
    assert (
        "0 windows in 0 stretches are open past their deadline; 2 were not polled for a budget"
        in console.file.getvalue()
    )
    assert [row["reason"] for row in rows_of([gap])] == ["budget"]


async def test_status_has_a_line_of_todays_dollars_and_is_not_well_where_a_budget_is_passed(
    headgate: Headgate,
) -> None:
    headgate.budget(1)
    config = load(headgate.path, environ={})
    seen = await status(config, SystemClock())
    assert seen.budget is not None
    assert seen.budget.passed
    assert not replace(seen, errors=()).healthy
    assert replace(seen, errors=(), budget=None).healthy
    console = Console(width=250, file=io.StringIO())
    console.print(status_text(seen))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert f"$1.2500, $1.2500 by midnight UTC; budget passed: {ACCOUNT}" in said
    assert "as configured" in said
    assert json.loads(to_json(seen))["budget"]["accounts"][ACCOUNT]["passed"] is True


class Planner:
    polling = Polling()


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


async def test_the_loop_tells_the_coordinator_and_the_metrics_and_keeps_what_was_decided(
    store: Store,
) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    await store.project(task, billed(receipt_of(task), 2000))
    planner = Planner()
    clock = ManualClock(NOON_S + 10)
    budgeter = Budgeter(CONFIG, planner, store.ledger, clock)
    await budgeter.step()
    # $0.02 a look, 143 left today, and a dollar.
    assert planner.polling.stretch == {(ACCOUNT, "ec2"): 3}
    assert sample("headgate_poll_stretch", account=ACCOUNT, service="ec2") == 3
    assert sample("headgate_budget_usd", account=ACCOUNT) == 1
    assert sample("headgate_spend_usd_today", account=ACCOUNT) == 0.02
    another = Planner()
    account = CONFIG.accounts[0].model_copy(update={"budget_usd_per_day": None})
    await Budgeter(CONFIG, another, store.ledger, clock).step()
    assert another.polling == planner.polling
    budgeter.configure(CONFIG.model_copy(update={"accounts": (account,)}))
    await budgeter.step()
    assert planner.polling == Polling()
    assert sample("headgate_budget_usd", account=ACCOUNT) is None


async def test_while_the_database_is_away_polls_stay_as_they_are() -> None:
    planner = Planner()
    planner.polling = Polling({(ACCOUNT, "ec2"): 3})
    away = loads(FILE.format(dsn="postgresql://127.0.0.1:1/nothing", budget=1), "test", environ={})
    budgeter = Budgeter(away, planner, Ledger(away.postgres, "test", {}), ManualClock(NOON_S))
    assert not await budgeter.try_step()
    assert planner.polling.stretch == {(ACCOUNT, "ec2"): 3}


def test_alerts_about_money_ask_for_metrics_that_there_are_and_say_how_to_see_again() -> None:
    groups = yaml.safe_load((ROOT / "helm/headgate/files/rules/alerts.yml").read_text())["groups"]
    [money] = [g["rules"] for g in groups if g["name"] == "headgate-money"]
    asked = {name for rule in money for name in re.findall(r"headgate_\w+", rule["expr"])}
    assert asked == {g._name for g in (SPEND, FORECAST, BUDGET, STRETCH)}
    for rule in money[:2]:
        runbook = (ROOT / rule["annotations"]["runbook_url"]).read_text()
        assert "critical: true" in runbook
        assert "without a restart" in runbook
