"""What each service of each target weighs in the plan: metrics asked a minute, as the ledger has learned. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ingest.model import Target
from ingest.schedule import Grid

SERIES_ASSUMED = 1.0
"""Of each service, where nothing was learned of any."""


def weights_of(
    grids: Mapping[Target, Sequence[Grid]], series: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """By target and service. `series` are those asked about at a look, by target and service.

    What was not learned is assumed: as the mean of that service elsewhere, else the mean of all. A service that has nothing now weighs
    as one series, for it is asked all the same.
    """
    learned: dict[str, list[float]] = defaultdict(list)
    for services in series.values():
        for service, count in services.items():
            learned[service].append(count)
    everything = [count for counts in learned.values() for count in counts]
    usual = _mean(everything) if everything else SERIES_ASSUMED
    means = {service: _mean(counts) for service, counts in learned.items()}
    nothing: dict[str, float] = {}
    return {
        str(target): {
            g.service: max(1.0, known.get(g.service, means.get(g.service, usual))) * 60 / g.poll_interval_s
            for g in services
        }
        for target, services in grids.items()
        for known in (series.get(str(target), nothing),)
    }


def _mean(counts: Sequence[float]) -> float:
    return math.fsum(counts) / len(counts)
