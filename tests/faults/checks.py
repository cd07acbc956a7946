"""What must hold of a field when all faults are healed: the invariants, and what the run cost. Complaints are sentences; none is good.

* I1 landed = the simulated AWS's truth: at each look what it showed then, and for what is sealed the final truth. I4 with it: the greatest version of `raw`.
* I2 the dead letters are those of the bad records that were published, once by identity.
* I3 no committed position is past what has landed.
* I5 memory below the chart's limits.
* I7 every window that configuration and time plan is sealed, or declared; and ledger ≤ bill ≤ ledger + in doubt + what runs
  that were cut off had asked again for themselves: nobody can know that but the workers here, who note it.
* *Paid twice*: what was billed beyond one run of each task and service that has a receipt is at most what was in flight at the
  kills and pauses, what was handed back unfinished, and the answers that were lost on their way (which the workers themselves have noted).
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import orjson
import yaml

from ingest.archive import open_archive
from ingest.batch import decode_batch
from ingest.clock import SystemClock
from ingest.errors import Rejected
from ingest.model import Batch, bytes_of, series_ids, version_of
from ingest.sinks.connection import open_connection
from shard_config.model import Config
from tests.faults.field import Field
from tests.faults.kinds import Struck
from tests.faults.log import records_of
from tests.faults.oracle import Oracle, complaints_of_dead, complaints_of_landed
from tests.faults.setting import ACCOUNTS, POLL_S, REGIONS, SERVICES, SETTLING_S
from tests.faults.truth import Published, Sample, Table, Truth, greatest
from tests.faults.watch import archive_complaints
from tests.faults.worker import ASKED
from workers.servers import local_environment
from workers.stack import CHECKOUT
from workers.verify import landed_points, verify
from workers.world import SETTLED, Question

DRAIN_S = 200.0
QUIET_S = 3.0
DUE_S = SETTLING_S + POLL_S + 10
"""After its end a window is sealed within that, where nothing is wrong."""

_FRESH = """SELECT target, service, extract(epoch FROM max(window_end))::bigint AS planned_s,
    extract(epoch FROM min(window_end) FILTER (WHERE sealed_at IS NULL AND declared IS NULL))::bigint AS open_s
FROM windows GROUP BY 1, 2"""
_WINDOWS = """SELECT target, service, extract(epoch FROM window_start)::bigint AS start_s, sealed_at IS NOT NULL AS sealed,
    declared, last_status, last_detail, unbalanced FROM windows WHERE window_end <= to_timestamp($1) ORDER BY 1, 2, 3"""
_FOLDED = """SELECT target, service, extract(epoch FROM lower(span))::bigint AS start_s, extract(epoch FROM upper(span))::bigint AS end_s
FROM sealed_days, unnest(covered) AS span"""
_BUSY = """SELECT (SELECT count(*) FROM looks) AS looks, (SELECT sum(metrics_billed) FROM charges)::bigint AS billed,
    (SELECT sum(next) FROM positions)::bigint AS positions, (SELECT count(*) FROM landed) AS landed"""
_MONEY = "SELECT sum(metrics_billed)::bigint, sum(metrics_in_doubt)::bigint FROM charges"
_MONEY_OF = """SELECT split_part(target, '/', 2) AS account, sum(metrics_billed)::bigint AS billed FROM charges GROUP BY 1"""
_LOOKS = """SELECT task_id, service, target, shard, started_at, finished_at, window_start, window_end, status, detail, series,
    metrics_billed, metrics_in_doubt, requests::text FROM looks ORDER BY started_at"""
_ONCE = """SELECT coalesce(sum(least_billed), 0)::bigint FROM (SELECT min(metrics_billed) FILTER (WHERE metrics_billed > 0) AS least_billed
FROM looks GROUP BY task_id, service) AS one"""


@dataclass(slots=True)
class Verdict:
    """Of one run. Metrics are queries of GetMetricData, as they are billed."""

    complaints: list[str] = field(default_factory=list)
    windows: int = 0
    declared: int = 0
    records: int = 0
    points: int = 0
    lost: int = 0
    wrong: int = 0
    invented: int = 0
    billed: int = 0
    paid_twice: int = 0
    may_twice: int = 0
    """The most that may be paid twice: in flight, handed back, or lost on its way."""
    drain_s: float = 0.0
    memory_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class Freshness:
    """Watches until when everything is sealed; what a fault's recovery is read from."""

    watched: Field
    seen: list[tuple[float, float]] = field(default_factory=list)
    """(machine's time, everything that ended by then is closed); both without what the field's clocks were advanced by."""

    async def fresh_s(self) -> int:
        """Everything planned that ended by then is sealed or declared. Raises what asyncpg raises."""
        rows = await self.watched.sql(_FRESH)
        if len(rows) < targets() * len(SERVICES):
            return 0
        fresh_s: int = min(r["planned_s"] if r["open_s"] is None else r["open_s"] - POLL_S for r in rows)
        return fresh_s

    async def run(self) -> None:
        """Until cancelled. While the store does not answer nothing is fresh."""
        while True:
            try:
                async with asyncio.timeout(10):
                    fresh_s = await self.fresh_s()
                    self.seen.append((time.time(), fresh_s - self.watched.advanced_s))
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                pass
            await asyncio.sleep(1.0)

    def recovery_s(self, healed_at_s: float) -> float | None:
        """From a heal until all that was due then is sealed; None where it never was."""
        due_s = healed_at_s - DUE_S
        return next(
            (max(0.0, t - healed_at_s) for t, f in self.seen if t >= healed_at_s and f >= due_s), None
        )


