"""AWS Organizations of the simulated AWS: a tree of units with the truth's accounts in it. Pure but for `add`.

* The tree is a function of the seed and of the accounts in their order: a root, `Workloads` with `Prod` and `Dev` below it,
  `Platform` and `Sandbox`. The first account manages the organization and stands in the root.
* Accounts have tags `env` (prod or dev) and `team`, but one in ten has none.
* For each fifty accounts, or part of them, there is one more that is suspended: it has no metrics, and nobody can assume a role in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from workers.simulated.paging import page_of
from workers.simulated.requests import AwsError
from workers.simulated.resources import TEAMS

TARGET: Final = "AWSOrganizationsV20161128"
_PAGE_MAX: Final = 20
_FOUNDED_S: Final = 1_600_000_000
_UNITS: Final = (
    ("Workloads", ""),
    ("Platform", ""),
    ("Sandbox", ""),
    ("Prod", "Workloads"),
    ("Dev", "Workloads"),
)
"""Name, and the unit that it is in."""
_PLACES: Final = ("Prod", "Dev", "Prod", "Platform", "Prod", "Sandbox", "Dev")
"""Accounts are dealt out to units in this order."""


@dataclass(frozen=True, slots=True)
class Member:
    """An account of the organization; `parent` is its unit's or the root's id."""

    id: str
    parent: str
    tags: Mapping[str, str]
    suspended: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    id: str
    name: str
    parent: str


class Organization:
    """The organization of these accounts."""

    def __init__(self, seed: int, accounts: Sequence[str]) -> None:
        self._seed = seed
        self._id = f"o-{self._text('organization', 10)}"
        self._manager = accounts[0]
        stem = self._text("root", 4)
        self.root = f"r-{stem}"
        ids = {name: f"ou-{stem}-{self._text(name, 8)}" for name, _ in _UNITS}
        self.units = tuple(Unit(ids[name], name, ids.get(above, self.root)) for name, above in _UNITS)
        self._by_name = {unit.name: unit for unit in self.units}
        self.members: dict[str, Member] = {}
        for account in accounts:
            self.add(account)
        for n in range(-(-len(accounts) // 50)):
            account = str(900_000_000_001 + n)
            self.members[account] = Member(
                account, self._by_name["Sandbox"].id, {"env": "dev"}, suspended=True
            )

    def add(self, account: str, unit: str = "", tags: Mapping[str, str] | None = None) -> Member:
        """One more account, in a unit by id or name and with tags, or where its number puts it. Raises ValueError for an unknown unit."""
        n = len(self.members)
        name = _PLACES[(n + self._seed) % len(_PLACES)]
        places = {key: u.id for u in self.units for key in (u.id, u.name)} | {self.root: self.root}
        if unit and unit not in places:
            raise ValueError(f"no unit {unit!r}; there are {', '.join(places)}")
        if tags is None:
            env = "dev" if name in ("Dev", "Sandbox") else "prod"
            tags = {} if n % 10 == 9 else {"env": env, "team": TEAMS[(n + self._seed) % len(TEAMS)]}
        parent = places[unit] if unit else places[name] if n else self.root
        member = self.members[account] = Member(account, parent, dict(tags))
        return member

    def answer(self, caller: str, operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What Organizations answers to an account. Raises AwsError, for all but the managing account too."""
        if operation == "DescribeOrganization":
            return {"Organization": self._description()}
        operations: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "ListRoots": self._roots,
            "ListOrganizationalUnitsForParent": self._units_of,
            "ListAccounts": self._accounts,
            "ListAccountsForParent": self._accounts_of,
            "ListTagsForResource": self._tags_of,
        }
        if operation not in operations:
            raise AwsError("UnknownOperationException", f"{operation} is not simulated")
        if caller != self._manager:
            raise AwsError("AccessDeniedException", "You don't have permissions to access this resource.")
        return operations[operation](body)

    # --- operations ---

    def _description(self) -> dict[str, Any]:
        return {
            "Id": self._id,
            "Arn": f"arn:aws:organizations::{self._manager}:organization/{self._id}",
            "FeatureSet": "ALL",
            "MasterAccountId": self._manager,
            "MasterAccountArn": self._arn("account", self._manager),
            "MasterAccountEmail": f"aws+{self._manager}@example.com",
        }

    def _roots(self, body: Mapping[str, Any]) -> dict[str, Any]:
        root = {"Id": self.root, "Arn": self._arn("root", self.root), "Name": "Root", "PolicyTypes": []}
        return _page("Roots", [root], body)

    def _units_of(self, body: Mapping[str, Any]) -> dict[str, Any]:
        parent = self._parent(body)
        of = [
            {"Id": u.id, "Arn": self._arn("ou", u.id), "Name": u.name}
            for u in self.units
            if u.parent == parent
        ]
        return _page("OrganizationalUnits", of, body)

    def _accounts(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return _page("Accounts", [self._account(m) for m in self.members.values()], body)

    def _accounts_of(self, body: Mapping[str, Any]) -> dict[str, Any]:
        parent = self._parent(body)
        return _page(
            "Accounts", [self._account(m) for m in self.members.values() if m.parent == parent], body
        )

    def _tags_of(self, body: Mapping[str, Any]) -> dict[str, Any]:
        named = str(body.get("ResourceId") or "")
        member = self.members.get(named)
        if member is None and named != self.root and all(u.id != named for u in self.units):
            raise AwsError("TargetNotFoundException", f"there is no {named!r} in this organization")
        tags = member.tags if member else {}
        return _page("Tags", [{"Key": k, "Value": v} for k, v in tags.items()], body)

    # --- parts ---

    def _account(self, member: Member) -> dict[str, Any]:
        state = "SUSPENDED" if member.suspended else "ACTIVE"
        return {
            "Id": member.id,
            "Arn": self._arn("account", member.id),
            "Email": f"aws+{member.id}@example.com",
            "Name": f"account-{member.id}",
            "Status": state,
            "State": state,
            "JoinedMethod": "CREATED",
            "JoinedTimestamp": _FOUNDED_S,
        }

    def _parent(self, body: Mapping[str, Any]) -> str:
        named = str(body.get("ParentId") or "")
        if named != self.root and all(u.id != named for u in self.units):
            raise AwsError("ParentNotFoundException", f"there is no {named!r} in this organization")
        return named

    def _arn(self, kind: str, named: str) -> str:
        return f"arn:aws:organizations::{self._manager}:{kind}/{self._id}/{named}"

    def _text(self, what: str, length: int) -> str:
        return blake2b(f"{self._seed} {what}".encode(), digest_size=8).hexdigest()[:length]


def _page(name: str, items: Sequence[dict[str, Any]], body: Mapping[str, Any]) -> dict[str, Any]:
    size = body.get("MaxResults") or _PAGE_MAX
    if not isinstance(size, int) or not 1 <= size <= _PAGE_MAX:
        raise _refused(f"MaxResults must be between 1 and {_PAGE_MAX}")
    request = repr([name, body.get("ParentId"), body.get("ResourceId")])
    page, token = page_of(items, size, str(body.get("NextToken") or ""), request, _refused)
    return {name: list(page)} | ({"NextToken": token} if token else {})


def _refused(message: str) -> AwsError:
    return AwsError("InvalidInputException", message)
