"""Cost and Usage Reports: what is read out of them, and what is refused."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from ingest import cur
from ingest.cur import BadReport, Bill, read, reads
from tests.cur_scene import NEW, OLD, Line, at, metrics, report, requests

ACCOUNT, OTHER = "012345678901", "123456789012"
LINES = [
    metrics(ACCOUNT, at(1, 5), 1000),
    metrics(ACCOUNT, at(1, 6), 500),
    metrics(ACCOUNT, at(1, 6), 7, prefix=""),
    metrics(ACCOUNT, at(2), 20),
    requests(ACCOUNT, at(1, 5), 12),
    requests(ACCOUNT, at(1, 5), 3, "GetMetricStatistics"),
    metrics(OTHER, at(1), 9),
]


def bill_of(*lines: Line, columns: dict[str, str] = OLD) -> Bill:
    return reads(report(lines, columns).splitlines(keepends=True))


def refusal(text: str) -> str:
    with pytest.raises(BadReport) as refused:
        reads(text.splitlines(keepends=True))
    return str(refused.value)


@pytest.mark.parametrize("columns", [OLD, NEW], ids=["old", "cur2"])
def test_usage_is_summed_by_account_and_utc_day_over_regions(columns: dict[str, str]) -> None:
    bill = bill_of(*LINES, columns=columns)
    first = bill.days[ACCOUNT, date(2026, 11, 1)]
    assert (first.metrics, first.lists, first.other_requests) == (1507, 12, 3)
    assert first.metrics_usd == Decimal("0.01507")
    assert bill.days[ACCOUNT, date(2026, 11, 2)].metrics == 20
    assert bill.days[OTHER, date(2026, 11, 1)].metrics == 9
    assert (bill.lines, bill.used) == (14, 7)


@pytest.mark.parametrize("packed", [False, True])
def test_all_files_of_a_report_are_one_bill(tmp_path: Path, packed: bool) -> None:
    paths = []
    for i, some in enumerate((LINES[:3], LINES[3:])):
        raw = report(some).encode()
        paths.append(tmp_path / f"report-{i}.csv{'.gz' * packed}")
        paths[-1].write_bytes(gzip.compress(raw) if packed else raw)
    assert read(paths).days == bill_of(*LINES).days


def test_days_outside_of_what_was_asked_for_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_text(report(LINES))
    assert set(read([path], date(2026, 11, 2), date(2026, 11, 3)).days) == {(ACCOUNT, date(2026, 11, 2))}


def test_credits_and_discounts_are_dollars_and_no_usage() -> None:
    credit = replace(metrics(ACCOUNT, at(1, 5), 1000), kind="Credit", usd="-0.01")
    bill = bill_of(*LINES, credit)
    assert bill.days == bill_of(*LINES).days
    assert bill.credits_usd == Decimal("-0.01")


def test_other_usage_types_that_look_alike_are_none_of_ours() -> None:
    alike = [
        replace(LINES[0], usage_type=t)
        for t in ("EUW1-CW:GMD-MetricsX", "xCW:GMD-Metrics", "EUW1-CW:MetricMonitorUsage")
    ]
    assert bill_of(*alike).used == 0


def test_two_rates_of_one_hour_are_two_lines() -> None:
    free = replace(metrics(ACCOUNT, at(1, 5), 10), rate="0", usd="0")
    assert bill_of(LINES[0], free).days[ACCOUNT, date(2026, 11, 1)].metrics == 1010


def test_two_versions_of_a_report_laid_together_are_refused_whatever_their_line_ids() -> None:
    newer = replace(LINES[0], id="another", amount="1001")
    assert "report:16: the same usage stands here twice (two versions of the report lie together" in refusal(
        report([*LINES, newer])
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"amount": "many"}, "'many' in line_item_usage_amount is no number"),
        ({"amount": "NaN"}, "'NaN' in line_item_usage_amount is no number"),
        ({"amount": "1e9999"}, "is no number"),
        ({"usd": ""}, "'' in line_item_unblended_cost is no number"),
        ({"usd": "1,5"}, "'1,5' in line_item_unblended_cost is no number"),
        ({"amount": "-5"}, "usage of -5 for"),
        ({"currency": "CNY"}, "is in CNY (Headgate reckons in US dollars"),
        ({"account": "12345678901"}, "is no account of 12 digits (a spreadsheet may have eaten"),
    ],
)
def test_a_line_that_is_not_right_is_named_with_what_and_the_remedy(
    change: dict[str, str], error: str
) -> None:
    text = refusal(report([LINES[1], replace(LINES[0], **change)]))
    assert text.startswith("report:4: ")
    assert error in text


def test_a_time_that_is_none_is_refused() -> None:
    assert "'soon' in line_item_usage_start_date is no time" in refusal(
        report(LINES[:1]).replace("2026-11-01T05:00:00Z", "soon")
    )


def test_the_times_of_cur_2_are_read() -> None:
    text = (
        report(LINES[:1], NEW).replace("T05:00:00Z", " 05:00:00.000").replace("T06:00:00Z", " 06:00:00.000")
    )
    assert reads(text.splitlines(keepends=True)).days == bill_of(LINES[0]).days


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "is no Cost and Usage Report: it has no column line_item_usage_account_id"),
        ("timestamp,value\n1,2\n", "is no Cost and Usage Report"),
        (report(LINES).replace("lineItem/UsageAmount", "lineItem/Amount"), "it has no column line_item_usage_amount"),
        (report(LINES).replace("identity/LineItemId", "lineItem/UsageType"), "the column line_item_usage_type stands there twice"),
        (report(LINES[:1]) + "1,2,3\n", "report:4: has 3 columns, and needs"),
        (report(LINES[:1]) + '1,"2', "is not CSV"),
        (report(LINES[:1]) + "x" * 200_000 + "\n", "is not CSV: field larger than"),
    ],
    ids=["empty", "another", "no column", "column twice", "cut off", "quote", "long"],
)  # fmt: skip
def test_what_is_no_report_is_refused(text: str, error: str) -> None:
    assert error in refusal(text)


def test_files_that_cannot_be_read_say_why_and_what_to_do(tmp_path: Path) -> None:
    raw = report(LINES * 1).encode()
    spoilt = {
        "cut.csv.gz": (gzip.compress(raw)[:-20], "gzip"),
        "noise.csv.gz": (b"\x1f\x8b" + random.Random(1).randbytes(500), "cannot be read|gzip"),
        "latin.csv": (raw + "é".encode("latin-1"), "is not UTF-8"),
        "a.parquet": (b"PAR1....", "is Parquet (have the report delivered as CSV"),
        "a.zip": (b"PK\x03\x04....", "is a zip archive"),
    }
    for name, (content, error) in spoilt.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadReport) as refused:
            read([tmp_path / name])
        assert any(e in str(refused.value) for e in error.split("|")), str(refused.value)
        assert name in str(refused.value)
    with pytest.raises(BadReport, match="No such file"):
        read([tmp_path / "none.csv"])


def test_a_long_report_is_streamed_and_the_lines_of_cloudwatch_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, *rows = report(LINES[:1]).splitlines(keepends=True)
    tracemalloc.start()
    bill = reads(line for lines in ([head], (rows[1] for _ in range(100_000))) for line in lines)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bill.lines == 100_000
    assert peak < 1_000_000
    monkeypatch.setattr(cur, "LINES_MAX", 3)
    assert "more than 3 lines of CloudWatch (narrow it with --from and --to" in refusal(report(LINES))
