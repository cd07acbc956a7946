"""A report as it may well be: for tests of what renders it. The figures are made up, and agree with each other as far as a reader would check."""

from __future__ import annotations

import math
from dataclasses import replace

from ingest.report.model import (
    AccountCoverage,
    AccountSpend,
    Changes,
    Confidence,
    Days,
    Evidence,
    Figure,
    Filling,
    Fillings,
    Finding,
    Findings,
    GroupUse,
    HeatMap,
    InventoryNote,
    Level,
    MetricUse,
    Money,
    Mover,
    Noted,
    QuotaUse,
    Realisations,
    Realised,
    Report,
    ResourceKey,
    ResourceUse,
    Size,
    Spend,
    Verdict,
    VerdictKind,
)

TO_S = 1_795_392_000
"""2026-11-23 00:00 UTC, a Monday."""
FROM_S = TO_S - 28 * 86_400
GIB = 1024**3
SHOP, DATA = "111122223333", "444455556666"
PLAN = "Savings Plan 2026: 28 % off"
LIST = "on demand, no discount configured"


def _use(role: str, metric: str, average: float, p95: float, peak: float | None, unit: str) -> MetricUse:
    daily = tuple(round(average * (1 + 0.25 * math.sin(d / 1.1)), 2) for d in range(28))
    top = Figure(None, unit, unknown="the Maximum statistic is not collected")
    return MetricUse(
        role,
        metric,
        Figure(average, unit, average * 0.95, 0.99),
        Figure(p95, unit, p95 * 1.02, 0.99),
        top if peak is None else Figure(peak, unit, peak, 0.99),
        "samples",
        665,
        daily,
    )


def _resource(
    account: str, service: str, name: str, size: Size, owner: str, cpu: tuple[float, float, float], verdict: Verdict
) -> ResourceUse:  # fmt: skip
    metrics = (
        _use("cpu", "CPUUtilization", *cpu, "percent"),
        _use("network_in", "NetworkIn", 4.1e6, 9.7e6, None, "bytes/min"),
    )
    idle = 648 if verdict.kind is VerdictKind.IDLE else 12
    key = ResourceKey(account, "eu-west-1", service, name)
    return ResourceUse(key, size, owner, "running", TO_S - FROM_S, 0.99, metrics, idle, verdict)


def _verdicts() -> dict[str, Verdict]:
    return {
        "idle": Verdict(
            VerdictKind.IDLE,
            "For 14 days CPU, network and disk were together below their limits",
            (
                Evidence("cpu, greatest hour's maximum", 1.9, "percent", 5.0),
                Evidence("network, greatest hour's bytes a second", 812.0, "bytes/s", 5_000.0),
                Evidence("hours with samples in 14 days", 334, "hours", 319),
            ),
            Confidence.HIGH,
            waste=Money(238.27, 171.55, PLAN),
        ),
        "oversized": Verdict(
            VerdictKind.OVERSIZED,
            "Its p95 and its peak would fit the next smaller size",
            (
                Evidence("cpu p95 on m7g.large", 37.6, "percent", 60.0),
                Evidence("cpu peak on m7g.large", 71.2, "percent", 90.0),
            ),
            Confidence.MEDIUM,
            Size("m7g.large", 2, 8 * GIB),
            Money(119.14, 85.78, PLAN),
        ),
        "busy": Verdict(VerdictKind.IN_USE, "It is used, and the next smaller size would be too small"),
        "thin": Verdict(
            VerdictKind.NOT_ENOUGH_DATA,
            "It reported in fewer than 30 hours of the last 14 days",
            (Evidence("hours with samples in 14 days", 22, "hours", 30),),
        ),
        "standby": Verdict(VerdictKind.STANDBY, "A standby does nothing until it is needed"),
    }


def _heat(title: str, level: float) -> HeatMap:
    rows = tuple(
        tuple(
            None
            if (day, hour) == (6, 3)
            else round(level + (22 if day < 5 and 8 <= hour < 18 else 0) + 3 * math.sin(hour), 1)
            for hour in range(24)
        )
        for day in range(7)
    )
    return HeatMap(title, rows, "vcpu", 5, 0.97, 1.4)


