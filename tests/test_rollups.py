"""Samples to rows, pure: against numpy one series at a time, and against ddsketch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ddsketch import DDSketch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ingest.model import SeriesIds
from ingest.rollups import (
    RELATIVE_ACCURACY,
    Bins,
    Rollups,
    codes_of,
    empty,
    fullest,
    of_hours,
    percentiles_of,
    percentiles_of_spans,
    roll_up,
    values_of,
)

PS = (0.0, 0.5, 0.95, 0.99, 1.0)

_values = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 5e-324, -2.5, 1e300, 100.0]),
    st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300),
)
_samples = st.lists(st.tuples(st.integers(0, 4), _values), min_size=1, max_size=60)


def ids_of(numbers: list[int]) -> SeriesIds:
    """Ids whose order is not that of the numbers, two of them alike in their first half."""
    halves = {0: (7, 9), 1: (7, 2), 2: (1 << 63, 0), 3: (3, 3), 4: (0, 1)}
    return np.array([halves[n] for n in numbers], np.uint64).reshape(-1, 2)


def rolled(samples: list[tuple[int, float]], *, bins: bool = True) -> Rollups:
    return roll_up(ids_of([n for n, _ in samples]), np.array([v for _, v in samples]), bins=bins)


def of_one(values: NDArray[np.float64]) -> Rollups:
    return roll_up(np.ones((len(values), 2), np.uint64), values, bins=True)


@given(samples=_samples, seed=st.integers(0, 1000))
def test_rows_are_numpys_to_the_bit_and_the_same_for_samples_in_any_order(
    samples: list[tuple[int, float]], seed: int
) -> None:
    found = rolled(samples)
    order = np.random.default_rng(seed).permutation(len(samples))
    assert found.same_as(rolled([samples[i] for i in order]))
    numbers = sorted({n for n, _ in samples}, key=lambda n: tuple(ids_of([n])[0].tolist()))
    assert (found.ids == ids_of(numbers)).all()
    for row, number in enumerate(numbers):
        mine = np.array([v for n, v in samples if n == number])
        assert (found.counts[row], found.mins[row], found.maxs[row]) == (len(mine), mine.min(), mine.max())
        with np.errstate(over="ignore", invalid="ignore"):
            expected = np.quantile(mine, [0.5, 0.95, 0.99])
        np.testing.assert_array_equal([found.p50s[row], found.p95s[row], found.p99s[row]], expected)
        scale = np.abs(mine).max() or 1.0
        assert found.sums[row] / scale == pytest.approx(math.fsum(mine / scale), abs=1e-12)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.lognormal(3, 2, n),
        lambda rng, n: rng.normal(0, 50, n),
        lambda rng, n: rng.poisson(2, n).astype(float),
        lambda rng, n: np.zeros(n),
    ],
    ids=["lognormal", "around zero", "counts", "zeros"],
)
@pytest.mark.parametrize("n", [1, 60, 1440])
def test_a_percentile_of_a_sketch_is_ddsketchs(draw: object, n: int) -> None:
    values = draw(np.random.default_rng(n), n)  # type: ignore[operator]
    theirs = DDSketch(RELATIVE_ACCURACY)
    for value in values:
        theirs.add(float(value))
    _, found = percentiles_of([of_one(values)], PS)
    assert found[0] == pytest.approx([theirs.get_quantile_value(p) for p in PS], rel=1e-9, abs=1e-12)


@given(days=st.lists(_samples, min_size=1, max_size=4))
def test_merged_sketches_are_the_sketch_of_all_samples(days: list[list[tuple[int, float]]]) -> None:
    ids, merged = percentiles_of([rolled(day) for day in days], PS)
    at_once_ids, at_once = percentiles_of([rolled([sample for day in days for sample in day])], PS)
    assert (ids == at_once_ids).all()
    assert np.array_equal(merged, at_once)


@given(values=st.lists(_values, min_size=1, max_size=100))
def test_a_percentile_of_a_sketch_is_as_near_as_promised(values: list[float]) -> None:
    _, found = percentiles_of([of_one(np.array(values))], PS)
    at_rank = np.sort(values)[[math.floor(p * (len(values) - 1)) for p in PS]]
    normal = (np.abs(at_rank) > 1e-307) | (at_rank == 0)  # of denormal numbers 1 % is no number
    assert (np.abs(found[0] - at_rank) <= RELATIVE_ACCURACY * 1.000001 * np.abs(at_rank))[normal].all()


def test_many_series_that_are_far_apart_are_merged_in_parts_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(5)
    samples = [
        (int(n), float(v)) for n, v in zip(rng.integers(0, 5, 500), rng.normal(0, 1e6, 500), strict=True)
    ]
    days = [rolled(samples[:250]), rolled(samples[250:])]
    whole = percentiles_of(days, PS)
    monkeypatch.setattr("ingest.rollups.DENSE_MAX", 100)
    parts = percentiles_of(days, PS)
    assert np.array_equal(whole[0], parts[0])
    assert np.array_equal(whole[1], parts[1])


@given(days=st.lists(_samples, min_size=1, max_size=5), cut=st.integers(0, 5))
def test_spans_that_overlap_are_merged_as_each_alone(days: list[list[tuple[int, float]]], cut: int) -> None:
    rolled_days = [rolled(day) for day in days]
    spans = [
        range(len(days)),
        range(min(cut, len(days)), len(days)),
        range(max(0, cut - 2), min(cut, len(days))),
    ]
    ids, found = percentiles_of_spans(rolled_days, spans, PS)
    for number, span in enumerate(spans):
        of, alone = percentiles_of([rolled_days[n] for n in span], PS)
        in_it = {tuple(id_): values for id_, values in zip(of.tolist(), alone.tolist(), strict=True)}
        for id_, values in zip(ids.tolist(), found[:, number], strict=True):
            assert np.array_equal(values, in_it.get(tuple(id_), [np.nan] * len(PS)), equal_nan=True)


def test_codes_grow_with_their_values_and_infinities_have_codes_of_their_own() -> None:
    values = np.array([-np.inf, -1e308, -1.0, -1e-308, -5e-324, 0.0, 5e-324, 1e-308, 0.5, 1e308, np.inf])
    codes = codes_of(values)
    assert (np.diff(codes) > 0).all()
    assert values_of(codes[[0, 5, -1]]).tolist() == [-np.inf, 0.0, np.inf]


@given(samples=_samples)
def test_packed_sketches_come_back(samples: list[tuple[int, float]]) -> None:
    bins = rolled(samples).bins
    assert bins is not None
    back = Bins.unpack(bins.pack())
    for name in ("per_row", "codes", "counts"):
        assert getattr(back, name).tolist() == getattr(bins, name).tolist()


@pytest.mark.parametrize("harm", [lambda raw: raw[:4], lambda raw: raw[:-5], lambda raw: b"\xff" + raw[1:]])
def test_broken_sketches_are_refused(harm: object) -> None:
    bins = rolled([(0, 1.0), (1, 2.0)]).bins
    assert bins is not None
    with pytest.raises(ValueError, match="sketch"):
        Bins.unpack(harm(bins.pack()))  # type: ignore[operator]


def test_of_two_rows_of_a_series_that_with_more_samples_stays_and_of_equal_ones_the_first() -> None:
    fresh = rolled([(0, 1.0), (1, 1.0), (1, 2.0)])
    stored = rolled([(0, 5.0), (0, 6.0), (1, 8.0), (1, 9.0), (2, 3.0)])
    kept = fullest([fresh, stored])
    by_id = {
        tuple(i): (c, m)
        for i, c, m in zip(kept.ids.tolist(), kept.counts.tolist(), kept.maxs.tolist(), strict=True)
    }
    assert by_id == {(7, 9): (2, 6.0), (7, 2): (2, 2.0), (1 << 63, 0): (1, 3.0)}


def test_a_day_of_hours_has_their_counts_sums_and_extremes_and_no_percentiles() -> None:
    hours = [rolled([(0, 1.0), (1, -4.0)], bins=False), rolled([(0, 3.0), (0, 7.0)], bins=False)]
    day = of_hours(hours)
    expected = rolled([(0, 1.0), (1, -4.0), (0, 3.0), (0, 7.0)])
    for name in ("ids", "counts", "sums", "mins", "maxs"):
        assert getattr(day, name).tolist() == getattr(expected, name).tolist()
    assert np.isnan(day.p50s).all()
    _, found = percentiles_of([day, expected], (0.5,))
    assert np.isnan(found).all()


def test_no_samples_make_no_rows() -> None:
    assert len(empty(bins=True)) == len(of_hours([])) == len(percentiles_of([], PS)[1]) == 0
