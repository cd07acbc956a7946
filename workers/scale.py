"""`headgate scale`: more or fewer exporter shards, and a wait until all slots are owned as published.

* Nobody is restarted who stays: the local stack gets or loses processes, a Helm release Deployments.
* Who is removed drains first. Of the local stack it then leaves its group at once; in a cluster its slots move when its session has timed out.
* The wait is bounded, and what it waits for is the coordinator's page /shards, nothing else.
* *Windows lost* are those that passed their deadline meanwhile: of the local stack the ledger says so, of a release the coordinator's page.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import re
import subprocess
import time
import urllib.error
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ingest.assign import Move, moves
from ingest.clock import SystemClock, utc
from ingest.errors import Fatal, Transient
from ingest.membership import remove_members
from ingest.overview import GRACE_S, OPEN_SQL, late_sql
from ingest.sinks.connection import open_connection
from shard_config.model import Config, Postgres
from workers.local import SHARDS_MAX, LocalStack, find_config
from workers.names import exporter_group
from workers.servers import get_local
from workers.setup import kafka_admin
from workers.stack import CHECKOUT, exporter_name

SETTLE_TIMEOUT_S = 120.0
"""A drain (20 s), a session (15 s), a rebalance (30 s) and the coordinator's looks, and as much again."""
LOOK_EVERY_S = 0.5
PAGE_TIMEOUT_S = 60.0
"""The coordinator reads the ledger for its page each few seconds, and less often where that is slow."""
HELM_TIMEOUT_S = 600.0
METRICS_PORT = 9100
"""The chart's, of every worker."""

Page = dict[str, Any]
"""/shards, as `workers.shards.Publisher.page` makes it."""
Look = Callable[[], Page]
"""Raises OSError where the coordinator does not answer."""
Fetch = Callable[[str], Page]
"""One of the coordinator's pages by its name; raises as a look does."""
Say = Callable[[str], None]

_LOST = f"""SELECT count(*) FROM windows WHERE ({OPEN_SQL} AND {late_sql("$2", "$3")} AND NOT {late_sql("$1", "$3")})
    OR (declared = 'expired' AND declared_at >= $1)"""  # noqa: S608  # only constants


@dataclass(frozen=True, slots=True)
class Scaled:
    """What a change did. `windows_lost` is None where the ledger was not asked."""

    added: Sequence[str]
    removed: Sequence[str]
    moves: Sequence[Move]
    slots: int
    seconds: float
    windows_lost: int | None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "added": list(self.added),
            "removed": list(self.removed),
            "moves": [{"slot": m.slot, "from": m.before, "to": m.after} for m in self.moves],
            "slots": self.slots,
            "seconds": round(self.seconds, 1),
            "windows_lost": self.windows_lost,
        }


def pages(port: int) -> Fetch:
    """The pages of a coordinator that answers on a port of this machine."""

    def fetch(name: str) -> Page:
        page: Page = json.loads(get_local(f"http://127.0.0.1:{port}/{name}", timeout_s=5))
        return page

    return fetch


def owners_in(page: Mapping[str, Any]) -> dict[int, str]:
    """Who owns each slot now."""
    return {slot: shard["shard"] for shard in page["shards"] for slot in shard["slots"]}


