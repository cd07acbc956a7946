"""`headgate plan`: what a change would move, why, and against what bound; before it is made."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ingest.assign import Assignment
from ingest.ledger import Ledger
from ingest.schedule import grids_of
from ingest.sinks.migrate import migrate
from ingest.weights import weights_of
from shard_config.load import ConfigErrors
from shard_config.model import Account, Config, Kafka, Postgres, ServiceProfile
from shard_config.plan import moves
from shard_config.units import UnitPlan, plan_units
from workers.cli import main
from workers.plan import ask
from workers.plan_change import (
    Change,
    Known,
    changed,
    changes_of,
    propose,
    shard_names,
    with_a_plan_before,
)

SERVICES = ("ec2", "rds", "sqs")
ACCOUNTS = tuple(f"{i:012}" for i in range(30))
CONFIG = Config(
    accounts=tuple(Account(id=a, regions=("eu-west-1",), services=SERVICES) for a in ACCOUNTS),
    services=tuple(ServiceProfile(service=s, namespace=f"AWS/{s}") for s in SERVICES),
    slots=8,
)
SERIES = {f"cloudwatch/{a}/eu-west-1": dict.fromkeys(SERVICES, 500.0) for a in ACCOUNTS}
KEPT = plan_units(weights_of(grids_of(CONFIG), SERIES), CONFIG.slots)
KNOWN = Known(SERIES, KEPT, None, ())


def owned(*shards: str) -> Assignment:
    owners = tuple(shards[slot % len(shards)] for slot in range(CONFIG.slots))
    return Assignment(1, 0, "test", shards, owners, (100.0,) * CONFIG.slots)


def test_without_a_change_nothing_moves() -> None:
    proposal = propose(CONFIG, KNOWN)
    assert (proposal.changes, proposal.moved, proposal.least, proposal.doubts) == ((), 0.0, 0.0, ())
    assert proposal.plan == KEPT


def test_an_account_that_comes_is_new_and_moves_nothing() -> None:
    proposal = propose(changed(CONFIG, ["999999999999:eu-west-1,us-east-1"], [], None), KNOWN)
    assert [(c.target, c.services, c.before, c.why) for c in proposal.changes] == [
        ("cloudwatch/999999999999/eu-west-1", (), None, "new"),
        ("cloudwatch/999999999999/us-east-1", (), None, "new"),
    ]
    assert proposal.moved == 0
    # Each weighs what the services weigh elsewhere, and that is said.
    assert [c.weight for c in proposal.changes] == [300.0, 300.0]
    assert proposal.doubts == ("weights of 6 of 96 services are assumed",)


def test_an_account_that_goes_is_gone_and_its_weight_is_that_of_before() -> None:
    proposal = propose(changed(CONFIG, [], [ACCOUNTS[3]], None), KNOWN)
    gone = f"cloudwatch/{ACCOUNTS[3]}/eu-west-1"
    assert proposal.changes == (Change(gone, (), 300.0, KEPT.slots[gone], None, "gone"),)


def test_more_slots_move_targets_for_balance_and_at_least_what_is_said() -> None:
    proposal = propose(changed(CONFIG, [], [], 16), KNOWN)
    assert {c.why for c in proposal.changes} == {"balance"}
    assert proposal.moved == sum(m.weight for m in moves(KEPT.slots, proposal.plan.slots, KEPT.weights))
    # 30 of 300 on 16 slots: level 562.5, and one more may stay. Of 1,200 337.5 are too much, of 900 one target.
    assert proposal.least == 6 * 337.5 + 2 * 300
    assert proposal.moved == 6 * 600 + 2 * 300
    assert {c.after for c in proposal.changes} == set(range(8, 16))


def test_a_slot_that_has_grown_is_why_its_targets_move() -> None:
    grown = {t for t, slot in KEPT.slots.items() if slot == 0}
    series = {
        t: {s: n * 3 if t in grown else n for s, n in services.items()} for t, services in SERIES.items()
    }
    proposal = propose(CONFIG, replace(KNOWN, series=series))
    assert {(c.why, c.before) for c in proposal.changes} == {("heavier", 0)}


def test_a_target_that_is_split_says_which_services_move() -> None:
    heavy = f"cloudwatch/{ACCOUNTS[0]}/eu-west-1"
    series = SERIES | {heavy: dict.fromkeys(SERVICES, 60_000.0)}
    proposal = propose(CONFIG, replace(KNOWN, series=series))
    split = [c for c in proposal.changes if c.target == heavy]
    assert {c.why for c in split} == {"split"}
    assert 0 < sum(len(c.services) for c in split) < 3
    back = changes_of(proposal.plan, KEPT, weights_of(grids_of(CONFIG), SERIES))
    assert {c.why for c in back if c.target == heavy} == {"joined"}


def test_a_shard_that_goes_gives_away_its_slots_and_no_others() -> None:
    known = replace(KNOWN, published=owned("exporter-1", "exporter-2", "exporter-3", "exporter-4"))
    proposal = propose(CONFIG, known, shards=3)
    assert set(proposal.owners) == {"exporter-1", "exporter-2", "exporter-3"}
    assert proposal.slots_moved == (3, 7)
    assert propose(CONFIG, known).slots_moved == ()


def test_shards_leave_from_the_highest_number_and_come_after_it() -> None:
    assert shard_names([], 2) == ["exporter-1", "exporter-2"]
    assert shard_names(["exporter-10", "exporter-9", "exporter-1"], 2) == ["exporter-1", "exporter-9"]
    assert shard_names(["x-0", "x-1"], 4) == ["x-0", "x-1", "x-2", "x-3"]


@pytest.mark.parametrize(
    ("added", "removed", "slots", "error"),
    [
        (["12"], [], None, "--add: '12'"),
        ([ACCOUNTS[0]], [], None, "is there already"),
        ([f"{ACCOUNTS[0]}:eu-west-1"], [], None, "is there already"),
        ([], ["999999999999"], None, "is not in the configuration"),
        ([], [], 7, "7 are less than the 8 there are; slots never shrink"),
    ],
)
def test_a_change_that_cannot_be_is_refused(
    added: list[str], removed: list[str], slots: int | None, error: str
) -> None:
    with pytest.raises(ConfigErrors, match=error):
        changed(CONFIG, added, removed, slots)


def test_a_region_can_be_added_to_an_account_that_is_there() -> None:
    config = changed(CONFIG, [f"{ACCOUNTS[0]}:us-east-1"], [], None)
    [account] = [a for a in config.accounts if a.id == ACCOUNTS[0]]
    assert account.regions == ("eu-west-1", "us-east-1")


def test_less_slots_than_the_plan_in_use_has_are_refused() -> None:
    with pytest.raises(ConfigErrors, match="slots never shrink"):
        propose(CONFIG.model_copy(update={"slots": 6}), KNOWN)


def test_where_no_plan_is_kept_the_one_before_is_that_of_the_configuration_as_it_is() -> None:
    nothing = Known({}, UnitPlan({}, {}), None, ("away",))
    proposal = propose(changed(CONFIG, ["999999999999"], [], None), with_a_plan_before(CONFIG, nothing))
    assert [c.why for c in proposal.changes] == ["new"]
    assert proposal.doubts == ("away", "weights of 93 of 93 services are assumed")


FILE = """
accounts:
  - {id: "111111111111", regions: [eu-west-1, us-east-1], services: [ec2, rds]}