def targets() -> int:
    return ACCOUNTS * len(REGIONS)


async def drain(field: Field, freshness: Freshness, until_s: int, verdict: Verdict) -> None:
    """Wait until every window that ended by `until_s` is closed; after DRAIN_S that is a complaint (I6)."""
    started_s = time.monotonic()

    async def closed() -> bool:
        return await freshness.fresh_s() >= until_s

    try:
        await field.until(closed, f"all is sealed that ended by {until_s}", DRAIN_S)
    except AssertionError as error:
        verdict.complaints.append(f"I6 not drained: {error}")
    verdict.drain_s = time.monotonic() - started_s


async def quiet(field: Field, timeout_s: float = 90.0) -> None:
    """Wait until nothing lands, nothing is billed and no receipt comes for a while. The coordinator is down by now."""
    last: object = None
    since_s = time.monotonic()

    async def still() -> bool:
        nonlocal last, since_s
        now = (await field.aws("/billing"), [tuple(r) for r in await field.sql(_BUSY)])
        if now != last:
            last, since_s = now, time.monotonic()
        return time.monotonic() - since_s > QUIET_S

    await field.until(still, "nothing is at work", timeout_s)


async def first_window_s(field: Field) -> int:
    """When the first window of all starts. Asked before anything strikes: what is new is read back, and has windows before it."""
    [(start_s,)] = await field.sql("SELECT extract(epoch FROM min(window_start))::bigint FROM windows")
    return int(start_s)


async def judge(field: Field, struck: Iterable[Struck], from_s: int, until_s: int, verdict: Verdict) -> None:
    """All invariants, over what began from `from_s` on and ended by `until_s`. The field stands still; nothing of it is changed."""
    config = field.config
    verdict.complaints += [complaint for one in struck for complaint in one.complaints]
    bad = {at: dead for one in struck for at, dead in one.bad.items()}
    elsewhere = {at for one in struck for at in one.elsewhere}
    await _windows(field, from_s, until_s, verdict)
    # Off this loop: the links live on it.
    await asyncio.to_thread(asyncio.run, _data(field, config, bad, elsewhere, from_s, until_s, verdict))
    verdict.complaints += await asyncio.to_thread(
        lambda: asyncio.run(archive_complaints(config, from_s - POLL_S, until_s))
    )
    await _money(field, verdict)
    verdict.memory_bytes = dict(field.memory_bytes)
    verdict.complaints += memory_complaints(field.memory_bytes)


