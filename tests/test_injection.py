"""Names are data: whatever AWS, a tag or a file calls something, it is no SQL, no key, no label syntax, no formula, no terminal's command."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ingest import wire
from ingest.archive import archive_key, checked_key
from ingest.errors import Rejected
from ingest.log import Outgoing
from ingest.model import Batch, LookStatus, Series, SeriesKey, Target, series_ids
from ingest.report.tables import cell
from ingest.scan import scan
from ingest.series_labels import Labels
from ingest.validate import series_problem
from shard_config.load import ConfigErrors, loads
from shard_config.model import Config, Limits
from tests.test_validate import batch_of
from tests.way import NOON_S, TARGET, Way, the_way
from workers.samples import Filter, find_series, show

ROOT = Path(__file__).resolve().parent.parent

WILD = (
    "'; DROP TABLE samples; --",
    "' OR '1'='1",
    "$1", "%s", "{0}", "%", "_", "%%", "\\\\", "\\", "E'\\x27'",
    "$$; SELECT pg_sleep(9); $$",
    "../../../etc/passwd", "/absolute", "a/../b", "..", "v1/cloudwatch/999999999999",
    '"} or vector(1) or {x="', 'a",b="c', "{{ $labels }}", "$__all", ".*", "a|b", "(",
    "<script>alert(1)</script>", "javascript:alert(1)", "&lt;b&gt;", '" onload="x',
    "=1+1", "+1", "-1", "@SUM(A1)", "=HYPERLINK(\"http://x\")",
    "[bold]x[/bold]", "[link=http://x]y[/link]", "[/]",
    "аdmin", "ﬀ", "Ａ", "e\u0301", "\u202etxt.exe", "\u200bzero", "\ufeff", "🙂", "Ω" * 500,
    "x" * 4096, " leading", "trailing ", "NULL", "None", "null", "NaN", "0", "",
)  # fmt: skip
"""Texts that may be a label: they land as they are, and are read back as they are."""

CONTROL = (
    "a\x00b",
    "line\nline",
    "\r\nSet-Cookie: x",
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b31m",
    "\u2028",
    "\x7f",
    "\x08\x08",
)
"""Texts that may not: a terminal, a log or PostgreSQL would take them for more than text."""


def key_of(text: str, number: int) -> SeriesKey:
    """A series with the text in every place that AWS or an exporter fills in."""
    dimensions = tuple(sorted({f"{text[:4000]}{number}": text, "Plain": text}.items()))
    return SeriesKey(TARGET.account, TARGET.region, text or "x", text or "x", dimensions, "Average", 60)


def batch_with(keys: list[SeriesKey]) -> Batch:
    series = tuple(Series(key) for key in keys)
    made = batch_of(*([(NOON_S, float(i))] for i in range(len(keys))))
    return replace(made, series=series, ids=series_ids(series), target=TARGET, observed_at_ms=NOON_S * 1000)


@pytest.fixture
async def way(database: str, kafka_bootstrap: str, topic_prefix: str, bucket: str, s3_endpoint: str):  # type: ignore[no-untyped-def]
    async with the_way(database, kafka_bootstrap, topic_prefix, bucket, s3_endpoint) as one:
        yield one


async def publish(way: Way, *batches: Batch) -> None:
    for batch in batches:
        values = [Outgoing(wire.raw_key(TARGET), p.value) for p in wire.encode_batch(batch)]
        await way.producer.send(way.config.kafka.topic("raw"), values)


# --- the store -----------------------------------------------------------------------------------------------------


async def test_wild_names_land_as_they_are_and_are_found_by_themselves_alone(way: Way) -> None:
    keys = [key_of(text, i) for i, text in enumerate(WILD)]
    await publish(way, batch_with(keys))
    await way.land()

    assert await way.sql.fetchval("SELECT count(*) FROM samples") == len(WILD)
    for i, (text, key) in enumerate(zip(WILD, keys, strict=True)):
        found = await find_series(way.sql, Filter(metric=key.metric, dimensions=key.dimensions), 10)
        assert [(f.metric, json.loads(f.dimensions)) for f in found] == [(key.metric, dict(key.dimensions))]
        if text in ("%", "_", ".*", "$__all"):  # as text, not as a pattern of any
            assert len(await find_series(way.sql, Filter(metric=text), 100)) == 1
        out = io.StringIO()
        assert await show(way.sql, Filter(metric=key.metric, dimensions=key.dimensions), "csv", out, out) == 0
        assert out.getvalue().split(",")[-1].strip() == repr(float(i))
    whole = io.StringIO()
    assert await show(way.sql, Filter(), "json", whole, whole) == 0
    shown = json.loads(whole.getvalue())
    assert {(s["namespace"], json.dumps(s["dimensions"], sort_keys=True)) for s in shown} == {
        (k.namespace, json.dumps(dict(k.dimensions), sort_keys=True)) for k in keys
    }


async def test_names_with_control_characters_are_put_aside_and_printed_as_text(way: Way) -> None:
    good = key_of("good", 0)
    bad = [key_of(text, i) for i, text in enumerate(CONTROL, 1)]
    series = [good, *bad]
    value = wire_of(batch_with(series))
    await way.producer.send(way.config.kafka.topic("raw"), [Outgoing(wire.raw_key(TARGET), value)])
    await way.land()
    letters = []

    def take(record) -> bool:  # type: ignore[no-untyped-def]
        letters.append(wire.decode_dead_letter(record.value))
        return False

    await scan(way.config.kafka, way.config.kafka.topic("dead"), take)
    assert await way.sql.fetchval("SELECT count(*) FROM samples") == 1
    assert [letter.reason for letter in letters] == ["control_character"] * len(CONTROL)
    assert all(letter.series.isprintable() and letter.detail.isprintable() for letter in letters)


def wire_of(batch: Batch) -> bytes:
    """A batch as somebody who checks nothing would write it."""
    with pytest.MonkeyPatch.context() as blind:
        blind.setattr("ingest.series_table._check_texts", lambda *_: None)
        [payload] = wire.encode_batch(batch)
    return payload.value


async def test_what_a_source_quotes_ends_up_as_text_in_the_receipt_the_ledger_and_on_a_terminal(
    way: Way,
) -> None:
    said = (
        "AccessDenied: \x00 \x1b[2J\nforged\r\ud800 [bold red]x[/] '; DROP TABLE looks; -- " + "y" * 100_000
    )
    receipt = await way.look(status=LookStatus.FAILED, detail=said)
    way.clock.advance(4 * 3600)
    await way.land()

    [row] = await way.sql.fetch("SELECT detail FROM looks")
    assert row["detail"] == receipt.items[0].outcome.detail
    assert row["detail"].isprintable()
    assert "\\u0000" in row["detail"]
    assert "[bold red]x[/] '; DROP TABLE looks; --" in row["detail"]
    assert len(row["detail"]) < 5_000


# --- SQL -----------------------------------------------------------------------------------------------------------

SQL = re.compile(
    r"\b(SELECT\b.*\bFROM|SELECT EXISTS|INSERT INTO|UPDATE \w+ SET|DELETE FROM|(ALTER|DROP|CREATE|LOCK) TABLE|TRUNCATE|"
    r"SET (LOCAL |TRANSACTION )?\w+( =|\b))"
)

REVIEWED = {
    "ingest/compare/state.py": "no SQL is made here: a count modulo another",
    "ingest/compare/store.py": "a constant number",
    "ingest/glance.py": "a constant condition, and the numbers of parameters",
    "ingest/overview.py": "the same",
    "ingest/report/connections.py": "a number of ours; the id of a snapshot, which PostgreSQL itself gave",
    "ingest/report/ledger_side.py": "constants",
    "ingest/sinks/partitions.py": "names of tables: constants and days; times and an owner that PostgreSQL itself wrote, the owner quoted (regrole)",
    "ingest/sinks/rollup_read.py": "names of columns and tables: constants, looked up by their names",
    "ingest/snapshot.py": "names of tables and columns: constants, and the catalogue's; those of a snapshot are compared with it first",
    "workers/samples.py": "names of columns: the fields of Filter; their values are bound",
    "workers/scale.py": "a constant condition, and the numbers of parameters",
}
"""Files that put SQL together of more than constants' names, and why none of it is of others."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("ingest", "workers", "shard_config"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if SQL.search(" ".join(text.split())):
                yield str(path.relative_to(ROOT)), ast.parse(text)


