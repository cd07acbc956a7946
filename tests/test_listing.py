"""Listings packed, as bytes, and unpacked again; pure."""

from __future__ import annotations

import numpy as np
import pytest

from ingest.errors import Rejected
from ingest.model import Series, SeriesKey, Target, series_ids
from ingest.sources.listing import Listing, decode, depends_on, encode
from ingest.sources.packed import PackedTable, Unpacked, added, load, pack
from shard_config.model import Limits, Resources, Selection, ServiceProfile

TARGET = Target("cloudwatch", "100000000001", "eu-west-1")
LIMITS = Limits()
PROFILE = ServiceProfile(service="ec2", namespace="AWS/EC2")


def some_series(count: int, first: int = 0) -> list[Series]:
    return [
        Series(
            SeriesKey(TARGET.account, TARGET.region, "AWS/EC2", "CPU", (("Id", f"i-{n:05}"),), "Sum", 60),
            "Count",
        )
        for n in range(first, first + count)
    ]


def packed(count: int, first: int = 0) -> tuple[PackedTable, ...]:
    return tuple(pack(some_series(count, first), LIMITS))


def listing_of(count: int) -> Listing:
    return Listing(packed(count), 1_795_500_000_000, depends_on(PROFILE, LIMITS))


# --- packed ---------------------------------------------------------------------------------------------------


def test_what_was_packed_is_unpacked_with_the_ids_that_it_has() -> None:
    series = some_series(1201)
    tables = packed(1201)
    unpacked = [Unpacked().table(table, 60) for table in tables]
    assert [len(table) for table in tables] == [500, 500, 201]
    assert [one for table in unpacked for one in table.series] == series
    assert np.array_equal(np.concatenate([table.ids for table in unpacked]), series_ids(tuple(series)))


def test_the_same_series_are_the_same_object_as_long_as_they_are_among_the_most_recent() -> None:
    unpacked = Unpacked(series_max=9)
    [a], [b], [c] = packed(3), packed(4), packed(5)
    first = unpacked.table(a, 60)
    unpacked.table(b, 60)
    [again] = packed(3)
    assert unpacked.table(again, 60) is first
    unpacked.table(c, 60)
    assert unpacked.table(a, 60) is first
    unpacked.table(b, 60)
    unpacked.table(c, 60)
    assert unpacked.table(a, 60) is not first
    assert len(unpacked) == 2


def test_a_coarser_period_makes_other_series() -> None:
    [table] = packed(3)
    coarse = Unpacked().table(table, 300)
    assert {one.key.period_s for one in coarse.series} == {300}
    assert np.array_equal(coarse.ids, series_ids(coarse.series))
    assert not np.array_equal(coarse.ids, table.ids)


def test_a_million_series_would_take_less_than_a_twentieth_of_a_gigabyte() -> None:
    """Of EC2's shape: ids of 17 random digits, fifteen metrics each."""
    rng = np.random.default_rng(1)
    ids = [f"i-{n:017x}" for n in rng.integers(0, 2**63, 400)]
    series = [
        Series(
            SeriesKey(TARGET.account, TARGET.region, "AWS/EC2", f"Metric{m}", (("InstanceId", i),), "Sum", 60)
        )
        for i in ids
        for m in range(15)
    ]
    per_series = sum(len(t.blob) + t.ids.nbytes + 300 for t in pack(series, LIMITS)) / len(series)
    assert 16 < per_series < 25


def test_series_that_were_added_are_counted_and_those_that_are_gone_are_not() -> None:
    assert added(packed(1000), packed(1000)) == 0
    assert added(packed(1000), packed(700)) == 0
    assert added(packed(1000), packed(1000, first=600)) == 600
    assert added((), packed(3)) == 3
    assert added(packed(3), ()) == 0


# --- as bytes -------------------------------------------------------------------------------------------------


def test_a_listing_comes_back_as_it_was() -> None:
    listing = listing_of(701)
    found = decode(encode(listing, TARGET, "ec2"), TARGET, "ec2", listing.depends, LIMITS)
    assert found is not None
    assert (found.observed_at_ms, found.depends, found.series) == (
        listing.observed_at_ms,
        listing.depends,
        701,
    )
    for ours, theirs in zip(found.tables, listing.tables, strict=True):
        assert (ours.blob, ours.digest, ours.ids.tolist()) == (
            theirs.blob,
            theirs.digest,
            theirs.ids.tolist(),
        )


def test_an_empty_listing_is_a_listing() -> None:
    listing = listing_of(0)
    found = decode(encode(listing, TARGET, "ec2"), TARGET, "ec2", listing.depends, LIMITS)
    assert found is not None
    assert found.tables == ()


def test_a_listing_of_another_profile_is_none_and_of_another_target_is_spoilt() -> None:
    body = encode(listing_of(3), TARGET, "ec2")
    depends = depends_on(PROFILE, LIMITS)
    assert decode(body, TARGET, "ec2", "other", LIMITS) is None
    for target, service in ((Target("cloudwatch", "100000000002", "eu-west-1"), "ec2"), (TARGET, "sqs")):
        with pytest.raises(Rejected, match="spoilt"):
            decode(body, target, service, depends, LIMITS)


def test_no_truncation_and_no_changed_byte_of_a_listing_passes() -> None:
    listing = listing_of(3)
    body = encode(listing, TARGET, "ec2")
    for end in range(len(body)):
        with pytest.raises(Rejected):
            decode(body[:end], TARGET, "ec2", listing.depends, LIMITS)
    for at in range(len(body)):
        changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        with pytest.raises(Rejected):
            decode(changed, TARGET, "ec2", listing.depends, LIMITS)


def test_a_table_that_is_no_table_or_claims_too_much_is_refused() -> None:
    [table] = packed(3)
    bomb = table.blob[:4] + b"\xff" * 8 + table.blob[12:]
    for blob in (b"", b"rubbish", table.blob[:-3], bomb):
        with pytest.raises(Rejected):
            load(blob, LIMITS)


def test_a_shared_table_is_held_to_the_limits_of_whoever_reads_it() -> None:
    [table] = packed(3)
    with pytest.raises(Rejected, match="label_too_long"):
        load(table.blob, LIMITS.model_copy(update={"label_bytes_max": 4}))


# --- what a listing depends on --------------------------------------------------------------------------------


def test_a_listing_depends_on_what_decides_its_series_and_on_nothing_else() -> None:
    resources = Resources(types=("ec2:instance",), arns=("instance/(?P<InstanceId>.+)",))
    tagged: dict[str, object] = {"only": (Selection(tags={"a": "b"}),)}
    same: list[dict[str, object]] = [
        {},
        {"poll_interval_s": 600, "settling_s": 60, "priority": 1, "critical": True},
        {"discovery_interval_s": 60},
        {"resources": resources},
    ]
    other: list[dict[str, object]] = [
        {"namespace": "AWS/SQS"},
        {"period_s": 300},
        {"recently_active": True},
        {"statistics": ("Sum",)},
        {"only": (Selection(metrics=("C.*",)),)},
        tagged,
        {**tagged, "resources": resources},
    ]
    found = [depends_on(PROFILE.model_copy(update=change), LIMITS) for change in other]
    assert {depends_on(PROFILE.model_copy(update=change), LIMITS) for change in same} == {
        depends_on(PROFILE, LIMITS)
    }
    assert len({depends_on(PROFILE, LIMITS), *found}) == 1 + len(other)
    assert depends_on(PROFILE, LIMITS.model_copy(update={"dimensions_max": 3})) not in found
