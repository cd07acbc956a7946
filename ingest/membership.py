"""The exporters' group as Kafka has it: our assignor, a look at who is a member, and how one is removed.

* Whoever leads the group gives each slot to the owner that `ingest.assign.owners_of` says, from the newest assignment that any member has
  brought along or that it has read itself. It tells all which epoch that was.
* What a member says of itself is not trusted to be readable: one that cannot be read gets slots by its member id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Int16, Int32, Schema, String

from ingest.assign import Assignment, Member, decode_member, encode_member, newest, owners_of
from ingest.errors import Rejected, Transient


class ShardAssignor(AbstractPartitionAssignor):  # type: ignore[misc]
    """One member's side of the assignment. aiokafka is given the object, not the class: each has a shard and a topic's copy of its own."""

    name = "headgate"
    """Of the protocol: all members of the group have this one."""

    def __init__(self, shard: str, published: Callable[[], Assignment | None]) -> None:
        self._shard = shard
        self._published = published
        self.given: tuple[int, ...] | None = None
        """The slots that this shard has; None while it joins."""
        self.epoch = 0
        """Of the assignment that was followed when they were given."""
        self._behind = False

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """Called at each join."""
        self.given = None
        published = self._published()
        member = Member(self._shard, published.epoch if published else 0, published)
        return ConsumerProtocolMemberMetadata(0, list(topics), encode_member(member))

    def assign(
        self, cluster: Any, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """Called on the leader."""
        known = {member_id: _member(member_id, found.user_data) for member_id, found in members.items()}
        published = newest(known.values(), self._published())
        epoch = published.epoch if published else 0
        self._behind = any(member.epoch > epoch for member in known.values())
        # Of two with one name the first has its slots; Kafka sees to it that there are none.
        by_shard = {member.shard: member_id for member_id, member in sorted(known.items(), reverse=True)}
        given: dict[str, dict[str, list[int]]] = {member_id: {} for member_id in members}
        for topic in sorted({topic for found in members.values() for topic in found.subscription}):
            slots = sorted(cluster.partitions_for_topic(topic) or ())
            for slot, shard in zip(slots, owners_of(published, by_shard, len(slots)), strict=True):
                given[by_shard[shard]].setdefault(topic, []).append(slot)
        used = str(epoch).encode()
        return {
            member_id: ConsumerProtocolMemberAssignment(0, sorted(topics.items()), used)
            for member_id, topics in given.items()
        }

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Called on every member."""
        self.epoch = int(assignment.user_data or b"0")
        self.given = tuple(sorted(tp.partition for tp in assignment.partitions()))

    def differs(self, published: Assignment) -> bool:
        """Whether joining again would bring this published assignment closer: it is newer than the one followed, and says something else."""
        if self.given is None or published.epoch <= self.epoch:
            return False
        return self._behind or list(self.given) != published.slots_of(self._shard)


def _member(member_id: str, user_data: bytes) -> Member:
    try:
        return decode_member(user_data or b"")
    except Rejected:
        return Member(member_id)


# --- who is there ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupLook:
    """A group as its coordinator sees it. `members` own partitions, by client id; `epoch` is the newest that one of them has seen."""

    stable: bool
    members: Mapping[str, tuple[int, ...]]
    hosts: Mapping[str, str]
    epoch: int = 0


async def look_at_group(admin: AIOKafkaAdminClient, group: str) -> GroupLook:
    """One look. Raises KafkaError, OSError."""
    # One group at a time: of an answer about two aiokafka 0.14 misreads the second, and closes the connection.
    [answer] = await admin.describe_consumer_groups([group])
    [(error_code, _name, state, _kind, _protocol, members, *_)] = answer.groups
    if error_code:
        raise for_code(error_code)(f"group {group}")
    owned: dict[str, tuple[int, ...]] = {}
    hosts: dict[str, str] = {}
    epoch = 0
    for _member_id, client_id, host, metadata, assignment in (m[-5:] for m in members):
        given = ConsumerProtocolMemberAssignment.decode(assignment).partitions() if assignment else []
        owned[client_id] = tuple(sorted(tp.partition for tp in given))
        hosts[client_id] = host.lstrip("/")
        if metadata:
            told = ConsumerProtocolMemberMetadata.decode(metadata).user_data
            epoch = max(epoch, _member(client_id, told).epoch)
    return GroupLook(state == "Stable", owned, hosts, epoch)


# --- leaving --------------------------------------------------------------------------------------------------


class _LeaveAnswer(Response):  # type: ignore[misc]
    API_KEY = 13
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        (
            "members",
            Array(
                ("member_id", String("utf-8")),
                ("group_instance_id", String("utf-8")),
                ("error_code", Int16),
            ),
        ),
    )


class _LeaveRequest(RequestStruct):  # type: ignore[misc]
    API_KEY = 13
    API_VERSION = 3
    RESPONSE_TYPE = _LeaveAnswer
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("members", Array(("member_id", String("utf-8")), ("group_instance_id", String("utf-8")))),
    )


class _LeaveGroup(Request[_LeaveRequest]):  # type: ignore[misc]
    """KIP-345's, which names static members by their instance id; aiokafka 0.14 speaks the older ones only."""

    API_KEY = 13

    def __init__(self, group: str, shards: Iterable[str]) -> None:
        self._group = group
        self._members = [("", shard) for shard in shards]

    def build(self, request_struct_class: type[_LeaveRequest]) -> _LeaveRequest:
        return request_struct_class(self._group, self._members)


UNKNOWN_MEMBER_ID = 25


async def remove_members(admin: AIOKafkaAdminClient, group: str, shards: Iterable[str]) -> None:
    """Have static members leave now that would keep their slots until their sessions time out. Who is not there is left out.

    For those that are gone for good: a member that lives joins again. Raises Transient.
    """
    try:
        node = await admin.find_coordinator(group)
        answer = await admin._client.send(node, _LeaveGroup(group, shards))
    except (KafkaError, OSError) as error:
        raise Transient(
            f"group {group}", f"members not removed: {type(error).__name__} {error}".rstrip()
        ) from error
    codes = {answer.error_code, *(code for *_, code in answer.members)} - {0, UNKNOWN_MEMBER_ID}
    if codes:
        what = ", ".join(for_code(code).__name__ for code in sorted(codes))
        raise Transient(f"group {group}", f"members not removed: {what}")