async def _windows(field: Field, from_s: int, until_s: int, verdict: Verdict) -> None:
    """I7."""
    rows = await field.sql(_WINDOWS, until_s)
    open_ones = [
        f"{r['target']} {r['service']} {r['start_s']} {r['last_status']} {r['last_detail']} {r['unbalanced'] or ''}"
        for r in rows
        if not (r["sealed"] or r["declared"])
    ]
    if open_ones:
        verdict.complaints.append(f"I7 {len(open_ones)} windows are open, as {open_ones[:3]}")
    verdict.declared = sum(bool(r["declared"]) for r in rows)
    if verdict.declared:
        kinds = sorted({(r["declared"], r["last_detail"]) for r in rows if r["declared"]})
        verdict.complaints.append(f"I7 {verdict.declared} windows were given up, as {kinds[:3]}")
    starts: dict[tuple[str, str], set[int]] = {}
    for r in rows:
        starts.setdefault((r["target"], r["service"]), set()).add(r["start_s"])
    for r in await field.sql(_FOLDED):
        starts.setdefault((r["target"], r["service"]), set()).update(range(r["start_s"], r["end_s"], POLL_S))
    verdict.windows = sum(map(len, starts.values()))
    planned = set(range(from_s, until_s // POLL_S * POLL_S, POLL_S))
    missing = {of: sorted(planned - have) for of, have in starts.items() if planned - have}
    if missing or len(starts) != targets() * len(SERVICES):
        some = [(of, len(gone), gone[:3]) for of, gone in sorted(missing.items())][:3]
        verdict.complaints.append(f"I7 windows were never planned, as {some}")


async def _data(
    field: Field,
    config: Config,
    bad: Mapping[tuple[int, int], frozenset[tuple[str, bytes, str, bytes | int]]],
    elsewhere: Collection[tuple[str, int, int]],
    from_s: int,
    until_s: int,
    verdict: Verdict,
) -> None:
    connection = await open_connection(config.postgres, "campaign")
    try:
        as_shown = await verify(connection, field.truth, config, from_s, until_s)
        verdict.points += as_shown.equal
        verdict.lost += as_shown.missing
        verdict.wrong += as_shown.wrong
        verdict.invented += as_shown.invented
        if not as_shown.good:
            verdict.complaints.append(f"I1 as of the looks: {as_shown.examples[:3]}")
        verdict.complaints += await _final(connection, field, config, from_s, until_s, verdict)
    finally:
        await connection.close()
    published, complaints = await _published(config, bad)
    verdict.records = len(published)
    oracle = Oracle(config, Truth(0), published)
    table = await oracle.table()
    # A position may be past what came before a topic was made again, or its records deleted: only what is there is held against the store.
    verdict.complaints += complaints
    verdict.complaints += await oracle.positions()
    of_versions = _versions(published, table)
    if of_versions and (newer := _newer(published, table)):
        # A replay of the archive lands what was held back there: looks that saw the same points later. Nothing of it ever was on `raw`.
        archived = await _archived(config, from_s, until_s)
        table |= {key: of for key, of in newer.items() if table[key] in archived[key]}
        of_versions = _versions(published, table)
    verdict.complaints += of_versions
    letters = await oracle.dead_letters()
    topics = (config.kafka.topic("raw"), "archive")
    verdict.complaints += complaints_of_dead(
        [one for one in letters if one.origin.topic in topics],
        published,
        {
            at: Published(b"", (), dead)
            for at, dead in bad.items()
            if at not in published or not published[at].dead
        },
    )
    others = [one.origin for one in letters if one.origin.topic not in topics]
    if invented := {(at.topic, at.partition, at.offset) for at in others} - set(elsewhere):
        verdict.complaints.append(f"I2 dead without a cause: {len(invented)}, as {sorted(invented)[0]}")


def _versions(published: Mapping[tuple[int, int], Published], table: Table) -> list[str]:
    return [c for c in complaints_of_landed(published.values(), table) if not c.startswith("I1 invented")]


def _newer(published: Mapping[tuple[int, int], Published], table: Table) -> Table:
    """What was published of points that landed with a greater version than that."""
    expected = greatest(published.values())
    return {key: of for key, of in expected.items() if key in table and table[key][0] > of[0]}


async def _archived(config: Config, from_s: int, until_s: int) -> dict[tuple[bytes, int], set[Sample]]:
    """Of each point, all (version, value) that the archive has."""
    found: dict[tuple[bytes, int], set[Sample]] = defaultdict(set)
    os.environ.update(local_environment(os.environ))  # some credentials, and no real ones
    async with open_archive(config.s3, SystemClock()) as archive:
        for target in await archive.targets():
            async for key in archive.keys(target, from_s, until_s + 3600):
                task = await archive.get(key)
                for payload in task.payloads if task else ():
                    for sid, at_s, version, value in points_of(decode_batch(payload.value, config.limits)):
                        found[sid, at_s].add((version, value))
    return found


def points_of(batch: Batch) -> Iterator[tuple[bytes, int, int, float]]:
    """(series id, timestamp in seconds, version, value) of all points."""
    ids = bytes_of(series_ids(batch.series))
    owners = [sid for sid, n in zip(ids, batch.counts.tolist(), strict=True) for _ in range(n)]
    version = version_of(batch.revision, batch.observed_at_ms)
    rows = zip(owners, batch.timestamps_s.tolist(), batch.values.tolist(), strict=True)
    return ((sid, at_s, version, value + 0.0) for sid, at_s, value in rows)


async def _final(
    connection: asyncpg.Connection, field: Field, config: Config, from_s: int, until_s: int, verdict: Verdict
) -> list[str]:
    """What is landed against the final truth: all of it is settled by now."""
    lost = wrong = invented = 0
    examples: list[str] = []
    for account in config.accounts:
        for region in account.regions:
            landed = await landed_points(connection, account.id, region, from_s, until_s)
            for series, points in landed.items():
                namespace, metric, dimensions, stat = series
                question = Question(namespace, metric, dimensions, stat, POLL_S)
                [(times_s, values)] = field.truth.answers(
                    account.id, region, [question], from_s, until_s, SETTLED
                )
                final = dict(zip(times_s, values, strict=True))
                have = {t: value for t, (value, _) in points.items()}
                lost += len(final.keys() - have.keys())
                invented += len(have.keys() - final.keys())
                differ = [t for t in final.keys() & have.keys() if final[t] != have[t]]
                wrong += len(differ)
                if have != final and len(examples) < 3:
                    one = min(t for t in final.keys() | have.keys() if final.get(t) != have.get(t))
                    examples.append(
                        f"{account.id}/{region} {series} at {one}: {have.get(one)}, finally {final.get(one)}"
                    )
    verdict.lost, verdict.wrong = max(verdict.lost, lost), max(verdict.wrong, wrong)
    verdict.invented = max(verdict.invented, invented)
    return [f"I1 finally: {lost} lost, {wrong} wrong, {invented} invented, as {examples}"] if examples else []


async def _published(
    config: Config, bad: Mapping[tuple[int, int], frozenset[tuple[str, bytes, str, bytes | int]]]
) -> tuple[dict[tuple[int, int], Published], list[str]]:
    """All of `raw` by (partition, offset), and what is there that nobody owned up to.

    Where raw was deleted and made again, something good may stand where something bad was.
    """
    found: dict[tuple[int, int], Published] = {}
    complaints: list[str] = []
    for at, value in (await records_of(config, "raw")).items():
        try:
            batch = decode_batch(value, config.limits)
        except Rejected as error:
            if at in bad:
                found[at] = Published(value, (), bad[at])
            else:
                complaints.append(f"I2 {at} of raw is bad, and nobody has put it there: {error}")
            continue
        found[at] = Published(value, tuple(points_of(batch)))
    return found, complaints


async def _money(field: Field, verdict: Verdict) -> None:
    complaints = len(verdict.complaints)
    bill = (await field.aws("/billing"))["accounts"]
    verdict.billed = sum(account["metrics_requested"] for account in bill.values())
    [(billed, in_doubt)] = await field.sql(_MONEY)
    asked = noted(field.points)
    if not billed <= verdict.billed <= billed + in_doubt + asked.again:
        of = {account: one["metrics_requested"] for account, one in bill.items()}
        ledger = {row["account"]: row["billed"] for row in await field.sql(_MONEY_OF)}
        differ = [
            f"{a}: {of.get(a)} against {ledger.get(a)}"
            for a in sorted(of | ledger)
            if of.get(a) != ledger.get(a)
        ]
        verdict.complaints.append(
            f"I7 the bill is {verdict.billed}, the ledger {billed} + {in_doubt} in doubt, and {asked.again} were asked again by runs that were cut off; "
            + ", ".join(differ)
        )
    [(once,)] = await field.sql(_ONCE)
    verdict.paid_twice = verdict.billed - once
    verdict.may_twice = sum(one.in_flight for one in field.interruptions) + asked.unanswered
    if field.group_was_hurt:
        # Whom the broker does not hear is as good as paused: its successor may ask for what it has in flight.
        verdict.may_twice += asked.raced
    if verdict.paid_twice > verdict.may_twice:
        verdict.complaints.append(
            f"paid twice: {verdict.paid_twice} metrics, and only {verdict.may_twice} were in flight or lost"
        )
    if len(verdict.complaints) > complaints:
        # The store is gone when somebody reads this.
        looks = [dict(row) for row in await field.sql(_LOOKS)]
        (field.stack.logs / "looks.json").write_bytes(orjson.dumps(looks, option=orjson.OPT_APPEND_NEWLINE))


@dataclass(frozen=True, slots=True)
class Noted:
    """Metrics that workers have noted as asked for, by all processes so far."""

    unanswered: int = 0
    """Of tasks that were handed back, and of requests whose answer was lost."""
    again: int = 0
    """Those that runs that were cut off had asked for beyond once each."""
    raced: int = 0
    """Of runs whose task another had archived meanwhile."""


def noted(points: Path) -> Noted:
    rows = [ASKED.unpack(path.read_bytes()) for path in points.glob("*/*.asked")]
    return Noted(
        sum(abandoned + lost for _, abandoned, lost, *_ in rows),
        sum(again for _, _, _, again, _ in rows),
        sum(raced for *_, raced in rows),
    )


def memory_complaints(seen: Mapping[str, int]) -> list[str]:
    """I5, by the chart's limits."""
    values = yaml.safe_load((Path(CHECKOUT) / "helm" / "headgate" / "values.yaml").read_text())
    limits = {
        "coordinator": values["coordinator"],
        "exporter": values["exporter"],
        "consumer": values["sinks"]["postgres"],
    }
    found = []
    for worker, most in sorted(seen.items()):
        of = limits.get(re.sub(r"-\d+$", "", worker))
        if of is None:
            continue
        limit = int(of["resources"]["limits"]["memory"].removesuffix("Mi")) * 2**20
        if most >= limit:
            found.append(f"I5 {worker} had {most >> 20} MiB, the chart allows {limit >> 20}")
    return found
