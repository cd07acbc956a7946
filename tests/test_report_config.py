"""The `report` section: it loads as the documentation shows it, every key is documented, and what is wrong is refused with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from shard_config.document import ConfigErrors
from shard_config.load import loads
from shard_config.report import Activity, Discount, Idle, Price, Report, Sizing

DOCUMENTATION = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
SECTION = DOCUMENTATION.partition("\n## report\n")[2].partition("\n## ")[0]
MINIMAL = """
accounts:
  - {id: "123456789012", regions: [eu-west-1], services: [ec2]}
"""


def test_the_example_of_the_documentation_loads() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    report = loads(MINIMAL + example, "headgate.yaml", {}).report
    assert report.owner_tag == "team"
    assert [p.type for p in report.prices] == ["m7g.large", "db.m7g.large", "gp3"]
    assert report.discounts[0].share == 0.28


@pytest.mark.parametrize(
    ("model", "prefix"), [(Report, ""), (Price, ""), (Discount, ""), (Idle, "idle."), (Sizing, "sizing.")]
)
def test_the_documentation_names_every_key(model: type[BaseModel], prefix: str) -> None:
    assert [key for key in model.model_fields if not re.search(rf"`{prefix}{key}[`:]", SECTION)
            and key not in ("idle", "sizing")] == []  # fmt: skip


def test_the_documentation_names_every_default_of_a_limit() -> None:
    shown = dict(re.findall(r"^\| `((?:idle|sizing)\.\w+)` \| ([\d.]+) \|", SECTION, re.MULTILINE))
    assert {key: float(value) for key, value in shown.items()} == {
        f"{name}.{key}": float(value)
        for name, limits in (("idle", Idle()), ("sizing", Sizing()))
        for key, value in limits
        if key not in ("disk_ops_per_s", "network_bytes_per_s") or name == "idle"
    }


def test_there_are_no_prices_that_nobody_wrote() -> None:
    assert loads(MINIMAL, "headgate.yaml", {}).report == Report(prices=(), discounts=())


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("prices: [{service: ec2, type: m7g.large}]", "give usd_per_hour, usd_per_gib_month, or both"),
        ("idle: {days: 7}", "14"),
        ("discounts: [{name: EDP, share: 28}]", "less than 1"),
        ("idel: {}", "idel"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(text: str, error: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        loads(f"{MINIMAL}report:\n  {text}\n", "headgate.yaml", {})
    assert error in str(caught.value)
    assert str(caught.value).startswith("headgate.yaml:5")


def test_prices_and_limits_ask_for_nothing_else() -> None:
    one = loads(MINIMAL, "headgate.yaml", {})
    other = loads(f"{MINIMAL}report: {{owner_tag: team, idle: {{cpu_percent: 3}}}}\n", "headgate.yaml", {})
    assert one.revision == other.revision


def test_each_activity_has_a_limit() -> None:
    assert [Idle().limit(activity) for activity in Activity] == [5, 1000, 2, 1]
