"""The archive: one contract for the fake, an S3, and (where there is one) versitygw; and what only S3 can do wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from aiobotocore.session import AioSession
from botocore.retries.standard import ExponentialBackoff

from ingest import archive as archive_module
from ingest.archive import BEGUN_MAX, archive_key, open_archive
from ingest.clock import ManualClock
from ingest.errors import Rejected, Transient
from ingest.model import LookStatus, Outcome, Receipt, ReceiptItem, Target, TaskItem
from ingest.objects import PARTS_MAX, assemble, pack, unpack, unpack_tail
from ingest.ports import Archive, ArchivedTask, Payload
from ingest.wire import batch_id_of
from shard_config.model import S3
from tests.fakes import FakeArchive

TARGET = Target("cloudwatch", "123456789012", "eu-west-1")
SESSION = AioSession()
TICK_S = 1_767_225_600  # 2026-01-01T00:00:00Z


def archived(*values: bytes, target: Target = TARGET, tick_s: int = TICK_S, prefix: str = "") -> ArchivedTask:
    """A task that nobody else archives, with these values as its payloads."""
    payloads = tuple(Payload(batch_id_of(value), value) for value in values)
    item = ReceiptItem(
        TaskItem("ec2", tick_s, tick_s + 300, 300),
        Outcome(LookStatus.COMPLETE, "", tick_s * 1000, 1, {"GetMetricData": 1}, 1),
        points=len(values),
        windows=(),
        batches=tuple(payload.batch_id for payload in payloads),
    )
    receipt = Receipt(
        task_id=uuid.uuid4().hex,
        target=target,
        shard="shard-0",
        tick_s=tick_s,
        started_at_ms=tick_s * 1000,
        finished_at_ms=tick_s * 1000 + 1,
        archive_key="",
        items=(item,),
    )
    return ArchivedTask(replace(receipt, archive_key=archive_key(receipt, prefix)), payloads)


# --- keys -----------------------------------------------------------------------------------------------------


def heavy(first: int = 0) -> ArchivedTask:
    """A task of 8.5 MiB in payloads of half a MiB: two parts."""
    return archived(*(bytes([first + n]) * (512 * 1024 - 64) for n in range(17)))


def test_a_key_says_source_account_region_day_tick_and_task() -> None:
    receipt = replace(archived().receipt, task_id="0123456789abcdef" * 2, tick_s=TICK_S + 86_399)

    key = archive_key(receipt, "raw/")

    assert (
        key
        == "raw/v1/cloudwatch/123456789012/eu-west-1/2026/01/01/1767311999-0123456789abcdef0123456789abcdef"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"target": Target("cloudwatch", "..", "eu-west-1")},
        {"target": Target("cloudwatch", "123456789012", "../../other")},
        {"target": Target("cloudwatch", "123456789012", "eu west")},
        {"target": Target("cloudwatch", "12345678901２", "eu-west-1")},
        {"target": Target("cloud\nwatch", "123456789012", "eu-west-1")},
        {"target": Target("", "123456789012", "eu-west-1")},
        {"task_id": "0123456789ABCDEF0123456789ABCDEF"},
        {"task_id": "../" * 10 + "ab"},
        {"task_id": "0" * 32 + "\n"},
        {"tick_s": -1},
        {"tick_s": 10**18},
    ],
    ids=str,
)
def test_a_piece_that_could_leave_its_place_makes_no_key(change: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as refused:
        archive_key(replace(archived().receipt, **change))

    assert refused.value.reason == "bad_key"


@pytest.mark.parametrize("prefix", ["../", "/", "a//", "a/../", "no-slash"])
def test_a_prefix_that_could_leave_the_bucket_makes_no_key(prefix: str) -> None:
    with pytest.raises(Rejected) as refused:
        archive_key(archived().receipt, prefix)

    assert refused.value.reason == "bad_key"


# --- objects --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(), (b"one",), (b"one", b"", b"three" * 100)])
def test_an_object_gives_back_what_was_packed(values: tuple[bytes, ...]) -> None:
    task = archived(*values)

    parts, body = pack(task)

    assert parts == ()
    assert assemble(unpack(body), []) == task


def test_the_receipt_is_in_an_objects_tail_and_a_changed_byte_of_it_is_found() -> None:
    task = archived(b"one" * 1000, b"two" * 1000)
    _, body = pack(task)
    tail = body[-1000:]

    assert unpack_tail(tail) == task.receipt
    assert unpack_tail(body) == task.receipt
    assert unpack_tail(body[-100:]) is None  # it begins before that
    for at in (len(tail) - 20, len(tail) - 100):
        with pytest.raises(Rejected):
            unpack_tail(tail[:at] + bytes([tail[at] ^ 1]) + tail[at + 1 :])


def test_a_heavy_task_goes_into_parts_within_the_bound_and_comes_back_in_order() -> None:
    task = archived(*(bytes([n]) * 400 for n in range(10)))

    parts, body = pack(task, object_bytes_max=1000)

    assert [len(part.body) for part in parts] == [8 + 2 * 404] * 5
    assert len(body) < 1000
    assert assemble(unpack(body), [part.body for part in parts]) == task


def test_a_task_of_more_parts_than_anybody_could_read_is_refused() -> None:
    task = archived(*(bytes([n]) * 9 for n in range(PARTS_MAX + 1)))

    with pytest.raises(Rejected) as refused:
        pack(task, object_bytes_max=10)

    assert refused.value.reason == "payload_too_large"


def test_payloads_that_the_receipt_does_not_list_are_not_packed() -> None:
    task = archived(b"one", b"two")

    with pytest.raises(Rejected) as refused:
        pack(replace(task, payloads=task.payloads[::-1]))

    assert refused.value.reason == "spoilt"


def test_no_truncation_of_an_object_passes() -> None:
    _, body = pack(archived(b"one" * 20, b"two" * 20))

    for length in range(len(body)):
        with pytest.raises(Rejected) as refused:
            assemble(unpack(body[:length]), [])
        assert refused.value.reason == "spoilt"


def test_no_changed_byte_of_an_object_passes() -> None:
    _, body = pack(archived(b"one" * 20, b"two" * 20))

    for at in range(len(body)):
        changed = bytearray(body)
        changed[at] ^= 0x01
        with pytest.raises(Rejected) as refused:
            assemble(unpack(bytes(changed)), [])
        assert refused.value.reason == "spoilt"


def test_no_changed_byte_of_a_part_passes() -> None:
    parts, body = pack(archived(b"one" * 20, b"two" * 20), object_bytes_max=64)
    first, second = (part.body for part in parts)

    for at in range(len(second)):
        changed = bytearray(second)
        changed[at] ^= 0x01
        with pytest.raises(Rejected) as refused:
            assemble(unpack(body), [first, bytes(changed)])
        assert refused.value.reason == "spoilt"


# --- the contract ---------------------------------------------------------------------------------------------


@dataclass
class Store:
    """An archive, and a way to its objects behind its back."""

    archive: Archive
    read: Callable[[str], Awaitable[bytes]]
    write: Callable[[str, bytes], Awaitable[None]]
    delete: Callable[[str], Awaitable[None]]
    names: Callable[[str], Awaitable[set[str]]]
    """Of all objects whose name begins so."""


def fake_store() -> Store:
    fake = FakeArchive()

    async def read(key: str) -> bytes:
        return fake.objects[key]

    async def write(key: str, body: bytes) -> None:
        fake.objects[key] = body

    async def delete(key: str) -> None:
        del fake.objects[key]

    async def names(prefix: str) -> set[str]:
        return {name for name in fake.objects if name.startswith(prefix)}

    return Store(fake, read, write, delete, names)


@asynccontextmanager
async def s3_store(s3: S3) -> AsyncIterator[Store]:
    async with (
        open_archive(s3, ManualClock(TICK_S), SESSION) as archive,
        SESSION.create_client("s3", region_name=s3.region, endpoint_url=s3.endpoint_url) as client,
    ):

        async def read(key: str) -> bytes:
            response = await client.get_object(Bucket=s3.bucket, Key=key)
            return bytes(await response["Body"].read())

        async def write(key: str, body: bytes) -> None:
            await client.put_object(Bucket=s3.bucket, Key=key, Body=body)

        async def delete(key: str) -> None:
            await client.delete_object(Bucket=s3.bucket, Key=key)

        async def names(prefix: str) -> set[str]:
            listed = await client.list_objects_v2(Bucket=s3.bucket, Prefix=prefix)
            return {found["Key"] for found in listed.get("Contents", ())}

        yield Store(archive, read, write, delete, names)


@pytest.fixture(scope="module")
def versity_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a versitygw over a folder: an S3 that shares no code with moto."""
    built = Path(__file__).resolve().parent.parent / ".headgate" / "bin" / "versitygw"
    binary = os.environ.get("HEADGATE_VERSITYGW") or (built if built.exists() else shutil.which("versitygw"))
    if not binary:
        pytest.skip(
            "no versitygw: `make test` builds it where a Go toolchain is there; or name one in HEADGATE_VERSITYGW"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    home = tmp_path_factory.mktemp("versitygw")
    credentials = (
        "--access",
        os.environ["AWS_ACCESS_KEY_ID"],
        "--secret",
        os.environ["AWS_SECRET_ACCESS_KEY"],
    )
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                "--port",
                address,
                *credentials,
                "posix",
                "--sidecar",
                str(_made(home / "meta")),
                str(_made(home / "data")),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for_http(f"http://{address}", process, home / "log")
        yield f"http://{address}"
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _wait_for_http(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(100):
        try:
            urllib.request.urlopen(url, timeout=1).close()  # noqa: S310  # ours, on loopback
            return
        except urllib.error.HTTPError:
            return  # it answers: it only does not know us
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    pytest.fail(f"versitygw did not answer: {log.read_text()[-2000:]}")


def _with_bucket(endpoint_url: str) -> S3:
    s3 = S3(bucket=f"t-{uuid.uuid4().hex[:12]}", endpoint_url=endpoint_url, prefix="raw/")
    client = botocore.session.get_session().create_client("s3", endpoint_url=endpoint_url)
    try:
        client.create_bucket(Bucket=s3.bucket)
    finally:
        client.close()
    return s3


@pytest.fixture(scope="module")
def usual_s3(s3_endpoint: str) -> S3:
    return _with_bucket(s3_endpoint)


@pytest.fixture(scope="module")
def versity_s3(versity_endpoint: str) -> S3:
    return _with_bucket(versity_endpoint)


# Clients are heavy (0.3 s): tests share them, and part ways by their tasks' keys.
@pytest.fixture(scope="module", params=["fake", "usual_s3", "versity_s3"])
async def store(request: pytest.FixtureRequest, usual_s3: S3) -> AsyncIterator[Store]:
    if request.param == "fake":
        yield fake_store()
        return
    async with s3_store(request.getfixturevalue(request.param)) as store:
        yield store


async def test_what_was_put_is_got(store: Store) -> None:
    task = archived(b"one", b"two" * 1000)

    assert await store.archive.put(task) == task
    assert await store.archive.get(task.receipt.archive_key) == task


async def test_a_task_without_payloads_is_archived_too(store: Store) -> None:
    task = archived()

    await store.archive.put(task)

    assert await store.archive.get(task.receipt.archive_key) == task


async def test_what_nobody_put_is_none(store: Store) -> None:
    assert await store.archive.get(archived().receipt.archive_key) is None


async def test_the_second_put_gets_what_the_first_one_archived(store: Store) -> None:
    first = archived(b"first")
    second = ArchivedTask(
        replace(first.receipt, shard="shard-1", items=archived(b"second").receipt.items),
        archived(b"second").payloads,
    )
    await store.archive.put(first)

    assert await store.archive.put(second) == first
    assert await store.archive.get(first.receipt.archive_key) == first


async def test_a_put_that_is_repeated_by_its_own_run_is_told_of_itself(store: Store) -> None:
    task = archived(b"one")
    await store.archive.put(task)

    assert await store.archive.put(task) == task


async def test_an_ordinary_task_is_one_object(store: Store) -> None:
    task = archived(*(bytes([n]) * 1000 for n in range(20)))

    await store.archive.put(task)

    assert await store.names(task.receipt.archive_key) == {task.receipt.archive_key}


async def test_a_heavy_task_is_parts_and_a_manifest(store: Store) -> None:
    task = heavy()

    await store.archive.put(task)

    assert len(await store.names(task.receipt.archive_key)) == 1 + 2
    assert await store.archive.get(task.receipt.archive_key) == task


async def test_a_heavy_task_that_lost_is_given_the_winner_and_leaves_it_whole(store: Store) -> None:
    winner, loser_values = heavy(), heavy(first=10)
    loser = ArchivedTask(replace(winner.receipt, items=loser_values.receipt.items), loser_values.payloads)
    await store.archive.put(winner)

    assert await store.archive.put(loser) == winner
    assert await store.archive.get(winner.receipt.archive_key) == winner


async def test_a_truncated_object_is_rejected_as_spoilt(store: Store) -> None:
    task = archived(b"one", b"two")
    await store.archive.put(task)
    key = task.receipt.archive_key
    await store.write(key, (await store.read(key))[:-1])

    with pytest.raises(Rejected) as refused:
        await store.archive.get(key)

    assert refused.value.reason == "spoilt"


async def test_a_put_that_meets_a_spoilt_object_says_so(store: Store) -> None:
    task = archived(b"one", b"two")
    await store.write(task.receipt.archive_key, b"something else")

    with pytest.raises(Rejected) as refused:
        await store.archive.put(task)

    assert refused.value.reason == "spoilt"


async def test_an_object_under_another_tasks_key_is_rejected_as_spoilt(store: Store) -> None:
    task, other = archived(b"one"), archived(b"two")
    await store.archive.put(task)
    await store.write(other.receipt.archive_key, await store.read(task.receipt.archive_key))

    with pytest.raises(Rejected) as refused:
        await store.archive.get(other.receipt.archive_key)

    assert refused.value.reason == "spoilt"


async def test_a_missing_part_is_rejected_as_spoilt(store: Store) -> None:
    task = heavy()
    await store.archive.put(task)
    key = task.receipt.archive_key
    await store.delete(max(await store.names(key)))

    with pytest.raises(Rejected) as refused:
        await store.archive.get(key)

    assert refused.value.reason == "spoilt"


async def test_each_run_that_is_marked_is_told_how_many_may_have_begun_before(store: Store) -> None:
    task, other = archived(b"one"), archived(b"two")

    told = [await store.archive.mark_begun(task.receipt.archive_key) for _ in range(3)]

    assert told == [1, 2, 3]
    assert await store.archive.mark_begun(other.receipt.archive_key) == 1


async def test_marks_end_at_their_bound_and_no_run_is_counted_less_than_what_is_there(store: Store) -> None:
    key = archived().receipt.archive_key

    told = [await store.archive.mark_begun(key) for _ in range(BEGUN_MAX + 2)]

    assert told == [*range(1, BEGUN_MAX + 1), BEGUN_MAX + 1, BEGUN_MAX + 1]


async def test_a_mark_is_neither_under_its_tasks_key_nor_in_the_way_of_the_task(store: Store) -> None:
    task = archived(b"one")
    key = task.receipt.archive_key
    await store.archive.mark_begun(key)

    assert await store.names(key) == set()
    assert await store.archive.get(key) is None
    assert await store.archive.put(task) == task


async def test_a_key_that_is_not_ours_is_neither_put_nor_got(store: Store) -> None:
    task = archived(b"one")
    foreign = replace(task, receipt=replace(task.receipt, archive_key="v1/../x"))

    with pytest.raises(Rejected) as refused_put:
        await store.archive.put(foreign)
    with pytest.raises(Rejected) as refused_get:
        await store.archive.get("v1/../x")
    with pytest.raises(Rejected) as refused_mark:
        await store.archive.mark_begun("v1/../x")

    assert {one.value.reason for one in (refused_put, refused_get, refused_mark)} == {"bad_key"}


# --- S3 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["usual_s3", "versity_s3"])
def s3(request: pytest.FixtureRequest, usual_s3: S3) -> S3:
    s3: S3 = request.getfixturevalue(request.param)
    return s3


async def test_of_many_puts_at_once_all_are_told_of_the_same_one(s3: S3) -> None:
    base = archived(b"base", prefix=s3.prefix)
    runs = [replace(base, receipt=replace(base.receipt, shard=f"shard-{n}")) for n in range(8)]

    async with open_archive(s3, ManualClock(TICK_S), SESSION) as archive, asyncio.TaskGroup() as group:
        puts = [group.create_task(archive.put(run)) for run in runs]

    told = {put.result().receipt.shard for put in puts}
    async with open_archive(s3, ManualClock(TICK_S), SESSION) as archive:
        held = await archive.get(base.receipt.archive_key)
    assert held is not None
    assert told == {held.receipt.shard}


async def test_of_many_marks_at_once_each_is_told_another_number(s3: S3) -> None:
    key = archived(prefix=s3.prefix).receipt.archive_key

    async with open_archive(s3, ManualClock(TICK_S), SESSION) as archive, asyncio.TaskGroup() as group:
        marks = [group.create_task(archive.mark_begun(key)) for _ in range(5)]

    assert sorted(mark.result() for mark in marks) == [1, 2, 3, 4, 5]


async def test_no_listing_of_the_archive_meets_a_mark(s3: S3) -> None:
    target = Target("cloudwatch", "210987654322", "eu-west-1")
    task = archived(b"x", target=target, tick_s=TICK_S + 300, prefix=s3.prefix)
    never = archived(b"x", target=target, tick_s=TICK_S, prefix=s3.prefix)
    elsewhere = archived(target=Target("cloudwatch", "210987654323", "eu-west-1"), prefix=s3.prefix)

    async with open_archive(s3, ManualClock(TICK_S), SESSION) as archive:
        await archive.put(task)
        for one in (task, never, elsewhere):
            await archive.mark_begun(one.receipt.archive_key)
        listed = dict([one async for one in archive.sized_keys(target, TICK_S, TICK_S + 600)])
        targets, first_s = await archive.targets(), await archive.first_tick_s(target)

    assert listed == {task.receipt.archive_key: len(pack(task)[1])}
    assert (target in targets, elsewhere.receipt.target in targets) == (True, False)
    assert first_s == TICK_S + 300


async def test_a_mark_that_s3_does_not_answer_is_transient_and_soon(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "MARK_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        away = s3.model_copy(update={"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        async with asyncio.timeout(5), open_archive(away, ManualClock(TICK_S), SESSION) as archive:
            with pytest.raises(Transient, match=r"no answer within 0\.2 s"):
                await archive.mark_begun(archived(prefix=s3.prefix).receipt.archive_key)


@pytest.mark.parametrize("size", [1, 200_000])
async def test_a_receipt_is_read_without_the_payloads(s3: S3, size: int) -> None:
    task = archived(b"x" * size, prefix=s3.prefix)

    async with open_archive(s3, ManualClock(TICK_S), SESSION) as archive:
        await archive.put(task)
        found = await archive.receipt(task.receipt.archive_key)
        none = await archive.receipt(archived(prefix=s3.prefix).receipt.archive_key)

    assert (found, none) == (task.receipt, None)


async def test_the_keys_of_a_targets_ticks_are_listed_over_midnight(s3: S3) -> None:
    target = Target("cloudwatch", "210987654321", "eu-west-1")
    other = Target("cloudwatch", "210987654321", "eu-west-2")
    ticks = [TICK_S + t for t in (-600, -300, 0, 300, 86_400)]
    tasks = [archived(b"x", target=target, tick_s=tick_s, prefix=s3.prefix) for tick_s in ticks]

    async with open_archive(s3, ManualClock(TICK_S), SESSION) as archive:
        for task in (*tasks, archived(b"x", target=other, prefix=s3.prefix)):
            await archive.put(task)
        listed = [key async for key in archive.keys(target, TICK_S - 300, TICK_S + 300)]

    assert sorted(listed) == sorted(task.receipt.archive_key for task in tasks[1:3])


async def test_listed_keys_have_the_bytes_of_their_task_with_its_parts(s3: S3) -> None:
    target = Target("cloudwatch", "210987654321", "eu-west-3")
    small = archived(b"x", target=target, prefix=s3.prefix)
    heavy = archived(
        *(bytes([i]) * 4_000_000 for i in range(3)), target=target, tick_s=TICK_S + 300, prefix=s3.prefix
    )

    async with open_archive(s3, ManualClock(TICK_S), SESSION) as archive:
        for task in (small, heavy):
            await archive.put(task)
        listed = dict([one async for one in archive.sized_keys(target, TICK_S, TICK_S + 600)])

    sizes = {}
    for task in (small, heavy):
        parts, body = pack(task)
        sizes[task.receipt.archive_key] = len(body) + sum(len(part.body) for part in parts)
    assert listed == sizes


async def test_what_is_cached_is_overwritten_and_is_no_target_of_the_archive(s3: S3) -> None:
    async with open_archive(s3, ManualClock(TICK_S), SESSION) as archive:
        name = ("listings", "cloudwatch", "100000000001", "eu-west-1", "ec2")
        targets = await archive.targets()
        assert await archive.cached(name, 10) is None
        for body in (b"first", b"second"):
            await archive.cache(name, body)
            assert await archive.cached(name, 10) == body
        assert await archive.targets() == targets
        with pytest.raises(Rejected, match="spoilt"):
            await archive.cached(name, 5)
        for bad in ((), ("..", "v1"), ("listings", "A b")):
            with pytest.raises(Rejected, match="bad_key"):
                await archive.cache(bad, b"")


async def test_a_missing_bucket_is_transient_with_a_remedy_and_never_nothing(s3: S3) -> None:
    async with open_archive(
        s3.model_copy(update={"bucket": "t-none"}), ManualClock(TICK_S), SESSION
    ) as archive:
        with pytest.raises(Transient) as failed:
            await archive.get(archived().receipt.archive_key)

    assert "create the bucket" in failed.value.remedy


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore tries as often as ever, but at once."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)


@asynccontextmanager
async def answering(answer: Callable[[str], bytes | None]) -> AsyncIterator[tuple[S3, list[str]]]:
    """An HTTP server that says what `answer` makes of a method, or nothing; and the methods that it was asked."""
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            asked.append(head.split()[0])
            if (response := answer(asked[-1])) is not None:
                writer.write(response)
                await writer.drain()
            else:
                await reader.read()  # until the client gives up
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away, which some of these tests are about
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield S3(bucket="b", endpoint_url=f"http://127.0.0.1:{port}"), asked
    finally:
        server.close()


def _error(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code></Error>"
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def test_slow_down_is_tried_again_a_bounded_number_of_times_and_then_transient(
    no_backoff: None,
) -> None:
    task = archived(b"one")

    async with (
        answering(lambda _: _error("503 Slow Down", "SlowDown")) as (s3, asked),
        open_archive(s3, ManualClock(TICK_S), SESSION) as archive,
    ):
        with pytest.raises(Transient) as failed:
            await archive.put(task)

    assert asked == ["PUT"] * archive_module.ATTEMPTS
    assert "SlowDown" in failed.value.what


async def test_a_conflict_with_a_put_that_never_ends_well_is_bounded_and_transient(no_backoff: None) -> None:
    def answer(method: str) -> bytes:
        if method == "PUT":
            return _error("409 Conflict", "ConditionalRequestConflict")
        return _error("404 Not Found", "NoSuchKey")

    async with answering(answer) as (s3, asked), open_archive(s3, ManualClock(TICK_S), SESSION) as archive:
        with pytest.raises(Transient):
            await archive.put(archived(b"one"))

    assert asked == ["PUT", "GET"] * archive_module.ATTEMPTS


async def test_a_mark_in_conflict_is_put_again_and_its_number_is_not_passed_over(no_backoff: None) -> None:
    puts = iter(
        [_error("409 Conflict", "ConditionalRequestConflict")] * 2
        + [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"]
    )

    def answer(method: str) -> bytes:
        return next(puts) if method == "PUT" else _error("404 Not Found", "NoSuchKey")

    async with answering(answer) as (s3, asked), open_archive(s3, ManualClock(TICK_S), SESSION) as archive:
        assert await archive.mark_begun(archived().receipt.archive_key) == 1

    assert asked == ["PUT", "GET", "PUT", "GET", "PUT"]


async def test_a_server_that_never_answers_is_transient_at_the_deadline() -> None:
    async with (
        answering(lambda _: None) as (s3, asked),
        open_archive(s3, ManualClock(TICK_S), SESSION, deadline_s=0.2) as archive,
    ):
        with pytest.raises(Transient) as failed:
            await archive.get(archived().receipt.archive_key)

    assert asked == ["GET"]
    assert "0.2 s" in failed.value.what


async def test_cancelling_a_put_cancels_it_and_is_no_transient() -> None:
    reached = asyncio.Event()

    def answer(_: str) -> None:
        reached.set()

    async with (
        answering(answer) as (s3, asked),
        open_archive(s3, ManualClock(TICK_S), SESSION) as archive,
    ):
        put = asyncio.create_task(archive.put(archived(b"one")))
        await asyncio.wait_for(reached.wait(), 5)
        put.cancel()
        with pytest.raises(asyncio.CancelledError):
            await put

    assert asked == ["PUT"]


async def test_a_body_that_breaks_off_is_transient(no_backoff: None) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this"

    async with (
        answering(lambda _: head) as (s3, _),
        open_archive(s3, ManualClock(TICK_S), SESSION) as archive,
    ):
        with pytest.raises(Transient):
            await archive.get(archived().receipt.archive_key)


async def test_an_object_larger_than_ours_is_rejected_before_it_is_read() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"

    async with (
        answering(lambda _: head) as (s3, _),
        open_archive(s3, ManualClock(TICK_S), SESSION) as archive,
    ):
        with pytest.raises(Rejected) as refused:
            await archive.get(archived().receipt.archive_key)

    assert refused.value.reason == "spoilt"


async def test_nobody_listening_is_transient(no_backoff: None) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        s3 = S3(bucket="b", endpoint_url=f"http://127.0.0.1:{closed.getsockname()[1]}")

        async with open_archive(s3, ManualClock(TICK_S), SESSION) as archive:
            with pytest.raises(Transient):
                await archive.put(archived(b"one"))
