"""YACE beside Headgate: what its real answers are read as, how values are judged, and the whole command over a store.

tests/golden/yace/metrics-1.txt and -2.txt are answers of YACE 0.67, a minute apart, against the simulated AWS of seed 1 (two accounts, EC2 and SQS, 60 metrics each):
so the simulator's truth is what its values are held against.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import math
import shutil
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from ingest.clock import ManualClock, utc
from ingest.compare.labels import differences, label_groups
from ingest.compare.lines import (
    Line,
    Point,
    Shown,
    Verdict,
    adds_up,
    expected_s,
    judge,
    key_of_line,
    key_of_series,
    may_be_chance,
    read_line,
)
from ingest.compare.proof import conclude
from ingest.compare.report import Bill, Reasons, Report, share_once
from ingest.compare.state import VALUES_PER_SCRAPE, State
from ingest.compare.store import OpenStretch
from ingest.errors import Fatal, Rejected
from ingest.model import SeriesKey, series_id, version_of
from ingest.sinks.migrate import migrate
from ingest.sinks.partitions import create_partitions
from shard_config.document import ConfigErrors
from shard_config.load import shipped_services
from shard_config.model import S3, Account, Config, Postgres
from shard_config.remote_write import CustomTags, Receiver, RemoteWrite, ServiceSeries
from tests.conftest import eventually
from workers.cli import main
from workers.compare import Comparison, Plan, duration
from workers.compare_view import render, to_json, verdict_on_bills, write_lists
from workers.servers import free_ports, get_local
from workers.simulator import start
from workers.world import SETTLED, World, account_ids

GOLDEN = Path(__file__).parent / "golden" / "yace"
FIRST, SECOND = ((GOLDEN / f"metrics-{n}.txt").read_text() for n in (1, 2))
FIRST_S, SECOND_S = 1_795_524_391, 1_795_524_453
PROFILES = [shipped_services()[name] for name in ("ec2", "sqs")]
ACCOUNTS = account_ids(2)
REGION = "eu-west-1"
NO_ARCHIVE = S3(endpoint_url="http://127.0.0.1:1")
WORLD = World(1, ACCOUNTS, (REGION,), 60, PROFILES)


def lines(text: str) -> list[Line]:
    return [line for line in map(read_line, text.splitlines(keepends=True)) if line is not None]


# --- reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [FIRST, SECOND])
def test_yaces_own_answers_are_read_as_prometheus_reads_them(text: str) -> None:
    theirs = [
        (s.name, {k: v for k, v in s.labels.items() if v}, s.value, s.timestamp)
        for family in text_string_to_metric_families(
            "\n".join(x for x in text.split("\n") if not x.startswith("#"))
        )
        for s in family.samples
    ]
    assert [(x.name, x.labels, x.value, x.timestamp_s) for x in lines(text)] == theirs
    assert len(theirs) > 60


def test_a_label_is_unescaped_and_one_that_says_nothing_is_left_out() -> None:
    line = read_line('aws_x_y_sum{a="say \\"hi\\", a\\\\b\\nc",b="",c="é, }"} NaN 1795524060000\n')
    assert line is not None
    assert line.labels == {"a": 'say "hi", a\\b\nc', "c": "é, }"}
    assert math.isnan(line.value)
    assert line.timestamp_s == 1_795_524_060


@pytest.mark.parametrize(
    "text",
    [
        "aws_x{a=1} 2\n",
        'aws_x{a="1" 2\n',
        "aws_x\n",
        "<html>\n",
        'aws_x{a="1"} two\n',
        'aws_x{a="1",,b="2"} 3\n',
        "aws_x 1 2 3\n",
    ],
)
def test_what_is_no_exposition_is_refused(text: str) -> None:
    with pytest.raises(Rejected, match="bad_exposition"):
        read_line(text)


def test_our_series_are_found_by_what_yace_calls_them() -> None:
    ours = {
        key_of_series(account, REGION, m.namespace, m.name, m.dimensions, stat, False)[0]
        for account in ACCOUNTS
        for m in WORLD.metrics(account, REGION)
        for p in PROFILES
        if not isinstance(p.metrics, str)
        for profile in p.metrics
        if (p.namespace, profile.name) == (m.namespace, m.name)
        for stat in profile.statistics
    }
    theirs = {key_of_line(x): x.name for x in lines(FIRST) if not x.is_own and not x.is_info}
    assert {name for key, name in theirs.items() if key not in ours} == {"aws_ec2_cpuutilization_p99"}
    assert len(theirs.keys() & ours) == 17


def test_a_series_is_another_where_a_dimension_account_or_name_is() -> None:
    key = key_of_series("1", "r", "AWS/EC2", "CPU", [("InstanceId", "i")], "Sum", False)[0]
    for other in (
        ("2", "r", "AWS/EC2", "CPU", [("InstanceId", "i")], "Sum"),
        ("1", "s", "AWS/EC2", "CPU", [("InstanceId", "i")], "Sum"),
        ("1", "r", "AWS/EC2", "CPU", [("InstanceId", "j")], "Sum"),
        ("1", "r", "AWS/EC2", "CPU", [("InstanceId", "i"), ("x", "y")], "Sum"),
        ("1", "r", "AWS/EC2", "CPU", [("InstanceId", "i")], "Average"),
    ):
        assert key_of_series(*other, False)[0] != key


# --- verdicts -------------------------------------------------------------------------------------------------

NOON = 1_795_521_600
NAN = math.nan


def verdict_of(shown: Shown, *ours: Point, beside: tuple[Shown, ...] = ()) -> Verdict:
    return judge(
        [shown, *beside], {shown.key: ours} | {s.key: [Point(NOON, s.value, 0)] for s in beside}, 60
    )[0].verdict


@pytest.mark.parametrize(
    ("value", "observed_s", "verdict"),
    [
        (1.5, NOON + 400, Verdict.EQUAL),
        (1.5000000000000002, NOON + 61, Verdict.UNCLEAR),
        (2.0, NOON + 60, Verdict.WRONG),
        (2.0, NOON + 200, Verdict.UNCLEAR),
        (2.0, NOON + 301, Verdict.REVISED),
    ],
)
def test_a_value_with_a_timestamp_is_held_against_that_point(
    value: float, observed_s: float, verdict: Verdict
) -> None:
    """YACE read it after its minute was over, and showed it at noon and five minutes."""
    assert verdict_of(Shown(1, NOON + 300, NOON, 1.5), Point(NOON, value, observed_s)) == verdict


def test_a_point_that_only_one_side_has_is_a_gap_of_the_other() -> None:
    assert verdict_of(Shown(1, NOON + 300, NOON, 1.5)) == Verdict.GAP_HERE
    other = Shown(2, NOON + 300, NOON, 7.0)
    assert (
        verdict_of(Shown(1, NOON + 300, None, NAN), Point(NOON, 2.0, NOON + 90), beside=(other,))
        == Verdict.GAP_THERE
    )
    assert verdict_of(Shown(1, NOON + 300, None, NAN), beside=(other,)) == Verdict.NEITHER


def test_without_timestamps_the_series_that_fit_once_tell_the_time() -> None:
    group = [Shown(key, NOON + 300, None, float(key)) for key in (1, 2, 3)]
    ours = {
        1: [Point(NOON, 1.0, 0), Point(NOON + 60, 9.0, 0)],
        2: [Point(NOON, 2.0, 0), Point(NOON + 60, 2.0, 0)],  # fits twice, and tells nothing
        3: [Point(NOON, 8.0, NOON + 500), Point(NOON + 60, 4.0, NOON)],
    }
    assert expected_s(group, ours) == NOON
    assert [j.verdict for j in judge(group, ours, 60)] == [Verdict.EQUAL, Verdict.EQUAL, Verdict.REVISED]
    assert expected_s(group, {}) is None


def test_a_zero_where_we_have_no_point_is_yaces_own() -> None:
    assert verdict_of(Shown(1, NOON + 300, None, 0.0)) == Verdict.ZERO
    assert verdict_of(Shown(1, NOON + 300, NOON, 0.0)) == Verdict.GAP_HERE
    assert verdict_of(Shown(1, NOON + 300, None, 0.0), Point(NOON, 0.0, NOON + 90)) == Verdict.EQUAL


def test_points_add_up_to_a_longer_period_or_some_of_them_do() -> None:
    points = [Point(NOON + 60 * i, float(v), 0) for i, v in enumerate((3, 1, 2))]
    assert [s for s in ("Sum", "Maximum", "Minimum", "Average", "p99") if adds_up(6.0, s, points)] == ["Sum"]
    assert adds_up(4.0, "Sum", points)
    assert adds_up(3.0, "Maximum", points)
    assert adds_up(1.0, "Minimum", points)
    assert adds_up(2.0, "Average", points)
    assert adds_up(5.0, "Sum", points)  # the second was late
    assert not adds_up(2.0, "Sum", points)  # one alone is no longer period
    assert not adds_up(0.0, "Sum", [])


def test_a_sum_of_large_or_broken_numbers_is_no_chance() -> None:
    assert [may_be_chance(v, s) for v, s in ((3.0, "Sum"), (3.5, "Sum"), (4e9, "Sum"), (4e9, "Maximum"))] == [
        True,
        False,
        False,
        True,
    ]


def test_a_look_of_ours_that_saw_the_same_proves_that_it_was_not_finished() -> None:
    assert conclude(1.0, [1.0, 2.0]) == (True, "a look of ours saw YACE's value: it was not finished")
    assert conclude(1.0, [3.0, 2.0]) == (True, "CloudWatch revised it: 3.0, 2.0")
    assert conclude(1.0, [2.0, 2.0])[0] is False
    assert conclude(1.0, [])[0] is False


# --- labels, money, reasons -----------------------------------------------------------------------------------


def test_labels_that_differ_are_named_with_both_values() -> None:
    theirs = {"name": "arn", "tag_team": "a", "account_alias": "prod", "region": "r"}
    ours = {"__name__": "x", "name": "global", "region": "r", "custom_tag_env": "e"}
    known = [
        ("account_alias", "prod", ""),
        ("custom_tag_env", "", "e"),
        ("name", "arn", "global"),
        ("tag_team", "a", ""),
    ]
    assert differences(theirs, ours, resource_known=True) == known
    assert differences(theirs, ours, resource_known=False) == known[:2]


def test_statistics_of_one_metric_count_once_by_fives() -> None:
    names = {f"aws_x_latency_{s}": 10 for s in ("average", "sum", "p99", "p99_9", "sample_count", "maximum")}
    assert round(share_once(names) * 60) == 20
    assert share_once({"aws_x_latency_sum": 10, "aws_x_errors_sum": 10}) == 1
    assert share_once({}) == 1


def test_a_duration_is_read_with_its_unit() -> None:
    assert [duration(x) for x in ("24h", "30m", "90s", "90", "2d", "0")] == [86_400, 1800, 90, 90, 172_800, 0]


# --- state ----------------------------------------------------------------------------------------------------


def exposed(count: int, value: float = 1.0) -> Iterator[Line]:
    for i in range(count):
        labels = {"account_id": "1", "region": "r", "dimension_Id": str(i)}
        yield Line("aws_x_y_sum", labels, value, None)


def test_what_is_remembered_is_there_after_a_restart_and_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    state = State(path)
    state.set("urls", ["u"])
    assert state.take(0, 100, exposed(5), 5) == 5
    with pytest.raises(Fatal, match="state"):
        State(path)
    state.close()
    again = State(path)
    assert again.get("urls") == ["u"]
    again.take(0, 400, exposed(3), 3)
    assert list(again.rows("SELECT scrapes, count(*) FROM theirs GROUP BY scrapes ORDER BY 1")) == [
        (1, 2),
        (2, 3),
    ]
    # What the second scrape does not show is remembered as nothing.
    assert again.one("SELECT count(*) FROM pending WHERE value IS NULL AND at_s = 400") == 2
    again.close()


def test_a_scrape_that_breaks_off_leaves_nothing_behind() -> None:
    def broken() -> Iterator[Line]:
        yield from exposed(3)
        raise Rejected("exposition", "bad_exposition")

    state = State(None)
    with pytest.raises(Rejected):
        state.take(0, 100, broken(), 3)
    assert [state.one(f"SELECT count(*) FROM {table}") for table in ("theirs", "pending", "scrapes")] == [
        0,
        0,
        0,
    ]


def test_values_are_kept_of_another_part_of_the_series_at_each_scrape() -> None:
    state, many = State(None), VALUES_PER_SCRAPE * 2
    for n in range(2):
        state.take(0, 100 + n, exposed(1000), many)
    first, second = (state.one("SELECT count(*) FROM pending WHERE at_s = ?", 100 + n) for n in range(2))
    assert first + second == 1000
    assert 400 < first < 600
    assert state.one("SELECT count(DISTINCT key) FROM pending") == 1000


def test_a_counter_that_starts_anew_is_counted_on() -> None:
    state, name = State(None), "yace_cloudwatch_getmetricdata_metrics_requested_total"
    for n, value in enumerate((100.0, 150.0, 20.0, 30.0)):
        state.take(0, n, [Line(name, {}, value, None)], 1)
    assert state.one("SELECT spent FROM counters") == 50 + 20 + 10


# --- over a store ---------------------------------------------------------------------------------------------


def config_of(dsn: str) -> Config:
    accounts = tuple(Account(id=a, regions=(REGION,), services=("ec2", "sqs")) for a in ACCOUNTS)
    return Config(accounts=accounts, services=tuple(PROFILES), postgres=Postgres(dsn=dsn), s3=NO_ARCHIVE)


def our_points(observed_s: int) -> Iterator[tuple[SeriesKey, list[tuple[int, float, int]]]]:
    """All that the simulated AWS has of half an hour, once settled."""
    for account in ACCOUNTS:
        for metric in WORLD.metrics(account, REGION):
            profile = next(p for p in PROFILES if p.namespace == metric.namespace)
            assert not isinstance(profile.metrics, str)
            for stat in next(m.statistics for m in profile.metrics if m.name == metric.name):
                of = (metric.namespace, metric.name, metric.dimensions, stat, 60)
                times, values = WORLD.points(account, REGION, *of, FIRST_S - 1500, FIRST_S + 300, SETTLED)
                key = SeriesKey(account, REGION, metric.namespace, metric.name, metric.dimensions, stat, 60)
                yield key, [(int(t), float(v), observed_s) for t, v in zip(times, values, strict=True)]


@pytest.fixture
async def landed(database: str) -> AsyncIterator[asyncpg.Connection]:
    """A store that has what the simulated AWS had, seen after YACE's answers."""
    await migrate(Postgres(dsn=database))
    connection = await asyncpg.connect(database)
    day = FIRST_S // 86_400
    await create_partitions(connection, [day], set())
    series, samples = [], []
    for key, points in our_points(SECOND_S + 300):
        id_ = series_id(key)
        dimensions = orjson.dumps(dict(key.dimensions)).decode()
        series.append(
            (
                id_,
                key.account,
                key.region,
                key.namespace,
                key.metric,
                dimensions,
                key.stat,
                60,
                "",
                utc(FIRST_S),
            )
        )
        samples += [(utc(t), id_, v, version_of(0, seen * 1000)) for t, v, seen in points]
    await connection.executemany(
        "INSERT INTO series VALUES (encode($1, 'hex')::uuid, $2, $3, $4, $5, $6, $7, $8, $9, $10)", series
    )
    await connection.executemany("INSERT INTO samples VALUES ($1, encode($2, 'hex')::uuid, $3, $4)", samples)
    yield connection
    await connection.close()


