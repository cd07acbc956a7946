"""Faults of servers and of the networks before them: Kafka, PostgreSQL, S3, the AWS; killed, paused, out of reach, slow, full, or answering wrongly."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from tests.faults.field import Field, Link, Part
from tests.faults.kinds import Kind, Strike, Struck
from tests.faults.proxy import Way
from tests.faults.s3_proxy import S3Proxy
from tests.faults.small_disk import small_disk, why_not

BROKER = "broker killed / paused, one then all"
NETWORK = "network loss, reset, one-way cut"
SLOW = "slow sink, half-open connection"
POSTGRES = "PostgreSQL restarted, deadlock, blackhole during COPY"
DISK = "disk full under broker or PostgreSQL"
S3_ROW = "S3 409, 412, 503, truncated GET"

PLACES: tuple[Part, ...] = ("kafka", "postgres", "s3", "aws")
NARROW_BYTES_PER_S = 20_000
RESET_EACH_S = 0.3
RESET_S3_EACH_S = 0.03
"""Its server ends a connection with each answer: one is there for some hundredths of a second."""
DISK_BYTES = 2 * 1024**3
"""Before it fills; it takes as much memory as lies on it."""
LEFT_BYTES = 64 * 1024
SETTLED_S = 8.0
FULL_S = 15.0
COMMIT = b"COMMIT;"
"""As asyncpg says it."""
REACHED_S = 20.0
"""Until somebody is where it is to be struck."""


# --- Kafka, PostgreSQL ----------------------------------------------------------------------------------------


@asynccontextmanager
async def _broker_killed(field: Field, _: random.Random) -> AsyncIterator[Struck]:
    await field.kill("kafka")
    yield Struck("kafka")


@asynccontextmanager
async def _broker_paused(field: Field, _: random.Random) -> AsyncIterator[Struck]:
    await field.stop("kafka")
    try:
        yield Struck("kafka")
    finally:
        await field.cont("kafka")


@asynccontextmanager
async def _postgres_signalled(
    field: Field, _: random.Random, number: signal.Signals
) -> AsyncIterator[Struck]:
    """SIGINT ends sessions and writes a checkpoint; SIGQUIT drops everything, and the next start recovers."""
    os.kill(await field.pid("postgres"), number)
    yield Struck("postgres")


@asynccontextmanager
async def _deadlock(field: Field, rng: random.Random) -> AsyncIterator[Struck]:
    """Somebody's transactions take tables in the other order than landings do, again and again."""
    struck = Struck("postgres", notes={"transactions": 0})
    over = asyncio.Event()

    async def again_and_again() -> None:
        while not over.is_set():
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
                await _crosswise(field, rng.uniform(0.5, 1.5))
                struck.notes["transactions"] += 1
            await asyncio.sleep(0.2)

    work = asyncio.create_task(again_and_again())
    try:
        yield struck
    finally:
        over.set()
        await asyncio.wait([work], timeout=20)
        work.cancel()


async def _crosswise(field: Field, holds_s: float) -> None:
    connection = await asyncpg.connect(field.endpoints.postgres_dsn, timeout=10, command_timeout=15)
    try:
        # A landing is to be the victim: ours looks for deadlocks later than it does.
        await connection.execute("SET deadlock_timeout = '4s'; SET lock_timeout = '6s'")
        async with connection.transaction():
            await connection.execute("LOCK TABLE samples IN SHARE MODE")
            await asyncio.sleep(holds_s)
            await connection.execute("UPDATE positions SET backend_pid = backend_pid")
    finally:
        connection.terminate()


@asynccontextmanager
async def _swallowed(field: Field, rng: random.Random, commit: bool) -> AsyncIterator[Struck]:
    """The network of one consumer falls silent in the middle of a COPY, or when a commit would be answered."""
    consumer = rng.choice(field.consumers)
    link = field.link(consumer, "postgres")
    link.fell_silent.clear()
    if commit:
        link.lose_answer_to(COMMIT)
    else:
        link.blackhole_in_copy(1)
    struck = Struck(consumer)
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(link.fell_silent.wait(), REACHED_S)
        struck.missed = not link.fell_silent.is_set()
        yield struck
    finally:
        link.blackhole_in_copy(0)
        link.lose_answer_to(b"")
        link.resume()
        link.bury()


# --- networks -------------------------------------------------------------------------------------------------


