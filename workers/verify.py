"""Does what has landed equal the truth? For runs against the simulated AWS, whose truth can be computed.

A sample carries the time of its look in its version, so each is held against the truth *as of that look*; a point is missing
where the truth showed it at the newest complete look of its window and the store does not have it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import asyncpg
import orjson

from ingest.clock import rfc3339, utc
from ingest.model import split_version
from ingest.sinks.connection import translated
from shard_config.model import Config, ServiceProfile
from workers.world import Question, Truth

EXAMPLES_MAX = 20

_SERIES = (
    "SELECT id, namespace, metric, dimensions, stat, period_s FROM series WHERE account = $1 AND region = $2"
)

_SAMPLES = """SELECT series, extract(epoch FROM ts)::bigint AS ts_s, value, version FROM samples
WHERE series = ANY($1::uuid[]) AND ts >= $2 AND ts < $3"""

_AS_OF = """SELECT service, extract(epoch FROM window_start)::bigint AS start_s, extract(epoch FROM window_end)::bigint AS end_s,
    extract(epoch FROM landed_as_of)::bigint AS as_of_s
FROM windows WHERE target = $1 AND landed_as_of IS NOT NULL"""

SeriesName = tuple[str, str, tuple[tuple[str, str], ...], str]
"""Namespace, metric, dimensions, statistic."""


@dataclass(slots=True)
class Verdict:
    """`expected` points were in the truth at the looks; the others count what differs, with some examples."""

    expected: int = 0
    equal: int = 0
    missing: int = 0
    wrong: int = 0
    invented: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """True where all expected points are there and equal, and no others are. Nothing expected is nothing proved."""
        return self.expected > 0 and self.missing == self.wrong == self.invented == 0

    def complain(self, what: str) -> None:
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(what)


async def verify(
    connection: asyncpg.Connection, truth: Truth, config: Config, from_s: int, to_s: int
) -> Verdict:
    """Hold all CloudWatch samples with a timestamp in [from_s, to_s) against the truth. Raises Transient."""
    verdict = Verdict()
    with translated("verification"):
        for account in config.accounts:
            for region in account.regions:
                landed = await landed_points(connection, account.id, region, from_s, to_s)
                as_of_s = await _as_of(connection, f"cloudwatch/{account.id}/{region}")
                for profile in config.services_in(account, region):
                    observed_s = as_of_s[profile.service]
                    _compare(verdict, truth, (account.id, region), profile, landed, observed_s, from_s, to_s)
                for series, points in landed.items():
                    verdict.invented += len(points)
                    verdict.complain(f"{account.id}/{region} {series}: landed, but nobody asked for it")
    return verdict


def _compare(
    verdict: Verdict,
    truth: Truth,
    target: tuple[str, str],
    profile: ServiceProfile,
    landed: dict[SeriesName, dict[int, tuple[float, int]]],
    as_of_s: Mapping[tuple[int, int], int],
    from_s: int,
    to_s: int,
) -> None:
    """Compare one service of one target; takes what it compared out of `landed`."""
    asked = list(_asked(truth, target, profile))
    found = [landed.pop(series, {}) for series in asked]
    questions = [Question(ns, m, d, s, profile.period_s) for ns, m, d, s in asked]
    # By time of look: what was visible then. A window's points are expected as of its newest complete look.
    for (start_s, end_s), look_s in as_of_s.items():
        answers = truth.answers(*target, questions, max(start_s, from_s), min(end_s, to_s), look_s)
        for series, points, (times_s, _) in zip(asked, found, answers, strict=True):
            expected = set(times_s)
            verdict.expected += len(expected)
            for t in expected - points.keys():
                verdict.missing += 1
                verdict.complain(f"{target} {series} at {rfc3339(t)}: missing")
    looks_s = sorted({version_s for points in found for _, version_s in points.values()})
    for look_s in looks_s:
        answers = truth.answers(*target, questions, from_s, to_s, look_s)
        for series, points, (times_s, values) in zip(asked, found, answers, strict=True):
            shown: dict[int, float] = {}
            for t, v in zip(times_s, values, strict=True):
                shown[t] = max(v, shown.get(t, v))  # of a repeated timestamp the greatest value
            _hold(verdict, f"{target} {series}", points, shown, look_s)


def _hold(
    verdict: Verdict,
    what: str,
    points: Mapping[int, tuple[float, int]],
    shown: Mapping[int, float],
    look_s: int,
) -> None:
    for t, (value, version_s) in points.items():
        if version_s != look_s:
            continue
        if t not in shown:
            verdict.invented += 1
            verdict.complain(f"{what} at {rfc3339(t)}: landed {value!r}, but the truth has no point")
        elif shown[t] != value:
            verdict.wrong += 1
            verdict.complain(f"{what} at {rfc3339(t)}: landed {value!r}, the truth is {shown[t]!r}")
        else:
            verdict.equal += 1


def _asked(truth: Truth, target: tuple[str, str], profile: ServiceProfile) -> Iterator[SeriesName]:
    """The series that a configuration asks for, worked out from the truth's own list of metrics."""
    names = None if profile.metrics == "all" else {m.name: m.statistics for m in profile.metrics}
    for metric in truth.metrics(*target):
        if metric.namespace != profile.namespace:
            continue
        statistics = profile.statistics if names is None else names.get(metric.name, ())
        for stat in statistics:
            yield metric.namespace, metric.name, metric.dimensions, stat


async def landed_points(
    connection: asyncpg.Connection, account: str, region: str, from_s: int, to_s: int
) -> dict[SeriesName, dict[int, tuple[float, int]]]:
    """By series: timestamp → (value, second of the look that it is from)."""
    names: dict[bytes, SeriesName] = {}
    for row in await connection.fetch(_SERIES, account, region):
        dimensions = tuple(sorted(orjson.loads(row["dimensions"]).items()))
        names[row["id"]] = (row["namespace"], row["metric"], dimensions, row["stat"])
    found: dict[SeriesName, dict[int, tuple[float, int]]] = defaultdict(dict)
    rows = await connection.fetch(_SAMPLES, list(names), utc(from_s), utc(to_s))
    for row in rows:
        _, observed_at_ms = split_version(row["version"])
        found[names[row["series"]]][row["ts_s"]] = (row["value"], observed_at_ms // 1000)
    return found


async def _as_of(connection: asyncpg.Connection, target: str) -> dict[str, dict[tuple[int, int], int]]:
    """By service: stretch of windows → second of their newest complete look. Neighbours of one look are one stretch."""
    found: dict[str, dict[tuple[int, int], int]] = defaultdict(dict)
    for row in await connection.fetch(f"{_AS_OF} ORDER BY service, window_start", target):
        stretches = found[row["service"]]
        last = next(reversed(stretches), None)
        if last is not None and last[1] == row["start_s"] and stretches[last] == row["as_of_s"]:
            del stretches[last]
            stretches[(last[0], row["end_s"])] = row["as_of_s"]
        else:
            stretches[(row["start_s"], row["end_s"])] = row["as_of_s"]
    return found
