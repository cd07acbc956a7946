"""An HTTP proxy before an S3: it refuses, loses the answers of puts that were done, cuts what is read short, or changes a byte of it.

Requests are forwarded as they were signed, so an S3 that checks signatures takes them.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import aiohttp
from aiohttp import web
from yarl import URL

from workers.servers import LOOPBACK

Fault = Literal["refuse", "lose", "truncate", "flip"]

_BODY_BYTES_MAX = 64 * 1024 * 1024
_HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "expect", "keep-alive", "content-length"})
_TIMEOUT = aiohttp.ClientTimeout(total=60)


@dataclass
class _Rule:
    fault: Fault
    methods: frozenset[str]
    left: int
    share: float = 1.0
    status: int = 503
    code: str = "SlowDown"
    checksums: bool = True


class S3Proxy:
    """Forwards to `endpoint_url`. Faults last for so many requests, or until `heal`; `struck` counts them by name."""

    def __init__(self, endpoint_url: str, *, listen: int = 0, seed: int = 1) -> None:
        self._endpoint_url = endpoint_url.rstrip("/")
        self._listen = listen
        self._rng = random.Random(f"{seed} s3")
        self._rules: list[_Rule] = []
        self.struck: Counter[str] = Counter()
        self.asked: list[tuple[str, str]] = []
        """(method, path) of all that came, the refused included."""

    async def __aenter__(self) -> Self:
        # Bodies go through as they are, never unpacked.
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT, auto_decompress=False)
        app = web.Application(client_max_size=_BODY_BYTES_MAX)
        app.router.add_route("*", "/{any:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, self._listen)
        await site.start()
        self.port: int = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
        await self._session.close()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def refuse(
        self, status: int, code: str, *methods: str, times: int = 1_000_000, share: float = 1.0
    ) -> None:
        """Answer such requests with an error, and do not do what they ask: 503 SlowDown, 409 ConditionalRequestConflict."""
        self._rules.append(_Rule("refuse", frozenset(methods), times, share, status, code))

    def lose_answers(self, *, times: int = 1_000_000, share: float = 1.0) -> None:
        """Do what a PUT asks, and break the connection instead of saying so: whoever asks again hears 412 of its own object."""
        self._rules.append(_Rule("lose", frozenset({"PUT"}), times, share))

    def truncate(self, *, times: int = 1_000_000, share: float = 1.0) -> None:
        """Of what a GET gives send the first half, then break the connection."""
        self._rules.append(_Rule("truncate", frozenset({"GET"}), times, share))

    def flip(self, *, times: int = 1_000_000, share: float = 1.0, checksums: bool = True) -> None:
        """Change one bit of what a GET gives; without `checksums`, leave out S3's own, as an S3 does that has none."""
        self._rules.append(_Rule("flip", frozenset({"GET"}), times, share, checksums=checksums))

    def heal(self) -> None:
        self._rules.clear()

    def _rule_for(self, method: str) -> _Rule | None:
        for rule in self._rules:
            if method in rule.methods and rule.left and self._rng.random() < rule.share:
                rule.left -= 1
                return rule
        return None

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        try:
            body = await request.read()
        except OSError:
            return web.Response()  # whoever asked is gone
        rule = self._rule_for(request.method)
        if rule is not None and rule.fault == "refuse":
            self.struck[f"{rule.status}"] += 1
            text = f"<Error><Code>{rule.code}</Code><Message>of this test</Message></Error>"
            return web.Response(status=rule.status, text=text, content_type="application/xml")
        answer, content = await self._forward(request, body)
        if rule is not None and rule.fault == "lose":
            self.struck["lost"] += 1
            return await _broken(request)
        if rule is not None and content and answer.status in (200, 206):
            self.struck[rule.fault] += 1
            if rule.fault == "truncate":
                return await _cut(request, answer, content)
            content = _flipped(content, self._rng)
        headers = _headers(answer)
        if rule is not None and not rule.checksums:
            headers = {k: v for k, v in headers.items() if not k.lower().startswith("x-amz-checksum-")}
        return web.Response(status=answer.status, headers=headers, body=content)

    async def _forward(self, request: web.Request, body: bytes) -> tuple[aiohttp.ClientResponse, bytes]:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        url = URL(self._endpoint_url + request.raw_path, encoded=True)
        async with self._session.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        ) as answer:
            return answer, await answer.read()


def _headers(answer: aiohttp.ClientResponse) -> dict[str, str]:
    kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
    if answer.method == "HEAD" and "Content-Length" in answer.headers:
        kept["Content-Length"] = answer.headers["Content-Length"]
    return kept


def _flipped(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


async def _cut(request: web.Request, answer: aiohttp.ClientResponse, content: bytes) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers=_headers(answer))
    response.content_length = len(content)
    await response.prepare(request)
    await response.write(content[: len(content) // 2])
    await asyncio.sleep(0)
    return await _broken(request)


async def _broken(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.close()
    return web.Response()
