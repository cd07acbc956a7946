"""Where samples go besides the store: receivers of Prometheus' remote write, and how series are called there. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, Self

from pydantic import Field, SecretStr, model_validator

from shard_config.fields import AccountId, HttpUrl, Pattern, Slug, Strict, repeated, wrong

_SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key"})


class Receiver(Strict):
    """One server that takes remote write: a Prometheus, Thanos Receive, Mimir, VictoriaMetrics."""

    name: Slug
    """Stable: it decides which series are this receiver's, and names its consumer group."""
    url: HttpUrl
    """Whole, as http://prometheus-1:9090/api/v1/write."""
    out_of_order_window_s: int = Field(0, ge=0)
    """As the receiver has it (Prometheus: storage.tsdb.out_of_order_time_window). 0: none, and a point is sent once, when it has settled."""
    headers: Mapping[str, str] = {}
    """As {X-Scope-OrgID: metrics}; no secrets."""
    bearer_token: SecretStr | None = None
    username: str = ""
    password: SecretStr | None = None
    ca_file: str = ""
    """PEM certificates that the receiver is checked against; empty: the system's."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if bool(self.username) != (self.password is not None):
            raise wrong("username", "give both username and password, or neither")
        if self.bearer_token is not None and self.username:
            raise wrong("bearer_token", "give either bearer_token or username and password")
        if any(not (name + value).isprintable() for name, value in self.headers.items()):
            raise wrong("headers", "a header holds a control character")
        if any(name.lower() in _SECRET_HEADERS for name in self.headers):
            raise wrong(
                "headers", "a header would be no secret here: use bearer_token, or username and password"
            )
        if self.ca_file and not self.url.startswith("https:"):
            raise wrong("ca_file", "certificates are part of https, and url is not")
        return self


class CustomTags(Strict):
    """Labels of the user's own, `custom_tag_<name>`, on all series or on some."""

    tags: Mapping[str, str] = Field(min_length=1)
    accounts: tuple[AccountId, ...] = ()
    """Empty: of all accounts."""
    services: tuple[Slug, ...] = ()
    """Empty: of all services."""


class ServiceSeries(Strict):
    """What is particular to one service's series, or to those of a job of `exposition`."""

    sent: bool = True
    """false: they go to no receiver; as where Prometheus scrapes the job's endpoints itself."""
    unnamed: str = Field("global", min_length=1, max_length=256)
    """The label `name` of series that belong to no tagged resource. YACE says global, and in a custom namespace the job's name."""
    exported_tags: tuple[str, ...] = ()
    """Keys of resource tags that become labels `tag_<key>` of the service's series."""
    nil_to_zero: tuple[Pattern, ...] = ()
    """Patterns of metric names whose missing points are sent as 0, once a complete look says that they are missing and the time has settled."""


class RemoteWrite(Strict):
    """Samples to Prometheus, over as many receivers as it takes; a consumer group for each."""

    receivers: tuple[Receiver, ...] = Field(min_length=1)
    shard_by: tuple[Literal["account", "region", "service"], ...] = Field(("account",), min_length=1)
    """A series goes to the receiver that a hash of these chooses."""
    names: Literal["yace", "headgate"] = "yace"
    """yace: as dashboards and rules for YACE expect them. headgate: one name a metric, the statistic a label."""
    snake_case: bool = False
    """Labels in snake case: dimension_instance_id. YACE's -labels-snake-case."""
    resources: bool = True
    """Exporters list tagged resources (tag:GetResources, free), for `name`, tag_* and the aws_*_info series. Only with names: yace."""
    services: Mapping[Slug, ServiceSeries] = {}
    """By service."""
    custom_tags: tuple[CustomTags, ...] = ()
    samples_per_request: int = Field(2_000, ge=1, le=100_000)
    hold_bytes_max: int = Field(256 * 1024 * 1024, ge=1024 * 1024)
    """Of points that wait until they have settled, over all receivers of a process; past it a process stops reading Kafka."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if twice := repeated(tuple(r.name for r in self.receivers)):
            raise wrong("receivers", f"{twice} stands there twice")
        if twice := repeated(self.shard_by):
            raise wrong("shard_by", f"{twice} stands there twice")
        return self
