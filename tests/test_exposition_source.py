"""Endpoints in Prometheus' text format, scraped from a real HTTP server on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from ingest.clock import SystemClock
from ingest.errors import Rejected
from ingest.model import Batch, LookStatus, Outcome, Target, TaskItem
from ingest.sources import exposition
from ingest.sources.exposition import (
    Endpoint,
    Exposed,
    ExpositionSource,
    endpoint_of,
    endpoints_in,
    parse,
    samples_in,
)
from shard_config.model import Config, ExpositionJob, Limits

TARGET = Target("exposition", "lab", "rack-1")
BODY = """\
# HELP requests served
# TYPE requests counter
requests{code="200",instance="inner"} 5 1395066363000
# TYPE latency summary
latency{quantile="0.5"} NaN
latency_sum 1.5
latency_count 3
# TYPE size histogram
size_bucket{le="1"} 0
size_bucket{le="+Inf"} 2
limit +Inf
"""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "RETRY_PAUSE_S", 0.02)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def endpoint(handler: Handler | str) -> AsyncIterator[str]:
    """A server on a free port; a text is served as it is."""

    async def text(request: web.Request) -> web.StreamResponse:
        return web.Response(text=str(handler), content_type="text/plain")

    app = web.Application()
    app.router.add_get("/metrics", text if isinstance(handler, str) else handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
    finally:
        await runner.cleanup()


def job_of(*urls: str, **fields: Any) -> ExpositionJob:
    return ExpositionJob.model_validate(
        {"name": "node", "account": "lab", "region": "rack-1", "timeout_s": 1, "endpoints": urls, **fields}
    )


def item_now(interval_s: int = 30) -> TaskItem:
    tick_s = int(time.time()) // interval_s * interval_s
    # The end is far away: no test shall fail because it runs across a tick.
    return TaskItem("node", tick_s, tick_s + 3600, interval_s)


def tasks_of_the_source() -> list[str]:
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("ExpositionSource")]


async def looked(
    job: ExpositionJob, item: TaskItem | None = None, wait_s: float = 5
) -> tuple[list[Batch], Outcome]:
    clock = SystemClock()
    source = ExpositionSource(Config(exposition=(job,)), clock)
    try:
        got = [a async for a in source.look("t1", TARGET, item or item_now(), clock.monotonic_s() + wait_s)]
    finally:
        await source.close()
    *batches, outcome = got
    assert isinstance(outcome, Outcome)
    return [b for b in batches if isinstance(b, Batch)], outcome


def values_of(batches: list[Batch]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (series.key.metric, series.key.dimensions): value
        for batch in batches
        for series, value in zip(batch.series, batch.values.tolist(), strict=True)
    }


async def test_samples_are_stamped_with_the_tick_and_keep_their_names_and_labels() -> None:
    async with endpoint(BODY) as url:
        item = item_now()
        batches, outcome = await looked(job_of(url), item)
    host = url.split("/")[2]
    assert values_of(batches) == {
        ("requests", (("code", "200"), ("exported_instance", "inner"), ("instance", host))): 5.0,
        ("latency_sum", (("instance", host),)): 1.5,
        ("latency_count", (("instance", host),)): 3.0,
        ("size_bucket", (("instance", host), ("le", "1"))): 0.0,
        ("size_bucket", (("instance", host), ("le", "+Inf"))): 2.0,
        ("limit", (("instance", host),)): float("inf"),
    }
    assert {t for b in batches for t in b.timestamps_s.tolist()} == {item.start_s}
    key = batches[0].series[0].key
    assert (key.account, key.region, key.namespace, key.stat, key.period_s) == (
        "lab",
        "rack-1",
        "node",
        "Value",
        30,
    )
    assert outcome.status is LookStatus.COMPLETE
    assert outcome.detail == "1 samples were NaN"
    assert (outcome.series, outcome.requests, outcome.metrics_billed) == (6, {"scrape": 1}, 0)


async def test_observed_at_is_the_date_of_the_answer() -> None:
    async def dated(_: web.Request) -> web.Response:
        return web.Response(text="up 1\n", headers={"Date": "Tue, 24 Nov 2026 05:50:41 GMT"})

    async with endpoint(dated) as url:
        [batch], outcome = await looked(job_of(url))
    assert batch.observed_at_ms == outcome.observed_at_ms == 1795499441_000


async def test_openmetrics_is_read_when_it_is_served() -> None:
    async def openmetrics(_: web.Request) -> web.Response:
        body = '# TYPE hits counter\nhits_total{a="b"} 3 # {trace="x"} 1\n# EOF\n'
        return web.Response(
            body=body.encode(), headers={"Content-Type": "application/openmetrics-text; version=1.0.0"}
        )

    async with endpoint(openmetrics) as url:
        batches, outcome = await looked(job_of(url))
    assert [(name, value) for (name, _), value in values_of(batches).items()] == [("hits_total", 3.0)]
    assert outcome.status is LookStatus.COMPLETE


async def test_an_endpoint_that_does_not_answer_makes_the_look_partial_and_is_named() -> None:
    async with endpoint("up 1\n") as url:
        batches, outcome = await looked(job_of(url, "http://127.0.0.1:9/metrics"))
    assert len(values_of(batches)) == 1
    assert outcome.status is LookStatus.PARTIAL
    assert "http://127.0.0.1:9/metrics" in outcome.detail
    assert "1 of 2 endpoints answered" in outcome.detail


async def test_no_answer_at_all_is_a_failure_after_bounded_attempts() -> None:
    batches, outcome = await looked(job_of("http://127.0.0.1:9/metrics"))
    assert batches == []
    assert outcome.status is LookStatus.FAILED
    assert outcome.requests == {"scrape": exposition.ATTEMPTS_MAX}
    assert outcome.observed_at_ms == 0


async def test_an_endpoint_that_recovers_is_scraped_again_within_the_look() -> None:
    answers = iter([503, 200])

    async def flaky(_: web.Request) -> web.Response:
        return web.Response(status=next(answers), text="up 1\n")

    async with endpoint(flaky) as url:
        batches, outcome = await looked(job_of(url))
    assert len(values_of(batches)) == 1
    assert (outcome.status, outcome.requests) == (LookStatus.COMPLETE, {"scrape": 2})


async def test_an_endpoint_that_hangs_costs_no_more_than_the_deadline() -> None:
    async def hangs(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response(text="up 1\n")

    async with endpoint(hangs) as url, endpoint("up 1\n") as quick:
        begun_s = time.monotonic()
        batches, outcome = await looked(job_of(url, quick, timeout_s=20), wait_s=0.5)
    assert time.monotonic() - begun_s < 3
    assert len(values_of(batches)) == 1
    assert outcome.status is LookStatus.PARTIAL
    assert "the deadline passed" in outcome.detail


@pytest.mark.parametrize(
    ("body", "says"),
    [("up 1\nup{", "cut off"), ("<html>no</html>\n", "does not parse"), ("up one\n", "does not parse")],
)
async def test_a_malformed_body_counts_not_at_all(body: str, says: str) -> None:
    async with endpoint(body) as url:
        batches, outcome = await looked(job_of(url))
    assert batches == []
    assert outcome.status is LookStatus.FAILED
    assert says in outcome.detail


async def test_more_series_than_allowed_are_refused_and_not_cut_off() -> None:
    many = "".join(f'up{{n="{n}"}} 1\n' for n in range(11))
    async with endpoint(many) as big, endpoint("up 1\n") as small:
        batches, outcome = await looked(job_of(big, small, series_max=10))
    assert len(values_of(batches)) == 1
    assert outcome.status is LookStatus.PARTIAL
    assert "series_max 10" in outcome.detail


async def test_more_bytes_than_allowed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "BODY_BYTES_MAX", 1000)
    async with endpoint("up 1\n" * 1000) as url:
        _, outcome = await looked(job_of(url))
    assert outcome.status is LookStatus.FAILED
    assert "more than 1000 bytes" in outcome.detail


async def test_a_task_older_than_its_interval_is_expired_and_not_scraped() -> None:
    asked = 0

    async def count(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(text="up 1\n")

    now_s = int(time.time())
    async with endpoint(count) as url:
        batches, outcome = await looked(job_of(url), TaskItem("node", now_s - 30, now_s, 30))
    assert (batches, asked) == ([], 0)
    assert outcome.status is LookStatus.EXPIRED


async def test_the_endpoints_file_is_read_anew_at_each_scrape(tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    job = ExpositionJob(name="node", account="lab", region="rack-1", endpoints_file=str(file))
    _, absent = await looked(job)
    async with endpoint("up 1\n") as one, endpoint("up 2\n") as other:
        file.write_bytes(orjson.dumps([{"targets": [one.split("/")[2]], "labels": {"rack": "7"}}]))
        first, _ = await looked(job)
        file.write_bytes(orjson.dumps([{"targets": [one.split("/")[2], other.split("/")[2]]}]))
        second, outcome = await looked(job)
    assert absent.status is LookStatus.FAILED
    assert "not readable" in absent.detail
    assert [dict(dimensions)["rack"] for _, dimensions in values_of(first)] == ["7"]
    assert sorted(values_of(second).values()) == [1.0, 2.0]
    assert outcome.status is LookStatus.COMPLETE


async def test_batches_hold_at_most_500_series_and_the_same_tuples_at_the_next_scrape() -> None:
    clock = SystemClock()
    async with endpoint("".join(f'up{{n="{n}"}} {n}\n' for n in range(1100))) as url:
        source = ExpositionSource(Config(exposition=(job_of(url),)), clock)
        looks = [
            [
                a
                async for a in source.look("t", TARGET, item_now(), clock.monotonic_s() + 5)
                if isinstance(a, Batch)
            ]
            for _ in range(2)
        ]
        await source.close()
    assert [len(b.series) for b in looks[0]] == [500, 500, 100]
    assert all(a.series is b.series for a, b in zip(*looks, strict=True))


async def test_a_consumer_that_stops_early_leaves_no_task_behind() -> None:
    clock = SystemClock()
    async with endpoint("".join(f'up{{n="{n}"}} {n}\n' for n in range(5000))) as url:
        source = ExpositionSource(Config(exposition=(job_of(url),)), clock)
        async with aclosing(source.look("t", TARGET, item_now(), clock.monotonic_s() + 5)) as answers:
            assert isinstance(await anext(answers), Batch)
            during = tasks_of_the_source()
        after = tasks_of_the_source()
        await source.close()
    assert (len(during) > 0, after) == (True, [])


def test_a_series_that_cannot_travel_is_left_out_and_counted_and_the_others_keep_their_values() -> None:
    at = endpoint_of("http://h:1/metrics")
    body = 'a 1\nb{path="x\\ny"} 2\nc 3\n'
    scrape = parse(body, False, job_of("http://h:1/metrics"), at, 60, 0, Exposed(), Limits())
    assert [one.key.metric for one in scrape.exposed.tables[0].series] == ["a", "c"]
    assert scrape.columns[0].values.tolist() == [1.0, 3.0]
    assert (scrape.series, len(scrape.exposed.refused)) == (2, 1)


def test_of_a_series_that_is_exposed_twice_the_first_sample_is_kept() -> None:
    at = endpoint_of("http://h:1/metrics")
    scrape = parse("up 1\nup 2\n", False, job_of("http://h:1/metrics"), at, 60, 0, Exposed(), Limits())
    assert (scrape.series, scrape.repeated, scrape.columns[0].values.tolist()) == (1, 1, [1.0])


def test_a_counter_keeps_the_name_it_is_exposed_with() -> None:
    assert [s.name for s in samples_in("# TYPE hits counter\nhits 1\n", False)] == ["hits"]


@pytest.mark.parametrize(
    ("url", "instance"),
    [
        ("http://h:9100/metrics", "h:9100"),
        ("http://h/metrics", "h:80"),
        ("https://h/metrics", "h:443"),
        ("http://[::1]:9100/metrics", "[::1]:9100"),
    ],
)
def test_the_instance_is_the_host_and_the_port(url: str, instance: str) -> None:
    assert endpoint_of(url) == Endpoint(url, (("instance", instance),))


@pytest.mark.parametrize("url", ["ftp://h/x", "http:///metrics", "http://h:99999/metrics", "h:9100"])
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(Rejected, match="bad_endpoint"):
        endpoint_of(url)


@pytest.mark.parametrize("text", [b"", b"{}x", b"[1]", b'[{"labels": {}}]', b'[{"targets": 3}]'])
def test_what_is_no_file_sd_document_is_refused(text: bytes) -> None:
    with pytest.raises(Rejected, match="bad_endpoints_file"):
        endpoints_in(text, "here")
