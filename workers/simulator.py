"""A simulated AWS over HTTP, for trying things out and for sizing before paying.

* It speaks CloudWatch's `json` and `smithy-rpc-v2-cbor`, STS's `query`, and the `json` of Organizations and of tag:GetResources, on
  one port; and what an inventory asks: Describe and List calls of seven services, and AWS Config's aggregator `everything`.
* CloudWatch's answers are `workers.simulated.cloudwatch`'s, computed as of the second that the `Date` header says (those of a page
  series: as of its first page's).
* The account comes from the credentials (`workers.simulated.sts`), the region from their scope.
* Quotas are token buckets with a second's burst per account and region: GetMetricData calls, its datapoints (range ÷
  period, whatever there is), ListMetrics calls.
* `GET /billing` counts what AWS would bill, and what is free; `POST /faults` makes it misbehave (`workers.simulated.faults`);
  `POST /accounts` adds accounts to the organization.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from ingest.clock import Clock, SystemClock
from ingest.errors import Fatal
from shard_config.load import shipped_services
from workers.simulated.faults import Faults
from workers.simulated.server import CALLS_PER_S, DATAPOINTS_PER_S, LIST_CALLS_PER_S, Simulator
from workers.traces import TraceWorld
from workers.world import Truth, World, account_ids

__all__ = ["CALLS_PER_S", "DATAPOINTS_PER_S", "LIST_CALLS_PER_S", "Simulator", "start"]


async def start(
    truth: Truth,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    clock: Clock | None = None,
    faults: Faults | None = None,
    external_id: str = "",
    calls_per_s: float = CALLS_PER_S,
    bill_pages: bool = False,
    credential_clock: Clock | None = None,
    links: Mapping[str, Sequence[str]] | None = None,
) -> Simulator:
    """Start a simulated AWS in this event loop.

    Args:
        port: 0 takes a free one; see `Simulator.url`.
        clock: Query time, the `Date` header, quotas and latency.
        external_id: Where given, AssumeRole wants it.
        calls_per_s: GetMetricData's quota per account and region; 0 lifts every quota.
        bill_pages: Whether continuation pages are billed again (AWS does not say; the default is once).
        credential_clock: What credentials expire by: the machine's own time, as SDKs see it, even where
            `clock` replays the past.
        links: Cross-account observability: the accounts that a monitoring account may read the metrics of.

    Raises Fatal where the address cannot be had.
    """
    simulator = Simulator(
        truth,
        clock=clock or SystemClock(),
        credential_clock=credential_clock or SystemClock(),
        faults=faults or Faults(),
        external_id=external_id,
        calls_per_s=calls_per_s,
        bill_pages=bill_pages,
        links={monitoring: tuple(linked) for monitoring, linked in (links or {}).items()},
    )
    try:
        await simulator._listen(host, port)
    except OSError as e:
        await simulator.close()
        raise Fatal(f"simulator {host}:{port}", f"cannot listen: {e}", "choose another --port") from e
    return simulator


# --- headgate simulate ----------------------------------------------------------------------------------------


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `headgate simulate`."""
    parser = commands.add_parser(
        "simulate",
        help="serve a simulated AWS: CloudWatch, STS, Organizations and tags, with made-up or recorded metrics",
        description="Serve CloudWatch, STS, Organizations and tag:GetResources as AWS does, quotas and bill included, for trying "
        "Headgate out and for sizing it before paying. Point `aws.endpoint_url` at the URL that it prints (or AWS_ENDPOINT_URL, for "
        "other clients). GET /billing says what AWS would have billed; POST /faults makes it misbehave; POST /accounts adds accounts.",
    )
    add = parser.add_argument
    add(
        "--accounts",
        type=int,
        default=1,
        metavar="N",
        help="how many: 100000000001 and on (default %(default)s)",
    )
    add(
        "--regions",
        default="us-east-1",
        metavar="R,R",
        help="each account has them all (default %(default)s)",
    )
    add(
        "--services",
        default="",
        metavar="S,S",
        help="of the shipped profiles, whose metrics they have in equal parts (default all)",
    )
    add(
        "--metrics",
        type=int,
        default=200,
        metavar="N",
        help="of each account and region (default %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="another seed, other metrics and values (default %(default)s)",
    )
    add("--traces", type=Path, metavar="DIR", help="serve a folder of CSV files `timestamp,value` instead")
    add("--clock-offset-s", type=int, default=0, metavar="S", help="seconds to add to the machine's time")
    add("--external-id", default="", metavar="X", help="AssumeRole wants this ExternalId")
    add(
        "--calls-per-s",
        type=float,
        default=CALLS_PER_S,
        metavar="N",
        help="GetMetricData's quota per account and region; 0 lifts every quota (default %(default)s)",
    )
    add(
        "--link",
        action="append",
        default=[],
        metavar="A=B,C",
        help="A is a monitoring account of B and C (cross-account observability), or of all others: A=*",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Prints the URL, one line, once it answers. Raises Fatal where it cannot."""
    truth = truth_of(args)
    collect_garbage_rarely()
    asyncio.run(_serve(truth, args))
    return 0


def truth_of(args: argparse.Namespace) -> Truth:
    """The truth that the command's words describe. Raises Fatal where they describe none."""
    if args.traces is not None:
        return TraceWorld(args.traces)
    regions, services = _words(args.regions), _words(args.services)
    shipped = shipped_services()
    unknown = [name for name in services if name not in shipped]
    if unknown:
        raise Fatal("simulate", f"no profile for {', '.join(unknown)}", f"there are {', '.join(shipped)}")
    if args.accounts < 1 or args.metrics < 0 or not regions:
        raise Fatal("simulate", "a world needs an account and a region", "see headgate simulate --help")
    profiles = [shipped[name] for name in services or shipped]
    return World(args.seed, account_ids(args.accounts), regions, args.metrics, profiles)


def links_of(words: Sequence[str], accounts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What `--link` says. Raises Fatal for accounts that there are not."""
    links: dict[str, tuple[str, ...]] = {}
    for word in words:
        monitoring, _, linked = word.partition("=")
        others = tuple(a for a in accounts if a != monitoring)
        links[monitoring] = others if linked == "*" else tuple(_words(linked))
        for account in (monitoring, *links[monitoring]):
            if account not in accounts:
                raise Fatal("simulate", f"--link {word}: there is no account {account!r}", "see --accounts")
    return links


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def collect_garbage_rarely() -> None:
    """For a process that does nothing but simulate: a call makes thousands of objects that die with it, and none in cycles.

    Measured: a third of the CPU of a GetMetricData call of 500 queries goes into looking at them.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


async def _serve(truth: Truth, args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for which in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(which, stop.set)
    simulator = await start(
        truth,
        host=args.host,
        port=args.port,
        clock=SystemClock(args.clock_offset_s),
        external_id=args.external_id,
        calls_per_s=args.calls_per_s,
        links=links_of(args.link, truth.accounts),
    )
    try:
        print(simulator.url, flush=True)
        await stop.wait()
    finally:
        await simulator.close()