@asynccontextmanager
async def yace(clock: ManualClock, **replaced: str) -> AsyncIterator[str]:
    """Serves the recorded answers by the clock, and counts on: YACE asks for as much again at each scrape."""

    async def metrics(_: web.Request) -> web.Response:
        text = FIRST if clock.now_s() < SECOND_S else SECOND
        for old, new in replaced.items():
            text = text.replace(old, new)
        return web.Response(text=text)

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
    finally:
        await runner.cleanup()


async def compared(config: Config, clock: ManualClock, *urls: str, state: State | None = None) -> Report:
    """Two scrapes, one of each answer; and the report when all has settled."""
    state, plan = state or State(None), Plan(urls, 120, SECOND_S - FIRST_S)
    early = await Comparison(config, plan, state, clock).run(asyncio.Event(), lambda _: None)
    assert early.unsettled
    clock.advance(3600)
    return await Comparison(config, plan, state, clock).run(asyncio.Event(), lambda _: None)


def truth() -> dict[int, dict[int, float]]:
    return {
        key_of_series(k.account, k.region, k.namespace, k.metric, k.dimensions, k.stat, False)[0]: {
            t: v for t, v, _ in points
        }
        for k, points in our_points(0)
    }


async def test_each_value_is_judged_as_the_simulators_truth_says(
    landed: asyncpg.Connection, database: str
) -> None:
    async with yace(clock := ManualClock(FIRST_S)) as url:
        report = await compared(config_of(database), clock, url)
    settled = truth()
    shown = [
        (x, settled[key_of_line(x)])
        for text in (FIRST, SECOND)
        for x in lines(text)
        if key_of_line(x) in settled
    ]
    stamped = [
        (x, ours) for x, ours in shown if x.timestamp_s is not None and x.name != "aws_ec2_network_in_sum"
    ]
    bare = [(x, ours) for x, ours in shown if x.timestamp_s is None]
    equal = sum(ours[x.timestamp_s] == x.value for x, ours in stamped if x.timestamp_s)
    equal += sum(x.value in ours.values() for x, ours in bare)
    assert report.verdict(Verdict.EQUAL) == equal > 30
    assert report.verdict(Verdict.REVISED) == len(stamped) + len(bare) - equal > 0
    assert (
        report.verdict(Verdict.OTHER_PERIOD) == 8
    )  # NetworkIn is asked each 300 s there, and each 60 s here
    assert report.verdict(Verdict.WRONG) == report.verdict(Verdict.GAP_HERE) == report.unsettled == 0
    for example in report.examples:
        if example.verdict == "revised" and example.timestamp_s:
            assert example.ours in {ours.get(example.timestamp_s) for ours in settled.values()}


