"""YAML text → a tree that knows the line of everything in it, and errors that say file, line and remedy.

Guarantees:

* **No surprise.** What PyYAML writes reads back the same; but yes, no, on and off, dates, hexadecimals and 1:30 are text, as they look. Tags,
  several documents, keys that are not plain words and duplicate keys (which PyYAML drops without a word) are errors.
* **Bounded.** Text over 5 MB, nesting over 20 levels and aliases that repeat over 10,000 nodes are refused while parsing, before
  they are expanded: the tree is built from parser events, never by recursion over what the text asks for.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import yaml

SIZE_BYTES_MAX: Final = 5 * 1000 * 1000
DEPTH_MAX: Final = 20
ALIASED_NODES_MAX: Final = 10_000

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]

# libyaml where PyYAML was built with it (every wheel is): 5 MB take a second instead of a minute.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Digits behind a zero are octal to YAML 1.1, decimal to YAML 1.2: a number either way, for whoever wants text to put it in quotes.
_INT: Final = re.compile(r"[-+]?(0[0-7]*|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?")
_WORDS: Final[dict[str, Scalar]] = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
_NUMBER_CHARS_MAX: Final = 40
_QUOTE: Final = "text that begins so stands in quotes"


@dataclass(frozen=True, slots=True, order=True)
class ConfigError:
    """One thing that is wrong. `line` counts from 1; 0 where the fault is in no line (the environment, a missing file)."""

    file: str
    line: int
    path: str
    """As accounts[3].regions[0]; empty for the document itself."""
    what: str
    suggestion: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        text = f"{place}: {self.path}: {self.what}" if self.path else f"{place}: {self.what}"
        text = f"{text}; {self.suggestion}" if self.suggestion else text
        # One line, and nothing that a terminal obeys, whatever the file had in it.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigErrors(ValueError):
    """All that is wrong with a configuration, in the order of its lines; `str` gives one line for each."""

    def __init__(self, errors: Iterable[ConfigError]) -> None:
        self.errors = tuple(sorted(set(errors)))
        super().__init__("\n".join(str(error) for error in self.errors))


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it stands. `keys` holds the line of each key of a mapping, `text` a scalar as it was written."""

    line: int
    value: Scalar | dict[str, Node] | list[Node]
    text: str = ""
    keys: dict[str, int] = field(default_factory=dict)

    @property
    def mapping(self) -> dict[str, Node]:
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Node]:
        return self.value if isinstance(self.value, list) else []

    def get(self, key: str) -> Node | None:
        return self.mapping.get(key)

    def plain(self) -> object:
        """The value without its lines."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def describe(self) -> str:
        """What this is, for a message: `the number 5`, `a list`."""
        match self.value:
            case None:
                return "nothing"
            case bool():
                return self.text
            case int() | float():
                return f"the number {_short(self.text)}"
            case str():
                return f'"{_short(self.text)}"'
            case list():
                return "a list"
            case _:
                return "a mapping"

    def kind(self) -> str:
        """As `describe`, without the value: for what may be a secret."""
        match self.value:
            case bool():
                return "true or false"
            case int() | float():
                return "a number"
            case str():
                return "text"
            case _:
                return self.describe()


def render(path: Path) -> str:
    """accounts[3].regions[0]"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean "x"?`, or nothing where nothing is near."""
    by_lower = {name.lower(): name for name in known}
    lower = word.lower()
    near = difflib.get_close_matches(lower, by_lower, n=3, cutoff=0.6)
    # Of equals, the one with the same letters: us-esat-1 is us-east-1 before us-west-1.
    near.sort(key=lambda name: sorted(name) != sorted(lower))
    return f'did you mean "{by_lower[near[0]]}"?' if near else ""


def parse(text: str, file: str, errors: list[ConfigError]) -> Node:
    """The tree of a document. Duplicate keys are added to `errors`; what leaves no tree to go on with raises ConfigErrors."""
    size_bytes = len(text.encode(errors="surrogatepass"))
    if size_bytes > SIZE_BYTES_MAX:
        what = f"the file has {size_bytes:,} bytes; at most {SIZE_BYTES_MAX:,} are read"
        raise ConfigErrors([ConfigError(file, 1, "", what)])
    return _Builder(text, file, errors).build()


