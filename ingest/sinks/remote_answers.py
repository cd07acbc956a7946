"""What an answer of a remote write receiver means. Pure; facts are of Prometheus 2.42 and 3.x (0.316), Thanos Receive, Mimir and VictoriaMetrics.

A receiver may refuse samples by 400, 409 (Thanos), 422, and by 500: Prometheus 2.42 says 500 of a sample that is older than its out-of-order
window, and a client that tries that again tries it for ever. So a 500 whose words are about samples is a refusal. Whatever is neither taken nor
refused says nothing about samples, and nothing is put aside for it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum

RETRY_AFTER_S = 1.0
"""Where a receiver does not say when to come back."""
RETRY_AFTER_S_MAX = 300.0
MISCONFIGURED_RETRY_S = 15.0
"""A person has to do something first."""


class Refusal(StrEnum):
    """Why samples are not in the receiver."""

    OUT_OF_ORDER = "out_of_order"
    """The receiver has a later sample of the series, and no out-of-order window. Perhaps it has this one, too."""
    TOO_OLD = "too_old"
    DUPLICATE = "duplicate"
    """It has another value for that time, and keeps it."""
    TOO_FAR_AHEAD = "too_far_ahead"
    INVALID_LABELS = "invalid_labels"
    LIMIT = "limit"
    """A limit of the receiver: series, labels, the size of a request."""
    REFUSED = "refused"
    """In words that we do not know."""
    UNRESOLVED = "unresolved"
    """In a refused request, and not looked at further: the bound on requests was reached."""


SAID_CHARACTERS_MAX = 200
"""Of what is said of refused samples."""
SURE = frozenset(
    {
        Refusal.OUT_OF_ORDER,
        Refusal.TOO_OLD,
        Refusal.DUPLICATE,
        Refusal.TOO_FAR_AHEAD,
        Refusal.INVALID_LABELS,
    }
)
"""Reasons whose words nobody but a receiver of samples says. A proxy, too, finds things too large."""


class Verdict(StrEnum):
    TAKEN = "taken"
    REFUSED = "refused"
    """Some sample of the request is bad."""
    TOO_LARGE = "too_large"
    LATER = "later"
    MISCONFIGURED = "misconfigured"
    """It refuses us, not the samples."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A receiver's answer; `said` is printable, and cut. `retry_after` is that header, as it came."""

    status: int
    said: str = ""
    retry_after: str = ""


_WORDS = (
    # In this order: Prometheus says "out of bounds" of both ends.
    (Refusal.TOO_FAR_AHEAD, re.compile(r"(too.far.in(to)?.(the.)?|\bin the )future")),
    (Refusal.TOO_OLD, re.compile(r"too.old|out.of.bounds")),
    (
        Refusal.DUPLICATE,
        re.compile(r"duplicate.(sample|timestamp)|same timestamp, but a different value"),
    ),
    (Refusal.OUT_OF_ORDER, re.compile(r"out.of.order|more recent timestamp")),
    (
        Refusal.INVALID_LABELS,
        re.compile(r"label.?(set|name|value)|invalid sample|metric.name|invalid metric"),
    ),
    (Refusal.LIMIT, re.compile(r"limit|max-series|too many|too large")),
)


def refusal_of(said: str) -> Refusal:
    """The reason in a receiver's words."""
    words = said.lower()
    return next((reason for reason, pattern in _WORDS if pattern.search(words)), Refusal.REFUSED)


def verdict_of(answer: Answer) -> Verdict:
    """What to do about an answer."""
    status = answer.status
    if 200 <= status < 300:
        return Verdict.TAKEN
    if status in {400, 409, 422}:
        return Verdict.REFUSED
    if status == 413:
        return Verdict.TOO_LARGE
    if status == 500 and refusal_of(answer.said) in SURE:
        return Verdict.REFUSED
    if status >= 500 or status in {408, 425, 429}:
        return Verdict.LATER
    return Verdict.MISCONFIGURED


def remedy_of(status: int, receiver: str) -> str:
    """Which key to look at where a receiver refuses us."""
    at = f"of remote_write.receivers[{receiver}]"
    if status == 401:
        return f"look at bearer_token, or username and password, {at}"
    if status == 403:
        return f"it knows us and does not let us write: look at the credentials and headers {at}"
    if 300 <= status < 400:
        return f"write the address that url is redirected to into url {at}"
    if status == 415:
        return f"it does not speak remote write 1.0: look at its version, and at url {at}"
    return (
        f"look at url {at}: Prometheus takes /api/v1/write with --web.enable-remote-write-receiver, Mimir /api/v1/push, "
        "Thanos Receive /api/v1/receive, VictoriaMetrics /api/v1/write"
    )


def retry_after_s(header: str, now_s: float) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date. RETRY_AFTER_S where it is neither; at most RETRY_AFTER_S_MAX."""
    try:
        wait_s = float(header)
    except ValueError:
        try:
            when: datetime = parsedate_to_datetime(header)
            wait_s = when.timestamp() - now_s
        except (ValueError, OverflowError):
            return RETRY_AFTER_S
    if math.isnan(wait_s):
        return RETRY_AFTER_S
    return min(max(wait_s, RETRY_AFTER_S), RETRY_AFTER_S_MAX)
