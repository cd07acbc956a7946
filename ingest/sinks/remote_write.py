"""Samples to one receiver of Prometheus' remote write 1.0: `ingest.ports.Receiving` over HTTP.

Guarantees:

* `write` returns when the receiver has taken each sample, or has refused it by name: a refused request is halved, by series, then by time within one,
  down to the bad samples. At most NARROWING_REQUESTS_MAX requests of a write go into that; what is not known by then is refused as `unresolved`.
  A write of up to half as many samples always gets to the end;
* samples of a series are sent in order: a request begins when the one before it with the same series has been answered;
* what a receiver takes without storing it (bad labels, a time that is none) is refused here and never sent;
* an answer that is lost changes nothing. A receiver without an out-of-order window refuses an older sample that it has, but takes the newest again: so it is
  given one sample of a series a request. Writing the same sequence again after a Transient goes on where it stopped;
* 5xx, 429, time-outs, resets, wrong credentials and wrong URLs are Transient, never a refusal of samples: they are about us, or about the receiver;
* requests in flight, bytes, waiting, and what is read of an answer are bounded. Secrets are in no error.
"""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import aiohttp
import structlog

from ingest.clock import Clock
from ingest.errors import Transient
from ingest.ports import SeriesSamples, Written
from ingest.sinks.prompb import (
    encoded_request,
)
from ingest.sinks.remote_answers import (
    MISCONFIGURED_RETRY_S,
    SAID_CHARACTERS_MAX,
    SURE,
    Answer,
    Refusal,
    Verdict,
    refusal_of,
    remedy_of,
    retry_after_s,
    verdict_of,
)
from ingest.sinks.remote_requests import Chain, Job, halve, job_of, samples_in
from ingest.validate import printable, without
from shard_config.remote_write import Receiver

log = structlog.get_logger()

IN_FLIGHT = 4
REQUEST_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 4_096
NARROWING_REQUESTS_MAX = 10_000
"""Of one write."""
SAMPLES_PER_REQUEST_MIN = 50
"""A receiver that finds requests too large gets no smaller ones than this from the start."""

_HEADERS = {
    "Accept-Encoding": "identity",
    "Content-Encoding": "snappy",
    "Content-Type": "application/x-protobuf",
    "User-Agent": "headgate",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
}


