"""The servers that tests run against: containers where a Docker engine answers, else processes of this machine.

Either way they are real, start once a run and only if a selected test needs them, and are gone at its end.
HEADGATE_TEST_SERVERS=processes asks for processes in any case.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import botocore.session
import pytest
import structlog
from hypothesis import settings

from ingest.errors import Fatal
from shard_config.model import S3
from workers.servers import (
    LOCAL_AWS_ENVIRONMENT,
    KafkaServer,
    PostgresServer,
    S3Server,
    Server,
    local_environment,
)


def _docker_answers() -> bool:
    if os.environ.get("HEADGATE_TEST_SERVERS") == "processes":
        return False
    if not (os.environ.get("DOCKER_HOST") or Path("/var/run/docker.sock").exists()):
        return False
    import docker  # type: ignore[import-untyped]  # it ships no types

    try:
        client = docker.from_env(timeout=2)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except docker.errors.DockerException:
        return False


DOCKER = _docker_answers()

FIXTURES = ("kafka_bootstrap", "postgres_dsn", "s3_endpoint")


def pytest_configure() -> None:
    """No test may find real credentials, whatever it does."""
    ours = local_environment(os.environ)
    for name in set(os.environ) - set(ours):
        del os.environ[name]
    os.environ.update(ours)


# How long a test takes says more about who else is at work on the machine.
settings.register_profile("headgate", deadline=None)
settings.load_profile("headgate")

LONGEST_FIRST = (
    "test_faults.py",
    "test_restore.py",
    "test_campaign.py",
    "test_fault_servers.py",
    "test_kafka_acls.py",
    "test_canary.py",
    "test_backfill_end_to_end.py",
    "test_end_to_end.py",
    "test_fault_servers.py",
    "test_healing_end_to_end.py",
    "test_page.py",
    "test_scale.py",
    "test_shards.py",
    "test_remote_writer.py",
    "test_log.py",
    "test_compare.py",
    "test_budget_day.py",
    "test_late_rules.py",
    "test_report_whole.py",
    "test_fuzz.py",
    "test_postgres_tls.py",
    "test_mutants.py",
)
"""Files of which one that came last would keep everybody waiting, where several run at a time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_report_header() -> str:
    return "servers: " + ("containers (Docker answers)" if DOCKER else "processes (no Docker engine answers)")


@pytest.fixture(scope="session")
def _servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The addresses, by fixture, of those servers that the selected tests ask for; started side by side."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    wanted = [name for name in FIXTURES if name in needed]
    start = _start_containers if DOCKER else _start_processes
    addresses, stop = start(wanted, tmp_path_factory.mktemp("servers"))
    try:
        yield addresses
    finally:
        stop()


def _start_processes(wanted: list[str], home: Path) -> tuple[dict[str, str], Callable[[], None]]:
    kafka, postgres, s3 = KafkaServer(home), PostgresServer(home, durable=False), S3Server(home)
    servers: dict[str, Server] = dict(zip(FIXTURES, (kafka, postgres, s3), strict=True))
    started = [servers[name] for name in wanted]

    def stop() -> None:
        with ThreadPoolExecutor(len(FIXTURES)) as pool:
            list(pool.map(Server.stop, started))

    try:
        with ThreadPoolExecutor(len(FIXTURES)) as pool:
            list(pool.map(lambda server: server.prepare(), started))
        # Launched from this thread: what is launched dies with the thread that did it.
        for server in started:
            server.launch()
        for server in started:
            server.wait_ready()
    except BaseException as error:
        stop()
        if isinstance(error, Fatal):
            pytest.fail(str(error), pytrace=False)
        raise
    return dict(zip(FIXTURES, (kafka.bootstrap, postgres.dsn(), s3.endpoint_url), strict=True)), stop


