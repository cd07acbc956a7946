"""Prometheus' rule files, and PrometheusRules of its operator: every rule with its place, and expressions changed in place. Pure.

Guarantees:

* *Byte for byte*: comments, order, quotes and layout stay; only what stands between a late selector's ends is touched.
* *The file still says the same*: the result is parsed again, and must be the original but for the changed expressions.
* *Bounded*: as `shard_config.document`; aliases are never expanded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import yaml

from shard_config.document import SIZE_BYTES_MAX, ConfigError, ConfigErrors
from shard_config.promql import Edit

_ESCAPED: Final = {"n": " ", "t": " ", " ": " ", "\n": " ", '"': '"', "\\": "\\", "/": "/"}
"""Of a double-quoted scalar: what stands behind a backslash, as it is compared here (all white space is alike)."""


class CannotPlace(Exception):
    """An expression cannot be changed where it stands."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule and where its expression stands: text[start:end] of the file, `line` from 1."""

    group: str
    kind: str
    """alert or record."""
    name: str
    expr: str
    hold: str
    """`for`, as it is written; empty where there is none."""
    query_offset: str
    """Of its group; empty where there is none."""
    said: tuple[str, ...]
    """Texts of its labels and annotations."""
    line: int
    start: int
    end: int
    style: str
    """As YAML has it: empty for plain, ' and ", | and >."""


def rules_of(text: str, file: str) -> list[Rule]:
    """All rules of a file. Raises ConfigErrors where it is no rule file."""
    if len(text) > SIZE_BYTES_MAX:
        raise ConfigErrors([ConfigError(file, 0, "", f"over {SIZE_BYTES_MAX:,} bytes")])
    try:
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        what = f"not YAML: {error.problem}"
        raise ConfigErrors([ConfigError(file, line, "", what, "a template? render it first")]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigErrors([ConfigError(file, 0, "", f"not YAML: {error}")]) from error
    found = [rule for node in documents if node is not None for rule in _of_document(node)]
    if not found:
        raise ConfigErrors(
            [
                ConfigError(
                    file, 0, "", "no rules in it", "a rule file has groups, a PrometheusRule spec.groups"
                )
            ]
        )
    return found


def _of_document(node: yaml.Node) -> Iterator[Rule]:
    keys = _keys(node)
    if _text(keys.get("kind")).endswith("List"):
        for item in _items(keys.get("items")):
            yield from _of_document(item)
        return
    if "spec" in keys:
        keys = _keys(keys["spec"])
    seen: set[int] = set()
    for group in _items(keys.get("groups")):
        of_group = _keys(group)
        for node_of_rule in _items(of_group.get("rules")):
            rule = _keys(node_of_rule)
            expr = rule.get("expr")
            if not isinstance(expr, yaml.ScalarNode) or id(expr) in seen:
                continue  # an alias: what it repeats is changed where it stands
            seen.add(id(expr))
            kind = "alert" if "alert" in rule else "record"
            said = [_text(v) for key in ("labels", "annotations") for v in _keys(rule.get(key)).values()]
            yield Rule(
                _text(of_group.get("name")),
                kind,
                _text(rule.get(kind)),
                expr.value,
                _text(rule.get("for")),
                _text(of_group.get("query_offset")),
                tuple(said),
                expr.start_mark.line + 1,
                expr.start_mark.index,
                expr.end_mark.index,
                expr.style or "",
            )


def _keys(node: yaml.Node | None) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}


def _items(node: yaml.Node | None) -> list[yaml.Node]:
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _text(node: yaml.Node | None) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else ""


# --- in place -------------------------------------------------------------------------------------------------


def with_changes(text: str, changes: Sequence[tuple[Rule, str, Sequence[Edit]]]) -> str:
    """The file with expressions changed: (rule, its new expression, the edits that make it). Raises CannotPlace for all of them together."""
    placed: list[Edit] = []
    for rule, _, edits in changes:
        where = _places(text, rule)
        for start, end, put in edits:
            # What is put in sticks to what is before it, but for the beginning of a selector.
            first = where[start][0] if end > start or put.endswith("(") else where[start - 1][1]
            last = where[end - 1][1] if end > start else first
            placed.append((first, last, put))
    placed.sort(key=lambda edit: edit[:2])
    parts, at = [], 0
    for first, last, put in placed:
        parts += [text[at:first], put]
        at = last
    after = "".join([*parts, text[at:]])
    _hold(text, after, {rule.start: expr for rule, expr, _ in changes})
    return after


def _places(text: str, rule: Rule) -> Mapping[int, tuple[int, int]]:
    """Where each character of an expression that is not white space stands in the file: [first, last)."""
    at = rule.start
    if rule.style in ("|", ">"):
        at = text.index("\n", at)
    elif rule.style:
        at += 1
    found = {}
    for i, character in enumerate(rule.expr):
        if character.isspace():
            continue
        first, last, stands = _next(text, at, rule)
        while stands.isspace():
            first, last, stands = _next(text, last, rule)
        if stands != character:
            raise CannotPlace(f"line {rule.line}: {character!r} is written in a way that is not known here")
        found[i] = (first, last)
        at = last
    return found


def _next(text: str, at: int, rule: Rule) -> tuple[int, int, str]:
    """The character of a scalar that stands at a place: (first, last, as it is meant)."""
    if at >= rule.end:
        raise CannotPlace(f"line {rule.line}: the expression is longer than what stands there")
    if rule.style == "'" and text.startswith("''", at):
        return at, at + 2, "'"
    if rule.style == '"' and text[at] == "\\":
        return at, at + 2, _ESCAPED.get(text[at + 1], "")
    return at, at + 1, text[at]


def _hold(text: str, after: str, changed: Mapping[int, str]) -> None:
    """The file is the original but for the changed expressions, by the place at which each begins."""
    expected = [_said(event, changed) for event in yaml.parse(text, Loader=yaml.SafeLoader)]
    try:
        got = [_said(event, {}) for event in yaml.parse(after, Loader=yaml.SafeLoader)]
    except yaml.YAMLError as error:
        raise CannotPlace("a range in it would be no YAML where it stands") from error
    if got != expected:
        raise CannotPlace("something else in the file would change its meaning")


def _said(event: yaml.Event, changed: Mapping[int, str]) -> tuple[object, ...]:
    """What an event says, white space aside."""
    anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
    if not isinstance(event, yaml.ScalarEvent):
        return type(event), anchor, tag
    at = event.start_mark.index if event.start_mark else -1
    return type(event), anchor, tag, " ".join(changed.get(at, event.value).split())
