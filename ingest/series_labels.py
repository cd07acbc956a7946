"""The labels of each series in Prometheus, and the receiver that it goes to. Pure.

Guarantees:

* a LabelSet is one that every receiver takes: classic names, sorted and distinct, values not empty, valid UTF-8 and of bounded length;
* two series never have the same LabelSet: the one that comes later is Rejected (labels_taken) as long as the earlier is remembered,
  which is for `CLAIMS_MAX` series. So it goes with periods too, which YACE's labels do not tell apart;
* what cannot be said is Rejected with its reason, never sent under another's name;
* a series' receiver depends on names and on `shard_by` alone: the same on every machine, and a receiver more takes 1/n of the series.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Final

from ingest.errors import Rejected
from ingest.model import Series, SourceName, Target, series_id
from ingest.ports import LabelSet
from ingest.resources import Resource
from ingest.validate import Reason
from shard_config.model import Config
from shard_config.remote_write import CustomTags, RemoteWrite, ServiceSeries
from shard_config.series_names import custom_tag_label, dimension_label, info_name, metric_name, tag_label

CLAIMS_MAX: Final = 1_000_000
"""Label sets whose series is remembered, at 135 bytes each; past it the oldest is forgotten."""
NAME_BYTES_MAX: Final = 512
LABELS_MAX: Final = 128

_OWN: Final = ("account", "region", "job")
"""Labels that what was scraped gets from us; its own of these names become exported_…, as with Prometheus."""


class Labels:
    """Label sets in the configured style. One for all receivers of a process; another configuration is another `Labels`."""

    def __init__(self, config: Config) -> None:
        """Raises ValueError where the configuration has no `remote_write`."""
        if config.remote_write is None:
            raise ValueError("labels are of remote_write, and the configuration has none")
        self._write: RemoteWrite = config.remote_write
        self._aliases = {account.id: account.alias for account in config.accounts}
        self._namespaces = {profile.service: profile.namespace for profile in config.services}
        self._value_bytes_max = config.limits.label_bytes_max
        self._claims: dict[int, int] = {}
        self._custom = lru_cache(16_384)(self._custom_of)
        self._receiver = lru_cache(65_536)(self._receiver_of)

    def of(self, series: Series, service: str, target: Target, resource: Resource | None) -> LabelSet:
        """The labels of a series. `resource` is the one it belongs to, None where there is none.

        Raises Rejected: labels_taken where another series has them, else what of them cannot be said.
        """
        if target.source == SourceName.EXPOSITION:
            pairs = self._scraped(series, service)
        elif self._write.names == "yace":
            pairs = self._yace(series, service, resource)
        else:
            pairs = self._headgate(series, service)
        labels = self._checked(pairs, str(series.key))
        self._claim(labels, series)
        return labels

    def info(self, target: Target, service: str, resource: Resource) -> LabelSet:
        """The labels of a resource's aws_*_info, whose value is 0: all its tags.

        Raises Rejected where they cannot be said, KeyError where the service is not in the configuration.
        """
        pairs = {"__name__": info_name(self._namespaces[service]), "name": resource.arn}
        for key, value in resource.tags.items():
            pairs[tag_label(key, self._write.snake_case)] = value
        pairs |= self._context(target.account, target.region, service)
        return self._checked(pairs, resource.arn)

    def receiver_of(self, series: Series, service: str) -> str:
        """The name of the receiver that a series goes to; empty where to none."""
        return self.receiver_for(series.key.account, series.key.region, service)

    def receiver_for(self, account: str, region: str, service: str) -> str:
        """The name of the receiver that series of an account, region and service go to; empty where to none."""
        if not self._write.services.get(service, _PLAIN).sent:
            return ""
        values = {"account": account, "region": region, "service": service}
        return self._receiver(tuple(values[by] for by in self._write.shard_by))

    # --- styles -----------------------------------------------------------------------------------------------

    def _yace(self, series: Series, service: str, resource: Resource | None) -> dict[str, str]:
        key, mine = series.key, self._write.services.get(service, _PLAIN)
        pairs = {
            "__name__": metric_name("yace", key.namespace, key.metric, key.stat),
            "name": mine.unnamed if resource is None else resource.arn,
        }
        for name, value in key.dimensions:
            pairs[dimension_label("yace", name, self._write.snake_case)] = value
        for tag in mine.exported_tags:
            pairs[tag_label(tag, self._write.snake_case)] = (
                "" if resource is None else resource.tags.get(tag, "")
            )
        return pairs | self._context(key.account, key.region, service)

    def _headgate(self, series: Series, service: str) -> dict[str, str]:
        key = series.key
        pairs = {
            "__name__": metric_name("headgate", key.namespace, key.metric, key.stat),
            "account": key.account,
            "region": key.region,
            "stat": key.stat,
            "period": str(key.period_s),
            "account_alias": self._aliases.get(key.account, ""),
        }
        for name, value in key.dimensions:
            label = dimension_label("headgate", name, self._write.snake_case)
            if label in pairs:
                raise Rejected(str(key), Reason.DUPLICATE_DIMENSION, f"two dimensions are called {label}")
            pairs[label] = value
        return pairs | self._custom(key.account, service)

    def _scraped(self, series: Series, service: str) -> dict[str, str]:
        key = series.key
        pairs = {"__name__": key.metric, "account": key.account, "region": key.region, "job": key.namespace}
        taken = {*pairs, *(name for name, _ in key.dimensions if name not in _OWN)}
        for name, value in key.dimensions:
            label = name
            while label in _OWN or (label != name and label in taken):
                label = f"exported_{label}"
            taken.add(label)
            pairs[label] = value
        return pairs | self._custom(key.account, service)

    def _context(self, account: str, region: str, service: str) -> dict[str, str]:
        alias = self._aliases.get(account, "")
        return {
            "account_id": account,
            "region": region,
            "account_alias": alias,
            **self._custom(account, service),
        }

    def _custom_of(self, account: str, service: str) -> dict[str, str]:
        """Labels of the user's own; of one name the last that is meant."""
        return {
            custom_tag_label(key, self._write.snake_case): value
            for custom in self._write.custom_tags
            if _is_meant(custom, account, service)
            for key, value in custom.tags.items()
        }

    # --- checks -----------------------------------------------------------------------------------------------

    def _checked(self, pairs: dict[str, str], where: str) -> LabelSet:
        labels = tuple(sorted((name, value) for name, value in pairs.items() if name and value))
        if len(labels) > LABELS_MAX:
            raise Rejected(where, Reason.TOO_MANY_DIMENSIONS, f"{len(labels)} labels, at most {LABELS_MAX}")
        if not pairs["__name__"]:
            raise Rejected(where, Reason.BAD_NAME, "a metric without a name")
        for name, value in labels:
            if problem := self._problem(name, value):
                raise Rejected(where, problem, f"label {name[:100]!r}")
        return labels

    def _problem(self, name: str, value: str) -> Reason | None:
        if not _is_name(name, value if name == "__name__" else ""):
            return Reason.BAD_NAME
        try:
            long = len(value if value.isascii() else value.encode()) > self._value_bytes_max
        except UnicodeEncodeError:  # half of a surrogate pair
            return Reason.CONTROL_CHARACTER
        return Reason.LABEL_TOO_LONG if long or len(name) > NAME_BYTES_MAX else None

    def _claim(self, labels: LabelSet, series: Series) -> None:
        """Remember whose these labels are. 64 bits of a hash each: of a million series one pair in 40 million runs meets by chance."""
        try:
            owner = int.from_bytes(series_id(series.key)[:8])
        except UnicodeEncodeError as error:
            raise Rejected(repr(series.key), Reason.CONTROL_CHARACTER, "half of a surrogate pair") from error
        # What Python writes of a tuple of texts is unambiguous, and five times as quick as hashing piece by piece.
        mine = int.from_bytes(blake2b(repr(labels).encode(), digest_size=8).digest())
        if self._claims.setdefault(mine, owner) != owner:
            what = f"another series is called {dict(labels)['__name__']} with the same labels"
            raise Rejected(str(series.key), Reason.LABELS_TAKEN, what)
        if len(self._claims) > CLAIMS_MAX:
            del self._claims[next(iter(self._claims))]

    def _receiver_of(self, values: tuple[str, ...]) -> str:
        """Rendezvous hashing: the receiver whose name, hashed with the values, comes out highest."""
        said = "\0".join(values).encode()

        def score(name: str) -> bytes:
            return blake2b(name.encode() + b"\0" + said, digest_size=16).digest()

        return max((receiver.name for receiver in self._write.receivers), key=score)


_PLAIN: Final = ServiceSeries()


def _is_meant(custom: CustomTags, account: str, service: str) -> bool:
    return (not custom.accounts or account in custom.accounts) and (
        not custom.services or service in custom.services
    )


@lru_cache(16_384)
def _is_name(name: str, metric: str) -> bool:
    """Whether a label's name is a classic one; of __name__ the metric's, too."""
    if name == "__name__":
        return metric.replace(":", "_").isidentifier() and metric.isascii()
    return name.isidentifier() and name.isascii()
