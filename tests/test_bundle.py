"""`headgate bundle`: everything for a bug report is in it, and nothing that must not leave."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import tarfile
from pathlib import Path

import pytest

from ingest.clock import ManualClock
from ingest.model import LookStatus, Target
from shard_config.load import loads
from shard_config.model import Config
from tests.way import NOON_S, the_way
from workers import bundle, cli, local
from workers.bundle import LOG_LINES, Redactor, redactor_of, secrets_of
from workers.bundle import bundle as make_bundle

ACCOUNT, OTHER = "123456789012", "210987654321"
CANARIES = {
    "password in the DSN": "p4ss%2Fw0rd-in-dsn",
    "the same, decoded": "p4ss/w0rd-in-dsn",
    "external id": 'ext"ernal-id-canary',
    "access key": "AKIACANARYCANARY0001",
    "secret key": "wJalrXUtnFEMI/canary",
    "session token": "session//token==canary",
    "a token of the environment": "ghp_canary_canary",
    "an account": ACCOUNT,
    "another account": OTHER,
    "an alias": "very-secret-project",
}
ENVIRON = {
    "AWS_ACCESS_KEY_ID": CANARIES["access key"],
    "AWS_SECRET_ACCESS_KEY": CANARIES["secret key"],
    "AWS_SESSION_TOKEN": CANARIES["session token"],
    "SOME_API_TOKEN": CANARIES["a token of the environment"],
    "HEADGATE_EXTERNAL_ID": CANARIES["external id"],
    "HOME": "/home/somebody",
}
YAML = f"""
accounts:
  - {{id: "{ACCOUNT}", alias: very-secret-project, regions: [eu-west-1], services: [ec2], external_id: {{env: HEADGATE_EXTERNAL_ID}}}}
  - {{id: "{OTHER}", regions: [eu-west-1], services: [ec2]}}
postgres:
  dsn: postgresql://headgate:{CANARIES["password in the DSN"]}@127.0.0.1:1/headgate
