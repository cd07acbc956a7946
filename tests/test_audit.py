"""`headgate audit` on the real parts: equal where all is well, and each thing that can be planted is named."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest
from botocore.session import get_session
from structlog.testing import capture_logs

from ingest import auditor
from ingest.audit import NAMED_MAX, Difference, Digests, Kind, Report
from ingest.auditor import GRACE_S, Auditor, Scope, days
from ingest.clock import ManualClock
from ingest.evidence import LedgerSeal
from ingest.expected import Expected, TooMuchError
from ingest.model import Batch, LookStatus, Series, Target, series_ids
from ingest.recheck import Recheck, Sealed, recheck, sample, windows_of
from ingest.sources.cloudwatch import CloudWatchSource
from shard_config.model import MetricProfile, ServiceProfile
from tests.way import NAN, NOON_S, TARGET, Way, key_of, the_way
from workers import cli, simulator
from workers.audit import parse_share
from workers.world import World, account_ids

DAY_S = 86_400


def target_of(number: int) -> Target:
    """Another account for each test that needs one, so that all share one store."""
    return Target("cloudwatch", f"2109876543{number:02}", "eu-west-1")


@pytest.fixture(scope="module")
async def way(postgres_dsn: str, kafka_bootstrap: str, s3_endpoint: str) -> AsyncIterator[Way]:
    """Three looks at two windows of TARGET, the later ones with changed values; all has landed, and an hour has passed."""
    name = f"audit_{uuid.uuid4().hex[:12]}"
    server = await asyncpg.connect(postgres_dsn)
    await server.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    dsn = postgres_dsn.rpartition("/")[0] + "/" + name
    async with the_way(
        dsn, kafka_bootstrap, name.replace("_", "-"), name.replace("_", "-"), s3_endpoint
    ) as way:
        await way.look({0: 1.0, 1: 2.0}, {0: 5.0}, observed_min=6)
        await way.look({0: 1.0, 1: 2.5, 6: 3.0}, {0: 5.0}, window=(0, 10), observed_min=12)
        await way.look({0: 1.0, 1: 2.5, 6: 3.0}, {0: 5.0, 7: -0.0}, window=(-5, 10), observed_min=30)
        await way.land()
        way.clock.advance(3600)
        yield way
    await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await server.close()


async def audited(way: Way, account: str | None = TARGET.account, **scope: Any) -> Report:
    wanted = Scope(NOON_S - 3600, NOON_S + 3600, account, **scope)
    return await Auditor(way.sql, way.archive, way.config, way.clock, wanted).run()


async def test_what_went_the_whole_way_is_equal(way: Way) -> None:
    report = await audited(way, None)
    assert report.differences == []
    assert (report.objects, report.looks, report.points, report.dead_points) == (3, 3, 5, 0)
    assert report.verdict().startswith("EQUAL: archive = ledger = store over [2026-01-01T11:00:00Z, ")


async def test_nothing_at_all_is_equal_and_says_so(way: Way) -> None:
    report = await audited(way, "000000000000")
    assert report.equal
    assert report.verdict().startswith("EQUAL: nothing is archived")


ROW = "ts = to_timestamp(1767268860) AND value = 2.5"  # 12:01 of i-0

MUTANTS: dict[str, tuple[str, Kind, str]] = {
    "a row is dropped": (
        f"DELETE FROM samples WHERE {ROW}",
        Kind.MISSING,
        "{InstanceId=i-0} Average 60s at 2026-01-01T12:01:00Z: the archive has 2.5 as of 2026-01-01T12:30:00Z",
    ),
    "a value is changed": (
        f"UPDATE samples SET value = 7 WHERE {ROW}",
        Kind.VALUE,
        "at 2026-01-01T12:01:00Z: the archive has 2.5 as of 2026-01-01T12:30:00Z, the store 7.0 as of 2026-01-01T12:30",
    ),
    "a version is changed": (
        f"UPDATE samples SET version = version - 60000 WHERE {ROW}",
        Kind.VERSION,
        "the archive has 2.5 as of 2026-01-01T12:30:00Z, the store 2.5 as of 2026-01-01T12:29:00Z",
    ),
    "a row is added": (
        f"INSERT INTO samples SELECT ts + interval '2 minutes', series, 9, version FROM samples WHERE {ROW}",
        Kind.EXTRA,
        "{InstanceId=i-0} Average 60s at 2026-01-01T12:03:00Z: the store has 9.0 as of 2026-01-01T12:30:00Z",
    ),
    "a row of a series without labels is added": (
        f"INSERT INTO samples SELECT ts, gen_random_uuid(), 9, version FROM samples WHERE {ROW}",
        Kind.EXTRA,
        "at 2026-01-01T12:01:00Z: the store does not know the series",
    ),
    "a series that nobody asks for is added": (
        "WITH made AS (INSERT INTO series SELECT gen_random_uuid(), '999999999999', region, 'Mine', metric, '{}', stat, 60, '',"
        " first_seen FROM series LIMIT 1 RETURNING id)"
        f" INSERT INTO samples SELECT ts, made.id, 9, version FROM samples, made WHERE {ROW}",
        Kind.EXTRA,
        "999999999999/eu-west-1 Mine/CPUUtilization{} Average 60s at 2026-01-01T12:01:00Z",
    ),
    "a look is deleted from the ledger": (
        "DELETE FROM looks WHERE points = 3",
        Kind.LOOK_NOT_IN_LEDGER,
        "complete, 3 points (cloudwatch/123456789012/eu-west-1 ec2)",
    ),
    "a look's points are changed": (
        "UPDATE looks SET points = 4 WHERE points = 3",
        Kind.LOOK_DIFFERS,
        "points 3 in the archive, 4 in the ledger",
    ),
    "a look's digest is changed": (
        "UPDATE looks SET windows = jsonb_set(windows, '{0,2}', '7') WHERE points = 3",
        Kind.LOOK_DIFFERS,
        "window digests are not those of the manifest",
    ),
    "a seal's digest is changed": (
        "UPDATE windows SET sealed_at = now(), digest = digest + 1 WHERE points = 1 OR points = 3",
        Kind.SEAL,
        "3 points in the ledger, 3 in the archive, with another digest",
    ),
    "a window is sealed that nobody looked at": (
        "UPDATE windows SET window_start = window_start + interval '20 min', window_end = window_end + interval '20 min',"
        " sealed_at = now() WHERE points = 3",
        Kind.SEAL,
        "of 1 sealed windows 0 have a complete look in the archive",
    ),
    "a folded day's digest is changed": (
        "INSERT INTO sealed_days (target, service, day, windows, points, digest, first_start, last_end, sealed_at, covered)"
        " SELECT target, service, '2026-01-01', count(*), sum(points), digest_sum(sum(digest) + 1), min(window_start), max(window_end),"
        " now(), range_agg(tstzrange(window_start, window_end)) FROM windows GROUP BY 1, 2",
        Kind.SEAL,
        "[2026-01-01T11:55:00Z, 2026-01-01T12:10:00Z): 5 points in the ledger, 5 in the archive, with another digest",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_what_is_planted_in_postgresql_is_named(way: Way, mutant: str) -> None:
    sql, kind, said = MUTANTS[mutant]
    planted = way.sql.transaction(isolation="repeatable_read")
    await planted.start()
    try:
        assert not (await way.sql.execute(sql)).endswith(" 0")
        report = await audited(way, None)
    finally:
        await planted.rollback()
    assert set(report.counts) == {kind}
    assert said in str(report.differences[0])
    assert report.verdict().startswith("DIFFERENT over ")
    assert (await audited(way)).equal


async def test_sealed_windows_and_folded_days_that_are_right_are_counted(way: Way) -> None:
    planted = way.sql.transaction(isolation="repeatable_read")
    await planted.start()
    try:
        await way.sql.execute("UPDATE windows SET sealed_at = now()")
        assert (await audited(way)).seals == 3
        await way.sql.execute(MUTANTS["a folded day's digest is changed"][0].replace(" + 1)", ")"))
        await way.sql.execute("DELETE FROM windows")
        report = await audited(way)
    finally:
        await planted.rollback()
    assert (report.seals, report.differences) == (3, [])


async def test_looks_that_the_ledger_has_folded_away_are_not_missed_in_it(way: Way) -> None:
    planted = way.sql.transaction(isolation="repeatable_read")
    await planted.start()
    try:
        await way.sql.execute(
            "INSERT INTO look_days SELECT target, service, (finished_at AT TIME ZONE 'UTC')::date, count(*), 1, 1, 1, 1 FROM looks"
            " GROUP BY 1, 2, 3"
        )
        await way.sql.execute("DELETE FROM looks")
        report = await audited(way)
    finally:
        await planted.rollback()
    assert report.differences == []


# --- the archive ------------------------------------------------------------------------------------------------------


def objects(way: Way) -> Any:
    return get_session().create_client("s3", endpoint_url=way.config.s3.endpoint_url)


async def test_an_object_that_is_deleted_is_named_and_so_is_what_only_it_held(way: Way) -> None:
    target = target_of(1)
    await way.look({0: 1.0}, target=target)
    receipt = await way.look({0: 1.0, 6: 2.0}, window=(0, 10), target=target)
    await way.land()
    s3, name = objects(way), {"Bucket": way.config.s3.bucket, "Key": receipt.archive_key}
    body = s3.get_object(**name)["Body"].read()
    s3.delete_object(**name)

    report = await audited(way, target.account)

    assert report.counts == {Kind.LOOK_NOT_IN_ARCHIVE: 1, Kind.EXTRA: 1}
    assert receipt.archive_key in str(report.differences)
    s3.put_object(**name, Body=body)
    assert (await audited(way, target.account)).equal


async def test_an_object_that_is_spoilt_is_named(way: Way) -> None:
    target = target_of(2)
    receipt = await way.look({0: 1.0}, target=target)
    await way.land()
    name = {"Bucket": way.config.s3.bucket, "Key": receipt.archive_key}
    objects(way).put_object(**name, Body=objects(way).get_object(**name)["Body"].read()[:-1])

    report = await audited(way, target.account)

    assert report.counts == {Kind.SPOILT: 1, Kind.EXTRA: 1}
    objects(way).delete_object(**name)


async def test_a_target_that_nobody_configures_any_more_is_audited_all_the_same(way: Way) -> None:
    target = target_of(3)
    await way.look({0: 1.0}, target=target)
    await way.land()
    await way.sql.execute("DELETE FROM samples WHERE series = $1", bytes.fromhex(id_of(target)))
    report = await audited(way, target.account)
    assert report.counts == {Kind.MISSING: 1}


def id_of(target: Target, number: int = 0) -> str:
    return "".join(f"{half:016x}" for half in series_ids((Series(key_of(number, target)),))[0].tolist())


# --- what is no difference --------------------------------------------------------------------------------------------


async def test_a_look_that_has_just_ended_is_under_way_and_later_it_is_missing(way: Way) -> None:
    target = target_of(4)
    await way.look({0: 1.0}, target=target)
    report = await audited(way, target.account)
    assert (report.differences, report.under_way, report.points) == ([], 1, 0)

    way.clock.advance(GRACE_S + 1)
    report = await audited(way, target.account)
    assert report.counts == {Kind.MISSING: 1, Kind.LOOK_NOT_IN_LEDGER: 1}

    await way.land()
    assert (await audited(way, target.account)).equal


async def test_points_that_are_dead_are_accounted_for(way: Way) -> None:
    target, ahead = target_of(5), 3 * 60
    way.clock.advance(NOON_S - way.clock.now_s())
    await way.look({0: 1.0, 1: NAN, 2: float("inf"), 20: 4.0}, {0: 2.0}, window=(0, ahead), target=target)
    await way.land()
    way.clock.advance(7200)
    report = await audited(way, target.account)
    assert (report.differences, report.points, report.dead_points) == (
        [],
        2,
        3,
    )  # 12:20 was the future at noon


async def test_more_dead_points_than_have_letters_are_accounted_for(way: Way) -> None:
    target = target_of(6)
    now_s = way.clock.now_s()
    way.clock.advance(NOON_S - now_s)
    minutes = {m: float(m) for m in range(60)}
    await way.look(*[minutes] * 25, window=(0, 60), target=target)
    # Landed as of Kafka's own time: a letter's timestamp says when its batch was validated, a moment after noon.
    offset_s = NOON_S - int(time.time())
    await way.land()
    way.clock.advance(7200)
    assert await way.sql.fetchval("SELECT sum(dead_points) FROM landed WHERE target = $1", str(target)) > 1000
    before = way.config
    way.config = way.config.model_copy(
        update={"run": way.config.run.model_copy(update={"clock_offset_s": offset_s})}
    )
    report = await audited(way, target.account)
    way.config = before
    assert report.differences == []
    assert report.dead_points == 25 * 49


async def test_an_operators_revision_is_the_maximum(way: Way) -> None:
    target = target_of(7)
    await way.look({0: 1.0}, target=target, observed_min=10, revision=1)
    await way.look({0: 2.0}, target=target, observed_min=20, attempt=1)
    await way.land()
    way.clock.advance(GRACE_S + 1)
    assert (await audited(way, target.account)).equal
    assert (
        await way.sql.fetchval("SELECT value FROM samples WHERE series = $1", bytes.fromhex(id_of(target)))
        == 1
    )


async def test_a_failed_look_is_a_look_like_any_other(way: Way) -> None:
    target = target_of(8)
    await way.look(target=target, status=LookStatus.FORBIDDEN, detail="AccessDenied")
    await way.land()
    way.clock.advance(GRACE_S + 1)
    report = await audited(way, target.account)
    assert (report.differences, report.looks, report.points) == ([], 1, 0)


async def test_another_service_is_left_out_where_one_is_asked_for(way: Way) -> None:
    target = target_of(9)
    await way.look({0: 1.0}, target=target)
    await way.land()
    await way.sql.execute("DELETE FROM samples WHERE series = $1", bytes.fromhex(id_of(target)))
    assert (await audited(way, target.account, service="ec2")).counts == {Kind.MISSING: 1}
    assert (await audited(way, target.account, service="rds")).equal


async def test_a_place_with_more_points_than_fit_is_audited_in_slices(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await audited(way)
    made: list[Expected] = []

    def make(start_s: int, end_s: int, points_max: int) -> Expected:
        made.append(Expected(start_s, end_s, points_max))
        return made[-1]

    monkeypatch.setattr(auditor, "POINTS_MAX", 7)
    monkeypatch.setattr(auditor, "Expected", make)
    sliced = await audited(way)
    assert (sliced.differences, sliced.points, sliced.looks) == ([], whole.points, whole.looks)
    assert len({expected.start_s for expected in made}) > 1


# --- the source, asked again --------------------------------------------------------------------------------------------


async def test_a_recheck_names_what_the_source_has_otherwise_and_lands_nothing(
    database: str, kafka_bootstrap: str, topic_prefix: str, bucket: str, s3_endpoint: str
) -> None:
    [account] = account_ids(1)
    target = Target("cloudwatch", account, "eu-west-1")
    profile = ServiceProfile(
        service="ec2", namespace="AWS/EC2", metrics=(MetricProfile(name="CPUUtilization"),)
    )
    world = World(7, [account], ["eu-west-1"], 20, [profile])
    clock = ManualClock(NOON_S + 3600)
    sim = await simulator.start(world, clock=clock, calls_per_s=0)
    try:
        async with the_way(
            database,
            kafka_bootstrap,
            topic_prefix,
            bucket,
            s3_endpoint,
            accounts=[{"id": account, "regions": ["eu-west-1"], "services": ["ec2"]}],
            services=[profile.model_dump()],
            aws={"endpoint_url": sim.url},
        ) as way:
            source = CloudWatchSource(way.config, clock)
            await way.collect(way.task(0, 20, target=target), source)
            await source.close()
            await way.land()
            await way.sql.execute("UPDATE windows SET sealed_at = now()")
            landed = await way.sql.fetchval("SELECT count(*) FROM samples")

            async def again(share: float) -> tuple[Report, Recheck]:
                report = Report(NOON_S, NOON_S + 3600)
                done = await recheck(way.sql, way.config, clock, report, [target], share, 1)
                return report, done

            report, done = await again(1.0)
            assert (report.differences, done.windows, done.points) == ([], 4, landed)
            requests = done.metrics_billed + done.requests["ListMetrics"]
            assert done.usd == Decimal("0.01") * requests / 1000 > 0

            await way.sql.execute("DELETE FROM samples WHERE ts = to_timestamp($1)", float(NOON_S + 60))
            await way.sql.execute(
                "UPDATE samples SET value = -1 WHERE ts = to_timestamp($1)", float(NOON_S + 360)
            )
            changed = await way.sql.fetchval("SELECT count(*) FROM samples WHERE value = -1")
            missing = landed - await way.sql.fetchval("SELECT count(*) FROM samples")
            report, done = await again(1.0)
            assert report.counts == {Kind.SOURCE_MISSING: missing, Kind.SOURCE_VALUE: changed}
            assert "the store -1.0" in str(report.differences)
            assert f"{missing + changed} differences" in done.sentence(report.counts.total())

            _, done = await again(0.25)
            assert done.windows == 1
    finally:
        await sim.close()


# --- the command --------------------------------------------------------------------------------------------------------


def config_file(way: Way, folder: Path) -> Path:
    """The way's configuration as a file."""
    raw = way.config.model_dump(mode="json", include={"accounts", "slots", "kafka", "postgres", "s3"})
    raw["postgres"].pop("password")
    raw["accounts"] = [{"id": TARGET.account, "regions": [TARGET.region], "services": ["ec2"]}]
    path = folder / "headgate.yaml"
    path.write_text(json.dumps(raw))
    return path


