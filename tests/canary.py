"""Secrets that are planted, and a search for them in whatever leaves a process: as they are, and as base64, percent-encoding or JSON would show them."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus

import zstandard

CANARIES: Mapping[str, str] = {
    "Kafka's user": "kafka-user/c4n4ry+0001==",
    "Kafka's password": "kafka-pass/c4n4ry+0002==",
    "PostgreSQL's password": "postgres/c4n4ry+0003==",
    "the AWS secret key": "aws-secret/c4n4ry+0004==",
    "the AWS session token": "aws-token/c4n4ry+0005==",
    "the ExternalId": "external.c4n4ry:0006=@-",
    "the remote-write password": "rw-pass/c4n4ry+0007==",
    "the remote-write token": "rw-token/c4n4ry+0008==",
}
INFLATED_BYTES_MAX = 64 * 1024 * 1024


def forms(secret: str) -> set[bytes]:
    """How a secret may look: whole, quoted for a URL or JSON, and within base64 wherever it begins in a group of three bytes."""
    raw = secret.encode()
    found = {
        raw,
        quote(secret, safe="").encode(),
        quote_plus(secret).encode(),
        json.dumps(secret)[1:-1].encode(),
    }
    for before in range(3):
        # The first and last group mix with what stands around the secret, so they are cut off.
        whole = base64.b64encode(b"\0" * before + raw)[4 if before else 0 : -4]
        found |= {whole, whole.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def leaks(data: bytes, secrets: Mapping[str, str] = CANARIES) -> list[str]:
    """Which of the secrets stand in this."""
    return [name for name, secret in secrets.items() if any(form in data for form in forms(secret))]


def opened(data: bytes) -> bytes:
    """With what is compressed in it, where it is one frame of zstd or one gzip (a .tar.gz: with its files)."""
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return data + zstandard.ZstdDecompressor().decompressobj().decompress(data)[:INFLATED_BYTES_MAX]
    if data[:2] == b"\x1f\x8b":
        plain = gzip.decompress(data)
        try:
            with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
                parts = [f.read() for m in archive.getmembers() if (f := archive.extractfile(m)) is not None]
        except tarfile.TarError:
            parts = []
        return b"\n".join([data, plain, *parts])
    return data


class Gathered:
    """What left the processes, by place."""

    def __init__(self) -> None:
        self.places: dict[str, bytes] = {}

    def add(self, place: str, data: bytes | str) -> None:
        raw = data.encode("utf-8", "replace") if isinstance(data, str) else opened(data)
        self.places[place] = self.places.get(place, b"") + b"\n" + raw

    def add_all(self, place: str, data: Iterable[bytes | str | None]) -> None:
        for one in data:
            self.add(place, one or b"")

    def leaks(self, secrets: Mapping[str, str] = CANARIES) -> dict[str, list[str]]:
        """By place, the secrets that stand there; places without any are left out."""
        found = {place: leaks(data, secrets) for place, data in self.places.items()}
        return {place: names for place, names in found.items() if names}
