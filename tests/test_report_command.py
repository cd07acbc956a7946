"""`headgate report` on a real PostgreSQL: the twelve real traces against numpy over their files, the ledger's side, the command line."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ingest.clock import utc
from ingest.errors import Fatal
from ingest.model import Series, SeriesKey, Target
from ingest.report import tables
from ingest.report.connections import snapshot
from ingest.report.model import Level, ResourceKey, ResourceUse, VerdictKind
from tests.report_store import DAY_S, MONDAY_S, TARGET, WEEK_S, Store, machine, minutes, opened
from workers import cli
from workers.report import last_week, put, range_of
from workers.traces import ACCOUNT, REGION, series_of

TRACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "cloudwatch-traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="no ../shared/data/cloudwatch-traces")


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    async with opened(database) as made:
        yield made


# --- the twelve real traces ---------------------------------------------------------------------------------------


def trace(name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A trace's points, read by nothing of ours: the last of repeated timestamps counts, as it is the greatest of them that stays when they differ."""
    found: dict[int, float] = {}
    with (TRACES / f"{name}.csv").open() as file:
        for row in csv.DictReader(file):
            at = int(datetime.fromisoformat(row["timestamp"]).replace(tzinfo=UTC).timestamp())
            found[at] = max(float(row["value"]), found.get(at, -np.inf))
    times = np.array(sorted(found), np.int64)
    return times, np.array([found[t] for t in times.tolist()])


def cpu_of(use: ResourceUse) -> Any:
    found = use.use("cpu")
    assert found is not None
    return found


