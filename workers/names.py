"""Names that two workers must agree on, made from the configuration."""

from __future__ import annotations

from shard_config.model import Kafka


def exporter_group(kafka: Kafka) -> str:
    return f"{kafka.prefix}.exporters"


def landing_group(kafka: Kafka) -> str:
    return f"{kafka.prefix}.postgres"


def ledger_group(kafka: Kafka) -> str:
    return f"{kafka.prefix}.ledger"


def remote_write_group(kafka: Kafka, receiver: str) -> str:
    return f"{kafka.prefix}.remote-write.{receiver}"
