"""How long a plan of 100,000 targets on 1,000 slots takes, what memory, how even it is, and what a change moves."""

from __future__ import annotations

import random
import time
import tracemalloc

from shard_config.plan import moves, plan
from tests.bench.run import Report

TARGETS, SLOTS = 100_000, 1_000
GOAL_S, GOAL_BYTES = "<= 1.0", "<= 500e6"


def run(report: Report) -> None:
    """First plan, ten percent more slots, and weights that drifted; CPU seconds, as others share the machine."""
    rng = random.Random(1)
    weights = {f"cloudwatch/{i:012d}/eu-west-1": rng.uniform(1, 100) for i in range(TARGETS)}
    drifted = {target: weight * rng.uniform(0.8, 1.25) for target, weight in weights.items()}
    first, first_s = _timed(weights, SLOTS, None)
    grown, grown_s = _timed(weights, SLOTS + SLOTS // 10, first)
    _, drifted_s = _timed(drifted, SLOTS, first)
    report.add("plan, first", first_s, "s", goal=GOAL_S)
    report.add("plan, 10 % more slots", grown_s, "s", goal=GOAL_S)
    report.add("plan, drifted weights", drifted_s, "s", goal=GOAL_S)
    report.add("plan, heaviest slot against the mean", _skew(first, weights, SLOTS), "ratio", goal="<= 1.05")
    total = sum(weights.values())
    moved = sum(m.weight for m in moves(first, grown, weights)) / total
    # Each old slot is 1.1 of the new mean and may keep 1.05 of it.
    least = 1 - SLOTS * 1.05 / (SLOTS + SLOTS // 10)
    report.add(
        "plan, moved by 10 % more slots", moved, "of all weight", "the least", moved / least, goal="<= 1.1"
    )
    tracemalloc.start()
    plan(weights, SLOTS, first)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    report.add("plan, memory", peak_bytes, "bytes", goal=GOAL_BYTES)


def _timed(
    weights: dict[str, float], slots: int, previous: dict[str, int] | None
) -> tuple[dict[str, int], float]:
    start_s = time.process_time()
    found = plan(weights, slots, previous)
    return found, time.process_time() - start_s


def _skew(assigned: dict[str, int], weights: dict[str, float], slots: int) -> float:
    loads = [0.0] * slots
    for target, slot in assigned.items():
        loads[slot] += weights[target]
    return max(loads) * slots / sum(loads)
