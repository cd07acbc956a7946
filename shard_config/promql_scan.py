"""Where the selectors of a PromQL expression stand in its text. Pure.

promql_parser says what an expression means and holds no places; this finds places and is held against it by who asks (`shard_config.promql`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_TOKEN: Final = re.compile(
    r"""(?P<comment>\#[^\n]*)|(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)|(?P<number>[0-9][0-9a-zA-Z_.]*)"""
    r"""|(?P<word>[a-zA-Z_:][a-zA-Z0-9_:]*)|(?P<range>\[[^\]]*\])|(?P<mark>[^\s])""",
    re.DOTALL,
)
_LISTS: Final = frozenset(("by", "without", "on", "ignoring", "group_left", "group_right"))
"""Words that a list of labels follows."""
_WORDS: Final = _LISTS | {"and", "or", "unless", "atan2", "offset", "bool", "inf", "nan"}


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Selector:
    """A selector with its place: [start, end) without, [start, whole_end) with its range and modifiers.

    `function` is what it is the whole argument of; `opened` where that function's name begins.
    """

    text: str
    start: int
    end: int
    whole_end: int
    range: Token | None
    offset: Token | None
    offset_sign: str
    fixed: bool
    """At a fixed time (@ 1609746000)."""
    function: str
    opened: int
    closed: int
    pressed: bool
    """A word follows without a space: sum(x{a="b"}and y)."""


def tokens_of(text: str) -> list[Token]:
    """Comments left out. A lexer for finding places only: whether the text is PromQL is for promql_parser to say."""
    found = []
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind != "comment":
            found.append(Token(kind, match[0], match.start()))
    return found


def selectors_of(text: str) -> list[Selector]:
    """All selectors, in the order in which they stand."""
    return list(_Scan(tokens_of(text), text).selectors())


class _Scan:
    """One pass over the tokens; keeps the functions that are open."""

    def __init__(self, tokens: list[Token], text: str) -> None:
        self._tokens = tokens
        self._text = text

    def _at(self, i: int) -> Token:
        return self._tokens[i] if i < len(self._tokens) else Token("end", "", len(self._text))

    def selectors(self) -> Iterator[Selector]:
        opened: list[tuple[str, int]] = []
        i = 0
        while i < len(self._tokens):
            token = self._tokens[i]
            following = self._at(i + 1).text
            if token.text == "(":
                before = self._tokens[i - 1] if i else None
                named = before is not None and before.kind == "word" and before.text.lower() not in _WORDS
                opened.append((before.text, before.start) if before and named else ("", token.start))
            elif token.text == ")":
                if opened:
                    opened.pop()
            elif token.kind == "word" and token.text.lower() in _LISTS and following == "(":
                i = self._past(i + 1, ")")
                continue
            elif token.text == "offset":
                i += 2 + (following == "-")
                continue
            elif token.text == "@":
                i = self._past_at(i)
                continue
            elif token.text == "{" or (
                token.kind == "word"
                and following != "("
                and token.text.lower() not in _WORDS
                and not self._is_aggregator(i)
            ):
                i, selector = self._selector(i, opened[-1] if opened else ("", 0))
                yield selector
                continue
            i += 1

    def _is_aggregator(self, i: int) -> bool:
        """`sum by (x) (…)`."""
        return self._at(i + 1).text in ("by", "without") and self._at(i + 2).text == "("

    def _past(self, i: int, mark: str) -> int:
        while i < len(self._tokens) and self._tokens[i].text != mark:
            i += 1
        return i + 1

    def _past_at(self, i: int) -> int:
        """After `@ 123`, `@ -1`, `@ start()`."""
        i += 1 + (self._at(i + 1).text in ("-", "+"))
        return i + 3 if self._at(i).text in ("start", "end") else i + 1

    def _selector(self, i: int, opened: tuple[str, int]) -> tuple[int, Selector]:
        first, before = self._tokens[i], self._at(i - 1) if i else Token("mark", "", 0)
        if first.text != "{":
            i += 1
        if self._at(i).text == "{":
            i = self._past(i, "}")
        end = self._tokens[i - 1].end
        span: Token | None = None
        if self._at(i).kind == "range" and ":" not in self._at(i).text:
            span = self._at(i)
            i += 1
        offset: Token | None = None
        sign, fixed = "", False
        while self._at(i).text in ("offset", "@"):
            if self._at(i).text == "offset":
                sign = "-" if self._at(i + 1).text == "-" else ""
                i += 1 + bool(sign)
                offset = self._at(i)
                i += 1
            else:
                fixed = self._at(i + 1).text not in ("start", "end")
                i = self._past_at(i)
        last, after = self._tokens[i - 1], self._at(i)
        whole = before.text == "(" and after.text == ")" and opened[0] != ""
        # The scalar of quantile_over_time(0.9, x[5m]) stands before the range.
        if span is not None and after.text == ")" and opened[0] != "":
            whole = True
        function = opened[0].lower() if whole else ""
        pressed = self._text[last.end : last.end + 1].isalnum()
        return i, Selector(
            self._text[first.start : end], first.start, end, last.end, span, offset, sign, fixed,
            function, opened[1], after.start, pressed,
        )  # fmt: skip
