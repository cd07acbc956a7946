"""How Kafka's clients get in: the options, what configurations are refused, MSK's tokens, and a real broker that asks who one is."""

from __future__ import annotations

import base64
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from aiokafka.admin import NewTopic
from aiokafka.errors import KafkaConnectionError

from ingest.brokers import TOKEN_KEPT_S, MskIamTokens, client_options
from ingest.errors import Fatal, Transient
from ingest.log import Outgoing, Producer, commit_start
from ingest.scan import scan
from shard_config.load import ConfigErrors, loads
from shard_config.model import Config, Kafka, KafkaSecurity
from workers.servers import LOOPBACK, KafkaServer, free_ports
from workers.setup import kafka_admin

MSK = "b-1.prod.abc123.c2.kafka.eu-west-1.amazonaws.com:9098"
BASE = 'accounts:\n  - {id: "123456789012", regions: [eu-west-1], services: [ec2]}\n'


def config_of(security: str, bootstrap: str = "k:9094") -> Config:
    text = f"{BASE}kafka:\n  bootstrap: {bootstrap}\n  security: {security}\n"
    return loads(text, "headgate.yaml", {"KAFKA_USER": "headgate", "KAFKA_PASSWORD": "s3cret"})


def test_a_bootstrap_alone_is_a_cluster_without_security() -> None:
    assert client_options("k:9092") == {"bootstrap_servers": "k:9092"}
    assert client_options(Kafka(bootstrap="k:9092"))["security_protocol"] == "PLAINTEXT"


def test_a_username_and_a_password_come_from_the_environment_into_the_client_and_into_no_text() -> None:
    config = config_of(
        "{protocol: SASL_SSL, mechanism: SCRAM-SHA-512, username: {env: KAFKA_USER}, password: {env: KAFKA_PASSWORD}}"
    )
    options = client_options(config.kafka)
    assert isinstance(options.pop("ssl_context"), ssl.SSLContext)
    assert options == {
        "bootstrap_servers": "k:9094",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "headgate",
        "sasl_plain_password": "s3cret",
    }
    assert "s3cret" not in repr(config)


def test_tls_checks_the_brokers_name_and_certificate() -> None:
    context = client_options(config_of("{protocol: SSL}").kafka)["ssl_context"]
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_a_ca_file_that_cannot_be_read_is_fatal_with_its_name(tmp_path: Path) -> None:
    broken = tmp_path / "ca.crt"
    broken.write_text("no certificate\n")
    for path in (tmp_path / "missing.crt", broken):
        with pytest.raises(Fatal, match=path.name):
            client_options(Kafka(security=KafkaSecurity(protocol="SSL", ca_file=str(path))))


