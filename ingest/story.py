"""One point's way, stage by stage, and where it stops: what `headgate why` tells. Pure.

`verdict` blames whoever had the point last and did not hand it on: the source, a permission, a pause, Headgate itself, or the receiver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from ingest.clock import rfc3339
from ingest.model import LookStatus, RecordPosition, SeriesKey, split_version
from ingest.validate import Reason


class Fault(StrEnum):
    """Who it is up to."""

    NOBODY = "nobody"
    SOURCE = "source"
    PERMISSION = "permission"
    PAUSE = "pause"
    CONFIGURATION = "configuration"
    HEADGATE = "headgate"
    RECEIVER = "receiver"


@dataclass(frozen=True, slots=True)
class Planned:
    """A task that asks for the point's window. `kind` is `model.TaskKind`'s."""

    task_id: str
    kind: str
    attempt: int
    tick_s: int
    planned_at: datetime


@dataclass(frozen=True, slots=True)
class WindowState:
    """The ledger's word on the window. `state` is sealed, declared, unbalanced, landed, collected, the last look's status, or planned."""

    start_s: int
    end_s: int
    state: str
    detail: str
    settles_at: datetime | None
    attempts: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A look that covered the window, as its receipt says."""

    task_id: str
    shard: str
    status: str
    detail: str
    finished_at: datetime
    observed_at: datetime | None
    series: int
    requests: Mapping[str, int]
    usd: Decimal
    archive_key: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The point in one archived batch. `position` is the batch's in `raw`, where Kafka still has it; `landed` says when it did, by sink."""

    archive_key: str
    batch_id: str
    value: float
    version: int
    position: RecordPosition | None
    landed: Mapping[str, datetime]
    refused: str
    """The reason of its dead letter, or what validation says; empty where it is good."""
    held: bool = False
    """Archived only: the look saw what had been published before."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The row in `samples`."""

    value: float
    version: int


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that is known about one point. Tuples are oldest first."""

    key: SeriesKey
    at_s: int
    now_s: int
    target: str
    service: str
    configured: bool
    paused: str
    """Why, where a pause holds; empty else."""
    window: WindowState | None
    planned: tuple[Planned, ...]
    asked: tuple[Asked, ...]
    answered: tuple[Answered, ...]
    spoilt: tuple[str, ...]
    """Archived objects that could not be read, and why."""
    next_offsets: Mapping[int, int]
    """Where the store's consumers stand in `raw`, by partition."""
    stored: Stored | None

    @property
    def verdict(self) -> Verdict:
        return _verdict(self)

    @property
    def best(self) -> Answered | None:
        """What the store must hold, of the answers that are good."""
        good = [one for one in self.answered if not one.refused]
        return max(good, key=lambda one: (one.version, one.value), default=None)

    @property
    def revised(self) -> tuple[Answered, ...]:
        """Answers that another one has superseded with another value."""
        best = self.best
        return tuple(o for o in self.answered if best and not o.refused and o.value != best.value)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where the way ends, who it is up to, and that in one sentence."""

    stage: str
    fault: Fault
    sentence: str


def _verdict(story: Story) -> Verdict:
    best, stored = story.best, story.stored
    if best is not None:
        return _answered(story, best)
    if stored is not None:
        if not story.answered and not story.spoilt and not any(a.archive_key for a in story.asked):
            return Verdict(
                "landed",
                Fault.NOBODY,
                f"The store has {_sample(stored)}; the ledger knows no look at it any more.",
            )
        return Verdict(
            "archived",
            Fault.HEADGATE,
            f"The store has {_sample(stored)}, and no archived look does: `headgate audit` says what else is so.",
        )
    if story.answered:
        return _refused(story.answered[-1])
    if story.spoilt:
        return Verdict("archived", Fault.HEADGATE, f"An archived object cannot be read: {story.spoilt[-1]}")
    return _not_answered(story) if story.asked else _not_asked(story)


def _answered(story: Story, best: Answered) -> Verdict:
    stored = story.stored
    if stored is not None and (stored.version, stored.value) == (best.version, best.value):
        return Verdict("landed", Fault.NOBODY, f"It is in the store: {_sample(stored)}.")
    if stored is not None and best.held and _unchanged(story, best, stored):
        return Verdict(
            "landed",
            Fault.NOBODY,
            f"It is in the store: {_sample(stored)}; the look at {_observed(best.version)} saw the same, so it was not published again.",
        )
    had = f"the store has {_sample(stored)}" if stored else "the store has nothing"
    if best.held and best.position is None and not best.landed:
        return Verdict(
            "offset",
            Fault.HEADGATE,
            f"{best.value!r} was answered at {_observed(best.version)}, taken for known and not published again, but {had}: another answer "
            "landed since, or the first never did. The window does not balance, and the coordinator publishes the look whole; `headgate gaps` "
            "has it until then.",
        )
    what = f"{best.value!r} was answered at {_observed(best.version)} and archived"
    if best.landed:
        return Verdict(
            "landed",
            Fault.RECEIVER,
            f"{what}, its batch landed in {', '.join(sorted(best.landed))}, and yet {had}: the receiver lost or changed it, or somebody did. "
            "`headgate audit` names what else differs, `headgate backfill` lands it again.",
        )
    if stored is not None and stored.version > best.version:
        return Verdict(
            "archived", Fault.HEADGATE, f"{what}, but {had}, which is newer than anything archived."
        )
    position = best.position
    if position is None:
        return Verdict(
            "offset",
            Fault.HEADGATE,
            f"{what}, {had}, and Kafka does not have its batch (any more): it was never published, or its retention passed. "
            "`headgate backfill --via s3` lands it.",
        )
    stands = story.next_offsets.get(position.partition)
    where = f"{position.topic}/{position.partition}@{position.offset}"
    if stands is None or stands <= position.offset:
        return Verdict(
            "offset",
            Fault.HEADGATE,
            f"{what} and published at {where}; the consumers stand at {stands if stands is not None else 'no position'}, and {had}: it waits for "
            "them. Are they running, and does PostgreSQL answer?",
        )
    return Verdict(
        "landed",
        Fault.HEADGATE,
        f"{what} and published at {where}; the consumers are past it, at {stands}, and never landed it: see their logs, and `headgate dead`.",
    )


def _unchanged(story: Story, best: Answered, stored: Stored) -> bool:
    """Whether the store has what a look held, from the look that published it or one since."""
    published = max((a.version for a in story.answered if not a.held and not a.refused), default=0)
    return stored.value == best.value and published <= stored.version <= best.version


def _refused(last: Answered) -> Verdict:
    by_source = last.refused in (Reason.NOT_A_NUMBER, Reason.INFINITE, Reason.FUTURE, Reason.BAD_TIMESTAMP)
    return Verdict(
        "refused",
        Fault.SOURCE if by_source else Fault.HEADGATE,
        f"It was answered as {last.value!r} at {_observed(last.version)} and put aside as {last.refused}: `headgate dead show` has the letter.",
    )


def _not_answered(story: Story) -> Verdict:
    last = story.asked[-1]
    complete = [a for a in story.asked if a.status == LookStatus.COMPLETE]
    if complete:
        newest = complete[-1]
        settles = story.window.settles_at if story.window else None
        if settles and newest.observed_at and newest.observed_at < settles:
            return Verdict(
                "answered",
                Fault.SOURCE,
                f"It was asked for, and not there yet at {rfc3339(newest.observed_at.timestamp())}; points may appear until "
                f"{rfc3339(settles.timestamp())}, and it is asked again until then.",
            )
        return Verdict(
            "answered",
            Fault.SOURCE,
            f"The source never answered it: the last complete look, of {newest.series:,} series, had no such point, or the source does not list "
            "this series.",
        )
    said = f": {last.detail}" if last.detail else ""
    match last.status:
        case LookStatus.FORBIDDEN:
            return Verdict(
                "asked", Fault.PERMISSION, f"The source refuses{said}. Grant it, and it is asked again."
            )
        case LookStatus.EXPIRED:
            return Verdict("asked", Fault.HEADGATE, f"It was asked for too late{said}")
        case _ if "not archived" in last.detail or "not asked" in last.detail or "raised" in last.detail:
            return Verdict("archived", Fault.HEADGATE, f"The last look is {last.status}{said}")
    return Verdict(
        "asked", Fault.SOURCE, f"The source did not answer in full; the last look is {last.status}{said}"
    )


def _not_asked(story: Story) -> Verdict:
    window = story.window
    if story.paused:
        return Verdict("planned", Fault.PAUSE, f"Nobody is asked while this is paused: {story.paused}")
    if not story.configured:
        return Verdict("planned", Fault.CONFIGURATION, "The configuration does not ask for this series.")
    if window is not None and window.state.startswith("declared"):
        return Verdict("asked", Fault.HEADGATE, f"The window was closed without data: {window.state}")
    if window is None and not story.planned:
        if story.at_s >= story.now_s:
            return Verdict("planned", Fault.NOBODY, "That time has not come yet.")
        return Verdict(
            "planned",
            Fault.HEADGATE,
            "Its window was never planned: it is newer than the last poll, or older than the installation; else the coordinator is down.",
        )
    return Verdict(
        "asked",
        Fault.HEADGATE,
        "It is planned, and no exporter has said anything about it: are they running, and do they keep up? (`headgate status`)",
    )


def _sample(stored: Stored) -> str:
    return f"{stored.value!r} as of {_observed(stored.version)}"


def _observed(version: int) -> str:
    revision, observed_at_ms = split_version(version)
    return rfc3339(observed_at_ms / 1000) + (f" (revision {revision})" if revision else "")
