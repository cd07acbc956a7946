"""The page that refreshes: what it says of shards, and which moves it notes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO

from rich.console import Console

from ingest.assign import Assignment, Incarnation, Move
from ingest.overview import Overview, ShardOverview, TargetOverview
from shard_config.model import Aws
from shard_config.price import Prices
from workers.status import GroupStatus, Status
from workers.watch import Fleet, page

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
NOON_MS = int(NOW.timestamp() * 1000)
TARGETS = tuple(
    TargetOverview(f"cloudwatch/11111111111{i}/eu-west-1", i, 3, 3, 2, i // 3, NOW, None, "")
    for i in range(4)
)
LEDGER = Overview(NOW, NOW, TARGETS, (ShardOverview("a", 2, 40.0, 2_000, 0),), 0, 0, 0, 0.0, 0, 0, 0)
ASSIGNMENT = Assignment(
    7, NOON_MS - 12_000, "c came", ("a", "b", "c"), ("a", "c", "b", "b"), (1.0, 1.0, 1.0, 3.0)
)


def seen(**members: list[int]) -> Status:
    group = GroupStatus("g", "t", members, {0: 5, 3: 2})
    return Status(NOW, LEDGER, group, None, None, 0, 0.0, Prices.of(Aws()), None, None, ())


def text_of(found: Status, fleet: Fleet) -> str:
    console = Console(width=200, file=StringIO())
    console.print(page(found, fleet))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_shard_is_shown_with_since_when_it_is_there_its_slots_load_lag_and_tasks() -> None:
    fleet = Fleet(ASSIGNMENT, {"b": Incarnation("b", NOON_MS - 65_000, 1, "h", 1)}, {"b": 4})
    text = text_of(seen(a=[0, 1], b=[2, 3], c=[]), fleet)
    assert "shards: epoch 7, c came, 0m 12s ago; 1 slots on their way" in text
    rows = {
        cells[1]: cells[2:]
        for line in text.splitlines()
        if len(cells := [c.strip() for c in line.split("│")]) == 13
    }
    assert rows["a"][:7] == ["", "2 → 1", "2", "1.00", "5", "", "40"]
    assert rows["b"][:7] == ["1m 05s", "2", "2", "2.00", "2", "4", "0"]
    assert rows["c"][:4] == ["", "0 → 1", "0", "0.00"]
    assert rows["b"][8] == "1"


def test_a_shard_that_is_gone_and_has_worked_says_so() -> None:
    assert any(
        "│ a" in line and "gone" in line for line in text_of(seen(b=[0, 1, 2, 3]), Fleet()).splitlines()
    )
    assert "nothing was assigned yet" in text_of(seen(b=[0]), Fleet())


def test_moves_are_noted_once_and_a_rebalance_under_way_is_none() -> None:
    fleet = Fleet(ASSIGNMENT)
    for members in ({"a": [0, 1], "b": [2, 3]}, {"a": [], "b": []}, {"a": [0], "b": [2, 3], "c": [1]}):
        fleet.take(seen(**members))
    assert [move for _, move in fleet.moved] == [Move(1, "a", "c")]
    fleet.take(replace(seen(), exporters=None))
    assert "12:00:00 slot 1: a → c" in text_of(seen(a=[0], b=[2, 3], c=[1]), fleet)
