"""What a consumer does for the ledger besides projecting it: marks what has landed, seals, folds, forgets, and says how it stands.

Every consumer tries; the database's locks let one at a time seal and fold. A step that fails is tried again at its next turn, and holds up no
landing. Sealing rests three times as long as it took, so that reading back takes a quarter of one connection at most.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from prometheus_client import Counter, Gauge

from ingest import compact, settling
from ingest.clock import Clock, utc
from ingest.errors import Transient
from ingest.gaps import open_windows
from ingest.ledger import Ledger
from ingest.overview import freshness
from ingest.schedule import grids_of
from ingest.seal import Scope, scopes_of, seal
from ingest.sinks.partitions import drop_partitions
from shard_config.model import Config
from workers.lateness import DAYS, LATENESS
from workers.lifecycle import Lifecycle

_log = structlog.get_logger()

TURN_S = 0.5
SEAL_INTERVAL_S = 2.0
COMPACT_INTERVAL_S = 60.0
DROP_INTERVAL_S = 600.0
OBSERVE_INTERVAL_S = 15.0
MEASURE_INTERVAL_S = 60.0

SEALED = Counter("headgate_windows_sealed_total", "Windows whose rows, read back, are what the look says.")
UNBALANCED = Counter(
    "headgate_windows_unbalanced_total",
    "Readings back that differ from the look's receipt. Rising: rows are missing or changed; see headgate gaps.",
)
OPEN = Gauge(
    "headgate_open_windows",
    "Windows that have ended and are neither sealed nor declared, by reason; in_time: their deadline has not passed.",
    ["reason"],
)
OLDEST = Gauge(
    "headgate_oldest_open_window_seconds",
    "Age of the oldest open window, since its end; high: something is not healed. 0: none is open.",
)
FRESHNESS = Gauge(
    "headgate_target_freshness_seconds",
    "Age of a target's newest landed window, since its end; rising: nothing of it lands.",
    ["target"],
)
OBSERVED = Gauge(
    "headgate_ledger_observed_timestamp_seconds",
    "Unix time at which the metrics of windows and targets were last read from the ledger. Standing still: they are old; is PostgreSQL there?",
)
STORE = Gauge("headgate_store_bytes", "What the store's database takes on disk.", ["sink"])
CAPACITY = Gauge(
    "headgate_store_capacity_bytes",
    "What it may grow to (postgres.capacity_bytes); none: not known.",
    ["sink"],
)


@dataclass(slots=True)
class _Turn:
    """A step, and when it is due on the monotonic clock."""

    step: Callable[[], Awaitable[float]]
    due_s: float = 0.0


class Upkeep:
    """The ledger's loop of one process. Each step returns the seconds until its next turn."""

    def __init__(self, ledger: Ledger, config: Config, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._scopes: dict[tuple[str, str], Scope] = {}
        self.configure(config)
        steps = (self.seal, self.compact, self.drop, self.observe, self.measure)
        self._turns = [_Turn(step) for step in steps]

    def configure(self, config: Config, *, whole: bool = True) -> None:
        """Go by this configuration from the next step on. `whole`: all accounts are known, an organization's too."""
        # What was removed is still sealed, where it has landed.
        self._scopes = {**self._scopes, **scopes_of(config)}
        self._retention = timedelta(days=config.ledger_retention_days)
        self._samples_retention_days = config.samples_retention_days
        self._clock_offset_s = config.run.clock_offset_s
        CAPACITY.clear()
        if config.postgres.capacity_bytes is not None:
            CAPACITY.labels(sink="postgres").set(config.postgres.capacity_bytes)
        # What was removed is no reason for an alert.
        self._targets = [str(target) for target in grids_of(config)] if whole else None

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop."""
        while not lifecycle.stop.is_set():
            try:
                await self.turn(lifecycle)
            except Transient as error:
                _log.warning("ledger_upkeep_retries", error=str(error))
            await lifecycle.pause(TURN_S)

    async def turn(self, lifecycle: Lifecycle) -> None:
        """Mark what has landed, then what is due. Raises Transient."""
        while await self._ledger.fold_landed("postgres", self._clock.now_s()) and not lifecycle.stop.is_set():
            pass
        for turn in self._turns:
            if not lifecycle.stop.is_set() and self._clock.monotonic_s() >= turn.due_s:
                turn.due_s = self._clock.monotonic_s() + SEAL_INTERVAL_S  # where it fails
                turn.due_s = self._clock.monotonic_s() + await turn.step()

    async def seal(self) -> float:
        """One pass over what may be sealed."""
        started_s = self._clock.monotonic_s()
        async with self._ledger.connected() as connection:
            done = await seal(connection, self._scopes, self._now())
        SEALED.inc(done.sealed)
        UNBALANCED.inc(done.windows - done.sealed)
        if done.windows > done.sealed:
            _log.warning("windows_unbalanced", windows=done.windows - done.sealed, sealed=done.sealed)
        took_s = self._clock.monotonic_s() - started_s
        return 3 * took_s if done.windows else SEAL_INTERVAL_S

    async def compact(self) -> float:
        """Fold what was closed long enough ago, and forget what is past its retention: one transaction each."""
        now = self._now()
        async with self._ledger.connected() as connection:
            folded = await compact.fold_days(connection, now - timedelta(seconds=compact.GRACE_S))
        async with self._ledger.connected() as connection:
            forgotten = await compact.forget(connection, now - self._retention)
            await settling.forget(connection, now)
        if folded or forgotten:
            _log.info("ledger_compacted", windows=folded, forgotten=forgotten)
        return 1.0 if folded == compact.ROWS_MAX or forgotten >= compact.ROWS_MAX else COMPACT_INTERVAL_S

    async def drop(self) -> float:
        """Drop the days of samples that are past their retention, whole."""
        if self._samples_retention_days is not None:
            today = self._clock.now_s() // 86_400
            async with self._ledger.connected() as connection:
                days = await drop_partitions(connection, today - self._samples_retention_days)
            for day in days:
                _log.info("samples_dropped", day=str(utc(day * 86_400).date()))
        return DROP_INTERVAL_S

    async def observe(self) -> float:
        """Set the metrics."""
        now = self._now()
        async with self._ledger.connected() as connection:
            seen = await open_windows(connection, now, self._targets)
            fresh_until = await freshness(connection, now)
            LATENESS.seen = await settling.observed(connection, now, DAYS)
        OPEN.clear()
        for reason, windows in seen.by_reason.items():
            OPEN.labels(reason=reason).set(windows)
        OLDEST.set((now - seen.oldest_end).total_seconds() if seen.oldest_end else 0)
        FRESHNESS.clear()
        for target, until in fresh_until.items():
            if self._targets is not None and target not in self._targets:
                continue
            FRESHNESS.labels(target=target).set((now - until).total_seconds())
        OBSERVED.set(now.timestamp() - self._clock_offset_s)
        return OBSERVE_INTERVAL_S

    async def measure(self) -> float:
        """Set how large the store is. PostgreSQL asks the file system for each of its files: milliseconds for thousands."""
        async with self._ledger.connected() as connection:
            size = await connection.fetchval("SELECT pg_database_size(current_database())")
        STORE.labels(sink="postgres").set(size)
        return MEASURE_INTERVAL_S

    def _now(self) -> datetime:
        return utc(self._clock.now_s())
