"""`headgate why` on the real parts: at whichever stage a point stops, the sentence says where and who it is up to."""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest
from rich.console import Console

from ingest.model import LookStatus, Series, SeriesKey, Target, series_ids
from ingest.story import Fault, Story
from ingest.trail import follow
from tests.way import NAN, NOON_S, TARGET, Way, key_of, the_way
from workers import cli
from workers.samples import Filter
from workers.setup import create_topics
from workers.why import AmbiguousError, render, series_asked, to_json

ACCOUNTS = tuple(f"3109876543{n:02}" for n in range(20))


@pytest.fixture(scope="module")
async def way(postgres_dsn: str, kafka_bootstrap: str, s3_endpoint: str) -> AsyncIterator[Way]:
    name = f"why-{uuid.uuid4().hex[:12]}"
    server = await asyncpg.connect(postgres_dsn)
    await server.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
    dsn = postgres_dsn.rpartition("/")[0] + "/" + name
    accounts = [{"id": a, "regions": ["eu-west-1"], "services": ["ec2"]} for a in (TARGET.account, *ACCOUNTS)]
    async with the_way(dsn, kafka_bootstrap, name, name, s3_endpoint, accounts=accounts) as way:
        # Kafka's timestamps are of now, the looks' of this clock.
        offset_s = NOON_S - int(datetime.now(UTC).timestamp())
        run = way.config.run.model_copy(update={"clock_offset_s": offset_s})
        way.config = way.config.model_copy(update={"run": run})
        way.clock.advance(-3600)
        yield way
    await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await server.close()


def target_of(number: int) -> Target:
    return Target("cloudwatch", ACCOUNTS[number], "eu-west-1")


async def told(way: Way, target: Target, minute: int = 1, key: SeriesKey | None = None) -> Story:
    at_s = NOON_S + 60 * minute + 17
    return await follow(way.sql, way.archive, way.config, way.clock, key or key_of(0, target), at_s)


def at_stage(story: Story) -> tuple[str, Fault]:
    return story.verdict.stage, story.verdict.fault


async def test_a_point_that_landed_has_its_whole_way(way: Way) -> None:
    target = target_of(0)
    first = await way.look({0: 1.0, 1: 2.0}, target=target, observed_min=6)
    await way.look({0: 1.0, 1: 2.5}, window=(0, 10), target=target, observed_min=30)
    await way.land()

    story = await told(way, target)

    assert at_stage(story) == ("landed", Fault.NOBODY)
    assert story.verdict.sentence == "It is in the store: 2.5 as of 2026-01-01T12:30:00Z."
    assert story.at_s == NOON_S + 60
    assert [p.kind for p in story.planned] == ["live", "live"]
    assert [(a.shard, a.status, a.requests) for a in story.asked] == [
        ("exporter-1", "complete", {"GetMetricData": 1})
    ] * 2
    assert {str(a.usd) for a in story.asked} == {"0.00001"}
    assert [(a.value, bool(a.position), set(a.landed)) for a in story.answered] == [
        (2.0, True, {"postgres"}),
        (2.5, True, {"postgres"}),
    ]
    assert story.answered[0].archive_key == first.archive_key
    assert [a.value for a in story.revised] == [2.0]
    assert story.window is not None
    assert (story.window.state, story.window.start_s) == ("landed", NOON_S)


async def test_what_nobody_planned_is_headgates_and_what_is_to_come_nobodys(way: Way) -> None:
    assert at_stage(await told(way, target_of(1), -10)) == ("planned", Fault.HEADGATE)
    assert at_stage(await told(way, target_of(1), 600)) == ("planned", Fault.NOBODY)


async def test_what_is_planned_and_not_asked_is_headgates(way: Way) -> None:
    target = target_of(2)
    await way.plan(way.task(0, 5, target=target))
    await way.project()
    story = await told(way, target)
    assert at_stage(story) == ("asked", Fault.HEADGATE)
    assert "no exporter has said anything" in story.verdict.sentence


async def test_a_pause_is_a_pause(way: Way) -> None:
    target = target_of(3)
    await way.sql.execute("INSERT INTO pauses VALUES ($1, '*', now(), 'costs')", target.account)
    story = await told(way, target)
    assert at_stage(story) == ("planned", Fault.PAUSE)
    assert story.verdict.sentence.endswith(": costs")