def _start_containers(wanted: list[str], _: Path) -> tuple[dict[str, str], Callable[[], None]]:
    from testcontainers.community.kafka import KafkaContainer
    from testcontainers.community.postgres import PostgresContainer
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import HttpWaitStrategy

    kafka = (
        KafkaContainer("confluentinc/cp-kafka:7.9.0")
        .with_kraft()
        .with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_MIN_ISR", "1")
        .with_env("KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS", "1000")
    )
    postgres = PostgresContainer(
        "postgres:16", username="headgate", password="headgate", dbname="postgres", driver=None
    )
    s3 = (
        DockerContainer("minio/minio:RELEASE.2025-09-07T16-13-09Z")
        .with_command("server /data")
        .with_env("MINIO_ROOT_USER", LOCAL_AWS_ENVIRONMENT["AWS_ACCESS_KEY_ID"])
        .with_env("MINIO_ROOT_PASSWORD", LOCAL_AWS_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"])
        .with_exposed_ports(9000)
        .waiting_for(HttpWaitStrategy(9000, "/minio/health/live"))
    )
    containers: dict[str, Any] = dict(zip(FIXTURES, (kafka, postgres, s3), strict=True))
    started: list[Any] = []

    def stop() -> None:
        for container in started:
            container.stop()

    try:
        for name in wanted:
            started.append(containers[name])
            containers[name].start()
    except BaseException:
        stop()
        raise
    address: dict[str, Callable[[], str]] = {
        "kafka_bootstrap": kafka.get_bootstrap_server,
        "postgres_dsn": postgres.get_connection_url,
        "s3_endpoint": lambda: f"http://{s3.get_container_host_ip()}:{s3.get_exposed_port(9000)}",
    }
    return {name: address[name]() for name in wanted}, stop


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A command that is run in this process logs to the standard error of its test, which is closed after it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()


@pytest.fixture(scope="session")
def kafka_bootstrap(_servers: dict[str, str]) -> str:
    """host:port of a Kafka broker. Topics are not created by use."""
    return _servers["kafka_bootstrap"]


@pytest.fixture(scope="session")
def postgres_dsn(_servers: dict[str, str]) -> str:
    """DSN of a PostgreSQL 16, as a superuser, with the database `postgres`."""
    return _servers["postgres_dsn"]


@pytest.fixture(scope="session")
def s3_endpoint(_servers: dict[str, str]) -> str:
    """URL of an S3; credentials are in the environment."""
    return _servers["s3_endpoint"]


@asynccontextmanager
async def empty_database(postgres_dsn: str) -> AsyncIterator[str]:
    """DSN of an empty database; dropped afterwards, with whoever is still connected."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    server = await asyncpg.connect(postgres_dsn)
    try:
        await server.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        yield postgres_dsn.rpartition("/")[0] + "/" + name
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await server.close()


@pytest.fixture
async def database(postgres_dsn: str) -> AsyncIterator[str]:
    """See `empty_database`."""
    async with empty_database(postgres_dsn) as dsn:
        yield dsn


@pytest.fixture
def topic_prefix() -> str:
    """A slug that no other test's topics and groups begin with."""
    return f"t-{uuid.uuid4().hex[:12]}"


def empty_bucket(s3_endpoint: str) -> str:
    """The name of an empty bucket. It goes with the server."""
    name = f"t-{uuid.uuid4().hex[:12]}"
    client = botocore.session.get_session().create_client("s3", endpoint_url=s3_endpoint)
    try:
        client.create_bucket(Bucket=name)
    finally:
        client.close()
    return name


def seed_of_run() -> int:
    """`HEADGATE_SEED`, or 1. Printed, so that whoever sees a failure can have it again."""
    seed = int(os.environ.get("HEADGATE_SEED", "1"))
    print(f"HEADGATE_SEED={seed}")
    return seed


@pytest.fixture
def seed() -> int:
    return seed_of_run()


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Decides whom a fault strikes, and when."""
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture
def s3(s3_endpoint: str, bucket: str) -> S3:
    """A bucket of the test's own."""
    return S3(bucket=bucket, endpoint_url=s3_endpoint)


@pytest.fixture
def bucket(s3_endpoint: str) -> str:
    """See `empty_bucket`."""
    return empty_bucket(s3_endpoint)


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 20) -> None:
    """Wait until the condition holds. Fails where it does not within the time."""
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline_s, f"{condition.__name__} was not so within {timeout_s} s"
        await asyncio.sleep(0.05)
