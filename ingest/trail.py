"""Following one point through all that is written down about it: ledger, archive, Kafka, store. Reads only; `ingest.story` judges.

Bounded: at most `LOOKS_MAX` looks, the newest, with their objects; in Kafka only the one partition, from the first look to an hour past the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

import asyncpg
import numpy as np
import orjson

from ingest import pauses, wire
from ingest.archive import S3Archive
from ingest.auditor import reach_s
from ingest.batch import decode_by_series
from ingest.clock import Clock, rfc3339, utc
from ingest.errors import Rejected
from ingest.model import BatchId, DeadLetter, Series, SeriesKey, SourceName, Target, series_id, split_version
from ingest.pauses import Pauses
from ingest.ports import Record
from ingest.scan import dead_letters, positions_in_raw, times_of
from ingest.schedule import Grid, grids_of
from ingest.sinks.connection import translated
from ingest.story import Answered, Asked, Planned, Stored, Story, WindowState
from ingest.validate import Reason, describe
from shard_config.model import Config
from shard_config.price import Prices

LOOKS_MAX = 200
TASKS_MAX = 2_000
PUBLISHED_WITHIN_S = 3600
"""A batch is looked for in `raw` from its look's start until so long after its end."""


def asking(config: Config, key: SeriesKey) -> tuple[Target, Grid] | None:
    """The target and service of the configuration that ask for a series, or None."""
    for target, grids in grids_of(config).items():
        if (target.account, target.region) != (key.account, key.region):
            continue
        for grid in grids:
            profile = config.service_by_name.get(grid.service) if grid.has_past else None
            if profile is None:
                if not grid.has_past and grid.service == key.namespace:
                    return target, grid
                continue
            names = {m.name: m.statistics for m in profile.metrics} if profile.metrics != "all" else None
            stats = profile.statistics if names is None else names.get(key.metric, ())
            if profile.namespace == key.namespace and key.stat in stats:
                return target, grid
    return None


async def follow(
    connection: asyncpg.Connection,
    archive: S3Archive,
    config: Config,
    clock: Clock,
    key: SeriesKey,
    at_s: int,
) -> Story:
    """Everything about one point. Raises Transient, Fatal."""
    at_s = at_s // key.period_s * key.period_s
    found = asking(config, key)
    with translated("why"):
        stored = await _stored(connection, key, at_s)
        target, service = (found[0], found[1].service) if found else await _formerly(connection, key, stored)
        looks = await _looks(connection, target, service, at_s)
        story = Story(
            key=key,
            at_s=at_s,
            now_s=clock.now_s(),
            target=str(target),
            service=service,
            configured=found is not None,
            paused=await _paused(connection, target, service),
            window=await _window(connection, target, service, at_s),
            planned=await _planned(connection, target, service, at_s, reach_s([found[1]] if found else [])),
            asked=tuple(_asked(config, row) for row in looks),
            answered=(),
            spoilt=(),
            next_offsets=await _next_offsets(connection, config),
            stored=stored,
        )
    keys = list(dict.fromkeys(row["archive_key"] for row in looks if row["archive_key"]))
    if not keys:  # no receipt that names one; there may be an object all the same
        until_s = min(at_s + reach_s([found[1]] if found else []), clock.now_s() + 86_400)
        keys = [k async for k in archive.keys(target, at_s, until_s)][:LOOKS_MAX]
    answered, spoilt = await _answered(archive, config, key, at_s, keys)
    if answered:
        answered = await _followed(connection, config, target, key, at_s, answered, looks)
    return replace(story, answered=tuple(answered), spoilt=tuple(spoilt))


async def _stored(connection: asyncpg.Connection, key: SeriesKey, at_s: int) -> Stored | None:
    row = await connection.fetchrow(
        "SELECT value, version FROM samples WHERE ts = $1 AND series = $2", utc(at_s), series_id(key)
    )
    return Stored(row["value"], row["version"]) if row else None


async def _formerly(
    connection: asyncpg.Connection, key: SeriesKey, stored: Stored | None
) -> tuple[Target, str]:
    """Of a series that the configuration does not ask for (any more): the target and service that landed the point."""
    row = await connection.fetchrow(
        "SELECT target, service FROM landed WHERE version = $1 AND split_part(target, '/', 2) = $2"
        " AND split_part(target, '/', 3) = $3 LIMIT 1",
        stored.version if stored else 0,
        key.account,
        key.region,
    )
    if row:
        return Target.parse(row["target"]), row["service"]
    return Target(SourceName.CLOUDWATCH.value, key.account, key.region), ""