async def test_series_of_one_side_have_their_likely_reason(landed: asyncpg.Connection, database: str) -> None:
    async with yace(clock := ManualClock(FIRST_S)) as url:
        report = await compared(config_of(database), clock, url)
    assert (report.scrapes, report.infos, report.both) == (2, 3, 17)
    assert {(g.service, g.reason, g.series, g.wrong) for g in report.missing} == {
        ("ec2", "the service's metrics have no such metric or statistic", 2, True)
    }


async def test_a_value_that_is_wrong_and_a_point_that_is_missing_fail_the_comparison(
    landed: asyncpg.Connection, database: str
) -> None:
    config = config_of(database)
    key = next(k for k, _ in our_points(0) if (k.metric, k.stat) == ("CPUUtilization", "Average"))
    at = utc(1_795_524_180)
    spoilt = (
        "UPDATE samples SET value = 1.25, version = $2 WHERE ts = $3 AND series = encode($1, 'hex')::uuid"
    )
    await landed.execute(spoilt, series_id(key), version_of(0, 1_795_524_240_000), at)
    async with yace(clock := ManualClock(FIRST_S)) as url:
        report = await compared(config, clock, url)
    assert not report.ok
    wrong = [e for e in report.examples if e.verdict == "wrong"]
    assert {(e.theirs, e.ours, e.timestamp_s) for e in wrong} == {(46.5146, 1.25, 1_795_524_180)}
    assert report.verdict(Verdict.WRONG) == len(wrong) == 2  # both scrapes showed it

    await landed.execute("DELETE FROM samples WHERE ts = $1", at)
    window = "INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at) VALUES ($1, 'ec2', $2, $3, $3, $2)"
    target, start = f"cloudwatch/{ACCOUNTS[0]}/{REGION}", 1_795_524_000
    await landed.execute(window, target, utc(start), utc(start + 300))
    async with yace(clock := ManualClock(FIRST_S)) as url:
        report = await compared(config, clock, url)
    assert report.verdict(Verdict.GAP_HERE) > 3
    assert not report.ok
    notes = {(e.series[:12], e.note) for e in report.examples if e.verdict == "gap_here"}
    assert (ACCOUNTS[0], "its window is open: no receipt") in notes
    assert (ACCOUNTS[1], "its window is sealed, declared or was never planned: headgate why") in notes


