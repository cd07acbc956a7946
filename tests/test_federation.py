"""Three shards with accounts of their own, and the servers that answer for all of them, by the configurations that are shipped."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from ingest.model import Series, SeriesKey, SourceName, Target
from ingest.ports import LabelSet
from ingest.series_labels import Labels
from shard_config.load import loads
from shard_config.model import Config
from shard_config.recording import recordings_of, render
from tests.late_points import MINUTE_S, Feed
from tests.prometheus_server import PrometheusServer, needs_prometheus, needs_promtool, promtool
from workers.servers import get_local

SHIPPED = Path(__file__).resolve().parent.parent / "docs/prometheus"
SHARDS = ("prometheus-1", "prometheus-2", "prometheus-3")
ACCOUNTS = [str(100_000_000_001 + n) for n in range(9)]
RAW = "aws_ec2_cpuutilization_average"
RECORDED = "account_region:aws_ec2_cpuutilization_average:count"
OLDEST_MIN = 30


def config() -> Config:
    accounts = ", ".join(f'{{id: "{one}", regions: [eu-west-1], services: [ec2]}}' for one in ACCOUNTS)
    receivers = ", ".join(f"{{name: {one}, url: 'http://{one}:9090/api/v1/write'}}" for one in SHARDS)
    return loads(
        f"""
