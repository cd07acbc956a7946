"""What every worker process has: logs, signals, /metrics /healthz /readyz.

* Logs are one JSON object a line on stderr (console form on a terminal).
* SIGTERM and SIGINT set `stop`; a worker then drains and returns. A second signal ends it at once. SIGHUP sets `hangup`: read
  the configuration again (`workers.reload`).
* `/healthz` answers while the event loop turns, and says 503 where one of the worker's own loops has stood still for STILL_S; `/readyz` when the worker has what it needs; a worker may have pages of its own (`pages`, `views`).
  Nothing else is served, and nothing changes state. Connections are bounded: for one too many the oldest is closed, so that whoever holds them
  open keeps nobody out for long, a probe least of all.
* An unexpected error ends the process with its traceback in the log and exit code 1; the process manager starts it again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
import uvloop
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from ingest.errors import Fatal, HeadgateError

_log = structlog.get_logger()

STILL_S = 600.0
"""A loop that has not come round for so long hangs: no outage or drain takes it, and by then Kafka's group has given its partitions to others
(`max_poll_interval_ms`). Much less would restart workers for an outage of Kafka, which helps nobody.
"""


CONNECTIONS_MAX = 64
KEEP_ALIVE_S = 75.0
"""Above what Prometheus and probes rest between two requests; aiohttp's own is an hour."""
_LIMITS: Mapping[str, Any] = {
    "keepalive_timeout": KEEP_ALIVE_S,
    "max_line_size": 4096,
    "max_field_size": 4096,
    "max_headers": 64,
    # A body that nobody asked for is not waited for.
    "lingering_time": 1.0,
}


class Lifecycle:
    """Handed to a worker's main: when to stop, and where to say that it is ready."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hangup = asyncio.Event()
        self.ready = False
        self.pages: dict[str, Callable[[], object]] = {}
        """By name (`shards` is served as /shards): gives what the page shows, fit for JSON."""
        self.views: dict[str, Callable[[web.Request], web.StreamResponse]] = {}
        """The same for what is no plain JSON; the name "" is served as /."""
        self._beats: dict[str, float] = {}

    def beat(self, loop: str) -> None:
        """Said by each of a worker's loops, by its name, when it comes round."""
        self._beats[loop] = asyncio.get_running_loop().time()

    def ended(self, loop: str) -> None:
        """Said of a loop that comes round no more, and should not."""
        self._beats.pop(loop, None)

    def still(self, now_s: float) -> dict[str, float]:
        """The loops that have not come round for STILL_S, on the event loop's clock: by name, since how many seconds."""
        return {name: now_s - at_s for name, at_s in self._beats.items() if now_s - at_s > STILL_S}

    async def pause(self, seconds: float, *events: asyncio.Event) -> bool:
        """Wait, or be woken by `stop` or one of the events; True where it is time to stop."""
        waiting = [asyncio.create_task(event.wait()) for event in (self.stop, *events)]
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
        return self.stop.is_set()


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """What every worker's command line has."""
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of /metrics, /healthz, /readyz (%(default)s)"
    )
    parser.add_argument("--metrics-port", type=int, default=0, help="their port; 0: none")


def run_worker(
    name: str, main: Callable[[Lifecycle], Awaitable[None]], *, host: str = "127.0.0.1", metrics_port: int = 0
) -> int:
    """Run one worker until it ends or is told to stop; returns the process's exit code."""
    configure_logs(name)
    try:
        try:
            uvloop.run(_serve(main, host, metrics_port))
        except BaseExceptionGroup as group:
            # Of several errors at once the gravest decides; the others came of the same stop.
            if (fatal := group.subgroup(Fatal)) is not None:
                raise _first(fatal) from group
            if (known := group.subgroup(HeadgateError)) is not None:
                raise _first(known) from group
            raise
    except Fatal as error:
        _log.critical("worker_stopped_for_safety", where=error.where, what=error.what, remedy=error.remedy)
        return 3
    except HeadgateError as error:
        _log.error("worker_failed", error=str(error))
        return 1
    except Exception:
        _log.exception("worker_crashed")
        return 1
    return 0


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _serve(main: Callable[[Lifecycle], Awaitable[None]], host: str, metrics_port: int) -> None:
    lifecycle = Lifecycle()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if lifecycle.stop.is_set():
            os._exit(130)
        lifecycle.stop.set()

    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, on_signal)
    loop.add_signal_handler(signal.SIGHUP, lifecycle.hangup.set)
    runner = web.AppRunner(_application(lifecycle), access_log=None, **_LIMITS)
    await runner.setup()
    listening: asyncio.Server | None = None
    try:
        if metrics_port:
            listening = await listen(runner, host, metrics_port)
        _log.info("worker_started", metrics_port=metrics_port)
        await main(lifecycle)
        _log.info("worker_stopped")
    finally:
        if listening is not None:
            listening.close()
        await runner.cleanup()


async def listen(runner: web.AppRunner, host: str, port: int) -> asyncio.Server:
    """Serve a runner that was set up, with CONNECTIONS_MAX connections at most. Raises OSError where the address cannot be had."""
    server = runner.server
    assert server is not None  # noqa: S101  # it was set up

    def connected() -> asyncio.Protocol:
        for oldest in server.connections[: 1 - CONNECTIONS_MAX]:
            if (transport := oldest.transport) is not None:
                transport.abort()
        return server()

    return await asyncio.get_running_loop().create_server(connected, host, port, backlog=128)


def _application(lifecycle: Lifecycle) -> web.Application:
    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        still = lifecycle.still(asyncio.get_running_loop().time())
        said = "".join(f"{name} has stood still for {s:.0f} s\n" for name, s in still.items())
        return web.Response(text=said or "ok\n", status=503 if still else 200)

    async def readyz(_: web.Request) -> web.Response:
        return (
            web.Response(text="ready\n") if lifecycle.ready else web.Response(text="not ready\n", status=503)
        )

    async def page(request: web.Request) -> web.StreamResponse:
        # Looked up at each request: a worker adds its pages when it has something to show.
        name = request.match_info.get("page", "")
        if view := lifecycle.views.get(name):
            return view(request)
        show = lifecycle.pages.get(name)
        return web.json_response(show()) if show else web.Response(text="no such page\n", status=404)

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    app.add_routes([web.get("/", page), web.get("/{page}", page)])
    return app


def configure_logs(worker: str) -> None:
    """Structured logs on stderr, this process's name in each."""
    renderer: Any = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(worker=worker)
    # Libraries log by the standard module: their warnings go to the same place, in their own form.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
