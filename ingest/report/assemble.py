"""The report, assembled: reads rollups, inventory and ledger in one read-only snapshot, and adds resource to resource.

Guarantees:

* nothing is written, and all figures are of one moment (a repeatable read);
* memory is bounded: resources are read and judged in blocks (`reading.CELLS_MAX`), what stays of each is its row of the report;
* the database is given up on after `STATEMENT_S` a statement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

import asyncpg

from ingest import charges
from ingest.errors import Fatal
from ingest.inventory import store as inventory_store
from ingest.inventory.model import Lived
from ingest.report import ledger_side, reading
from ingest.report.capacity import filling_of, used_of
from ingest.report.connections import snapshot
from ingest.report.model import (
    AccountCoverage,
    Figure,
    Filling,
    Fillings,
    Finding,
    Findings,
    InventoryNote,
    Mover,
    QuotaUse,
    Report,
    ResourceKey,
    ResourceUse,
    Size,
    Spend,
    Verdict,
    VerdictKind,
)
from ingest.report.money import Pricing, quotas_of, spend_of
from ingest.report.reading import Tell
from ingest.report.resources import HOUR_S, Axis, Observed, brokers_lives
from ingest.report.sizing import Catalog
from ingest.report.sums import Sums
from ingest.report.utilization import WEEK_S, Ranges, coverage_of, metric_use
from ingest.report.verdicts import ByHour, Rules, dependent, judge
from ingest.report.week import Lives, Savings, owner_of, size_of
from ingest.sinks.connection import translated
from shard_config.model import Config
from shard_config.report import ROLES

DAY_S: Final = 86_400
STATEMENT_S: Final = 300
CONNECTIONS: Final = 3
"""One sends while another's answer is worked on; more than two keep this process and two of the server's busy."""
HISTORY_DAYS: Final = 28
"""So far before the range's end a trend looks back at least."""
_WASTES: Final = (VerdictKind.IDLE, VerdictKind.OVERSIZED)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the report is about: [from_s, to_s) in whole hours, and these accounts; None: all."""

    from_s: int
    to_s: int
    accounts: tuple[str, ...] | None = None


async def assemble(config: Config, wanted: Wanted, now_s: int, tell: Tell) -> Report:
    """The report. `tell` is given progress. Raises Transient, and Fatal where the range or the schema does not allow one."""
    if wanted.from_s >= wanted.to_s or wanted.from_s % HOUR_S or wanted.to_s % HOUR_S:
        raise Fatal("report", "the range is empty, or not of whole hours", "give --from and --to in hours")
    async with snapshot(config.postgres, CONNECTIONS, STATEMENT_S) as connections:
        with translated("report"):
            return await _assemble(connections, config, wanted, now_s, tell)


async def _assemble(
    connections: Sequence[asyncpg.Connection], config: Config, wanted: Wanted, now_s: int, tell: Tell
) -> Report:
    connection = connections[0]
    back_s = max(HISTORY_DAYS, config.report.idle.days + 7) * DAY_S
    start_s = min(wanted.from_s, wanted.to_s - back_s)
    ranges = Ranges(Axis(start_s, (wanted.to_s - start_s) // HOUR_S), wanted.from_s, wanted.to_s)
    tell("reading the ledger", 0, 1)
    ledger = await _ledger(connection, config, wanted, now_s)
    tell("reading the inventory", 0, 1)
    known = await inventory_store.known(connection)
    firsts = [one.first_s for one in known if one.first_s is not None]
    lives = await reading.lives_of(connection, ranges.axis, wanted.accounts)
    series = await reading.series_of(connection, wanted.accounts)
    sparse = [service for service, roles in ROLES.items() if roles.sparse]
    looked = await ledger_side.looked(connection, ranges.axis, sparse)
    pricing = Pricing(config.report)
    catalog = Catalog.of((one.last for one in lives.values()), pricing)
    rules = Rules(config.report, pricing, catalog, bool(firsts))
    whole = Assembly(ranges, rules, Lives(lives, config.report.owner_tag, min(firsts, default=None)))
    each = brokers_lives(lives, series)
    async for seen in reading.observed(connections, ranges, series, each, looked, tell):
        whole.add(seen)
    tell("putting it together", 1, 1)
    wholes = [one.whole_s for one in known if one.whole_s is not None]
    note = InventoryNote(
        config.inventory.source, max(wholes, default=None), len(lives), "" if firsts else _REMEDY
    )
    unrolled = await reading.unrolled_hours(connection, ranges.axis)
    return whole.report(ledger, note, now_s, unrolled)


_REMEDY: Final = "set inventory.source, or give a list by `headgate inventory import FILE.csv`"


@dataclass(frozen=True, slots=True)
class Ledger:
    """The parts of the report that the ledger alone says."""

    accounts: tuple[str, ...]
    spend: Spend
    movers: tuple[Mover, ...]
    quotas: tuple[QuotaUse, ...]
    coverage: tuple[AccountCoverage, ...]
    coverage_all: Figure


async def _ledger(connection: asyncpg.Connection, config: Config, wanted: Wanted, now_s: int) -> Ledger:
    to_s, accounts = wanted.to_s, wanted.accounts
    week_s, before_s = to_s - WEEK_S, to_s - 2 * WEEK_S
    from_day, to_day = charges.day_of(wanted.from_s), charges.day_of(to_s + DAY_S - 1)
    first_day = min(from_day, to_day - timedelta(14)).replace(day=1)
    paid = await charges.read(connection, first_day, to_day)
    spend, movers = spend_of(paid, config, from_day, to_day, accounts or ())
    week = await ledger_side.tallies(connection, week_s, to_s, accounts)
    before = await ledger_side.tallies(connection, before_s, week_s, accounts)
    coverage, coverage_all = ledger_side.coverage_of(week, before, config, min(to_s, now_s))
    asked = await ledger_side.asked(connection, config, week_s, to_s)
    since_s = await ledger_side.looks_since(connection)
    whole_before = since_s is not None and since_s <= before_s
    asked_before = await ledger_side.asked(connection, config, before_s, week_s) if whole_before else ()
    quotas = quotas_of(
        asked, asked_before, config, ledger_side.looks_cover(since_s, week_s, min(to_s, now_s))
    )
    return Ledger(
        tuple(sorted(set(week) | set(accounts or ()))),
        spend,
        movers,
        tuple(q for q in quotas if accounts is None or q.account in accounts),
        coverage,
        coverage_all,
    )


class Fills:
    """What fills up: `add` each resource, then `all` of them, soonest full first."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._found: list[Filling] = []
        self._soon = self._soon_before = self._looked_at = 0

    def add(self, seen: Observed, owner: str) -> None:
        axis, to_s = self._ranges.axis, self._ranges.to_s
        now, before = (used_of(seen, axis, at_s) for at_s in (to_s, to_s - WEEK_S))
        self._looked_at += now is not None
        filling = None if now is None else filling_of(now, seen, owner)
        was = None if before is None else filling_of(before, seen, owner)
        if filling is not None:
            # Of the days that the trend looked at, those of the range.
            daily = filling.daily[-self._days :] if self._days else ()
            self._found.append(replace(filling, daily=daily))
        self._soon += _soon(filling)
        self._soon_before += _soon(was)

    @property
    def _days(self) -> int:
        return (self._ranges.to_s - self._ranges.from_s) // DAY_S

    def all(self, inventory: bool) -> Fillings:
        """`inventory`: whether there is one; without, nothing is known to fill up."""
        if not inventory:
            unknown = f"sizes are not known: {_REMEDY}"
            return Fillings((), 0, Figure(None, "count", unknown=unknown), unknown)
        found = sorted(self._found, key=lambda one: (*_soonest(one), one.key))
        covered = [one.coverage for one in found]
        coverage = sum(covered) / len(covered) if covered else None
        figure = Figure(float(self._soon), "count", float(self._soon_before), coverage)
        why = "" if found else (
            f"None of {self._looked_at:,} with a known capacity grows, by a trend of two weeks and more."
            if self._looked_at
            else "No resource has both a capacity in the inventory and samples of what is free."
        )  # fmt: skip
        return Fillings(tuple(found), self._looked_at, figure, why)