CONSTANT = re.compile("_?[A-Z][A-Z0-9_]*")


def pieces(node: ast.JoinedStr | ast.BinOp | ast.Call) -> list[ast.expr]:
    """What a text is put together from, besides what is written there."""
    if isinstance(node, ast.JoinedStr):
        return [value.value for value in node.values if isinstance(value, ast.FormattedValue)]
    return (
        [node.right] if isinstance(node, ast.BinOp) else [*node.args, *(word.value for word in node.keywords)]
    )


def sql_put_together(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions that make SQL of more than the module's capital constants: f-strings, `+`, `%` and `format`."""
    for node in ast.walk(tree):
        made = (
            isinstance(node, ast.JoinedStr)
            or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add))
            or (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "format"
            )
        )
        if made and SQL.search(" ".join(ast.unparse(node).split())):
            inner = [p for p in pieces(node) if not isinstance(p, ast.Constant)]  # type: ignore[arg-type]
            if any(not (isinstance(p, ast.Name) and CONSTANT.fullmatch(p.id)) for p in inner):
                yield node  # type: ignore[misc]


def test_no_sql_is_put_together_but_of_reviewed_pieces() -> None:
    found = {path: [node.lineno for node in sql_put_together(tree)] for path, tree in modules()}
    found = {path: lines for path, lines in found.items() if lines}
    assert {path: lines for path, lines in found.items() if path not in REVIEWED} == {}
    assert [path for path in REVIEWED if path not in found] == [], "no longer needed"


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ('run(f"SELECT x FROM t WHERE a = {name}")', True),
        ('query = "SELECT x FROM t WHERE a = " + name', True),
        ('"DELETE FROM t WHERE a = %s" % name', True),
        ('"INSERT INTO t VALUES ({})".format(name)', True),
        ('run(f"SELECT x FROM t WHERE {_LATE}")', False),
        ('run("SELECT x FROM t WHERE a = $1", name)', False),
    ],
)
def test_the_search_for_sql_finds_what_it_is_for(code: str, caught: bool) -> None:
    assert bool(list(sql_put_together(ast.parse(code)))) == caught


