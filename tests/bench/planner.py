"""How long a plan of 100,000 targets on 1,000 slots takes, what memory, how even it is, and what a change moves.

A fifth of the targets share the quotas of ten monitoring accounts, and twenty are heavier than a slot. CPU seconds, as others share the machine, and the
median of three turns; beside them a fixed piece of work in plain Python, for how fast the machine was in that hour.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable
from hashlib import blake2b
from statistics import median
from typing import TypeVar

from shard_config.plan import least_moved, moves
from shard_config.units import UnitPlan, inherit, plan_units
from tests.bench.run import Report

TARGETS, SLOTS, HEAVY, TURNS = 100_000, 1_000, 20, 3
SERVICES = ("ec2", "rds", "sqs")
GOAL_S, GOAL_BYTES = "<= 1.0", "<= 500e6"

T = TypeVar("T")
Weights = dict[str, dict[str, float]]


def run(report: Report) -> None:
    """The first plan, then against it one slot more, a tenth more slots, and weights that drifted."""
    rng = random.Random(1)
    weights, via = _problem(rng)
    drifted = {t: {s: w * rng.uniform(0.8, 1.25) for s, w in of.items()} for t, of in weights.items()}
    first = plan_units(weights, SLOTS, via=via)
    cases: dict[str, Callable[[], UnitPlan]] = {
        "first": lambda: plan_units(weights, SLOTS, via=via),
        "1,001 slots": lambda: plan_units(weights, SLOTS + 1, first.slots, via=via),
        "1,100 slots": lambda: plan_units(weights, SLOTS + SLOTS // 10, first.slots, via=via),
        "drifted weights": lambda: plan_units(drifted, SLOTS, first.slots, via=via),
    }
    turns: dict[str, list[float]] = {name: [] for name in (*cases, "yardstick")}
    found: dict[str, UnitPlan] = {}
    for _ in range(TURNS):
        turns["yardstick"].append(_timed(lambda: _yardstick(weights))[1])
        for name, case in cases.items():
            found[name], cpu_s = _timed(case)
            turns[name].append(cpu_s)
    report.add("100,000 digests and a sort of them, for scale", median(turns["yardstick"]), "s")
    for name in cases:
        report.add(name, median(turns[name]), "s", goal=GOAL_S)
    report.add("heaviest slot against the mean", _skew(first), "ratio", goal="<= 1.05")
    for name, of, slots in (("1,001 slots", weights, SLOTS + 1), ("1,100 slots", weights, SLOTS + SLOTS // 10),
                            ("drifted weights", drifted, SLOTS)):  # fmt: skip
        _moved(report, name, found[name], of, first, slots)
    report.add("targets split by service", len({u.split("#")[0] for u in first.slots if "#" in u}), "")
    tracemalloc.start()
    plan_units(weights, SLOTS, first.slots, via=via)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    report.add("memory", peak_bytes, "bytes", goal=GOAL_BYTES)


def _problem(rng: random.Random) -> tuple[Weights, dict[str, str]]:
    accounts = [f"{i:012d}" for i in range(TARGETS)]
    # 1 to 100 metrics a minute a service; a slot has 15,500, and a heavy target 20,000 in 40 services.
    heavy = set(rng.sample(accounts, HEAVY))
    many = tuple(f"service-{i}" for i in range(40))
    weights = {
        f"cloudwatch/{a}/eu-west-1": {s: rng.uniform(300, 700) for s in many}
        if a in heavy
        else {s: rng.uniform(1, 100) for s in SERVICES}
        for a in accounts
    }
    return weights, {a: f"{int(a) % 10:012d}" for a in accounts[: TARGETS // 5]}


def _moved(report: Report, name: str, found: UnitPlan, weights: Weights, first: UnitPlan, slots: int) -> None:
    began = inherit(found.slots, weights, first.slots)
    moved = sum(m.weight for m in moves(began, found.slots, found.weights))
    least = least_moved(found.weights, slots, began)
    share = moved / sum(found.weights.values())
    ratio = moved / least if least else 1.0
    report.add(f"moved by {name}", share, "of all weight", "the least", ratio, "<= 1.1")


def _yardstick(weights: Weights) -> list[bytes]:
    return sorted(blake2b(target.encode(), digest_size=8).digest() for target in weights)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start_s = time.process_time()
    found = work()
    return found, time.process_time() - start_s


def _skew(plan: UnitPlan) -> float:
    loads = [0.0] * SLOTS
    for unit, slot in plan.slots.items():
        loads[slot] += plan.weights[unit]
    return max(loads) * SLOTS / sum(loads)
