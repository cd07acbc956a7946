"""`headgate …`: one command, a subcommand per job. Each lives in the module of its worker.

Exit codes: 0 done, 1 it failed or something is not as it should be, 2 the command line or the configuration is wrong, 3 stopped for
safety.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from shard_config.load import ConfigErrors

from ingest.errors import Fatal, HeadgateError

COMMANDS = (
    "run",
    "local",
    "status",
    "samples",
    "check",
    "setup",
    "coordinator",
    "exporter",
    "consumer",
    "simulator",
)
"""Modules of this package that register a subcommand, in the order of `--help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="headgate",
        description="The metrics of hundreds of AWS accounts in one trustworthy, affordable, queryable store.",
        epilog="`headgate COMMAND --help` explains a command. `make run` starts everything on this machine.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"workers.{name}").register(commands)
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
