"""YACE's labels and zeros → `remote_write`: exportedTagsOnMetrics, customTags, nilToZero, and what `name` is without a resource. Pure.

YACE says them job by job, Headgate service by service: where jobs that meet in a service differ, all of its series have what one of them asks for,
and a note says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shard_config.known import shipped_services
from shard_config.yace_facts import OF_WRITE, literally
from shard_config.yace_jobs import Job, Note, Reading
from shard_config.yace_plan import Plan, yaml_list, yaml_map, yaml_text


@dataclass(frozen=True, slots=True)
class Tags:
    """`CustomTags`: these labels, of these accounts and services (none: of all)."""

    tags: tuple[tuple[str, str], ...]
    accounts: tuple[str, ...]
    services: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Write:
    """What `remote_write` says beside its receiver. By service: exported tags, patterns of metrics, and `unnamed` where it is not global."""

    exported_tags: Mapping[str, tuple[str, ...]]
    nil_to_zero: Mapping[str, tuple[str, ...]]
    unnamed: Mapping[str, str]
    custom_tags: tuple[Tags, ...]
    named: frozenset[str]
    """Services whose series are named after their resources."""
    notes: tuple[Note, ...]


def write_of(reading: Reading, plan: Plan) -> Write:
    """What jobs ask for beside samples. Its notes take the place of all of the plan's."""
    notes = [note for note in plan.notes if note.key not in OF_WRITE]
    jobs = {
        name: [
            job
            for job in reading.jobs
            if job.line in lines and job.namespace == plan.services[name].namespace
        ]
        for name, lines in plan.lines.items()
    }
    exported = {
        name: reading.exported_tags.get(service.namespace, ()) for name, service in plan.services.items()
    }
    return Write(
        exported_tags={name: tags for name, tags in exported.items() if tags},
        nil_to_zero={name: zeros for name, of in jobs.items() if (zeros := _zeros(name, of, notes))},
        unnamed={name: unnamed for name, of in jobs.items() if (unnamed := _unnamed(name, of, notes))},
        custom_tags=_custom_tags(jobs, plan, notes),
        named=frozenset(name for name, of in jobs.items() if not _unnamed(name, of, [])),
        notes=tuple(notes),
    )


def lines_of(write: Write, url: str, *, snake_case: bool) -> list[str]:
    """`remote_write`, in YAML, with one receiver."""
    lines = [
        "# To Prometheus, under YACE's names. docs/prometheus.md says how alerts have to change, for points come minutes late.",
        "remote_write:",
        "  receivers:",
        f"    - {{name: prometheus, url: {yaml_text(url)}}}",
    ]
    if snake_case:
        lines.append("  snake_case: true")
    services = sorted({*write.exported_tags, *write.nil_to_zero, *write.unnamed})
    if services:
        lines.append("  services:")
    for name in services:
        lines.append(f"    {name}:")
        if name in write.unnamed:
            lines.append(f"      unnamed: {yaml_text(write.unnamed[name])}")
        if name in write.exported_tags:
            lines.append(f"      exported_tags: {yaml_list(write.exported_tags[name])}")
        if name in write.nil_to_zero:
            lines.append(f"      nil_to_zero: {yaml_list(map(literally, write.nil_to_zero[name]))}")
    if write.custom_tags:
        lines.append("  custom_tags:")
    for custom in write.custom_tags:
        of = f"tags: {yaml_map(custom.tags)}"
        of += f", accounts: {yaml_list(custom.accounts)}" if custom.accounts else ""
        of += f", services: {yaml_list(custom.services)}" if custom.services else ""
        lines.append(f"    - {{{of}}}")
    return lines


def _zeros(name: str, jobs: Sequence[Job], notes: list[Note]) -> tuple[str, ...]:
    asked = [(job, wanted) for job in jobs for wanted in job.metrics]
    zeros = {wanted.name for _, wanted in asked if wanted.nil_to_zero}
    others = [job.line for job, wanted in asked if wanted.name in zeros and not wanted.nil_to_zero]
    if others:
        what = f"nilToZero: other jobs ask for metrics of {name} with it, and zeros are of a service's metric"
        notes.append(Note(min(others), what, "they are sent for the series of this job, too", "nilToZero"))
    return tuple(sorted(zeros))


def _unnamed(name: str, jobs: Iterable[Job], notes: list[Note]) -> str:
    """The label `name` of series of customNamespace and static jobs; empty where a discovery job is among them, for YACE says global there."""
    named = {job.name: job.line for job in jobs}
    first = "" if "" in named else min(named, key=lambda job: named[job], default="")
    for other in sorted(named.keys() - {first, ""}):
        what = f"the job's name {other}: its series have the label name={first or 'global'}, as those of {name} all have"
        notes.append(Note(named[other], what, "where a query asks for that name, change it"))
    known = {p.service for p in shipped_services().values() if p.resources is not None}
    if first and name in known:
        what = f"the job's name {first}: {name} has tagged resources, whose series have the ARN as their label name"
        notes.append(Note(named[first], what, "where a query asks for the job's name, take it out"))
    return first


def _custom_tags(jobs: Mapping[str, Sequence[Job]], plan: Plan, notes: list[Note]) -> tuple[Tags, ...]:
    """Each set of tags with the accounts and services of its jobs."""
    found: dict[tuple[tuple[str, str], ...], dict[str, set[str]]] = {}
    for account in plan.accounts:
        for name in account.services:
            mine = [job for job in jobs[name] if any(role.account == account.id for role in job.roles)]
            tags = {tag: job.line for job in mine for tag in job.custom_tags}
            if not tags:
                continue
            found.setdefault(tuple(sorted(tags)), {}).setdefault(name, set()).add(account.id)
            for other in (job for job in mine if set(job.custom_tags) != set(tags)):
                what = f"customTags of another job: they are of all series of {name} in an account"
                notes.append(
                    Note(other.line, what, "give the jobs the same customTags, or drop them", "customTags")
                )
    everywhere = {account.id for account in plan.accounts}
    return tuple(
        Tags(
            tags,
            () if accounts == everywhere else tuple(sorted(accounts)),
            () if services == set(plan.services) else tuple(sorted(services)),
        )
        for tags, by_service in found.items()
        for accounts, services in _alike(by_service)
    )


def _alike(by_service: Mapping[str, set[str]]) -> list[tuple[set[str], set[str]]]:
    """(accounts, services): services of the same accounts together."""
    found: dict[frozenset[str], set[str]] = {}
    for name, accounts in by_service.items():
        found.setdefault(frozenset(accounts), set()).add(name)
    return [(set(accounts), services) for accounts, services in found.items()]
