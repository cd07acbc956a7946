"""Label sets: valid, distinct, as YACE or we say them, and sent to the same receiver by every machine."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.errors import Rejected
from ingest.model import Series, SeriesKey, Target
from ingest.ports import LabelSet
from ingest.resources import Resource
from ingest.series_labels import Labels
from ingest.validate import Reason
from shard_config.load import loads
from shard_config.model import Config
from shard_config.remote_write import RemoteWrite
from workers.cli import main

ACCOUNT = "111122223333"
TARGET = Target("cloudwatch", ACCOUNT, "eu-west-1")
ARN = f"arn:aws:ec2:eu-west-1:{ACCOUNT}:instance/i-1"
SCRAPED = Target("exposition", "self", "local")


def config(**remote_write: Any) -> Config:
    receivers = remote_write.pop("receivers", [{"name": "one", "url": "http://127.0.0.1:1/api/v1/write"}])
    base = loads(
        f"accounts: [{{id: '{ACCOUNT}', alias: shop, regions: [eu-west-1], services: [ec2, ecs]}}]\n",
        "headgate.yaml",
        environ={},
    )
    written = RemoteWrite.model_validate({"receivers": receivers} | remote_write)
    return base.model_copy(update={"remote_write": written})


def series(
    *dimensions: tuple[str, str],
    namespace: str = "AWS/EC2",
    metric: str = "CPUUtilization",
    stat: str = "Average",
    period_s: int = 60,
    account: str = ACCOUNT,
    region: str = "eu-west-1",
) -> Series:
    return Series(
        SeriesKey(account, region, namespace, metric, tuple(sorted(dimensions)), stat, period_s), "Percent"
    )


def refused(labels: Labels, one: Series, target: Target = TARGET) -> str:
    with pytest.raises(Rejected) as raised:
        labels.of(one, "ec2", target, None)
    return raised.value.reason


def test_a_series_of_a_resource_is_called_as_yace_calls_it() -> None:
    labels = Labels(
        config(
            services={"ec2": {"exported_tags": ["Team", "cost-centre", "Absent"]}},
            custom_tags=[{"tags": {"env": "prod"}}, {"tags": {"env": "dev"}, "services": ["ecs"]}],
        )
    )
    resource = Resource(ARN, {"Team": "payments", "cost-centre": "42"}, (("InstanceId", "i-1"),))
    assert dict(labels.of(series(("InstanceId", "i-1")), "ec2", TARGET, resource)) == {
        "__name__": "aws_ec2_cpuutilization_average",
        "account_alias": "shop",
        "account_id": ACCOUNT,
        "custom_tag_env": "prod",
        "dimension_InstanceId": "i-1",
        "name": ARN,
        "region": "eu-west-1",
        "tag_Team": "payments",
        "tag_cost_centre": "42",
    }


def test_a_series_of_no_resource_is_global_or_called_as_its_service_says() -> None:
    assert dict(Labels(config()).of(series(), "ec2", TARGET, None))["name"] == "global"
    mine = Labels(config(services={"ec2": {"unnamed": "my-job"}}))
    assert dict(mine.of(series(), "ec2", TARGET, None))["name"] == "my-job"


def test_snake_case_is_of_labels() -> None:
    labels = dict(Labels(config(snake_case=True)).of(series(("InstanceId", "i-1")), "ec2", TARGET, None))
    assert labels["dimension_instance_id"] == "i-1"
    assert "dimension_InstanceId" not in labels


def test_in_our_own_style_statistic_and_period_are_labels() -> None:
    labels = Labels(config(names="headgate"))
    assert dict(labels.of(series(("InstanceId", "i-1")), "ec2", TARGET, None)) == {
        "__name__": "cloudwatch_ec2_cpu_utilization",
        "account": ACCOUNT,
        "account_alias": "shop",
        "dimension_InstanceId": "i-1",
        "period": "60",
        "region": "eu-west-1",
        "stat": "Average",
    }


@pytest.mark.parametrize("names", ["yace", "headgate"])
def test_what_was_scraped_keeps_its_name_and_labels(names: str) -> None:
    up = Series(
        SeriesKey("self", "local", "node", "node_load1", (("instance", "a:9100"), ("job", "x")), "Value", 30)
    )
    assert dict(Labels(config(names=names)).of(up, "node", SCRAPED, None)) == {
        "__name__": "node_load1",
        "account": "self",
        "exported_job": "x",
        "instance": "a:9100",
        "job": "node",
        "region": "local",
    }


def test_scraped_labels_that_would_meet_ours_are_kept_apart() -> None:
    dimensions = (("exported_job", "theirs"), ("job", "also theirs"))
    one = Series(SeriesKey("self", "local", "node", "up", dimensions, "Value", 30))
    assert dict(Labels(config()).of(one, "node", SCRAPED, None)) == {
        "__name__": "up",
        "account": "self",
        "exported_exported_job": "also theirs",
        "exported_job": "theirs",
        "job": "node",
        "region": "local",
    }


def test_the_info_series_of_a_resource_has_all_its_tags() -> None:
    resource = Resource(ARN, {"Team": "payments", "1st": "no label's name", "empty": ""})
    assert dict(Labels(config()).info(TARGET, "ec2", resource)) == {
        "__name__": "aws_ec2_info",
        "account_alias": "shop",
        "account_id": ACCOUNT,
        "name": ARN,
        "region": "eu-west-1",
        "tag_Team": "payments",
    }


# --- two series, one name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (series(metric="a.b", namespace="X"), series(metric="a-b", namespace="X")),
        (series(metric="CPUUtilization"), series(metric="cpuutilization")),
        (series(stat="p99.9"), series(stat="p99_9")),
        (series(("a.b", "1")), series(("a-b", "1"))),
        (series(("équipe", "1")), series(("équipe", "2"))),
        (series(("a-b", "2"), ("a.b", "1")), series(("a-b", "3"), ("a.b", "1"))),
        (series(period_s=60), series(period_s=300)),
        (series(namespace="X/Y"), series(namespace="/X/Y")),
    ],
    ids=["metric", "capitals", "statistic", "dimension", "unsayable", "alike", "period", "namespace"],
)
def test_of_two_series_that_yaces_names_do_not_tell_apart_the_later_is_refused(
    first: Series, second: Series
) -> None:
    labels = Labels(config())
    said = labels.of(first, "ec2", TARGET, None)
    assert refused(labels, second) == Reason.LABELS_TAKEN
    assert labels.of(first, "ec2", TARGET, None) == said


def test_a_series_may_change_its_labels_and_have_its_old_ones_again() -> None:
    labels = Labels(config())
    one = series(("InstanceId", "i-1"))
    before = labels.of(one, "ec2", TARGET, None)
    assert labels.of(one, "ec2", TARGET, Resource(ARN, {})) != before
    assert labels.of(one, "ec2", TARGET, None) == before


def test_two_dimensions_of_one_name_are_refused_in_our_own_style() -> None:
    assert (
        refused(Labels(config(names="headgate")), series(("a.b", "1"), ("a-b", "2"))) == "duplicate_dimension"
    )


# --- hostile labels -------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", "__name__", "name", "a.b", "a-b", "a_b", "A", "%", "\x00", "\ud800", "“", "é", "1a", ":", "job"]
)
_PAIRS = st.dictionaries(_TEXT, _TEXT, max_size=4).map(lambda d: tuple(sorted(d.items())))
_SERIES = st.builds(
    lambda namespace, metric, stat, dimensions, period_s: Series(
        SeriesKey(ACCOUNT, "eu-west-1", namespace, metric, dimensions, stat, period_s)
    ),
    _TEXT,
    _TEXT,
    _TEXT,
    _PAIRS,
    st.sampled_from([60, 300]),
)


def faults(labels: LabelSet) -> list[str]:
    """What of a label set some Prometheus would not take."""
    names = [name for name, _ in labels]
    return [
        *(["not sorted, or not distinct"] if names != sorted(set(names)) else []),
        *(["no name"] if "__name__" not in names else []),
        *(f"bad name {n!r}" for n in names if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", n)),
        *(
            f"bad value {v!r}"
            for _, v in labels
            if not v
            or len(v.encode("utf-8", "surrogatepass")) > 4096
            or v.encode(errors="replace").decode() != v
        ),
        *(
            f"bad metric {v!r}"
            for n, v in labels
            if n == "__name__" and not re.fullmatch("[a-zA-Z_:][a-zA-Z0-9_:]*", v)
        ),
    ]


@settings(max_examples=120, deadline=None)
@given(
    made=st.lists(_SERIES, min_size=1, max_size=6, unique_by=lambda s: s.key),
    names=st.sampled_from(["yace", "headgate"]),
    snake_case=st.booleans(),
    scraped=st.booleans(),
    tags=_PAIRS,
)
def test_labels_are_valid_and_of_one_series_or_refused_whatever_the_source_says(
    made: list[Series], names: str, snake_case: bool, scraped: bool, tags: tuple[tuple[str, str], ...]
) -> None:
    labels = Labels(
        config(
            names=names,
            snake_case=snake_case,
            services={"ec2": {"exported_tags": [key for key, _ in tags]}},
            custom_tags=[{"tags": {"a.b": "1", "é": "2"}}],
        )
    )
    resource = Resource(ARN, dict(tags))
    owners: dict[LabelSet, SeriesKey] = {}
    for one in made:
        try:
            said = labels.of(one, "ec2", SCRAPED if scraped else TARGET, resource)
        except Rejected:
            continue
        assert faults(said) == []
        assert owners.setdefault(said, one.key) == one.key


def test_a_value_that_is_too_long_is_refused() -> None:
    assert refused(Labels(config()), series(("InstanceId", "x" * 5000))) == Reason.LABEL_TOO_LONG


# --- receivers ------------------------------------------------------------------------------------------------


def receivers(count: int) -> list[dict[str, str]]:
    return [{"name": f"prometheus-{n}", "url": f"http://127.0.0.1:{n}/api/v1/write"} for n in range(count)]


def test_a_receiver_more_takes_its_share_and_moves_no_other_series() -> None:
    three, four = Labels(config(receivers=receivers(3))), Labels(config(receivers=receivers(4)))
    accounts = [str(10**11 + n) for n in range(3000)]
    before = {a: three.receiver_for(a, "eu-west-1", "ec2") for a in accounts}
    after = {a: four.receiver_for(a, "eu-west-1", "ec2") for a in accounts}
    moved = {a for a in accounts if before[a] != after[a]}
    assert {after[a] for a in moved} == {"prometheus-3"}
    assert 650 < len(moved) < 850  # a quarter
    assert all(900 < n < 1100 for n in Counter(before.values()).values())


def test_the_order_of_receivers_in_the_file_changes_nothing() -> None:
    backwards = Labels(config(receivers=receivers(5)[::-1]))
    forwards = Labels(config(receivers=receivers(5)))
    rng = random.Random(1)
    for _ in range(200):
        one = series(account=str(rng.randrange(10**11, 10**12)))
        assert backwards.receiver_of(one, "ec2") == forwards.receiver_of(one, "ec2")


def test_a_service_that_is_not_sent_has_no_receiver_and_others_have() -> None:
    labels = Labels(config(services={"sqs": {"sent": False}}))
    assert (labels.receiver_of(series(), "sqs"), labels.receiver_of(series(), "ec2") != "") == ("", True)


def test_receivers_go_by_what_shard_by_names() -> None:
    labels = Labels(config(receivers=receivers(4), shard_by=["account", "service"]))
    chosen = {labels.receiver_for(ACCOUNT, region, "ec2") for region in ("eu-west-1", "us-east-1", "x")}
    assert len(chosen) == 1
    assert len({labels.receiver_for(ACCOUNT, "x", f"s{n}") for n in range(50)}) == 4


# --- headgate check -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window_s", "late"), [(0, ["s3"]), (600, ["s3", "ec2"]), (7200, ["s3"]), (7 * 86_400, [])]
)
def test_check_says_which_services_come_too_late_for_a_receiver(
    window_s: int, late: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver = f"{{name: first, url: 'http://127.0.0.1:1/api/v1/write', out_of_order_window_s: {window_s}}}"
    account = f"{{id: '{ACCOUNT}', regions: [eu-west-1], services: [ec2, s3]}}"
    path = tmp_path / "headgate.yaml"
    path.write_text(f"accounts: [{account}]\nremote_write: {{receivers: [{receiver}]}}\n")
    assert main(["check", str(path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("receiver first")]
    assert len(lines) == bool(late)
    assert all(f"{service} up to" in line for line in lines for service in late)
    assert all("out_of_order_window_s to 432000" in line for line in lines)