def _filling(name: str, now: float, capacity: float, slope: float, to_80: Days, to_100: Days) -> Filling:
    daily = tuple(None if d == 9 else (now - slope * (27 - d)) * GIB for d in range(28))
    used = Figure(now * GIB, "bytes", (now - slope * 7) * GIB, 0.99)
    rates = (slope * GIB, 0.8 * slope * GIB, 1.3 * slope * GIB)
    key = ResourceKey(DATA, "eu-west-1", "rds", name)
    return Filling(
        key, "data-team", "storage_used", used, capacity * GIB, *rates, to_80, to_100,
        27, FROM_S, "Theil–Sen", 0.99, daily,
    )  # fmt: skip


def _findings(kind: VerdictKind, resources: tuple[ResourceUse, ...]) -> Findings:
    found = tuple(
        Finding(r.key, r.size, r.owner, r.verdict, r.coverage, 14.0)
        for r in resources
        if r.verdict.kind is kind
    )
    wastes = [f.verdict.waste for f in found if f.verdict.waste]
    total = math.fsum(w.effective_usd_per_month for w in wastes)
    return Findings(
        Figure(total, "usd/month", total * 1.2, 0.99),
        math.fsum(w.list_usd_per_month for w in wastes),
        Figure(len(found), "count", len(found) + 1, 0.99),
        len(found) - len(wastes),
        found,
    )


def _resources() -> tuple[ResourceUse, ...]:
    v = _verdicts()
    big, small = Size("m7g.2xlarge", 8, 32 * GIB), Size("m7g.large", 2, 8 * GIB)
    db = Size("db.m7g.xlarge", 4, 16 * GIB, 500 * GIB)
    return (
        _resource(SHOP, "ec2", "i-0a1b2c3d4e5f60718", big, "shop", (0.4, 1.1, 1.9), v["idle"]),
        _resource(
            SHOP, "ec2", "i-0b7", Size("m7g.xlarge", 4, 16 * GIB), "", (9.2, 18.8, 35.6), v["oversized"]
        ),
        _resource(SHOP, "ec2", "i-0c8", small, "shop", (61.0, 88.4, 100.0), v["busy"]),
        _resource(DATA, "rds", "orders", db, "data-team", (34.0, 71.0, 93.0), v["busy"]),
        _resource(DATA, "rds", "orders-standby", db, "data-team", (2.0, 3.0, 4.0), v["standby"]),
        _resource(DATA, "ec2", "i-0d9", small, "<b>R&D</b>", (3.0, 4.0, 6.0), v["thin"]),
    )


def _groups(resources: tuple[ResourceUse, ...]) -> tuple[GroupUse, ...]:
    rows = (
        (Level.ALL, "", "", 6, 17.9, 41.2, 100.0, 1, 1),
        (Level.ACCOUNT, SHOP, SHOP, 3, 11.6, 25.0, 100.0, 1, 1),
        (Level.ACCOUNT, DATA, DATA, 3, 19.4, 60.3, 93.0, 0, 0),
        (Level.REGION, SHOP, "eu-west-1", 3, 11.6, 25.0, 100.0, 1, 1),
        (Level.REGION, DATA, "eu-west-1", 3, 19.4, 60.3, 93.0, 0, 0),
        (Level.SERVICE, SHOP, "ec2", 3, 11.6, 25.0, 100.0, 1, 1),
        (Level.SERVICE, DATA, "rds", 2, 18.0, 37.0, 93.0, 0, 0),
        (Level.SERVICE, DATA, "ec2", 1, 3.0, 4.0, 6.0, 0, 0),
    )
    return tuple(
        GroupUse(
            level,
            account,
            name,
            count,
            Figure(average, "percent", average + 1, 0.97),
            Figure(p95, "percent", p95 - 2, 0.97),
            Figure(peak, "percent", peak, 0.97),
            "vcpu",
            idle,
            oversized,
            Money(357.41, 257.33, PLAN) if idle else None,
            0.97,
        )
        for level, account, name, count, average, p95, peak, idle, oversized in rows
    )


