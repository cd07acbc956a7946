"""`headgate import rules`: rules made for fresh points, changed for points that come late; and `headgate rules`: recording rules of a configuration."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ingest.errors import HeadgateError
from shard_config.document import SIZE_BYTES_MAX, ConfigError, ConfigErrors
from shard_config.late import LateNames, late_names, spoken
from shard_config.load import load
from shard_config.model import Config
from shard_config.promql import Edit, NotMigrated, Rewritten, rewrite
from shard_config.recording import recordings_of, render
from shard_config.remote_write import RemoteWrite
from shard_config.rule_files import CannotPlace, Rule, rules_of, with_changes
from shard_config.series_names import tag_label

_NAMES = re.compile(r"\b(?:aws|yace)_[a-z0-9_]+")
_TAGS = re.compile(r"\btag_[a-zA-Z0-9_]+")
_DIMENSIONS = re.compile(r"\bdimension_[A-Z][a-zA-Z0-9_]*")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rule. `verdict`: migrated, unchanged or refused; `what` says how and why."""

    file: str
    line: int
    group: str
    rule: str
    verdict: str
    what: str
    before: str
    after: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.file}:{self.line}: {self.rule}: {self.what}"]
        return "\n".join(
            lines + [f"{self.file}:{self.line}: {self.rule}: look at this: {note}" for note in self.notes]
        )


def migrated(
    text: str, file: str, names: LateNames, write: RemoteWrite | None = None
) -> tuple[str, list[Outcome]]:
    """A rule file for late points, and what became of each rule that asks for our series. Raises ConfigErrors for what is no rule file.

    With `write` labels are looked at, too: those that our series will not have are noted.
    """
    outcomes: list[Outcome] = []
    changes: list[tuple[Rule, str, Sequence[Edit]]] = []
    for rule in rules_of(text, file):
        done = _one(rule, text, file, names)
        if isinstance(done, Rewritten):
            changes.append((rule, done.text, done.edits))
            notes = (*done.notes, *_missing_labels(rule, done, write))
            outcomes.append(_outcome(file, rule, "migrated", _how(rule, done), done.text, notes))
        elif done is not None:
            outcomes.append(done)
    return with_changes(text, changes), outcomes


def _one(rule: Rule, text: str, file: str, names: LateNames) -> Rewritten | Outcome | None:
    """How a rule is changed; else why not; None where it has nothing to do with us."""
    try:
        if words := [w for said in rule.said if "query" in said for w in _NAMES.findall(said) if names.of(w)]:
            raise NotMigrated(
                f"a template of its labels or annotations asks for {words[0]}: change that query by hand"
            )
        done = rewrite(rule.expr, names)
        if done.edits and rule.query_offset:
            raise NotMigrated(
                f"its group has query_offset {rule.query_offset}: {spoken(done.by_s)} there is all that is needed"
            )
        if done.edits:
            with_changes(text, [(rule, done.text, done.edits)])
    except NotMigrated as error:
        return _outcome(file, rule, "refused", f"not migrated: {error}", rule.expr)
    except CannotPlace as error:
        return _outcome(file, rule, "refused", f"not migrated: {error}; write it in quotes", rule.expr)
    if done.edits:
        return done
    unknown = sorted({w for w in _NAMES.findall(rule.expr) if w not in names.infos and names.of(w) is None})
    if unknown:
        what = f"left alone: no service here has {', '.join(unknown)}"
        return _outcome(file, rule, "unchanged", what, rule.expr)
    return (
        _outcome(file, rule, "unchanged", f"left alone: {done.notes[0]}", rule.expr) if done.notes else None
    )


def _outcome(
    file: str, rule: Rule, verdict: str, what: str, after: str, notes: tuple[str, ...] = ()
) -> Outcome:
    name = f"{rule.kind} {rule.name}"
    return Outcome(file, rule.line, rule.group, name, verdict, what, rule.expr, after, notes)


def _missing_labels(rule: Rule, done: Rewritten, write: RemoteWrite | None) -> Iterator[str]:
    """Labels that a rule asks for, or its texts name, and that our series are not sent with."""
    if write is None:
        return
    exported = {
        tag_label(key, write.snake_case)
        for service in done.services
        if service in write.services
        for key in write.services[service].exported_tags
    }
    text = " ".join((rule.expr, *rule.said))
    # A join with aws_..._info has all tags.
    if "_info" not in rule.expr and (missing := sorted(set(_TAGS.findall(text)) - exported)):
        yield f"{', '.join(missing)}: not among exported_tags of {', '.join(done.services)} (remote_write.services)"
    if write.snake_case and (plain := sorted(set(_DIMENSIONS.findall(text)))):
        yield f"{', '.join(plain)}: labels are in snake case (remote_write.snake_case)"