def waiting_for(page: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """What is not yet as it shall be, for people; empty where all is."""
    alive = {shard["shard"] for shard in page["shards"] if shard["alive"]}
    if missing := set(wanted) - alive:
        return f"{', '.join(sorted(missing))} not there yet"
    if extra := alive - set(wanted):
        return f"{', '.join(sorted(extra))} not gone yet"
    if not page["settled"]:
        assigned = {slot: s["shard"] for s in page["shards"] for slot in s["assigned"]}
        owned = owners_in(page)
        astray = sum(owned.get(slot) != assigned.get(slot) for slot in range(page["slots"]))
        if not astray:
            return "the group to come to rest"
        return f"{astray} of {page['slots']} slots not owned as assigned"
    return ""


async def settled(look: Look, wanted: Sequence[str], say: Say, timeout_s: float = SETTLE_TIMEOUT_S) -> Page:
    """Wait until these shards own all slots as published, and say what is waited for as it changes. Raises Transient after that time."""
    deadline_s = time.monotonic() + timeout_s
    said = ""
    while True:
        try:
            page = await asyncio.to_thread(look)
            what = waiting_for(page, wanted)
        except (OSError, ValueError, http.client.HTTPException) as error:
            page, what = {}, f"the coordinator does not answer: {error}"
        if page and not what:
            return page
        if time.monotonic() > deadline_s:
            raise Transient(
                "scale", f"not settled after {timeout_s:g} s: {what}", "see `headgate status --watch`"
            )
        if what != said:
            said = what
            say(f"waiting: {what}")
        await asyncio.sleep(LOOK_EVERY_S)


async def windows_lost(postgres: Postgres, since: datetime, now: datetime) -> int:
    """Windows that passed their deadline unsealed since then, or expired. Raises Transient."""
    connection = await open_connection(postgres, "headgate scale")
    try:
        return int(await connection.fetchval(_LOST, since, now, timedelta(seconds=GRACE_S)))
    finally:
        connection.terminate()


# --- the local stack ------------------------------------------------------------------------------------------


async def scale_local(stack: LocalStack, config: Config, shards: int, say: Say) -> Scaled:
    """Raises Fatal, Transient."""
    if shards > config.slots:
        raise Fatal(
            "scale",
            f"{shards} shards would share {config.slots} slots",
            f"the most there can be is {config.slots}",
        )
    look = partial(pages(stack.metrics_ports["coordinator"]), "shards")
    clock = SystemClock(config.run.clock_offset_s)
    before, began_ms, began_s = await _before(look), clock.now_ms(), clock.monotonic_s()
    added, removed = await stack.scale(shards, lambda name, what: say(f"{name} {what}"))
    if removed:
        async with kafka_admin(config.kafka) as admin:
            await remove_members(admin, exporter_group(config.kafka), removed)
    after = await settled(look, _names(shards), say)
    seconds = clock.monotonic_s() - began_s
    since, now = (utc(ms / 1000) for ms in (began_ms, clock.now_ms()))
    lost = await windows_lost(config.postgres, since, now)
    moved = moves(before, owners_in(after)) if before else []
    return Scaled(added, removed, moved, after["slots"], seconds, lost)


async def _before(look: Look) -> dict[int, str]:
    try:
        return owners_in(await asyncio.to_thread(look))
    except (OSError, ValueError, http.client.HTTPException):
        return {}


def _names(shards: int) -> list[str]:
    return [exporter_name(i) for i in range(1, shards + 1)]


# --- a Helm release -------------------------------------------------------------------------------------------


async def scale_release(release: str, namespace: str, chart: str, shards: int, say: Say) -> Scaled:
    """`helm upgrade` with another number of shards, everything else as it is. Raises Fatal, Transient."""
    async with forwarded(release, namespace) as fetch:
        look = partial(fetch, "shards")
        page, gaps = await asyncio.to_thread(look), await gaps_on(fetch, 0)
        if shards > page["slots"]:
            raise Fatal(
                "scale", f"{shards} shards would share {page['slots']} slots", "raise config.slots first"
            )
        before, began_s = owners_in(page), time.monotonic()
        there = {s["shard"] for s in page["shards"] if s["alive"]}
        command = ["helm", "upgrade", release, chart, "--namespace", namespace, "--reset-then-reuse-values"]
        say(" ".join(command := [*command, "--set", f"shards={shards}"]))
        await asyncio.to_thread(_run, command, HELM_TIMEOUT_S)
        # Pods may wait for a node; the cluster's own patience is the measure then.
        after = await settled(look, _names(shards), say, HELM_TIMEOUT_S)
        seconds, now = time.monotonic() - began_s, set(_names(shards))
        lost = newly_open(gaps, await gaps_on(fetch, int(time.time() * 1000)))
        return Scaled(
            sorted(now - there), sorted(there - now), moves(before, owners_in(after)), after["slots"], seconds, lost
        )  # fmt: skip


async def gaps_on(fetch: Fetch, not_before_ms: int) -> dict[str, int] | None:
    """By target, or service of a split one, its windows past their deadline: what the coordinator read of the ledger at that time or later.

    None where it does not say so within PAGE_TIMEOUT_S. A coordinator of an older version has no such page.
    """
    deadline_s = time.monotonic() + PAGE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            page = await asyncio.to_thread(fetch, "page.json")
            parts = {part["name"]: part for part in page["parts"]}
            if (parts["PostgreSQL"]["as_of_ms"] or -1) >= not_before_ms:
                return {cell["unit"]: cell.get("gaps", 0) for cell in page["cells"]}
        except (urllib.error.HTTPError, KeyError, ValueError):
            return None
        except (OSError, http.client.HTTPException):
            pass
        await asyncio.sleep(1.0)
    return None


def newly_open(before: Mapping[str, int] | None, after: Mapping[str, int] | None) -> int | None:
    """Windows that are past their deadline after, and were not before; None where either is not known."""
    if before is None or after is None:
        return None
    return sum(max(0, gaps - before.get(unit, 0)) for unit, gaps in after.items())


@contextlib.asynccontextmanager
async def forwarded(release: str, namespace: str) -> AsyncIterator[Fetch]:
    """The coordinator's pages by `kubectl port-forward`, which NetworkPolicies let through. Raises Fatal."""
    selector = f"app.kubernetes.io/instance={release},app.kubernetes.io/component=coordinator"
    found = await asyncio.to_thread(
        _run, ["kubectl", "-n", namespace, "get", "deployment", "-l", selector, "-o", "name"], 30
    )
    if len(names := found.split()) != 1:
        raise Fatal(
            f"release {release}",
            f"has {len(names)} coordinators in namespace {namespace}",
            "see `helm list -A`",
        )
    forward = await asyncio.create_subprocess_exec(
        "kubectl", "-n", namespace, "port-forward", names[0], f":{METRICS_PORT}",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert forward.stdout is not None  # noqa: S101  # it is a pipe
        try:
            line = (await asyncio.wait_for(forward.stdout.readline(), 30)).decode().strip()
        except TimeoutError:
            line = "nothing for 30 s"
        match = re.search(r"127\.0\.0\.1:(\d+) ->", line)
        if match is None:
            raise Transient(f"port-forward to {names[0]}", f"it said {line!r}")
        yield pages(int(match[1]))
    finally:
        with contextlib.suppress(ProcessLookupError):
            forward.terminate()
        await forward.wait()


def _run(command: Sequence[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError as error:
        raise Fatal(command[0], "is not installed", "it has to be on the PATH") from error
    except subprocess.TimeoutExpired as error:
        raise Transient(command[0], f"did not end within {timeout_s:g} s") from error
    if done.returncode:
        raise Fatal(" ".join(command[:4]), (done.stderr or done.stdout).strip()[-500:])
    return done.stdout


# --- the command ----------------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "scale",
        help="change the number of exporter shards",
        description="Adds or removes exporters of the stack that runs here, or with --release of a Helm release. The others are not restarted; "
        "those that go drain first. Waits until every slot is owned as the coordinator assigned it; says what moved, how long it took, and "
        "how many windows were lost meanwhile (exit code 1 where any was).",
    )
    parser.add_argument("shards", type=int, help=f"how many there shall be, 1 to {SHARDS_MAX}")
    parser.add_argument("--release", metavar="NAME", help="of Helm, in place of the local stack")
    parser.add_argument("--namespace", metavar="NAME", default="default", help="of the release (%(default)s)")
    parser.add_argument(
        "--chart",
        default=str(Path(CHECKOUT) / "helm" / "headgate"),
        help="default: this checkout's helm/headgate",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    def say(line: str) -> None:
        if not args.json:
            print(line, flush=True)

    if not 1 <= args.shards <= SHARDS_MAX:
        raise Fatal("scale", f"{args.shards} shards are not in 1..{SHARDS_MAX}")
    if args.release:
        scaled = asyncio.run(scale_release(args.release, args.namespace, args.chart, args.shards, say))
    else:
        scaled = asyncio.run(scale_local(LocalStack(), find_config(None), args.shards, say))
    if args.json:
        print(json.dumps(scaled.plain()))
    else:
        _tell(scaled, args.shards, bool(args.release))
    return 1 if scaled.windows_lost else 0


def _tell(scaled: Scaled, shards: int, release: bool) -> None:
    changes = [f"added {name}" for name in scaled.added] + [f"removed {name}" for name in scaled.removed]
    print(", ".join(changes) or f"there are {shards} exporters already")
    by_way: dict[tuple[str, str], list[int]] = {}
    for move in scaled.moves:
        by_way.setdefault((move.before or "nobody", move.after), []).append(move.slot)
    for (before, after), slots in sorted(by_way.items()):
        print(f"  {before} → {after}: {', '.join(map(str, slots))}")
    print(f"{len(scaled.moves)} of {scaled.slots} slots moved, {scaled.seconds:.1f} s")
    if scaled.windows_lost is None:
        print(
            "windows lost: the coordinator's page does not say; `headgate gaps` does"
            if release
            else "windows lost: unknown"
        )
    else:
        print(f"windows lost: {scaled.windows_lost}")
