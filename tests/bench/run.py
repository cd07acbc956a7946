"""Runs the benchmarks: `python -m tests.bench.run [--only group,…] [--json FILE]`.

A group is a module of this package with `def run(report) -> None`. What is compared is measured in one run, in turns, since the same code
differs by a third from one hour to the next on a shared machine. Exit code 1 where a goal is not met.
"""

from __future__ import annotations

import argparse
import importlib
import json
import operator
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

_NO_GROUPS = {"run", "pipeline", "processes", "yace"}
"""`pipeline` is the second half of `landing`, `yace` a part of `cloudwatch`."""

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True, slots=True)
class Measured:
    """One line. `ratio` is to what `against` names; `met` is None where there is no goal."""

    group: str
    name: str
    value: float
    unit: str
    against: str | None = None
    ratio: float | None = None
    goal: str | None = None
    met: bool | None = None


class Report:
    """Collects what one group measures."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.lines: list[Measured] = []

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        against: str | None = None,
        ratio: float | None = None,
        goal: str | None = None,
    ) -> None:
        """Add a line. A goal such as ">= 0.9" is for the ratio, or for the value where there is no ratio."""
        met = None if goal is None else meets(value if ratio is None else ratio, goal)
        self.lines.append(Measured(self.group, name, value, unit, against, ratio, goal, met))


def meets(value: float, goal: str) -> bool:
    """Whether a value meets a goal: an operator, a space, a number. Raises ValueError for anything else."""
    sign, _, number = str(goal).partition(" ")
    if sign not in _OPERATORS:
        raise ValueError(f'the goal {goal!r} is none such as ">= 0.9"')
    return bool(_OPERATORS[sign](value, float(number)))


def groups() -> list[str]:
    """Names of all groups."""
    import tests.bench

    return sorted({m.name for m in pkgutil.iter_modules(tests.bench.__path__)} - _NO_GROUPS)


def render(lines: Sequence[Measured]) -> Table:
    table = Table("group", "measured", "value", "", "against", "ratio", "goal")
    for one in lines:
        goal = "" if one.goal is None else f"{one.goal} {'met' if one.met else 'NOT MET'}"
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        style = "red" if one.met is False else ""
        table.add_row(
            one.group, one.name, f"{one.value:,.4g}", one.unit, one.against or "", ratio, goal, style=style
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.run", description="Run the benchmarks.")
    parser.add_argument("--only", metavar="GROUP,…", help=f"of {', '.join(groups())}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the lines there, too")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else groups()
    if unknown := set(wanted) - set(groups()):
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    lines: list[Measured] = []
    for group in wanted:
        print(f"{group} …", file=sys.stderr)
        report = Report(group)
        importlib.import_module(f"tests.bench.{group}").run(report)
        lines += report.lines
    # As wide as it needs where nobody watches, so that a log holds whole lines.
    Console(width=None if sys.stdout.isatty() else 160).print(render(lines))
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in lines], indent=2) + "\n")
    return 1 if any(one.met is False for one in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
