"""Differing values, asked of the archive: whether a look of ours saw the same value as YACE did, before it changed."""

from __future__ import annotations

import asyncio
import math

import asyncpg

from ingest.archive import S3Archive
from ingest.clock import Clock
from ingest.compare.lines import Verdict
from ingest.compare.state import State
from ingest.compare.store import key_said
from ingest.errors import Transient
from ingest.trail import follow
from shard_config.model import Config

PROVED_MAX = 50
"""Points followed in a report; each reads some ten rows and a few objects."""
FOLLOW_S = 20.0

_OPEN = """SELECT e.verdict, e.key, e.at_s, e.ts, e.theirs, e.ours_ts, o.account, o.region, o.service, o.said, o.period_s
FROM examples AS e JOIN ours AS o USING (key) WHERE e.verdict IN (?, ?) AND e.ours_ts IS NOT NULL AND e.note = '' ORDER BY e.at_s, e.key LIMIT ?"""


def conclude(theirs: float, seen: list[float]) -> tuple[bool, str]:
    """(whether CloudWatch revised the value, in words), of what our looks saw of the point, oldest first."""
    if any(value == theirs for value in seen):
        return True, "a look of ours saw YACE's value: it was not finished"
    if len(set(seen)) > 1:
        return True, f"CloudWatch revised it: {', '.join(map(repr, dict.fromkeys(seen)))}"
    return False, "no look of ours saw another value than ours" if seen else "no look of it is in the archive"


async def prove(
    connection: asyncpg.Connection, archive: S3Archive, config: Config, clock: Clock, state: State
) -> int:
    """Follow the points of differences that are unclear or wrong, and call those revised that were; returns how many. Raises Transient, Fatal."""
    rows = list(state.rows(_OPEN, Verdict.UNCLEAR, Verdict.WRONG, PROVED_MAX))
    revised = 0
    for verdict, key, at_s, ts, theirs, ours_ts, account, region, service, said, period_s in rows:
        try:
            async with asyncio.timeout(FOLLOW_S):
                story = await follow(
                    connection, archive, config, clock, key_said(account, region, said, period_s), ours_ts
                )
        except TimeoutError as error:
            raise Transient(
                "archive", f"no answer within {FOLLOW_S:g} s", "the differences stay unclear; try again"
            ) from error
        was, note = conclude(math.nan if theirs is None else theirs, [a.value for a in story.answered])
        state.conclude(
            (verdict, key, at_s, ts),
            (account, region, service),
            Verdict.REVISED if was else Verdict(verdict),
            note,
        )
        revised += was
    return revised
