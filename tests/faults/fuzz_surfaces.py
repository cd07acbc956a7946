"""Everything that reads bytes of foreign making, with valid examples to be spoilt and what may come out.

A surface's `read` takes any bytes and gives a word of what they were; it raises what the reader declares (`declared`), or there is a finding. It
also asks of what was taken what whoever takes it relies on: that it can be written again and reads back the same, that its dead
letters can be made, that PostgreSQL's text can hold it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np

from ingest import assign, letters, objects, revive, wire
from ingest.batch import span_of, without_series
from ingest.cur import BadReport
from ingest.cur import read as read_cur
from ingest.errors import HeadgateError, Rejected
from ingest.inventory import csv_file
from ingest.inventory.refresh import looks_of
from ingest.model import Batch, DeadLetter, Receipt, RecordPosition, Task
from ingest.ports import Record
from ingest.sources.exposition import Exposed, endpoint_of, endpoints_in, parse
from ingest.validate import validate
from shard_config.document import ConfigErrors
from shard_config.late import late_names
from shard_config.load import load
from shard_config.model import ExpositionJob, Limits
from tests.faults.mutate import Shape
from tests.faults.truth import START_S, Truth
from workers.rules import migrated, read_text
from workers.yace import translated

TESTS = Path(__file__).resolve().parents[1]
NOW_S = START_S + 86_400
LIMITS = Limits()
ENVIRON = {"HEADGATE_TEST_SECRET": "s3cr3t"}


@dataclass(frozen=True, slots=True)
class Surface:
    """One reader. `words` are texts that mean something to it; CPU seconds and bytes above the caps are findings."""

    name: str
    shape: Shape
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], str]
    declared: tuple[type[Exception], ...]
    words: tuple[bytes, ...] = ()
    cpu_s_max: float = 5.0
    memory_bytes_max: int = 256 << 20


def surfaces(home: Path) -> tuple[Surface, ...]:
    """All of them. What a reader wants as a file is written into `home`."""
    return (*_messages(), *_files(home), *_expositions())


# --- what travels and what is archived --------------------------------------------------------------------------


def golden(name: str) -> bytes:
    return bytes.fromhex((TESTS / "golden" / f"{name}.hex").read_text())


def _messages() -> Iterable[Surface]:
    rejected = (Rejected,)
    looks = Truth(1, targets=1, series=3, windows=2).looks
    batches = (golden("batch-as-it-travels"), looks[0].published.value)
    yield Surface("batch", Shape.BATCH, batches, read_batch, rejected)
    tasks = tuple(golden(f"task.v{n}") for n in (1, 2, 3))
    receipts = (
        golden("receipt.v1"), golden("receipt.v2"), wire.encode_receipt(looks[0].archived.receipt)
    )  # fmt: skip
    yield Surface("ledger", Shape.AVRO, tasks + receipts, read_ledger, rejected)
    dead = (golden("dead_letter.v1"), golden("dead_letter.v2"), *_letters_of(looks[0].published.value))
    yield Surface("dead letter", Shape.AVRO, dead, read_dead, rejected)
    assignments = (golden("assignment.v1"), golden("assignment.v2"))
    yield Surface("assignment", Shape.AVRO, assignments, read_assignment, rejected)
    yield Surface("incarnation", Shape.AVRO, (golden("incarnation.v1"),), read_incarnation, rejected)
    yield Surface("member", Shape.AVRO, (golden("member.v1"),), read_member, rejected)
    inline = objects.pack(looks[0].archived)[1]
    parts, manifest = objects.pack(looks[1].archived, object_bytes_max=16)
    yield Surface("archive object", Shape.OBJECT, (inline, manifest, parts[0].body), read_object, rejected)


def _record(value: bytes) -> Record:
    return Record(RecordPosition("t.raw", 0, 1), b"cloudwatch/123456789012/eu-west-1/0", value, NOW_S * 1000)


def _letters_of(value: bytes) -> list[bytes]:
    """Of a batch whose series are refused, and of its points as if they were bad."""
    batch = wire.decode_batch(value, LIMITS)
    spoilt = Batch(
        **{name: getattr(batch, name) for name in Batch.__slots__} | {"values": batch.values * np.nan}
    )
    checked = validate(spoilt, NOW_S, LIMITS)
    made = [
        *letters.of_series(
            {0: "labels_differ"}, "others", batch, wire.batch_id_of(value), _record(value), "c"
        ),
        *letters.of_points(checked.dead[:1], spoilt, _record(value), "c"),
        letters.of_record(_record(value), "c", Rejected("batch", "bad_frame", "of a test")),
    ]
    return [wire.encode_dead_letter(letter) for letter in made]


def read_batch(value: bytes) -> str:
    """As a consumer takes it (`ingest.landing`), and as `headgate backfill` looks into it."""
    try:
        decoded = wire.decode_by_series(value, LIMITS)
    except Rejected as error:
        _holds(letters.of_record(_record(value), "c", error))
        raise
    batch, bad = decoded.batch, decoded.bad
    dead = list(letters.of_series(bad, "", batch, wire.batch_id_of(value), _record(value), "c"))
    good = without_series(batch, bad)
    checked = validate(good, NOW_S, LIMITS)
    dead += letters.of_points(checked.dead, good, _record(value), "c")
    for letter in dead[:5]:
        _holds(letter)
    if checked.accepted is not None and checked.accepted.points:
        for payload in wire.encode_batch(checked.accepted, LIMITS):
            again = wire.decode_batch(payload.value, LIMITS)
            assert again.series
            assert again.version == batch.version
            span_of(payload.value)
    return (
        f"{len(bad)} bad, {len({letter.reason for letter in dead})} reasons, {checked.accepted is not None}"
    )


def _holds(letter: DeadLetter) -> None:
    """A letter can be written, is read back the same, and can be listed and revived or refused."""
    value = wire.encode_dead_letter(letter)
    assert wire.decode_dead_letter(value) == letter
    read_dead(value)


def read_ledger(value: bytes) -> str:
    fact = wire.decode_ledger(value)
    if isinstance(fact, Task):
        assert wire.decode_task(wire.encode_task(fact)) == fact
        return f"{fact.kind} {[len(item.windows()) > 1 for item in fact.items[:3]]}"
    return _receipt(fact)


def _receipt(receipt: Receipt) -> str:
    assert wire.decode_receipt(wire.encode_receipt(receipt)) == receipt
    return " ".join(str(done.outcome.status) for done in receipt.items[:3])


def read_dead(value: bytes) -> str:
    letter = wire.decode_dead_letter(value)
    letters.account_of(letter)
    found = revive.plan([letter], LIMITS, NOW_S)
    assert wire.decode_dead_letter(wire.encode_dead_letter(letter)) == letter
    return "revived" if found.revivals else "refused"


def read_assignment(value: bytes) -> str:
    found = assign.decode_assignment(value)
    assert assign.decode_assignment(assign.encode_assignment(found)) == found
    slots = len(found.owners)
    assert len(assign.owners_of(found, {"exporter-1", "exporter-2"}, max(1, slots))) == max(1, slots)
    return f"{bool(found.shares)} {bool(found.together)}"


def read_incarnation(value: bytes) -> str:
    found = assign.decode_incarnation(value)
    assert assign.decode_incarnation(assign.encode_incarnation(found)) == found
    return "read"


def read_member(value: bytes) -> str:
    found = assign.decode_member(value)
    assign.newest([found], None)
    return "read"


def read_object(body: bytes) -> str:
    """As the archive reads it whole, and its tail alone."""
    manifest = objects.unpack(body)
    assert objects.unpack_tail(body) == manifest.receipt
    if manifest.parts:
        return "parts"
    objects.assemble(manifest, ())
    return _receipt(manifest.receipt)


# --- files --------------------------------------------------------------------------------------------------------


def _files(home: Path) -> Iterable[Surface]:
    def of_file(read: Callable[[Path], str], name: str) -> Callable[[bytes], str]:
        path = home / name

        def reading(raw: bytes) -> str:
            path.write_bytes(raw)
            return read(path)

        return reading

    configs = tuple(p.read_bytes() for p in sorted((TESTS / "config").glob("*.yml")))
    yield Surface(
        "configuration", Shape.TEXT, configs, of_file(_configuration, "headgate.yaml"), (ConfigErrors,), YAML
    )
    yaces = tuple(p.read_bytes() for p in sorted((TESTS / "config" / "yace").glob("*.yml")))
    yield Surface(
        "yace", Shape.TEXT, yaces, of_file(_yace, "config.yml"), (ConfigErrors, HeadgateError), YAML
    )
    yield Surface("rules", Shape.TEXT, RULES, of_file(_rules, "rules.yml"), (ConfigErrors,), PROMQL + YAML)
    yield Surface(
        "inventory", Shape.TEXT, INVENTORY, of_file(_inventory, "inventory.csv"), (HeadgateError,), CSV
    )
    reports = (*CUR, gzip.compress(CUR[0], mtime=0))
    yield Surface("cost report", Shape.TEXT, reports, of_file(_report, "cur.csv"), (BadReport,), CSV)


def _configuration(path: Path) -> str:
    config = load(path, environ=ENVIRON)
    assert config.model_dump_json()
    late_names(config)
    return f"{bool(config.accounts)} {bool(config.organization)} {bool(config.exposition)}"


def _yace(path: Path) -> str:
    plan, written = translated(path, "123456789012", "http://prometheus:9090/api/v1/write")
    assert written
    return f"{len(plan.services) > 1} {len(plan.notes) > 3}"


def _rules(path: Path) -> str:
    text = read_text(path)
    after, outcomes = migrated(text, str(path), late_names(None))
    assert (after != text) == any(one.verdict == "migrated" for one in outcomes)
    return " ".join(sorted({one.verdict for one in outcomes}))


def _inventory(path: Path) -> str:
    """What was read is written, and read back the same; and PostgreSQL can hold it."""
    looks = looks_of(path, NOW_S)
    resources = [one for look in looks for one in look.resources]
    out = StringIO(newline="")
    csv_file.write(resources, out)
    assert "\0" not in out.getvalue()
    assert "\\u0000" not in out.getvalue()
    again = csv_file.read(out.getvalue(), NOW_S)
    assert sorted(map(repr, resources)) == sorted(repr(one) for look in again for one in look.resources)
    return f"{len(looks) > 1}"


def _report(path: Path) -> str:
    bill = read_cur([path])
    return f"{bill.used > 0} {bill.credits_usd != 0}"


# --- endpoints ----------------------------------------------------------------------------------------------------


def _expositions() -> Iterable[Surface]:
    job = ExpositionJob(
        name="node", account="123456789012", region="eu-west-1", endpoints=("http://127.0.0.1:9100/metrics",)
    )
    endpoint = endpoint_of("http://127.0.0.1:9100/metrics")

    def scraped(raw: bytes) -> str:
        body = raw.decode(errors="replace")
        found = [
            parse(body, openmetrics, job, endpoint, NOW_S, NOW_S * 1000, Exposed(), LIMITS)
            for openmetrics in (raw[:1] == b"\n",)
        ]
        return f"{[bool(one.series) for one in found]} {found[0].nans > 0} {found[0].repeated > 0}"

    def listed(raw: bytes) -> str:
        return f"{bool(endpoints_in(raw, 'file_sd'))}"

    yield Surface("exposition", Shape.TEXT, EXPOSITIONS, scraped, (Rejected,), EXPOSED)
    yield Surface("file_sd", Shape.TEXT, FILE_SD, listed, (Rejected,), JSON)


# --- examples and words -------------------------------------------------------------------------------------------

YAML = (
    b"&a ", b"*a", b"!!python/object:os.system ", b"- ", b": ", b"? ", b"| \n", b">-\n ", b"<<: *a\n", b"---\n", b"...\n", b"\t",
    b"{", b"}", b"[" * 30, b"]", b"'", b'"', b"\\x00", b"\\ud800", b"\xff\xfe", b"\xef\xbb\xbf", b"~", b"null", b"true", b".inf",
    b"-.nan", b"1e999", b"-1", b"0x7fffffffffffffff", b"9" * 40, b"10000000000000000000000", b"env:HEADGATE_TEST_SECRET", b"file:/",
    b"file:\\0", b"all", b"\xd9\xa1" * 12, b"\xe2\x80\xa8", b"*", b"(?P<", b"(a+)+$", b"%YAML 9.9\n", b"# ", b"\r", b"\x00", b"\x85",
)  # fmt: skip
PROMQL = (
    b"aws_ec2_cpuutilization_average", b"offset -5m", b"[5m:1m]", b"[99999999999999999999y]", b"@ end()", b"rate(", b")", b"((((", b"by (",
    b'{name=~"(a+)+"}', b"1e400", b"{{ $labels.x }}", b"> bool 1", b"on() group_left()", b'"\\\n"', b"''", b"\\\n", b"last_over_time(",
)  # fmt: skip
CSV = (
    b'"', b'""', b",", b"\r\n", b"\r", b"\x00", b"\xef\xbb\xbf", b"\xd9\xa1" * 12, b"0001-01-01T00:00:00+14:00", b"9999-12-31T23:59:59-14:00",
    b"1969-12-31T23:59:59Z", b"2026-W48-2", b"-0", b"1e99", b"1e-99", b"NaN", b"9" * 19, b"9" * 18, b'{""a"":""\\u0000""}', b'{""a"":1}',
    b'{""a"":""b"",""a"":""c""}', b"[" * 3000, b"-1", b"\xe2\x80\xa8", b"\x1f\x8b", b"PAR1", b"EUR", b"Credit", b"CW:GMD-Metrics", b"=cmd|'",
)  # fmt: skip
JSON = (
    b"null", b"[]", b"{}", b'"\\u0000"', b'"\\ud800"', b"[" * 1000, b"1e999", b'"targets"', b'"labels"', b'"__scheme__"', b"[::1]:99999", b"]:",
    b'"a:b:c"', b"http://", b"\\", b"-1",
)  # fmt: skip
EXPOSED = (
    b"NaN", b"+Inf", b"{", b"}", b'"', b"\\", b'le="', b"# EOF\n", b"# TYPE a histogram\n", b"# {a=\"b\"} 1 ", b"1e999", b"9" * 40, b"a" * 3000, b" ",
    b"\n", b"\x00", b"_created", b'{"a.b",c="d"} 1\n', b"0x1p-3", b"1_000", b"{a=\"b\",a=\"c\"}",
)  # fmt: skip
RULES = (
    b"""groups:
  - name: a
    rules:
      - alert: Busy  # of the month
        expr: 'aws_ec2_cpuutilization_average{account_id="123456789012"} > 90'
        for: 5m
        labels: {severity: page}
        annotations: {summary: "{{ $labels.name }} is busy"}
      - record: a:b
        expr: |
          sum by (name) (rate(aws_rds_read_iops_average[10m]))
            / on (name) group_left max_over_time(aws_rds_cpuutilization_average[1h:5m])
      - alert: Gone
        expr: "absent(aws_sqs_number_of_messages_sent_sum) and up == 0"
