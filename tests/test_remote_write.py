"""Remote write into real Prometheus servers, and into a scripted receiver for what a real one does not do on demand."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import cramjam
import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ingest.clock import SystemClock
from ingest.errors import Rejected, Transient
from ingest.ports import LabelSet, Receiving, SeriesSamples, Written
from ingest.sinks import remote_write
from ingest.sinks.prompb import (
    WriteRequest,
    encoded_labels,
    encoded_request,
    encoded_samples,
)
from ingest.sinks.remote_answers import Refusal, retry_after_s
from ingest.sinks.remote_requests import REQUEST_BYTES_MAX, Piece, chains_of, samples_in
from ingest.sinks.remote_write import RemoteWrite
from shard_config.remote_write import Receiver
from tests.prometheus_server import PrometheusServer, needs_prometheus
from tests.written_labels import decoded_labels

NOW_S = int(time.time()) // 60 * 60
M = 60
"""A minute, in seconds."""


def labels_of(name: str, **labels: str) -> LabelSet:
    return tuple(sorted({"__name__": name, **labels}.items()))


def some(labels: LabelSet | str, *samples: tuple[float, float]) -> SeriesSamples:
    """A series with samples of (minutes from now, value)."""
    named = labels_of(labels) if isinstance(labels, str) else labels
    times = np.array([(NOW_S + round(minutes * M)) * 1000 for minutes, _ in samples], np.int64)
    return SeriesSamples(encoded_labels(named), times, np.array([value for _, value in samples], np.float64))


def outcome(written: Written) -> tuple[int, list[tuple[int, str, list[int]]]]:
    """How many were taken, and the refused as (series, reason, minutes from now)."""
    return written.samples, [
        (one.series, one.reason, [int(t // 1000 - NOW_S) // M for t in one.timestamps_ms])
        for one in written.refused
    ]


@asynccontextmanager
async def writer(url: str, **options: Any) -> AsyncIterator[RemoteWrite]:
    fields = {key: options.pop(key) for key in list(options) if key in Receiver.model_fields}
    receiver = Receiver.model_validate({"name": "prometheus-1", "url": url, **fields})
    one: Receiving = RemoteWrite(receiver, SystemClock(), **options)
    assert isinstance(one, RemoteWrite)
    try:
        yield one
    finally:
        await one.close()


@contextmanager
def running(server: PrometheusServer) -> Iterator[PrometheusServer]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A Prometheus without an out-of-order window."""
    with running(PrometheusServer(tmp_path_factory.mktemp("strict"))) as server:
        yield server


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A Prometheus with an out-of-order window of two hours."""
    with running(PrometheusServer(tmp_path_factory.mktemp("lenient"), out_of_order_window="2h")) as server:
        yield server


def stored(server: PrometheusServer, selector: str) -> dict[str, dict[int, float]]:
    """What PromQL returns: by metric name, minutes from now → value."""
    found = server.samples(selector, NOW_S - 40 * 86_400, NOW_S + 3_600)
    return {
        dict(labels)["__name__"]: {(t - NOW_S) // M: value for t, value in samples.items()}
        for labels, samples in found.items()
    }


@needs_prometheus
async def test_what_is_written_is_what_promql_returns(strict: PrometheusServer) -> None:
    series = [
        some(
            labels_of("whole", instance=f"i-{n}", text='ünï \U0001f600 "\\\n'),
            *((m, n + m / 8) for m in range(-5, 0)),
        )
        for n in range(50)
    ]
    async with writer(strict.write_url) as one:
        assert outcome(await one.write(series)) == (250, [])
    found = strict.samples("whole", NOW_S - 600, NOW_S)
    assert found == {
        decoded_labels(one.labels): dict(
            zip((one.timestamps_ms // 1000).tolist(), one.values.tolist(), strict=True)
        )
        for one in series
    }


# --- real servers -------------------------------------------------------------------------------------------------


@needs_prometheus
async def test_a_sample_out_of_order_is_refused_and_the_others_are_taken(strict: PrometheusServer) -> None:
    async with writer(strict.write_url) as one:
        await one.write([some("late_b", (-4, 1))])
        written = await one.write(
            [some("late_a", (-5, 1), (-4, 2)), some("late_b", (-6, 9), (-3, 3)), some("late_c", (-5, 4))]
        )
    assert outcome(written) == (4, [(1, Refusal.OUT_OF_ORDER, [-6])])
    assert stored(strict, '{__name__=~"late_.*"}') == {
        "late_a": {-5: 1, -4: 2},
        "late_b": {-4: 1, -3: 3},
        "late_c": {-5: 4},
    }


@needs_prometheus
@pytest.mark.parametrize("server", ["strict", "lenient"])
async def test_another_value_for_the_newest_time_is_refused_and_the_first_stays(
    server: str, request: pytest.FixtureRequest
) -> None:
    prometheus = request.getfixturevalue(server)
    async with writer(prometheus.write_url, out_of_order_window_s=7_200 * (server == "lenient")) as one:
        await one.write([some("twice_a", (-4, 1))])
        written = await one.write([some("twice_a", (-4, 2), (-3, 3)), some("twice_b", (-4, 4))])
    assert outcome(written) == (2, [(0, Refusal.DUPLICATE, [-4])])
    assert stored(prometheus, '{__name__=~"twice_.*"}') == {"twice_a": {-4: 1, -3: 3}, "twice_b": {-4: 4}}


@needs_prometheus
@pytest.mark.parametrize("server", ["strict", "lenient"])
async def test_a_sample_that_is_too_old_is_refused_whatever_the_status(
    server: str, request: pytest.FixtureRequest
) -> None:
    """Prometheus 2.42 with an out-of-order window says 500 of it, which else means: try again."""
    prometheus = request.getfixturevalue(server)
    async with writer(prometheus.write_url, out_of_order_window_s=7_200 * (server == "lenient")) as one:
        await one.write([some("present", (-1, 1))])
        written = await one.write(
            [
                some("old_a", (-400, 1), (-300, 2), (-3, 3)),
                some("old_b", (-3, 4)),
                some("old_c", (-40_000, 5)),
            ]
        )
    assert outcome(written) == (2, [(0, Refusal.TOO_OLD, [-400, -300]), (2, Refusal.TOO_OLD, [-40_000])])
    assert stored(prometheus, '{__name__=~"old_.*"}') == {"old_a": {-3: 3}, "old_b": {-3: 4}}


@needs_prometheus
async def test_a_late_sample_is_taken_within_the_window_and_its_first_value_stays(
    lenient: PrometheusServer,
) -> None:
    async with writer(lenient.write_url, out_of_order_window_s=7_200) as one:
        assert outcome(await one.write([some("window", (-3, 1))])) == (1, [])
        assert outcome(await one.write([some("window", (-9, 2), (-8, 3), (-2, 4))])) == (3, [])
        assert outcome(await one.write([some("window", (-9, 5), (-8, 6))])) == (2, [])
    assert stored(lenient, "window") == {"window": {-9: 2, -8: 3, -3: 1, -2: 4}}


@needs_prometheus
async def test_a_sample_too_far_ahead_is_refused_by_prometheus_3_and_taken_by_2(
    strict: PrometheusServer,
) -> None:
    async with writer(strict.write_url) as one:
        written = await one.write([some("ahead_a", (20, 1)), some("ahead_b", (-1, 2))])
    if strict.api("status/buildinfo")["version"].startswith("2."):
        assert outcome(written) == (2, [])
    else:
        assert outcome(written) == (1, [(0, Refusal.TOO_FAR_AHEAD, [20])])
        assert stored(strict, '{__name__=~"ahead_.*"}') == {"ahead_b": {-1: 2}}


BAD_LABELS: dict[str, LabelSet] = {
    "no labels": (),
    "no name": (("job", "x"),),
    "a dash in a label's name": (("__name__", "bad"), ("a-b", "x")),
    "a label's name with a line's end": (("__name__", "bad"), ("a\n", "x")),
    "an empty label's name": (("", "x"), ("__name__", "bad")),
    "a dash in the metric's name": (("__name__", "bad-name"),),
    "a metric's name with a line's end": (("__name__", "bad\n"),),
    "an empty metric's name": (("__name__", ""),),
    "an empty value": (("__name__", "bad"), ("a", "")),
    "half of a surrogate pair": (("__name__", "bad"), ("a", "\ud800")),
    "a name twice": (("__name__", "bad"), ("a", "1"), ("a", "2")),
    "unsorted names": (("__name__", "bad"), ("b", "1"), ("a", "2")),
    "a long value": (("__name__", "bad"), ("a", "ü" * 9_000)),
    "a long name": (("__name__", "bad"), ("a" * 1_025, "1")),
    "too many labels": (("__name__", "bad"), *((f"l{n:03d}", "1") for n in range(256))),
}


@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_a_receiver_would_drop_or_spoil_are_not_encoded(labels: LabelSet) -> None:
    with pytest.raises(Rejected) as raised:
        encoded_labels(labels)
    assert raised.value.reason == Refusal.INVALID_LABELS
    said = str(raised.value)
    assert len(said) <= 240
    assert said.isprintable()


@needs_prometheus
async def test_the_longest_labels_that_are_encoded_are_taken(strict: PrometheusServer) -> None:
    good = labels_of("ns:good", _a1="ü" * 8_192, **{"a" * 1_024: "1"})
    assert decoded_labels(encoded_labels(good)) == good
    async with writer(strict.write_url) as one:
        assert outcome(await one.write([some(good, (-2, 1), (-1, 2))])) == (2, [])
    assert stored(strict, '{__name__="ns:good"}') == {"ns:good": {-2: 1, -1: 2}}


@needs_prometheus
async def test_answers_that_are_lost_change_nothing_even_without_a_window(strict: PrometheusServer) -> None:
    series = [some(labels_of("lost", n=str(n)), *((m, n + m) for m in range(-6, 0))) for n in range(20)]
    forwarded = 0

    async def forward(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        nonlocal forwarded
        forwarded += 1
        mine = forwarded
        async with (
            aiohttp.ClientSession() as session,
            session.post(strict.write_url, data=await request.read(), headers=request.headers) as answer,
        ):
            status, said = answer.status, await answer.text()
        if mine % 3:
            return web.Response(status=status, text=said)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with scripted(forward) as (url, _), writer(url, samples_per_request=8) as one:
        written, failures = await retried(one, series)
    assert failures >= 3
    assert outcome(written) == (120, [])
    found = strict.samples("lost", NOW_S - 600, NOW_S)
    assert found == {
        decoded_labels(one.labels): dict(
            zip((one.timestamps_ms // 1000).tolist(), one.values.tolist(), strict=True)
        )
        for one in series
    }


# --- a scripted receiver --------------------------------------------------------------------------------------------

Row = tuple[str, int, float]
"""A sample that came: metric name, minutes from now, value."""
Answering = Callable[[web.Request, list[Row]], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def scripted(
    answer: Answering, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, list[list[Row]]]]:
    """A receiver that answers as it is told: its URL, and the samples of each request that came."""
    came: list[list[Row]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        rows = decoded(await request.read())
        came.append(rows)
        return await answer(request, rows)

    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/write", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}/write", came
    finally:
        await runner.cleanup()


def decoded(body: bytes) -> list[Row]:
    request = WriteRequest.FromString(bytes(cramjam.snappy.decompress_raw(body)))
    return [
        (series.labels[0].value, (sample.timestamp // 1000 - NOW_S) // M, sample.value)
        for series in request.timeseries
        for sample in series.samples
    ]


def saying(status: int, body: str | bytes = b"", **headers: str) -> Answering:
    """Always this answer."""

    async def answer(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        raw = body.encode() if isinstance(body, str) else body
        return web.Response(
            status=status, body=raw, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    return answer


def refusing(bad: Callable[[Row], bool], status: int = 400, said: str = "out of order sample") -> Answering:
    """204, but for requests with a bad sample."""

    async def answer(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        return web.Response(status=status, text=said) if any(map(bad, rows)) else web.Response(status=204)

    return answer


async def retried(one: RemoteWrite, series: Sequence[SeriesSamples]) -> tuple[Written, int]:
    """What a write has come to, and how often it failed before."""
    for failures in range(100):
        try:
            return await one.write(series), failures
        except Transient:
            continue
    raise AssertionError("a hundred failures")


async def failure_of(one: RemoteWrite, series: Sequence[SeriesSamples] | None = None) -> Transient:
    with pytest.raises(Transient) as caught:
        await one.write(series or [some("a", (-1, 1))])
    return caught.value


@pytest.mark.parametrize("window_s", [0, 7_200])
@pytest.mark.parametrize("seed", range(6))
async def test_exactly_the_bad_samples_are_refused_wherever_they_are(window_s: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    series = [
        some(
            f"m{n}",
            *(
                (m, random.choice([-1, 1], p=[share, 1 - share]))
                for m in range(-int(random.integers(0, 9)), 0)
            ),
        )
        for share in (random.choice([0.01, 0.3, 1.0]),)
        for n in range(40)
    ]
    bad = [
        (
            n,
            Refusal.OUT_OF_ORDER,
            [m for m, v in zip(range(-len(one.values), 0), one.values, strict=True) if v < 0],
        )
        for n, one in enumerate(series)
        if (one.values < 0).any()
    ]
    taken: list[Row] = []

    async def answer(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        if any(value < 0 for _, _, value in rows):
            return web.Response(status=400, text="out of order sample")
        taken.extend(rows)
        return web.Response(status=204)

    async with (
        scripted(answer) as (url, came),
        writer(url, out_of_order_window_s=window_s, samples_per_request=30) as one,
    ):
        written = await one.write(series)
    total = sum(len(one.values) for one in series)
    assert outcome(written) == (total - sum(len(minutes) for _, _, minutes in bad), bad)
    assert len(taken) == len(set(taken)) == written.samples
    assert len(came) <= 2 * total + 10
    assert max(map(len, came)) <= 30
    for sent in series:
        name = decoded_labels(sent.labels)[0][1]
        minutes = [minute for metric, minute, _ in taken if metric == name]
        assert minutes == sorted(minutes), "a series' samples came out of order"


async def test_a_receiver_that_keeps_the_good_samples_of_a_409_is_asked_which_are_bad() -> None:
    kept: set[Row] = set()

    async def thanos(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        good = {row for row in rows if row[2] >= 0}
        kept.update(good)
        text = "store locally for endpoint: add 1 samples: out of order sample"
        return web.Response(status=409, text=text) if len(good) < len(rows) else web.Response()

    async with scripted(thanos) as (url, _), writer(url, out_of_order_window_s=60) as one:
        written = await one.write([some(f"m{n}", (-2, n), (-1, -1 if n == 7 else n)) for n in range(20)])
    assert outcome(written) == (39, [(7, Refusal.OUT_OF_ORDER, [-1])])
    assert len(kept) == 39


async def test_a_request_that_is_too_large_becomes_smaller_ones_and_so_do_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_write, "SAMPLES_PER_REQUEST_MIN", 2)

    async def answer(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        return web.Response(status=413 if len(rows) > 5 else 204)

    async with scripted(answer) as (url, came), writer(url, out_of_order_window_s=60) as one:
        first = await one.write([some(f"m{n}", *((m, 1) for m in range(-9, 0))) for n in range(4)])
        refusals = sum(len(rows) > 5 for rows in came)
        second = await one.write([some(f"m{n}", *((m, 1) for m in range(-9, 0))) for n in range(4)])
    assert [outcome(first), outcome(second)] == [(36, []), (36, [])]
    assert refusals > 0
    assert sum(len(rows) > 5 for rows in came) == refusals


async def test_one_sample_that_is_too_large_is_refused_as_a_limit() -> None:
    async with scripted(refusing(lambda row: row[0] == "big", 413, "")) as (url, _), writer(url) as one:
        written = await one.write([some("big", (-1, 1)), some("small", (-1, 1))])
    assert outcome(written) == (1, [(0, Refusal.LIMIT, [-1])])


async def test_what_is_not_known_at_the_bound_is_refused_as_unresolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_write, "NARROWING_REQUESTS_MAX", 6)
    async with scripted(refusing(lambda row: row[0] == "m5")) as (url, came), writer(url) as one:
        written = await one.write([some(f"m{n}", (-1, 1)) for n in range(32)])
    assert outcome(written) == (28, [(n, Refusal.UNRESOLVED, [-1]) for n in range(4, 8)])
    assert len(came) == 7


@pytest.mark.parametrize(
    ("status", "retry_after", "wait_s"),
    [
        (429, "7", 7),
        (503, "7", 7),
        (429, "", 1),
        (503, "soon", 1),
        (503, "-5", 1),
        (503, "nan", 1),
        (503, "1e9", 300),
        (500, "", 1),
        (502, "", 1),
        (504, "", 1),
        (408, "", 1),
    ],
)
async def test_a_receiver_that_is_not_able_now_is_tried_again_when_it_says(
    status: int, retry_after: str, wait_s: float
) -> None:
    async with (
        scripted(saying(status, "not now", Retry_After=retry_after)) as (url, came),
        writer(url) as one,
    ):
        failure = await failure_of(one)
    assert failure.retry_after_s == wait_s
    assert f"HTTP {status}: not now" in str(failure)
    assert len(came) == 1


def test_a_date_to_come_back_at_is_understood() -> None:
    assert retry_after_s("Tue, 24 Nov 2026 12:00:30 GMT", 1_795_521_600) == 30
    assert retry_after_s("Tue, 24 Nov 2026 12:00:30 GMT", 1_795_531_600) == 1


@pytest.mark.parametrize(
    ("status", "key"),
    [
        (401, "bearer_token"),
        (403, "credentials and headers"),
        (404, "url"),
        (405, "url"),
        (410, "url"),
        (415, "url"),
        (301, "url"),
        (307, "url"),
    ],
)
async def test_a_receiver_that_refuses_us_is_no_refusal_of_samples_and_says_which_key_to_look_at(
    status: int, key: str
) -> None:
    async with (
        scripted(saying(status, "no", Location="/elsewhere?key=hidden")) as (url, came),
        writer(url) as one,
    ):
        failure = await failure_of(one)
    assert key in failure.remedy
    assert "remote_write.receivers[prometheus-1]" in failure.remedy
    assert failure.retry_after_s == 15
    assert len(came) == 1
    assert ("/elsewhere" in failure.what) == (status < 400)
    assert "hidden" not in str(failure)


async def test_a_400_in_words_that_nobody_knows_is_about_samples_where_a_request_without_any_is_taken() -> (
    None
):
    async with scripted(refusing(lambda row: row[0] == "m3", 400, "nope")) as (url, came), writer(url) as one:
        written = await one.write([some(f"m{n}", (-1, 1)) for n in range(8)])
    assert outcome(written) == (7, [(3, Refusal.REFUSED, [-1])])
    assert came.count([]) == 1


@pytest.mark.parametrize(
    "text", ["The plain HTTP request was sent to HTTPS port", "Request Header Or Cookie Too Large"]
)
async def test_a_400_to_everything_is_about_the_url(text: str) -> None:
    async with scripted(saying(400, text)) as (url, came), writer(url) as one:
        failure = await failure_of(one)
    assert "look at url" in failure.remedy
    assert text in failure.what
    assert len(came) == 2


async def test_a_slow_receiver_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_write, "REQUEST_TIMEOUT_S", 0.1)

    async def slow(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return web.Response(status=204)

    took: list[float] = []
    async with scripted(slow) as (url, _), writer(url, observe_s=took.append) as one:
        assert (await failure_of(one)).what == "no answer in time"
    assert len(took) == 1
    assert 0.05 < took[0] < 0.5


async def test_an_answer_that_never_ends_is_not_read_to_its_end() -> None:
    async def endless(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        response = web.StreamResponse(status=500)
        await response.prepare(request)
        for _ in range(1_000):
            await response.write(b"x" * 100_000)
        return response

    async with scripted(endless) as (url, _), writer(url) as one:
        assert len((await failure_of(one)).what) < 250


@pytest.mark.parametrize(
    "body", [bytes(range(256)) * 30, "\x1b[31mred\x1b[0m\r\nX-Forged: 1", b"\xff\xfe" * 9_000]
)
async def test_words_of_a_receiver_forge_no_lines_and_are_cut(body: bytes | str) -> None:
    async with scripted(saying(503, body, Content_Encoding="gzip")) as (url, _), writer(url) as one:
        what = (await failure_of(one)).what
    assert what.startswith("HTTP 503: ")
    assert len(what) < 1_300
    assert what.isprintable()


async def test_a_connection_that_is_reset_refused_or_has_no_name_is_tried_again() -> None:
    async def reset(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with scripted(reset) as (url, _), writer(url) as one:
        assert "ServerDisconnected" in (await failure_of(one)).what
    async with writer(url) as one:
        assert "Cannot connect" in (await failure_of(one)).what
    async with writer("http://nowhere.invalid/write") as one:
        assert "nowhere.invalid" in (await failure_of(one)).what


async def test_a_failed_write_goes_on_where_it_stopped() -> None:
    answered: list[Row] = []

    async def answer(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        if len(came) % 4 == 0:
            return web.Response(status=503)
        if any(value < 0 for _, _, value in rows):
            return web.Response(status=400, text="too old sample")
        answered.extend(rows)
        return web.Response(status=204)

    series = [some(f"m{n}", *((m, -1 if n == 9 else 1) for m in range(-4, 0))) for n in range(20)]
    async with scripted(answer) as (url, came), writer(url, samples_per_request=6) as one:
        written, failures = await retried(one, series)
    assert failures > 2
    assert outcome(written) == (76, [(9, Refusal.TOO_OLD, [-4, -3, -2, -1])])
    assert len(answered) == len(set(answered)) == 76


async def test_a_write_that_has_ended_says_the_same_when_it_is_written_again() -> None:
    series = [some("bad", (-2, 1), (-1, 2)), some("good", (-1, 1))]
    async with scripted(refusing(lambda row: row[0] == "bad")) as (url, came), writer(url) as one:
        first = outcome(await one.write(series))
        requests = len(came)
        assert outcome(await one.write(series)) == first == (1, [(0, Refusal.OUT_OF_ORDER, [-2, -1])])
        assert len(came) == requests
        assert outcome(await one.write(list(series))) == first
    assert len(came) > requests


async def test_a_write_that_was_cancelled_begins_anew() -> None:
    async def slow_once(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        await asyncio.sleep(0 if len(came) > 1 else 5)
        return web.Response(status=204)

    series = [some("a", (-1, 1))]
    async with scripted(slow_once) as (url, came), writer(url) as one:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one.write(series), 0.1)
        assert outcome(await one.write(series)) == (1, [])
    assert came == [[("a", -1, 1)]] * 2


async def test_requests_with_a_series_in_common_follow_each_other_and_few_others_overlap() -> None:
    now_in: list[set[str]] = []
    most = 0

    async def answer(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        nonlocal most
        mine = {name for name, _, _ in rows}
        assert all(mine.isdisjoint(others) for others in now_in)
        now_in.append(mine)
        most = max(most, len(now_in))
        await asyncio.sleep(0.005)
        now_in.remove(mine)
        return web.Response(status=204)

    async with scripted(answer) as (url, _), writer(url, samples_per_request=4) as one:
        series = [some(f"m{n}", *((m, 1) for m in range(-3, 0))) for n in range(30)]
        one_write, other = await asyncio.gather(one.write(series), one.write(series[:3]))
    assert (one_write.samples, other.samples, most) == (90, 9, remote_write.IN_FLIGHT)


async def test_two_entries_of_one_series_are_sent_one_after_the_other() -> None:
    async with scripted(saying(204)) as (url, came), writer(url) as one:
        written = await one.write(
            [some("a", (-3, 1)), some("b", (-3, 2)), some("a", (-2, 3)), some("a", (-1, 4))]
        )
    assert outcome(written) == (4, [])
    assert came == [[("a", -3, 1), ("b", -3, 2)], [("a", -2, 3)], [("a", -1, 4)]]


async def test_headers_are_the_protocols_and_the_receivers() -> None:
    seen: list[dict[str, str]] = []

    async def answer(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        seen.append(dict(request.headers))
        return web.Response(status=204)

    async with scripted(answer) as (url, _):
        async with writer(url, bearer_token="s3cret\n", headers={"X-Scope-OrgID": "metrics"}) as one:
            await one.write([some("a", (-1, 1))])
        async with writer(url, username="me", password="s3cret") as one:
            await one.write([some("a", (-1, 1))])
    expected = {
        "Content-Encoding": "snappy",
        "Content-Type": "application/x-protobuf",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
        "User-Agent": "headgate",
    }
    assert all(expected.items() <= one.items() for one in seen)
    assert (seen[0]["X-Scope-OrgID"], seen[0]["Authorization"]) == ("metrics", "Bearer s3cret")
    assert seen[1]["Authorization"] == "Basic bWU6czNjcmV0"


@pytest.mark.parametrize("fields", [{"bearer_token": "s3cret"}, {"username": "me", "password": "s3cret"}])
async def test_secrets_are_in_no_error_even_where_the_receiver_repeats_them(fields: dict[str, str]) -> None:
    async def echo(request: web.Request, rows: list[Row]) -> web.StreamResponse:
        text = f"{request.headers['Authorization']} s3cret does not fit {request.rel_url}"
        return web.Response(status=403, text=text)

    async with scripted(echo) as (url, _), writer(f"{url}?key=hidden", **fields) as one:
        failure = await failure_of(one)
    for text in (str(failure), repr(failure), repr(one)):
        assert "s3cret" not in text
        assert "bWU6czNjcmV0" not in text
        assert "hidden" not in text
    assert "does not fit" in str(failure)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://me:s3cret@127.0.0.1/write"}, "should match pattern"),
        ({"url": "http://127.0.0.1/write", "headers": {"X-A": "1\r\nX-B: 2"}}, "control character"),
    ],
)
def test_a_receiver_with_credentials_in_its_url_or_lines_in_a_header_is_an_error(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        Receiver.model_validate({"name": "a", **fields})
    assert words in str(raised.value)
    assert "s3cret" not in str(raised.value)


async def test_certificates_that_are_not_there_say_which_key_to_look_at(tmp_path: Path) -> None:
    async with writer("https://127.0.0.1:9/write", ca_file=str(tmp_path / "ca.pem")) as one:
        failure = await failure_of(one)
    assert "ca_file of remote_write.receivers[prometheus-1]" in failure.remedy


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate of 127.0.0.1 that no system knows, and a server's context with it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on the PATH")
    key, made = tmp_path / "key.pem", tmp_path / "ca.pem"
    words = "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 2 -subj /CN=test"
    command = ["openssl", *words.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", made], check=True, capture_output=True, timeout=30)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(made, key)
    return made, tls


async def test_a_receiver_is_checked_against_ca_file(certificate: tuple[Path, ssl.SSLContext]) -> None:
    ca_file, tls = certificate
    async with scripted(saying(204), tls) as (url, _):
        async with writer(url) as one:
            assert "ca_file of remote_write.receivers[prometheus-1]" in (await failure_of(one)).remedy
        async with writer(url, ca_file=str(ca_file)) as one:
            assert outcome(await one.write([some("a", (-1, 1))])) == (1, [])


async def test_times_that_cannot_be_written_are_refused_and_not_sent() -> None:
    times = np.array([-1, 0, 2**35 - 1, 2**35, 2**42 - 1, 2**42, 2**62], np.int64)
    async with scripted(saying(204)) as (url, came), writer(url) as one:
        written = await one.write(
            [SeriesSamples(encoded_labels(labels_of("a")), times, np.arange(7.0)), some("b", (-1, 1))]
        )
    assert written.samples == 3
    assert [(one.series, one.reason, one.timestamps_ms.tolist()) for one in written.refused] == [
        (0, Refusal.TOO_FAR_AHEAD, [2**42, 2**62]),
        (0, Refusal.TOO_OLD, [-1, 0, 2**35 - 1]),
    ]
    assert sorted(value for rows in came for _, _, value in rows) == [1, 3, 4]


async def test_times_that_do_not_ascend_are_an_error_of_the_caller() -> None:
    async with writer("http://127.0.0.1:9/write") as one:
        for minutes in ((-1, -2), (-1, -1)):
            with pytest.raises(ValueError, match="ascend"):
                await one.write(
                    [some("a", (-3, 1)), some("b", *((m, 1) for m in minutes)), some("c", (-3, 1))]
                )


async def test_nothing_to_write_asks_nobody() -> None:
    async with scripted(saying(500)) as (url, came), writer(url) as one:
        assert outcome(await one.write([])) == (0, [])
        assert outcome(await one.write([some("a")])) == (0, [])
    assert came == []


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("out of order sample", Refusal.OUT_OF_ORDER),
        (
            "duplicate sample for timestamp 1; overrides not allowed: existing 2, new value 3",
            Refusal.DUPLICATE,
        ),
        ("out of bounds", Refusal.TOO_OLD),
        ("out of bounds: timestamp is too far in the future", Refusal.TOO_FAR_AHEAD),
        ("too old sample", Refusal.TOO_OLD),
        ('label name "b" is not unique: invalid sample', Refusal.INVALID_LABELS),
        ("empty labelset: invalid sample", Refusal.INVALID_LABELS),
        ("(err-mimir-sample-out-of-order)", Refusal.OUT_OF_ORDER),
        ("(err-mimir-sample-timestamp-too-old)", Refusal.TOO_OLD),
        ("(err-mimir-sample-duplicate-timestamp)", Refusal.DUPLICATE),
        ("(err-mimir-too-far-in-future)", Refusal.TOO_FAR_AHEAD),
        ("(err-mimir-label-value-too-long)", Refusal.INVALID_LABELS),
        ("(err-mimir-max-series-per-user)", Refusal.LIMIT),
        ("I am a teapot", Refusal.REFUSED),
    ],
)
async def test_a_receivers_words_become_one_of_few_reasons(said: str, reason: Refusal) -> None:
    async with scripted(refusing(lambda row: row[0] == "bad", 400, said)) as (url, _), writer(url) as one:
        written = await one.write([some("bad", (-1, 1)), some("good", (-1, 1))])
    assert outcome(written) == (1, [(0, reason, [-1])])
    assert written.refused[0].said == said


@given(
    st.lists(
        st.tuples(st.integers(2**35, 2**42 - 1), st.floats(allow_nan=False)),
        unique_by=lambda s: s[0],
        max_size=9,
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9),
)
def test_what_is_encoded_is_what_the_protobuf_library_reads(
    samples: list[tuple[int, float]], text: str
) -> None:
    times, values = [time for time, _ in samples], [value for _, value in samples]
    labels = encoded_labels(labels_of("a", text=text))
    body = encoded_request(
        [labels + encoded_samples(np.array(times, np.int64), np.array(values, np.float64))]
    )
    (series,) = WriteRequest.FromString(bytes(cramjam.snappy.decompress_raw(body))).timeseries
    assert [(one.name, one.value) for one in series.labels] == [("__name__", "a"), ("text", text)]
    assert [(one.timestamp, one.value) for one in series.samples] == samples


@given(
    st.lists(st.tuples(st.integers(0, 25), st.sampled_from([60, 3_000_000])), max_size=30),
    st.integers(1, 40),
    st.booleans(),
)
def test_every_sample_is_planned_once_in_order_within_the_bounds(
    shapes: list[tuple[int, int]], samples_max: int, one_each: bool
) -> None:
    starts = np.cumsum([0, *(count for count, _ in shapes)]).tolist()
    pieces = [Piece(n, starts[n], starts[n] + count) for n, (count, _) in enumerate(shapes) if count]
    label_bytes = [size for _, size in shapes]
    owner: dict[int, int] = {}
    planned: dict[int, list[int]] = {}
    for at, chain in enumerate(chains_of(pieces, samples_max, one_each, label_bytes)):
        for request in reversed(chain):
            assert 1 <= samples_in(request) <= samples_max
            assert len(request) == 1 or sum(label_bytes[p.series] for p in request) <= REQUEST_BYTES_MAX
            for piece in request:
                assert piece.stop - piece.start == 1 or not one_each
                assert owner.setdefault(piece.series, at) == at
                planned.setdefault(piece.series, []).extend(range(piece.start, piece.stop))
    assert planned == {piece.series: list(range(piece.start, piece.stop)) for piece in pieces}
