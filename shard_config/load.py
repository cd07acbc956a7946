"""headgate.yaml and the environment → a validated `Config`, or everything that is wrong with them at once.

Guarantees:

* **All at once.** Every error of a file is in one `ConfigErrors`, each with file, line, path, what is wrong and, where something is near,
  what was probably meant. Only what leaves no tree to go on with (broken YAML, a file past its bounds) stands alone, and what is
  judged of an account, job or service as a whole (such as period against poll interval) waits until its keys are right one by one.
* **No secret in a message.** Values under `SECRETS`, and texts with an @, which may be a URL with a password, are never quoted.
* **Touches nothing** but the file, the secrets' files that it names, and the environment passed in. Regions are botocore's own list.

In the file `services` is a mapping of service → overrides (or a whole new profile), `accounts` and `exposition` are lists, and `defaults`
fills accounts, the organization's too, that leave `regions` or `services` out; `docs/configuration.md` describes every key.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shard_config.document import (
    SIZE_BYTES_MAX,
    ConfigError,
    ConfigErrors,
    Node,
    Path,
    did_you_mean,
    parse,
    render,
)
from shard_config.fields import SLUG_PATTERN
from shard_config.known import known_regions, shipped_documents, shipped_services
from shard_config.model import (
    Account,
    Config,
    Defaults,
    ExpositionJob,
    MetricProfile,
    Organization,
    ServiceProfile,
)
from shard_config.wording import FORM, SLUG_FORM, some_of, what_of

__all__ = ["ConfigError", "ConfigErrors", "known_regions", "load", "loads", "shipped_services"]

Model = TypeVar("Model", bound=BaseModel)

OVERRIDES: Final[Mapping[Path, str]] = {
    ("kafka", "bootstrap"): "HEADGATE_KAFKA_BOOTSTRAP",
    ("postgres", "dsn"): "HEADGATE_POSTGRES_DSN",
    ("s3", "endpoint_url"): "HEADGATE_S3_ENDPOINT_URL",
}
"""Environment variables that beat the file, where they are set and not empty."""

_COLLECTED: Final = ("accounts", "organization", "exposition")

SECRETS: Final = frozenset({"external_id", "username", "password", "dsn", "bearer_token", "headers"})
SECRET_BYTES_MAX: Final = 64 * 1024


def load(path: FilePath, *, environ: Mapping[str, str]) -> Config:
    """The configuration in a file. Raises ConfigErrors with all that is wrong with it."""
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE_BYTES_MAX + 1)
        text = raw.decode()
    except OSError as error:
        raise ConfigErrors([ConfigError(str(path), 0, "", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigErrors([ConfigError(str(path), line, "", "not UTF-8 text")]) from error
    return loads(text, str(path), environ)


def loads(text: str, name: str, environ: Mapping[str, str]) -> Config:
    """As `load`, of a text; `name` stands in errors, and relative secret files are looked for beside it."""
    return _Loading(name, environ).config(text)


class _Loading:
    """One file on its way. Collects errors; `config` raises them at the end."""

    def __init__(self, file: str, environ: Mapping[str, str]) -> None:
        self._file = file
        self._environ = environ
        self._errors: list[ConfigError] = []
        self._values_in_error: set[str] = set()

    def config(self, text: str) -> Config:
        root = parse(text, self._file, self._errors)
        if not isinstance(root.value, dict):
            raise ConfigErrors(
                [ConfigError(self._file, root.line, "", f"expected a mapping, got {root.describe()}")]
            )
        profiles = self._services(root)
        defaults = self._defaults(root, profiles)
        accounts = self._accounts(root, profiles, defaults)
        organization = self._organization(root, profiles, defaults)
        jobs = self._exposition(root)
        rest = self._rest(root)
        if not any(root.mapping[key].value for key in _COLLECTED if key in root.mapping):
            self._error(1, (), f"nothing to collect: none of {', '.join(_COLLECTED)}", "add one of them")
        if self._errors or rest is None:
            raise ConfigErrors(self._errors)
        used = {name for account in accounts for name in account.services}
        used.update(organization.services if organization else ())
        return rest.model_copy(
            update={
                "accounts": tuple(accounts),
                "organization": organization,
                "exposition": tuple(jobs),
                "services": tuple(profiles[name] for name in sorted(used)),
            }
        )

    # --- the parts of a file ----------------------------------------------------------------------------------

    def _services(self, root: Node) -> dict[str, ServiceProfile]:
        """Every service that an account may name: the shipped ones, with the file's overrides and additions."""
        profiles = dict(shipped_services())
        for name, node in self._section(root, "services", dict).mapping.items():
            path: Path = ("services", name)
            shipped = shipped_documents().get(name, {})
            if not shipped and "namespace" not in node.mapping:
                near = did_you_mean(name, shipped_documents())
                what = f'unknown service "{name}"'
                self._error(
                    root.mapping["services"].keys[name], path, what, near or "a new one needs a namespace"
                )
                # Known all the same, so that accounts that name it are not errors too.
                profiles[name] = ServiceProfile(service="unknown", namespace="unknown")
                continue
            if "service" in node.keys:
                what = "the key that this stands under is the service's name"
                self._error(node.keys["service"], (*path, "service"), what, "leave it out")
            if not re.fullmatch(SLUG_PATTERN, name):
                self._error(root.mapping["services"].keys[name], path, f'"{name}" is not right', SLUG_FORM)
                continue
            self._check_names(node, path, {})
            overrides = node.mapping if isinstance(node.value, dict) else {}
            data = {**shipped, **{key: value.plain() for key, value in overrides.items()}, "service": name}
            known = profiles.get(name) or ServiceProfile(service="unknown", namespace="unknown")
            profiles[name] = self._piece(ServiceProfile, node, path, data) or known
        return profiles

    def _defaults(self, root: Node, services: Mapping[str, object]) -> Mapping[str, tuple[str, ...]]:
        """What an account that leaves it out gets, by key; without what is empty."""
        section = self._section(root, "defaults", dict)
        found = self._piece(Defaults, section, ("defaults",), section.plain()) or Defaults()
        self._check_names(section, ("defaults",), services)
        filled = {"regions": found.regions, "services": found.services}
        return {key: value for key, value in filled.items() if value}

    def _accounts(
        self, root: Node, services: Mapping[str, object], defaults: Mapping[str, object]
    ) -> list[Account]:
        accounts = []
        lines: dict[str, int] = {}
        for i, node in enumerate(self._section(root, "accounts", list).items):
            path: Path = ("accounts", i)
            self._check_names(node, path, services)
            data = node.plain()
            if isinstance(data, dict):
                self._check_id(node, path, lines)
                self._put_secret(node, path, "external_id", data)
                data = {**defaults, **data}
            account = self._piece(Account, node, path, data)
            accounts += [account] if account is not None else []
        return accounts

    def _organization(
        self, root: Node, services: Mapping[str, object], defaults: Mapping[str, object]
    ) -> Organization | None:
        path: Path = ("organization",)
        section = self._section(root, "organization", dict)
        data = section.plain()
        if "organization" not in root.mapping or section.value == {} or not isinstance(data, dict):
            return None
        self._check_names(section, path, services)
        excluded = section.get("exclude")
        for i, account in enumerate(excluded.items if excluded else []):
            self._is_a_number(account, (*path, "exclude", i))
        self._put_secret(section, path, "external_id", data)
        data = {**defaults, **data}
        line = root.keys["organization"]
        for key in ("regions", "services"):
            if not data.get(key):
                hint = "give it here or under defaults"
                self._value_error(line, (*path, key), f'missing key "{key}"', hint)
        if not any(node and node.get("role_template") for node in (section, root.get("aws"))):
            # The ambient credentials are of one account.
            what = 'missing key "role_template"'
            self._value_error(line, (*path, "role_template"), what, "give it here or under aws")
        return self._piece(Organization, section, path, data)

    def _check_id(self, node: Node, path: Path, lines: dict[str, int]) -> None:
        """An id is text, 12 digits, and stands in one place. `lines` has those that were met before."""
        account = node.get("id")
        if account is None:
            return
        path = (*path, "id")
        if not self._is_a_number(account, path) and account.text in lines:
            what = f'duplicate account "{account.text}", first at line {lines[account.text]}'
            self._value_error(account.line, path, what, "keep one")
        lines.setdefault(account.text.zfill(12), account.line)

    def _is_a_number(self, account: Node, path: Path) -> bool:
        """Whether an account's id is a number, which is an error."""
        if not isinstance(account.value, int) or isinstance(account.value, bool):
            return False
        # YAML has read a number; whoever writes the file again may print it without its leading zero.
        zero = ", and has lost a leading zero" if len(account.text) < 12 else ""
        what = f"{account.text} is a number here{zero}; an account id is text of 12 digits"
        self._value_error(account.line, path, what, f'quote it: "{account.text.zfill(12)}"')
        return True

    def _check_names(self, node: Node, path: Path, services: Mapping[str, object]) -> None:
        """Regions and services that nobody knows."""
        kinds = (
            ("region", known_regions(), "a region is as eu-west-1"),
            ("service", services, f"known are {some_of(sorted(services))}"),
        )
        for kind, known, otherwise in kinds:
            listed = node.get(f"{kind}s")
            for i, item in enumerate(listed.items if listed else []):
                if isinstance(item.value, str) and item.value not in known:
                    what = f'unknown {kind} "{item.value}"'
                    hint = did_you_mean(item.value, known) or otherwise
                    self._value_error(item.line, (*path, f"{kind}s", i), what, hint)

    def _exposition(self, root: Node) -> list[ExpositionJob]:
        jobs = []
        lines: dict[tuple[str, str, str], int] = {}
        for i, node in enumerate(self._section(root, "exposition", list).items):
            path: Path = ("exposition", i)
            job = self._piece(ExpositionJob, node, path, node.plain())
            jobs += [job] if job is not None else []
            parts = [node.get(key) for key in ("account", "region", "name")]
            key = tuple(part.text for part in parts if part is not None)
            if len(key) != 3:
                continue
            if key in lines:
                what = f'duplicate job "{key[2]}" of {key[0]}/{key[1]}, first at line {lines[key]}'
                self._error(
                    node.keys["name"], (*path, "name"), what, "give it another name, or join the endpoints"
                )
            lines.setdefault((key[0], key[1], key[2]), node.line)
        return jobs

    def _rest(self, root: Node) -> Config | None:
        """Everything but accounts, jobs, services and the organization."""
        special = ("accounts", "organization", "exposition", "services", "defaults")
        data = {
            key: node.plain()
            for key, node in root.mapping.items()
            if key not in special and not (node.value is None and key in Config.model_fields)
        }
        postgres, section = root.get("postgres"), data.get("postgres")
        if postgres is not None and isinstance(section, dict):
            self._put_secret(postgres, ("postgres",), "password", section)
        kafka, section = root.get("kafka"), data.get("kafka")
        security = kafka.get("security") if kafka is not None else None
        section = section.get("security") if isinstance(section, dict) else None
        if security is not None and isinstance(section, dict):
            for key in ("username", "password"):
                self._put_secret(security, ("kafka", "security"), key, section)
        self._receivers(root, data)
        for path, variable in OVERRIDES.items():
            section = data.setdefault(str(path[0]), {})
            if isinstance(section, dict) and self._environ.get(variable):
                section[str(path[1])] = self._environ[variable]
        return self._piece(Config, root, (), data)

    def _receivers(self, root: Node, data: dict[str, object]) -> None:
        """Put the receivers' secrets in their place in `data`."""
        written = root.get("remote_write")
        listed = written.get("receivers") if written is not None else None
        section = data.get("remote_write")
        into = section.get("receivers") if isinstance(section, dict) else None
        if listed is None or not isinstance(into, list):
            return
        for i, (node, receiver) in enumerate(zip(listed.items, into, strict=True)):
            if isinstance(receiver, dict):
                for key in ("bearer_token", "password"):
                    self._put_secret(node, ("remote_write", "receivers", i), key, receiver)

    def _section(self, root: Node, key: str, kind: type[dict[str, Node]] | type[list[Node]]) -> Node:
        """A part of the file, empty where it is left out (or where it is of the wrong kind, which is an error)."""
        node = root.get(key)
        if node is None or node.value is None:
            return Node(root.line, kind())
        if not isinstance(node.value, kind):
            expected = "a mapping" if kind is dict else "a list"
            self._value_error(root.keys[key], (key,), f"expected {expected}, got {node.describe()}")
            return Node(node.line, kind())
        return node

    def _put_secret(self, node: Node, path: Path, key: str, data: dict[str, object]) -> None:
        """Replace {env: NAME} or {file: PATH} in `data` by what it names."""
        secret = node.get(key)
        if secret is None or not isinstance(secret.value, dict):
            return
        del data[key]
        path = (*path, key)
        source, named = next(iter(secret.mapping.items()), ("", secret))
        if len(secret.mapping) != 1 or source not in ("env", "file") or not isinstance(named.value, str):
            self._value_error(secret.line, path, "expected text, {env: NAME} or {file: PATH}")
        elif source == "env":
            data[key] = self._environ.get(named.value, "")
            if not data[key]:
                self._value_error(named.line, path, f"the environment has no {named.value}", "set it")
        else:
            data[key] = self._secret_file(named, path)

    def _secret_file(self, named: Node, path: Path) -> str:
        try:
            with FilePath(self._file).parent.joinpath(named.text).open("rb") as file:
                raw = file.read(SECRET_BYTES_MAX + 1)
            secret = raw.decode().strip()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            self._value_error(named.line, path, f"{named.text} cannot be read: {why}")
            return ""
        if not secret or len(raw) > SECRET_BYTES_MAX:
            why = "too long for a secret" if secret else "empty"
            self._value_error(named.line, path, f"{named.text} is {why}")
        return secret

    # --- a piece: its model, and its errors -------------------------------------------------------------------

    def _piece(self, model: type[Model], node: Node, path: Path, data: object) -> Model | None:
        """`data` as a model, or None and its errors. `node` tells where `data` stands, `path` where `node` does."""
        try:
            # By way of JSON because there `strict` takes a list for a tuple, and still no true for 1 or "5" for 5.
            return model.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False):
                self._translate(model, node, path, detail)
            return None

    def _translate(self, model: type[BaseModel], root: Node, path: Path, detail: ErrorDetails) -> None:
        loc, context = tuple(detail["loc"]), detail.get("ctx", {})
        if "key" in context:
            loc = (*loc, context["key"])
        variable = OVERRIDES.get((*path, *loc[:2]))
        if variable and self._environ.get(variable):
            what = FORM.get(str(loc[1]), detail["msg"])
            self._errors.append(ConfigError(f"${variable}", 0, render((*path, *loc[:2])), what))
            return
        node, line, found = _locate(root, loc)
        kind = detail["type"]
        if kind == "extra_forbidden":
            key = str(loc[-1])
            where = found[:-1]
            near = did_you_mean(key, _keys(model, loc[:-1]))
            known = near or f"known are {some_of(_keys(model, loc[:-1]))}"
            self._error(line, (*path, *where), f'unknown key "{key}"', known)
        elif kind == "missing" and isinstance(loc[-1], str):
            key = loc[-1]
            hint = (
                "give it here or under defaults" if model is Account and key in Defaults.model_fields else ""
            )
            self._error(line, (*path, *found[:-1]), f'missing key "{key}"', hint)
        else:
            if kind == "too_short" and node.value:
                return  # pydantic counts what is right in it, and has said what is not
            secret = not SECRETS.isdisjoint(found) or "@" in node.text
            got = node.kind() if secret else node.describe()
            what, hint = what_of(kind, detail["msg"], context, got, found)
            self._value_error(line, (*path, *found), what, hint)

    def _value_error(self, line: int, path: Path, what: str, suggestion: str = "") -> None:
        """An error about a value: the first one about it stands, for the others follow from it."""
        if render(path) not in self._values_in_error:
            self._values_in_error.add(render(path))
            self._error(line, path, what, suggestion)

    def _error(self, line: int, path: Path, what: str, suggestion: str = "") -> None:
        self._errors.append(ConfigError(self._file, line, render(path), what, suggestion))


def _locate(root: Node, loc: Sequence[str | int]) -> tuple[Node, int, Path]:
    """The node that a location of pydantic's names, its line, and its path; the nearest above where there is none.

    A location also names the branches of unions; they stand in no file and are left out.
    """
    node, line = root, root.line
    path: list[str | int] = []
    for part in loc:
        if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.line
        elif isinstance(node.value, dict) and isinstance(part, str):
            line = node.keys.get(part, line)
            node = node.value.get(part, node)
        else:
            continue
        path.append(part)
    return node, line, tuple(path)


def _keys(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """The keys that are known at a location below a model."""
    for part in loc:
        if part == "metrics":
            model = MetricProfile
        elif isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
                model = annotation
    extra = ["defaults"] if model is Config else []
    left_out = ["service"] if model is ServiceProfile else []
    return [key for key in model.model_fields if key not in left_out] + extra
