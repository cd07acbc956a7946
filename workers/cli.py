"""`headgate …`: one command, a subcommand per job. Each lives in the module of its worker.

Exit codes: 0 done, 1 it failed or something is not as it should be, 2 the command line or the configuration is wrong, 3 stopped for
safety.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ingest.errors import Fatal, HeadgateError
from shard_config.load import ConfigErrors

COMMANDS = {
    "run": "run",
    "scale": "scale",
    "down": "local",
    "status": "status",
    "gaps": "gaps",
    "cost": "cost",
    "inventory": "inventory",
    "report": "report",
    "audit": "audit",
    "why": "why",
    "settle": "settle",
    "bundle": "bundle",
    "backfill": "backfill",
    "samples": "samples",
    "check": "check",
    "import": "yace",
    "rules": "rules",
    "dashboards": "dashboards",
    "compare": "compare",
    "preflight": "preflight",
    "quote": "quote",
    "plan": "plan",
    "pause": "pause",
    "resume": "pause",
    "dead": "dead",
    "doctor": "doctor",
    "acls": "acls",
    "setup": "setup",
    "positions": "positions",
    "snapshot": "snapshot",
    "restore": "restore",
    "coordinator": "coordinator",
    "exporter": "exporter",
    "consumer": "consumer",
    "remote-write": "remote_writer",
    "simulate": "simulator",
}
"""Subcommand → the module of this package that registers it, in the order of `--help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="headgate",
        description="The metrics of hundreds of AWS accounts in one trustworthy, affordable, queryable store.",
        epilog="`headgate COMMAND --help` explains a command. `make run` starts everything on this machine.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # A command imports what it needs and nothing else: all of it takes a second.
    asked = COMMANDS.get(argv[0]) if argv else None
    for module in dict.fromkeys([asked] if asked else COMMANDS.values()):
        importlib.import_module(f"workers.{module}").register(commands)
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except ConfigErrors as errors:
        print(errors, file=sys.stderr)
        return 2
    except HeadgateError as error:
        print(f"headgate: {error}", file=sys.stderr)
        return 3 if isinstance(error, Fatal) else 1
    except BrokenPipeError:
        return 0  # whoever read our output has seen enough
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
