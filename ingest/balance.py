"""The balance of a window: collected = landed at the look's version + superseded by a greater one + dead. Pure.

What a receipt says of a look is what was sent. On the way points may be put aside (dead letters); what is left must be in the store:
`stored_counts` says what, `imbalance` how the store's rows differ from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingest.model import Batch, WindowCount, window_counts


@dataclass(frozen=True, slots=True)
class Claim:
    """What the store must hold of one window: `points` rows of `version` or greater, with this digest. `dead_points` were put aside.

    With `in_part` the look left out what had been published before: rows of any version may be those then.
    """

    target: str
    service: str
    start_s: int
    end_s: int
    version: int
    points: int
    digest: int
    dead_points: int
    in_part: bool = False


def put_aside(whole: Batch, left: Batch) -> tuple[WindowCount, ...]:
    """By window, what `left` lacks of `whole`: points, and the digest to take off. Windows that lack nothing are left out."""
    kept = {w.start_s: w for w in _counts(left)}
    gone = []
    for before in _counts(whole):
        after = kept.get(before.start_s, WindowCount(before.start_s, before.end_s, 0, 0))
        if (after.points, after.digest) != (before.points, before.digest):
            digest = (before.digest - after.digest) % 2**64
            gone.append(WindowCount(before.start_s, before.end_s, before.points - after.points, digest))
    return tuple(gone)


def _counts(batch: Batch) -> tuple[WindowCount, ...]:
    return window_counts(batch.point_ids(), batch.timestamps_s, batch.values, batch.grid_s)


def stored_counts(
    collected: Sequence[tuple[int, int, int]], dead: Sequence[tuple[int, int, int]]
) -> dict[int, tuple[int, int, int]]:
    """What the store must hold of a look, by window's start: (points, digest, dead points).

    `collected` is the receipt's word and `dead` what was put aside, both (start_s, points, digest); of a window the former may be there
    once, the latter several times.
    """
    counts = {start_s: (points, digest, 0) for start_s, points, digest in collected}
    for start_s, points, digest in dead:
        kept, total, before = counts.get(start_s, (0, 0, 0))
        counts[start_s] = (kept - points, (total - digest) % 2**64, before + points)
    return counts


def signed(digest: int) -> int:
    """A 64-bit digest as PostgreSQL's bigint holds it."""
    return digest - (1 << 64) if digest >= 1 << 63 else digest


def imbalance(claim: Claim, points: int, digest: int, older: int, of_all: int = 0) -> str | None:
    """Why a window is not sealed, with the numbers; None where the store holds what the look says.

    `points` rows of the claim's version or newer have this digest, and together with `older` ones all have `of_all`; both are signed.
    """
    if points == claim.points and digest == claim.digest:
        return None
    if claim.in_part and points + older == claim.points and of_all == claim.digest:
        return None
    collected = f"collected {claim.points + claim.dead_points}, dead {claim.dead_points}"
    store = f"the store has {points} of that look or newer and {older} older"
    # What of the older ones the look shows again, nobody knows until it is published whole.
    found = points + older if claim.in_part else points
    if found == claim.points:
        return f"{collected}; {store}: as many, but not the same"
    return (
        f"{collected}; {store}: {abs(claim.points - found)} too {'few' if found < claim.points else 'many'}"
    )
