"""Dashboards ask for what there is, in expressions that Prometheus takes, and are what Grafana can read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from shard_config.known import shipped_services
from shard_config.load import load
from shard_config.recording import recordings_of
from shard_config.series_names import metric_name
from tests.prometheus_server import PrometheusServer, needs_prometheus
from tests.worker_metrics import metrics_of_workers
from workers.cli import main
from workers.dashboards import files
from workers.grafana import COLUMNS, Dashboard, Panel, Query, Row, Variable, made
from workers.own_dashboards import OWN
from workers.service_groups import GROUPS

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "helm/headgate/files/dashboards"
BOARDS = {name: json.loads(content) for name, content in files().items()}
OF_PROMETHEUS = {"ALERTS", "process_cpu_seconds_total", "process_resident_memory_bytes"}
"""Metrics that every process has, or that Prometheus makes."""
every_board = pytest.mark.parametrize("board", BOARDS.values(), ids=list(BOARDS))


def panels_of(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions_of(board: dict[str, Any]) -> Iterator[str]:
    """As Grafana sends them, of every choice of its variables."""
    by = [v["options"] for v in board["templating"]["list"] if v["name"] == "by"]
    for panel in panels_of(board):
        for target in panel["targets"]:
            for choice in by[0] if by else [{"value": ""}]:
                yield filled(target["expr"], {"by": choice["value"]})


def filled(expr: str, chosen: dict[str, str]) -> str:
    values = {
        "__rate_interval": "1m",
        "account": ".*",
        "account_id": "1|2",
        "region": ".*",
        "receiver": "p1",
        **chosen,
    }
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expr)


def metrics_of(expr: str) -> set[str]:
    """Names of the selectors in an expression."""
    return {
        found
        for found in re.findall(r"(?<![\w:\"$])(?:[a-zA-Z_]\w*:)?[a-zA-Z_]\w*(?::\w+)?(?=\{|\[|\)| |$)", expr)
        if re.match(r"headgate_|aws_|account_region:|process_|ALERTS", found)
    }


def test_the_charts_files_are_what_the_command_makes() -> None:
    assert {path.name: path.read_text() for path in SHIPPED.glob("*.json")} == files()


def test_the_command_writes_them_and_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboards", "--out", str(tmp_path / "new")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(BOARDS)
    capsys.readouterr()
    assert main(["dashboards"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BOARDS)


@every_board
def test_every_expression_parses(board: dict[str, Any]) -> None:
    expressions = list(expressions_of(board))
    assert expressions
    for expression in expressions:
        promql_parser.parse(expression)


@needs_prometheus
def test_every_expression_is_one_that_a_real_prometheus_takes(tmp_path: Path) -> None:
    server = PrometheusServer(tmp_path / "prometheus")
    server.start()
    try:
        for board in BOARDS.values():
            for expression in set(expressions_of(board)):
                server.api("query", query=expression, time=1_795_500_000)
    finally:
        server.stop()


def test_every_metric_of_headgates_own_is_on_a_running_worker() -> None:
    asked = {m for board in BOARDS.values() for e in expressions_of(board) for m in metrics_of(e)}
    ours = {metric for metric in asked if metric.startswith("headgate_")}
    assert len(ours) > 40
    assert ours - metrics_of_workers() == set()
    assert {m for m in asked if not re.match(r"headgate_|aws_|account_region:", m)} == OF_PROMETHEUS


def test_every_metric_of_aws_is_one_that_a_shipped_profile_makes_and_every_record_is_recorded() -> None:
    asked = {m for board in BOARDS.values() for e in expressions_of(board) for m in metrics_of(e)}
    made_by_profiles = {
        metric_name("yace", profile.namespace, metric.name, stat)
        for profile in shipped_services().values()
        for metric in profile.metrics
        if not isinstance(metric, str)
        for stat in metric.statistics
    }
    recorded = {record.name for recording in recordings_of(None) for record in recording.records}
    assert len({m for m in asked if m.startswith("aws_")}) > 40
    assert {m for m in asked if m.startswith("aws_")} - made_by_profiles == set()
    assert len({m for m in asked if m.startswith("account_region:")}) > 80
    assert {m for m in asked if m.startswith("account_region:")} - recorded == set()


def test_every_shipped_service_is_on_a_dashboard_with_all_that_is_meant_to_be_seen_of_it() -> None:
    rows = [row for group in GROUPS for row in group.services]
    assert {row.service for row in rows} == set(shipped_services())
    wanted = sum(1 + bool(one.worst) for row in rows for one in row.shown)
    boards = [BOARDS[f"{group.name}.json"] for group in GROUPS]
    assert sum(len(panels_of(board)) for board in boards) == wanted
    lines = sum(len(one.stats) + bool(one.worst) for row in rows for one in row.shown)
    assert sum(len(panel["targets"]) for board in boards for panel in panels_of(board)) == lines


CONFIGURED = """
accounts: [{id: "100000000001", regions: [eu-west-1], services: [ec2, s3]}]
services:
  ec2:
    settling_s: 1200
    metrics: [{name: CPUUtilization, statistics: [Average]}, {name: NetworkIn, statistics: [Sum]}]