def _chosen(field: Field, part: Part, rng: random.Random) -> tuple[str, list[Link]]:
    """The links of one worker that speaks to that server, or, one time in three, of all."""
    workers = {
        "kafka": field.workers,
        "postgres": ["coordinator", *field.consumers],
        "s3": ["coordinator", *field.exporters],
        "aws": field.exporters,
    }[part]
    struck = workers if rng.random() < 1 / 3 else [rng.choice(workers)]
    name = "all workers" if len(struck) > 1 else struck[0]
    return f"{name} to {part}", [field.link(worker, part) for worker in struck]


Hurt = Callable[[Link, random.Random], object]


@asynccontextmanager
async def _network(field: Field, rng: random.Random, part: Part, hurt: Hurt) -> AsyncIterator[Struck]:
    hit, links = _chosen(field, part, rng)
    before = sum(link.accepted for link in links)
    struck = Struck(hit, notes={"connections": sum(link.open for link in links)})
    for link in links:
        hurt(link, rng)
    try:
        yield struck
    finally:
        struck.notes["new_connections"] = sum(link.accepted for link in links) - before
        struck.missed = not any(struck.notes.values())
        for link in links:
            link.resume()
            link.bury()


def _lost(link: Link, rng: random.Random) -> None:
    """Nothing comes through: swallowed, or refused."""
    if rng.random() < 0.5:
        link.blackhole()
    else:
        link.down()


@asynccontextmanager
async def _resets(field: Field, rng: random.Random, part: Part) -> AsyncIterator[Struck]:
    """Connections end in the middle of whatever they are at, again and again."""
    hit, links = _chosen(field, part, rng)
    struck = Struck(hit, notes={"connections": 0})

    async def again_and_again() -> None:
        while True:
            struck.notes["connections"] += sum(link.reset() for link in links)
            await asyncio.sleep(RESET_S3_EACH_S if part == "s3" else RESET_EACH_S)

    work = asyncio.create_task(again_and_again())
    try:
        yield struck
    finally:
        work.cancel()
        await asyncio.wait([work])
        struck.missed = not struck.notes["connections"]


def _cut(link: Link, rng: random.Random) -> None:
    link.cut(rng.choice(list(Way)))


def _half_open(link: Link, _: random.Random) -> None:
    link.half_open()


def _slow(link: Link, rng: random.Random) -> None:
    link.bytes_per_s = NARROW_BYTES_PER_S
    link.latency_s = rng.uniform(0.02, 0.2)


# --- full disks -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def _disk_full(field: Field, _: random.Random, server: str) -> AsyncIterator[Struck]:
    """The server's data moves to a disk of its own, which fills; with room again it goes on; in the end its data moves back."""
    if why_not():
        yield Struck(server, missed=True)
        return
    data = field.stack.run / server / "data"
    aside = data.with_name("data-aside")
    with small_disk(data.with_name("disk"), DISK_BYTES) as disk:
        async with field.down(server):
            await _copy(data, disk.path / "data")
            data.rename(aside)
            data.symlink_to(disk.path / "data")
        try:
            await asyncio.sleep(SETTLED_S)
            disk.fill(LEFT_BYTES)
            await asyncio.sleep(FULL_S)
            yield Struck(server, notes={"used_bytes": disk.used_bytes})
        finally:
            disk.make_room()
            async with field.down(server):
                data.unlink()
                await _copy(disk.path / "data", data)
                await asyncio.to_thread(shutil.rmtree, aside)


async def _copy(source: Path, target: Path) -> None:
    """With owners and holes: a broker's indexes are mostly holes."""
    process = await asyncio.create_subprocess_exec("cp", "-a", str(source), str(target))
    assert await process.wait() == 0, f"cp {source}"


# --- S3 -------------------------------------------------------------------------------------------------------

Answer = Callable[[S3Proxy], None]


@asynccontextmanager
async def _s3(field: Field, rng: random.Random, answer: Answer, reads: bool) -> AsyncIterator[Struck]:
    """All workers' S3 answers so for a while. Reads are rare: whoever follows an exporter that was killed after its put makes one."""
    port = urlsplit(field.endpoints.s3_url).port
    assert port
    links = field.links("s3")
    async with S3Proxy(field.endpoints.s3_url, seed=rng.randrange(2**31)) as proxy:
        answer(proxy)
        for link in links:
            link.aim("127.0.0.1", proxy.port)
            link.reset()
        struck = Struck("s3")
        try:
            if reads:
                exporter = rng.choice(field.exporters)
                field.arm(exporter, "after_put", signal.SIGKILL)
                await field.reached(exporter, "after_put", REACHED_S)
            yield struck
        finally:
            proxy.heal()
            for link in links:
                link.aim("127.0.0.1", port)
                link.reset()
            struck.notes |= {f"answers_{what}": float(n) for what, n in proxy.struck.items()}
            struck.missed = not proxy.struck


