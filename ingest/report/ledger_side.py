"""What the ledger says for the report: how complete and how fresh each account's data are, hour by hour where that matters, and what was asked
of AWS in each account's busiest hour. Reads only, inside a transaction of the caller's.

* A window is complete when a complete look at it has landed. Windows that are folded into days count as those that are rows; of a day that a range cuts,
  by their share of its windows' time.
* Windows that end after the range are none of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import asyncpg
import numpy as np
from numpy.typing import NDArray

from ingest.clock import utc
from ingest.report.model import AccountCoverage, Figure
from ingest.report.money import Asked
from ingest.report.resources import HOUR_S, Axis
from ingest.sinks.connection import translated
from ingest.spending import payer_of, payers_of
from shard_config.model import Config

NO_WINDOWS: Final = "the ledger has no windows in this range"
_FIRST_WORD: Final = "not looked at yet"

_SECONDS = "(SELECT coalesce(sum(extract(epoch FROM upper(r) - lower(r))), 0)::float8 FROM unnest({}) AS r)"
_CUT = "tstzmultirange(tstzrange($1, $2))"

_ROWS = f"""SELECT split_part(target, '/', 2) AS account, declared IS NULL AND landed_as_of IS NOT NULL AS complete,
    coalesce(declared, nullif(last_status, 'complete'), '{_FIRST_WORD}') AS reason, count(*)::float8 AS windows,
    max(window_end) FILTER (WHERE declared IS NULL AND landed_as_of IS NOT NULL) AS newest
FROM windows WHERE window_start >= $1 AND window_end <= $2 AND target LIKE 'cloudwatch/%' GROUP BY 1, 2, 3"""  # noqa: S608  # only constants

_FOLDED = f"""WITH days AS (
    SELECT *, windows / nullif({_SECONDS.format("covered")}, 0) AS per_s FROM sealed_days
    WHERE day >= ($1 AT TIME ZONE 'UTC')::date - 1 AND day <= ($2 AT TIME ZONE 'UTC')::date AND target LIKE 'cloudwatch/%'
), without AS (
    SELECT d.target, d.service, d.day, x.reason, x.covered, d.per_s FROM days AS d JOIN declared_days AS x USING (target, service, day)
)
SELECT split_part(target, '/', 2) AS account, true AS complete, '' AS reason,
    sum(per_s * {_SECONDS.format(f"covered * {_CUT}")}) AS windows, max(least($2, last_end)) AS newest
FROM (SELECT target, last_end, per_s, covered - coalesce((SELECT range_agg(r) FROM declared_days AS x, unnest(x.covered) AS r
    WHERE x.target = d.target AND x.service = d.service AND x.day = d.day), '{{}}') AS covered FROM days AS d) AS whole GROUP BY 1
UNION ALL SELECT split_part(target, '/', 2), false, reason, sum(per_s * {_SECONDS.format(f"covered * {_CUT}")}), NULL
FROM without GROUP BY 1, 3"""  # noqa: S608  # only constants

_LOOKED = f"""SELECT split_part(target, '/', 2) AS account, split_part(target, '/', 3) AS region, service,
    window_start AS from_at, window_end AS to_at, declared IS NULL AND landed_as_of IS NOT NULL AS complete
FROM windows WHERE window_end > $1 AND window_start < $2 AND service = ANY($3) AND target LIKE 'cloudwatch/%'
UNION ALL SELECT split_part(target, '/', 2), split_part(target, '/', 3), service, lower(r), upper(r), true
FROM sealed_days, unnest(covered * {_CUT}) AS r
WHERE day >= ($1 AT TIME ZONE 'UTC')::date - 1 AND day <= ($2 AT TIME ZONE 'UTC')::date AND service = ANY($3) AND target LIKE 'cloudwatch/%'
UNION ALL SELECT split_part(target, '/', 2), split_part(target, '/', 3), service, lower(r), upper(r), NULL
FROM declared_days, unnest(covered * {_CUT}) AS r
WHERE day >= ($1 AT TIME ZONE 'UTC')::date - 1 AND day <= ($2 AT TIME ZONE 'UTC')::date AND service = ANY($3) AND target LIKE 'cloudwatch/%'"""  # noqa: S608  # only constants
"""What was looked at: complete, not complete, and (NULL) what of the complete ones was given up."""

_ASKED = """SELECT split_part(target, '/', 2) AS account, split_part(target, '/', 3) AS region, date_trunc('hour', started_at) AS hour,
    sum(coalesce((requests->>'GetMetricData')::bigint, 0))::bigint AS calls,
    sum(metrics_billed * extract(epoch FROM window_end - window_start) / coalesce(p.period_s, 60))::bigint AS datapoints
FROM looks LEFT JOIN unnest($3::text[], $4::integer[]) AS p (service, period_s) USING (service)
WHERE started_at >= $1 AND started_at < $2 AND target LIKE 'cloudwatch/%' GROUP BY 1, 2, 3"""


@dataclass(slots=True)
class Tally:
    """An account's windows in a range."""

    complete: float = 0.0
    missing: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    newest: datetime | None = None

    @property
    def all(self) -> float:
        return self.complete + sum(self.missing.values())

    @property
    def share(self) -> float | None:
        return min(self.complete / self.all, 1.0) if self.all else None


