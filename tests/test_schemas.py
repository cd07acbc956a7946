"""Schemas: what was released never changes, and each version can be read by its neighbours.

A new version: copy the newest file to the next number, add fields with defaults, add its golden bytes (tests/test_wire.py) and its line in
tests/golden/schemas.txt. These tests say what was forgotten.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import fastavro
import pytest

from ingest import avro

SCHEMAS = Path(avro.__file__).parent / "schemas"
GOLDEN = Path(__file__).parent / "golden"
RELEASED = dict(line.split() for line in (GOLDEN / "schemas.txt").read_text().splitlines())
"""File → blake2b-128 of its content."""

Schema = Any
"""JSON of an Avro schema."""


def content_id(raw: bytes) -> str:
    return blake2b(raw, digest_size=16).hexdigest()


def versions(name: str) -> list[tuple[int, Schema]]:
    """All versions of a schema, oldest first."""
    found = [(int(path.stem.rpartition(".v")[2]), path) for path in SCHEMAS.glob(f"{name}.v*.avsc")]
    return [(version, json.loads(path.read_text())) for version, path in sorted(found)]


NAMES = sorted({path.name.split(".")[0] for path in SCHEMAS.glob("*.avsc")})
NEIGHBOURS = [
    pytest.param(name, older, newer, id=f"{name} {a} to {b}")
    for name in NAMES
    for (a, older), (b, newer) in pairwise(versions(name))
]


# --- released is released ---------------------------------------------------------------------------------------


def test_a_released_schema_is_never_changed_nor_removed_and_a_new_one_is_registered() -> None:
    there = {path.name: content_id(path.read_bytes()) for path in SCHEMAS.glob("*.avsc")}
    assert there == RELEASED


def test_versions_are_numbered_without_a_gap() -> None:
    for name in NAMES:
        assert [version for version, _ in versions(name)] == list(range(1, len(versions(name)) + 1))


def test_no_two_schemas_share_a_fingerprint() -> None:
    assert len({schema.fingerprint for schema in avro.SCHEMAS}) == len(avro.SCHEMAS) == len(RELEASED)


# --- compatible -------------------------------------------------------------------------------------------------

PROMOTIONS = {
    "int": {"long", "float", "double"},
    "long": {"float", "double"},
    "float": {"double"},
    "string": {"bytes"},
    "bytes": {"string"},
}
"""What a reader may have where the writer has the key (Avro 1.12, "Schema Resolution")."""


def unreadable(writer: Schema, reader: Schema, at: str = "") -> list[str]:
    """Why data of one schema cannot all be read by another; empty where it can. By Avro's rules, without aliases."""
    return _unreadable(writer, reader, at, _named(writer), _named(reader), set())


def _unreadable(
    w: Schema, r: Schema, at: str, ws: Mapping[str, Schema], rs: Mapping[str, Schema], seen: set[str]
) -> list[str]:
    w, r = (ws.get(w, w) if isinstance(w, str) else w), (rs.get(r, r) if isinstance(r, str) else r)
    if isinstance(w, list):
        # Any branch may have been written.
        return [p for branch in w for p in _unreadable(branch, r, f"{at}|", ws, rs, seen)]
    if isinstance(r, list):
        tried = [_unreadable(w, branch, at, ws, rs, seen) for branch in r]
        return [] if [] in tried else [f"{at}: no branch of the reader's union takes {_kind(w)}"]
    wk, rk = _kind(w), _kind(r)
    if wk != rk:
        return [] if rk in PROMOTIONS.get(wk, ()) else [f"{at}: {wk} cannot be read as {rk}"]
    if wk in ("record", "enum", "fixed") and w["name"].rpartition(".")[2] != r["name"].rpartition(".")[2]:
        return [f"{at}: {w['name']} cannot be read as {r['name']}"]
    match wk:
        case "record":
            if w["name"] in seen:
                return []
            return _fields(w, r, at, ws, rs, seen | {w["name"]})
        case "fixed" if w["size"] != r["size"]:
            return [f"{at}: a fixed of {w['size']} bytes cannot be read as one of {r['size']}"]
        case "enum" if "default" not in r and (unknown := set(w["symbols"]) - set(r["symbols"])):
            return [f"{at}: the reader does not know {sorted(unknown)}"]
        case "array":
            return _unreadable(w["items"], r["items"], f"{at}[]", ws, rs, seen)
        case "map":
            return _unreadable(w["values"], r["values"], f"{at}{{}}", ws, rs, seen)
    return []


