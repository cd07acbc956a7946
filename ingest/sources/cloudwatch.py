"""Looks at CloudWatch.

Guarantees:

* every series that was listed is asked for, and counts as answered only when CloudWatch says `Complete`: an Id that is
  missing, cut off (`PartialData`) or failed (`InternalError`) is asked for again, and past the attempts the look is PARTIAL;
* a failure never looks like an empty answer, and never throws away what was answered before it;
* points are as served; a batch's `observed_at_ms` is the `Date` of the first page of the call that its points are from;
* series that discovery found late are read back to when they may have begun, by the next looks and at no more cost, until one is published;
* requests, pages (by the points that a request can have), rounds and time are bounded; calls in flight per look are `CALLS_IN_FLIGHT`, and a listing is unpacked as they go;
* no exception for what AWS or the network did: it is in the Outcome;
* another configuration is taken while looks are under way: those end with the one that they began with.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import structlog

from ingest.clock import Clock
from ingest.errors import HeadgateError, Transient
from ingest.model import CONTINUED, Batch, LookStatus, Outcome, Target, TaskItem
from ingest.sources.asking import Asking
from ingest.sources.aws import Access, Aws, Tally
from ingest.sources.aws_errors import Denied
from ingest.sources.columns import Look, batch_of, columns_of
from ingest.sources.discovery import Asked, Discovery
from ingest.sources.limiter import points_per_s
from ingest.sources.listing import Cache, Late, Listing, back_to_s
from ingest.sources.look import Emit, detail_of, relay, said_of
from ingest.sources.metric_data import (
    Answer,
    Call,
    GetMetricData,
    Malformed,
    Page,
    Points,
    check,
    plan,
)
from ingest.sources.packed import Unpacked
from shard_config.model import Config, ServiceProfile, retention_s

log = structlog.get_logger()

T = TypeVar("T")

CALLS_IN_FLIGHT = 4
ROUND_PAUSE_S = (0.2, 1.0, 3.0)
"""Before an Id without a whole answer is asked for again, so four times in all. AWS bills every round."""
GIVE_UP_AFTER = 3
"""Calls in a row that used up their attempts: then the look stops asking, for there is an outage."""
EMITTING_S = 1.0
"""Asking ends this long before the look's deadline, so that what was answered still gets out."""
PAGES_MORE = 10
PAGE_POINTS_MIN = 100
REMEMBERED_MAX = 256
"""Looks whose end is waited for; past that, the oldest is forgotten: then the next look goes back once more."""
PUBLISHED_S = 20.0
"""A quarter of it may go to share what was published."""
NOTES_MAX = 6
_NUMBERS = re.compile(r"\d+")
_Of = tuple[str, str]
"""A look: its task's id and its service."""


@dataclass(slots=True)
class _Run:
    """A look on its way: what is settled so far. `wanted` is the item as it was asked; `look.item` may begin before it."""

    look: Look
    wanted: TaskItem
    asking: Asking
    asked: Asked
    profile: ServiceProfile
    emit: Emit
    ask_deadline_s: float
    tally: Tally = field(default_factory=Tally)
    listing: Listing | None = None
    queries: int = 0
    complete: int = 0
    forbidden: int = 0
    points: int = 0
    observed_at_ms: int = 0
    denied: bool = False
    failures_in_a_row: int = 0
    left: Counter[str] = field(default_factory=Counter)
    """By StatusCode, the queries that the last round left open."""
    notes: dict[str, str] = field(default_factory=dict)
    """By what they say but for its numbers: a fault strikes many calls, at another character each."""

    @property
    def of(self) -> _Of:
        return self.look.task_id, self.wanted.service

    @property
    def period_s(self) -> int:
        return self.wanted.period_s or self.profile.period_s

    def note(self, text: str) -> None:
        kind = _NUMBERS.sub("#", text)
        if text and len(self.notes) < NOTES_MAX:
            self.notes.setdefault(kind, text)

    def fail(self, failure: HeadgateError) -> None:
        self.note(said_of(failure, self.asked.account.id))
        self.denied = self.denied or isinstance(failure, Denied)
        self.failures_in_a_row += 1

    @property
    def given_up(self) -> bool:
        return self.denied or self.failures_in_a_row >= GIVE_UP_AFTER

    def status(self) -> LookStatus:
        """Only what was answered in full is COMPLETE."""
        if self.listing is not None and self.complete == self.queries:
            return LookStatus.COMPLETE
        if self.complete or self.points:
            return LookStatus.PARTIAL
        if self.denied or (self.queries and self.forbidden == self.queries):
            return LookStatus.FORBIDDEN
        return LookStatus.PARTIAL if self.forbidden else LookStatus.FAILED


