"""How errors of a configuration are said: what pydantic means, in a reader's words. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from shard_config.document import Path

EXPECTED: Final = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "literal_error": '"all" or a list',
}
FORM: Final = {
    "id": "an account id is 12 digits",
    "exclude": "an account id is 12 digits",
    "via": "an account id is 12 digits",
    "units": "a root is r-<4 or more of a-z, 0-9>, a unit ou-<root's>-<8 or more>",
    "statistics": "statistics are Average, Sum, Minimum, Maximum, SampleCount, p99, p99.9, IQM, tm90",
    "endpoints": "an endpoint is an http or https URL without credentials",
    "endpoint_url": "an endpoint is an http or https URL without credentials",
    "url": "a URL is as http://prometheus-1:9090/api/v1/write; credentials are in username and password, or bearer_token",
    "role_arn": "a role is arn:aws:iam::<12 digits>:role/<name>",
    "role_template": "a role template is arn:aws:iam::{account}:role/<name>",
    "bootstrap": "bootstrap servers are host:port, separated by commas; credentials are in kafka.security",
    "dsn": "a DSN is postgresql://user@host:port/database",
}
SLUG_FORM: Final = "a name is at most 63 of a-z, 0-9 and -, and starts with a letter or a digit"


def what_of(kind: str, message: str, context: Mapping[str, object], got: str, path: Path) -> tuple[str, str]:
    """(what, suggestion) for one of pydantic's errors about a value."""
    if kind == "literal_error" and context["expected"] != "'all'":
        return f"must be {context['expected']}, got {got}", ""
    if kind in EXPECTED:
        quote = "write it in quotes" if kind == "string_type" and got[:3] in ("the", "tru", "fal") else ""
        return f"expected {EXPECTED[kind]}, got {got}", quote
    if kind == "string_pattern_mismatch":
        key = next((str(part) for part in reversed(path) if isinstance(part, str)), "")
        return f"{'it' if got == 'text' else got} is not right", FORM.get(key, SLUG_FORM)
    if kind == "headgate":
        return message, ""
    if kind == "pattern":
        return message, 'patterns are Python\'s regular expressions: any text is ".*", a dot "[.]"'
    if kind == "missing":
        return "too few values", ""
    if kind == "too_short":
        return "must not be empty", ""
    must = message.replace("Input should be", "must be").replace("greater than or equal to", "at least")
    return f"{must}, got {got}", ""


def some_of(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
