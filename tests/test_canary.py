"""A secret appears nowhere: not in a log, an error, a metric, a page, a report, the ledger, Kafka, the archive or a command line."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import aiohttp
import asyncpg
import botocore.session
import numpy as np
import psutil
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer

from ingest.archive import open_archive
from ingest.brokers import client_options
from ingest.clock import SystemClock
from ingest.errors import HeadgateError
from ingest.log import Outgoing, Producer
from ingest.ports import Record, SeriesSamples
from ingest.scan import scan
from ingest.sinks.connection import open_connection, server_of
from ingest.sinks.prompb import encoded_labels
from ingest.sinks.remote_write import RemoteWrite
from ingest.sources.aws import Aws, Tally
from shard_config.known import shipped_services
from shard_config.load import ConfigErrors, load, loads
from shard_config.model import S3, Config, Kafka, KafkaSecurity, Postgres
from shard_config.remote_write import Receiver
from tests.canary import CANARIES, Gathered, forms, leaks
from tests.conftest import DOCKER, eventually
from workers import cli, simulator
from workers.lifecycle import configure_logs
from workers.servers import LOOPBACK, PostgresServer, _die_with_parent, free_ports
from workers.simulated import sts
from workers.world import World

ROOT = Path(__file__).resolve().parent.parent
ACCOUNT, REGION = "100000000001", "eu-west-1"
AWS_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIANOSECRET00000001",
    "AWS_SECRET_ACCESS_KEY": CANARIES["the AWS secret key"],
    "AWS_SESSION_TOKEN": CANARIES["the AWS session token"],
    "CANARY_EXTERNAL_ID": CANARIES["the ExternalId"],
    "CANARY_KAFKA_USER": CANARIES["Kafka's user"],
}


def test_every_form_of_every_canary_would_be_noticed() -> None:
    for name, secret in CANARIES.items():
        for text in (
            f"… {secret} …".encode(),
            json.dumps({"x": secret}).encode(),
            *(
                base64.b64encode(before + secret.encode() + b":end")
                for before in (b"", b"u:", b"me:", b"you:")
            ),
            *forms(secret),
        ):
            assert leaks(text) == [name]


# --- a whole stack -------------------------------------------------------------------------------------------------


@contextmanager
def guarded_postgres(home: Path) -> Iterator[tuple[str, str]]:
    """A PostgreSQL that asks `worker` for the canary. Gives the DSN of its database without a password, and the superuser's."""
    server = PostgresServer(home, durable=False)
    server.prepare()
    rules = "host all headgate 127.0.0.1/32 trust\nhost all worker 127.0.0.1/32 scram-sha-256\n"
    (server.dir / "data" / "pg_hba.conf").write_text(rules)
    try:
        server.launch()
        server.wait_ready()
        yield f"postgresql://worker@{LOOPBACK}:{server.port}/headgate", server.dsn()
    finally:
        server.stop()


async def make_database(superuser: str) -> None:
    connection = await asyncpg.connect(superuser)
    try:
        password = CANARIES["PostgreSQL's password"]
        await connection.execute(f"CREATE ROLE worker LOGIN PASSWORD '{password}'")
        await connection.execute("CREATE DATABASE headgate OWNER worker")
    finally:
        await connection.close()


@asynccontextmanager
async def receivers(taken: list[str]) -> AsyncIterator[tuple[str, str]]:
    """URLs of a receiver that takes everything, and of one that refuses everything and repeats what it was sent."""

    async def take(request: web.Request) -> web.Response:
        taken.append(request.headers.get("Authorization", ""))
        return web.Response(status=204)

    async def refuse(request: web.Request) -> web.Response:
        taken.append(request.headers.get("Authorization", ""))
        return web.Response(status=401, text=f"{dict(request.headers)} is not let in")

    app = web.Application(client_max_size=2**26)
    app.add_routes([web.post("/take", take), web.post("/refuse", refuse)])
    async with TestServer(app, host=LOOPBACK) as server:
        yield f"http://{LOOPBACK}:{server.port}/take", f"http://{LOOPBACK}:{server.port}/refuse"