def _conflicts(proxy: S3Proxy) -> None:
    """Another put of the same key is under way, says S3, of every second one."""
    proxy.refuse(409, "ConditionalRequestConflict", "PUT", share=0.5)


def _too_fast(proxy: S3Proxy) -> None:
    proxy.refuse(503, "SlowDown", "PUT", "GET", share=0.6)


def _answers_lost(proxy: S3Proxy) -> None:
    """The put is done and nobody says so: whoever asks again hears 412 of its own object."""
    proxy.lose_answers(share=0.5)


def _reads_cut(proxy: S3Proxy) -> None:
    proxy.truncate(share=0.5)


def _reads_changed(proxy: S3Proxy) -> None:
    proxy.flip(share=0.5)


# --- all of them ----------------------------------------------------------------------------------------------


def _of_networks(name: str, row: str, strike: Callable[..., Any], places: Sequence[Part]) -> list[Kind]:
    return [
        Kind(
            f"{name} {place}",
            row,
            partial(strike, part=place),
            lasts_s=(2, 12),
            needs=frozenset({place}),
            # An answer of AWS that was lost is asked for again; so is what an exporter had in hand that lost its session.
            may_pay_twice=place != "postgres",
        )
        for place in places
    ]


def _of_s3(name: str, answer: Answer, *, reads: bool = False) -> Kind:
    strike: Strike = partial(_s3, answer=answer, reads=reads)
    needs = frozenset({"s3", "exporter"}) if reads else frozenset({"s3"})
    # What cannot be archived is not published, and asked for again.
    return Kind(name, S3_ROW, strike, lasts_s=(8, 12) if reads else (3, 10), needs=needs, may_pay_twice=True)


def _of_postgres(name: str, strike: Strike, lasts_s: tuple[float, float] = (1, 5)) -> Kind:
    return Kind(name, POSTGRES, strike, lasts_s=lasts_s, needs=frozenset({"postgres"}))


KINDS: tuple[Kind, ...] = (
    Kind("broker killed", BROKER, _broker_killed, (1, 5), frozenset({"kafka"}), may_pay_twice=True),
    Kind("broker paused", BROKER, _broker_paused, (2, 12), frozenset({"kafka"}), may_pay_twice=True),
    *_of_networks("network lost before", NETWORK, partial(_network, hurt=_lost), PLACES),
    *_of_networks("connections reset to", NETWORK, _resets, PLACES),
    *_of_networks("network cut one way before", NETWORK, partial(_network, hurt=_cut), PLACES),
    *_of_networks("slow network before", SLOW, partial(_network, hurt=_slow), ("kafka", "postgres")),
    *_of_networks(
        "half-open connections to", SLOW, partial(_network, hurt=_half_open), ("kafka", "postgres")
    ),
    _of_postgres("PostgreSQL restarted", partial(_postgres_signalled, number=signal.SIGINT)),
    _of_postgres("PostgreSQL ended at once", partial(_postgres_signalled, number=signal.SIGQUIT)),
    _of_postgres("deadlock", _deadlock, (4, 10)),
    _of_postgres("network silent during COPY", partial(_swallowed, commit=False), (2, 8)),
    _of_postgres("commit not answered", partial(_swallowed, commit=True), (1, 6)),
    *(
        Kind(
            f"disk full under {server}",
            DISK,
            partial(_disk_full, server=server),
            (0, 0),
            frozenset({server}),
            may_pay_twice=server == "kafka",
            alone=True,
        )
        for server in ("kafka", "postgres")
    ),
    _of_s3("S3 says 409", _conflicts),
    _of_s3("S3 says 503", _too_fast),
    _of_s3("S3 loses answers, then says 412", _answers_lost),
    _of_s3("S3's reads cut short", _reads_cut, reads=True),
    _of_s3("S3's reads changed", _reads_changed, reads=True),
)
