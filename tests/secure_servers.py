"""Servers that ask who one is, over TLS: a Kafka with SCRAM, PLAIN and ACLs, a PostgreSQL with certificates and passwords; and their authority.

All real, on loopback, and made for one run: nobody else trusts this authority.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    TopicAuthorizationFailedError,
)
from aiokafka.protocol.admin import CreateAclsRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.protocol.produce import ProduceRequest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from workers.acls import Acl, Part
from workers.servers import LOOPBACK, KafkaServer, PostgresServer, free_ports

ADMIN, ADMIN_PASSWORD = "admin", "of-a-test-0815"
"""The broker's super user, and itself."""

OTHER_NAME = "elsewhere.example"


class Authority:
    """A certificate authority. Files lie in `home`: `ca.pem`, and `<name>.pem` with a key and its certificate."""

    def __init__(self, home: Path, name: str = "ca") -> None:
        self._home = home
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {name}")])
        self.ca_file = home / f"{name}.pem"
        made = self._certificate(self._name, self._key.public_key())
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        made = made.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
        )
        self._own = made.sign(self._key, hashes.SHA256())
        self.ca_file.write_bytes(_pem(self._own))

    def issue(self, name: str, alternatives: Sequence[x509.GeneralName]) -> tuple[Path, Path]:
        """(key and certificate, certificate alone and key alone follow the names <name>.pem, <name>.key): a server's certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._certificate(subject, key.public_key())
        made = made.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        made = made.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        signed = made.sign(self._key, hashes.SHA256())
        key_file, certificate_file = self._home / f"{name}.key", self._home / f"{name}.crt"
        key_file.touch(mode=0o600)
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        certificate_file.write_bytes(_pem(signed))
        return certificate_file, key_file

    def issue_pem(self, name: str, alternatives: Sequence[x509.GeneralName]) -> Path:
        """One file of both, as Kafka takes it."""
        certificate_file, key_file = self.issue(name, alternatives)
        both = self._home / f"{name}.pem"
        both.touch(mode=0o600)
        both.write_bytes(key_file.read_bytes() + certificate_file.read_bytes())
        return both

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


HERE: Sequence[x509.GeneralName] = (
    x509.IPAddress(ipaddress.ip_address(LOOPBACK)),
    x509.DNSName("localhost"),
)
ELSEWHERE: Sequence[x509.GeneralName] = (x509.DNSName(OTHER_NAME),)

_LOGIN = "org.apache.kafka.common.security.{}LoginModule required"


class SecureKafka(KafkaServer):
    """A broker that lets in over TLS only, by SCRAM-SHA-512 or PLAIN, and lets nobody do what no ACL allows.

    `port` has the right certificate; at `other_port` the same broker shows that of another host.
    """

    def __init__(self, home: Path, authority: Authority, users: Mapping[str, str]) -> None:
        """`users` are passwords by name, for both mechanisms."""
        super().__init__(home)
        self._authority = authority
        self._users = users
        (self.other_port,) = free_ports(1)

    def security(self, user: str, mechanism: str = "SCRAM-SHA-512") -> dict[str, str]:
        """`kafka.security` of one user."""
        return {
            "protocol": "SASL_SSL",
            "mechanism": mechanism,
            "username": user,
            "password": ADMIN_PASSWORD if user == ADMIN else self._users[user],
            "ca_file": str(self._authority.ca_file),
        }

    def ready(self) -> bool:
        """An ApiVersions request is answered over TLS, without an error."""
        request = struct.pack(">hhih", 18, 0, 1, -1)
        context = ssl.create_default_context(cafile=self._authority.ca_file)
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=1) as plain:
                plain.settimeout(1)
                with context.wrap_socket(plain, server_hostname=LOOPBACK) as connection:
                    connection.sendall(struct.pack(">i", len(request)) + request)
                    answer = connection.recv(10)
        except OSError:
            return False
        return len(answer) == 10 and answer[8:10] == b"\0\0"

    def _format_options(self) -> Sequence[str]:
        users = {**self._users, ADMIN: ADMIN_PASSWORD}
        scram = [f"SCRAM-SHA-512=[name={name},password={password}]" for name, password in users.items()]
        return [word for one in scram for word in ("--add-scram", one)]

    def _properties(self) -> str:
        here = self._authority.issue_pem("broker", HERE)
        other = self._authority.issue_pem("other", ELSEWHERE)
        plain = _LOGIN.format("plain.Plain") + f' username="{ADMIN}" password="{ADMIN_PASSWORD}"'
        plain += f' user_{ADMIN}="{ADMIN_PASSWORD}"'
        asked = plain + "".join(f' user_{name}="{password}"' for name, password in self._users.items())
        places = f"SASL_SSL://{LOOPBACK}:{self.port},OTHER://{LOOPBACK}:{self.other_port}"
        # What stands last counts.
        return super()._properties() + "\n".join(
            (
                f"listeners={places},CONTROLLER://{LOOPBACK}:{self._controller_port}",
                f"advertised.listeners={places}",
                "listener.security.protocol.map=CONTROLLER:SASL_PLAINTEXT,SASL_SSL:SASL_SSL,OTHER:SASL_SSL",
                "inter.broker.listener.name=SASL_SSL",
                "sasl.mechanism.inter.broker.protocol=PLAIN",
                "sasl.mechanism.controller.protocol=PLAIN",
                "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512",
                "listener.name.controller.sasl.enabled.mechanisms=PLAIN",
                f"listener.name.controller.plain.sasl.jaas.config={plain};",
                *(
                    f"listener.name.{listener}.{mechanism}.sasl.jaas.config={login};"
                    for listener in ("sasl_ssl", "other")
                    for mechanism, login in (
                        ("plain", asked),
                        ("scram-sha-512", _LOGIN.format("scram.Scram")),
                    )
                ),
                "ssl.keystore.type=PEM",
                f"ssl.keystore.location={here}",
                "ssl.truststore.type=PEM",
                f"ssl.truststore.location={self._authority.ca_file}",
                "listener.name.other.ssl.keystore.type=PEM",
                f"listener.name.other.ssl.keystore.location={other}",
                "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                f"super.users=User:{ADMIN}",
                "allow.everyone.if.no.acl.found=false",
                "",
            )
        )


# --- what Kafka is told, and asked, in its own protocol ---------------------------------------------------------

_RESOURCES = {"topic": 2, "group": 3}
_OPERATIONS = {"Read": 3, "Write": 4, "Create": 5, "Alter": 7, "Describe": 8, "DescribeConfigs": 10}
_LITERAL, _PREFIXED, _ALLOW, _CLUSTER_WIDE = 3, 4, 3, "*"


async def grant(admin: AIOKafkaAdminClient, acls: Iterable[Acl], principal_of: Callable[[Part], str]) -> None:
    """What `headgate acls` prints, without the JVM that each of its commands takes."""
    for acl in acls:
        for operation in acl.operations:
            request = CreateAclsRequest(
                _RESOURCES[acl.resource],
                acl.name,
                _PREFIXED if acl.prefixed else _LITERAL,
                principal_of(acl.part),
                _CLUSTER_WIDE,
                _OPERATIONS[operation],
                _ALLOW,
            )
            answer = await admin._send_to_controller(request)
            [(code, said)] = answer.creation_responses
            assert code == 0, f"{acl} {operation}: {code} {said}"


class Asking:
    """What one user may do, asked of the broker by requests that change nothing where they are allowed."""

    def __init__(self, admin: AIOKafkaAdminClient) -> None:
        self._admin = admin

    async def may_write(self, topic: str) -> bool:
        """A batch of no records is not written by whoever may write either."""
        answer = await self._admin._send_request(ProduceRequest(None, -1, 5_000, [(topic, [(0, b"")])]))
        [(_, [(_, code, *_)])] = answer.topics
        assert code != 0
        return int(code) != int(TopicAuthorizationFailedError.errno)

    async def may_read(self, topic: str) -> bool:
        request = FetchRequest(10, 1, 1 << 20, 0, [(topic, [(0, 0, 1 << 20)])])
        answer = await self._admin._send_request(request)
        [(_, [(_, code, *_)])] = answer.topics
        assert code in (0, TopicAuthorizationFailedError.errno), code
        return int(code) == 0

    async def may_join(self, group: str) -> bool:
        """A heartbeat of nobody. The one broker is every group's coordinator."""
        answer = await self._admin._send_request(HeartbeatRequest(group, 1, "nobody"))
        assert answer.error_code != 0
        return int(answer.error_code) != int(GroupAuthorizationFailedError.errno)

    async def may_delete(self, topic: str) -> bool:
        answer = await self._admin.delete_topics([topic])
        [(_, code, *_)] = answer.topic_error_codes
        return int(code) != int(TopicAuthorizationFailedError.errno)

    async def may_create(self, topic: str) -> bool:
        """Tried only, for the broker is asked to validate and no more."""
        answer = await self._admin.create_topics([NewTopic(topic, 1, 1)], validate_only=True)
        [(_, code, *_)] = answer.topic_errors
        return int(code) not in (TopicAuthorizationFailedError.errno, ClusterAuthorizationFailedError.errno)


