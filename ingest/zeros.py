"""Points that CloudWatch certainly has not, as zeros: YACE's nilToZero, said of true times. Pure.

A metric as Errors of Lambda reports nothing where nothing failed. Where `nil_to_zero` names it, each of its periods without a point is sent as 0, once
it is certain that there is none:

* a look that began after the window had settled was complete, and its receipt has come;
* all batches that receipts have announced of that target and service were read;
* the series was known before the window began (a look may not have asked for one that was found later), and so was the target: of what was
  read before this process began nobody knows.

A zero has version 0, so anything real is greater. What a restart, a move of partitions or a cap forgets is left out, never guessed.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np
import structlog

from ingest.model import (
    Batch,
    BatchId,
    LookStatus,
    Receipt,
    ReceiptItem,
    Series,
    SeriesIds,
    Target,
    series_ids,
)
from shard_config.model import Config, ServiceProfile

log = structlog.get_logger()

SERIES_MAX: Final = 500_000
"""Series that may get zeros, of all targets of a process; of what is beyond, nothing is sent as 0."""
BATCHES_MAX: Final = 10_000
"""Batches of a target and service that were read and are not announced yet."""
AWAITED_S: Final = 1800
"""A batch that is announced and does not come for so long has been lost for us: what it would have said of is left out."""
WINDOWS_MAX: Final = 512
"""Windows, of a target and service, whose points are remembered."""
TABLES_MAX: Final = 4_096
SERIES_PER_BATCH: Final = 500
LOOK_S: Final = 120
"""A sealing look, its receipt and its points have come so long after its tick, nearly always."""

_Key = tuple[Target, str]


def wait_s(profile: ServiceProfile, config: Config) -> int:
    """How much longer than settling a service's points have to wait, where each is sent once and in order: until zeros are known.

    The look that says what is missing of a window is that of the first tick after it settled; its first points are a poll interval older than its end.
    """
    if not _patterns(config, profile.service):
        return 0
    poll_s = profile.poll_interval_s
    return -(-profile.settling_s // poll_s) * poll_s - profile.settling_s + poll_s + LOOK_S


def _patterns(config: Config, service: str) -> tuple[str, ...]:
    write = config.remote_write
    return write.services[service].nil_to_zero if write is not None and service in write.services else ()


@dataclass(slots=True)
class _Service:
    """What is known of one target's service. `known_s`: since when a series is known, by its id."""

    since_s: int
    series: dict[bytes, Series] = field(default_factory=dict)
    known_s: dict[bytes, int] = field(default_factory=dict)
    tables: list[tuple[tuple[Series, ...], SeriesIds]] = field(default_factory=list)
    """The series in batches, and made only where they changed, for whoever reads batches remembers them by these arrays."""
    seen: OrderedDict[BatchId, None] = field(default_factory=OrderedDict)
    awaited: OrderedDict[BatchId, int] = field(default_factory=OrderedDict)
    """Announced, and not read yet; and when that was said."""
    windows: OrderedDict[int, dict[bytes, int]] = field(default_factory=OrderedDict)
    """By start, which periods each series has a point in, a bit each."""
    settled: dict[int, int] = field(default_factory=dict)
    """Windows of which a look has said all, and their length."""
    done_s: int = 0
    """Windows that begin before that are done with."""

    def give_up(self) -> None:
        """What is awaited does not come: nothing is certain of any window that had begun when it was announced."""
        self.done_s = max(self.done_s, *self.awaited.values())
        self.awaited.clear()
        self.settled = {
            start_s: length_s for start_s, length_s in self.settled.items() if start_s >= self.done_s
        }


