"""Verdicts by their properties: no waste on thin data, more use never makes waste, sizes count by their ratio; and prices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.report.assemble import Assembly, Ledger
from ingest.report.model import (
    MONTH_H,
    Confidence,
    Figure,
    InventoryNote,
    ResourceKey,
    Spend,
    Verdict,
    VerdictKind,
)
from ingest.report.money import LIST_PRICE, Pricing
from ingest.report.resources import Axis, Observed
from ingest.report.sizing import Catalog
from ingest.report.verdicts import ByHour, Rules, dependent, judge
from ingest.report.week import Lives
from shard_config.report import Discount, Price, Report, Role
from tests.report_series import (
    ACCOUNT,
    AXIS,
    GIB,
    PRICES,
    RANGES,
    REGION,
    TO_S,
    lived_of,
    observed,
    resource,
    rules_of,
    run_length,
    series_of,
)

BIG = {"type": "m7g.2xlarge", "vcpu": 8, "memory_bytes": 32 * GIB, "state": "running"}
WASTES = (VerdictKind.IDLE, VerdictKind.OVERSIZED)


def machine(
    cpu: float | np.ndarray[Any, Any],
    peak: float | np.ndarray[Any, Any],
    network: float = 100.0,
    disk: float = 0.2,
    known: np.ndarray[Any, Any] | None = None,
    **attributes: Any,
) -> Observed:
    """A machine that did so much in every hour; `known` masks hours."""
    mask = np.ones(AXIS.hours, np.bool_) if known is None else known

    def hours(value: float | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.where(mask, value, np.nan)

    rates = {
        Role.NETWORK_IN: network,
        Role.NETWORK_OUT: network,
        Role.DISK_READ_OPS: disk,
        Role.DISK_WRITE_OPS: disk,
    }
    series = {
        (Role.CPU, "Average"): series_of(hours(cpu)),
        (Role.CPU, "Maximum"): series_of(hours(peak)),
        **{(role, "Sum"): series_of(hours(value), rate=True) for role, value in rates.items()},
    }
    lived = lived_of("ec2", [{"days": [None, 28], **BIG, **attributes}])
    return Observed(ResourceKey(ACCOUNT, REGION, "ec2", "r-1"), series, lived)


def verdict_of(seen: Observed, rules: Rules | None = None) -> Verdict:
    return judge(seen, AXIS, TO_S, rules_of() if rules is None else rules)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(0.5, 1.5), (9.0, 20.0), (3.0, 4.0)]),
)
def test_no_verdict_of_waste_on_thin_data(share: float, seed: int, load: tuple[float, float]) -> None:
    known = np.random.default_rng(seed).random(AXIS.hours) < share
    verdict = verdict_of(machine(*load, known=known))
    hours = int(known[-14 * 24 :].sum())
    if hours < 30:
        assert verdict.kind is VerdictKind.NOT_ENOUGH_DATA
    if hours < 0.8 * 14 * 24:
        assert verdict.kind not in WASTES
    if hours < 0.95 * 14 * 24:
        assert verdict.kind is not VerdictKind.IDLE


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.01, 50),
    st.floats(1, 4),
    st.floats(1, 2_000),
    st.floats(0.01, 5),
    st.floats(1, 10),
    st.sampled_from(["cpu", "network", "disk"]),
)
def test_more_use_never_makes_a_verdict_of_waste(
    cpu: float, peak: float, network: float, disk: float, more: float, what: str
) -> None:
    peak = min(100.0, cpu * peak)
    times = {name: more if name == what else 1.0 for name in ("cpu", "network", "disk")}
    less = verdict_of(machine(cpu, peak, network, disk)).kind
    busier = verdict_of(
        machine(
            min(100.0, cpu * times["cpu"]),
            min(100.0, peak * times["cpu"]),
            network * times["network"],
            disk * times["disk"],
        )
    ).kind
    wasteful = {VerdictKind.IDLE: 2, VerdictKind.OVERSIZED: 1}
    assert wasteful.get(busier, 0) <= wasteful.get(less, 0)


@settings(max_examples=40, deadline=None)
@given(st.floats(1, 60), st.floats(1, 100), st.floats(0.05, 0.95), st.sampled_from([0.25, 2, 16, 1000]))
def test_sizes_count_by_their_ratio_alone(cpu: float, peak: float, free: float, times: float) -> None:
    def judged(scale: float) -> Verdict:
        prices = tuple(
            replace_price(p, vcpu=p.vcpu * scale, memory_gib=p.memory_gib * scale)
            for p in PRICES
            if p.vcpu and p.memory_gib
        )
        memory = 16 * GIB * scale
        seen = observed(
            {
                "service": "rds",
                "spans": [{"days": [None, 28], "type": "db.m7g.xlarge", "vcpu": 4 * scale, "memory_bytes": memory, "storage_bytes": GIB, "state": "running", "multi_az": False}],
                "series": {
                    "cpu": {"Average": flat(cpu), "Maximum": flat(max(cpu, peak))},
                    "connections": {"Average": flat(9), "Maximum": flat(9)},
                    "disk_read_ops": {"Average": flat(5)},
                    "disk_write_ops": {"Average": flat(5)},
                    "memory_free": {"Average": flat(free * memory)},
                },
            }
        )  # fmt: skip
        report = Report(prices=prices)
        pricing = Pricing(report)
        return verdict_of(seen, Rules(report, pricing, Catalog.of((), pricing), True))

    once, more = judged(1), judged(times)
    assert (once.kind, once.confidence) == (more.kind, more.confidence)
    assert [e.value for e in once.evidence] == pytest.approx([e.value for e in more.evidence])


def flat(value: float) -> dict[str, Any]:
    return {"runs": [[AXIS.hours, value]]}


def replace_price(price: Price, **changes: Any) -> Price:
    return price.model_copy(update=changes)


@pytest.mark.parametrize("busy_hour", [AXIS.hours - 1, AXIS.hours - 14 * 24, AXIS.hours - 100])
def test_one_busy_hour_in_fourteen_days_is_not_idle(busy_hour: int) -> None:
    peak = np.full(AXIS.hours, 2.0)
    peak[busy_hour] = 5.0
    assert verdict_of(machine(1.0, peak)).kind is VerdictKind.OVERSIZED
    peak[busy_hour] = 99.0
    assert verdict_of(machine(1.0, peak)).kind is VerdictKind.IN_USE


def test_a_busy_hour_before_the_fourteen_days_lowers_confidence_alone() -> None:
    peak = np.full(AXIS.hours, 2.0)
    peak[AXIS.hours - 14 * 24 - 1] = 99.0
    verdict = verdict_of(machine(1.0, peak))
    assert (verdict.kind, verdict.confidence) == (VerdictKind.IDLE, Confidence.MEDIUM)


def test_an_activity_that_is_not_collected_is_not_a_quiet_one() -> None:
    seen = machine(0.5, 1.0)
    series = {key: s for key, s in seen.series.items() if key[0] is not Role.NETWORK_OUT}
    verdict = verdict_of(Observed(seen.key, series, seen.lived))
    assert verdict.kind is VerdictKind.NOT_ENOUGH_DATA
    assert "network" in verdict.rule


def test_what_is_idle_is_not_oversized_as_well_and_wastes_once() -> None:
    verdict = verdict_of(machine(0.5, 1.0))
    assert verdict.kind is VerdictKind.IDLE
    assert verdict.smaller is None
    assert verdict.waste is not None
    assert verdict.waste.list_usd_per_month == pytest.approx(0.0408225 * 8 * MONTH_H)


def test_oversized_wastes_the_difference_of_two_prices() -> None:
    verdict = verdict_of(machine(9.0, 20.0))
    assert verdict.smaller is not None
    assert verdict.smaller.type == "m7g.xlarge"
    assert verdict.waste is not None
    assert verdict.waste.list_usd_per_month == pytest.approx(0.0408225 * 4 * MONTH_H)


def test_every_verdict_of_waste_shows_the_numbers_and_limits_that_decided() -> None:
    for seen in (machine(0.5, 1.0), machine(9.0, 20.0)):
        verdict = verdict_of(seen)
        judged = [e for e in verdict.evidence if e.limit is not None and not e.name.startswith("hours")]
        assert len(judged) >= 3
        assert [e for e in judged if e.limit is not None and e.value > e.limit] == []


def test_a_verdict_of_last_week_sees_nothing_of_this_week() -> None:
    peak = np.full(AXIS.hours, 2.0)
    peak[-3] = 99.0
    seen = machine(1.0, peak)
    by_hour = ByHour.of(seen, AXIS, rules_of())
    assert judge(seen, AXIS, TO_S - 7 * 86_400, rules_of(), by_hour).kind is VerdictKind.IDLE
    assert judge(seen, AXIS, TO_S, rules_of(), by_hour).kind is VerdictKind.IN_USE


@pytest.mark.parametrize("kind", [VerdictKind.STANDBY, VerdictKind.READER, VerdictKind.AUTO_SCALED])
def test_an_idle_volume_of_what_waits_is_not_idle_by_itself(kind: VerdictKind) -> None:
    idle = Verdict(VerdictKind.IDLE, "quiet")
    assert dependent(idle, kind).kind is kind
    assert dependent(idle, VerdictKind.IN_USE) is idle
    busy = Verdict(VerdictKind.IN_USE, "busy")
    assert dependent(busy, kind) is busy


def test_data_that_go_back_less_than_the_rule_say_not_enough() -> None:
    axis = Axis(TO_S - 7 * 86_400, 7 * 24)
    full = machine(0.5, 1.0)
    series = {key: series_of(np.full(axis.hours, 0.5)) for key in full.series}
    for lived in (None, full.lived):
        rules = rules_of(inventory=lived is not None)
        verdict = judge(Observed(full.key, series, lived), axis, TO_S, rules)
        assert verdict.kind is VerdictKind.NOT_ENOUGH_DATA
        assert "go back" in verdict.rule


def test_idle_is_told_since_the_last_hour_of_any_activity_and_oversized_since_it_was_looked_at() -> None:
    cpu = run_length([[5 * 24, 40.0], [23 * 24, 1.0]])
    verdict = verdict_of(machine(cpu, cpu))
    assert (verdict.kind, verdict.since_s) == (VerdictKind.IDLE, AXIS.start_s + 5 * 86_400)
    unknown_first = run_length([[3 * 24, None], [25 * 24, 1.0]])
    verdict = verdict_of(machine(1.0, 1.0, known=~np.isnan(unknown_first)))
    assert (verdict.kind, verdict.since_s) == (VerdictKind.IDLE, AXIS.start_s + 3 * 86_400)
    verdict = verdict_of(machine(9.0, 20.0))
    assert (verdict.kind, verdict.since_s) == (VerdictKind.OVERSIZED, TO_S - 14 * 86_400)
    assert verdict_of(machine(60.0, 95.0)).since_s is None


def test_a_week_before_its_birth_it_was_not_gone() -> None:
    lived = lived_of("ec2", [{"days": [26, 28], **BIG}], born_day=26)
    seen = Observed(ResourceKey(ACCOUNT, REGION, "ec2", "r-1"), {}, lived)
    assert judge(seen, AXIS, TO_S - 7 * 86_400, rules_of()).kind is VerdictKind.NEW
    assert judge(seen, AXIS, TO_S, rules_of()).kind is VerdictKind.NEW


def test_what_was_gone_before_the_range_is_no_resource_of_it() -> None:
    rules, ranges = rules_of(), RANGES
    whole = Assembly(ranges, rules, Lives({}, "owner", 0))
    gone = lived_of("ec2", [{"days": [None, 20], **BIG}], gone_day=20)
    ends = lived_of("ec2", [{"days": [None, 22], **BIG}], gone_day=22)
    busy = {(Role.CPU, "Average"): series_of(run_length([[480, 50.0], [192, None]]))}
    for name, lived in (("gone", gone), ("ends", ends)):
        whole.add(Observed(ResourceKey(ACCOUNT, REGION, "ec2", name), busy, lived))
    nobody = Figure(None, "share")
    ledger = Ledger((), Spend(nobody, 0.0, None, (), ()), (), (), (), nobody)
    report = whole.report(ledger, InventoryNote("csv", TO_S, 2), TO_S, 0)
    assert [(use.key.id, use.verdict.kind) for use in report.resources] == [("ends", VerdictKind.GONE)]


# --- prices -----------------------------------------------------------------------------------------------------------


def test_the_most_particular_price_counts() -> None:
    pricing = Pricing(
        Report(
            prices=(
                Price(service="rds", type="db.m7g.large", usd_per_hour=1),
                Price(service="rds", type="db.m7g.large", usd_per_hour=2, region=REGION),
                Price(service="rds", type="db.m7g.large", usd_per_hour=3, region=REGION, engine="oracle-ee"),
                Price(service="rds", type="db.m7g.large", usd_per_hour=9, multi_az=True),
            )
        )
    )
    db = resource("rds", type="db.m7g.large", engine="postgres")
    usd = {
        "here": pricing.of(db)[0],
        "oracle": pricing.of(replace(db, engine="oracle-ee"))[0],
        "there": pricing.of(replace(db, region="us-east-1"))[0],
        "both zones": pricing.of(replace(db, multi_az=True))[0],
    }
    assert {k: v and round(v.list_usd_per_month / MONTH_H) for k, v in usd.items()} == {
        "here": 2,
        "oracle": 3,
        "there": 1,
        "both zones": 9,
    }


def test_what_has_no_price_says_which_key_would_give_one() -> None:
    money, why = rules_of().pricing.of(resource(type="x9.huge"))
    assert money is None
    assert why == f"report.prices has none for ec2 x9.huge in {REGION}"
    money, why = rules_of().pricing.of(resource("ebs", type="gp3"))
    assert money is None
    assert why == "its storage is not known"


def test_list_and_effective_price_stand_together_with_the_assumption() -> None:
    discounts = (
        Discount(name="EDP", share=0.1, services=("rds",)),
        Discount(name="Savings Plan 2026", share=0.28, accounts=(ACCOUNT,)),
    )
    pricing = Pricing(Report(prices=PRICES, discounts=discounts))
    mine, _ = pricing.of(resource(type="m7g.large"))
    other, _ = pricing.of(replace(resource(type="m7g.large"), account="999988887777"))
    assert mine is not None
    assert other is not None
    assert mine.effective_usd_per_month == pytest.approx(0.72 * mine.list_usd_per_month)
    assert mine.assumption == "Savings Plan 2026: 28% off"
    assert other.effective_usd_per_month == other.list_usd_per_month == mine.list_usd_per_month
    assert other.assumption == LIST_PRICE


def test_storage_costs_while_it_is_stopped_and_hours_do_not() -> None:
    pricing = rules_of().pricing
    db = resource("rds", type="db.m7g.large", storage_bytes=100 * GIB)
    whole, stopped = pricing.of(db)[0], pricing.of(db, 0.0)[0]
    assert whole is not None
    assert stopped is not None
    assert stopped.list_usd_per_month == pytest.approx(11.5)
    assert whole.list_usd_per_month == pytest.approx(11.5 + 0.168 * MONTH_H)


def test_sizes_are_those_of_the_inventory_and_of_the_price_list() -> None:
    pricing = Pricing(
        Report(prices=(Price(service="ec2", type="c7g.large", usd_per_hour=1, vcpu=2, memory_gib=4),))
    )
    seen = [
        resource(type="c7g.4xlarge", vcpu=16, memory_bytes=32 * GIB),
        resource(type="c7g.xlarge", vcpu=4, memory_bytes=8 * GIB),
        resource(type="r7g.xlarge", vcpu=4, memory_bytes=32 * GIB),
        resource("lambda", type="x", vcpu=1),
        resource(type="c7g.2xlarge"),
    ]
    smaller = Catalog.of(seen, pricing).smaller(seen[0])
    assert [(s.type, s.vcpu) for s in smaller] == [("c7g.xlarge", 4), ("c7g.large", 2)]
    assert Catalog.of(seen, pricing).smaller(seen[2]) == ()


def test_runs_of_hours_are_as_long_as_the_axis() -> None:
    with pytest.raises(AssertionError, match="3 hours are not 672"):
        run_length([[3, 1.0]])