async def test_the_command_says_equal_with_exit_code_0_and_different_with_1(
    way: Way, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "workers.audit.configure_logs", lambda _: None
    )  # it would log to this test's stderr for ever
    with capture_logs():
        args = [
            "audit",
            "--config",
            str(config_file(way, tmp_path)),
            "--from",
            "2026-01-01T11:00:00Z",
            "--to",
            "2026-01-01T13:00:00Z",
        ]
        args += ["--account", TARGET.account]
        assert await asyncio.to_thread(cli.main, args) == 0
        assert capfd.readouterr().out.startswith("EQUAL: archive = ledger = store over [2026-01-01T11:00:00Z")
        await way.sql.execute(f"UPDATE samples SET value = 7 WHERE {ROW}")
        assert await asyncio.to_thread(cli.main, [*args, "--format", "json"]) == 1
        said = json.loads(capfd.readouterr().out)
        await way.sql.execute(f"UPDATE samples SET value = 2.5 WHERE {ROW.replace('2.5', '7')}")
        assert (said["equal"], said["counts"]) == (False, {"other value": 1})
        assert said["differences"][0]["at_s"] == NOON_S + 60
        assert await asyncio.to_thread(cli.main, [*args, "--to", "2026-01-01T11:00:00Z"]) == 2


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5", 0.5), ("100%", 1.0)])
def test_a_share_is_read_as_percent_or_fraction(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["0", "2", "101%", "x", "nan%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no share"):
        parse_share(text)


# --- pure parts -------------------------------------------------------------------------------------------------------


def batch_of(points: list[tuple[int, int, float]], version_ms: int) -> Batch:
    """Points as (series, second, value)."""
    series = tuple(Series(key_of(n)) for n in range(4))
    ordered = sorted(points, key=lambda p: p[0])
    return Batch(
        "0" * 32, TARGET, "ec2", version_ms, 0, 300, series,
        np.array([sum(p[0] == n for p in points) for n in range(4)], np.int32),
        np.array([p[1] for p in ordered], np.int64),
        np.array([p[2] for p in ordered], np.float64),
        series_ids(series),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_maximum_does_not_depend_on_order_or_splitting(seed: int) -> None:
    random_ = random.Random(seed)
    points = [(random_.randrange(4), random_.randrange(100), float(random_.randrange(5))) for _ in range(300)]
    versions = [random_.randrange(1, 4) for _ in points]
    naive: dict[tuple[int, int], tuple[int, float]] = {}
    for (n, t, v), version in zip(points, versions, strict=True):
        if 10 <= t < 90:
            naive[n, t] = max((version, v), naive.get((n, t), (version, v)))
    expected = Expected(10, 90, points_max=2 * len(naive))
    rows = list(zip(points, versions, strict=True))
    random_.shuffle(rows)
    while rows:
        taken, rows = rows[:17], rows[17:]
        for version in {v for _, v in taken}:
            expected.add(batch_of([p for p, v in taken if v == version], version))
    m = expected.maximum()
    names = [int(known.text.partition("i-")[2][0]) for known in expected.known]
    found = {
        (names[key // 80], key % 80 + 10): (version, value)
        for key, version, value in zip(m.keys.tolist(), m.versions.tolist(), m.values.tolist(), strict=True)
    }
    assert found == naive


def test_a_slice_with_too_many_points_says_so() -> None:
    expected = Expected(0, 100, points_max=10)
    expected.add(batch_of([(0, t, 0.0) for t in range(10)], 1))
    with pytest.raises(TooMuchError):
        expected.maximum()


def test_digests_differ_exactly_where_rows_do() -> None:
    ids = series_ids((Series(key_of(0)),))
    ours, theirs = Digests(2, 0, 3000), Digests(1, 600, 2100)
    times = np.array([650, 900, 1000, 1900], np.int64)
    values, versions = np.arange(4.0), np.arange(4)
    every = np.repeat(ids, 4, axis=0)
    ours.add(np.ones(4, np.int64), every, times, values, versions, versions)
    theirs.add(0, every, times, values, versions, versions)
    assert ours.differing(1, theirs) == []
    assert ours.differing(0, theirs) == [(600, 1200), (1800, 2100)]
    theirs.add(0, ids, np.array([1200]), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    assert ours.differing(1, theirs) == [(1200, 1500)]
    assert ours.pieces(1, 600, 2100, 2) == [(600, 900), (900, 1800), (1800, 2100)]


def test_days_are_cut_at_midnights() -> None:
    assert days(10, 20) == [(10, 20)]
    assert days(0, 2 * DAY_S) == [(0, DAY_S), (DAY_S, 2 * DAY_S)]
    assert days(DAY_S - 1, DAY_S + 1) == [(DAY_S - 1, DAY_S), (DAY_S, DAY_S + 1)]


def test_differences_are_all_counted_and_some_of_each_kind_named() -> None:
    report = Report(0, 60)
    for n in range(NAMED_MAX + 5):
        report.add(Difference(Kind.MISSING, "t", "s", f"series {n}"))
    report.add(Difference(Kind.EXTRA, "t", "s", "another"))
    assert (report.counts.total(), len(report.differences)) == (NAMED_MAX + 6, NAMED_MAX + 1)
    assert "25 missing in the store" in report.verdict()


def test_a_sample_of_sealed_windows_is_repeated_by_its_seed() -> None:
    seals = [
        LedgerSeal(str(TARGET), "ec2", ((0, 300), (600, 3600)), 11, 0, 0),
        LedgerSeal("exposition/lab/rack-1", "node", ((0, 300),), 1, 0, 0),
    ]
    windows = windows_of(seals, {(str(TARGET), "ec2"): 300, ("exposition/lab/rack-1", "node"): 300})
    assert windows == [Sealed(TARGET, "ec2", t, t + 300) for t in (0, *range(600, 3600, 300))]
    assert sample(windows, 0.3, 7) == sample(windows, 0.3, 7)
    assert len(sample(windows, 0.3, 7)) == 4
    assert len({tuple(sample(windows, 0.3, seed)) for seed in range(20)}) > 1
    assert sample([], 0.3, 7) == []
