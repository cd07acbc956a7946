"""Three Kafka brokers that replicate, to kill and pause them one by one. Each is a controller, too: with two gone there is no quorum."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from workers.servers import LOOPBACK, KafkaServer

BROKERS = 3

_QUICK = """
# A broker that says nothing is out after three seconds, not nine and thirty.
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=3000
replica.lag.time.max.ms=3000
controller.quorum.election.timeout.ms=500
controller.quorum.fetch.timeout.ms=1500
controller.socket.timeout.ms=2000
"""


class Quick(KafkaServer):
    """A broker that takes a quarter of a gigabyte, and starts sooner."""

    def _java(self, *options: str) -> list[str]:
        # C1 only: none of them lives long enough for C2 to pay.
        return super()._java("-Xmx256m", "-XX:TieredStopAtLevel=1", *options)

    def signal(self, number: signal.Signals) -> None:
        assert self.pid is not None
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """With SIGKILL; `launch` starts it again."""
        if self.pid is not None:
            self.signal(signal.SIGKILL)
            self.stop()


class Broker(Quick):
    """One of a cluster."""

    def __init__(self, home: Path, node: int) -> None:
        self.name = f"kafka-{node}"
        super().__init__(home)
        self.node = node
        self.voters = ""
        """`node@host:port,…` of all: known when all have their ports."""

    @property
    def voter(self) -> str:
        return f"{self.node}@{LOOPBACK}:{self._controller_port}"

    def copy_of(self, first: Broker) -> None:
        """Take over what the first was formatted as, under a name of our own: saves a Java process each."""
        shutil.copytree(first.dir / "data", self.dir / "data")
        meta = self.dir / "data" / "meta.properties"
        text = re.sub(r"node\.id=\d+", f"node.id={self.node}", meta.read_text())
        # Twenty-two letters of base64: another one of them is another id.
        meta.write_text(re.sub(r"(directory\.id=.{10}).", rf"\g<1>{self.node}", text))

    def _properties(self) -> str:
        # Of two lines with one key the last counts.
        return (
            super()._properties()
            + _QUICK
            + f"""
node.id={self.node}
controller.quorum.voters={self.voters}
default.replication.factor={BROKERS}
offsets.topic.replication.factor={BROKERS}
"""
        )


class Cluster:
    """Started by `start`, which takes ten seconds; `brokers` are its members."""

    def __init__(self, home: Path) -> None:
        self.brokers: Sequence[Broker] = [Broker(home, node) for node in range(1, BROKERS + 1)]
        for broker in self.brokers:
            broker.voters = ",".join(one.voter for one in self.brokers)

    @property
    def bootstrap(self) -> str:
        return ",".join(broker.bootstrap for broker in self.brokers)

    def start(self) -> None:
        """Raises Fatal."""
        first, *others = self.brokers
        first.prepare()
        for broker in others:
            broker.copy_of(first)
            broker.prepare()
        try:
            for broker in self.brokers:
                broker.launch()
            for broker in self.brokers:
                broker.wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for broker in self.brokers:
            broker.kill()
