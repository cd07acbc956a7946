"""A dashboard for each group of AWS services, of the recorded aggregates (`headgate rules`) and of the resources that stand out. Pure.

Guarantees:

* what is asked for is collected, and what is asked of records is recorded: a service, metric or statistic that is not collected has no panel;
* *late points stand where they belong*: what is recorded is as of `Delay.latest_s` ago, so it is asked with that offset back, and the newest minutes of a
  graph are empty; the resources that stand out are asked as far back as their newest point may be;
* lines stay few, with hundreds of accounts too: they are by region, by account or by both, as chosen above, and averages are joined by their counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shard_config.known import shipped_services
from shard_config.late import Delay, delay_of, spoken
from shard_config.model import Config, MetricProfile, ServiceProfile
from shard_config.recording import LEVEL, grain_of, operations_of
from shard_config.series_names import dimension_label, metric_name
from workers.grafana import Dashboard, Panel, Query, Row, Variable
from workers.service_groups import GROUPS, Group, Shown

WORST: Final = 10
_UNITS: Final = {
    "Percent": "percent",
    "Bytes": "bytes",
    "Bytes/Second": "Bps",
    "Count/Second": "cps",
    "Seconds": "s",
    "Milliseconds": "ms",
    "Microseconds": "µs",
}
_PER_SECOND: Final = {"Bytes": "Bps", "Seconds": "percentunit"}
_CHOSEN: Final = 'account_id=~"$account_id",region=~"$region"'
_RECORDED: Final = f'{{__name__=~"{LEVEL}:aws_.+"}}'


@dataclass(frozen=True, slots=True)
class _Service:
    """How one service's series are called, and how late they come."""

    profile: ServiceProfile
    delay: Delay
    snake_case: bool

    @property
    def metrics(self) -> Mapping[str, MetricProfile]:
        return {m.name: m for m in self.profile.metrics if not isinstance(m, str)}


def service_dashboards(config: Config | None = None) -> list[Dashboard]:
    """One a group, of what a configuration collects (its names must be YACE's); of all shipped services where there is none."""
    services = {name: _Service(p, delay_of(p), False) for name, p in shipped_services().items()}
    if config is not None:
        sink = config.remote_write
        collected = {name for account in config.accounts for name in account.services}
        if config.organization is not None:
            collected |= set(config.organization.services)
        services = {
            p.service: _Service(
                p, delay_of(p, sink.receivers if sink else ()), sink.snake_case if sink else False
            )
            for p in config.services
            if p.service in collected
        }
    boards = [_dashboard(group, services) for group in GROUPS]
    return [board for board in boards if board.rows]


def _dashboard(group: Group, services: Mapping[str, _Service]) -> Dashboard:
    rows = [
        Row(one.title, tuple(_panels(services[one.service], one.shown)))
        for one in group.services
        if one.service in services
    ]
    titles = ", ".join(row.title for row in rows)
    return Dashboard(
        f"headgate-{group.name}",
        f"Headgate: {group.name}",
        f"{titles}: what was collected, by the recording rules of `headgate rules`, and the resources that stand out. YACE's names.",
        tuple(row for row in rows if row.panels),
        (
            Variable("account_id", "Account", _RECORDED),
            Variable("region", "Region", _RECORDED),
            Variable("by", "A line each", choices=("region", "account_id", "account_id, region")),
        ),
        group.span,
        "5m",
    )


def _panels(service: _Service, shown: Sequence[Shown]) -> Iterator[Panel]:
    for one in shown:
        metric = service.metrics.get(one.metric)
        if metric is None:
            continue
        stats = tuple(stat for stat in one.stats if stat in metric.statistics)
        if stats:
            yield _lines(service, metric, replace(one, stats=stats))
        if one.worst and one.stats[0] in stats:
            yield _stand_out(service, metric, one)


def _lines(service: _Service, metric: MetricProfile, one: Shown) -> Panel:
    queries = tuple(
        Query(_joined(service, metric, stat, one), f"{{{{account_id}}}} {{{{region}}}} {stat.lower()}")
        for stat in one.stats
    )
    per = "a second" if "Sum" in one.stats else "over resources"
    what = f"{service.profile.namespace} {metric.name}, {' and '.join(one.stats).lower()} {per}. As of {spoken(service.delay.latest_s)} ago all is there."
    return Panel(one.title, what, queries, _unit(metric, one), steps=one.steps)


def _joined(service: _Service, metric: MetricProfile, stat: str, one: Shown) -> str:
    operations = operations_of(metric, stat)

    def recorded(operation: str) -> str:
        if operation not in operations:
            raise KeyError(f"{service.profile.service} {metric.name} {stat}: {operation} is not recorded")
        name = f"{LEVEL}:{metric_name('yace', service.profile.namespace, metric.name, stat)}:{operation}"
        return f"{name}{{{_CHOSEN}}} offset -{spoken(service.delay.latest_s)}"

    if "avg" in operations and not one.as_sum:
        count = recorded("count")
        # Grafana puts `account_id, region` in for $by.
        return f"sum by ($by) ({recorded('avg')} * {count}) / sum by ($by) ({count})"
    operation = "sum" if one.as_sum else operations[0]
    joined = f"{operation} by ($by) ({recorded(operation)})"
    return f"{joined} / {service.profile.period_s}" if stat == "Sum" else joined


def _stand_out(service: _Service, metric: MetricProfile, one: Shown) -> Panel:
    profile, stat = service.profile, one.stats[0]
    grain = grain_of(profile, metric.name)
    if grain is None or not grain.has:
        raise KeyError(f"{profile.service} {metric.name}: what its resources are called is not known")
    labels = [dimension_label("yace", name, service.snake_case) for name in grain.has]
    matchers = [f'{label}!=""' for label in labels]
    matchers += [f'{dimension_label("yace", name, service.snake_case)}=""' for name in grain.has_not]
    series = (
        f"{metric_name('yace', profile.namespace, metric.name, stat)}{{{','.join([*matchers, _CHOSEN])}}}"
    )
    if stat == "Sum":
        when = f"[{spoken(profile.period_s)}] offset {spoken(service.delay.latest_s)}"
        newest = f"last_over_time({series}{when}) / {profile.period_s}"
    else:
        newest = f"last_over_time({series}[{spoken(service.delay.newest_s)}])"
    pick, join = ("topk", "max") if one.worst == "highest" else ("bottomk", "min")
    by = ", ".join(["account_id", "region", *labels])
    legend = " ".join(f"{{{{{label}}}}}" for label in [*labels, "account_id", "region"])
    return Panel(
        f"{one.title}: {one.worst}",
        f"The {WORST} with the {one.worst} {metric.name} ({stat.lower()}), by their newest point.",
        (Query(f"{pick}({WORST}, {join} by ({by}) ({newest}))", legend),),
        _unit(metric, one),
        "bargauge",
        steps=one.steps,
        highest=100 if metric.unit == "Percent" else None,
    )


def _unit(metric: MetricProfile, one: Shown) -> str:
    if one.unit:
        return one.unit
    if one.stats[0] == "Sum":
        return _PER_SECOND.get(metric.unit, "cps")
    return _UNITS.get(metric.unit, "short")
