"""The live page: what it says, of made-up installations; that it never stops the coordinator; and how it looks in a real browser."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
import yaml

from ingest.budget import Decision, Polling
from ingest.clock import SystemClock, utc
from ingest.gaps import OpenWindows
from ingest.glance import Given, Glance, OpenOf, Trouble, glance
from ingest.ledger import Ledger
from ingest.model import LookStatus
from ingest.pauses import Pause, Pauses
from ingest.reassign import Planned
from ingest.schedule import grids_of
from shard_config.load import load, shipped_services
from shard_config.model import Account, Config, Kafka, Postgres, ServiceProfile
from shard_config.units import UnitPlan
from tests.browser import Tab, needs_chromium, tab
from tests.conftest import empty_bucket, empty_database, eventually
from tests.page_scene import (
    NOW_MS,
    NOW_S,
    glance_of,
    history_of,
    money_of,
    seen_of,
    served,
    shards_page,
    target_of,
    troubled,
)
from tests.test_ledger import NOON_S, OTHER, TARGET, Store, ledger_database, receipt_of, store, task_of
from workers import simulator
from workers.lifecycle import Lifecycle
from workers.page import Page, Presence, units_of
from workers.page_document import read
from workers.page_facts import (
    FAULTS_MAX,
    HISTORY_S,
    SAMPLES,
    TEXT_MAX,
    GroupSeen,
    History,
    Json,
    Part,
    Seen,
    Unit,
    cells_of,
)
from workers.page_verdict import DO, FINDINGS_MAX, page_of, spoken
from workers.servers import free_ports
from workers.setup import setup
from workers.world import World, account_ids

__all__ = ["ledger_database", "store"]  # the fixtures

ROOT = Path(__file__).resolve().parents[1]


def page(seen: Seen) -> Json:
    return page_of(seen, History(), {})


def with_glance(seen: Seen, **changes: Any) -> Seen:
    assert seen.ledger.value is not None
    return replace(seen, ledger=replace(seen.ledger, value=replace(seen.ledger.value, **changes)))


# --- cells --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age_s", "interval_s", "level"),
    [
        (420, 300, "fresh"),
        (421, 300, "late"),
        (1020, 300, "late"),
        (1021, 300, "stale"),
        (1021, 1200, "fresh"),
        (86_000, 86_400, "fresh"),
    ],
)
def test_a_cell_is_as_fresh_as_its_own_poll_interval_lets_it_be(
    age_s: int, interval_s: int, level: str
) -> None:
    seen = with_glance(seen_of(1), fresh={target_of(0): utc(NOW_S - age_s)})
    [cell] = cells_of(replace(seen, units={target_of(0): Unit(0, interval_s)}))
    assert (cell["level"], cell["fresh_ms"]) == (level, NOW_MS - age_s * 1000)


def test_what_never_landed_waits_while_the_coordinator_starts_and_is_stale_afterwards() -> None:
    seen = with_glance(seen_of(1), fresh={})
    assert cells_of(seen)[0]["level"] == "stale"
    assert cells_of(replace(seen, started_ms=NOW_MS - 60_000))[0]["level"] == "waiting"
    assert page(replace(seen, started_ms=NOW_MS - 60_000))["verdict"]["level"] == "info"


def test_of_a_split_target_each_part_has_its_own_freshness_and_its_own_problem() -> None:
    name = target_of(0)
    seen = with_glance(
        seen_of(1),
        fresh_parts={(name, "ec2"): utc(NOW_S - 60), (name, "sqs"): utc(NOW_S - 9000)},
        troubles=(Trouble(name, "sqs", "failed", "timeout", utc(NOW_S)),),
    )
    cells = cells_of(replace(seen, units={f"{name}#ec2": Unit(0, 300), f"{name}#sqs": Unit(1, 300)}))
    assert [(c["level"], c.get("problem")) for c in cells] == [
        ("fresh", None),
        ("stale", "sqs failed: timeout"),
    ]


def test_units_go_by_their_shortest_interval_as_stretched_and_those_that_nobody_asks_for_are_paused() -> None:
    profile = {"namespace": "N", "period_s": 60, "settling_s": 600, "metrics": "all", "statistics": ["Sum"]}
    config = Config(
        accounts=(
            Account(id="100000000001", regions=("eu-west-1",), services=("quick", "slow"), alias="prod"),
            Account(id="100000000002", regions=("eu-west-1",), services=("slow",)),
            Account(id="100000000003", regions=("eu-west-1",), services=("quick",)),
        ),
        services=tuple(
            ServiceProfile.model_validate({"service": name, "poll_interval_s": every_s, **profile})
            for name, every_s in (("quick", 300), ("slow", 3600))
        ),
    )
    one, two, three = (f"cloudwatch/10000000000{i}/eu-west-1" for i in (1, 2, 3))
    planned = Planned(UnitPlan({f"{one}#quick": 0, f"{one}#slow": 1, two: 2, three: 3}, {}), 4)
    pauses = Pauses.of([Pause("100000000002", "*", datetime.now(UTC), "")])
    polling = Polling({("100000000001", "quick"): 4}, frozenset({("100000000003", "quick")}))
    grids = {str(t): g for t, g in grids_of(config).items()}
    assert units_of(config, grids, planned, pauses, polling) == {
        f"{one}#quick": Unit(0, 1200, "prod"),
        f"{one}#slow": Unit(1, 3600, "prod"),
        two: Unit(2, 0, "", paused=True),
        three: Unit(3, 0, "", paused=True),
    }


# --- the sentence -------------------------------------------------------------------------------------------------


def test_when_all_is_well_it_says_so_and_how_much_that_is() -> None:
    found = page(seen_of(1000, 8, 64))
    assert found["verdict"] == {
        "level": "ok",
        "alert": "",
        "text": "All is well: 1,000 targets on 8 shards, and nothing is open past its deadline.",
        "do": "Nothing to do.",
    }
    assert (found["findings"], found["faults"], found["unowned"]) == ([], [], [])
    assert found["levels"] == {"fresh": 1000}


def gone(seen: Seen) -> Seen:
    shards = shards_page(["exporter-1", "exporter-3"], 24)
    shards["moves"] = [
        {"at_ms": NOW_MS - 5000, "slot": s, "from": "exporter-2", "to": f"exporter-{1 + 2 * (s % 2)}", "reason": ""}
        for s in range(8)
    ]  # fmt: skip
    return replace(seen, shards=shards, gone={"exporter-2": NOW_MS - 20_000})


def no_consumer(seen: Seen) -> Seen:
    assert seen.kafka.value is not None
    landing = GroupSeen({0: 9}, ())
    return replace(seen, kafka=replace(seen.kafka, value=replace(seen.kafka.value, landing=landing)))


def waiting(seen: Seen, **groups: Any) -> Seen:
    assert seen.kafka.value is not None
    return replace(seen, kafka=replace(seen.kafka, value=replace(seen.kafka.value, **groups)))


CASES: dict[str, tuple[Callable[[Seen], Seen], str, str, str]] = {
    "kafka away": (
        lambda s: replace(s, kafka=replace(s.kafka, as_of_ms=NOW_MS - 23_000).failed("refused", NOW_MS)),
        "critical", "", "Kafka has not answered since 12:00:40Z: nothing new is collected, and nothing lands.",
    ),
    "postgres away": (
        lambda s: replace(s, ledger=replace(s.ledger, as_of_ms=NOW_MS - 23_000, failing_since_ms=NOW_MS - 23_000, error="x")),
        "critical", "", "PostgreSQL has not answered since 12:00:40Z: collecting goes on, nothing lands.",
    ),
    "no shard": (
        lambda s: replace(s, shards=shards_page(["exporter-1"], 24, alive=[]), unowned_since_ms=NOW_MS),
        "critical", "HeadgateSlotsWithoutShard", "No exporter shard is there: nothing is collected.",
    ),
    "slots of nobody": (
        lambda s: replace(s, shards=shards_page(["exporter-1", "exporter-2"], 24, alive=["exporter-1"]), unowned_since_ms=NOW_MS - 40_000),
        "critical", "HeadgateSlotsWithoutShard", "12 slots without a shard since 12:00:23Z: 6 targets are not collected.",
    ),
    "no consumer": (no_consumer, "critical", "HeadgateLedgerNotObserved", "No consumer is there"),
    "a shard gone": (gone, "warning", "", "The shard exporter-2 is gone since 12:00:43Z; its 8 slots moved to exporter-1, exporter-3."),
    "a shard that starts again and again": (
        lambda s: replace(s, starts={"exporter-1": (NOW_MS - 900_000, NOW_MS - 600_000, NOW_MS - 3000)}),
        "warning", "", "The shard exporter-1 has started 3 times within half an hour, last at 12:01:00Z.",
    ),
    "more shards than slots": (
        lambda s: replace(s, shards=shards_page(["exporter-1", "exporter-2", "exporter-3"], 2)),
        "warning", "HeadgateShardWithoutSlots", "exporter-3: no slots",
    ),
    "rows that are not the receipts'": (
        lambda s: with_glance(s, windows=OpenWindows({"unbalanced": 1}, None)),
        "critical", "HeadgateWindowsUnbalanced", "In the store the rows of 1 window are not what was collected.",
    ),
    "one stale target of many": (
        lambda s: with_glance(s, fresh={**glance_of(12).fresh, target_of(4): utc(NOW_S - 7200)}),
        "warning", "HeadgateTargetStale", f"Stale: 1 of 12 targets. Of {target_of(4)} there is nothing newer than 10:01:03Z.",
    ),
    "all stale": (lambda s: with_glance(s, fresh={}), "critical", "HeadgateTargetStale", "Stale: 12 of 12 targets."),
    "windows past their deadline": (
        lambda s: with_glance(s, windows=OpenWindows({"in_time": 48, "failed": 3, "no_receipt": 20, "paused": 7}, None)),
        "warning", "HeadgateWindowsOpenPastDeadline", "Open past their deadline: 23 windows (20 no_receipt, 3 failed).",
    ),
    "windows given up": (
        lambda s: with_glance(s, given=(Given("t", "ec2", "forbidden", 3, utc(NOW_S), utc(NOW_S)),)),
        "warning", "HeadgateWindowsDeclared", "Given up within the hour: 3 windows of 1 target (forbidden).",
    ),
    "batches that wait": (
        lambda s: waiting(s, landing=GroupSeen({0: 40, 1: 2}, ("consumer-1",), 400.0)),
        "warning", "HeadgateLagGrowing", "Waiting to land for 6 min: 42 batches.",
    ),
    "a receiver behind": (
        lambda s: waiting(s, receivers={"p-1": GroupSeen({0: 4}, ("remote-write-1",), 1000.0)}),
        "warning", "HeadgateRemoteWriteLagging", "The receiver p-1 is 16 min behind.",
    ),
    "nobody sends": (
        lambda s: waiting(s, receivers={"p-1": GroupSeen({0: 1}, (), 3.0)}),
        "warning", "HeadgateRemoteWriterGone", "Nobody sends to the receiver p-1: 1 batch wait.",
    ),
    "dead letters": (
        lambda s: replace(s, dead_before=(1, NOW_MS - 60_000)),
        "warning", "HeadgateDeadLetterShare", "2 dead letters since 12:00:03Z.",
    ),
    "a budget passed": (
        lambda s: replace(s, money=Part(money_of("41", "50", "40"), NOW_MS)),
        "critical", "HeadgateBudgetPassed", "The day's budget is passed: all accounts.",
    ),
    "polls stopped": (
        lambda s: replace(s, money=Part(money_of("1", "1", "4", stopped=frozenset({("1", "sqs")})), NOW_MS)),
        "critical", "HeadgatePollsStopped", "Not polled until midnight UTC, for want of money: sqs of 1.",
    ),
    "a budget too small": (
        lambda s: replace(s, money=Part(money_of("1", "50", "40"), NOW_MS)),
        "warning", "HeadgateBudgetTooSmall", "By midnight UTC the budget will be passed: all accounts.",
    ),
    "polls stretched": (
        lambda s: replace(s, money=Part(money_of("1", "1", "4", stretch={("1", "sqs"): 6}), NOW_MS)),
        "warning", "HeadgatePollsStretched", "Polled more rarely, for a budget: sqs of 1 ×6.",
    ),
    "a file refused": (lambda s: replace(s, config_refused=True), "warning", "HeadgateConfigInvalid", "The configuration file"),
    "an old list": (
        lambda s: replace(s, organization_age_s=5 * 3600.0),
        "warning", "HeadgateOrganizationNotListed", "The organization's list of accounts is 5 h 00 min old",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_stands_at_the_top_with_its_runbook_and_what_to_do(case: str) -> None:
    make, level, alert, text = CASES[case]
    found = page(make(seen_of()))["verdict"]
    assert (found["level"], found["alert"]) == (level, alert)
    assert found["text"].startswith(text)
    assert found["do"]


def test_of_gaps_that_wait_for_money_it_says_so() -> None:
    seen = with_glance(seen_of(), windows=OpenWindows({"failed": 3}, None))
    assert "healing is under way" in page(seen)["verdict"]["do"]
    assert "heal.usd_per_day" in page(replace(seen, heal_waits={"budget": 3, "backoff": 0}))["verdict"]["do"]


def test_while_the_coordinator_starts_what_an_earlier_life_left_open_is_no_alarm() -> None:
    seen = with_glance(seen_of(), windows=OpenWindows({"no_receipt": 300, "not_checked": 5}, None))
    assert page(seen)["verdict"]["level"] == "warning"
    assert page(replace(seen, started_ms=NOW_MS - 20_000))["verdict"]["level"] == "ok"


def test_the_gravest_stands_first_and_the_others_follow_bounded() -> None:
    found = page(troubled(seen_of(1000, 8, 64)))
    levels = [found["verdict"]["level"], *(f["level"] for f in found["findings"])]
    assert levels == sorted(levels, key=["critical", "warning"].index)
    assert 5 < len(levels) <= FINDINGS_MAX


def test_every_alert_that_the_page_names_is_one_of_ours() -> None:
    text = (ROOT / "helm/headgate/files/rules/alerts.yml").read_text()
    ours = set(re.findall(r"alert: (\w+)", text))
    named = {alert for _, _, alert, _ in CASES.values() if alert}
    source = (ROOT / "workers/page_verdict.py").read_text()
    assert named == set(re.findall(r'"(Headgate\w+)"', source))
    assert named <= ours
    assert {path.stem for path in (ROOT / "docs/runbooks").iterdir()} >= {*named, "HeadgateNoCoordinator"}


def test_every_command_that_the_page_recommends_is_there() -> None:
    from workers.cli import COMMANDS

    named = {m for text in DO.values() for m in re.findall(r"`headgate ([a-z-]+)", text)}
    assert len(named) > 8
    assert named - set(COMMANDS) <= {"remote-write"}


def test_durations_are_spoken_in_two_units_at_most() -> None:
    assert [spoken(s) for s in (7, 119.9, 120, 7199, 7260, 172_800)] == [
        "7 s", "119 s", "2 min", "119 min", "2 h 01 min", "2 days",
    ]  # fmt: skip


# --- parts, history, faults ---------------------------------------------------------------------------------------


def test_a_part_that_does_not_answer_keeps_what_it_said_and_since_when() -> None:
    never: Part[Glance] = Part()
    never = never.failed("refused", 1000)
    assert (never.value, never.as_of_ms, never.failing_since_ms) == (None, None, 1000)
    once = Part(glance_of(1), 5000).failed("x" * 9000, 9000).failed("later", 12_000)
    assert (once.value, once.failing_since_ms, once.error) == (glance_of(1), 5000, "later")
    assert len(Part(1, 1).failed("x" * 9000, 2).error) == TEXT_MAX


def test_while_the_store_is_away_targets_stay_as_they_were_and_do_not_turn_stale() -> None:
    away = replace(seen_of(), now_ms=NOW_MS + 7_200_000)
    away = replace(away, ledger=away.ledger.failed("connection refused", away.now_ms))
    found = page(away)
    assert found["levels"] == {"fresh": 12}
    assert found["parts"][1]["failing_since_ms"] == found["parts"][1]["as_of_ms"] == NOW_MS - 2000
    assert found["faults"][0]["who"] == "PostgreSQL"


def test_the_history_is_half_an_hour_a_sample_each_quarter_of_a_minute() -> None:
    history = History()
    for second in range(0, 2 * HISTORY_S, 5):
        page_of(replace(seen_of(1), now_ms=NOW_MS + second * 1000), history, {})
    at_ms = history.page()["at_ms"]
    assert len(at_ms) == SAMPLES
    assert {b - a for a, b in pairwise(at_ms)} == {15_000}
    assert history.page()["usd"] == [12.5] * SAMPLES


def test_a_part_that_is_away_leaves_no_sample() -> None:
    history = History()
    page_of(replace(seen_of(), kafka=seen_of().kafka.failed("x", NOW_MS)), history, {})
    assert history.page()["at_ms"] == []


def test_how_long_records_wait_follows_from_where_the_log_ended_before() -> None:
    history = History()
    numbers = page(seen_of())["numbers"]
    for i, end in enumerate((100, 200, 300)):
        history.add(i * 60_000, numbers, {"raw": {0: end, 1: 5}})
    ends = {"raw": {0: 300, 1: 5}}
    assert history.waits_s("raw", {0: 0, 1: 0}, ends, 180_000) is None
    assert history.waits_s("raw", {0: 1, 1: 0}, ends, 180_000) == 60  # 299 was there at 120 s, not at 60 s
    assert history.waits_s("raw", {0: 150, 1: 0}, ends, 180_000) == 120
    assert history.waits_s("raw", {0: 10, 1: 0}, {"raw": {0: 320, 1: 5}}, 180_000) == 0


def test_a_complaint_of_many_targets_is_one_fault_and_faults_are_bounded_and_newest_first() -> None:
    same = [Trouble(target_of(i), "ec2", "forbidden", f"{target_of(i)} ec2: AccessDenied", utc(NOW_S - i)) for i in range(30)]  # fmt: skip
    other = [Trouble("t" * 9000, f"s{i}", "failed", "x" * 9000, utc(NOW_S - 100 - i)) for i in range(90)]
    found = page(with_glance(seen_of(), troubles=(*other, *same)))["faults"]
    assert len(found) == FAULTS_MAX
    assert found[0]["who"] == f"ec2 of {target_of(0)} and 29 targets more"
    assert (found[0]["what"], found[0]["at_ms"]) == ("forbidden: AccessDenied", NOW_MS)
    assert [f["at_ms"] for f in found] == sorted((f["at_ms"] for f in found), reverse=True)
    assert max(len(text) for f in found for text in (f["who"], f["what"])) == TEXT_MAX


def test_shards_that_went_are_remembered_for_half_an_hour_and_restarts_are_counted() -> None:
    presence = Presence()
    presence.take(shards_page(["a", "b"], 4), NOW_MS)
    assert presence.gone(NOW_MS) == {}
    assert presence.unowned_since_ms is None
    less = shards_page(["a", "b"], 4, alive=["a"])
    for i in (1, 2):
        less["shards"][0]["since_ms"] = NOW_MS + i
        presence.take(less, NOW_MS + i * 1000)
    assert presence.gone(NOW_MS + 2000) == {"b": NOW_MS}
    assert presence.unowned_since_ms == NOW_MS + 1000
    assert len(presence.starts["a"]) == 2  # the first one is older than half an hour
    presence.take(shards_page(["a"], 4), NOW_MS + 2_000_000)
    assert (presence.gone(NOW_MS + 2_000_000), presence.unowned_since_ms) == ({}, None)


# --- the ledger's part --------------------------------------------------------------------------------------------


async def test_a_glance_sees_what_is_fresh_open_late_in_trouble_and_given_up(store: Store) -> None:
    ec2 = task_of(NOON_S - 900, NOON_S)
    await store.project(
        ec2,
        receipt_of(task_of(NOON_S - 600, NOON_S - 300), counts=[(NOON_S - 600, 60, 1)], finished_s=NOON_S - 30),
        task_of(NOON_S - 300, NOON_S, target=OTHER),
        receipt_of(task_of(NOON_S - 300, NOON_S, target=OTHER), status=LookStatus.FORBIDDEN, detail="AccessDenied", finished_s=NOON_S - 20),
    )  # fmt: skip
    await store.fold()
    await store.sql.execute(
        "UPDATE windows SET declared = 'abandoned', declared_at = $1 WHERE target = $2 AND window_start = $3",
        utc(NOON_S - 60), str(TARGET), utc(NOON_S - 900),
    )  # fmt: skip
    await store.sql.execute(
        "INSERT INTO landed VALUES ('postgres', $1, 't', 't', 's', 1, 600, 2, 0, $2)", b"a" * 16, utc(NOON_S - 5)
    )  # fmt: skip
    seen = await glance(store.sql, utc(NOON_S + 601), [str(TARGET)])
    assert seen.fresh == {str(TARGET): utc(NOON_S - 300), str(OTHER): utc(NOON_S - 300)}
    assert seen.fresh_parts == {(str(TARGET), "ec2"): utc(NOON_S - 300)}
    assert seen.open == {
        str(TARGET): OpenOf(2, 0, utc(NOON_S - 600)),
        str(OTHER): OpenOf(1, 0, utc(NOON_S - 300)),
    }
    [trouble] = seen.troubles
    assert (trouble.target, trouble.status, trouble.at) == (str(OTHER), "forbidden", utc(NOON_S - 20))
    [given] = seen.given
    assert (given.reason, given.windows) == ("abandoned", 1)
    now = await glance(store.sql, utc(NOON_S))
    assert (now.points_per_s, dict(now.collected_per_s)) == (10.0, {"exporter-1": 1.0})
    later = await glance(store.sql, utc(NOON_S + 86_400))
    assert (later.open[str(TARGET)].late, later.given, later.points_per_s) == (2, (), 0.0)


# --- in the background --------------------------------------------------------------------------------------------


class Planner:
    """A coordinator that plans nothing, but has a plan; `broken`: asking for it raises."""

    def __init__(self) -> None:
        self.pauses, self.polling, self.broken = Pauses(), Polling(), False

    @property
    def planned(self) -> Planned:
        if self.broken:
            raise ValueError("a bug")
        return Planned(UnitPlan({str(TARGET): 0}, {str(TARGET): 1.0}), 4)


class Purse:
    decision: Decision | None = money_of("1", "2", None)
    decided_at_ms: int | None = None
    error = ""


def page_on(kafka: str, dsn: str) -> tuple[Page, Planner]:
    account = Account(id=TARGET.account, regions=(TARGET.region,), services=("ec2",))
    config = Config(
        accounts=(account,),
        services=(shipped_services()["ec2"],),
        kafka=Kafka(bootstrap=kafka),
        postgres=Postgres(dsn=dsn),
    )
    planner = Planner()
    shards = lambda: shards_page(["exporter-1"], 4)  # noqa: E731
    made = Page(config, planner, shards, Purse(), Ledger(config.postgres, "test", {}), SystemClock())
    return made, planner


def data_of(page: Page) -> Json:
    found: Json = orjson.loads(page.document.data.plain)
    return found


async def test_with_kafka_and_the_store_away_the_page_is_made_and_says_so_and_a_bug_in_it_stops_nothing() -> (
    None
):
    kafka, postgres = free_ports(2)
    made, planner = page_on(f"127.0.0.1:{kafka}", f"postgresql://headgate@127.0.0.1:{postgres}/x")
    made.document._asked_s = SystemClock().monotonic_s()  # as if somebody looked
    lifecycle = Lifecycle()
    running = asyncio.create_task(made.run(lifecycle))

    async def both_away() -> bool:
        made.document.wanted.set()
        parts = data_of(made).get("parts", [])
        return len([p for p in parts if p["failing_since_ms"]]) == 2

    await eventually(both_away)
    errors = {p["name"]: p["error"] for p in data_of(made)["parts"]}
    assert str(kafka) in errors["Kafka"]
    assert str(postgres) in errors["PostgreSQL"]
    assert [c["level"] for c in data_of(made)["cells"]] == ["waiting"]
    before = data_of(made)["as_of_ms"]
    planner.broken = True
    made.document.wanted.set()
    await asyncio.sleep(0.1)
    assert data_of(made)["as_of_ms"] >= before
    assert not running.done()
    planner.broken = False

    async def made_again() -> bool:
        made.document.wanted.set()
        return bool(data_of(made)["as_of_ms"] > before)

    await eventually(made_again)
    lifecycle.stop.set()
    await asyncio.wait_for(running, 15)


async def test_the_last_known_is_shown_when_the_store_goes_away(store: Store) -> None:
    await store.project(task_of(NOON_S - 300, NOON_S), receipt_of(task_of(NOON_S - 300, NOON_S), counts=[(NOON_S - 300, 4, 1)]))  # fmt: skip
    await store.fold()
    made, _ = page_on("127.0.0.1:1", store.dsn)
    await made.look_at_ledger()
    await made.make()
    assert data_of(made)["cells"][0]["fresh_ms"] == NOON_S * 1000
    made._ledger._postgres = Postgres(dsn="postgresql://headgate@127.0.0.1:1/x")
    await made._ledger.close()
    await made._ledger_step()
    await made.make()
    found = data_of(made)
    assert found["cells"][0]["fresh_ms"] == NOON_S * 1000
    assert found["parts"][1]["failing_since_ms"] == found["parts"][1]["as_of_ms"]


# --- what is served -----------------------------------------------------------------------------------------------


def test_the_document_is_one_file_that_asks_for_nothing_from_outside_and_makes_no_markup() -> None:
    html, policy = read()
    text = html.decode()
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=|style=", text
    )
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(text.splitlines()) < 400


async def test_it_is_served_packed_where_the_reader_takes_that_and_nothing_but_reading_is_let_in() -> None:
    async with served() as here, aiohttp.ClientSession(auto_decompress=False) as session:
        here.show(seen_of())
        async with session.get(here.url) as answer:
            assert answer.content_type == "text/html"
            assert answer.headers["Content-Security-Policy"] == read()[1]
        for accepts, encoding in (("gzip, br", "gzip"), ("identity", None)):
            async with session.get(here.url + "page.json", headers={"Accept-Encoding": accepts}) as answer:
                assert answer.headers.get("Content-Encoding") == encoding
                assert abs(int(answer.headers["X-Headgate-Now-Ms"]) - NOW_MS) < 60_000
                body = await answer.read()
                assert (body == here.document.data.plain) == (encoding is None)
        for path in ("", "page.json"):
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                async with session.request(method, here.url + path) as answer:
                    assert answer.status == 405
        async with session.get(here.url + "page.html") as answer:
            assert answer.status == 404


def test_a_page_of_2000_targets_is_small_on_the_way() -> None:
    from workers.page_document import Packed

    seen = troubled(seen_of(2000, 20, 256))
    packed = Packed.of(page_of(seen, history_of(seen), {}))
    assert len(packed.plain) < 1_000_000
    assert len(packed.gzipped) < 80_000


# --- in a browser -------------------------------------------------------------------------------------------------

CELLS = "document.querySelectorAll('#map .cell').length"
SHOWN = f"{CELLS} > 0"


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Tab]:
    async with tab() as found:
        yield found


def asked_only_here(tab: Tab, url: str) -> bool:
    return {u for u in tab.asked if not u.startswith("data:")} <= {url, url + "page.json"}


@needs_chromium
async def test_hostile_names_are_text_and_run_nothing(browser: Tab) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>`</code>`"
    seen = troubled(seen_of())
    seen = replace(seen, units={name: replace(unit, alias=evil) for name, unit in seen.units.items()})
    seen = with_glance(seen, troubles=(Trouble(target_of(5), evil, evil, evil, utc(NOW_S)),), given=(Given(evil, evil, evil, 1, utc(NOW_S), utc(NOW_S)),))  # fmt: skip
    seen.shards["shards"][0]["shard"] = seen.shards["moves"][0]["reason"] = seen.shards["reason"] = evil
    seen = replace(seen, ledger=seen.ledger.failed(evil, NOW_MS), revision=evil)
    async with served() as here:
        here.show(seen)
        await browser.open(here.url)
        await browser.until(SHOWN)
        await browser.run("document.querySelector('#map .stale').focus()")
        await asyncio.sleep(0.3)
        assert "owned" not in await browser.run("document.title")
        assert await browser.run("document.querySelectorAll('img, script').length") == 1
        text = await browser.text()
        assert text.count("<img src=x") > 10
        assert (browser.complaints, asked_only_here(browser, here.url)) == ([], True)


@needs_chromium
async def test_1000_targets_are_a_map_that_keys_walk_and_a_search_narrows(browser: Tab) -> None:
    async with served() as here:
        here.show(troubled(seen_of(1000, 8, 64)))
        await browser.open(here.url)
        await browser.until(f"{CELLS} === 1000")
        assert "1 slot without a shard" in await browser.text("#verdict")
        blocks = await browser.run("[...document.querySelectorAll('.shard')].map(b => b.dataset.shard + b.dataset.alive)")  # fmt: skip
        assert blocks == ["false", "exporter-1true", "exporter-2false", *(f"exporter-{i}true" for i in range(3, 9))]  # fmt: skip
        # One stop of Tab, then arrows.
        assert await browser.run("document.querySelectorAll('#map [tabindex=\"0\"]').length") == 1
        await browser.run("document.querySelector('#search').focus()")
        await browser.press("Tab")
        first = await browser.run("document.activeElement.dataset.unit")
        await browser.press("ArrowRight")
        await browser.press("ArrowDown")
        second = await browser.run("document.activeElement.dataset.unit")
        assert first != second
        detail = await browser.text("#detail")
        assert detail.startswith(second)
        assert "slot" in detail
        await browser.run("search = '100000000242', map()")
        dimmed = await browser.run("document.querySelectorAll('#map .cell.other').length")
        assert dimmed == 996
        # The worst stands out without colour as well.
        sign = await browser.run("getComputedStyle(document.querySelector('.stale'), '::before').content")
        assert sign == '"!"'
        assert browser.complaints == []


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
async def test_nothing_is_wider_than_the_screen_and_text_can_be_read(
    browser: Tab, width: int, dark: bool
) -> None:
    async with served() as here:
        here.show(troubled(seen_of(200, 4, 32)))
        await browser.open(here.url, width=width, dark=dark)
        await browser.until(SHOWN)
        assert await browser.run("document.documentElement.scrollWidth") <= width
        overflowing = "[...document.querySelectorAll('.tile, .tile .value')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert await browser.run(overflowing) == 0
        ink, paper = await browser.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")  # fmt: skip
        bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
        assert (bright[0] > bright[1]) == dark
        assert abs(bright[0] - bright[1]) > 500


@needs_chromium
async def test_it_says_so_when_nothing_new_is_made(browser: Tab) -> None:
    async with served() as here:
        here.clock.offset_s += 60
        here.show(seen_of())
        await browser.open(here.url)
        await browser.until("!document.querySelector('#stale').hidden")
        assert "has made nothing new for 6" in await browser.text("#stale")
        assert "what you see is of 12:01:03Z" in await browser.text("#stale")
        here.show(replace(seen_of(), now_ms=here.clock.now_ms()))
        await browser.run("look()")
        await browser.until("document.querySelector('#stale').hidden")


# --- with everything running --------------------------------------------------------------------------------------


@dataclass
class Stage:
    """Workers as processes, as they are deployed; nobody starts them again."""

    url: str
    dsn: str
    processes: dict[str, subprocess.Popen[bytes]]

    async def json(self, path: str = "page.json") -> Json:
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as answer:
            found: Json = await answer.json()
            return found


@pytest.fixture(scope="module")
async def stage(
    tmp_path_factory: pytest.TempPathFactory, kafka_bootstrap: str, postgres_dsn: str, s3_endpoint: str
) -> AsyncIterator[Stage]:
    home = tmp_path_factory.mktemp("page")
    fast = {"namespace": "Fast", "period_s": 1, "poll_interval_s": 2, "settling_s": 2}
    ids, regions = account_ids(3), ["eu-west-1", "us-east-1"]
    profile = ServiceProfile.model_validate({"service": "fast", **fast})
    sim = await simulator.start(World(7, ids, regions, 3, [profile]))
    kafka = {"bootstrap": kafka_bootstrap, "prefix": "t-page", "raw_partitions": 1, "ledger_partitions": 1, "session_timeout_s": 6}  # fmt: skip
    async with empty_database(postgres_dsn) as dsn:
        path = home / "headgate.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "accounts": [
                        {"id": i, "regions": regions, "services": ["fast"], "alias": f"<b>{i[-1]}</b>"}
                        for i in ids
                    ],
                    "services": {"fast": fast},
                    "startup_lookback_s": 0,
                    "slots": 12,
                    "aws": {"endpoint_url": sim.url, "role_template": "arn:aws:iam::{account}:role/Headgate"},
                    "kafka": kafka,
                    "postgres": {"dsn": dsn},
                    "s3": {"bucket": empty_bucket(s3_endpoint), "endpoint_url": s3_endpoint},
                }
            )
        )
        await setup(load(path, environ={}))
        (port,) = free_ports(1)
        workers = {f"exporter-{i}": ("exporter", "--shard", f"exporter-{i}") for i in (1, 2, 3)}
        workers |= {
            "consumer-1": ("consumer", "--name", "consumer-1"),
            "coordinator": ("coordinator", "--metrics-port", str(port)),
        }
        with ExitStack() as stack:
            processes = {}
            for name, command in workers.items():
                log = stack.enter_context((home / f"{name}.log").open("wb"))
                processes[name] = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
                    [sys.executable, "-m", "workers.cli", *command, "--config", str(path)],
                    cwd=ROOT,
                    stderr=log,
                )
            try:
                yield Stage(f"http://127.0.0.1:{port}/", dsn, processes)
            finally:
                for process in processes.values():
                    process.kill()
                    process.wait()
                await sim.close()


@needs_chromium
async def test_a_shard_that_is_killed_shows_and_its_slots_move_and_then_a_coordinator_that_is_killed(
    browser: Tab, stage: Stage
) -> None:
    async def answers() -> bool:
        try:
            return bool((await stage.json()).get("cells"))
        except aiohttp.ClientError:
            return False

    await eventually(answers, timeout_s=60)
    await browser.open(stage.url)
    alive = "[...document.querySelectorAll('.shard[data-alive=true]')].map(b => b.dataset.shard).join()"
    await browser.until(f"{alive} === 'exporter-1,exporter-2,exporter-3'")
    await browser.until("document.querySelectorAll('#map .cell.fresh').length === 6", timeout_s=30)

    async def lands() -> bool:
        # What is young is fresh even before anything has landed.
        return bool((await stage.json())["numbers"]["points_per_s"])

    await eventually(lands)

    # The data's shape, held against the parts that it is of.
    found: dict[str, Any] = {}

    async def is_as_the_shards_are() -> bool:
        # A slot that moves now (the first weights are known) is in one of the two before it is in the other.
        nonlocal found
        found, shards = await stage.json(), await stage.json("shards")
        owned = {s["shard"]: s["slots"] for s in shards["shards"]}
        whole = sorted(slot for slots in owned.values() for slot in slots) == list(range(12))
        return whole and {s["shard"]: s["slots"] for s in found["shards"]} == owned

    await eventually(is_as_the_shards_are)
    connection = await asyncpg.connect(stage.dsn)
    try:
        targets = [
            r["target"] for r in await connection.fetch("SELECT DISTINCT target FROM windows ORDER BY 1")
        ]
    finally:
        await connection.close()
    assert [c["unit"] for c in found["cells"]] == targets
    assert all(c["fresh_ms"] and c["alias"].startswith("<b>") for c in found["cells"])
    assert [(p["name"], p["failing_since_ms"]) for p in found["parts"]] == [
        ("Kafka", None), ("PostgreSQL", None), ("budgets", None),
    ]  # fmt: skip
    assert found["numbers"]["dead"] == 0
    assert set(found["history"]) >= {"at_ms", "fresh_p99_s", "lag", "points_per_s", "gaps", "usd"}

    lost = next(s["slots"] for s in found["shards"] if s["shard"] == "exporter-2")
    stage.processes["exporter-2"].kill()
    began_s = time.monotonic()
    await browser.until("document.querySelector('.shard[data-shard=exporter-2][data-alive=false]') !== null", timeout_s=30)  # fmt: skip
    shown_s = time.monotonic() - began_s
    await browser.until("document.querySelector('#moves').innerText.includes('exporter-2')")
    await browser.until(f"{CELLS} === 6 && {alive} === 'exporter-1,exporter-3'")
    assert "gone: seen last" in await browser.text(".shard[data-shard=exporter-2]")
    said = await browser.text("#verdict") + await browser.text("#findings")
    assert re.search(
        rf"The shard exporter-2 is gone since \S+Z; its {len(lost)} slots moved to exporter-", said
    )
    print(f"the kill showed after {shown_s:.1f} s")
    assert shown_s < 20  # a session of 6 s, a look of 1 s, a page each 3 s, a fetch each 5 s

    assert (browser.complaints, asked_only_here(browser, stage.url)) == ([], True)
    stage.processes["coordinator"].kill()
    await browser.until("!document.querySelector('#stale').hidden", timeout_s=25)
    banner = await browser.text("#stale")
    assert re.match(
        r"The coordinator has not answered for \d+ s; what you see is of \d\d:\d\d:\d\dZ\.", banner
    )
    assert await browser.run(CELLS) == 6
    assert (await browser.run("document.title")).startswith("?")