def _fields(
    w: Schema, r: Schema, at: str, ws: Mapping[str, Schema], rs: Mapping[str, Schema], seen: set[str]
) -> list[str]:
    written = {field["name"]: field for field in w["fields"]}
    problems = []
    for field in r["fields"]:
        where = f"{at}.{field['name']}"
        if field["name"] in written:
            problems += _unreadable(written[field["name"]]["type"], field["type"], where, ws, rs, seen)
        elif "default" not in field:
            problems.append(f"{where}: the reader wants it, and the writer has none")
    return problems


def _kind(schema: Schema) -> str:
    return str(schema["type"] if isinstance(schema, dict) else schema)


def _named(schema: Schema) -> dict[str, Schema]:
    """Records, enums and fixeds by name, wherever they are defined."""
    found: dict[str, Schema] = {}
    if isinstance(schema, list):
        for one in schema:
            found |= _named(one)
    elif isinstance(schema, dict):
        if schema["type"] in ("record", "enum", "fixed"):
            found[schema["name"]] = schema
        for inner in (schema.get("items"), schema.get("values"), schema["type"]):
            if isinstance(inner, dict | list):
                found |= _named(inner)
        for field in schema.get("fields", ()):
            found |= _named(field["type"])
    return found


@pytest.mark.parametrize(("name", "older", "newer"), NEIGHBOURS)
def test_a_version_reads_the_one_before_and_is_read_by_it(name: str, older: Schema, newer: Schema) -> None:
    assert unreadable(older, newer, name) == []
    assert unreadable(newer, older, name) == []


def read(message: bytes, writer: Schema, reader: Schema) -> Any:
    """A golden message by another schema, as fastavro resolves it."""
    stream = io.BytesIO(message[avro.HEADER_BYTES :])
    return fastavro.schemaless_reader(stream, fastavro.parse_schema(writer), fastavro.parse_schema(reader))


def agree(one: Any, other: Any) -> bool:
    """Equal, but for fields of inner records that only one of them knows."""
    if isinstance(one, dict) and isinstance(other, dict):
        nested = one.keys() <= other.keys() or other.keys() <= one.keys()
        return nested and all(agree(one[k], other[k]) for k in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(agree, one, other))
    return bool(one == other)


@pytest.mark.parametrize(("name", "older", "newer"), NEIGHBOURS)
def test_golden_bytes_are_read_in_both_directions_with_what_both_know_unchanged(
    name: str, older: Schema, newer: Schema
) -> None:
    shared = {f["name"] for f in older["fields"]} & {f["name"] for f in newer["fields"]}
    for writer, reader in ((older, newer), (newer, older)):
        version = next(v for v, schema in versions(name) if schema == writer)
        message = bytes.fromhex((GOLDEN / f"{name}.v{version}.hex").read_text())
        by_itself, by_the_other = read(message, writer, writer), read(message, writer, reader)
        for key in shared:
            assert agree(by_itself[key], by_the_other[key]), key
        assert by_the_other.keys() == {f["name"] for f in reader["fields"]}


def field_of(schema: Schema, name: str) -> Any:
    return next(f for f in schema["fields"] if f["name"] == name)


def without(name: str) -> Callable[[Schema], None]:
    return lambda s: s["fields"].remove(field_of(s, name))


def with_type(name: str, kind: Any) -> Callable[[Schema], None]:
    return lambda s: field_of(s, name).update(type=kind)


