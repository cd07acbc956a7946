"""Types and checks that the models of the configuration share. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError


def wrong(key: str, what: str) -> PydanticCustomError:
    """An error of a whole model that belongs to one of its keys: `load` reads `key` to find the line."""
    # The text goes in as a value: what it quotes may hold braces.
    return PydanticCustomError("headgate", "{what}", {"what": what, "key": key})


def is_a_period(period_s: int) -> int:
    if period_s not in (1, 5, 10, 30) and period_s % 60:
        raise PydanticCustomError("headgate", "CloudWatch has periods of 1, 5, 10, 30 and multiples of 60 s")
    return period_s


_HOSTS: Final = re.compile(r"(([^\s:,@\[\]]*|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(,|$))*")


def is_a_dsn(dsn: str) -> str:
    """A DSN whose user and password end where a reader thinks: one that is not percent-encoded would put a part of the password into messages."""
    try:
        parts = urlsplit(dsn)
    except ValueError:  # it quotes
        parts = urlsplit("//@@")
    rest = parts.path + parts.query + parts.fragment
    if not _HOSTS.fullmatch(parts.netloc.rpartition("@")[2]) or "@" in rest or parts.netloc.count("@") > 1:
        raise PydanticCustomError(
            "headgate",
            "it is not right; a DSN is postgresql://user@host:port/database, and / # ? @ : in a user's name or password "
            "are %2F %23 %3F %40 %3A",
        )
    return dsn


def is_a_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise PydanticCustomError(
            "pattern", "{what}", {"what": f'"{text}" is not a pattern: {error}'}
        ) from error
    return text


def repeated(values: tuple[str, ...]) -> str | None:
    """The first value that stands there twice."""
    return next((value for i, value in enumerate(values) if value in values[:i]), None)


AccountId = Annotated[str, StringConstraints(pattern=r"^[0-9]{12}$")]
Pattern = Annotated[str, AfterValidator(is_a_pattern)]
"""A regular expression, Python's."""
SLUG_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,62}$"
Slug = Annotated[str, StringConstraints(pattern=SLUG_PATTERN)]
HttpUrl = Annotated[
    str,
    StringConstraints(
        pattern=r"^https?://([^\s/?#@:\[\]]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[^\s?#@]*)?([?#]\S*)?$"
    ),
]
"""Kept as text, not taken apart: it becomes a label as it stands. So it holds no credentials: a URL stands in logs and in the ledger."""
Statistic = Annotated[
    str,
    StringConstraints(
        pattern=r"^(Average|Sum|Minimum|Maximum|SampleCount|p\d{1,2}(\.\d{1,2})?|IQM|tm\d{1,2})$"
    ),
]


class Strict(BaseModel):
    # Inputs are hidden: pydantic's own message quotes them, and some are secrets.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)
