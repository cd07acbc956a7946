"""Types and checks that the models of the configuration share. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Final

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


AccountId = Annotated[str, StringConstraints(pattern=r"^\d{12}$")]
Pattern = Annotated[str, AfterValidator(is_a_pattern)]
"""A regular expression, Python's."""
SLUG_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,62}$"
Slug = Annotated[str, StringConstraints(pattern=SLUG_PATTERN)]
HttpUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/?#]+([/?#]\S*)?$")]
"""Kept as text, not taken apart: it becomes a label as it stands."""
Statistic = Annotated[
    str,
    StringConstraints(
        pattern=r"^(Average|Sum|Minimum|Maximum|SampleCount|p\d{1,2}(\.\d{1,2})?|IQM|tm\d{1,2})$"
    ),
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
