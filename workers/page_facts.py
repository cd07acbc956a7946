"""What the live page says: from what the coordinator has seen, to JSON. Pure.

* A *cell* is a unit of the plan: a target, or one service of a target that is split. It is `fresh` while its newest landed window ended
  at most one poll interval (as stretched for a budget) and GRACE_S ago, `late` up to three, `stale` beyond; `paused` where nobody asks for it,
  `waiting` where nothing can have landed yet.
* Freshness in numbers is over cells that are asked for.
* Whatever a part said last is shown until it says something else; `parts` tells since when it does not.
* Nothing here is HTML, and every text is of bounded length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from ingest.budget import Decision
from ingest.glance import Glance, Trouble
from ingest.overview import GRACE_S
from workers.budgets import to_plain

STARTING_S = 180
"""Of a coordinator's life: what has not landed by then was not asked for in vain yet."""
FAULTS_MAX = 40
MOVES_MAX = 20
TEXT_MAX = 300
HISTORY_S = 1800
SAMPLE_S = 15
SAMPLES = HISTORY_S // SAMPLE_S

T = TypeVar("T")
Json = dict[str, Any]
Ends = Mapping[str, Mapping[int, int]]
"""Log ends, by topic and partition."""


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """What one part said last, and since when it has not answered. Times are milliseconds since the epoch, UTC."""

    value: T | None = None
    as_of_ms: int | None = None
    failing_since_ms: int | None = None
    error: str = ""

    def failed(self, error: str, now_ms: int) -> Part[T]:
        """With what it said before. What never answered has been away since now."""
        since_ms = self.failing_since_ms or self.as_of_ms or now_ms
        return replace(self, failing_since_ms=since_ms, error=error[:TEXT_MAX])


@dataclass(frozen=True, slots=True)
class GroupSeen:
    """A consumer group: records behind the log's end by partition, who is in it, and for how long the oldest unread record has waited at
    least (None: not known, or nothing waits).
    """

    lag: Mapping[int, int]
    members: tuple[str, ...]
    waits_s: float | None = None

    @property
    def lag_total(self) -> int:
        return sum(self.lag.values())


