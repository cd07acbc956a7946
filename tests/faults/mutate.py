"""Valid bytes, spoilt: by bits, by lengths, by pieces of others, and by the values of a message's own fields. Pure functions of a random generator."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable, Sequence
from enum import Enum, auto
from hashlib import blake2b
from typing import Any

import fastavro
import orjson
import zstandard

from ingest import avro

BYTES_MAX = 256 * 1024
"""Of what is made; above it is cut off."""

_BYTES = (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF)
_NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    65_535,
    2**31 - 1,
    -(2**31),
    2**31,
    2**32 - 1,
    2**53,
    2**56,
    2**63 - 1,
    -(2**63),
)
_TEXTS = (
    "", "\0", "../../etc", "a/b/c/d", "a" * 5_000, "9" * 5_000, "١" * 12, "\u2028", "\ud7ff", "é" * 1_025, "eu-west-1",
    "' OR 1=1 --", "cloudwatch", "{}", "123456789012", "\x1b[2J", "nan", "1e400",
)  # fmt: skip
_JSON: tuple[Any, ...] = (None, True, 0, -1, 2**63, 1.5, "", "nan", "x", [], {}, [[]], {"a": {}})


class Shape(Enum):
    """How bytes are built, and so at which depth they can be spoilt and still be read."""

    AVRO = auto()
    BATCH = auto()
    OBJECT = auto()
    TEXT = auto()


def mutated(rng: random.Random, shape: Shape, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One of the seeds, spoilt in one to four places."""
    value = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _once(rng, shape, value, rng.choice(seeds), words)[:BYTES_MAX]
    return value


def _once(rng: random.Random, shape: Shape, value: bytes, other: bytes, words: Sequence[bytes]) -> bytes:
    deep = rng.random() < 0.6
    if shape is Shape.AVRO and deep:
        return _fields(rng, value)
    if shape is Shape.BATCH and deep:
        inside = content_of(value)
        if rng.random() < 0.4:
            return compressed(_fields(rng, inside))
        return compressed(_bytes(rng, inside, content_of(other)))
    if shape is Shape.OBJECT and deep:
        return _sealed(rng, value)
    if shape is Shape.TEXT and rng.random() < 0.7:
        return rng.choice(_OF_TEXT)(rng, value, other, words)
    return _bytes(rng, value, other)


# --- bytes --------------------------------------------------------------------------------------------------------


def _bytes(rng: random.Random, value: bytes, other: bytes) -> bytes:
    return rng.choice(_OF_BYTES)(rng, value, other)


def _span(rng: random.Random, value: bytes) -> tuple[int, int]:
    start = rng.randint(0, len(value))
    return start, min(len(value), start + rng.choice((0, 1, 2, 4, 8, 64, 1024)))


def _flip(rng: random.Random, value: bytes, _: bytes) -> bytes:
    found = bytearray(value)
    for _n in range(rng.choice((1, 1, 3)) if found else 0):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _set(rng: random.Random, value: bytes, _: bytes) -> bytes:
    start, end = _span(rng, value)
    return value[:start] + bytes([rng.choice(_BYTES)]) * (end - start) + value[end:]


def _truncate(rng: random.Random, value: bytes, _: bytes) -> bytes:
    return value[: rng.randint(0, len(value))]


def _cut(rng: random.Random, value: bytes, _: bytes) -> bytes:
    start, end = _span(rng, value)
    return value[:start] + value[end:]


def _repeat(rng: random.Random, value: bytes, _: bytes) -> bytes:
    start, end = _span(rng, value)
    return value[:start] + value[start:end] * rng.choice((2, 3, 100)) + value[end:]


def _splice(rng: random.Random, value: bytes, other: bytes) -> bytes:
    start, end = _span(rng, other)
    at = rng.randint(0, len(value))
    if rng.random() < 0.3:
        return value[:at] + other[start:]
    return value[:at] + other[start:end] + value[at + (end - start if rng.random() < 0.5 else 0) :]


