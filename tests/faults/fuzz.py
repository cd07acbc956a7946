"""Any bytes at everything that reads foreign ones: only declared errors may come out, in bounded time and memory.

    python -m tests.faults.fuzz --seconds 60 --seed 1 [--only WORD] [--replay FILE]

* The bytes are valid examples, spoilt (`tests.faults.mutate`), as a pure function of (seed, surface, number): a machine that is slower tries fewer, not
  others. What gives an outcome that is new is spoilt further.
* Reading happens in a process of its own with limits: a crash of the interpreter, a loop without end and memory without bound are findings
  like an error that was not declared. The bytes stand in a file before they are read, so that they survive it.
* A finding is saved in .headgate/fuzz/, and `--replay` reads it again. Exit code 1 where there is any.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.fuzz_surfaces import Surface, surfaces
from tests.faults.mutate import mutated

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".headgate" / "fuzz"
SEEDS_KEPT_MAX = 400
"""Of a surface: valid examples, and what gave a new outcome."""
FINDINGS_MAX = 20
"""Then it ends: what is that broken is mended first."""
CRASHES_MAX = 5
ADDRESS_SPACE_BYTES = 2 << 30
"""Beyond what the process has at its start: far above every surface's own cap, and far below what a machine has."""
HANG_FACTOR = 6
"""So many times what a surface may take, and a loop has no end."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What broke, and the file that has the bytes."""

    surface: str
    what: str
    file: str
    bytes: int
    head: str
    """Of the bytes, in hexadecimal."""


@dataclass(slots=True)
class Tally:
    """What became of one surface's bytes."""

    executions: int = 0
    outcomes: int = 0
    accepted: int = 0
    worst_cpu_s: float = 0.0
    worst_memory_bytes: int = 0


@dataclass(slots=True)
class Report:
    """What a run found."""

    seed: int
    tallies: dict[str, Tally] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for name, tally in other.tallies.items():
            mine = self.tallies.setdefault(name, Tally())
            mine.executions += tally.executions
            mine.accepted += tally.accepted
            mine.outcomes = max(mine.outcomes, tally.outcomes)
            mine.worst_cpu_s = max(mine.worst_cpu_s, tally.worst_cpu_s)
            mine.worst_memory_bytes = max(mine.worst_memory_bytes, tally.worst_memory_bytes)
        self.findings += other.findings


# --- one input ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reading came to. `word` is one of few; `broke` is empty where all was as declared, and `cause` the same for all that breaks alike."""

    word: str
    broke: str
    cause: str
    accepted: bool
    cpu_s: float
    memory_bytes: int


def tried(surface: Surface, raw: bytes) -> Outcome:
    """Read bytes, watched."""
    with _memory_peak() as peak:
        before_s, broke, cause, accepted = time.process_time(), "", "", False
        try:
            word, accepted = surface.read(raw), True
        except surface.declared as error:
            word = f"{type(error).__name__} {_plain(str(getattr(error, 'reason', '') or error))}"
        except Exception as error:
            word = cause = f"{type(error).__name__} at {_place(error)}"
            broke = f"{cause}: {str(error)[:200]}"
        cpu_s = time.process_time() - before_s
    if not broke and cpu_s > surface.cpu_s_max:
        cause, broke = "time", f"took {cpu_s:.1f} s of CPU, and may take {surface.cpu_s_max:g}"
    if not broke and peak[0] > surface.memory_bytes_max:
        cause, broke = "memory", f"took {peak[0] >> 20} MB, and may take {surface.memory_bytes_max >> 20}"
    return Outcome(word, broke, cause, accepted, cpu_s, peak[0])


class _memory_peak:  # noqa: N801  # used as a function
    """Bytes by which the resident set grew at most within the context (Linux; elsewhere what the whole process ever had more)."""

    def __enter__(self) -> list[int]:
        self._before, self._found = _peak_bytes(reset=True), [0]
        return self._found

    def __exit__(self, *_: object) -> None:
        self._found[0] = max(0, _peak_bytes(reset=False) - self._before)


