"""Cost and Usage Reports as AWS writes them, in both of their shapes, made from what the simulated AWS says it would bill."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

OLD = {
    "id": "identity/LineItemId",
    "invoice": "bill/InvoiceId",
    "kind": "lineItem/LineItemType",
    "start": "lineItem/UsageStartDate",
    "end": "lineItem/UsageEndDate",
    "account": "lineItem/UsageAccountId",
    "usage_type": "lineItem/UsageType",
    "operation": "lineItem/Operation",
    "amount": "lineItem/UsageAmount",
    "currency": "lineItem/CurrencyCode",
    "rate": "lineItem/UnblendedRate",
    "usd": "lineItem/UnblendedCost",
    "description": "lineItem/LineItemDescription",
}
NEW = {
    "id": "identity_line_item_id",
    "invoice": "bill_invoice_id",
    "kind": "line_item_line_item_type",
    "start": "line_item_usage_start_date",
    "end": "line_item_usage_end_date",
    "account": "line_item_usage_account_id",
    "usage_type": "line_item_usage_type",
    "operation": "line_item_operation",
    "amount": "line_item_usage_amount",
    "currency": "line_item_currency_code",
    "rate": "line_item_unblended_rate",
    "usd": "line_item_unblended_cost",
    "description": "line_item_line_item_description",
}


@dataclass(frozen=True)
class Line:
    account: str
    start: datetime
    usage_type: str
    operation: str
    amount: str
    usd: str
    kind: str = "Usage"
    currency: str = "USD"
    rate: str = "0.00001"
    hours: int = 1
    id: str = ""

    def row(self) -> dict[str, str]:
        end = self.start + timedelta(hours=self.hours)
        times = {"start": f"{self.start:%Y-%m-%dT%H:%M:%SZ}", "end": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
        named = ("account", "usage_type", "operation", "amount", "usd", "kind", "currency", "rate", "id")
        return (
            {key: getattr(self, key) for key in named}
            | times
            | {"invoice": "", "description": self.operation}
        )


def metrics(account: str, start: datetime, amount: int, *, prefix: str = "EUW1-", **more: Any) -> Line:
    """GetMetricData of one hour."""
    return Line(
        account,
        start,
        f"{prefix}CW:GMD-Metrics",
        "GetMetricData",
        str(amount),
        f"{amount / 100_000:.10f}",
        **more,
    )


def requests(account: str, start: datetime, amount: int, operation: str = "ListMetrics", **more: Any) -> Line:
    return Line(account, start, "EUW1-CW:Requests", operation, str(amount), "0", rate="0", **more)


def report(lines: Iterable[Line], columns: dict[str, str] = OLD) -> str:
    """The report's text, with a line of EC2 between any two."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns.values())
    writer.writeheader()
    for line in lines:
        writer.writerow({columns[key]: value for key, value in line.row().items()})
        ec2 = Line(line.account, line.start, "EUW1-BoxUsage:m5.large", "RunInstances", "1", "0.107")
        writer.writerow({columns[key]: value for key, value in ec2.row().items()})
    return text.getvalue()


def at(day: int, hour: int = 0) -> datetime:
    return datetime(2026, 11, day, hour, tzinfo=UTC)
