"""Points that reach a real Prometheus as late as ours do, on a time line that nobody has to wait for: what has come by a moment is written, then it is asked as of that moment."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import aiohttp
import numpy as np

from ingest.clock import SystemClock
from ingest.ports import LabelSet, SeriesSamples
from ingest.sinks.prompb import encoded_labels
from ingest.sinks.remote_write import RemoteWrite
from shard_config.remote_write import Receiver
from tests.prometheus_server import PrometheusServer

MINUTE_S = 60
TOOK_S = 5
Points = Mapping[int, float]
"""Second → value."""


def labels(metric: str, /, **others: str) -> LabelSet:
    return tuple(sorted({"__name__": metric, **others}.items()))


def seen_s(ts_s: int, settling_s: int = 0) -> int:
    """When a point of a minute has come in arrived mode: CloudWatch has it a minute after its end, the next poll brings it, which takes 5 s."""
    return math.ceil((ts_s + 2 * MINUTE_S) / 300) * 300 + TOOK_S


def sent_s(ts_s: int, settling_s: int) -> int:
    """The same in settled mode."""
    return max(seen_s(ts_s), ts_s + MINUTE_S + settling_s + TOOK_S)


class Feed:
    """Writes to a server by our own client, and asks it."""

    def __init__(self, server: PrometheusServer) -> None:
        self._server = server
        self._sink = RemoteWrite(Receiver(name="test", url=server.write_url), SystemClock())
        self._http = aiohttp.ClientSession()
        self._at_once = asyncio.Semaphore(4)

    async def close(self) -> None:
        await self._sink.close()
        await self._http.close()

    async def write(self, series: Mapping[LabelSet, Points]) -> None:
        """All of it, or the test fails."""
        written = await self._sink.write(
            [
                SeriesSamples(
                    encoded_labels(one),
                    np.array(sorted(points)) * 1000,
                    np.array([points[t] for t in sorted(points)]),
                )
                for one, points in series.items()
                if points
            ]
        )
        assert not written.refused, written.refused

    async def ask(self, expression: str, at_s: float) -> dict[LabelSet, float]:
        """An instant query's vector."""
        async with (
            self._at_once,
            self._http.get(
                f"{self._server.url}/api/v1/query", params={"query": expression, "time": str(at_s)}
            ) as response,
        ):
            answer = await response.json()
        assert answer["status"] == "success", answer
        return {
            tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in answer["data"]["result"]
        }

    async def ask_all(self, expressions: Sequence[str], at_s: float) -> list[dict[LabelSet, float]]:
        return list(await asyncio.gather(*(self.ask(one, at_s) for one in expressions)))
