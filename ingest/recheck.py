"""Asking the source again about a sample of sealed windows, and holding the store against its answer. Lands nothing.

* The sample is a pure function of the sealed windows, the share and the seed: who has the seed asks the same again.
* Only a complete answer is compared. What the store has and the source no longer shows is counted, and no difference: absence never
  deletes, here as everywhere.
* It costs what a look costs, says so, and is charged: as in doubt before the source is asked, as billed when it has answered.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from decimal import Decimal

import asyncpg
import numpy as np

from ingest import charges
from ingest.audit import Difference, Kind, Report
from ingest.charges import Charge, Reason
from ingest.clock import Clock
from ingest.evidence import LedgerSeal, StoreRows, ledger_seals, store_rows
from ingest.expected import Known, living
from ingest.model import Batch, LookStatus, Outcome, SourceName, Target, TaskItem
from ingest.schedule import grids_of
from ingest.sources.cloudwatch import CloudWatchSource
from ingest.validate import describe
from shard_config.model import Config
from shard_config.price import Prices

TASK_ID = "0" * 32
"""Of looks that belong to no task."""


@dataclass(frozen=True, slots=True, order=True)
class Sealed:
    """One sealed window of a target's service."""

    target: Target
    service: str
    start_s: int
    end_s: int


@dataclass(slots=True)
class Recheck:
    """What came of it. `gone` points are in the store and no longer shown; `unanswered` windows had no complete answer, by reason."""

    seed: int
    sealed: int
    windows: int = 0
    points: int = 0
    gone: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)
    metrics_billed: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    usd: Decimal = Decimal(0)

    def sentence(self, differences: int) -> str:
        """One line."""
        aside = "".join(
            f"; {count} windows without a whole answer: {why}" for why, count in self.unanswered.items()
        )
        return (
            f"recheck: {self.windows} of {self.sealed:,} sealed windows asked again (seed {self.seed}), {self.points:,} points, "
            f"{differences:,} differences, {self.gone:,} points no longer shown, {self.metrics_billed:,} metrics billed, ${self.usd}{aside}"
        )


def windows_of(seals: Sequence[LedgerSeal], grid_s: Mapping[tuple[str, str], int]) -> list[Sealed]:
    """The windows of seals, sorted. Of a folded day they are cut at the service's grid; one whose service is not configured is left out."""
    found: set[Sealed] = set()
    for seal in seals:
        step_s = grid_s.get((seal.target, seal.service))
        target = Target.parse(seal.target)
        if step_s is None or target.source != SourceName.CLOUDWATCH:
            continue  # nobody to ask: an exposition endpoint has no past
        for start_s, end_s in seal.spans:
            found |= {
                Sealed(target, seal.service, t, min(t + step_s, end_s)) for t in range(start_s, end_s, step_s)
            }
    return sorted(found)


def sample(windows: Sequence[Sealed], share: float, seed: int) -> list[Sealed]:
    """That share of the windows, at least one of any, in their order."""
    count = min(len(windows), math.ceil(share * len(windows)))
    return sorted(random.Random(seed).sample(list(windows), count))  # noqa: S311  # a seed is to be repeated


async def recheck(
    connection: asyncpg.Connection,
    config: Config,
    clock: Clock,
    report: Report,
    targets: Sequence[Target],
    share: float,
    seed: int,
    service: str | None = None,
) -> Recheck:
    """Ask again about a share of the windows sealed within the report's time; differences go into the report. Raises Transient."""
    seals = await ledger_seals(connection, targets, report.from_s, report.to_s)
    grids = {(str(t), g.service): g.poll_interval_s for t, gs in grids_of(config).items() for g in gs}
    windows = windows_of([s for s in seals if service in (None, s.service)], grids)
    done = Recheck(seed, len(windows))
    source = CloudWatchSource(config, clock)
    known = await charges.known(connection, charges.day_of(clock.now_s()))
    metrics = {(k.target, k.service): k.look_metrics or 0 for k in known}
    try:
        for window in sample(windows, share, seed):
            of_look = metrics.get((window.target, window.service), 0)
            await _again(connection, config, clock, report, source, window, of_look, done)
    finally:
        await source.close()
    return done


async def _again(
    connection: asyncpg.Connection,
    config: Config,
    clock: Clock,
    report: Report,
    source: CloudWatchSource,
    window: Sealed,
    metrics: int,
    done: Recheck,
) -> None:
    item = TaskItem(window.service, window.start_s, window.end_s, window.end_s - window.start_s)
    batches: list[Batch] = []
    deadline_s = clock.monotonic_s() + config.task_deadline_s
    intent = Charge(
        charges.day_of(clock.now_s()), window.target, window.service, Reason.RECHECK, metrics_in_doubt=metrics
    )
    await charges.put_down(connection, intent)
    async with aclosing(source.look(TASK_ID, window.target, item, deadline_s)) as answers:
        async for answer in answers:
            if isinstance(answer, Batch):
                batches.append(answer)
            else:
                outcome: Outcome = answer
    await charges.put_down(connection, charges.settled(intent, outcome))
    done.windows += 1
    done.metrics_billed += outcome.metrics_billed
    done.requests.update(outcome.requests)
    prices = Prices.of(config.aws, config.services)
    done.usd += prices.look_usd(outcome.metrics_billed, outcome.requests, window.service)
    if outcome.status is not LookStatus.COMPLETE:
        done.unanswered[f"{outcome.status}: {outcome.detail}"] += 1
        return
    stored: list[StoreRows] = []
    place = (window.target.account, window.target.region)
    await store_rows(connection, [place], window.start_s, window.end_s, stored.append)
    _compare(config, report, window, batches, stored, done)


def _compare(
    config: Config,
    report: Report,
    window: Sealed,
    batches: Sequence[Batch],
    stored: Sequence[StoreRows],
    done: Recheck,
) -> None:
    shown: dict[tuple[bytes, int], tuple[float, str]] = {}
    for batch in filter(None, (living(b, config.limits) for b in batches)):
        raws = batch.ids.astype(">u8").tobytes()
        owners = np.repeat(np.arange(len(batch.series)), batch.counts).tolist()
        texts = [describe(one) for one in batch.series]
        for i, t, value in zip(owners, batch.timestamps_s.tolist(), batch.values.tolist(), strict=True):
            key = (raws[16 * i : 16 * i + 16], t)
            shown[key] = max((value, texts[i]), shown.get(key, (value, texts[i])))
    done.points += len(shown)
    series = {raw for raw, _ in shown}
    for rows in stored:
        raws = rows.ids.astype(">u8").tobytes()
        for i, (t, value) in enumerate(zip(rows.timestamps_s.tolist(), rows.values.tolist(), strict=True)):
            raw = raws[16 * i : 16 * i + 16]
            found = shown.pop((raw, t), None)
            if found is None:
                done.gone += raw in series  # of others nobody was asked in this look
            elif found[0] != value:
                known = Known(found[1], str(window.target), window.service)
                _say(report, Kind.SOURCE_VALUE, known, t, f"the source has {found[0]!r}, the store {value!r}")
    for (_, t), (value, text) in shown.items():
        known = Known(text, str(window.target), window.service)
        _say(report, Kind.SOURCE_MISSING, known, t, f"the source has {value!r}")


def _say(report: Report, kind: Kind, known: Known, at_s: int, detail: str) -> None:
    report.add(Difference(kind, known.target, known.service, known.text, at_s, detail))
