"""`headgate samples` and the export, over what a real sink has landed."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from ingest.clock import SystemClock
from ingest.model import series_ids
from ingest.ports import Landable
from ingest.sinks.connection import open_connection
from ingest.sinks.migrate import migrate
from ingest.sinks.postgres import PostgresSink
from shard_config.model import Postgres
from tests.sink_contract import MIDNIGHT_S, make_landable
from workers import samples
from workers.arguments import parse_time
from workers.samples import Filter, export_csv, parse_dimension, rfc3339, show

VALUES = [0.1, 1 / 3, -1.7976931348623157e308, 5e-324, 100.0, 1e22]


def with_dimensions(one: Landable, *dimensions: tuple[tuple[str, str], ...]) -> Landable:
    """The batch with these dimensions on its series, one after the other."""
    b = one.batch
    series = tuple(
        replace(s, key=replace(s.key, dimensions=d)) for s, d in zip(b.series, dimensions, strict=True)
    )
    return replace(one, batch=replace(b, series=series, ids=series_ids(series)))


@pytest.fixture(scope="module")
async def connection(postgres_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """To a store with three series of account A, one of them with values that are hard to write, and one of account B."""
    server = await asyncpg.connect(postgres_dsn)
    await server.execute("CREATE DATABASE samples TEMPLATE template0")
    await server.close()
    postgres = Postgres(dsn=postgres_dsn.rpartition("/")[0] + "/samples")
    await migrate(postgres)
    sink = await PostgresSink.connect(postgres, clock=SystemClock())
    hard = make_landable("A", [(0, 300 + i, v) for i, v in enumerate(VALUES)])
    others = make_landable("A", [(1, 300, 1.0), (2, 300, 2.0)])
    strange = (("Name", 'a "quoted", ünïcode name'), ("AZ", "b"))
    await sink.land(
        [],
        [
            hard,
            with_dimensions(others, (("Id", "i-1"), ("AZ", "a")), strange),
            make_landable("B", [(0, 1440, 3.0)]),
        ],
    )
    await sink.close()
    opened = await open_connection(postgres, "test")
    yield opened
    await opened.close()


async def shown(connection: asyncpg.Connection, wanted: Filter, format_: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = await show(connection, wanted, format_, out, err)
    return code, out.getvalue(), err.getvalue()


async def test_csv_of_one_series_reads_back_to_the_same_floats(connection: asyncpg.Connection) -> None:
    code, out, err = await shown(connection, Filter(account="A", dimensions=(("Id", "i-0"),)), "csv")
    assert (code, err) == (0, "")
    header, *rows = csv.reader(io.StringIO(out))
    assert header == ["timestamp", "value"]
    assert [ts for ts, _ in rows] == [f"2026-11-24T05:0{i}:00Z" for i in range(len(VALUES))]
    assert [float(value) for _, value in rows] == VALUES


async def test_bounds_are_half_open(connection: asyncpg.Connection) -> None:
    from_s = MIDNIGHT_S + 301 * 60
    wanted = Filter(account="A", dimensions=(("Id", "i-0"),), from_s=from_s, to_s=from_s + 120)
    _, out, _ = await shown(connection, wanted, "csv")
    assert [line.split(",")[0] for line in out.splitlines()[1:]] == [
        "2026-11-24T05:01:00Z",
        "2026-11-24T05:02:00Z",
    ]


async def test_csv_of_several_series_is_refused_with_what_tells_them_apart(
    connection: asyncpg.Connection,
) -> None:
    code, out, err = await shown(connection, Filter(account="A"), "csv")
    assert (code, out) == (2, "")
    assert "3 series match" in err
    assert "dimensions: " in err
    assert '{"Id":"i-0"}' in err
    assert "account: " not in err


async def test_json_and_table_show_every_series(connection: asyncpg.Connection) -> None:
    code, out, _ = await shown(connection, Filter(metric="Load"), "json")
    found = json.loads(out)
    assert code == 0
    assert len(found) == len(VALUES) + 3
    assert {json.dumps(row["dimensions"]) for row in found} == {
        '{"Id": "i-0"}', '{"AZ": "a", "Id": "i-1"}', json.dumps({"AZ": "b", "Name": 'a "quoted", ünïcode name'})
    }  # fmt: skip
    code, out, _ = await shown(connection, Filter(metric="Load"), "table")
    assert code == 0
    assert len(out.splitlines()) == len(VALUES) + 4


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Filter(account="C"), "No series has account C. There is: A, B"),
        (Filter(account="B", metric="Laod"), "No series has metric Laod, account B. There is: Load"),
        (Filter(account="B", dimensions=(("Id", "x"),)), 'dimensions {"Id": "x"}, account B. There is: {"Id": "i-0"}'),
        (Filter(account="B", to_s=MIDNIGHT_S), "The store has samples from 2026-11-24T05:00:00Z to 2026-11-25T00:00:00Z"),
    ],
)  # fmt: skip
async def test_where_nothing_matches_it_says_what_there_is(
    connection: asyncpg.Connection, wanted: Filter, message: str
) -> None:
    code, out, err = await shown(connection, wanted, "json")
    assert (code, out) == (1, "")
    assert message in err


async def test_an_empty_store_says_so(database: str) -> None:
    await migrate(database)
    connection = await open_connection(Postgres(dsn=database), "test")
    code, _, err = await shown(connection, Filter(account="A"), "csv")
    await connection.close()
    assert (code, err.startswith("No series has landed yet")) == (1, True)


async def test_the_export_holds_every_sample_with_its_labels(
    connection: asyncpg.Connection, tmp_path: Path
) -> None:
    path = tmp_path / "samples.csv"
    assert await export_csv(connection, path, None, None) == len(VALUES) + 3
    rows = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    assert list(rows[0]) == ["account", "region", "namespace", "metric", "dims", "stat", "timestamp", "value"]
    (b,) = [row for row in rows if row["account"] == "B"]
    assert b == {
        "account": "B", "region": "eu-west-1", "namespace": "AWS/EC2", "metric": "Load", "dims": '{"Id":"i-0"}',
        "stat": "Average", "timestamp": "2026-11-25T00:00:00Z", "value": "3.0",
    }  # fmt: skip
    assert {row["dims"] for row in rows} >= {'{"AZ":"b","Name":"a \\"quoted\\", ünïcode name"}'}


async def test_memory_of_labels_and_rows_is_bounded(
    connection: asyncpg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.csv"
    await export_csv(connection, whole)
    monkeypatch.setattr(samples, "ROWS_A_FETCH", 2)
    monkeypatch.setattr(samples, "LABELS_CACHED_MAX", 1)
    await export_csv(connection, tmp_path / "pieces.csv")
    assert (tmp_path / "pieces.csv").read_text() == whole.read_text()


def test_timestamps_have_a_fraction_only_where_needed() -> None:
    at = datetime(2026, 11, 24, 5, tzinfo=UTC)
    assert rfc3339(at) == "2026-11-24T05:00:00Z"
    assert rfc3339(at.replace(microsecond=250_000)) == "2026-11-24T05:00:00.250000Z"


@pytest.mark.parametrize(
    "text", ["2026-11-24T05:00:00Z", "2026-11-24T06:00:00+01:00", "2026-11-24 05:00", "1795496400"]
)
def test_times_are_read_in_several_ways(text: str) -> None:
    assert parse_time(text) == MIDNIGHT_S + 5 * 3600


@pytest.mark.parametrize(
    ("parse", "text"), [(parse_time, "noon"), (parse_dimension, "Id"), (parse_dimension, "=x")]
)
def test_what_cannot_be_read_is_refused(parse: object, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        parse(text)  # type: ignore[operator]


def test_the_command_reads_its_filters() -> None:
    parser = argparse.ArgumentParser()
    samples.register(parser.add_subparsers())
    args = parser.parse_args(
        ["samples", "--account", "1", "--dim", "A=b", "--dim", "C=d=e", "--from", "10", "--format", "csv"]
    )
    assert args.dim == [("A", "b"), ("C", "d=e")]
    assert (args.account, args.from_s, args.to_s, args.format) == ("1", 10.0, None, "csv")
