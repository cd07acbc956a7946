"""Points → batches in columns."""

from __future__ import annotations

import numpy as np
import pytest

from ingest.model import Series, SeriesKey, Target, TaskItem, digest_of, series_id, series_ids
from ingest.sources.columns import (
    SERIES_PER_BATCH,
    Look,
    SeriesTable,
    batch_of,
    columns_of,
    ids_of,
    tables_of,
)

TARGET = Target("cloudwatch", "100000000001", "eu-west-1")
LOOK = Look("t1", TARGET, TaskItem("ec2", 1200, 1800, 300))


def some_series(count: int) -> tuple[Series, ...]:
    return tuple(
        Series(
            SeriesKey(
                TARGET.account, TARGET.region, "AWS/EC2", "CPU", (("InstanceId", f"i-{n}"),), "Average", 60
            )
        )
        for n in range(count)
    )


def test_ids_are_the_models_own_ids() -> None:
    series = some_series(3)
    assert np.array_equal(ids_of(series), series_ids(series))
    assert ids_of(series)[1].astype(">u8").tobytes() == series_id(series[1].key)
    assert ids_of(()).shape == (0, 2)


def test_a_table_takes_no_more_than_500_series() -> None:
    assert [len(t) for t in tables_of(some_series(1201))] == [SERIES_PER_BATCH, SERIES_PER_BATCH, 201]
    with pytest.raises(ValueError, match="501"):
        SeriesTable(some_series(501))


def test_a_table_whose_series_are_the_same_is_used_again() -> None:
    before = tables_of(some_series(700))
    after = tables_of(some_series(701), before)
    assert after[0] is before[0]
    assert after[1] is not before[1]
    assert len(after[1]) == 201


def test_columns_hold_one_series_after_the_other_in_the_order_of_the_table() -> None:
    table = SeriesTable(some_series(3))
    batch = batch_of(LOOK, table, columns_of([([1200, 1260], [1.0, 2.0]), ([], []), ([1320], [3.0])]), 7_000)
    assert batch is not None
    assert batch.series == (table.series[0], table.series[2])
    assert batch.counts.tolist() == [2, 1]
    assert batch.timestamps_s.tolist() == [1200, 1260, 1320]
    assert batch.values.tolist() == [1.0, 2.0, 3.0]
    assert np.array_equal(batch.ids, series_ids(batch.series))
    assert (batch.observed_at_ms, batch.service, batch.grid_s, batch.task_id) == (7_000, "ec2", 300, "t1")


def test_points_outside_the_interval_are_left_out_and_the_rest_stays_as_served() -> None:
    table = SeriesTable(some_series(3))
    columns = columns_of(
        [
            ([1199, 1200, 1227], [1.0, 2.0, 3.0]),  # 1227 is off the grid
            ([1800], [4.0]),
            ([1500, 1500, 1799], [5.0, 6.0, 7.0]),  # repeated
        ]
    )
    batch = batch_of(LOOK, table, columns, 0)
    assert batch is not None
    assert batch.series == (table.series[0], table.series[2])
    assert batch.counts.tolist() == [2, 3]
    assert batch.timestamps_s.tolist() == [1200, 1227, 1500, 1500, 1799]
    assert batch.values.tolist() == [2.0, 3.0, 5.0, 6.0, 7.0]
    assert digest_of(batch.point_ids(), batch.timestamps_s, batch.values) != 0


def test_no_points_are_no_batch() -> None:
    table = SeriesTable(some_series(2))
    assert batch_of(LOOK, table, columns_of([([], []), ([], [])]), 0) is None
    assert batch_of(LOOK, table, columns_of([([60], [1.0]), ([], [])]), 0) is None


def test_the_same_series_give_the_same_tuple_from_look_to_look() -> None:
    table = SeriesTable(some_series(3))
    one = columns_of([([1200], [1.0]), ([], []), ([1200], [2.0])])
    other = columns_of([([1260], [3.0]), ([], []), ([1260], [4.0])])
    whole = columns_of([([1260], [3.0])] * 3)
    batches = [batch_of(LOOK, table, columns, 0) for columns in (one, other, whole)]
    first, second, third = (b for b in batches if b is not None)
    assert first.series is second.series
    assert third.series is table.series


def test_a_series_with_more_timestamps_than_values_is_refused() -> None:
    with pytest.raises(ValueError, match="as many values as timestamps"):
        columns_of([([1, 2], [1.0])])
