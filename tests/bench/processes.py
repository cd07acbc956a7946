"""Processes that a bench measures from outside, with a pipe to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any


@contextmanager
def running(target: Callable[..., None], *args: object) -> Iterator[tuple[SpawnProcess, Connection]]:
    """A process with a pipe to it; it is sent None at the end."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, pipe
    finally:
        with suppress(OSError):
            pipe.send(None)
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def receive(pipe: Connection, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise RuntimeError(f"a process of the bench said nothing for {timeout_s:g} s")
    return pipe.recv()
