"""What others bring into the image is pinned by hash, named with its licence, and looked up where advisories can be had."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import sbom
from tests.audit_deps import audit_of

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "requirements").glob("*.txt"))
BASE = (ROOT / "requirements" / "base.txt").read_text()


def entries(text: str) -> list[str]:
    """A requirements file's entries: each with the lines that it goes on over, without comments."""
    whole = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [line for line in whole.splitlines() if line.strip()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_requirement_is_one_version_with_hashes_and_nothing_says_from_where(file: Path) -> None:
    found = entries(file.read_text())
    pinned = re.compile(r"[a-z0-9][a-z0-9.-]*==[\w.!+]+( +--hash=sha256:[0-9a-f]{64})+")
    assert [entry[:60] for entry in found if not pinned.fullmatch(entry.strip())] == []
    assert len(found) >= 40


def test_the_image_has_what_pyproject_asks_for_and_the_checkout_has_all_of_it_too() -> None:
    base, dev = (
        {pin.name: pin.version for pin in sbom.pins((ROOT / "requirements" / name).read_text())}
        for name in ("base.txt", "dev.txt")
    )
    asked = [Requirement(line) for line in sbom.PROJECT["dependencies"]]
    assert [str(r) for r in asked if not r.specifier.contains(base[canonicalize_name(r.name)])] == []
    assert base.items() <= dev.items()


def test_what_is_installed_here_is_what_is_pinned() -> None:
    assert {p.name: metadata.version(p.name) for p in sbom.pins(BASE)} == {
        p.name: p.version for p in sbom.pins(BASE)
    }


def test_the_image_is_made_of_pinned_wheels_only_and_its_last_stage_has_no_installer() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE)
    [install] = re.findall(r"pip --python.*?\n(?: {6}.*\n)*", dockerfile)
    wanted = ("--require-hashes", "--only-binary :all:", "-r /tmp/base.txt")
    assert [option for option in wanted if option not in install] == []
    last = dockerfile.rpartition("\nFROM ")[2]
    assert "rm -rf" in last
    assert "pip install" not in last


def test_the_sbom_is_what_make_sbom_would_write() -> None:
    assert sbom.SBOM.read_text() == sbom.sbom(BASE), "run make sbom"


def test_the_sbom_names_every_package_of_the_image_with_its_licence_and_who_brought_it() -> None:
    document = json.loads(sbom.SBOM.read_text())
    components = document["components"]
    assert [(c["name"], c["version"]) for c in components] == [(p.name, p.version) for p in sbom.pins(BASE)]
    assert [c["name"] for c in components if not c["licenses"]] == []
    brought = {ref for d in document["dependencies"] for ref in d.get("dependsOn", ())}
    assert brought == {c["purl"] for c in components}
    [ours] = [d for d in document["dependencies"] if d["ref"] == "headgate"]
    asked = {canonicalize_name(Requirement(line).name) for line in sbom.PROJECT["dependencies"]}
    assert {ref.split("/")[1].split("@")[0] for ref in ours["dependsOn"]} == asked


def test_the_sbom_says_nothing_of_when_and_where_it_was_made() -> None:
    text = sbom.SBOM.read_text()
    assert "timestamp" not in text
    assert re.findall(r"https?://(?!cyclonedx\.org/schema/)[^\"\s]+", text) == []
    assert sbom.sbom(BASE) == sbom.sbom(BASE)


def test_a_package_whose_licence_nobody_has_looked_at_stops_the_sbom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbom, "DECLARED", {})
    with pytest.raises(LookupError, match=r"declares no SPDX licence: look at it"):
        sbom.sbom(BASE)


def test_no_licence_is_said_for_a_package_that_is_not_in_the_image() -> None:
    assert sbom.DECLARED.keys() <= {pin.name for pin in sbom.pins(BASE)}


@pytest.mark.parametrize(
    ("packages", "code"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0),
        ([{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}], 1),
        ([{"name": "a", "skip_reason": "not found"}], 2),
        ([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}], 2),
        ([{"name": "a", "skip_reason": "not found"}, {"name": "b", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": []}]}], 1),
        ([], 2),
    ],
)  # fmt: skip
def test_an_audit_is_clean_only_where_everything_was_looked_up(packages: list[object], code: int) -> None:
    assert audit_of(json.dumps({"dependencies": packages})).code == code


def test_the_hashes_are_made_without_anything_of_this_machine() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pip-tools"]
    assert {k for k, v in options.items() if v is True} >= {
        "generate-hashes", "no-emit-index-url", "no-emit-find-links"
    }  # fmt: skip


def test_every_test_that_the_security_policy_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    assert [f"{f}::{t}" for f, t in named if f"def {t}(" not in (ROOT / "tests" / f).read_text()] == []
    assert len(named) >= 13
