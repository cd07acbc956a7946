"""Names against those that YACE has on its /metrics; and ours, which tell apart what YACE's do not."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from ingest.errors import Rejected
from ingest.model import Series, SeriesKey, Target
from ingest.resources import Resource
from ingest.series_labels import Labels
from ingest.validate import Reason
from shard_config.known import shipped_services
from shard_config.load import loads
from shard_config.model import Config
from shard_config.remote_write import RemoteWrite
from shard_config.series_names import dimension_label, info_name, metric_name
from tests import yace_names
from tests.yace_names import ACCOUNT, CUSTOM_JOB, CUSTOM_TAGS, EXPORTED, REGION, RICH, Case

TARGET = Target("cloudwatch", ACCOUNT, REGION)


@cache
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(yace_names.GOLDEN.read_text())
    return found


def taken() -> Iterator[Case]:
    for one in golden()["series"]:
        yield Case(**one | {"dimensions": tuple(map(tuple, one["dimensions"]))})


def config(snake_case: bool) -> Config:
    services = ", ".join(shipped_services())
    base = loads(
        f"accounts: [{{id: '{ACCOUNT}', regions: [{REGION}], services: [{services}]}}]",
        "x.yaml",
        environ={},
    )
    written = RemoteWrite.model_validate(
        {
            "receivers": [{"name": "one", "url": "http://127.0.0.1:1/api/v1/write"}],
            "snake_case": snake_case,
            "services": {
                "ec2": {"exported_tags": EXPORTED},
                "alb": {"exported_tags": EXPORTED},
                "mine": {"unnamed": CUSTOM_JOB},
                "rich": {"unnamed": CUSTOM_JOB},
            },
            "custom_tags": [{"tags": CUSTOM_TAGS, "services": ["ec2", "alb", "rich"]}],
        }
    )
    return base.model_copy(update={"remote_write": written})


def resource_of(case: Case) -> Resource | None:
    """As YACE associates: of a target group before its load balancer, of a service before its cluster."""
    has = set(case.dimensions)
    fits = [
        r
        for r in yace_names.resources()
        if set(r.dimensions) <= has and yace_names.is_of(case.namespace, r.arn)
    ]
    fits.sort(key=lambda r: (-len(r.dimensions), r.dimensions[0][0] != "TargetGroup"))
    return fits[0] if fits and case.kind == "discovery" else None


def ours(labels: Labels, case: Case) -> dict[str, str]:
    key = SeriesKey(ACCOUNT, REGION, case.namespace, case.metric, case.dimensions, case.stat, 300)
    service = next((p.service for p in shipped_services().values() if p.namespace == case.namespace), "mine")
    if case.kind == "custom":
        service = "rich" if case.namespace in RICH else "mine"
    return dict(labels.of(Series(key), service, TARGET, resource_of(case)))


@pytest.mark.parametrize("snake_case", [False, True], ids=["plain", "snake"])
def test_every_series_has_the_labels_that_yace_gives_it(snake_case: bool) -> None:
    labels = Labels(config(snake_case))
    wrong = []
    for case in taken():
        theirs = case.yace_snake if snake_case else case.yace
        if theirs is None:
            continue
        mine = ours(labels, case)
        if mine != theirs:
            wrong.append((case.key, set(mine.items()) ^ set(theirs.items())))
    assert wrong == []


@pytest.mark.parametrize("snake_case", [False, True], ids=["plain", "snake"])
def test_every_info_series_has_the_labels_that_yace_gives_it(snake_case: bool) -> None:
    labels = Labels(config(snake_case))
    theirs = golden()["info_snake" if snake_case else "info"]
    mine = []
    for profile in shipped_services().values():
        if profile.namespace == "AWS/ApiGateway":  # YACE asks API Gateway itself which of them there are
            continue
        mine += [
            dict(labels.info(TARGET, profile.service, resource))
            for resource in yace_names.resources()
            if yace_names.is_of(profile.namespace, resource.arn)
        ]
    assert sorted(mine, key=lambda one: sorted(one.items())) == theirs


def test_what_yace_has_no_line_of_is_untagged_or_merged_with_another() -> None:
    labels = Labels(config(False))
    said = {tuple(sorted(case.yace.items())) for case in taken() if case.yace is not None}
    missing = [case for case in taken() if case.yace is None]
    assert {case.dimensions[0][1] for case in missing if case.dimensions} == {"never-tagged"}
    merged = [case for case in missing if not case.dimensions]
    assert [case.metric for case in merged] == ["fooThing"]
    assert tuple(sorted(ours(labels, merged[0]).items())) in said


def test_of_two_that_yace_merges_the_later_is_refused() -> None:
    labels = Labels(config(False))
    alike = [case for case in taken() if case.namespace == "Foo/Bar"]
    names = Counter(metric_name("yace", c.namespace, c.metric, c.stat) for c in alike)
    said: list[dict[str, str]] = []
    refused: list[str] = []
    for case in alike:
        try:
            said.append(ours(labels, case))
        except Rejected as rejected:
            refused.append(rejected.reason)
    assert refused == [Reason.LABELS_TAKEN] * (len(alike) - len(names))
    assert len(said) == len(names) < len(alike)


async def test_yace_itself_says_what_the_golden_file_says() -> None:
    program = shutil.which("yace")
    if program is None:
        pytest.skip("there is no yace on the PATH")
    found = json.loads(json.dumps(await yace_names.facts(program)))
    assert found["info"] == golden()["info"]
    assert found["info_snake"] == golden()["info_snake"]
    unclear = {"Foo/Bar"}  # which of two that it merges stays depends on the order of its goroutines
    assert [c for c in found["series"] if c["namespace"] not in unclear] == [
        c for c in golden()["series"] if c["namespace"] not in unclear
    ]


# --- our own way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("namespace", "metric", "name"),
    [
        ("AWS/EC2", "CPUUtilization", "cloudwatch_ec2_cpu_utilization"),
        ("AWS/EC2", "EBSByteBalance%", "cloudwatch_ec2_ebs_byte_balance_percent"),
        (
            "AWS/ApplicationELB",
            "HTTPCode_ELB_5XX_Count",
            "cloudwatch_application_elb_http_code_elb_5xx_count",
        ),
        ("AWS/ApiGateway", "5XXError", "cloudwatch_api_gateway_5xx_error"),
        ("CWAgent", "mem_used_percent", "cloudwatch_cw_agent_mem_used_percent"),
        ("/aws/sagemaker/Endpoints", "GPUMemory", "cloudwatch_sagemaker_endpoints_gpu_memory"),
        ("Été", "é", "cloudwatch_t"),
        ("", "", "cloudwatch"),
    ],
)
def test_our_own_names_are_words_apart(namespace: str, metric: str, name: str) -> None:
    assert metric_name("headgate", namespace, metric, "p99") == name


def test_names_of_shipped_profiles_are_distinct_in_both_styles() -> None:
    asked = [
        (p.namespace, m.name, stat)
        for p in shipped_services().values()
        if p.metrics != "all"
        for m in p.metrics
        for stat in m.statistics
    ]
    assert len({metric_name("yace", *one) for one in asked}) == len(asked)
    assert len({metric_name("headgate", *one) for one in asked}) == len({one[:2] for one in asked})


def test_single_names() -> None:
    assert info_name("AWS/EC2") == "aws_ec2_info"
    assert dimension_label("yace", "Cluster Name", False) == "dimension_Cluster_Name"
    assert dimension_label("yace", "Cluster Name", True) == "dimension_cluster_name"
    assert dimension_label("yace", "1st", False) == ""
    assert dimension_label("headgate", "1st:a", False) == "dimension_1st_a"
    assert dimension_label("headgate", "ClusterName", True) == "dimension_cluster_name"