def _peak_bytes(*, reset: bool) -> int:
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plain(text: str) -> str:
    """An error's words without what is of this input alone, so that equal errors are equal."""
    return re.sub(r"\"[^\"]*\"|'[^']*'|\S*/\S*|\d+|\s+", " ", text)[:120]


def _place(error: BaseException) -> str:
    """The innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(ROOT)) and "/.venv/" not in f.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


# --- the process that reads ---------------------------------------------------------------------------------------


class _Corpus:
    """A surface's examples, its random numbers, and what it has come to."""

    def __init__(self, surface: Surface, seed: int) -> None:
        self.surface = surface
        self.rng = random.Random(f"{seed} {surface.name}")
        self.seeds = list(surface.seeds)
        self.seen: set[str] = set()
        self.spent_s = 0.0
        self._fresh = list(reversed(surface.seeds))

    def next(self) -> bytes:
        """The examples as they are, then spoilt ones."""
        if self._fresh:
            return self._fresh.pop()
        return mutated(self.rng, self.surface.shape, self.seeds, self.surface.words)

    def learn(self, raw: bytes, outcome: Outcome) -> None:
        if outcome.word not in self.seen and len(self.seeds) < SEEDS_KEPT_MAX and not outcome.broke:
            self.seeds.append(raw)
        self.seen.add(outcome.word)


def _read_all(only: str, seconds: float, seed: int, current: Path, report_to: Path) -> None:
    """In the child: until the time is over or FINDINGS_MAX is reached. What is being read is in `current`."""
    with TemporaryDirectory() as home, current.open("wb", buffering=0) as slot:
        corpora = [_Corpus(s, seed) for s in _chosen(only, Path(home))]
        report, known = Report(seed), set[str]()
        _limit()
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and len(report.findings) < FINDINGS_MAX:
            # Equal shares of the time: what is slow is not all that is tried.
            corpus = min(corpora, key=lambda c: c.spent_s)
            began_s = time.perf_counter()
            raw = corpus.next()
            _remember(slot, corpus.surface.name, raw)
            signal.setitimer(signal.ITIMER_PROF, HANG_FACTOR * corpus.surface.cpu_s_max)
            outcome = tried(corpus.surface, raw)
            signal.setitimer(signal.ITIMER_PROF, 0)
            corpus.learn(raw, outcome)
            corpus.spent_s += time.perf_counter() - began_s
            _count(report.tallies.setdefault(corpus.surface.name, Tally()), outcome, len(corpus.seen))
            if outcome.broke and (cause := f"{corpus.surface.name} {outcome.cause}") not in known:
                known.add(cause)
                report.findings.append(_saved(corpus.surface.name, outcome.broke, raw))
        _write_report(report, report_to)


def _count(tally: Tally, outcome: Outcome, outcomes: int) -> None:
    tally.executions += 1
    tally.accepted += outcome.accepted
    tally.outcomes = outcomes
    tally.worst_cpu_s = max(tally.worst_cpu_s, outcome.cpu_s)
    tally.worst_memory_bytes = max(tally.worst_memory_bytes, outcome.memory_bytes)


def _chosen(only: str, home: Path) -> list[Surface]:
    chosen = [s for s in surfaces(home) if only in s.name]
    if not chosen:
        raise SystemExit(f"no surface has {only!r} in its name: {', '.join(s.name for s in surfaces(home))}")
    return chosen


