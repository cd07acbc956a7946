"""Resources with their hours, read from rollups and the inventory for the report, a block of resources at a time. Reads only.

Guarantees:

* memory is bounded: of no more than `CELLS_MAX` hours of series at once, whatever the range and the number of series;
* a series is read once for its hours and once for its percentiles; each bucket of rollups once for each block, by whichever connection is free;
* of two series that say the same of a resource (other periods of one metric) the finer one counts.

A 95th percentile is merged from the days' sketches where the range is of whole UTC days; else who uses the hours takes the percentile of these.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final

import asyncpg
import numpy as np
import orjson
from numpy.typing import NDArray

from ingest.clock import utc
from ingest.errors import HeadgateError
from ingest.inventory import store as inventory_store
from ingest.inventory.model import Lived
from ingest.model import SeriesIds, bytes_of, halves_of
from ingest.report.model import ResourceKey
from ingest.report.resources import Axis, Merged, Observed, Place, SeriesHours, place_of
from ingest.report.utilization import WEEK_S, Ranges
from ingest.rollups import percentiles_of_spans
from ingest.sinks import rollup_read
from ingest.sinks.connection import translated
from ingest.sinks.rollup_read import DAY_S, HOUR_S
from shard_config.report import ROLES, Role

CELLS_MAX: Final = 75_000_000
"""Hours of series in memory: 6 to 14 bytes each, 6.5 on average of a machine's. 100,000 series of a month are read in one go, for each block reads all buckets."""
_PREFETCH: Final = 5_000

_SERIES = """SELECT id, account, region, namespace, metric, dimensions, stat, period_s FROM series
WHERE namespace = ANY($1) AND metric = ANY($2) AND ($3::text[] IS NULL OR account = ANY($3))"""

_UNROLLED = (
    "SELECT count(DISTINCT start) FROM rollup_marks WHERE span_s = 3600 AND start >= $1 AND start < $2"
)

_EXTREMES: Final[Mapping[Role, tuple[str, ...]]] = {
    Role.CPU: ("max",), Role.CONNECTIONS: ("max",), Role.STORAGE_SHARE: ("max",), Role.MEMORY_SHARE: ("max",),
    Role.MEMORY_FREE: ("min",), Role.STORAGE_FREE: ("min",),
}  # fmt: skip
"""Of the samples of an Average, the one that is nearest to full, or busiest."""

Tell = Callable[[str, int, int], None]
"""What is being done, how far, of how much."""


@dataclass(frozen=True, slots=True)
class Found:
    """One series of a resource."""

    id: bytes
    place: Place
    period_s: int
    beside_maximum: bool = False
    """Whether the Maximum statistic of the same metric is there as well."""

    @property
    def maximum(self) -> bool:
        return self.place.statistic == "Maximum"

    @property
    def columns(self) -> tuple[str, ...]:
        """What of its rollups is used. Where the Maximum statistic is not collected, the greatest sample is the next best to call an hour idle."""
        if self.maximum:
            return ("count", "max")
        role = self.place.metric.role
        extremes = () if role is Role.CPU and self.beside_maximum else _EXTREMES.get(role, ())
        return ("count", "sum", *extremes, *(("p95",) if role is Role.CPU else ()))


async def series_of(
    connection: asyncpg.Connection, accounts: Collection[str] | None
) -> dict[ResourceKey, list[Found]]:
    """The series that say something of a resource, by resource. Inside a transaction of the caller's. Raises Transient."""
    namespaces = sorted({roles.namespace for roles in ROLES.values()})
    metrics = sorted({metric.name for roles in ROLES.values() for metric in roles.metrics})
    wanted = None if accounts is None else sorted(accounts)
    best: dict[ResourceKey, dict[tuple[str, str], Found]] = defaultdict(dict)
    with translated("series"):
        async for row in connection.cursor(_SERIES, namespaces, metrics, wanted, prefetch=_PREFETCH):
            dimensions = sorted(orjson.loads(row["dimensions"]).items())
            place = place_of(row["namespace"], row["metric"], dimensions, row["stat"])
            if place is None:
                continue
            key = ResourceKey(row["account"], row["region"], place.service, place.id)
            found, says = (
                Found(row["id"], place, row["period_s"]),
                (place.metric.role, place.statistic),
            )
            before = best[key].get(says)
            if before is None or (found.period_s, found.id) < (before.period_s, before.id):
                best[key][says] = found
    return {
        key: [replace(one, beside_maximum=(role, "Maximum") in ones) for (role, _), one in ones.items()]
        for key, ones in best.items()
    }