def _soon(one: Filling | None) -> bool:
    return one is not None and one.to_100.days is not None and one.to_100.days <= 30


def _soonest(one: Filling) -> tuple[float, float]:
    far = float("inf")
    return tuple(far if d.days is None else d.days for d in (one.to_100, one.to_80))  # type: ignore[return-value]


# --- resources, one by one: pure ----------------------------------------------------------------------------------------


class Assembly:
    """Resources added up to a report. Volumes come after the instances that they belong to."""

    def __init__(self, ranges: Ranges, rules: Rules, lives: Lives) -> None:
        self.ranges, self.rules, self.lives = ranges, rules, lives
        self._uses: list[ResourceUse] = []
        self._before: list[Verdict] = []
        """Of a week ago: those of waste."""
        self._kinds: dict[ResourceKey, tuple[VerdictKind, VerdictKind]] = {}
        self._sums = Sums(ranges)
        self._fills = Fills(ranges)
        self._savings = Savings(ranges.to_s, rules.report.owner_tag, rules.pricing)

    def add(self, seen: Observed) -> None:
        """One resource, with its hours."""
        axis, to_s = self.ranges.axis, self.ranges.to_s
        by_hour = ByHour.of(seen, axis, self.rules)
        now, was = (judge(seen, axis, at_s, self.rules, by_hour) for at_s in (to_s, to_s - WEEK_S))
        self._kinds[seen.key] = (now.kind, was.kind)
        if seen.key.service == "ebs" and seen.lived is not None:
            now, was = self._dependent(seen.lived, now, was)
        if was.kind in _WASTES:
            self._before.append(was)
            self._savings.add(seen.key, seen.lived, was)
        use = self._use(seen, now, by_hour)
        if not use.lived_s or (seen.lived is None and not by_hour.reported[self.ranges.whole].any()):
            # It was gone before the range began: only what became of it counts.
            return
        self._uses.append(use)
        self._sums.add(seen, use)
        self._fills.add(seen, use.owner)

    def _dependent(self, lived: Lived, now: Verdict, was: Verdict) -> tuple[Verdict, Verdict]:
        one = lived.last
        for instance in one.attached_to:
            kinds = self._kinds.get(ResourceKey(one.account, one.region, "ec2", instance))
            if kinds is not None:
                now, was = dependent(now, kinds[0]), dependent(was, kinds[1])
        return now, was

    def _use(self, seen: Observed, verdict: Verdict, by_hour: ByHour) -> ResourceUse:
        whole, axis, lived = self.ranges.whole, self.ranges.axis, seen.lived
        coverage = coverage_of(seen, axis, whole)
        uses = (metric_use(seen, metric, self.ranges, coverage) for metric in ROLES[seen.key.service].metrics)
        idle = by_hour.idle
        from_s, to_s = self.ranges.from_s, self.ranges.to_s
        lived_s = (
            to_s - from_s
            if lived is None
            else sum(max(0, min(s.to_s, to_s) - max(s.from_s, from_s)) for s in lived.spans)
        )
        last = None if lived is None else lived.last
        return ResourceUse(
            seen.key,
            Size() if last is None else size_of(last),
            owner_of(lived, self.lives.owner_tag),
            "" if last is None else str(last.state),
            lived_s,
            coverage,
            tuple(use for use in uses if use is not None),
            None if idle is None else int(idle.idle[whole].sum()),
            verdict,
            "" if last is None else last.group,
        )

    def report(self, ledger: Ledger, note: InventoryNote, now_s: int, unrolled: int) -> Report:
        uses = tuple(sorted(self._uses, key=lambda use: use.key))
        first_s = self.lives.first_s
        accounts = tuple(sorted({*ledger.accounts, *(use.key.account for use in uses)}))
        return Report(
            self.ranges.from_s,
            self.ranges.to_s,
            now_s,
            accounts,
            note,
            ledger.spend,
            ledger.movers,
            self._findings(VerdictKind.IDLE, uses),
            self._findings(VerdictKind.OVERSIZED, uses),
            self._savings.all(first_s),
            self._sums.heat_maps(),
            self._fills.all(first_s is not None),
            ledger.quotas,
            ledger.coverage,
            ledger.coverage_all,
            self.lives.changes(self.ranges.to_s),
            self._sums.groups(),
            uses,
            self._assumptions(unrolled),
        )

    def _findings(self, kind: VerdictKind, uses: Sequence[ResourceUse]) -> Findings:
        """Of one kind, greatest waste first, with the week before's sum."""
        found = sorted(
            (use for use in uses if use.verdict.kind is kind),
            key=lambda use: (
                -(use.verdict.waste.effective_usd_per_month if use.verdict.waste else 0),
                use.key,
            ),
        )
        before = [verdict for verdict in self._before if verdict.kind is kind]
        wastes = [use.verdict.waste for use in found if use.verdict.waste is not None]
        covered = [use.coverage for use in found or uses if use.coverage is not None]
        coverage = sum(covered) / len(covered) if covered else None
        total: float | None = sum((w.effective_usd_per_month for w in wastes), 0.0)
        unknown = ""
        if found and not wastes:
            total, unknown = None, found[0].verdict.waste_unknown
        oversized_unknown = kind is VerdictKind.OVERSIZED and self.lives.first_s is None
        if oversized_unknown:
            total, unknown = None, f"sizes are not known: {_REMEDY}"
        was = sum((v.waste.effective_usd_per_month for v in before if v.waste is not None), 0.0)
        return Findings(
            Figure(total, "usd/month", None if total is None else was, coverage, unknown),
            sum(w.list_usd_per_month for w in wastes) if wastes else None,
            Figure(None, "count", unknown=unknown) if oversized_unknown else Figure(float(len(found)), "count", float(len(before)), coverage),
            len(found) - len(wastes),
            tuple(
                Finding(use.key, use.size, use.owner, use.verdict, use.coverage, self._since_days(use.verdict))
                for use in found
            ),
            "" if found else self._why_none(uses, unknown),
        )  # fmt: skip

    def _since_days(self, verdict: Verdict) -> float:
        return (
            float(self.rules.days)
            if verdict.since_s is None
            else (self.ranges.to_s - verdict.since_s) / DAY_S
        )

    def _why_none(self, uses: Sequence[ResourceUse], unknown: str) -> str:
        """Why there is no finding: what could not be judged, by its reason."""
        if unknown or not uses:
            return unknown or "there are no resources with samples in this range"
        kinds: dict[str, int] = {}
        for use in uses:
            kinds[str(use.verdict.kind)] = kinds.get(str(use.verdict.kind), 0) + 1
        counts = sorted(kinds.items(), key=lambda item: -item[1])
        return f"None of {len(uses):,} resources: " + ", ".join(f"{n:,} {kind}" for kind, n in counts)

    def _assumptions(self, unrolled: int) -> tuple[str, ...]:
        report, found = self.rules.report, []
        if unrolled:
            found.append(
                f"Hours that are not rolled up in full yet: {unrolled:,} (`headgate status`). They are missing here, or as they were before."
            )
        for one in report.discounts:
            where = ", ".join((*one.accounts, *one.services)) or "everywhere"
            found.append(f"Effective prices: {one.name}, {one.share:.0%} off, {where}.")
        if not report.prices:
            found.append("No prices of resources are configured (report.prices), so no waste is in dollars.")
        idle, sizing = report.idle, report.sizing
        found += [
            f"Idle: {idle.days} days in which every hour was below {idle.cpu_percent:g} % of CPU (Maximum), {idle.network_bytes_per_s:g} bytes a second of "
            f"network, {idle.disk_ops_per_s:g} disk operations a second and {idle.connections:g} connections, together.",
            f"Oversized: on the smaller size p95 of CPU stays below {sizing.cpu_p95_percent:g} %, its peak below {sizing.cpu_peak_percent:g} %, memory below "
            f"{sizing.memory_percent:g} % where it is known.",
            f"A resource that reported in fewer than {report.hours_min} of the last {idle.days} days' hours gets no verdict.",
        ]
        return tuple(found)
