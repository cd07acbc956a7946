"""A real Kafka with TLS, SCRAM and ACLs: every part works with what `headgate acls` says, and what is not there is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer
from structlog.testing import capture_logs

from ingest.clock import SystemClock
from ingest.errors import Fatal, Transient
from ingest.group import Consumer
from ingest.log import Outgoing, Producer, commit_start
from ingest.scan import scan
from shard_config.load import load
from shard_config.model import Config, Kafka, ServiceProfile
from tests.conftest import eventually
from tests.secure_servers import ADMIN, Asking, Authority, SecureKafka, grant
from workers import consumer, coordinator, exporter, remote_writer, simulator
from workers.acls import PARTS, Part, acls_of, principal_of
from workers.cli import main
from workers.lifecycle import Lifecycle
from workers.servers import LOOPBACK
from workers.setup import check_slots, create_topics, kafka_admin, setup
from workers.status import status
from workers.world import World, account_ids

[ACCOUNT] = account_ids(1)
REGION = "eu-west-1"
FAST = {"namespace": "Fast", "period_s": 1, "poll_interval_s": 2, "settling_s": 2}
USERS = {f"headgate-{part}": f"of-{part}-4711" for part in PARTS}
TOPICS = ("collect", "raw", "ledger", "dead", "shards")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def broker(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    kafka = SecureKafka(tmp_path_factory.mktemp("secure"), authority, USERS)
    kafka.start()
    try:
        yield kafka
    finally:
        kafka.stop()


@dataclass
class Installation:
    """A file that every part reads, and who each is."""

    broker: SecureKafka
    path: Path
    document: dict[str, Any]

    def config(self, part: Part | None, **kafka: Any) -> Config:
        """As one part connects to Kafka; None: the broker's administrator."""
        user = f"headgate-{part}" if part else ADMIN
        security = self.broker.security(user)
        document = {**self.document, "kafka": {**self.document["kafka"], "security": security, **kafka}}
        path = self.path / f"{user}.yaml"
        path.write_text(yaml.safe_dump(document))
        return load(path, environ={})

    async def grant(self) -> None:
        kafka = self.config(None).kafka
        async with kafka_admin(kafka) as admin:
            await grant(admin, acls_of(kafka), lambda part: principal_of(part, {}))


@pytest.fixture
async def installation(
    broker: SecureKafka,
    tmp_path: Path,
    topic_prefix: str,
    database: str,
    s3_endpoint: str,
    bucket: str,
) -> Installation:
    return Installation(
        broker,
        tmp_path,
        {
            "accounts": [{"id": ACCOUNT, "regions": [REGION], "services": ["fast"]}],
            "services": {"fast": FAST},
            "startup_lookback_s": 0,
            "slots": 2,
            "kafka": {
                "bootstrap": broker.bootstrap,
                "prefix": topic_prefix,
                "raw_partitions": 1,
                "ledger_partitions": 1,
                "session_timeout_s": 6,
            },
            "postgres": {"dsn": database},
            "s3": {"bucket": bucket, "endpoint_url": s3_endpoint},
        },
    )


