"""Looks at endpoints in Prometheus' text format: node, blackbox and DCGM exporters, and our own workers.

Guarantees:

* the timestamp of every sample is the tick (`item.start_s`): an endpoint has no past, so whatever it says of times is ignored,
  and a task whose interval is over is EXPIRED, not scraped late;
* names and labels are as exposed, but for `instance`, which is added as Prometheus does;
* an endpoint counts whole or not at all; one that did not answer makes the look PARTIAL, and none FAILED;
* bytes, series, attempts and time are bounded; an endpoint that passes a cap is refused, not cut off;
* no exception for what an endpoint or the network did: it is in the Outcome.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import orjson
import structlog
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families
from prometheus_client.samples import Sample

from ingest.clock import Clock
from ingest.errors import HeadgateError, Rejected, Transient
from ingest.model import Batch, LookStatus, Outcome, Series, SeriesKey, Target, TaskItem
from ingest.sources.columns import Columns, Look, SeriesTable, batch_of, columns_of, tables_of
from ingest.sources.look import Emit, date_ms, relay
from ingest.validate import series_problem
from shard_config.model import Config, ExpositionJob, Limits

log = structlog.get_logger()

BODY_BYTES_MAX = 32 * 1024 * 1024
"""After decompression."""
ENDPOINTS_MAX = 1_000
"""Of one job."""
SCRAPES_IN_FLIGHT = 16
ATTEMPTS_MAX = 3
RETRY_PAUSE_S = 0.5
NOTES_MAX = 6
EXPOSED_MAX = 4_096
"""Endpoints whose series are kept from scrape to scrape."""
STAT = "Value"
_ACCEPT = "text/plain;version=0.0.4,application/openmetrics-text;version=1.0.0;q=0.5"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to scrape, and the labels that all its series get."""

    url: str
    labels: tuple[tuple[str, str], ...]

    @property
    def instance(self) -> str:
        return dict(self.labels)["instance"]


def endpoint_of(url: str, labels: Iterable[tuple[str, str]] = ()) -> Endpoint:
    """An endpoint with its `instance`: host and port of the URL, unless the labels have one. Raises Rejected."""
    if "@" in url.partition("://")[2].partition("/")[0]:
        # Not quoted: a URL stands in logs and in the ledger.
        raise Rejected("exposition", "bad_endpoint", "a URL with credentials")
    where = f"exposition {url}"
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (KeyError, ValueError) as error:
        raise Rejected(where, "bad_endpoint", "not an http or https URL") from error
    if not parts.hostname:
        raise Rejected(where, "bad_endpoint", "without a host")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Endpoint(url, tuple(sorted({"instance": f"{host}:{port}", **dict(labels)}.items())))


