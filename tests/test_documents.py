"""What the papers say is so: their commands exist, their links lead somewhere, their examples load."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from shard_config.load import loads
from workers.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
PAPERS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The command lines of shell blocks, without comments."""
    return [
        words
        for b in blocks(text, "sh")
        for line in b.splitlines()
        if (words := shlex.split(line, comments=True))
    ]


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(paper: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", paper.read_text())
    assert [link for link in links if not (paper.parent / link).exists()] == []


def test_the_readme_begins_with_the_two_commands() -> None:
    assert commands(README)[:2] == [["make", "run"], ["make", "test"]]


def test_every_make_command_of_the_readme_has_a_target_that_help_lists() -> None:
    targets = {words[1] for words in commands(README) if words[0] == "make"}
    targets |= set(re.findall(r"`make ([a-z]+)", README))
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets <= set(re.findall(r"make ([a-z]+)", listed))


def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0, command
    return capsys.readouterr().out


def test_every_headgate_command_of_the_readme_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    named = {words[1] for words in commands(README) if words[0].endswith("headgate")}
    named |= set(re.findall(r"`headgate ([a-z]+)", README))
    assert named == set(COMMANDS) - {"down"}  # which stands behind `run`, and as a make target
    for command in named:
        assert f"headgate {command}" in help_of([command], capsys)


def test_the_readmes_options_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (w for w in commands(README) if w[0].endswith("headgate")):
        options = {w for w in words if w.startswith("--")}
        assert options <= set(re.findall(r"--[a-z-]+", help_of(words[1:2], capsys))), words


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    listed = help_of([], capsys)
    assert [c for c in COMMANDS if f"\n    {c}" not in listed] == []


@pytest.mark.parametrize("example", blocks(README, "yaml"))
def test_the_readmes_examples_load(example: str) -> None:
    assert loads(example, "README.md", environ={}).accounts