class RemoteWrite:
    """`ingest.ports.Receiving`: one receiver. Writes that overlap wait for each other.

    `observe_s` is told how long each request took, in seconds.
    """

    def __init__(
        self,
        receiver: Receiver,
        clock: Clock,
        samples_per_request: int = 2_000,
        observe_s: Callable[[float], object] = lambda _: None,
    ) -> None:
        self._receiver = receiver
        self._clock = clock
        self._samples_max = samples_per_request
        self._observe_s = observe_s
        self._where = f"remote write to {receiver.name} ({urlsplit(receiver.url).netloc})"
        self._headers, self._secrets = _credentials(receiver)
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._turn = asyncio.Lock()
        self._http: aiohttp.ClientSession | None = None
        self._job: Job | None = None
        """The last write."""

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    async def write(self, series: Sequence[SeriesSamples]) -> Written:
        """See `ingest.ports.Receiving.write`. Raises ValueError where the times of a series do not ascend.

        The same sequence (that object, unchanged) is the same write: after a Transient it goes on where it stopped.
        """
        if not series:
            return Written(0)
        async with self._turn:
            job = self._job
            if job is None or job.series is not series:
                one_each = not self._receiver.out_of_order_window_s
                self._job = job = job_of(series, self._samples_max, one_each)
            while job.rounds:
                try:
                    await self._round(job)
                except BaseException:
                    self._job = None  # cancelled: what was in flight is in no round
                    raise
                if job.failure is not None:
                    failure, job.failure = job.failure, None
                    raise failure
            return job.written()

    async def _round(self, job: Job) -> None:
        """Send a round; what could not be sent is the next one again."""
        async with asyncio.TaskGroup() as group:
            for chain in job.rounds.pop():
                group.create_task(self._send(job, chain, group))
        if job.left:
            job.rounds.append(job.left)
            job.left = []

    async def _send(self, job: Job, chain: Chain, group: asyncio.TaskGroup) -> None:
        """Send a chain to its end, or to the first failure of the job: what is in flight then is waited for, what is not is left."""
        while chain:
            async with self._slots:
                if job.failure is not None:
                    break
                request = chain[-1]
                try:
                    answer = await self._post(job.body(request))
                    verdict = await self._verdict(job, answer)
                except Transient as failure:
                    job.fail(failure)
                    break
            if verdict is Verdict.TAKEN:
                job.taken += samples_in(chain.pop())
                continue
            others = self._narrow(job, chain, verdict, answer)
            if others is not None:
                group.create_task(self._send(job, others, group))
        if chain:
            job.left.append(chain)

    async def _verdict(self, job: Job, answer: Answer) -> Verdict:
        """TAKEN, REFUSED or TOO_LARGE. Raises Transient for all that is not about samples."""
        verdict = verdict_of(answer)
        if verdict is Verdict.REFUSED and refusal_of(answer.said) not in SURE:
            # Perhaps the words of a proxy: then a request without samples is refused as well.
            if job.takes_requests is None:
                job.takes_requests = verdict_of(await self._post(encoded_request([]))) is Verdict.TAKEN
            if not job.takes_requests:
                verdict = Verdict.MISCONFIGURED
        what = f"HTTP {answer.status}" + (f": {answer.said}" if answer.said else "")
        if verdict is Verdict.LATER:
            wait_s = retry_after_s(answer.retry_after, self._clock.now_s())
            raise Transient(self._where, what, retry_after_s=wait_s)
        if verdict is Verdict.MISCONFIGURED:
            remedy = remedy_of(answer.status, self._receiver.name)
            raise Transient(self._where, what, remedy, MISCONFIGURED_RETRY_S)
        return verdict

    def _narrow(self, job: Job, chain: Chain, verdict: Verdict, answer: Answer) -> Chain | None:
        """Make a refused request smaller, or put its one sample aside. Returns a second chain where there is one."""
        request = chain[-1]
        samples = samples_in(request)
        if verdict is Verdict.TOO_LARGE and samples > 1:
            self._shrink(samples // 2)
        if samples == 1:
            reason = Refusal.LIMIT if verdict is Verdict.TOO_LARGE else refusal_of(answer.said)
        elif verdict is Verdict.TOO_LARGE:
            return halve(chain)
        elif job.narrowing < NARROWING_REQUESTS_MAX:
            job.narrowing += 2
            return halve(chain)
        else:
            reason = Refusal.UNRESOLVED
        for piece in chain.pop():
            job.refuse(piece, reason, answer.said)
        return None

    def _shrink(self, samples: int) -> None:
        smaller = max(samples, SAMPLES_PER_REQUEST_MIN)
        if smaller < self._samples_max:
            self._samples_max = smaller
            log.warning(
                "remote_write_requests_too_large", receiver=self._receiver.name, samples_per_request=smaller
            )

    async def _post(self, body: bytes) -> Answer:
        """One request. Raises Transient where no answer came."""
        began_s = self._clock.monotonic_s()
        try:
            async with self._session().post(self._receiver.url, data=body, allow_redirects=False) as response:
                said = ""
                if response.status >= 300:
                    said = self._said(await _beginning(response))
                    if response.status < 400:
                        # Without its query, which may be ours.
                        said = self._said(response.headers.get("Location", "").partition("?")[0].encode())
                return Answer(response.status, said, response.headers.get("Retry-After", ""))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise self._no_answer(error) from None
        finally:
            self._observe_s(self._clock.monotonic_s() - began_s)

    def _no_answer(self, error: Exception) -> Transient:
        remedy = ""
        if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLError):
            remedy = f"look at ca_file of remote_write.receivers[{self._receiver.name}]"
        what = "no answer in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
        return Transient(self._where, self._said(what.encode(errors="replace")), remedy)

    def _said(self, raw: bytes) -> str:
        """Foreign words: without our secrets, printable, in one line, cut."""
        text = without(raw.decode("utf-8", "replace"), self._secrets)
        return printable(" ".join(text.split()), SAID_CHARACTERS_MAX)

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=IN_FLIGHT, ssl=self._tls()),
                timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._http

    def _tls(self) -> ssl.SSLContext | bool:
        """Raises Transient where ca_file cannot be read: it may be mounted later."""
        path = self._receiver.ca_file
        if not path:
            return True
        try:
            return ssl.create_default_context(cafile=path)
        except OSError as error:
            remedy = f"look at ca_file of remote_write.receivers[{self._receiver.name}]"
            raise Transient(self._where, f"{path}: {error}", remedy, MISCONFIGURED_RETRY_S) from error


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """What an answer begins with; nothing where it breaks: the status says enough."""
    try:
        return await response.content.read(ANSWER_BYTES_MAX)
    except (aiohttp.ClientError, OSError):
        return b""


def _credentials(receiver: Receiver) -> tuple[dict[str, str], tuple[str, ...]]:
    """Headers of every request, and the texts that nobody may read: a URL's query may be one."""
    headers = {**_HEADERS, **receiver.headers}
    secrets = [urlsplit(receiver.url).query]
    if receiver.bearer_token is not None:
        # A token from a file often ends in a new line, which no header may have.
        token = receiver.bearer_token.get_secret_value().strip()
        headers["Authorization"] = f"Bearer {token}"
        secrets.append(token)
    elif receiver.password is not None:
        password = receiver.password.get_secret_value()
        basic = b64encode(f"{receiver.username}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {basic}"
        secrets += (basic, password)
    return headers, tuple(secret for secret in secrets if secret)