def example() -> Report:
    """A report of four weeks over two accounts, each of its ten things filled."""
    resources = _resources()
    shop, data = resources[0], resources[3]
    week_usd = (213.40, 96.15)
    return Report(
        FROM_S,
        TO_S,
        TO_S + 3600,
        (SHOP, DATA),
        InventoryNote("describe", TO_S - 7200, len(resources)),
        Spend(
            Figure(sum(week_usd), "usd", 281.02, 1.0),
            1.17,
            350.0,
            tuple(round(41 + 3 * math.sin(d), 2) for d in range(28)),
            (
                AccountSpend(SHOP, Figure(week_usd[0], "usd", 180.10, 1.0), 1.17, 280.0),
                AccountSpend(DATA, Figure(week_usd[1], "usd", 100.92, 1.0), 0.0, None),
            ),
        ),
        (
            Mover(SHOP, "ec2", "monitoring", Figure(140.02, "usd", 104.31, 1.0)),
            Mover(DATA, "rds", "monitoring", Figure(41.10, "usd", 46.87, 1.0)),
            Mover(DATA, "msk", "monitoring", Figure(9.60, "usd", None, 1.0)),
        ),
        _findings(VerdictKind.IDLE, resources),
        _findings(VerdictKind.OVERSIZED, resources),
        Realisations(
            Figure(64.60, "usd/month", 0.0, 0.98),
            (
                Realised(
                    ResourceKey(SHOP, "eu-west-1", "ec2", "i-0gone"),
                    "shop",
                    VerdictKind.IDLE,
                    "gone",
                    Money(89.72, 64.60, PLAN),
                ),
                Realised(
                    ResourceKey(DATA, "eu-west-1", "rds", "staging"),
                    "",
                    VerdictKind.OVERSIZED,
                    "db.r7g.xlarge → db.r7g.large",
                    None,
                ),
            ),
        ),
        (_heat("all accounts", 20.0), _heat(SHOP, 12.0), _heat(DATA, 30.0)),
        Fillings(
            (
                _filling("orders", 431.0, 500.0, 3.1, Days(0.0, 0.0, 0.0), Days(22.3, 17.1, 27.8)),
                _filling("events", 122.0, 400.0, 2.2, Days(90.0 / 2, 35.0, None), Days(None, more_than=54.0)),
            ),
            3,
            Figure(1, "count", 0, 0.99),
        ),
        (
            QuotaUse(SHOP, "eu-west-1", "datapoints", Figure(121_400.0, "1/s", 98_000.0, 1.0), 180_000.0),
            QuotaUse(SHOP, "eu-west-1", "GetMetricData calls", Figure(3.2, "1/s", 2.9, 1.0), 50.0),
        ),
        (
            AccountCoverage(
                DATA,
                "data",
                Figure(0.952, "share", 0.991),
                TO_S - 300,
                300,
                24_192,
                1_161,
                (("forbidden", 900), ("budget", 261)),
            ),
            AccountCoverage(
                SHOP, "shop", Figure(0.998, "share", 0.997), TO_S, 0, 24_192, 48, (("expired", 48),)
            ),
        ),
        Figure(0.975, "share", 0.994),
        Changes(
            (
                Noted(
                    ResourceKey(DATA, "eu-west-1", "ec2", "i-0d9"), resources[5].size, "", TO_S - 2 * 86_400
                ),
            ),
            (Noted(ResourceKey(SHOP, "eu-west-1", "ec2", "i-0gone"), shop.size, "shop", TO_S - 3 * 86_400),),
            (Noted(resources[1].key, resources[1].size, "", None),),
            Figure(1, "count", 2),
            Figure(1, "count", 0),
            Figure(1, "count", 1),
            "owner",
        ),
        _groups(resources),
        (*resources, replace(data, key=replace(data.key, id='"><script>alert(1)</script>'))),
        (
            f"Effective prices: {PLAN}.",
            "Idle: 14 days with CPU, network and disk together below their limits.",
            f"What has no discount of its own: {LIST}.",
        ),
    )


def empty_example() -> Report:
    """The same range without inventory, prices and samples: every section has to say why it is empty."""
    none = InventoryNote("none", None, 0, "sizes are not known: set inventory.source")
    nothing = Figure(None, "count", unknown=none.remedy)
    dollars = Figure(None, "usd/month", unknown=none.remedy)
    lacking = Findings(dollars, None, nothing, 0, (), none.remedy)
    share = Figure(None, "share", unknown="the ledger has no windows in this range")
    return Report(
        FROM_S, TO_S, TO_S + 3600, (), none,
        Spend(Figure(0.0, "usd", None, 1.0), 0.0, None, (0.0,) * 28, ()), (),
        lacking, lacking, Realisations(dollars, (), none.remedy), (), Fillings((), 0, nothing, none.remedy), (), (), share,
        Changes((), (), (), nothing, nothing, nothing, "owner", none.remedy), (), (),
    )  # fmt: skip
