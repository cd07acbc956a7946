"""Which of the metrics that CloudWatch lists are asked for: metrics, dimensions and the tags of resources. Pure.

Guarantees:

* a metric is taken where the profile names it and one selection holds, all of what it gives (`shard_config.model.Selection`);
* a metric whose resource has no tags, or that belongs to none, is taken wherever no selection asks for tags;
* the order of the series depends on what is listed, not on the order in which AWS lists it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain

import orjson

from ingest.errors import Rejected
from ingest.model import Series, SeriesKey, Target
from ingest.sources.runs import Runs
from ingest.validate import dimensions_problem, text_problem
from shard_config.model import Limits, Resources, Selection, ServiceProfile

NAMES_BYTES_MAX = 512 * 1024 * 1024
"""Of one listing: a million metrics of EC2's have 60 MB, and are compressed."""

Dimensions = tuple[tuple[str, str], ...]
"""Sorted by name."""
Metric = tuple[str, Dimensions]
Tagged = tuple[str, Mapping[str, str]]
"""A resource's ARN and its tags."""


def asks_tags(profile: ServiceProfile) -> bool:
    return any(selection.tags for selection in profile.only)


def tag_keys(profile: ServiceProfile) -> tuple[str, ...]:
    """The keys that every selection asks for, so that AWS may leave out resources without them; sorted."""
    keys = [set(selection.tags) for selection in profile.only]
    return tuple(sorted(set.intersection(*keys))) if keys else ()


class TagIndex:
    """The tags of the resources that metrics belong to.

    A metric belongs to a resource where it has all dimensions that one of `resources.arns` finds in the ARN. A group's name stands
    for a dimension's: Python allows no space in it, so an underscore is one.
    """

    def __init__(self, resources: Resources, tagged: Iterable[Tagged]) -> None:
        patterns = [re.compile(pattern) for pattern in resources.arns]
        self._tags: dict[Dimensions, list[Mapping[str, str]]] = {}
        for arn, tags in tagged:
            for pattern in patterns:
                groups = found.groupdict() if (found := pattern.search(arn)) else {}
                dimensions = tuple(sorted((g.replace("_", " "), v) for g, v in groups.items() if v))
                if dimensions:
                    self._tags.setdefault(dimensions, []).append(tags)
        self._names = {tuple(name for name, _ in dimensions) for dimensions in self._tags}

    def of(self, dimensions: Dimensions) -> Iterator[Mapping[str, str]]:
        """The tags of each tagged resource that a metric with these dimensions belongs to."""
        has = dict(dimensions)
        for names in self._names:
            if all(name in has for name in names):
                yield from self._tags.get(tuple((name, has[name]) for name in names), ())


class Selector:
    """What a profile takes; `tags` may be left out where none of its selections asks for tags."""

    def __init__(self, profile: ServiceProfile, tags: TagIndex | None = None) -> None:
        wanted = None if profile.metrics == "all" else {metric.name: metric for metric in profile.metrics}
        self._profile = profile
        self._metrics = wanted
        self._only = profile.only
        self._tags = tags
        self._named = cache(self._selections_by_name)

    def _selections_by_name(self, name: str) -> tuple[Selection, ...]:
        """The selections that a metric of this name may be meant by."""
        return tuple(s for s in self._only if not s.metrics or any(re.fullmatch(p, name) for p in s.metrics))

    def takes(self, name: str, dimensions: Dimensions) -> bool:
        if self._metrics is not None and name not in self._metrics:
            return False
        return not self._only or any(self._holds(s, dimensions) for s in self._named(name))

    def _holds(self, selection: Selection, dimensions: Dimensions) -> bool:
        has = dict(dimensions)
        if selection.dimension_names is not None and sorted(selection.dimension_names) != sorted(has):
            return False
        if not match(selection.dimensions, has):
            return False
        if not selection.tags:
            return True
        return self._tags is not None and any(
            match(selection.tags, tags) for tags in self._tags.of(dimensions)
        )

    def statistics(self, name: str) -> tuple[str, ...]:
        """Those of a metric that it takes."""
        return self._profile.statistics if self._metrics is None else self._metrics[name].statistics

    def series(self, metrics: Iterable[bytes], target: Target) -> Iterator[Series]:
        """The (metric × statistic) of metrics, each as `key_of`, in their order."""
        profile = self._profile
        for raw in metrics:
            dimensions, name = orjson.loads(raw)
            metric = self._metrics[name] if self._metrics is not None else None
            pairs = tuple([(key, value) for key, value in dimensions])
            for stat in self.statistics(name):
                key = SeriesKey(
                    target.account, target.region, profile.namespace, name, pairs, stat, profile.period_s
                )
                yield Series(key, metric.unit if metric is not None else "")


