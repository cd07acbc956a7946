"""Servers as processes: they answer, they restart with their data, and they leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import aiokafka
import asyncpg
import botocore.session
import psutil
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from ingest.errors import Fatal
from workers import servers
from workers.servers import KafkaServer, PostgresServer, Server


async def test_a_topic_can_be_created_and_written_at_once(kafka_bootstrap: str, topic_prefix: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(f"{topic_prefix}.raw", num_partitions=2, replication_factor=1)])
    finally:
        await admin.close()
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, acks="all")
    await producer.start()
    try:
        written = await producer.send_and_wait(f"{topic_prefix}.raw", b"x", partition=1)
    finally:
        await producer.stop()
    assert (written.partition, written.offset) == (1, 0)


async def test_each_test_has_an_empty_database_of_its_own(database: str, postgres_dsn: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        assert (
            await connection.fetchval(
                "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
            )
            == 0
        )
        assert await connection.fetchval("SELECT current_database()") != postgres_dsn.rpartition("/")[2]
    finally:
        await connection.close()


def test_an_object_is_put_only_once_where_absent_is_asked_for(s3_endpoint: str, bucket: str) -> None:
    client = botocore.session.get_session().create_client("s3", endpoint_url=s3_endpoint)
    try:
        client.put_object(Bucket=bucket, Key="a", Body=b"first", IfNoneMatch="*")
        with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
            client.put_object(Bucket=bucket, Key="a", Body=b"second", IfNoneMatch="*")
        assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == b"first"
    finally:
        client.close()


class Stubborn(Server):
    """Ready as soon as it has a child; neither listens to SIGTERM."""

    name = "stubborn"

    def prepare(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)

    def command(self) -> Sequence[str]:
        return ["/bin/sh", "-c", "trap '' TERM; sleep 60 & echo $! > child; wait; wait"]

    def ready(self) -> bool:
        return bool(self.child_file.exists() and self.child_file.read_text().strip())

    @property
    def child_file(self) -> Path:
        return self.dir / "child"


def _gone(pid: int, timeout_s: float = 10) -> bool:
    """Whether a process that is not ours to wait for ends within the time. One that is only waited for counts as gone."""
    try:
        process = psutil.Process(pid)
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        return True
    return False


def test_stopping_ends_the_whole_group_also_where_it_does_not_listen(tmp_path: Path) -> None:
    server = Stubborn(tmp_path)
    server.start()
    pids = (server.pid or 0, int(server.child_file.read_text()))
    server.stop(timeout_s=0.2)
    assert [_gone(pid) for pid in pids] == [True, True]


def test_a_server_that_exits_says_its_last_line_and_the_log(tmp_path: Path) -> None:
    class Broken(Stubborn):
        name = "broken"

        def command(self) -> Sequence[str]:
            return ["/bin/sh", "-c", "echo no such thing; exit 3"]

    with pytest.raises(Fatal, match=r"broken: exited with 3; last line: no such thing \(see .*broken.log\)"):
        Broken(tmp_path).start()


def test_a_server_that_does_not_answer_in_time_is_stopped(tmp_path: Path) -> None:
    class Deaf(Stubborn):
        def ready(self) -> bool:
            return False

        def stop(self, timeout_s: float = 0) -> None:
            super().stop(timeout_s)

    server = Deaf(tmp_path)
    with pytest.raises(Fatal, match="did not answer within 0 s"):
        server.start(timeout_s=0.3)
    assert server.pid is None
    assert _gone(int(server.child_file.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys, time
from workers.servers import PostgresServer
server = PostgresServer(pathlib.Path({str(tmp_path)!r}), durable=False)
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    try:
        pid = int(owner.stdout.readline())
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    assert _gone(pid)


async def test_a_restarted_postgres_has_its_data_and_its_address(tmp_path: Path) -> None:
    server = PostgresServer(tmp_path, durable=False)
    try:
        server.start()
        dsn = server.create_database("kept")
        server.stop()
        server.start()
        connection = await asyncpg.connect(dsn)
        try:
            assert await connection.fetchval("SELECT current_database()") == "kept"
        finally:
            await connection.close()
    finally:
        server.stop()


def test_a_missing_broker_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "KAFKA_LIBS", tmp_path / "kafka-libs")
    with pytest.raises(Fatal, match="make setup"):
        KafkaServer(tmp_path).start()


def test_free_ports_are_distinct_and_no_client_is_given_them() -> None:
    ports = servers.free_ports(20)
    assert len(set(ports)) == 20
    lowest_of_clients = 32_768
    assert max(ports) < lowest_of_clients


def test_nothing_of_a_real_aws_is_left_in_a_local_environment() -> None:
    ours = servers.local_environment(
        {"PATH": "/bin", "AWS_PROFILE": "payer", "AWS_SECRET_ACCESS_KEY": "real"}
    )
    assert ours == {"PATH": "/bin", **servers.LOCAL_AWS_ENVIRONMENT}
    assert "real" not in ours.values()


def test_no_proxy_stands_between_what_runs_here() -> None:
    ours = servers.local_environment({"HTTP_PROXY": "http://proxy:1", "https_proxy": "x", "PATH": "/bin"})
    assert ours["PATH"] == "/bin"
    assert not {"HTTP_PROXY", "https_proxy"} & ours.keys()
