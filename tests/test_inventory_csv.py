"""The inventory as a CSV file: what is written is read, and what is wrong is said by line."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest

from ingest.errors import HeadgateError
from ingest.inventory.csv_file import COLUMNS, read, write
from ingest.inventory.model import Look, Resource, Role, Scope, State, cleaned

SCOPE = Scope("000000000001", "eu-west-1", "ec2")
MINIMAL = "account,region,service,id\n000000000001,eu-west-1,ec2,i-1\n"

ODD = [
    "",
    "m7g.large",
    "a,b",
    'say "no"',
    "two\nlines",
    "\r\n",
    "=1+1",
    "ü€😀",
    "{}",
    "'; DROP TABLE",
    "\x1b[31m",
    "\u2028",
]


def anything(rng: random.Random, n: int) -> Resource:
    def text() -> str:
        return "".join(rng.choices(ODD, k=2))

    def number() -> int | None:
        return rng.choice([None, 0, 1, rng.randrange(10**15)])

    return Resource(
        rng.choice(["000000000001", "100000000001"]), rng.choice(["eu-west-1", "us-east-1"]), rng.choice(["ec2", "rds"]), f"i{text()}-{n}",
        arn=text(), type=text(), engine=text(), purchase=text(), group=text(),
        vcpu=number(), memory_bytes=number(), nodes=number(), storage_bytes=number(), storage_max_bytes=number(),
        iops=number(), throughput_bytes_per_s=number(), read_units=number(), write_units=number(),
        state=rng.choice(sorted(set(State) - {State.TERMINATED})),
        state_since_s=rng.choice([None, 0, 1_790_000_000]), created_s=rng.choice([None, 1, 1_790_000_000]),
        attached_to=tuple(f"i-{k}" for k in range(rng.randrange(3))),
        role=rng.choice(list(Role)),
        multi_az=rng.choice([None, True, False]),
        tags={text(): text() for _ in range(rng.randrange(3))},
    )  # fmt: skip


def text_of(some: list[Resource]) -> str:
    out = io.StringIO(newline="")
    write(some, out)
    return out.getvalue()


def said(text: str) -> list[str]:
    with pytest.raises(HeadgateError) as caught:
        read(text, 1, "file.csv")
    head, *lines = str(caught.value).split("\n  ")
    assert head == "file.csv: nothing was imported:"
    return lines


@pytest.mark.parametrize("seed", range(5))
def test_what_is_written_is_read_back(seed: int) -> None:
    rng = random.Random(seed)
    some = [cleaned(anything(rng, n)) for n in range(100)]
    looks = read(text_of(some), 7)
    assert sorted((one for look in looks for one in look.resources), key=repr) == sorted(some, key=repr)
    assert {(look.source, look.at_s, look.failure, look.empty_is_doubtful) for look in looks} == {
        ("csv", 7, "", False)
    }


def test_a_file_is_one_whole_look_of_each_scope_in_it() -> None:
    text = MINIMAL + "000000000001,eu-west-1,ec2,i-2\n000000000001,us-east-1,ec2,i-3\n"
    assert [(look.scope.region, [one.id for one in look.resources]) for look in read(text, 1)] == [
        ("eu-west-1", ["i-1", "i-2"]),
        ("us-east-1", ["i-3"]),
    ]


def test_columns_may_be_left_out_and_stand_in_any_order_and_a_bom_is_no_part_of_them() -> None:
    text = '\ufeffid, tags ,service,region,account\r\ni-1,"{""team"": ""search""}",ec2,eu-west-1,000000000001\r\n\r\n'
    [look] = read(text, 1)
    assert look == Look.whole(
        SCOPE, "csv", 1, [Resource("000000000001", "eu-west-1", "ec2", "i-1", tags={"team": "search"})]
    )


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("account", "1", "is no account: 12 digits, and no spreadsheet may take them for a number"),
        ("account", "1.00E+11", "is no account: 12 digits, and no spreadsheet may take them for a number"),
        ("region", "eu west", "is no name of small letters, digits, - and _"),
        ("service", "AWS/EC2", "is no name of small letters, digits, - and _"),
        ("vcpu", "2.5", "is no whole number ≥ 0"),
        ("memory_bytes", "-1", "is no whole number ≥ 0"),
        ("storage_bytes", "8 GiB", "is no whole number ≥ 0"),
        ("iops", "9" * 19, "is no whole number ≥ 0"),
        ("created", "yesterday", "is no time as 2026-11-24T05:00:00Z"),
        ("created", "2026-11-24T05:00:00", "has no time zone: write 2026-11-24T05:00:00Z"),
        ("state_since", "1960-01-01T00:00:00Z", "is before 1970"),
        ("state", "terminated", "is none of running, starting, stopped, standby, detached, failed"),
        ("role", "boss", "is none of writer, reader, replica"),
        ("multi_az", "yes", "is neither true nor false"),
        ("tags", "team=search", 'is no JSON object of texts, as {"team": "search"}'),
        ("tags", '{"team": 1}', 'is no JSON object of texts, as {"team": "search"}'),
        ("tags", "[" * 5000, 'is no JSON object of texts, as {"team": "search"}'),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_by_line_and_column(column: str, value: str, what: str) -> None:
    cells: dict[str, Any] = {
        "account": SCOPE.account,
        "region": SCOPE.region,
        "service": SCOPE.service,
        "id": "i-2",
    }
    quoted = {**cells, column: '"' + value.replace('"', '""') + '"'}
    text = ",".join(quoted) + "\n" + ",".join(quoted.values()) + "\n"
    assert said(text) == [f"line 2: {column} {value[:60]!r} {what}"]


def test_all_that_is_wrong_is_said_at_once_up_to_a_bound() -> None:
    text = MINIMAL + "x,eu-west-1,ec2,\n000000000001,eu-west-1,ec2\n000000000001,eu-west-1,ec2,i-1\n"
    assert said(text) == [
        "line 3: id is empty",
        "line 3: account 'x' is no account: 12 digits, and no spreadsheet may take them for a number",
        "line 4: 3 cells, and the header has 4",
        "line 5: i-1 stands in line 2 already",
    ]
    lines = said(MINIMAL + "x,eu-west-1,ec2,i-1\n" * 1000)
    assert len(lines) == 21
    assert lines[-1] == "and perhaps more"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "line 1: the column 'account' is missing"),
        ("account,region,service\n", "line 1: the column 'id' is missing"),
        (
            "account,region,service,id,size\n",
            f"line 1: there is no column 'size': there are {', '.join(COLUMNS)}",
        ),
        ("account,region,service,id,id\n", "line 1: the column 'id' is there twice"),
        (MINIMAL + 'a,b,c,"d\n', "line 3: unexpected end of data"),
    ],
)
def test_a_file_that_is_no_table_is_refused(text: str, what: str) -> None:
    assert what in said(text)


def test_a_file_without_resources_forgets_nothing() -> None:
    [line] = said("account,region,service,id\n")
    assert line.startswith("no resource is in it")
