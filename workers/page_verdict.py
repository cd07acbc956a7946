"""The live page's words: what is wrong, the gravest first, and what to do about it. Pure.

A finding that has an alert bears its name, which is also its runbook's (docs/runbooks). The page finds earlier than the alerts fire: they wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ingest.clock import utc
from workers.page_facts import STARTING_S, Json, Seen, unowned_of

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
    landed = sum(c["level"] in ("fresh", "late") for c in cells)
    if any(c["level"] == "waiting" for c in cells):
        text = f"Starting: {landed:,} of {count(len(cells), 'target')} have landed something so far."
        return Finding("info", "", text, "Nothing; it takes a poll interval.").plain()
    shards = sum(s["alive"] for s in seen.shards["shards"])
    text = f"All is well: {count(len(cells), 'target')} on {count(shards, 'shard')}, and nothing is open past its deadline."
    return Finding("ok", "", text, "Nothing to do.").plain()


# --- what is looked for, one function each ----------------------------------------------------------------------


def _parts(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    kafka, ledger = seen.kafka, seen.ledger
    if (since_ms := kafka.failing_since_ms) is not None and _for_s(seen, since_ms) > AWAY_S:
        text = f"Kafka has not answered since {clock(since_ms)}: nothing new is collected, and nothing lands."
        yield Finding("critical", "", text, "Look at the brokers. All workers go on by themselves when they answer; nothing is lost meanwhile.")  # fmt: skip
    if (since_ms := ledger.failing_since_ms) is not None and _for_s(seen, since_ms) > AWAY_S:
        text = f"PostgreSQL has not answered since {clock(since_ms)}: collecting goes on, nothing lands. Targets, windows and dollars are shown as they were then."
        yield Finding("critical", "", text, "Look at PostgreSQL: is it up, its disk full, its connections used up? What waits in Kafka lands by itself afterwards.")  # fmt: skip


def _workers(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    if seen.now_ms - seen.started_ms < STARTING_S * 1000 / 6 or seen.kafka.value is None:
        return
    if not any(s["alive"] for s in seen.shards["shards"]):
        yield Finding("critical", "", "No exporter shard is there: nothing is collected.", "Start exporters, or see why they do not start: `headgate doctor` in a cluster.")  # fmt: skip
    elif seen.unowned_since_ms is not None and _for_s(seen, seen.unowned_since_ms) > UNOWNED_S:
        slots = set(unowned_of(seen))
        waiting = sum(c["slot"] in slots for c in cells)
        text = f"{count(len(slots), 'slot')} have had no shard since {clock(seen.unowned_since_ms)}: {count(waiting, 'target')} wait."
        yield Finding("critical", "", text, "Do exporters start and stop again? Their last log lines say why; `headgate doctor` in a cluster.")  # fmt: skip
    if not seen.kafka.value.landing.members:
        yield Finding("critical", "HeadgateLedgerNotObserved", "No consumer is there: what is collected waits in Kafka, and nothing lands.", "Start consumers; one that stopped for safety has exit code 3 and says what to do in its last log line.")  # fmt: skip


def _shards(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    alive = {s["shard"]: s for s in seen.shards["shards"] if s["alive"]}
    for name, last_ms in sorted(seen.gone.items()):
        if name not in alive and _for_s(seen, last_ms) < GONE_S:
            taken = [m for m in seen.shards["moves"] if m["from"] == name and m["at_ms"] >= last_ms - 60_000]
            to = sorted({m["to"] for m in taken})
            text = f"The shard {name} has been gone since {clock(last_ms)}"
            text += (
                f"; its {count(len(taken), 'slot')} moved to {some(to)}." if taken else "; its slots wait."
            )
            yield Finding("warning", "", text, "Nothing where you removed it. Else its last log line says why it ended; the others carry its load.")  # fmt: skip
    for name, starts in sorted(seen.starts.items()):
        if len(starts) >= STARTS:
            text = f"The shard {name} has started {len(starts)} times within half an hour, last at {clock(starts[-1])}."
            yield Finding("warning", "", text, "Its log says why it ended each time. Exit code 3: another process has its name. In a cluster: `headgate doctor`.")  # fmt: skip
    idle = sorted(name for name, s in alive.items() if not s["slots"])
    if idle and seen.shards["settled"]:
        text = f"{some(idle)} {'has' if len(idle) == 1 else 'have'} no slots."
        yield Finding("warning", "", text, "More shards than slots? See `headgate plan`.")


def _windows(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    reasons = dict(numbers["gaps_by_reason"])
    if unbalanced := reasons.pop("unbalanced", 0):
        text = (
            f"The rows of {count(unbalanced, 'window')} in the store are not those that its receipts tell of."
        )
        yield Finding("critical", "HeadgateWindowsUnbalanced", text, "`headgate gaps`, then `headgate audit` over the same time.")  # fmt: skip
    stale = [c for c in cells if c["level"] == "stale"]
    if stale:
        worst = min(stale, key=lambda c: c["fresh_ms"] or 0)
        since = (
            f"has landed nothing newer than {clock(worst['fresh_ms'])}"
            if worst["fresh_ms"]
            else "has landed nothing yet"
        )
        text = f"{len(stale):,} of {count(len(cells), 'target')} {'is' if len(stale) == 1 else 'are'} stale; {worst['unit']} {since}."
        level = "critical" if len(stale) > CRITICAL_SHARE * len(cells) else "warning"
        do = f"Its problem: {worst['problem']}" if worst.get("problem") else "Of one shard: that exporter. Of all: Kafka, PostgreSQL, the consumers. Of one account: its role or quota."  # fmt: skip
        yield Finding(level, "HeadgateTargetStale", text, do)
    reasons.pop("paused", None)
    if gaps := sum(reasons.values()):
        why = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
        text = f"{count(gaps, 'window')} open past {'its' if gaps == 1 else 'their'} deadline: {why}."
        yield Finding("warning", "HeadgateWindowsOpenPastDeadline", text, "`headgate gaps` says which, why, and from where they can be healed; healing is under way.")  # fmt: skip
    if given := seen.ledger.value.given if seen.ledger.value else ():
        text = f"{count(sum(g.windows for g in given), 'window')} of {count(len({g.target for g in given}), 'target')} were given up within the hour: {some(sorted({g.reason for g in given}))}."
        yield Finding("warning", "HeadgateWindowsDeclared", text, "`headgate why` says who each is up to; then `headgate backfill`.")  # fmt: skip


def _lag(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    waits_s = numbers["lag_waits_s"]
    if waits_s is not None and waits_s > WAITS_S:
        text = f"{count(numbers['lag'], 'batch', 'batches')} have waited to land for up to {spoken(waits_s)}."
        yield Finding("warning", "", text, "Are all consumers there, and is PostgreSQL slow? More consumers land more, up to one for each partition.")  # fmt: skip
    for name, group in sorted(seen.kafka.value.receivers.items()) if seen.kafka.value else ():
        if not group.members and group.lag_total:
            text = f"Nobody sends to the receiver {name}: {count(group.lag_total, 'batch', 'batches')} wait."
            yield Finding("warning", "", text, "Start `headgate remote-write`.")
        elif group.waits_s is not None and group.waits_s > RECEIVER_WAITS_S:
            text = f"The receiver {name} is behind: samples have waited for it for {spoken(group.waits_s)}."
            yield Finding("warning", "", text, "Is it up, and does it take what it is sent? The remote writer's log says what it answers.")  # fmt: skip
    lately = numbers["dead_lately"]
    if lately:
        text = (
            f"{count(lately, 'dead letter')} since {clock(seen.dead_before[1] if seen.dead_before else 0)}."
        )
        yield Finding("warning", "", text, "`headgate dead list` says which and why; `headgate dead replay` lands what can be.")  # fmt: skip


def _money(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    decision = seen.money.value
    if decision is None:
        return
    days = {**decision.days, "all accounts": decision.all}
    passed = [name for name, day in days.items() if day.passed]
    short = [
        n
        for n, d in days.items()
        if d.budget_usd is not None and d.forecast_usd > d.budget_usd and not d.passed
    ]
    if passed:
        yield Finding("critical", "HeadgateBudgetPassed", f"The day's budget is passed: {some(passed)}.", "`headgate cost` says what the money goes to; `headgate pause` stops an account or a service at once.")  # fmt: skip
    if stopped := sorted({f"{service} of {account}" for account, service in decision.polling.stopped}):
        yield Finding("critical", "HeadgatePollsStopped", f"Not polled until midnight UTC, for want of money: {some(stopped)}.", "Raise the budget, or mark the service `critical: true`; it takes effect within half a minute.")  # fmt: skip
    if short:
        yield Finding("warning", "HeadgateBudgetTooSmall", f"By midnight UTC the budget will be passed: {some(short)}.", "`headgate cost` says what the money goes to.")  # fmt: skip
    if stretched := sorted(
        {f"{service} of {account} ×{k}" for (account, service), k in decision.polling.stretch.items()}
    ):
        yield Finding("warning", "HeadgatePollsStretched", f"Polled more rarely, for a budget: {some(stretched)}.", "The same points come, later. See more at once: raise the budget, or mark the service `critical: true`.")  # fmt: skip


def _settings(seen: Seen, cells: Sequence[Json], numbers: Json) -> Iterator[Finding]:
    if seen.config_refused:
        yield Finding("warning", "HeadgateConfigInvalid", "The configuration file as it stands now is refused; the one before is in use.", "`headgate check` prints every error with its line.")  # fmt: skip
    if seen.organization_age_s is not None and seen.organization_age_s > ORGANIZATION_S:
        text = f"The organization's list of accounts is {spoken(seen.organization_age_s)} old: new accounts are not collected."
        yield Finding("warning", "HeadgateOrganizationNotListed", text, "The coordinator's log says why under organization_not_listed; try `headgate check --live`.")  # fmt: skip


_LOOKS: tuple[Callable[[Seen, Sequence[Json], Json], Iterator[Finding]], ...] = (
    _parts, _workers, _windows, _money, _shards, _lag, _settings,
)  # fmt: skip


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
