"""`headgate pause` and `resume`: what they say, and that they mean what they say."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ingest.sinks.migrate import migrate
from shard_config.model import Postgres
from workers.cli import main

CONFIG = """
accounts:
  - {{id: "123456789012", regions: [eu-west-1], services: [ec2, rds]}}
exposition:
  - {{name: node, account: lab, region: rack-1, endpoints: [http://127.0.0.1:1/metrics]}}
postgres: {{dsn: "{dsn}"}}
"""


@pytest.fixture
async def config(database: str, tmp_path: Path) -> Path:
    await migrate(Postgres(dsn=database))
    path = tmp_path / "headgate.yaml"
    path.write_text(CONFIG.format(dsn=database))
    return path


async def headgate(config: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code, and what was printed."""
    code = await asyncio.to_thread(main, [*words, "--config", str(config)])
    said = capsys.readouterr()
    return code, said.out + said.err


async def test_what_is_paused_is_listed_until_it_is_resumed(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await headgate(config, capsys, "pause") == (0, "nothing is paused\n")
    code, said = await headgate(
        config, capsys, "pause", "--account", "123456789012", "--reason", "role is being moved"
    )
    assert (code, said) == (0, "account 123456789012, service *: paused\n")
    await headgate(config, capsys, "pause", "--account", "lab", "--service", "node")
    code, said = await headgate(config, capsys, "resume")
    assert [line.split()[:2] for line in said.splitlines()] == [
        ["account", "service"],
        ["123456789012", "*"],
        ["lab", "node"],
    ]
    assert said.splitlines()[1].endswith("role is being moved")
    assert await headgate(config, capsys, "resume", "--account", "123456789012") == (
        0,
        "account 123456789012, service *: resumed\n",
    )
    assert len((await headgate(config, capsys, "pause"))[1].splitlines()) == 2


async def test_pausing_again_changes_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await headgate(config, capsys, "pause", "--service", "ec2", "--reason", "first")
    code, said = await headgate(config, capsys, "pause", "--service", "ec2", "--reason", "second")
    assert (code, said) == (0, "account *, service ec2: is paused already\n")
    assert "first" in (await headgate(config, capsys, "pause"))[1]


async def test_a_part_of_a_wider_pause_is_not_resumed_and_the_wider_one_is_shown(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await headgate(config, capsys, "pause", "--account", "123456789012")
    code, said = await headgate(config, capsys, "resume", "--account", "123456789012", "--service", "ec2")
    assert code == 1
    assert "is not paused in these words" in said
    assert "123456789012  *" in said


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("--account", "123456789021"), "123456789012"),
        (("--service", "ec3"), "ec2"),
        (("--service", "nod"), "node"),
    ],
)
async def test_a_name_that_the_configuration_does_not_have_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], meant: str
) -> None:
    code, said = await headgate(config, capsys, "pause", *words)
    assert code == 1
    assert f'is not in the configuration (did you mean "{meant}"?)' in said
    assert await headgate(config, capsys, "pause") == (0, "nothing is paused\n")
