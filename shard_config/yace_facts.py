"""What YACE knows beside its configuration: types and aliases, how resources belong to metrics, and what a pattern means. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from shard_config.document import ConfigError, ConfigErrors, Node, parse
from shard_config.known import shipped_services
from shard_config.model import Resources


@dataclass(frozen=True, slots=True)
class Facts:
    """`aliases` by namespace, `resources` and `aggregates` of namespaces that have any."""

    aliases: Mapping[str, str]
    resources: Mapping[str, Resources]
    aggregates: Mapping[str, tuple[tuple[str, ...], ...]]

    def namespace(self, kind: str) -> str:
        """The namespace of a type or an alias; empty where there is none."""
        if kind in self.aliases:
            return kind
        return next((namespace for namespace, alias in self.aliases.items() if alias == kind), "")


@cache
def facts() -> Facts:
    """From shard_config/yace.yaml, and from the profiles that Headgate ships."""
    errors: list[ConfigError] = []
    root = parse((resources.files("shard_config") / "yace.yaml").read_text(), "yace.yaml", errors)
    if errors:
        raise ConfigErrors(errors)
    known = {
        name: Resources.model_validate(n.plain()) for name, n in root.mapping["resources"].mapping.items()
    }
    known |= {p.namespace: p.resources for p in shipped_services().values() if p.resources is not None}
    return Facts(
        {name: node.text for name, node in root.mapping["aliases"].mapping.items()},
        known,
        {
            name: tuple(tuple(n.text for n in names.items) for names in node.items)
            for name, node in root.mapping["aggregates"].mapping.items()
        },
    )


# --- the file's keys ------------------------------------------------------------------------------------------

_METRIC: Final = {
    "statistics": list,
    "period": int,
    "length": int,
    "delay": int,
    "nilToZero": bool,
    "addCloudwatchTimestamp": bool,
    "exportAllDataPoints": bool,
}
_COMMON: Final = {"regions": list, "roles": list, "customTags": list, "metrics": list}
_LISTED: Final = {"dimensionNameRequirements": list, "roundingPeriod": int, "recentlyActiveOnly": bool}
KEYS: Final[Mapping[str, Mapping[str, type]]] = {
    "file": {
        "apiVersion": str,
        "sts-region": str,
        "discovery": dict,
        "static": list,
        "customNamespace": list,
    },
    "discovery": {"exportedTagsOnMetrics": dict, "jobs": list},
    "jobs": _COMMON
    | _LISTED
    | _METRIC
    | {"type": str, "searchTags": list, "includeContextOnInfoMetrics": bool, "enhancedMetrics": list},
    "customNamespace": _COMMON | _LISTED | _METRIC | {"name": str, "namespace": str},
    "static": _COMMON | {"name": str, "namespace": str, "dimensions": list},
    "metric": {"name": str} | _METRIC,
    "role": {"roleArn": str, "externalId": str},
    "tag": {"key": str, "value": str},
    "dimension": {"name": str, "value": str},
    "enhanced": {"name": str},
}
KINDS: Final = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "a mapping"}

WRITE: Final = "say --remote-write and the URL of what takes it"
OF_WRITE: Final = ("nilToZero", "customTags", "exportedTagsOnMetrics", "includeContextOnInfoMetrics")
"""Keys that mean something only where samples go to Prometheus: see `shard_config.yace_series`."""
SAID: Final[Mapping[str, tuple[str, str]]] = {
    "nilToZero": ("nilToZero: Headgate stores no zeros of its own; remote write sends them", WRITE),
    "roundingPeriod": ("roundingPeriod: Headgate always asks for whole periods", "nothing to do"),
    "addCloudwatchTimestamp": ("addCloudwatchTimestamp: Headgate always keeps CloudWatch's timestamp", "nothing to do"),
    "exportAllDataPoints": ("exportAllDataPoints: Headgate always keeps every point", "nothing to do"),
    "customTags": ("customTags: labels of remote write", WRITE),
    "exportedTagsOnMetrics": ("exportedTagsOnMetrics: labels of remote write", WRITE),
    "includeContextOnInfoMetrics": ("includeContextOnInfoMetrics: info metrics are remote write's, and have account and region always", WRITE),
    "enhancedMetrics": ("enhancedMetrics: those are no CloudWatch metrics, YACE asks other APIs for them", "keep YACE for these, or leave them"),
    "sts-region": ("sts-region: each account's first region is asked for its credentials", "nothing to do"),
    "static": ("static jobs ask for a metric whether it is listed or not; Headgate asks for it once ListMetrics has it", "nothing to do, unless the metric reports less than once in two weeks"),
}  # fmt: skip


def is_of(node: Node, kind: type) -> bool:
    """Whether a value is of a kind in KEYS; nothing is of any."""
    if node.value is None:
        return True
    if kind is str:
        return not isinstance(node.value, dict | list)
    if kind is int:
        return isinstance(node.value, int) and not isinstance(node.value, bool)
    return isinstance(node.value, kind)


# --- patterns -------------------------------------------------------------------------------------------------

_FLAGS: Final = re.compile(r"\(\?([ims]+)\)")
_GO_ONLY: Final = ("[[:", r"\p", r"\Q", r"\C")


def literally(text: str) -> str:
    """A pattern that matches this text alone."""
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", text)


def searched(pattern: str) -> str | None:
    """A pattern that matches a whole text wherever Go's regular expression is found in it; None where Python does not read that."""
    if any(words in pattern for words in _GO_ONLY):
        return None
    flags = ""
    if found := _FLAGS.match(pattern):
        flags, pattern = found[1], pattern[found.end() :]
    pattern = pattern.replace(r"\z", "$")
    start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    inner = pattern[start : len(pattern) - end]
    if flags or "|" in pattern:  # an anchor belongs to its own branch
        whole = f".*(?{flags}:{pattern}).*"
    elif inner in ("", ".*"):
        whole = inner if start and end else ".*"
    else:
        whole = ("" if start else ".*") + inner + ("" if end else ".*")
    try:
        re.compile(whole)
    except re.error:
        return None
    return whole
