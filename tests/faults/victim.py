"""The real consumer in a process of its own, with a point at which it stops.

A failpoint is a name and which time it is reached, as `before_commit:3`, or `none`. The points are planted here, from outside.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import structlog

from ingest import group
from ingest.group import Consumer
from ingest.sinks import connection, postgres
from ingest.sinks.postgres import PostgresSink
from shard_config.model import Config
from workers import consumer, reading
from workers.lifecycle import Lifecycle, run_worker

_log = structlog.get_logger()

PR_SET_PDEATHSIG = 1
SESSION_TIMEOUT_S = 3
"""Shorter than a configuration may be, for tests do not wait."""


def before_commit(nth: int) -> None:
    """Hang for ever between the store's commit and Kafka's."""
    reached = count(1)
    commit = Consumer.commit

    async def patched(self: Consumer, next_offsets: Mapping[int, group.Committable]) -> None:
        if self.topic.endswith(".raw") and next_offsets and next(reached) == nth:
            _log.warning("failpoint_reached")
            await asyncio.Event().wait()
        await commit(self, next_offsets)

    Consumer.commit = patched  # type: ignore[method-assign]


def before_landing(nth: int) -> None:
    """Be stopped with records in hand, before anything is asked of the store."""
    setattr(PostgresSink, "land", _stopped_before(PostgresSink.land, nth))  # noqa: B010


def in_transaction(nth: int) -> None:
    """Be stopped when the position has been moved and no row sent: the transaction stays open."""
    setattr(postgres, "_insert_rows", _stopped_before(postgres._insert_rows, nth))  # noqa: B010


def _stopped_before(function: Callable[..., Awaitable[Any]], nth: int) -> Callable[..., Awaitable[Any]]:
    reached = count(1)

    async def patched(*args: Any) -> Any:
        if next(reached) == nth:
            _log.warning("failpoint_reached")
            os.kill(os.getpid(), signal.SIGSTOP)
        return await function(*args)

    return patched


def impatient(seconds: int) -> None:
    """Not a point, but shorter times: so long for a landing and a connection, until Kafka is asked for its topics again, and until anything is
    tried again."""
    assert PostgresSink.connect.__kwdefaults__ is not None
    PostgresSink.connect.__kwdefaults__["timeout_s"] = seconds
    connection.CONNECT_TIMEOUT_S = seconds
    group.METADATA_MAX_AGE_S = seconds
    pause = Lifecycle.pause

    async def patched(self: Lifecycle, wanted_s: float, *events: asyncio.Event) -> bool:
        return await pause(self, min(wanted_s, seconds), *events)

    setattr(Lifecycle, "pause", patched)  # noqa: B010


def short_drain(seconds: int) -> None:
    """Not a point: so long for what is in the works when told to stop."""
    reading.DRAIN_S = seconds


def hoarding(_: int) -> None:
    """Not a point, but a consumer that takes all that Kafka has: what its memory is watched for."""
    reading.POLL_RECORDS_MAX = 1_000_000
    init = Consumer.__init__

    def patched(self: Consumer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._options |= {"fetch_max_bytes": 2**30, "max_partition_fetch_bytes": 2**30}

    Consumer.__init__ = patched  # type: ignore[method-assign]


FAILPOINTS = {
    f.__name__: f for f in (before_commit, before_landing, in_transaction, impatient, short_drain, hoarding)
}


def run(config_json: str, name: str, failpoint: str, log: Path) -> NoReturn:
    """What a forked process does: logs into the file, and ends with the worker's exit code, or with the process that it was forked from."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    config = Config.model_validate_json(config_json)
    kafka = config.kafka.model_copy(update={"session_timeout_s": SESSION_TIMEOUT_S})
    config = config.model_copy(update={"kafka": kafka})
    point, _, nth = failpoint.partition(":")
    if point != "none":
        FAILPOINTS[point](int(nth))
    sys.exit(run_worker(name, partial(consumer.serve, config, name)))
