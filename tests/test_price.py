"""Prices against the figures of AWS's price list, worked out by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ingest.spending import metrics_usd
from shard_config.load import shipped_services
from shard_config.model import Aws, MetricProfile, ServiceProfile
from shard_config.price import Prices, statistics_share
from shard_config.quote import count_of

PRICES = Prices()


@pytest.mark.parametrize(("poll_s", "usd"), [(60, 43_200), (300, 8_640), (900, 2_880)])
def test_a_month_of_100_000_metrics_costs_by_the_poll_and_not_by_the_point(poll_s: int, usd: int) -> None:
    assert PRICES.day_usd(100_000, poll_s) * 30 == usd


def test_the_dearer_reading_is_the_default() -> None:
    assert PRICES.metrics_billed(500, 3, pages=2) == 3000


def test_up_to_five_statistics_of_a_metric_can_be_read_as_one() -> None:
    once = Prices(statistics_count_once=True)
    assert [once.metrics_billed(10, n) for n in (1, 5, 6)] == [10, 10, 20]


def test_pages_can_be_read_as_free() -> None:
    assert Prices(pages_count_again=False).metrics_billed(500, 1, pages=3) == 500


def test_listing_is_free_up_to_a_million_requests_a_month() -> None:
    assert PRICES.list_metrics_usd(1_000_000) == 0
    assert PRICES.list_metrics_usd(1_000_001) == Decimal("0.00001")
    assert PRICES.list_metrics_usd(2000, before=999_000) == Decimal("0.01")


def test_a_look_is_priced_as_if_the_free_requests_were_used_up() -> None:
    assert PRICES.look_usd(5000, {"GetMetricData": 10, "ListMetrics": 100}) == Decimal("0.051")


def test_many_small_sums_are_exact() -> None:
    assert sum((PRICES.get_metric_data_usd(1) for _ in range(100_000)), Decimal()) == 1


def test_a_configuration_states_its_prices() -> None:
    aws = Aws(
        usd_per_1000_metrics=0.007,
        usd_per_1000_requests=0.02,
        requests_free_per_month=5,
        statistics_count_once=True,
        pages_count_again=False,
    )
    expected = Prices(
        Decimal("0.007"), Decimal("0.02"), 5, statistics_count_once=True, pages_count_again=False
    )
    assert Prices.of(aws) == expected
    assert Prices.of(Aws()) == Prices()


def test_queries_become_dollars_by_the_reading_of_statistics_in_one_place() -> None:
    """Budgets, gaps, healing, backfills and quotes agree, whatever the switch says."""
    seven = ServiceProfile(
        service="seven",
        namespace="N",
        metrics=tuple(
            MetricProfile(name=n, statistics=("Sum", "Average", "Minimum", "Maximum", "p50", "p90", "p99"))
            for n in ("A", "B")
        ),
    )
    services = (seven, shipped_services()["ec2"])
    each, once = (Prices.of(Aws(statistics_count_once=s), services) for s in (False, True))
    assert statistics_share(seven) == Decimal(2) / 7
    for profile in services:
        count = count_of(profile, 1000)
        assert each.get_metric_data_usd(count.queries, profile.service) == metrics_usd(
            count.queries, profile, each
        )
        assert once.get_metric_data_usd(count.queries, profile.service) == pytest.approx(
            metrics_usd(count.queries, profile, once)
        )
    assert once.get_metric_data_usd(7000, "seven") == pytest.approx(Decimal("0.02"))
    assert once.look_usd(7000, {"ListMetrics": 1000}, "seven") == pytest.approx(Decimal("0.03"))
    # Of no service, or of one that is gone: the dearer reading.
    assert once.get_metric_data_usd(7000) == once.get_metric_data_usd(7000, "gone") == Decimal("0.07")
