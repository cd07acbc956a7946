"""`headgate acls`: what each part of Headgate may do on Kafka, as data, and as commands for whoever administers the brokers.

* A part has exactly what it uses, on this installation's topics and groups: tests/test_kafka_acls.py runs every part on a real broker with
  these, and holds that what is not here is refused.
* Nothing here is of the cluster: not even setup may touch other topics than those that `kafka.prefix` names.

On Kafka Read, Write, Alter and Delete bring Describe along. Whoever administers the brokers makes these; Headgate itself never does.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import orjson

from ingest.errors import Fatal
from shard_config.model import Config, Kafka
from workers import local
from workers.names import exporter_group, landing_group, ledger_group, remote_write_group

Part = Literal["setup", "coordinator", "exporter", "consumer", "remote-writer", "operator", "viewer"]
"""Who speaks to Kafka. operator: a person who changes something (backfill, dead replay, positions --move, scale). viewer: one who looks (status, why)."""

PARTS: Final[tuple[Part, ...]] = get_args(Part)

Operation = Literal["Read", "Write", "Create", "Alter", "Describe", "DescribeConfigs"]


@dataclass(frozen=True, slots=True)
class Acl:
    """What a part may do with one topic, or one group, or all that begin with the name (`prefixed`)."""

    part: Part
    resource: Literal["topic", "group"]
    name: str
    operations: tuple[Operation, ...]
    prefixed: bool = False


_TOPICS: Final[Mapping[Part, Mapping[str, tuple[Operation, ...]]]] = {
    # It commits where groups start, which is an act of a reader; and `collect` grows.
    "setup": {
        "collect": ("Create", "Describe", "Read", "Alter"),
        "raw": ("Create", "Describe", "Read"),
        "ledger": ("Create", "Describe", "Read"),
        "dead": ("Create", "Describe"),
        "shards": ("Create", "Describe"),
    },
    # raw: the page says how much there is. dead, here and below: what stands on collect and shards, and is not ours, is put aside.
    "coordinator": {
        "collect": ("Write",),
        "ledger": ("Write",),
        "shards": ("Read", "Write"),
        "raw": ("Describe",),
        "dead": ("Write",),
    },
    "exporter": {
        "collect": ("Read",),
        "raw": ("Write",),
        "ledger": ("Write",),
        "shards": ("Read", "Write"),
        "dead": ("Write",),
    },
    "consumer": {"raw": ("Read",), "ledger": ("Read",), "dead": ("Write",)},
    # ledger: which looks were complete, where missing points are sent as zeros.
    "remote-writer": {"raw": ("Read",), "ledger": ("Read",), "dead": ("Write",)},
    "operator": {
        "collect": ("Read", "Write", "DescribeConfigs"),
        "raw": ("Read", "Write", "DescribeConfigs"),
        "ledger": ("Read", "Write", "DescribeConfigs"),
        "dead": ("Read", "Write", "DescribeConfigs"),
        "shards": ("Read", "DescribeConfigs"),
    },
    "viewer": {
        "collect": ("Describe",),
        "raw": ("Read",),
        "ledger": ("Read",),
        "dead": ("Read",),
        "shards": ("Read",),
    },
}

_EXPORTERS, _LANDING, _LEDGER, _RECEIVERS = "exporters", "landing", "ledger", "receivers"

_GROUPS: Final[Mapping[Part, Mapping[str, tuple[Operation, ...]]]] = {
    "setup": dict.fromkeys((_EXPORTERS, _LANDING, _LEDGER, _RECEIVERS), ("Read",)),
    "coordinator": dict.fromkeys((_EXPORTERS, _LANDING, _LEDGER, _RECEIVERS), ("Describe",)),
    "exporter": {_EXPORTERS: ("Read",)},
    "consumer": dict.fromkeys((_LANDING, _LEDGER), ("Read",)),
    "remote-writer": {_RECEIVERS: ("Read",)},
    # A shard that is scaled away is taken out of its group, which is a member's act.
    "operator": {_EXPORTERS: ("Read",), **dict.fromkeys((_LANDING, _LEDGER, _RECEIVERS), ("Describe",))},
    "viewer": dict.fromkeys((_EXPORTERS, _LANDING, _LEDGER, _RECEIVERS), ("Describe",)),
}


def acls_of(kafka: Kafka, parts: Iterable[Part] = PARTS) -> tuple[Acl, ...]:
    """What these parts may do, topics first."""
    groups = {
        _EXPORTERS: exporter_group(kafka),
        _LANDING: landing_group(kafka),
        _LEDGER: ledger_group(kafka),
        # Receivers come and go with the configuration.
        _RECEIVERS: remote_write_group(kafka, ""),
    }
    found: list[Acl] = []
    for part in parts:
        for name, operations in _TOPICS[part].items():
            found.append(Acl(part, "topic", f"{kafka.prefix}.{name}", operations))
        for name, operations in _GROUPS[part].items():
            found.append(Acl(part, "group", groups[name], operations, prefixed=name == _RECEIVERS))
    return tuple(found)


def command_of(acl: Acl, principal: str) -> str:
    """The command that grants it."""
    words = [
        "kafka-acls.sh",
        "--bootstrap-server",
        "BROKER:PORT",
        "--command-config",
        "admin.properties",
        "--add",
    ]
    words += ["--allow-principal", principal]
    words += [word for operation in acl.operations for word in ("--operation", operation)]
    words += [f"--{acl.resource}", acl.name]
    if acl.prefixed:
        words += ["--resource-pattern-type", "prefixed"]
    return shlex.join(words)


def principal_of(part: Part, given: Mapping[str, str]) -> str:
    """The part's principal: as `given`, else User:headgate-<part>."""
    return given.get(part, f"User:headgate-{part}")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "acls",
        help="what each part may do on Kafka, as commands that grant it",
        description="Prints what each part of Headgate may do on Kafka, and no more: commands of kafka-acls.sh, one for each topic and group, to be run by "
        "whoever administers the brokers, before `headgate setup`. It changes nothing itself. Parts are setup, coordinator, exporter, consumer, "
        "remote-writer, operator (backfill, dead replay, positions, scale, preflight) and viewer (status, why, bundle).",
    )
    parser.add_argument("--config", type=Path, help="headgate.yaml; default: the running local stack's")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    parser.add_argument(
        "--principal",
        action="append",
        default=[],
        metavar="PART=PRINCIPAL",
        help="who a part is, as exporter=User:CN=exporter; default: User:headgate-PART",
    )
    parser.add_argument("--format", choices=("commands", "json"), default="commands", help="(%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given = _principals(args.principal)
    config: Config = local.find_config(args.config)
    found = [(acl, principal_of(acl.part, given)) for acl in acls_of(config.kafka, args.part or PARTS)]
    if args.format == "json":
        rows = [
            {
                "part": acl.part,
                "principal": principal,
                "resource": acl.resource,
                "name": acl.name,
                "pattern": "prefixed" if acl.prefixed else "literal",
                "operations": list(acl.operations),
            }
            for acl, principal in found
        ]
        sys.stdout.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode() + "\n")
        return 0
    for acl, principal in found:
        print(command_of(acl, principal))
    return 0


def _principals(given: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in given:
        part, _, principal = one.partition("=")
        if part not in PARTS or ":" not in principal:
            raise Fatal(
                f"--principal {one}",
                "is no PART=TYPE:NAME",
                f"parts are {', '.join(PARTS)}; as exporter=User:me",
            )
        found[part] = principal
    return found
