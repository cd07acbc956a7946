"""What the sources share: how a look is run, what its outcome says, and how the source's own clock is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime

from ingest.errors import HeadgateError
from ingest.model import Batch, Outcome, Target

QUEUE_MAX = 4
"""Batches that wait for the consumer; past that, the look waits."""
DETAIL_CHARS_MAX = 300

Emit = Callable[[Batch], Awaitable[None]]


async def relay(produce: Callable[[Emit], Awaitable[Outcome]]) -> AsyncGenerator[Batch | Outcome, None]:
    """What `produce` emits, and last the Outcome that it returns.

    `produce` runs in a task that this generator owns: a TaskGroup or a timeout that is open across a `yield` would cancel
    the consumer instead of itself (PEP 789). Closing the generator early cancels the task and waits for it; a consumer
    that may stop early uses `contextlib.aclosing`. An exception of `produce` is raised here.
    """
    slots = asyncio.Semaphore(QUEUE_MAX)
    queue: asyncio.Queue[Batch | None] = (
        asyncio.Queue()
    )  # bounded by the slots; the end of the task always has room

    async def emit(batch: Batch) -> None:
        await slots.acquire()
        queue.put_nowait(batch)

    task = asyncio.ensure_future(produce(emit))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (batch := await queue.get()) is not None:
            slots.release()
            yield batch
        yield await task
    finally:
        task.cancel()
        await asyncio.wait([task])


def said_of(failure: HeadgateError, account: str) -> str:
    """What a failure says, but for the account and region: a look's detail names those already."""
    where = " ".join(word for word in failure.where.split() if account not in word)
    return f"{where}: {failure.what}" + (f" ({failure.remedy})" if failure.remedy else "")


def detail_of(target: Target, service: str, said: Sequence[str]) -> str:
    """Where, and all that is to be said, cut where that is too long. Empty where nothing is to be said."""
    text = f"{target} {service}: {'; '.join(said)}" if said else ""
    return text if len(text) <= DETAIL_CHARS_MAX else text[: DETAIL_CHARS_MAX - 1] + "…"


def date_ms(header: str | None) -> int | None:
    """An HTTP `Date` header as milliseconds since the epoch; None where it is missing or unreadable."""
    if not header:
        return None
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    return int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()) * 1000
