"""Grafana's dashboards as JSON, of the few things that ours are made of. Pure.

Guarantees: ids are unique and stable, panels lie side by side within 24 columns and never overlap, each panel asks the data source that is chosen
above, and each has a description. The schema is that of Grafana 12 (`SCHEMA_VERSION`); older ones from 10 on read it as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

SCHEMA_VERSION: Final = 41
COLUMNS: Final = 24
SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
TAG: Final = "headgate"


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` in Grafana's form, as {{topic}}."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is one of Grafana's; `steps` are thresholds: from which value on in which colour, above green."""

    title: str
    what: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "bargauge", "table"] = "timeseries"
    width: int = 8
    height: int = 7
    steps: tuple[tuple[float, str], ...] = ()
    stacked: bool = False
    highest: float | None = None
    """Of the axis, where it is known."""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """One that is chosen above: what `label_values` gives for `of`, or one of `choices`."""

    name: str
    label: str
    of: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    what: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = ()
    span: str = "6h"
    refresh: str = "1m"


def made(board: Dashboard) -> dict[str, Any]:
    """Fit for JSON, and for Grafana's import and provisioning."""
    return {
        "id": None,
        "uid": board.uid,
        "title": board.title,
        "description": board.what,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "utc",
        "time": {"from": f"now-{board.span}", "to": "now"},
        "refresh": board.refresh,
        "annotations": {"list": []},
        "links": [_links()],
        "templating": {"list": [_datasource(), *map(_variable, board.variables)]},
        "panels": list(_placed(board.rows)),
    }


def _links() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "title": "Headgate",
        "tags": [TAG],
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "icon": "external link",
        "tooltip": "",
        "url": "",
    }


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "regex": "", "hide": 0, "refresh": 1,
        "includeAll": False, "multi": False, "options": [], "current": {},
    }  # fmt: skip


def _variable(variable: Variable) -> dict[str, Any]:
    if variable.choices:
        options = [{"text": c, "value": c, "selected": c == variable.choices[0]} for c in variable.choices]
        return {
            "name": variable.name, "label": variable.label, "type": "custom", "query": ",".join(c.replace(",", "\\,") for c in variable.choices), "hide": 0, "includeAll": False, "multi": False, "options": options, "current": options[0],
        }  # fmt: skip
    asked = f"label_values({variable.of}, {variable.name})"
    everything = {"text": "All", "value": "$__all", "selected": True}
    return {
        "name": variable.name, "label": variable.label, "type": "query", "datasource": SOURCE, "definition": asked,
        "query": {"query": asked, "refId": variable.name, "qryType": 1}, "regex": "", "sort": 1, "refresh": 2, "hide": 0,
        "includeAll": True, "allValue": ".*", "multi": True, "options": [], "current": everything,
    }  # fmt: skip


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Row after row, panels from left to right, a new line where one does not fit."""
    number, y = 1, 0
    for row in rows:
        at = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": at,
            "panels": [],
        }
        number, y, x, tallest = number + 1, y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            place = {"h": panel.height, "w": panel.width, "x": x, "y": y}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            number, x, tallest = number + 1, x + panel.width, max(tallest, panel.height)
        y += tallest


def _panel(panel: Panel) -> dict[str, Any]:
    graph = panel.kind == "timeseries"
    steps = [{"color": "green", "value": None}, *({"color": c, "value": v} for v, c in panel.steps)]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "palette-classic" if graph else "thresholds"},
    }
    if panel.highest is not None:
        defaults |= {"min": 0, "max": panel.highest}
    if graph:
        # Points that come late leave no line across what is not there.
        defaults["custom"] = {
            "drawStyle": "line", "lineWidth": 1, "fillOpacity": 30 if panel.stacked else 0, "showPoints": "never", "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.steps else "off"},
        }  # fmt: skip
    targets = [
        {
            "refId": chr(ord("A") + i), "expr": q.expr, "legendFormat": q.legend or "__auto", "datasource": SOURCE, "editorMode": "code",
            "range": graph, "instant": not graph, **({"format": "table"} if panel.kind == "table" else {}),
        }
        for i, q in enumerate(panel.queries)
    ]  # fmt: skip
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.what,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": targets,
        "transformations": [_WITHOUT_TIME] if panel.kind == "table" else [],
    }


_REDUCED: Final = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": _REDUCED, "colorMode": "value", "graphMode": "none", "justifyMode": "auto", "textMode": "auto", "orientation": "auto",
    },
    "bargauge": {"reduceOptions": _REDUCED, "orientation": "horizontal", "displayMode": "gradient", "showUnfilled": True},
    "table": {"showHeader": True, "cellHeight": "sm"},
}  # fmt: skip
_WITHOUT_TIME: Final = {
    "id": "organize",
    "options": {"excludeByName": {"Time": True, "__name__": True}, "indexByName": {}, "renameByName": {}},
}