async def test_extra_series_are_told_apart_by_what_yace_asks_for(
    landed: asyncpg.Connection, database: str
) -> None:
    async with yace(clock := ManualClock(FIRST_S)) as url:
        report = await compared(config_of(database), clock, url)
    reasons = {(g.account, g.service): set[str]() for g in report.extra}
    for group in report.extra:
        reasons[group.account, group.service].add(group.reason)
    assert reasons[ACCOUNTS[1], "sqs"] == {
        "YACE has nothing of the service here: it does not ask, or no resource is tagged"
    }
    assert "YACE asks for no such metric or statistic" in reasons[ACCOUNTS[0], "ec2"]
    assert sum(g.series for g in report.extra) + report.both == report.ours
    assert not any(g.wrong for g in report.extra)


async def test_one_look_leaves_open_what_has_not_settled(landed: asyncpg.Connection, database: str) -> None:
    await landed.execute("DELETE FROM samples WHERE ts >= $1", utc(FIRST_S - 300))
    async with yace(clock := ManualClock(FIRST_S)) as url:
        plan = Plan((url,), 0, 300)
        report = await Comparison(config_of(database), plan, State(None), clock).run(
            asyncio.Event(), lambda _: None
        )
    assert report.verdict(Verdict.UNSETTLED) > 10
    assert report.verdict(Verdict.GAP_HERE) == report.verdict(Verdict.WRONG) == 0
    assert report.bills == {}


