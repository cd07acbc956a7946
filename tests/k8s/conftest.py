"""One control plane for all tests here; each test has nodes and a release of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s import real_node
from tests.k8s.control_plane import ControlPlane, missing
from tests.k8s.scene import Scene


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    if why := missing():
        pytest.skip(why)
    plane = ControlPlane(tmp_path_factory.mktemp("control-plane"))
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()


@pytest.fixture
def scene(plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A namespace, nodes and a release; HEADGATE_RECORD=folder keeps what the doctor saw, for tests/test_doctor.py."""
    record = os.environ.get("HEADGATE_RECORD")
    scene = Scene(plane, request.node.name.removeprefix("test_"), Path(record) if record else None)
    yield scene
    scene.clear()


@pytest.fixture(scope="module")
def real(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[real_node.RealNode]:
    """A node with a real kubelet, for the tests of one module: the scheduler of the others must not see it."""
    if why := real_node.missing():
        pytest.skip(why)
    node = real_node.RealNode(plane, tmp_path_factory.mktemp("real-node"))
    try:
        node.start()
        yield node
    finally:
        node.stop()
