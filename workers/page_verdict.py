"""The live page's words: what is wrong, the gravest first, and what to do about it. Pure.

A finding that has an alert bears its name, which is also its runbook's (docs/runbooks). The page finds earlier than the alerts fire: they wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from ingest.clock import utc
from ingest.heal import Wait
from workers.page_facts import (
    MOVES_MAX,
    Ends,
    History,
    Json,
    Seen,
    cells_of,
    faults_of,
    numbers_of,
    shards_of,
    unowned_of,
)

FINDINGS_MAX = 12
AWAY_S = 10.0
"""A part that has not answered for so long is away; before that it is a hiccup."""
UNOWNED_S = 30.0
"""A rebalance takes seconds."""
GONE_S = 900.0
STARTS = 3
WAITS_S = 300.0
RECEIVER_WAITS_S = 900.0
ORGANIZATION_S = 4 * 3600.0
CRITICAL_SHARE = 0.1
"""Of targets that are stale."""
MOVED_WITHIN_MS = 60_000
ON_ITS_WAY = ("no_receipt", "not_checked", "not_landed", "not_settled")

LEVELS = ("critical", "warning", "info", "ok")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be: a sentence, and another that says what to do."""

    level: str
    alert: str
    text: str
    do: str

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def findings_of(seen: Seen, cells: Sequence[Json], numbers: Json) -> list[Finding]:
    """At most FINDINGS_MAX, the gravest first."""
    found = [f for look in _LOOKS for f in look(seen, cells, numbers)]
    found.sort(key=lambda f: LEVELS.index(f.level))  # stable: among equals the order of _LOOKS
    return found[:FINDINGS_MAX]


def verdict_of(seen: Seen, cells: Sequence[Json], findings: Sequence[Finding]) -> Json:
    """The gravest finding, or that there is none."""
    if findings:
        return findings[0].plain()
    if seen.ledger.value is None or any(c["level"] == "waiting" for c in cells):
        landed = sum(c["level"] in ("fresh", "late") for c in cells)
        text = f"Starting: {landed:,} of {count(len(cells), 'target')} have landed something so far."
        return Finding("info", "", text, "Wait: it takes a poll interval.").plain()
    shards = sum(s["alive"] for s in seen.shards["shards"])
    what = f"{count(len(cells), 'target')} on {count(shards, 'shard')}"
    text = f"All is well: {what}, and nothing is open past its deadline."
    return Finding("ok", "", text, "Nothing to do.").plain()


def page_of(seen: Seen, history: History, ends: Ends) -> Json:
    """/page.json. Adds to the history what is known of now."""
    cells = cells_of(seen)
    numbers = numbers_of(seen, cells)
    if seen.ledger.failing_since_ms is None and seen.kafka.failing_since_ms is None:
        history.add(seen.now_ms, numbers, ends)
    findings = findings_of(seen, cells, numbers)
    receivers = sorted(seen.kafka.value.receivers.items()) if seen.kafka.value else []
    return {
        "as_of_ms": seen.now_ms,
        "asked_until_ms": seen.asked_until_ms,
        "started_ms": seen.started_ms,
        "revision": seen.revision,
        "verdict": verdict_of(seen, cells, findings),
        "findings": [f.plain() for f in findings[1:]],
        "parts": [
            {"name": name, "as_of_ms": p.as_of_ms, "failing_since_ms": p.failing_since_ms, "error": p.error}
            for name, p in seen.parts
        ],
        "numbers": numbers,
        "history": history.page(),
        "levels": dict(Counter(c["level"] for c in cells)),
        "plan": {k: seen.shards[k] for k in ("epoch", "published_at_ms", "reason", "slots", "settled")},
        "shards": shards_of(seen),
        "unowned": unowned_of(seen),
        "cells": cells,
        "moves": seen.shards["moves"][-MOVES_MAX:],
        "receivers": [
            {"receiver": name, "lag": g.lag_total, "waits_s": g.waits_s, "members": list(g.members)}
            for name, g in receivers
        ],
        "faults": faults_of(seen),
    }


# --- what is looked for, one function each ----------------------------------------------------------------------