async def test_an_endpoint_that_is_no_exposition_is_said_and_tried_again(
    landed: asyncpg.Connection, database: str
) -> None:
    clock, state = ManualClock(FIRST_S), State(None)
    async with yace(clock, **{"# HELP aws_ec2_info": "<html>", "# HELP aws_sqs_info": "<html>"}) as url:
        plan = Plan((url, url + "x"), 120, 60)
        report = await Comparison(config_of(database), plan, state, clock).run(
            asyncio.Event(), lambda _: None
        )
    assert not report.ok
    assert report.scrapes == 0
    assert len(report.failed) == 3  # and the labels
    assert any("404" in f for f in report.failed)
    assert any("bad_exposition" in f for f in report.failed)


async def test_a_state_of_other_endpoints_is_refused(landed: asyncpg.Connection, database: str) -> None:
    state = State(None)
    state.set("urls", ["http://other/metrics"])
    comparison = Comparison(config_of(database), Plan(("http://x/metrics",), 60, 60), state, ManualClock(0))
    with pytest.raises(ConfigErrors, match="other/metrics"):
        await comparison.run(asyncio.Event(), lambda _: None)


async def test_ctrl_c_reports_what_is_known(landed: asyncpg.Connection, database: str) -> None:
    stop = asyncio.Event()
    stop.set()
    async with yace(clock := ManualClock(FIRST_S)) as url:
        plan = Plan((url,), 86_400, 300)
        report = await Comparison(config_of(database), plan, State(None), clock).run(stop, lambda _: None)
    assert report.scrapes == 1
    assert report.unsettled > 30


