"""PromQL that asks for late points, rewritten where it stands: what is not a selector of ours stays byte for byte. Pure.

Guarantees:

* *What was written before is what is asked after, as of a time at which the points are there*: the result is parsed, and its tree must be that of
  the original with each late selector changed as decided and nothing else. What fails that is refused, never returned.
* *A rule keeps its own relations*: all late selectors of an expression move by the same time, or none does.
* *Nothing is guessed*: what cannot be said with certainty raises NotMigrated with the reason.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import promql_parser

from shard_config.late import LOOKBACK_S, LateMetric, LateNames, spoken
from shard_config.promql_scan import Selector, selectors_of

_RATES: Final = frozenset(("rate", "irate", "increase"))

Edit = tuple[int, int, str]
"""(start, end, what is put in place of [start, end)); where start is end it is put in."""


class NotMigrated(Exception):
    """An expression that was left as it is, and why."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """An expression and how it was changed.

    `how` is newest, shifted or left. `by_s`: the newest point within that time, or as of so long ago. `services` are those of its late
    selectors. `notes` is what somebody has to look at.
    """

    text: str
    how: str
    by_s: int = 0
    services: tuple[str, ...] = ()
    earliest_s: int = 0
    latest_s: int = 0
    notes: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    """What was put in place of [start, end) of the original; ascending, apart from each other."""


@dataclass(frozen=True, slots=True)
class _Late:
    """A selector, and what of ours it may mean: nothing for one of others' series."""

    selector: Selector
    metrics: tuple[LateMetric, ...]

    @property
    def moves(self) -> bool:
        return bool(self.metrics) and not self.selector.fixed


# --- what to do -----------------------------------------------------------------------------------------------


def rewrite(text: str, names: LateNames) -> Rewritten:
    """The expression as it has to be for points that come late. Raises NotMigrated."""
    tree = _parsed(text)
    late = _late(text, tree, names)
    moving = [one for one in late if one.moves]
    services = tuple(sorted({m.delay.service for one in late for m in one.metrics}))
    if not moving:
        notes = ("it asks for fixed times, at which the points are there by now",) if services else ()
        return Rewritten(text, "left", services=services, notes=notes)
    _refuse(moving)
    metrics = [m for one in moving for m in one.metrics]
    latest_s = max(m.delay.latest_s for m in metrics)
    # The newest point is enough where a rule asks for nothing but instants, and sees each point in turn.
    shifted = (
        _has_subquery(tree)
        or any(m.delay.batched for m in metrics)
        or any(one.selector.offset is not None or one.selector.range is not None for one in moving)
    )
    by_s = latest_s if shifted else _minutes(max(m.delay.newest_s for m in metrics))
    change = _shift if shifted else _newest
    edits = {i: change(one, by_s) for i, one in enumerate(late) if one.moves}
    all_edits = sorted(itertools.chain.from_iterable(edits.values()), key=lambda edit: edit[:2])
    after = _applied(text, all_edits)
    _hold(text, after, late, edits)
    return Rewritten(
        after, "shifted" if shifted else "newest", by_s, services,
        max(m.delay.earliest_s for m in metrics), latest_s, tuple(_notes(moving)), tuple(all_edits),
    )  # fmt: skip


def _parsed(text: str) -> Any:
    try:
        return promql_parser.parse(text)
    except ValueError as error:
        said = str(error).split("\n", 1)[0]
        raise NotMigrated(f"it is not PromQL as Prometheus 2.45 has it: {said}") from error


def _late(text: str, tree: Any, names: LateNames) -> list[_Late]:
    """All selectors, in order. Raises NotMigrated where one may mean our series without saying so."""
    selectors, nodes = selectors_of(text), _nodes(tree)
    if [str(_parsed(s.text)) for s in selectors] != [_bare(n) for n in nodes]:
        raise NotMigrated("its selectors cannot be told apart with certainty")
    return [_Late(s, _metrics(node, names)) for s, node in zip(selectors, nodes, strict=True)]


def _metrics(node: Any, names: LateNames) -> tuple[LateMetric, ...]:
    matchers = [(str(m.op), m.name, m.value) for m in node.matchers.matchers if m.name == "__name__"]
    equal = node.name or next((value for op, _, value in matchers if op == "MatchOp.Equal"), None)
    if equal is not None:
        metric = names.of(equal)
        return (metric,) if metric else ()
    patterns = [value for op, _, value in matchers if op == "MatchOp.Re"]
    if not patterns:
        raise NotMigrated("it selects by labels alone, which may mean Headgate's series: name the metric")
    try:
        return tuple(names.matching(patterns[0]))
    except re.error as error:
        raise NotMigrated(f'the pattern "{patterns[0]}" of its name is not readable here: {error}') from error


def _nodes(tree: Any) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(tree, visit)
    return found


def _bare(node: Any) -> str:
    """A selector without its modifiers."""
    kept = node.offset, node.at
    node.offset = node.at = None
    said = str(node)
    node.offset, node.at = kept
    return said


def _has_subquery(tree: Any) -> bool:
    return not promql_parser.walk(tree, lambda node: not isinstance(node, promql_parser.SubqueryExpr))


