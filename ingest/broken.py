"""A connection to Kafka that broke says so, under uvloop too.

aiokafka 0.14 expects an OSError of a write to a connection that was reset. uvloop's transports raise RuntimeError there (aiokafka #1038), which nothing
in aiokafka catches: a consumer's fetcher, heartbeat or coordination ends, and it reads nothing more, without a word. Resets three times a second for
ten seconds silenced four of five workers for good (the fault campaign, seed 21).

aiokafka has no hook for it: `mend` changes what its connections send by, once in a process.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError


@cache
def mend() -> None:
    """From the first call on, what is sent on a broken connection is a KafkaConnectionError, which aiokafka tries again."""
    for name in ("send", "_send_sasl_token"):
        setattr(AIOKafkaConnection, name, _translating(getattr(AIOKafkaConnection, name)))


def _translating(send: Any) -> Any:
    @wraps(send)
    def sent(self: AIOKafkaConnection, *args: Any, **kwargs: Any) -> Any:
        try:
            return send(self, *args, **kwargs)
        except RuntimeError as error:
            if not self._writer.transport.is_closing():
                raise
            self.close(reason=CloseReason.CONNECTION_BROKEN)
            raise KafkaConnectionError(f"Connection at {self.host}:{self.port} broken: {error}") from error

    return sent