# --- what is shown --------------------------------------------------------------------------------------------


async def test_the_report_is_there_for_people_and_machines(
    landed: asyncpg.Connection, database: str, tmp_path: Path
) -> None:
    state = State(None)
    async with yace(clock := ManualClock(FIRST_S)) as url:
        report = await compared(config_of(database), clock, url, state=state)
    console = Console(width=160, file=io.StringIO())
    for part in render(report):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for said in ("4 series that YACE has and we have not", "aws_ec2_cpuutilization_p99", "other period"):
        assert said in text
    machine = json.loads(to_json(report))
    assert machine["both"] == report.both
    assert machine["ok"] is False
    state.db.execute("INSERT INTO theirs VALUES (1, 0, '=cmd()', '-1', '@x', '+y', 0, 0, 1, 1, 1)")
    write_lists(state, report, tmp_path)
    with (tmp_path / "series.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row for row in rows if row["name"].endswith("=cmd()")] == [
        {
            "side": "missing",
            "account": "'-1",
            "region": "'@x",
            "service": "",
            "name": "'=cmd()",
            "series": "'+y",
        }
    ]
    sides = [row["side"] for row in rows]
    assert sides.count("missing") == 4 + 1
    assert sides.count("extra") == sum(g.series for g in report.extra)
    assert len((tmp_path / "values.csv").read_text().splitlines()) == len(report.values) + 1


