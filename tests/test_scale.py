"""Shards come and go under load: nothing is lost, nothing is paid twice, and no more moves than must."""

from __future__ import annotations

from tests.scale_scene import play, quantile


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
