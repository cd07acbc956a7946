"""What monitoring cost against its budget, who moved, and how much of the quotas is asked for."""

from __future__ import annotations

from datetime import date, timedelta

import pytest

from ingest.charges import Charge, Reason
from ingest.model import SourceName, Target
from ingest.report.money import Asked, quotas_of, spend_of
from shard_config.load import loads
from shard_config.model import Config

ONE, TWO, PAYER = "111111111111", "222222222222", "999999999999"
TO = date(2026, 11, 23)
CONFIG = f"""
budget: {{usd_per_day: 3}}
accounts:
  - {{id: "{ONE}", regions: [eu-west-1], services: [ec2, rds], budget_usd_per_day: 2, calls_per_s: 10}}
  - {{id: "{TWO}", regions: [eu-west-1], services: [ec2], via: "{PAYER}"}}
  - {{id: "{PAYER}", regions: [eu-west-1], services: [ec2]}}
"""


def config(more: str = "") -> Config:
    return loads(CONFIG + more, "headgate.yaml", {})


def charge(
    days_ago: int, account: str, metrics: int, service: str = "ec2", lists: int = 0, doubt: int = 0
) -> Charge:
    day = TO - timedelta(days_ago)
    target = Target(SourceName.CLOUDWATCH, account, "eu-west-1")
    return Charge(day, target, service, Reason.LIVE, 1, metrics, doubt, lists)


MONTH = [
    *(charge(n, ONE, 200_000) for n in range(1, 15)),
    *(charge(n, ONE, 100_000, "rds") for n in range(1, 8)),
    *(charge(n, TWO, 50_000) for n in range(1, 15)),
    charge(20, ONE, 100),
    charge(3, ONE, 0, doubt=30_000),
    charge(0, ONE, 999_999),
]


def test_the_week_is_the_seven_days_before_its_end_against_seven_days_of_budget() -> None:
    spend, _ = spend_of(MONTH, config(), TO - timedelta(7), TO)
    # Two, one and a half dollars a day, at a cent a thousand.
    assert spend.usd.value == pytest.approx(7 * (2 + 1 + 0.5))
    assert spend.usd.before == pytest.approx(7 * (2 + 0.5))
    assert spend.usd.relative_change == pytest.approx(0.4)
    assert spend.budget_usd == 21
    assert spend.in_doubt_usd == pytest.approx(0.3)
    assert spend.daily_usd == pytest.approx((3.5,) * 7)


def test_an_account_that_another_pays_for_is_in_that_ones_bill() -> None:
    spend, movers = spend_of(MONTH, config(), TO - timedelta(7), TO)
    assert [(a.account, a.budget_usd) for a in spend.accounts] == [(ONE, 14.0), (PAYER, None)]
    assert [a.usd.value for a in spend.accounts] == pytest.approx([21.0, 3.5])
    assert {m.account for m in movers} <= {ONE, TWO}


def test_movers_are_those_that_changed_most_first() -> None:
    more = [*MONTH, charge(2, TWO, 40_000)]
    _, movers = spend_of(more, config(), TO - timedelta(7), TO)
    assert [(m.account, m.service, round(m.figure.change or 0, 2)) for m in movers] == [
        (ONE, "rds", 7.0),
        (TWO, "ec2", 0.4),
    ]


def test_the_week_before_is_not_known_where_the_ledger_begins_within_it() -> None:
    spend, movers = spend_of([charge(n, ONE, 1000) for n in range(1, 12)], config(), TO - timedelta(7), TO)
    assert spend.usd.value == pytest.approx(0.07)
    assert spend.usd.before is None
    assert movers == ()


def test_listing_is_free_until_the_months_million_is_used_up() -> None:
    paid = [charge(5, ONE, 0, lists=700_000), charge(4, ONE, 0, lists=500_000), charge(15, ONE, 0)]
    for order in (paid, paid[::-1]):
        spend, _ = spend_of(order, config(), TO - timedelta(7), TO)
        assert spend.usd.value == pytest.approx(200_000 * 0.00001)
        assert spend.daily_usd == pytest.approx((0, 0, 0, 2.0, 0, 0, 0))


def test_some_accounts_have_no_budget_of_all() -> None:
    spend, movers = spend_of(MONTH, config(), TO - timedelta(7), TO, [ONE])
    assert spend.usd.value == pytest.approx(21.0)
    assert spend.budget_usd is None
    assert [a.account for a in spend.accounts] == [ONE]
    assert {m.account for m in movers} == {ONE}


def test_scrapes_of_endpoints_cost_nothing_here() -> None:
    target = Target(SourceName.EXPOSITION, "rack", "here")
    spend, _ = spend_of(
        [Charge(TO - timedelta(1), target, "node", Reason.LIVE, 1, 5000)], config(), TO - timedelta(7), TO
    )
    assert spend.usd.value == 0.0
    assert spend.accounts == ()


def test_quotas_are_held_against_the_busiest_hour_nearest_first() -> None:
    week = [Asked(ONE, "eu-west-1", 18_000, 36_000_000), Asked("333333333333", "eu-west-1", 1, 1)]
    before = [Asked(ONE, "eu-west-1", 9_000, 18_000_000)]
    calls, datapoints = quotas_of(week, before, config(), 0.25)
    assert (calls.what, calls.asked_per_s.value, calls.asked_per_s.before, calls.quota_per_s) == (
        "GetMetricData calls", 5.0, 2.5, 10,
    )  # fmt: skip
    assert calls.share == 0.5
    assert calls.asked_per_s.coverage == 0.25
    assert datapoints.share == pytest.approx(10_000 / 180_000)
    assert quotas_of(week, [], config(), 1.0)[0].asked_per_s.before is None
