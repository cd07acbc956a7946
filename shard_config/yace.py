"""A configuration of YACE (v1alpha1, as of 0.6x), read: jobs with their meaning, and notes on what Headgate has no word for. Pure.

* **All at once**, as `load`: each error has file, line, what is wrong, and what was probably meant. Keys that YACE would pass over in
  silence are errors: a misspelt searchTags collects, and costs, everything.
* **YACE's own rules**: job values where a metric has none, then a period and a length of 300 s and no delay; a tag's regular expression is
  searched, not matched; all of a job's tags must hold; `dimensionNameRequirements` are exactly those names.
* What is read is `Job`s; `yace_plan` makes accounts and services of them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from pydantic import TypeAdapter, ValidationError

from shard_config.document import ConfigError, ConfigErrors, Node, Path, did_you_mean, parse, render
from shard_config.fields import Statistic
from shard_config.known import known_regions
from shard_config.yace_facts import KEYS, KINDS, SAID, facts, is_of, literally, searched
from shard_config.yace_jobs import Job, Note, Pick, Reading, Role, Wanted

PERIOD_S: Final = 300
LENGTH_S: Final = 300

_ROLE: Final = re.compile(r"arn:aws[a-z-]*:iam::([0-9]{12}):role/.+")
_STATISTIC: Final = TypeAdapter(Statistic)


def read(text: str, file: str, account: str = "") -> Reading:
    """What a YACE configuration means. `account` is that of jobs without a role. Raises ConfigErrors with all that is wrong."""
    return _Reader(file, account).read(text)


class _Reader:
    def __init__(self, file: str, account: str) -> None:
        self._file = file
        self._account = account
        self._errors: list[ConfigError] = []
        self._reading = Reading(file)
        self._without_role: list[int] = []

    def read(self, text: str) -> Reading:
        root = parse(text, self._file, self._errors)
        self._keys(root, "file", ())
        version = root.get("apiVersion")
        if version is None or version.text != "v1alpha1":
            self._error(
                version.line if version else 1,
                ("apiVersion",),
                "only v1alpha1 is known",
                "apiVersion: v1alpha1",
            )
        if (region := root.get("sts-region")) is not None:
            self._note("sts-region", region.line)
        discovery = root.get("discovery") or Node(root.line, {})
        self._keys(discovery, "discovery", ("discovery",))
        self._exported(discovery)
        sections = (("jobs", discovery, ("discovery",)), ("customNamespace", root, ()), ("static", root, ()))
        nodes = [
            (kind, node, (*path, kind, i))
            for kind, holder, path in sections
            for i, node in enumerate(holder.mapping[kind].items if kind in holder.mapping else ())
        ]
        if not nodes:
            self._error(
                1, (), "no job in discovery, static or customNamespace", "there is nothing to collect"
            )
        for kind, node, path in nodes:
            self._job(kind, node, path)
        if self._without_role:
            more = f" (and {len(self._without_role) - 1} more)" if len(self._without_role) > 1 else ""
            what = f"a job without roleArn{more}: whose account this is, the file does not say"
            self._error(self._without_role[0], (), what, "say --account and its 12 digits")
        if self._errors:
            raise ConfigErrors(self._errors)
        self._reading.jobs.sort(key=lambda job: job.line)
        return self._reading

    # --- a job ------------------------------------------------------------------------------------------------

    def _job(self, kind: str, node: Node, path: Path) -> None:
        if not self._keys(node, kind, path):
            return
        for key in ("customTags", "includeContextOnInfoMetrics", "enhancedMetrics", "roundingPeriod"):
            if key in node.keys and node.mapping[key].value:
                self._note(key, node.keys[key])
        namespace = self._namespace(kind, node, path)
        metrics = self._metrics(kind, node, path)
        regions, roles = self._regions(node, path), self._roles(node, path)
        picks = self._picks(kind, node, path, namespace)
        if kind == "static":
            self._note("static", node.line)
        active = node.get("recentlyActiveOnly")
        recently = active is not None and active.value is True
        if metrics:
            named, tags = node.get("name"), self._pairs(node, "customTags", "tag", path)
            name = named.text if kind != "jobs" and named is not None else ""
            custom_tags = tuple((key, value) for key, value, _ in tags)
            self._reading.jobs.append(
                Job(node.line, name, namespace, regions, roles, metrics, picks, recently, custom_tags)
            )

    def _namespace(self, kind: str, node: Node, path: Path) -> str:
        key = "type" if kind == "jobs" else "namespace"
        named = node.get(key)
        if named is None or not named.text:
            self._missing(node, path, key, "as AWS/EC2")
            return ""
        if kind != "jobs":
            return named.text
        known = facts()
        namespace = known.namespace(named.text)
        if not namespace:
            near = did_you_mean(named.text, [*known.aliases, *known.aliases.values()])
            self._error(
                named.line,
                (*path, key),
                f'unknown type "{named.text}"',
                near or "a type of YACE's, as AWS/EC2",
            )
        return namespace

    def _regions(self, node: Node, path: Path) -> tuple[str, ...]:
        listed = node.get("regions")
        if listed is None or not listed.items:
            self._missing(node, path, "regions", "a region is as eu-west-1")
            return ()
        for i, region in enumerate(listed.items):
            if region.text not in known_regions():
                near = did_you_mean(region.text, known_regions()) or "a region is as eu-west-1"
                self._error(region.line, (*path, "regions", i), f'unknown region "{region.text}"', near)
        return tuple(dict.fromkeys(region.text for region in listed.items))

    def _roles(self, node: Node, path: Path) -> tuple[Role, ...]:
        listed = node.get("roles")
        roles = []
        for i, role in enumerate(listed.items if listed and listed.items else [Node(node.line, {})]):
            where = (*path, "roles", i)
            if not self._keys(role, "role", where):
                continue
            arn, external = role.get("roleArn"), role.get("externalId")
            secret = external.text if external is not None else ""
            if arn is None or not arn.text:
                if secret:
                    self._error(role.line, where, "an externalId without a roleArn", "give the role")
                elif not self._account:
                    self._without_role.append(role.line)
                roles.append(Role(self._account, ""))
            elif found := _ROLE.fullmatch(arn.text):
                roles.append(Role(found[1], arn.text, secret))
            else:
                self._error(
                    arn.line,
                    (*where, "roleArn"),
                    f'"{arn.text}" is not a role',
                    "arn:aws:iam::<12 digits>:role/<name>",
                )
        return tuple(dict.fromkeys(roles))

    def _picks(self, kind: str, node: Node, path: Path, namespace: str) -> tuple[Pick, ...]:
        if kind == "static":
            pairs = self._pairs(node, "dimensions", "dimension", path)
            exact = tuple(sorted((name, literally(value)) for name, value, _ in pairs))
            return (Pick(exact, tuple(name for name, _ in exact)),)
        required = node.get("dimensionNameRequirements")
        names = (
            tuple(sorted(n.text for n in required.items)) if required is not None and required.items else None
        )
        tags = []
        for key, value, line in self._pairs(node, "searchTags", "tag", path):
            pattern = searched(value)
            if pattern is None:
                self._error(
                    line,
                    (*path, "searchTags"),
                    f'"{value}" is no regular expression that Python reads',
                    "rewrite it",
                )
            else:
                tags.append((key, pattern))
        if not tags:
            if kind == "jobs" and namespace in facts().resources:
                what = "resources that were never tagged: YACE leaves them out, Headgate collects them"
                self._reading.notes.append(
                    Note(node.line, what, "ask for a tag (`only`, `tags`) where they are not wanted")
                )
            return (Pick(dimension_names=names),)
        return self._tagged(node, namespace, names, tuple(sorted(tags)))

    def _tagged(
        self, node: Node, namespace: str, names: tuple[str, ...] | None, tags: tuple[tuple[str, str], ...]
    ) -> tuple[Pick, ...]:
        """What a job with searchTags means: the metrics of resources with these tags, and those that belong to no resource."""
        known = facts()
        if namespace not in known.resources:
            what = f"searchTags: how metrics of {namespace} belong to its resources is not known here"
            self._reading.notes.append(
                Note(node.line, what, "give the service `resources`; until then nothing of it is collected")
            )
            return (Pick(dimension_names=names, tags=tags),)
        of_resources = [
            {group.replace("_", " ") for group in re.compile(arn).groupindex}
            for arn in known.resources[namespace].arns
        ]
        if names is not None:
            belongs = any(dimensions <= set(names) for dimensions in of_resources)
            return (Pick(dimension_names=names, tags=tags if belongs else ()),)
        aggregates = ((), *known.aggregates.get(namespace, ()))
        listed = ", ".join("+".join(a) or "no dimension at all" for a in aggregates)
        what = f"metrics of no single resource: YACE keeps them beside those with the tags; taken over are those with {listed}"
        self._reading.notes.append(
            Note(node.line, what, "take them out of `only` where they are not wanted, or add others")
        )
        return (Pick(tags=tags), *(Pick(dimension_names=tuple(sorted(a))) for a in aggregates))

    # --- metrics ----------------------------------------------------------------------------------------------

    def _metrics(self, kind: str, node: Node, path: Path) -> tuple[Wanted, ...]:
        listed = node.get("metrics")
        if listed is None or not listed.items:
            if not (node.get("enhancedMetrics") or Node(0, None)).items:
                self._missing(node, path, "metrics", "a job asks for one at least")
            return ()
        found = []
        for i, metric in enumerate(listed.items):
            where = (*path, "metrics", i)
            if self._keys(metric, "metric", where):
                wanted = self._metric(metric, node if kind != "static" else Node(0, {}), where)
                found += [wanted] if wanted is not None else []
        return tuple(found)

    def _metric(self, metric: Node, job: Node, path: Path) -> Wanted | None:
        for key in ("nilToZero", "addCloudwatchTimestamp", "exportAllDataPoints"):
            said = metric.get(key) or job.get(key)
            if said is not None and said.value is True:
                self._note(key, said.line)
        name = metric.get("name")
        if name is None or not name.text:
            self._missing(metric, path, "name", "a metric's name, as CPUUtilization")
            return None
        period_s = self._number(metric, job, "period") or PERIOD_S
        length_s = self._number(metric, job, "length") or LENGTH_S
        if period_s not in (1, 5, 10, 30) and (period_s <= 0 or period_s % 60):
            self._error(
                metric.line,
                path,
                f"a period of {period_s} s",
                "CloudWatch has 1, 5, 10, 30 and multiples of 60 s",
            )
        elif length_s < period_s:
            self._error(
                metric.line,
                path,
                f"length {length_s} is shorter than period {period_s}",
                f"length: {period_s}",
            )
        nil = metric.get("nilToZero") or job.get("nilToZero")
        zero = nil is not None and nil.value is True
        delay_s = self._number(metric, job, "delay")
        wanted = Wanted(name.text, (), period_s, length_s, delay_s, zero)
        return self._with_statistics(metric, job, path, wanted)

    def _with_statistics(self, metric: Node, job: Node, path: Path, wanted: Wanted) -> Wanted | None:
        own, of_job = metric.get("statistics"), job.get("statistics")
        listed = own if own is not None and own.items else of_job
        if listed is None or not listed.items:
            self._error(
                metric.line, path, "no statistics, neither here nor of the job", "statistics: [Average]"
            )
            return None
        kept = []
        for statistic in listed.items:
            try:
                kept.append(_STATISTIC.validate_python(statistic.text))
            except ValidationError:
                what = f"the statistic {statistic.text}: Headgate has Average, Sum, Minimum, Maximum, SampleCount, p99, p99.9, IQM and tm90"
                self._reading.notes.append(Note(statistic.line, what, "choose another, or keep YACE for it"))
        if not kept:
            return None
        return replace(wanted, statistics=tuple(dict.fromkeys(kept)))

    def _number(self, metric: Node, job: Node, key: str) -> int:
        for node in (metric.get(key), job.get(key)):
            if node is not None and isinstance(node.value, int) and node.value:
                return node.value
        return 0

    # --- parts ------------------------------------------------------------------------------------------------

    def _exported(self, discovery: Node) -> None:
        exported = discovery.get("exportedTagsOnMetrics")
        if exported is None or not exported.mapping:
            return
        self._note("exportedTagsOnMetrics", discovery.keys["exportedTagsOnMetrics"])
        for name, tags in exported.mapping.items():
            namespace = facts().namespace(name)
            self._reading.exported_tags[namespace] = tuple(tag.text for tag in tags.items or ())
            if not namespace:
                near = did_you_mean(name, [*facts().aliases, *facts().aliases.values()])
                self._error(
                    exported.keys[name],
                    ("discovery", "exportedTagsOnMetrics"),
                    f'unknown type "{name}"',
                    near,
                )

    def _pairs(self, node: Node, key: str, kind: str, path: Path) -> list[tuple[str, str, int]]:
        """(key or name, value, line) of a list of such mappings."""
        first = next(iter(KEYS[kind]))
        pairs = []
        for i, one in enumerate((node.get(key) or Node(0, [])).items):
            where = (*path, key, i)
            if not self._keys(one, kind, where):
                continue
            named, value = one.get(first), one.get("value")
            if named is None or value is None:
                self._error(
                    one.line, where, f"{first} and value belong together", f"{{{first}: Name, value: x}}"
                )
            else:
                pairs.append((named.text, value.text, one.line))
        return pairs

    def _keys(self, node: Node, kind: str, path: Path) -> bool:
        """Is this a mapping? Its unknown keys, and values of the wrong kind, are errors."""
        if not isinstance(node.value, dict):
            self._error(node.line, path, f"expected a mapping, got {node.describe()}")
            return False
        known = KEYS[kind]
        for key, value in node.mapping.items():
            if key not in known:
                near = did_you_mean(key, known) or f"known are {', '.join(known)}"
                self._error(node.keys[key], path, f'unknown key "{key}"', near)
            elif not is_of(value, known[key]):
                got = value.kind() if key == "externalId" else value.describe()
                self._error(value.line, (*path, key), f"expected {KINDS[known[key]]}, got {got}")
                node.mapping[key] = Node(value.line, None)
        return True

    def _note(self, key: str, line: int) -> None:
        self._reading.notes.append(Note(line, *SAID[key], key))

    def _missing(self, node: Node, path: Path, key: str, suggestion: str) -> None:
        if render((*path, key)) not in {error.path for error in self._errors}:  # else it is there, and wrong
            self._error(node.line, path, f'missing key "{key}"', suggestion)

    def _error(self, line: int, path: Path, what: str, suggestion: str = "") -> None:
        self._errors.append(ConfigError(self._file, line, render(path), what, suggestion))
