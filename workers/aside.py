"""What workers put aside, counted in one place: consumers of the store, exporters and the coordinator."""

from __future__ import annotations

from prometheus_client import Counter

from ingest import letters
from ingest.aside import bury
from ingest.errors import Rejected
from ingest.log import Sender, cluster_id
from ingest.ports import Record
from shard_config.model import Kafka

DEAD = Counter(
    "headgate_dead_total",
    "Dead letters, whole records and single points. Rising: see the dead-letter topic.",
    ["kind"],
)
for _kind in ("record", "point"):
    DEAD.labels(kind=_kind)


class Aside:
    """Puts whole records aside that a topic of ours should not have: `collect` and `shards`, which only Headgate writes."""

    def __init__(self, kafka: Kafka, sender: Sender) -> None:
        self._kafka = kafka
        self._sender = sender
        self._cluster = ""

    async def put(self, record: Record, error: Rejected) -> None:
        """Write its letter. Raises Transient: do the same again."""
        self._cluster = self._cluster or await cluster_id(self._kafka)
        letter = letters.of_record(record, self._cluster, error)
        await bury(self._sender, self._kafka.topic("dead"), [letter])
        DEAD.labels(kind="record").inc()