def _limit() -> None:
    """SIGPROF ends a loop without end (its action is to end the process); addresses are a cap on memory."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[0])
        most = pages * resource.getpagesize() + ADDRESS_SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _remember(slot: object, name: str, raw: bytes) -> None:
    slot.truncate(0)  # type: ignore[attr-defined]
    slot.seek(0)  # type: ignore[attr-defined]
    slot.write(name.encode() + b"\n" + raw)  # type: ignore[attr-defined]


def _saved(surface: str, what: str, raw: bytes) -> Finding:
    name = blake2b(surface.encode() + what.encode(), digest_size=6).hexdigest()
    path = FOLDER / f"{surface.replace(' ', '-')}-{name}.bin"
    path.write_bytes(raw)
    return Finding(surface, what, str(path.relative_to(ROOT)), len(raw), raw[:64].hex())


def _write_report(report: Report, path: Path) -> None:
    path.write_text(json.dumps(asdict(report)))


def _read_report(path: Path) -> Report:
    found = json.loads(path.read_text())
    tallies = {name: Tally(**tally) for name, tally in found["tallies"].items()}
    return Report(found["seed"], tallies, [Finding(**one) for one in found["findings"]])


# --- the process that watches -------------------------------------------------------------------------------------


def run(seconds: float, seed: int, only: str = "") -> Report:
    """Fuzz for so long, in children; one that dies is a finding, and the next goes on with another seed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    report, until_s, crashes = Report(seed), time.monotonic() + seconds, 0
    while (left_s := until_s - time.monotonic()) > 0.5 and len(report.findings) < FINDINGS_MAX:
        with TemporaryDirectory() as home:
            current, said = Path(home) / "current", Path(home) / "report"
            command = [sys.executable, "-m", "tests.faults.fuzz", "--child", home, "--seconds", str(left_s)]
            child = subprocess.run(
                [*command, "--seed", str(seed + 1_000_000 * crashes), "--only", only],
                cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=seconds + 120, check=False,
            )  # fmt: skip
            if child.returncode == 0:
                report.add(_read_report(said))
                break
            if not current.exists() or not (raw := current.read_bytes()):
                raise SystemExit(f"nothing was read: {child.stderr.decode(errors='replace')[-2000:]}")
            name, _, value = raw.partition(b"\n")
            report.findings.append(_saved(name.decode(), _death(child.returncode, child.stderr), value))
            crashes += 1
            if crashes == CRASHES_MAX:
                break
    return report


def _death(code: int, said: bytes) -> str:
    if code == -signal.SIGPROF:
        return f"no end within {HANG_FACTOR} times the CPU that it may take"
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    return f"the process ended with {code}: {said.decode(errors='replace')[-300:]}"


def lines_of(report: Report) -> Iterator[str]:
    """The table, and what broke."""
    yield f"{'surface':16} {'executions':>10} {'accepted':>9} {'outcomes':>9} {'worst CPU':>10} {'worst memory':>13}"
    for name, t in report.tallies.items():
        yield (
            f"{name:16} {t.executions:10,} {t.accepted:9,} {t.outcomes:9,} {t.worst_cpu_s * 1000:7,.0f} ms "
            f"{t.worst_memory_bytes / 2**20:10,.1f} MB"
        )
    total = sum(t.executions for t in report.tallies.values())
    outcomes = sum(t.outcomes for t in report.tallies.values())
    yield f"seed {report.seed}: {total:,} executions, {outcomes:,} distinct outcomes, {len(report.findings)} findings"
    for one in report.findings:
        yield f"FOUND {one.surface}: {one.what}"
        yield f"  {one.bytes} bytes in {one.file}, beginning {one.head}"
        yield f"  again: python -m tests.faults.fuzz --replay {one.file} --only '{one.surface}'"


def replayed(path: Path, only: str) -> int:
    """Read one file again, and say what comes of it."""
    with TemporaryDirectory() as home:
        for surface in _chosen(only, Path(home)):
            outcome = tried(surface, path.read_bytes())
            print(f"{surface.name}: {outcome.broke or outcome.word}")
            if outcome.broke:
                return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="WORD", help="surfaces with this in their name")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read these bytes, and nothing else")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay:
        return replayed(args.replay, args.only)
    if args.child:
        _read_all(args.only, args.seconds, args.seed, args.child / "current", args.child / "report")
        return 0
    report = run(args.seconds, args.seed, args.only)
    print("\n".join(lines_of(report)))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
