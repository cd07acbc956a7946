"""The faults of tests/test_bad_input.py, and what a look in each must come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ingest.model import (
    LookStatus,
    Target,
)
from shard_config.model import (
    MetricProfile,
    Resources,
    Selection,
    ServiceProfile,
)
from workers.simulated.faults import Faults
from workers.world import account_ids

STRUCK, SPARED = account_ids(2)
METRICS: Final = 60
"""Of each target: a listing has two pages, and a look two calls, for here both end at fifty (`quick`)."""
BAD = Target("cloudwatch", STRUCK, "eu-west-1")
GOOD = Target("cloudwatch", SPARED, "us-east-1")
SQS = ServiceProfile(
    service="sqs",
    namespace="AWS/SQS",
    metrics=(MetricProfile(name="Sent", unit="Count", statistics=("Sum",)),),
)
TAGGED = SQS.model_copy(
    update={
        "only": (Selection(tags={"env": "prod"}),),
        "resources": Resources(types=("sqs",), arns=(r"sqs:[^:]+:\d+:(?P<QueueName>.+)$",)),
    }
)
ATTEMPTS, ROUNDS = 4, 3
DEADLINE_S: Final = 6.0
READ_TIMEOUT_S: Final = 0.3
PAGES_MAX: Final = 12
COMPLETE, PARTIAL = LookStatus.COMPLETE, LookStatus.PARTIAL
FORBIDDEN, FAILED = LookStatus.FORBIDDEN, LookStatus.FAILED


@dataclass(frozen=True)
class Mode:
    """A fault of the struck account, and what a look in it must come to."""

    name: str
    faults: dict[str, Any]
    status: LookStatus
    words: tuple[str, ...] = ()
    calls_max: dict[str, int] = field(default_factory=dict)
    """By API; those that are not named: as many as a faultless look makes."""
    listed_before: bool = True
    """Whether the listing is there already when the fault begins."""
    listing_due: bool = False
    """Whether the fault begins when that listing is to be renewed."""
    profile: ServiceProfile = SQS

    @property
    def all_faults(self) -> Faults:
        faults: dict[str, Any] = {"only_accounts": (STRUCK,), "seed": 5}
        return Faults(**(faults | self.faults))


def asking(name: str, faults: dict[str, Any], words: str) -> list[Mode]:
    """A fault of whole calls: when the metrics are listed first, and when they are asked for."""
    return [
        Mode(
            f"{name}, listing",
            faults,
            FAILED,
            ("ListMetrics", words),
            {"ListMetrics": ATTEMPTS, "GetMetricData": 0},
            listed_before=False,
        ),
        Mode(
            name,
            faults,
            FAILED,
            ("GetMetricData", words, "60 of 60 queries have no whole answer"),
            {"GetMetricData": 2 * ATTEMPTS},
        ),
    ]


MODES: Final[Sequence[Mode]] = [
    *asking("a throttle storm", {"throttle_share": 1.0}, "ThrottlingException: Rate exceeded"),
    *asking("5xx", {"error_share": 1.0}, "InternalServiceError"),
    *asking("503 in HTML", {"unavailable_share": 1.0}, "503"),
    *asking("resets", {"reset_share": 1.0}, "Connection"),
    *asking("slow answers", {"slow_share": 1.0, "slow_ms": 700}, "timeout"),
    *asking("truncated answers", {"truncated_share": 1.0}, "Connection was closed"),
    *asking("malformed answers", {"malformed_share": 1.0}, "not JSON"),
    Mode(
        "a NextToken that loops in a listing",
        {"token_loop_share": 1.0},
        FAILED,
        ("ListMetrics", "the same NextToken came twice"),
        {"ListMetrics": 2, "GetMetricData": 0},
        listed_before=False,
    ),
    Mode(
        "a listing without end",
        {"token_endless_share": 1.0},
        FAILED,
        ("ListMetrics", f"more than {PAGES_MAX} pages"),
        {"ListMetrics": PAGES_MAX, "GetMetricData": 0},
        listed_before=False,
    ),
    Mode(
        "a NextToken that loops",
        {"token_loop_share": 1.0, "page_points_max": 200},
        PARTIAL,
        ("the same NextToken came twice",),
        {"GetMetricData": 4},
    ),
    Mode(
        "pages without end",
        {"token_endless_share": 1.0, "page_points_max": 200},
        PARTIAL,
        ("GetMetricData", "has more points after it was Complete"),
        {"GetMetricData": 6},
    ),
    Mode("timestamps twice, Ids shuffled", {"repeat_share": 0.5, "shuffle_ids": True}, COMPLETE),
    Mode(
        "Ids that are missing",
        {"missing_id_share": 0.7},
        PARTIAL,
        ("queries have no whole answer: ", " absent"),
        {"GetMetricData": 2 * ROUNDS},
    ),
    Mode("PartialData once", {"partial_share": 0.5}, COMPLETE, (), {"GetMetricData": 2 * 2}),
    Mode(
        "InternalError",
        {"internal_error_share": 0.7},
        PARTIAL,
        ("queries have no whole answer: ", " InternalError"),
        {"GetMetricData": 2 * ROUNDS},
    ),
    Mode("some metrics forbidden", {"forbidden_share": 0.3}, PARTIAL, ("of 60 queries are forbidden",)),
    Mode("all metrics forbidden", {"forbidden_share": 1.0}, FORBIDDEN, ("60 of 60 queries are forbidden",)),
    Mode(
        "a Message with a partly executed call",
        {"allowed_metrics_max": 10},
        PARTIAL,
        ("CloudWatch says MaxMetricsExceeded: Maximum number of allowed metrics exceeded", "20 of 60"),
        {"GetMetricData": ROUNDS + 1},
    ),
    Mode(
        "credentials that expire amid a look", {"expire_after_calls": 1}, COMPLETE, (), {"GetMetricData": 4}
    ),
    Mode(
        "credentials that are refused as expired for good",
        {"expired_accounts": (STRUCK,)},
        FORBIDDEN,
        ("new credentials are refused as expired", "ExpiredToken"),
        {"GetMetricData": 4},
    ),
    Mode(
        "a role that is denied",
        {"denied_roles": (STRUCK,)},
        FORBIDDEN,
        ("AssumeRole", "AccessDenied", f"arn:aws:iam::{STRUCK}:role/Headgate"),
        {"ListMetrics": 0, "GetMetricData": 0},
        listed_before=False,
    ),
    Mode(
        "an account that is denied",
        {"forbidden_accounts": (STRUCK,)},
        FORBIDDEN,
        ("cloudwatch:GetMetricData", "AccessDenied"),
    ),
    Mode(
        "ListMetrics denied, GetMetricData allowed",
        {"denied_actions": ("cloudwatch:ListMetrics",)},
        FORBIDDEN,
        ("cloudwatch:ListMetrics", "AccessDenied"),
        {"ListMetrics": 1, "GetMetricData": 0},
        listed_before=False,
    ),
    Mode(
        "ListMetrics denied when it is due again",
        {"denied_actions": ("cloudwatch:ListMetrics",)},
        COMPLETE,
        ("discovery is", "cloudwatch:ListMetrics"),
        {"ListMetrics": 1},
        listing_due=True,
    ),
    Mode(
        "a region that is not enabled",
        {"disabled_regions": (BAD.region,)},
        FORBIDDEN,
        ("not activated in eu-west-1",),
        {"ListMetrics": 0, "GetMetricData": 0},
        listed_before=False,
    ),
    Mode(
        "a region that is disabled later",
        {"disabled_regions": (BAD.region,)},
        FORBIDDEN,
        ("InvalidClientTokenId", "the region is not enabled in this account"),
    ),
    Mode(
        "tags that may not be read",
        {"denied_actions": ("tag:GetResources",)},
        FORBIDDEN,
        ("grant tag:GetResources",),
        {"ListMetrics": 0, "GetMetricData": 0, "GetResources": 1},
        listed_before=False,
        profile=TAGGED,
    ),
    Mode(
        "a million metrics more",
        {"flood_metrics": 1_000_000},
        FAILED,
        ("ListMetrics", f"more than {PAGES_MAX} pages"),
        {"ListMetrics": PAGES_MAX, "GetMetricData": 0},
        listed_before=False,
    ),
    Mode(
        "a hundred dimensions of 10,000 characters",
        {"wild_metrics": 12},
        COMPLETE,
        (),
        {"ListMetrics": 2},
        listed_before=False,
    ),
]
