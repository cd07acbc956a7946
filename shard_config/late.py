"""How late the points of a service reach a Prometheus, and what a query has to reach back for. Pure.

A point carries CloudWatch's own time, the start of its period. It is looked at when its window has ended, again until it has settled, and is sent
when it comes (arrived mode, `out_of_order_window_s` above 0) or when it has settled (settled mode). In both modes the last look that may bring
it is the same, so the latest time is the same; they differ in the earliest, and in whether points come one by one or a poll's worth at once.
docs/decisions/0023-late-data-in-prometheus.md has the figures that were measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from shard_config.known import shipped_services
from shard_config.model import Config, ServiceProfile
from shard_config.remote_write import Receiver
from shard_config.series_names import info_name, metric_name

PIPELINE_S: Final = 60
"""Allowed for the look itself, Kafka and the request to the receiver."""
LOOKBACK_S: Final = 300
"""Prometheus' own (--query.lookback-delta): what an instant selector sees."""
HEAD_S: Final = 3600
"""A Prometheus without an out-of-order window takes nothing that is older than this."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Seconds between the time that a point carries and the time that a receiver has it."""

    service: str
    period_s: int
    earliest_s: int
    latest_s: int
    """As of so long ago everything is there: the offset of a query that wants whole data."""
    batched: bool
    """Points come as a poll brings them, several at once as a rule: the newest alone would pass over the others, or be held for too long."""
    refused: str = ""
    """Why receivers will not take its points, and what to set; empty: they do."""

    @property
    def newest_s(self) -> int:
        """The newest point of a series that reports each period is not older than this, in settled mode.

        No more than that: a point that comes once must not be seen for longer than Prometheus looks back on fresh ones.
        """
        return max(self.latest_s, self.earliest_s + self.period_s + PIPELINE_S)


def delay_of(profile: ServiceProfile, receivers: Sequence[Receiver] = ()) -> Delay:
    """Of a service's points, at the slowest of the receivers; without receivers as in settled mode."""
    windows = -(-profile.settling_s // profile.poll_interval_s)
    latest_s = profile.poll_interval_s * (1 + windows) + PIPELINE_S
    arrived = any(r.out_of_order_window_s for r in receivers)
    settled_s = profile.period_s + profile.settling_s
    refused = ""
    for one in receivers or (None,):
        window_s = one.out_of_order_window_s if one else 0
        comes_s = latest_s if window_s else settled_s
        if comes_s > max(window_s, HEAD_S):
            name = f"receiver {one.name}" if one else "a receiver without an out-of-order window"
            refused = (
                f"points come {spoken(comes_s)} late, which {name} refuses: give it an out-of-order window "
                f"(out_of_order_time_window there, out_of_order_window_s here) of {spoken(latest_s + HEAD_S)}"
            )
    return Delay(
        profile.service,
        profile.period_s,
        profile.period_s if arrived else settled_s,
        latest_s,
        arrived,
        refused,
    )


@dataclass(frozen=True, slots=True)
class LateMetric:
    """What is behind a name of YACE's."""

    delay: Delay
    stat: str

    @property
    def summed(self) -> bool:
        """A period's sum or count, not a level."""
        return self.stat in ("Sum", "SampleCount")


class LateNames:
    """Which names of YACE's are series of ours, and how late each comes."""

    def __init__(self, profiles: Iterable[ServiceProfile], receivers: Sequence[Receiver] = ()) -> None:
        self._metrics: dict[str, LateMetric] = {}
        self._namespaces: dict[str, LateMetric] = {}
        self.infos: set[str] = set()
        for profile in profiles:
            delay = delay_of(profile, receivers)
            info = info_name(profile.namespace)
            self.infos.add(info)
            if profile.metrics == "all":
                self._keep(
                    self._namespaces, info.removesuffix("info"), LateMetric(delay, profile.statistics[0])
                )
                continue
            for metric in profile.metrics:
                for stat in metric.statistics:
                    name = metric_name("yace", profile.namespace, metric.name, stat)
                    self._keep(self._metrics, name, LateMetric(delay, stat))

    @staticmethod
    def _keep(found: dict[str, LateMetric], name: str, metric: LateMetric) -> None:
        """Where two services have one name, the later one counts."""
        if name not in found or found[name].delay.latest_s < metric.delay.latest_s:
            found[name] = metric

    def of(self, name: str) -> LateMetric | None:
        """What a name is of; None where no service collects it."""
        if name in self._metrics:
            return self._metrics[name]
        if name in self.infos:
            return None
        return next((m for prefix, m in self._namespaces.items() if name.startswith(prefix)), None)

    def matching(self, pattern: str) -> list[LateMetric]:
        """Of the names that a pattern (anchored, as Prometheus has it) may mean. Raises re.error where Python does not read it."""
        regex = re.compile(pattern)
        found = [metric for name, metric in self._metrics.items() if regex.fullmatch(name)]
        # Which names there are in a namespace of which all is collected is not known: the pattern's plain beginning decides.
        plain = re.match(r"[a-z_0-9]*", pattern)
        start = plain[0] if plain else ""
        return found + [
            m
            for prefix, m in self._namespaces.items()
            if start.startswith(prefix) or prefix.startswith(start)
        ]


def late_names(config: Config | None) -> LateNames:
    """Of what a configuration collects; of all shipped services where there is none."""
    if config is None:
        return LateNames(shipped_services().values())
    collected = {name for account in config.accounts for name in account.services}
    if config.organization is not None:
        collected |= set(config.organization.services)
    receivers = config.remote_write.receivers if config.remote_write else ()
    return LateNames([p for p in config.services if p.service in collected], receivers)


def spoken(seconds: int) -> str:
    """As PromQL writes a duration: 16m, 1h30m, 5d."""
    parts = []
    for unit, length_s in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, length_s)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"