# --- the archive's keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [*WILD, *CONTROL, "12345678901", "1234567890123", "١٢٣٤٥٦٧٨٩٠١٢", "123456789012\n"]
)
def test_a_wild_account_or_region_has_no_key_and_its_task_is_none(text: str) -> None:
    if text in ("0", "x" * 4096):
        text += "/"
    way_task = replace_target(Target("cloudwatch", text, "eu-west-1"))
    with pytest.raises(Rejected) as refused:
        archive_key(way_task)
    assert refused.value.reason == "bad_key"
    assert str(refused.value).isprintable()


def replace_target(target: Target):  # type: ignore[no-untyped-def]
    from ingest.model import Task, TaskItem

    return Task("0" * 32, target, "rev", NOON_S, 0, "live", 0, (TaskItem("ec2", NOON_S - 300, NOON_S, 300),))


@pytest.mark.parametrize(
    "key",
    [
        "v1/cloudwatch/123456789012/eu-west-1/2026/01/01/../1767268800-" + "0" * 32,
        "/v1/cloudwatch/123456789012/eu-west-1/2026/01/01/1767268800-" + "0" * 32,
        "v1/cloudwatch/123456789012/eu-west-1/2026/01/01/1767268800-" + "0" * 32 + "\n",
        "v1/cloudwatch/12345678901２/eu-west-1/2026/01/01/1767268800-" + "0" * 32,
        "v1/cloudwatch/123456789012/eu-west-1\x00/2026/01/01/1767268800-" + "0" * 32,
        "v1/cloudwatch/123456789012//2026/01/01/1767268800-" + "0" * 32,
        "v1/cloudwatch/123456789012/eu-west-1/2026/01/01/1767268800-" + "G" * 32,
        "v1/cloudwatch/123456789012/" + "e" * 10_000 + "/2026/01/01/1767268800-" + "0" * 32,
    ],
)
def test_a_wild_key_is_refused_on_replay(key: str) -> None:
    with pytest.raises(Rejected) as refused:
        checked_key(key)
    assert refused.value.reason == "bad_key"


# --- remote write --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["yace", "headgate"])
def test_wild_names_are_values_of_labels_or_refused_and_never_syntax(names: str) -> None:
    config = Config.model_validate(
        {
            "accounts": [
                {"id": TARGET.account, "regions": [TARGET.region], "services": ["ec2"], "alias": WILD[0]}
            ],
            "services": [{"service": "ec2", "namespace": "AWS/EC2"}],
            "remote_write": {"receivers": [{"name": "a", "url": "http://h/w"}], "names": names},
        }
    )
    labels = Labels(config)
    sent, reasons = 0, set()
    for i, text in enumerate(WILD + CONTROL):
        try:
            found = dict(labels.of(Series(key_of(text, i)), "ec2", TARGET, None))
        except Rejected as refused:
            reasons.add(refused.reason)
            continue
        sent += 1
        assert re.fullmatch("[a-zA-Z_:][a-zA-Z0-9_:]*", found.pop("__name__"))
        assert [name for name in found if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name)] == []
    assert sent >= 10
    assert reasons <= {"bad_name", "label_too_long", "labels_taken", "control_character"}


# --- what people open ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [t for t in WILD if t[:1] in "=+-@" and t])
def test_no_cell_of_a_csv_is_a_formula(text: str) -> None:
    out = io.StringIO()
    csv.writer(out).writerow([cell(text), cell(-1.5)])
    assert next(csv.reader(io.StringIO(out.getvalue()))) == [f"'{text}", "-1.5"]


@pytest.mark.parametrize("text", CONTROL)
def test_no_error_of_a_configuration_commands_a_terminal(text: str) -> None:
    quoted = json.dumps(text)
    with pytest.raises(ConfigErrors) as errors:
        loads(
            f"accounts: [{{id: {quoted}, regions: [{quoted}], services: [{quoted}], {quoted}: 1}}]", "f", {}
        )
    assert all(line.isprintable() for line in str(errors.value).split("\n"))


@pytest.mark.parametrize("text", [*CONTROL, "a" * 4097])
def test_a_source_leaves_out_a_series_that_could_not_travel(text: str) -> None:
    assert series_problem(Series(key_of(text, 0)), Limits()) in {"control_character", "label_too_long"}
