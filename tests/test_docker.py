"""The image, built and run by a Docker engine: `make test-docker`. Not part of `make test`: an engine is not everywhere, and a build takes minutes.

HEADGATE_TEST_BASE names the base image where the Dockerfile's cannot be pulled.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testcontainers.core.container import DockerContainer
from testcontainers.core.image import DockerImage

from workers.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SIZE_BYTES_MAX = 600 * 1024 * 1024
"""With a Debian base: 250 MB of it is numpy, botocore and their like."""

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

CONFIG = """
accounts:
  - {id: "123456789012", regions: [eu-west-1], services: [ec2]}
kafka: {bootstrap: "127.0.0.1:1"}
postgres: {dsn: "postgresql://headgate@127.0.0.1:1/headgate"}
s3: {endpoint_url: "http://127.0.0.1:1"}
"""
"""Nothing of it answers: a worker has to stay alive all the same, and not ready."""


@pytest.fixture(scope="session")
def image() -> Iterator[DockerImage]:
    base = os.environ.get("HEADGATE_TEST_BASE")
    arguments = {"BASE": base} if base else {}
    # The host's network, so that a package index that only the host reaches is reached.
    with DockerImage(ROOT, tag="headgate:test", buildargs=arguments, network_mode="host", rm=True) as built:
        yield built


def container(
    image: DockerImage, *command: str, folder: Path | None = None, **options: object
) -> DockerContainer:
    """As the chart runs it: nothing writable, no capability, no way to get more."""
    safe: dict[str, Any] = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}
    made = DockerContainer(str(image), command=list(command), network_mode="host", **safe, **options)
    return made.with_volume_mapping(str(folder), "/etc/headgate", "ro") if folder else made


def output(image: DockerImage, *command: str, folder: Path | None = None, **options: object) -> str:
    with container(image, *command, folder=folder, **options) as run:
        wrapped = run.get_wrapped_container()
        ended = wrapped.wait(timeout=60)
        text: str = wrapped.logs().decode()
    assert ended["StatusCode"] == 0, text
    return text


PYTHON = "/opt/headgate/bin/python"
EXPLAIN = """
import sys
from workers.cli import main
for command in sys.argv[1:]:
    try:
        main([command, "--help"])
    except SystemExit as ended:
        print("ended", command, ended.code)
"""
INSTALLERS = """
import importlib.util, json, shutil
modules = [n for n in ("pip", "setuptools", "pytest", "moto") if importlib.util.find_spec(n)]
print(json.dumps(modules + [n for n in ("pip", "gcc", "cc", "make") if shutil.which(n)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("etc")
    (there / "headgate.yaml").write_text(CONFIG)
    there.chmod(0o755)
    there.parent.chmod(0o755)
    return there


def test_every_command_explains_itself_on_a_read_only_file_system(image: DockerImage) -> None:
    text = output(image, "-c", EXPLAIN, *COMMANDS, entrypoint=PYTHON)
    assert [c for c in COMMANDS if f"ended {c} 0" not in text] == [], text[-2000:]
    assert "usage: headgate" in output(image, "--help")


def test_a_configuration_is_read_and_checked(image: DockerImage, folder: Path) -> None:
    assert "123456789012" in output(image, "check", "/etc/headgate/headgate.yaml", folder=folder)


def test_a_worker_is_alive_is_not_root_and_drains_when_told_to(image: DockerImage, folder: Path) -> None:
    coordinator = container(
        image,
        "coordinator",
        "--config",
        "/etc/headgate/headgate.yaml",
        "--metrics-port",
        "19107",
        folder=folder,
    )
    with coordinator:
        wrapped = coordinator.get_wrapped_container()
        assert wait_for(wrapped, 19107, "healthz") == "ok\n"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen("http://127.0.0.1:19107/readyz", timeout=5)
        processes = wrapped.top(ps_args="-eo pid,uid,args")["Processes"]
        assert [(uid, "coordinator" in args) for _, uid, args in processes] == [("65532", True)]
        started_s = time.monotonic()
        wrapped.stop(timeout=30)
        assert time.monotonic() - started_s < 20
        assert wrapped.wait(timeout=10)["StatusCode"] in (0, 1)  # 1: it was told to stop before it had begun
        assert '"event": "worker_started"' in wrapped.logs().decode()


def wait_for(worker: Any, port: int, path: str, timeout_s: float = 30) -> str:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=2) as answer:
                return str(answer.read().decode())
        except OSError:
            assert time.monotonic() < deadline_s, worker.logs().decode()
            time.sleep(0.1)


def test_the_image_is_small_has_no_installer_and_says_what_it_is(image: DockerImage) -> None:
    attributes = image.get_docker_client().client.images.get(str(image)).attrs
    assert attributes["Size"] < SIZE_BYTES_MAX
    config = attributes["Config"]
    assert (config["User"], config["Entrypoint"]) == ("65532:65532", ["headgate"])
    assert config["Labels"]["org.opencontainers.image.title"] == "headgate"
    assert json.loads(output(image, "-c", INSTALLERS, entrypoint=PYTHON)) == []