""",
    b"""apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {name: a}
spec:
  groups:
    - name: b
      query_offset: 1m
      rules: [{alert: A, expr: 'avg_over_time(aws_ec2_cpuutilization_average[5m] offset 1m) < 1'}, {record: c, expr: up}]
""",
)
INVENTORY = (
    b"""account,region,service,id,arn,type,engine,purchase,vcpu,memory_bytes,nodes,storage_bytes,state,state_since,created,attached_to,role,multi_az,tags
123456789012,eu-west-1,ec2,i-0123456789abcdef0,arn:aws:ec2:eu-west-1:123456789012:instance/i-0123456789abcdef0,m5.large,,on-demand,2,8589934592,,,running,2026-11-24T05:00:00Z,2026-01-01T00:00:00Z,,,,"{""team"":""search""}"
123456789012,eu-west-1,rds,db-1,,db.r6g.large,postgres,,2,17179869184,2,107374182400,,,2026-01-01T00:00:00+02:00,a b,,true,
""",
    b"account,region,service,id\n123456789012,us-east-1,sqs,queue-1\n",
)
CUR = (
    b"""identity/LineItemId,bill/InvoiceId,lineItem/LineItemType,lineItem/UsageStartDate,lineItem/UsageEndDate,lineItem/UsageAccountId,lineItem/UsageType,lineItem/Operation,lineItem/UsageAmount,lineItem/CurrencyCode,lineItem/UnblendedRate,lineItem/UnblendedCost
