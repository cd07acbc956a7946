"""What a kind of fault is: the contract between the campaign and the modules of kinds.

A module `tests.faults.kinds_*` exports `KINDS: tuple[Kind, ...]`; `campaign.py` joins them. A kind is struck on a `Field`, which is a whole system at
work. What holds of each:

* **Entering injects, leaving heals**, and both end within `BOUND_S`; leaving heals whatever the time between brought, also where it is cancelled
  (`try … finally`). After it nothing of the fault is left but its consequences. The campaign checks the invariants, a kind does not.
* **Its choices come from the `random.Random` that it is given** and from nothing else, so that a seed reproduces a run as far as timing does.
* **It may find nothing to hit** (a failpoint that was not reached in time): then it says so by `struck.missed`, and that is no complaint.
* What only the kind itself can judge (the second of a name did not exit, attempts were not bounded) it adds to `struck.complaints`.
* What it kills or pauses it does through `Field.kill`, `Field.stop` or a failpoint: those note the requests in flight, which is all that
  may be paid twice. What it publishes to `raw` that is bad it puts into `struck.bad`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.faults.truth import Dead

if TYPE_CHECKING:
    from tests.faults.field import Field

BOUND_S = 60.0
"""Within that an injection has been made, and a heal; an `alone` kind may take `ALONE_BOUND_S`."""
ALONE_BOUND_S = 300.0

NEEDS = frozenset({"kafka", "postgres", "s3", "aws", "coordinator", "exporter", "consumer", "clock"})


@dataclass(slots=True)
class Struck:
    """What one strike did; filled while it lasts."""

    hit: str = ""
    """Whom, as "exporter-2" or "kafka": for the log."""
    missed: bool = False
    """It came to nothing, for there was nothing to hit."""
    complaints: list[str] = field(default_factory=list)
    """What broke that only the kind can see; empty where all was well."""
    bad: dict[tuple[int, int], frozenset[Dead]] = field(default_factory=dict)
    """(partition, offset) of `raw` → the dead letters that must come of it. All else that is dead there counts as invented."""
    elsewhere: dict[tuple[str, int, int], Dead] = field(default_factory=dict)
    """The same of other topics, (topic, partition, offset) → the letter; whether it is there the kind itself judges."""
    notes: dict[str, float] = field(default_factory=dict)
    """Figures for the JSON, as {"targets_moved": 5}."""


Strike = Callable[["Field", random.Random], AbstractAsyncContextManager[Struck]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault."""

    name: str
    """As "exporter killed after S3 PUT": unique, and what `--kind` takes."""
    row: str
    """The row of the list of faults, by its first words, as "exporter killed before/after S3 PUT"; a test holds that each has a kind."""
    strike: Strike
    lasts_s: tuple[float, float] = (2.0, 8.0)
    """Between injection and heal, from and to; drawn by the seed."""
    needs: frozenset[str] = frozenset()
    """Of `NEEDS`: what it takes for itself. Kinds with a common need never overlap."""
    may_pay_twice: bool = False
    """Whether requests in flight, or answers lost, may be paid again because of it."""
    alone: bool = False
    """Strikes once in a run, when nothing else does; `lasts_s` may be (0, 0) where `strike` does all."""