@pytest.fixture(scope="module")
async def installed(broker: SecureKafka, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Topics alone, made by setup as setup may."""
    kafka = {"bootstrap": broker.bootstrap, "prefix": "acl", "raw_partitions": 1, "ledger_partitions": 1}
    account = {"id": ACCOUNT, "regions": [REGION], "services": ["ec2"]}
    document = {"accounts": [account], "slots": 2, "kafka": kafka}
    made = Installation(broker, tmp_path_factory.mktemp("installed"), document)
    await made.grant()
    await create_topics(made.config("setup"))
    return made


@asynccontextmanager
async def receiving() -> AsyncIterator[tuple[str, list[int]]]:
    """A receiver of remote write that takes everything: its URL, and the length of each request."""
    got: list[int] = []

    async def take(request: web.Request) -> web.Response:
        got.append(len(await request.read()))
        return web.Response(status=204)

    app = web.Application()
    app.add_routes([web.post("/write", take)])
    async with TestServer(app) as server:
        yield str(server.make_url("/write")), got


@asynccontextmanager
async def running(*workers: Callable[[Lifecycle], Awaitable[None]]) -> AsyncIterator[list[Lifecycle]]:
    async def as_coroutine(work: Awaitable[None]) -> None:
        await work

    lifecycles = [Lifecycle() for _ in workers]
    async with asyncio.TaskGroup() as group:
        for serve, lifecycle in zip(workers, lifecycles, strict=True):
            group.create_task(as_coroutine(serve(lifecycle)))
        try:
            yield lifecycles
        finally:
            for lifecycle in lifecycles:
                lifecycle.stop.set()


# --- what each part does ----------------------------------------------------------------------------------------


async def test_everything_works_with_exactly_what_each_part_is_granted(installation: Installation) -> None:
    world = World(7, [ACCOUNT], [REGION], 4, [ServiceProfile.model_validate({"service": "fast", **FAST})])
    sim = await simulator.start(world)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(sim.close)
        url, got = await stack.enter_async_context(receiving())
        installation.document |= {
            "aws": {"endpoint_url": sim.url, "role_template": "arn:aws:iam::{account}:role/Headgate"},
            "remote_write": {"receivers": [{"name": "all", "url": url, "out_of_order_window_s": 7200}]},
        }
        await installation.grant()
        await setup(installation.config("setup"))
        sql = await asyncpg.connect(installation.document["postgres"]["dsn"])
        stack.push_async_callback(sql.close)
        of = installation.config

        async def landed_and_sent() -> bool:
            sealed = await sql.fetchval("SELECT count(*) FROM windows WHERE sealed_at IS NOT NULL")
            return bool(sealed and got and all(life.ready for life in lifecycles))

        with capture_logs() as logs:
            lifecycles = await stack.enter_async_context(
                running(
                    lambda life: exporter.serve(of("exporter"), "exporter-1", life),
                    lambda life: consumer.serve(of("consumer"), "consumer-1", life),
                    lambda life: remote_writer.serve(of("remote-writer"), "remote-write-1", life),
                    lambda life: coordinator.serve(of("coordinator"), life),
                )
            )
            await eventually(landed_and_sent, timeout_s=40)
            seen = await status(of("viewer"), SystemClock())
        assert [e for e in logs if "Authorization" in str(e)] == []
        assert seen.errors == ()
        groups = [g for g in (seen.exporters, seen.landing, seen.projection, *seen.receivers.values()) if g]
        assert [list(g.members) for g in groups] == [
            ["exporter-1"],
            ["consumer-1"],
            ["consumer-1"],
            ["remote-write-1"],
        ]


# --- what it may not do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
async def test_a_part_is_refused_whatever_its_acls_do_not_name(installed: Installation, part: Part) -> None:
    kafka = installed.config(part).kafka
    acls = acls_of(kafka)
    topics = {acl.name for acl in acls if acl.resource == "topic"}
    groups = {acl.name + ("all" if acl.prefixed else "") for acl in acls if acl.resource == "group"}
    assert len(topics) == 5
    assert len(groups) == 4
    async with kafka_admin(kafka) as admin:
        asking = Asking(admin)
        found = {
            "Read": {t for t in topics if await asking.may_read(t)},
            "Write": {t for t in topics if await asking.may_write(t)},
            "Create": {t for t in topics if await asking.may_create(t)},
            "join": {g for g in groups if await asking.may_join(g)},
        }
        beyond = {
            "delete": [t for t in topics if await asking.may_delete(t)],
            "create": await asking.may_create("elsewhere.raw"),
            "write": await asking.may_write("elsewhere.raw"),
            "read": await asking.may_read("elsewhere.raw"),
        }
    mine = [acl for acl in acls if acl.part == part]
    assert found == {
        operation: {a.name for a in mine if a.resource == "topic" and operation in a.operations}
        for operation in ("Read", "Write", "Create")
    } | {
        "join": {
            a.name + ("all" if a.prefixed else "")
            for a in mine
            if a.resource == "group" and "Read" in a.operations
        }
    }
    assert beyond == {"delete": [], "create": False, "write": False, "read": False}


def test_no_worker_writes_what_another_is_answerable_for() -> None:
    """What the security list promises, said once more without the table that the broker is given."""
    may = {
        (acl.part, operation, acl.name.removeprefix("headgate."))
        for acl in acls_of(Kafka())
        if acl.resource == "topic"
        for operation in acl.operations
    }
    writers = {topic: {p for p, o, t in may if (o, t) == ("Write", topic)} - {"operator"} for topic in TOPICS}
    readers = {topic: {p for p, o, t in may if (o, t) == ("Read", topic)} for topic in TOPICS}
    assert writers == {
        "collect": {"coordinator"},
        "raw": {"exporter"},
        "ledger": {"coordinator", "exporter"},
        "dead": {"consumer", "remote-writer", "coordinator", "exporter"},
        "shards": {"coordinator", "exporter"},
    }
    assert readers["raw"] == {"setup", "consumer", "remote-writer", "operator", "viewer"}
    assert readers["dead"] == {"operator", "viewer"}
    assert {p for p, o, _ in may if o in ("Create", "Alter")} == {"setup"}


# --- what is said where something is refused --------------------------------------------------------------------


async def _list(kafka: Kafka) -> None:
    async with kafka_admin(kafka) as admin:
        await admin.list_topics()


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_either_mechanism_gets_in_over_tls(
    broker: SecureKafka, installed: Installation, mechanism: str
) -> None:
    security = broker.security("headgate-viewer", mechanism)
    await _list(installed.config("viewer", security=security).kafka)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"bootstrap": "other"}, "is not accepted: .*not valid for '127.0.0.1'"),
        ({"security": {"ca_file": "another"}}, "is not accepted: unable to get local issuer"),
        ({"security": {"ca_file": ""}}, "is not accepted: unable to get local issuer"),
        ({"security": {"password": "wrong"}}, "it refuses SCRAM-SHA-512 or who we say we are"),
        ({"security": {"username": "nobody"}}, "it refuses SCRAM-SHA-512 or who we say we are"),
        ({"plain": True}, "it speaks TLS, and kafka.security.protocol is PLAINTEXT"),
        ({"tls_only": True}, "perhaps it asks for a user: see kafka.security.mechanism"),
    ],
    ids=["another-name", "unknown-ca", "the-systems-cas", "password", "user", "plaintext", "no-sasl"],
)
async def test_a_broker_that_is_not_who_it_should_be_is_refused_with_the_reason(
    broker: SecureKafka,
    installed: Installation,
    tmp_path: Path,
    change: dict[str, Any],
    what: str,
) -> None:
    security = broker.security("headgate-viewer") | change.get("security", {})
    if change.get("plain"):
        security = {"protocol": "PLAINTEXT"}
    if change.get("tls_only"):
        security = {"protocol": "SSL", "ca_file": security["ca_file"]}
    if security.get("ca_file") == "another":
        security["ca_file"] = str(Authority(tmp_path).ca_file)
    bootstrap = f"{LOOPBACK}:{broker.other_port}" if "bootstrap" in change else broker.bootstrap
    with pytest.raises(Transient, match=what) as refused:
        await _list(installed.config("viewer", security=security, bootstrap=bootstrap).kafka)
    assert bootstrap in str(refused.value)
    assert "wrong" not in str(refused.value)


async def test_where_there_is_no_tls_that_is_said(kafka_bootstrap: str, installed: Installation) -> None:
    with pytest.raises(Transient, match=r"it speaks no TLS, and kafka\.security.protocol is SASL_SSL"):
        await _list(installed.config("viewer", bootstrap=kafka_bootstrap).kafka)


async def test_a_topic_that_is_missing_stays_missing_and_is_named_with_the_remedy(
    installed: Installation,
) -> None:
    """Not even who may do everything makes one by using it."""
    config = installed.config(None, prefix="absent")
    kafka = config.kafka
    producer = Producer(kafka, "test", deadline_s=1.0)
    with pytest.raises(Transient, match=r"absent\.raw .*run `headgate setup`"):
        await producer.send(kafka.topic("raw"), [Outgoing(b"key", b"value")])
    await producer.close()
    with pytest.raises(Transient, match=r"absent\.raw: is not there.*run `headgate setup`"):
        await member_of(kafka, "raw", "absent.postgres").start()
    with pytest.raises(Transient, match=r"absent\.raw: is not there.*run `headgate setup`"):
        await scan(kafka, kafka.topic("raw"), lambda _: False)
    with pytest.raises(Fatal, match=r"absent\.collect: is not there.*run `headgate setup`"):
        await check_slots(config)
    async with kafka_admin(kafka) as admin:
        assert [t for t in await admin.list_topics() if t.startswith("absent")] == []


async def test_what_a_part_may_not_do_is_an_error_that_names_the_acls(installed: Installation) -> None:
    """What each worker would say whose user lacks something."""
    exporter_, consumer_ = (installed.config(part).kafka for part in ("exporter", "consumer"))
    for kafka, topic in ((consumer_, "raw"), (consumer_, "collect"), (exporter_, "collect")):
        producer = Producer(kafka, "test")
        with pytest.raises(Transient, match=f"{topic} .*AuthorizationFailed.*headgate acls"):
            await producer.send(kafka.topic(topic), [Outgoing(b"key", b"value")])  # type: ignore[arg-type]
        await producer.close()
    with pytest.raises(Transient, match=r"acl\.collect: .*may not be seen.*headgate acls"):
        await member_of(consumer_, "collect", "acl.postgres").start()
    member = member_of(consumer_, "raw", "acl.exporters")
    await member.start()
    with pytest.raises(Transient, match=r"acl\.exporters.*GroupAuthorizationFailed.*headgate acls"):
        await member.poll(1, 5.0)
    await member.stop()
    with pytest.raises(Transient, match=r"no start committed: GroupAuthorizationFailed.*headgate acls"):
        await commit_start(consumer_, "acl.raw", "acl.exporters", 1)
    with pytest.raises(Transient, match=r"TopicAuthorizationFailed.*headgate acls"):
        await create_topics(installed.config("exporter"))


def member_of(kafka: Kafka, topic: str, group: str) -> Consumer:
    async def assigned(partitions: Sequence[int]) -> dict[int, int]:
        return dict.fromkeys(partitions, 0)

    async def revoked(_: Sequence[int]) -> None: ...

    return Consumer(
        kafka,
        f"{kafka.prefix}.{topic}",
        group,
        client_id="test",
        clock=SystemClock(),
        assigned=assigned,
        revoked=revoked,
    )


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_a_resource_for_the_named_principals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_text(
        'accounts: [{id: "123456789012", regions: [eu-west-1], services: [ec2]}]\nkafka: {prefix: "mine"}\n'
    )
    arguments = ["acls", "--config", str(path), "--part", "exporter"]
    assert main([*arguments, "--principal", "exporter=User:CN=shard one"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "kafka-acls.sh --bootstrap-server BROKER:PORT --command-config admin.properties --add "
        "--allow-principal 'User:CN=shard one' --operation Read --topic mine.collect"
    )
    assert len(lines) == 6
    assert main([*arguments, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["resource"], r["name"], r["pattern"], r["operations"]) for r in rows][-2:] == [
        ("topic", "mine.dead", "literal", ["Write"]),
        ("group", "mine.exporters", "literal", ["Read"]),
    ]
    assert {r["principal"] for r in rows} == {"User:headgate-exporter"}
    assert main(["acls", "--config", str(path), "--principal", "shard=User:x"]) == 3
    assert "is no PART=TYPE:NAME" in capsys.readouterr().err