async def _paused(connection: asyncpg.Connection, target: Target, service: str) -> str:
    held = [p for p in await pauses.read(connection) if Pauses.of([p]).cover(target.account, service)]
    return "; ".join(
        f"{p.account}/{p.service} since {rfc3339(p.since.timestamp())}: {p.reason}" for p in held
    )


_WINDOW = """SELECT window_start, window_end, settles_at, attempts,
    CASE WHEN sealed_at IS NOT NULL THEN 'sealed' WHEN declared IS NOT NULL THEN 'declared ' || declared
        WHEN unbalanced IS NOT NULL THEN 'unbalanced' WHEN landed_as_of IS NOT NULL THEN 'landed'
        WHEN collected_as_of IS NOT NULL THEN 'collected' ELSE coalesce(last_status, 'planned') END AS state,
    coalesce(unbalanced, last_detail, '') AS detail
FROM windows WHERE target = $1 AND service = $2 AND window_start <= $3 AND window_end > $3"""

_FOLDED = """SELECT lower(r) AS window_start, upper(r) AS window_end, NULL::timestamptz AS settles_at, 0 AS attempts,
    coalesce('declared ' || (SELECT min(c.reason) FROM declared_days AS c WHERE c.target = d.target AND c.service = d.service
        AND c.day = d.day AND c.covered @> $3::timestamptz), 'sealed') AS state,
    'folded into its day' AS detail
FROM sealed_days AS d, unnest(d.covered) AS r WHERE d.target = $1 AND d.service = $2 AND r @> $3::timestamptz"""


async def _window(
    connection: asyncpg.Connection, target: Target, service: str, at_s: int
) -> WindowState | None:
    for query in (_WINDOW, _FOLDED):
        row = await connection.fetchrow(query, str(target), service, utc(at_s))
        if row:
            start, end = row["window_start"], row["window_end"]
            rest = (row["state"], row["detail"], row["settles_at"], row["attempts"])
            return WindowState(int(start.timestamp()), int(end.timestamp()), *rest)
    return None


async def _planned(
    connection: asyncpg.Connection, target: Target, service: str, at_s: int, within_s: int
) -> tuple[Planned, ...]:
    rows = await connection.fetch(
        "SELECT value, planned_at FROM tasks WHERE target = $1 AND tick > $2 AND tick <= $3 ORDER BY planned_at, tick"
        " LIMIT $4",
        str(target), utc(at_s), utc(at_s + within_s), TASKS_MAX,
    )  # fmt: skip
    tasks = ((wire.decode_task(row["value"]), row["planned_at"]) for row in rows)
    return tuple(
        Planned(task.task_id, task.kind, task.attempt, task.tick_s, planned_at)
        for task, planned_at in tasks
        if any(i.service == service and i.start_s <= at_s < i.end_s for i in task.items)
    )


async def _looks(
    connection: asyncpg.Connection, target: Target, service: str, at_s: int
) -> list[asyncpg.Record]:
    rows = await connection.fetch(
        "SELECT * FROM looks WHERE target = $1 AND service = $2 AND window_start <= $3 AND window_end > $3 AND finished_at >= $4"
        " ORDER BY finished_at DESC LIMIT $5",
        str(target), service, utc(at_s), utc(at_s - 86_400), LOOKS_MAX,
    )  # fmt: skip
    return list(reversed(rows))


def _asked(config: Config, row: asyncpg.Record) -> Asked:
    requests = orjson.loads(row["requests"])
    return Asked(
        task_id=row["task_id"],
        shard=row["shard"],
        status=row["status"],
        detail=row["detail"],
        finished_at=row["finished_at"],
        observed_at=row["observed_at"],
        series=row["series"],
        requests=requests,
        usd=Prices.of(config.aws, config.services).look_usd(row["metrics_billed"], requests, row["service"]),
        archive_key=row["archive_key"],
    )


