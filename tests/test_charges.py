"""Charges: each receipt counts once, under its reason; what is in doubt is beside it; dollars as the price list is read."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest

from ingest import budget, charges, costs, spending
from ingest.budget import Polling
from ingest.charges import BACKFILL_ATTEMPT, Charge, Reason, reason_of, settled
from ingest.collect import begun_before
from ingest.costs import Only
from ingest.model import LookStatus, Outcome, Receipt, ReceiptItem, Target, TaskItem, TaskKind
from ingest.pauses import Pause, begin
from ingest.spending import Books
from shard_config.model import Account, Aws, Config, MetricProfile, ServiceProfile
from shard_config.model import Budget as BudgetConfig
from tests.test_ledger import NOON_S, OTHER, TARGET, Store, ledger_database, receipt_of, store, task_of

__all__ = ["ledger_database", "store"]  # the fixtures

TODAY = date(2026, 1, 1)
ACCOUNT = TARGET.account
CONFIG = Config(
    accounts=(
        Account(
            id=ACCOUNT, regions=("eu-west-1", "us-east-1"), services=("ec2", "rds"), budget_usd_per_day=1
        ),
    ),
    services=(
        ServiceProfile(service="ec2", namespace="AWS/EC2"),
        ServiceProfile(service="rds", namespace="AWS/RDS", critical=True),
    ),
)


def billed(receipt: Receipt, metrics: int, *, lists: int = 0, doubt: int = 0, key: str = "") -> Receipt:
    """The same receipt, at another price."""
    [done] = receipt.items
    requests = {"GetMetricData": 2} | ({"ListMetrics": lists} if lists else {})
    outcome = replace(done.outcome, metrics_billed=metrics, requests=requests, metrics_in_doubt=doubt)
    return replace(receipt, archive_key=key, items=(replace(done, outcome=outcome),))


async def all_of(store: Store) -> list[Charge]:
    return await charges.read(store.sql, TODAY - timedelta(days=40), TODAY + timedelta(days=2))


async def by_reason(store: Store) -> dict[str, int]:
    return {str(c.reason): c.metrics_billed for c in await all_of(store)}


# --- what counts --------------------------------------------------------------------------------------------------


async def test_each_receipt_counts_once_however_often_it_is_read(store: Store) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    receipt = billed(receipt_of(task), 500, lists=3, doubt=7, key="v1/key")
    await store.project(task, receipt, receipt)
    await store.project(receipt)
    live = Charge(TODAY, TARGET, "ec2", Reason.LIVE, 1, 500, 7, 0, 1)
    assert await all_of(store) == [replace(live, reason=Reason.DISCOVERY, looks=0, metrics_billed=0,
        metrics_in_doubt=0, list_metrics=3, puts=0), live]  # fmt: skip


async def test_a_second_receipt_of_a_task_is_a_second_try(store: Store) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    await store.project(
        task,
        billed(receipt_of(task, finished_s=NOON_S + 1), 500),
        billed(receipt_of(task, finished_s=NOON_S + 9), 300),
    )
    assert await by_reason(store) == {"live": 500, "second try": 300}


async def test_reasons_are_those_of_tasks(store: Store) -> None:
    live = task_of(NOON_S - 300, NOON_S)
    tasks = [
        live,
        replace(live, task_id="b" * 32, kind=TaskKind.BACKLOG.value),
        replace(live, task_id="c" * 32, kind=TaskKind.HEAL.value, attempt=2),
        replace(live, task_id="d" * 32, kind=TaskKind.BACKLOG.value, attempt=BACKFILL_ATTEMPT + 5),
    ]
    await store.project(*tasks)
    for i, task in enumerate(tasks):
        await store.project(billed(receipt_of(task), 10 + i))
    await store.project(billed(receipt_of(replace(live, task_id="e" * 32)), 20))
    expected = {"live": 10, "backlog": 11, "heal": 12, "backfill": 13, "unknown": 20}
    assert await by_reason(store) == expected


def test_a_task_of_a_budget_that_was_asked_after_all_has_no_known_reason() -> None:
    assert reason_of(TaskKind.BUDGET, 0, again=False) is Reason.UNKNOWN


async def test_an_object_is_put_once_a_task_whatever_its_services(store: Store) -> None:
    one = task_of(NOON_S - 300, NOON_S)
    items = (*one.items, TaskItem("rds", NOON_S - 300, NOON_S, 300))
    receipt = receipt_of(one)
    both = replace(receipt, archive_key="k", items=(*receipt.items, replace(receipt.items[0], item=items[1])))
    await store.project(replace(one, items=items), both)
    assert sum(c.puts for c in await all_of(store)) == 1


async def test_a_day_is_the_utc_day_on_which_the_look_was_finished(store: Store) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    await store.project(task, billed(receipt_of(task, finished_s=NOON_S + 12 * 3600), 1))
    assert {c.day for c in await all_of(store)} == {TODAY + timedelta(days=1)}


def test_what_a_run_that_ended_without_a_receipt_may_have_paid_is_in_doubt() -> None:
    task = task_of(NOON_S - 300, NOON_S)
    asked = billed(receipt_of(task, series=4), 3, doubt=1).items
    assert begun_before(asked, runs=0) == asked
    assert begun_before(asked, runs=1)[0].outcome.metrics_in_doubt == 1 + 4
    assert begun_before(asked, runs=3)[0].outcome.metrics_in_doubt == 1 + 3 * 4
    never = ReceiptItem(task.items[0], Outcome(LookStatus.FAILED, "", 0, 9, {}, 0), 0, (), ())
    assert begun_before([never], runs=1) == (never,)


async def test_an_intent_is_in_doubt_until_its_answer_settles_it(store: Store) -> None:
    intent = Charge(TODAY, TARGET, "ec2", Reason.RECHECK, metrics_in_doubt=50)
    await charges.put_down(store.sql, intent)
    assert await all_of(store) == [intent]
    outcome = Outcome(LookStatus.PARTIAL, "", 0, 50, {"ListMetrics": 1}, 40, metrics_in_doubt=10)
    await charges.put_down(store.sql, settled(intent, outcome))
    expected = replace(intent, looks=1, metrics_billed=40, metrics_in_doubt=10, list_metrics=1)
    assert await all_of(store) == [expected]


# --- what budgets go by -------------------------------------------------------------------------------------------


async def books(store: Store, now_s: int = NOON_S, config: Config = CONFIG) -> Books:
    async with store.sql.transaction():
        return await spending.read(store.sql, config, now_s)


async def test_a_look_is_priced_by_the_newest_complete_one_whatever_came_last(store: Store) -> None:
    task = task_of(NOON_S - 300, NOON_S)
    older = replace(task, task_id="b" * 32)
    failed = task_of(NOON_S, NOON_S + 300)
    await store.project(
        task,
        older,
        failed,
        billed(receipt_of(task, finished_s=NOON_S + 20), 500),
        billed(receipt_of(older, finished_s=NOON_S + 10), 100),
        billed(receipt_of(failed, status=LookStatus.FAILED, finished_s=NOON_S + 310), 7),
    )
    [known] = await charges.known(store.sql, TODAY)
    assert (known.look_metrics, known.asked_until_s) == (500, NOON_S + 300)
    polls = spending.situation_of(await books(store), CONFIG).polls
    priced = {(p.region, p.service): p.usd_per_look for p in polls}
    assert priced[("eu-west-1", "ec2")] == Decimal("0.005")
    assert priced[("us-east-1", "rds")] == 0


async def test_what_nobody_is_asked_for_is_not_reserved(store: Store) -> None:
    looked = task_of(NOON_S - 300, NOON_S)
    await store.project(looked, billed(receipt_of(looked), 500))
    for kind in (TaskKind.BUDGET, TaskKind.PAUSED):
        task = task_of(NOON_S, NOON_S + 600)
        await store.project(replace(task, task_id=str(len(kind)) * 32, kind=kind.value))
        [known] = await charges.known(store.sql, TODAY)
        assert (known.look_metrics, known.asked_until_s) == (500, NOON_S + 600)


async def test_tasks_besides_polls_are_reserved_until_their_receipt(store: Store) -> None:
    looked = task_of(NOON_S - 300, NOON_S)
    heal = replace(looked, task_id="c" * 32, kind=TaskKind.HEAL.value, attempt=1)
    await store.project(looked, billed(receipt_of(looked), 500), heal)
    reserved = spending.situation_of(await books(store), CONFIG).spent[ACCOUNT]
    assert (reserved.billed_usd, reserved.reserved_usd) == (Decimal("0.005"), Decimal("0.005"))
    await store.project(billed(receipt_of(heal), 400, doubt=100))
    spent = spending.situation_of(await books(store), CONFIG).spent[ACCOUNT]
    assert (spent.billed_usd, spent.in_doubt_usd, spent.reserved_usd) == (
        Decimal("0.009"),
        Decimal("0.001"),
        Decimal(0),
    )


async def test_what_is_paused_costs_nothing_more(store: Store) -> None:
    await begin(store.sql, Pause("*", "ec2", datetime.fromtimestamp(NOON_S, UTC), ""))
    assert {p.service for p in spending.situation_of(await books(store), CONFIG).polls} == {"rds"}


async def test_what_was_decided_is_kept_and_the_next_one_goes_on_from_it(store: Store) -> None:
    pair = (ACCOUNT, "ec2")
    first, second = Polling({pair: 4}), Polling({pair: 12}, frozenset({pair}))
    for before, after in ((Polling(), first), (first, second), (second, second), (second, Polling())):
        await spending.keep(store.sql, after, before, NOON_S)
        assert (await books(store)).polling == after


async def test_a_stretched_service_is_no_gap_until_its_next_look_is_late(store: Store) -> None:
    planned, later = task_of(NOON_S - 300, NOON_S), task_of(NOON_S, NOON_S + 3600)
    await store.project(planned)
    await spending.keep(store.sql, Polling({(ACCOUNT, "ec2"): 12}), Polling(), NOON_S + 10)
    await store.project(later)
    rows = await store.sql.fetch("SELECT window_start, stretch FROM windows ORDER BY 1")
    assert [r["stretch"] for r in rows] == [12] * 13
    await spending.keep(store.sql, Polling(), Polling({(ACCOUNT, "ec2"): 12}), NOON_S + 3600)
    await store.project(task_of(NOON_S + 3300, NOON_S + 4200))
    rows = await store.sql.fetch(
        "SELECT stretch FROM windows WHERE window_start >= to_timestamp($1)", NOON_S + 3600
    )
    assert [r["stretch"] for r in rows] == [1, 1]


async def test_windows_that_a_budget_did_not_poll_are_closed_as_such_until_they_are_asked_for(
    store: Store,
) -> None:
    looked = task_of(NOON_S - 600, NOON_S)
    await store.project(looked, receipt_of(looked, observed_s=NOON_S + 1))
    stopped = replace(task_of(NOON_S - 300, NOON_S + 600), task_id="b" * 32, kind=TaskKind.BUDGET.value)
    await store.project(stopped)
    # The first had settled only in part, and nobody looks at it again; that of noon was never looked at.
    assert await store.states() == {-600: "collected", -300: "budget", 0: "budget", 300: "budget"}
    await store.project(task_of(NOON_S, NOON_S + 900))
    assert await store.states() == {
        -600: "collected",
        -300: "budget",
        0: "planned",
        300: "planned",
        600: "planned",
    }
    backfill = task_of(
        NOON_S - 300,
        NOON_S,
    )
    await store.project(receipt_of(backfill, observed_s=NOON_S + 9000))
    assert (await store.states())[-300] == "collected"


# --- dollars --------------------------------------------------------------------------------------------------------


def charge(metrics: int = 0, *, day: date = TODAY, reason: Reason = Reason.LIVE, lists: int = 0,
           target: Target = TARGET, continued: int = 0) -> Charge:  # fmt: skip
    return Charge(day, target, "ec2", reason, 1, metrics, 0, lists, 0, continued)


def test_a_million_listings_of_an_account_and_month_are_free_in_the_order_of_the_days() -> None:
    some = [
        charge(lists=900_000),
        charge(lists=200_000, day=TODAY + timedelta(days=1)),
        charge(lists=200_000, day=TODAY + timedelta(days=1), target=OTHER),
        charge(lists=900_000, day=TODAY + timedelta(days=31)),
    ]
    priced = costs.amounts(reversed(some), CONFIG, TODAY)
    assert [a.usd for _, a in priced] == [0, Decimal(1), Decimal(2), 0]
    from_second = costs.amounts(some, CONFIG, TODAY + timedelta(days=1))
    assert [a.usd for _, a in from_second] == [Decimal(1), Decimal(2), 0]


def test_the_other_reading_of_each_disputed_switch_is_beside_the_configured_one() -> None:
    profile = ServiceProfile(
        service="ec2",
        namespace="AWS/EC2",
        metrics=(MetricProfile(name="CPU", statistics=("Average", "Maximum", "Minimum", "Sum")),),
    )
    for once, pages in ((False, True), (True, False)):
        config = CONFIG.model_copy(
            update={"services": (profile,), "aws": Aws(statistics_count_once=once, pages_count_again=pages)}
        )
        [(_, a)] = costs.amounts([charge(4000, continued=400)], config, TODAY)
        each = (Decimal("0.04"), Decimal("0.01"))
        assert (a.usd, a.once_usd) == (each if not once else each[::-1])
        assert a.pages_usd == (Decimal("0.036") if pages else Decimal("0.011"))


def test_lines_are_by_what_is_asked_for_and_their_sum_is_the_same() -> None:
    some = [
        charge(1000),
        charge(2000, target=OTHER),
        charge(500, reason=Reason.HEAL),
        charge(7, day=TODAY - timedelta(days=1)),
    ]
    priced = costs.amounts(some, CONFIG, TODAY - timedelta(days=1))
    for by in (("account",), ("region", "reason"), ("day",), ("account", "service", "reason")):
        found = costs.lines(priced, TODAY, by, Only(), {})
        assert costs.total(found).period.usd == Decimal("0.03507")
        assert costs.total(found).today.usd == Decimal("0.035")
    [line] = costs.lines(priced, TODAY, ("service",), Only(region="us-east-1"), {})
    assert (line.key, line.period.metrics) == (("ec2",), 2000)


def test_the_months_forecast_is_each_look_that_is_left_as_polls_are_stretched() -> None:
    poll = budget.Poll(ACCOUNT, "ec2", ACCOUNT, Decimal("0.01"), 300, 0, region="eu-west-1")
    last_day_s = int(datetime(2026, 1, 31, tzinfo=UTC).timestamp())
    [(key, usd)] = costs.rest_of_month([poll], Polling(), [], CONFIG, last_day_s).items()
    assert (key, usd) == ((ACCOUNT, "eu-west-1", "ec2", "live"), Decimal("2.87"))
    stretched = costs.rest_of_month([poll], Polling({poll.pair: 12}), [], CONFIG, last_day_s)
    assert sum(stretched.values()) == Decimal("0.24")
    stopped = costs.rest_of_month(
        [poll], Polling(stopped=frozenset({poll.pair})), [], CONFIG, last_day_s - 300
    )
    assert sum(stopped.values()) == Decimal("2.87")


@pytest.mark.parametrize(("usd", "of_all"), [(None, None), (2.0, 3.0)])
def test_limits_are_those_of_the_configuration_and_who_is_paid_for_has_none(
    usd: float | None, of_all: float | None
) -> None:
    accounts = (
        Account(id="1" * 12, regions=("r",), services=("ec2",), budget_usd_per_day=usd),
        Account(id="2" * 12, regions=("r",), services=("ec2",), budget_usd_per_day=usd, via="1" * 12),
    )
    config = CONFIG.model_copy(update={"accounts": accounts, "budget": BudgetConfig(usd_per_day=of_all)})
    found = spending.limits_of(config)
    assert found.usd_of == ({} if usd is None else {"1" * 12: Decimal(2)})
    assert found.usd_of_all == (None if of_all is None else Decimal(3))
