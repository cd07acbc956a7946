"""A few seconds of the fuzzer, that the fuzzer sees what it is for, and what it has found, each by itself."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from ingest import assign, letters, wire
from ingest.cur import BadReport, reads
from ingest.errors import HeadgateError, Rejected
from ingest.inventory import csv_file
from ingest.model import BatchId, DeadLetter, RecordPosition
from ingest.sources.exposition import Exposed, endpoint_of, parse
from shard_config.document import ConfigErrors
from shard_config.load import loads
from shard_config.model import ExpositionJob, Limits
from tests.faults import fuzz
from tests.faults.fuzz_surfaces import CUR, INVENTORY, Surface, golden, surfaces
from tests.faults.mutate import Shape, mutated

SECONDS = 4.0


def test_any_bytes_give_declared_errors_in_bounded_time_and_memory() -> None:
    report = fuzz.run(SECONDS, seed=int(os.environ.get("HEADGATE_SEED", "1")))
    print("\n".join(fuzz.lines_of(report)))
    assert report.findings == []
    assert len(report.tallies) == 14
    assert all(tally.executions and tally.outcomes for tally in report.tallies.values())


def test_the_examples_are_read_and_the_same_seed_spoils_them_the_same(tmp_path: Path) -> None:
    for surface in surfaces(tmp_path):
        outcomes = [fuzz.tried(surface, seed) for seed in surface.seeds]
        assert [o.broke for o in outcomes] == [""] * len(outcomes), surface.name
        assert any(o.accepted for o in outcomes), surface.name
        once, again = (
            [mutated(rng, surface.shape, surface.seeds, surface.words) for _ in range(20)]
            for rng in (random.Random(3), random.Random(3))
        )
        assert once == again
        assert len({*once, *surface.seeds}) > 10


# --- the fuzzer itself --------------------------------------------------------------------------------------------


def of(read: object, **more: object) -> Surface:
    return Surface("x", Shape.TEXT, (b"a",), read, (ValueError,), (b"b",), **more)  # type: ignore[arg-type]


def test_an_error_that_is_not_declared_is_a_finding_and_one_that_is_declared_is_an_outcome() -> None:
    def fails(raw: bytes) -> str:
        raise {b"k": KeyError, b"v": ValueError}[raw](f"at {raw!r}")

    assert fuzz.tried(of(fails), b"k").broke.startswith("KeyError at test_fuzz.py:")
    declared = fuzz.tried(of(fails), b"v")
    assert (declared.broke, declared.accepted) == ("", False)
    assert declared.word.startswith("ValueError")


def test_time_and_memory_above_a_readers_caps_are_findings() -> None:
    def spins(_: bytes) -> str:
        until_s = time.process_time() + 0.05
        while time.process_time() < until_s:
            pass
        return "late"

    def hoards(_: bytes) -> str:
        return str(len(bytearray(b"x") * (64 << 20)))

    assert "s of CPU" in fuzz.tried(of(spins, cpu_s_max=0.02), b"a").broke
    assert "MB" in fuzz.tried(of(hoards, memory_bytes_max=8 << 20), b"a").broke


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), 11)", "the process died of SIGSEGV"),
        ("exec('while True: pass')", "no end within"),
        ("b'a' * (3 << 30)", "MemoryError"),
    ],
)
def test_a_crash_a_loop_without_end_and_memory_without_bound_are_findings_with_their_bytes(
    end: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def planted(home):\n"
        "    from tests.faults import fuzz_surfaces as f\n"
        "    def read(raw):\n"
        f"        {end}\n"
        "        return 'read'\n"
        "    return (f.Surface('planted', f.Shape.TEXT, (b'the bytes',), read, (), (b'b',), 0.05),)\n"
        "class Planting:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'tests.faults.fuzz':\n"
        "            sys.meta_path.remove(self)\n"
        "            from tests.faults import fuzz_surfaces\n"
        "            fuzz_surfaces.surfaces = planted\n"
        "sys.meta_path.insert(0, Planting())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(fuzz, "CRASHES_MAX", 1)
    monkeypatch.setattr(fuzz, "FOLDER", fuzz.FOLDER / "planted")
    report = fuzz.run(2.0, seed=1, only="planted")
    assert report.findings
    assert said in report.findings[0].what
    assert (fuzz.ROOT / report.findings[0].file).read_bytes() == b"the bytes"


# --- what it has found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "context", [b"{", b"[1]", b'"text"', b"{}", b'{"labels": "x"}', b'{"labels": {"account": 1}}']
)
def test_a_letter_whose_labels_are_not_ours_is_listed_all_the_same(context: bytes) -> None:
    letter = DeadLetter(
        "labels_differ", "", RecordPosition("raw", 0, 1), BatchId(b"0" * 16), "s", b"{}", "c", b"", context
    )
    assert letters.account_of(wire.decode_dead_letter(wire.encode_dead_letter(letter))) == ""


@pytest.mark.parametrize("target", [1, None, ["a"], "a/b", "a/b/c/d"])
def test_a_letter_whose_target_is_none_is_refused_by_a_replay(target: object) -> None:
    context = {
        "task_id": "0" * 32, "target": target, "service": "ec2", "observed_at_ms": 1, "revision": 0, "grid_s": 300,
        "labels": dict.fromkeys(("account", "region", "namespace", "metric", "stat", "unit"), "x")
        | {"dimensions": [], "period_s": 60},
    }  # fmt: skip
    payload = b'{"timestamp_s": 1, "value": "1.0"}'
    letter = DeadLetter(
        "future",
        "",
        RecordPosition("raw", 0, 1),
        BatchId(b"0" * 16),
        "s",
        payload,
        "c",
        b"",
        orjson.dumps(context),
    )
    with pytest.raises(Rejected, match="not ours"):
        letters.points_of(letter)


@pytest.mark.parametrize("weight", [-1.0, 1e-299, 1e308, float("inf"), float("nan")])
def test_an_assignment_with_a_weight_that_cannot_be_planned_with_is_refused(weight: float) -> None:
    sound = assign.decode_assignment(golden("assignment.v2"))
    spoilt = replace(sound, weights=(weight, *sound.weights[1:]))
    with pytest.raises(Rejected, match="a weight is none"):
        assign.decode_assignment(assign.encode_assignment(spoilt))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_an_assignment_with_a_share_that_no_limiter_can_keep_is_refused(share: float) -> None:
    sound = assign.decode_assignment(golden("assignment.v2"))
    spoilt = replace(sound, shares={"123456789012/eu-west-1": {"exporter-1": share}})
    with pytest.raises(Rejected, match="a share is not in"):
        assign.decode_assignment(assign.encode_assignment(spoilt))


@pytest.mark.parametrize("slot", ["9" * 5_000, "٣", "-1", ""])
def test_an_assignment_whose_company_is_not_by_slot_is_refused(slot: str) -> None:
    value = assign.encode_assignment(
        replace(assign.decode_assignment(golden("assignment.v2")), together={slot: "q"})  # type: ignore[dict-item]
    )
    with pytest.raises(Rejected, match="together is not by slot"):
        assign.decode_assignment(value)


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_time_that_utc_has_no_year_for_is_said_by_line(time: str) -> None:
    with pytest.raises(HeadgateError, match="line 2: state_since"):
        csv_file.read(INVENTORY[0].decode().replace("2026-11-24T05:00:00Z", time), 0)
    with pytest.raises(BadReport, match="report:2"):
        reads(CUR[0].decode().replace("2026-11-24T05:00:00Z", time).splitlines(keepends=True))


def test_an_endpoint_with_a_timestamp_beyond_any_float_is_refused() -> None:
    body = f"a 1 {'9' * 400}\n"
    job = ExpositionJob(
        name="node", account="123456789012", region="eu-west-1", endpoints=("http://127.0.0.1:9100/metrics",)
    )
    with pytest.raises(Rejected, match="bad_exposition"):
        parse(body, False, job, endpoint_of("http://127.0.0.1:9100/metrics"), 0, 0, Exposed(), Limits())


@pytest.mark.parametrize("account", ["١٢٣٤٥٦٧٨٩٠١٢", "12345678901²", "0123456789012"])
def test_an_account_is_twelve_digits_that_fit_a_key(account: str) -> None:
    with pytest.raises(ConfigErrors, match="an account id is 12 digits"):
        loads(f'accounts:\n  - {{id: "{account}", regions: [eu-west-1], services: [ec2]}}\n', "x", {})
    text = INVENTORY[1].decode().replace("123456789012", account)
    with pytest.raises(HeadgateError, match="is no account"):
        csv_file.read(text, 0)