async def _next_offsets(connection: asyncpg.Connection, config: Config) -> Mapping[int, int]:
    rows = await connection.fetch(
        "SELECT partition, next FROM positions WHERE sink = 'postgres' AND topic = $1",
        config.kafka.topic("raw"),
    )
    return {row["partition"]: row["next"] for row in rows}


async def _answered(
    archive: S3Archive, config: Config, key: SeriesKey, at_s: int, keys: Sequence[str]
) -> tuple[list[Answered], list[str]]:
    """The point in each archived batch, oldest version first; and what could not be read."""
    answered: list[Answered] = []
    spoilt: list[str] = []
    for archive_key in keys:
        try:
            task = await archive.get(archive_key)
        except Rejected as error:
            spoilt.append(str(error))
            continue
        if task is None:
            spoilt.append(f"{archive_key} is not in the archive")
            continue
        held = {batch_id for done in task.receipt.items for batch_id in done.held}
        for payload in task.payloads:
            try:
                found = _point_in(payload.value, config, key, at_s)
            except Rejected as error:
                spoilt.append(f"{archive_key}, batch {payload.batch_id.hex()}: {error}")
                continue
            if found is not None:
                value, version, bad = found
                is_held = payload.batch_id in held
                answered.append(
                    Answered(archive_key, payload.batch_id.hex(), value, version, None, {}, bad, is_held)
                )
    return sorted(answered, key=lambda a: a.version), spoilt


def _point_in(value: bytes, config: Config, key: SeriesKey, at_s: int) -> tuple[float, int, str] | None:
    """Value, version and what is wrong with it (or empty), of a batch's point; of a repeated timestamp the greatest."""
    decoded = decode_by_series(value, config.limits)
    batch = decoded.batch
    for index in (i for i, one in enumerate(batch.series) if one.key == key):
        end = int(batch.counts[: index + 1].sum())
        own = slice(end - int(batch.counts[index]), end)
        values = batch.values[own][batch.timestamps_s[own] == at_s]
        if len(values):
            good = values[np.isfinite(values)]
            if index in decoded.bad:
                return float(values[0]), batch.version, str(decoded.bad[index])
            if len(good):
                return float(good.max()), batch.version, ""
            bad = Reason.NOT_A_NUMBER if np.isnan(values).all() else Reason.INFINITE
            return float(values[0]), batch.version, str(bad)
    return None


async def _followed(
    connection: asyncpg.Connection,
    config: Config,
    target: Target,
    key: SeriesKey,
    at_s: int,
    answered: Sequence[Answered],
    looks: Sequence[asyncpg.Record],
) -> list[Answered]:
    """What became of each batch: where it stands in Kafka, when it landed, whether the point was put aside."""
    ids = [BatchId(bytes.fromhex(one.batch_id)) for one in answered]
    # Kafka's timestamps are of the machine's clock, a run's may be moved.
    moved_ms = config.run.clock_offset_s * 1000
    observed_ms = [split_version(one.version)[1] for one in answered]
    begun_ms = [round(row["started_at"].timestamp() * 1000) for row in looks] or observed_ms
    ended_ms = [round(row["finished_at"].timestamp() * 1000) for row in looks] or observed_ms
    positions = await positions_in_raw(
        config.kafka,
        target,
        ids,
        max(0, min(begun_ms) - moved_ms),
        max(ended_ms) - moved_ms + PUBLISHED_WITHIN_S * 1000,
    )
    with translated("why"):
        rows = await connection.fetch(
            "SELECT batch_id, sink, landed_at FROM landed WHERE batch_id = ANY($1)", list(ids)
        )
    landed: dict[bytes, dict[str, datetime]] = {}
    for row in rows:
        landed.setdefault(row["batch_id"], {})[row["sink"]] = row["landed_at"]
    refused: dict[bytes, str] = {}
    named = describe(Series(key))

    def take(_: Record, letter: DeadLetter) -> None:
        own = not letter.series or (letter.series == named and at_s in times_of(letter))
        if letter.batch_id in ids and own and letter.reason != Reason.MORE:
            refused[letter.batch_id] = letter.reason

    await dead_letters(config.kafka, take)
    return [
        replace(
            one,
            position=positions.get(batch_id),
            landed=landed.get(batch_id, {}),
            refused=refused.get(batch_id, one.refused),
        )
        for one, batch_id in zip(answered, ids, strict=True)
    ]
