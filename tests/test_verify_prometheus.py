"""What Prometheus holds, held against what has landed."""

from __future__ import annotations

import pytest

from workers import run
from workers.verify_prometheus import compare, identifying, named

SERIES = ("AWS/EC2", "CPUUtilization", (("InstanceId", "i-1"),), "Average")
NAMED = named("100000000001", "eu-west-1", SERIES)


def test_a_series_of_prometheus_is_known_by_its_name_account_region_and_dimensions_alone() -> None:
    in_prometheus = {
        "__name__": "aws_ec2_cpuutilization_average",
        "account_id": "100000000001",
        "account_alias": "production",
        "region": "eu-west-1",
        "name": "arn:aws:ec2:eu-west-1:100000000001:instance/i-1",
        "dimension_InstanceId": "i-1",
        "tag_Team": "storage",
    }
    assert identifying(in_prometheus.items()) == NAMED
    assert identifying((in_prometheus | {"dimension_InstanceId": "i-2"}).items()) != NAMED


def test_what_is_missing_and_what_is_wrong_is_counted_and_named() -> None:
    landed = {NAMED: {60: 1.0, 120: 2.0, 180: 3.0}}
    holding = compare(landed, {NAMED: {60: 1.0, 120: 2.5, 240: 4.0}})
    assert (holding.samples, holding.missing, holding.wrong, holding.good) == (2, 1, 1, False)
    wrong, missing = holding.examples
    assert "aws_ec2_cpuutilization_average{account_id=100000000001, dimension_InstanceId=i-1" in missing
    assert "2.5 in Prometheus, landed 2.0" in wrong
    assert compare(landed, {NAMED: landed[NAMED]}).good


def test_nothing_held_is_nothing_proved() -> None:
    assert not compare({}, {}).good


def test_traces_of_long_ago_are_not_for_a_prometheus(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    from workers.cli import main

    folder = tmp_path_factory.mktemp("traces")
    (folder / "a.csv").write_text("timestamp,value\n2014-02-14 14:00:00,1.0\n2014-02-14 14:05:00,2.0\n")
    assert main(["run", "--traces", str(folder), "--prometheus", "1"]) == 2
    assert "of long ago" in capsys.readouterr().err


def test_the_number_of_servers_is_auto_off_or_a_number() -> None:
    assert [run._servers(text) for text in ("auto", "off", "3")] == [None, 0, 3]
    with pytest.raises(ValueError, match="three"):
        run._servers("three")