async def tallies(
    connection: asyncpg.Connection, from_s: int, to_s: int, accounts: Collection[str] | None
) -> dict[str, Tally]:
    """By account, of the windows within [from_s, to_s). None: of all accounts. Raises Transient."""
    with translated("the ledger's windows"):
        rows = [
            row for sql in (_ROWS, _FOLDED) for row in await connection.fetch(sql, utc(from_s), utc(to_s))
        ]
    found: dict[str, Tally] = defaultdict(Tally)
    for row in rows:
        if not row["windows"] or (accounts is not None and row["account"] not in accounts):
            continue
        one = found[row["account"]]
        if row["complete"]:
            one.complete += row["windows"]
        else:
            one.missing[row["reason"]] += row["windows"]
        one.newest = max(filter(None, (one.newest, row["newest"])), default=None)
    return dict(found)


def coverage_of(
    week: Mapping[str, Tally], before: Mapping[str, Tally], config: Config, end_s: int
) -> tuple[tuple[AccountCoverage, ...], Figure]:
    """Each account's coverage of the week, least first, and that of all together. `end_s`: the range's end, or now where that is earlier."""
    aliases = {a.id: a.alias for a in config.accounts}
    found = []
    for account, one in week.items():
        newest_s = None if one.newest is None else int(one.newest.timestamp())
        was = before.get(account)
        reasons = sorted(
            ((r, round(n)) for r, n in one.missing.items() if round(n)), key=lambda x: (-x[1], x[0])
        )
        found.append(
            AccountCoverage(
                account, aliases.get(account, ""), Figure(one.share, "share", was.share if was else None, one.share, "" if one.all else NO_WINDOWS),
                newest_s, None if newest_s is None else max(0, end_s - newest_s), round(one.all), round(sum(one.missing.values())), tuple(reasons),
            )
        )  # fmt: skip
    share = _share(week.values())
    of_all = Figure(share, "share", _share(before.values()), share, NO_WINDOWS if share is None else "")
    return tuple(sorted(found, key=lambda a: (a.coverage.value or 0.0, a.account))), of_all


def _share(tallies: Iterable[Tally]) -> float | None:
    ones = list(tallies)
    every = sum(one.all for one in ones)
    return min(sum(one.complete for one in ones) / every, 1.0) if every else None


Pair = tuple[str, str, str]
"""Account, region, and service as the ledger calls it."""


async def looked(
    connection: asyncpg.Connection, axis: Axis, services: Collection[str]
) -> dict[Pair, NDArray[np.float32]]:
    """By account, region and service: shape (hours,), 0..1, the share of each hour that was looked at in full. Raises Transient."""
    seconds: dict[Pair, NDArray[np.float32]] = {}
    with translated("the ledger's windows"):
        cursor = connection.cursor(
            _LOOKED, utc(axis.start_s), utc(axis.end_s), list(services), prefetch=10_000
        )
        async for row in cursor:
            pair = (row["account"], row["region"], row["service"])
            if pair not in seconds:
                seconds[pair] = np.zeros(axis.hours, np.float32)
            if row["complete"] is False:
                continue
            sign = -1.0 if row["complete"] is None else 1.0
            _spread(seconds[pair], axis, row["from_at"].timestamp(), row["to_at"].timestamp(), sign)
    return {pair: np.clip(found / HOUR_S, 0, 1) for pair, found in seconds.items()}


def _spread(seconds: NDArray[np.float32], axis: Axis, from_s: float, to_s: float, sign: float) -> None:
    """Add the seconds of [from_s, to_s) to their hours."""
    first = (max(from_s, axis.start_s) - axis.start_s) / HOUR_S
    last = (min(to_s, axis.end_s) - axis.start_s) / HOUR_S
    if last <= first:
        return
    hours = np.arange(int(first), int(np.ceil(last)))
    seconds[hours] += (
        sign * HOUR_S * (np.minimum(hours + 1, last) - np.maximum(hours, first)).astype(np.float32)
    )


async def looks_since(connection: asyncpg.Connection) -> int | None:
    """When the oldest look that the ledger still has was begun; None: it has none. Raises Transient."""
    with translated("the ledger's looks"):
        found: datetime | None = await connection.fetchval(
            "SELECT min(started_at) FROM looks WHERE target LIKE 'cloudwatch/%'"
        )
    return None if found is None else int(found.timestamp())


def looks_cover(since_s: int | None, from_s: int, to_s: int) -> float:
    """The share of [from_s, to_s), 0..1, of which the ledger still has the looks."""
    if since_s is None or to_s <= from_s:
        return 0.0
    return max(0.0, to_s - max(since_s, from_s)) / (to_s - from_s)


async def asked(connection: asyncpg.Connection, config: Config, from_s: int, to_s: int) -> list[Asked]:
    """What each account was asked in its busiest hour of [from_s, to_s), by the looks that the ledger still has; by way of a monitoring account
    it is that account's. Raises Transient.
    """
    periods = {p.service: p.period_s for p in config.services}
    with translated("the ledger's looks"):
        rows: list[Any] = await connection.fetch(
            _ASKED, utc(from_s), utc(to_s), list(periods), list(periods.values())
        )
    payers = payers_of(config)
    hours: dict[tuple[str, str], dict[datetime, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in rows:
        of = hours[payer_of(payers, row["account"]), row["region"]][row["hour"]]
        of[0] += row["calls"]
        of[1] += row["datapoints"]
    return [
        Asked(account, region, max(c for c, _ in of.values()), max(d for _, d in of.values()))
        for (account, region), of in sorted(hours.items())
    ]