kafka: {{bootstrap: "kafka:9092"}}
postgres: {{dsn: postgresql://headgate@postgres/headgate}}
s3: {{bucket: raw}}
services: {{ec2: {{metrics: [{{name: CPUUtilization}}]}}}}
accounts: [{accounts}]
remote_write: {{receivers: [{receivers}]}}
""",
        "headgate.yaml",
        environ={},
    )


def key(account: str, instance: int) -> Series:
    dimensions = (("InstanceId", f"i-{instance}"),)
    return Series(SeriesKey(account, "eu-west-1", "AWS/EC2", "CPUUtilization", dimensions, "Average", 60))


@dataclass
class Stack:
    """`series`: by shard, what it was given. `newest_s`: the time of the newest points."""

    shards: dict[str, PrometheusServer]
    federating: PrometheusServer
    reading: PrometheusServer
    series: dict[str, dict[LabelSet, dict[int, float]]]
    newest_s: int


def shipped(name: str, shards: dict[str, PrometheusServer]) -> dict[str, Any]:
    """A shipped configuration with its shards where they are."""
    text = (SHIPPED / name).read_text()
    for shard, server in shards.items():
        text = text.replace(f"{shard}:9090", server.url.removeprefix("http://"))
    return dict(yaml.safe_load(text))


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    home = tmp_path_factory.mktemp("federation")
    made = config()
    rules = home / "recording.yml"
    rules.write_text(render(recordings_of(made), "prometheus").replace("interval: 1m", "interval: 1s"))
    shards = {one: PrometheusServer(home / one, rule_files=[rules]) for one in SHARDS}
    federation = shipped("federation.yml", shards)
    federation["global"]["scrape_interval"] = "1s"
    federating = PrometheusServer(home / "federating", config=federation)
    reading = PrometheusServer(home / "reading", config=shipped("remote-read.yml", shards))
    started: list[PrometheusServer] = []
    try:
        for server in (*shards.values(), federating, reading):
            started.append(server)
            server.start()
        newest_s = (int(time.time()) - 660) // MINUTE_S * MINUTE_S
        series = written(made, newest_s)
        for name, server in shards.items():
            feed = Feed(server)
            try:
                await feed.write(series[name])
            finally:
                await feed.close()
        yield Stack(shards, federating, reading, series, newest_s)
    finally:
        for server in reversed(started):
            server.stop()


def written(made: Config, newest_s: int) -> dict[str, dict[LabelSet, dict[int, float]]]:
    """By shard, as the remote writer chooses it."""
    labels = Labels(made)
    found: dict[str, dict[LabelSet, dict[int, float]]] = {one: {} for one in SHARDS}
    for n, account in enumerate(ACCOUNTS):
        target = Target(SourceName.CLOUDWATCH, account, "eu-west-1")
        for instance in range(n + 1):
            series = key(account, instance)
            points = {newest_s - m * MINUTE_S: float(n + instance) for m in range(OLDEST_MIN)}
            found[labels.receiver_of(series, "ec2")][labels.of(series, "ec2", target, None)] = points
    return found


async def until(ask: Callable[[], Awaitable[Any]], wanted: Any) -> Any:
    """Ask until the answer is the wanted one, for ten seconds; returns the last one."""
    for _ in range(100):
        if (answer := await ask()) == wanted:
            break
        await asyncio.sleep(0.1)
    return answer


@needs_promtool
@pytest.mark.parametrize("name", ["federation.yml", "remote-read.yml", "receiver.yml"])
def test_promtool_takes_what_is_shipped(tmp_path: Path, name: str) -> None:
    for rules in ("recording.yml", "alerts.yml"):
        (tmp_path / rules).write_text("groups: []\n")
    (tmp_path / name).write_text((SHIPPED / name).read_text())

    said = promtool("check", "config", tmp_path / name)

    assert said.returncode == 0, said.stdout + said.stderr


@needs_prometheus
async def test_every_shard_has_accounts_of_its_own(stack: Stack) -> None:
    accounts = [{dict(one)["account_id"] for one in its} for its in stack.series.values()]

    assert all(accounts)
    assert sum(map(len, accounts)) == len(set().union(*accounts)) == len(ACCOUNTS)


@needs_prometheus
async def test_a_federating_server_answers_for_all_shards_with_what_they_recorded(stack: Stack) -> None:
    expected = {account: float(n + 1) for n, account in enumerate(ACCOUNTS)}

    async def counts() -> dict[str, float]:
        return {one["account_id"]: value for one, value in stack.federating.query(RECORDED)}

    assert await until(counts, expected) == expected
    of_shards = [value for shard in stack.shards.values() for _, value in shard.query(f"sum({RECORDED})")]
    assert stack.federating.query(f"sum({RECORDED})") == [({}, sum(of_shards))]
    assert {frozenset(one) for one, _ in stack.federating.query(RECORDED)} == {
        frozenset(("__name__", "account_id", "region"))
    }


@needs_prometheus
async def test_late_points_themselves_are_not_federated(stack: Stack) -> None:
    shard = stack.shards["prometheus-1"]

    shown = get_local(f"{shard.url}/federate?match[]=%7B__name__%3D~%22aws_.*%22%7D", timeout_s=5)

    assert shard.query(f"count(last_over_time({RAW}[17m]))") == [
        ({}, float(len(stack.series["prometheus-1"])))
    ]
    assert RAW not in shown.decode()


@needs_prometheus
async def test_a_server_that_reads_from_the_shards_has_every_sample_of_all_of_them(stack: Stack) -> None:
    now_s = stack.newest_s + 660

    got = stack.reading.samples(RAW, now_s - 3600, now_s)

    assert got == {one: points for its in stack.series.values() for one, points in its.items()}


@needs_prometheus
async def test_a_server_that_reads_from_the_shards_answers_the_sum_over_them(stack: Stack) -> None:
    expression, now_s = f"sum(last_over_time({RAW}[17m]))", stack.newest_s + 660

    of_shards = [value for one in stack.shards.values() for _, value in one.query(expression, now_s)]

    assert len(of_shards) == 3
    assert stack.reading.query(expression, now_s) == [({}, sum(of_shards))]


@needs_prometheus
async def test_with_a_shard_down_the_others_answer_and_a_warning_says_so(stack: Stack) -> None:
    now_s = stack.newest_s + 660
    expression = f"count(last_over_time({RAW}[17m]))"
    whole = stack.reading.query(expression, now_s)
    shard = stack.shards["prometheus-2"]

    def warnings() -> list[str]:
        asked = urlencode({"query": expression, "time": now_s})
        return list(
            json.loads(get_local(f"{stack.reading.url}/api/v1/query?{asked}", timeout_s=5)).get(
                "warnings", ()
            )
        )

    assert warnings() == []
    shard.stop()
    try:
        lacks = len(stack.series["prometheus-2"])
        assert stack.reading.query(expression, now_s) == [({}, whole[0][1] - lacks)]
        assert any("remote_read" in one for one in warnings())
    finally:
        shard.start()
    assert stack.reading.query(expression, now_s) == whole