def _length(rng: random.Random, value: bytes, _: bytes) -> bytes:
    """A number where a length may stand: fixed, in either order, or a varint as Avro has them."""
    n = rng.choice(_NUMBERS)
    if rng.random() < 0.5:
        put = _varint(n)
    else:
        size, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
        put = (n & ((1 << 8 * size) - 1)).to_bytes(size, "little" if order == "little" else "big")
    at = rng.randint(0, len(value))
    return value[:at] + put + value[at + rng.choice((0, 1, len(put))) :]


def _varint(n: int) -> bytes:
    z, out = (n << 1 ^ n >> 63) & (2**64 - 1), bytearray()
    while z > 0x7F:
        out.append(z & 0x7F | 0x80)
        z >>= 7
    out.append(z)
    return bytes(out)


_OF_BYTES: Sequence[Callable[[random.Random, bytes, bytes], bytes]] = (
    _flip, _flip, _set, _truncate, _cut, _repeat, _splice, _length, _length,
)  # fmt: skip


# --- text ---------------------------------------------------------------------------------------------------------


def _word(rng: random.Random, value: bytes, _: bytes, words: Sequence[bytes]) -> bytes:
    start, end = _span(rng, value)
    return value[:start] + rng.choice(words) + value[end if rng.random() < 0.5 else start :]


def _cell(rng: random.Random, value: bytes, _: bytes, words: Sequence[bytes]) -> bytes:
    """What stands between two separators becomes a word."""
    at = rng.randint(0, len(value))
    start = max(value.rfind(s, 0, at) for s in (b",", b" ", b"\n", b'"', b":", b"(")) + 1
    ends = [found for s in (b",", b"\n", b'"', b" ", b")") if (found := value.find(s, at)) >= 0]
    return value[:start] + rng.choice(words) + value[min(ends, default=len(value)) :]


def _lines(rng: random.Random, value: bytes, other: bytes, _: Sequence[bytes]) -> bytes:
    """A line is gone, twice there, at another place, one of the other's, or otherwise indented."""
    lines, others = value.split(b"\n"), other.split(b"\n")
    at, line = rng.randrange(len(lines)), rng.choice(lines)
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, line)
    elif kind == 2:
        lines[at] = rng.choice(others)
    elif kind == 3:
        lines[at] = b" " * rng.randrange(8) + lines[at].lstrip()
    else:
        lines[at : at + 1] = [lines[at]] * rng.choice((2, 50))
    return b"\n".join(lines)


def _deep(rng: random.Random, value: bytes, _: bytes, __: Sequence[bytes]) -> bytes:
    """Brackets within brackets."""
    at = rng.randint(0, len(value))
    return (
        value[:at]
        + rng.choice((b"[", b"{a: ", b"(", b"- ", b"{", b"-", b"sum(")) * rng.choice((25, 2_000, 20_000))
        + value[at:]
    )


_OF_TEXT: Sequence[Callable[[random.Random, bytes, bytes, Sequence[bytes]], bytes]] = (
    _word, _word, _cell, _cell, _cell, _lines, _lines, _deep,
)  # fmt: skip


# --- messages -----------------------------------------------------------------------------------------------------


def compressed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=True).compress(content)


def content_of(value: bytes) -> bytes:
    """What a zstd frame holds, as far as it is one."""
    try:
        return zstandard.ZstdDecompressor().decompress(value, max_output_size=BYTES_MAX)
    except (zstandard.ZstdError, MemoryError):
        return value


def _fields(rng: random.Random, value: bytes) -> bytes:
    """One field of a message becomes another value of its type; a message that is none is spoilt as bytes."""
    schema = next((s for s in avro.SCHEMAS if value.startswith(avro.MAGIC + s.fingerprint)), None)
    if schema is None:
        return _flip(rng, value, b"")
    try:
        datum: Any = fastavro.schemaless_reader(io.BytesIO(value[avro.HEADER_BYTES :]), schema.parsed, None)
        out = io.BytesIO()
        out.write(value[: avro.HEADER_BYTES])
        fastavro.schemaless_writer(out, schema.parsed, _other(rng, datum))
    except Exception:
        return _flip(rng, value, b"")
    return out.getvalue()


