"""`headgate bundle`: a picture of an installation for a bug report, redacted. Reads only, and sends nothing anywhere.

* *No secret leaves*: every text is searched for each secret that this process can know (of the configuration, of the DSN, of the environment) and for
  what looks like one; what is found is replaced. This is done to the finished texts, so that no part can forget it.
* *No account id leaves*: each is replaced by a stand-in of the same form, the same one everywhere in a bundle. Aliases too; names of hosts, buckets,
  roles and resources stay.
* A part that cannot be had says why, in its place; the others are there all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import re
import sys
import tarfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncpg
from pydantic import SecretStr

from ingest.clock import Clock, SystemClock
from ingest.errors import HeadgateError
from ingest.gaps import Filter
from ingest.sinks.connection import open_connection, translated
from shard_config.model import Config
from workers import gaps, local
from workers.lifecycle import configure_logs
from workers.status import status, to_json

LOG_LINES = 200
LOG_BYTES_MAX = 1024 * 1024
"""Of one log, from its end."""
ROWS_MAX = 200
PART_TIMEOUT_S = 60.0

_HIDDEN = "[redacted]"
_SECRET_NAMES = re.compile(r"KEY|SECRET|TOKEN|PASSW|PGPASS|CREDENTIAL|EXTERNAL_ID|AUTH|COOKIE", re.IGNORECASE)
_LOOKS_SECRET = (
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"),
    re.compile(r"(?<=://)[^\s/@:\"']*:[^\s/@\"']+(?=@)"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL),
    re.compile(
        r"(?i)(?<=X-Amz-Signature=)\w+|(?<=X-Amz-Security-Token=)[^&\s\"]+|(?<=X-Amz-Credential=)[^&\s\"]+"
    ),
    re.compile(r"(?i)(?<=password=)[^\s&\"']+|(?<=bearer )[\w.~+/-]+=*"),
)
_ACCOUNT_ID = re.compile(r"(?<!\d)\d{12}(?!\d)")
"""A count of twelve digits goes too: better a number less than an account more."""

_PACKAGES = (
    "headgate",
    "aiobotocore",
    "aiohttp",
    "aiokafka",
    "asyncpg",
    "fastavro",
    "numpy",
    "pydantic",
    "uvloop",
    "zstandard",
)


# --- redaction ----------------------------------------------------------------------------------------------------


class Redactor:
    """Takes secrets and account ids out of texts. One for a whole bundle, so that a stand-in is the same everywhere."""

    def __init__(self, secrets: Iterable[str], replaced: Mapping[str, str]) -> None:
        # The longest first: one may be a part of another.
        self._secrets = sorted({s for s in secrets if len(s) >= 4}, key=len, reverse=True)
        self._replaced = dict(replaced)
        self._accounts: dict[str, str] = {}

    def text(self, text: str) -> str:
        """The text without them."""
        for secret in self._secrets:
            for form in {secret, json.dumps(secret)[1:-1]}:
                text = text.replace(form, _HIDDEN)
        for pattern in _LOOKS_SECRET:
            text = pattern.sub(_HIDDEN, text)
        for plain, stand_in in self._replaced.items():
            text = text.replace(plain, stand_in)
        return _ACCOUNT_ID.sub(lambda found: self._stand_in(found[0]), text)

    def _stand_in(self, account: str) -> str:
        return self._accounts.setdefault(account, str(900_000_000_001 + len(self._accounts)))


def secrets_of(config: Config, environ: Mapping[str, str]) -> set[str]:
    """Every secret that this process can know: of the configuration, of the DSN, of the environment's variables that sound like one."""
    found: set[str] = set()

    def look(value: object) -> None:
        if isinstance(value, SecretStr):
            found.add(value.get_secret_value())
        elif isinstance(value, dict):
            for inner in value.values():
                look(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner)

    look(config.model_dump())
    for dsn in (
        config.postgres.dsn,
        *(v for v in environ.values() if v.startswith(("postgres://", "postgresql://"))),
    ):
        parts = urlsplit(dsn)
        found |= {parts.password or "", unquote(parts.password or "")}
        found |= {
            value
            for name, _, value in (pair.partition("=") for pair in parts.query.split("&"))
            if _SECRET_NAMES.search(name)
        }
    found |= {value for name, value in environ.items() if _SECRET_NAMES.search(name)}
    return found - {""}


def redactor_of(config: Config, environ: Mapping[str, str]) -> Redactor:
    """A redactor that knows the configuration's secrets and the environment's; aliases and the home folder are replaced too."""
    aliases = sorted({a.alias for a in config.accounts if len(a.alias) >= 4}, key=len, reverse=True)
    replaced = {alias: f"alias-{n}" for n, alias in enumerate(aliases, 1)}
    home = environ.get("HOME", "")
    return Redactor(secrets_of(config, environ), replaced | ({home: "~"} if len(home) > 1 else {}))


