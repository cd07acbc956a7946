"""The steps of a comparison between scrapes: reading our series, judging what has settled, and what both sides cost meanwhile.

Each step is bounded, goes by what `ingest.compare.state` remembers, and can be left out or repeated: what was judged is forgotten in the same
transaction that counts it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import asyncpg
import orjson

from ingest import charges
from ingest.compare.lines import (
    DIMENSION,
    Judged,
    Point,
    Verdict,
    adds_up,
    judge,
    key_of_series,
    longer_periods,
    may_be_chance,
)
from ingest.compare.report import Bill
from ingest.compare.state import Ripe, State
from ingest.compare.store import OurSeries, key_said, points, series_of
from ingest.model import SourceName
from shard_config.model import Config, ServiceProfile
from shard_config.price import Prices, statistics_share

RIPE_A_STEP: Final = 4_000
STEPS_MAX: Final = 100
"""Of one round: what is left waits for the next."""
HORIZON_S: Final = 3600
"""So far back a value without a timestamp is looked for; three periods where that is longer."""
POINTS_LOOKED_FOR_MAX: Final = 200
GRACE_S: Final = 120
PROBED_MAX: Final = 200_000
"""Series of ours that YACE has not and that are asked whether they live."""
PROBES: Final = 5

OTHER_PERIODS_TRIED: Final = 100
"""Of a step."""
OTHER_PERIOD_HITS: Final = 3

_DIFFERENT: Final = (Verdict.REVISED, Verdict.UNCLEAR, Verdict.WRONG, Verdict.GAP_HERE)
_DULL: Final = (Verdict.EQUAL, Verdict.NEITHER, Verdict.GAP_THERE)


def wait_s(profile: ServiceProfile) -> int:
    """How long after a scrape its values are held against ours: settled, looked at, landed."""
    return profile.settling_s + 2 * profile.poll_interval_s + profile.period_s + GRACE_S


def snake_case(state: State) -> bool:
    """Whether YACE's labels are in snake case, as its -labels-snake-case makes them."""
    names = [
        label
        for (labels,) in state.rows("SELECT labels FROM theirs LIMIT 2000")
        for label in orjson.loads(labels)
        if label.startswith(DIMENSION)
    ]
    return bool(names) and all(name == name.lower() for name in names)


# --- our series -----------------------------------------------------------------------------------------------


async def read_ours(connection: asyncpg.Connection, config: Config, state: State, now_s: int) -> int:
    """Take in our series of every configured account and region; returns their number. Raises Transient."""
    snake, count = snake_case(state), 0
    for account in config.accounts:
        for region in account.regions:
            profiles = config.services_in(account, region)
            spaces = sorted({p.namespace for p in profiles})
            async for some in series_of(connection, account.id, region, spaces):
                state.put_ours([_row(one, account.id, region, profiles, snake, now_s) for one in some])
                count += len(some)
    return count


def _row(
    one: OurSeries, account: str, region: str, profiles: Sequence[ServiceProfile], snake: bool, now_s: int
) -> tuple[Any, ...]:
    dimensions = orjson.loads(one.dimensions)
    of = [p for p in profiles if p.namespace == one.namespace]
    asked = next((p for p in of if p.period_s == one.period_s), None)
    key, name = key_of_series(account, region, one.namespace, one.metric, dimensions.items(), one.stat, snake)
    service = (asked or of[0]).service
    return key, one.id, name, account, region, service, one.said, one.period_s, int(asked is not None), now_s


async def find_living(
    connection: asyncpg.Connection, config: Config, state: State, from_s: int, now_s: int
) -> None:
    """Say of our series that YACE has not whether they had a point in the time compared. Raises Transient."""
    waits = {p.service: wait_s(p) for p in config.services}
    lonely = state.rows(
        "SELECT key, id, service, period_s FROM ours WHERE live IS NOT 1 AND NOT EXISTS (SELECT 1 FROM theirs WHERE theirs.key = ours.key) LIMIT ?",
        PROBED_MAX,
    )
    while some := [row for row, _ in zip(lonely, range(RIPE_A_STEP), strict=False)]:
        asked = []
        for _, id_, service, period_s in some:
            newest_s = (now_s - waits[service]) // period_s * period_s
            times = range(newest_s, min(from_s, newest_s) - PROBES * period_s, -period_s)
            asked += [(id_, t) for t in list(times)[:PROBES]]
        found = await points(connection, asked)
        state.set_living([(int(id_ in found), key) for key, id_, _, _ in some])


# --- values ---------------------------------------------------------------------------------------------------


async def judge_ripe(
    connection: asyncpg.Connection, config: Config, state: State, now_s: int, all_of_them: bool
) -> int:
    """Judge values whose time to settle is over, or all; returns how many. Raises Transient."""
    waits = {p.service: wait_s(p) for p in config.services}
    due = dict.fromkeys(waits, 0) if all_of_them else waits
    judged = 0
    for _ in range(STEPS_MAX):
        ripe = state.ripe(now_s, due, RIPE_A_STEP)
        if not ripe:
            break
        state.judged(await _verdicts(connection, state, ripe, waits, now_s))
        judged += len(ripe)
    return judged


