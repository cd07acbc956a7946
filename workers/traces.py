"""Truth from a folder of recorded traces: CSV files of `timestamp,value`, one series each.

* **As recorded.** Timestamps off the grid stay there, repeated ones are repeated, gaps are gaps; points come in ascending
  order whatever the file's. The period asked for changes nothing.
* **Final.** A point is there once its timestamp has passed, and never changes (`settled`). No retention applies.
* **All or nothing.** A folder with a bad file is refused, and the message names every bad line that it has room for.

The file's name says which series it is (`series_of`). Timestamps are UTC: ISO 8601 with or without an offset
("2014-02-14 14:30:00"), or whole seconds since the epoch.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ingest.errors import Fatal
from workers.simulated.values import Answer
from workers.world import EMPTY, Metric, Question, Truth

ACCOUNT: Final = "123456789012"
REGION: Final = "us-east-1"

_COMPLAINTS_SHOWN_MAX: Final = 50

_KNOWN: Final = (
    # File name's start; namespace, metric, dimension, the value's prefix, unit, statistic.
    ("ec2_cpu_utilization_", "AWS/EC2", "CPUUtilization", "InstanceId", "i-", "Percent", "Average"),
    ("ec2_disk_write_bytes_", "AWS/EC2", "DiskWriteBytes", "InstanceId", "i-", "Bytes", "Average"),
    ("ec2_network_in_", "AWS/EC2", "NetworkIn", "InstanceId", "i-", "Bytes", "Average"),
    ("rds_cpu_utilization_", "AWS/RDS", "CPUUtilization", "DBInstanceIdentifier", "", "Percent", "Average"),
    ("elb_request_count_", "AWS/ELB", "RequestCount", "LoadBalancerName", "", "Count", "Sum"),
)


def series_of(name: str) -> tuple[Metric, str]:
    """The metric and the statistic that a file's name (without its ending) stands for.

    `ec2_cpu_utilization_24ae8d` is AWS/EC2's CPUUtilization of InstanceId i-24ae8d, Average; a name that says nothing is a
    metric of that name in the namespace Traces, without dimensions, Average.
    """
    for start, namespace, metric, dimension, prefix, unit, stat in _KNOWN:
        if name.startswith(start) and len(name) > len(start):
            value = prefix + name.removeprefix(start)
            return Metric(namespace, metric, ((dimension, value),), unit), stat
    return Metric("Traces", name, (), "None"), "Average"


@dataclass(frozen=True, slots=True)
class _Trace:
    metric: Metric
    stat: str
    times_s: list[int]
    values: list[float]


class TraceWorld(Truth):
    """A folder of traces as one account's metrics in one region; a `workers.world.Truth`.

    Raises Fatal, with file, line and what, where the folder or a file in it cannot be used.
    """

    ages = False
    settled = True
    """No point ever changes."""

    def __init__(self, folder: Path, account: str = ACCOUNT, region: str = REGION) -> None:
        complaints: list[str] = []
        if not folder.is_dir():
            raise Fatal(f"traces {folder}", "is no folder", "name one that has CSV files in it")
        traces = [_read(path, complaints) for path in sorted(folder.glob("*.csv"))]
        if not traces:
            complaints.append("there is no *.csv in it")
        if complaints:
            shown = complaints[:_COMPLAINTS_SHOWN_MAX]
            more = len(complaints) - len(shown)
            raise Fatal(
                f"traces {folder}",
                "; ".join(shown) + (f"; and {more} more" if more else ""),
                "each file is a header `timestamp,value` and a line a point",
            )
        self.accounts = (account,)
        self.regions = (region,)
        self.start_s = min(t.times_s[0] for t in traces)
        """The first timestamp of all."""
        self.end_s = max(t.times_s[-1] for t in traces) + 1
        """Just after the last timestamp: all points are in [start_s, end_s)."""
        self._traces = {t.metric[:3]: t for t in traces}
        self._metrics = tuple(t.metric for t in traces)

    def metrics(self, account: str, region: str) -> Sequence[Metric]:
        return self._metrics if (account, region) == (self.accounts[0], self.regions[0]) else ()

    def listed(self, account: str, region: str, asked_at_s: int, recently_active: bool) -> Sequence[Metric]:
        """All metrics, or those with a point in the last three hours."""
        metrics = self.metrics(account, region)
        if not recently_active:
            return metrics
        return [m for m in metrics if self._cut(self._traces[m[:3]], asked_at_s - 3 * 3600, asked_at_s)[0]]

    def answers(
        self,
        account: str,
        region: str,
        questions: Sequence[Question],
        start_s: int,
        end_s: int,
        asked_at_s: int,
    ) -> list[Answer]:
        """The file's points in [start_s, end_s) before `asked_at_s`, for its own statistic only."""
        if (account, region) != (self.accounts[0], self.regions[0]):
            return [EMPTY] * len(questions)
        answers: list[Answer] = []
        for q in questions:
            trace = self._traces.get((q.namespace, q.metric, q.dimensions))
            if trace is None or q.stat != trace.stat or (q.unit and q.unit != trace.metric.unit):
                answers.append(EMPTY)
            else:
                answers.append(self._cut(trace, start_s, min(end_s, asked_at_s)))
        return answers

    @staticmethod
    def _cut(trace: _Trace, start_s: int, end_s: int) -> Answer:
        first, last = bisect_left(trace.times_s, start_s), bisect_left(trace.times_s, end_s)
        return trace.times_s[first:last], trace.values[first:last]


def _read(path: Path, complaints: list[str]) -> _Trace:
    """One file, in ascending order; what is wrong with it is appended to `complaints`."""
    metric, stat = series_of(path.stem)
    points: list[tuple[int, float]] = []
    before = len(complaints)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = [cell.strip() for cell in next(rows, [])]
            if header != ["timestamp", "value"]:
                complaints.append(f"{path.name}:1: the header is {','.join(header)!r}, not 'timestamp,value'")
                return _Trace(metric, stat, [0], [0.0])
            for row in rows:
                try:
                    if row:
                        points.append(_point(row))
                except ValueError as e:
                    complaints.append(f"{path.name}:{rows.line_num}: {e}")
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        complaints.append(f"{path.name}: {e}")
    if not points:
        if len(complaints) == before:
            complaints.append(f"{path.name}: there are no points in it")
        points = [(0, 0.0)]
    points.sort(key=lambda point: point[0])  # Stable: repeated timestamps keep the file's order.
    return _Trace(metric, stat, [t for t, _ in points], [v for _, v in points])


def _point(row: list[str]) -> tuple[int, float]:
    if len(row) != 2:
        raise ValueError(f"{len(row)} fields, not 2")
    text, number = row[0].strip(), row[1].strip()
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"the value {number!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"the value {number!r} is not finite")
    if text.isdecimal() and len(text) > 8:  # Shorter, and it could be a date: 20140214.
        return int(text), value
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"the timestamp {text!r} is not ISO 8601 or seconds since the epoch") from None
    if time.microsecond:
        raise ValueError(f"the timestamp {text!r} is not a whole second")
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()), value
