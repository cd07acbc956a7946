"""How late points come and change is learned from receipts, look by look; and what is proposed follows from that, or says why nothing does."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from ingest.model import LookStatus, Outcome, ReceiptItem, TaskItem, WindowCount
from ingest.settling import Late, Proposal, forget, observed, propose, seen_late
from tests.test_ledger import NOON_S, Store, ledger_database, receipt_of, store, task_of
from workers.lateness import Lateness
from workers.settle import render, yaml_of

__all__ = ["ledger_database", "store"]  # the fixtures

NOON = datetime.fromtimestamp(NOON_S, UTC)


def done(
    late_s: float, seen: dict[int, tuple[int, int]], published: dict[int, int] | None = None
) -> ReceiptItem:
    """A look at two windows that ended at noon and five minutes before; counts by seconds from noon of their starts."""

    def counts(some: dict[int, tuple[int, int]]) -> tuple[WindowCount, ...]:
        return tuple(WindowCount(NOON_S + s, NOON_S + s + 300, n, d) for s, (n, d) in some.items())

    outcome = Outcome(LookStatus.COMPLETE, "", int(1000 * (NOON_S + late_s)), 1, {}, 1)
    item = TaskItem("ec2", NOON_S - 600, NOON_S, 300)
    if published is None:
        return ReceiptItem(item, outcome, 0, counts(seen), ())
    return ReceiptItem(item, outcome, 0, counts({s: (n, 0) for s, n in published.items()}), (), counts(seen))


def by_age(item: ReceiptItem, before: dict[int, tuple[int, int]] | None = None) -> dict[int, Late]:
    last = {NOON_S + s: c for s, c in (before or {}).items()}
    return {age_s: late for (_, age_s), late in seen_late(item, last).items()}


def test_at_a_windows_first_look_all_its_points_have_appeared_by_then() -> None:
    assert by_age(done(5, {-300: (50, 1), -600: (40, 2)})) == {60: Late(50), 360: Late(40)}


def test_what_was_first_looked_at_long_after_its_end_says_nothing() -> None:
    assert by_age(done(600, {-300: (50, 1)})) == {}


def test_later_looks_show_what_came_and_what_changed_since_the_last_one() -> None:
    look = done(5, {-300: (50, 1), -600: (52, 3)}, published={-300: 50, -600: 10})
    assert by_age(look, {-600: (49, 9)}) == {60: Late(50), 360: Late(3, 7)}
    assert by_age(look, {-600: (52, 3), -300: (50, 1)}) == {60: Late(0, 50), 360: Late(0, 10)}


def test_a_look_that_published_everything_shows_only_what_came() -> None:
    assert by_age(done(5, {-600: (52, 3)}), {-600: (49, 9), -300: (0, 0)}) == {60: Late(), 360: Late(3)}


AGES = {60: Late(99_000), 360: Late(950, 300), 660: Late(40, 30), 960: Late(10, 5)}


@pytest.mark.parametrize(
    ("share", "expected"), [(0.9999, 960), (0.9995, 660), (0.999, 360), (0.998, 360), (0.9, 60)]
)
def test_the_least_age_after_which_no_more_than_the_rest_came_or_changed(share: float, expected: int) -> None:
    proposal = propose("ec2", {**AGES, 1260: Late(0, 0)}, 600, share)
    assert proposal == Proposal("ec2", 600, 100_000, expected, 85 / 100_000)


def test_where_points_still_came_at_the_last_look_nothing_is_guessed() -> None:
    proposal = propose("ec2", AGES, 600, 0.9999)
    assert (proposal.settling_s, proposal.detail) == (
        None,
        "still coming or changing at the last look, 960 s after the end: try more than that",
    )


@pytest.mark.parametrize("ages", [{}, {60: Late(500)}, {60: Late(500_000)}], ids=["none", "few", "one look"])
def test_with_too_little_data_nothing_is_guessed(ages: dict[int, Late]) -> None:
    proposal = propose("ec2", ages, 600, 0.999)
    assert (proposal.settling_s, proposal.unsettled) == (None, None)
    assert proposal.detail.startswith("too little data")


def test_what_to_paste_has_only_what_differs() -> None:
    some = [
        Proposal("ec2", 600, 10**6, 360, 0.0),
        Proposal("rds", 600, 10**6, 600, 0.0),
        Proposal("sqs", 300, 5, None, None, "too little data"),
    ]
    assert yaml_of(some) == "services:\n  ec2:\n    settling_s: 360"
    assert yaml_of(some[1:]) == ""
    assert render(some, 0.999).row_count == 3


def test_the_metrics_are_cumulative_by_age() -> None:
    lateness = Lateness()
    lateness.seen = {"ec2": {360: Late(10, 4), 60: Late(90)}}
    late, revised = lateness.collect()
    assert [(s.labels.get("le"), s.value) for s in late.samples if s.name.endswith("bucket")] == [
        ("60.0", 90),
        ("360.0", 100),
        ("+Inf", 100),
    ]
    assert [s.value for s in revised.samples if s.name.endswith("gsum")] == [4 * 360]


async def test_receipts_are_learned_from_once_and_kept_by_day(store: Store) -> None:
    for number, (late_s, points) in enumerate([(5, 40), (305, 45)]):
        task = replace(task_of(NOON_S - 300, NOON_S), task_id=f"{number:032x}")
        receipt = receipt_of(task, observed_s=NOON_S + late_s, counts=[(NOON_S - 300, points, 1)])
        await store.project(receipt)
        await store.project(receipt)
    assert await observed(store.sql, NOON, 1) == {"ec2": {60: Late(40), 360: Late(5)}}
    assert await observed(store.sql, NOON, 1, "rds") == {}
    await forget(store.sql, datetime.fromtimestamp(NOON_S + 40 * 86_400, UTC))
    assert await observed(store.sql, NOON, 1) == {}
