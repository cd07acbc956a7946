"""Faults that begin at the source: an AWS that throttles, fails, lies, cuts off, lists too much, forgets credentials, or has something new.

They compose: what is active at once is one `POST /faults`. Where whole accounts are hit, the others must be on time. Each strike also holds that
attempts are bounded, by what the simulated AWS has received (`within_bounds`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from aiokafka.errors import KafkaError

from ingest import wire
from ingest.errors import HeadgateError, Rejected
from ingest.log import Outgoing, Producer
from shard_config.model import Config
from tests.faults.field import Field
from tests.faults.kinds import Kind, Struck
from tests.faults.log import records_of
from tests.faults.setting import DEADLINE_S, METRICS, POLL_S, REGIONS, SERVICES, SETTLING_S

STORM = "throttle storm, 5xx, resets, slow answers"
RESULTS = "PartialData, InternalError, Forbidden, an Id missing"
TOKENS = "NextToken repeated or looping, duplicated timestamps, shuffled Ids"
CUT = "truncated or malformed answer"
LATE = "late and revised points; a new series after discovery"
EMPTY = "Complete and empty"
MILLION = "a million labels or series"
CREDENTIALS = "credentials expire or are denied mid-window"

CALLS_PER_ITEM_MAX = 4 * 3
"""Of GetMetricData, for one service of one task: so many attempts a call, so many rounds; one call asks for all that a service has here."""
RUNS_MAX = 3
"""Of one task: a worker that dies hands it on."""
RECENT_S = 300
SLACK_CALLS = 60
OLDER, OLDER_S = 20, 10.0
"""Records, and within that they are written."""
DISCOVERED_S = 75.0
"""A listing, the look after it, and the landing."""
LATE_MAX_S = SETTLING_S + POLL_S + 30
"""Behind now the accounts may be that are not hit."""

Make = Callable[[Field, random.Random], Mapping[str, Any]]


def accounts_of(field: Field, rng: random.Random, count: int = 1) -> list[str]:
    return rng.sample(field.truth.accounts, count)


def of_all(**faults: Any) -> Make:
    return lambda _field, _rng: faults


def of_some(**faults: Any) -> Make:
    """Of two accounts; the others must not notice."""
    return lambda field, rng: faults | {"only_accounts": accounts_of(field, rng, 2)}


def named(name: str) -> Make:
    """A fault that is a list of accounts."""
    return lambda field, rng: {name: accounts_of(field, rng)}


# --- what every strike holds --------------------------------------------------------------------------------------


async def calls_of(field: Field) -> int:
    """GetMetricData calls that the simulated AWS has received."""
    received = await field.aws("/received")
    return sum(calls.get("GetMetricData", 0) for calls in received.values())


async def within_bounds(field: Field, before: int, since_s: int) -> list[str]:
    """A complaint where there were more calls than all tasks of late may make. None where Kafka cannot be asked what those are."""
    with suppress(KafkaError, OSError, TimeoutError, AssertionError):
        items = 0
        for value in (await records_of(field.config, "collect")).values():
            with suppress(Rejected):  # another kind of fault writes rubbish there
                task = wire.decode_task(value)
                items += len(task.items) * (task.tick_s >= since_s - RECENT_S)
        calls, most = await calls_of(field) - before, CALLS_PER_ITEM_MAX * RUNS_MAX * items + SLACK_CALLS
        if calls > most:
            return [
                f"attempts are not bounded: {calls} calls of GetMetricData, and {items} items allow {most}"
            ]
    return []


@asynccontextmanager
async def _answers(field: Field, rng: random.Random, make: Make) -> AsyncIterator[Struck]:
    faults = dict(make(field, rng))
    before, since_s = await calls_of(field), field.now_s()
    hit = [
        *faults.get("only_accounts", ()),
        *(v[0] for k, v in faults.items() if k.endswith(("_accounts", "_roles")) and v),
    ]
    struck = Struck(", ".join(dict.fromkeys(hit)) or "aws")
    async with field.simulator_faults(**faults):
        yield struck
    struck.complaints += await within_bounds(field, before, since_s)


_BEHIND = """SELECT target, extract(epoch FROM min(window_end))::bigint AS open_s FROM windows
WHERE sealed_at IS NULL AND declared IS NULL GROUP BY 1"""


@asynccontextmanager
async def _others_on_time(field: Field, rng: random.Random, make: Make) -> AsyncIterator[Struck]:
    """As `_answers`, of whole accounts; when it is over the windows of the others are sealed as ever."""
    async with _answers(field, rng, make) as struck:
        yield struck
        hit = struck.hit.split(", ")
        for row in await field.sql(_BEHIND):
            behind_s = field.now_s() - row["open_s"]
            if behind_s > LATE_MAX_S and row["target"].split("/")[1] not in hit:
                struck.complaints.append(f"{row['target']} is {behind_s} s behind, and was not hit")


@asynccontextmanager
async def _expiring(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """Sessions hold for a few calls. Each time they are renewed once: as many sessions as that takes, and not many more."""
    calls = rng.randint(3, 8)
    before = await field.aws("/received")
    async with _answers(field, rng, of_all(expire_after_calls=calls)) as struck:
        yield struck
        after = await field.aws("/received")
    for account, counts in after.items():
        made = {api: n - before.get(account, {}).get(api, 0) for api, n in counts.items()}
        sessions, used = made.get("AssumeRole", 0), made.get("GetMetricData", 0) + made.get("ListMetrics", 0)
        # At the beginning, and where a process starts, each exporter makes one for each region.
        most = used // calls + 4 * len(field.exporters) * len(REGIONS)
        if sessions > most:
            struck.complaints.append(
                f"{account}: {sessions} sessions for {used} calls of which {calls} spend one"
            )


# --- the world changes --------------------------------------------------------------------------------------------


@asynccontextmanager
async def _born(field: Field, _: random.Random) -> AsyncIterator[Struck]:
    """Series that no discovery has seen; that each point of them lands, from the first on, is for the campaign's checks."""
    at_s = field.now_s() // POLL_S * POLL_S + POLL_S
    born = sum(
        len(field.truth.listed(account, region, at_s, True))
        for account in field.truth.accounts
        for region in REGIONS
    )
    await field.aws("/world", {"born_at_s": at_s})
    field.truth.bear(at_s)
    now = sum(
        len(field.truth.listed(account, region, at_s, True))
        for account in field.truth.accounts
        for region in REGIONS
    )
    yield Struck("aws", missed=now == born, notes={"series": now - born})


