"""How fast batches are encoded and decoded, and how small they are, against plain fastavro of the same content."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import zstandard

from ingest import series_table, wire
from ingest.batch import ZSTD_LEVEL
from ingest.model import Batch, Series, SeriesKey, Target, series_ids
from shard_config.model import Limits
from tests.bench.run import Report

SERIES, POINTS = 500, 5
T0_S = 1_767_225_600
METRICS = ("CPUUtilization", "NetworkIn", "NetworkOut", "DiskReadBytes", "DiskWriteBytes")
LIMITS = Limits()
BYTES_PER_POINT_GOAL = "<= 10"
TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "cloudwatch-traces"
ROUNDS_S = 0.5
"""How long each figure is measured, in rounds of which the quickest counts: others share the machine."""


PLAIN = fastavro.parse_schema(
    {
        "type": "record",
        "name": "PlainBatch",
        "fields": [
            {"name": "task_id", "type": "string"},
            {"name": "observed_at_ms", "type": "long"},
            {
                "name": "series",
                "type": {
                    "type": "array",
                    "items": {
                        "type": "record",
                        "name": "PlainSeries",
                        "fields": [
                            *(
                                {"name": name, "type": "string"}
                                for name in ("account", "region", "namespace", "metric", "stat", "unit")
                            ),
                            {"name": "period_s", "type": "int"},
                            {"name": "dimensions", "type": {"type": "map", "values": "string"}},
                        ],
                    },
                },
            },
            {"name": "counts", "type": {"type": "array", "items": "int"}},
            {"name": "timestamps_s", "type": {"type": "array", "items": "long"}},
            {"name": "values", "type": {"type": "array", "items": "double"}},
        ],
    }
)
"""The same batch as anybody would write it first: columns for points, a record a series, arrays of numbers."""


def batch_of(seed: int, decimals: int = 2) -> Batch:
    """500 series of EC2 instances with 5 points each: percentages and bytes, to so many decimals."""
    rng = np.random.default_rng(seed)
    instances = [f"i-{int(n):017x}" for n in rng.integers(0, 2**63, SERIES // len(METRICS))]
    series = tuple(
        Series(
            SeriesKey("123456789012", "us-east-1", "AWS/EC2", metric, (("InstanceId", one),), "Average", 60),
            "Percent" if metric == METRICS[0] else "Bytes",
        )
        for one in instances
        for metric in METRICS
    )
    levels = np.where(np.arange(SERIES) % len(METRICS) == 0, 20.0, rng.lognormal(11, 2, SERIES))
    values = np.repeat(levels, POINTS) * rng.uniform(0.8, 1.2, SERIES * POINTS)
    return Batch(
        task_id="0" * 32,
        target=Target("cloudwatch", "123456789012", "us-east-1"),
        service="ec2",
        observed_at_ms=T0_S * 1000 + 310_000,
        revision=0,
        grid_s=300,
        series=series,
        counts=np.full(SERIES, POINTS, np.int32),
        timestamps_s=np.tile(T0_S + 60 * np.arange(POINTS, dtype=np.int64), SERIES),
        values=np.round(values, decimals),
        ids=series_ids(series),
    )


def traced_batch(seed: int) -> Batch | None:
    """The same series, with stretches of real CloudWatch traces as values; None where the traces are not here."""
    files = sorted(TRACES.glob("*.csv"))
    if not files:
        return None
    rng = np.random.default_rng(seed)
    traces = [np.loadtxt(file, delimiter=",", skiprows=1, usecols=1) for file in files]
    stretches = []
    for n in range(SERIES):
        trace = traces[n % len(traces)]
        start = int(rng.integers(len(trace) - POINTS))
        stretches.append(trace[start : start + POINTS])
    return replace(batch_of(seed), values=np.concatenate(stretches))


def plain_encode(batch: Batch) -> bytes:
    """`batch` with the baseline's schema, compressed as ours is."""
    buffer = io.BytesIO()
    fields: dict[str, Any] = {
        "task_id": batch.task_id,
        "observed_at_ms": batch.observed_at_ms,
        "series": [
            {
                "account": one.key.account,
                "region": one.key.region,
                "namespace": one.key.namespace,
                "metric": one.key.metric,
                "stat": one.key.stat,
                "unit": one.unit,
                "period_s": one.key.period_s,
                "dimensions": dict(one.key.dimensions),
            }
            for one in batch.series
        ],
        "counts": batch.counts.tolist(),
        "timestamps_s": batch.timestamps_s.tolist(),
        "values": batch.values.tolist(),
    }
    fastavro.schemaless_writer(buffer, PLAIN, fields)
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(buffer.getvalue())


def plain_decode(value: bytes) -> tuple[tuple[Series, ...], Any, Any]:
    """What whoever lands a batch needs of it: series, ids and columns."""
    raw = zstandard.ZstdDecompressor().decompress(value)
    datum: Any = fastavro.schemaless_reader(io.BytesIO(raw), PLAIN, None)
    series = tuple(
        Series(
            SeriesKey(
                one["account"],
                one["region"],
                one["namespace"],
                one["metric"],
                tuple(sorted(one["dimensions"].items())),
                one["stat"],
                one["period_s"],
            ),
            one["unit"],
        )
        for one in datum["series"]
    )
    return series, series_ids(series), (np.array(datum["timestamps_s"]), np.array(datum["values"]))


def points_per_s(work: Callable[[], object]) -> float:
    work()
    best_s = float("inf")
    until_s = time.perf_counter() + ROUNDS_S
    while time.perf_counter() < until_s:
        start_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - start_s)
    return SERIES * POINTS / best_s


def run(report: Report) -> None:
    """Measure; each `ratio` is ours over plain fastavro's."""
    batch = batch_of(seed=1)
    (payload,) = wire.encode_batch(batch)
    plain = plain_encode(batch)

    def encode_cold() -> None:
        series_table.WRITTEN = series_table.TableCache()
        wire.encode_batch(batch)

    def decode_cold() -> None:
        series_table.READ = series_table.TableCache()
        wire.decode_batch(payload.value, LIMITS)

    encode_plain, decode_plain = (
        points_per_s(work) for work in (lambda: plain_encode(batch), lambda: plain_decode(plain))
    )
    for name, work, baseline in (
        ("encode, labels known", lambda: wire.encode_batch(batch), encode_plain),
        ("encode, labels new", encode_cold, encode_plain),
        ("decode, labels known", lambda: wire.decode_batch(payload.value, LIMITS), decode_plain),
        ("decode, labels new", decode_cold, decode_plain),
    ):
        ours = points_per_s(work)
        report.add(f"codec: {name}", ours, "points/s", "plain fastavro", ours / baseline)
    for name, measured in (
        ("values of 2 decimals", batch_of(seed=2)),
        ("values of all digits", batch_of(seed=2, decimals=17)),
        ("values of real traces", traced_batch(seed=2)),
    ):
        if measured is not None:
            size = len(wire.encode_batch(measured)[0].value) / measured.points
            report.add(f"codec: {name}", size, "bytes/point", goal=BYTES_PER_POINT_GOAL)