async def lives_of(
    connection: asyncpg.Connection, axis: Axis, accounts: Collection[str] | None
) -> dict[ResourceKey, Lived]:
    """What the inventory knows of the resources that lived within the axis, of services that have metrics here. Raises Transient."""
    wanted = None if accounts is None else sorted(accounts)
    found = {}
    async for lived in inventory_store.resources(connection, axis.start_s, axis.end_s, wanted):
        last = lived.last
        if last.service in ROLES:
            found[ResourceKey(last.account, last.region, last.service, last.id)] = lived
    return found


async def unrolled_hours(connection: asyncpg.Connection, axis: Axis) -> int:
    """Hours of the axis with samples that rollups do not have yet. Raises Transient."""
    with translated("rollups"):
        found: int = await connection.fetchval(_UNROLLED, utc(axis.start_s), utc(axis.end_s))
    return found


async def observed(
    connections: Sequence[asyncpg.Connection],
    ranges: Ranges,
    series: Mapping[ResourceKey, Sequence[Found]],
    lives: Mapping[ResourceKey, Lived],
    looked: Mapping[tuple[str, str, str], NDArray[np.float32]],
    tell: Tell,
) -> AsyncIterator[Observed]:
    """All resources by account, region, service and id, but volumes after all instances. `connections` are those of a snapshot. Raises Transient."""
    keys = sorted(series.keys() | lives.keys(), key=lambda key: (key.service == "ebs", key))
    blocks = list(_blocks(keys, series, ranges.axis.hours))
    for number, block in enumerate(blocks):
        ones = [found for key in block for found in series.get(key, ())]
        table = _Table(ones, ranges.axis)
        percentiles = await _fill(table, connections, ranges, lambda done, of, n=number: tell("reading hours", n * of + done, len(blocks) * of))  # type: ignore[misc]  # fmt: skip
        at = 0
        for key in block:
            end = at + len(series.get(key, ()))
            hours = {
                (ones[i].place.metric.role, ones[i].place.statistic): table.series(i, percentiles)
                for i in range(at, end)
            }
            at = end
            yield Observed(key, hours, lives.get(key), looked.get((key.account, key.region, key.service)))


async def _fill(
    table: _Table, connections: Sequence[asyncpg.Connection], ranges: Ranges, tell: Callable[[int, int], None]
) -> dict[bytes, Merged]:
    """Read the table's hours, and return the percentiles of its series, where the range is of whole days."""
    buckets = table.buckets()
    todo, done = iter(buckets), count(1)
    percentiles: dict[bytes, Merged] = {}

    async def work(connection: asyncpg.Connection) -> None:
        with translated("rollups"):
            for series in todo:
                async for one in rollup_read.read(
                    connection, HOUR_S, ranges.axis.start_s, ranges.axis.end_s, table.used, series
                ):
                    table.take(one)
                if not ranges.from_s % DAY_S and not ranges.to_s % DAY_S:
                    percentiles.update(await _merged(connection, ranges, table.of_levels(series)))
                tell(next(done), len(buckets))

    try:
        async with asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(work(connection))
    except* HeadgateError as errors:
        raise errors.exceptions[0] from None
    return percentiles


def _blocks(
    keys: Sequence[ResourceKey], series: Mapping[ResourceKey, Sequence[Found]], hours: int
) -> list[list[ResourceKey]]:
    """Resources in their order, as many at once as memory allows; at least one."""
    blocks: list[list[ResourceKey]] = []
    room = 0
    for key in keys:
        cells = len(series.get(key, ())) * hours
        if cells > room or not blocks:
            blocks.append([])
            room = CELLS_MAX
        blocks[-1].append(key)
        room -= cells
    return blocks