@contextmanager
def processes(
    home: Path, commands: Mapping[str, list[str]], environ: Mapping[str, str]
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """A process a command, which logs to `<home>/<name>.log`; all end with the context."""
    found: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (home / f"{name}.log").open("wb") as log:
                found[name] = subprocess.Popen(
                    [*_die_with_parent(signal.SIGKILL), sys.executable, "-m", "workers.cli", *command],
                    cwd=ROOT,
                    env={**os.environ, **environ},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        yield found
    finally:
        for process in found.values():
            process.terminate()
        for process in found.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def yaml_of(
    kafka: str, dsn: str, s3: str, bucket: str, prefix: str, aws: str, urls: tuple[str, str], home: Path
) -> str:
    """Everything that takes a secret has one: inline, from the environment, or from a file."""
    for name in ("Kafka's password", "PostgreSQL's password", "the remote-write password"):
        (home / f"{name[:3]}.secret").write_text(CANARIES[name] + "\n")
    return f"""
accounts:
  - {{id: "{ACCOUNT}", regions: [{REGION}], services: [sqs], external_id: {{env: CANARY_EXTERNAL_ID}}}}
services: {{sqs: {{settling_s: 60}}}}
slots: 2
startup_lookback_s: 900
aws: {{endpoint_url: "{aws}", role_template: "arn:aws:iam::{{account}}:role/Reader"}}
kafka:
  bootstrap: "{kafka}"
  prefix: {prefix}
  raw_partitions: 1
  ledger_partitions: 1
  security: {{username: {{env: CANARY_KAFKA_USER}}, password: {{file: Kaf.secret}}}}
postgres: {{dsn: "{dsn}", password: {{file: Pos.secret}}}}
s3: {{bucket: {bucket}, endpoint_url: "{s3}"}}
inventory: {{source: describe}}
remote_write:
  receivers:
    - {{name: takes, url: "{urls[0]}", out_of_order_window_s: 7200, username: me, password: {{file: the.secret}}}}
    - {{name: refuses, url: "{urls[1]}", out_of_order_window_s: 7200, bearer_token: "{CANARIES["the remote-write token"]}"}}
  shard_by: [account, region, service]
"""


WORLD = World(7, (ACCOUNT,), (REGION,), 40, (shipped_services()["sqs"],))
METRIC = WORLD.metrics(ACCOUNT, REGION)[0]
WHOSE = ["--account", ACCOUNT, "--region", REGION, "--namespace", METRIC[0], "--metric", METRIC[1]]
WHOSE += [word for name, value in METRIC[2] for word in ("--dim", f"{name}={value}")] + ["--stat", "Sum"]

COMMANDS = (
    ["status"], ["status", "--json"], ["gaps", "--format", "json"], ["cost", "--format", "csv"], ["plan"], ["quote"], ["positions"],
    ["samples", "--account", ACCOUNT, "--format", "json"], ["settle"], ["pause"], ["dead", "list"], ["preflight"], ["inventory", "refresh"],
    ["inventory", "list"], ["report", "--format", "html", "--out", "REPORT"], ["report", "--format", "csv"], ["report", "--format", "json"],
    ["audit", "--from", "FROM", "--to", "TO"], ["why", "--at", "FROM", *WHOSE], ["rules"],
    ["backfill", "--from", "FROM", "--to", "TO", "--dry-run"],
)  # fmt: skip


async def test_no_secret_of_a_whole_stack_leaves_it(
    tmp_path: Path,
    kafka_bootstrap: str,
    s3_endpoint: str,
    bucket: str,
    topic_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if DOCKER:
        pytest.skip("the S3 of containers wants credentials of its own, and these are canaries")
    given: dict[str, str] = {}
    answer = sts.answer

    def record(*args: Any) -> dict[str, Any]:
        result = answer(*args)
        for key, value in result.get("Credentials", {}).items():
            if key in ("SecretAccessKey", "SessionToken"):
                given[f"{key} {len(given)}"] = value
        return result

    monkeypatch.setattr(sts, "answer", record)
    for name, value in AWS_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    authorized: list[str] = []
    gathered = Gathered()
    with guarded_postgres(tmp_path) as (dsn, superuser):
        await make_database(superuser)
        async with receivers(authorized) as urls:
            aws = await simulator.start(WORLD, external_id=CANARIES["the ExternalId"])
            try:
                path = tmp_path / "headgate.yaml"
                path.write_text(
                    yaml_of(kafka_bootstrap, dsn, s3_endpoint, bucket, topic_prefix, aws.url, urls, tmp_path)
                )
                await run_stack(path, superuser, gathered, authorized)
                await run_commands(path, gathered, capfd)
                config = load(path, environ=os.environ)
            finally:
                await aws.close()
        await gather_database(superuser, gathered)
        gathered.add("PostgreSQL's log", (tmp_path / "postgres.log").read_bytes())
    await gather_kafka(config, gathered)
    gather_s3(config, gathered)
    gathered.add("repr", repr(config) + str(config) + config.model_dump_json())

    assert len(given) >= 2
    assert leaks(base64.b64decode(max(authorized)[6:]) + "".join(authorized).encode()) != []
    missing = [place for place, words in EXPECTED.items() if words not in gathered.places.get(place, b"")]
    assert missing == [], sorted(gathered.places)
    assert gathered.leaks({**CANARIES, **given}) == {}


EXPECTED = {
    "consumer /metrics": b"headgate_",
    "coordinator /": b"<html",
    "coordinator /page.json": ACCOUNT.encode(),
    "samples": b"AWS/SQS",
    "preflight": b"sts",
    "command lines": b"remote-write",
    "exporter": b"worker_started",
    "table looks": ACCOUNT.encode(),
    "Kafka": ACCOUNT.encode(),
    "S3": ACCOUNT.encode(),
    "remote-writer": b"401",
    "bundle": b"versions",
    "report's page": b"<html",
}
"""That something is there to be searched."""


async def run_stack(path: Path, superuser: str, gathered: Gathered, authorized: list[str]) -> None:
    """Everything collects, lands and is sent on; then what the workers print, serve and are called is gathered."""
    ports = dict(zip(("coordinator", "exporter", "consumer", "remote-writer"), free_ports(4), strict=True))
    config = ["--config", str(path)]
    assert await asyncio.to_thread(cli.main, ["setup", *config]) == 0
    commands = {
        "coordinator": ["coordinator", *config],
        "exporter": ["exporter", *config, "--shard", "exporter-1"],
        "consumer": ["consumer", *config, "--name", "consumer-1"],
        "remote-writer": ["remote-write", *config, "--name", "remote-write-1"],
    }
    commands = {name: [*words, "--metrics-port", str(ports[name])] for name, words in commands.items()}
    with processes(path.parent, commands, AWS_ENVIRONMENT) as running:
        store = await asyncpg.connect(superuser.rpartition("/")[0] + "/headgate")
        try:

            async def everything_came() -> bool:
                ended = {name: p.returncode for name, p in running.items() if p.poll() is not None}
                assert not ended, {name: (path.parent / f"{name}.log").read_text()[-2000:] for name in ended}
                landed = await store.fetchval("SELECT count(*) FROM samples") and await store.fetchval(
                    "SELECT count(*) FROM looks"
                )
                return bool(landed and authorized)

            await eventually(everything_came, timeout_s=100)
        finally:
            await store.close()
        async with aiohttp.ClientSession() as http:
            for name, port in ports.items():
                for page in ("metrics", "healthz", "readyz", "", "page.json", "shards"):
                    async with http.get(f"http://{LOOPBACK}:{port}/{page}") as answer:
                        gathered.add(f"{name} /{page}", await answer.read())
        for process in running.values():
            there = psutil.Process(process.pid)
            gathered.add("command lines", " ".join([there.name(), *there.cmdline()]))
    for name in commands:
        gathered.add(name, (path.parent / f"{name}.log").read_bytes())


async def run_commands(path: Path, gathered: Gathered, capfd: pytest.CaptureFixture[str]) -> None:
    """What every command prints and writes."""
    now_s = time.time()
    times = {"FROM": now_s - 600, "TO": now_s - 300}
    out, report = path.parent / "bundle.tar.gz", path.parent / "report.html"
    config = ["--config", str(path)]
    for command in (*COMMANDS, ["check", str(path)], ["bundle", "--out", str(out)]):
        words = [_time(times[w]) if w in times else str(report) if w == "REPORT" else w for w in command]
        more = [] if command[0] == "check" else config
        capfd.readouterr()
        code = await asyncio.to_thread(cli.main, [*words, *more])
        said = capfd.readouterr()
        assert code in (0, 1), (command, said)
        gathered.add(
            " ".join([command[0], *command[-1:]]) if command[0] == "report" else command[0],
            said.out + said.err,
        )
    gathered.add("bundle", out.read_bytes())
    gathered.add("report's page", report.read_bytes())


def _time(at_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:00Z", time.gmtime(at_s))


async def gather_database(superuser: str, gathered: Gathered) -> None:
    """Every row of every table, as text."""
    connection = await asyncpg.connect(superuser.rpartition("/")[0] + "/headgate")
    try:
        tables = await connection.fetch(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        )
        for table in [r["relname"] for r in tables]:
            buffer = io.BytesIO()
            await connection.copy_from_table(table, output=buffer)
            gathered.add(f"table {table.partition('_20')[0]}", buffer.getvalue())
        activity = await connection.fetch("SELECT a::text FROM pg_stat_activity AS a")
        gathered.add_all("pg_stat_activity", [r["a"] for r in activity])
    finally:
        await connection.close()


async def gather_kafka(config: Config, gathered: Gathered) -> None:
    """Every record of every topic."""

    def take(record: Record) -> bool:
        gathered.add("Kafka", record.key or b"")
        gathered.add("Kafka", record.value)
        return False

    names: tuple[Literal["collect", "raw", "ledger", "dead", "shards"], ...] = (
        "collect",
        "raw",
        "ledger",
        "dead",
        "shards",
    )
    for name in names:
        await scan(config.kafka, config.kafka.topic(name), take)


def gather_s3(config: Config, gathered: Gathered) -> None:
    """Every object, with its key and metadata."""
    client = botocore.session.get_session().create_client(
        "s3", endpoint_url=config.s3.endpoint_url, region_name="us-east-1"
    )
    for listed in client.list_objects_v2(Bucket=config.s3.bucket)["Contents"]:
        got = client.get_object(Bucket=config.s3.bucket, Key=listed["Key"])
        gathered.add("S3", listed["Key"] + str(got["Metadata"]) + str(got["ResponseMetadata"]))
        gathered.add("S3", got["Body"].read())
    client.close()


# --- what fails ----------------------------------------------------------------------------------------------------


def said_of(error: BaseException) -> str:
    """Everything that any printer of this error could show: its chain, its group, its fields."""
    whole = "".join(traceback.format_exception(error))
    return "\n".join([whole, str(error), repr(error), repr(vars(error))])


@asynccontextmanager
async def echo(status: int) -> AsyncIterator[str]:
    """A server that answers every request with an error which repeats all that it was sent, as AWS and as anybody would."""

    async def answer(request: web.Request) -> web.Response:
        sent = " ".join(
            [
                str(request.rel_url),
                *(f"{k}:{v}" for k, v in request.headers.items()),
                (await request.read()).decode(errors="replace"),
            ]
        )
        plain = sent.replace("&", " ").replace("<", " ")
        if request.content_type == "application/x-www-form-urlencoded":
            text = f"<ErrorResponse><Error><Code>SignatureDoesNotMatch</Code><Message>{plain}</Message></Error></ErrorResponse>"
        elif request.path.startswith("/bucket"):
            text = f"<Error><Code>SignatureDoesNotMatch</Code><Message>{plain}</Message><CanonicalRequest>{plain}</CanonicalRequest></Error>"
        else:
            text = json.dumps({"__type": "SignatureDoesNotMatch", "message": plain})
        return web.Response(
            status=status, text=text, content_type="application/xml" if text[0] == "<" else "application/json"
        )

    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app, host=LOOPBACK) as server:
        yield f"http://{LOOPBACK}:{server.port}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The environment's canaries, and what is logged on a terminal, where tracebacks are prettiest."""

    for name, value in AWS_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logs("canary")
    return terminal


@pytest.mark.parametrize("status", [400, 403])
async def test_what_aws_repeats_of_a_request_is_in_no_error(status: int, canaries: io.StringIO) -> None:
    async with echo(status) as url:
        text = f"""
accounts: [{{id: "{ACCOUNT}", regions: [{REGION}], services: [sqs], external_id: {{env: CANARY_EXTERNAL_ID}}}}]
aws: {{endpoint_url: "{url}", role_template: "arn:aws:iam::{{account}}:role/Reader"}}
"""
        config = loads(text, "f", os.environ)
        aws = Aws(config, SystemClock())
        try:
            with pytest.raises(HeadgateError) as failure:
                await aws.credentials(config.accounts[0], time.monotonic() + 5, Tally())
        finally:
            await aws.close()
    assert "SignatureDoesNotMatch" in str(failure.value)
    assert leaks(said_of(failure.value).encode()) == []
    assert "aws_credentials_refused" in canaries.getvalue()
    assert leaks(canaries.getvalue().encode()) == []


async def test_what_s3_repeats_of_a_request_is_in_no_error(canaries: io.StringIO) -> None:
    async with (
        echo(403) as url,
        open_archive(S3(bucket="bucket", endpoint_url=url), SystemClock()) as archive,
    ):
        with pytest.raises(HeadgateError) as failure:
            await archive.get(ARCHIVE_KEY)
    assert leaks(said_of(failure.value).encode()) == []
    assert leaks(canaries.getvalue().encode()) == []


@pytest.mark.parametrize(
    "credentials",
    [
        {"bearer_token": CANARIES["the remote-write token"]},
        {"username": "me", "password": CANARIES["the remote-write password"]},
    ],
)
async def test_what_a_receiver_repeats_of_a_request_is_in_no_error(
    credentials: dict[str, Any], canaries: io.StringIO
) -> None:
    async with echo(401) as url:
        write = RemoteWrite(Receiver.model_validate({"name": "a", "url": url, **credentials}), SystemClock())
        try:
            with pytest.raises(HeadgateError) as failure:
                await write.write(
                    [
                        SeriesSamples(
                            encoded_labels((("__name__", "x"),)),
                            np.array([time.time_ns() // 10**6]),
                            np.array([1.0]),
                        )
                    ]
                )
        finally:
            await write.close()
    assert "HTTP 401" in str(failure.value)
    assert leaks(said_of(failure.value).encode()) == []


@pytest.mark.parametrize("where", ["password", "dsn"])
def test_a_wrong_password_of_postgresql_is_in_no_error(
    where: str, tmp_path: Path, canaries: io.StringIO
) -> None:
    wrong = CANARIES["PostgreSQL's password"]
    quoted = wrong.replace("/", "%2F").replace("+", "%2B")

    async def refused(dsn: str, superuser: str) -> BaseException:
        await make_database(superuser)
        server = await asyncpg.connect(superuser)
        await server.execute("ALTER ROLE worker PASSWORD 'another'")
        await server.close()
        made = (
            Postgres.model_validate({"dsn": dsn, "password": wrong})
            if where == "password"
            else Postgres(dsn=dsn.replace("worker@", f"worker:{quoted}@"))
        )
        with pytest.raises(HeadgateError) as failure:
            await open_connection(made, "canary")
        return failure.value

    with guarded_postgres(tmp_path) as (dsn, superuser):
        failure = asyncio.run(refused(dsn, superuser))
    assert "InvalidPasswordError" in str(failure)
    assert leaks(said_of(failure).encode()) == []
    assert leaks((tmp_path / "postgres.log").read_bytes()) == []


async def test_a_kafka_that_does_not_let_us_in_tells_no_secret(
    kafka_bootstrap: str, canaries: io.StringIO
) -> None:
    security = KafkaSecurity.model_validate(
        {
            "protocol": "SASL_PLAINTEXT",
            "mechanism": "PLAIN",
            "username": CANARIES["Kafka's user"],
            "password": CANARIES["Kafka's password"],
        }
    )
    for bootstrap in (kafka_bootstrap, f"{LOOPBACK}:1"):
        kafka = Kafka(bootstrap=bootstrap, security=security)
        assert client_options(kafka)["sasl_plain_password"] == CANARIES["Kafka's password"]
        producer = Producer(kafka, "canary", deadline_s=1)
        try:
            with pytest.raises(HeadgateError) as failure:
                await producer.send("x", [Outgoing(b"k", b"v")])
        finally:
            await producer.close()
        assert leaks(said_of(failure.value).encode()) == []
    assert leaks(canaries.getvalue().encode()) == []


def test_a_crash_with_secrets_at_hand_logs_none(canaries: io.StringIO) -> None:
    def work(secret: str, config: Config) -> None:
        raise RuntimeError(f"of {config.accounts[0].id}, {len(secret)}")

    log = structlog.get_logger()
    config = loads(
        MINIMAL
        + f"postgres: {{dsn: 'postgresql://u:{CANARIES['the AWS secret key'].replace('/', '%2F')}@h/d'}}",
        "f",
        {},
    )
    try:
        work(config.postgres.dsn, config)
    except RuntimeError:
        log.exception("worker_crashed", config=config)
    assert "Traceback" in canaries.getvalue()
    assert "worker_crashed" in canaries.getvalue()
    assert leaks(canaries.getvalue().encode()) == []


ARCHIVE_KEY = f"v1/cloudwatch/{ACCOUNT}/{REGION}/2026/01/01/1767268800-{'0' * 32}"
MINIMAL = f"""accounts: [{{id: "{ACCOUNT}", regions: [{REGION}], services: [sqs]}}]
"""
SECRET = CANARIES["the remote-write token"]
QUOTED = quote(SECRET, safe="")
RECEIVER = 'remote_write: {receivers: [{name: a, url: "http://h/w", %s}]}'


@pytest.mark.parametrize(
    "wrong",
    [
        RECEIVER % f'bearer_token: ["{SECRET}"]',
        RECEIVER % f'bearer_token: {{"{SECRET}": x}}',
        RECEIVER % f'bearer_token: "{SECRET}", username: u, password: "{SECRET}"',
        RECEIVER % f'headers: {{Authorization: "Bearer {SECRET}"}}',
        RECEIVER % f'headers: {{X-A: ["{SECRET}"]}}',
        RECEIVER % f'password: "{SECRET}"',
        f'remote_write: {{receivers: [{{name: a, url: "http://u:{SECRET}@h/w"}}]}}',
        f'remote_write: {{receivers: [{{name: a, url: "tp://u:{SECRET}@h/w"}}]}}',
        f'aws: {{endpoint_url: "http://u:{SECRET}@h/"}}',
        f'aws: {{endpoint_url: "http://u:{QUOTED}@h/"}}',
        f'aws: {{endpoint_url: "http://u:1/{SECRET}@h/"}}',
        f'exposition: [{{name: a, account: b, region: c, endpoints: ["http://{QUOTED}@h/", "http://{QUOTED}@h/"]}}]',
        f's3: {{endpoint_url: "http://u:{SECRET}@h/"}}',
        f'kafka: {{bootstrap: "u:{SECRET}@h:1"}}',
        f'kafka: {{security: {{protocol: SSL, mechanism: PLAIN, username: "{SECRET}", password: "{SECRET}"}}}}',
        f'kafka: {{security: {{username: ["{SECRET}"], password: ["{SECRET}"]}}}}',
        f'exposition: [{{name: a, account: b, region: c, endpoints: ["http://u:{SECRET}@h/"]}}]',
        f'postgres: {{dsn: "mysql://u:{SECRET}@h/d"}}',
        f'postgres: {{dsn: "postgresql://u:{SECRET}@h/d"}}',
        f'postgres: {{dsn: "postgresql://u:1/{SECRET}@h:1/d"}}',
        f'postgres: {{dsn: "postgresql://u:1#{SECRET}@h:1/d"}}',
        f'postgres: {{dsn: "postgresql://u:1?{SECRET}@h:1/d"}}',
        f'postgres: {{dsn: "postgresql://u:{SECRET}@[h/d"}}',
        f'postgres: {{dsn: "postgresql://u:\u2100{SECRET}@h/d"}}',
        f'postgres: {{password: ["{SECRET}"]}}',
        f'postgres: {{pasword: "{SECRET}"}}',
        f"postgres: {{password: *{SECRET} }}",
        f"postgres: {{password: !{SECRET} x}}",
        f"postgres: {{password: @{SECRET} }}",
        f'postgres: {{password: "{SECRET}" x}}',
    ],
)  # fmt: skip
def test_no_error_of_a_configuration_quotes_a_secret(wrong: str) -> None:
    with pytest.raises(ConfigErrors) as errors:
        loads(MINIMAL + wrong, "headgate.yaml", {})
    assert "headgate.yaml:" in str(errors.value)
    assert leaks(said_of(errors.value).encode()) == []


def test_a_numeric_token_is_not_quoted_either() -> None:
    with pytest.raises(ConfigErrors, match="expected text, got a number"):
        loads(MINIMAL + RECEIVER % "bearer_token: 900100200", "f", {})


@pytest.mark.parametrize(
    "variable", ["HEADGATE_POSTGRES_DSN", "HEADGATE_S3_ENDPOINT_URL", "HEADGATE_KAFKA_BOOTSTRAP"]
)
def test_no_error_of_the_environment_quotes_a_secret(variable: str) -> None:
    with pytest.raises(ConfigErrors) as errors:
        loads(MINIMAL, "f", {variable: f"http://u:{SECRET}@h:x/"})
    assert f"${variable}" in str(errors.value)
    assert leaks(said_of(errors.value).encode()) == []


@pytest.mark.parametrize(
    ("dsn", "server"),
    [
        ("postgresql://u:p%2Fw@h:1/d?application_name=x", "h:1/d"),
        ("postgresql://u:p@h/d", "h:5432/d"),
        ("postgresql:///d", "localhost:5432/d"),
        ("postgresql://u@a:1,b:2/d", "a:1,b:2/d"),
        ("postgresql://u@[::1]:7/d", "[::1]:7/d"),
        ("postgresql://u:p@[::1]/d", "[::1]:5432/d"),
    ],
)
def test_a_server_is_named_without_who_asks_it(dsn: str, server: str) -> None:
    assert server_of(Postgres(dsn=dsn)) == server


def test_the_sink_of_a_backfill_is_not_quoted_where_it_is_no_dsn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "headgate.yaml"
    path.write_text(MINIMAL)
    for into in (f"mysql://u:{SECRET}@h/d", f"postgresql://u:1/{SECRET}@h/d"):
        words = [
            "backfill",
            "--config",
            str(path),
            "--from",
            "2026-01-01T00:00:00Z",
            "--into",
            into,
            "--dry-run",
        ]
        assert cli.main(words) == 2
        said = capsys.readouterr()
        assert "--into is no DSN" in said.err
        assert leaks((said.out + said.err).encode()) == []