@needs_traces
async def test_each_figure_of_the_twelve_traces_is_what_numpy_says_of_their_files(store: Store) -> None:
    names = sorted(file.stem for file in TRACES.glob("*.csv"))
    assert len(names) == 12
    points: dict[Series, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
    cpu: dict[ResourceKey, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
    others: dict[tuple[ResourceKey, str], tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
    for name in names:
        metric, stat = series_of(name)
        key = SeriesKey(ACCOUNT, REGION, metric.namespace, metric.name, metric.dimensions, stat, 60)
        points[Series(key)] = trace(name)
        if metric.name == "CPUUtilization":
            service = "rds" if metric.namespace == "AWS/RDS" else "ec2"
            cpu[ResourceKey(ACCOUNT, REGION, service, metric.dimensions[0][1])] = trace(name)
        else:
            others[ResourceKey(ACCOUNT, REGION, "ec2", metric.dimensions[0][1]), metric.name] = trace(name)
    await store.land(points, Target("cloudwatch", ACCOUNT, REGION))
    every = [times for times, _ in (*cpu.values(), *others.values())]
    from_s = min(int(times.min()) for times in every) // DAY_S * DAY_S
    to_s = -(-max(int(times.max()) for times in every) // DAY_S) * DAY_S
    report = await store.report(from_s, to_s)

    assert {use.key for use in report.resources if use.use("cpu")} == set(cpu)
    told = {(use.key, m.metric): m for use in report.resources for m in use.metrics}
    assert told.keys() == {(key, "CPUUtilization") for key in cpu} | others.keys()
    # The Average of what is a Sum is told as it stands: a sample, not a second.
    assert {told[key].average.unit for key in others} == {"bytes"}
    assert {told[key].role for key in others} == {"network_in", "local_write_bytes"}
    for (key, metric), (times, values) in {
        **others,
        **{(k, "CPUUtilization"): of for k, of in cpu.items()},
    }.items():
        found = told[key, metric]
        assert found.average.value == pytest.approx(values.mean(), rel=1e-6)
        # Sketches are within 1 % of the value at the rank.
        assert found.p95.value == pytest.approx(np.percentile(values, 95, method="lower"), rel=0.011)
        assert found.peak.value is None
        assert found.peak.unknown
        hours = np.unique(times // 3600)
        assert found.hours == len(hours)
        for day, value in enumerate(found.daily):
            of_day = values[(times >= from_s + day * DAY_S) & (times < from_s + (day + 1) * DAY_S)]
            assert value is None if not len(of_day) else value == pytest.approx(of_day.mean(), rel=1e-6)
        assert len(found.daily) == report.days
    heat_sums, heat_counts = np.zeros((2, (to_s - from_s) // 3600))
    for times, values in cpu.values():
        for hour in np.unique(times // 3600).tolist():
            at = hour - from_s // 3600
            heat_sums[at] += np.percentile(values[times // 3600 == hour], 95)
            heat_counts[at] += 1
    # The heat map: the mean over machines of each hour's p95, by hour of the week.
    whole = report.heat[0]
    with np.errstate(invalid="ignore"):
        by_hour = heat_sums / heat_counts
    first = (datetime.fromtimestamp(from_s, UTC).weekday() * 24) % 168
    for hour_of_week in range(168):
        of = by_hour[(first + np.arange(len(by_hour))) % 168 == hour_of_week]
        cell = whole.percent[hour_of_week // 24][hour_of_week % 24]
        known = of[~np.isnan(of)]
        assert cell is None if not len(known) else cell == pytest.approx(known.mean(), rel=1e-5)
    [everything] = [g for g in report.groups if g.level is Level.ALL]
    uses = [use for use in report.resources if use.key in cpu]
    weights = [cpu_of(use).hours for use in uses]
    expected = np.average([cpu_of(use).average.value for use in uses], weights=weights)
    assert everything.cpu_average.value == pytest.approx(expected, rel=1e-6)
    assert everything.weighted_by == "resource"
    # Sizes are not known, so nothing is said that would need them.
    assert (report.oversized.total.value, report.filling.fillings) == (None, ())
    assert "inventory.source" in report.oversized.empty


# --- the ledger's side --------------------------------------------------------------------------------------------


async def test_coverage_counts_complete_windows_of_rows_and_of_folded_days_and_says_what_is_missing(
    store: Store,
) -> None:
    from_s = MONDAY_S - WEEK_S
    await store.windows(from_s + DAY_S, 100)
    await store.windows(from_s + 2 * DAY_S, 20, landed_as_of=None, last_status="throttled", declared=None)
    await store.windows(
        from_s + 3 * DAY_S, 5, landed_as_of=None, last_status="forbidden", declared="forbidden"
    )
    await store.windows(MONDAY_S, 10)  # after the range
    day = utc(from_s).date()
    await store.connection.execute(
        "INSERT INTO sealed_days (target, service, day, windows, declared_windows, points, digest, first_start, last_end, sealed_at, covered)"
        " VALUES ($1, 'ec2', $2, 288, 36, 0, 0, $3, $4, $4, tstzmultirange(tstzrange($3, $4)))",
        str(TARGET), day, utc(from_s), utc(from_s + DAY_S),
    )  # fmt: skip
    await store.connection.execute(
        "INSERT INTO declared_days (target, service, day, reason, covered) VALUES ($1, 'ec2', $2, 'expired', tstzmultirange(tstzrange($3, $4)))",
        str(TARGET), day, utc(from_s), utc(from_s + 36 * 300),
    )  # fmt: skip
    report = await store.report(from_s, MONDAY_S)
    [account] = report.coverage
    assert (account.account, account.alias) == (TARGET.account, "shop")
    assert (account.windows, account.missing) == (413, 61)
    assert account.coverage.value == pytest.approx(352 / 413)
    assert account.reasons == (("expired", 36), ("throttled", 20), ("forbidden", 5))
    assert account.newest_s == from_s + DAY_S + 100 * 300
    assert account.age_s == MONDAY_S - account.newest_s
    assert report.coverage_all.value == account.coverage.value
    assert report.coverage_all.before is None


async def test_spend_is_held_against_the_budget_and_the_week_before(store: Store) -> None:
    await store.connection.executemany(
        "INSERT INTO charges (day, target, service, reason, looks, metrics_billed, metrics_in_doubt, list_metrics, puts)"
        " VALUES ($1, $2, $3, 'live', 1, $4, 0, 0, 0)",
        [
            (utc(MONDAY_S - n * DAY_S).date(), str(TARGET), service, metrics)
            for service, this, last in (("ec2", 100_000, 200_000), ("rds", 50_000, 50_000))
            for n, metrics in ((1, this), (7, this), (8, last), (14, last), (15, 10**9), (0, 10**9))
        ],
    )
    report = await store.report(MONDAY_S - WEEK_S, MONDAY_S)
    usd = [price / 100_000 * 1.0 for price in (300_000, 500_000)]
    assert report.spend.usd.value == pytest.approx(usd[0])
    assert report.spend.usd.before == pytest.approx(usd[1])
    assert report.spend.budget_usd == 35
    assert report.spend.daily_usd == pytest.approx([usd[0] / 2, 0, 0, 0, 0, 0, usd[0] / 2])
    [account] = report.spend.accounts
    assert (account.account, account.budget_usd) == (TARGET.account, 14)
    assert [(m.service, m.figure.change) for m in report.movers] == [("ec2", pytest.approx(-2.0))]


async def test_the_busiest_hour_is_held_against_the_quotas(store: Store) -> None:
    await store.connection.executemany(
        "INSERT INTO looks (task_id, service, finished_at, target, shard, started_at, window_start, window_end, status, detail, series, points,"
        " metrics_billed, requests, archive_key, batch_ids, windows)"
        " VALUES ($1, 'ec2', $2, $3, 'a', $2, $4, $2, 'complete', '', 1, 1, $5, $6, '', '{}', '[]')",
        [
            (f"t{n}", utc(at_s), str(TARGET), utc(at_s - 600), metrics, f'{{"GetMetricData": {calls}}}')
            for n, (at_s, metrics, calls) in enumerate(
                [
                    (MONDAY_S - 7200, 18_000, 36),
                    (MONDAY_S - 7000, 18_000, 36),
                    (MONDAY_S - 3600, 18_000, 36),
                    (MONDAY_S + 60, 10**6, 9000),
                ]
            )
        ],
    )
    report = await store.report(MONDAY_S - WEEK_S, MONDAY_S)
    found = {q.what: q for q in report.quotas}
    # The ledger has the looks of the week's last two hours.
    assert found["datapoints"].asked_per_s.coverage == pytest.approx(2 / 168)
    assert found["datapoints"].asked_per_s.before is None
    # Two looks in one hour, of ten minutes at 60 s each.
    assert found["GetMetricData calls"].asked_per_s.value == pytest.approx(72 / 3600)
    assert found["datapoints"].asked_per_s.value == pytest.approx(36_000 * 10 / 3600)
    assert found["datapoints"].share == pytest.approx(100 / 180_000)


# --- resources ------------------------------------------------------------------------------------------------------


async def test_a_report_is_of_the_asked_accounts_and_says_what_rollups_lack(store: Store) -> None:
    await store.land({machine("i-1"): minutes(2, 40.0)}, TARGET)
    await store.windows(MONDAY_S - DAY_S, 10)
    assert [u.key.id for u in (await store.report(MONDAY_S - WEEK_S, MONDAY_S)).resources] == ["i-1"]
    other = await store.report(MONDAY_S - WEEK_S, MONDAY_S, ["999999999999"])
    assert (other.resources, other.coverage, other.accounts) == ((), (), ("999999999999",))
    await store.connection.execute(
        "INSERT INTO rollup_marks (span_s, start, buckets, marked_at) VALUES (3600, $1, repeat('1', 256)::bit(256), $1)",
        utc(MONDAY_S - 7200),
    )
    report = await store.report(MONDAY_S - WEEK_S, MONDAY_S)
    assert report.assumptions[0].startswith("Hours that are not rolled up in full yet: 1 ")


async def test_a_machine_that_is_quiet_is_idle_only_with_network_and_disk_known(store: Store) -> None:
    quiet = {
        machine("i-idle", "CPUUtilization"): minutes(16, 1.0),
        machine("i-idle", "CPUUtilization", "Maximum"): minutes(16, 2.0),
        **{
            machine("i-idle", metric, "Sum"): minutes(16, 0.0)
            for metric in ("NetworkIn", "NetworkOut", "EBSReadOps", "EBSWriteOps")
        },
        machine("i-cpu-only"): minutes(16, 1.0),
        machine("i-new"): minutes(2, 1.0),
    }
    await store.land(quiet, TARGET)
    report = await store.report(MONDAY_S - WEEK_S, MONDAY_S)
    kinds = {use.key.id: use.verdict.kind for use in report.resources}
    assert kinds["i-idle"] is VerdictKind.IDLE
    assert kinds["i-cpu-only"] is VerdictKind.NOT_ENOUGH_DATA
    assert kinds["i-new"] in (VerdictKind.NEW, VerdictKind.NOT_ENOUGH_DATA)
    [finding] = report.idle.findings
    assert (finding.key.id, finding.verdict.waste, report.idle.unpriced) == ("i-idle", None, 1)
    assert report.idle.count.value == 1
    [use] = [use for use in report.resources if use.key.id == "i-idle"]
    assert (use.idle_hours, use.coverage) == (168, 1.0)
    assert cpu_of(use).peak.value == 2.0


async def test_all_connections_of_a_report_see_one_moment(store: Store) -> None:
    count = "SELECT count(*) FROM series"
    await store.land({machine("i-1"): minutes(1, 40.0)}, TARGET)
    async with snapshot(store.config.postgres, 2, 10) as (first, second):
        await store.land({machine("i-2"): minutes(1, 40.0)}, TARGET)
        assert [await one.fetchval(count) for one in (first, second, store.connection)] == [1, 1, 2]
    assert first.is_closed()
    assert second.is_closed()


async def test_what_breaks_on_one_connection_ends_the_report_with_its_reason(
    store: Store,
) -> None:
    await store.land({machine(f"i-{n}"): minutes(1, 40.0) for n in range(8)}, TARGET)
    await store.connection.execute("UPDATE rollup_days SET sketches = '\\x00'")
    with pytest.raises(Fatal, match="mark its day in rollup_marks"):
        await store.report(MONDAY_S - WEEK_S, MONDAY_S)


async def test_nothing_is_written_by_a_report(store: Store) -> None:
    await store.land({machine("i-1"): minutes(1, 40.0)}, TARGET)
    before = await store.connection.fetchval(
        "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables"
    )
    await store.report(MONDAY_S - WEEK_S, MONDAY_S)
    await store.connection.execute("SELECT pg_stat_clear_snapshot()")
    after = await store.connection.fetchval(
        "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables"
    )
    assert after == before


async def test_a_range_that_is_empty_or_cuts_hours_is_refused(store: Store) -> None:
    for from_s, to_s in ((MONDAY_S, MONDAY_S), (MONDAY_S - 90, MONDAY_S)):
        with pytest.raises(Fatal, match="range"):
            await store.report(from_s, to_s)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_default_is_the_last_complete_week_monday_to_monday() -> None:
    for now_s in (MONDAY_S, MONDAY_S + 3 * DAY_S, MONDAY_S + WEEK_S - 1):
        assert last_week(now_s) == (MONDAY_S - WEEK_S, MONDAY_S)
    assert last_week(MONDAY_S - 1) == (MONDAY_S - 2 * WEEK_S, MONDAY_S - WEEK_S)
    assert range_of(None, None, MONDAY_S + 5) == (MONDAY_S - WEEK_S, MONDAY_S)
    assert range_of(MONDAY_S + 10, None, MONDAY_S + 7300) == (MONDAY_S, MONDAY_S + 7200)
    assert range_of(None, MONDAY_S + 10, MONDAY_S + WEEK_S) == (MONDAY_S - WEEK_S, MONDAY_S)


def configured(store: Store, folder: Path) -> Path:
    file = folder / "headgate.yaml"
    document = {
        "accounts": [{"id": TARGET.account, "regions": [TARGET.region], "services": ["ec2"]}],
        "postgres": {"dsn": store.config.postgres.dsn},
    }
    file.write_text(json.dumps(document))
    return file


async def headgate(*words: str | Path) -> int:
    """`headgate …` in a thread: it has an event loop of its own."""
    return await asyncio.to_thread(cli.main, [str(word) for word in words])


async def test_the_command_writes_a_page_json_and_csv_with_the_same_figures(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await store.land({machine("i-1"): minutes(2, 40.0)}, TARGET)
    config, page = configured(store, tmp_path), tmp_path / "week.html"
    when = ("--from", "2026-11-16", "--to", "2026-11-23", "--config", config)
    assert await headgate("report", *when, "--out", page) == 0
    assert "i-1" in page.read_text()
    assert "1 resources" in capsys.readouterr().err
    assert await headgate("report", *when, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    [use] = found["resources"]
    assert use["metrics"][0]["average"]["value"] == 40.0
    assert await headgate("report", *when, "--format", "csv", "--out", "-") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    [row] = [r for r in rows if r["name"] == "resources.metrics.average"]
    assert (row["id"], row["of"], float(row["value"])) == ("i-1", "cpu", 40.0)
    assert [name for name in await asyncio.to_thread(os.listdir, tmp_path) if "week" in name] == ["week.html"]


async def test_the_command_says_what_is_wrong_and_what_to_do(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(store, tmp_path)
    asked: list[tuple[tuple[str, ...], int, str]] = [
        (("--from", "2026-11-16", "--to", "2026-11-16"), 2, "not an hour before"),
        (("--from", "2126-11-16", "--to", "2126-11-17"), 2, "yet to come"),
        (("--from", "2026-11-16", "--to", "2026-11-23", "--out", "nowhere/x.html"), 2, "there is no folder"),
        (("--from", "2020-11-16", "--to", "2020-11-23", "--format", "json"), 1, "headgate gaps"),
    ]
    for words, code, said in asked:
        assert await headgate("report", *words, "--config", config) == code
        assert said in capsys.readouterr().err


def test_text_of_a_report_is_one_document_in_three_forms() -> None:
    from tests.report_example import example

    def text_of(form: str) -> str:
        out = io.StringIO()
        put(example(), form, out)
        return out.getvalue()

    found = json.loads(text_of("json"))
    assert len(found["resources"]) == len(example().resources)
    assert text_of("csv").startswith(",".join(tables.COLUMNS))
    assert text_of("html").startswith("<!doctype html>")
