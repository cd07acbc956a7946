"""Shards come and go under load: nothing is lost, nothing is paid twice, and no more moves than must."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pytest

from ingest.errors import Transient
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import migrate
from shard_config.model import Postgres
from tests.scale_scene import play, quantile
from workers.cli import main
from workers.scale import Page, gaps_on, newly_open, owners_in, settled, waiting_for, windows_lost


async def test_1_4_2_16_3_exporters_lose_no_window_and_pay_for_none_twice(
    kafka_bootstrap: str, topic_prefix: str
) -> None:
    result = await play(kafka_bootstrap, topic_prefix)
    assert [(c.before, c.after) for c in result.changes] == [(1, 4), (4, 2), (2, 16), (16, 3)]
    assert result.windows >= 500
    assert result.lost == 0
    assert result.paid_twice <= result.in_flight_at_kills
    for change in result.changes:
        # Slots weigh 7 or 8 targets, so it may be fewer than of equal ones.
        assert 0 < change.moved <= 1.1 * change.least, change
        # A drain's and a session's time, and rebalances: seconds, not minutes.
        assert change.seconds < 30, change
    assert quantile(result.changing_s, 0.99) < 30
    print(
        result.changes,
        quantile(result.steady_s, 0.5),
        quantile(result.changing_s, 0.5),
        quantile(result.changing_s, 0.99),
        result.windows,
        result.paid_twice,
        result.in_flight_at_kills,
    )


# --- headgate scale -------------------------------------------------------------------------------------------


def page_of(
    owners: Sequence[str], alive: Sequence[str], *, settled: bool, assigned: Sequence[str] = ()
) -> Page:
    return {
        "slots": len(owners),
        "settled": settled,
        "shards": [
            {
                "shard": name,
                "alive": name in alive,
                "slots": [i for i, owner in enumerate(owners) if owner == name],
                "assigned": [i for i, owner in enumerate(assigned or owners) if owner == name],
            }
            for name in sorted({*owners, *alive, *assigned})
        ],
    }


def test_what_is_waited_for_is_said() -> None:
    assert waiting_for(page_of("aabb", "ab", settled=True), ["a", "b"]) == ""
    assert waiting_for(page_of("aaaa", "a", settled=True), ["a", "b"]) == "b not there yet"
    assert waiting_for(page_of("aabb", "ab", settled=True), ["a"]) == "b not gone yet"
    astray = page_of("aabb", "ab", settled=False, assigned="abab")
    assert waiting_for(astray, ["a", "b"]) == "2 of 4 slots not owned as assigned"
    resting = page_of("aabb", "ab", settled=False)
    assert waiting_for(resting, ["a", "b"]) == "the group to come to rest"


async def test_the_wait_outlasts_a_coordinator_that_does_not_answer_and_ends_in_time() -> None:
    pages = iter(
        [
            OSError("refused"),
            page_of("aa", "a", settled=False, assigned="ab"),
            page_of("ab", "ab", settled=True),
        ]
    )
    said: list[str] = []

    def look() -> Page:
        match next(pages):
            case OSError() as error:
                raise error
            case page:
                return page

    assert owners_in(await settled(look, ["a", "b"], said.append)) == {0: "a", 1: "b"}
    assert said == ["waiting: the coordinator does not answer: refused", "waiting: b not there yet"]
    with pytest.raises(Transient, match="not settled after 0 s: b not there yet"):
        await settled(lambda: page_of("aa", "a", settled=True), ["a", "b"], said.append, timeout_s=0)


class Coordinator(http.server.BaseHTTPRequestHandler):
    """A page that changes when `helm` has been called."""

    called: ClassVar[Path]

    def do_GET(self) -> None:
        after = self.called.exists()
        page = page_of("abcabc" if after else "ababab", "abc" if after else "ab", settled=True)
        names = {"a": "exporter-1", "b": "exporter-2", "c": "exporter-3"}
        for shard in page["shards"]:
            shard["shard"] = names[shard["shard"]]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(page).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """helm and kubectl as programs that write down how they were called; kubectl forwards to a coordinator here."""
    calls = tmp_path / "calls"
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("C", (Coordinator,), {"called": tmp_path / "helm-called"})
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    forward = f"Forwarding from 127.0.0.1:{server.server_port} -> 9100"
    for name, body in {
        "helm": f'touch "{tmp_path}/helm-called"',
        "kubectl": f'case "$*" in *port-forward*) echo "{forward}"; exec sleep 60;; *) echo deployment.apps/hg-coordinator;; esac',
    }.items():
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> "{calls}"\n{body}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    yield calls
    server.shutdown()
    server.server_close()


def test_a_release_is_upgraded_with_its_values_and_waited_for(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["scale", "3", "--release", "hg", "--namespace", "metrics", "--chart", "chart", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["added"], found["removed"], found["slots"]) == (["exporter-3"], [], 6)
    assert [(m["slot"], m["from"], m["to"]) for m in found["moves"]] == [
        (2, "exporter-1", "exporter-3"),
        (3, "exporter-2", "exporter-1"),
        (4, "exporter-1", "exporter-2"),
        (5, "exporter-2", "exporter-3"),
    ]
    assert cluster.read_text().splitlines() == [
        "kubectl -n metrics get deployment -l app.kubernetes.io/instance=hg,app.kubernetes.io/component=coordinator -o name",
        "kubectl -n metrics port-forward deployment.apps/hg-coordinator :9100",
        "helm upgrade hg chart --namespace metrics --reset-then-reuse-values --set shards=3",
    ]


def test_more_shards_than_slots_are_refused_before_helm_is_called(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", "7", "--release", "hg"]) == 3
    assert "7 shards would share 6 slots" in capsys.readouterr().err
    assert "helm" not in cluster.read_text()


_WINDOW = """INSERT INTO windows (target, service, window_start, window_end, settles_at, planned_at, sealed_at, declared, declared_at)
    VALUES ($1, 'ec2', $2::timestamptz, $2::timestamptz + interval '300 s', $3, $2, $4, $5, $6)"""


async def test_of_a_release_the_windows_lost_are_those_that_the_page_shows_late_and_did_not_before() -> None:
    def page(as_of_ms: int | None, **gaps: int) -> Page:
        parts = [{"name": "Kafka", "as_of_ms": 1}, {"name": "PostgreSQL", "as_of_ms": as_of_ms}]
        return {
            "parts": parts,
            "cells": [{"unit": "quiet"}, *({"unit": u, "gaps": n} for u, n in gaps.items())],
        }

    pages = iter([page(None), page(40, a=9), page(50, a=3, b=1)])
    before = {"quiet": 0, "a": 2, "b": 1, "healed": 5}
    after = await gaps_on(lambda name: next(pages) if name == "page.json" else {}, 50)
    assert after == {"quiet": 0, "a": 3, "b": 1}
    assert newly_open(before, after) == 1
    # A coordinator of before the page, and one that is away: not known, which is not none.
    assert await gaps_on(lambda _: {"slots": 24}, 0) is None
    assert newly_open(None, after) is newly_open(before, None) is None


async def test_windows_lost_are_those_that_passed_their_deadline_or_expired_during_the_change(
    database: str,
) -> None:
    postgres = Postgres(dsn=database)
    await migrate(postgres)
    since = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
    now = since + timedelta(seconds=60)
    # The deadline is the settling time, an interval of 300 s and 120 s of grace later.
    passed, before, later = (since - timedelta(seconds=420) + timedelta(seconds=s) for s in (30, -30, 90))
    rows = {
        "passed": (passed, None, None, None),
        "passed before": (before, None, None, None),
        "in time": (later, None, None, None),
        "sealed": (passed, since, None, None),
        "expired": (later, None, "expired", since + timedelta(seconds=5)),
        "expired before": (before, None, "expired", since - timedelta(seconds=5)),
        "declared otherwise": (passed, None, "abandoned", since + timedelta(seconds=5)),
    }
    connection = await open_connection(postgres, "test")
    try:
        for target, row in rows.items():
            await connection.execute(_WINDOW, target, since - timedelta(hours=1), *row)
    finally:
        await connection.close()
    assert await windows_lost(postgres, since, now) == 2
