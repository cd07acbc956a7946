"""How late points come and how late they change, learned from receipts; and the settling times that follow. Decides purely.

* *Each look counts once*: what it shows is added in the transaction that inserts it.
* A window counts from a look within two of its lengths after its end on; what was first looked at later says nothing of when it came.
* Points that came between two looks came, for us, with the second: ages are from above. So is what changed: of a series that changed in a
  window all points count, beside those that are new. A look that published everything shows only what came.
* *Nothing is guessed*: with few points, or where points still came at the last look, there is no proposal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import asyncpg
import orjson

from ingest.clock import utc
from ingest.model import LookStatus, Receipt, ReceiptItem, SourceName
from ingest.sinks.connection import translated

DAYS_KEPT = 35
POINTS_MIN = 10_000
"""With fewer no proposal is made: one in a thousand of them is not many."""
MINUTE_S = 60
AGE_S_MAX = 2**31 // MINUTE_S * MINUTE_S - MINUTE_S
"""What the column holds; only a source whose clock is mad is later."""
LOOKS_BEFORE_MAX = 8
"""Looks before that are asked what they saw of a window; the last one that covers it counts."""

_BEFORE = """SELECT window_start, window_end, coalesce(whole, windows) AS seen FROM looks
WHERE target = $1 AND service = $2 AND status = 'complete' AND window_end > $3 AND finished_at < $4 AND finished_at > $4 - interval '6 days'
ORDER BY finished_at DESC LIMIT $5"""

_ADD = """INSERT INTO settling AS s (target, service, day, age_s, appeared, changed) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (target, service, day, age_s) DO UPDATE SET appeared = s.appeared + excluded.appeared, changed = s.changed + excluded.changed"""

_READ = """SELECT service, age_s, sum(appeared)::bigint AS appeared, sum(changed)::bigint AS changed FROM settling
WHERE day >= $1 AND ($2::text IS NULL OR service = $2) GROUP BY 1, 2 ORDER BY 1, 2"""


@dataclass(frozen=True, slots=True)
class Late:
    """Points by how they were met at one age: new, and changed."""

    appeared: int = 0
    changed: int = 0

    def __add__(self, other: Late) -> Late:
        return Late(self.appeared + other.appeared, self.changed + other.changed)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What was observed of a service. `settling_s` is None where nothing is proposed; `detail` says why then.

    `unsettled` is the share of points that came or changed after `configured_s`, None where no look was later.
    """

    service: str
    configured_s: int
    points: int
    settling_s: int | None
    unsettled: float | None
    detail: str = ""


def seen_late(done: ReceiptItem, before: Mapping[int, tuple[int, int]]) -> dict[tuple[date, int], Late]:
    """What a complete look shows, by day and age. `before`: by window's start, points and digest at the last look."""
    seen = {w.start_s: (w.points, w.digest) for w in done.seen}
    published = {w.start_s: w.points for w in done.windows}
    found: dict[tuple[date, int], Late] = defaultdict(Late)
    for window in done.item.windows():
        late_s = done.outcome.observed_at_ms / 1000 - window.end_s
        age_s = min(AGE_S_MAX, max(0, -int(-late_s // MINUTE_S)) * MINUTE_S)
        now, last = seen.get(window.start_s, (0, 0)), before.get(window.start_s)
        if last is None:
            if late_s >= 2 * done.item.grid_s:
                continue
            late = Late(now[0], 0)
        else:
            appeared = max(0, now[0] - last[0])
            changed = published.get(window.start_s, 0) - appeared if done.whole else 0
            late = Late(appeared, max(0, changed))
        # A look at which nothing was late says so: that of the last age decides.
        found[utc(window.start_s).date(), age_s] += late
    return found


def propose(
    service: str, ages: Mapping[int, Late], configured_s: int, share: float, points_min: int = POINTS_MIN
) -> Proposal:
    """The least observed age by which `share` of the points had come and stopped changing."""
    points = sum(late.appeared for late in ages.values())
    after = sum(late.appeared + late.changed for age_s, late in ages.items() if age_s > configured_s)
    unsettled = after / points if points and max(ages) > configured_s else None
    if points < points_min:
        return Proposal(service, configured_s, points, None, unsettled, "too little data")
    allowed = (1 - share) * points
    settling_s = 0
    for age_s in sorted(ages, reverse=True):
        allowed -= ages[age_s].appeared + ages[age_s].changed
        if allowed < 0:
            settling_s = age_s
            break
    if settling_s == max(ages) and settling_s > 0 and len(ages) > 1:
        what = f"still coming or changing at the last look, {settling_s} s after the end: try more than that"
        return Proposal(service, configured_s, points, None, unsettled, what)
    if len(ages) == 1:
        return Proposal(
            service, configured_s, points, None, unsettled, "too little data: looked at once only"
        )
    return Proposal(service, configured_s, points, settling_s, unsettled)


async def learn(connection: asyncpg.Connection, receipt: Receipt, done: ReceiptItem) -> None:
    """Add what a new look shows. Inside a transaction of the caller's."""
    if done.outcome.status is not LookStatus.COMPLETE or receipt.target.source != SourceName.CLOUDWATCH:
        return
    rows = await connection.fetch(
        _BEFORE, str(receipt.target), done.item.service, utc(done.item.start_s),
        utc(receipt.finished_at_ms / 1000), LOOKS_BEFORE_MAX,
    )  # fmt: skip
    before: dict[int, tuple[int, int]] = {}
    for row in rows:
        seen = {start_s: (points, digest) for start_s, points, digest in orjson.loads(row["seen"])}
        for window in done.item.windows():
            if row["window_start"].timestamp() <= window.start_s < row["window_end"].timestamp():
                before.setdefault(window.start_s, seen.get(window.start_s, (0, 0)))
    for (day, age_s), late in sorted(seen_late(done, before).items()):
        await connection.execute(
            _ADD, str(receipt.target), done.item.service, day, age_s, late.appeared, late.changed
        )


async def observed(
    connection: asyncpg.Connection, now: datetime, days: int, service: str | None = None
) -> dict[str, dict[int, Late]]:
    """By service and age, of windows of the last days. Raises Transient."""
    with translated("ledger"):
        rows = await connection.fetch(_READ, (now - timedelta(days=days)).date(), service)
    found: dict[str, dict[int, Late]] = defaultdict(dict)
    for row in rows:
        found[row["service"]][row["age_s"]] = Late(row["appeared"], row["changed"])
    return found


async def forget(connection: asyncpg.Connection, now: datetime) -> None:
    """Remove what is older than DAYS_KEPT."""
    await connection.execute("DELETE FROM settling WHERE day < $1", (now - timedelta(days=DAYS_KEPT)).date())