kafka: {{bootstrap: "127.0.0.1:1"}}
"""  # nobody listens there


def config() -> Config:
    return loads(YAML, "headgate.yaml", environ=ENVIRON)


def leaks(text: str) -> list[str]:
    return [name for name, canary in CANARIES.items() if canary in text or json.dumps(canary)[1:-1] in text]


def test_every_canary_would_be_noticed() -> None:
    for name, canary in CANARIES.items():
        assert name in leaks(f"… {canary} …")


async def test_nothing_that_is_planted_leaves(tmp_path: Path) -> None:
    log = tmp_path / "exporter-1.log"
    log.write_text("\n".join(json.dumps({"event": "x", name: canary}) for name, canary in CANARIES.items()))
    files = await make_bundle(config(), ManualClock(NOON_S), ENVIRON, [log])
    whole = "\n".join(f"{name}\n{text}" for name, text in files.items())
    assert leaks(whole) == []
    assert "@127.0.0.1:1/headgate" in whole
    assert "[redacted]" in files["logs/exporter-1.log"]


async def test_the_bundle_of_a_working_installation_has_every_part(
    database: str, kafka_bootstrap: str, topic_prefix: str, bucket: str, s3_endpoint: str
) -> None:
    async with the_way(database, kafka_bootstrap, topic_prefix, bucket, s3_endpoint) as way:
        target = Target("cloudwatch", OTHER, "eu-west-1")
        arn = f"arn:aws:sts::{OTHER}:assumed-role/Headgate is not authorized"
        await way.look(target=target, status=LookStatus.FORBIDDEN, detail=arn)
        await way.land()
        way.clock.advance(4 * 3600)
        files = await make_bundle(way.config, way.clock, dict(os.environ))

    assert set(files) == set(bundle.PARTS)
    parts = {name: json.loads(text) for name, text in files.items()}
    assert [name for name, part in parts.items() if "error" in part] == []
    assert OTHER not in "".join(files.values())
    [failed] = parts["looks_failed.json"]
    stand_in = failed["target"].split("/")[1]
    assert failed["detail"] == f"arn:aws:sts::{stand_in}:assumed-role/Headgate is not authorized"
    assert {gap["target"].split("/")[1] for gap in parts["gaps.json"]} == {stand_in}
    assert parts["status.json"]["landing"]["lag"]["0"] is not None
    assert "samples" in str(parts["tables.json"])
    assert parts["versions.json"]["asyncpg"]
    assert next(m["name"] for m in parts["migrations.json"]) == "0001_store"


async def test_a_part_that_cannot_be_had_says_why_and_the_others_are_there() -> None:
    files = await make_bundle(config(), ManualClock(NOON_S), ENVIRON)
    assert "127.0.0.1:1" in json.loads(files["tables.json"])["error"]
    assert json.loads(files["config.json"])["slots"] == 24
    assert json.loads(files["status.json"])["errors"]


async def test_of_a_log_the_last_lines_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "consumer-1.log"
    log.write_text("".join(f"line {n}\n" for n in range(LOG_LINES + 100)))
    files = await make_bundle(config(), ManualClock(NOON_S), ENVIRON, [log])
    assert files["logs/consumer-1.log"].splitlines() == [f"line {n}" for n in range(100, LOG_LINES + 100)]


@pytest.mark.parametrize(
    ("plain", "redacted"),
    [
        ("postgresql://u:pw@h/db", "postgresql://[redacted]@h/db"),
        ("key ASIAXXXXXXXXXXXXXXXX.", "key [redacted]."),
        ("?X-Amz-Signature=0a1b2c&x=1", "?X-Amz-Signature=[redacted]&x=1"),
        ("Authorization: Bearer abc.def-1", "Authorization: Bearer [redacted]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", "[redacted]"),
        ("at 1767268800123 ms, 0.25, i-0123456789abcdef0", "at 1767268800123 ms, 0.25, i-0123456789abcdef0"),
    ],
)
def test_what_looks_like_a_secret_is_one(plain: str, redacted: str) -> None:
    assert Redactor([], {}).text(plain) == redacted


def test_an_account_has_one_stand_in_everywhere_and_numbers_stay_numbers() -> None:
    redactor = Redactor([], {})
    text = redactor.text(f'{{"a": {ACCOUNT}, "b": "arn:aws:iam::{OTHER}:role/x", "c": "s3.{ACCOUNT}.x"}}')
    again = json.loads(text)
    assert again["c"] == f"s3.{again['a']}.x"
    assert again["b"] != f"arn:aws:iam::{again['a']}:role/x"
    assert redactor.text(ACCOUNT) == str(again["a"])


def test_secrets_are_found_wherever_they_stand() -> None:
    found = secrets_of(
        config(), ENVIRON | {"DATABASE_URL": "postgresql://a:from-env@h/d?sslpassword=in-query"}
    )
    assert {"from-env", "in-query", CANARIES["external id"], CANARIES["the same, decoded"]} <= found
    assert redactor_of(config(), ENVIRON).text("/home/somebody/x") == "~/x"


async def test_the_command_writes_a_file_for_its_owner_only_and_never_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "workers.bundle.configure_logs", lambda _: None
    )  # it would log to this test's stderr for ever
    path, out = tmp_path / "headgate.yaml", tmp_path / "b.tar.gz"
    path.write_text(YAML)
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(local, "find_running", lambda: None)
    assert await asyncio.to_thread(cli.main, ["bundle", "--config", str(path), "--out", str(out)]) == 0
    assert "nothing was sent anywhere" in capsys.readouterr().out
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    with tarfile.open(out) as archive:
        members = archive.getmembers()
        texts = [archive.extractfile(m).read().decode() for m in members]  # type: ignore[union-attr]
    assert {m.name for m in members} == {f"headgate-bundle/{name}" for name in bundle.PARTS}
    assert leaks("".join(texts)) == []
    assert await asyncio.to_thread(cli.main, ["bundle", "--config", str(path), "--out", str(out)]) == 1
