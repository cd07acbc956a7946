"""Where the inventory comes from: the sizes, states and tags of resources, which CloudWatch does not know."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from shard_config.fields import AccountId, Strict, wrong


class Inventory(Strict):
    """What `headgate inventory refresh` asks, and the coordinator each `interval_s`."""

    source: Literal["none", "describe", "config", "csv"] = "none"
    """describe: read-only calls in each account. config: one AWS Config aggregator for all. csv: a file."""
    interval_s: int = Field(21_600, ge=900)
    aggregator: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]*$", max_length=256)] = ""
    """The aggregator's name, of AWS Config."""
    aggregator_account: AccountId | Literal[""] = ""
    """Whose it is; asked by the role that the account has in `accounts`, or by the role template."""
    aggregator_region: str = ""
    file: str = ""
    """A CSV file, read anew at each refresh."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.source == "config":
            for key in ("aggregator", "aggregator_account", "aggregator_region"):
                if not getattr(self, key):
                    raise wrong(key, f"source: config needs {key}")
        if (self.source == "csv") != bool(self.file):
            raise wrong("file", "source: csv needs a file, and no other source takes one")
        return self