def with_field(**field: Any) -> Callable[[Schema], None]:
    return lambda s: s["fields"].append(field)


BAD: dict[str, tuple[str, Callable[[Schema], None]]] = {
    "a field without a default": ("task", with_field(name="x", type="int")),
    "a field that is gone": ("task", without("attempt")),
    "a field by another name": ("task", lambda s: field_of(s, "attempt").update(name="try")),
    "a narrower number": ("task", with_type("tick_s", "int")),
    "a wider number, which the old cannot read": ("task", with_type("attempt", "long")),
    "another type": ("task", with_type("kind", "double")),
    "an enum for a text": ("task", with_type("kind", {"type": "enum", "name": "K", "symbols": ["live"]})),
    "a union with null, which the old cannot read": ("task", with_type("kind", ["null", "string"])),
    "a fixed of another size": (
        "dead_letter",
        with_type("batch_id", {"type": "fixed", "name": "BatchId", "size": 20}),
    ),
    "another record": ("task", lambda s: s.update(name="Job")),
    "an item's field without a default": (
        "task",
        lambda s: field_of(s, "items")["type"]["items"]["fields"].append({"name": "x", "type": "int"}),
    ),
    "a map's values of another type": (
        "receipt",
        lambda s: field_of(field_of(field_of(s, "items")["type"]["items"], "outcome")["type"], "requests")[
            "type"
        ].update(values="string"),
    ),
    "a thing of a list, deep inside, of another size": (
        "receipt",
        lambda s: field_of(field_of(s, "items")["type"]["items"], "batches")["type"]["items"].update(size=8),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_change_that_breaks_a_neighbour_is_caught(what: str) -> None:
    name, change = BAD[what]
    _, newest = versions(name)[-1]
    changed = copy.deepcopy(newest)
    change(changed)
    assert changed != newest
    assert unreadable(newest, changed) + unreadable(changed, newest) != []


@pytest.mark.parametrize(
    "change",
    [
        with_field(name="x", type="int", default=7),
        with_field(name="x", type=["null", "string"], default=None),
        lambda s: s.update(doc="said better"),
        lambda s: s["fields"].reverse(),
    ],
)
def test_a_change_that_breaks_nobody_passes_and_fastavro_agrees(change: Callable[[Schema], None]) -> None:
    version, newest = versions("task")[-1]
    changed = copy.deepcopy(newest)
    change(changed)
    assert unreadable(newest, changed) + unreadable(changed, newest) == []
    message = bytes.fromhex((GOLDEN / f"task.v{version}.hex").read_text())
    assert read(message, newest, changed)["items"] == read(message, newest, newest)["items"]


@pytest.mark.parametrize("what", BAD)
def test_where_fastavro_refuses_golden_bytes_the_rules_do(what: str) -> None:
    """The rules are stricter than one datum can show, and never laxer."""
    name, change = BAD[what]
    version, newest = versions(name)[-1]
    changed = copy.deepcopy(newest)
    change(changed)
    message = bytes.fromhex((GOLDEN / f"{name}.v{version}.hex").read_text())
    try:
        read(message, newest, changed)
    except (fastavro.read.SchemaResolutionError, ValueError, TypeError):
        refused = True
    else:
        refused = False
    assert bool(unreadable(newest, changed)) >= refused


def test_unions_enums_and_recursion_follow_the_specification() -> None:
    tree = {
        "type": "record",
        "name": "T",
        "fields": [{"name": "left", "type": ["null", "T"]}, {"name": "n", "type": "int"}],
    }
    assert unreadable(tree, copy.deepcopy(tree)) == []
    assert unreadable(["int", "string"], ["string", "long"]) == []
    assert unreadable(["int", "string"], "int") != []
    colours = {"type": "enum", "name": "C", "symbols": ["red", "blue"]}
    assert unreadable(colours, colours | {"symbols": ["red"]}) != []
    assert unreadable(colours, colours | {"symbols": ["red"], "default": "red"}) == []
