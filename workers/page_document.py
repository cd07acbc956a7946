"""The live page as it is sent: one HTML file, and its data as bytes that were made before.

* The Content-Security-Policy lets the file's own script and style run, by their hashes, and nothing else; nothing is loaded from outside,
  and a script that would make markup from text is refused (trusted types).
* There are no parameters.
"""

from __future__ import annotations

import asyncio
import gzip
from dataclasses import dataclass
from importlib.resources import files
from typing import Self

import orjson
from aiohttp import web

from ingest.clock import Clock
from ingest.inline import source_of
from workers.lifecycle import Lifecycle
from workers.page_facts import Json

FILE = "page.html"
WATCHED_S = 30.0
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Packed:
    """/page.json, plain and as gzip."""

    plain: bytes
    gzipped: bytes

    @classmethod
    def of(cls, page: Json) -> Self:
        """Milliseconds of work for 2,000 targets: not for an event loop."""
        plain = orjson.dumps(page)
        return cls(plain, gzip.compress(plain, 3))


class Document:
    """Answers requests. `data` is what /page.json gives; whoever makes it waits for `wanted` between two."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._html, self._policy = read()
        self._asked_s = float("-inf")
        self.data = Packed.of({})
        self.wanted = asyncio.Event()
        """Set by the first request after nobody has asked for WATCHED_S."""

    def serve(self, lifecycle: Lifecycle) -> None:
        """At `/` and `/page.json` from now on."""
        lifecycle.views[""] = self._page
        lifecycle.views["page.json"] = self._json

    @property
    def watched(self) -> bool:
        """Whether somebody has asked within WATCHED_S."""
        return self._clock.monotonic_s() - self._asked_s <= WATCHED_S

    def _page(self, _: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": self._policy, **_HEADERS}
        return web.Response(body=self._html, content_type="text/html", charset="utf-8", headers=headers)

    def _json(self, request: web.Request) -> web.Response:
        if not self.watched:
            self.wanted.set()
        self._asked_s = self._clock.monotonic_s()
        # Ages are by this clock: the reader's may be another, and a replay's is.
        headers = {"X-Headgate-Now-Ms": str(self._clock.now_ms()), "Vary": "Accept-Encoding", **_HEADERS}
        body = self.data.plain
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body, headers["Content-Encoding"] = self.data.gzipped, "gzip"
        return web.Response(body=body, content_type="application/json", headers=headers)


def read() -> tuple[bytes, str]:
    """The file, and the Content-Security-Policy for it."""
    html = (files("workers") / FILE).read_text("utf-8")
    script, style = (source_of(html, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    return html.encode(), policy
