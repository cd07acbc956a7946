"""What a configuration of YACE says: jobs with their meaning, and notes on what is otherwise here. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Role:
    """An account and how it is entered; `arn` is empty for the ambient credentials."""

    account: str
    arn: str
    external_id: str = ""


@dataclass(frozen=True, slots=True, order=True)
class Pick:
    """Which metrics of a name: patterns that match the whole text, as `shard_config.model.Selection` has them."""

    dimensions: tuple[tuple[str, str], ...] = ()
    dimension_names: tuple[str, ...] | None = None
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A metric of a job."""

    name: str
    statistics: tuple[str, ...]
    period_s: int
    length_s: int
    delay_s: int
    nil_to_zero: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A discovery, customNamespace or static job. A metric is meant where one of `picks` holds. `name` is that of the latter two."""

    line: int
    name: str
    namespace: str
    regions: tuple[str, ...]
    roles: tuple[Role, ...]
    metrics: tuple[Wanted, ...]
    picks: tuple[Pick, ...]
    recently_active: bool
    custom_tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """Something of YACE's that is otherwise here, or not at all. `key` is the key of YACE's that it is about, where it is about one."""

    line: int
    what: str
    todo: str
    key: str = ""


@dataclass(slots=True)
class Reading:
    """What a file says: `jobs` in the order of the file."""

    file: str
    jobs: list[Job] = field(default_factory=list)
    exported_tags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By namespace, the keys of resource tags that become labels."""
    notes: list[Note] = field(default_factory=list)
