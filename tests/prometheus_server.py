"""Real Prometheus servers as processes of this machine, and what promtool says of a file.

HEADGATE_TEST_PROMETHEUS names another binary than the `prometheus` on the PATH, to hold the same tests against another version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from workers.prometheus import PrometheusServer, prometheus_program

__all__ = ["PROMTOOL", "PrometheusServer", "needs_prometheus", "needs_promtool", "promtool"]

if another := os.environ.get("HEADGATE_TEST_PROMETHEUS"):
    os.environ["HEADGATE_PROMETHEUS"] = another
PROMTOOL = shutil.which("promtool")

needs_prometheus = pytest.mark.skipif(
    prometheus_program() is None, reason="there is no prometheus on the PATH: apt-get install prometheus"
)
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="there is no promtool on the PATH: apt-get install prometheus"
)


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool; 30 s at most."""
    assert PROMTOOL is not None
    command = [PROMTOOL, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
