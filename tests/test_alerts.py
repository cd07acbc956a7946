"""Each alert fires when it should and not when not (promtool), asks for metrics that a running worker has, and has a runbook."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.alert_scenes import QUIET, SCENES, Quiet, Scene, Series
from tests.prometheus_server import needs_promtool, promtool
from tests.test_documents import commands, help_of
from tests.worker_metrics import metrics_of_workers

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "helm/headgate/files/rules/alerts.yml"
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]
}
ABSENCE = {"HeadgateWatchdog", "HeadgateNoCoordinator", "HeadgateLedgerNotObserved"}
"""These fire where there is nothing."""


def test_every_alert_is_shown_when_it_fires_and_every_other_one_when_not() -> None:
    assert {scene.alert for scene in SCENES} == set(RULES)
    assert {quiet.alert for quiet in QUIET} == set(RULES) - {"HeadgateWatchdog"}


@needs_promtool
def test_promtool_finds_nothing_wrong() -> None:
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", FILE)
    assert checked.returncode == 0, checked.stderr


@needs_promtool
@pytest.mark.parametrize("alert", RULES)
def test_it_fires_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    alone = tmp_path / "alone.yml"
    alone.write_text(yaml.safe_dump({"groups": [{"name": "alone", "rules": [RULES[alert]]}]}))
    scenes = [s for s in SCENES if s.alert == alert]
    quiets = [q for q in QUIET if q.alert == alert]
    if alert not in ABSENCE:
        quiets.append(Quiet(alert, "nothing is there", {"up": "1x60"}))
    paths = []
    for step_m in {s.step_m for s in scenes} | {q.step_m for q in quiets}:
        tests = [fires(s) for s in scenes if s.step_m == step_m]
        tests += [stays_quiet(q) for q in quiets if q.step_m == step_m]
        paths.append(tmp_path / f"{step_m}.yml")
        what = {"rule_files": [str(alone)], "evaluation_interval": f"{step_m}m", "tests": tests}
        paths[-1].write_text(yaml.safe_dump(what))
    done = promtool("test", "rules", *paths)
    assert done.returncode == 0, done.stdout + done.stderr


def fires(scene: Scene) -> dict[str, Any]:
    """A test of promtool's: the alert is silent for so long, and then it fires."""
    rule = RULES[scene.alert]
    labels = {**scene.labels, "severity": rule["labels"]["severity"]}
    which = ", ".join(f'{k}="{v}"' for k, v in labels.items())
    once = {
        "expr": f"count by ({', '.join(labels)}) ({firing(scene.alert)})",
        "eval_time": f"{scene.fires_at_m}m",
        "exp_samples": [{"labels": f"{{{which}}}", "value": 1}],
    }
    expected = {"exp_labels": labels, "exp_annotations": {**rule["annotations"], "summary": scene.says}}
    at_m = {"eval_time": f"{scene.fires_at_m}m", "alertname": scene.alert, "exp_alerts": [expected]}
    return {
        "name": f"{scene.alert} fires",
        "interval": f"{scene.step_m}m",
        "input_series": series(scene.series),
        "alert_rule_test": [at_m] if scene.says else [],
        "promql_expr_test": [*silence(scene.alert, scene.quiet_until_m), once],
    }


def stays_quiet(quiet: Quiet) -> dict[str, Any]:
    """A test of promtool's: the alert is silent until the series end."""
    length = max(len(list(expanded(values))) for values in quiet.series.values())
    return {
        "name": f"{quiet.alert} does not fire: {quiet.why}",
        "interval": f"{quiet.step_m}m",
        "input_series": series(quiet.series),
        "promql_expr_test": silence(quiet.alert, (length - 1) * quiet.step_m),
    }


def firing(alert: str) -> str:
    return f'ALERTS{{alertname="{alert}", alertstate="firing"}}'


def silence(alert: str, until_m: int) -> list[dict[str, Any]]:
    """It did not fire at any evaluation from the start up to a minute."""
    ever = f"count_over_time({firing(alert)}[{until_m + 1}m])"
    return [{"expr": ever, "eval_time": f"{until_m}m", "exp_samples": []}] if until_m >= 0 else []


def series(wanted: Series) -> list[dict[str, str]]:
    return [{"series": selector, "values": values} for selector, values in wanted.items()]


def expanded(values: str) -> Iterator[str]:
    """promtool's notation, a word a sample."""
    for word in values.split():
        times = re.search(r"x(\d+)$", word)
        yield from [word] * (int(times[1]) + (not word.startswith("_")) if times else 1)


def test_an_alert_says_what_is_wrong_how_bad_it_is_and_where_to_read_on() -> None:
    for name, rule in RULES.items():
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
        assert "{{" not in rule["annotations"]["description"], name
        severities = {"none"} if name == "HeadgateWatchdog" else {"warning", "critical"}
        assert rule["labels"].keys() == {"severity"}, name
        assert rule["labels"]["severity"] in severities, name


def test_every_metric_that_an_alert_asks_for_is_on_a_running_worker() -> None:
    asked = {metric for rule in RULES.values() for metric in re.findall(r"\bheadgate_\w+", rule["expr"])}
    assert len(asked) > 20
    assert asked - metrics_of_workers() == set()


# --- runbooks -------------------------------------------------------------------------------------------------

RUNBOOKS = sorted((ROOT / "docs/runbooks").glob("*.md"))
OF_ALERTS = {path.stem for path in RUNBOOKS if path.stem.startswith("Headgate")}
HEADINGS = ["What it means", "How bad it is", "Look", "Do", "Whom to wake", "Over when"]


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    assert set(RULES) == OF_ALERTS


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda p: p.stem)
def test_a_runbook_has_its_parts_and_is_short_and_its_commands_exist(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = path.read_text()
    assert text.startswith(f"# {path.stem}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    assert len(text.splitlines()) <= 60
    assert set(re.findall(r"\bHeadgate[A-Z]\w+", text)) <= set(RULES)
    on_workers = metrics_of_workers()
    families = {name.removesuffix("_bucket") for name in on_workers}
    assert set(re.findall(r"\bheadgate_\w+", text)) <= on_workers | families
    lines = [words for words in commands(text) if words[0] == "headgate"]
    lines += [shlex.split(said) for said in re.findall(r"`(headgate [a-z][^`]*)`", text)]
    for _, command, *words in lines:
        # A command that has commands of its own is asked for the help of the one that is meant.
        own = words[:1] if command in ("dead", "import", "compare") or words[:1] == ["reconcile"] else []
        options = {w for w in words if w.startswith("--")}
        assert options <= set(re.findall(r"--[a-z-]+", help_of([command, *own], capsys))), (command, words)
