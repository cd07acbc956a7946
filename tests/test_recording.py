"""Recording rules made from service profiles: what is recorded, that it is true on late points, and that nothing counts twice."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import promql_parser
import pytest
import yaml

from shard_config.known import shipped_services
from shard_config.late import delay_of
from shard_config.load import loads
from shard_config.model import Config, ServiceProfile
from shard_config.recording import Recording, grain_of, recordings_of, render
from shard_config.series_names import dimension_label, metric_name
from tests.late_points import MINUTE_S, Feed, labels
from tests.prometheus_server import PrometheusServer, needs_prometheus, needs_promtool, promtool
from workers.cli import main

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "helm/headgate/files/rules/recording.yml"
SERVICES = sorted(shipped_services())
CONFIG = """
kafka: {bootstrap: "kafka:9092"}
postgres: {dsn: postgresql://headgate@postgres/headgate}
s3: {bucket: raw}
accounts: [{id: "100000000001", regions: [eu-west-1], services: [%s]}]
services: {%s}
remote_write: {receivers: [{name: one, url: http://prometheus/api/v1/write, out_of_order_window_s: 7200}]%s}
"""


def config_of(services: str, own: str = "", more: str = "") -> Config:
    return loads(CONFIG % (services, own, more), "headgate.yaml", environ={})


def of(service: str) -> Recording:
    return next(one for one in recordings_of(None) if one.service == service)


def exprs(recording: Recording) -> dict[str, str]:
    return {record.name: record.expr for record in recording.records}


# --- what is recorded -----------------------------------------------------------------------------------------


def test_the_shipped_file_is_what_the_generator_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0

    assert capsys.readouterr().out == SHIPPED.read_text(), (
        "headgate rules > helm/headgate/files/rules/recording.yml"
    )


@pytest.mark.parametrize("service", SERVICES)
def test_every_metric_and_statistic_of_a_shipped_service_is_recorded(service: str) -> None:
    profile, one = shipped_services()[service], of(service)
    assert profile.metrics != "all"

    asked = {
        metric_name("yace", profile.namespace, m.name, stat) for m in profile.metrics for stat in m.statistics
    }
    assert {name.split(":")[1] for name in exprs(one)} == asked
    assert not one.left_out


def test_names_are_level_metric_operation_and_unique() -> None:
    names = [record.name for one in recordings_of(None) for record in one.records]

    assert len(set(names)) == len(names)
    assert {tuple(name.split(":")[::2]) for name in names} == {
        ("account_region", operation) for operation in ("sum", "avg", "count", "min", "max")
    }


def test_a_sum_is_summed_a_maximum_is_a_maximum_and_an_average_an_average_with_its_count() -> None:
    def operations(service: str, metric: str) -> set[str]:
        return {n.split(":")[2] for n in exprs(of(service)) if n.split(":")[1] == metric}

    assert operations("ec2", "aws_ec2_network_in_sum") == {"sum"}
    assert operations("ec2", "aws_ec2_cpuutilization_average") == {"avg", "count"}
    assert operations("ec2", "aws_ec2_cpuutilization_maximum") == {"max"}
    assert operations("lambda", "aws_lambda_duration_p95") == {"max"}
    assert operations("ebs", "aws_ebs_burst_balance_minimum") == {"min"}
    assert operations("dynamodb", "aws_dynamodb_successful_request_latency_sample_count") == {"sum"}
    assert operations("s3", "aws_s3_bucket_size_bytes_average") == {"avg", "count", "sum"}
    assert operations("sns", "aws_sns_publish_size_average") == {"avg", "count"}


def test_all_is_as_of_a_time_when_all_is_there() -> None:
    for one in recordings_of(None):
        for expr in exprs(one).values():
            (selector,) = _selectors(expr)
            assert selector.offset.total_seconds() == delay_of(shipped_services()[one.service]).latest_s


def test_one_set_of_dimensions_is_added_up() -> None:
    alb = exprs(of("alb"))

    assert (
        'dimension_LoadBalancer!="",dimension_TargetGroup="",dimension_AvailabilityZone=""'
        in alb["account_region:aws_applicationelb_request_count_sum:sum"]
    )
    assert (
        '{dimension_LoadBalancer!="",dimension_AvailabilityZone=""}'
        in alb["account_region:aws_applicationelb_healthy_host_count_minimum:min"]
    )
    assert 'dimension_Cluster_Name!="",dimension_Broker_ID=""' in next(
        e for n, e in exprs(of("msk")).items() if "offline_partitions" in n
    )


def test_where_it_is_not_known_which_dimensions_to_add_up_nothing_is_recorded_and_it_says_so() -> None:
    own = "own: {namespace: Mine, metrics: [{name: Jobs, statistics: [Sum]}]}"

    (one,) = recordings_of(config_of("own", own))

    assert one.records == ()
    assert "# not recorded: own Jobs; which dimensions" in render([one], "prometheus")
    assert yaml.safe_load(render([one], "prometheus")) == {"groups": []}


def test_where_one_set_of_dimensions_is_asked_for_all_of_it_is_recorded() -> None:
    own = "own: {namespace: Mine, metrics: [{name: Jobs, statistics: [Sum]}], only: [{dimension_names: [Queue]}]}"

    (one,) = recordings_of(config_of("own", own))

    assert exprs(one) == {
        "account_region:aws_mine_jobs_sum:sum": "sum by (account_id, account_alias, region) (last_over_time(aws_mine_jobs_sum[1m] offset 16m))"
    }


def test_the_configuration_s_own_settling_times_names_and_labels_count() -> None:
    config = config_of(
        "ec2", "ec2: {settling_s: 300, metrics: [{name: NetworkIn, statistics: [Sum]}]}", ", snake_case: true"
    )
    (snake,) = recordings_of(config)
    config = config_of("ec2", "ec2: {metrics: [{name: NetworkIn, statistics: [Sum]}]}", ", names: headgate")
    (own,) = recordings_of(config)

    assert list(exprs(snake).values()) == [
        'sum by (account_id, account_alias, region) (last_over_time(aws_ec2_network_in_sum{dimension_instance_id!=""}[1m] offset 11m))'
    ]
    assert exprs(own) == {
        "account_region:cloudwatch_ec2_network_in:sum": "sum by (account, account_alias, region, stat) (last_over_time(cloudwatch_ec2_network_in"
        '{dimension_InstanceId!="",period="60",stat="Sum"}[1m] offset 16m))'
    }


def test_a_service_of_the_organization_s_accounts_is_recorded() -> None:
    text = (
        CONFIG % ("ec2", "", "")
        + "organization: {regions: [eu-west-1], services: [rds]}\naws: {role_template: 'arn:aws:iam::{account}:role/r'}\n"
    )

    assert [one.service for one in recordings_of(loads(text, "headgate.yaml", environ={}))] == ["ec2", "rds"]


def test_it_is_evaluated_often_enough_for_prometheus_to_see_it_at_any_time() -> None:
    assert {one.service: one.interval_s for one in recordings_of(None)} == dict.fromkeys(SERVICES, 60) | {
        "s3": 300
    }


# --- promtool -------------------------------------------------------------------------------------------------


@needs_promtool
@pytest.mark.parametrize("form", ["prometheus", "prometheusrule"])
def test_promtool_takes_the_rules_in_both_forms(tmp_path: Path, form: str) -> None:
    loaded = yaml.safe_load(render(recordings_of(None), form))
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump(loaded["spec"] if form == "prometheusrule" else loaded))

    said = promtool("check", "rules", path)

    assert said.returncode == 0, said.stdout + said.stderr


def test_the_form_for_the_operator_is_a_resource_with_the_same_groups(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["rules", "--format", "prometheusrule"]) == 0

    resource = yaml.safe_load(capsys.readouterr().out)
    assert (resource["apiVersion"], resource["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert resource["spec"] == yaml.safe_load(SHIPPED.read_text())


POINTS = 6
"""Of each series, from the epoch on: promtool's tests begin there."""


class Made:
    """Series of one service in two accounts, with others beside them that must not count, and what has to be recorded of them. Values are whole, so sums are exact."""

    def __init__(self, profile: ServiceProfile) -> None:
        self.profile = profile
        self.delay = delay_of(profile)
        self.interval_s = min(profile.period_s, 3600)
        """Of evaluations: of days of S3 not each minute is worth the wait."""
        self.source = random.Random(profile.service)
        self.series: list[tuple[str, list[int]]] = []
        self.values: dict[tuple[str, str, str], list[list[int]]] = defaultdict(list)
        assert profile.metrics != "all"
        for metric in profile.metrics:
            grain = grain_of(profile, metric.name)
            assert grain is not None
            for stat in metric.statistics:
                name = metric_name("yace", profile.namespace, metric.name, stat)
                for account, region in (("1", "eu-west-1"), ("1", "us-east-1"), ("2", "eu-west-1")):
                    for resource in ("a", "b") if grain.has else ("",):
                        self._add(name, account, region, dict.fromkeys(grain.has, resource), counts=True)
                    for beside in grain.has_not:
                        self._add(
                            name, account, region, dict.fromkeys((*grain.has, beside), "c"), counts=False
                        )
                    if grain.has:
                        self._add(name, account, region, {"Other": "d"}, counts=False)

    def _add(self, name: str, account: str, region: str, dimensions: dict[str, str], counts: bool) -> None:
        values = [self.source.randrange(1, 1000) for _ in range(POINTS)]
        pairs = {"account_id": account, "region": region} | {
            dimension_label("yace", d, False): v for d, v in dimensions.items()
        }
        self.series.append((name + "{" + ",".join(f'{k}="{v}"' for k, v in pairs.items()) + "}", values))
        if counts:
            self.values[name, account, region].append(values)

    def tests(self) -> Iterator[dict[str, Any]]:
        """promtool's: each record at the minute that is as of the fourth of the points."""
        period_s = self.profile.period_s
        at_s = -(-(3 * period_s + self.delay.latest_s) // self.interval_s) * self.interval_s
        joined = {"sum": sum, "avg": fmean, "count": len, "min": min, "max": max}
        for record in of(self.profile.service).records:
            _, name, operation = record.name.split(":")
            yield {
                "expr": record.name,
                "eval_time": f"{at_s}s",
                "exp_samples": [
                    {
                        "labels": f'{record.name}{{account_id="{account}",region="{region}"}}',
                        "value": float(joined[operation]([v[3] for v in values])),
                    }
                    for (metric, account, region), values in self.values.items()
                    if metric == name
                ],
            }


@needs_promtool
@pytest.mark.parametrize("service", SERVICES)
def test_promtool_gets_what_was_computed_otherwise(tmp_path: Path, service: str) -> None:
    made = Made(shipped_services()[service])
    tests = list(made.tests())
    (tmp_path / "rules.yml").write_text(render([of(service)], "prometheus"))
    document = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": f"{made.interval_s}s",
        "tests": [{
            "interval": f"{made.profile.period_s}s",
            "input_series": [{"series": name, "values": " ".join(map(str, values))} for name, values in made.series],
            "promql_expr_test": tests,
        }],
    }  # fmt: skip
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(document))

    said = promtool("test", "rules", path)

    assert all(one["exp_samples"] for one in tests)
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]


# --- a real server --------------------------------------------------------------------------------------------


@needs_prometheus
async def test_a_prometheus_records_late_points_whole_while_what_asks_for_now_sees_nothing(
    tmp_path: Path,
) -> None:
    config = config_of(
        "ec2",
        "ec2: {metrics: [{name: NetworkIn, statistics: [Sum]}, {name: CPUUtilization, statistics: [Average]}]}",
    )
    rules = tmp_path / "rules.yml"
    # Once a second, not once a minute: nobody has to wait.
    rules.write_text(render(recordings_of(config), "prometheus").replace("interval: 1m", "interval: 1s"))
    server = PrometheusServer(tmp_path / "home", rule_files=[rules])
    server.start()
    feed = Feed(server)
    try:
        newest_s = (int(time.time()) - 660) // MINUTE_S * MINUTE_S
        times = [newest_s - m * MINUTE_S for m in range(30)]
        await feed.write({
            labels(metric, account_id=account, region="eu-west-1", dimension_InstanceId=f"i-{i}"): {t: float(t % 1000 + i) for t in times}
            for metric in ("aws_ec2_network_in_sum", "aws_ec2_cpuutilization_average") for account in "12" for i in range(3)
        })  # fmt: skip
        found: dict[Any, dict[int, float]] = {}
        for _ in range(100):
            now_s = int(time.time())
            found = server.samples('{__name__=~"account_region:.+"}', now_s - 60, now_s)
            if len(found) == 6 and all(len(points) >= 2 for points in found.values()):
                break
            await asyncio.sleep(0.1)
        assert await feed.ask("sum(aws_ec2_network_in_sum)", time.time()) == {}
    finally:
        await feed.close()
        server.stop()

    assert len(found) == 6
    for pairs, points in found.items():
        for at_s, value in points.items():
            of_s = {(at_s - 960 + d) // MINUTE_S * MINUTE_S for d in (0, 1)}
            expected = {
                "sum": {float(sum(t % 1000 + i for i in range(3))) for t in of_s},
                "avg": {float(t % 1000 + 1) for t in of_s},
                "count": {3.0},
            }
            assert value in expected[dict(pairs)["__name__"].rsplit(":", 1)[1]]


def _selectors(expr: str) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(
        promql_parser.parse(expr),
        lambda node: found.append(node) if isinstance(node, promql_parser.VectorSelector) else None,
    )
    return found
