"""tag:GetResources of the simulated AWS: resources by type and by tag, those that were never tagged left out. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from workers.simulated.paging import page_of
from workers.simulated.requests import AwsError
from workers.simulated.resources import Resource

TARGET: Final = "ResourceGroupsTaggingAPI_20170126"
_PAGE_MAX: Final = 100
_PAGE: Final = 50


def get_resources(resources: Sequence[Resource], body: Mapping[str, Any]) -> dict[str, Any]:
    """One page of GetResources over a target's resources. Raises AwsError for what AWS would refuse."""
    try:
        types = [str(wanted) for wanted in body.get("ResourceTypeFilters") or ()]
        tags = [(str(f["Key"]), frozenset(f.get("Values") or ())) for f in body.get("TagFilters") or ()]
        size = int(body.get("ResourcesPerPage") or _PAGE)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise AwsError("SerializationException", f"the body is not a GetResources request: {e!r}") from e
    if not 1 <= size <= _PAGE_MAX:
        raise _refused(f"ResourcesPerPage must be between 1 and {_PAGE_MAX}")
    if len(types) > 100 or len(tags) > 50:
        raise _refused("at most 100 ResourceTypeFilters and 50 TagFilters")
    found = [
        r
        for r in resources
        if r.tags
        and (not types or any(_is_of(r.arn, t) for t in types))
        and all(key in r.tags and (not values or r.tags[key] in values) for key, values in tags)
    ]
    page, token = page_of(found, size, str(body.get("PaginationToken") or ""), repr((types, tags)), _refused)
    return {
        "PaginationToken": token,
        "ResourceTagMappingList": [
            {"ResourceARN": r.arn, "Tags": [{"Key": k, "Value": v} for k, v in r.tags.items()]} for r in page
        ],
    }


def _is_of(arn: str, wanted: str) -> bool:
    """Whether an ARN is of a type, as `ec2:instance`, `elasticloadbalancing:loadbalancer/app` or `s3`."""
    service, _, kind = wanted.partition(":")
    of, _, rest = arn.split(":", 2)[2].partition(":")
    resource = rest.split(":", 2)[2].lstrip("/")
    return of == service and (
        not kind or (resource[: len(kind)] == kind and resource[len(kind) :][:1] in ("/", ":"))
    )


def _refused(message: str) -> AwsError:
    return AwsError("InvalidParameterException", message)