class _Builder:
    """Events → tree. Depth and aliased nodes are counted as they come, so that no text can ask for more than its bounds."""

    def __init__(self, text: str, file: str, errors: list[ConfigError]) -> None:
        self._text = text
        self._file = file
        self._errors = errors
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._nodes = 0
        self._aliased = 0

    def build(self) -> Node:
        try:
            return self._document(iter(yaml.parse(self._text, Loader=_LOADER)))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            # libyaml marks the end of the text one line too far.
            line = min(mark.line + 1, self._text.count("\n") + 1) if mark else 1
            what = f"not YAML: {error.problem}" + (f" {error.context}" if error.context else "")
            tab = "YAML indents with spaces, not tabs" if "cannot start any token" in what else ""
            raise self._fatal(line, (), what, tab) from None
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            raise self._fatal(line, (), f"not YAML: {error.reason}") from None

    def _document(self, events: Iterator[yaml.Event]) -> Node:
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            raise self._fatal(1, (), "the file is empty", "docs/configuration.md has a minimal example")
        root = self._node(next(events), events, (), 0)
        next(events)
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self._fatal(_line(after), (), "a second YAML document", "keep one document a file")
        return root

    def _node(self, event: yaml.Event, events: Iterator[yaml.Event], path: Path, depth: int) -> Node:
        line = _line(event)
        if depth > DEPTH_MAX:
            raise self._fatal(line, (), f"nested deeper than {DEPTH_MAX} levels")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, line, path)
        if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            raise self._fatal(line, path, "not YAML: a value is missing")
        if event.tag not in (None, "!"):
            raise self._fatal(line, path, "a tag is not understood", f"leave tags out; {_QUOTE}")
        before = self._nodes
        self._nodes += 1
        if isinstance(event, yaml.MappingStartEvent):
            node = self._mapping(line, events, path, depth)
        elif isinstance(event, yaml.ScalarEvent):
            node = Node(line, _scalar(event), event.value)
        else:
            node = Node(line, [])
            while not isinstance(child := next(events), yaml.SequenceEndEvent):
                node.items.append(self._node(child, events, (*path, len(node.items)), depth + 1))
        if event.anchor is not None:
            self._anchors[event.anchor] = (node, self._nodes - before)
        return node

    def _mapping(self, line: int, events: Iterator[yaml.Event], path: Path, depth: int) -> Node:
        node = Node(line, {})
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key_line = _line(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise self._fatal(key_line, path, "a key is not a plain word")
            key = event.value
            value = self._node(next(events), events, (*path, key), depth + 1)
            if key in node.keys:
                what = f'the key "{_short(key)}" stands here twice, first at line {node.keys[key]}'
                self._errors.append(ConfigError(self._file, key_line, render((*path, key)), what, "keep one"))
                continue
            node.mapping[key] = value
            node.keys[key] = key_line
        return node

    def _alias(self, event: yaml.AliasEvent, line: int, path: Path) -> Node:
        if event.anchor not in self._anchors:
            # Not named, nor is a tag below: a password without quotes may begin so.
            raise self._fatal(line, path, "the alias names nothing that is complete before it", _QUOTE)
        node, size = self._anchors[event.anchor]
        self._aliased += size
        # Counted as if written out, so that aliases of aliases cost what they would expand to.
        self._nodes += size
        if self._aliased > ALIASED_NODES_MAX:
            what = f"aliases repeat more than {ALIASED_NODES_MAX:,} values"
            raise self._fatal(line, path, what, "write them out, or use defaults")
        return node

    def _fatal(self, line: int, path: Path, what: str, suggestion: str = "") -> ConfigErrors:
        error = ConfigError(self._file, line, render(path), what, suggestion)
        return ConfigErrors([*self._errors, error])


def _line(event: yaml.Event) -> int:
    """Counted from 1."""
    return event.start_mark.line + 1 if event.start_mark else 1


def _scalar(event: yaml.ScalarEvent) -> Scalar:
    """A plain scalar's value; what is quoted is text."""
    text: str = event.value
    if not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _NUMBER_CHARS_MAX:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
