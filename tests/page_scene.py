"""A made-up installation for the live page, of any size, and the page served over HTTP as a coordinator does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal

from aiohttp.test_utils import TestServer

from ingest.budget import Day, Decision, Polling
from ingest.clock import SystemClock, utc
from ingest.gaps import OpenWindows
from ingest.glance import Given, Glance, OpenOf, Trouble
from workers.lifecycle import Lifecycle, _application
from workers.page_document import Document, Packed
from workers.page_facts import GroupSeen, History, Json, KafkaSeen, Part, Seen, Unit
from workers.page_verdict import page_of

NOW_S = 1_795_521_663
NOW_MS = NOW_S * 1000
REGIONS = ("eu-west-1", "us-east-1", "ap-southeast-2", "eu-central-1")


def target_of(index: int) -> str:
    return f"cloudwatch/{100_000_000_001 + index // 4}/{REGIONS[index % 4]}"


def shards_page(names: list[str], slots: int, *, alive: list[str] | None = None) -> Json:
    """As the Publisher gives it: slots by turns; who is not alive has none."""
    there = names if alive is None else alive
    owners = {slot: names[slot % len(names)] for slot in range(slots)}
    return {
        "epoch": 7,
        "published_at_ms": NOW_MS - 90_000,
        "reason": "the first assignment",
        "slots": slots,
        "settled": there == names,
        "shards": [
            {
                "shard": name,
                "alive": name in there,
                "since_ms": NOW_MS - 7_200_000,
                "host": "node-1",
                "pid": 42,
                "slots": [s for s, owner in owners.items() if owner == name and name in there],
                "assigned": [s for s, owner in owners.items() if owner == name],
                "targets": [],
                "weight": 100.0,
                "quotas": {},
            }
            for name in names
        ],
        "moves": [],
    }


def money_of(spent: str, forecast: str, budget: str | None, **polling: object) -> Decision:
    day = Day(Decimal(spent), Decimal(forecast), None if budget is None else Decimal(budget))
    return Decision(Polling(**polling), {"100000000001": Day(Decimal(0), Decimal(0), None)}, day)  # type: ignore[arg-type]


def glance_of(targets: int) -> Glance:
    """All fresh, nothing past its deadline."""
    names = [target_of(i) for i in range(targets)]
    ends = {name: utc(NOW_S - 40 - 13 * (i % 20)) for i, name in enumerate(names)}
    opened = {name: OpenOf(4, 0, utc(NOW_S - 1200)) for name in names}
    return Glance(
        ends, {}, opened, OpenWindows({"in_time": 4 * targets}, utc(NOW_S - 300)), (), (), 4200.0, {}
    )


def seen_of(targets: int = 12, shards: int = 3, slots: int = 24) -> Seen:
    """All is well."""
    group = GroupSeen({0: 0}, ("consumer-1",))
    names = [f"exporter-{i}" for i in range(1, shards + 1)]
    return Seen(
        now_ms=NOW_MS,
        asked_until_ms=NOW_MS,
        started_ms=NOW_MS - 7_200_000,
        revision="499c1f2e22835bd7",
        shards=shards_page(names, slots),
        units={target_of(i): Unit(i % slots, 300, f"team {i // 4}") for i in range(targets)},
        kafka=Part(KafkaSeen(group, group, group, {}, 3), NOW_MS - 2000),
        ledger=Part(glance_of(targets), NOW_MS - 2000),
        money=Part(money_of("12.5", "31.2", "40"), NOW_MS - 20_000),
    )


def troubled(seen: Seen) -> Seen:
    """The same on a bad night: stale and late targets, gaps, a shard gone, a receiver behind, windows given up."""
    glance = seen.ledger.value
    assert glance is not None
    names = sorted(seen.units)
    fresh, opened = dict(glance.fresh), dict(glance.open)
    for i, name in enumerate(names):
        if i % 37 == 5:
            fresh[name], opened[name] = utc(NOW_S - 7400 - i), OpenOf(29, 21, utc(NOW_S - 7400 - i))
        elif i % 11 == 3:
            fresh[name] = utc(NOW_S - 700)
        elif i % 53 == 7:
            opened[name] = OpenOf(9, 2, utc(NOW_S - 4000))
    bad = [name for i, name in enumerate(names) if i % 37 == 5]
    troubles = tuple(
        Trouble(n, "ec2", "forbidden" if i % 2 else "failed",
                f"{n} ec2: AccessDenied: not authorized to perform sts:AssumeRole" if i % 2 else f"{n} ec2: 3 of 40 calls: Throttling, Rate exceeded",
                utc(NOW_S - 60 - i)) for i, n in enumerate(bad)
    )  # fmt: skip
    reasons = {"in_time": 4000, "failed": 40, "forbidden": 17, "no_receipt": 6}
    seen.shards["shards"][1] |= {"alive": False, "slots": []}
    taken = seen.shards["shards"][1]["assigned"]
    seen.shards["moves"] = [
        {"at_ms": NOW_MS - 43_000, "slot": s, "from": "exporter-2", "to": f"exporter-{1 + 2 * (i % 2)}", "reason": "exporter-2 went"}
        for i, s in enumerate(taken[:-1])
    ]  # fmt: skip
    for i, slot in enumerate(taken[:-1]):
        seen.shards["shards"][2 * (i % 2)]["slots"].append(slot)
    kafka = seen.kafka.value
    assert kafka is not None
    receivers = {"prometheus-1": GroupSeen({0: 0}, ("remote-write-1",)), "prometheus-2": GroupSeen({0: 812}, ("remote-write-1",), 1260.0)}  # fmt: skip
    return replace(
        seen,
        gone={"exporter-2": NOW_MS - 61_000},
        unowned_since_ms=NOW_MS - 61_000,
        kafka=Part(replace(kafka, receivers=receivers, dead=19), NOW_MS - 2000),
        dead_before=(3, NOW_MS - 1_700_000),
        money=Part(money_of("38.1", "47.9", "40", stretch={("100000000001", "sqs"): 4}), NOW_MS - 20_000),
        ledger=Part(
            replace(
                glance, fresh=fresh, open=opened, troubles=troubles,
                windows=OpenWindows(reasons, utc(NOW_S - 7400)),
                given=(Given(names[0], "rds", "unrecoverable", 12, utc(NOW_S - 90_000), utc(NOW_S - 900)),),
            ),
            NOW_MS - 2000,
        ),
    )  # fmt: skip


def history_of(seen: Seen) -> History:
    """Half an hour before `seen`, going up and down."""
    history = History()
    for i in range(120):
        at_ms = seen.now_ms - (120 - i) * 15_000
        numbers = {
            "fresh_p50_s": 150.0, "fresh_p99_s": 250 + 60 * ((i * 7) % 11), "fresh_worst_s": 300.0, "lag": (i * 5) % 37, "points_per_s": 3000 + 90 * ((i * 3) % 13),
            "open": 4000, "gaps": max(0, i - 80), "dead": 3 + i // 20, "usd": 10 + i * 0.02,
        }  # fmt: skip
        history.add(at_ms, numbers, {})
    return history


class Served:
    """The page as a coordinator serves it, whatever is `put` on it; its clock stands at NOW_MS and goes on from there."""

    def __init__(self) -> None:
        self.clock = SystemClock(NOW_S - SystemClock().now_s())
        self.lifecycle = Lifecycle()
        self.document = Document(self.clock)
        self.document.serve(self.lifecycle)
        self.url = ""

    def put(self, page: Json) -> None:
        self.document.data = Packed.of(page)

    def show(self, seen: Seen) -> None:
        self.put(page_of(seen, history_of(seen), {}))


@asynccontextmanager
async def served() -> AsyncIterator[Served]:
    found = Served()
    server = TestServer(_application(found.lifecycle))
    await server.start_server()
    found.url = str(server.make_url("/"))
    try:
        yield found
    finally:
        await server.close()
