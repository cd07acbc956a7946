"""How Kafka's clients get in: what `kafka.security` says, as options that every client of aiokafka takes.

* Every client of the project is built with `client_options`, so that none is forgotten.
* A password is taken out of its SecretStr here, and goes nowhere but into the client.
* What aiokafka calls "unable to bootstrap" is told apart by a look of our own: no TLS there, TLS where none was meant, a certificate that is
  not trusted or of another name, a password.
* MSK's IAM is SASL/OAUTHBEARER with a token that is signed with the process's own AWS credentials. It is good for 15 minutes, and signed anew
  after five. aiokafka 0.14 does not authenticate again on a connection (KIP-368): the broker closes it in time, and the client comes again.
"""

from __future__ import annotations

import asyncio
import ssl
from functools import cache
from typing import Any, Final

from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    KafkaConnectionError,
    TopicAuthorizationFailedError,
)

from ingest import broken, inflate
from ingest.errors import Fatal
from shard_config.model import Kafka

TOKEN_KEPT_S: Final = 300.0
SIGNING_TIMEOUT_S: Final = 10.0
"""Credentials may come from an endpoint."""
LOOK_S: Final = 3.0

NOT_THERE: Final = "is not there, or may not be seen"
SEE_TO_IT: Final = "run `headgate setup`; where Kafka has ACLs, `headgate acls` prints what each part needs"
"""What to do about a topic that a broker does not tell of."""


def client_options(kafka: Kafka | str) -> dict[str, Any]:
    """Options of AIOKafkaConsumer, AIOKafkaProducer and AIOKafkaAdminClient: where, and as whom. Text is a bootstrap without security.

    Raises Fatal where `ca_file` cannot be read. From the first call on, what brokers hand out inflates within a bound (`ingest.inflate`), and a
    connection that broke says so (`ingest.broken`).
    """
    inflate.bound()
    broken.mend()
    if isinstance(kafka, str):
        return {"bootstrap_servers": kafka}
    security = kafka.security
    options: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap,
        "security_protocol": security.protocol,
    }
    if security.protocol.endswith("SSL"):
        options["ssl_context"] = _ssl_context(security.ca_file)
    if security.mechanism is not None:
        options["sasl_mechanism"] = security.mechanism
    if security.mechanism == "OAUTHBEARER":
        options["sasl_oauth_token_provider"] = _tokens(kafka.msk_region)
    elif security.username is not None and security.password is not None:
        options["sasl_plain_username"] = security.username.get_secret_value()
        options["sasl_plain_password"] = security.password.get_secret_value()
    return options


def bootstrap_of(kafka: Kafka | str) -> str:
    """For messages."""
    return kafka if isinstance(kafka, str) else kafka.bootstrap


def remedy_of(error: BaseException) -> str:
    """What to do about an error of Kafka's; empty where there is no more to say than it does itself."""
    refused = TopicAuthorizationFailedError, GroupAuthorizationFailedError, ClusterAuthorizationFailedError
    return "grant it: `headgate acls` prints what each part needs" if isinstance(error, refused) else ""


async def why_not(kafka: Kafka) -> str:
    """Why the first broker does not let us in, as far as a TLS handshake with it tells; empty where that says nothing. Sends nothing else."""
    host, _, port = kafka.bootstrap.partition(",")[0].rpartition(":")
    security = kafka.security
    means_tls = security.protocol.endswith("SSL")
    context = _ssl_context(security.ca_file) if means_tls else _anybody()
    try:
        async with asyncio.timeout(LOOK_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not accepted: {error.verify_message}; see kafka.security.ca_file"
    except (ConnectionRefusedError, TimeoutError):
        return ""
    except (ssl.SSLError, ConnectionError):
        # Kafka takes a handshake for a request of its own, too long a one, and closes the connection.
        return f"it speaks no TLS, and kafka.security.protocol is {security.protocol}" if means_tls else ""
    except OSError:
        return ""
    writer.close()
    if not means_tls:
        return f"it speaks TLS, and kafka.security.protocol is {security.protocol}"
    if security.mechanism is None:
        return "its certificate is right; perhaps it asks for a user: see kafka.security.mechanism"
    return f"its certificate is right, so it refuses {security.mechanism} or who we say we are"


def _anybody() -> ssl.SSLContext:
    """For a handshake that is not followed by anything."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _ssl_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:  # ssl.SSLError is one
        raise Fatal(
            f"kafka.security.ca_file {ca_file}",
            f"cannot be read: {error}",
            "give a file of PEM certificates, or leave it empty for the system's",
        ) from error


class MskIamTokens(AbstractTokenProvider):  # type: ignore[misc]
    """Tokens for one region. `token` raises KafkaConnectionError where there are no credentials: the client then tries again, bounded."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._token = ""
        self._until_s = 0.0
        self._signing = asyncio.Lock()

    async def token(self) -> str:
        async with self._signing:
            now_s = asyncio.get_running_loop().time()
            if not self._token or now_s >= self._until_s:
                try:
                    async with asyncio.timeout(SIGNING_TIMEOUT_S):
                        self._token = await asyncio.to_thread(_sign, self._region)
                except TimeoutError as error:
                    raise KafkaConnectionError(
                        f"no AWS credentials within {SIGNING_TIMEOUT_S:g} s"
                    ) from error
                self._until_s = now_s + TOKEN_KEPT_S
            return self._token


def _sign(region: str) -> str:
    # Only here: it brings boto3, which nobody else needs (0.1 s and 8 MB).
    from aws_msk_iam_sasl_signer import MSKAuthTokenProvider
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        token: str
        token, _expires_ms = MSKAuthTokenProvider.generate_auth_token(region)
    except (BotoCoreError, ClientError, ValueError, AttributeError) as error:
        # AttributeError: the library (1.0.2) looks for the keys of credentials that are None.
        why = "there are no AWS credentials" if isinstance(error, AttributeError) else str(error)
        raise KafkaConnectionError(
            f"no token for MSK's IAM: {why}; this process needs a role with kafka-cluster:Connect"
        ) from error
    return token


_tokens = cache(MskIamTokens)
"""One for all clients of a process and region."""