DO = {
    "kafka": "Look at the brokers. All workers go on by themselves when they answer; nothing is lost meanwhile.",
    "postgres": "Look at PostgreSQL: is it up, its disk full, its connections used up? What waits in Kafka lands by itself afterwards.",
    "no_shard": "Start exporters, or see why they do not start: their last log lines; `headgate doctor` in a cluster.",
    "unowned": "Do exporters start and stop again? Their last log lines say why; `headgate doctor` in a cluster.",
    "no_consumer": "Start consumers. One that stopped for safety has exit code 3 and says what to do in its last log line.",
    "gone": "Nothing where you removed it. Else its last log line says why it ended; the others carry its load.",
    "restarts": "Its log says why it ended each time. Exit code 3: another process has its name. In a cluster: `headgate doctor`.",
    "idle": "More shards than slots? See `headgate plan`.",
    "unbalanced": "`headgate gaps`, then `headgate audit` over the same time.",
    "stale": "Of one shard: that exporter. Of all: Kafka, PostgreSQL, the consumers. Of one account: its role or its quota.",
    "gaps": "`headgate gaps` says which, why, and from where they can be healed; healing is under way.",
    "gaps_money": "Healing has spent the day's money: raise `heal.usd_per_day`, or wait for midnight UTC. `headgate gaps` says which they are.",
    "given": "`headgate why` says who each is up to; then `headgate backfill`.",
    "lag": "Are all consumers there, and is PostgreSQL slow? More consumers land more, up to one for each partition.",
    "no_writer": "Start `headgate remote-write`.",
    "receiver": "Is it up, and does it take what it is sent? The remote writer's log says what it answers.",
    "dead": "`headgate dead list` says which and why; `headgate dead replay` lands what can be.",
    "passed": "`headgate cost` says what the money goes to; `headgate pause` stops an account or a service at once.",
    "stopped": "Raise the budget, or mark the service `critical: true`; it takes effect within half a minute.",
    "short": "`headgate cost` says what the money goes to.",
    "stretched": "The same points come, later. See more at once: raise the budget, or mark the service `critical: true`.",
    "config": "`headgate check` prints every error with its line.",
    "organization": "The coordinator's log says why under organization_not_listed; try `headgate check --live`.",
}


