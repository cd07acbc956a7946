from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ingest.errors import Fatal
from workers.simulated.cloudwatch import get_metric_data
from workers.simulated.requests import parse_data_request
from workers.traces import TraceWorld, series_of
from workers.world import SETTLED, Dimensions, Metric

ACCOUNT, REGION = "123456789012", "us-east-1"
NOON = 1_392_379_200
"""2014-02-14 12:00:00 UTC."""

SHARED = Path(__file__).parents[1] / "../shared/data/cloudwatch-traces"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the recorded CloudWatch traces are not at ../shared/data/cloudwatch-traces"
)

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A function that writes files, name to content, and gives their folder."""

    def write(**files: str) -> Path:
        for name, content in files.items():
            (tmp_path / f"{name}.csv").write_text(content)
        return tmp_path

    return write


def points(
    truth: TraceWorld,
    name: str,
    stat: str = "Average",
    period_s: int = 60,
    start_s: int = 0,
    end_s: int = SETTLED,
    asked_at_s: int = SETTLED,
) -> list[tuple[int, float]]:
    metric, _ = series_of(name)
    account, region = truth.accounts[0], truth.regions[0]
    times_s, values = truth.points(account, region, *metric[:3], stat, period_s, start_s, end_s, asked_at_s)
    return list(zip(times_s.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "namespace", "metric", "dimensions", "unit", "stat"),
    [
        (
            "ec2_cpu_utilization_24ae8d",
            "AWS/EC2",
            "CPUUtilization",
            (("InstanceId", "i-24ae8d"),),
            "Percent",
            "Average",
        ),
        (
            "ec2_disk_write_bytes_1e",
            "AWS/EC2",
            "DiskWriteBytes",
            (("InstanceId", "i-1e"),),
            "Bytes",
            "Average",
        ),
        ("ec2_network_in_5a", "AWS/EC2", "NetworkIn", (("InstanceId", "i-5a"),), "Bytes", "Average"),
        (
            "rds_cpu_utilization_cc",
            "AWS/RDS",
            "CPUUtilization",
            (("DBInstanceIdentifier", "cc"),),
            "Percent",
            "Average",
        ),
        ("elb_request_count_8c", "AWS/ELB", "RequestCount", (("LoadBalancerName", "8c"),), "Count", "Sum"),
        ("speed_7578", "Traces", "speed_7578", (), "None", "Average"),
        ("ec2_network_in_", "Traces", "ec2_network_in_", (), "None", "Average"),
    ],
)
def test_a_files_name_says_which_series_it_is(
    name: str, namespace: str, metric: str, dimensions: Dimensions, unit: str, stat: str
) -> None:
    assert series_of(name) == (Metric(namespace, metric, dimensions, unit), stat)


def test_points_are_served_as_they_are_in_the_file_but_ascending(folder: Folder) -> None:
    truth = TraceWorld(
        folder(
            odd="timestamp,value\n2014-02-14 12:05:04,2.5\n2014-02-14 12:00:27,1\n2014-02-14 12:05:04,51.846000000000004\n"
        )
    )

    assert points(truth, "odd") == [(NOON + 27, 1.0), (NOON + 304, 2.5), (NOON + 304, 51.846000000000004)]


@pytest.mark.parametrize("period_s", [1, 60, 300, 3600])
def test_the_period_asked_for_changes_nothing(folder: Folder, period_s: int) -> None:
    truth = TraceWorld(folder(odd=f"timestamp,value\n{NOON + 27},1\n{NOON + 304},2\n"))

    assert points(truth, "odd", period_s=period_s) == [(NOON + 27, 1.0), (NOON + 304, 2.0)]


def test_a_range_includes_its_start_and_excludes_its_end(folder: Folder) -> None:
    truth = TraceWorld(folder(a="timestamp,value\n" + "".join(f"{NOON + n},{n}\n" for n in (0, 60, 120))))

    assert points(truth, "a", start_s=NOON, end_s=NOON + 120) == [(NOON, 0.0), (NOON + 60, 60.0)]


def test_a_point_is_there_once_its_timestamp_has_passed(folder: Folder) -> None:
    truth = TraceWorld(folder(a=f"timestamp,value\n{NOON},1\n{NOON + 60},2\n"))

    assert points(truth, "a", asked_at_s=NOON) == []
    assert points(truth, "a", asked_at_s=NOON + 60) == [(NOON, 1.0)]
    assert points(truth, "a", asked_at_s=NOON + 61) == [(NOON, 1.0), (NOON + 60, 2.0)]


def test_only_the_files_own_statistic_has_points(folder: Folder) -> None:
    truth = TraceWorld(folder(elb_request_count_x=f"timestamp,value\n{NOON},7\n"))

    assert points(truth, "elb_request_count_x", stat="Sum") == [(NOON, 7.0)]
    assert points(truth, "elb_request_count_x", stat="Average") == []


def test_the_range_of_a_folder_is_that_of_all_its_files(folder: Folder) -> None:
    truth = TraceWorld(
        folder(a=f"timestamp,value\n{NOON},1\n{NOON + 600},1\n", b=f"timestamp,value\n{NOON - 60},1\n")
    )

    assert (truth.start_s, truth.end_s) == (NOON - 60, NOON + 601)


def test_timestamps_may_have_an_offset_or_be_seconds_since_the_epoch(folder: Folder) -> None:
    truth = TraceWorld(
        folder(
            a="timestamp,value\n2014-02-14T12:00:00Z,1\n2014-02-14 13:01:00+01:00,2\n1392379320,3\n\n2014-02-14 12:03:00.000000,4\n"
        )
    )

    assert points(truth, "a") == [(NOON, 1.0), (NOON + 60, 2.0), (NOON + 120, 3.0), (NOON + 180, 4.0)]


def test_an_account_and_a_region_may_be_given_and_others_have_nothing(folder: Folder) -> None:
    truth = TraceWorld(folder(a=f"timestamp,value\n{NOON},1\n"), "100000000001", "eu-west-1")

    assert points(truth, "a") == [(NOON, 1.0)]
    assert truth.metrics("100000000001", "eu-west-1") == (Metric("Traces", "a", (), "None"),)
    assert truth.metrics(ACCOUNT, REGION) == ()
    assert truth.points(ACCOUNT, REGION, "Traces", "a", (), "Average", 60, 0, SETTLED, SETTLED)[0].size == 0


def test_recently_active_are_the_metrics_with_a_point_in_three_hours(folder: Folder) -> None:
    truth = TraceWorld(folder(old=f"timestamp,value\n{NOON}, 1\n", new=f"timestamp,value\n{NOON + 7200},1\n"))

    assert [m.name for m in truth.listed(ACCOUNT, REGION, NOON + 3 * 3600 + 1, True)] == ["new"]
    assert [m.name for m in truth.listed(ACCOUNT, REGION, NOON + 3 * 3600 + 1, False)] == ["new", "old"]


def test_bad_files_are_refused_all_at_once_with_file_line_and_what(folder: Folder) -> None:
    path = folder(
        good=f"timestamp,value\n{NOON},1\n",
        header="time,value\n1,1\n",
        none="timestamp,value\n",
        empty="",
        rows=f"timestamp,value\n{NOON},1\nyesterday,1\n{NOON},high\n{NOON},nan\n{NOON}\n2014-02-14 12:00:00.5,1\n",
    )
    (path / "binary.csv").write_bytes(b"timestamp,value\n\xff\xfe\n")

    with pytest.raises(Fatal) as refused:
        TraceWorld(path)

    assert refused.value.where == f"traces {path}"
    assert [tuple(c.split(": ", 1)) for c in refused.value.what.split("; ")] == [
        ("binary.csv", "'utf-8' codec can't decode byte 0xff in position 16: invalid start byte"),
        ("empty.csv:1", "the header is '', not 'timestamp,value'"),
        ("header.csv:1", "the header is 'time,value', not 'timestamp,value'"),
        ("none.csv", "there are no points in it"),
        ("rows.csv:3", "the timestamp 'yesterday' is not ISO 8601 or seconds since the epoch"),
        ("rows.csv:4", "the value 'high' is not a number"),
        ("rows.csv:5", "the value 'nan' is not finite"),
        ("rows.csv:6", "1 fields, not 2"),
        ("rows.csv:7", "the timestamp '2014-02-14 12:00:00.5' is not a whole second"),
    ]


def test_a_message_about_very_bad_files_stays_readable(folder: Folder) -> None:
    with pytest.raises(Fatal, match=r"a\.csv:51: .*; and 950 more"):
        TraceWorld(folder(a="timestamp,value\n" + "x,1\n" * 1000))


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match=r"there is no \*.csv in it"):
        TraceWorld(tmp_path)
    with pytest.raises(Fatal, match="is no folder"):
        TraceWorld(tmp_path / "nowhere")


@needs_shared
def test_the_recorded_traces_come_back_point_by_point_through_getmetricdata_years_later() -> None:
    truth = TraceWorld(SHARED)
    served = 0
    for path in sorted(SHARED.glob("*.csv")):
        metric, stat = series_of(path.stem)
        request = parse_data_request(
            {
                "MetricDataQueries": [
                    {
                        "Id": "q",
                        "MetricStat": {
                            "Metric": {
                                "Namespace": metric.namespace,
                                "MetricName": metric.name,
                                "Dimensions": [{"Name": k, "Value": v} for k, v in metric.dimensions],
                            },
                            "Period": 300,
                            "Stat": stat,
                        },
                    }
                ],
                "StartTime": truth.start_s,
                "EndTime": truth.end_s,
                "ScanBy": "TimestampAscending",
            }
        )
        page = get_metric_data(truth, ACCOUNT, REGION, request, truth.end_s + 12 * 365 * 86_400)
        [result] = page.items
        lines = path.read_text().splitlines()[1:]
        assert result["StatusCode"] == "Complete"
        assert result["Values"] == [float(line.split(",")[1]) for line in lines]
        assert result["Timestamps"] == sorted(result["Timestamps"])
        served += len(lines)

    assert len(truth.metrics(ACCOUNT, REGION)) == 12
    assert served > 49_000


@needs_shared
def test_the_recorded_traces_keep_their_dirt() -> None:
    truth = TraceWorld(SHARED)
    repeated = [t for t, _ in points(truth, "ec2_disk_write_bytes_1ef3de")]
    off_grid = [t for t, _ in points(truth, "ec2_cpu_utilization_5f5533")]

    assert len(repeated) - len(set(repeated)) == 11
    assert sum(t % 300 != 0 for t in off_grid) == len(off_grid)
