"""A TCP proxy that can fall silent: a server at a standstill, or a network that swallows everything and closes nothing."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from workers.servers import LOOPBACK

COPY_SIGNATURE = b"PGCOPY\n\xff\r\n\0"
_CHUNK_BYTES = 65_536


class Proxy:
    """Forwards to one address, as long as it is let.

    A silent connection stays open on both sides, whatever its ends do: neither hears that the other is gone.
    """

    def __init__(self, host: str, port: int) -> None:
        self._upstream = host, port
        self._flows: list[asyncio.Event] = []
        """One a connection that may yet be heard again; set where it is forwarded."""
        self._flowing = True
        self._copies_left = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.fell_silent = asyncio.Event()
        """A `blackhole_in_copy` has come about."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stall(self) -> None:
        """Forward nothing until `resume`: what was on its way arrives then."""
        self._flowing = False
        for flow in self._flows:
            flow.clear()

    def resume(self) -> None:
        """Forward again, new connections too; those of before a `blackhole` stay silent."""
        self._flowing = True
        for flow in self._flows:
            flow.set()

    def blackhole(self) -> None:
        """Connections of now are silent for ever, new ones as long as nobody calls `resume`."""
        self.stall()
        self._flows.clear()

    def blackhole_in_copy(self, nth: int) -> None:
        """Blackhole in the middle of the nth binary COPY from now on that is longer than its first kilobyte."""
        self._copies_left = nth

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        flow = asyncio.Event()
        if self._flowing:
            flow.set()
        self._flows.append(flow)
        try:
            await flow.wait()
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, upstream_writer, flow, copies=True))
                group.create_task(self._pump(upstream_reader, writer, flow))
        except* OSError:
            pass
        except* asyncio.CancelledError:
            pass  # at the end of the test; asyncio's own callback would log it
        finally:
            writer.transport.abort()
            upstream_writer.transport.abort()
            if flow in self._flows:
                self._flows.remove(flow)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        flow: asyncio.Event,
        *,
        copies: bool = False,
    ) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            at = data.find(COPY_SIGNATURE) if copies and self._copies_left else -1
            if at >= 0 and len(data) > at + 1024:
                self._copies_left -= 1
                if not self._copies_left:
                    await flow.wait()
                    writer.write(data[: at + 1024])
                    self.blackhole()
                    self.fell_silent.set()
                    data = data[at + 1024 :]
            await flow.wait()
            writer.write(data)
            await writer.drain()
        await flow.wait()
        writer.close()