def test_who_is_cheaper_is_said_by_both_readings() -> None:
    yaces = Bill(10, 1000, 5, Decimal("2"), Decimal("0.5"))
    ours = Bill(10, 1000, 5, Decimal("1"), Decimal("1"))
    said = verdict_on_bills(yaces, ours, 86_400)
    assert "each statistic counted, Headgate is cheaper by $30.0000 a month (50%)" in said
    assert "statistics counted once, YACE is cheaper by $15.0000 a month (50%)" in said
    assert "less than six hours" in verdict_on_bills(yaces, ours, 600)
    assert "a series costs less" not in said
    assert "a series costs less with Headgate" in verdict_on_bills(replace(yaces, series=4), ours, 600)
    assert "a series costs less with YACE" in verdict_on_bills(replace(yaces, series=30), ours, 600)


NAME = "aws_ec2_cpuutilization_average"


@pytest.mark.parametrize(
    ("changed", "reason", "wrong"),
    [
        ({"account": "9"}, "the account is not configured", True),
        ({"region": "us-east-2"}, "region us-east-2 is not configured", True),
        ({"name": "aws_rds_cpuutilization_average"}, "the service is not configured", True),
        ({"name": "aws_ec2_cpuutilization_p99"}, "no such metric or statistic", True),
        ({"valued": 0}, "NaN", False),
        ({"nonzero": 0}, "nilToZero", False),
        ({"first_s": 9000}, "new: ListMetrics is asked each 3600 s", False),
        ({}, "not listed by ListMetrics", True),
    ],
)
def test_why_a_series_of_yaces_is_missing(changed: dict[str, Any], reason: str, wrong: bool) -> None:
    config = config_of("postgresql://x@y/z")
    looked = {(f"cloudwatch/{ACCOUNTS[0]}/{REGION}", "ec2")}
    asked: dict[str, Any] = {
        "name": NAME,
        "account": ACCOUNTS[0],
        "region": REGION,
        "valued": 9,
        "nonzero": 9,
        "first_s": 0,
    }
    said, is_wrong = Reasons(config, {}, looked, 10_000).why_missing(**(asked | changed))
    assert reason in said
    assert is_wrong is wrong


def test_a_series_that_nobody_looked_for_yet_has_the_ledgers_reason() -> None:
    target = f"cloudwatch/{ACCOUNTS[0]}/{REGION}"
    open_ = {(target, "ec2"): [OpenStretch(0, 300, "paused")]}
    reasons = Reasons(config_of("postgresql://x@y/z"), open_, set(), 10_000)
    assert reasons.why_missing(NAME, ACCOUNTS[0], REGION, 9, 9, 0) == (
        "no look was complete yet: paused",
        True,
    )


async def test_labels_are_held_against_what_remote_write_sends(
    landed: asyncpg.Connection, database: str
) -> None:
    state = State(None)
    async with yace(clock := ManualClock(FIRST_S)) as url:
        await compared(config_of(database), clock, url, state=state)
    receiver = Receiver(name="one", url="http://127.0.0.1:1/api/v1/write")
    tags = CustomTags(tags={"Environment": "test"}, services=("sqs",))
    write = RemoteWrite(
        receivers=(receiver,), custom_tags=(tags,), services={"ec2": ServiceSeries(unnamed="ec2")}
    )
    config = config_of(database).model_copy(update={"remote_write": write})
    groups, notes = await label_groups(state, config, NoLists(), clock.now_s())
    found = {(g.label, g.service, g.theirs, g.ours) for g in groups}
    assert found == {("custom_tag_Environment", "sqs", "prod", "test")}
    assert "no list of tagged resources" in notes[0]
    other = config.model_copy(update={"remote_write": write.model_copy(update={"names": "headgate"})})
    assert (await label_groups(state, other, NoLists(), 0))[0] == []