def endpoints_in(text: bytes, where: str) -> list[Endpoint]:
    """The endpoints of a file_sd document: [{"targets": ["host:port"], "labels": {…}}].

    Labels `__scheme__` and `__metrics_path__` are honoured, other `__…__` labels dropped, as Prometheus does. Raises Rejected.
    """
    try:
        found = [
            endpoint_of(
                f"{group.get('labels', {}).get('__scheme__', 'http')}://{address}"
                f"{group.get('labels', {}).get('__metrics_path__', '/metrics')}",
                [(str(k), str(v)) for k, v in group.get("labels", {}).items() if not k.startswith("__")],
            )
            for group in orjson.loads(text)
            for address in group["targets"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Rejected(where, "bad_endpoints_file", f"not file_sd JSON: {error}") from error
    return list({endpoint.url: endpoint for endpoint in found}.values())


def samples_in(body: str, openmetrics: bool) -> Iterator[Sample]:
    """The samples of an exposition, names and labels as written. Raises ValueError where it does not parse."""
    if openmetrics:
        families = openmetrics_families(body)  # type: ignore[no-untyped-call]
    else:
        # prometheus_client 0.26 renames the samples of a counter to `…_total`; without `# TYPE` it leaves names alone.
        families = text_families(
            "\n".join(line for line in body.split("\n") if not line.lstrip().startswith("#"))
        )
    for family in families:
        yield from family.samples


@dataclass(frozen=True, slots=True, eq=False)
class Exposed:
    """The series of one endpoint, kept from scrape to scrape: mostly they are the same ones again."""

    labels: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    """Name and labels as exposed, in their order."""
    tables: tuple[SeriesTable, ...] = ()
    """The series that can travel, in the same order."""
    refused: frozenset[int] = frozenset()
    """Places in `labels` of those that cannot: control characters, too many or too long labels."""


@dataclass(frozen=True, slots=True, eq=False)
class Scrape:
    """One endpoint's answer: columns for each of its tables."""

    exposed: Exposed
    columns: tuple[Columns, ...]
    observed_at_ms: int
    nans: int
    repeated: int

    @property
    def series(self) -> int:
        return len(self.exposed.labels) - len(self.exposed.refused)


def parse(
    body: str,
    openmetrics: bool,
    job: ExpositionJob,
    endpoint: Endpoint,
    tick_s: int,
    observed_at_ms: int,
    last: Exposed,
    limits: Limits,
) -> Scrape:
    """A body as columns, all samples at the tick.

    NaN is left out and counted (a summary without observations says so); of a series that is exposed twice the first sample
    is kept; a series that cannot travel is left out and counted. Raises Rejected where the body does not parse or holds more than the job's `series_max`.
    """
    where = f"exposition {endpoint.url}"
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    nans = repeated = 0
    try:
        for sample in samples_in(body, openmetrics):
            if math.isnan(sample.value):
                nans += 1
                continue
            key = (sample.name, tuple(sample.labels.items()))
            if key in found:
                repeated += 1
                continue
            found[key] = float(sample.value)
            if len(found) > job.series_max:
                raise Rejected(where, "too_many_series", f"more than series_max {job.series_max}")
    except (ValueError, KeyError, IndexError, TypeError, ArithmeticError) as error:
        # prometheus_client 0.26 raises what it stumbles over, as OverflowError for a timestamp of 400 digits.
        raise Rejected(where, "bad_exposition", f"does not parse: {error}") from error
    keys = tuple(found)
    exposed = last
    if keys != last.labels:
        series = [Series(_key(name, labels, job, endpoint)) for name, labels in keys]
        refused = frozenset(i for i, one in enumerate(series) if series_problem(one, limits))
        travelling = (one for i, one in enumerate(series) if i not in refused)
        exposed = Exposed(keys, tables_of(travelling, last.tables), refused)
    values = (value for i, value in enumerate(found.values()) if i not in exposed.refused)
    columns = tuple(
        columns_of([([tick_s], [next(values)]) for _ in table.series]) for table in exposed.tables
    )
    return Scrape(exposed, columns, observed_at_ms, nans, repeated)


def _key(name: str, labels: tuple[tuple[str, str], ...], job: ExpositionJob, endpoint: Endpoint) -> SeriesKey:
    """As Prometheus with honor_labels off: a label of the endpoint wins, the exposed one becomes `exported_…`."""
    dimensions = dict(endpoint.labels)
    for label, value in labels:
        free = label
        while free in dimensions:
            free = f"exported_{free}"
        dimensions[free] = value
    return SeriesKey(
        job.account, job.region, job.name, name, tuple(sorted(dimensions.items())), STAT, job.interval_s
    )


@dataclass(slots=True)
class _Run:
    """A look on its way."""

    look: Look
    job: ExpositionJob
    emit: Emit
    ask_deadline_s: float
    scrapes: int = 0
    endpoints: int = 0
    answered: int = 0
    series: int = 0
    nans: int = 0
    repeated: int = 0
    refused: int = 0
    observed_at_ms: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if len(self.notes) < NOTES_MAX:
            self.notes.append(text)

    def outcome(self) -> Outcome:
        if self.endpoints and self.answered == self.endpoints:
            status = LookStatus.COMPLETE
        else:
            status = LookStatus.PARTIAL if self.answered else LookStatus.FAILED
            self.note(f"{self.answered} of {self.endpoints} endpoints answered")
        if self.nans:
            self.note(f"{self.nans} samples were NaN")
        if self.repeated:
            self.note(f"{self.repeated} samples repeated a series")
        if self.refused:
            self.note(f"{self.refused} series were refused: control characters, or labels past a cap")
        requests = {"scrape": self.scrapes} if self.scrapes else {}
        return Outcome(status, "; ".join(self.notes), self.observed_at_ms, self.series, requests, 0)


class ExpositionSource:
    """`ingest.ports.Source` over HTTP; an item's service is the name of the job."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._clock = clock
        self.configure(config)
        self._http: aiohttp.ClientSession | None = None
        self._exposed: dict[tuple[str, str, str, Endpoint], Exposed] = {}

    def configure(self, config: Config) -> None:
        """Go by this configuration from now on; a look that has begun ends by the one before."""
        self._limits = config.limits
        self._jobs = {(job.account, job.region, job.name): job for job in config.exposition}

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    def look(
        self, task_id: str, target: Target, item: TaskItem, deadline_s: float
    ) -> AsyncGenerator[Batch | Outcome, None]:
        """See `ingest.ports.Source.look`. A consumer that may stop early wraps it into `contextlib.aclosing`."""
        return relay(partial(self._look, Look(task_id, target, item), deadline_s))

    async def _look(self, look: Look, deadline_s: float, emit: Emit) -> Outcome:
        job = self._jobs.get((look.target.account, look.target.region, look.item.service))
        if job is None:
            what = f"exposition job {look.item.service} is not in the configuration"
            return Outcome(LookStatus.FAILED, what, 0, 0, {}, 0)
        if self._over(look.item):
            return Outcome(LookStatus.EXPIRED, f"the interval ended at {look.item.end_s}", 0, 0, {}, 0)
        left_s = max(0.0, deadline_s - self._clock.monotonic_s())
        run = _Run(look, job, emit, deadline_s)
        try:
            async with asyncio.timeout(left_s):
                await self._scrape_all(run)
        except TimeoutError:
            run.note("the deadline passed")
        except HeadgateError as failure:
            run.note(str(failure))
        except Exception as error:
            log.exception("look_broke", target=str(look.target), service=job.name)
            run.note(f"broke: {type(error).__name__}: {error}")
        return run.outcome()

    def _over(self, item: TaskItem) -> bool:
        return item.end_s <= self._clock.now_s()

    async def _scrape_all(self, run: _Run) -> None:
        endpoints = await self._endpoints(run.job)
        run.endpoints = len(endpoints)
        if not endpoints:
            run.note("the job has no endpoints")
        rest = iter(endpoints)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(SCRAPES_IN_FLIGHT, len(endpoints))):
                group.create_task(self._work(run, rest))

    async def _endpoints(self, job: ExpositionJob) -> list[Endpoint]:
        if job.endpoints:
            found = [endpoint_of(url) for url in dict.fromkeys(job.endpoints)]
        else:
            where = f"exposition job {job.name}"
            try:
                text = await asyncio.to_thread(Path(job.endpoints_file).read_bytes)
            except OSError as error:
                raise Transient(where, f"endpoints_file is not readable: {error}") from error
            found = endpoints_in(text, f"{where} {job.endpoints_file}")
        if len(found) > ENDPOINTS_MAX:
            raise Rejected(f"exposition job {job.name}", "too_many_endpoints", f"more than {ENDPOINTS_MAX}")
        return found

    async def _work(self, run: _Run, rest: Iterator[Endpoint]) -> None:
        for endpoint in rest:
            try:
                scrape = await self._scrape(run, endpoint)
                if run.series + scrape.series > run.job.series_max:
                    raise Rejected(
                        f"exposition {endpoint.url}",
                        "too_many_series",
                        f"job passes series_max {run.job.series_max}",
                    )
            except HeadgateError as failure:
                log.warning("scrape_failed", job=run.job.name, url=endpoint.url, error=str(failure))
                run.note(str(failure))
                continue
            run.series += scrape.series
            for table, columns in zip(scrape.exposed.tables, scrape.columns, strict=True):
                batch = batch_of(run.look, table, columns, scrape.observed_at_ms)
                if batch is not None:
                    await run.emit(batch)
            run.answered += 1
            run.nans += scrape.nans
            run.repeated += scrape.repeated
            run.refused += len(scrape.exposed.refused)
            run.observed_at_ms = min(run.observed_at_ms or scrape.observed_at_ms, scrape.observed_at_ms)

    async def _scrape(self, run: _Run, endpoint: Endpoint) -> Scrape:
        """One endpoint, with its retries: within the interval and the deadline only. Raises Transient or Rejected."""
        for attempt in range(1, ATTEMPTS_MAX + 1):
            run.scrapes += 1
            try:
                body, openmetrics, observed_at_ms = await self._get(endpoint, run.job.timeout_s)
                break
            except (aiohttp.ClientError, OSError, TimeoutError, Transient) as error:
                what = (
                    error.what if isinstance(error, Transient) else f"{type(error).__name__}: {error}"[:300]
                )
                late = self._over(run.look.item)
                late = late or self._clock.monotonic_s() + RETRY_PAUSE_S >= run.ask_deadline_s
                if attempt == ATTEMPTS_MAX or late:
                    raise Transient(f"exposition {endpoint.url}", what) from error
            await self._clock.sleep(RETRY_PAUSE_S)
        key = (run.job.account, run.job.region, run.job.name, endpoint)
        # In a thread: prometheus_client parses some 100,000 lines a second, and others have deadlines meanwhile.
        scrape = await asyncio.to_thread(
            parse,
            body,
            openmetrics,
            run.job,
            endpoint,
            run.look.item.start_s,
            observed_at_ms,
            self._exposed.pop(key, Exposed()),
            self._limits,
        )
        self._exposed[key] = scrape.exposed
        while len(self._exposed) > EXPOSED_MAX:
            del self._exposed[next(iter(self._exposed))]
        return scrape

    async def _get(self, endpoint: Endpoint, timeout_s: float) -> tuple[str, bool, int]:
        """(body, whether it is OpenMetrics, observed_at_ms)."""
        if self._http is None:
            self._http = aiohttp.ClientSession(headers={"Accept": _ACCEPT, "User-Agent": "headgate"})
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        where = f"exposition {endpoint.url}"
        async with self._http.get(endpoint.url, timeout=timeout) as answer:
            if answer.status != 200:
                failure = Transient if answer.status >= 500 or answer.status == 429 else Rejected
                raise failure(where, f"HTTP status {answer.status}")
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > BODY_BYTES_MAX:
                    raise Rejected(where, "too_large", f"more than {BODY_BYTES_MAX} bytes")
            observed_at_ms = date_ms(answer.headers.get("Date"))
            if observed_at_ms is None:
                observed_at_ms = self._clock.now_ms()
            openmetrics = answer.content_type == "application/openmetrics-text"
        if body and not body.endswith(b"\n"):
            # The format's last line ends too. Without a length in the header nothing else shows that a body was cut off.
            raise Transient(where, "the body was cut off")
        try:
            return body.decode(), openmetrics, observed_at_ms
        except UnicodeDecodeError as error:
            raise Rejected(where, "bad_exposition", f"not UTF-8: {error}") from error