@dataclass(frozen=True, slots=True)
class KafkaSeen:
    """Groups by what they are for: exporters, landing, projection, and remote write's by receiver."""

    exporters: GroupSeen
    landing: GroupSeen
    projection: GroupSeen
    receivers: Mapping[str, GroupSeen]
    dead: int
    """Records on the dead-letter topic, ever."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is expected of a unit: `interval_s` is the shortest poll interval of its services as they are stretched now."""

    slot: int
    interval_s: int
    alias: str = ""
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """All that the page is made from. `shards` is the Publisher's page."""

    now_ms: int
    asked_until_ms: int
    """Freshness counts from here: when the ledger was read last, or the end of a run's horizon."""
    started_ms: int
    revision: str
    shards: Json
    units: Mapping[str, Unit]
    gone: Mapping[str, int] = field(default_factory=dict)
    """By shard, when it was last seen."""
    starts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By shard, when processes of this name have started, as far as this coordinator has seen it within HISTORY_S."""
    kafka: Part[KafkaSeen] = field(default_factory=Part)
    ledger: Part[Glance] = field(default_factory=Part)
    money: Part[Decision] = field(default_factory=Part)
    heal_waits: Mapping[str, int] = field(default_factory=dict)
    """Windows past their deadline about which nothing is done now, by why."""
    config_refused: bool = False
    organization_age_s: float | None = None
    unowned_since_ms: int | None = None
    """Since when slots have had no shard; None: each has one."""
    dead_before: tuple[int, int] | None = None
    """The oldest count of dead letters within HISTORY_S that is known, and when."""

    @property
    def starting(self) -> bool:
        return self.now_ms - self.started_ms < STARTING_S * 1000

    @property
    def parts(self) -> tuple[tuple[str, Part[Any]], ...]:
        return ("Kafka", self.kafka), ("PostgreSQL", self.ledger), ("budgets", self.money)


# --- cells ------------------------------------------------------------------------------------------------------


def cells_of(seen: Seen) -> list[Json]:
    """By unit, in the order of their names; what is unremarkable is left out of a cell."""
    glance = seen.ledger.value
    troubles: dict[str, list[str]] = defaultdict(list)
    for one in glance.troubles if glance else ():
        text = f"{one.service} {one.status}: {one.detail.removeprefix(f'{one.target} {one.service}: ')}"
        troubles[one.target].append(text)
        troubles[f"{one.target}#{one.service}"].append(text)
    return [
        _cell(seen, glance, name, unit, troubles.get(name, ())) for name, unit in sorted(seen.units.items())
    ]


def _cell(seen: Seen, glance: Glance | None, name: str, unit: Unit, said: Sequence[str]) -> Json:
    target, _, service = name.partition("#")
    fresh = None
    if glance is not None:
        fresh = glance.fresh_parts.get((target, service)) if service else glance.fresh.get(target)
    fresh_ms = None if fresh is None else int(fresh.timestamp() * 1000)
    cell: Json = {
        "unit": name,
        "slot": unit.slot,
        "level": _level(seen, unit, fresh_ms),
        "fresh_ms": fresh_ms,
    }
    cell["every_s"] = unit.interval_s
    if unit.alias:
        cell["alias"] = unit.alias[:TEXT_MAX]
    opened = glance.open.get(target) if glance else None
    if opened is not None:
        cell |= {
            "open": opened.open,
            "gaps": opened.late,
            "oldest_ms": int(opened.oldest.timestamp() * 1000),
        }
    if said:
        cell["problem"] = "; ".join(said)[:TEXT_MAX]
    return cell


def _level(seen: Seen, unit: Unit, fresh_ms: int | None) -> str:
    if unit.paused:
        return "paused"
    if fresh_ms is not None:
        age_s = (seen.asked_until_ms - fresh_ms) / 1000
        if age_s <= unit.interval_s + GRACE_S:
            return "fresh"
        if age_s <= 3 * unit.interval_s + GRACE_S:
            return "late"
    if seen.ledger.value is None or seen.starting:
        return "waiting"
    return "stale"


# --- numbers ----------------------------------------------------------------------------------------------------


def numbers_of(seen: Seen, cells: Sequence[Json]) -> Json:
    """What the tiles show. None where it is not known. `history` keeps those that are numbers."""
    glance, kafka = seen.ledger.value, seen.kafka.value
    ages = sorted(
        ((seen.asked_until_ms - c["fresh_ms"]) / 1000, c["unit"])
        for c in cells
        if c["fresh_ms"] is not None and c["level"] != "paused"
    )
    by_reason = dict(glance.windows.by_reason) if glance else {}
    in_time = by_reason.pop("in_time", 0)
    money = seen.money.value
    return {
        "fresh_p50_s": _quantile(ages, 0.5),
        "fresh_p99_s": _quantile(ages, 0.99),
        "fresh_worst_s": ages[-1][0] if ages else None,
        "fresh_worst": ages[-1][1] if ages else None,
        "lag": kafka.landing.lag_total if kafka else None,
        "lag_waits_s": kafka.landing.waits_s if kafka else None,
        "lag_collect": kafka.exporters.lag_total if kafka else None,
        "lag_ledger": kafka.projection.lag_total if kafka else None,
        "points_per_s": glance.points_per_s if glance else None,
        "open": sum(by_reason.values()) + in_time if glance else None,
        "gaps": sum(by_reason.values()) if glance else None,
        "gaps_by_reason": dict(sorted(by_reason.items(), key=lambda item: -item[1])),
        "dead": kafka.dead if kafka else None,
        "dead_lately": kafka.dead - seen.dead_before[0] if kafka and seen.dead_before else None,
        "usd": float(money.all.spent_usd) if money else None,
        "money": to_plain(money) if money else None,
    }


def _quantile(ages: Sequence[tuple[float, str]], q: float) -> float | None:
    """The least age that a share of them does not exceed."""
    return ages[max(0, -int(-q * len(ages) // 1) - 1)][0] if ages else None


KEPT = ("fresh_p50_s", "fresh_p99_s", "fresh_worst_s", "lag", "points_per_s", "open", "gaps", "dead", "usd")


@dataclass(slots=True)
class History:
    """The last HISTORY_S in memory: a sample each SAMPLE_S at most, so it is bounded."""

    samples: list[tuple[int, Json, Ends]] = field(default_factory=list)

    def add(self, now_ms: int, numbers: Json, ends: Ends) -> None:
        if self.samples and now_ms - self.samples[-1][0] < SAMPLE_S * 1000:
            return
        self.samples.append((now_ms, {name: numbers[name] for name in KEPT}, ends))
        del self.samples[:-SAMPLES]

    def page(self) -> Json:
        """By number its samples, beside the times of all."""
        found: Json = {"at_ms": [at for at, _, _ in self.samples]}
        return found | {name: [_short(numbers[name]) for _, numbers, _ in self.samples] for name in KEPT}

    def first_dead(self) -> tuple[int, int] | None:
        """The oldest count of dead letters that is known, and when."""
        return next(((n["dead"], at) for at, n, _ in self.samples if n["dead"] is not None), None)

    def waits_s(self, topic: str, lag: Mapping[int, int], ends: Ends, now_ms: int) -> float | None:
        """For how long the oldest unread record of a topic has been there at least, by when the log's end was seen beyond it."""
        waiting = {p: ends[topic][p] - behind for p, behind in lag.items() if behind}
        for at_ms, _, before in self.samples:
            then = before.get(topic, {})
            if any(then.get(p, 0) > committed for p, committed in waiting.items()):
                return (now_ms - at_ms) / 1000
        return 0.0 if waiting else None


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# --- shards and faults ------------------------------------------------------------------------------------------