async def _verdicts(
    connection: asyncpg.Connection, state: State, ripe: Sequence[Ripe], waits: Mapping[str, int], now_s: int
) -> list[tuple[Ripe, Judged]]:
    spans: dict[str, int] = {}
    for name in {r.name for r in ripe}:
        spans[name] = state.span_s(name) or 0
    near = await points(connection, [pair for r in ripe for pair in _asked(r, spans[r.name])])
    first = _judge(ripe, near, waits, now_s)
    # A value that is none of the near ones may be an older one: YACE stood still, or this metric's delay is not known yet.
    odd = [r for r, j in first if r.shown.timestamp_s is None and j.verdict not in _DULL]
    if odd:
        far = await points(connection, [pair for r in odd for pair in _asked(r, 0)])
        first = _judge(ripe, near | far, waits, now_s)
    return await _at_other_periods(connection, state, first)


async def _at_other_periods(
    connection: asyncpg.Connection, state: State, verdicts: Sequence[tuple[Ripe, Judged]]
) -> list[tuple[Ripe, Judged]]:
    """The same, where differences that only another period makes are told as that."""
    tried = [(r, j) for r, j in verdicts if j.verdict in _DIFFERENT and state.period_s(r.name) is None][
        :OTHER_PERIODS_TRIED
    ]
    asked = {
        (r.id, period_s, start_s): [(r.id, t) for t in range(start_s, start_s + period_s, r.period_s)]
        for r, _ in tried
        for period_s, start_s in _buckets(r)
    }
    found = await points(connection, list({pair for pairs in asked.values() for pair in pairs}))
    hits: Counter[tuple[str, int]] = Counter()
    weights: Counter[tuple[str, int]] = Counter()
    for r, _ in tried:
        stat = key_said(r.account, r.region, r.said, r.period_s).stat
        for period_s, start_s in _buckets(r):
            inside = [p for p in found.get(r.id, ()) if start_s <= p.timestamp_s < start_s + period_s]
            if adds_up(r.shown.value, stat, inside):
                weights[r.name, period_s] += 1 if may_be_chance(r.shown.value, stat) else OTHER_PERIOD_HITS
                hits[r.name, period_s] += 1
                break
    of_name = Counter(r.name for r, _ in tried)
    for (name, period_s), n in hits.items():
        if weights[name, period_s] >= OTHER_PERIOD_HITS and 2 * n >= of_name[name]:
            state.set_period(name, period_s)
    return [
        (r, Judged(j.shown, Verdict.OTHER_PERIOD, j.ours))
        if j.verdict in _DIFFERENT and state.period_s(r.name) is not None
        else (r, j)
        for r, j in verdicts
    ]


def _buckets(ripe: Ripe) -> list[tuple[int, int]]:
    """(period, start) of the longer periods that a value may be of."""
    at_s = ripe.shown.timestamp_s
    if at_s is not None:
        return [(p, at_s) for p in longer_periods(ripe.period_s) if at_s % p == 0]
    return [(p, ripe.shown.at_s // p * p - k * p) for p in longer_periods(ripe.period_s) for k in (1, 2, 3)]


def _asked(ripe: Ripe, span_s: int) -> list[tuple[bytes, int]]:
    """The points of ours that a value may be; `span_s` is 0 where it is not known how old it may be."""
    shown, period_s = ripe.shown, ripe.period_s
    if shown.timestamp_s is not None:
        return [(ripe.id, shown.timestamp_s)]
    newest_s = shown.at_s // period_s * period_s
    back_s = span_s + 2 * period_s if span_s else max(HORIZON_S, 3 * period_s)
    oldest_s = newest_s - min(back_s, POINTS_LOOKED_FOR_MAX * period_s)
    return [(ripe.id, t) for t in range(newest_s, oldest_s, -period_s)]


def _judge(
    ripe: Sequence[Ripe], found: Mapping[bytes, Sequence[Point]], waits: Mapping[str, int], now_s: int
) -> list[tuple[Ripe, Judged]]:
    def group(r: Ripe) -> tuple[int, str, str, str]:
        return r.shown.at_s, r.name, r.account, r.region

    verdicts = []
    for _, together in groupby(sorted(ripe, key=group), key=group):
        some = list(together)
        ours = {r.shown.key: found.get(r.id, ()) for r in some}
        for r, one in zip(some, judge([r.shown for r in some], ours, some[0].period_s), strict=True):
            base_s = r.shown.at_s if r.shown.timestamp_s is None else r.shown.timestamp_s + r.period_s
            unsettled = one.verdict not in _DULL and now_s < base_s + waits[r.service]
            verdicts.append((r, Judged(r.shown, Verdict.UNSETTLED, one.ours) if unsettled else one))
    return verdicts


# --- money ----------------------------------------------------------------------------------------------------


async def charged(connection: asyncpg.Connection, from_s: float, now_s: float) -> dict[str, list[int]]:
    """What CloudWatch billed us since the day of `from_s`: (queries, ListMetrics requests) by service. Raises Transient."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for c in await charges.read(connection, charges.day_of(from_s), charges.day_of(now_s + 86_400)):
        if c.target.source == SourceName.CLOUDWATCH:
            found[c.service][0] += c.metrics_billed
            found[c.service][1] += c.list_metrics
    return dict(found)


def our_bill(
    before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]], config: Config, series: int
) -> Bill:
    """What was charged between the two, for so many series."""
    prices, profiles = Prices.of(config.aws), config.service_by_name
    each = {s: n[0] - before.get(s, (0, 0))[0] for s, n in after.items()}
    lists = sum(n[1] - before.get(s, (0, 0))[1] for s, n in after.items())
    requests = prices.list_metrics_usd(lists, prices.requests_free_per_month)
    usd = prices.usd_per_1000_metrics / 1000
    once = sum(n * statistics_share(profiles.get(s)) * usd for s, n in each.items())
    return Bill(series, sum(each.values()), lists, sum(each.values()) * usd + requests, once + requests)