a,,Usage,2026-11-24T05:00:00Z,2026-11-24T06:00:00Z,123456789012,EUW1-CW:GMD-Metrics,GetMetricData,1000,USD,0.00001,0.0100000000
b,,Usage,2026-11-24T05:00:00Z,2026-11-24T06:00:00Z,123456789012,CW:Requests,ListMetrics,10,USD,0.00001,0.0001
c,,Credit,2026-11-24T05:00:00Z,2026-11-24T06:00:00Z,123456789012,CW:Requests,ListMetrics,10,USD,0.00001,-0.0001
""",
    b"""line_item_usage_start_date,line_item_usage_account_id,line_item_usage_type,line_item_operation,line_item_usage_amount,line_item_unblended_cost,line_item_line_item_description
2026-11-24T05:00:00.000Z,123456789012,CW:GMD-Metrics,GetMetricData,1e3,0.01,"$0.01 per 1,000 metrics"
""",
)
FILE_SD = (
    b'[{"targets": ["node-1:9100", "[::1]:9100"], "labels": {"team": "a", "__scheme__": "https", "__metrics_path__": "/m"}}, {"targets": []}]',
)
EXPOSITIONS = (
    b"""# HELP a What it is.
# TYPE a counter
a{b="c",d="\\"\\n"} 1 1795478400000
a{b="e"} NaN
h_bucket{le="0.5"} 3
h_bucket{le="+Inf"} 4
h_sum 1.5e3
h_count 4
""",
    b"""
# TYPE a counter
# UNIT a_seconds seconds
a_total{b="c"} 1 # {trace_id="x"} 0.5
# EOF
""",
)
