"""docs/bounds.md against the code: constants, keys of the configuration, metrics; and what strangers may not make grow."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ingest.assign import Incarnation, encode_incarnation
from ingest.errors import Rejected
from ingest.model import Target
from shard_config.model import Config, ExpositionJob
from shard_config.remote_write import Receiver, RemoteWrite
from tests.worker_metrics import metrics_of_workers
from workers import remote_names, shards
from workers.bounds import Bounds
from workers.remote_names import Names

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "bounds.md").read_text()
CONSTANT = re.compile(r"`((?:ingest|workers)\.[a-z_.]+)\.([A-Z_]+)(?: = ([0-9_.]+))?`")
DEFAULT = re.compile(r"`((?:ingest|workers)\.[a-z_.]+)\.([A-Z]\w+)\((\w+)=([0-9.]+)\)`")
METRIC = re.compile(r"`(headgate_[a-z_]+)")
BOUND = re.compile(r'headgate_bound_used\{bound="([a-z_]+)"\}')
KEY = re.compile(r"`([a-z_]+(?:\.[a-z_]+)?)`")


def rows() -> list[list[str]]:
    """Cells of the tables: what, bound, set by, shown by, at the bound."""
    found = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in PAGE.splitlines()
        if line.startswith("| ")
    ]
    return [cells for cells in found if cells[0] not in ("what", "---")]


def test_every_row_says_what_how_much_by_what_how_it_shows_and_what_happens() -> None:
    assert len(rows()) > 50
    assert [cells for cells in rows() if len(cells) != 5 or not all(cells)] == []


@pytest.mark.parametrize(
    ("module", "name", "value"), sorted(set(CONSTANT.findall(PAGE))), ids=lambda text: text or "there"
)
def test_a_constant_has_the_value_that_the_page_says(module: str, name: str, value: str) -> None:
    there = getattr(importlib.import_module(module), name)
    assert value == "" or there == float(value), f"docs/bounds.md says {value}, the code {there}"


@pytest.mark.parametrize(("module", "cls", "argument", "value"), DEFAULT.findall(PAGE))
def test_a_default_is_what_the_page_says(module: str, cls: str, argument: str, value: str) -> None:
    there = getattr(importlib.import_module(module), cls).__init__.__kwdefaults__[argument]
    assert there == float(value)


def fields_of(path: str) -> Any:
    """The default of a key, as `limits.dead_share_max`; raises KeyError."""
    optional = {"exposition": ExpositionJob, "remote_write": RemoteWrite}
    model: Any = Config
    *parents, name = path.split(".")
    for parent in parents:
        model = optional.get(parent) or type(model.model_fields[parent].default)
    return model.model_fields[name]


def test_every_key_that_is_named_is_one_of_the_configuration() -> None:
    named = {key for cells in rows() for key in KEY.findall(cells[2]) if not key.startswith("ingest")}
    assert {"tasks_in_flight", "limits.dead_share_max", "remote_write.hold_bytes_max"} <= named
    for key in named:
        fields_of(key)


def test_every_metric_that_is_named_is_exported_by_a_worker() -> None:
    named = set(METRIC.findall(PAGE))
    assert len(named) > 15
    exported = metrics_of_workers()
    assert {name for name in named if not any(one.startswith(name) for one in exported)} == set()


def test_every_bound_that_a_worker_watches_is_on_the_page_and_the_other_way_round() -> None:
    watched = {"tables_written", "tables_read"}
    for path in (ROOT / "workers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "BOUNDS.watch":
                watched.add(ast.literal_eval(node.args[0]))
    assert watched == set(BOUND.findall(PAGE))


def test_a_bound_is_read_when_somebody_scrapes() -> None:
    bounds, registry, held = Bounds(), CollectorRegistry(), [1, 2, 3]
    registry.register(bounds)
    bounds.watch("held", lambda: len(held), lambda: 10)
    bounds.watch_tables()
    held.append(4)

    text = generate_latest(registry).decode()

    assert 'headgate_bound_used{bound="held"} 4.0' in text
    assert 'headgate_bound_limit{bound="held"} 10.0' in text
    assert 'headgate_bound_limit{bound="tables_read"} 1.34217728e+08' in text


def test_targets_that_strangers_name_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_names, "WANTED_MAX", 100)
    config = Config(remote_write=RemoteWrite(receivers=(Receiver(name="p1", url="http://p1/write"),)))
    names = Names(config, KnowsAll())  # type: ignore[arg-type]
    for i in range(1000):
        assert names.known(Target("cloudwatch", f"{i:012}", "eu-west-1"), "ec2")
    assert len(names.wanted) == 100


class KnowsAll:
    """A book of resources in which nothing is missing."""

    def known(self, target: Target, service: str) -> bool:
        return True


def test_shards_that_strangers_name_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARDS_MAX", 3)
    board = shards.Board(Config().kafka, "t")

    def take(name: str, at_ms: int) -> None:
        one = Incarnation(name, at_ms, 1, "host", 1)
        board._put(shards.SHARD_KEY + name.encode(), encode_incarnation(one))

    for name in ("a", "b", "c"):
        take(name, 1)
    with pytest.raises(Rejected, match="more than 3 shards"):
        take("d", 1)
    take("a", 2)
    assert {name: one.started_at_ms for name, one in board.incarnations.items()} == {"a": 2, "b": 1, "c": 1}
