"""`make audit-deps`: are there known vulnerabilities in what requirements/*.txt pin?

pip-audit asks the package index for its advisories (another: ARGS="--vulnerability-service osv"). Exit codes: 0 all were looked up and nothing is
known of them, 1 something is vulnerable, 2 advisories could not be had. Where only some could be looked up, that is no clean bill: 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("base", "dev")
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Audit:
    """What became of one file's packages: looked up and clean, vulnerable (with what helps), or not looked up."""

    clean: int
    vulnerable: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def code(self) -> int:
        return 1 if self.vulnerable else 2 if self.unknown or not self.clean else 0


def audit_of(answer: str) -> Audit:
    """pip-audit's JSON. Raises ValueError where it is none."""
    clean, vulnerable, unknown = 0, [], []
    for package in json.loads(answer)["dependencies"]:
        name = f"{package['name']} {package.get('version', '')}".rstrip()
        if "skip_reason" in package:
            unknown.append(name)
        elif found := package["vulns"]:
            said = (f"{v['id']} (mended in {', '.join(v['fix_versions']) or 'no version'})" for v in found)
            vulnerable.append(f"{name}: {', '.join(said)}")
        else:
            clean += 1
    return Audit(clean, tuple(vulnerable), tuple(unknown))


def main(arguments: Sequence[str]) -> int:
    codes = []
    for file in FILES:
        path = f"requirements/{file}.txt"
        command = [sys.executable, "-m", "pip_audit", "-r", path, "--disable-pip", "--require-hashes"]
        command += ["--format", "json", "--progress-spinner", "off", *arguments]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
            )
            audit = audit_of(done.stdout)
        except subprocess.TimeoutExpired:
            print(f"{path}: NOT audited: no answer within {TIMEOUT_S} s")
            codes.append(2)
            continue
        except ValueError:
            why = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
            print(f"{path}: NOT audited: {why[:300]}")
            codes.append(2)
            continue
        for line in audit.vulnerable:
            print(f"{path}: VULNERABLE: {line}")
        if audit.unknown:
            print(
                f"{path}: NOT audited: the index has no advisories for {len(audit.unknown)} packages, {audit.unknown[0]} first"
            )
        print(f"{path}: {audit.clean} packages without known vulnerabilities, {len(audit.vulnerable)} with")
        codes.append(audit.code)
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