def match(patterns: Mapping[str, str], has: Mapping[str, str]) -> bool:
    """Whether each key is there, with a value that its pattern matches as a whole."""
    return all(key in has and re.fullmatch(pattern, has[key]) for key, pattern in patterns.items())


def key_of(name: str, dimensions: Dimensions) -> bytes | None:
    """A metric as UTF-8 that sorts by dimensions, then name: a tenth of the memory, and those of one resource lie together.

    None for a text that is not Unicode (half of a surrogate pair), which cannot be written.
    """
    try:
        # Copied, for what orjson 3.13 returns keeps the 4 kB that it was written into.
        return bytes(memoryview(orjson.dumps((dimensions, name))))
    except orjson.JSONEncodeError:
        return None


class Names:
    """The metrics that a listing takes, gathered page by page. `refused` could not travel, and are left out."""

    def __init__(self, selector: Selector, limits: Limits) -> None:
        self._selector = selector
        self._limits = limits
        self._names = Runs()
        self._bytes = 0
        self._series = 0
        self.refused = 0

    def __len__(self) -> int:
        """What AWS lists again much later may count twice (`ingest.sources.runs`), as it does for the caps; it is one series all the same."""
        return len(self._names)

    def add(self, metrics: Iterable[Metric]) -> None:
        """Raises Rejected where all of them together are more than is let in, or than anybody can hold."""
        for name, dimensions in metrics:
            if not self._selector.takes(name, dimensions):
                continue
            key = key_of(name, dimensions) if self._travels(name, dimensions) else None
            if key is None:
                self.refused += 1
            elif self._names.add(key):
                self._bytes += len(key)
                self._series += len(self._selector.statistics(name))
        most = self._limits.series_per_target_max
        if self._series > most:
            what = (
                f"more than {most:,} series: select fewer with `only`, or raise limits.series_per_target_max"
            )
            raise Rejected("aws ListMetrics", "too_many", what)
        if self._bytes > NAMES_BYTES_MAX:
            what = f"the names of {len(self):,} metrics take more than {NAMES_BYTES_MAX >> 20} MB"
            raise Rejected("aws ListMetrics", "too_many", f"{what}: select fewer with `only`")

    def _travels(self, name: str, dimensions: Dimensions) -> bool:
        texts = (name, *chain.from_iterable(dimensions))
        return dimensions_problem(dimensions, self._limits) is None and not any(
            text_problem(text, self._limits) for text in texts
        )

    def series(self, target: Target) -> Iterator[Series]:
        """All series of them, in one order."""
        return self._selector.series(self._names, target)


def series_of(
    metrics: Iterable[Metric], target: Target, profile: ServiceProfile, tags: TagIndex | None = None
) -> list[Series]:
    """The series that a profile asks for, of the metrics that are listed; each once."""
    selector = Selector(profile, tags)
    taken = {key_of(*metric) for metric in metrics if selector.takes(*metric)} - {None}
    return list(selector.series(sorted(key for key in taken if key is not None), target))


def dimensions_of_all(only: Sequence[Selection]) -> tuple[str, ...]:
    """Dimensions that every selection needs, so that ListMetrics may leave out metrics without them; sorted, at most 10."""
    named = [set(s.dimensions) | set(s.dimension_names or ()) for s in only]
    return tuple(sorted(set.intersection(*named)))[:10] if named else ()
