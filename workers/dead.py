"""`headgate dead list|show|replay|discard`: what was put aside, why, and what to do about it.

* A letter that was written several times is listed once. What was replayed or discarded is listed with `--all` only; nothing is
  taken out of Kafka.
* `replay` says beforehand what it would do (`--dry-run` says only that), sends nothing that would die again, and waits for what it
  sent to land.
* `discard` asks first, and records the decision with the note that is given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.prompt import Confirm
from rich.table import Table

from ingest import letters, wire
from ingest.archive import open_archive
from ingest.clock import Clock, SystemClock, utc
from ingest.collect import Topics
from ingest.dead import Filter, Found, Handled, Letters, find, landed, mark
from ingest.errors import Fatal, Rejected
from ingest.log import Producer
from ingest.model import BatchId
from ingest.revive import Plan, Reviver, plan, without_open_windows
from ingest.validate import describe, printable
from shard_config.model import Config
from workers import local
from workers.arguments import parse_time, whole_number
from workers.lifecycle import configure_logs
from workers.samples import rfc3339

LISTED = 50
HEX_BYTES = 512
LANDING_WAIT_S = 30.0
SHORT = 12
"""Digits of an identity that a table has room for."""

REFUSED_SHOWN = 20


# --- showing ----------------------------------------------------------------------------------------------------


def _time(ms: int) -> str:
    return rfc3339(utc(ms // 1000))


def _origin(found: Found) -> str:
    at = found.letter.origin
    return f"{at.topic}/{at.partition}@{at.offset}"


def _what(found: Found) -> str:
    """The series, or the key of a record that did not decode."""
    return found.letter.series or printable(found.letter.key.decode(errors="replace"), 200)


def as_dict(found: Found) -> dict[str, Any]:
    """A letter for machines, without its bytes."""
    letter = found.letter
    return {
        "identity": found.identity,
        "reason": letter.reason,
        "detail": letter.detail,
        "account": found.account,
        "series": letter.series,
        "key": letter.key.decode(errors="replace"),
        "cluster": letter.cluster,
        "topic": letter.origin.topic,
        "partition": letter.origin.partition,
        "offset": letter.origin.offset,
        "batch_id": letter.batch_id.hex(),
        "first_written": _time(found.first_written_ms),
        "last_written": _time(found.last_written_ms),
        "times_written": found.times,
        "handled": None
        if found.handled is None
        else {"what": found.handled.what, "at": rfc3339(found.handled.at), "note": found.handled.note},
    }


def render(found: Letters, listed_max: int) -> Table:
    """A table of the newest letters."""
    shown = found.found[-listed_max:]
    table = Table(title=f"dead letters ({len(found.found):,})", title_justify="left")
    for name in ("identity", "written", "reason", "what", "origin", "times", "handled"):
        table.add_column(name, justify="right" if name == "times" else "left", no_wrap=name == "identity")
    for one in shown:
        table.add_row(
            one.identity[:SHORT],
            _time(one.first_written_ms),
            one.letter.reason,
            printable(_what(one), 120),
            _origin(one),
            str(one.times),
            one.handled.what if one.handled else "",
        )
    if left_out := len(found.found) - len(shown):
        table.caption = f"and {left_out:,} older: --limit"
    return table


def today(found: Found, config: Config) -> dict[str, Any]:
    """What a letter's bytes say today."""
    letter = found.letter
    if not letters.holds_record(letter):
        try:
            lost = letters.points_of(letter)
        except Rejected as error:
            return {"points": None, "why_not": error.what}
        look = lost.look
        return {
            "points": [[t, repr(v)] for t, v in lost.points],
            "labels": letters.labels_of(lost.series),
            "look": {
                "task_id": look.task_id,
                "target": str(look.target),
                "service": look.service,
                "observed_at_ms": look.observed_at_ms,
                "revision": look.revision,
                "grid_s": look.grid_s,
            },
        }
    try:
        batch = wire.decode_by_series(letter.payload, config.limits)
    except Rejected as error:
        return {"decodes": False, "why_not": str(error)}
    return {
        "decodes": True,
        "target": str(batch.batch.target),
        "service": batch.batch.service,
        "task_id": batch.batch.task_id,
        "points": batch.batch.points,
        "series": [describe(one) for one in batch.batch.series[:20]],
        "bad_series": {describe(batch.batch.series[i]): reason for i, reason in batch.bad.items()},
    }


