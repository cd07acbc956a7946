"""What a configuration will cost, against figures worked out by hand."""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import json
from decimal import Decimal
from pathlib import Path

import pytest

from shard_config.known import shipped_services
from shard_config.load import loads
from shard_config.model import Config
from shard_config.quote import (
    Basis,
    Count,
    Quote,
    Way,
    accounts_of,
    alike,
    count_of,
    quote,
    updates_per_metric,
)
from workers import simulator
from workers.cli import main
from workers.quote import metrics_of, verdict
from workers.simulated.faults import Faults
from workers.world import World, account_ids

MONTH = Basis(days=Decimal(30))


def config_of(*, profile: str = "", more: str = "", services: str = "shop", listed_s: int = 86_400) -> Config:
    """One account and region; `shop` has one statistic of every metric, polled each 300 s."""
    text = f"""
accounts:
  - {{id: "123456789012", regions: [eu-west-1], services: [{services}]}}
services:
  shop: {{namespace: Shop, discovery_interval_s: {listed_s}{profile}}}
{more}"""
    return loads(text, "headgate.yaml", {})


def quoted(config: Config, metrics: int, basis: Basis = MONTH, accounts: int | None = None) -> Quote:
    some = accounts_of(config, accounts)
    jobs = {job.name: 100 for job in config.exposition}
    return quote(
        config, some, alike(config, some, dict.fromkeys(config.service_by_name, metrics)), jobs, basis
    )


# --- CloudWatch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("poll_s", "usd"), [(60, 43_200), (300, 8_640), (900, 2_880)])
def test_100_000_metrics_of_one_statistic_are_the_known_dollars_in_30_days(poll_s: int, usd: int) -> None:
    found = quoted(config_of(profile=f", poll_interval_s: {poll_s}"), 100_000)
    assert found.usd(Way.HEADGATE) == usd
    assert found.usd(Way.YACE_60, item="GetMetricData") == 43_200
    assert found.usd(Way.YACE_300, item="GetMetricData") == 8_640


@pytest.mark.parametrize(("once", "usd", "other"), [("false", 17_280, 8_640), ("true", 8_640, 17_280)])
def test_both_readings_of_statistics_are_shown_and_the_dearer_is_the_default(
    once: str, usd: int, other: int
) -> None:
    config = config_of(
        profile=", statistics: [Average, Maximum]", more=f"aws: {{statistics_count_once: {once}}}"
    )
    found = quoted(config, 100_000)
    assert (found.usd(Way.HEADGATE), found.usd_other(Way.HEADGATE)) == (usd, other)
    assert quoted(config_of(profile=", statistics: [Average, Maximum]"), 100_000).usd(Way.HEADGATE) == 17_280


def test_a_listing_is_paid_by_the_page_after_a_million_requests_of_an_account() -> None:
    """200 pages each minute for 30.4 days are 8,755,200 requests."""
    config = config_of(listed_s=60)
    assert quoted(config, 100_000, Basis()).usd(Way.HEADGATE, item="ListMetrics") == Decimal("77.552")
    assert quoted(config_of(), 100_000, Basis()).usd(Way.HEADGATE, item="ListMetrics") == 0


def test_yace_lists_every_name_at_every_scrape() -> None:
    """Two names of 600 metrics each: four pages a scrape, at 300 s 34,560 a month of 30 days."""
    metrics = ", metrics: [{name: A}, {name: B}]"
    found = quoted(config_of(profile=metrics), 1_200)
    assert [
        line.quantity for line in found.lines if (line.way, line.item) == (Way.YACE_300, "ListMetrics")
    ] == [34_560]


def test_metric_streams_bill_an_update_a_minute_and_firehose_by_the_gb() -> None:
    """100,000 metrics are 4.32 billion updates in 30 days: $12,960, and 1,728 GB at 0.029."""
    found = quoted(config_of(), 100_000)
    assert found.usd(Way.STREAMS, item="metric updates") == 12_960
    assert found.usd(Way.STREAMS, item="Firehose") == Decimal("50.112")


