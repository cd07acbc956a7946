"""A TCP proxy that behaves as a bad network does: slow, narrow, silent in one direction or in both, cut, or closed at one end only.

What it does to a connection of its client, and to those that come later:

| call | connections of now | later ones |
| --- | --- | --- |
| `stall` | forward nothing until `resume`; then all arrives | the same |
| `cut(way)` | the same, in one direction: requests arrive and answers do not, or the other way round | the same |
| `blackhole` | silent for ever | silent until `resume` |
| `blackhole_in_copy` | the same, in the middle of a COPY | the same |
| `lose_answer_to` | forward what has these bytes, and no answer any more until `resume` | no answers |
| `half_open` | closed at the server's end; the client's stays open, and swallows | work |
| `reset` | end, with RST at both ends | work |
| `down` | end, with RST at both ends | end as soon as they have begun, until `resume` |
| `latency_s`, `bytes_per_s` | late, narrow | late, narrow |
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Self

from workers.servers import LOOPBACK

COPY_SIGNATURE = b"PGCOPY\n\xff\r\n\0"
_CHUNK_BYTES = 65_536
_CONNECT_TIMEOUT_S = 5.0
_SLICES_A_SECOND = 20
"""Of a narrow connection: it dribbles instead of sending in bursts."""
_LINGER_NONE = struct.pack("ii", 1, 0)


class Way(Enum):
    """The two directions of a connection."""

    TO_SERVER = "to server"
    TO_CLIENT = "to client"


@dataclass(eq=False)
class _Connection:
    """One of a client's. A way's event is set where it is forwarded."""

    client: asyncio.StreamWriter
    ways: dict[Way, asyncio.Event] = field(default_factory=lambda: {way: asyncio.Event() for way in Way})
    server: asyncio.StreamWriter | None = None
    forgotten: bool = False
    """Silent for ever: nobody will resume it."""

    def reset(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                _reset(writer)


class Proxy:
    """Forwards to one address, as long as it is let.

    A silent connection stays open on both sides, whatever its ends do: neither hears that the other is gone.
    """

    def __init__(self, host: str, port: int, *, listen: int = 0) -> None:
        """`listen` is its own port, where that has to be known before: a broker's, that says where it is to be found."""
        self._upstream = host, port
        self._listen = listen
        self._connections: set[_Connection] = set()
        self._flowing = dict.fromkeys(Way, True)
        self._refusing = False
        self._copies_left = 0
        self._unanswered = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self.latency_s = 0.0
        """Added to each read of up to 64 kB, in each direction."""
        self.bytes_per_s: float | None = None
        """Of each connection and direction; None: as fast as it goes."""
        self.fell_silent = asyncio.Event()
        """A `blackhole_in_copy` or a `lose_answer_to` has come about."""
        self.accepted = 0
        """Connections, since the beginning."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, self._listen)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def open(self) -> int:
        """Connections that a client has now, silent ones included."""
        return len(self._connections)

    def stall(self) -> None:
        """Forward nothing until `resume`: what was on its way arrives then."""
        for way in Way:
            self.cut(way)

    def cut(self, way: Way) -> None:
        """Forward nothing in this direction until `resume`: what was on its way arrives then."""
        self._flowing[way] = False
        for connection in self._connections:
            connection.ways[way].clear()

    def resume(self) -> None:
        """Forward again, at once and at full speed, new connections too; those of before a `blackhole` stay silent."""
        self._refusing = False
        self._flowing = dict.fromkeys(Way, True)
        self.latency_s, self.bytes_per_s = 0.0, None
        for connection in self._connections:
            if not connection.forgotten:
                for way in connection.ways.values():
                    way.set()

    def blackhole(self) -> None:
        """Connections of now are silent for ever, new ones as long as nobody calls `resume`."""
        self.stall()
        for connection in self._connections:
            connection.forgotten = True

    def blackhole_in_copy(self, nth: int) -> None:
        """Blackhole in the middle of the nth binary COPY from now on that is longer than its first kilobyte."""
        self._copies_left = nth

    def lose_answer_to(self, said: bytes) -> None:
        """Cut the way to the clients as soon as one says these bytes, which still arrive."""
        self._unanswered = said

    def half_open(self) -> int:
        """Close connections of now at the server's end and tell no client: as where a server's machine was lost. Returns how many."""
        struck = [one for one in self._connections if not one.forgotten]
        for connection in struck:
            connection.forgotten = True
            for way in connection.ways.values():
                way.clear()
            if connection.server is not None:
                _reset(connection.server)
        return len(struck)

    def bury(self) -> int:
        """End at both ends what a `blackhole` or `half_open` has left silent, as keepalives do in time. Returns how many."""
        struck = [one for one in self._connections if one.forgotten]
        for connection in struck:
            connection.reset()
        return len(struck)

    def reset(self) -> int:
        """End connections of now with RST at both ends. Returns how many."""
        struck = list(self._connections)
        for connection in struck:
            connection.reset()
        return len(struck)

    def down(self) -> int:
        """As where nobody listens: end all connections, and new ones until `resume`. Returns how many were ended."""
        self._refusing = True
        return self.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._refusing:
            _reset(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        connection = _Connection(writer)
        for way, event in connection.ways.items():
            if self._flowing[way]:
                event.set()
        self._connections.add(connection)
        try:
            await self._forward(connection, reader)
        except asyncio.CancelledError:
            pass  # at the end of the test; asyncio's own callback would log it
        finally:
            self._connections.discard(connection)
            writer.transport.abort()
            if connection.server is not None:
                connection.server.transport.abort()

    async def _forward(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        await connection.ways[Way.TO_SERVER].wait()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                from_server, to_server = await asyncio.open_connection(*self._upstream)
        except (OSError, TimeoutError):
            return
        connection.server = to_server
        to_client = connection.client
        try:
            async with asyncio.TaskGroup() as group:
                copies = self._in_copy
                group.create_task(self._pump(reader, to_server, connection, Way.TO_SERVER, copies))
                group.create_task(self._pump(from_server, to_client, connection, Way.TO_CLIENT, None))
        except* OSError:
            pass

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: _Connection,
        way: Way,
        seen: Callable[[bytes], int | None] | None,
    ) -> None:
        """`seen` says after how many of its bytes the network falls silent, or None."""
        flows = connection.ways[way].wait
        while data := await reader.read(self._most_bytes()):
            if self._unanswered and self._unanswered in data and way is Way.TO_SERVER:
                self._unanswered = b""
                self.cut(Way.TO_CLIENT)
                self.fell_silent.set()
            if seen is not None and (after := seen(data)) is not None:
                await flows()
                writer.write(data[:after])
                self.blackhole()
                self.fell_silent.set()
                data = data[after:]
            if late_s := self.latency_s + len(data) / (self.bytes_per_s or float("inf")):
                await asyncio.sleep(late_s)
            await flows()
            writer.write(data)
            await writer.drain()
        await flows()
        writer.close()

    def _most_bytes(self) -> int:
        """What goes through at once."""
        if self.bytes_per_s is None:
            return _CHUNK_BYTES
        return max(1, min(_CHUNK_BYTES, int(self.bytes_per_s / _SLICES_A_SECOND)))

    def _in_copy(self, data: bytes) -> int | None:
        at = data.find(COPY_SIGNATURE) if self._copies_left else -1
        if at < 0 or len(data) <= at + 1024:
            return None
        self._copies_left -= 1
        return None if self._copies_left else at + 1024


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: the peer hears an error, and not an end."""
    if (raw := writer.get_extra_info("socket")) is not None and not writer.transport.is_closing():
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    writer.transport.abort()