def payload_text(payload: bytes, whole: bool) -> dict[str, Any]:
    """The bytes: as text where they are printable, else in hexadecimal; cut off unless the whole is asked for."""
    cut = payload if whole else payload[:HEX_BYTES]
    said: dict[str, Any] = {"bytes": len(payload)}
    if len(cut) < len(payload):
        said["shown"] = len(cut)
    text = cut.decode(errors="replace")
    return said | ({"text": text} if text.isprintable() else {"hex": cut.hex()})


# --- the commands -----------------------------------------------------------------------------------------------


async def _find(config: Config, args: argparse.Namespace, *, payloads: bool, handled: bool) -> Letters:
    wanted = Filter(
        identities=tuple(getattr(args, "identities", ())),
        reason=args.reason,
        account=args.account,
        since_ms=None if args.since is None else int(args.since * 1000),
        handled=handled,
    )
    kafka = config.kafka
    return await find(kafka, kafka.topic("dead"), config.postgres, wanted, payloads=payloads)


async def _list(config: Config, args: argparse.Namespace, _: Clock) -> int:
    found = await _find(config, args, payloads=False, handled=args.all)
    if args.format == "json":
        newest = [as_dict(one) for one in found.found[-args.limit :]]
        said = {"letters": len(found.found), "by_reason": found.by_reason(), "unreadable": found.unreadable}
        print(json.dumps(said | {"newest": newest}, indent=2))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 200)
    if found.found:
        console.print(render(found, args.limit), markup=False)
    console.print(_counts(found), markup=False, highlight=False)
    return 0


def _counts(found: Letters) -> str:
    by_reason = ", ".join(f"{count:,} {reason}" for reason, count in found.by_reason().items())
    unreadable = f"; {found.unreadable:,} records of the topic are no letters" if found.unreadable else ""
    return (
        f"{len(found.found):,} dead letters: {by_reason}" if found.found else "no dead letters"
    ) + unreadable


async def _show(config: Config, args: argparse.Namespace, _: Clock) -> int:
    [one] = (await _find(config, args, payloads=True, handled=True)).found
    said = as_dict(one) | {
        "today": today(one, config),
        "payload": payload_text(one.letter.payload, args.whole),
    }
    print(json.dumps(said, indent=2, ensure_ascii=False))
    return 0


async def _replay(config: Config, args: argparse.Namespace, clock: Clock) -> int:
    found = await _find(config, args, payloads=True, handled=bool(args.identities))
    edit = None if args.edit is None else _edit(args.edit, found)
    planned = plan([one.letter for one in found.found], config.landing_limits, clock.now_s(), edit)
    planned = await without_open_windows(planned, config.postgres)
    for line in plan_lines(planned):
        print(line)
    if args.dry_run or not planned.revivals:
        return 1 if planned.refused else 0
    batches = await _revive(config, planned, clock)
    missing = await _wait_landed(config, batches, clock, args.wait)
    if missing:
        print(
            f"{missing} of {len(batches)} batches have not landed within {args.wait:g} s: see `headgate status`"
        )
    else:
        print("landed")
    return 1 if missing or planned.refused else 0


def _edit(path: Path, found: Letters) -> dict[str, Any]:
    if len(found.found) != 1:
        raise Fatal("--edit", f"{len(found.found)} letters were chosen", "give exactly one IDENTITY")
    try:
        edit = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Fatal(f"edit {path}", str(error)) from error
    if not isinstance(edit, dict):
        raise Fatal(f"edit {path}", "is no JSON object", 'as {"value": 1.5}')
    return edit


def plan_lines(planned: Plan) -> list[str]:
    """What a replay would do, for people."""
    records = sum(r.task is None for r in planned.revivals)
    tasks = len(planned.revivals) - records
    lines = [f"to replay: {records:,} records and {tasks:,} tasks of points, {planned.points:,} points"]
    lines += [
        f"refused: {identity[:SHORT]} {why}"
        for identity, why in list(planned.refused.items())[:REFUSED_SHOWN]
    ]
    if (more := len(planned.refused) - REFUSED_SHOWN) > 0:
        lines.append(f"and {more:,} more refused")
    return [printable(line, 2_000) for line in lines]