def test_percentiles_are_an_update_more_and_the_average_is_not() -> None:
    service = {
        p: config_of(profile=f", statistics: [{p}]").service_by_name["shop"]
        for p in ("Average, Sum", "p99, IQM", "p50, p90, p95, p99, p99.9, IQM")
    }
    assert [updates_per_metric(p) for p in service.values()] == [1, 2, 3]


def test_metrics_of_a_list_are_shared_by_its_names() -> None:
    profile = config_of(
        profile=", metrics: [{name: A, statistics: [Sum, p50, p90, p95, p99, p99.9]}, {name: B}]"
    )
    assert count_of(profile.service_by_name["shop"], 100, 300) == Count(100, 350, 150, 300)


# --- our own parts ------------------------------------------------------------------------------------------------


def test_2_000_targets_put_an_object_each_5_minutes_for_86_dollars_and_their_listings() -> None:
    found = quoted(config_of(services="shop, s3"), 1, accounts=2_000)
    (puts,) = (line for line in found.lines if line.item == "S3 PUT" and line.own)
    listings = 2_000 * 2 * 30
    assert puts.quantity == 2_000 * 288 * 30 + listings
    assert puts.usd == Decimal("86.4") + listings * Decimal("0.000005")


def test_storage_is_by_the_point_and_by_how_long_it_is_kept() -> None:
    """1,000 points a minute: 525.6 million a year, each 11 bytes in the archive and 110 in the store."""
    found = quoted(config_of(), 1_000, Basis())
    usd = {line.item: line.usd for line in found.lines if line.own}
    assert usd["S3 storage"] == Decimal("5.7816") * Decimal("0.023")
    assert usd["PostgreSQL samples"] == Decimal("57.816") * Decimal("0.115")
    assert usd["Kafka brokers"] == 3 * Decimal("729.6") * Decimal("0.204")
    halved = quoted(config_of(), 1_000, Basis(kept_days=730))
    assert {line.item: line.usd for line in halved.lines}["PostgreSQL samples"] == 2 * usd[
        "PostgreSQL samples"
    ]


def test_prices_are_configuration() -> None:
    more = "prices: {kafka_brokers: 1, kafka_usd_per_broker_hour: 0.75, kafka_usd_per_partition_hour: 0.0015}"
    usd = {line.item: line.usd for line in quoted(config_of(more=more), 1).lines if line.own}
    assert usd["Kafka brokers"] == 540
    assert usd["Kafka partitions"] == (24 + 8 + 4 + 1) * 720 * Decimal("0.0015")


def test_a_job_of_exposition_costs_storage_and_nothing_at_cloudwatch() -> None:
    more = "exposition: [{name: node, account: lab, region: rack, endpoints: [http://a]}]"
    with_job, without = quoted(config_of(more=more), 1), quoted(config_of(), 1)
    assert with_job.usd(Way.HEADGATE) == without.usd(Way.HEADGATE)
    assert with_job.usd(Way.HEADGATE, item="PostgreSQL samples", own=True) > 100 * without.usd(
        Way.HEADGATE, item="PostgreSQL samples", own=True
    )


# --- accounts -----------------------------------------------------------------------------------------------------


def test_more_accounts_are_like_the_organizations() -> None:
    more = "organization: {regions: [us-east-1, us-east-2], services: [ec2], role_template: 'arn:aws:iam::{account}:role/R'}"
    found = accounts_of(config_of(more=more), 3)
    assert [(len(a.regions), a.services) for a in found] == [(1, ("shop",)), (2, ("ec2",)), (2, ("ec2",))]
    assert len({a.id for a in found}) == 3


def test_an_organization_alone_is_no_quote_of_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_text(
        "organization: {regions: [us-east-1], services: [ec2], role_template: 'arn:aws:iam::{account}:role/R'}"
    )
    assert main(["quote", "--config", str(path)]) == 1
    assert "give --accounts" in capsys.readouterr().err
    assert main(["quote", "--config", str(path), "--accounts", "500"]) == 0


def test_fewer_accounts_are_the_first_and_others_like_the_last() -> None:
    config = config_of()
    assert [len(accounts_of(config, n)) for n in (None, 1, 500)] == [1, 1, 500]
    assert {a.services for a in accounts_of(config, 500)} == {("shop",)}


# --- the verdict --------------------------------------------------------------------------------------------------


