"""docs/sbom.cdx.json: what the image holds of others, as CycloneDX; `make sbom` writes it.

* **From what is pinned.** Components and who brought them are those of requirements/base.txt, licences those that the installed packages declare;
  the hashes of their files stand there, not here.
* **The same everywhere.** No time, no path, no random number: the same pins and licences give the same bytes.
* **No licence is guessed.** A package that declares no SPDX expression is in DECLARED, looked up by a person, or this fails with its name.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "requirements" / "base.txt"
SBOM = ROOT / "docs" / "sbom.cdx.json"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

DECLARED: Mapping[str, str] = {
    "aiohappyeyeballs": "PSF-2.0",
    "aiosignal": "Apache-2.0",
    "async-timeout": "Apache-2.0",
    "aws-msk-iam-sasl-signer-python": "Apache-2.0",
    "boto3": "Apache-2.0",
    "botocore": "Apache-2.0",
    "fastavro": "MIT",
    "frozenlist": "Apache-2.0",
    "jinja2": "BSD-3-Clause",
    "jmespath": "MIT",
    "markdown-it-py": "MIT",
    "mdurl": "MIT",
    "promql-parser": "MIT",
    "propcache": "Apache-2.0",
    "protobuf": "BSD-3-Clause",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "pyyaml": "MIT",
    "rich": "MIT",
    "s3transfer": "Apache-2.0",
    "scipy": "BSD-3-Clause",
    "six": "MIT",
    "uvloop": "Apache-2.0 OR MIT",
    "yarl": "Apache-2.0",
}
"""What these declare in words, as SPDX expressions; wheels with native code may hold more under other licences (scipy: OpenBLAS, libgfortran)."""

_PIN = re.compile(r"^([a-z0-9][a-z0-9.-]*)==(\S+) \\$", re.MULTILINE)
_VIA = re.compile(r"^    #(?: via|  ) (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pin:
    """One package of a requirements file, and which packages brought it (`headgate`: we ask for it)."""

    name: str
    version: str
    via: tuple[str, ...]


def pins(text: str) -> list[Pin]:
    """The packages of a requirements file as pip-compile writes it, in its order."""
    parts = _PIN.split(text)[1:]
    return [
        Pin(name, version, tuple(_VIA.findall(rest)))
        for name, version, rest in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]


def licence_of(name: str) -> str:
    """The SPDX expression of an installed package. Raises LookupError where nobody has said one."""
    if name in DECLARED:
        return DECLARED[name]
    declares = metadata.metadata(name)
    if "License-Expression" not in declares:
        raise LookupError(
            f"{name} declares no SPDX licence: look at it, and add it to DECLARED in tests/sbom.py"
        )
    return declares["License-Expression"]


def sbom(requirements: str) -> str:
    """The document for the text of a requirements file."""
    found = pins(requirements)
    licences = LicenseFactory()
    ours = Component(
        name="headgate", version=PROJECT["version"], type=ComponentType.APPLICATION, bom_ref="headgate"
    )
    components = {"headgate": ours}
    for pin in found:
        purl = PackageURL("pypi", None, pin.name, pin.version)
        components[pin.name] = Component(
            name=pin.name,
            version=pin.version,
            type=ComponentType.LIBRARY,
            purl=purl,
            bom_ref=str(purl),
            licenses=[licences.make_from_string(licence_of(pin.name))],
        )
    everything = "\n".join(f"{pin.name}=={pin.version}" for pin in found)
    bom = Bom(
        components=[components[pin.name] for pin in found],
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, f"headgate {PROJECT['version']}\n{everything}"),
    )
    bom.metadata.component = ours
    for component in components.values():
        bom.register_dependency(component, [components[p.name] for p in found if component.name in p.via])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["metadata"]["timestamp"]
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> int:
    SBOM.write_text(sbom(BASE.read_text()))
    print(f"{SBOM.relative_to(ROOT)}: {len(pins(BASE.read_text()))} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