def shards_of(seen: Seen) -> list[Json]:
    """The Publisher's, with what Kafka and the ledger say of each; then those that are gone."""
    kafka, glance = seen.kafka.value, seen.ledger.value
    lag = kafka.exporters.lag if kafka else {}
    found = []
    alive = [s for s in seen.shards["shards"] if s["alive"]]
    mean = sum(s["weight"] for s in alive) / max(1, len(alive))
    for one in seen.shards["shards"]:
        name = one["shard"]
        found.append(
            {k: one[k] for k in ("shard", "alive", "since_ms", "host", "pid", "slots", "assigned")}
            | {
                "load": one["weight"] / mean if mean else None,
                "lag": sum(lag.get(slot, 0) for slot in one["slots"]) if kafka else None,
                "points_per_s": glance.collected_per_s.get(name, 0.0) if glance else None,
                "starts": len(seen.starts.get(name, ())),
                "gone_ms": None if one["alive"] else seen.gone.get(name),
            }
        )
    known = {s["shard"] for s in seen.shards["shards"]}
    for name, last_ms in sorted(seen.gone.items()):
        if name not in known:
            found.append({"shard": name, "alive": False, "slots": [], "assigned": [], "gone_ms": last_ms})
    return found


def unowned_of(seen: Seen) -> list[int]:
    """Slots that no living shard has."""
    owned = {slot for s in seen.shards["shards"] if s["alive"] for slot in s["slots"]}
    return [slot for slot in range(seen.shards["slots"]) if slot not in owned]


REMEDIES = {
    "forbidden": "mend the account's role: `headgate preflight` says what it lacks",
    "failed": "`headgate why` says whose it is; it is asked again by itself",
    "partial": "some series did not answer; they are asked again by itself",
    "expired": "it was too late to ask; an endpoint has no past",
    "unrecoverable": "no source keeps it any more",
    "abandoned": "`headgate why`, then `headgate backfill`",
}


def faults_of(seen: Seen) -> list[Json]:
    """The newest first: troubled targets, windows that were given up, dead letters, parts that do not answer."""
    found: list[Json] = []

    def fault(at_ms: int | None, who: str, what: str, do: str) -> None:
        found.append({"at_ms": at_ms, "who": who[:TEXT_MAX], "what": what[:TEXT_MAX], "do": do})

    for name, part in seen.parts:
        if part.failing_since_ms is not None:
            fault(part.failing_since_ms, name, part.error, "it is tried again by itself")
    if (glance := seen.ledger.value) is not None:
        for (service, what), some in _by_story(glance.troubles).items():
            at = max((t.at for t in some if t.at), default=None)
            more = f" and {len(some) - 1:,} targets more" if len(some) > 1 else ""
            at_ms = int(at.timestamp() * 1000) if at else None
            fault(at_ms, f"{service} of {some[0].target}{more}", what, REMEDIES.get(some[0].status, ""))
        for g in glance.given:
            what = f"{g.windows} windows from {g.start:%Y-%m-%d %H:%M}Z were given up: {g.reason}"
            fault(
                int(g.at.timestamp() * 1000), f"{g.service} of {g.target}", what, REMEDIES.get(g.reason, "")
            )
    kafka, before = seen.kafka.value, seen.dead_before
    if kafka is not None and before is not None and kafka.dead > before[0]:
        what = f"{kafka.dead - before[0]:,} dead letters more than at the beginning of this half hour"
        fault(before[1], "validation", what, "`headgate dead list` says which and why")
    found.sort(key=lambda f: -(f["at_ms"] or 0))
    return found[:FAULTS_MAX]


def _by_story(troubles: Sequence[Trouble]) -> dict[tuple[str, str], list[Trouble]]:
    """By service and complaint: what has befallen a hundred targets is one line."""
    found: dict[tuple[str, str], list[Trouble]] = defaultdict(list)
    for t in troubles:
        detail = t.detail.removeprefix(f"{t.target} {t.service}: ")
        found[t.service, f"{t.status}: {detail}"].append(t)
    return found