def _refuse(moving: list[_Late]) -> None:
    for one in moving:
        for metric in one.metrics:
            if metric.delay.refused:
                raise NotMigrated(f"{metric.delay.service}: {metric.delay.refused}")
        if one.selector.offset_sign:
            raise NotMigrated("offset - asks for a time to come")
        if one.selector.function == "timestamp":
            late_s = max(m.delay.newest_s for m in one.metrics)
            raise NotMigrated(
                f"timestamp() of points that are up to {spoken(_minutes(late_s))} old: ask max_over_time(timestamp({one.selector.text})"
                f"[{spoken(_minutes(late_s))}:1m]) and compare it with that"
            )


def _notes(moving: list[_Late]) -> Iterator[str]:
    summed = sorted({m.delay.period_s for one in moving for m in one.metrics if m.summed})
    rates = sorted(
        {
            one.selector.function
            for one in moving
            if one.selector.function in _RATES and any(m.summed for m in one.metrics)
        }
    )
    if rates:
        yield (
            f"{rates[0]}() of what is a sum for each period already says nothing: a second's rate is the sum divided by {summed[0]}, an hour's "
            "increase is sum_over_time(…[1h])"
        )
    if summed:
        yield f"a value is the sum of {' or '.join(spoken(s) for s in summed)}: is that the period that the threshold was made for?"


# --- edits ----------------------------------------------------------------------------------------------------


def _minutes(seconds: int) -> int:
    """Rounded up to whole ones."""
    return -(-seconds // 60) * 60


def _span_s(one: _Late) -> int:
    """What a selector of one instant has to see for a point of each series to be in it."""
    return max(LOOKBACK_S, *(m.delay.period_s for m in one.metrics))


def _newest(one: _Late, by_s: int) -> list[Edit]:
    return _wrapped(one.selector, f"[{spoken(by_s)}]", [])


def _shift(one: _Late, by_s: int) -> list[Edit]:
    s = one.selector
    if s.offset is not None:
        moved = [(s.offset.start, s.offset.end, spoken(_offset_s(s) + by_s))]
    else:
        at = s.end if s.range is None else s.range.end
        apart = " " if s.pressed else ""
        moved = [(at, at, f" offset {spoken(by_s)}{apart}")]
    if s.range is None and _span_s(one) > LOOKBACK_S:
        return _wrapped(s, f"[{spoken(_span_s(one))}]", moved)
    return moved


def _wrapped(s: Selector, span: str, moved: list[Edit]) -> list[Edit]:
    """A range in place of an instant; absent() knows its labels only from a selector that is its whole argument."""
    if s.function == "absent":
        return [(s.opened, s.opened + len("absent"), "absent_over_time"), (s.end, s.end, span), *moved]
    return [
        (s.start, s.start, "last_over_time("),
        (s.end, s.end, span),
        *moved,
        (s.whole_end, s.whole_end, ")"),
    ]


def _offset_s(s: Selector) -> int:
    return 0 if s.offset is None else _seconds(s.offset.text)


def _seconds(duration: str) -> int:
    try:
        found = promql_parser.parse_duration(duration)
    except ValueError as error:
        raise NotMigrated(f'"{duration}" is not a duration as 5m, 1h30m') from error
    if found % timedelta(seconds=1):
        raise NotMigrated(f"{duration} is not whole seconds")
    return int(found.total_seconds())


def _applied(text: str, edits: list[Edit]) -> str:
    """Edits that stand at one place are put there in their order."""
    parts, at = [], 0
    for start, end, put in edits:
        parts += [text[at:start], put]
        at = end
    return "".join([*parts, text[at:]])


# --- the check ------------------------------------------------------------------------------------------------


def _hold(text: str, after: str, late: list[_Late], edits: Mapping[int, list[Edit]]) -> None:
    """The result's tree is the original's with each late selector changed, and nothing else. Raises NotMigrated."""
    numbers = itertools.count()
    number = -1
    done: set[int] = set()

    def changed(node: Any) -> Any:
        """What a node of the original has become; None where it stays."""
        nonlocal number
        if isinstance(node, promql_parser.VectorSelector):
            number = next(numbers)
        elif not isinstance(node, promql_parser.MatrixSelector | promql_parser.Call):
            return None
        one = late[number] if number >= 0 else None
        if one is None or number in done or not one.moves or type(node) is not _kind(one.selector):
            return None
        if isinstance(node, promql_parser.Call) and node.func.name != "absent":
            return None
        done.add(number)
        s = one.selector
        start, end = (s.opened, s.closed + 1) if s.function == "absent" else (s.start, s.whole_end)
        return _parsed(
            _applied(text[start:end], [(a - start, b - start, put) for a, b, put in edits[number]])
        )

    if str(promql_parser.transform(_parsed(text), None, changed)) != str(_parsed(after)):
        raise NotMigrated("it cannot be changed with certainty")


def _kind(s: Selector) -> type:
    """The kind of node that stands for all of a selector that is changed."""
    if s.range is not None:
        return promql_parser.MatrixSelector
    return promql_parser.Call if s.function == "absent" else promql_parser.VectorSelector
