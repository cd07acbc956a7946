"""The fault campaign: a whole system at work, faults by a seed, then heal, drain, and check all invariants.

    make faults SEEDS=3 MINUTES=2                        # seeds 1, 2, 3; two minutes of faults each
    make faults SEEDS=1 SEED_BASE=17 ONLY=zombie         # one seed again, with the kinds whose names have the word

A seed reproduces a run: which faults strike whom, when and for how long; not the machine's own timing. Exit code 1 where an invariant broke.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import logging
import os
import random
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from tests.faults import standstill
from tests.faults.checks import Freshness, drain, first_window_s, judge, quiet
from tests.faults.field import Field, open_field
from tests.faults.kinds import ALONE_BOUND_S, BOUND_S, NEEDS, Kind, Struck
from tests.faults.log import ends_of
from tests.faults.schedule import Planned, Schedule, schedule
from tests.faults.setting import POLL_S
from tests.faults.table import Run, Strike, replaced, table
from tests.faults.watch import Positions

MODULES = ("kinds_process", "kinds_servers", "kinds_source", "kinds_log")
HOME = Path(".headgate/faults")
WARM_UP_S = 90.0
ENDED = "the run ended: "
REST_S = 120.0
COMPLAINTS_SHOWN = 20
RUNS = TypeAdapter(list[Run])
TURN_S = 10.0
"""So long a strike waits for what another one still holds; then it is missed."""


def all_kinds() -> tuple[Kind, ...]:
    """Of all modules, in one order; a name stands for one kind."""
    found: list[Kind] = []
    for module in MODULES:
        with suppress(ModuleNotFoundError):
            found += importlib.import_module(f"tests.faults.{module}").KINDS
    names = [kind.name for kind in found]
    assert len(names) == len(set(names)), "two kinds have one name"
    assert all(kind.needs <= NEEDS for kind in found)
    return tuple(found)


class Play:
    """One run on a field."""

    def __init__(self, field: Field, planned: Schedule, run: Run) -> None:
        self.field = field
        self.schedule = planned
        self.run = run
        self.freshness = Freshness(field)
        self.positions = Positions(field)
        self.struck: list[Struck] = []
        self._made: list[tuple[Planned, Struck, float, float]] = []
        self._turns = {need: asyncio.Lock() for need in NEEDS}

    async def all(self) -> None:
        """Warm up, strike, heal, drain, judge: what came of it is in `run`."""
        started_s = time.monotonic()
        watching = [asyncio.create_task(one.run()) for one in (self.freshness, self.positions)]
        try:
            first_s = time.time()

            async def sealed() -> bool:
                return self.freshness.recovery_s(first_s) is not None

            await self.field.until(sealed, "a first window is sealed", WARM_UP_S)
            from_s = await first_window_s(self.field)
            await self._half(self.schedule.first)
            if self.schedule.alone is not None:
                # It may delete records, and move positions.
                await self._fresh()
                self.positions.held = True
                await self._strike(self.schedule.alone)
                self.positions.held = False
                await self._fresh()
            await self._half(self.schedule.second)
            await make_whole(self.field)
            until_s = self.field.now_s() // POLL_S * POLL_S
            await drain(self.field, self.freshness, until_s, self.run.verdict)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.wait(watching)
        self.run.verdict.complaints += self.positions.complaints
        self.run.strikes = [
            Strike(
                planned.kind.name,
                struck.hit,
                at_s - first_s,
                healed_s - at_s,
                struck.missed,
                None if struck.missed else self.freshness.recovery_s(healed_s),
            )
            for planned, struck, at_s, healed_s in self._made
        ]
        async with self.field.down("coordinator"):
            await quiet(self.field)
            await judge(self.field, self.struck, from_s, until_s, self.run.verdict)
        self.run.seconds = time.monotonic() - started_s

    async def _fresh(self) -> None:
        """What strikes alone is not to be taken for what struck before or after. Where it lasts too long the end says so."""
        now_s = time.time()

        async def recovered() -> bool:
            return self.freshness.recovery_s(now_s) is not None

        with suppress(AssertionError):
            await self.field.until(recovered, "everything is sealed", REST_S)

    async def _half(self, strikes: Sequence[Planned]) -> None:
        async def at_its_time(planned: Planned) -> None:
            await asyncio.sleep(planned.at_s)
            await self._strike(planned)

        async with asyncio.TaskGroup() as group:
            for planned in strikes:
                group.create_task(at_its_time(planned))
            group.create_task(asyncio.sleep(self.schedule.half_s))

    async def _strike(self, planned: Planned) -> None:
        kind, struck, began_s = planned.kind, Struck(missed=True), time.time()
        held: list[asyncio.Lock] = []
        try:
            async with asyncio.timeout(TURN_S):
                for need in sorted(kind.needs):
                    await self._turns[need].acquire()
                    held.append(self._turns[need])
            self.field.group_was_hurt |= "kafka" in kind.needs and kind.may_pay_twice
            bound_s = ALONE_BOUND_S if kind.alone else BOUND_S
            began_s = time.time()
            rng = random.Random(f"{self.field.seed} {planned.number} {kind.name}")
            async with asyncio.timeout(2 * bound_s + planned.lasts_s), kind.strike(self.field, rng) as struck:
                await asyncio.sleep(planned.lasts_s)
        except TimeoutError as error:
            if len(held) == len(kind.needs):
                struck.complaints.append(f"{kind.name} at {struck.hit}: not within its time ({error})")
        except Exception as error:
            struck.complaints.append(f"{kind.name} at {struck.hit}: {type(error).__name__}: {error}")
        finally:
            healed_s = time.time()
            await self._answer(kind.needs)
            for lock in held:
                lock.release()
        self.struck.append(struck)
        self._made.append((planned, struck, began_s, healed_s))
        say(f"    {healed_s - began_s:4.0f} s  {kind.name}: {struck.hit}{' missed' if struck.missed else ''}")

    async def _answer(self, servers: AbstractSet[str]) -> None:
        """A server that was struck answers again before the next one who needs it has its turn; recovery is counted from the heal."""

        async def kafka() -> bool:
            return bool(await ends_of(self.field.config, "raw"))

        async def postgres() -> bool:
            return bool(await self.field.sql("SELECT 1"))

        for name, answers in (("kafka", kafka), ("postgres", postgres)):
            if name in servers:
                with suppress(AssertionError):  # the end says so
                    await self.field.until(answers, f"{name} answers", REST_S)


async def make_whole(field: Field) -> None:
    """Whatever a kind has left: nothing is stopped, late, silent or refused after this, and all are ready."""
    for worker in field.workers:
        field.clock(worker, 0.0)
        await field.cont(worker)
    for _, link in field.every_link():
        link.resume()
    await field.aws("/faults", {})
    for worker in field.workers:
        await field.ready(worker, 120.0)


async def play(seed: int, minutes: float, kinds: Sequence[Kind], home: Path, mutant: str) -> Run:
    """One seed, from start to end."""
    run, planned = Run(seed, minutes), schedule(seed, minutes, kinds)
    say(f"seed {seed}:")
    for line in planned.lines():
        say(f"  {line}")
    shutil.rmtree(home, ignore_errors=True)
    try:
        async with open_field(home, seed, mutant) as field:
            await Play(field, planned, run).all()
    except Exception as error:
        run.verdict.complaints.append(f"{ENDED}{type(error).__name__}: {error}")
    if run.verdict.complaints:
        shutil.rmtree(home / "run", ignore_errors=True)  # logs stay
    else:
        shutil.rmtree(home, ignore_errors=True)
    return run


def say(text: str) -> None:
    print(text, flush=True)


def report(run: Run, again: str, logs: Path) -> None:
    """One line of figures, and what broke, with how to have it again."""
    v = run.verdict
    say(
        f"seed {run.seed}: {v.windows} windows, {v.records} records, {v.points} points; {v.lost} lost, {v.wrong} wrong, "
        f"{v.invented} invented; paid twice {v.paid_twice} of {v.billed} ({v.may_twice} could be); sealed after {v.drain_s:.0f} s"
    )
    for complaint in v.complaints[:COMPLAINTS_SHOWN]:
        say(f"  BROKEN {complaint}")
    if len(v.complaints) > COMPLAINTS_SHOWN:
        say(f"  BROKEN … and {len(v.complaints) - COMPLAINTS_SHOWN} more: --json has them all")
    if v.complaints:
        say(f"  again: {again}\n  logs: {logs}")


def machine() -> str:
    """By its size."""
    return f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--seeds", type=int, default=1, metavar="N", help="how many runs (default %(default)s)")
    add("--seed-base", type=int, default=1, metavar="S", help="the first run's seed (default %(default)s)")
    add("--minutes", type=float, default=2.0, metavar="M", help="of faults in a run (default %(default)s)")
    add("--only", default="", metavar="WORD", help="kinds whose names, or rows, have the word")
    add("--kind", action="append", default=[], metavar="NAME", help="this kind; may be given again")
    add("--mutant", default="", metavar="NAME", help="plant a mistake: the campaign must find it")
    add(
        "--standstill",
        type=float,
        metavar="M",
        help="instead: everything that workers write to stands still for so many minutes",
    )
    add("--list", action="store_true", help="list the kinds, and end")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="count the runs of an earlier --json in too, as of a campaign in several processes; with --seeds 0 those alone",
    )
    add("--write", type=Path, metavar="FILE", help="put the table between the markers of this document")
    return parser


def chosen(args: argparse.Namespace) -> list[Kind]:
    """Raises SystemExit where a kind does not exist."""
    kinds = all_kinds()
    unknown = [name for name in args.kind if name not in {kind.name for kind in kinds}]
    if unknown:
        sys.exit(f"no kind is named {', '.join(unknown)}; --list names them")
    return [k for k in kinds if (not args.kind or k.name in args.kind) and args.only in f"{k.name} {k.row}"]


def again_options(args: argparse.Namespace) -> str:
    """What chose the kinds, and the mutant, as words for `make faults`."""
    options = [f'--kind "{name}"' for name in args.kind] + (
        [f"--mutant {args.mutant}"] if args.mutant else []
    )
    only = f' ONLY="{args.only}"' if args.only else ""
    return only + (f" ARGS={shlex.quote(' '.join(options))}" if options else "")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.standstill:
        return standstill.main(args.standstill, (HOME / "standstill").resolve(), args.seed_base)
    kinds = chosen(args)
    if args.list:
        for kind in kinds:
            say(f"{kind.name}{' (alone)' if kind.alone else ''}  ·  {kind.row}")
        return 0
    runs = [run for path in args.also for run in RUNS.validate_json(path.read_bytes())]
    try:
        for seed in range(args.seed_base, args.seed_base + args.seeds):
            home = (HOME / f"seed-{seed}").resolve()
            runs.append(asyncio.run(play(seed, args.minutes, kinds, home, args.mutant)))
            again = f"make faults SEEDS=1 SEED_BASE={seed} MINUTES={args.minutes:g}{again_options(args)}"
            report(runs[-1], again, home / "logs")
    except KeyboardInterrupt:
        say("stopped; so far:")
    text = table(runs, machine())
    say(f"\n{text}")
    if args.json:
        args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    if args.write:
        args.write.write_text(replaced(args.write.read_text(), text))
    broken = [run for run in runs if run.verdict.complaints]
    if args.mutant:
        # A run that did not get to its end has judged nothing.
        found = [c for run in broken for c in run.verdict.complaints if not c.startswith(ENDED)]
        say(f"the mutant {args.mutant!r} was {'caught' if found else 'NOT caught'}")
        return int(not found)
    return int(bool(broken) or not runs)


if __name__ == "__main__":
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # brokers that are away are what this is about
    sys.exit(main())
