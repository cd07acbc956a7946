"""Resource tags: tag:GetResources, all pages or an error.

Its quota is its own (per account and region), and asking costs nothing.
"""

from __future__ import annotations

from typing import Any

from ingest.errors import Rejected, Transient
from ingest.model import Target
from ingest.sources.aws import Access, Aws, Tally
from ingest.sources.aws_errors import Denied
from ingest.sources.selection import Tagged
from shard_config.model import Account, Resources

API = "GetResources"
CALLS_PER_S = 5.0
"""A third of what AWS allows, for other programs of the account ask too."""
PAGE = 100
PAGES_MAX = 2_000
"""200,000 resources of one service in one account and region."""


def _page(answer: Any, where: str) -> tuple[list[Tagged], str]:
    """The resources on one page, and the next page's token. Raises Transient where the page is cut off."""
    if not isinstance(answer, dict) or not isinstance(answer.get("ResourceTagMappingList"), list):
        raise Transient(where, "a page without a list of resources")
    found: list[Tagged] = [
        (one["ResourceARN"], {tag["Key"]: tag["Value"] for tag in one.get("Tags") or ()})
        for one in answer["ResourceTagMappingList"]
    ]
    return found, answer.get("PaginationToken") or ""


async def tagged_resources(
    aws: Aws,
    account: Account,
    target: Target,
    resources: Resources,
    keys: tuple[str, ...],
    deadline_s: float,
    tally: Tally,
    remedy: str = "grant tag:GetResources to the role, or take `tags` out of the service's `only`",
) -> list[Tagged]:
    """The tagged resources of these types that have all of `keys`.

    Raises Transient, Denied (with the permission to grant) or Rejected; never a part of them.
    """
    where = f"aws {API} {target} {'+'.join(resources.types)}"
    params: dict[str, Any] = {"ResourceTypeFilters": list(resources.types), "ResourcesPerPage": PAGE}
    if keys:
        params["TagFilters"] = [{"Key": key} for key in keys]

    async def send(access: Access) -> tuple[list[Tagged], str]:
        async with aws.client("resourcegroupstaggingapi", access) as client:
            return _page(await client.get_resources(**params), where)

    found: list[Tagged] = []
    tokens: set[str] = set()
    for _ in range(PAGES_MAX):
        try:
            page, token = await aws.call(
                account, target.region, API, send, cost_s=1 / CALLS_PER_S, deadline_s=deadline_s, tally=tally
            )
        except Denied as denied:
            raise Denied(denied.where, f"{remedy}: {denied.said}") from denied
        found += page
        if not token:
            return found
        if token in tokens:
            raise Transient(where, "the same PaginationToken came twice")
        tokens.add(token)
        params["PaginationToken"] = token
    raise Rejected(where, "too_many", f"more than {PAGES_MAX * PAGE:,} tagged resources: name fewer types")
