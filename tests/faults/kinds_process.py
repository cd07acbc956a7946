"""Faults of processes: killed at a point, paused, there twice, down for long, with a clock that is wrong, rolled."""

from __future__ import annotations

import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from tests.faults.field import Field
from tests.faults.kinds import Kind, Struck

REACHED_S = 15.0
"""A poll comes every ten seconds, and every worker has its part in each."""


@asynccontextmanager
async def killed_at(point: str, kind: str, field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """One worker of a kind, at a failpoint."""
    worker = rng.choice([name for name in field.workers if name.startswith(kind)])
    struck = Struck(worker)
    field.arm(worker, point, signal.SIGKILL)
    struck.missed = not await field.reached(worker, point, REACHED_S)
    yield struck


def _killed(row: str, worker: str, point: str, what: str) -> Kind:
    return Kind(
        f"{worker} killed {what}",
        row,
        partial(killed_at, point, worker),
        (0.0, 3.0),
        frozenset({worker}),
        may_pay_twice=worker == "exporter",
    )


KINDS: tuple[Kind, ...] = (
    _killed("exporter killed before/after S3 PUT", "exporter", "after_put", "after S3 PUT"),
    _killed(
        "consumer killed between", "consumer", "between_commits", "between the database's commit and Kafka's"
    ),
)