slots: 3
kafka: {bootstrap: "127.0.0.1:1"}
postgres: {dsn: "postgresql://headgate@127.0.0.1:1/headgate"}
"""


def test_the_command_says_what_it_could_not_ask_and_plans_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_text(FILE)
    words = ["plan", "--config", str(path), "--add", "222222222222", "--shards", "2"]
    assert main([*words, "--format", "json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert [sorted(slot["units"]) for slot in page["slots"]] != [[], [], []]
    assert {slot["shard"] for slot in page["slots"]} == {"exporter-1", "exporter-2"}
    assert [c["why"] for c in page["changes"]] == ["new", "new"]
    assert len(page["doubts"]) == 3
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "0 moves, 0.00% of the weight" in shown
    assert "the ledger is not reachable" in " ".join(shown.split())
    assert main([*words, "--shards", "4"]) == 2


async def test_the_plan_and_the_weights_come_from_the_ledger(database: str) -> None:
    config = CONFIG.model_copy(
        update={"postgres": Postgres(dsn=database), "kafka": Kafka(bootstrap="127.0.0.1:1")}
    )
    await migrate(config.postgres)
    ledger = Ledger(config.postgres, "test", {})
    try:
        await ledger.remember_plan(KEPT.slots, KEPT.weights, 1_767_268_800)
    finally:
        await ledger.close()
    async with asyncio.timeout(30):
        known = await ask(config)
    assert known.kept == KEPT
    assert known.series == {}
    assert [doubt.split(":")[0] for doubt in known.doubts] == ["which shards there are is not known"]
