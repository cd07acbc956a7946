"""The chart as tests see it: rendered, validated, and the parts of it that are made from others.

`python -m tests.helm_chart` (`make helm-docs`) writes what is made: the chart's README.md (from values.yaml), the configuration's part of
values.schema.json (from shard_config.model), and tests/golden/helm (from helm/headgate/ci).
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shard_config.model import Config, Defaults

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "headgate"
GOLDEN = ROOT / "tests" / "golden" / "helm"
SCENARIOS = sorted(CHART.glob("ci/*.yaml"))
KUBERNETES = "1.37.0"
RELEASE, NAMESPACE = "headgate", "metrics"

Manifest = dict[str, Any]


def tool(name: str) -> str | None:
    """Where `make test` put it, or on the PATH; None where there is none."""
    ours = ROOT / ".headgate" / "bin" / name
    return str(ours) if os.access(ours, os.X_OK) else shutil.which(name)


def helm(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [tool("helm") or "helm", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def template(scenario: Path, *sets: str) -> str:
    """What `helm template` prints for a file of values, with `--set`s on top. Raises ValueError with helm's own words."""
    options = [word for pair in sets for word in ("--set", pair)]
    done = helm("template", RELEASE, CHART, "--namespace", NAMESPACE, "--values", scenario, *options)
    if done.returncode:
        raise ValueError(done.stderr)
    return done.stdout


SHIPPED = ("prometheusrules.yaml", "dashboards.yaml")
"""Templates that only wrap files of helm/headgate/files, which change by themselves."""


def looked_at(scenario: Path) -> str:
    """What the scenario's golden holds: all that is rendered, without what SHIPPED wrap."""
    documents = re.split(r"^(?=---$)", template(scenario), flags=re.MULTILINE)
    ours = tuple(f"---\n# Source: headgate/templates/{name}\n" for name in SHIPPED)
    return "".join(d for d in documents if not d.startswith(ours))


def manifests(text: str) -> dict[str, Manifest]:
    """By kind/name. A hook's are marked: setup's ConfigMap has another name than the workers'."""
    found = [m for m in yaml.load_all(text, _LOADER) if m]
    named = {f"{m['kind']}/{m['metadata']['name']}": m for m in found}
    assert len(named) == len(found), "two manifests with one name"
    return named


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


# --- the schema -------------------------------------------------------------------------------------------------


_SECRET = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        *(
            {
                "type": "object",
                "properties": {key: {"type": "string", "minLength": 1}},
                "required": [key],
                "additionalProperties": False,
            }
            for key in ("env", "file")
        ),
    ]
}
"""As in headgate.yaml: text, {env: NAME} or {file: PATH}."""


def config_schema() -> dict[str, Any]:
    """`$defs` of the schema of values: what headgate.yaml may say, as the models have it."""
    whole = Config.model_json_schema()
    defs: dict[str, Any] = whole.pop("$defs")
    # As a file says it, which `shard_config.load` turns into the models.
    defs["ServiceProfile"]["properties"].pop("service")
    defs["ServiceProfile"].pop("required")
    whole["properties"]["services"] = {
        "type": "object",
        "additionalProperties": {"$ref": "#/$defs/ServiceProfile"},
    }
    whole["properties"]["defaults"] = Defaults.model_json_schema()
    defs["Account"]["required"] = ["id"]  # the rest may stand in `defaults`
    # A deployment leaves it alone.
    whole["properties"].pop("run")
    defs.pop("Run")
    return {"Config": _plain(whole), **{name: _plain(each) for name, each in sorted(defs.items())}}


def _plain(schema: Any) -> Any:
    """Without what says nothing here, and with secrets as a file has them."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") == "password":
        return _SECRET
    # A property may be called `default` or `title`; a keyword's value is never a schema of one.
    return {
        key: {name: _plain(each) for name, each in value.items()} if key == "properties" else _plain(value)
        for key, value in schema.items()
        if key not in ("default", "title", "description", "discriminator", "writeOnly")
    }


def schema_text() -> str:
    """values.schema.json as it should be: its own part as it stands, `$defs` made anew."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    return json.dumps(schema | {"$defs": schema["$defs"] | config_schema()}, indent=1) + "\n"


# --- the README -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """One line of values.yaml that has a key."""

    path: tuple[str, ...]
    comment: str
    """What stands right above it; empty: nothing."""


_KEY = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z_]\w*):(?P<rest>.*)")


def values_of(text: str) -> Iterator[Value]:
    """The keys of a values.yaml, in order, those of flow mappings aside."""
    above: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip(" #"))
        elif found := _KEY.fullmatch(line):
            indent = len(found["indent"])
            above = [a for a in above if a[0] < indent] + [(indent, found["key"])]
            yield Value(tuple(key for _, key in above), " ".join(comment))
            comment = []
        else:
            comment = []


def readme() -> str:
    """The chart's README.md: its text is here, its table is from values.yaml."""
    text = (CHART / "values.yaml").read_text()
    tree = yaml.safe_load(text)
    rows = ["| value | default | consequence |", "| --- | --- | --- |"]
    described = [v for v in values_of(text) if v.comment]
    for value in described:
        inner = any(v.path[: len(value.path)] == value.path and v is not value for v in described)
        default = "" if inner else f"`{json.dumps(_at(tree, value.path), ensure_ascii=False)}`"
        rows.append(f"| `{'.'.join(value.path)}` | {default} | {value.comment.replace('|', chr(92) + '|')} |")
    return (CHART / "README.text.md").read_text().replace("<!-- values -->", "\n".join(rows))


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda at, key: at[key], path, tree)


def main() -> None:
    (CHART / "values.schema.json").write_text(schema_text())
    (CHART / "README.md").write_text(readme())
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for old in set(GOLDEN.glob("*.yaml")) - {GOLDEN / s.name for s in SCENARIOS}:
        old.unlink()
    for scenario in SCENARIOS:
        (GOLDEN / scenario.name).write_text(looked_at(scenario))


if __name__ == "__main__":
    main()