def _remember(looks: dict[_Of, T], of: _Of, what: T) -> None:
    looks.pop(of, None)
    looks[of] = what
    if len(looks) > REMEMBERED_MAX:
        del looks[next(iter(looks))]


class CloudWatchSource:
    """`ingest.ports.Source` over GetMetricData. One per process: it owns the clients, the quotas and the listings."""

    def __init__(self, config: Config, clock: Clock, get_metric_data: GetMetricData | None = None) -> None:
        self._clock = clock
        self._get = get_metric_data
        self._asking = Asking(config, clock)
        self._discovery = Discovery(clock, config.limits, resources=config.lists_resources)
        self._unpacked = Unpacked()
        self._went_back: dict[_Of, tuple[Target, Late]] = {}
        self._broken: dict[_Of, Outcome] = {}

    @property
    def aws(self) -> Aws:
        """The connection that new looks use."""
        return self._asking.aws

    def share_listings(self, cache: Cache) -> None:
        """Share the listings with other shards through a cache: without one each lists for itself."""
        self._discovery.share(cache)

    def share_quotas(self, shares: Mapping[str, float]) -> None:
        """By `account/region` whose quota other shards take from, too, this one's part of it; all others are its own alone."""
        self._asking.aws.limiter.parts = {
            (account, region): share
            for quota, share in shares.items()
            for account, _, region in [quota.partition("/")]
        }

    @property
    def listings(self) -> int:
        """Listings in memory: see `Discovery.listings`."""
        return self._discovery.listings

    def configure(self, config: Config) -> None:
        """Take another configuration: looks in flight go on with theirs, listings that depend on nothing else are kept."""
        self._asking = self._asking.succeeded_by(config)
        self._discovery.configure(config.limits, resources=config.lists_resources)

    async def close(self) -> None:
        await self._discovery.resources.close()
        await self._asking.close()

    def broke(self, task_id: str, service: str) -> Outcome | None:
        """See `ingest.ports.Informed`."""
        return self._broken.pop((task_id, service), None)

    async def published(self, task_id: str, service: str) -> None:
        """See `ingest.ports.Informed`: from now on nobody goes back for the series that this look went back for."""
        target, late = self._went_back.pop((task_id, service), (None, None))
        if target is not None and late is not None:
            deadline_s = self._clock.monotonic_s() + PUBLISHED_S
            await self._discovery.looked_back(target, service, late, deadline_s)

    def look(
        self, task_id: str, target: Target, item: TaskItem, deadline_s: float
    ) -> AsyncGenerator[Batch | Outcome, None]:
        """See `ingest.ports.Source.look`. A consumer that may stop early wraps it into `contextlib.aclosing`."""
        return relay(partial(self._look, Look(task_id, target, item), deadline_s))

    async def _look(self, look: Look, deadline_s: float, emit: Emit) -> Outcome:
        async with self._asking.using() as asking:
            asked, profile = asking.asked(look.target.account), asking.profiles.get(look.item.service)
            if asked is None or profile is None:
                missing = (
                    f"account {look.target.account}" if asked is None else f"service {look.item.service}"
                )
                return Outcome(LookStatus.FAILED, f"{missing} is not in the configuration", 0, 0, {}, 0)
            left_s = max(0.0, deadline_s - self._clock.monotonic_s())
            ask_deadline_s = deadline_s - min(EMITTING_S, left_s / 10)
            run = _Run(look, look.item, asking, asked, profile, emit, ask_deadline_s)
            try:
                await self._collect_within(run, left_s)
                return self._outcome(run)
            except BaseException:
                tally = run.tally
                cost = (dict(tally.requests), tally.metrics_billed, tally.metrics_in_doubt)
                _remember(self._broken, run.of, Outcome(LookStatus.FAILED, "", 0, 0, *cost))
                raise

    async def _collect_within(self, run: _Run, left_s: float) -> None:
        try:
            async with asyncio.timeout(left_s):
                await self._collect(run)
        except TimeoutError:
            run.note("the deadline passed")
        except HeadgateError as failure:
            run.fail(failure)
        except Exception as error:
            log.exception("look_broke", target=str(run.look.target), service=run.look.item.service)
            run.note(f"broke: {type(error).__name__}: {error}")

    async def _collect(self, run: _Run) -> None:
        target = run.look.target
        run.listing = listing = await self._discovery.listing(
            run.asked, target, run.profile, run.ask_deadline_s, run.tally
        )
        self._discovery.resources.due(run.asked, target, run.profile)
        run.note(listing.note)
        start_s = back_to_s(listing, run.wanted, run.period_s)
        run.look = replace(run.look, item=replace(run.wanted, start_s=start_s))
        # A series is asked for once a range; nearly always there is one.
        first = replace(listing, tables=listing.tables[:1])
        run.queries = listing.series * len({call.start_s for call in self._calls(run, first)})
        rest = self._calls(run, listing)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(CALLS_IN_FLIGHT, run.queries)):
                group.create_task(self._work(run, rest))
        late = listing.late
        # Who is forbidden today is not waited for: it would keep all others going back further and further.
        whole = run.queries == run.complete + run.forbidden and run.complete > 0
        if late is not None and run.wanted.end_s >= late.until_s and whole:
            _remember(self._went_back, run.of, (target, late))

    def _calls(self, run: _Run, listing: Listing) -> Iterator[Call]:
        """All calls of a look, table by table."""
        for packed in listing.tables:
            table = self._unpacked.table(packed, run.period_s)
            item = run.look.item
            yield from plan((table,), item.start_s, item.end_s, run.period_s, run.asked.linked)

    async def _work(self, run: _Run, rest: Iterator[Call]) -> None:
        for call in rest:
            if run.given_up:
                return
            await self._ask(run, call)

    async def _ask(self, run: _Run, call: Call) -> None:
        """One call, and again what it left open."""
        open_rows: list[int] = list(range(call.queries))
        partly: dict[int, tuple[int, Points]] = {}
        for pause_s in (*ROUND_PAUSE_S, None):
            answer = await self._pages(run, call, open_rows)
            complete, forbidden = answer.rows("Complete"), answer.rows("Forbidden")
            await self._emit(run, call, answer.observed_at_ms, {row: answer.points[row] for row in complete})
            run.complete += len(complete)
            run.forbidden += len(forbidden)
            settled = {*complete, *forbidden}
            open_rows = [row for row in open_rows if row not in settled]
            for row in settled:
                partly.pop(row, None)
            partly |= {r: (answer.observed_at_ms, answer.points[r]) for r in open_rows if r in answer.points}
            if answer.failure is not None:
                run.fail(answer.failure)
                break
            run.failures_in_a_row = 0
            if not open_rows:
                return
            if pause_s is None or self._clock.monotonic_s() + pause_s >= run.ask_deadline_s:
                run.left.update(answer.statuses.get(row, "absent") for row in open_rows)
                break
            await self._clock.sleep(pause_s)
        for observed_at_ms in sorted({observed for observed, _ in partly.values()}):
            points = {row: points for row, (observed, points) in partly.items() if observed == observed_at_ms}
            await self._emit(run, call, observed_at_ms, points)

    async def _pages(self, run: _Run, call: Call, rows: Sequence[int]) -> Answer:
        """All pages for some rows of a call. What fails ends it, and is in the answer's `failure`."""
        account, points = run.asked.account, call.points(run.period_s) * len(rows) // call.queries
        # Twice, for timestamps may repeat, and once a row more, for AWS may begin before what it was asked for.
        answer = Answer(frozenset(rows), 2 * (points + len(rows)))
        request = call.request(rows)
        tokens: set[str] = set()
        get = self._get or run.asking.calls.get_metric_data

        async def send(access: Access) -> Page:
            try:
                page = check(await get(access, request), answer.asked)
            except Malformed:
                run.tally.metrics_billed += self._price(run, request)
                raise
            run.tally.metrics_billed += self._price(run, request)
            return page

        age_s = self._clock.now_s() - call.start_s
        number = 0
        # On average a page must bring a hundred points: AWS fills pages, and a source that does not must not hold us for ever.
        while number < PAGES_MORE + answer.size // PAGE_POINTS_MIN:
            try:
                page = await run.asked.aws.call(
                    account,
                    run.look.target.region,
                    "GetMetricData",
                    send,
                    cost_s=1 / account.calls_per_s,
                    points_cost_s=points / points_per_s(account, age_s),
                    deadline_s=run.ask_deadline_s,
                    tally=run.tally,
                    metrics=self._price(run, request),
                )
            except HeadgateError as failure:
                answer.failure = failure
                return answer
            if number == 0:
                answer.observed_at_ms = self._observed(run, page)
            else:
                run.tally.requests[CONTINUED] += len(request["MetricDataQueries"])
            if page.next_token in tokens:
                answer.failure = Malformed("aws GetMetricData", "the same NextToken came twice")
                return answer
            try:
                answer.add(page)
            except Malformed as failure:
                answer.failure = failure
                return answer
            for message in page.messages:
                log.warning("cloudwatch_message", target=str(run.look.target), message=message)
                run.note(f"CloudWatch says {message}")
            if not page.next_token:
                return answer
            tokens.add(page.next_token)
            request = {**request, "NextToken": page.next_token}
            number += 1
        answer.failure = Transient("aws GetMetricData", "pages without end")
        return answer

    @staticmethod
    def _price(run: _Run, request: Mapping[str, Any]) -> int:
        """The metrics that AWS bills for an answer, fit for use or not: for a continuation page by the reading that is configured."""
        again = run.asking.pages_count_again or "NextToken" not in request
        return len(request["MetricDataQueries"]) if again else 0

    def _observed(self, run: _Run, page: Page) -> int:
        observed_at_ms = page.date_ms
        if observed_at_ms is None:
            log.warning("date_header_unreadable", target=str(run.look.target))
            observed_at_ms = self._clock.now_ms()
        run.observed_at_ms = min(run.observed_at_ms or observed_at_ms, observed_at_ms)
        return observed_at_ms

    async def _emit(self, run: _Run, call: Call, observed_at_ms: int, points: Mapping[int, Points]) -> None:
        none: Points = ([], [])
        columns = columns_of([points.get(row - call.first, none) for row in range(len(call.table))])
        batch = batch_of(run.look, call.table, columns, observed_at_ms)
        if batch is not None:
            await run.emit(batch)
            run.points += batch.points

    def _outcome(self, run: _Run) -> Outcome:
        status, item, listing = run.status(), run.wanted, run.listing
        if status is LookStatus.COMPLETE and listing is not None and not listing.series:
            # Nothing was asked, since there is nothing. The source's clock is the listing's, carried on.
            age_s = self._discovery.age_s(run.look.target, run.profile.service)
            run.observed_at_ms = listing.observed_at_ms + int(age_s) * 1000
            run.note(f"the listing of {int(age_s)} s ago names no metrics")
        kept_s = retention_s(run.period_s)
        nothing = status is LookStatus.COMPLETE and run.queries and not run.points
        old = item.start_s < run.observed_at_ms // 1000 - kept_s
        if nothing and old and not run.asking.keeps_all:
            status = LookStatus.EXPIRED
            run.note(f"periods of {run.period_s} s are kept for {kept_s // 3600} h")
        missing = run.queries - run.complete - run.forbidden
        left = ", ".join(f"{count} {status}" for status, count in sorted(run.left.items()))
        counts = [
            f"{count} of {run.queries} queries {what}"
            for count, what in (
                (run.forbidden, "are forbidden"),
                (missing, "have no whole answer" + f": {left}" * bool(left)),
            )
            if count
        ]
        went_back = status in (LookStatus.COMPLETE, LookStatus.PARTIAL) and run.look.item != item
        return Outcome(
            status,
            detail_of(run.look.target, item.service, [*counts, *run.notes.values()]),
            run.observed_at_ms,
            listing.series if listing is not None else 0,
            dict(run.tally.requests),
            run.tally.metrics_billed,
            run.tally.metrics_in_doubt,
            run.look.item.start_s if went_back else 0,
        )
