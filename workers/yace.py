"""`headgate import yace`: a configuration of YACE's as one of ours, and what of it has no equivalent."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from shard_config.document import ConfigError, ConfigErrors
from shard_config.load import loads
from shard_config.yace import read
from shard_config.yace_jobs import Note
from shard_config.yace_plan import Plan, plan_of, render
from shard_config.yace_series import lines_of, write_of
from workers.rules import read_text, register_import, write_new

LINES_MAX = 8
"""Lines of the file that a note names."""


def translated(
    path: Path, account: str, write_url: str = "", *, snake_case: bool = False
) -> tuple[Plan, str]:
    """The plan and our file, with `remote_write` where there is a URL for it. Raises ConfigErrors for a file that YACE would not take, or that we cannot read."""
    reading = read(read_text(path), str(path), account)
    plan = plan_of(reading)
    if write_url:
        write = write_of(reading, plan)
        plan = replace(plan, notes=write.notes)
        written = render(plan, lines_of(write, write_url, snake_case=snake_case), write.named)
    else:
        written = render(plan)
    loads(written, f"translation of {path}", environ={})  # what is written loads
    return plan, written


def merged(notes: Iterable[Note]) -> list[tuple[str, str, list[int]]]:
    """(what, what to do, lines): equal notes once, in the order of their first line."""
    found: dict[tuple[str, str], list[int]] = {}
    for note in sorted(notes, key=lambda n: n.line):
        lines = found.setdefault((note.what, note.todo), [])
        if note.line not in lines:
            lines.append(note.line)
    return [(what, todo, lines) for (what, todo), lines in found.items()]


def report(plan: Plan) -> list[str]:
    """What was made of it, and a line for each thing that is otherwise: file:line, what, what to do."""
    targets = sum(len(account.regions) for account in plan.accounts)
    lines = [
        f"{plan.file}: {len(plan.accounts)} accounts, {targets} targets, {len(plan.services)} services. Not the same here:"
    ]
    for what, todo, at in merged(plan.notes):
        more = f" (also at {', '.join(str(n) for n in at[1:LINES_MAX])}" if len(at) > 1 else ""
        more += f" and {len(at) - LINES_MAX} more" if len(at) > LINES_MAX else ""
        lines.append(f"{plan.file}:{at[0]}: {what}; {todo}{more + ')' if more else ''}")
    if not plan.notes:
        lines[0] = lines[0].replace("Not the same here:", "All of it means the same here.")
    return lines


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import",
        help="the configuration of another exporter as one of Headgate, and Prometheus rules made for it",
        description="Reads the configuration of another exporter, or rules that were made for it, and writes one for Headgate with the same meaning.",
    )
    others = parser.add_subparsers(title="of what", metavar="WHAT", required=True)
    yace = others.add_parser(
        "yace",
        help="yet-another-cloudwatch-exporter's config.yml",
        description="Reads a configuration of YACE 0.6x (apiVersion v1alpha1: discovery, customNamespace and static jobs) and writes headgate.yaml with "
        "the same meaning, commented. What has no equivalent is listed on stderr, each with file and line and what to do. A file that YACE "
        "would misread is refused with all that is wrong with it (exit code 2).",
    )
    yace.add_argument("file", type=Path, help="YACE's config.yml")
    yace.add_argument(
        "--out", type=Path, metavar="FILE", help="write there, where nothing is yet (default: stdout)"
    )
    yace.add_argument(
        "--account",
        default="",
        metavar="ID",
        help="whose account jobs without a roleArn are of: its 12 digits",
    )
    yace.add_argument(
        "--remote-write",
        default="",
        metavar="URL",
        help="send samples on to this receiver of remote write, as http://prometheus:9090/api/v1/write, under YACE's names and labels",
    )
    yace.add_argument(
        "--labels-snake-case",
        action="store_true",
        help="where YACE runs with -labels-snake-case: labels there as dimension_instance_id",
    )
    yace.set_defaults(run=run)
    register_import(others)


def run(args: argparse.Namespace) -> int:
    if args.account and not re.fullmatch("[0-9]{12}", args.account):
        raise ConfigErrors(
            [ConfigError("--account", 0, "", f'"{args.account}" is not right', "an account id is 12 digits")]
        )
    if args.labels_snake_case and not args.remote_write:
        what = "labels are remote write's: say --remote-write, too"
        raise ConfigErrors([ConfigError("--labels-snake-case", 0, "", what)])
    plan, written = translated(args.file, args.account, args.remote_write, snake_case=args.labels_snake_case)
    print("\n".join(report(plan)), file=sys.stderr)
    write_new(args.out, written)
    if args.out is None:
        return 0
    print(
        f"{args.out} is written. Next: headgate check {args.out}; what it costs a month: headgate quote --config {args.out}; whether it is "
        f"allowed: headgate preflight --config {args.out} --limit-accounts 5",
        file=sys.stderr,
    )
    return 0