def _parts(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    since_ms = seen.kafka.failing_since_ms
    if since_ms is not None and _for_s(seen, since_ms) > AWAY_S:
        text = f"Kafka has not answered since {clock(since_ms)}: nothing new is collected, and nothing lands."
        yield Finding("critical", "", text, DO["kafka"])
    since_ms = seen.ledger.failing_since_ms
    if since_ms is not None and _for_s(seen, since_ms) > AWAY_S:
        text = f"PostgreSQL has not answered since {clock(since_ms)}: collecting goes on, nothing lands. Targets are shown as they were then."
        yield Finding("critical", "", text, DO["postgres"])


def _workers(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    if _for_s(seen, seen.started_ms) < UNOWNED_S or seen.kafka.value is None:
        return
    since_ms = seen.unowned_since_ms
    if not any(s["alive"] for s in seen.shards["shards"]):
        text = "No exporter shard is there: nothing is collected."
        yield Finding("critical", "HeadgateSlotsWithoutShard", text, DO["no_shard"])
    elif since_ms is not None and _for_s(seen, since_ms) > UNOWNED_S:
        slots = set(unowned_of(seen))
        waiting = sum(c["slot"] in slots for c in cells)
        are = f"{count(waiting, 'target')} {'is' if waiting == 1 else 'are'} not collected"
        text = f"{count(len(slots), 'slot')} without a shard since {clock(since_ms)}: {are}."
        level = "critical" if waiting else "warning"
        yield Finding(level, "HeadgateSlotsWithoutShard", text, DO["unowned"])
    if not seen.kafka.value.landing.members:
        text = "No consumer is there: what is collected waits in Kafka, and nothing lands."
        yield Finding("critical", "HeadgateLedgerNotObserved", text, DO["no_consumer"])


def _shards(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    alive = {s["shard"]: s for s in seen.shards["shards"] if s["alive"]}
    for name, last_ms in sorted(seen.gone.items()):
        if name in alive or _for_s(seen, last_ms) > GONE_S:
            continue
        taken = [
            m for m in seen.shards["moves"] if m["from"] == name and m["at_ms"] > last_ms - MOVED_WITHIN_MS
        ]
        became = f"its {count(len(taken), 'slot')} moved to {some(sorted({m['to'] for m in taken}))}"
        text = f"The shard {name} is gone since {clock(last_ms)}; {became if taken else 'its slots wait'}."
        yield Finding("warning", "", text, DO["gone"])
    for name, starts in sorted(seen.starts.items()):
        if len(starts) >= STARTS:
            text = f"The shard {name} has started {len(starts)} times within half an hour, last at {clock(starts[-1])}."
            yield Finding("warning", "", text, DO["restarts"])
    idle = sorted(name for name, s in alive.items() if not s["slots"])
    if idle and seen.shards["settled"]:
        text = f"{some(idle)}: no slots, so nothing to do."
        yield Finding("warning", "HeadgateShardWithoutSlots", text, DO["idle"])


def _windows(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    reasons = {why: n for why, n in numbers["gaps_by_reason"].items() if why != "paused"}
    if unbalanced := reasons.pop("unbalanced", 0):
        text = f"In the store the rows of {count(unbalanced, 'window')} are not what was collected."
        yield Finding("critical", "HeadgateWindowsUnbalanced", text, DO["unbalanced"])
    if stale := [c for c in cells if c["level"] == "stale"]:
        worst = min(stale, key=lambda c: c["fresh_ms"] or 0)
        newest = f"nothing newer than {clock(worst['fresh_ms'])}" if worst["fresh_ms"] else "nothing yet"
        of = f"{len(stale):,} of {count(len(cells), 'target')}"
        text = f"Stale: {of}. Of {worst['unit']} there is {newest}."
        do = f"It complains: {worst['problem']}" if worst.get("problem") else DO["stale"]
        level = "critical" if len(stale) > CRITICAL_SHARE * len(cells) else "warning"
        yield Finding(level, "HeadgateTargetStale", text, do)
    if seen.starting:
        # What an earlier life left open is being looked at.
        reasons = {why: n for why, n in reasons.items() if why not in ON_ITS_WAY}
    if gaps := sum(reasons.values()):
        why = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
        text = f"Open past {'its' if gaps == 1 else 'their'} deadline: {count(gaps, 'window')} ({why})."
        do = DO["gaps_money"] if seen.heal_waits.get(Wait.BUDGET) else DO["gaps"]
        yield Finding("warning", "HeadgateWindowsOpenPastDeadline", text, do)
    if given := seen.ledger.value.given if seen.ledger.value else ():
        whose = f"{count(sum(g.windows for g in given), 'window')} of {count(len({g.target for g in given}), 'target')}"
        text = f"Given up within the hour: {whose} ({some(sorted({g.reason for g in given}))})."
        yield Finding("warning", "HeadgateWindowsDeclared", text, DO["given"])


def _lag(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    waits_s = numbers["lag_waits_s"]
    if waits_s is not None and waits_s > WAITS_S:
        text = f"Waiting to land for {spoken(waits_s)}: {count(numbers['lag'], 'batch', 'batches')}."
        yield Finding("warning", "HeadgateLagGrowing", text, DO["lag"])
    for name, group in sorted(seen.kafka.value.receivers.items()) if seen.kafka.value else ():
        if not group.members and group.lag_total:
            text = f"Nobody sends to the receiver {name}: {count(group.lag_total, 'batch', 'batches')} wait."
            yield Finding("warning", "HeadgateRemoteWriterGone", text, DO["no_writer"])
        elif group.waits_s is not None and group.waits_s > RECEIVER_WAITS_S:
            text = f"The receiver {name} is {spoken(group.waits_s)} behind."
            yield Finding("warning", "HeadgateRemoteWriteLagging", text, DO["receiver"])
    if numbers["dead_lately"] and seen.dead_before:
        text = f"{count(numbers['dead_lately'], 'dead letter')} since {clock(seen.dead_before[1])}."
        yield Finding("warning", "HeadgateDeadLetterShare", text, DO["dead"])


def _money(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    decision = seen.money.value
    if decision is None:
        return
    days = {"all accounts": decision.all, **decision.days}
    polling = decision.polling
    if passed := [name for name, day in days.items() if day.passed]:
        text = f"The day's budget is passed: {some(passed)}."
        yield Finding("critical", "HeadgateBudgetPassed", text, DO["passed"])
    if stopped := sorted(f"{service} of {account}" for account, service in polling.stopped):
        text = f"Not polled until midnight UTC, for want of money: {some(stopped)}."
        yield Finding("critical", "HeadgatePollsStopped", text, DO["stopped"])
    short = (n for n, d in days.items() if d.budget_usd is not None and d.forecast_usd > d.budget_usd)
    if too_small := [name for name in short if name not in passed]:
        text = f"By midnight UTC the budget will be passed: {some(too_small)}."
        yield Finding("warning", "HeadgateBudgetTooSmall", text, DO["short"])
    if stretched := sorted(
        f"{service} of {account} ×{k}" for (account, service), k in polling.stretch.items()
    ):
        text = f"Polled more rarely, for a budget: {some(stretched)}."
        yield Finding("warning", "HeadgatePollsStretched", text, DO["stretched"])


def _settings(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    if seen.config_refused:
        text = "The configuration file as it stands now is refused; the one before is in use."
        yield Finding("warning", "HeadgateConfigInvalid", text, DO["config"])
    age_s = seen.organization_age_s
    if age_s is not None and age_s > ORGANIZATION_S:
        text = f"The organization's list of accounts is {spoken(age_s)} old: new accounts are not collected."
        yield Finding("warning", "HeadgateOrganizationNotListed", text, DO["organization"])


_LOOKS: Final = (_parts, _workers, _windows, _money, _shards, _lag, _settings)


# --- words ------------------------------------------------------------------------------------------------------


def _for_s(seen: Seen, since_ms: int) -> float:
    return (seen.now_ms - since_ms) / 1000


def clock(ms: int) -> str:
    """As 10:41:03Z."""
    return utc(ms / 1000).strftime("%H:%M:%SZ")


def spoken(seconds: float) -> str:
    """As 45 s, 12 min, 3 h 05 min, 2 days."""
    s = int(seconds)
    if s < 120:
        return f"{s} s"
    if s < 7200:
        return f"{s // 60} min"
    if s < 172_800:
        return f"{s // 3600} h {s % 3600 // 60:02} min"
    return f"{s // 86_400} days"


def count(n: int, what: str, many: str = "") -> str:
    """As 1 target, 2,000 targets."""
    return f"{n:,} {what if n == 1 else many or what + 's'}"


def some(names: Sequence[str], shown: int = 3) -> str:
    """As a, b, c and 4 more."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest:,} more" if rest > 0 else "")