def _other(rng: random.Random, thing: Any) -> Any:
    """The same but for one place in it."""
    if isinstance(thing, dict) and thing:
        key = rng.choice(sorted(thing))
        if rng.random() < 0.1 and all(isinstance(v, int) for v in thing.values()):
            return thing | {rng.choice(_TEXTS): rng.choice(_NUMBERS)}
        return thing | {key: _other(rng, thing[key])}
    if isinstance(thing, list) and thing:
        kind, at = rng.randrange(6), rng.randrange(len(thing))
        if kind == 0:
            return []
        if kind == 1:
            return thing * rng.choice((2, 300))
        return [*thing[:at], _other(rng, thing[at]), *thing[at + 1 :]]
    if isinstance(thing, bool) or thing is None:
        return thing
    if isinstance(thing, int):
        return rng.choice((*_NUMBERS, thing + 1, thing - 1, thing * 2))
    if isinstance(thing, float):
        return rng.choice((0.0, -0.0, 1e308, float("inf"), float("nan"), -1.0))
    if isinstance(thing, str):
        return rng.choice((*_TEXTS, thing + "\n", thing * 2, thing[:-1]))
    if isinstance(thing, bytes):
        return _json(rng, thing) if thing[:1] == b"{" and rng.random() < 0.8 else _bytes(rng, thing, thing)
    return thing


def _json(rng: random.Random, raw: bytes) -> bytes:
    try:
        return orjson.dumps(_json_other(rng, orjson.loads(raw)))
    except ValueError:
        return _flip(rng, raw, b"")


def _json_other(rng: random.Random, thing: Any) -> Any:
    if isinstance(thing, dict) and thing and rng.random() < 0.85:
        key = rng.choice(sorted(thing))
        if rng.random() < 0.15:
            return {k: v for k, v in thing.items() if k != key}
        return thing | {key: _json_other(rng, thing[key])}
    if isinstance(thing, list) and thing and rng.random() < 0.85:
        at = rng.randrange(len(thing))
        return [*thing[:at], _json_other(rng, thing[at]), *thing[at + 1 :]]
    return rng.choice(_JSON + _TEXTS + _NUMBERS[:8])


# --- objects of the archive ---------------------------------------------------------------------------------------

_COUNTS = struct.Struct(">IIIQ")
_MAGIC_BYTES = 8


def _sealed(rng: random.Random, body: bytes) -> bytes:
    """A task object whose receipt or numbers are others, under a checksum that fits."""
    end = len(body) - _COUNTS.size - 16 - _MAGIC_BYTES
    if end < _MAGIC_BYTES:
        return _flip(rng, body, b"")
    inline, parts, receipt_bytes, before = _COUNTS.unpack_from(body, end)
    start = end - receipt_bytes
    if start < _MAGIC_BYTES or parts > 64:
        return _flip(rng, body, b"")
    receipt = body[start:end]
    numbers = [inline, parts, len(receipt), before]
    if rng.random() < 0.6:
        receipt = _fields(rng, receipt) if rng.random() < 0.7 else _bytes(rng, receipt, receipt)
        numbers[2:] = [len(receipt), start + len(receipt)]
    else:
        at = rng.randrange(4)
        numbers[at] = rng.choice((*_NUMBERS, numbers[at] + 1, numbers[at] - 1)) & (2**32 - 1)
    first = max(_MAGIC_BYTES, start - 20 * numbers[1]) if numbers[1] <= 64 else start
    tail = body[first:start] + receipt + _COUNTS.pack(*numbers)
    return body[:first] + tail + blake2b(tail, digest_size=16).digest() + body[-_MAGIC_BYTES:]