# --- parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sources:
    config: Config
    clock: Clock


def _versions(_: _Sources) -> Any:
    found = {"python": sys.version, "platform": platform.platform(), "cpus": os.cpu_count()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


async def _status(of: _Sources) -> Any:
    return json.loads(to_json(await status(of.config, of.clock)))


async def _gaps(of: _Sources) -> Any:
    found, unpolled = await gaps.find(of.config, Filter())
    return gaps.rows_of([*found, *unpolled])[:ROWS_MAX]


_FAILED = """SELECT target, service, shard, status, detail, window_start, window_end, finished_at, observed_at, series, points, requests
FROM looks WHERE status <> 'complete' ORDER BY finished_at DESC LIMIT $1"""

_TABLES = """SELECT relname AS "table", n_live_tup AS rows, n_dead_tup AS dead_rows, pg_total_relation_size(relid) AS bytes,
    last_autovacuum, last_autoanalyze FROM pg_stat_user_tables ORDER BY pg_total_relation_size(relid) DESC LIMIT $1"""

_POSITIONS = (
    "SELECT sink, topic, partition, next, backend_pid FROM positions ORDER BY sink, topic, partition LIMIT $1"
)

_MIGRATIONS = "SELECT * FROM schema_migrations ORDER BY 1 LIMIT $1"

_ACTIVITY = """SELECT application_name, state, wait_event_type, wait_event, now() - xact_start AS in_transaction
FROM pg_stat_activity WHERE datname = current_database() ORDER BY xact_start LIMIT $1"""


def _query(sql: str) -> Callable[[_Sources], Awaitable[Any]]:
    async def part(of: _Sources) -> Any:
        connection = await open_connection(of.config.postgres, "headgate bundle")
        try:
            with translated("bundle"):
                return [dict(row) for row in await connection.fetch(sql, ROWS_MAX)]
        finally:
            connection.terminate()

    return part


PARTS: Mapping[str, Callable[[_Sources], Any]] = {
    "versions.json": _versions,
    "config.json": lambda of: of.config.model_dump(mode="json"),
    "status.json": _status,
    "gaps.json": _gaps,
    "looks_failed.json": _query(_FAILED),
    "tables.json": _query(_TABLES),
    "positions.json": _query(_POSITIONS),
    "migrations.json": _query(_MIGRATIONS),
    "activity.json": _query(_ACTIVITY),
}
"""What is in a bundle beside logs; status.json holds the state of the Kafka groups."""


async def bundle(
    config: Config, clock: Clock, environ: Mapping[str, str], logs: Iterable[Path] = ()
) -> dict[str, str]:
    """The bundle's files, redacted: name → text. Never raises for a part."""
    redactor = redactor_of(config, environ)
    of = _Sources(config, clock)
    files = {name: redactor.text(await _text(part, of)) for name, part in PARTS.items()}
    for path in logs:
        files[f"logs/{path.name}"] = redactor.text(_tail(path))
    return files


async def _text(part: Callable[[_Sources], Any], of: _Sources) -> str:
    try:
        async with asyncio.timeout(PART_TIMEOUT_S):
            found = part(of)
            if isinstance(found, Awaitable):
                found = await found
    except (HeadgateError, asyncpg.PostgresError, OSError, TimeoutError) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps(found, indent=2, default=_plain) + "\n"


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _tail(path: Path) -> str:
    """The last LOG_LINES lines, of the last LOG_BYTES_MAX bytes."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES_MAX))
        lines = deque(file.read(LOG_BYTES_MAX).decode(errors="replace").splitlines(), maxlen=LOG_LINES)
    return "\n".join(lines) + "\n"


def write(files: Mapping[str, str], out: Path) -> None:
    """The files as a .tar.gz, readable by its owner only."""
    with out.open("xb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
        out.chmod(0o600)
        for name, text in files.items():
            data = text.encode()
            entry = tarfile.TarInfo(f"headgate-bundle/{name}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(data))


# --- the command --------------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bundle",
        help="a redacted picture of the installation, for a bug report",
        description="Packs versions, configuration, status, gaps, the last looks that failed, table sizes, positions and the ends of the local stack's logs "
        "into one .tar.gz. Secrets are taken out, and account ids are replaced by stand-ins, the same ones throughout. Nothing is sent "
        "anywhere: look into it before you do.",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: headgate-bundle-<time>.tar.gz here"
    )
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    configure_logs("bundle")
    config = local.find_config(args.config)
    stack = local.find_running()
    clock = SystemClock(config.run.clock_offset_s)
    out = args.out or Path(f"headgate-bundle-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.tar.gz")
    logs = sorted(stack.logs.glob("*.log")) if stack else []
    files = asyncio.run(bundle(config, clock, os.environ, logs))
    try:
        write(files, out)
    except OSError as error:
        print(f"headgate bundle: {out}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"{out}: {len(files)} files, redacted; nothing was sent anywhere")
    return 0