async def test_what_the_configuration_does_not_ask_for_is_the_configurations(way: Way) -> None:
    target = target_of(4)
    other = replace(key_of(0, target), metric="NetworkIn")
    assert at_stage(await told(way, target, key=other)) == ("planned", Fault.CONFIGURATION)


@pytest.mark.parametrize(
    ("status", "detail", "fault", "said"),
    [
        (LookStatus.FORBIDDEN, "AccessDenied", Fault.PERMISSION, "refuses: AccessDenied"),
        (LookStatus.FAILED, "Throttling", Fault.SOURCE, "the last look is failed: Throttling"),
        (LookStatus.EXPIRED, "taken up after its window", Fault.HEADGATE, "asked for too late"),
    ],
)
async def test_a_look_that_failed_says_why(
    way: Way, status: LookStatus, detail: str, fault: Fault, said: str
) -> None:
    target = target_of(5 + list(LookStatus).index(status))
    await way.look(target=target, status=status, detail=detail)
    await way.land()
    story = await told(way, target)
    assert at_stage(story) == ("asked", fault)
    assert said in story.verdict.sentence


async def test_what_the_source_did_not_answer_is_the_sources_and_before_it_settles_that_is_said(
    way: Way,
) -> None:
    target = target_of(10)
    await way.look({0: 1.0}, target=target, observed_min=10)
    await way.land()
    early = await told(way, target)
    assert at_stage(early) == ("answered", Fault.SOURCE)
    assert (
        "not there yet at 2026-01-01T12:10:00Z; points may appear until 2026-01-01T12:15:00Z"
        in early.verdict.sentence
    )
    await way.look({0: 1.0}, target=target, observed_min=30, attempt=1)
    await way.land()
    late = await told(way, target)
    assert at_stage(late) == ("answered", Fault.SOURCE)
    assert "never answered" in late.verdict.sentence


async def test_what_waits_in_kafka_says_where_it_stands(way: Way) -> None:
    target = target_of(11)
    await way.look({1: 1.0}, target=target)
    await way.project()
    story = await told(way, target)
    assert at_stage(story) == ("offset", Fault.HEADGATE)
    (answer,) = story.answered
    assert answer.position is not None
    assert f"@{answer.position.offset}; the consumers stand at " in story.verdict.sentence
    await way.land()
    assert at_stage(await told(way, target)) == ("landed", Fault.NOBODY)


async def test_what_was_archived_and_never_published_is_headgates(way: Way) -> None:
    target = target_of(12)
    receipt = await way.look({1: 1.0}, target=target)
    # As if the exporter had died behind S3: the archive has it, and nothing else does.
    other = way.config.model_copy(
        update={"kafka": way.config.kafka.model_copy(update={"prefix": way.config.kafka.prefix + "-none"})}
    )
    await create_topics(other)
    story = await follow(way.sql, way.archive, other, way.clock, key_of(0, target), NOON_S + 60)
    assert at_stage(story) == ("offset", Fault.HEADGATE)
    assert story.answered[0].archive_key == receipt.archive_key
    assert "`headgate backfill --via s3`" in story.verdict.sentence
    await way.land()


async def test_a_row_that_is_gone_after_it_landed_is_the_receivers(way: Way) -> None:
    target = target_of(13)
    await way.look({1: 1.0}, target=target)
    await way.land()
    [[high, low]] = series_ids((Series(key_of(0, target)),)).tolist()
    await way.sql.execute("DELETE FROM samples WHERE series = $1", bytes.fromhex(f"{high:016x}{low:016x}"))
    story = await told(way, target)
    assert at_stage(story) == ("landed", Fault.RECEIVER)
    assert "landed in postgres, and yet the store has nothing" in story.verdict.sentence


async def test_a_point_that_was_put_aside_has_its_reason(way: Way) -> None:
    target = target_of(14)
    await way.look({0: 1.0, 1: NAN, 200: 3.0}, window=(0, 205), target=target)
    await way.land()
    story = await told(way, target)
    assert at_stage(story) == ("refused", Fault.SOURCE)
    assert "answered as nan at 2026-01-01T12:20:00Z and put aside as not_a_number" in story.verdict.sentence
    ahead = await told(way, target, 200)
    assert (at_stage(ahead), ahead.answered[0].refused) == (("refused", Fault.SOURCE), "future")