async def _revive(config: Config, planned: Plan, clock: Clock) -> set[BatchId]:
    """Publish and record it, one after the other: what was published and not recorded is the same when it is done again."""
    topics = Topics(config.kafka.topic("raw"), config.kafka.topic("ledger"))
    producer = Producer(config.kafka, "dead-letters")
    batches: set[BatchId] = set()
    try:
        async with open_archive(config.s3, clock) as archive:
            reviver = Reviver(producer, archive, topics, clock, archive_prefix=config.s3.prefix)
            async for done in reviver.revive(planned.revivals):
                now = utc(clock.now_s())
                await mark(config.postgres, done.identities, Handled("replayed", now, done.note))
                batches.update(done.batches)
    finally:
        await producer.close()
    return batches


async def _wait_landed(config: Config, batches: set[BatchId], clock: Clock, wait_s: float) -> int:
    """How many of the batches have not landed by then."""
    deadline_s = clock.monotonic_s() + wait_s
    while missing := len(batches) - await landed(config.postgres, batches):
        if clock.monotonic_s() >= deadline_s:
            break
        await clock.sleep(0.25)
    return missing


async def _discard(config: Config, args: argparse.Namespace, clock: Clock) -> int:
    found = await _find(config, args, payloads=False, handled=bool(args.identities))
    print(_counts(found))
    if not found.found:
        return 0
    if not args.yes and not _confirmed(f"discard {len(found.found):,}?"):
        return 2
    now = utc(clock.now_s())
    await mark(config.postgres, [one.identity for one in found.found], Handled("discarded", now, args.note))
    print(
        f"discarded {len(found.found):,}; they stay in Kafka until its retention, and `headgate dead list --all` has them"
    )
    return 0


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        print("headgate: nobody is here to be asked; --yes does it without", file=sys.stderr)
        return False
    return Confirm.ask(question, default=False)


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "dead",
        help="dead letters: list, show, replay, discard",
        description="What was put aside on its way into the store: records that did not decode, series with bad labels, points that no store "
        "should hold. Each letter has an identity; its beginning is enough.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="what there is, with counts by reason")
    listing.add_argument("--all", action="store_true", help="those that were replayed or discarded, too")
    listing.add_argument("--format", choices=("table", "json"), default="table")
    listing.add_argument(
        "--limit", type=whole_number, default=LISTED, help="the newest so many (%(default)s)"
    )
    listing.set_defaults(run=run, action=_list)

    showing = actions.add_parser("show", help="everything about one letter, as JSON")
    showing.add_argument("identities", nargs=1, metavar="IDENTITY")
    showing.add_argument("--whole", action="store_true", help=f"all of its bytes, not the first {HEX_BYTES}")
    showing.set_defaults(run=run, action=_show, reason=None, account=None, since=None)

    replaying = actions.add_parser(
        "replay",
        help="land letters after all",
        description="Sends letters the way that living data takes: whole records to the raw topic as they were, points as a task of their own, with "
        "the version of their look. What would not be let in today is refused. Exit code 1 where something is refused or has not landed.",
    )
    replaying.add_argument(
        "--edit",
        type=Path,
        metavar="FILE",
        help='for one letter of points: JSON with what changes, as {"value": 1.5}, {"timestamp_s": 1767225600}, {"labels": {"metric": "CPU"}}',
    )
    replaying.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    replaying.add_argument(
        "--wait", type=float, default=LANDING_WAIT_S, help="seconds for it to land (%(default)g)"
    )
    replaying.set_defaults(run=run, action=_replay)

    discarding = actions.add_parser("discard", help="decide that letters are not needed")
    discarding.add_argument("--note", default="", help="why; kept with the decision")
    discarding.add_argument("--yes", action="store_true", help="do not ask")
    discarding.set_defaults(run=run, action=_discard)

    for action in (replaying, discarding):
        action.add_argument("identities", nargs="*", metavar="IDENTITY")
        action.add_argument("--all", action="store_true", help="all that is not replayed or discarded yet")
    for action in (listing, showing, replaying, discarding):
        action.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    for action in (listing, replaying, discarding):
        action.add_argument("--reason", help="of this reason, as unknown_schema")
        action.add_argument("--account", help="of this account")
        action.add_argument(
            "--since", type=parse_time, metavar="TIME", help="written since, as 2026-11-24T05:00:00Z"
        )


def run(args: argparse.Namespace) -> int:
    chosen = bool(args.action in (_list, _show) or args.identities or args.all or args.reason or args.account)
    if not chosen:
        print("headgate: name letters: IDENTITY…, --reason, --account or --all", file=sys.stderr)
        return 2
    configure_logs("dead")
    config = local.find_config(args.config)
    code: int = asyncio.run(args.action(config, args, SystemClock(config.run.clock_offset_s)))
    return code
