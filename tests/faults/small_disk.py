"""A disk of its own for a server, which can be full: a tmpfs, made smaller until it is.

Mounting needs root (`why_not` says so); what lies on it is gone with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

SIZE_BYTES = 64 * 1024**2
_PAGE_BYTES = 4096
_TIMEOUT_S = 20
_ATTEMPTS = 20


class SmallDisk:
    """A mounted one. `fill` is what happens to full disks: no byte more than `leave_bytes` goes onto it, until `make_room`."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes

    @property
    def used_bytes(self) -> int:
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def fill(self, leave_bytes: int = 0) -> None:
        """Make it as small as what is on it, and so much."""
        for attempt in range(1, _ATTEMPTS + 1):
            # Somebody may write in between: then it does not fit.
            size_bytes = self.used_bytes + leave_bytes
            try:
                _run("mount", "-o", f"remount,size={max(_PAGE_BYTES, size_bytes)}", str(self.path))
                return
            except subprocess.CalledProcessError:
                if attempt == _ATTEMPTS:
                    raise

    def make_room(self) -> None:
        """As large as it was."""
        _run("mount", "-o", f"remount,size={self.size_bytes}", str(self.path))


@contextmanager
def small_disk(path: Path, size_bytes: int = SIZE_BYTES) -> Iterator[SmallDisk]:
    """Mount one over a folder, which is made where it is missing; gone at the end, whoever still has files open on it."""
    path.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0755", "headgate-test", str(path))
    try:
        yield SmallDisk(path, size_bytes)
    finally:
        _run("umount", "--lazy", str(path))


@cache
def why_not() -> str:
    """Why none can be had on this machine; empty where it can."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return "mounting a tmpfs needs root"
    with TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder) / "disk", 1024**2):
                return ""
        except subprocess.CalledProcessError as error:
            return f"a tmpfs cannot be mounted: {error.stderr.strip()}"


def _run(*command: str) -> None:
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_S,
    )
