"""How series and their labels are called in Prometheus: as YACE calls them, or in our own way. Pure.

Guarantees:

* every name is one that all versions of Prometheus take ([a-zA-Z_][a-zA-Z0-9_]*), however odd CloudWatch's is;
* style `yace` is what YACE 0.67 exposes to a Prometheus that did not ask for UTF-8 names, character by character
  (tests/golden/yace/names.json was taken from its /metrics); YACE leaves out labels that it cannot say, and so does this: "" is returned;
* neither way is one to one ("a.b" and "a-b" meet): who makes label sets of names looks after that (`ingest.series_labels`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Literal

Style = Literal["yace", "headgate"]

_LABEL: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_ODD: Final = frozenset(" ,\t/\\.-:=@<>()\u201c")
"""What YACE writes as an underscore; all else that is odd it leaves as it is."""
_NOT_A_NAME: Final = re.compile(r"[^a-zA-Z0-9_:]")
_WORDS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])")
"""CPU|Utilization, Bytes|Out, HTTPCode_ELB_5XX."""
_AWS: Final = re.compile(r"/?aws/", re.IGNORECASE)
_APART: Final = re.compile(r"[^a-zA-Z0-9]+")
_CACHED: Final = 16_384


@lru_cache(_CACHED)
def metric_name(style: Style, namespace: str, metric: str, stat: str) -> str:
    """What a metric is called: aws_ec2_cpuutilization_average, or cloudwatch_ec2_cpu_utilization, whose statistic is a label."""
    if style == "headgate":
        return "_".join(part for part in ("cloudwatch", _words(_short(namespace)), _words(metric)) if part)
    space = _yace_snake(namespace.removeprefix("/").lower())
    prefix = space if space.startswith("aws") else f"aws_{space}"
    name = f"{prefix}_{_without_namespace(space, _yace_snake(metric))}"
    return _escaped(f"{name}_{_yace_snake(stat)}" if stat else name)


def info_name(namespace: str) -> str:
    """aws_ec2_info: one series a tagged resource, value 0, with all its tags."""
    return metric_name("yace", namespace, "info", "")


def dimension_label(style: Style, name: str, snake_case: bool) -> str:
    """dimension_InstanceId, or in snake case dimension_instance_id; "" where YACE leaves the dimension out."""
    if style == "yace":
        return _prefixed("dimension_", name, snake_case)
    return f"dimension_{_words(name) if snake_case else _NOT_A_NAME.sub('_', name).replace(':', '_')}"


def tag_label(key: str, snake_case: bool) -> str:
    """tag_Team; "" where YACE leaves the tag out."""
    return _prefixed("tag_", key, snake_case)


def custom_tag_label(key: str, snake_case: bool) -> str:
    """custom_tag_Team; "" where YACE leaves the tag out."""
    return _prefixed("custom_tag_", key, snake_case)


# --- YACE's way -----------------------------------------------------------------------------------------------


@lru_cache(_CACHED)
def _prefixed(prefix: str, name: str, snake_case: bool) -> str:
    said = _yace_snake(name) if snake_case else "".join(map(_replaced, name))
    # YACE asks whether what follows the prefix is a label's name by itself: a key that begins with a digit is none.
    return prefix + said if _LABEL.fullmatch(said) else ""


def _replaced(character: str) -> str:
    if character == "%":
        return "_percent"
    return "_" if character in _ODD else character


def _yace_snake(text: str) -> str:
    """In lower case, with an underscore before a capital that follows a small letter or a digit: so CPUUtilization is one word."""
    said = []
    before = ""
    for character in text:
        if character.isupper() and (before.islower() or before.isdecimal()):
            said.append("_")
        said.append(_replaced(character).lower())
        before = character
    return "".join(said)


def _without_namespace(space: str, metric: str) -> str:
    """Less a beginning that repeats the namespace, as glue_driver_… of Glue.

    Part after part of the namespace is looked for, each where the one before it would have ended had it stood first; so of
    aws_foo_bar no more than one part is ever taken off. A fact about YACE, and no idea of ours.
    """
    skip = 0
    for part in space.split("_"):
        if metric.startswith(part, skip):
            skip = len(part)
    return metric[skip:].removeprefix("_")


def _escaped(name: str) -> str:
    """What YACE's endpoint makes of a name that is not a classic one, unless it is asked for UTF-8."""
    return _NOT_A_NAME.sub("_", name)


# --- ours -----------------------------------------------------------------------------------------------------


def _short(namespace: str) -> str:
    """AWS/EC2 is EC2; a namespace of the user's own is as it is."""
    return namespace[found.end() :] if (found := _AWS.match(namespace)) else namespace


@lru_cache(_CACHED)
def _words(text: str) -> str:
    apart = _WORDS.sub("_", text.replace("%", "_percent_"))
    return _APART.sub("_", apart).strip("_").lower()
