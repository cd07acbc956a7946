"""`headgate doctor`: what is wrong with a Helm release's pods, in plain words, and what to do. Reads the Kubernetes API, changes nothing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from ingest.clock import SystemClock, utc
from ingest.errors import Rejected

if TYPE_CHECKING:
    from workers.pods.diagnosis import Report


def render(report: Report) -> Iterator[str]:
    """For people, line by line. What several pods have in common is said once."""
    common: dict[tuple[str, str], list[int]] = {}
    for index, verdict in enumerate(report.verdicts):
        common.setdefault((verdict.what, verdict.remedy), []).append(index)
    for (what, remedy), indices in common.items():
        pods = [report.verdicts[i].pod for i in indices]
        yield f"{', '.join(dict.fromkeys(pods))}: {what}"
        first, *rest = report.verdicts[indices[0]].evidence.splitlines() or [""]
        yield f"  evidence  {first}"
        yield from (f"            {line}" for line in rest)
        yield f"  remedy    {remedy}"
        yield ""
    if report.starting:
        yield f"starting: {', '.join(report.starting)}"
    if report.fine:
        yield f"fine: {', '.join(report.fine)}"
    if report.unseen:
        yield f"not looked at: {'; '.join(report.unseen)}"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is wrong with a Helm release's pods, and what to do",
        description="Looks at a release's pods, events, nodes, volume claims, quotas and memory through the Kubernetes API, and says what is wrong "
        "in plain words, with the evidence and a remedy in numbers: the request to set, the nodes to add, the toleration to write down. Changes "
        "nothing. It takes the cluster of KUBECONFIG, or of the pod that it runs in. What it may not read it names. Exit code 1 where something is wrong.",
    )
    parser.add_argument("--release", metavar="R", help="default: the only one of the namespace")
    parser.add_argument("--namespace", metavar="N", help="default: the context's")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        from workers.pods.cluster import Cluster, look
        from workers.pods.diagnosis import diagnose
    except ModuleNotFoundError as error:
        print(f"headgate doctor: {error}: pip install 'headgate[kubernetes]'", file=sys.stderr)
        return 2
    try:
        cluster = Cluster()
    except Rejected as error:
        print(f"headgate: {error}", file=sys.stderr)
        return 2
    with cluster:
        seen = look(cluster, args.namespace or cluster.namespace or "default", args.release)
    report = diagnose(seen, utc(SystemClock().now_s()))
    if args.format == "json":
        print(json.dumps(asdict(report), indent=2))
    else:
        print("\n".join(render(report)))
    return 1 if report.verdicts else 0
