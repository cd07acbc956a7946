"""Which of the listed metrics are asked for; pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.errors import Rejected
from ingest.model import Target
from ingest.sources import selection
from ingest.sources.discovery import request_of
from ingest.sources.selection import Metric, Names, Selector, TagIndex, series_of, tag_keys
from shard_config.load import shipped_services
from shard_config.model import Limits, MetricProfile, Resources, Selection, ServiceProfile
from workers.cli import main

TARGET = Target("cloudwatch", "100000000001", "eu-west-1")
METRICS: list[Metric] = [
    ("CPUUtilization", (("InstanceId", "i-1"),)),
    ("CPUUtilization", (("InstanceId", "i-2"),)),
    ("CPUUtilization", (("AutoScalingGroupName", "web"),)),
    ("NetworkIn", (("InstanceId", "i-1"),)),
    ("NetworkIn", ()),
]
INSTANCES = Resources(types=("ec2:instance",), arns=("instance/(?P<InstanceId>[^/]+)$",))
TAGGED = [
    ("arn:aws:ec2:eu-west-1:100000000001:instance/i-1", {"env": "prod", "team": "web"}),
    ("arn:aws:ec2:eu-west-1:100000000001:instance/i-3", {"env": "prod"}),
]


def profile_of(*only: Selection) -> ServiceProfile:
    return ServiceProfile(service="ec2", namespace="AWS/EC2", only=only, resources=INSTANCES)


def taken(*only: Selection) -> list[Metric]:
    index = TagIndex(INSTANCES, TAGGED)
    return [
        (one.key.metric, one.key.dimensions) for one in series_of(METRICS, TARGET, profile_of(*only), index)
    ]


def same(found: list[Metric], expected: list[Metric]) -> bool:
    return sorted(found) == sorted(expected) and len(found) > 0


def test_without_a_selection_everything_is_taken() -> None:
    assert same(taken(), METRICS)


def test_a_selection_by_metric_matches_the_whole_name() -> None:
    assert same(taken(Selection(metrics=("Network.*",))), METRICS[3:])
    assert taken(Selection(metrics=("Network",))) == []


def test_a_selection_by_dimension_wants_it_there_and_its_whole_value_to_match() -> None:
    assert same(taken(Selection(dimensions={"InstanceId": "i-[12]"})), [METRICS[0], METRICS[1], METRICS[3]])
    assert taken(Selection(dimensions={"InstanceId": "i"})) == []


def test_a_selection_by_dimension_names_wants_exactly_these() -> None:
    assert same(taken(Selection(dimension_names=("AutoScalingGroupName",))), METRICS[2:3])
    assert same(taken(Selection(dimension_names=())), METRICS[4:])


def test_a_selection_by_tags_takes_the_metrics_of_resources_that_have_them_all() -> None:
    assert same(taken(Selection(tags={"env": "pro.", "team": "web"})), [METRICS[0], METRICS[3]])
    assert taken(Selection(tags={"env": "pro"})) == []
    assert taken(Selection(tags={"env": "prod", "owner": ".*"})) == []


def test_all_of_a_selection_must_hold_and_one_selection_is_enough() -> None:
    both = Selection(metrics=("NetworkIn",), tags={"env": "prod"})
    assert same(taken(both), [METRICS[3]])
    assert same(taken(both, Selection(dimension_names=())), METRICS[3:])


def test_resources_without_tags_stay_visible_where_a_selection_asks_for_none() -> None:
    tagged, all_cpu = Selection(tags={"env": "prod"}), Selection(metrics=("CPU.*",))
    assert same(taken(tagged, all_cpu), METRICS[:4])


def test_the_metrics_of_the_profile_are_a_filter_of_their_own() -> None:
    profile = profile_of(Selection(dimension_names=("InstanceId",))).model_copy(
        update={"metrics": (MetricProfile(name="NetworkIn", statistics=("Sum", "Average"), unit="Bytes"),)}
    )
    found = series_of(METRICS, TARGET, profile)
    assert [(s.key.metric, s.key.stat, s.unit) for s in found] == [
        ("NetworkIn", "Sum", "Bytes"),
        ("NetworkIn", "Average", "Bytes"),
    ]


def test_aws_is_asked_for_no_more_than_every_selection_could_take() -> None:
    profile = profile_of(
        Selection(dimensions={"InstanceId": ".*", "Zone": "a"}, tags={"env": "prod", "team": "web"}),
        Selection(dimension_names=("InstanceId",), tags={"env": "dev"}),
    )
    assert request_of(profile)["Dimensions"] == [{"Name": "InstanceId"}]
    assert tag_keys(profile) == ("env",)
    everything = profile_of(*profile.only, Selection())
    assert "Dimensions" not in request_of(everything)
    assert tag_keys(everything) == ()


def test_one_metric_is_asked_for_by_its_name() -> None:
    one = profile_of().model_copy(update={"metrics": (MetricProfile(name="NetworkIn"),)})
    assert request_of(one)["MetricName"] == "NetworkIn"
    assert "MetricName" not in request_of(profile_of())


NAMES = st.text(min_size=1, max_size=8)


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, NAMES, max_size=3)), max_size=8), st.randoms())
def test_the_series_do_not_depend_on_the_order_of_the_listing(
    listed: list[tuple[str, dict[str, str]]], random: object
) -> None:
    metrics: list[Metric] = [(name, tuple(sorted(has.items()))) for name, has in listed]
    shuffled = list(metrics) + metrics[:2]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    found = series_of(metrics, TARGET, profile_of())
    assert series_of(shuffled, TARGET, profile_of()) == found
    assert {(one.key.metric, one.key.dimensions) for one in found} == set(metrics)


def test_a_name_that_is_no_unicode_is_left_out_and_takes_no_other_with_it() -> None:
    found = series_of([("bad\ud800", ()), ("good", ())], TARGET, profile_of())
    assert [one.key.metric for one in found] == ["good"]


ARNS = [
    ("alb", ":elasticloadbalancing:eu-west-1:1:loadbalancer/app/shop/50dc6c495c0c9188", {"LoadBalancer": "app/shop/50dc6c495c0c9188"}),
    ("alb", ":elasticloadbalancing:eu-west-1:1:targetgroup/web/73e2d6bc24d8a067", {"TargetGroup": "targetgroup/web/73e2d6bc24d8a067"}),
    ("alb", ":elasticloadbalancing:eu-west-1:1:loadbalancer/net/shop/50dc6c495c0c9188", {}),
    ("nlb", ":elasticloadbalancing:eu-west-1:1:loadbalancer/net/shop/50dc6c495c0c9188", {"LoadBalancer": "net/shop/50dc6c495c0c9188"}),
    ("elb", ":elasticloadbalancing:eu-west-1:1:loadbalancer/shop", {"LoadBalancerName": "shop"}),
    ("elb", ":elasticloadbalancing:eu-west-1:1:loadbalancer/app/shop/50dc6c495c0c9188", {}),
    ("apigateway", ":apigateway:eu-west-1::/apis/a1b2c3", {"ApiId": "a1b2c3"}),
    ("apigateway", ":apigateway:eu-west-1::/apis/a1b2c3/stages/prod", {}),
    ("cloudfront", ":cloudfront::1:distribution/E2QWRUHAPOMQZL", {"DistributionId": "E2QWRUHAPOMQZL"}),
    ("dynamodb", ":dynamodb:eu-west-1:1:table/orders", {"TableName": "orders"}),
    ("ebs", ":ec2:eu-west-1:1:volume/vol-0a1b", {"VolumeId": "vol-0a1b"}),
    ("ec2", ":ec2:eu-west-1:1:instance/i-0a1b", {"InstanceId": "i-0a1b"}),
    ("ecs", ":ecs:eu-west-1:1:cluster/main", {"ClusterName": "main"}),
    ("ecs", ":ecs:eu-west-1:1:service/main/web", {"ClusterName": "main", "ServiceName": "web"}),
    ("eks", ":eks:eu-west-1:1:cluster/main", {"ClusterName": "main"}),
    ("elasticache", ":elasticache:eu-west-1:1:cluster:cache-001", {"CacheClusterId": "cache-001"}),
    ("kinesis", ":kinesis:eu-west-1:1:stream/clicks", {"StreamName": "clicks"}),
    ("lambda", ":lambda:eu-west-1:1:function:resize", {"FunctionName": "resize"}),
    ("msk", ":kafka:eu-west-1:1:cluster/events/0a1b-2c-3", {"Cluster Name": "events"}),
    ("natgateway", ":ec2:eu-west-1:1:natgateway/nat-0a1b", {"NatGatewayId": "nat-0a1b"}),
    ("rds", ":rds:eu-west-1:1:db:orders", {"DBInstanceIdentifier": "orders"}),
    ("rds", ":rds:eu-west-1:1:cluster:aurora", {"DBClusterIdentifier": "aurora"}),
    ("s3", ":s3:::our-bucket", {"BucketName": "our-bucket"}),
    ("sns", ":sns:eu-west-1:1:alarms", {"TopicName": "alarms"}),
    ("sns", ":sqs:eu-west-1:1:alarms", {}),
    ("sqs", ":sqs:eu-west-1:1:jobs.fifo", {"QueueName": "jobs.fifo"}),
]  # fmt: skip


@pytest.mark.parametrize(("service", "arn", "dimensions"), ARNS)
def test_the_arns_of_aws_lead_to_the_dimensions_of_their_metrics(
    service: str, arn: str, dimensions: Mapping[str, str]
) -> None:
    resources = shipped_services()[service].resources
    assert resources is not None
    index = TagIndex(resources, [("arn:aws" + arn, {"env": "prod"})])
    # A metric may have more dimensions than its resource, as an availability zone.
    has = tuple(sorted({"Zone": "a", **dimensions}.items()))
    assert list(index.of(has)) == ([{"env": "prod"}] if dimensions else [])
    assert list(index.of(tuple((name, f"{value}x") for name, value in has))) == []


def test_every_shipped_profile_with_resources_has_an_arn_in_this_test() -> None:
    assert {service for service, _, found in ARNS if found} == set(shipped_services())


def test_metrics_that_cannot_travel_are_counted_and_take_no_other_with_them() -> None:
    names = Names(Selector(profile_of()), Limits(dimensions_max=2, label_bytes_max=10))
    many = tuple((f"d{n}", "x") for n in range(3))
    names.add(
        [("good", ()), ("too-long-a-name", ()), ("many", many), ("long", (("d", "x" * 11),)), ("nul\0", ())]
    )
    assert [one.key.metric for one in names.series(TARGET)] == ["good"]
    assert (len(names), names.refused) == (1, 4)


def test_names_without_end_are_an_error_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "NAMES_BYTES_MAX", 1000)
    names = Names(Selector(profile_of()), Limits())
    names.add([("same", ())] * 1000)
    with pytest.raises(Rejected, match="select fewer"):
        names.add([(f"metric-{n}", ()) for n in range(100)])


def test_check_says_what_tags_do_not_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    account = "{id: '111122223333', regions: [eu-west-1], services: [apigateway, sqs]}"
    said = []
    for service in ("apigateway", "sqs"):
        path = tmp_path / f"{service}.yaml"
        only = "{only: [{tags: {env: prod}}]}"
        path.write_text(f"accounts: [{account}]\nservices: {{{service}: {only}}}\n")
        assert main(["check", str(path)]) == 0
        said.append("which do not reach REST APIs" in capsys.readouterr().out)
    assert said == [True, False]