class Zeros:
    """The missing points of the series that one process sends to one receiver. Feed it all records and receipts; take what is `due`."""

    def __init__(self, config: Config) -> None:
        self._profiles = {p.service: p for p in config.services if _patterns(config, p.service)}
        self._services: dict[_Key, _Service] = {}
        self._members: OrderedDict[int, tuple[SeriesIds, list[tuple[int, bytes]]]] = OrderedDict()
        patterns = {name: [re.compile(p) for p in _patterns(config, name)] for name in self._profiles}

        @lru_cache(16_384)
        def is_meant(service: str, metric: str) -> bool:
            return any(pattern.fullmatch(metric) for pattern in patterns[service])

        self._is_meant = is_meant
        self._series = 0
        self._full = False

    def wants(self, service: str) -> bool:
        """Whether any of a service's missing points are sent."""
        return service in self._profiles

    @property
    def targets(self) -> set[_Key]:
        """Targets and services that points were seen of: whose listed series to `learn`."""
        return set(self._services)

    def forget(self) -> None:
        """Partitions have moved: nothing that is known holds any more."""
        self._services.clear()
        self._members.clear()
        self._series = 0

    def learn(self, target: Target, service: str, listed: Iterable[Series], now_s: int) -> None:
        """All series that a target's service has, as it was listed: those that never report count too. Others are forgotten."""
        if not self.wants(service):
            return
        state = self._services.setdefault((target, service), _Service(now_s))
        mine = tuple(one for one in listed if self._is_meant(service, one.key.metric))
        ids = series_ids(mine)
        found = {ids[i].tobytes(): one for i, one in enumerate(mine)}
        for key in state.series.keys() - found.keys():
            del state.series[key], state.known_s[key]
            state.tables.clear()
            self._series -= 1
        for key in found.keys() - state.series.keys():
            self._know(state, key, found[key], now_s)

    def seen(self, batch: Batch, batch_id: BatchId, now_s: int) -> None:
        """A batch of `raw` was read, whoever's."""
        if not self.wants(batch.service):
            return
        state = self._services.setdefault((batch.target, batch.service), _Service(now_s))
        if state.awaited.pop(batch_id, None) is None:
            state.seen[batch_id] = None
            if len(state.seen) > BATCHES_MAX:
                state.seen.popitem(last=False)
        period_s = self._profiles[batch.service].period_s
        starts = np.cumsum(batch.counts) - batch.counts
        for i, key in self._members_of(batch):
            if key not in state.series:
                self._know(state, key, batch.series[i], now_s)
            begin = int(starts[i])
            for at_s in batch.timestamps_s[begin : begin + int(batch.counts[i])].tolist():
                start_s = at_s // batch.grid_s * batch.grid_s
                if start_s >= max(state.since_s, state.done_s):
                    window = state.windows.setdefault(start_s, {})
                    window[key] = window.get(key, 0) | 1 << (at_s - start_s) // period_s
        while len(state.windows) > WINDOWS_MAX:
            start_s, _ = state.windows.popitem(last=False)
            state.done_s = max(state.done_s, start_s + batch.grid_s)

    def receipt(self, receipt: Receipt, now_s: int) -> None:
        """A receipt was read from `ledger`, whoever's: receipts of targets that nothing was seen of are passed over."""
        for item in receipt.items:
            state = self._services.get((receipt.target, item.item.service))
            if state is None:
                continue
            for batch_id in item.batches:
                if batch_id in state.seen:
                    del state.seen[batch_id]
                else:
                    state.awaited[batch_id] = now_s
            self._settle(state, item)

    def due(self, now_s: int) -> list[Batch]:
        """Zeros that are certain, once each: batches of at most SERIES_PER_BATCH series, version 0."""
        found: list[Batch] = []
        for (target, service), state in self._services.items():
            if state.awaited:
                if next(iter(state.awaited.values())) + AWAITED_S <= now_s:
                    state.give_up()
                continue
            period_s = self._profiles[service].period_s
            for start_s, length_s in sorted(state.settled.items()):
                found += _batches(state, target, service, start_s, length_s, period_s)
                state.windows.pop(start_s, None)
                state.done_s = max(state.done_s, start_s + length_s)
            state.settled.clear()
        return found

    def _settle(self, state: _Service, done: ReceiptItem) -> None:
        item, profile = done.item, self._profiles[done.item.service]
        if done.outcome.status != LookStatus.COMPLETE or item.period_s not in (0, profile.period_s):
            return
        settled_s = done.outcome.observed_at_ms // 1000 - profile.settling_s
        for window in item.windows():
            if window.end_s <= settled_s and window.start_s >= max(state.since_s, state.done_s):
                state.settled[window.start_s] = item.grid_s

    def _know(self, state: _Service, key: bytes, series: Series, now_s: int) -> None:
        if self._series >= SERIES_MAX:
            if not self._full:
                log.error("zeros_too_many", most=SERIES_MAX, remedy="name fewer metrics in nil_to_zero, or run more remote writers")  # fmt: skip
            self._full = True
            return
        self._series += 1
        state.series[key], state.known_s[key] = series, now_s
        state.tables.clear()

    def _members_of(self, batch: Batch) -> list[tuple[int, bytes]]:
        """Index and id of the series of a batch that are meant; tables are the same objects from look to look."""
        found = self._members.get(id(batch.ids))
        if found is not None:
            self._members.move_to_end(id(batch.ids))
            return found[1]
        meant = [
            (i, batch.ids[i].tobytes())
            for i, one in enumerate(batch.series)
            if self._is_meant(batch.service, one.key.metric)
        ]
        self._members[id(batch.ids)] = batch.ids, meant
        if len(self._members) > TABLES_MAX:
            self._members.popitem(last=False)
        return meant


def _batches(
    state: _Service, target: Target, service: str, start_s: int, length_s: int, period_s: int
) -> list[Batch]:
    if not state.tables:
        series = tuple(state.series.values())
        parts = [series[i : i + SERIES_PER_BATCH] for i in range(0, len(series), SERIES_PER_BATCH)]
        state.tables = [(part, series_ids(part)) for part in parts]
    have, found = state.windows.get(start_s, {}), []
    wanted = range(start_s, start_s + length_s, period_s)
    for part, ids in state.tables:
        missing = []
        for i, one in enumerate(part):
            key = ids[i].tobytes()
            is_certain = state.known_s[key] <= start_s and one.key.period_s == period_s
            points = have.get(key, 0)
            missing.append([t for n, t in enumerate(wanted) if not points >> n & 1] if is_certain else [])
        if any(missing):
            stamps = np.array([t for times in missing for t in times], dtype=np.int64)
            counts = np.array([len(times) for times in missing], dtype=np.int32)
            values = np.zeros(len(stamps), dtype=np.float64)
            found.append(Batch("0" * 32, target, service, 0, 0, length_s, part, counts, stamps, values, ids))
    return found