async def test_an_object_that_is_gone_is_said(way: Way) -> None:
    target = target_of(15)
    await way.look({1: 1.0}, target=target)
    await way.land()
    await way.sql.execute("UPDATE looks SET archive_key = archive_key || '0' WHERE target = $1", str(target))
    story = await told(way, target)
    assert at_stage(story) == ("archived", Fault.HEADGATE)
    assert story.spoilt


async def test_a_folded_window_is_sealed(way: Way) -> None:
    target = target_of(16)
    await way.look({1: 1.0}, target=target)
    await way.land()
    noon = datetime.fromtimestamp(NOON_S, UTC)
    await way.sql.execute("DELETE FROM windows WHERE target = $1", str(target))
    await way.sql.execute(
        "INSERT INTO sealed_days (target, service, day, windows, points, digest, first_start, last_end, sealed_at, covered)"
        " VALUES ($1, 'ec2', '2026-01-01', 1, 1, 0, $2, $3, now(), tstzmultirange(tstzrange($2, $3)))",
        str(target), noon, noon + timedelta(minutes=5),
    )  # fmt: skip
    story = await told(way, target)
    assert story.window is not None
    assert (story.window.state, story.window.start_s, story.window.end_s) == ("sealed", NOON_S, NOON_S + 300)
    assert at_stage(story) == ("landed", Fault.NOBODY)


# --- which series -----------------------------------------------------------------------------------------------------


async def test_a_series_is_found_in_the_store_or_made_of_the_configuration(way: Way) -> None:
    target = target_of(17)
    await way.look({1: 1.0}, {1: 2.0}, target=target)
    await way.land()
    wanted = Filter(target.account, target.region, "AWS/EC2", "CPUUtilization")
    with pytest.raises(AmbiguousError, match='InstanceId":"i-0"'):
        await series_asked(way.sql, way.config, wanted)
    one = replace(wanted, dimensions=(("InstanceId", "i-1"),))
    assert await series_asked(way.sql, way.config, one) == key_of(1, target)
    new = replace(wanted, dimensions=(("InstanceId", "i-77"),))
    assert await series_asked(way.sql, way.config, new) == key_of(77, target)
    with pytest.raises(AmbiguousError, match="give --account, --region"):
        await series_asked(way.sql, way.config, replace(new, region=None))
    with pytest.raises(AmbiguousError, match="give --stat"):
        await series_asked(way.sql, way.config, replace(new, metric="NoSuchMetric"))


# --- the command ------------------------------------------------------------------------------------------------------


async def test_the_table_and_the_json_tell_the_same(way: Way) -> None:
    story = await told(way, target_of(0))
    out = io.StringIO()
    Console(file=out, width=200).print(render(story))
    for word in (
        "planned",
        "exporter-1 complete",
        "$0.00001",
        "2.0 as of",
        "superseded",
        "raw/0@",
        "postgres 20",
    ):
        assert word in out.getvalue()
    said = json.loads(to_json(story))
    assert said["verdict"]["fault"] == "nobody"
    assert said["stored"]["value"] == 2.5
    assert said["answered"][0]["position"]["offset"] == 0


async def test_the_command_ends_with_0_1_or_2(
    way: Way, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "workers.why.configure_logs", lambda _: None
    )  # it would log to this test's stderr for ever
    raw = way.config.model_dump(mode="json", include={"slots", "kafka", "postgres", "s3", "run"})
    raw["postgres"].pop("password")
    raw["accounts"] = [{"id": ACCOUNTS[0], "regions": ["eu-west-1"], "services": ["ec2"]}]
    path = tmp_path / "headgate.yaml"
    path.write_text(json.dumps(raw))
    args = ["why", "--config", str(path), "--account", ACCOUNTS[0], "--region", "eu-west-1"]
    args += ["--namespace", "AWS/EC2", "--metric", "CPUUtilization", "--dim", "InstanceId=i-0", "--at"]
    assert await asyncio.to_thread(cli.main, [*args, "2026-01-01T12:01:00Z", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stored"]["value"] == 2.5
    assert await asyncio.to_thread(cli.main, [*args, "2026-01-01T10:01:00Z"]) == 1
    assert "never planned" in " ".join(capsys.readouterr().out.split())
    assert (
        await asyncio.to_thread(cli.main, ["why", "--config", str(path), "--at", "0", "--metric", "x"]) == 2
    )
