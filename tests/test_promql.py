"""Rules that were made for fresh points, as `headgate import rules` writes them for late ones."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from ingest.schedule import grid_of
from shard_config.document import ConfigErrors
from shard_config.known import shipped_services
from shard_config.late import PIPELINE_S, LateNames, delay_of, late_names, spoken
from shard_config.load import loads
from shard_config.promql import NotMigrated, rewrite
from shard_config.promql_scan import selectors_of
from shard_config.remote_write import Receiver
from tests.late_points import MINUTE_S, Feed, labels
from tests.prometheus_server import PrometheusServer, needs_prometheus, needs_promtool, promtool
from workers.cli import main
from workers.rules import migrated

SETTLED = late_names(None)
ARRIVED = LateNames(
    shipped_services().values(), [Receiver(name="one", url="http://one/write", out_of_order_window_s=7200)]
)
CPU, DB_CPU, ERRORS = (
    "aws_ec2_cpuutilization_average",
    "aws_rds_cpuutilization_average",
    "aws_lambda_errors_sum",
)
CONFIG = """
kafka: {bootstrap: "kafka:9092"}
postgres: {dsn: postgresql://headgate@postgres/headgate}
s3: {bucket: raw}
accounts: [{id: "100000000001", regions: [eu-west-1], services: [%s]}]
services: {%s}
remote_write: {receivers: [{name: one, url: http://prometheus/api/v1/write, out_of_order_window_s: %d}], names: %s}
"""


def config_of(services: str = "ec2", own: str = "", window_s: int = 0, names: str = "yace") -> LateNames:
    return late_names(loads(CONFIG % (services, own, window_s, names), "headgate.yaml", environ={}))


# --- how late -------------------------------------------------------------------------------------------------


def test_a_point_has_come_by_the_look_that_seals_its_window_and_a_minute_for_the_way() -> None:
    ec2 = delay_of(shipped_services()["ec2"])

    assert (ec2.earliest_s, ec2.latest_s, ec2.newest_s) == (60 + 600, 300 + 600 + 60, 300 + 600 + 60)


@pytest.mark.parametrize("service", sorted(shipped_services()))
def test_the_latest_look_is_the_one_that_the_schedule_takes(service: str) -> None:
    profile = shipped_services()[service]

    assert delay_of(profile).latest_s == profile.poll_interval_s + grid_of(profile).lookback_s + PIPELINE_S


def test_a_settling_time_between_polls_ends_with_the_next_poll() -> None:
    odd = shipped_services()["ec2"].model_copy(update={"settling_s": 601})

    assert delay_of(odd).latest_s == 300 + 900 + 60


def test_daily_points_are_refused_by_a_receiver_without_a_window_for_days() -> None:
    s3 = shipped_services()["s3"]
    wide = Receiver(name="wide", url="http://one/write", out_of_order_window_s=6 * 86_400)

    assert "out-of-order window" in delay_of(s3).refused
    assert "receiver one" in delay_of(s3, [Receiver(name="one", url="http://one/write"), wide]).refused
    assert delay_of(s3, [wide]).refused == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(60, "1m"), (1020, "17m"), (90_000, "1d1h"), (61, "1m1s"), (0, "0s")]
)
def test_a_duration_is_spoken_as_promql_writes_it(seconds: int, text: str) -> None:
    assert spoken(seconds) == text


# --- expressions ----------------------------------------------------------------------------------------------

WRITTEN = [
    # the original, with settled points, with points that come a poll at once
    (f"{CPU} > 90", f"last_over_time({CPU}[16m]) > 90", f"{CPU} offset 16m > 90"),
    (f'{CPU}{{a="b"}}>90', f'last_over_time({CPU}{{a="b"}}[16m])>90', f'{CPU}{{a="b"}} offset 16m>90'),
    (f'{CPU}{{a="}} {DB_CPU}"}}', f'last_over_time({CPU}{{a="}} {DB_CPU}"}}[16m])', f'{CPU}{{a="}} {DB_CPU}"}} offset 16m'),
    (f"sum by (x) ({CPU})", f"sum by (x) (last_over_time({CPU}[16m]))", f"sum by (x) ({CPU} offset 16m)"),
    (f"sum({CPU}) by (x)", f"sum(last_over_time({CPU}[16m])) by (x)", f"sum({CPU} offset 16m) by (x)"),
    (f"-{CPU}", f"-last_over_time({CPU}[16m])", f"-{CPU} offset 16m"),
    (f"topk(3, {CPU})", f"topk(3, last_over_time({CPU}[16m]))", f"topk(3, {CPU} offset 16m)"),
    (f"absent({CPU})", f"absent_over_time({CPU}[16m])", f"absent({CPU} offset 16m)"),
    (f"absent({CPU} > 5)", f"absent(last_over_time({CPU}[16m]) > 5)", f"absent({CPU} offset 16m > 5)"),
    (f"{CPU} and on (name) aws_ec2_info", f"last_over_time({CPU}[16m]) and on (name) aws_ec2_info", f"{CPU} offset 16m and on (name) aws_ec2_info"),
    (f"{CPU} * on (name) group_left ({CPU}) up", f"last_over_time({CPU}[16m]) * on (name) group_left ({CPU}) up", f"{CPU} offset 16m * on (name) group_left ({CPU}) up"),
    (f'{CPU}{{a="b"}}and up', f'last_over_time({CPU}{{a="b"}}[16m])and up', f'{CPU}{{a="b"}} offset 16m and up'),
    (f"sum({ERRORS}) or vector(0)", f"sum(last_over_time({ERRORS}[16m])) or vector(0)", f"sum({ERRORS} offset 16m) or vector(0)"),
    (f"{CPU} @ end()", f"last_over_time({CPU}[16m] @ end())", f"{CPU} offset 16m @ end()"),
    (f'{{__name__="{CPU}"}}', f'last_over_time({{__name__="{CPU}"}}[16m])', f'{{__name__="{CPU}"}} offset 16m'),
    ('{__name__=~"aws_ec2_.*"}', 'last_over_time({__name__=~"aws_ec2_.*"}[16m])', '{__name__=~"aws_ec2_.*"} offset 16m'),
    # services that are not equally late: the later one decides for both
    (f"{CPU} / aws_kinesis_incoming_records_sum", f"last_over_time({CPU}[21m]) / last_over_time(aws_kinesis_incoming_records_sum[21m])", f"{CPU} offset 21m / aws_kinesis_incoming_records_sum offset 21m"),
    # what asks for more than instants is asked as of one time
    *((before, after, after) for before, after in (
        (f"avg_over_time({CPU}[5m])", f"avg_over_time({CPU}[5m] offset 16m)"),
        (f"quantile_over_time(0.9, {CPU}[ 1h ])", f"quantile_over_time(0.9, {CPU}[ 1h ] offset 16m)"),
        (f"predict_linear({CPU}[1h], 3600)", f"predict_linear({CPU}[1h] offset 16m, 3600)"),
        (f"{CPU} - {CPU} offset 5m", f"{CPU} offset 16m - {CPU} offset 21m"),
        (f"{CPU} > avg_over_time({CPU}[1h] offset 1d)", f"{CPU} offset 16m > avg_over_time({CPU}[1h] offset 1d16m)"),
        (f"{CPU} @ start() offset 1h", f"{CPU} @ start() offset 1h16m"),
        (f"max_over_time({CPU}[1h:5m])", f"max_over_time({CPU} offset 16m[1h:5m])"),
        (f"max_over_time(sum({CPU})[1h:])", f"max_over_time(sum({CPU} offset 16m)[1h:])"),
        (f"absent_over_time({CPU}[10m])", f"absent_over_time({CPU}[10m] offset 16m)"),
        (f"rate({ERRORS}[5m])", f"rate({ERRORS}[5m] offset 16m)"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("before", "settled", "arrived"), WRITTEN)
def test_an_expression_is_changed_where_late_series_are_asked_for_and_nowhere_else(
    before: str, settled: str, arrived: str
) -> None:
    assert rewrite(before, SETTLED).text == settled
    assert rewrite(before, ARRIVED).text == arrived


@pytest.mark.parametrize(
    "expr",
    [
        "up == 0",
        "aws_ec2_info",
        f"{CPU} @ 1609746000 > 1",
        f"avg_over_time({CPU}[5m] @ 1609746000)",
        f'label_replace(up, "{CPU}", "$1", "job", "(.*)")',
        f"sum by ({CPU}) (up)",
        f"up # {CPU}",
        "aws_elasticbeanstalk_environment_health_average",
    ],
)
def test_what_asks_for_no_late_series_stays_as_it_is(expr: str) -> None:
    done = rewrite(expr, SETTLED)

    assert (done.text, done.how, done.edits) == (expr, "left", ())


@pytest.mark.parametrize(
    ("expr", "why"),
    [
        (f"time() - timestamp({CPU}) > 600", "max_over_time(timestamp("),
        (f"{CPU} offset -5m", "a time to come"),
        ('{account_id="1"} > 5', "name the metric"),
        ('{__name__!="up",a="b"}', "name the metric"),
        ('{__name__=~"aws_[[:alpha:]]+(?P<x"}', "it is not PromQL"),
        (f"sum({CPU}", "it is not PromQL"),
        (f"{CPU}[5m] > ", "it is not PromQL"),
        ("aws_s3_bucket_size_bytes_average > 1e12", "out-of-order window"),
    ],
)
def test_what_cannot_be_changed_with_certainty_is_refused_with_the_reason(expr: str, why: str) -> None:
    with pytest.raises(NotMigrated, match=why.replace("(", "[(]")):
        rewrite(expr, SETTLED)


def test_the_newest_point_is_in_reach_until_the_next_has_come() -> None:
    names = config_of("ec2", "ec2: {period_s: 300}")

    assert rewrite(f"{CPU} > 90", names).text == f"last_over_time({CPU}[21m]) > 90"


def test_points_that_are_further_apart_than_prometheus_looks_back_are_asked_for_in_their_period() -> None:
    names = config_of("ec2", "ec2: {period_s: 600, poll_interval_s: 600}")

    assert rewrite(f"{CPU} - {CPU} offset 1h", names).text == (
        f"last_over_time({CPU}[10m] offset 21m) - last_over_time({CPU}[10m] offset 1h21m)"
    )
    assert rewrite(f"absent({CPU} offset 1h)", names).text == f"absent_over_time({CPU}[10m] offset 1h21m)"


def test_a_shorter_settling_time_makes_rules_quicker() -> None:
    names = config_of("ec2", "ec2: {settling_s: 300}")

    assert rewrite(f"{CPU} > 90", names).text == f"last_over_time({CPU}[11m]) > 90"


def test_only_what_the_configuration_collects_is_known() -> None:
    assert rewrite(f"{DB_CPU} > 90", config_of("ec2")).how == "left"


def test_a_service_of_which_all_is_collected_is_known_by_its_namespace() -> None:
    names = config_of("ec2, own", "own: {namespace: AWS/ES, metrics: all}")

    assert rewrite("aws_es_nodes_average", names).text == "last_over_time(aws_es_nodes_average[16m])"


def test_a_rate_of_sums_is_pointed_out() -> None:
    assert any("divided by 60" in note for note in rewrite(f"rate({ERRORS}[5m])", SETTLED).notes)
    assert not any("divided" in note for note in rewrite(f"deriv({CPU}[5m])", SETTLED).notes)


def test_expressions_put_together_at_random_keep_their_shape() -> None:
    """The change is undone by text, and gives the original back: the check that `rewrite` makes of the tree holds for all of these as well."""
    seed = 7
    source = random.Random(seed)
    for _ in range(300):
        expr = _expression(source, 4)
        done = rewrite(expr, ARRIVED)
        undone = done.text.replace(f" offset {spoken(done.by_s)}", "") if done.how == "shifted" else done.text
        assert undone == expr, (seed, expr)
        assert (done.how == "shifted") == any(one.text.startswith(CPU) for one in selectors_of(expr)), (
            seed,
            expr,
        )


def _expression(source: random.Random, depth: int) -> str:
    leaves: Sequence[str] = (CPU, f'{CPU}{{a="b)",c=~"d|e"}}', "up", 'node_load1{x!="[5m]"}', "1.5")
    if depth == 0:
        return source.choice(leaves[:4])
    inner = _expression(source, depth - 1)
    other = _expression(source, depth - 1)
    return source.choice(
        [
            inner,
            f"sum by (a, b) ({inner})",
            f"max without(c)({inner})",
            f"({inner}) > bool on(a) group_left(b) ({other})",
            f"{inner} + {other}",
            f"clamp_max({inner}, 5)",
            f"max_over_time(({inner})[1h:5m])",
            f"absent({inner})",
            f"({inner}) unless ({other})",
            f'label_replace({inner}, "x", "$1", "y", "{CPU}")',
        ]
    )


def test_selectors_are_found_with_their_ranges_offsets_and_functions() -> None:
    (one,) = selectors_of("sum(rate(a:b{c='d'}[5m] @ 3 offset -1h))")

    assert (one.text, one.function, one.fixed, one.offset_sign) == ("a:b{c='d'}", "rate", True, "-")


# --- files ----------------------------------------------------------------------------------------------------

FILE = f"""# our alerts
groups:
  - name: ec2   # of the platform team
    interval: 30s
    rules:
      - alert: Busy   # plain
        expr: {CPU}{{dimension_InstanceId!=""}} > 90   # percent
        for: 5m
        annotations: {{summary: "{{{{ $labels.name }}}} is busy"}}
      - alert: Errors
        expr: 'sum by (account_id)({ERRORS}{{x=''y''}}) > 0'
      - alert: Gone
        expr: "absent({CPU}{{x=\\"y\\"}})and up"
      - record: share
        expr: |
          # of all
          sum(
            {CPU}   # it
          ) /
            count({CPU})
      - alert: Folded
        expr: >-
          avg_over_time({DB_CPU}[5m])
          > 1

      - alert: Others
        expr: node_load1 > 5
      - alert: Wrapped
        expr: {CPU}
          > 5
"""


def test_a_file_keeps_comments_quotes_and_layout_byte_for_byte() -> None:
    after, outcomes = migrated(FILE, "rules.yml", SETTLED)

    changed = [(a, b) for a, b in zip(FILE.splitlines(), after.splitlines(), strict=True) if a != b]
    assert [b for _, b in changed] == [
        f'        expr: last_over_time({CPU}{{dimension_InstanceId!=""}}[16m]) > 90   # percent',
        f"        expr: 'sum by (account_id)(last_over_time({ERRORS}{{x=''y''}}[16m])) > 0'",
        f'        expr: "absent_over_time({CPU}{{x=\\"y\\"}}[16m])and up"',
        f"            last_over_time({CPU}[16m])   # it",
        f"            count(last_over_time({CPU}[16m]))",
        f"          avg_over_time({DB_CPU}[5m] offset 16m)",
        f"        expr: last_over_time({CPU}[16m])",
    ]
    assert [one.verdict for one in outcomes] == ["migrated"] * 6
    assert [one.line for one in outcomes] == [7, 11, 13, 15, 22, 29]


@needs_promtool
def test_promtool_takes_the_migrated_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.yml"
    path.write_text(migrated(FILE, "rules.yml", SETTLED)[0])

    said = promtool("check", "rules", path)

    assert said.returncode == 0, said.stderr
    assert "7 rules found" in said.stdout


def test_each_change_says_why_and_by_how_much_later_an_alert_fires() -> None:
    _, outcomes = migrated(FILE, "rules.yml", SETTLED)

    assert str(outcomes[0]) == (
        "rules.yml:7: alert Busy: asks for the newest point of the last 16m, because points of ec2 come 11m to 16m after the time that they carry; "
        "it fires 11m to 16m after what it fires for, and a series that ends is seen until 16m after its last point"
    )
    assert "asks as of 16m ago" in str(outcomes[4])
    assert "is that the period that the threshold was made for?" in str(outcomes[1])


def test_rules_of_the_operator_and_lists_of_them_are_read() -> None:
    resource = {"kind": "PrometheusRule", "spec": yaml.safe_load(FILE)}
    text = yaml.safe_dump({"kind": "List", "items": [resource]}, width=10_000) + "---\n" + FILE

    _, outcomes = migrated(text, "rules.yml", SETTLED)

    assert len(outcomes) == 12


REFUSED = f"""groups:
- name: a
  rules:
  - {{alert: Flow, expr: {CPU} > 1}}
  - alert: Age
    expr: time() - timestamp({CPU}) > 600
  - alert: Template
    expr: up == 0
    annotations:
      summary: '{{{{ with query "{CPU}" }}}}{{{{ . | first | value }}}}{{{{ end }}}}'
  - alert: Fine
    expr: {CPU} > 1
- name: b
  query_offset: 20m
  rules:
  - alert: Offset
    expr: {CPU} > 1
"""


def test_what_cannot_be_migrated_is_left_and_listed_with_line_and_reason() -> None:
    after, outcomes = migrated(REFUSED, "rules.yml", SETTLED)

    assert after == REFUSED.replace(
        f"    expr: {CPU} > 1\n- name: b", f"    expr: last_over_time({CPU}[16m]) > 1\n- name: b"
    )
    refused = {one.rule: (one.line, one.what) for one in outcomes if one.verdict == "refused"}
    assert list(refused) == ["alert Flow", "alert Age", "alert Template", "alert Offset"]
    assert refused["alert Flow"] == (
        4,
        "not migrated: a range in it would be no YAML where it stands; write it in quotes",
    )
    assert "16m:1m" in refused["alert Age"][1]
    assert "change that query by hand" in refused["alert Template"][1]
    assert "query_offset 20m" in refused["alert Offset"][1]


def test_series_that_no_service_has_are_named_and_left_alone() -> None:
    text = "groups: [{name: a, rules: [{alert: A, expr: 'aws_es_nodes_average > 1'}, {alert: B, expr: up}]}]"

    after, (one,) = migrated(text, "rules.yml", SETTLED)

    assert after == text
    assert (one.verdict, one.what) == ("unchanged", "left alone: no service here has aws_es_nodes_average")


@pytest.mark.parametrize(
    "text", ["groups: []", "a: b", "", "groups: [{rules: {{ .Values }}", "- 1", "a: &a [*a"]
)
def test_what_is_no_rule_file_is_refused(text: str) -> None:
    with pytest.raises(ConfigErrors):
        migrated(text, "rules.yml", SETTLED)


def test_labels_that_series_will_not_have_are_noted() -> None:
    text = f"""groups:
- name: a
  rules:
  - alert: Tagged
    expr: sum by (tag_Team, tag_Env, dimension_InstanceId) ({CPU}) > 90
    annotations: {{summary: "{{{{ $labels.tag_Owner }}}}"}}
  - alert: Joined
    expr: {CPU} * on (name) group_left (tag_Team) aws_ec2_info > 90
"""
    more = "yace, snake_case: true, services: {ec2: {exported_tags: [Env]}}"
    write = loads(CONFIG % ("ec2", "", 0, more), "headgate.yaml", environ={}).remote_write

    _, (tagged, joined) = migrated(text, "rules.yml", SETTLED, write)

    assert tagged.notes == (
        "tag_Env, tag_Owner, tag_Team: not among exported_tags of ec2 (remote_write.services)",
        "dimension_InstanceId: labels are in snake case (remote_write.snake_case)",
    )
    assert joined.notes == ()


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command_writes_the_file_and_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rules.yml").write_text(FILE)
    out = tmp_path / "late.yml"

    code = main(["import", "rules", str(tmp_path / "rules.yml"), "--out", str(out), "--format", "json"])

    assert code == 0
    assert out.read_text() == migrated(FILE, "rules.yml", SETTLED)[0]
    assert [one["verdict"] for one in json.loads(capsys.readouterr().out)] == ["migrated"] * 6
    assert main(["import", "rules", str(tmp_path / "rules.yml"), "--out", str(out)]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_command_ends_with_1_where_a_rule_is_not_migrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules.yml").write_text(REFUSED)

    assert main(["import", "rules", str(tmp_path / "rules.yml")]) == 1

    said = capsys.readouterr()
    assert said.out == migrated(REFUSED, "rules.yml", SETTLED)[0]
    assert "1 rules migrated, 4 not" in said.err


def test_there_is_nothing_to_migrate_to_where_series_are_called_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules.yml").write_text(FILE)
    (tmp_path / "headgate.yaml").write_text(CONFIG % ("ec2", "", 0, "headgate"))

    code = main(["import", "rules", str(tmp_path / "rules.yml"), "--config", str(tmp_path / "headgate.yaml")])

    assert code == 2
    assert "names: yace" in capsys.readouterr().err


@needs_prometheus
async def test_prometheus_fires_the_migrated_alert_on_settled_points_and_not_the_original(
    tmp_path: Path,
) -> None:
    text = f"groups: [{{name: a, rules: [{{alert: %s, expr: '{CPU} > 90'}}, {{alert: %sGone, expr: 'absent({CPU})'}}]}}]"
    (tmp_path / "original.yml").write_text(text % ("Original", "Original"))
    (tmp_path / "migrated.yml").write_text(migrated(text % ("Migrated", "Migrated"), "rules.yml", SETTLED)[0])
    server = PrometheusServer(
        tmp_path / "home", rule_files=[tmp_path / "original.yml", tmp_path / "migrated.yml"]
    )
    server.start()
    feed = Feed(server)
    try:
        newest_s = (int(time.time()) - 660) // MINUTE_S * MINUTE_S
        await feed.write({labels(CPU, account_id="1"): {newest_s - m * MINUTE_S: 95.0 for m in range(20)}})
        expected = {"Migrated": "firing", "OriginalGone": "firing"}
        alerts: dict[str, str] = {}
        for _ in range(200):
            alerts = {one["labels"]["alertname"]: one["state"] for one in server.api("alerts")["alerts"]}
            if alerts == expected:
                break
            await asyncio.sleep(0.1)
    finally:
        await feed.close()
        server.stop()

    assert alerts == expected