def _how(rule: Rule, done: Rewritten) -> str:
    """What was changed, why, and what it means."""
    late = f"points of {', '.join(done.services)} come {spoken(done.earliest_s)} to {spoken(done.latest_s)} after the time that they carry"
    alert = rule.kind == "alert"
    if done.how == "newest":
        means = (
            f"it fires {spoken(done.earliest_s)} to {spoken(done.by_s)} after what it fires for, and a series that ends is seen until {spoken(done.by_s)} after its last point"
            if alert
            else f"its values are those of {spoken(done.earliest_s)} to {spoken(done.by_s)} before"
        )
        return f"asks for the newest point of the last {spoken(done.by_s)}, because {late}; {means}"
    means = (
        f"it fires {spoken(done.by_s)} later than on fresh points, and for the same"
        if alert
        else f"its values are those of {spoken(done.by_s)} before"
    )
    return f"asks as of {spoken(done.by_s)} ago, when all is there, because {late}; {means}"


# --- the commands ---------------------------------------------------------------------------------------------


def register_import(others: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """As a part of `headgate import`."""
    parser = others.add_parser(
        "rules",
        help="Prometheus rules that were made for YACE's series",
        description="Reads a file of Prometheus rules (or PrometheusRules of its operator) and changes what asks for YACE's series: our points carry "
        "CloudWatch's own time and come minutes late, so that a plain selector, which looks back 5 minutes, sees none. Comments and all else stay as "
        "they are. Each change is explained: why, and how much later an alert fires. Exit code 1 where a rule cannot be migrated: it is left as "
        "it is, with line and reason. Without --config all shipped services count, sent when they have settled.",
    )
    parser.add_argument("file", type=Path, help="rules.yml")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="headgate.yaml: its services, settling times and receivers",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write there, where nothing is yet (default: stdout)"
    )
    parser.add_argument(
        "--format",
        choices=("text", "json"),
        default="text",
        help="of the explanation (on stdout with --out, else on stderr)",
    )
    parser.set_defaults(run=run_import)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "rules",
        help="recording rules for Prometheus: the aggregates that dashboards ask for",
        description="Prints recording rules, generated from the service profiles: per account, region and metric the sum, average, minimum or maximum over "
        "resources, as fits the statistic, as of a time at which all points are there. Without --config those of all shipped services, as the chart has them.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="headgate.yaml: its services and names")
    parser.add_argument(
        "--format",
        choices=("prometheus", "prometheusrule"),
        default="prometheus",
        help="a rule file, or a PrometheusRule of the operator",
    )
    parser.set_defaults(run=run)


def _config(path: Path | None) -> Config | None:
    return None if path is None else load(path, environ=os.environ)


def run_import(args: argparse.Namespace) -> int:
    config = _config(args.config)
    if config is not None and config.remote_write is not None and config.remote_write.names != "yace":
        raise ConfigErrors([ConfigError(
            str(args.config), 0, "remote_write.names", f"is {config.remote_write.names}: there are no series of YACE's names", "names: yace"
        )])  # fmt: skip
    text = read_text(args.file)
    write = config.remote_write if config else None
    after, outcomes = migrated(text, str(args.file), late_names(config), write)
    told = sys.stderr if args.out is None else sys.stdout
    if args.format == "json":
        print(json.dumps([asdict(one) for one in outcomes], indent=2), file=told)
    else:
        count = {v: sum(one.verdict == v for one in outcomes) for v in ("migrated", "unchanged", "refused")}
        print(
            f"{args.file}: {count['migrated']} rules migrated, {count['refused']} not. Rules that ask for other series stay as they are.",
            *outcomes, sep="\n", file=told,
        )  # fmt: skip
    write_new(args.out, after)
    return 1 if any(one.verdict == "refused" for one in outcomes) else 0


def run(args: argparse.Namespace) -> int:
    config = _config(args.config)
    print(render(recordings_of(config), args.format), end="")
    return 0


def read_text(path: Path) -> str:
    """A file that somebody wrote for another program. Raises ConfigErrors."""
    try:
        with path.open("rb") as file:
            return file.read(SIZE_BYTES_MAX + 1).decode()
    except OSError as error:
        raise ConfigErrors([ConfigError(str(path), 0, "", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigErrors([ConfigError(str(path), 0, "", "not UTF-8 text")]) from error


def write_new(out: Path | None, text: str) -> None:
    """To a file where nothing is yet, or to stdout. Raises HeadgateError."""
    if out is None:
        print(text, end="")
        return
    try:
        with out.open("x", newline="") as file:
            file.write(text)
    except OSError as error:
        raise HeadgateError(
            str(out), f"cannot be written: {error.strerror}", "choose another --out"
        ) from error
