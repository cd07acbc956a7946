"""The campaign's results, as tables that are read in a terminal and in docs/RELIABILITY.md alike. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.faults.checks import Verdict

BEGIN, END = "<!-- campaign -->", "<!-- /campaign -->"


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault that was made. `recovery_s` is None where it came to nothing, or was never recovered from."""

    kind: str
    hit: str
    at_s: float
    lasted_s: float
    missed: bool
    recovery_s: float | None


@dataclass(slots=True)
class Run:
    """What came of one seed."""

    seed: int
    minutes: float
    seconds: float = 0.0
    strikes: list[Strike] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share is not above; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def table(runs: Sequence[Run], machine: str) -> str:
    """Markdown: what the campaign was and found, and its faults by kind.

    What could be paid twice was in flight at kills and pauses, was handed back, or its answer was lost on the way.
    """
    verdicts = [run.verdict for run in runs]
    strikes = [strike for run in runs for strike in run.strikes]
    made = [s for s in strikes if not s.missed]
    recoveries = [s.recovery_s for s in made if s.recovery_s is not None]
    memory: dict[str, int] = defaultdict(int)
    for verdict in verdicts:
        for worker, most in verdict.memory_bytes.items():
            kind = worker.rpartition("-")[0] or worker
            memory[kind] = max(memory[kind], most)
    broken = [run.seed for run in runs if run.verdict.complaints]
    peak = ", ".join(
        f"{kind} {memory[kind] >> 20} MiB"
        for kind in ("coordinator", "exporter", "consumer")
        if kind in memory
    )
    whole = [
        ("seeds", f"{len(runs)}, of which {len(broken)} broke an invariant" if broken else f"{len(runs)}"),
        ("hours", f"{sum(run.seconds for run in runs) / 3600:.2f}"),
        ("faults made", f"{len(made):,} of {len({s.kind for s in made})} kinds"),
        ("windows", f"{sum(v.windows for v in verdicts):,}"),
        ("records", f"{sum(v.records for v in verdicts):,}"),
        ("points held against the truth", f"{sum(v.points for v in verdicts):,}"),
        ("lost", f"{sum(v.lost for v in verdicts):,}"),
        ("wrong", f"{sum(v.wrong for v in verdicts):,}"),
        ("invented", f"{sum(v.invented for v in verdicts):,}"),
        (
            "paid twice",
            f"{sum(v.paid_twice for v in verdicts):,} of {sum(v.billed for v in verdicts):,} metrics; "
            f"{sum(v.may_twice for v in verdicts):,} could be",
        ),
        ("recovery p50 / p99", f"{_s(quantile(recoveries, 0.5))} / {_s(quantile(recoveries, 0.99))}"),
        (
            "last heal to everything sealed, longest",
            _s(max((v.drain_s for v in verdicts), default=float("nan"))),
        ),
        ("memory, most", peak),
        ("machine", machine),
    ]
    lines = ["| campaign | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in whole), ""]
    return "\n".join([*lines, *_by_kind(strikes)]) + "\n"


def _by_kind(strikes: Sequence[Strike]) -> list[str]:
    by_kind: dict[str, list[Strike]] = defaultdict(list)
    for strike in strikes:
        by_kind[strike.kind].append(strike)
    lines = ["| fault | made | missed | recovery p50 | p99 |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind, all_ in sorted(by_kind.items()):
        made = [s for s in all_ if not s.missed]
        times = [s.recovery_s for s in made if s.recovery_s is not None]
        lines.append(
            f"| {kind} | {len(made)} | {len(all_) - len(made)} | {_s(quantile(times, 0.5))} | {_s(quantile(times, 0.99))} |"
        )
    return lines


def _s(seconds: float) -> str:
    return "–" if seconds != seconds else f"{seconds:.0f} s"


def replaced(document: str, text: str) -> str:
    """A document with the text between its markers. Raises ValueError where it has none."""
    if BEGIN not in document or END not in document:
        raise ValueError(f"the document has no {BEGIN} … {END}")
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}{END}{after}"