@pytest.mark.parametrize(
    ("security", "what"),
    [
        ("{protocol: SASL_SSL}", "SASL_SSL needs a mechanism"),
        ("{mechanism: PLAIN, username: u, password: p}", "the protocol is PLAINTEXT"),
        ("{protocol: SASL_SSL, mechanism: SCRAM-SHA-256, username: u}", "needs a username and a password"),
        ("{protocol: SASL_PLAINTEXT, mechanism: OAUTHBEARER}", "OAUTHBEARER wants SASL_SSL"),
        ("{protocol: SASL_SSL, mechanism: OAUTHBEARER, password: p}", "no username or password"),
        ("{protocol: SASL_SSL, mechanism: OAUTHBEARER}", "no MSK broker"),
        ("{ca_file: /ca.crt}", "certificates are part of SSL"),
        ("{protocol: SASL_SSL, mechanism: GSSAPI}", "SCRAM-SHA-512"),
        ("{protocol: SSL, ca: /ca.crt}", 'unknown key "ca"'),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(security: str, what: str) -> None:
    with pytest.raises(ConfigErrors) as refused:
        config_of(security)
    assert what in str(refused.value)
    assert "headgate.yaml:" in str(refused.value)


async def test_msks_token_is_a_request_that_is_signed_for_the_brokers_region(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    kafka = config_of("{protocol: SASL_SSL, mechanism: OAUTHBEARER}", MSK).kafka
    tokens = client_options(kafka)["sasl_oauth_token_provider"]
    assert tokens is client_options(kafka)["sasl_oauth_token_provider"]
    token = await MskIamTokens(kafka.msk_region).token()
    url = urlparse(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode())
    asked = parse_qs(url.query)
    assert url.hostname == "kafka.eu-west-1.amazonaws.com"
    assert asked["Action"] == ["kafka-cluster:Connect"]
    assert asked["X-Amz-Credential"][0].split("/")[2:4] == ["eu-west-1", "kafka-cluster"]
    assert int(asked["X-Amz-Expires"][0]) > 2 * TOKEN_KEPT_S


async def test_without_credentials_msks_token_is_an_error_of_the_connection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(KafkaConnectionError, match="kafka-cluster:Connect"):
        await MskIamTokens("eu-west-1").token()


@pytest.mark.parametrize(
    ("bootstrap", "region"),
    [
        (MSK, "eu-west-1"),
        ("boot-abc.c1.kafka-serverless.us-east-2.amazonaws.com:9098", "us-east-2"),
        ("b-1.x.c2.kafka.cn-north-1.amazonaws.com.cn:9098", "cn-north-1"),
        ("kafka:9092", ""),
    ],
)
def test_the_region_is_in_an_msk_brokers_name(bootstrap: str, region: str) -> None:
    assert Kafka(bootstrap=bootstrap).msk_region == region


class AskingBroker(KafkaServer):
    """A real broker with a second listener, that wants SASL."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        (self.sasl_port,) = free_ports(1)

    def _properties(self) -> str:
        mechanism = "listener.name.sasl.{}.sasl.jaas.config=org.apache.kafka.common.security.{} required{};\n"
        plain = (
            super()
            ._properties()
            .replace(",CONTROLLER://", f",SASL://{LOOPBACK}:{self.sasl_port},CONTROLLER://")
        )
        return (
            plain.replace(
                "advertised.listeners=", f"advertised.listeners=SASL://{LOOPBACK}:{self.sasl_port},"
            )
            + "listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL:SASL_PLAINTEXT\n"
            + "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512\n"
            + mechanism.format("plain", "plain.PlainLoginModule", f' user_headgate="{PASSWORD}"')
            + mechanism.format("scram-sha-512", "scram.ScramLoginModule", "")
        )

    def kafka(self, mechanism: str, password: str) -> Kafka:
        return config_of(
            f"{{protocol: SASL_PLAINTEXT, mechanism: {mechanism}, username: headgate, password: {password}}}",
            f"{LOOPBACK}:{self.sasl_port}",
        ).kafka


PASSWORD = "of-a-test-4711"


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AskingBroker]:
    broker = AskingBroker(tmp_path_factory.mktemp("asking"))
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


@pytest.fixture(scope="module")
def scram_user(asking: AskingBroker) -> None:
    """SCRAM's users are the cluster's, made by whoever may."""
    command = [
        "kafka.admin.ConfigCommand",
        "--bootstrap-server",
        asking.bootstrap,
        "--alter",
        "--entity-type",
        "users",
    ]
    user = [
        "--entity-name",
        "headgate",
        "--add-config",
        f"SCRAM-SHA-512=[iterations=4096,password={PASSWORD}]",
    ]
    subprocess.run(
        [*asking._java(), *command, *user], cwd=asking.dir, check=True, capture_output=True, timeout=60
    )


@pytest.mark.usefixtures("scram_user")
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_every_kind_of_client_gets_in_with_a_password(asking: AskingBroker, mechanism: str) -> None:
    kafka = asking.kafka(mechanism, PASSWORD)
    topic = f"t-{mechanism.lower()}"
    async with kafka_admin(kafka) as admin:
        await admin.create_topics([NewTopic(topic, 1, 1)])
    producer = Producer(kafka, "test")
    try:
        [position] = await producer.send(topic, [Outgoing(b"key", b"value")])
    finally:
        await producer.close()
    await commit_start(kafka, topic, "group", 1)
    found: list[bytes] = []
    await scan(kafka, topic, lambda record: bool(found.append(record.value)))
    assert (position.offset, found) == (0, [b"value"])


async def test_a_wrong_password_is_transient_and_the_log_says_why(
    asking: AskingBroker, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Transient, match=asking.kafka("PLAIN", "wrong").bootstrap):
        async with kafka_admin(asking.kafka("PLAIN", "wrong")):
            pass
    assert "Invalid username or password" in caplog.text