# --- hours ------------------------------------------------------------------------------------------------------------

_TYPES: Final[Mapping[str, Any]] = {
    "count": np.uint16,
    "sum": np.float32,
    "max": np.float32,
    "p95": np.float32,
    "min": np.float32,
}


class _Table:
    """The hours of some series: by column an array of shape (series that use it, hours)."""

    def __init__(self, series: Sequence[Found], axis: Axis) -> None:
        self._axis = axis
        self._ids = [one.id for one in series]
        self._rows = {one.id: row for row, one in enumerate(series)}
        self._slots: dict[str, NDArray[np.int64]] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        for name, kind in _TYPES.items():
            uses = np.array([name in one.columns for one in series], np.bool_)
            self._slots[name] = np.where(uses, np.cumsum(uses) - 1, -1)
            empty = 0 if name == "count" else np.nan
            self._columns[name] = np.full((int(uses.sum()), axis.hours), empty, kind)
        self._nothing = np.broadcast_to(np.float32(np.nan), axis.hours)

    @property
    def used(self) -> tuple[str, ...]:
        """What some series uses. The others are not read: PostgreSQL's sending of columns is most of the time."""
        return tuple(name for name, column in self._columns.items() if len(column))

    def buckets(self) -> list[SeriesIds]:
        """The series, sorted, by their bucket in the store."""
        ids = halves_of(sorted(self._ids))
        cuts = np.flatnonzero(np.diff(ids[:, 0] >> np.uint64(56))) + 1
        return np.split(ids, cuts) if len(ids) else []

    def of_levels(self, series: SeriesIds) -> SeriesIds:
        """Those of the series whose percentile is asked for: a Maximum has none."""
        slots = self._slots["sum"]
        return series[[slots[self._rows[id_]] >= 0 for id_ in bytes_of(series)]]

    def take(self, read: rollup_read.Slice) -> None:
        """Put in what was read of some series."""
        rows = np.array([self._rows[id_] for id_ in bytes_of(read.ids)], np.int64)[read.index]
        hours = (read.starts_s - self._axis.start_s) // HOUR_S
        for name, column in read.columns.items():
            slots = self._slots[name][rows]
            uses = slots >= 0
            # Past its range a count says only that there are many.
            values = np.minimum(column, 65_535) if name == "count" else column
            self._columns[name][slots[uses], hours[uses]] = values[uses]

    def series(self, row: int, percentiles: Mapping[bytes, Merged]) -> SeriesHours:
        """The hours of the series that was given as number `row`."""

        def column(name: str) -> NDArray[Any] | None:
            slot = self._slots[name][row]
            return None if slot < 0 else self._columns[name][slot]

        sums = column("sum")
        return SeriesHours(
            self._columns["count"][self._slots["count"][row]],
            self._nothing if sums is None else sums,
            column("max"),
            column("p95"),
            column("min"),
            percentiles.get(self._ids[row], Merged()),
        )


async def _merged(connection: asyncpg.Connection, ranges: Ranges, series: SeriesIds) -> dict[bytes, Merged]:
    """The 95th percentiles over the range, its last week, and the week before, which are of whole days."""
    from_s, to_s = ranges.from_s, ranges.to_s
    week_s, before_s = to_s - WEEK_S, to_s - 2 * WEEK_S
    found: dict[bytes, Merged] = {}
    async for days in rollup_read.read_sketches(connection, min(from_s, before_s), to_s, series):
        spans = [
            [n for n, (start_s, _) in enumerate(days) if first_s <= start_s < end_s]
            for first_s, end_s in ((from_s, to_s), (week_s, to_s), (before_s, week_s))
        ]
        ids, values = percentiles_of_spans([day for _, day in days], spans, (0.95,))
        for id_, three in zip(bytes_of(ids), values[:, :, 0].tolist(), strict=True):
            found[id_] = Merged(*(None if np.isnan(one) else one for one in three))
    return found
