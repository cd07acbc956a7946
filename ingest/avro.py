"""Avro in single-object encoding, against our own schemas only: `C3 01`, the schema's fingerprint, the datum.

* `write` refuses what fastavro's writer would bend into shape (`"nan"` as a double, 1.7 as an int, unknown fields dropped).
* `read` never takes a schema from outside: a fingerprint is one of ours or the value is rejected. All bytes must be consumed.
* Every version of every schema is in `schemas/NAME.vN.avsc`, and none is ever changed. A value in an older version is read by
  the schema that wrote it and resolved to the newest, whose new fields have defaults.

No item of an array in our schemas is of size zero (a short value could claim millions of those), so a datum takes memory in
proportion to its bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fastavro
from fastavro.schema import fingerprint, to_parsing_canonical_form
from fastavro.validation import ValidationError
from fastavro.validation import validate as check_types

from ingest.errors import Rejected
from ingest.validate import Reason

MAGIC = b"\xc3\x01"
HEADER_BYTES = 10

Datum = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Schema:
    """One version of one record. `fingerprint` is CRC-64-AVRO, 8 bytes, little-endian, as in the header."""

    name: str
    version: int
    fingerprint: bytes
    parsed: Any


def _load(directory: Path) -> list[Schema]:
    """All schemas, by name and version."""
    schemas = []
    for path in directory.glob("*.avsc"):
        name, _, version = path.stem.partition(".v")
        parsed = fastavro.parse_schema(json.loads(path.read_text()))
        # fastavro writes the 64 bits as hexadecimal in little-endian order, which is the header's.
        mark = bytes.fromhex(fingerprint(to_parsing_canonical_form(parsed), "CRC-64-AVRO"))
        schemas.append(Schema(name, int(version), mark, parsed))
    return sorted(schemas, key=lambda schema: (schema.name, schema.version))


SCHEMAS = _load(Path(__file__).parent / "schemas")
_BY_FINGERPRINT = {schema.fingerprint: schema for schema in SCHEMAS}
_NEWEST = {schema.name: schema for schema in SCHEMAS}
_BY_VERSION = {(schema.name, schema.version): schema for schema in SCHEMAS}


def write(name: str, datum: Datum, version: int | None = None) -> bytes:
    """A datum in the newest version of a schema, or in a given one.

    Raises Rejected(bad_datum) where a field has not the schema's type.
    """
    schema = _NEWEST[name] if version is None else _BY_VERSION[name, version]
    try:
        check_types(datum, schema.parsed, raise_errors=True, strict=True)
        buffer = io.BytesIO()
        buffer.write(MAGIC + schema.fingerprint)
        fastavro.schemaless_writer(buffer, schema.parsed, datum)
    except (ValidationError, ValueError, OverflowError) as error:
        raise Rejected(f"write {name}", Reason.BAD_DATUM, str(error)) from error
    return buffer.getvalue()


def read(value: bytes, names: Iterable[str]) -> tuple[str, Datum]:
    """The schema's name, which is one of `names`, and the datum, with the fields of its newest version.

    Raises Rejected: bad_magic, unknown_schema, wrong_record, bad_datum, trailing_bytes.
    """
    where = f"read {'|'.join(names)}"
    if not value.startswith(MAGIC):
        raise Rejected(where, Reason.BAD_MAGIC, value[:2].hex())
    schema = _BY_FINGERPRINT.get(value[2:HEADER_BYTES])
    if schema is None:
        raise Rejected(where, Reason.UNKNOWN_SCHEMA, value[2:HEADER_BYTES].hex())
    if schema.name not in names:
        raise Rejected(where, Reason.WRONG_RECORD, schema.name)
    newest = _NEWEST[schema.name]
    buffer = io.BytesIO(value)
    buffer.seek(HEADER_BYTES)
    try:
        datum = fastavro.schemaless_reader(buffer, schema.parsed, None if schema is newest else newest.parsed)
    except Exception as error:
        # fastavro 1.13 raises what it stumbles over: EOFError, IndexError, UnicodeDecodeError, OverflowError, …
        raise Rejected(where, Reason.BAD_DATUM, f"{type(error).__name__}: {error}") from error
    if buffer.tell() != len(value):
        raise Rejected(where, Reason.TRAILING_BYTES, f"{len(value) - buffer.tell()} bytes")
    return schema.name, cast(Datum, datum)