# --- PostgreSQL -------------------------------------------------------------------------------------------------


def tls_programs() -> Path | None:
    """The newest PostgreSQL of the system that can speak TLS: what pgserver brings cannot. None: there is none."""
    for found in sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=_version, reverse=True):
        said = subprocess.run(
            [found.with_name("pg_config"), "--configure"], capture_output=True, text=True, timeout=10
        )
        if "--with-openssl" in said.stdout or "--with-ssl=openssl" in said.stdout:
            return found.parent
    return None


def _version(path: Path) -> int:
    name = path.parts[-3]
    return int(name) if name.isdecimal() else 0


class SecurePostgres(PostgresServer):
    """A PostgreSQL that lets in over TLS only, users by password. Where the system has none that can: without TLS, by password all the same."""

    def __init__(self, home: Path, authority: Authority) -> None:
        super().__init__(home, durable=False)
        self._authority = authority
        self._tls = tls_programs()

    @property
    def tls(self) -> bool:
        return self._tls is not None

    def dsn(self, database: str = "postgres", user: str = "headgate", **options: str) -> str:
        """With certificate and name checked; the superuser needs no password, other users do."""
        checked = {"sslmode": "verify-full", "sslrootcert": str(self._authority.ca_file)} if self._tls else {}
        query = urlencode({**checked, **options})
        return f"postgresql://{user}@{LOOPBACK}:{self.port}/{database}" + (f"?{query}" if query else "")

    def prepare(self) -> None:
        super().prepare()
        data = self.dir / "data"
        kind = "hostssl" if self._tls else "host"
        lines = (f"{kind} all headgate {LOOPBACK}/32 trust", f"{kind} all all {LOOPBACK}/32 scram-sha-256")
        (data / "pg_hba.conf").write_text("\n".join((*lines, "")))
        for source, name in zip(self._authority.issue("postgres", HERE), _PAIR, strict=True):
            target = data / name
            shutil.copyfile(source, target)
            target.chmod(0o600)
            os.chown(target, data.stat().st_uid, data.stat().st_gid)

    def _programs(self) -> Path:
        return self._tls or super()._programs()

    def _settings(self) -> dict[str, str]:
        tls = {"ssl": "on", "ssl_cert_file": _PAIR[0], "ssl_key_file": _PAIR[1]} if self._tls else {}
        return {**super()._settings(), **tls}


_PAIR = ("server.crt", "server.key")
