"""Who is asked with what: one configuration's accounts and profiles, and the connection to AWS that they share.

An `Asking` never changes; a new configuration makes another. Looks in flight keep the one that they began with, and a connection
that nobody uses any more is closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

from ingest.clock import Clock
from ingest.sources.aws import Aws
from ingest.sources.discovery import Asked
from ingest.sources.transport import Calls
from shard_config.model import Account, Config


@dataclass(slots=True, eq=False)
class _Connection:
    aws: Aws
    calls: Calls
    users: int = 0
    retired: list[_Connection] = field(default_factory=list)
    """Those of configurations before, that looks in flight may still use."""

    async def close_unused(self) -> None:
        unused = [old for old in self.retired if not old.users]
        self.retired[:] = [old for old in self.retired if old.users]
        for old in unused:
            await old.close()

    async def close(self) -> None:
        retired, self.retired = self.retired, []
        for old in retired:
            await old.close()
        await self.calls.close()
        await self.aws.close()


class Asking:
    """One configuration's view of AWS. `close` the last of them; that closes all connections."""

    def __init__(self, config: Config, clock: Clock, connection: _Connection | None = None) -> None:
        if connection is None:
            aws = Aws(config, clock)
            connection = _Connection(aws, Calls(aws))
        self._clock = clock
        self._config = config.aws
        self.aws = connection.aws
        self.calls = connection.calls
        self._connection = connection
        self._accounts = {account.id: account for account in config.accounts}
        self.profiles = config.service_by_name
        self.keeps_all = config.run.source_keeps_all
        self.pages_count_again = config.aws.pages_count_again

    def asked(self, account_id: str) -> Asked | None:
        """Who is asked for an account's metrics; None where it is not in the configuration."""
        account = self._accounts.get(account_id)
        if account is None:
            return None
        asked = self._monitoring(account) if account.via else account
        return Asked(asked, bool(account.via), self.aws, self.calls.list_metrics)

    def _monitoring(self, account: Account) -> Account:
        """The monitoring account, with its own role and quotas where it is configured, else by the role template."""
        known = self._accounts.get(account.via)
        return known or Account(
            id=account.via,
            regions=account.regions,
            services=account.services,
            external_id=account.external_id,
        )

    @asynccontextmanager
    async def using(self) -> AsyncIterator[Self]:
        """As long as a look goes on."""
        self._connection.users += 1
        try:
            yield self
        finally:
            self._connection.users -= 1
            await self._connection.close_unused()

    def succeeded_by(self, config: Config) -> Asking:
        """The same connection for another configuration, or a new one where AWS is to be reached in another way."""
        way = self._config.endpoint_url, self._config.role_template
        if way != (config.aws.endpoint_url, config.aws.role_template):
            new = Asking(config, self._clock)
            new._connection.retired += [*self._connection.retired, self._connection]
            self._connection.retired = []
            return new
        for account in config.accounts:
            old = self._accounts.get(account.id)
            if old is not None and _role(old) != _role(account):
                self.aws.forget(account.id)
        return Asking(config, self._clock, self._connection)

    async def close(self) -> None:
        await self._connection.close()


def _role(account: Account) -> tuple[str, str]:
    secret = account.external_id
    return account.role_arn, secret.get_secret_value() if secret is not None else ""