def test_it_says_that_yace_pays_the_same_and_that_streams_are_cheaper_for_two_statistics() -> None:
    said = " ".join(verdict(quoted(config_of(profile=", statistics: [Average, Maximum]"), 100_000)))
    assert "YACE at 300 s, all datapoints exported, pays the same GetMetricData for shop" in said
    assert "CHEAPER for shop, and fresher" in said


def test_it_says_that_streams_are_better_at_a_minute_and_nothing_of_cheaper_where_they_are_not() -> None:
    said = " ".join(verdict(quoted(config_of(), 100_000)))
    assert "Metric Streams $13" in said
    assert "which is the better way then" in said
    assert "CHEAPER" not in said


def test_it_says_where_few_metrics_do_not_pay_for_our_own_parts() -> None:
    assert "For so few metrics" in " ".join(verdict(quoted(config_of(), 10)))


def test_it_says_where_polling_more_often_than_yace_costs_more() -> None:
    said = " ".join(verdict(quoted(config_of(profile=", poll_interval_s: 60"), 1_000)))
    assert "YACE at 300 s is $345.60 CHEAPER for shop" in said


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ec2", "ec2=", "=5", "ec2=-1", "ec2=1,ec2=2", "ec2=1.5", "ec2=１"])
def test_metrics_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        metrics_of(text)


def file_of(folder: Path) -> Path:
    path = folder / "headgate.yaml"
    path.write_text('accounts: [{id: "123456789012", regions: [eu-west-1], services: [ec2, rds]}]')
    return path


def test_the_command_adds_up_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quote", "--config", str(file_of(tmp_path)), "--metrics", "ec2=1800", "--days", "30"]
    assert main([*words, "--format", "json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main([*words, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    ours = [r for r in rows if r["way"] == "headgate" and r["own_part"] == "False"]
    # 18 names, one of them with two statistics: 1,900 queries × 8,640 polls.
    assert [r["usd"] for r in ours if (r["service"], r["item"]) == ("ec2", "GetMetricData")] == ["164.1600"]
    assert sum(Decimal(r["usd"]) for r in ours) == Decimal(whole["usd"]["headgate"])
    assert any("ASSUMED: rds 160;" in note for note in whole["notes"])
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "164.16" in shown
    assert "Headgate's own parts" in shown


def test_a_service_that_is_not_there_is_an_error_with_what_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quote", "--config", str(file_of(tmp_path)), "--metrics", "ec3=5"]) == 2
    assert "ec3 is not in the configuration, which has ec2, rds" in capsys.readouterr().err


# --- live ---------------------------------------------------------------------------------------------------------


async def test_live_counts_what_the_simulated_aws_lists_and_says_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accounts = account_ids(2)
    ec2 = shipped_services()["ec2"]
    world = World(1, accounts, ["eu-west-1"], 1_800, [ec2])
    sim = await simulator.start(world, calls_per_s=0, faults=Faults(forbidden_accounts=(accounts[1],)))
    path = tmp_path / "headgate.yaml"
    listed = "".join(f'{{id: "{a}", regions: [eu-west-1], services: [ec2]}},' for a in accounts)
    path.write_text(
        f"accounts: [{listed}]\naws: {{endpoint_url: '{sim.url}', role_template: 'arn:aws:iam::{{account}}:role/R'}}"
    )
    words = ["quote", "--config", str(path), "--live", "--days", "30", "--format", "json"]
    try:
        assert await asyncio.to_thread(main, words) == 2
        assert "ListMetrics requests, at most $" in capsys.readouterr().err
        assert all(
            "ListMetrics" not in of["calls"].get("eu-west-1", {}) for of in sim.billing()["accounts"].values()
        )
        assert await asyncio.to_thread(main, [*words, "--yes"]) == 1
    finally:
        await sim.close()
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{\n") :])
    # 1,800 metrics of 18 names, one of them with two statistics; the account that was refused is like the other.
    assert found["counts"]["ec2"] == {"metrics": 3_600, "queries": 3_800, "once": 3_600, "listed": 4_000}
    assert any(f"NOT COUNTED: cloudwatch/{accounts[1]}/eu-west-1 ec2" in note for note in found["notes"])
    assert not any("ASSUMED" in note for note in found["notes"])