@asynccontextmanager
async def _empty(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """An account without a point for a few windows: Complete, and empty, and closed as such."""
    [account] = accounts_of(field, rng)
    from_s = field.now_s() // POLL_S * POLL_S + POLL_S
    until_s = from_s + POLL_S * rng.randint(2, 4)
    await field.aws("/world", {"silent": [account, from_s, until_s]})
    field.truth.silence(account, from_s, until_s)
    yield Struck(account, notes={"windows": (until_s - from_s) // POLL_S * len(REGIONS) * len(SERVICES)})


@asynccontextmanager
async def _older(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """Looks that were taken earlier arrive last, with what AWS showed then: provisional values. Landing keeps the later looks'."""
    config, struck = field.config, Struck("raw", missed=True, notes={"records": 0})
    with suppress(KafkaError, HeadgateError, OSError, TimeoutError, AssertionError):
        there = sorted((await records_of(config, "raw")).items())
        producer = Producer(config.kafka.bootstrap, "older")
        try:
            async with asyncio.timeout(OLDER_S):
                sent = [
                    out
                    for at, value in rng.sample(there, min(OLDER, len(there)))
                    for out in _as_seen_before(at, value, config)
                ]
                await producer.send(config.kafka.topic("raw"), sent)
        finally:
            await producer.close()
        struck.missed, struck.notes["records"] = not sent, len(sent)
    yield struck


def _as_seen_before(at: tuple[int, int], value: bytes, config: Config) -> Iterator[Outgoing]:
    """The same points of a minute before, half as large, in the same partition; none of what does not decode."""
    try:
        batch = wire.decode_batch(value, config.limits)
    except Rejected:
        return
    older = replace(batch, observed_at_ms=batch.observed_at_ms - 60_000, values=batch.values / 2)
    for payload in wire.encode_batch(older, config.limits):
        yield Outgoing(wire.raw_key(batch.target), payload.value, at[0])


# --- all of them --------------------------------------------------------------------------------------------------

_ONE_PAGE = METRICS * 2
"""Points of a page that is one of several."""


def _kind(
    name: str, row: str, make: Make, *, pays: bool = False, lasts_s: tuple[float, float] = (4.0, 12.0)
) -> Kind:
    return Kind(name, row, partial(_answers, make=make), lasts_s, frozenset(), may_pay_twice=pays)


KINDS: tuple[Kind, ...] = (
    _kind("a throttle storm", STORM, of_all(throttle_share=0.9)),
    _kind("5xx", STORM, of_all(error_share=0.5, unavailable_share=0.3)),
    _kind("resets", STORM, of_all(reset_share=0.4), pays=True),
    _kind("slow answers", STORM, of_all(slow_share=0.3, slow_ms=1000 * DEADLINE_S // 2), pays=True),
    _kind(
        "answers that never come", STORM, of_some(slow_share=0.5, slow_ms=1000 * DEADLINE_S * 2), pays=True
    ),
    _kind("every call is late", STORM, of_all(latency_ms=700)),
    _kind("PartialData", RESULTS, of_all(partial_share=0.5)),
    _kind("InternalError", RESULTS, of_all(internal_error_share=0.5)),
    _kind("Ids that are missing", RESULTS, of_all(missing_id_share=0.5)),
    _kind("metrics that are forbidden", RESULTS, of_some(forbidden_share=0.3)),
    _kind("calls that are executed in part", RESULTS, of_some(allowed_metrics_max=10)),
    _kind("an account that is forbidden", RESULTS, named("forbidden_accounts")),
    _kind("tokens that loop", TOKENS, of_all(token_loop_share=0.5, page_points_max=_ONE_PAGE)),
    _kind("pages without end", TOKENS, of_some(token_endless_share=0.5, page_points_max=_ONE_PAGE)),
    _kind("timestamps twice, Ids shuffled", TOKENS, of_all(repeat_share=0.5, shuffle_ids=True)),
    _kind("truncated answers", CUT, of_all(truncated_share=0.5), pays=True),
    _kind("malformed answers", CUT, of_all(malformed_share=0.5), pays=True),
    Kind("series that are new", LATE, _born, (DISCOVERED_S, DISCOVERED_S + 10), alone=True),
    Kind("older looks that arrive last", LATE, _older),
    Kind("an account without a point", EMPTY, _empty),
    Kind(
        "a million metrics more",
        MILLION,
        partial(
            _others_on_time,
            make=lambda f, r: {"flood_metrics": 1_000_000, "only_accounts": accounts_of(f, r)},
        ),
        (DISCOVERED_S, DISCOVERED_S + 10),
        alone=True,
    ),
    Kind(
        "labels without measure",
        MILLION,
        partial(_others_on_time, make=lambda f, r: {"wild_metrics": 100, "only_accounts": accounts_of(f, r)}),
        (DISCOVERED_S, DISCOVERED_S + 10),
        alone=True,
    ),
    Kind("sessions that expire amid a look", CREDENTIALS, _expiring, (6.0, 14.0)),
    _kind("an account whose sessions are refused", CREDENTIALS, named("expired_accounts")),
    _kind("a role that is denied", CREDENTIALS, named("denied_roles")),
    _kind("listing is denied", CREDENTIALS, of_all(denied_actions=["cloudwatch:ListMetrics"])),
)