remote_write: {snake_case: true, receivers: [{name: p1, url: "http://p1/api/v1/write"}], names: NAMES}
"""


def test_a_configurations_dashboards_have_what_it_collects_as_late_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_text(CONFIGURED.replace("NAMES", "yace"))
    assert main(["dashboards", "--config", str(path), "--out", str(tmp_path / "out")]) == 0
    boards = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out").iterdir()}
    assert boards.keys() - {board.uid.removeprefix("headgate-") for board in OWN} == {"compute", "storage"}
    shown = {panel["title"]: panel["targets"] for panel in panels_of(boards["compute"])}
    assert shown.keys() == {"CPU", "Network in"}
    assert [target["legendFormat"].split()[-1] for target in shown["CPU"]] == ["average"]
    config = load(path, environ={})
    recorded = {record.name for recording in recordings_of(config) for record in recording.records}
    asked = {m for board in boards.values() for e in expressions_of(board) for m in metrics_of(e)}
    assert {m for m in asked if m.startswith("account_region:")} <= recorded
    assert shown["Network in"][0]["expr"].endswith("offset -26m) / 60")
    storage = " ".join(expressions_of(boards["storage"]))
    assert "dimension_bucket_name" in storage


def test_names_that_are_not_yaces_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_text(CONFIGURED.replace("NAMES", "headgate"))
    assert main(["dashboards", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "remote_write.names" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@every_board
def test_panels_lie_side_by_side_within_the_columns_and_have_ids_of_their_own(board: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= COLUMNS
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@every_board
def test_a_board_is_what_grafana_reads(board: dict[str, Any]) -> None:
    assert board["id"] is None
    assert board["schemaVersion"] >= 39
    assert re.fullmatch(r"now-\d+[hd]", board["time"]["from"])
    assert re.fullmatch(r"\d+m", board["refresh"])
    source, *others = board["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    variables = {variable["name"] for variable in others}
    for panel in panels_of(board):
        assert panel["type"] in {"timeseries", "stat", "bargauge", "table"}
        assert panel["title"]
        assert panel["description"].endswith((".", "?")), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [t["refId"] for t in panel["targets"]] == list("ABC"[: len(panel["targets"])])
        assert all(t["datasource"] == panel["datasource"] for t in panel["targets"])
        assert all(t["range"] is not t["instant"] for t in panel["targets"])
        used = {name for t in panel["targets"] for name in re.findall(r"\$(\w+)", t["expr"])}
        assert used - {"__rate_interval"} <= variables
        first, *steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert first["value"] is None
        assert [s["value"] for s in steps] == sorted(s["value"] for s in steps)
    asked = " ".join(t["expr"] for panel in panels_of(board) for t in panel["targets"])
    assert {name for name in variables if f"${name}" not in asked} == set()


def test_boards_have_ids_of_their_own_and_lead_to_each_other() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)
    assert len({board["title"] for board in BOARDS.values()}) == len(BOARDS)
    for board in BOARDS.values():
        (link,) = board["links"]
        assert link["tags"] == board["tags"] == ["headgate"]


def test_late_points_are_asked_for_as_far_back_as_they_may_be() -> None:
    compute = BOARDS["compute.json"]
    by_title = {panel["title"]: panel["targets"][0]["expr"] for panel in panels_of(compute)}
    assert by_title["Network in"] == (
        'sum by ($by) (account_region:aws_ec2_network_in_sum:sum{account_id=~"$account_id",region=~"$region"} offset -16m) / 60'
    )
    assert "last_over_time(" in by_title["CPU: highest"]
    assert by_title["CPU: highest"].endswith("[16m])))")
    for board in BOARDS.values():
        for panel in panels_of(board):
            for target in panel["targets"]:
                if re.search(r"\b(aws_|account_region:)", target["expr"]):
                    assert re.search(r"last_over_time|offset -", target["expr"]), panel["title"]


def test_a_panel_that_does_not_fit_begins_a_new_line() -> None:
    wide = tuple(Panel(str(i), "What.", (Query("up"),), width=10, height=3 + i) for i in range(3))
    board = made(Dashboard("u", "t", "w", (Row("a", wide), Row("b", wide[:1])), (Variable("v", "V", "up"),)))
    assert [tuple(p["gridPos"].values()) for p in board["panels"]] == [
        (1, 24, 0, 0),
        (3, 10, 0, 1),
        (4, 10, 10, 1),
        (5, 10, 0, 5),
        (1, 24, 0, 10),
        (3, 10, 0, 11),
    ]
