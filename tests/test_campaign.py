"""The fault campaign itself: its schedule, what it covers, its table, and a short run of it on a whole system."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from ingest.model import Series, SeriesKey
from ingest.sources.columns import SeriesTable
from ingest.sources.metric_data import QUERIES_PER_CALL_MAX, Call
from tests.faults.campaign import Play, again_options, all_kinds, arguments, main
from tests.faults.checks import Noted, Verdict, memory_complaints, noted
from tests.faults.field import open_field
from tests.faults.kinds import Kind
from tests.faults.schedule import HEALING_S, MIX_MAX, MIX_S, STRIKE_S, Planned, Schedule, schedule
from tests.faults.setting import merged
from tests.faults.table import BEGIN, END, Run, Strike, quantile, replaced, table
from tests.faults.worker import QUERIES_MAX, Points

ROWS = (
    "exporter killed before/after S3 PUT, Kafka ack, receipt, commit",
    "exporter paused past its session, then resumed",
    "same shard identity twice",
    "two coordinators",
    "coordinator down for an hour of windows",
    "consumer killed between the database commit and the Kafka commit",
    "zombie consumer resumes mid-batch",
    "broker killed / paused, one then all",
    "network loss, reset, one-way cut",
    "slow sink, half-open connection",
    "PostgreSQL restarted, deadlock, blackhole during COPY",
    "disk full under broker or PostgreSQL",
    "throttle storm, 5xx, resets, slow answers",
    "PartialData, InternalError, Forbidden, an Id missing",
    "NextToken repeated or looping, duplicated timestamps, shuffled Ids",
    "truncated or malformed answer",
    "late and revised points; a new series after discovery",
    "Complete and empty",
    "clock an hour off, stepping back",
    "hostile Avro, a bomb",
    "a million labels or series",
    "credentials expire or are denied mid-window",
    "S3 409, 412, 503, truncated GET",
    "retention passed the committed offset",
    "Kafka replay ∥ S3 replay ∥ live",
    "rolling restart; scale 1 → 4 → 2 → 3 repeatedly",
)
"""The list of faults, row by row."""

KINDS = all_kinds()
SEEDS = range(1, 31)


# --- what is covered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_each_row_of_the_list_of_faults_has_a_kind(row: str) -> None:
    assert [kind.name for kind in KINDS if row.startswith(kind.row)]


def test_each_kind_is_of_a_row() -> None:
    assert [k.name for k in KINDS if not any(row.startswith(k.row) for row in ROWS)] == []


def test_thirty_seeds_strike_with_every_kind() -> None:
    struck = {planned.kind.name for seed in SEEDS for planned in schedule(seed, 3, KINDS).strikes}
    assert struck == {kind.name for kind in KINDS}


# --- the schedule -------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_schedule_again_and_another_gives_another() -> None:
    assert schedule(7, 3, KINDS) == schedule(7, 3, KINDS)
    assert schedule(7, 3, KINDS).lines() != schedule(8, 3, KINDS).lines()


@pytest.mark.parametrize("seed", SEEDS)
def test_kinds_with_a_common_need_never_overlap(seed: int) -> None:
    planned = schedule(seed, 5, KINDS)
    for half in (planned.first, planned.second):
        overlapping = [
            (a.kind.name, b.kind.name)
            for a, b in combinations(half, 2)
            if a.kind.needs & b.kind.needs and b.at_s < a.at_s + a.lasts_s + HEALING_S
        ]
        assert overlapping == []


@pytest.mark.parametrize("seed", SEEDS)
def test_every_strike_ends_within_its_half_and_the_mix_rotates(seed: int) -> None:
    planned = schedule(seed, 5, KINDS)
    for half in (planned.first, planned.second):
        assert all(p.at_s % STRIKE_S == 0 and p.at_s + p.lasts_s <= planned.half_s for p in half)
        mixes = {p.at_s // MIX_S: set[str]() for p in half}
        for p in half:
            mixes[p.at_s // MIX_S].add(p.kind.name)
        assert all(1 <= len(mix) <= MIX_MAX for mix in mixes.values())


def test_there_are_mixes_without_a_fault_and_moments_with_several() -> None:
    rests, several = 0, 0
    for seed in SEEDS:
        planned = schedule(seed, 5, KINDS)
        at = [p.at_s for p in planned.first]
        rests += int(planned.half_s // MIX_S) - len({s // MIX_S for s in at})
        several += len(at) - len(set(at))
    assert rests > 0
    assert several > 0


def test_what_strikes_alone_strikes_once_and_seeds_take_turns() -> None:
    alone = [kind for kind in KINDS if kind.alone]
    struck = [planned.kind for seed in range(len(alone)) if (planned := schedule(seed, 2, KINDS).alone)]
    assert sorted(k.name for k in struck) == sorted(k.name for k in alone)
    assert not any(p.kind.alone for seed in SEEDS for p in schedule(seed, 2, KINDS).first)


def test_without_kinds_nothing_strikes() -> None:
    assert schedule(1, 5, ()).strikes == ()


# --- its words ----------------------------------------------------------------------------------------------------


def run_of(seed: int, kinds: tuple[Kind, ...] = KINDS) -> Run:
    strikes = [
        Strike(kind.name, "exporter-1", 1.0, 2.0, i % 5 == 0, float(i)) for i, kind in enumerate(kinds)
    ]
    return Run(
        seed,
        2.0,
        180.0,
        strikes,
        Verdict(windows=200, points=9000, billed=7000, paid_twice=70, may_twice=90, drain_s=30.5),
    )


def test_the_table_says_what_was_lost_and_fits_a_terminal() -> None:
    run = run_of(1)
    run.verdict.lost, run.verdict.complaints = 3, ["I1 finally: 3 lost"]
    text = table([run, run_of(2)], "2 cores, 24 GiB")
    assert "| seeds | 2, of which 1 broke an invariant |" in text
    assert "| lost | 3 |" in text
    assert "| paid twice | 140 of 14,000 metrics; 180 could be |" in text
    assert [line for line in text.splitlines() if len(line) > 110] == []


def test_the_table_takes_the_place_of_the_last_one() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(document, "| new |\n") == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
    with pytest.raises(ValueError, match="the document has no"):
        replaced("no markers", "")


def test_runs_of_several_processes_make_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps([asdict(run_of(seed))]))
    code = main(["--seeds", "0", *(part for file in files for part in ("--also", str(file)))])
    assert "| seeds | 2 |" in capsys.readouterr().out
    assert code == 0


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([4.0], 0.5)) == (51.0, 100.0, 4.0)


def test_a_run_says_how_to_have_it_again() -> None:
    args = arguments().parse_args(
        ["--kind", "consumer killed between the database's commit", "--mutant", "m"]
    )
    assert "ARGS='--kind " in again_options(args)
    assert again_options(arguments().parse_args(["--only", "zombie"])) == ' ONLY="zombie"'


def test_faults_of_the_source_stand_side_by_side() -> None:
    side_by_side = [
        {"throttle_share": 0.2, "only_accounts": ["1"]},
        {"throttle_share": 0.5, "only_accounts": ["2"], "shuffle_ids": True},
    ]
    assert merged(side_by_side) == {"throttle_share": 0.5, "only_accounts": ["1", "2"], "shuffle_ids": True}


def test_a_worker_above_the_charts_limit_is_a_complaint() -> None:
    assert memory_complaints({"consumer-2": 200 << 20, "kafka": 900 << 20}) == []
    assert memory_complaints({"consumer-2": 900 << 20}) != []


# --- what a worker notes of what it asks --------------------------------------------------------------------------


TABLE = SeriesTable(
    tuple(Series(SeriesKey("1" * 12, "eu-west-1", "N", f"m{i}", (), "Sum", 60)) for i in range(4))
)


def request_of(*rows: int, start_s: int = 0, token: str = "") -> dict[str, Any]:
    request = Call(TABLE, 0, 4, start_s, start_s + 60).request(rows)
    return request | {"NextToken": token} if token else request


def test_what_a_run_asks_again_for_itself_is_noted_metric_by_metric(tmp_path: Path) -> None:
    (tmp_path / "exporter-1").mkdir()
    points = Points(tmp_path / "exporter-1")
    points.asked("a", request_of(0, 1, 2, 3))
    points.asked("a", request_of(0, 1, start_s=60))
    points.asked("a", request_of(0, 1, 2, 3, token="page 2"))
    points.asked("b", request_of(0, 1))
    assert noted(tmp_path) == Noted()
    points.asked("a", request_of(1, 3))
    points.asked("a", request_of(1))
    assert noted(tmp_path) == Noted(again=3)
    points.refused("a", request_of(1))
    assert noted(tmp_path) == Noted(again=2)


def test_a_row_of_any_call_is_counted() -> None:
    assert QUERIES_MAX >= QUERIES_PER_CALL_MAX


def test_what_was_asked_again_is_noted_of_runs_that_were_cut_off_and_of_no_others(tmp_path: Path) -> None:
    (tmp_path / "exporter-1").mkdir()
    points = Points(tmp_path / "exporter-1")
    for task_id in ("archived", "ended", "handed back", "killed"):
        points.asked(task_id, request_of(0, 1))
        points.asked(task_id, request_of(1))
    points.told("archived")
    points.ended("archived", 3)
    points.ended("ended", 2)
    points.ended("handed back", None)
    points.asked("raced", request_of(0, 1, 2))
    points.ended("raced", 7, raced=True)
    assert noted(tmp_path) == Noted(unanswered=1 + 3, again=2, raced=7)


# --- a run --------------------------------------------------------------------------------------------------------


async def test_a_short_campaign_breaks_nothing(tmp_path: Path) -> None:
    wanted = ("exporter killed after S3 PUT", "consumer killed between the database's commit and Kafka's")
    strikes = tuple(Planned(i, 0.0, 1.0, kind) for i, kind in enumerate(KINDS) if kind.name in wanted)
    run = Run(5, 0.0)

    async with open_field(tmp_path / "field", run.seed) as field:
        await Play(field, Schedule(1.0, strikes, None, ()), run).all()

    assert run.verdict.complaints == []
    assert {s.kind for s in run.strikes if not s.missed} == set(wanted)
    assert run.verdict.points > 1_000
    assert (run.verdict.lost, run.verdict.wrong, run.verdict.invented) == (0, 0, 0)
