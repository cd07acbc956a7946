"""Golden counterexamples: for each verdict, resources of which it must not be said, with the reason (tests/golden/report)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingest.report.capacity import filling_of, used_of
from ingest.report.model import VerdictKind
from ingest.report.verdicts import judge
from tests.report_series import AXIS, TO_S, observed, rules_of

GOLDEN = [
    json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "golden" / "report").glob("*.json"))
]
VERDICTS = [one for one in GOLDEN if one.get("expected")]
CAPACITY = [one for one in GOLDEN if "days_to_full" in one]


def name(one: dict[str, Any]) -> str:
    return str(one["name"]).replace(" ", "-")


@pytest.mark.parametrize("one", VERDICTS, ids=name)
def test_a_verdict_is_not_given_where_it_would_be_wrong(one: dict[str, Any]) -> None:
    verdict = judge(observed(one), AXIS, TO_S, rules_of(inventory=one.get("inventory", True)))
    assert str(verdict.kind) not in one["must_not"], one["why"]
    assert str(verdict.kind) == one["expected"], f"{verdict.rule} {verdict.evidence}"
    if "confidence" in one:
        assert verdict.confidence == one["confidence"]
    if "smaller" in one:
        assert verdict.smaller is not None
        assert verdict.smaller.type == one["smaller"]
    if "waste_usd_per_month" in one:
        waste = None if verdict.waste is None else round(verdict.waste.list_usd_per_month, 2)
        assert waste == one["waste_usd_per_month"]
        assert bool(verdict.waste_unknown) == (waste is None)


@pytest.mark.parametrize("one", CAPACITY, ids=name)
def test_days_to_full_are_not_told_where_they_would_be_wrong(one: dict[str, Any]) -> None:
    seen = observed(one)
    used = used_of(seen, AXIS, TO_S)
    filling = None if used is None else filling_of(used, seen, "")
    match one["days_to_full"]:
        case None:
            assert filling is None, one["why"]
        case str(words):
            assert filling is not None
            assert filling.to_100.days is None
            assert f"more than {filling.to_100.more_than:.0f}" == words
        case [least, most]:
            assert filling is not None
            assert filling.to_100.days is not None
            assert least <= filling.to_100.days <= most
            assert filling.to_100.earliest is not None
            assert filling.to_100.earliest <= filling.to_100.days


def test_each_verdict_has_a_counterexample_that_says_why() -> None:
    counted = {kind: sum(str(kind) in one["must_not"] for one in VERDICTS) for kind in VerdictKind}
    assert counted[VerdictKind.IDLE] >= 20
    assert counted[VerdictKind.OVERSIZED] >= 20
    assert len([one for one in CAPACITY if one["days_to_full"] is None]) >= 8
    assert [one["name"] for one in GOLDEN if len(one["why"]) < 10] == []


def test_every_kind_of_verdict_is_given_in_some_golden_file() -> None:
    assert {one["expected"] for one in VERDICTS} == {str(kind) for kind in VerdictKind}