class NoLists:
    """An archive in which no exporter has put a list of resources."""

    async def cached(self, name: Sequence[str], bytes_max: int) -> bytes | None:
        return None


# --- the command ----------------------------------------------------------------------------------------------


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = FIRST.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_the_command_looks_once_and_its_exit_code_says_whether_something_is_missing(
    landed: asyncpg.Connection, database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        path = tmp_path / "headgate.yaml"
        accounts = [{"id": a, "regions": [REGION], "services": ["ec2", "sqs"]} for a in ACCOUNTS]
        path.write_text(
            json.dumps({"accounts": accounts, "postgres": {"dsn": database}, "s3": NO_ARCHIVE.model_dump()})
        )
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        options = ["--once", "--config", str(path), "--csv-dir", str(tmp_path / "lists"), "--format", "json"]
        assert main(["compare", "yace", "--url", url, *options]) == 1
        found = json.loads(capsys.readouterr().out)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (found["theirs"], found["both"], found["ok"]) == (21, 17, False)
    assert {g["reason"] for g in found["missing"]} == {
        "the service's metrics have no such metric or statistic"
    }
    assert (tmp_path / "lists" / "series.csv").exists()


YACE_CONFIG = """apiVersion: v1alpha1
sts-region: eu-west-1
discovery:
  jobs:
    - type: AWS/SQS
      regions: [eu-west-1]
      roles: [{roleArn: "arn:aws:iam::100000000001:role/Headgate"}]
      customTags: [{key: Environment, value: prod}]
      metrics:
        - {name: ApproximateNumberOfMessagesVisible, statistics: [Average], period: 60, length: 300}
customNamespace:
  - name: ec2
    namespace: AWS/EC2
    regions: [eu-west-1]
    roles: [{roleArn: "arn:aws:iam::100000000001:role/Headgate"}, {roleArn: "arn:aws:iam::100000000002:role/Headgate"}]
    metrics:
      - {name: CPUUtilization, statistics: [Average, p99], period: 60, length: 300, addCloudwatchTimestamp: true, exportAllDataPoints: true}
      - {name: NetworkOut, statistics: [Sum], period: 60, length: 300}
"""


async def test_yace_itself_answers_as_recorded(tmp_path: Path) -> None:
    program = shutil.which("yace")
    if program is None:
        pytest.skip("there is no yace on the PATH")
    (tmp_path / "config.yml").write_text(YACE_CONFIG)
    simulator = await start(WORLD)
    environment = {
        "AWS_ENDPOINT_URL": simulator.url,
        "AWS_ACCESS_KEY_ID": f"AKIA{ACCOUNTS[0]}",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    (port,) = free_ports(1)
    process = await asyncio.create_subprocess_exec(
        program,
        *("--config.file", str(tmp_path / "config.yml"), "--listen-address", f"127.0.0.1:{port}"),
        env=environment,
        stdout=(tmp_path / "yace.log").open("wb"),
        stderr=asyncio.subprocess.STDOUT,
    )
    text = ""

    async def answered() -> bool:
        nonlocal text
        try:
            body = await asyncio.to_thread(get_local, f"http://127.0.0.1:{port}/metrics", 5)
        except OSError:
            return False
        text = body.decode()
        return "\naws_ec2_network_out_sum" in text

    try:
        await eventually(answered, timeout_s=30)
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 10)
        await simulator.close()
    recorded = {(x.name, *sorted(x.labels.items())) for x in lines(FIRST)}
    now = {(x.name, *sorted(x.labels.items())) for x in lines(text)}
    assert len(now) > 20
    assert now <= recorded
