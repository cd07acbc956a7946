"""YACE's jobs → accounts and services of Headgate, and the file that says them. Pure.

* **One service a (namespace, period) in each account and region.** The ledger keeps the series of two services apart by namespace, period and
  metric only, so jobs that meet there are one service; whose metrics each of them means, its `only` says.
* **Nothing is left out** of what the jobs ask for, and nothing is added but what a note names (statistics that two jobs ask for
  different resources of one metric).
* **Services that say the same are one**, whatever accounts they are of; one that is asked for in some of an account's regions says which.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Final

from shard_config.known import shipped_services
from shard_config.model import DATAPOINTS_PER_CALL_MAX, MetricProfile, ServiceProfile, retention_s
from shard_config.yace_facts import facts, literally
from shard_config.yace_jobs import Job, Note, Pick, Reading, Role, Wanted

POLL_S: Final = 300
"""YACE's own scraping interval, unless its command line says otherwise."""
ANY: Final = Pick()
_STATISTICS: Final = ("Average", "Sum", "Minimum", "Maximum", "SampleCount")


@dataclass(frozen=True, slots=True)
class Choice:
    """A `Selection`: these metrics (empty: all of the service's), picked so."""

    metrics: tuple[str, ...]
    pick: Pick


@dataclass(frozen=True, slots=True)
class Service:
    """What is asked for; `lines` are of the jobs that it is from, and `name` is given last."""

    namespace: str
    period_s: int
    settling_s: int
    recently_active: bool
    metrics: tuple[tuple[str, tuple[str, ...]], ...]
    only: tuple[Choice, ...]
    regions: tuple[str, ...] = ()

    @property
    def poll_interval_s(self) -> int:
        """YACE's interval, or the least multiple of the period above it."""
        return -(-POLL_S // self.period_s) * self.period_s


@dataclass(frozen=True, slots=True)
class AccountPlan:
    id: str
    role: Role
    regions: tuple[str, ...]
    services: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole of it: services by name, with the lines of the jobs that each is from."""

    file: str
    accounts: tuple[AccountPlan, ...]
    services: Mapping[str, Service]
    lines: Mapping[str, tuple[int, ...]]
    notes: tuple[Note, ...]


def plan_of(reading: Reading) -> Plan:
    """What the jobs ask for, as accounts and services."""
    notes = list(reading.notes)
    jobs_of: dict[str, list[tuple[Job, Role]]] = {}
    for job in reading.jobs:
        for role in job.roles:
            jobs_of.setdefault(role.account, []).append((job, role))
    names = _Names()
    accounts = []
    for account, jobs in jobs_of.items():
        regions = tuple(dict.fromkeys(region for job, _ in jobs for region in job.regions))
        role = _role_of(jobs, notes)
        services = _services([job for job, _ in jobs], regions, notes)
        named = tuple(names.of(service, lines) for service, lines in services.items())
        accounts.append(AccountPlan(account, role, regions, named))
    return Plan(reading.file, tuple(accounts), names.services, names.lines, tuple(notes))


def _role_of(jobs: Sequence[tuple[Job, Role]], notes: list[Note]) -> Role:
    """An account has one role here: the first."""
    first = jobs[0][1]
    for job, role in jobs:
        if role.arn != first.arn:
            what = f"account {role.account} is entered by {role.arn or 'the ambient credentials'} here, and by {first.arn or 'them'} before"
            notes.append(Note(job.line, what, "an account has one role: it needs the rights of both"))
        elif role.external_id != first.external_id:
            notes.append(
                Note(
                    job.line,
                    f"account {role.account} has another externalId before",
                    "the first one is used: is it right?",
                )
            )
    return first


# --- services -------------------------------------------------------------------------------------------------

_Asked = dict[str, list[tuple[Job, Wanted]]]
"""By metric's name, who asks for it."""


def _services(
    jobs: Sequence[Job], regions: Sequence[str], notes: list[Note]
) -> dict[Service, tuple[int, ...]]:
    """The services of one account, and the lines of their jobs."""
    in_regions: dict[Service, list[str]] = {}
    lines: dict[Service, set[int]] = {}
    for region in regions:
        groups: dict[tuple[str, int], _Asked] = {}
        for job in jobs:
            for wanted in job.metrics if region in job.regions else ():
                asked = groups.setdefault((job.namespace, wanted.period_s), {})
                asked.setdefault(wanted.name, []).append((job, wanted))
        for (namespace, period_s), asked in groups.items():
            service = _service(namespace, period_s, asked, notes)
            in_regions.setdefault(service, []).append(region)
            lines.setdefault(service, set()).update(job.line for them in asked.values() for job, _ in them)
    found = {}
    for service, where in in_regions.items():
        whole = len(where) == len(regions)
        found[replace(service, regions=() if whole else tuple(sorted(where)))] = tuple(sorted(lines[service]))
    return found


def _service(namespace: str, period_s: int, asked: _Asked, notes: list[Note]) -> Service:
    picks = {name: {pick for job, _ in them for pick in job.picks} for name, them in asked.items()}
    for name, them in asked.items():
        if ANY in picks[name]:
            picks[name] = {ANY}
        if len({wanted.statistics for _, wanted in them}) > 1 and len({job.picks for job, _ in them}) > 1:
            at = ", ".join(str(line) for line in sorted({job.line for job, _ in them}))
            what = f"the jobs at lines {at} ask different statistics of {namespace} {name} of different resources"
            notes.append(
                Note(them[0][0].line, what, "Headgate asks all of them of all: more metrics are billed")
            )
    metrics = tuple(
        (name, _ordered(s for _, wanted in them for s in wanted.statistics))
        for name, them in sorted(asked.items())
    )
    demands = [pair for them in asked.values() for pair in them]
    return Service(
        namespace=namespace,
        period_s=period_s,
        settling_s=_settling_s(namespace, period_s, demands, notes),
        recently_active=all(job.recently_active for job, _ in demands),
        metrics=metrics,
        only=_only(picks),
    )


def _ordered(statistics: Iterable[str]) -> tuple[str, ...]:
    found = set(statistics)
    return (*(s for s in _STATISTICS if s in found), *sorted(found - set(_STATISTICS)))


def _only(picks: Mapping[str, set[Pick]]) -> tuple[Choice, ...]:
    if all(of_metric == {ANY} for of_metric in picks.values()):
        return ()
    metrics: dict[Pick, list[str]] = {}
    for name in sorted(picks):
        for pick in picks[name]:
            metrics.setdefault(pick, []).append(name)
    choices = [
        Choice(() if len(names) == len(picks) else tuple(names), pick) for pick, names in metrics.items()
    ]
    return tuple(sorted(choices, key=repr))


def _settling_s(
    namespace: str, period_s: int, demands: Sequence[tuple[Job, Wanted]], notes: list[Note]
) -> int:
    """The longest of what YACE waits and looks back, and of what Headgate knows of the namespace; as far as one call reaches.

    YACE asks for [now - delay - length, now - delay): a point that is later than that it never sees.
    """
    shipped = [p.settling_s for p in shipped_services().values() if p.namespace == namespace]
    waits_s = max(wanted.delay_s + wanted.length_s - period_s for _, wanted in demands)
    poll_s = -(-POLL_S // period_s) * period_s
    most_s = min(retention_s(period_s), DATAPOINTS_PER_CALL_MAX * period_s) - poll_s
    if waits_s > most_s:
        line = demands[0][0].line
        notes.append(
            Note(
                line,
                f"delay and length reach back {waits_s} s",
                f"at a period of {period_s} s Headgate reads {most_s} s again at most",
            )
        )
    return max(0, min(max([waits_s, *shipped]) if shipped else max(waits_s, 600), most_s))


class _Names:
    """A name for each service that differs: the shipped profile's, YACE's alias or the namespace, and a number from the second on."""

    def __init__(self) -> None:
        self.services: dict[str, Service] = {}
        self.lines: dict[str, tuple[int, ...]] = {}
        self._by_service: dict[Service, str] = {}

    def of(self, service: Service, lines: tuple[int, ...]) -> str:
        name = self._by_service.get(service) or self._new(_stem(service.namespace))
        self._by_service[service] = name
        self.services[name] = service
        self.lines[name] = tuple(sorted({*self.lines.get(name, ()), *lines}))
        return name

    def _new(self, stem: str) -> str:
        """The stem, or the first stem-2, stem-3, … that is free, and no shipped profile of something else."""
        if stem not in self.services:
            return stem
        taken = {*self.services, *shipped_services()}
        return next(name for n in count(2) if (name := f"{stem}-{n}") not in taken)


def _stem(namespace: str) -> str:
    shipped = next((p.service for p in shipped_services().values() if p.namespace == namespace), "")
    text = shipped or facts().aliases.get(namespace, namespace.removeprefix("AWS/"))
    slug = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower()).strip("-")[:50]
    # A namespace of the user's own may be called like a profile that is shipped for another one.
    return slug if slug and (shipped or slug not in shipped_services()) else f"{slug or 'service'}-custom"


# --- the file -------------------------------------------------------------------------------------------------


def render(plan: Plan, write: Sequence[str] = (), named: Collection[str] = ()) -> str:
    """headgate.yaml: what the jobs ask for, with a comment on where each service is from.

    `write` are the lines of `remote_write`, where there is one (`yace_series`), and `named` the services whose series it names after resources.
    """
    template = _template(plan.accounts)
    lines = [
        f"# From {plan.file}, a configuration of YACE. `headgate check` says what it collects, `headgate quote --config` what that costs",
        "# a month, and `headgate preflight --config` whether every account allows it: ask all three before the first start.",
        "",
    ]
    if template:
        lines += ["aws:", f"  role_template: {yaml_text(template)}", ""]
    lines.append("accounts:")
    for account in plan.accounts:
        lines += [f"  - id: {yaml_text(account.id)}"]
        lines += [
            f"    regions: {yaml_list(account.regions)}",
            f"    services: {yaml_list(account.services)}",
        ]
        if account.role.arn and not template:
            lines.append(f"    role_arn: {yaml_text(account.role.arn)}")
        if account.role.external_id:
            lines.append(
                f"    external_id: {yaml_text(account.role.external_id)} # or {{env: NAME}}, {{file: PATH}}"
            )
    lines += ["", "services:"]
    for name, service in plan.services.items():
        lines += _service_lines(name, service, plan.lines[name], name in named)
    if write:
        lines += ["", *write]
    return "\n".join(lines) + "\n"


def _template(accounts: Sequence[AccountPlan]) -> str:
    """The role template that fits every account; empty where none does, or where there is one account only."""
    templates = {a.role.arn.replace(f"::{a.id}:", "::{account}:") for a in accounts}
    return templates.pop() if len(templates) == 1 and len(accounts) > 1 else ""


def _service_lines(name: str, service: Service, jobs: tuple[int, ...], named: bool) -> list[str]:
    shipped = shipped_services().get(name)
    at = ", ".join(str(line) for line in jobs[:12]) + (
        f" and {len(jobs) - 12} more" if len(jobs) > 12 else ""
    )
    lines = [f"  {name}: # the jobs at {'line' if len(jobs) == 1 else 'lines'} {at}"]
    add = lines.append
    like = next((p for p in shipped_services().values() if p.namespace == service.namespace), None)
    if shipped is None:
        add(f"    namespace: {yaml_text(service.namespace)}")
        if (
            like is not None
            and like.discovery_interval_s != ServiceProfile.model_fields["discovery_interval_s"].default
        ):
            add(f"    discovery_interval_s: {like.discovery_interval_s}")
    if service.regions:
        add(f"    regions: {yaml_list(service.regions)}")
    add(f"    period_s: {service.period_s}")
    add(f"    poll_interval_s: {service.poll_interval_s}")
    add(f"    settling_s: {service.settling_s}")
    if service.recently_active or (shipped is not None and shipped.recently_active):
        add(f"    recently_active: {str(service.recently_active).lower()}")
    if service.only:
        add("    only:")
        lines.extend(f"      - {_choice(choice)}" for choice in service.only)
    resources = facts().resources.get(service.namespace)
    tagged = any(choice.pick.tags for choice in service.only)
    if (tagged or named) and resources is not None and (shipped is None or shipped.resources is None):
        add(f"    resources: {{types: {yaml_list(resources.types)}, arns: {yaml_list(resources.arns)}}}")
    add("    metrics:")
    known = {m.name: m for m in like.metrics} if like is not None and like.metrics != "all" else {}
    lines.extend(f"      - {_metric(metric, statistics, known)}" for metric, statistics in service.metrics)
    return lines


def _metric(name: str, statistics: tuple[str, ...], known: Mapping[str, MetricProfile]) -> str:
    text = f"name: {yaml_text(name)}, statistics: {yaml_list(statistics)}"
    like = known.get(name)
    if like is not None and like.unit:
        text += f", unit: {yaml_text(like.unit)}"
    # Ranges hold for the shipped statistics: a Sum of percentages knows none.
    if like is not None and set(statistics) <= set(like.statistics):
        bounds = (("min", like.min), ("max", like.max))
        text += "".join(f", {key}: {value:g}" for key, value in bounds if value is not None)
    return f"{{{text}}}"


def _choice(choice: Choice) -> str:
    parts = []
    if choice.metrics:
        parts.append(f"metrics: {yaml_list(literally(name) for name in choice.metrics)}")
    if choice.pick.dimensions:
        parts.append(f"dimensions: {yaml_map(choice.pick.dimensions)}")
    if choice.pick.dimension_names is not None:
        parts.append(f"dimension_names: {yaml_list(choice.pick.dimension_names)}")
    if choice.pick.tags:
        parts.append(f"tags: {yaml_map(choice.pick.tags)}")
    return f"{{{', '.join(parts)}}}"


def yaml_map(pairs: Iterable[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{yaml_text(key)}: {yaml_text(value)}" for key, value in pairs) + "}"


def yaml_list(texts: Iterable[str]) -> str:
    return "[" + ", ".join(yaml_text(text) for text in texts) + "]"


def yaml_text(text: str) -> str:
    """Bare where YAML reads it as this text in any place, else in quotes."""
    plain = text.replace("/", "").replace("-", "").replace("_", "").replace(":", "")
    bare = (
        plain.isascii() and plain.isalnum() and not plain.isdigit() and text[0].isalpha() and ": " not in text
    )
    words = text.lower() in ("null", "true", "false", "yes", "no", "on", "off") or text.endswith(":")
    return text if bare and not words else json.dumps(text, ensure_ascii=False)
