"""What the tests of the simulated AWS share: a small world, requests as bodies, AWS's own client, and requests by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import ClientError

from ingest.clock import Clock, ManualClock
from shard_config.model import MetricProfile, ServiceProfile
from workers import simulator
from workers.simulated.cloudwatch import get_metric_data
from workers.simulated.requests import AwsError, parse_data_request
from workers.simulator import Simulator
from workers.world import Metric, Truth, World, account_ids

ACCOUNTS = account_ids(2)
FIRST, SECOND = ACCOUNTS
REGION = "eu-west-1"
NOW_S = 1_800_000_000
DAY_S = 86_400
EC2 = ServiceProfile(
    service="ec2",
    namespace="AWS/EC2",
    metrics=(
        MetricProfile(name="CPUUtilization", unit="Percent", min=0, max=100),
        MetricProfile(name="NetworkIn", unit="Bytes", min=0),
    ),
)
SQS = ServiceProfile(service="sqs", namespace="AWS/SQS", metrics=(MetricProfile(name="Sent", unit="Count"),))
TRUTH = World(1, ACCOUNTS, (REGION, "us-east-1"), 1200, (EC2, SQS))
METRICS = TRUTH.metrics(FIRST, REGION)
SESSION = get_session()
STEADY = METRICS[2]
"""One that has no gaps."""


def on_wire(metric: Metric) -> dict[str, Any]:
    return {
        "Namespace": metric.namespace,
        "MetricName": metric.name,
        "Dimensions": [{"Name": k, "Value": v} for k, v in metric.dimensions],
    }


def query(n: int, metric: Metric, stat: str = "Average", period_s: int = 60, **more: Any) -> dict[str, Any]:
    return {"Id": f"q{n}", "MetricStat": {"Metric": on_wire(metric), "Period": period_s, "Stat": stat}} | more


def body_of(
    queries: Sequence[dict[str, Any]], start_s: int = NOW_S - 300, end_s: int = NOW_S, **more: Any
) -> dict[str, Any]:
    return {"MetricDataQueries": list(queries), "StartTime": start_s, "EndTime": end_s} | more


def ask(body: dict[str, Any], now_s: int = NOW_S, truth: Truth = TRUTH) -> tuple[list[dict[str, Any]], str]:
    page = get_metric_data(truth, FIRST, REGION, parse_data_request(body), now_s)
    return page.items, page.next_token


def all_pages(body: dict[str, Any], now_s: int = NOW_S) -> list[list[dict[str, Any]]]:
    pages, token = [], ""
    for _ in range(100):
        items, token = ask(body | ({"NextToken": token} if token else {}), now_s)
        pages.append(items)
        if not token:
            return pages
    raise AssertionError("the pages do not end")


def refusal(body: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(AwsError) as refused:
        ask(body)
    return refused.value.query_code, refused.value.message


@asynccontextmanager
async def running(truth: Truth = TRUTH, clock: Clock | None = None, **more: Any) -> AsyncIterator[Simulator]:
    running = await simulator.start(truth, clock=clock or ManualClock(NOW_S), **more)
    try:
        yield running
    finally:
        await running.close()


@asynccontextmanager
async def client(sim: Simulator, service: str = "cloudwatch", **credentials: str) -> AsyncIterator[Any]:
    credentials = credentials or {"aws_access_key_id": f"AKIA{FIRST}", "aws_secret_access_key": "secret"}
    async with SESSION.create_client(
        service,
        endpoint_url=sim.url,
        region_name=REGION,
        config=AioConfig(retries={"total_max_attempts": 1}),
        **credentials,
    ) as made:
        yield made


async def assume(sim: Simulator, account: str = SECOND, **more: Any) -> dict[str, str]:
    async with client(sim, "sts") as sts:
        answer = await sts.assume_role(
            RoleArn=f"arn:aws:iam::{account}:role/path/Headgate", RoleSessionName="headgate", **more
        )
    given = answer["Credentials"]
    return {
        "aws_access_key_id": given["AccessKeyId"],
        "aws_secret_access_key": given["SecretAccessKey"],
        "aws_session_token": given["SessionToken"],
    }


def asked(count: int = 3) -> dict[str, Any]:
    body = body_of([query(n, m) for n, m in enumerate(METRICS[1 : count + 1])])
    return body | {k: datetime.fromtimestamp(body[k], UTC) for k in ("StartTime", "EndTime")}


def code_of(error: pytest.ExceptionInfo[ClientError]) -> tuple[int, str]:
    answer = error.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def headers(account: str = FIRST) -> dict[str, str]:
    scope = f"AKIA{account}/20270115/{REGION}/monitoring/aws4_request"
    return {"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"}


GET_METRIC_DATA = {"X-Amz-Target": "GraniteServiceVersion20100801.GetMetricData"}
